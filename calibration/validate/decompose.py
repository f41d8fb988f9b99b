"""Where an error comes from: the host, the step times, or the schedule.

    measured  ->  walk(measured device times)  ->  walk(predicted step times)  ->  simulation
              host                            step times                       schedule

Each arrow changes one thing. The first keeps the recorded steps and their measured times on the device, and replaces
what happens around them by the simulator's rules: what is lost there the simulator does not model. The second replaces
the measured by the predicted times. The third lets the scheduler decide, so it has the time until a request is first
scheduled, and what a batch that is larger or smaller for the errors before it makes of them. The parts add up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from calibration.validate.errors import LATENCIES, STATISTICS, metrics_of, relative_error
from calibration.validate.records import ServedRun
from calibration.validate.replay import SimulatedRun
from calibration.validate.steps import PredictedLog
from calibration.validate.walk import Places, walk
from engine.scheduling import StepShape

METRICS = tuple(f"{name}.{statistic}" for name in LATENCIES for statistic in STATISTICS)


@dataclass(frozen=True)
class Parts:
    """The error of one metric as a share of what was measured; `host` + `step_times` + `schedule` = `total`."""

    metric: str
    host: float
    step_times: float
    schedule: float
    total: float


@dataclass(frozen=True)
class Agreement:
    """How far the simulator decided the steps that the engine ran.

    Attributes:
        recorded, simulated: how many.
        first_difference: place of the first step that differs; None if none does.
        same_place: share of the recorded steps that the simulator has at the same place.
        somewhere: share of them that it has anywhere, each counted once.
    """

    recorded: int
    simulated: int
    first_difference: int | None
    same_place: float
    somewhere: float


@dataclass(frozen=True)
class Gaps:
    """What lies between the steps of one kind, in milliseconds, where one follows another without a pause.

    Attributes:
        gap: 10 %, 50 % and 90 % of the period from the tokens of the step before to its own, less its time on the
            device. Negative where the host saw the tokens of the step before late.
        late_launch: the same of the end of its launch, less the end of the step before; positive where the device
            may have waited.
        host: median of the host's time for it, and what is predicted for the launch.
        total_s: of all gaps together, in seconds.
    """

    kind: str
    count: int
    gap: tuple[float, float, float]
    late_launch: tuple[float, float, float]
    host: tuple[float, float]
    total_s: float


@dataclass(frozen=True)
class Queue:
    """Arrival to first being scheduled, in milliseconds, on both sides."""

    measured_mean: float
    measured_p50: float
    predicted_mean: float
    predicted_p50: float


@dataclass(frozen=True)
class Decomposition:
    """Of one run."""

    parts: tuple[Parts, ...]
    agreement: Agreement
    gaps: tuple[Gaps, ...]
    queue: Queue


def decompose(run: ServedRun, log: PredictedLog, simulated: SimulatedRun, depth: int) -> Decomposition | None:
    """None where the run has no step log, or no times of first being scheduled."""
    lives = run.lives
    if run.steps is None or lives.scheduled_s is None or simulated.steps is None:
        return None
    places = Places.find(lives, log.steps)
    measured = metrics_of(lives)
    on_host = walk(log.steps, log.measured_s, log.host_s, log.wait_s, depth)
    on_both = walk(log.steps, log.device_s, log.host_s, log.wait_s, depth)
    hosted, timed = (metrics_of(one.lives(lives, places)) for one in (on_host, on_both))
    whole = metrics_of(simulated.lives)
    queues = [
        np.concatenate([[waits.mean()], np.percentile(waits, [50])]) * 1e3
        for waits in (lives.scheduled_s - lives.arrival_s, simulated.lives.scheduled_s - lives.arrival_s)
    ]
    return Decomposition(
        tuple(
            _parts(metric, [found[metric] for found in (measured, hosted, timed, whole)])
            for metric in METRICS
            if measured.get(metric)
        ),
        agreement([step.shape for step in log.steps], [step.shape for step in simulated.steps]),
        tuple(gaps(log)),
        Queue(*(float(value) for queue in queues for value in queue)),
    )


def _parts(metric: str, values: Sequence[float]) -> Parts:
    measured, hosted, timed, whole = values
    return Parts(
        metric,
        (hosted - measured) / measured,
        (timed - hosted) / measured,
        (whole - timed) / measured,
        relative_error(whole, measured),
    )


def agreement(recorded: Sequence[StepShape], simulated: Sequence[StepShape]) -> Agreement:
    """Two sequences of steps, compared."""
    one, other = ([_key(shape) for shape in shapes] for shapes in (recorded, simulated))
    differing = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    end = None if len(one) == len(other) else min(len(one), len(other))
    equal = sum(a == b for a, b in zip(one, other, strict=False))
    common = sum((Counter(one) & Counter(other)).values())
    count = max(len(one), 1)
    return Agreement(len(one), len(other), next(differing, end), equal / count, common / count)


def _key(shape: StepShape) -> tuple[object, ...]:
    return (*map(tuple, shape.prefills), None, *shape.decode_contexts, None, *map(tuple, shape.verifies))


def gaps(log: PredictedLog) -> list[Gaps]:
    """By kind of step, the commonest first."""
    rows: dict[str, list[tuple[float, float, float, float]]] = {}
    for n, (before, step) in enumerate(pairwise(log.steps), 1):
        if step.start_s < before.end_s:
            gap = step.end_s - before.end_s - log.measured_s[n]
            late = step.start_s + step.host_s - before.end_s
            rows.setdefault(log.kinds[n], []).append((gap, late, step.host_s, log.host_s[n]))
    found = []
    for kind, values in sorted(rows.items(), key=lambda pair: -len(pair[1])):
        gap, late, *hosts = np.array(values).T
        shares = (tuple(np.percentile(column, (10, 50, 90)) * 1e3) for column in (gap, late))
        low_to_high = (tuple(float(value) for value in share) for share in shares)
        host = tuple(float(np.median(column) * 1e3) for column in hosts)
        found.append(Gaps(kind, len(values), *low_to_high, host, float(gap.sum())))
    return found
