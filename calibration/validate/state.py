"""Running requests and KV blocks held, by the same arithmetic on both sides.

From a step log, or the simulator's steps, they are counted step by step, each weighted by the time it had the device.
Without a log they follow from the requests' times, a request's tokens spread evenly between its first and its last.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from calibration.validate.records import EngineSettings, Lives
from engine.scheduling import StepShape


def pages(context: np.ndarray, query: np.ndarray, engine: EngineSettings) -> np.ndarray:
    """int64 [n]: blocks that requests hold in a step of `query` tokens each behind `context` ones, over all groups."""
    size = engine.block_size
    held = -(-(context + query) // size)
    total = np.zeros_like(held)
    for window in engine.windows:
        total += held if window is None else held - np.maximum(context - window + 1, 0) // size
    return total


def of_steps(shapes: Sequence[StepShape], seconds: Sequence[float], engine: EngineSettings) -> dict[str, float]:
    """Peaks, and means over the time that the device was busy.

    Args:
        seconds: on the device, of each step.
    """
    running, blocks = np.zeros(len(shapes)), np.zeros(len(shapes))
    for index, shape in enumerate(shapes):
        several = [*shape.prefills, *shape.verifies]
        context = np.array([*shape.decode_contexts, *(c for _, c in several)], np.int64)
        query = np.ones(len(context), np.int64)
        query[len(shape.decode_contexts) :] = [q for q, _ in several]
        running[index] = len(context)
        blocks[index] = pages(context, query, engine).sum()
    return _summary(running, blocks, np.asarray(seconds, float), engine)


def of_lives(lives: Lives, engine: EngineSettings) -> dict[str, float]:
    """The same from a request's times alone, at 2,000 instants of the run."""
    starts = lives.arrival_s if lives.scheduled_s is None else lives.scheduled_s
    instants = np.linspace(0.0, float(lives.last_token_s.max()), 2001)[:-1, None]
    is_running = (starts <= instants) & (instants < lives.last_token_s)
    lasting = np.maximum(lives.last_token_s - lives.first_token_s, 1e-9)
    progress = np.clip((instants - lives.first_token_s) / lasting, 0.0, 1.0)
    context = lives.input_tokens + np.floor(progress * (lives.output_tokens - 1)).astype(np.int64)
    held = pages(context, np.zeros_like(context), engine) * is_running
    return _summary(is_running.sum(1), held.sum(1), np.ones(len(instants)), engine)


def _summary(running: np.ndarray, blocks: np.ndarray, weights: np.ndarray, engine: EngineSettings) -> dict[str, float]:
    total = float(weights.sum()) or 1.0
    share = blocks / engine.num_kv_blocks
    return {
        "running_peak": float(running.max(initial=0)),
        "running_mean": float((running * weights).sum() / total),
        "kv_usage_peak": float(share.max(initial=0)),
        "kv_usage_mean": float((share * weights).sum() / total),
    }
