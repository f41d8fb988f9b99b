"""`memwall validate` against engines whose step times are known, because they are made up."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from log_step_time import LogStepTime
from virtual_engine import Affine, Heated, Scaled, Settings, load, served, write_record

from calibration.validate.command import run
from calibration.validate.external import external_record
from calibration.validate.html import report
from calibration.validate.profiles import Predictor, ProfileFacts, _chosen, check_same, transferred_for
from calibration.validate.records import READERS, Lives, ServedRecord, ServedRun, read
from calibration.validate.replay import simulate_run, system_of
from calibration.validate.study import document, study
from calibration.validate.text import text
from calibration.validate.walk import walk
from engine.config import EngineConfig
from engine.errors import UserError
from engine.scheduling import StepShape
from planner.step_time import Uncertainty

ROOT = Path(__file__).resolve().parent.parent.parent
REAL = [ROOT / "records" / f"engine_h200_serve_{name}.json" for name in ("half", "high")]
US = 1e-6


def study_of(path, step_time, **options):
    options = {"num_draws": 0} | options
    return study([read(path)], lambda record: Predictor(step_time, "known"), **options)


# ---- the same step times on both sides -----------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("host_s", [0.0, 0.0007, 0.006])
@pytest.mark.parametrize(
    ("blocks", "windows"),
    [
        (2000, (None, None)),
        (45, (None, None)),
        (150, (None, 64)),
    ],
)
@pytest.mark.parametrize("model", [Affine, Heated])
def test_equal_step_times_have_no_error(tmp_path, depth, host_s, blocks, windows, model):
    settings = Settings(num_blocks=blocks, max_model_len=600, depth=depth, windows=windows)
    step_time = model(host_s=host_s)
    found = study_of(write_record(tmp_path / "a.json", settings, load(rate=40.0), step_time), step_time)
    (level,) = found.levels
    lives = level.record.runs[0].lives
    for name in ("scheduled_s", "first_token_s", "last_token_s"):
        simulated = getattr(level.simulated[0].lives, name)
        assert np.abs(simulated - getattr(lives, name)).max() < 1.1 * US, name
    for one in level.comparisons:
        assert one.error is None or abs(one.error) < 2e-4, one
        assert one.is_met in (None, True)
    preemptions = level.comparison("num_preemptions")
    assert preemptions.measured == preemptions.predicted
    assert (preemptions.measured[0] > 0) == (blocks == 45)
    for errors in level.requests.values():
        assert all(one.mape < 1e-3 and one.pearson > 0.999999 for one in errors)
    if depth == 2 or not host_s:
        assert all(one.p90 < 2e-3 for one in level.steps)
    for decomposition in level.decompositions:
        alike = decomposition.agreement
        assert (alike.first_difference, alike.same_place, alike.somewhere) == (None, 1.0, 1.0)
        for part in decomposition.parts:
            assert part.host + part.step_times + part.schedule == pytest.approx(part.total, abs=1e-9)
            assert max(abs(share) for share in (part.host, part.step_times, part.schedule)) < 2e-3, part


def test_a_prefix_cache_gives_preempted_requests_their_prompts_back(tmp_path):
    """The engine finds pages of output too, which the simulator does not know, so they soon differ in their steps."""
    config = replace(Settings().config, enable_prefix_caching=True)
    settings, step_time = Settings(num_blocks=45, max_model_len=600, config=config), Affine()
    (level,) = study_of(write_record(tmp_path / "a.json", settings, load(rate=40.0), step_time), step_time).levels
    assert level.comparison("num_preemptions").measured[0] > 0
    assert abs(level.comparison("e2el_ms.mean").error) < 0.03
    assert abs(level.comparison("output_throughput_tokens_per_s").error) < 0.03


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("host_s", [0.0, 0.0007, 0.006])
def test_a_walk_reaches_every_step_when_the_engine_did(depth, host_s):
    """The virtual engine's own times, given to the walk: what is idle stays idle, what is pipelined stays so."""
    step_time = Affine(host_s=host_s)
    for rate in (2.0, 20.0, 200.0):
        _, steps, _ = served(Settings(depth=depth), load(rate=rate), step_time)
        device = np.array([step.gpu_s for step in steps])
        host = np.full(len(steps), host_s)
        found = walk(steps, device, host, host, depth)
        assert np.abs(found.end_s - [step.end_s for step in steps]).max() < 1e-9
        assert np.abs(found.start_s - [step.start_s for step in steps]).max() < 1e-9


