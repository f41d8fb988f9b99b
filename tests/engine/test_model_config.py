"""Reading config.json: every family against its transformers configuration class, old and new keys, bad values."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models_for_tests import FAMILIES, save_tiny_model, tiny_config, tiny_model
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from engine.errors import UserError
from engine.models.config import ModelConfig, RopeConfig
from engine.models.hf import model_config, read_config
from engine.models.rope import rope_tables

CLASSES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "gemma2": transformers.Gemma2Config,
    "gemma3_text": transformers.Gemma3TextConfig,
}
# Hub files from before transformers 5, shortened to what states the model.
LLAMA31 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
MISTRAL01 = {"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 32768, "rope_theta": 10000.0}
QWEN25 = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_hidden_layers": 28,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "rope_theta": 1000000.0,
    "eos_token_id": 151645,
}
GEMMA2 = {"model_type": "gemma2", "hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 10000.0}
GEMMA3 = {
    "model_type": "gemma3_text",
    "rope_local_base_freq": 20000.0,
    "rope_theta": 2000000.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window_pattern": 4,
    "sliding_window": 512,
}


def expected_layers(hf: transformers.PretrainedConfig) -> tuple[tuple[int | None, ...], list[RopeConfig]]:
    """Windows and rotary embeddings of every layer, from the attributes of a transformers config."""
    hf.standardize_rope_params()  # as its rotary embeddings do before they are made
    default_types = ["full_attention" if hf.model_type == "llama" else "sliding_attention"] * hf.num_hidden_layers
    types = getattr(hf, "layer_types", None) or default_types
    window = getattr(hf, "sliding_window", None)
    window = window if window is not None and window < hf.max_position_embeddings else None
    windows = tuple(window if kind == "sliding_attention" else None for kind in types)
    ropes = []
    for kind in types:
        values = dict(hf.rope_parameters.get(kind) or hf.rope_parameters)
        rope_type, theta = values.pop("rope_type"), values.pop("rope_theta")
        values.pop("type", None)
        head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
        ropes.append((rope_type, theta, head_dim, {key: float(value) for key, value in values.items()}))
    return windows, ropes


def assert_agrees(ours: ModelConfig, hf: transformers.PretrainedConfig) -> None:
    """Every field against the transformers configuration object made from the same file."""
    gemma = hf.model_type.startswith("gemma")
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    assert ours.family == hf.model_type
    assert (ours.vocab_size, ours.hidden_size) == (hf.vocab_size, hf.hidden_size)
    assert (ours.intermediate_size, ours.num_layers) == (hf.intermediate_size, hf.num_hidden_layers)
    assert (ours.num_q_heads, ours.num_kv_heads) == (hf.num_attention_heads, hf.num_key_value_heads)
    assert ours.head_dim == head_dim
    assert ours.max_position_embeddings == hf.max_position_embeddings
    assert ours.rms_norm_eps == hf.rms_norm_eps
    assert ours.tie_word_embeddings == hf.tie_word_embeddings
    assert math.isclose(ours.softmax_scale, getattr(hf, "query_pre_attn_scalar", head_dim) ** -0.5)
    assert ours.logit_soft_cap == (hf.final_logit_softcapping if gemma else None)
    assert ours.attention_soft_cap == (hf.attn_logit_softcapping if hf.model_type == "gemma2" else None)
    assert ours.activation == ("gelu_tanh" if gemma else "silu")
    eos = hf.eos_token_id
    assert ours.eos_token_ids == (tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,))
    assert ours.dtype == (str(hf.dtype).removeprefix("torch.") if hf.dtype is not None else "bfloat16")
    windows, ropes = expected_layers(hf)
    assert ours.layer_windows == windows
    assert len(set(ours.ropes)) == len(ours.ropes)
    for layer, (kind, theta, rotary_dim, parameters) in enumerate(ropes):
        rope = ours.ropes[ours.layer_ropes[layer]]
        assert (rope.kind, rope.theta, rope.rotary_dim) == (kind, theta, rotary_dim)
        assert dict(rope.parameters) == parameters


# ---- Against transformers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CLASSES)
def test_defaults_are_those_of_the_transformers_class(family: str) -> None:
    """An almost empty file, read by both."""
    assert_agrees(model_config({"model_type": family}, "config.json"), CLASSES[family]())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_config_is_read_back(family: str, tmp_path: Path) -> None:
    model = save_tiny_model(family, tmp_path)
    assert_agrees(read_config(tmp_path), model.config)
    assert read_config(tmp_path).dtype == "float32"


@pytest.mark.parametrize(
    "config",
    [
        LLAMA31,
        {key: value for key, value in LLAMA31.items() if key not in ("num_key_value_heads", "torch_dtype")},
        {**LLAMA31, "head_dim": 64, "dtype": "float16", "rope_scaling": {"type": "linear", "factor": 4}},
        {**LLAMA31, "num_key_value_heads": None, "head_dim": None, "eos_token_id": None, "rope_scaling": None},
        MISTRAL01,
        {**MISTRAL01, "sliding_window": None},
        {**MISTRAL01, "sliding_window": 32768},
        {**MISTRAL01, "head_dim": 96},
        QWEN25,
        {**QWEN25, "use_sliding_window": True, "sliding_window": 1000, "max_window_layers": 20},
        {**QWEN25, "use_sliding_window": True, "sliding_window": 1000, "max_window_layers": 0},
        {
            **QWEN25,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_hidden_layers": 2,
        },
        {"model_type": "qwen3", "num_hidden_layers": 3, "head_dim": 64, "tie_word_embeddings": True},
        {"model_type": "qwen3", "num_key_value_heads": None, "rope_parameters": {"rope_theta": 5e5}},
        {"model_type": "qwen3", "rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 7e5},
        GEMMA2,
        {**GEMMA2, "layer_types": ["full_attention"] * 26, "attn_logit_softcapping": None},
        {**GEMMA2, "final_logit_softcapping": None, "query_pre_attn_scalar": 144, "sliding_window": 100},
        GEMMA3,
        {**GEMMA3, "rope_scaling": None, "final_logit_softcapping": 20.0},
        {**GEMMA3, "rope_scaling": {"rope_type": "linear", "factor": 2}, "num_hidden_layers": 7},
        {
            "model_type": "gemma3_text",
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
            },
        },
        {"model_type": "gemma3_text", "rope_parameters": {"full_attention": {"rope_type": "default"}}},
        {
            "model_type": "llama",
            "max_position_embeddings": 8192,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 2.0,
                "beta_fast": 16.0,
                "original_max_position_embeddings": 4096,
            },
        },
        {
            "model_type": "llama",
            "max_position_embeddings": 65536,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1, "high_freq_factor": 4},
        },
    ],
    ids=lambda config: config["model_type"],
)
def test_stated_keys_mean_what_transformers_takes_them_for(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    hf = CLASSES[config["model_type"]].from_pretrained(tmp_path)
    assert_agrees(model_config(config, "config.json"), hf)
    # And once more in the words that the installed transformers writes.
    assert_agrees(model_config(json.loads(hf.to_json_string(use_diff=False)), "config.json"), hf)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("biases", [{}, {"attention_bias": True}, {"mlp_bias": True}])
def test_switches_say_which_parameters_the_model_has(family: str, biases: dict[str, bool]) -> None:
    """Biases and norms, against the names of the parameters that transformers makes."""
    names = {name for name, _ in tiny_model(family, **biases).named_parameters()}
    ours = model_config(tiny_config(family, **biases).to_dict(), "config.json")
    layer = "model.layers.0."
    assert ours.qkv_bias == (f"{layer}self_attn.q_proj.bias" in names)
    assert ours.output_bias == (f"{layer}self_attn.o_proj.bias" in names)
    assert ours.mlp_bias == (f"{layer}mlp.down_proj.bias" in names)
    assert ours.qk_norm == (f"{layer}self_attn.q_norm.weight" in names)
    assert ours.sandwich_norms == (f"{layer}post_feedforward_layernorm.weight" in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_norm_weight_offset_is_that_of_the_norms(family: str) -> None:
    norm = tiny_model(family).model.norm
    torch.nn.init.zeros_(norm.weight)
    ours = model_config(tiny_config(family).to_dict(), "config.json")
    x = torch.randn(1, 128, generator=torch.Generator().manual_seed(0))
    expected = ours.norm_weight_offset * x / x.pow(2).mean().sqrt()
    torch.testing.assert_close(norm(x), expected, rtol=1e-4, atol=1e-5)


def test_the_embedding_scale_of_gemma_is_the_root_of_its_width() -> None:
    model = tiny_model("gemma3_text")
    assert isinstance(model.model.embed_tokens, Gemma3TextScaledWordEmbedding)
    ours = model_config(model.config.to_dict(), "config.json")
    assert math.isclose(ours.embedding_scale, float(model.model.embed_tokens.embed_scale), rel_tol=1e-6)


# ---- Multimodal, end-of-sequence ids, stretched contexts -----------------------------------------------------------


def test_a_multimodal_gemma3_is_its_language_model() -> None:
    text = {key: value for key, value in GEMMA3.items() if key != "sliding_window_pattern"}
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "torch_dtype": "float16",
        "text_config": {**text, "num_hidden_layers": 12},
        "vision_config": {"hidden_size": 1152},
    }
    ours = model_config(config, "config.json")
    hf = transformers.Gemma3Config(**{k: v for k, v in config.items() if k not in ("model_type", "architectures")})
    assert ours.layer_windows == expected_layers(hf.text_config)[0] == ((512,) * 5 + (None,)) * 2
    assert ours.tie_word_embeddings
    assert ours.eos_token_ids == (1, 106)
    assert ours.dtype == "float16"
    assert ours == model_config(json.loads(hf.to_json_string()) | {"architectures": config["architectures"]}, "x")


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 5}, None, (5,)),
        ({"eos_token_id": 5}, {"eos_token_id": [6, 5]}, (5, 6)),
        ({"eos_token_id": [7, 5]}, {"eos_token_id": None}, (7, 5)),
        ({"eos_token_id": None}, {}, ()),
        ({"eos_token_id": None}, {"eos_token_id": 0}, (0,)),
        ({}, None, (2,)),
        ({}, {"eos_token_id": 9}, (9,)),
    ],
)
def test_end_of_sequence_ids_of_both_files(config: dict, generation: dict | None, expected, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert read_config(tmp_path).eos_token_ids == expected


def test_yarn_stretches_the_context() -> None:
    """Qwen's instructions: `max_position_embeddings` stays, the factor is added."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = {**QWEN25, "max_position_embeddings": 32768, "rope_scaling": scaling}
    assert model_config(config, "config.json").max_position_embeddings == 131072
    scaling.pop("original_max_position_embeddings")
    ours = model_config(config, "config.json")
    assert ours.max_position_embeddings == 32768
    assert dict(ours.ropes[0].parameters) == {"factor": 4.0, "original_max_position_embeddings": 32768.0}


