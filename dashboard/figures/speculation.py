"""Figures of speculative decoding: what it gains, what is accepted, and which k when."""

from __future__ import annotations

from collections.abc import Sequence

from dashboard.figures import theme
from dashboard.figures.theme import Chart
from dashboard.services.results import shown
from dashboard.services.speculation import Gain, best_by_batch
from planner.simulation import AcceptanceProcess
from planner.step_time import Evidence

_SPEEDUP = "tokens/s with drafts over tokens/s without, every request decoding at the same context"


def speedup(found: Sequence[Gain]) -> Chart:
    """Speed-up over k × batch, with the contour at which drafting pays nothing."""
    ks = sorted({gain.k for gain in found})
    batches = sorted({gain.batch for gain in found})
    at = {(gain.k, gain.batch): gain for gain in found}
    values = [[at[k, batch].speedup for batch in batches] for k in ks]
    chart = theme.figure("requests in the batch", "draft length k")
    labels = [str(batch) for batch in batches]
    low, high = min(1.0, *map(min, values)), max(1.0, *map(max, values))
    even = (1.0 - low) / (high - low) if high > low else 0.5
    # Blue and orange are told apart by everybody; the number stands in each cell.
    scale = [[even, "#F7F7F7"]]
    scale = [[0.0, "#D55E00"], *scale] if even > 0 else scale
    scale = [*scale, [1.0, "#0072B2"]] if even < 1 else scale
    chart.add_heatmap(
        x=labels,
        y=ks,
        z=values,
        zmin=low,
        zmax=high if high > low else low + 1.0,
        colorscale=scale,
        colorbar={"title": {"text": "speed-up"}},
        text=[[_told(at[k, batch]) for batch in batches] for k in ks],
        texttemplate="%{text}",
        textfont={"color": "black"},
        hovertemplate=theme.hover("<b>k = %{y}, batch %{x}</b>", "%{text} times as fast", definition=_SPEEDUP),
    )
    if any(value < 1 for row in values for value in row) and len(ks) > 1:
        chart.add_contour(
            x=labels,
            y=ks,
            z=values,
            contours={"start": 1, "end": 1, "size": 1, "coloring": "none"},
            line={"color": "black", "width": 3, "dash": "dash"},
            showscale=False,
            name="1.0: no gain",
            hoverinfo="skip",
        )
    chart.update_xaxes(type="category")
    chart.update_yaxes(dtick=1)
    best = max(found, key=lambda gain: gain.speedup)
    losing = [batch for batch, (k, _) in best_by_batch(found).items() if not k]
    summary = f"Best: k = {best.k} at batch {best.batch}, {shown(best.speedup, digits=2)} times as fast."
    if losing:
        summary += f" From a batch of {losing[0]} on no draft length pays: k should be 0. The dashed line is 1.0."
    rows = [{"k": k} | {f"batch {batch}": _told(at[k, batch]) for batch in batches} for k in ks]
    return Chart(chart, summary, rows)


def _told(gain: Gain) -> str:
    """A speed-up; to one decimal where the step that verifies was never measured."""
    is_measured = gain.evidence in (Evidence.MEASURED, Evidence.INTERPOLATED)
    return f"{gain.speedup:.2f}" if is_measured else f"{gain.speedup:.1f}"


def acceptance(rates: Sequence[float]) -> Chart:
    """Share of rounds that accept each position, and the expected tokens per step up to it."""
    process = AcceptanceProcess(tuple(rates))
    reached = process.unconditional_rates
    lengths = [1 + process.limited(k).mean_accepted() for k in range(1, len(rates) + 1)]
    chart = theme.figure("draft position, or draft length k", "tokens per step, or share of rounds")
    positions = list(range(1, len(rates) + 1))
    chart.add_bar(
        x=positions,
        y=reached,
        name="rounds that accept this position",
        marker=theme.bar(0),
        hovertemplate=theme.hover(
            "<b>position %{x}</b>: %{y:.1%} of rounds", definition="unconditional: it and all drafts before it"
        ),
    )
    chart.add_scatter(
        x=positions,
        y=lengths,
        mode="lines+markers",
        name="tokens per step with k drafts",
        hovertemplate=theme.hover(
            "<b>k = %{x}</b>: %{y:.2f} tokens per step", definition="1 + accepted drafts, the bonus token included"
        ),
        **theme.series(1),
    )
    chart.update_xaxes(dtick=1)
    rows = [
        {
            "position": position,
            "accepted, given all before it": f"{rate:.0%}",
            "rounds that accept it": f"{share:.0%}",
            "tokens per step with k of it": f"{length:.2f}",
        }
        for position, rate, share, length in zip(positions, rates, reached, lengths, strict=True)
    ]
    return Chart(chart, f"With {len(rates)} drafts {shown(lengths[-1])} tokens per step are expected.", rows)


def best_k(found: Sequence[Gain]) -> Chart:
    """The best draft length by batch size."""
    best = best_by_batch(found)
    chart = theme.figure("requests in the batch", "best draft length k")
    chart.update_layout(margin={"r": 40})  # for the number at the last point
    chart.add_scatter(
        x=[str(batch) for batch in best],
        y=[k for k, _ in best.values()],
        mode="lines+markers+text",
        text=[f"×{gain:.1f}" if k else "off" for k, gain in best.values()],
        textposition="top right",
        cliponaxis=False,
        name="best k",
        hovertemplate=theme.hover("<b>batch %{x}</b>: k = %{y}", "%{text}", definition=_SPEEDUP),
        line={**theme.series(0)["line"], "shape": "vh"},
        marker=theme.series(0)["marker"],
    )
    chart.update_xaxes(type="category")
    chart.update_yaxes(dtick=1, range=[-0.5, max(k for k, _ in best.values()) + 1])
    rows = [
        {"batch": batch, "best k": k, "speed-up": f"{gain:.1f}" if k else "no draft pays"}
        for batch, (k, gain) in best.items()
    ]
    told = ", ".join(f"{k} at {batch}" for batch, (k, _) in best.items())
    return Chart(chart, f"Best k by batch: {told}.", rows)
