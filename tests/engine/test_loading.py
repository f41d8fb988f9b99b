"""Weights: against the tensors of transformers' models, random ones, fp8, and folders that are broken."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models_for_tests import FAMILIES, save_tiny_model
from safetensors.torch import load_file, save_file

from engine.errors import UserError
from engine.models import loading
from engine.models.config import ModelConfig
from engine.models.hf import model_config, read_config
from engine.models.loading import load_weights, quantise_channels
from engine.models.modules import DecoderWeights, Linear


def load(folder: Path, **options) -> DecoderWeights:
    return load_weights(folder, read_config(folder), **{"dtype": torch.float32, "device": "cpu", **options})


def linears(weights: DecoderWeights) -> Iterator[Linear]:
    for layer in weights.layers:
        yield from (layer.qkv, layer.output, layer.gate_up, layer.down)


def tensors(weights: DecoderWeights) -> dict[str, torch.Tensor]:
    """Every tensor by a name of its own."""
    found = {"embedding": weights.embedding, "final_norm": weights.final_norm, "lm_head": weights.lm_head.weight}
    for i, layer in enumerate(weights.layers):
        for field in dataclasses.fields(layer):
            value = getattr(layer, field.name)
            parts = {"": value} if isinstance(value, torch.Tensor) else vars(value) if value is not None else {}
            found |= {f"{i}.{field.name}.{part}": t for part, t in parts.items() if t is not None}
    return found


def assert_is_model(weights: DecoderWeights, model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Every tensor equals the transformers model's, and there is none that it does not have."""
    inner, expected = model.model, {}
    expected["embedding"], expected["final_norm"] = inner.embed_tokens.weight, inner.norm.weight
    expected["lm_head"] = model.lm_head.weight
    for i, layer in enumerate(inner.layers):
        attention, mlp = layer.self_attn, layer.mlp
        gemma = hasattr(layer, "pre_feedforward_layernorm")
        expected[f"{i}.input_norm."] = layer.input_layernorm.weight
        if gemma:
            expected[f"{i}.attention_out_norm."] = layer.post_attention_layernorm.weight
            expected[f"{i}.mlp_norm."] = layer.pre_feedforward_layernorm.weight
            expected[f"{i}.mlp_out_norm."] = layer.post_feedforward_layernorm.weight
        else:
            expected[f"{i}.mlp_norm."] = layer.post_attention_layernorm.weight
        if hasattr(attention, "q_norm"):
            expected[f"{i}.query_norm."] = attention.q_norm.weight
            expected[f"{i}.key_norm."] = attention.k_norm.weight
        for name, parts in {
            "qkv": (attention.q_proj, attention.k_proj, attention.v_proj),
            "output": (attention.o_proj,),
            "gate_up": (mlp.gate_proj, mlp.up_proj),
            "down": (mlp.down_proj,),
        }.items():
            expected[f"{i}.{name}.weight"] = torch.cat([part.weight for part in parts])
            if parts[0].bias is not None:
                expected[f"{i}.{name}.bias"] = torch.cat([part.bias for part in parts])
    found = tensors(weights)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == dtype, name
        assert torch.equal(tensor, expected[name].to(dtype)), name
    assert (weights.lm_head.weight is weights.embedding) == model.config.tie_word_embeddings


