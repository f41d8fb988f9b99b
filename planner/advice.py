"""A simulation, and what to know before believing it: saturation, nearness to a cliff, what its times rest on."""

from __future__ import annotations

from dataclasses import replace

from planner.deployment import Deployment
from planner.memory import MemoryReport
from planner.serving import simulate
from planner.simulation import SimulationOptions, SimulationResult, System, Verdict
from planner.step_time import Evidence
from planner.workload import Workload

# A KV pool this full is near the point where preemption starts.
NEAR_FULL = 0.90
# How many fewer blocks the cliff is looked for at, and what counts as one.
KNEE_SHARE = 0.10
CLIFF_FACTOR = 2.0
# Of the steps' time, from where on it is worth saying that it is extrapolated.
_NOTEWORTHY_SHARE = 0.001


def examine(
    workload: Workload,
    deployment: Deployment,
    options: SimulationOptions | None = None,
    memory: MemoryReport | None = None,
) -> SimulationResult:
    """Simulate a deployment and add the warnings its result deserves.

    Where the KV pool comes close to full, the same load is simulated once more with 10 % fewer blocks: near the knee,
    a few per cent of memory decide over the 99th percentile.

    Raises:
        UserError: as `simulate` and `Deployment.system`.
    """
    options = options or SimulationOptions()
    memory = memory or deployment.memory()
    system = deployment.system(workload, memory)
    result = simulate(workload, system, options)
    warnings = [*memory.warnings, *workload.notes, *_evidence(result), *_saturation(result)]
    warnings += cliff_warning(workload, system, options, result)
    warnings += load_warnings(workload, deployment, memory, result)
    return result.model_copy(update={"warnings": tuple(warnings)})


def cliff_warning(
    workload: Workload, system: System, options: SimulationOptions, result: SimulationResult
) -> list[str]:
    """A warning if 10 % fewer KV blocks would multiply p99 TTFT; empty where the pool never comes near full."""
    if result.ttft_ms is None or not (result.kv_usage_peak >= NEAR_FULL or result.num_preemptions):
        return []
    blocks = system.cache.num_blocks
    fewer = blocks - round(KNEE_SHARE * blocks)
    needed = system.cache.max_pages(system.scheduler.max_model_len, system.scheduler.max_step_tokens)
    if fewer <= needed:
        return [
            f"the KV pool is {result.kv_usage_peak:.0%} full at its peak, and with {KNEE_SHARE:.0%} fewer blocks it "
            f"could not hold one request of max_model_len"
        ]
    smaller = simulate(workload, replace(system, cache=replace(system.cache, num_blocks=fewer)), options)
    before, after = result.ttft_ms.p99, smaller.ttft_ms.p99 if smaller.ttft_ms else float("inf")
    preempted = f"preempted requests {result.preempted_share:.1%} → {smaller.preempted_share:.1%}"
    if after >= CLIFF_FACTOR * before:
        return [
            f"operating point within {KNEE_SHARE:.0%} of a cliff: with {KNEE_SHARE:.0%} fewer KV blocks p99 TTFT goes "
            f"from {before:,.0f} to {after:,.0f} ms ({preempted}); leave more room for the KV cache"
        ]
    if result.num_preemptions:
        return [
            f"{result.preempted_share:.1%} of requests are preempted for want of KV blocks; with {KNEE_SHARE:.0%} "
            f"fewer blocks p99 TTFT goes from {before:,.0f} to {after:,.0f} ms"
        ]
    return []


def _evidence(result: SimulationResult) -> list[str]:
    if result.evidence is Evidence.UNCALIBRATED:
        return ["step times are uncalibrated: they come from the data sheet and stated efficiencies, not from this GPU"]
    share = result.evidence_shares.get(Evidence.EXTRAPOLATED, 0.0)
    if share == 1.0:
        return ["step times are transferred: they were measured on something else, and scaled"]
    if share >= _NOTEWORTHY_SHARE:
        return [f"{share:.1%} of the steps' time lies outside of what was measured, and is extrapolated"]
    return []


def _saturation(result: SimulationResult) -> list[str]:
    if result.verdict is Verdict.SATURATED:
        return [
            "saturated: requests arrive faster than they are served, so latencies grow with the length of the load and "
            "percentiles describe this trace's length, not a steady state"
        ]
    return []


def load_warnings(
    workload: Workload, deployment: Deployment, memory: MemoryReport, result: SimulationResult
) -> list[str]:
    """What to know of it with this load: a calibration that fails, prompts it rejected, prefixes it could not keep."""
    failure = deployment.calibration_failure()
    warnings = [*([failure] if failure else []), *_prefix_capacity(workload, deployment, memory, result)]
    length = memory.max_model_len
    cut = int(((workload.input_tokens < length) & (workload.input_tokens + workload.output_tokens > length)).sum())
    if cut:
        warnings.append(
            f"{cut} of {result.num_requests} requests reach max_model_len {length} before the end of their output, "
            f"which is cut there"
        )
    if result.num_rejected:
        warnings.append(f"{result.num_rejected} of {result.num_requests} prompts exceed max_model_len: rejected")
    return warnings


def _prefix_capacity(
    workload: Workload, deployment: Deployment, memory: MemoryReport, result: SimulationResult
) -> list[str]:
    """Say so when the cache is too small for the sharing that the trace has."""
    if not deployment.enable_prefix_caching:
        return []
    if workload.prefix_block_hashes is None:
        return ["prefix caching is on, but the workload says nothing about shared prefixes: no request can hit"]
    own = workload.infinite_cache_hit_rate(memory.block_size)
    if result.prefix_cache_hit_rate >= own / 2:
        return []
    held = memory.num_kv_blocks * memory.block_size * deployment.replicas
    return [
        f"the prefix cache reaches {result.prefix_cache_hit_rate:.1%} of prompt tokens where an infinite one would "
        f"reach {own:.1%}: prefixes are evicted from the {held:,} tokens of KV, which running requests use too, before "
        f"they are asked for again"
    ]
