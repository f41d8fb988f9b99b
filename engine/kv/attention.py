"""What a decoder asks of the KV cache: write the new tokens' keys and values, and attend."""

from __future__ import annotations

from typing import Protocol

import torch

from engine.batch import Places, StepBatch
from engine.kv.cache import KVCache
from engine.models.config import ModelConfig


class Attention(Protocol):
    """Attention of all layers over one KV cache."""

    def begin_step(self, batch: StepBatch) -> None:
        """Prepare what all layers of a step share; once per step, before its first layer.

        Reads no tensor on the host on CUDA, and may be captured in a CUDA graph together with the layers, after the
        same batch size has run once outside a capture.
        """

    def writes_by_place(self, layer: int) -> bool:
        """Whether `write` looks at nothing of a step but its places, so that it may be captured without the step."""

    def write(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        places: Places,
        rope: tuple[torch.Tensor, torch.Tensor] | None,
        *,
        keeps_key: bool,
    ) -> None:
        """Rotate query and key, write key and value into the cache.

        Args:
            layer: whose cache to write to.
            query: [num_tokens, num_q_heads, head_dim], rotated in place. Like key and value a view with any strides of
                tokens and heads that are multiples of 16 bytes, such as a slice of the fused projection.
            key, value: [num_tokens, num_kv_heads, head_dim].
            places: that of `begin_step`'s batch; if the layer writes by place, any.
            rope: cos and sin, float32 [max_position, rotary_dim / 2]; None if query and key are rotated already.
            keeps_key: the key is rotated in place too, which prompt chunks need; without it, what it then holds is not
                said.
        """

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: StepBatch
    ) -> torch.Tensor:
        """Attention of the new tokens to the cache and to each other, behind `write`.

        Args:
            query, key, value: as `write` left them.
            batch: that of `begin_step`.

        Returns:
            [num_tokens, num_q_heads, head_dim], contiguous, valid until the next call. Padding rows hold anything
            finite.
        """


def attention_for(config: ModelConfig, cache: KVCache, *, dtype: torch.dtype, max_model_len: int) -> Attention:
    """The Triton kernels for a 16-bit model on CUDA, PyTorch for everything else.

    Args:
        dtype: that the model runs in.
        max_model_len: tokens of the longest sequence.
    """
    if cache.device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        from engine.kv.triton_attention import TritonAttention

        return TritonAttention(config, cache, dtype=dtype, max_model_len=max_model_len)
    from engine.kv.torch_attention import TorchAttention

    return TorchAttention(config, cache)
