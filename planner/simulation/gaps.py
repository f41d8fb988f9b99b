"""Percentiles of the gaps between tokens: millions of them, kept as arithmetic progressions until the end.

The result depends only on the multiset of gaps, not on how it was cut into runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

# Gaps that are expanded at once; beyond it two passes over slices keep memory flat.
_SLICE = 4_000_000
_BINS = 65_536


def weighted_gaps(runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All gaps of some runs, and the requests that saw each.

    Args:
        runs: int64 [n, 4] of (first, increment, steps, batch).

    Returns:
        Gaps and weights, int64 [sum of steps] each.
    """
    first, increment, steps, batch = runs.T
    ends = np.cumsum(steps)
    place = np.arange(ends[-1]) - np.repeat(ends - steps, steps)
    return np.repeat(first, steps) + np.repeat(increment, steps) * place, np.repeat(batch, steps)


def gap_statistics(runs: np.ndarray, percentiles: Sequence[float]) -> tuple[float, list[int]]:
    """Mean and percentiles (the smallest gap that at least that share does not exceed) of all gaps, in ticks.

    Args:
        runs: int64 [n, 4], n >= 1.
        percentiles: 0 to 100; 100 gives the largest gap.
    """
    count = int((runs[:, 2] * runs[:, 3]).sum())
    ranks = [max(1, math.ceil(percentile / 100 * count)) for percentile in percentiles]
    if int(runs[:, 2].sum()) <= _SLICE:
        gaps, weights = weighted_gaps(runs)
        return _total(gaps, weights) / count, _select(gaps, weights, ranks, 0)
    return sum(_total(*part) for part in _slices(runs)) / count, _at_ranks(runs, ranks)


def _total(gaps: np.ndarray, weights: np.ndarray) -> int:
    """The sum of gaps × weights, exactly: in two halves that do not overflow, or in Python's integers."""
    if int(gaps.max()) >> 53 or int(weights.max()) >> 12:
        return sum(gap * weight for gap, weight in zip(gaps.tolist(), weights.tolist(), strict=True))
    high, low = gaps >> 28, gaps & ((1 << 28) - 1)
    return (int((high * weights).sum()) << 28) + int((low * weights).sum())


def _at_ranks(runs: np.ndarray, ranks: list[int]) -> list[int]:
    # First pass: which bins hold the wanted ranks. Second pass: the gaps of just those bins.
    last = runs[:, 0] + runs[:, 1] * (runs[:, 2] - 1)
    edges = np.unique(np.geomspace(runs[:, 0].min(), last.max() + 1, _BINS).astype(np.int64))
    weight = np.zeros(len(edges) + 1, np.int64)
    for gaps, weights in _slices(runs):
        # Weights are small integers, which float64 sums exactly.
        counted = np.bincount(np.searchsorted(edges, gaps, side="right"), weights, len(edges) + 1)
        weight += counted.astype(np.int64)
    cumulative = np.cumsum(weight)
    wanted = np.unique(np.searchsorted(cumulative, ranks))
    kept: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {int(b): [] for b in wanted}
    for gaps, weights in _slices(runs):
        bins = np.searchsorted(edges, gaps, side="right")
        for chosen, parts in kept.items():
            inside = bins == chosen
            parts.append((gaps[inside], weights[inside]))
    found = []
    for rank in ranks:
        chosen = int(np.searchsorted(cumulative, rank))
        gaps, weights = (np.concatenate(part) for part in zip(*kept[chosen], strict=True))
        found += _select(gaps, weights, [rank], int(cumulative[chosen] - weight[chosen]))
    return found


def _slices(runs: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    ends = np.cumsum(runs[:, 2])
    start = 0
    while start < len(runs):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _SLICE, side="right")))
        yield weighted_gaps(runs[start:stop])
        start = stop


def _select(gaps: np.ndarray, weights: np.ndarray, ranks: list[int], before: int) -> list[int]:
    """The gaps at 1-based weighted ranks, `before` of the weight lying below all of them."""
    bits = int(weights.max()).bit_length()
    if int(gaps.max()) >> (62 - bits):
        order = np.argsort(gaps)
        gaps, weights = gaps[order], weights[order]
    else:
        # Sorting one array of (gap, weight) packed in 63 bits is several times faster than sorting by an index.
        packed = np.sort(gaps << bits | weights)
        gaps, weights = packed >> bits, packed & ((1 << bits) - 1)
    return gaps[np.searchsorted(before + np.cumsum(weights), ranks)].tolist()
