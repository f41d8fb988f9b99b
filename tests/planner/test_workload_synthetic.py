"""Generators against closed forms. Tolerances are four standard errors of the estimate in question."""

from __future__ import annotations

import math

import numpy as np
import pytest

from planner.errors import UserError
from planner.workload import (
    MAX_TOKENS,
    Empirical,
    Fixed,
    LogNormal,
    SyntheticSpec,
    Uniform,
    default_workload,
    parse_length,
    synthesize,
)

N = 40_000


def draws(distribution, n: int = N) -> np.ndarray:
    return distribution.sample(np.random.default_rng(7), n)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_rate_and_cv_of_a_gamma(burstiness):
    workload = synthesize(SyntheticSpec(request_rate=5.0, num_requests=N, burstiness=burstiness), seed=3)
    gaps = np.diff(workload.arrival_s)
    cv = 1 / math.sqrt(burstiness)
    assert gaps.mean() == pytest.approx(0.2, rel=4 * cv / math.sqrt(N))
    # Delta method: var of the sample cv is cv² (μ4/σ⁴ − 1 + 4cv² − 4·skew·cv)/(4n), for a Gamma cv²(1/2 + cv²/2)/n.
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=4 * math.sqrt((1 + cv**2) / (2 * N)))
    assert workload.request_rate == pytest.approx(5.0, rel=4 * cv / math.sqrt(N))


def test_even_spacing_and_all_at_once():
    even = synthesize(SyntheticSpec(request_rate=4.0, num_requests=5, burstiness=math.inf))
    assert even.arrival_s.tolist() == [0.25, 0.5, 0.75, 1.0, 1.25]
    assert synthesize(SyntheticSpec(request_rate=math.inf, num_requests=3)).arrival_s.tolist() == [0, 0, 0]


def test_a_duration_is_filled_and_kept():
    """The number of Poisson arrivals in T has mean and variance rate·T."""
    workload = synthesize(SyntheticSpec(request_rate=20.0, duration_s=500.0), seed=1)
    assert len(workload) == pytest.approx(10_000, abs=4 * 100)
    assert 499 < workload.duration_s < 500


def test_lognormal_mean_and_median():
    tokens = draws(LogNormal.from_mean(1155, 1.1))
    assert tokens.mean() == pytest.approx(1155, rel=4 * 1.1 / math.sqrt(N))
    # The sample median's relative error is sigma·√(π/2)/√n, plus half a token of rounding.
    sigma = math.sqrt(math.log1p(1.21))
    assert np.median(tokens) == pytest.approx(1155 / math.sqrt(2.21), rel=4 * sigma * 1.2533 / math.sqrt(N) + 1e-3)


def test_uniform_includes_both_ends():
    tokens = draws(Uniform(100, 104))
    counts = np.bincount(tokens)[100:]
    assert counts.size == 5
    np.testing.assert_allclose(counts / N, 0.2, atol=4 * math.sqrt(0.16 / N))


def test_fixed_empirical_and_clipping():
    assert set(draws(Fixed(7)).tolist()) == {7}
    assert set(draws(Empirical(np.array([3, 900, 900]))).tolist()) == {3, 900}
    assert set(draws(Empirical(np.array([3, 900]), low=5, high=800)).tolist()) == {5, 800}
    clipped = draws(LogNormal(500, 2.0, low=100, high=1000))
    assert (clipped.min(), clipped.max()) == (100, 1000)
    assert draws(LogNormal(10**6, 50.0)).max() == MAX_TOKENS


def test_same_seed_same_bytes():
    spec = SyntheticSpec(request_rate=3, num_requests=500, input_tokens=Uniform(1, 900), shared_prefix_tokens=64)
    one, two, other = synthesize(spec, 4), synthesize(spec, 4), synthesize(spec, 5)
    for array in ("arrival_s", "input_tokens", "output_tokens"):
        assert getattr(one, array).tobytes() == getattr(two, array).tobytes()
    assert np.concatenate(one.prefix_block_hashes).tobytes() == np.concatenate(two.prefix_block_hashes).tobytes()
    assert one.arrival_s.tobytes() != other.arrival_s.tobytes()


@pytest.mark.parametrize(
    ("changed", "moves"),
    [
        ({"burstiness": 0.3}, "arrival_s"),
        ({"request_rate": 9.0}, "arrival_s"),
        ({"input_tokens": LogNormal(300, 1.0)}, "input_tokens"),
        ({"output_tokens": LogNormal(300, 1.0)}, "output_tokens"),
    ],
)
def test_one_knob_moves_one_stream(changed, moves):
    base = {"request_rate": 3.0, "num_requests": 300, "input_tokens": Uniform(1, 900), "output_tokens": Uniform(1, 90)}
    one, two = synthesize(SyntheticSpec(**base), 4), synthesize(SyntheticSpec(**(base | changed)), 4)
    for array in ("arrival_s", "input_tokens", "output_tokens"):
        assert (getattr(one, array).tobytes() != getattr(two, array).tobytes()) == (array == moves), array


