"""Matrix products of few rows in plain PyTorch: a linear layer, and the fused gate and up projections.

Both compute in float32 (in float64 if x is float64) and round once, on storing.
"""

import torch

from kernels.reference.elementwise import _normalised, _wide, silu_mul


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float, float] | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x · weightᵀ + bias, where x is first normalised if `norm` is given.

    Args:
        x: [num_rows, k].
        weight: [n, k].
        bias: [n], or None.
        norm: (weight [k], eps, weight_offset) of an RMSNorm, as in `elementwise.rms_norm`, or None.
        out: [num_rows, n], or None for a new tensor.
    """
    wide = _wide(x)
    if norm is not None:
        wide = _normalised(wide, *norm)
    result = wide @ weight.to(wide.dtype).T
    if bias is not None:
        result = result + bias.to(wide.dtype)
    return result.to(x.dtype) if out is None else out.copy_(result)


def skinny_gate_up(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    activation: str = "silu",
    norm: tuple[torch.Tensor, float, float] | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """activation(x · gateᵀ) · (x · upᵀ), nothing rounded in between.

    Args:
        x, norm: as in `skinny_linear`.
        weight: [2 · intermediate, k], gate first.
        activation: "silu" or "gelu_tanh".
        out: [num_rows, intermediate], or None for a new tensor.
    """
    gate_up = skinny_linear(_wide(x), weight, norm=norm)
    result = silu_mul(gate_up, activation=activation)
    return result.to(x.dtype) if out is None else out.copy_(result)


def skinny_linear_fp8(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    dtype: torch.dtype = torch.bfloat16,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """(codes · weightᵀ) · scale · weight_scaleᵀ + bias, in float64, rounded once.

    Args:
        codes: float8_e4m3fn [num_rows, k]. scale: float32 [num_rows] or [num_rows, 1].
        weight: float8_e4m3fn [n, k]. weight_scale: float32 [n].
        dtype: of the result. bias: [n], or None. out: [num_rows, n], or None for a new tensor.
    """
    result = codes.double() @ weight.double().T * scale.double().reshape(-1, 1) * weight_scale.double()
    if bias is not None:
        result = result + bias.double()
    return result.to(dtype) if out is None else out.copy_(result)