# ---- step times that are off by a known factor ---------------------------------------------------------------------


def test_steps_three_percent_slow(tmp_path):
    """Requests one at a time: nothing queues and no batch changes, so every latency is 3 % too long."""
    settings, step_time = Settings(), Affine()
    path = write_record(tmp_path / "a.json", settings, load(40, spacing_s=1.0), step_time)
    (level,) = study_of(path, Scaled(step_time, 1.03, 1.03)).levels
    for latency in ("ttft_ms", "tpot_ms", "e2el_ms"):
        for statistic in ("mean", "p50", "p90", "p99"):
            assert level.comparison(f"{latency}.{statistic}").error == pytest.approx(0.03, abs=3e-4)
    assert level.requests["e2el_ms"][0].bias == pytest.approx(0.03, abs=3e-4)
    assert level.requests["e2el_ms"][0].mape == pytest.approx(0.03, abs=3e-4)
    for one in level.steps:
        assert (one.median, one.bias) == (pytest.approx(0.03, abs=3e-4), pytest.approx(0.03, abs=3e-4))
        assert one.predicted_s / one.measured_s == pytest.approx(1.03, abs=3e-4)
    for part in level.decompositions[0].parts:
        assert part.step_times == pytest.approx(0.03, abs=5e-4)
        assert (part.host, part.schedule) == (pytest.approx(0, abs=5e-4), pytest.approx(0, abs=5e-4))
    assert level.comparison("tpot_ms.mean").is_met is False
    assert level.comparison("ttft_ms.p50").is_met is True


def test_a_clock_that_is_not_known_shows_as_an_error_of_step_times(tmp_path):
    """The device slows down, the prediction does not know: the parts say that it is neither host nor schedule."""
    settings, truth = Settings(), Heated()
    path = write_record(tmp_path / "a.json", settings, load(60, spacing_s=0.3, longest=500), truth)
    (level,) = study_of(path, Affine()).levels
    by_metric = {part.metric: part for part in level.decompositions[0].parts}
    ttft = by_metric["ttft_ms.mean"]
    assert ttft.step_times > 0.05
    assert (ttft.host, ttft.schedule) == (pytest.approx(0, abs=5e-4), pytest.approx(0, abs=5e-4))
    prompts = next(one for one in level.steps if one.kind == "all with prompts")
    assert prompts.bias > 0.05
    (known,) = study_of(path, truth).levels
    assert next(one for one in known.steps if one.kind == "all with prompts").p90 < 2e-3


def test_only_prompts_slow(tmp_path):
    """One at a time, TPOT does not see it."""
    settings, step_time = Settings(), Affine()
    path = write_record(tmp_path / "a.json", settings, load(40, spacing_s=1.0), step_time)
    (level,) = study_of(path, Scaled(step_time, prefill=1.1)).levels
    assert level.comparison("ttft_ms.p50").error == pytest.approx(0.1, abs=1e-3)
    assert level.comparison("tpot_ms.mean").error == pytest.approx(0.0, abs=1e-4)
    by_kind = {one.kind: one.bias for one in level.steps}
    assert by_kind["all with prompts"] == pytest.approx(0.1, abs=1e-3)
    assert by_kind["decode, in a graph"] == pytest.approx(0.0, abs=1e-3)


def test_host_time_that_the_simulator_does_not_know(tmp_path):
    """Every step waits 1 ms for its launch, one at a time; without it the host's part of the error is all of it."""
    settings = Settings(depth=1)
    settings = replace(settings, config=replace(settings.config, async_scheduling=False))
    path = write_record(
        tmp_path / "a.json", settings, load(40, spacing_s=1.0), Affine(host_s=0.001), environment={"gpu": "Toy GPU"}
    )
    (level,) = study_of(path, Affine()).levels
    assert level.record.engine.pipeline_depth == 1
    for part in level.decompositions[0].parts:
        assert part.total < -0.05
        assert part.host == pytest.approx(part.total, abs=5e-4)
        assert (part.step_times, part.schedule) == (pytest.approx(0, abs=5e-4), pytest.approx(0, abs=5e-4))


