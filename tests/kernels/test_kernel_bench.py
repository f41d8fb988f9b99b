"""The benchmark command without a GPU: statistics, verdicts, the record, the table, the figures, bad input.

Nothing about times is asserted. That every case runs is asked of small ones, under the interpreter.
"""

import contextlib
import importlib.util
import json
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend

from kernels import skinny
from kernels.bench import __main__ as command
from kernels.bench import cases, peers, run, tables, timing, works
from kernels.bench.batches import kv_bytes, random_cache
from kernels.bench.results import (
    OURS,
    BenchError,
    Figure,
    Record,
    Row,
    Target,
    Timing,
    check_writable,
    limits_of,
    read_record,
    write_record,
)
from kernels.pages import PageLayout
from kernels.reference.attention import attention
from kernels.reference.pages import dequantise, gather, rotate
from kernels.reference.sampling import processed_probs

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")


def limit_rows() -> list[Row]:
    """4 TB/s and 700 TFLOP/s, the latter the better of two."""
    return [
        Row("limits", "copy", {"limit": "copy"}, bytes=4e9, timings={"torch": Timing((1e-3, 1.1e-3, 0.9e-3), 2)}),
        Row("limits", "matmul 8192³", {"limit": "matmul"}, flops=7e11, timings={"torch": Timing((1e-3,), 2)}),
        Row("limits", "matmul 4096³", {"limit": "matmul"}, flops=6e11, timings={"torch": Timing((1e-3,), 2)}),
    ]


def decode_row() -> Row:
    """800 MB in 250 µs are 3.2 TB/s, 80 % of the copy rate."""
    return Row(
        "decode",
        "decode bfloat16 16 × 8,192",
        {"kv_dtype": "bfloat16", "context": 8192},
        flops=1e9,
        bytes=8e8,
        timings={OURS: Timing((250e-6, 240e-6, 260e-6), 4), "cudnn": Timing((275e-6,), 4, "events")},
        absent={"flex": "TimeoutError: not ready after 90 s"},
        targets=(Target("share", 0.9, "copy"), Target("speedup", 1.0, "cudnn"), Target("speedup", 1.3, "flex")),
        note="a note",
    )


@pytest.fixture
def record() -> Record:
    prefill = Row(
        "prefill",
        "prefill hd 128",
        {"length": 2048},
        flops=2.8e11,
        bytes=3e8,
        timings={OURS: Timing((500e-6,), 2), "fa2": Timing((700e-6,), 2), "cudnn": Timing((450e-6,), 2)},
        targets=(Target("speedup", 1.3, "fa2"), Target("speedup", 0.75, "cudnn")),
    )
    broken = Row("decode", "decode int4", absent={OURS: "RuntimeError: no"}, targets=(Target("speedup", 2.7, "bf16"),))
    memory = Row("memory", "memory", values={"exponent": 1.0}, targets=(Target("value", 1.02, "exponent", True),))
    return Record(
        command="python -m kernels.bench",
        commit="abc1234",
        date="2026-11-22T00:00:00+00:00",
        quick=False,
        environment={"gpu": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "driver": "580", "cudnn": 91900},
        rows=[*limit_rows(), prefill, decode_row(), broken, memory],
        clocks={
            "prefill": {"sm_clock_mhz": 1980.0, "memory_clock_mhz": 3201.0, "power_w": 700.0, "temperature_c": 60.0},
            "decode": {"absent": "nvidia-smi was not found"},
        },
    )


# ---- statistics and verdicts ---------------------------------------------------------------------------------------


def test_timing_statistics():
    timing = Timing((4.0, 1.0, 2.0, 3.0, 5.0), calls=1)
    assert timing.median_s == 3.0
    assert timing.spread == pytest.approx((4.0 - 2.0) / 3.0)
    assert Timing((7.0,), calls=1).spread == 0.0


@given(st.floats(1.0, 1e10))
def test_rotation_outgrows_the_l2(set_bytes):
    sets = timing.num_sets(set_bytes)
    assert sets >= 2
    assert (sets - 1) * set_bytes >= timing.ROTATED_BYTES


@given(st.floats(1e-7, 1.0), st.integers(1, 200))
def test_graphs_are_long_and_use_all_sets_equally(call_s, sets):
    calls = timing.calls_per_graph(call_s, sets)
    assert calls % sets == 0
    assert 0 < calls <= max(timing.MAX_CALLS, sets)
    if calls + sets <= timing.MAX_CALLS:
        assert calls * call_s >= timing.MIN_GRAPH_S * (1 - 1e-9)


def test_limits_are_the_best_seen():
    assert limits_of(limit_rows()) == pytest.approx({"copy": 4e12, "matmul": 7e14})
    assert limits_of([decode_row()]) == {}


def test_figures():
    share, speedup, absent = decode_row().figures({"copy": 4e12})
    assert (share.value, share.met) == (pytest.approx(0.8), False)
    assert (speedup.value, speedup.met) == (pytest.approx(1.1), True)
    assert (absent.value, absent.met) == (None, None)


