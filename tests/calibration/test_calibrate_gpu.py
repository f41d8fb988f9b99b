"""Calibration on a GPU: graphs, pieces, two steps in flight, and the events that time them."""

import gc
import json
from itertools import pairwise

import pytest
import torch

from calibration import calibrate as command
from calibration.measure.clock import QUICK, SECTIONS, Clock
from calibration.measure.grid import DECODE, MIXED, PREFILL, TABLES, Point, Room, points
from calibration.measure.served import QUICK as QUICK_SERVICE
from calibration.measure.served import Service
from calibration.measure.steps import Effort, StepRunner
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

pytestmark = pytest.mark.gpu

SETTINGS = {
    "load_format": "dummy",
    "device": "cuda",
    "max_num_seqs": 16,
    "max_num_batched_tokens": 2048,
    "max_model_len": 4096,
    "num_gpu_blocks_override": 600,
    "enable_prefix_caching": False,
}
BRIEF = Effort(least=5, most=5, seconds=0.0, alone=3, retries=0)
# And the size of the graph that runs each. Of the others everything but attention runs in pieces.
SHAPES = (
    (Point.of(DECODE, (), [100]), 1),
    (Point.of(DECODE, (), [100, 2000, 7, 63, 64]), 8),
    (Point.of(DECODE, (), [1000] * 16), 16),
    (Point.of(PREFILL, [(200, 0)]), None),
    (Point.of(PREFILL, [(100, 1500)]), None),
    (Point.of(PREFILL, [(2048, 0)]), None),
    (Point.of(MIXED, [(20, 500), (330, 0), (40, 0)], [60, 61, 1, 700]), None),
)


@pytest.fixture(autouse=True)
def freed_memory():
    """Engines are in reference cycles with their graphs, which measuring keeps from the collector."""
    yield
    gc.unfreeze()
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8", "int8", "int4"])
def test_steps_of_every_kind(kv_cache_dtype):
    core = EngineCore(EngineConfig(model="tiny", kv_cache_dtype=kv_cache_dtype, **SETTINGS))
    assert core.depth == 2
    assert core.graph_sizes == [1, 2, 4, 8, 16]
    assert core.piece_sizes
    runner = StepRunner(core, effort=BRIEF)
    for layer in core._cache.layers:
        assert bool(layer.pages[1:].flatten(1).any(dim=1).all())
    found_pieces = core._runner._pieces_for
    for point, graph_size in SHAPES:
        used, ahead = [], []
        core._runner._pieces_for = lambda n, used=used: used.append(found_pieces(n)) or used[-1]
        complete = core._complete
        core._complete = lambda ahead=ahead, complete=complete: ahead.append(len(core._in_flight)) or complete()
        measured = runner.measure(point)
        core._complete = complete
        assert measured["graph_size"] == graph_size
        sizes = [size for size in core.piece_sizes if size >= point.num_tokens]
        assert {pieces and pieces.size for pieces in used} == (set() if graph_size else {sizes[0] if sizes else None})
        assert ahead.count(2) >= BRIEF.settling + BRIEF.least  # another was in flight when it was completed
        assert ahead.count(1) == 1 + BRIEF.alone
        assert measured["samples"] == BRIEF.least
        for name in ("step_s", "gpu_s", "alone_s", "host_s"):
            assert 0 < measured[name] < 10
        core.check()
        assert core.scheduler.kv.pool.num_used == 0
    core._runner._pieces_for = found_pieces


def test_steps_of_different_shapes_follow_each_other():
    """Graphs, pieces and eager steps, two in flight, in one stream."""
    core = EngineCore(EngineConfig(model="tiny", **SETTINGS))
    runner = StepRunner(core, effort=BRIEF)
    decode, more = Point.of(DECODE, (), [160] * 3), Point.of(DECODE, (), [500] * 8)
    prompt, eager = Point.of(PREFILL, [(300, 0)]), Point.of(PREFILL, [(2048, 0)])
    stream = [decode, decode, prompt, prompt, more, decode, eager, eager, decode, prompt, more, more]
    records = runner.run(stream)
    assert [record.graph_size for record in records] == [{3: 4, 8: 8}.get(point.num_decodes) for point in stream]
    assert [record.shape.prefills for record in records] == [list(point.prefills) for point in stream]
    assert all(0 < record.gpu_s < 10 for record in records)
    assert all(before.end_s <= after.end_s for before, after in pairwise(records))
    core.check()
    assert core.scheduler.kv.pool.num_used == 0


def test_steps_are_launched_behind_a_prompt():
    """Not how long they take: of so small a model even a long prompt ends before the next step is launched."""
    core = EngineCore(EngineConfig(model="tiny", **SETTINGS))
    runner = StepRunner(core, effort=BRIEF)
    point, before = Point.of(MIXED, [(100, 0)], [160] * 3), Point.of(PREFILL, [(2048, 0)])
    in_flight, launch = [], core._launch

    def launched(*args):
        in_flight.append(len(core._in_flight))
        return launch(*args)

    core._launch = launched
    assert 0 < runner.ahead_s(point, before) < 10
    # A prompt on either side of each step, and all but the first are launched while another is in flight.
    assert len(in_flight) == 2 * BRIEF.ahead + 1
    assert all(in_flight[1:])
    core.check()
    assert core.scheduler.kv.pool.num_used == 0


