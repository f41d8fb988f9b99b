"""What a benchmark run found: timings, figures with their verdicts, and the JSON record of it all.

Nothing here needs a GPU, or torch.
"""

import json
import math
import os
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VERSION = 1
OURS = "ours"
# What bounds a row: limits of memory, by its bytes, and of arithmetic, by its FLOPs.
FLOOR = ("copy", "matmul")


class BenchError(Exception):
    """Something the user can mend, in one sentence."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one implementation's call, over and over.

    Attributes:
        repetitions_s: each the mean of the calls of one graph replay, or of one pass where no graph could be captured.
        calls: calls behind each repetition.
        method: graph, or events for eager launches.
    """

    repetitions_s: tuple[float, ...]
    calls: int
    method: str = "graph"

    @property
    def median_s(self) -> float:
        return statistics.median(self.repetitions_s)

    @property
    def spread(self) -> float:
        """Range between the quartiles over the median."""
        if len(self.repetitions_s) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.repetitions_s, n=4, method="inclusive")
        return (high - low) / self.median_s


@dataclass(frozen=True)
class Target:
    """A figure to reach.

    Attributes:
        quantity: speedup (time of the implementation `of` over ours), slowdown (ours over that of `of`), share (our
            rate over the limit `of`: copy, read or matmul), seconds (our time) or value (the row's value `of`).
        reach: at least this much, or with `at_most` no more than this.
    """

    quantity: str
    reach: float
    of: str = ""
    at_most: bool = False

    def __str__(self) -> str:
        sign = "≤" if self.at_most else "≥"
        if self.quantity == "speedup":
            return f"{sign} {self.reach:g} × {self.of}"
        if self.quantity == "slowdown":
            return f"time {sign} {self.reach:g} × {self.of}"
        if self.quantity == "share":
            return f"{sign} {self.reach:.0%} of {self.of}"
        if self.quantity == "seconds":
            return f"{sign} {self.reach * 1e6:g} µs"
        return f"{self.of} {sign} {self.reach:g}"


@dataclass(frozen=True)
class Figure:
    """What a target came to; value and met are None where it could not be measured."""

    target: Target
    value: float | None

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.target.reach if self.target.at_most else self.value >= self.target.reach


@dataclass
class Row:
    """One shape of one kernel beside its peers.

    Attributes:
        flops, bytes: work of one call that no implementation can avoid; None where it is not what matters.
        floor: the limits below whose time no implementation can be; "read" in place of "copy" where hardly anything is
            written.
        timings: by implementation; ours is called "ours".
        absent: why an implementation has no timing.
        values: what is no time: bytes of memory, errors, …
        note: how to read the row, where its name does not say it.
    """

    suite: str
    name: str
    shape: dict[str, Any] = field(default_factory=dict)
    flops: float | None = None
    bytes: float | None = None
    timings: dict[str, Timing] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()
    note: str = ""
    floor: tuple[str, ...] = FLOOR

    @property
    def main(self) -> Timing | None:
        """Our timing; in a row of limits, which has none, the only one."""
        return self.timings.get(OURS) or (next(iter(self.timings.values()), None) if OURS not in self.absent else None)

    def speedups(self) -> dict[str, float]:
        """Time of each peer over ours."""
        ours = self.timings.get(OURS)
        return {name: t.median_s / ours.median_s for name, t in self.timings.items() if ours and name != OURS}

    def share_of_floor(self, limits: Mapping[str, float]) -> float | None:
        """The time that the limits of the row's floor allow over ours: bytes at the copy rate, FLOPs at matmul's, …"""
        work = ((self._work(limit), limits.get(limit)) for limit in self.floor)
        floor_s = max((amount / rate for amount, rate in work if amount and rate), default=None)
        return floor_s / self.main.median_s if floor_s and self.main else None

    def _work(self, limit: str) -> float | None:
        """What of the row a limit bounds."""
        return self.flops if limit == "matmul" else self.bytes

    def figures(self, limits: Mapping[str, float]) -> list[Figure]:
        return [Figure(target, self._reached(target, limits)) for target in self.targets]

    def _reached(self, target: Target, limits: Mapping[str, float]) -> float | None:
        ours = self.timings.get(OURS)
        if target.quantity == "value":
            return self.values.get(target.of)
        if ours is None:
            return None
        if target.quantity == "seconds":
            return ours.median_s
        if target.quantity == "share":
            work = self._work(target.of)
            return work / ours.median_s / limits[target.of] if work and target.of in limits else None
        if target.of not in self.timings:
            return None
        speedup = self.timings[target.of].median_s / ours.median_s
        return speedup if target.quantity == "speedup" else 1 / speedup


