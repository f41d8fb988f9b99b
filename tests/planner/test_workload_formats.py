"""Loading traces: every format by hand, and every way a file can be wrong. All files are made here."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import UserError
from planner.workload import Workload, load_workload, save_workload

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
OURS = "arrival_s,input_tokens,output_tokens\n"


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def jsonl(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def mooncake(timestamp, input_length, output_length, hash_ids) -> dict:
    return {
        "timestamp": timestamp,
        "input_length": input_length,
        "output_length": output_length,
        "hash_ids": hash_ids,
    }


def columns_of(workload: Workload) -> list[list]:
    return [workload.arrival_s.tolist(), workload.input_tokens.tolist(), workload.output_tokens.tolist()]


def test_azure_2023_has_seven_decimals(write):
    path = write("a.csv", AZURE + "2023-11-16 23:59:59.5000001,300,40\n2023-11-17 00:00:01.0000003,20,7\n")
    for format in ("auto", "azure"):
        workload = load_workload(path, format=format)
        assert columns_of(workload) == [[0.0, 1.5000002], [300, 20], [40, 7]]
    assert workload.name == "a.csv"
    assert workload.notes == ()


def test_azure_2024_has_zones_and_mixed_decimals(write):
    path = write("a.csv", AZURE + "2024-05-10 00:00:00.009930+00:00,5,4\n2024-05-10 00:00:01+00:00,2,7\n")
    assert columns_of(load_workload(path)) == [[0.0, 0.99007], [5, 2], [4, 7]]


def test_mooncake_prefixes_and_distinct_timestamps_unmoved(write):
    rows = [mooncake(1000, 1100, 9, [40, 41, 42]), mooncake(1250, 600, 3, [40, 43]), mooncake(4000, 10, 1, [44])]
    workload = load_workload(write("m.jsonl", jsonl(*rows)), seed=3)
    assert columns_of(workload) == [[0.0, 0.25, 3.0], [1100, 600, 10], [9, 3, 1]]
    assert workload.prefix_block_tokens == 512
    assert workload.page_hashes(0, 512)[0] == workload.page_hashes(1, 512)[0]
    assert workload.page_hashes(0, 256)[:2] == workload.page_hashes(1, 256)
    assert workload.infinite_cache_hit_rate() == 512 / 1710


def test_mooncake_bins_are_filled_evenly_and_in_order(write):
    """1000 bins of 3 s, one of them 2999 ms as in the real trace, 4 requests each."""
    starts = [3000 * i - (i == 7) for i in range(1000)]
    rows = [mooncake(start, 10 + i, 1, [4 * n + i]) for n, start in enumerate(starts) for i in range(4)]
    path = write("m.jsonl", jsonl(*rows))
    workload = load_workload(path, seed=1)
    start_s = np.repeat(starts, 4) / 1000
    offset_s = workload.arrival_s - start_s
    assert (offset_s >= 0).all()
    assert (offset_s <= 3.001).all()
    assert (np.diff(workload.arrival_s) >= 0).all()
    assert workload.input_tokens.reshape(-1, 4).tolist() == [[10, 11, 12, 13]] * 1000, "order inside a bin is kept"
    # A uniform offset has mean 1.5 s and variance 3²/12.
    assert offset_s.mean() == pytest.approx(1.5, abs=4 * 3 / np.sqrt(12 * 4000))
    assert workload.summary().interarrival_cv < 1.3
    assert "bins of 3 s" in workload.notes[0]
    assert load_workload(path, seed=1).arrival_s.tobytes() == workload.arrival_s.tobytes()
    assert load_workload(path, seed=2).arrival_s.tobytes() != workload.arrival_s.tobytes()


def test_hash_ids_that_name_blocks_are_chained(write):
    """Block 7 after block 1 is another prefix than block 7 after block 2."""
    rows = [mooncake(0, 32, 1, [1, 7]), mooncake(1, 32, 1, [2, 7]), mooncake(2, 48, 1, [1, 7, 7])]
    workload = load_workload(write("m.jsonl", jsonl(*rows)))
    pages = [workload.page_hashes(i, 16) for i in range(3)]
    assert workload.prefix_block_tokens == 16, "512 does not fit the lengths, 16 does"
    assert pages[0] == pages[2][:2]
    assert len({*pages[1], *pages[2]}) == 5
    assert "whole prefixes" in workload.notes[0]


def test_hash_ids_may_be_large_or_strings(write):
    for a, b in ((2**64 - 1, 3), (-5, 2**63 - 1), ("ab", "cd")):
        rows = [mooncake(0, 1000, 1, [a, b]), mooncake(1, 500, 1, [a])]
        assert [row.size for row in load_workload(write("m.jsonl", jsonl(*rows))).prefix_block_hashes] == [2, 1]


def test_burstgpt_failures_are_skipped_and_counted(write):
    path = write(
        "b.csv", BURST + "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,10,0,10,API log\n118,GPT-4,2,9,11,x\n"
    )
    workload = load_workload(path)
    assert columns_of(workload) == [[0.0, 113.0], [472, 2], [18, 9]]
    assert workload.session is None
    assert "skipped 1 failed requests of 3" in workload.notes[0]
    with pytest.raises(UserError, match="no request with an answer"):
        load_workload(write("c.csv", BURST + "5,ChatGPT,472,0,472,API log\n"))


def test_burstgpt_sessions(write):
    header = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    rows = "1.0,1722-ac,4,GPT-4,9,4,13,x\n2.0,,1,GPT-4,9,4,13,x\n3.0,1722-ac,1,GPT-4,9,4,13,x\n4.0,,1,GPT-4,9,4,13,x\n"
    session = load_workload(write("b.csv", header + rows)).session.tolist()
    assert session[0] == session[2]
    assert len(set(session)) == 3, "a request without a session is alone"


def test_bad_line_after_skipped_ones_has_its_own_number(write):
    path = write("b.csv", BURST + "5,a,472,0,472,x\n6,a,1,1,2,x\n7,a,0,1,1,x\n")
    with pytest.raises(UserError, match=r"b\.csv line 4: Request tokens is '0'"):
        load_workload(path)


@pytest.mark.parametrize(
    ("header", "times", "expected"),
    [
        ("arrival_s,input_tokens,output_tokens", (7, 8.5), 1.5),
        ("arrival_time,input_toks,output_toks", (0.25, 1.75), 1.5),
        ("arrival_time_ns,input_toks,output_toks", (1700000000000000001, 1700000001500000001), 1.5),
        ("arrival_time_ms,input_length,output_length", (0, 1500), 1.5),
        ("arrived_at,num_prefill_tokens,num_decode_tokens", (-1, 0.5), 1.5),
        ("timestamp,prompt_tokens,completion_tokens", (10, 12), 2.0),
        ("Timestamp_us,Prompt Len,Output Len", (10, 1500010), 1.5),
        ("timestamp,prompt_tokens,completion_tokens", ("2024-01-01T00:00:00Z", "2024-01-01T00:00:01.5Z"), 1.5),
        ("created_at,ISL,OSL", ("2024-01-01T00:00:00+02:00", "2023-12-31T22:00:01.5"), 1.5),
    ],
)
def test_generic_names_and_units(write, header, times, expected):
    rows = [(times[0], 30, 4), (times[1], 20, 5)]
    path = write("g.csv", header + "\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    assert columns_of(load_workload(path)) == [[0.0, expected], [30, 20], [4, 5]]
    rows = [dict(zip(header.split(","), row, strict=True)) for row in rows]
    assert columns_of(load_workload(write("g.jsonl", jsonl(*rows)))) == [[0.0, expected], [30, 20], [4, 5]]


def test_columns_named_by_the_user(write):
    path = write("g.csv", "when_ms,a,b,who\n0,1,2,x\n500,3,4,x\n")
    names = {"arrival": "when_ms", "input": "a", "output": "b", "session": "who"}
    workload = load_workload(path, columns=names)
    assert columns_of(workload) == [[0.0, 0.5], [1, 3], [2, 4]]
    assert workload.session.tolist() == [0, 0]
    with pytest.raises(UserError, match="has no column 'c', only when_ms, a, b, who"):
        load_workload(path, columns={**names, "input": "c"})
    with pytest.raises(UserError, match="unknown column role 'inputs': did you mean 'input'"):
        load_workload(path, columns={"inputs": "a"})


def test_csv_dialects(write):
    rows = "0, 30,4\r\n\r\n1,20.0,5\r\n"
    for name, content in {
        "semicolons.csv": (OURS + rows).replace(",", ";"),
        "tabs.tsv": (OURS + rows).replace(",", "\t"),
        "byte_order_mark.csv": "\ufeff" + OURS + rows,
        "no_last_newline.csv": OURS + rows.strip(),
    }.items():
        assert columns_of(load_workload(write(name, content))) == [[0.0, 1.0], [30, 20], [4, 5]], name


def test_gzip_is_told_by_its_bytes(write):
    content = gzip.compress((OURS + "0,30,4\n").encode())
    assert len(load_workload(write("a.csv.gz", content))) == 1
    assert len(load_workload(write("a.csv", content))) == 1


def test_sorting_on_request(write):
    path = write("a.csv", OURS + "2,1,10\n\n0,2,20\n1,3,30\n")
    with pytest.raises(UserError, match=r"a\.csv line 4: arrival_s 0 is earlier .*sort=True"):
        load_workload(path)
    workload = load_workload(path, sort=True)
    assert columns_of(workload) == [[0.0, 1.0, 2.0], [2, 3, 1], [20, 30, 10]]
    assert "sorted by arrival" in workload.notes[0]


def test_failed_requests_are_skipped_on_request_only(write):
    path = write("a.csv", AZURE + "2024-05-10 00:00:00,5,0\n2024-05-10 00:00:01,2,7\n")
    with pytest.raises(UserError, match=r"a\.csv line 2: GeneratedTokens is '0'"):
        load_workload(path)
    assert len(load_workload(path, skip_failed=True)) == 1


def bench(**changes) -> dict:
    result = {
        "backend": "vllm",
        "request_rate": 4.0,
        "burstiness": 1.0,
        "max_concurrency": None,
        "input_lens": [10, 20, 30],
        "output_lens": [1, 0, 3],
        "ttfts": [0.1, 0.0, 0.2],
        "itls": [[], [], [0.1, 0.1]],
        "start_times": [100.5, 100.0, 100.25],
    } | changes
    return {key: value for key, value in result.items() if value != "absent"}


def test_vllm_bench_start_times(write):
    for indent in (None, 2):
        workload = load_workload(write("r.json", json.dumps(bench(), indent=indent)))
        assert columns_of(workload) == [[0.0, 0.25], [30, 10], [3, 1]], "in order of sending, without the failure"
    assert len(workload.notes) == 1
    held = load_workload(write("r.json", json.dumps(bench(max_concurrency=8))))
    assert "max_concurrency 8" in held.notes[1]


def test_vllm_bench_without_start_times_draws_them_and_says_so(write):
    n = 4000
    result = bench(start_times="absent", input_lens=[9] * n, output_lens=[2] * n, burstiness=0.5)
    path = write("r.json", json.dumps(result))
    workload = load_workload(path, seed=5)
    cv = np.sqrt(1 / 0.5)
    assert workload.request_rate == pytest.approx(4.0, rel=4 * cv / np.sqrt(n))
    assert "arrivals drawn with Gamma gaps from request_rate 4 and burstiness 0.5, seed 5" in workload.notes[0]
    assert load_workload(path, seed=5).arrival_s.tobytes() == workload.arrival_s.tobytes()
    at_once = load_workload(write("r.json", json.dumps(bench(start_times="absent", request_rate="inf"))))
    assert at_once.duration_s == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(bench(input_lens="absent")), "--save-detailed"),
        (json.dumps({"request_throughput": 3.0, "completed": 4}), "--save-detailed"),
        (json.dumps(bench(output_lens=[1, 2])), "3 input_lens but 2 output_lens"),
        (json.dumps(bench(output_lens=[0, 0, 0])), "no request with an answer"),
        (json.dumps(bench(input_lens=[10, 2.5, 3])), r"input_lens\[1\] is 2.5"),
        (json.dumps(bench(input_lens=7)), "input_lens is not a list"),
        (json.dumps(bench(input_lens=[], output_lens=[])), "is empty"),
        (json.dumps(bench(start_times=[1, 2])), "3 input_lens but 2 start_times"),
        (json.dumps(bench(start_times=[1, 2, "x"])), r"start_times\[2\] is 'x'"),
        (json.dumps(bench(start_times=[], request_rate=-1)), "request_rate is -1"),
        (json.dumps(bench(start_times="absent", request_rate="absent")), "neither 'start_times' nor 'request_rate'"),
        (json.dumps(bench())[:-9], "line 1 is not complete JSON"),
        (json.dumps(bench()) + "\n" + json.dumps(bench()), "more than one benchmark result"),
    ],
)
def test_malformed_bench_results(write, content, message):
    with pytest.raises(UserError, match=message):
        load_workload(write("r.json", content))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", OURS + "0,5,5\n1,0,5\n", "t.csv line 3: input_tokens is '0', which is not a number of tokens from 1"),
        ("t.csv", OURS + "0,5,5\n\n\n1,5,-3\n", "t.csv line 5: output_tokens is '-3'"),
        ("t.csv", OURS + "0,5,5\n1,many,5\n", "t.csv line 3: input_tokens is 'many', which is not a number"),
        ("t.csv", OURS + "0,5,5\n1,,5\n", "t.csv line 3: input_tokens is empty"),
        ("t.csv", OURS + "0,5,5\n1,5\n", "t.csv line 3: output_tokens is empty"),
        ("t.csv", OURS + "0,5,5\n1,5.5,5\n", "t.csv line 3: input_tokens is '5.5', which is not a whole number"),
        ("t.csv", OURS + "0,5,5\n1,NaN,5\n", "t.csv line 3: input_tokens is 'NaN'"),
        ("t.csv", OURS + "0,5,inf\n", "t.csv line 2: output_tokens is 'inf'"),
        ("t.csv", OURS + "0,5,True\n", "t.csv line 2: output_tokens is 'True'"),
        ("t.csv", OURS + "0,5,99999999999999999999\n", "t.csv line 2: output_tokens is '99999999999999999999'"),
        ("t.csv", OURS + "0,5,5\nnan,5,5\n", "t.csv line 3: arrival_s is 'nan', which is not a number or an ISO"),
        ("t.csv", OURS + "0,5,5\ninf,5,5\n", "t.csv line 3: arrival_s is 'inf'"),
        ("t.csv", OURS + "0,5,5\nsoon,5,5\n", "t.csv line 3: arrival_s is 'soon'"),
        ("t.csv", OURS + "0,5,5\n1,5,5,5\n", "t.csv line 3 has 4 cells where the header names 3 columns"),
        ("t.csv", OURS + "1,5,5\n2,5,5\n1.5,5,5\n", "t.csv line 4: arrival_s 1.5 is earlier"),
        ("t.csv", AZURE + "2024-05-10 00:00:00,5,5\n2024-25-10,5,5\n", "line 3: TIMESTAMP is '2024-25-10'"),
        ("t.csv", AZURE + "2024-05-10 00:00:00,5,5\n,5,5\n", "line 3: TIMESTAMP is empty"),
        ("t.csv", AZURE + "1000-01-01,5,5\n2024-01-01,5,5\n", "line 2: TIMESTAMP is '1000-01-01'"),
        ("t.csv", OURS + f"{2**63 - 1},1,1\n{-(2**63)},1,1\n", "line 2: arrival_s is '9223372036854775807', which is"),
        ("t.csv", OURS + "-1e308,1,1\n1e308,1,1\n", "line 2: arrival_s is '-1e308', which is not a possible time"),
        ("t.jsonl", jsonl({"arrival_s": [1], "input_tokens": {"a": 1}, "output_tokens": 3}), r"arrival_s is '\[1\]'"),
        ("t.csv", OURS, "t.csv is empty"),
        ("t.csv", "", "t.csv is empty"),
        ("t.csv", "\n \n", "t.csv is empty"),
        ("t.csv", "arrival_s,input_tokns,output_tokens\n0,1,1\n", "no column for input tokens, only .*'input_tokns'"),
        ("t.csv", "a,b\n0,1\n", "no column for arrival times, only a, b$"),
        ("t.csv", '"arrival_s,input\n0,1', "not readable as CSV|no column"),
        ("t.csv", b"\x89PNG\r\n\0\0\x1a", "t.csv is a binary file"),
        ("t.csv", OURS.encode() + b"0,1,\xff\n", "t.csv line 2 is not UTF-8"),
        ("t.csv.gz", gzip.compress(OURS.encode(), mtime=0)[:-6], "t.csv.gz is damaged gzip"),
        ("t.csv.gz", b"\x1f\x8b123", "t.csv.gz is damaged gzip"),
        ("t.jsonl", jsonl(mooncake(0, 5, 5, []), mooncake(1, 0, 5, [])), "t.jsonl line 2: input_length is '0'"),
        ("t.jsonl", jsonl(mooncake(0, 5, 5, []), mooncake(1, "x", 5, [])), "line 2: input_length is '\"x\"'"),
        ("t.jsonl", jsonl(mooncake(0, 5, 5, []), mooncake(1, 5, True, [])), "line 2: output_length is 'true'"),
        ("t.jsonl", jsonl(mooncake(0, 5, 5, []), mooncake(1, 5, None, [])), "line 2: output_length is 'null'"),
        (
            "t.jsonl",
            jsonl(mooncake(0, 5, 5, []), {"timestamp": 3, "input_length": 3}),
            "line 2: output_length is empty",
        ),
        ("t.jsonl", jsonl(mooncake(0, 5, float("nan"), [])), "line 1: output_length is 'NaN'"),
        ("t.jsonl", jsonl(mooncake(0, 5, 10**30, [])), "line 1: output_length is '1000"),
        ("t.jsonl", jsonl(mooncake(0, 5, 5, 3.5)), "line 1: hash_ids is '3.5', which is not a list of ids"),
        ("t.jsonl", jsonl(mooncake(0, 5, 5, [1, None])), "line 1: hash_ids is"),
        ("t.jsonl", jsonl(mooncake(0, 512, 5, [1]), mooncake(9, 5, 5, [1, 2])), "line 2: hash_ids has 2 ids of 512"),
        ("t.jsonl", jsonl(mooncake(0, 5, 5, [])) + '\n{"timestamp": 3, "inp', "t.jsonl line 3 is not complete JSON"),
        ("t.jsonl", jsonl(mooncake(0, 5, 5, [])) + "[1, 2]\n", "t.jsonl line 2 is an array, not a JSON object"),
        ("t.jsonl", "null\n", "t.jsonl line 1 is null, not a JSON object"),
        ("t.json", "[" * 100000, "t.json line 1 is not complete JSON"),
        ("t.jsonl", "{}\n", "no column for arrival times"),
        ("t.jsonl", "17\n", "line 1 is a number"),
    ],
)
def test_malformed_files(write, name, content, message):
    with pytest.raises(UserError, match=message) as caught:
        load_workload(write(name, content))
    assert "\n" not in str(caught.value), "one sentence"


@pytest.mark.parametrize(
    ("format", "content", "message"),
    [
        (
            "azure",
            AZURE.replace("Context", "Contxt") + "2024-05-10,5,5\n",
            r"no column 'ContextTokens' \(azure format\).*Contxt",
        ),
        ("mooncake", jsonl({"timestamp": 0, "input_length": 3}), "no column 'output_length'"),
        ("burstgpt", OURS + "0,1,1\n", "no column 'Timestamp'"),
        ("vllm_bench", "[]", "not a JSON object"),
        ("jsonl", OURS + "0,1,1\n", "line 1 is not complete JSON"),
        ("bugrstgpt", OURS, "unknown trace format 'bugrstgpt': did you mean 'burstgpt'"),
    ],
)
def test_a_format_that_is_asked_for_must_be_there(write, format, content, message):
    with pytest.raises(UserError, match=message):
        load_workload(write("t", content), format=format)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        load_workload(tmp_path / "none.csv")
    with pytest.raises(UserError, match="is a directory"):
        load_workload(tmp_path)


requests = st.lists(
    st.tuples(st.floats(0, 1e6), st.integers(1, 10**6), st.integers(1, 10**6), st.integers(0, 5)),
    min_size=1,
    max_size=30,
)


@settings(max_examples=60)
@given(requests, st.sampled_from(["w.csv", "w.jsonl"]))
def test_saving_and_loading_gives_the_same_workload(tmp_path_factory, requests, name):
    requests = sorted(requests)
    arrival_s, inputs, outputs, session = (np.array(column) for column in zip(*requests, strict=True))
    # Ids along a chain: request i has the first few of 0, 1, 2, …
    rows = tuple(np.arange(min(n // 100, 5)) for n in inputs)
    workload = Workload("w", arrival_s - arrival_s[0], inputs, outputs, rows, 100, session)
    path = tmp_path_factory.mktemp("saved") / name
    save_workload(workload, path)
    loaded = load_workload(path)
    # pandas before 3.1 reads decimals to within one unit in the last place.
    np.testing.assert_allclose(loaded.arrival_s, workload.arrival_s, rtol=3e-16)
    assert columns_of(loaded)[1:] == columns_of(workload)[1:]
    assert loaded.prefix_block_tokens == 100
    assert [row.tolist() for row in loaded.prefix_block_hashes] == [
        row.tolist() for row in workload.prefix_block_hashes
    ]
    _, expected = np.unique(session, return_inverse=True)
    _, found = np.unique(loaded.session, return_inverse=True)
    assert len(set(zip(expected.tolist(), found.tolist(), strict=True))) == len(set(expected.tolist()))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", "arrival_time,input_tokens,output_tokens\n1700000000000,1,1\n1700000001000,1,1\n", "arrival_time_ms"),
        ("t.csv", "arrival_s,input_tokens,output_tokens,input_tokens\n0,1,1,2\n", "two columns 'input_tokens'"),
        ("t.csv", "arrival_s,input_tokens,output_tokens\n0,1,1\n1e10,1,1\n", "at most 1e"),
        ("t.csv", "arrival_s,input_tokens,output_tokens,hash_ids\n0,100,1,inf\n", "not a list of ids"),
        ("t.jsonl", '{"arrival_s": 0, "input_tokens": 1, "output_tokens": 1' + "0" * 5000 + "}\n", "line 1"),
        ("t.jsonl", '{"arrival_s": 0, "input_tokens": 99, "output_tokens": 1, "hash_ids": Infinity}\n', "list of ids"),
        ("t.json", '{"input_lens": [1], "output_lens": [1], "start_times": [1' + "0" * 400 + "]}", "start_times"),
        ("t.json", '{"input_lens": [1, 1], "output_lens": [1, 1], "start_times": [0, 1e300]}', "at most 1e"),
        ("t.json", '{"input_lens": [1, 1], "output_lens": [1, 1], "request_rate": 1e-300}', "at most 1e"),
    ],
)
def test_absurd_numbers_are_refused(tmp_path, name, content, words):
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(UserError) as refusal:
        load_workload(file)
    assert words in str(refusal.value)
