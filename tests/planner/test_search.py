"""The search against brute force: every replica count of every engine simulated, every number of a plan by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.scheduling import StepShape
from planner import search
from planner.catalog import gpu_entry, load_gpu, load_model
from planner.deployment import Deployment, PriceList, length_for
from planner.errors import UserError
from planner.memory import KVCacheDtype
from planner.plan_report import Plan, PlanReport, RejectionCause, read_plan
from planner.search import Question
from planner.simulation import SLO, AcceptanceProcess, SimulationOptions, SimulationResult, SloLost, Verdict, simulate
from planner.speculation import SpeculationConfig
from planner.step_time import StepTime
from planner.workload import Workload

MODEL = load_model("llama-3.1-8b")
BF16, FP8 = KVCacheDtype.BFLOAT16, KVCacheDtype.FP8
ISL, OSL = 700, 30


def load(arrival_s, prompts, outputs, **prefixes) -> Workload:
    return Workload("load", np.array(arrival_s, float), np.array(prompts), np.array(outputs), **prefixes)


def poisson(rate: float, count: int, isl: int = ISL, osl: int = OSL, seed: int = 7) -> Workload:
    """Requests of equal length, so that throughput can be checked by hand."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    return load(np.cumsum(gaps), [isl] * count, [osl] * count)


def ask(workload: Workload, slo: SLO, *gpus: str, model=MODEL, engine: dict | None = None, **changes) -> Question:
    """A question about few engines: one TP size, KV format and batch limit unless told otherwise."""
    specs = tuple(load_gpu(gpu) for gpu in gpus or ("h100_sxm",))
    settings = {"max_model_len": length_for(workload, model), **(engine or {})}
    asked = {
        "gpus": specs,
        "total_gpus": 3,
        "tensor_parallel_sizes": (1,),
        "kv_cache_dtypes": (BF16,),
        "max_num_seqs": (64,),
        "num_finalists": 0,
        **changes,
    }
    return Question(Deployment(model, specs[0], **settings), workload, slo, **asked)


def plan(question: Question, n_jobs: int = 1) -> PlanReport:
    return search.plan(question, n_jobs)


def only(question: Question, cause: RejectionCause):
    """The single rejection of a search without plans."""
    report = plan(question)
    assert not report.plans
    (rejection,) = report.rejections
    assert rejection.cause is cause, rejection
    return rejection


def simulated(question: Question, workload: Workload | None = None, seed: int = 0, **engine) -> SimulationResult:
    """A deployment of the question simulated from scratch."""
    workload = workload or question.workload
    deployment = replace(question.engine, **engine)
    options = SimulationOptions(seed=seed, slo=question.slo, reject_too_long=question.reject_too_long)
    return simulate(workload, deployment.system(workload), options)


def holds(slo: SLO, result: SimulationResult) -> bool:
    """The SLO by its own words."""
    achieved = {"ttft": result.ttft_ms, "tpot": result.tpot_ms, "e2el": result.e2el_ms}
    within = all(achieved[term].at_slo_percentile <= limit for term, limit in slo.limits().items())
    return within and result.verdict is Verdict.STABLE


# ---- against brute force -------------------------------------------------------------------------------------------

GPUS = ("h100_sxm", "a30", "l4")  # a30 has no price; one l4 is too slow for the TPOT, two are not
SIZES, DTYPES, SEQS, TOTAL = (1, 2), (BF16, FP8), (4, 64), 4
PRICED = {gpu: gpu_entry(gpu)["price_typical"] for gpu in GPUS}


@cache
def question() -> Question:
    slo = SLO(ttft_ms=400.0, tpot_ms=45.0, e2el_ms=3000.0, percentile=95.0)
    space = {"tensor_parallel_sizes": SIZES, "kv_cache_dtypes": DTYPES, "max_num_seqs": SEQS, "total_gpus": TOTAL}
    engine = {"profiles": ("none",)}  # so that step times have no known error
    return ask(poisson(12.0, 300), slo, *GPUS, engine=engine, **space, num_finalists=2, num_draws=3)


@cache
def report() -> PlanReport:
    return plan(question())


