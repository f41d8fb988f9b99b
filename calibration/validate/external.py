"""Runs of an engine that we do not run, as `planner.external` reads them, in the words of a record."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from calibration.validate.profiles import Predictor
from calibration.validate.records import EngineSettings, Lives, ServedRecord, ServedRun
from engine.errors import UserError
from planner.catalog import load_gpu, load_model
from planner.deployment import Deployment
from planner.external.bench_detail import is_bench_detail
from planner.external.contradictions import served_model, served_quantization
from planner.external.readers import read_benchmark_text, read_served_runs, read_server_facts
from planner.external.settings import ExternalSystem, external_system
from planner.step_time import Evidence

_TABLES = (".csv", ".jsonl", ".csv.gz", ".jsonl.gz")


@dataclass(frozen=True)
class OutsideServer:
    """What is known of a server that is not ours, beside what its benchmark recorded.

    Attributes:
        model, system: what it served, and on which GPU (catalog ids); None for what its log says, and for unknown.
        quantization: of the weights.
        server_log, metrics: files with what it printed.
        profile: of step times; None for the shipped ones.
        flags: settings by the names of `planner.external.server_facts.ServerFacts`; they go before its log.
    """

    model: str | None = None
    system: str | None = None
    quantization: str | None = None
    server_log: Path | None = None
    metrics: Path | None = None
    profile: Path | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)

    def can_read(self, path: Path) -> bool:
        """Whether a file is of somebody else's benchmark.

        Raises:
            UserError: it has no text to tell from.
        """
        return path.name.endswith(_TABLES) or is_bench_detail(read_benchmark_text(path))

    def read(self, path: Path) -> list[tuple[ServedRecord, Predictor]]:
        """Each load of a file with the step times to predict it with; runs of the same load are one record.

        Raises:
            UserError: it cannot be used, or it is not known what served it.
        """
        facts = read_server_facts(self.server_log, self.metrics)
        runs = read_served_runs(path)
        name = served_model(self.model, facts, runs)
        if name is None:
            raise UserError(f"{path.name} does not say which model was served; pass --model or --server-log")
        if self.system is None:
            raise UserError(f"{path.name} does not say which GPU served it; pass --system, e.g. h200_sxm")
        quantization = served_quantization(self.quantization, facts)
        gpu, model = load_gpu(self.system), load_model(name, quantization)
        given = {} if self.quantization is None else {"quantization": self.quantization}
        found = external_system(model, gpu, facts, runs, {**self.flags, **given})
        longest = max(int((run.input_tokens + run.output_tokens).max()) for run in runs)
        limit = found.system.scheduler.max_model_len
        if longest > limit:
            raise UserError(
                f"{path.name} has a request of {longest} tokens, but max_model_len is {limit}: the settings are not "
                "those of the server that answered it"
            )
        if found.system.speculation is not None:
            raise UserError(f"the server behind {path.name} speculated; validate takes runs without speculation")
        predictor, found = self._predictor(found)
        stem = re.sub(r"\.(json|jsonl|csv)(\.gz)?$", "", path.name)
        loads = _loads(runs)
        names = [stem] if len(loads) == 1 else [f"{stem}.{number}" for number in range(1, len(loads) + 1)]
        records = [
            external_record(one, "an outside benchmark", load, found, model.name, gpu.name)
            for one, load in zip(names, loads, strict=True)
        ]
        weights = {"quantization": quantization}
        return [(replace(record, engine=replace(record.engine, **weights)), predictor) for record in records]

    def _predictor(self, found: ExternalSystem) -> tuple[Predictor, ExternalSystem]:
        """The step times, and the system with as many steps in flight as a calibration of it found."""
        profiles = None if self.profile is None else (str(self.profile),)
        deployment: Deployment = replace(found.deployment, profiles=profiles)
        step_time = deployment.step_time()
        if step_time.evidence is Evidence.SCALED and not found.depth_known:
            found = found.with_depth(step_time.pipeline_depth)
        guessed = ", ".join(found.guessed)
        notes = (f"{guessed}: neither flag nor log says, so a default stands in",) if guessed else ()
        return Predictor(step_time, step_time.description, None, (*notes, *found.warnings)), found


def _loads(runs: Sequence[Any]) -> list[list[Any]]:
    """Runs with the same arrivals and lengths together."""
    loads: list[list[Any]] = []
    for run in runs:
        same = (load for load in loads if _lives(load[0]).same_load(_lives(run)))
        found = next(same, None)
        if found is None:
            loads.append([run])
        else:
            found.append(run)
    return loads


def external_record(name: str, source: str, runs: Sequence[Any], found: Any, model: str, gpu: str) -> ServedRecord:
    """A record to validate, without step logs; preemptions are not known and count as none.

    Args:
        source: what measured, e.g. "vllm bench serve".
        runs: `planner.external.served_run.ServedRun`s of one load, served by the same engine.
        found: the `planner.external.settings.ExternalSystem` that answered them.
        gpu: as `EngineSettings` has it.
    """
    scheduler, cache = found.system.scheduler, found.system.cache
    engine = EngineSettings(
        model=model,
        gpu=gpu,
        quantization=None,
        kv_cache_dtype=str(found.deployment.kv_cache_dtype),
        num_kv_blocks=cache.num_blocks - 1,
        block_size=cache.block_size,
        max_model_len=scheduler.max_model_len,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        windows=cache.windows,
        enable_prefix_caching=cache.enable_prefix_caching,
        enable_chunked_prefill=scheduler.enable_chunked_prefill,
        enforce_eager=found.deployment.enforce_eager,
        async_scheduling=found.system.pipeline_depth > 1,
        gpu_memory_utilization=found.deployment.gpu_memory_utilization,
        tensor_parallel_size=found.deployment.tensor_parallel_size,
    )
    first = runs[0]
    last_arrival = float(first.arrival_s[-1])
    return ServedRecord(
        name=name,
        source=source,
        engine=engine,
        workload=first.name,
        request_rate_per_s=(len(first) - 1) / last_arrival if last_arrival else None,
        runs=tuple(ServedRun(_lives(run)) for run in runs),
        num_skipped=max(run.num_failed for run in runs),
    )


def _lives(run: Any) -> Lives:
    return Lives(
        run.arrival_s,
        run.scheduled_s,
        run.first_token_s,
        run.last_token_s,
        run.input_tokens,
        run.output_tokens,
        np.zeros(len(run), np.int64),
    )
