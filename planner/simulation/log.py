"""What a simulation writes down while it runs: appends only, everything else is computed at the end."""

from __future__ import annotations

import math
from array import array
from typing import TYPE_CHECKING

import numpy as np

from engine.scheduling import Scheduler
from planner.step_time import TICKS_PER_SECOND, Evidence

if TYPE_CHECKING:
    from planner.simulation.replica import SimulatedRequest
    from planner.simulation.slo import SLO


# The longest gap between tokens that a 64-bit log can hold: 2.5 hours.
MAX_GAP = 2**63 - 1


class SloLost(Exception):  # noqa: N818 - an outcome, not an error
    """Enough requests have missed a limit that its percentile cannot be met any more.

    Attributes:
        term: "ttft", "tpot" or "e2el".
        limit_ms: what was asked.
        misses: requests beyond the limit so far, out of `measured` in the whole load.
        time_s: simulated time.
    """

    def __init__(self, term: str, limit_ms: float, misses: int, measured: int, time_s: float) -> None:
        super().__init__(f"{term} exceeds {limit_ms:g} ms for {misses} of {measured} requests after {time_s:.0f} s")
        self.term = term
        self.limit_ms = limit_ms
        self.misses = misses
        self.measured = measured
        self.time_s = time_s


class SloWatch:
    """Counts misses as they happen, to stop a simulation whose answer is already no."""

    def __init__(self, slo: SLO, warmup_s: float, arrival_s: np.ndarray, output_tokens: np.ndarray) -> None:
        self._percentile = slo.percentile
        self._limits = slo.limits()
        self._warmup_ticks = warmup_s * TICKS_PER_SECOND
        measured = arrival_s >= warmup_s
        self._has_tpot = output_tokens > 1
        several = int((measured & self._has_tpot).sum())
        self._counts = {"ttft": int(measured.sum()), "tpot": several, "e2el": int(measured.sum())}
        self._missed: dict[str, set[int]] = {term: set() for term in self._limits}

    def first_token(self, request: SimulatedRequest, now: int) -> None:
        """Raises SloLost if this late first token settles it."""
        if "ttft" in self._limits:
            self._judge("ttft", (now - request.arrival) / TICKS_PER_SECOND, request, now)

    def aborted(self, request: SimulatedRequest, now: int) -> None:
        """A request whose client gave up misses every limit. Raises SloLost if that settles it."""
        for term in self._limits:
            if term != "tpot" or self._has_tpot[request.index]:
                self._judge(term, math.inf, request, now)

    def finished(self, request: SimulatedRequest) -> None:
        """Raises SloLost if this late or slow finish settles it."""
        now = request.finish
        if "e2el" in self._limits:
            self._judge("e2el", (now - request.arrival) / TICKS_PER_SECOND, request, now)
        if "tpot" in self._limits and request.num_output_tokens > 1:
            # To the last bit as `metrics` computes it.
            e2el_s = (now - request.arrival) / TICKS_PER_SECOND
            ttft_s = (request.first_token - request.arrival) / TICKS_PER_SECOND
            self._judge("tpot", (e2el_s - ttft_s) / (request.num_output_tokens - 1), request, now)

    def _judge(self, term: str, seconds: float, request: SimulatedRequest, now: int) -> None:
        limit_ms = self._limits[term]
        if seconds * 1e3 <= limit_ms or request.arrival < self._warmup_ticks:
            return
        self._missed[term].add(request.index)
        # The percentile interpolates between the order statistics around rank; both are beyond the limit once this
        # many are.
        count = self._counts[term]
        rank = math.floor(self._percentile / 100 * (count - 1))
        misses = len(self._missed[term])
        if misses >= count - rank:
            raise SloLost(term, limit_ms, misses, count, now / TICKS_PER_SECOND)


