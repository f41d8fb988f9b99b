"""Read a record of `memwall bench serve`: the times of every request, and the engine that it says served them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.catalog import list_gpus, load_gpu
from planner.errors import UserError
from planner.external.served_run import ServedRun, served_run
from planner.hardware import GpuSpec
from planner.profile.library import shipped_profiles
from planner.workload.workload import MAX_TOKENS

# The driver's memory of the same GPU differs a little between boards.
_MEMORY_SLACK = 0.02
_TIMES = ("arrival_s", "scheduled_s", "first_token_s", "last_token_s")
_COUNTS = ("input_tokens", "output_tokens", "cached_tokens")


@dataclass(frozen=True)
class MemwallRecord:
    """What one benchmark of our engine recorded.

    Attributes:
        runs: the same load once or several times.
        model: as it was called, which may be the path of a folder on another machine: a name to compare, not to open.
        gpu_name, gpu_memory_bytes: as the driver has them; None on a CPU.
        flags: settings by the names of `planner.external.server_facts.ServerFacts`, for `external_system`.
    """

    runs: tuple[ServedRun, ...]
    model: str
    gpu_name: str | None
    gpu_memory_bytes: int | None
    quantization: str | None
    flags: Mapping[str, Any]

    def server(self) -> dict[str, Any]:
        """What served, by name."""
        return {"model": self.model, "GPU": self.gpu_name, "quantization": self.quantization, **self.flags}

    def gpu(self) -> GpuSpec:
        """The catalog's GPU.

        Raises:
            UserError: it has none of that name.
        """
        for profile in shipped_profiles():
            if profile.record.gpu is not None and profile.record.gpu_name == self.gpu_name:
                return load_gpu(profile.record.gpu)
        for gpu in map(load_gpu, list_gpus()):
            is_close = abs((self.gpu_memory_bytes or 0) / gpu.memory_bytes - 1) < _MEMORY_SLACK
            if self.gpu_name and gpu.name.startswith(self.gpu_name.split(" ")[0]) and is_close:
                return gpu
        raise UserError(f"it was measured on {self.gpu_name or 'a CPU'}, which the catalog of GPUs does not know")


def is_memwall_record(text: str) -> bool:
    """Whether this is a record of `memwall bench`, of whichever suite."""
    head = text.lstrip()[:200]
    return head.startswith("{") and '"suite"' in head


def read_memwall_record(text: str, file: str) -> MemwallRecord:
    """The record in a text.

    Raises:
        UserError: one sentence with the file and what is wrong.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not complete JSON: {getattr(error, 'msg', 'nested too deeply')}") from None
    if not isinstance(document, dict) or document.get("suite") != "serve":
        raise UserError(f"{file} is no record of `memwall bench serve`, the only suite that has arrivals")
    if document.get("server"):
        raise UserError(
            f"{file} was measured over HTTP, so the settings of the engine behind it are not in it; take a record of "
            f"`memwall bench serve MODEL`"
        )
    try:
        (engine,), (result,) = document["engines"], document["results"]
        runs = tuple(_run(each["requests"], file) for each in result["runs"])
        environment = document["environment"]
        memory = environment.get("memory_bytes")
        record = MemwallRecord(
            runs,
            str(engine["config"]["model"]),
            environment.get("gpu"),
            None if memory is None else int(memory),
            engine["config"]["quantization"],
            _flags(engine),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is no complete record of `memwall bench serve`: {error!r}") from None
    if not runs:
        raise UserError(f"{file} has no finished run")
    return record


def _flags(engine: Mapping[str, Any]) -> dict[str, Any]:
    config, memory = engine["config"], engine["memory"]
    found = {
        "tensor_parallel_size": 1,
        "kv_cache_dtype": config["kv_cache_dtype"],
        "max_model_len": int(memory["max_model_len"]),
        "num_gpu_blocks": int(memory["num_blocks"]) + 1,  # and the null block, as vLLM counts
        "block_size": int(memory["block_size"]),
    }
    for name in (
        "max_num_seqs",
        "max_num_batched_tokens",
        "gpu_memory_utilization",
        "enforce_eager",
        "enable_chunked_prefill",
        "async_scheduling",
    ):
        found[name] = config[name]
    return found


def _run(columns: Mapping[str, Any], file: str) -> ServedRun:
    times = {name: np.asarray(columns[name], np.float64) for name in _TIMES}
    counts = {name: np.asarray(columns[name], np.int64) for name in _COUNTS}
    shapes = {column.shape for column in (*times.values(), *counts.values())}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise ValueError("its columns of requests differ in length")
    if not all(np.isfinite(column).all() for column in times.values()):
        raise ValueError("a request has no time")
    for name in ("input_tokens", "output_tokens"):
        if ((counts[name] < 1) | (counts[name] > MAX_TOKENS)).any():
            raise ValueError(f"{name} has a request of no length")
    if counts["cached_tokens"].sum():
        raise UserError(
            f"{file}: {int(counts['cached_tokens'].sum()):,} prompt tokens were found in the prefix cache, and a "
            f"record does not say which requests share them; take a workload without shared prefixes"
        )
    return served_run(
        file,
        times["arrival_s"],
        counts["input_tokens"],
        counts["output_tokens"],
        times["first_token_s"],
        times["last_token_s"],
        scheduled_s=times["scheduled_s"],
    )
