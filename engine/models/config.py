"""A decoder as its Hugging Face `config.json` describes it: one dataclass for all families.

What differs between Llama, Mistral, Qwen and Gemma is a handful of fields here, and `engine.models.decoder` has one
forward pass that reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of some layers.

    Attributes:
        kind: "default", "linear", "llama3", "yarn" or "dynamic" as transformers calls them.
        theta: base of the frequencies.
        rotary_dim: channels of a head that are rotated, even.
        parameters: what the kind needs beside, under transformers' names (factor, low_freq_factor, ...).
    """

    kind: str
    theta: float
    rotary_dim: int
    parameters: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and switches of one dense decoder-only transformer.

    Attributes:
        family: `model_type` of the config.
        activation: "silu" or "gelu_tanh".
        qkv_bias, output_bias, mlp_bias: which linear layers have biases.
        qk_norm: RMSNorm on every head of query and key (Qwen3, Gemma-3).
        norm_weight_offset: 1.0 for Gemma, whose norm weights are stored as differences from one.
        sandwich_norms: norms behind attention and MLP as well as before them (Gemma-2 and 3).
        embedding_scale: factor on token embeddings (Gemma: sqrt(hidden_size), rounded to the model's dtype), else 1.
        softmax_scale: factor on attention logits.
        attention_soft_cap, logit_soft_cap: x becomes cap · tanh(x / cap); None for none.
        layer_windows: sliding window in tokens of each layer, itself included; None for full attention.
        ropes: the different rotary embeddings; layer_ropes: which of them each layer uses.
        dtype: "bfloat16", "float16" or "float32", what the checkpoint is stored in.
        eos_token_ids: of config.json (and generation_config.json, where there is one).
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    softmax_scale: float
    layer_windows: tuple[int | None, ...]
    ropes: tuple[RopeConfig, ...]
    layer_ropes: tuple[int, ...]
    activation: str = "silu"
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_weight_offset: float = 0.0
    sandwich_norms: bool = False
    embedding_scale: float = 1.0
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    dtype: str = "bfloat16"
    eos_token_ids: tuple[int, ...] = field(default=())
