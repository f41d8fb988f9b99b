"""Measured step times: profiles that `memwall calibrate` writes, the fit between their points, what it predicts.

    tables      the points of a profile as plain dataclasses            shape     what timing needs to know of a model
    decode      steps of decodes only                                   prompt    steps with prompt chunks
    host        the CPU's share, and latency with nothing in flight     fit       the three together, and their errors
    schema      reading and refusing files                              library   which profile serves a deployment
    transfer    to another model, KV format, GPU or rank count          step_time the simulator's `StepTime`

`tables`, `shape`, `decode`, `prompt`, `host` and `fit` need numpy and scipy only: calibration runs them on the GPU
machine. This file imports nothing, so that they stay importable there.
"""
