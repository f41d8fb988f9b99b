"""A served workload through the simulator: the record's arrivals, lengths and settings, predicted step times."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np

from calibration.validate.records import EngineSettings, Lives
from engine.scheduling import KVCacheConfig, SchedulerConfig, StepShape
from planner.errors import UserError
from planner.serving import arrival_seconds
from planner.simulation import SimulationOptions, System, run
from planner.step_time import TICKS_PER_SECOND, StepTime
from planner.workload import Workload


@dataclass(frozen=True)
class SimulatedStep:
    """A step that the simulator decided, and its time on the device."""

    shape: StepShape
    device_s: float


@dataclass(frozen=True, eq=False)
class SimulatedRun:
    """What the simulator predicts of a run.

    Attributes:
        steps: None where they were not asked for.
    """

    lives: Lives
    steps: list[SimulatedStep] | None = None


def _noting(step_time: StepTime, steps: list[SimulatedStep]) -> StepTime:
    """The same model, which appends every step whose time it is asked for, in order."""
    noting, ticks_of, heated_of = copy.copy(step_time), step_time.ticks, step_time.heated_ticks

    def ticks(shape: StepShape) -> int:
        found = ticks_of(shape)
        if not steps or steps[-1].shape is not shape:  # it may be asked twice
            steps.append(SimulatedStep(shape, found / TICKS_PER_SECOND))
        return found

    def heated_ticks(shape: StepShape, steady: int, heat: float) -> int:
        found = heated_of(shape, steady, heat)
        steps[-1] = SimulatedStep(shape, found / TICKS_PER_SECOND)
        return found

    for name, function in (("ticks", ticks), ("heated_ticks", heated_ticks)):
        object.__setattr__(noting, name, function)  # frozen ones too
    return noting


def simulate_run(name: str, lives: Lives, engine: EngineSettings, step_time: StepTime, *, steps: bool) -> SimulatedRun:
    """The same requests on a simulated engine with the same settings.

    Args:
        name: of the workload, for messages.
        lives: only arrivals and lengths are used.
        steps: keep them, which costs that every step is simulated by itself.

    Raises:
        UserError: settings that no scheduler takes, or if the two sides differ in blocks or lengths.
    """
    noted: list[SimulatedStep] = []
    system = system_of(engine, _noting(step_time, noted) if steps else step_time)
    outcome = run(workload_of(name, lives, engine), system, SimulationOptions(warmup_s=0.0, leap=not steps))
    log = outcome.requests
    if outcome.num_kv_blocks != engine.num_kv_blocks:
        raise UserError(
            f"{name}: {outcome.num_kv_blocks} KV blocks were simulated, the engine had {engine.num_kv_blocks}"
        )
    if not np.array_equal(log.output_tokens, lives.output_tokens):
        index = int(np.flatnonzero(log.output_tokens != lives.output_tokens)[0])
        raise UserError(
            f"{name}: request {index + 1} got {lives.output_tokens[index]} tokens from the engine and "
            f"{log.output_tokens[index]} in the simulation, so the two did not serve the same workload"
        )
    arrival_s = lives.arrival_s
    seen_s = arrival_s + arrival_seconds(step_time)  # what a client sees comes later by the way in and out
    predicted = Lives(
        arrival_s,
        arrival_s + log.queue_s,
        seen_s + log.ttft_s,
        seen_s + log.e2el_s,
        lives.input_tokens,
        lives.output_tokens,
        log.preemptions,
    )
    return SimulatedRun(predicted, noted if steps else None)


def workload_of(name: str, lives: Lives, engine: EngineSettings) -> Workload:
    """The requests of a run. With a prefix cache each has a prompt of its own, which it finds again if preempted."""
    own = {}
    if engine.enable_prefix_caching:
        own = {
            "prefix_block_hashes": tuple(np.empty(0, np.int64) for _ in range(len(lives))),
            "prefix_block_tokens": engine.block_size,
        }
    return Workload(name, lives.arrival_s, lives.input_tokens, lives.output_tokens, **own)


def system_of(engine: EngineSettings, step_time: StepTime) -> System:
    """The simulator's engine with a record's settings.

    Raises:
        UserError: settings that no scheduler takes.
    """
    try:
        scheduler = SchedulerConfig(
            max_num_batched_tokens=engine.max_num_batched_tokens,
            max_num_seqs=engine.max_num_seqs,
            max_model_len=engine.max_model_len,
            enable_chunked_prefill=engine.enable_chunked_prefill,
        )
        cache = KVCacheConfig(
            num_blocks=engine.num_kv_blocks + 1,  # and the null block
            block_size=engine.block_size,
            windows=engine.windows,
            enable_prefix_caching=engine.enable_prefix_caching,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    return System(scheduler, cache, step_time, pipeline_depth=engine.pipeline_depth)
