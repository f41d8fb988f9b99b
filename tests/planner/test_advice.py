"""The warnings of a simulation: each where it is due, and only there."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from planner.advice import NEAR_FULL, cliff_warning, examine
from planner.catalog import load_gpu, load_model
from planner.deployment import Deployment
from planner.errors import UserError
from planner.simulation import AcceptanceProcess, SimulationOptions, SimulationResult, Verdict, simulate
from planner.speculation import SpeculationConfig
from planner.workload import Workload

MODEL, GPU = load_model("llama-3.1-8b"), load_gpu("h200_sxm")
KNEE = 1400  # blocks at which `steady` is about to fall off


def load(arrival_s, prompts, outputs, **more) -> Workload:
    return Workload("load", np.array(arrival_s, float), np.array(prompts), np.array(outputs), **more)


@cache
def steady() -> Workload:
    """12 requests a second that hold about 900 blocks of KV."""
    rng = np.random.default_rng(1)
    arrivals = np.cumsum(rng.exponential(1 / 12, 900))
    return load(arrivals, rng.integers(200, 1400, 900), rng.integers(50, 400, 900))


def deployment(blocks: int | None = None, **settings) -> Deployment:
    fixed = {"max_model_len": 2048, "num_gpu_blocks_override": blocks, "profiles": ("none",)}
    return Deployment(MODEL, GPU, **fixed | settings)


@cache
def examined(blocks: int) -> SimulationResult:
    return examine(steady(), deployment(blocks))


def mentions(result: SimulationResult, text: str) -> bool:
    return any(text in warning for warning in result.warnings)


def p99(blocks: int) -> float:
    return simulate(steady(), deployment(blocks).system(steady())).ttft_ms.p99


# ---- the cliff -----------------------------------------------------------------------------------------------------


def test_a_few_per_cent_of_blocks_multiply_ttft_near_the_knee_and_the_result_warns():
    """S12: at the knee 10 % fewer blocks more than double p99 TTFT; with three times the blocks nothing happens."""
    assert p99(round(0.9 * KNEE)) >= 2 * p99(KNEE)
    assert p99(round(0.9 * 3 * KNEE)) == pytest.approx(p99(3 * KNEE), rel=0.01)
    assert mentions(examined(KNEE), "operating point within 10% of a cliff")
    assert not mentions(examined(3 * KNEE), "cliff")


def test_the_cliff_is_told_in_numbers():
    (warning,) = [text for text in examined(KNEE).warnings if "cliff" in text]
    # One block of the pool is the null block, which the override does not count.
    fewer = KNEE + 1 - round(0.1 * (KNEE + 1)) - 1
    assert f"from {p99(KNEE):,.0f} to {p99(fewer):,.0f} ms" in warning
    smaller = simulate(steady(), deployment(fewer).system(steady()))
    assert f"{examined(KNEE).preempted_share:.1%} → {smaller.preempted_share:.1%}" in warning


def test_preemption_away_from_a_cliff_is_said_without_the_word():
    result = examined(1700)
    assert result.num_preemptions
    assert mentions(result, f"{result.preempted_share:.1%} of requests are preempted for want of KV blocks")
    assert not mentions(result, "cliff")


def test_no_second_simulation_where_the_pool_is_far_from_full(monkeypatch):
    result = examined(3 * KNEE)
    assert result.kv_usage_peak < NEAR_FULL
    monkeypatch.setattr("planner.advice.simulate", lambda *_: pytest.fail("not needed"))
    assert cliff_warning(steady(), deployment(3 * KNEE).system(steady()), SimulationOptions(), result) == []


def test_a_pool_of_one_sequence_has_no_smaller_one():
    """128 blocks are one sequence of 2,048 tokens."""
    result = examine(load([0.0, 0.1], [2000, 2000], [40, 40]), deployment(128))
    assert mentions(result, "could not hold one request of max_model_len")


# ---- the others ----------------------------------------------------------------------------------------------------


def test_saturation():
    """400 prompts a second of 2,000 tokens are more than any GPU computes."""
    workload = load(np.linspace(0, 5, 2000), [1900] * 2000, [2] * 2000)
    result = examine(workload, deployment())
    assert result.verdict is Verdict.SATURATED
    assert mentions(result, "saturated: requests arrive faster than they are served")
    assert not mentions(examined(3 * KNEE), "saturated")


def test_uncalibrated():
    assert mentions(examined(3 * KNEE), "uncalibrated")
    assert not mentions(examine(steady(), replace(deployment(3 * KNEE), profiles=None)), "uncalibrated")


def conversations(count: int = 60, turns: int = 4) -> Workload:
    """Prompts of 1,024 tokens, asked again when all others have been."""
    blocks = tuple(np.arange(16) + 100 * (i % count) for i in range(count * turns))
    total = count * turns
    return load(
        np.arange(total) * 0.2, [1024] * total, [10] * total, prefix_block_hashes=blocks, prefix_block_tokens=64
    )


def test_a_prefix_cache_that_is_too_small():
    """60 prompts of 64 blocks are 3,840; 600 blocks forget them before they come again, 6,000 do not."""
    workload = conversations()
    small = examine(workload, deployment(600, enable_prefix_caching=True))
    assert small.prefix_cache_hit_rate == 0.0
    own = workload.infinite_cache_hit_rate(16)
    assert mentions(
        small, f"the prefix cache reaches 0.0% of prompt tokens where an infinite one would reach {own:.1%}"
    )
    assert mentions(small, "from the 9,600 tokens of KV")
    large = examine(workload, deployment(6000, enable_prefix_caching=True))
    assert large.prefix_cache_hit_rate == pytest.approx(own)
    assert not mentions(large, "prefix")
    assert not mentions(examine(workload, deployment(600)), "prefix")


def test_prefix_caching_without_prefixes():
    result = examine(load([0, 1], [100, 100], [5, 5]), deployment(enable_prefix_caching=True))
    assert mentions(result, "the workload says nothing about shared prefixes")


def test_rejected_prompts():
    workload = load([0, 1, 2, 3], [100, 3000, 100, 3000], [5] * 4)
    result = examine(workload, deployment(), SimulationOptions(reject_too_long=True))
    assert mentions(result, "2 of 4 prompts exceed max_model_len: rejected")
    assert not mentions(examine(workload, deployment(max_model_len=4096)), "rejected")


def test_notes_of_the_workload_and_of_the_memory_come_along():
    noted = load([0, 1], [100, 100], [5, 5], notes=("3 rows were skipped",))
    greedy = deployment(gpu_memory_utilization=0.99)
    result = examine(noted, greedy)
    assert "3 rows were skipped" in result.warnings
    assert greedy.memory().warnings
    assert set(greedy.memory().warnings) <= set(result.warnings)


def test_advice_changes_nothing_but_the_warnings():
    plain = simulate(steady(), deployment(KNEE).system(steady()))
    assert examined(KNEE).model_copy(update={"warnings": ()}) == plain


def test_a_draft_and_windows_near_the_smallest_pool():
    """With 10 % fewer blocks one request would not fit beside its lookahead: that is said, not raised."""
    model, draft = load_model("gemma-3-27b"), load_model("gemma-3-1b")
    speculation = SpeculationConfig("draft_model", 4, AcceptanceProcess((0.8, 0.7, 0.7, 0.7)), draft)
    used = Deployment(model, load_gpu("h200_sxm"), max_model_len=16384, speculation=speculation)
    smallest = replace(used, num_gpu_blocks_override=used.memory().blocks_per_sequence)
    workload = load([0.0] * 12, [3000] * 12, [200] * 12)
    result = examine(workload, smallest)
    assert result.num_finished == 12
    assert mentions(result, "could not hold one request of max_model_len")
    with pytest.raises(UserError, match="KV cache"):
        examine(workload, replace(smallest, num_gpu_blocks_override=smallest.num_gpu_blocks_override - 1))


def test_outputs_cut_at_max_model_len_are_mentioned():
    used = replace(deployment(6000), max_model_len=1024)
    assert mentions(examine(load([0.0, 1.0], [1000, 10], [500, 5]), used), "1 of 2 requests reach max_model_len 1024")
