"""The command line: what it prints, what it exits with, and what it says about bad input."""

import json
import math
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from planner import cli
from planner.commands import tables
from planner.commands.options import (
    RunOptions,
    SLOOptions,
    SpeculationOptions,
    WorkloadOptions,
    simulation_from_options,
    speculation_from_options,
    workload_from_options,
)
from planner.errors import UserError
from planner.memory import MemoryReport
from planner.records import CatalogRecord, GpuRecord, ModelRecord
from planner.simulate_report import SimulateReport
from planner.workload import default_workload

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL_LOAD = ("--request-rate", "4", "--num-prompts", "60", "--isl", "512", "--osl", "32")
TRACE = "arrival_s,input_tokens,output_tokens\n0,100,10\n1,200,20\n2.5,300,30\n"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- bad input -----------------------------------------------------------------------------------------------------

BAD_TRACES = {
    "empty": ("", ("empty",)),
    "only a header": ("arrival_s,input_tokens,output_tokens\n", ("no requests",)),
    "missing column": ("arrival_s,input_tokens\n0,100\n", ("output",)),
    "renamed column": ("arrival_s,input_tokens,otput_tokens\n0,100,10\n", ("otput_tokens",)),
    "no number": ("arrival_s,input_tokens,output_tokens\n0,100,10\n1,many,10\n", ("line 3", "input_tokens", "many")),
    "NaN": ("arrival_s,input_tokens,output_tokens\n0,nan,10\n", ("line 2", "input_tokens")),
    "infinite": ("arrival_s,input_tokens,output_tokens\ninf,10,10\n", ("line 2", "arrival_s")),
    "negative length": ("arrival_s,input_tokens,output_tokens\n0,-5,10\n", ("line 2", "-5")),
    "zero length": ("arrival_s,input_tokens,output_tokens\n0,5,0\n", ("line 2", "output_tokens")),
    "unsorted": ("arrival_s,input_tokens,output_tokens\n5,5,5\n1,5,5\n", ("line 3", "sort")),
    "binary": ("\0\1\2\3", ("trace.csv",)),
}


@pytest.mark.parametrize("command", ["simulate", "plan"])
@pytest.mark.parametrize("case", BAD_TRACES)
def test_bad_traces(memwall, tmp_path, case, command):
    text, words = BAD_TRACES[case]
    trace, answer = tmp_path / "trace.csv", tmp_path / "answer.json"
    trace.write_text(text)
    memwall(command, "--trace", trace, "--output-file", answer).check_bad_input("trace.csv", *words)
    assert names(tmp_path) == ["trace.csv"]


