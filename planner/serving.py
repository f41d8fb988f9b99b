"""A simulation as clients see it: with the time that requests spend outside of the engine's steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planner import simulation
from planner.simulation import SimulationOptions, SimulationResult, System
from planner.simulation.metrics import evaluate
from planner.simulation.simulator import warmup_seconds
from planner.step_time import StepTime
from planner.workload import Workload


def arrival_seconds(step_time: StepTime) -> float:
    """What every request takes on its way in and its first token on the way out, where that is known apart; else 0."""
    of_target = getattr(step_time, "target", step_time)  # drafts come on top of a target's steps
    return getattr(of_target, "arrival_s", 0.0)


def simulate(workload: Workload, system: System, options: SimulationOptions | None = None) -> SimulationResult:
    """As `planner.simulation.simulate`, with `arrival_seconds` in every TTFT and E2EL before they are judged.

    Raises:
        UserError, SloLost: as there.
    """
    options = options or SimulationOptions()
    added_s = arrival_seconds(system.step_time)
    if not added_s:
        return simulation.simulate(workload, system, options)
    warmup_s = warmup_seconds(workload, options)
    if added_s < 0:  # a limit that is lost inside may be met outside
        options = replace(options, stop_when_slo_is_lost=False)
    outcome = simulation.run(workload, system, options)
    for column in (outcome.requests.ttft_s, outcome.requests.e2el_s):
        np.maximum(column + added_s, 0.0, out=column)
    return evaluate(outcome, options.slo, warmup_s, options.seed)