# ---- Bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mixtral"}, ["model_type", "mixtral", "llama"]),
        ({"model_type": None}, ["model_type"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["architectures", "LlamaForCausalLM"]),
        ({"architectures": "LlamaForCausalLM"}, ["architectures"]),
        ({"torch_dtype": "float8_e4m3fn"}, ["torch_dtype", "float8_e4m3fn", "bfloat16"]),
        ({"dtype": "int8"}, ["dtype", "int8"]),
        ({"head_dim": 112}, ["head_dim", "112", "128"]),
        ({"head_dim": None, "hidden_size": 4000, "num_attention_heads": 24}, ["hidden_size", "24"]),
        ({"hidden_size": 1024}, ["head_dim", "32"]),
        ({"num_key_value_heads": 5}, ["num_key_value_heads", "5", "32"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers"]),
        ({"vocab_size": "many"}, ["vocab_size", "many"]),
        ({"hidden_size": 4096.5}, ["hidden_size"]),
        ({"max_position_embeddings": True}, ["max_position_embeddings"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "yes"]),
        ({"hidden_act": "relu"}, ["hidden_act", "relu", "silu"]),
        ({"eos_token_id": "</s>"}, ["eos_token_id", "</s>"]),
        ({"eos_token_id": [1, -2]}, ["eos_token_id"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config"]),
        ({"rope_scaling": "linear"}, ["rope_scaling"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["rope_scaling.rope_type", "dynamic", "yarn"]),
        ({"rope_scaling": {"rope_type": "longrope"}}, ["rope_type", "longrope"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["rope_scaling.factor"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, ["high_freq_factor"]),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            ["high_freq_factor", "low_freq_factor"],
        ),
        ({"rope_theta": -1}, ["rope_theta", "-1"]),
        ({"rope_theta": 0}, ["rope_theta is 0", "positive"]),
        ({"rope_theta": False}, ["rope_theta is False"]),
        ({"rope_theta": 1}, ["rope_theta is 1", "above 1"]),
        ({"rope_scaling": None, "rope_parameters": {"rope_theta": 0}}, ["rope_parameters.rope_theta is 0"]),
        ({"rope_scaling": {"rope_type": 0}}, ["rope_scaling.rope_type is 0"]),
        ({"rope_scaling": {"rope_type": "", "type": "linear", "factor": 2.0}}, ["rope_scaling.rope_type is ''"]),
        ({"rope_scaling": None, "rope_parameters": {"full_attention": 0}}, ["rope_parameters.full_attention is 0"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 1e-10}}, ["rope_scaling.factor is 1e-10", "at least 1"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, ["rope_scaling.factor is 0.5", "at least 1"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_theta": 1.0}, ["rope_theta is 1", "above 1"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_slow": 1e-320}}, ["beta_slow", "1e-18"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 0.5}}, ["beta_fast is 0.5", "beta_slow"]),
        ({"partial_rotary_factor": True}, ["partial_rotary_factor", "True"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
    ],
)
def test_bad_values_are_named_with_key_and_file(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        model_config({**LLAMA31, **changes}, "folder/config.json")
    for word in ["folder/config.json", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({**GEMMA3, "layer_types": ["full_attention"] * 25}, "25 entries"),
        ({**GEMMA3, "layer_types": ["linear_attention"] * 26}, "linear_attention"),
        ({**GEMMA3, "sliding_window_pattern": 0}, "sliding_window_pattern"),
        ({**GEMMA3, "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({**GEMMA3, "rope_parameters": {"rope_type": "default"}}, "rope_parameters"),
        ({**GEMMA3, "rope_parameters": {"full_attention": 3}}, "rope_parameters.full_attention"),
        ({**GEMMA3, "rope_local_base_freq": 0}, "rope_local_base_freq is 0"),
        (
            {**GEMMA3, "rope_parameters": {"full_attention": {}, "sliding_attention": False}},
            "sliding_attention is False",
        ),
        ({**GEMMA2, "hidden_activation": "gelu"}, "hidden_activation"),
        ({**MISTRAL01, "sliding_window": 0}, "sliding_window"),
        ({**QWEN25, "max_window_layers": -1, "use_sliding_window": True}, "max_window_layers"),
        ({"model_type": "gemma3"}, "text_config"),
        ({"model_type": "gemma3", "text_config": {"model_type": "llava"}}, "llava"),
        ([], "JSON object"),
    ],
)
def test_bad_values_of_single_families(config: Any, word: str) -> None:
    with pytest.raises(UserError, match=word.replace(".", r"\.")):
        model_config(config, "config.json")


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        read_config(tmp_path / "missing")
    with pytest.raises(UserError, match=r"has no config\.json"):
        read_config(tmp_path)
    for text in ("{", "[1]", "\xff", '{"model_type": ' + "[" * 100_000):
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=r"config\.json"):
            read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA31))
    (tmp_path / "generation_config.json").write_text("nonsense")
    with pytest.raises(UserError, match=r"generation_config\.json"):
        read_config(tmp_path)


def test_a_config_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA31))

    def denied(self: Path, *arguments: Any, **options: Any) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(UserError) as error:
        read_config(tmp_path)
    assert str(error.value) == f"cannot read {tmp_path / 'config.json'}: Permission denied"


def test_a_stretched_context_under_the_older_key() -> None:
    """ "rope_type" null says nothing, as everywhere."""
    scaling = {"rope_type": None, "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    ours = model_config({**QWEN25, "max_position_embeddings": 32768, "rope_scaling": scaling}, "config.json")
    assert (ours.ropes[0].kind, ours.max_position_embeddings) == ("yarn", 131072)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(
    base=st.sampled_from([LLAMA31, MISTRAL01, QWEN25, GEMMA2, GEMMA3]),
    data=st.data(),
    changes=st.dictionaries(st.sampled_from(sorted({*LLAMA31, *QWEN25, *GEMMA3, "rope_parameters"})), JSON, max_size=3),
)
def test_whatever_stands_in_a_file_the_answer_is_a_config_or_a_sentence(base, data, changes) -> None:
    scaling = data.draw(st.dictionaries(st.sampled_from(["rope_type", "type", "factor"]), JSON, max_size=2))
    yarn = ["factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "rope_theta"]
    numbers = st.dictionaries(st.sampled_from(yarn), JSON | st.floats(0.1, 10), max_size=4)
    scaling |= data.draw(st.just({}) | numbers.map(lambda values: {"rope_type": "yarn", "factor": 2.0, **values}))
    changes = {**changes, "rope_scaling": scaling}
    try:
        config = model_config({**base, **changes}, "config.json")
    except UserError as error:
        assert "config.json" in str(error)
        assert len(str(error)) < 400
    else:
        assert len(config.layer_windows) == len(config.layer_ropes) == config.num_layers
        for rope in config.ropes:
            assert all(table.isfinite().all() for table in rope_tables(rope, 3, "cpu"))
