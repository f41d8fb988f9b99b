"""The answer of a search: ranked plans with their evidence, and for everything else the constraint that it fails.

These models are the JSON of `memwall plan`; exporters read only this.
"""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from planner.advice import load_warnings
from planner.basis import Basis, StepTimes
from planner.cost import cost_of
from planner.deployment import Deployment
from planner.errors import UserError
from planner.intervals import Confidence, confidence, why_no_interval
from planner.memory import MemoryReport
from planner.quality import REFERENCE, KVQuality, parameters
from planner.records import DeploymentRecord
from planner.schema import Record
from planner.simulation import SimulationResult, Verdict
from planner.step_time import WEAKEST_FIRST, Evidence
from planner.workload.workload import WorkloadSummary

if TYPE_CHECKING:
    from planner.search import Explored, Question

SCHEMA_VERSION: Literal[1] = 1
# A finalist that meets the SLO on a smaller share of its loads is warned about.
_ROBUST_SHARE = 0.9


class Range(Record):
    """Lowest and highest value over the given load and the draws."""

    low: float
    high: float


class SloTerm(Record):
    """One limit of the SLO, and what the plan achieves."""

    term: str = Field(description='"ttft", "tpot" or "e2el"')
    percentile: float
    limit_ms: float
    achieved_ms: float = Field(description="at the percentile, on the given load")
    share_of_limit: float = Field(description="achieved / limit; the binding term has the largest")
    range_ms: Range | None = Field(description="over all draws; finalists only")


class Loads(Record):
    """How a finalist did in the draws; where step times have no known error, on the given load and resampled ones."""

    met: int = Field(description="of them on which every limit held")
    of: int = Field(description="simulated")
    saturated: int = Field(default=0, description="of them in which requests arrived faster than they were served")
    method: str = Field(default="moving-block bootstrap of the arrivals, blocks of 60 s; the first is the given load")


class Plan(Record):
    """A deployment that meets the SLO with the fewest replicas of its engine."""

    rank: int = Field(description="1 is the cheapest per hour")
    deployment: DeploymentRecord
    num_gpus: int
    usd_per_hour: float | None = Field(description="all GPUs; None where the GPU has no price")
    usd_per_gpu_hour: float | None
    price_source: str | None
    price_date: str | None
    usd_per_million_output_tokens: float | None = Field(description="at this load, not at full load")
    usd_per_million_tokens: float | None = Field(description="input and output tokens, at this load")
    output_tokens_per_s_per_gpu: float
    tokens_per_s_per_user: float = Field(description="1 / mean TPOT")
    terms: tuple[SloTerm, ...]
    binding_term: str = Field(description="the limit that is nearest")
    step_times: StepTimes = Field(description="what its step times rest on")
    loads: Loads | None = Field(description="finalists only")
    confidence: Confidence | None = Field(
        default=None, description="intervals, and the probability of meeting the SLO; finalists with known errors only"
    )
    no_interval: str | None = Field(default=None, description="why a finalist has no intervals; None if it has")
    pareto: bool = Field(description="no other plan has more tokens/s per GPU and more tokens/s per user")
    num_kv_blocks: int = Field(description="of one replica")
    max_concurrency: float = Field(description="sequences of max_model_len that one replica's KV pool holds")
    kv_quality: KVQuality | None = Field(
        default=None,
        description="what its KV format costs in quality, on the model it was measured on; None if it was not",
    )
    warnings: tuple[str, ...]
    result: SimulationResult


class RejectionCause(StrEnum):
    """The constraint that an engine fails."""

    PROFILE = "profile"
    QUALITY = "quality"
    MEMORY = "memory"
    FLOOR = "floor"
    GPUS = "gpus"
    SLO = "slo"


class Rejection(Record):
    """An engine that meets the SLO with no number of replicas."""

    system: str
    tensor_parallel_size: int
    kv_cache_dtype: str
    max_num_seqs: int
    num_speculative_tokens: int
    cause: RejectionCause = Field(
        description="profile: a calibration from outside was given, and is of another engine; quality: its KV format "
        "costs too much of it, or that was never measured; memory: one request does not fit; floor: an idle replica "
        "misses the SLO; gpus and slo: simulated, and missed with the whole GPU budget, which for gpus is smaller than "
        "what the load keeps busy"
    )
    reason: str = Field(description="one sentence")
    term: str | None = Field(default=None, description="the SLO term, where the cause is floor")
    at_least_ms: float | None = Field(default=None, description="what an idle replica takes, where the cause is floor")

    @classmethod
    def of(cls, question: Question, engine: Deployment, cause: RejectionCause, reason: str, **more: Any) -> Rejection:
        """A rejection of `engine`."""
        return cls(
            system=engine.gpu.id,
            tensor_parallel_size=engine.tensor_parallel_size,
            kv_cache_dtype=engine.kv_cache_dtype.value,
            max_num_seqs=engine.max_num_seqs,
            num_speculative_tokens=engine.num_speculative_tokens,
            cause=cause,
            reason=reason,
            **more,
        )


