"""What steps with prompts take the GPU that wait for the CPU among their like.

    among their like   CPU   | launch n     | launch n + 1 |          launch after launch,
                       GPU     | n . . . . |  | n + 1 . . |           each kernel as it comes

    behind a prompt    CPU   | launch n     |
                       GPU   | the prompt . . . . | n |               all kernels there when it begins

Served steps are launched behind others, so the second is what a model of the GPU needs; the first tells of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from calibration.measure.grid import PREFILL, Point, Room
from calibration.measure.steps import StepRunner
from planner.profile.tables import Point as MeasuredPoint

# Tokens of prompts that may keep the GPU busy while a step is launched, and how much longer one must take than that.
_SIZES, _LONG_ENOUGH = (512, 1024, 2048, 4096, 8192), 1.5


class Ahead:
    """Measures such steps again, behind a prompt that takes long enough.

    Args:
        known: what has been measured of a point already, or None.
    """

    def __init__(self, runner: StepRunner, room: Room, known: Callable[[Point], dict[str, Any] | None]) -> None:
        self._runner, self._room, self._known = runner, room, known
        self._prompts_s: dict[int, float | None] = {}

    def seconds(self, point: Point, measured: dict[str, Any]) -> float | None:
        """On the GPU; None where `measured` tells as much, there is no GPU, or the engine has no room for both.

        Args:
            measured: what `StepRunner.measure` says of the point.
        """
        if not MeasuredPoint.from_json(measured).is_host_bound:
            return None
        for tokens in sorted({self._room.padded(size) for size in _SIZES}):
            before = Point(PREFILL, ((tokens, 0),))
            if not self._room.holds_stream([before, point]):
                return None
            seconds = self._prompt_s(before)
            if seconds is not None and seconds >= _LONG_ENOUGH * measured["host_s"]:
                return self._runner.ahead_s(point, before)
        return None

    def _prompt_s(self, prompt: Point) -> float | None:
        if prompt.num_tokens not in self._prompts_s:
            self._prompts_s[prompt.num_tokens] = (self._known(prompt) or self._runner.measure(prompt))["gpu_s"]
        return self._prompts_s[prompt.num_tokens]