def test_runs_differ_and_the_spread_says_so(tmp_path):
    settings, step_time = Settings(), Affine()
    noise = [lambda: 1.0, lambda: 1.04]
    path = write_record(tmp_path / "a.json", settings, load(40, spacing_s=1.0), step_time, noise=noise)
    found = study_of(path, step_time)
    one = found.levels[0].comparison("tpot_ms.mean")
    assert one.spread == pytest.approx(0.04 / 1.02, abs=1e-3)
    assert one.errors == (pytest.approx(0, abs=1e-4), pytest.approx(1 / 1.04 - 1, abs=1e-3))
    assert one.error == pytest.approx(1 / 1.02 - 1, abs=1e-3)
    assert found.levels[0].repeats["tpot_ms"][0].bias == pytest.approx(1 / 1.04 - 1, abs=1e-3)
    # p99 may be off by the engine's own spread, the mean may not.
    slower = study_of(path, Scaled(step_time, 1.045, 1.045)).levels[0]
    assert slower.comparison("tpot_ms.mean").is_met is False
    assert slower.comparison("tpot_ms.p99").is_met is True


def test_intervals_hold_an_engine_that_is_as_uncertain_as_they_say(tmp_path):
    """Twenty engines, each off by factors drawn as the step times say they may be."""
    rng = np.random.default_rng(3)
    known = Affine(uncertainty=Uncertainty(0.02, 0.03))
    inside = of = 0
    for world in range(20):
        true = Scaled(known, *np.exp(rng.normal(0, (0.02, 0.03))))
        path = write_record(tmp_path / f"{world}.json", Settings(), load(30, 10.0, world), true, runs=1, steps=False)
        every = study_of(path, known, num_draws=16).coverages["all"]
        inside, of = inside + every.inside, of + every.of
    assert of == 20 * 14
    # Metrics of one world move together: 20 worlds are few.
    assert 0.75 <= inside / of <= 1.0


# ---- records that cannot be used -----------------------------------------------------------------------------------


@pytest.fixture
def record(tmp_path):
    return write_record(tmp_path / "a.json", Settings(), load(10), Affine(), runs=1)


def edited(path, change):
    contents = json.loads(path.read_text())
    change(contents)
    path.write_text(json.dumps(contents))
    return path


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d.update(suite="decode"), "is of `memwall bench decode`; validate takes records of serve"),
        (lambda d: d.update(server={"model": "x"}), "was measured over HTTP"),
        (lambda d: d.update(version=2), "has version 2"),
        (lambda d: d.update(results=[]), "no complete record"),
        (lambda d: d["engines"][0]["memory"].pop("num_blocks"), "no complete record.*num_blocks"),
        (lambda d: d["results"][0]["runs"].clear(), "no finished run"),
        (lambda d: d["results"][0]["runs"][0]["requests"]["arrival_s"].pop(), "differ in length"),
        (lambda d: d["results"][0]["runs"][0]["requests"].update(first_token_s=[None] * 10), "no time"),
        (lambda d: d["results"][0]["runs"][0]["requests"].update(cached_tokens=[64] * 10), "found in the prefix cache"),
    ],
)
def test_bad_records(record, change, sentence):
    with pytest.raises(UserError, match=sentence):
        read(edited(record, change))


def test_no_record(tmp_path):
    with pytest.raises(UserError, match=r"cannot read record .*nothing\.json"):
        read(tmp_path / "nothing.json")


def test_a_step_log_that_is_none(record):
    record.with_name("a.steps.jsonl").write_text("nothing\n")
    with pytest.raises(UserError) as refused:
        read(record)
    assert "a.steps.jsonl" in str(refused.value) and "UserError" not in str(refused.value)


