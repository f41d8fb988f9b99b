"""Speculation as a setting: what `--speculative-config` may say, and what drafting costs."""

from __future__ import annotations

import json

import pytest

from engine.scheduling import StepShape
from planner.catalog import load_gpu, load_model
from planner.deployment import Deployment
from planner.errors import UserError
from planner.simulation import AcceptanceProcess
from planner.speculation import DraftedStepTime, SpeculationConfig, parse_speculation
from planner.step_time import TICKS_PER_SECOND, Evidence, StepTime

RATES = AcceptanceProcess((0.8, 0.7))
DRAFT = load_model("llama-3.2-1b")

BAD = [
    # No object.
    ("", "not JSON"),
    ("{", "not JSON"),
    ("[]", "JSON object"),
    ("4", "JSON object"),
    ("null", "JSON object"),
    ("[" * 100_000, "JSON"),
    # Keys.
    ("{}", "lacks num_speculative_tokens"),
    ('{"num_speculative_token": 2}', "did you mean 'num_speculative_tokens'?"),
    # Numbers of tokens.
    ('{"num_speculative_tokens": -1}', "num_speculative_tokens is -1"),
    ('{"num_speculative_tokens": 33}', "num_speculative_tokens is 33"),
    ('{"num_speculative_tokens": 2.0}', "num_speculative_tokens is 2.0"),
    ('{"num_speculative_tokens": NaN}', "num_speculative_tokens is nan"),
    ('{"num_speculative_tokens": Infinity}', "num_speculative_tokens is inf"),
    ('{"num_speculative_tokens": true}', "num_speculative_tokens is True"),
    ('{"num_speculative_tokens": null}', "num_speculative_tokens is None"),
    ('{"num_speculative_tokens": "2"}', "num_speculative_tokens is '2'"),
    ('{"num_speculative_tokens": 3}', "only 2 are given"),
    ('{"num_speculative_tokens": ' + "9" * 5000 + "}", "num_speculative_tokens"),
    # Methods and drafters.
    ('{"num_speculative_tokens": 2, "method": "eagle"}', "unknown speculative method 'eagle'"),
    ('{"num_speculative_tokens": 2, "method": "ngrams"}', "did you mean 'ngram'?"),
    ('{"num_speculative_tokens": 2, "method": 5}', "method"),
    ('{"num_speculative_tokens": 2, "method": null}', "method"),
    ('{"num_speculative_tokens": 2, "method": ["ngram"]}', "method"),
    ('{"num_speculative_tokens": 2, "method": "draft_model"}', 'needs a "model"'),
    ('{"num_speculative_tokens": 2, "method": "ngram", "model": "llama-3.2-1b"}', "none with ngram"),
    ('{"num_speculative_tokens": 2, "model": "llama-3.2-1bb"}', "did you mean 'llama-3.2-1b'?"),
    ('{"num_speculative_tokens": 2, "model": 5}', "model"),
    # Rates.
    ('{"num_speculative_tokens": 1, "synthetic_acceptance_rates": []}', "at least one"),
    ('{"num_speculative_tokens": 1, "synthetic_acceptance_rates": 0.8}', "list of numbers"),
    ('{"num_speculative_tokens": 1, "synthetic_acceptance_rates": ["0.8"]}', "list of numbers"),
    ('{"num_speculative_tokens": 1, "synthetic_acceptance_rates": [NaN]}', "rate nan at position 0"),
    ('{"num_speculative_tokens": 1, "synthetic_acceptance_rates": [1.1]}', "rate 1.1 at position 0"),
    ('{"num_speculative_tokens": 1, "synthetic_acceptance_rates": [-0.1]}', "rate -0.1 at position 0"),
    ('{"num_speculative_tokens": 2, "synthetic_acceptance_rates": [0.5, 0.6]}', "rate 0.6 at position 1"),
    ('{"num_speculative_tokens": 2, "synthetic_acceptance_rates": [0.5]}', "only 1"),
]


@pytest.mark.parametrize(("text", "words"), BAD, ids=[text[:70] for text, _ in BAD])
def test_bad_configs(text, words):
    with pytest.raises(UserError) as caught:
        parse_speculation(text, RATES)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_acceptance_must_come_from_somewhere():
    with pytest.raises(UserError, match="--acceptance-rates"):
        parse_speculation('{"num_speculative_tokens": 2}', None)


def test_a_bare_number_of_tokens_is_ngram():
    config = parse_speculation('{"num_speculative_tokens": 2}', RATES)
    assert (config.method, config.num_speculative_tokens, config.draft_model) == ("ngram", 2, None)
    assert config.acceptance == RATES
    assert config.num_lookahead_tokens == 0


def test_a_model_means_a_draft_model():
    config = parse_speculation('{"num_speculative_tokens": 2, "model": "llama-3.2-1b"}', RATES)
    assert (config.method, config.draft_name) == ("draft_model", "llama-3.2-1b")
    assert config.draft_model == DRAFT
    assert config.num_lookahead_tokens == 2


