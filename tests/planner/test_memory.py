"""The memory model against logs that users published, hand-counted KV sizes, and laws it must keep."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from planner.catalog import list_models, load_gpu, load_model
from planner.errors import UserError
from planner.hardware import GpuSpec
from planner.memory import (
    KVCacheDtype,
    KVLayerGroups,
    MemoryReport,
    MemorySettings,
    activation_bytes_per_rank,
    cuda_graph_bytes_per_rank,
    kv_bytes_per_sequence,
    kv_bytes_per_token_layer,
    kv_layer_groups,
    kv_layout,
    plan_memory,
    residual_bytes_per_sequence,
    validate_parallelism,
    weights_bytes_per_rank,
)
from planner.model import ModelSpec

GIB = 1 << 30
MIB = 1 << 20


def gib(value: float) -> int:
    return round(value * GIB)


def gpu_like(gpu_id: str, **changes: Any) -> GpuSpec:
    return replace(load_gpu(gpu_id), **changes)


def with_kv_heads(model: ModelSpec, heads: int) -> ModelSpec:
    return replace(model, num_key_value_heads=heads)


def pool_only(kv_bytes: int, **settings: Any) -> MemorySettings:
    """Settings under which exactly `kv_bytes` per rank are left for the KV cache."""
    nothing = {"weights_bytes": 0, "activation_bytes": 0, "non_torch_bytes": 0, "cuda_graph_bytes": 0}
    return MemorySettings(total_memory_bytes=kv_bytes, gpu_memory_utilization=1.0, **nothing, **settings)


# --- KV bytes, counted by hand ---


def test_llama2_70b_at_128k() -> None:
    model = load_model("llama-2-70b")
    settings = MemorySettings(max_model_len=128_000)
    report = plan_memory(model, load_gpu("h200_sxm"), replace(settings, tensor_parallel_size=4))
    assert report.kv_bytes_per_token == 327_680
    assert report.kv_bytes_per_sequence == 41_943_040_000
    assert report.kv_bytes_per_token_per_rank == 327_680 // 4
    assert any("4096 positions" in warning for warning in report.warnings)
    assert kv_bytes_per_sequence(with_kv_heads(model, 64), settings, 128_000) == 335_544_320_000


def test_grouped_query_attention_is_four_times_smaller() -> None:
    """Question S6, vllm PR#29736: the formula with all heads is 4 times off for Llama-3-8B."""
    model = load_model("llama-3.1-8b")
    multi_head = 2 * 32 * 4096 * 2  # K and V, layers, hidden size, bytes
    assert kv_bytes_per_sequence(model, MemorySettings(), 1) * 4 == multi_head


def test_latent_cache_is_replicated_on_every_rank() -> None:
    model = load_model("deepseek-v3")
    for ranks in (1, 8):
        assert 61 * kv_bytes_per_token_layer(model, "bf16", ranks, 16) == 70_272
    report = plan_memory(model, load_gpu("h200_sxm"), MemorySettings(tensor_parallel_size=8))
    assert report.kv_bytes_per_token == report.kv_bytes_per_token_per_rank == 70_272
    assert [rank.num_kv_heads for rank in report.ranks] == [1] * 8


@pytest.mark.parametrize(
    ("dtype", "block_size", "expected"),
    [
        # One KV head of 128: K and V, elements then scales.
        ("bfloat16", 16, 2 * 256),
        ("fp8", 16, 2 * 128),
        ("int8", 16, 2 * (128 + 4)),
        ("int4", 64, 64 + 128 * 4 / 64 + 64 + 4),
        ("int4", 32, 64 + 128 * 4 / 32 + 64 + 4),
        ("int2", 64, 32 + 128 * 4 / 64 + 32 + 4),
    ],
)
def test_bytes_of_each_format(dtype: str, block_size: int, expected: float) -> None:
    model = load_model("llama-3.1-8b")
    assert kv_bytes_per_token_layer(model, dtype, 8, block_size) == expected
    assert kv_bytes_per_token_layer(model, dtype, 1, block_size) == 8 * expected
    assert kv_bytes_per_token_layer(model, dtype, 32, block_size) == expected, "a head is never split"


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", 1152), ("fp8", 576), ("int8", 580), ("int4", 292)])
def test_bytes_of_the_latent(dtype: str, expected: float) -> None:
    assert kv_bytes_per_token_layer(load_model("deepseek-v2-lite"), dtype, 4, 64) == expected


