"""How long one engine step takes: the one thing that differs between the engine's clock and the simulator's.

A step-time model implements `predict`. Everything else has a default that follows from it, so that a measured profile
replaces the roofline without a change to the simulator.

The simulator's clock counts integer ticks of one femtosecond. Integers add up to the same sum in any order, which is
what lets it leap over many steps and land on exactly the tick that single steps reach.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import isqrt
from typing import TYPE_CHECKING

from engine.scheduling import StepShape
from planner.errors import UserError

if TYPE_CHECKING:
    from planner.profile.clock import ClockModel

TICKS_PER_SECOND = 10**15

# A step that takes an hour is a broken profile, not a slow GPU.
MAX_STEP_SECONDS = 3600.0


# The most steps whose durations are listed one by one.
_LISTED_STEPS = 64


class Evidence(StrEnum):
    """What a predicted step time rests on."""

    UNCALIBRATED = "uncalibrated"
    MEASURED = "measured"
    INTERPOLATED = "interpolated"
    EXTRAPOLATED = "extrapolated"
    #: Another model's times, scaled to what an engine that was only seen from outside did.
    SCALED = "scaled"


#: For saying of several which one to worry about.
WEAKEST_FIRST = (
    Evidence.UNCALIBRATED,
    Evidence.EXTRAPOLATED,
    Evidence.SCALED,
    Evidence.INTERPOLATED,
    Evidence.MEASURED,
)


@dataclass(frozen=True, slots=True)
class Uncertainty:
    """Relative standard deviations of the time that all steps of a kind take together in a run.

    What is the same for all of them (the state of the device, the build) counts in full. Where single shapes are off
    independently of each other, a run that has many of them feels the mean; `planner.profile.fit` says how that is
    told apart. So it is one factor for all steps of a kind, unknown but the same.

    Attributes:
        decode: of steps of decodes alone.
        prefill: of steps with prompt chunks.
        host: of what the host takes to launch a step, where that is told by itself.
    """

    decode: float
    prefill: float
    host: float = 0.0


class DecodeRun(ABC):
    """The durations of consecutive decode steps of one fixed batch, whose contexts grow by one token a step.

    Attributes:
        steps: how many it covers, at least 1; possibly fewer than were asked for.
    """

    steps: int

    @abstractmethod
    def cumulative(self, steps: int) -> int:
        """Ticks that the first `steps` steps take."""

    @abstractmethod
    def segments(self, steps: int) -> Sequence[tuple[int, int, int]]:
        """The durations of the first `steps` steps as (first, increment, count) runs, in ticks."""

    def steps_until(self, elapsed: int) -> int:
        """The fewest steps, at least 1, that take `elapsed` ticks or more; all of them if none do."""
        low, high = 0, self.steps
        while high - low > 1:
            middle = (low + high) // 2
            if self.cumulative(middle) >= elapsed:
                high = middle
            else:
                low = middle
        return high


class AffineRun(DecodeRun):
    """Durations that grow by the same increment each step: contexts grow, and each cached token costs the same."""

    __slots__ = ("first", "increment", "steps")

    def __init__(self, first: int, increment: int, steps: int) -> None:
        self.first = first
        self.increment = increment
        self.steps = steps

    def cumulative(self, steps: int) -> int:
        return _progression(self.first, self.increment, steps)

    def segments(self, steps: int) -> Sequence[tuple[int, int, int]]:
        return ((self.first, self.increment, steps),)

    def steps_until(self, elapsed: int) -> int:
        first, increment = self.first, self.increment
        if increment == 0:
            steps = -(-elapsed // first)
        else:
            # The positive root of increment/2 n^2 + (first - increment/2) n = elapsed, then made exact.
            linear = 2 * first - increment
            steps = (isqrt(linear * linear + 8 * increment * elapsed) - linear) // (2 * increment)
            while self.cumulative(steps) < elapsed:
                steps += 1
        return min(max(steps, 1), self.steps)


class PiecewiseRun(DecodeRun):
    """Arithmetic progressions, one after another.

    Args:
        segments: (first, increment, count) of each, in ticks; durations are positive.
    """

    __slots__ = ("_segments", "_steps_before", "_ticks_before", "steps")

    def __init__(self, segments: Sequence[tuple[int, int, int]]) -> None:
        self._segments = list(segments)
        self._steps_before, self._ticks_before = [0], [0]
        for first, increment, count in segments:
            self._steps_before.append(self._steps_before[-1] + count)
            self._ticks_before.append(self._ticks_before[-1] + _progression(first, increment, count))
        self.steps = self._steps_before[-1]

    def cumulative(self, steps: int) -> int:
        i = bisect_right(self._steps_before, steps, hi=len(self._segments)) - 1
        first, increment, _ = self._segments[i]
        return self._ticks_before[i] + _progression(first, increment, steps - self._steps_before[i])

    def segments(self, steps: int) -> Sequence[tuple[int, int, int]]:
        found = []
        for before, (first, increment, count) in zip(self._steps_before, self._segments, strict=False):
            if before >= steps:
                break
            found.append((first, increment, min(count, steps - before)))
        return found


def _progression(first: int, increment: int, count: int) -> int:
    return first * count + increment * (count * (count - 1) // 2)


class TableRun(DecodeRun):
    """Durations listed one by one."""

    __slots__ = ("_cumulative", "durations", "steps")

    def __init__(self, durations: list[int]) -> None:
        self.durations = durations
        self.steps = len(durations)
        self._cumulative = [0]
        for duration in durations:
            self._cumulative.append(self._cumulative[-1] + duration)

    def cumulative(self, steps: int) -> int:
        return self._cumulative[steps]

    def segments(self, steps: int) -> Sequence[tuple[int, int, int]]:
        return [(duration, 0, 1) for duration in self.durations[:steps]]


class DelayedRun(DecodeRun):
    """Another run, each step of which takes the same while longer."""

    __slots__ = ("_delay", "_run", "steps")

    def __init__(self, run: DecodeRun, delay: int) -> None:
        self._run = run
        self._delay = delay
        self.steps = run.steps

    def cumulative(self, steps: int) -> int:
        return self._run.cumulative(steps) + self._delay * steps

    def segments(self, steps: int) -> Sequence[tuple[int, int, int]]:
        return [(first + self._delay, increment, count) for first, increment, count in self._run.segments(steps)]


def delayed(run: DecodeRun, delay: int) -> DecodeRun:
    """The run with `delay` ticks more in every step."""
    return DelayedRun(run, delay) if delay else run


def floored(run: DecodeRun, floor: int) -> DecodeRun:
    """The run with no step shorter than `floor` ticks; possibly fewer of its steps."""
    shortest = longest = floor
    for first, increment, count in run.segments(run.steps):
        last = first + increment * (count - 1)
        shortest, longest = min(shortest, first, last), max(longest, first, last)
    if shortest >= floor:
        return run
    if longest <= floor:
        return AffineRun(floor, 0, run.steps)
    return TableRun([max(floor, ticks) for ticks in listed(run)])


def listed(run: DecodeRun) -> Iterator[int]:
    """The durations of its first steps one by one, in ticks: of so many that it pays, and not of more."""
    for first, increment, count in run.segments(min(run.steps, _LISTED_STEPS)):
        for number in range(count):
            yield first + increment * number


def led_by(first: Sequence[int], run: DecodeRun) -> DecodeRun:
    """The run with other durations of its first steps, in ticks; at most as many as it has."""
    if not first:
        return run
    segments, skipped = [(ticks, 0, 1) for ticks in first], len(first)
    for ticks, increment, count in run.segments(run.steps):
        skip = min(skipped, count)
        skipped -= skip
        if count > skip:
            segments.append((ticks + increment * skip, increment, count - skip))
    return PiecewiseRun(segments)


class StepTime(ABC):
    """Predicts step times. Same shape, same time: it holds no state that a prediction changes.

    A device whose clock gives way has a `clock`; then `ticks` is the steady time, and `heated_ticks` that at a given
    heat. Whoever runs the steps keeps the heat.
    """

    #: What the predictions rest on.
    evidence: Evidence = Evidence.UNCALIBRATED
    #: Whether `evidence_of` differs from step to step; otherwise `evidence` says it of all.
    evidence_varies: bool = False
    #: One line for people: where the times come from.
    description: str = ""
    #: How far the predictions may be off; None where nothing was measured that could tell.
    uncertainty: Uncertainty | None = None
    #: Steps that the engine behind these times keeps in flight.
    pipeline_depth: int = 1
    #: How the device slows down when it is hot; None where nothing is known of that.
    clock: ClockModel | None = None

    @abstractmethod
    def predict(self, step: StepShape) -> float:
        """Seconds from the start of a step to its sampled tokens, for a step with at least one request.

        Where `host_ticks` says how long the host takes to launch the step, the step starts on the device then, and
        this is its time there.
        """

    def ticks(self, step: StepShape) -> int:
        """`predict` in ticks, at least 1 so that the clock cannot stall.

        Raises:
            UserError: if the prediction is not a number between 0 and an hour.
        """
        return to_ticks(self.predict(step), step)

    def heated_ticks(self, step: StepShape, ticks: int, heat: float) -> int:
        """Ticks of a step that begins on the device at this heat, where there is a `clock`; `ticks` otherwise.

        Of a step of decodes alone nothing but `ticks` and the heat matters: leaps rely on it. `wait_ticks` and
        `launched_ticks` are the host's, and do not depend on the heat.

        Args:
            ticks: what `ticks` says of the step.
            heat: as `planner.profile.clock` has it.
        """
        return ticks

    def heating(self, step: StepShape) -> float:
        """The heat that a device comes to which runs nothing but such steps, if there is a `clock`; 0 for decodes."""
        return 1.0 if step.prefills else 0.0

    def host_ticks(self, step: StepShape) -> int:
        """Ticks from the decision to run a step to the end of its launch; the device starts it then at the earliest.

            host     | host_ticks(n) |  waits for n - 1    | host_ticks(n + 1) |
            device   |          step n - 1                 |        step n          | step n + 1 ...
                                                           |<------ ticks(n) ------>|

        The host's work between a step's end and the next decision, which is to update the scheduler, is part of it:
        the simulator decides at the very instant at which a step's tokens are on the host. Work that the host does
        while the device already computes (a launch in pieces) is not; where the device waits for it, it is the
        step's own time.

        For steps of decodes alone it must not depend on the contexts: a leap over many steps asks once. 0, the default,
        where `predict` has the host's time in it.
        """
        return 0

    def alone_ticks(self, step: StepShape) -> int:
        """Ticks from the decision to run a step to its tokens, if nothing is in flight.

        With a step in flight that ends at `e`, this one ends at max(e + ticks, decision + alone_ticks). A step with
        prompt chunks is launched while the device already computes, and may take less than host_ticks + ticks; the host
        looks for its tokens when its launch is over all the same.
        """
        return max(self.wait_ticks(step) + self.ticks(step), self.launched_ticks(step))

    def wait_ticks(self, step: StepShape) -> int:
        """Ticks from the decision to run a step until the device can begin, if nothing is in flight.

        For steps of decodes alone it must be host_ticks, the default: leaps rely on it.
        """
        return self.host_ticks(step)

    def launched_ticks(self, step: StepShape) -> int:
        """Ticks from the decision to run a step until its last kernel is launched: it does not end before, whatever
        its heat; 0 where that is not told."""
        return 0

    def evidence_of(self, step: StepShape) -> Evidence:
        """What the time of one step rests on."""
        return self.evidence

    def steps_inside(self, contexts: list[int], steps: int) -> int:
        """How many of the next `steps` decode steps are inside what was measured; those come first.

        Step j is one of them exactly if `evidence_of` does not call it EXTRAPOLATED.
        """
        return steps

    def scaled(self, decode: float = 1.0, prefill: float = 1.0, host: float = 1.0) -> StepTime:
        """The same with the times of steps of decodes, of steps with prompt chunks, and of the host multiplied."""
        return ScaledStepTime(self, decode, prefill, host)

    def decode_run(self, contexts: list[int], steps: int) -> DecodeRun:
        """The next `steps` plain decode steps of a batch with these context lengths, or as many as it cares to cover.

        Step j must last exactly `ticks(StepShape(decode_contexts=[c + j for c in contexts]))`.
        """
        shapes = (StepShape(decode_contexts=[c + j for c in contexts]) for j in range(min(steps, _LISTED_STEPS)))
        return TableRun([self.ticks(shape) for shape in shapes])


class DerivedStepTime(StepTime):
    """Times that are made of another model's, `inner`: what the host does, and what heat does to a step, is as there.

    Its `clock`, and all else that it says of itself, is for who derives to take over.
    """

    def __init__(self, inner: StepTime) -> None:
        self.inner = inner

    def heated_ticks(self, step: StepShape, ticks: int, heat: float) -> int:
        return self.inner.heated_ticks(step, ticks, heat)

    def heating(self, step: StepShape) -> float:
        return self.inner.heating(step)

    def host_ticks(self, step: StepShape) -> int:
        return self.inner.host_ticks(step)

    def wait_ticks(self, step: StepShape) -> int:
        return self.inner.wait_ticks(step)

    def launched_ticks(self, step: StepShape) -> int:
        return self.inner.launched_ticks(step)


class ScaledStepTime(DerivedStepTime):
    """Another model's times multiplied."""

    def __init__(self, inner: StepTime, decode: float, prefill: float, host: float = 1.0) -> None:
        super().__init__(inner)
        self.decode, self.prefill, self.host = decode, prefill, host
        self.evidence, self.evidence_varies = inner.evidence, inner.evidence_varies
        self.description, self.uncertainty = inner.description, inner.uncertainty
        self.pipeline_depth, self.clock = inner.pipeline_depth, inner.clock

    def _scale(self, step: StepShape) -> float:
        return self.prefill if step.prefills else self.decode

    def predict(self, step: StepShape) -> float:
        return self.inner.predict(step) * self._scale(step)

    def ticks(self, step: StepShape) -> int:
        return max(1, round(self.inner.ticks(step) * self._scale(step)))

    def evidence_of(self, step: StepShape) -> Evidence:
        return self.inner.evidence_of(step)

    def steps_inside(self, contexts: list[int], steps: int) -> int:
        return self.inner.steps_inside(contexts, steps)

    def host_ticks(self, step: StepShape) -> int:
        return round(self.inner.host_ticks(step) * self.host)

    def wait_ticks(self, step: StepShape) -> int:
        return round(self.inner.wait_ticks(step) * self.host)

    def launched_ticks(self, step: StepShape) -> int:
        return round(self.inner.launched_ticks(step) * self.host)

    def scaled(self, decode: float = 1.0, prefill: float = 1.0, host: float = 1.0) -> StepTime:
        return ScaledStepTime(self.inner, self.decode * decode, self.prefill * prefill, self.host * host)


def to_ticks(seconds: float, what: object) -> int:
    """A predicted duration in ticks, at least 1.

    Raises:
        UserError: if it is not a number between 0 and an hour.
    """
    if not (math.isfinite(seconds) and 0 <= seconds <= MAX_STEP_SECONDS):
        raise UserError(
            f"the step-time model predicts {seconds} s for {what}; a step takes between 0 and {MAX_STEP_SECONDS:g} s"
        )
    return max(1, round(seconds * TICKS_PER_SECOND))