class RequestLog:
    """One row per request of the workload; NaN where it never got there.

    Attributes:
        queue_s: arrival to first being scheduled.
        ttft_s: arrival to first token.
        e2el_s: arrival to last token; NaN for aborted and rejected requests.
        end_s: instant of the last token or of the abort; NaN for rejected requests.
        output_tokens: tokens sampled.
        cached_tokens: prompt tokens found in the prefix cache.
        preemptions: times it was preempted.
    """

    def __init__(self, num_requests: int, watch: SloWatch | None = None) -> None:
        self.watch = watch
        self.queue_s = np.full(num_requests, np.nan)
        self.ttft_s = np.full(num_requests, np.nan)
        self.e2el_s = np.full(num_requests, np.nan)
        self.end_s = np.full(num_requests, np.nan)
        self.output_tokens = np.zeros(num_requests, np.int64)
        self.cached_tokens = np.zeros(num_requests, np.int64)
        self.preemptions = np.zeros(num_requests, np.int64)
        self.num_finished = 0
        self.num_aborted = 0
        self.num_rejected = 0

    def _write(self, request: SimulatedRequest) -> int:
        i, arrival = request.index, request.arrival
        if request.scheduled >= 0:
            self.queue_s[i] = (request.scheduled - arrival) / TICKS_PER_SECOND
        if request.first_token >= 0:
            self.ttft_s[i] = (request.first_token - arrival) / TICKS_PER_SECOND
        self.output_tokens[i] = request.num_output_tokens
        self.cached_tokens[i] = request.num_cached_tokens
        self.preemptions[i] = request.num_preemptions
        return i

    def finished(self, request: SimulatedRequest) -> None:
        i = self._write(request)
        self.e2el_s[i] = (request.finish - request.arrival) / TICKS_PER_SECOND
        self.end_s[i] = request.finish / TICKS_PER_SECOND
        self.num_finished += 1
        if self.watch is not None:
            self.watch.finished(request)

    def first_token(self, request: SimulatedRequest, now: int) -> None:
        if self.watch is not None:
            self.watch.first_token(request, now)

    def aborted(self, request: SimulatedRequest, now: int) -> None:
        i = self._write(request)
        self.end_s[i] = now / TICKS_PER_SECOND
        self.num_aborted += 1
        if self.watch is not None:
            self.watch.aborted(request, now)


class ReplicaLog:
    """What one replica did.

    Attributes:
        requests: the log of the whole simulation.
        runs: four integers each, (first, increment, steps, batch): `steps` consecutive gaps between tokens, each longer
            than the one before by `increment` ticks, in each of `batch` requests.
        changes: six floats each, (time_s, running, waiting, preemptions so far, blocks held before, blocks held after),
            whenever a request comes, starts, is preempted or ends. Blocks are NaN when one comes: the batch may then be
            in the middle of many steps. Between two changes of the batch they grow, nearly linearly, with every token.
        num_rounds, num_drafted, num_accepted: of speculation.
        evidence_ticks: time of the steps by what their times rest on, where that differs between steps.
    """

    def __init__(self, requests: RequestLog) -> None:
        self.requests = requests
        self.runs = array("q")
        self.changes = array("d")
        self.num_rounds = 0
        self.num_drafted = 0
        self.num_accepted = 0
        self.evidence_ticks: dict[Evidence, int] = {}

    def rested(self, evidence: Evidence, ticks: int) -> None:
        """So long were steps whose times rest on this."""
        if ticks:
            self.evidence_ticks[evidence] = self.evidence_ticks.get(evidence, 0) + ticks

    def decoded(self, first: int, increment: int, steps: int, batch: int) -> None:
        self.runs.extend((first, increment, steps, batch))

    def verified(self, rounds: int, drafted: int, accepted: int) -> None:
        self.num_rounds += rounds
        self.num_drafted += drafted
        self.num_accepted += accepted

    def changed(self, now: int, scheduler: Scheduler, used_before: float, used_after: float) -> None:
        running, waiting = len(scheduler.running), len(scheduler.waiting)
        time_s = now / TICKS_PER_SECOND
        self.changes.extend((time_s, running, waiting, scheduler.num_preemptions, used_before, used_after))
