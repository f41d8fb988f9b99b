"""The simulator as a queue: exact theory, within 95 % confidence intervals of independent replications.

A replica with max_num_seqs = 1 and requests of one output token is a first-come-first-served server: a request is one
step, whose time the step-time model makes proportional to the prompt. Several replicas are several such servers.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from engine.scheduling import KVCacheConfig, SchedulerConfig, StepShape
from planner.simulation import SimulationOptions, SimulationResult, System, simulate
from planner.step_time import StepTime
from planner.workload import Workload

# Prompts have 1,000 tokens on average, a token takes a microsecond: service times are a millisecond on average.
TOKEN_S = 1e-6
MEAN_TOKENS = 1000
MAX_TOKENS = 1 << 20

REPLICATIONS = 20
REQUESTS = 6000
# 500 service times: far more than the relaxation time at rho = 0.8, 1 / (1 - sqrt(0.8))^2 = 90 (Morse 1955).
WARMUP_S = 0.5


class PerToken(StepTime):
    """Time proportional to query tokens."""

    def predict(self, step: StepShape) -> float:
        return step.num_tokens * TOKEN_S


class Mixed(StepTime):
    """A step costs a millisecond, and 0.1 ms for each request in it."""

    def predict(self, step: StepShape) -> float:
        return 1e-3 + 1e-4 * step.num_requests


def serve(
    arrival_s, tokens, replicas: int = 1, warmup_s: float = 0.0, router: str = "round-robin", depth: int = 1
) -> SimulationResult:
    workload = Workload("queue", np.asarray(arrival_s, float), np.asarray(tokens), np.ones(len(tokens), int))
    # One block holds any request.
    scheduler, cache = SchedulerConfig(MAX_TOKENS, 1, MAX_TOKENS), KVCacheConfig(3, MAX_TOKENS)
    system = System(scheduler, cache, PerToken(), replicas, router, pipeline_depth=depth)
    return simulate(workload, system, SimulationOptions(warmup_s=warmup_s))


def exponential_tokens(rng: np.random.Generator, count: int) -> np.ndarray:
    """An exponential rounded up, which is geometric: at 1,000 tokens the moments differ by less than 0.1 %."""
    return np.ceil(rng.exponential(MEAN_TOKENS, count)).astype(int)


def constant_tokens(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.full(count, MEAN_TOKENS)


def replications(seed: int, rho: float, tokens, servers: int = 1) -> list[SimulationResult]:
    """Independent runs with Poisson arrivals."""
    results = []
    for stream in np.random.SeedSequence(seed).spawn(REPLICATIONS):
        rng = np.random.default_rng(stream)
        arrival_s = np.cumsum(rng.exponential(MEAN_TOKENS * TOKEN_S / (rho * servers), REQUESTS))
        results.append(serve(arrival_s, tokens(rng, REQUESTS), servers, WARMUP_S))
    return results


def interval(values) -> tuple[float, float]:
    """95 % confidence interval of the mean of independent values."""
    mean = np.mean(values)
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return mean - half, mean + half


def assert_agrees(values, expected: float, precision: float) -> None:
    """Theory is within the interval, and the interval is narrow enough for that to mean something."""
    low, high = interval(values)
    assert low <= expected <= high
    assert high - low < 2 * precision * expected


def waits_ms(results: list[SimulationResult]) -> list[float]:
    return [result.queue_ms.mean for result in results]


# ---- waiting times -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.5, 0.8])
def test_mm1(rho):
    """Poisson arrivals, exponential service: Wq = rho / (1 - rho) service times, and W exponentially distributed."""
    results = replications(1, rho, exponential_tokens)
    assert_agrees(waits_ms(results), rho / (1 - rho), 0.08)
    assert_agrees([result.e2el_ms.mean for result in results], 1 / (1 - rho), 0.08)
    assert_agrees([result.e2el_ms.p90 for result in results], math.log(10) / (1 - rho), 0.08)


@pytest.mark.parametrize("rho", [0.5, 0.8])
def test_md1(rho):
    """Constant service: half of that wait (Pollaczek and Khinchine)."""
    results = replications(2, rho, constant_tokens)
    assert_agrees(waits_ms(results), rho / (2 * (1 - rho)), 0.08)
    for result in results:
        assert (result.prefill_ms.mean, result.prefill_ms.max) == pytest.approx((1, 1))


@pytest.mark.parametrize("rho", [0.5, 0.8])
def test_round_robin_mm(rho):
    """Every second of Poisson arrivals: a server sees Erlang-2 gaps, E2/M/1.

    Wq = sigma / (1 - sigma) service times, where sigma is the root below 1 of sigma = A*(1 - sigma) and A* the Laplace
    transform of the gaps, (2 rho / (2 rho + s))^2 in units of the service rate (Kleinrock 1975, chapter 6).
    """
    sigma = 0.0
    for _ in range(10_000):
        sigma = (2 * rho / (2 * rho + 1 - sigma)) ** 2
    assert_agrees(waits_ms(replications(3, rho, exponential_tokens, servers=2)), sigma / (1 - sigma), 0.08)


def mdc_wait(rho: float, servers: int) -> float:
    """Mean wait in service times of M/D/c, from Crommelin's (1932) chain.

    In one service time everyone in service leaves and a Poisson number arrives: the stationary number in the system,
    and by Little the wait.
    """
    size = 400
    arrived = stats.poisson.pmf(np.arange(size), rho * servers)
    chain = np.zeros((size, size))
    for number in range(size):
        left = max(0, number - servers)
        chain[number, left:] = arrived[: size - left]
        chain[number, -1] += 1 - chain[number].sum()
    system = np.vstack([chain.T - np.eye(size), np.ones(size)])
    share = np.linalg.lstsq(system, np.append(np.zeros(size), 1.0), rcond=None)[0]
    return float(share @ np.maximum(np.arange(size) - servers, 0)) / (rho * servers)


def test_mdc_formula():
    for rho in (0.5, 0.8):
        assert mdc_wait(rho, 1) == pytest.approx(rho / (2 * (1 - rho)), rel=1e-6)


@pytest.mark.parametrize(("rho", "servers"), [(0.5, 2), (0.8, 2), (0.8, 3)])
def test_mdc(rho, servers):
    """With constant service, taking turns is a common first-come-first-served queue: requests leave as they came."""
    results = replications(4, rho, constant_tokens, servers)
    assert_agrees(waits_ms(results), mdc_wait(rho, servers), 0.08)


# ---- sample paths: no statistics, every request --------------------------------------------------------------------


def lindley(arrival_s: np.ndarray, service_s: np.ndarray) -> np.ndarray:
    """Waits in a first-come-first-served queue: W' = max(0, W + service - gap)."""
    waits = np.zeros(len(arrival_s))
    for i in range(1, len(waits)):
        waits[i] = max(0.0, waits[i - 1] + service_s[i - 1] - (arrival_s[i] - arrival_s[i - 1]))
    return waits


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("replicas", [1, 3])
def test_sample_paths(replicas, depth):
    """Two steps in flight change nothing where a request is admitted when the one before it has left."""
    rng = np.random.default_rng(7)
    arrival_s = np.cumsum(rng.exponential(MEAN_TOKENS * TOKEN_S / 0.9 / replicas, 3000))
    tokens = exponential_tokens(rng, 3000)
    waits_s = np.concatenate(
        [lindley(arrival_s[first::replicas], tokens[first::replicas] * TOKEN_S) for first in range(replicas)]
    )
    result = serve(arrival_s, tokens, replicas, depth=depth)
    statistics = [
        result.queue_ms.mean,
        result.queue_ms.p50,
        result.queue_ms.p90,
        result.queue_ms.p99,
        result.queue_ms.max,
    ]
    expected = [waits_s.mean(), *np.percentile(waits_s, [50, 90, 99, 100])]
    assert statistics == pytest.approx(np.array(expected) * 1e3, rel=1e-9)


