"""Records of `memwall bench serve` without a GPU: the engine's own loop on a clock of ticks, with known step times."""

import contextlib
from collections import deque
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest

import engine.bench.replay
import engine.core
from engine.bench.metrics import latencies
from engine.bench.record import Record
from engine.bench.replay import replay
from engine.bench.serve import describe, medians
from engine.bench.step_log import encode
from engine.bench.workload import Entry
from engine.bench.workload import Workload as BenchWorkload
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.kv.groups import kv_groups
from engine.sampling import sampling_requests
from engine.sampling_params import SamplingParams
from engine.scheduling import KVCacheConfig, Scheduler, SchedulerConfig
from engine.sequence import Sequence
from planner.profile.clock import ClockModel, Heat
from planner.step_time import TICKS_PER_SECOND, StepTime


@dataclass(frozen=True)
class Affine(StepTime):
    """A constant, and so much per request, query token and cached token; seconds."""

    step_s: float = 0.004
    request_s: float = 2e-5
    query_s: float = 2e-5
    context_s: float = 3e-8
    host_s: float = 0.0
    uncertainty: object = None

    description = "so much per step, request and token"

    def predict(self, step):
        contexts = sum(step.decode_contexts) + sum(context for _, context in step.prefills)
        return (
            self.step_s
            + self.request_s * step.num_requests
            + self.query_s * step.num_tokens
            + self.context_s * contexts
        )

    def host_ticks(self, step):
        return round(self.host_s * TICKS_PER_SECOND)

    def scaled(self, decode=1.0, prefill=1.0, host=1.0):
        return Scaled(self, decode, prefill, host)


@dataclass(frozen=True)
class Heated(Affine):
    """On a device that slows down under prompts."""

    clock: ClockModel = ClockModel(0.05, 0.2, 0.8, (64, 512), (0.9, 0.8), (1.0, 1.2), 1.1)  # noqa: RUF009 - frozen

    def heated_ticks(self, step, ticks, heat):
        seconds = ticks / TICKS_PER_SECOND
        if step.prefills:
            return round(ticks * self.clock.prompt_factor(step.num_tokens, heat, seconds))
        return round(ticks * self.clock.decode_factor(heat, seconds))

    def heating(self, step):
        return self.clock.heating(step.num_tokens) if step.prefills else 0.0


class Scaled(StepTime):
    def __init__(self, inner, decode=1.0, prefill=1.0, host=1.0):
        self.inner, self.factors, self.host = inner, (decode, prefill), host

    def predict(self, step):
        return self.inner.predict(step) * self.factors[bool(step.prefills)]

    def host_ticks(self, step):
        return round(self.inner.host_ticks(step) * self.host)


class Clock:
    def __init__(self):
        self.ticks = 0

    def now(self):
        return self.ticks

    def sleep(self, ticks):
        self.ticks += ticks


class Tokens:
    def __init__(self, clock, end, gpu, count):
        self.clock, self.end, self.gpu, self.count = clock, end, gpu, count

    def tokens(self):
        self.clock.ticks = max(self.clock.ticks, self.end)
        return [1] * self.count

    def logprobs(self):
        return None

    def gpu_s(self):
        return self.gpu


class Device:
    def __init__(self, clock, step_time, noise):
        self.slots = SimpleNamespace(assign=lambda sequence: None, release=lambda sequence: None)
        self.clock, self.step_time, self.noise, self.free_at = clock, step_time, noise, 0
        self.heat = Heat(step_time.clock.tau_s * TICKS_PER_SECOND) if step_time.clock else None

    def execute(self, step):
        self.clock.ticks += self.step_time.host_ticks(step.shape)
        begin = max(self.clock.ticks, self.free_at)
        ticks = self.step_time.ticks(step.shape)
        if self.heat is not None:
            ticks = self.step_time.heated_ticks(step.shape, ticks, self.heat.at(begin))
        gpu = round(ticks * self.noise())
        if self.heat is not None:
            self.heat.ran(begin, begin + gpu, self.step_time.heating(step.shape))
        self.free_at = begin + gpu
        graph = None if step.shape.prefills else len(step.shape.decode_contexts)
        return Tokens(self.clock, self.free_at, gpu, len(sampling_requests(step)[0])), graph


class Core(EngineCore):
    def __init__(self, clock, settings, step_time, noise):
        config = settings.config
        cache = KVCacheConfig(
            settings.num_blocks + 1,
            config.block_size,
            kv_groups(settings.windows).windows,
            config.enable_prefix_caching,
        )
        scheduler = SchedulerConfig(config.max_num_batched_tokens, config.max_num_seqs, settings.max_model_len)
        self.scheduler = Scheduler(scheduler, cache)
        self.config, self.model_config = config, SimpleNamespace(vocab_size=10**6)
        self.max_model_len = settings.max_model_len
        self.step_log = None
        self._runner = Device(clock, step_time, noise)
        self._in_flight = deque()
        self._depth = settings.depth
        self._is_broken = False


