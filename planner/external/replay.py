"""Replay a served run through the simulator: the same arrivals and lengths, one row per request."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from planner.errors import UserError
from planner.external.scaled import Factors, ScaledStepTime
from planner.external.served_run import ServedRun
from planner.simulation import System, run


@dataclass(frozen=True, slots=True)
class Replayed:
    """Latencies of each request of a run, in the run's order.

    Attributes:
        ttft_s, e2el_s, tpot_s: float64 [n]; TPOT is NaN for answers of one token.
        num_preemptions: in the whole run.
    """

    ttft_s: np.ndarray
    e2el_s: np.ndarray
    tpot_s: np.ndarray
    num_preemptions: int


def replay(served: ServedRun, system: System, factors: Factors | None = None) -> Replayed:
    """Simulate a run on `system`, its step time scaled by `factors`.

    Raises:
        UserError: a request that the system cannot take; it served the run, so a setting must be wrong.
    """
    factors = factors or Factors()
    workload = served.workload()
    longest = int((workload.input_tokens + workload.output_tokens).max())
    if longest > system.scheduler.max_model_len:
        raise UserError(
            f"{served.name} has a request of {longest} tokens, but max_model_len is {system.scheduler.max_model_len}: "
            "the settings are not those of the server that answered it"
        )
    scaled = replace(system, step_time=ScaledStepTime(system.step_time, factors))
    log = run(workload, scaled).requests
    e2el_s = log.e2el_s + factors.arrival_s
    gaps = (workload.output_tokens - 1).astype(np.float64)
    gaps[gaps == 0] = np.nan
    tpot_s = (log.e2el_s - log.ttft_s) / gaps
    return Replayed(log.ttft_s + factors.arrival_s, e2el_s, tpot_s, int(log.preemptions.sum()))