@cache
def brute_force() -> dict[tuple, dict[int, SimulationResult]]:
    """Every replica count of every engine, simulated."""
    found = {}
    for gpu, tp, dtype, seqs in product(GPUS, SIZES, DTYPES, SEQS):
        engine = {"gpu": load_gpu(gpu), "tensor_parallel_size": tp, "kv_cache_dtype": dtype, "max_num_seqs": seqs}
        counts = range(1, TOTAL // tp + 1)
        found[gpu, tp, dtype.value, seqs] = {n: simulated(question(), replicas=n, **engine) for n in counts}
    return found


def engine_of(record) -> tuple:
    return record.system, record.tensor_parallel_size, record.kv_cache_dtype, record.max_num_seqs


def test_every_engine_is_answered_once():
    answered = [engine_of(plan.deployment) for plan in report().plans] + [engine_of(r) for r in report().rejections]
    assert sorted(answered) == sorted(brute_force())


def test_plans_have_the_busy_replicas_that_pass():
    assert len(report().plans) >= 6
    counts = set()
    for plan in report().plans:
        runs = brute_force()[engine_of(plan.deployment)]
        passing = [n for n, result in runs.items() if holds(question().slo, result)]
        counts.add(plan.deployment.replicas)
        assert plan.deployment.replicas == min(passing)
        assert plan.deployment.replicas - 1 not in passing
    assert len(counts) > 1, "the example should need different numbers of replicas"


def test_rejected_engines_pass_with_no_number_of_replicas():
    assert {r.cause for r in report().rejections} >= {RejectionCause.FLOOR, RejectionCause.SLO}
    for rejection in report().rejections:
        for result in brute_force()[engine_of(rejection)].values():
            assert not holds(question().slo, result)


def test_a_plan_is_what_its_simulation_says():
    for plan in report().plans:
        truth = brute_force()[engine_of(plan.deployment)][plan.deployment.replicas]
        assert plan.result.model_dump(exclude={"timeline"}) == truth.model_dump(exclude={"timeline"})
        metrics = {"ttft": truth.ttft_ms, "tpot": truth.tpot_ms, "e2el": truth.e2el_ms}
        shares = {term: metrics[term].at_slo_percentile / limit for term, limit in question().slo.limits().items()}
        assert {term.term: term.share_of_limit for term in plan.terms} == pytest.approx(shares)
        assert plan.binding_term == max(shares, key=shares.get)
        assert all(term.percentile == 95.0 for term in plan.terms)


def test_the_gpu_budget_is_respected():
    for plan in report().plans:
        assert plan.num_gpus == plan.deployment.tensor_parallel_size * plan.deployment.replicas <= TOTAL


def test_dollars_and_rates_by_hand():
    for plan in report().plans:
        result = plan.result
        price = PRICED[plan.deployment.system]
        span_s = result.num_measured / result.request_throughput_per_s
        per_gpu_s = result.num_measured * OSL / span_s / plan.num_gpus
        assert plan.output_tokens_per_s_per_gpu == pytest.approx(per_gpu_s)
        assert plan.tokens_per_s_per_user == pytest.approx(1000 / result.tpot_ms.mean)
        if price is None:
            assert plan.usd_per_hour is plan.usd_per_million_tokens is plan.usd_per_million_output_tokens is None
            continue
        usd = price["usd_per_gpu_hour"] * plan.num_gpus
        spent = usd * span_s / 3600
        assert plan.usd_per_hour == pytest.approx(usd)
        assert plan.usd_per_million_tokens == pytest.approx(spent / (result.num_measured * (ISL + OSL)) * 1e6)
        assert plan.usd_per_million_output_tokens == pytest.approx(spent / (result.num_measured * OSL) * 1e6)
        assert (plan.price_source, plan.price_date) == (price["source"], price["date"])


def test_ranks():
    """By $/hour, unpriced last; at the same price the more precise KV, then more headroom."""
    plans = report().plans
    assert [plan.rank for plan in plans] == list(range(1, len(plans) + 1))
    priced = [plan for plan in plans if plan.usd_per_hour is not None]
    unpriced = [plan for plan in plans if plan.usd_per_hour is None]
    assert priced
    assert unpriced
    assert list(plans) == priced + unpriced
    assert [plan.usd_per_hour for plan in priced] == sorted(plan.usd_per_hour for plan in priced)
    assert [plan.num_gpus for plan in unpriced] == sorted(plan.num_gpus for plan in unpriced)
    for before, after in pairwise(plans):
        if (before.usd_per_hour, before.num_gpus) == (after.usd_per_hour, after.num_gpus):
            assert (before.deployment.kv_cache_dtype, after.deployment.kv_cache_dtype) != ("fp8", "bfloat16")
            if before.deployment.kv_cache_dtype == after.deployment.kv_cache_dtype:
                tightest = [max(term.share_of_limit for term in plan.terms) for plan in (before, after)]
                assert tightest[0] <= tightest[1] + 1e-3


def test_pareto_front_by_definition():
    """To three digits: the rest is when the last request happens to end."""

    def digits(value):
        return float(f"{value:.3g}")

    plans = report().plans
    points = [(digits(plan.output_tokens_per_s_per_gpu), digits(plan.tokens_per_s_per_user)) for plan in plans]
    for plan, (per_gpu, per_user) in zip(report().plans, points, strict=True):
        beaten = any(g >= per_gpu and u >= per_user and (g, u) != (per_gpu, per_user) for g, u in points)
        assert plan.pareto is not beaten


def test_effort_counts(monkeypatch):
    ran = []
    counted = search.simulate
    monkeypatch.setattr(search, "simulate", lambda *arguments: ran.append(1) or counted(*arguments))
    effort = plan(replace(question(), num_finalists=0)).effort
    engines = len(brute_force())
    causes = [rejection.cause for rejection in report().rejections]
    assert effort == report().effort
    assert effort.num_engines == engines == len(GPUS) * len(SIZES) * len(DTYPES) * len(SEQS)
    assert effort.num_candidates == engines // 2 * (TOTAL + TOTAL // 2)
    assert effort.num_engines_without_memory == causes.count(RejectionCause.MEMORY)
    out_of_reach = causes.count(RejectionCause.FLOOR)
    assert effort.num_engines_out_of_reach == out_of_reach
    assert effort.num_engines_simulated == engines - out_of_reach - effort.num_engines_without_memory
    assert effort.num_simulations == len(ran)


def test_finalists_are_checked_on_resampled_loads():
    slo = question().slo
    finalists = [plan for plan in report().plans if plan.loads]
    assert len(finalists) == 2
    assert finalists[0].rank == 1
    kinds = {(p.deployment.system, p.deployment.tensor_parallel_size, p.deployment.kv_cache_dtype) for p in finalists}
    assert len(kinds) == 2
    for plan in finalists:
        used = plan.deployment
        engine = {
            "gpu": load_gpu(used.system),
            "tensor_parallel_size": used.tensor_parallel_size,
            "kv_cache_dtype": KVCacheDtype(used.kv_cache_dtype),
            "max_num_seqs": used.max_num_seqs,
            "replicas": used.replicas,
        }
        workloads = [question().workload, *(question().workload.resampled(seed) for seed in (1, 2))]
        runs = [simulated(question(), load, seed, **engine) for seed, load in enumerate(workloads)]
        assert (plan.loads.met, plan.loads.of) == (sum(holds(slo, run) for run in runs), 3)
        for term in plan.terms:
            values = [run.metric_ms(term.term).at_slo_percentile for run in runs]
            assert (term.range_ms.low, term.range_ms.high) == (min(values), max(values))
            assert term.range_ms.low <= term.achieved_ms <= term.range_ms.high
        warned = any("resampled loads" in warning for warning in plan.warnings)
        assert warned == (plan.loads.met < 0.9 * 3)
    assert all(term.range_ms is None for plan in report().plans if not plan.loads for term in plan.terms)


def test_warnings_of_the_report():
    text = "\n".join(report().warnings)
    assert "uncalibrated" in text
    assert "fp8 KV on output quality" in text
    assert "no price is known for a30: pass --price, e.g. a30=2.50" in text


def test_step_time_names_every_gpu_of_the_plans():
    """The report's sentence on step times is about all of them."""
    names = {load_gpu(plan.deployment.system).name for plan in report().plans}
    assert len(names) > 1
    assert all(name in report().step_time for name in names), report().step_time


# ---- prices --------------------------------------------------------------------------------------------------------


def test_price_of_the_user_moves_a_gpu_to_the_front():
    prices = PriceList(overrides=(("a30", 0.01),))
    cheap = plan(replace(question(), prices=prices, num_finalists=0, max_num_seqs=(64,), kv_cache_dtypes=(BF16,)))
    first = cheap.plans[0]
    assert (first.deployment.system, first.usd_per_gpu_hour, first.price_source) == ("a30", 0.01, "given by the user")
    assert first.usd_per_hour == pytest.approx(0.01 * first.num_gpus)
    assert not any("no price" in warning for warning in cheap.warnings)


@pytest.mark.parametrize("tier", ["low", "typical", "high"])
def test_price_tiers(tier):
    (found,) = plan(ask(poisson(2, 40), SLO(ttft_ms=500), prices=PriceList(tier))).plans
    assert found.usd_per_hour == gpu_entry("h100_sxm")[f"price_{tier}"]["usd_per_gpu_hour"]


# ---- rejections ----------------------------------------------------------------------------------------------------


def test_rejected_for_memory():
    big = load_model("llama-3.1-70b")
    asked = ask(poisson(1, 10), SLO(ttft_ms=1000), model=big)
    rejection = only(asked, RejectionCause.MEMORY)
    assert rejection.reason == asked.engine.memory().reason
    assert "GiB" in rejection.reason
    effort = plan(asked).effort
    assert (effort.num_engines_without_memory, effort.num_simulations) == (1, 0)


def test_rejected_for_its_floor():
    """An l4 reads its weights too slowly; an h100 does not, so the search goes on."""
    asked = ask(poisson(2, 40), SLO(ttft_ms=5000, tpot_ms=20), "l4", "h100_sxm")
    found = plan(asked)
    assert [each.deployment.system for each in found.plans] == ["h100_sxm"]
    (rejection,) = found.rejections
    weights_s = 2 * (MODEL.num_parameters - MODEL.vocab_size * MODEL.hidden_size) / 300e9
    assert rejection.cause is RejectionCause.FLOOR
    assert rejection.term == "tpot"
    assert rejection.at_least_ms > weights_s * 1e3 > 20
    assert rejection.reason == (
        f"tpot p99 ≤ 20 ms is out of reach: one decode step of a single request takes at least "
        f"{rejection.at_least_ms:.2f} ms"
    )
    assert found.effort.num_engines_out_of_reach == 1


def test_rejected_for_the_gpu_budget():
    """100 prompts of 4,000 tokens a second are 6.4 PFLOP/s and more, and one h100 does not do 1."""
    asked = ask(poisson(100, 600, isl=4000, osl=2), SLO(ttft_ms=1e6), total_gpus=2)
    rejection = only(asked, RejectionCause.GPUS)
    assert "with 2 replicas (2 GPUs), and the load would keep about " in rejection.reason
    assert rejection.reason.endswith(" replicas busy")
    assert not any(simulated(asked, replicas=n).slo_met for n in (1, 2))


def test_rejected_for_the_slo():
    """Near the floor: any company at all is too much."""
    alone = simulated(ask(load([0.0], [ISL], [OSL]), SLO(ttft_ms=1e6)))
    asked = ask(poisson(8, 200), SLO(ttft_ms=alone.ttft_ms.max * 1.02), total_gpus=1)
    rejection = only(asked, RejectionCause.SLO)
    assert rejection.reason.startswith("ttft p99 exceeds ")
    assert "even with 1 replica" in rejection.reason
    assert (rejection.term, rejection.at_least_ms) == (None, None)


def test_rejected_for_saturation():
    asked = ask(poisson(60, 900, isl=1500, osl=4), SLO(ttft_ms=1e7), total_gpus=1)
    assert simulated(asked).verdict is Verdict.SATURATED
    report = plan(asked)
    assert not report.plans
    (rejection,) = report.rejections
    assert rejection.cause in (RejectionCause.SLO, RejectionCause.GPUS)


@pytest.mark.parametrize("term", ["ttft", "tpot", "e2el"])
def test_impossible_slo_names_the_term(term):
    """Given other limits that are easy, of which nothing is said."""
    limits = {"ttft_ms": 60_000.0, "tpot_ms": 60_000.0, "e2el_ms": 600_000.0, f"{term}_ms": 0.5}
    with pytest.raises(UserError) as caught:
        plan(ask(poisson(2, 40), SLO(**limits), "h100_sxm", "l4"))
    text = str(caught.value)
    assert f"{term} p99 ≤ 0.5 ms is out of reach" in text
    assert f"loosen --{term}" in text
    assert "1 × h100_sxm" in text  # the better of the two
    assert not any(f"{other} p99" in text for other in {"ttft", "tpot", "e2el"} - {term})


def test_impossible_slo_is_told_apart_from_lack_of_memory():
    """One engine lacks memory, the others are too slow: that is what to say."""
    big = load_model("llama-3.1-70b")
    asked = ask(poisson(1, 10), SLO(tpot_ms=1), model=big, tensor_parallel_sizes=(1, 4), total_gpus=4)
    with pytest.raises(UserError, match=r"4 × h100_sxm, tpot p99 ≤ 1 ms is out of reach"):
        plan(asked)


def test_an_engine_beyond_the_budget_is_no_proof_of_impossibility():
    asked = ask(poisson(100, 600, isl=4000, osl=10), SLO(tpot_ms=20), "h100_sxm", "l4", total_gpus=1)
    causes = {r.system: r.cause for r in plan(asked).rejections}
    assert causes == {"h100_sxm": RejectionCause.GPUS, "l4": RejectionCause.FLOOR}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slo": SLO()}, "needs an SLO"),
        ({"gpus": ()}, "at least one GPU type"),
        ({"total_gpus": 0}, "total_gpus must be at least 1"),
        ({"num_draws": 0}, "num_draws must be at least 1"),
        ({"num_finalists": -1}, "num_finalists"),
        ({"draft_lengths": (0, 2)}, "acceptance rates"),
    ],
)
def test_impossible_questions(changes, message):
    with pytest.raises(UserError, match=message):
        replace(ask(poisson(2, 10), SLO(ttft_ms=500)), **changes)


