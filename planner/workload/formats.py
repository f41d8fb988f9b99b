"""Load the trace formats people bring, and save a workload in our own.

Which columns hold what is one table of names (`_ALIASES`); a published format is a row in `_FORMATS` that pins the
names and what its times count. Everything else, checks included, is the same for all.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from planner.errors import UserError, unknown_name
from planner.workload.bench_result import read_bench_result
from planner.workload.tables import (
    Table,
    read_csv,
    read_jsonl,
    read_text,
    seconds,
    show_columns,
    whole_numbers,
)
from planner.workload.workload import Workload, split_rows

_ALIASES = {
    "arrival": "arrival_s arrival arrival_time arrived_at timestamp ts time start_time request_time created_at",
    "input": "input_tokens input_toks input_length input_len num_input_tokens num_prefill_tokens prefill_tokens"
    " prompt_tokens prompt_toks prompt_len prompt_length num_prompt_tokens context_tokens contexttokens request_tokens"
    " isl",
    "output": "output_tokens output_toks output_length output_len num_output_tokens num_decode_tokens decode_tokens"
    " completion_tokens completion_len num_completion_tokens generated_tokens generatedtokens response_tokens"
    " response_length osl",
    "session": "session session_id sessionid conversation_id chat_id",
    "hash_ids": "hash_ids prefix_block_hashes block_hashes",
}
_REQUIRED = ("arrival", "input", "output")
_LATEST_UNIX_SECONDS = 1e11
_UNITS = {"s": 1, "sec": 1, "secs": 1, "seconds": 1, "ms": 1000, "us": 10**6, "ns": 10**9}
_PREFIX_TOKENS_COLUMN = "prefix_block_tokens"
_MOONCAKE_BLOCK_TOKENS = 512


@dataclass(frozen=True)
class _Format:
    """A published format: its own column names by role, and what its times count (None: the name or the cells say)."""

    columns: Mapping[str, str]
    units_per_second: int | None = None
    optional: Mapping[str, str] | None = None
    skips_failures: bool = False


_FORMATS = {
    # Azure/AzurePublicDataset, LLM inference traces of 2023 and 2024.
    "azure": _Format({"arrival": "TIMESTAMP", "input": "ContextTokens", "output": "GeneratedTokens"}),
    # kvcache-ai/Mooncake, FAST'25 traces.
    "mooncake": _Format(
        {"arrival": "timestamp", "input": "input_length", "output": "output_length"}, 1000, {"hash_ids": "hash_ids"}
    ),
    # HPMLL/BurstGPT; an answer of 0 tokens is a request that failed.
    "burstgpt": _Format(
        {"arrival": "Timestamp", "input": "Request tokens", "output": "Response tokens"},
        1,
        {"session": "Session ID"},
        skips_failures=True,
    ),
}
FORMATS = ("auto", *_FORMATS, "csv", "jsonl", "vllm_bench")


def load_workload(
    path: str | Path,
    *,
    format: str = "auto",
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
    sort: bool = False,
    skip_failed: bool = False,
    prefix_block_tokens: int | None = None,
) -> Workload:
    """Read a trace, gzipped or not. Arrivals are counted from the first request.

    Args:
        format: one of FORMATS; "auto" tells by the columns.
        seed: for arrivals that must be drawn: inside Mooncake's 3 s bins, or for a benchmark without start times.
        columns: names of columns by role, e.g. {"arrival": "t_ms", "input": "n_in", "output": "n_out"}; further roles
            are "session" and "hash_ids". A unit at the end of the arrival's name counts (_s, _ms, _us, _ns).
        sort: put requests in order of arrival instead of refusing a file that is not.
        skip_failed: leave out requests with 0 output tokens, and say how many, instead of refusing them. Formats that
            record failures that way (BurstGPT, vllm bench) always do.
        prefix_block_tokens: tokens per entry of hash_ids; by default the file's own statement, else 512 if that fits
            the prompts' lengths, else the power of two that does.

    Raises:
        UserError: one sentence naming file, line, column and value, as far as they exist.
    """
    if format not in FORMATS:
        raise unknown_name("trace format", format, FORMATS, f"use one of {', '.join(FORMATS)}")
    file = Path(path).name
    text = read_text(path)
    if format == "vllm_bench" or (format == "auto" and _is_bench_result(text)):
        return read_bench_result(text, file, seed)
    is_json = format in ("jsonl", "mooncake") or (format == "auto" and _looks_like_json(text, file))
    table = read_jsonl(text, file) if is_json else read_csv(text, file)
    if format == "auto":
        format = _detected(table, columns, is_json)
    roles, units_per_second = _resolve_columns(table, format, columns)
    notes = []
    if skip_failed or (format in _FORMATS and _FORMATS[format].skips_failures):
        table = _without_failures(table, roles["output"], notes)
    return _build(table, roles, units_per_second, format, seed, sort, prefix_block_tokens, notes)


def _is_bench_result(text: str) -> bool:
    """Whether this is what `vllm bench serve --save-result` writes: one object of lists, not one object per request."""
    return text.lstrip()[0] == "{" and any(
        key in text for key in ('"input_lens"', '"output_lens"', '"request_throughput"')
    )


def _looks_like_json(text: str, file: str) -> bool:
    return text.lstrip()[0] in "{[" or file.removesuffix(".gz").endswith((".jsonl", ".json", ".ndjson"))


def _detected(table: Table, columns: Mapping[str, str] | None, is_json: bool) -> str:
    if not columns:
        found = set(table.frame.columns)
        for name, known in _FORMATS.items():
            if found.issuperset(known.columns.values()):
                return name
    return "jsonl" if is_json else "csv"


def _resolve_columns(table: Table, format: str, columns: Mapping[str, str] | None) -> tuple[dict[str, str], int]:
    """Column by role, and how many of the arrival column's units make a second."""
    found = list(table.frame.columns)
    if format in _FORMATS and not columns:
        known = _FORMATS[format]
        for role, column in known.columns.items():
            if column not in found:
                raise _missing_column(table.file, f"column {column!r} ({format} format)", role, [column], found)
        optional = {role: column for role, column in (known.optional or {}).items() if column in found}
        return {**known.columns, **optional}, known.units_per_second or 1
    roles = _explicit_columns(table.file, columns or {}, found)
    by_name = {_normalised(column): column for column in reversed(found)}
    for role, aliases in _ALIASES.items():
        if role in roles:
            continue
        names = _with_units(aliases.split()) if role == "arrival" else aliases.split()
        column = next((by_name[name] for name in names if name in by_name), None)
        if column is not None:
            roles[role] = column
        elif role in _REQUIRED:
            wanted = "arrival times" if role == "arrival" else f"{role} tokens"
            raise _missing_column(table.file, f"column for {wanted}", role, names, found)
    unit = _normalised(roles["arrival"]).rsplit("_", 1)[-1]
    return roles, _UNITS.get(unit, 1)


