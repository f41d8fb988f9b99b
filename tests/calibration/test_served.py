"""The short service of a calibration: what is served, in which order it is written down, and that nothing is left."""

import gc
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from calibration.measure.grid import Room
from calibration.measure.served import QUICK, ServedPlan, Service
from engine.config import EngineConfig
from engine.core import EngineCore
from planner.profile.decode import excess_of
from planner.profile.shape import ModelShape

MODEL = Path(__file__).resolve().parent.parent / "models" / "miniature" / "target"
PLAN = ServedPlan(loads=((8, 64, 0.4), (3, 16, 0.4)), input_tokens=(8, 100), least_output=4, lead_s=(0.1, 0.05))


@pytest.fixture(params=[1, 2])
def core(request):
    config = EngineConfig(
        model=str(MODEL), device="cpu", max_num_seqs=8, max_num_batched_tokens=256, block_size=32,
        enable_prefix_caching=False,
    )  # fmt: skip
    core = EngineCore(config)
    core._depth = request.param
    yield core
    core.check()
    assert not core.has_work
    assert core.scheduler.kv.pool.num_used == 0
    assert core._runner.slots.num_free == 8
    gc.unfreeze()


def room_of(core: EngineCore, **changes) -> Room:
    room = Room(8, 256, core.max_model_len, core.memory.num_blocks, 32, tuple(core.scheduler.kv.windows))
    return replace(room, **changes)


def test_every_step_is_written_down_in_its_order(core):
    logs, serve = [], Service._serve
    service = Service(core, room_of(core), PLAN)
    service._serve = lambda *load: logs.append(serve(service, *load)) or logs[-1]
    rows = service.measure()
    assert [row["concurrency"] for row in rows] == [8, 3]
    assert [row["lead_s"] for row in rows] == [0.1, 0.05]
    shape = ModelShape.from_config(json.loads((MODEL / "config.json").read_text()), None, "float32", 32)
    for row, log in zip(rows, logs, strict=True):
        columns = {name: values for name, values in row.items() if name not in ("concurrency", "lead_s")}
        assert {len(values) for values in columns.values()} == {len(log)}
        assert len(log) > 10
        assert row["start_s"][0] == 0 < row["lead_s"] < row["start_s"][-1]
        assert all(before <= after for before, after in pairwise(row["start_s"]))
        for index, record in enumerate(log):
            contexts = record.shape.decode_contexts
            assert row["prefills"][index] == [list(chunk) for chunk in record.shape.prefills]
            assert row["decodes"][index] == len(contexts)
            assert row["host_s"][index] == pytest.approx(record.host_s, rel=0.01)
            assert row["keys"][index] == shape.decode_keys(contexts)
            assert row["excess"][index] == (excess_of(contexts) if contexts else 0)
            assert 1 <= len(contexts) + len(record.shape.prefills) <= row["concurrency"]
        assert any(row["prefills"])
        # Running ones are there from the start: the first step has no prompts.
        assert row["prefills"][0] == [] and row["decodes"][0] == row["concurrency"]


def test_the_same_seed_serves_the_same_requests(core):
    def lengths(seed):
        service = Service(core, room_of(core), PLAN, seed=seed)
        made = [service._running(64) if index % 2 else service._arriving(64) for index in range(20)]
        return [(each.num_tokens, each.max_output_tokens) for each in made]

    assert lengths(1) == lengths(1) != lengths(2)
    for tokens, output in lengths(1):
        assert 8 <= tokens <= 100 + 64 and 2 <= output <= 66


def test_loads_fit_the_engine(core):
    def loads(plan, **changes):
        return Service(core, room_of(core, **changes), plan)._loads()

    many = ServedPlan(loads=((4, 32, 1.0), (250, 1024, 2.0)), input_tokens=(8, 100))
    assert loads(many, max_model_len=300) == [(4, 32, 1.0), (8, 199, 2.0)]
    # 20 pages of 32 tokens hold three requests of up to 100 + 64 + 1 tokens.
    few = ServedPlan(loads=((4, 64, 1.0), (250, 64, 2.0)), input_tokens=(8, 100))
    assert loads(few, num_blocks=20) == [(3, 64, 1.0)]
    assert loads(few, num_blocks=5) == []
    assert loads(QUICK) == [(4, 32, 0.3)]
