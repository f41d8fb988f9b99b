"""Figures of a profile: measured points over the fitted curves, and predicted against measured."""

from __future__ import annotations

from dashboard.figures import theme
from dashboard.figures.theme import Chart
from dashboard.services.profiles import Curve, Parity
from dashboard.services.results import shown

_PERIOD = "median period of such steps, one after another, with as many in flight as the engine keeps"
_BANDS = (0.1, 0.2)


def curves(found: tuple[Curve, ...], kind: str) -> Chart:
    """Measured steps as points, the fit as lines: decode steps by context, prompt chunks by their length."""
    x = "context of each request, tokens" if kind == "decode" else "tokens of the chunk"
    chart = theme.figure(x, "step time, ms")
    rows = []
    for number, curve in enumerate(found):
        style = theme.series(number)
        chart.add_scatter(
            x=[at for at, _ in curve.fitted],
            y=[1e3 * seconds for _, seconds in curve.fitted],
            mode="lines",
            name=f"{curve.name}: fit",
            line=style["line"],
            hovertemplate=theme.hover(f"<b>{curve.name}</b>, fitted", "%{y:.3g} ms at %{x:,} tokens"),
        )
        chart.add_scatter(
            x=[point.at for point in curve.measured],
            y=[1e3 * point.seconds for point in curve.measured],
            mode="markers",
            name=f"{curve.name}: measured",
            marker=style["marker"],
            showlegend=False,
            error_y={
                "type": "data",
                "array": [1e3 * (point.high_s - point.seconds) for point in curve.measured],
                "arrayminus": [1e3 * (point.seconds - point.low_s) for point in curve.measured],
                "color": theme.NEUTRAL,
            },
            customdata=[point.samples for point in curve.measured],
            hovertemplate=theme.hover(
                f"<b>{curve.name}</b>, measured",
                "%{y:.3g} ms at %{x:,} tokens, %{customdata} samples",
                definition=_PERIOD,
            ),
        )
        rows += [
            {
                "curve": curve.name,
                x: f"{point.at:,}",
                "measured, ms": shown(1e3 * point.seconds, (1e3 * point.low_s, 1e3 * point.high_s)),
                "10 to 90 %, ms": f"{shown(1e3 * point.low_s)} to {shown(1e3 * point.high_s)}",
                "samples": point.samples,
            }
            for point in curve.measured
        ]
    chart.update_xaxes(type="log", dtick=1)
    theme.logarithmic("y", chart)
    summary = (
        f"{sum(len(curve.measured) for curve in found)} measured {kind} steps and the fit through them; whiskers reach "
        f"from the 10 % to the 90 % quantile of single steps."
    )
    return Chart(chart, summary, rows)


def parity(found: tuple[Parity, ...], what: str = "step time, ms") -> Chart:
    """Predicted against measured, with bands of 10 and 20 %."""
    chart = theme.figure(f"measured {what}", f"predicted {what}")
    values = [point.measured for group in found for point in group.points]
    values += [point.predicted for group in found for point in group.points]
    if not values:
        return Chart(chart, "Nothing was measured.")
    ends = [0.9 * min(values), 1.1 * max(values)]
    for share, dash in ((0.0, "solid"), *zip(_BANDS, ("dash", "dot"), strict=True)):
        for sign in (1, -1) if share else (1,):
            chart.add_scatter(
                x=ends,
                y=[end * (1 + sign * share) for end in ends],
                mode="lines",
                name=f"± {share:.0%}" if share else "equal",
                showlegend=sign == 1,
                line={"color": theme.NEUTRAL, "dash": dash, "width": 1},
                hoverinfo="skip",
            )
    rows, told = [], []
    for number, group in enumerate(found):
        chart.add_scatter(
            x=[point.measured for point in group.points],
            y=[point.predicted for point in group.points],
            mode="markers",
            name=group.name,
            marker={**theme.series(number)["marker"], "size": 7},
            customdata=[(point.name, f"{point.error:+.1%}") for point in group.points],
            hovertemplate=theme.hover(
                f"<b>{group.name}</b>: %{{customdata[0]}}",
                "measured %{x:.3g}, predicted %{y:.3g}",
                "error %{customdata[1]}",
                definition="(predicted − measured) / measured",
            ),
        )
        rows += [
            {
                "kind": group.name,
                "what": point.name,
                f"measured {what}": shown(point.measured),
                f"predicted {what}": shown(point.predicted),
                "error": f"{point.error:+.1%}",
            }
            for point in group.points
        ]
        told.append(f"{group.name}: {len(group.points)} points, median error {group.median_error:.1%}")
    theme.logarithmic("x", chart)
    theme.logarithmic("y", chart)
    return Chart(chart, f"Predicted against measured. {'; '.join(told)}.", rows)
