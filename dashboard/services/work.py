"""What runs in processes of its own. Each function takes a `Report` for progress, and plain questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dashboard.services.jobs import Report, alone, first
from dashboard.services.questions import Search, Traffic, Trial
from planner.errors import UserError
from planner.intervals import draws, simulate_draw
from planner.plan_report import Plan, PlanReport
from planner.search import Question
from planner.search import plan as search_plans
from planner.simulate_report import SimulateReport, simulate_report
from planner.simulation import SimulationResult, Verdict, simulate
from planner.workload import Workload

#: Of each point of a sweep: long enough for a queue to show, short enough to wait for.
SWEEP_SECONDS = 120.0
# Rates beyond the knee that are still simulated, to show how it bends.
_BAD_RATES = 2
# Engines that are tried with fewer replicas than their plans have, to say why that does not do.
_MOST_WITH_FEWER = 3
#: Draws for the intervals of a trial.
NUM_OTHERS = 8


# ---- plan ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cheaper:
    """Something that would cost less than the plan, and why it is none."""

    what: str
    usd_per_hour: float | None
    reason: str


@dataclass(frozen=True)
class PlanAnswer:
    """A search's report, and why nothing cheaper will do.

    Attributes:
        is_quick: a first look at the beginning of the load.
        notes: what to know of the load.
    """

    report: PlanReport
    cheaper: tuple[Cheaper, ...]
    is_quick: bool
    notes: tuple[str, ...] = ()


@first
@alone
def first_look(report: Report, search: Search, trace: Workload | None) -> PlanAnswer:
    """Search with the beginning of the load.

    Raises:
        UserError: as `planner.search.plan`.
    """
    return wide_first_look(report, search, trace, cores=1)


def wide_first_look(report: Report, search: Search, trace: Workload | None, cores: int) -> PlanAnswer:
    """The same on several cores, for many engines.

    Raises:
        UserError: as `planner.search.plan`.
    """
    question = search.question(search.traffic.workload(trace), quick=True)
    return PlanAnswer(search_plans(question, n_jobs=cores, progress=report), (), True, question.workload.notes)


def plan(report: Report, search: Search, trace: Workload | None, cores: int = 1) -> PlanAnswer:
    """Search; the answer does not depend on the number of cores.

    Raises:
        UserError: as `planner.search.plan`.
    """
    question = search.question(search.traffic.workload(trace))
    found = search_plans(question, n_jobs=cores, progress=report)
    cheaper = why_not_cheaper(question, found) if found.plans else ()
    return PlanAnswer(found, cheaper, False, question.workload.notes)


def why_not_cheaper(question: Question, found: PlanReport) -> tuple[Cheaper, ...]:
    """Engines of the plans with fewer replicas than they need, and cheaper engines that no number of replicas makes
    good, dearest first."""
    best = found.plans[0]
    answers = _with_fewer(question, found)
    prices = {gpu.id: question.prices.price(gpu) for gpu in question.gpus}
    seen = set()
    for each in found.rejections:
        price = prices.get(each.system)
        cost = price.usd_per_gpu_hour * each.tensor_parallel_size if price else None
        # The least that such an engine costs is one replica.
        if cost is None or best.usd_per_hour is None or cost >= best.usd_per_hour:
            continue
        what = f"{each.tensor_parallel_size} × {each.system} (TP {each.tensor_parallel_size}), {each.kv_cache_dtype} KV"
        if (what, each.reason) not in seen:
            seen.add((what, each.reason))
            answers.append(Cheaper(what, cost, each.reason))
    return tuple(sorted(answers, key=lambda each: -(each.usd_per_hour or 0.0)))


def _with_fewer(question: Question, found: PlanReport) -> list[Cheaper]:
    """The engines that would cost less than the best plan if fewer replicas were enough, with as many as cost less;
    simulated for the few that come nearest to its cost."""
    best = found.plans[0]
    if best.usd_per_hour is None:
        return []
    candidates: dict[tuple, tuple[float, Plan, int]] = {}
    for plan in found.plans:
        used = plan.deployment
        if used.replicas < 2 or plan.usd_per_gpu_hour is None:
            continue
        each = plan.usd_per_gpu_hour * used.tensor_parallel_size
        replicas = min(used.replicas - 1, math.ceil(best.usd_per_hour / each - 1e-9) - 1)
        kind = (used.system, used.tensor_parallel_size, used.kv_cache_dtype)
        if replicas > 0:
            candidates.setdefault(kind, (replicas * each, plan, replicas))
    nearest = sorted(candidates.values(), key=lambda candidate: -candidate[0])[:_MOST_WITH_FEWER]
    return [_with_replicas(question, plan, replicas) for _, plan, replicas in nearest]


def _with_replicas(question: Question, best: Plan, replicas: int) -> Cheaper:
    used = best.deployment
    gpu = next(gpu for gpu in question.gpus if gpu.id == used.system)
    deployment = replace(
        question.engine,
        gpu=gpu,
        tensor_parallel_size=used.tensor_parallel_size,
        replicas=replicas,
        kv_cache_dtype=next(each for each in question.kv_cache_dtypes if each.value == used.kv_cache_dtype),
        max_num_seqs=used.max_num_seqs,
    )
    smaller = simulate_report(question.workload, deployment, question.options(), question.quantization).result
    price = best.usd_per_gpu_hour
    of_them = f"{replicas} replica{'s' * (replicas > 1)} of TP {used.tensor_parallel_size}"
    what = f"{deployment.num_gpus} × {gpu.id} ({of_them}, {used.kv_cache_dtype} KV)"
    return Cheaper(what, price * deployment.num_gpus if price else None, _misses(question, smaller))


def _misses(question: Question, result: SimulationResult | None) -> str:
    if result is None:
        return "does not fit"
    parts = []
    if result.verdict is Verdict.SATURATED:
        parts.append("saturated: requests arrive faster than they are served")
    for term, limit in question.slo.limits().items():
        metric = result.metric_ms(term)
        if metric is not None and metric.at_slo_percentile > limit:
            achieved = metric.at_slo_percentile
            over = f"{term.upper()} p{question.slo.percentile:g} is {achieved:,.{0 if achieved >= 100 else 1}f} ms"
            parts.append(f"{over}, above {limit:,.6g} ms")
    return "; ".join(parts) or "it meets the SLO on this load too: the margin is within the noise of the search"


# ---- what if -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrialAnswer:
    """One configuration under one load.

    Attributes:
        report: on the given load.
        others: the same on resampled loads, with step times that may be the true ones, for intervals.
    """

    report: SimulateReport
    others: tuple[SimulationResult, ...]


@first
@alone
def try_once(report: Report, trial: Trial, trace: Workload | None) -> TrialAnswer:
    """Simulate on the given load alone, without intervals.

    Raises:
        UserError: as `planner.simulate_report.simulate_report`.
    """
    return try_one(report, trial, trace, num_others=0)


@alone
def try_one(report: Report, trial: Trial, trace: Workload | None, num_others: int) -> TrialAnswer:
    """Simulate, then draw load and step times so many times.

    Raises:
        UserError: as `planner.simulate_report.simulate_report`.
    """
    workload = trial.traffic.workload(trace)
    deployment = trial.engine.deployment(workload)
    total = 1 + num_others
    report(0, total, "simulations done")
    answer = simulate_report(workload, deployment, trial.options(), trial.quantization)
    others = []
    if answer.result is not None:
        system = deployment.system(workload, answer.memory)
        for number, draw in enumerate(draws(num_others, trial.traffic.seed), start=1):
            report(number, total, "simulations done")
            others.append(simulate_draw(workload, system, trial.options(), draw))
    return TrialAnswer(answer, tuple(each for each in others if each is not None))


@dataclass(frozen=True)
class SweepPoint:
    """A configuration at one request rate; result is None where it does not fit."""

    request_rate: float
    result: SimulationResult | None


@dataclass(frozen=True)
class Sweep:
    """A configuration under more and more load.

    Attributes:
        points: in order of the rate, until it is hopeless.
        held_by_memory: requests of this load that the KV pools of all replicas hold at once.
        max_num_seqs: the most that all replicas may run at once.
    """

    points: tuple[SweepPoint, ...]
    held_by_memory: float
    max_num_seqs: int

    @property
    def knee(self) -> SweepPoint | None:
        """The highest rate up to which every one meets the SLO, or without an SLO is kept up with."""
        found = None
        for point in self.points:
            if not _is_good(point):
                break
            found = point
        return found

    @property
    def preemptions_between(self) -> tuple[float | None, float | None]:
        """The last rate without preemptions and the first with some; None for what there is not."""
        before = None
        for point in self.points:
            if point.result is not None and point.result.num_preemptions:
                return before, point.request_rate
            before = point.request_rate
        return before, None


@alone
def sweep(report: Report, trial: Trial, trace: Workload | None, factors: Sequence[float]) -> Sweep:
    """A configuration at multiples of its load's request rate, in order, until it is hopeless.

    Raises:
        UserError: as `planner.deployment.Deployment.system`.
    """
    workload = trial.traffic.workload(trace)
    deployment = trial.engine.deployment(workload)
    memory = deployment.memory()
    points: list[SweepPoint] = []
    for number, factor in enumerate(factors):
        report(number, len(factors), "request rates simulated")
        if not memory.fits or sum(not _is_good(point) for point in points) >= _BAD_RATES:
            break
        load = trial.traffic.shortened(workload.scaled(factor), SWEEP_SECONDS)
        result = simulate(load, deployment.system(load, memory), trial.options())
        points.append(SweepPoint(workload.request_rate * factor, result.model_copy(update={"timeline": ()})))
    pool = memory.num_kv_blocks * memory.block_size * deployment.replicas
    # A request is half-way through its answer on average.
    live = float(workload.input_tokens.mean() + workload.output_tokens.mean() / 2)
    return Sweep(tuple(points), pool / live, deployment.max_num_seqs * deployment.replicas)


def _is_good(point: SweepPoint) -> bool:
    result = point.result
    return result is not None and result.verdict is Verdict.STABLE and result.slo_met is not False


@dataclass(frozen=True)
class Sensitivity:
    """What one change does.

    Attributes:
        name: what is changed; low, high: to what.
        low_result, high_result: None where it is impossible.
    """

    name: str
    low: str
    high: str
    low_result: SimulationResult | None
    high_result: SimulationResult | None


@dataclass(frozen=True)
class Tornado:
    """One configuration, and what each change to it does."""

    base: SimulationResult | None
    bars: tuple[Sensitivity, ...]


@alone
def tornado(report: Report, trial: Trial, trace: Workload | None) -> Tornado:
    """Change one thing at a time, down and up.

    Raises:
        UserError: as `planner.deployment.Deployment.system`, for the configuration itself.
    """
    workload = trial.traffic.workload(trace)
    changes = _changes(trial, workload)
    total = 1 + 2 * len(changes)
    base = _shortly(trial, workload)
    bars = []
    for number, (name, low, high) in enumerate(changes):
        results = []
        for side, (_, changed, load) in enumerate((low, high)):
            report(1 + 2 * number + side, total, "changes simulated")
            try:
                results.append(_shortly(changed, load))
            except UserError:  # e.g. a tensor-parallel size that the model's heads do not allow
                results.append(None)
        bars.append(Sensitivity(name, low[0], high[0], *results))
    return Tornado(base, tuple(bars))


def _shortly(trial: Trial, workload: Workload) -> SimulationResult | None:
    load = trial.traffic.shortened(workload, SWEEP_SECONDS)
    deployment = trial.engine.deployment(workload)
    memory = deployment.memory()
    if not memory.fits:
        return None
    return simulate(load, deployment.system(load, memory), trial.options()).model_copy(update={"timeline": ()})


_Side = tuple[str, Trial, Workload]


def _changes(trial: Trial, workload: Workload) -> list[tuple[str, _Side, _Side]]:
    """(name, down, up) of each knob, each side with its label, its question and its load."""
    engine = trial.engine

    def knob(name: str, low: object, high: object, field: str) -> tuple[str, _Side, _Side]:
        def side(value: object) -> _Side:
            return str(value), replace(trial, engine=replace(engine, **{field: value})), workload

        return name, side(low), side(high)

    rate = workload.request_rate
    found = [
        (
            "request rate, /s",
            (f"{0.8 * rate:.3g}", trial, workload.scaled(0.8)),
            (f"{1.2 * rate:.3g}", trial, workload.scaled(1.2)),
        ),
        knob("replicas", max(1, engine.replicas - 1), engine.replicas + 1, "replicas"),
        knob("KV format", "fp8", "bfloat16", "kv_cache_dtype"),
        knob("max_num_seqs", max(1, engine.max_num_seqs // 2), engine.max_num_seqs * 2, "max_num_seqs"),
    ]
    tp = engine.tensor_parallel_size
    found.append(knob("TP", max(1, tp // 2), tp * 2, "tensor_parallel_size"))
    budget = engine.max_num_batched_tokens
    found.append(
        knob("token budget", max(engine.max_num_seqs, budget // 4), budget * 2, "max_num_batched_tokens"),
    )
    if trial.traffic.trace is None:
        for name, field, tokens in (
            ("input tokens", "input_tokens", workload.input_tokens.mean()),
            ("output tokens", "output_tokens", workload.output_tokens.mean()),
        ):
            sides = []
            for factor in (0.8, 1.2):
                traffic: Traffic = replace(trial.traffic, **{field: round(factor * float(tokens))})
                sides.append((f"{getattr(traffic, field):,}", replace(trial, traffic=traffic), traffic.workload()))
            found.append((name, *sides))
    return found
