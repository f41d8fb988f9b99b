"""What differs when kernels run under Triton's interpreter on a CPU (TRITON_INTERPRET=1).

The interpreter of Triton 3.6 has no bfloat16 arithmetic, mis-rounds casts to 8-bit floats and knows no inline assembly
(triton-lang/triton#11584). Kernels take a compile-time switch for each of these, and launchers set it from here.
"""

import functools
import os

import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; on a CPU a few, so that the interpreter sees work split between programs."""
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
