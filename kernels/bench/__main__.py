"""`python -m kernels.bench`: run every kernel beside its peers and against the limits of this GPU.

Prints a table, and with --output writes a record: every repetition, the medians, the figures to reach and whether they
were met. Needs a CUDA device, except for --plot-from.
"""

import argparse
import os
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from kernels.bench import plots, tables
from kernels.bench.results import BenchError, Record, check_writable, read_record, write_record

SUITES = (
    "limits",
    "prefill",
    "decode",
    "decode-small",
    "low-bit",
    "verify",
    "elementwise",
    "linear",
    "fp8",
    "cache",
    "sampling",
    "memory",
    "accuracy",
)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 after a run, whatever it found; 1 if the GPU stopped it; 2 if it could not begin."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        options = _parse(arguments)
        if options.plot_from:
            record = read_record(options.plot_from)
            _show(tables.render(record))
        else:
            if options.output:
                check_writable(options.output)
            if options.plot:
                plots.check(options.plot)
            record = _measure(options, "python -m kernels.bench " + shlex.join(_as_committed(arguments)))
        if options.plot:
            for path in plots.plot(record, options.plot):
                _show(f"figure written to {path}")
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if record.stopped else 0


def suites(text: str) -> tuple[str, ...]:
    """The suites of a comma-separated list, in the order in which they run."""
    asked = [name.strip() for name in text.split(",")]
    for name in asked:
        if name not in SUITES:
            raise BenchError(f"--suite has {name!r}; it must be some of {', '.join(SUITES)}")
    return tuple(name for name in SUITES if name in asked)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BenchError(f"{message}; see python -m kernels.bench --help")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="python -m kernels.bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--suite", help=f"comma-separated, of {', '.join(SUITES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repetitions: a look, not a record")
    parser.add_argument("--output", type=Path, metavar="PATH", help="write the record here, as JSON")
    parser.add_argument(
        "--plot", type=Path, metavar="DIR", help="write roofline.html and speedup.html here; needs plotly"
    )
    parser.add_argument("--plot-from", type=Path, metavar="RECORD", help="show this record instead of measuring")
    parser.add_argument("--commit", help="what the record calls the code, where it is no git checkout")
    options = parser.parse_args(arguments)
    if options.plot_from and options.output:
        raise BenchError("--plot-from measures nothing, so there is no record for --output")
    for name in ("suite", "quick", "commit"):
        if options.plot_from and getattr(options, name) not in (None, False):
            raise BenchError(f"--plot-from shows a whole record and measures nothing, so --{name} cannot go with it")
    options.suites = SUITES if options.suite is None else suites(options.suite)
    return options


def _measure(options: argparse.Namespace, command: str) -> Record:
    if find_spec("torch") is None or find_spec("triton") is None:
        raise BenchError("torch and triton are not installed: pip install 'memwall[engine]'")
    import torch

    if not torch.cuda.is_available():
        raise BenchError(
            "no CUDA device was found, and kernels are measured on one; --plot-from shows a record without"
        )
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise BenchError("TRITON_INTERPRET=1 is set, and interpreted kernels have no speed to measure")
    from kernels.bench.run import run

    def keep(record: Record) -> None:
        if options.output:
            write_record(options.output, record)

    record = run(options.suites, quick=options.quick, command=command, commit=options.commit, keep=keep)
    _show(tables.render(record))
    if options.output:
        _show(f"record written to {options.output}")
    return record


def _show(text: str) -> None:
    """Print; that a reader such as `head` has seen enough is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _as_committed(arguments: list[str]) -> list[str]:
    """The arguments without the folders of this machine."""
    return [Path(argument).name if "/" in argument else argument for argument in arguments]


if __name__ == "__main__":
    sys.exit(main())
