"""`memwall validate`: the simulator against what the engine did."""

from __future__ import annotations


def validate(arguments: list[str]) -> int:
    """Compare the simulator with served workloads that the engine recorded.

    The arrivals and lengths of each record of `memwall bench serve` are simulated with the record's settings and a
    profile's step times. Errors are printed beside the engine's own run-to-run spread, with where they come from.
    """
    from calibration.validate.command import run

    return run(arguments)


validate.takes_arguments = True
