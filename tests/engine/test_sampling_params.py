"""Sampling values in and out of range."""

import math
import pickle

import numpy as np
import pytest

from engine.errors import UserError
from engine.sampling_params import SamplingParams


def test_defaults_are_vllms():
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.max_tokens) == (1.0, 1.0, 0, 0.0, 16)
    assert (params.seed, params.stop_token_ids, params.ignore_eos) == (None, (), False)
    assert (params.n, params.min_tokens, params.stop, params.include_stop_str_in_output) == (1, 0, (), False)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (params.logprobs, params.logit_bias) == (None, None)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0},
        {"temperature": 100.0, "top_p": 1e-9, "min_p": 1},
        {"top_k": -1},
        {"top_k": 2**31 - 1},
        {"max_tokens": None, "seed": 0},
        {"max_tokens": 1, "seed": 2**63 - 1},
        {"stop_token_ids": [0, 2**31 - 1]},
        {"temperature": np.float32(0.5), "max_tokens": np.int64(3)},
        {"n": 128, "presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 1e-3},
        {"min_tokens": 16, "logprobs": 20},
        {"min_tokens": 10**6, "max_tokens": None, "logprobs": 0},
        {"stop": ["a", "\n\n"], "include_stop_str_in_output": True},
        {"logit_bias": {0: -100, 2**31 - 1: 100.0}},
        {"logit_bias": {}},
    ],
)
def test_values_in_range(values):
    params = SamplingParams(**values)
    for name, value in values.items():
        got = getattr(params, name)
        assert got == (tuple(value) if isinstance(value, list) else value)
        assert got is None or type(got) in (int, float, tuple, bool, dict)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("temperature", -0.1, "at least 0"),
        ("temperature", math.nan, "at least 0"),
        ("temperature", math.inf, "at least 0"),
        ("temperature", "1", "a number"),
        ("temperature", None, "a number"),
        ("temperature", True, "a number"),
        ("top_p", 0, "above 0"),
        ("top_p", 1.01, "at most 1"),
        ("top_p", math.nan, "at most 1"),
        ("min_p", -1e-9, "from 0 to 1"),
        ("min_p", 1.5, "from 0 to 1"),
        ("top_k", -2, "at least -1"),
        ("top_k", 1.0, "whole number"),
        ("top_k", 2**31, "whole number"),
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", 1.5, "whole number"),
        ("max_tokens", True, "whole number"),
        ("seed", -1, "at least 0"),
        ("seed", 2**63, "at most 9223372036854775807"),
        ("stop_token_ids", 7, "a list"),
        ("stop_token_ids", "7", "a list"),
        ("stop_token_ids", [-1], "from 0"),
        ("stop_token_ids", [1.5], "whole number"),
        ("stop_token_ids", [None], "whole number"),
        ("temperature", 10**400, "a number"),
        ("temperature", b"1", "a number"),
        ("temperature", [1.0], "a number, at least 0"),
        ("ignore_eos", "no", "True or False"),
        ("detokenize", 1, "True or False"),
        ("stop_token_ids", [True], "whole number"),
        ("n", 0, "at least 1"),
        ("n", 129, "at most 128"),
        ("presence_penalty", 2.1, "from -2 to 2"),
        ("frequency_penalty", -2.1, "from -2 to 2"),
        ("frequency_penalty", math.nan, "from -2 to 2"),
        ("repetition_penalty", 0, "above 0"),
        ("repetition_penalty", math.inf, "above 0"),
        ("min_tokens", -1, "at least 0"),
        ("min_tokens", 17, "at most max_tokens, 16"),
        ("stop", 5, "a string"),
        ("stop", b"x", "a string"),
        ("stop", ["a", 5], "a string"),
        ("stop", "", "at least one character"),
        ("stop", ["a", ""], "at least one character"),
        ("include_stop_str_in_output", 1, "True or False"),
        ("logprobs", -1, "at least 0"),
        ("logprobs", 21, "at most 20"),
        ("logprobs", True, "whole number"),
        ("logit_bias", [1], "token ids and numbers"),
        ("logit_bias", {"1": 1}, "whole numbers"),
        ("logit_bias", {-1: 1}, "from 0"),
        ("logit_bias", {5: 100.5}, "of token 5 is 100.5; it must be from -100 to 100"),
        ("logit_bias", {5: None}, "a number"),
    ],
)
def test_values_out_of_range(name, value, wanted):
    with pytest.raises(UserError) as caught:
        SamplingParams(**{name: value})
    assert name in str(caught.value)
    assert wanted in str(caught.value)


@pytest.mark.parametrize(
    ("values", "greedy", "filters"),
    [
        ({}, False, False),
        ({"temperature": 0}, True, False),
        ({"top_k": -1}, False, False),
        ({"top_k": 5}, False, True),
        ({"top_p": 0.9}, False, True),
        ({"min_p": 0.1}, False, True),
    ],
)
def test_kinds(values, greedy, filters):
    params = SamplingParams(**values)
    assert (params.is_greedy, params.has_filters) == (greedy, filters)


@pytest.mark.parametrize(
    ("values", "needs_logits"),
    [
        ({"temperature": 0, "seed": 1, "stop": "x", "n": 3, "stop_token_ids": [5]}, False),
        ({"top_k": 5}, True),
        ({"presence_penalty": -0.5}, True),
        ({"frequency_penalty": 0.5}, True),
        ({"repetition_penalty": 0.9}, True),
        ({"logprobs": 0}, True),
        ({"logit_bias": {1: 1}}, True),
        ({"logit_bias": {}}, False),
        ({"min_tokens": 1}, True),
        ({"min_tokens": 1, "ignore_eos": True}, False),  # nothing could end it
        ({"min_tokens": 1, "ignore_eos": True, "stop_token_ids": [5]}, True),
    ],
)
def test_what_a_graph_cannot_draw(values, needs_logits):
    assert SamplingParams(**values).needs_logits is needs_logits


def test_none_is_no_stop_as_in_vllm():
    params = SamplingParams(stop=None, stop_token_ids=None)
    assert (params.stop, params.stop_token_ids) == ((), ())


def test_one_stop_string_may_stand_alone():
    assert SamplingParams(stop="abc").stop == ("abc",)
    with pytest.raises(UserError, match="detokenize must be True"):
        SamplingParams(stop="abc", detokenize=False)


def test_continuations_have_seeds_of_their_own():
    params = SamplingParams(n=3, seed=2**63 - 2, temperature=0.5, logit_bias={3: 1})
    each = [params.continuation(i) for i in range(3)]
    assert [one.seed for one in each] == [2**63 - 2, 2**63 - 1, 0]
    assert {(one.n, one.temperature, one.logit_bias[3]) for one in each} == {(1, 0.5, 1.0)}
    assert SamplingParams(n=2).continuation(1).seed is None
    assert SamplingParams(seed=5).continuation(0).seed == 5


def test_they_travel_between_processes():
    params = SamplingParams(logit_bias={3: 1}, stop="x", logprobs=2)
    assert params.needs_logits
    assert pickle.loads(pickle.dumps(params)) == params
    assert {params: 1}[SamplingParams(logit_bias={3: 1}, stop="x", logprobs=2)] == 1
