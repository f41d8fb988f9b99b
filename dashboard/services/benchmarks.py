"""A benchmark of a real server beside the simulator: the same arrivals and lengths, what was measured and predicted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from calibration.validate.errors import Comparison, RequestErrors
from calibration.validate.external import OutsideServer, external_record
from calibration.validate.profiles import Predictor, step_time_for
from calibration.validate.records import ServedRecord, read
from calibration.validate.study import Level, study
from dashboard.services.jobs import Report
from dashboard.services.profiles import Parity, ParityPoint
from planner.errors import UserError
from planner.external.readers import read_served_runs, read_server_facts
from planner.external.settings import external_system
from planner.hardware import GpuSpec
from planner.model import ModelSpec
from planner.step_time import Evidence

MAX_REQUESTS = 20_000
#: Of each parity chart; more of them hide each other.
MAX_POINTS = 300
_NUM_DRAWS = 8
LATENCIES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "e2el_ms": "E2EL"}
#: What is compared, as `calibration.validate.errors` names it, with its label and its unit.
METRICS = {
    **{
        f"{metric}.{at}": (f"{label} {at}", "ms")
        for metric, label in LATENCIES.items()
        for at in ("mean", "p50", "p90", "p99")
    },
    "output_throughput_tokens_per_s": ("output tokens/s", ""),
    "request_throughput_per_s": ("requests/s", ""),
}
# Settings of a server that decide much; where a default stands in for one, that is worth a sentence.
_IMPORTANT = ("max_num_seqs", "max_num_batched_tokens", "num_gpu_blocks")
_GUESSES = ("vLLM's default", "the memory model")


@dataclass(frozen=True)
class Benchmark:
    """A question: a result, and what served it where the result does not say.

    Attributes:
        path: of the result; log: of what the server printed, if that was given.
        profiles: the user's own, as `Deployment.profiles` takes them.
        flags: settings of the server, by the names of `planner.external.server_facts.ServerFacts`.
    """

    path: Path
    log: Path | None
    model: ModelSpec
    gpu: GpuSpec
    quantization: str | None = None
    profiles: tuple[str, ...] | None = None
    flags: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Compared:
    """One load level.

    Attributes:
        label: the file and its rate. served: by what. step_times: where the predictions come from.
        evidence: what they rest on.
        comparisons: by the names of `METRICS`. intervals: 90 % of what was predicted, by the same.
        requests: by latency, request by request. parity: the same as points, the first run's.
    """

    label: str
    source: str
    served: str
    step_times: str
    evidence: Evidence
    num_requests: int
    num_runs: int
    comparisons: dict[str, Comparison]
    intervals: dict[str, tuple[float, float]]
    requests: dict[str, RequestErrors | None]
    parity: dict[str, Parity]


@dataclass(frozen=True)
class BenchmarkAnswer:
    """All load levels of a file, and what to know of them."""

    levels: tuple[Compared, ...]
    notes: tuple[str, ...]


@lru_cache(64)
def is_outside(path: Path) -> bool:
    """Whether a file is of a server that is not ours, and does not say what served it."""
    return OutsideServer().can_read(path)


def check(path: Path) -> None:
    """Refuse what is no result of a benchmark.

    Raises:
        UserError: it cannot be read, or has too many requests.
    """
    loads = read_served_runs(path) if OutsideServer().can_read(path) else [run.lives for run in read(path).runs]
    count = sum(len(load) for load in loads)
    if count > MAX_REQUESTS:
        raise UserError(
            f"{path.name} has {count:,} requests, and a page replays at most {MAX_REQUESTS:,}; use memwall validate"
        )


def compare(report: Report, question: Benchmark) -> BenchmarkAnswer:
    """Replay a benchmark through the simulator.

    Raises:
        UserError: a file that cannot be used, or settings that are not those of the server.
    """
    predictors: dict[ServedRecord, Predictor] = {}
    if is_outside(question.path):
        predictors.update(_outside(question))
    else:
        record = read(question.path)
        predictors[record] = _predictor(record, question.profiles)
    seen: list[str] = []

    def say(line: str) -> None:
        seen.append(line)
        report(len(seen) - 1, len(predictors), "load levels compared")

    found = study(list(predictors), predictors.__getitem__, num_draws=_NUM_DRAWS, say=say)
    levels = tuple(_compared(*pair) for pair in zip(found.levels, found.intervals, strict=True))
    return BenchmarkAnswer(levels, found.notes)


def _predictor(record: ServedRecord, paths: Sequence[str] | None) -> Predictor:
    """Step times from the first profile that was measured on what served the record, the user's own first."""
    for path in paths or ():
        try:
            return step_time_for(record, Path(path))
        except UserError:
            continue  # of something else; the last word has the shipped ones, which say what is missing
    return step_time_for(record)


