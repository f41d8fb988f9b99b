"""Step times, step by step over a recorded log: predicted against measured, by kind of step.

Measured is the time on the GPU, from a step's first operation to its last; on a CPU, where a step runs while it is
launched, the time from its start to its tokens.

Where the clock of the device gives way, a step is predicted at the heat that the recorded steps before it left behind,
by the same rules as the simulator's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.bench.step_log import LoggedStep
from planner.profile.clock import Heat, begins_on_device
from planner.step_time import TICKS_PER_SECOND, StepTime

DECODE, DECODE_EAGER = "decode, in a graph", "decode, eager"
PIECES, EAGER, MIXED = "with prompts, in pieces", "with prompts, eager", "with prompts"
ALL_MIXED = "all with prompts"


def kind_of(step: LoggedStep, largest_piece: int | None) -> str:
    """How the engine ran a step.

    Args:
        largest_piece: most tokens of a step in pieces, 0 for none; None if unknown.
    """
    if not (step.shape.prefills or step.shape.verifies):
        return DECODE if step.graph_size else DECODE_EAGER
    if largest_piece is None:
        return MIXED
    return PIECES if step.shape.num_tokens <= largest_piece else EAGER


def device_s(step: LoggedStep) -> float:
    """What is taken for a step's time on the device."""
    return step.duration_s if step.gpu_s is None else step.gpu_s


@dataclass(frozen=True, eq=False)
class PredictedLog:
    """A recorded log and what a step-time model says of its steps.

    Attributes:
        kinds: of each step.
        measured_s, device_s: float64 [n], measured and predicted time on the device.
        host_s, wait_s: float64 [n], predicted time of the host to launch it, and from the decision to run it until the
            device can begin. Where the log knows no time on the device both are 0, and that time has them in it.
    """

    steps: Sequence[LoggedStep]
    kinds: list[str]
    measured_s: np.ndarray
    device_s: np.ndarray
    host_s: np.ndarray
    wait_s: np.ndarray


def predict_log(steps: Sequence[LoggedStep], step_time: StepTime, largest_piece: int | None) -> PredictedLog:
    """Every step of a log, predicted."""
    steady = [step_time.ticks(step.shape) for step in steps]
    host = np.array([step_time.host_ticks(step.shape) for step in steps]) / TICKS_PER_SECOND
    wait = np.array([step_time.wait_ticks(step.shape) for step in steps]) / TICKS_PER_SECOND
    begins = begins_s(steps, wait)
    device = np.array(_at_their_heat(steps, steady, begins, step_time)) / TICKS_PER_SECOND
    device = np.maximum(device, _until_launched_s(steps, begins, step_time))
    is_whole = np.array([step.gpu_s is None for step in steps], bool)
    return PredictedLog(
        steps,
        [kind_of(step, largest_piece) for step in steps],
        np.array([device_s(step) for step in steps]),
        device + np.where(is_whole, wait, 0.0),
        np.where(is_whole, 0.0, host),
        np.where(is_whole, 0.0, wait),
    )


def _until_launched_s(steps: Sequence[LoggedStep], begins: Sequence[float], step_time: StepTime) -> np.ndarray:
    """From the begin of the recorded steps until the host has launched all of them: they take as long at the least."""
    launched = np.array([step_time.launched_ticks(step.shape) for step in steps]) / TICKS_PER_SECOND
    starts = np.array([step.start_s for step in steps])
    return np.where(launched > 0, starts + launched - np.array(begins), 0.0)


def _at_their_heat(
    steps: Sequence[LoggedStep], steady: Sequence[int], begins: Sequence[float], step_time: StepTime
) -> list[int]:
    """What the steps take at the heat of the recorded device."""
    if step_time.clock is None:
        return list(steady)
    heat, found = Heat(step_time.clock.tau_s), []
    for step, ticks, begin in zip(steps, steady, begins, strict=True):
        found.append(step_time.heated_ticks(step.shape, ticks, heat.at(begin)))
        heat.ran(begin, begin + device_s(step), step_time.heating(step.shape))
    return found


def begins_s(steps: Sequence[LoggedStep], wait_s: np.ndarray) -> list[float]:
    """When each step began on the device: when the one before had ended, or its first work was launched.

    A log does not say. Ends are no help, as the host may look at a step's tokens long after it.

    Args:
        wait_s: float64 [n], from a decision until the device can begin.
    """
    earliest = (step.start_s + wait for step, wait in zip(steps, wait_s.tolist(), strict=True))
    return begins_on_device(earliest, map(device_s, steps))


@dataclass(frozen=True)
class StepErrors:
    """Of all steps of a kind.

    Attributes:
        measured_s, predicted_s: of all of them together: what a busy device spends.
        median, p90: of |relative error|. bias: median of the signed one.
    """

    kind: str
    count: int
    measured_s: float
    predicted_s: float
    median: float
    p90: float
    bias: float


def step_errors(logs: Sequence[PredictedLog]) -> list[StepErrors]:
    """By kind, the commonest first, and of all steps with prompts together if there are several kinds of them."""
    kinds = np.array([kind for log in logs for kind in log.kinds])
    measured = np.concatenate([log.measured_s for log in logs]) if logs else np.zeros(0)
    predicted = np.concatenate([log.device_s for log in logs]) if logs else np.zeros(0)
    names, counts = np.unique(kinds, return_counts=True)
    found = [
        _errors(str(name), measured[kinds == name], predicted[kinds == name])
        for name in names[np.argsort(-counts, kind="stable")]
    ]
    has_prompts = np.isin(kinds, (PIECES, EAGER, MIXED))
    if has_prompts.any():
        found.append(_errors(ALL_MIXED, measured[has_prompts], predicted[has_prompts]))
    return found


def _errors(kind: str, measured: np.ndarray, predicted: np.ndarray) -> StepErrors:
    errors = predicted / np.maximum(measured, 1e-6) - 1
    median, p90 = np.percentile(np.abs(errors), (50, 90))
    return StepErrors(
        kind,
        len(errors),
        float(measured.sum()),
        float(predicted.sum()),
        float(median),
        float(p90),
        float(np.median(errors)),
    )
