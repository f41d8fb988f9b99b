"""Step times from a profile: ticks, leaps, scales, and simulations on them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles_for_tests import Physics, profile
from test_profile_fit import fitted, held_out

from engine.scheduling import KVCacheConfig, SchedulerConfig, StepShape
from planner.profile.clock import ClockModel
from planner.profile.shape import ModelShape
from planner.profile.step_time import ProfileStepTime
from planner.simulation import SimulationOptions, System, run, simulate
from planner.step_time import TICKS_PER_SECOND, Evidence, PiecewiseRun, ScaledStepTime
from planner.workload import Workload


def windowed(fit, layers):
    """The fit as if the model's layers had these windows: times are nonsense, their structure is not."""
    shape: ModelShape = replace(fit.shape, layers=layers)
    return replace(fit, shape=shape, prompt=replace(fit.prompt, shape=shape, exact={}))


@pytest.fixture(scope="module")
def models():
    """Plain, noisy, ragged and windowed ones, and of a device that slows down when it is hot."""
    plain = fitted(profile())
    noisy = fitted(profile(noise=0.02, seed=4))
    ragged = replace(plain, decode=replace(plain.decode, ragged_s=1e-9))
    layers = ((None, 8), (50, 16), (700, 8))
    return [ProfileStepTime(fit) for fit in (plain, noisy, ragged)] + [
        ProfileStepTime(windowed(plain, layers), uncertainty=ProfileStepTime(plain).uncertainty),
        ProfileStepTime(noisy, max_num_seqs=100, max_num_batched_tokens=512).scaled(1.013, 0.98, 1.07),
        ProfileStepTime(noisy, clock=CLOCK),
        ScaledStepTime(ProfileStepTime(windowed(plain, layers), clock=replace(CLOCK, decode=1.0)), 1.01, 0.99),
    ]


CLOCK = ClockModel(0.08, 0.3, 0.9, (128, 512, 1024), (0.95, 0.87, 0.9), (1.0, 1.02, 1.1), 1.04)
which = st.integers(0, 6)
batches = st.lists(st.integers(0, 3000), min_size=1, max_size=40)