@pytest.mark.parametrize(
    ("sizes", "total", "message"),
    [((3,), 8, "must divide the 32"), ((16,), 64, "a node has 8"), ((8,), 4, "--total-gpus is 4")],
)
def test_no_parallelism_that_suits(sizes, total, message):
    with pytest.raises(UserError, match=message):
        plan(ask(poisson(2, 10), SLO(ttft_ms=500), tensor_parallel_sizes=sizes, total_gpus=total))


def test_prompts_longer_than_the_model_takes():
    asked = ask(load([0, 1, 2], [100, 5000, 100], [5] * 3), SLO(ttft_ms=5000), engine={"max_model_len": 1024})
    with pytest.raises(UserError, match="prompt of 5000 tokens"):
        plan(asked)


# ---- what a rejection claims must be true --------------------------------------------------------------------------
# "Serving the load at all takes at least n replicas" rejects without a simulation, so n must be a bound.


def assert_served_by_one(asked: Question) -> None:
    assert simulated(asked).slo_met
    report = plan(replace(asked, total_gpus=1))
    assert [each.deployment.replicas for each in report.plans] == [1], report.rejections


def test_a_burst_may_be_served_after_it():
    """Eight prompts in half a second, and a minute to serve them."""
    assert_served_by_one(ask(load(np.linspace(0, 0.5, 8), [8000] * 8, [4] * 8), SLO(ttft_ms=60_000)))