BAD_FLAGS = [
    # Names.
    ("memory --model llama-3.1-8", "unknown model", "llama-3.1-8b"),
    ("memory --model ./no/config.json", "no such file"),
    ("memory --system h20_sxm", "unknown GPU", "h200_sxm"),
    ("simulate --system h200_sxm,h100_sxm", "--system takes one GPU"),
    ("simulate --router random", "router", "round-robin"),
    ("memory --kv-cache-dtype fp9", "kv_cache_dtype", "fp8"),
    ("memory --kv-cache-policy half", "kv_cache_policy", "hybrid"),
    ("memory --quantization int3", "int3"),
    ("catalog models llama-9", "unknown model"),
    ("catalog gpus h300", "unknown GPU"),
    ("catalog cpus", "'cpus'", "'gpus'"),
    # Parallelism that divides neither heads nor GPUs.
    ("memory --tensor-parallel-size 3", "tensor_parallel_size is 3", "heads"),
    ("memory --tensor-parallel-size 16", "a node has 8"),
    ("simulate --tensor-parallel-size 0", "tensor_parallel_size is 0"),
    ("simulate --replicas 0", "--replicas is '0'"),
    # Numbers that are none, or absurd.
    ("memory --max-model-len abc", "--max-model-len is 'abc'", "integer"),
    ("memory --max-model-len 1.5", "--max-model-len is '1.5'"),
    ("memory --max-model-len 0", "max_model_len is 0"),
    ("memory --max-model-len 99999999999999999999", "max_model_len"),
    ("memory --gpu-memory-utilization nan", "gpu_memory_utilization is nan"),
    ("memory --gpu-memory-utilization 1.1", "at most 1"),
    ("memory --activation-gib nan", "--activation-gib is nan"),
    ("memory --total-memory-gib -1", "--total-memory-gib"),
    ("memory --cuda-graph-gib inf", "--cuda-graph-gib is inf"),
    ("memory --concurrency 0", "concurrency is 0"),
    ("memory --block-size 48 --kv-cache-dtype int4", "block_size is 48"),
    ("simulate --ttft nan", "ttft", "nan"),
    ("simulate --ttft -1", "ttft", "positive"),
    ("simulate --percentile 101", "percentile"),
    ("simulate --warmup-s -1", "warm-up"),
    ("simulate --client-timeout-s 0", "timeout"),
    ("simulate --seed -1", "--seed is '-1'"),
    # Workloads.
    ("simulate --trace no/such.csv", "no/such.csv"),
    ("simulate --trace {trace} --trace-format cvs", "trace format", "csv"),
    ("simulate --trace {trace} --isl 100", "--trace and --isl exclude each other"),
    ("simulate --trace {trace} --columns arrival", "--columns", "arrival=t_ms"),
    ("simulate --trace {trace} --columns arrival=a,arrival=b", "twice"),
    ("simulate --trace {trace} --columns start=a", "start"),
    ("simulate --trace {trace} --rate-scale 0", "rate scale"),
    ("simulate --trace {trace} --start-s 5 --end-s 2", "--start-s 5"),
    ("simulate --trace {trace} --start-s 900", "900"),
    ("simulate --trace {trace} --start-s nan", "--start-s nan"),
    ("simulate --trace {trace} --max-requests 0", "at least 1"),
    ("simulate --trace {trace} --max-model-len 250", "300 tokens", "--reject-too-long"),
    ("simulate --sort-arrivals", "--sort-arrivals", "--trace"),
    ("simulate --columns arrival=a", "--columns", "--trace"),
    ("simulate --request-rate 0", "request rate"),
    ("simulate --request-rate inf", "--num-prompts"),
    ("simulate --request-rate nan", "request rate"),
    ("simulate --burstiness 0", "burstiness"),
    ("simulate --num-prompts 0", "at least 1"),
    ("simulate --num-prompts 999999999999", "too many"),
    ("simulate --isl 0", "0"),
    ("simulate --isl many", "'many' is no length"),
    ("simulate --osl uniform:9-3", "smaller bound first"),
    ("simulate --shared-prefix-share 0.5", "--shared-prefix-tokens"),
    ("simulate --shared-prefix-tokens 9 --shared-prefix-share 2", "from 0 to 1"),
    # Speculation.
    ("simulate --acceptance-rates 0.8", "--speculative-config"),
    ("simulate --acceptance-concentration 9", "--speculative-config"),
    ("simulate --speculative-config {{", "not JSON"),
    ('simulate --speculative-config {{"num_speculative_tokens":2}}', "acceptance rates"),
    ('simulate --speculative-config {{"num_speculative_tokens":2}} --acceptance-rates 0.8', "only 1"),
    ('simulate --speculative-config {{"num_speculative_tokens":1}} --acceptance-rates x', "0.8,0.7,0.7"),
    ('simulate --speculative-config {{"num_speculative_tokens":1}} --acceptance-rates 1.2', "1.2"),
    # The command line itself.
    ("memroy", "'memroy'", "'memory'"),
    ("--verison", "no option --verison", "--version"),
    ("memory --max-model-length 4", "no option --max-model-length", "did you mean --max-model-len?"),
    ("memory --max_model_len 4", "did you mean --max-model-len?"),
    ("memory --max-model-len", "--max-model-len", "requires an argument"),
    ("memory --enforce-eager=1", "--enforce-eager", "does not take a value"),
    ("memory surplus", "surplus", "memwall memory --help"),
    ("simulate --output yaml", "--output", "'yaml'", "'json'"),
    ("memory --output-file no/such/folder.json", "there is no folder no/such"),
    ("memory --output-file {folder}", "this is a folder"),
    ("export", "memwall export needs PLAN"),
]


