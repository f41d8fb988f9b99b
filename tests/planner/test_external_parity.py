"""A served load beside the simulator: exact where the server is the simulator, and off by what it is off by."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from planner.catalog import load_gpu, load_model
from planner.deployment import Deployment
from planner.errors import UserError
from planner.external.memwall_record import is_memwall_record, read_memwall_record
from planner.external.parity import METRICS, loads_of, parity
from planner.external.served_run import served_run
from planner.external.server_facts import ServerFacts
from planner.external.settings import external_system
from planner.simulation import run
from planner.workload import LogNormal, SyntheticSpec, synthesize

RECORD = Path(__file__).parents[2] / "calibration" / "records" / "serve_h200_fp8_20.json"
LENGTHS = LogNormal.from_mean(300, 0.7, high=1500)
LOAD = synthesize(
    SyntheticSpec(name="load", request_rate=6.0, duration_s=15.0, input_tokens=LENGTHS, output_tokens=LENGTHS), 1
)
DEPLOYMENT = Deployment(model=load_model("llama-3.1-8b"), gpu=load_gpu("h200_sxm"), max_model_len=4096)


def system():
    return DEPLOYMENT.system(LOAD)


def served(factor: float = 1.0):
    log = run(LOAD, system()).requests
    first = LOAD.arrival_s + factor * log.ttft_s
    last = LOAD.arrival_s + factor * log.e2el_s
    return served_run("mine", LOAD.arrival_s, LOAD.input_tokens, LOAD.output_tokens, first, last)


def test_the_simulator_predicts_itself():
    found = parity([served()], system())
    assert tuple(found.metrics) == METRICS
    assert all(metric.error == pytest.approx(0.0, abs=1e-9) for metric in found.metrics.values())
    assert found.request_error("tpot") == pytest.approx(0.0, abs=1e-9)
    assert found.metrics["ttft_ms.p50"].spread is None
    assert found.metrics["ttft_ms.p50"].interval is None


def test_a_server_that_is_slower_by_a_quarter_is_underestimated_by_a_fifth():
    found = parity([served(1.25), served(1.5)], system(), num_draws=4)
    metric = found.metrics["ttft_ms.mean"]
    assert metric.measured[1] == pytest.approx(1.2 * metric.measured[0])
    assert metric.error == pytest.approx(1 / 1.375 - 1)
    assert metric.spread == pytest.approx(0.25 / 1.375)
    assert found.request_error("ttft") == pytest.approx(0.2)
    low, high = metric.interval.low, metric.interval.high
    assert low < metric.predicted < high, "the profile's own error"


def test_runs_of_one_load_belong_together():
    one, slower = served(), served(1.3)
    fewer = served_run(
        "fewer",
        one.arrival_s[:-1],
        one.input_tokens[:-1],
        one.output_tokens[:-1],
        one.first_token_s[:-1],
        one.last_token_s[:-1],
    )
    assert [len(load) for load in loads_of([one, fewer, slower])] == [2, 1]


def test_a_request_longer_than_the_limit_is_refused():
    small = system()
    with pytest.raises(UserError, match="max_model_len is 64"):
        parity([served()], replace(small, scheduler=replace(small.scheduler, max_model_len=64)))


def test_a_record_of_ours_says_what_served_it():
    text = RECORD.read_text()
    assert is_memwall_record(text)
    record = read_memwall_record(text, RECORD.name)
    assert record.model == "llama-3.1-8b"
    assert record.gpu().id == "h200_sxm"
    document = json.loads(text)
    first = document["results"][0]["runs"][0]
    assert len(record.runs) == len(document["results"][0]["runs"])
    assert 1e3 * np.median(record.runs[0].ttft_s) == pytest.approx(first["ttft_ms"]["p50"], rel=1e-3)
    assert record.flags["num_gpu_blocks"] == document["engines"][0]["memory"]["num_blocks"] + 1
    found = external_system(DEPLOYMENT.model, record.gpu(), ServerFacts(), record.runs, dict(record.flags))
    assert found.system.pipeline_depth == 2
    assert found.system.cache.block_size == document["engines"][0]["memory"]["block_size"]


def broken(**changes):
    document = json.loads(RECORD.read_text())
    for path, value in changes.items():
        place = document
        *parents, last = path.split("__")
        for name in parents:
            place = place[int(name)] if name.isdigit() else place[name]
        place[last] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (broken(suite="decode"), "bench serve"),
        (broken(server={"base_url": "x"}), "over HTTP"),
        (broken(results=[]), "no complete record"),
        (broken(results__0__runs=[]), "no finished run"),
        (broken(results__0__runs__0__requests__arrival_s=[1.0]), "differ in length"),
        (RECORD.read_text()[:-40], "JSON"),
    ],
    ids=["suite", "http", "results", "runs", "columns", "cut"],
)
def test_what_is_no_record_is_one_sentence(text, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        read_memwall_record(text, "mine.json")
    assert "mine.json" in str(caught.value)


def test_a_packed_record_is_read_too(tmp_path):
    from planner.workload.tables import read_text

    path = tmp_path / "record.json.gz"
    path.write_bytes(gzip.compress(RECORD.read_bytes()))
    assert read_memwall_record(read_text(path), path.name).runs
