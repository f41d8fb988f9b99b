"""Tiny random models of every family, saved as Hugging Face folders.

Their weights are larger than a trained model's would be at this size, so that logits differ clearly between tokens,
attention looks at several of them, and every switch of a family (biases, norms, soft caps, windows, RoPE scaling)
changes the result visibly. The returned transformers model is the independent reference.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

VOCAB_SIZE = 199
_SHARED = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
_GEMMA_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
}
_FAMILIES = {
    "llama": (transformers.LlamaConfig, {"rope_parameters": _LLAMA3_ROPE, "rms_norm_eps": 1e-5}),
    "llama2": (transformers.LlamaConfig, {"num_key_value_heads": 4}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 40}),
    # Qwen2 has no head_dim of its own: hidden / heads.
    "qwen2": (transformers.Qwen2Config, {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": None}),
    "qwen3": (transformers.Qwen3Config, {"tie_word_embeddings": True}),
    "gemma2": (
        transformers.Gemma2Config,
        {
            "num_hidden_layers": 4,
            "sliding_window": 24,
            "query_pre_attn_scalar": 48,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3_text": (
        transformers.Gemma3TextConfig,
        {
            "num_hidden_layers": 6,
            "sliding_window": 32,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 48,
            "rope_parameters": _GEMMA_ROPE,
        },
    ),
}
FAMILIES = tuple(_FAMILIES)


def tiny_config(family: str, **overrides) -> transformers.PretrainedConfig:
    """The transformers config of a tiny model: hidden size 128, 2 to 6 layers, head_dim 64, vocabulary of 199."""
    config_class, settings = _FAMILIES[family]
    merged = {**_SHARED, **settings, **overrides}
    return config_class(**{key: value for key, value in merged.items() if key != "head_dim" or value is not None})


def tiny_model(family: str, *, seed: int = 0, **overrides) -> transformers.PreTrainedModel:
    """A tiny random model, float32, in evaluation mode, with eager attention (the only one that knows soft caps)."""
    config = tiny_config(family, **overrides)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    _randomise(model, seed)
    return model.eval()


def save_tiny_model(
    family: str, folder: Path, *, seed: int = 0, max_shard_size: int | str | None = None, **overrides
) -> transformers.PreTrainedModel:
    """Make a tiny random model and save it as safetensors.

    Args:
        family: one of FAMILIES ("llama" has Llama-3.1's RoPE scaling, "llama2" has none and no grouped heads).
        folder: where config.json, generation_config.json and the weights go; made if missing.
        max_shard_size: bytes, or "200KB"; more than one file if the model is larger.
        overrides: keys of the transformers configuration class.

    Returns:
        the transformers model that was saved.
    """
    model = tiny_model(family, seed=seed, **overrides)
    model.save_pretrained(folder, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
    return model


@torch.no_grad()
def _randomise(model: transformers.PreTrainedModel, seed: int) -> None:
    """Matrices of gain 1 (queries and keys 1.5, so that attention is neither flat nor a maximum), logits of std 3."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 2:
            gain = 3.0 if "embed_tokens" in name or "lm_head" in name else 1.0
            gain = 1.5 if "q_proj" in name or "k_proj" in name else gain
            parameter.copy_(noise * gain / parameter.shape[1] ** 0.5)
        elif name.endswith(".bias"):
            parameter.copy_(0.5 * noise)
        elif name == "model.norm.weight":
            parameter.add_(noise - 1)  # of either sign, or tied embeddings would predict the token that came in
        else:
            parameter.add_(0.2 * noise)  # norms: around one, or around zero where Gemma stores the difference