class QuestionRecord(Record):
    """What was asked."""

    model: str
    systems: tuple[str, ...]
    total_gpus: int
    ttft_ms: float | None
    tpot_ms: float | None
    e2el_ms: float | None
    percentile: float
    tensor_parallel_sizes: tuple[int, ...]
    kv_cache_dtypes: tuple[str, ...]
    max_num_seqs: tuple[int, ...]
    draft_lengths: tuple[int, ...]
    max_model_len: int | None
    enable_prefix_caching: bool
    max_kv_perplexity_increase_percent: float | None = None
    seed: int
    warmup_s: float
    workload: WorkloadSummary


class SearchEffort(Record):
    """How the space was covered."""

    num_engines: int = Field(description="combinations of GPU, TP, KV dtype, max_num_seqs and k")
    num_candidates: int = Field(description="engines times the replica counts that the GPU budget allows")
    num_engines_without_quality: int = Field(default=0, description="excluded for their KV format")
    num_engines_not_calibrated: int = Field(default=0, description="not the one that was calibrated from outside")
    num_engines_without_memory: int
    num_engines_out_of_reach: int = Field(description="an idle replica already misses the SLO")
    num_engines_simulated: int
    num_simulations: int = Field(description="without those on resampled loads")


class PlanReport(Record):
    """The answer of `memwall plan`."""

    schema_version: Literal[1] = SCHEMA_VERSION
    question: QuestionRecord
    evidence: Evidence = Field(description="what the step times rest on")
    step_time: str
    effort: SearchEffort
    plans: tuple[Plan, ...]
    rejections: tuple[Rejection, ...]
    warnings: tuple[str, ...]


class RankedPlan:
    """A plan in the making: the record, and the deployment and the whole simulation behind it."""

    def __init__(self, record: Plan, deployment: Deployment, result: SimulationResult) -> None:
        self.record = record
        self.deployment_used = deployment
        self.result = result


def build_plan(question: Question, found: tuple[Deployment, SimulationResult], memory: MemoryReport) -> RankedPlan:
    """The record of a passing deployment, not yet ranked."""
    deployment, result = found
    price = question.prices.price(deployment.gpu)
    cost = cost_of(deployment, result, question.prices)
    terms = _terms(question, result)
    routed = replace(deployment, router=deployment.router_for(question.workload))
    step_times = StepTimes.of(result, deployment.step_time())
    quality = question.kv_quality.of(deployment.kv_cache_dtype) if question.kv_quality else None
    record = Plan(
        rank=1,
        deployment=DeploymentRecord.from_deployment(routed, question.quantization),
        num_gpus=deployment.num_gpus,
        usd_per_hour=cost.usd_per_hour,
        usd_per_gpu_hour=price.usd_per_gpu_hour if price else None,
        price_source=price.source if price else None,
        price_date=price.date if price else None,
        usd_per_million_output_tokens=cost.usd_per_million_output_tokens,
        usd_per_million_tokens=cost.usd_per_million_tokens,
        output_tokens_per_s_per_gpu=result.output_throughput_tokens_per_s / deployment.num_gpus,
        tokens_per_s_per_user=1e3 / result.tpot_ms.mean if result.tpot_ms else 0.0,
        terms=terms,
        binding_term=max(terms, key=lambda term: term.share_of_limit).term,
        step_times=step_times,
        loads=None,
        pareto=False,
        num_kv_blocks=memory.num_kv_blocks,
        max_concurrency=memory.max_concurrency,
        kv_quality=quality,
        warnings=(
            *_basis_warnings(step_times.basis),
            *_quality_warnings(question, deployment.kv_cache_dtype.value, quality),
            *memory.warnings,
            *load_warnings(question.workload, deployment, memory, result),
        ),
        result=result.model_copy(update={"timeline": ()}),
    )
    return RankedPlan(record, deployment, result)


def _terms(question: Question, result: SimulationResult) -> tuple[SloTerm, ...]:
    terms = []
    for name, limit in question.slo.limits().items():
        metric = result.metric_ms(name)
        achieved = metric.at_slo_percentile if metric else 0.0
        terms.append(
            SloTerm(
                term=name,
                percentile=question.slo.percentile,
                limit_ms=limit,
                achieved_ms=achieved,
                share_of_limit=achieved / limit,
                range_ms=None,
            )
        )
    return tuple(terms)


