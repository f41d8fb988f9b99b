"""The black-box fit against synthetic truth: runs simulated with known factors and noise give them back."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.scheduling import KVCacheConfig, SchedulerConfig, StepShape
from planner.catalog import load_gpu, load_model
from planner.commands.calibrate_from import calibration_table
from planner.errors import UserError
from planner.external.calibration import (
    ExternalCalibration,
    calibrate_external,
    load_external,
    parse_external,
)
from planner.external.errors import MetricError
from planner.external.fit import fit_factors, quiet_requests
from planner.external.moments import orthonormal, tpot_features, ttft_features
from planner.external.replay import replay
from planner.external.scaled import NAMES, Factors, ScaledStepTime
from planner.external.served_run import ServedRun, served_run
from planner.external.server_facts import ServerFacts
from planner.external.server_log import read_server_log
from planner.external.settings import external_system
from planner.roofline import RooflineStepTime
from planner.simulation import SimulationOptions, System, simulate
from planner.step_time import TICKS_PER_SECOND, Evidence

MODEL = load_model("llama-3.1-8b")
GPU = load_gpu("h200_sxm")
BASE = RooflineStepTime(MODEL, GPU)
SYSTEM = System(SchedulerConfig(8192, 256, 32768), KVCacheConfig(20_000, 16), BASE, pipeline_depth=2)
TRUTH = Factors(prefill=1.4, weights=1.2, kv=1.6, arrival_s=0.012)


def served(truth: Factors, rate: float, n: int, seed: int, system: System = SYSTEM, noise: float = 0.01) -> ServedRun:
    """What an engine with these factors would have recorded, with noise on every latency."""
    rng = np.random.default_rng(seed)
    arrival = np.cumsum(rng.exponential(1 / rate, n))
    inputs, outputs = rng.integers(16, 2048, n), rng.integers(2, 300, n)
    plain = served_run("synthetic", arrival, inputs, outputs, arrival, arrival)
    result = replay(plain, system, truth)
    ttft = result.ttft_s * np.exp(noise * rng.standard_normal(n))
    decode = (result.e2el_s - result.ttft_s) * np.exp(noise * rng.standard_normal(n))
    return served_run("synthetic", arrival, inputs, outputs, arrival + ttft, arrival + ttft + decode)


# ---- the scaled step time ------------------------------------------------------------------------------------------

CONTEXTS = st.lists(st.integers(0, 5000), max_size=20)
CHUNKS = st.lists(st.tuples(st.integers(1, 2048), st.integers(0, 4000)), max_size=3)


@given(CONTEXTS, CHUNKS)
def test_factors_of_one_leave_the_base_as_it_is(contexts, chunks):
    shape = StepShape(prefills=chunks, decode_contexts=contexts)
    if shape.num_requests:
        assert ScaledStepTime(BASE, Factors()).ticks(shape) == BASE.ticks(shape)


@given(CONTEXTS, CHUNKS, st.tuples(*[st.floats(0.2, 5.0)] * 3), st.floats(0, 1e-4))
def test_each_factor_scales_its_part(contexts, chunks, scales, request_s):
    shape = StepShape(prefills=chunks, decode_contexts=contexts)
    if not shape.num_requests:
        return
    prefill, weights, kv = scales
    floor = BASE.predict(StepShape(decode_contexts=[0] * max(1, len(contexts))))
    decodes = BASE.predict(StepShape(decode_contexts=contexts)) if contexts else floor
    whole = max(BASE.predict(shape), decodes) if chunks else decodes
    expected = weights * floor + kv * (decodes - floor) + prefill * (whole - decodes) + request_s * shape.num_requests
    scaled = ScaledStepTime(BASE, Factors(prefill, weights, kv, request_s))
    assert scaled.predict(shape) == pytest.approx(expected, rel=1e-5)


@settings(deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=20), st.integers(1, 400), st.floats(0.3, 3.0))
def test_decode_runs_are_their_single_steps(contexts, steps, kv):
    scaled = ScaledStepTime(BASE, Factors(weights=1.1, kv=kv, request_s=3e-6))
    run = scaled.decode_run(contexts, steps)
    durations = [first + increment * j for first, increment, count in run.segments(run.steps) for j in range(count)]
    assert 1 <= run.steps <= steps and len(durations) == run.steps
    for j in {0, run.steps // 2, run.steps - 1}:
        assert durations[j] == scaled.ticks(StepShape(decode_contexts=[c + j for c in contexts]))
    assert run.cumulative(run.steps) == sum(durations)


def test_steps_with_verifications():
    shape = StepShape(decode_contexts=[700], verifies=[(4, 1000), (4, 500)])
    assert ScaledStepTime(BASE, Factors()).ticks(shape) == BASE.ticks(shape)
    floor = BASE.ticks(StepShape(decode_contexts=[0], verifies=[(4, 0), (4, 0)]))
    assert ScaledStepTime(BASE, Factors(kv=2.0)).ticks(shape) == floor + 2 * (BASE.ticks(shape) - floor)


def test_leaping_over_scaled_steps_changes_nothing():
    run = served(TRUTH, 8.0, 40, 3)
    system = replace(SYSTEM, step_time=ScaledStepTime(BASE, TRUTH))
    leaping, stepping = (
        simulate(run.workload(), system, SimulationOptions(leap=leap)).model_dump() for leap in (True, False)
    )
    assert leaping["ttft_ms"] == stepping["ttft_ms"] and leaping["e2el_ms"] == stepping["e2el_ms"]
    assert leaping["evidence"] is Evidence.SCALED


@pytest.mark.parametrize(
    "values",
    [
        {"kv": 0.0},
        {"weights": -1.0},
        {"prefill": float("nan")},
        {"kv": 1e9},
        {"weights": 9000.0},
        {"request_s": -5.0},
        {"arrival_s": -5.0},
        {"arrival_s": 1e3},
    ],
)
def test_nonsense_factors_are_refused(values):
    with pytest.raises(UserError, match=next(iter(values))):
        Factors(**values)


# ---- features ------------------------------------------------------------------------------------------------------


def test_quiet_requests_overlap_nobody():
    arrival = np.array([0.0, 5.0, 6.0, 20.0])
    run = served_run("r", arrival, np.full(4, 9), np.full(4, 9), arrival + 1, np.array([4.0, 8.0, 7.0, 21.0]))
    assert quiet_requests(run).tolist() == [True, False, False, True]


def test_features_average_over_the_decoding_time():
    # Request 0 decodes from 1 to 5; request 1 from 3 to 5: half of the time there are two.
    arrival = np.array([0.0, 2.0])
    first, last = np.array([1.0, 3.0]), np.array([5.0, 5.0])
    run = served_run("r", arrival, np.array([100, 200]), np.array([10, 20]), first, last)
    features = tpot_features(run)
    assert np.exp(features[:, 1]) == pytest.approx([1.5, 2.0])
    cached = np.array([105 + 210 * 0.5, 105 + 210])
    assert features[:, 2] == pytest.approx(cached / cached.mean())
    assert features[0, 3] > 0 == features[1, 3]
    assert ttft_features(run)[:, 3] == pytest.approx([0.0, np.log(2)])
    basis = orthonormal(np.column_stack([features, features[:, 0]]))
    assert basis.T @ basis == pytest.approx(np.eye(basis.shape[1]), abs=1e-9)


# ---- the fit -------------------------------------------------------------------------------------------------------


def test_known_factors_are_recovered():
    held = []
    for rate, seed in ((0.3, 1), (4.0, 0), (10.0, 0)):
        fit = fit_factors([served(TRUTH, rate, 150, seed)], SYSTEM)
        for name in NAMES:
            estimate = fit.estimates[name]
            held.append(estimate.low <= getattr(TRUTH, name) <= estimate.high)
        for name in ("prefill", "weights"):
            assert fit.estimates[name].identified
            assert getattr(fit.factors, name) == pytest.approx(getattr(TRUTH, name), rel=0.05), (rate, name)
        assert fit.median_error < 0.03
        assert (fit.quiet > 20) == (rate < 1)
    # 90 % intervals of 15 estimates: fewer than 12 hold once in 180 times.
    assert sum(held) >= 12, held


def test_several_runs_of_one_server_are_fitted_together():
    runs = [served(TRUTH, rate, 60, seed) for rate, seed in ((0.5, 5), (8.0, 6))]
    fit = fit_factors(runs, SYSTEM)
    assert fit.num_fitted == 120
    assert fit.factors.weights == pytest.approx(TRUTH.weights, rel=0.03)
    assert fit.factors.prefill == pytest.approx(TRUTH.prefill, rel=0.05)


def test_what_the_run_does_not_show_stays_at_the_base():
    # Prompts of one token and short answers: hardly a cached token, hardly a chunk.
    rng = np.random.default_rng(0)
    arrival = np.cumsum(rng.exponential(0.5, 60))
    ones = np.ones(60, np.int64)
    plain = served_run("tiny", arrival, ones, 8 * ones, arrival, arrival)
    result = replay(plain, SYSTEM, Factors(weights=1.5, kv=3.0))
    noise = np.exp(0.01 * rng.standard_normal(60))
    first = arrival + result.ttft_s * noise
    run = served_run("tiny", arrival, ones, 8 * ones, first, first + (result.e2el_s - result.ttft_s) * noise)
    fit = fit_factors([run], SYSTEM)
    assert fit.factors.weights == pytest.approx(1.5, rel=0.05)
    assert fit.factors.kv == 1.0
    kv = fit.estimates["kv"]
    assert not kv.identified and kv.low < 0.4 and kv.high > 2.5


def test_too_few_requests_are_refused():
    with pytest.raises(UserError, match="only 10 answered requests"):
        fit_factors([served(TRUTH, 4.0, 10, 0)], SYSTEM)


# ---- settings ------------------------------------------------------------------------------------------------------

LOG = """\
non-default args: {'model': 'meta-llama/Llama-3.1-8B', 'max_num_seqs': 128, 'max_num_batched_tokens': 2048}
Initializing a V1 LLM engine (v0.19.0) with config: model='meta-llama/Llama-3.1-8B', max_seq_len=32768
GPU KV cache size: 41,408 tokens
"""


def test_settings_come_from_flags_then_log_then_defaults():
    run = served(TRUTH, 4.0, 30, 0)
    external = external_system(MODEL, load_gpu("rtx4090"), read_server_log(LOG), [run], {"max_num_seqs": 64})
    assert external.system.cache.num_blocks == 2588
    assert external.system.scheduler.max_num_seqs == 64
    assert external.system.scheduler.max_num_batched_tokens == 2048
    assert external.system.scheduler.max_model_len == 32768
    assert external.origin["max_num_seqs"] == (64, "flag")
    assert external.origin["max_num_batched_tokens"] == (2048, "log line 1")
    assert external.system.pipeline_depth == 2 and external.depth_known, "vLLM 0.19 schedules ahead"
    bare = external_system(MODEL, GPU, ServerFacts(), [run])
    assert bare.system.scheduler.max_num_batched_tokens == 8192
    assert not bare.depth_known
    assert bare.system.cache.num_blocks == bare.deployment.memory().num_kv_blocks + 1


def test_speculation_needs_its_acceptance():
    run = served(TRUTH, 4.0, 30, 0)
    log = LOG + "speculative_config=SpeculativeConfig(num_spec_tokens=2)\n"
    with pytest.raises(UserError, match="the server speculated"):
        external_system(MODEL, GPU, read_server_log(log), [run])
    log += (
        "SpecDecoding metrics: Mean acceptance length: 2.20, Accepted: 120 tokens, Drafted: 200 tokens, "
        "Per-position acceptance rate: 0.800, 0.400, Avg Draft acceptance rate: 60.0%\n"
    )
    system = external_system(MODEL, GPU, read_server_log(log), [run]).system
    assert system.speculation.num_speculative_tokens == 2
    assert system.speculation.acceptance.conditional_rates == pytest.approx((0.8, 0.5))
    assert system.pipeline_depth == 1


def test_a_request_beyond_the_servers_limit_is_refused():
    run = served(TRUTH, 4.0, 30, 0)
    external = external_system(MODEL, GPU, ServerFacts(), [run], {"max_model_len": 1024})
    with pytest.raises(UserError, match="the settings are not those of the server"):
        replay(run, external.system)


# ---- the record ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibration() -> ExternalCalibration:
    run = served(TRUTH, 4.0, 120, 0)
    flags = {"async_scheduling": True, "num_gpu_blocks": 20_000}
    external = external_system(MODEL, GPU, ServerFacts(), [run], flags, base=BASE)
    return calibrate_external([run], external, ServerFacts(), command="test", date="2026-11-22")


def test_held_out_requests_are_predicted(calibration):
    assert calibration.runs[0].num_fitted == calibration.runs[0].num_held_out == 60
    for name in ("ttft", "tpot", "e2el"):
        before, after = getattr(calibration.before, name), getattr(calibration.after, name)
        assert abs(before.mean) > 0.1 and abs(after.mean) < 0.03, name
        assert after.num_requests == 60


def test_nothing_held_out_leaves_nothing_tested():
    run = served(TRUTH, 4.0, 30, 1)
    external = external_system(MODEL, GPU, ServerFacts(), [run], {"async_scheduling": False, "num_gpu_blocks": 20_000})
    result = calibrate_external([run], external, ServerFacts(), held_out=0.0)
    assert result.after is None and result.fitted.ttft.num_requests == 30
    assert "fitted requests" in calibration_table(result, ServerFacts())


def test_saved_and_loaded_it_is_the_same(calibration, tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text(calibration.model_dump_json())
    loaded = load_external(path)
    assert loaded == calibration
    shape = StepShape(prefills=[(512, 0)], decode_contexts=[100, 2000])
    step_time = loaded.step_time(BASE)
    assert step_time.ticks(shape) == ScaledStepTime(BASE, calibration.as_factors()).ticks(shape)
    assert step_time.predict(shape) > BASE.ticks(shape) / TICKS_PER_SECOND
    assert step_time.evidence is Evidence.SCALED
    loaded.check("llama-3.1-8b", "h200_sxm", 1, "bfloat16")
    with pytest.raises(UserError, match="of gpu h200_sxm, not l4"):
        loaded.check("llama-3.1-8b", "l4", 1, "bfloat16")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(kind="memwall-profile"), "no calibration from outside"),
        (lambda d: d.update(version=9), "version 9"),
        (lambda d: d.pop("gpu"), "gpu: field required"),
        (lambda d: d["factors"].pop("kv"), "factors are"),
        (lambda d: d["factors"]["kv"].update(value=-1.0, low=-2.0), "kv is -1"),
        (lambda d: d["factors"]["kv"].update(low=50.0), "outside its interval"),
        (lambda d: d["factors"]["kv"].update(value="fast"), "factors.kv.value"),
        (lambda d: d["factors"]["kv"].update(low=float("-inf")), "factors.kv.low"),
        (lambda d: d["factors"]["arrival_s"].update(value=-5.0, low=-6.0), "the factor arrival_s is -5"),
        (lambda d: d["after"]["tpot"].update(mean=float("nan")), "after.tpot.mean"),
        (lambda d: d["before"]["ttft"].update(p50=float("inf")), "before.ttft.p50"),
        (lambda d: d.update(base_steps_s=[0.01, "fast"]), "base_steps_s.1"),
    ],
)
def test_edited_files_are_refused(calibration, change, words):
    document = json.loads(calibration.model_dump_json())
    change(document)
    with pytest.raises(UserError) as caught:
        parse_external(document, "edited.json")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_base_of_the_same_name_with_other_times_is_refused(calibration):
    assert calibration.step_time(BASE.scaled(decode=1.02))
    with pytest.raises(UserError, match=r"where a typical step took .* ms, and here it takes"):
        calibration.step_time(BASE.scaled(decode=1.3, prefill=1.3))
    older = calibration.model_copy(update={"base_steps_s": None})  # which did not say
    assert older.step_time(BASE.scaled(decode=1.3))


def test_what_foretells_nothing_says_so(calibration):
    assert not any("do not plan with this" in warning for warning in calibration.warnings)
    run = served(TRUTH, 4.0, 80, 3)
    slow = twice_as_slow_later(run)
    external = external_system(MODEL, GPU, ServerFacts(), [slow], {"async_scheduling": True}, base=BASE)
    found = calibrate_external([slow], external, ServerFacts())
    assert "do not plan with this calibration: on requests of its runs that it has not seen" in found.warnings[0]
    uncertain = found.step_time(BASE).uncertainty
    assert uncertain.decode <= 1.0 and uncertain.prefill <= 1.0
    nonsense = found.model_copy(update={"after": found.after.model_copy(update={"ttft": huge(found.after.ttft)})})
    assert nonsense.step_time(BASE).uncertainty.prefill == 1.0


def twice_as_slow_later(run: ServedRun) -> ServedRun:
    """Something else got hold of the server half-way."""
    by = np.where(np.arange(len(run)) < len(run) // 2, 1.0, 2.0)
    first, last = (run.arrival_s + by * (each - run.arrival_s) for each in (run.first_token_s, run.last_token_s))
    return replace(run, first_token_s=first, last_token_s=last)


def huge(error: MetricError) -> MetricError:
    return error.model_copy(update={"mean": 1e6, "p50": 1e6})


def test_missing_and_broken_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        load_external(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"version": 1,')
    with pytest.raises(UserError, match=r"half\.json cannot be read as JSON"):
        load_external(tmp_path / "half.json")


def test_nothing_here_needs_torch():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['triton'] = sys.modules['transformers'] = None;"
        "import planner.external.calibration, planner.external.readers, planner.commands.calibrate_from"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