def test_records_of_one_name_are_told_apart_by_their_folders(tmp_path, record, capsys):
    (tmp_path / "other").mkdir()
    other = write_record(tmp_path / "other" / "a.json", Settings(), load(10, seed=1), Affine(), runs=1)
    found = tmp_path / "found.json"
    arguments = [str(record), str(other), "--no-intervals", "--json", str(found)]
    assert run(arguments, lambda one: Predictor(Affine(), "known")) == 0
    levels = [level["record"] for level in json.loads(found.read_text())["levels"]]
    assert levels == [f"{tmp_path.name}/a", "other/a"]
    with pytest.raises(UserError, match="--profile none leaves nothing to validate"):
        run([str(record), "--profile", "none"])


def test_the_step_log_of_another_run(tmp_path, record):
    other = write_record(tmp_path / "b.json", Settings(), load(10, seed=1), Affine(), runs=1)
    other.with_name("b.steps.jsonl").rename(record.with_name("a.steps.jsonl"))
    with pytest.raises(UserError, match=r"step log beside a\.json is not that of its run 1"):
        read(record)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("memwall bench serve toy --step-log 'my log.jsonl' --output a.json", "my log.jsonl"),
        ("memwall bench serve toy --step-log=log.jsonl", "log.jsonl"),
        ("memwall bench serve toy --repeat 2 --step-log log.jsonl", "log.1.jsonl"),  # interrupted in its second run
        ("memwall bench serve toy", "a.steps.jsonl"),
        ("memwall bench serve toy", "a.steps.1.jsonl"),
    ],
)
def test_step_logs_are_found_by_their_names(record, command, name):
    edited(record, lambda d: d.update(command=command))
    record.with_name("a.steps.jsonl").rename(record.with_name(name))
    assert len(read(record).runs[0].steps) > 10


def test_a_record_without_steps(record):
    record.with_name("a.steps.jsonl").unlink()
    found = study_of(record, Affine())
    (level,) = found.levels
    assert (level.steps, level.decompositions) == ((), ())
    assert level.comparison("running_mean").error == pytest.approx(0, abs=1e-3)
    assert level.comparison("kv_usage_peak").error == pytest.approx(0, abs=1e-3)
    assert json.dumps(document(found), allow_nan=False)


def test_lengths_that_the_simulation_cannot_serve(record):
    """max_model_len cuts outputs short in the simulation; the engine of the record gave them in full."""
    edited(record, lambda d: d["engines"][0]["memory"].update(max_model_len=450))
    requests = json.loads(record.read_text())["results"][0]["runs"][0]["requests"]
    total = [sum(pair) for pair in zip(requests["input_tokens"], requests["output_tokens"], strict=True)]
    edited(record, lambda d: d["engines"][0]["memory"].update(max_model_len=max(total) - 1))
    with pytest.raises(UserError, match=r"request \d+ got \d+ tokens from the engine and \d+ in the simulation"):
        study_of(record, Affine())


def test_blocks_that_hold_no_request(record):
    edited(record, lambda d: d["engines"][0]["memory"].update(num_blocks=3))
    with pytest.raises(UserError, match="max_model_len"):
        study_of(record, Affine())


def test_skipped_requests_are_noted(record):
    edited(record, lambda d: d["results"][0].update(num_skipped=3))
    assert any("left out 3 requests" in note for note in study_of(record, Affine()).notes)


FACTS = ProfileFacts(
    "p.json",
    "toy",
    "Toy GPU",
    None,
    {"bfloat16": 2000, "fp8": 4000},
    {
        "block_size": 32,
        "enforce_eager": False,
        "async_scheduling": True,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 16,
        "gpu_memory_utilization": 0.92,
    },
)


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        (replace(FACTS, model="other"), "model toy, but p.json was measured with other"),
        (replace(FACTS, gpu="NVIDIA B200"), "GPU Toy GPU, but p.json was measured with NVIDIA B200"),
        (replace(FACTS, quantization="fp8"), "quantization none, but p.json was measured with fp8"),
        (replace(FACTS, num_kv_blocks={"fp8": 1}), "KV cache in bfloat16, but p.json was measured with fp8"),
        (replace(FACTS, num_kv_blocks={"bfloat16": 3000}), "number of KV blocks of 2000, but .* 3000"),
        *(
            (replace(FACTS, engine=FACTS.engine | {name: value}), f"{name} .*, but p.json was measured with {value}")
            for name, value in (
                ("block_size", 64),
                ("enforce_eager", True),
                ("async_scheduling", False),
                ("max_num_batched_tokens", 256),
                ("max_num_seqs", 8),
            )
        ),
    ],
)
def test_profiles_of_something_else_are_refused(record, facts, sentence):
    assert check_same(read(record), FACTS) == ()
    with pytest.raises(UserError, match=sentence):
        check_same(read(record), facts)


