"""Arrival processes: gaps between requests as `vllm bench serve --request-rate --burstiness` draws them."""

from __future__ import annotations

import numpy as np


def gamma_gaps(rng: np.random.Generator, n: int, request_rate: float, burstiness: float) -> np.ndarray:
    """n inter-arrival times in seconds, Gamma with shape `burstiness` and mean 1/`request_rate`.

    Burstiness 1 is Poisson, below 1 burstier, inf evenly spaced; the gaps' coefficient of variation is 1/√burstiness.
    Unlike in `vllm bench serve` the sum is not rescaled to n/rate: that would be another process than was asked for.
    """
    if np.isinf(burstiness):
        return np.full(n, 1.0 / request_rate)
    return rng.standard_gamma(burstiness, n) / (request_rate * burstiness)
