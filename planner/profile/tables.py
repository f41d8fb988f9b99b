"""The measured points of a profile, as plain dataclasses; the file's own words are in `planner.profile.schema`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from engine.scheduling import StepShape

VERSION = 1
KIND = "memwall-profile"
# The CPU's share of a period from which on it decides the period, and the GPU's up to which it does not.
_HOST_BOUND, _GPU_BOUND = 0.95, 0.95
# And from which on a stream of such steps may have waited for it.
_LATE = 0.8
# So many mixed points that were not host-bound do without the others.
_ENOUGH_MIXED = 5


@dataclass(frozen=True)
class Point:
    """One step shape, measured.

    Attributes:
        prefills: (query tokens, context tokens) of each prompt chunk; each samples one token.
        decodes: (context tokens, how many requests have it), in order.
        step_s: median period of such steps one after another, with as many in flight as the engine has.
        low_s, high_s: 10 % and 90 % quantile of the single periods; samples: how many there were; mean_s: their mean.
        gpu_s: median time on the GPU; None without one.
        ahead_s: the same of such steps that the CPU had launched before the GPU came to them; None if gpu_s is that.
        alone_s: median time from schedule to tokens on the host with nothing in flight; None if unknown.
        host_s: median CPU time of schedule, launch and update; None if unknown.
        graph_size: of the CUDA graph that was replayed.
    """

    prefills: tuple[tuple[int, int], ...]
    decodes: tuple[tuple[int, int], ...]
    step_s: float
    low_s: float
    high_s: float
    samples: int = 1
    mean_s: float | None = None
    gpu_s: float | None = None
    ahead_s: float | None = None
    alone_s: float | None = None
    host_s: float | None = None
    graph_size: int | None = None

    @property
    def batch(self) -> int:
        """Requests that decode."""
        return sum(count for _, count in self.decodes)

    @property
    def num_tokens(self) -> int:
        return self.batch + sum(query for query, _ in self.prefills)

    @property
    def is_host_bound(self) -> bool:
        """Whether such steps one after another came as fast as the CPU launched them, not as the GPU ran them: the CPU
        was busy all the time, or the GPU idle in between."""
        if not self.prefills or self.gpu_s is None or self.host_s is None:
            return False
        return self.host_s >= _HOST_BOUND * self.step_s or self.gpu_s <= _GPU_BOUND * self.step_s

    def to_json(self) -> dict[str, Any]:
        """As the profile has it."""
        row = asdict(self) | {"prefills": [list(p) for p in self.prefills], "decodes": [list(d) for d in self.decodes]}
        return {name: value for name, value in row.items() if value is not None or name not in ("mean_s", "ahead_s")}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Point:
        """The inverse of `to_json`; the row must be valid."""
        values = {name: row[name] for name in cls.__dataclass_fields__ if name in row}
        pairs = {name: tuple((int(a), int(b)) for a, b in row[name]) for name in ("prefills", "decodes")}
        return cls(**(values | pairs))


@dataclass(frozen=True)
class KVTables:
    """The points of one KV format.

    Attributes:
        decode: steps of decodes only. prefill: one prompt chunk alone. mixed: whole steps of other shapes.
        num_kv_blocks, kv_cache_bytes: of the engine's pool.
    """

    decode: tuple[Point, ...]
    prefill: tuple[Point, ...]
    mixed: tuple[Point, ...] = ()
    num_kv_blocks: int = 0
    kv_cache_bytes: int = 0

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> KVTables:
        """A KV section of a profile; it must be valid."""
        tables = {name: tuple(map(Point.from_json, record[name])) for name in ("decode", "prefill", "mixed")}
        return cls(**tables, num_kv_blocks=record["num_kv_blocks"], kv_cache_bytes=record["kv_cache_bytes"])

    def on_device(self, launched_ahead: Mapping[int, float] | None = None) -> KVTables:
        """With what steps with prompts take the GPU where they tell how fast the CPU was: as measured when it had been
        launched in time, or, where that is not known, without such points as far as enough others are left.

        A stream of short prompts waits for its launches; in a served load they are launched while the device decodes.
        What the CPU had to do beside decides how long they seem to take: 7 ms or 13 for the same 144 tokens. Of the
        chunks of one length two others are enough, as the attention to their contexts is linear.

        Args:
            launched_ahead: seconds that prompts of so many tokens took which the CPU had launched in time, behind
                others: taken for those of a stream that had to wait.
        """
        prefill = [_prompt_ahead(_ahead(point), launched_ahead or {}) for point in self.prefill]
        others = Counter(point.prefills[0][0] for point in prefill if not point.is_host_bound)
        prefill = [point for point in prefill if not point.is_host_bound or others[point.prefills[0][0]] < 2]
        all_mixed = tuple(map(_ahead, self.mixed))
        mixed = tuple(point for point in all_mixed if not point.is_host_bound)
        return replace(self, prefill=tuple(prefill), mixed=mixed if len(mixed) >= _ENOUGH_MIXED else all_mixed)


def _ahead(point: Point) -> Point:
    """As it is if the CPU is not late, where that was measured."""
    return point if point.ahead_s is None else _as_fast(point, point.ahead_s)


def _prompt_ahead(point: Point, launched_ahead: Mapping[int, float]) -> Point:
    """The same of a prompt without context, from others."""
    (tokens, context), *_ = point.prefills
    sizes = sorted(launched_ahead)
    is_late = point.host_s is not None and point.host_s >= _LATE * point.step_s
    if context or not is_late or not sizes or not sizes[0] <= tokens <= sizes[-1]:
        return point
    high = next(size for size in sizes if size >= tokens)
    low = max((size for size in sizes if size <= tokens), default=high)
    share = (tokens - low) / (high - low) if high > low else 0.0
    return _as_fast(point, launched_ahead[low] + share * (launched_ahead[high] - launched_ahead[low]))


def _as_fast(point: Point, seconds: float) -> Point:
    """The point with another time, if that is less."""
    if seconds >= point.step_s:
        return point
    factor = seconds / point.step_s
    spread = {"low_s": point.low_s * factor, "high_s": point.high_s * factor, "mean_s": None}
    return replace(point, step_s=seconds, gpu_s=seconds, ahead_s=None, host_s=None, **spread)


@dataclass(frozen=True)
class Limits:
    """What the device was measured to do: bytes copied and FLOPs of matrix products per second."""

    copy_bytes_per_s: float
    matmul_flops_per_s: float
    matmul_fp8_flops_per_s: float | None = None

    def flops_per_s(self, fp8: bool) -> float:
        return (self.matmul_fp8_flops_per_s if fp8 else None) or self.matmul_flops_per_s


@dataclass(frozen=True)
class EngineSettings:
    """What decides how the engine runs a step.

    Attributes:
        graph_sizes: padded batch sizes of the decode graphs, ascending; empty without graphs.
        piece_sizes: padded numbers of tokens of steps in pieces, ascending; larger steps are not padded.
        async_scheduling: the next step is launched while one runs.
    """

    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    max_model_len: int = 0
    block_size: int = 64
    gpu_memory_utilization: float = 0.92
    enable_chunked_prefill: bool = True
    enforce_eager: bool = False
    async_scheduling: bool = True
    graph_sizes: tuple[int, ...] = ()
    piece_sizes: tuple[int, ...] = ()

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> EngineSettings:
        """The engine section of a profile; it must be valid."""
        values = {name: record[name] for name in cls.__dataclass_fields__ if name in record}
        sizes = {name: tuple(sorted(values.get(name) or ())) for name in ("graph_sizes", "piece_sizes")}
        return cls(**(values | sizes))


@dataclass(frozen=True)
class ProfileTables:
    """A whole profile, without its provenance.

    Attributes:
        config: the model's config.json. quantization: None or "fp8", at load.
        kv: points by KV format. allreduce: (world size, bytes, seconds).
    """

    config: Mapping[str, Any]
    quantization: str | None
    limits: Limits
    engine: EngineSettings
    kv: Mapping[str, KVTables]
    allreduce: tuple[tuple[int, int, float], ...] = ()

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ProfileTables:
        """A profile as it is in the file; it must be valid."""
        limits = record["limits"]
        return cls(
            config=record["model"]["config"],
            quantization=record["quantization"],
            limits=Limits(**{name: limits.get(name) for name in Limits.__dataclass_fields__}),
            engine=EngineSettings.from_json(record["engine"]),
            kv={name: KVTables.from_json(section) for name, section in record["kv"].items()},
            allreduce=tuple((row["world_size"], row["bytes"], row["time_s"]) for row in record["allreduce"]),
        )


def expand(decodes: tuple[tuple[int, int], ...]) -> list[int]:
    """Contexts, one per request, of (context, count) runs."""
    return [context for context, count in decodes for _ in range(count)]


def point_shape(point: Point) -> StepShape:
    """The step that a point measured."""
    return StepShape(prefills=list(point.prefills), decode_contexts=expand(point.decodes))


def padded(size: int, sizes: tuple[int, ...]) -> int:
    """The smallest of `sizes` (ascending) that holds `size`; `size` itself if none does."""
    for each in sizes:
        if each >= size:
            return each
    return size
