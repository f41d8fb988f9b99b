"""The arithmetic of `memwall validate`: percentiles, correlations, intervals, KV blocks, saturation."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from calibration.validate import state
from calibration.validate.decompose import agreement
from calibration.validate.errors import compare, metrics_of, request_errors
from calibration.validate.intervals import around, coverage, drawn
from calibration.validate.records import EngineSettings, Lives, nearest
from calibration.validate.replay import system_of
from calibration.validate.saturation import saturation, service, tokens_until
from engine.scheduling import Request, Scheduler, StepShape
from planner.step_time import StepTime, Uncertainty

ENGINE = EngineSettings("toy", None, None, "bfloat16", 500, 16, 400, 8, 64)


def lives(arrival, ttft, tpot, inputs, outputs):
    arrival, ttft, tpot = (np.asarray(column, float) for column in (arrival, ttft, tpot))
    inputs, outputs = np.asarray(inputs), np.asarray(outputs)
    first = arrival + ttft
    return Lives(arrival, arrival, first, first + tpot * (outputs - 1), inputs, outputs, np.zeros_like(inputs))


positive = st.floats(1e-4, 10.0)
many = st.lists(st.tuples(positive, positive, st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=40)


@given(many)
def test_percentiles_are_numpys(rows):
    ttft, tpot, inputs, outputs = map(np.array, zip(*rows, strict=True))
    arrival = np.arange(len(rows)) * 0.1
    found = metrics_of(lives(arrival, ttft, tpot, inputs, outputs))
    several = outputs > 1
    e2el = ttft + tpot * (outputs - 1)
    for name, values in (("ttft_ms", ttft), ("tpot_ms", tpot[several]), ("e2el_ms", e2el)):
        if not len(values):
            assert f"{name}.p50" not in found
            continue
        assert found[f"{name}.mean"] == pytest.approx(values.mean() * 1e3, abs=2e-4)
        for p in (50, 90, 99):
            assert found[f"{name}.p{p}"] == pytest.approx(np.percentile(values, p) * 1e3, abs=2e-4)
    duration = (arrival + e2el).max()
    assert found["output_throughput_tokens_per_s"] == pytest.approx(outputs.sum() / duration, abs=0.01)
    assert found["request_throughput_per_s"] == pytest.approx(len(rows) / duration, abs=1e-4)


@given(st.lists(st.tuples(positive, positive), min_size=3, max_size=60))
def test_request_errors_are_scipys(rows):
    predicted, measured = np.array(rows).T
    assume(min(np.ptp(predicted), np.ptp(measured)) > 1e-3)
    found = request_errors(predicted, measured)
    assert found.pearson == pytest.approx(stats.pearsonr(predicted, measured).statistic, abs=1e-9)
    assert found.mape == pytest.approx(np.mean(np.abs(predicted - measured) / measured))
    assert found.bias == pytest.approx(np.mean((predicted - measured) / measured))


def test_request_errors_where_there_is_nothing_to_correlate():
    assert request_errors(np.array([np.nan]), np.array([1.0])) is None
    assert request_errors(np.array([1.0, 2.0]), np.array([0.3, 0.3])).pearson is None
    assert request_errors(np.array([0.1 + 0.2, 0.3]), np.array([1.0, 2.0])).pearson is None


def test_signs_limits_and_spread():
    slow = compare("tpot_ms.mean", [10.3, 10.3], [10.0, 10.2])
    assert slow.error == pytest.approx(0.2 / 10.1)
    assert slow.errors == (pytest.approx(0.03), pytest.approx(0.1 / 10.2))
    assert slow.spread == pytest.approx(0.2 / 10.1)
    assert slow.is_met is True
    assert compare("tpot_ms.mean", [9.7], [10.0]).error == pytest.approx(-0.03)
    assert compare("tpot_ms.mean", [9.7], [10.0]).is_met is False
    assert compare("tpot_ms.mean", [9.7], [10.0]).spread is None
    # Within the engine's own spread only p99 may be.
    assert compare("ttft_ms.p99", [13.0, 13.0], [10.0, 13.0]).is_met is True
    assert compare("ttft_ms.p99", [15.0, 15.0], [10.0, 13.0]).is_met is False
    assert compare("ttft_ms.p50", [13.0, 13.0], [10.0, 13.0]).is_met is False
    assert compare("num_preemptions", [3.0], [0.0]).error is None


# ---- intervals -------------------------------------------------------------------------------------------------------


class Known(StepTime):
    """Multiplied by what it was scaled with."""

    def __init__(self, decode=1.0, prefill=1.0, host=1.0, deviations=(0.02, 0.05, 0.1)):
        self.factors = decode, prefill, host
        self.uncertainty = Uncertainty(*deviations)

    def predict(self, step):
        return 1.0

    def scaled(self, decode=1.0, prefill=1.0, host=1.0):
        return Known(decode, prefill, host)


def test_draws_have_the_deviations_that_they_are_drawn_with():
    logs = np.log([one.factors for one in drawn(Known(), 400)])
    assert logs.mean(axis=0) == pytest.approx([0, 0, 0], abs=1e-9)
    assert logs.std(axis=0) == pytest.approx([0.02, 0.05, 0.1], rel=0.02)
    assert np.abs(np.corrcoef(logs.T) - np.eye(3)).max() < 0.15
    assert [one.factors for one in drawn(Known(), 8)] == [one.factors for one in drawn(Known(), 8)]
    assert drawn(object(), 8) == [] and drawn(Known(), 0) == []


def test_nothing_is_known():
    assert around(1.0, []) is None
    assert coverage([(None, 1.0)]).share is None


@pytest.mark.parametrize("draws", [16, 64])
def test_coverage_is_nominal(draws):
    """Worlds with a step time off by an unknown factor.

    The metric rises faster than the step time, as latencies near saturation do.
    """
    rng = np.random.default_rng(7)
    points = []
    for _ in range(600):
        nominal = 10.0 * np.exp(rng.normal())
        predicted = [nominal * one.factors[0] ** 3 for one in drawn(Known(), draws)]
        points.append((around(nominal, predicted), nominal * np.exp(3 * rng.normal(0, 0.02))))
    assert 0.85 <= coverage(points).share <= 0.95


# ---- what the engine holds -------------------------------------------------------------------------------------------


@given(st.data())
def test_pages_are_those_that_the_scheduler_holds(data):
    """Step by step, with sliding windows, on the engine's own accounting."""
    windows = data.draw(st.sampled_from([(None,), (None, 40), (24,)]))
    engine = EngineSettings("toy", None, None, "bfloat16", 500, 16, 400, 8, 64, windows)
    scheduler = Scheduler(system_of(engine, Known()).scheduler, system_of(engine, Known()).cache)
    for index in range(data.draw(st.integers(1, 8))):
        scheduler.add(Request(index, data.draw(st.integers(1, 200)), data.draw(st.integers(1, 60)), ()))
    shapes, held = [], []
    while scheduler.num_outstanding:
        step = scheduler.schedule()
        shapes.append(step.shape)
        held.append(scheduler.kv.pool.num_used)
        scheduler.update(step)
    found = state.of_steps(shapes, [1.0] * len(shapes), engine)
    # Pages behind a window go back when the next page is asked for, and the step of a whole prompt holds all of its.
    late = sum(window is not None for window in windows) * 8 / 500
    has_chunks = any(shape.prefills for shape in shapes)
    for measured, real in ((found["kv_usage_peak"], max(held) / 500), (found["kv_usage_mean"], np.mean(held) / 500)):
        assert measured - 1e-9 <= real <= measured + late * (2 if has_chunks else 1) + 1e-9
    assert found["running_peak"] == max(shape.num_requests for shape in shapes)