def test_shipped_profiles_are_chosen_by_what_they_fit(record):
    one = read(record)
    profiles = [("other", replace(FACTS, model="other")), ("small", replace(FACTS, name="s.json", gpu="L4"))]
    assert _chosen(one, [*profiles, ("right", FACTS)]) == "right"
    with pytest.raises(UserError, match=r"no profile is shipped for toy on Toy GPU with bfloat16 KV \(.*GPU.*L4\)"):
        _chosen(one, profiles)
    with pytest.raises(UserError, match=r"no profile is shipped for .* KV; give one with --profile"):
        _chosen(one, [])


def llama_profile(settings, step_time):
    """A profile whose points are what a step-time model says of them."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 2}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 1024,
        "vocab_size": 1000,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        **heads,
    }

    def point(prefills, decodes):
        contexts = [context for context, count in decodes for _ in range(count)]
        seconds = step_time.predict(StepShape(prefills, contexts))
        times = dict.fromkeys(("step_s", "low_s", "high_s", "gpu_s", "alone_s"), seconds)
        graph = len(contexts) if not prefills else None
        return {"prefills": prefills, "decodes": decodes, **times, "samples": 9, "host_s": 1e-6, "graph_size": graph}

    engine = settings.config
    sizes = (16, 32, 64, 128, 256, 512)
    tables = {
        "num_kv_blocks": settings.num_blocks,
        "kv_cache_bytes": 1 << 30,
        "decode": [point([], [(context, batch)]) for batch in (1, 2, 4, 8, 16) for context in (16, 256, 512, 2000)],
        "prefill": [point([(query, context)], []) for query in (1, *sizes) for context in (0, 512)],
        "mixed": [point([(query, 0)], [(300, batch)]) for query in (10, 100, 400) for batch in (3, 12)],
    }
    names = ("max_num_batched_tokens", "max_num_seqs", "block_size", "gpu_memory_utilization", "enforce_eager")
    return {
        "version": 1,
        "kind": "memwall-profile",
        "gpu": None,
        "gpu_name": "Toy GPU",
        "gpu_memory_bytes": 1 << 36,
        "limits": {"copy_bytes_per_s": 4e12, "matmul_flops_per_s": 7e14, "matmul_fp8_flops_per_s": None},
        "model": {"name": "toy", "config": config, "num_parameters": 10**7, "dtype": "bfloat16"},
        "quantization": None,
        "engine": {
            **{name: getattr(engine, name) for name in names},
            "max_model_len": settings.max_model_len,
            "enable_chunked_prefill": True,
            "async_scheduling": True,
            "graph_sizes": [1, 2, 4, 8, 16],
            "piece_sizes": [],
        },
        "kv": {"bfloat16": tables},
        "allreduce": [],
    }


def test_a_profile_file(tmp_path, capsys):
    """From the file of a profile to the table: what it was measured on is known exactly."""
    pytest.importorskip("planner.profile.schema")
    settings, step_time = Settings(), Affine()
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps(llama_profile(settings, step_time)))
    record = write_record(tmp_path / "a.json", settings, load(40, spacing_s=1.0), step_time)
    out = tmp_path / "out.json"
    assert run([str(record), "--profile", str(profile), "--json", str(out), "--runs", "4"]) == 0
    assert "profile of toy on Toy GPU" in capsys.readouterr().out
    (level,) = json.loads(out.read_text())["levels"]
    for metric in ("ttft_ms.p50", "tpot_ms.mean", "e2el_ms.p90"):
        assert abs(level["metrics"][metric]["error"]) < 0.05, metric
        assert level["metrics"][metric]["interval"] is not None
    small = write_record(tmp_path / "b.json", replace(settings, num_blocks=1500), load(10), step_time)
    with pytest.raises(UserError, match=r"number of KV blocks of 1500, but .* was measured with 2000"):
        run([str(small), "--profile", str(profile)])
    with pytest.raises(UserError, match="no profile is shipped for toy"):
        run([str(record)])


def on_h200(path, model, **changes):
    settings = Settings()
    settings = replace(settings, config=replace(settings.config, model=model, **changes))
    written = write_record(path, settings, load(10, spacing_s=0.5), Affine(), steps=False)
    document = json.loads(written.read_text())
    document["environment"] = {"gpu": "NVIDIA H200"}
    written.write_text(json.dumps(document))
    return written


def test_what_a_transfer_costs(tmp_path, capsys):
    """Step times are those that planning takes for a model that has no profile."""
    shipped = resources.files("planner") / "data" / "profiles" / "llama-3.1-8b_h200.json"
    record = on_h200(tmp_path / "a.json", "llama-3.2-1b", block_size=64)
    found = transferred_for(read(record), Path(str(shipped)))
    assert "from the profile of llama-3.1-8b" in found.origin
    assert "to llama-3.2-1b" in found.origin
    step = StepShape(decode_contexts=[500] * 4)
    assert 0.8e-3 < found.step_time.predict(step) < 1.3e-3  # 2.5 GB of weights at 4.1 TB/s take 0.6 ms
    arguments = [str(record), "--transfer", "--profile", str(shipped), "--no-intervals"]
    assert run(arguments) == 0
    assert "transferred from another model" in capsys.readouterr().out
    with pytest.raises(UserError, match="--transfer needs --profile"):
        run([str(record), "--transfer"])
    with pytest.raises(UserError, match="served on Toy GPU, of which no step times can be told"):
        transferred_for(
            read(write_record(tmp_path / "b.json", Settings(), load(5), Affine(), steps=False)), Path(str(shipped))
        )
    with pytest.raises(UserError, match="CUDA graphs"):
        transferred_for(read(on_h200(tmp_path / "c.json", "llama-3.2-1b", enforce_eager=True)), Path(str(shipped)))
    with pytest.raises(UserError, match=r"block_size 32, but .* was measured with 64"):
        transferred_for(read(on_h200(tmp_path / "d.json", "llama-3.2-1b")), Path(str(shipped)))
    with pytest.raises(UserError, match=r"was measured on llama-3\.1-8b on NVIDIA H200 .* itself"):
        transferred_for(read(on_h200(tmp_path / "e.json", "llama-3.1-8b", block_size=64)), Path(str(shipped)))


def test_what_differs_without_harm_is_noted(record):
    notes = check_same(read(record), replace(FACTS, num_kv_blocks={"bfloat16": 2010}))
    assert len(notes) == 1 and "2,000 KV blocks" in notes[0]
    larger = replace(FACTS, engine=FACTS.engine | {"max_num_seqs": 256})
    assert any("max_num_seqs 16" in note for note in check_same(read(record), larger))
    # Another utilisation leaves another number of blocks; the record's counts.
    other = replace(FACTS, engine=FACTS.engine | {"gpu_memory_utilization": 0.5}, num_kv_blocks={"bfloat16": 900})
    assert any("900" in note for note in check_same(read(record), other))


def test_another_source(tmp_path, record, monkeypatch):
    """A reader of other files gives the same dataclass; a client does not know when requests were scheduled."""
    ours = read(record)

    class Reader:
        def can_read(self, path):
            return path.suffix == ".theirs"

        def read(self, path):
            lives = ours.runs[0].lives
            known = Lives(
                lives.arrival_s,
                None,
                lives.first_token_s,
                lives.last_token_s,
                lives.input_tokens,
                lives.output_tokens,
                lives.preemptions,
            )
            return ServedRecord("theirs", "another engine", ours.engine, "w", 2.0, (ServedRun(known),))

    monkeypatch.setattr("calibration.validate.records.READERS", [*READERS, Reader()])
    found = study_of(tmp_path / "x.theirs", Affine())
    assert found.levels[0].record.source == "another engine"
    assert all(one.error is None or abs(one.error) < 1e-3 for one in found.levels[0].comparisons)


def test_an_external_engine(record):
    """Seen from outside: neither steps, nor when a request was scheduled, nor preemptions."""
    one = read(record)
    lives, engine = one.runs[0].lives, one.engine
    seen = SimpleNamespace(
        name="w.json",
        num_failed=1,
        scheduled_s=None,
        **{
            name: getattr(lives, name)
            for name in ("arrival_s", "first_token_s", "last_token_s", "input_tokens", "output_tokens")
        },
    )
    seen = type("Run", (SimpleNamespace,), {"__len__": lambda self: len(self.arrival_s)})(**vars(seen))
    deployment = SimpleNamespace(
        kv_cache_dtype="bfloat16", enforce_eager=False, gpu_memory_utilization=0.9, tensor_parallel_size=1
    )
    found = SimpleNamespace(system=system_of(engine, Affine()), deployment=deployment)
    external = external_record("w", "vllm bench serve", [seen, seen], found, "toy", "Toy GPU")
    assert external.engine.pipeline_depth == engine.pipeline_depth == 2
    assert external.engine.num_kv_blocks == engine.num_kv_blocks
    (level,) = study([external], lambda record: Predictor(Affine(), "known"), num_draws=0).levels
    assert all(one.error is None or abs(one.error) < 1e-3 for one in level.comparisons)
    assert "left out 1 request of" in " ".join(study([external], lambda record: Predictor(Affine(), "")).notes)


def test_simulation_with_and_without_steps_is_the_same(record):
    one = read(record)
    pair = [
        simulate_run("w", one.runs[0].lives, one.engine, Affine(host_s=0.0003), steps=steps).lives
        for steps in (True, False)
    ]
    for name in ("scheduled_s", "first_token_s", "last_token_s"):
        assert np.array_equal(*(getattr(lives, name) for lives in pair))


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, record, capsys):
    outputs = ["--json", str(tmp_path / "out.json"), "--html", str(tmp_path / "out.html")]
    code = run([str(record), *outputs, "--runs", "3"], lambda one: Predictor(Affine(), "known"))
    assert code == 0
    printed = capsys.readouterr().out
    for words in ("TTFT p50, ms", "figures to reach", "where the error comes from", "coverage of 90% intervals"):
        assert words in printed
    assert "MISSED" not in printed
    contents = json.loads((tmp_path / "out.json").read_text())
    assert (contents["kind"], contents["is_met"]) == ("memwall-validation", True)
    assert str(tmp_path) not in (tmp_path / "out.json").read_text()
    assert contents["levels"][0]["metrics"]["tpot_ms.p50"]["error"] == pytest.approx(0, abs=2e-4)


def test_strict(record, capsys):
    slow = lambda one: Predictor(Scaled(Affine(), 1.2, 1.2), "slow")  # noqa: E731
    assert run([str(record), "--no-intervals"], slow) == 0
    assert run([str(record), "--no-intervals", "--strict"], slow) == 1
    assert "MISSED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "memwall validate needs RECORD"),
        (["RECORD", "RECORD"], "is given 2 times"),
        (["RECORD", "--json", "RECORD"], "would overwrite"),
        (["RECORD", "--json", "x.out", "--html", "x.out"], "are the same file"),
        (["RECORD", "--runs", "0"], "--runs is 0"),
        (["RECORD", "--profiles", "x"], "did you mean --profile"),
    ],
)
def test_bad_arguments(record, arguments, sentence, monkeypatch):
    monkeypatch.chdir(record.parent)
    with pytest.raises(UserError, match=sentence):
        run([str(record) if word == "RECORD" else word for word in arguments], lambda one: Predictor(Affine(), ""))


@pytest.mark.parametrize("given", ["a.steps.jsonl", "./a.steps.jsonl", "link.jsonl"])
@pytest.mark.parametrize("flag", ["--json", "--html"])
def test_a_step_log_is_not_overwritten(record, monkeypatch, flag, given):
    monkeypatch.chdir(record.parent)
    log = record.with_name("a.steps.jsonl")
    record.with_name("link.jsonl").symlink_to(log)
    before = log.read_bytes()
    with pytest.raises(
        UserError, match=f"{flag} .*jsonl would overwrite the step log .*a.steps.jsonl; give it another"
    ):
        run([str(record), flag, given], lambda one: Predictor(Affine(), ""))
    assert log.read_bytes() == before


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]


@pytest.mark.skipif(not all(path.is_file() for path in REAL), reason="no records here")
def test_records_of_a_gpu_on_a_laptop(tmp_path):
    """In a process where torch and the like cannot be imported."""
    code = f"""
