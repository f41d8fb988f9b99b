"""Latencies of requests as `vllm bench serve` defines them.

    TTFT = first token − arrival        TPOT = (E2EL − TTFT) / (output tokens − 1), requests of 2 or more
    E2EL = last token − arrival         ITL  = each gap between a request's output events

Percentiles interpolate linearly between ranks, as numpy's do by default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 99)


def distribution_ms(values_s: Sequence[float] | np.ndarray) -> dict[str, float] | None:
    """Mean and percentiles in milliseconds of times in seconds; None of none."""
    if not len(values_s):
        return None
    values_ms = np.asarray(values_s, np.float64) * 1e3
    found = {"mean": values_ms.mean()}
    found |= {f"p{p}": value for p, value in zip(PERCENTILES, np.percentile(values_ms, PERCENTILES), strict=True)}
    return {name: round(float(value), 4) for name, value in found.items()}


def latencies(requests: Mapping[str, Sequence[Any]], gaps_s: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Latencies and throughputs of requests that all finished.

    Args:
        requests: columns arrival_s, scheduled_s, first_token_s and last_token_s in seconds since the start,
            input_tokens and output_tokens, one entry per request. A client does not know scheduled_s, which then is
            None in every row, as is queue_ms.
        gaps_s: the gaps between output events of all requests.
    """
    if not len(requests["arrival_s"]):
        return {"num_requests": 0}
    arrival, first, last = (
        np.asarray(requests[name], np.float64) for name in ("arrival_s", "first_token_s", "last_token_s")
    )
    scheduled = None if requests["scheduled_s"][0] is None else np.asarray(requests["scheduled_s"], np.float64)
    inputs, outputs = (np.asarray(requests[name], np.int64) for name in ("input_tokens", "output_tokens"))
    several = outputs > 1
    duration_s = float(last.max())
    return {
        "num_requests": len(arrival),
        "duration_s": round(duration_s, 6),
        "input_tokens": int(inputs.sum()),
        "output_tokens": int(outputs.sum()),
        "request_throughput_per_s": round(len(arrival) / duration_s, 4),
        "output_throughput_tokens_per_s": round(float(outputs.sum()) / duration_s, 2),
        "total_throughput_tokens_per_s": round(float((inputs + outputs).sum()) / duration_s, 2),
        "ttft_ms": distribution_ms(first - arrival),
        "queue_ms": None if scheduled is None else distribution_ms(scheduled - arrival),
        "tpot_ms": distribution_ms((last - first)[several] / (outputs[several] - 1)),
        "itl_ms": distribution_ms(gaps_s),
        "e2el_ms": distribution_ms(last - arrival),
    }
