"""`memwall generate`: text from a model, and how fast it came."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from engine.commands.arguments import ArgumentParser, add_engine_options, engine_config, integer, integers, number
from engine.commands.files import ensure_different, ensure_writable
from engine.commands.streams import discard_stdout, read_stdin, utf8
from engine.errors import UserError
from engine.prompts import Prompt, PromptError, read_prompt
from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    import torch

    from engine.core import EngineCore, StepRecord
    from engine.llm import LLM
    from engine.outputs import RequestOutput

_DEFAULT_MAX_TOKENS = 128
# Read and as many written: far beyond any cache.
_COPY_BYTES = 512 << 20
_COPY_ROUNDS, _COPIES_PER_ROUND = 5, 4


def generate(arguments: list[str]) -> int:
    """Continue one prompt, or a file of them, and say how fast it went.

    One prompt's text is printed as it comes; the results of a file are lines of JSON in the order of its prompts. What
    was measured goes to stderr: tokens/s, TTFT, TPOT and, on a GPU, the bytes of weights and KV cache that decoding
    read per second beside what a plain copy reaches. Try it without a model: memwall generate tiny --load-format dummy
    --prompt Hello
    """
    options = _parser().read(arguments)
    if options is None:
        return 0
    config, params = engine_config(options), _sampling_params(options)
    if options.output is not None:
        _check_output(options)
    prompts, places = _prompts(options)

    from engine.llm import LLM

    llm = LLM.from_config(config)
    for line in (*llm.core.memory.lines(), *_notices(llm)):
        print(line, file=sys.stderr)
    llm.core.step_log = []
    started = time.perf_counter()
    outputs: list[RequestOutput] = []
    run = _run_file if options.prompts_file else _run_one
    try:
        run(llm, prompts, params, options.output, outputs)
    except PromptError as error:
        raise UserError(f"{places[error.index]}: {error.reason}") from None
    except KeyboardInterrupt:
        _tell(outputs, time.perf_counter() - started, llm.core)
        raise
    _tell(outputs, time.perf_counter() - started, llm.core)
    return 0


generate.takes_arguments = True


# ---- the command line ----------------------------------------------------------------------------------------------


def _parser() -> ArgumentParser:
    parser = ArgumentParser("memwall generate", " ".join(inspect.getdoc(generate).split()))
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a Hugging Face folder; with --load-format dummy also a config.json, or a built-in shape such as tiny",
    )
    group = parser.add_argument_group("prompts", "Without either, stdin is the prompt.")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    source.add_argument(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help='one prompt per line; in a .jsonl each line is {"prompt": "..."} or {"prompt_token_ids": [...]}',
    )
    group.add_argument("--output", type=Path, metavar="FILE", help="write the results here, one JSON object per line")
    _add_sampling_options(parser)
    add_engine_options(parser)
    return parser


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling", "--seed is the engine's, below.")

    def add(flag: str, kind, metavar: str, text: str, default: object) -> None:
        group.add_argument(flag, type=kind, metavar=metavar, help=f"{text} (default: {default})", default=default)

    add("--max-tokens", integer, "N", "most tokens to generate", _DEFAULT_MAX_TOKENS)
    add("--temperature", number, "X", "0 takes the most probable token", SamplingParams.temperature)
    add("--top-p", number, "X", "share of the probability to keep", SamplingParams.top_p)
    add("--top-k", integer, "N", "how many of the most probable tokens to keep, 0 for all", SamplingParams.top_k)
    add("--min-p", number, "X", "least probability to keep, as a share of the greatest", SamplingParams.min_p)
    add("--presence-penalty", number, "X", "taken from the logits of tokens that the output has, -2 to 2", 0.0)
    add("--frequency-penalty", number, "X", "taken from them once for every time it has the token, -2 to 2", 0.0)
    add("--repetition-penalty", number, "X", "divides positive logits of tokens of prompt and output, above 0", 1.0)
    add("--min-tokens", integer, "N", "output tokens before which nothing but --max-tokens ends a text", 0)
    group.add_argument(
        "--stop", action="append", metavar="TEXT", default=[], help="text that ends the output; may be given repeatedly"
    )
    group.add_argument(
        "--include-stop-str-in-output", action="store_true", help="end the output behind that text, not before it"
    )
    group.add_argument(
        "--stop-token-ids", type=integers, metavar="N,N,...", default=(), help="more tokens that end a text"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on behind the model's end of text")


def _sampling_params(options: argparse.Namespace) -> SamplingParams:
    options.stop = [_text(stop, "--stop") for stop in options.stop]
    names = [field.name for field in fields(SamplingParams) if field.name != "seed"]
    return SamplingParams(**{name: getattr(options, name) for name in names if hasattr(options, name)})


def _check_output(options: argparse.Namespace) -> None:
    path = options.output
    ensure_different(path, "--output", Path(options.model), "MODEL")
    if options.prompts_file is not None:
        ensure_different(path, "--output", options.prompts_file, "--prompts-file")
    ensure_writable(path, "--output")


def _prompts(options: argparse.Namespace) -> tuple[list[Prompt], list[str]]:
    """The prompts of the command line, a file or stdin, and where each of them stands."""
    found = list(_found_prompts(options))
    for place, prompt in found:
        try:
            read_prompt(prompt)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    return [prompt for _, prompt in found], [place for place, _ in found]


def _found_prompts(options: argparse.Namespace) -> Iterator[tuple[str, Prompt]]:
    if options.prompts_file is not None:
        yield from _read_prompts(options.prompts_file)
    elif options.prompt is not None:
        if not options.prompt:
            raise UserError("--prompt is empty; it needs at least one character")
        yield "--prompt", _text(options.prompt, "--prompt")
    else:
        if sys.stdin is not None and sys.stdin.isatty():
            print("type the prompt, then Ctrl-D", file=sys.stderr)
        text = read_stdin().removesuffix("\n")
        if not text:
            raise UserError("there is no prompt: stdin is empty, and neither --prompt nor --prompts-file is given")
        yield "stdin", text


def _text(argument: str, flag: str) -> str:
    """An argument of which Python could not decode all: it keeps such bytes as halves of surrogate pairs.

    Raises:
        UserError: it is not UTF-8.
    """
    has_bytes = any("\udc80" <= character <= "\udcff" for character in argument)
    return utf8(os.fsencode(argument), flag) if has_bytes else argument


def _read_prompts(path: Path) -> Iterator[tuple[str, Prompt]]:
    """The prompts of a file, each with its place; empty lines are none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"--prompts-file: {path} cannot be read ({error.strerror})") from None
    lines = enumerate(utf8(data, f"--prompts-file: {path}").split("\n"), 1)
    lines = [(f"{path}, line {number}", line.removesuffix("\r")) for number, line in lines if line.strip()]
    if not lines:
        raise UserError(f"--prompts-file: {path} has no prompt")
    for place, line in lines:
        yield place, _json_prompt(line, place) if path.suffix == ".jsonl" else line


