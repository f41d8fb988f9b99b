"""The command line of `memwall validate`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from calibration.validate.external import OutsideServer
from calibration.validate.html import report
from calibration.validate.profiles import Predictor, step_time_for, transferred_for
from calibration.validate.records import ServedRecord, read
from calibration.validate.study import NUM_DRAWS, document, study
from calibration.validate.text import text
from engine.bench.record import as_committed, commit, dumps, ensure_writable, write_text
from engine.commands.arguments import ArgumentParser, integer
from engine.commands.files import ensure_distinct
from engine.errors import UserError
from planner.catalog import config_file
from planner.external.readers import refuse_twice
from planner.profile.library import NO_PROFILE

_PROG = "memwall validate"
_EXIT_CODES = (
    "Exit codes: 0 it was compared; 1 with --strict, it was compared and misses a figure to reach; 2 the input was "
    "bad, and one sentence on stderr says how; 70 a defect of memwall; 130 Ctrl-C."
)
_MOST_RUNS = 10_000


def run(arguments: list[str], predictor_for: Callable[[ServedRecord], Predictor] | None = None) -> int:
    """Validate, print the tables, write what was asked for. Returns the exit code.

    Args:
        predictor_for: step times for a record instead of a profile's.

    Raises:
        UserError: bad input.
    """
    options = _parser().read(arguments)
    if options is None:
        return 0
    if not 1 <= options.runs <= _MOST_RUNS:
        raise UserError(f"--runs is {options.runs}; it must be from 1 to {_MOST_RUNS:,}")
    if options.profile is not None and str(options.profile) == NO_PROFILE:
        raise UserError("--profile none leaves nothing to validate; name a profile, or leave it out for a shipped one")
    if options.transfer and options.profile is None:
        raise UserError("--transfer needs --profile, of whatever the step times are to be transferred from")
    outputs = [(flag, path) for flag, path in (("--json", options.json), ("--html", options.html)) if path is not None]
    inputs = [("record", path) for path in options.records]
    inputs += [("--profile", options.profile), ("--server-log", options.server_log), ("--metrics", options.metrics)]
    inputs += [("--model", config_file(options.model))]
    ensure_distinct(inputs, outputs)
    for _, path in outputs:
        ensure_writable(path)
    names = [path.resolve() for path in options.records]
    for path in names:
        if names.count(path) > 1:
            raise UserError(f"{path.name} is given {names.count(path)} times; give it once")
    outside = _outside(options)
    of_others = [path for path in options.records if outside.can_read(path)]
    refuse_twice(of_others)
    records, predictors = [], {}
    for path in options.records:
        if path in of_others:
            predictors.update(outside.read(path))
        else:
            records.append(_by_folder(read(path), path, options.records))
    ensure_distinct([("the step log", log) for record in records for log in record.step_logs], outputs)
    if options.transfer and predictors:
        raise UserError(f"--transfer is for records of memwall bench serve; {next(iter(predictors)).name} is none")
    if records and (useless := _given_of_outside(options)):
        raise UserError(f"{useless[0]} is of servers that are not ours; {records[0].name} says itself what served it")
    own = transferred_for if options.transfer else step_time_for
    found = study(
        [*records, *predictors],
        predictor_for or (lambda record: predictors.get(record) or own(record, options.profile)),
        num_draws=0 if options.no_intervals else options.runs,
        seed=options.seed,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    command = shlex.join(["memwall", "validate", *map(as_committed, arguments)])
    print(text(found))
    if options.json is not None:
        write_text(options.json, dumps(document(found, command=command, commit=commit())) + "\n")
    if options.html is not None:
        write_text(options.html, report(found, "The simulator against the engine"))
    return 1 if options.strict and not found.is_met else 0


def _by_folder(record: ServedRecord, path: Path, paths: list[Path]) -> ServedRecord:
    """The record, named after its folder too where another one's file is called the same."""
    alike = [each for each in paths if each.name == path.name]
    return record if len(alike) == 1 else replace(record, name=f"{path.resolve().parent.name}/{record.name}")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(_PROG, "Compare the simulator with served workloads that the engine recorded.")
    parser.epilog = _EXIT_CODES
    parser.add_argument(
        "records",
        type=Path,
        nargs="+",
        metavar="RECORD",
        help="of `memwall bench serve`, one per load level (a step log NAME.steps[.RUN].jsonl.gz beside NAME.json is "
        "read too), of `vllm bench serve --save-detailed` or SGLang's bench_serving, or a table of requests, whose "
        "columns are in seconds unless their names end in _ms, _us or _ns",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="PATH",
        help="of `memwall calibrate` or `calibrate-from` [the shipped one for what served]",
    )
    parser.add_argument(
        "--transfer",
        action="store_true",
        help="the profile is of another model, KV format or weight format than what served: see what a transfer costs",
    )
    parser.add_argument(
        "--runs",
        type=integer,
        default=NUM_DRAWS,
        metavar="N",
        help=f"simulations for the intervals of each level [{NUM_DRAWS}]",
    )
    parser.add_argument("--no-intervals", action="store_true", help="no such simulations, and no intervals")
    parser.add_argument("--seed", type=integer, default=0, metavar="N", help="of what is drawn for intervals [0]")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything that was found")
    parser.add_argument("--html", type=Path, metavar="PATH", help="write the parity report, one page for a browser")
    parser.add_argument(
        "--strict", action=argparse.BooleanOptionalAction, default=False, help="exit with 1 if a figure is missed"
    )
    group = parser.add_argument_group("servers that are not ours", "default: what the log says, else vLLM's defaults")
    for name, (kind, metavar, what) in _OUTSIDE.items():
        group.add_argument(_flag(name), type=kind, metavar=metavar, help=what)
    group.add_argument(
        "--async-scheduling",
        action=argparse.BooleanOptionalAction,
        help="whether it schedules a step while the one before runs",
    )
    return parser


