"""What a simulation writes down while it runs: appends only, everything else is computed at the end."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import numpy as np

from engine.scheduling import Scheduler
from planner.step_time import TICKS_PER_SECOND

if TYPE_CHECKING:
    from planner.simulation.replica import SimulatedRequest


class RequestLog:
    """One row per request of the workload; NaN where it never got there.

    Attributes:
        queue_s: arrival to first being scheduled.
        ttft_s: arrival to first token.
        e2el_s: arrival to last token; NaN for aborted and rejected requests.
        output_tokens: tokens sampled.
        cached_tokens: prompt tokens found in the prefix cache.
        preemptions: times it was preempted.
    """

    def __init__(self, num_requests: int) -> None:
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

    def aborted(self, request: SimulatedRequest, now: int) -> None:
        i = self._write(request)
        self.end_s[i] = now / TICKS_PER_SECOND
        self.num_aborted += 1


class ReplicaLog:
    """What one replica did.

    Attributes:
        runs: four integers each, (first, increment, steps, batch): `steps` consecutive gaps between tokens, each longer
            than the one before by `increment` ticks, in each of `batch` requests.
        samples: five floats each, (time_s, running, waiting, used blocks, preemptions so far), whenever the batch
            changed.
        num_drafted, num_accepted, num_rounds: of speculation.
    """

    def __init__(self, requests: RequestLog) -> None:
        self.requests = requests
        self.runs = array("q")
        self.samples = array("d")
        self.num_rounds = 0
        self.num_drafted = 0
        self.num_accepted = 0

    def decoded(self, first: int, increment: int, steps: int, batch: int) -> None:
        self.runs.extend((first, increment, steps, batch))

    def verified(self, drafted: int, accepted: int) -> None:
        self.num_rounds += 1
        self.num_drafted += drafted
        self.num_accepted += accepted

    def finished(self, request: SimulatedRequest) -> None:
        self.requests.finished(request)

    def aborted(self, request: SimulatedRequest, now: int) -> None:
        self.requests.aborted(request, now)

    def sample(self, now: int, scheduler: Scheduler) -> None:
        used = scheduler.kv.pool.num_used
        self.samples.extend(
            (now / TICKS_PER_SECOND, len(scheduler.running), len(scheduler.waiting), used, scheduler.num_preemptions)
        )
