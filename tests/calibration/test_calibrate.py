"""Calibration on the CPU: the steps that are measured, what is measured of them, and what an interrupted run leaves."""

import gc
import itertools
import json
import math
import random
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration import calibrate as command
from calibration.commands.calibrate import calibrate
from calibration.measure import facts, study, table
from calibration.measure.ahead import Ahead
from calibration.measure.allreduce import measure_allreduce, world_sizes
from calibration.measure.clock import QUICK, SECTIONS, Clock, ClockPlan
from calibration.measure.fit import fit_errors
from calibration.measure.grid import DECODE, MIXED, PREFILL, TABLES, Point, Room, points
from calibration.measure.part import PartFile
from calibration.measure.steps import Effort, StepRunner
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import UserError
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ROOT / "tests" / "models" / "miniature" / "target"
BRIEF = Effort(settling=1, least=2, most=2, seconds=0.0, alone=2, retries=0)
SMALL = {"device": "cpu", "max_num_seqs": 8, "max_num_batched_tokens": 256, "block_size": 32}
# Of the command: a dozen small steps of each format.
ARGUMENTS = ["--model", str(MODEL), "--device", "cpu", "--quick", "--block-size", "32", "--commit", "abc"]
ARGUMENTS += ["--max-num-seqs", "6", "--max-num-batched-tokens", "64", "--max-model-len", "128"]
FORMATS = ["--kv-cache-dtype", "auto,int4"]


@pytest.fixture(scope="module")
def weights():
    return EngineCore(EngineConfig(model=str(MODEL), **SMALL)).weights


@pytest.fixture
def engine(weights):
    """Engines that must be idle and whole in the end."""
    made = []

    def make(depth: int = 1, **overrides) -> EngineCore:
        config = EngineConfig(model=str(MODEL), **{**SMALL, "enable_prefix_caching": False, **overrides})
        core = EngineCore(config, weights=weights)
        core._depth = depth  # as on a GPU, where two are in flight
        made.append(core)
        return core

    yield make
    for core in made:
        core.check()
        assert not core.has_work
        assert core.scheduler.kv.pool.num_used == 0
        assert core._runner.slots.num_free == core.config.max_num_seqs
    gc.unfreeze()


# ---- which steps -----------------------------------------------------------------------------------------------------

ROOMS = st.builds(
    Room,
    max_num_seqs=st.integers(1, 300),
    max_num_batched_tokens=st.integers(300, 9000),
    max_model_len=st.integers(64, 140_000),
    num_blocks=st.integers(8, 60_000),
    block_size=st.sampled_from([32, 64, 128]),
)


@settings(max_examples=40)
@given(ROOMS, st.booleans(), st.integers(0, 5))
def test_the_grid_fits_the_engine(room, quick, seed):
    found = points(room, quick=quick, seed=seed)
    assert len({point.key for point in found}) == len(found)
    assert [point.priority for point in found] == sorted(point.priority for point in found)
    for point in found:
        chunks, contexts = list(point.prefills), point.contexts
        new = [query for query, context in chunks if context == 0]
        assert len(contexts) + len(chunks) + len(new) <= room.max_num_seqs
        assert len(contexts) + sum(query for query, _ in chunks) == point.num_tokens <= room.max_num_batched_tokens
        lengths = [context + 1 for context in contexts] + [query + context for query, context in chunks] + new
        assert sum(math.ceil(length / room.block_size) for length in lengths) <= room.num_blocks
        assert all(0 < context < room.max_model_len for context in contexts)
        assert all(query >= 1 and query + context < room.max_model_len for query, context in chunks)
        assert point.table == (MIXED if chunks and contexts else point.table)
    assert found == points(room, quick=quick, seed=seed)


def test_the_grid_of_a_large_engine_reaches_its_ends():
    room = Room(256, 8192, 131_072, 14_000, 64)
    found = points(room)
    decodes = [point for point in found if point.table == DECODE]
    uniform = {(point.num_decodes, point.decodes[0][0]) for point in decodes if len(point.decodes) == 1}
    assert {batch for batch, _ in uniform} >= {1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 20, 100, 250}
    assert max(context for batch, context in uniform if batch == 1) > 131_000
    # The longest contexts of the largest batch fill nearly all of the pool.
    assert 0.9 * 14_000 < 256 * math.ceil(max(c for b, c in uniform if b == 256) / 64) <= 14_000
    assert any(len(point.decodes) > 50 for point in decodes)
    prefills = {point.prefills[0] for point in found if point.table == PREFILL}
    assert {(16, 0), (8192, 0), (128, 1024 + 32), (2048, 32_768 + 32)} <= prefills
    mixed = [point for point in found if point.table == MIXED]
    assert len(mixed) >= 30
    assert {len(point.prefills) for point in mixed} >= {1, 2, 3}
    assert max(point.num_decodes for point in mixed) > 200
    # No decode of a uniform batch fills a page, where the low-bit formats have more to do.
    assert all((context + 1) % 64 for _, context in uniform)
    assert len(points(room, quick=True)) < len(found) / 4


PIECES = (16, 32, 64, 128, 192, 256, 320, 384, 512, 640, 896, 1024)


def test_every_size_that_steps_are_padded_to_is_measured():
    room = Room(256, 8192, 131_072, 14_000, 64, piece_sizes=PIECES)
    found = points(room)
    alone = [p.num_tokens for p in found if p.table == PREFILL and p.prefills[0][1] == 0]
    assert [size for size in sorted(alone) if size <= 1024] == list(PIECES)
    assert {1152, 1280, 1536, 1792, 2048, 2560, 3072, 4096, 5120, 6144, 8192} <= set(alone)
    assert all(p.priority == 0 for p in found if p.table == PREFILL and p.prefills[0][1] == 0)
    mixed = [point for point in found if point.table == MIXED and point.prefills and point.decodes]
    padded = [room.padded(point.num_tokens) for point in mixed]
    assert set(padded) >= {size for size in PIECES if size >= 192}
    assert [room.padded(count) for count in (1, 16, 17, 400, 1024, 1025)] == [16, 16, 32, 512, 1024, 1025]
    assert len(found) < 160
    small = Room(6, 64, 128, 100, 32, piece_sizes=(16, 48))
    assert {p.num_tokens for p in points(small) if p.table == PREFILL and p.prefills[0][1] == 0} == {16, 48, 64}


