"""`memwall generate`: what it prints, writes and refuses, with and without Typer."""

import io
import json
import os
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


def give_stdin(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))


def interrupting(cores, monkeypatch, at_step: int) -> None:
    """Press Ctrl-C in this step of every core that is made."""

    def make(config):
        core = FakeCore(config, num_blocks=1000)
        steps = []

        def on_step():
            steps.append(1)
            if len(steps) == at_step:
                raise KeyboardInterrupt

        core.on_step = on_step
        cores.append(core)
        return core

    monkeypatch.setattr("engine.llm._core", make)


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
    expected = texts("zwölf\nlines", max_tokens=5)[0].removesuffix("\n")
    for data in (b"zw\xc3\xb6lf\nlines\n", b"\xef\xbb\xbfzw\xc3\xb6lf\r\nlines"):  # whatever the locale is
        give_stdin(monkeypatch, data)
        code, out, _ = run("tiny", "--max-tokens", 5)
        assert (code, out.removesuffix("\n")) == (0, expected)


def test_the_output_of_one_prompt_goes_to_a_file_too(run, cores, tmp_path):
    answer = tmp_path / "new" / "folder" / "one.jsonl"
    code, out, _ = run("tiny", "--prompt", "Hello", "--max-tokens", 9, "--ignore-eos", "--output", answer)
    line = json.loads(answer.read_text(encoding="utf-8"))
    assert code == 0
    assert out.removesuffix("\n") == line["text"].removesuffix("\n")
    assert (len(line["token_ids"]), line["finish_reason"]) == (9, "length")


def test_interruption_keeps_the_text_so_far(run, cores, tmp_path, monkeypatch):
    answer = tmp_path / "one.jsonl"
    interrupting(cores, monkeypatch, at_step=6)
    line = ("tiny", "--prompt", "Hello", "--max-tokens", 30, "--ignore-eos", "--output", answer)
    code, out, err = run(*line)
    assert code == 130
    text = texts("Hello", max_tokens=5, ignore_eos=True)[0]
    assert out == text + "\n" * (not text.endswith("\n"))
    assert "6 prompt and 5 output tokens in" in err
    assert err.endswith("\ninterrupted\n")
    kept = json.loads(answer.read_text(encoding="utf-8"))
    assert (kept["text"], len(kept["token_ids"]), kept["finish_reason"]) == (text, 5, "abort")
    cores[0].check_idle()


def test_interruption_before_the_first_token(run, cores, tmp_path, monkeypatch):
    interrupting(cores, monkeypatch, at_step=1)
    code, out, err = run("tiny", "--prompt", "Hello", "--output", tmp_path / "one.jsonl")
    assert (code, out) == (130, "")
    assert err.endswith("\ninterrupted\n")
    assert list(tmp_path.iterdir()) == []


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


def test_penalties_and_stop_strings_reach_the_sampler(run, cores, monkeypatch):
    seen = []
    usual = LLM.stream
    monkeypatch.setattr(
        LLM, "stream", lambda self, prompts, params: seen.append(params) or usual(self, prompts, params)
    )
    sampling = (
        "--presence-penalty 0.5 --frequency-penalty -1 --repetition-penalty 1.1 --min-tokens 2 --stop a --stop=-b"
    )
    assert run("tiny", "--prompt=x", *sampling.split(), "--include-stop-str-in-output")[0] == 0
    (params,) = seen
    assert params == SamplingParams(
        max_tokens=128,
        presence_penalty=0.5,
        frequency_penalty=-1.0,
        repetition_penalty=1.1,
        min_tokens=2,
        stop=("a", "-b"),
        include_stop_str_in_output=True,
    )


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

    interrupting(cores, monkeypatch, at_step=8)
    flags = ("--max-num-seqs", 2, "--max-tokens", 3, "--ignore-eos")
    code, _, err = run("tiny", "--prompts-file", file, "--output", answer, *flags)
    assert code == 130
    assert err.endswith("\ninterrupted\n")
    assert "Traceback" not in err
    assert "12 output tokens of 4 prompts" in err
    assert [json.loads(line)["prompt"] for line in answer.read_text().splitlines()] == ["a", "b", "c", "d"]
    cores[0].check_idle()


