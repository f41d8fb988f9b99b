"""The command line of `memwall bench`."""

from __future__ import annotations

import argparse
import importlib
import shlex
from pathlib import Path
from types import ModuleType

from engine.bench.options import add_common_options, at_least, lengths, rate
from engine.bench.record import MAX_BYTES, Record, as_committed, commit, ensure_writable
from engine.bench.serve import step_log_paths
from engine.bench.workload import Lengths, ensure_replayable, save_workload, synthesise
from engine.commands.arguments import EXIT_CODES, ArgumentParser, engine_config
from engine.commands.files import ensure_distinct
from engine.commands.streams import discard_stdout
from engine.config import EngineConfig
from engine.errors import UserError

# By name on the command line, the module behind it.
SUITES = {
    "decode": "engine.bench.decode",
    "prefill": "engine.bench.prefill",
    "offline": "engine.bench.offline",
    "serve": "engine.bench.serve",
    "kv-cache": "engine.bench.kv_cache",
}
# The suite that takes --base-url, and what then stands in for it.
_SERVE, _SERVE_OVER_HTTP = "serve", "engine.bench.http_serve"
_FAILED = 1  # it ran, but some requests failed
_MAKE_WORKLOAD = "make-workload"
_MODEL_FILES = ("*config.json", "*.safetensors*", "tokenizer*")


def run(arguments: list[str]) -> int:
    """Run one suite, print its table, write its record.

    Raises:
        UserError: bad input, or nothing could be measured.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        _print(_overview())
        return 0
    name, *rest = arguments
    if name == _MAKE_WORKLOAD:
        return _make_workload(rest)
    if name not in SUITES:
        raise UserError(f"there is no suite {name!r}; it must be one of {', '.join([*SUITES, _MAKE_WORKLOAD])}")
    suite = importlib.import_module(SUITES[name])
    options = _parser(name, suite).read(rest)
    if options is None:
        return 0
    if getattr(options, "base_url", None) is not None:
        suite = importlib.import_module(_SERVE_OVER_HTTP)
        suite.check(options)
        return _run_suite(name, suite, options, None, arguments)
    _check_engine_options(name, options)
    return _run_suite(name, suite, options, engine_config(options), arguments)


def _run_suite(
    name: str, suite: ModuleType, options: argparse.Namespace, config: EngineConfig | None, arguments: list[str]
) -> int:
    from engine.bench.session import Session

    _check_files(options)
    if options.output is not None:
        ensure_writable(options.output)
    command = "memwall bench " + shlex.join(_command_as_committed(options, arguments))
    record = Record(name, command, options.commit or commit())
    session = Session(record, options.output)
    try:
        suite.run(session, options, config)
    except KeyboardInterrupt:
        if any("absent" not in result for result in record.results):
            _print(suite.table(record.results))
            session.say("interrupted: this is what had been measured until then")
        raise
    if all("absent" in result for result in record.results):
        raise UserError(record.results[0]["absent"])
    _print(suite.table(record.results))
    if options.output is not None:
        session.say(f"record written to {options.output}")
        if (size := options.output.stat().st_size) > MAX_BYTES:
            session.say(
                f"it has {size:,} bytes, more than the {MAX_BYTES:,} that are committed as one file: name it .gz"
            )
    return _FAILED if any(result.get("num_failed") for result in record.results) else 0


def _check_engine_options(name: str, options: argparse.Namespace) -> None:
    """Raise UserError if the engine in this process has no model, or an option is for a server."""
    if options.model is None:
        raise UserError(f"memwall bench {name} needs MODEL, or a server with --base-url")
    for flag, value in (("model", "served_model"), ("api-key", "api_key"), ("vocab-size", "vocab_size")):
        if getattr(options, value, None) is not None:
            raise UserError(f"--{flag} is for a server, and there is none without --base-url")


def _command_as_committed(options: argparse.Namespace, arguments: list[str]) -> list[str]:
    """The arguments without this machine's folders, without a key, and without the name of another machine."""
    hidden = {"--api-key": "KEY"}
    if getattr(options, "base_url", None) is not None:
        hidden["--base-url"] = options.base_url.as_committed
    shown, before = [], ""
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        if equals and flag in hidden:
            shown.append(f"{flag}={hidden[flag]}")
        else:
            shown.append(hidden[before] if before in hidden else as_committed(argument))
        before = argument
    return shown


