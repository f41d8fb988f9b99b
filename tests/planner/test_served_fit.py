"""The fit of a served stream against a device whose clock is known."""

import math
import random
from dataclasses import replace

import pytest

from engine.scheduling import StepShape
from planner.profile.clock import ClockModel, Heat
from planner.profile.fit import fit_kv
from planner.profile.served import fit_served
from planner.profile.shape import ModelShape
from planner.profile.tables import ProfileTables, padded
from tests.planner.profiles_for_tests import Physics, profile

TRUE = ClockModel(0.06, 0.25, 0.7, (128, 256, 512, 1024), (0.99, 0.9, 0.85, 0.84), (1.02, 0.98, 0.97, 1.0), 1.04)
TABLES = ClockModel(0.03, 0.35, 0.8, (128, 512, 1024), (0.98, 0.87, 0.85), (1.03, 1.0, 1.0))


PHYSICS = Physics()
KEY_S = 26.6e-9 / 32  # of the physics
ROW_S = 3e-6  # what each decode beside prompts takes more than points say
COLUMNS = ("start_s", "gpu_s", "prefills", "decodes", "keys", "excess")
HOST = 1.7  # what the CPU takes longer in a service


def stream(sizes, clock, key_ratio=1.0, noise=0.0, steps=2500, seed=0):
    """Steps as a device with this clock would run them, whose keys cost more beside prompts than one by one."""
    draw, heat, ends, start = random.Random(seed), Heat(clock.tau_s), [0.0, 0.0], 0.0
    columns = {name: [] for name in COLUMNS}
    for index in range(steps):
        contexts = [draw.randint(50, 900)] * draw.randint(1, 200)
        busy = index // 250 % 2
        chunks = [(draw.randint(40, 900), 0)] if draw.random() < (0.8 if busy else 0.2) else []
        step, keys = StepShape(chunks, contexts), PHYSICS.keys(contexts)
        host = HOST * PHYSICS.host(step)
        now = max(ends[-1], start + 2e-4)
        level = heat.at(now)
        taken = PHYSICS.seconds(step)
        if chunks:
            size, beside = padded(step.num_tokens, sizes), KEY_S * keys
            taken = (taken - beside) * clock.prompt_factor(size, level, taken)
            taken += key_ratio * beside + ROW_S * len(contexts)  # at the rate of the memory, whatever the clock
        else:
            taken *= clock.decode_factor(level, taken)
        taken *= math.exp(draw.gauss(0.0, noise))
        if noise and draw.random() < 0.02:
            taken *= 1.3  # something else went on
        for name, value in zip(COLUMNS, (start, taken, chunks, len(contexts), keys, 0), strict=True):
            columns[name].append(value)
        heat.ran(now, now + taken, clock.heating(size) if chunks else 0.0)
        ends.append(now + taken)
        start = max(start + host, ends[-2])  # two steps are in flight
    return columns | {"concurrency": 250}