def rank(plans: list[RankedPlan]) -> list[RankedPlan]:
    """Cheapest per hour first; plans without a price after all others, by GPU count.

    At the same price the one with the more precise KV cache comes first, then the one with more headroom under the SLO,
    then the one with the larger batch limit.
    """

    def key(plan: RankedPlan) -> tuple:
        record = plan.record
        priced = record.usd_per_hour is not None
        tightest = max(term.share_of_limit for term in record.terms)
        bits = -plan.deployment_used.kv_cache_dtype.bits
        room = -plan.deployment_used.max_num_seqs
        return (not priced, round(record.usd_per_hour or 0.0, 6), record.num_gpus, bits, round(tightest, 3), room)

    plans = sorted(plans, key=key)
    for place, each in enumerate(plans, start=1):
        pareto = not any(_dominates(other.record, each.record) for other in plans)
        each.record = each.record.model_copy(update={"rank": place, "pareto": pareto})
    return plans


def choose_finalists(plans: list[RankedPlan], count: int) -> list[RankedPlan]:
    """The first `count` ranked plans that differ in more than their batch limit."""
    chosen: dict[tuple, RankedPlan] = {}
    for each in plans:
        used = each.deployment_used
        kind = (used.gpu.id, used.tensor_parallel_size, used.kv_cache_dtype, used.num_speculative_tokens)
        chosen.setdefault(kind, each)
    return list(chosen.values())[:count]


def _dominates(a: Plan, b: Plan) -> bool:
    """Whether plan a is at least as good on both axes, and better on one, to three digits.

    Plans of one GPU count serve the same load: their tokens/s differ by when the last request happens to end.
    """

    def axes(plan: Plan) -> tuple[float, float]:
        return float(f"{plan.output_tokens_per_s_per_gpu:.3g}"), float(f"{plan.tokens_per_s_per_user:.3g}")

    of_a, of_b = axes(a), axes(b)
    return of_a != of_b and of_a[0] >= of_b[0] and of_a[1] >= of_b[1]


def build_report(
    question: Question,
    explored: list[Explored],
    plans: list[RankedPlan],
    finalists: list[RankedPlan],
    runs: list[list[SimulationResult]],
) -> PlanReport:
    """Put everything together; `runs` are those of the first finalist, of the second, and so on, nominal ones first."""
    for finalist, mine in zip(finalists, runs, strict=True):
        finalist.record = _with_loads(question, finalist, mine)
    records = [plan.record for plan in plans]
    rejections = tuple(e.rejection for e in explored if e.rejection is not None)
    step_times = [e.engine.step_time() for e in explored if e.engine.calibration_fault() is None]
    known = {step_time.evidence for step_time in step_times}
    weakest = next(evidence for evidence in WEAKEST_FIRST if evidence in known)
    return PlanReport(
        question=_question_record(question, explored),
        evidence=weakest,
        step_time="; ".join(dict.fromkeys(step_time.description for step_time in step_times)),
        effort=_effort(explored),
        plans=tuple(records),
        rejections=rejections,
        warnings=_warnings(question, records, weakest),
    )


def _with_loads(question: Question, finalist: RankedPlan, runs: list[SimulationResult]) -> Plan:
    record, step_time = finalist.record, finalist.deployment_used.step_time()
    sure = confidence(runs[0], runs[1:], step_time, question.seed)
    held = [bool(run.slo_met) for run in (runs[1:] if sure else runs)]
    met = sum(held)
    saturated = sum(run.verdict is Verdict.SATURATED for run in (runs[1:] if sure else runs))
    terms = []
    for term in record.terms:
        values = [metric.at_slo_percentile for run in runs if (metric := run.metric_ms(term.term)) is not None]
        spread = Range(low=min(values), high=max(values)) if values else None
        terms.append(term.model_copy(update={"range_ms": spread}))
    warnings = [*record.warnings, *runs[0].warnings]
    if met < _ROBUST_SHARE * len(held):
        what = "draws of load and step times" if sure else "loads, the given one and resamples"
        queue = f" (in {saturated} requests arrive faster than they are served)" if saturated else ""
        warnings.append(f"the SLO holds on {met} of {len(held)} {what}{queue}: one more replica would be safer")
    loads = Loads(met=met, of=len(held), saturated=saturated)
    if sure:
        loads = loads.model_copy(update={"method": sure.method})
    update = {
        "terms": tuple(terms),
        "loads": loads,
        "confidence": sure,
        "no_interval": None if sure else why_no_interval(step_time) or "no resampled load has a request that it takes",
        "warnings": tuple(warnings),
        "result": runs[0].model_copy(update={"warnings": ()}),
    }
    return record.model_copy(update=update)


