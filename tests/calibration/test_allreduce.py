"""All-reduces that were measured elsewhere, and the profiles that they are added to."""

import gzip
import json

import pytest

from calibration import allreduce
from planner.catalog import load_gpu, load_model
from planner.deployment import Deployment
from planner.profile.schema import load_profile
from tests.planner.profiles_for_tests import profile, write

GPU = "NVIDIA H200"


@pytest.fixture(scope="module")
def content():
    return profile() | {"gpu_name": GPU}


@pytest.fixture
def record(tmp_path):
    rows = [
        {"world_size": 2, "bytes": 1 << power, "time_s": 1e-5 + (1 << power) / 2e11, "samples": 15}
        for power in range(13, 29)
    ]
    content = {"kind": "all-reduce", "version": 1, "command": "x", "commit": "abc", "date": "2026-11-23T00:00:00"}
    path = tmp_path / "allreduce.json"
    path.write_text(
        json.dumps(content | {"environment": {"torch": "2"}, "gpu": "h200_sxm", "gpu_name": GPU, "allreduce": rows})
    )
    return path


def changed(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_profile_foresees_two_ranks_by_what_was_measured(tmp_path, content, record, capsys):
    plain, compressed = write(tmp_path, content, "plain.json"), tmp_path / "small.json.gz"
    compressed.write_bytes(gzip.compress(plain.read_bytes()))
    assert allreduce.main([str(record), str(plain), str(compressed)]) == 0
    assert capsys.readouterr().out.count("all-reduces of 2 GPUs added") == 2
    for path in (plain, compressed):
        found = load_profile(path)
        assert len(found.tables.allreduce) == 16
        step_time = Deployment(
            load_model("llama-3.1-8b"), load_gpu("h200_sxm"), max_model_len=4096, tensor_parallel_size=2,
            profiles=(str(path),),
        ).step_time()  # fmt: skip
        assert "transferred from one GPU" in step_time.description
    written = json.loads(plain.read_text())
    assert written["allreduce_measured"]["commit"] == "abc"
    assert written["allreduce_measured"]["environment"] == {"torch": "2"}
    assert {name: written[name] for name in content if name != "allreduce"} == {
        name: json.loads(json.dumps(content[name])) for name in content if name != "allreduce"
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpu_name": "NVIDIA H100 80GB HBM3"}, "was measured on NVIDIA H200, and these all-reduces on NVIDIA H100"),
        ({"gpu": "h100_sxm"}, "was measured on h200_sxm, and these all-reduces on h100_sxm"),
        ({"environment": None}, "lacks environment"),
        ({"kind": "memwall profile"}, "no record of all-reduces of version 1"),
        ({"version": 9}, "no record of all-reduces of version 1"),
        ({"allreduce": []}, "has no all-reduce in it"),
        ({"allreduce": {}}, "lacks gpu_name or allreduce"),
        ({"allreduce": [{"world_size": 2, "bytes": 8, "time_s": -1.0}]}, "allreduce.0.time_s"),
        ({"allreduce": ["fast"]}, "allreduce.0"),
    ],
)
def test_what_does_not_go_together_changes_nothing(change, words, tmp_path, content, record, capsys):
    good, path = write(tmp_path, content, "good.json"), write(tmp_path, content, "profile.json")
    before = path.read_bytes()
    changed(record, **change)
    assert allreduce.main([str(record), str(good), str(path)]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert path.read_bytes() == good.read_bytes() == before


def test_all_profiles_are_in_order_before_one_is_written(tmp_path, content, record, capsys):
    path = write(tmp_path, content, "profile.json")
    before = path.read_bytes()
    assert allreduce.main([str(record), str(path), str(tmp_path / "nowhere.json")]) == 2
    assert "nowhere.json" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "[1]", "{", "\x00"])
def test_other_files_are_no_record(text, tmp_path, capsys):
    path = tmp_path / "record.json"
    path.write_text(text)
    assert allreduce.main([str(path)]) == 2
    assert "record.json" in capsys.readouterr().err


def test_a_fit_that_is_written_anew(tmp_path, content, capsys):
    from calibration.refit import main

    plain, packed = write(tmp_path, content, "plain.json"), tmp_path / "packed.json.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for path in (plain, packed):
        assert main([str(path)]) == 0 and capsys.readouterr().out.endswith(": written\n")
        assert load_profile(path).record.kv["bfloat16"].fit["decode"]["points"] > 0
        assert main([str(path)]) == 0 and capsys.readouterr().out.endswith(": as it was\n")
    (tmp_path / "none.json").write_text("# no profile")
    for name, words in (("none.json", "is not JSON"), ("nowhere.json", "No such file")):
        assert main([str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err
    assert main(["--help"]) == 0 and "PROFILE" in capsys.readouterr().out
    assert main([]) == 2 and "PROFILE" in capsys.readouterr().err


def test_one_gpu_is_too_few(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert allreduce.main([str(tmp_path / "record.json")]) == 2
    assert "this machine has 0 of the two GPUs" in capsys.readouterr().err
    assert not (tmp_path / "record.json").exists()


def test_what_is_measured_is_written_and_can_be_added(tmp_path, content, capsys, monkeypatch):
    """But for the GPUs; `measure_allreduce` itself is tested between two processes on CPUs."""
    import torch

    from calibration.measure import allreduce as measured
    from calibration.measure import facts

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    rows = [
        {"world_size": 2, "bytes": size, "time_s": s, "low_s": s, "high_s": s, "samples": 15}
        for size, s in ((8192, 1e-5), (1 << 20, 2e-5))
    ]
    monkeypatch.setattr(measured, "measure_allreduce", lambda size: rows)
    monkeypatch.setattr(facts, "gpu", lambda device: {"gpu": "h200_sxm", "gpu_name": GPU, "gpu_memory_bytes": 1 << 37})
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    monkeypatch.setattr(allreduce, "environment", lambda device: {"torch": torch.__version__})
    record, path = tmp_path / "record.json", write(tmp_path, content)
    assert allreduce.main([str(record), "--commit", "abc"]) == 0
    assert "2 GPUs,       8,192 bytes" in capsys.readouterr().out
    found = json.loads(record.read_text())
    assert [row["bytes"] for row in found["allreduce"]] == [8192, 1 << 20]
    assert (found["commit"], found["gpu_name"]) == ("abc", GPU)
    assert (found["environment"]["nccl"], found["environment"]["nccl_environment"]["NCCL_NVLS_ENABLE"]) == (
        "2.27.3",
        "0",
    )
    kept = record.read_bytes()
    assert allreduce.main([str(record), str(path)]) == 0
    assert record.read_bytes() == kept  # a record that is there is not measured again
    assert len(load_profile(path).tables.allreduce) == 2
