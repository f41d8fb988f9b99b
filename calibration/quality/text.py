"""What is read: windows of held-out documents, and prompts in which a line was planted.

A prompt of the retrieval test, and what is forced behind it::

    separator  lead       plant              filler               newline   query       value
    sep        16 tokens  name = 'value'\n   `distance` tokens    \n        name = '    value
    [ prefilled ........................................................ ][ decoded one by one ]

Name and value are words drawn at random from the held-out text, so that a value has nothing to do with its name; the
filler is held-out text from the beginning of a line on. Without the plant, the same prompt says what a value is
worth by chance. That all tokens of the value are the most probable ones, each behind the true ones before it, means
that greedy decoding writes the value.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibration.quality.forcing import Text
from calibration.training.corpus import Document
from calibration.training.pair import HELD_OUT, read_held_out
from calibration.training.tokenizer import encode_documents, token_stream
from engine.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LEAD_TOKENS = 16
MIN_DOCUMENTS = 2  # with fewer there is nothing to resample
_ROOM = 96  # tokens of a prompt besides filler, at most: lead, plant, query and value
_WORD = re.compile(r"\b[a-z]+(?:_[a-z]+)*\b")
_WORD_LETTERS = range(6, 17)


@dataclass(frozen=True)
class Window:
    """A run of held-out tokens and the number of the document that it is from."""

    document: int
    tokens: list[int]


@dataclass(frozen=True)
class Trial:
    """One planted line.

    Attributes:
        distance: tokens between the plant and the line that repeats it.
        text: to read. control: the same without the plant.
        value: which of the forced tokens are the value.
    """

    distance: int
    text: Text
    control: Text
    value: slice


def held_out_documents(pair: Path) -> list[Document]:
    """The held-out documents of a pair.

    Raises:
        UserError: there is no pair, or it has no held-out documents.
    """
    if not (pair / "target" / "config.json").is_file():
        raise UserError(
            f"there is no pair in {pair}: it has no target/config.json; make one with calibration.train_pair"
        )
    return read_held_out(pair / HELD_OUT)


def read_windows(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], count: int, context: int
) -> list[Window]:
    """Windows of `context` tokens, the first of a document with the separator before it.

    All documents give their first window before any gives a second one, and so on. What is left at a document's end is
    not used.

    Args:
        count: most windows.

    Raises:
        UserError: fewer than two documents have as many tokens.
    """
    rounds: dict[int, list[Window]] = {}
    for number, token_ids in enumerate(encode_documents(tokenizer, documents)):
        tokens = [tokenizer.eos_token_id, *token_ids.tolist()]
        for turn, start in enumerate(range(0, len(tokens) - context + 1, context)):
            rounds.setdefault(turn, []).append(Window(number, tokens[start : start + context]))
    windows = [window for turn in sorted(rounds) for window in rounds[turn]][:count]
    found = len({window.document for window in windows})
    if found < MIN_DOCUMENTS:
        raise UserError(
            f"the held-out text is too short: {found} of {len(documents)} documents have {context} tokens, and "
            f"{MIN_DOCUMENTS} are needed; lower --context, or train a pair that keeps more of its held-out text"
        )
    return windows


def read_trials(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], distances: Sequence[int], count: int, seed: int
) -> list[Trial]:
    """`count` trials of each distance, in the order of the distances.

    Raises:
        UserError: the held-out text is shorter than the longest distance.
    """
    stream = token_stream(tokenizer, documents)
    ends_line = np.array([text.endswith("\n") for text in tokenizer.batch_decode([[i] for i in range(len(tokenizer))])])
    lines = np.flatnonzero(ends_line[stream]) + 1
    longest = max(distances)
    lines = lines[lines + longest <= len(stream)]
    words = sorted({word for document in documents for word in _WORD.findall(document.text)})
    words = [word for word in words if len(word) in _WORD_LETTERS]
    if not len(lines) or len(words) < 2:
        raise UserError(
            f"the held-out text is too short: it has {len(stream):,} tokens, and a line is to be found again over "
            f"{longest:,}; lower --context, or train a pair that keeps more of its held-out text"
        )
    random = np.random.default_rng(seed)
    return [_trial(tokenizer, stream, lines, words, distance, random) for distance in distances for _ in range(count)]


def _trial(tokenizer, stream, lines, words, distance: int, random: np.random.Generator) -> Trial:
    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    name, word = random.choice(words, 2, replace=False)
    query, value = encode(f"{name} = '"), encode(str(word))
    newline = encode("\n")
    start, lead = int(random.choice(lines)), int(random.choice(lines))
    filler = stream[start : start + distance].tolist()
    begin = [tokenizer.eos_token_id, *stream[lead : lead + LEAD_TOKENS].tolist(), *newline]
    forced = [*query, *value]
    return Trial(
        distance,
        Text([*begin, *query, *value, *encode("'\n"), *filler, *newline], forced),
        Text([*begin, *filler, *newline], forced),
        slice(len(query), len(forced)),
    )


def distances_for(context: int) -> tuple[int, ...]:
    """Distances that fit a context: 64, twice as much and so on, 1,536, and the longest."""
    longest = context - _ROOM
    return tuple(d for d in (64, 128, 256, 512, 1024, 1536) if d < longest) + ((longest,) if longest > 0 else ())
