"""Models that need no folder: a configuration each, for random weights (`--load-format dummy`).

`tiny` is for trying things out; the others have the shapes of released models, in which speed is measured.
"""

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
_LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_LLAMA_3_2_1B = _LLAMA_3_1_8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "rope_scaling": _LLAMA_3_1_8B["rope_scaling"] | {"factor": 32.0},
    "tie_word_embeddings": True,
}
_QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
BUILTIN_CONFIGS = {
    "tiny": _TINY,
    "llama-3.1-8b": _LLAMA_3_1_8B,
    "llama-3.2-1b": _LLAMA_3_2_1B,
    "qwen3-0.6b": _QWEN3_0_6B,
}


def builtin_config(model: str) -> dict[str, object] | None:
    """The `config.json` of a built-in model as a dictionary; None for any other name.

    A folder of the same name goes first.
    """
    return dict(BUILTIN_CONFIGS[model]) if model in BUILTIN_CONFIGS and not Path(model).exists() else None
