"""What a server or its benchmark says of itself that does not go with what is simulated: refused, or told."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache

from planner.catalog import catalog_id
from planner.deployment import Deployment
from planner.errors import UserError
from planner.external.served_run import ServedRun
from planner.external.server_facts import ServerFacts
from planner.memory import GIB, MemoryReport, plan_memory
from planner.model import ModelSpec
from planner.step_time import Evidence, StepTime

# Rounding and requests without a client leave a few hits.
_FEW_HITS = 0.01
# Names round sizes ("2b" is 2.6) and count shared parts of experts in each (8x7b is 47).
_SAME_SIZE = 1.5
# The memory model knows weights to 1 %; drafts, adapters and padding add to them.
_SAME_WEIGHTS = 1.25
# The memory model knows the KV cache to some per cent; a GPU of another size has 0.6 times as much at most.
_SAME_GPU = 0.67
_SIZE = re.compile(r"(?<![a-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)b(?![a-z0-9])")


def served_model(given: str | None, facts: ServerFacts, runs: Sequence[ServedRun]) -> str | None:
    """The model that was served: as given, else by the log, else by the benchmark, whose name is no path to open."""
    named = (catalog_id(run.model) for run in runs if run.model is not None)
    return given or facts.value("model") or next((each for each in named if each is not None), None)


def served_quantization(given: str | None, facts: ServerFacts) -> str | None:
    """What the weights were quantised to while loading: as given, else by the log, where the planner knows it."""
    return given or ("fp8" if facts.value("quantization") == "fp8" else None)


def refuse_unmodelled(model: ModelSpec, facts: ServerFacts, quantization: str | None) -> None:
    """
    Args:
        quantization: that was given, and goes before the log.

    Raises:
        UserError: the server did what the simulator has no counterpart of.
    """
    stages, replicas, weights = facts.pipeline_parallel_size, facts.data_parallel_size, facts.quantization
    if stages is not None and stages.value > 1:
        raise UserError(
            f"the server had its layers on {stages.value} GPUs in turn (pipeline_parallel_size, log line "
            f"{stages.line}), which is not modelled; give a benchmark of a server without pipeline parallelism"
        )
    if replicas is not None and replicas.value > 1:
        raise UserError(
            f"{replicas.value} replicas shared the benchmark's requests (data_parallel_size, log line "
            f"{replicas.line}), and nothing says which had which; give a benchmark of one replica, and its log"
        )
    if weights is not None and quantization is None and not _is_quantised(model):
        raise UserError(
            f"the server's weights were quantised by {weights.value} (log line {weights.line}), those of {model.name} "
            "are not; give the config.json that was served as the model, or the quantization fp8 if that is near enough"
        )


def _is_quantised(model: ModelSpec) -> bool:
    return any(group.bits_per_parameter < 16 for group in model.parameters)


def contradictions(
    deployment: Deployment, facts: ServerFacts, runs: Sequence[ServedRun], step_time: StepTime, given: str | None
) -> list[str]:
    """What a reader should know before trusting a simulation of this server, one sentence each.

    Args:
        given: quantization that was given, and goes before the log.

    Raises:
        UserError: the server had more memory than its GPU.
    """
    # Worked out once, and only where the log says something to hold against it.
    report = cache(
        lambda: plan_memory(deployment.model, deployment.gpu, deployment.memory_settings(), with_remedies=False)
    )
    found = [_memory(deployment, facts, report), *_names(deployment.model, facts, runs)]
    found.append(_weights(deployment, facts, report))
    weights = facts.quantization
    if weights is not None and given not in (None, weights.value):
        found.append(
            f"the log says that the weights were quantised by {weights.value} (line {weights.line}), but {given} was "
            "given, which is simulated"
        )
    if deployment.enforce_eager and step_time.evidence is Evidence.UNCALIBRATED:
        where = "" if facts.enforce_eager is None else f", log line {facts.enforce_eager.line}"
        found.append(
            f"the server ran without CUDA graphs (enforce_eager{where}), and measured step times are of graphs: those "
            "of the data sheet stand in, without what it costs to launch each kernel"
        )
    found.append(_prefix_hits(facts))
    return [sentence for sentence in found if sentence is not None]


def _prefix_hits(facts: ServerFacts) -> str | None:
    rate = next((rate for rate in facts.prefix_hit_rates if rate > _FEW_HITS), None)
    if rate is None:
        return None
    return (
        f"the server found {rate:.0%} of prompt tokens in its prefix cache, which the runs do not show; "
        "the prefill factor absorbs it, and holds for as much reuse only"
    )


def _memory(deployment: Deployment, facts: ServerFacts, report: Callable[[], MemoryReport]) -> str | None:
    told, gpu = facts.kv_cache_gib, deployment.gpu
    if told is None:
        return None
    total = gpu.memory_bytes / GIB
    weights = facts.value("weights_gib") or 0.0
    if told.value + weights > total:
        beside = f" beside {weights:,.2f} GiB of weights" if weights else ""
        raise UserError(
            f"the server had {told.value:,.2f} GiB of KV cache per GPU{beside} (log line {told.line}), but "
            f"{gpu.name} has {total:,.1f} GiB of memory; name the GPU (--system) that served"
        )
    planned = report()
    fixed = planned.weights_bytes_per_rank + planned.activation_bytes_per_rank
    fixed += planned.cuda_graph_bytes_per_rank + planned.non_torch_bytes_per_rank
    had = (told.value + fixed / GIB) / deployment.gpu_memory_utilization
    if had >= _SAME_GPU * total:
        return None
    return (
        f"with {told.value:,.2f} GiB of KV cache (log line {told.line}) the server's GPU had some {had:,.0f} GiB of "
        f"memory, but {gpu.name} has {total:,.0f}: it was another GPU (--system), or it had other work too"
    )


def _weights(deployment: Deployment, facts: ServerFacts, report: Callable[[], MemoryReport]) -> str | None:
    loaded = facts.weights_gib
    if loaded is None or facts.num_speculative_tokens is not None:
        return None
    expected = report().weights_bytes_per_rank / GIB
    if expected / _SAME_WEIGHTS <= loaded.value <= expected * _SAME_WEIGHTS:
        return None
    return (
        f"the server loaded {loaded.value:,.2f} GiB of weights per GPU (log line {loaded.line}), but "
        f"{deployment.model.name} has {expected:,.2f}: it was another model, or other weights, than is simulated"
    )


def _names(model: ModelSpec, facts: ServerFacts, runs: Sequence[ServedRun]) -> list[str]:
    named = {run.model: run.name for run in runs if run.model is not None}
    if facts.model is not None:
        named.setdefault(facts.model.value, f"the log (line {facts.model.line})")
    return [
        f"{where} is of the model {name}, but {model.name} is simulated"
        for name, where in named.items()
        if _is_another(name, model)
    ]


def _is_another(name: str, model: ModelSpec) -> bool:
    """Whether a name is plainly of another model: another one of the catalog, or one of another size."""
    known = catalog_id(name)
    if known is not None and catalog_id(model.name) is not None:
        return known != catalog_id(model.name)
    size = _SIZE.search(name.lower())
    if size is None:
        return False
    ratio = float(size[2]) * int(size[1] or 1) * 1e9 / model.num_parameters
    return not 1 / _SAME_SIZE <= ratio <= _SAME_SIZE
