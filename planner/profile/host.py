"""The host's part: CPU time of a step by its kind, and what a step takes longer when nothing is in flight.

Kinds: "decode" (replays a graph), "pieces" (prompt chunks, graphs between attentions), "eager" (launched one by one).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from statistics import median
from typing import Any

import numpy as np

from engine.scheduling import StepShape
from planner.profile.regression import choose, grow, table_errors
from planner.profile.tables import EngineSettings, KVTables, Point, padded, point_shape

# When the last kernel of a step is launched, as a share of what the CPU does for it; the rest is to look at its tokens.
LAUNCHED = 0.93
KINDS = ("decode", "pieces", "eager")


@dataclass(frozen=True)
class HostCost:
    """Seconds of CPU time for a step.

    Attributes:
        step_s: whatever it has.
        mixed_s: where requests decode beside prompt chunks: another kernel or two per layer.
        context_s: where a prompt chunk has a context: its pages may have to be copied in every layer.
        row_s, chunk_s, admitted_s, token_s: per decoding request, prompt chunk, admitted request and token.
    """

    step_s: float
    mixed_s: float = 0.0
    context_s: float = 0.0
    row_s: float = 0.0
    chunk_s: float = 0.0
    admitted_s: float = 0.0
    token_s: float = 0.0

    def scaled(self, factor: float) -> HostCost:
        """On a CPU that takes so many times as long for everything."""
        return HostCost(*(factor * seconds for seconds in astuple(self)))

    def seconds(self, step: StepShape) -> float:
        """Of a step of the kind that this is of."""
        rows, prefills = len(step.decode_contexts) + len(step.verifies), step.prefills
        seconds = self.step_s + self.row_s * rows
        if prefills:
            num_new = sum([context == 0 for _, context in prefills])
            seconds += self.chunk_s * len(prefills) + self.admitted_s * num_new + self.token_s * step.num_tokens
            if rows:
                seconds += self.mixed_s
            if num_new < len(prefills):
                seconds += self.context_s
        return seconds


@dataclass(frozen=True)
class HostFit:
    """What was fitted.

    Attributes:
        costs: by kind; empty where the profile says nothing of the host.
        sizes, latency_s: padded tokens of a prompt step, and its time with nothing in flight beyond its step time.
        row_latency_s: of that, per request that decodes in it.
        piece_sizes: which tell the kinds apart.
        is_pipelined: whether two steps were in flight; otherwise all of this is empty, as step times have it in them.
    """

    costs: dict[str, HostCost]
    sizes: tuple[int, ...]
    latency_s: tuple[float, ...]
    row_latency_s: float
    piece_sizes: tuple[int, ...]
    errors: dict[str, Any]
    is_pipelined: bool = False

    def kind(self, step: StepShape) -> str:
        if not step.prefills:
            return "decode"
        return "pieces" if self.piece_sizes and step.num_tokens <= self.piece_sizes[-1] else "eager"

    def seconds(self, step: StepShape) -> float:
        """CPU time of schedule, launch and update."""
        cost = self.costs.get(self.kind(step))
        return cost.seconds(step) if cost else 0.0

    def added_latency_s(self, step: StepShape) -> float:
        """From schedule to tokens with nothing in flight, less the step time; of a step with prompt chunks."""
        if not self.sizes:
            return 0.0
        size, sizes, latency = padded(step.num_tokens, self.piece_sizes), self.sizes, self.latency_s
        i = bisect_left(sizes, size)
        if i == len(sizes):
            alone = latency[-1]
        elif i == 0 or sizes[i] == size:
            alone = latency[i]
        else:
            share = (size - sizes[i - 1]) / (sizes[i] - sizes[i - 1])
            alone = latency[i - 1] + share * (latency[i] - latency[i - 1])
        return alone + self.row_latency_s * len(step.decode_contexts)


def fit_host(tables: KVTables, engine: EngineSettings) -> HostFit:
    """Fit what the points say of the host; nothing where they do not, or where steps are not pipelined."""
    empty = HostFit({}, (), (), 0.0, engine.piece_sizes, {})
    on_gpu = any(point.gpu_s is not None for point in tables.decode)
    if not (engine.async_scheduling and on_gpu):
        return empty
    by_kind: dict[str, list[Point]] = defaultdict(list)
    for point in (*tables.decode, *tables.prefill, *tables.mixed):
        if point.host_s is not None:
            by_kind[empty.kind(point_shape(point))].append(point)
    costs, errors = {}, {}
    for kind, points in by_kind.items():
        costs[kind], errors[f"host {kind}"] = _cost(points)
    # A kind that was not measured costs what the other kind of prompt step does.
    for kind, other in (("pieces", "eager"), ("eager", "pieces")):
        if kind not in costs and other in costs:
            costs[kind] = costs[other]
    sizes, latency_s = _latencies(tables.prefill, engine)
    row_s = _row_latency(HostFit({}, sizes, latency_s, 0.0, engine.piece_sizes, {}), tables.mixed)
    return HostFit(costs, sizes, latency_s, row_s, engine.piece_sizes, errors, is_pipelined=True)


def _cost(points: Sequence[Point]) -> tuple[HostCost, dict[str, Any]]:
    seconds = np.array([point.host_s for point in points])
    has_prompts = np.array([bool(point.prefills) for point in points])
    columns = {
        "mixed_s": has_prompts & np.array([point.batch > 0 for point in points]),
        "context_s": np.array([any(context for _, context in point.prefills) for point in points]),
        "row_s": np.array([point.batch for point in points]),
        "chunk_s": np.array([len(point.prefills) for point in points]),
        "admitted_s": np.array([sum(context == 0 for _, context in point.prefills) for point in points]),
        "token_s": has_prompts * np.array([point.num_tokens for point in points]),
    }
    # A column that is the same everywhere is the step itself.
    varied = {name: column.astype(float) for name, column in columns.items() if np.ptp(column.astype(float)) > 0}
    chosen = grow({"step_s": np.ones(len(points))}, varied, seconds, 1 / np.maximum(seconds, 1e-6))
    cost = HostCost(**{name: chosen.values.get(name, 0.0) for name in ("step_s", *columns)})
    inside = [cost.seconds(point_shape(point)) / max(point.host_s, 1e-6) - 1 for point in points]
    dropped = [name.removesuffix("_s") for name in chosen.dropped]
    return cost, table_errors(inside, [], dropped) | {"leave_one_out_mean": chosen.score}


def _latencies(prefill: Sequence[Point], engine: EngineSettings) -> tuple[tuple[int, ...], tuple[float, ...]]:
    added: dict[int, list[float]] = defaultdict(list)
    for point in prefill:
        if point.alone_s is not None:
            added[padded(point.num_tokens, engine.piece_sizes)].append(max(0.0, _until_begun_s(point)))
    sizes = tuple(sorted(added))
    return sizes, tuple(median(added[size]) for size in sizes)


def _until_begun_s(point: Point) -> float:
    """From schedule to the begin on the GPU with nothing in flight. There a step takes what it takes among its like;
    where that waits for the CPU, so does this, and periods have more in them than either."""
    return point.alone_s - (point.gpu_s if point.is_host_bound else point.step_s)


def _row_latency(fit: HostFit, mixed: Sequence[Point]) -> float:
    known = [point for point in mixed if point.alone_s is not None and point.prefills]
    if len(known) < 3 or not fit.sizes:
        return 0.0
    beyond = np.array([_until_begun_s(point) - fit.added_latency_s(point_shape(point)) for point in known])
    rows = np.array([point.batch for point in known], float)
    return choose({}, {"row": rows}, beyond, 1 / np.array([point.alone_s for point in known])).values["row"]
