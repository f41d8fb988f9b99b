"""How far attention's output is off where a few channels are large, as they are in the keys of real models.

Four of 128 channels have means of `strength` standard deviations, with alternating signs; the others, and what varies
in all of them, are Gaussian. A mean that all keys share does not move the softmax, so what matters is what quantisation
makes of the rest. Logits have a standard deviation of 2, so that attention is peaked and errors of K show. Inputs are
rounded to bfloat16 first, and the truth is float64 on these.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.bench.record import rounded
from kernels.pages import PageLayout
from kernels.reference.attention import attention
from kernels.reference.pages import dequantise, page_of

FORMATS = ("bfloat16", "fp8", "int8", "int4", "int2")
STRENGTHS = (0, 10, 20, 30)
HEAD_DIM, PAGE_SIZE, NUM_OUTLIERS = 128, 64, 4
_KV_HEADS, _GROUP = 2, 4


def attention_errors(device: torch.device, *, num_seqs: int, context: int, seed: int) -> list[dict[str, Any]]:
    """The error of each format, for outliers in K or in V.

    On a GPU `kernels.decode` attends; on a CPU float64 does, over what the format keeps.

    Args:
        num_seqs: sequences that are attended to, each by one query with 8 heads over 2 KV heads.
        context: tokens of each, a multiple of 64.

    Returns:
        For each format and strength: where ("none", "k", "v"), error ‖o − exact‖ / ‖exact‖, and error_ordinary, the
        same over the channels that are not large.
    """
    found = []
    for where, strength in [("none", 0), *((name, s) for name in "kv" for s in STRENGTHS if s)]:
        query, key, value = _inputs(where, strength, num_seqs, context, seed)
        scale = 2.0 / HEAD_DIM**0.5
        exact = _exact(query, key, value, scale)
        for kind in FORMATS:
            out = _attend(query, key, value, PageLayout(kind, HEAD_DIM, PAGE_SIZE), scale, device).double().cpu()
            ordinary = torch.arange(HEAD_DIM) % (HEAD_DIM // NUM_OUTLIERS) != 0
            found.append(
                {
                    "kv_cache_dtype": kind,
                    "outliers": where,
                    "strength": strength,
                    "error": _relative(out, exact),
                    "error_ordinary": _relative(out[..., ordinary], exact[..., ordinary]),
                }
            )
    return found


def _inputs(where: str, strength: int, num_seqs: int, context: int, seed: int) -> list[torch.Tensor]:
    """Query [num_seqs, heads, head_dim], key and value [num_seqs · context, KV heads, head_dim], bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(num_seqs, _KV_HEADS * _GROUP, HEAD_DIM, generator=generator)
    key, value = (torch.randn(num_seqs * context, _KV_HEADS, HEAD_DIM, generator=generator) for _ in range(2))
    means = strength * torch.tensor([1.0, -1.0] * (NUM_OUTLIERS // 2))
    for name, x in (("k", key), ("v", value)):
        if name == where:
            x[..., :: HEAD_DIM // NUM_OUTLIERS] += means
    return [x.bfloat16() for x in (query, key, value)]


def _exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    num_seqs = len(query)
    cuts = torch.arange(num_seqs + 1)
    return attention(query, key, value, query_start=cuts, key_start=cuts * (len(key) // num_seqs), softmax_scale=scale)[
        0
    ]


def _attend(query, key, value, layout: PageLayout, scale: float, device: torch.device) -> torch.Tensor:
    pages = [x.to(device).unflatten(0, (-1, PAGE_SIZE)).transpose(1, 2) for x in (key, value)]
    cache = page_of(*pages, layout)
    if device.type == "cpu":
        stored = [x.transpose(1, 2).flatten(0, 1) for x in dequantise(cache, layout)]
        return _exact(query, *stored, scale)
    from kernels.decode import decode_attention

    num_seqs = len(query)
    per_seq = len(cache) // num_seqs
    numbers = {"dtype": torch.int32, "device": device}
    seq_lens = torch.full((num_seqs,), per_seq * PAGE_SIZE, **numbers)
    ring = {}
    if layout.is_low_bit:  # nothing waits: every page is full
        residual = layout.empty_residual(num_seqs, _KV_HEADS, torch.bfloat16, device)
        ring = {"residual": residual, "residual_slots": torch.arange(num_seqs, **numbers), "flushed_lens": seq_lens}
    return decode_attention(
        query.to(device),
        cache,
        layout,
        torch.arange(len(cache), **numbers).view(num_seqs, per_seq),
        seq_lens,
        torch.arange(num_seqs + 1, **numbers),
        softmax_scale=scale,
        **ring,
    )


def _relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return rounded(float((found - exact).norm() / exact.norm()))
