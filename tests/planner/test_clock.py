"""The clock of a hot device: the model, the heat, and what a series of steps tells of both."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.profile.clock import HALF_TOKENS, USUAL_E0, USUAL_E1, USUAL_TAU_S, ClockModel, Heat, fit_clock

CLOCK = ClockModel(0.08, 0.4, 0.9, (256, 512, 1024), (0.98, 0.9, 0.88), (1.0, 1.05, 1.1), 1.03, half_tokens=0)
POINTS = [{"tokens": 512, "steady_s": 0.012, "cool_s": 0.0108, "hot_s": 0.0126, "samples": 5}]


# ---- heat ----------------------------------------------------------------------------------------------------------


HEATINGS = st.one_of(st.just(0.0), st.floats(0.1, 1.0))


@given(st.lists(st.tuples(st.floats(0, 0.5), st.floats(0.001, 0.2), HEATINGS), max_size=12), st.floats(0.01, 1))
@settings(deadline=None)
def test_heat_is_the_moving_average_of_prompt_steps(steps, tau):
    """Against the definition, integrated: dE/dt = (u - E) / tau, in slices of a step or a pause."""
    heat, level, time = Heat(tau), 0.0, 0.0

    def integrate(duration, u):
        nonlocal level
        for _ in range(50):
            level = u - (u - level) * math.exp(-duration / 50 / tau)

    for pause, duration, heating in steps:
        integrate(pause, 0.0)
        begin, time = time + pause, time + pause + duration
        assert heat.at(begin) == pytest.approx(level, abs=1e-9)
        heat.ran(begin, time, heating)
        integrate(duration, heating)
        assert heat.at(time) == pytest.approx(level, abs=1e-9)
        assert 0 <= heat.at(time) < 1


def test_decodes_need_not_be_told():
    """To the last bit: a leap over many of them must not differ from telling them one by one."""
    one, other = Heat(0.08), Heat(0.08)
    one.ran(0.0, 0.1, 1.0)
    other.ran(0.0, 0.1, 1.0)
    for step in range(20):
        one.ran(0.1 + 0.01 * step, 0.11 + 0.01 * step, 0.0)
    assert one.at(0.5) == other.at(0.5) > 0


# ---- the model -----------------------------------------------------------------------------------------------------


def test_ratios_are_those_measured_and_linear_between():
    assert [CLOCK.ratios(tokens) for tokens in (256, 512, 1024)] == [(0.98, 1.0), (0.9, 1.05), (0.88, 1.1)]
    assert CLOCK.ratios(768) == (pytest.approx(0.89), pytest.approx(1.075))
    assert (CLOCK.ratios(16), CLOCK.ratios(9000)) == ((0.98, 1.0), (0.88, 1.1))


@given(st.integers(1, 4000), st.floats(0, 1), st.floats(0, 1), st.floats(1e-4, 0.2))
@settings(deadline=None)
def test_hotter_is_slower_and_between_cool_and_hot(tokens, one, other, steady):
    cool, hot = CLOCK.ratios(tokens)
    low, high = sorted((one, other))
    factors = [CLOCK.prompt_factor(tokens, heat, steady) for heat in (low, high)]
    assert cool - 1e-12 <= factors[0] <= factors[1] + 1e-12
    assert factors[1] <= hot + 1e-12
    decodes = [CLOCK.decode_factor(heat, steady) for heat in (low, high)]
    assert 1.0 <= decodes[0] <= decodes[1] <= 1.03 + 1e-12
    for heat, factor in zip((low, high), decodes, strict=True):
        assert CLOCK.is_felt_by_decodes(heat) or factor == 1.0


@given(st.integers(1, 8192))
def test_a_stream_of_its_like_heats_a_device_as_a_step_says(tokens):
    """To tokens / (tokens + 170): half as far with 170 as with very many."""
    clock = replace(CLOCK, half_tokens=170)
    heat = Heat(clock.tau_s)
    for step in range(200):
        heat.ran(0.01 * step, 0.01 * step + 0.01, clock.heating(tokens))
    assert heat.at(2.0) == pytest.approx(clock.heating(tokens), rel=1e-9)
    assert clock.heating(170) == 0.5
    assert clock.heating(tokens) < clock.heating(tokens + 1) < 1
    # A step that comes to a device which is hotter than itself cools it.
    assert clock.prompt_factor(512, 0.85, 0.2) < clock.prompt_factor(512, 0.85, 1e-6)


def test_a_long_step_heats_itself():
    """From rest: in the middle of 80 ms, E = 1 - exp(-0.9 / 2) = 0.36 and still cool; later it is not."""
    assert CLOCK.prompt_factor(512, 0.0, 0.08) == pytest.approx(0.9)
    assert CLOCK.prompt_factor(512, 0.0, 0.16) > 0.92
    assert CLOCK.prompt_factor(512, 0.0, 5.0) == pytest.approx(1.05)


# ---- the fit -------------------------------------------------------------------------------------------------------


def series(clock, tokens, steady, noise=0.0, seed=0, pauses=(), seconds=0.8):
    """Prompt steps one behind the other on a cool device, with pauses after some steps; the truth in fine slices."""
    rng, heat, time, rows = np.random.default_rng(seed), 0.0, 0.0, []
    (cool, hot), own = clock.ratios(tokens), clock.heating(tokens)
    while time < seconds:
        begin, done = time, 0.0  # the step is done when as much work as a step has was done
        while done < 1.0:
            rate = 1 / (steady * (cool + (hot - cool) * min(max((heat - clock.e0) / (clock.e1 - clock.e0), 0), 1)))
            slice_s = min(0.0002, (1 - done) / rate)
            done += slice_s * rate + 1e-12
            heat = own - (own - heat) * math.exp(-slice_s / clock.tau_s)
            time += slice_s
        rows.append((begin, (time - begin) * math.exp(rng.normal(0, noise) if noise else 0.0)))
        if len(rows) in pauses:
            heat *= math.exp(-0.08 / clock.tau_s)
            time += 0.08
    begins, times = zip(*rows, strict=True)
    return {"tokens": tokens, "decode_batch": 16, "gpu_s": list(times), "begin_s": list(begins)}


def section(clock, noise=0.0, seed=0, pauses=()):
    steady = {256: 0.0075, 512: 0.0125, 1024: 0.0235}
    return {
        "points": [
            {
                "tokens": n,
                "steady_s": s,
                "cool_s": s * clock.prompt_factor(n, 0.0, s),
                "hot_s": s * clock.prompt_factor(n, clock.heating(n), s),
                "samples": 9,
            }
            for n, s in steady.items()
        ],
        "decode_points": [{"batch": b, "context": 1024, "cool_s": 0.01, "hot_s": 0.01 * clock.decode} for b in (8, 64)],
        "series": [series(clock, n, steady[n], noise, seed + n, pauses) for n in (512, 1024)],
    }


TRUTHS = [
    ClockModel(tau, e0, e1, CLOCK.tokens, CLOCK.cool, CLOCK.hot, 1.025, HALF_TOKENS)
    for tau, e0, e1 in ((0.08, 0.3, 0.75), (0.05, 0.25, 0.6), (0.12, 0.35, 0.7), (0.1, 0.15, 0.5))
]


def worst_error(fit, truth):
    """Of factors, over streams of prompt steps and pauses, each at the heat of its own clock."""
    rng, worst = np.random.default_rng(5), 0.0
    one, other, time = Heat(fit.tau_s), Heat(truth.tau_s), 0.0
    for _ in range(400):
        time += float(rng.exponential(0.03)) if rng.random() < 0.4 else 0.0
        factors = [clock.prompt_factor(512, heat.at(time), 0.0125) for clock, heat in ((fit, one), (truth, other))]
        worst = max(worst, abs(factors[0] / factors[1] - 1))
        for heat in (one, other):
            heat.ran(time, time + 0.0125 * factors[1], truth.heating(512))
        time += 0.0125 * factors[1]
    return worst


@pytest.mark.parametrize("truth", TRUTHS, ids=str)
def test_a_known_clock_is_recovered(truth):
    found = fit_clock(section(truth, pauses=(10, 16, 25)))
    assert found.tau_s == pytest.approx(truth.tau_s, rel=0.15)
    assert (found.e0, found.e1) == (pytest.approx(truth.e0, abs=0.07), pytest.approx(truth.e1, abs=0.07))
    assert (found.tokens, found.decode) == (truth.tokens, pytest.approx(truth.decode))
    assert (found.cool, found.hot) == (pytest.approx(truth.cool, rel=1e-3), pytest.approx(truth.hot, rel=1e-3))
    assert worst_error(found, truth) < 0.012


@pytest.mark.parametrize("truth", TRUTHS, ids=str)
def test_a_known_clock_is_recovered_from_noisy_steps(truth):
    """1 % of noise in every step, and some of them disturbed: what is predicted is off by little more."""
    noisy = section(truth, 0.01, 3, pauses=(10, 16, 25))
    for each in noisy["series"]:
        for i in range(7, len(each["gpu_s"]), 11):
            each["gpu_s"][i] *= 1.4
    assert worst_error(fit_clock(noisy), truth) < 0.035


def test_what_tells_nothing_leaves_what_is_usual():
    usual = (USUAL_TAU_S, USUAL_E0, USUAL_E1)
    flat = {"tokens": 512, "gpu_s": [0.012] * 60, "begin_s": [0.012 * i for i in range(60)]}
    for few in ([], [{"tokens": 512, "gpu_s": [0.012, 0.012], "begin_s": [0.0, 0.012]}], [flat]):
        found = fit_clock({"points": POINTS, "series": few})
        assert (found.tau_s, found.e0, found.e1) == pytest.approx(usual)
        assert (found.ratios(512), found.decode) == ((pytest.approx(0.9), pytest.approx(1.05)), 1.0)
    assert fit_clock(None) is None
    assert fit_clock({}) is None
    assert fit_clock({"points": []}) is None


def test_what_a_long_step_heats_itself_is_taken_out():
    """Measured as the model says a cool device runs them: 25, 50 and 800 ms; the last tells of its hot time alone."""
    truth = ClockModel(USUAL_TAU_S, USUAL_E0, USUAL_E1, (1024, 2048, 32768), (0.9, 0.88, 0.88), (1.05, 1.1, 1.0))
    rows = []
    for tokens, steady in zip(truth.tokens, (0.025, 0.05, 0.8), strict=True):
        factor = truth.prompt_factor(tokens, 0.0, steady)
        hot = truth.ratios(tokens)[1]
        rows.append({"tokens": tokens, "steady_s": steady, "cool_s": steady * factor, "hot_s": steady * hot})
    found = fit_clock({"points": rows})
    assert found.ratios(1024) == (pytest.approx(0.9), pytest.approx(1.05))
    assert found.ratios(2048) == (pytest.approx(0.88, rel=0.01), pytest.approx(1.1))
    assert found.ratios(32768) == (pytest.approx(0.8, rel=0.01), pytest.approx(1.0))  # 0.88 / 1.1, as before
    for row in rows[:2]:
        assert found.prompt_factor(row["tokens"], 0.0, row["steady_s"]) == pytest.approx(
            row["cool_s"] / row["steady_s"], rel=0.005
        )


def test_small_steps_do_not_heat_a_device_all_the_way():
    """In a stream of their like they take what was measured there, and longer behind larger ones."""
    truth = ClockModel(USUAL_TAU_S, USUAL_E0, USUAL_E1, (256, 1024), (0.9, 0.85), (1.1, 1.05))
    rows = []
    for tokens, steady in ((256, 0.007), (1024, 0.023)):
        own = truth.heating(tokens)
        cool, settled = (steady * truth.prompt_factor(tokens, heat, steady) for heat in (0.0, own))
        rows.append({"tokens": tokens, "steady_s": steady, "cool_s": cool, "hot_s": settled})
    found = fit_clock({"points": rows})
    for row in rows:
        heat = found.heating(row["tokens"])
        assert row["steady_s"] * found.prompt_factor(row["tokens"], heat, row["steady_s"]) == pytest.approx(
            row["hot_s"]
        )
    assert found.ratios(256) == (pytest.approx(0.9), pytest.approx(1.1))
    assert rows[0]["hot_s"] < 1.09 * rows[0]["steady_s"]


def test_points_measured_twice_and_noise_at_small_sizes():
    """Means by samples; a step that is faster when hot by noise has one time."""
    points = [*POINTS, {"tokens": 512, "steady_s": 0.012, "cool_s": 0.0102, "hot_s": 0.012, "samples": 15}]
    points.append({"tokens": 64, "steady_s": 0.005, "cool_s": 0.0051, "hot_s": 0.0049})
    found = fit_clock({"points": points})
    assert found.tokens == (64, 512)
    assert found.ratios(512) == (pytest.approx(0.9 / 4 + 0.85 * 3 / 4), pytest.approx(1.05 / 4 + 3 / 4))
    assert found.ratios(64) == (pytest.approx(1.0), pytest.approx(1.0))


@given(st.lists(st.floats(0.001, 0.1), min_size=4, max_size=30), st.floats(0.0, 0.3))
@settings(deadline=None, max_examples=20)
def test_any_series_gives_a_clock_that_can_be_used(times, pause):
    begins = np.cumsum([0.0, *[each + pause for each in times[:-1]]]).tolist()
    found = fit_clock({"points": POINTS, "series": [{"tokens": 512, "gpu_s": times, "begin_s": begins}]})
    assert found.tau_s > 0
    assert 0 <= found.e0 < found.e1 <= 1 + 1e-9
    factors = [found.prompt_factor(512, heat, 0.012) for heat in np.linspace(0, 1, 20)]
    assert all(after >= before - 1e-12 for before, after in pairwise(factors))