def test_unconditional_rates_become_conditional():
    """vLLM's [0.8, 0.6, 0.3] are 0.8, then 0.6 of those 0.8, then 0.3 of those 0.6."""
    text = json.dumps({"num_speculative_tokens": 3, "synthetic_acceptance_rates": [0.8, 0.6, 0.3]})
    for also in (None, RATES):
        acceptance = parse_speculation(text, also).acceptance
        assert acceptance.conditional_rates == pytest.approx((0.8, 0.75, 0.5))
        assert acceptance.unconditional_rates == pytest.approx((0.8, 0.6, 0.3))


def test_another_k():
    config = parse_speculation('{"num_speculative_tokens": 2}', RATES)
    assert config.with_k(0) is None
    assert config.with_k(1).simulated().acceptance.conditional_rates == (0.8,)
    with pytest.raises(UserError, match="only 2 are given"):
        config.with_k(3)


# ---- what drafting costs -------------------------------------------------------------------------------------------


class Affine(StepTime):
    """`step` ms, and `token` ms for each query token, and 0.001 ms for each token of context."""

    evidence = Evidence.UNCALIBRATED

    def __init__(self, step: float, token: float) -> None:
        self.step, self.token = step, token
        self.description = f"{step} ms and {token} ms"

    def predict(self, step: StepShape) -> float:
        contexts = sum(step.decode_contexts) + sum(c for _, c in [*step.prefills, *step.verifies])
        return (self.step + self.token * step.num_tokens + 0.001 * contexts) / 1000


TARGET, SMALL = Affine(10, 0.1), Affine(1, 0.01)


def milliseconds(k: int, **shape) -> float:
    return DraftedStepTime(TARGET, SMALL, k).predict(StepShape(**shape)) * 1000


def test_one_draft_token_is_one_pass_of_the_draft_model():
    """10 + 0.2 + 0.102 of the target, 1 + 0.02 + 0.102 of the draft, over the same two tokens of a verification."""
    assert milliseconds(1, verifies=[(2, 102)]) == pytest.approx(10 + 0.2 + 0.102 + 1 + 0.02 + 0.102)


def test_k_draft_tokens_are_k_passes():
    """The later passes decode one token of each request, all of whose tokens so far are context."""
    first = 1 + 0.01 * 8 + 0.001 * 300
    later = 1 + 0.01 * 2 + 0.001 * (104 + 204)
    target = 10 + 0.1 * 8 + 0.001 * 300
    assert milliseconds(3, verifies=[(4, 100), (4, 200)]) == pytest.approx(target + first + 2 * later)


def test_prefills_and_decodes_are_drafted_for_too():
    first = 1 + 0.01 * 51 + 0.001 * 110
    later = 1 + 0.01 * 2 + 0.001 * (60 + 101)
    target = 10 + 0.1 * 51 + 0.001 * 110
    shape = {"prefills": [(50, 10)], "decode_contexts": [100]}
    assert milliseconds(2, **shape) == pytest.approx(target + first + later)


def test_drafting_is_whole_ticks_and_says_what_it_rests_on():
    drafted = DraftedStepTime(TARGET, SMALL, 2)
    step = StepShape(verifies=[(3, 100)])
    assert drafted.ticks(step) == round(drafted.predict(step) * TICKS_PER_SECOND)
    assert drafted.evidence is Evidence.UNCALIBRATED
    assert drafted.description.startswith(TARGET.description)


def test_a_deployment_times_its_draft_model():
    gpu, model = load_gpu("h200_sxm"), load_model("llama-3.1-8b")
    plain = Deployment(model, gpu)
    drafted = Deployment(model, gpu, speculation=SpeculationConfig("draft_model", 2, RATES, DRAFT, "draft"))
    alone = Deployment(DRAFT, gpu).step_time()
    step = StepShape(verifies=[(3, 1000)])
    first, later = alone.predict(step), alone.predict(StepShape(decode_contexts=[1003]))
    assert drafted.step_time().predict(step) == pytest.approx(plain.step_time().predict(step) + first + later)
    ngram = Deployment(model, gpu, speculation=SpeculationConfig("ngram", 2, RATES))
    assert ngram.step_time().predict(step) == plain.step_time().predict(step)


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_zero_drafts_turn_speculation_off(method):
    """As the class says: k = 0 costs and holds what no speculation does."""
    gpu, model = load_gpu("h200_sxm"), load_model("llama-3.1-8b")
    plain = Deployment(model, gpu)
    draft = DRAFT if method == "draft_model" else None
    none = Deployment(model, gpu, speculation=SpeculationConfig(method, 0, RATES, draft))
    step = StepShape(decode_contexts=[1000])
    assert none.step_time().predict(step) == plain.step_time().predict(step)
    assert none.memory() == plain.memory()
