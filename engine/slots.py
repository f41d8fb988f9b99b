"""What the device remembers of each running request, one row per slot.

A slot belongs to a request from its admission until it leaves the running list. The next owner's rows are written by
a later step of the same stream, so a step that is still in flight for the old owner is never disturbed. The last slot
is nobody's: padding of CUDA graphs reads and writes it.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from engine.sequence import Sequence

_PARAMETER_WORDS = 6
_MAX_TEMPERATURE = 1e30  # as good as infinite, and a float32


class Slots:
    """Per-slot tensors on the device; the host keeps the list of free slots.

    Attributes:
        block_tables: per KV group, int32 [num_slots + 1, max_pages].
        last_token: int64 [num_slots + 1], the newest sampled token: the next decode's input.
        temperature, top_p, min_p: float32, top_k: int32, seeds: int64, each [num_slots + 1].
    """

    def __init__(self, num_slots: int, num_groups: int, max_pages: int, device: torch.device) -> None:
        rows = num_slots + 1
        self.trash = num_slots
        self.block_tables = tuple(
            torch.zeros(rows, max_pages, dtype=torch.int32, device=device) for _ in range(num_groups)
        )
        self.last_token = torch.zeros(rows, dtype=torch.int64, device=device)
        self.temperature = torch.zeros(rows, dtype=torch.float32, device=device)
        self.top_p = torch.ones(rows, dtype=torch.float32, device=device)
        self.min_p = torch.zeros(rows, dtype=torch.float32, device=device)
        self.top_k = torch.zeros(rows, dtype=torch.int32, device=device)
        self.seeds = torch.zeros(rows, dtype=torch.int64, device=device)
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def assign(self, sequence: Sequence) -> None:
        """Give a sequence a slot."""
        sequence.slot = self._free.pop()

    def release(self, sequence: Sequence) -> None:
        """Take it back; nothing happens if the sequence has none."""
        if sequence.slot >= 0:
            self._free.append(sequence.slot)
            sequence.slot = -1

    @staticmethod
    def parameters(sequences: Many[Sequence]) -> np.ndarray:
        """Sampling parameters as bit patterns, int32 [num_sequences, 6], to be uploaded for `set_parameters`."""
        words = np.zeros((len(sequences), _PARAMETER_WORDS), np.int32)
        floats = words.view(np.float32)
        for row, sequence in enumerate(sequences):
            params = sequence.params
            floats[row, :3] = min(params.temperature, _MAX_TEMPERATURE), params.top_p, params.min_p
            words[row, 3] = max(params.top_k, 0)
            words[row, 4:].view(np.int64)[0] = sequence.seed
        return words

    def set_parameters(self, slots: torch.Tensor, words: torch.Tensor) -> None:
        """Write uploaded parameters to their slots, int64 [num_sequences]."""
        floats = words.view(torch.float32)
        for column, tensor in enumerate((self.temperature, self.top_p, self.min_p)):
            tensor.index_copy_(0, slots, floats[:, column])
        self.top_k.index_copy_(0, slots, words[:, 3])
        self.seeds.index_copy_(0, slots, words[:, 4:].clone().view(torch.int64).squeeze(1))
