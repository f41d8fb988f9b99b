"""The simulator against the engine's own loop: every instant of every request's life, to the tick.

`engine.core.EngineCore` and `engine.bench.replay` run as they are, on a clock that counts the simulator's ticks. Only
the model is missing: a device takes a step-time model's ticks for each step, and the host its host ticks.
"""

import contextlib
import math
from collections import Counter, deque
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import engine.bench.replay
import engine.core
from engine.bench.replay import replay
from engine.core import EngineCore
from engine.sampling import sampling_requests
from engine.sampling_params import SamplingParams
from engine.scheduling import KVCacheConfig, Scheduler, SchedulerConfig, StepShape
from engine.sequence import Sequence
from planner.simulation import SimulationOptions, System, simulate
from planner.simulation.log import RequestLog
from planner.step_time import TICKS_PER_SECOND, StepTime
from planner.workload import Workload

US = TICKS_PER_SECOND // 10**6
EXAMPLES = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=400)


# ---- an engine without a model -------------------------------------------------------------------------------------


class TickClock:
    """Ticks, not seconds: replay and engine only compare, add and subtract what it says."""

    def __init__(self) -> None:
        self.ticks = 0

    def now(self) -> int:
        return self.ticks

    def sleep(self, ticks: int) -> None:
        self.ticks += ticks


class Tokens:
    """`engine.transfer.PendingTokens`: waiting for them lasts until their step has ended on the device."""

    def __init__(self, clock: TickClock, end: int, count: int) -> None:
        self._clock, self._end, self._count = clock, end, count

    def tokens(self) -> list[int]:
        self._clock.ticks = max(self._clock.ticks, self._end)
        return [1] * self._count

    def logprobs(self) -> None:
        return None

    def gpu_s(self) -> None:
        return None


class Device:
    """`engine.runner.Runner`: a launch takes the host's time, and steps run one after another.

    A step with prompt chunks may begin on the device before its launch is over: its time with nothing in flight says
    when it ends at the earliest.
    """

    def __init__(self, clock: TickClock, step_time: StepTime) -> None:
        self.slots = SimpleNamespace(assign=lambda sequence: None, release=lambda sequence: None)
        self._clock, self._step_time, self._free_at = clock, step_time, 0

    def execute(self, step) -> tuple[Tokens, None]:
        alone = self._clock.ticks + self._step_time.alone_ticks(step.shape)
        self._clock.ticks += self._step_time.host_ticks(step.shape)
        self._free_at = max(self._free_at + self._step_time.ticks(step.shape), alone)
        requests, _ = sampling_requests(step)
        return Tokens(self._clock, self._free_at, len(requests)), None


class Core(EngineCore):
    """The engine's steps; clients that give up are heard before each, as the server's worker does."""

    def __init__(self, clock: TickClock, system: System) -> None:
        self.scheduler = Scheduler(system.scheduler, system.cache)
        self.config = SimpleNamespace(max_num_seqs=system.scheduler.max_num_seqs)
        self.model_config = SimpleNamespace(vocab_size=10)
        self.max_model_len = system.scheduler.max_model_len
        self.step_log = None
        self.patience: list[tuple[int, Sequence]] = []
        self._clock = clock
        self._runner = Device(clock, system.step_time)
        self._in_flight = deque()
        self._depth = system.pipeline_depth
        self._is_broken = False

    def step(self):
        due = [pair for pair in self.patience if pair[0] <= self._clock.ticks]
        for pair in due:
            self.patience.remove(pair)
            self.abort(pair[1])
        return super().step()


@dataclass
class Life:
    """Of each request in ticks, -1 for what never happened."""

    scheduled: list[int]
    first_token: list[int]
    last_token: list[int]
    preemptions: list[int]
    cached: list[int]
    outputs: list[int]


def on_the_engine(case: "Case", monkeypatch) -> Life:
    clock, workload, system = TickClock(), case.workload, case.system
    core = Core(clock, system)
    monkeypatch.setattr(engine.core, "time", SimpleNamespace(perf_counter=clock.now))
    # A full collection takes longer than everything else here.
    monkeypatch.setattr(engine.bench.replay, "quiet_collector", contextlib.nullcontext)
    arrivals = [round(arrival * TICKS_PER_SECOND) for arrival in workload.arrival_s.tolist()]
    sequences = []
    for index, (prompt, output) in enumerate(zip(workload.input_tokens, workload.output_tokens, strict=True)):
        sequence = Sequence(
            index,
            [1] * int(prompt),
            SamplingParams(temperature=0.0, max_tokens=int(output), ignore_eos=True, detokenize=False),
            max_model_len=core.max_model_len,
            block_size=system.cache.block_size,
        )
        if workload.prefix_block_hashes is not None:
            sequence.block_hashes = workload.page_hashes(index, system.cache.block_size)
        sequences.append(sequence)
        if case.timeouts and math.isfinite(case.timeouts[index]):
            core.patience.append((arrivals[index] + round(case.timeouts[index] * TICKS_PER_SECOND), sequence))
    if case.timeouts:  # those that gave up are short of tokens
        monkeypatch.setattr(engine.bench.replay, "_check_lengths", lambda sequences: None)
    replay(core, sequences, arrivals, clock)
    assert not core.has_work
    core.scheduler.check()
    assert core.scheduler.kv.pool.num_used == 0

    def instants(name: str) -> list[int]:
        return [-1 if getattr(sequence, name) is None else getattr(sequence, name) for sequence in sequences]

    ended = [-1 if sequence.finish_reason == "abort" else sequence.last_token_s for sequence in sequences]
    return Life(
        instants("first_scheduled_s"),
        instants("first_token_s"),
        ended,
        [sequence.num_preemptions for sequence in sequences],
        [sequence.num_cached_tokens for sequence in sequences],
        [sequence.num_output_tokens for sequence in sequences],
    )


