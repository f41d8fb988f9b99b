"""Step times against brute force, against the architectures' own numbers, and against vLLM's measurements."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.scheduling import StepShape
from planner.catalog import list_models, load_gpu, load_model
from planner.errors import UserError
from planner.hardware import GpuSpec
from planner.memory import KVCacheDtype
from planner.roofline import RooflineAssumptions, RooflineStepTime, attended_pairs
from planner.step_time import (
    TICKS_PER_SECOND,
    AffineRun,
    DecodeRun,
    Evidence,
    StepTime,
    TableRun,
    delayed,
    floored,
    led_by,
    listed,
    to_ticks,
)

# Rates of an H200 from its data sheet.
BANDWIDTH = 4.8e12
BF16_FLOPS = 989e12
FP8_FLOPS = 1979e12
LINK_BANDWIDTH = 450e9

# Dense; every layer a window; windows and full attention; the same with experts; latent attention with experts.
MODELS = ["llama-3.1-8b", "mistral-7b-v0.1", "gemma-3-1b", "gpt-oss-20b", "deepseek-v2-lite"]


def h200() -> GpuSpec:
    return load_gpu("h200_sxm")


@cache
def roofline(model: str, tensor_parallel_size: int = 1, **options) -> RooflineStepTime:
    return RooflineStepTime(load_model(model), h200(), tensor_parallel_size, **options)


@cache
def bare(model: str, tensor_parallel_size: int = 1, compute: float = 1.0, **options) -> RooflineStepTime:
    """Full data-sheet rates and no host time. `compute` scales the FLOP rates."""
    assumptions = RooflineAssumptions(1, compute, compute, compute, 1, *[0] * 7)
    return RooflineStepTime(load_model(model), h200(), tensor_parallel_size, assumptions=assumptions, **options)


# ---- runs of decode steps ------------------------------------------------------------------------------------------


def assert_run_is(run: DecodeRun, durations: list[int]) -> None:
    """Every method against the list of durations."""
    assert run.steps == len(durations)
    sums = np.cumsum([0, *durations]).tolist()
    for steps in range(len(durations) + 1):
        assert run.cumulative(steps) == sums[steps]
        listed = [first + step * inc for first, inc, count in run.segments(steps) for step in range(count)]
        if steps:
            assert listed == durations[:steps]
    for elapsed in {0, 1, *sums, *(s - 1 for s in sums[1:]), *(s + 1 for s in sums)}:
        enough = [steps for steps in range(1, len(sums)) if sums[steps] >= elapsed]
        assert run.steps_until(elapsed) == (enough[0] if enough else len(durations)), elapsed


small_or_huge = st.one_of(st.integers(1, 30), st.integers(10**12, 10**15))


@given(small_or_huge, st.one_of(st.integers(0, 30), st.integers(0, 10**12)), st.integers(1, 40))
def test_affine_run(first, increment, steps):
    assert_run_is(AffineRun(first, increment, steps), [first + increment * j for j in range(steps)])


@given(st.lists(small_or_huge, min_size=1, max_size=40))
def test_table_run(durations):
    assert_run_is(TableRun(durations), durations)


AFFINE_RUNS = st.builds(AffineRun, st.integers(1, 60), st.integers(0, 3), st.integers(1, 200))
TABLE_RUNS = st.builds(TableRun, st.lists(st.integers(1, 60), min_size=1, max_size=90))


@given(st.one_of(AFFINE_RUNS, TABLE_RUNS), st.integers(0, 100))
def test_delayed_and_floored_runs(run, ticks):
    durations = [run.cumulative(j + 1) - run.cumulative(j) for j in range(run.steps)]
    assert_run_is(delayed(run, ticks), [duration + ticks for duration in durations])
    at_least = floored(run, ticks)
    assert_run_is(at_least, [max(duration, ticks) for duration in durations[: at_least.steps]])
    if ticks <= min(durations) or ticks >= max(durations):
        assert at_least.steps == run.steps
    else:
        assert 1 <= at_least.steps <= run.steps


@given(st.one_of(AFFINE_RUNS, TABLE_RUNS), st.lists(st.integers(1, 60), max_size=90))
def test_a_run_led_by_other_steps(run, first):
    durations = [run.cumulative(j + 1) - run.cumulative(j) for j in range(run.steps)]
    first = first[: run.steps]
    assert list(listed(run)) == durations[:64]
    assert_run_is(led_by(first, run), first + durations[len(first) :])


@given(st.integers(1, 10**13), st.integers(0, 10**10), st.integers(1, 10**6), st.integers(0, 10**25))
def test_steps_until_in_long_runs(first, increment, steps, elapsed):
    """The closed form of an affine run against the bisection that every run inherits."""
    run = AffineRun(first, increment, steps)
    assert run.steps_until(elapsed) == DecodeRun.steps_until(run, elapsed)


# ---- the contract --------------------------------------------------------------------------------------------------


class Predicts(StepTime):
    """What a user's own model has to implement, and no more."""

    def __init__(self, function) -> None:
        self.function = function

    def predict(self, step: StepShape) -> float:
        return self.function(step)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=5), st.integers(1, 100))
