"""The result of a simulation: the metrics as `vllm bench serve` defines them, and a verdict on saturation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from pydantic import Field

from planner.schema import Record
from planner.simulation.gaps import gap_statistics
from planner.simulation.log import ReplicaLog, RequestLog
from planner.simulation.slo import SLO
from planner.step_time import TICKS_PER_SECOND, WEAKEST_FIRST, Evidence
from planner.workload import Workload

PERCENTILES = (50.0, 90.0, 95.0, 99.0)
TIMELINE_POINTS = 120

# A queue that is still this share of all arrivals when they end, and has grown, was not being served.
_BACKLOG_SHARE = 0.02
_MIN_BACKLOG = 8

# A latency for requests that never got there; finite, so that percentiles next to it are too.
_NEVER_MS = 1e15


class Distribution(Record):
    """A metric over requests (or, for ITL, over gaps between tokens), in milliseconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float
    at_slo_percentile: float = Field(description="at the percentile that the SLO names")


class Verdict(StrEnum):
    """Whether the system kept up with its load."""

    STABLE = "stable"
    SATURATED = "saturated"


class TimelinePoint(Record):
    """The state of all replicas together at one instant."""

    time_s: float
    running: int
    waiting: int
    kv_usage: float = Field(description="share of all replicas' KV blocks that are held, 0 to 1")
    preemptions: int = Field(description="so far")


class SimulationResult(Record):
    """What one simulation found. Times are of requests that arrived after the warm-up and finished."""

    workload: str
    seed: int
    replicas: int
    evidence: Evidence = Field(description="what the step times rest on: of all steps the weakest")
    evidence_shares: dict[Evidence, float] = Field(
        default={}, description="share of the steps' time by what it rests on"
    )
    step_time: str = Field(description="where the step times come from")
    num_requests: int
    num_finished: int
    num_aborted: int
    num_rejected: int
    num_measured: int = Field(description="finished requests that arrived after the warm-up")
    warmup_s: float
    duration_s: float = Field(description="start of the workload to the last token")
    ttft_ms: Distribution | None = Field(description="arrival to first token: queue and prefill")
    queue_ms: Distribution | None = Field(description="arrival to first being scheduled")
    prefill_ms: Distribution | None = Field(description="first scheduled to first token")
    tpot_ms: Distribution | None = Field(description="(E2EL - TTFT) / (output tokens - 1), requests of 2 or more")
    itl_ms: Distribution | None = Field(description="gaps between output events, warm-up included, nearest rank")
    e2el_ms: Distribution | None = Field(description="arrival to last token")
    request_throughput_per_s: float = Field(description="measured requests, from the warm-up to their last token")
    output_throughput_tokens_per_s: float
    total_throughput_tokens_per_s: float
    goodput_per_s: float | None = Field(description="finished requests per second that meet every SLO limit")
    slo_attainment: float | None = Field(description="share of requests within every SLO limit; those given up are not")
    slo_met: bool | None = Field(description="each limit holds at the SLO's percentile and the system kept up")
    verdict: Verdict
    num_kv_blocks: int = Field(description="of one replica")
    kv_usage_peak: float = Field(description="of the fullest replica, 0 to 1")
    kv_usage_mean: float
    max_running: int = Field(description="most running requests of one replica")
    mean_running: float = Field(description="time-average over all replicas together")
    mean_waiting: float
    num_preemptions: int
    preempted_share: float = Field(description="share of requests preempted at least once")
    prefix_cache_hit_rate: float = Field(description="share of prompt tokens found in the cache")
    num_steps: int
    mean_acceptance_length: float | None = Field(description="tokens per verification round, the bonus token included")
    draft_acceptance_rate: float | None = Field(description="accepted drafts over verified drafts")
    warnings: tuple[str, ...]
    timeline: tuple[TimelinePoint, ...]

    def metric_ms(self, name: str) -> Distribution | None:
        """The distribution behind an SLO limit: "ttft", "tpot" or "e2el"."""
        return {"ttft": self.ttft_ms, "tpot": self.tpot_ms, "e2el": self.e2el_ms}[name]


