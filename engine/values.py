"""Values that a user gives, of whatever type, read as what they must be; what is wrong with one is a sentence."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable

from engine.errors import UserError

MAX_SEED = 2**63 - 1  # seeds travel as int64
MAX_INT32 = 2**31 - 1  # token ids, pages and positions travel as int32
_MOST_SHOWN = 80


def shown(value: object) -> str:
    """A value as a sentence quotes it, on one line and not too long."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # what Python says to more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."


def integer(value: object) -> int | None:
    """The number of any integer type, NumPy's included; None for what is none, booleans among it."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def whole_number(name: str, value: object, least: int, most: int | None = None) -> int:
    """A whole number within its bounds.

    Raises:
        UserError: it is none, or beyond them.
    """
    number = integer(value)
    if number is None or number < least or (most is not None and number > most):
        wanted = f"of at least {least}" + ("" if most is None else f" and at most {most}")
        raise UserError(f"{name} is {shown(value)}; it must be a whole number {wanted}")
    return number


def whole_numbers(name: str, values: object, what: str) -> tuple[int, ...]:
    """Whole numbers from 0 on that fit into an int32, of any collection.

    Args:
        what: they are, in the plural.

    Raises:
        UserError: it is no collection, or holds something else.
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise UserError(f"{name} is {shown(values)}; it must be a list of {what}")
    found = []
    for value in values:
        number = integer(value)
        if number is None or not 0 <= number <= MAX_INT32:
            raise UserError(f"{name} has {shown(value)}; {what} are whole numbers from 0 to {MAX_INT32}")
        found.append(number)
    return tuple(found)


def real_number(name: str, value: object, fits: Callable[[float], bool], wanted: str) -> float:
    """A finite number that fits.

    Args:
        wanted: what would.

    Raises:
        UserError: it is none, or does not.
    """
    try:
        number = math.nan if isinstance(value, (bool, str, bytes, bytearray)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{name} is {shown(value)}; it must be a number, {wanted}")
    if not fits(number):
        raise UserError(f"{name} is {shown(value)}; it must be {wanted}")
    return number


def flag(name: str, value: object) -> bool:
    """True or False, and nothing that merely counts as one of them.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(value, bool):
        raise UserError(f"{name} is {shown(value)}; it must be True or False")
    return value
