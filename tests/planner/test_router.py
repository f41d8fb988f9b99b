"""Worked examples of the three routers."""

from __future__ import annotations

import pytest

from planner.errors import UserError
from planner.simulation.router import ROUTERS, LeastOutstanding, PrefixAffinity, RoundRobin, make_router


def test_round_robin_ignores_load_and_prefix():
    router = RoundRobin()
    assert [router.choose([9, 0, 5], [7]) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_round_robin_when_a_replica_goes():
    router = RoundRobin()
    assert [router.choose([0] * n, ()) for n in (3, 3, 3, 2, 2, 1)] == [0, 1, 2, 1, 0, 0]


@pytest.mark.parametrize(
    ("outstanding", "chosen"), [([3, 1, 2], 1), ([0, 0, 0], 0), ([2, 1, 1], 1), ([4], 0), ([5, 4, 3, 2], 3)]
)
def test_least_outstanding(outstanding, chosen):
    assert LeastOutstanding().choose(outstanding, ["some", "prefix"]) == chosen


def test_prefix_affinity():
    router = PrefixAffinity()
    # Nothing is known: the least busy.
    assert router.choose([1, 0, 2], [10, 11, 12]) == 1
    # Two blocks match at replica 1, although it is busier.
    assert router.choose([0, 1, 0], [10, 11, 99]) == 1
    # Another family goes to the least busy, the first of two.
    assert router.choose([0, 2, 0], [20, 21]) == 0
    # A prefix matches from its start only: 11 and 12 in the middle do not count.
    assert router.choose([1, 2, 0], [50, 11, 12]) == 2
    # Replicas 1 and 0 both know something; the longer match wins.
    assert router.choose([0, 2, 0], [10, 11, 12, 13]) == 1
    assert router.choose([1, 0, 0], [20, 77]) == 0
    # What was sent is remembered: 13 follows [10, 11, 12] at replica 1 now.
    assert router.choose([0, 5, 0], [10, 11, 12, 13, 14]) == 1


def test_prefix_affinity_breaks_ties_by_load():
    router = PrefixAffinity()
    assert router.choose([0, 9], [1, 2]) == 0
    assert router.choose([9, 0], [1, 2]) == 1  # nine more than the least busy: too busy
    # Both have been sent the prefix now.
    assert router.choose([3, 2], [1, 2, 3]) == 1
    assert router.choose([3, 3], [1, 2]) == 0


@pytest.mark.parametrize(
    ("outstanding", "chosen"),
    [
        ([8, 0], 0),  # 8 more is not yet too many
        ([9, 0], 1),
        ([18, 10], 0),
        ([19, 16], 0),
        ([24, 16], 0),  # 8 more, 1.5 times as many
        ([25, 16], 1),
        ([60, 40], 0),  # 20 more, but only 1.5 times as many
        ([61, 40], 1),
    ],
)
def test_prefix_affinity_gives_way_under_load(outstanding, chosen):
    router = PrefixAffinity(absolute_slack=8, relative_slack=1.5)
    assert router.choose([0, 1], [1, 2, 3]) == 0
    assert router.choose(outstanding, [1, 2, 3]) == chosen


def test_prefix_affinity_without_prefixes_is_least_outstanding():
    router = PrefixAffinity()
    for outstanding in ([3, 1, 2], [0, 0], [2, 1, 1], [4]):
        assert router.choose(outstanding, ()) == LeastOutstanding().choose(outstanding, ())


def test_routers_by_name():
    assert {name: type(make_router(name)) for name in ROUTERS} == {
        "round-robin": RoundRobin,
        "least-outstanding": LeastOutstanding,
        "prefix-affinity": PrefixAffinity,
    }
    one, two = make_router("round-robin"), make_router("round-robin")
    assert (one.choose([0, 0], ()), one.choose([0, 0], ()), two.choose([0, 0], ())) == (0, 1, 0)
    with pytest.raises(UserError, match="did you mean 'round-robin'"):
        make_router("roundrobin")