# ---- bad input -----------------------------------------------------------------------------------------------------

BAD_LINES = [
    ("", "needs MODEL", "--help"),
    ("tiny --prompt a --max-tokens 0", "max_tokens is 0", "at least 1"),
    ("tiny --prompt a --max-tokens many", "--max-tokens is 'many'", "whole number"),
    ("tiny --prompt a --temperature nan", "--temperature is 'nan'", "number"),
    ("tiny --prompt a --temperature -1", "temperature is -1.0; it must be at least 0"),
    ("tiny --prompt a --top-p 1.5", "top_p is 1.5"),
    ("tiny --prompt a --top-k -2", "top_k is -2"),
    ("tiny --prompt a --min-p 2", "min_p is 2"),
    ("tiny --prompt a --presence-penalty 3", "presence_penalty is 3.0; it must be from -2 to 2"),
    ("tiny --prompt a --min-tokens 200", "min_tokens is 200; it must be at most max_tokens, 128"),
    ("tiny --prompt a --stop=", "stop has an empty string"),
    ("tiny --prompt a --stop-token-ids x", "--stop-token-ids is 'x'", "0,1,31"),
    ("tiny --prompt a --max-num-seqs 0", "max_num_seqs is 0"),
    ("tiny --prompt a --kv-cache-dtype fp9", "kv_cache_dtype is 'fp9'", "int4"),
    ("tiny --prompt a --kv-cache-dtype-skip-layers 1;2", "--kv-cache-dtype-skip-layers"),
    ("tiny --prompt a --max-token 3", "no option --max-token", "did you mean --max-tokens?"),
    ("tiny --prompt a --max_tokens=3", "no option --max_tokens", "did you mean --max-tokens?"),
    ("tiny --prompt a --zzz", "no option --zzz", "--help"),
    ("tiny surplus --prompt a", "'surplus'", "too many"),
    ("tiny --prompt", "--prompt", "expected one argument"),
    ("tiny --prompt a --prompts-file b", "--prompt and --prompts-file exclude each other"),
    ("tiny --prompt a --enable-prefix-caching=3", "--enable-prefix-caching takes no value"),
    ("tiny --prompt a --no-enable-prefix-caching=3", "--no-enable-prefix-caching takes no value"),
    ("tiny --prompt a --ignore-eos=3", "--ignore-eos takes no value"),
    ("tiny --prompt a --seed 100000000000000000000000", "seed is 1", "at most 9223372036854775807"),
    ("tiny --prompt a --max-num-seqs 1048575 --max-num-batched-tokens 2000000", "at most 1048574"),
    ("tiny --prompt a --max-num-batched-tokens 100000000000000000000", "at most 16777216"),
    ("tiny --prompt a --num-gpu-blocks-override 100000000000000000000", "at most 2147483647"),
    ("tiny --prompt=half\udcff", "--prompt is not UTF-8 (byte 4)"),
    ("tiny --prompt a --stop=\udcff", "--stop is not UTF-8 (byte 0)"),
    ("tiny --prompt=", "--prompt is empty"),
    ("tiny --prompt a --output {folder}/config.json/no/x.json", "--output", "config.json is a file, not a folder"),
    ("{folder}/config.json --prompt a --output ./config.json", "--output", "is the file of MODEL", "overwritten"),
    ("tiny --prompts-file config.json --output {folder}/config.json", "is the file of --prompts-file"),
    ("tiny --prompts-file config.json --output hard", "hard is the file of --prompts-file"),
    ("tiny --prompts-file soft --output config.json", "is the file of --prompts-file"),
    ("tiny --prompt a --output {folder}", "--output", "is a folder"),
    ("tiny --prompts-file {folder}/none.txt", "none.txt", "cannot be read"),
    ("tiny --prompts-file {folder}", "cannot be read"),
]