@pytest.mark.parametrize(("line", "words"), [(line, words) for line, *words in BAD_FLAGS], ids=lambda v: str(v)[:60])
def test_bad_flags(memwall, tmp_path, monkeypatch, line, words):
    monkeypatch.chdir(tmp_path)
    trace = tmp_path / "trace.csv"
    trace.write_text(TRACE)
    memwall(*line.format(trace=trace, folder=tmp_path).split()).check_bad_input(*words)
    assert names(tmp_path) == ["trace.csv"]


def test_a_defect_is_not_taken_for_an_answer(memwall, monkeypatch):
    monkeypatch.setattr("planner.memory.plan_memory", lambda *_, **__: 1 / 0)
    outcome = memwall("memory")
    assert outcome.code == cli.DEFECT
    assert "ZeroDivisionError" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: this is a defect of memwall")


def test_interruption_and_unexpected_files(memwall, monkeypatch):
    def fail(error: BaseException):
        def plan_memory(*_, **__):
            raise error

        monkeypatch.setattr("planner.memory.plan_memory", plan_memory)
        return memwall("memory")

    assert fail(KeyboardInterrupt()) == (130, "", "interrupted\n")
    assert fail(PermissionError(13, "Permission denied", "/etc/x")) == (2, "", "error: /etc/x: Permission denied\n")
    assert fail(UserError("two\nlines")) == (2, "", "error: two lines\n")


# ---- the executable ------------------------------------------------------------------------------------------------


def test_help_lists_every_command_and_the_exit_codes(memwall):
    for arguments in ((), ("--help",), ("-h",)):
        outcome = memwall(*arguments)
        assert outcome.code == 0
        for word in ("plan", "simulate", "memory", "catalog", "export", "Exit codes: 0", "1 it was answered", "2 the"):
            assert word in " ".join(outcome.out.split())
        assert "70 a defect of memwall; 130 Ctrl-C." in " ".join(outcome.out.split())


@pytest.mark.parametrize("command", ["plan", "simulate", "memory", "catalog", "export"])
def test_help_of_a_command(memwall, command):
    outcome = memwall(command, "--help")
    assert outcome.code == 0
    assert "Exit codes" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 80


def test_version(memwall):
    outcome = memwall("--version")
    assert outcome.code == 0
    assert outcome.out.startswith("memwall 0.1.")