def test_the_clock():
    """Every table, whatever the numbers of so small a model are."""
    core = EngineCore(EngineConfig(model="tiny", **SETTINGS))
    room = Room(16, 2048, 4096, 600, 64, piece_sizes=tuple(core.piece_sizes))
    clock = Clock(StepRunner(core, effort=BRIEF), room, lambda point: None, QUICK)
    points, decodes, series = (clock.measure(section) for section in SECTIONS)
    assert [row["tokens"] for row in points] == sorted({room.padded(64), room.padded(512)})
    assert [row["batch"] for row in decodes] == [14]
    assert [row["decodes_between"] > 0 for row in series] == [False, True]
    for row in (*points, *decodes):
        assert 0 < row["cool_s"] < 10
        assert 0 < row["hot_s"] < 10
    for row in series:
        assert row["begin_s"] == sorted(row["begin_s"])
        assert len(row["begin_s"]) == len(row["gpu_s"]) >= 2
        assert 0 < row["share"] <= 1
    core.check()
    assert core.scheduler.kv.pool.num_used == 0


def test_a_short_service():
    """Requests come and go, two steps in flight, through graphs, pieces and eager steps."""
    core = EngineCore(EngineConfig(model="tiny", **SETTINGS))
    room = Room(16, 2048, 4096, 600, 64, piece_sizes=tuple(core.piece_sizes))
    rows = Service(core, room, QUICK_SERVICE).measure()
    assert [row["concurrency"] for row in rows] == [4]
    (row,) = rows
    assert len(row["gpu_s"]) > 20
    assert all(0 < taken < 1 for taken in row["gpu_s"])
    assert row["start_s"] == sorted(row["start_s"])
    assert 1 < sum(bool(chunks) for chunks in row["prefills"]) < len(row["prefills"])
    core.check()
    assert core.scheduler.kv.pool.num_used == 0


def test_an_adopted_request_samples_what_a_served_one_does():
    """In a graph, from block tables that no step has written."""
    core = EngineCore(EngineConfig(model="tiny", **SETTINGS))
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    tokens = torch.randint(0, 256, (300,), generator=torch.Generator().manual_seed(1)).tolist()

    def request(name: str, prompt: list[int]) -> Sequence:
        return Sequence(name, prompt, params, max_model_len=core.max_model_len)

    served = request("served", tokens)
    core.add(served)
    core.step()
    core.settle()
    first = list(served.token_ids)
    # Another one takes over the pages and the newest token, as if it had computed them.
    other = request("other", tokens)
    other.append(first[-1:])
    other.num_tokens, other.num_output_tokens, other.num_computed_tokens = 301, 1, 300
    core.adopt([other])
    for layer in core._cache.layers:
        pages = torch.tensor(other.block_tables[0], device="cuda")
        layer.pages[pages] = layer.pages[torch.tensor(served.block_tables[0], device="cuda")]
    updates = {update.sequence: update.new_token_ids for update in [*core.step(), *core.settle()]}
    assert updates[served] == updates[other]
    core.abort(served)
    core.abort(other)
    core.check()


def test_the_command(tmp_path):
    save = tmp_path / "profile.json"
    arguments = ["--model", "tiny", "--load-format", "dummy", "--quick", "--save", str(save), "--commit", "abc"]
    arguments += ["--max-num-seqs", "16", "--max-num-batched-tokens", "512", "--num-gpu-blocks-override", "300"]
    assert command.main([*arguments, "--kv-cache-dtype", "auto,int4"]) == 0
    profile = json.loads(save.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]
    assert list(profile["kv"]) == ["bfloat16", "int4"]
    assert profile["gpu_name"] == torch.cuda.get_device_name()
    assert profile["gpu_memory_bytes"] > 0
    assert profile["engine"]["graph_sizes"] == [1, 2, 4, 8, 16]
    assert profile["engine"]["piece_sizes"][-1] == 512
    assert "notes" not in profile
    assert list(profile["clock"]) == list(SECTIONS)
    sizes = [size for size in profile["engine"]["piece_sizes"] if size >= 64]
    assert [row["tokens"] for row in profile["clock"]["points"]] == sorted({sizes[0], 512})
    assert all(row["steady_s"] > 0 for row in profile["clock"]["points"])
    for kv in profile["kv"].values():
        assert sum(len(kv[name]) for name in TABLES) == len(points(Room(16, 512, 4096, 300, 64), quick=True))
        assert all(point["graph_size"] for point in kv["decode"])
        assert all(point["gpu_s"] > 0 for name in TABLES for point in kv[name])
