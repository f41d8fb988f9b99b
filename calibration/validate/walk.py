"""A recorded sequence of steps on another clock: the same steps in the same order, each as long as it is told to be.

This takes the scheduler out of a comparison. The rules are the simulator's (`planner.simulation.pipeline`): a step is
decided when the last but one has ended (with one in flight: when the last one has), launched by the host after that,
and begins on the device when enough of it is launched and the last one has ended. Where the engine had nothing to do
between two steps, the pause is kept.

Arrivals move with it: a request comes as long after the last decision before it as it did on the engine. If they did
not, a walk that is faster than the engine would wait for each of them, and what it gained would be lost again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calibration.validate.records import Lives, nearest
from engine.bench.step_log import LoggedStep


@dataclass(frozen=True, eq=False)
class Places:
    """Of each request, [n]: the steps in which it was first scheduled and sampled its first and last token.

    Attributes:
        arrival: the last step that was decided before the request came, -1 if none was. after_s: how long before.
    """

    arrival: np.ndarray
    after_s: np.ndarray
    scheduled: np.ndarray
    first_token: np.ndarray
    last_token: np.ndarray

    @classmethod
    def find(cls, lives: Lives, steps: Sequence[LoggedStep]) -> Places:
        """By their times, which the benchmark takes from the same clock readings as the steps'."""
        starts, ends = (np.array([getattr(step, name) for step in steps]) for name in ("start_s", "end_s"))
        before = np.searchsorted(starts, lives.arrival_s, side="right") - 1
        return cls(
            before,
            lives.arrival_s - np.where(before < 0, 0.0, starts[before]),
            nearest(starts, lives.scheduled_s),
            nearest(ends, lives.first_token_s),
            nearest(ends, lives.last_token_s),
        )


@dataclass(frozen=True, eq=False)
class Walk:
    """When each step was decided and when the host had its tokens, float64 [n] in seconds."""

    start_s: np.ndarray
    end_s: np.ndarray

    def lives(self, lives: Lives, places: Places) -> Lives:
        """The same requests with the times that this walk gives them; only differences are meant."""
        arrival_s = np.where(places.arrival < 0, 0.0, self.start_s[places.arrival]) + places.after_s
        return Lives(
            arrival_s,
            self.start_s[places.scheduled],
            self.end_s[places.first_token],
            self.end_s[places.last_token],
            lives.input_tokens,
            lives.output_tokens,
            lives.preemptions,
        )


def walk(steps: Sequence[LoggedStep], device_s: np.ndarray, host_s: np.ndarray, wait_s: np.ndarray, depth: int) -> Walk:
    """
    Args:
        steps: as they were recorded; they say which was launched while the one before it ran.
        device_s, host_s: float64 [n], how long each is to have the device, and the host for its launch.
        wait_s: float64 [n], from a decision until the device can begin, if nothing else is in its way.
        depth: steps in flight at once.
    """
    starts, seen = np.zeros(len(steps)), np.zeros(len(steps))
    end, end_before, launched = 0.0, 0.0, 0.0  # of the last step and the last but one
    for n, step in enumerate(steps):
        pause = step.start_s - (steps[n - 1].end_s if n else 0.0)
        if depth > 1 and n and pause < 0:
            decided = max(end_before, launched)
        else:
            decided = (seen[n - 1] if n else 0.0) + max(pause, 0.0)
        launched = decided + host_s[n]
        if n and decided < end:
            # The last step may end while this one is launched; the host looks at its tokens afterwards.
            seen[n - 1] = max(end, launched)
        end_before, end = end, max(end, decided + wait_s[n]) + device_s[n]
        starts[n], seen[n] = decided, max(end, launched)
    return Walk(starts, seen)