def test_state_without_a_log():
    """Two requests of 32 tokens one after the other, a second each: three blocks in all, as the last token is kept."""
    both = lives([0.0, 1.0], [0.5, 0.5], [0.5, 0.5], [31, 31], [2, 2])
    found = state.of_lives(both, ENGINE)
    assert found["running_mean"] == pytest.approx(1.0, abs=1e-3)
    assert found["running_peak"] == 1
    assert found["kv_usage_peak"] == pytest.approx(2 / 500)


# ---- saturation ------------------------------------------------------------------------------------------------------


def queue(rate, capacity, count=400):
    """One server that takes 1 / capacity seconds for each request, in order; 10 tokens each, all given at the end."""
    arrival = np.arange(count) / rate
    end = np.zeros(count)
    free = 0.0
    for i, at in enumerate(arrival):
        free = end[i] = max(free, at) + 1 / capacity
    return Lives(
        arrival, arrival, end - 0.5 / capacity, end, np.full(count, 5), np.full(count, 10), np.zeros(count, int)
    )


def test_saturation_of_a_server_of_known_capacity():
    loads = (2.0, 5.0, 9.0, 11.0, 14.0)
    levels = [service(queue(rate, 10.0)) for rate in loads]
    assert [level.is_past_knee for level in levels] == [rate > 10 for rate in loads]
    for rate, level in zip(loads, levels, strict=True):
        assert level.served_per_s == pytest.approx(min(rate, 10.0), rel=0.01)
        assert level.offered_per_s == pytest.approx(rate, rel=0.01)
    slower = [service(queue(rate, 9.5)) for rate in loads]
    found = saturation(levels, slower)
    assert found.measured_per_s == pytest.approx(10.0, rel=0.01)
    assert found.error == pytest.approx(-0.05, abs=0.005)
    assert saturation(levels[:3], slower[:3]).measured_per_s is None
    assert saturation(levels[:3], slower[:3]).error is None


def test_a_load_all_at_once_has_no_service_rate():
    assert service(lives([0.0] * 30, [1.0] * 30, [0.1] * 30, [5] * 30, [5] * 30)) is None


def test_tokens_are_spread_evenly():
    one = lives([0.0], [1.0], [0.5], [5], [5])
    assert [tokens_until(one, at) for at in (0.5, 1.0, 2.0, 3.0, 9.0)] == [0, 1, 3, 5, 5]


# ---- the schedule ----------------------------------------------------------------------------------------------------


def test_agreement():
    steps = [StepShape([(4, 0)]), StepShape(decode_contexts=[4]), StepShape(decode_contexts=[5])]
    same = agreement(steps, steps)
    assert (same.first_difference, same.same_place, same.somewhere) == (None, 1.0, 1.0)
    late = agreement(steps, [steps[0], StepShape([(2, 0)]), *steps[1:]])
    assert (late.first_difference, late.same_place, late.somewhere) == (1, pytest.approx(1 / 3), 1.0)
    short = agreement(steps, steps[:2])
    assert (short.first_difference, short.same_place) == (2, pytest.approx(2 / 3))
    assert agreement([], []).first_difference is None


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30).map(sorted), st.lists(st.floats(-1, 101), max_size=10))
def test_nearest(ascending, values):
    ascending, values = np.array(ascending), np.array(values)
    found = nearest(ascending, values)
    distances = np.abs(ascending[found] - values)
    assert np.array_equal(distances, np.abs(ascending[:, None] - values).min(0) if len(values) else distances)
