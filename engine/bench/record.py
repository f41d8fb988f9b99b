"""The record of a benchmark: everything that its numbers rest on, in one JSON file small enough to commit."""

from __future__ import annotations

import gzip
import json
import math
import os
import platform
import subprocess
import zlib
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from engine.commands.files import unpacked
from engine.errors import UserError
from kernels.bench.results import BenchError, check_writable, write_whole

VERSION = 1
MAX_BYTES = 1 << 20  # what the repository takes as one file


@dataclass
class Record:
    """One run of one suite.

    Attributes:
        command, commit, date: what was run, of which source, when (UTC).
        environment: the machine and its libraries.
        limits: what the device was measured to allow in the same run: copy in bytes/s, matmul in FLOP/s.
        engines: configuration, model and memory report of each engine that was built, in order.
        server: model and version of the one that was measured over HTTP; of its address no more than may be public.
        results: of the suite, raw repetitions and medians.
    """

    suite: str
    command: str
    commit: str
    environment: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)
    engines: list[dict[str, Any]] = field(default_factory=list)
    server: dict[str, Any] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    version: int = VERSION

    def write(self, path: Path) -> int:
        """Write it, whole or not at all. A name that ends in .gz is compressed.

        Returns:
            Bytes of the file.

        Raises:
            UserError: the file cannot be written.
        """
        text = dumps({"version": self.version, "suite": self.suite, **asdict(self)}) + "\n"
        return write_text(path, text)


def dumps(document: Any, indent: str = "") -> str:
    """JSON with an entry per line, but lists of plain values, which are the raw data, on one line."""
    inner = indent + " "
    if isinstance(document, dict) and document:
        body = (f"{inner}{json.dumps(str(key))}: {dumps(value, inner)}" for key, value in document.items())
        return "{\n" + ",\n".join(body) + f"\n{indent}}}"
    if isinstance(document, (list, tuple)) and any(isinstance(value, (dict, list, tuple)) for value in document):
        return "[\n" + ",\n".join(inner + dumps(value, inner) for value in document) + f"\n{indent}]"
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def read_record(path: Path) -> dict[str, Any]:
    """A record as it was written.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    try:
        data = path.read_bytes()
        document = json.loads(unpacked(data))
        if document["version"] != VERSION:
            raise UserError(f"{path.name} has version {document['version']!r}; only {VERSION} can be read")
    except OSError as error:
        raise UserError(f"cannot read record {path}: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path.name} is not complete JSON ({error.msg}), so no record of memwall bench") from error
    except (EOFError, KeyError, RecursionError, TypeError, ValueError, zlib.error) as error:
        raise (
            error if isinstance(error, UserError) else UserError(f"{path.name} is no record of memwall bench")
        ) from error
    return document


# ---- files -----------------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> int:
    """Write a text file whole or not at all, compressed if its name ends in .gz. Returns its bytes.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        if path.name.endswith(".gz"):
            data = gzip.compress(text.encode("utf-8"), mtime=0)
            _write_bytes(path, data)
            return len(data)
        write_whole(path, text)
    except BenchError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return len(text.encode("utf-8"))


def _write_bytes(path: Path, data: bytes) -> None:
    """As `write_whole` does it, for what is no text."""
    path = path.resolve()  # a link stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # a pipe or device
        path.write_bytes(data)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def ensure_writable(path: Path) -> None:
    """Raise UserError now rather than after minutes of measuring."""
    try:
        check_writable(path)
    except BenchError as error:
        raise UserError(str(error)) from error


# ---- where it ran ----------------------------------------------------------------------------------------------------


def environment(device: Any) -> dict[str, Any]:
    """What the numbers depend on, besides the commit: machine, GPU, driver, libraries."""
    import torch

    found = _python_and_cores()
    if device.type == "cuda":
        from kernels.bench.run import environment as of_gpu

        found |= of_gpu()
    else:
        found |= {
            "torch": torch.__version__,
            "device": "cpu",
            "processor": _processor(),
            "threads": torch.get_num_threads(),
        }
    return found | {"transformers": _version("transformers"), "numpy": _version("numpy")}


def client_environment(event_loop: str) -> dict[str, Any]:
    """What the times of a client depend on: its machine, and the package whose event loop it runs on."""
    loop = event_loop if event_loop == "asyncio" else f"{event_loop} {_version(event_loop)}"
    return _python_and_cores() | {"processor": _processor(), "event_loop": loop}


def _python_and_cores() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"python": platform.python_version(), "machine": platform.machine(), "cores": cores}


def commit() -> str:
    """The commit of this source, marked if the tree had changes; "unknown" where it is no git checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def as_committed(argument: str) -> str:
    """A command-line argument without this machine's folders: of what is absolute, or leads upwards, the name."""
    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    path = Path(value)
    return flag + equals + (path.name if path.is_absolute() or ".." in path.parts or value.startswith("~") else value)


def rounded(value: float, digits: int = 5) -> float:
    """To significant digits, so that records stay small."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else value


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