def in_the_simulator(case: "Case", leap: bool, monkeypatch) -> Life:
    """The simulated requests themselves have the ticks; results are in milliseconds."""
    requests = {}
    write = RequestLog._write

    def keep(self, request):
        requests[request.index] = request
        return write(self, request)

    monkeypatch.setattr(RequestLog, "_write", keep)
    simulate(
        case.workload, case.system, SimulationOptions(warmup_s=0.0, leap=leap, client_timeout_s=case.timeouts or None)
    )
    monkeypatch.setattr(RequestLog, "_write", write)
    chosen = [requests[index] for index in range(len(case.workload))]
    return Life(
        [request.scheduled for request in chosen],
        [request.first_token for request in chosen],
        [request.finish for request in chosen],
        [request.num_preemptions for request in chosen],
        [request.num_cached_tokens for request in chosen],
        [request.num_output_tokens for request in chosen],
    )


# ---- workloads -----------------------------------------------------------------------------------------------------


class Drawn(StepTime):
    """Whole microseconds, of everything that a step has; where `wobble` is, no arithmetic progression."""

    def __init__(
        self,
        step: int,
        request: int,
        query: int,
        context: int,
        wobble: int,
        host: tuple[int, int, int],
        latency: int | None = None,
    ):
        self.costs, self.wobble, self.host, self.latency = (step, request, query, context), wobble, host, latency

    def predict(self, step: StepShape) -> float:
        raise AssertionError("ticks are exact")

    def ticks(self, step: StepShape) -> int:
        base, request, query, context = self.costs
        contexts = sum(step.decode_contexts) + sum(c for _, c in step.prefills)
        wobble = (7 * contexts + 3 * step.num_tokens) % 5 * self.wobble
        return (base + request * step.num_requests + query * step.num_tokens + context * contexts + wobble) * US

    def host_ticks(self, step: StepShape) -> int:
        base, request, prefill = self.host
        return (base + request * step.num_requests + (prefill if step.prefills else 0)) * US

    def wait_ticks(self, step: StepShape) -> int:
        """Beside the host's launch, where there are prompts and `latency` says so."""
        if self.latency is None or not step.prefills:
            return super().wait_ticks(step)
        return self.latency * US

    def __repr__(self) -> str:
        return f"Drawn(*{self.costs}, {self.wobble}, {self.host}, {self.latency})"


@dataclass
class Case:
    workload: Workload
    system: System
    timeouts: list[float]


