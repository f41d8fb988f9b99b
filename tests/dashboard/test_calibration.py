"""A profile as the page shows it: its own points, the fit's own curves, and errors of points that were left out."""

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from calibration.validate import records
from calibration.validate.profiles import step_time_for
from calibration.validate.study import study
from dashboard.figures import calibration as figures
from dashboard.services import benchmarks, profiles, uploads
from dashboard.services.benchmarks import Benchmark
from engine.scheduling import StepShape
from planner.catalog import load_gpu, load_model
from planner.deployment import Deployment
from planner.errors import UserError
from planner.profile.library import shipped_profiles
from planner.simulation import run
from planner.workload import LogNormal, SyntheticSpec, synthesize
from tests.dashboard.conftest import figure, sentences, settled, table
from tests.dashboard.test_figures import check

PROFILE = shipped_profiles()[0]
RECORD = Path(__file__).parents[2] / "calibration" / "records" / "serve_h200_fp8_20.json"
MODEL, GPU = load_model("llama-3.1-8b"), load_gpu("h200_sxm")


@pytest.mark.parametrize("dtype", [dtype.value for dtype in PROFILE.kv_cache_dtypes])
def test_curves_go_through_what_was_measured(dtype):
    fitted = PROFILE.fitted(dtype)
    for curve in profiles.decode_curves(PROFILE, dtype):
        batch = int(curve.name.split()[0])
        assert curve.measured
        for point in curve.measured:
            assert fitted.seconds(StepShape(decode_contexts=[point.at] * batch)) == pytest.approx(
                point.seconds, rel=0.05
            )
            assert point.low_s <= point.seconds <= point.high_s
        assert dict(curve.fitted)[curve.measured[0].at] == pytest.approx(curve.measured[0].seconds, rel=0.05)
    check(figures.curves(profiles.decode_curves(PROFILE, dtype), "decode"))
    check(figures.curves(profiles.prefill_curves(PROFILE, dtype), "prefill"))


def test_points_are_predicted_by_the_others():
    groups = profiles.left_out_parity(PROFILE.name, None, "bfloat16")
    errors = PROFILE.fitted("bfloat16").errors()
    for group, kind in zip(groups, ("decode", "prefill", "mixed"), strict=True):
        assert len(group.points) == errors[kind]["points"]
        assert group.median_error == pytest.approx(errors[kind]["leave_one_out"]["median"], rel=1e-6)
    check(figures.parity(groups))


def test_error_rows_are_the_fits():
    rows = {row.table: row for row in profiles.errors(PROFILE.name, None, "fp8")}
    errors = PROFILE.fitted("fp8").errors()
    assert rows["decode"].left_out == errors["decode"]["leave_one_out"]
    assert rows["mixed"].points == errors["mixed"]["points"]


def test_an_uploaded_profile_is_used_before_the_shipped_ones():
    content = (resources.files("planner") / "data" / "profiles" / PROFILE.name).read_bytes()
    identity = uploads.add_profile("../mine.json", content)
    path = uploads.kept(identity)
    assert path.name == "mine.json"
    found = profiles.available((str(path),))
    assert next(iter(found)) == "mine.json"
    assert found["mine.json"].kv_cache_dtypes == PROFILE.kv_cache_dtypes
    with pytest.raises(UserError, match="version"):
        uploads.add_profile(
            "old.json", content.replace(b'"version": 1', b'"version": 7', 1).replace(b'"version":1', b'"version":7', 1)
        )


def shown(app) -> str:
    """Model and weights of the profile on the page."""
    [facts] = [each.value for each in app.caption if "measured limits" in each.value]
    return facts.split(";")[0]


def test_the_page_begins_with_the_profile_that_answers(open_page):
    """It follows the sidebar until somebody chooses another one."""
    app = open_page("calibration")
    assert shown(app) == "llama-3.1-8b, bfloat16 weights"
    app.selectbox(key="weights").set_value("fp8")
    settled(app)
    assert shown(app) == "llama-3.1-8b, bfloat16 quantised to fp8 weights"
    app.selectbox(key="profile").set_value("llama-3.2-1b_h200.json.gz")
    settled(app)
    assert shown(app) == "llama-3.2-1b, bfloat16 weights"
    app.selectbox(key="weights").set_value("as released")
    settled(app)
    assert shown(app) == "llama-3.2-1b, bfloat16 weights"
    assert shown(open_page("calibration", model="llama-3.2-1b")) == "llama-3.2-1b, bfloat16 weights"


