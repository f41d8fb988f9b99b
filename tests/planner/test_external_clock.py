"""An engine seen from outside, with a measured profile for its base: the GPU's clock, steps in flight, real runs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.scheduling import StepShape
from planner.catalog import load_gpu, load_model
from planner.deployment import Deployment
from planner.external.calibration import calibrate_external
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
    """What a client of the engine saw, on an H200 that is not the one of the profile."""
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
        assert np.mean(again.tpot_s[several]) == pytest.approx(np.mean(seen.tpot_s[several]), rel=0.03)
        assert np.median(again.ttft_s) == pytest.approx(np.median(seen.ttft_s), rel=0.06)
        assert np.median(again.e2el_s) == pytest.approx(np.median(seen.e2el_s), rel=0.03)
