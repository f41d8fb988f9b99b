"""`memwall validate` on benchmarks of servers that are not ours, as vLLM and others write them."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from calibration.validate.command import run
from calibration.validate.external import OutsideServer
from calibration.validate.records import read
from engine.errors import UserError
from engine.scheduling import KVCacheConfig, SchedulerConfig
from planner.catalog import load_gpu, load_model
from planner.deployment import Deployment
from planner.external.calibration import calibrate_external
from planner.external.readers import read_served_runs, read_server_facts
from planner.external.replay import replay
from planner.external.scaled import Factors
from planner.external.served_run import served_run
from planner.external.settings import external_system
from planner.simulation import System

ROOT = Path(__file__).resolve().parent.parent.parent
LOG = """\
Initializing a V1 LLM engine (v0.19.0) with config: model='meta-llama/Llama-3.1-8B', max_seq_len=8192
non-default args: {'max_num_seqs': 128, 'max_num_batched_tokens': 2048}
GPU KV cache size: 41,408 tokens
"""
TRUTH = Factors(prefill=1.3, weights=1.3, kv=1.3, arrival_s=0.03)


def served(factors: Factors, seed: int = 0, n: int = 60):
    """Requests, and what an engine whose steps are the planner's, scaled, makes of them."""
    rng = np.random.default_rng(seed)
    arrival = np.cumsum(rng.exponential(0.5, n))
    inputs, outputs = rng.integers(16, 1024, n), rng.integers(2, 100, n)
    limits = {"max_num_seqs": 128, "max_num_batched_tokens": 2048, "block_size": 16}
    base = Deployment(load_model("llama-3.1-8b"), load_gpu("rtx4090"), **limits).step_time()
    system = System(SchedulerConfig(2048, 128, 8192), KVCacheConfig(2588, 16), base, pipeline_depth=2)
    return (
        arrival,
        inputs,
        outputs,
        replay(served_run("r", arrival, inputs, outputs, arrival, arrival), system, factors),
    )


