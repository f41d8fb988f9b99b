"""The parity report: predicted against measured, as one HTML page that needs nothing else.

Drawings are SVG written here rather than plotly's, whose library alone is several times what the repository takes as
one file. Axes are logarithmic; a point on the line is predicted exactly, one in the band to 5 %.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calibration.validate.errors import LATENCIES, STATISTICS
from calibration.validate.intervals import Interval
from calibration.validate.study import Level, Study
from calibration.validate.text import text

_BAND = 0.05
# Okabe and Ito's colours, told apart by the colour-blind; a level has a shape of its own as well.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8A7F00")
_TITLES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "e2el_ms": "E2EL"}
_SIZE, _LEFT, _BOTTOM, _EDGE = 340, 58, 44, 10
_SHAPES = ("circle", "square", "diamond", "triangle")
_MOST_POINTS = 2000  # of a level in one drawing


@dataclass(frozen=True)
class _Axis:
    """A logarithmic axis, the same for both directions."""

    low: float
    high: float

    @classmethod
    def around(cls, values: Sequence[float]) -> _Axis:
        positive = [value for value in values if value > 0 and math.isfinite(value)] or [1.0]
        return cls(min(positive) / 1.15, max(positive) * 1.15)

    def share(self, value: float) -> float:
        clipped = min(max(value, self.low), self.high)
        return math.log(clipped / self.low) / math.log(self.high / self.low)

    def x(self, value: float) -> float:
        return round(_LEFT + self.share(value) * (_SIZE - _LEFT - _EDGE), 1)

    def y(self, value: float) -> float:
        return round(_SIZE - _BOTTOM - self.share(value) * (_SIZE - _BOTTOM - _EDGE), 1)

    def ticks(self) -> list[float]:
        """1, 2 and 5 of each decade, or what is round within less than that."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        ticks = [m * 10.0**d for d in decades for m in (1, 2, 5) if self.low <= m * 10.0**d <= self.high]
        if len(ticks) >= 3:
            return ticks
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 2))
        first = math.ceil(self.low / step)
        count = math.floor(self.high / step) - first + 1
        stride = max(1, -(-count // 5))
        return [(first + i) * step for i in range(0, count, stride)]


def report(found: Study, title: str) -> str:
    """The page."""
    levels = found.levels
    names = [level.record.label for level in levels]
    drawings = "".join(
        f"<h2>{_TITLES[metric]}</h2><div class=row>{_requests(metric, levels)}{_percentiles(metric, found)}</div>"
        for metric in LATENCIES
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{html.escape(title)}</h1><p>Predicted against measured. The line is where both are equal, the band is "
        f"±{_BAND:.0%}. Left: every request of every run. Right: mean, p50, p90 and p99 over the requests of each run, "
        "with the interval of the prediction where there is one; names show on hovering.</p>"
        f"{_legend(names)}{drawings}<h2>Figures</h2><pre>{html.escape(text(found))}</pre></html>\n"
    )


_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}"
    ".row{display:flex;flex-wrap:wrap;gap:1em}svg{background:#fff}pre{font-size:12px;overflow-x:auto}"
    "text{font:11px system-ui,sans-serif;fill:#333}ul{list-style:none;padding:0}"
    "li{display:inline-block;margin-right:1.5em}"
)


def _legend(names: Sequence[str]) -> str:
    items = "".join(
        f'<li><svg width=14 height=14 viewBox="0 0 14 14">{_mark(index, 7, 7, 5, "")}</svg> {html.escape(name)}</li>'
        for index, name in enumerate(names)
    )
    return f"<ul>{items}</ul>"


def _requests(metric: str, levels: Sequence[Level]) -> str:
    of_levels = [_pairs(metric, level) for level in levels]
    axis = _Axis.around([float(value) for pairs in of_levels for value in pairs.ravel()])
    body = []
    for index, pairs in enumerate(of_levels):
        # One path of dots for all requests takes a tenth of what single circles take.
        dots = "".join(f"M{axis.x(m)} {axis.y(p)}h0" for m, p in pairs.tolist())
        body.append(
            f'<path d="{dots}" stroke="{_colour(index)}" stroke-width=3.4 stroke-linecap=round opacity=.45 fill=none>'
            f"<title>{html.escape(levels[index].record.label)}</title></path>"
        )
    return _frame(f"{_TITLES[metric]} of each request", axis, "".join(body))


