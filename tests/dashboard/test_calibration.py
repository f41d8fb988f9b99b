"""A profile as the page shows it: its own points, the fit's own curves, and errors of points that were left out."""

import pytest

from dashboard.figures import calibration as figures
from dashboard.services import profiles, uploads
from engine.scheduling import StepShape
from planner.errors import UserError
from planner.profile.library import shipped_profiles
from tests.dashboard.test_figures import check

PROFILE = shipped_profiles()[0]


@pytest.mark.parametrize("dtype", [dtype.value for dtype in PROFILE.kv_cache_dtypes])
def test_curves_go_through_what_was_measured(dtype):
    fitted = PROFILE.fitted(dtype)
    for curve in profiles.decode_curves(PROFILE, dtype):
        batch = int(curve.name.split()[0])
        assert curve.measured
        for point in curve.measured:
            assert fitted.seconds(StepShape(decode_contexts=[point.at] * batch)) == pytest.approx(
                point.seconds, rel=0.05
            )
            assert point.low_s <= point.seconds <= point.high_s
        assert dict(curve.fitted)[curve.measured[0].at] == pytest.approx(curve.measured[0].seconds, rel=0.05)
    check(figures.curves(profiles.decode_curves(PROFILE, dtype), "decode"))
    check(figures.curves(profiles.prefill_curves(PROFILE, dtype), "prefill"))


def test_points_are_predicted_by_the_others():
    groups = profiles.left_out_parity(PROFILE.name, None, "bfloat16")
    errors = PROFILE.fitted("bfloat16").errors()
    for group, table in zip(groups, ("decode", "prefill", "mixed"), strict=True):
        assert len(group.points) == errors[table]["points"]
        assert group.median_error == pytest.approx(errors[table]["leave_one_out"]["median"], rel=1e-6)
    check(figures.parity(groups))


def test_error_rows_are_the_fits():
    rows = {row.table: row for row in profiles.errors(PROFILE.name, None, "fp8")}
    errors = PROFILE.fitted("fp8").errors()
    assert rows["decode"].left_out == errors["decode"]["leave_one_out"]
    assert rows["mixed"].points == errors["mixed"]["points"]


def test_an_uploaded_profile_is_used_before_the_shipped_ones():
    from importlib import resources

    content = (resources.files("planner") / "data" / "profiles" / PROFILE.name).read_bytes()
    path, profile = uploads.add_profile("../mine.json", content)
    assert path.name == "mine.json"
    found = profiles.available((str(path),))
    assert [each.name for each in found[:1]] == ["mine.json"]
    assert profile.kv_cache_dtypes == PROFILE.kv_cache_dtypes
    with pytest.raises(UserError, match="version"):
        uploads.add_profile(
            "old.json", content.replace(b'"version": 1', b'"version": 7', 1).replace(b'"version":1', b'"version":7', 1)
        )