@dataclass(frozen=True)
class Outcome:
    """Everything the simulator hands over for evaluation."""

    workload: Workload
    requests: RequestLog
    replicas: list[ReplicaLog]
    num_kv_blocks: int
    peak_used_blocks: list[int]
    num_steps: int
    evidence: Evidence
    step_time: str


def evaluate(outcome: Outcome, slo: SLO, warmup_s: float, seed: int) -> SimulationResult:
    """Compute every metric of a finished simulation."""
    workload, log = outcome.workload, outcome.requests
    measured = _Measured(outcome, warmup_s)
    return SimulationResult(
        workload=workload.name,
        seed=seed,
        replicas=len(outcome.replicas),
        evidence=_weakest(outcome),
        evidence_shares=_evidence_shares(outcome),
        step_time=outcome.step_time,
        num_requests=len(workload),
        num_finished=log.num_finished,
        num_aborted=log.num_aborted,
        num_rejected=log.num_rejected,
        num_measured=len(measured.ttft_s),
        warmup_s=warmup_s,
        num_steps=outcome.num_steps,
        warnings=(),
        **_latencies(measured, outcome.replicas, slo.percentile),
        **_rates(measured, slo),
        **_judgement(measured, outcome, slo),
        **_state(outcome),
        **_speculation(outcome.replicas),
    )


def _evidence_shares(outcome: Outcome) -> dict[Evidence, float]:
    ticks = {evidence: sum(log.evidence_ticks.get(evidence, 0) for log in outcome.replicas) for evidence in Evidence}
    total = sum(ticks.values())
    if not total:
        return {outcome.evidence: 1.0}
    return {evidence: count / total for evidence, count in ticks.items() if count}


def _weakest(outcome: Outcome) -> Evidence:
    found = _evidence_shares(outcome)
    return next(evidence for evidence in WEAKEST_FIRST if evidence in found)


class _Measured:
    """The requests that arrived after the warm-up and finished, as arrays of one row each.

    Attributes:
        queue_s, ttft_s, e2el_s, input_tokens, output_tokens: of these requests.
        tpot_s: of those with two output tokens or more.
        num_gave_up: requests after the warm-up whose clients gave up, and those of them with a TPOT to miss.
        span_s: from the end of the warm-up to the last of their tokens.
    """

    def __init__(self, outcome: Outcome, warmup_s: float) -> None:
        workload, log = outcome.workload, outcome.requests
        counted = (workload.arrival_s >= warmup_s) & np.isfinite(log.end_s)
        chosen = counted & np.isfinite(log.e2el_s)
        gave_up = counted & ~chosen
        self.warmup_s = warmup_s
        self.queue_s, self.ttft_s, self.e2el_s = log.queue_s[chosen], log.ttft_s[chosen], log.e2el_s[chosen]
        self.input_tokens, self.output_tokens = workload.input_tokens[chosen], log.output_tokens[chosen]
        several = self.output_tokens > 1
        self.tpot_s = (self.e2el_s[several] - self.ttft_s[several]) / (self.output_tokens[several] - 1)
        self.num_gave_up = int(gave_up.sum())
        self.num_gave_up_with_tpot = int((gave_up & (workload.output_tokens > 1)).sum())
        self.span_s = max(float(log.end_s[chosen].max()) - warmup_s, 1e-9) if chosen.any() else math.inf


def _latencies(measured: _Measured, replicas: list[ReplicaLog], slo_percentile: float) -> dict[str, Any]:
    seconds = {
        "ttft_ms": measured.ttft_s,
        "queue_ms": measured.queue_s,
        "prefill_ms": measured.ttft_s - measured.queue_s,
        "tpot_ms": measured.tpot_s,
        "e2el_ms": measured.e2el_s,
    }
    distributions = {name: _distribution(values * 1e3, slo_percentile) for name, values in seconds.items()}
    return {**distributions, "itl_ms": _gap_distribution(replicas, slo_percentile)}