@pytest.mark.parametrize(("line", "words"), [(line, words) for line, *words in BAD_LINES], ids=lambda v: str(v)[:50])
def test_bad_lines(run, cores, tmp_path, monkeypatch, line, words):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "config.json"
    file.write_text("{}")
    (tmp_path / "hard").hardlink_to(file)
    (tmp_path / "soft").symlink_to(file)
    check_refused(run(*line.format(folder=tmp_path).split()), *words)
    assert cores == []  # no model was loaded for it
    assert file.read_text() == "{}"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_model_without_a_name(run, cores):
    check_refused(run("", "--prompt", "a"), "model is ''", "a folder or the name of a built-in model")


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(run, cores, tmp_path, monkeypatch):
    answer = tmp_path / "answer.jsonl"
    answer.write_text("old")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # what a user without the right to is told; root has it
    check_refused(run("tiny", "--prompt", "a", "--output", answer), "--output", "cannot be written")
    assert (cores, answer.read_text()) == ([], "old")


def test_a_link_and_a_device_can_be_written(run, cores, tmp_path):
    link = tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "new" / "target.jsonl")
    assert run("tiny", "--prompt", "a", "--output", link)[0] == 0
    assert json.loads((tmp_path / "new" / "target.jsonl").read_text(encoding="utf-8"))["prompt"] == "a"
    assert run("tiny", "--prompt", "a", "--output", "/dev/null")[0] == 0


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", b"", ["no prompt"]),
        ("p.txt", b"\n  \n", ["no prompt"]),
        ("p.txt", b"ok\n\xff\xfe", ["not UTF-8", "byte 3"]),
        ("p.txt", b"\xef\xbb\xbfok\xff", ["not UTF-8", "byte 5"]),
        ("p.txt", b"\xef\xbb\xbf\n", ["no prompt"]),
        ("p.jsonl", b"\n" + b"[" * 100_000, ["line 2", "nested too deeply"]),
        ("p.jsonl", b'\n\n{"prompt_token_ids": []}', ["p.jsonl, line 3: ", "empty"]),
        ("p.jsonl", b'{"prompt_token_ids": ["a"]}', ["p.jsonl, line 1: ", "whole numbers"]),
        ("p.jsonl", b'{"prompt_token_ids": [true, false]}', ["p.jsonl, line 1: ", "whole numbers", "True"]),
        ("p.jsonl", b'{"prompt_token_ids": "abc"}', ["p.jsonl, line 1: ", "is text"]),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "\\ud800"}', ["p.jsonl, line 2: ", "surrogate"]),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": ""}', ["p.jsonl, line 2: ", "empty"]),
        ("p.jsonl", b'{"prompt": 3}', ["p.jsonl, line 1: ", "int"]),
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
        ('{"prompt_token_ids": [1, 999]}', ["999"]),
        ('{"prompt": "' + "x" * 64 + '"}', ["65 tokens", "max_model_len 64"]),
    ],
)
def test_prompts_that_the_model_cannot_take(run, cores, tmp_path, line, words):
    file, answer = tmp_path / "p.jsonl", tmp_path / "answer.jsonl"
    file.write_text('\n{"prompt": "a"}\n\n' + line)
    code, out, err = run("tiny", "--prompts-file", file, "--output", answer)
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    for word in ("p.jsonl, line 4: the prompt has ", *words):
        assert word in last
    assert not answer.exists()


def test_a_prompt_that_is_too_long_names_where_it_came_from(run, cores, monkeypatch):
    give_stdin(monkeypatch, b"x" * 64)
    for line, source in ((("--prompt", "x" * 64), "--prompt"), ((), "stdin")):
        code, _, err = run("tiny", *line)
        assert code == 2
        assert err.splitlines()[-1].startswith(f"error: {source}: the prompt has 65 tokens; at most 63 leave room")