def test_a_large_token_budget_costs_short_prompts_nothing():
    """A step of 131,072 tokens of short prompts has none of the attention of one such prompt."""
    workload = load(np.sort(np.random.default_rng(0).uniform(0, 20, 600)), [1000] * 600, [2] * 600)
    engine = {"max_num_batched_tokens": 131_072}
    assert_served_by_one(ask(workload, SLO(ttft_ms=5000), "h200_sxm", engine=engine))


def test_prompts_of_one_cached_block_cost_next_to_nothing():
    """The same 512 tokens again and again, in a trace whose blocks have 512: all but the last page is a hit."""
    count = 900
    arrivals = np.sort(np.random.default_rng(0).uniform(0, 10, count))
    same = tuple(np.array([0]) for _ in range(count))
    workload = load(arrivals, [512] * count, [2] * count, prefix_block_hashes=same, prefix_block_tokens=512)
    engine = {"enable_prefix_caching": True}
    assert_served_by_one(ask(workload, SLO(ttft_ms=5000), "h200_sxm", max_num_seqs=(256,), engine=engine))


def test_floors_leave_out_rejected_prompts():
    """What is rejected has no latency, in the simulation and so in its bound."""
    workload = load(np.arange(40.0), [100] * 35 + [60_000] * 5, [20] * 40)
    asked = ask(workload, SLO(ttft_ms=200), engine={"max_model_len": 1024}, reject_too_long=True)
    assert_served_by_one(asked)


