"""One replica: the engine's scheduler, driven by predicted step times.

Time advances by engine steps. While the batch does not change, the replica leaps over many of them at once; whatever
happens in between cuts the leap at a step boundary. Leaping and stepping give identical results.
"""

from __future__ import annotations

import math

import simpy

from engine.scheduling import Request, RequestStatus, Scheduler, Step, StepShape
from planner.profile.clock import Heat
from planner.simulation.log import MAX_GAP, ReplicaLog
from planner.step_time import TICKS_PER_SECOND, DecodeRun, Evidence, StepTime, TableRun, delayed, led_by, listed

# Order of events at one instant: a step's end is seen by what arrives at that very instant, and the next step starts
# only after everything has arrived.
STEP_END = 0
ARRIVAL = 1
ABORT = 2
STEP_START = 3


class Timer(simpy.Event):
    """Calls back after a delay, with a chosen place among the events of that instant."""

    __slots__ = ("generation",)

    def __init__(self, env: simpy.Environment, delay: int, priority: int, callback, generation: int = 0) -> None:
        # As simpy.Timeout does: what Event.__init__ sets, already triggered.
        self.env = env
        self.callbacks = [callback]
        self._value = None
        self._ok = True
        self._defused = False
        self.generation = generation
        env.schedule(self, priority, delay)


class SimulatedRequest(Request):
    """A request with the instants of its life, in ticks; -1 until they happen.

    Attributes:
        index: its place in the workload.
        accepted: how many drafts each of its verification rounds would accept, None without speculation.
        round: the next of these rounds.
        last_token: when it last sampled, where that is not simply the end of the previous step.
    """

    __slots__ = ("accepted", "arrival", "finish", "first_token", "index", "last_token", "round", "scheduled")

    def __init__(self, index: int, num_prompt_tokens: int, max_output_tokens: int, block_hashes, arrival: int) -> None:
        super().__init__(index, num_prompt_tokens, max_output_tokens, block_hashes)
        self.index = index
        self.arrival = arrival
        self.scheduled = -1
        self.first_token = -1
        self.last_token = -1
        self.finish = -1
        self.accepted: list[int] | None = None
        self.round = 0


