"""`memwall calibrate`: measure this device for the planner."""

from __future__ import annotations


def calibrate(arguments: list[str]) -> int:
    """Measure an engine on this GPU for a profile, from which plan and simulate foresee its steps.

    One GPU, one model, one or more KV formats, at most ten minutes. A run that was ended goes on where it stopped.
    Try it without a GPU: memwall calibrate --model tiny --load-format dummy --quick --max-num-seqs 8
    --max-num-batched-tokens 256 --max-model-len 512 --save profile.json
    """
    from calibration.calibrate import run

    return run(arguments)


calibrate.takes_arguments = True
