"""A replica whose engine works one step ahead: it launches the next step while one is running.

    host     turn: launch n + 1 | wait for n, update it | turn: launch n + 2 | wait for n + 1, update it | turn: ...
    device   ...        step n                          |       step n + 1                               | step n + 2

The loop of the engine, as `engine.bench.replay` and `engine.core` have it. A turn takes in what has come, schedules a
step and launches it; unless that was the only step in flight, it then waits for the oldest one and updates it, and the
next turn follows. What comes while the host is inside a launch or waits is seen by the next turn. So a step is
scheduled when the last but one has ended, and begins on the device when the last one has, or when it is launched.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import simpy

from engine.scheduling import Step
from planner.simulation.replica import STEP_END, STEP_START, Replica, SimulatedRequest, Timer
from planner.step_time import DecodeRun, floored

_DEPTH = 2


@dataclass(slots=True)
class _Flight:
    """A launched step, and when it ends on the device."""

    step: Step
    end: int


class PipelinedReplica(Replica):
    """Runs steps with two of them in flight. Plain decoding only.

    A step that is decided at D, behind one that ends on the device at e, ends at

        max(e + ticks, D + wait_ticks + ticks, D + launched_ticks) = max(e + ticks, D + alone_ticks)

    where alone_ticks is what it takes with nothing in flight: the device can begin after wait_ticks, and the last of a
    step's kernels is launched after launched_ticks. A step's tokens are there when it has ended on the device
    and the host, which may still be launching the next one, looks at them.

    Of a step of decodes alone_ticks is the host's time for its launch and then ticks, so that it begins on the device
    when the one before ends, or when it is launched.

    A leap of m steps begins in a turn, with step n in flight, and ends in the turn in which step n + m is in flight.
    Let D(k) be the turn that schedules step k, d(k) its time on the device and h the host's time for a launch. Step k
    begins on the device at max(end of k - 1, D(k) + h), and that is just when the turn D(k + 1) follows, so that

        D(k + 2) = max(end of k, D(k + 1) + h) = D(k + 1) + max(d(k), h)

    whichever of host and device is slower.
    """

    _keeps_last_token = True

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._flights: deque[_Flight] = deque()
        self._gave_up: list[SimulatedRequest] = []
        # Of the leap under way, `_run` has the times between turns, `_began` is the first turn within it, and this
        # has its steps' times on the device.
        self._device_run: DecodeRun | None = None

    def abort(self, request: SimulatedRequest) -> None:
        """The client gives up now: the next turn ends the request, unless it has ended by then."""
        if request.status.is_finished:
            return
        self._gave_up.append(request)
        if self._run is not None:
            self._cut_at_next_boundary()

    # ---- the engine's loop -----------------------------------------------------------------------------------------

    def _start(self, _event: simpy.Event | None = None) -> None:
        """A turn: everything that happens at this instant has happened."""
        self._starting = False
        env, flights = self.env, self._flights
        if self._gave_up:
            self._end_given_up()
        launched = env.now
        while len(flights) < _DEPTH:
            if self.leap and flights and self._leap():
                return
            step = self._schedule()
            if step is None:
                break
            host = self.step_time.host_ticks(step.shape)
            launched = env.now + host
            ticks = self.step_time.ticks(step.shape)
            begin = env.now + self.step_time.wait_ticks(step.shape)
            if flights:
                begin = max(begin, flights[-1].end)
            ticks = self._run_at_heat(step.shape, ticks, begin)
            self._note_step(step, ticks)
            flights.append(_Flight(step, max(begin + ticks, env.now + self.step_time.launched_ticks(step.shape))))
            if host and len(flights) < _DEPTH:
                Timer(env, host, STEP_START, self._start)
                return
        if flights:
            self._wake(max(launched, flights[0].end))
        else:
            self._idle = True

    def _wake(self, instant: int) -> None:
        self._generation += 1
        Timer(self.env, instant - self.env.now, STEP_END, self._end, self._generation)

    def _end(self, event: Timer) -> None:
        """The host has the tokens of the oldest step in flight, or a leap is over."""
        if event.generation != self._generation:
            return
        if self._run is not None:
            self._land()
        else:
            self._update(self._flights.popleft().step)
        if self.env.peek() > self.env.now:
            self._start()
        else:
            self._start_soon()

    def _update(self, step: Step) -> None:
        finished = self.scheduler.update(step)
        self._decoded(step.decode_requests, self.env.now)
        self._prefilled(step)
        if finished:
            self._finish(finished)

    def _end_given_up(self) -> None:
        now, scheduler = self.env.now, self.scheduler
        gave_up, self._gave_up = self._gave_up, []
        for request in gave_up:
            if scheduler.abort(request):
                used = scheduler.kv.pool.num_used
                self.log.changed(now, scheduler, used, used)
                self.log.requests.aborted(request, now)

    # ---- leaps -----------------------------------------------------------------------------------------------------

    def _leap(self) -> bool:
        """Begin a leap, if there is one to make."""
        steps = self.scheduler.steady_steps()
        if steps < 2:
            return False
        self._device_run, host = self._decode_run(steps)
        self._run = floored(self._device_run, host)
        self._run_steps = self._run.steps
        self._began = max(self._flights[0].end, self.env.now + host)
        self._wake(self._turn_after(self._run_steps))
        return True

    def _leap_begin(self, host: int) -> int:
        return max(self._flights[-1].end, self.env.now + host)

    def _begin_after(self, begin: int, ticks: int, host: int) -> int:
        return begin + max(ticks, host)

    def _turn_after(self, steps: int) -> int:
        """When the turn comes that follows this many of the leap's steps."""
        return self._began + self._run.cumulative(steps - 1)

    def _cut_at_next_boundary(self) -> None:
        """End the leap under way with the next turn."""
        elapsed = self.env.now - self._began
        steps = 1 + self._run.steps_until(elapsed) if elapsed > 0 else 1
        if steps < self._run_steps:
            self._run_steps = steps
            self._wake(self._turn_after(steps))

    def _land(self) -> None:
        steps, running, flight = self._run_steps, self.scheduler.running, self._flights[0]
        self._decoded(running, self._began)
        if steps > 1:
            for first, increment, count in self._run.segments(steps - 1):
                self.log.decoded(first, increment, count, len(running))
        self.scheduler.advance(steps)
        now, device = self.env.now, self._device_run
        self._note_run(device, steps)
        for request in running:
            request.last_token = now
        flight.end = now + device.cumulative(steps) - device.cumulative(steps - 1)
        self._run = self._device_run = None