@pytest.mark.parametrize(
    ("target", "value", "met"),
    [
        (Target("speedup", 1.1, "cudnn"), 1.1, True),  # reached exactly
        (Target("slowdown", 0.9, "cudnn", at_most=True), 1 / 1.1, False),
        (Target("seconds", 250e-6, at_most=True), 250e-6, True),
        (Target("seconds", 249e-6, at_most=True), 250e-6, False),
        (Target("share", 0.1, "matmul"), 4e12 / 1e13, True),
        (Target("value", 3.0, "growth", at_most=True), 2.0, True),
        (Target("value", 3.0, "growth"), 2.0, False),
        (Target("value", 3.0, "unknown"), None, None),
        (Target("share", 0.9, "unmeasured"), None, None),
    ],
)
def test_each_quantity(target, value, met):
    row = decode_row()
    row.targets, row.values = (target,), {"growth": 2.0}
    row.timings = {OURS: Timing((250e-6,), 1), "cudnn": Timing((275e-6,), 1)}
    (figure,) = row.figures({"copy": 4e12, "matmul": 1e13})
    assert figure.value == (None if value is None else pytest.approx(value))
    assert figure.met is met


def test_a_kernel_that_failed_meets_nothing(record):
    broken = next(row for row in record.rows if OURS in row.absent)
    assert broken.main is None
    assert broken.speedups() == {}
    assert broken.share_of_floor(record.limits) is None
    assert [figure.met for figure in broken.figures(record.limits)] == [None]


def test_share_of_floor_takes_what_bounds(record):
    rows = {row.name: row for row in record.rows}
    assert rows["decode bfloat16 16 × 8,192"].share_of_floor(record.limits) == pytest.approx(0.8)  # bytes
    assert rows["prefill hd 128"].share_of_floor(record.limits) == pytest.approx(0.8)  # FLOPs: 560 of 700


def test_share_of_a_floor_that_the_row_names():
    """800 MB in 250 µs are 64 % of reading at 5 TB/s; FLOPs count only where the floor has their limit."""
    limits = {"copy": 4e12, "read": 5e12, "matmul": 1e12}
    row = decode_row()
    row.floor = ("read",)
    assert row.share_of_floor(limits) == pytest.approx(0.64)
    row.floor = ("read", "matmul")  # 1 GFLOP at 1 TFLOP/s
    assert row.share_of_floor(limits) == pytest.approx(4.0)
    assert row.share_of_floor({"copy": 4e12}) is None


# ---- the record ----------------------------------------------------------------------------------------------------


def test_round_trip(record, tmp_path):
    path = tmp_path / "records" / "kernels.json"
    write_record(path, record)
    assert read_record(path) == record
    assert [p.name for p in path.parent.iterdir()] == ["kernels.json"]  # no temporary file is left


def test_the_record_says_it_all(record):
    document = json.loads(json.dumps(record.to_json()))
    assert {"version", "command", "commit", "date", "environment", "limits", "clocks", "results"} <= document.keys()
    row = next(row for row in document["results"] if row["suite"] == "decode")
    assert row["implementations"]["ours"] == {
        "median_s": 250e-6,
        "calls": 4,
        "method": "graph",
        "repetitions_s": [250e-6, 240e-6, 260e-6],
    }
    assert row["implementations"]["flex"] == {"absent": "TimeoutError: not ready after 90 s"}
    assert row["speedup_over"] == {"cudnn": pytest.approx(1.1)}
    assert [(f["reach"], f["met"]) for f in row["figures"]] == [(0.9, False), (1.0, True), (1.3, None)]


def test_records_from_before_floors_were_named(record):
    """Their rows have the usual one."""
    document = json.loads(json.dumps(record.to_json()))
    for row in document["results"]:
        del row["floor"]
    assert Record.from_json(document) == record


def test_the_committed_record_is_readable():
    committed = read_record(ROOT / "records" / "kernels_h200.json")
    text = tables.render(committed)
    assert all(row.name in text for row in committed.rows)


def test_writing_leaves_the_old_record_if_it_fails(record, tmp_path, monkeypatch):
    path = tmp_path / "kernels.json"
    path.write_text("old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(BenchError, match=r"^cannot write .*kernels\.json: No space left on device$"):
        write_record(path, record)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("kernels.json", "old")]


def test_writing_keeps_links_and_devices(record, tmp_path):
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.touch()
    link.symlink_to(target)
    write_record(link, record)
    assert link.is_symlink()
    assert read_record(target) == record
    write_record(Path("/dev/null"), record)
    assert Path("/dev/null").is_char_device()


def test_unwritable_is_known_before_measuring(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BenchError, match=r"^cannot write "):
        check_writable(tmp_path / "file" / "record.json")
    with pytest.raises(BenchError, match="Is a directory"):
        check_writable(tmp_path)


# ---- table and figures ---------------------------------------------------------------------------------------------