def test_a_model_that_no_profile_serves(open_page):
    """Experts cannot be transferred. Whoever comes back to another model sees what answers then."""
    app = open_page("calibration", model="mixtral-8x7b")
    assert "data sheets" in app.info[0].value
    assert not app.metric
    app.selectbox(key="profile").set_value("llama-3.2-1b_h200.json.gz")
    settled(app)
    assert shown(app) == "llama-3.2-1b, bfloat16 weights"
    assert not app.info
    app.selectbox(key="profile").set_value("nearest")
    app.selectbox(key="model").set_value("llama-3.1-405b")
    settled(app)
    assert shown(app) == "llama-3.1-8b, bfloat16 weights"
    assert "transferred from another model to llama-3.1-405b" in app.info[0].value


def test_profiles_of_one_name(open_page):
    """An uploaded one of a shipped one's name: that which answers is shown, whichever of the two it is."""
    name = "llama-3.1-8b_h200.json"
    document = json.loads((resources.files("planner") / "data" / "profiles" / name).read_text())
    document["date"] = "2026-01-02T00:00:00+00:00"
    own = uploads.add_profile(name, json.dumps(document).encode())
    other = uploads.add_profile(name, json.dumps(document | {"gpu": "b200"}).encode())
    app = open_page("calibration", profiles=own)
    assert "2026-01-02" in app.metric[1].help
    app = open_page("calibration", profiles=other)
    assert "2026-01-02" not in app.metric[1].help
    app.selectbox(key="profile").set_value(name)
    settled(app)
    assert "2026-01-02" in app.metric[1].help
    assert f"{name} (2)" in app.selectbox(key="profile").options


def test_what_was_just_uploaded_is_shown(open_page):
    """Though the sidebar's model has a nearer one."""
    app = open_page("calibration")
    content = (resources.files("planner") / "data" / "profiles" / "llama-3.1-8b_fp8_h200.json").read_bytes()
    app.file_uploader(key="profile_file").upload("mine.json", content, "application/json")
    settled(app)
    assert not app.exception
    assert app.selectbox(key="profile").value == "mine.json"
    assert shown(app) == "llama-3.1-8b, bfloat16 quantised to fp8 weights"
    app.selectbox(key="profile").set_value("nearest")
    settled(app)
    assert shown(app) == "llama-3.1-8b, bfloat16 weights"


# ---- benchmarks ----------------------------------------------------------------------------------------------------


def kept(name: str, content: bytes):
    return uploads.kept(uploads.add_benchmark(name, content))


def no_progress(done, total, what):
    pass


def test_a_record_of_ours_is_compared_as_memwall_validate_does():
    content = RECORD.read_bytes()
    # The catalog knows what the record names; what is chosen on the page does not matter.
    chosen = load_model("llama-3.2-1b")
    answer = benchmarks.compare(no_progress, Benchmark(kept(RECORD.name, content), None, chosen, load_gpu("l4")))
    (load,) = answer.loads
    requests = json.loads(content)["results"][0]["runs"][0]["requests"]
    columns = {name: np.array(requests[name], float) for name in ("arrival_s", "first_token_s", "last_token_s")}
    ttft = 1e3 * (columns["first_token_s"] - columns["arrival_s"])
    assert load.num_requests == len(ttft)
    assert load.num_runs == 2
    assert load.metrics["ttft_ms.p50"].measured[0] == pytest.approx(np.median(ttft), rel=1e-4)
    e2el = 1e3 * (columns["last_token_s"] - columns["arrival_s"])
    assert load.metrics["e2el_ms.p99"].measured[0] == pytest.approx(np.percentile(e2el, 99), rel=1e-4)
    found = study([records.read(RECORD)], step_time_for, num_draws=0).levels[0]
    for name, mine in load.metrics.items():
        theirs = found.comparison(name)
        assert mine.predicted == pytest.approx(theirs.predicted[0], rel=1e-3), name
        assert mine.measured == pytest.approx(theirs.measured, rel=1e-3), name
        assert mine.interval.low <= mine.predicted <= mine.interval.high
    assert load.request_errors["e2el"] == pytest.approx(found.requests["e2el_ms"][0].mape, rel=1e-2)
    points = load.points["ttft"].points
    assert 0 < len(points) <= benchmarks.MAX_POINTS
    assert points[0].measured == pytest.approx(ttft[0], rel=1e-4)
    check(figures.parity((load.points["ttft"],), "TTFT, ms"))


