"""What a decoder is made of: plain dataclasses of tensors, fused as the forward pass wants them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Linear:
    """y = x · weightᵀ + bias.

    Attributes:
        weight: [out_features, in_features], in the model's dtype or float8_e4m3fn.
        scale: float32 [out_features], what each row of a float8 weight is to be multiplied by; None otherwise.
        bias: [out_features] in the model's dtype, or None.
    """

    weight: torch.Tensor
    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.itemsize for t in (self.weight, self.scale, self.bias) if t is not None)


@dataclass
class DecoderLayer:
    """Weights of one layer.

    Attributes:
        input_norm: [hidden], before attention. mlp_norm: [hidden], before the MLP.
        qkv: [(num_q_heads + 2 · num_kv_heads) · head_dim, hidden], query heads first, then key, then value.
        query_norm, key_norm: [head_dim] or None.
        output: [hidden, num_q_heads · head_dim].
        gate_up: [2 · intermediate, hidden], gate first. down: [hidden, intermediate].
        attention_out_norm, mlp_out_norm: [hidden], on what attention and MLP put out before the residual sum, or None.
    """

    input_norm: torch.Tensor
    qkv: Linear
    output: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None
    attention_out_norm: torch.Tensor | None = None
    mlp_out_norm: torch.Tensor | None = None


@dataclass
class DecoderWeights:
    """All weights of a model.

    Attributes:
        embedding: [vocab, hidden]. lm_head: [vocab, hidden]; its weight is the embedding where they are tied.
    """

    embedding: torch.Tensor
    layers: list[DecoderLayer]
    final_norm: torch.Tensor
    lm_head: Linear

    @property
    def num_bytes_per_step(self) -> int:
        """Bytes that every step reads: all but an embedding table that is not also the LM head."""
        return (
            sum(
                linear.num_bytes
                for layer in self.layers
                for linear in (layer.qkv, layer.output, layer.gate_up, layer.down)
            )
            + self.lm_head.num_bytes
        )
