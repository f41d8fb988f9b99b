"""Files that people drop: bounded, parsed by the planner's own loaders, never kept outside a temporary place."""

from __future__ import annotations

import atexit
import gzip
import hashlib
import io
import json
import re
import shutil
import tempfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from dashboard.services import benchmarks
from planner.catalog import list_models
from planner.errors import UserError
from planner.external.readers import read_server_facts
from planner.hf_config import model_from_config
from planner.model import ModelSpec
from planner.profile.schema import load_profile
from planner.workload import Workload, load_workload

MAX_TRACE_MIB = 32
MAX_UNPACKED_BYTES = 128 << 20
MAX_TRACE_REQUESTS = 200_000
MAX_CONFIG_BYTES = 1 << 20
MAX_PROFILE_MIB = 32
MAX_BENCHMARK_MIB = 32
MAX_LOG_MIB = 8
_MOST_KEPT = 16
_MOST_FILES = 64
_IDENTITY = re.compile(r"[0-9a-f]{16}")


class Traces:
    """Traces that were uploaded, by the hash of their content, so that a link can name one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Workload] = OrderedDict()

    def add(self, name: str, content: bytes) -> str:
        """Parse a trace and keep it; returns its id.

        Raises:
            UserError: too large, or no trace, in one sentence.
        """
        identity = hashlib.sha256(content + PurePath(name).suffix.encode()).hexdigest()[:16]
        if self.get(identity) is None:
            workload = read_trace(name, content)
            with self._lock:
                self._kept[identity] = workload
                while len(self._kept) > _MOST_KEPT:
                    self._kept.popitem(last=False)
        return identity

    def get(self, identity: str | None) -> Workload | None:
        """The trace of an id; None if this server has none, or no longer."""
        with self._lock:
            found = self._kept.get(identity or "")
            if found is not None:
                self._kept.move_to_end(identity or "")
            return found


@cache
def traces() -> Traces:
    """Those of this server process."""
    return Traces()


def read_trace(name: str, content: bytes) -> Workload:
    """A trace, by the planner's loader.

    Raises:
        UserError: too large, or no trace.
    """
    _check_size(name, content, MAX_TRACE_MIB << 20)
    _check_unpacked(name, content)
    with tempfile.TemporaryDirectory(prefix="memwall-") as folder:
        workload = load_workload(_stored(Path(folder), name, content), sort=True, skip_failed=True)
    if len(workload) > MAX_TRACE_REQUESTS:
        raise UserError(
            f"{name} has {len(workload):,} requests, and a page simulates at most {MAX_TRACE_REQUESTS:,}; cut the "
            f"file, or use memwall plan --trace"
        )
    return workload


def read_config(name: str, content: bytes) -> tuple[str, dict[str, Any]]:
    """The name of a model, and its config.json.

    Raises:
        UserError: no such file.
    """
    _check_size(name, content, MAX_CONFIG_BYTES)
    try:
        config = json.loads(content)
    except (ValueError, RecursionError):
        raise UserError(f"{name} is not JSON; drop the model's Hugging Face config.json") from None
    if not isinstance(config, dict):
        raise UserError(f"{name} is not a config.json: it holds no JSON object")
    label = str(config.get("_name_or_path") or "").rstrip("/").rpartition("/")[2] or PurePath(name).stem
    label = label[:60].lower()
    return (f"{label} (yours)" if label in list_models() else label), config


def model_of(name: str, config: Any, quantization: str | None = None) -> ModelSpec:
    """A model from what its config.json says, with its weights quantised at load if asked for.

    Raises:
        UserError: it says too little.
    """
    if not isinstance(config, dict):
        raise UserError(f"{name[:60]} has no config.json: it holds no JSON object")
    return model_from_config(config, name[:60], quantization, source=f"the config.json of {name[:60]}")


# ---- files that the planner reads by their path -------------------------------------------------------------------


@cache
def _folder() -> Path:
    """Where files lie that people dropped, as long as the server runs: a folder each, named by the content's hash."""
    folder = Path(tempfile.mkdtemp(prefix="memwall-uploads-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def kept(identity: str) -> Path | None:
    """The file that a link names; None if this server has none."""
    if not _IDENTITY.fullmatch(identity):
        return None
    folder = _folder() / identity
    return next(iter(folder.iterdir()), None) if folder.is_dir() else None


def keep(name: str, content: bytes, most_mib: int, check: Callable[[Path], object]) -> str:
    """Put a file where the planner can read it, if it passes a check; returns its id.

    Raises:
        UserError: too large, too many files, or what the check raises.
    """
    identity = hashlib.sha256(content).hexdigest()[:16]
    if kept(identity) is not None:
        return identity
    _check_size(name, content, most_mib << 20)
    _check_unpacked(name, content)
    if sum(1 for _ in _folder().iterdir()) >= _MOST_FILES:
        raise UserError(f"this server keeps {_MOST_FILES} files already, and takes more once it has been restarted")
    # Checked elsewhere first: what lies under its id is whole and good.
    with tempfile.TemporaryDirectory(prefix="memwall-") as folder:
        check(_stored(Path(folder), name, content))
    new = _folder() / identity
    new.mkdir(exist_ok=True)
    _stored(new, name, content)
    return identity


def add_profile(name: str, content: bytes) -> str:
    """Keep a profile; returns its id.

    Raises:
        UserError: too large, or no profile.
    """
    return keep(name, content, MAX_PROFILE_MIB, load_profile)


def add_benchmark(name: str, content: bytes) -> str:
    """Keep a benchmark's result; returns its id.

    Raises:
        UserError: too large, or nothing that `dashboard.services.benchmarks` can read.
    """
    return keep(name, content, MAX_BENCHMARK_MIB, benchmarks.check)


def add_log(name: str, content: bytes) -> str:
    """Keep what a server printed, or the text of its /metrics; returns its id.

    Raises:
        UserError: too large, or it says nothing of itself.
    """
    return keep(name, content, MAX_LOG_MIB, read_server_facts)


def _stored(folder: Path, name: str, content: bytes) -> Path:
    """The content under the last part of its name, whatever path a browser sent with it."""
    safe = "".join(c if c.isalnum() or c in "._- " else "_" for c in PurePath(name.replace("\\", "/")).name)
    path = folder / (safe.lstrip(".")[-100:] or "upload")
    path.write_bytes(content)
    return path


def _check_size(name: str, content: bytes, most: int) -> None:
    if not content.strip():
        raise UserError(f"{name} is empty")
    if len(content) > most:
        size = len(content) / (1 << 20)
        raise UserError(f"{name} has {size:.0f} MiB, more than the {most >> 20} MiB that a page takes")


def _check_unpacked(name: str, content: bytes) -> None:
    """Refuse a small file that unpacks into a huge one."""
    if not content.startswith(b"\x1f\x8b"):
        return
    size = 0
    try:
        with gzip.open(io.BytesIO(content)) as file:
            while chunk := file.read(1 << 20):
                size += len(chunk)
                if size > MAX_UNPACKED_BYTES:
                    raise UserError(f"{name} unpacks into more than {MAX_UNPACKED_BYTES >> 20} MiB")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name} is damaged: {error}") from None