def _check_files(options: argparse.Namespace) -> None:
    """Raise UserError if a file that is to be written is one that is read, or is to be written twice."""
    inputs: list[tuple[str, Path | None]] = []
    if options.model is not None:
        model = Path(options.model)
        of_model = [path for pattern in _MODEL_FILES for path in model.glob(pattern)] if model.is_dir() else [model]
        inputs += [("the model's", path) for path in of_model if path.is_file()]
    inputs += [(f"--{name}", getattr(options, name, None)) for name in ("workload", "dataset")]
    outputs: list[tuple[str, Path | None]] = [("--output", options.output)]
    if path := getattr(options, "step_log", None):
        outputs += [("--step-log", log) for log in step_log_paths(path, options.repeat)]
    ensure_distinct(inputs, outputs)


def _print(text: str) -> None:
    """Print, and find out now whether it arrived.

    Raises:
        UserError: it did not. A reader that has gone away (`| head`) is the caller's business.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        # What is left in the buffer would fail once more when the process ends.
        discard_stdout()
        raise UserError(f"cannot write to standard output: {error.strerror or error}") from error


def _parser(name: str, suite: ModuleType) -> ArgumentParser:
    parser = ArgumentParser(f"memwall bench {name}", f"{suite.HELP[:1].upper()}{suite.HELP[1:]}.")
    parser.conflict_handler = "resolve"  # a suite's own option stands in for the engine's of the same name
    add_common_options(parser, model_is_optional=name == _SERVE)
    suite.add_arguments(parser.add_argument_group(name))
    return parser


def _overview() -> str:
    about = {name: importlib.import_module(module).HELP for name, module in SUITES.items()}
    about[_MAKE_WORKLOAD] = "write a synthetic workload for `serve`"
    lines = [f"  {name:<14} {text}" for name, text in about.items()]
    head = ["usage: memwall bench SUITE ... (or python -m engine.bench SUITE ...)", ""]
    return "\n".join([*head, *lines, "", "`memwall bench SUITE --help` lists the options.", EXIT_CODES])


def _make_workload(arguments: list[str]) -> int:
    parser = ArgumentParser(f"memwall bench {_MAKE_WORKLOAD}", "A workload of Poisson arrivals and uniform lengths.")
    parser.add_argument("--num-prompts", type=at_least(1), default=300, metavar="N", help="requests [300]")
    parser.add_argument("--request-rate", type=rate, required=True, metavar="R", help="per second; inf: all at once")
    for flag in ("--input-len", "--output-len"):
        parser.add_argument(flag, type=lengths, default=Lengths(100, 1024), metavar="LOW:HIGH", help="[100:1024]")
    parser.add_argument(
        "--seed", type=at_least(0, 2**64 - 1), default=0, metavar="N", help="same seed, same workload [0]"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="PATH", help="JSON lines (.gz: compressed)")
    options = parser.read(arguments)
    if options is None:
        return 0
    workload = synthesise(
        options.num_prompts, options.request_rate, options.input_len, options.output_len, options.seed
    )
    ensure_replayable(workload, "make them fewer with --num-prompts, or raise --request-rate")
    save_workload(workload, options.output)
    realised = workload.request_rate
    rates = f"{options.request_rate:g}/s asked, {realised:g}/s realised" if realised else "all at once"
    _print(f"{len(workload)} requests, {rates}, over {workload.entries[-1].arrival_s:,.1f} s; in {options.output}")
    return 0
