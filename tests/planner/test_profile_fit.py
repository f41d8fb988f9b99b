"""The fit of a profile against physics that is known, and against recorded steps of a served run on an H200."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles_for_tests import GRAPHS, PIECES, POOL_TOKENS, Physics, profile

from engine.bench.step_log import read_step_log
from engine.errors import UserError
from engine.scheduling import StepShape
from planner.catalog import model_entry
from planner.profile.fit import fit_kv
from planner.profile.shape import ModelShape
from planner.profile.tables import EngineSettings, KVTables, Limits, Point, ProfileTables, padded, point_shape
from planner.step_time import Evidence

RECORDS = Path(__file__).resolve().parent.parent.parent / "records"


def fitted(content: dict, kv: str = "bfloat16"):
    tables = ProfileTables.from_json(content)
    shape = ModelShape.from_config(tables.config, tables.quantization, kv, tables.engine.block_size)
    return fit_kv(tables.kv[kv], shape, tables.limits, tables.engine)


@pytest.fixture(scope="module")
def exact():
    return fitted(profile())


@pytest.fixture(scope="module")
def noisy():
    return fitted(profile(noise=0.005, seed=3))


def held_out(count: int, seed: int) -> list[StepShape]:
    """Steps as serving makes them, inside the grid and at none of its points."""
    rng, steps = np.random.default_rng(seed), []
    for _ in range(count):
        batch = int(np.exp(rng.uniform(0, np.log(256))))
        longest = min(30_000, POOL_TOKENS // batch)
        contexts = np.exp(rng.uniform(np.log(64), np.log(longest), batch)).astype(int).tolist()
        chunks = [(int(np.exp(rng.uniform(3, 6.5))), 0) for _ in range(rng.integers(0, 4))]
        steps.append(StepShape(prefills=chunks, decode_contexts=contexts[:150] if chunks else contexts))
    return steps


# ---- exact where it was measured -----------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_measured_point_is_returned_as_it_is(noise):
    fit = fitted(profile(noise=noise, seed=1))
    for table in (fit.tables.decode, fit.tables.prefill, fit.tables.mixed):
        for point in table:
            seconds, evidence = fit.predict(point_shape(point))
            assert evidence is Evidence.MEASURED
            if not (noise and len(point.decodes) > 1 and not point.prefills):  # ragged beside uniform points
                assert seconds == pytest.approx(point.step_s, rel=1e-9)


def test_a_measured_point_is_known_in_any_order(exact):
    point = next(point for point in exact.tables.mixed if len(point.prefills) > 1 and point.batch > 1)
    step = point_shape(point)
    turned = StepShape(prefills=step.prefills[::-1], decode_contexts=step.decode_contexts[::-1])
    assert exact.predict(turned) == (pytest.approx(point.step_s), Evidence.MEASURED)


# ---- between the points --------------------------------------------------------------------------------------------


def test_what_lies_between_is_found(exact):
    errors = {True: [], False: []}
    for step in held_out(400, seed=7):
        errors[bool(step.prefills)].append(abs(exact.seconds(step) / Physics().seconds(step) - 1))
    # The graphs' sizes are a third apart, and a decode step's base a curve between them.
    assert np.percentile(errors[False], 50) < 0.003
    assert max(errors[False]) < 0.03
    assert np.percentile(errors[True], 50) < 0.02
    assert np.percentile(errors[True], 90) < 0.05


def test_the_coefficients_are_those_of_the_physics(exact):
    assert exact.decode.key_s == pytest.approx(26.6e-9 / 32, rel=0.02)
    assert exact.decode.row_s == pytest.approx(3e-6, rel=0.1)
    assert exact.prompt.chunk_s == pytest.approx(1.5e-4, rel=0.2)


def test_a_coefficient_that_is_not_there_is_dropped():
    fit = fitted(profile(Physics(chunk_s=0.0, beside_row_s=0.0), noise=0.002, seed=5))
    errors = fit.errors()
    assert "ragged" in errors["decode"]["dropped"]
    assert fit.decode.ragged_s == 0
    assert "chunk" in errors["mixed"]["dropped"]
    assert fit.prompt.chunk_s == 0


def test_leave_one_out_errors_are_about_the_noise(noisy):
    errors = noisy.errors()
    found = errors["decode"]["leave_one_out"]
    # Two measurements' noise, of the point left out and of those it is told from.
    assert 0.5 * 0.6745 * 0.005 < found["median"] < 2.5 * 0.6745 * 0.005
    assert errors["decode"]["in_sample"]["median"] < 1e-9
    assert errors["decode"]["points"] == len(noisy.tables.decode)
    assert errors["mixed"]["in_sample"]["max"] < 1e-9
    assert errors["mixed"]["leave_one_out"]["median"] < 0.02
    uncertainty = noisy.uncertainty()
    assert 0.002 < uncertainty.decode < 0.03
    assert 0.002 < uncertainty.prefill < 0.06


def test_host_and_latency_are_found(exact):
    for step in held_out(50, seed=2):
        assert exact.host_s(step) == pytest.approx(Physics().host(step), rel=0.05)
        alone = exact.alone_s(step) - exact.seconds(step)
        assert alone == pytest.approx(Physics().alone(step) - Physics().seconds(step), rel=0.1)


# ---- beyond them ---------------------------------------------------------------------------------------------------


def test_evidence(exact):
    assert exact.evidence(StepShape(decode_contexts=[700] * 10)) is Evidence.INTERPOLATED
    assert exact.evidence(StepShape(decode_contexts=[700] * 300)) is Evidence.EXTRAPOLATED
    assert exact.evidence(StepShape(decode_contexts=[100_000])) is Evidence.EXTRAPOLATED
    assert exact.evidence(StepShape(prefills=[(700, 300)])) is Evidence.INTERPOLATED
    assert exact.evidence(StepShape(prefills=[(700, 100_000)])) is Evidence.EXTRAPOLATED
    assert exact.evidence(StepShape(prefills=[(10_000, 0)])) is Evidence.EXTRAPOLATED
    assert exact.evidence(StepShape(verifies=[(4, 100)])) is Evidence.EXTRAPOLATED


def test_utilisation_is_held_outside(exact):
    """Twice the context beyond the grid is about twice the attention, and twice the tokens twice the products."""
    near, far = (exact.seconds(StepShape(decode_contexts=[c] * 8)) for c in (100_000, 200_000))
    assert far - near == pytest.approx(26.6e-9 * 100_000 * 8, rel=0.05)
    assert exact.seconds(StepShape(prefills=[(16_384, 0)])) == pytest.approx(
        Physics().seconds(StepShape(prefills=[(16_384, 0)])), rel=0.05
    )
    step = StepShape(prefills=[(2048, 100_000)])
    assert exact.seconds(step) == pytest.approx(Physics().seconds(step), rel=0.05)


def test_a_verification_lies_between_a_decode_and_a_prompt(exact):
    contexts = [1000] * 16
    decode = exact.seconds(StepShape(decode_contexts=contexts))
    for query in (1, 2, 4, 8):
        verify = exact.seconds(StepShape(verifies=[(query, c) for c in contexts]))
        assert verify >= decode * 0.98
        assert verify < 2 * decode


# ---- invariants ----------------------------------------------------------------------------------------------------

contexts_of = st.lists(st.integers(0, 40_000), min_size=1, max_size=64)


@given(contexts_of, st.integers(1, 20_000))
@settings(deadline=None, max_examples=200)
def test_more_context_takes_no_less(exact, contexts, more):
    before = exact.seconds(StepShape(decode_contexts=contexts))
    longer = exact.seconds(StepShape(decode_contexts=[context + more for context in contexts]))
    assert 0 < before < longer * (1 + 1e-6)


@given(st.integers(1, 300), st.integers(0, 30_000))
@settings(deadline=None, max_examples=200)
def test_more_requests_take_no_less(exact, batch, context):
    fewer, more = (exact.seconds(StepShape(decode_contexts=[context] * n)) for n in (batch, batch + 1))
    assert 0 < fewer < more * 1.001


@given(st.integers(1, 12_000), st.integers(0, 60_000), st.integers(1, 2000), contexts_of)
@settings(deadline=None, max_examples=200)
def test_more_of_a_prompt_takes_no_less(exact, query, context, more, contexts):
    for beside in ([], contexts):
        times = [
            exact.seconds(StepShape(prefills=[chunk], decode_contexts=beside))
            for chunk in ((query, context), (query + more, context), (query, context + more))
        ]
        assert 0 < times[0] < min(times[1:]) * 1.01


def test_prompts_that_waited_for_the_cpu_are_taken_as_they_were_behind_others():
    """Of a stream of short prompts the CPU made 9 ms each; launched in time they are as long as the physics says."""
    content, truth = profile(), {}
    for point in content["kv"]["bfloat16"]["prefill"]:
        (query, context), *_ = point["prefills"]
        if context == 0 and query <= 256:
            truth[query] = point["step_s"]
            point |= {"step_s": 9e-3, "low_s": 9e-3, "high_s": 9e-3, "host_s": 9e-3}
    tables = ProfileTables.from_json(content)
    known = {query: seconds for query, seconds in truth.items() if query != 64}
    told = tables.kv["bfloat16"].on_device(known)
    by_query = {point.prefills[0][0]: point.step_s for point in told.prefill if point.prefills[0][1] == 0}
    for query, seconds in truth.items():
        assert by_query[query] == pytest.approx(seconds, rel=0.03)  # 64 between its neighbours
    assert not any(point.is_host_bound for point in told.prefill)
    # What was not measured behind others stands.
    assert tables.kv["bfloat16"].on_device({512: 1e-3, 1024: 2e-3}).prefill[0].step_s == 9e-3


@given(st.sampled_from([0.5, 0.9, 1.0, 1.4]), st.booleans())
def test_what_tells_that_a_stream_waited_for_the_cpu(gpu_share, is_busy):
    """The CPU was busy all of a period, or the GPU was idle for some of it."""
    point = Point(
        ((100, 0),), ((50, 3),), 4e-3, 4e-3, 4e-3, gpu_s=gpu_share * 4e-3, host_s=(0.97 if is_busy else 0.5) * 4e-3
    )
    assert point.is_host_bound == (is_busy or gpu_share < 0.95)
    assert not replace(point, prefills=()).is_host_bound
    assert not replace(point, gpu_s=None).is_host_bound


def test_steps_that_were_launched_ahead_count_as_they_took_the_gpu():
    content, truth = profile(), {}
    tables = content["kv"]["bfloat16"]
    for index, point in enumerate(tables["mixed"] + tables["prefill"]):
        if index % 3 and point["step_s"] < 12e-3:
            truth[json.dumps([point["prefills"], point["decodes"]])] = point["step_s"]
            point["ahead_s"] = point["step_s"]
            point |= dict.fromkeys(("step_s", "low_s", "high_s", "host_s"), 15e-3) | {"gpu_s": 13e-3}
    assert truth
    told = ProfileTables.from_json(content).kv["bfloat16"].on_device()
    for point in (*told.mixed, *told.prefill):
        key = json.dumps([[list(each) for each in pairs] for pairs in (point.prefills, point.decodes)])
        assert point.step_s == truth.get(key, point.step_s)
        assert not point.is_host_bound
    exact = fitted(profile())
    with_waits = fitted(content)
    for step in (StepShape(prefills=[(300, 0)], decode_contexts=[700] * 9), StepShape(prefills=[(80, 500)])):
        assert with_waits.seconds(step) == pytest.approx(exact.seconds(step), rel=1e-9)
    # Longer than among its like is chance.
    point = replace(told.mixed[0], ahead_s=2 * told.mixed[0].step_s)
    assert KVTables((), (), (point,)).on_device().mixed == (point,)


def test_points_that_tell_of_the_host_alone_do_not_bend_the_others():
    """The CPU had something else to do while some points were measured: such steps came as fast as it launched them."""
    content = profile()
    tables = content["kv"]["bfloat16"]
    slow = [point for point in tables["prefill"] if point["prefills"] == [[128, 1024]]] + tables["mixed"][:12]
    for point in slow:
        seconds = 1.8 * point["step_s"]
        point |= {"step_s": seconds, "low_s": seconds, "high_s": seconds, "host_s": 0.99 * seconds}
    fit = fitted(content)
    for step in [*held_out(60, seed=2), StepShape(prefills=[(128, 1024)])]:
        if step.prefills:
            assert fit.seconds(step) == pytest.approx(Physics().seconds(step), rel=0.015)
    assert fit.errors()["mixed"]["points"] == len(tables["mixed"]) - 12
    # Where nothing else tells of a length, what was measured stands.
    only = next(point for point in tables["prefill"] if point["prefills"] == [[256, 0]])
    only["host_s"] = only["step_s"]
    assert fitted(content).seconds(StepShape(prefills=[(256, 0)])) == pytest.approx(only["step_s"])


# ---- few points ----------------------------------------------------------------------------------------------------


def plain_point(prefills=(), decodes=(), seconds=0.005) -> Point:
    return Point(tuple(prefills), tuple(decodes), seconds, seconds, seconds)


def test_one_point_of_each_kind_is_enough():
    tables = KVTables((plain_point(decodes=[(100, 4)]),), (plain_point([(256, 0)], seconds=0.01),))
    shape = ModelShape.from_config(model_entry("llama-3.1-8b")["config"], None, "float32", 64)
    fit = fit_kv(tables, shape, Limits(4e12, 7e14), EngineSettings(async_scheduling=False))
    assert fit.seconds(StepShape(decode_contexts=[100] * 4)) == pytest.approx(0.005)
    assert fit.seconds(StepShape(prefills=[(256, 0)])) == pytest.approx(0.01)
    assert fit.seconds(StepShape(prefills=[(512, 0)], decode_contexts=[5] * 9)) > 0.01
    assert fit.errors()["decode"]["leave_one_out"] is None
    assert fit.uncertainty().decode >= 0


@pytest.mark.parametrize("missing", ["decode", "prefill"])
def test_without_points_nothing_can_be_told(missing):
    points = {"decode": (plain_point(decodes=[(1, 1)]),), "prefill": (plain_point([(16, 0)]),), missing: ()}
    shape = ModelShape.from_config(model_entry("llama-3.1-8b")["config"], None, "bfloat16", 64)
    with pytest.raises(UserError, match=f"no {missing} points"):
        fit_kv(KVTables(**points), shape, Limits(4e12, 7e14), EngineSettings())


def test_it_runs_where_only_numpy_and_scipy_are():
    """As on the GPU machine, which has none of the planner's other libraries."""
    script = (
        "import sys\n"
        "for name in ('pydantic', 'simpy', 'typer', 'joblib', 'pandas', 'rich', 'plotly', 'streamlit', 'torch'):\n"
        "    sys.modules[name] = None\n"
        "import planner.profile.fit, planner.profile.tables, planner.profile.shape\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- against an engine ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", ["half", "high"])
def test_recorded_decode_steps_of_an_h200(load):
    """Some decode steps of one run as a profile's points predict all those of another run."""
    shape = ModelShape.from_config(model_entry("llama-3.1-8b")["config"], None, "bfloat16", 64)
    first, second = (read_step_log(RECORDS / f"engine_h200_serve_{load}.steps.{run}.jsonl.gz") for run in (1, 2))
    known = [step for step in first if not step.shape.prefills]
    points = []
    for step in random.Random(0).sample(known, 100):
        runs = tuple((context, 1) for context in step.shape.decode_contexts)
        points.append(Point((), runs, step.gpu_s, step.gpu_s, step.gpu_s))
    prompt = plain_point([(512, 0)], seconds=0.015)
    engine = EngineSettings(graph_sizes=GRAPHS, piece_sizes=PIECES)
    fit = fit_kv(KVTables(tuple(points), (prompt,)), shape, Limits(4.08e12, 7e14), engine)
    errors = [fit.seconds(s.shape) / s.gpu_s - 1 for s in second if not s.shape.prefills]
    assert len(errors) > 2000
    assert np.median(np.abs(errors)) < 0.005
    assert np.percentile(np.abs(errors), 90) < 0.02
    assert padded(5, GRAPHS) == 8