def _json_prompt(line: str, place: str) -> dict[str, object]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: this is not JSON ({error})") from None
    except RecursionError:
        raise UserError(f"{place}: this is not JSON that can be read (it is nested too deeply)") from None
    if not isinstance(entry, dict) or not {"prompt", "prompt_token_ids"} & entry.keys():
        raise UserError(f'{place}: a line must be an object with "prompt" or "prompt_token_ids"')
    return entry


# ---- the run -------------------------------------------------------------------------------------------------------


def _notices(llm: LLM) -> Iterator[str]:
    said = ["the weights are random, and so is the text"] if llm.config.load_format == "dummy" else []
    if llm.tokenizer.notice is not None:
        said.append(llm.tokenizer.notice)
    if said:
        yield f"note: {'; '.join(said)}"


def _run_one(
    llm: LLM, prompts: list[Prompt], params: SamplingParams, path: Path | None, outputs: list[RequestOutput]
) -> None:
    """Print the text of one prompt as it comes. After an interruption there is what had come until then."""
    screen = _Screen(is_all=path is None)

    def end(output: RequestOutput) -> None:
        screen.end()
        outputs.append(output)
        if path is not None:
            with path.open("w", encoding="utf-8") as sink:
                _write(output, sink)

    output = None
    try:
        with contextlib.closing(llm.stream(prompts, params)) as stream:
            for output in stream:
                screen.show(output.outputs[0].text)
    except KeyboardInterrupt:
        if output is not None:
            end(output if output.finished else _aborted(output))
        raise
    end(output)


def _aborted(output: RequestOutput) -> RequestOutput:
    """The output of a request that was ended behind it."""
    return replace(output, outputs=[replace(output.outputs[0], finish_reason="abort")], finished=True)


class _Screen:
    """A growing text on stdout."""

    def __init__(self, is_all: bool) -> None:
        """
        Args:
            is_all: nobody but the reader of stdout waits for the text, so that it need not go on without one.
        """
        self._is_all = is_all
        self._is_terminal = sys.stdout.isatty()
        self._shown = ""

    def show(self, text: str) -> None:
        """
        Args:
            text: all of it so far.
        """
        piece = text[len(self._shown) :]
        self._print(_without_controls(piece) if self._is_terminal else piece)
        self._shown = text

    def end(self) -> None:
        """Let what comes next begin on a line of its own."""
        if not self._shown.endswith("\n"):
            self._print("\n")

    def _print(self, piece: str) -> None:
        try:
            print(piece, end="", flush=True)
        except BrokenPipeError:
            if self._is_all:
                raise
            discard_stdout()


