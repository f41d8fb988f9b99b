"""How far a simulated run is from the served one: signed errors of mean and percentiles of each metric."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field, FiniteFloat

from planner.external.replay import Replayed
from planner.external.served_run import ServedRun
from planner.schema import Record

_PERCENTILES = (50, 90, 99)


class MetricError(Record):
    """One metric over the requests of one part of the runs; errors are simulated over served, less 1."""

    served_mean_ms: FiniteFloat
    mean: FiniteFloat
    p50: FiniteFloat
    p90: FiniteFloat
    p99: FiniteFloat
    median_request: FiniteFloat = Field(description="median over requests of |simulated - served| / served")
    num_requests: int


class RunErrors(Record):
    """Each metric's error; TPOT is None where no answer has two tokens."""

    ttft: MetricError
    tpot: MetricError | None
    e2el: MetricError


def run_errors(
    runs: Sequence[ServedRun], replayed: Sequence[Replayed], masks: Sequence[np.ndarray]
) -> RunErrors | None:
    """Errors over the requests that the masks (bool [n] per run) choose, all runs together; None for no request."""
    if not any(mask.any() for mask in masks):
        return None
    metrics = {}
    for name in ("ttft", "tpot", "e2el"):
        parts = zip(runs, replayed, masks, strict=True)
        pairs = [(getattr(run, f"{name}_s")[mask], getattr(result, f"{name}_s")[mask]) for run, result, mask in parts]
        served, simulated = (np.concatenate(column) for column in zip(*pairs, strict=True))
        known = np.isfinite(served) & np.isfinite(simulated)
        metrics[name] = _error(served[known], simulated[known]) if known.any() else None
    return RunErrors(**metrics)


def _error(served: np.ndarray, simulated: np.ndarray) -> MetricError:
    def relative(before: float, after: float) -> float:
        return float(after / before - 1) if before else 0.0

    percentiles = {
        f"p{percent}": relative(np.percentile(served, percent), np.percentile(simulated, percent))
        for percent in _PERCENTILES
    }
    positive = served > 0
    distances = np.abs(simulated[positive] / served[positive] - 1)
    return MetricError(
        served_mean_ms=float(served.mean()) * 1e3,
        mean=relative(served.mean(), simulated.mean()),
        median_request=float(np.median(distances)) if distances.size else 0.0,
        num_requests=len(served),
        **percentiles,
    )
