"""Small arrays between host and device without waiting: one copy per step each way.

Host buffers are pinned and used in turn. A buffer comes round again after `DEPTH` copies, when the step that used it
has long been completed: at most two are in flight, and a step makes at most two copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

DEPTH = 8


def aligned(size: int) -> int:
    """Up to a multiple of 16 bytes in int32: Triton compiles a kernel anew for a pointer of another alignment."""
    return -(-size // 4) * 4


class Upload:
    """Many int32 arrays in one asynchronous copy, each from a multiple of 16 bytes on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned: list[torch.Tensor | None] = [None] * DEPTH
        self._turn = 0

    def send(self, arrays: Sequence[np.ndarray], out: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Copy arrays to the device, into `out` (int32, long enough) or new memory; views in the arrays' shapes."""
        total = sum(aligned(array.size) for array in arrays)
        host = self._host(total)
        numbers = host.numpy()
        at, views = 0, []
        target = torch.empty(total, dtype=torch.int32, device=self._device) if out is None else out
        for array in arrays:
            end = at + array.size
            numbers[at:end] = array.reshape(-1)
            views.append(target[at:end].view(array.shape))
            at += aligned(array.size)
        target[:total].copy_(host[:total], non_blocking=True)
        return views

    def _host(self, size: int) -> torch.Tensor:
        self._turn = (self._turn + 1) % DEPTH
        buffer = self._pinned[self._turn]
        if buffer is None or buffer.numel() < size:
            capacity = max(1 << (size - 1).bit_length(), 4096)
            pin = self._device.type == "cuda"
            buffer = self._pinned[self._turn] = torch.empty(capacity, dtype=torch.int32, pin_memory=pin)
        return buffer


class PendingTokens:
    """Tokens that a step in flight samples, on their way to the host."""

    def __init__(
        self, tokens: torch.Tensor, start: torch.cuda.Event | None = None, logprobs: torch.Tensor | None = None
    ) -> None:
        """
        Args:
            tokens: int64 [num_samples] on the device.
            start: recorded when the step began, for `gpu_s`.
            logprobs: int32, on the device, what else the step found; see `engine.sampling.token_logprobs`.
        """
        self._start, self._end = start, None
        self._host, self._logprobs = _to_host(tokens), None if logprobs is None else _to_host(logprobs)
        if tokens.is_cuda:
            self._end = torch.cuda.Event(enable_timing=start is not None)
            self._end.record()

    def tokens(self) -> list[int]:
        """Wait for them."""
        if self._end is not None:
            self._end.synchronize()
        return self._host.tolist()

    def logprobs(self) -> np.ndarray | None:
        """What was given with them; call after `tokens`."""
        return None if self._logprobs is None else self._logprobs.numpy()

    def gpu_s(self) -> float | None:
        """Time that the step took on the GPU, of the order of it; call after `tokens`."""
        if self._start is None or self._end is None:
            return None
        return self._start.elapsed_time(self._end) * 1e-3


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, on its way; of a CPU's tensor the tensor itself."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
