"""Figures of configurations side by side: latencies, load against latency, the state over time, what matters most."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dashboard.figures import theme
from dashboard.figures.theme import Chart
from dashboard.services.results import TERMS, definition, metric_interval, shown, shown_range
from dashboard.services.work import Sweep, Tornado, TrialAnswer
from planner.simulation import SimulationResult

PERCENTILES = ("p50", "p90", "p95", "p99")
#: Field of a result, and its name.
METRICS = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "e2el_ms": "E2EL"}


def latencies(metric: str, answers: Sequence[TrialAnswer], names: Sequence[str], limit_ms: float | None) -> Chart:
    """Percentiles of one metric, a group of bars per percentile, with intervals and the SLO's limit."""
    label = METRICS[metric]
    chart = theme.figure("", f"{label}, ms", barmode="group")
    rows: list[dict[str, object]] = [{"percentile": at} for at in PERCENTILES]
    for number, (answer, name) in enumerate(zip(answers, names, strict=True)):
        found = getattr(answer.report.result, metric, None)
        if found is None:
            continue
        values = [getattr(found, at) for at in PERCENTILES]
        spans = [metric_interval(answer, metric, at) for at in PERCENTILES]
        up = [span[1] - value if span else 0.0 for value, span in zip(values, spans, strict=True)]
        down = [value - span[0] if span else 0.0 for value, span in zip(values, spans, strict=True)]
        chart.add_bar(
            x=list(PERCENTILES),
            y=values,
            name=name,
            marker=theme.bar(number),
            error_y={"type": "data", "array": up, "arrayminus": down, "color": theme.NEUTRAL},
            customdata=[shown_range(span) or "no interval yet" for span in spans],
            hovertemplate=theme.hover(
                f"<b>{name}</b>",
                f"{label} %{{x}}: %{{y:.4g}} ms (%{{customdata}})",
                definition=definition(metric),
            ),
        )
        for row, value, span in zip(rows, values, spans, strict=True):
            row[f"{name}, ms"] = shown(value, span)
            row[f"{name}, 90 %"] = shown_range(span)
    if limit_ms is not None:
        theme.limit_line(chart, limit_ms, f"SLO {limit_ms:g} ms")
    return Chart(chart, _latency_summary(label, metric, answers, names, limit_ms), rows)


def _latency_summary(
    label: str, metric: str, answers: Sequence[TrialAnswer], names: Sequence[str], limit_ms: float | None
) -> str:
    parts = []
    for answer, name in zip(answers, names, strict=True):
        found = getattr(answer.report.result, metric, None)
        if found is not None:
            told = [
                f"{shown(getattr(found, at), metric_interval(answer, metric, at))} ms at {at}" for at in ("p50", "p99")
            ]
            parts.append(f"{name}: {', '.join(told)}")
    limit = f" The limit is {limit_ms:g} ms." if limit_ms is not None else ""
    return f"{label}. {'; '.join(parts)}.{limit} Whiskers: 90 % of the draws of load and step times."


def split(answers: Sequence[TrialAnswer], names: Sequence[str]) -> Chart:
    """TTFT by its parts: what requests wait in the queue, and what their prompts take; median and p99 of each."""
    chart = theme.figure("", "ms", barmode="group")
    rows = []
    labels = [f"{part} {at}" for at in ("p50", "p99") for part in ("queue", "prefill")]
    fields = [(f"{part}_ms", at) for at in ("p50", "p99") for part in ("queue", "prefill")]
    told = []
    for number, (answer, name) in enumerate(zip(answers, names, strict=True)):
        result = answer.report.result
        if result is None or result.queue_ms is None or result.prefill_ms is None:
            continue
        values = [getattr(getattr(result, field), at) for field, at in fields]
        chart.add_bar(
            x=labels,
            y=values,
            name=name,
            marker=theme.bar(number),
            customdata=[definition(field) for field, _ in fields],
            hovertemplate=theme.hover(f"<b>{name}</b>", "%{x}: %{y:.4g} ms", "<i>%{customdata}</i>"),
        )
        spans = [metric_interval(answer, field, at) for field, at in fields]
        rows.append(
            {"configuration": name}
            | {f"{label}, ms": shown(value, span) for label, value, span in zip(labels, values, spans, strict=True)}
        )
        more = "the queue" if result.queue_ms.p99 > result.prefill_ms.p99 else "the prefill"
        told.append(
            f"{name}: at p99 {more} is the larger part ({shown(result.queue_ms.p99)} ms queue, "
            f"{shown(result.prefill_ms.p99)} ms prefill)"
        )
    return Chart(chart, f"TTFT is queue and prefill. {'; '.join(told)}.", rows)