def test_default_decode_run_is_its_own_steps(contexts, steps):
    step_time = Predicts(lambda step: 1e-3 + 1e-6 * (sum(step.decode_contexts) % 97))
    run = step_time.decode_run(contexts, steps)
    assert 1 <= run.steps <= steps
    durations = [step_time.ticks(StepShape(decode_contexts=[c + j for c in contexts])) for j in range(run.steps)]
    assert_run_is(run, durations)


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -math.inf, -1e-9, 3600.1, 1e300])
def test_absurd_predictions(seconds):
    with pytest.raises(UserError, match=r"the step-time model predicts .* between 0 and 3600 s"):
        Predicts(lambda _: seconds).ticks(StepShape(decode_contexts=[1]))
    with pytest.raises(UserError):
        Predicts(lambda _: seconds).decode_run([1], 3)


@pytest.mark.parametrize(
    ("seconds", "ticks"), [(0, 1), (1e-18, 1), (1e-15, 1), (1e-3, 10**12), (1, 10**15), (3600, 36 * 10**17)]
)
def test_to_ticks(seconds, ticks):
    assert to_ticks(seconds, "a step") == ticks
    assert to_ticks(np.float64(seconds), "a step") == ticks
    assert isinstance(to_ticks(np.float64(seconds), "a step"), int)


# ---- attention: what is counted ------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(0, 60), st.one_of(st.none(), st.integers(1, 80)))
def test_attended_pairs(query, context, window):
    pairs = 0
    for position in range(context, context + query):
        first = 0 if window is None else max(0, position - window + 1)
        pairs += len(range(first, position + 1))
    assert attended_pairs(query, context, window) == pairs


def growth_s(step_time: StepTime, context: int) -> float:
    """Seconds that one more token of context costs one decoding request."""
    one, other = [step_time.ticks(StepShape(decode_contexts=[c])) for c in (context, context + 1)]
    return (other - one) / TICKS_PER_SECOND


@pytest.mark.parametrize(
    ("model", "layers", "kv_bytes", "decode_flops"),
    [
        # K and V of 8 heads of 128 elements; 4 FLOPs per element of the 32 query heads.
        ("llama-3.1-8b", 32, 2 * 8 * 128 * 2, 4 * 32 * 128),
        # Absorbed (DeepSeek-V2, section 2.1.2): scores over 512 + 64 elements, values over 512, by each query head.
        ("deepseek-v2-lite", 27, (512 + 64) * 2, 2 * 16 * (576 + 512)),
        ("deepseek-v3", 61, (512 + 64) * 2, 2 * 128 * (576 + 512)),
    ],
)
def test_decode_attention(model, layers, kv_bytes, decode_flops):
    expected = layers * max(kv_bytes / BANDWIDTH, decode_flops / BF16_FLOPS)
    assert growth_s(bare(model), 5000) == pytest.approx(expected, rel=1e-6)


def test_latent_attention_of_many_heads_is_bound_by_compute():
    """So reading half the bytes does not help DeepSeek-V3, while it halves the time of 16 heads."""
    for model, factor in (("deepseek-v3", 1.0), ("deepseek-v2-lite", 0.5)):
        halved = bare(model, kv_cache_dtype=KVCacheDtype.FP8)
        assert growth_s(halved, 5000) == pytest.approx(factor * growth_s(bare(model), 5000), rel=1e-5)