@dataclass(frozen=True)
class Settings:
    """An engine. depth 2 is that of a GPU."""

    num_blocks: int = 2000
    max_model_len: int = 2048
    depth: int = 2
    windows: tuple = (None, None)
    config: EngineConfig = field(
        default_factory=lambda: EngineConfig(
            model="toy", max_num_seqs=16, max_num_batched_tokens=512, block_size=32, enable_prefix_caching=False
        )
    )


def load(count=60, rate=20.0, seed=0, longest=400, outputs=60, spacing_s=None):
    """Poisson arrivals in whole microseconds, or evenly spaced ones; uniform lengths."""
    rng = np.random.default_rng(seed)
    arrivals = np.round(np.cumsum(rng.exponential(1 / rate, count)), 6)
    if spacing_s is not None:
        arrivals = np.round(np.arange(count) * spacing_s, 6)
    lengths = zip(rng.integers(1, longest, count).tolist(), rng.integers(1, outputs, count).tolist(), strict=True)
    entries = [Entry(float(at - arrivals[0]), *pair) for at, pair in zip(arrivals, lengths, strict=True)]
    return BenchWorkload("load.jsonl", tuple(entries))


def served(settings, workload, step_time, noise=lambda: 1.0):
    """One run: the columns of its requests in seconds, and its logged steps."""
    clock = Clock()
    core = Core(clock, settings, step_time, noise)
    sequences = [
        Sequence(
            index,
            [index] * entry.input_tokens,
            SamplingParams(temperature=0.0, max_tokens=entry.output_tokens, ignore_eos=True, detokenize=False),
            max_model_len=core.max_model_len,
            block_size=settings.config.block_size,
        )
        for index, entry in enumerate(workload.entries)
    ]
    arrivals = [round(entry.arrival_s * TICKS_PER_SECOND) for entry in workload.entries]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.core, "time", SimpleNamespace(perf_counter=clock.now))
        # A full collection takes longer than everything else here.
        patch.setattr(engine.bench.replay, "quiet_collector", contextlib.nullcontext)
        found = replay(core, sequences, arrivals, clock)

    def seconds(ticks):
        return ticks / TICKS_PER_SECOND

    names = {"arrival_s": "arrival_s", "scheduled_s": "first_scheduled_s"}
    columns = {
        name: [round(seconds(getattr(sequence, names.get(name, name))), 6) for sequence in sequences]
        for name in ("arrival_s", "scheduled_s", "first_token_s", "last_token_s")
    }
    columns |= {
        name: [getattr(sequence, attribute) for sequence in sequences]
        for name, attribute in (
            ("input_tokens", "num_prompt_tokens"),
            ("output_tokens", "num_output_tokens"),
            ("cached_tokens", "num_cached_tokens"),
            ("preemptions", "num_preemptions"),
        )
    }
    steps = [
        replace(
            step,
            start_s=seconds(step.start_s),
            end_s=seconds(step.end_s),
            host_s=seconds(step.host_s),
            gpu_s=seconds(step.gpu_s),
        )
        for step in found.log.steps()
    ]
    return columns, steps, found.log


def write_record(path, settings, workload, step_time, runs=2, noise=None, steps=True, **changes):
    """A record as the benchmark writes it, with step logs beside it.

    Args:
        noise: of each run, a function that gives a factor for every step.
        changes: to the document, by key.
    """
    results = []
    for run in range(1, runs + 1):
        columns, logged, log = served(settings, workload, step_time, noise[run - 1] if noise else lambda: 1.0)
        figures = latencies(columns, [])
        more = {"peak_running": log.peak_running, "num_preemptions": sum(columns["preemptions"]), "requests": columns}
        results.append(figures | more)
        if steps:
            name = f".steps.{run}.jsonl" if runs > 1 else ".steps.jsonl"
            path.with_name(path.stem + name).write_text(encode(logged))
    record = Record("serve", "memwall bench serve toy", "abc")
    record.environment = {"gpu": "Toy GPU"} if settings.depth == 2 else {}
    record.engines = [
        {
            "config": asdict(settings.config),
            "model": {"layer_windows": list(settings.windows)},
            "dtype": "bfloat16",
            "memory": {
                "num_blocks": settings.num_blocks,
                "block_size": settings.config.block_size,
                "max_model_len": settings.max_model_len,
            },
        }
    ]
    record.results = [describe(workload, 0, 1.0) | {"median": medians(results), "runs": results}]
    for key, value in changes.items():
        setattr(record, key, value)
    record.write(path)
    return path
