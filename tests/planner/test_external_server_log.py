"""Server logs of several versions, and /metrics text: what is found, and on which line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import UserError
from planner.external.server_facts import Found, ServerFacts, conditional_rates
from planner.external.server_log import read_server_log

VLLM_06 = """\
INFO 10-16 19:00:01 llm_engine.py:237] Initializing an LLM engine (v0.6.3) with config: model='Qwen/Qwen2.5-7B', \
speculative_config=None, dtype=torch.bfloat16, max_seq_len=8192, tensor_parallel_size=2, quantization=None, \
enforce_eager=True, kv_cache_dtype=fp8, enable_prefix_caching=False
INFO 10-16 19:00:20 model_runner.py:1067] Loading model weights took 7.1216 GB
INFO 10-16 19:00:31 gpu_executor.py:122] # GPU blocks: 27906, # CPU blocks: 2048
INFO 10-16 19:00:31 gpu_executor.py:126] Maximum concurrency for 8192 tokens per request: 54.50x
WARNING 10-16 19:04:47 scheduler.py:1439] Sequence group 9 is preempted by PreemptionMode.RECOMPUTE mode because there \
is not enough KV cache space. This can affect the end-to-end performance. total_num_cumulative_preemption=51
INFO 10-16 19:05:47 metrics.py:367] Speculative metrics: Draft acceptance rate: 0.642, System efficiency: 0.598, \
Number of speculative tokens: 3, Number of accepted tokens: 8547, Number of draft tokens: 13311, Number of emitted \
tokens: 10616.
INFO 10-16 19:06:01 metrics.py:349] Avg prompt throughput: 10.5 tokens/s, Avg generation throughput: 220.0 tokens/s, \
Running: 12 reqs, Swapped: 0 reqs, Pending: 3 reqs, GPU KV cache usage: 41.5%, CPU KV cache usage: 0.0%.
"""

VLLM_19 = """\
(APIServer pid=1) INFO 05-13 16:41:24 [utils.py:233] non-default args: {'model': 'meta-llama/Llama-3.1-8B', \
'max_model_len': 32768, 'max_num_seqs': 128, 'max_num_batched_tokens': 2048, 'gpu_memory_utilization': 0.95}
(APIServer pid=1) INFO 05-13 16:41:24 [vllm.py:630] Asynchronous scheduling is enabled.
(EngineCore_DP0 pid=9) INFO 05-13 16:41:31 [core.py:97] Initializing a V1 LLM engine (v0.19.0) with config: \
model='meta-llama/Llama-3.1-8B', speculative_config=None, dtype=torch.bfloat16, max_seq_len=32768, \
tensor_parallel_size=1, quantization=None, enforce_eager=False, kv_cache_dtype=auto, enable_prefix_caching=True, \
enable_chunked_prefill=True, compilation_config={'cudagraph_capture_sizes': [1, 2, 4, 8]}
(EngineCore_DP0 pid=9) INFO 05-13 16:42:01 [gpu_model_runner.py:4000] Model loading took 14.99 GiB memory and 4 seconds
(EngineCore_DP0 pid=9) INFO 05-13 16:42:03 [gpu_worker.py:358] Available KV cache memory: 5.05 GiB
(EngineCore_DP0 pid=9) INFO 05-13 16:42:03 [kv_cache_utils.py:1305] GPU KV cache size: 41,408 tokens
(EngineCore_DP0 pid=9) INFO 05-13 16:42:03 [kv_cache_utils.py:1310] Maximum concurrency for 32,768 tokens per request: \
1.26x
(EngineCore_DP0 pid=9) INFO 05-13 16:42:09 [gpu_model_runner.py:2934] Graph capturing finished in 5 secs, took 0.54 GiB
(APIServer pid=1) INFO 05-13 16:50:10 [loggers.py:271] Engine 000: Avg prompt throughput: 453.7 tokens/s, Avg \
generation throughput: 15.8 tokens/s, Running: 43 reqs, Waiting: 10 reqs, GPU KV cache usage: 99.9%, Prefix cache hit \
rate: 2.5%
(APIServer pid=1) INFO 05-13 16:50:10 [metrics.py:96] SpecDecoding metrics: Mean acceptance length: 2.01, Accepted \
throughput: 20.60 tokens/s, Drafted throughput: 60.90 tokens/s, Accepted: 206 tokens, Drafted: 609 tokens, \
Per-position acceptance rate: 0.601, 0.286, 0.128, Avg Draft acceptance rate: 33.8%
(APIServer pid=1) INFO 05-13 16:50:20 [metrics.py:96] SpecDecoding metrics: Mean acceptance length: 3.00, Accepted \
throughput: 20.60 tokens/s, Drafted throughput: 60.90 tokens/s, Accepted: 406 tokens, Drafted: 609 tokens, \
Per-position acceptance rate: 0.801, 0.686, 0.513, Avg Draft acceptance rate: 66.7%
"""

SGLANG = """\
[2026-06-28 15:16:40] server_args=ServerArgs(model_path='meta-llama/Llama-3.1-8B', tp_size=2, page_size=1, \
disable_radix_cache=False, kv_cache_dtype='auto')
[2026-06-28 15:16:44 TP0] KV Cache is allocated. #tokens: 444109, K size: 27.11 GB, V size: 27.11 GB
[2026-06-28 15:16:45 TP0] max_total_num_tokens=444109, chunked_prefill_size=8192, max_prefill_tokens=16384, \
max_running_requests=2049, context_len=131072, available_gpu_mem=17.22 GB
[2026-06-28 15:20:45 TP0] Decode batch, #running-req: 317, #token: 109426, token usage: 0.67, accept len: 3.12, accept \
rate: 0.56, cuda graph: True, gen throughput (token/s): 14806.57, #queue-req: 4,
"""

WHAT = (("queries", 3), ("hits", 2))
METRICS = """\
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",cache_dtype="fp8",enable_prefix_caching="True",num_gpu_blocks="573",\
num_gpu_blocks_override="None"} 1.0
vllm:num_preemptions_total{engine="0",model_name="m"} 3.0
vllm:num_preemptions_total{engine="1",model_name="m"} 4.0
vllm:spec_decode_num_drafts_total{engine="0"} 1000.0
vllm:spec_decode_num_draft_tokens_total{engine="0"} 3000.0
vllm:spec_decode_num_accepted_tokens_total{engine="0"} 1500.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 800.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"} 500.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="2"} 200.0
vllm:spec_decode_num_drafts_created{engine="0"} 1.7e+09
"""


def test_vllm_06():
    facts = read_server_log(VLLM_06)
    assert facts.engine == Found("vllm", 1)
    assert facts.version == Found("0.6.3", 1)
    assert facts.num_gpu_blocks == Found(27906, 3)
    assert facts.blocks == 27906
    assert facts.max_model_len == Found(8192, 4)
    assert facts.max_concurrency == Found(54.5, 4)
    assert facts.tensor_parallel_size == Found(2, 1)
    assert facts.kv_cache_dtype == Found("fp8", 1)
    assert facts.enforce_eager == Found(True, 1)
    assert facts.weights_gib == Found(7.1216, 2)
    assert facts.num_preemptions == Found(51, 5)
    assert (facts.acceptance.accepted, facts.acceptance.drafted) == (8547, 13311)
    assert facts.acceptance.unconditional_rates == ()
    (stats,) = facts.stats
    assert (stats.line, stats.running, stats.waiting) == (7, 12, 3)
    assert stats.kv_usage == pytest.approx(0.415)


def test_vllm_19():
    facts = read_server_log(VLLM_19)
    assert facts.model == Found("meta-llama/Llama-3.1-8B", 3)
    assert facts.dtype == Found("bfloat16", 3)
    assert facts.quantization is None
    assert facts.max_num_seqs == Found(128, 1)
    assert facts.max_num_batched_tokens == Found(2048, 1)
    assert facts.gpu_memory_utilization == Found(0.95, 1)
    assert facts.async_scheduling == Found(True, 2)
    assert facts.kv_cache_gib == Found(5.05, 5)
    assert facts.kv_cache_tokens == Found(41408, 6)
    assert facts.blocks == 2588
    assert facts.max_model_len == Found(32768, 7)
    assert facts.graph_gib == Found(0.54, 8)
    assert facts.cudagraph_sizes == Found((1, 2, 4, 8), 3)
    assert facts.stats[0].waiting == 10
    assert facts.stats[0].prefix_hit_rate == pytest.approx(0.025)
    # Two intervals of 203 rounds each.
    acceptance = facts.acceptance
    assert (acceptance.accepted, acceptance.drafted, acceptance.line) == (612, 1218, 11)
    assert acceptance.mean_acceptance_length == pytest.approx(1 + 612 / 406)
    assert acceptance.unconditional_rates == pytest.approx((0.701, 0.486, 0.3205))
    assert acceptance.conditional_rates == pytest.approx((0.701, 0.486 / 0.701, 0.3205 / 0.486))


def test_one_line_for_size_and_concurrency():
    facts = read_server_log(
        "GPU KV cache size: 112,347 tokens, Maximum concurrency for 98,304 tokens per request: 1.14x"
    )
    assert (facts.value("kv_cache_tokens"), facts.value("max_model_len")) == (112347, 98304)
    assert facts.value("max_concurrency") == 1.14


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("INFO executor_base.py:110] # CUDA blocks: 1381, # CPU blocks: 0", "num_gpu_blocks", 1381),
        ("INFO executor_base.py:112] # cuda blocks: 1381, # CPU blocks: 0", "num_gpu_blocks", 1381),
        ("INFO 01-30 03:19:14 kv_cache_utils.py:395] # GPU blocks: 1381", "num_gpu_blocks", 1381),
        ("INFO Overriding num_gpu_blocks=900 with num_gpu_blocks_override=512", "num_gpu_blocks", 512),
        ("the rest of the memory reserved for KV Cache is 51.38GiB.", "kv_cache_gib", 51.38),
        ("model weights take 14.99GiB; non_torch_memory takes 0.13GiB", "weights_gib", 14.99),
        ("Chunked prefill is enabled with max_num_batched_tokens=2048.", "max_num_batched_tokens", 2048),
        ("INFO Asynchronous scheduling is disabled.", "async_scheduling", False),
        ("with config: model='m', max_seq_len=4096, chunked_prefill_enabled=False", "enable_chunked_prefill", False),
        ("tensor_parallel_size=1, pipeline_parallel_size=2, data_parallel_size=4", "pipeline_parallel_size", 2),
        ("tensor_parallel_size=1, pipeline_parallel_size=2, data_parallel_size=4", "data_parallel_size", 4),
        ("server_args=ServerArgs(tp_size=1, pp_size=2, dp_size=4)", "pipeline_parallel_size", 2),
        ("server_args=ServerArgs(tp_size=1, pp_size=2, dp_size=4)", "data_parallel_size", 4),
        ("server_args=ServerArgs(tp_size=1, disable_cuda_graph=True)", "enforce_eager", True),
        ("dtype=torch.bfloat16, quantization=fp8", "quantization", "fp8"),
        ("speculative_config=SpeculativeConfig(method='mtp', num_spec_tokens=3)", "num_speculative_tokens", 3),
        ("Graph capturing finished in 1 secs, took 0.20 GiB", "graph_gib", 0.2),
    ],
)
def test_wordings(line, name, value):
    assert getattr(read_server_log(f"something\n{line}\n"), name) == Found(value, 2)


def test_sglang():
    facts = read_server_log(SGLANG)
    assert facts.engine == Found("sglang", 1)
    assert facts.kv_cache_tokens == Found(444109, 3)
    assert facts.blocks == 444109 and facts.tokens_per_block == 1
    assert facts.value("max_num_batched_tokens") == 8192
    assert facts.value("max_num_seqs") == 2049
    assert facts.value("max_model_len") == 131072
    assert facts.value("tensor_parallel_size") == 2
    assert facts.value("enable_prefix_caching") is True
    assert facts.stats[0].running == 317 and facts.stats[0].waiting == 4
    assert facts.stats[0].kv_usage == 0.67
    assert facts.acceptance.mean_acceptance_length == 3.12


def test_metrics_count_over_engines():
    facts = read_server_log(METRICS)
    assert facts.num_gpu_blocks == Found(573, 3)
    assert facts.block_size == Found(16, 3)
    assert facts.kv_cache_dtype == Found("fp8", 3)
    assert facts.enable_prefix_caching == Found(True, 3)
    assert facts.num_preemptions == Found(7, 5)
    assert facts.acceptance.mean_acceptance_length == pytest.approx(2.5)
    assert facts.acceptance.unconditional_rates == pytest.approx((0.8, 0.5, 0.2))
    assert facts.acceptance.conditional_rates == pytest.approx((0.8, 0.625, 0.4))
    assert facts.acceptance.drafted == 3000


def test_prefix_counters_add_up_over_engines():
    lines = [f'vllm:prefix_cache_{what}_total{{engine="{i}"}} 1.0e+0{n}' for i in (0, 1) for what, n in WHAT]
    facts = read_server_log("\n".join(lines))
    assert facts.prefix_cache_queries == Found(2000, 3) and facts.prefix_cache_hits == Found(200, 4)
    assert facts.prefix_hit_rates == (pytest.approx(0.1),)


def test_no_quantization_is_none_whoever_writes_it():
    for none in ("quantization=None", "'quantization': None", '"quantization": null'):
        assert read_server_log(f"dtype=torch.bfloat16, {none}").quantization is None


def test_a_log_and_its_metrics_complete_each_other():
    both = read_server_log(VLLM_19).merged(read_server_log(METRICS))
    assert both.value("kv_cache_tokens") == 41408
    assert both.value("kv_cache_dtype") == "auto", "what the log says goes before"
    assert both.value("num_preemptions") == 7


def test_nothing_known_is_refused():
    with pytest.raises(UserError, match="nothing in the server log is known"):
        read_server_log("hello\nworld\n")


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=8))
def test_conditional_rates_are_the_factors_of_unconditional_ones(factors):
    unconditional, product = [], 1.0
    for factor in factors:
        product *= factor
        unconditional.append(product)
    assert conditional_rates(tuple(unconditional)) == pytest.approx(factors)


def test_rising_rates_are_refused():
    with pytest.raises(UserError, match=r"0\.7 at position 1"):
        conditional_rates((0.5, 0.7))
    assert conditional_rates((0.5, 0.0, 0.0)) == (0.5, 0.0, 0.0)


@given(st.text(max_size=300))
def test_any_text_is_read_or_refused(text):
    try:
        facts = read_server_log(text)
    except UserError:
        return
    assert isinstance(facts, ServerFacts)


# ---- several starts, progress bars, lines that were cut ------------------------------------------------------------

START = """\
non-default args: {'model': 'org/m', 'max_num_seqs': 64, 'quantization': 'fp8'}
Initializing a V1 LLM engine (v0.11.0) with config: model='org/m', speculative_config=SpeculativeConfig(\
method='ngram', num_spec_tokens=3), dtype=torch.bfloat16, quantization=fp8, kv_cache_dtype=fp8
GPU KV cache size: 1,024 tokens
"""
RESTART = """\
non-default args: {'model': 'org/m'}
Initializing a V1 LLM engine (v0.11.0) with config: model='org/m', speculative_config=None, dtype=torch.float16, \
quantization=None, kv_cache_dtype=auto
GPU KV cache size: 2,048 tokens
"""
SPECULATION = "SpecDecoding metrics: Mean acceptance length: 2.15, {}Per-position acceptance rate: 0.700, 0.450\n"


def test_the_later_start_wins_where_it_says_none_too():
    alone = read_server_log(START)
    assert (alone.value("quantization"), alone.value("max_num_seqs"), alone.value("num_speculative_tokens")) == (
        "fp8",
        64,
        3,
    )
    facts = read_server_log(START + SPECULATION.format("Drafted: 300 tokens, ") + RESTART)
    for name in ("quantization", "max_num_seqs", "num_speculative_tokens", "acceptance"):
        assert getattr(facts, name) is None, name
    assert facts.engine == Found("vllm", 2)
    assert facts.dtype == Found("float16", 6)
    assert facts.kv_cache_dtype == Found("auto", 6)
    assert facts.kv_cache_tokens == Found(2048, 7)
    again = read_server_log(START + RESTART + START)
    assert again.quantization == Found("fp8", 8) and again.max_num_seqs == Found(64, 7)


def test_a_later_none_replaces_without_a_list_of_settings_too():
    facts = read_server_log("GPU KV cache size: 16 tokens\nquantization=fp8\nquantization=None\n")
    assert facts.quantization is None


def test_engines_of_one_start_do_not_forget_each_other():
    given, used, *_ = START.splitlines()
    facts = read_server_log(f"{given}\n{used}\n{used}\n")
    assert facts.max_num_seqs == Found(64, 1) and facts.quantization == Found("fp8", 3)


def test_lines_count_as_editors_count_them():
    """A progress bar returns to the start of its line; form feeds and the like are no ends of lines either."""
    text = (
        "Loading: 0%\rLoading: 50%\rLoading: 100%\r\n"
        "a\x0cb\x85c\u2028d\r\n"
        "10%\rGPU KV cache size: 1,024 tokens\rLoading: 100% \r\n"
        "50%\rvllm:num_preemptions_total 3.0\n"
        "max_num_seqs=8\r\n"
    )
    facts = read_server_log(text)
    assert facts.kv_cache_tokens == Found(1024, 3)
    assert facts.num_preemptions == Found(3, 4)
    assert facts.max_num_seqs == Found(8, 5)


@pytest.mark.parametrize(
    ("counts", "accepted", "drafted"),
    [
        ("Accepted: 1150 tokens, Drafted: 2000 tokens, ", 1150, 2000),
        ("Drafted: 2000 tokens, ", 1150, 2000),
        ("Accepted: 1150 tokens, ", 1150, 2000),
    ],
)
def test_a_count_that_is_missing_follows_from_the_other(counts, accepted, drafted):
    acceptance = read_server_log(SPECULATION.format(counts)).acceptance
    assert (acceptance.accepted, acceptance.drafted) == (accepted, drafted)
    assert acceptance.mean_acceptance_length == pytest.approx(2.15)
    assert acceptance.unconditional_rates == pytest.approx((0.7, 0.45))


def test_what_is_printed_of_a_cut_line_agrees_with_itself():
    """The stated length is of other rates: those that are there decide."""
    for counts in ("Drafted: 3000 tokens, ", "Accepted: 1400 tokens, "):
        line = SPECULATION.format(counts).replace("2.15", "2.40")
        acceptance = read_server_log(line).acceptance
        assert acceptance.mean_acceptance_length == pytest.approx(1 + sum(acceptance.unconditional_rates), rel=1e-3)


def test_a_line_of_a_length_and_one_count():
    prefix = "SpecDecoding metrics: Mean acceptance length: 2.50, "
    found = read_server_log(prefix + "Accepted: 150 tokens").acceptance
    assert (found.accepted, found.drafted, found.mean_acceptance_length) == (150, None, 2.5)
    found = read_server_log(prefix + "Drafted: 300 tokens").acceptance
    assert (found.accepted, found.drafted, found.mean_acceptance_length) == (None, None, 2.5)
    with pytest.raises(UserError, match="nothing in the server log"):
        read_server_log("SpecDecoding metrics: Accepted: 150 tokens")
