"""The bounds against simulations: what they say cannot be undercut is not."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.scheduling import StepShape
from planner.bounds import Floor, Floors, busy_replicas
from planner.catalog import load_gpu, load_model
from planner.deployment import Deployment
from planner.simulation import SLO, AcceptanceProcess, SimulationOptions, Verdict, simulate
from planner.speculation import SpeculationConfig
from planner.step_time import StepTime
from planner.workload import Workload

SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
H200 = load_gpu("h200_sxm")
SPECULATION = {
    "none": None,
    "ngram": SpeculationConfig("ngram", 3, AcceptanceProcess((1.0, 1.0, 1.0))),
    "draft": SpeculationConfig("draft_model", 2, AcceptanceProcess((1.0, 0.9)), load_model("llama-3.2-1b"), "draft"),
}


def load(arrival_s, prompts, outputs, **prefixes) -> Workload:
    return Workload("load", np.array(arrival_s, float), np.array(prompts), np.array(outputs), **prefixes)


@cache
def deployment(model: str, **settings) -> Deployment:
    return Deployment(load_model(model), H200, max_model_len=4096, **settings)


def floor_ms(floors: Floors, term: str, percentile: float) -> float:
    """The floor of one term, coaxed out by a limit that nothing meets."""
    violated = floors.violated(SLO(**{f"{term}_ms": 1e-9}, percentile=percentile))
    return violated.at_least_ms if violated else 0.0


@st.composite
def workloads(draw, prefixes: bool = False) -> Workload:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 25))
    gap_s = draw(st.sampled_from([0.0, 0.01, 0.3, 5.0]))
    prompts = rng.integers(1, draw(st.sampled_from([20, 300, 3000])) + 1, count)
    outputs = rng.integers(1, draw(st.sampled_from([1, 4, 60])) + 1, count)
    arrivals = np.cumsum(rng.exponential(gap_s, count)) if gap_s else np.zeros(count)
    if not prefixes:
        return load(arrivals, prompts, outputs)
    # Conversations of blocks of 64 tokens: the first blocks of two pools.
    blocks = tuple(np.arange(-(-tokens // 64)) + 1000 * (i % 2) for i, tokens in enumerate(prompts))
    return load(arrivals, prompts, outputs, prefix_block_hashes=blocks, prefix_block_tokens=64)


@given(
    workloads(),
    st.sampled_from(["llama-3.2-1b", "gemma-3-1b", "gpt-oss-20b", "deepseek-v2-lite"]),
    st.sampled_from([64, 512, 8192]),
    st.sampled_from(list(SPECULATION)),
    st.sampled_from([50.0, 90.0, 99.0, 100.0]),
)
@settings(SLOW, max_examples=120)
def test_floors_are_lower_bounds(workload, model, budget, drafter, percentile):
    used = deployment(model, max_num_batched_tokens=budget, max_num_seqs=16, speculation=SPECULATION[drafter])
    check_floors(workload, used, percentile)


@given(workloads(prefixes=True), st.sampled_from([64, 8192]), st.sampled_from([50.0, 99.0]))
@settings(SLOW, max_examples=60)
def test_floors_are_lower_bounds_with_prefix_caching(workload, budget, percentile):
    used = deployment("llama-3.2-1b", max_num_batched_tokens=budget, max_num_seqs=16, enable_prefix_caching=True)
    check_floors(workload, used, percentile)


def check_floors(workload: Workload, used: Deployment, percentile: float) -> None:
    limits = SLO(1e9, 1e9, 1e9, percentile)
    result = simulate(workload, used.system(workload), SimulationOptions(slo=limits))
    floors = Floors(workload, used, used.step_time(), result.warmup_s)
    for term in ("ttft", "tpot", "e2el"):
        metric = result.metric_ms(term)
        if metric is not None:
            assert metric.at_slo_percentile >= floor_ms(floors, term, percentile) * (1 - 1e-9), term


class Affine(StepTime):
    """1 ms, and 0.01 ms for each query token, and 0.001 ms for each token of context."""

    def predict(self, step: StepShape) -> float:
        contexts = sum(step.decode_contexts) + sum(context for _, context in step.prefills)
        return (1 + 0.01 * step.num_tokens + 0.001 * contexts) / 1000


def test_floors_by_hand():
    """A prompt of 250 in chunks of 100: 2 + 2.1 + 1.7 ms; then tokens of 1.26 ms and more."""
    used = deployment("llama-3.2-1b", max_num_batched_tokens=100, max_num_seqs=8)
    floors = Floors(load([0, 1], [250, 250], [5, 5]), used, Affine(), 0.0)
    assert floors.prefill_s(250) == pytest.approx(5.8e-3)
    assert floors.token_s(250) == pytest.approx(1.26e-3)
    assert floor_ms(floors, "ttft", 99) == pytest.approx(5.8)
    assert floor_ms(floors, "tpot", 99) == pytest.approx(1.26)
    assert floor_ms(floors, "e2el", 99) == pytest.approx(5.8 + 4 * 1.26)


def test_speculation_lowers_the_floor_of_a_token_to_its_share_of_a_round():
    used = deployment("llama-3.2-1b", max_num_batched_tokens=100, max_num_seqs=8, speculation=SPECULATION["ngram"])
    assert Floors(load([0], [250], [5]), used, Affine(), 0.0).token_s(250) == pytest.approx(1.26e-3 / 4)


def test_a_cached_prompt_still_costs_its_last_token():
    used = deployment("llama-3.2-1b", max_num_batched_tokens=100, max_num_seqs=8, enable_prefix_caching=True)
    known = load([0], [250], [5], prefix_block_hashes=(np.array([0, 1, 2, 3]),), prefix_block_tokens=64)
    assert Floors(known, used, Affine(), 0.0).prefill_s(250) == pytest.approx((1 + 0.01 + 0.249) * 1e-3)
    # Nothing to hit: the whole prompt.
    assert Floors(load([0], [250], [5]), used, Affine(), 0.0).prefill_s(250) == pytest.approx(5.8e-3)


def test_the_floor_at_a_percentile_is_that_share_of_requests():
    """A tenth of the prompts is long: the 80th percentile does not see them, the 95th does."""
    used = deployment("llama-3.2-1b", max_num_seqs=8)
    floors = Floors(load(np.arange(100.0), [100] * 90 + [3000] * 10, [5] * 100), used, Affine(), 0.0)
    assert floor_ms(floors, "ttft", 80) == pytest.approx(2.0)
    assert floor_ms(floors, "ttft", 95) == pytest.approx(31.0)


def test_warm_up_is_left_out():
    used = deployment("llama-3.2-1b", max_num_seqs=8)
    floors = Floors(load([0, 1, 10], [3000, 3000, 100], [5] * 3), used, Affine(), 5.0)
    assert floor_ms(floors, "ttft", 100) == pytest.approx(2.0)


def test_the_worst_violation_is_reported():
    used = deployment("llama-3.2-1b", max_num_batched_tokens=100, max_num_seqs=8)
    floors = Floors(load([0, 1], [250, 250], [5, 5]), used, Affine(), 0.0)
    assert floors.violated(SLO(ttft_ms=5.9, tpot_ms=1.27, e2el_ms=11)) is None
    floor = floors.violated(SLO(ttft_ms=5.0, tpot_ms=0.1, e2el_ms=10))
    assert isinstance(floor, Floor)
    assert (floor.term, floor.limit_ms, floor.why) == ("tpot", 0.1, "one decode step of a single request")


def test_requests_of_one_token_have_no_tpot():
    used = deployment("llama-3.2-1b", max_num_seqs=8)
    assert Floors(load([0, 1], [250, 250], [1, 1]), used, Affine(), 0.0).violated(SLO(tpot_ms=1e-9)) is None


# ---- replicas ------------------------------------------------------------------------------------------------------

STABLE = SLO(ttft_ms=1e9)


def demand(workload: Workload, used: Deployment) -> int:
    return busy_replicas(workload, used, used.memory(), used.step_time(), 0.05 * workload.duration_s)


def serving(workload: Workload, used: Deployment, most: int = 6) -> int:
    """The fewest replicas that keep up, by simulation."""
    for replicas in range(1, most + 1):
        system = replace(used, replicas=replicas).system(workload)
        if simulate(workload, system, SimulationOptions(slo=STABLE)).verdict is Verdict.STABLE:
            return replicas
    return most + 1


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([5.0, 40.0, 120.0]),
    st.sampled_from([(100, 4), (1000, 4), (300, 60)]),
    st.sampled_from([4, 64]),
    st.sampled_from(["none", "ngram"]),
)
@settings(SLOW, max_examples=25)
def test_a_steady_load_needs_about_the_replicas_of_its_demand(seed, rate, lengths, seqs, drafter):
    """Ten seconds and more of a load, each request far shorter than that. The demand is an estimate, off by one."""
    rng = np.random.default_rng(seed)
    count = int(rate * 10)
    prompts, outputs = (rng.integers(length // 2, length + 1, count) for length in lengths)
    workload = load(np.cumsum(rng.exponential(1 / rate, count)), prompts, outputs)
    used = deployment("llama-3.1-8b", max_num_seqs=seqs, speculation=SPECULATION[drafter])
    assert demand(workload, used) <= serving(workload, used) + 1


def test_demand_counts_what_the_prefix_cache_leaves():
    """Prompts of 2,048 tokens whose first 1,984 are known leave a thirtieth of the work."""
    count = 1500
    arrivals = np.linspace(0, 10, count)
    shared = tuple(np.append(np.arange(31), 100 + i) for i in range(count))
    workload = load(arrivals, [2048] * count, [2] * count, prefix_block_hashes=shared, prefix_block_tokens=64)
    cached = deployment("llama-3.1-8b", enable_prefix_caching=True)
    assert demand(workload, deployment("llama-3.1-8b")) > 3
    assert demand(workload, cached) <= serving(workload, cached) == 1


def test_all_at_once_is_no_rate():
    assert demand(load([0.0] * 50, [3000] * 50, [5] * 50), deployment("llama-3.1-8b")) == 1


class Bumpy(StepTime):
    """A chunk of 100 to 200 tokens is slower than any up to 400, as with a poor matrix kernel."""

    def predict(self, step: StepShape) -> float:
        tokens = step.num_tokens
        return 0.05 if 100 <= tokens < 200 else 0.01 + tokens * 5e-5


def test_floors_where_a_larger_step_is_faster():
    """Up to what the steps between two lengths of the grid differ by."""
    prompts = np.arange(50, 401)
    workload = Workload("load", np.arange(len(prompts)) * 1.0, prompts, np.full(len(prompts), 2))
    floors = Floors(workload, deployment("llama-3.2-1b"), Bumpy(), 0.0)
    values = floors._from_below(floors.prefill_s, prompts)
    exact = [Bumpy().predict(StepShape(prefills=[(int(n), 0)])) for n in prompts]
    assert (np.diff(values) >= 0).all()
    between = np.ceil(len(prompts) / 48) * 5e-5
    assert (values <= np.array(exact) + between).all()
