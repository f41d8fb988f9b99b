"""The one exception that reaches a user as a sentence."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: what was wrong, where, and what would be right, in one sentence.

    The command line prints the message and exits with code 2; a library caller sees a `ValueError`.
    """
