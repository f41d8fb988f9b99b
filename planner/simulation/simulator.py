"""Replays a workload against replicas behind a router."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import simpy

from engine.scheduling import KVCacheConfig, Scheduler, SchedulerConfig
from planner.errors import UserError
from planner.simulation.acceptance import AcceptanceProcess, AcceptanceSampler
from planner.simulation.log import ReplicaLog, RequestLog, SloWatch
from planner.simulation.metrics import Outcome, SimulationResult, evaluate
from planner.simulation.pipeline import PipelinedReplica
from planner.simulation.replica import ABORT, Replica, SimulatedRequest, Timer
from planner.simulation.router import make_router
from planner.simulation.slo import SLO
from planner.step_time import TICKS_PER_SECOND, StepTime
from planner.workload import Workload
from planner.workload.workload import MAX_DURATION_S

# Random streams, one for each purpose: turning one knob does not disturb the others.
_ACCEPTANCE_STREAM = 0

_DEFAULT_WARMUP_S = 60.0
_DEFAULT_WARMUP_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Speculation:
    """Fixed-length speculation. k = 0 is no speculation at all.

    Attributes:
        num_speculative_tokens: drafts per round.
        acceptance: the process that decides how many of them are accepted.
    """

    num_speculative_tokens: int
    acceptance: AcceptanceProcess


@dataclass(frozen=True, slots=True)
class System:
    """What is simulated: identical replicas, each an engine.

    Attributes:
        scheduler, cache: the engine's own configuration.
        step_time: how long its steps take, drafting included.
        replicas: engines behind the router.
        router: a name in `planner.simulation.router.ROUTERS`.
        speculation: None for plain decoding.
        pipeline_depth: steps in flight at once: 1, each is scheduled when the one before has ended, or 2, the next one
            is launched while it runs, as the engine does on a GPU. 2 only without speculation: the engine verifies a
            step's drafts before it schedules another.
    """

    scheduler: SchedulerConfig
    cache: KVCacheConfig
    step_time: StepTime
    replicas: int = 1
    router: str = "round-robin"
    speculation: Speculation | None = None
    pipeline_depth: int = 1


@dataclass(frozen=True, slots=True)
class SimulationOptions:
    """How a simulation is run and judged.

    Attributes:
        seed: of every random stream.
        slo: limits for goodput and the verdict.
        warmup_s: requests that arrive earlier are simulated but not measured; None: 60 s, at most 5 % of the load.
        reject_too_long: count prompts that exceed max_model_len as rejected instead of refusing the workload.
        client_timeout_s: a client aborts its request this long after sending it; None: never.
        leap: do many decode steps at once. False gives the same result, slowly.
        stop_when_slo_is_lost: raise `SloLost` as soon as so many requests have missed a limit that its percentile
            cannot be met.
    """

    seed: int = 0
    slo: SLO = field(default_factory=SLO)
    warmup_s: float | None = None
    reject_too_long: bool = False
    client_timeout_s: float | Sequence[float] | None = None
    leap: bool = True
    stop_when_slo_is_lost: bool = False


def simulate(workload: Workload, system: System, options: SimulationOptions | None = None) -> SimulationResult:
    """Run a workload to its end and measure it.

    The same arguments give the same result, to the byte.

    Raises:
        UserError: if a prompt exceeds max_model_len (unless told to reject those), the cache cannot hold one request
            of max_model_len, or the step-time model predicts nonsense.
        SloLost: if `stop_when_slo_is_lost` and it is.
    """
    options = options or SimulationOptions()
    warmup_s = warmup_seconds(workload, options)
    return evaluate(run(workload, system, options), options.slo, warmup_s, options.seed)


def run(workload: Workload, system: System, options: SimulationOptions | None = None) -> Outcome:
    """What `simulate` measures, request by request.

    Raises:
        UserError, SloLost: as `simulate`.
    """
    options = options or SimulationOptions()
    limits = system.scheduler
    budget = None if limits.enable_chunked_prefill else limits.max_num_batched_tokens
    check_prompts(workload, limits.max_model_len, budget, options.reject_too_long)
    env = simpy.Environment(initial_time=0)
    watch = None
    if options.stop_when_slo_is_lost and options.slo.limits():
        warmup_s = warmup_seconds(workload, options)
        watch = SloWatch(options.slo, warmup_s, workload.arrival_s, workload.output_tokens)
    requests = RequestLog(len(workload), watch)
    replicas = _replicas(env, system, requests, options.leap)
    env.process(_arrivals(env, workload, system, options, replicas, requests))
    env.run()
    _check_conservation(workload, requests, replicas)
    return Outcome(
        workload=workload,
        requests=requests,
        replicas=[replica.log for replica in replicas],
        num_kv_blocks=system.cache.num_blocks - 1,
        peak_used_blocks=[replica.scheduler.kv.pool.peak_used for replica in replicas],
        num_steps=sum(replica.scheduler.num_steps for replica in replicas),
        evidence=system.step_time.evidence,
        step_time=system.step_time.description,
    )


def _replicas(env: simpy.Environment, system: System, requests: RequestLog, leap: bool) -> list[Replica]:
    k = system.speculation.num_speculative_tokens if system.speculation else 0
    if k < 0:
        raise UserError(f"num_speculative_tokens must not be negative, not {k}")
    if system.pipeline_depth not in (1, 2):
        raise UserError(f"pipeline_depth must be 1 or 2 steps in flight, not {system.pipeline_depth}")
    if k and system.pipeline_depth > 1:
        raise UserError(
            f"a pipeline_depth of {system.pipeline_depth} goes with plain decoding only: with speculation the next "
            "step is scheduled when the drafts of the one before are verified"
        )
    replicas: list[Replica] = []
    for _ in range(_checked_replicas(system.replicas)):
        try:
            scheduler = Scheduler(system.scheduler, system.cache)
        except ValueError as error:
            raise UserError(str(error)) from None
        log = ReplicaLog(requests)
        if system.pipeline_depth == 1:
            replicas.append(Replica(env, scheduler, system.step_time, log, k, leap))
        else:
            replicas.append(PipelinedReplica(env, scheduler, system.step_time, log, leap=leap))
    return replicas


def _arrivals(
    env: simpy.Environment,
    workload: Workload,
    system: System,
    options: SimulationOptions,
    replicas: list[Replica],
    log: RequestLog,
) -> Iterator[simpy.Event]:
    """Sends each request to the router at its time."""
    router = make_router(system.router)
    sampler = None
    if system.speculation and system.speculation.num_speculative_tokens:
        process = system.speculation.acceptance.limited(system.speculation.num_speculative_tokens)
        seed = np.random.SeedSequence(options.seed, spawn_key=(_ACCEPTANCE_STREAM,))
        sampler = AcceptanceSampler(process, len(workload), seed)
    hashing = system.cache.enable_prefix_caching and workload.prefix_block_hashes is not None
    timeouts = _timeouts(options.client_timeout_s, len(workload))
    max_model_len, block_size = system.scheduler.max_model_len, system.cache.block_size
    arrivals = [round(t * TICKS_PER_SECOND) for t in workload.arrival_s.tolist()]
    prompts, outputs = workload.input_tokens.tolist(), workload.output_tokens.tolist()
    for index, arrival in enumerate(arrivals):
        if arrival > env.now:
            yield env.timeout(arrival - env.now)
        if prompts[index] >= max_model_len:
            log.num_rejected += 1
            continue
        hashes = workload.page_hashes(index, block_size) if hashing else ()
        request = SimulatedRequest(index, prompts[index], outputs[index], hashes, arrival)
        if sampler is not None:
            request.accepted = sampler.rounds(index, outputs[index])
        if len(replicas) == 1:
            replica = replicas[0]
        else:
            prefix = workload.prefix_block_hashes[index].tolist() if hashing else ()
            replica = replicas[router.choose([r.num_outstanding for r in replicas], prefix)]
        replica.submit(request)
        if timeouts is not None and math.isfinite(timeouts[index]):
            delay = max(1, round(timeouts[index] * TICKS_PER_SECOND))
            Timer(env, delay, ABORT, lambda _, replica=replica, request=request: replica.abort(request))


def check_prompts(workload: Workload, max_model_len: int, unchunked_budget: int | None, reject: bool) -> None:
    """Refuse a workload whose prompts an engine could not take.

    Args:
        max_model_len: longest sequence.
        unchunked_budget: the token budget of a step, where prompts must be computed in one; None with chunked prefill.
        reject: prompts beyond max_model_len will be rejected one by one, so they are no reason to refuse.

    Raises:
        UserError: naming the first prompt that is too long, or if none would be left.
    """
    too_long = np.flatnonzero(workload.input_tokens >= max_model_len)
    if too_long.size and not reject:
        i = int(too_long[0])
        raise UserError(
            f"{workload.name}: request {i + 1} of {len(workload)} has a prompt of {workload.input_tokens[i]} tokens, "
            f"which leaves no room for output within max_model_len {max_model_len} ({too_long.size} requests in all); "
            f"raise --max-model-len or pass --reject-too-long to count them as rejected"
        )
    if too_long.size == len(workload):
        raise UserError(f"{workload.name}: every prompt exceeds max_model_len {max_model_len}; raise --max-model-len")
    if unchunked_budget is None:
        return
    over = np.flatnonzero((workload.input_tokens > unchunked_budget) & (workload.input_tokens < max_model_len))
    if over.size:
        i = int(over[0])
        raise UserError(
            f"{workload.name}: request {i + 1} of {len(workload)} has a prompt of {workload.input_tokens[i]} tokens, "
            f"more than max_num_batched_tokens {unchunked_budget}; turn chunked prefill on, or raise the budget with "
            f"--max-num-batched-tokens"
        )


def _checked_replicas(replicas: int) -> int:
    if replicas < 1:
        raise UserError(f"replicas must be at least 1, not {replicas}")
    return replicas


def _timeouts(timeout_s: float | Sequence[float] | None, count: int) -> list[float] | None:
    if timeout_s is None:
        return None
    given = np.asarray(timeout_s, float)
    if given.shape not in ((), (count,)):
        raise UserError(f"client timeouts must be one number or one for each of {count} requests, not {given.shape}")
    timeouts = np.broadcast_to(given, count)
    if np.isnan(timeouts).any() or (timeouts <= 0).any():
        raise UserError("a client timeout must be a positive number of seconds")
    if (timeouts[np.isfinite(timeouts)] > MAX_DURATION_S).any():
        raise UserError(
            f"a client timeout must be at most {MAX_DURATION_S:g} s; leave it out for clients that never give up"
        )
    return timeouts.tolist()


def warmup_seconds(workload: Workload, options: SimulationOptions) -> float:
    """The instant from which arrivals are measured.

    Raises:
        UserError: for a warm-up that is not a duration, or leaves nothing to measure.
    """
    last = workload.duration_s
    if options.warmup_s is None:
        return min(_DEFAULT_WARMUP_S, _DEFAULT_WARMUP_SHARE * last)
    if not (math.isfinite(options.warmup_s) and options.warmup_s >= 0):
        raise UserError(f"the warm-up must be a number of seconds from 0 on, not {options.warmup_s}")
    if options.warmup_s > last:
        raise UserError(f"a warm-up of {options.warmup_s:g} s leaves no request of a load that ends after {last:g} s")
    return options.warmup_s


def _check_conservation(workload: Workload, log: RequestLog, replicas: list[Replica]) -> None:
    """The invariants that hold at the end of every simulation.

    Raises:
        AssertionError: requests in = finished + aborted + rejected, or no page left behind, does not hold.
    """
    ended = log.num_finished + log.num_aborted + log.num_rejected
    assert ended == len(workload), f"{len(workload)} requests in, {ended} accounted for"
    for replica in replicas:
        assert replica.num_outstanding == 0, "a replica stopped with requests outstanding"
        assert replica.scheduler.kv.pool.num_used == 0, "pages left behind"
