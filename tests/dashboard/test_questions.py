"""Questions built from inputs are those that the command line asks."""

from dataclasses import replace

import numpy as np
import pytest

from dashboard.services.presets import PRESETS
from dashboard.services.questions import Engine, Search, Speculating, Traffic, Trial, key_of
from planner.catalog import load_gpu, load_model
from planner.deployment import length_for
from planner.errors import UserError
from planner.memory import KVCacheDtype
from planner.search import DEFAULT_MAX_NUM_SEQS, DEFAULT_SLO
from planner.simulation import SLO
from planner.workload import Workload, default_workload

MODEL, GPU = load_model("llama-3.1-8b"), load_gpu("h200_sxm")
ENGINE = Engine(MODEL, GPU)


def same(one: Workload, other: Workload) -> bool:
    names = ("arrival_s", "input_tokens", "output_tokens")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


def test_the_first_preset_is_the_default_of_memwall_plan():
    asked, default = Traffic(duration_s=600.0).workload(), default_workload()
    assert same(asked, default)
    assert asked.name == default.name
    preset = PRESETS["chat"]
    assert SLO(preset.ttft_ms, preset.tpot_ms, preset.e2el_ms, preset.percentile) == DEFAULT_SLO


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_rate_and_the_lengths_that_they_say(name):
    preset, load = PRESETS[name], Traffic(name, duration_s=2000.0).workload()
    assert load.request_rate == pytest.approx(preset.request_rate, rel=0.1)
    assert load.input_tokens.mean() == pytest.approx(preset.input_tokens, rel=0.06)
    assert load.output_tokens.mean() == pytest.approx(preset.output_tokens, rel=0.06)


def test_overrides_change_what_they_name_and_nothing_else():
    base = Traffic(duration_s=300.0)
    longer = replace(base, input_tokens=4096).workload()
    assert longer.input_tokens.mean() == pytest.approx(4096, rel=0.05)
    assert np.array_equal(longer.arrival_s, base.workload().arrival_s)
    assert np.array_equal(longer.output_tokens, base.workload().output_tokens)
    assert replace(base, request_rate=3.0).workload().request_rate == pytest.approx(3.0, rel=0.1)


def test_a_trace_is_replayed_as_it_is_or_faster():
    trace = default_workload().head(100)
    assert Traffic(trace="x").workload(trace) is trace
    faster = Traffic(trace="x", request_rate=2 * trace.request_rate).workload(trace)
    assert faster.arrival_s == pytest.approx(trace.arrival_s / 2)
    with pytest.raises(UserError, match="drop the file again"):
        Traffic(trace="x").workload(None)


def test_a_load_that_is_too_large_for_a_page_is_refused():
    with pytest.raises(UserError, match="memwall plan"):
        Traffic(request_rate=5000.0, duration_s=600.0).workload()


def test_a_deployment_has_the_length_that_its_load_needs():
    load = Traffic(duration_s=60.0).workload()
    deployment = ENGINE.deployment(load)
    assert deployment.max_model_len == length_for(load, MODEL)
    assert deployment.kv_cache_dtype is KVCacheDtype.BFLOAT16
    assert not deployment.enable_prefix_caching
    assert replace(ENGINE, max_model_len=4096).deployment(load).max_model_len == 4096


def test_speculation_needs_rates_for_every_position():
    assert Speculating(0, ()).config() is None
    assert Speculating(2, (0.8, 0.5)).config().num_speculative_tokens == 2
    with pytest.raises(UserError, match="acceptance rates"):
        Speculating(3, (0.8, 0.5)).config()


def test_a_first_look_asks_for_less_of_the_same():
    search = Search(ENGINE, Traffic(duration_s=200.0), DEFAULT_SLO, (GPU,))
    load = search.traffic.workload()
    whole, quick = search.question(load), search.question(load, quick=True)
    assert whole.workload is load
    assert whole.max_num_seqs == DEFAULT_MAX_NUM_SEQS
    assert quick.workload.duration_s <= 60.0
    assert np.array_equal(quick.workload.arrival_s, load.arrival_s[: len(quick.workload)])
    assert quick.num_finalists == 0
    assert whole.engine == quick.engine
    assert whole.slo == quick.slo == DEFAULT_SLO


@pytest.mark.parametrize(("field", "what"), [("gpus", "GPU type"), ("kv_cache_dtypes", "KV cache format")])
def test_nothing_to_search_is_one_sentence(field, what):
    search = replace(Search(ENGINE, Traffic(), DEFAULT_SLO, (GPU,)), **{field: ()})
    with pytest.raises(UserError, match=what):
        search.question(Traffic(duration_s=30.0).workload())


def test_keys_tell_questions_apart_and_know_equal_ones():
    trial = Trial(ENGINE, Traffic(), DEFAULT_SLO)
    again = Trial(Engine(load_model("llama-3.1-8b"), load_gpu("h200_sxm")), Traffic(), SLO(1000.0, 50.0, None, 99.0))
    assert key_of("trial", trial) == key_of("trial", again)
    others = [
        replace(trial, engine=replace(ENGINE, replicas=2)),
        replace(trial, traffic=Traffic(request_rate=9.0)),
        replace(trial, slo=SLO(ttft_ms=999.0)),
        replace(trial, engine=replace(ENGINE, gpu=replace(GPU, memory_bytes=1 << 36))),
    ]
    assert len({key_of("trial", each) for each in (trial, *others)}) == 1 + len(others)
