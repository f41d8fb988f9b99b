"""What people added, in a link and out of it again."""

import base64
import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboard.services import catalog, links, uploads
from planner.catalog import list_models, model_entry
from planner.errors import UserError

NUMBERS = [48.0, 1.5, 300.0, 0.0, 32.0, False, 4, 1.25]
VALUES = st.dictionaries(st.text(max_size=8), st.floats(allow_nan=False) | st.text(max_size=8), max_size=5)


@given(VALUES)
def test_documents_come_back(document):
    assert links.unpack(links.pack(document)) == document


@pytest.mark.parametrize("name", list_models())
def test_every_model_of_the_catalog_would_fit_into_a_link(name):
    config = dict(model_entry(name)["config"])
    text = links.pack({"models": {"mine": config}})
    assert text is not None
    found = links.own_models(links.unpack(text))["mine"]
    assert found.num_parameters == uploads.model_of("mine", config).num_parameters


def test_a_gpu_comes_back():
    found = links.own_gpus(links.unpack(links.pack({"gpus": {"My GPU": NUMBERS}})))
    assert found == {"my_gpu": catalog.own_gpu("My GPU", *NUMBERS)}


def test_what_is_too_long_is_no_part_of_a_link():
    words = {str(i): hash((i, "x")) for i in range(2000)}
    assert links.pack(words) is None


@pytest.mark.parametrize(
    "numbers", [[1.0], "many", None, [-1.0, *NUMBERS[1:]], ["x", *NUMBERS[1:]], [1e999, *NUMBERS[1:]]]
)
def test_a_gpu_that_is_none_is_refused(numbers):
    with pytest.raises(UserError):
        links.own_gpus({"gpus": {"my_gpu": numbers}})


def test_a_small_link_that_unpacks_into_a_huge_one_is_refused():
    packed = base64.urlsafe_b64encode(zlib.compress(json.dumps({"a": "0" * (8 << 20)}).encode())).decode()
    with pytest.raises(UserError, match="damaged"):
        links.unpack(packed)
