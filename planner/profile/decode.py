"""Steps of decodes only: from measured (batch, contexts) to any batch and contexts.

    step = base[graph size] + row_s · batch + key_s · keys + ragged_s · (longest - mean keys)
           + residual(batch, mean context) + offset(batch)

`keys` counts the keys that the batch attends to over all layers, so that sliding windows are in it. base is a line
between the measured graph sizes. Batches that were measured at several contexts have a residual that makes them exact:
linear in the mean context, so that the time of a batch is piecewise linear in its keys, and between such batches linear
in log(batch). Batches measured at one context have an offset instead. Beyond the longest measured context the time per
key is held. row_s and ragged_s are there only if they lower the leave-one-out error. Of a batch that has points of
equal contexts those are exact, and its ragged ones only tell ragged_s.
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

# A batch measured over a smaller range of contexts does not tell how its residual goes on.
_TELLING_RANGE = 2.0


@dataclass(frozen=True)
class ResidualRow:
    """What a batch takes beyond the smooth form.

    Attributes:
        contexts, seconds: mean keys per request and layer, ascending, and the residual there.
        slope_s: of the residual, beyond the last.
    """

    batch: int
    contexts: tuple[float, ...]
    seconds: tuple[float, ...]
    slope_s: float

    def at(self, context: float) -> float:
        if context > self.contexts[-1]:
            return self.seconds[-1] + self.slope_s * (context - self.contexts[-1])
        return float(np.interp(context, self.contexts, self.seconds))


@dataclass(frozen=True)
class DecodeFit:
    """What was fitted. Times in seconds.

    Attributes:
        sizes, base_s: graph sizes and the time of a step without keys, ascending.
        row_s, key_s, ragged_s: per decoding request, per key of one layer, and per key of one full layer that the
            longest request has more than the mean.
        residuals: of batches measured at several contexts, ascending.
        offsets: by graph size: measured batches, ascending, and their constant beyond the rest.
        graph_sizes: what batches are padded to.
        num_layers, full_layers: of the model: all, and those without a window.
        max_batch, max_keys, max_context: the largest measured: requests, keys over all layers, mean keys of a layer.
        dropped: coefficients that were tried and did not win.
    """

    sizes: tuple[int, ...]
    base_s: tuple[float, ...]
    row_s: float
    key_s: float
    ragged_s: float
    residuals: tuple[ResidualRow, ...]
    offsets: dict[int, tuple[tuple[int, ...], tuple[float, ...]]]
    graph_sizes: tuple[int, ...]
    num_layers: int
    full_layers: int
    max_batch: int
    max_keys: int
    max_context: float
    dropped: tuple[str, ...] = ()

    def seconds(self, batch: int, keys: float, excess: int = 0) -> float:
        """Time of a step of `batch` decodes.

        Args:
            keys: that they attend to, over all layers.
            excess: batch · longest context - sum of the contexts; 0 if all are equal.
        """
        return self.base(batch) + self.attention_s(batch, keys) + self.ragged(batch) * excess

    def base(self, batch: int) -> float:
        """The part that does not depend on the keys."""
        size = padded(batch, self.graph_sizes)
        batches, offsets = self.offsets.get(size, ((batch,), (0.0,)))
        return self._base(size) + self.row_s * batch + float(np.interp(batch, batches, offsets))

    def attention_s(self, batch: int, keys: float) -> float:
        """The part that does."""
        return self.key_s * keys + self._residual(batch, keys / (batch * self.num_layers))

    def ragged(self, batch: int) -> float:
        """Seconds per token of excess."""
        return self.ragged_s * self.full_layers / batch

    def nodes(self, batch: int) -> list[int]:
        """Keys between which the time of this batch is linear."""
        low, high, _ = self._neighbours(batch)
        contexts = {*self.residuals[low].contexts, *self.residuals[high].contexts} if self.residuals else set()
        return sorted({round(context * batch * self.num_layers) for context in contexts})

    def slope(self, batch: int) -> float:
        """Seconds per key beyond the last node."""
        if not self.residuals:
            return self.key_s
        low, high, weight = self._neighbours(batch)
        slope = (1 - weight) * self.residuals[low].slope_s + weight * self.residuals[high].slope_s
        return self.key_s + slope / (batch * self.num_layers)

    def key_limit(self, batch: int) -> int:
        """Keys up to which a batch is inside what was measured; -1 for a batch that never is."""
        if batch > self.max_batch:
            return -1
        return min(self.max_keys, math.floor(self.max_context * batch * self.num_layers))

    def _base(self, size: int) -> float:
        sizes, base = self.sizes, self.base_s
        if size <= sizes[-1]:
            return float(np.interp(size, sizes, base))
        if len(sizes) == 1:
            return base[0]
        slope = (base[-1] - base[-2]) / (sizes[-1] - sizes[-2])
        return base[-1] + max(0.0, slope) * (size - sizes[-1])

    def _neighbours(self, batch: int) -> tuple[int, int, float]:
        """Indices of the residual rows around a batch, and the weight of the upper."""
        rows = self.residuals
        high = bisect_left(rows, batch, key=lambda row: row.batch)
        if high == len(rows):
            return high - 1, high - 1, 0.0
        if high == 0 or rows[high].batch == batch:
            return high, high, 0.0
        low = high - 1
        return low, high, math.log(batch / rows[low].batch) / math.log(rows[high].batch / rows[low].batch)

    def _residual(self, batch: int, context: float) -> float:
        if not self.residuals:
            return 0.0
        low, high, weight = self._neighbours(batch)
        below = self.residuals[low].at(context)
        return below if low == high else (1 - weight) * below + weight * self.residuals[high].at(context)


def excess_of(contexts: Sequence[int]) -> int:
    """What `DecodeFit.seconds` calls the excess; one more token each leaves it as it is."""
    return len(contexts) * max(contexts) - sum(contexts)


def fit_decode(points: Sequence[Point], shape: ModelShape, engine: EngineSettings) -> DecodeFit:
    """Fit the decode table; at least one point."""
    rows = _Rows.of(points, shape, engine)
    chosen = choose(rows.columns(), rows.optional(), rows.seconds, 1 / rows.seconds)
    kept = [name for name in rows.optional() if name not in chosen.dropped]
    return rows.fit(kept, chosen.dropped)


def decode_errors(points: Sequence[Point], whole: DecodeFit, shape: ModelShape, engine: EngineSettings):
    """Relative errors of every point by the fit to all of them, and by the fit to all others."""
    rows = _Rows.of(points, shape, engine)
    kept = [name for name in rows.optional() if name not in whole.dropped]
    inside, outside = [], []
    for i, point in enumerate(points):
        at = int(rows.batch[i]), float(rows.keys[i]), int(rows.excess[i])
        inside.append(whole.seconds(*at) / point.step_s - 1)
        if len(points) > 1:
            outside.append(rows.without(i).fit(kept).seconds(*at) / point.step_s - 1)
    return inside, outside


@dataclass(frozen=True)
class _Rows:
    """The points as arrays."""

    batch: np.ndarray
    keys: np.ndarray
    excess: np.ndarray
    size: np.ndarray
    seconds: np.ndarray
    num_layers: int
    full_layers: int
    graph_sizes: tuple[int, ...]

    @classmethod
    def of(cls, points: Sequence[Point], shape: ModelShape, engine: EngineSettings) -> _Rows:
        contexts = [expand(point.decodes) for point in points]
        return cls(
            batch=np.array([len(each) for each in contexts]),
            keys=np.array([shape.decode_keys(each) for each in contexts]),
            excess=np.array([excess_of(each) for each in contexts]),
            size=np.array([padded(len(each), engine.graph_sizes) for each in contexts]),
            seconds=np.array([point.step_s for point in points]),
            num_layers=shape.num_layers,
            full_layers=sum(count for window, count in shape.layers if window is None),
            graph_sizes=engine.graph_sizes,
        )

    def without(self, index: int) -> _Rows:
        kept = np.arange(len(self.batch)) != index
        names = ("batch", "keys", "excess", "size", "seconds")
        return replace(self, **{name: getattr(self, name)[kept] for name in names})

    def columns(self) -> dict[str, np.ndarray]:
        columns = {f"base {size}": (self.size == size).astype(float) for size in sorted(set(self.size.tolist()))}
        return columns | {"key": self.keys.astype(float)}

    def optional(self) -> dict[str, np.ndarray]:
        columns = {}
        # One graph that ran different batches tells rows from graphs.
        if any(len(set(self.batch[self.size == size].tolist())) > 1 for size in set(self.size.tolist())):
            columns["row"] = self.batch.astype(float)
        if self.excess.any():
            columns["ragged"] = self.excess * self.full_layers / self.batch
        return columns

    def fit(self, kept: Sequence[str], dropped: tuple[str, ...] = ()) -> DecodeFit:
        optional = self.optional()
        columns = self.columns() | {name: optional[name] for name in kept if name in optional}
        solved = solve(list(columns.values()), self.seconds, 1 / self.seconds)
        values = dict(zip(columns, map(float, solved), strict=True))
        sizes = sorted(set(self.size.tolist()))
        fitted = DecodeFit(
            sizes=tuple(sizes),
            base_s=tuple(values[f"base {size}"] for size in sizes),
            row_s=values.get("row", 0.0),
            key_s=values["key"],
            ragged_s=values.get("ragged", 0.0),
            residuals=(),
            offsets={},
            graph_sizes=self.graph_sizes,
            num_layers=self.num_layers,
            full_layers=self.full_layers,
            max_batch=int(self.batch.max()),
            max_keys=int(self.keys.max()),
            max_context=float((self.keys / (self.batch * self.num_layers)).max()),
            dropped=dropped,
        )
        return self._with_offsets(self._with_residuals(fitted))

    def _beyond(self, fitted: DecodeFit) -> dict[int, dict[float, float]]:
        """By batch and mean context: what its exact points take beyond the fit."""
        found: dict[int, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
        uniform = {batch for batch, excess in zip(self.batch.tolist(), self.excess.tolist(), strict=True) if not excess}
        for batch, keys, excess, seconds in zip(
            self.batch.tolist(), self.keys.tolist(), self.excess.tolist(), self.seconds.tolist(), strict=True
        ):
            if not excess or batch not in uniform:
                context = keys / (batch * self.num_layers)
                found[batch][context].append(seconds - fitted.seconds(batch, keys, excess))
        # Two measurements of the same: their mean.
        return {b: {c: sum(v) / len(v) for c, v in sorted(found[b].items())} for b in sorted(found)}

    def _with_residuals(self, fitted: DecodeFit) -> DecodeFit:
        rows = []
        for batch, line in self._beyond(fitted).items():
            if len(line) > 1:
                contexts, seconds = tuple(line), tuple(line.values())
                slope = 0.0
                if contexts[-1] >= _TELLING_RANGE * contexts[0]:
                    slope = float(np.polyfit(contexts, seconds, 1)[0])
                # A key more never makes a step shorter.
                slope = max(slope, -fitted.key_s * batch * self.num_layers)
                rows.append(ResidualRow(batch, contexts, seconds, slope))
        return replace(fitted, residuals=tuple(rows))

    def _with_offsets(self, fitted: DecodeFit) -> DecodeFit:
        """What is left of batches without a residual of their own: of a graph's largest batch it goes to the graph."""
        left = {batch: float(np.mean(list(line.values()))) for batch, line in self._beyond(fitted).items()}
        base, offsets = list(fitted.base_s), {}
        for i, size in enumerate(fitted.sizes):
            batches = sorted({int(b) for b in self.batch[self.size == size] if int(b) in left})
            if batches:
                base[i] += left[batches[-1]]
                offsets[size] = (tuple(batches), tuple(left[b] - left[batches[-1]] for b in batches))
        return replace(fitted, base_s=tuple(base), offsets=offsets)
