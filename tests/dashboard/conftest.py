"""What the tests of the dashboard share: a page as Streamlit would run it, and loads that are soon simulated."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from dashboard.services import jobs as jobs_module
from dashboard.services import questions, work

APP = Path(__file__).parents[2] / "dashboard" / "app.py"


@pytest.fixture(autouse=True)
def _short_loads(monkeypatch) -> None:
    """Loads of a minute; workers are other processes, and get the duration with the question."""
    monkeypatch.setattr(questions, "LOAD_SECONDS", 60.0)
    monkeypatch.setattr(questions, "TRIAL_SECONDS", 40.0)
    monkeypatch.setattr(work, "NUM_OTHERS", 1)


@pytest.fixture
def open_page() -> Callable[..., AppTest]:
    """A page by its file, with query parameters; run until nothing is being computed."""

    def opened(page: str = "plan", **parameters: str) -> AppTest:
        app = AppTest.from_file(str(APP), default_timeout=60)
        for name, value in parameters.items():
            app.query_params[name] = value
        app.run()
        if page != "plan":
            app.switch_page(f"views/{page}.py")
            for name, value in parameters.items():
                app.query_params[name] = value
        return settled(app)

    return opened


def settled(app: AppTest) -> AppTest:
    """The page once everything it asked for is there."""
    for _ in range(12):
        app.run()
        if not any(button.key and button.key.endswith("_cancel") for button in app.button):
            return app
        jobs_module.jobs().wait()
    raise AssertionError("the page never settles")


def figure(app: AppTest, key: str) -> dict:
    """The Plotly figure of a chart, as the browser gets it."""
    for element in app.get("plotly_chart"):
        if element.proto.id.endswith(f"-chart_{key}"):
            return json.loads(element.proto.spec)
    raise AssertionError(f"no chart {key}: {[element.proto.id for element in app.get('plotly_chart')]}")


def table(app: AppTest, *columns: str) -> pd.DataFrame:
    """The first table that has these columns."""
    for element in app.dataframe:
        if set(columns) <= set(element.value.columns):
            return element.value
    raise AssertionError(f"no table of {columns}: {[list(element.value.columns) for element in app.dataframe]}")


def sentences(app: AppTest) -> str:
    """Everything on the page that is text."""
    kinds = ("markdown", "caption", "success", "info", "warning", "error", "title", "subheader")
    return "\n".join(str(element.value) for kind in kinds for element in app.get(kind))


@pytest.fixture(scope="session", autouse=True)
def _no_worker_stays() -> Iterator[None]:
    yield
    jobs_module.jobs().stop()
