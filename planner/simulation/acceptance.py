"""How many drafts a verification accepts: a sampled process, because a mean has no 99th percentile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from planner.errors import UserError


@dataclass(frozen=True)
class AcceptanceProcess:
    """Per-position conditional acceptance with request-to-request variation.

    Draft i (from 0) of a round is accepted with probability `conditional_rates[i]`, given that all before it were; the
    first rejection ends the round. Requests differ: each draws one quantile u, uniform on (0, 1), and at every
    position its own rate is the u-quantile of Beta(rate x c, (1 - rate) x c) with c = `concentration`. A request that
    is easy at one position is easy at all, and the mean over requests is exactly `conditional_rates`.

    Attributes:
        conditional_rates: one per draft position, each in [0, 1].
        concentration: how alike requests are; infinite (the default) means that all have the same rates.
    """

    conditional_rates: tuple[float, ...]
    concentration: float = math.inf

    def __post_init__(self) -> None:
        if not self.conditional_rates:
            raise UserError("an acceptance process needs at least one conditional rate, e.g. 0.8,0.7,0.7")
        for position, rate in enumerate(self.conditional_rates):
            if not 0 <= rate <= 1:
                raise UserError(f"acceptance rate {rate} at position {position} is not between 0 and 1")
        if not self.concentration > 0:
            raise UserError(f"acceptance concentration must be positive, not {self.concentration}")

    @classmethod
    def from_unconditional(cls, rates: Sequence[float], concentration: float = math.inf) -> AcceptanceProcess:
        """From the rates that vLLM reports: the share of rounds that accept position i at all.

        Raises:
            UserError: if they increase with position, which unconditional rates cannot.
        """
        conditional = []
        before = 1.0
        for position, rate in enumerate(rates):
            if not 0 <= rate <= before:
                raise UserError(
                    f"unconditional acceptance rate {rate} at position {position} must be between 0 and the rate "
                    f"before it, {before}"
                )
            conditional.append(rate / before if before else 0.0)
            before = rate
        return cls(tuple(conditional), concentration)

    @property
    def unconditional_rates(self) -> tuple[float, ...]:
        """The share of rounds that accept each position, if all requests had the mean rates."""
        return tuple(np.cumprod(self.conditional_rates).tolist())

    def limited(self, num_speculative_tokens: int) -> AcceptanceProcess:
        """The same process for rounds of fewer drafts.

        Raises:
            UserError: if rates for that many positions were never given.
        """
        if num_speculative_tokens > len(self.conditional_rates):
            raise UserError(
                f"num_speculative_tokens {num_speculative_tokens} needs as many acceptance rates, "
                f"but only {len(self.conditional_rates)} are given"
            )
        return AcceptanceProcess(self.conditional_rates[:num_speculative_tokens], self.concentration)

    def mean_accepted(self) -> float:
        """Expected accepted drafts of a round of all positions, averaged over the quantiles of requests."""
        u = (np.arange(4096) + 0.5) / 4096  # midpoint rule over the distribution of requests
        return float(np.cumprod(self.request_rates(u), axis=1).sum(axis=1).mean())

    def request_rates(self, u: np.ndarray) -> np.ndarray:
        """Rates of requests with quantiles `u` [n], as [n, positions]."""
        rates = np.asarray(self.conditional_rates)
        if math.isinf(self.concentration):
            return np.broadcast_to(rates, (len(u), len(rates)))
        columns = []
        for rate in rates:
            if rate in (0.0, 1.0):
                columns.append(np.full(len(u), rate))
            else:
                columns.append(special.betaincinv(rate * self.concentration, (1 - rate) * self.concentration, u))
        return np.stack(columns, axis=1)


class AcceptanceSampler:
    """Draws the rounds of each request, from a random stream of its own."""

    def __init__(self, process: AcceptanceProcess, num_requests: int, seed: np.random.SeedSequence) -> None:
        requests_seed, rounds_seed = seed.spawn(2)
        self._rates = process.request_rates(np.random.default_rng(requests_seed).random(num_requests))
        self._rng = np.random.default_rng(rounds_seed)

    def rounds(self, index: int, count: int) -> list[int]:
        """Accepted drafts in each of `count` rounds of request `index`. To be called once per request, in order."""
        rates = self._rates[index]
        accepted = self._rng.random((count, len(rates))) < rates
        return np.logical_and.accumulate(accepted, axis=1).sum(axis=1).tolist()
