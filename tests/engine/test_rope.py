"""RoPE tables against the rotary embedding modules of transformers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models_for_tests import tiny_config
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.errors import UserError
from engine.models.config import RopeConfig
from engine.models.hf import model_config
from engine.models.rope import rope_tables

LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32_768,
}


def assert_same_tables(rope: RopeConfig, module, positions: list[int], **kwargs) -> None:
    """Compare some positions; the angle, of which float32 keeps 24 bits, is what both compute first."""
    expected = module(torch.zeros(1), torch.tensor([positions]), **kwargs)
    for ours, theirs in zip(rope_tables(rope, positions[-1] + 1, "cpu"), expected, strict=True):
        assert ours.dtype == torch.float32
        half = theirs[0, :, : theirs.shape[-1] // 2]
        assert torch.equal(theirs[0, :, theirs.shape[-1] // 2 :], half)
        tolerance = 1e-6 + positions[-1] * 2.0**-22
        torch.testing.assert_close(ours[positions], half, rtol=0, atol=tolerance)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 10_000.0},
        {"rope_type": "default", "rope_theta": 1_000_000.0},
        {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5},
        LLAMA31,
        {**LLAMA31, "factor": 32.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0},
        YARN,
        {**YARN, "factor": 1.0},
        {**YARN, "truncate": False, "beta_fast": 20.0, "beta_slow": 2.0},
        {**YARN, "attention_factor": 0.75},
        {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
        {**YARN, "original_max_position_embeddings": 64},
    ],
)
def test_tables_are_those_of_transformers(head_dim: int, parameters: dict) -> None:
    config = tiny_config("llama", rope_parameters=dict(parameters), head_dim=head_dim, max_position_embeddings=131_072)
    (rope,) = model_config(config.to_dict(), "config.json").ropes
    assert rope.rotary_dim == head_dim
    assert_same_tables(rope, LlamaRotaryEmbedding(config), [0, 1, 2, 3, 17, 100, 999, 4095])


def test_gemma3_has_one_table_per_layer_type() -> None:
    config = tiny_config("gemma3_text")
    ours = model_config(config.to_dict(), "config.json")
    module = Gemma3RotaryEmbedding(config)
    for layer, layer_type in enumerate(config.layer_types):
        rope = ours.ropes[ours.layer_ropes[layer]]
        assert_same_tables(rope, module, [0, 1, 5, 1023], layer_type=layer_type)
    assert len(ours.ropes) == 2


def test_far_positions_keep_what_float32_can() -> None:
    rope = RopeConfig("default", 500_000.0, 128)
    cos, _ = rope_tables(rope, 131_072, "cpu")
    exponents = torch.arange(0, 128, 2, dtype=torch.float64) / 128
    angles = torch.outer(torch.arange(131_072, dtype=torch.float64)[-100:], 500_000.0**-exponents)
    assert (cos[-100:] - angles.cos()).abs().max() < 131_072 * 2.0**-22


def test_attention_scaling_is_multiplied_into_both_tables() -> None:
    rope = RopeConfig("yarn", 1e4, 64, (("factor", 4.0), ("original_max_position_embeddings", 256.0)))
    scaled = dataclasses.replace(rope, parameters=(*rope.parameters, ("attention_factor", 2.0)))
    for table in zip(rope_tables(rope, 50, "cpu"), rope_tables(scaled, 50, "cpu"), strict=True):
        torch.testing.assert_close(table[0] * 2.0 / 1.138629436, table[1])  # 0.1 · ln 4 + 1


@pytest.mark.parametrize("kind", ["default", "yarn"])
@pytest.mark.parametrize("theta", [1.0, 0.5, 0.0, -1.0, float("nan")])
def test_a_theta_that_turns_all_planes_alike_is_refused(kind: str, theta: float) -> None:
    with pytest.raises(UserError, match=r"rope_theta is .* above 1"):
        rope_tables(
            RopeConfig(kind, theta, 64, (("factor", 4.0), ("original_max_position_embeddings", 64.0))), 9, "cpu"
        )


@pytest.mark.parametrize("theta", [1 + 1e-15, 1.001, 1e18])
def test_yarn_with_an_odd_theta_is_finite(theta: float) -> None:
    rope = RopeConfig("yarn", theta, 64, (("factor", 4.0), ("original_max_position_embeddings", 2.0**31)))
    assert all(table.isfinite().all() for table in rope_tables(rope, 10, "cpu"))


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(UserError, match="rope_type is 'dynamic'"):
        rope_tables(RopeConfig("dynamic", 1e4, 64, (("factor", 2.0),)), 10, "cpu")