def test_windows_stop_growing():
    """gpt-oss-20b: 12 of 24 layers see 128 tokens; 8 KV heads of 64."""
    token_s = 2 * 8 * 64 * 2 / BANDWIDTH
    step_time = bare("gpt-oss-20b")
    assert growth_s(step_time, 100) == pytest.approx(24 * token_s, rel=1e-5)
    assert growth_s(step_time, 126) == pytest.approx(24 * token_s, rel=1e-5)  # from 127 tokens to 128
    assert growth_s(step_time, 127) == pytest.approx(12 * token_s, rel=1e-5)
    assert growth_s(step_time, 5000) == pytest.approx(12 * token_s, rel=1e-5)


def test_prefill_attention():
    """A prompt of 16,384 against the same work without attention; 4 x 4,096 FLOPs per pair and layer."""
    step_time = bare("llama-3.1-8b")
    step = StepShape(prefills=[(16_384, 0)])
    pairs = 16_384 * 16_385 / 2
    expected = 32 * pairs * 4 * 32 * 128 / BF16_FLOPS
    assert step_time.predict(step) - step_time.dense_s(16_384, 1) == pytest.approx(expected, rel=1e-6)
    # A chunk of one token after a long context is bound by reading it.
    step = StepShape(prefills=[(1, 100_000)])
    expected = 32 * 100_001 * 4096 / BANDWIDTH
    assert step_time.predict(step) - step_time.dense_s(1, 1) == pytest.approx(expected, rel=1e-6)


def test_prefill_attention_of_latents_is_not_absorbed():
    """Per head 128 + 64 elements of score and 128 of value."""
    step_time = bare("deepseek-v2-lite")
    expected = 27 * (8192 * 8193 / 2) * 2 * 16 * (192 + 128) / BF16_FLOPS
    attention_s = step_time.predict(StepShape(prefills=[(8192, 0)])) - step_time.dense_s(8192, 1)
    assert attention_s == pytest.approx(expected, rel=1e-6)


@given(st.lists(st.integers(0, 9000), min_size=1, max_size=8))
@pytest.mark.parametrize("model", MODELS)
def test_verifying_no_drafts_is_decoding(model, contexts):
    """To the rounding of two sums."""
    verify = roofline(model).ticks(StepShape(verifies=[(1, context) for context in contexts]))
    assert verify == pytest.approx(roofline(model).ticks(StepShape(decode_contexts=contexts)), abs=2)


# ---- weights -------------------------------------------------------------------------------------------------------


def test_decode_step_of_one_request():
    """llama-3.1-8b, counted from its shapes, at the stated efficiencies and host times."""
    hidden, heads, kv_heads, head_dim, mlp, vocabulary, layers = 4096, 32, 8, 128, 14336, 128256, 32
    attention = hidden * heads * head_dim * 2 + hidden * kv_heads * head_dim * 2
    weights = layers * (attention + 3 * hidden * mlp) + hidden * vocabulary
    assert weights * 2 == pytest.approx(15.0e9, rel=0.01)  # anchors: 15.0 GB without the embedding table
    read_s = weights * 2 / (BANDWIDTH * 0.80)
    compute_s = weights * 2 / (BF16_FLOPS * 0.70)
    kv_s = layers * 2 * kv_heads * head_dim * 2 * 1025 / (BANDWIDTH * 0.80)
    host_s = 200e-6 + layers * 22e-6 + 4e-6
    expected = math.hypot(read_s, compute_s) + kv_s + host_s
    step = StepShape(decode_contexts=[1024])
    assert roofline("llama-3.1-8b").predict(step) == pytest.approx(expected, rel=1e-6)
    # With perfect rates it is the weights' bytes over the bandwidth, to the little that compute and KV add.
    assert bare("llama-3.1-8b").predict(step) == pytest.approx(weights * 2 / BANDWIDTH, rel=0.02)


def test_large_products_are_bound_by_compute():
    weights = 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336)
    assert bare("llama-3.1-8b").dense_s(1 << 20, 0) == pytest.approx(2 * weights * (1 << 20) / BF16_FLOPS, rel=1e-4)


def test_fp8_weights():
    model = load_model("llama-3.1-8b", "fp8")
    assumptions = RooflineAssumptions(1, 1, 1, 1, 1, *[0] * 7)
    step_time = RooflineStepTime(model, h200(), assumptions=assumptions)
    # Without the LM head, which stays in bf16: half the bytes, twice the rate.
    assert step_time.dense_s(1, 0) == pytest.approx(bare("llama-3.1-8b").dense_s(1, 0) / 2, rel=0.01)
    assert step_time.dense_s(1 << 20, 0) == pytest.approx(
        bare("llama-3.1-8b").dense_s(1 << 20, 0) * BF16_FLOPS / FP8_FLOPS, rel=0.01
    )


