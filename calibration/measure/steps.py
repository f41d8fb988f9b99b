"""Steps of a wished shape, run by the engine itself: scheduled, uploaded, launched, sampled, updated.

Requests are made up, with slots and pages of their own, and put into the scheduler as if they had been running for
long. Before every step they are set back, so that each step has the same shape:

    decode, or chunk behind a context   the same request again: its computed tokens are set back to the context, and
                                        the same pages and positions are written anew
    prompt without a context            a new request each time, of one output token: it is admitted, with its
                                        sampling parameters, computed, and ends with its step

Setting back takes place before the clock of the step starts, and costs a fraction of a microsecond per request. With
two steps in flight the device does not wait for it.

Steps of different shapes can follow each other. The requests of all of them then run all the time, and those that have
no part in a step are parked: all their tokens count as computed, so that the scheduler passes them over.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.measure.grid import Point
from calibration.measure.pool import fill_pool, shuffle_pool
from engine.bench.record import rounded
from engine.bench.replay import make_sequence
from engine.sequence import Sequence

if TYPE_CHECKING:
    from engine.core import EngineCore, StepRecord

_ENDLESS = 1 << 40
_TEMPERATURE = 1.0


@dataclass(frozen=True)
class Effort:
    """How often a step is run.

    Attributes:
        settling: steps that are not counted: kernels are compiled, the pipeline fills.
        least, most: periods of steps one behind the other; between them as many as fit `seconds`.
        alone: steps with nothing in flight.
        slow_s: a step that takes as long is run `least_slow` times and once alone: long steps differ little.
        spread: of the periods, between their quantiles of 10 and 90 % over the median: where it is more, something else
            went on beside them. retries: how often all is then measured again; what spread least is kept.
        ahead: steps that are launched while the GPU is busy with others.
    """

    settling: int = 2
    least: int = 5
    most: int = 30
    seconds: float = 0.12
    alone: int = 4
    slow_s: float = 0.06
    least_slow: int = 3
    spread: float = 0.1
    retries: int = 2
    ahead: int = 8


@dataclass(frozen=True)
class _Held:
    """A request that is in every step: `query` tokens behind `context`."""

    sequence: Sequence
    query: int
    context: int

    def set_back(self) -> None:
        """To before the step. A token that a step in flight samples counts as known, as the scheduler counts it."""
        sequence = self.sequence
        sequence.num_computed_tokens = self.context
        sequence.num_tokens = self.context + self.query - sequence.num_pending_tokens

    def park(self) -> None:
        """As if nothing of it were left to compute, until it is set back."""
        self.set_back()
        self.sequence.num_computed_tokens = self.context + self.query


@dataclass(frozen=True)
class _Requests:
    """What a step is made of: requests that are there already, and prompts of new ones."""

    held: tuple[_Held, ...]
    prompts: tuple[list[int], ...]


class StepRunner:
    """Runs and times steps of any shape on an engine that has nothing else to do.

    Args:
        core: without requests and without prefix cache. Its pool is filled and shuffled.
    """

    def __init__(self, core: EngineCore, *, seed: int = 0, effort: Effort | None = None) -> None:
        self._core, self._effort = core, effort or Effort()
        self._random = np.random.default_rng(seed)
        self._num_requests = 0
        self._requests: dict[tuple, _Requests] = {}  # by point
        self._of_last_step: _Requests | None = None
        shuffle_pool(core, seed)
        fill_pool(core, seed)

    # ---- requests ----------------------------------------------------------------------------------------------------

    def begin(self, *points: Point) -> None:
        """Make the requests of steps, each of which is then prepared in any order and as often as one likes.

        Raises:
            UserError: the engine has no room for them.
        """
        requests = {key: self._made(point) for key, point in {point.key: point for point in points}.items()}
        held = [each for of_step in requests.values() for each in of_step.held]
        for each in held:
            each.sequence.num_computed_tokens = each.context
        if held:
            self._core.adopt([each.sequence for each in held])
        for each in held:
            each.park()
        self._requests = requests

    def _made(self, point: Point) -> _Requests:
        held, prompts = [], []
        for context in point.contexts:
            sequence = self._sequence([*self._tokens(1)] * context, _ENDLESS)
            sequence.append(self._tokens(1))  # sampled, and not yet computed
            sequence.num_tokens, sequence.num_output_tokens = context + 1, 1
            held.append(_Held(sequence, 1, context))
        for query, context in point.prefills:
            tokens = self._tokens(query)
            if context:
                held.append(_Held(self._sequence([tokens[0]] * context + tokens, _ENDLESS), query, context))
            else:
                prompts.append(tokens)
        return _Requests(tuple(held), tuple(prompts))

    def prepare(self, point: Point) -> None:
        """Make the scheduler's next step the wished one, of those that were begun."""
        requests, last = self._requests[point.key], self._of_last_step
        if last is not None and last is not requests:
            for held in last.held:
                held.park()
        for held in requests.held:
            held.set_back()
        for tokens in requests.prompts:
            self._core.add(self._sequence(tokens, 1))
        self._of_last_step = requests

    def end(self) -> None:
        """Give slots and pages back."""
        self._core.settle()
        for requests in self._requests.values():
            for held in requests.held:
                self._core.abort(held.sequence)
        self._requests, self._of_last_step = {}, None

    def _tokens(self, count: int) -> list[int]:
        return self._random.integers(0, self._core.model_config.vocab_size, count).tolist()

    def _sequence(self, tokens: list[int], max_output_tokens: int) -> Sequence:
        self._num_requests += 1
        sequence = make_sequence(self._core, self._num_requests, tokens, 1, _TEMPERATURE)
        sequence.max_output_tokens = max_output_tokens  # though it never goes beyond its pages
        return sequence

    # ---- times -------------------------------------------------------------------------------------------------------

    def measure(self, point: Point) -> dict[str, Any]:
        """A point of a profile.

        step_s is the median period of steps one behind the other, with as many in flight as the engine has, mean_s
        their mean; low_s and high_s are the quantiles of 10 and 90 %. alone_s is from before scheduling to the tokens'
        arrival, with nothing else in flight. host_s is the CPU's time to schedule, launch and update, as the engine
        counts it: with requests admitted and, for prompts without a context, ended. Launching large steps one behind
        the other may wait for room in the driver's queue, which is not the CPU's work; so it is the lesser of the
        medians with and without company.

        What exists is kept from Python's garbage collector, for good: call it within `quiet_collector`.

        Raises:
            UserError: the engine has no room for the step.
            RuntimeError: the engine ran other steps than the wished ones.
        """
        found = []
        for _ in range(1 + self._effort.retries):
            found.append(self._measured(point))
            if _spread(found[-1]) <= self._effort.spread:
                break
        return min(found, key=_spread)

    def ahead_s(self, point: Point, before: Point) -> float | None:
        """The median time on the GPU of steps that the CPU had launched before the GPU came to them; None without one.

        Args:
            before: goes before each of them, and takes the GPU longer than the CPU takes to launch a step of `point`.

        Raises:
            As `run`.
        """
        records = self.run([before, point] * self._effort.ahead + [before])[1::2]
        seconds = [record.gpu_s for record in records if record.gpu_s is not None]
        return rounded(statistics.median(seconds)) if seconds else None

    def run(self, points: Many[Point]) -> list[StepRecord]:
        """Steps of these shapes in this order, one behind the other, with as many in flight as the engine has.

        Raises:
            UserError: the engine has no room for all their requests at once.
            RuntimeError: the engine ran other steps than the wished ones.
        """
        core = self._core
        self.begin(*points)
        gc.freeze()
        core.step_log = log = []
        for point in points:
            self.prepare(point)
            core.step()
        core.settle()
        core.step_log = None
        self.end()
        if len(log) != len(points):
            raise RuntimeError(f"the engine ran {len(log)} steps where {len(points)} were to be measured")
        for record, point in zip(log, points, strict=True):
            _check(record, point)
        return log

    def _measured(self, point: Point) -> dict[str, Any]:
        self.begin(point)
        gc.freeze()  # a collection that walks all there is takes longer than a step
        records = self._in_company(point)
        is_slow = records[1].end_s - records[0].end_s > self._effort.slow_s
        alone = self._alone(point, 1 if is_slow else self._effort.alone) if self._core.depth > 1 else records
        self._core.step_log = None
        self.end()
        for record in (*records, *alone):
            _check(record, point)
        periods_s = _periods(records) if self._core.depth > 1 else [each.end_s - each.start_s for each in records]
        gpu_s = [record.gpu_s for record in records if record.gpu_s is not None]
        low_s, high_s = np.quantile(periods_s, (0.1, 0.9))
        host_s = [statistics.median(record.host_s for record in some) for some in (records, alone)]
        return {
            "prefills": [list(chunk) for chunk in point.prefills],
            "decodes": [list(run) for run in point.decodes],
            "step_s": rounded(statistics.median(periods_s)),
            "mean_s": rounded(statistics.fmean(periods_s)),
            "low_s": rounded(float(low_s)),
            "high_s": rounded(float(high_s)),
            "samples": len(periods_s),
            "gpu_s": rounded(statistics.median(gpu_s)) if gpu_s else None,
            "alone_s": rounded(statistics.median(record.end_s - record.start_s for record in alone)),
            "host_s": rounded(min(host_s)),
            "graph_size": records[0].graph_size,
        }

    def _in_company(self, point: Point) -> list[StepRecord]:
        """Steps one behind the other, without those at either end: the first are not in a stream yet, and behind the
        last none is launched."""
        core, effort = self._core, self._effort
        core.step_log = log = []
        # Behind the loop another is completed; the last one is dropped, and n periods lie between n + 1 steps.
        least, most = effort.settling + effort.least + 1, effort.settling + effort.most + 1
        started = None
        while len(log) < least or (len(log) < most and time.perf_counter() - started < effort.seconds):
            self.prepare(point)
            core.step()
            if started is None and len(log) >= effort.settling:
                started = time.perf_counter()
                if len(log) > 1 and log[-1].end_s - log[-2].end_s > effort.slow_s:
                    least = effort.settling + min(effort.least, effort.least_slow) + 1
        core.settle()
        return log[effort.settling : -1]

    def _alone(self, point: Point, count: int) -> list[StepRecord]:
        """Steps that are launched when the device has nothing to do."""
        core = self._core
        core.step_log = log = []
        for _ in range(count):
            self.prepare(point)
            core.step()
            core.settle()
        return log


def _periods(records: Many[StepRecord]) -> list[float]:
    return [after.end_s - before.end_s for before, after in pairwise(records)]


def _spread(measured: dict[str, Any]) -> float:
    return (measured["high_s"] - measured["low_s"]) / measured["step_s"]


def _check(record: StepRecord, point: Point) -> None:
    shape = record.shape
    if shape.prefills != list(point.prefills) or shape.decode_contexts != point.contexts or record.num_preempted:
        raise RuntimeError(f"the engine ran {shape!r} where {point} was to be measured")
