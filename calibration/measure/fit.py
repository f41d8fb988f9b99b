"""The errors of the planner's fit of a profile, where the planner's profiles are installed beside the engine."""

from __future__ import annotations

import importlib
from typing import Any

_FIT = "planner.profile.fit"


def fit_errors(profile: dict[str, Any]) -> dict[str, Any] | None:
    """Errors of the fit by KV dtype, leave-one-out ones among them; None where there is no fit here."""
    try:
        fit = importlib.import_module(_FIT)
    except ModuleNotFoundError as error:
        if error.name is not None and _FIT.startswith(error.name):
            return None
        raise
    errors = getattr(fit, "fit_errors", None)
    return None if errors is None else errors(profile)
