"""What a transformer is, as far as memory and time are concerned: shapes, parameter groups, layer windows.

A `ModelSpec` is built from the catalog or from a Hugging Face `config.json` (`planner.catalog`), and is all that
the memory model and the step-time model know of a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ParameterRole(StrEnum):
    """Where a parameter is used: it decides how often it is read and whether tensor parallelism shards it."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    MLP = "mlp"
    SHARED_EXPERT = "shared_expert"
    EXPERT = "expert"
    ROUTER = "router"
    NORM = "norm"
    LM_HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """All parameters of one role, over all layers and all experts.

    Attributes:
        role: where they are used.
        num_parameters: how many, in the whole model (before sharding).
        bits_per_parameter: storage including block scales (16 for bf16, 4.25 for MXFP4, ...).
        sharded: True if tensor parallelism splits them over the ranks, False if every rank holds all of them.
    """

    role: ParameterRole
    num_parameters: int
    bits_per_parameter: float
    sharded: bool

    def bytes_per_rank(self, tensor_parallel_size: int) -> int:
        """Bytes that one rank stores."""
        ranks = tensor_parallel_size if self.sharded else 1
        return round(self.num_parameters * self.bits_per_parameter / 8 / ranks)


@dataclass(frozen=True, slots=True)
class MLASpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434 section 2.1): one shared latent per token."""

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None

    @property
    def latent_dim(self) -> int:
        """Elements cached per token and layer: the compressed KV and the decoupled RoPE key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True, slots=True)
class MoESpec:
    """A mixture of experts in `num_moe_layers` of the model's layers."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    num_moe_layers: int
    num_shared_experts: int = 0
    shared_intermediate_size: int = 0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shapes of one decoder-only transformer.

    Attributes:
        name: catalog id, or the folder name of a config given by path.
        family: architecture family ("llama", "qwen2", "qwen3", "gemma3", "gpt_oss", "deepseek_v3", ...).
        layer_windows: sliding window in tokens of each layer, None for full attention; one entry per layer.
        parameters: all parameter groups; their sum is the parameter count.
        mla: latent attention, or None for multi-head / grouped-query attention.
        moe: mixture of experts, or None for a dense MLP in every layer.
        fp8_compute: True if the released linear weights are fp8, so that matrix products run at the fp8 rate.
    """

    name: str
    family: str
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    layer_windows: tuple[int | None, ...]
    parameters: tuple[ParameterGroup, ...]
    mla: MLASpec | None = None
    moe: MoESpec | None = None
    fp8_compute: bool = False
    hf_repo: str | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layer_windows)

    @property
    def num_parameters(self) -> int:
        """Total parameter count (a tied embedding counts once)."""
        return sum(group.num_parameters for group in self.parameters)

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token touches: all but the experts it is not routed to."""
        active = 0
        for group in self.parameters:
            if group.role is ParameterRole.EXPERT:
                assert self.moe is not None
                active += group.num_parameters * self.moe.experts_per_token // self.moe.num_experts
            else:
                active += group.num_parameters
        return active

    def parameters_of(self, *roles: ParameterRole) -> tuple[ParameterGroup, ...]:
        """The groups with one of these roles."""
        return tuple(group for group in self.parameters if group.role in roles)

    def kv_heads_per_rank(self, tensor_parallel_size: int) -> int:
        """KV heads that one rank caches: sharded while they last, then replicated (never fewer than one)."""
        return max(1, self.num_key_value_heads // tensor_parallel_size)
