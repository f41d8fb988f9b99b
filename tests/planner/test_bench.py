"""The benchmark command writes a complete record; nothing about its times is asserted."""

import json

import pytest

from planner import bench
from planner.workload import SyntheticSpec, save_workload, synthesize


@pytest.fixture
def run_bench(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["planner.bench", *map(str, arguments)])
        bench.main()
        return capsys.readouterr()

    return run


def test_record(tmp_path, run_bench):
    record_path = tmp_path / "records" / "speed.json"
    run_bench("--repetitions", 2, "--requests", 50, 100, "--output-file", record_path)
    record = json.loads(record_path.read_text())
    assert {"command", "commit", "date", "environment", "results"} <= record.keys()
    small, large = record["results"]
    assert (small["num_requests"], large["num_requests"]) == (50, 100)
    for result in record["results"]:
        assert len(result["repetitions"]) == 2
        assert all(run["wall_s"] > 0 and run["peak_memory_mib"] > 0 for run in result["repetitions"])
        walls = sorted(run["wall_s"] for run in result["repetitions"])
        assert result["median_wall_s"] == pytest.approx(sum(walls) / 2)


def test_a_trace_is_named_but_not_located(tmp_path, run_bench):
    trace = tmp_path / "trace.csv"
    save_workload(synthesize(SyntheticSpec(request_rate=5.0, num_requests=20), seed=1), trace)
    record_path = tmp_path / "speed.json"
    run_bench("--trace", trace, "--repetitions", 1, "--requests", "--output-file", record_path)
    text = record_path.read_text()
    assert str(tmp_path) not in text
    kinds = [(result["kind"], result.get("replicas")) for result in json.loads(text)["results"]]
    assert kinds == [("simulate", 2), ("simulate", 8), ("plan", None)]


def test_a_missing_trace_is_one_sentence(tmp_path, run_bench):
    with pytest.raises(SystemExit, match=r"^error: .*nowhere\.csv"):
        run_bench("--trace", tmp_path / "nowhere.csv", "--output-file", tmp_path / "speed.json")
    assert not (tmp_path / "speed.json").exists()


def test_a_trace_is_not_overwritten(tmp_path, run_bench):
    trace = tmp_path / "trace.csv"
    trace.write_text("precious")
    with pytest.raises(SystemExit, match=r"^error: --output-file .* would overwrite --trace"):
        run_bench("--trace", trace, "--output-file", tmp_path / "." / "trace.csv")
    assert trace.read_text() == "precious"