def _outside(question: Benchmark) -> dict[ServedRecord, Predictor]:
    runs = read_served_runs(question.path)
    facts = read_server_facts(question.log)
    found = external_system(question.model, question.gpu, facts, runs, dict(question.flags))
    longest = max(int((run.input_tokens + run.output_tokens).max()) for run in runs)
    limit = found.system.scheduler.max_model_len
    if longest > limit:
        raise UserError(
            f"{question.path.name} has a request of {longest:,} tokens, but max_model_len is {limit:,}: the settings "
            f"are not those of the server that answered it"
        )
    if found.system.speculation is not None:
        raise UserError("the server's log says that it speculated; only runs without speculation can be compared")
    step_time = replace(found.deployment, profiles=question.profiles).step_time()
    if step_time.evidence is Evidence.SCALED and not found.depth_known:
        found = found.with_depth(step_time.pipeline_depth)
    guessed = [name for name, (_, origin) in found.origin.items() if origin in _GUESSES and name in _IMPORTANT]
    notes = tuple(note for run in runs for note in run.notes)
    if guessed:
        notes += (f"{', '.join(guessed)}: neither the page nor a log says, so a default stands in",)
    predictor = Predictor(step_time, step_time.description, None, notes)
    stem = re.sub(r"\.(json|jsonl|csv)(\.gz)?$", "", question.path.name)
    names = [stem] if len(runs) == 1 else [f"{stem}, run {number}" for number in range(1, len(runs) + 1)]
    records = [
        external_record(name, "a benchmark's client", [run], found, question.model.name, question.gpu.name)
        for name, run in zip(names, runs, strict=True)
    ]
    weights = question.quantization
    return {replace(record, engine=replace(record.engine, quantization=weights)): predictor for record in records}


def _compared(level: Level, intervals: Any) -> Compared:
    record, engine = level.record, level.record.engine
    weights = f", {engine.quantization} weights" if engine.quantization else ""
    chips = f"{engine.tensor_parallel_size} × {engine.gpu}" if engine.gpu else "a CPU"
    return Compared(
        label=record.label,
        source=record.source,
        served=f"{engine.model}{weights} on {chips}, {engine.kv_cache_dtype} KV, {engine.num_kv_blocks:,} blocks of "
        f"{engine.block_size} tokens, max_num_seqs {engine.max_num_seqs}, token budget "
        f"{engine.max_num_batched_tokens:,}",
        step_times=level.predictor.origin,
        evidence=level.predictor.step_time.evidence,
        num_requests=len(record.runs[0].lives),
        num_runs=len(record.runs),
        comparisons={found.metric: found for found in level.comparisons if found.metric in METRICS},
        intervals={metric: (found.low, found.high) for metric, found in intervals.items() if found is not None},
        requests={metric: each[0] for metric, each in level.requests.items()},
        parity={metric: _points(level, metric) for metric in LATENCIES},
    )


def _points(level: Level, metric: str) -> Parity:
    """Requests evenly spread over the first run, in milliseconds."""
    name = f"{metric.removesuffix('_ms')}_s"
    measured, predicted = (1e3 * getattr(side, name) for side in (level.record.runs[0].lives, level.simulated[0].lives))
    lives = level.record.runs[0].lives
    known = np.flatnonzero(np.isfinite(measured) & np.isfinite(predicted) & (measured > 0) & (predicted > 0))
    if len(known) > MAX_POINTS:
        known = known[np.linspace(0, len(known) - 1, MAX_POINTS).round().astype(int)]
    points = tuple(
        ParityPoint(
            f"request {index + 1}, {lives.input_tokens[index]:,} tokens in and {lives.output_tokens[index]:,} out",
            float(measured[index]),
            float(predicted[index]),
        )
        for index in known
    )
    return Parity(level.record.name, points)
