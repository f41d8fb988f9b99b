"""Calibration tests run the engine, and so kernels, in Triton's interpreter where there is no GPU."""

import os

import torch

if not torch.cuda.is_available():
    # Read when a kernel is decorated, so before any test module of this folder imports one.
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)
