"""What an engine that we do not run did: one row per request, seen from outside."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from planner.errors import UserError
from planner.workload import Workload

# Clocks are rounded when they are written down; what is out of order by no more than this is not.
CLOCK_SLACK_S = 2e-3


class RequestTimes:
    """What follows from when requests arrived and had their first and last tokens."""

    arrival_s: np.ndarray
    output_tokens: np.ndarray
    first_token_s: np.ndarray
    last_token_s: np.ndarray

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def ttft_s(self) -> np.ndarray:
        """float64 [n]: arrival to first token."""
        return self.first_token_s - self.arrival_s

    @property
    def e2el_s(self) -> np.ndarray:
        """float64 [n]: arrival to last token."""
        return self.last_token_s - self.arrival_s

    @property
    def tpot_s(self) -> np.ndarray:
        """float64 [n]: seconds per output token after the first; NaN for answers of one token."""
        gaps = (self.output_tokens - 1).astype(np.float64)
        gaps[gaps == 0] = np.nan
        return (self.last_token_s - self.first_token_s) / gaps


@dataclass(frozen=True, eq=False)
class ServedRun(RequestTimes):
    """Answered requests in order of arrival; seconds since the first arrival.

    Attributes:
        name: the file, for reports.
        arrival_s: float64 [n], when the client sent the request, or the engine's server took it.
        input_tokens, output_tokens: int64 [n], at least 1.
        first_token_s, last_token_s: float64 [n].
        scheduled_s: float64 [n], when a step first had the request, or None where nobody recorded it.
        itls: gaps between output events in seconds, one array per request, or None.
        num_failed: requests that got no answer, left out.
        notes: what reading changed, one sentence each.
        told_by: the fields or columns that say how long tokens took, for reports.
        model: what its benchmark says it asked for, which may be any name that the server gave its model.
    """

    name: str
    arrival_s: np.ndarray
    input_tokens: np.ndarray
    output_tokens: np.ndarray
    first_token_s: np.ndarray
    last_token_s: np.ndarray
    scheduled_s: np.ndarray | None = None
    itls: tuple[np.ndarray, ...] | None = None
    num_failed: int = 0
    notes: tuple[str, ...] = ()
    told_by: str = ""
    model: str | None = None

    def workload(self) -> Workload:
        """The same arrivals and lengths, for the simulator."""
        return Workload(self.name, self.arrival_s, self.input_tokens, self.output_tokens)


def served_run(
    name: str,
    arrival_s: np.ndarray,
    input_tokens: np.ndarray,
    output_tokens: np.ndarray,
    first_token_s: np.ndarray,
    last_token_s: np.ndarray,
    *,
    scheduled_s: np.ndarray | None = None,
    itls: tuple[np.ndarray, ...] | None = None,
    num_failed: int = 0,
    notes: tuple[str, ...] = (),
    told_by: str = "",
    model: str | None = None,
) -> ServedRun:
    """A run from columns in any order and of any clock: sorted by arrival, counted from the first.

    The order of the instants of each request is the reader's to check, as it knows the lines.
    """
    if not len(arrival_s):
        raise UserError(f"{name} has no answered request")
    order = np.argsort(arrival_s, kind="stable")
    start = float(arrival_s[order[0]])

    def sorted_clock(values: np.ndarray) -> np.ndarray:
        return np.asarray(values, np.float64)[order] - start

    arrival = sorted_clock(arrival_s)
    # A clock that was rounded may say "before": then it was at once.
    first = np.maximum(sorted_clock(first_token_s), arrival)
    last = np.maximum(sorted_clock(last_token_s), first)
    run = ServedRun(
        name,
        arrival,
        np.asarray(input_tokens, np.int64)[order],
        np.asarray(output_tokens, np.int64)[order],
        first,
        last,
        num_failed=num_failed,
        notes=notes,
        told_by=told_by,
        model=model,
    )
    if scheduled_s is not None:
        run = replace(run, scheduled_s=np.clip(sorted_clock(scheduled_s), arrival, first))
    if itls is not None:
        run = replace(run, itls=tuple(itls[i] for i in order))
    return run
