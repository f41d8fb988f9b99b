"""What a prompt costs at least, in FLOPs of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.models.config import ModelConfig
    from engine.models.modules import DecoderWeights


def attended_pairs(num_tokens: int, window: int | None) -> int:
    """(query, key) pairs of causal attention over `num_tokens`, a token seeing itself and window - 1 before it."""
    if window is None or num_tokens <= window:
        return num_tokens * (num_tokens + 1) // 2
    return window * (window + 1) // 2 + (num_tokens - window) * window


def prompt_flops(config: ModelConfig, weights: DecoderWeights, num_tokens: int) -> int:
    """Multiplications and additions of a prompt of `num_tokens`, of which one token is sampled.

    Two per weight and token, in the layers; two per weight of the LM head, for the last token only; and for attention
    2 · head_dim for q·k and as many for p·v, per query head and pair of tokens.
    """
    linears = [(layer.qkv, layer.output, layer.gate_up, layer.down) for layer in weights.layers]
    per_token = 2 * sum(linear.weight.numel() for layer in linears for linear in layer)
    pairs = sum(attended_pairs(num_tokens, window) for window in config.layer_windows)
    attention = 4 * config.num_q_heads * config.head_dim * pairs
    return per_token * num_tokens + 2 * weights.lm_head.weight.numel() + attention
