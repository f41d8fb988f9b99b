"""How all figures look: colours that colour-blind people tell apart, dashes and markers that say the same again."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go

#: Okabe and Ito, "Color universal design" (2008), in the order of contrast on white and on black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star")
PATTERNS = ("", "/", "x", ".", "-", "+")
NEUTRAL = "#7F7F7F"
GOOD_REGION = "rgba(0, 158, 115, 0.12)"
HEIGHT = 380
_WRAP = 60
_LOG_TICKS = [digit * 10**power for power in range(-2, 8) for digit in (1, 2, 5)]


@dataclass(frozen=True)
class Chart:
    """A figure, and the same for those who do not see it.

    Attributes:
        figure: for Plotly.
        summary: what it shows, in a sentence or two.
        table: its data, one row each.
    """

    figure: go.Figure
    summary: str
    table: Sequence[Mapping[str, Any]] = field(default_factory=tuple)


def series(number: int) -> dict[str, Any]:
    """Line and marker of the n-th series: colour, dash and symbol all differ."""
    colour = COLOURS[number % len(COLOURS)]
    return {
        "line": {"color": colour, "dash": DASHES[number % len(DASHES)], "width": 2},
        "marker": {"color": colour, "symbol": MARKERS[number % len(MARKERS)], "size": 8},
    }


def bar(number: int) -> dict[str, Any]:
    """Fill of the n-th kind of bar: colour and pattern."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "pattern": {
            "shape": PATTERNS[number % len(PATTERNS)],
            "fillmode": "overlay",
            "fgcolor": "white",
            "fgopacity": 0.6,
            "size": 9,
            "solidity": 0.2,
        },
    }


def hover(*lines: str, definition: str = "") -> str:
    """A hover template: what the point is, and what its metric means."""
    wrapped = textwrap.wrap(definition, _WRAP)
    told = [*lines, *(f"<i>{line}</i>" for line in wrapped)]
    return "<br>".join(told) + "<extra></extra>"


def figure(x: str, y: str, height: int = HEIGHT, **layout: Any) -> go.Figure:
    """An empty figure with named axes; the names end in the unit."""
    empty = go.Figure()
    empty.update_layout(
        height=height,
        margin={"l": 10, "r": 10, "t": 30, "b": 10},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
        hoverlabel={"align": "left"},
        uirevision="keep",
        **layout,
    )
    empty.update_xaxes(title_text=x, automargin=True)
    empty.update_yaxes(title_text=y, automargin=True)
    return empty


def limit_line(target: go.Figure, value: float, text: str, axis: str = "y", is_log: bool = False) -> None:
    """A dashed line where an SLO ends, with its name on it."""
    line = {"color": NEUTRAL, "dash": "dash", "width": 2}
    # Annotations of logarithmic axes are placed by the logarithm, lines are not.
    place = math.log10(value) if is_log else value
    label = {"text": text, "showarrow": False}
    if axis == "y":
        target.add_hline(y=value, line=line)
        target.add_annotation(x=0, xref="x domain", xanchor="left", y=place, yanchor="bottom", **label)
    else:
        target.add_vline(x=value, line=line)
        target.add_annotation(y=1, yref="y domain", yanchor="top", x=place, xanchor="left", **label)


def logarithmic(axis: str, target: go.Figure) -> None:
    """A logarithmic "x" or "y" axis with ticks at 1, 2, 5, 10, …"""
    update = target.update_xaxes if axis == "x" else target.update_yaxes
    update(type="log", tickvals=_LOG_TICKS, ticktext=[f"{tick:,g}" for tick in _LOG_TICKS])
