"""Attention in plain PyTorch: the specification of the kernels, and the engine's backend on a CPU.

Names and shapes are those of the kernels: `query` [num_tokens, num_q_heads, head_dim] holds the new tokens of all
sequences one after the other, sequence b's being rows query_start[b] .. query_start[b + 1]; `key` and `value`
[num_keys, num_kv_heads, head_dim] hold the keys of all sequences likewise, cut by `key_start`. The new tokens are the
last keys of their sequence. Query head h reads KV head h // (num_q_heads // num_kv_heads).
"""

import math

import torch


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    query_start: torch.Tensor,
    key_start: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of a flat batch over keys that lie in a row; quadratic memory.

    Args:
        query_start, key_start: int [num_seqs + 1]; key_start defaults to query_start, sequences without context.
        softmax_scale: factor on the logits, head_dim ** -0.5 by default.
        window: the query at position i sees the positions j with i - window < j <= i.
        soft_cap: logits become soft_cap · tanh(logit / soft_cap) before the mask.
        dtype: of all arithmetic. float64 is the truth; a 16-bit type is "the same math done plainly", whose error
            bounds a kernel's in FlashAttention's tests (scale folded into the keys, softmax rounded to the type).

    Returns:
        Output [num_tokens, num_q_heads, head_dim] in `dtype`, and the natural-log sum of exponentials
        [num_tokens, num_q_heads] in `dtype`, at least float32. A query without keys: 0 and -inf.
    """
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    group = query.shape[1] // key.shape[1]
    query_cuts = query_start.tolist()
    key_cuts = query_cuts if key_start is None else key_start.tolist()
    lse_dtype = torch.promote_types(dtype, torch.float32)
    out = query.new_zeros(query.shape[:2] + value.shape[2:], dtype=dtype)
    lse = query.new_full(query.shape[:2], -torch.inf, dtype=lse_dtype)
    for b in range(len(query_cuts) - 1):
        new, keys = slice(query_cuts[b], query_cuts[b + 1]), slice(key_cuts[b], key_cuts[b + 1])
        q = query[new].to(dtype).transpose(0, 1)
        k = key[keys].to(dtype).repeat_interleave(group, dim=1).transpose(0, 1)
        v = value[keys].to(dtype).repeat_interleave(group, dim=1).transpose(0, 1)
        logits = q @ (k * scale).transpose(1, 2)
        if soft_cap is not None:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        logits = logits.masked_fill(~visible(q.shape[1], k.shape[1], window, query.device), -torch.inf)
        weights = torch.softmax(logits, dim=-1).nan_to_num(0.0)  # a row without keys is 0/0
        out[new] = (weights @ v).transpose(0, 1)
        lse[new] = torch.logsumexp(logits.to(lse_dtype), dim=-1).transpose(0, 1)
    return out, lse


def visible(query_len: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which keys each new token sees: bool [query_len, num_keys]. The last query is at the last key."""
    i = torch.arange(num_keys - query_len, num_keys, device=device)[:, None]
    j = torch.arange(num_keys, device=device)[None, :]
    mask = j <= i
    return mask if window is None else mask & (j > i - window)


def in_a_row(sequences: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequences' (key, value), as `kernels.reference.pages.gather` returns them, as one flat batch.

    Returns:
        key, value [sum of lengths, num_kv_heads, head_dim] and their cuts, int32 [num_seqs + 1].
    """
    key, value = (torch.cat([pair[i] for pair in sequences]) for i in (0, 1))
    return key, value, start_of(torch.tensor([len(pair[0]) for pair in sequences], device=key.device))


def start_of(lengths: torch.Tensor) -> torch.Tensor:
    """Where each of a flat batch's sequences begins, and its end: int32 [num_seqs + 1]."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def join(
    context: tuple[torch.Tensor, torch.Tensor, torch.Tensor], new: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequence by sequence, the new tokens' (key, value, start) behind those of the context."""
    cuts, new_cuts = context[2].tolist(), new[2].tolist()
    pieces = [
        part
        for b in range(len(cuts) - 1)
        for part in ((context, slice(cuts[b], cuts[b + 1])), (new, slice(new_cuts[b], new_cuts[b + 1])))
    ]
    key, value = (torch.cat([source[i][rows].to(new[i].dtype) for source, rows in pieces]) for i in (0, 1))
    return key, value, context[2] + new[2]


def merge_partials(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of disjoint sets of keys, from the attention over each.

    With w_i = exp(lse_i - lse), lse = log Σ exp(lse_i): out = Σ w_i · out_i. Associative and commutative.

    Args:
        outs: [num_partials, ..., head_dim], each normalised over its own keys.
        lses: [num_partials, ...], natural log; -inf marks an empty set, whose `outs` may hold anything.

    Returns:
        out [..., head_dim] and lse [...]; 0 and -inf where all sets are empty.
    """
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.where(lses == -math.inf, 0.0, torch.exp(lses - torch.where(lse == -math.inf, 0.0, lse)))
    parts = torch.where((lses == -math.inf)[..., None], 0.0, outs)
    return (weights[..., None] * parts).sum(0), lse
