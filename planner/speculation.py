"""Speculative decoding as a deployment setting: which drafter, how many drafts, how often they are accepted."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from engine.scheduling import StepShape
from planner.catalog import load_model
from planner.errors import UserError, unknown_name
from planner.model import ModelSpec
from planner.simulation import AcceptanceProcess, Speculation
from planner.step_time import TICKS_PER_SECOND, DerivedStepTime, Evidence, StepTime

# vLLM's names. The others it knows need a drafter whose cost is not modelled here.
METHODS = ("ngram", "draft_model")

MAX_SPECULATIVE_TOKENS = 32


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """What `--speculative-config` says, with the acceptance that the simulation needs.

    Attributes:
        method: "ngram" (drafts cost nothing on the GPU) or "draft_model".
        num_speculative_tokens: drafts per verification round, k; 0 turns speculation off.
        acceptance: sampled process, with rates for at least k positions.
        draft_model: for "draft_model": a small model on the same ranks.
        draft_name: what the export calls the draft model.
    """

    method: str
    num_speculative_tokens: int
    acceptance: AcceptanceProcess
    draft_model: ModelSpec | None = None
    draft_name: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise unknown_name(
                "speculative method", str(self.method), METHODS, f"it must be one of {', '.join(METHODS)}"
            )
        k = self.num_speculative_tokens
        if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= MAX_SPECULATIVE_TOKENS:
            raise UserError(f"num_speculative_tokens is {k!r}; it must be an integer, 0 to {MAX_SPECULATIVE_TOKENS}")
        if (self.method == "draft_model") != (self.draft_model is not None):
            raise UserError('speculation needs a "model" with the method draft_model, and none with ngram')
        if k:
            self.acceptance.limited(k)

    def with_k(self, num_speculative_tokens: int) -> SpeculationConfig | None:
        """The same with another k; None for k = 0, which is no speculation at all."""
        if num_speculative_tokens == 0:
            return None
        return replace(self, num_speculative_tokens=num_speculative_tokens)

    @property
    def num_lookahead_tokens(self) -> int:
        """KV slots that drafting writes beyond the scheduled tokens."""
        return self.num_speculative_tokens if self.draft_model else 0

    def simulated(self) -> Speculation:
        """What the simulator needs of it."""
        return Speculation(self.num_speculative_tokens, self.acceptance.limited(self.num_speculative_tokens))


def parse_speculation(text: str, acceptance: AcceptanceProcess | None) -> SpeculationConfig:
    """Read vLLM's `--speculative-config` JSON.

    Args:
        text: e.g. '{"method": "ngram", "num_speculative_tokens": 4}'. "synthetic_acceptance_rates" in it are vLLM's
            unconditional rates per position.
        acceptance: conditional rates given apart from it, or None.

    Raises:
        UserError: if it is not such JSON, or no acceptance is given at all.
    """
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--speculative-config is not JSON ({error}); write e.g. {_EXAMPLE}") from None
    if not isinstance(config, dict):
        raise UserError(f"--speculative-config must be a JSON object, e.g. {_EXAMPLE}")
    unknown = sorted(set(config) - _KEYS)
    if unknown:
        raise unknown_name("--speculative-config key", unknown[0], _KEYS, f"it may have {', '.join(sorted(_KEYS))}")
    if "num_speculative_tokens" not in config:
        raise UserError(f"--speculative-config lacks num_speculative_tokens; write e.g. {_EXAMPLE}")
    name = config.get("model")
    rates = config.get("synthetic_acceptance_rates")
    if rates is not None:
        if not isinstance(rates, list) or not all(isinstance(rate, int | float) for rate in rates):
            raise UserError("synthetic_acceptance_rates must be a list of numbers, e.g. [0.8, 0.6, 0.4]")
        acceptance = AcceptanceProcess.from_unconditional(rates)
    if acceptance is None:
        raise UserError(
            "speculation needs acceptance rates: pass --acceptance-rates 0.8,0.7,0.7 (conditional, per position) or "
            "synthetic_acceptance_rates in --speculative-config (unconditional)"
        )
    return SpeculationConfig(
        method=config.get("method", "draft_model" if name else "ngram"),
        num_speculative_tokens=config["num_speculative_tokens"],
        acceptance=acceptance,
        draft_model=load_model(name) if name else None,
        draft_name=name,
    )


_KEYS = frozenset({"method", "model", "num_speculative_tokens", "synthetic_acceptance_rates"})
_EXAMPLE = """'{"method": "ngram", "num_speculative_tokens": 4}'"""


class DraftedStepTime(DerivedStepTime):
    """A target's step, and the k draft steps that follow it in the same engine step.

    The draft model computes what the target computed (its KV must not have holes), and then decodes k - 1 tokens more,
    one after the other, for every request that sampled.
    """

    def __init__(self, target: StepTime, draft: StepTime, num_speculative_tokens: int) -> None:
        super().__init__(target)
        self.draft = draft
        self.num_speculative_tokens = num_speculative_tokens
        self.evidence = target.evidence
        self.evidence_varies = target.evidence_varies
        self.uncertainty = target.uncertainty
        self.description = f"{target.description}; draft steps likewise"

    def predict(self, step: StepShape) -> float:
        return self.ticks(step) / TICKS_PER_SECOND

    def ticks(self, step: StepShape) -> int:
        return self.inner.ticks(step) + self._draft_ticks(step)

    def evidence_of(self, step: StepShape) -> Evidence:
        return self.inner.evidence_of(step)

    def steps_inside(self, contexts: list[int], steps: int) -> int:
        return self.inner.steps_inside(contexts, steps)

    def scaled(self, decode: float = 1.0, prefill: float = 1.0, host: float = 1.0) -> DraftedStepTime:
        drafts = self.draft.scaled(decode, prefill, host)
        return DraftedStepTime(self.inner.scaled(decode, prefill, host), drafts, self.num_speculative_tokens)

    def _draft_ticks(self, step: StepShape) -> int:
        first = self.draft.ticks(step)
        # Prompt chunks that end inside a prompt are a few tokens too many here; they draft nothing.
        contexts = [context + 1 for context in step.decode_contexts]
        contexts += [context + query for query, context in step.verifies]
        contexts += [context + query for query, context in step.prefills]
        later = self.draft.ticks(StepShape(decode_contexts=contexts)) * max(0, self.num_speculative_tokens - 1)
        return first + later
