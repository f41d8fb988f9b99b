"""Non-negative least squares on relative errors, where a coefficient must earn its place, and how errors are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

# A single step may be far off for reasons of its own; beyond this a relative error counts as no larger.
_LARGE = 0.1
# Reweighting towards least absolute errors: rounds, and the error below which a point gets no more weight.
_ROUNDS, _SMALL = 4, 0.002
# By how much a further coefficient must lower the leave-one-out error.
_MUST_WIN = 0.02


@dataclass(frozen=True)
class Chosen:
    """A regression after the choice of its columns.

    Attributes:
        values: coefficient of each column; 0.0 of those that were dropped.
        dropped: columns that did not lower the leave-one-out error.
        score: mean absolute leave-one-out error, in the weighted unit; 0.1 stands for everything above.
    """

    values: Mapping[str, float]
    dropped: tuple[str, ...]
    score: float


def solve(columns: Sequence[np.ndarray], target: np.ndarray, weight: np.ndarray, robust: bool = False) -> np.ndarray:
    """Non-negative coefficients that minimise the weighted squares. One per column; none for no columns.

    Args:
        robust: minimise about the absolute errors instead, which outliers bend less.
    """
    if not len(columns):
        return np.zeros(0)
    if robust:
        solved, reweighted = solve(columns, target, weight), weight
        for _ in range(_ROUNDS):
            errors = np.abs(np.column_stack(columns) @ solved - target) * weight
            reweighted = weight / np.sqrt(np.maximum(errors, _SMALL))
            solved = solve(columns, target, reweighted)
        return solved
    from scipy.optimize import nnls  # half a second, which a plan without a profile need not wait for

    matrix = np.column_stack(columns) * weight[:, None]
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    return nnls(matrix / scale, target * weight, maxiter=50 * matrix.shape[1] + 100)[0] / scale


def left_out(columns: Sequence[np.ndarray], target: np.ndarray, weight: np.ndarray, robust: bool = False) -> np.ndarray:
    """Weighted error of each row, predicted from the others."""
    errors, rows = np.empty(len(target)), np.arange(len(target))
    for i in rows:
        others = rows != i
        values = solve([column[others] for column in columns], target[others], weight[others], robust)
        predicted = sum((value * column[i] for value, column in zip(values, columns, strict=True)), 0.0)
        errors[i] = (predicted - target[i]) * weight[i]
    return errors


def choose(
    always: Mapping[str, np.ndarray],
    optional: Mapping[str, np.ndarray],
    target: np.ndarray,
    weight: np.ndarray,
    robust: bool = False,
) -> Chosen:
    """Fit the columns `always`, and those of `optional` that lower the leave-one-out error.

    All sets of the optional columns are tried, small ones first; a larger one must be better by 2 %.
    """
    names = [name for name, column in optional.items() if np.ptp(column) > 0 or (column != 0).any()]
    best: tuple[str, ...] = ()
    score = np.inf
    for size in range(len(names) + 1):
        for subset in combinations(names, size):
            columns = [*always.values(), *(optional[name] for name in subset)]
            if len(columns) >= len(target) and columns and size:
                continue
            errors = np.abs(left_out(columns, target, weight, robust))
            found = float(np.minimum(errors, _LARGE).mean()) if len(target) else 0.0
            if found < score * (1 - (_MUST_WIN if size else 0)):
                best, score = subset, found
    columns = {**always, **{name: optional[name] for name in best}}
    solved = solve(list(columns.values()), target, weight, robust) if len(target) else np.zeros(len(columns))
    values = dict.fromkeys([*always, *optional], 0.0) | dict(zip(columns, map(float, solved), strict=True))
    kept = {name for name in best if values[name] > 0}
    return Chosen(values, tuple(name for name in optional if name not in kept), score)


def grow(
    always: Mapping[str, np.ndarray], optional: Mapping[str, np.ndarray], target: np.ndarray, weight: np.ndarray
) -> Chosen:
    """As `choose`, for many optional columns: one after another, each time the one that helps most.

    Outliers bend neither the choice nor the fit much: errors count as they are, but the fit minimises absolute ones.
    """
    columns, left = dict(always), dict(optional)
    score = np.inf if not len(target) else float(np.abs(left_out(list(columns.values()), target, weight)).mean())
    while left and len(columns) + 1 < len(target):
        trials = {
            name: float(np.abs(left_out([*columns.values(), column], target, weight)).mean())
            for name, column in left.items()
        }
        name = min(trials, key=trials.__getitem__)
        if not trials[name] < score * (1 - _MUST_WIN):
            break
        columns[name], score = left.pop(name), trials[name]
    solved = solve(list(columns.values()), target, weight, robust=True) if len(target) else np.zeros(len(columns))
    values = dict.fromkeys([*always, *optional], 0.0) | dict(zip(columns, map(float, solved), strict=True))
    return Chosen(values, tuple(name for name in optional if not values[name] > 0), score)


def summary(errors: Sequence[float]) -> dict[str, float] | None:
    """Median, 90th percentile and maximum of absolute relative errors; None for none."""
    if not len(errors):
        return None
    sizes = np.abs(np.asarray(errors, float))
    median, p90 = np.percentile(sizes, [50, 90])
    return {"median": float(median), "p90": float(p90), "max": float(sizes.max())}


def table_errors(in_sample: Sequence[float], out: Sequence[float], dropped: Sequence[str] = ()) -> dict[str, Any]:
    """What `fit.errors()` says of one table."""
    return {
        "points": len(in_sample),
        "in_sample": summary(in_sample),
        "leave_one_out": summary(out),
        "dropped": list(dropped),
    }