def test_table(record):
    text = tables.render(record)
    for part in (
        "NVIDIA H200, torch 2.11.0, triton 3.6.0, driver 580, cudnn 91900; commit abc1234",
        "250 µs",
        "3.2 TB/s",
        "560 TFLOP/s",
        "≥ 90% of copy: 80.00% MISSED; ≥ 1 × cudnn: 1.100 × met; ≥ 1.3 × flex: - not measured",
        "decode bfloat16 16 × 8,192, flex: TimeoutError: not ready after 90 s",
        "decode: a note",
        "SM 1980.0 MHz",
        "clocks unknown: nvidia-smi was not found",
        "4 of 7 figures met",
        "MISSED: decode bfloat16 16 × 8,192, ≥ 90% of copy (80.00%)",
    ):
        assert part in text


def test_rows_of_linear_layers_say_what_the_engine_calls(record):
    for engine in (OURS, "cublas"):
        row = decode_row()
        row.shape, row.floor, row.name = {"engine": engine}, ("read",), f"linear, {engine}"
        record.rows.append(row)
    limit = Row("limits", "sum", {"limit": "read"}, bytes=8e9, timings={"torch": Timing((1e-3,), 2)})
    record.rows.append(limit)
    lines = {line.split("  ")[0]: line for line in tables.render(record).splitlines()}
    for engine in (OURS, "cublas"):
        assert f"engine: {engine}" in lines[f"linear, {engine}"]
        assert " 40% " in lines[f"linear, {engine}"]  # 3.2 TB/s of 8
        assert f"engine: {engine}" in tables.progress(next(r for r in record.rows if engine in r.name), record.limits)
    assert "engine" not in lines["decode bfloat16 16 × 8,192"]


def test_table_of_an_empty_or_stopped_record(record):
    record.rows, record.clocks, record.stopped = [], {}, "the GPU fell off the bus"
    text = tables.render(record)
    assert "0 of 0 figures met" in text
    assert "the run was stopped: the GPU fell off the bus" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.09e-5, "20.9 µs"), (9.996e-4, "1 ms"), (1.234e-3, "1.23 ms"), (1.5, "1.5 s")]
)
def test_durations(seconds, text):
    assert tables.duration(seconds) == text


@pytest.mark.parametrize(
    ("target", "value", "text"),
    [
        (Target("seconds", 20.9e-6, at_most=True), 19e-6, "≤ 20.9 µs: 19 µs"),
        (Target("slowdown", 1.05, "q 1", at_most=True), 1.02, "time ≤ 1.05 × q 1: 1.020 ×"),
        (Target("value", 1.02, "exponent", at_most=True), 1.0, "exponent ≤ 1.02: 1"),
    ],
)
def test_figures_in_words(target, value, text):
    assert f"{target}: {tables.amount(Figure(target, value))}" == text


def test_plots(record, tmp_path):
    pytest.importorskip("plotly")
    from kernels.bench import plots

    roofline = plots.roofline(record)
    limit, *suites = roofline.data
    assert max(limit.y) == pytest.approx(700)
    assert limit.y[0] / limit.x[0] == pytest.approx(4)  # TB/s
    assert {trace.name for trace in suites} == {"prefill", "decode"}
    speedup = {trace.name: trace for trace in plots.speedup(record).data}
    assert speedup["over fa2"].x == (pytest.approx(1.4),)
    assert "over flex" not in speedup
    assert set(speedup["to reach"].x) == {1.3, 0.75, 1.0}
    for path in plots.plot(record, tmp_path / "figures"):
        assert path.stat().st_size < 200_000


def test_plots_of_nothing(record):
    pytest.importorskip("plotly")
    from kernels.bench import plots

    record.rows = [row for row in record.rows if row.suite == "memory"]
    with pytest.raises(BenchError, match="no roofline"):
        plots.roofline(record)
    with pytest.raises(BenchError, match="no speed-up"):
        plots.speedup(record)


# ---- the command line ----------------------------------------------------------------------------------------------


def sentence(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "decod"], "--suite has 'decod'; it must be some of limits, prefill, decode"),
        (["--suite", ""], "--suite has ''"),
        (["--fast"], "unrecognized arguments: --fast"),
        (["--output"], "--output: expected one argument"),
        (["--plot-from", "missing.json"], "cannot read missing.json: No such file or directory"),
        (["--plot-from", "a.json", "--output", "b.json"], "there is no record for --output"),
        (["--plot-from", "a.json", "--suite", "decode"], "measures nothing, so --suite cannot go with it"),
        (["--plot-from", "a.json", "--quick"], "measures nothing, so --quick cannot go with it"),
        (["--plot-from", "a.json", "--commit", "abc"], "measures nothing, so --commit cannot go with it"),
        (["--output", "/dev/null/record.json"], "cannot write /dev/null/record.json"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words, capsys):
    assert command.main(arguments) == 2
    assert words in sentence(capsys)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("\xff", "is not JSON"),
        ("[]", "it is no record of python -m kernels.bench"),
        ("{}", "'version' is missing"),
        ('{"version": 99}', "version 99"),
        ('{"version": 1, "results": [{"suite": "decode"}]}', "'implementations' is missing"),
        ('{"version": 1, "results": 7}', "it is no record"),
        ('{"version": 1, "results": [{"implementations": {}, "name": "x", "floor": [[]]}]}', "which names no limits"),
    ],
)
def test_bad_records_are_one_sentence(text, words, tmp_path, capsys):
    path = tmp_path / "record.json"
    path.write_text(text, encoding="latin-1")
    assert command.main(["--plot-from", str(path)]) == 2
    assert words in sentence(capsys)


