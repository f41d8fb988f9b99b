"""The tensors that describe one step, made once by the runner and handed to all layers.

Rows (tokens) and sequences stand in the same order, decodes before prompt chunks:

    tokens      | d0 | d1 | d2 | p0 p0 p0 p0 p0 | p1 p1 p1 | (padding) |
    sequences   |  0 |  1 |  2 |       3        |    4     |
    decode      [num_decode_seqs = 3, num_decode_tokens = 3]
    prefill                    [ num_tokens of them = 8    ]

A decode (or, later, a verification) has 1 to 16 tokens and is attended to by the decode kernel; prompt chunks go to the
prefill kernel. Padding rows exist in CUDA graphs only: padding sequences have no tokens, and rows behind the last
sequence have slot -1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class GroupBatch:
    """What is particular to one KV group (layers that share block tables).

    Attributes:
        block_tables: int32 [num_seqs, max_pages], page ids by position // page_size. Pages behind a sliding window hold
            anything.
        slots: int64 [num_tokens], page · page_size + offset of each new token, -1 for padding.
    """

    block_tables: torch.Tensor
    slots: torch.Tensor


@dataclass
class PrefillBatch:
    """The prompt chunks of a step, counted from their first row.

    Attributes:
        first_seq, first_token: where they begin in the step.
        query_start: int32 [num_prefills + 1], starting at 0.
        context_lens: int32 [num_prefills], tokens already in the cache.
        max_query_len, max_context_len: of any of them, known on the host.
        host_context_lens, host_query_lens: the same lengths as Python integers.
    """

    first_seq: int
    first_token: int
    query_start: torch.Tensor
    context_lens: torch.Tensor
    max_query_len: int
    max_context_len: int
    host_context_lens: list[int]
    host_query_lens: list[int]


@dataclass(frozen=True)
class Places:
    """Where the KV of new tokens goes.

    Attributes:
        positions: int64 [num_tokens].
        slots: of each KV group, as in `GroupBatch`.
    """

    positions: torch.Tensor
    slots: tuple[torch.Tensor, ...]


@dataclass
class StepBatch:
    """One step.

    Attributes:
        token_ids, positions: int64 [num_tokens].
        seq_lens: int32 [num_seqs], tokens of each sequence, the new ones included.
        query_start: int32 [num_seqs + 1].
        num_decode_seqs, num_decode_tokens: how many of them come first; in a CUDA graph padding included.
        max_decode_query_len: 1, or k + 1 when drafts are verified.
        groups: by KV group.
        prefill: None where there is no prompt chunk.
        sampled_rows: int64 [num_samples], rows whose logits are wanted; None for all rows.
        residual_slots, flushed_lens, committed_lens, next_flushed_lens: int32 [num_seqs], for the low-bit KV formats
            (`kernels.pages`): the residual window of each sequence, its tokens in quantised pages before the step,
            its tokens that no later step rejects, and its tokens in quantised pages after the step. None where no
            layer has such a format.
        attended: [num_tokens or more, num_q_heads, head_dim], where attention may put its result; None for new memory.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    seq_lens: torch.Tensor
    query_start: torch.Tensor
    num_decode_seqs: int
    num_decode_tokens: int
    max_decode_query_len: int
    groups: tuple[GroupBatch, ...]
    prefill: PrefillBatch | None = None
    sampled_rows: torch.Tensor | None = None
    residual_slots: torch.Tensor | None = None
    flushed_lens: torch.Tensor | None = None
    committed_lens: torch.Tensor | None = None
    next_flushed_lens: torch.Tensor | None = None
    attended: torch.Tensor | None = None

    @property
    def places(self) -> Places:
        return Places(self.positions, tuple(group.slots for group in self.groups))

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_seqs(self) -> int:
        return self.seq_lens.shape[0]
