"""Reading config.json: the defaults and traps of each family, storage bits, and errors that name the key."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from planner.catalog import list_models, load_model, model_entry
from planner.errors import UserError
from planner.hf_config import model_from_config
from planner.model import ParameterRole

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """A catalog model's config with some keys changed; the value ... removes a key."""
    config = json.loads(json.dumps(model_entry(name)["config"])) | changes
    return {key: value for key, value in config.items() if value is not ...}


def read(config: dict[str, Any], quantization: str | None = None):
    return model_from_config(config, "m", quantization)


def bits_of(model, role: ParameterRole) -> float:
    groups = model.parameters_of(role)
    return sum(group.num_parameters * group.bits_per_parameter for group in groups) / sum(
        group.num_parameters for group in groups
    )


# --- family defaults ---


def test_omitted_head_dim_and_kv_heads_follow_the_heads() -> None:
    model = read({key: value for key, value in LLAMA.items() if key != "num_key_value_heads"})
    assert (model.head_dim, model.num_key_value_heads) == (128, 32)


def test_null_counts_as_omitted_where_transformers_says_so() -> None:
    assert read(LLAMA | {"head_dim": None, "num_key_value_heads": None}).num_key_value_heads == 32
    assert read(config_of("qwen2.5-7b", num_key_value_heads=None)).num_key_value_heads == 28


@pytest.mark.parametrize(
    ("name", "head_dim"), [("qwen3-0.6b", 128), ("gpt-oss-20b", 64), ("gemma-2-2b", 256), ("gemma-3-4b", 256)]
)
def test_head_dim_is_not_hidden_over_heads(name: str, head_dim: int) -> None:
    model = read(config_of(name, head_dim=...))
    assert model.head_dim == head_dim != model.hidden_size // model.num_attention_heads


def test_gemma3_multimodal_config_omits_class_defaults() -> None:
    model = read({"model_type": "gemma3", "text_config": {}, "vision_config": {"hidden_size": 1152}})
    assert (model.hidden_size, model.num_layers, model.num_attention_heads) == (2304, 26, 8)
    assert (model.num_key_value_heads, model.head_dim, model.vocab_size) == (4, 256, 262208)
    assert model.tie_word_embeddings
    assert model.layer_windows[:6] == (4096,) * 5 + (None,)
    with pytest.raises(UserError, match="text_config is missing"):
        read({"model_type": "gemma3"})


def test_outer_quantization_applies_to_the_text_config() -> None:
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    assert read(config_of("gemma-3-4b", quantization_config=fp8)).fp8_compute


@pytest.mark.parametrize(
    ("name", "tied"), [("gemma-2-2b", True), ("gemma-3-1b", True), ("llama-3.1-8b", False), ("qwen3-8b", False)]
)
def test_default_of_tied_embeddings(name: str, tied: bool) -> None:
    assert read(config_of(name, tie_word_embeddings=...)).tie_word_embeddings is tied


def test_untied_embeddings_count_twice() -> None:
    model = load_model("llama-3.2-1b")
    untied = read(config_of("llama-3.2-1b", tie_word_embeddings=False))
    assert untied.num_parameters - model.num_parameters == 128256 * 2048


def test_biases_are_counted() -> None:
    plain = read(LLAMA).num_parameters
    attention = 32 * ((32 + 2 * 8) * 128 + 4096)
    mlp = 32 * (2 * 14336 + 4096)
    assert read(LLAMA | {"attention_bias": True}).num_parameters == plain + attention
    assert read(LLAMA | {"mlp_bias": True}).num_parameters == plain + mlp


def test_yarn_stretches_the_context() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert read(config_of("qwen2.5-7b", rope_scaling=yarn)).max_position_embeddings == 131072
    assert load_model("gpt-oss-20b").max_position_embeddings == 131072
    for factor in (float("nan"), float("inf"), 1e300, -1, "4", 10**400):
        with pytest.raises(UserError, match=r"rope_scaling\.factor"):
            read(config_of("qwen2.5-7b", rope_scaling=yarn | {"factor": factor}))


# --- sliding windows ---


def test_qwen_window_is_switched_off() -> None:
    assert set(load_model("qwen2.5-7b").layer_windows) == {None}
    on = config_of("qwen2.5-7b", use_sliding_window=True, sliding_window=4096, max_window_layers=20)
    assert read(on).layer_windows == (None,) * 20 + (4096,) * 8


