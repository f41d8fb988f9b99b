"""A served load beside the simulator: the same arrivals and lengths, each metric measured and predicted."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.errors import UserError
from planner.external.replay import Replayed
from planner.external.served_run import ServedRun
from planner.intervals import Interval, interval, perturbed, scale_quantiles
from planner.serving import arrival_seconds
from planner.simulation import SimulationOptions, System, run

LATENCIES = ("ttft", "tpot", "e2el")
STATISTICS = ("mean", "p50", "p90", "p99")
#: Every metric, in the order in which people read them.
METRICS = (
    *(f"{name}_ms.{statistic}" for name in LATENCIES for statistic in STATISTICS),
    "output_throughput_tokens_per_s",
    "request_throughput_per_s",
)
# Clocks are written down in microseconds.
_SAME_S = 2e-6


@dataclass(frozen=True)
class MetricParity:
    """One metric of a load.

    Attributes:
        measured: of each run. predicted: once, as the runs have the same load.
        interval: 90 % of what is predicted with step times that may be the true ones; None where their error is not
            known.
    """

    measured: tuple[float, ...]
    predicted: float
    interval: Interval | None = None

    @property
    def measured_median(self) -> float:
        return statistics.median(self.measured)

    @property
    def error(self) -> float | None:
        """(predicted - measured) / measured, of the median run; None where nothing was measured."""
        measured = self.measured_median
        return self.predicted / measured - 1 if measured else None

    @property
    def spread(self) -> float | None:
        """The largest difference between the runs over their median; None of a single one."""
        if len(self.measured) < 2 or not self.measured_median:
            return None
        return (max(self.measured) - min(self.measured)) / self.measured_median


@dataclass(frozen=True, eq=False)
class LoadParity:
    """One load, and what the simulator says of it.

    Attributes:
        runs: of the same load. predicted: of each request.
        metrics: by the names of `METRICS`, those that both sides have.
    """

    runs: tuple[ServedRun, ...]
    predicted: Replayed
    metrics: dict[str, MetricParity]

    @property
    def request_rate_per_s(self) -> float | None:
        """Offered; None if all came at once."""
        last = float(self.runs[0].arrival_s[-1])
        return (len(self.runs[0]) - 1) / last if last else None

    def request_error(self, latency: str) -> float | None:
        """Mean over the first run's requests of |predicted - measured| / measured; None where nobody has it."""
        measured, predicted = self.pairs(latency)
        return float(np.abs(predicted / measured - 1).mean()) if len(measured) else None

    def pairs(self, latency: str) -> tuple[np.ndarray, np.ndarray]:
        """float64 [n] seconds each: measured and predicted, of the first run's requests that took any time."""
        known = self.known(latency)
        return getattr(self.runs[0], f"{latency}_s")[known], getattr(self.predicted, f"{latency}_s")[known]

    def known(self, latency: str) -> np.ndarray:
        """bool [n]: which requests of the first run have this latency on both sides."""
        measured, predicted = getattr(self.runs[0], f"{latency}_s"), getattr(self.predicted, f"{latency}_s")
        with np.errstate(invalid="ignore"):
            return np.isfinite(measured) & np.isfinite(predicted) & (measured > 0) & (predicted > 0)


def loads_of(runs: Sequence[ServedRun]) -> list[list[ServedRun]]:
    """Runs with the same arrivals and lengths together, in order."""
    loads: list[list[ServedRun]] = []
    for each in runs:
        same = next((load for load in loads if _is_same(load[0], each)), None)
        if same is None:
            loads.append([each])
        else:
            same.append(each)
    return loads


def _is_same(one: ServedRun, other: ServedRun) -> bool:
    return (
        len(one) == len(other)
        and np.array_equal(one.input_tokens, other.input_tokens)
        and np.array_equal(one.output_tokens, other.output_tokens)
        and bool(np.allclose(one.arrival_s, other.arrival_s, rtol=0, atol=_SAME_S))
    )


def parity(
    runs: Sequence[ServedRun],
    system: System,
    num_draws: int = 0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> LoadParity:
    """Replay one load.

    Args:
        runs: of the same load, at least one.
        system: what served them, as `planner.external.settings.external_system` finds it, with any step time.
        num_draws: simulations for intervals, with step times drawn from what is known of their error.
        progress: is told how many simulations are done, and of how many.

    Raises:
        UserError: a load that the system cannot take.
    """
    step_time = system.step_time
    drawn = scale_quantiles(num_draws, seed) if step_time.uncertainty is not None and num_draws else []
    total = 1 + len(drawn)

    def tell(done: int) -> None:
        if progress is not None:
            progress(done, total)

    tell(0)
    predicted = _replay(runs[0], system)
    others = []
    for number, errors in enumerate(drawn, start=1):
        tell(number)
        others.append(_metrics(runs[0], _replay(runs[0], replace(system, step_time=perturbed(step_time, *errors)))))
    measured = [_metrics(each, each) for each in runs]
    here = _metrics(runs[0], predicted)
    metrics = {
        name: MetricParity(
            tuple(each[name] for each in measured),
            here[name],
            interval(here[name], [each[name] for each in others]) if others else None,
        )
        for name in METRICS
        if name in here and all(name in each for each in measured)
    }
    return LoadParity(tuple(runs), predicted, metrics)


def _replay(served: ServedRun, system: System) -> Replayed:
    """Each request as a client sees it, whatever the step time: `planner.external.replay` is for one to be scaled."""
    longest, limit = int((served.input_tokens + served.output_tokens).max()), system.scheduler.max_model_len
    if longest > limit:
        raise UserError(
            f"{served.name} has a request of {longest:,} tokens, but max_model_len is {limit:,}: the settings are not "
            f"those of the server that answered it"
        )
    added_s = arrival_seconds(system.step_time)
    outcome = run(served.workload(), system, SimulationOptions(warmup_s=0.0))
    log = outcome.requests
    gaps = (served.output_tokens - 1).astype(np.float64)
    gaps[gaps == 0] = np.nan
    tpot_s = (log.e2el_s - log.ttft_s) / gaps
    return Replayed(log.ttft_s + added_s, log.e2el_s + added_s, tpot_s, int(log.preemptions.sum()))


def _metrics(load: ServedRun, side: ServedRun | Replayed) -> dict[str, float]:
    """The metrics of one side; latencies in milliseconds."""
    found = {}
    for name in LATENCIES:
        values = getattr(side, f"{name}_s")
        values = 1e3 * values[np.isfinite(values)]
        if len(values):
            found[f"{name}_ms.mean"] = float(values.mean())
            found |= {f"{name}_ms.{at}": float(np.percentile(values, float(at[1:]))) for at in STATISTICS[1:]}
    duration_s = float((load.arrival_s + side.e2el_s).max())
    if duration_s > 0:
        found["output_throughput_tokens_per_s"] = float(load.output_tokens.sum()) / duration_s
        found["request_throughput_per_s"] = len(load) / duration_s
    return found
