"""How sure a simulation is: the same deployment on resampled loads, with step times that may be the true ones.

A draw has a seed of its own, which resamples the load and samples acceptance, and a quantile of the step-time error of
decodes and one of that of steps with prompts. The quantiles are stratified (a Latin hypercube: one draw in each of n
equal strata of either error, paired at random), so that few draws reach both tails. Everything follows from the seed
and the number of draws; nothing depends on the order or the process in which draws are simulated.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import betaincinv

from planner.schema import Record
from planner.serving import simulate
from planner.simulation import Distribution, SimulationOptions, SimulationResult, System
from planner.step_time import Evidence, StepTime
from planner.workload import Workload

LEVEL = 0.90
#: Draws where step times carry an uncertainty, and loads where they carry none.
NUM_DRAWS = 16
NUM_LOADS = 5
_LATENCIES = ("ttft_ms", "tpot_ms", "e2el_ms")
_RATES = ("request_throughput_per_s", "output_throughput_tokens_per_s", "total_throughput_tokens_per_s")


class Interval(Record):
    """The central 90 % of the draws, widened to the prediction itself where that lies outside of them."""

    low: float
    high: float


class DistributionInterval(Record):
    """Intervals of a latency's statistics over requests, in milliseconds."""

    mean: Interval
    p50: Interval
    p90: Interval
    p95: Interval
    p99: Interval
    at_slo_percentile: Interval


class Probability(Record):
    """How likely something is, judged by how many draws it holds in."""

    met: int
    """Draws in which it holds."""
    of: int
    """Draws simulated."""
    probability: float
    """met / of."""
    low: float
    """Lower end of the 90 % interval of the probability (Clopper and Pearson), as so few draws leave it open."""
    high: float
    """Upper end likewise."""


class Confidence(Record):
    """What a prediction may be off by, from draws of the load and of the step times."""

    level: float = LEVEL
    """Share of draws within each interval."""
    num_draws: int
    """Simulations that the intervals come from."""
    seed: int
    """Draw i, from 1, has this seed plus i."""
    decode_uncertainty: float
    """Relative standard deviation of the factor that the times of decode steps were multiplied by."""
    prefill_uncertainty: float
    """The same of steps with prompt chunks."""
    host_uncertainty: float = 0.0
    """The same of what the host takes to launch a step; 0 where it was not drawn."""
    unknown_share: float
    """Share of the steps' time that lies outside of what was measured, where those deviations promise too much."""
    method: str = "load: moving-block bootstrap of its arrivals, blocks of 60 s; step times: log-normal, stratified"
    """What was drawn, and how."""
    ttft_ms: DistributionInterval | None
    """Time to first token; None if no request has one."""
    tpot_ms: DistributionInterval | None
    """Time per output token after the first; None if no request has two."""
    e2el_ms: DistributionInterval | None
    """Arrival to last token."""
    request_throughput_per_s: Interval
    """Requests finished per second."""
    output_throughput_tokens_per_s: Interval
    """Output tokens per second."""
    total_throughput_tokens_per_s: Interval
    """Input and output tokens per second."""
    slo_probability: Probability | None
    """That the SLO holds; None where nothing was asked."""

    def metric_ms(self, name: str) -> DistributionInterval | None:
        """The intervals behind an SLO limit: "ttft", "tpot" or "e2el"."""
        return getattr(self, f"{name}_ms")


@dataclass(frozen=True, slots=True)
class Draw:
    """One simulation of many.

    Attributes:
        seed: of the resampled load and of every random stream.
        decode, prefill, host: how many standard deviations the logarithms of step times are off; 0 for no error.
    """

    seed: int
    decode: float = 0.0
    prefill: float = 0.0
    host: float = 0.0


def draws(number: int, seed: int) -> list[Draw]:
    """`number` stratified draws; the same for everything that is compared."""
    quantiles = scale_quantiles(number, seed)
    return [Draw(seed + i, *errors) for i, errors in enumerate(quantiles, start=1)]


def scale_quantiles(number: int, seed: int) -> list[tuple[float, float, float]]:
    """Standard normal errors of decodes, prompts and the host: each covers its strata, and they are independent."""
    decode = [statistics.NormalDist().inv_cdf((i + 0.5) / number) for i in range(number)]
    prefill, host = decode.copy(), decode.copy()
    random.Random(f"{seed} {number}").shuffle(prefill)
    random.Random(f"{seed} {number} host").shuffle(host)
    return list(zip(decode, prefill, host, strict=True))