# ---- Against transformers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_shard_size", [None, "200KB"])
def test_every_tensor_is_that_of_the_checkpoint(family: str, max_shard_size: str | None, tmp_path: Path) -> None:
    model = save_tiny_model(family, tmp_path, max_shard_size=max_shard_size)
    assert (
        len(list(tmp_path.glob("*.safetensors"))) > 5 if max_shard_size else (tmp_path / "model.safetensors").exists()
    )
    assert_is_model(load(tmp_path), model)


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_biases_and_tied_embeddings(tie_word_embeddings: bool, tmp_path: Path) -> None:
    switches = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": tie_word_embeddings}
    model = save_tiny_model("llama", tmp_path, **switches)
    weights = load(tmp_path)
    assert weights.layers[0].down.bias is not None
    assert_is_model(weights, model)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_become_the_dtype_that_is_asked_for(stored: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    model = save_tiny_model("qwen2", tmp_path).to(stored)
    model.save_pretrained(tmp_path)
    assert_is_model(load(tmp_path, dtype=dtype), model, dtype)


def test_large_tensors_are_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny_model("gemma3_text", tmp_path)
    whole = load(tmp_path, quantization="fp8")
    monkeypatch.setattr(loading, "_PIECE", 1000)  # 7 rows of 128
    assert_is_model(load(tmp_path), model)
    in_pieces = tensors(load(tmp_path, quantization="fp8"))
    for name, tensor in tensors(whole).items():
        assert torch.equal(tensor.float(), in_pieces[name].float())


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", ""])
def test_a_language_model_inside_another_model(prefix: str, tmp_path: Path) -> None:
    """As Gemma-3 is stored before and since transformers 5; what is not run is ignored."""
    model = save_tiny_model("gemma3_text", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    renamed = {prefix + name.removeprefix("model."): tensor for name, tensor in stored.items()}
    renamed["vision_tower.encoder.layers.0.self_attn.q_proj.weight"] = torch.ones(3)
    renamed["model.multi_modal_projector.weight"] = torch.ones(3, dtype=torch.int64)
    renamed[f"{prefix}layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(32)
    save_file(renamed, tmp_path / "model.safetensors")
    assert_is_model(load(tmp_path), model)


def test_the_head_of_an_untied_model_beside_a_vision_tower(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    save_file({f"language_model.{name}": tensor for name, tensor in stored.items()}, tmp_path / "model.safetensors")
    assert_is_model(load(tmp_path), model)


# ---- fp8 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_weights_are_off_by_half_a_step_per_channel(family: str, tmp_path: Path) -> None:
    """e4m3 has 3 bits of mantissa and steps of 2^-9 below its smallest normal number, 2^-6."""
    save_tiny_model(family, tmp_path)
    plain, quantised = load(tmp_path), load(tmp_path, quantization="fp8")
    for exact, rounded in zip(linears(plain), linears(quantised), strict=True):
        assert rounded.weight.dtype == torch.float8_e4m3fn
        assert rounded.scale.dtype == torch.float32
        assert rounded.scale.shape == exact.weight.shape[:1]
        absmax = exact.weight.abs().amax(dim=1)
        torch.testing.assert_close(rounded.scale, absmax / 448)
        scale = rounded.scale[:, None]
        error = (rounded.weight.float() * scale - exact.weight).abs()
        assert (error <= torch.maximum(exact.weight.abs() / 16, scale * 2.0**-10) * 1.0001).all()
        assert torch.equal(rounded.weight.float().abs().amax(dim=1), torch.full_like(absmax, 448))
        assert (rounded.bias is None) == (exact.bias is None)
    others = tensors(plain).keys() - {name for name in tensors(plain) if name.endswith(".weight")}
    for name in others:
        assert torch.equal(tensors(plain)[name], tensors(quantised)[name])


@given(
    rows=st.lists(
        st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=4, max_size=4),
        min_size=1,
        max_size=5,
    ),
)
def test_quantising_channels_stays_finite_and_keeps_order_and_zeros(rows: list[list[float]]) -> None:
    weight = torch.tensor(rows)
    quantised, scale = quantise_channels(weight)
    assert scale.isfinite().all()
    assert (scale > 0).all()
    values = quantised.float()
    assert values.isfinite().all()
    assert (values.abs() <= 448).all()
    assert (values[weight == 0] == 0).all()
    assert (values.take_along_dim(weight.argsort(dim=1), dim=1).diff(dim=1) >= 0).all()


def test_fp8_wants_multiples_of_16(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path, intermediate_size=200)
    with pytest.raises(UserError, match="200 inputs"):
        load(tmp_path, quantization="fp8")


# ---- Random weights ------------------------------------------------------------------------------------------------


def config_of(**changes) -> ModelConfig:
    config = {
        "model_type": "gemma3_text",
        "vocab_size": 300,
        "hidden_size": 256,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
        "head_dim": 64,
    }
    return model_config({**config, **changes}, "config.json")


def dummy(config: ModelConfig, **options) -> DecoderWeights:
    options = {"dtype": torch.float32, "device": "cpu", **options}
    return load_weights(Path("no such folder"), config, load_format="dummy", **options)


@pytest.mark.parametrize("quantization", [None, "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dummy_weights_have_the_shapes_of_real_ones(family: str, quantization: str | None, tmp_path: Path) -> None:
    save_tiny_model(family, tmp_path)
    options = {"dtype": torch.bfloat16, "quantization": quantization}
    real, random = tensors(load(tmp_path, **options)), tensors(dummy(read_config(tmp_path), **options))
    assert {name: (t.shape, t.dtype) for name, t in random.items()} == {n: (t.shape, t.dtype) for n, t in real.items()}


def test_dummy_weights_depend_on_the_seed_alone() -> None:
    first, again, other = (tensors(dummy(config_of(), seed=seed)) for seed in (1, 1, 2))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert not torch.equal(tensor, other[name])


@pytest.mark.parametrize(("family", "one"), [("gemma3_text", 0.0), ("llama", 1.0)])
@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_dummy_weights_are_normal_and_norms_about_one(family: str, one: float, quantization: str | None) -> None:
    weights = dummy(config_of(model_type=family, attention_bias=True), quantization=quantization)
    for name, tensor in tensors(weights).items():
        if tensor.dtype == torch.float8_e4m3fn:
            tensor = tensor.float() * tensors(weights)[name.replace("weight", "scale")][:, None]
        if not name.endswith("scale"):
            mean = one if "norm" in name else 0.0
            assert abs(float(tensor.mean()) - mean) < 6 * 0.02 / tensor.numel() ** 0.5, name
            assert abs(float(tensor.std()) / 0.02 - 1) < 6 / tensor.numel() ** 0.5, name


# ---- Broken folders ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_model("llama", tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_tiny_model("llama", tmp_path, max_shard_size="200KB")
    return tmp_path


def change(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of a single-file checkpoint; None removes one. Dots are written as double underscores."""
    path = folder / "model.safetensors"
    stored = load_file(path) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, path)


def assert_refused(folder: Path, *words: str) -> None:
    config = read_config(folder)
    with pytest.raises(UserError) as error:
        load_weights(folder, config, dtype=torch.float32, device="cpu")
    message = str(error.value)
    for word in words:
        assert word in message
    assert "\n" not in message


@pytest.mark.parametrize("kept", [0, 4, 100, 20_000, -1])
def test_a_truncated_file(kept: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert_refused(folder, "model.safetensors", "truncated")


def test_a_file_of_something_else(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<html>404 not found</html>" * 100)
    assert_refused(folder, "model.safetensors", "truncated or no safetensors file")


@pytest.mark.parametrize("reason", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_file_that_may_not_be_read(reason: OSError, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the refusal is played. A file that is whole need not be downloaded again."""
    path, really_open = folder / "model.safetensors", Path.open

    def refusing(self: Path, *arguments, **options):
        if self == path:
            raise reason
        return really_open(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(UserError) as error:
        load(folder)
    assert str(error.value) == f"cannot read {path}: {reason.strerror}"


def test_a_truncated_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[3]
    shard.write_bytes(shard.read_bytes()[:-10])
    assert_refused(sharded, shard.name, "truncated")


def test_missing_shards(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    shards[2].unlink()
    shards[4].unlink()
    assert_refused(sharded, shards[2].name, shards[4].name, f"2 of the {len(shards)} files")


def test_shards_without_their_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    assert_refused(sharded, "model.safetensors.index.json")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index(text: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    assert_refused(sharded, "model.safetensors.index.json")


def test_an_index_stays_in_its_folder(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    assert_refused(sharded, "model.safetensors.index.json", "own folder")


def test_a_missing_tensor(folder: Path) -> None:
    change(folder, model__layers__1__self_attn__k_proj__weight=None)
    assert_refused(folder, "no tensor model.layers.1.self_attn.k_proj.weight,")
    change(folder, model__norm__weight=None)
    assert_refused(folder, "model.layers.1.self_attn.k_proj.weight and 1 more")


def test_a_missing_head_of_an_untied_model(folder: Path) -> None:
    change(folder, lm_head__weight=None)
    assert_refused(folder, "no tensor lm_head.weight")


def test_a_wrong_shape(folder: Path) -> None:
    change(folder, model__layers__0__mlp__up_proj__weight=torch.zeros(191, 128))
    assert_refused(folder, "model.layers.0.mlp.up_proj.weight", "[191, 128]", "[192, 128]")


def test_another_model_s_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    assert_refused(folder, "model.layers.1", "1 layers")
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert_refused(folder, "no tensor model.layers.2.input_layernorm.weight")
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))
    assert_refused(folder, "lm_head.weight", "[199, 128]", "[200, 128]")


def test_tensors_that_the_config_does_not_foresee(folder: Path) -> None:
    change(folder, model__layers__0__self_attn__q_proj__bias=torch.zeros(256))
    assert_refused(folder, "model.layers.0.self_attn.q_proj.bias", "config.json")


def test_a_tensor_twice(folder: Path) -> None:
    change(folder, language_model__model__norm__weight=torch.zeros(128))
    assert_refused(folder, "language_model.model.norm.weight", "model.norm.weight")


@pytest.mark.parametrize(("dtype", "word"), [(torch.int8, "I8"), (torch.float64, "F64"), (torch.float8_e4m3fn, "F8")])
def test_a_stored_dtype_that_is_no_weight(dtype: torch.dtype, word: str, folder: Path) -> None:
    change(folder, model__layers__0__mlp__down_proj__weight=torch.zeros(128, 192).to(dtype))
    assert_refused(folder, "model.layers.0.mlp.down_proj.weight", word, "BF16")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_not_read(name: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / name)
    assert_refused(folder, "pickles", "convert")


def test_folders_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert_refused(folder, "neither model.safetensors nor")
    with pytest.raises(UserError, match="is not a folder"):
        load_weights(folder / "missing", config_of(), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("options", "word"),
    [({"load_format": "pt"}, "dummy"), ({"quantization": "awq"}, "fp8"), ({"dtype": torch.float64}, "bfloat16")],
)
def test_options_that_are_none(options: dict, word: str, folder: Path) -> None:
    with pytest.raises(UserError, match=word):
        load(folder, **options)
