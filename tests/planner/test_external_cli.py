"""`memwall calibrate-from`: what it prints and saves, and what it refuses."""

from __future__ import annotations

import gzip
import json
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from engine.scheduling import KVCacheConfig, SchedulerConfig
from planner import cli
from planner.catalog import load_gpu, load_model
from planner.external.calibration import load_external
from planner.external.replay import replay
from planner.external.scaled import Factors
from planner.external.served_run import served_run
from planner.roofline import RooflineStepTime
from planner.simulation import System
from tests.planner.profiles_for_tests import profile, write

COMMANDS = [EntryPoint("calibrate-from", "planner.commands.calibrate_from:calibrate_from", cli.GROUP)]
LOG = """\
Initializing a V1 LLM engine (v0.19.0) with config: model='meta-llama/Llama-3.1-8B', max_seq_len=8192
non-default args: {'max_num_seqs': 128, 'max_num_batched_tokens': 2048}
GPU KV cache size: 41,408 tokens
"""


@pytest.fixture
def calibrate_from(memwall):
    return lambda *arguments: memwall("calibrate-from", *arguments, commands=COMMANDS)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A vLLM benchmark result of an engine 30 % slower than the roofline, with one failed request."""
    rng = np.random.default_rng(0)
    n = 60
    arrival = np.cumsum(rng.exponential(0.5, n))
    inputs, outputs = rng.integers(16, 1024, n), rng.integers(2, 100, n)
    base = RooflineStepTime(load_model("llama-3.1-8b"), load_gpu("rtx4090"))
    system = System(SchedulerConfig(2048, 128, 8192), KVCacheConfig(2588, 16), base, pipeline_depth=2)
    run = served_run("r", arrival, inputs, outputs, arrival, arrival)
    seen = replay(run, system, Factors(prefill=1.3, weights=1.3, kv=1.3))
    gaps = [[float(tpot)] * (m - 1) for tpot, m in zip(seen.tpot_s, outputs.tolist(), strict=True)]
    document = {
        "request_throughput": 1.0,
        "input_lens": [*inputs.tolist(), 7],
        "output_lens": [*outputs.tolist(), 0],
        "ttfts": [*seen.ttft_s.tolist(), 0.0],
        "itls": [*gaps, []],
        "errors": [""] * n + ["timed out"],
        "start_times": [*arrival.tolist(), arrival[-1] + 1],
    }
    folder = tmp_path_factory.mktemp("external")
    (folder / "result.json").write_text(json.dumps(document))
    (folder / "server.log").write_text(LOG)
    return folder / "result.json"


def test_it_prints_what_it_found_and_saves_it(calibrate_from, result, tmp_path):
    saved = tmp_path / "calibration.json"
    log = result.parent / "server.log"
    done = calibrate_from(result, "--system", "rtx4090", "--server-log", log, "--save", saved)
    assert done.code == 0, done.err
    for words in (
        "1 failed ones left out",
        "41,408 tokens",
        "line 3",
        "2,588",
        "30 fitted, 30 held out",
        "held out, scaled",
        "prefill",
        "arrival_s",
    ):
        assert words in done.out
    assert "factors on the profile of" in done.out, "the step times are transferred"
    calibration = load_external(saved)
    assert calibration.gpu == "rtx4090" and calibration.settings["pipeline_depth"] == 2
    # The step times that are scaled are those of a transferred profile, not what the result was made with.
    assert calibration.as_factors().weights == pytest.approx(1.3, rel=0.1)
    assert abs(calibration.after.tpot.mean) < 0.02 < abs(calibration.before.tpot.mean)
    assert calibration.command.startswith("memwall") and "/" not in calibration.command.replace("://", "")


def test_bad_input_is_one_sentence(calibrate_from, result, tmp_path):
    calibrate_from(result).check_bad_input("--model")
    calibrate_from(tmp_path / "none.json", "--model", "llama-3.1-8b").check_bad_input("there is no file")
    (tmp_path / "note.txt").write_text("hello\n")
    calibrate_from(result, "--server-log", tmp_path / "note.txt").check_bad_input(
        "note.txt", "nothing in the server log"
    )
    short = tmp_path / "short.csv"
    short.write_text("arrival_s,input_tokens,output_tokens,ttft_s,e2el_s\n0,5,5,0.1,0.3\n")
    about = ("--model", "llama-3.1-8b", "--system", "h200_sxm")
    calibrate_from(short, *about).check_bad_input("answered request")
    rows = "".join(f"{i},5,5,0,0.3\n" for i in range(40))
    short.write_text(f"arrival_s,input_tokens,output_tokens,ttft_s,e2el_s\n{rows}")
    calibrate_from(short, *about).check_bad_input("streamed")
    (tmp_path / "binary.log").write_bytes(b"\x00\x01\x02")
    calibrate_from(result, "--server-log", tmp_path / "binary.log").check_bad_input(
        "binary.log is a binary file; server logs are UTF-8 text"
    )
    calibrate_from(tmp_path / "binary.log").check_bad_input("benchmarks are CSV, JSONL or JSON text")
    calibrate_from(result, *about, "--held-out", "1.5").check_bad_input("held-out share")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--save result.json", "--save result.json would overwrite the benchmark result.json; give it another name"),
        ("--save soft.json", "would overwrite the benchmark result.json"),
        ("--save ./server.log", "would overwrite --server-log server.log"),
        ("--output-file server.log", "--output-file server.log would overwrite --server-log server.log"),
        ("--metrics m.prom --output-file m.prom", "would overwrite --metrics m.prom"),
        ("--model m.prom --save m.prom", "would overwrite --model m.prom"),
        ("--save same.json --output-file ./same.json", "are the same file; give each a name of its own"),
    ],
)
def test_inputs_are_not_overwritten(calibrate_from, tmp_path, monkeypatch, line, words):
    monkeypatch.chdir(tmp_path)
    for name in ("result.json", "server.log", "m.prom"):
        Path(name).write_text("precious")
    Path("soft.json").symlink_to("result.json")
    calibrate_from("result.json", "--server-log", "server.log", *line.split()).check_bad_input(words)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"precious"}
    assert len(list(tmp_path.iterdir())) == 4


def test_help_says_which_results_of_sglang_can_be_used(calibrate_from):
    said = " ".join(calibrate_from("--help").out.replace("│", " ").split())
    assert "has no start times: --request-rate inf without --max-concurrency" in said


def test_a_profile_of_ones_own_is_what_is_scaled(calibrate_from, memwall, result, tmp_path):
    own, saved = write(tmp_path, profile(), "own.json"), tmp_path / "cal.json"
    about = (result, "--model", "llama-3.1-8b", "--system", "h200_sxm", "--max-num-seqs", "256")
    assert calibrate_from(*about, "--profile", own, "--save", saved).code == 0
    mine, shipped = json.loads(saved.read_text()), tmp_path / "shipped.json"
    assert calibrate_from(*about, "--save", shipped).code == 0
    assert mine["base_steps_s"] != json.loads(shipped.read_text())["base_steps_s"]
    simulate = ("simulate", "--system", "h200_sxm", "--num-prompts", "20", "--request-rate", "1", "--intervals", "0")
    assert memwall(*simulate, "--profile", saved, "--profile", own).code == 0
    memwall(*simulate, "--profile", saved).check_bad_input("where a typical step took")
    memwall(*simulate, "--profile", shipped, "--profile", own).check_bad_input("leave out the profile that was given")
    calibrate_from(*about, "--profile", saved).check_bad_input("cal.json is a calibration of `memwall calibrate-from`")
    calibrate_from(*about, "--profile", own, "--save", own).check_bad_input("would overwrite --profile")


def test_the_gpu_is_not_guessed(calibrate_from, result):
    said = "result.json does not say which GPU served it; pass --system, e.g. h200_sxm"
    calibrate_from(result, "--model", "llama-3.1-8b").check_bad_input(said)


def test_data_counts_once(calibrate_from, result, tmp_path):
    calibrate_from(result, result, "--system", "h200_sxm").check_bad_input("result.json is given twice")
    packed = tmp_path / "copy.json.gz"
    packed.write_bytes(gzip.compress(result.read_bytes()))
    calibrate_from(result, packed, "--system", "h200_sxm").check_bad_input(
        "copy.json.gz has the same content as result.json"
    )


def test_the_benchmark_says_the_model_where_nothing_else_does(calibrate_from, result, tmp_path):
    named = tmp_path / "named.json"
    document = json.loads(result.read_text())
    named.write_text(json.dumps(document | {"model_id": "meta-llama/Llama-3.1-8B-Instruct"}))
    done = calibrate_from(named, "--system", "rtx4090", "--max-model-len", "2048")
    assert done.code == 0, done.err
    assert "llama-3.1-8b on 1 × rtx4090" in done.out
    named.write_text(json.dumps(document | {"model_id": "production"}))
    calibrate_from(named, "--system", "rtx4090").check_bad_input(
        "neither --model nor a server log says which model was served; named.json calls it 'production', which"
    )


def test_what_the_log_says_of_weights_and_prefixes_is_kept(calibrate_from, result, tmp_path):
    log, saved = tmp_path / "server.log", tmp_path / "calibration.json"
    stats = "Engine 000: Running: 9 reqs, Waiting: 0 reqs, GPU KV cache usage: 1.0%, Prefix cache hit rate: 91.0%\n"
    log.write_text(LOG.replace("max_seq_len", "quantization=fp8, max_seq_len") + stats)
    done = calibrate_from(result, "--system", "rtx4090", "--server-log", log, "--save", saved)
    assert done.code == 0, done.err
    calibration = load_external(saved)
    assert calibration.quantization == "fp8"
    assert calibration.settings["quantization"] == "fp8" and calibration.origin["quantization"] == "log line 1"
    assert len([warning for warning in calibration.warnings if "91% of prompt tokens" in warning]) == 1
    log.write_text(LOG)
    metrics = tmp_path / "metrics.txt"
    metrics.write_text('vllm:prefix_cache_queries_total{engine="0"} 1000.0\nvllm:prefix_cache_hits_total{} 910.0\n')
    done = calibrate_from(result, "--system", "rtx4090", "--server-log", log, "--metrics", metrics, "--save", saved)
    assert done.code == 0, done.err
    again = load_external(saved)
    assert again.quantization is None
    # Besides what the profile at hand leaves unsaid of the factors.
    both = {each for each in {*calibration.warnings} & {*again.warnings} if "do not show the factor" not in each}
    assert both == {
        "the server found 91% of prompt tokens in its prefix cache, which the runs do not show; the prefill factor "
        "absorbs it, and holds for as much reuse only"
    }
