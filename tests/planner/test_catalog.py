"""The catalog against numbers that were counted elsewhere, and the ways to name a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner.catalog import gpu_entry, list_gpus, list_models, load_gpu, load_model, model_entry
from planner.errors import UserError
from planner.memory import MemorySettings, kv_bytes_per_sequence

GIB = 1 << 30

# id, parameters, active parameters, published parameters, sliding layers, bf16 KV bytes per token over all layers,
# and at this context the bf16 KV bytes of one sequence with windows honoured. Computed in a separate survey of
# 2026-11-21 from the same configs; published counts from keras-hub presets.
MODELS = [
    ("llama-2-7b", 6_738_415_616, 6_738_415_616, 6_738_415_616, 0, 524_288, 4_096, 2_147_483_648),
    ("llama-2-13b", 13_015_864_320, 13_015_864_320, None, 0, 819_200, 4_096, 3_355_443_200),
    ("llama-2-70b", 68_976_648_192, 68_976_648_192, None, 0, 327_680, 4_096, 1_342_177_280),
    ("llama-3.1-8b", 8_030_261_248, 8_030_261_248, 8_030_261_248, 0, 131_072, 131_072, 17_179_869_184),
    ("llama-3.1-70b", 70_553_706_496, 70_553_706_496, None, 0, 327_680, 131_072, 42_949_672_960),
    ("llama-3.1-405b", 405_853_388_800, 405_853_388_800, None, 0, 516_096, 131_072, 67_645_734_912),
    ("llama-3.2-1b", 1_235_814_400, 1_235_814_400, 1_235_814_400, 0, 32_768, 131_072, 4_294_967_296),
    ("llama-3.2-3b", 3_212_749_824, 3_212_749_824, 3_212_749_824, 0, 114_688, 131_072, 15_032_385_536),
    ("qwen2.5-7b", 7_615_616_512, 7_615_616_512, 7_615_616_512, 0, 57_344, 32_768, 1_879_048_192),
    ("qwen2.5-32b", 32_763_876_352, 32_763_876_352, 32_763_876_352, 0, 262_144, 32_768, 8_589_934_592),
    ("qwen2.5-72b", 72_706_203_648, 72_706_203_648, 72_706_203_648, 0, 327_680, 32_768, 10_737_418_240),
    ("qwen3-0.6b", 596_049_920, 596_049_920, 596_049_920, 0, 114_688, 32_768, 3_758_096_384),
    ("qwen3-8b", 8_190_735_360, 8_190_735_360, 8_190_735_360, 0, 147_456, 32_768, 4_831_838_208),
    ("qwen3-32b", 32_762_123_264, 32_762_123_264, 32_762_123_264, 0, 262_144, 32_768, 8_589_934_592),
    ("qwen3-30b-a3b", 30_532_122_624, 3_353_032_704, 30_532_122_624, 0, 98_304, 32_768, 3_221_225_472),
    ("qwen3-235b-a22b", 235_093_634_560, 22_190_763_520, 235_093_634_560, 0, 192_512, 32_768, 6_308_233_216),
    ("mistral-7b-v0.1", 7_241_732_096, 7_241_732_096, 7_241_732_096, 32, 131_072, 32_768, 536_870_912),
    ("mixtral-8x7b", 46_702_792_704, 12_879_925_248, 46_702_792_704, 0, 131_072, 32_768, 4_294_967_296),
    ("deepseek-v2-lite", 15_706_484_224, 2_661_150_208, None, 0, 31_104, 131_072, 4_076_863_488),
    ("deepseek-v3", 671_026_419_200, 37_552_297_472, None, 0, 70_272, 131_072, 9_210_691_584),
    ("gemma-2-2b", 2_614_341_888, 2_614_341_888, 2_614_341_888, 13, 106_496, 8_192, 654_311_424),
    ("gemma-2-9b", 9_241_705_984, 9_241_705_984, 9_241_705_984, 21, 344_064, 8_192, 2_113_929_216),
    ("gemma-2-27b", 27_227_128_320, 27_227_128_320, 27_227_128_320, 23, 376_832, 8_192, 2_315_255_808),
    ("gemma-3-1b", 999_885_952, 999_885_952, 999_885_952, 22, 26_624, 32_768, 145_752_064),
    ("gemma-3-4b", 3_880_263_168, 3_880_263_168, 3_880_099_328, 29, 139_264, 131_072, 2_805_989_376),
    ("gemma-3-12b", 11_766_034_176, 11_766_034_176, 11_765_788_416, 40, 393_216, 131_072, 8_925_478_912),
    ("gemma-3-27b", 27_009_346_304, 27_009_346_304, 27_009_002_240, 52, 507_904, 131_072, 11_173_625_856),
    ("gpt-oss-20b", 20_914_757_184, 4_187_440_704, 20_914_757_184, 12, 49_152, 131_072, 3_224_371_200),
    ("gpt-oss-120b", 116_829_156_672, 5_711_982_912, 116_829_156_672, 18, 73_728, 131_072, 4_836_556_800),
    ("phi-3-mini-4k", 3_821_079_552, 3_821_079_552, 3_821_079_552, 32, 393_216, 4_096, 804_913_152),
    ("phi-3-medium-4k", 13_960_238_080, 13_960_238_080, None, 40, 204_800, 4_096, 419_225_600),
]
# Keras pads Gemma 3's vocabulary to 262144, the Hugging Face configs of these three to 262208.
GEMMA3_HIDDEN = {"gemma-3-4b": 2560, "gemma-3-12b": 3840, "gemma-3-27b": 5376}


@pytest.mark.parametrize(
    ("name", "total", "active", "published", "sliding", "per_token", "context", "kv_bytes"),
    MODELS,
    ids=[row[0] for row in MODELS],
)
def test_model_counts(
    name: str,
    total: int,
    active: int,
    published: int | None,
    sliding: int,
    per_token: int,
    context: int,
    kv_bytes: int,
) -> None:
    model = load_model(name)
    assert model.num_parameters == total
    assert model.num_active_parameters == active
    assert sum(window is not None for window in model.layer_windows) == sliding
    assert model_entry(name)["published_num_parameters"] == published
    if published is not None:
        assert total - published == 64 * GEMMA3_HIDDEN.get(name, 0)
    settings = MemorySettings(kv_cache_dtype="bf16")
    assert kv_bytes_per_sequence(model, settings, 1) == per_token
    assert kv_bytes_per_sequence(model, settings, context) == kv_bytes


def test_every_model_and_gpu_says_where_it_comes_from() -> None:
    assert len(list_models()) == len(set(list_models())) == 31
    assert list_models() == tuple(row[0] for row in MODELS)
    for name in list_models():
        entry = model_entry(name)
        assert entry["source"] and "/" in entry["hf_repo"]
        assert load_model(name).hf_repo == entry["hf_repo"]
    assert len(list_gpus()) == len(set(list_gpus())) == 18
    for name in list_gpus():
        gpu = load_gpu(name)
        assert gpu.id == name
        assert gpu.spec_source and gpu.spec_confidence in ("high", "medium", "low")
        assert gpu_entry(name)["memory_source"]
        prices = [price for price in (gpu.price_low, gpu.price_typical, gpu.price_high) if price]
        assert all(price.source and price.date.startswith("2026") for price in prices)
        assert [price.usd_per_gpu_hour for price in prices] == sorted(price.usd_per_gpu_hour for price in prices)


# Dense bf16 FLOP per byte of memory traffic, from a separate survey.
@pytest.mark.parametrize(
    ("gpu_id", "ridge"),
    [
        ("h200_sxm", 206),
        ("h100_sxm", 295),
        ("h100_pcie", 378),
        ("a100_sxm_80", 153),
        ("l4", 403),
        ("l40s", 419),
        ("a10g", 117),
        ("rtx4090", 164),
        ("rtx5090", 117),
        ("b200", 292),
        ("gb200", 312),
        ("mi300x", 247),
        ("mi325x", 218),
    ],
)
def test_gpu_ridge_points(gpu_id: str, ridge: int) -> None:
    gpu = load_gpu(gpu_id)
    assert gpu.bf16_flops / gpu.memory_bandwidth_bytes_per_s == pytest.approx(ridge, abs=0.6)


def test_usable_memory_is_what_the_framework_reports() -> None:
    assert load_gpu("h200_sxm").memory_bytes == pytest.approx(139.8 * GIB, abs=1)
    assert load_gpu("h100_sxm").memory_bytes == pytest.approx(79.35 * GIB, abs=1)
    assert load_gpu("a10g").memory_bytes == pytest.approx(22.5 * GIB, abs=1)
    assert load_gpu("a100_sxm_80").fp8_flops is None
    assert not load_gpu("rtx4090").fast_link


@pytest.mark.parametrize(
    ("spelling", "name", "repo"),
    [
        ("llama-3.1-8b", "llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
        (" LLAMA-3.1-8B ", "llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("meta-llama/llama-3.1-8b", "llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct"),
        ("Llama-3.1-8B-Instruct", "llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama-3.1-70b", "meta-llama/Llama-3.3-70B-Instruct"),
        ("llama-3.3-70b", "llama-3.1-70b", "meta-llama/Llama-3.3-70B-Instruct"),
        ("Llama-2-7b-chat-hf", "llama-2-7b", "meta-llama/Llama-2-7b-chat-hf"),
        ("google/gemma-3-27b-it", "gemma-3-27b", "google/gemma-3-27b-it"),
        ("Qwen/Qwen2.5-7B", "qwen2.5-7b", "Qwen/Qwen2.5-7B"),
    ],
)
def test_load_model_by_name(spelling: str, name: str, repo: str) -> None:
    model = load_model(spelling)
    assert (model.name, model.hf_repo) == (name, repo)


@pytest.mark.parametrize("spelling", ["h200_sxm", "H200-SXM", " h200_SXM"])
def test_load_gpu_by_name(spelling: str) -> None:
    assert load_gpu(spelling).id == "h200_sxm"


@pytest.mark.parametrize(
    ("name", "suggestion"), [("lama-3.1-8b", "llama-3.1-8b"), ("qwen3-8", "qwen3-8b"), ("org/gemma-3-28b", "gemma")]
)
def test_unknown_model_suggests_the_nearest(name: str, suggestion: str) -> None:
    with pytest.raises(UserError, match=f"unknown model .*did you mean '{suggestion}") as error:
        load_model(name)
    assert "\n" not in str(error.value)


def test_unknown_gpu_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown GPU 'h200_sx': did you mean 'h200_sxm'"):
        load_gpu("h200_sx")


def test_load_model_from_file_and_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model_entry("qwen3-8b")["config"]))
    for path in (folder, folder / "config.json", str(folder)):
        model = load_model(path)
        assert model.name == "my-model"
        assert model.hf_repo is None
        assert model.parameters == load_model("qwen3-8b").parameters
    (tmp_path / "other.json").write_text(json.dumps(model_entry("qwen3-8b")["config"]))
    assert load_model(tmp_path / "other.json").name == "other"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{ not json", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b"[1, 2]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"{}", "model_type None is not supported; it must be one of deepseek_v2"),
    ],
)
def test_bad_files_name_the_file(tmp_path: Path, content: bytes, complaint: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as error:
        load_model(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        load_model(tmp_path / "nowhere" / "config.json")
    with pytest.raises(UserError, match="no such file; the folder must hold"):
        load_model(tmp_path)
    for odd in ("", "x" * 5000, "nul\0byte"):
        with pytest.raises(UserError, match="unknown model"):
            load_model(odd)


def test_quantize_while_loading() -> None:
    model = load_model("llama-3.1-8b", quantization="fp8")
    assert model.fp8_compute
    assert load_model("deepseek-v3", quantization="fp8") == load_model("deepseek-v3")
    with pytest.raises(UserError, match="quantization 'int3' is not supported"):
        load_model("llama-3.1-8b", quantization="int3")
    with pytest.raises(UserError, match=r"already quantised \(mxfp4\)"):
        load_model("gpt-oss-20b", quantization="fp8")
