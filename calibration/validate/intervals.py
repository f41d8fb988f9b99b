"""What a prediction may be off by: step times that are not known exactly, as `memwall plan` counts with them.

Step times are uncertain by a factor for steps of decodes alone, one for prompts and one for the host. All are drawn
from log-normal distributions and the load is simulated with them; the draws are stratified, so that few of them reach
both tails. How far a device differs from itself from one run to the next is part of that. What the repeats at hand
differ by is not: an interval that knows them has seen what it is tested on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from planner.intervals import LEVEL, Interval, interval, perturbed, scale_quantiles
from planner.step_time import StepTime

__all__ = ["LEVEL", "Coverage", "Interval", "Uncertain", "around", "coverage", "drawn", "metric_values"]


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


def around(nominal: float, draws: Sequence[float]) -> Interval | None:
    """The central interval of a metric.

    Args:
        nominal: predicted with the step times as they are.
        draws: predicted with drawn ones.

    Returns:
        None where nothing was drawn.
    """
    return interval(nominal, draws) if len(draws) else None


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
    judged = [interval.low <= value <= interval.high for interval, value in points if interval is not None]
    return Coverage(sum(judged), len(judged))


def metric_values(draws: Sequence[Mapping[str, float]], metric: str) -> list[float]:
    """The metric in each draw that has it."""
    return [found[metric] for found in draws if metric in found]
