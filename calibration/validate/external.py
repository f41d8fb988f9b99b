"""Runs of an engine that we do not run, as `planner.external` reads them, in the words of a record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from calibration.validate.records import EngineSettings, Lives, ServedRecord, ServedRun


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
