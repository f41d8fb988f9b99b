"""Figures of a record with plotly, which only this module uses and only when asked: roofline and speed-up."""

from pathlib import Path

from kernels.bench.results import BenchError, Record, Row, check_writable


def plot(record: Record, folder: Path) -> list[Path]:
    """Write roofline.html and speedup.html, and beside them the plotly.js that both load.

    Raises:
        BenchError: plotly is not installed, the record has nothing to draw, or the folder cannot be written.
    """
    figures = {"roofline.html": roofline(record), "speedup.html": speedup(record)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.write_html(folder / name, include_plotlyjs="directory")
    except OSError as error:
        raise BenchError(f"cannot write into {folder}: {error.strerror}") from error
    return [folder / name for name in figures]


def check(folder: Path) -> None:
    """Raise BenchError now rather than after minutes of measuring, if figures cannot be drawn or written here."""
    _plotly()
    check_writable(folder / "roofline.html")


def roofline(record: Record):
    """Every row with FLOPs and bytes under the copy and matmul limits of its run: a plotly figure."""
    go = _plotly()
    limits = record.limits
    rows = [row for row in record.rows if row.flops and row.bytes and row.share_of_floor(limits)]
    if not rows or not {"copy", "matmul"} <= limits.keys():
        raise BenchError("the record has no row with FLOPs, bytes and limits: there is no roofline to draw")
    low = min(_intensity(row) for row in rows) / 2
    ridge = limits["matmul"] / limits["copy"]
    high = max([*map(_intensity, rows), ridge]) * 2
    figure = go.Figure()
    figure.add_scatter(
        x=[low, ridge, high],
        y=[low * limits["copy"] / 1e12, limits["matmul"] / 1e12, limits["matmul"] / 1e12],
        mode="lines",
        name=f"limits: copy {limits['copy'] / 1e12:.2f} TB/s, matmul {limits['matmul'] / 1e12:.0f} TFLOP/s",
        line={"color": "black"},
    )
    for suite in dict.fromkeys(row.suite for row in rows):
        inside = [row for row in rows if row.suite == suite]
        figure.add_scatter(
            x=[_intensity(row) for row in inside],
            y=[row.flops / row.main.median_s / 1e12 for row in inside],
            text=[f"{row.name}<br>{row.share_of_floor(limits):.0%} of the limit" for row in inside],
            hovertemplate="%{text}<br>%{x:.3g} FLOP/byte, %{y:.3g} TFLOP/s<extra></extra>",
            mode="markers",
            marker={"size": 9},
            name=suite,
        )
    figure.update_xaxes(type="log", title="FLOP per byte of device memory")
    figure.update_yaxes(type="log", title="TFLOP/s")
    figure.update_layout(title=f"Roofline, {_system(record)}", template="plotly_white")
    return figure


def speedup(record: Record):
    """The time of each peer over ours, row by row; a cross marks the speed-up to reach: a plotly figure."""
    go = _plotly()
    rows = [row for row in record.rows if row.speedups()]
    if not rows:
        raise BenchError("the record has no row with a peer: there is no speed-up to draw")
    figure = go.Figure()
    for peer in dict.fromkeys(name for row in rows for name in row.speedups()):
        inside = [row for row in rows if peer in row.speedups()]
        figure.add_scatter(
            x=[row.speedups()[peer] for row in inside],
            y=[row.name for row in inside],
            mode="markers",
            marker={"size": 9},
            name=f"over {peer}",
        )
    reach = [(row.name, target.reach) for row in rows for target in row.targets if target.quantity == "speedup"]
    figure.add_scatter(
        x=[value for _, value in reach],
        y=[name for name, _ in reach],
        mode="markers",
        marker={"symbol": "x-thin", "size": 9, "line": {"width": 2, "color": "black"}},
        name="to reach",
    )
    figure.add_vline(x=1, line={"color": "grey", "dash": "dot"})
    figure.update_xaxes(type="log", title="time of the peer over ours")
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(
        title=f"Speed-up, {_system(record)}", template="plotly_white", height=200 + 22 * len(rows), margin={"l": 260}
    )
    return figure


def _plotly():
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise BenchError("figures need plotly, which is not installed: pip install plotly") from error
    return go


def _intensity(row: Row) -> float:
    return row.flops / row.bytes


def _system(record: Record) -> str:
    return f"{record.environment.get('gpu', 'unknown GPU')}, commit {record.commit}"
