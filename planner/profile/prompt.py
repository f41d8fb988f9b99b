"""Steps with prompt chunks: from chunks measured alone to any mix of chunks and decodes.

    step = dense(tokens, padded) + Σ attention(query, context) + key_s · decode keys
           + chunk_s · (chunks - 1) + row_s · decodes + decodes_s · [there are decodes]

attention(query, context) is a time per (query, key) pair, its utilisation, which depends on the query length. It is
told from the dense work by how chunks of equal length grow with their context. Between measured query lengths the
utilisation is a power law, between contexts time is linear; beyond the grid utilisation is held. The coefficients of
the last line are fitted to whole mixed steps, each only if it lowers the leave-one-out error, and but for the rate of
the keys only by more than noise does.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from engine.scheduling import StepShape
from planner.profile.decode import DecodeFit
from planner.profile.regression import choose, left_out
from planner.profile.shape import ModelShape
from planner.profile.tables import EngineSettings, Limits, Point, padded, point_shape

# A chunk's attention, if nothing tells it from its dense work: the share of the matrix rate that is assumed.
_ATTENTION_EFFICIENCY = 0.5
# Beside prompts another kernel reads the keys of decodes, at a rate of its own; a few dozen whole steps hardly tell it
# from so much per row, or once per step, for their noise. Whatever else there is must win by as much as that.
_MUST_BEAT = 0.1
# Rows that matrix kernels compute at a time on a GPU: between multiples of it more tokens take no longer.
_TILE = 128


@dataclass(frozen=True)
class AttentionRow:
    """Chunks of one query length: contexts, pairs over all layers, and seconds; ascending. rate_s: per further pair."""

    query: int
    contexts: tuple[int, ...]
    pairs: tuple[int, ...]
    seconds: tuple[float, ...]
    rate_s: float

    @property
    def max_context(self) -> int:
        return self.contexts[-1]

    def seconds_at(self, pairs: float) -> float:
        """Linear in the pairs; a further pair takes rate_s."""
        if pairs >= self.pairs[-1]:
            return self.seconds[-1] + self.rate_s * (pairs - self.pairs[-1])
        if pairs <= self.pairs[0]:
            return self.seconds[0] * pairs / self.pairs[0]
        i = bisect_left(self.pairs, pairs)
        share = (pairs - self.pairs[i - 1]) / (self.pairs[i] - self.pairs[i - 1])
        return self.seconds[i - 1] + share * (self.seconds[i] - self.seconds[i - 1])


@dataclass(frozen=True)
class PromptFit:
    """What was fitted. Times in seconds.

    Attributes:
        sizes, dense_s: padded numbers of tokens, and the time of a step's dense work; ascending.
        attention: by query length, ascending.
        key_s: per key of a decoding request and layer, beside prompts.
        chunk_s, row_s, decodes_s: per prompt chunk beyond the first, per decode, and once where there are decodes.
        piece_sizes: what numbers of tokens are padded to.
        exact: measured mixed steps.
        shape, limits: for holding utilisation beyond the grid.
        max_batch, max_keys, max_chunks: the largest measured beside prompts.
    """

    sizes: tuple[int, ...]
    dense_s: tuple[float, ...]
    attention: tuple[AttentionRow, ...]
    key_s: float
    chunk_s: float
    row_s: float
    decodes_s: float
    piece_sizes: tuple[int, ...]
    exact: dict[tuple, float]
    shape: ModelShape
    limits: Limits
    max_batch: int
    max_keys: int
    max_chunks: int
    dropped: tuple[str, ...] = ()

    def seconds(self, step: StepShape) -> float:
        """Time of a step with prompt chunks."""
        if self.exact and (known := self.exact.get(shape_key(step))) is not None:
            return known
        contexts = step.decode_contexts
        return self.seconds_of(step.prefills, len(contexts), self.shape.decode_keys(contexts) if contexts else 0)

    def seconds_of(self, prefills: Sequence[tuple[int, int]], rows: int, keys: int) -> float:
        """The same of prompt chunks beside so many decodes, which attend to so many keys over all layers."""
        tokens = rows + sum(query for query, _ in prefills)
        seconds = self.dense(tokens) + self.chunk_s * max(0, len(prefills) - 1)
        for query, context in prefills:
            seconds += self.attention_s(query, context)
        return seconds + self.beside_s(rows, keys)

    def beside_s(self, rows: int, keys: int) -> float:
        """Of that, what decodes beside prompts add: their attention, which reads keys and computes little."""
        return self.decodes_s + self.row_s * rows + self.key_s * keys if rows else 0.0

    def dense(self, tokens: int) -> float:
        """The dense work of so many tokens."""
        size, sizes, seconds = padded(tokens, self.piece_sizes), self.sizes, self.dense_s
        if self.piece_sizes and size > self.piece_sizes[-1]:
            size = -(-size // _TILE) * _TILE
        if size >= sizes[-1]:
            return seconds[-1] * self._roof(size) / self._roof(sizes[-1])
        if size <= sizes[0]:
            return seconds[0]
        i = bisect_left(sizes, size)
        if sizes[i] == size:
            return seconds[i]
        low, high = i - 1, i
        largest = self.piece_sizes[-1] if self.piece_sizes else 0
        if sizes[low] <= largest < size and high + 1 < len(sizes):
            # Launched one by one, not in pieces: on the line of such steps, not between the two ways.
            slope = (seconds[high + 1] - seconds[high]) / (sizes[high + 1] - sizes[high])
            return max(seconds[low], seconds[high] - slope * (sizes[high] - size))
        share = (size - sizes[low]) / (sizes[high] - sizes[low])
        return seconds[low] + share * (seconds[high] - seconds[low])

    def attention_s(self, query: int, context: int) -> float:
        """The attention of one chunk."""
        rows = self.attention
        high = bisect_left(rows, query, key=lambda row: row.query)
        if high == len(rows):
            per_pair = self._at(rows[-1], context) / self._pairs(rows[-1], context)
            return per_pair * self.shape.prompt_pairs(query, context)
        if high == 0 or rows[high].query == query:
            # Fewer queries than measured read the same keys.
            return self._at(rows[high], context)
        low, high = rows[high - 1], rows[high]
        weight = math.log(query / low.query) / math.log(high.query / low.query)
        per_low = self._at(low, context) / self._pairs(low, context)
        per_high = self._at(high, context) / self._pairs(high, context)
        return per_low ** (1 - weight) * per_high**weight * self.shape.prompt_pairs(query, context)

    def is_inside(self, step: StepShape) -> bool:
        """Whether every part of a step lies between measured points."""
        if padded(step.num_tokens, self.piece_sizes) > self.sizes[-1] or len(step.prefills) > self.max_chunks:
            return False
        for query, context in step.prefills:
            high = min(bisect_left(self.attention, query, key=lambda row: row.query), len(self.attention) - 1)
            low = max(0, high - 1)
            reach = max(self.attention[low].max_context, self.attention[high].max_context)
            if query > self.attention[-1].query or context > reach:
                return False
        rows = step.decode_contexts
        return not rows or (len(rows) <= self.max_batch and self.shape.decode_keys(rows) <= self.max_keys)

    def _pairs(self, row: AttentionRow, context: int) -> int:
        return self.shape.prompt_pairs(row.query, context)

    def _at(self, row: AttentionRow, context: int) -> float:
        return row.seconds_at(self._pairs(row, context))

    def _roof(self, tokens: int) -> float:
        limits = self.limits
        return self.shape.products.seconds(tokens, 1, limits.copy_bytes_per_s, limits.flops_per_s(self.shape.fp8))


def shape_key(step: StepShape) -> tuple:
    """What makes two steps with prompt chunks the same; order within a step does not matter."""
    return (*sorted(step.prefills), -1, *sorted(step.decode_contexts))


def fit_prompt(
    prefill: Sequence[Point],
    mixed: Sequence[Point],
    decode: DecodeFit,
    shape: ModelShape,
    limits: Limits,
    engine: EngineSettings,
) -> PromptFit:
    """Fit the prefill table, at least one point, and what mixed steps add."""
    alone = fit_chunks(prefill, decode, shape, limits, engine)
    return fit_mixed(alone, mixed, decode)


def fit_chunks(
    prefill: Sequence[Point], decode: DecodeFit, shape: ModelShape, limits: Limits, engine: EngineSettings
) -> PromptFit:
    """Dense work and attention from single chunks."""
    by_query: dict[int, dict[int, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for point in prefill:
        query, context = point.prefills[0]
        by_query[query][shape.prompt_pairs(query, context)].append(point)
    queries = sorted(by_query)
    mean = {q: {pairs: _mean(points) for pairs, points in by_query[q].items()} for q in queries}
    rate = _pair_rates(mean, shape.pair_flops / limits.matmul_flops_per_s)
    dense: dict[int, list[float]] = defaultdict(list)
    for query in queries:
        first = min(mean[query])
        least = 0.1 * mean[query][first]
        size = padded(query, engine.piece_sizes)
        dense[size].append(max(least, mean[query][first] - rate[query] * first))
    sizes = sorted(dense)
    # More tokens may take less: libraries choose other kernels. The least of what is padded alike leaves every chunk a
    # positive attention.
    dense_s = [min(dense[size]) for size in sizes]
    at = dict(zip(sizes, dense_s, strict=True))
    attention = []
    for query in queries:
        pairs = sorted(mean[query])
        floor = shape.pair_flops / limits.matmul_flops_per_s * 1e-3
        seconds = [max(mean[query][p] - at[padded(query, engine.piece_sizes)], floor * p) for p in pairs]
        # Behind a window several contexts have the same pairs.
        contexts = [max(point.prefills[0][1] for point in by_query[query][p]) for p in pairs]
        attention.append(AttentionRow(query, tuple(contexts), tuple(pairs), tuple(seconds), rate[query]))
    return PromptFit(
        sizes=tuple(sizes),
        dense_s=tuple(dense_s),
        attention=tuple(attention),
        key_s=decode.key_s,
        chunk_s=0.0,
        row_s=0.0,
        decodes_s=0.0,
        piece_sizes=engine.piece_sizes,
        exact={},
        shape=shape,
        limits=limits,
        max_batch=0,
        max_keys=0,
        max_chunks=1,
    )


def _mean(points: Sequence[Point]) -> float:
    return sum(point.step_s for point in points) / len(points)


def _pair_rates(mean: dict[int, dict[int, float]], peak_s: float) -> dict[int, float]:
    """Seconds per pair by query length, from how time grows with the context.

    Where only one context was measured: a power law between the neighbours that have several.
    """
    known: dict[int, float] = {}
    for query, times in mean.items():
        if len(times) > 1:
            pairs, seconds = np.array(list(times), float), np.array(list(times.values()))
            weight = 1 / seconds
            weight /= weight.sum()
            x, y = pairs - (weight * pairs).sum(), seconds - (weight * seconds).sum()
            known[query] = max(float((weight * x * y).sum() / (weight * x * x).sum()), peak_s)
    if not known:
        return dict.fromkeys(mean, peak_s / _ATTENTION_EFFICIENCY)
    first = min(known)
    logs = np.log(sorted(known))
    values = np.log([known[query] for query in sorted(known)])

    def rate(query: int) -> float:
        if query < first:
            return known[first] * first / query  # fewer queries read the same keys
        return known.get(query, float(np.exp(np.interp(math.log(query), logs, values))))

    return {query: rate(query) for query in mean}


def fit_mixed(alone: PromptFit, mixed: Sequence[Point], decode: DecodeFit) -> PromptFit:
    """Add what whole mixed steps take beyond the sum of their parts."""
    if not mixed:
        return replace(alone, max_batch=decode.max_batch, max_keys=decode.max_keys, max_chunks=8)
    columns, target, weight = _mixed_columns(alone, mixed, decode)
    keys = columns.pop("key")
    # Keys of decodes either cost what they cost in decode steps, or what the mixed steps say.
    fixed = choose({}, columns, target - decode.key_s * keys, weight, robust=True)
    free = choose({"key": keys}, columns, target, weight, robust=True)
    has_own_rate = len(mixed) > 2 and free.score < 0.98 * fixed.score
    chosen = free if has_own_rate else fixed
    own_rate_alone = choose({"key": keys}, {}, target, weight, robust=True)
    if len(mixed) > 2 and own_rate_alone.score * (1 - _MUST_BEAT) <= chosen.score:
        has_own_rate, chosen = True, replace(own_rate_alone, dropped=tuple(columns))
    shapes = [point_shape(point) for point in mixed]
    return replace(
        alone,
        key_s=chosen.values["key"] if has_own_rate else decode.key_s,
        chunk_s=chosen.values.get("chunk", 0.0),
        row_s=chosen.values.get("row", 0.0),
        decodes_s=chosen.values.get("decodes", 0.0),
        exact={shape_key(step): point.step_s for step, point in zip(shapes, mixed, strict=True)},
        max_batch=max(decode.max_batch, *(point.batch for point in mixed)),
        max_keys=decode.max_keys,
        max_chunks=max(len(point.prefills) for point in mixed),
        dropped=chosen.dropped if has_own_rate else (*chosen.dropped, "key"),
    )


def _mixed_columns(
    alone: PromptFit, mixed: Sequence[Point], decode: DecodeFit
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    plain = replace(alone, exact={}, key_s=0.0, chunk_s=0.0, row_s=0.0, decodes_s=0.0)
    shapes = [point_shape(point) for point in mixed]
    rows = np.array([len(step.decode_contexts) for step in shapes], float)
    columns = {
        "key": np.array([plain.shape.decode_keys(step.decode_contexts) for step in shapes], float),
        "chunk": np.array([max(0, len(step.prefills) - 1) for step in shapes], float),
        "row": rows,
        "decodes": (rows > 0).astype(float),
    }
    seconds = np.array([point.step_s for point in mixed])
    return columns, seconds - np.array([plain.seconds(step) for step in shapes]), 1 / seconds


def prompt_errors(
    prefill: Sequence[Point], mixed: Sequence[Point], decode: DecodeFit, whole: PromptFit, engine: EngineSettings
) -> dict[str, tuple[list, list]]:
    """Relative errors, in sample and leaving out each point, of both tables."""

    def error(fit: PromptFit, point: Point) -> float:
        return fit.seconds(point_shape(point)) / point.step_s - 1

    inside, outside = [error(whole, point) for point in prefill], []
    for i, point in enumerate(prefill):
        others = [*prefill[:i], *prefill[i + 1 :]]
        if others:
            outside.append(error(fit_chunks(others, decode, whole.shape, whole.limits, engine), point))
    mixed_inside, mixed_outside = [error(whole, point) for point in mixed], []
    if len(mixed) > 1:
        columns, target, weight = _mixed_columns(whole, mixed, decode)
        names = [name for name, value in _coefficients(whole, decode).items() if value is None or value > 0]
        mixed_outside = _left_out_mixed(columns, target, weight, names, decode.key_s).tolist()
    return {"prefill": (inside, outside), "mixed": (mixed_inside, mixed_outside)}


def _coefficients(whole: PromptFit, decode: DecodeFit) -> dict[str, float | None]:
    key = None if whole.key_s != decode.key_s else 0.0
    return {"key": key, "chunk": whole.chunk_s, "row": whole.row_s, "decodes": whole.decodes_s}


def _left_out_mixed(columns, target: np.ndarray, weight: np.ndarray, names: list[str], key_s: float) -> np.ndarray:
    if "key" not in names:
        target = target - key_s * columns["key"]
    return left_out([columns[name] for name in names], target, weight, robust=True)
