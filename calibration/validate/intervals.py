"""What a prediction may be off by: step times that are not known exactly, and an engine that differs from itself.

Step times are uncertain by a factor for steps of decodes alone, one for prompts and one for the host. All are drawn
from log-normal distributions and the load is simulated with them; the draws are stratified, so that few of them reach
both tails. Around each the engine's own repeats are spread, as they are known from records with several runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy.special import stdtrit

from planner.intervals import perturbed, scale_quantiles
from planner.step_time import StepTime

LEVEL = 0.90
_NOISE_POINTS = 41


class Uncertain(Protocol):
    """A step-time model that says how well it is known.

    Attributes:
        uncertainty: relative standard deviations `decode`, `prefill` and `host`.
    """

    uncertainty: Any

    def scaled(self, *, decode: float, prefill: float, host: float) -> StepTime:
        """The same with all times of decodes, of prompts and of the host multiplied."""


def drawn(step_time: StepTime, number: int, seed: int = 0) -> list[StepTime]:
    """`number` step-time models that may be the true one; none where it is not known how uncertain they are."""
    if getattr(step_time, "uncertainty", None) is None or number < 1:
        return []
    return [perturbed(step_time, *errors) for errors in scale_quantiles(number, seed)]


@dataclass(frozen=True)
class Spread:
    """The relative standard deviation of an engine's repeats, and the degrees of freedom it rests on."""

    deviation: float
    degrees: int


def spread_of(levels: Sequence[Sequence[float]]) -> Spread | None:
    """Pooled over load levels of one metric.

    Args:
        levels: the runs of each; levels of a single run, or of nothing but zeros, say nothing.
    """
    squares, degrees = 0.0, 0
    for runs in levels:
        if len(runs) > 1 and statistics.fmean(runs):
            squares += (len(runs) - 1) * statistics.variance(runs) / statistics.fmean(runs) ** 2
            degrees += len(runs) - 1
    return Spread((squares / degrees) ** 0.5, degrees) if degrees else None


def spread_at(level: Sequence[float], levels: Sequence[Sequence[float]]) -> Spread | None:
    """Of one of the levels: half what it says itself, half what all of them say.

    Repeats of one level are too few to rest on, and the spread grows towards saturation.
    """
    pooled, own = spread_of(levels), spread_of([level])
    if pooled is None or own is None:
        return pooled
    return Spread(((pooled.deviation**2 + own.deviation**2) / 2) ** 0.5, pooled.degrees)


@dataclass(frozen=True)
class Interval:
    """Of `LEVEL` of the measurements."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


def interval(nominal: float, draws: Sequence[float], spread: Spread | None) -> Interval | None:
    """The central interval of a metric.

    Args:
        nominal: predicted with the step times as they are.
        draws: predicted with drawn ones; may be empty.

    Returns:
        None where nothing is known of what it may be off by.
    """
    if not draws and spread is None:
        return None
    values = np.array(draws if len(draws) else [nominal], float)
    if spread is not None:
        quantiles = (np.arange(_NOISE_POINTS) + 0.5) / _NOISE_POINTS
        # Few repeats have a heavy tail, which is no reason to leave the range of numbers.
        noise = np.exp(np.clip(spread.deviation * stdtrit(spread.degrees, quantiles), -5.0, 5.0))
        values = np.outer(values, noise).ravel()
    # Hazen's: draw i of n stands for the quantile (i - 1/2) / n.
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="hazen")
    return Interval(float(low), float(high))


@dataclass(frozen=True)
class Coverage:
    """How many measurements lie within their intervals."""

    inside: int
    of: int

    @property
    def share(self) -> float | None:
        return self.inside / self.of if self.of else None


def coverage(points: Sequence[tuple[Interval | None, float]]) -> Coverage:
    """Of (interval, measurement) pairs; those without an interval do not count."""
    judged = [interval.holds(value) for interval, value in points if interval is not None]
    return Coverage(sum(judged), len(judged))


def metric_values(draws: Sequence[Mapping[str, float]], metric: str) -> list[float]:
    """The metric in each draw that has it."""
    return [found[metric] for found in draws if metric in found]