class Replica:
    """Runs steps back to back while it has requests, one at a time."""

    # Whether every request keeps the instant of its last token; otherwise that is the end of the previous step.
    _keeps_last_token = False

    def __init__(
        self,
        env: simpy.Environment,
        scheduler: Scheduler,
        step_time: StepTime,
        log: ReplicaLog,
        num_speculative_tokens: int = 0,
        leap: bool = True,
    ) -> None:
        self.env = env
        self.scheduler = scheduler
        self.step_time = step_time
        self.log = log
        self.num_speculative_tokens = num_speculative_tokens
        if num_speculative_tokens:
            self._keeps_last_token = True
        self.leap = leap
        self._idle = True
        self._starting = False
        # At most one of the two is under way, since `_began`.
        self._step: Step | None = None
        self._run: DecodeRun | None = None
        self._run_steps = 0
        self._began = 0
        # What each step rests on is noted only where steps differ in it.
        self._notes_evidence = step_time.evidence_varies
        self._run_inside = 0
        self._run_host = 0
        # Of the device, where its clock depends on it.
        clock = step_time.clock
        self._heat = None if clock is None else Heat(clock.tau_s * TICKS_PER_SECOND)
        # SimPy cannot cancel an event; a timer of an older generation is stale.
        self._generation = 0

    @property
    def num_outstanding(self) -> int:
        return self.scheduler.num_outstanding

    # ---- what the outside does -------------------------------------------------------------------------------------

    def submit(self, request: SimulatedRequest) -> None:
        """A request arrives now."""
        scheduler = self.scheduler
        blocked = bool(scheduler.waiting) or len(scheduler.running) >= scheduler.config.max_num_seqs
        scheduler.add(request)
        self.log.changed(self.env.now, scheduler, math.nan, math.nan)
        if self._idle:
            self._idle = False
            self._start_soon()
        elif self._run is not None and not blocked:
            # It may join the batch at the next step boundary. Behind a blocked queue it could not.
            self._cut_at_next_boundary()

    def abort(self, request: SimulatedRequest) -> None:
        """The client gives up now, unless the request has ended."""
        if request.status.is_finished:
            return
        if self._run is not None:
            self._interrupt_run()
        now = self.env.now
        self.scheduler.abort(request)
        used = self.scheduler.kv.pool.num_used
        self.log.changed(now, self.scheduler, used, used)
        self.log.requests.aborted(request, now)

    # ---- steps -----------------------------------------------------------------------------------------------------

    def _start_soon(self) -> None:
        """Start a step after everything else that happens at this instant."""
        if not self._starting:
            self._starting = True
            Timer(self.env, 0, STEP_START, self._start)

    def _start(self, _event: simpy.Event | None = None) -> None:
        self._starting = False
        scheduler = self.scheduler
        if self.leap:
            steps = scheduler.steady_steps()
            if steps > 1:
                run, self._run_host = self._decode_run(steps)
                self._run = run = delayed(run, self._run_host)
                self._run_steps = run.steps
                self._wait(run.cumulative(run.steps))
                return
        self._step = step = self._schedule()
        if step is None:
            self._idle = True
        else:
            ticks, host = self.step_time.ticks(step.shape), self.step_time.host_ticks(step.shape)
            wait = self.step_time.wait_ticks(step.shape)
            ticks = self._run_at_heat(step.shape, ticks, self.env.now + wait)
            self._note_step(step, ticks)
            # The host looks for the tokens when its launch is over.
            self._wait(max(host, wait + ticks, self.step_time.launched_ticks(step.shape)))

    def _run_at_heat(self, shape: StepShape, ticks: int, begin: int) -> int:
        """What a step takes that begins on the device then, at the heat that it has; it is heated by that."""
        heat = self._heat
        if heat is None:
            return ticks
        ticks = self.step_time.heated_ticks(shape, ticks, heat.at(begin))
        heat.ran(begin, begin + ticks, self.step_time.heating(shape))
        return ticks

    def _decode_run(self, steps: int) -> tuple[DecodeRun, int]:
        """The next `steps` steps of the running requests on the device, or fewer, and the host's time for each."""
        contexts = [request.num_computed_tokens for request in self.scheduler.running]
        shape = StepShape(decode_contexts=contexts)
        host = self.step_time.host_ticks(shape)
        run = self.step_time.decode_run(contexts, steps)
        if self._heat is not None:
            run = self._at_its_heat(run, shape, host)
        if self._notes_evidence:
            self._run_inside = self.step_time.steps_inside(contexts, run.steps)
        return run, host

    def _at_its_heat(self, run: DecodeRun, shape: StepShape, host: int) -> DecodeRun:
        """The steps of a leap that begins now, as long as they take on a device that is still hot from prompt steps.

        It cools down while it decodes, so that no step feels the heat behind one that does not.
        """
        is_felt = self.step_time.clock.is_felt_by_decodes
        begin = self._leap_begin(host)
        heat = self._heat.at(begin)
        hot: list[int] = []
        for ticks in listed(run):
            if not is_felt(heat):
                return led_by(hot, run)
            hot.append(self.step_time.heated_ticks(shape, ticks, heat))
            begin = self._begin_after(begin, hot[-1], host)
            heat = self._heat.at(begin)
        return TableRun(hot)

    def _leap_begin(self, host: int) -> int:
        """When the first step of a leap that is decided upon now begins on the device."""
        return self.env.now + host

    def _begin_after(self, begin: int, ticks: int, host: int) -> int:
        """When the next step of a leap begins on the device, after one that began then and takes so long."""
        return begin + ticks + host

    def _note_step(self, step: Step, ticks: int) -> None:
        """Note what the time of a step that begins now rests on."""
        if self._notes_evidence:
            self.log.rested(self.step_time.evidence_of(step.shape), ticks)

    def _note_run(self, run: DecodeRun, steps: int, host: int = 0) -> None:
        """The same of the first steps of a leap, less `host` ticks of each."""
        if self._notes_evidence and steps:
            inside = min(steps, self._run_inside)
            ticks_inside = run.cumulative(inside) - host * inside if inside else 0
            self.log.rested(Evidence.INTERPOLATED, ticks_inside)
            self.log.rested(Evidence.EXTRAPOLATED, run.cumulative(steps) - host * steps - ticks_inside)

    def _schedule(self) -> Step | None:
        """The scheduler's next step, with what it admitted and preempted noted; None if it has nothing to run."""
        scheduler, now = self.scheduler, self.env.now
        while True:
            step = scheduler.schedule()
            for request in step.preempted:
                if request.first_token >= 0 and request.last_token < 0:
                    request.last_token = now
            for request in step.admitted:
                if request.scheduled < 0:
                    request.scheduled = now
            if step.admitted or step.preempted:
                used = scheduler.kv.pool.num_used
                self.log.changed(now, scheduler, used, used)
            if not step.is_empty:
                return step
            if not step.preempted:
                return None
            # The only running request preempted itself; it is now at the head of the queue.

    def _wait(self, ticks: int) -> None:
        self._began = self.env.now
        self._generation += 1
        Timer(self.env, ticks, STEP_END, self._end, self._generation)

    def _cut_at_next_boundary(self) -> None:
        """End the leap under way with the step that is in flight now."""
        steps = self._run.steps_until(self.env.now - self._began)
        if steps < self._run_steps:
            self._run_steps = steps
            self._generation += 1
            end = self._began + self._run.cumulative(steps)
            Timer(self.env, end - self.env.now, STEP_END, self._end, self._generation)

    def _interrupt_run(self) -> None:
        """Turn the leap under way into its completed steps and the single step that is in flight now."""
        run, began, now = self._run, self._began, self.env.now
        done = run.steps_until(now - began)
        end = began + run.cumulative(done)  # the next step boundary, or this very instant
        if end > now:
            done -= 1
        if done:
            self._advance(done)
        self._run = None
        self._generation += 1
        if end == now:
            self._start_soon()
        else:
            # It began before whatever arrived since, and admitted nobody.
            self._step = self.scheduler.schedule(admit=False)
            self._note_step(self._step, run.cumulative(done + 1) - run.cumulative(done) - self._run_host)
            self._began = began + run.cumulative(done)
            Timer(self.env, end - now, STEP_END, self._end, self._generation)

    def _end(self, event: Timer) -> None:
        if event.generation != self._generation:
            return
        if self._run is not None:
            self._advance(self._run_steps)
            self._run = None
        else:
            self._update(self._step)
            self._step = None
        if self.env.peek() > self.env.now:
            self._start()
        else:
            self._start_soon()

    def _advance(self, steps: int) -> None:
        scheduler = self.scheduler
        batch = len(scheduler.running)
        self._note_run(self._run, steps, self._run_host)
        for first, increment, count in self._run.segments(steps):
            self.log.decoded(first, increment, count, batch)
        finished = scheduler.advance(steps)
        if finished:
            self._finish(finished)

    def _update(self, step: Step) -> None:
        now = self.env.now
        if self.num_speculative_tokens:
            finished = self._update_speculative(step)
        else:
            live = len(step.decode_requests)
            if step.detached:
                live -= sum(request in step.detached for request in step.decode_requests)
            if live:
                self.log.decoded(now - self._began, 0, 1, live)
            finished = self.scheduler.update(step)
        self._prefilled(step)
        if finished:
            self._finish(finished)

    def _prefilled(self, step: Step) -> None:
        for request, (count, context) in zip(step.prefill_requests, step.shape.prefills, strict=True):
            if context + count >= request.num_prefill_tokens and request.status is not RequestStatus.ABORTED:
                self._sampled_after_prefill(request)

    def _sampled_after_prefill(self, request: SimulatedRequest) -> None:
        now = self.env.now
        if request.first_token < 0:
            request.first_token = now
            self.log.requests.first_token(request, now)
        else:
            self.log.decoded(min(now - request.last_token, MAX_GAP), 0, 1, 1)
        request.last_token = now if self._keeps_last_token else -1

    def _update_speculative(self, step: Step) -> list[SimulatedRequest]:
        scheduler, k = self.scheduler, self.num_speculative_tokens
        num_sampled = []
        for request, (query, _) in zip(step.verify_requests, step.shape.verifies, strict=True):
            accepted = request.accepted[request.round]
            request.round += 1
            num_sampled.append(accepted + 1 if accepted < query else query)
        if num_sampled:
            rounds = len(num_sampled)
            self.log.verified(rounds, sum([q for q, _ in step.shape.verifies]) - rounds, sum(num_sampled) - rounds)
        finished = scheduler.update(step, num_sampled)
        self._decoded(step.decode_requests + step.verify_requests, self.env.now)
        for request in step.requests():
            if request.status is RequestStatus.RUNNING:
                scheduler.set_drafts(request, k)
        return finished

    def _decoded(self, requests: list[SimulatedRequest], now: int) -> None:
        """Requests that keep their last token's instant have got another token."""
        # Nearly all of them sampled at the end of the previous step too, and see the same gap.
        gaps: dict[int, int] = {}
        for request in requests:
            if request.status is not RequestStatus.ABORTED:
                gap = now - request.last_token
                gaps[gap] = gaps.get(gap, 0) + 1
                request.last_token = now
        for gap, batch in gaps.items():
            self.log.decoded(min(gap, MAX_GAP), 0, 1, batch)

    def _finish(self, finished: list[SimulatedRequest]) -> None:
        now, scheduler = self.env.now, self.scheduler
        for request in finished:
            request.finish = now
            self.log.requests.finished(request)
        self.log.changed(now, scheduler, scheduler.num_used_before_release, scheduler.kv.pool.num_used)
