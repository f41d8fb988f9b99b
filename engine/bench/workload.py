"""Requests to replay: lengths and arrivals from a file or a seed, and prompts made to fit them.

The file has one JSON object per line, in the columns that `planner.workload.save_workload` writes::

    {"arrival_s": 0.4, "input_tokens": 1155, "output_tokens": 211, "hash_ids": [0, 7], "prefix_block_tokens": 1024}

The last two are optional. An id stands for a block of prefix_block_tokens prompt tokens, the last one perhaps cut short
by the prompt's end; tokens behind the ids are shared with nobody.
"""

from __future__ import annotations

import json
import math
import random
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.commands.files import unpacked
from engine.errors import UserError
from engine.values import shown

MAX_TOKENS = 2**24 - 1  # as the planner has it
MAX_DURATION_S = 1e9  # likewise
MAX_REPLAY_S = 7 * 86_400  # longer than anybody waits for requests that arrive by the clock
# Epoch seconds lie within it, and a float still tells microseconds apart.
_MAX_ARRIVAL_S = 1e10
# What a stream of random tokens is for, so that no two purposes share one.
_SHARED, _OWN = 0, 1


@dataclass(frozen=True)
class Entry:
    """One request of a workload."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Workload:
    """Requests in order of arrival, the first at 0 s.

    Attributes:
        prefix_block_tokens: prompt tokens that an id stands for; None where no request has ids.
    """

    name: str
    entries: tuple[Entry, ...]
    prefix_block_tokens: int | None = None

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def has_prefixes(self) -> bool:
        return self.prefix_block_tokens is not None

    @property
    def request_rate(self) -> float | None:
        """Requests per second from the first arrival to the last; None if all arrive at once."""
        duration_s = self.entries[-1].arrival_s
        return (len(self) - 1) / duration_s if duration_s else None

    def head(self, count: int) -> Workload:
        """The first `count` requests."""
        return replace(self, entries=self.entries[:count])

    def scaled(self, factor: float) -> Workload:
        """Requests arrive `factor` times as fast."""
        entries = tuple(replace(entry, arrival_s=entry.arrival_s / factor) for entry in self.entries)
        return replace(self, entries=entries)

    def at_once(self) -> Workload:
        """The same requests, all of them arriving at 0 s."""
        return replace(self, entries=tuple(replace(entry, arrival_s=0.0) for entry in self.entries))

    def capped(self, output_tokens: int) -> Workload:
        """No request gets more than `output_tokens`."""
        entries = (replace(entry, output_tokens=min(entry.output_tokens, output_tokens)) for entry in self.entries)
        return replace(self, entries=tuple(entries))


# ---- files -----------------------------------------------------------------------------------------------------------


def read_workload(path: Path) -> Workload:
    """Read a JSONL workload, gzipped or not.

    Raises:
        UserError: naming file and line of what cannot be used.
    """
    lines = [(number, line) for number, line in enumerate(_read_text(path).splitlines(), 1) if line.strip()]
    if not lines:
        raise UserError(f"{path.name} has no requests: it is empty")
    rows = [_parse(f"{path.name} line {number}", line) for number, line in lines]
    block_tokens = _block_tokens(rows)
    entries = [_entry(where, row, block_tokens) for where, row in rows]
    for (where, _), entry, before in zip(rows[1:], entries[1:], entries, strict=False):
        if entry.arrival_s < before.arrival_s:
            raise UserError(
                f"{where}: arrival_s {entry.arrival_s:g} is earlier than on the line before; sort the file by arrival_s"
            )
    first_s = entries[0].arrival_s
    if entries[-1].arrival_s - first_s > MAX_DURATION_S:
        raise UserError(
            f"{path.name} lasts {entries[-1].arrival_s - first_s:.3g} s; at most {MAX_DURATION_S:g} s are read, so "
            "check that arrival_s is in seconds"
        )
    entries = [replace(entry, arrival_s=entry.arrival_s - first_s) for entry in entries]
    return Workload(path.name, tuple(entries), block_tokens)


def save_workload(workload: Workload, path: Path) -> None:
    """Write what `read_workload` and the planner's `load_workload` read back.

    Raises:
        UserError: the file cannot be written.
    """
    from engine.bench.record import write_text

    lines = []
    for entry in workload.entries:
        row: dict[str, Any] = {
            "arrival_s": entry.arrival_s,
            "input_tokens": entry.input_tokens,
            "output_tokens": entry.output_tokens,
        }
        if workload.has_prefixes:
            row |= {"hash_ids": list(entry.hash_ids), "prefix_block_tokens": workload.prefix_block_tokens}
        lines.append(json.dumps(row) + "\n")
    write_text(path, "".join(lines))


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return unpacked(data).decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read workload {path}: {error.strerror or error}") from error
    except (EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path.name} is not a text file of JSON lines: {error}") from error


def _parse(where: str, line: str) -> tuple[str, dict[str, Any]]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object with arrival_s, input_tokens and output_tokens")
    return where, row


def _block_tokens(rows: list[tuple[str, dict[str, Any]]]) -> int | None:
    """Tokens per id, which is one number for the whole file."""
    found = None
    for where, row in rows:
        if "hash_ids" not in row:
            continue
        if "prefix_block_tokens" not in row:
            raise UserError(
                f"{where} has hash_ids but no prefix_block_tokens, the prompt tokens that each id stands for"
            )
        tokens = _tokens(where, row, "prefix_block_tokens")
        if found not in (None, tokens):
            raise UserError(f"{where}: prefix_block_tokens is {tokens}, but {found} on an earlier line")
        found = tokens
    return found


def _entry(where: str, row: dict[str, Any], block_tokens: int | None) -> Entry:
    for name in ("arrival_s", "input_tokens", "output_tokens"):
        if name not in row:
            raise UserError(
                f"{where} has no {name}; every line needs arrival_s, input_tokens and output_tokens (`memwall simulate "
                "--trace FILE --save-workload PATH` converts other formats)"
            )
    arrival_s = row["arrival_s"]
    if type(arrival_s) not in (int, float) or not abs(arrival_s) <= _MAX_ARRIVAL_S:  # NaN compares false
        raise UserError(
            f"{where}: arrival_s is {shown(arrival_s)}, which is not a number of seconds up to {_MAX_ARRIVAL_S:g}"
        )
    ids = row.get("hash_ids", [])
    if not isinstance(ids, list) or not all(type(name) is int and name >= 0 for name in ids):
        raise UserError(f"{where}: hash_ids is {shown(ids)}, which is not a list of whole numbers from 0")
    input_tokens = _tokens(where, row, "input_tokens")
    if ids and (len(ids) - 1) * (block_tokens or 0) >= input_tokens:
        raise UserError(
            f"{where} has {len(ids)} hash_ids of {block_tokens} tokens for only {input_tokens} input_tokens"
        )
    return Entry(float(arrival_s), input_tokens, _tokens(where, row, "output_tokens"), tuple(ids))


def _tokens(where: str, row: dict[str, Any], name: str) -> int:
    value = row[name]
    if type(value) is not int or not 1 <= value <= MAX_TOKENS:
        raise UserError(f"{where}: {name} is {shown(value)}, which is not a number of tokens from 1 to {MAX_TOKENS}")
    return value


def ensure_replayable(workload: Workload, remedy: str) -> None:
    """Raise UserError if nobody can have meant to wait for the last request to arrive."""
    duration_s = workload.entries[-1].arrival_s
    if not duration_s <= MAX_REPLAY_S:
        raise UserError(
            f"the last request of {workload.name} arrives after {duration_s:.3g} s; at most {MAX_REPLAY_S:,} s "
            f"(7 days) are replayed: {remedy}"
        )


# ---- from a seed -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """Whole numbers of tokens from low to high, all equally likely."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """From "100:1024", or "512" for always the same.

        Raises:
            ValueError: saying what would be right.
        """
        low, colon, high = text.partition(":")
        try:
            lengths = cls(int(low), int(high if colon else low))
        except ValueError:
            raise ValueError(f"{text!r} is neither a number of tokens nor a range such as 100:1024") from None
        if not 1 <= lengths.low <= lengths.high <= MAX_TOKENS:
            raise ValueError(f"{text!r} must lie between 1 and {MAX_TOKENS}, the smaller bound first")
        return lengths

    def draw(self, stream: random.Random) -> int:
        return stream.randint(self.low, self.high)


def synthesise(num_prompts: int, request_rate: float, input_len: Lengths, output_len: Lengths, seed: int) -> Workload:
    """Poisson arrivals at `request_rate` per second (inf: all at once), uniform lengths. Same seed, same workload."""
    arrivals, inputs, outputs = (random.Random(f"{seed} {what}") for what in ("arrivals", "inputs", "outputs"))
    entries, arrival_s = [], 0.0
    for _ in range(num_prompts):
        entries.append(Entry(round(arrival_s, 6), input_len.draw(inputs), output_len.draw(outputs)))
        arrival_s += arrivals.expovariate(request_rate) if math.isfinite(request_rate) else 0.0
    return Workload(f"synthetic workload, seed {seed}", tuple(entries))


# ---- prompts ---------------------------------------------------------------------------------------------------------


class Prompts:
    """Random tokens, the same for the same seed and run.

    Args:
        run: repetitions of a workload differ in it, so that none finds the prefixes of another in the cache.
    """

    def __init__(self, vocab_size: int, seed: int, run: int = 0) -> None:
        self._vocab_size = vocab_size
        self._key = (seed, run)

    def of(self, workload: Workload) -> Iterable[list[int]]:
        """The prompt of each request: equal ids have equal tokens, everything else has its own."""
        for index, entry in enumerate(workload.entries):
            blocks = [self._random(_SHARED, name, workload.prefix_block_tokens or 0) for name in entry.hash_ids]
            blocks.append(self.own(index, entry.input_tokens))
            yield np.concatenate(blocks)[: entry.input_tokens].tolist()

    def own(self, index: int, count: int) -> np.ndarray:
        """int64 [count], the tokens that only the prompt of this index has."""
        return self._random(_OWN, index, count)

    def _random(self, purpose: int, name: int, count: int) -> np.ndarray:
        return np.random.default_rng([*self._key, purpose, name]).integers(self._vocab_size, size=count)


def split(workload: Workload, why_not: Callable[[Entry], str]) -> tuple[Workload, list[str]]:
    """The requests that can run, and for each of the others the reason that `why_not` gives."""
    reasons = [why_not(entry) for entry in workload.entries]
    kept = tuple(entry for entry, reason in zip(workload.entries, reasons, strict=True) if not reason)
    return replace(workload, entries=kept), [reason for reason in reasons if reason]
