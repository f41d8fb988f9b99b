"""What the commands of this package have in common."""

from __future__ import annotations

import sys
from collections.abc import Callable

from engine.errors import UserError


def exit_code(prog: str, run: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a command. Bad input is a sentence on stderr and 2, Ctrl-C is 130."""
    try:
        return run(arguments)
    except UserError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
