"""Figures of memory: where it goes, what fits by context, how fast that is, and the roofline."""

from __future__ import annotations

from collections.abc import Sequence

from dashboard.figures import theme
from dashboard.figures.plan import kv_name
from dashboard.figures.theme import Chart
from dashboard.services.capacity import Line, Roofline
from dashboard.services.results import shown, shown_capacity
from planner.memory import GIB, MemoryReport, RankMemory
from planner.step_time import Evidence

#: Field, name and meaning of each part of a GPU's memory, from the bottom of the stack.
PARTS = (
    ("weights_bytes", "weights"),
    ("activation_bytes", "activations"),
    ("cuda_graph_bytes", "CUDA graphs"),
    ("non_torch_bytes", "non-torch"),
    ("kv_residual_bytes", "KV residual"),
    ("kv_cache_bytes", "KV cache"),
    ("unused_bytes", "left alone"),
)
CONCURRENCY = "sequences of that length that the KV pool holds in steady decode"


def stack(reports: Sequence[MemoryReport], names: Sequence[str]) -> Chart:
    """Memory per GPU of one or more replicas, one bar each, with the limit of gpu_memory_utilization."""
    chart = theme.figure("GiB per GPU", "", height=150 + 60 * len(reports), barmode="stack")
    rows: list[dict[str, object]] = [{"part": label} for _, label in PARTS]
    for number, (field, label) in enumerate(PARTS):
        meaning = RankMemory.model_fields[field].description or label
        values = [getattr(report.ranks[0], field) / GIB for report in reports]
        chart.add_bar(
            x=values,
            y=list(names),
            orientation="h",
            name=label,
            marker=theme.bar(number) if field != "unused_bytes" else {"color": theme.NEUTRAL, "opacity": 0.3},
            hovertemplate=theme.hover(f"<b>{label}</b>: %{{x:.2f}} GiB", definition=meaning),
        )
        for name, value in zip(names, values, strict=True):
            rows[number][f"{name}, GiB"] = f"{value:.2f}"
    total = max(report.gpu_memory_bytes for report in reports) / GIB
    share = reports[0].gpu_memory_utilization
    chart.add_vline(
        x=share * reports[0].gpu_memory_bytes / GIB, line={"dash": "dash", "width": 2, "color": theme.NEUTRAL}
    )
    chart.update_xaxes(range=[0, 1.01 * total])
    chart.update_layout(legend_traceorder="normal")
    parts = [_stack_sentence(report, name) for report, name in zip(reports, names, strict=True)]
    parts.append(f"The dashed line is gpu_memory_utilization, {share:g}.")
    summary = " ".join(parts) + " KV is reserved up front by design: the GPU looks full even when idle."
    return Chart(
        chart, summary, [row for row in rows if any(v not in ("0.00",) for k, v in row.items() if k != "part")]
    )


def _stack_sentence(report: MemoryReport, name: str) -> str:
    rank = report.ranks[0]
    return (
        f"{name}: of {report.gpu_memory_bytes / GIB:.1f} GiB per GPU, weights take {rank.weights_bytes / GIB:.1f}, the "
        f"KV cache {rank.kv_cache_bytes / GIB:.1f}."
    )


def concurrency(lines: Sequence[Line], asked: int, length: int) -> Chart:
    """Sequences that fit against context length, both axes logarithmic; the question as a cross."""
    chart = theme.figure("context, tokens", "sequences that fit")
    _add_lines(chart, lines, CONCURRENCY, "sequences")
    chart.add_scatter(
        x=[length],
        y=[asked],
        mode="markers",
        name="asked for",
        marker={"symbol": "cross-thin", "size": 16, "line": {"width": 3, "color": theme.NEUTRAL}},
        hovertemplate=theme.hover("<b>asked for</b>: %{y:,} sequences of %{x:,} tokens"),
    )
    _logarithmic(chart)
    at = _at(lines, length)
    told = "; ".join(f"{kv_name(name)} {shown_capacity(value)}" for name, value in at)
    return Chart(chart, f"Sequences of {length:,} tokens that fit: {told or 'none'}.", _table(lines, "sequences"))


def speed(lines: Sequence[Line], length: int) -> Chart:
    """Output tokens/s of one replica against context length."""
    chart = theme.figure("context, tokens", "output tokens/s of a replica")
    _add_lines(chart, lines, "output tokens per second of steady decode, every request at this context", "tokens/s")
    _logarithmic(chart)
    told = "; ".join(f"{_named(name)}: {shown(value)}" for name, value in _at(lines, length))
    summary = (
        f"Tokens/s at {length:,} tokens of context: {told or 'nothing fits'}. Each token reads the whole cache once."
    )
    if any(Evidence.UNCALIBRATED in line.evidence for line in lines):
        summary += " Uncalibrated: from data sheets, not from a measured GPU."
    elif any(Evidence.EXTRAPOLATED in line.evidence for line in lines):
        summary += " Beyond what was measured, values are extrapolated: hover says where."
    return Chart(chart, summary, _table(lines, "tokens/s"))