@st.composite
def cases(draw, depth: int, aborts: bool = False):
    """Systems short of everything, launches shorter and longer than steps, bursts, arrivals on step boundaries."""
    block_size = draw(st.sampled_from([1, 2, 4, 16]))
    windows = draw(st.sampled_from([(None,), (None,), (None, 6), (5,)]))
    max_model_len = draw(st.integers(8, 100))
    chunked = draw(st.booleans())
    budget = draw(st.integers(4, 60)) if chunked else draw(st.integers(max_model_len, 200))
    caching = draw(st.booleans())
    scheduler = SchedulerConfig(budget, draw(st.integers(1, min(budget, 8))), max_model_len, chunked)
    needed = KVCacheConfig(2, block_size, windows).max_pages(max_model_len, budget)
    num_blocks = needed + 1 + draw(st.integers(0, needed))
    cache = KVCacheConfig(num_blocks, block_size, windows, enable_prefix_caching=caching)

    count = draw(st.integers(1, 16))
    instants = st.integers(0, 240).map(lambda n: n / 2000)
    if draw(st.booleans()):
        bursts = draw(st.lists(instants, min_size=1, max_size=3))
        instants = st.sampled_from(bursts)
    arrivals = sorted(draw(st.lists(instants, min_size=count, max_size=count)))
    prompts = draw(st.lists(st.integers(1, max_model_len - 1), min_size=count, max_size=count))
    room = [max_model_len - prompt for prompt in prompts]
    outputs = [min(draw(st.integers(1, 60)), most) for most in room]
    prefixes = {}
    if caching:
        # As in tests/planner/test_simulation.py. The engine would hash output tokens too, which no trace has.
        rows = []
        for index, prompt in enumerate(prompts):
            family, shared = draw(st.integers(0, 1)), draw(st.integers(0, 8))
            ids = [family * 100 + i if i < shared else 1000 * (index + 1) + i for i in range(prompt // 4)]
            rows.append(np.array(ids, np.int64))
        prefixes = {"prefix_block_hashes": tuple(rows), "prefix_block_tokens": 4}
    workload = Workload("drawn", np.array(arrivals), np.array(prompts), np.array(outputs), **prefixes)
    few = st.sampled_from([0, 0, 1, 7, 50])
    step_time = Drawn(
        draw(st.sampled_from([1, 100, 500, 1000, 2000])),
        draw(few),
        draw(few),
        draw(few),
        draw(st.sampled_from([0, 100, 1000])),
        (draw(st.sampled_from([0, 100, 500, 1000, 3000])), draw(few), draw(st.sampled_from([0, 500, 5000]))),
        draw(st.sampled_from([None, 0, 300, 4000])),
    )
    timeouts = []
    if aborts:
        patience = st.one_of(st.just(math.inf), st.integers(1, 160).map(lambda n: n / 2000))
        timeouts = draw(st.lists(patience, min_size=count, max_size=count))
    return Case(workload, System(scheduler, cache, step_time, pipeline_depth=depth), timeouts)


# ---- both ----------------------------------------------------------------------------------------------------------


def assert_same_lives(case: Case, seen: Counter) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        real = on_the_engine(case, monkeypatch)
    for leap in (True, False):
        with pytest.MonkeyPatch.context() as monkeypatch:
            assert in_the_simulator(case, leap, monkeypatch) == real
    seen["examples"] += 1
    seen["preempted"] += any(real.preemptions)
    seen["cached"] += any(real.cached)
    seen["aborted"] += -1 in real.last_token


@pytest.mark.parametrize("depth", [1, 2])
def test_the_simulator_does_what_the_engine_does(depth):
    seen = Counter()

    @EXAMPLES
    @given(cases(depth))
    def check(case):
        assert_same_lives(case, seen)

    check()
    assert seen["preempted"] > seen["examples"] / 20, seen
    assert seen["cached"] > seen["examples"] / 20, seen


def test_the_simulator_does_what_the_engine_does_when_clients_give_up():
    """At depth 1 the simulated client is heard at once, not at the next turn."""
    seen = Counter()

    @EXAMPLES
    @given(cases(2, aborts=True))
    def check(case):
        assert_same_lives(case, seen)

    check()
    assert seen["aborted"] > seen["examples"] / 5, seen
    assert seen["preempted"] > seen["examples"] / 20, seen


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_blocks", [80, 2000])
def test_a_longer_load(depth, num_blocks):
    """A thousand requests of all lengths with bursts, on a system whose launches hide behind most of its steps."""
    rng = np.random.default_rng(depth)
    gaps = rng.exponential(0.03, 1000) * (rng.random(1000) < 0.6)
    lengths = rng.integers(1, 300, 1000), rng.integers(1, 200, 1000)
    workload = Workload("longer", np.round(np.cumsum(gaps), 6), *lengths)
    scheduler, cache = SchedulerConfig(128, 16, 500), KVCacheConfig(num_blocks, 16)
    system = System(scheduler, cache, Drawn(500, 3, 10, 1, 0, (700, 5, 1500)), pipeline_depth=depth)
    seen = Counter()
    assert_same_lives(Case(workload, system, []), seen)
    assert bool(seen["preempted"]) == (num_blocks == 80)


def test_the_engine_is_the_one_that_is_pipelined():
    """By hand: steps of 10 ms, launches of 1 ms. A comes at 0, B at 12 ms, while the step from 11 to 21 ms runs."""
    system = System(SchedulerConfig(64, 8, 100), KVCacheConfig(100, 16), Drawn(10_000, 0, 0, 0, 0, (1000, 0, 0)))
    case = Case(Workload("two", np.array([0, 0.012]), np.array([4, 4]), np.array([6, 2])), system, [])
    ms = 1000 * US
    for depth, first, last in (
        # Each step takes 11 ms; B is in that from 22 ms on.
        (1, [11 * ms, 33 * ms], [66 * ms, 44 * ms]),
        # A's decode is launched at 1 ms and runs from 11 to 21 ms; that from 21 to 31 ms is decided at 11 ms, without
        # B; B is in that from 31 ms on, decided at 21 ms.
        (2, [11 * ms, 41 * ms], [61 * ms, 51 * ms]),
    ):
        case.system = replace(system, pipeline_depth=depth)
        with pytest.MonkeyPatch.context() as monkeypatch:
            real = on_the_engine(case, monkeypatch)
        assert (real.first_token, real.last_token) == (first, last)
        assert_same_lives(case, Counter())
