"""stdin, stdout and stderr as the commands find them: closed, of any encoding, or with a reader that leaves early."""

from __future__ import annotations

import codecs
import io
import os
import sys
from pathlib import Path

from engine.errors import UserError


def prepare_streams() -> None:
    """Make stdout and stderr fit to be printed on.

    What goes to a closed one (`>&-`) is lost, and a terminal that lacks "×" shows "?".
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def discard_stdout() -> None:
    """Let what is still to be printed, or flushed at exit, go nowhere: `| head` has seen enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_stdin() -> str:
    """All of stdin, with "\\n" between lines; nothing where it is closed.

    Raises:
        UserError: it is not UTF-8, or cannot be read.
    """
    if sys.stdin is None:
        return ""
    try:
        data = sys.stdin.buffer.read()
    except OSError as error:
        raise UserError(f"stdin cannot be read ({error.strerror or error})") from None
    return utf8(data, "stdin").replace("\r\n", "\n")


def utf8(data: bytes, source: str) -> str:
    """Text of bytes, without a byte order mark.

    Raises:
        UserError: it is not UTF-8, saying where.
    """
    text = data.removeprefix(codecs.BOM_UTF8)
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 (byte {error.start + len(data) - len(text)})") from None
