"""What a run has measured so far, beside the profile that it will write: `<profile>.part`, JSON lines.

    {"settings": {...}, "version": 1}                                   what was asked for, of which source
    {"limits": {...}, "elapsed_s": 4.1}                                 rates of the device
    {"kv": "fp8", "engine": {...}, "elapsed_s": 21.0}                   an engine that was built
    {"kv": "fp8", "table": "decode", "point": {...}, "elapsed_s": 21.3} one measured step
    {"clock": {"series": [...]}, "elapsed_s": 28.0}                     one of its tables
    {"kv": "fp8", "served": [...], "elapsed_s": 29.0}                   a short service
    {"allreduce": [...], "elapsed_s": 30.2}

Every line is on disk before the next step is measured, so that a run that ends, by Ctrl-C or by the loss of the
machine, goes on where it stopped. A last line that was cut short is dropped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

from calibration.measure.grid import Point
from engine.errors import UserError

_VERSION = 1


class PartFile:
    """Lines as they come, and what they say so far.

    Attributes:
        engines: what was noted of each engine, by KV dtype. limits, allreduce: None until they are known.
        clock: its tables by name. served: by KV dtype.
        elapsed_s: of all runs before this one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.engines: dict[str, dict[str, Any]] = {}
        self.limits: dict[str, Any] | None = None
        self.clock: dict[str, Any] = {}
        self.served: dict[str, list[dict[str, Any]]] = {}
        self.allreduce: list[dict[str, Any]] | None = None
        self.elapsed_s = 0.0
        self._points: dict[tuple, dict[str, Any]] = {}
        self._file: IO[str] | None = None

    @classmethod
    def at(cls, save: Path) -> PartFile:
        """The one that belongs to a profile."""
        return cls(save.with_name(f"{save.name}.part"))

    # ---- its life ----------------------------------------------------------------------------------------------------

    def open(self, settings: dict[str, Any], *, overwrite: bool) -> None:
        """Take over what is there, or begin.

        Raises:
            UserError: what is there was measured with other settings or of another source, or is something else; or the
                file cannot be written.
        """
        settings = json.loads(json.dumps(settings))
        try:
            if overwrite or not self.path.exists():
                self._begin(settings)
                return
            whole = self._read(settings)
            self._file = self.path.open("r+", encoding="utf-8")
            self._file.seek(whole)
            self._file.truncate()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error

    def _begin(self, settings: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("w", encoding="utf-8")
        self._write({"settings": settings, "version": _VERSION})

    def _read(self, settings: dict[str, Any]) -> int:
        """Take the lines in. Returns how many bytes of them are whole."""
        data = self.path.read_bytes()
        lines = data.split(b"\n")[:-1]
        remedy = "add --overwrite to begin anew, or remove it"
        try:
            found = [json.loads(line) for line in lines]
            if not found:  # cut in its first line
                return self._rewrite(settings)
            if found[0]["version"] != _VERSION or not isinstance(found[0]["settings"], dict):
                raise ValueError
            for line in found[1:]:
                self._take(line)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{self.path} is no calibration that could be continued; {remedy}") from None
        if different := _differing(found[0]["settings"], settings):
            if not self._points:  # nothing would be lost
                return self._rewrite(settings)
            raise UserError(
                f"{self.path} holds a calibration that was begun with other settings ({different}); {remedy}"
            )
        return len(b"\n".join([*lines, b""]))

    def _rewrite(self, settings: dict[str, Any]) -> int:
        """Begin anew. Returns how many bytes it then has."""
        self.engines, self.limits, self.clock, self.served, self.allreduce = {}, None, {}, {}, None
        self.elapsed_s = 0.0
        self._begin(settings)
        self.close()
        return self.path.stat().st_size

    def close(self) -> None:
        """Close it; it stays."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """The profile is written."""
        self.close()
        self.path.unlink(missing_ok=True)

    # ---- what it holds -----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Measured points."""
        return len(self._points)

    def point(self, kv: str, point: Point) -> dict[str, Any] | None:
        """What was measured, if it was."""
        return self._points.get((kv, point.key))

    def table(self, kv: str, table: str) -> list[dict[str, Any]]:
        """All measured points of a table, in order of their shapes."""
        keys = [key for of, key in self._points if of == kv and key[0] == table]
        keys.sort(key=lambda key: (len(key[1]), key[1], sum(count for _, count in key[2]), key[2]))
        return [self._points[kv, key] for key in keys]

    def add(self, line: dict[str, Any], elapsed_s: float) -> None:
        """Note something, on disk when this returns.

        Args:
            line: without elapsed_s.
            elapsed_s: of this run; that of the runs before is added.
        """
        line = line | {"elapsed_s": round(self.elapsed_s + elapsed_s, 2)}
        self._take(line, of_this_run=True)
        self._write(line)

    def _take(self, line: dict[str, Any], of_this_run: bool = False) -> None:
        if "point" in line:
            measured = line["point"]
            prefills, decodes = (tuple(map(tuple, measured[name])) for name in ("prefills", "decodes"))
            self._points[line["kv"], Point(line["table"], prefills, decodes).key] = measured
        elif "engine" in line:
            self.engines[line["kv"]] = line["engine"]
        elif "limits" in line:
            self.limits = line["limits"]
        elif "clock" in line:
            self.clock.update(line["clock"])
        elif "served" in line:
            self.served[line["kv"]] = line["served"]
        elif "allreduce" in line:
            self.allreduce = line["allreduce"]
        if not of_this_run:
            self.elapsed_s = line["elapsed_s"]

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error


def _differing(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The settings that differ, by name; empty if none does."""
    return ", ".join(name for name in {**before, **now} if before.get(name) != now.get(name))
