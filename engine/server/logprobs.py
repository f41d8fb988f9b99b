"""Log-probabilities in OpenAI's two shapes, and the text and bytes of single tokens that both of them show."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

from engine.outputs import TokenLogprobs
from engine.tokenizer import ByteTokenizer, HFTokenizer, Tokenizer

_LEAST = -9999.0  # JSON has no infinity; OpenAI and vLLM send this
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """What single tokens look like. Special tokens are shown by their names."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}
        self._byte_of: dict[str, int] | None = None
        self._names: dict[int, str] = {}
        self._hidden: set[int] = set()
        if isinstance(tokenizer, HFTokenizer):
            added = tokenizer.tokenizer.added_tokens_decoder
            self._names = {token: str(name) for token, name in added.items()}
            self._hidden = {token for token, name in added.items() if name.special}
            if "ByteLevel" in repr(tokenizer.tokenizer.backend_tokenizer.decoder):
                self._byte_of = _byte_level_alphabet()

    def __call__(self, token_id: int) -> tuple[str, bytes]:
        """The text and the bytes of a token. Of a token that is part of a character, only the bytes are exact."""
        known = self._known.get(token_id)
        if known is None:
            data = self._bytes(token_id)
            known = self._known[token_id] = (data.decode("utf-8", errors="replace"), data)
        return known

    def in_text(self, token_id: int) -> bytes:
        """The bytes that a token gives to a text: of special tokens none."""
        return b"" if token_id in self._hidden else self(token_id)[1]

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._names:
            return self._names[token_id].encode()
        if isinstance(self._tokenizer, HFTokenizer):
            return self._piece_bytes(self._tokenizer.tokenizer.convert_ids_to_tokens(token_id), token_id)
        if isinstance(self._tokenizer, ByteTokenizer) and token_id < 256:
            return bytes([token_id])
        return self._tokenizer.decode([token_id]).encode()

    def _piece_bytes(self, piece: str | None, token_id: int) -> bytes:
        """The bytes of a piece of the vocabulary, which each kind of tokenizer writes in its own way."""
        if piece is None:  # the model's vocabulary is larger than the tokenizer's
            return b""
        if self._byte_of is not None and all(character in self._byte_of for character in piece):
            return bytes(self._byte_of[character] for character in piece)
        byte = _BYTE_TOKEN.fullmatch(piece)
        if byte is not None:
            return bytes([int(byte[1], 16)])
        if "\N{LOWER ONE EIGHTH BLOCK}" in piece:  # SentencePiece's space, which decoding drops where a text begins
            return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
        return self._tokenizer.decode([token_id]).encode()


def longest_token(tokenizer: Tokenizer) -> int:
    """The most characters of a text that one token can stand for."""
    if isinstance(tokenizer, HFTokenizer):
        return max(map(len, tokenizer.tokenizer.get_vocab()), default=1)
    return 1


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones of Latin-1 stand for themselves, the rest for 256, 257, ..."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


def chat_logprobs(entries: Sequence[TokenLogprobs], texts: TokenTexts) -> dict[str, object]:
    """As in choices[].logprobs of a chat completion."""

    def shown(token_id: int, logprob: float) -> dict[str, object]:
        text, data = texts(token_id)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(data)}

    content = [
        {**shown(entry.token_id, entry.logprob), "top_logprobs": [shown(*pair) for pair in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


class TextOffsets:
    """Where the tokens of a growing text begin in it, in characters; within a character, where that begins."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_characters = 0

    def next(self, token_id: int) -> int:
        """Where the next token begins, which is this one."""
        begin = self._num_characters
        self._num_characters += len(self._decoder.decode(self._texts.in_text(token_id)))
        return begin


def completion_logprobs(entries: Sequence[TokenLogprobs], texts: TokenTexts, offsets: TextOffsets) -> dict[str, object]:
    """As in choices[].logprobs of a completion.

    `top_logprobs` has the drawn token too, so one more than were asked for if it was not among the most probable.

    Args:
        offsets: of the output, whose next tokens these are.
    """
    tokens, tops = [], []
    for entry in entries:
        text = texts(entry.token_id)[0]
        tokens.append(text)
        top = {texts(token_id)[0]: _finite(logprob) for token_id, logprob in reversed(entry.top)}
        tops.append({**dict(reversed(top.items())), text: _finite(entry.logprob)})
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(entry.logprob) for entry in entries],
        "top_logprobs": tops,
        "text_offset": [offsets.next(entry.token_id) for entry in entries],
    }


def _finite(logprob: float) -> float:
    return logprob if logprob > _LEAST else _LEAST