def test_residual_page_only_where_keys_are_quantised_by_page() -> None:
    model = load_model("llama-3.1-8b")
    assert residual_bytes_per_sequence(model, "int4", 1, 64) == 64 * 131_072
    assert residual_bytes_per_sequence(model, "int2", 2, 32) == 32 * 131_072 // 2
    for dtype in ("bf16", "fp8", "int8"):
        assert residual_bytes_per_sequence(model, dtype, 1, 64) == 0
    assert residual_bytes_per_sequence(load_model("deepseek-v3"), "int4", 1, 64) == 0
    report = plan_memory(model, load_gpu("h200_sxm"), MemorySettings(kv_cache_dtype="int4", max_num_seqs=8))
    assert report.block_size == 64
    assert report.kv_residual_bytes_per_rank == 8 * 64 * 131_072


def test_dtype_names() -> None:
    for name in ("auto", "bf16", "bfloat16", "float16", KVCacheDtype.AUTO, " BF16 "):
        assert KVCacheDtype.parse(name) is KVCacheDtype.BFLOAT16
    assert KVCacheDtype.parse("fp8_e4m3") is KVCacheDtype.FP8
    with pytest.raises(UserError, match="kv_cache_dtype is 'fp7'; it must be one of auto, bfloat16, fp8"):
        MemorySettings(kv_cache_dtype="fp7")


# --- groups of layers and blocks of a sequence ---


@pytest.mark.parametrize(
    ("name", "windows", "layers"),
    [
        ("llama-3.1-8b", (None,), 32),
        ("mistral-7b-v0.1", (4096,), 32),
        ("gpt-oss-120b", (None, 128), 18),
        ("gemma-2-9b", (None, 4096), 21),
        ("gemma-3-27b", (None,) + (1024,) * 6, 10),
        ("gemma-3-1b", (None,) + (512,) * 6, 4),
        ("deepseek-v3", (None,), 61),
    ],
)
def test_layer_groups(name: str, windows: tuple[int | None, ...], layers: int) -> None:
    model = load_model(name)
    assert kv_layer_groups(model) == KVLayerGroups(windows, layers)
    assert kv_layer_groups(model, "unified") == KVLayerGroups((None,), model.num_layers)


def test_nearly_equal_kinds_are_padded_to_the_larger() -> None:
    model = replace(load_model("llama-3.1-8b"), layer_windows=(None,) * 10 + (1024,) * 12)
    assert kv_layer_groups(model) == KVLayerGroups((None, 1024), 12)
    model = replace(model, layer_windows=(None,) * 10 + (1024,) * 13)
    assert kv_layer_groups(model) == KVLayerGroups((None, 1024, 1024), 10)


def test_blocks_of_a_sequence() -> None:
    layout = kv_layout(load_model("gpt-oss-120b"), MemorySettings(max_num_batched_tokens=256, max_num_seqs=8))
    assert layout.blocks_per_sequence(1) == 2
    assert layout.blocks_per_sequence(160) == 10 + 10, "never more than the tokens need"
    # 127 tokens before the chunk and 256 in it span 24 blocks, or 25 if they start within one.
    assert layout.blocks_per_sequence(16_000) == 1000 + 25
    assert layout.blocks_per_decoding_sequence(16_000) == 1000 + 9


def test_speculation_needs_room_in_the_window() -> None:
    plain = kv_layout(load_model("gpt-oss-20b"), MemorySettings())
    ahead = kv_layout(load_model("gpt-oss-20b"), MemorySettings(num_lookahead_tokens=7))
    assert ahead.blocks_per_decoding_sequence(4096) == plain.blocks_per_decoding_sequence(4096) + 1


