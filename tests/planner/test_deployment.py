"""A deployment becomes a system, and costs what its GPUs cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from planner.catalog import gpu_entry, list_gpus, load_gpu, load_model
from planner.deployment import Deployment, PriceList, length_for
from planner.errors import UserError
from planner.memory import KVCacheDtype
from planner.simulation import AcceptanceProcess
from planner.simulation.router import ROUTERS
from planner.speculation import SpeculationConfig
from planner.workload import Workload

MODEL, GPU = load_model("llama-3.1-8b"), load_gpu("h200_sxm")
# With the memory model's blocks, not those of a profile.
DEPLOYMENT = Deployment(MODEL, GPU, max_model_len=8192, profiles=("none",))
RATES = AcceptanceProcess((0.8, 0.7))


def load(prompts, outputs, **prefixes) -> Workload:
    count = len(prompts)
    return Workload("load", np.arange(count) * 1.0, np.array(prompts), np.array(outputs), **prefixes)


PLAIN = load([100], [10])
SHARED = load([100], [10], prefix_block_hashes=(np.array([0]),), prefix_block_tokens=64)


# ---- the system that is simulated ----------------------------------------------------------------------------------


def test_system_has_the_blocks_of_the_memory_report():
    memory = DEPLOYMENT.memory()
    system = DEPLOYMENT.system(PLAIN)
    # 131,072 bytes per token in 16-bit KV: 32 layers, 8 heads, 128 wide, K and V.
    assert memory.num_kv_blocks == memory.kv_cache_bytes_available // (131_072 * 16)
    assert system.cache.num_blocks == memory.num_kv_blocks + 1  # the null block
    assert system.cache.block_size == 16
    assert tuple(system.cache.windows) == (None,)
    assert system.scheduler.max_model_len == 8192
    assert DEPLOYMENT.system(PLAIN, memory).cache == system.cache


def test_settings_reach_the_scheduler():
    used = replace(
        DEPLOYMENT,
        replicas=3,
        max_num_seqs=7,
        max_num_batched_tokens=999,
        enable_chunked_prefill=False,
        enable_prefix_caching=True,
        router="round-robin",
    )
    system = used.system(PLAIN)
    scheduler = system.scheduler
    assert (scheduler.max_num_seqs, scheduler.max_num_batched_tokens) == (7, 999)
    assert not scheduler.enable_chunked_prefill
    assert scheduler.num_lookahead_tokens == 0
    assert system.cache.enable_prefix_caching
    assert (system.replicas, system.router, system.speculation) == (3, "round-robin", None)
    assert used.num_gpus == 3


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 16), ("fp8", 16), ("int8", 16), ("int4", 64), ("int2", 64)])
def test_block_sizes(dtype, size):
    used = replace(DEPLOYMENT, kv_cache_dtype=KVCacheDtype(dtype))
    assert used.system(PLAIN).cache.block_size == used.memory().block_size == size
    assert replace(used, block_size=128).system(PLAIN).cache.block_size == 128


def test_half_the_bytes_are_twice_the_blocks():
    double = replace(DEPLOYMENT, kv_cache_dtype=KVCacheDtype.FP8).system(PLAIN).cache.num_blocks - 1
    assert double == pytest.approx(2 * (DEPLOYMENT.system(PLAIN).cache.num_blocks - 1), abs=2)


def test_windows_are_the_models():
    """gpt-oss alternates 128-token windows with full attention: one group of each."""
    model = load_model("gpt-oss-20b")
    hybrid = Deployment(model, GPU, max_model_len=8192)
    assert tuple(hybrid.system(PLAIN).cache.windows) == (None, 128)
    unified = replace(hybrid, kv_cache_policy="unified")
    assert set(unified.system(PLAIN).cache.windows) == {None}


def test_blocks_may_be_given():
    assert replace(DEPLOYMENT, num_gpu_blocks_override=1234).system(PLAIN).cache.num_blocks == 1235


def test_speculation_reaches_the_simulator():
    ngram = replace(DEPLOYMENT, speculation=SpeculationConfig("ngram", 2, RATES)).system(PLAIN)
    assert (ngram.speculation.num_speculative_tokens, ngram.scheduler.num_lookahead_tokens) == (2, 0)
    assert ngram.speculation.acceptance == RATES
    small = load_model("llama-3.2-1b")
    draft = replace(DEPLOYMENT, speculation=SpeculationConfig("draft_model", 1, RATES, small, "draft"))
    system = draft.system(PLAIN)
    assert (system.speculation.num_speculative_tokens, system.scheduler.num_lookahead_tokens) == (1, 1)
    assert system.speculation.acceptance.conditional_rates == (0.8,)
    assert system.cache.num_blocks < ngram.cache.num_blocks  # the draft model's weights and KV


def test_what_does_not_fit_is_no_system():
    big = Deployment(load_model("llama-3.1-70b"), GPU)
    with pytest.raises(UserError) as caught:
        big.system(PLAIN)
    assert str(caught.value) == big.memory().reason
    with pytest.raises(UserError, match="one sequence of 8192 tokens"):
        replace(DEPLOYMENT, num_gpu_blocks_override=511).system(PLAIN)
    replace(DEPLOYMENT, num_gpu_blocks_override=512).system(PLAIN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_parallel_size": 3}, "must divide the 32"),
        ({"tensor_parallel_size": 16}, "a node has 8"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size is 0"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_num_seqs": 512, "max_num_batched_tokens": 256}, "must not exceed max_num_batched_tokens"),
        ({"max_model_len": 0}, "max_model_len is 0"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization is nan"),
        ({"kv_cache_policy": "half"}, "kv_cache_policy is 'half'"),
        ({"num_gpu_blocks_override": -1}, "num_gpu_blocks is -1"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(UserError, match=message):
        replace(DEPLOYMENT, **changes).system(PLAIN)


# ---- the router ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caching", "workload", "router"),
    [
        (True, SHARED, "prefix-affinity"),
        (False, SHARED, "least-outstanding"),
        (True, PLAIN, "least-outstanding"),
        (False, PLAIN, "least-outstanding"),
    ],
)
def test_auto_router(caching, workload, router):
    used = replace(DEPLOYMENT, enable_prefix_caching=caching)
    assert used.router_for(workload) == used.system(workload).router == router


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_by_name_is_taken(name):
    assert replace(DEPLOYMENT, router=name).router_for(SHARED) == name


def test_unknown_router():
    with pytest.raises(UserError, match="router is 'random'; it must be one of auto, round-robin"):
        replace(DEPLOYMENT, router="random").router_for(PLAIN)


# ---- lengths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "outputs", "length"),
    [
        ([1], [1], 1024),
        ([1000], [24], 1024),
        ([1000], [25], 2048),
        ([900, 100], [10, 2000], 3072),  # of one request, not the longest prompt and the longest output
        ([131_000], [72], 131_072),
        ([131_000], [73], 131_072),  # the model's limit
        ([200_000], [1], 131_072),
    ],
)
def test_length_for(prompts, outputs, length):
    assert length_for(load(prompts, outputs), MODEL) == length


# ---- prices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", list_gpus())
def test_prices_are_the_catalogs(gpu):
    entry = gpu_entry(gpu)
    nearest = {
        "low": ("low", "typical", "high"),
        "typical": ("typical", "low", "high"),
        "high": ("high", "typical", "low"),
    }
    for tier, order in nearest.items():
        known = [entry[f"price_{name}"] for name in order if entry[f"price_{name}"]]
        price = PriceList(tier).price(load_gpu(gpu))
        if not known:
            assert price is None
        else:
            assert price.usd_per_gpu_hour == known[0]["usd_per_gpu_hour"]
            assert (price.source, price.date) == (known[0]["source"], known[0]["date"])


def test_own_prices_come_first():
    prices = PriceList("high", (("h200_sxm", 1.5),))
    price = prices.price(GPU)
    assert (price.usd_per_gpu_hour, price.source, price.date) == (1.5, "given by the user", "")
    assert prices.price(load_gpu("h100_sxm")).usd_per_gpu_hour > 1.5


def test_unknown_tier():
    with pytest.raises(UserError, match="price tier is 'cheap'; it must be low, typical or high"):
        PriceList("cheap")