def _effort(explored: list[Explored]) -> SearchEffort:
    causes = [e.rejection.cause for e in explored if e.rejection is not None]
    without_quality = causes.count(RejectionCause.QUALITY)
    not_calibrated = causes.count(RejectionCause.PROFILE)
    without_memory = causes.count(RejectionCause.MEMORY)
    out_of_reach = causes.count(RejectionCause.FLOOR)
    return SearchEffort(
        num_engines=len(explored),
        num_candidates=sum(e.num_candidates for e in explored),
        num_engines_without_quality=without_quality,
        num_engines_not_calibrated=not_calibrated,
        num_engines_without_memory=without_memory,
        num_engines_out_of_reach=out_of_reach,
        num_engines_simulated=len(explored) - not_calibrated - without_quality - without_memory - out_of_reach,
        num_simulations=sum(e.num_simulations for e in explored),
    )


def _question_record(question: Question, explored: list[Explored]) -> QuestionRecord:
    slo = question.slo
    return QuestionRecord(
        model=question.model.name,
        systems=tuple(gpu.id for gpu in question.gpus),
        total_gpus=question.total_gpus,
        ttft_ms=slo.ttft_ms,
        tpot_ms=slo.tpot_ms,
        e2el_ms=slo.e2el_ms,
        percentile=slo.percentile,
        tensor_parallel_sizes=tuple(sorted({e.engine.tensor_parallel_size for e in explored})),
        kv_cache_dtypes=tuple(dtype.value for dtype in question.kv_cache_dtypes),
        max_num_seqs=question.max_num_seqs,
        draft_lengths=question.draft_lengths,
        max_model_len=question.engine.max_model_len,
        enable_prefix_caching=question.engine.enable_prefix_caching,
        max_kv_perplexity_increase_percent=question.max_kv_perplexity_increase_percent,
        seed=question.seed,
        warmup_s=question.measured_from_s,
        workload=question.workload.summary(),
    )


def _warnings(question: Question, records: list[Plan], evidence: Evidence) -> tuple[str, ...]:
    """Of the load and the search, and those of single plans that rest on too little."""
    warnings = list(question.workload.notes)
    if evidence is Evidence.UNCALIBRATED:
        warnings.append(_about_all(Basis.UNCALIBRATED, records))
    elif evidence is Evidence.EXTRAPOLATED:
        warnings.append(_about_all(Basis.TRANSFERRED, records))
    for name, quality in {r.deployment.kv_cache_dtype: r.kv_quality for r in records}.items():
        warnings += _quality_warnings(question, name, quality)
    unpriced = sorted({r.deployment.system for r in records if r.usd_per_hour is None})
    if unpriced:
        warnings.append(f"no price is known for {', '.join(unpriced)}: pass --price, e.g. {unpriced[0]}=2.50")
    return tuple(warnings)


_WEAK = {
    Basis.UNCALIBRATED: "uncalibrated: they come from data sheets and stated efficiencies, not from measurements",
    Basis.TRANSFERRED: "transferred from a profile of something else",
}


def _basis_warnings(basis: Basis) -> list[str]:
    """That a plan's step times were never measured on such an engine."""
    return [f"step times are {_WEAK[basis]}"] if basis in _WEAK else []


def _about_all(basis: Basis, records: list[Plan]) -> str:
    """The same of a whole search, in which other plans may rest on something else."""
    if records and all(r.step_times.basis is basis for r in records):
        return _basis_warnings(basis)[0]
    return f"step times of some of these engines are {_WEAK[basis]}"


def _quality_warnings(question: Question, dtype: str, quality: KVQuality | None) -> list[str]:
    """That what is known of a KV format was measured on another model, or is nothing."""
    if dtype == REFERENCE:
        return []
    if quality is None:
        return [f"the effect of {dtype} KV on output quality has not been measured"]
    return [
        f"the effect of {dtype} KV on output quality was measured on {parameters(quality)}, which for "
        f"{question.model.name} is an indication only"
    ]


def read_plan(text: str, source: str) -> PlanReport:
    """Parse the JSON of `memwall plan`.

    Raises:
        UserError: if it is not that, saying where it first differs.
    """
    from pydantic import ValidationError

    try:
        return PlanReport.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the top level"
        raise UserError(
            f"{source} is not a plan written by `memwall plan --output json` ({where}: {first['msg']})"
        ) from None