def test_gemma2_and_gpt_oss_start_with_a_sliding_layer() -> None:
    assert load_model("gemma-2-9b").layer_windows[:3] == (4096, None, 4096)
    assert load_model("gpt-oss-120b").layer_windows[:3] == (128, None, 128)
    assert read(config_of("gpt-oss-120b", layer_types=...)).layer_windows == load_model("gpt-oss-120b").layer_windows


def test_layer_types_win_over_the_pattern() -> None:
    types = ["full_attention"] * 25 + ["sliding_attention"]
    assert read(config_of("gemma-3-1b", layer_types=types)).layer_windows == (None,) * 25 + (512,)


def test_mistral_window_defaults_and_null() -> None:
    assert read(config_of("mistral-7b-v0.1", sliding_window=...)).layer_windows == (4096,) * 32
    assert set(read(config_of("mistral-7b-v0.1", sliding_window=None)).layer_windows) == {None}


def test_a_window_as_long_as_the_context_is_none() -> None:
    long = config_of("phi-3-mini-4k", max_position_embeddings=131072, sliding_window=262144)
    assert set(read(long).layer_windows) == {None}
    assert load_model("phi-3-mini-4k").layer_windows == (2047,) * 32


# --- mixtures and latent attention ---


def test_qwen3_moe_dense_layers() -> None:
    every = load_model("qwen3-30b-a3b")
    assert every.moe is not None and every.moe.num_moe_layers == 48
    half = read(config_of("qwen3-30b-a3b", decoder_sparse_step=2, mlp_only_layers=[1, 3]))
    assert half.moe is not None and half.moe.num_moe_layers == 22
    dense = sum(group.num_parameters for group in half.parameters_of(ParameterRole.MLP))
    assert dense == 26 * 3 * 2048 * 6144


def test_deepseek_dense_and_shared_layers() -> None:
    model = load_model("deepseek-v2-lite")
    assert model.moe is not None and model.mla is not None
    assert (model.moe.num_moe_layers, model.moe.shared_intermediate_size) == (26, 2816)
    assert (model.mla.q_lora_rank, model.mla.latent_dim) == (None, 576)
    assert load_model("deepseek-v3").mla.q_lora_rank == 1536
    latent = [group for group in model.parameters_of(ParameterRole.ATTENTION) if not group.sharded]
    assert sum(group.num_parameters for group in latent) == 27 * 2048 * 576


# --- storage bits ---


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", None])
def test_every_released_dtype_is_served_in_16_bits(dtype: str | None) -> None:
    model = read(LLAMA | {"torch_dtype": dtype})
    assert {group.bits_per_parameter for group in model.parameters} == {16.0}
    assert read(LLAMA | {"torch_dtype": ..., "dtype": "bfloat16"} if dtype is None else LLAMA) is not None


def test_fp8_at_load_leaves_embeddings_norms_and_output_alone() -> None:
    model = read(LLAMA, quantization="fp8")
    assert model.fp8_compute
    assert bits_of(model, ParameterRole.ATTENTION) == bits_of(model, ParameterRole.MLP) == 8
    for role in (ParameterRole.EMBEDDING, ParameterRole.NORM, ParameterRole.LM_HEAD):
        assert bits_of(model, role) == 16


def test_deepseek_v3_is_fp8_with_block_scales() -> None:
    model = load_model("deepseek-v3")
    assert model.fp8_compute
    assert bits_of(model, ParameterRole.EXPERT) == 8 + 32 / (128 * 128)
    assert bits_of(model, ParameterRole.ROUTER) == 16


def test_gpt_oss_quantises_the_experts_alone() -> None:
    model = load_model("gpt-oss-120b")
    assert not model.fp8_compute
    assert max(group.bits_per_parameter for group in model.parameters_of(ParameterRole.EXPERT)) == 16  # biases
    assert bits_of(model, ParameterRole.EXPERT) == pytest.approx(4.25, abs=0.01)
    assert bits_of(model, ParameterRole.ATTENTION) == 16
    # The model card (arXiv:2508.10925), as recalled: a checkpoint of 60.8 GiB.
    assert sum(group.bytes_per_rank(1) for group in model.parameters) == pytest.approx(60.8 * 2**30, rel=0.005)


