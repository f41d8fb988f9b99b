"""An engine seen from outside, with a measured profile for its base: the GPU's clock, steps in flight, real runs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.scheduling import StepShape
from planner import cli
from planner.catalog import load_gpu, load_model
from planner.deployment import Deployment
from planner.errors import UserError
from planner.external.calibration import calibrate_external, load_external, parse_external
from planner.external.replay import replay
from planner.external.scaled import Factors, ScaledStepTime
from planner.external.served_run import ServedRun, served_run
from planner.external.server_facts import ServerFacts
from planner.external.settings import external_system
from planner.simulation import SimulationOptions, simulate

RECORDS = Path(__file__).parents[2] / "calibration" / "records"
MODEL, GPU = load_model("llama-3.1-8b"), load_gpu("h200_sxm")
#: Of the server of the records, as its start says.
FLAGS = {"num_gpu_blocks_override": 14_248, "block_size": 64, "max_model_len": 131_072}
BASE = Deployment(MODEL, GPU, max_model_len=8192).step_time()


def recorded(load: int) -> ServedRun:
    """What a client of the engine saw."""
    record = json.loads((RECORDS / f"serve_h200_bf16_{load}.json").read_text())
    columns = record["results"][0]["runs"][0]["requests"]
    names = ("arrival_s", "input_tokens", "output_tokens", "first_token_s", "last_token_s")
    return served_run(f"load of {load} %", *(np.array(columns[name]) for name in names))


def test_scaled_steps_feel_the_heat_of_their_base():
    assert BASE.clock is not None
    scaled = ScaledStepTime(BASE, Factors(prefill=1.3, weights=0.9))
    assert scaled.clock is BASE.clock
    for step in (StepShape(prefills=[(500, 0)], decode_contexts=[300] * 9), StepShape(decode_contexts=[300] * 9)):
        ticks = scaled.ticks(step)
        cool, hot = (scaled.heated_ticks(step, ticks, heat) for heat in (0.0, 1.0))
        assert cool < hot
        # The longer a step takes, the more it heats itself.
        assert hot / ticks == pytest.approx(BASE.heated_ticks(step, BASE.ticks(step), 1.0) / BASE.ticks(step), rel=0.02)
    assert scaled.scaled(1.1, 1.1).clock is BASE.clock


@pytest.mark.parametrize("leap", [True, False])
def test_factors_of_one_leave_a_simulation_as_it_is(leap):
    run = recorded(50)
    system = external_system(MODEL, GPU, ServerFacts(), [run], FLAGS | {"async_scheduling": True}).system
    assert system.pipeline_depth == system.step_time.pipeline_depth == 2
    scaled = replace(system, step_time=ScaledStepTime(system.step_time, Factors(), pipeline_depth=2))
    plain, other = (simulate(run.workload(), each, SimulationOptions(leap=leap)) for each in (system, scaled))
    # Factors are fractions of 2^20, which leaves no more than ticks.
    for name in ("ttft_ms", "tpot_ms", "e2el_ms"):
        assert getattr(plain, name).mean == pytest.approx(getattr(other, name).mean, rel=1e-9)


def test_one_load_seen_from_outside_foretells_the_others():
    """From the timestamps of 150 requests at half load: the same server at 20, 80 and 95 % of what it takes."""
    run = recorded(50)
    external = external_system(MODEL, GPU, ServerFacts(), [run], FLAGS)
    assert not external.depth_known
    found = calibrate_external([run], external, ServerFacts(), held_out=0.5)
    # The engine has the profile's number of steps in flight, and nothing before or behind them.
    assert found.settings["pipeline_depth"] == 2
    assert any("as the profile's engine has them" in warning for warning in found.warnings)
    factors = found.as_factors()
    assert factors.prefill == pytest.approx(1.0, abs=0.06)
    assert factors.weights == pytest.approx(1.0, abs=0.06)
    assert factors.arrival_s < 1e-3
    for load in (20, 80, 95):
        seen = recorded(load)
        system = external_system(MODEL, GPU, ServerFacts(), [seen], FLAGS | {"async_scheduling": True}).system
        again = replay(seen, system, factors)
        several = seen.output_tokens > 1
        assert np.mean(again.tpot_s[several]) == pytest.approx(np.mean(seen.tpot_s[several]), rel=0.045)
        assert np.median(again.ttft_s) == pytest.approx(np.median(seen.ttft_s), rel=0.06)
        assert np.median(again.e2el_s) == pytest.approx(np.median(seen.e2el_s), rel=0.045)


# ---- records of our own engine -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory, commands) -> Path:
    """What the committed record of GPU A says, fitted anew."""
    path = tmp_path_factory.mktemp("trimmed") / "cal.json"
    loads = [RECORDS / f"serve_h200_bf16_{load}.json" for load in (50, 110)]
    assert cli.run(["calibrate-from", *map(str, loads), "--held-out", "0", "--save", str(path)], commands) == 0
    return path


def test_records_say_themselves_what_served_them(trimmed):
    found = load_external(trimmed)
    assert (found.model, found.gpu, found.kv_cache_dtype) == ("llama-3.1-8b", "h200_sxm", "bfloat16")
    assert found.settings["num_gpu_blocks"] == 14_249 and found.settings["pipeline_depth"] == 2
    assert set(found.origin.values()) == {"record"}
    kept = load_external(RECORDS / "trimmed" / "A_bf16_50_110.json")
    for name, factor in found.factors.items():
        assert (factor.value, factor.low, factor.high) == pytest.approx(
            (kept.factors[name].value, kept.factors[name].low, kept.factors[name].high), rel=1e-6, abs=1e-12
        )


def test_a_first_guess_that_is_low_by_chance_is_left(trimmed):
    """It has all times scaled alike; next to it the loss is twice as high, as requests jump between steps."""
    factors = load_external(trimmed).as_factors()
    assert max(factors.prefill, factors.weights, factors.kv) > 1.01 * min(factors.prefill, factors.weights, factors.kv)


def test_what_makes_up_for_each_other_widens_less(trimmed):
    """A dearer prompt step lets decode steps be cheaper: both together are known better than each."""
    found = load_external(trimmed)
    matrix = np.array(found.correlation)
    names = list(found.factors)
    assert matrix[names.index("prefill"), names.index("weights")] < -0.3
    apart = found.model_copy(update={"correlation": None})
    assert found.uncertainty(BASE).decode < apart.uncertainty(BASE).decode
    assert found.uncertainty(BASE).prefill < apart.uncertainty(BASE).prefill


def test_validation_takes_such_a_calibration(trimmed, memwall):
    found = memwall("validate", "--no-intervals", "--profile", trimmed, RECORDS / "serve_h200_bf16_95.json")
    assert found.code == 0
    assert "scaled to serve_h200_bf16_50.json" in found.out
    line = next(line for line in found.out.splitlines() if line.startswith("TPOT mean, ms"))
    measured, predicted = (float(number) for number in line.split()[3:5])
    assert predicted == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["serve_h200_bf16_50.json", "serve_h200_fp8_50.json"],
            "serve_h200_fp8_50.json was served with kv_cache_dtype",
        ),
        (["serve_h200_bf16_50.json", "device_b/serve_h200_1b_50.json"], "was served with model llama-3.2-1b"),
        (["serve_h200_bf16_50.json", "--max-num-seqs", "64"], "--max-num-seqs is of servers that are not ours"),
        (["serve_h200_bf16_50.json", "--system", "h100_sxm"], "--system is of servers that are not ours"),
        (["serve_h200_bf16_50.json", "--quantization", "fp8"], "--quantization is of servers that are not ours"),
        (["serve_h200_bf16_50.json", "--model", "llama-3.2-1b"], "--model is of servers that are not ours"),
        (["serve_h200_bf16_50.json", "serve_h200_bf16_50.json"], "serve_h200_bf16_50.json is given twice"),
        (["validation.json"], "validation.json"),
    ],
)
def test_records_that_cannot_be_fitted_together(arguments, said, memwall):
    arguments = [RECORDS / each if each.endswith(".json") else each for each in arguments]
    memwall("calibrate-from", *arguments).check_bad_input(said)


def test_the_model_of_a_record_may_be_said_again(memwall):
    about = ["--model", "meta-llama/Llama-3.1-8B", "--system", "h200_sxm", "--held-out", "0"]
    found = memwall("calibrate-from", RECORDS / "serve_h200_bf16_20.json", *about)
    assert found.code == 0, found.err


def test_a_factor_that_stands_for_something_else_is_pointed_out(tmp_path, memwall):
    """A server whose every token takes four times as long as the engine's: no weights are read so slowly."""
    record = json.loads((RECORDS / "serve_h200_bf16_20.json").read_text())
    for run in record["results"][0]["runs"]:
        columns = run["requests"]
        for name in ("first_token_s", "last_token_s"):
            times = zip(columns["arrival_s"], columns[name], strict=True)
            columns[name] = [arrival + 4 * (at - arrival) for arrival, at in times]
    path = tmp_path / "slow.json"
    path.write_text(json.dumps(record))
    found = memwall("calibrate-from", path, "--held-out", 0)
    assert found.code == 0
    assert "the factor weights is" in found.out and "stands for something else" in " ".join(found.out.split())