def _rates(measured: _Measured, slo: SLO) -> dict[str, Any]:
    count, span_s = len(measured.ttft_s), measured.span_s
    output, total = measured.output_tokens.sum(), measured.output_tokens.sum() + measured.input_tokens.sum()
    good = int(_meets(slo, measured.ttft_s, measured.e2el_s, measured.output_tokens).sum())
    judged = count + measured.num_gave_up
    asked = bool(slo.limits())
    return {
        "request_throughput_per_s": count / span_s,
        "output_throughput_tokens_per_s": float(output / span_s),
        "total_throughput_tokens_per_s": float(total / span_s),
        "goodput_per_s": good / span_s if asked else None,
        "slo_attainment": good / judged if asked and judged else None,
    }


def _judgement(measured: _Measured, outcome: Outcome, slo: SLO) -> dict[str, Any]:
    arrival_s, end_s = outcome.workload.arrival_s, outcome.requests.end_s
    taken = np.isfinite(end_s)  # rejected requests never were in the system
    verdict = _verdict(arrival_s[taken], end_s[taken], float(arrival_s[-1]), measured.warmup_s)
    met = None
    if slo.limits():
        met = (
            verdict is Verdict.STABLE
            and len(measured.ttft_s) > 0
            and _within(slo, "ttft", measured.ttft_s, measured.num_gave_up)
            and _within(slo, "e2el", measured.e2el_s, measured.num_gave_up)
            and _within(slo, "tpot", measured.tpot_s, measured.num_gave_up_with_tpot)
        )
    return {"verdict": verdict, "slo_met": met}


def _state(outcome: Outcome) -> dict[str, Any]:
    log, workload = outcome.requests, outcome.workload
    ended = np.isfinite(log.end_s)
    end_s = float(log.end_s[ended].max()) if ended.any() else 0.0
    timeline, mean_running, mean_waiting, mean_used = _timeline(outcome, end_s)
    blocks = outcome.num_kv_blocks
    return {
        "duration_s": end_s,
        "num_kv_blocks": blocks,
        "kv_usage_peak": max(outcome.peak_used_blocks) / blocks,
        "kv_usage_mean": mean_used / (blocks * len(outcome.replicas)),
        "max_running": int(max(max(replica.changes[1::6], default=0) for replica in outcome.replicas)),
        "mean_running": mean_running,
        "mean_waiting": mean_waiting,
        "num_preemptions": int(log.preemptions.sum()),
        "preempted_share": float((log.preemptions > 0).mean()),
        "prefix_cache_hit_rate": float(log.cached_tokens.sum() / max(1, workload.input_tokens[ended].sum())),
        "timeline": timeline,
    }


def _speculation(replicas: list[ReplicaLog]) -> dict[str, Any]:
    rounds = sum(replica.num_rounds for replica in replicas)
    drafted = sum(replica.num_drafted for replica in replicas)
    accepted = sum(replica.num_accepted for replica in replicas)
    return {
        "mean_acceptance_length": 1 + accepted / rounds if rounds else None,
        "draft_acceptance_rate": accepted / drafted if drafted else None,
    }


def _meets(slo: SLO, ttft_s: np.ndarray, e2el_s: np.ndarray, output_tokens: np.ndarray) -> np.ndarray:
    """Which requests are within every limit. A request of one token has no TPOT; it counts as 0, as in vLLM."""
    good = np.ones(len(ttft_s), bool)
    limits = slo.limits()
    if "ttft" in limits:
        good &= ttft_s * 1e3 <= limits["ttft"]
    if "tpot" in limits:
        good &= (e2el_s - ttft_s) / np.maximum(output_tokens - 1, 1) * 1e3 <= limits["tpot"]
    if "e2el" in limits:
        good &= e2el_s * 1e3 <= limits["e2el"]
    return good


def _within(slo: SLO, term: str, seconds: np.ndarray, num_gave_up: int) -> bool:
    """Whether a limit holds at the SLO's percentile, requests that clients gave up counting as beyond any limit."""
    limit_ms = slo.limits().get(term)
    if limit_ms is None:
        return True
    values = np.append(seconds * 1e3, np.full(num_gave_up, _NEVER_MS))
    return values.size == 0 or float(np.percentile(values, slo.percentile)) <= limit_ms


