"""A discrete-event simulation of replicas behind a router, each running the engine's own scheduler."""

from planner.simulation.acceptance import AcceptanceProcess
from planner.simulation.metrics import SLO, Distribution, SimulationResult, Verdict
from planner.simulation.simulator import SimulationOptions, Speculation, System, simulate

__all__ = [
    "SLO",
    "AcceptanceProcess",
    "Distribution",
    "SimulationOptions",
    "SimulationResult",
    "Speculation",
    "System",
    "Verdict",
    "simulate",
]
