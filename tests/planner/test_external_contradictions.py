"""What a server or its benchmark says of itself, held against what is simulated: made-up logs of known servers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from planner.catalog import load_gpu, load_model
from planner.errors import UserError
from planner.external.contradictions import served_model, served_quantization
from planner.external.served_run import ServedRun, served_run
from planner.external.server_facts import ServerFacts
from planner.external.server_log import read_server_log
from planner.external.settings import external_system

MODEL, GPU = load_model("llama-3.1-8b"), load_gpu("h200_sxm")
# What an H200 and Llama-3.1-8B say: 0.9 of 139.8 GiB, less 15 GiB of weights, activations and graphs.
LOG = """\
Initializing a V1 LLM engine (v0.19.0) with config: model='meta-llama/Llama-3.1-8B', max_seq_len=8192, \
tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1, quantization=None, enforce_eager=False
Model loading took 14.99 GiB memory and 4 seconds
Available KV cache memory: 106.07 GiB
GPU KV cache size: 868,928 tokens
"""


def run_of(tpot_s: float = 0.006, ttft_s: float = 0.03, model: str | None = None) -> ServedRun:
    """Ten answers of 101 tokens each at this pace, one a second."""
    arrival, lengths = np.arange(10.0), np.full(10, 101)
    first = arrival + ttft_s
    return served_run("run.csv", arrival, lengths, lengths, first, first + 100 * tpot_s, told_by="end", model=model)


def found(log: str = LOG, run: ServedRun | None = None, model=MODEL, gpu=GPU, **flags):
    return external_system(model, gpu, read_server_log(log), [run or run_of()], flags)


def refused(words: str, *arguments, **settings) -> None:
    with pytest.raises(UserError) as caught:
        found(*arguments, **settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_log_that_goes_with_everything_warns_of_nothing():
    external = found(run=run_of(model="meta-llama/Llama-3.1-8B-Instruct"))
    assert external.warnings == ()
    assert "quantization" not in external.origin


# ---- units -----------------------------------------------------------------------------------------------------------


def test_no_token_takes_a_thousand_steps_or_a_thousandth_of_one():
    refused("run.csv: by end the median token takes 6 s", run=run_of(tpot_s=6.0))
    refused("the median token takes 6.24 us", run=run_of(tpot_s=6e-6, ttft_s=3e-5))


@pytest.mark.parametrize(("tpot_s", "ttft_s"), [(0.6, 20.0), (0.002, 0.01), (0.0, 0.5), (0.006, 300.0)])
def test_load_speculation_lumps_and_queues_are_no_wrong_unit(tpot_s, ttft_s):
    found(run=run_of(tpot_s, ttft_s))


def test_answers_of_one_token_tell_no_pace():
    run = replace(run_of(), output_tokens=np.ones(10, np.int64))
    assert found(run=run).system.cache.num_blocks == 54_308


# ---- what was served -------------------------------------------------------------------------------------------------


def test_the_log_says_how_weights_were_quantised():
    facts = read_server_log(LOG.replace("quantization=None", "quantization=fp8"))
    assert served_quantization(None, facts) == "fp8"
    assert served_quantization(None, read_server_log(LOG)) is None
    log = LOG.replace("quantization=None", "quantization=fp8").replace("14.99", "8.49")
    external = found(log, model=load_model("llama-3.1-8b", "fp8"))
    assert external.origin["quantization"] == ("fp8", "log line 1")
    assert external.warnings == ()


def test_a_quantization_that_is_not_known_is_refused_or_told():
    log = LOG.replace("quantization=None", "quantization=awq")
    assert served_quantization(None, read_server_log(log)) is None
    refused("quantised by awq (log line 1), those of llama-3.1-8b are not", log)
    external = found(log.replace("14.99", "8.49"), model=load_model("llama-3.1-8b", "fp8"), quantization="fp8")
    assert external.origin["quantization"] == ("fp8", "flag")
    (warning,) = external.warnings
    assert "quantised by awq (line 1), but fp8 was given" in warning
    # Weights that the model's own configuration says are in few bits need no flag.
    assert found(LOG + "quantization=mxfp4\n", model=load_model("gpt-oss-20b")).origin["quantization"][0] == "mxfp4"


def test_weights_of_another_size_are_told():
    external = found(model=load_model("llama-3.1-8b", "fp8"), quantization="fp8")
    (warning,) = external.warnings
    assert "loaded 14.99 GiB of weights per GPU (log line 2), but llama-3.1-8b has 8.4" in warning


@pytest.mark.parametrize(
    ("name", "is_told"),
    [
        ("meta-llama/Llama-3.1-70B-Instruct", True),
        ("someone/my-tuned-72b-chat", True),
        ("Qwen/Qwen2.5-7B-Instruct", True),  # as large, but of another family
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", False),
        ("someone/my-tuned-8b-chat", False),
        ("/models/production", False),
        ("team-moe-8x7b", True),
        (None, False),
    ],
)
def test_a_benchmark_of_another_model_is_told(name, is_told):
    warnings = found(run=run_of(model=name)).warnings
    assert [f"run.csv is of the model {name}, but llama-3.1-8b is simulated"] * is_told == list(warnings)


def test_the_benchmark_says_the_model_where_nothing_else_does():
    runs = [run_of(model="my-model"), run_of(model="meta-llama/Llama-3.1-70B-Instruct")]
    assert served_model(None, ServerFacts(), runs) == "llama-3.1-70b"
    assert served_model(None, read_server_log(LOG), runs) == "meta-llama/Llama-3.1-8B"
    assert served_model("qwen3-8b", read_server_log(LOG), runs) == "qwen3-8b"
    assert served_model(None, ServerFacts(), runs[:1]) is None


# ---- how it was served -----------------------------------------------------------------------------------------------

SGLANG = (
    "server_args=ServerArgs(model_path='meta-llama/Llama-3.1-8B', tp_size=1, pp_size=1, dp_size=1, page_size=1, "
    "disable_cuda_graph=False)\nmax_total_num_tokens=868928, chunked_prefill_size=8192, context_len=8192\n"
)


@pytest.mark.parametrize("log", [LOG, SGLANG])
def test_layers_in_turn_and_several_replicas_are_refused(log):
    for one, several in (("pipeline_parallel_size=1", "pipeline_parallel_size=2"), ("pp_size=1", "pp_size=2")):
        if one in log:
            refused("on 2 GPUs in turn (pipeline_parallel_size, log line 1)", log.replace(one, several))
    for one, several in (("data_parallel_size=1", "data_parallel_size=4"), ("dp_size=1", "dp_size=4")):
        if one in log:
            refused("4 replicas shared the benchmark's requests (data_parallel_size, log", log.replace(one, several))
    assert found(log).warnings == ()


@pytest.mark.parametrize(
    "log",
    [
        LOG.replace("enforce_eager=False", "enforce_eager=True"),
        SGLANG.replace("disable_cuda_graph=False", "disable_cuda_graph=True"),
    ],
)
def test_a_server_without_graphs_is_told(log):
    (warning,) = found(log).warnings
    assert "without CUDA graphs (enforce_eager, log line 1)" in warning


def test_more_memory_than_the_gpu_has_is_refused():
    refused(
        "106.07 GiB of KV cache per GPU beside 14.99 GiB of weights (log line 3), but NVIDIA L4", gpu=load_gpu("l4")
    )
    # Either alone would fit into 140 GiB.
    refused("but NVIDIA H200", LOG.replace("106.07", "130.00"))


def test_far_less_memory_than_the_gpu_has_is_told():
    """A GPU of 40 GB: 0.9 of 39.4 GiB, less 15 of weights and some 2 more."""
    log = LOG.replace("106.07", "18.50").replace("868,928", "151,552")
    (warning,) = found(log).warnings
    assert "18.50 GiB of KV cache (log line 3)" in warning and "it was another GPU (--system)" in warning
    # A quarter less may be another engine's share.
    assert found(LOG.replace("106.07", "85.00")).warnings == ()


# ---- prefixes --------------------------------------------------------------------------------------------------------


def hits(rate: int) -> str:
    return f"Engine 000: Running: 9 reqs, Waiting: 0 reqs, GPU KV cache usage: 1%, Prefix cache hit rate: {rate}.0%\n"


def counters(hit: int, queries: str = "prefix_cache_queries_total", hit_name: str = "prefix_cache_hits_total") -> str:
    label = '{engine="0",model_name="m"}'
    return f"vllm:{queries}{label} 1.0e+06\nvllm:{hit_name}{label} {hit}.0\n"


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        (hits(91), 91),
        (counters(900_000), 90),
        (counters(900_000, "gpu_prefix_cache_queries", "gpu_prefix_cache_hits"), 90),
        (hits(0) + counters(900_000), 90),
        (hits(91) + hits(0), None),
        (counters(5_000), None),
        (hits(0), None),
    ],
)
def test_prompts_found_in_the_prefix_cache_are_told(text, rate):
    warnings = found(LOG + text).warnings
    said = "of prompt tokens in its prefix cache, which the runs do not show; the prefill factor absorbs it, and holds"
    assert [f"the server found {rate}% {said} for as much reuse only"] * (rate is not None) == list(warnings)
