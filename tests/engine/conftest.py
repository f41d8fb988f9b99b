"""Engine tests run PyTorch on the CPU, and Triton kernels on a GPU or, where there is none, in Triton's interpreter."""

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    # Read when a kernel is decorated, so before any test module of this folder imports one.
    os.environ["TRITON_INTERPRET"] = "1"

# Tensors of tiny models are not worth a second thread, and threads of several test processes wait for one another.
torch.set_num_threads(1)

# These look at the engine from the planner, whose libraries a machine that only runs the engine may lack.
if importlib.util.find_spec("pydantic") is None or importlib.util.find_spec("typer") is None:
    collect_ignore = ["test_engine_bench.py", "test_generate_command.py", "test_kv_groups.py"]
