"""Shape and times of every step of a run: collected while it runs, written as one JSON object per line.

    {"step": 7, "start_s": 0.101, "end_s": 0.112, "host_s": 0.0004, "num_sampled": 3, "prefills": [[512, 0]],
     "decodes": [1024, 87], "graph_size": 8}

`prefills` and `verifies` hold (query tokens, context tokens), `decodes` context tokens. Times count from the start of
the run. start_s is the launch and end_s the tokens' arrival on the host; of two steps in flight the second is launched
before the first ends. A key is left out where it is 0, empty or unknown; `decodes` also where it is that of the line
before with one more token each, which is what most steps are: then "same_decodes": 1 stands in its place.
"""

from __future__ import annotations

import gzip
import json
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.scheduling import StepShape


@dataclass(frozen=True)
class LoggedStep:
    """One step. Times in seconds since the start of the run; gpu_s is the time on the device, where it is known."""

    step: int
    start_s: float
    end_s: float
    host_s: float
    shape: StepShape
    num_preempted: int = 0
    graph_size: int | None = None
    gpu_s: float | None = None

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True)
class _Kept:
    """A step as it is kept during the run: decode contexts take 4 bytes each."""

    record: tuple[int, float, float, float, int, int | None, float | None]
    prefills: list[tuple[int, int]]
    decodes: array
    verifies: list[tuple[int, int]]
    num_sampled: int


class StepLog:
    """Takes over an engine's step records while it runs, in little memory.

    Attributes:
        peak_running: the most requests in one step. num_preempted: preemptions. num_tokens: query tokens of all steps.
    """

    def __init__(self) -> None:
        self.peak_running = 0
        self.num_preempted = 0
        self.num_tokens = 0
        self._kept: list[_Kept] = []

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, records: list[Any]) -> None:
        """Move the StepRecords of a core's step_log here."""
        for record in records:
            shape = record.shape
            self.peak_running = max(self.peak_running, shape.num_requests)
            self.num_preempted += record.num_preempted
            self.num_tokens += shape.num_tokens
            head = (record.step_id, record.start_s, record.end_s, record.host_s, record.num_preempted)
            self._kept.append(
                _Kept(
                    (*head, record.graph_size, getattr(record, "gpu_s", None)),
                    list(shape.prefills),
                    array("I", shape.decode_contexts),
                    list(shape.verifies),
                    shape.num_sampled,
                )
            )
        records.clear()

    def steps(self, origin_s: float = 0.0) -> Iterator[LoggedStep]:
        """The steps, their times counted from `origin_s`."""
        for kept in self._kept:
            step_id, start_s, end_s, host_s, num_preempted, graph_size, gpu_s = kept.record
            shape = StepShape(kept.prefills, list(kept.decodes), kept.verifies, kept.num_sampled)
            times = (start_s - origin_s, end_s - origin_s, host_s)
            yield LoggedStep(step_id, *times, shape, num_preempted, graph_size, gpu_s)


def encode(steps: Iterable[LoggedStep]) -> str:
    """JSON lines, times in whole microseconds."""
    lines, before = [], []
    for step in steps:
        shape = step.shape
        row: dict[str, Any] = {"step": step.step}
        row |= {name: round(getattr(step, name), 6) for name in ("start_s", "end_s", "host_s")}
        row["num_sampled"] = shape.num_sampled
        if shape.decode_contexts and shape.decode_contexts == [context + 1 for context in before]:
            row["same_decodes"] = 1
        elif shape.decode_contexts:
            row["decodes"] = shape.decode_contexts
        before = shape.decode_contexts
        optional = {
            "prefills": shape.prefills,
            "verifies": shape.verifies,
            "preempted": step.num_preempted,
            "graph_size": step.graph_size,
            "gpu_s": step.gpu_s and round(step.gpu_s, 6),
        }
        row |= {name: value for name, value in optional.items() if value}
        lines.append(json.dumps(row, separators=(",", ":")) + "\n")
    return "".join(lines)


def decode(lines: Iterable[str]) -> Iterator[LoggedStep]:
    """The inverse of `encode`."""
    before: list[int] = []
    for line in lines:
        row = json.loads(line)
        decodes = [context + 1 for context in before] if row.get("same_decodes") else row.get("decodes", [])
        before = decodes
        prefills, verifies = ([tuple(pair) for pair in row.get(name, [])] for name in ("prefills", "verifies"))
        yield LoggedStep(
            row["step"],
            row["start_s"],
            row["end_s"],
            row["host_s"],
            StepShape(prefills, decodes, verifies, row["num_sampled"]),
            row.get("preempted", 0),
            row.get("graph_size"),
            row.get("gpu_s"),
        )


def read_step_log(path: Path) -> list[LoggedStep]:
    """Read a step log, gzipped or not.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    try:
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rt", encoding="utf-8") as lines:
            return list(decode(lines))
    except OSError as error:
        raise UserError(f"cannot read step log {path}: {error.strerror or error}") from error
    except (EOFError, KeyError, RecursionError, TypeError, ValueError, AttributeError, zlib.error) as error:
        raise UserError(f"{path.name} is no step log of `memwall bench serve`: {error}") from error