def limits_of(rows: Iterable[Row]) -> dict[str, float]:
    """What the machine allowed in this run: copy and read in bytes/s, matmul in FLOP/s, each the best seen."""
    limits: dict[str, float] = {}
    for row in rows:
        if row.suite == "limits" and row.main:
            limit, work = row.shape["limit"], row.bytes or row.flops
            limits[limit] = max(limits.get(limit, 0.0), work / row.main.median_s)
    return limits


@dataclass
class Record:
    """A run, as it is committed: what was run where, the rows, and the clocks that each suite saw."""

    command: str
    commit: str
    date: str
    quick: bool
    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    clocks: dict[str, dict[str, Any]] = field(default_factory=dict)
    stopped: str = ""

    @property
    def limits(self) -> dict[str, float]:
        return limits_of(self.rows)

    def to_json(self) -> dict[str, Any]:
        """The record with everything derived from it: medians, ratios, figures."""
        limits = self.limits
        return {
            "version": VERSION,
            "command": self.command,
            "commit": self.commit,
            "date": self.date,
            "quick": self.quick,
            "stopped": self.stopped,
            "environment": self.environment,
            "limits": limits,
            "clocks": self.clocks,
            "results": [_row_to_json(row, limits) for row in self.rows],
        }

    @classmethod
    def from_json(cls, document: Any) -> "Record":
        """The inverse of `to_json`; what is derived is derived again.

        Raises:
            BenchError: the document is no record of this version.
        """
        try:
            if document["version"] != VERSION:
                raise BenchError(f"it has version {document['version']!r}, and only version {VERSION} is known")
            return cls(
                rows=[_row_from_json(row) for row in document["results"]],
                **{name: document[name] for name in ("command", "commit", "date", "quick", "stopped")},
                **{name: dict(document[name]) for name in ("environment", "clocks")},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise BenchError(f"it is no record of python -m kernels.bench ({reason})") from error


def _row_to_json(row: Row, limits: Mapping[str, float]) -> dict[str, Any]:
    timed = {
        name: {"median_s": t.median_s, "calls": t.calls, "method": t.method, "repetitions_s": list(t.repetitions_s)}
        for name, t in row.timings.items()
    }
    return {
        "suite": row.suite,
        "name": row.name,
        "shape": row.shape,
        "flops": row.flops,
        "bytes": row.bytes,
        "floor": list(row.floor),
        "note": row.note,
        "implementations": timed | {name: {"absent": reason} for name, reason in row.absent.items()},
        "speedup_over": row.speedups(),
        "share_of_floor": row.share_of_floor(limits),
        "values": row.values,
        "figures": [
            {
                "quantity": figure.target.quantity,
                "of": figure.target.of,
                "reach": figure.target.reach,
                "at_most": figure.target.at_most,
                "value": figure.value,
                "met": figure.met,
            }
            for figure in row.figures(limits)
        ],
    }


def _row_from_json(row: Mapping[str, Any]) -> Row:
    implementations = row["implementations"]
    for name, found in implementations.items():
        times = found.get("repetitions_s", [1.0])
        if not times or not all(isinstance(time, float) and 0 < time < math.inf for time in times):
            raise ValueError(f"the repetitions of {name} in {row['name']} are no times")
    floor = tuple(row.get("floor", FLOOR))  # records from before it was written have the usual one
    if not all(isinstance(limit, str) for limit in floor):
        raise ValueError(f"the floor of {row['name']} is {floor}, which names no limits")
    return Row(
        floor=floor,
        timings={
            name: Timing(tuple(found["repetitions_s"]), int(found["calls"]), found["method"])
            for name, found in implementations.items()
            if "absent" not in found
        },
        absent={name: found["absent"] for name, found in implementations.items() if "absent" in found},
        targets=tuple(Target(f["quantity"], f["reach"], f["of"], f["at_most"]) for f in row["figures"]),
        **{name: row[name] for name in ("suite", "name", "flops", "bytes", "note")},
        **{name: dict(row[name]) for name in ("shape", "values")},
    )


def read_record(path: Path) -> Record:
    """Raises: BenchError if there is no such file or it holds something else."""
    try:
        return Record.from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise BenchError(f"{path} is not JSON: {error}") from error
    except BenchError as error:
        raise BenchError(f"cannot use {path}: {error}") from error


def write_record(path: Path, record: Record) -> None:
    """Write the record so that nobody ever sees half of it.

    Raises:
        BenchError: the file cannot be written; it is then as it was before.
    """
    write_whole(path, json.dumps(record.to_json(), indent=1, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Through a temporary file of the same folder, which then takes the name. A pipe or device is written to as it is.

    Raises:
        BenchError: the file cannot be written; it is then as it was before.
    """
    temporary = None
    try:
        path = path.resolve()  # a link stays a link
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as file:
            temporary = Path(file.name)
            file.write(text)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise BenchError(f"cannot write {path}: {error.strerror}") from error


def check_writable(path: Path) -> None:
    """Raise BenchError now rather than after minutes of measuring."""
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "Is a directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror}") from error


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