def _without_controls(text: str) -> str:
    """What a terminal may be sent: a model, above all a random one, can write escape sequences."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}"
        if unicodedata.category(character) == "Cc" and character not in "\n\t"
        else character
        for character in text
    )


def _run_file(
    llm: LLM, prompts: list[Prompt], params: SamplingParams, path: Path | None, outputs: list[RequestOutput]
) -> None:
    """Write the results of many prompts, each as soon as those before it are written."""
    from engine.llm import progress_bar

    stream = llm.stream(prompts, params, only_finished=True)  # refuses bad prompts before the file is opened
    with (
        contextlib.closing(stream),
        path.open("w", encoding="utf-8") if path else contextlib.nullcontext(sys.stdout) as sink,
        progress_bar(len(prompts)) as update,
    ):
        for output in _in_order(stream, sink):
            outputs.append(output)
            update(output)


def _in_order(stream: Iterable[RequestOutput], sink: TextIO) -> Iterator[RequestOutput]:
    """Pass on what finishes, and write it in the order of the prompts. After an interruption all that had finished."""
    finished: dict[int, RequestOutput] = {}
    written = 0
    try:
        for output in stream:
            finished[int(output.request_id)] = output
            while written in finished:
                _write(finished.pop(written), sink)
                written += 1
            yield output
    finally:
        for _, output in sorted(finished.items()):
            _write(output, sink)


def _write(output: RequestOutput, sink: TextIO) -> None:
    completion, metrics = output.outputs[0], output.metrics
    line = {
        "index": int(output.request_id),
        "prompt": output.prompt,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_cached_tokens": output.num_cached_tokens,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "ttft_ms": _milliseconds(metrics.ttft_s),
        "tpot_ms": _milliseconds(metrics.tpot_s),
    }
    print(json.dumps(line, ensure_ascii=False), file=sink, flush=True)


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)


# ---- figures -------------------------------------------------------------------------------------------------------


def _tell(outputs: Sequence[RequestOutput], seconds: float, core: EngineCore) -> None:
    if outputs:
        for line in _report(outputs, seconds, core):
            print(line, file=sys.stderr)


def _report(outputs: Sequence[RequestOutput], seconds: float, core: EngineCore) -> Iterator[str]:
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_output = sum(len(output.outputs[0].token_ids) for output in outputs)
    of_prompts = f" of {len(outputs)} prompts" if len(outputs) > 1 else ""
    rate = num_output / seconds
    yield f"{num_prompt:,} prompt and {num_output:,} output tokens{of_prompts} in {seconds:.2f} s: {rate:,.1f} tokens/s"
    times = [f"TTFT {outputs[0].metrics.ttft_s * 1e3:.1f} ms"] if len(outputs) == 1 else []
    tpots = [output.metrics.tpot_s for output in outputs if output.metrics.tpot_s is not None]
    if tpots:
        times.append(f"{'mean ' if len(outputs) > 1 else ''}TPOT {sum(tpots) / len(tpots) * 1e3:.2f} ms")
    if times:
        yield ", ".join(times)
    if core.device.type == "cuda":
        achieved = decode_bytes_per_s(core.step_log, core)
        if achieved is not None:
            copy = _copy_bytes_per_s(core.device)
            share = f", {achieved / copy:.0%} of the {copy / 1e9:,.0f} GB/s of a copy" if copy else ""
            yield f"decoding read {achieved / 1e9:,.0f} GB/s of weights and KV cache{share}"


def decode_bytes_per_s(records: Sequence[StepRecord], core: EngineCore) -> float | None:
    """Bytes of weights and KV cache per second over the steps that only decode; None if there were none.

    A step launched while the one before it ran has the device from the end of that one on.
    """
    num_bytes, seconds, free_s = 0, 0.0, 0.0
    for record in records:
        shape = record.shape
        if shape.decode_contexts and not shape.prefills and not shape.verifies:
            num_bytes += core.step_bytes(shape)
            seconds += record.end_s - max(record.start_s, free_s)
        free_s = record.end_s
    return num_bytes / seconds if seconds > 0 else None


def _copy_bytes_per_s(device: torch.device) -> float | None:
    """Bytes that a copy reads and writes per second, the best of a few rounds; None if memory is too short for it."""
    import torch

    try:
        source, target = (torch.zeros(_COPY_BYTES // 8, dtype=torch.int64, device=device) for _ in range(2))
    except torch.OutOfMemoryError:
        return None
    rounds_ms = []
    for _ in range(_COPY_ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(_COPIES_PER_ROUND):
            torch.bitwise_not(source, out=target)  # faster than copy_, which may go through the copy engines
        end.record()
        end.synchronize()
        rounds_ms.append(start.elapsed_time(end))
    return 2 * _COPY_BYTES * _COPIES_PER_ROUND / (min(rounds_ms) * 1e-3)
