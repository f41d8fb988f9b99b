"""What the READMEs say of accuracy is what the committed records say."""

import pytest

from tests.calibration.readme_tables import TABLES, signed, tables


@pytest.mark.parametrize(("path", "rows", "begin"), TABLES, ids=lambda each: getattr(each, "name", None))
def test_tables_are_those_of_the_records(path, rows, begin):
    text = path.read_text()
    assert tables(text, rows(), begin) == text, "python -m tests.calibration.readme_tables writes them"


def test_errors_are_signed_but_for_nothing():
    assert [signed(each) for each in (0.0123, -0.0456, 0.0001, -0.0004)] == ["+1.2", "−4.6", "0.0", "0.0"]