def _explicit_columns(file: str, columns: Mapping[str, str], found: Sequence[str]) -> dict[str, str]:
    for role, column in columns.items():
        if role not in _ALIASES:
            raise unknown_name("column role", role, _ALIASES, f"use one of {', '.join(_ALIASES)}")
        if column not in found:
            raise _missing_column(file, f"column {column!r}", role, [column], found)
    return dict(columns)


def _normalised(column: str) -> str:
    return re.sub(r"[\s\-.]+", "_", column.strip().lower())


def _with_units(names: Sequence[str]) -> list[str]:
    """Each name, then each name with a unit: arrival_time, …, arrival_time_ms, arrival_time_ns, …"""
    return [*names, *(f"{name}_{unit}" for name in names for unit in _UNITS)]


def _missing_column(file: str, what: str, role: str, names: Sequence[str], found: Sequence[str]) -> UserError:
    lowered = {_normalised(column): column for column in found}
    scored = [
        (difflib.SequenceMatcher(None, _normalised(name), candidate).ratio(), column)
        for name in names
        for candidate, column in lowered.items()
    ]
    score, nearest = max(scored, default=(0.0, ""))
    hint = f"; the nearest is {nearest!r}: pass --columns {role}={nearest} if it is meant" if score >= 0.6 else ""
    return UserError(f"{file} has no {what}, only {show_columns(found)}{hint}")


def _without_failures(table: Table, column: str, notes: list[str]) -> Table:
    failed = whole_numbers(table, column, zero_allowed=True) == 0
    if failed.all():
        raise UserError(f"{table.file} has no request with an answer: {column} is 0 on every line")
    if failed.any():
        notes.append(f"{table.file}: skipped {failed.sum()} failed requests of {failed.size} ({column} is 0)")
        return table.without(failed)
    return table


