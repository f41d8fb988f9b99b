"""Settings for every test."""

import importlib.util
import os

import pytest
from hypothesis import settings

# Deadlines fail on a busy machine, not on a bug. In CI the same commit gives the same examples.
settings.register_profile("ci", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("ci")


def has_cuda() -> bool:
    """Whether a CUDA device can be used. Imports torch only where it is installed."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is none; torch stays unimported if nothing is marked."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not has_cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
