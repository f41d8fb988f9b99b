"""A Llama-shaped decoder to train: plain PyTorch, tensors named as Hugging Face names them.

Our own rather than transformers' because its layers compile to a few kernels each, once for all layers. Weights are
float32; the arithmetic runs under the caller's autocast, with the residual stream, norms and rotation in float32.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

if TYPE_CHECKING:
    from transformers import LlamaConfig

_NORM_EPS = 1e-5
_ROPE_THETA = 10_000.0
_INIT_STD = 0.02


@dataclass(frozen=True)
class Shape:
    """Of one model; embedding and LM head are one matrix."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context: int

    def hf_config(self, separator_id: int) -> LlamaConfig:
        """The configuration that is saved with the weights."""
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.context,
            rms_norm_eps=_NORM_EPS,
            rope_parameters={"rope_type": "default", "rope_theta": _ROPE_THETA},
            tie_word_embeddings=True,
            bos_token_id=separator_id,
            eos_token_id=separator_id,
        )

    def facts(self) -> dict[str, int]:
        return asdict(self)


def _linear(num_inputs: int, num_outputs: int) -> nn.Linear:
    return nn.Linear(num_inputs, num_outputs, bias=False)


class SelfAttention(nn.Module):
    """Causal attention of grouped queries."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim, self.group = shape.head_dim, shape.num_heads // shape.num_kv_heads
        self.q_proj = _linear(shape.hidden_size, shape.num_heads * shape.head_dim)
        self.k_proj = _linear(shape.hidden_size, shape.num_kv_heads * shape.head_dim)
        self.v_proj = _linear(shape.hidden_size, shape.num_kv_heads * shape.head_dim)
        self.o_proj = _linear(shape.num_heads * shape.head_dim, shape.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = (_rotate(heads, cos, sin).to(value.dtype) for heads in (query, key))
        if self.group > 1:
            key, value = (heads.repeat_interleave(self.group, dim=1) for heads in (key, value))
        out = _attend(query, key, value)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention, each [batch, num_heads, length, head_dim].

    On a CPU it is written out: PyTorch's kernel for it takes four times as long at these sizes in bfloat16.
    """
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    length = query.shape[2]
    mask = torch.full((length, length), -torch.inf, dtype=query.dtype).triu(1)
    scores = torch.baddbmm(
        mask.expand(query.shape[0] * query.shape[1], -1, -1),
        query.flatten(0, 1),
        key.flatten(0, 1).transpose(1, 2),
        alpha=query.shape[-1] ** -0.5,
    )
    return (scores.softmax(-1).to(value.dtype) @ value.flatten(0, 1)).unflatten(0, query.shape[:2])


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = _linear(shape.hidden_size, shape.intermediate_size)
        self.up_proj = _linear(shape.hidden_size, shape.intermediate_size)
        self.down_proj = _linear(shape.intermediate_size, shape.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=_NORM_EPS)
        self.self_attn = SelfAttention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=_NORM_EPS)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Body(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=_NORM_EPS)


class Llama(nn.Module):
    """The model: token ids [batch, length] to logits [batch, length, vocab]."""

    def __init__(self, shape: Shape, seed: int) -> None:
        """Weights are random, the same for the same seed on every device: they are drawn on the CPU."""
        super().__init__()
        self.shape = shape
        self.model = _Body(shape)
        generator = torch.Generator().manual_seed(seed)
        # What is added to the residual stream starts smaller, so that the stream does not grow with the layers (GPT-2).
        residual_std = _INIT_STD / (2 * shape.num_layers) ** 0.5
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=residual_std if is_residual else _INIT_STD, generator=generator)
        cos, sin = _rope_tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        length = token_ids.shape[1]
        x = self.model.embed_tokens(token_ids)
        for layer in self.model.layers:
            x = layer(x, self.cos[:length], self.sin[:length])
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)

    @property
    def num_parameters(self) -> int:
        return sum(weight.numel() for weight in self.parameters())

    def compile_layers(self) -> None:
        """Compile a layer, once for all of them."""
        for layer in self.model.layers:
            layer.compile(dynamic=False)


def _rope_tables(shape: Shape) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [context, head_dim]: the two halves of a head turn together, as in Hugging Face's Llama."""
    frequencies = _ROPE_THETA ** -(torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)
    angles = torch.outer(torch.arange(shape.context, dtype=torch.float32), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin
