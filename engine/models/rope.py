"""Rotary position embeddings as tables of cosines and sines.

A head of D channels is D/2 planes; at position p plane i turns by p · f_i, with f_i = theta^(-2i/D). The scalings that
stretch a model's context change the frequencies:

    linear   f / factor (Chen et al., arXiv:2306.15595)
    llama3   f where a turn is much shorter than the original context, f / factor where it is longer, a blend between
             (Llama-3.1, arXiv:2407.21783)
    yarn     the same idea with a ramp over the planes, and cos and sin multiplied by 0.1 · ln(factor) + 1
             (Peng et al., arXiv:2309.00071)

The numbers are those of transformers' `ROPE_INIT_FUNCTIONS`, which computes in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from engine.errors import UserError
from engine.models.config import RopeConfig


def rope_tables(rope: RopeConfig, num_positions: int, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every position's angles.

    Args:
        rope: which embedding.
        num_positions: positions 0 .. num_positions - 1.
        device: where the tables go. They are computed there.

    Returns:
        cos, sin, float32 [num_positions, rotary_dim / 2], attention scaling multiplied in.

    Raises:
        UserError: a kind of embedding that is not supported, or a theta that makes all planes turn alike.
    """
    frequencies, scaling = _frequencies(rope)
    positions = torch.arange(num_positions, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies.to(device))
    return angles.cos().mul_(scaling), angles.sin().mul_(scaling)


def _frequencies(rope: RopeConfig) -> tuple[torch.Tensor, float]:
    """Radians per position, float32 [rotary_dim / 2] on the CPU, and the factor on cos and sin."""
    if not rope.theta > 1:
        raise UserError(f"rope_theta is {rope.theta:g}; it must be above 1, or no plane turns slower than the first")
    planes = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
    frequencies = 1.0 / rope.theta**planes
    parameters = dict(rope.parameters)
    match rope.kind:
        case "default":
            return frequencies, 1.0
        case "linear":
            return frequencies / parameters["factor"], 1.0
        case "llama3":
            return _llama3(frequencies, parameters), 1.0
        case "yarn":
            return _yarn(frequencies, rope, parameters), _yarn_attention_scaling(parameters)
    raise UserError(f"rope_type is {rope.kind!r}; supported are default, linear, llama3 and yarn")


def _llama3(frequencies: torch.Tensor, parameters: Mapping[str, float]) -> torch.Tensor:
    factor, low, high = (parameters[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * ((1 - smooth) / factor + smooth)


def _yarn(frequencies: torch.Tensor, rope: RopeConfig, parameters: Mapping[str, float]) -> torch.Tensor:
    original, dim = parameters["original_max_position_embeddings"], rope.rotary_dim

    def plane_of(turns: float) -> float:
        """The plane, not a whole number, that makes so many turns in the original context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = plane_of(parameters.get("beta_fast", 32.0)), plane_of(parameters.get("beta_slow", 1.0))
    if parameters.get("truncate", 1.0):
        first, last = math.floor(first), math.ceil(last)
    # Floats: where theta is close to 1, planes are numbers beyond int64.
    first, last = float(max(first, 0)), float(min(last, dim - 1))
    width = last - first or 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
    return frequencies * (ramp / parameters["factor"] + 1 - ramp)


def _yarn_attention_scaling(parameters: Mapping[str, float]) -> float:
    def scaling(mscale: float) -> float:
        return 0.1 * mscale * math.log(parameters["factor"]) + 1 if parameters["factor"] > 1 else 1.0

    if "attention_factor" in parameters:
        return parameters["attention_factor"]
    if "mscale" in parameters and "mscale_all_dim" in parameters:
        return scaling(parameters["mscale"]) / scaling(parameters["mscale_all_dim"])
    return scaling(1.0)