def test_where_nothing_can_be_saved_is_told_before_the_fit(tmp_path, memwall, monkeypatch):
    monkeypatch.setattr("planner.external.calibration.calibrate_external", None)
    save = tmp_path / "missing" / "cal.json"
    memwall("calibrate-from", RECORDS / "serve_h200_bf16_20.json", "--save", save).check_bad_input("there is no folder")


def test_a_table_beside_a_record_is_refused(tmp_path, memwall):
    table = tmp_path / "mine.csv"
    table.write_text("arrival_s,first_token_s,last_token_s,input_tokens,output_tokens\n0,1,2,3,4\n")
    found = memwall("calibrate-from", RECORDS / "serve_h200_bf16_50.json", table)
    found.check_bad_input("mine.csv is no record of `memwall bench serve`")


def test_validation_refuses_a_calibration_of_another_server(trimmed, memwall):
    of_1b = "device_b/serve_h200_1b_50.json"
    for record, said in (("serve_h200_fp8_50.json", "a KV cache in fp8"), (of_1b, "model llama-3.2-1b")):
        found = memwall("validate", "--profile", trimmed, RECORDS / record)
        assert found.code == 2 and not found.out
        assert f"was served with {said}, but cal.json was measured with" in found.err.splitlines()[-1]


@pytest.mark.parametrize(
    "correlation",
    [
        [[1.0]],
        [[1.0 if i == j else 0.5 + 0.2 * i for j in range(5)] for i in range(5)],
        [[1.0 if i == j else -0.9 for j in range(5)] for i in range(5)],
        [[2.0 * (i == j) for j in range(5)] for i in range(5)],
    ],
)
def test_a_correlation_that_is_none_is_refused(trimmed, correlation):
    document = json.loads(trimmed.read_text()) | {"correlation": correlation}
    with pytest.raises(UserError, match="correlation must be a symmetric matrix of 5 × 5 numbers"):
        parse_external(document, "cal.json")