def test_shared_prefixes():
    spec = SyntheticSpec(
        request_rate=3.0,
        num_requests=4000,
        input_tokens=Uniform(1, 400),
        shared_prefix_tokens=100,
        shared_prefix_share=0.75,
        num_shared_prefixes=3,
    )
    workload = synthesize(spec, 2)
    starts = np.array([row[0] for row in workload.prefix_block_hashes])
    ids, counts = np.unique(starts, return_counts=True)
    shared = ids[counts > 1]
    assert shared.size == 3
    has = np.isin(starts, shared)
    assert has.mean() == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / 4000))
    assert workload.input_tokens[has].min() == 101
    pages = [workload.page_hashes(i, 16) for i in np.flatnonzero(starts == shared[0])[:2]]
    assert pages[0][:6] == pages[1][:6], "96 of the 100 tokens fill whole blocks of 16"
    assert not set(pages[0][6:]) & set(pages[1][6:])
    # All but the three first requests with a prefix find its 96 tokens.
    assert workload.infinite_cache_hit_rate(16) == pytest.approx(96 * (has.sum() - 3) / workload.input_tokens.sum())
    assert synthesize(SyntheticSpec(request_rate=1, num_requests=2)).prefix_block_hashes is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1024", Fixed(1024)),
        (" fixed:9", Fixed(9)),
        ("uniform:100-1024", Uniform(100, 1024)),
        ("lognormal:mean=1155,cv=1.1", LogNormal.from_mean(1155, 1.1)),
        ("Lognormal: cv=1.1, mean=1155, max=4096", LogNormal.from_mean(1155, 1.1, 1, 4096)),
        ("lognormal:median=780,sigma=0.9,min=5", LogNormal(780, 0.9, 5)),
    ],
)
def test_lengths_are_parsed(text, expected):
    assert parse_length(text) == expected


def test_empirical_length_reads_the_side_that_is_asked_for(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n0,3,4\n1,5,6\n")
    assert parse_length(f"empirical:{path}").tokens.tolist() == [3, 5]
    assert parse_length(f"empirical:{path}", which="output").tokens.tolist() == [4, 6]
    with pytest.raises(UserError, match="there is no file"):
        parse_length("empirical:none.csv")


@pytest.mark.parametrize(
    "text",
    [
        "", "0", "-5", "12.5", "many", "uniform:5", "uniform:9-3", "uniform:a-b", "uniform:", "lognormal:", "fixed:",
        "lognormal:mean=100", "lognormal:mean=100,sigma=1", "lognormal:mean=x,cv=1", "lognormal:mean=-1,cv=1",
        "lognormal:mean=nan,cv=1", "lognormal:mean=inf,cv=1", "lognormal:mean=9,cv=-1", "lognormal:mean=9,cv=1,mean=9",
        "lognormal:mean=9,cv=1,min=0", "lognormal:mean=9,cv=1,min=50,max=5", "lognormal:mean=9,cv=1,max=nan",
        "lognormal:mean=9,cv=1,max=inf", "lognormal:median=9,sigma=inf", "normal:mean=3,cv=1", "empirical:",
        "99999999999", "²", "--5",
    ],
)  # fmt: skip
def test_nonsense_lengths_are_refused(text):
    with pytest.raises(UserError) as caught:
        parse_length(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_requests": None}, "either a number of requests or a duration"),
        ({"duration_s": 5.0}, "not both"),
        ({"num_requests": 0}, "at least 1"),
        ({"num_requests": None, "duration_s": -1.0}, "duration must be"),
        ({"num_requests": None, "duration_s": math.nan}, "duration must be"),
        ({"request_rate": 0.0}, "request rate must be positive"),
        ({"request_rate": math.nan}, "request rate must be positive"),
        ({"num_requests": None, "duration_s": 5.0, "request_rate": math.inf}, "needs a number of requests"),
        ({"num_requests": None, "duration_s": 1e9, "request_rate": 1e9}, "too many"),
        ({"burstiness": 0.0}, "burstiness must be positive"),
        ({"shared_prefix_share": 1.5}, "from 0 to 1"),
        ({"shared_prefix_tokens": -1}, "shared prefix has"),
        ({"num_shared_prefixes": 0}, "from 1 to"),
        ({"num_shared_prefixes": 10**30}, "from 1 to"),
    ],
)
def test_impossible_specs_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        SyntheticSpec(**({"request_rate": 1.0, "num_requests": 10} | change))


def test_a_duration_without_a_request_is_refused():
    with pytest.raises(UserError, match="no request arrives"):
        synthesize(SyntheticSpec(request_rate=0.001, duration_s=0.001))


def test_default_workload_is_what_it_says():
    workload = default_workload()
    n = 4800
    assert len(workload) == pytest.approx(n, abs=4 * math.sqrt(n))
    assert workload.duration_s < 600
    # The caps take less than 1 % off the means.
    assert workload.input_tokens.mean() == pytest.approx(1024, rel=4 * 1.0 / math.sqrt(n) + 0.01)
    assert workload.output_tokens.mean() == pytest.approx(256, rel=4 * 0.8 / math.sqrt(n) + 0.01)
    assert int((workload.input_tokens + workload.output_tokens).max()) <= 10_240
    assert default_workload(1).arrival_s.tobytes() != workload.arrival_s.tobytes()
