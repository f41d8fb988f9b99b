"""Calibration tests run the engine, and so kernels, in Triton's interpreter where there is no GPU."""

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    # Read when a kernel is decorated, so before any test module of this folder imports one.
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)

# It runs the simulator, whose libraries a machine that only runs the engine may lack.
_LACKING = [library for library in ("pydantic", "simpy") if importlib.util.find_spec(library) is None]
collect_ignore: list[str] = ["test_pipeline.py"] if _LACKING else []