def vllm_result(factors: Factors, seed: int = 0) -> dict:
    arrival, inputs, outputs, seen = served(factors, seed)
    gaps = [[float(tpot)] * (m - 1) for tpot, m in zip(seen.tpot_s, outputs.tolist(), strict=True)]
    return {
        "request_throughput": 1.0,
        "input_lens": inputs.tolist(),
        "output_lens": outputs.tolist(),
        "ttfts": seen.ttft_s.tolist(),
        "itls": gaps,
        "errors": [""] * len(arrival),
        "start_times": arrival.tolist(),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("outside")
    (folder / "plain.json").write_text(json.dumps(vllm_result(Factors())))
    (folder / "slow.json").write_text(json.dumps(vllm_result(TRUTH)))
    (folder / "server.log").write_text(LOG)
    return folder


def flags(folder: Path) -> list[str]:
    return ["--server-log", str(folder / "server.log"), "--system", "rtx4090"]


def validated(folder: Path, tmp_path: Path, name: str, *more: str) -> dict:
    out = tmp_path / "out.json"
    assert run([str(folder / name), *flags(folder), "--json", str(out), *more]) == 0
    return json.loads(out.read_text())


def test_the_same_step_times_have_no_error(folder, tmp_path, capsys):
    found = validated(folder, tmp_path, "plain.json", "--no-intervals")
    (level,) = found["levels"]
    engine = level["engine"]
    assert (level["num_requests"], engine["model"], engine["tensor_parallel_size"]) == (60, "llama-3.1-8b", 1)
    # 41,408 tokens are 2,588 blocks, one of which vLLM keeps for itself.
    assert (engine["num_kv_blocks"], engine["block_size"], engine["max_num_seqs"]) == (2587, 16, 128)
    for name in ("ttft_ms.p50", "tpot_ms.mean", "e2el_ms.p90", "output_throughput_tokens_per_s"):
        assert level["metrics"][name]["error"] == pytest.approx(0, abs=1e-3), name
    assert "transferred from another GPU to NVIDIA GeForce RTX 4090" in capsys.readouterr().out


def test_a_slower_engine_shows_and_a_calibration_of_it_mends_it(folder, tmp_path, capsys):
    before = validated(folder, tmp_path, "slow.json", "--no-intervals")["levels"][0]["metrics"]
    assert before["tpot_ms.mean"]["error"] < 1 / 1.3 - 1  # longer steps also make longer queues
    runs, facts = read_served_runs(folder / "slow.json"), read_server_facts(folder / "server.log")
    external = external_system(load_model("llama-3.1-8b"), load_gpu("rtx4090"), facts, runs)
    saved = tmp_path / "cal.json"
    saved.write_text(calibrate_external(runs, external, facts).model_dump_json())
    level = validated(folder, tmp_path, "slow.json", "--profile", str(saved), "--runs", "4")["levels"][0]
    for name in ("ttft_ms.p50", "tpot_ms.p50", "e2el_ms.p50"):  # the 30 ms before the first token among them
        metric = level["metrics"][name]
        assert metric["error"] == pytest.approx(0, abs=0.03), name
        assert metric["interval"][0] < metric["measured"][0] < metric["interval"][1]
    assert "scaled to slow.json" in level["step_times"]


def test_a_table_of_requests(tmp_path, capsys):
    arrival, inputs, outputs, seen = served(Factors())
    rows = zip(arrival, inputs, outputs, seen.ttft_s, seen.e2el_s, strict=True)
    table = tmp_path / "requests.csv"
    lines = ["arrival_s,input_tokens,output_tokens,ttft_s,e2el_s", *(",".join(map(str, row)) for row in rows)]
    table.write_text("\n".join(lines) + "\n")
    settings = ["--max-num-seqs", "128", "--max-num-batched-tokens", "2048", "--num-gpu-blocks-override", "2588"]
    settings += ["--block-size", "16", "--async-scheduling", "--max-model-len", "8192"]
    about = ["--model", "llama-3.1-8b", "--system", "rtx4090"]
    assert run([str(table), *about, *settings, "--no-intervals", "--json", str(tmp_path / "o.json")]) == 0
    level = json.loads((tmp_path / "o.json").read_text())["levels"][0]
    assert level["metrics"]["e2el_ms.p50"]["error"] == pytest.approx(0, abs=1e-3)
    assert "a default stands in" not in capsys.readouterr().out


def test_what_nobody_said_is_a_note(folder, capsys):
    about = ["--model", "llama-3.1-8b", "--system", "rtx4090"]
    assert run([str(folder / "plain.json"), *about, "--no-intervals"]) == 0
    assert "neither flag nor log says, so a default stands in" in " ".join(capsys.readouterr().out.split())


def test_what_the_log_says_of_weights_and_prefixes_counts(folder, tmp_path, capsys):
    log = tmp_path / "server.log"
    stats = "Engine 000: Running: 9 reqs, Waiting: 0 reqs, GPU KV cache usage: 1.0%, Prefix cache hit rate: 91.0%\n"
    log.write_text(LOG.replace("max_seq_len", "quantization=fp8, max_seq_len") + stats)
    out = tmp_path / "out.json"
    about = ["--server-log", str(log), "--system", "rtx4090", "--no-intervals", "--json", str(out)]
    assert run([str(folder / "plain.json"), *about]) == 0
    assert json.loads(out.read_text())["levels"][0]["engine"]["quantization"] == "fp8"
    said = "the server found 91% of prompt tokens in its prefix cache, which the runs do not show; the prefill factor"
    assert said in " ".join(capsys.readouterr().out.split())


def test_the_benchmark_says_the_model_where_nothing_else_does(folder, tmp_path, capsys):
    path = tmp_path / "named.json"
    path.write_text(json.dumps(vllm_result(Factors()) | {"model_id": "meta-llama/Llama-3.1-8B-Instruct"}))
    ((record, _),) = OutsideServer(system="rtx4090").read(path)
    assert record.engine.model == "llama-3.1-8b"
    ((_, predictor),) = OutsideServer(model="llama-3.2-1b", system="rtx4090").read(path)
    said = "named.json is of the model meta-llama/Llama-3.1-8B-Instruct, but llama-3.2-1b is simulated"
    assert said in predictor.notes


def test_several_loads_of_a_file_are_levels_of_their_own(folder, tmp_path):
    path = tmp_path / "both.json"
    texts = [json.dumps(vllm_result(Factors(), seed)) for seed in (0, 1, 0)]
    path.write_text("\n".join(texts) + "\n")
    found = OutsideServer(system="rtx4090", server_log=folder / "server.log").read(path)
    assert [(record.name, len(record.runs)) for record, _ in found] == [("both.1", 2), ("both.2", 1)]


def test_our_own_records_are_not_outside_ones():
    own = ROOT / "calibration" / "records" / "serve_h200_bf16_20.json"
    assert not OutsideServer().can_read(own)
    assert read(own).source == "memwall bench serve"


def test_bad_input_is_one_sentence(folder, tmp_path):
    result, log = str(folder / "plain.json"), str(folder / "server.log")
    own = str(ROOT / "calibration" / "records" / "serve_h200_bf16_20.json")
    shutil.copy(result, tmp_path / "copy.json")
    (tmp_path / "short.csv").write_text("when\n1\n")
    speculated = tmp_path / "spec.log"
    speculated.write_text(
        LOG + "SpecDecoding metrics: Mean acceptance length: 2.20, Accepted throughput: 5 tokens/s, Drafted throughput:"
        " 9 tokens/s, Accepted: 120 tokens, Drafted: 200 tokens, Per-position acceptance rate: 0.8, 0.4, Avg Draft "
        "acceptance rate: 60.0%\n"
    )
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(Path(result).read_bytes())[:-100])
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "cal.json").write_text('{\n "version": 1,\n "kind": "memwall-external-calibration"\n}\n')
    (tmp_path / "profile.json").write_text('{"version": 1, "kind": "memwall-profile"}')
    (tmp_path / "nothing.json").write_text('{"version": 1}')
    several = tmp_path / "several.log"
    several.write_text(LOG + "data_parallel_size=4\n")
    slow = json.loads((folder / "plain.json").read_text())
    (tmp_path / "ms.json").write_text(
        json.dumps(slow | {"itls": [[1e3 * gap for gap in gaps] for gaps in slow["itls"]]})
    )
    for arguments, words in (
        ([str(tmp_path / "cut.json.gz")], "cut.json.gz is damaged gzip data"),
        ([str(tmp_path / "empty.json")], "empty.json is empty"),
        (
            [str(tmp_path / "cal.json")],
            "cal.json is a calibration of `memwall calibrate-from`, not a benchmark; it bel",
        ),
        ([str(tmp_path / "profile.json")], "is a profile of `memwall calibrate`, not a benchmark; it belongs behind"),
        ([str(tmp_path / "nothing.json")], "nothing.json is no record of `memwall bench`: it names no suite"),
        ([result, "--server-log", str(several), "--system", "rtx4090"], "4 replicas shared the benchmark's requests"),
        ([str(tmp_path / "ms.json"), *flags(folder)], "ms.json: by itls the median token takes"),
        ([result, str(tmp_path / "copy.json"), *flags(folder)], "copy.json has the same content as plain.json"),
        ([result], "which model was served; pass --model"),
        ([result, "--server-log", log], "which GPU served it; pass --system"),
        ([result, "--model", "llama-3.1-8b", "--system", "h201"], "h201"),
        ([result, "--server-log", str(tmp_path / "none.log"), "--system", "rtx4090"], "none.log"),
        ([result, "--server-log", str(speculated), "--system", "rtx4090"], "without speculation"),
        ([str(tmp_path / "short.csv"), "--model", "llama-3.1-8b", "--system", "rtx4090"], "short.csv"),
        ([own, "--system", "h200_sxm"], "--system is of servers that are not ours"),
        (
            [result, *flags(folder), "--max-model-len", "64"],
            "but max_model_len is 64: the settings are not those of the server",
        ),
    ):
        with pytest.raises(UserError) as caught:
            run([*arguments, "--no-intervals"])
        assert words in str(caught.value), arguments
        assert "\n" not in str(caught.value)
