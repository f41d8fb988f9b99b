"""What residuals of single requests add up to: their means along a few features of the requests.

A simulated request that arrives a little before or after the end of a step waits one step less or more, so the latency
of a single request jumps as a factor moves. Sums over many requests do not. Residuals are therefore projected on
features that are known from the served run alone: lengths, how many requests were decoding or waiting, how much was
cached and how much prompt was computed meanwhile, and the time of day of the run.
"""

from __future__ import annotations

import numpy as np

from planner.external.served_run import ServedRun


def ttft_features(run: ServedRun) -> np.ndarray:
    """float64 [n, features] of what decides a request's time to first token."""
    arrival = run.arrival_s
    decoding = _count(run.first_token_s, arrival) - _count(run.last_token_s, arrival)
    waiting = np.arange(len(run)) - _count(run.first_token_s, arrival)
    tokens = run.input_tokens.astype(np.float64)
    return np.stack(
        [
            np.ones(len(run)),
            np.log(tokens),
            tokens / tokens.mean(),
            np.log1p(np.maximum(decoding, 0)),
            np.log1p(np.maximum(waiting, 0)),
            _centred_time(run),
        ],
        axis=1,
    )


def tpot_features(run: ServedRun) -> np.ndarray:
    """float64 [n, features] of what decides a request's pace: averages over the time in which it decoded."""
    first, last = run.first_token_s, run.last_token_s
    spans = np.maximum(last - first, 1e-9)
    ones = np.ones(len(run))
    batch = _overlap(first, last, ones) / spans
    cached = _overlap(first, last, run.input_tokens + 0.5 * run.output_tokens) / spans
    order = np.argsort(first, kind="stable")
    prompts = np.concatenate([[0.0], np.cumsum(run.input_tokens[order])])
    times = first[order]
    prefilled = prompts[np.searchsorted(times, last)] - prompts[np.searchsorted(times, first, side="right")]
    rate = np.maximum(prefilled, 0.0) / spans
    return np.stack(
        [
            ones,
            np.log(np.maximum(batch, 1.0)),
            cached / max(cached.mean(), 1e-9),
            rate / max(rate.mean(), 1e-9),
            np.log(run.output_tokens),
            _centred_time(run),
        ],
        axis=1,
    )


def orthonormal(features: np.ndarray) -> np.ndarray:
    """float64 [n, rank]: an orthonormal basis of the features' columns, those that say nothing new left out."""
    scale = np.maximum(np.abs(features).max(axis=0), 1e-12)
    left, values, _ = np.linalg.svd(features / scale, full_matrices=False)
    return left[:, values > 1e-3 * values[0]]


def _centred_time(run: ServedRun) -> np.ndarray:
    arrival = run.arrival_s
    return (arrival - arrival.mean()) / max(float(np.ptp(arrival)), 1e-9)


def _count(instants: np.ndarray, at: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.sort(instants), at, side="right")


def _overlap(start: np.ndarray, end: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """float64 [n]: for each span, the integral over it of the summed weights of the spans that cover an instant."""
    times = np.concatenate([start, end])
    changes = np.concatenate([weight, -weight])
    order = np.argsort(times, kind="stable")
    times, level = times[order], np.cumsum(changes[order])
    integral = np.concatenate([[0.0], np.cumsum(level[:-1] * np.diff(times))])
    return np.interp(end, times, integral) - np.interp(start, times, integral)
