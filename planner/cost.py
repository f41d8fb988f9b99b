"""What a simulated deployment costs: per hour, and per million tokens of the load that it served."""

from __future__ import annotations

from dataclasses import dataclass

from planner.deployment import Deployment, PriceList
from planner.simulation import SimulationResult

_SECONDS_PER_HOUR = 3600
_MILLION = 1e6


@dataclass(frozen=True, slots=True)
class Cost:
    """What a deployment costs under a load; None where the GPU has no price, or no token was served.

    Attributes:
        usd_per_hour: all GPUs.
        usd_per_million_tokens: of input and output together; usd_per_million_output_tokens: all of it on the output.
            Both at this load, not at full load.
        source: of the price; empty without one.
    """

    usd_per_hour: float | None
    usd_per_million_tokens: float | None
    usd_per_million_output_tokens: float | None
    source: str


def usd_per_million(usd_per_hour: float | None, tokens_per_s: float) -> float | None:
    """US dollars per million tokens of something that costs so much an hour."""
    if usd_per_hour is None or not tokens_per_s > 0:
        return None
    return usd_per_hour / (tokens_per_s * _SECONDS_PER_HOUR) * _MILLION


def cost_of(deployment: Deployment, result: SimulationResult, prices: PriceList) -> Cost:
    """The cost of a deployment under the load that it was simulated with."""
    price = prices.price(deployment.gpu)
    per_hour = price.usd_per_gpu_hour * deployment.num_gpus if price else None
    return Cost(
        per_hour,
        usd_per_million(per_hour, result.total_throughput_tokens_per_s),
        usd_per_million(per_hour, result.output_throughput_tokens_per_s),
        f"{price.source} {price.date}".strip() if price else "",
    )
