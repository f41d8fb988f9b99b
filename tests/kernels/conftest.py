"""Kernel tests run on the GPU where there is one, and else under Triton's interpreter on the CPU."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    # Read when a kernel is decorated, so before any test module imports one.
    os.environ["TRITON_INTERPRET"] = "1"

from kernels.aot import Compiled  # noqa: E402


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if HAS_CUDA else "cpu")


@pytest.fixture(scope="session")
def dtype() -> torch.dtype:
    """The 16-bit type to test with: the interpreter knows no bfloat16."""
    return torch.bfloat16 if HAS_CUDA else torch.float16


@pytest.fixture
def compile_for_hopper() -> Callable[[Callable[[], Compiled]], Compiled]:
    """Run a function of the test module that returns a `Compiled`, in a process without the interpreter."""

    def compile_specimen(specimen: Callable[[], Compiled]) -> Compiled:
        here, root = Path(__file__).parent, Path(__file__).parents[2]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join([str(root), str(here), environment.get("PYTHONPATH", "")])
        command = [sys.executable, str(here / "specimens.py"), specimen.__module__, specimen.__name__]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return Compiled(**json.loads(done.stdout.splitlines()[-1]))

    return compile_specimen
