"""The elementwise steps of a decoder layer in plain PyTorch: RMSNorm, per-head norm with RoPE, gated activation.

Each computes in float32 (in float64 if its input is float64) and rounds once, on storing. That is more exact than the
16-bit steps of Hugging Face's models, and it is what the kernels do.
"""

import torch

ACTIVATIONS = ("silu", "gelu_tanh")


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value if value.dtype == torch.float64 else value.float()


def _normalised(value: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float) -> torch.Tensor:
    mean_square = value.square().mean(-1, keepdim=True)
    return value * torch.rsqrt(mean_square + eps) * (weight.to(value.dtype) + weight_offset)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x / rms(x) · (weight + weight_offset), where x is first added to the residual stream, if one is given.

    Args:
        x: [num_tokens, hidden].
        weight: [hidden].
        eps: added to the mean square.
        residual: [num_tokens, hidden], updated in place to residual + x. What is normalised is the sum as stored.
        weight_offset: 0.0, or 1.0 for Gemma, whose weights are stored as differences from one.
        out: where to put the result; may be x. A new tensor otherwise.
    """
    if residual is not None:
        residual.copy_(_wide(residual) + _wide(x))
    normalised = _normalised(_wide(x if residual is None else residual), weight, eps, weight_offset)
    return normalised.to(x.dtype) if out is None else out.copy_(normalised)


def qk_norm_rope(
    query: torch.Tensor,
    key: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    *,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> None:
    """RMSNorm of every head (Qwen3, Gemma-3), then rotary position embedding, in place.

    With h = rotary_dim / 2 and angle c of the token's position, for c < h:

        x'[c]     = x[c]·cos[c] − x[c + h]·sin[c]
        x'[c + h] = x[c + h]·cos[c] + x[c]·sin[c]

    and channels from rotary_dim on are not rotated (partial rotary embedding, Phi). This is the rotate-half pairing of
    GPT-NeoX and Hugging Face; RoFormer (arXiv 2104.09864) pairs neighbours.

    Args:
        query: [num_tokens, num_q_heads, head_dim].
        key: [num_tokens, num_kv_heads, head_dim], or None.
        cos, sin: float32 [max_position, rotary_dim / 2].
        positions: int32 or int64 [num_tokens].
        query_norm, key_norm: [head_dim], or None for no norm.
        eps, weight_offset: as in `rms_norm`.
    """
    half = cos.shape[-1]
    for heads, norm in ((query, query_norm), (key, key_norm)):
        if heads is None:
            continue
        x = _wide(heads)
        if norm is not None:
            x = _normalised(x, norm, eps, weight_offset)
        c, s = (table[positions.long()].to(x.dtype)[:, None, :] for table in (cos, sin))
        low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        heads.copy_(torch.cat([low * c - high * s, high * c + low * s, rest], dim=-1))


def silu_mul(gate_up: torch.Tensor, *, activation: str = "silu", out: torch.Tensor | None = None) -> torch.Tensor:
    """activation(gate) · up, the heart of a gated MLP (GLU variants, arXiv 2002.05202).

    Args:
        gate_up: [num_tokens, 2 · intermediate], gate first.
        activation: "silu", or "gelu_tanh" for GELU by its tanh formula (Gemma).
        out: [num_tokens, intermediate], or None for a new tensor.
    """
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    if activation == "silu":
        activated = torch.nn.functional.silu(gate)
    else:
        activated = torch.nn.functional.gelu(gate, approximate="tanh")
    return (activated * up).to(gate_up.dtype) if out is None else out.copy_(activated * up)
