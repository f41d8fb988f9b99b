"""`memwall bench`: workloads, prompts, the open loop, metrics, the step log, records and bad input.

Times are those of a clock that the tests move; nothing about the speed of this machine is asserted.
"""

import dataclasses
import gzip
import json
import os
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.bench import cli, decode, kv_cache, offline, prefill, serve, tables
from engine.bench.limits import Limits
from engine.bench.metrics import distribution_ms, latencies
from engine.bench.record import MAX_BYTES, Record, as_committed, dumps, read_record
from engine.bench.replay import make_sequence, replay, sequences_of, why_not
from engine.bench.session import Session
from engine.bench.step_log import LoggedStep, StepLog, encode, read_step_log
from engine.bench.step_log import decode as decode_log
from engine.bench.work import attended_pairs, prompt_flops
from engine.bench.workload import Entry, Lengths, Prompts, Workload, read_workload, save_workload, synthesise
from engine.commands.bench import bench
from engine.config import EngineConfig
from engine.errors import UserError
from engine.models.config import ModelConfig, RopeConfig
from engine.scheduling import KVCacheConfig, Scheduler, SchedulerConfig, StepShape
from planner.workload import load_workload
from planner.workload import save_workload as planner_save_workload

VOCAB = 1000


@pytest.fixture(autouse=True, scope="module")
def no_garbage_collection():
    """A collection walks all of torch, and the suites ask for one before each run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.bench.replay.gc.collect", lambda: 0)
        yield


# ---- a core and a clock that take the time they are told -------------------------------------------------------------


class FakeClock:
    """Moves when somebody sleeps or a step passes."""

    def __init__(self) -> None:
        self.time_s = 1000.0  # a clock's origin means nothing

    def now(self) -> float:
        return self.time_s

    def sleep(self, seconds: float) -> None:
        assert seconds > 0, "sleeping for no time would be waiting for nothing"
        self.time_s += seconds


class FakeCore:
    """The real scheduler, and steps that take `step_s` each."""

    def __init__(self, clock: FakeClock, step_s: float, *, max_model_len: int = 512, num_blocks: int = 400, **engine):
        self.config = EngineConfig("fake", **{"max_num_seqs": 8, "max_num_batched_tokens": 64} | engine)
        self.model_config = SimpleNamespace(vocab_size=VOCAB, max_position_embeddings=1024)
        self.memory = SimpleNamespace(num_blocks=num_blocks)
        self.weights = SimpleNamespace(num_bytes_per_step=4000)
        self.max_model_len = max_model_len
        self.step_log = None
        self.added_s: dict[str, float] = {}
        self._clock, self._step_s = clock, step_s
        caching = self.config.enable_prefix_caching
        self.scheduler = Scheduler(
            SchedulerConfig(
                self.config.max_num_batched_tokens, self.config.max_num_seqs, max_model_len,
                self.config.enable_chunked_prefill,
            ),
            KVCacheConfig(num_blocks + 1, self.config.block_size, enable_prefix_caching=caching),
        )  # fmt: skip

    @property
    def has_work(self) -> bool:
        return self.scheduler.num_outstanding > 0

    def add(self, sequence) -> None:
        self.added_s[sequence.request_id] = self._clock.now()
        self.scheduler.add(sequence)

    def abort(self, sequence) -> bool:
        return self.scheduler.abort(sequence)

    def step(self):
        start_s, step = self._clock.now(), self.scheduler.schedule()
        for sequence in step.admitted:
            sequence.first_scheduled_s = sequence.first_scheduled_s or start_s
        self._clock.time_s += self._step_s
        end_s, updates = self._clock.now(), []
        chunks = zip(step.prefill_requests, step.shape.prefills, strict=True)
        ending = [r for r, (query, context) in chunks if query + context >= r.num_prefill_tokens]
        for sequence in step.decode_requests + ending:
            sequence.first_token_s = sequence.first_token_s or end_s
            sequence.last_token_s = end_s
            sequence.append([1])
            updates.append(SimpleNamespace(sequence=sequence, new_token_ids=[1], finish_reason=None))
        self.scheduler.update(step)
        if self.step_log is not None:
            self.step_log.append(step_record(step.step_id, start_s, end_s, step.shape, len(step.preempted)))
        return updates

    def step_bytes(self, shape) -> int:
        return self.weights.num_bytes_per_step + sum(context + 1 for context in shape.decode_contexts)


def step_record(step_id, start_s, end_s, shape, num_preempted=0, gpu_s=None):
    """As `engine.core.StepRecord`."""
    return SimpleNamespace(
        step_id=step_id,
        start_s=start_s,
        end_s=end_s,
        shape=shape,
        num_preempted=num_preempted,
        graph_size=None,
        host_s=1e-4,
        gpu_s=gpu_s,
    )


def replayed(workload: Workload, step_s: float, **engine):
    """A workload on a fake core, and that core."""
    clock = FakeClock()
    core = FakeCore(clock, step_s, **engine)
    sequences = sequences_of(core, workload, Prompts(VOCAB, 0), 0.0, run=1)
    return replay(core, sequences, [entry.arrival_s for entry in workload.entries], clock), core


def workload_of(*entries: tuple, block_tokens: int | None = None) -> Workload:
    return Workload("test", tuple(Entry(*entry) for entry in entries), block_tokens)


# ---- workloads -------------------------------------------------------------------------------------------------------


@st.composite
def workloads(draw) -> Workload:
    """Any workload that the file format can hold, chained ids or none."""
    gaps = draw(st.lists(st.floats(0, 100), min_size=1, max_size=6))
    block = draw(st.none() | st.integers(1, 16))
    entries, arrival_s = [], 0.0
    for index, gap in enumerate(gaps):
        arrival_s += gap if index else 0.0
        tokens = draw(st.integers(1, 100))
        ids = ()
        if block is not None:
            shared = draw(st.integers(0, -(-tokens // block)))
            own = draw(st.integers(0, -(-tokens // block) - shared))
            ids = (*range(shared), *(1000 * (index + 1) + i for i in range(own)))
        entries.append(Entry(arrival_s, tokens, draw(st.integers(1, 100)), ids))
    return Workload("w.jsonl", tuple(entries), block)


@given(workload=workloads())
@settings(max_examples=40)
def test_a_saved_workload_is_what_the_planner_loads(tmp_path_factory, workload):
    path = tmp_path_factory.mktemp("workload") / "w.jsonl"
    save_workload(workload, path)
    assert read_workload(path) == workload
    loaded = load_workload(path)
    np.testing.assert_allclose(loaded.arrival_s, [entry.arrival_s for entry in workload.entries], rtol=1e-12)
    assert loaded.input_tokens.tolist() == [entry.input_tokens for entry in workload.entries]
    assert loaded.output_tokens.tolist() == [entry.output_tokens for entry in workload.entries]
    assert loaded.prefix_block_tokens == workload.prefix_block_tokens
    if workload.has_prefixes:  # the planner renumbers ids
        names = {}
        for ids, entry in zip(loaded.prefix_block_hashes, workload.entries, strict=True):
            for ours, theirs in zip(entry.hash_ids, ids.tolist(), strict=True):
                assert names.setdefault(ours, theirs) == theirs
        assert len(set(names.values())) == len(names)


def test_what_the_planner_saves_is_read(tmp_path):
    trace, saved = tmp_path / "trace.jsonl", tmp_path / "saved.jsonl"
    rows = [(5.0, 40, 3, [0, 1]), (5.5, 33, 4, [0, 2]), (9.25, 100, 5, [0, 1, 3])]
    trace.write_text(
        "".join(
            json.dumps({"timestamp": t, "input_tokens": i, "output_tokens": o, "hash_ids": h, "session_id": "a"}) + "\n"
            for t, i, o, h in rows
        )
    )
    planner_save_workload(load_workload(trace, prefix_block_tokens=32), saved)
    found = read_workload(saved)
    assert found.prefix_block_tokens == 32
    assert [(e.arrival_s, e.input_tokens, e.output_tokens) for e in found.entries] == [
        (0.0, 40, 3), (0.5, 33, 4), (4.25, 100, 5),
    ]  # fmt: skip
    first, second, third = (entry.hash_ids for entry in found.entries)
    assert first[0] == second[0] == third[0]
    assert first[1] == third[1] != second[1]


def test_a_compressed_workload_is_read(tmp_path):
    workload = synthesise(5, 2.0, Lengths(3, 9), Lengths(1, 4), seed=1)
    save_workload(workload, tmp_path / "w.jsonl.gz")
    assert (tmp_path / "w.jsonl.gz").read_bytes()[:2] == b"\x1f\x8b"
    assert read_workload(tmp_path / "w.jsonl.gz").entries == workload.entries


def line(**changes) -> str:
    row = {"arrival_s": 1.0, "input_tokens": 10, "output_tokens": 5} | changes
    return json.dumps({name: value for name, value in row.items() if value is not None}) + "\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ("w.jsonl", "empty")),
        ("\n\n", ("empty",)),
        ("{\n", ("line 1", "not JSON")),
        ("3\n", ("line 1", "object")),
        (line() + line(output_tokens=None), ("line 2", "no output_tokens", "--save-workload")),
        (line() + "\n" + line(input_tokens=0), ("line 3", "input_tokens is 0")),
        (line(input_tokens=1.5), ("line 1", "input_tokens is 1.5")),
        (line(output_tokens="5"), ("output_tokens is '5'",)),
        (line(output_tokens=True), ("output_tokens is True",)),
        (line(output_tokens=2**24), ("output_tokens is",)),
        (line(arrival_s="now"), ("arrival_s is 'now'",)),
        (line(arrival_s=float("nan")), ("arrival_s is nan",)),
        (line(arrival_s=10**400), ("line 1", "arrival_s is 1000", "...", "number of seconds")),
        (line(arrival_s=-(10**400)), ("line 1", "arrival_s is -1000")),
        (line(arrival_s=0) + line(arrival_s=1e300), ("line 2", "arrival_s is 1e+300")),
        (line(arrival_s=0) + line(arrival_s=2e9), ("lasts 2e+09 s", "in seconds")),
        (line(input_tokens=10**400), ("input_tokens is 1000", "...")),
        (line(arrival_s=2.0) + line(), ("line 2", "earlier", "sort")),
        (line(hash_ids=[1]), ("line 1", "no prefix_block_tokens")),
        (line(hash_ids=["a"], prefix_block_tokens=8), ("hash_ids", "whole numbers")),
        (line(hash_ids=[-1], prefix_block_tokens=8), ("hash_ids",)),
        (line(hash_ids=[1, 2, 3], prefix_block_tokens=5), ("3 hash_ids of 5 tokens", "10 input_tokens")),
        (
            line(hash_ids=[1], prefix_block_tokens=8) + line(hash_ids=[1], prefix_block_tokens=9),
            ("line 2", "is 9", "8 on an earlier line"),
        ),
    ],
)
def test_bad_workloads(tmp_path, text, words):
    path = tmp_path / "w.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_workload(path)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_workloads(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*nowhere"):
        read_workload(tmp_path / "nowhere.jsonl")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        read_workload(tmp_path / "bytes")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"x" * 1000)[:-9])
    with pytest.raises(UserError, match="not a text file"):
        read_workload(tmp_path / "cut.gz")


def damaged_gzips():
    """Compressed text with one byte changed, so that inflating fails (zlib.error) or the checksum does (OSError)."""
    whole = gzip.compress("".join(line(arrival_s=i / 7) for i in range(200)).encode(), mtime=0)
    for place in (10, 30, len(whole) // 2, len(whole) - 6):
        yield whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]
    yield whole[:-20]


def test_damaged_gzip_files(tmp_path):
    for index, data in enumerate(damaged_gzips()):
        path = tmp_path / f"f{index}.gz"
        path.write_bytes(data)
        for read in (read_workload, read_record, read_step_log):
            with pytest.raises(UserError, match=path.name):
                read(path)


def test_synthetic_workloads():
    workload = synthesise(4000, 5.0, Lengths(100, 1024), Lengths(7, 7), seed=3)
    assert workload == synthesise(4000, 5.0, Lengths(100, 1024), Lengths(7, 7), seed=3)
    assert workload != synthesise(4000, 5.0, Lengths(100, 1024), Lengths(7, 7), seed=4)
    gaps = np.diff([entry.arrival_s for entry in workload.entries])
    # Poisson: gaps of mean 1/5 and as much standard deviation; 4,000 of them know both to 2 % (five sigma: 8 %).
    assert gaps.mean() == pytest.approx(0.2, rel=0.08)
    assert gaps.std() == pytest.approx(0.2, rel=0.1)
    assert workload.request_rate == pytest.approx(5.0, rel=0.08)
    inputs = [entry.input_tokens for entry in workload.entries]
    assert (min(inputs), max(inputs)) == (100, 1024)
    assert statistics.fmean(inputs) == pytest.approx(562, rel=0.05)
    assert {entry.output_tokens for entry in workload.entries} == {7}
    assert "seed 3" in workload.name
    at_once = synthesise(10, float("inf"), Lengths(1, 1), Lengths(1, 1), seed=0)
    assert {entry.arrival_s for entry in at_once.entries} == {0.0}
    assert at_once.request_rate is None


def test_workloads_are_cut_and_scaled():
    workload = workload_of((0.0, 5, 50), (1.0, 6, 3), (4.0, 7, 20))
    assert [e.arrival_s for e in workload.scaled(2).entries] == [0.0, 0.5, 2.0]
    assert [e.input_tokens for e in workload.head(2).entries] == [5, 6]
    assert [e.output_tokens for e in workload.capped(10).entries] == [10, 3, 10]
    assert [e.arrival_s for e in workload.at_once().entries] == [0.0] * 3


# ---- prompts ---------------------------------------------------------------------------------------------------------


@given(
    paths=st.lists(st.lists(st.integers(0, 2), max_size=4), min_size=2, max_size=5),
    block=st.integers(8, 40),
    tails=st.lists(st.integers(-7, 30), min_size=5, max_size=5),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=50)
def test_prompts_share_their_beginning_exactly_as_far_as_their_ids(paths, block, tails, seed):
    names: dict[tuple, int] = {}
    entries = []
    for path, tail in zip(paths, tails, strict=False):
        ids = tuple(names.setdefault(tuple(path[: end + 1]), len(names)) for end in range(len(path)))
        # A tail below 0 cuts the last block short.
        entries.append(Entry(0.0, max(len(ids) * block + tail, (len(ids) - 1) * block + 1, 1), 1, ids))
    workload = Workload("test", tuple(entries), block)
    prompts = list(Prompts(50_000, seed).of(workload))
    assert [len(prompt) for prompt in prompts] == [entry.input_tokens for entry in entries]
    assert prompts == list(Prompts(50_000, seed).of(workload))
    assert all(0 <= token < 50_000 for prompt in prompts for token in prompt)
    for i, (one, a) in enumerate(zip(entries, prompts, strict=True)):
        for other, b in list(zip(entries, prompts, strict=True))[i + 1 :]:
            ids = _common(one.hash_ids, other.hash_ids)
            shared = min(ids * block, len(a), len(b))
            assert a[:shared] == b[:shared]
            # What follows is random: 8 equal tokens in a row have probability 10^-37.
            follows = slice(shared, shared + 8)
            if min(len(a), len(b)) >= shared + 8:
                assert a[follows] != b[follows]


def _common(a, b) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_runs_have_prompts_of_their_own():
    workload = workload_of((0.0, 40, 1, (5,)), block_tokens=32)
    one, two = (next(iter(Prompts(50_000, 0, run).of(workload))) for run in (1, 2))
    assert one[:8] != two[:8]
    assert one[32:] != two[32:]


def test_shared_ids_are_found_in_the_prefix_cache():
    """Two requests one after the other; the second shares 4 of its 5 blocks of 32 tokens."""
    entries = ((0.0, 160, 1, (0, 1, 2, 3, 4)), (100.0, 160, 1, (0, 1, 2, 3, 9)), (200.0, 160, 1))
    found, _ = replayed(workload_of(*entries, block_tokens=32), 0.01, block_size=32)
    assert found.columns()["cached_tokens"] == [0, 128, 0]
    found, _ = replayed(workload_of(*entries, block_tokens=32), 0.01, block_size=32, enable_prefix_caching=False)
    assert found.columns()["cached_tokens"] == [0, 0, 0]


# ---- the open loop ---------------------------------------------------------------------------------------------------


@given(
    gaps=st.lists(st.floats(0, 3), min_size=1, max_size=12),
    step_s=st.sampled_from([0.001, 0.1, 5.0]),
    max_num_seqs=st.integers(1, 4),
)
@settings(max_examples=40)
def test_arrivals_do_not_wait_for_the_engine(gaps, step_s, max_num_seqs):
    arrivals = np.cumsum([0.0, *gaps[1:]]).tolist()
    workload = workload_of(*((arrival, 5 + i, 1 + i % 3) for i, arrival in enumerate(arrivals)))
    found, core = replayed(workload, step_s, max_num_seqs=max_num_seqs)
    columns = found.columns()
    # To the microsecond those of the workload, however slow the engine is and however few may run.
    assert columns["arrival_s"] == pytest.approx(arrivals, abs=1e-6)
    for i, (arrival, sequence) in enumerate(zip(arrivals, found.sequences, strict=True)):
        # Taken in at its time, or when the step ended that was running then.
        late_s = core.added_s[sequence.request_id] - found.start_s - arrival
        assert -1e-9 <= late_s <= step_s + 1e-9
        assert columns["arrival_s"][i] <= columns["scheduled_s"][i] + 1e-6
        assert columns["scheduled_s"][i] < columns["first_token_s"][i] <= columns["last_token_s"][i]
    assert columns["input_tokens"] == [entry.input_tokens for entry in workload.entries]
    assert columns["output_tokens"] == [entry.output_tokens for entry in workload.entries]
    assert len(found.gaps_s) == sum(columns["output_tokens"]) - len(arrivals)
    assert found.log.peak_running <= max_num_seqs
    assert core.step_log is None


def test_a_request_alone_has_the_times_of_its_steps():
    # 150 prompt tokens in chunks of 64 are 3 steps of 0.5 s; then 3 more tokens.
    found, _ = replayed(workload_of((0.0, 150, 4)), 0.5)
    result = latencies(found.columns(), found.gaps_s)
    assert found.columns()["scheduled_s"] == [0.0]
    assert result["ttft_ms"]["p50"] == pytest.approx(1500)
    assert result["tpot_ms"]["mean"] == pytest.approx(500)
    assert result["itl_ms"]["p99"] == pytest.approx(500)
    assert result["e2el_ms"]["p90"] == pytest.approx(3000)
    assert result["output_throughput_tokens_per_s"] == pytest.approx(4 / 3, abs=0.01)
    assert len(found.log) == 6


def test_waiting_for_a_step_to_end_counts():
    """A request that arrives in the middle of a step of 1 s is taken in half a second later, and is charged for it."""
    found, core = replayed(workload_of((0.0, 10, 1), (0.5, 10, 1)), 1.0)
    assert core.added_s["1-1"] - found.start_s == pytest.approx(1.0)
    assert latencies(found.columns(), found.gaps_s)["ttft_ms"]["mean"] == pytest.approx((1000 + 1500) / 2)


def test_why_a_request_cannot_run():
    core = FakeCore(FakeClock(), 1.0, max_model_len=100)
    assert why_not(core, Entry(0.0, 90, 10)) == ""
    assert "101 tokens" in why_not(core, Entry(0.0, 90, 11))
    assert "raise --max-model-len" in why_not(core, Entry(0.0, 1000, 24))
    # The model's own limit cannot be raised.
    assert why_not(core, Entry(0.0, 1000, 25)).endswith("the model takes 1024 at most")
    core = FakeCore(FakeClock(), 1.0, enable_chunked_prefill=False)
    assert why_not(core, Entry(0.0, 64, 1)) == ""
    reason = why_not(core, Entry(0.0, 65, 1))
    assert "max_num_batched_tokens 64" in reason
    assert "raise --max-num-batched-tokens" in reason
    assert "max-model-len" not in reason


def test_requests_that_are_too_long_are_left_out_or_refused():
    core = FakeCore(FakeClock(), 1.0, max_model_len=100)
    workload = workload_of((0.0, 90, 10), (1.0, 200, 1), (2.0, 99, 2), (3.0, 9, 9))
    fitting, reasons = serve.fit(core, workload, strict=False)
    assert [entry.input_tokens for entry in fitting.entries] == [90, 9]
    assert len(reasons) == 2
    with pytest.raises(UserError, match=r"2 requests of 4 that cannot run: 201 tokens .* --max-model-len; .*--strict"):
        serve.fit(core, workload, strict=True)
    with pytest.raises(UserError, match="1 requests of 1"):
        serve.fit(core, workload_of((0.0, 200, 1)), strict=False)
    core = FakeCore(FakeClock(), 1.0, enable_chunked_prefill=False)
    with pytest.raises(UserError) as caught:
        serve.fit(core, workload_of((0.0, 65, 1)), strict=False)
    assert "--max-num-batched-tokens" in str(caught.value)
    assert "--max-model-len" not in str(caught.value)


def test_a_shortened_output_is_noticed():
    clock = FakeClock()
    core = FakeCore(clock, 1.0)
    sequence = make_sequence(core, "long", [1] * 500, 100, 0.0)
    with pytest.raises(UserError, match="12 output tokens instead of 100"):
        replay(core, [sequence], [0.0], clock)


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_against_closed_forms():
    requests = {
        "arrival_s": [0.0, 1.0, 2.0],
        "scheduled_s": [0.25, 1.0, 2.5],
        "first_token_s": [0.5, 1.25, 4.0],
        "last_token_s": [2.5, 1.25, 8.0],
        "input_tokens": [10, 20, 30],
        "output_tokens": [5, 1, 3],
    }
    found = latencies(requests, [0.5, 0.5, 0.5, 0.5, 2.0, 2.0])
    assert found["ttft_ms"]["mean"] == pytest.approx((500 + 250 + 2000) / 3, abs=1e-3)
    assert found["ttft_ms"]["p50"] == 500
    assert found["queue_ms"]["mean"] == 250
    # The request of one token has no TPOT: 2 s over 4 gaps and 4 s over 2.
    assert found["tpot_ms"] == {"mean": 1250, "p50": 1250, "p90": 1850, "p99": 1985}
    assert found["itl_ms"]["mean"] == 1000
    assert found["e2el_ms"]["mean"] == pytest.approx((2500 + 250 + 6000) / 3, abs=1e-3)
    assert found["duration_s"] == 8.0
    assert found["request_throughput_per_s"] == 3 / 8
    assert found["output_throughput_tokens_per_s"] == pytest.approx(9 / 8, abs=0.01)
    assert found["total_throughput_tokens_per_s"] == pytest.approx(69 / 8, abs=0.01)
    assert latencies({name: [] for name in requests}, []) == {"num_requests": 0}


def test_tpot_is_absent_where_every_answer_is_one_token():
    found, _ = replayed(workload_of((0.0, 5, 1), (0.0, 5, 1)), 1.0)
    result = latencies(found.columns(), found.gaps_s)
    assert result["tpot_ms"] is None
    assert result["itl_ms"] is None


def test_percentiles_interpolate():
    assert distribution_ms([0.001 * i for i in range(101)]) == {"mean": 50, "p50": 50, "p90": 90, "p99": 99}
    assert distribution_ms([]) is None


# ---- the step log ----------------------------------------------------------------------------------------------------

pairs = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=3)


@st.composite
def logs(draw) -> list[LoggedStep]:
    """Steps that often decode what the step before did."""
    steps, contexts = [], []
    for index in range(draw(st.integers(0, 8))):
        again = draw(st.booleans())
        contexts = [c + 1 for c in contexts] if again else draw(st.lists(st.integers(0, 70_000), max_size=4))
        shape = StepShape(draw(pairs), contexts, draw(pairs), draw(st.integers(0, 9)))
        times = [draw(st.integers(0, 10**9)) / 1e6 for _ in range(3)]
        graph, gpu_s = draw(st.none() | st.integers(1, 256)), draw(st.none() | st.just(0.25))
        steps.append(LoggedStep(index, *times, shape, draw(st.integers(0, 3)), graph, gpu_s))
    return steps


def comparable(step: LoggedStep) -> tuple:
    shape = step.shape
    fields = [getattr(step, field.name) for field in dataclasses.fields(step) if field.name != "shape"]
    return (*fields, shape.prefills, shape.decode_contexts, shape.verifies, shape.num_sampled)


@given(steps=logs())
def test_a_step_log_is_read_back_as_it_was(steps):
    text = encode(steps)
    assert text.count("\n") == len(steps)
    assert [comparable(step) for step in decode_log(text.splitlines())] == [comparable(step) for step in steps]


def test_a_step_log_holds_every_step_of_a_run(tmp_path):
    workload = workload_of((0.0, 100, 3), (0.0, 20, 5), (40.0, 8, 2))
    found, _ = replayed(workload, 0.5)
    path = tmp_path / "log.jsonl.gz"
    path.write_bytes(gzip.compress(encode(found.log.steps(found.start_s)).encode()))
    steps = read_step_log(path)
    assert [step.step for step in steps] == list(range(len(found.log)))
    # Every prompt token is computed once, and every output token but the last of each request.
    assert sum(query for step in steps for query, _ in step.shape.prefills) == 128
    assert sum(len(step.shape.decode_contexts) for step in steps) == 2 + 4 + 1
    assert sum(step.shape.num_sampled for step in steps) == 10
    assert all(step.duration_s == pytest.approx(0.5) for step in steps)
    assert steps[0].start_s == 0.0
    assert steps[-1].end_s == pytest.approx(41.0)


def test_step_logs_and_records_are_small():
    """A minute of 4,000 steps with 200 requests, 600 of which come and go, and their record."""
    random.seed(0)
    log, contexts = StepLog(), [random.randint(100, 2000) for _ in range(200)]
    for index in range(4000):
        contexts = [context + 1 for context in contexts]
        if index % 7 == 0:
            contexts.pop(random.randrange(len(contexts)))
            contexts.append(random.randint(100, 1000))
        start_s = 1000 + index * 0.0151234
        log.take([step_record(index, start_s, start_s + 0.015, StepShape([], contexts), gpu_s=0.0149)])
    assert len(gzip.compress(encode(log.steps(1000.0)).encode(), mtime=0)) < MAX_BYTES / 2
    columns = {name: [round(random.random() * 60, 6) for _ in range(3000)] for name in "abcd"}
    columns |= {name: [random.randint(0, 1000) for _ in range(3000)] for name in "efgh"}
    record = Record("serve", "memwall bench serve", "abc", results=[{"runs": [{"requests": columns}]}])
    assert len(dumps(dataclasses.asdict(record))) < MAX_BYTES / 2


def test_a_step_log_that_is_none(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_step_log(tmp_path / "none.jsonl")
    (tmp_path / "other.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match=r"other\.jsonl is no step log"):
        read_step_log(tmp_path / "other.jsonl")


def test_one_log_file_per_run():
    assert serve.step_log_paths(None, 3) == []
    assert serve.step_log_paths(Path("a/log.jsonl.gz"), 1) == [Path("a/log.jsonl.gz")]
    for log, first in (
        ("log.jsonl.gz", "log.1.jsonl.gz"),
        ("rate_8.5.steps.jsonl.gz", "rate_8.5.steps.1.jsonl.gz"),
        ("rate8.5", "rate8.5.1"),
        ("rate8.5.gz", "rate8.5.1.gz"),
        ("log", "log.1"),
    ):
        assert serve.step_log_paths(Path("a", log), 2)[0] == Path("a", first)
    assert serve.step_log_paths(Path("a/log.jsonl.gz"), 2)[1] == Path("a/log.2.jsonl.gz")


# ---- decode, prefill and what they are compared with -----------------------------------------------------------------


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize(("batch", "context"), [(1, 40), (3, 20), (8, 50)])
def test_steady_steps_decode_the_whole_batch(batch, context, chunked):
    core = FakeCore(FakeClock(), 0.25, enable_chunked_prefill=chunked, enable_prefix_caching=False)
    steps = decode.steady_steps(core, decode.Shape(batch, context), output_tokens=10, temperature=0.0)
    assert len(steps) == 11  # as many intervals as tokens were asked for
    assert [step.step_id for step in steps] == list(range(steps[0].step_id, steps[0].step_id + len(steps)))
    assert all(len(step.shape.decode_contexts) == batch and not step.shape.prefills for step in steps)
    assert not core.has_work
    found = decode.summary(core, steps)
    assert found["tpot_ms"] == found["tpot_mean_ms"] == 250
    assert found["output_tokens_per_s"] == 4 * batch
    assert found["weight_bytes"] == 4000
    # One byte per token in this core's cache, the new one included.
    assert found["kv_bytes"] == pytest.approx(batch * (found["mean_context"] + 1), abs=1)
    assert found["exposed_host_ms"] is None


def test_the_gpu_time_is_taken_off_the_interval():
    shape = StepShape([], [10, 10])
    steps = [step_record(i, i, i + 1.0, shape, gpu_s=0.75) for i in range(5)]
    found = decode.summary(FakeCore(FakeClock(), 1.0), steps)
    assert (found["gpu_ms"], found["exposed_host_ms"], found["num_steps"]) == (750, 250, 4)


@pytest.mark.parametrize(
    ("shape", "engine", "words"),
    [
        ((9, 10), {}, "max_num_seqs 8"),
        ((1, 500), {}, "max_model_len 512"),
        # 60 tokens and what follows them are 2 pages; the pool has one of each, and preempts before all decode.
        ((8, 60), {"num_blocks": 8}, "8 requests of 60 tokens need up to 16 KV blocks of 64 tokens; there are 8"),
        # 2 pages each from the start: seen before the first prompt is computed.
        ((5, 64), {"num_blocks": 8}, "5 requests of 64 tokens need up to 10 KV blocks of 64 tokens; there are 8"),
        ((6, 60), {"enable_chunked_prefill": False}, "only if max_num_batched_tokens is 65; it is 64"),
    ],
)
def test_batches_that_do_not_fit(shape, engine, words):
    core = FakeCore(FakeClock(), 0.1, enable_prefix_caching=False, **engine)
    with pytest.raises(UserError, match=words):
        decode.steady_steps(core, decode.Shape(*shape), 20, 0.0)
    assert not core.has_work


def test_shapes_of_the_decode_suite():
    def shapes(**given):
        return decode.shapes(SimpleNamespace(**{"batch": None, "context": None, "shapes": None} | given))

    assert shapes() == [decode.Shape(1, 1024)]
    assert shapes(batch=(1, 8), context=(16, 32)) == [
        decode.Shape(batch, context) for context in (16, 32) for batch in (1, 8)
    ]
    assert shapes(shapes=(decode.Shape.parse("16x16384"),)) == [decode.Shape(16, 16_384)]
    with pytest.raises(UserError, match="--shapes"):
        shapes(shapes=(decode.Shape(1, 1),), batch=(1,))
    with pytest.raises(ValueError, match="at most 16777215"):
        decode.Shape.parse(f"1x{2**24}")
    given = options(decode, "--shapes", "1x64,2x64,1x64", "--kv-cache-dtype", "auto,auto,int8")
    assert decode.shapes(given) == [decode.Shape(1, 64), decode.Shape(2, 64)]
    assert [config.kv_cache_dtype for config in decode.configs(EngineConfig("model"), given)] == ["auto", "int8"]


@given(tokens=st.integers(1, 60), window=st.none() | st.integers(1, 70))
def test_attended_pairs(tokens, window):
    assert attended_pairs(tokens, window) == sum(min(i + 1, window or tokens) for i in range(tokens))


def test_prompt_flops():
    """Counted once more as a loop over tokens and layers would."""
    torch = pytest.importorskip("torch")

    def linear(rows, columns):
        return SimpleNamespace(weight=torch.empty(rows, columns))

    layer = SimpleNamespace(qkv=linear(24, 8), output=linear(8, 16), gate_up=linear(20, 8), down=linear(8, 10))
    weights = SimpleNamespace(layers=[layer] * 2, lm_head=linear(50, 8))
    config = ModelConfig(
        "llama", 50, 8, 10, 2, 4, 1, 4, 99, 1e-5, 1.0, (None, 3), (RopeConfig("default", 1e4, 4),), (0, 0)
    )
    expected = 0
    for window in config.layer_windows:
        for position in range(7):
            expected += 2 * (24 * 8 + 8 * 16 + 20 * 8 + 8 * 10)
            expected += 2 * 2 * 4 * 4 * min(position + 1, window or 7)
    assert prompt_flops(config, weights, 7) == expected + 2 * 50 * 8


def test_first_token_of_a_prompt_alone():
    clock = FakeClock()
    core = FakeCore(clock, 0.5)
    assert prefill.first_token_s(core, [1] * 150, 0.0, clock) == pytest.approx(1.5)


def test_the_best_rate_is_the_limit():
    limits = Limits()
    limits.note("copy", "copy", 100.0, [1.0, 2.0, 4.0])
    limits.note("copy", "copy", 100.0, [4.0])
    assert limits.copy == 50.0
    assert limits.repetitions_s == {"copy": [1.0, 2.0, 4.0, 4.0]}
    assert limits.matmul_fp8 is None


# ---- suites on the fake core: records and tables ---------------------------------------------------------------------


class FakeSession(Session):
    """A session whose engine is fake and whose device allows 1 GB/s and 1 GFLOP/s."""

    def __init__(self, output: Path | None = None) -> None:
        clock = FakeClock()
        super().__init__(Record("test", "memwall bench test", "abc"), output, clock)
        self.configs: list[EngineConfig] = []

    def on_engine(self, config, measure):
        self.configs.append(config)
        engine = {name: getattr(config, name) for name in ("kv_cache_dtype", "enable_prefix_caching")}
        return measure(FakeCore(self.clock, 0.5, **engine))

    def limits(self, config, *, matmul=False):
        return Limits(copy=1e9, matmul=1e9)


def options(suite, *arguments: str):
    parser = cli._parser("test", suite)
    return parser.read(["model", "--temperature", "0", *arguments])


def run_suite(suite, *arguments: str, output: Path | None = None) -> FakeSession:
    session = FakeSession(output)
    suite.run(session, options(suite, *arguments), EngineConfig("model"))
    return session


def test_decode_suite(tmp_path):
    output = tmp_path / "decode.json"
    session = run_suite(decode, "--batch", "1,4,9", "--context", "20", "--kv-cache-dtype", "auto,int8", output=output)
    assert [config.kv_cache_dtype for config in session.configs] == ["auto", "int8"]
    assert not any(config.enable_prefix_caching for config in session.configs)
    results = read_record(output)["results"]
    assert [(r["kv_cache_dtype"], r["batch"]) for r in results] == [(d, b) for d in ("auto", "int8") for b in (1, 4, 9)]
    assert "max_num_seqs" in results[2]["absent"]
    for result in results[:2]:
        assert result["share_of_floor"] == pytest.approx(result["floor_ms"] / result["tpot_ms"], rel=1e-3)
        assert result["bytes_per_s"] / 1e9 == pytest.approx(result["share_of_floor"], abs=1e-4)
        assert statistics.median(result["intervals_us"]) == 500_000
    text = decode.table(results)
    assert "auto 9 × 20: 9 requests" in text
    assert text.splitlines()[1].split()[:4] == ["auto", "1", "20", "500.00"]
    # 4 kB in half a second, of 1 GB/s that are possible.
    assert float(text.splitlines()[1].split()[6]) == pytest.approx(results[0]["bytes_per_s"] / 1e9, rel=0.01)
    assert {"mean ms", "floor/TPOT", "exposed ms"} <= set(re.split("  +", text.splitlines()[0]))
    # Before the limits are measured once more, there is no floor.
    assert decode.table([{k: v for k, v in results[0].items() if k not in ("floor_ms", "share_of_floor")}])


def test_figures_keep_three_digits():
    assert [tables.number(x, 0) for x in (12345.6, 123.4, 12.34, 0.01234, 0.0)] == [
        "12,346", "123", "12.3", "0.0123", "0",
    ]  # fmt: skip
    assert [tables.number(x) for x in (18.204, 0.5, 0.0012345, None)] == ["18.20", "0.500", "0.00123", "-"]
    assert [tables.percent(x) for x in (1.0, 0.57, 0.0034, 0.0, None)] == ["100%", "57%", "0.34%", "0%", "-"]


def test_serve_suite(tmp_path):
    path, output, log = (tmp_path / name for name in ("w.jsonl", "serve.json", "log.jsonl.gz"))
    path.write_text(line(arrival_s=0.0) + line(arrival_s=8.0, input_tokens=900) + line(arrival_s=20.0, output_tokens=1))
    arguments = ("--workload", str(path), "--request-rate-scale", "2", "--repeat", "2", "--step-log", str(log))
    run_suite(serve, *arguments, output=output)
    (result,) = read_record(output)["results"]
    assert (result["num_requests"], result["num_skipped"], result["request_rate_scale"]) == (2, 1, 2.0)
    first, second = result["runs"]
    # The fake core is as fast in both; arrivals are halved; one step for the prompt.
    assert first["requests"]["arrival_s"] == second["requests"]["arrival_s"] == [0.0, 10.0]
    assert first["requests"]["first_token_s"] == [0.5, 10.5]
    assert first["requests"]["output_tokens"] == [5, 1]
    assert set(first["requests"]) == {
        "arrival_s", "scheduled_s", "first_token_s", "last_token_s",
        "input_tokens", "output_tokens", "cached_tokens", "preemptions",
    }  # fmt: skip
    assert result["median"]["ttft_ms"]["p50"] == 500
    assert result["median"]["peak_running"] == 1
    for run in (1, 2):
        assert len(read_step_log(tmp_path / f"log.{run}.jsonl.gz")) == first["num_steps"] == 6
    # 3 requests were asked for, 2 run: one interval of 10 s.
    assert "2 requests, 0.1 requests/s realised, 1 left out" in serve.table([result])


class InterruptedCore(FakeCore):
    """Ctrl-C comes in the step at this time of the clock."""

    def __init__(self, *arguments, at_s: float, **options) -> None:
        super().__init__(*arguments, **options)
        self._at_s = at_s

    def step(self):
        if self._clock.now() >= self._at_s:
            raise KeyboardInterrupt
        return super().step()


def interrupted_session(at_s: float, output: Path | None = None) -> FakeSession:
    session = FakeSession(output)
    start_s = session.clock.now()
    session.on_engine = lambda config, measure: measure(InterruptedCore(session.clock, 0.5, at_s=start_s + at_s))
    return session


def test_serve_keeps_what_was_finished_when_it_is_interrupted(tmp_path):
    """A run takes 4 s: one step for the prompt and 7 for the other tokens. Ctrl-C comes 1.5 s into the second."""
    path, output, log = (tmp_path / name for name in ("w.jsonl", "serve.json", "log.jsonl"))
    path.write_text(line(output_tokens=8))
    session = interrupted_session(5.5, output)
    arguments = ("--workload", str(path), "--repeat", "3", "--num-warmups", "0", "--step-log", str(log))
    with pytest.raises(KeyboardInterrupt):
        serve.run(session, options(serve, *arguments), EngineConfig("model"))
    (result,) = read_record(output)["results"]
    assert [run["output_tokens"] for run in result["runs"]] == [8]
    assert [len(read_step_log(tmp_path / f"log.{run}.jsonl")) for run in (1, 2)] == [8, 3]
    assert not (tmp_path / "log.3.jsonl").exists()


def test_an_interrupted_warm_up_leaves_nothing(tmp_path):
    path, log = tmp_path / "w.jsonl", tmp_path / "log.jsonl"
    path.write_text(line(output_tokens=8))
    session = interrupted_session(1.0)
    with pytest.raises(KeyboardInterrupt):
        arguments = ("--workload", str(path), "--step-log", str(log))
        serve.run(session, options(serve, *arguments), EngineConfig("model"))
    assert not log.exists()
    assert session.record.results == []


def test_an_interrupted_suite_prints_what_it_has(monkeypatch, capsys):
    def run(session, options, config):
        session.keep([{"context": 1, "cached_tokens_per_s": 2.0, "recomputed_tokens_per_s": 1.0, "speedup": 2.0}])
        raise KeyboardInterrupt

    monkeypatch.setattr(kv_cache, "run", run)
    with pytest.raises(KeyboardInterrupt):
        bench(["kv-cache", "tiny", "--load-format", "dummy"])
    printed = capsys.readouterr()
    assert "2.0 ×" in printed.out
    assert "interrupted" in printed.err


def test_offline_suite(tmp_path):
    output = tmp_path / "offline.json"
    arguments = ("--num-prompts", "10", "--input-len", "5:30", "--output-len", "4", "--repeat", "2")
    session = run_suite(offline, *arguments, output=output)
    assert not session.configs[0].enable_prefix_caching
    (result,) = read_record(output)["results"]
    assert len(result["runs"]) == 2
    for run in result["runs"]:
        assert run["output_tokens"] == 40
        assert run["requests"]["arrival_s"] == [0.0] * 10
        assert run["output_throughput_tokens_per_s"] == pytest.approx(40 / run["duration_s"], rel=1e-3)
        assert run["peak_running"] == 8
    (heading, *_) = offline.table([result]).splitlines()
    assert heading.count("10 requests") == heading.count("all at once") == 1


def test_offline_takes_the_lengths_of_a_dataset(tmp_path):
    path = tmp_path / "w.jsonl"
    path.write_text(line(input_tokens=7, output_tokens=2) + line(arrival_s=50.0, input_tokens=9, output_tokens=3))
    session = run_suite(offline, "--dataset", str(path), "--repeat", "1")
    (run,) = session.record.results[0]["runs"]
    assert run["requests"]["input_tokens"] == [7, 9]
    assert run["requests"]["arrival_s"] == [0.0, 0.0]
    for flag in ("--input-len", "--output-len"):
        with pytest.raises(UserError, match=f"{flag} and --dataset exclude each other"):
            run_suite(offline, "--dataset", str(path), flag, "5:9")


def test_kv_cache_suite():
    session = run_suite(kv_cache, "--context", "100,200,600", "--output-tokens", "8", "--recomputed-tokens", "3")
    near, far, absent = session.record.results
    # Steps of half a second: one for a token with the cache; without it 2 for 100 tokens, 4 for 200.
    assert (near["cached_tokens_per_s"], near["recomputed_tokens_per_s"], near["speedup"]) == (2, 1, 2)
    assert (far["recomputed_tokens_per_s"], far["speedup"]) == (0.5, 4)
    assert far["recomputed_us"] == [2_000_000] * 3
    assert "max_model_len" in absent["absent"]
    assert "2.0" in kv_cache.table(session.record.results)
    # 400 tokens and those that are recomputed do not fit 512; nothing is measured before that is said.
    session = run_suite(kv_cache, "--context", "400", "--output-tokens", "8", "--recomputed-tokens", "200")
    (absent,) = session.record.results
    assert "grows by 200 tokens: 600 tokens" in absent["absent"]
    assert session.clock.now() == FakeClock().now()


# ---- records ---------------------------------------------------------------------------------------------------------


def test_a_record_is_read_back(tmp_path):
    record = Record("decode", "memwall bench decode", "abc", results=[{"tpot_ms": 1.5, "intervals_us": [1, 2, 3]}])
    for name in ("record.json", "record.json.gz"):
        record.write(tmp_path / "new" / name)
        assert read_record(tmp_path / "new" / name) == json.loads(json.dumps(dataclasses.asdict(record)))
    assert "[1,2,3]" in (tmp_path / "new" / "record.json").read_text()


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)


@given(
    document=st.recursive(
        plain, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=3), x), max_leaves=12
    )
)
def test_documents_are_json(document):
    assert json.loads(dumps(document)) == document


def test_records_that_are_none(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_record(tmp_path / "none.json")
    for text, words in (("{", "no record"), ("[]", "no record"), ('{"version": 9}', "version 9")):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(UserError, match=words):
            read_record(tmp_path / "r.json")


def test_commands_are_recorded_without_this_machines_folders():
    shown = [as_committed(word) for word in ("serve", "/data/models/llama", "--output=/data/x.json", "--batch", "1,8")]
    assert shown == ["serve", "llama", "--output=x.json", "--batch", "1,8"]
    assert as_committed("records/w.jsonl") == "records/w.jsonl"
    assert as_committed("../elsewhere/w.jsonl") == "w.jsonl"


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("decod", ("no suite 'decod'", "decode", "make-workload")),
        ("decode", ("needs MODEL",)),
        ("decode tiny --batch 0", ("--batch", "at least 1")),
        ("decode tiny --batch 1,x", ("--batch", "'x'", "whole number")),
        ("decode tiny --shapes 8", ("--shapes", "256x1024")),
        ("decode tiny --bath 1", ("--bath", "--batch")),
        ("decode tiny --output-tokens 1", ("--output-tokens", "at least 2")),
        ("decode tiny --shapes 1x8 --batch 1 --load-format dummy --device cpu", ("--shapes",)),
        ("decode tiny --output {tmp}", ("cannot write",)),
        ("prefill tiny --prompt-tokens 1,-5", ("--prompt-tokens", "-5")),
        ("offline tiny --input-len 9:5", ("--input-len", "'9:5'", "smaller bound first")),
        ("offline tiny --output-len many", ("--output-len", "100:1024")),
        ("offline tiny --dataset nowhere.jsonl", ("nowhere.jsonl",)),
        ("serve tiny", ("--workload",)),
        ("serve tiny --workload nowhere.jsonl", ("nowhere.jsonl",)),
        ("serve tiny --workload w --request-rate-scale 0", ("--request-rate-scale", "above 0")),
        ("serve tiny --workload w --request-rate-scale 1e-320", ("--request-rate-scale", "from 0.000001")),
        ("serve tiny --workload w --request-rate-scale 1e300", ("--request-rate-scale", "to 1,000,000")),
        ("serve tiny --workload w --repeat 1001", ("--repeat", "at most 1000")),
        ("decode tiny --shapes 1x99999999999999999999", ("--shapes", "at most")),
        ("decode tiny --batch 99999999999999999999", ("--batch", "at most")),
        ("prefill tiny --prompt-tokens 99999999999999999999", ("--prompt-tokens", "at most")),
        ("offline tiny --num-prompts 99999999999999999999", ("--num-prompts", "at most")),
        ("serve tiny --workload w --temperature -1", ("--temperature", "at least 0")),
        ("serve tiny --workload w --max-num-seqs 0", ("max_num_seqs",)),
        ("make-workload --output w.jsonl", ("--request-rate",)),
        ("make-workload --request-rate 0 --output w.jsonl", ("--request-rate", "above 0")),
        ("make-workload --request-rate nan --output w.jsonl", ("--request-rate",)),
        ("make-workload --request-rate 1e-310 --output w.jsonl", ("--request-rate", "from 0.000001")),
        ("make-workload --request-rate 1e-5 --output w.jsonl", ("7 days", "raise --request-rate")),
    ],
)
def test_bad_command_lines(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        bench(arguments.format(tmp=tmp_path).split())
    for word in words:
        assert word in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["w.jsonl", "sub/../w.jsonl", "link.jsonl", "hard.jsonl"])
@pytest.mark.parametrize(
    "arguments",
    [
        "serve tiny --load-format dummy --workload w.jsonl --output {name}",
        "serve tiny --load-format dummy --workload w.jsonl --step-log {name}",
        "offline tiny --load-format dummy --dataset w.jsonl --output {name}",
        "decode w.jsonl --load-format dummy --output {name}",
    ],
)
def test_inputs_are_not_overwritten(name, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("w.jsonl").write_text(line())
    Path("sub").mkdir()
    Path("link.jsonl").symlink_to("w.jsonl")
    os.link("w.jsonl", "hard.jsonl")
    with pytest.raises(UserError, match="would overwrite"):
        bench(arguments.format(name=name).split())
    assert Path("w.jsonl").read_text() == line()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--workload w.jsonl --step-log x.gz --output x.gz", "the same file"),
        ("--workload w.jsonl --step-log ./x.gz --output sub/../x.gz", "the same file"),
        ("--workload w.jsonl --repeat 2 --step-log x.gz --output x.2.gz", "the same file"),
        ("--workload x.2.gz --repeat 3 --step-log x.gz", "would overwrite --workload"),
    ],
)
def test_outputs_do_not_overwrite_each_other(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    for name in ("w.jsonl", "x.2.gz"):
        Path(name).write_text(line())
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=words):
        bench(["serve", "tiny", "--load-format", "dummy", *arguments.split()])
    assert sorted(tmp_path.iterdir()) == before


def test_a_models_files_are_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="would overwrite the model's"):
        bench(["decode", str(tmp_path), "--load-format", "dummy", "--output", str(tmp_path / "config.json")])


def test_what_nobody_would_wait_for_is_refused_before_an_engine_is_built(tmp_path):
    path = tmp_path / "w.jsonl"
    path.write_text(line(arrival_s=0) + line(arrival_s=400_000))
    for scale in ("0.5", "1e-6"):
        with pytest.raises(UserError, match=r"7 days.*--request-rate-scale"):
            bench(["serve", "no such model", "--workload", str(path), "--request-rate-scale", scale])
    # At its own speed the workload could be replayed, and it is the model that is missing.
    with pytest.raises(UserError, match="no such model"):
        bench(["serve", "no such model", "--workload", str(path), "--device", "cpu"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_named(tmp_path):
    for name in ("out.json", "out.json.gz"):
        (tmp_path / name).symlink_to("/dev/full")
        with pytest.raises(UserError, match=r"cannot write .*No space left"):
            Record("decode", "c", "abc").write(tmp_path / name)
    command = [sys.executable, "-m", "engine.bench", "make-workload", "--request-rate", "5", "--output", "w.jsonl"]
    with Path("/dev/full").open("w") as full:
        root = Path(__file__).parents[2]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root)}, stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 2
    assert done.stderr.decode() == "error: cannot write to standard output: No space left on device\n"


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "out.json.gz"
    path.write_bytes(b"before")

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"out\.json\.gz: No space"):
        Record("decode", "c", "abc").write(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"before"


@pytest.mark.parametrize("arguments", [[], ["--help"], *([name, "--help"] for name in (*cli.SUITES, "make-workload"))])
def test_help(arguments, capsys):
    assert bench(arguments) == 0
    assert "usage:" in capsys.readouterr().out


def test_make_workload(tmp_path, capsys):
    path = tmp_path / "w.jsonl"
    arguments = [
        "--num-prompts",
        "30",
        "--request-rate",
        "4",
        "--input-len",
        "10:20",
        "--output-len",
        "7",
        "--seed",
        "5",
    ]
    assert bench(["make-workload", *arguments, "--output", str(path)]) == 0
    assert "30 requests" in capsys.readouterr().out
    assert read_workload(path).entries == synthesise(30, 4.0, Lengths(10, 20), Lengths(7, 7), 5).entries


# ---- the real engine, on a CPU ---------------------------------------------------------------------------------------

REAL = (
    "tiny",
    "--load-format",
    "dummy",
    "--device",
    "cpu",
    "--max-model-len",
    "256",
    "--num-gpu-blocks-override",
    "40",
)


@pytest.mark.parametrize(
    "arguments",
    [
        ("decode", *REAL, "--batch", "1,2", "--context", "40", "--output-tokens", "3", "--kv-cache-dtype", "auto,int8"),
        ("prefill", *REAL, "--prompt-tokens", "16,48", "--repetitions", "2"),
        ("offline", *REAL, "--num-prompts", "3", "--input-len", "5:20", "--output-len", "2:4", "--repeat", "1"),
        ("kv-cache", *REAL, "--context", "32", "--output-tokens", "2", "--recomputed-tokens", "1"),
    ],
)
def test_suites_on_the_engine(arguments, tmp_path, capsys):
    output = tmp_path / "record.json"
    assert bench([*arguments, "--output", str(output), "--commit", "abc"]) == 0
    record = read_record(output)
    assert record["suite"] == arguments[0]
    assert record["command"].startswith(f"memwall bench {arguments[0]} tiny --load-format dummy")
    assert (record["commit"], record["environment"]["device"]) == ("abc", "cpu")
    assert record["engines"][0]["memory"]["num_blocks"] > 0
    assert record["limits"]["copy"] > 0
    assert record["results"] and not any("absent" in result for result in record["results"])
    assert str(tmp_path) not in output.read_text()
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_serve_on_the_engine(tmp_path):
    """Forced lengths, prefixes found in the cache, and a log that adds up."""
    path, output, log = (tmp_path / name for name in ("w.jsonl", "serve.json", "log.jsonl"))
    rows = [(0.0, 140, 3, (0, 1)), (0.01, 20, 5, ()), (0.3, 140, 2, (0, 1)), (0.3, 300, 2, (2,))]
    save_workload(Workload("w", tuple(Entry(*row) for row in rows), 64), path)
    arguments = ("serve", *REAL, "--workload", str(path), "--step-log", str(log), "--output", str(output))
    assert bench(list(arguments)) == 0
    (result,) = read_record(output)["results"]
    (run,) = result["runs"]
    requests = run["requests"]
    assert result["num_skipped"] == 1
    assert requests["output_tokens"] == [3, 5, 2]
    assert requests["arrival_s"] == [0.0, 0.01, 0.3]
    for times in zip(
        *(requests[f"{name}_s"] for name in ("arrival", "scheduled", "first_token", "last_token")), strict=True
    ):
        assert list(times) == sorted(times)
    steps = read_step_log(log)
    assert sum(step.shape.num_sampled for step in steps) == 10
    prompt_tokens = sum(query for step in steps for query, _ in step.shape.prefills)
    assert prompt_tokens == 300 - sum(requests["cached_tokens"])
    assert requests["cached_tokens"][:2] == [0, 0]