def test_least_outstanding_sample_path():
    """The shortest queue, first of several, by an event loop of its own."""
    rng = np.random.default_rng(8)
    arrival_s = np.cumsum(rng.exponential(MEAN_TOKENS * TOKEN_S / 0.9 / 3, 3000))
    tokens = exponential_tokens(rng, 3000)
    ends_s: list[list[float]] = [[], [], []]
    waits_s = []
    for now, service_s in zip(arrival_s.tolist(), (tokens * TOKEN_S).tolist(), strict=True):
        outstanding = [sum(end > now for end in server[-200:]) for server in ends_s]
        server = ends_s[outstanding.index(min(outstanding))]
        start = max(now, server[-1]) if server else now
        server.append(start + service_s)
        waits_s.append(start - now)
    result = serve(arrival_s, tokens, 3, router="least-outstanding")
    assert result.queue_ms.mean == pytest.approx(1e3 * np.mean(waits_s), rel=1e-9)
    assert result.queue_ms.max == pytest.approx(1e3 * max(waits_s), rel=1e-9)


# ---- Little's law and utilisation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.5, 0.8])
def test_utilisation(rho):
    """The share of time that the server is busy is all service there is, exactly; and rho in the long run."""
    rng = np.random.default_rng(9)
    arrival_s = np.cumsum(rng.exponential(MEAN_TOKENS * TOKEN_S / rho, 20_000))
    tokens = exponential_tokens(rng, 20_000)
    result = serve(arrival_s, tokens)
    assert result.mean_running == pytest.approx(tokens.sum() * TOKEN_S / result.duration_s, rel=1e-9)
    assert result.mean_running == pytest.approx(rho, rel=0.03)


