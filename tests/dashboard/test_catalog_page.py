"""The catalog's rows are the planner's, and what people add is checked."""

import math

import pandas as pd
import pytest

from dashboard.services import catalog
from planner.catalog import list_gpus, list_models, load_gpu, load_model
from planner.errors import UserError
from planner.memory import GIB

GPU = ("My GPU", 48.0, 1.5, 300.0, 0.0, 32.0, False, 4, 1.25)


def test_every_model_and_gpu_has_a_row():
    assert [row["model"] for row in catalog.model_rows()] == list(list_models())
    rows = {row["id"]: row for row in catalog.gpu_rows({}, {"h200_sxm": 2.0})}
    assert list(rows) == list(list_gpus())
    assert rows["h200_sxm"]["your US$/h"] == 2.0
    assert rows["h100_sxm"]["your US$/h"] is None
    assert rows["h100_sxm"]["US$/h"] == load_gpu("h100_sxm").price_typical.usd_per_gpu_hour


def test_an_added_model_has_the_row_that_the_catalog_would_give_it():
    model = load_model("qwen3-8b")
    known = next(row for row in catalog.model_rows() if row["model"] == "qwen3-8b")
    own = catalog.own_model_row(model)
    assert {k: v for k, v in own.items() if k != "source"} == {k: v for k, v in known.items() if k != "source"}


def test_an_added_gpu():
    gpu = catalog.own_gpu(*GPU)
    assert gpu.id == "my_gpu"
    assert gpu.memory_bytes == 48 * GIB
    assert gpu.fp8_flops is None
    assert gpu.price_typical.usd_per_gpu_hour == 1.25
    assert catalog.gpu_rows({gpu.id: gpu}, {})[-1]["id"] == "my_gpu"
    assert catalog.own_gpu(*GPU[:-1], 0.0).price_typical is None


@pytest.mark.parametrize("name", ["h200-sxm", "", "../x", "a" * 60, "ümlaut"])
def test_names_that_no_gpu_may_have(name):
    with pytest.raises(UserError):
        catalog.own_gpu(name, *GPU[1:])


def test_prices_that_people_write():
    frame = pd.DataFrame({"id": ["a", "b", "c"], "your US$/h": [2.0, math.nan, -1.0]})
    assert catalog.prices_of(frame) == {"a": 2.0}