@pytest.mark.parametrize("num_tokens", [1, 2, 8, 64])
def test_experts_read(num_tokens):
    """mixtral-8x7b, 2 of 8 experts: as many distinct experts as uniform routing touches, by drawing."""
    rng = np.random.default_rng(0)
    draws = 4000
    chosen = rng.random((draws, num_tokens, 8)).argsort(axis=2)[:, :, :2].reshape(draws, -1)
    touched = np.array([len(np.unique(row)) for row in chosen])
    # Compute is made free, so that only bytes are left.
    dense_s = bare("mixtral-8x7b", compute=1e9).dense_s(num_tokens, 0)
    attention = 4096 * 4096 * 2 + 4096 * 1024 * 2
    expert = 3 * 4096 * 14336
    experts_read = (dense_s * BANDWIDTH / 2 / 32 - attention - 4096 * 8) / expert
    standard_error = touched.std() / math.sqrt(draws)
    assert experts_read == pytest.approx(touched.mean(), abs=4 * standard_error + 1e-6)


def test_expert_flops():
    """Each token computes the 2 experts it is routed to, and no other."""
    per_layer = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 2 * 3 * 4096 * 14336 + 4096 * 8
    tokens = 1 << 20
    expected = 2 * 32 * per_layer * tokens / BF16_FLOPS
    assert bare("mixtral-8x7b").dense_s(tokens, 0) == pytest.approx(expected, rel=1e-3)


# ---- tensor parallelism --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama-3.1-70b", "mixtral-8x7b", "gpt-oss-120b"])
@pytest.mark.parametrize("num_tokens", [1, 64, 8192])
def test_dense_time_falls_with_ranks(model, num_tokens):
    times = [roofline(model, ranks).dense_s(num_tokens, 1) for ranks in (1, 2, 4, 8)]
    for ranks, dense_s in zip((1, 2, 4, 8), times, strict=True):
        # Nearly all weights are sharded.
        assert times[0] / ranks <= dense_s <= 1.1 * times[0] / ranks
    assert times == sorted(times, reverse=True)


def test_all_reduce():
    """Two per layer of bf16 hidden states, each rank sending 2 (n - 1) / n of them."""
    assert roofline("llama-3.1-70b").all_reduce_s(8192) == 0
    for ranks in (2, 4, 8):
        one, two, many = [roofline("llama-3.1-70b", ranks).all_reduce_s(n) for n in (1, 2, 8193)]
        assert 0 < one < two < many
        token_s = 2 * 80 * 2 * (ranks - 1) / ranks * 8192 * 2 / (LINK_BANDWIDTH * 0.67)
        assert many - one == pytest.approx(8192 * token_s, rel=1e-9)


