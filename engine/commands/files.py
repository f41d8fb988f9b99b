"""Files that a command is to write."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from engine.errors import UserError


def ensure_writable(path: Path, flag: str) -> None:
    """Make the folder of a file that is still to be written, and say now what would be said after minutes of work.

    Raises:
        UserError: the file could not be written.
    """
    try:
        if path.is_dir():
            raise UserError(f"{flag}: {path} is a folder; it must be a file")
        if path.exists():
            if not os.access(path, os.W_OK):
                raise UserError(f"{flag}: {path} cannot be written (Permission denied)")
            return
        folder = Path(os.path.realpath(path)).parent  # a link may lead to where nothing is yet
        blocking = next(above for above in (folder, *folder.parents) if above.exists())
        if not blocking.is_dir():
            raise UserError(f"{flag}: {path} cannot be written ({blocking} is a file, not a folder)")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{flag}: {path} cannot be written ({error.strerror or error})") from None


def ensure_different(path: Path, flag: str, source: Path, of: str) -> None:
    """
    Args:
        path, flag: a file to be written. source, of: one to be read.

    Raises:
        UserError: they are the same file, whatever their names.
    """
    if source.is_file() and path.exists() and path.samefile(source):
        raise UserError(f"{flag}: {path} is the file of {of}, which would be overwritten; name another")
