"""What `memwall simulate --output json` writes."""

from __future__ import annotations

from dataclasses import asdict, replace

from planner.advice import examine
from planner.deployment import Deployment
from planner.memory import MemoryReport
from planner.records import DeploymentRecord, SLORecord
from planner.schema import Record
from planner.simulation import SimulationOptions, SimulationResult
from planner.workload import Workload, WorkloadSummary


class SimulateReport(Record):
    """One deployment under one workload: the question and the answer."""

    deployment: DeploymentRecord
    """What was simulated, with every default filled in."""
    workload: WorkloadSummary
    """The load; `infinite_cache_hit_rate` is what an unlimited prefix cache would reach."""
    slo: SLORecord
    """The limits that the result was judged by."""
    memory: MemoryReport
    """The memory of one replica."""
    result: SimulationResult | None
    """What happened; None if the deployment does not fit, and `memory.reason` says why."""

    @property
    def is_yes(self) -> bool:
        """Whether the answer is yes: it fits, and meets the SLO if there is one."""
        return self.result is not None and self.result.slo_met is not False


def simulate_report(
    workload: Workload, deployment: Deployment, options: SimulationOptions, quantization: str | None = None
) -> SimulateReport:
    """Simulate a deployment, if it fits.

    Args:
        workload: the load.
        deployment: one configuration.
        options: seed, SLO, warm-up.
        quantization: what the model was loaded with.

    Raises:
        UserError: as `planner.advice.examine`, and for settings out of their range.
    """
    deployment = replace(deployment, router=deployment.router_for(workload))
    memory = deployment.memory(with_remedies=True)
    return SimulateReport(
        deployment=DeploymentRecord.from_deployment(deployment, quantization),
        workload=workload.summary(),
        slo=SLORecord(**asdict(options.slo)),
        memory=memory,
        result=examine(workload, deployment, options, memory) if memory.fits else None,
    )
