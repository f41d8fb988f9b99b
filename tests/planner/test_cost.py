"""Dollars per million tokens: by hand, and as a plan has them."""

from dataclasses import replace

import pytest

from planner.catalog import load_gpu, load_model
from planner.cost import cost_of, usd_per_million
from planner.deployment import Deployment, PriceList
from planner.search import Question, plan
from planner.simulation import SLO, SimulationOptions, simulate
from planner.workload import LogNormal, SyntheticSpec, synthesize

GPU = load_gpu("h200_sxm")
LENGTHS = LogNormal.from_mean(200, 0.5, high=1000)
LOAD = synthesize(
    SyntheticSpec(name="load", request_rate=2.0, duration_s=30.0, input_tokens=LENGTHS, output_tokens=LENGTHS), 0
)
DEPLOYMENT = Deployment(model=load_model("llama-3.1-8b"), gpu=GPU, max_model_len=2048)


def test_by_hand():
    # 1,000 tokens/s are 3.6 million an hour, so that 3.60 dollars an hour buy a million for a dollar.
    assert usd_per_million(3.6, 1000.0) == pytest.approx(1.0)
    assert usd_per_million(None, 1000.0) is None
    assert usd_per_million(3.6, 0.0) is None


def test_a_deployment_costs_what_its_plan_says():
    prices = PriceList(overrides=((GPU.id, 2.5),))
    slo = SLO(1000.0, 50.0, None, 99.0)
    question = Question(engine=DEPLOYMENT, workload=LOAD, slo=slo, gpus=(GPU,), prices=prices, num_finalists=0)
    best = plan(question).plans[0]
    used = replace(DEPLOYMENT, max_num_seqs=best.deployment.max_num_seqs)
    found = cost_of(used, simulate(LOAD, used.system(LOAD), SimulationOptions()), prices)
    assert found.usd_per_hour == best.usd_per_hour == 2.5
    assert found.usd_per_million_tokens == pytest.approx(best.usd_per_million_tokens, rel=1e-6)
    assert found.usd_per_million_output_tokens == pytest.approx(best.usd_per_million_output_tokens, rel=1e-6)
    assert "given by the user" in found.source


def test_without_a_price_there_is_no_cost():
    free = replace(DEPLOYMENT, gpu=replace(GPU, price_low=None, price_typical=None, price_high=None))
    found = cost_of(free, simulate(LOAD, free.system(LOAD), SimulationOptions()), PriceList())
    assert (found.usd_per_hour, found.usd_per_million_tokens, found.source) == (None, None, "")
