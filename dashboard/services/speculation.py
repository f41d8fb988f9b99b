"""What drafting gains, from step times and acceptance: closed form, every request at the same context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from dashboard.services.questions import Engine, Speculating
from engine.scheduling import StepShape
from planner.errors import UserError
from planner.external.readers import read_server_facts
from planner.model import ModelSpec
from planner.simulation import AcceptanceProcess
from planner.step_time import Evidence

#: A smaller speed-up is within the error of step times, and no reason to draft.
WORTHWHILE = 1.01
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MOST_DRAFTS = 8

#: Tokens per step for k = 1 … 8, as InferenceX measured them on coding prompts (golden_al_distribution, B300, vLLM).
MEASURED_LENGTHS = {
    "DeepSeek-V4-Pro, MTP": (1.79, 2.27, 2.49, 2.54, 2.55, 2.55, 2.54, 2.58),
    "Qwen3.5-397B, MTP": (1.93, 2.73, 3.39, 3.97, 4.41, 4.80, 5.04, 5.21),
    "MiniMax-M3, EAGLE3": (1.78, 2.38, 2.83, 3.11, 3.35, 3.45, 3.53, 3.74),
}
ASSUMED_RATES = {f"{rate:.0%} at every position (assumed)": (rate,) * MOST_DRAFTS for rate in (0.5, 0.6, 0.7, 0.8, 0.9)}


def rates_of_lengths(lengths: Sequence[float]) -> tuple[float, ...]:
    """Conditional rates from tokens per step at k = 1, 2, …: each further draft adds the share of rounds that reach it.

    Where noise makes a later position add more than the one before it, or less than nothing, it is held to that.
    """
    unconditional, before, last = [], 1.0, 1.0
    for length in lengths:
        added = min(max(0.0, length - before), last)
        unconditional.append(added)
        before, last = max(before, length), added
    return AcceptanceProcess.from_unconditional(unconditional).conditional_rates


def parse_rates(text: str, are_unconditional: bool) -> tuple[float, ...]:
    """Rates as somebody writes them: 0.8, 0.7, 0.7.

    Raises:
        UserError: no numbers from 0 to 1, or unconditional ones that increase.
    """
    try:
        rates = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"acceptance rates are {text!r}; write one per draft position, e.g. 0.8, 0.7, 0.7") from None
    if len(rates) > MOST_DRAFTS:
        raise UserError(f"there are {len(rates)} acceptance rates; this page looks at most {MOST_DRAFTS} drafts ahead")
    process = AcceptanceProcess.from_unconditional(rates) if are_unconditional else AcceptanceProcess(rates)
    return process.conditional_rates


def recorded(path: Path) -> tuple[tuple[float, ...], str]:
    """Conditional rates of the rounds that a server counted, and what they rest on.

    Raises:
        UserError: the text has no acceptance by position.
    """
    acceptance = read_server_facts(path).acceptance
    if acceptance is None or not acceptance.unconditional_rates:
        raise UserError(
            f"{path.name} has no acceptance per position: drop a log with 'SpecDecoding metrics' lines, or the text "
            f"of /metrics of a server that speculates"
        )
    rates = acceptance.conditional_rates[:MOST_DRAFTS]
    drafted = f"{acceptance.accepted:,} of {acceptance.drafted:,} drafts accepted; " if acceptance.drafted else ""
    shares = ", ".join(f"{rate:.0%}" for rate in acceptance.unconditional_rates[:MOST_DRAFTS])
    return rates, f"{path.name}: {drafted}rounds that accept each position: {shares}."


@dataclass(frozen=True)
class Gain:
    """One draft length at one batch.

    Attributes:
        speedup: tokens/s over those without drafts.
        step_s, plain_s: of a step with and without drafts; evidence: of the first.
    """

    k: int
    batch: int
    tokens_per_step: float
    step_s: float
    plain_s: float
    evidence: Evidence

    @property
    def speedup(self) -> float:
        return self.tokens_per_step * self.plain_s / self.step_s


@lru_cache(64)
def gains(engine: Engine, rates: tuple[float, ...], draft: ModelSpec | None, context: int) -> tuple[Gain, ...]:
    """Every k that there are rates for, at every batch.

    Raises:
        UserError: as `Deployment.step_time`.
    """
    plain = replace(engine, speculation=None).deployment().step_time()
    plain_s = {batch: plain.predict(StepShape(decode_contexts=[context] * batch)) for batch in BATCHES}
    found = []
    for k in range(1, len(rates) + 1):
        deployment = replace(engine, speculation=Speculating(k, rates, draft)).deployment()
        step_time = deployment.step_time()
        tokens = 1 + deployment.speculation.simulated().acceptance.mean_accepted()
        for batch in BATCHES:
            step = StepShape(verifies=[(k + 1, context)] * batch)
            seconds, evidence = step_time.predict(step), step_time.evidence_of(step)
            found.append(Gain(k, batch, tokens, seconds, plain_s[batch], evidence))
    return tuple(found)


def best_by_batch(found: Sequence[Gain]) -> dict[int, tuple[int, float]]:
    """The best k and its speed-up at each batch; 0 and 1.0 where no draft pays.

    Of several k that gain the same, but for the error of step times, the smallest.
    """
    best = {}
    for batch in sorted({gain.batch for gain in found}):
        gains = sorted((each for each in found if each.batch == batch), key=lambda each: each.k)
        most = max(each.speedup for each in gains)
        gain = next(each for each in gains if each.speedup * WORTHWHILE >= most)
        best[batch] = (gain.k, gain.speedup) if gain.speedup > WORTHWHILE else (0, 1.0)
    return best


def schedule(best: dict[int, tuple[int, float]]) -> list[list[int]]:
    """The best k by batch as vLLM's num_speculative_tokens_per_batch_size: [first batch, last batch, k]."""
    rows: list[list[int]] = []
    first = 1
    for batch, (k, _) in sorted(best.items()):
        if rows and rows[-1][2] == k:
            rows[-1][1] = batch
        else:
            rows.append([first, batch, k])
        first = batch + 1
    return rows
