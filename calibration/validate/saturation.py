"""The request rate that an engine sustains: beyond it the queue grows for as long as the load lasts.

    saturation point = the largest service rate over the load levels, at least one of which is past the knee
    service rate     = output tokens given out in the second half of the arrivals, per second, over the mean output
                       tokens of a request
    past the knee    = requests queue up: over the last quarter of the arrivals twice as many as over the second one,
                       and at least 4, wait for their first token on average

The first half is the batch filling up; behind the last arrival it drains, and neither says what is sustained. Tokens
rather than requests are counted, each request's spread evenly between its first and its last, as a few hundred
requests that end or do not end just before the last arrival would decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calibration.validate.errors import relative_error
from calibration.validate.records import Lives

_FILLING = 1 / 2
_GROWTH, _MIN_WAITING = 2.0, 4.0
# The stretch must hold enough requests for their mean to say anything.
_MIN_REQUESTS = 20


@dataclass(frozen=True)
class Service:
    """Of one load level: requests per second that arrived and that were served, and whether they piled up."""

    offered_per_s: float
    served_per_s: float
    is_past_knee: bool


@dataclass(frozen=True)
class Saturation:
    """The saturation point on both sides, in requests per second; None where no level is past the knee."""

    measured_per_s: float | None
    predicted_per_s: float | None
    error: float | None


def service(lives: Lives) -> Service | None:
    """None of a load too short to tell, such as one that arrives all at once."""
    end = float(lives.arrival_s[-1])
    start = _FILLING * end
    arrived = (lives.arrival_s > start) & (lives.arrival_s <= end)
    if arrived.sum() < _MIN_REQUESTS:
        return None
    mean = lives.output_tokens.mean()
    span = end - start
    served = (tokens_until(lives, end) - tokens_until(lives, start)) / mean / span
    offered = lives.output_tokens[arrived].sum() / mean / span
    early, late = mean_waiting(lives, end / 4, end / 2), mean_waiting(lives, end * 3 / 4, end)
    return Service(float(offered), float(served), late >= max(_MIN_WAITING, _GROWTH * early))


def tokens_until(lives: Lives, instant: float) -> float:
    """Output tokens that all requests together have by then."""
    lasting = np.maximum(lives.last_token_s - lives.first_token_s, 1e-9)
    share = np.clip((instant - lives.first_token_s) / lasting, 0.0, 1.0)
    has_first = instant >= lives.first_token_s
    return float((has_first * (1 + share * (lives.output_tokens - 1))).sum())


def mean_waiting(lives: Lives, start: float, end: float) -> float:
    """Requests that have arrived and have no token yet, on average from `start` to `end`."""
    waits = np.minimum(lives.first_token_s, end) - np.maximum(lives.arrival_s, start)
    return float(np.maximum(waits, 0.0).sum() / (end - start))


def saturation(measured: Sequence[Service], predicted: Sequence[Service]) -> Saturation:
    """Over the load levels of one engine, the same on both sides."""
    one, other = _point(measured), _point(predicted)
    return Saturation(one, other, None if one is None or other is None else relative_error(other, one))


def _point(levels: Sequence[Service]) -> float | None:
    if not any(level.is_past_knee for level in levels):
        return None
    return max(level.served_per_s for level in levels)
