"""Steps with prompt chunks that take their own time when nothing is in flight, by hand and against the general rule."""

import numpy as np
import pytest

from engine.scheduling import KVCacheConfig, SchedulerConfig, StepShape
from planner.simulation import System, simulate
from planner.step_time import TICKS_PER_SECOND, StepTime
from planner.workload import Workload

MS = TICKS_PER_SECOND // 1000


class Prompts(StepTime):
    """Prompt steps of three given times, in ms; decode steps of 5, launched in 1."""

    def __init__(self, ticks: int, host: int, alone: int | None) -> None:
        self.prompt, self.host, self.alone = ticks, host, alone

    def predict(self, step: StepShape) -> float:
        return self.ticks(step) / TICKS_PER_SECOND

    def ticks(self, step: StepShape) -> int:
        return (self.prompt if step.prefills else 5) * MS

    def host_ticks(self, step: StepShape) -> int:
        return (self.host if step.prefills else 1) * MS

    def wait_ticks(self, step: StepShape) -> int:
        if self.alone is None or not step.prefills:
            return super().wait_ticks(step)
        return self.alone * MS - self.ticks(step)


def run(step_time: StepTime, depth: int, outputs: int = 3, arrivals=(0.0,)):
    count = len(arrivals)
    workload = Workload("by hand", np.array(arrivals), np.full(count, 40), np.full(count, outputs))
    system = System(SchedulerConfig(64, 8, 100), KVCacheConfig(100, 16), step_time, pipeline_depth=depth)
    return simulate(workload, system)


@pytest.mark.parametrize(
    ("host", "alone", "first", "last"),
    [
        # The device begins before the launch is over; the decode is launched meanwhile: 12, 17, 22.
        (4, 12, 12, 22),
        # The same by the default, launch and then compute: 14, 19, 24.
        (4, None, 14, 24),
        # A long way to the tokens: 30, 35, 40.
        (4, 30, 30, 40),
        # The host is still launching when the step ends, then launches the decode at 15, and looks at 16; that decode
        # ends at 21 and the next, decided at 16, at 26.
        (15, 12, 16, 26),
    ],
)
def test_with_two_steps_in_flight(host, alone, first, last):
    result = run(Prompts(10, host, alone), 2)
    assert result.ttft_ms.mean == pytest.approx(first)
    assert result.e2el_ms.mean == pytest.approx(last)


@pytest.mark.parametrize(("host", "alone", "first"), [(4, 12, 12), (4, None, 14), (4, 30, 30), (15, 12, 15)])
def test_with_one(host, alone, first):
    result = run(Prompts(10, host, alone), 1)
    assert result.ttft_ms.mean == pytest.approx(first)
    assert result.e2el_ms.mean == pytest.approx(first + 2 * 6)


def test_a_prompt_behind_a_step_takes_its_ticks_and_no_less_than_alone():
    """B comes 1 ms after A's first token, in the middle of a decode of 5 ms; at its end another one begins."""
    for alone in (12, 14, 20):
        result = run(Prompts(10, 4, alone), 2, outputs=20, arrivals=(0.0, alone / 1000 + 0.001))
        # That other one was decided when A's first token came; B is decided as it begins, and follows it.
        decided = alone + 5
        assert result.ttft_ms.max == pytest.approx(max(decided + 5 + 10, decided + alone) - alone - 1, abs=1e-6)
