"""What the times of a benchmark cannot be, so that milliseconds are not taken for seconds.

Each limit lies far from what any engine does and from what any load does to it, and on this side of what a wrong unit,
which is a factor of a thousand, makes of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.scheduling import StepShape
from planner.errors import UserError
from planner.external.served_run import ServedRun
from planner.step_time import StepTime

# Seconds since 1970 get there in the year 5138; milliseconds since 1970 were there in 1973.
_LATEST_S = 1e11
# What a clock that counts from 1970 shows at most in each unit, for centuries to come.
_EPOCHS = (("ms", 1e14), ("us", 1e17), ("ns", float("inf")))
# A client measures its duration around all requests: slack for its start and end, not for a unit.
_DURATION_FACTOR, _DURATION_SLACK_S = 2.0, 1.0
# A loaded engine takes some tens of times as long for a token as an idle one; a wrong unit makes it a thousand.
_SLOWEST_TOKEN = 250.0
# The CPU, which steps of small models wait for, and which their step times may not know.
_SHORTEST_STEP_S = 5e-3
# Accepted drafts and another GPU than was said make tokens some tens of times as fast; a wrong unit, a thousand.
_FASTEST_TOKEN = 1e-2


def unit_of_instant(value: float) -> str | None:
    """The unit in which this is a time since 1970, where it cannot be one in seconds; None where it can."""
    if value <= _LATEST_S:
        return None
    return next(unit for unit, most in _EPOCHS if value <= most)


def first_impossible(instants: np.ndarray) -> int | None:
    """The place of the first of these (float64 [n]) that cannot be in seconds; None where all can."""
    places = np.flatnonzero(instants > _LATEST_S)
    return int(places[0]) if places.size else None


def check_duration(where: str, duration: Any, requests: ServedRun, assumed: bool) -> None:
    """Hold requests against the duration that their benchmark says, if it does.

    Args:
        assumed: whether nothing says when they were sent, so that they count as sent at once.

    Raises:
        UserError: they last longer than the whole benchmark or, all sent at once, are over long before its end.
    """
    if type(duration) not in (int, float) or not 0 < duration < float("inf"):
        return
    span, longest = float(requests.arrival_s[-1]), float(requests.e2el_s.max())
    most = _DURATION_FACTOR * duration + _DURATION_SLACK_S
    units = "check them, and that they are in seconds"
    if span > most:
        raise UserError(f"{where}: start_times span {span:,.1f} s, but duration is {duration:,.1f} s; {units}")
    if longest > most:
        raise UserError(
            f"{where}: by ttfts and itls a request takes {longest:,.1f} s, but duration is {duration:,.1f} s; {units}"
        )
    # What failed may have lasted until the end.
    if assumed and not requests.num_failed and duration > _DURATION_FACTOR * longest + _DURATION_SLACK_S:
        raise UserError(
            f"{where} has no 'start_times', and its requests were not all sent at once, as its request_rate says: "
            f"duration is {duration:,.1f} s, and the longest request takes {longest:,.1f} s; use a client that records "
            "start_times (vllm bench serve of 2025-09 or later, with --save-detailed)"
        )


def check_token_times(run: ServedRun, step_time: StepTime, served: str) -> None:
    """Hold the time per token against a step of one request, to refuse times in another unit than is said.

    Args:
        served: model and GPU, for people.

    Raises:
        UserError: tokens are hundreds of times slower or faster than a step.
    """
    step = step_time.predict(StepShape(decode_contexts=[1]))
    several = run.output_tokens > 1
    slow = float(np.median(run.tpot_s[several])) if several.any() else 0.0
    # Queueing makes this longer and answers in one lump do not make it shorter, so it is never too short.
    fast = float(np.median(run.e2el_s / run.output_tokens))
    if slow > _SLOWEST_TOKEN * max(step, _SHORTEST_STEP_S):
        found = slow
    elif 0 < fast < _FASTEST_TOKEN * step:
        found = fast
    else:
        return
    of = f"by {run.told_by} " if run.told_by else ""
    raise UserError(
        f"{run.name}: {of}the median token takes {_shown(found)}, but a step of {served} {_shown(step)}, so a unit is "
        "wrong; times are in seconds, and a table's in what its column's name ends in: _s, _ms, _us or _ns"
    )


def _shown(seconds: float) -> str:
    scale, unit = next((pair for pair in ((1.0, "s"), (1e3, "ms")) if seconds * pair[0] >= 1), (1e6, "us"))
    return f"{seconds * scale:.3g} {unit}"