def _pairs(metric: str, level: Level) -> np.ndarray:
    """float64 [n, 2]: measured and predicted milliseconds of the requests of all runs that have both."""
    name = metric.replace("_ms", "_s")
    rows = [
        np.stack([getattr(run.lives, name), getattr(simulated.lives, name)], axis=1)
        for run, simulated in zip(level.record.runs, level.simulated, strict=True)
    ]
    pairs = np.concatenate(rows) * 1e3
    pairs = pairs[np.isfinite(pairs).all(axis=1) & (pairs > 0).all(axis=1)]
    return pairs[:: max(1, -(-len(pairs) // _MOST_POINTS))]


def _percentiles(metric: str, found: Study) -> str:
    points: list[tuple[int, str, float, float, Interval | None]] = []
    for index, (level, intervals) in enumerate(zip(found.levels, found.intervals, strict=True)):
        for statistic in STATISTICS:
            one = level.comparison(f"{metric}.{statistic}")
            if one is not None:
                around = intervals.get(one.metric)
                pairs = zip(one.measured, one.predicted, strict=True)
                points += [(index, statistic, m, p, around) for m, p in pairs if m > 0 and p > 0]
    axis = _Axis.around([value for _, _, m, p, _ in points for value in (m, p)])
    body = []
    for index, statistic, measured, predicted, around in points:
        x, y = axis.x(measured), axis.y(predicted)
        if around is not None:
            body.append(f'<path d="M{x} {axis.y(around.low)}V{axis.y(around.high)}" stroke="{_colour(index)}"/>')
        label = found.levels[index].record.label
        error = predicted / measured - 1
        title = f"{label}: {statistic} {measured:.4g} ms measured, {predicted:.4g} predicted, {error:+.1%}"
        body.append(_mark(index, x, y, 4, title))
    return _frame(f"{_TITLES[metric]} mean, p50, p90, p99", axis, "".join(body))


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _mark(index: int, x: float, y: float, r: float, title: str) -> str:
    shape = _SHAPES[index % len(_SHAPES)]
    inner = f"<title>{html.escape(title)}</title>" if title else ""
    paint = f'fill="{_colour(index)}" fill-opacity=".75"'
    if shape == "circle":
        return f'<circle cx="{x}" cy="{y}" r="{r}" {paint}>{inner}</circle>'
    corners = {
        "square": ((-r, -r), (r, -r), (r, r), (-r, r)),
        "diamond": ((0, -r - 1), (r + 1, 0), (0, r + 1), (-r - 1, 0)),
        "triangle": ((0, -r - 1), (r + 1, r), (-r - 1, r)),
    }[shape]
    path = "L".join(f"{x + dx:.1f} {y + dy:.1f}" for dx, dy in corners)
    return f'<path d="M{path}Z" {paint}>{inner}</path>'


def _frame(title: str, axis: _Axis, body: str) -> str:
    right, bottom = _SIZE - _EDGE, _SIZE - _BOTTOM
    lines = []
    for tick in axis.ticks():
        x, y = axis.x(tick), axis.y(tick)
        lines.append(
            f'<path d="M{x} {bottom}V{_EDGE}M{_LEFT} {y}H{right}" stroke="#e4e4e4"/>'
            f'<text x="{x}" y="{bottom + 14}" text-anchor="middle">{tick:,.10g}</text>'
            f'<text x="{_LEFT - 5}" y="{y + 4}" text-anchor="end">{tick:,.10g}</text>'
        )
    low, high = axis.low, axis.high
    # On logarithmic axes ±5 % is a stripe of even width; what leaves the frame is cut off.
    above, below = 1 + _BAND, 1 - _BAND
    corners = [
        (low, low),
        (low, low * above),
        (high / above, high),
        (high, high),
        (high, high * below),
        (low / below, low),
    ]
    band = "L".join(f"{axis.x(x)} {axis.y(y)}" for x, y in corners)
    middle = (_LEFT + right) / 2
    return (
        f'<svg width="{_SIZE}" height="{_SIZE}" viewBox="0 0 {_SIZE} {_SIZE}" role="img" aria-label="{title}">'
        f'{"".join(lines)}<path d="M{band}Z" fill="#999" fill-opacity=".25"/>'
        f'<path d="M{axis.x(low)} {axis.y(low)}L{axis.x(high)} {axis.y(high)}" stroke="#555"/>{body}'
        f'<rect x="{_LEFT}" y="{_EDGE}" width="{right - _LEFT}" height="{bottom - _EDGE}" fill="none" stroke="#888"/>'
        f'<text x="{middle}" y="{_SIZE - 8}" text-anchor="middle">{title}: measured, ms</text>'
        f'<text transform="translate(12 {(bottom + _EDGE) / 2})rotate(-90)" text-anchor="middle">predicted, ms</text>'
        "</svg>"
    )