@given(which, batches, st.integers(1, 3000))
@settings(deadline=None, max_examples=40)
def test_a_run_is_its_single_steps_to_the_tick(models, index, contexts, steps):
    model = models[index]
    run = model.decode_run(contexts, steps)
    assert 1 <= run.steps <= steps
    last = run.steps - 1
    for j in {0, 1, last // 3, last // 2, last - 1, last} & set(range(run.steps)):
        ticks = model.ticks(StepShape(decode_contexts=[c + j for c in contexts]))
        assert run.cumulative(j + 1) - run.cumulative(j) == ticks > 0
    assert sum(f * n + i * (n * (n - 1) // 2) for f, i, n in run.segments(run.steps)) == run.cumulative(run.steps)


@given(which, batches, st.integers(1, 400), st.integers(1, 500))
@settings(deadline=None, max_examples=200)
def test_how_many_steps_are_inside(models, index, contexts, steps, scale):
    model = models[index]
    contexts = [context * scale // 10 for context in contexts]
    inside = model.steps_inside(contexts, steps)
    for j in {0, inside - 1, inside, steps - 1} & set(range(steps)):
        evidence = model.evidence_of(StepShape(decode_contexts=[c + j for c in contexts]))
        assert (evidence is Evidence.INTERPOLATED) == (j < inside)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(-3, 9), st.integers(1, 20)), min_size=1, max_size=6))
@settings(deadline=None)
def test_piecewise_runs(drawn):
    segments = [(max(first, 1 - increment * count), increment, count) for first, increment, count in drawn]
    listed = [first + increment * j for first, increment, count in segments for j in range(count)]
    run = PiecewiseRun(segments)
    assert run.steps == len(listed)
    for steps in range(1, run.steps + 1):
        assert run.cumulative(steps) == sum(listed[:steps])
        again = [first + increment * j for first, increment, count in run.segments(steps) for j in range(count)]
        assert again == listed[:steps]
    for elapsed in (1, listed[0], sum(listed) // 2 + 1, sum(listed), sum(listed) + 5):
        fewest = next((n for n in range(1, run.steps + 1) if sum(listed[:n]) >= elapsed), run.steps)
        assert run.steps_until(elapsed) == fewest


def test_ticks_are_the_fit(models):
    model = models[0]
    for step in held_out(100, seed=11):
        assert model.predict(step) == pytest.approx(model.fitted.seconds(step), rel=1e-6)
        assert model.ticks(step) == round(model.predict(step) * TICKS_PER_SECOND)
        assert model.host_ticks(step) == pytest.approx(model.fitted.host_s(step) * TICKS_PER_SECOND)
        assert model.alone_ticks(step) == pytest.approx(model.fitted.alone_s(step) * TICKS_PER_SECOND, rel=1e-6)


def test_a_step_does_not_end_before_its_last_launch(models):
    """Where the CPU takes longer than the device, by the most of its time; the device begins no later for that."""
    plain = models[0]
    costs = {kind: replace(cost, step_s=cost.step_s + 20e-3) for kind, cost in plain.fitted.host.costs.items()}
    slow = ProfileStepTime(replace(plain.fitted, host=replace(plain.fitted.host, costs=costs)))
    step = StepShape(prefills=[(100, 0)], decode_contexts=[300] * 4)
    ticks = plain.ticks(step)
    assert slow.ticks(step) == ticks
    assert slow.wait_ticks(step) == plain.wait_ticks(step) == plain.alone_ticks(step) - ticks
    assert slow.alone_ticks(step) == pytest.approx(0.93 * slow.host_ticks(step))
    assert slow.alone_ticks(step) > 18e-3 * TICKS_PER_SECOND
    decode = StepShape(decode_contexts=[300] * 4)
    assert slow.alone_ticks(decode) == slow.host_ticks(decode) + slow.ticks(decode)
    assert slow.wait_ticks(decode) == slow.host_ticks(decode)


def test_the_host_of_a_decode_step_does_not_depend_on_contexts(models):
    for model in models:
        for batch in (1, 7, 90):
            near, far = (StepShape(decode_contexts=[c] * batch) for c in (5, 9000))
            assert model.host_ticks(near) == model.host_ticks(far) > 0
            assert model.alone_ticks(far) == model.host_ticks(far) + model.ticks(far)


def test_scales(models):
    model, decode, prompt = models[0], StepShape(decode_contexts=[500] * 9), StepShape(prefills=[(700, 0)])
    for scaled in (model.scaled(1.1, 0.9), ScaledStepTime(model, 1.1, 0.9), model.scaled(1.1).scaled(prefill=0.9)):
        assert scaled.ticks(decode) == pytest.approx(1.1 * model.ticks(decode))
        assert scaled.ticks(prompt) == pytest.approx(0.9 * model.ticks(prompt))
        assert scaled.host_ticks(prompt) == model.host_ticks(prompt)
        added = scaled.alone_ticks(prompt) - scaled.ticks(prompt)
        assert added == pytest.approx(model.alone_ticks(prompt) - model.ticks(prompt))
        assert scaled.uncertainty == model.uncertainty
        assert scaled.pipeline_depth == 2


def test_graphs_of_another_limit_on_requests(models):
    fit = models[0].fitted
    assert ProfileStepTime(fit, max_num_seqs=100).fitted.engine.graph_sizes[-3:] == (88, 96, 100)
    assert ProfileStepTime(fit, max_num_seqs=3).fitted.engine.graph_sizes == (1, 2, 3)
    assert ProfileStepTime(fit, max_num_seqs=300).fitted.engine.graph_sizes[-3:] == (288, 296, 300)
    assert ProfileStepTime(fit, max_num_batched_tokens=512).fitted.prompt.piece_sizes[-1] == 512


# ---- in the simulator ----------------------------------------------------------------------------------------------


def load(seed: int, count: int = 60, rate: float = 12.0) -> Workload:
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, count))
    return Workload("load", arrivals, rng.integers(16, 3000, count), rng.integers(1, 400, count))


def system(step_time, num_blocks: int, depth: int) -> System:
    return System(SchedulerConfig(2048, 64, 8192), KVCacheConfig(num_blocks, 64), step_time, pipeline_depth=depth)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_blocks", [200, 5000])
@pytest.mark.parametrize("patient", [True, False])
def test_leaping_and_stepping_are_the_same(models, depth, num_blocks, patient):
    for seed, model in enumerate(models):
        options = SimulationOptions(seed=1, client_timeout_s=None if patient else 2.0)
        results = [
            simulate(load(seed), system(model, num_blocks, depth), replace(options, leap=leap))
            for leap in (True, False)
        ]
        assert results[0].model_dump_json() == results[1].model_dump_json()


@given(st.integers(0, 10**6), st.floats(0.5, 60), st.sampled_from([1, 2]), st.floats(0.001, 2.0), st.floats(0, 0.8))
@settings(deadline=None, max_examples=40)
def test_leaping_and_stepping_are_the_same_on_a_hot_device(models, seed, rate, depth, tau, e0):
    clock = replace(CLOCK, tau_s=tau, e0=e0, e1=e0 + 0.15)
    model = ProfileStepTime(models[5].fitted, uncertainty=models[5].uncertainty, clock=clock)
    many, one = (
        simulate(load(seed, 25, rate), system(model, 300, depth), SimulationOptions(leap=leap))
        for leap in (True, False)
    )
    assert many.model_dump_json() == one.model_dump_json()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_clock_that_never_gives_way_changes_nothing(models, depth):
    plain = models[1]
    still = ClockModel(0.08, 0.4, 1.0, (64, 512), (1.0, 1.0), (1.0, 1.0))
    clocked = ProfileStepTime(plain.fitted, uncertainty=plain.uncertainty, clock=still)
    one, other = (simulate(load(3), system(model, 300, depth)) for model in (plain, clocked))
    assert one.model_dump_json() == other.model_dump_json()


