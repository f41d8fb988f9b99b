"""`python -m calibration.kv_quality --pair DIR --output FILE`: what each KV precision costs in quality."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.command import exit_code
from engine.bench.record import as_committed, commit, dumps, ensure_writable, write_text
from engine.commands.arguments import ArgumentParser, integer
from engine.errors import UserError

if TYPE_CHECKING:
    from calibration.quality.study import Job

_PROG = "python -m calibration.kv_quality"
# What --quick replaces: enough to see that everything runs, too little to say how good a format is.
_QUICK = {"windows": 8, "context": 256, "trials": 4, "max_num_seqs": 8}
_QUICK_ATTENTION = (2, 512)


def main(arguments: list[str]) -> int:
    """Run the command. Returns its exit code."""
    return exit_code(_PROG, run, arguments)


def run(arguments: list[str]) -> int:
    """Measure, write the record, print its tables.

    Raises:
        UserError: bad input.
    """
    options = _parser().read(arguments)
    if options is None:
        return 0
    _check(options)
    from calibration.quality.study import run_study
    from calibration.quality.table import text_of

    ensure_writable(options.output)
    record = run_study(_job(options, arguments))
    write_text(options.output, dumps(record) + "\n")
    print(text_of(record))
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(_PROG, "Measure what each KV precision costs a trained target on text it has not seen.")
    parser.add_argument("--pair", type=Path, required=True, metavar="DIR", help="folder of calibration.train_pair")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the record, JSON")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"), help="default: auto")
    parser.add_argument("--quick", action="store_true", help="few short windows, to see that it runs")
    parser.add_argument("--variants", default="", metavar="NAME,…", help="those to measure (default: all)")
    parser.add_argument("--windows", type=integer, metavar="N", help="of held-out text, at most (default: 128)")
    parser.add_argument("--context", type=integer, metavar="N", help="tokens of a window (default: the target's limit)")
    parser.add_argument("--prefill", type=integer, default=32, metavar="N", help="of these, as a prompt (default: 32)")
    parser.add_argument("--trials", type=integer, metavar="N", help="planted lines of each distance (default: 48)")
    parser.add_argument("--max-num-seqs", type=integer, metavar="N", help="decoded at a time (default: 128)")
    parser.add_argument("--seed", type=integer, default=0, help="of planted lines and resamples (default: 0)")
    parser.add_argument("--commit", help="for the record, where the source is no git checkout")
    return parser


def _check(options: argparse.Namespace) -> None:
    for name, least in (
        ("windows", 2),
        ("context", 1),
        ("prefill", 1),
        ("trials", 0),
        ("max_num_seqs", 1),
        ("seed", 0),
    ):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")


def _job(options: argparse.Namespace, arguments: list[str]) -> Job:
    from calibration.quality.study import Job
    from calibration.quality.variants import chosen

    sizes = dict(_QUICK) if options.quick else {}
    sizes |= {name: value for name in _QUICK if (value := getattr(options, name)) is not None}
    if options.quick:
        sizes["attention"] = _QUICK_ATTENTION
    return Job(
        pair=options.pair,
        variants=chosen([name.strip() for name in options.variants.split(",")] if options.variants else []),
        device=options.device,
        prefill=options.prefill,
        seed=options.seed,
        record={
            "command": f"{_PROG} " + shlex.join(map(as_committed, arguments)),
            "commit": options.commit or commit(),
        },
        **sizes,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