def test_a_byte_order_mark_is_skipped(run, cores, tmp_path):
    for name, content in (("p.txt", "one\n"), ("p.jsonl", '{"prompt": "one"}')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        code, out, _ = run("tiny", "--prompts-file", tmp_path / name)
        assert (code, json.loads(out)["prompt"]) == (0, "one")


def test_no_prompt_at_all(run, cores, monkeypatch):
    give_stdin(monkeypatch, b"\n")
    check_refused(run("tiny"), "stdin is empty", "--prompts-file")
    monkeypatch.setattr("sys.stdin", None)  # closed: <&-
    check_refused(run("tiny"), "stdin is empty")


def test_stdin_that_is_not_utf8(run, cores, monkeypatch):
    give_stdin(monkeypatch, b"hi\xff")
    check_refused(run("tiny"), "stdin is not UTF-8 (byte 2)")
    assert cores == []


def check_refused(outcome, *words):
    code, out, err = outcome
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    for word in words:
        assert word in err


# ---- streams that are closed ----------------------------------------------------------------------------------------

# The fake core without the module of the real one, which would bring torch.
AROUND_THE_FAKE_CORE = """
import sys
from collections import namedtuple
from importlib.metadata import EntryPoint
from types import SimpleNamespace

update = namedtuple("SequenceUpdate", "sequence new_token_ids finish_reason")
sys.modules["engine.core"] = SimpleNamespace(SequenceUpdate=update, StepRecord=lambda *_: None)
import engine.llm
from engine.commands.__main__ import main
from fake_core import FakeCore
from planner import cli

engine.llm._core = lambda config: FakeCore(config, num_blocks=1000)
entry = EntryPoint(sys.argv[1], f"engine.commands.{sys.argv[1]}:{sys.argv[1]}", cli.GROUP)
cli.metadata = SimpleNamespace(entry_points=lambda group: [entry])
"""


@pytest.fixture(params=["cli.main()", "main(sys.argv[1:])"], ids=["memwall", "python -m engine.commands"])
def process(request):
    """Starts a command line both ways through a shell line, in which it is called "$@"."""

    def start(shell: str, *line: str) -> subprocess.CompletedProcess:
        code = f"{AROUND_THE_FAKE_CORE}\nsys.exit({request.param})"
        command = ["bash", "-c", f"{shell}; exit ${{PIPESTATUS[0]}}", "bash", sys.executable, "-c", code, *line]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'engine'}"}
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", errors="replace"
        )

    return start


GENERATE = ("generate", "tiny", "--max-model-len", "3000", "--ignore-eos", "--max-tokens", "900", "--prompt", "hi")


@pytest.mark.parametrize(
    ("shell", "line"),
    [
        ('"$@" | true', GENERATE),
        ('"$@" | true', ("bench",)),
        ('"$@" | true', ("generate", "--help")),
        ('"$@" >&-', GENERATE),
        ('"$@" >&-', ("bench",)),
        ('"$@" 2>&-', ("bench",)),
    ],
)
def test_a_reader_that_leaves_or_never_was_is_no_error(process, shell, line):
    done = process(shell, *line)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_file_is_written_even_if_nobody_reads_stdout(process, tmp_path):
    answer = tmp_path / "answer.jsonl"
    assert process('"$@" | true', *GENERATE, "--output", str(answer)).returncode == 0
    assert len(json.loads(answer.read_text(encoding="utf-8"))["token_ids"]) == 900


def test_a_defect_is_not_taken_for_an_answer(run, monkeypatch):
    monkeypatch.setattr("engine.llm._core", lambda config: 1 / 0)
    code, out, err = run("tiny", "--prompt", "a")
    assert (code, out) == (70, "")
    assert "ZeroDivisionError" in err
    assert err.splitlines()[-1].startswith("error: this is a defect of memwall")


# ---- help and what is not installed --------------------------------------------------------------------------------


def test_help(run):
    for flag in ("--help", "-h"):
        code, out, err = run(flag)
        assert (code, err) == (0, "")
        text = " ".join(out.split())
        for word in (
            "usage: memwall generate",
            "Continue one prompt, or a file",
            "--prompts-file",
            "Exit codes: 0",
            "70 a",
            "130",
        ):
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
