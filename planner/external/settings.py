"""The system that answered a run: what its log says, what flags add, and vLLM's defaults where neither does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.scheduling import KVCacheConfig, SchedulerConfig
from planner.deployment import Deployment, length_for
from planner.errors import UserError
from planner.external.contradictions import contradictions, refuse_unmodelled
from planner.external.plausible import check_token_times
from planner.external.served_run import ServedRun
from planner.external.server_facts import ServerFacts
from planner.hardware import GpuSpec
from planner.memory import KVCacheDtype, kv_layout, validate_parallelism
from planner.model import ModelSpec
from planner.simulation import AcceptanceProcess, Speculation, System
from planner.step_time import StepTime

# vLLM's defaults of its API server: larger where the GPU has 70 GiB or more, and is no A100.
_LARGE_GPU_BYTES = 70 << 30
_LARGE = {"max_num_batched_tokens": 8192, "max_num_seqs": 1024}
_SMALL = {"max_num_batched_tokens": 2048, "max_num_seqs": 256}
# From this version on vLLM schedules a step while the one before still runs, unless told otherwise.
_ASYNC_SINCE = (0, 14)


#: Where a setting comes from that neither flag nor log says.
ASSUMED = "vLLM's default"
#: Where the number of KV blocks comes from that neither says.
MEMORY_MODEL = "the memory model"
# Of the settings those that decide over latencies.
_DECISIVE = ("max_num_seqs", "max_num_batched_tokens", "num_gpu_blocks")


@dataclass(frozen=True)
class ExternalSystem:
    """The simulated counterpart of a server, and how its settings were found.

    Attributes:
        system: for the simulator; its step time is the base, unscaled.
        deployment: the same in the planner's words.
        depth_known: whether log or flag said how many steps are in flight.
        origin: for each setting its value and where it came from, for people.
        warnings: what the log or the benchmark says that does not go with it, one sentence each.
    """

    system: System
    deployment: Deployment
    depth_known: bool
    origin: dict[str, tuple[Any, str]]
    warnings: tuple[str, ...] = ()

    @property
    def guessed(self) -> tuple[str, ...]:
        """The settings that decide over latencies and that neither flag nor log says."""
        unsaid = (name for name, (_, origin) in self.origin.items() if origin in (ASSUMED, MEMORY_MODEL))
        return tuple(name for name in unsaid if name in _DECISIVE)

    def with_depth(self, depth: int) -> ExternalSystem:
        """The same with this many steps in flight."""
        return replace(self, system=replace(self.system, pipeline_depth=depth))


class _Settings:
    """Looks a setting up in the flags, then the log, then the defaults, and remembers where it was."""

    def __init__(self, flags: dict[str, Any], said_by: str, facts: ServerFacts, defaults: dict[str, Any]) -> None:
        self._flags, self.said_by = flags, said_by
        self._facts = facts
        self._defaults = defaults
        self.origin: dict[str, tuple[Any, str]] = {}

    def get(self, name: str, default: Any = None, why: str = ASSUMED) -> Any:
        found = getattr(self._facts, name, None)
        if self._flags.get(name) is not None:
            value, origin = self._flags[name], self.said_by
        elif found is not None:
            value, origin = found.value, f"log line {found.line}"
        else:
            value, origin = self._defaults.get(name, default), why
        self.origin[name] = (value, origin)
        return value


def external_system(
    model: ModelSpec,
    gpu: GpuSpec,
    facts: ServerFacts,
    runs: Sequence[ServedRun],
    flags: dict[str, Any] | None = None,
    base: StepTime | None = None,
    said_by: str = "flag",
    profiles: tuple[str, ...] | None = None,
) -> ExternalSystem:
    """The system to simulate for a server that answered `runs`.

    Args:
        facts: what its log said; `ServerFacts()` for nothing.
        flags: settings that the user gave, by the names of ServerFacts; they go before the log.
        base: the step time to scale; that of the nearest profile, or else the roofline, if None.
        said_by: whoever set the flags, for people.
        profiles: of which the nearest is found, as those of a `Deployment`.

    Raises:
        UserError: settings that contradict each other or the runs, or that have no counterpart here.
    """
    flags = flags or {}
    given = flags.get("quantization")
    refuse_unmodelled(model, facts, given)
    large = gpu.memory_bytes >= _LARGE_GPU_BYTES and "a100" not in gpu.id
    settings = _Settings(flags, said_by, facts, _LARGE if large else _SMALL)
    ranks = settings.get("tensor_parallel_size", 1)
    validate_parallelism(model, gpu, ranks)
    if given is not None or facts.quantization is not None:
        settings.get("quantization")
    dtype = KVCacheDtype.parse(settings.get("kv_cache_dtype", "auto"))
    longest = max(length_for(run.workload(), model) for run in runs)
    max_model_len = settings.get("max_model_len", longest, "the longest request")
    budget = settings.get("max_num_batched_tokens")
    seqs = min(settings.get("max_num_seqs"), budget)
    blocks, block_size = _blocks(settings, flags, facts)
    deployment = Deployment(
        model=model,
        gpu=gpu,
        tensor_parallel_size=ranks,
        kv_cache_dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        block_size=block_size,
        gpu_memory_utilization=settings.get("gpu_memory_utilization", 0.92 if facts.engine is None else 0.9),
        enforce_eager=bool(settings.get("enforce_eager", False)),
        enable_chunked_prefill=settings.get("enable_chunked_prefill", True) is not False,
        num_gpu_blocks_override=blocks,
        profiles=profiles,
    )
    if blocks is None:
        memory = deployment.memory()
        if not memory.fits:
            raise UserError(
                f"the memory model finds no room for the server's KV cache ({memory.reason}); give the number of "
                "blocks that the server printed with --num-gpu-blocks-override, or its log"
            )
        blocks = memory.num_kv_blocks + 1
        settings.origin["num_gpu_blocks"] = (blocks, MEMORY_MODEL)
    layout = kv_layout(model, deployment.memory_settings())
    speculation = _speculation(facts)
    depth, depth_known = _depth(settings, facts, speculation)
    try:
        scheduler = SchedulerConfig(
            max_num_batched_tokens=budget,
            max_num_seqs=seqs,
            max_model_len=max_model_len,
            enable_chunked_prefill=deployment.enable_chunked_prefill,
        )
        # vLLM counts the null block among its blocks, as KVCacheConfig does.
        cache = KVCacheConfig(num_blocks=blocks, block_size=layout.block_size, windows=layout.groups.windows)
    except ValueError as error:
        raise UserError(str(error)) from None
    step_time = base or deployment.step_time()
    system = System(scheduler, cache, step_time, speculation=speculation, pipeline_depth=depth)
    for run in runs:
        check_token_times(run, step_time, f"{model.name} on {gpu.name}")
    warnings = tuple(contradictions(deployment, facts, runs, step_time, given))
    return ExternalSystem(system, deployment, depth_known, settings.origin, warnings)


def _blocks(settings: _Settings, flags: dict[str, Any], facts: ServerFacts) -> tuple[int | None, int | None]:
    """Blocks of the KV pool and tokens per block; None for what nothing says."""
    block_size = flags.get("block_size")
    if block_size is None and facts.blocks is not None:
        # SGLang counts tokens; pages of vLLM's size hold as many, less a rounding.
        block_size = facts.tokens_per_block if facts.tokens_per_block > 1 else 16
    if flags.get("num_gpu_blocks") is not None:
        blocks, origin = flags["num_gpu_blocks"], settings.said_by
    elif facts.num_gpu_blocks is not None:
        blocks, origin = facts.num_gpu_blocks.value, f"log line {facts.num_gpu_blocks.line}"
    elif facts.kv_cache_tokens is not None:
        tokens = facts.kv_cache_tokens
        blocks, origin = tokens.value // block_size, f"log line {tokens.line}: {tokens.value:,} tokens"
    else:
        return None, block_size
    settings.origin["num_gpu_blocks"] = (blocks, origin)
    settings.origin["block_size"] = (
        block_size or 16,
        settings.said_by if "block_size" in flags else "log or vLLM's default",
    )
    return blocks, block_size


def _speculation(facts: ServerFacts) -> Speculation | None:
    acceptance = facts.acceptance
    if acceptance is None:
        if facts.num_speculative_tokens is not None and facts.num_speculative_tokens.value:
            raise UserError(
                f"the server speculated ({facts.num_speculative_tokens.value} tokens, log line "
                f"{facts.num_speculative_tokens.line}), but no line says how many drafts were accepted; add its "
                "'SpecDecoding metrics' lines or the text of /metrics"
            )
        return None
    if not acceptance.unconditional_rates:
        raise UserError(
            f"the server speculated, but log line {acceptance.line} has no acceptance per position; add the text of "
            "its /metrics, which counts it"
        )
    rates = acceptance.conditional_rates
    return Speculation(len(rates), AcceptanceProcess(rates))


def _depth(settings: _Settings, facts: ServerFacts, speculation: Speculation | None) -> tuple[int, bool]:
    """Steps in flight, and whether anything said so."""
    if speculation is not None:
        return 1, True
    asynchronous = settings.get("async_scheduling", None, "not said")
    if asynchronous is None and facts.version is not None and facts.value("engine") == "vllm":
        numbers = tuple(int(part) for part in re.findall(r"\d+", facts.version.value)[:2])
        asynchronous = numbers >= _ASYNC_SINCE
        settings.origin["async_scheduling"] = (asynchronous, f"default of vLLM {facts.version.value}")
    if asynchronous is None:
        return 1, False
    return (2 if asynchronous else 1), True