def perturbed(step_time: StepTime, decode: float, prefill: float, host: float = 0.0) -> StepTime:
    """The step times if they are off by so many standard deviations; themselves if nothing is known of their error."""
    sure = step_time.uncertainty
    if sure is None:
        return step_time
    errors = {"decode": (sure.decode, decode), "prefill": (sure.prefill, prefill), "host": (sure.host, host)}
    return step_time.scaled(**{name: math.exp(deviation * error) for name, (deviation, error) in errors.items()})


def simulate_draw(
    workload: Workload, system: System, options: SimulationOptions, draw: Draw
) -> SimulationResult | None:
    """A system on the load and with the step times of a draw, without its timeline.

    None if the resampled load happens to have no request that the system takes.
    """
    resampled = workload.resampled(draw.seed)
    if not (resampled.input_tokens < system.scheduler.max_model_len).any():
        return None
    options = replace(options, seed=draw.seed, stop_when_slo_is_lost=False)
    if options.warmup_s is not None:
        options = replace(options, warmup_s=min(options.warmup_s, resampled.duration_s))
    if not isinstance(options.client_timeout_s, int | float | None):
        options = replace(options, client_timeout_s=None)  # one for each request of another load
    step_time = perturbed(system.step_time, draw.decode, draw.prefill, draw.host)
    result = simulate(resampled, replace(system, step_time=step_time), options)
    return result.model_copy(update={"timeline": ()})


def confidence(
    point: SimulationResult, runs: Sequence[SimulationResult], step_time: StepTime, seed: int
) -> Confidence | None:
    """The intervals around a prediction, and how likely it meets its SLO.

    Args:
        point: the prediction. runs: what was drawn around it.

    Returns:
        None where nothing is known of the error of its step times, or nothing was drawn.
    """
    sure = step_time.uncertainty
    if sure is None or not runs:
        return None
    return Confidence(
        num_draws=len(runs),
        seed=seed,
        decode_uncertainty=sure.decode,
        prefill_uncertainty=sure.prefill,
        host_uncertainty=sure.host,
        unknown_share=_unknown_share(point, step_time),
        slo_probability=None if point.slo_met is None else probability([bool(run.slo_met) for run in runs]),
        **{name: _distribution(getattr(point, name), [getattr(run, name) for run in runs]) for name in _LATENCIES},
        **{name: interval(getattr(point, name), [getattr(run, name) for run in runs]) for name in _RATES},
    )


def _unknown_share(point: SimulationResult, step_time: StepTime) -> float:
    """What was transferred as a whole has the error of that in its uncertainty; single steps beyond a grid have not."""
    if step_time.evidence is Evidence.EXTRAPOLATED:
        return 0.0
    return point.evidence_shares.get(Evidence.EXTRAPOLATED, 0.0)


def interval(point: float, values: Sequence[float]) -> Interval:
    """Where the central 90 % of the values lie, and the point."""
    # Hazen's: draw i of n stands for the quantile (i - 1/2) / n.
    low, high = np.quantile([float(value) for value in values], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="hazen")
    return Interval(low=min(float(low), point), high=max(float(high), point))


def _distribution(point: Distribution | None, runs: Sequence[Distribution | None]) -> DistributionInterval | None:
    known = [run for run in runs if run is not None]
    if point is None or not known:
        return None
    names = DistributionInterval.model_fields
    return DistributionInterval(
        **{name: interval(getattr(point, name), [getattr(run, name) for run in known]) for name in names}
    )


def probability(held: Sequence[bool]) -> Probability:
    """The share of draws, at least one, in which something holds, with Clopper and Pearson's interval.

    Stratified draws spread less than independent ones, for which the interval is made: it is rather too wide.
    """
    met, of = sum(held), len(held)
    tail = (1 - LEVEL) / 2
    low = float(betaincinv(met, of - met + 1, tail)) if met else 0.0
    high = float(betaincinv(met + 1, of - met, 1 - tail)) if met < of else 1.0
    return Probability(met=met, of=of, probability=met / of, low=low, high=high)


def why_no_interval(step_time: StepTime) -> str | None:
    """What to say in place of intervals; None where there can be some."""
    if step_time.uncertainty is not None:
        return None
    return f"step times are {step_time.evidence.value}, and nothing measured says how far they are off"