# What is said of a server that is not ours: its flags, by the names of OutsideServer or ServerFacts.
_OUTSIDE: dict[str, tuple[Callable[[str], object], str, str]] = {
    "model": (str, "NAME", "the model it served"),
    "system": (str, "GPU", "the GPU it ran on, e.g. h200_sxm"),
    "quantization": (str, "fp8", "of its weights"),
    "server_log": (Path, "LOG", "its output: start-up and statistics lines"),
    "metrics": (Path, "FILE", "the text of its /metrics"),
    "tensor_parallel_size": (integer, "N", "GPUs it ran on"),
    "kv_cache_dtype": (str, "DTYPE", "format of its KV cache"),
    "max_model_len": (integer, "TOKENS", "longest sequence"),
    "max_num_seqs": (integer, "N", "most sequences in one step"),
    "max_num_batched_tokens": (integer, "TOKENS", "token budget of one step"),
    "block_size": (integer, "TOKENS", "tokens per KV block"),
    "num_gpu_blocks": (integer, "N", "KV blocks it had"),
}
_ABOUT = ("model", "system", "quantization", "server_log", "metrics")


def _flag(name: str) -> str:
    spelled = "num_gpu_blocks_override" if name == "num_gpu_blocks" else name
    return "--" + spelled.replace("_", "-")


def _value(options: argparse.Namespace, name: str) -> object:
    return getattr(options, _flag(name)[2:].replace("-", "_"))


def _given_of_outside(options: argparse.Namespace) -> list[str]:
    """Flags about servers that are not ours, those that were given."""
    return [_flag(name) for name in (*_OUTSIDE, "async_scheduling") if _value(options, name) is not None]


def _outside(options: argparse.Namespace) -> OutsideServer:
    names = [name for name in (*_OUTSIDE, "async_scheduling") if name not in _ABOUT]
    flags = {name: value for name in names if (value := _value(options, name)) is not None}
    about = {name: _value(options, name) for name in _ABOUT}
    return OutsideServer(**about, profile=options.profile, flags=flags)
