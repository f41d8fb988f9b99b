"""Readers of served runs: three formats round trip, failures are counted, bad cells are named."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import UserError
from planner.external.readers import read_served_runs
from planner.external.served_run import ServedRun

SECONDS = st.floats(0.001, 60.0, allow_nan=False)


@st.composite
def requests(draw):
    """Rows of (arrival, input, output, ttft, gaps, failed), at least one of them answered."""
    n = draw(st.integers(1, 12))
    rows = []
    for _ in range(n):
        output = draw(st.integers(1, 6))
        gaps = draw(st.lists(SECONDS, min_size=output - 1, max_size=output - 1))
        rows.append((draw(SECONDS), draw(st.integers(1, 9000)), output, draw(SECONDS), gaps, draw(st.booleans())))
    rows[draw(st.integers(0, n - 1))] = (1.0, 10, 2, 0.5, [0.25], False)
    return rows


def detail(rows, start_times=True, **more):
    """The object that `vllm bench serve --save-detailed` writes."""
    result = {
        "request_throughput": 1.0,
        "request_rate": "inf",
        "input_lens": [row[1] for row in rows],
        "output_lens": [0 if row[5] else row[2] for row in rows],
        "ttfts": [0.0 if row[5] else row[3] for row in rows],
        "itls": [[] if row[5] else row[4] for row in rows],
        "generated_texts": ["" for _ in rows],
        "errors": ["timed out" if row[5] else "" for row in rows],
    }
    if start_times:
        result["start_times"] = [1e5 + row[0] for row in rows]
    return result | more


def check(run: ServedRun, rows) -> None:
    """The run is the rows that were answered, by arrival."""
    answered = sorted((row for row in rows if not row[5]), key=lambda row: row[0])
    start = answered[0][0]
    assert len(run) == len(answered)
    assert run.num_failed == len(rows) - len(answered)
    assert run.arrival_s == pytest.approx([row[0] - start for row in answered], abs=1e-9)
    assert run.input_tokens.tolist() == [row[1] for row in answered]
    assert run.output_tokens.tolist() == [row[2] for row in answered]
    assert run.ttft_s == pytest.approx([row[3] for row in answered], abs=1e-9)
    assert run.e2el_s == pytest.approx([row[3] + sum(row[4]) for row in answered], abs=1e-9)


def written(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@settings(max_examples=60, deadline=None)
@given(rows=requests(), appended=st.booleans())
def test_vllm_result_round_trips(tmp_path_factory, rows, appended):
    path = tmp_path_factory.mktemp("vllm") / "result.json"
    text = json.dumps(detail(rows))
    path.write_text(f"{text}\n{text}\n" if appended else text)
    runs = read_served_runs(path)
    assert len(runs) == (2 if appended else 1)
    # Distinct arrivals only: the order of equal ones is not told.
    if len({row[0] for row in rows}) == len(rows):
        for run in runs:
            check(run, rows)
            gaps = [row[4] for row in sorted((row for row in rows if not row[5]), key=lambda row: row[0])]
            assert [itl.tolist() for itl in run.itls] == gaps


@settings(max_examples=60, deadline=None)
@given(rows=requests(), as_csv=st.booleans(), durations=st.booleans(), unit=st.sampled_from(["s", "ms"]))
def test_request_table_round_trips(tmp_path_factory, rows, as_csv, durations, unit):
    if len({row[0] for row in rows}) != len(rows):
        return
    factor = 1000.0 if unit == "ms" else 1.0
    table = []
    for arrival, inputs, outputs, ttft, gaps, failed in rows:
        e2el = ttft + sum(gaps)
        first, last = (ttft, e2el) if durations else (arrival + ttft, arrival + e2el)
        names = (f"ttft_{unit}", f"e2el_{unit}") if durations else (f"first_token_{unit}", f"last_token_{unit}")
        row = {f"arrival_{unit}": arrival * factor, "prompt_tokens": inputs, "output_tokens": 0 if failed else outputs}
        row |= {names[0]: first * factor, names[1]: last * factor}
        table.append(row)
    path = tmp_path_factory.mktemp("table") / ("run.csv" if as_csv else "run.jsonl")
    if as_csv:
        lines = [",".join(table[0]), *(",".join(repr(cell) for cell in row.values()) for row in table)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    (run,) = read_served_runs(path)
    check(run, rows)


def test_sglang_lines_have_no_send_times(tmp_path):
    rows = [(0.0, 10, 3, 0.5, [0.1, 0.1], False), (0.0, 20, 1, 0.7, [], False)]
    at_once = detail(rows, start_times=False, backend="sglang", max_concurrency=None)
    (run,) = read_served_runs(written(tmp_path, "sglang.jsonl", json.dumps(at_once) + "\n"))
    assert run.arrival_s.tolist() == [0.0, 0.0]
    assert "all requests were sent at once" in run.notes[0]
    assert run.tpot_s[0] == pytest.approx(0.1) and np.isnan(run.tpot_s[1])
    for changed in ({"request_rate": 4.0}, {"max_concurrency": 8}):
        with pytest.raises(UserError, match="no 'start_times'"):
            read_served_runs(written(tmp_path, "sglang.jsonl", json.dumps(at_once | changed)))


def test_clocks_are_tied_by_the_soonest_queued_request(tmp_path):
    # The wall clock is 1,000,000,100 s ahead; the second request was queued at once, the first 0.3 s late.
    rows = [
        {"input_toks": 5, "output_toks": 3, "arrival_time": 1e9 + 100.0, "queued_ts": 0.3, "scheduled_ts": 0.4}
        | {"first_token_ts": 0.9, "last_token_ts": 1.4},
        {"input_toks": 5, "output_toks": 3, "arrival_time": 1e9 + 101.0, "queued_ts": 1.0, "scheduled_ts": 1.1}
        | {"first_token_ts": 1.5, "last_token_ts": 2.0},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run,) = read_served_runs(written(tmp_path, "engine.jsonl", text))
    assert run.ttft_s == pytest.approx([0.9, 0.5], abs=1e-6)
    assert run.scheduled_s - run.arrival_s == pytest.approx([0.4, 0.1], abs=1e-6)
    assert "different clocks" in run.notes[0]
    without = "".join(json.dumps({k: v for k, v in row.items() if k != "queued_ts"}) + "\n" for row in rows)
    with pytest.raises(UserError, match="arrival_time and first_token_ts are of different clocks"):
        read_served_runs(written(tmp_path, "engine.jsonl", without))


GOOD = [(0.0, 10, 2, 0.5, [0.25], False), (1.0, 10, 2, 0.5, [0.25], False)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ttfts": [0.5, "x"]}, "ttfts[1] is 'x'"),
        ({"ttfts": [0.5, -1.0]}, "ttfts[1] is -1.0"),
        ({"ttfts": [0.5]}, "2 output_lens but 1 ttfts"),
        ({"itls": [[0.1], [None]]}, "itls[1][0] is None"),
        ({"itls": [[0.1], 3]}, "itls[1] is not a list"),
        ({"itls": None}, "itls is not a list"),
        ({"input_lens": [10, 0]}, "input_lens[1] is 0"),
        ({"output_lens": [2, 2.5]}, "output_lens[1] is 2.5"),
        ({"output_lens": [0, 0]}, "no request with an answer"),
        ({"output_lens": []}, "is empty"),
        ({"start_times": [1.0, None]}, "start_times[1] is None"),
    ],
)
def test_bad_results_are_named_in_one_sentence(tmp_path, change, words):
    with pytest.raises(UserError) as caught:
        read_served_runs(written(tmp_path, "result.json", json.dumps(detail(GOOD) | change)))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_result_without_details_says_how_to_get_them(tmp_path):
    summary = {"request_throughput": 1.0, "output_lens": [1], "input_lens": [1], "errors": [""]}
    with pytest.raises(UserError, match=r"no 'ttfts'.*--save-detailed.*--output-details"):
        read_served_runs(written(tmp_path, "result.json", json.dumps(summary)))


def test_a_broken_line_is_named(tmp_path):
    good = json.dumps(detail(GOOD))
    with pytest.raises(UserError, match=r"result\.jsonl line 2 is not complete JSON"):
        read_served_runs(written(tmp_path, "result.jsonl", f'{good}\n{{"input_lens": [\n'))
    second = json.dumps(detail(GOOD) | {"ttfts": [0.5, None]})
    with pytest.raises(UserError, match=r"result\.jsonl line 2: ttfts\[1\] is None"):
        read_served_runs(written(tmp_path, "result.jsonl", f"{good}\n{second}\n"))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("2.0,10,3,1.5,4.0", ("line 3", "first_token_s lies 0.5 s before arrival_s")),
        ("2.0,10,3,2.5,2.25", ("line 3", "last_token_s lies 0.25 s before first_token_s")),
        ("2.0,10.5,3,2.5,3.0", ("line 3", "input_tokens is '10.5'")),
        ("later,10,3,2.5,3.0", ("line 3", "arrival_s is 'later'")),
    ],
)
def test_bad_rows_are_named(tmp_path, row, words):
    text = f"arrival_s,input_tokens,output_tokens,first_token_s,last_token_s\n0.0,10,3,0.5,1.0\n{row}\n"
    with pytest.raises(UserError) as caught:
        read_served_runs(written(tmp_path, "run.csv", text))
    for word in words:
        assert word in str(caught.value)


def test_a_table_without_tokens_times_says_which(tmp_path):
    with pytest.raises(UserError, match="no column for first tokens"):
        read_served_runs(written(tmp_path, "run.csv", "arrival_s,input_tokens,output_tokens\n0,1,1\n"))
    with pytest.raises(UserError, match="no request with an answer"):
        text = "arrival_s,input_tokens,output_tokens,ttft_s,e2el_s\n0,1,0,,\n"
        read_served_runs(written(tmp_path, "run.csv", text))


# ---- dates, and files of another kind ------------------------------------------------------------------------------

DATED = [
    {"arrival": "2026-01-01T00:59:59.5Z", "first_token": "2026-01-01 01:00:00+00:00", "input_tokens": 10}
    | {"last_token": "2026-01-01T02:00:00.750000+01:00", "output_tokens": 3},
    {"arrival": "2026-01-01T01:00:01", "first_token": "2026-01-01T01:00:01.000001Z", "input_tokens": 10}
    | {"last_token": "2026-01-01T01:00:03Z", "output_tokens": 3},
]


def as_csv_text(rows) -> str:
    return "\n".join([",".join(rows[0]), *(",".join(str(cell) for cell in row.values()) for row in rows)]) + "\n"


def as_jsonl_text(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(("name", "text_of"), [("t.csv", as_csv_text), ("t.jsonl", as_jsonl_text)])
def test_instants_may_be_dates(tmp_path, name, text_of):
    (run,) = read_served_runs(written(tmp_path, name, text_of(DATED)))
    assert run.arrival_s == pytest.approx([0.0, 1.5], abs=1e-9)
    assert run.ttft_s == pytest.approx([0.5, 1e-6], abs=1e-9)
    assert run.e2el_s == pytest.approx([1.25, 2.0], abs=1e-9)
    durations = [{**row, "ttft_ms": 500, "e2el_s": 2.0} for row in DATED]
    for row in durations:
        del row["first_token"], row["last_token"]
    (run,) = read_served_runs(written(tmp_path, name, text_of(durations)))
    assert run.ttft_s == pytest.approx([0.5, 0.5]) and run.e2el_s == pytest.approx([2.0, 2.0])


@pytest.mark.parametrize(("name", "text_of"), [("t.csv", as_csv_text), ("t.jsonl", as_jsonl_text)])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arrival": 5.5}, "line 3: arrival is '?5.5'?, which is not an ISO 8601 date as on other lines"),
        ({"arrival": "2026"}, "line 3: arrival is .*2026.*, which is not an ISO 8601 date"),
        ({"first_token": "noon"}, "line 3: first_token is .*noon.*, which is not an ISO 8601 date"),
    ],
)
def test_dates_and_numbers_do_not_mix(tmp_path, name, text_of, change, words):
    text = text_of([DATED[0], DATED[1] | change])
    words = words if name == "t.csv" else words.replace("line 3", "line 2")
    with pytest.raises(UserError, match=words):
        read_served_runs(written(tmp_path, name, text))
    numbers = [row | {"first_token": 3.0} for row in DATED]
    with pytest.raises(UserError, match="arrival has ISO 8601 dates and first_token numbers; write both alike"):
        read_served_runs(written(tmp_path, name, text_of(numbers)))


def test_a_cell_that_is_a_list_is_no_date(tmp_path):
    rows = [row | {"arrival": [1]} for row in DATED]
    with pytest.raises(UserError, match="arrival"):
        read_served_runs(written(tmp_path, "t.jsonl", as_jsonl_text(rows)))


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("memwall-external-calibration", "is a calibration of `memwall calibrate-from`, not a benchmark; it belongs"),
        ("memwall-profile", "is a profile of `memwall calibrate`, not a benchmark; it belongs behind --profile"),
        ("memwall-validation", "is what `memwall validate --json` wrote, not a benchmark; give the records"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, indent, kind, words):
    text = json.dumps({"version": 1, "kind": kind, "input_lens": []}, indent=indent)
    with pytest.raises(UserError, match=f"a.json {words}"):
        read_served_runs(written(tmp_path, "a.json", text))


def test_json_over_several_lines(tmp_path):
    for document, shape in (({"plans": []}, "object"), ([{"arrival_s": 0}], "array")):
        with pytest.raises(UserError, match=f"a.json is one JSON {shape} over several lines, and no benchmark; wanted"):
            read_served_runs(written(tmp_path, "a.json", json.dumps(document, indent=1)))
    text = json.dumps(detail(GOOD), indent=1)
    check(read_served_runs(written(tmp_path, "a.json", text))[0], GOOD)
    line = text[: len(text) // 2].count("\n") + 1
    with pytest.raises(UserError, match=f"a.json line {line} is not complete JSON"):
        read_served_runs(written(tmp_path, "a.json", text[: len(text) // 2]))
    # A column of that name makes no request another kind of file.
    rows = [{"kind": "chat", "arrival_s": 0, "input_tokens": 1, "output_tokens": 2, "ttft_s": 1, "e2el_s": 2}]
    assert len(read_served_runs(written(tmp_path, "a.jsonl", as_jsonl_text(rows)))[0]) == 1


def test_a_ramp_up_without_send_times_is_not_all_at_once(tmp_path):
    ramp = {"ramp_up_strategy": "linear", "ramp_up_start_rps": 1, "ramp_up_end_rps": 9}
    text = json.dumps(detail(GOOD, start_times=False) | ramp)
    with pytest.raises(UserError, match=r"ramp_up_strategy 'linear' and has no 'start_times'.*--save-detailed"):
        read_served_runs(written(tmp_path, "result.json", text))
    (run,) = read_served_runs(written(tmp_path, "result.json", json.dumps(detail(GOOD) | ramp)))
    assert run.arrival_s.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        # Both requests of GOOD take 0.75 s: sent at once, nothing is left for the rest of the minute.
        ({"start_times": None, "duration": 60.0}, "not all sent at once, as its request_rate says: duration is 60.0 s"),
        ({"start_times": [5e4, 5.1e4], "duration": 1.75}, "start_times span 1,000.0 s, but duration is 1.8 s"),
        ({"ttfts": [500.0, 500.0], "duration": 1.75}, "a request takes 500.2 s, but duration is 1.8 s"),
        ({"start_times": [1767225600000, 1767225601000]}, "start_times[0] is 1767225600000, which is no time in sec"),
    ],
)
def test_times_that_contradict_their_benchmark_are_refused(tmp_path, change, words):
    with pytest.raises(UserError) as caught:
        read_served_runs(written(tmp_path, "result.json", json.dumps(detail(GOOD) | change)))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "duration"),
    [({}, 1.75), ({"start_times": None}, 0.76), ({"start_times": None, "errors": ["", "timed out"]}, 60.0)],
)
def test_a_duration_that_goes_with_the_requests_is_no_fault(tmp_path, change, duration):
    text = json.dumps(detail(GOOD) | change | {"duration": duration})
    assert len(read_served_runs(written(tmp_path, "result.json", text))) == 1


@pytest.mark.parametrize(
    ("column", "at", "unit"),
    [
        ("timestamp", 1767225600014, "ms"),
        ("timestamp", 1767225600014000, "us"),
        ("start_time", 1767225600014000000, "ns"),
        ("timestamp_ms", 1767225600014000000, "ns"),
    ],
)
def test_an_epoch_in_another_unit_than_its_column_is_refused(tmp_path, column, at, unit):
    text = f"{column},ttft_s,e2el_s,input_tokens,output_tokens\n1,0.1,0.2,5,5\n{at},0.1,0.2,5,5\n"
    with pytest.raises(UserError, match=rf"run\.csv line 3: {column} is {at}.*one in {unit}; end its name in _{unit}$"):
        read_served_runs(written(tmp_path, "run.csv", text))
    right = f"timestamp_{unit},ttft_s,e2el_s,input_tokens,output_tokens\n{at},0.1,0.2,5,5\n"
    assert len(read_served_runs(written(tmp_path, "run.csv", right))[0]) == 1


def test_seconds_since_1970_are_seconds(tmp_path):
    text = "timestamp,ttft,e2el,input_tokens,output_tokens\n1767225600.5,0.1,0.2,5,5\n1767225601,0.1,0.2,5,5\n"
    (run,) = read_served_runs(written(tmp_path, "run.csv", text))
    assert run.arrival_s == pytest.approx([0.0, 0.5])


def test_the_model_is_what_the_benchmark_asked_for(tmp_path):
    for model in ("meta-llama/Llama-3.1-8B-Instruct", None):
        (run,) = read_served_runs(written(tmp_path, "result.json", json.dumps(detail(GOOD, model_id=model))))
        assert run.model == model