def test_floors_know_that_outputs_end_at_max_model_len():
    workload = load(np.arange(40.0), [1000] * 40, [5000] * 40)
    assert_served_by_one(ask(workload, SLO(e2el_ms=2000), engine={"max_model_len": 1024}))


def test_a_load_of_which_all_measured_prompts_are_rejected_does_not_saturate():
    workload = load([0, 10], [100, 3000], [20, 20])
    asked = ask(workload, SLO(ttft_ms=500), engine={"max_model_len": 1024}, reject_too_long=True, total_gpus=1)
    assert "saturates" not in only(asked, RejectionCause.SLO).reason


def test_rejected_prompts_are_warned_about():
    """Plans that turn requests away say so, as `memwall simulate` does."""
    workload = load(np.arange(40.0), [100] * 20 + [3000] * 20, [20] * 40)
    asked = ask(workload, SLO(ttft_ms=500), engine={"max_model_len": 1024}, reject_too_long=True, num_finalists=1)
    report = plan(asked)
    said = "\n".join([*report.warnings, *report.plans[0].warnings])
    assert "20 of 40 prompts exceed max_model_len" in said


def test_a_resampled_load_of_rejected_prompts_only_does_not_end_the_search():
    """Two short prompts among thirty: some bootstrap draws neither."""
    workload = load(np.arange(30) * 60.0, [100] * 2 + [3000] * 28, [20] * 30)
    asked = ask(workload, SLO(ttft_ms=500), engine={"max_model_len": 1024}, reject_too_long=True, warmup_s=0.0)
    (found,) = plan(replace(asked, num_finalists=1, num_draws=40)).plans
    assert found.loads.of <= 40


