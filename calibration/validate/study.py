"""Records against their predictions: one level after the other, then what only several levels can tell."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

from calibration.validate import state
from calibration.validate.decompose import Decomposition, decompose
from calibration.validate.errors import (
    LATENCIES,
    LIMITS,
    MIXED_STEP_LIMITS,
    SATURATION_LIMIT,
    STATISTICS,
    THROUGHPUTS,
    Comparison,
    RequestErrors,
    compare_all,
    metrics_of,
    request_errors,
)
from calibration.validate.intervals import (
    LEVEL,
    Coverage,
    Interval,
    around,
    coverage,
    drawn,
    metric_values,
)
from calibration.validate.profiles import Predictor
from calibration.validate.records import Lives, ServedRecord, ServedRun
from calibration.validate.replay import SimulatedRun, simulate_run
from calibration.validate.saturation import Saturation, Service, saturation, service
from calibration.validate.steps import ALL_MIXED, PredictedLog, StepErrors, device_s, predict_log, step_errors

VERSION = 1
KIND = "memwall-validation"
NUM_DRAWS = 16
# What gets an interval and counts for coverage.
WITH_INTERVAL = (*(f"{name}.{statistic}" for name in LATENCIES for statistic in STATISTICS), *THROUGHPUTS)


@dataclass(frozen=True, eq=False)
class Level:
    """One record and its prediction.

    Attributes:
        simulated: of each run.
        draws: metrics of the load under drawn step times, by the place of the first run with that load.
        comparisons: of every metric, then of running requests and KV blocks.
        requests: by latency, of each run. repeats: of each later one, had the run before been the prediction.
        services: measured and predicted, of each run; empty of a load too short to tell.
        logs: of the runs whose steps were logged.
    """

    record: ServedRecord
    predictor: Predictor
    simulated: tuple[SimulatedRun, ...]
    draws: tuple[tuple[Mapping[str, float], ...], ...]
    comparisons: tuple[Comparison, ...]
    requests: Mapping[str, tuple[RequestErrors | None, ...]]
    repeats: Mapping[str, tuple[RequestErrors | None, ...]]
    services: tuple[tuple[Service, Service], ...]
    logs: tuple[PredictedLog, ...]
    decompositions: tuple[Decomposition, ...]
    steps: tuple[StepErrors, ...]

    def comparison(self, metric: str) -> Comparison | None:
        return next((found for found in self.comparisons if found.metric == metric), None)


@dataclass(frozen=True)
class Figure:
    """One line of the table of figures to reach.

    Attributes:
        errors: label of the level and signed error (of step times: absolute), of every level that has it.
        met: how many levels reach it.
    """

    name: str
    limit: float
    errors: tuple[tuple[str, float], ...]
    met: int

    @property
    def is_met(self) -> bool:
        return self.met == len(self.errors)

    @property
    def worst(self) -> tuple[str, float]:
        return max(self.errors, key=lambda pair: abs(pair[1]))

    @property
    def median(self) -> float:
        return statistics.median(abs(error) for _, error in self.errors)


@dataclass(frozen=True, eq=False)
class Study:
    """Everything that was found.

    Attributes:
        intervals: by level, then metric; None in place of one that is not known.
        saturations: by the name of each series of levels with the same engine.
        coverages: by metric, and of all under "all".
    """

    levels: tuple[Level, ...]
    intervals: tuple[Mapping[str, Interval | None], ...]
    saturations: Mapping[str, Saturation]
    coverages: Mapping[str, Coverage]
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def is_met(self) -> bool:
        return all(figure.is_met for figure in self.figures)


def study(
    records: Sequence[ServedRecord],
    predictor_for: Callable[[ServedRecord], Predictor],
    *,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Study:
    """Validate.

    Args:
        predictor_for: step times for a record.
        num_draws: simulations for the interval of a level; 0: without intervals.
        say: takes a line for someone who waits.

    Raises:
        UserError: a record that does not fit its step times, or the simulation.
    """
    ordered = sorted(records, key=lambda record: (str(record.engine.series), record.request_rate_per_s or float("inf")))
    levels = []
    for record in ordered:
        say(f"  {record.label}")
        levels.append(_level(record, predictor_for(record), num_draws, seed))
    by_series: dict[tuple[Any, ...], list[Level]] = {}
    for level in levels:
        by_series.setdefault(level.record.engine.series, []).append(level)
    intervals = tuple(map(_intervals, levels))
    names = _series_names([of[0].record for of in by_series.values()])
    pairs = zip(names, by_series.values(), strict=True)
    saturations = {name: found for name, of in pairs if (found := _saturation(of))}
    notes = dict.fromkeys(note for level in levels for note in _notes(level))
    return Study(
        tuple(levels),
        intervals,
        saturations,
        _coverages(levels, intervals),
        tuple(_figures(levels, saturations)),
        tuple(notes),
    )


# ---- one level -------------------------------------------------------------------------------------------------------


def _level(record: ServedRecord, predictor: Predictor, num_draws: int, seed: int) -> Level:
    engine, step_time = record.engine, predictor.step_time
    same = [_first_alike(record.runs, index) for index in range(len(record.runs))]
    distinct = sorted(set(same))
    predicted = {
        index: simulate_run(record.workload, record.runs[index].lives, engine, step_time, steps=True)
        for index in distinct
    }
    others = drawn(step_time, num_draws, seed)
    draws = {
        index: tuple(
            metrics_of(simulate_run(record.workload, record.runs[index].lives, engine, other, steps=False).lives)
            for other in others
        )
        for index in distinct
    }
    simulated = tuple(predicted[index] for index in same)
    logs = tuple(
        predict_log(run.steps, step_time, predictor.largest_piece) for run in record.runs if run.steps is not None
    )
    with_log = [(run, one) for run, one in zip(record.runs, simulated, strict=True) if run.steps is not None]
    decompositions = (
        decompose(run, log, one, engine.pipeline_depth) for (run, one), log in zip(with_log, logs, strict=True)
    )
    pairs = [(one.lives, run.lives) for one, run in zip(simulated, record.runs, strict=True)]
    comparisons = compare_all([metrics_of(p) for p, _ in pairs], [metrics_of(m) for _, m in pairs])
    services = [(service(m), service(p)) for p, m in pairs]
    return Level(
        record,
        predictor,
        simulated,
        tuple(draws[index] for index in same),
        (*comparisons, *_state(record, simulated)),
        _request_errors(pairs),
        _request_errors([(a, b) for (_, a), (_, b) in pairwise(pairs) if a.same_load(b)]),
        tuple((m, p) for m, p in services if m is not None and p is not None),
        logs,
        tuple(found for found in decompositions if found is not None),
        tuple(step_errors(logs)) if logs else (),
    )


def _request_errors(pairs: Sequence[tuple[Lives, Lives]]) -> dict[str, tuple[RequestErrors | None, ...]]:
    """By latency, of pairs of (predicted, measured)."""
    return {
        metric: tuple(request_errors(getattr(p, name), getattr(m, name)) for p, m in pairs)
        for metric, name in (("ttft_ms", "ttft_s"), ("tpot_ms", "tpot_s"), ("e2el_ms", "e2el_s"))
    }


def _first_alike(runs: Sequence[ServedRun], index: int) -> int:
    return next(other for other in range(index + 1) if runs[other].lives.same_load(runs[index].lives))


def _state(record: ServedRecord, simulated: Sequence[SimulatedRun]) -> list[Comparison]:
    """Running requests and KV usage, from steps where both sides have them in every run."""
    engine = record.engine
    if all(run.steps is not None for run in record.runs):
        measured = [
            state.of_steps([step.shape for step in run.steps], [device_s(step) for step in run.steps], engine)
            for run in record.runs
        ]
        predicted = [
            state.of_steps([step.shape for step in run.steps], [step.device_s for step in run.steps], engine)
            for run in simulated
        ]
    else:
        has_scheduled = all(run.lives.scheduled_s is not None for run in record.runs)
        measured = [state.of_lives(run.lives, engine) for run in record.runs]
        predicted = [state.of_lives(_as_known(run.lives, has_scheduled), engine) for run in simulated]
    return compare_all(predicted, measured)


def _as_known(lives: Lives, has_scheduled: bool) -> Lives:
    """A simulated request's life as far as the other side can know its own."""
    return lives if has_scheduled else replace(lives, scheduled_s=None)


