"""Steps of decodes only: from measured (batch, contexts) to any batch and contexts.

    step = base[graph size] + row_s · batch + key_s · keys + residual(batch, mean context)

`keys` counts the keys that the batch attends to over all layers, so that sliding windows are in it. base is a line
between the measured graph sizes. The residual makes measured points exact; it is linear in the mean context, so that
the time of a batch is piecewise linear in its keys, and linear in log(batch) between measured batches. Beyond the
longest measured context the attention's time per key stays what it was there.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.profile.regression import choose, solve
from planner.profile.shape import ModelShape
from planner.profile.tables import EngineSettings, Point, expand, padded


@dataclass(frozen=True)
class DecodeFit:
    """What was fitted. Times in seconds.

    Attributes:
        sizes, base_s: graph sizes and the time of a step without keys, ascending.
        row_s, key_s: per decoding request, and per key of one layer.
        residuals: (batch, mean keys per request and layer, residual there), ascending by batch, then by context.
        graph_sizes: what batches are padded to.
        num_layers: of the model.
        max_batch, max_keys, max_context: the largest measured: requests, keys over all layers, mean keys of a layer.
        dropped: coefficients that were tried and did not win.
    """

    sizes: tuple[int, ...]
    base_s: tuple[float, ...]
    row_s: float
    key_s: float
    residuals: tuple[tuple[int, tuple[float, ...], tuple[float, ...]], ...]
    graph_sizes: tuple[int, ...]
    num_layers: int
    max_batch: int
    max_keys: int
    max_context: float
    dropped: tuple[str, ...] = ()

    def seconds(self, batch: int, keys: float) -> float:
        """Time of a step of `batch` decodes that attend to `keys` keys over all layers."""
        return self._base(padded(batch, self.graph_sizes)) + self.row_s * batch + self.attention_s(batch, keys)

    def attention_s(self, batch: int, keys: float) -> float:
        """Its part that depends on the keys, and the residual."""
        return self.key_s * keys + self._residual(batch, keys / (batch * self.num_layers))

    def nodes(self, batch: int) -> list[int]:
        """Keys between which the time of this batch is linear."""
        low, high, _ = self._neighbours(batch)
        contexts = {*self.residuals[low][1], *self.residuals[high][1]}
        return sorted({round(context * batch * self.num_layers) for context in contexts})

    def key_limit(self, batch: int) -> int:
        """Keys up to which a batch is inside what was measured; -1 for a batch that never is."""
        if batch > self.max_batch:
            return -1
        return min(self.max_keys, math.floor(self.max_context * batch * self.num_layers))

    def _base(self, size: int) -> float:
        sizes, base = self.sizes, self.base_s
        if size <= sizes[0]:
            return base[0]
        if size <= sizes[-1]:
            return float(np.interp(size, sizes, base))
        if len(sizes) == 1:
            return base[0]
        slope = (base[-1] - base[-2]) / (sizes[-1] - sizes[-2])
        return base[-1] + max(0.0, slope) * (size - sizes[-1])

    def _neighbours(self, batch: int) -> tuple[int, int, float]:
        """Indices of the measured batches around this one, and the weight of the upper."""
        rows = self.residuals
        high = bisect_left(rows, batch, key=lambda row: row[0])
        if high == len(rows):
            return high - 1, high - 1, 0.0
        if high == 0 or rows[high][0] == batch:
            return high, high, 0.0
        low = high - 1
        return low, high, math.log(batch / rows[low][0]) / math.log(rows[high][0] / rows[low][0])

    def _residual(self, batch: int, context: float) -> float:
        low, high, weight = self._neighbours(batch)
        below = self._residual_of(low, context)
        return below if low == high else (1 - weight) * below + weight * self._residual_of(high, context)

    def _residual_of(self, row: int, context: float) -> float:
        _, contexts, residuals = self.residuals[row]
        if context > contexts[-1]:
            return residuals[-1] * context / contexts[-1]
        return float(np.interp(context, contexts, residuals))


def fit_decode(points: Sequence[Point], shape: ModelShape, engine: EngineSettings) -> DecodeFit:
    """Fit the decode table; at least one point.

    Whether a row costs something beside its graph is decided by leaving out one point at a time.
    """
    rows = _Rows.of(points, shape, engine)
    optional = {"row": rows.batch} if rows.tells_rows_from_graphs else {}
    chosen = choose(rows.columns(), optional, rows.seconds, 1 / rows.seconds)
    return rows.fit(bool(chosen.values.get("row")), chosen.dropped)


def decode_errors(points: Sequence[Point], shape: ModelShape, engine: EngineSettings) -> tuple[list, list]:
    """Relative errors of every point by the fit to all of them, and by the fit to all others."""
    rows = _Rows.of(points, shape, engine)
    whole = fit_decode(points, shape, engine)
    has_rows = whole.row_s > 0
    inside, outside = [], []
    for i, point in enumerate(points):
        batch, keys = int(rows.batch[i]), float(rows.keys[i])
        inside.append(whole.seconds(batch, keys) / point.step_s - 1)
        if len(points) > 1:
            outside.append(rows.without(i).fit(has_rows).seconds(batch, keys) / point.step_s - 1)
    return inside, outside


@dataclass(frozen=True)
class _Rows:
    """The points as arrays."""

    batch: np.ndarray
    keys: np.ndarray
    size: np.ndarray
    seconds: np.ndarray
    num_layers: int
    graph_sizes: tuple[int, ...]

    @classmethod
    def of(cls, points: Sequence[Point], shape: ModelShape, engine: EngineSettings) -> _Rows:
        batch = np.array([point.batch for point in points])
        keys = np.array([shape.decode_keys(expand(point.decodes)) for point in points])
        sizes = engine.graph_sizes
        size = np.array([padded(point.batch, sizes) for point in points])
        seconds = np.array([point.step_s for point in points])
        return cls(batch, keys, size, seconds, shape.num_layers, sizes)

    def without(self, index: int) -> _Rows:
        kept = np.arange(len(self.batch)) != index
        return replace(
            self, batch=self.batch[kept], keys=self.keys[kept], size=self.size[kept], seconds=self.seconds[kept]
        )

    @property
    def tells_rows_from_graphs(self) -> bool:
        """Whether one graph ran different batches."""
        return any(len(set(self.batch[self.size == size])) > 1 for size in set(self.size))

    def columns(self) -> dict[str, np.ndarray]:
        columns = {f"base {size}": (self.size == size).astype(float) for size in sorted(set(self.size.tolist()))}
        return columns | {"key": self.keys.astype(float)}

    def fit(self, has_rows: bool, dropped: tuple[str, ...] = ()) -> DecodeFit:
        columns = self.columns() | ({"row": self.batch.astype(float)} if has_rows else {})
        solved = solve(list(columns.values()), self.seconds, 1 / self.seconds)
        values = dict(zip(columns, map(float, solved), strict=True))
        sizes = sorted(set(self.size.tolist()))
        contexts = self.keys / (self.batch * self.num_layers)
        fitted = DecodeFit(
            sizes=tuple(sizes),
            base_s=tuple(values[f"base {size}"] for size in sizes),
            row_s=values.get("row", 0.0),
            key_s=values["key"],
            residuals=(),
            graph_sizes=self.graph_sizes,
            num_layers=self.num_layers,
            max_batch=int(self.batch.max()),
            max_keys=int(self.keys.max()),
            max_context=float(contexts.max()),
            dropped=dropped,
        )
        return replace(fitted, residuals=self._residuals(fitted, contexts))

    def _residuals(self, fitted: DecodeFit, contexts: np.ndarray) -> tuple:
        found: dict[int, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
        for batch, size, keys, seconds, context in zip(
            self.batch.tolist(), self.size.tolist(), self.keys, self.seconds, contexts.tolist(), strict=True
        ):
            smooth = fitted._base(size) + fitted.row_s * batch + fitted.key_s * keys
            found[batch][context].append(float(seconds - smooth))
        rows = []
        for batch in sorted(found):
            at = sorted(found[batch])
            # Two measurements of the same keys: their mean.
            rows.append((batch, tuple(at), tuple(sum(found[batch][c]) / len(found[batch][c]) for c in at)))
        return tuple(rows)