import sys
for name in ("torch", "triton", "transformers", "safetensors"):
    sys.modules[name] = None
sys.path.insert(0, {str(Path(__file__).parent)!r})
from calibration.commands.validate import validate
from calibration.validate.command import run
from calibration.validate.external import external_record
from calibration.validate.html import report
from calibration.validate.profiles import Predictor
from calibration.validate.records import read
from pathlib import Path
from log_step_time import LogStepTime
records = {[str(path) for path in REAL]!r}
steps = [step for path in records for step in read(Path(path)).runs[0].steps]
predictor = Predictor(LogStepTime(steps), "fitted to its own log")
out = {str(tmp_path)!r}
sys.exit(run([*records, "--json", out + "/v.json", "--html", out + "/v.html"], lambda record: predictor))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    contents = json.loads((tmp_path / "v.json").read_text())
    half, high = contents["levels"]
    assert half["request_rate_per_s"] < high["request_rate_per_s"]
    for level in (half, high):
        assert abs(level["metrics"]["tpot_ms.mean"]["error"]) < 0.03
        assert abs(level["metrics"]["e2el_ms.p50"]["error"]) < 0.03
        assert abs(level["metrics"]["output_throughput_tokens_per_s"]["error"]) < 0.01
    page = (tmp_path / "v.html").read_text()
    assert len(page.encode()) < 1 << 20
    tags = Tags()
    tags.feed(page)
    assert tags.tags.count("svg") == 6 + 2  # two drawings for each latency, and the legend
    assert not tags.links and "script" not in tags.tags


