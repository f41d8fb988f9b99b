"""`memwall generate`: what it prints, writes and refuses, with and without Typer."""

import io
import json
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from fake_core import FakeCore

from engine.commands import generate as command
from engine.commands.__main__ import main
from engine.config import EngineConfig
from engine.core import StepRecord
from engine.llm import LLM
from engine.models.builtin import builtin_config
from engine.sampling_params import SamplingParams
from engine.scheduling import StepShape
from planner import cli

ROOT = Path(__file__).resolve().parent.parent.parent
COMMANDS = [EntryPoint("generate", "engine.commands.generate:generate", cli.GROUP)]


@pytest.fixture(params=["memwall", "python -m engine.commands"])
def run(request, capsys):
    """Runs a command line both ways: (exit code, stdout, stderr)."""

    def through(*arguments) -> tuple[int, str, str]:
        line = ["generate", *map(str, arguments)]
        code = cli.run(line, COMMANDS) if request.param == "memwall" else main(line)
        return code, *capsys.readouterr()

    return through


@pytest.fixture
def cores(monkeypatch):
    """The fake cores that were made."""
    made: list[FakeCore] = []

    def make(config: EngineConfig) -> FakeCore:
        made.append(FakeCore(config, num_blocks=1000))
        return made[-1]

    monkeypatch.setattr("engine.llm._core", make)
    return made


def outputs(prompts, **settings):
    """What the library gives for the same prompts."""
    return LLM.from_core(FakeCore(max_model_len=1000, num_blocks=1000)).generate(
        prompts, SamplingParams(**settings), use_tqdm=False
    )


def texts(prompts, **settings) -> list[str]:
    return [output.outputs[0].text for output in outputs(prompts, **settings)]


# ---- one prompt ----------------------------------------------------------------------------------------------------


def test_one_prompt_prints_its_text_and_what_was_measured(run, cores):
    code, out, err = run("tiny", "--load-format", "dummy", "--prompt", "Hello", "--max-tokens", 9, "--ignore-eos")
    assert code == 0
    assert out.removesuffix("\n") == texts("Hello", max_tokens=9, ignore_eos=True)[0].removesuffix("\n")
    assert "6 prompt and 9 output tokens in" in err
    assert "tokens/s" in err
    assert "TTFT 1000.0 ms, TPOT 1000.00 ms" in err
    assert "GB/s" not in err  # on a CPU there is no such limit to compare with
    assert err.count("note: the weights are random, and so is the text; the model has no tokenizer") == 1
    assert "memory: a little" in err


