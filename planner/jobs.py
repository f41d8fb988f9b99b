"""Work on several cores, in an order that does not depend on how many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import joblib

from planner.errors import UserError


def check_jobs(n_jobs: int) -> None:
    """Refuse what is no number of processes.

    Raises:
        UserError: it is neither positive nor -1.
    """
    if n_jobs == 0 or n_jobs < -1:
        raise UserError(f"--jobs is {n_jobs}; it must be at least 1, or -1 for one process per core")


def map_jobs(n_jobs: int, function: Callable[..., Any], arguments: list[tuple]) -> Iterator:
    """Results in the order of the arguments, as they come; in this process if parallel ones would not pay.

    Args:
        n_jobs: processes; -1 for all cores.
    """
    if n_jobs == 1 or len(arguments) < 2:
        return (function(*each) for each in arguments)
    parallel = joblib.Parallel(n_jobs=n_jobs, return_as="generator", pre_dispatch="2*n_jobs")
    return parallel(joblib.delayed(function)(*each) for each in arguments)