def against_rate(
    metric: str, sweeps: Sequence[Sweep], names: Sequence[str], limit_ms: float | None, percentile: float
) -> Chart:
    """A latency at the SLO's percentile against the request rate, with the knee; of TTFT also the queue's part."""
    label = METRICS[metric]
    chart = theme.figure("request rate, requests/s", f"{label} p{percentile:g}, ms")
    rows, told = [], []
    for number, (sweep, name) in enumerate(zip(sweeps, names, strict=True)):
        points = [point for point in sweep.points if point.result and getattr(point.result, metric)]
        if not points:
            continue
        style = theme.series(number)
        rates = [point.request_rate for point in points]
        values = [getattr(point.result, metric).at_slo_percentile for point in points]
        chart.add_scatter(
            x=rates,
            y=values,
            mode="lines+markers",
            name=name,
            customdata=[_verdict(point.result) for point in points],
            hovertemplate=theme.hover(
                f"<b>{name}</b>", "%{y:.3g} ms at %{x:.3g} requests/s", "%{customdata}", definition=definition(metric)
            ),
            **style,
        )
        if metric == "ttft_ms":
            chart.add_scatter(
                x=rates,
                y=[point.result.queue_ms.at_slo_percentile if point.result.queue_ms else None for point in points],
                mode="lines",
                name=f"{name}: queue alone",
                line={"color": style["line"]["color"], "dash": "dot", "width": 1},
                hovertemplate=theme.hover(
                    f"<b>{name}</b>, queue", "%{y:.3g} ms at %{x:.3g} requests/s", definition=definition("queue_ms")
                ),
            )
        knee = sweep.knee
        if knee is not None and getattr(knee.result, metric) is not None:
            chart.add_scatter(
                x=[knee.request_rate],
                y=[getattr(knee.result, metric).at_slo_percentile],
                mode="markers",
                name=f"{name}: knee",
                marker={"symbol": "circle-open", "size": 18, "line": {"width": 3}, "color": style["line"]["color"]},
                hovertemplate=theme.hover(
                    f"<b>{name}</b>: the highest rate tried that meets the SLO", "%{x:.3g} requests/s, %{y:.3g} ms"
                ),
            )
        told.append(knee_sentence(sweep, name))
        rows += [
            {
                "configuration": name,
                "requests/s": shown(rate),
                f"{label} p{percentile:g}, ms": shown(value),
                "": _verdict(point.result),
            }
            for rate, value, point in zip(rates, values, points, strict=True)
        ]
    if limit_ms is not None:
        theme.limit_line(chart, limit_ms, f"SLO {limit_ms:g} ms", is_log=True)
    theme.logarithmic("y", chart)
    chart.update_xaxes(rangemode="tozero")
    return Chart(chart, " ".join(told), rows)


def knee_sentence(sweep: Sweep, name: str) -> str:
    """Up to which rate a configuration is good."""
    knee = sweep.knee
    if knee is None:
        return f"{name} misses the SLO at every rate tried."
    later = [point.request_rate for point in sweep.points if point.request_rate > knee.request_rate]
    if not later:
        return f"{name} meets the SLO up to {shown(knee.request_rate)} requests/s and perhaps beyond."
    return f"{name} meets the SLO up to {shown(knee.request_rate)} requests/s, and no longer at {shown(later[0])}."


def _verdict(result: SimulationResult | None) -> str:
    if result is None:
        return "does not fit"
    if result.verdict != "stable":
        return "✗ saturated"
    return {True: "✓ meets the SLO", False: "✗ misses the SLO", None: "keeps up"}[result.slo_met]


_STATE = (
    ("kv_usage", "KV in use, %", 100.0),
    ("running", "running", 1.0),
    ("waiting", "waiting", 1.0),
    ("preemptions", "preempted so far", 1.0),
)