def test_a_model_that_a_record_names_is_no_path_to_open(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    document = json.loads(RECORD.read_text())
    document["engines"][0]["config"]["model"] = str(tmp_path)
    path = kept("record.json", json.dumps(document).encode())
    with pytest.raises(UserError, match="not in the catalog"):
        benchmarks.compare(no_progress, Benchmark(path, None, MODEL, GPU))


def outside_result() -> bytes:
    """What `vllm bench serve --save-detailed` would write of a server that is exactly our simulator."""
    lengths = LogNormal.from_mean(300, 0.7, high=1500)
    spec = SyntheticSpec(name="load", request_rate=4.0, duration_s=15.0, input_tokens=lengths, output_tokens=lengths)
    load = synthesize(spec, 3)
    deployment = Deployment(
        model=MODEL,
        gpu=GPU,
        max_num_seqs=64,
        max_num_batched_tokens=4096,
        max_model_len=4096,
        num_gpu_blocks_override=5000,
    )
    system = replace(deployment.system(load), pipeline_depth=1)
    log = run(load, system).requests
    gaps = [
        [(e2el - ttft) / (tokens - 1)] * (tokens - 1) if tokens > 1 else []
        for e2el, ttft, tokens in zip(log.e2el_s, log.ttft_s, load.output_tokens.tolist(), strict=True)
    ]
    result = {
        "input_lens": load.input_tokens.tolist(),
        "output_lens": load.output_tokens.tolist(),
        "ttfts": log.ttft_s.tolist(),
        "itls": gaps,
        "errors": [""] * len(load),
        "start_times": (1e5 + load.arrival_s).tolist(),
    }
    return json.dumps(result).encode()


def test_a_server_that_is_our_simulator_is_predicted_exactly():
    path = kept("vllm.json", outside_result())
    assert benchmarks.is_outside(path)
    flags = (("max_num_seqs", 64), ("max_num_batched_tokens", 4096), ("num_gpu_blocks", 5001), ("block_size", 16))
    answer = benchmarks.compare(no_progress, Benchmark(path, None, MODEL, GPU, flags=flags))
    (load,) = answer.loads
    for metric in ("ttft_ms.p50", "ttft_ms.p99", "tpot_ms.mean", "e2el_ms.p90"):
        assert load.metrics[metric].error == pytest.approx(0.0, abs=2e-3), metric
    assert load.points["e2el"].median_error < 2e-3
    # Another model is not what answered: it is seen at once.
    other = benchmarks.compare(no_progress, Benchmark(path, None, load_model("llama-3.2-3b"), GPU, flags=flags))
    assert other.loads[0].metrics["tpot_ms.mean"].error < -0.3
    assert other.loads[0].evidence != load.evidence


@pytest.mark.parametrize("content", [b"", b"{}", b'{"input_lens": [1], "output_lens": [2]}', b"[1, 2", b"\xff\xfe"])
def test_what_is_no_benchmark_is_one_sentence(content):
    with pytest.raises(UserError) as caught:
        uploads.add_benchmark("mine.json", content)
    assert "\n" not in str(caught.value).strip()
    assert "/tmp" not in str(caught.value)


def test_a_benchmark_may_be_too_long(monkeypatch):
    monkeypatch.setattr(benchmarks, "MAX_REQUESTS", 10)
    with pytest.raises(UserError, match="memwall validate"):
        uploads.add_benchmark("long.json", outside_result() + b"\n")


def test_the_page_compares_what_was_dropped(open_page):
    app = open_page("calibration")
    app.file_uploader(key="benchmark_file").upload("vllm.json", outside_result(), "application/json")
    settled(app)
    assert not app.error
    app.number_input(key="bench_seqs").set_value(64)
    app.number_input(key="bench_budget").set_value(4096)
    app.number_input(key="bench_blocks").set_value(5001)
    settled(app)
    assert not app.error
    assert not app.exception
    rows = table(app, "metric", "measured", "predicted", "error").set_index("metric")
    assert abs(float(rows["error"]["TPOT mean, ms"].replace("−", "-").rstrip("%"))) < 1.0
    assert figure(app, "parity_ttft")["data"]
    # Whoever gets the link sees the same.
    other = open_page("calibration", benchmark=app.query_params["benchmark"], bench_seqs="64")
    assert "predicted against measured" in sentences(other)
    app.file_uploader(key="benchmark_file").upload("bad.json", b"[]", "application/json")
    settled(app)
    assert not app.exception
    assert len(app.error) == 1


def test_a_profile_in_the_link(open_page):
    content = (resources.files("planner") / "data" / "profiles" / PROFILE.name).read_bytes()
    app = open_page("calibration", profiles=uploads.add_profile("mine.json", content))
    assert "mine.json" in app.selectbox(key="profile").options
    app = open_page("calibration", profiles="0123456789abcdef")
    assert not app.exception
    assert "drop it again" in app.error[0].value
