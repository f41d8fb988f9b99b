"""The acceptance process against closed forms and against sampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import UserError
from planner.simulation import AcceptanceProcess
from planner.simulation.acceptance import AcceptanceSampler

RATES = (0.85, 0.7, 0.6, 0.4)
# A sample mean lies further than this many standard errors from the truth once in 15,800 times.
Z = 4.0


def sampled(process: AcceptanceProcess, requests: int, rounds: int, seed: int = 0) -> np.ndarray:
    """Accepted drafts, int [requests, rounds]."""
    sampler = AcceptanceSampler(process, requests, np.random.SeedSequence(seed))
    return np.array([sampler.rounds(index, rounds) for index in range(requests)])


# ---- rates ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=8))
def test_unconditional_rates_and_back(rates):
    process = AcceptanceProcess(tuple(rates))
    assert process.unconditional_rates == pytest.approx([math.prod(rates[: i + 1]) for i in range(len(rates))])
    again = AcceptanceProcess.from_unconditional(process.unconditional_rates)
    assert again.conditional_rates == pytest.approx(rates)


def test_from_unconditional_by_hand():
    process = AcceptanceProcess.from_unconditional([0.8, 0.4, 0.1, 0.0, 0.0], concentration=3.0)
    assert process.conditional_rates == pytest.approx((0.8, 0.5, 0.25, 0.0, 0.0))
    assert process.concentration == 3.0
    # Accepted drafts are counted one position at a time: 0.8 + 0.4 + 0.1.
    assert AcceptanceProcess(process.conditional_rates).mean_accepted() == pytest.approx(1.3)


def test_limited():
    process = AcceptanceProcess(RATES, 5.0)
    assert process.limited(2) == AcceptanceProcess(RATES[:2], 5.0)
    assert process.limited(4) == process
    with pytest.raises(UserError, match="num_speculative_tokens 5 needs as many acceptance rates, but only 4"):
        process.limited(5)


@pytest.mark.parametrize(
    ("rates", "concentration", "message"),
    [
        ((), math.inf, "at least one"),
        ((0.5, 1.01), math.inf, "1.01 at position 1"),
        ((-0.1,), math.inf, "position 0"),
        ((math.nan,), math.inf, "position 0"),
        ((0.5,), 0.0, "concentration"),
        ((0.5,), math.nan, "concentration"),
    ],
)
def test_impossible_processes(rates, concentration, message):
    with pytest.raises(UserError, match=message):
        AcceptanceProcess(rates, concentration)


def test_unconditional_rates_cannot_increase():
    with pytest.raises(UserError, match=r"0\.6 at position 1 must be between 0 and the rate before it, 0\.5"):
        AcceptanceProcess.from_unconditional([0.5, 0.6])


# ---- means ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5, 8])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_mean_accepted_of_equal_rates(k, rate):
    """Leviathan et al. 2023, equation 1, counts one more: the token that every round samples itself."""
    assert 1 + AcceptanceProcess((rate,) * k).mean_accepted() == pytest.approx((1 - rate ** (k + 1)) / (1 - rate))


def test_mean_accepted_of_certain_rates():
    assert AcceptanceProcess((1.0, 1.0, 1.0), 2.0).mean_accepted() == 3
    assert AcceptanceProcess((0.0, 1.0, 1.0), 2.0).mean_accepted() == 0


def test_mean_accepted_where_the_quantile_has_a_closed_form():
    """Rate 1/2 and concentration 2 make each position's rate u itself: E[u + u^2 + u^3] = 1/2 + 1/3 + 1/4."""
    process = AcceptanceProcess((0.5, 0.5, 0.5), 2.0)
    assert process.request_rates(np.array([0.1, 0.7])) == pytest.approx(np.array([[0.1] * 3, [0.7] * 3]))
    assert process.mean_accepted() == pytest.approx(1 / 2 + 1 / 3 + 1 / 4, rel=1e-6)


