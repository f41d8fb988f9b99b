"""What the suites' command lines share, and what reads their values."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from engine.bench.http_client import BaseUrl
from engine.bench.workload import Lengths
from engine.commands.arguments import add_engine_options, integer, number

_Value = TypeVar("_Value")
MAX_COUNT = 2**24 - 1  # of anything that is counted on a command line; more is a typing error
MIN_RATE, MAX_RATE = 1e-6, 1e6


def add_common_options(parser: argparse.ArgumentParser, *, model_is_optional: bool = False) -> None:
    """Model, sampling, record and engine."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?" if model_is_optional else None,
        help="a Hugging Face folder; with --load-format dummy also a config.json, or the name of a built-in shape",
    )
    parser.add_argument("--temperature", type=not_negative, default=1.0, metavar="X", help="0 is greedy [1]")
    parser.add_argument("--output", type=Path, metavar="PATH", help="write the record here, as JSON (.gz: compressed)")
    parser.add_argument("--commit", metavar="NAME", help="what the record calls the code, where it is no git checkout")
    add_engine_options(parser)


def at_least(least: int, most: int = MAX_COUNT) -> Callable[[str], int]:
    """Whole numbers from `least` to `most`, for `type=` of an option."""

    def read(text: str) -> int:
        value = integer(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"is {text!r}; it must be at least {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"is {text[:40]!r}; it must be at most {most}")
        return value

    return read


def factor(text: str) -> float:
    """A number above 0 that is neither tiny nor huge, for `type=` of an option."""
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"is {text!r}; it must be above 0")
    if not MIN_RATE <= value <= MAX_RATE:
        raise argparse.ArgumentTypeError(f"is {text!r}; it must be from {MIN_RATE:f} to {MAX_RATE:,.0f}")
    return value


def not_negative(text: str) -> float:
    """A finite number from 0 on, for `type=` of an option."""
    value = number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"is {text!r}; it must be at least 0")
    return value


def rate(text: str) -> float:
    """Requests per second, or inf, for `type=` of an option."""
    return math.inf if text.strip().lower() == "inf" else factor(text)


def lengths(text: str) -> Lengths:
    """A range of lengths, for `type=` of an option."""
    return _read(Lengths.parse, text)


def base_url(text: str) -> BaseUrl:
    """Of a server, for `type=` of an option."""
    return _read(BaseUrl.parse, text)


def comma_separated(read: Callable[[str], _Value]) -> Callable[[str], tuple[_Value, ...]]:
    """Values with commas between them, each read by `read`, for `type=` of an option. One that is there twice counts
    once."""
    return lambda text: tuple(dict.fromkeys(_read(read, word.strip()) for word in text.split(",")))


def _read(read: Callable[[str], _Value], text: str) -> _Value:
    try:
        return read(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is {error}") from None
