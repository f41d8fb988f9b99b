"""Closed-form answers about memory: fast enough to be computed while somebody moves a slider."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from dashboard.services import profiles
from dashboard.services.questions import Engine
from engine.scheduling import StepShape
from planner.deployment import PriceList
from planner.errors import UserError
from planner.hardware import GpuSpec
from planner.memory import KVCacheDtype, MemoryReport, plan_memory
from planner.model import MLASpec, ModelSpec
from planner.profile.shape import ModelShape
from planner.profile.tables import Limits, point_shape
from planner.step_time import Evidence

DTYPES = ("bfloat16", "fp8", "int8", "int4", "int2")
SIZES = (1, 2, 4, 8)
_SHORTEST = 1024
_KEPT = 256


@lru_cache(_KEPT)
def memory_of(engine: Engine, concurrency: int = 1) -> MemoryReport:
    """The memory of one replica: with as many KV blocks as the engine had in a profile of these very settings, which is
    what plans and simulations go by, else as the model of memory has it.

    Raises:
        UserError: a setting out of its range, or a parallelism that the model or the node does not allow.
    """
    blocks = _measured_blocks(replace(engine, max_model_len=None))
    modelled = modelled_memory_of(engine, concurrency)
    if blocks is None or not modelled.fits:
        return modelled
    settings = engine.deployment().memory_settings()
    report = plan_memory(engine.model, engine.gpu, settings, concurrency)
    # What helps where it does not fit, and what to beware of, only the model of memory can tell.
    return report.model_copy(update={"remedies": modelled.remedies, "warnings": modelled.warnings})


@lru_cache(_KEPT)
def modelled_memory_of(engine: Engine, concurrency: int = 1) -> MemoryReport:
    """The same by the model of memory, whatever was measured.

    Raises:
        UserError: as `memory_of`.
    """
    deployment = replace(engine, profiles=("none",)).deployment()
    return plan_memory(engine.model, engine.gpu, deployment.memory_settings(), concurrency)


@lru_cache(_KEPT)
def _measured_blocks(engine: Engine) -> int | None:
    return engine.deployment().memory_settings().num_gpu_blocks


def lengths_up_to(longest: int) -> tuple[int, ...]:
    """Context lengths from 1,024 on, four to an octave."""
    found, place = [], 0
    while (length := round(_SHORTEST * 2 ** (place / 4))) < longest:
        found.append(length)
        place += 1
    return (*found, longest)


@dataclass(frozen=True)
class Line:
    """One curve over context lengths.

    Attributes:
        name: of the series. points: (context in tokens, value), where there is a value.
        evidence: what a value rests on, point by point; empty where nothing was timed.
    """

    name: str
    points: tuple[tuple[int, float], ...]
    evidence: tuple[Evidence, ...] = ()


@lru_cache(_KEPT)
def concurrency_lines(engine: Engine, longest: int) -> tuple[Line, ...]:
    """Sequences that fit by context length, one curve per KV format."""
    return tuple(
        Line(dtype, _concurrencies(replace(engine, kv_cache_dtype=dtype), lengths_up_to(longest))) for dtype in DTYPES
    )


def _concurrencies(engine: Engine, lengths: Sequence[int]) -> tuple[tuple[int, float], ...]:
    points = []
    for length in lengths:
        try:
            report = memory_of(replace(engine, max_model_len=length))
        except UserError:
            return ()
        if report.num_kv_blocks:
            points.append((length, report.max_concurrency_decoding))
    return tuple(points)


# DeepSeek-V3's latent, and the window and the share of full layers of Gemma 3.
_LATENT = MLASpec(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, q_lora_rank=None)
_WINDOW = 1024
_FULL_EVERY = 6


def attention_variants(model: ModelSpec) -> dict[str, ModelSpec]:
    """The model's shape with each kind of attention. Its weights are left as they are: only the cache differs."""
    own = "MLA" if model.mla else "sliding window" if any(model.layer_windows) else None
    heads = model.num_attention_heads
    if own is None:
        own = "MHA" if model.num_key_value_heads == heads else "MQA" if model.num_key_value_heads == 1 else "GQA"
    full = (None,) * model.num_layers
    windows = tuple(None if layer % _FULL_EVERY == _FULL_EVERY - 1 else _WINDOW for layer in range(model.num_layers))
    grouped = model.num_key_value_heads if 1 < model.num_key_value_heads < heads else max(1, heads // 4)
    plain = replace(model, mla=None, layer_windows=full)
    found = {
        f"MHA, {heads} KV heads": replace(plain, num_key_value_heads=heads),
        f"GQA, {grouped} KV heads": replace(plain, num_key_value_heads=grouped),
        "MQA, 1 KV head": replace(plain, num_key_value_heads=1),
        f"MLA, latent of {_LATENT.latent_dim}": replace(plain, mla=_LATENT),
        f"sliding window of {_WINDOW:,}, 1 layer in {_FULL_EVERY} full": replace(
            plain, layer_windows=windows, num_key_value_heads=grouped
        ),
    }
    return {f"{name} (this model)" if name.startswith(own) else name: spec for name, spec in found.items()} | {
        f"{name} (this model)": model for name in found if name.startswith(own)
    }


@lru_cache(_KEPT)
def attention_lines(engine: Engine, longest: int) -> tuple[Line, ...]:
    """Sequences that fit by context length, one curve per kind of attention."""
    lengths = lengths_up_to(longest)
    return tuple(
        Line(name, _concurrencies(replace(engine, model=spec), lengths))
        for name, spec in attention_variants(engine.model).items()
    )


@lru_cache(_KEPT)
def speed_lines(engine: Engine, dtypes: tuple[str, ...], longest: int) -> tuple[Line, ...]:
    """Output tokens/s of one replica by context length: of one request alone, and of as many as fit.

    Raises:
        UserError: as `Deployment.step_time`.
    """
    lines = []
    for dtype in dtypes:
        of_dtype = replace(engine, kv_cache_dtype=dtype)
        step_time = replace(of_dtype, max_model_len=longest).deployment().step_time()
        alone, full = [], []
        told_alone, told_full = [], []
        for length in lengths_up_to(longest):
            report = memory_of(replace(of_dtype, max_model_len=length))
            batch = min(int(report.max_concurrency_decoding), engine.max_num_seqs)
            if not batch:
                continue
            for size, points, told in ((1, alone, told_alone), (batch, full, told_full)):
                shape = StepShape(decode_contexts=[length] * size)
                points.append((length, size / step_time.predict(shape)))
                told.append(step_time.evidence_of(shape))
        lines.append(Line(f"{dtype}, one request", tuple(alone), tuple(told_alone)))
        lines.append(Line(f"{dtype}, as many as fit", tuple(full), tuple(told_full)))
    return tuple(lines)


# ---- which GPUs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """One replica that was looked at for so many sequences of a length.

    Attributes:
        report: its memory. usd_per_hour: None where no price is known.
    """

    gpu: GpuSpec
    tensor_parallel_size: int
    kv_cache_dtype: str
    usd_per_hour: float | None
    report: MemoryReport


@lru_cache(_KEPT)
def fits_on(
    engine: Engine, gpus: tuple[GpuSpec, ...], concurrency: int, prices: PriceList, dtypes: tuple[str, ...]
) -> tuple[Fit, ...]:
    """Every GPU type, tensor-parallel size and KV format; those that hold it first, by price."""
    found = []
    for gpu in gpus:
        price = prices.price(gpu)
        for size in SIZES:
            for dtype in dtypes:
                one = replace(engine, gpu=gpu, tensor_parallel_size=size, kv_cache_dtype=dtype)
                try:
                    report = memory_of(one, concurrency)
                except UserError:
                    continue
                cost = price.usd_per_gpu_hour * size if price else None
                found.append(Fit(gpu, size, dtype, cost, report))

    def key(fit: Fit) -> tuple:
        cost = fit.usd_per_hour
        return (
            not fit.report.fits,
            cost is None,
            cost or 0.0,
            fit.tensor_parallel_size,
            -KVCacheDtype(fit.kv_cache_dtype).bits,
        )

    return tuple(sorted(found, key=key))


# ---- roofline ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A measured step on the roofline.

    Attributes:
        kind: "decode" or "prefill". name: what was computed.
        intensity: FLOP per byte. flops_per_s: reached. is_kernel_only: times of the GPU, not of the host.
    """

    kind: str
    name: str
    intensity: float
    flops_per_s: float


@dataclass(frozen=True)
class Roofline:
    """What was measured, under what the GPU can do.

    Attributes:
        limits: measured copy bandwidth and matrix rate; None without a profile. source: where they come from.
    """

    gpu: GpuSpec
    limits: Limits | None
    source: str
    points: tuple[Measured, ...]


@lru_cache(_KEPT)
def roofline_of(engine: Engine) -> Roofline:
    """The GPU's roof, and the measured steps of the nearest profile if it is of this GPU."""
    match = profiles.nearest(engine.profiles, engine.model, engine.gpu, KVCacheDtype.parse(engine.kv_cache_dtype))
    if match is None or "gpu" in match.changes:
        return Roofline(engine.gpu, None, "no profile was measured on this GPU", ())
    tables = match.profile.tables
    name = match.kv_cache_dtype.value
    shape = ModelShape.from_config(tables.config, tables.quantization, name, tables.engine.block_size)
    points = []
    for kind in ("decode", "prefill"):
        for point in getattr(tables.kv[name], kind):
            step = point_shape(point)
            flops, moved = work_of(step, shape)
            seconds = point.gpu_s or point.step_s
            points.append(Measured(kind, _step_name(step), flops / moved, flops / seconds))
    return Roofline(engine.gpu, tables.limits, match.profile.origin(name), tuple(points))


def work_of(step: StepShape, shape: ModelShape) -> tuple[float, float]:
    """FLOPs of a step, and bytes that it has to move: the weights once, and every cached key and value once."""
    products = shape.products
    tokens = len(step.decode_contexts) + sum(query for query, _ in step.prefills)
    sampled = len(step.decode_contexts) + len(step.prefills)
    flops = products.layer_flops * tokens + products.head_flops * sampled
    flops += products.expert_flops * products.expert_share * tokens
    moved = products.layer_bytes + products.head_bytes
    moved += products.expert_bytes * (1.0 - (1.0 - products.expert_share) ** tokens)
    keys = shape.decode_keys(step.decode_contexts) if step.decode_contexts else 0
    pairs = keys + sum(shape.prompt_pairs(query, context) for query, context in step.prefills)
    moved += shape.kv_bytes * (keys + shape.num_layers * sum(query + context for query, context in step.prefills))
    return flops + shape.pair_flops * pairs, moved


def _step_name(step: StepShape) -> str:
    if step.prefills:
        query, context = step.prefills[0]
        return f"prompt chunk of {query:,} tokens after {context:,}"
    contexts = step.decode_contexts
    return f"{len(contexts):,} decodes at {sum(contexts) / len(contexts):,.0f} tokens of context"
