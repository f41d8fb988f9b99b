"""Files that people drop: bounded, parsed by the planner, and one sentence for each way to be wrong."""

import gzip
import json

import pytest

from dashboard.services import uploads
from planner.catalog import load_model, model_entry
from planner.errors import UserError

CSV = b"arrival_s,input_tokens,output_tokens\n0.0,100,10\n0.5,200,20\n1.5,300,30\n"


def test_a_trace_is_kept_by_its_content():
    kept = uploads.Traces()
    identity = kept.add("mine.csv", CSV)
    load = kept.get(identity)
    assert load.input_tokens.tolist() == [100, 200, 300]
    assert load.name == "mine.csv"
    assert kept.add("mine.csv", CSV) == identity
    assert kept.add("mine.csv", CSV + b"2.0,1,1\n") != identity
    assert kept.get("unknown") is None
    assert kept.get(None) is None


def test_only_so_many_traces_are_kept():
    kept = uploads.Traces()
    first = kept.add("mine.csv", CSV)
    for number in range(uploads._MOST_KEPT):
        kept.add("mine.csv", CSV + f"{number + 2},5,5\n".encode())
    assert kept.get(first) is None


def test_unsorted_traces_are_sorted_and_gzip_is_read():
    shuffled = b"arrival_s,input_tokens,output_tokens\n5,1,1\n0,2,2\n"
    assert uploads.read_trace("a.csv", shuffled).input_tokens.tolist() == [2, 1]
    assert len(uploads.read_trace("a.csv.gz", gzip.compress(CSV))) == 3


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", b"", "empty"),
        ("a.csv", b"colour,shape\nred,round\n", "no column"),
        ("a.csv", CSV + b"2,many,1\n", "line 5"),
        ("a.jsonl", b"{", "JSON"),
        ("a.csv.gz", gzip.compress(CSV, mtime=0)[:-9], "a.csv.gz"),
        ("a.csv", b"\x00\xff\xfe", "a.csv"),
    ],
    ids=["empty", "columns", "cell", "json", "gzip", "binary"],
)
def test_what_is_no_trace_is_one_sentence(name, content, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        uploads.read_trace(name, content)
    assert "\n" not in str(caught.value).strip()
    assert "/" not in str(caught.value), "the folder of the server is nobody's business"


def test_sizes_are_bounded(monkeypatch):
    monkeypatch.setattr(uploads, "MAX_TRACE_REQUESTS", 2)
    with pytest.raises(UserError, match="3 requests"):
        uploads.read_trace("a.csv", CSV)
    monkeypatch.setattr(uploads, "MAX_TRACE_MIB", 1)
    with pytest.raises(UserError, match="MiB"):
        uploads.read_trace("a.csv", b"x" * ((1 << 20) + 1))
    monkeypatch.setattr(uploads, "MAX_UNPACKED_BYTES", 1 << 20)
    with pytest.raises(UserError, match="unpacks"):
        uploads.read_trace("a.csv.gz", gzip.compress(b"0" * (2 << 20)))


@pytest.mark.parametrize(
    "name", ["../../evil.csv", "/etc/passwd", "..\\..\\evil.csv", ".hidden", "a\x00b.csv", "ä b.csv"]
)
def test_files_stay_in_their_folder(name, tmp_path):
    path = uploads._stored(tmp_path, name, CSV)
    assert path.parent == tmp_path
    assert path.read_bytes() == CSV
    assert not path.name.startswith(".")


def test_a_model_by_its_config():
    config = dict(model_entry("llama-3.1-8b")["config"])
    found = uploads.model_of(*uploads.read_config("config.json", json.dumps(config).encode()))
    assert found.num_parameters == load_model("llama-3.1-8b").num_parameters
    named = json.dumps(config | {"_name_or_path": "org/My-Model"}).encode()
    assert uploads.read_config("config.json", named)[0] == "my-model"
    same = json.dumps(config | {"_name_or_path": "meta-llama/Llama-3.1-8B"}).encode()
    assert uploads.read_config("config.json", same)[0] == "llama-3.1-8b (yours)"
    for content in (b"[1]", b"nonsense", json.dumps({"model_type": "llama"}).encode()):
        with pytest.raises(UserError):
            uploads.model_of(*uploads.read_config("config.json", content))


def test_a_profile_is_checked(tmp_path):
    with pytest.raises(UserError, match="profile"):
        uploads.add_profile("p.json", b'{"kind": "something else"}')