def test_dots_lie_where_they_should(tmp_path):
    """Predicted exactly: on the line. 5 % slow: on the band's edge. Both axes have the same scale."""
    settings, step_time = Settings(), Affine()
    path = write_record(tmp_path / "a.json", settings, load(30, spacing_s=1.0), step_time, runs=1)
    for factor in (1.0, 1.05):
        page = report(study_of(path, Scaled(step_time, factor, factor)), "title")
        drawings = re.findall(r"<svg width=\"340\".*?</svg>", page)
        assert len(drawings) == 6
        for drawing in drawings[::2]:
            band = np.array(
                re.findall(r"[ML]([\d.]+) ([\d.]+)", re.search(r'd="(M[^"]*Z)" fill="#999"', drawing)[1]), float
            )
            dots = np.array(re.findall(r"M([\d.]+) ([\d.]+)h0", drawing), float)
            assert len(dots) in (29, 30)  # one of them may have a single token, and so no TPOT
            assert (dots[:, 0] >= 58).all() and (dots[:, 0] <= 330).all()
            assert (dots[:, 1] >= 10).all() and (dots[:, 1] <= 296).all()
            across, up = (dots[:, 0] - 58) / 272, (296 - dots[:, 1]) / 286
            edge = (296 - band[1, 1]) / 286  # of the band, at the left end of the axis
            assert np.abs(up - across - (edge if factor > 1 else 0)).max() < 2e-3


def test_one_request(tmp_path):
    path = write_record(tmp_path / "a.json", Settings(), load(1), Affine(), runs=1)
    found = study_of(path, Affine())
    assert found.is_met and found.levels[0].services == ()
    assert json.dumps(document(found), allow_nan=False)
    assert "figures to reach" in text(found) and report(found, "t")


def test_logs_are_fitted_exactly_where_they_are_linear():
    """The step time of these tests themselves: what is linear in its columns comes back."""
    config = EngineConfig(model="toy", max_num_seqs=16, max_num_batched_tokens=512, block_size=32)
    true = Affine()
    _, steps, _ = served(replace(Settings(), config=config), load(200, 40.0), true)
    fitted = LogStepTime(steps)
    errors = [abs(fitted.predict(step.shape) / true.predict(step.shape) - 1) for step in steps]
    assert np.median(errors) < 5e-3