def _distribution(values: np.ndarray, slo_percentile: float) -> Distribution | None:
    if values.size == 0:
        return None
    p50, p90, p95, p99, at_slo = np.percentile(values, [*PERCENTILES, slo_percentile]).tolist()
    return Distribution(
        mean=float(values.mean()), p50=p50, p90=p90, p95=p95, p99=p99, max=float(values.max()), at_slo_percentile=at_slo
    )


def _gap_distribution(replicas: list[ReplicaLog], slo_percentile: float) -> Distribution | None:
    """Percentiles of all gaps between tokens, each step's gap weighted by the requests that saw it."""
    runs = np.concatenate([np.asarray(replica.runs, dtype=np.int64) for replica in replicas]).reshape(-1, 4)
    if not runs.size:
        return None
    mean, ticks = gap_statistics(runs, [*PERCENTILES, 100.0, slo_percentile])
    p50, p90, p95, p99, largest, at_slo = (tick / TICKS_PER_SECOND * 1e3 for tick in ticks)
    return Distribution(
        mean=mean / TICKS_PER_SECOND * 1e3, p50=p50, p90=p90, p95=p95, p99=p99, max=largest, at_slo_percentile=at_slo
    )


def _verdict(arrival_s: np.ndarray, end_s: np.ndarray, last: float, warmup_s: float) -> Verdict:
    """Saturated if requests piled up: more in the system when arrivals end than half-way, and by a lot.

    A system that keeps up holds a number of requests that fluctuates about a mean, however long the load lasts; one
    that does not holds a share of everything that ever arrived.
    """
    ends = np.sort(end_s)

    def in_system(instant: float) -> int:
        return int(np.searchsorted(arrival_s, instant, side="right") - np.searchsorted(ends, instant, side="right"))

    # Averages over stretches, so that one burst at the very end does not decide.
    early = np.mean([in_system(warmup_s + (last - warmup_s) * share) for share in np.linspace(0.30, 0.50, 21)])
    late = np.mean([in_system(warmup_s + (last - warmup_s) * share) for share in np.linspace(0.80, 1.00, 21)])
    arrived = len(arrival_s) - int(np.searchsorted(arrival_s, warmup_s))
    # Between the middles of the two stretches half of the load arrived.
    grown = late - early
    if grown > max(_MIN_BACKLOG, _BACKLOG_SHARE * arrived / 2, 0.5 * early):
        return Verdict.SATURATED
    return Verdict.STABLE


def _timeline(outcome: Outcome, end_s: float) -> tuple[tuple[TimelinePoint, ...], float, float, float]:
    """The state over time on a regular grid, and time-averages of running, waiting and used blocks."""
    grid = np.linspace(0.0, end_s, TIMELINE_POINTS)
    at_grid = np.zeros((4, TIMELINE_POINTS))
    means = np.zeros(3)
    for replica in outcome.replicas:
        if not replica.changes:
            continue
        changes = np.asarray(replica.changes).reshape(-1, 6).T
        times, counts, before, after = changes[0], changes[1:4], changes[4], changes[5]
        place = np.searchsorted(times, grid, side="right") - 1
        at_grid[:3] += np.where(place >= 0, counts[:, np.maximum(place, 0)], 0.0)
        lasting = np.diff(np.append(times, max(end_s, times[-1])))
        means[:2] += (counts[:2] * lasting).sum(axis=1)
        known = np.isfinite(after)
        if known.any():
            times, before, after = times[known], before[known], after[known]
            # Blocks grow between two changes of the batch: the trapezoid is their mean.
            means[2] += ((after[:-1] + before[1:]) / 2 * np.diff(times)).sum()
            at_grid[3] += np.interp(grid, np.repeat(times, 2), np.stack([before, after], axis=1).ravel(), left=0.0)
    if end_s > 0:
        means /= end_s
    blocks = outcome.num_kv_blocks * len(outcome.replicas)
    points = tuple(
        TimelinePoint(
            time_s=float(t), running=int(running), waiting=int(waiting), kv_usage=used / blocks, preemptions=int(count)
        )
        for t, running, waiting, count, used in zip(grid, *at_grid.tolist(), strict=True)
    )
    return points, float(means[0]), float(means[1]), float(means[2])
