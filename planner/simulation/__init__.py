"""A discrete-event simulation of replicas behind a router, each running the engine's own scheduler."""

from planner.simulation.acceptance import AcceptanceProcess
from planner.simulation.log import SloLost
from planner.simulation.metrics import Distribution, SimulationResult, Verdict
from planner.simulation.simulator import SimulationOptions, Speculation, System, run, simulate
from planner.simulation.slo import SLO

__all__ = [
    "SLO",
    "AcceptanceProcess",
    "Distribution",
    "SimulationOptions",
    "SimulationResult",
    "SloLost",
    "Speculation",
    "System",
    "Verdict",
    "run",
    "simulate",
]