@pytest.mark.parametrize("times", [[], [0.0], [-1.0], ["1"], [float("nan")], [float("inf")], None])
def test_a_record_without_times_is_one_sentence(record, times, tmp_path, capsys):
    document = record.to_json()
    document["results"][0]["implementations"]["torch"]["repetitions_s"] = times
    path = tmp_path / "record.json"
    path.write_text(json.dumps(document))
    assert command.main(["--plot-from", str(path)]) == 2
    assert "it is no record of python -m kernels.bench" in sentence(capsys)


@NO_GPU
def test_without_a_gpu_it_is_one_sentence(capsys, tmp_path):
    assert command.main(["--quick", "--output", str(tmp_path / "record.json")]) == 2
    assert "no CUDA device was found" in sentence(capsys)
    assert list(tmp_path.iterdir()) == []


def test_suites_run_in_their_order():
    assert command.suites("decode, prefill,limits") == ("limits", "prefill", "decode")


def test_a_record_is_shown_and_drawn_without_gpu_libraries(record, tmp_path):
    """By the interpreter's word: None in sys.modules makes an import fail."""
    write_record(tmp_path / "record.json", record)
    arguments = ["--plot-from", str(tmp_path / "record.json")]
    if importlib.util.find_spec("plotly"):
        arguments += ["--plot", str(tmp_path / "figures")]
    code = (
        "import sys; sys.modules |= {'torch': None, 'triton': None}; "
        f"from kernels.bench.__main__ import main; sys.exit(main({arguments}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "4 of 7 figures met" in done.stdout
    if "--plot" in arguments:
        assert {path.name for path in (tmp_path / "figures").iterdir()} >= {"roofline.html", "speedup.html"}


def test_figures_without_plotly_are_one_sentence(record, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    write_record(tmp_path / "record.json", record)
    assert command.main(["--plot-from", str(tmp_path / "record.json"), "--plot", str(tmp_path)]) == 2
    assert "figures need plotly, which is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["/dev/null/figures", "/dev/null"])
def test_a_folder_for_figures_is_tried_before_measuring(folder, made_up, tmp_path, capsys):
    pytest.importorskip("plotly")
    made_up.setattr(run, "run", lambda *_, **__: pytest.fail("it was measured"))
    assert command.main(["--suite", "decode", "--plot", folder]) == 2
    assert f"cannot write {folder}/roofline.html" in sentence(capsys)


def test_plotly_is_looked_for_before_measuring(made_up, tmp_path, capsys):
    made_up.setattr(run, "run", lambda *_, **__: pytest.fail("it was measured"))
    made_up.setitem(sys.modules, "plotly", None)
    made_up.setitem(sys.modules, "plotly.graph_objects", None)
    assert command.main(["--suite", "decode", "--plot", str(tmp_path)]) == 2
    assert "figures need plotly, which is not installed" in sentence(capsys)


def test_the_command_names_no_folder_of_this_machine():
    assert command._as_committed(["--output", "/somewhere/else/r.json", "--quick"]) == ["--output", "r.json", "--quick"]


def test_clocks():
    assert timing.parse_clocks("1980, 3201, 698.25, 61, 0x0000000000000004\n") == {
        "sm_clock_mhz": 1980.0,
        "memory_clock_mhz": 3201.0,
        "power_w": 698.25,
        "temperature_c": 61.0,
        "clock_limits": "0x0000000000000004",
    }
    assert timing.parse_clocks("No devices were found\n") == {"absent": "nvidia-smi answered 'No devices were found'"}


def test_reasons_are_one_line():
    assert timing.reason(ValueError("first\nsecond")) == "ValueError: first"
    assert timing.reason(MemoryError()) == "MemoryError"


def test_time_limit():
    with pytest.raises(TimeoutError, match="not ready after 1 s"), timing.time_limit(1):
        while True:
            pass
    with timing.time_limit(1):
        pass


# ---- the cases -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Few heads, two sets, and torch's plain attention for backends that a CPU has not."""
    monkeypatch.setattr(timing, "ROTATED_BYTES", 1.0)
    for name, value in {"Q_HEADS": 4, "KV_HEADS": 2, "HEAD_DIM": 64}.items():
        monkeypatch.setattr(works, name, value)
    if not torch.cuda.is_available():
        for name in peers.SDPA:
            monkeypatch.setitem(peers.SDPA, name, SDPBackend.MATH)


@pytest.fixture
def bench(device, dtype) -> works.Bench:
    torch.manual_seed(0)
    return works.Bench(device, dtype)


def run_all(work: works.Work) -> None:
    """Every implementation runs on every set, and those that should agree do."""
    assert len(work.sets) >= 2
    for call in work.implementations.values():
        for one in work.sets:
            call(one)
    for name in work.same:
        work.implementations[name](work.sets[0])  # or `differences` would take a failure for nothing
    assert run.differences(work) == {}


@pytest.mark.parametrize("quick", [False, True])
def test_every_suite_has_cases_and_every_row_its_name(quick):
    found = [case for suite in command.SUITES for case in cases.cases(suite, quick)]
    assert all(cases.cases(suite, quick) for suite in command.SUITES)
    assert len({case.name for case in found}) == len(found)
    assert all(case.suite in command.SUITES for case in found)
    json.dumps([case.shape for case in found])


def test_the_shapes_of_the_issue():
    """The figures are asked of decode at 250 MB of KV or more, in bfloat16, and of int4 from 8 k to 128 k."""
    bf16 = PageLayout("bfloat16", cases.HEAD_DIM)
    for _, lengths in (*cases.DECODE, *cases.LADDER):
        assert kv_bytes(bf16, lengths, cases.KV_HEADS) >= 250e6
    assert kv_bytes(bf16, (8192,), 8) == 8192 * 8 * 128 * 2 * 2
    contexts = [max(lengths) for _, lengths in cases.LADDER]
    assert (contexts[0], contexts[-1]) == (8192, 131_072)
    assert {sum(lengths) for _, lengths in cases.LADDER} == {131_072}
    assert (min(cases.MIXED), max(cases.MIXED)) == (1, 131_072)
    assert (cases.MEMORY_LENGTHS[0], cases.MEMORY_LENGTHS[-1]) == (1024, 131_072)


def test_kv_bytes_of_low_bit():
    """129 tokens: two quantised pages, and one token that waits in 16 bits; of 127 all but a page."""
    layout = PageLayout("int4", 128)
    assert kv_bytes(layout, (129,), 1) == 2 * layout.page_bytes + 2 * 128 * 2
    assert kv_bytes(layout, (127,), 1) == layout.page_bytes + 63 * 2 * 128 * 2
    assert kv_bytes(PageLayout("int8", 128), (10,), 3) == 3 * 10 * (2 * 128 + 2 * 2)


@pytest.mark.parametrize("kv_dtype", ["float16", "fp8", "int8", "int4", "int2"])
def test_random_caches_hold_numbers(kv_dtype, device):
    layout = PageLayout(kv_dtype, 64)
    key, value = dequantise(random_cache(layout, 3, 2, device), layout)
    for x in (key, value):
        assert x.isfinite().all()
        assert 0.1 < x.std() < 10
    if kv_dtype == "int8":
        assert (layout.words_view(random_cache(layout, 3, 2, device)).view(torch.uint8) > 0).all()


def test_prefill_case(small, bench):
    run_all(works.prefill_work(bench, batch=2, length=48, q_heads=4, kv_heads=2, head_dim=64))


@pytest.mark.parametrize("lengths", [(100, 100), (70, 1, 65)])
def test_decode_case(lengths, small, bench):
    work = works.decode_work(bench, lengths=lengths)
    run_all(work)
    assert set(work.implementations) == {OURS, "fa2", "cudnn", "gathered"}
    assert work.flops == 4 * 4 * 64 * sum(lengths)


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_low_bit_and_verify_cases(kv_dtype, small, bench):
    run_all(works.low_bit_work(bench, kv_dtype=kv_dtype, lengths=(70, 65)))
    work = works.verify_work(bench, kv_dtype=kv_dtype, lengths=(70, 65), query_len=3)
    run_all(work)
    assert work.implementations[OURS](work.sets[0]).shape == (2 * 3, 4, 64)
    assert work.implementations["q 1"](work.sets[0]).shape == (2, 4, 64)


@pytest.mark.parametrize("kv_dtype", ["float16", "int8", "int4"])
@pytest.mark.parametrize("rope", [False, True])
def test_cache_cases(kv_dtype, rope, small, bench):
    kv_dtype = bench.kv_dtype if kv_dtype == "float16" else kv_dtype
    work = works.write_work(bench, kv_dtype=kv_dtype, lengths=(64, 64), rope=rope)
    for call in work.implementations.values():
        call(work.sets[0])
    batch, (_, key, _), _ = work.sets[0]
    if not rope:  # what was written is what was given
        pages = batch.block_tables[:, 0]
        written = dequantise(batch.cache, batch.layout, pages)[0].transpose(1, 2).flatten(0, 1)
        assert (written - key.float()).norm() < 0.15 * key.float().norm()


def test_dequantise_case(small, bench):
    work = works.dequantise_work(bench, kv_dtype="int4", lengths=(70, 64))
    work.implementations[OURS](work.sets[0])
    source, target = work.sets[0]
    ring = (source.residual, source.residual_slots, source.flushed_lens)
    expected = gather(source.cache, source.layout, source.block_tables, source.seq_lens, *ring)
    for b, (key, value) in enumerate(expected):
        for have, want in zip(target.gathered(b), (key, value), strict=True):
            torch.testing.assert_close(have[0].transpose(0, 1).float(), want, rtol=1e-2, atol=1e-2)


def test_elementwise_cases(small, bench):
    run_all(works.rms_norm_work(bench, tokens=5, hidden=192, residual=False))
    run_all(works.rms_norm_work(bench, tokens=5, hidden=192, residual=True))
    run_all(works.silu_mul_work(bench, tokens=5, intermediate=96))
    for norm in (False, True):
        run_all(works.rope_work(bench, tokens=5, norm=norm))


@pytest.mark.parametrize("rows", [1, 8])
def test_linear_cases(rows, small, bench):
    work = works.linear_work(bench, rows=rows, n=48, k=64)
    run_all(work)
    assert (work.bytes, work.flops) == (2 * 48 * 64, 2 * rows * 48 * 64)
    work = works.gate_up_work(bench, rows=rows, n=48, k=64)
    run_all(work)
    assert work.implementations[OURS](work.sets[0]).shape == (rows, 24)


def test_linear_suite_has_the_layers_and_the_engine_s_rule():
    """Llama-3.1-8B: 32 layers of these and the vocabulary, with the input embedding and the norms, are 8.03 G."""
    (qkv, out, gate_up, down, vocabulary) = (n * k for n, k in cases.LINEAR)
    assert 32 * (qkv + out + gate_up + down + 2 * 4096) + 2 * vocabulary + 4096 == 8_030_261_248
    found = cases.cases("linear")
    assert len(found) == 5 * 5 + 5
    for case in found:
        shape = case.shape
        is_ours = skinny.is_faster(shape["rows"], shape["n"], shape["k"])
        assert (shape["engine"] == OURS) == is_ours == bool(case.targets)


def test_fp8_activation_cases(small, bench):
    """Codes and scales are compared as the numbers that they stand for."""
    for work in (
        works.quantise_work(bench, tokens=5, hidden=192),
        works.silu_mul_fp8_work(bench, tokens=5, intermediate=96),
    ):
        run_all(work)
        ours = work.implementations[OURS]
        work.implementations[OURS] = lambda s, ours=ours: (ours(s)[0], 1.1 * ours(s)[1])
        assert "its result differs" in run.differences(work)[OURS]


def test_rms_norm_fp8_case(small, bench):
    """Each of the two adds to a residual of its own, so that they agree as often as they are compared."""
    work = works.rms_norm_fp8_work(bench, tokens=5, hidden=192)
    for _ in range(3):
        assert run.differences(work) == {}
    x, ours, two_steps = work.sets[0]
    torch.testing.assert_close(ours, two_steps, rtol=0, atol=0)
    assert (ours - works.rms_norm_fp8_work(bench, tokens=5, hidden=192).sets[0][1]).abs().max() > x.abs().max()
    for call in work.implementations.values():
        call(work.sets[1])


@pytest.mark.parametrize("rows", [3, 17, 300])
def test_fp8_product_case(rows, small, bench):
    work = works.product_fp8_work(bench, rows=rows, n=48, k=64)
    run_all(work)
    assert (work.bytes, work.flops) == ((48 * 64, None) if rows < 300 else (None, 2 * rows * 48 * 64))
    assert ("scaled_mm" in work.implementations) == (rows == 3)


@pytest.mark.parametrize("settings", cases.SAMPLING.values(), ids=cases.SAMPLING)
def test_sampling_cases(settings, small, bench):
    work = works.sample_work(*settings, bench, batch=2, vocab=100)
    run_all(work)
    tokens = {name: call(work.sets[0]) for name, call in work.implementations.items()}
    assert all(((found >= 0) & (found < 100)).all() for found in tokens.values())
    if settings[0] == 0.0:  # greedy, and both take a largest logit
        ours, torch_eager = (work.sets[0].gather(1, found[:, None]) for found in tokens.values())
        assert (ours == torch_eager).all()


def test_verify_drafts_case(small, bench):
    run_all(works.verify_drafts_work(bench, batch=2, vocab=100, num_drafts=3))


def test_sampling_peer_draws_what_the_reference_draws(bench):
    """The nucleus of top-k and top-p; frequencies of 4,000 draws within 5 standard errors."""
    logits = torch.randn(1, 12, device=bench.device) * 2
    expected = processed_probs(logits, *(torch.tensor([x], device=bench.device) for x in (0.7, 6, 0.8)))[0]
    tokens = peers.sample(logits.expand(4000, -1), 0.7, 6, 0.8)
    frequency = tokens.bincount(minlength=12) / 4000
    assert ((frequency - expected).abs() <= 5 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_verify_peer_draws_from_the_target(bench):
    """What speculative sampling is for: the first token is distributed as the target says, whatever the draft."""
    target, draft = (torch.randn(8, device=bench.device) for _ in range(2))
    probs = draft.softmax(-1).expand(4000, 1, -1)
    tokens = probs[:, 0].multinomial(1)
    emitted = peers.verify(tokens, probs, target.expand(4000, 2, -1))[:, 0]
    expected = target.softmax(-1)
    frequency = emitted.bincount(minlength=8) / 4000
    assert ((frequency - expected).abs() <= 5 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_rope_peer_is_the_reference(bench):
    x, angles = bench.randn(5, 3, 64), torch.rand(5, 32, device=bench.device)
    expected = rotate(x, angles.cos(), angles.sin(), torch.arange(5, device=bench.device))
    torch.testing.assert_close(peers.rope(x, angles.cos(), angles.sin()), expected)


def test_accuracy_case(small, bench):
    work = works.accuracy_work(bench, kv_dtype="int4", lengths=(1, 70))
    assert work.values["kernel over plain"] <= 2
    assert 0 < work.values["Gaussian"] < 1


def test_naive_attention_is_the_reference(bench):
    query, key, value = (bench.randn(1, heads, 9, 64).float() for heads in (4, 2, 2))
    flat = [x[0].transpose(0, 1) for x in (query, key, value)]
    expected, _ = attention(*flat, query_start=bench.ints([0, 9]))
    out = peers.naive_attention(query, key, value)[0].transpose(0, 1)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def test_trends():
    def int4(name, context, ours_s):
        timings = {OURS: Timing((ours_s,), 1), "bfloat16": Timing((3.0,), 1)}
        return Row("low-bit", f"decode int4 {name}", {"kv_dtype": "int4", "context": context}, timings=timings)

    rows = [int4(name, max(lengths), 1.0 + 0.1 * i) for i, (name, lengths) in enumerate(cases.LADDER)]
    (trend,) = cases.trends("low-bit", [*rows, int4("256 × 2,048", 2048, 9.0)])
    (figure,) = trend.figures({})
    assert figure.value == pytest.approx(1 / 1.4)
    assert figure.met is False
    assert trend.name == "decode int4, context 8,192 to 131,072"
    assert cases.trends("low-bit", rows[:1]) == cases.trends("decode", rows) == []

    memory = [Row("memory", "", {"length": n}, values={"ours_bytes": 8.0 * n}) for n in cases.MEMORY_LENGTHS]
    (trend,) = cases.trends("memory", memory)
    assert trend.values["exponent"] == pytest.approx(1.0)
    assert [figure.met for figure in trend.figures({})] == [True]


# ---- measuring, on a GPU that is not there -------------------------------------------------------------------------


class FakeEvent:
    def __init__(self, enable_timing=True):
        self.time_s = 0.0

    def record(self):
        self.time_s = time.perf_counter()

    def elapsed_time(self, other):
        return max(other.time_s - self.time_s, 1e-9) * 1e3


class FakeGraph:
    """Captures by running, and replays by doing nothing."""

    replays = 0

    def replay(self):
        FakeGraph.replays += 1


@pytest.fixture
def fake_gpu(monkeypatch):
    """torch.cuda as far as measuring needs it, with nothing behind it."""
    nothing = contextlib.nullcontext
    for name, fake in {
        "Event": FakeEvent,
        "Stream": lambda: types.SimpleNamespace(wait_stream=lambda other: None),
        "stream": lambda stream: nothing(),
        "current_stream": lambda: None,
        "current_device": lambda: 0,
        "CUDAGraph": FakeGraph,
        "graph": lambda graph: nothing(),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(timing.shutil, "which", lambda name: None)
    return monkeypatch


def test_implementations_take_turns(fake_gpu):
    calls = []
    implementations = {name: [lambda name=name: calls.append(name)] * 3 for name in ("a", "b")}
    stopwatch = timing.Stopwatch(rounds=3, replays=2)
    turns = []
    fake_gpu.setattr(timing._Turn, "take", lambda self, replays, original=timing._Turn.take: (
        turns.append((self, replays)), original(self, replays))[1])  # fmt: skip
    timings, absent = stopwatch.compare(implementations)
    assert absent == {}
    assert set(calls) == {"a", "b"}
    assert {name: len(t.repetitions_s) for name, t in timings.items()} == {"a": 6, "b": 6}
    assert all(t.calls % 3 == 0 and t.method == "graph" for t in timings.values())
    order = [turn for turn, replays in turns if replays == 2]
    assert order == [order[0], order[1], order[1], order[0], order[0], order[1]]
    assert stopwatch.clocks == {"absent": "nvidia-smi was not found"}


def test_a_peer_that_fails_is_absent_with_its_reason(fake_gpu):
    def fail():
        raise NotImplementedError("no such head size")

    timings, absent = timing.Stopwatch(1, 1).compare({"fine": [lambda: None], "broken": [fail]})
    assert set(timings) == {"fine"}
    assert absent == {"broken": "NotImplementedError: no such head size"}


def test_what_cannot_be_captured_is_timed_eagerly(fake_gpu, capsys):
    @contextlib.contextmanager
    def graph(graph):
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    fake_gpu.setattr(torch.cuda, "graph", graph)
    timings, _ = timing.Stopwatch(2, 1).compare({"eager": [lambda: time.sleep(1e-3)]})
    assert timings["eager"].method == "events"
    assert timings["eager"].median_s >= 1e-3
    assert "timed eagerly: RuntimeError" in capsys.readouterr().err


def given_cases() -> list[cases.Case]:
    """One that works, one that cannot be built, one whose result is not its peer's."""
    one = torch.ones(1)

    def fail(bench):
        raise RuntimeError("out of memory")

    def work(factor: float):
        calls = {OURS: lambda s: s * factor, "torch": lambda s: s.clone(), "other": lambda s: s + 1}
        return lambda bench: works.Work([one, one], calls, bytes=4e9, same=("torch",))

    limit = works.Work([one], {"torch": lambda s: s.clone()}, bytes=8e9)
    return [
        cases.Case("limits", "copy", {"limit": "copy"}, lambda bench: limit),
        cases.Case("decode", "good", {}, work(1.0), (Target("share", 1e-9, "copy"),)),
        cases.Case("decode", "unbuilt", {}, fail, (Target("speedup", 1.0, "torch"),)),
        cases.Case("decode", "wrong", {}, work(1.1), (Target("speedup", 1.0, "torch"),)),
    ]


@pytest.fixture
def made_up(fake_gpu):
    """A GPU and two suites that are not there."""
    fake_gpu.setattr(run, "cases", lambda suite, quick: [case for case in given_cases() if case.suite == suite])
    fake_gpu.setattr(run, "environment", lambda: {"gpu": "none"})
    fake_gpu.setattr(torch.cuda, "is_available", lambda: True)
    fake_gpu.delenv("TRITON_INTERPRET", raising=False)
    return fake_gpu


def test_a_run_from_the_command_line(made_up, tmp_path, capsys):
    path = tmp_path / "records" / "kernels.json"
    assert command.main(["--suite", "decode", "--quick", "--output", str(path), "--commit", "abc"]) == 0
    record = read_record(path)
    assert (record.commit, record.quick, record.stopped) == ("abc", True, "")
    assert record.command == "python -m kernels.bench --suite decode --quick --output kernels.json --commit abc"
    rows = {row.name: row for row in record.rows}
    assert list(rows) == ["copy", "good", "unbuilt", "wrong"]
    assert set(rows["good"].timings) == {OURS, "torch", "other"}
    assert [figure.met for figure in rows["good"].figures(record.limits)] == [True]
    assert rows["unbuilt"].absent == {OURS: "RuntimeError: out of memory"}
    assert rows["wrong"].absent == {OURS: "wrong: its result differs from that of torch by 0.1"}
    assert set(rows["wrong"].timings) == {"torch", "other"}  # what is wrong is not timed
    assert set(record.clocks) == {"limits", "decode"}
    assert "1 of 3 figures met" in capsys.readouterr().out


def test_a_run_stops_where_the_gpu_does(made_up, tmp_path, capsys):
    def fail():
        raise RuntimeError("an illegal memory access was encountered")

    made_up.setattr(torch.cuda, "synchronize", fail)
    path = tmp_path / "kernels.json"
    assert command.main(["--output", str(path)]) == 1
    record = read_record(path)
    assert [row.name for row in record.rows] == ["copy"]
    assert record.stopped == "copy broke the CUDA context (RuntimeError: an illegal memory access was encountered)"
    assert "the run was stopped" in capsys.readouterr().out


def test_interpreted_kernels_are_not_measured(made_up, capsys):
    made_up.setenv("TRITON_INTERPRET", "1")
    assert command.main(["--quick"]) == 2
    assert "TRITON_INTERPRET=1 is set" in sentence(capsys)


@pytest.mark.gpu
def test_a_real_run(tmp_path, capsys):
    path = tmp_path / "kernels.json"
    assert command.main(["--suite", "decode-small", "--quick", "--output", str(path)]) == 0
    record = read_record(path)
    assert not record.stopped
    assert {"copy", "read", "matmul"} == record.limits.keys()
    assert all(OURS in row.timings for row in record.rows if row.suite != "limits")
    assert all(t.method == "graph" for row in record.rows for t in row.timings.values())


def test_a_gpu_is_told_from_others_without_its_name():
    def of(uuid):
        return run.device_id(types.SimpleNamespace(uuid=uuid))

    assert of("4f3a") == of("4f3a") != of("4f3b")
    assert len(of("4f3a")) == 8 and "4f3a" not in of("4f3a")
    assert run.device_id(types.SimpleNamespace()) is None
