"""Read the JSON that `vllm bench serve --save-result --save-detailed` writes: one object with a list per quantity.

Keys as in vllm/benchmarks/serve.py: input_lens, output_lens, start_times (a monotonic clock), request_rate ("inf" when
all were sent at once), burstiness, max_concurrency. A failed request has 0 output tokens.
"""

from __future__ import annotations

import json
import sys

import numpy as np

from planner.errors import UserError
from planner.workload.arrivals import gamma_gaps
from planner.workload.workload import MAX_TOKENS, Workload


def read_bench_result(text: str, file: str, seed: int) -> Workload:
    """The requests that a benchmark sent and that were answered, in the order in which they were sent.

    Without start times arrivals are drawn from the benchmark's request rate and burstiness, with `seed`, and the notes
    of the workload say so.
    """
    result = _parse(text, file)
    input_tokens = _token_list(result, "input_lens", file, low=1)
    output_tokens = _token_list(result, "output_lens", file, low=0)
    if input_tokens.size != output_tokens.size:
        raise UserError(f"{file} has {input_tokens.size} input_lens but {output_tokens.size} output_lens")
    if not input_tokens.size:
        raise UserError(f"{file} is empty: its input_lens list no request")
    answered = output_tokens > 0
    if not answered.any():
        raise UserError(f"{file} has no request with an answer: every entry of output_lens is 0")
    notes = []
    if not answered.all():
        notes.append(f"{file}: skipped {(~answered).sum()} failed requests of {answered.size} (output_lens is 0)")
    sent_s = _start_times(result, file, answered.size, notes)
    if sent_s is None:
        sent_s = _drawn_arrivals(result, file, answered.size, seed, notes)
    kept = np.flatnonzero(answered)
    kept = kept[np.argsort(sent_s[kept], kind="stable")]
    arrival_s = sent_s[kept] - sent_s[kept[0]]
    return Workload(file, arrival_s, input_tokens[kept], output_tokens[kept], notes=tuple(notes))


def _parse(text: str, file: str) -> dict:
    try:
        result = json.loads(text)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":
            raise UserError(
                f"{file} holds more than one benchmark result (--append-result); keep one per file"
            ) from None
        line = getattr(error, "lineno", 1)
        raise UserError(
            f"{file} line {line} is not complete JSON: {getattr(error, 'msg', 'nested too deeply')}"
        ) from None
    if type(result) is not dict:
        raise UserError(f"{file} is not a JSON object, as `vllm bench serve --save-result` writes it")
    return result


def _token_list(result: dict, key: str, file: str, low: int) -> np.ndarray:
    """int64 [n] from a list of whole numbers from `low` to MAX_TOKENS."""
    values = _list(result, key, file)
    for i, value in enumerate(values):
        if type(value) is not int or not low <= value <= MAX_TOKENS:
            raise UserError(
                f"{file}: {key}[{i}] is {value!r}, which is not a number of tokens from {low} to {MAX_TOKENS}"
            )
    return np.array(values, np.int64)


def _list(result: dict, key: str, file: str) -> list:
    if key not in result:
        raise UserError(f"{file} has no {key!r}; run `vllm bench serve` with --save-detailed as well as --save-result")
    if type(result[key]) is not list:
        raise UserError(f"{file}: {key} is not a list")
    return result[key]


def _start_times(result: dict, file: str, n: int, notes: list[str]) -> np.ndarray | None:
    """float64 [n] of when each request was sent, in seconds of some clock, or None when the file has none."""
    if not result.get("start_times"):
        return None
    values = _list(result, "start_times", file)
    for i, value in enumerate(values):
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            raise UserError(f"{file}: start_times[{i}] is {value!r}, which is not a number of seconds")
    if len(values) != n:
        raise UserError(f"{file} has {n} input_lens but {len(values)} start_times")
    if result.get("max_concurrency") is not None:
        notes.append(
            f"{file}: max_concurrency {result['max_concurrency']} may have held requests back at the client; "
            "arrivals are the times they were sent"
        )
    return np.array(values, np.float64)


def _drawn_arrivals(result: dict, file: str, n: int, seed: int, notes: list[str]) -> np.ndarray:
    if result.get("request_rate") is None:
        raise UserError(f"{file} has neither 'start_times' nor 'request_rate', so nothing says when requests arrived")
    rate = _positive(result["request_rate"], "request_rate", file)
    burstiness = _positive(result.get("burstiness", 1.0), "burstiness", file)
    if np.isinf(rate):
        notes.append(f"{file}: no start_times and request_rate inf: all requests arrive at once")
        return np.zeros(n)
    notes.append(
        f"{file}: no start_times; arrivals drawn with Gamma gaps from request_rate {rate:g} and "
        f"burstiness {burstiness:g}, seed {seed}"
    )
    return np.cumsum(gamma_gaps(np.random.default_rng(np.random.SeedSequence(seed)), n, rate, burstiness))


def _positive(value: object, key: str, file: str) -> float:
    """A number above 0 or inf; vLLM writes infinity as the string "inf"."""
    number = float("inf") if value == "inf" else value
    if type(number) not in (int, float) or not number > 0:
        raise UserError(f"{file}: {key} is {value!r}, which is not a positive number")
    return float(min(number, sys.float_info.max)) if number != float("inf") else number
