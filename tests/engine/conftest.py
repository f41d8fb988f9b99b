"""Engine tests run PyTorch on the CPU, and Triton kernels on a GPU or, where there is none, in Triton's interpreter."""

import os

import torch

if not torch.cuda.is_available():
    # Read when a kernel is decorated, so before any test module of this folder imports one.
    os.environ["TRITON_INTERPRET"] = "1"

# Tensors of tiny models are not worth a second thread, and threads of several test processes wait for one another.
torch.set_num_threads(1)
