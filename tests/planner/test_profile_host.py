"""What the CPU takes for a step, fitted from points whose costs are known, and from the shipped profiles."""

import random
from dataclasses import astuple, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles_for_tests import PIECES

from engine.scheduling import StepShape
from planner.profile.host import HostCost, fit_host
from planner.profile.library import shipped_profiles
from planner.profile.regression import grow
from planner.profile.tables import EngineSettings, KVTables, Point, point_shape

ENGINE = EngineSettings(graph_sizes=(1, 2, 4, 8), piece_sizes=PIECES)
TRUE = HostCost(2.4e-3, mixed_s=1.4e-3, context_s=0.8e-3, row_s=2e-6, chunk_s=1e-4, token_s=4e-7)


def points(cost: HostCost, noise: float = 0.0, seed: int = 0, count: int = 60) -> list[Point]:
    """Steps in pieces, of which half have decodes beside, and a third of the chunks a context."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        chunks = tuple((rng.randint(1, 400), rng.choice((0, 0, 512))) for _ in range(rng.choice((1, 1, 2, 3))))
        decodes = ((rng.randint(1, 4000), rng.randint(1, 200)),) if rng.random() < 0.5 else ()
        point = Point(chunks, decodes, 20e-3, 20e-3, 20e-3, gpu_s=20e-3, alone_s=21e-3)
        found.append(replace(point, host_s=cost.seconds(point_shape(point)) * (1 + noise * rng.gauss(0, 1))))
    return found


def fitted(mixed: list[Point]) -> HostCost:
    decode = Point((), ((100, 1),), 5e-3, 5e-3, 5e-3, gpu_s=5e-3, host_s=1e-4)
    return fit_host(KVTables((decode,), (), tuple(mixed)), ENGINE).costs["pieces"]


def test_every_cost_is_found():
    found = fitted(points(TRUE))
    assert astuple(found) == pytest.approx(astuple(TRUE), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_steps_that_were_disturbed_bend_little(seed):
    mixed = points(TRUE, 0.03, seed)
    for point in random.Random(seed).sample(range(len(mixed)), 4):
        mixed[point] = replace(mixed[point], host_s=2.5 * mixed[point].host_s)
    found = fitted(mixed)
    steps = [point_shape(point) for point in points(TRUE, seed=100 + seed)]
    errors = [found.seconds(step) / TRUE.seconds(step) - 1 for step in steps]
    assert np.median(np.abs(errors)) < 0.03
    assert np.max(np.abs(errors)) < 0.1


def test_a_cost_that_is_not_there_is_dropped():
    mixed = points(HostCost(3e-3, token_s=1e-6), 0.001)
    decode = Point((), ((100, 1),), 5e-3, 5e-3, 5e-3, gpu_s=5e-3, host_s=1e-4)
    fit = fit_host(KVTables((decode,), (), tuple(mixed)), ENGINE)
    assert set(fit.errors["host pieces"]["dropped"]) >= {"mixed", "context", "row", "admitted"}
    assert fit.costs["pieces"].token_s == pytest.approx(1e-6, rel=0.05)


@given(
    st.lists(st.tuples(st.integers(1, 500), st.sampled_from([0, 64, 700])), max_size=4),
    st.lists(st.integers(0, 5000), max_size=50),
    st.floats(0.1, 3.0),
)
@settings(deadline=None)
def test_more_of_a_step_costs_no_less(chunks, contexts, factor):
    if not chunks and not contexts:
        return
    step = StepShape(prefills=chunks, decode_contexts=contexts)
    more = StepShape(prefills=[*chunks, (5, 0)], decode_contexts=[*contexts, 9])
    assert TRUE.seconds(step) <= TRUE.seconds(more)
    assert TRUE.scaled(factor).seconds(step) == pytest.approx(factor * TRUE.seconds(step))
    if not chunks:
        assert TRUE.seconds(step) == TRUE.step_s + TRUE.row_s * len(contexts)


def test_decodes_beside_prompts_cost_the_cpu_more_in_every_shipped_profile():
    """One or two kernels more per layer: over a fifth of what prompts alone cost it."""
    for profile in shipped_profiles():
        for name in profile.tables.kv:
            fit = fit_host(profile.tables.kv[name], profile.tables.engine)
            cost = fit.costs["pieces"]
            assert cost.mixed_s > 0.2 * cost.step_s
            # The CPU of a virtual machine is now and then half as fast for seconds.
            assert fit.errors["host pieces"]["in_sample"]["median"] < 0.12


def test_columns_are_taken_one_after_another():
    rng = np.random.default_rng(0)
    one, columns = np.ones(80), {name: rng.uniform(0, 1, 80) for name in "abc"}
    target = 2 + 3 * columns["b"] + 0.2 * columns["c"]
    chosen = grow({"one": one}, columns, target, 1 / target)
    assert chosen.values == pytest.approx({"one": 2.0, "a": 0.0, "b": 3.0, "c": 0.2}, abs=1e-6)
    assert chosen.dropped == ("a",)
    # No more columns than rows.
    few = grow({"one": one[:2]}, {name: column[:2] for name, column in columns.items()}, target[:2], 1 / target[:2])
    assert set(few.dropped) == set("abc")