def test_gpt_oss_unified_pool() -> None:
    """Question S17: vLLM logged 78,384 tokens for 5.38 GiB."""
    settings = pool_only(gib(5.38), kv_cache_policy="unified")
    report = plan_memory(load_model("gpt-oss-120b"), load_gpu("h100_sxm"), settings)
    assert report.kv_bytes_per_token == 73_728
    assert round(report.kv_cache_bytes_available / report.kv_bytes_per_token) == 78_352
    assert report.kv_cache_tokens == pytest.approx(78_384, rel=1e-3)
    hybrid = plan_memory(load_model("gpt-oss-120b"), load_gpu("h100_sxm"), pool_only(gib(5.38)))
    assert 1.8 < hybrid.max_concurrency / report.max_concurrency < 2
    assert hybrid.max_concurrency < hybrid.max_concurrency_decoding


# --- what users measured ---


@pytest.mark.parametrize(
    ("gpus", "gpu_id", "dtype", "concurrency", "digits", "accepted"),
    [
        (2, "h200_sxm", "bfloat16", 2.8, 1, False),
        (2, "h200_sxm", "fp8", 5.7, 1, True),
        (4, "h200_sxm", "bfloat16", 8.96, 2, True),
        (4, "h100_sxm", "bfloat16", 3.4, 1, False),
        (4, "h100_sxm", "fp8", 6.8, 1, True),
    ],
)
def test_five_users_of_a_70b(
    gpus: int, gpu_id: str, dtype: str, concurrency: float, digits: int, accepted: bool
) -> None:
    """Question S1, vllm#12400: Llama-3.x-70B at 128k for five users."""
    settings = MemorySettings(
        tensor_parallel_size=gpus,
        max_model_len=131_072,
        kv_cache_dtype=dtype,
        activation_bytes=gib(5.6),
        non_torch_bytes=gib(0.55),
        enforce_eager=True,
    )
    report = plan_memory(load_model("llama-3.1-70b"), load_gpu(gpu_id), settings, concurrency=5)
    assert round(report.max_concurrency, digits) == concurrency
    assert report.fits is accepted
    assert report.kv_bytes_per_sequence == gib(40 if dtype == "bfloat16" else 20)


def rtx_3090() -> GpuSpec:
    return gpu_like("rtx4090", id="rtx3090", architecture="ampere", memory_bytes=gib(23.58))


def settings_of_10517(**settings: Any) -> MemorySettings:
    """vLLM 0.6.3 as in vllm#10517: its profile run sampled with 2 bytes per logit, and reserved nothing for graphs."""
    common = {"gpu_memory_utilization": 0.9, "non_torch_bytes": gib(0.35), "sampler_bytes_per_logit": 2.0}
    return MemorySettings(**(common | {"cuda_graph_bytes": 0} | settings))


def test_weights_as_logged() -> None:
    assert weights_bytes_per_rank(load_model("llama-3.1-8b"), 1) / GIB == pytest.approx(14.9888, abs=5e-5)


@pytest.mark.parametrize(("length", "blocks", "fits"), [(20_000, 1952, True), (29_000, 1478, False)])
def test_blocks_as_logged(length: int, blocks: int, fits: bool) -> None:
    """Question S2: without chunked prefill the whole sequence is one step, so a longer limit leaves less KV."""
    settings = settings_of_10517(max_model_len=length, max_num_batched_tokens=length)
    report = plan_memory(load_model("llama-3.1-8b"), rtx_3090(), settings)
    assert report.num_kv_blocks == pytest.approx(blocks, rel=1e-3)
    assert report.fits is fits
    if fits:
        assert report.max_concurrency == pytest.approx(1.56, abs=0.005)
    else:
        assert report.max_model_len_that_fits == report.num_kv_blocks * 16
        assert f"the estimated maximum model length is {report.max_model_len_that_fits}" in (report.reason or "")


