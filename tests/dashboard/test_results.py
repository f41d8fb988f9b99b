"""Numbers are shown to the digits that their interval allows."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboard.services.results import (
    _pair,
    confidence,
    from_to,
    likely,
    shown,
    shown_capacity,
    shown_range,
    usd,
    verdict,
    warnings_of_others,
)


@pytest.mark.parametrize(
    ("value", "interval", "text"),
    [
        (186.63, None, "187"),
        (186.63, (180.9, 194.6), "187"),
        (186.63, (120.0, 260.0), "190"),
        (9.1007, (8.73, 9.28), "9.1"),
        (9.1007, (9.1006, 9.1008), "9.10"),
        (12345.6, None, "12,300"),
        (0.0, None, "0"),
        (0.012345, None, "0.0123"),
        (None, None, "–"),
        (math.inf, None, "–"),
        (5.0, (0.0, 100.0), "5"),
        (325.64, (170.0, 480.0), "330"),
        (34.98, (10.0, 180.0), "30"),
        (34.98, (20.0, 60.0), "35"),
    ],
)
def test_shown(value, interval, text):
    assert shown(value, interval) == text


@given(st.floats(1e-3, 1e6), st.floats(0.0, 0.5))
def test_rounding_never_leaves_the_interval_by_more_than_its_width(value, spread):
    interval = (value * (1 - spread), value * (1 + spread))
    half = (interval[1] - interval[0]) / 2
    assert abs(float(shown(value, interval).replace(",", "")) - value) <= max(half, 0.005001 * value)


def test_ranges_money_and_verdicts():
    assert shown_range((180.9, 194.6)) == "181 to 195"
    assert shown_range(None) == ""
    assert [usd(value) for value in (None, 4.5, 0.12217, 1234.5)] == ["no price", "$4.50", "$0.122", "$1,234.50"]
    assert verdict(True).startswith("✓")
    assert verdict(False).startswith("✗")


def test_intervals_come_in_several_forms():
    class Range:
        low, high = 1, 2

    assert _pair(Range()) == (1.0, 2.0)
    assert _pair((3, 4)) == (3.0, 4.0)
    assert _pair(None) is None
    assert _pair("12") is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(27.96, "27.9"), (28.0, "28.0"), (0.999, "0.999"), (1009.9, "1,000"), (3.005, "3.00"), (0.0, "0")],
)
def test_what_fits_is_rounded_down(value, text):
    assert shown_capacity(value) == text


def planned(rank=1, met=None, of=16, share=None, warnings=(), saturated=0):
    """A plan, as far as it is judged here."""
    loads = None if met is None else SimpleNamespace(met=met, of=of, saturated=saturated)
    sure = SimpleNamespace(slo_probability=SimpleNamespace(low=share[0], high=share[1])) if share else None
    return SimpleNamespace(rank=rank, loads=loads, confidence=sure, warnings=warnings)


@pytest.mark.parametrize(
    ("plan", "cell", "words"),
    [
        (planned(met=16, share=(0.829, 1.0)), "≥ 83 %", "in all 16 draws of load and step times; so many draws show "
         "that it is at least 83 % likely"),
        (planned(met=0, share=(0.0, 0.171)), "≤ 17 %", "in none of 16 draws"),
        (planned(met=12, share=(0.516, 0.902)), "52 to 90 %", "in 12 of 16 draws of load and step times; so few draws "
         "show no more than that it is 52 to 90 % likely"),
        (planned(met=13, share=(0.58, 0.95), saturated=3), "58 to 95 %", "in 13 of 16 draws of load and step times (in "
         "3 of the others requests arrive faster than they are served); so few"),
        (planned(met=4, of=5), "", "held on 4 of 5 loads"),
        (planned(), "", "was not tried on others"),
    ],
)  # fmt: skip
def test_how_sure_a_plan_is(plan, cell, words):
    assert likely(plan) == cell
    assert words in confidence(plan)


def test_what_is_shown_alike_is_the_same():
    assert from_to((150.4, None), (149.6, None)) == "150 → 150 ms (the same)"
    assert from_to((150.4, None), (150.45, None)) == "150 → 150 ms (the same)"
    assert from_to((150.0, (100.0, 200.0)), (148.0, None)) == "150 → 148 ms (−1%)"
    assert from_to((100.0, None), (80.0, None)) == "100 → 80.0 ms (−20%)"


def test_warnings_of_other_plans_name_them_once():
    slow, new = "it is slow", "it is new"
    plans = [planned(1, warnings=(new,)), planned(2, warnings=(slow, slow)), planned(3), planned(4, warnings=(slow,)),
             planned(5, warnings=(slow,)), planned(6, warnings=(slow, new))]  # fmt: skip
    report = SimpleNamespace(plans=plans)
    assert warnings_of_others(report, ()) == ["plans 2 and 4 to 6: it is slow", "plan 6: it is new"]
    assert warnings_of_others(report, (new,)) == ["plans 2 and 4 to 6: it is slow"]
