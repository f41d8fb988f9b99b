"""Files that a command is to write, that they are not those it reads, and what it reads where that may be gzip."""

from __future__ import annotations

import gzip
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from engine.errors import UserError

_GZIP = b"\x1f\x8b"


def unpacked(data: bytes) -> bytes:
    """What a file holds, gunzipped if it is gzip by its first bytes, whatever its name.

    Raises:
        EOFError, gzip.BadGzipFile, zlib.error: it is damaged.
    """
    return gzip.decompress(data) if data[:2] == _GZIP else data


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
    if source.is_file() and _is_same(path, source):
        raise UserError(f"{flag}: {path} is the file of {of}, which would be overwritten; name another")


def ensure_distinct(inputs: Iterable[tuple[str, Path | None]], outputs: Iterable[tuple[str, Path | None]]) -> None:
    """Raise UserError, before anything runs, if an output would overwrite an input or another output.

    Args:
        inputs, outputs: (option, file), the file None where it was not given; links are followed. Pipes and devices
            may take several outputs.
    """
    kept = [(option, path) for option, path in inputs if path is not None]
    num_inputs = len(kept)
    for option, path in outputs:
        if path is None or (path.exists() and not path.is_file()):
            continue
        for index, (other, taken) in enumerate(kept):
            if not _is_same(path, taken):
                continue
            if index < num_inputs:
                raise UserError(f"{option} {path} would overwrite {other} {taken}; give it another name")
            raise UserError(f"{option} {path} and {other} {taken} are the same file; give each a name of its own")
        kept.append((option, path))


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.resolve() == other.resolve() or one.samefile(other)
    except (OSError, RuntimeError):  # one of them does not exist yet
        return False
