"""What no number of replicas can improve, and about how many the load needs: found without simulating.

A request that meets nobody else still has to be computed. Its time to first token is at least that of its own prefill
steps, and its time per token at least that of a batch of one. If the SLO's percentile of these floors already exceeds
a limit, queueing cannot help.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from engine.scheduling import StepShape
from planner.deployment import Deployment
from planner.memory import MemoryReport
from planner.serving import arrival_seconds
from planner.simulation import SLO
from planner.step_time import TICKS_PER_SECOND, StepTime
from planner.workload import Workload

_GRID = 48
# Replicas are tried from a little under the estimate.
_DEMAND_SLACK = 0.9


@dataclass(frozen=True, slots=True)
class Floor:
    """An SLO term that an idle system already misses.

    Attributes:
        term: "ttft", "tpot" or "e2el".
        limit_ms, at_least_ms: what is asked, and what an idle replica takes at the SLO's percentile.
        why: which work takes that long.
    """

    term: str
    limit_ms: float
    at_least_ms: float
    why: str


class Floors:
    """Lower bounds on one replica's latencies for the requests of a workload."""

    def __init__(self, workload: Workload, deployment: Deployment, step_time: StepTime, warmup_s: float) -> None:
        length = deployment.max_model_len or deployment.model.max_position_embeddings
        measured = (workload.arrival_s >= warmup_s) & (workload.input_tokens < length)  # longer prompts are rejected
        self.input_tokens = workload.input_tokens[measured]
        self.output_tokens = np.minimum(workload.output_tokens[measured], length - self.input_tokens)
        self._step_time = step_time
        self._arrival_s = arrival_seconds(step_time)
        self._budget = deployment.max_num_batched_tokens
        self._max_num_seqs = deployment.max_num_seqs
        self._tokens_per_step = deployment.num_speculative_tokens + 1
        # With prefix caching all but the last token of a prompt may be found.
        self._prompts_may_be_cached = deployment.enable_prefix_caching and workload.prefix_block_hashes is not None

    def prefill_s(self, num_tokens: int) -> float:
        """Seconds to compute a prompt alone, in chunks of the token budget."""
        if self._prompts_may_be_cached:
            return self._least_s(StepShape(prefills=[(1, num_tokens - 1)]))
        seconds, context = 0.0, 0
        while context < num_tokens:
            chunk = min(self._budget, num_tokens - context)
            # Only the last chunk reaches the LM head.
            sampled = int(context + chunk == num_tokens)
            seconds += self._least_s(StepShape(prefills=[(chunk, context)], num_sampled=sampled))
            context += chunk
        return seconds

    def token_s(self, context: int) -> float:
        """Seconds per output token of a request decoding alone, if every draft were accepted."""
        return self._least_s(StepShape(decode_contexts=[context])) / self._tokens_per_step

    def _least_s(self, step: StepShape) -> float:
        """The least time of a step with this in it: on a device that is cool, where that matters, and beside whatever
        makes it faster, as a larger step may be by its padding or its kernels."""
        used = self._step_time
        steps = [step]
        if step.prefills:
            room = self._budget - sum(query for query, _ in step.prefills)
            more = [1 << i for i in range(max(room, 0).bit_length()) if 1 << i <= room]
            rows = [count for count in more if count < self._max_num_seqs]
            steps += [StepShape(step.prefills, [0] * count, num_sampled=step.num_sampled) for count in rows]
            if self._max_num_seqs > 1:
                beside = [[*step.prefills, (count, 0)] for count in more]
                steps += [StepShape(chunks, num_sampled=step.num_sampled) for chunks in beside]
        return min(used.heated_ticks(each, used.ticks(each), 0.0) for each in steps) / TICKS_PER_SECOND

    def late_s(self) -> float:
        """At most so much later than the step's end does a first token arrive, with the next step already running: the
        host may be launching that one.

        What a first token is late, the tokens after it seem to be early.
        """
        if self._step_time.pipeline_depth == 1:
            return 0.0
        beside = [0] * (self._max_num_seqs - 1)
        sizes = [1 << i for i in range(self._budget.bit_length())]
        steps = [StepShape(prefills=[(size, 0)], decode_contexts=rows) for size in sizes for rows in ([], beside)]
        used = self._step_time
        ticks = max(max(used.alone_ticks(step) - used.ticks(step), used.host_ticks(step)) for step in steps)
        return ticks / TICKS_PER_SECOND

    def _from_below(self, function, tokens: np.ndarray) -> np.ndarray:
        """A function at each of `tokens`, rounded down to a grid of their quantiles.

        It increases but for what measured times may have: a larger step that is faster, by its padding or its kernels.
        So nowhere is it taken for more than it is further on in the grid, which leaves what happens between two of its
        points.
        """
        grid = np.unique(np.quantile(tokens, np.linspace(0, 1, _GRID), method="lower").astype(np.int64))
        values = np.array([function(int(n)) for n in grid])
        values = np.minimum.accumulate(values[::-1])[::-1]
        return values[np.searchsorted(grid, tokens, side="right") - 1]

    def violated(self, slo: SLO) -> Floor | None:
        """The term that an idle system misses, the worst if several; None if all could be met."""
        if not self.input_tokens.size:
            return None
        limits = slo.limits()
        prefill = self._from_below(self.prefill_s, self.input_tokens)
        token = self._from_below(self.token_s, self.input_tokens)
        several = self.output_tokens > 1
        floors_ms = {
            "ttft": (self._arrival_s + prefill) * 1e3,
            "tpot": (token[several] - self.late_s() / (self.output_tokens[several] - 1)) * 1e3,
            "e2el": (self._arrival_s + prefill + (self.output_tokens - 1) * token) * 1e3,
        }
        why = {
            "ttft": "computing the prompt alone, without any queue",
            "tpot": "one decode step of a single request",
            "e2el": "computing a request alone, without any queue",
        }
        found = []
        for term, limit in limits.items():
            values = floors_ms[term]
            if values.size:
                at_least = float(np.percentile(values, slo.percentile, method="lower"))
                if at_least > limit:
                    found.append(Floor(term, limit, at_least, why[term]))
        return max(found, key=lambda floor: floor.at_least_ms / floor.limit_ms, default=None)


