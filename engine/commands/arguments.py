"""Command lines with the standard library: the GPU machine has no Typer.

The options of an engine are the fields of `EngineConfig`, spelled as `vllm serve` spells them.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Callable
from dataclasses import fields
from typing import NoReturn

from engine.config import BLOCK_SIZES, DTYPES, KV_CACHE_DTYPES, LOAD_FORMATS, QUANTIZATIONS, EngineConfig
from engine.errors import UserError

EXIT_CODES = (
    "Exit codes: 0 it ran; 1 it ran, but requests of a benchmark over HTTP failed; 2 the input was bad, and one "
    "sentence on stderr says how; 70 a defect of memwall; 130 Ctrl-C."
)


class ArgumentParser(argparse.ArgumentParser):
    """A parser that raises instead of exiting."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, epilog=EXIT_CODES, allow_abbrev=False)
        self._given: list[str] = []

    def read(self, arguments: list[str]) -> argparse.Namespace | None:
        """The options, or None where the help was asked for and has been printed.

        Raises:
            UserError: an unknown option, a missing argument or a value of the wrong kind.
        """
        self._given = arguments
        try:
            options, surplus = self.parse_known_args(arguments)
        except SystemExit:
            return None
        if surplus:
            self._reject(surplus[0])
        return options

    def error(self, message: str) -> NoReturn:
        """What argparse found, in our words."""
        found = re.match(r"argument (\S+): (.*)", message, re.DOTALL)
        if found:
            self._reject_value(found[1].split("/"), found[2])
        missing = message.removeprefix("the following arguments are required: ")
        if missing != message:
            raise UserError(f"{self.prog} needs {missing}; see `{self.prog} --help`")
        raise UserError(f"{message}; see `{self.prog} --help`")

    def _reject_value(self, flags: list[str], problem: str) -> NoReturn:
        """
        Args:
            flags: all names of one option.
        """
        written = (flag for flag in flags for argument in self._given if argument.partition("=")[0] == flag)
        flag = next(written, flags[-1])
        if problem.startswith("is "):
            raise UserError(f"{flag} {problem}")
        other = problem.removeprefix("not allowed with argument ")
        if other != problem:
            raise UserError(f"{other} and {flag} exclude each other; give one of them")
        if problem.startswith("ignored explicit argument "):
            raise UserError(f"{flag} takes no value; write it alone, without '='")
        raise UserError(f"{flag}: {problem}")

    def _reject(self, argument: str) -> NoReturn:
        if not argument.startswith("-"):
            raise UserError(f"{self.prog}: {argument!r} is one argument too many; see `{self.prog} --help`")
        flag = argument.partition("=")[0]
        nearest = difflib.get_close_matches(flag.replace("_", "-"), list(self._option_string_actions), n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"`{self.prog} --help` lists them"
        raise UserError(f"{self.prog} has no option {flag}; {hint}")


def integer(text: str) -> int:
    """A whole number, for `type=` of an option."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r}; it must be a whole number") from None


def number(text: str) -> float:
    """A finite number, for `type=` of an option."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"is {text!r}; it must be a number")
    return value


def integers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them, for `type=` of an option."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r}; it must be whole numbers such as 0,1,31") from None


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Every field of `EngineConfig` but the model as an option. What is not given is not in the namespace."""
    group = parser.add_argument_group("engine", "Spelled as by vllm serve.")
    for field in fields(EngineConfig):
        if field.name == "model":
            continue
        flag = f"--{field.name.replace('_', '-')}"
        kind, metavar, text = _OPTIONS[field.name]
        if field.default not in (None, ()):
            text += f" (default: {_shown(field.default)})"
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            group.add_argument(flag, type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text)


def engine_config(options: argparse.Namespace) -> EngineConfig:
    """The configuration that was asked for; the model is `options.model`.

    Raises:
        UserError: a value out of its range.
    """
    names = [field.name for field in fields(EngineConfig)]
    return EngineConfig(**{name: getattr(options, name) for name in names if hasattr(options, name)})


def _shown(default: object) -> str:
    return {True: "on", False: "off"}[default] if isinstance(default, bool) else str(default)


def _listed(choices: tuple[object, ...]) -> str:
    return ", ".join(str(choice) for choice in choices if choice is not None)


# By field: what reads it, how the value is called in the help, and the help.
_OPTIONS: dict[str, tuple[Callable[[str], object], str | None, str]] = {
    "load_format": (str, "NAME", f"{_listed(LOAD_FORMATS)}; dummy makes random weights from the config alone"),
    "dtype": (str, "NAME", f"of weights and activations: {_listed(DTYPES)}; auto is the model's, float32 on a CPU"),
    "quantization": (str, "NAME", f"of the weights as they are loaded: {_listed(QUANTIZATIONS)}"),
    "kv_cache_dtype": (str, "NAME", f"{_listed(KV_CACHE_DTYPES)}; auto is that of the activations"),
    "kv_cache_dtype_skip_layers": (integers, "N,N,...", "layers whose KV cache stays in the model's dtype"),
    "max_model_len": (integer, "N", "most tokens of a prompt and its output; the model's limit if not given"),
    "max_num_seqs": (integer, "N", "most requests that run at once"),
    "max_num_batched_tokens": (integer, "N", "most tokens of one step"),
    "gpu_memory_utilization": (number, "X", "share of the GPU's memory to use, 0 to 1"),
    "block_size": (integer, "N", f"tokens per KV page: {_listed(BLOCK_SIZES)}"),
    "num_gpu_blocks_override": (integer, "N", "KV pages; as many as fit if not given"),
    "enable_prefix_caching": (bool, None, "keep the KV of prompts for prompts that begin alike"),
    "enable_chunked_prefill": (bool, None, "let a prompt be computed over several steps"),
    "enforce_eager": (bool, None, "use no CUDA graphs"),
    "async_scheduling": (bool, None, "schedule a step while the one before it runs"),
    "seed": (integer, "N", "of random weights, and of requests that bring none"),
    "device": (str, "NAME", "auto, cuda or cpu"),
}