def test_chunked_prefill_frees_the_activations() -> None:
    settings = settings_of_10517(max_model_len=35_000, max_num_batched_tokens=512)
    report = plan_memory(load_model("llama-3.1-8b"), rtx_3090(), settings)
    assert report.fits
    assert report.kv_cache_bytes_available / GIB == pytest.approx(5.82, rel=2e-3)
    assert (report.weights_bytes_per_rank + report.activation_bytes_per_rank) / GIB == pytest.approx(15.05, abs=0.01)


def test_h100_as_measured_by_llm_d_planner() -> None:
    settings = MemorySettings(
        gpu_memory_utilization=0.9, non_torch_bytes=gib(0.13), max_num_seqs=1024, enforce_eager=True
    )
    report = plan_memory(load_model("llama-3.1-8b"), load_gpu("h100_sxm"), settings)
    assert report.kv_cache_bytes_available / GIB == pytest.approx(51.38, rel=0.01)
    assert report.kv_cache_tokens == pytest.approx(420_904, rel=0.01)


# --- the parts before the KV cache ---


def test_activations_of_dense_and_mixture() -> None:
    gpu = load_gpu("a100_sxm_80")
    few = MemorySettings(max_num_seqs=1)
    assert activation_bytes_per_rank(load_model("llama-3.1-8b"), gpu, few) == 8192 * 2 * 3 * (4096 + 14336) + 8_519_680
    moe = 3 * 2048 + 8 * (3 * 768 // 2 + 2048)
    two = replace(few, tensor_parallel_size=2)
    assert activation_bytes_per_rank(load_model("qwen3-30b-a3b"), gpu, two) == 8192 * 2 * moe + 8_519_680
    hopper = activation_bytes_per_rank(load_model("llama-3.1-8b"), load_gpu("h100_sxm"), few)
    assert hopper - activation_bytes_per_rank(load_model("llama-3.1-8b"), gpu, few) == 32 * MIB - 8_519_680


def test_draft_tokens_are_rows_of_logits() -> None:
    model, gpu = load_model("llama-3.1-8b"), load_gpu("h100_sxm")
    rows = [
        (activation_bytes_per_rank(model, gpu, MemorySettings(num_lookahead_tokens=k)) - 32 * MIB) / 128_256 / 40
        for k in (0, 3, 1000)
    ]
    assert rows == [256, 1024, 8192], "at most the token budget"


def test_cuda_graphs() -> None:
    model = load_model("llama-3.1-8b")
    assert cuda_graph_bytes_per_rank(model, MemorySettings()) == 51 * 32 * MIB // 4
    assert cuda_graph_bytes_per_rank(model, MemorySettings(max_num_seqs=2)) == 3 * 32 * MIB // 4
    assert cuda_graph_bytes_per_rank(model, MemorySettings(enforce_eager=True)) == 0


def test_kv_projections_are_replicated_with_their_heads() -> None:
    model = load_model("qwen3-30b-a3b")  # 4 KV heads
    even = sum(group.bytes_per_rank(8) for group in model.parameters) + 40_960 * 128 * 2
    extra = 48 * 2 * 2048 * 128 * 2 // 2  # half a head's projections beyond an eighth
    assert weights_bytes_per_rank(model, 8) - even == extra
    assert weights_bytes_per_rank(model, 4) - sum(group.bytes_per_rank(4) for group in model.parameters) == 40_960 * 256


def test_draft_model_shares_the_ranks() -> None:
    model, draft, gpu = load_model("qwen3-8b"), load_model("qwen3-0.6b"), load_gpu("h100_sxm")
    alone = plan_memory(model, gpu)
    both = plan_memory(model, gpu, MemorySettings(draft_model=draft, num_lookahead_tokens=4))
    assert both.weights_bytes_per_rank - alone.weights_bytes_per_rank == weights_bytes_per_rank(draft, 1)
    assert both.kv_block_bytes_per_rank - alone.kv_block_bytes_per_rank == 16 * 114_688
    assert both.kv_bytes_per_token == alone.kv_bytes_per_token == 147_456
    assert both.kv_bytes_per_token_per_rank == 147_456 + 114_688
    assert both.max_concurrency < alone.max_concurrency
    windowed = MemorySettings(draft_model=load_model("gemma-3-1b"))
    assert "full context" in plan_memory(load_model("gemma-3-27b"), load_gpu("h200_sxm"), windowed).warnings[0]


# --- answers that are no ---


def test_weights_that_do_not_fit() -> None:
    report = plan_memory(load_model("llama-3.1-405b"), load_gpu("h100_sxm"))
    assert not report.fits
    assert report.num_kv_blocks == report.max_model_len_that_fits == report.kv_cache_bytes_available == 0
    assert report.max_concurrency == 0
    assert (report.reason or "").startswith("the weights of llama-3.1-405b need 755.99 GiB per GPU")
    assert report.ranks[0].unused_bytes == 0


def test_nothing_left_for_the_cache() -> None:
    settings = MemorySettings(weights_bytes=gib(70), activation_bytes=gib(9))
    report = plan_memory(load_model("llama-3.1-8b"), load_gpu("h100_sxm"), settings)
    assert "leave nothing for the KV cache" in (report.reason or "")
    assert report.num_kv_blocks == 0


def test_reason_and_ranked_remedies() -> None:
    """Question S3: needed, available, estimated maximum, and what would help."""
    settings = MemorySettings(tensor_parallel_size=2, activation_bytes=gib(5.6), enforce_eager=True)
    report = plan_memory(load_model("llama-3.1-70b"), load_gpu("h200_sxm"), settings, concurrency=5)
    assert report.reason == (
        "5 sequences of 131072 tokens need 100.00 GiB of KV cache per GPU, more than the 56.73 GiB available; "
        "the estimated maximum model length is 74336"
    )
    assert [remedy.change for remedy in report.remedies] == [
        "--kv-cache-dtype fp8",
        "--tensor-parallel-size 4",
        "--gpu-memory-utilization 0.95",
    ]
    assert [remedy.fits for remedy in report.remedies] == [True, True, False]
    assert report.remedies[2].max_model_len_that_fits > 74_336


def test_remedies_only_list_what_helps() -> None:
    assert plan_memory(load_model("llama-3.1-8b"), load_gpu("h100_sxm")).remedies == ()
    tight = MemorySettings(gpu_memory_utilization=0.95, kv_cache_dtype="fp8")
    report = plan_memory(load_model("llama-3.1-70b"), load_gpu("a10g"), tight)
    assert not report.fits and report.remedies == ()
    fixed = plan_memory(load_model("llama-3.1-8b"), load_gpu("h100_sxm"), MemorySettings(num_gpu_blocks=10))
    assert not fixed.fits and fixed.remedies == ()


def test_measured_weights_shrink_with_more_gpus() -> None:
    settings = MemorySettings(weights_bytes=gib(132))
    report = plan_memory(load_model("llama-3.1-70b"), load_gpu("h200_sxm"), settings)
    assert [remedy.change for remedy in report.remedies if remedy.fits] == ["--tensor-parallel-size 2"]


def test_known_number_of_blocks() -> None:
    report = plan_memory(load_model("llama-3.1-8b"), load_gpu("h100_sxm"), MemorySettings(num_gpu_blocks=8192))
    assert report.num_kv_blocks == 8192
    assert report.max_concurrency == 1.0 and report.fits and not report.warnings
    report = plan_memory(load_model("llama-3.1-8b"), load_gpu("h100_sxm"), MemorySettings(num_gpu_blocks=10**6))
    assert "more than the memory is estimated to hold" in report.warnings[0]


def test_report_is_json() -> None:
    report = plan_memory(load_model("gemma-3-27b"), load_gpu("h200_sxm"))
    assert MemoryReport.model_validate_json(report.model_dump_json()) == report
    assert json.loads(report.model_dump_json())["reason"] is None
    schema = MemoryReport.model_json_schema()["properties"]
    assert all("description" in field for field in schema.values())


# --- settings and sharding ---


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization is 0; it must be above 0 and at most 1"),
        ({"gpu_memory_utilization": 1.01}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization is nan"),
        ({"gpu_memory_utilization": "0.9"}, "gpu_memory_utilization"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size is 0; it must be a whole number of at least 1"),
        ({"tensor_parallel_size": 2.0}, "tensor_parallel_size"),
        ({"tensor_parallel_size": True}, "tensor_parallel_size"),
        ({"max_model_len": 0}, "max_model_len is 0"),
        ({"max_model_len": -1}, "max_model_len is -1"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_num_seqs": 9000}, r"max_num_seqs \(9000\) must not exceed max_num_batched_tokens \(8192\)"),
        ({"num_lookahead_tokens": -1}, "num_lookahead_tokens is -1"),
        ({"weights_bytes": -1}, "weights_bytes is -1"),
        ({"activation_bytes": 1.5}, "activation_bytes is 1.5"),
        ({"num_gpu_blocks": -1}, "num_gpu_blocks is -1"),
        ({"sampler_bytes_per_logit": float("inf")}, "sampler_bytes_per_logit is inf"),
        ({"kv_cache_policy": "paged"}, "kv_cache_policy is 'paged'; it must be one of hybrid, unified"),
        ({"block_size": 4096}, "block_size is 4096; it must be at most 1024"),
        ({"block_size": 16, "kv_cache_dtype": "int4"}, "block_size is 16; with int4 KV it must be 32, 64 or 128"),
    ],
)
def test_bad_settings(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        MemorySettings(**settings)


@pytest.mark.parametrize(
    ("name", "gpu_id", "ranks", "complaint"),
    [
        ("llama-3.1-8b", "h100_sxm", 3, "must divide the 32 attention heads of llama-3.1-8b"),
        ("llama-3.1-8b", "h100_sxm", 16, "a node has 8 h100_sxm GPUs"),
        ("llama-3.1-8b", "gb200", 8, "a node has 4 gb200 GPUs"),
        ("phi-3-medium-4k", "h100_sxm", 4, "must divide the 10 KV heads of phi-3-medium-4k, or be a multiple"),
        ("llama-3.1-8b", "h100_sxm", 0, "must be a whole number"),
    ],
)
def test_impossible_sharding(name: str, gpu_id: str, ranks: int, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        validate_parallelism(load_model(name), load_gpu(gpu_id), ranks)


def test_sharding_beyond_the_kv_heads_replicates_them() -> None:
    validate_parallelism(load_model("qwen3-30b-a3b"), load_gpu("h100_sxm"), 8)
    validate_parallelism(load_model("deepseek-v3"), load_gpu("h100_sxm"), 8)
    with pytest.raises(UserError, match="of gemma-3-1b"):
        settings = MemorySettings(tensor_parallel_size=8, draft_model=load_model("gemma-3-1b"))
        plan_memory(load_model("gemma-3-27b"), load_gpu("h100_sxm"), settings)


def test_concurrency_is_checked() -> None:
    with pytest.raises(UserError, match="concurrency is 0"):
        plan_memory(load_model("llama-3.1-8b"), load_gpu("h100_sxm"), concurrency=0)


# --- laws ---

unhurried = hypothesis_settings(deadline=None)  # a busy machine is no failure
models = st.sampled_from(list_models()).map(load_model)
gpus = st.sampled_from(["h200_sxm", "a100_sxm_80", "l4", "b200"]).map(load_gpu)
utilizations = st.floats(0.05, 1.0)
policies = st.sampled_from(["hybrid", "unified"])


@unhurried
@given(models, gpus, utilizations, utilizations, policies)
def test_more_utilization_never_means_fewer_blocks(
    model: ModelSpec, gpu: GpuSpec, one: float, other: float, policy: str
) -> None:
    blocks = [
        plan_memory(
            model,
            gpu,
            MemorySettings(gpu_memory_utilization=utilization, kv_cache_policy=policy),
            with_remedies=False,
        ).num_kv_blocks
        for utilization in sorted((one, other))
    ]
    assert blocks[0] <= blocks[1]


@unhurried
@given(models, gpus, utilizations, st.sampled_from(["bf16", "fp8", "int4"]))
def test_more_gpus_never_mean_fewer_blocks(model: ModelSpec, gpu: GpuSpec, utilization: float, dtype: str) -> None:
    blocks = []
    for ranks in (1, 2, 4, 8):
        settings = MemorySettings(
            tensor_parallel_size=ranks, gpu_memory_utilization=utilization, kv_cache_dtype=dtype, max_num_seqs=64
        )
        try:
            blocks.append(plan_memory(model, gpu, settings, with_remedies=False).num_kv_blocks)
        except UserError:
            continue
    assert blocks == sorted(blocks)


@unhurried
@given(models, gpus, utilizations)
def test_fewer_bits_never_mean_fewer_blocks(model: ModelSpec, gpu: GpuSpec, utilization: float) -> None:
    blocks = [
        plan_memory(
            model,
            gpu,
            MemorySettings(kv_cache_dtype=dtype, block_size=64, gpu_memory_utilization=utilization, max_num_seqs=1),
            with_remedies=False,
        ).num_kv_blocks
        # int8 carries scales per token, so that fp8 is the smaller of the two
        for dtype in ("bfloat16", "int8", "fp8", "int4", "int2")
    ]
    assume(blocks[0] >= 2 * max(1, len(kv_layer_groups(model).windows)))  # room for the one residual page
    assert blocks == sorted(blocks)


@unhurried
@given(
    models,
    gpus,
    utilizations,
    st.sampled_from(["bf16", "fp8", "int8", "int4", "int2"]),
    policies,
    st.integers(1, 8),
    st.sampled_from([None, 1, 15, 16, 17, 5000, 200_000]),
)
def test_the_report_adds_up(
    model: ModelSpec,
    gpu: GpuSpec,
    utilization: float,
    dtype: str,
    policy: str,
    concurrency: int,
    length: int | None,
) -> None:
    settings = MemorySettings(
        kv_cache_dtype=dtype,
        gpu_memory_utilization=utilization,
        kv_cache_policy=policy,
        max_model_len=length,
        max_num_seqs=32,
    )
    report = plan_memory(model, gpu, settings, concurrency, with_remedies=False)
    layout = kv_layout(model, settings)
    assert report.num_kv_blocks * report.kv_block_bytes_per_rank <= report.kv_cache_bytes_available
    assert report.kv_cache_bytes_available <= report.gpu_memory_bytes * utilization
    assert all(value >= 0 for value in report.model_dump().values() if isinstance(value, int | float))
    assert report.max_concurrency <= report.max_concurrency_decoding
    assert report.fits == (report.reason is None) == (report.max_concurrency >= concurrency)
    longest = report.max_model_len_that_fits
    if longest:
        assert concurrency * layout.blocks_per_sequence(longest) <= report.num_kv_blocks
    limit = max(report.max_model_len, model.max_position_embeddings)
    if longest < limit:
        assert concurrency * layout.blocks_per_sequence(longest + report.block_size) > report.num_kv_blocks
    assert report.fits == (longest >= report.max_model_len)


@unhurried
@given(models, st.integers(1, 300_000), st.integers(64, 20_000), st.integers(0, 8))
def test_blocks_hold_the_tokens_and_grow(model: ModelSpec, tokens: int, chunk: int, lookahead: int) -> None:
    settings = MemorySettings(max_num_batched_tokens=chunk, max_num_seqs=1, num_lookahead_tokens=lookahead)
    layout = kv_layout(model, settings)
    blocks = layout.blocks_per_sequence(tokens)
    assert layout.blocks_per_decoding_sequence(tokens) <= blocks <= layout.blocks_per_sequence(tokens + 1)
    held = sum(tokens if window is None else min(window, tokens) for window in layout.groups.windows)
    assert blocks * layout.block_size >= held