def _add_lines(chart, lines: Sequence[Line], definition: str, unit: str) -> None:
    for number, line in enumerate(lines):
        if not line.points:
            continue
        chart.add_scatter(
            x=[length for length, _ in line.points],
            y=[value for _, value in line.points],
            mode="lines+markers",
            name=_named(line.name),
            customdata=[str(each) for each in line.evidence] or [""] * len(line.points),
            hovertemplate=theme.hover(
                f"<b>{_named(line.name)}</b>",
                f"%{{y:.3g}} {unit} at %{{x:,}} tokens",
                "%{customdata}",
                definition=definition,
            ),
            **theme.series(number),
        )
        chart.data[-1].marker.size = 5


def _named(name: str) -> str:
    """A series as people call it."""
    return name.replace("bfloat16", "bf16")


def _logarithmic(chart) -> None:
    ticks = [1 << power for power in range(10, 21)]
    texts = [f"{tick >> 10}k" for tick in ticks]
    chart.update_xaxes(type="log", tickvals=ticks, ticktext=texts)
    chart.update_yaxes(type="log", dtick=1)


def _at(lines: Sequence[Line], length: int) -> list[tuple[str, float]]:
    """Each line at the last of its points up to a length."""
    found = []
    for line in lines:
        values = [value for at, value in line.points if at <= length]
        if values:
            found.append((line.name, values[-1]))
    return found


def _table(lines: Sequence[Line], unit: str) -> list[dict[str, object]]:
    lengths = sorted({length for line in lines for length, _ in line.points})
    by_name = {line.name: dict(line.points) for line in lines}
    return [
        {"context, tokens": f"{length:,}"}
        | {f"{name}, {unit}": shown(values.get(length)) for name, values in by_name.items()}
        for length in lengths
    ]


def roofline(found: Roofline) -> Chart:
    """FLOP/s against FLOPs per byte: the data sheet's roof, the measured one, and measured steps under them."""
    chart = theme.figure("arithmetic intensity, FLOP per byte of HBM traffic", "TFLOP/s")
    gpu = found.gpu
    roofs = [("data sheet", gpu.memory_bandwidth_bytes_per_s, gpu.bf16_flops)]
    if found.limits is not None:
        roofs.append(("measured limits", found.limits.copy_bytes_per_s, found.limits.matmul_flops_per_s))
    for number, (name, bytes_per_s, flops_per_s) in enumerate(roofs):
        ridge = flops_per_s / bytes_per_s
        style = theme.series(number)
        x = [0.25, ridge, 16384.0]
        chart.add_scatter(
            x=x,
            y=[min(flops_per_s, each * bytes_per_s) / 1e12 for each in x],
            mode="lines",
            name=f"{name}, bf16",
            line={**style["line"], "color": theme.NEUTRAL},
            hovertemplate=theme.hover(
                f"<b>{name}</b>",
                f"{bytes_per_s / 1e12:.3g} TB/s, {flops_per_s / 1e12:.4g} TFLOP/s",
                definition="what can be reached is the lower of bandwidth × intensity and the matrix rate",
            ),
        )
    for number, kind in enumerate(("decode", "prefill")):
        points = [point for point in found.points if point.kind == kind]
        if not points:
            continue
        chart.add_scatter(
            x=[point.intensity for point in points],
            y=[point.flops_per_s / 1e12 for point in points],
            mode="markers",
            name=f"measured {kind} steps",
            customdata=[point.name for point in points],
            marker={**theme.series(number)["marker"], "size": 7},
            hovertemplate=theme.hover(
                "<b>%{customdata}</b>",
                "%{y:.3g} TFLOP/s at %{x:.3g} FLOP per byte",
                definition="a whole step of the engine: FLOPs of all layers over its time on the GPU; bytes are the "
                "weights and every cached key and value, once",
            ),
        )
    chart.update_xaxes(type="log", dtick=1)
    chart.update_yaxes(type="log", dtick=1)
    ridge = gpu.bf16_flops / gpu.memory_bandwidth_bytes_per_s
    summary = (
        f"{gpu.name}: below {ridge:.0f} FLOP per byte (data sheet) a step is bound by memory, above it by arithmetic. "
        f"Measured steps: {found.source}."
    )
    rows = [
        {
            "step": point.name,
            "kind": point.kind,
            "FLOP per byte": shown(point.intensity),
            "TFLOP/s": shown(point.flops_per_s / 1e12),
        }
        for point in found.points
    ]
    return Chart(chart, summary, rows)
