"""Which deployments meet the SLO, and what each costs.

The space is GPU type × tensor parallelism × KV precision × max_num_seqs × draft length, and for each of these
engines the number of replicas. An engine is dropped without simulation if its KV format costs more quality than
allowed, if its memory does not hold one request, or if an idle replica already misses the SLO. For the others replicas
are tried by simulation: up from an estimate of the demand until the SLO is met, then by bisection, so that the plan
passes and one replica less fails. (More replicas need not always be better: routing changes which requests meet. What
is found is a point where one less fails.)
The cheapest plans are simulated again on resampled loads and with step times drawn from what is known of their error:
how often the SLO holds then is how likely the plan meets it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product

from planner.advice import cliff_warning
from planner.bounds import Floor, Floors, busy_replicas
from planner.deployment import Deployment, PriceList
from planner.errors import UserError
from planner.hardware import GpuSpec
from planner.intervals import NUM_DRAWS, NUM_LOADS, Draw, draws, simulate_draw
from planner.jobs import check_jobs, map_jobs
from planner.memory import KVCacheDtype, MemoryReport, validate_parallelism
from planner.model import ModelSpec
from planner.plan_report import (
    PlanReport,
    Rejection,
    RejectionCause,
    build_plan,
    build_report,
    choose_finalists,
    rank,
)
from planner.quality import KVQualityStudy, check_limit, load_kv_quality, quality_fault
from planner.serving import simulate
from planner.simulation import SLO, SimulationOptions, SimulationResult, SloLost
from planner.simulation.simulator import check_prompts, warmup_seconds
from planner.speculation import SpeculationConfig
from planner.workload import Workload

DEFAULT_TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)
DEFAULT_KV_CACHE_DTYPES = (KVCacheDtype.BFLOAT16, KVCacheDtype.FP8)
DEFAULT_MAX_NUM_SEQS = (64, 256)
DEFAULT_SLO = SLO(ttft_ms=1000.0, tpot_ms=50.0, percentile=99.0)
# How steeply replicas are added while the SLO fails, before bisection.
_GROWTH = 0.25


@dataclass(frozen=True)
class Question:
    """What is asked of the search.

    Attributes:
        engine: a deployment that carries every setting that is not searched; its gpu, tensor_parallel_size, replicas,
            kv_cache_dtype, max_num_seqs and speculation are replaced.
        workload, slo: the load, and what it must be served with.
        gpus: GPU types to consider.
        total_gpus: most GPUs of one type that a plan may use.
        tensor_parallel_sizes: those to consider; None for 1, 2, 4, 8 as far as they divide the model.
        kv_cache_dtypes, max_num_seqs: values to consider.
        draft_lengths: values of k to consider, where `speculation` is given; 0 is plain decoding.
        speculation: drafter and acceptance, or None.
        prices: USD per GPU hour.
        seed: of every random stream.
        num_finalists: plans that are simulated on resampled loads.
        num_draws: simulations per finalist, on resampled loads and with drawn step times; None for
            `planner.intervals.NUM_DRAWS`, or, where step times have no known error, `NUM_LOADS` loads, the given one
            included.
        quantization: what the model's weights were quantised to at load, for the record.
        kv_quality: what each KV format costs in quality; None if that is unknown.
        max_kv_perplexity_increase_percent: KV formats that may cost more, or were never measured, are no candidates;
            None for any.
    """

    engine: Deployment
    workload: Workload
    slo: SLO = DEFAULT_SLO
    gpus: tuple[GpuSpec, ...] = ()
    total_gpus: int = 64
    tensor_parallel_sizes: tuple[int, ...] | None = None
    kv_cache_dtypes: tuple[KVCacheDtype, ...] = DEFAULT_KV_CACHE_DTYPES
    max_num_seqs: tuple[int, ...] = DEFAULT_MAX_NUM_SEQS
    draft_lengths: tuple[int, ...] = (0,)
    speculation: SpeculationConfig | None = None
    prices: PriceList = field(default_factory=PriceList)
    seed: int = 0
    num_finalists: int = 3
    num_draws: int | None = None
    warmup_s: float | None = None
    reject_too_long: bool = False
    quantization: str | None = None
    kv_quality: KVQualityStudy | None = field(default_factory=load_kv_quality)
    max_kv_perplexity_increase_percent: float | None = None

    def __post_init__(self) -> None:
        check_limit(self.max_kv_perplexity_increase_percent)
        if not self.slo.limits():
            raise UserError("a plan needs an SLO: pass at least one of --ttft, --tpot, --e2el in milliseconds")
        if not self.gpus:
            raise UserError("a plan needs at least one GPU type: pass --system, e.g. h200_sxm,h100_sxm")
        for name in ("total_gpus", "num_draws"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        if self.num_finalists < 0:
            raise UserError(f"num_finalists must not be negative, not {self.num_finalists}")
        if self.speculation is None and any(self.draft_lengths):
            raise UserError("draft lengths above 0 need --speculative-config and acceptance rates")

    @property
    def model(self) -> ModelSpec:
        return self.engine.model

    def options(self, slo: SLO | None = None) -> SimulationOptions:
        """Simulation options for this question."""
        return SimulationOptions(
            seed=self.seed, slo=slo or self.slo, warmup_s=self.warmup_s, reject_too_long=self.reject_too_long
        )

    @property
    def measured_from_s(self) -> float:
        """End of the warm-up."""
        return warmup_seconds(self.workload, self.options())


@dataclass(frozen=True)
class Explored:
    """What the search found out about one engine.

    Attributes:
        engine: the engine, with one replica.
        num_candidates: replica counts that the GPU budget allows.
        num_simulations: simulations run.
        plan: the deployment with the fewest replicas that meets the SLO, and its simulation; None if there is none.
        rejection: why there is none.
    """

    engine: Deployment
    num_candidates: int
    num_simulations: int = 0
    memory: MemoryReport | None = None
    plan: tuple[Deployment, SimulationResult] | None = None
    rejection: Rejection | None = None


Progress = Callable[[int, int, str], None]


def plan(question: Question, n_jobs: int = -1, progress: Progress | None = None) -> PlanReport:
    """Search, and report every engine: as a ranked plan, or with the constraint that it fails.

    The report does not depend on `n_jobs`.

    Args:
        n_jobs: processes; -1 for all cores.
        progress: called with (done, total, what) as engines and finalists are finished.

    Raises:
        UserError: for input that makes no engine possible, and for an SLO that no engine of the search could meet even
            without load.
    """
    check_jobs(n_jobs)
    replace(question.engine, max_num_seqs=1).memory_settings()  # refuse what no engine of the search could be
    length = question.engine.max_model_len or question.model.max_position_embeddings
    budget = None if question.engine.enable_chunked_prefill else question.engine.max_num_batched_tokens
    check_prompts(question.workload, length, budget, question.reject_too_long)
    engines = list(engines_of(question))
    faults = [engine.calibration_fault() for engine in engines]
    if None not in faults:
        raise UserError(f"no engine of this search is one that was calibrated from outside ({faults[0]})")
    note = progress or (lambda done, total, what: None)
    explored = []
    for found in map_jobs(n_jobs, explore, [(question, engine) for engine in engines]):
        explored.append(found)
        note(len(explored), len(engines), "engines")
    _refuse_if_impossible(question, explored)
    plans = rank([build_plan(question, e.plan, e.memory) for e in explored if e.plan and e.memory])
    finalists = choose_finalists(plans, question.num_finalists)
    checks = [
        (question, finalist.deployment_used, draw, finalist.result if draw is None else None)
        for finalist in finalists
        for draw in draws_of(question, finalist.deployment_used)
    ]
    runs: list[list[SimulationResult]] = [[] for _ in finalists]
    owners = [place for place, each in enumerate(finalists) for _ in draws_of(question, each.deployment_used)]
    for done, (place, run) in enumerate(zip(owners, map_jobs(n_jobs, repeat, checks), strict=True), start=1):
        if run is not None:
            runs[place].append(run)
        note(done, len(checks), "draws")
    return build_report(question, explored, plans, finalists, runs)


def draws_of(question: Question, deployment: Deployment) -> list[Draw | None]:
    """What a finalist is simulated on: None for the given load, and draws."""
    if deployment.step_time().uncertainty is None:
        return [None, *draws((question.num_draws or NUM_LOADS) - 1, question.seed)]
    return [None, *draws(question.num_draws or NUM_DRAWS, question.seed)]


# ---- the space -----------------------------------------------------------------------------------------------------


def engines_of(question: Question) -> Iterator[Deployment]:
    """Every engine of the search, in a fixed order.

    Raises:
        UserError: if the given tensor-parallel sizes suit none of the GPUs.
    """
    budget = question.engine.max_num_batched_tokens
    batch_limits = [seqs for seqs in question.max_num_seqs if seqs <= budget]
    if not batch_limits:
        raise UserError(
            f"max_num_seqs ({min(question.max_num_seqs)}) must not exceed max_num_batched_tokens ({budget}): every "
            f"running request needs a token of each step's budget"
        )
    for gpu, tp in _shapes(question):
        for dtype, seqs, k in product(question.kv_cache_dtypes, batch_limits, question.draft_lengths):
            yield replace(
                question.engine,
                gpu=gpu,
                tensor_parallel_size=tp,
                replicas=1,
                kv_cache_dtype=dtype,
                max_num_seqs=seqs,
                speculation=question.speculation.with_k(k) if question.speculation else None,
            )


def _shapes(question: Question) -> list[tuple[GpuSpec, int]]:
    """GPU types and tensor-parallel sizes that go together.

    Raises:
        UserError: if a size that was asked for, or every default one, suits none of the GPUs.
    """
    complaints: dict[int, UserError] = {}
    shapes = []
    for gpu in question.gpus:
        for tp in question.tensor_parallel_sizes or DEFAULT_TENSOR_PARALLEL_SIZES:
            try:
                validate_parallelism(question.model, gpu, tp)
            except UserError as error:
                complaints.setdefault(tp, error)
                continue
            if tp > question.total_gpus:
                complaints[tp] = UserError(
                    f"tensor_parallel_size {tp} needs {tp} GPUs, but --total-gpus is {question.total_gpus}"
                )
                continue
            shapes.append((gpu, tp))
    possible = {tp for _, tp in shapes}
    for tp, complaint in complaints.items():
        if tp not in possible and (question.tensor_parallel_sizes or not possible):
            raise complaint
    return shapes


# ---- one engine ----------------------------------------------------------------------------------------------------


def explore(question: Question, engine: Deployment) -> Explored:
    """Find the fewest replicas of an engine that meet the SLO."""
    most = question.total_gpus // engine.tensor_parallel_size
    uncalibrated = engine.calibration_fault()
    if uncalibrated is not None:
        return Explored(engine, most, rejection=Rejection.of(question, engine, RejectionCause.PROFILE, uncalibrated))
    fault = quality_fault(engine.kv_cache_dtype, question.kv_quality, question.max_kv_perplexity_increase_percent)
    if fault is not None:
        return Explored(engine, most, rejection=Rejection.of(question, engine, RejectionCause.QUALITY, fault))
    memory = engine.memory()
    if not memory.fits:
        rejection = Rejection.of(question, engine, RejectionCause.MEMORY, memory.reason or "does not fit")
        return Explored(engine, most, rejection=rejection)
    step_time = engine.step_time()
    warmup_s = question.measured_from_s
    floor = Floors(question.workload, engine, step_time, warmup_s).violated(question.slo)
    if floor is not None:
        return Explored(engine, most, rejection=_floor_rejection(question, engine, floor))
    busy = busy_replicas(question.workload, engine, memory, step_time, warmup_s)
    return _search_replicas(question, engine, memory, busy, most)


def _floor_rejection(question: Question, engine: Deployment, floor: Floor) -> Rejection:
    reason = (
        f"{floor.term} p{question.slo.percentile:g} ≤ {floor.limit_ms:g} ms is out of reach: {floor.why} takes at "
        f"least {floor.at_least_ms:,.{0 if floor.at_least_ms >= 100 else 2}f} ms"
    )
    cause = RejectionCause.FLOOR
    return Rejection.of(question, engine, cause, reason, term=floor.term, at_least_ms=floor.at_least_ms)


def _search_replicas(question: Question, engine: Deployment, memory: MemoryReport, busy: int, most: int) -> Explored:
    tried: dict[int, SimulationResult | str] = {}

    def passes(replicas: int) -> bool:
        if replicas not in tried:
            tried[replicas] = _try(question, replace(engine, replicas=replicas), memory)
        return not isinstance(tried[replicas], str)

    high = min(busy, most)
    low = high - 1  # fails, or is below the estimate; `high` is the next to try
    while not passes(high):
        if high == most:
            cause, reason = RejectionCause.SLO, f"{tried[most]} even with {_sized(engine, most)}"
            if busy > most:
                cause = RejectionCause.GPUS
                reason = (
                    f"{tried[most]} with {_sized(engine, most)}, and the load would keep about {busy} replicas busy"
                )
            rejection = Rejection.of(question, engine, cause, reason)
            return Explored(engine, most, len(tried), memory, rejection=rejection)
        low, high = high, min(most, high + max(1, round(_GROWTH * high)))
    # What lies below the estimate is tried too.
    while high > 1 and low == high - 1 and low not in tried and passes(low):
        low, high = low - 1, low
    while high - low > 1:
        middle = (low + high) // 2
        if passes(middle):
            high = middle
        else:
            low = middle
    result = tried[high]
    assert not isinstance(result, str)
    return Explored(engine, most, len(tried), memory, (replace(engine, replicas=high), result))


def _sized(engine: Deployment, replicas: int) -> str:
    gpus = replicas * engine.tensor_parallel_size
    return f"{replicas} replica{'s' * (replicas > 1)} ({gpus} GPU{'s' * (gpus > 1)})"


def _try(question: Question, deployment: Deployment, memory: MemoryReport) -> SimulationResult | str:
    """The simulation of a deployment, or why it misses the SLO."""
    options = replace(question.options(), stop_when_slo_is_lost=True)
    try:
        result = simulate(question.workload, deployment.system(question.workload, memory), options)
    except SloLost as lost:
        return f"{lost.term} p{question.slo.percentile:g} exceeds {lost.limit_ms:g} ms"
    if result.slo_met:
        return result
    if not result.num_measured:
        return "no request could be measured: every prompt after the warm-up is rejected"
    for term, limit in question.slo.limits().items():
        metric = result.metric_ms(term)
        if metric is not None and metric.at_slo_percentile > limit:
            return f"{term} p{question.slo.percentile:g} is {metric.at_slo_percentile:,.0f} ms, above {limit:g} ms"
    return "the load saturates it"


def repeat(
    question: Question, deployment: Deployment, draw: Draw | None, known: SimulationResult | None
) -> SimulationResult | None:
    """A finalist in a draw; or, with the search's own result for the given load, the cliff looked for.

    None if the resampled load happens to have no request that the deployment takes.
    """
    system = deployment.system(question.workload, deployment.memory())
    if draw is None or known is not None:
        assert known is not None
        warnings = cliff_warning(question.workload, system, question.options(), known)
        return known.model_copy(update={"warnings": tuple(warnings)})
    return simulate_draw(question.workload, system, question.options(), draw)


def _refuse_if_impossible(question: Question, explored: list[Explored]) -> None:
    """Raise if every engine that fits misses the same term without any load.

    Raises:
        UserError: naming the term that alone exceeds the SLO.
    """
    rejections = [e.rejection for e in explored]
    unfit = (RejectionCause.MEMORY, RejectionCause.PROFILE)
    fitting = [r for r in rejections if r is None or r.cause not in unfit]
    floors = [r for r in fitting if r is not None and r.cause is RejectionCause.FLOOR]
    if not floors or len(floors) < len(fitting):
        return
    best = min(floors, key=lambda r: (r.at_least_ms or 0.0) / question.slo.limits()[r.term or ""])
    raise UserError(
        f"no engine of this search can meet the SLO: on its best, {best.tensor_parallel_size} × {best.system}, "
        f"{best.reason}; loosen --{best.term} or add faster GPUs to --system"
    )
