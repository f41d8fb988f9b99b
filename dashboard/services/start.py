"""What a server does once, so that the first visitor need not wait for it."""

from __future__ import annotations

import threading
from functools import cache

from dashboard.services.jobs import jobs
from planner.profile.library import shipped_profiles


@cache
def start() -> None:
    """Start workers, and fit the shipped profiles in the background."""
    jobs()
    threading.Thread(target=fit_profiles, name="profiles", daemon=True).start()


def fit_profiles() -> None:
    """Every shipped profile's fit and its errors, which are remembered."""
    for profile in shipped_profiles():
        for dtype in profile.kv_cache_dtypes:
            profile.uncertainty(dtype)
