"""`memwall calibrate`: measure this device for the planner."""

from __future__ import annotations


def calibrate(arguments: list[str]) -> int:
    """Measure an engine on this GPU for a profile, from which plan and simulate foresee its steps.

    One GPU, one model, one or more KV formats, at most ten minutes. A run that was ended goes on where it stopped.
    Try it without a model: memwall calibrate --model tiny --load-format dummy --quick --save profile.json
    """
    from calibration.calibrate import run

    return run(arguments)


calibrate.takes_arguments = True