@pytest.mark.parametrize("concentration", [0.3, 2.0, 10.0, math.inf])
def test_mean_accepted_against_sampling(concentration):
    process = AcceptanceProcess(RATES, concentration)
    means = sampled(process, requests=6000, rounds=20).mean(axis=1)
    standard_error = means.std(ddof=1) / math.sqrt(len(means))
    assert means.mean() == pytest.approx(process.mean_accepted(), abs=Z * standard_error)


def test_variation_between_requests_helps_long_drafts():
    """E[p^2] > E[p]^2: at the same mean rates, requests that differ accept more at the second position."""
    equal, varied = AcceptanceProcess((0.6, 0.6)), AcceptanceProcess((0.6, 0.6), 2.0)
    assert equal.mean_accepted() == pytest.approx(0.6 + 0.36)
    # E[p^2] = mean^2 + mean (1 - mean) / (c + 1)
    assert varied.mean_accepted() == pytest.approx(0.6 + 0.36 + 0.24 / 3, rel=1e-4)


# ---- the sampler ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rates", [RATES, (0.5,), (1.0, 0.3, 1.0), (0.0, 0.9)])
def test_conditional_rates_of_rounds(rates):
    process = AcceptanceProcess.from_unconditional(np.cumprod(rates).tolist())
    accepted = sampled(process, requests=10, rounds=10_000).ravel()
    for position, rate in enumerate(rates):
        reached = accepted >= position
        if not reached.any():
            assert rates[position - 1] == 0
            break
        standard_error = math.sqrt(rate * (1 - rate) / reached.sum())
        assert (accepted > position)[reached].mean() == pytest.approx(rate, abs=Z * standard_error)


def test_rounds_are_independent():
    """Of one request: the correlation of a round with the next is 0 within its standard error."""
    accepted = sampled(AcceptanceProcess(RATES), requests=1, rounds=50_000)[0]
    assert np.corrcoef(accepted[:-1], accepted[1:])[0, 1] == pytest.approx(0, abs=Z / math.sqrt(50_000))


@pytest.mark.parametrize("concentration", [0.5, 4.0, 40.0])
def test_requests_vary_as_beta(concentration):
    """Rates of requests at any position have the given mean and variance mean (1 - mean) / (c + 1)."""
    process = AcceptanceProcess(RATES, concentration)
    rates = process.request_rates((np.arange(20_000) + 0.5) / 20_000)
    means = np.array(RATES)
    assert rates.mean(axis=0) == pytest.approx(means, abs=1e-3)
    assert rates.var(axis=0) == pytest.approx(means * (1 - means) / (concentration + 1), rel=0.01)
    # A request that is easy at one position is easy at all.
    assert (np.diff(rates, axis=0) >= 0).all()


def test_request_means_vary_in_rounds():
    """Over rounds, each request's share at position 0 scatters by Beta plus binomial: the beta-binomial variance."""
    rate, concentration, rounds, requests = 0.7, 4.0, 50, 4000
    shares = sampled(AcceptanceProcess((rate,), concentration), requests, rounds).mean(axis=1)
    between = rate * (1 - rate) / (concentration + 1)
    within = (rate * (1 - rate) - between) / rounds
    assert shares.mean() == pytest.approx(rate, abs=Z * math.sqrt((between + within) / requests))
    # The standard error of a variance is its value times sqrt((kurtosis - 1) / n); Beta(2.8, 1.2) has kurtosis < 3.
    assert shares.var(ddof=1) == pytest.approx(between + within, rel=Z * math.sqrt(2 / requests))


def test_seeds():
    process = AcceptanceProcess(RATES, 3.0)
    assert (sampled(process, 20, 50, seed=1) == sampled(process, 20, 50, seed=1)).all()
    assert (sampled(process, 20, 50, seed=1) != sampled(process, 20, 50, seed=2)).any()