@pytest.fixture(scope="module")
def fitted():
    tables = ProfileTables.from_json(profile(PHYSICS))
    shape = ModelShape.from_config(tables.config, tables.quantization, "bfloat16", tables.engine.block_size)
    return fit_kv(tables.kv["bfloat16"], shape, tables.limits, tables.engine)


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_what_was_put_in_is_found(fitted, noise):
    sizes = fitted.engine.piece_sizes
    runs = [stream(sizes, TRUE, 1.5, noise, seed=seed) for seed in range(2)]
    found = fit_served(runs, fitted, TABLES)
    clock = found.clock
    assert clock.tau_s == pytest.approx(TRUE.tau_s, rel=0.25)
    assert clock.decode == pytest.approx(TRUE.decode, abs=0.01)
    errors = found.errors["prompt"]
    assert errors["points"] > 1500
    assert errors["in_sample"]["median"] < (0.012 if noise else 0.008)
    # On a stream that it has not seen.
    after, heat, off, before, end = found.applied(fitted), Heat(clock.tau_s), [], [], 0.0
    other = stream(sizes, TRUE, 1.5, seed=9)
    for start, taken, chunks, rows, keys, _ in zip(*(other[name] for name in COLUMNS), strict=True):
        begin = max(start, end)
        end = begin + taken
        if chunks:
            size = padded(rows + chunks[0][0], sizes)
            for fit, of, errors in ((after, clock, off), (fitted, TABLES, before)):
                steady, beside = fit.prompt.seconds_of(chunks, rows, keys), fit.prompt.beside_s(rows, keys)
                factor = of.prompt_factor(size, heat.at(begin), steady)
                errors.append(abs(((steady - beside) * factor + beside) / taken - 1))
        heat.ran(begin, begin + taken, clock.heating(size) if chunks else 0.0)
    median, p90 = (sorted(off)[int(len(off) * share)] for share in (0.5, 0.9))
    assert median < 0.012 and p90 < 0.03
    assert median < 0.5 * sorted(before)[len(before) // 2]


def test_what_was_not_seen_stays(fitted):
    """Sizes without steps keep the ratios of the clock's tables."""
    wide = replace(TABLES, tokens=(*TABLES.tokens, 8192), cool=(*TABLES.cool, 0.8), hot=(*TABLES.hot, 0.95))
    found = fit_served([stream(fitted.engine.piece_sizes, TRUE)], fitted, wide).clock
    assert found.tokens[-1] == 8192
    assert found.ratios(8192) == (pytest.approx(0.8, abs=0.03), pytest.approx(0.95, abs=0.05))
    assert set(found.tokens) > set(wide.tokens)


def test_what_decodes_beside_prompts_cost_is_found(fitted):
    """In all, over what is usual; keys and rows come together, so that neither is told well by itself."""
    found = fit_served([stream(fitted.engine.piece_sizes, TRUE, 1.5, seed=seed) for seed in range(2)], fitted, TABLES)
    prompt = found.applied(fitted).prompt
    for rows, context in ((150, 500), (50, 200), (30, 800)):
        keys = PHYSICS.keys([context] * rows)
        assert prompt.beside_s(rows, keys) == pytest.approx(1.5 * KEY_S * keys + ROW_S * rows, rel=0.15, abs=2e-4)


def test_what_is_served_before_the_lead_is_over_tells_of_the_heat_alone(fitted):
    run = stream(fitted.engine.piece_sizes, TRUE)
    disturbed = run | {
        "gpu_s": [2 * s if start < 3 else s for start, s in zip(run["start_s"], run["gpu_s"], strict=True)]
    }
    found, with_lead = (fit_served([each], fitted, TABLES) for each in (disturbed, disturbed | {"lead_s": 3.0}))
    undisturbed = fit_served([run | {"lead_s": 3.0}], fitted, TABLES)
    assert (
        with_lead.errors["prompt"]["points"]
        == undisturbed.errors["prompt"]["points"]
        < found.errors["prompt"]["points"]
    )
    for size in (256, 512):
        for ratio, expected in zip(with_lead.clock.ratios(size), undisturbed.clock.ratios(size), strict=True):
            assert ratio == pytest.approx(expected, abs=0.02)


def test_a_service_that_does_not_tell_its_lead_began_from_rest(fitted):
    """A power limit holds for the average of a second: what is fast before it binds says nothing of a busy device."""
    run = stream(fitted.engine.piece_sizes, TRUE)
    fast = run | {
        "gpu_s": [0.9 * s if start < 0.7 else s for start, s in zip(run["start_s"], run["gpu_s"], strict=True)]
    }
    untold, told, undisturbed = (fit_served([each], fitted, TABLES) for each in (fast, fast | {"lead_s": 0.0}, run))
    assert untold.errors["prompt"]["points"] < told.errors["prompt"]["points"]
    off = [
        sum(abs(each.clock.ratios(size)[1] - undisturbed.clock.ratios(size)[1]) for size in (256, 512))
        for each in (untold, told)
    ]
    assert off[0] < off[1]


def test_a_service_too_short_for_that_tells_by_its_second_half(fitted):
    run = stream(fitted.engine.piece_sizes, TRUE)
    short = {name: run[name][250:300] for name in COLUMNS} | {"concurrency": 250}
    short["start_s"] = [start - short["start_s"][0] for start in short["start_s"]]
    half = short["start_s"][-1] / 2
    assert 0.1 < half < 0.75
    expected = sum(bool(each) for start, each in zip(short["start_s"], short["prefills"], strict=True) if start >= half)
    assert fit_served([short] * 4, fitted, TABLES).errors["prompt"]["points"] == pytest.approx(4 * expected, abs=8)


def test_too_little_to_tell(fitted):
    sizes = fitted.engine.piece_sizes
    assert fit_served([stream(sizes, TRUE, steps=20)], fitted, TABLES) is None
    assert fit_served([stream(sizes, TRUE)], fitted, None) is None


def test_the_cpus_time_is_told_by_what_was_written_down(fitted):
    run = stream(fitted.engine.piece_sizes, TRUE)
    shapes = [StepShape(chunks, [0] * rows) for chunks, rows in zip(run["prefills"], run["decodes"], strict=True)]
    run["host_s"] = [1e-3 + fitted.host.seconds(shape) for shape in shapes]
    found = fit_served([run], fitted, TABLES)
    step = StepShape([(300, 0)], [200] * 10)
    assert found.applied(fitted).host_s(step) == pytest.approx(1e-3 + fitted.host_s(step), rel=1e-6)
    decode = StepShape([], [200] * 10)
    assert found.applied(fitted).host_s(decode) == fitted.host_s(decode)


def test_a_cpu_that_is_always_late_tells_its_own_time():
    """Steps end when their last kernel is launched, and the next decision follows: nothing tells of the device."""
    content = profile(Physics(scale=0.15))
    tables = ProfileTables.from_json(content)
    shape = ModelShape.from_config(tables.config, tables.quantization, "bfloat16", tables.engine.block_size)
    fitted = fit_kv(tables.kv["bfloat16"], shape, tables.limits, tables.engine)
    slow = 2e-3
    run = {"concurrency": 8, "start_s": [], "gpu_s": [], "prefills": [], "decodes": [], "keys": [], "excess": []}
    now = 0.0
    for index in range(400):
        chunks = [(100, 0)] if index % 3 == 0 else []
        for name, value in zip(COLUMNS, (now, 0.8 * slow if chunks else 7e-4, chunks, 8, 32 * 8 * 300, 0), strict=True):
            run[name].append(value)
        now += slow if chunks else 8e-4
    found = fit_served([run], fitted, TABLES)
    assert found.clock == TABLES
    assert found.applied(fitted).host_s(StepShape([(100, 0)], [300] * 8)) == pytest.approx(slow, rel=0.02)
