"""GPU kernels and their PyTorch references. Knows tensors; knows no model and no request."""
