"""What is asked of a service: latency limits at a percentile."""

from __future__ import annotations

import math
from dataclasses import dataclass

from planner.errors import UserError


@dataclass(frozen=True, slots=True)
class SLO:
    """Limits at a percentile of requests; None where nothing is asked.

    Attributes:
        ttft_ms, tpot_ms, e2el_ms: limits in milliseconds.
        percentile: the share of requests that must be within each limit, 0 to 100.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2el_ms: float | None = None
    percentile: float = 99.0

    def __post_init__(self) -> None:
        for name, limit in self.limits().items():
            if not (math.isfinite(limit) and limit > 0):
                raise UserError(f"the SLO on {name} must be a positive number of milliseconds, not {limit}")
        if not 0 < self.percentile <= 100:
            raise UserError(f"the SLO's percentile must be above 0 and at most 100, not {self.percentile}")

    def limits(self) -> dict[str, float]:
        """The limits that are set, by metric name."""
        named = {"ttft": self.ttft_ms, "tpot": self.tpot_ms, "e2el": self.e2el_ms}
        return {name: limit for name, limit in named.items() if limit is not None}
