"""Sampling values in and out of range."""

import math

import numpy as np
import pytest

from engine.errors import UserError
from engine.sampling_params import SamplingParams


def test_defaults_are_vllms():
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.max_tokens) == (1.0, 1.0, 0, 0.0, 16)
    assert (params.seed, params.stop_token_ids, params.ignore_eos) == (None, (), False)


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
    ],
)
def test_values_in_range(values):
    params = SamplingParams(**values)
    for name, value in values.items():
        got = getattr(params, name)
        assert got == (tuple(value) if isinstance(value, list) else value)
        assert got is None or type(got) in (int, float, tuple)


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
        ("stop_token_ids", None, "a list"),
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