def over_time(answers: Sequence[TrialAnswer], names: Sequence[str]) -> Chart:
    """KV occupancy, running, waiting and preempted requests over simulated time, one below the other."""
    chart: go.Figure = make_subplots(rows=len(_STATE), cols=1, shared_xaxes=True, vertical_spacing=0.04)
    base = theme.figure("", "", height=560)
    chart.update_layout(**{key: base.layout[key] for key in ("height", "margin", "legend", "hoverlabel", "uirevision")})
    rows, told = [], []
    for number, (answer, name) in enumerate(zip(answers, names, strict=True)):
        result = answer.report.result
        if result is None:
            continue
        times = [point.time_s for point in result.timeline]
        for row, (field, label, scale) in enumerate(_STATE, start=1):
            meaning = type(result.timeline[0]).model_fields[field].description or f"requests {label}, all replicas"
            chart.add_scatter(
                x=times,
                y=[scale * getattr(point, field) for point in result.timeline],
                mode="lines",
                name=name,
                legendgroup=name,
                showlegend=row == 1,
                line=theme.series(number)["line"],
                hovertemplate=theme.hover(
                    f"<b>{name}</b>", f"{label}: %{{y:.3g}} after %{{x:.0f}} s", definition=meaning
                ),
                row=row,
                col=1,
            )
        told.append(
            f"{name}: the KV cache of the fullest replica is at most {result.kv_usage_peak:.0%} full, "
            f"{shown(result.mean_running)} requests run and {shown(result.mean_waiting, digits=1)} wait on average, "
            f"{result.num_preemptions:,} preemptions"
        )
        rows += [
            {
                "configuration": name,
                "time, s": shown(point.time_s),
                "KV in use, %": shown(100 * point.kv_usage, digits=2),
                "running": point.running,
                "waiting": point.waiting,
                "preempted so far": point.preemptions,
            }
            for point in result.timeline[::6]
        ]
    for row, (_, label, _) in enumerate(_STATE, start=1):
        chart.update_yaxes(title_text=label, rangemode="tozero", automargin=True, row=row, col=1)
    chart.update_xaxes(title_text="simulated time, s", row=len(_STATE), col=1)
    return Chart(chart, f"{'; '.join(told)}.", rows)


def sensitivities(found: Tornado, metric: str, percentile: float) -> Chart:
    """A tornado: how far each change moves a latency at the SLO's percentile, the largest first."""
    label = METRICS[metric]
    chart = theme.figure(f"{label} p{percentile:g}, ms", "", barmode="overlay", height=420)
    base = _value(found.base, metric)
    if base is None:
        return Chart(chart, "This configuration does not fit, so that nothing can be changed about it.")

    def reach(bar) -> float:
        values = [value for value in (_value(bar.low_result, metric), _value(bar.high_result, metric)) if value]
        return max((abs(value - base) for value in values), default=0.0)

    bars = sorted(found.bars, key=reach)
    rows = []
    for number, side in enumerate(("low", "high")):
        values = [_value(getattr(bar, f"{side}_result"), metric) for bar in bars]
        settings = [getattr(bar, side) for bar in bars]
        chart.add_bar(
            x=[(value if value is not None else base) - base for value in values],
            y=[bar.name for bar in bars],
            base=base,
            orientation="h",
            name="lower setting" if side == "low" else "higher setting",
            marker=theme.bar(number),
            customdata=[
                (setting, "not possible" if value is None else f"{shown(value)} ms")
                for setting, value in zip(settings, values, strict=True)
            ],
            text=settings,
            textposition="auto",
            hovertemplate=theme.hover(
                "<b>%{y} = %{customdata[0]}</b>", f"{label}: %{{customdata[1]}}", definition=definition(metric)
            ),
        )
    chart.add_vline(x=base, line={"color": theme.NEUTRAL, "width": 2})
    for bar in reversed(bars):
        low, high = _value(bar.low_result, metric), _value(bar.high_result, metric)
        rows.append(
            {
                "what": bar.name,
                "lower setting": bar.low,
                f"then {label}, ms": "not possible" if low is None else shown(low),
                "higher setting": bar.high,
                f"then {label} is, ms": "not possible" if high is None else shown(high),
            }
        )
    first = bars[-1]
    summary = (
        f"From {shown(base)} ms, one change at a time. Most matters {first.name}: at {first.low} "
        f"{shown(_value(first.low_result, metric))} ms, at {first.high} {shown(_value(first.high_result, metric))} ms."
    )
    return Chart(chart, summary, rows)


def _value(result: SimulationResult | None, metric: str) -> float | None:
    found = getattr(result, metric, None)
    return found.at_slo_percentile if found is not None else None


def term_of(metric: str) -> str:
    """The SLO's name of a metric."""
    return next(term for term, label in TERMS.items() if label == METRICS[metric])
