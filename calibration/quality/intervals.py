"""Intervals of 95 %: of statistics over documents by bootstrap, of shares by Wilson's formula."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
_Z = 1.959964  # of 95 %


class Bootstrap:
    """Resamples of whole documents, the same for every statistic, so that differences between formats are paired.

    A document's windows are resampled together: they share what the document is about.
    """

    def __init__(self, documents: Sequence[int], seed: int = 0, resamples: int = RESAMPLES) -> None:
        """
        Args:
            documents: whose window each is.
        """
        names, of_window = np.unique(np.asarray(documents), return_inverse=True)
        draws = np.random.default_rng(seed).multinomial(len(names), [1 / len(names)] * len(names), size=resamples)
        weights = draws[:, of_window].astype(np.float64)
        self._weights = weights / weights.sum(1, keepdims=True)

    def means(self, of_windows: np.ndarray) -> np.ndarray:
        """The mean over the windows of each resample, for windows of equally many tokens: [num_resamples]."""
        return self._weights @ np.asarray(of_windows, np.float64)


def interval(values: np.ndarray) -> list[float]:
    """From the 2.5th to the 97.5th percentile of resampled values."""
    return [float(value) for value in np.percentile(values, (2.5, 97.5))]


def wilson(successes: int, trials: int) -> list[float]:
    """The interval of a share, which also holds for none and all."""
    share, z2 = successes / trials, _Z * _Z
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials)) / (1 + z2 / trials)
    return [max(0.0, middle - half), min(1.0, middle + half)]