def test_prompt_from_stdin(run, cores, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    code, out, _ = run("tiny", "--max-tokens", 5)
    assert (code, out.removesuffix("\n")) == (0, texts("two\nlines", max_tokens=5)[0].removesuffix("\n"))


def test_options_reach_the_engine_and_the_sampler(run, cores, monkeypatch):
    seen = []
    usual = LLM.stream
    monkeypatch.setattr(
        LLM, "stream", lambda self, prompts, params: seen.append(params) or usual(self, prompts, params)
    )
    engine = "--dtype bfloat16 --kv-cache-dtype int4 --kv-cache-dtype-skip-layers 0,3 --quantization fp8 --seed 3 "
    engine += "--load-format dummy --max-model-len 99 --max-num-seqs 5 --max-num-batched-tokens 50 --enforce-eager "
    engine += "--gpu-memory-utilization 0.5 --block-size 32 --num-gpu-blocks-override 77 --no-enable-prefix-caching "
    engine += "--no-async-scheduling --device cpu "
    sampling = "--temperature 0.5 --top-p 0.9 --top-k 40 --min-p 0.1 --max-tokens 3 --stop-token-ids 9,8 --ignore-eos"
    assert run("tiny", "--prompt=-x", *engine.split(), *sampling.split())[0] == 0
    assert cores[0].config == EngineConfig(
        model="tiny",
        dtype="bfloat16",
        kv_cache_dtype="int4",
        kv_cache_dtype_skip_layers=(0, 3),
        quantization="fp8",
        seed=3,
        load_format="dummy",
        max_model_len=99,
        max_num_seqs=5,
        max_num_batched_tokens=50,
        enforce_eager=True,
        gpu_memory_utilization=0.5,
        block_size=32,
        num_gpu_blocks_override=77,
        enable_prefix_caching=False,
        async_scheduling=False,
        device="cpu",
    )
    assert seen == [SamplingParams(0.5, 0.9, 40, 0.1, 3, None, (9, 8), True)]


def test_without_options_the_defaults_are_the_engines(run, cores):
    assert run("tiny", "--prompt", "a")[0] == 0
    assert cores[0].config == EngineConfig(model="tiny")


def test_control_characters_do_not_reach_a_terminal(run, cores, monkeypatch):
    text = b"a\x1b[2J\x07\r\n\tb"
    monkeypatch.setattr("fake_core.next_token", lambda token_ids: text[len(token_ids) - 2])
    line = ("tiny", "--prompt", "a", "--max-tokens", len(text))
    assert run(*line)[1] == "a\x1b[2J\x07\r\n\tb\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert run(*line)[1] == "a\ufffd[2J\ufffd\ufffd\n\tb\n"


def test_the_built_in_model_runs_without_any_file(run, tmp_path, monkeypatch):
    """The real engine, on whatever this machine has."""
    monkeypatch.chdir(tmp_path)
    line = "tiny --prompt Hello --load-format dummy --max-tokens 8 --temperature 0 --device cpu"
    first, second = (run(*line.split()) for _ in range(2))
    assert (first[0], second[0]) == (0, 0), first[2]
    assert first[1] == second[1] != ""
    assert "output tokens in" in first[2]
    check_refused(run("tiny", "--prompt", "Hello"), "tiny", "--load-format dummy")


# ---- files ---------------------------------------------------------------------------------------------------------


def test_a_file_of_prompts(run, cores, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\r\n\nzwölf 🙂\nthree\n", encoding="utf-8")
    code, out, err = run("tiny", "--prompts-file", file, "--max-tokens", 7)
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in lines] == ["one", "zwölf 🙂", "three"]
    assert [line["text"] for line in lines] == texts(["one", "zwölf 🙂", "three"], max_tokens=7)
    assert [line["index"] for line in lines] == [0, 1, 2]
    assert all(line["finish_reason"] in ("length", "stop") and line["ttft_ms"] > 0 for line in lines)
    assert "3/3" in err
    assert "of 3 prompts" in err
    assert "mean TPOT" in err


def test_a_jsonl_file_to_a_file(run, cores, tmp_path):
    file, answer = tmp_path / "prompts.jsonl", tmp_path / "answer.jsonl"
    prompts = [{"prompt": "one", "id": 7}, {"prompt_token_ids": [1, 2, 3]}]
    file.write_text("\n".join(map(json.dumps, prompts)))
    code, out, _ = run("tiny", "--prompts-file", file, "--output", answer, "--max-tokens", 30)
    assert (code, out) == (0, "")
    lines = [json.loads(line) for line in answer.read_text(encoding="utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == ["one", None]
    assert [line["token_ids"] for line in lines] == [o.outputs[0].token_ids for o in outputs(prompts, max_tokens=30)]


def test_interruption_keeps_what_had_finished(run, cores, tmp_path, monkeypatch):
    file, answer = tmp_path / "prompts.txt", tmp_path / "answer.jsonl"
    file.write_text("a\nb\nc\nd\ne\nf\n")

    def make(config):
        core = FakeCore(config, num_blocks=1000)
        steps = []

        def on_step():
            steps.append(1)
            if len(steps) == 8:
                raise KeyboardInterrupt

        core.on_step = on_step
        cores.append(core)
        return core

    monkeypatch.setattr("engine.llm._core", make)
    flags = ("--max-num-seqs", 2, "--max-tokens", 3, "--ignore-eos")
    code, _, err = run("tiny", "--prompts-file", file, "--output", answer, *flags)
    assert code == 130
    assert err.endswith("interrupted\n")
    assert "Traceback" not in err
    assert [json.loads(line)["prompt"] for line in answer.read_text().splitlines()] == ["a", "b", "c", "d"]
    cores[0].check_idle()


# ---- bad input -----------------------------------------------------------------------------------------------------

BAD_LINES = [
    ("", "needs MODEL", "--help"),
    ("tiny --prompt a --max-tokens 0", "max_tokens is 0", "at least 1"),
    ("tiny --prompt a --max-tokens many", "--max-tokens is 'many'", "whole number"),
    ("tiny --prompt a --temperature nan", "--temperature is 'nan'", "number"),
    ("tiny --prompt a --temperature -1", "temperature is -1"),
    ("tiny --prompt a --top-p 1.5", "top_p is 1.5"),
    ("tiny --prompt a --top-k -2", "top_k is -2"),
    ("tiny --prompt a --min-p 2", "min_p is 2"),
    ("tiny --prompt a --stop-token-ids x", "--stop-token-ids is 'x'", "0,1,31"),
    ("tiny --prompt a --max-num-seqs 0", "max_num_seqs is 0"),
    ("tiny --prompt a --kv-cache-dtype fp9", "kv_cache_dtype is 'fp9'", "int4"),
    ("tiny --prompt a --kv-cache-dtype-skip-layers 1;2", "--kv-cache-dtype-skip-layers"),
    ("tiny --prompt a --max-token 3", "no option --max-token", "did you mean --max-tokens?"),
    ("tiny --prompt a --max_tokens=3", "no option --max_tokens", "did you mean --max-tokens?"),
    ("tiny --prompt a --zzz", "no option --zzz", "--help"),
    ("tiny surplus --prompt a", "'surplus'", "too many"),
    ("tiny --prompt", "--prompt", "expected one argument"),
    ("tiny --prompt a --prompts-file b", "--prompts-file", "not allowed with"),
    ("tiny --prompt=", "--prompt is empty"),
    ("tiny --prompt a --output no/such/file", "--output", "no folder no/such"),
    ("tiny --prompt a --output {folder}", "--output", "is a folder"),
    ("tiny --prompts-file {folder}/none.txt", "none.txt", "cannot be read"),
    ("tiny --prompts-file {folder}", "cannot be read"),
]


@pytest.mark.parametrize(("line", "words"), [(line, words) for line, *words in BAD_LINES], ids=lambda v: str(v)[:50])
def test_bad_lines(run, cores, tmp_path, monkeypatch, line, words):
    monkeypatch.chdir(tmp_path)
    check_refused(run(*line.format(folder=tmp_path).split()), *words)
    assert cores == []  # no model was loaded for it


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", b"", ["no prompt"]),
        ("p.txt", b"\n  \n", ["no prompt"]),
        ("p.txt", b"ok\n\xff\xfe", ["not UTF-8", "byte 3"]),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": ', ["line 2", "not JSON"]),
        ("p.jsonl", b'{"text": "a"}', ["line 1", '"prompt_token_ids"']),
        ("p.jsonl", b'["a"]', ["line 1", "object"]),
    ],
)
def test_bad_files(run, cores, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    check_refused(run("tiny", "--prompts-file", tmp_path / name), name, *words)
    assert cores == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt_token_ids": [1, 999]}', ["prompt 1", "999"]),
        ('{"prompt_token_ids": []}', ["prompt 1", "empty"]),
        ('{"prompt_token_ids": ["a"]}', ["prompt 1", "whole numbers"]),
        ('{"prompt": "\\ud800"}', ["prompt 1", "surrogate"]),
        ('{"prompt": 3}', ["prompt 1", "int"]),
        ('{"prompt": "' + "x" * 64 + '"}', ["prompt 1", "65 tokens", "max_model_len 64"]),
    ],
)
def test_prompts_that_the_model_cannot_take(run, cores, tmp_path, line, words):
    file, answer = tmp_path / "p.jsonl", tmp_path / "answer.jsonl"
    file.write_text('{"prompt": "a"}\n' + line)
    code, out, err = run("tiny", "--prompts-file", file, "--output", answer)
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    for word in ("p.jsonl", *words):
        assert word in last
    assert not answer.exists()


def test_no_prompt_at_all(run, cores, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    check_refused(run("tiny"), "stdin is empty", "--prompts-file")


def check_refused(outcome, *words):
    code, out, err = outcome
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    for word in words:
        assert word in err


# ---- help and what is not installed --------------------------------------------------------------------------------


def test_help(run):
    for flag in ("--help", "-h"):
        code, out, err = run(flag)
        assert (code, err) == (0, "")
        text = " ".join(out.split())
        for word in ("usage: memwall generate", "Continue one prompt, or a file", "--prompts-file", "Exit codes: 0"):
            assert word in text
        for field in fields(EngineConfig):
            assert field.name == "model" or f"--{field.name.replace('_', '-')}" in text


def test_memwall_lists_it(capsys):
    assert cli.run(["--help"], COMMANDS) == 0
    assert "Continue one prompt, or a file of them" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("module", ["planner.cli", "engine.commands"])
def test_without_torch_it_says_what_to_install(module):
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['memwall', 'generate', 'tiny', '--prompt', 'a']; "
        "from importlib.metadata import EntryPoint; from planner import cli; "
        "from engine.commands.__main__ import main; "
        "entry = EntryPoint('generate', 'engine.commands.generate:generate', cli.GROUP); "
        "sys.exit({})"
    )
    calls = {"planner.cli": "cli.run(sys.argv[1:], [entry])", "engine.commands": "main(sys.argv[1:])"}
    command = [sys.executable, "-c", code.format(calls[module])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    for word in ("error: ", "generate needs more than is installed", "torch", "pip install 'memwall[engine]'"):
        assert word in done.stderr


def test_help_and_bad_lines_load_no_library():
    code = (
        "import sys; sys.modules['typer'] = None\nfrom engine.commands.__main__ import main\n"
        "codes = main(['generate', '--help']), main(['generate', 'tiny', '--max-tokens', 'x']), main([])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'planner'} & set(sys.modules)\n"
        "sys.exit(f'{codes} {heavy}' if heavy or codes != (0, 2, 2) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- figures and the built-in model --------------------------------------------------------------------------------


def test_decode_bandwidth_counts_steps_that_only_decode_and_no_overlap_twice():
    def record(start_s, end_s, **shape):
        return StepRecord(0, start_s, end_s, StepShape(**shape), 0, None, 0.0, None)

    core = FakeCore()
    records = [
        record(0.0, 1.0, prefills=[(5, 0)]),
        record(0.5, 3.0, decode_contexts=[10, 20]),  # has the device from 1.0 on: 2 s
        record(2.0, 4.0, decode_contexts=[11]),  # from 3.0 on: 1 s
        record(3.0, 9.0, decode_contexts=[12], prefills=[(7, 0)]),
        record(20.0, 21.0, decode_contexts=[13]),  # 1 s, behind a pause
    ]
    assert command.decode_bytes_per_s(records, core) == pytest.approx((1030 + 1011 + 1013) / 4)
    assert command.decode_bytes_per_s(records[:1], core) is None
    assert command.decode_bytes_per_s([], core) is None


def test_builtin_config(tmp_path, monkeypatch):
    config = builtin_config("tiny")
    assert (config["hidden_size"], config["vocab_size"]) == (256, 259)
    assert builtin_config("small") is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert builtin_config("tiny") is None