def _build(
    table: Table,
    roles: Mapping[str, str],
    units_per_second: int,
    format: str,
    seed: int,
    sort: bool,
    prefix_block_tokens: int | None,
    notes: list[str],
) -> Workload:
    _refuse_milliseconds(table, roles["arrival"], units_per_second)
    arrival_s = seconds(table, roles["arrival"], units_per_second)
    input_tokens = whole_numbers(table, roles["input"])
    output_tokens = whole_numbers(table, roles["output"])
    session = _sessions(table.frame[roles["session"]]) if "session" in roles else None
    ids, num_ids, block_tokens = _prefixes(table, roles.get("hash_ids"), input_tokens, prefix_block_tokens, notes)
    order = _order(table, roles["arrival"], arrival_s, sort, notes)
    arrival_s = arrival_s[order] - arrival_s[order[0]]
    if format == "mooncake":
        arrival_s = _spread_bins(arrival_s, seed, notes)
    rows = None if ids is None else split_rows(ids, num_ids)
    return Workload(
        name=table.file,
        arrival_s=arrival_s,
        input_tokens=input_tokens[order],
        output_tokens=output_tokens[order],
        prefix_block_hashes=None if rows is None else tuple(rows[i] for i in order.tolist()),
        prefix_block_tokens=block_tokens,
        session=None if session is None else session[order],
        notes=tuple(notes),
    )


def _refuse_milliseconds(table: Table, column: str, units_per_second: int) -> None:
    """Refuse numbers that would be seconds some 3,000 years from now: Unix time in a smaller unit."""
    values = table.frame[column]
    if units_per_second != 1 or not pd.api.types.is_numeric_dtype(values):
        return
    if _LATEST_UNIX_SECONDS < values.min() < math.inf:
        raise UserError(
            f"{table.file}: {column} begins at {values.iloc[0]:.15g}, which cannot be seconds; put the unit into the "
            f"column's name, e.g. {column}_ms or {column}_ns"
        )


def _order(table: Table, column: str, arrival_s: np.ndarray, sort: bool, notes: list[str]) -> np.ndarray:
    back = np.flatnonzero(np.diff(arrival_s) < 0)
    if not back.size:
        return np.arange(arrival_s.size)
    if not sort:
        row = int(back[0]) + 1
        raise UserError(
            f"{table.where(row)}: {column} {table.cell_of(row, column)} is earlier than on the line before; "
            "sort the file, or have it sorted with sort=True (--sort-arrivals)"
        )
    notes.append(f"{table.file}: sorted by arrival, {back.size} requests stood behind a later one")
    return np.argsort(arrival_s, kind="stable")


def _sessions(column: pd.Series) -> np.ndarray:
    """int64 [n] numbers for whatever names sessions have; a request without one is a session of its own."""
    codes, names = pd.factorize(column)
    alone = codes < 0
    codes = codes.astype(np.int64)
    codes[alone] = len(names) + np.arange(alone.sum())
    return codes


def _spread_bins(arrival_s: np.ndarray, seed: int, notes: list[str]) -> np.ndarray:
    """Undo quantised timestamps: draw arrivals uniformly inside their bin, keeping the order of requests.

    Mooncake's timestamps are multiples of about 3 s; taken literally they are bursts that nobody sent. The bin is the
    most common gap between distinct timestamps. Where most timestamps are distinct, none was quantised, none is moved.
    """
    distinct, bin_of, counts = np.unique(arrival_s, return_inverse=True, return_counts=True)
    if distinct.size < 2 or distinct.size > arrival_s.size / 2:
        return arrival_s
    gaps = np.diff(distinct)
    values, occurrences = np.unique(gaps.round(6), return_counts=True)
    bin_s = float(values[occurrences.argmax()])
    width_s = np.append(np.minimum(gaps, bin_s), bin_s)
    draws = np.random.default_rng(np.random.SeedSequence(seed)).random(arrival_s.size)
    draws = draws[np.lexsort((draws, bin_of))]
    notes.append(
        f"timestamps come in bins of {bin_s:g} s ({distinct.size} distinct, {counts.mean():.1f} requests each): "
        f"arrivals drawn uniformly inside their bin, seed {seed}"
    )
    # A draw close to 1 may round onto the next bin's first instant, which is still in order.
    return np.minimum(distinct[bin_of] + width_s[bin_of] * draws, (distinct + width_s)[bin_of])


def _prefixes(
    table: Table, column: str | None, input_tokens: np.ndarray, block_tokens: int | None, notes: list[str]
) -> tuple[np.ndarray | None, np.ndarray | None, int | None]:
    """All ids in one array, how many each row has, and the tokens an id stands for; three times None without ids."""
    if column is None:
        return None, None, None
    lists = [_id_list(table, row, column, cell) for row, cell in enumerate(table.frame[column].tolist())]
    num_ids = np.fromiter(map(len, lists), np.int64, len(lists))
    ids = _numbered([name for row in lists for name in row])
    if not _is_chained(ids, num_ids):
        ids = _chain(ids, num_ids)
        notes.append(f"{table.file}: {column} name blocks, not whole prefixes; renumbered so that they do")
    if block_tokens is None and _PREFIX_TOKENS_COLUMN in table.frame:
        block_tokens = int(whole_numbers(table, _PREFIX_TOKENS_COLUMN)[0])
    block_tokens = block_tokens or _block_tokens(num_ids, input_tokens)
    excess = np.flatnonzero((num_ids - 1) * block_tokens >= input_tokens)
    if excess.size:
        row = int(excess[0])
        raise UserError(
            f"{table.where(row)}: {column} has {num_ids[row]} ids of {block_tokens} tokens for only "
            f"{input_tokens[row]} input tokens; is prefix_block_tokens right?"
        )
    return ids, num_ids, block_tokens


