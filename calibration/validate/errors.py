"""The metrics of both sides, by one function, and how far the predicted ones are from the measured ones.

Errors are signed and relative: (predicted - measured) / measured. Percentiles interpolate linearly, as numpy's do and
the benchmark's. What the engine measures of itself is stated beside: the relative difference between its own repeats.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calibration.validate.records import Lives
from engine.bench.metrics import latencies

LATENCIES = ("ttft_ms", "tpot_ms", "e2el_ms")
STATISTICS = ("mean", "p50", "p90", "p99")
THROUGHPUTS = ("output_throughput_tokens_per_s", "request_throughput_per_s")

# The figures to reach, as shares. p99 may instead be within the engine's own spread.
LIMITS = {
    "tpot_ms.mean": 0.02,
    "tpot_ms.p50": 0.02,
    "e2el_ms.p50": 0.03,
    "e2el_ms.p90": 0.03,
    "ttft_ms.p50": 0.05,
    "ttft_ms.p99": 0.10,
    "tpot_ms.p99": 0.10,
    "e2el_ms.p99": 0.10,
    "output_throughput_tokens_per_s": 0.02,
    "request_throughput_per_s": 0.02,
}
SATURATION_LIMIT = 0.03
MIXED_STEP_LIMITS = {"median": 0.02, "p90": 0.05}


def metrics_of(lives: Lives) -> dict[str, float]:
    """ "ttft_ms.p50" and the like, the throughputs and the preemptions; a metric that no request has is left out."""
    found = latencies(lives.columns(), [])
    flat = {
        f"{name}.{statistic}": found[name][statistic]
        for name in LATENCIES
        if found[name] is not None
        for statistic in STATISTICS
    }
    return flat | {name: found[name] for name in THROUGHPUTS} | {"num_preemptions": float(lives.preemptions.sum())}


def relative_error(predicted: float, measured: float) -> float | None:
    """None where nothing was measured that it could be a share of."""
    return (predicted - measured) / measured if measured else None


@dataclass(frozen=True)
class Comparison:
    """One metric of one load level.

    Attributes:
        measured: of each run. predicted: for each run; the same, where the runs had the same arrivals.
        error: of the median prediction against the median measurement. errors: for each run.
        spread: largest difference between the engine's own runs over their median; None of a single run.
        limit: to reach; None where nothing is asked. is_met: None likewise.
    """

    metric: str
    measured: tuple[float, ...]
    predicted: tuple[float, ...]
    error: float | None
    errors: tuple[float | None, ...]
    spread: float | None
    limit: float | None
    is_met: bool | None

    @property
    def measured_median(self) -> float:
        return statistics.median(self.measured)

    @property
    def predicted_median(self) -> float:
        return statistics.median(self.predicted)


def compare(metric: str, predicted: Sequence[float], measured: Sequence[float]) -> Comparison:
    """One metric of every run."""
    error = relative_error(statistics.median(predicted), statistics.median(measured))
    spread = None
    if len(measured) > 1 and statistics.median(measured):
        spread = (max(measured) - min(measured)) / statistics.median(measured)
    limit = LIMITS.get(metric)
    is_met = None
    if limit is not None and error is not None:
        own = spread or 0.0 if metric.endswith("p99") else 0.0
        is_met = abs(error) <= max(limit, own)
    errors = tuple(relative_error(p, m) for p, m in zip(predicted, measured, strict=True))
    return Comparison(metric, tuple(measured), tuple(predicted), error, errors, spread, limit, is_met)


def compare_all(predicted: Sequence[Mapping[str, float]], measured: Sequence[Mapping[str, float]]) -> list[Comparison]:
    """Every metric that all runs have."""
    names = [name for name in measured[0] if all(name in run for run in (*measured, *predicted))]
    return [compare(name, [run[name] for run in predicted], [run[name] for run in measured]) for name in names]


# ---- requests one by one ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RequestErrors:
    """One latency, request by request.

    Attributes:
        pearson: correlation of predicted and measured; None where either does not vary.
        mape: mean of |error|. bias: mean of the signed error.
    """

    pearson: float | None
    mape: float
    bias: float


def request_errors(predicted: np.ndarray, measured: np.ndarray) -> RequestErrors | None:
    """Of [n] seconds each; requests that have none (NaN) or took no time are left out, None if that leaves nobody."""
    chosen = np.isfinite(predicted) & np.isfinite(measured) & (measured > 0)
    p, m = predicted[chosen], measured[chosen]
    if not len(m):
        return None
    errors = p / m - 1
    pearson = None
    # A column of equal values has a deviation of rounding errors, not 0.
    if len(m) > 1 and min(np.ptp(p) / np.abs(p).max(), np.ptp(m) / m.max()) > 1e-12:
        pearson = float(np.corrcoef(p, m)[0, 1])
    return RequestErrors(pearson, float(np.abs(errors).mean()), float(errors.mean()))
