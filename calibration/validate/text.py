"""A study as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from calibration.validate.decompose import Decomposition
from calibration.validate.errors import Comparison
from calibration.validate.intervals import LEVEL, Interval
from calibration.validate.steps import StepErrors
from calibration.validate.study import Figure, Level, Study
from engine.bench.tables import MISSING, columns, number

_STATISTICS = ("mean", "p50", "p90", "p99")
_LATENCIES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "e2el_ms": "E2EL"}
LABELS = {
    **{f"{name}.{one}": f"{label} {one}, ms" for name, label in _LATENCIES.items() for one in _STATISTICS},
    "output_throughput_tokens_per_s": "output tokens/s",
    "request_throughput_per_s": "requests/s",
    "num_preemptions": "preemptions",
    "running_peak": "running, peak",
    "running_mean": "running, mean",
    "kv_usage_peak": "KV usage, peak",
    "kv_usage_mean": "KV usage, mean",
    "saturation_requests_per_s": "saturation point, requests/s",
    "mixed_step_s.median": "steps with prompts, median",
    "mixed_step_s.p90": "steps with prompts, p90",
}


def text(found: Study) -> str:
    """The whole study, level by level, and the figures to reach."""
    sections = []
    for level, intervals in zip(found.levels, found.intervals, strict=True):
        sections.append(_level(level, intervals))
    sections.append(_saturation(found))
    sections.append(_coverage(found))
    sections.append(_figures(found.figures))
    sections.extend(f"note: {note}" for note in found.notes)
    return "\n\n".join(section for section in sections if section)


def signed(share: float | None, digits: int = 1) -> str:
    """An error in percent, with its sign."""
    return MISSING if share is None else f"{share:+.{digits}%}"


# ---- one level -------------------------------------------------------------------------------------------------------


def _level(level: Level, intervals: Mapping[str, Interval | None]) -> str:
    record = level.record
    count = len(record.runs)
    title = (
        f"{record.label}: {len(record.runs[0].lives)} requests, {count} {'run' if count == 1 else 'runs'}, "
        f"{record.engine.model}, {record.engine.kv_cache_dtype} KV\nstep times: {level.predictor.origin}"
    )
    header = ["", "measured", "predicted", "error", "limit", "own spread", f"{LEVEL:.0%} interval", ""]
    rows = [_row(one, intervals.get(one.metric)) for one in level.comparisons]
    parts = [title, columns(header, rows), _requests(level)]
    if level.steps:
        parts.append(_steps(level.steps))
    if level.decompositions:
        parts.append(_decomposition(level.decompositions[0]))
    return "\n\n".join(parts)


def _row(one: Comparison, around: Interval | None) -> list[str]:
    def shown(value: float) -> str:
        if one.metric.startswith("kv_usage"):
            return f"{value:.2%}"
        return f"{value:,.0f}" if one.metric in ("num_preemptions", "running_peak") else number(value, 1)

    between = MISSING if around is None else f"{shown(around.low)} – {shown(around.high)}"
    return [
        LABELS[one.metric],
        shown(one.measured_median),
        shown(one.predicted_median),
        signed(one.error),
        MISSING if one.limit is None else f"{one.limit:.0%}",
        MISSING if one.spread is None else f"{one.spread:.1%}",
        between,
        {None: "", True: "", False: "MISSED"}[one.is_met],
    ]


def _requests(level: Level) -> str:
    rows = []
    for name, of_runs in level.requests.items():
        told = [(f"run {run}", one) for run, one in enumerate(of_runs, 1)]
        told += [(f"run {run} by run {run - 1}", one) for run, one in enumerate(level.repeats[name], 2)]
        rows += [
            [
                _LATENCIES[name],
                what,
                MISSING if one.pearson is None else number(one.pearson, 4),
                f"{one.mape:.1%}",
                signed(one.bias),
            ]
            for what, one in told
            if one is not None
        ]
    return columns(["request by request", "", "Pearson r", "mean |error|", "bias"], rows, left=2)


def _steps(steps: tuple[StepErrors, ...]) -> str:
    rows = [
        [
            one.kind,
            f"{one.count:,}",
            number(one.measured_s),
            number(one.predicted_s),
            signed(one.predicted_s / one.measured_s - 1 if one.measured_s else None),
            f"{one.median:.2%}",
            f"{one.p90:.2%}",
            signed(one.bias, 2),
        ]
        for one in steps
    ]
    return columns(["steps", "count", "busy s", "predicted", "error", "median |error|", "p90", "median error"], rows)


def _decomposition(found: Decomposition) -> str:
    rows = [
        [LABELS[part.metric], *(signed(share) for share in (part.host, part.step_times, part.schedule, part.total))]
        for part in found.parts
    ]
    gaps = [
        [
            gap.kind,
            f"{gap.count:,}",
            *(f"{value:+.3f}" for value in gap.gap),
            *(f"{value:.3f}" for value in gap.host),
            *(f"{value:+.2f}" for value in gap.late_launch[1:]),
        ]
        for gap in found.gaps
    ]
    alike, queue = found.agreement, found.queue
    first = "none" if alike.first_difference is None else f"step {alike.first_difference + 1:,}"
    lines = [
        columns(["where the error comes from, run 1", "host", "step times", "schedule", "in all"], rows),
        f"schedule: {alike.recorded:,} steps recorded, {alike.simulated:,} simulated; first difference: {first}; "
        f"{alike.same_place:.1%} the same at the same place, {alike.somewhere:.1%} anywhere\n"
        f"arrival to first scheduled: {queue.measured_mean:.2f} ms measured and {queue.predicted_mean:.2f} predicted "
        f"on average, median {queue.measured_p50:.2f} and {queue.predicted_p50:.2f}",
    ]
    if gaps:
        header = ["period less device, ms", "count", "p10", "p50", "p90"]
        header += ["host p50", "predicted", "launch late by p50", "p90"]
        lines.append(columns(header, gaps))
    return "\n\n".join(lines)


# ---- all levels ------------------------------------------------------------------------------------------------------


def _saturation(found: Study) -> str:
    lines = []
    for name, one in found.saturations.items():
        if one.measured_per_s is None or one.predicted_per_s is None:
            sides = {
                (True, True): "no load level is past it",
                (True, False): "only the simulation is past it",
                (False, True): "only the engine is past it",
            }
            lines.append(
                f"saturation point of {name}: {sides[one.measured_per_s is None, one.predicted_per_s is None]}"
            )
        else:
            lines.append(
                f"saturation point of {name}: {number(one.measured_per_s)} requests/s measured, "
                f"{number(one.predicted_per_s)} predicted, {signed(one.error)}"
            )
    return "\n".join(lines)


def _coverage(found: Study) -> str:
    every = found.coverages["all"]
    if every.share is None:
        return f"coverage of {LEVEL:.0%} intervals: none is known"
    return f"coverage of {LEVEL:.0%} intervals: {every.inside:,} of {every.of:,} measurements inside, {every.share:.1%}"


def _figures(figures: tuple[Figure, ...]) -> str:
    def rows() -> Iterator[list[str]]:
        for figure in figures:
            name, error = figure.worst
            yield [
                LABELS[figure.name],
                f"{figure.limit:.0%}" + (" or own spread" if figure.name.endswith("p99") else ""),
                f"{figure.median:.1%}",
                signed(error),
                name,
                f"{figure.met} of {len(figure.errors)}",
                "" if figure.is_met else "MISSED",
            ]

    return columns(["figures to reach", "limit", "median |error|", "worst", "at", "met", ""], list(rows()))