# ---- determinism, and the report on disk ---------------------------------------------------------------------------


@cache
def speculative_question() -> Question:
    acceptance = AcceptanceProcess((0.9, 0.8, 0.7, 0.6), concentration=5.0)
    speculation = SpeculationConfig("ngram", 4, acceptance)
    asked = ask(poisson(10, 150), SLO(ttft_ms=400, tpot_ms=30), draft_lengths=(0, 2, 4), speculation=speculation)
    return replace(asked, num_finalists=2, num_draws=2)


def test_the_report_does_not_depend_on_the_number_of_processes():
    alone, again = plan(speculative_question(), 1), plan(speculative_question(), 1)
    parallel = plan(speculative_question(), 2)
    assert alone.model_dump_json() == again.model_dump_json() == parallel.model_dump_json()


def test_the_seed_matters_where_something_is_sampled():
    other = plan(replace(speculative_question(), seed=1))
    drafted = [each.result.mean_acceptance_length for each in plan(speculative_question()).plans]
    assert [each.result.mean_acceptance_length for each in other.plans] != drafted


def test_draft_lengths_are_searched():
    plans = {each.deployment.num_speculative_tokens: each for each in plan(speculative_question()).plans}
    assert sorted(plans) == [0, 2, 4]
    assert plans[0].result.mean_acceptance_length is None
    for k in (2, 4):
        assert plans[k].deployment.speculative_method == "ngram"
        assert 1 < plans[k].result.mean_acceptance_length <= k + 1
        assert plans[k].tokens_per_s_per_user > plans[0].tokens_per_s_per_user
    # 1 + 0.9 + 0.9 × 0.8, the end of each output aside.
    assert plans[2].result.mean_acceptance_length == pytest.approx(2.62, abs=0.15)


def test_no_drafts_is_no_speculation():
    asked = replace(speculative_question(), draft_lengths=(0,))
    assert plan(asked).model_dump_json() == plan(replace(asked, speculation=None)).model_dump_json()


def test_more_drafts_than_acceptance_rates():
    with pytest.raises(UserError, match="only 4 are given"):
        plan(replace(speculative_question(), draft_lengths=(0, 5)))


def test_json_round_trip():
    text = report().model_dump_json(indent=2)
    assert read_plan(text, "plan.json") == report()
    assert PlanReport.model_validate_json(text).model_dump_json(indent=2) == text


