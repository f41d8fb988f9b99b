"""What a benchmark measured: the times of every request, the steps if they were logged, and the engine's settings.

`read` takes the records of `memwall bench serve`. Another source of measurements is a `Reader` in `READERS`; from then
on its files are validated like ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine.bench.record import read_record
from engine.bench.serve import step_log_paths
from engine.bench.step_log import LoggedStep, read_step_log
from engine.errors import UserError
from engine.kv.groups import kv_groups
from planner.external.kinds import ensure_no_other_kind
from planner.external.served_run import RequestTimes

# Times are written in whole microseconds, each rounded on its own.
ROUNDING_S = 2e-6


@dataclass(frozen=True)
class EngineSettings:
    """The settings that decide what the scheduler does and how long a step takes; names as `vllm serve` spells them.

    Attributes:
        model: name. model_config: of the engine, empty if unknown.
        gpu: name of the device as the driver has it; None for a CPU, or if unknown.
        device_id: what tells it from others of that name; None if unknown.
        kv_cache_dtype: resolved, e.g. "bfloat16" for auto.
        num_kv_blocks: blocks that requests can hold. windows: one entry per KV group, None for full attention.
    """

    model: str
    gpu: str | None
    quantization: str | None
    kv_cache_dtype: str
    num_kv_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    windows: tuple[int | None, ...] = (None,)
    enable_prefix_caching: bool = False
    enable_chunked_prefill: bool = True
    enforce_eager: bool = False
    async_scheduling: bool = True
    gpu_memory_utilization: float | None = None
    num_gpu_blocks_override: int | None = None
    tensor_parallel_size: int = 1
    model_config: Mapping[str, Any] = field(default_factory=dict)
    device_id: str | None = None

    @property
    def pipeline_depth(self) -> int:
        """Steps in flight at once: a CPU runs a step while it is launched."""
        return 2 if self.async_scheduling and self.gpu is not None else 1

    @property
    def series(self) -> tuple[Any, ...]:
        """Equal for records that differ in their load alone."""
        return (
            self.model,
            self.gpu,
            self.device_id,
            self.quantization,
            self.kv_cache_dtype,
            self.num_kv_blocks,
            self.max_num_seqs,
            self.max_num_batched_tokens,
            self.tensor_parallel_size,
        )


@dataclass(frozen=True, eq=False)
class Lives(RequestTimes):
    """Requests in order of arrival: float64 [n] in seconds since the start, int64 [n] of tokens and preemptions.

    Attributes:
        scheduled_s: None where a client measured, who cannot know.
    """

    arrival_s: np.ndarray
    scheduled_s: np.ndarray | None
    first_token_s: np.ndarray
    last_token_s: np.ndarray
    input_tokens: np.ndarray
    output_tokens: np.ndarray
    preemptions: np.ndarray

    def columns(self) -> dict[str, Any]:
        """As `engine.bench.metrics.latencies` takes them."""
        return {
            "arrival_s": self.arrival_s,
            "scheduled_s": [None] * len(self) if self.scheduled_s is None else self.scheduled_s,
            "first_token_s": self.first_token_s,
            "last_token_s": self.last_token_s,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
        }

    def same_load(self, other: Lives) -> bool:
        """Whether the same requests arrived at the same times."""
        pairs = ((getattr(one, name) for one in (self, other)) for name in ("input_tokens", "output_tokens"))
        return (
            len(self) == len(other)
            and bool(np.allclose(self.arrival_s, other.arrival_s, rtol=0, atol=ROUNDING_S))
            and all(np.array_equal(*pair) for pair in pairs)
        )


@dataclass(frozen=True, eq=False)
class ServedRun:
    """One run of a workload on an engine.

    Attributes:
        steps: None where they were not logged.
        peak_running: the most requests in one step, where it is known.
    """

    lives: Lives
    steps: list[LoggedStep] | None = None
    peak_running: int | None = None


@dataclass(frozen=True, eq=False)
class ServedRecord:
    """A workload served by an engine, once or several times over.

    Attributes:
        name: of the file, without its ending.
        source: what measured, e.g. "memwall bench serve".
        request_rate_per_s: offered; None if all came at once.
        num_skipped: requests of the workload that were left out, as the engine could not run them.
        step_logs: the files beside the record that its steps were read from.
    """

    name: str
    source: str
    engine: EngineSettings
    workload: str
    request_rate_per_s: float | None
    runs: tuple[ServedRun, ...]
    num_skipped: int = 0
    environment: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    commit: str = ""
    step_logs: tuple[Path, ...] = ()

    @property
    def label(self) -> str:
        rate = "all at once" if self.request_rate_per_s is None else f"{self.request_rate_per_s:.3g} requests/s"
        return f"{self.name}, {rate}"


class Reader(Protocol):
    """Reads the files of one source."""

    def can_read(self, path: Path) -> bool:
        """Whether this file is of that source; cheap, and never raises."""

    def read(self, path: Path) -> ServedRecord:
        """The record.

        Raises:
            UserError: it is of that source, but cannot be used.
        """


# Sources other than `memwall bench serve`.
READERS: list[Reader] = []


def read(path: Path) -> ServedRecord:
    """A record of any source.

    Raises:
        UserError: there is no such file, or nothing in it to compare with.
    """
    for reader in READERS:
        if reader.can_read(path):
            return reader.read(path)
    return read_bench_serve(path)


# ---- memwall bench serve ---------------------------------------------------------------------------------------------


def read_bench_serve(path: Path) -> ServedRecord:
    """A record of `memwall bench serve`, with the step logs that lie beside it.

    Raises:
        UserError: it is no such record, or of a server, or its step log is that of another run.
    """
    document = read_record(path)
    name = re.sub(r"(\.json)?(\.gz)?$", "", path.name)
    ensure_no_other_kind(document, path.name)
    if document.get("suite") is None:
        raise UserError(
            f"{path.name} is no record of `memwall bench`: it names no suite; validate takes those of serve"
        )
    if document["suite"] != "serve":
        raise UserError(f"{path.name} is of `memwall bench {document['suite']}`; validate takes records of serve")
    if document.get("server"):
        raise UserError(
            f"{path.name} was measured over HTTP, so the settings of the engine behind it are not in it; take a record "
            "of `memwall bench serve MODEL`"
        )
    try:
        (engine,), (result,) = document["engines"], document["results"]
        settings = _settings(engine, document["environment"])
        runs = tuple(_run(path.name, run["requests"], run) for run in result["runs"])
        if not runs:
            raise UserError(f"{path.name} has no finished run")
        logs = _step_logs(path, name, document["command"], len(runs))
        runs = tuple(
            run if log is None else _with_steps(path, number, run, read_step_log(log))
            for number, (run, log) in enumerate(zip(runs, logs, strict=True), 1)
        )
        return ServedRecord(
            name,
            "memwall bench serve",
            settings,
            result["workload"],
            result["request_rate_per_s"],
            runs,
            result["num_skipped"],
            document["environment"],
            document["command"],
            document["commit"],
            tuple(log for log in logs if log is not None),
        )
    except UserError:  # of a step log
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path.name} is no complete record of `memwall bench serve`: {error!r}") from None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _settings(engine: Mapping[str, Any], environment: Mapping[str, Any]) -> EngineSettings:
    config, memory, model = engine["config"], engine["memory"], engine["model"]
    kv_dtype = engine["dtype"] if config["kv_cache_dtype"] == "auto" else config["kv_cache_dtype"]
    return EngineSettings(
        model=config["model"],
        gpu=environment.get("gpu"),
        quantization=config["quantization"],
        # As the planner calls what has 16 bits.
        kv_cache_dtype="bfloat16" if kv_dtype == "float16" else kv_dtype,
        num_kv_blocks=memory["num_blocks"],
        block_size=memory["block_size"],
        max_model_len=memory["max_model_len"],
        max_num_seqs=config["max_num_seqs"],
        max_num_batched_tokens=config["max_num_batched_tokens"],
        windows=kv_groups(model["layer_windows"]).windows,
        enable_prefix_caching=config["enable_prefix_caching"],
        enable_chunked_prefill=config["enable_chunked_prefill"],
        enforce_eager=config["enforce_eager"],
        async_scheduling=config["async_scheduling"],
        gpu_memory_utilization=config["gpu_memory_utilization"],
        num_gpu_blocks_override=config["num_gpu_blocks_override"],
        model_config=model,
        device_id=_text(environment.get("device_id")),
    )


def _run(name: str, columns: Mapping[str, Any], run: Mapping[str, Any]) -> ServedRun:
    shared = sum(columns["cached_tokens"])
    if shared:
        raise UserError(
            f"{name}: {shared:,} prompt tokens were found in the prefix cache, and a record does not say which "
            "requests share them; validate takes workloads without shared prefixes"
        )
    times = {name: np.asarray(columns[name], np.float64) for name in _TIMES}
    counts = {name: np.asarray(columns[name], np.int64) for name in ("input_tokens", "output_tokens", "preemptions")}
    lives = Lives(**times, **counts)
    if len({len(column) for column in (*times.values(), *counts.values())}) != 1 or not len(lives):
        raise ValueError("its columns of requests are empty or differ in length")
    if not all(np.isfinite(column).all() for column in times.values()):
        raise ValueError("a request has no time")
    return ServedRun(lives, None, run.get("peak_running"))


_TIMES = ("arrival_s", "scheduled_s", "first_token_s", "last_token_s")


def _step_logs(path: Path, name: str, command: str, num_runs: int) -> list[Path | None]:
    """The step log of each run, beside the record: named as the benchmark was told, or as the record with .steps."""
    names = [*_told(command), f"{name}.steps.jsonl.gz", f"{name}.steps.jsonl"]
    found: list[Path | None] = [None] * num_runs
    for whole in (path.with_name(one) for one in names):
        # A benchmark of several runs that was interrupted in its second has one run, and a log with a number.
        numbered = step_log_paths(whole, max(num_runs, 2))
        for index in range(num_runs):
            logs = [numbered[index], *([whole] if num_runs == 1 else [])]
            if found[index] is None:
                found[index] = next((each for each in logs if each.is_file()), None)
    return found


def _told(command: str) -> list[str]:
    """The name after --step-log, if it was given one."""
    given = re.search(r"--step-log[= ]('[^']*'|\S+)", command)
    return [Path(given[1].strip("'")).name] if given else []


def _with_steps(path: Path, number: int, run: ServedRun, steps: list[LoggedStep]) -> ServedRun:
    """The run with its steps.

    Raises:
        UserError: they are not its steps: every request's first and last token comes at the end of one.
    """
    ends = np.array([step.end_s for step in steps])
    for name in ("first_token_s", "last_token_s"):
        times = getattr(run.lives, name)
        if not len(ends) or (np.abs(ends[nearest(ends, times)] - times) > ROUNDING_S).any():
            raise UserError(f"the step log beside {path.name} is not that of its run {number}; move it away")
    return ServedRun(run.lives, steps, run.peak_running)


def nearest(ascending: np.ndarray, values: np.ndarray) -> np.ndarray:
    """int64 [n]: for each value the index of the nearest of some ascending ones."""
    right = np.clip(np.searchsorted(ascending, values), 1, max(len(ascending) - 1, 1))
    if len(ascending) == 1:
        return np.zeros(len(values), np.int64)
    return np.where(values - ascending[right - 1] <= ascending[right] - values, right - 1, right)