def _numbered(names: list) -> np.ndarray:
    """int64 [n] numbers from 0 for ids of any kind: ints of any size, or strings."""
    values = np.asarray(names) if names else np.empty(0, np.int64)
    if values.dtype.kind != "i":
        values = pd.Series(names, dtype=object)
        return pd.factorize(values)[0].astype(np.int64)
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def _id_list(table: Table, row: int, column: str, cell: object) -> list:
    """The ids in one cell: a JSON list, or in a CSV numbers separated by spaces, with or without brackets."""
    if isinstance(cell, str):
        cell = cell.strip("[] ").replace(",", " ").split()
        if all(re.fullmatch(r"-?\d+", name) for name in cell):
            return [int(name) for name in cell]
    elif isinstance(cell, list):
        if all(type(name) in (int, str) for name in cell):
            return cell
    elif cell is None or cell != cell:
        return []
    elif isinstance(cell, (int, float)) and math.isfinite(cell) and int(cell) == cell:
        return [int(cell)]
    raise UserError(f"{table.where(row)}: {column} is {table.cell_of(row, column)[:60]!r}, which is not a list of ids")


def _block_tokens(num_ids: np.ndarray, input_tokens: np.ndarray) -> int:
    """512 if every prompt has as many ids as it has blocks (the last, partial one counted or not), else what fits."""
    for tokens in (_MOONCAKE_BLOCK_TOKENS, 16, 32, 64, 128, 256, 1024, 2048, 4096):
        full = input_tokens // tokens
        if ((num_ids == full) | (num_ids == -(-input_tokens // tokens))).all():
            return tokens
    return _MOONCAKE_BLOCK_TOKENS


def _is_chained(ids: np.ndarray, num_ids: np.ndarray) -> bool:
    """Whether every id has one predecessor (or none) wherever it occurs."""
    before = np.concatenate([[-1], ids[:-1]]) if ids.size else ids
    starts = np.cumsum(num_ids) - num_ids
    before[starts[num_ids > 0]] = -1
    expected = np.empty(int(ids.max(initial=-1)) + 1, np.int64)
    expected[ids] = before
    if not (expected[ids] == before).all():
        return False
    # One predecessor each, yet a row could still run in a circle (7 7 7): positions must agree as well.
    position = np.arange(ids.size) - np.repeat(starts, num_ids)
    expected[ids] = position
    return bool((expected[ids] == position).all())


def _chain(ids: np.ndarray, num_ids: np.ndarray) -> np.ndarray:
    """Ids of whole prefixes from ids of blocks: one number per distinct path."""
    paths: dict[tuple[int, int], int] = {}
    chained = []
    for row in split_rows(ids, num_ids):
        parent = -1
        for name in row.tolist():
            parent = paths.setdefault((parent, name), len(paths))
            chained.append(parent)
    return np.array(chained, np.int64)


def save_workload(workload: Workload, path: str | Path) -> None:
    """Write a workload in our own columns, as JSONL when the name ends in .jsonl and as CSV otherwise.

    `load_workload` reads it back: the same arrivals counted from the first, lengths, prefixes and sessions.
    """
    path = Path(path)
    frame = pd.DataFrame(
        {
            "arrival_s": workload.arrival_s,
            "input_tokens": workload.input_tokens,
            "output_tokens": workload.output_tokens,
        }
    )
    if workload.session is not None:
        frame["session"] = workload.session
    is_jsonl = path.suffix == ".jsonl"
    if workload.prefix_block_hashes is not None:
        ids = (row.tolist() for row in workload.prefix_block_hashes)
        frame["hash_ids"] = list(ids) if is_jsonl else [" ".join(map(str, row)) for row in ids]
        frame[_PREFIX_TOKENS_COLUMN] = workload.prefix_block_tokens
    if is_jsonl:
        path.write_text("".join(json.dumps(row) + "\n" for row in frame.to_dict("records")), encoding="utf-8")
    else:
        frame.to_csv(path, index=False)
