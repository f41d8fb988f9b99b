"""What `memwall simulate --output json` writes."""

from __future__ import annotations

from dataclasses import asdict, replace

from planner.advice import examine
from planner.basis import StepTimes
from planner.deployment import Deployment
from planner.errors import UserError
from planner.intervals import NUM_DRAWS, Confidence, Draw, confidence, draws, simulate_draw, why_no_interval
from planner.jobs import check_jobs, map_jobs
from planner.memory import MemoryReport
from planner.records import DeploymentRecord, SLORecord
from planner.schema import Record
from planner.simulation import SimulationOptions, SimulationResult
from planner.workload import Workload, WorkloadSummary

# Larger loads are drawn only if somebody asks: each draw takes as long as the simulation itself. So many requests take
# about a second; prompts that are looked up in a prefix cache count by their pages.
_EASY_REQUESTS = 20_000
_PAGES_PER_REQUEST = 64
# Fewer in all draws together are simulated sooner than further processes have started.
_WORTH_PROCESSES = 20_000


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
    step_times: StepTimes | None = None
    """What the step times rest on; None without a result."""
    confidence: Confidence | None = None
    """Intervals, and the probability of meeting the SLO; None where `no_interval` says why."""
    no_interval: str | None = None
    """Why there are no intervals; None if there are, and without a result."""

    @property
    def is_yes(self) -> bool:
        """Whether the answer is yes: it fits, and meets the SLO if there is one."""
        return self.result is not None and self.result.slo_met is not False


def simulate_report(
    workload: Workload,
    deployment: Deployment,
    options: SimulationOptions,
    quantization: str | None = None,
    num_draws: int | None = 0,
    n_jobs: int = 1,
) -> SimulateReport:
    """Simulate a deployment, if it fits.

    The report does not depend on `n_jobs`.

    Args:
        workload: the load.
        deployment: one configuration.
        options: seed, SLO, warm-up.
        quantization: what the model was loaded with.
        num_draws: simulations for intervals; None for `NUM_DRAWS` where that is quick, 0 for none.
        n_jobs: processes; -1 for all cores.

    Raises:
        UserError: as `planner.advice.examine`, and for settings out of their range.
    """
    check_jobs(n_jobs)
    if num_draws is not None and num_draws < 0:
        raise UserError(f"--intervals is {num_draws}; it must be a number of simulations from 0 on")
    deployment = replace(deployment, router=deployment.router_for(workload))
    memory = deployment.memory(with_remedies=True)
    report = SimulateReport(
        deployment=DeploymentRecord.from_deployment(deployment, quantization),
        workload=workload.summary(),
        slo=SLORecord(**asdict(options.slo)),
        memory=memory,
        result=examine(workload, deployment, options, memory) if memory.fits else None,
    )
    if report.result is None:
        return report
    step_time = deployment.step_time()
    sure, reason = _confidence(workload, deployment, options, memory, report.result, num_draws, n_jobs)
    update = {"step_times": StepTimes.of(report.result, step_time), "confidence": sure, "no_interval": reason}
    return report.model_copy(update=update)


def _confidence(
    workload: Workload,
    deployment: Deployment,
    options: SimulationOptions,
    memory: MemoryReport,
    result: SimulationResult,
    num_draws: int | None,
    n_jobs: int,
) -> tuple[Confidence | None, str | None]:
    """The intervals, or why there are none."""
    step_time = deployment.step_time()
    reason = why_no_interval(step_time)
    if reason is not None:
        return None, reason
    requests = _effort(workload, deployment, memory)
    if num_draws is None:
        num_draws = NUM_DRAWS if requests <= _EASY_REQUESTS else 0
        reason = f"the load is large; --intervals {NUM_DRAWS} simulates it that many times more"
    if num_draws == 0:
        return None, reason or "--intervals 0 asked for none"
    arguments = [(workload, deployment, memory, options, draw) for draw in draws(num_draws, options.seed)]
    n_jobs = n_jobs if requests * num_draws >= _WORTH_PROCESSES else 1
    runs = [run for run in map_jobs(n_jobs, _draw, arguments) if run is not None]
    sure = confidence(result, runs, step_time, options.seed)
    return sure, None if sure else "no resampled load has a request that it takes"


def _draw(
    workload: Workload, deployment: Deployment, memory: MemoryReport, options: SimulationOptions, draw: Draw
) -> SimulationResult | None:
    return simulate_draw(workload, deployment.system(workload, memory), options, draw)


def _effort(workload: Workload, deployment: Deployment, memory: MemoryReport) -> float:
    """Requests that would take as long to simulate."""
    pages = 0
    if deployment.enable_prefix_caching and workload.prefix_block_hashes is not None:
        pages = int(workload.input_tokens.sum()) // memory.block_size
    return len(workload) + pages / _PAGES_PER_REQUEST
