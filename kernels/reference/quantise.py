"""Dynamic per-token fp8 of activations in plain PyTorch, alone or behind RMSNorm or the gated activation.

With weights in fp8 too, scaled per output channel, a matrix product of both runs on fp8 tensor cores (W8A8); the two
scales multiply its result.
"""

import torch

from kernels.reference import elementwise

FP8_MAX = 448.0  # the largest e4m3
# A row of zeros has this scale times 448, so that 1 / scale stays finite.
LEAST_ABSMAX = 2.0**-64


def quantise_tokens_fp8(x: torch.Tensor, *, out: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, scale) with x ≈ q · scale: scale = max(|row|) / 448, q = x · (1 / scale) as e4m3, ties to even.

    Both divisions and the product are float32, each rounded once.

    Args:
        x: [num_tokens, width].
        out: float8_e4m3fn of x's shape, or None for a new tensor.

    Returns:
        float8_e4m3fn [num_tokens, width] and float32 [num_tokens, 1].
    """
    wide = x.float()
    largest = wide.abs().amax(dim=-1, keepdim=True).clamp(min=LEAST_ABSMAX)
    # By a tensor: torch divides by a plain number as a product with its reciprocal on a GPU, which rounds twice.
    scale = largest / torch.full_like(largest, FP8_MAX)
    codes = (wide * scale.reciprocal()).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return (codes if out is None else out.copy_(codes)), scale


def rms_norm_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantise_tokens_fp8` of `elementwise.rms_norm`, whose result is first rounded to x's dtype."""
    return quantise_tokens_fp8(elementwise.rms_norm(x, weight, eps, residual=residual, weight_offset=weight_offset))


def silu_mul_fp8(gate_up: torch.Tensor, *, activation: str = "silu") -> tuple[torch.Tensor, torch.Tensor]:
    """`quantise_tokens_fp8` of `elementwise.silu_mul`, whose result is first rounded to gate_up's dtype."""
    return quantise_tokens_fp8(elementwise.silu_mul(gate_up, activation=activation))
