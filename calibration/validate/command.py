"""The command line of `memwall validate`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from calibration.validate.html import report
from calibration.validate.profiles import Predictor, step_time_for
from calibration.validate.records import ServedRecord, read
from calibration.validate.study import NUM_DRAWS, document, study
from calibration.validate.text import text
from engine.bench.record import as_committed, commit, dumps, ensure_distinct, ensure_writable, write_text
from engine.commands.arguments import ArgumentParser, integer
from engine.errors import UserError

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
    outputs = [(flag, path) for flag, path in (("--json", options.json), ("--html", options.html)) if path is not None]
    inputs = [("record", path) for path in options.records]
    if options.profile is not None:
        inputs.append(("--profile", options.profile))
    ensure_distinct(inputs, outputs)
    for _, path in outputs:
        ensure_writable(path)
    names = [path.resolve() for path in options.records]
    for path in names:
        if names.count(path) > 1:
            raise UserError(f"{path.name} is given {names.count(path)} times; give it once")
    records = [read(path) for path in options.records]
    found = study(
        records,
        predictor_for or (lambda record: step_time_for(record, options.profile)),
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


def _parser() -> ArgumentParser:
    parser = ArgumentParser(_PROG, "Compare the simulator with served workloads that the engine recorded.")
    parser.epilog = _EXIT_CODES
    parser.add_argument(
        "records",
        type=Path,
        nargs="+",
        metavar="RECORD",
        help="of `memwall bench serve`, one per load level; a step log NAME.steps[.RUN].jsonl.gz beside NAME.json is "
        "read too",
    )
    parser.add_argument(
        "--profile", type=Path, metavar="PATH", help="of `memwall calibrate` [the shipped one for what served]"
    )
    parser.add_argument(
        "--runs",
        type=integer,
        default=NUM_DRAWS,
        metavar="N",
        help=f"simulations for the intervals of each level [{NUM_DRAWS}]",
    )
    parser.add_argument(
        "--no-intervals", action="store_true", help="no such simulations; intervals then know the engine's spread alone"
    )
    parser.add_argument("--seed", type=integer, default=0, metavar="N", help="of what is drawn for intervals [0]")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything that was found")
    parser.add_argument("--html", type=Path, metavar="PATH", help="write the parity report, one page for a browser")
    parser.add_argument(
        "--strict", action=argparse.BooleanOptionalAction, default=False, help="exit with 1 if a figure is missed"
    )
    return parser