def busy_replicas(
    workload: Workload, deployment: Deployment, memory: MemoryReport, step_time: StepTime, warmup_s: float
) -> int:
    """About how many replicas the load keeps busy while it arrives, by the time of full prefill and decode steps.

    An estimate to start a search from, not a bound: a load may be served after its arrivals, and long chunks cost more
    attention than short prompts.
    """
    span_s = workload.duration_s - warmup_s
    if span_s <= 0:
        return 1
    measured = workload.arrival_s >= warmup_s
    prompt_tokens = float(workload.input_tokens[measured].sum())
    if deployment.enable_prefix_caching:
        prompt_tokens *= 1 - workload.infinite_cache_hit_rate(memory.block_size)
    budget = deployment.max_num_batched_tokens
    prefill_s = prompt_tokens * step_time.predict(StepShape(prefills=[(budget, 0)])) / budget
    # A typical running request is half-way through its output.
    context = int((workload.input_tokens[measured] + workload.output_tokens[measured] / 2).mean())
    held = max(1, memory.num_kv_blocks * memory.block_size // max(context, 1))
    batch = max(1, min(deployment.max_num_seqs, held))
    drafting = deployment.active_speculation
    accepted = drafting.simulated().acceptance.mean_accepted() if drafting else 0.0
    full_step_s = step_time.predict(StepShape(decode_contexts=[context] * batch))
    decode_s = float(workload.output_tokens[measured].sum()) / (1 + accepted) / batch * full_step_s
    return max(1, math.ceil(_DEMAND_SLACK * max(prefill_s, decode_s) / span_s))