@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        (lambda d: d.pop("plans"), "plans"),
        (lambda d: d["plans"][0].pop("rank"), "plans.0.rank"),
        (lambda d: d["plans"][0].update(num_gpus="many"), "plans.0.num_gpus"),
        (lambda d: d.update(surplus=1), "surplus"),
    ],
)
def test_what_is_no_plan(spoil, where):
    document = json.loads(report().model_dump_json())
    spoil(document)
    with pytest.raises(UserError, match=rf"p\.json is not a plan .*\({where}: "):
        read_plan(json.dumps(document), "p.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00"])
def test_what_is_no_plan_at_all(text):
    with pytest.raises(UserError, match=r"p\.json is not a plan") as caught:
        read_plan(text, "p.json")
    assert "\n" not in str(caught.value)


def test_a_plan_of_another_schema_version_is_refused():
    document = json.loads(report().model_dump_json()) | {"schema_version": 2}
    with pytest.raises(UserError):
        read_plan(json.dumps(document), "p.json")


def test_every_number_of_a_plan_says_its_unit():
    """By its name, or because it is a count, a rank, a share or a percentile."""
    units = ("_ms", "_s", "_hour", "_tokens", "_len", "_gpu", "_user", "_blocks", "_gpus", "_limit")
    for name, field in Plan.model_fields.items():
        if field.annotation in (float, float | None):
            assert name.endswith(units) or name == "max_concurrency", name


def test_progress_is_told():
    seen = []
    search.plan(speculative_question(), 1, lambda done, total, what: seen.append((done, total, what)))
    # Each of two finalists on the given load and in two draws.
    assert seen == [(i, 3, "engines") for i in (1, 2, 3)] + [(i, 6, "draws") for i in range(1, 7)]


def test_zero_processes_is_bad_input():
    with pytest.raises(UserError):
        plan(speculative_question(), 0)


# ---- stopping early ------------------------------------------------------------------------------------------------


def is_lost(asked: Question, **engine) -> bool:
    options = replace(asked.options(), stop_when_slo_is_lost=True)
    try:
        simulate(asked.workload, replace(asked.engine, **engine).system(asked.workload), options)
    except SloLost:
        return True
    return False


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_stopping_early_never_contradicts_the_whole_simulation(data):
    """Limits are drawn from what the load itself achieves, so that they are met or missed by little."""
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 60))
    arrivals = np.cumsum(rng.exponential(1 / draw(st.sampled_from([2.0, 20.0, 100.0])), count))
    workload = load(arrivals, rng.integers(1, 1500, count), rng.integers(1, 40, count))
    blocks = draw(st.sampled_from([130, 200, 4000]))
    engine = {"num_gpu_blocks_override": blocks, "max_num_seqs": draw(st.sampled_from([2, 64])), "max_model_len": 2048}
    easy = ask(workload, SLO(ttft_ms=1e6, tpot_ms=1e6, e2el_ms=1e6), engine=engine)
    whole = simulated(easy)
    term = draw(st.sampled_from(["ttft", "tpot", "e2el"]))
    metric = whole.metric_ms(term)
    if metric is None:
        return
    limit = draw(st.sampled_from([metric.p50, metric.p90, metric.max])) * draw(st.sampled_from([0.99, 1.0, 1.01]))
    slo = SLO(**{f"{term}_ms": limit}, percentile=draw(st.sampled_from([50.0, 90.0, 99.0, 100.0])))
    asked = replace(easy, slo=slo)
    if is_lost(asked):
        assert not simulated(asked).slo_met


class Constant(StepTime):
    """Every step takes the same time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def predict(self, step: StepShape) -> float:
        return self.seconds


def test_stopping_early_agrees_at_the_limit_itself():
    """Every token takes exactly as long as is allowed."""
    asked = ask(load([0.0], [3], [21]), SLO(ttft_ms=1.0))
    for milliseconds in range(1, 60):
        step_time = Constant(milliseconds / 1000)
        system = replace(asked.engine.system(asked.workload), step_time=step_time)
        options = SimulationOptions(slo=SLO(tpot_ms=float(milliseconds), percentile=100.0))
        whole = simulate(asked.workload, system, options)
        try:
            simulate(asked.workload, system, replace(options, stop_when_slo_is_lost=True))
        except SloLost:
            assert not whole.slo_met, f"{milliseconds} ms"
