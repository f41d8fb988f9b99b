"""A benchmark of a real server beside the simulator: the same arrivals and lengths, what was measured and predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dashboard.services.jobs import Report
from dashboard.services.profiles import Parity, ParityPoint
from planner.catalog import list_models, load_model
from planner.errors import UserError
from planner.external.memwall_record import MemwallRecord, is_memwall_record, read_memwall_record
from planner.external.parity import LATENCIES, STATISTICS, LoadParity, MetricParity, loads_of, parity
from planner.external.readers import read_served_runs, read_server_facts
from planner.external.served_run import ServedRun
from planner.external.server_facts import ServerFacts
from planner.external.settings import ExternalSystem, external_system
from planner.hardware import GpuSpec
from planner.model import ModelSpec
from planner.step_time import Evidence
from planner.workload.tables import read_text

MAX_REQUESTS = 20_000
#: Of each parity chart; more of them hide each other.
MAX_POINTS = 300
_NUM_DRAWS = 8
LABELS = {name: name.upper() for name in LATENCIES}
#: What is compared, by its name in `planner.external.parity.METRICS`, as pages call it.
METRICS = {
    **{f"{name}_ms.{at}": f"{label} {at}, ms" for name, label in LABELS.items() for at in STATISTICS},
    "output_throughput_tokens_per_s": "output tokens/s",
    "request_throughput_per_s": "requests/s",
}


@dataclass(frozen=True)
class Benchmark:
    """A question: a result, and what served it where the result does not say.

    Attributes:
        path: of the result; log: of what the server printed, if that was given.
        model: that the server had; of a record of ours only if it is none of the catalog.
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
    """One load.

    Attributes:
        label: its name and rate. served: by what. step_times: where the predictions come from; evidence: what they
            rest on.
        metrics: by the names of `METRICS`. request_errors: mean |error| by latency, request by request.
        points: the same as points, of the first run.
    """

    label: str
    served: str
    step_times: str
    evidence: Evidence
    num_requests: int
    num_runs: int
    metrics: Mapping[str, MetricParity]
    request_errors: Mapping[str, float | None]
    points: Mapping[str, Parity]


@dataclass(frozen=True)
class BenchmarkAnswer:
    """All loads of a file, and what to know of them."""

    loads: tuple[Compared, ...]
    notes: tuple[str, ...]


@lru_cache(64)
def is_outside(path: Path) -> bool:
    """Whether a file is of a server that is not ours, and does not say what served it."""
    return not is_memwall_record(read_text(path))


def check(path: Path) -> None:
    """Refuse what is no result of a benchmark.

    Raises:
        UserError: it cannot be read, or has too many requests.
    """
    count = sum(map(len, _read(path)[0]))
    if count > MAX_REQUESTS:
        raise UserError(
            f"{path.name} has {count:,} requests, and a page replays at most {MAX_REQUESTS:,}; use memwall validate"
        )


def _read(path: Path) -> tuple[Sequence[ServedRun], MemwallRecord | None]:
    """The runs, and of ours the whole record."""
    if is_outside(path):
        return read_served_runs(path), None
    record = read_memwall_record(read_text(path), path.name)
    return record.runs, record


def compare(report: Report, question: Benchmark) -> BenchmarkAnswer:
    """Replay a benchmark through the simulator.

    Raises:
        UserError: a file that cannot be used, or settings that are not those of the server.
    """
    runs, record = _read(question.path)
    found = _system(question, runs, record)
    if found.system.speculation is not None:
        raise UserError("the server's log says that it speculated; only runs without speculation can be compared")
    compared, loads = [], loads_of(runs)
    for number, load in enumerate(loads):

        def tell(done: int, total: int, before: int = number) -> None:
            report(before * total + done, len(loads) * total, "simulations")

        name = question.path.name if len(loads) == 1 else f"{question.path.name}, load {number + 1}"
        compared.append(_compared(name, parity(load, found.system, _NUM_DRAWS, progress=tell), found))
    return BenchmarkAnswer(tuple(compared), _notes(runs, found, record))


def _system(question: Benchmark, runs: Sequence[ServedRun], record: MemwallRecord | None) -> ExternalSystem:
    """What served the runs, with the step times of the nearest profile, the user's own first."""
    if record is None:
        facts, model, gpu = read_server_facts(question.log), question.model, question.gpu
        flags = dict(question.flags)
    else:
        facts, model, gpu = ServerFacts(), _model_of(record, question.model), record.gpu()
        flags = dict(record.flags)
    found = external_system(model, gpu, facts, runs, flags)
    deployment = replace(found.deployment, profiles=question.profiles)
    step_time = deployment.step_time()
    if step_time.evidence is Evidence.SCALED and not found.depth_known:
        found = found.with_depth(step_time.pipeline_depth)
    return replace(found, deployment=deployment, system=replace(found.system, step_time=step_time))


def _model_of(record: MemwallRecord, chosen: ModelSpec) -> ModelSpec:
    """By its name in the catalog alone: what a file says is no path to open here."""
    name = record.model.rstrip("/").rpartition("/")[2].lower()
    if name in list_models():
        return load_model(name, record.quantization)
    if name == chosen.name:
        return chosen
    raise UserError(
        f"it was measured with the model {name[:60]!r}, which is not in the catalog: add its config.json there, and "
        f"choose it in the sidebar"
    )


def _notes(runs: Sequence[ServedRun], found: ExternalSystem, record: MemwallRecord | None) -> tuple[str, ...]:
    notes = [*(note for run in runs for note in run.notes), *found.warnings]
    if found.guessed and record is None:
        notes.append(f"{', '.join(found.guessed)}: neither the page nor a log says, so a default stands in")
    if record is None and not found.depth_known:
        notes.append("nothing says whether the server schedules a step while the one before runs; here it does not")
    return tuple(dict.fromkeys(notes))


def _compared(name: str, load: LoadParity, found: ExternalSystem) -> Compared:
    deployment, scheduler, cache = found.deployment, found.system.scheduler, found.system.cache
    rate = load.request_rate_per_s
    return Compared(
        label=f"{name}, {'all at once' if rate is None else f'{rate:.3g} requests/s'}",
        served=f"{deployment.model.name} on {deployment.tensor_parallel_size} × {deployment.gpu.name}, "
        f"{deployment.kv_cache_dtype} KV, {cache.num_blocks - 1:,} blocks of {cache.block_size} tokens, max_num_seqs "
        f"{scheduler.max_num_seqs}, token budget {scheduler.max_num_batched_tokens:,}",
        step_times=found.system.step_time.description,
        evidence=found.system.step_time.evidence,
        num_requests=len(load.runs[0]),
        num_runs=len(load.runs),
        metrics=load.metrics,
        request_errors={latency: load.request_error(latency) for latency in LATENCIES},
        points={latency: _points(name, load, latency) for latency in LATENCIES},
    )


def _points(name: str, load: LoadParity, latency: str) -> Parity:
    """Requests evenly spread over the first run, in milliseconds."""
    run = load.runs[0]
    indices = np.flatnonzero(load.known(latency))
    measured, predicted = load.pairs(latency)
    chosen = np.arange(len(indices))
    if len(chosen) > MAX_POINTS:
        chosen = np.linspace(0, len(chosen) - 1, MAX_POINTS).round().astype(int)
    return Parity(
        name,
        tuple(
            ParityPoint(
                f"request {at + 1}, {run.input_tokens[at]:,} tokens in and {run.output_tokens[at]:,} out",
                1e3 * float(measured[place]),
                1e3 * float(predicted[place]),
            )
            for place, at in ((place, int(indices[place])) for place in chosen)
        ),
    )
