"""Engine tests run PyTorch on the CPU, and Triton kernels on a GPU or, where there is none, in Triton's interpreter."""

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    # Read when a kernel is decorated, so before any test module of this folder imports one.
    os.environ["TRITON_INTERPRET"] = "1"

# Tensors of tiny models are not worth a second thread, and threads of several test processes wait for one another.
torch.set_num_threads(1)

collect_ignore: list[str] = []


def _lacks(*libraries: str) -> bool:
    return any(importlib.util.find_spec(library) is None for library in libraries)


# These look at the engine from the planner, whose libraries a machine that only runs the engine may lack.
if _lacks("pydantic", "typer"):
    collect_ignore += ["test_engine_bench.py", "test_generate_command.py", "test_kv_groups.py", "test_serve_command.py"]

# The server's libraries, and its clients'.
if _lacks("prometheus_client"):
    collect_ignore += ["test_server_metrics.py"]
if _lacks("fastapi", "httpx", "openai", "prometheus_client", "schemathesis", "uvicorn"):
    collect_ignore += ["test_serve_command.py", "test_server_app.py", "test_server_openai.py", "test_server_schema.py"]
    collect_ignore += ["test_server_soak.py"]