def assert_little(result: SimulationResult) -> None:
    """L = lambda W holds on every sample path that begins and ends with an empty system."""
    rate = result.num_finished / result.duration_s
    in_system = result.mean_running + result.mean_waiting
    assert in_system == pytest.approx(rate * result.e2el_ms.mean / 1e3, rel=1e-9)


@pytest.mark.parametrize("rho", [0.5, 0.8])
@pytest.mark.parametrize("replicas", [1, 2])
def test_littles_law(rho, replicas):
    rng = np.random.default_rng(10)
    arrival_s = np.cumsum(rng.exponential(MEAN_TOKENS * TOKEN_S / rho / replicas, 4000))
    result = serve(arrival_s, exponential_tokens(rng, 4000), replicas)
    assert_little(result)
    # And for the queue alone: Lq = lambda Wq.
    rate = result.num_finished / result.duration_s
    assert result.mean_waiting == pytest.approx(rate * result.queue_ms.mean / 1e3, rel=1e-9)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("leap", [True, False])
@pytest.mark.parametrize("num_blocks", [36, 2000])
def test_littles_law_of_batches(num_blocks, leap, depth):
    """Batches, chunks and, in the smaller pool, preemptions: a preempted request waits again."""
    rng = np.random.default_rng(11)
    arrival_s = np.cumsum(rng.exponential(0.008, 400))
    workload = Workload("batches", arrival_s, rng.integers(1, 200, 400), rng.integers(1, 60, 400))
    system = System(
        SchedulerConfig(64, 8, 260), KVCacheConfig(num_blocks, 16), Mixed(), replicas=2, pipeline_depth=depth
    )
    result = simulate(workload, system, SimulationOptions(warmup_s=0.0, leap=leap))
    assert (result.num_preemptions > 0) == (num_blocks == 36)
    assert_little(result)


# ---- more servers --------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 40_000), min_size=1, max_size=60), st.integers(1, 4))
@settings(max_examples=60)
def test_another_replica_delays_nobody(arrivals_us, servers):
    """Constant service in turns is a common queue (see M/D/c), in which request n starts when it has come and request
    n - c has left: by induction no start is later with a larger c. With services that differ, or routers that look at
    the queues, this is no theorem.
    """
    arrival_s = np.sort(arrivals_us) * 1e-6
    tokens = np.full(len(arrival_s), MEAN_TOKENS)
    fewer, more = [serve(arrival_s, tokens, replicas) for replicas in (servers, servers + 1)]
    for statistic in ("mean", "p50", "p90", "p99", "max"):
        assert getattr(more.queue_ms, statistic) <= getattr(fewer.queue_ms, statistic) + 1e-9
