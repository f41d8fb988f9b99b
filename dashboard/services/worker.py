"""A process that computes one question after another: `python -m dashboard.services.worker`, started by `jobs`.

Pickles come on stdin as (function, arguments) and go out on stdout as (kind, content): "ready" once, then for each
question any number of "progress" and one of "done", "refused" (bad input, one sentence) or "defect" (a traceback).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

from planner.errors import UserError

_NICENESS = 10


def main() -> None:
    """Serve until stdin ends."""
    questions = sys.stdin.buffer
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    _prepare()
    _send(answers, "ready", None)
    while True:
        try:
            function, arguments = pickle.load(questions)
        except EOFError:
            return
        kind, content = answer(function, arguments, lambda *step: _send(answers, "progress", step))
        _send(answers, kind, content)


def answer(
    function: Callable[..., Any], arguments: tuple, report: Callable[[int, int, str], None]
) -> tuple[str, object]:
    """What a function says, or why it says nothing."""
    try:
        return "done", function(report, *arguments)
    except UserError as error:
        return "refused", str(error)
    except BrokenPipeError:
        raise
    except Exception:
        return "defect", traceback.format_exc()


def _send(answers: BinaryIO, kind: str, content: object) -> None:
    pickle.dump((kind, content), answers)
    answers.flush()


def _prepare() -> None:
    """Load what every question needs, and let the server go first where there are few cores."""
    import dashboard.services.work  # noqa: F401
    from dashboard.services.start import fit_profiles

    with contextlib.suppress(AttributeError, OSError):
        os.nice(_NICENESS)
    fit_profiles()


if __name__ == "__main__":
    try:
        main()
    except (BrokenPipeError, KeyboardInterrupt):
        sys.exit(1)
