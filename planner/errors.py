"""The exception that reaches a user as a sentence, and the sentence for a name that is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from engine.errors import UserError

__all__ = ["UserError", "unknown_name"]


def unknown_name(kind: str, name: str, known: Iterable[str], where_to_look: str) -> UserError:
    """The error for a name that is in no list: it suggests the nearest one that is.

    Args:
        kind: what the name should have named, e.g. "model".
        name: what the user wrote.
        known: the names that exist.
        where_to_look: the command or file that lists them.
    """
    wanted, names = name.lower(), list(known)
    # What the name begins, e.g. h200 of h200_sxm, before what it resembles.
    nearest = [each for each in names if wanted and each.startswith(wanted)]
    nearest = nearest or difflib.get_close_matches(wanted, names, n=1, cutoff=0.3)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return UserError(f"unknown {kind} {name!r}: {hint}{where_to_look}")