def test_streams_need_room_for_all_their_requests():
    room = Room(8, 256, 512, 20, 32)
    decodes, others = Point.of(DECODE, (), [40] * 4), Point.of(DECODE, (), [41] * 3)
    prompt = Point.of(PREFILL, [(200, 0)])
    assert room.holds_stream([decodes, prompt] * 9) is False  # 4 · 2 pages, and 7 of each of two prompts
    assert room.holds_stream([decodes, others] * 9)
    assert room.holds_stream([decodes, Point.of(PREFILL, [(160, 0)])])
    assert not Room(5, 256, 512, 99, 32).holds_stream([decodes, prompt])
    assert not room.holds_stream([Point.of(PREFILL, [(300, 0)])])


def test_ragged_contexts_have_the_sum_of_their_uniform_batch():
    ragged = [p for p in points(Room(256, 8192, 131_072, 60_000, 64)) if p.table == DECODE and len(p.decodes) > 1]
    assert {(p.num_decodes, sum(p.contexts) / p.num_decodes) for p in ragged} >= {(32, 1024), (64, 4096), (256, 1024)}


def test_chunks_behind_a_context_come_first():
    """As running requests come before admitted ones."""
    point = Point.of(MIXED, [(5, 0), (7, 9)], [4, 4, 2, 4])
    assert point.prefills == ((7, 9), (5, 0))
    assert point.decodes == ((4, 2), (2, 1), (4, 1))
    assert point.contexts == [4, 4, 2, 4]
    assert (point.num_decodes, point.num_tokens) == (4, 16)


# ---- how they are run ------------------------------------------------------------------------------------------------

SHAPES = (
    Point.of(DECODE, (), [40]),
    Point.of(DECODE, (), [100, 100, 7, 250, 31, 32, 63]),
    Point.of(PREFILL, [(64, 0)]),
    Point.of(PREFILL, [(17, 130)]),
    Point.of(MIXED, [(20, 50), (33, 0), (40, 0)], [60, 61, 1]),
)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int4"])
def test_every_step_has_the_wished_shape(engine, depth, kv_cache_dtype):
    core = engine(depth, kv_cache_dtype=kv_cache_dtype)
    runner = StepRunner(core, effort=BRIEF)
    for point in SHAPES:
        shapes = []
        execute = core._runner.execute

        def watched(step, execute=execute, shapes=shapes, point=point):
            shapes.append((tuple(step.shape.prefills), list(step.shape.decode_contexts)))
            # New requests are admitted in the step, as they would be; the others never again.
            assert len(step.admitted) == sum(context == 0 for _, context in point.prefills)
            assert step.shape.num_sampled == len(point.prefills) + point.num_decodes
            return execute(step)

        core._runner.execute = watched
        measured = runner.measure(point)
        core._runner.execute = execute
        assert shapes == [(point.prefills, point.contexts)] * len(shapes)
        assert len(shapes) >= BRIEF.settling + BRIEF.least + (BRIEF.alone if depth == 2 else 0)
        assert measured["samples"] >= BRIEF.least
        assert measured["decodes"] == [list(run) for run in point.decodes]
        assert measured["prefills"] == [list(chunk) for chunk in point.prefills]
        assert (measured["gpu_s"], measured["graph_size"]) == (None, None)  # a CPU
        core.check()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int4"])
def test_steps_of_different_shapes_follow_each_other(engine, depth, kv_cache_dtype):
    core = engine(depth, kv_cache_dtype=kv_cache_dtype)
    runner = StepRunner(core, effort=BRIEF)
    decode, other, prompt, chunk, mixed = (
        Point.of(DECODE, (), [40]),
        Point.of(DECODE, (), [100, 33]),
        Point.of(PREFILL, [(64, 0)]),
        Point.of(PREFILL, [(17, 130)]),
        Point.of(MIXED, [(20, 50), (33, 0)], [60]),
    )
    stream = [prompt, prompt, decode, other, decode, decode, chunk, chunk, prompt, mixed, mixed, decode, other, mixed]
    shapes, execute = [], core._runner.execute

    def watched(step):
        shapes.append((tuple(step.shape.prefills), list(step.shape.decode_contexts)))
        return execute(step)

    core._runner.execute = watched
    records = runner.run(stream)
    core._runner.execute = execute
    assert shapes == [(point.prefills, point.contexts) for point in stream]
    assert [record.shape.prefills for record in records] == [list(point.prefills) for point in stream]
    assert all(after.end_s > before.end_s for before, after in pairwise(records))
    assert core.step_log is None
    assert runner.measure(chunk)["samples"] >= BRIEF.least  # and one alone, behind them
    core.check()


def test_a_stream_of_another_shape_is_no_measurement(engine):
    core = engine(max_num_seqs=2)
    runner = StepRunner(core, effort=BRIEF)
    with pytest.raises(RuntimeError, match="was to be measured"):
        runner.run([Point.of(DECODE, (), [40]), Point.of(PREFILL, [(8, 0), (8, 0)]), Point.of(DECODE, (), [40])])
    for request in [*core.scheduler.running, *core.scheduler.waiting]:
        core.abort(request)
    core.settle()


