"""Models that need no folder: a configuration each, for random weights (`--load-format dummy`)."""

from __future__ import annotations

from pathlib import Path

# Small enough to run anywhere. Its vocabulary is that of `engine.tokenizer.ByteTokenizer`.
_TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
BUILTIN_CONFIGS = {"tiny": _TINY}


def builtin_config(model: str) -> dict[str, object] | None:
    """The `config.json` of a built-in model as a dictionary; None for any other name.

    A folder of the same name goes first.
    """
    return dict(BUILTIN_CONFIGS[model]) if model in BUILTIN_CONFIGS and not Path(model).exists() else None
