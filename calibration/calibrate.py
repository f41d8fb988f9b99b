"""`memwall calibrate`, and `python -m calibration.calibrate` where the planner's libraries are not installed."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.command import exit_code
from engine.bench.options import comma_separated
from engine.bench.record import as_committed, commit, ensure_writable, write_text
from engine.commands.arguments import ArgumentParser, add_engine_options, engine_config, number
from engine.commands.files import ensure_distinct
from engine.errors import UserError

if TYPE_CHECKING:
    from calibration.measure.study import Job

_PROG = "memwall calibrate"
_MODULE = "python -m calibration.calibrate"
_DEFAULT_MINUTES = 10.0
_MODEL_FILES = ("*config.json", "*.safetensors*", "tokenizer*")
_DESCRIPTION = (
    "Measure whole engine steps on this device for a profile, from which `memwall plan` and `memwall simulate` foresee "
    "any step: decodes over (batch, context), prompts over (new tokens, context), mixed steps, the CPU's time, KV "
    "blocks, what a clock changes, and the rates of the device. Weights are loaded once for all KV formats. What "
    "is measured is kept beside the profile, in a file that ends in .part; a run that was ended goes on from there."
)


def main(arguments: list[str]) -> int:
    """Run the command. Returns its exit code."""
    return exit_code(_MODULE, lambda given: run(given, _MODULE), arguments)


def run(arguments: list[str], prog: str = _PROG) -> int:
    """Measure, write the profile, print a few of its lines.

    Raises:
        UserError: bad input.
    """
    options = _parser(prog).read(arguments)
    if options is None:
        return 0
    job = _job(options, f"{prog} " + shlex.join(map(as_committed, arguments)))
    _check_files(options)
    from calibration.measure.study import calibrate
    from calibration.measure.table import dumps, text_of

    profile, part = calibrate(job)
    weight_bytes = next(iter(part.engines.values()))["weight_bytes"]
    write_text(job.save, dumps(profile))
    part.remove()
    print(text_of(profile, weight_bytes), flush=True)
    print(f"profile written to {job.save}", file=sys.stderr)
    return 0


def _parser(prog: str) -> ArgumentParser:
    parser = ArgumentParser(prog, _DESCRIPTION)
    parser.conflict_handler = "resolve"  # several KV formats stand in for the engine's one
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="a Hugging Face folder; with --load-format dummy also a config.json, or the name of a built-in shape",
    )
    parser.add_argument("--save", type=Path, required=True, metavar="FILE", help="the profile, JSON (.gz: compressed)")
    parser.add_argument(
        "--minutes",
        type=number,
        default=_DEFAULT_MINUTES,
        metavar="X",
        help=f"for all of it; points that a profile can do without are left out to keep it [{_DEFAULT_MINUTES:g}]",
    )
    parser.add_argument("--quick", action="store_true", help="few points, to see that it works")
    parser.add_argument("--overwrite", action="store_true", help="replace the profile, and begin anew")
    parser.add_argument("--commit", metavar="NAME", help="of the source, where it is no git checkout")
    add_engine_options(parser)
    parser.add_argument_group("formats").add_argument(
        "--kv-cache-dtype",
        type=comma_separated(str),
        dest="kv_cache_dtypes",
        default=("auto",),
        metavar="NAME,...",
        help="formats of the KV cache, an engine for each [auto]",
    )
    return parser


def _job(options: argparse.Namespace, command: str) -> Job:
    """
    Raises:
        UserError: an option out of its range.
    """
    if options.minutes <= 0:
        raise UserError(f"--minutes is {options.minutes:g}; it must be above 0")
    config = engine_config(options)
    if config.kv_cache_dtype_skip_layers:
        raise UserError("--kv-cache-dtype-skip-layers has no place in a profile, which is of one format in all layers")
    for name in options.kv_cache_dtypes:
        replace(config, kv_cache_dtype=name)  # raises if there is no such format
    from calibration.measure.study import Job

    return Job(
        config=config,
        kv_cache_dtypes=options.kv_cache_dtypes,
        save=options.save,
        minutes=options.minutes,
        quick=options.quick,
        overwrite=options.overwrite,
        record={"command": command, "commit": options.commit or commit()},
    )


def _check_files(options: argparse.Namespace) -> None:
    """
    Raises:
        UserError: the profile cannot be written, is there, or would replace the model.
    """
    model = Path(options.model)
    files = [path for pattern in _MODEL_FILES for path in model.glob(pattern)] if model.is_dir() else [model]
    ensure_distinct([("the model's", path) for path in files if path.is_file()], [("--save", options.save)])
    ensure_writable(options.save)
    if options.save.exists() and not options.overwrite:
        raise UserError(f"{options.save} is there already; give another name, or add --overwrite to replace it")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