def test_pages_are_distinct_scattered_and_known_to_the_device(engine):
    core = engine()
    runner = StepRunner(core)
    point = SHAPES[1]
    runner.begin(point)
    held_ones = runner._requests[point.key].held
    tables = [held.sequence.block_tables[0] for held in held_ones]
    assert [len(blocks) for blocks in tables] == [context // 32 + 1 for context in point.contexts]
    flat = [block for blocks in tables for block in blocks]
    assert len(set(flat)) == len(flat)
    assert min(flat) >= 1
    assert max(flat) <= core.memory.num_blocks
    neighbours = sum(abs(b - a) == 1 for blocks in tables for a, b in pairwise(blocks))
    assert neighbours < len(flat) / 2
    slots = core._runner.slots
    for held in held_ones:
        sequence = held.sequence
        row = slots.block_tables[0][sequence.slot, : len(sequence.block_tables[0])]
        assert row.tolist() == sequence.block_tables[0]
        assert int(slots.last_token[sequence.slot]) == sequence.token_ids[-1]
        assert float(slots.temperature[sequence.slot]) == 1.0
        assert int(slots.seeds[sequence.slot]) == sequence.seed
    runner.end()


def prompt(length: int) -> list[int]:
    draw = random.Random(length)
    return [draw.randrange(3, 1900) for _ in range(length)]


def request(core: EngineCore, name: str, tokens: list[int], count: int) -> Sequence:
    """Whose tokens are a function of all logits."""
    params = SamplingParams(temperature=1.2, seed=5, max_tokens=count, ignore_eos=True)
    return Sequence(name, tokens, params, max_model_len=core.max_model_len, block_size=core.config.block_size)


def test_an_adopted_request_samples_what_a_served_one_does(engine):
    """Chunks and decodes attend to all that counts as computed, through the pages that the request was given."""
    core = engine()
    served = request(core, "served", prompt(70), 6)
    core.add(served)
    while core.has_work:
        core.step()
    wanted = served.output_token_ids
    assert len(set(wanted)) > 3

    StepRunner(core)  # other contents and another order of pages
    adopted = request(core, "adopted", prompt(70), 100)
    core.adopt([adopted])
    core.step()
    assert adopted.output_token_ids == wanted[:1]
    for context in (40, 1, 69, 40):  # set back to behind a context: the same token, as often as one likes
        adopted.num_computed_tokens, adopted.num_tokens = context, 70
        core.step()
        assert adopted.output_token_ids[-1] == wanted[0]
        assert adopted.num_computed_tokens == 70
    del adopted.token_ids[71:]
    adopted.num_tokens, adopted.num_output_tokens = 71, 1
    core.step()
    assert adopted.output_token_ids == wanted[:2]
    core._runner.adopt([adopted])  # the newest token is where the next step looks for it
    core.step()
    assert adopted.output_token_ids == wanted[:3]
    assert core.abort(adopted)

    StepRunner(core, seed=1)
    wrong = request(core, "wrong", prompt(70), 100)  # its pages hold something else
    wrong.num_computed_tokens = 69
    core.adopt([wrong])
    assert core.settle() == []
    for _ in wanted:
        core.step()
    assert len(wrong.output_token_ids) == len(wanted)
    assert wrong.output_token_ids != wanted
    core.abort(wrong)


def test_what_cannot_be_adopted_leaves_nothing_behind(engine):
    core = engine(num_gpu_blocks_override=20)
    runner = StepRunner(core)
    for contexts in ([300, 300, 300], [3] * 9):
        with pytest.raises(UserError, match="need"):
            runner.measure(Point.of(DECODE, (), contexts))
        core.check()
        assert core.scheduler.kv.pool.num_used == 0


def test_a_step_of_another_shape_is_no_measurement(engine):
    """More new requests than slots: not all are admitted."""
    core = engine(max_num_seqs=2)
    runner = StepRunner(core, effort=BRIEF)
    point = Point(PREFILL, ((8, 0), (8, 0), (8, 0)))
    assert not Room(2, 256, 512, core.memory.num_blocks, 32).holds(point)
    with pytest.raises(RuntimeError, match="was to be measured"):
        runner.measure(point)
    while core.has_work:
        core.step()


def test_what_was_disturbed_is_measured_again(engine, monkeypatch):
    spreads = iter([0.5, 0.2, 0.3, 0.4, 0.05])

    def measured(self, point):
        return {"step_s": 1.0, "low_s": 1.0, "high_s": 1.0 + next(spreads)}

    runner = StepRunner(engine(), effort=Effort(spread=0.1, retries=2))
    monkeypatch.setattr(StepRunner, "_measured", measured)
    assert runner.measure(SHAPES[0])["high_s"] == 1.2
    assert runner.measure(SHAPES[0])["high_s"] == 1.05
    assert next(spreads, None) is None


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8", "int8", "int4", "int2"])
def test_every_page_holds_what_the_model_wrote(engine, kv_cache_dtype):
    core = engine(kv_cache_dtype=kv_cache_dtype)
    StepRunner(core, seed=3)
    for layer in core._cache.layers:
        pages = layer.pages[1:]
        different = torch.unique(pages.flatten(1), dim=0)
        assert 4 < len(different) <= 16  # full pages of a prompt of at most 511 tokens
        assert bool(pages.flatten(1).any(dim=1).all())
        words = layer.layout.words_view(layer.pages)
        scales = layer.layout.scale_views(layer.pages)
        for numbers in (words, *scales.values()):
            assert not numbers.is_floating_point() or bool(numbers.isfinite().all())
        if layer.residual is not None:
            assert bool(layer.residual.isfinite().all())
            assert float(layer.residual.float().std()) > 0.5


# ---- launched ahead --------------------------------------------------------------------------------------------------


class Launching:
    """Steps that the CPU launches in 4 ms, and that take the GPU 1 ms and 5 µs a token: behind others as little as
    that, among their like no less than the launch."""

    HOST_S = 4e-3

    def __init__(self):
        self.measured, self.behind = [], []

    def gpu_s(self, point):
        return 1e-3 + 5e-6 * point.num_tokens

    def measure(self, point):
        self.measured.append(point)
        step_s = max(self.gpu_s(point), self.HOST_S)
        prefills, decodes = ([list(each) for each in pairs] for pairs in (point.prefills, point.decodes))
        times = dict.fromkeys(("step_s", "low_s", "high_s", "gpu_s"), step_s)
        return {"prefills": prefills, "decodes": decodes, **times, "host_s": self.HOST_S}

    def ahead_s(self, point, before):
        self.behind.append((point, before))
        return self.gpu_s(point)


def test_steps_that_wait_for_the_cpu_are_measured_behind_a_long_prompt():
    runner = Launching()
    ahead = Ahead(runner, LARGE, lambda point: None)
    small = [Point(MIXED, ((100, 0),), ((64, 20),)), Point(PREFILL, ((300, 640),))]
    for point in small:
        assert ahead.seconds(point, runner.measure(point)) == runner.gpu_s(point)
    # 1,024 tokens take 6.1 ms: the first that take 1.5 times the 4 ms of the launch, found out once.
    assert runner.behind == [(point, Point(PREFILL, ((1024, 0),))) for point in small]
    assert [point.num_tokens for point in runner.measured if point not in small] == [512, 1024]


def test_steps_that_tell_of_the_gpu_are_not_measured_again():
    runner = Launching()
    ahead = Ahead(runner, LARGE, lambda point: None)
    decodes, large = Point(DECODE, (), ((64, 8),)), Point(PREFILL, ((2048, 0),))
    for point in (decodes, large):
        assert ahead.seconds(point, runner.measure(point)) is None
    without_gpu = runner.measure(Point(PREFILL, ((16, 0),))) | {"gpu_s": None}
    assert ahead.seconds(Point(PREFILL, ((16, 0),)), without_gpu) is None
    assert not runner.behind


def test_nothing_is_measured_behind_a_prompt_that_has_no_room():
    runner = Launching()
    point = Point(MIXED, ((100, 0),), ((64, 20),))
    narrow = replace(LARGE, max_num_batched_tokens=512)
    assert Ahead(runner, narrow, lambda point: None).seconds(point, runner.measure(point)) is None
    full = replace(LARGE, max_num_seqs=22)  # its own requests, twice that of the prompt
    assert Ahead(runner, full, runner.measure).seconds(point, runner.measure(point)) == runner.gpu_s(point)
    assert Ahead(runner, replace(full, max_num_seqs=21), runner.measure).seconds(point, runner.measure(point)) is None


def test_a_step_behind_another_without_a_gpu(engine):
    core = engine()
    runner = StepRunner(core, effort=BRIEF)
    assert runner.ahead_s(Point(PREFILL, ((16, 0),)), Point(PREFILL, ((64, 0),))) is None
    assert not core.has_work


# ---- the clock -------------------------------------------------------------------------------------------------------


class Warming:
    """Runs steps on a GPU that warms up in prompts and cools down in decodes, within `TAU_S`: prompts take up to `SLOW`
    more. Decodes take 5 ms, prompts 20 µs a token, and 50 µs go by between steps."""

    TAU_S, SLOW = 0.08, 0.12

    def __init__(self):
        self.streams = []

    def run(self, points):
        self.streams.append(points)
        heat, now, records = 0.0, 100.0, []
        for point in points:
            is_prompt, taken = bool(point.prefills), 5e-3
            if is_prompt:
                taken = 2e-5 * point.num_tokens * (1 + self.SLOW * heat)
            heat = is_prompt - (is_prompt - heat) * math.exp(-taken / self.TAU_S)
            now += taken + 5e-5
            records.append(SimpleNamespace(gpu_s=taken, start_s=now - 0.03, end_s=now))
        return records

    def measure(self, point):
        count = 100 if point.decodes else 1 + 50_000 // point.num_tokens  # for a second
        return {"gpu_s": self.run([point] * count)[-1].gpu_s, "step_s": None}


def clock_of(room: Room, plan: ClockPlan | None = None, known=lambda point: None) -> tuple[Clock, Warming]:
    runner = Warming()
    return Clock(runner, room, known, plan), runner


LARGE = Room(256, 8192, 131_072, 14_000, 64, piece_sizes=PIECES)


def test_prompts_are_measured_cool_and_hot():
    clock, runner = clock_of(LARGE)
    rows = {row["tokens"]: row for row in clock.measure("points")}
    # 768 tokens would run in 896.
    assert list(rows) == [16, 64, 128, 192, 256, 384, 512, 896, 1024, 2048, 4096]
    for tokens, row in rows.items():
        base = 2e-5 * tokens
        assert row["samples"] == 6
        assert base <= row["cool_s"] <= base * (1 + 0.12 * 0.3)
        assert row["steady_s"] == pytest.approx(base * 1.12, rel=1e-3)
        assert base * (1 + 0.12 * 0.85) <= row["hot_s"] <= base * 1.1201
    cool = runner.streams[-2]
    for prompt, some in itertools.groupby(cool[:-1], key=lambda point: bool(point.prefills)):
        count = len(list(some))
        assert count == 1 if prompt else 12 <= count <= 60
    # All of it takes less than 15 s on such a GPU.
    assert sum(record.gpu_s for stream in runner.streams[-2:] for record in Warming().run(stream)) < 15


def test_decodes_are_measured_behind_decodes_and_behind_prompts():
    clock, runner = clock_of(LARGE)
    rows = clock.measure("decode_points")
    assert [(row["batch"], row["context"], row["samples"]) for row in rows] == [
        (16, 544, 6),
        (128, 544, 6),
        (254, 544, 6),
    ]
    hot = runner.streams[-1]
    assert all(
        [bool(point.prefills) for point in hot[index - 2 : index]] == [True, True]
        for index, point in list(enumerate(hot))[-19:]
        if not point.prefills
    )


def test_series_show_how_soon():
    clock, _ = clock_of(LARGE)
    rows = clock.measure("series")
    assert [(row["tokens"], row["decodes_between"]) for row in rows] == [
        *((512, 0), (512, 2), (512, 1)),
        *((1024, 0), (1024, 5), (1024, 2)),
    ]
    for row, wanted in zip(rows, (1.0, 0.5, 0.68, 1.0, 0.5, 0.68), strict=True):
        assert row["share"] == pytest.approx(wanted, abs=0.05)
        assert row["begin_s"][0] == 0
        assert row["decode_batch"] == 16
        assert len(row["gpu_s"]) == len(row["begin_s"])
        ends = [begin + taken for begin, taken in zip(row["begin_s"], row["gpu_s"], strict=True)]
        assert all(end <= begin + 1e-4 for end, begin in zip(ends, row["begin_s"][1:], strict=False))
        assert ends[-1] > (0.7 if row["decodes_between"] == 0 else 0.4)
        base = 2e-5 * row["tokens"]
        assert row["gpu_s"][0] < base * 1.01
    # The first one tells the time constant: 1 - 1/e of the rise is reached after TAU_S.
    rise = [taken / (2e-5 * 512) - 1 for taken in rows[0]["gpu_s"]]
    reached = next(
        begin for begin, more in zip(rows[0]["begin_s"], rise, strict=True) if more > 0.12 * (1 - 1 / math.e)
    )
    assert reached == pytest.approx(Warming.TAU_S, abs=0.015)


def test_what_is_known_is_not_measured_again():
    clock, runner = clock_of(LARGE, known=lambda point: {"gpu_s": 0.0123, "step_s": 0.0124})
    rows = clock.measure("points")
    assert {row["steady_s"] for row in rows} == {0.0123}
    assert len(runner.streams) == 2


@given(ROOMS, st.sampled_from([(), PIECES, (16, 48)]))
@settings(max_examples=40)
def test_the_clocks_steps_fit_the_engine(room, piece_sizes):
    room = replace(room, piece_sizes=tuple(size for size in piece_sizes if size <= room.max_num_batched_tokens))
    for plan in (ClockPlan(), QUICK):
        if not Clock.has_room(room, plan):
            continue
        clock, runner = clock_of(room, plan)
        for section in SECTIONS:
            assert clock.measure(section) or section == "decode_points"
        assert all(room.holds_stream(stream) for stream in runner.streams)


TINY_CLOCK = ClockPlan(
    *((16, 64), (), (64,), (0.5,), 2, 1e-3, 2e-3, 1e-3, 1e-3),
    lead_s=1e-3, series_s=1e-2, mixed_lead_s=1e-3, mixed_s=1e-2,
)  # fmt: skip


@pytest.mark.parametrize("depth", [1, 2])
def test_the_clock_on_an_engine(engine, depth):
    core = engine(depth)
    room = Room(8, 256, 512, core.memory.num_blocks, 32)
    clock = Clock(StepRunner(core, effort=BRIEF), room, lambda point: None, TINY_CLOCK)
    found = {section: clock.measure(section) for section in SECTIONS}
    assert [row["tokens"] for row in found["points"]] == [16, 64]
    assert [row["batch"] for row in found["decode_points"]] == [6]
    assert [row["tokens"] for row in found["series"]] == [64, 64]
    for row in (*found["points"], *found["decode_points"]):
        assert row["samples"] == 2
        assert 0 < row["cool_s"] < 10
        assert 0 < row["hot_s"] < 10


# ---- the command -----------------------------------------------------------------------------------------------------


def be_brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few repetitions, and no copies of gigabytes."""
    job = study.Job
    monkeypatch.setattr(study, "Job", lambda **given: job(**given, effort=BRIEF))
    monkeypatch.setattr("engine.bench.limits._CPU_COPY_BYTES", 1 << 20)


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    be_brief(monkeypatch)


def run(save: Path, *more: str) -> int:
    return command.main([*ARGUMENTS, *FORMATS, "--save", str(save), *more])


def shape_of(name: str, point: dict) -> tuple:
    return Point(name, *(tuple(map(tuple, point[part])) for part in ("prefills", "decodes"))).key


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> dict:
    with pytest.MonkeyPatch.context() as monkeypatch:
        be_brief(monkeypatch)
        save = tmp_path_factory.mktemp("profile") / "profile.json"
        assert run(save) == 0
        assert [path.name for path in save.parent.iterdir()] == ["profile.json"]
        return json.loads(save.read_text())


def test_the_profile_has_every_point_that_fits(profile):
    assert (profile["version"], profile["kind"], profile["commit"]) == (1, "memwall-profile", "abc")
    assert "--model target" in profile["command"]
    assert str(ROOT) not in json.dumps(profile)
    assert (profile["gpu"], profile["quantization"], profile["allreduce"]) == (None, None, [])
    assert profile["model"]["name"] == "target"
    assert profile["model"]["config"] == json.loads((MODEL / "config.json").read_text())
    assert profile["model"]["dtype"] == "float32"
    assert list(profile["kv"]) == ["float32", "int4"]
    engine = profile["engine"]
    assert (engine["max_num_seqs"], engine["max_num_batched_tokens"], engine["max_model_len"]) == (6, 64, 128)
    assert engine["graph_sizes"] == engine["piece_sizes"] == []
    assert profile["limits"]["copy_bytes_per_s"] > 0
    assert profile["limits"]["matmul_flops_per_s"] > 0
    assert "notes" not in profile
    for kv in profile["kv"].values():
        room = Room(6, 64, 128, kv["num_kv_blocks"], 32)
        found = {shape_of(name, point) for name in TABLES for point in kv[name]}
        assert found == {point.key for point in points(room, quick=True)}
        assert all(kv[name] for name in TABLES)
        assert kv["kv_cache_bytes"] > 0
        for point in (point for name in TABLES for point in kv[name]):
            for name in ("step_s", "low_s", "high_s", "alone_s", "host_s"):
                assert 0 < point[name] < 60
            assert point["low_s"] <= point["step_s"] <= point["high_s"]
            assert point["samples"] >= 2


def test_model_parameters_are_those_of_the_file(profile):
    config = profile["model"]["config"]
    hidden, inner, heads, kv_heads = 256, 512, 4, 2
    layer = 2 * hidden * 64 * (heads + kv_heads) + 3 * hidden * inner
    assert profile["model"]["num_parameters"] == config["num_hidden_layers"] * layer + config["vocab_size"] * hidden


class Counting:
    """Counts measured points, and interrupts before one of them."""

    def __init__(self, monkeypatch, stop_at: int | None = None) -> None:
        self.count, self.stop_at = 0, stop_at
        real = StepRunner.measure

        def measure(runner, point):
            if self.count == self.stop_at:
                raise KeyboardInterrupt
            self.count += 1
            return real(runner, point)

        monkeypatch.setattr(StepRunner, "measure", measure)


@pytest.mark.parametrize("stop_at", [0, 4, 11])
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, capsys, stop_at, profile):
    save, part = tmp_path / "p.json", tmp_path / "p.json.part"
    total = sum(len(kv[name]) for kv in profile["kv"].values() for name in TABLES)
    with monkeypatch.context() as patched:
        Counting(patched, stop_at)
        assert run(save) == 130
    said = capsys.readouterr()
    assert f"interrupted: {stop_at} points" in said.err
    assert "the same command again goes on" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["p.json.part"]
    kept = [json.loads(line) for line in part.read_text().splitlines()]
    kept = [(line["kv"], shape_of(line["table"], line["point"]), line["point"]) for line in kept if "point" in line]
    assert len(kept) == stop_at
    if stop_at == 4:  # the machine was lost while a line was written
        with part.open("a") as file:
            file.write('{"kv":"float32","table":"dec')
    with monkeypatch.context() as patched:
        counting = Counting(patched)
        assert run(save) == 0
    assert counting.count == total - stop_at
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]
    document = json.loads(save.read_text())
    found = {(kv, shape_of(name, p)): p for kv in document["kv"] for name in TABLES for p in document["kv"][kv][name]}
    assert len(found) == total
    assert all(found[kv, key] == point for kv, key, point in kept)
    assert document["duration_s"] > 0


def test_other_settings_or_another_source_do_not_go_on(tmp_path, monkeypatch, capsys):
    save = tmp_path / "p.json"
    with monkeypatch.context() as patched:
        Counting(patched, 3)
        assert run(save) == 130
        before = (tmp_path / "p.json.part").read_bytes()
        capsys.readouterr()
        for more, name in (
            (["--commit", "def"], "commit"),
            (["--seed", "1"], "seed"),
            (["--max-num-seqs", "5"], "max_num_seqs"),
            (["--quantization", "fp8"], "quantization"),
        ):
            assert run(save, *more) == 2
            said = capsys.readouterr().err
            assert said.count("\n") == 1
            assert f"other settings ({name})" in said
            assert "--overwrite" in said
            assert (tmp_path / "p.json.part").read_bytes() == before
    with monkeypatch.context() as patched:
        Counting(patched, 1)
        assert run(save, "--seed", "1", "--overwrite") == 130
    assert b'"seed":1' in (tmp_path / "p.json.part").read_bytes().splitlines()[0]


def test_formats_may_come_and_go(tmp_path, monkeypatch):
    save = tmp_path / "p.json"
    with monkeypatch.context() as patched:
        Counting(patched, 11)  # all of the first format
        assert run(save) == 130
    with monkeypatch.context() as patched:
        counting = Counting(patched)
        assert run(save, "--kv-cache-dtype", "float32,int8") == 0
    kv = json.loads(save.read_text())["kv"]
    assert list(kv) == ["float32", "int8"]
    assert counting.count == sum(len(kv["int8"][name]) for name in TABLES)


def test_a_step_that_fails_costs_no_other(tmp_path, monkeypatch, capsys, profile):
    real, save = StepRunner.measure, tmp_path / "p.json"

    def measure(runner, point):
        if point.table == PREFILL and point.num_tokens == 16:
            runner._core._is_broken = True
            raise RuntimeError("no such kernel")
        return real(runner, point)

    monkeypatch.setattr(StepRunner, "measure", measure)
    assert run(save) == 0
    document = json.loads(save.read_text())
    assert document["notes"] == [f"{kv}: 16 failed with RuntimeError: no such kernel" for kv in ("float32", "int4")]
    assert "Traceback" in capsys.readouterr().err
    for name, kv in document["kv"].items():
        assert len(kv["prefill"]) == len(profile["kv"][name]["prefill"]) - 1
        assert all(len(kv[each]) == len(profile["kv"][name][each]) for each in (DECODE, MIXED))
    monkeypatch.setattr(StepRunner, "measure", lambda runner, point: [][0])
    with pytest.raises(IndexError):
        run(tmp_path / "q.json")


@pytest.fixture
def clocked(monkeypatch):
    """As on a GPU; which tables are measured."""
    measured, real = [], Clock.measure
    job = study.Job
    monkeypatch.setattr(study, "Job", lambda **given: job(**given, clock=TINY_CLOCK))
    monkeypatch.setattr(study._Study, "_has_clock", lambda self, room: True)
    monkeypatch.setattr(Clock, "measure", lambda clock, section: measured.append(section) or real(clock, section))
    return measured


def test_the_clock_is_measured_once_and_not_again(tmp_path, monkeypatch, capsys, clocked, profile):
    save = tmp_path / "p.json"
    with monkeypatch.context() as patched:
        series = Clock._series
        patched.setattr(Clock, "_series", lambda clock: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(save) == 130
    assert Clock._series is series
    assert clocked == ["points", "decode_points", "series"]
    assert run(save) == 0
    assert clocked[3:] == ["series"]
    document = json.loads(save.read_text())
    assert list(document["clock"]) == list(SECTIONS)
    assert list(document).index("clock") < list(document).index("kv")
    assert [row["tokens"] for row in document["clock"]["points"]] == [16, 64]
    steady = {tuple(map(tuple, point["prefills"])): point for point in document["kv"]["float32"]["prefill"]}
    for row in document["clock"]["points"]:
        assert row["steady_s"] == steady[(row["tokens"], 0),]["step_s"]
    assert "among decodes" in capsys.readouterr().out
    assert "clock" not in profile
    assert "notes" not in document


def test_a_clock_that_fails_costs_no_point(tmp_path, monkeypatch, clocked, profile):
    save = tmp_path / "p.json"
    monkeypatch.setattr(Clock, "_decode_points", lambda clock: [][0])
    assert run(save) == 0
    document = json.loads(save.read_text())
    assert document["notes"] == ["clock: decode_points failed with IndexError: list index out of range"]
    assert list(document["clock"]) == ["points", "series"]
    for name, kv in document["kv"].items():
        assert all(len(kv[each]) == len(profile["kv"][name][each]) for each in TABLES)


def test_a_run_that_measured_nothing_binds_nobody(tmp_path, monkeypatch, capsys):
    save = tmp_path / "p.json"
    assert run(save, "--num-gpu-blocks-override", "2") == 2
    assert "needs" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        Counting(patched, 1)
        assert run(save) == 130
    assert "other settings" not in capsys.readouterr().err


def test_time_that_runs_out(tmp_path, monkeypatch, capsys):
    """Points that a profile needs are measured in the next run; those that it can do without are left out."""
    save = tmp_path / "p.json"
    monkeypatch.setattr(__name__ + ".ARGUMENTS", [argument for argument in ARGUMENTS if argument != "--quick"])
    assert run(save, "--minutes", "1e-9") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "minutes are over" in said
    assert "--minutes" in said
    assert not save.exists()
    real = study._Study._measure_points
    with monkeypatch.context() as patched:
        patched.setattr(study._Study, "_measure_points", lambda self, core, name, deadline: real(self, core, name, 0.0))
        assert run(save) == 0
    document = json.loads(save.read_text())
    assert "left out" in document["notes"][0]
    assert "left out" in capsys.readouterr().out
    for kv in document["kv"].values():
        wanted = points(Room(6, 64, 128, kv["num_kv_blocks"], 32))
        found = {shape_of(name, point) for name in TABLES for point in kv[name]}
        assert found == {point.key for point in wanted if not point.priority}
        assert len(found) < len(wanted)


def test_what_the_first_format_left_out_is_measured_if_the_others_leave_time(tmp_path, monkeypatch):
    """Its share of the time has the compilation of all kernels in it."""
    save = tmp_path / "p.json"
    monkeypatch.setattr(__name__ + ".ARGUMENTS", [argument for argument in ARGUMENTS if argument != "--quick"])
    real, calls = study._Study._measure_points, []

    def measure_points(self, core, name, deadline):
        calls.append(name)
        real(self, core, name, deadline if len(calls) > 1 else 0.0)

    monkeypatch.setattr(study._Study, "_measure_points", measure_points)
    assert run(save) == 0
    assert calls == ["float32", "int4", "float32"]
    document = json.loads(save.read_text())
    assert "notes" not in document
    for kv in document["kv"].values():
        wanted = points(Room(6, 64, 128, kv["num_kv_blocks"], 32))
        found = {shape_of(name, point) for name in TABLES for point in kv[name]}
        assert found == {point.key for point in wanted}


def test_the_compilation_of_the_first_format_keeps_nobody_from_coming_back_to_it(tmp_path, monkeypatch):
    """400 of 600 s went into building its engine, as its kernels had to be compiled; building it again takes 5 s."""
    save = tmp_path / "p.json"
    monkeypatch.setattr(__name__ + ".ARGUMENTS", [argument for argument in ARGUMENTS if argument != "--quick"])
    builds, ahead_s = [], [0.0]

    def build(config, **more):
        builds.append(config.kv_cache_dtype)
        ahead_s[0] += 400.0 if len(builds) == 1 else 5.0
        return EngineCore(config, **more)

    monkeypatch.setattr(study, "EngineCore", build)
    monkeypatch.setattr(study, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + ahead_s[0]))
    assert run(save, "--minutes", "10") == 0
    assert builds == ["float32", "int4", "float32"]
    assert "notes" not in json.loads(save.read_text())


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--kv-cache-dtype", "fp9"], "kv_cache_dtype is 'fp9'; it must be one of"),
        (["--kv-cache-dtype", "float16,bfloat16", "--dtype", "bfloat16"], "kv_cache_dtype is float16 and the model"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--minutes", "0"], "--minutes is 0; it must be above 0"),
        (["--minutes", "soon"], "--minutes is 'soon'; it must be a number"),
        (["--kv-cache-dtype-skip-layers", "0"], "--kv-cache-dtype-skip-layers has no place"),
        (["--max-model-len", "1000000"], "max_model_len is 1000000"),
        (["--max-num-seqs", "0"], "max_num_seqs is 0"),
        (["--rounds", "3"], "has no option --rounds"),
        (["--device", "cuda"], "no CUDA device was found"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, monkeypatch, more, sentence):
    monkeypatch.setattr("engine.setup.load_weights", None)  # nothing is loaded before it is refused
    if "cuda" in more and torch.cuda.is_available():
        pytest.skip("there is one")
    assert run(tmp_path / "p.json", *more) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("engine.setup.load_weights", None)
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file" / "p.json") == 2
    assert "cannot write" in capsys.readouterr().err
    assert run(tmp_path) == 2
    assert "cannot write" in capsys.readouterr().err
    assert run(tmp_path / "file") == 2
    assert "is there already" in capsys.readouterr().err
    assert run(MODEL / "config.json", "--overwrite") == 2
    assert "would overwrite" in capsys.readouterr().err
    (tmp_path / "p.json.part").write_text("a shopping list\n")
    assert run(tmp_path / "p.json") == 2
    assert "is no calibration that could be continued" in capsys.readouterr().err


def test_it_is_a_command_of_memwall(capsys):
    assert calibrate.takes_arguments
    assert calibrate(["--help"]) == 0
    assert "usage: memwall calibrate" in capsys.readouterr().out
    with pytest.raises(UserError, match="memwall calibrate needs --model, --save"):
        calibrate([])


def test_needs_model_and_place(capsys):
    assert command.main([]) == 2
    assert "needs --model, --save" in capsys.readouterr().err
    assert command.main(["--help"]) == 0
    assert "--kv-cache-dtype" in capsys.readouterr().out


# ---- files, facts and text -------------------------------------------------------------------------------------------


def test_parts_are_read_as_they_were_written(tmp_path):
    part = PartFile(tmp_path / "x.part")
    part.open({"a": (1, 2)}, overwrite=False)
    point = {"prefills": [[5, 0]], "decodes": [[3, 2]], "step_s": 0.5}
    part.add({"limits": {"copy": 1.0}}, 1.0)
    part.add({"kv": "fp8", "table": MIXED, "point": point}, 2.5)
    part.add({"allreduce": []}, 3.0)
    part.close()
    again = PartFile(part.path)
    again.open({"a": (1, 2)}, overwrite=False)
    assert (len(again), again.limits, again.allreduce, again.elapsed_s) == (1, {"copy": 1.0}, [], 3.0)
    assert again.point("fp8", Point(MIXED, ((5, 0),), ((3, 2),))) == point
    assert again.point("int8", Point(MIXED, ((5, 0),), ((3, 2),))) is None
    again.add({"limits": {"copy": 2.0}}, 0.5)
    assert json.loads(part.path.read_text().splitlines()[-1])["elapsed_s"] == 3.5
    again.remove()
    assert not part.path.exists()


def test_gpus_are_those_of_the_catalog():
    catalog = {gpu["id"]: gpu["name"] for gpu in json.loads((ROOT / "planner/data/gpus.json").read_text())["gpus"]}
    assert {found for _, found in facts._GPU_IDS if found} <= set(catalog)
    for name, wanted in (
        ("NVIDIA H200", "h200_sxm"),
        ("NVIDIA H100 80GB HBM3", "h100_sxm"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-SXM4-40GB", "a100_sxm_40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GB300", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla T4", None),
    ):
        assert facts.gpu_id(name) == wanted


def test_a_profile_in_a_few_lines(profile):
    weight_bytes = 8_000_000
    text = table.text_of(profile, weight_bytes)
    floor_s = weight_bytes / profile["limits"]["copy_bytes_per_s"]
    first = profile["kv"]["float32"]["decode"][0]
    line = next(line for line in text.splitlines() if line.startswith(f"1 × {first['decodes'][0][0]} "))
    assert f"{first['step_s'] * 1e3:.3f}" in line.split()
    assert line.split()[-1] == f"{first['step_s'] / floor_s:.2f}"
    assert all(name in text for name in ("float32: ", "int4: ", "KV blocks"))
    fitted = json.loads(json.dumps(profile))
    of_decode = {"in_sample": {"median": 0.001, "p90": 0.01}, "leave_one_out": {"median": 0.0123, "p90": 0.05}}
    fitted["kv"]["int4"]["fit"] = {"decode": of_decode, "repeat": {"decode": 0.1}, "note": "text"}
    fitted["allreduce"] = [{"world_size": 2, "bytes": 8192, "time_s": 1.25e-5}]
    text = table.text_of(fitted, weight_bytes)
    assert "errors of the fit, median / p90: decode 1.23% / 5.00%" in text
    assert "all-reduce of 8,192 bytes, 2 GPUs: 12.5 µs" in text
    assert json.loads(table.dumps(fitted)) == fitted
    assert max(len(line) for line in table.dumps(profile).splitlines() if '"fit"' not in line) < 400


def test_fit_is_none_where_there_is_none(monkeypatch):
    for module in ("planner.profile", "planner.profile.fit"):
        monkeypatch.setitem(sys.modules, module, None)
    assert fit_errors({}) is None


def test_a_fit_that_fails_loses_no_profile(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "fit_errors", lambda profile: [][0])
    assert run(tmp_path / "p.json") == 0
    assert "the points could not be fitted: IndexError" in capsys.readouterr().err
    assert all(kv["fit"] is None for kv in json.loads((tmp_path / "p.json").read_text())["kv"].values())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without")
def test_allreduce_between_processes():
    rows = measure_allreduce(2, "gloo", sizes=(64, 8192))
    assert [(row["world_size"], row["bytes"]) for row in rows] == [(2, 64), (2, 8192)]
    for row in rows:
        assert 0 < row["low_s"] <= row["time_s"] <= row["high_s"]
        assert row["samples"] >= 10
    assert [world_sizes(count) for count in (1, 2, 4, 7, 8)] == [[], [2], [2, 4], [2, 4], [2, 4, 8]]
