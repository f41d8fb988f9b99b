"""`memwall plan` on the command line: the answer, its exit codes, and what it says about bad input."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from planner.plan_report import PlanReport, read_plan

ROOT = Path(__file__).resolve().parent.parent.parent
QUICK = ("--draws", "1", "--finalists", "1", "--jobs", "1")
SMALL = ("--num-prompts", "60", "--isl", "512", "--osl", "16", *QUICK)
ONE = ("--tensor-parallel-size", "1", "--max-num-seqs", "64", "--kv-cache-dtype", "auto")
TRACE = "arrival_s,input_tokens,output_tokens\n" + "".join(f"{i / 4},{200 + i},{10 + i % 5}\n" for i in range(40))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def squeezed(text: str) -> str:
    return " ".join(text.split())


# ---- answers -------------------------------------------------------------------------------------------------------


def test_without_arguments_it_plans_the_default(memwall):
    """Only the effort is cut: 8.1 B on H200, 8 requests/s, 1,000 and 50 ms."""
    outcome = memwall("plan", "--num-prompts", "80", *QUICK)
    assert outcome.code == 0
    assert outcome.err == ""
    text = squeezed(outcome.out)
    assert "llama-3.1-8b · synthetic, 8 requests/s: 80 requests" in text
    assert "p99 TTFT ≤ 1000 ms, TPOT ≤ 50 ms" in text
    assert "plan 1: 1 × h200_sxm as 1 replica of TP 1" in text
    assert ", the nearest limit" in text
    assert "meets the SLO with probability" in text
    assert "step times interpolated: profile of llama-3.1-8b on NVIDIA H200, bfloat16 KV" in text
    assert "T measured on something else, and transferred" in text
    assert "uncalibrated" not in text


def test_the_json_is_the_contract(memwall):
    outcome = memwall("plan", *SMALL, *ONE, "--system", "h200_sxm,h100_sxm", "--output", "json")
    assert (outcome.code, outcome.err) == (0, "")
    document = json.loads(outcome.out)
    assert read_plan(outcome.out, "stdout").model_dump(mode="json") == document
    assert set(document) == {
        "schema_version",
        "question",
        "evidence",
        "step_time",
        "effort",
        "plans",
        "rejections",
        "warnings",
    }
    asked = document["question"]
    assert (asked["model"], asked["systems"], asked["total_gpus"]) == ("llama-3.1-8b", ["h200_sxm", "h100_sxm"], 64)
    assert (asked["ttft_ms"], asked["tpot_ms"], asked["e2el_ms"], asked["percentile"]) == (1000.0, 50.0, None, 99.0)
    assert asked["workload"]["num_requests"] == 60
    assert document["evidence"] == "extrapolated"  # the H100's
    bases = {plan["deployment"]["system"]: plan["step_times"]["basis"] for plan in document["plans"]}
    assert bases == {"h200_sxm": "interpolated", "h100_sxm": "transferred"}
    assert [plan["rank"] for plan in document["plans"]] == [1, 2]
    first = document["plans"][0]
    assert first["deployment"]["system"] == "h100_sxm"
    for key in (
        "usd_per_hour",
        "usd_per_million_tokens",
        "output_tokens_per_s_per_gpu",
        "tokens_per_s_per_user",
        "terms",
        "binding_term",
        "loads",
        "pareto",
        "num_kv_blocks",
        "result",
    ):
        assert first[key] is not None
    assert {term["term"] for term in first["terms"]} == {"ttft", "tpot"}


def test_every_field_of_the_report_is_in_its_schema():
    schema = json.dumps(PlanReport.model_json_schema())
    for name in ("usd_per_million_tokens", "share_of_limit", "num_candidates", "at_least_ms", "warmup_s"):
        assert f'"{name}"' in schema


def test_same_seed_same_bytes(memwall):
    line = ("plan", *SMALL, *ONE, "--output", "json", "--seed", "3")
    first = memwall(*line)
    assert first == memwall(*line)
    assert json.loads(first.out)["question"]["seed"] == 3
    assert memwall(*line[:-1], "4").out != first.out


def test_a_trace(memwall, tmp_path):
    trace, answer = tmp_path / "trace.csv", tmp_path / "plan.json"
    trace.write_text(TRACE)
    outcome = memwall("plan", "--trace", trace, *ONE, *QUICK, "--ttft", "500", "--output-file", answer)
    assert outcome.code == 0
    asked = read_plan(answer.read_text(), "plan.json").question
    assert (asked.workload.num_requests, asked.ttft_ms, asked.tpot_ms) == (40, 500.0, None)
    assert asked.max_model_len == 1024
    assert names(tmp_path) == ["plan.json", "trace.csv"]


def test_draft_lengths_default_to_powers_of_two_up_to_k(memwall):
    speculation = ('{"method":"ngram","num_speculative_tokens":6}', "0.9,0.8,0.7,0.6,0.5,0.4")
    flags = ("--speculative-config", speculation[0], "--acceptance-rates", speculation[1])
    report = json.loads(memwall("plan", *SMALL, *ONE, *flags, "--output", "json").out)
    assert report["question"]["draft_lengths"] == [0, 1, 2, 4, 6]
    assert {plan["deployment"]["num_speculative_tokens"] for plan in report["plans"]} == {0, 1, 2, 4, 6}
    given = memwall("plan", *SMALL, *ONE, *flags, "--draft-lengths", "3, 0", "--output", "json")
    assert json.loads(given.out)["question"]["draft_lengths"] == [3, 0]


def test_prices(memwall):
    line = ("plan", *SMALL, *ONE, "--system", "h200_sxm,h100_sxm", "--price", "H200-SXM=0.5", "--output", "json")
    first = json.loads(memwall(*line).out)["plans"][0]
    assert (first["deployment"]["system"], first["usd_per_hour"]) == ("h200_sxm", 0.5)
    assert first["price_source"] == "given by the user"


def test_the_last_price_of_a_gpu_counts(memwall):
    """As of any flag that is given twice; or it is refused."""
    prices = ("--price", "h200_sxm=1", "--price", "h200_sxm=2")
    outcome = memwall("plan", *SMALL, *ONE, *prices, "--output", "json")
    assert outcome.code == 2 or json.loads(outcome.out)["plans"][0]["usd_per_gpu_hour"] == 2.0


def test_no_feasible_plan_exits_1(memwall, tmp_path):
    """A load far beyond one GPU: answered, with no."""
    answer = tmp_path / "plan.json"
    flags = ("--request-rate", "400", "--num-prompts", "2500", "--isl", "3000", "--osl", "4", "--total-gpus", "1")
    outcome = memwall("plan", *flags, *ONE, *QUICK, "--output-file", answer)
    assert outcome.code == 1
    assert "no feasible plan" in outcome.out
    assert "not feasible:" in outcome.out
    assert outcome.err.startswith("no feasible plan: closest is h200_sxm at tensor parallel 1, where ")
    assert outcome.err.count("\n") == 1
    report = read_plan(answer.read_text(), "plan.json")
    assert not report.plans
    (rejection,) = report.rejections
    assert rejection.reason in outcome.err


def test_a_model_that_fits_nowhere_exits_1(memwall):
    outcome = memwall("plan", "--model", "llama-3.1-70b", *SMALL, *ONE)
    assert outcome.code == 1
    assert "memory: " in outcome.out
    assert "GiB" in outcome.err


def test_export_of_a_written_plan(memwall, tmp_path):
    plan, script = tmp_path / "plan.json", tmp_path / "serve.sh"
    flags = ("--model", "llama-3.1-8b", "--system", "h200_sxm", "--output-file", plan)
    assert memwall("plan", *SMALL, *flags).code == 0
    report = read_plan(plan.read_text(), "plan.json")
    for rank in (1, len(report.plans)):
        outcome = memwall("export", plan, "--target", "vllm", "--rank", rank, "--output-file", script)
        assert (outcome.code, outcome.err) == (0, "")
        assert script.read_text() == outcome.out
        assert subprocess.run(["sh", "-n", script], check=False).returncode == 0
        lines = [line for line in outcome.out.splitlines() if not line.startswith("#")]
        words = shlex.split("\n".join(lines))
        used = report.plans[rank - 1].deployment
        assert words[:3] == ["vllm", "serve", "meta-llama/Llama-3.1-8B"]
        for flag, value in (
            ("--tensor-parallel-size", used.tensor_parallel_size),
            ("--max-model-len", used.max_model_len),
            ("--max-num-seqs", used.max_num_seqs),
            ("--kv-cache-dtype", "auto" if used.kv_cache_dtype == "bfloat16" else used.kv_cache_dtype),
        ):
            assert words[words.index(flag) + 1] == str(value)
    memwall("export", plan, "--rank", len(report.plans) + 1).check_bad_input("--rank is", "1 to")
    # A plan of a version that did not draw the CPU's time by itself.
    content = json.loads(plan.read_text())
    for each in content["plans"]:
        del each["step_times"]["host_uncertainty"]
        (each["confidence"] or {}).pop("host_uncertainty", None)
    plan.write_text(json.dumps(content))
    assert memwall("export", plan, "--target", "vllm").code == 0


def test_export_of_a_plan_without_plans(memwall, tmp_path):
    plan = tmp_path / "plan.json"
    assert memwall("plan", "--model", "llama-3.1-70b", *SMALL, *ONE, "--output-file", plan).code == 1
    memwall("export", plan).check_bad_input("plan.json", "nothing to export")


# ---- the table -----------------------------------------------------------------------------------------------------


def test_a_table_in_a_narrow_pipe_is_not_cropped(tmp_path):
    """80 columns, all three limits: every column and every cell is there, and prose is wrapped."""
    trace = tmp_path / "trace.csv"
    trace.write_text(TRACE)
    limits = ("--ttft", "1000", "--tpot", "50", "--e2el", "9999")
    flags = ("--trace", str(trace), *QUICK, *limits, "--system", "h200_sxm,h100_sxm", "--output-file", "plan.json")
    done = subprocess.run(
        [sys.executable, "-c", "from planner.cli import main; main()", "plan", *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "…" not in done.stdout.replace("memwall plan … --output-file", "")
    lines = done.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.lstrip().startswith("#"))
    for title in ("TTFT ms", "TPOT ms", "E2EL ms", "tok/s/GPU", "tok/s/user", "SLO held", "by", "$/1M", "TP×rep"):
        assert title in lines[start]
    plans = read_plan((tmp_path / "plan.json").read_text(), "plan.json").plans
    rows = list(itertools.takewhile(str.strip, lines[start + 1 :]))
    ranks = []
    for line in rows:
        cells = line.split()
        assert len(cells) == 16
        ranks.append(int(cells[0].rstrip("*")))
        plan = plans[ranks[-1] - 1]
        assert cells[0].endswith("*") == plan.pareto
        assert cells[1] == plan.deployment.system
        assert cells[3] == f"{plan.deployment.tensor_parallel_size}×{plan.deployment.replicas}"
        assert str(plan.deployment.max_num_seqs) in cells[5].split(",")
        assert cells[7] == f"{plan.usd_per_hour:,.2f}"
        assert len(line) == len(lines[start])
    assert ranks == sorted(ranks)
    assert ranks[0] == 1
    # Batch limits that change nothing share a row.
    assert any("," in line.split()[5] for line in rows)
    assert f"{len(plans)} feasible plans in all" in squeezed(done.stdout)


def test_help_names_the_flags_of_the_field(memwall):
    text = squeezed(memwall("plan", "--help").out)
    for name in ("--model", "--system", "--total-gpus", "--ttft", "--tpot", "--percentile", "--trace", "--isl"):
        assert name in text


# ---- bad input -----------------------------------------------------------------------------------------------------

BAD_FLAGS = [
    # Names.
    ("--system h20_sxm", "unknown GPU 'h20_sxm'", "did you mean 'h200_sxm'?"),
    ("--system h200_sxm,h10_sxm", "unknown GPU 'h10_sxm'", "h100_sxm"),
    ("--system ,", "--system is ','"),
    ("--system h200_sxm,", "--system is 'h200_sxm,'"),
    ("--model llama-3.1-8", "unknown model", "llama-3.1-8b"),
    ("--model ./no/config.json", "no such file"),
    ("--quantization int3", "int3"),
    ("--kv-cache-dtype auto,fp9", "'fp9'", "fp8"),
    ("--router random", "router is 'random'"),
    ("--kv-cache-policy half", "kv_cache_policy"),
    ("--price-tier cheap", "price tier is 'cheap'"),
    # Parallelism that divides neither heads nor GPUs, or exceeds the budget.
    ("--tensor-parallel-size 3", "tensor_parallel_size is 3", "heads"),
    ("--tensor-parallel-size 16", "a node has 8"),
    ("--tensor-parallel-size 8 --total-gpus 4", "--total-gpus is 4"),
    # Lists of numbers.
    ("--tensor-parallel-size 0", "--tensor-parallel-size has '0'"),
    ("--tensor-parallel-size 1,x", "--tensor-parallel-size has 'x'"),
    ("--tensor-parallel-size 1,,2", "--tensor-parallel-size is '1,,2'"),
    ("--max-num-seqs 64,1.5", "--max-num-seqs has '1.5'"),
    ("--max-num-seqs -4", "--max-num-seqs has '-4'"),
    ("--max-num-seqs 99999999999999999999", "max_num_seqs"),
    ("--draft-lengths 0,2", "acceptance rates"),
    ("--draft-lengths -1", "--draft-lengths has '-1'"),
    # Limits that are none.
    ("--ttft nan", "ttft", "nan"),
    ("--tpot inf", "tpot", "inf"),
    ("--e2el 0", "e2el", "positive"),
    ("--ttft -5", "ttft", "-5"),
    ("--percentile 0", "percentile"),
    ("--percentile nan", "percentile"),
    # Limits that no hardware meets.
    ("--ttft 0.5", "ttft p99 ≤ 0.5 ms is out of reach", "computing the prompt alone", "loosen --ttft"),
    ("--tpot 0.2", "tpot p99 ≤ 0.2 ms is out of reach", "one decode step", "loosen --tpot"),
    ("--e2el 1 --ttft 9999", "e2el p99 ≤ 1 ms is out of reach", "loosen --e2el"),
    # Numbers that are none, or absurd.
    ("--total-gpus 0", "total_gpus", "at least 1"),
    ("--total-gpus many", "--total-gpus is 'many'"),
    ("--finalists -1", "--finalists is '-1'"),
    ("--draws 0", "--draws is '0'"),
    ("--jobs x", "--jobs is 'x'"),
    ("--jobs 0", "--jobs"),
    ("--warmup-s nan", "warm-up"),
    ("--warmup-s 1e9", "leaves no request"),
    ("--gpu-memory-utilization nan", "gpu_memory_utilization is nan"),
    ("--max-model-len 0", "max_model_len is 0"),
    ("--max-model-len -1", "max_model_len is -1"),
    ("--block-size 0", "block_size is 0"),
    ("--max-num-batched-tokens 0", "max_num_batched_tokens is 0"),
    ("--seed -1", "--seed is '-1'"),
    # Prices.
    ("--price h200_sxm", "--price is 'h200_sxm'", "h200_sxm=2.90"),
    ("--price h200_sxm=cheap", "--price is 'h200_sxm=cheap'"),
    ("--price h200_sxm=nan", "--price is 'h200_sxm=nan'"),
    ("--price h200_sxm=inf", "--price is 'h200_sxm=inf'"),
    ("--price h200_sxm=-1", "--price is 'h200_sxm=-1'"),
    ("--price h20_sxm=2", "unknown GPU 'h20_sxm'", "h200_sxm"),
    # Workloads.
    ("--max-model-len 256", "512 tokens", "--reject-too-long"),
    ("--isl 200000", "200000 tokens", "max_model_len 131072"),
    ("--isl 0", "0"),
    ("--request-rate nan", "request rate"),
    ("--rate-scale 0", "rate scale"),
    # Speculation.
    ("--acceptance-rates 0.8", "--speculative-config"),
    ("--speculative-config {{", "not JSON"),
    ('--speculative-config {{"num_speculative_tokens":2}}', "acceptance rates"),
    ('--speculative-config {{"num_speculative_tokens":1}} --acceptance-rates 0.8 --draft-lengths 2', "only 1"),
    # Output.
    ("--output yaml", "--output", "'yaml'", "'json'"),
    ("--ttft", "--ttft", "requires an argument"),
    ("--tftt 5", "no option --tftt", "--ttft"),
]


@pytest.mark.parametrize(("line", "words"), [(line, words) for line, *words in BAD_FLAGS], ids=lambda v: str(v)[:60])
def test_bad_flags(memwall, tmp_path, monkeypatch, line, words):
    monkeypatch.chdir(tmp_path)
    outcome = memwall("plan", *SMALL, "--output-file", tmp_path / "plan.json", *line.format().split())
    outcome.check_bad_input(*words)
    assert names(tmp_path) == []


def test_bad_output_file(memwall, tmp_path):
    memwall("plan", *SMALL, "--output-file", tmp_path / "no" / "plan.json").check_bad_input("there is no folder")
    memwall("plan", *SMALL, "--output-file", tmp_path).check_bad_input("this is a folder")


def test_an_old_answer_survives_bad_input(memwall, tmp_path):
    answer = tmp_path / "plan.json"
    answer.write_text("old")
    memwall("plan", *SMALL, *ONE, "--ttft", "0.5", "--output-file", answer).check_bad_input("out of reach")
    assert answer.read_text() == "old"
    assert names(tmp_path) == ["plan.json"]


def test_an_error_in_another_process_is_one_sentence_too(memwall, tmp_path):
    answer = tmp_path / "plan.json"
    flags = (*SMALL[:-2], "--jobs", "2", "--warmup-s", "1e9", "--output-file", answer)
    memwall("plan", *flags).check_bad_input("leaves no request")
    assert not answer.exists()


def test_a_size_that_does_not_divide_is_not_dropped_in_silence(memwall):
    """1 is fine and 3 is not: refuse, or say that 3 was left out."""
    outcome = memwall("plan", *SMALL, "--tensor-parallel-size", "1,3", "--max-num-seqs", "64")
    assert "tensor_parallel_size is 3" in squeezed(outcome.out + outcome.err)


def test_a_small_token_budget_needs_no_other_flag(memwall):
    """The default batch limits are 64 and 256; a budget of 128 tokens leaves the first of them."""
    outcome = memwall("plan", *SMALL, "--max-num-batched-tokens", "128", "--output", "json")
    assert outcome.code == 0, outcome.err


# ---- what a command reads it does not overwrite --------------------------------------------------------------------

DRAFTED = '{"model": "./config.json", "num_speculative_tokens": 2}'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "plan --trace t.csv --output-file t.csv",
            "--output-file t.csv would overwrite --trace t.csv; give it another",
        ),
        ("plan --trace t.csv --output-file ./t.csv", "would overwrite --trace"),
        ("plan --trace t.csv --output-file soft.csv", "soft.csv would overwrite --trace t.csv"),
        ("plan --trace soft.csv --output-file t.csv", "t.csv would overwrite --trace soft.csv"),
        ("plan --trace t.csv --output-file hard.csv", "hard.csv would overwrite --trace t.csv"),
        ("plan --isl empirical:t.csv --output-file t.csv", "would overwrite --isl t.csv"),
        ("plan --profile none --profile t.csv --output-file t.csv", "would overwrite --profile t.csv"),
        ("plan --model config.json --output-file config.json", "would overwrite --model config.json"),
        ("plan -sc DRAFTED --output-file config.json", "would overwrite --speculative-config config.json"),
        ("simulate --osl empirical:t.csv --output-file t.csv", "would overwrite --osl t.csv"),
        ("simulate --trace w.jsonl --save-workload w.jsonl", "--save-workload w.jsonl would overwrite --trace w.jsonl"),
        ("simulate --save-workload w.jsonl --output-file w.jsonl", "are the same file; give each a name of its own"),
        ("memory --model . --output-file config.json", "would overwrite --model config.json"),
        ("catalog models ./config.json --output-file config.json", "would overwrite the model's config.json"),
        ("export t.csv --output-file t.csv", "would overwrite the plan t.csv"),
    ],
)
def test_inputs_are_not_overwritten(memwall, tmp_path, monkeypatch, line, words):
    monkeypatch.chdir(tmp_path)
    for name in ("t.csv", "w.jsonl", "config.json"):
        Path(name).write_text("precious")
    Path("hard.csv").hardlink_to("t.csv")
    Path("soft.csv").symlink_to("t.csv")
    memwall(*(DRAFTED if word == "DRAFTED" else word for word in line.split())).check_bad_input(words)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"precious"}
    assert len(names(tmp_path)) == 5
