"""A calibration from outside as a profile of `plan` and `simulate`: whose it is, what it adds, what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from engine.scheduling import StepShape
from planner.bounds import Floors
from planner.catalog import load_gpu, load_model
from planner.deployment import Deployment
from planner.errors import UserError
from planner.external.calibration import ExternalCalibration
from planner.external.errors import MetricError, RunErrors
from planner.external.scaled import Factors, ScaledStepTime
from planner.profile.library import load_calibrations, load_profiles
from planner.serving import arrival_seconds, simulate
from planner.simulation import SLO, SimulationOptions
from planner.simulation import simulate as simulate_inside
from planner.step_time import Evidence
from planner.workload import Workload

MODEL, GPU = load_model("llama-3.1-8b"), load_gpu("rtx4090")  # which no profile was measured on
FACTORS = {"prefill": 1.3, "weights": 1.2, "kv": 1.5, "request_s": 2e-6, "arrival_s": 0.05}
LOAD = ("--system", "rtx4090", "--num-prompts", 30, "--request-rate", 2, "--isl", 300, "--osl", 20)


def plain(**changes) -> Deployment:
    settings = {"max_model_len": 2048, "max_num_seqs": 64, "max_num_batched_tokens": 2048, **changes}
    return Deployment(MODEL, GPU, gpu_memory_utilization=0.9, **settings)


def calibration(**changes) -> ExternalCalibration:
    def error(of: float) -> MetricError:
        return MetricError(served_mean_ms=1, mean=of, p50=of, p90=of, p99=of, median_request=abs(of), num_requests=9)

    fitted = RunErrors(ttft=error(0.03), tpot=error(0.01), e2el=error(0.0))
    factors = {
        name: {"value": value, "low": value * 0.95, "high": value * 1.05, "identified": True}
        for name, value in FACTORS.items()
    }
    settings = {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "gpu_memory_utilization": 0.9, "block_size": 16}
    content = {
        "command": "memwall calibrate-from",
        "date": "2026-01-01",
        "model": MODEL.name,
        "gpu": GPU.id,
        "tensor_parallel_size": 1,
        "kv_cache_dtype": "bfloat16",
        "quantization": None,
        "base": plain().step_time().description,
        "factors": factors,
        "settings": {**settings, "num_gpu_blocks": 1_801, "pipeline_depth": 2},
        "origin": {"num_gpu_blocks": "log line 3"},
        "runs": (),
        "held_out_share": 0.0,
        "before": None,
        "after": None,
        "fitted": fitted,
        "warnings": (),
    }
    return ExternalCalibration.model_validate({**content, **changes})


def write(folder, found: ExternalCalibration, name: str = "cal.json") -> str:
    path = folder / name
    path.write_text(found.model_dump_json())
    return str(path)


@pytest.fixture
def path(tmp_path) -> str:
    return write(tmp_path, calibration())


def load() -> Workload:
    arrival = np.arange(20) * 0.5
    return Workload("load", arrival, np.full(20, 300), np.full(20, 30))


# ---- step times ----------------------------------------------------------------------------------------------------


def test_step_times_are_the_bases_scaled(path):
    step_time = plain(profiles=(path,)).step_time()
    assert step_time.evidence is Evidence.SCALED
    assert step_time.pipeline_depth == 2
    expected = ScaledStepTime(plain().step_time(), Factors(**FACTORS))
    for shape in (StepShape(decode_contexts=[500] * 7), StepShape(prefills=[(700, 0)], decode_contexts=[90])):
        assert step_time.predict(shape) == expected.predict(shape)
    assert arrival_seconds(step_time) == 0.05
    assert arrival_seconds(plain().step_time()) == 0


def test_scaled_again_steps_take_that_much_longer(path):
    step_time = plain(profiles=(path,)).step_time()
    slower = step_time.scaled(decode=1.1, prefill=1.25)
    decodes, prompts = StepShape(decode_contexts=[500] * 7), StepShape(prefills=[(700, 0)], decode_contexts=[90])
    assert slower.predict(decodes) == pytest.approx(1.1 * step_time.predict(decodes))
    assert slower.predict(prompts) == pytest.approx(1.25 * step_time.predict(prompts))
    run = slower.decode_run([500] * 7, 5)
    expected = [slower.ticks(StepShape(decode_contexts=[500 + j] * 7)) for j in range(5)]
    assert [run.cumulative(j + 1) - run.cumulative(j) for j in range(5)] == expected
    assert slower.scaled(decode=1 / 1.1).predict(decodes) == pytest.approx(step_time.predict(decodes))
    assert arrival_seconds(slower) == 0.05
    assert slower.uncertainty == step_time.uncertainty


def test_its_uncertainty_comes_from_its_intervals_and_its_errors():
    """Factors known exactly leave what the fit is off by; wider ones widen it by their share of a step."""
    exact = {name: {"value": v, "low": v, "high": v, "identified": True} for name, v in FACTORS.items()}
    base = plain().step_time()
    sure = calibration(factors=exact).uncertainty(base)
    assert (sure.decode, sure.prefill) == pytest.approx((0.01, 0.03))
    wide = calibration().uncertainty(base)
    # All factors are off by 5 % / 1.645: a step of independent parts is off by that or less.
    assert 0.01 < wide.decode < math.hypot(0.01, 0.05 / 1.645)
    assert 0.03 < wide.prefill < math.hypot(0.03, 0.05 / 1.645)


def test_the_servers_pool_is_used_where_settings_are_its(path):
    assert plain(profiles=(path,)).memory().num_kv_blocks == 1_800
    assert plain(profiles=(path,), max_num_seqs=32).memory().num_kv_blocks != 1_800
    assert plain().memory().num_kv_blocks != 1_800


@pytest.mark.parametrize(
    ("origin", "had", "asked", "is_the_servers"),
    [
        ("vLLM's default", 0.9, 0.92, True),  # only assumed, and only usual: they do not differ
        ("vLLM's default", 0.9, 0.9, True),
        ("vLLM's default", 0.9, 0.8, False),
        ("log line 2", 0.9, 0.92, False),
        ("log line 2", 0.92, 0.92, True),
    ],
)
def test_what_the_log_does_not_say_of_memory_is_no_difference(tmp_path, origin, had, asked, is_the_servers):
    settings = calibration().settings | {"gpu_memory_utilization": had}
    origins = {"num_gpu_blocks": "log line 3", "gpu_memory_utilization": origin}
    path = write(tmp_path, calibration(settings=settings, origin=origins))
    blocks = replace(plain(profiles=(path,)), gpu_memory_utilization=asked).memory().num_kv_blocks
    assert (blocks == 1_800) is is_the_servers


# ---- the time outside of steps -------------------------------------------------------------------------------------


def test_the_way_in_is_part_of_ttft_and_e2el(path):
    system = plain(profiles=(path,)).system(load())
    options = SimulationOptions(slo=SLO(ttft_ms=1000))
    inside, outside = simulate_inside(load(), system, options), simulate(load(), system, options)
    for name in ("mean", "p50", "p99", "at_slo_percentile"):
        for metric in ("ttft_ms", "e2el_ms", "prefill_ms"):
            added = getattr(getattr(outside, metric), name) - getattr(getattr(inside, metric), name)
            assert added == pytest.approx(50), metric
        for metric in ("tpot_ms", "queue_ms"):
            assert getattr(getattr(outside, metric), name) == pytest.approx(getattr(getattr(inside, metric), name))


def test_the_slo_is_judged_with_it(path):
    system = plain(profiles=(path,)).system(load())
    inside = simulate_inside(load(), system, SimulationOptions())
    limit = inside.ttft_ms.max + 25  # met by steps alone, and missed with the way in
    options = SimulationOptions(slo=SLO(ttft_ms=limit))
    assert simulate_inside(load(), system, options).slo_met
    assert not simulate(load(), system, options).slo_met
    floors = Floors(load(), plain(profiles=(path,)), system.step_time, 0.0)
    assert floors.violated(SLO(ttft_ms=49)).at_least_ms > 50


# ---- whose it is ---------------------------------------------------------------------------------------------------


def test_files_are_told_apart(path):
    shipped = len(load_profiles(None))
    assert len(load_profiles([path])) == shipped
    assert [name for name, _ in load_calibrations([path])] == ["cal.json"]
    assert load_calibrations(None) == load_calibrations(["none"]) == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpu": load_gpu("l4")}, "of gpu rtx4090, not l4"),
        ({"model": load_model("llama-3.2-1b")}, "of model llama-3.1-8b, not llama-3.2-1b"),
        ({"tensor_parallel_size": 2}, "of tensor_parallel_size 1, not 2"),
    ],
)
def test_another_deployment_is_refused(path, changes, words):
    other = replace(plain(profiles=(path,)), **changes)
    assert words in other.calibration_fault()
    with pytest.raises(UserError, match=words):
        other.step_time()


def test_the_one_of_several_that_fits_is_used(tmp_path):
    other = write(tmp_path, calibration(gpu="l4"), "l4.json")
    mine = write(tmp_path, calibration(), "mine.json")
    assert plain(profiles=(other, mine)).step_time().evidence is Evidence.SCALED
    assert plain(profiles=(other, mine)).calibration_fault() is None


def test_two_of_one_deployment_are_refused(tmp_path):
    paths = tuple(write(tmp_path, calibration(), name) for name in ("a.json", "b.json"))
    with pytest.raises(UserError, match=r"a\.json and b\.json are calibrations of the same deployment"):
        plain(profiles=paths).step_time()


def test_another_base_is_refused(tmp_path):
    path = write(tmp_path, calibration(base="profile of something"))
    with pytest.raises(
        UserError, match="scales the step times of the profile of something, but here they are the step times"
    ):
        plain(profiles=(path,)).step_time()


# ---- the command line ----------------------------------------------------------------------------------------------


def test_simulate_with_a_calibration(memwall, path):
    line = ("simulate", *LOAD, "--profile", path)
    text = memwall(*line).out
    assert text.startswith("step times: scaled: from the profile of llama-3.1-8b on NVIDIA H200")
    assert "90 % intervals" in text
    report = json.loads(memwall(*line, "--output", "json").out)
    assert report["step_times"]["basis"] == "scaled"
    assert report["result"]["evidence"] == "scaled"
    alone = json.loads(memwall("simulate", *LOAD, "--output", "json").out)
    assert report["result"]["ttft_ms"]["p50"] > alone["result"]["ttft_ms"]["p50"] + 50


def test_what_foretells_nothing_is_said_again_of_every_result(memwall, tmp_path):
    off = calibration().fitted.tpot.model_copy(update={"mean": 0.6})
    path = write(tmp_path, calibration(after=calibration().fitted.model_copy(update={"tpot": off})))
    for command in ("simulate", "plan"):
        more = ("--total-gpus", 2, "--max-num-seqs", 64, "--draws", 1, "--jobs", 1) if command == "plan" else ()
        done = memwall(command, *LOAD, *more, "--profile", path)
        assert done.code == 0, done.err
        said = " ".join((done.out + done.err).split())
        assert "do not plan with this calibration: on requests of its runs that it has not seen" in said
        assert "off by +60%" in said


def test_plan_with_a_calibration(memwall, path):
    line = ("plan", *LOAD, "--profile", path, "--total-gpus", 2, "--max-num-seqs", 64, "--draws", 2, "--jobs", 1)
    done = memwall(*line, "--output", "json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    (plan,) = report["plans"]  # bf16 on one GPU: the others were not calibrated
    assert plan["step_times"]["basis"] == "scaled"
    assert plan["confidence"]["num_draws"] == 2
    causes = {(each["tensor_parallel_size"], each["kv_cache_dtype"]): each["cause"] for each in report["rejections"]}
    assert causes == {(1, "fp8"): "profile", (2, "bfloat16"): "profile", (2, "fp8"): "profile"}
    assert report["effort"]["num_engines_not_calibrated"] == 3
    text = " ".join(memwall(*line).out.split())
    assert "S scaled to an engine that was seen from outside" in text
    assert "of which nothing was calibrated" in text


def test_bad_calibrations_are_one_sentence(memwall, tmp_path, path):
    memwall("simulate", "--profile", path).check_bad_input("cal.json: the calibration is of gpu rtx4090")
    memwall("plan", "--profile", path).check_bad_input("no engine of this search", "gpu rtx4090, not h200_sxm")
    memwall("simulate", *LOAD, "--profile", path, "--quantization", "fp8").check_bad_input("not of fp8 weights")
    memwall("simulate", *LOAD, "--profile", path, "--profile", "none").check_bad_input("no profile at all")
    document = calibration().model_dump()
    document["factors"]["kv"]["value"] = -1.0
    (tmp_path / "bad.json").write_text(json.dumps(document))
    memwall("simulate", *LOAD, "--profile", tmp_path / "bad.json").check_bad_input(
        "bad.json", "the factor kv is -1", "must be positive"
    )
    document["version"] = 9
    (tmp_path / "bad.json").write_text(json.dumps(document))
    memwall("plan", *LOAD, "--profile", tmp_path / "bad.json").check_bad_input("version 9")
