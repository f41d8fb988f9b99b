"""Text to token ids and back, whole or as it comes.

Tokenizers are read from the model's folder and from nowhere else: nothing is downloaded, no code of the folder is run.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from engine.errors import UserError

# Any of these makes a folder one with a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")

# Tokens of the prompt that are decoded along with the output: what stands at the beginning of a text is decoded
# differently (SentencePiece drops its space).
_CONTEXT_TOKENS = 6
# An unfinished character has at most 3 bytes, each of them a token at worst. Longer runs are no text at all.
_MAX_HELD_TOKENS = 16
_KEPT_TOKENS = 8
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer(Protocol):
    """What the engine asks of a tokenizer.

    Attributes:
        notice: what a user should know about its text, or None.
    """

    notice: str | None

    def encode(self, text: str) -> list[int]:
        """The token ids of a prompt, with the special tokens that the model wants in front."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of these tokens; special tokens have none."""
        ...


def load_tokenizer(model: str, vocab_size: int) -> Tokenizer:
    """The tokenizer of a model folder, or one without files where there is none.

    Args:
        model: a folder, its config.json, or the name of a built-in model.
        vocab_size: of the model.

    Raises:
        UserError: the folder has a tokenizer that cannot be read.
    """
    folder = Path(model)
    if folder.is_file():
        folder = folder.parent
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        return HFTokenizer(folder)
    return ByteTokenizer() if vocab_size >= ByteTokenizer.vocab_size else NumberTokenizer()


class HFTokenizer:
    """The tokenizer of a Hugging Face folder.

    Attributes:
        tokenizer: the one of transformers.
    """

    notice = None

    def __init__(self, folder: Path | str) -> None:
        from transformers import AutoTokenizer

        try:
            # Of the many kinds of errors that a bad file raises, none says which file it is.
            self.tokenizer = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, clean_up_tokenization_spaces=False
            )
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{folder}: the tokenizer cannot be read ({reason})") from None

    def encode(self, text: str) -> list[int]:
        # Not verbose: it warns of prompts beyond the length in its own settings; ours is the engine's.
        return self.tokenizer.encode(text, verbose=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:  # the same, three times as fast, and twice per token that is streamed
            return backend.decode(list(token_ids), skip_special_tokens=True)
        # Cleaning up takes back spaces that have been shown already.
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


class ByteTokenizer:
    """UTF-8 bytes as tokens 0 to 255, for models without a tokenizer. Tokens of no byte are shown as numbers."""

    bos_token_id, eos_token_id, pad_token_id = 256, 257, 258
    vocab_size = 259
    notice = "the model has no tokenizer: a token is a byte of UTF-8, and others are shown as <number>"

    def encode(self, text: str) -> list[int]:
        return [self.bos_token_id, *text.encode("utf-8", errors="replace")]

    def decode(self, token_ids: Sequence[int]) -> str:
        shown = [token for token in token_ids if not 256 <= token < self.vocab_size]
        runs = itertools.groupby(shown, key=lambda token: token < 256)
        return "".join(
            bytes(run).decode("utf-8", errors="replace") if is_bytes else "".join(f"<{token}>" for token in run)
            for is_bytes, run in runs
        )


class NumberTokenizer:
    """For models without a tokenizer whose vocabulary is smaller than a byte's: text is token ids."""

    notice = "the model has no tokenizer and fewer tokens than there are bytes: token ids are shown instead of text"

    def encode(self, text: str) -> list[int]:
        raise UserError("the model has no tokenizer and fewer tokens than there are bytes; give prompt_token_ids")

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(f"{token} " for token in token_ids)


class Detokenizer:
    """The text of a growing list of tokens.

    Every `append` returns what the new tokens add. It never takes back what it returned, so an unfinished character
    (bytes that decode to U+FFFD) is held back until its last byte comes, or `flush`. All pieces together are what
    decoding all tokens at once gives.

    Decoding the new tokens alone would be wrong at their edges, and decoding all of them each time slow. A window
    begins at the tokens that gave the last piece::

        | ........ | t t t t | t t | t |
                   |<-------  window  |->|
                   |<-read ->|  held  new        emitted: characters of the window that have been returned
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = ()) -> None:
        """
        Args:
            tokenizer: whose text it is.
            prompt_token_ids: what stands before the first token; without it, the tokens are a text of their own.
        """
        self._decode = tokenizer.decode
        context = list(prompt_token_ids[-_CONTEXT_TOKENS:])
        text = self._decode(context) if context else ""
        if text.endswith(_REPLACEMENT):  # the prompt ends within a character, whose rest is no text
            context, text = [], ""
        self._window = context
        self._read = len(context)
        self._emitted = len(text)

    def append(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete, possibly none."""
        self._window.extend(token_ids)
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT):
            return self._hold(text)
        piece = text[self._emitted :]
        if piece:
            self._window = self._window[self._read :]
            self._read = len(self._window)
            self._emitted = len(self._decode(self._window))
        return piece

    def flush(self) -> str:
        """What was held back: the last tokens have come."""
        text = self._decode(self._window)
        piece = text[self._emitted :]
        self._emitted = max(self._emitted, len(text))
        return piece

    def _hold(self, text: str) -> str:
        """Return what stands before the unfinished character."""
        if len(self._window) - self._read > _MAX_HELD_TOKENS:
            # All but the last U+FFFD will not change any more. Go on with a window of the last few tokens.
            piece = text[self._emitted : -1]
            self._window = self._window[-_KEPT_TOKENS:]
            self._read = len(self._window)
            self._emitted = max(0, len(self._decode(self._window)) - 1)
            return piece
        settled = len(text.rstrip(_REPLACEMENT))
        piece = text[self._emitted : settled]
        self._emitted = max(self._emitted, settled)
        return piece
