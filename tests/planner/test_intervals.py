"""Intervals and the probability of an SLO, against closed forms and simulations done by hand."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.scheduling import KVCacheConfig, SchedulerConfig, StepShape
from planner import search
from planner.basis import Basis, StepTimes, basis_of
from planner.catalog import load_gpu, load_model
from planner.deployment import Deployment
from planner.errors import UserError
from planner.intervals import (
    LEVEL,
    NUM_DRAWS,
    NUM_LOADS,
    confidence,
    draws,
    interval,
    perturbed,
    probability,
    scale_quantiles,
    simulate_draw,
    why_no_interval,
)
from planner.kv_format import KVCacheDtype
from planner.search import Question
from planner.serving import simulate
from planner.simulate_report import SimulateReport, simulate_report
from planner.simulation import SLO, SimulationOptions, System
from planner.step_time import Evidence, ScaledStepTime, StepTime, Uncertainty
from planner.workload import Workload


class Constant(StepTime):
    """Steps of prompts take 20 ms, all others 5 ms, known to these relative deviations; 0 for exactly."""

    evidence = Evidence.INTERPOLATED
    description = "made up"

    def __init__(self, decode: float | None, prefill: float | None = None) -> None:
        self.uncertainty = None if decode is None else Uncertainty(decode, decode if prefill is None else prefill)

    def predict(self, step) -> float:
        return 0.020 if step.prefills else 0.005


def system(step_time: StepTime) -> System:
    return System(SchedulerConfig(2048, 32, 4096), KVCacheConfig(2000, 16), step_time)


def load(count: int = 40, rate: float = 4.0, seed: int = 0, equal: bool = False) -> Workload:
    rng = np.random.default_rng(seed)
    arrival = np.cumsum(np.full(count, 1 / rate) if equal else rng.exponential(1 / rate, count))
    outputs = np.full(count, 20) if equal else rng.integers(2, 60, count)
    return Workload("load", arrival, np.full(count, 100), outputs)


def judged(step_time: StepTime, workload: Workload, slo: SLO | None = None, number: int = 8, seed: int = 0):
    options = SimulationOptions(seed=seed, slo=slo or SLO())
    point = simulate(workload, system(step_time), options)
    runs = [simulate_draw(workload, system(step_time), options, draw) for draw in draws(number, seed)]
    return point, runs, confidence(point, runs, step_time, seed)


# ---- draws ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(0, 1000))
def test_errors_cover_their_strata(number, seed):
    """One draw in each of n strata of equal probability, of either error; the median of the errors is none."""
    for column in zip(*scale_quantiles(number, seed), strict=True):
        strata = sorted(int(statistics.NormalDist().cdf(value) * number) for value in column)
        assert strata == list(range(number))
        assert statistics.median(column) == pytest.approx(0, abs=1e-9)


def test_errors_of_decodes_prompts_and_the_host_are_independent():
    correlation = np.corrcoef(list(zip(*scale_quantiles(400, 3), strict=True)))
    assert correlation.shape == (3, 3)
    assert np.abs(correlation - np.eye(3)).max() < 3 / math.sqrt(400)


class Launched(Constant):
    """Whose host takes 3 ms to launch a step, and begins to have the device at work after 1 ms of it."""

    def host_ticks(self, step) -> int:
        return 3 * 10**12

    def launched_ticks(self, step) -> int:
        return 2 * 10**12


def test_the_hosts_time_is_drawn_by_itself():
    known, steps = Launched(0.1), [StepShape(prefills=[(100, 0)]), StepShape(decode_contexts=[50])]
    known.uncertainty = Uncertainty(0.1, 0.1, 0.2)
    for error in (-1.5, 0.0, 2.0):
        found = perturbed(known, 0.0, 0.0, error)
        for step in steps:
            assert found.ticks(step) == known.ticks(step)
            for each in ("host_ticks", "wait_ticks", "launched_ticks"):
                assert getattr(found, each)(step) == round(getattr(known, each)(step) * math.exp(0.2 * error))
        again = found.scaled(host=0.5)
        assert again.host_ticks(steps[0]) == pytest.approx(0.5 * found.host_ticks(steps[0]), abs=2)
    ttft = [
        simulate(load(), system(perturbed(known, 0.0, 0.0, error)), SimulationOptions()) for error in (-2.0, 0.0, 2.0)
    ]
    assert ttft[0].ttft_ms.mean < ttft[1].ttft_ms.mean < ttft[2].ttft_ms.mean


def test_a_draw_is_the_resampled_load_with_scaled_steps():
    """By hand: the bootstrap of its seed, and both kinds of step multiplied."""
    workload, step_time = load(), Constant(0.1, 0.2)
    options = SimulationOptions(seed=5, slo=SLO(ttft_ms=60))
    for i, draw in enumerate(draws(4, 5), start=1):
        assert draw.seed == 5 + i
        scaled = ScaledStepTime(step_time, math.exp(0.1 * draw.decode), math.exp(0.2 * draw.prefill))
        expected = simulate(workload.resampled(5 + i), system(scaled), replace(options, seed=5 + i))
        found = simulate_draw(workload, system(step_time), options, draw)
        assert found == expected.model_copy(update={"timeline": ()})


def test_step_times_without_known_error_stay():
    step_time = Constant(None)
    assert perturbed(step_time, 2.0, -2.0) is step_time
    assert why_no_interval(step_time) == "step times are interpolated, and nothing measured says how far they are off"
    assert why_no_interval(Constant(0.0)) is None


# ---- intervals -----------------------------------------------------------------------------------------------------


@given(st.floats(-1e6, 1e6), st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_an_interval_holds_the_prediction_and_most_draws(point, values):
    found = interval(point, values)
    assert found.low <= point <= found.high
    inside = sum(found.low <= value <= found.high for value in values)
    # Hazen's quantiles leave out half a draw less than their share at either end.
    assert inside >= LEVEL * len(values) - 1


def test_an_interval_of_many_normal_draws_is_the_normal_one():
    values = [statistics.NormalDist(10, 2).inv_cdf((i + 0.5) / 1000) for i in range(1000)]
    found = interval(10.0, values)
    assert (found.low, found.high) == pytest.approx((10 - 2 * 1.645, 10 + 2 * 1.645), abs=0.01)


def test_intervals_of_a_fixed_load_are_those_of_the_step_times():
    """Equal requests, one at a time: TPOT is one decode step, so that its interval is the log-normal one."""
    workload = load(30, rate=1.0, equal=True)
    point, _, found = judged(Constant(0.05), workload, number=40)
    assert point.tpot_ms.mean == pytest.approx(5.0)
    expected = [5.0 * math.exp(0.05 * z) for z in (-1.645, 1.645)]
    assert (found.tpot_ms.mean.low, found.tpot_ms.mean.high) == pytest.approx(expected, rel=0.01)
    assert (found.ttft_ms.p50.low, found.ttft_ms.p50.high) == pytest.approx([4 * each for each in expected], rel=0.01)


@given(st.integers(0, 100), st.sampled_from([0.0, 0.02, 0.05]), st.sampled_from([3.0, 6.0]))
@settings(max_examples=15, deadline=None)
def test_intervals_hold_the_prediction_and_widen_with_the_uncertainty(seed, deviation, factor):
    workload = load(25, seed=seed)
    point, _, narrow = judged(Constant(deviation), workload, SLO(tpot_ms=50), seed=seed)
    wide = judged(Constant(0.02 + deviation * factor), workload, SLO(tpot_ms=50), seed=seed)[2]
    for name in ("ttft_ms", "tpot_ms", "e2el_ms"):
        for statistic in ("mean", "p50", "p90", "p99", "at_slo_percentile"):
            here = getattr(getattr(narrow, name), statistic)
            assert here.low <= getattr(getattr(point, name), statistic) <= here.high
    for name in ("request_throughput_per_s", "output_throughput_tokens_per_s"):
        assert getattr(narrow, name).low <= getattr(point, name) <= getattr(narrow, name).high
    spread = [found.tpot_ms.mean.high - found.tpot_ms.mean.low for found in (narrow, wide)]
    assert spread[1] > spread[0]


# ---- the probability -----------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.data())
def test_clopper_and_pearson(of, data):
    """Its ends are where the binomial distribution has 5 % on the other side of what was seen."""
    met = data.draw(st.integers(0, of))
    found = probability([True] * met + [False] * (of - met))
    assert (found.met, found.of, found.probability) == (met, of, met / of)
    assert 0 <= found.low <= found.probability <= found.high <= 1

    def at_most(count: int, p: float) -> float:
        return sum(math.comb(of, i) * p**i * (1 - p) ** (of - i) for i in range(count + 1))

    if met:
        assert 1 - at_most(met - 1, found.low) == pytest.approx(0.05, abs=1e-6)
    if met < of:
        assert at_most(met, found.high) == pytest.approx(0.05, abs=1e-6)


def test_clear_cases():
    for limit, expected in ((1e6, 1.0), (4.0, 0.0)):
        chance = judged(Constant(0.02), load(), SLO(tpot_ms=limit))[2].slo_probability
        assert chance.probability == expected
    assert judged(Constant(0.02), load())[2].slo_probability is None  # nothing was asked


def test_the_probability_is_that_of_the_step_time():
    """Equal requests, one at a time: TPOT ≤ limit as often as the log-normal factor allows."""
    workload = load(20, rate=1.0, equal=True)
    for z in (-1.0, 0.0, 0.5, 1.5):
        limit = 5.0 * math.exp(0.1 * z)
        chance = judged(Constant(0.1), workload, SLO(tpot_ms=limit), number=50)[2].slo_probability
        assert chance.probability == pytest.approx(statistics.NormalDist().cdf(z), abs=0.021)


@given(st.integers(0, 50), st.lists(st.floats(20, 200), min_size=2, max_size=5))
@settings(max_examples=12, deadline=None)
def test_a_looser_limit_is_never_less_likely_met(seed, limits):
    workload = load(25, rate=12.0, seed=seed)
    chances = [
        judged(Constant(0.15), workload, SLO(ttft_ms=limit), number=6, seed=seed)[2].slo_probability.probability
        for limit in sorted(limits)
    ]
    assert chances == sorted(chances)


# ---- what step times rest on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({"interpolated": 1.0}, Basis.INTERPOLATED),
        ({"measured": 1.0}, Basis.MEASURED),
        ({"measured": 0.7, "interpolated": 0.3}, Basis.INTERPOLATED),
        ({"interpolated": 0.9995, "extrapolated": 0.0005}, Basis.INTERPOLATED),
        ({"interpolated": 0.9, "extrapolated": 0.1}, Basis.EXTRAPOLATED),
        ({"measured": 0.9999, "uncalibrated": 0.0001}, Basis.MEASURED),
    ],
)
def test_one_word_for_shares(shares, expected):
    assert basis_of({Evidence(name): share for name, share in shares.items()}, Constant(None)) is expected


def test_a_model_of_extrapolations_alone_was_transferred():
    step_time = Constant(0.1)
    step_time.evidence = Evidence.EXTRAPOLATED
    assert basis_of({Evidence.EXTRAPOLATED: 1.0}, step_time) is Basis.TRANSFERRED


def test_step_times_of_a_result():
    result = simulate(load(), system(Constant(0.03, 0.04)))
    found = StepTimes.of(result, Constant(0.03, 0.04))
    assert (found.basis, found.description) == (Basis.INTERPOLATED, "made up")
    assert (found.decode_uncertainty, found.prefill_uncertainty) == (0.03, 0.04)
    assert StepTimes.of(result, Constant(None)).decode_uncertainty is None


def test_steps_beyond_what_was_measured_are_told():
    """Their error is not in the uncertainty; of a transfer it is."""
    step_time = Constant(0.05)
    point, runs, inside = judged(step_time, load())
    assert inside.unknown_share == 0
    shares = {Evidence.INTERPOLATED: 0.7, Evidence.EXTRAPOLATED: 0.3}
    beyond = point.model_copy(update={"evidence_shares": shares})
    assert confidence(beyond, runs, step_time, 0).unknown_share == 0.3
    step_time.evidence = Evidence.EXTRAPOLATED
    assert confidence(beyond, runs, step_time, 0).unknown_share == 0


# ---- simulate and plan ---------------------------------------------------------------------------------------------

H200, LLAMA = load_gpu("h200_sxm"), load_model("llama-3.1-8b")
SMALL = Workload("w", np.arange(40) * 0.1, np.full(40, 500), np.full(40, 40))


def deployment(**changes) -> Deployment:
    return Deployment(LLAMA, H200, max_model_len=1024, **changes)


def report(num_draws: int | None = None, n_jobs: int = 1, workload: Workload = SMALL, **changes) -> SimulateReport:
    options = SimulationOptions(slo=SLO(ttft_ms=500, tpot_ms=50))
    return simulate_report(workload, deployment(**changes), options, None, num_draws, n_jobs)


def test_simulate_draws_by_default_what_was_measured():
    found = report()
    assert found.confidence.num_draws == NUM_DRAWS
    assert found.confidence.slo_probability.probability == 1
    assert found.step_times.basis is Basis.INTERPOLATED
    assert found.no_interval is None
    assert report(4).confidence.num_draws == 4


def test_simulate_says_why_there_is_no_interval():
    assert "--intervals 0 asked for none" in report(0).no_interval
    uncalibrated = report(8, profiles=("none",))
    assert uncalibrated.confidence is None
    assert uncalibrated.step_times.basis is Basis.UNCALIBRATED
    assert "uncalibrated" in uncalibrated.no_interval
    large = Workload("large", np.linspace(0, 3000, 20_001), np.full(20_001, 10), np.full(20_001, 1))
    assert "--intervals 16" in report(None, workload=large).no_interval
    with pytest.raises(UserError, match="--intervals is -1"):
        report(-1)


def test_reports_do_not_depend_on_the_number_of_processes(monkeypatch):
    monkeypatch.setattr("planner.simulate_report._WORTH_PROCESSES", 0)
    assert report(4, 1).model_dump_json() == report(4, 2).model_dump_json()


def ask(**changes) -> Question:
    engine = deployment(**changes.pop("engine", {}))
    asked = {
        "gpus": (H200,),
        "total_gpus": 2,
        "tensor_parallel_sizes": (1, 2),
        "kv_cache_dtypes": (KVCacheDtype.BFLOAT16,),
        "max_num_seqs": (64,),
        "num_finalists": 2,
        **changes,
    }
    return Question(engine, SMALL, SLO(ttft_ms=500, tpot_ms=50), **asked)


def test_finalists_have_intervals_and_a_probability():
    found = search.plan(ask(num_draws=6), 1)
    for plan, basis in zip(found.plans, (Basis.INTERPOLATED, Basis.TRANSFERRED), strict=True):
        sure = plan.confidence
        assert plan.step_times.basis is basis
        assert (plan.loads.met, plan.loads.of, sure.num_draws) == (6, 6, 6)
        assert (sure.slo_probability.met, sure.slo_probability.of) == (6, 6)
        assert plan.no_interval is None
        for term in plan.terms:
            around = sure.metric_ms(term.term).at_slo_percentile
            assert around.low <= term.achieved_ms <= around.high
    one, other = (plan.confidence for plan in found.plans)
    assert other.decode_uncertainty > one.decode_uncertainty  # what was transferred is known less well


def test_a_finalist_is_what_simulate_says_of_it():
    (plan,) = search.plan(ask(num_draws=5, num_finalists=1, tensor_parallel_sizes=(1,)), 1).plans
    assert plan.confidence == report(5, max_num_seqs=64).confidence


def test_uncalibrated_finalists_have_loads_and_no_claim():
    found = search.plan(ask(engine={"profiles": ("none",)}, num_finalists=1), 1).plans[0]
    assert found.confidence is None
    assert found.loads.of == NUM_LOADS
    assert "uncalibrated" in found.no_interval
    assert found.step_times.basis is Basis.UNCALIBRATED


def test_plans_do_not_depend_on_the_number_of_processes():
    asked = ask(num_draws=3)
    assert search.plan(asked, 1).model_dump_json() == search.plan(asked, 2).model_dump_json()


# ---- the command line ----------------------------------------------------------------------------------------------

LOAD = ("--num-prompts", 40, "--isl", 512, "--osl", 32, "--ttft", 500)


def test_simulate_on_the_command_line(memwall):
    line = ("simulate", *LOAD, "--intervals", 4)
    text = " ".join(memwall(*line).out.split())
    assert "90 % intervals, milliseconds, of 4 draws of the load and of the step times" in text
    assert "meets the SLO with probability 100 % (4 of 4 draws; 90 % interval 47 to 100 %)" in text
    sure = json.loads(memwall(*line, "--output", "json", "--jobs", 1).out)["confidence"]
    assert sure["num_draws"] == 4
    assert set(sure["ttft_ms"]["p99"]) == {"low", "high"}
    assert sure["slo_probability"]["low"] == pytest.approx(0.05**0.25)
    text = " ".join(memwall("simulate", *LOAD, "--profile", "none").out.split())
    assert "no interval: step times are uncalibrated" in text
    assert "probability" not in text
    memwall("simulate", "--intervals", "-1").check_bad_input("--intervals is '-1'")
    memwall("simulate", *LOAD, "--jobs", 0).check_bad_input("--jobs is 0")


def test_speculation_is_extrapolated_and_says_so(memwall):
    """The shipped profile has no verification steps."""
    config = '{"method": "ngram", "num_speculative_tokens": 2}'
    line = ("simulate", *LOAD, "--intervals", 2, "--speculative-config", config, "--acceptance-rates", "0.9,0.8")
    text = " ".join(memwall(*line).out.split())
    assert "step times: extrapolated" in text
    assert "the intervals do not know how far that is off" in text


def test_plan_on_the_command_line(memwall):
    line = ("plan", *LOAD, "-tp", "1,2", "--max-num-seqs", 64, "--draws", 3, "--finalists", 2, "--jobs", 1)
    text = " ".join(memwall(*line).out.split())
    assert "meets the SLO with probability 100 % (3 of 3 draws; 90 % interval 37 to 100 %)" in text
    assert "90 % interval" in text
    assert "I interpolated between measured steps" in text
    uncalibrated = " ".join(memwall(*line, "--profile", "none").out.split())
    assert "no interval" in uncalibrated
    assert "U data sheet × stated efficiencies, nothing measured" in uncalibrated
    assert "with probability" not in uncalibrated