@pytest.mark.parametrize(("kib", "measured_s"), [(8, 11.4e-6), (64, 12.4e-6), (256 * 1024, 892e-6)])
def test_all_reduce_against_nccl(kib, measured_s):
    """Two H200s of one host; llama-3.1-8b has 64 all-reduces of 8 KiB per token."""
    assert roofline("llama-3.1-8b", 2).all_reduce_s(kib // 8) / 64 == pytest.approx(measured_s, rel=0.1)


def test_kv_heads_are_shared_out_while_they_last():
    """llama-3.1-70b has 8 KV heads: 8 ranks read an eighth each, 16 would too."""
    one, eight, sixteen = [growth_s(bare("llama-3.1-70b", ranks), 9000) for ranks in (1, 8, 16)]
    assert eight == pytest.approx(one / 8, rel=1e-4)
    assert sixteen == pytest.approx(one / 8, rel=1e-4)
    # The latent is whole on every rank.
    assert growth_s(bare("deepseek-v2-lite", 4), 9000) == pytest.approx(growth_s(bare("deepseek-v2-lite"), 9000))


# ---- decode runs of the roofline -----------------------------------------------------------------------------------

near_windows = st.one_of(st.integers(0, 600), st.integers(100, 140), st.integers(480, 530), st.integers(4060, 4110))


@given(st.lists(near_windows, min_size=1, max_size=6), st.integers(1, 300))
@pytest.mark.parametrize("model", MODELS)
def test_decode_run_is_its_single_steps(model, contexts, steps):
    step_time = roofline(model)
    run = step_time.decode_run(contexts, steps)
    assert 1 <= run.steps <= steps
    sums = 0
    for j in range(run.steps):
        assert run.cumulative(j) == sums
        sums += step_time.ticks(StepShape(decode_contexts=[c + j for c in contexts]))
    assert run.cumulative(run.steps) == sums


def test_decode_runs_are_long():
    assert roofline("llama-3.1-8b").decode_run([10, 3000], 1000).steps == 1000
    assert roofline("gemma-3-1b").decode_run([3000, 600], 1000).steps == 1000  # past the window of 512
    assert roofline("gemma-3-1b").decode_run([3000, 400], 1000).steps >= 111


# ---- laws ----------------------------------------------------------------------------------------------------------

tokens = st.integers(1, 9000)


@st.composite
def shapes(draw):
    prefills = draw(st.lists(st.tuples(tokens, st.integers(0, 9000)), max_size=3))
    verifies = draw(st.lists(st.tuples(st.integers(2, 9), tokens), max_size=3))
    decodes = draw(st.lists(tokens, min_size=0 if prefills or verifies else 1, max_size=6))
    return StepShape(prefills, decodes, verifies)


@given(shapes(), st.integers(1, 9000), st.integers(0, 9000))
@pytest.mark.parametrize("model", MODELS)
def test_more_work_takes_no_less_time(model, shape, more, context):
    """Monotone in batch, in context and in query length, for every kind of work."""
    step_time = roofline(model)
    prefills, decodes, verifies = shape.prefills, shape.decode_contexts, shape.verifies
    larger = [
        (prefills, [*decodes, context], verifies),
        ([*prefills, (more, context)], decodes, verifies),
        (prefills, decodes, [*verifies, (more % 8 + 2, context)]),
        (prefills, [c + more for c in decodes], verifies),
        ([(query, c + more) for query, c in prefills], decodes, verifies),
        ([(query + more, c) for query, c in prefills], decodes, verifies),
        (prefills, decodes, [(query, c + more) for query, c in verifies]),
        (prefills, decodes, [(query + 1, c) for query, c in verifies]),
    ]
    before = step_time.ticks(shape)
    assert before >= 1
    for parts in larger:
        # Two float sums of attention may round differently by a tick each.
        assert step_time.ticks(StepShape(*parts)) >= before - 2


@pytest.mark.parametrize("model", list_models())
def test_every_model_has_a_step_time(model):
    step_time = roofline(model)
    assert step_time.evidence is Evidence.UNCALIBRATED
    assert "uncalibrated" in step_time.description
    step = StepShape(prefills=[(100, 0)], decode_contexts=[50, 3000], verifies=[(4, 700)])
    assert 1e-4 < step_time.predict(step) < 10
    assert step_time.ticks(step) == to_ticks(step_time.predict(step), step)


# ---- vLLM 0.25.1, Llama-3.1-8B in bf16 on one H200, measured -------------------------------------------------------


@pytest.mark.parametrize(("batch", "measured_ms"), [(1, 4.89), (8, 5.24), (32, 6.35), (128, 10.8), (256, 18.2)])
def test_tpot_against_vllm(batch, measured_ms):
    predicted_ms = 1e3 * roofline("llama-3.1-8b").predict(StepShape(decode_contexts=[1024] * batch))
    assert predicted_ms == pytest.approx(measured_ms, rel=0.15)


@pytest.mark.parametrize(("batch", "context", "measured_ms"), [(1, 30_000, 5.84), (16, 16_384, 12.9)])
def test_tpot_of_long_contexts_against_vllm(batch, context, measured_ms):
    predicted_ms = 1e3 * roofline("llama-3.1-8b").predict(StepShape(decode_contexts=[context] * batch))
    assert predicted_ms == pytest.approx(measured_ms, rel=0.15)


@pytest.mark.parametrize(("prompt", "measured_ms"), [(1024, 27.2), (4096, 101), (16_384, 487)])
def test_ttft_against_vllm(prompt, measured_ms):
    """In chunks of at most 8,192 tokens, of which the last samples."""
    predicted_s = 0.0
    for context in range(0, prompt, 8192):
        query = min(8192, prompt - context)
        step = StepShape(prefills=[(query, context)], num_sampled=int(context + query == prompt))
        predicted_s += roofline("llama-3.1-8b").predict(step)
    assert 1e3 * predicted_s == pytest.approx(measured_ms, rel=0.15)