def test_executable_imports_little():
    code = (
        "import sys; from planner import cli; sys.argv = ['memwall', '--help']; code = cli.main(); "
        "heavy = {'numpy', 'pandas', 'scipy', 'simpy', 'plotly', 'torch', 'joblib'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "simulate" in done.stdout


def test_a_reader_that_leaves_early_is_no_error():
    """`memwall catalog --output json | head -1`: the JSON is larger than a pipe's buffer."""
    command = [sys.executable, "-m", "planner.cli", "catalog", "--output", "json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"{\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


@pytest.mark.parametrize("line", ["--help | true", "memory --help | true", "catalog >&-", "nonsense 2>&-; test $? = 2"])
def test_streams_that_are_closed_are_no_error(line):
    command = f"set -o pipefail; {sys.executable} -m planner.cli {line}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_leaves_is_not_taken_for_the_answer_no(memwall, fabricated, monkeypatch):
    """Typer exits with 1 on EPIPE."""
    monkeypatch.setattr(cli, "discard_stdout", lambda: None)
    assert memwall("serve", commands=fabricated("def command():\n    raise BrokenPipeError(32, 'gone')\n")).code == 0
    with pytest.raises(SystemExit):
        memwall("serve", commands=fabricated("def command():\n    raise SystemExit(1)\n"))


@pytest.fixture
def fabricated(tmp_path, monkeypatch, commands):
    """The commands and one more, whose module has this source."""
    monkeypatch.syspath_prepend(tmp_path)

    def build(source: str, name: str = "serve", extras: str = "") -> list[EntryPoint]:
        module = f"fabricated_{abs(hash((source, extras)))}"
        (tmp_path / f"{module}.py").write_text(source)
        return [*commands, EntryPoint(name, f"{module}:command{extras}", cli.GROUP)]

    return build


MISSING = "import torch_that_is_missing\n\ndef command():\n    pass\n"
MISSING_LATE = "def command():\n    import torch_that_is_missing\n"


@pytest.mark.parametrize("source", [MISSING, MISSING_LATE])
def test_a_command_whose_extra_is_missing_says_what_to_install(memwall, fabricated, source):
    commands = fabricated(source)
    assert "serve" in memwall("--help", commands=commands).out
    outcome = memwall("serve", commands=commands)
    outcome.check_bad_input("memwall serve", "torch_that_is_missing", "pip install 'memwall[engine]'")


def test_a_missing_extra_is_said_whatever_the_flags(memwall, fabricated):
    commands = fabricated(MISSING, "fly", " [wings]")
    for arguments in (("--model", "x", "--port", "1"), ("--help",), ("a", "b")):
        memwall("fly", *arguments, commands=commands).check_bad_input("pip install 'memwall[wings]'")
    assert "memwall[wings]" in memwall("--help", commands=commands).out


def test_our_own_missing_module_is_no_missing_extra(memwall, fabricated):
    commands = fabricated("import engine.no_such_room\n")
    memwall("serve", commands=commands).check_bad_input("cannot be loaded", "reinstall")
    late = fabricated("def command():\n    import engine.no_such_room\n")
    assert memwall("serve", commands=late).code == cli.DEFECT


def test_other_rooms_commands_are_not_imported(memwall, fabricated):
    commands = fabricated("raise SystemExit('imported')\n")
    assert memwall("memory", commands=commands).code == 0


def test_a_command_may_return_its_exit_code(memwall, fabricated):
    commands = fabricated("def command() -> int:\n    return 1\n")
    assert memwall("serve", commands=commands).code == 1


# ---- memory --------------------------------------------------------------------------------------------------------


def test_memory_contract(memwall):
    """The command of the issue, and the keys it names."""
    line = "memory --model llama-2-70b --system h200_sxm --tensor-parallel-size 4 --max-model-len 128000"
    outcome = memwall(*line.split(), "--kv-cache-dtype", "fp8", "--output", "json")
    assert outcome.code == 0
    assert outcome.err == ""
    report = json.loads(outcome.out)
    assert MemoryReport.model_validate_json(outcome.out).fits
    assert report["weights_bytes_per_rank"] == pytest.approx(137.95e9 / 4, rel=2e-3)
    assert report["kv_bytes_per_token"] == 80 * 2 * 8 * 128
    assert report["kv_bytes_per_sequence"] == 128000 * report["kv_bytes_per_token"]
    assert report["kv_cache_bytes_available"] > report["kv_bytes_per_sequence"]
    assert report["num_kv_blocks"] > 8000
    assert report["max_concurrency"] > 1
    assert report["max_model_len_that_fits"] == 128000
    assert report["fits"] is True


@pytest.mark.parametrize(
    ("system", "gpus", "dtype", "sequences"),
    [
        ("h200_sxm", 2, "auto", 2.8),
        ("h200_sxm", 2, "fp8", 5.7),
        ("h200_sxm", 4, "auto", 8.96),
        ("h100_sxm", 4, "auto", 3.4),
        ("h100_sxm", 4, "fp8", 6.8),
    ],
)
def test_memory_of_five_users_at_128k(memwall, system, gpus, dtype, sequences):
    """S1 of the users' scenarios: 70B, 5 sequences of 131,072 tokens, 5.6 GiB of activations."""
    line = f"memory --model llama-3.1-70b --system {system} -tp {gpus} --kv-cache-dtype {dtype} --concurrency 5"
    given = "--max-model-len 131072 --activation-gib 5.6 --non-torch-gib 0.55 --cuda-graph-gib 0 --output json"
    outcome = memwall(*line.split(), *given.split())
    report = json.loads(outcome.out)
    assert report["max_concurrency"] == pytest.approx(sequences, rel=0.02)
    assert report["fits"] is (sequences > 5)
    assert outcome.code == (0 if sequences > 5 else 1)


def test_memory_that_does_not_fit_says_why_and_what_helps(memwall):
    line = "memory --model llama-3.1-70b -tp 2 --concurrency 5 --max-model-len 131072"
    outcome = memwall(*line.split())
    assert outcome.code == 1
    assert outcome.err.startswith("does not fit: 5 sequences of 131072 tokens need")
    assert outcome.err.count("\n") == 1
    text = " ".join(outcome.out.split())
    for words in ("DOES NOT FIT", "estimated maximum model length", "--kv-cache-dtype fp8 yes", "What would help"):
        assert words in text


def test_memory_table(memwall):
    outcome = memwall("memory", "--model", "llama-3.1-8b", "-tp", 2, "--max-model-len", 8192)
    assert outcome.code == 0
    text = " ".join(outcome.out.split())
    for words in (
        "llama-3.1-8b on 2 × h200_sxm, bfloat16 KV cache: 1 sequence of 8,192 tokens fits",
        "GPU weights activations CUDA graphs non-torch KV cache total of share KV heads",
        "KV is reserved up front by design",
        "128.0 KiB in all layers; 64.0 KiB on each GPU",
        "max concurrency",
        "longest that fits",
    ):
        assert words in text
    assert max(map(len, outcome.out.splitlines())) <= 110
    assert "\x1b" not in outcome.out


def test_memory_overrides_and_draft_model(memwall):
    def report(*flags):
        return json.loads(memwall("memory", "--max-model-len", 8192, "--output", "json", *flags).out)

    given = ("--total-memory-gib", 100, "--activation-gib", 2, "--non-torch-gib", 1, "--cuda-graph-gib", 0.5)
    fixed = report(*given)
    assert fixed["gpu_memory_bytes"] == 100 << 30
    assert fixed["activation_bytes_per_rank"] == 2 << 30
    assert fixed["non_torch_bytes_per_rank"] == 1 << 30
    assert fixed["cuda_graph_bytes_per_rank"] == 1 << 29
    assert report("--num-gpu-blocks-override", 777)["num_kv_blocks"] == 777
    drafted = report("--speculative-config", '{"model": "llama-3.2-1b", "num_speculative_tokens": 4}')
    assert drafted["weights_bytes_per_rank"] > report()["weights_bytes_per_rank"] + 2e9
    assert drafted["kv_bytes_per_token_per_rank"] == report()["kv_bytes_per_token_per_rank"] + 32 * 1024
    assert report("--quantization", "fp8")["weights_bytes_per_rank"] < 0.6 * report()["weights_bytes_per_rank"]


# ---- catalog -------------------------------------------------------------------------------------------------------


def test_catalog_contract(memwall):
    everything = CatalogRecord.model_validate_json(memwall("catalog", "--output", "json").out)
    assert (len(everything.models), len(everything.gpus)) == (31, 18)
    models = json.loads(memwall("catalog", "models", "--output", "json").out)
    gpus = json.loads(memwall("catalog", "gpus", "--output", "json").out)
    assert [ModelRecord(**model) for model in models] == list(everything.models)
    assert [GpuRecord(**gpu) for gpu in gpus] == list(everything.gpus)
    by_id = {model["id"]: model for model in models}
    assert by_id["llama-2-70b"]["kv_bytes_per_token_bf16"] == 327_680
    assert by_id["deepseek-v3"]["kv_bytes_per_token_bf16"] == 70_272
    assert by_id["gpt-oss-120b"]["num_sliding_window_layers"] == 18
    assert gpus[0]["memory_bandwidth_bytes_per_s"] == 4.8e12
    assert gpus[0]["price_typical"]["date"]


@pytest.mark.parametrize("record", [ModelRecord, GpuRecord, CatalogRecord, MemoryReport, SimulateReport])
def test_every_field_of_a_contract_is_described(record):
    fields = record.model_json_schema()["properties"]
    assert [name for name, field in fields.items() if not field.get("description")] == []


def test_catalog_tables_hold_every_entry(memwall):
    outcome = memwall("catalog")
    assert outcome.code == 0
    first_words = {line.split()[0] for line in outcome.out.splitlines() if line.strip()}
    assert {"llama-2-7b", "phi-3-medium-4k", "h200_sxm", "mi300x", "a30"} <= first_words
    assert max(map(len, outcome.out.splitlines())) <= 120


def test_catalog_entry(memwall, tmp_path):
    model = " ".join(memwall("catalog", "models", "meta-llama/Llama-3.1-8B-Instruct").out.split())
    for words in ("meta-llama/Llama-3.1-8B-Instruct", "8,030,261,248", "config.json", "131,072 tokens"):
        assert words in model
    gpu = " ".join(memwall("catalog", "gpus", "H200-SXM").out.split())
    for words in ("139.80 GiB", "4.8 TB/s", "price, high", "confidence: high"):
        assert words in gpu
    config = tmp_path / "mine" / "config.json"
    config.parent.mkdir()
    shapes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    rest = {"intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 512}
    config.write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **shapes, **rest}))
    own = json.loads(memwall("catalog", "models", config, "--output", "json").out)
    assert (own["id"], own["hf_repo"], own["source"]) == ("mine", None, str(config))
    assert own["kv_bytes_per_token_bf16"] == 2 * 2 * 2 * 16 * 2


# ---- simulate ------------------------------------------------------------------------------------------------------


def test_simulate_contract(memwall):
    outcome = memwall("simulate", *SMALL_LOAD, "--replicas", 2, "--ttft", 1000, "--tpot", 50, "--output", "json")
    assert outcome.code == 0
    assert outcome.err == ""
    report = SimulateReport.model_validate_json(outcome.out)
    deployment = json.loads(outcome.out)["deployment"]
    assert (deployment["model"], deployment["system"], deployment["num_gpus"]) == ("llama-3.1-8b", "h200_sxm", 2)
    assert deployment["max_model_len"] == 1024  # the workload's 544 tokens, rounded up
    assert (deployment["enable_prefix_caching"], deployment["router"]) == (False, "least-outstanding")
    assert (report.slo.ttft_ms, report.slo.e2el_ms, report.slo.percentile) == (1000, None, 99)
    assert report.workload.num_requests == 60
    assert report.result.slo_met
    assert report.result.num_finished == 60
    assert report.result.evidence == "interpolated"
    assert report.step_times.basis == "interpolated"
    assert report.confidence.num_draws == 16
    assert report.no_interval is None


def test_simulate_same_seed_same_bytes(memwall):
    line = ("simulate", *SMALL_LOAD, "--output", "json", "--seed")
    assert memwall(*line, 3) == memwall(*line, 3)
    assert memwall(*line, 3) != memwall(*line, 4)


def test_simulate_table(memwall):
    outcome = memwall("simulate", *SMALL_LOAD, "--ttft", 1000, "--e2el", 60_000, "--percentile", 95)
    assert outcome.code == 0
    assert outcome.out.startswith("step times: interpolated: profile of llama-3.1-8b on NVIDIA H200, bfloat16 KV")
    text = " ".join(outcome.out.split())
    for words in (
        "llama-3.1-8b on 1 replica × 1 × h200_sxm, bfloat16 KV, max_model_len 1,024, prefix caching off",
        "60 requests at",
        "mean p50 p90 p95 p99 max TTFT",
        "queue",
        "prefill",
        "SLO met limit ms p95 ms",
        "goodput",
        "verdict stable",
        "preemptions 0",
        "the workload tells of no shared prompts",
        "▁",
        "90 % intervals, milliseconds, of 16 draws of the load and of the step times",
        "meets the SLO with probability 100 % (16 of 16 draws; 90 % interval 83 to 100 %)",
    ):
        assert words in text
    assert max(map(len, outcome.out.splitlines())) <= 110


def test_simulate_slo_that_is_missed_exits_1(memwall):
    outcome = memwall("simulate", *SMALL_LOAD, "--tpot", 0.01)
    assert outcome.code == 1
    assert "SLO MISSED" in outcome.out


def test_simulate_what_does_not_fit_exits_1(memwall):
    table = memwall("simulate", "--model", "llama-3.1-70b", *SMALL_LOAD)
    assert table.code == 1
    assert "DOES NOT FIT" in table.out
    assert "--tensor-parallel-size 2" in table.out
    assert table.err.startswith("does not fit: the weights of llama-3.1-70b need")
    report = json.loads(memwall("simulate", "--model", "llama-3.1-70b", *SMALL_LOAD, "--output", "json").out)
    assert report["result"] is None
    assert report["memory"]["fits"] is False


def test_simulate_prefix_hit_rate_beside_the_workloads_own(memwall):
    shared = ("--shared-prefix-tokens", 480, "--num-shared-prefixes", 3, "--block-size", 16)
    report = json.loads(memwall("simulate", *SMALL_LOAD, *shared, "--output", "json").out)
    assert report["deployment"]["enable_prefix_caching"] is True  # as vLLM has it, where it can matter
    own = report["workload"]["infinite_cache_hit_rate"]
    assert 0.8 < own < 0.95
    assert report["result"]["prefix_cache_hit_rate"] == pytest.approx(own, abs=0.02)
    assert "of prompt tokens found; an infinite cache would find" in memwall("simulate", *SMALL_LOAD, *shared).out
    off = memwall("simulate", *SMALL_LOAD, *shared, "--no-enable-prefix-caching", "--output", "json")
    assert json.loads(off.out)["result"]["prefix_cache_hit_rate"] == 0


def test_simulate_speculation(memwall):
    config = '{"method": "ngram", "num_speculative_tokens": 2}'
    line = ("simulate", *SMALL_LOAD, "--speculative-config", config, "--acceptance-rates", "0.9,0.8")
    report = json.loads(memwall(*line, "--acceptance-concentration", 20, "--output", "json").out)
    assert report["deployment"]["num_speculative_tokens"] == 2
    assert report["deployment"]["speculative_method"] == "ngram"
    assert report["result"]["mean_acceptance_length"] == pytest.approx(1 + 0.9 + 0.9 * 0.8, rel=0.05)
    assert "tokens per round" in memwall(*line).out


def test_simulate_a_trace(memwall, tmp_path):
    trace = tmp_path / "log.csv"
    trace.write_text("when_ms,n_in,n_out,x\n0,100,10,a\n1500,200,20,b\n500,300,30,c\n9000,5000,3,d\n")
    columns = ("--columns", "arrival=when_ms,input=n_in,output=n_out", "--sort-arrivals")
    line = ("simulate", "--trace", trace, *columns, "--output", "json")
    report = json.loads(memwall(*line).out)
    assert report["workload"]["num_requests"] == 4
    assert report["workload"]["duration_s"] == 9
    assert report["deployment"]["max_model_len"] == 5120
    assert json.loads(memwall(*line, "--end-s", 2, "--rate-scale", 3).out)["workload"]["duration_s"] == 0.5
    short = json.loads(memwall(*line, "--max-model-len", 1000, "--reject-too-long").out)
    assert short["result"]["num_rejected"] == 1


# ---- options -------------------------------------------------------------------------------------------------------


def test_default_workload_is_the_projects_own():
    assert workload_from_options(WorkloadOptions()).arrival_s.tolist() == default_workload(0).arrival_s.tolist()
    spelt_out = workload_from_options(WorkloadOptions(request_rate=8.0, seed=5))
    default = default_workload(5)
    for name in ("arrival_s", "input_tokens", "output_tokens"):
        assert getattr(spelt_out, name).tolist() == getattr(default, name).tolist()


def test_window_counts_in_the_traces_own_seconds():
    whole = default_workload(0)
    options = WorkloadOptions(start_s=100.0, end_s=200.0, rate_scale=2.0, max_requests=10_000)
    part = workload_from_options(options)
    assert len(part) == len(whole.window(100, 200))
    assert part.duration_s <= 50
    assert len(workload_from_options(WorkloadOptions(end_s=100.0, max_requests=7))) == 7


def test_speculation_of_zero_tokens_is_none():
    options = SpeculationOptions(
        speculative_config='{"method": "ngram", "num_speculative_tokens": 0}', acceptance_rates="1"
    )
    assert speculation_from_options(options) is None
    assert speculation_from_options(SpeculationOptions()) is None


def test_simulation_options():
    options = simulation_from_options(RunOptions(warmup_s=5.0, reject_too_long=True), SLOOptions(ttft=9.0), seed=7)
    assert (options.seed, options.warmup_s, options.reject_too_long, options.slo.ttft_ms) == (7, 5.0, True, 9.0)


# ---- output --------------------------------------------------------------------------------------------------------


def test_output_file_holds_the_json_whatever_is_printed(memwall, tmp_path):
    file = tmp_path / "report.json"
    table = memwall("memory", "--output-file", file)
    assert "fits" in table.out
    printed = memwall("memory", "--output", "json").out
    assert file.read_text() == printed
    assert names(tmp_path) == ["report.json"]


def test_output_file_is_not_touched_where_the_input_is_bad(memwall, tmp_path):
    file = tmp_path / "report.json"
    file.write_text("old")
    memwall("memory", "--output-file", file, "--model", "nope").check_bad_input("nope")
    assert file.read_text() == "old"


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "report.json"
    file.write_text("old")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        tables.write_whole(file, "new")
    assert file.read_text() == "old"
    assert names(tmp_path) == ["report.json"]


def test_writing_keeps_mode_and_links_and_leaves_devices_alone(tmp_path):
    file, link = tmp_path / "report.json", tmp_path / "link.json"
    file.write_text("old")
    file.chmod(0o640)
    link.symlink_to(file)
    tables.write_whole(link, "new")
    assert link.is_symlink()
    assert file.read_text() == "new"
    assert file.stat().st_mode & 0o777 == 0o640
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    tables.write_whole(pipe, "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert pipe.is_fifo()


def test_columns_align_and_never_crop():
    wide = "x" * 200
    text = tables.columns(["a", "number"], [[wide, 1], ["b", 12345]])
    lines = text.splitlines()
    assert wide in lines[1]
    assert len({len(line) for line in lines[1:]}) == 1
    assert lines[2].startswith("  b ")
    assert tables.columns(["", ""], [["a", 1]], indent=0) == "a  1"


def test_sparkline():
    assert tables.sparkline([0, 1, 2, 4], 4) == "▁▃▅█"
    assert tables.sparkline([0] * 120, 0) == "▁" * 60
    assert len(tables.sparkline(list(range(121)), 120)) <= 61


@pytest.mark.parametrize(
    ("value", "shown"), [(0.1234, "0.12"), (12.34, "12.3"), (99.96, "100.0"), (1532.4, "1,532"), (math.inf, "inf")]
)
def test_milliseconds(value, shown):
    assert tables.milliseconds(value) == shown