def test_steady_times_know_no_heat(models):
    """What is asked for without a device to be hot or cool: what was measured, with and without a clock."""
    plain, clocked = models[1], models[5]
    for step in held_out(50, seed=3):
        assert clocked.ticks(step) == plain.ticks(step) == plain.heated_ticks(step, plain.ticks(step), 0.7)
        assert clocked.alone_ticks(step) == plain.alone_ticks(step)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("heated", [0.5, 1.0, 1.5])
def test_heat_does_not_move_the_last_launch(models, depth, heated):
    """A prompt alone is there when its last kernel was launched, or when the device is done, whichever is later."""
    plain = models[1]
    costs = {kind: replace(cost, step_s=cost.step_s + 5e-3) for kind, cost in plain.fitted.host.costs.items()}
    fitted = replace(plain.fitted, host=replace(plain.fitted.host, costs=costs))
    clock = ClockModel(0.08, 0.4, 1.0, (64, 512), (heated,) * 2, (heated,) * 2)
    model = ProfileStepTime(fitted, uncertainty=plain.uncertainty, clock=clock)
    for tokens in (40, 300, 900):
        step = StepShape(prefills=[(tokens, 0)])
        steady = model.ticks(step)
        ends = max(0.93 * model.host_ticks(step), model.wait_ticks(step) + heated * steady)
        one = Workload("one", np.zeros(1), np.array([tokens]), np.array([1]))
        found = simulate(one, system(model, 300, depth), SimulationOptions())
        # The host looks for the tokens when its launch is over.
        seen = max(ends, model.host_ticks(step))
        assert found.ttft_ms.mean * 1e-3 * TICKS_PER_SECOND == pytest.approx(seen, rel=1e-6)


def test_a_prompt_behind_others_by_hand(models):
    """Two prompts, one at a time: the first is cool; the second comes as much later as the decodes last."""
    model = models[5]
    prompt = StepShape(prefills=[(512, 0)])
    steady = model.ticks(prompt) / TICKS_PER_SECOND
    added = model.alone_ticks(prompt) / TICKS_PER_SECOND - steady
    for gap in (0.02, 0.5):
        workload = Workload("two", np.array([0.0, gap]), np.array([512, 512]), np.array([1, 1]))
        log = run(workload, system(model, 5000, 2)).requests
        times, level, end = [], 0.0, 0.0
        for begin in (added, gap + added):
            level *= np.exp((end - begin) / 0.08)
            guess = steady * (0.87 + 0.15 * np.clip((level - 0.3) / 0.6, 0, 1))
            middle = 1 - (1 - level) * np.exp(-guess / 2 / 0.08)
            times.append(steady * (0.87 + 0.15 * np.clip((middle - 0.3) / 0.6, 0, 1)))
            level, end = 1 - (1 - level) * np.exp(-times[-1] / 0.08), begin + times[-1]
        assert log.ttft_s == pytest.approx([times[0] + added, times[1] + added], rel=1e-9)


@pytest.mark.parametrize("depth", [1, 2])
def test_shares_of_evidence(models, depth):
    inside = simulate(load(0), system(models[0], 5000, depth))
    assert inside.evidence is Evidence.INTERPOLATED
    # Full chunks of 2,048 tokens are points of the grid.
    assert set(inside.evidence_shares) <= {Evidence.INTERPOLATED, Evidence.MEASURED}
    assert inside.evidence_shares[Evidence.INTERPOLATED] > 0.9
    # Prompts beyond every chunk that was measured, and decodes within.
    workload = Workload("long", np.arange(4) * 1.0, np.full(4, 20_000), np.full(4, 200))
    large = System(SchedulerConfig(32_768, 64, 32_768), KVCacheConfig(5000, 64), models[0], pipeline_depth=depth)
    outside = simulate(workload, large)
    assert outside.evidence is Evidence.EXTRAPOLATED
    assert sum(outside.evidence_shares.values()) == pytest.approx(1)
    assert 0.1 < outside.evidence_shares[Evidence.EXTRAPOLATED] < 0.95


def test_one_request_takes_what_its_steps_do(models):
    """By hand, on the physics: a prompt alone, then decodes with two in flight."""
    physics = Physics()
    alone = physics.alone(StepShape(prefills=[(512, 0)]))
    decodes = sum(physics.seconds(StepShape(decode_contexts=[512 + j])) for j in range(99))
    result = simulate(Workload("one", np.zeros(1), np.array([512]), np.array([100])), system(models[0], 5000, 2))
    assert result.ttft_ms.mean == pytest.approx(alone * 1e3, rel=0.01)
    assert result.e2el_ms.mean == pytest.approx((alone + decodes) * 1e3, rel=0.01)


def test_a_profile_of_an_engine_with_one_step_in_flight():
    """On a CPU: a step's period has everything in it."""
    content = profile()
    content["engine"]["async_scheduling"] = False
    model = ProfileStepTime(fitted(content))
    step = StepShape(prefills=[(512, 0)])
    assert model.pipeline_depth == 1
    assert model.host_ticks(step) == 0
    assert model.alone_ticks(step) == model.ticks(step)