def _notes(level: Level) -> Iterable[str]:
    yield from level.predictor.notes
    if level.record.num_skipped:
        count = level.record.num_skipped
        yield (
            f"{level.record.name} left out {count} {'request' if count == 1 else 'requests'} of its workload that the "
            "engine could not run; neither side has them"
        )


# ---- several levels --------------------------------------------------------------------------------------------------


def _intervals(level: Level) -> dict[str, Interval | None]:
    found = {}
    for metric in WITH_INTERVAL:
        here = level.comparison(metric)
        if here is None:
            continue
        found[metric] = around(here.predicted_median, metric_values(level.draws[0], metric))
    return found


def _saturation(levels: Sequence[Level]) -> Saturation | None:
    """Of levels with the same engine; the median run of each."""
    pairs = [_median_service(level.services) for level in levels if level.services]
    if not pairs:
        return None
    return saturation([measured for measured, _ in pairs], [predicted for _, predicted in pairs])


def _median_service(services: Sequence[tuple[Service, Service]]) -> tuple[Service, Service]:
    def median(side: Sequence[Service]) -> Service:
        return Service(
            statistics.median(one.offered_per_s for one in side),
            statistics.median(one.served_per_s for one in side),
            sum(one.is_past_knee for one in side) * 2 > len(side),
        )

    measured, predicted = zip(*services, strict=True)
    return median(measured), median(predicted)


