"""The errors of the planner's fit of a profile, where the planner's profiles are installed beside the engine."""

from __future__ import annotations

from typing import Any


def fit_errors(profile: dict[str, Any]) -> dict[str, dict[str, Any]] | None:
    """Errors of the fit of each KV format, leave-one-out ones among them; None where there is no fit here.

    Raises:
        Exception: of any kind, what the fit finds wrong with the tables.
    """
    try:
        from planner.profile.clock import fit_clock, launched_ahead
        from planner.profile.fit import fit_kv
        from planner.profile.served import fit_served
        from planner.profile.shape import ModelShape
        from planner.profile.tables import ProfileTables
    except ModuleNotFoundError:
        return None
    tables = ProfileTables.from_json(profile)
    found = {}
    for name, kv in tables.kv.items():
        shape = ModelShape.from_config(tables.config, tables.quantization, name, tables.engine.block_size)
        clock = profile.get("clock")
        fitted = fit_kv(kv, shape, tables.limits, tables.engine, launched_ahead(clock))
        found[name] = dict(fitted.errors())
        runs = profile["kv"][name].get("served")
        if runs and (served := fit_served(runs, fitted, fit_clock(clock))) is not None:
            found[name] |= {f"service, {kind}": errors for kind, errors in served.errors.items()}
    return found
