"""A record as text: one line per row, the figures to reach with their verdicts, and what could not be measured."""

from collections.abc import Mapping, Sequence

from kernels.bench.results import OURS, Figure, Record, Row

_MARKS = {True: "met", False: "MISSED", None: "not measured"}


def render(record: Record) -> str:
    """The whole record, suite by suite."""
    limits = record.limits
    parts = [_heading(record)]
    for suite in dict.fromkeys(row.suite for row in record.rows):
        rows = [row for row in record.rows if row.suite == suite]
        parts.append(_suite(suite, rows, limits, record.clocks.get(suite, {})))
    if missing := [f"  {row.name}, {name}: {why}" for row in record.rows for name, why in row.absent.items()]:
        parts.append("\n".join(["absent", *missing]))
    if notes := dict.fromkeys(f"  {row.suite}: {row.note}" for row in record.rows if row.note):
        parts.append("\n".join(["notes", *notes]))
    parts.append(summary(record))
    return "\n\n".join(parts)


def summary(record: Record) -> str:
    """How many figures were reached, and which were not."""
    limits = record.limits
    verdicts = [(row, figure) for row in record.rows for figure in row.figures(limits)]
    met = sum(figure.met is True for _, figure in verdicts)
    lines = [f"{met} of {len(verdicts)} figures met"]
    lines += [f"  {_MARKS[f.met]}: {row.name}, {f.target} ({amount(f)})" for row, f in verdicts if not f.met]
    if record.stopped:
        lines.append(f"the run was stopped: {record.stopped}")
    return "\n".join(lines)


def progress(row: Row, limits: Mapping[str, float]) -> str:
    """A row in one line, for someone who waits."""
    return "  ".join(cell for cell in _cells(row, limits) if cell)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Cells in columns: the first and the last two to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = {0, len(widths) - 2, len(widths) - 1}
    lines = [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def duration(seconds: float) -> str:
    """Three digits: 20.9 µs, 1.23 ms."""
    for unit, factor in (("µs", 1e6), ("ms", 1e3)):
        if seconds * factor < 999.5:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def amount(figure: Figure) -> str:
    """What was reached, in the target's own terms."""
    if figure.value is None:
        return "-"
    if figure.target.quantity == "seconds":
        return duration(figure.value)
    if figure.target.quantity == "share":
        return f"{figure.value:.2%}"
    if figure.target.quantity == "value":
        return f"{figure.value:.4g}"
    return f"{figure.value:.3f} ×"


def rate(row: Row, limits: Mapping[str, float]) -> str:
    """Work per second, in the unit of what bounds the row."""
    if row.main is None or not (row.bytes or row.flops):
        return ""
    by_bytes = (row.bytes or 0) / limits["copy"] if "copy" in limits else 1
    by_flops = (row.flops or 0) / limits["matmul"] if "matmul" in limits else 1
    work, unit = (row.bytes, "TB/s") if row.bytes and by_bytes >= by_flops else (row.flops, "TFLOP/s")
    return f"{work / row.main.median_s / 1e12:.3g} {unit}" if work else ""


def _value(name: str, value: float) -> str:
    return (
        f"{name.removesuffix('_bytes')} {value / 2**20:,.0f} MiB" if name.endswith("_bytes") else f"{name} {value:.3g}"
    )


def _heading(record: Record) -> str:
    known = record.environment
    stack = ", ".join(f"{name} {known[name]}" for name in ("torch", "triton", "driver", "cudnn") if known.get(name))
    quick = ", quick" if record.quick else ""
    return f"{known.get('gpu', 'unknown GPU')}, {stack}; commit {record.commit}, {record.date}{quick}"


def _suite(suite: str, rows: Sequence[Row], limits: Mapping[str, float], clocks: Mapping[str, object]) -> str:
    header = [
        suite,
        OURS if suite != "limits" else "",
        "spread",
        "rate",
        "of floor",
        "speed-up over",
        "figure to reach",
    ]
    table = columns([header, *(_cells(row, limits) for row in rows)])
    return f"{table}\n{_conditions(clocks)}" if clocks else table


def _conditions(clocks: Mapping[str, object]) -> str:
    if "absent" in clocks:
        return f"clocks unknown: {clocks['absent']}"
    return (
        f"SM {clocks['sm_clock_mhz']} MHz, memory {clocks['memory_clock_mhz']} MHz, {clocks['power_w']} W, "
        f"{clocks['temperature_c']} °C"
    )


def _cells(row: Row, limits: Mapping[str, float]) -> list[str]:
    share = row.share_of_floor(limits)
    ratios = "  ".join(f"{name} {ratio:.2f}×" for name, ratio in row.speedups().items())
    engine = f"engine: {row.shape['engine']}" if "engine" in row.shape else ""
    values = "  ".join(_value(name, value) for name, value in row.values.items())
    figures = [f"{f.target}: {amount(f)} {_MARKS[f.met]}" for f in row.figures(limits)]
    return [
        row.name,
        duration(row.main.median_s) if row.main else "absent" if OURS in row.absent else "",
        f"{row.main.spread:.1%}" if row.main else "",
        rate(row, limits),
        f"{share:.0%}" if share else "",
        "  ".join(part for part in (ratios, engine, values) if part),
        "; ".join(figures),
    ]