def _series_names(records: Sequence[ServedRecord]) -> list[str]:
    """One for each, with as much of the settings as tells them apart."""
    names = []
    for record in records:
        engine = record.engine
        weights = f", {engine.quantization} weights" if engine.quantization else ""
        names.append(f"{engine.model}{weights}, {engine.kv_cache_dtype} KV")
    if len(set(names)) == len(names):
        return names
    return [
        f"{name}, {record.engine.num_kv_blocks:,} blocks, max_num_seqs {record.engine.max_num_seqs}, "
        f"max_num_batched_tokens {record.engine.max_num_batched_tokens}, {record.engine.gpu or 'a CPU'} "
        f"{record.engine.device_id or ''}".rstrip()
        for name, record in zip(names, records, strict=True)
    ]


def _coverages(levels: Sequence[Level], intervals: Sequence[Mapping[str, Interval | None]]) -> dict[str, Coverage]:
    points: dict[str, list[tuple[Interval | None, float]]] = {}
    for level, of_metrics in zip(levels, intervals, strict=True):
        for metric, held in of_metrics.items():
            points.setdefault(metric, []).extend((held, value) for value in level.comparison(metric).measured)
    every = [point for of_metric in points.values() for point in of_metric]
    return {"all": coverage(every)} | {metric: coverage(of_metric) for metric, of_metric in points.items()}


def _figures(levels: Sequence[Level], saturations: Mapping[str, Saturation]) -> Iterable[Figure]:
    for metric, limit in LIMITS.items():
        found = [
            (level.record.name, here)
            for level in levels
            if (here := level.comparison(metric)) is not None and here.error is not None
        ]
        if found:
            yield Figure(
                metric, limit, tuple((name, here.error) for name, here in found), sum(bool(h.is_met) for _, h in found)
            )
    points = [(name, found.error) for name, found in saturations.items() if found.error is not None]
    if points:
        yield Figure(
            "saturation_requests_per_s",
            SATURATION_LIMIT,
            tuple(points),
            sum(abs(error) <= SATURATION_LIMIT for _, error in points),
        )
    mixed = [(level.record.name, step) for level in levels for step in level.steps if step.kind == ALL_MIXED]
    for statistic, limit in MIXED_STEP_LIMITS.items():
        errors = tuple((name, getattr(step, statistic)) for name, step in mixed)
        if errors:
            yield Figure(f"mixed_step_s.{statistic}", limit, errors, sum(error <= limit for _, error in errors))


# ---- JSON ------------------------------------------------------------------------------------------------------------


def document(found: Study, **about: Any) -> dict[str, Any]:
    """What `--json` writes; errors, spreads and limits are shares."""
    return {
        "version": VERSION,
        "kind": KIND,
        **about,
        "interval_level": LEVEL,
        "is_met": found.is_met,
        "figures": [
            asdict(figure)
            | {
                "errors": dict(figure.errors),
                "is_met": figure.is_met,
                "worst": figure.worst[1],
                "median": figure.median,
            }
            for figure in found.figures
        ],
        "saturation": {name: asdict(one) for name, one in found.saturations.items()},
        "coverage": {name: asdict(one) | {"share": one.share} for name, one in found.coverages.items()},
        "notes": list(found.notes),
        "levels": [_level_document(*pair) for pair in zip(found.levels, found.intervals, strict=True)],
    }


def _level_document(level: Level, intervals: Mapping[str, Interval | None]) -> dict[str, Any]:
    record = level.record
    engine = asdict(record.engine)
    engine.pop("model_config")
    return {
        "record": record.name,
        "source": record.source,
        "command": record.command,
        "commit": record.commit,
        "workload": record.workload,
        "request_rate_per_s": record.request_rate_per_s,
        "num_requests": len(record.runs[0].lives),
        "num_runs": len(record.runs),
        "engine": engine,
        "step_times": level.predictor.origin,
        "metrics": {
            one.metric: {
                "measured": list(one.measured),
                "predicted": list(one.predicted),
                "error": one.error,
                "errors": list(one.errors),
                "spread": one.spread,
                "limit": one.limit,
                "is_met": one.is_met,
                "interval": None if (held := intervals.get(one.metric)) is None else [held.low, held.high],
            }
            for one in level.comparisons
        },
        "requests": {name: [one and asdict(one) for one in of] for name, of in level.requests.items()},
        "repeats": {name: [one and asdict(one) for one in of] for name, of in level.repeats.items()},
        "service": [{"measured": asdict(m), "predicted": asdict(p)} for m, p in level.services],
        "steps": [asdict(one) for one in level.steps],
        "decomposition": [asdict(one) for one in level.decompositions],
    }