@pytest.mark.parametrize(
    ("quantization", "bits", "fp8_compute"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4 + 20 / 128, False),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, 4 + 20 / 64, False),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8, False),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5, False),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8, False),
        ({"quant_method": "fp8"}, 8, True),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {
                        "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
                        "input_activations": {"num_bits": 8, "type": "float"},
                    }
                },
            },
            8,
            True,
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}}
                },
            },
            4 + 16 / 128,
            False,
        ),
    ],
)
def test_quantized_checkpoints(quantization: dict[str, Any], bits: float, fp8_compute: bool) -> None:
    model = read(LLAMA | {"quantization_config": quantization})
    assert bits_of(model, ParameterRole.MLP) == bits_of(model, ParameterRole.ATTENTION) == bits
    assert bits_of(model, ParameterRole.LM_HEAD) == 16
    assert model.fp8_compute is fp8_compute


def test_attention_that_the_checkpoint_skips_stays_16_bit() -> None:
    skipping = {"quant_method": "fp8", "ignored_layers": ["re:.*self_attn.*", "lm_head"]}
    model = read(LLAMA | {"quantization_config": skipping})
    assert (bits_of(model, ParameterRole.ATTENTION), bits_of(model, ParameterRole.MLP)) == (16, 8)


# --- errors ---


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'; it must be a whole number"),
        ({"hidden_size": 4096.0}, "hidden_size is 4096.0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; .* to 10000"),
        ({"vocab_size": float("nan")}, "vocab_size is nan"),
        ({"vocab_size": [1]}, "vocab_size is"),
        ({"num_key_value_heads": 7}, r"num_key_value_heads is 7; it must divide num_attention_heads \(64\)"),
        ({"num_attention_heads": 33, "num_key_value_heads": 11}, "is not a multiple of num_attention_heads"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
        ({"torch_dtype": "int3"}, "torch_dtype is 'int3'; it must be one of bfloat16"),
        ({"rope_scaling": 8}, "rope_scaling is 8; it must be an object"),
        ({"quantization_config": "awq"}, "quantization_config is 'awq'"),
        ({"quantization_config": {"quant_method": "magic"}}, "quant_method is 'magic'; supported are fp8"),
        ({"quantization_config": {"quant_method": "awq"}}, "bits is None"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 0}}, "group_size is 0"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 1]}}, "weight_block_size"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "config_groups"),
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; .*llama.*qwen3_moe"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"text_config": 3}, "text_config is 3"),
    ],
)
def test_malformed_config(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as error:
        model_from_config(config_of("llama-2-70b", **changes), "m", source="folder/config.json")
    assert str(error.value).startswith("folder/config.json: ")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("gpt-oss-20b", {"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries; .* each of the 24 layers"),
        ("gpt-oss-20b", {"layer_types": ["chunked"] * 24}, "layer_types has 'chunked'"),
        ("gpt-oss-20b", {"layer_types": "full"}, "layer_types has 'full'"),
        ("mixtral-8x7b", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9; it must be at most"),
        ("qwen3-30b-a3b", {"mlp_only_layers": [None]}, "mlp_only_layers"),
        ("qwen3-30b-a3b", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("deepseek-v3", {"kv_lora_rank": ...}, "kv_lora_rank is missing"),
        ("deepseek-v3", {"first_k_dense_replace": -1}, "first_k_dense_replace is -1"),
        ("gemma-3-1b", {"sliding_window": 0}, "sliding_window is 0"),
    ],
)
def test_malformed_family_keys(name: str, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        read(config_of(name, **changes))


@pytest.mark.parametrize("config", [None, [], "llama", 3])
def test_config_that_is_no_object(config: Any) -> None:
    with pytest.raises(UserError, match="must be a JSON object"):
        read(config)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@hypothesis_settings(deadline=None)
@given(data=st.data(), name=st.sampled_from(list_models()), value=json_values)
def test_any_value_of_any_key_gives_a_model_or_a_sentence(data: st.DataObject, name: str, value: Any) -> None:
    config = config_of(name)
    nested = [part for part in ("text_config", "quantization_config") if part in config]
    inner = data.draw(st.sampled_from(["", *nested]))
    target = config[inner] if inner else config
    target[data.draw(st.sampled_from(sorted(target)))] = value
    try:
        model = read(config)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert model.num_parameters > 0
        assert len(model.layer_windows) == model.num_layers
