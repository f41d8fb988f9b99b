"""Numbers are shown to the digits that their interval allows."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboard.services.results import _pair, shown, shown_capacity, shown_range, usd, verdict


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
