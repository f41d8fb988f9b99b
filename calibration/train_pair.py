"""`python -m calibration.train_pair --output DIR`: a target and a draft model, trained on installed Python packages."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.command import exit_code
from engine.bench.record import as_committed, commit
from engine.commands.arguments import ArgumentParser, integer, number
from engine.errors import UserError

if TYPE_CHECKING:
    import torch

    from calibration.training.llama import Shape
    from calibration.training.pair import Job, Size

_PROG = "python -m calibration.train_pair"
_MIN_CONTEXT = 128  # more than the bytes of the samples' prompt


def main(arguments: list[str]) -> int:
    """Run the command. Returns its exit code."""
    return exit_code(_PROG, run, arguments)


def run(arguments: list[str]) -> int:
    """Train a pair and print what became of it.

    Raises:
        UserError: bad input.
    """
    options = _parser().read(arguments)
    if options is None:
        return 0
    from calibration.training.pair import train_pair

    record = train_pair(_job(options, arguments))
    print(summary(record))
    return 0


def summary(record: dict) -> str:
    """What a record says, in a few lines."""
    found = record["evaluation"]["held_out"]
    lines = [
        f"{name:6} {record[name]['parameters']:>11,} parameters, {record[name]['tokens']:>11,} tokens in "
        f"{record[name]['seconds']:.0f} s ({record[name]['tokens_per_s']:,} tokens/s), "
        f"held-out loss {found[name]['loss']:.3f}, perplexity {found[name]['perplexity']:.2f}"
        for name in ("target", "draft")
    ]
    lines.append(
        f"top-1 agreement {found['agreement']:.1%} on {found['tokens']:,} held-out tokens; "
        f"chance {max(found['chance'].values()):.1%}; overlap of probabilities {found['overlap']:.1%}"
    )
    lines.append(f"{record['seconds']['total']:.0f} s in all")
    lines += [
        f"---- {'sampled' if sample['do_sample'] else 'greedy'}\n{sample['prompt']}{sample['text']}"
        for sample in record["samples"]
    ]
    return "\n".join(lines)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(_PROG, "Train a target and a draft model on the Python packages that are installed here.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the pair")
    parser.add_argument(
        "--size", default="full", choices=("full", "miniature"), help="full needs a GPU (default: full)"
    )
    parser.add_argument("--device", default="auto", help="cuda, cpu, or auto: cuda where there is one (default)")
    parser.add_argument("--seed", type=integer, default=0, help="of weights and order (default: 0)")
    parser.add_argument("--minutes", type=number, help="to plan the steps for (default: 5.5, miniature 12)")
    parser.add_argument("--overwrite", action="store_true", help="replace the pair that --output holds")
    parser.add_argument("--no-compile", action="store_true", help="do not compile the layers on a GPU")
    parser.add_argument("--commit", help="for the record, where the source is no git checkout")
    parser.add_argument(
        "--corpus-dir",
        type=Path,
        action="append",
        metavar="DIR",
        help="train on the packages in this folder instead; can be given again",
    )
    parser.add_argument("--target-steps", type=integer, help="steps of the target, in place of a plan")
    parser.add_argument("--draft-steps", type=integer, help="steps of the draft, in place of a plan")
    for name, meaning in (
        ("vocab-size", "tokens of the tokenizer"),
        ("context", "tokens of a window"),
        ("batch", "windows of a step"),
        ("target-hidden", "hidden size of the target"),
        ("target-layers", "layers of the target"),
        ("draft-hidden", "hidden size of the draft"),
        ("draft-layers", "layers of the draft"),
    ):
        parser.add_argument(f"--{name}", type=integer, metavar="N", help=f"{meaning}, in place of the size's")
    return parser


def _job(options: argparse.Namespace, arguments: list[str]) -> Job:
    from calibration.training.corpus import Root, installed_roots
    from calibration.training.pair import Job

    _check_positive(options)
    device = _device(options)
    roots = [Root(folder.resolve()) for folder in options.corpus_dir or ()] or installed_roots()
    return Job(
        output=options.output,
        size=_size(options),
        roots=roots,
        seed=options.seed,
        device=device,
        steps=(options.target_steps, options.draft_steps),
        do_compile=device.type == "cuda" and not options.no_compile,
        overwrite=options.overwrite,
        record={
            "command": f"{_PROG} " + shlex.join(map(as_committed, arguments)),
            "commit": options.commit or commit(),
            "size": options.size,
        },
    )


def _check_positive(options: argparse.Namespace) -> None:
    for name, value in vars(options).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "seed" and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    if options.context is not None and options.context < _MIN_CONTEXT:
        raise UserError(f"--context is {options.context}; it must be at least {_MIN_CONTEXT}")
    if options.seed < 0:
        raise UserError(f"--seed is {options.seed}; it must be 0 or above")


def _device(options: argparse.Namespace) -> torch.device:
    import torch

    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device is {name!r}; it must be auto, cuda or cpu") from None
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"--device is {name!r}; it must be auto, cuda or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there is no such GPU; --size miniature --device cpu needs none")
    if device.type == "cpu" and options.size == "full":
        raise UserError("the full size needs a GPU; use --size miniature --device cpu")
    return device


def _size(options: argparse.Namespace) -> Size:
    """The size with what the options replace."""
    from calibration.training.pair import SIZES

    size = SIZES[options.size]
    given = {"vocab_size": options.vocab_size, "context": options.context}
    common = {name: value for name, value in given.items() if value is not None}
    return replace(
        size,
        minutes=options.minutes or size.minutes,
        batch_size=options.batch or size.batch_size,
        target=replace(_resized(size.target, options.target_hidden, options.target_layers), **common),
        draft=replace(_resized(size.draft, options.draft_hidden, options.draft_layers), **common),
    )


def _resized(shape: Shape, hidden_size: int | None, num_layers: int | None) -> Shape:
    if hidden_size is not None:
        if hidden_size % shape.num_heads:
            raise UserError(f"a hidden size of {hidden_size} is no multiple of the model's {shape.num_heads} heads")
        intermediate_size = max(1, round(shape.intermediate_size * hidden_size / shape.hidden_size))
        shape = replace(shape, hidden_size=hidden_size, intermediate_size=intermediate_size)
    return replace(shape, num_layers=num_layers or shape.num_layers)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
