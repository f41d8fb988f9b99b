"""A process that computes one question after another: `python -m dashboard.services.worker`, started by `jobs`.

Pickles come on stdin as (function, arguments) and go out on stdout as (kind, content): "ready" once, then for each
question any number of "progress" and one of "done", "refused" (bad input, one sentence), "defect" (a traceback) or
"ended" (it was asked to stop, by `STOP`, and is ready for the next question).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from planner.errors import UserError

_NICENESS = 10


#: Asks a worker to leave the question that it is at; None where a system has no such signal.
STOP = getattr(signal, "SIGUSR1", None)


class Ended(BaseException):
    """The question was given up. No `Exception`, which a planner might take for an answer."""


class Stop:
    """Whether the question was given up. It is noticed at any place of a computation, but in no message half sent."""

    def __init__(self) -> None:
        self._is_asked = self._is_computing = False

    def listen(self) -> None:
        """From now on; in the main thread only."""
        if STOP is not None:
            signal.signal(STOP, self._ask)

    def _ask(self, *_: object) -> None:
        self._is_asked = True
        if self._is_computing:
            raise Ended

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Where it is noticed.

        Raises:
            Ended: at once, if it was given up before.
        """
        self._is_computing = True
        try:
            if self._is_asked:
                raise Ended
            yield
        finally:
            self._is_computing = False

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Within `computing`: where it is noticed afterwards.

        Raises:
            Ended: if it was given up meanwhile.
        """
        self._is_computing = False
        yield
        self._is_computing = True
        if self._is_asked:
            raise Ended

    def forget(self) -> None:
        """The next question is another one."""
        self._is_asked = False


def main() -> None:
    """Serve until stdin ends."""
    stop = Stop()
    stop.listen()
    questions = sys.stdin.buffer
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    _prepare()
    _send(answers, "ready", None)

    def report(*step: object) -> None:
        with stop.telling():
            _send(answers, "progress", step)

    while True:
        try:
            function, arguments = pickle.load(questions)
        except EOFError:
            return
        kind, content = answer(function, arguments, report, stop)
        stop.forget()
        _send(answers, kind, content)


def answer(
    function: Callable[..., Any], arguments: tuple, report: Callable[[int, int, str], None], stop: Stop
) -> tuple[str, object]:
    """What a function says, or why it says nothing."""
    try:
        with stop.computing():
            found = function(report, *arguments)
        return "done", found
    except Ended:
        return "ended", None
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
