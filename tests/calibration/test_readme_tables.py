"""What the READMEs say of accuracy is what the committed records say."""

import json

import pytest

from calibration.measure.fit import fit_errors
from planner.profile.schema import read_profile
from tests.calibration.readme_tables import PROFILES, TABLES, signed, tables


@pytest.mark.parametrize(("path", "rows", "begin"), TABLES, ids=lambda each: getattr(each, "name", None))
def test_tables_are_those_of_the_records(path, rows, begin):
    text = path.read_text()
    assert tables(text, rows(), begin) == text, "python -m tests.calibration.readme_tables writes them"


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.json*")), ids=lambda path: path.name)
def test_profiles_tell_the_errors_of_the_present_fit(path):
    profile = json.loads(read_profile(path))
    for name, errors in fit_errors(profile).items():
        kept = profile["kv"][name]["fit"]
        assert set(kept) == set(errors), "python -m calibration.refit writes them"
        for table in ("decode", "prefill", "mixed", "service, prompt"):
            which = "in_sample" if table.startswith("service") else "leave_one_out"
            assert kept[table][which] == pytest.approx(errors[table][which], rel=1e-3, abs=1e-6)


def test_errors_are_signed_but_for_nothing():
    assert [signed(each) for each in (0.0123, -0.0456, 0.0001, -0.0004)] == ["+1.2", "−4.6", "0.0", "0.0"]
