"""Read the per-request lists of `vllm bench serve --save-detailed` and SGLang's `bench_serving --output-details`.

Both write one JSON object per run with a list per quantity: input_lens, output_lens, ttfts, itls (a list of gaps per
request), errors, and in newer vLLM start_times (a monotonic clock). vLLM writes a file per run, or a line per run with
--append-result; SGLang appends a line per run. A failed request has an error, or no output tokens.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from planner.errors import UserError
from planner.external.plausible import check_duration, unit_of_instant
from planner.external.served_run import ServedRun, served_run
from planner.workload.workload import MAX_TOKENS

_MARKS = ('"input_lens"', '"output_lens"', '"request_throughput"')
_DETAIL_FLAGS = "`vllm bench serve` with --save-result --save-detailed, or SGLang's bench_serving with --output-details"


def is_bench_detail(text: str) -> bool:
    """Whether this is one JSON object of lists per run, not one object per request."""
    return text.lstrip()[:1] == "{" and any(mark in text for mark in _MARKS)


def read_bench_detail(text: str, file: str) -> list[ServedRun]:
    """The runs of a file, in the order in which it has them.

    Raises:
        UserError: one sentence with file, line (of several) and field.
    """
    return [_run(result, where) for result, where in _objects(text, file)]


def _objects(text: str, file: str) -> list[tuple[dict, str]]:
    try:
        whole = json.loads(text)
    except RecursionError:
        raise UserError(f"{file} is nested too deeply for a benchmark result") from None
    except ValueError:
        whole = None
    if whole is not None:
        return [(_checked(whole, file), file)]
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            where = f"{file} line {number}"
            try:
                found.append((_checked(json.loads(line), where), where))
            except (ValueError, RecursionError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(f"{where} is not complete JSON: {getattr(error, 'msg', 'nested too deeply')}") from None
    return found


def _checked(result: Any, where: str) -> dict:
    if type(result) is not dict:
        raise UserError(f"{where} is not a JSON object, as {_DETAIL_FLAGS} writes it")
    return result


def _run(result: dict, where: str) -> ServedRun:
    outputs = _tokens(result, "output_lens", where, low=0)
    n = outputs.size
    if not n:
        raise UserError(f"{where} is empty: its output_lens list no request")
    answered = outputs > 0
    errors = result.get("errors")
    if errors is not None:
        answered &= [not error for error in _list(result, "errors", where, n)]
    if not answered.any():
        raise UserError(f"{where} has no request with an answer: every one has an error or 0 output tokens")
    inputs = _tokens(result, "input_lens", where, n=n, low=0)
    ttfts = _seconds(_list(result, "ttfts", where, n), "ttfts", where, answered)
    gaps = _gaps(_list(result, "itls", where, n), where, answered)
    notes: list[str] = []
    arrivals = _arrivals(result, where, n, notes)
    kept = np.flatnonzero(answered)
    empty = kept[inputs[kept] < 1]
    if empty.size:
        raise UserError(f"{where}: input_lens[{empty[0]}] is 0, but a prompt has at least 1 token")
    failed = n - kept.size
    if failed:
        notes.append(f"{where}: skipped {failed} failed requests of {n}")
    first = arrivals + ttfts
    last = first + np.array([float(gap.sum()) for gap in gaps])
    model = result.get("model_id")
    run = served_run(
        where,
        arrivals[kept],
        inputs[kept],
        outputs[kept],
        first[kept],
        last[kept],
        itls=tuple(gaps[i] for i in kept),
        num_failed=failed,
        notes=tuple(notes),
        told_by="itls",
        model=model if type(model) is str else None,
    )
    check_duration(where, result.get("duration"), run, assumed=not result.get("start_times"))
    return run


def _list(result: dict, key: str, where: str, n: int | None = None) -> list:
    if key not in result:
        raise UserError(f"{where} has no {key!r}; write it with {_DETAIL_FLAGS}")
    values = result[key]
    if type(values) is not list:
        raise UserError(f"{where}: {key} is not a list")
    if n is not None and len(values) != n:
        raise UserError(f"{where} has {n} output_lens but {len(values)} {key}")
    return values


def _tokens(result: dict, key: str, where: str, low: int, n: int | None = None) -> np.ndarray:
    values = _list(result, key, where, n)
    for i, value in enumerate(values):
        if type(value) is not int or not low <= value <= MAX_TOKENS:
            raise UserError(
                f"{where}: {key}[{i}] is {value!r}, which is not a number of tokens from {low} to {MAX_TOKENS}"
            )
    return np.array(values, np.int64)


def _is_duration(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _seconds(values: list, key: str, where: str, needed: np.ndarray) -> np.ndarray:
    """float64 [n] of durations; 0 for requests that failed, whatever stands there."""
    for i, value in enumerate(values):
        if needed[i] and not _is_duration(value):
            raise UserError(f"{where}: {key}[{i}] is {value!r}, which is not a number of seconds from 0 on")
    return np.array([value if needed[i] else 0.0 for i, value in enumerate(values)], np.float64)


def _gaps(values: list, where: str, needed: np.ndarray) -> list[np.ndarray]:
    gaps = []
    for i, value in enumerate(values):
        if not needed[i]:
            gaps.append(np.empty(0))
            continue
        if type(value) is not list:
            raise UserError(f"{where}: itls[{i}] is not a list of gaps between tokens")
        for j, gap in enumerate(value):
            if not _is_duration(gap):
                raise UserError(f"{where}: itls[{i}][{j}] is {gap!r}, which is not a number of seconds from 0 on")
        gaps.append(np.array(value, np.float64))
    return gaps


def _arrivals(result: dict, where: str, n: int, notes: list[str]) -> np.ndarray:
    """float64 [n]: when the client sent each request, in seconds of some clock."""
    if result.get("start_times"):
        values = _list(result, "start_times", where, n)
        for i, value in enumerate(values):
            if type(value) not in (int, float) or not math.isfinite(value):
                raise UserError(f"{where}: start_times[{i}] is {value!r}, which is not a number of seconds")
            if (unit := unit_of_instant(value)) is not None:
                raise UserError(
                    f"{where}: start_times[{i}] is {value!r}, which is no time in seconds but one in {unit}; divide it"
                )
        return np.array(values, np.float64)
    ramp_up = result.get("ramp_up_strategy")
    if ramp_up is not None:
        raise UserError(
            f"{where} was sent with ramp_up_strategy {ramp_up!r} and has no 'start_times', so nothing says when each "
            "request was sent; newer vLLM (2025-09 or later) writes them with --save-detailed"
        )
    if result.get("request_rate") in ("inf", math.inf) and result.get("max_concurrency") is None:
        notes.append(f"{where}: no start_times and request_rate inf: all requests were sent at once")
        return np.zeros(n)
    raise UserError(
        f"{where} has no 'start_times', so nothing says when each request was sent; use a client that records them "
        "(vllm bench serve of 2025-09 or later), a request rate of inf without --max-concurrency, or the engine's "
        "request log"
    )
