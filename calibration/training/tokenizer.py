"""A byte-level byte-pair tokenizer, trained by the library behind transformers.

Every byte is a token, so that any text can be written, and there is none that is unknown. Text is cut into words as for
Llama 3 (its regular expression without English contractions), which keeps an indentation, an identifier's part or a run
of signs in one piece; pairs are merged within these.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibration.training.corpus import SEPARATOR, Document
from engine.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NUM_BYTES = 256
_WORDS = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+"  # letters, with the space, dot or underscore in front
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # signs, with the end of their line
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_UNTRAINED = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Isolated", "invert": False},
            _BYTES,
        ],
    },
    "decoder": _BYTES,
    "model": {"type": "BPE", "vocab": {}, "merges": []},
}
# The models know files, no conversations: what is said becomes a file's comments.
_CHAT_TEMPLATE = (
    "{% for message in messages %}# {{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant:\n{% endif %}"
)
_DOCUMENTS_PER_CALL = 512


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer of `vocab_size` tokens, of which token 0 separates documents.

    Raises:
        UserError: fewer tokens than bytes are asked for, or the texts have too few pairs of bytes to merge.
    """
    from transformers import PreTrainedTokenizerFast

    if vocab_size <= NUM_BYTES:
        raise UserError(f"a vocabulary of {vocab_size} tokens is too small; it must have more than {NUM_BYTES}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        file.write_text(json.dumps(_UNTRAINED), encoding="utf-8")
        untrained = PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token=SEPARATOR, eos_token=SEPARATOR)
    tokenizer = untrained.train_new_from_iterator(texts, vocab_size, show_progress=False)
    if len(tokenizer) != vocab_size:
        raise UserError(
            f"the corpus is too small: it gives {len(tokenizer):,} tokens, not {vocab_size:,}; "
            "train on more text, or with a smaller --vocab-size"
        )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> Iterator[np.ndarray]:
    """The token ids of each document, int32 [num_tokens], without separators."""
    for start in range(0, len(documents), _DOCUMENTS_PER_CALL):
        texts = [document.text for document in documents[start : start + _DOCUMENTS_PER_CALL]]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for token_ids in encoded["input_ids"]:
            yield np.asarray(token_ids, dtype=np.int32)


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> np.ndarray:
    """All documents one after another, a separator before each: int32 [num_tokens]."""
    separator = np.array([tokenizer.eos_token_id], dtype=np.int32)
    pieces = [piece for token_ids in encode_documents(tokenizer, documents) for piece in (separator, token_ids)]
    return np.concatenate(pieces) if pieces else separator[:0]
