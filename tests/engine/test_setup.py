"""From a configuration to an engine: memory, what does not fit, and what cannot be run."""

import json
import re

import pytest
import torch
from models_for_tests import save_tiny_model, tiny_config
from running import SMALL, Models, engine, prompts, request, run

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import UserError
from engine.kv.groups import kv_groups
from engine.memory import GIB, MemoryReport
from engine.models.hf import model_config
from engine.sampling import LogitsProcessor
from engine.setup import _Builder, choose_dtype, describe_model


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def build(model, **settings) -> EngineCore:
    return EngineCore(EngineConfig(model=str(model), **{**SMALL, **settings}))


# ---- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("qwen3", {"kv_cache_dtype": "fp8"}),  # tied embeddings
        ("gemma2", {"kv_cache_dtype": "int4", "kv_cache_dtype_skip_layers": (0, 3)}),
        ("gemma3_text", {"kv_cache_dtype": "int2", "quantization": "fp8"}),
    ],
    ids=str,
)
def test_the_report_is_what_was_allocated(family, settings, models):
    folder, model = models(family)
    with engine(folder, **settings) as core:
        memory, layers = core.memory, core._cache.layers
        storage = {layer.pages.data_ptr(): layer.pages for layer in layers}.values()
        allocated = sum(pages.numel() for pages in storage)
        assert allocated == (memory.num_blocks + 1) * memory.block_bytes  # and the null block
        residual = [layer.residual for layer in layers if layer.residual is not None]
        assert memory.residual_bytes == sum(tensor.numel() * tensor.itemsize for tensor in residual)
        # Matrices; norms are not worth counting. In fp8 those of the layers take a byte, and scales beside.
        linear = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name)
        others = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "layers." not in name)
        width = 1 if settings.get("quantization") else 4
        assert memory.weights_bytes == pytest.approx(linear * width + others * 4, rel=0.03)
        assert memory.max_model_len == core.max_model_len == 256
        assert memory.blocks_per_sequence * core.config.max_num_seqs == memory.num_blocks
        assert memory.total_bytes is memory.activation_bytes is memory.other_bytes is None


def test_a_gpu_keeps_room_for_the_token_counts_of_every_request():
    """Which are made when the first penalised request comes, and the KV cache has taken the rest of the memory."""
    described = model_config(tiny_config("llama").to_dict(), "tiny")
    groups = kv_groups(described.layer_windows)

    def reserved(max_num_seqs: int) -> int:
        config = EngineConfig(model="x", **{**SMALL, "max_num_seqs": max_num_seqs}, enforce_eager=True)
        cpu = torch.device("cpu")
        builder = _Builder(config, described, None, cpu, torch.bfloat16, 256, (), groups)
        return builder._tables_and_graphs_bytes()

    processors = [LogitsProcessor(described.vocab_size, slots, torch.device("cpu")) for slots in (8, 20)]
    counts, more_counts = (processor.counts.nbytes for processor in processors)
    tables = 12 * 4 * 256 // 32
    assert reserved(20) - reserved(8) == more_counts - counts + tables


def test_pages_per_sequence_and_longest_context_by_default(models):
    """A full group keeps ⌈1024 / 32⌉ pages; a window of 24 and a step of 64 tokens at most ⌈87 / 32⌉ + 1."""
    folder, _ = models("gemma2")
    with engine(folder, max_model_len=None, max_num_batched_tokens=64) as core:
        assert core.max_model_len == 1024
        assert core.memory.num_groups == 2
        assert core.memory.blocks_per_sequence == 32 + 4


def test_a_cpu_takes_a_gibibyte_at_most(tmp_path):
    """As much as all running requests could use, if that is less."""
    wide = {"num_key_value_heads": 16, "num_attention_heads": 16, "head_dim": 256, "hidden_size": 64}
    tiny_config("llama2", **wide, max_position_embeddings=4096).save_pretrained(tmp_path)
    settings = {"load_format": "dummy", "max_model_len": 4096, "max_num_seqs": 64, "block_size": 128}
    core = build(tmp_path, **settings)
    block = 128 * 2 * 2 * 16 * 256 * 4  # tokens, layers, K and V, heads, channels, bytes
    assert core.memory.block_bytes == block
    assert core.memory.num_blocks == GIB // block - 1
    few = build(tmp_path, **settings | {"max_num_seqs": 1, "max_model_len": 256})
    assert few.memory.num_blocks == 2


def test_the_report_in_vllms_words():
    report = MemoryReport(
        total_bytes=100 * GIB,
        utilization=0.9,
        weights_bytes=16 * GIB,
        activation_bytes=GIB // 2,
        other_bytes=GIB,
        residual_bytes=0,
        block_bytes=1 << 20,
        num_blocks=4096,
        block_size=64,
        num_groups=1,
        max_model_len=131072,
        blocks_per_sequence=2048,
        graph_bytes=GIB // 4,
        load_s=3.21,
        graph_s=7.04,
    )
    assert report.lines() == [
        "Model loading took 16.00 GiB and 3.2 seconds",
        "Peak activation memory: 0.50 GiB",
        "Available KV cache memory: 4.00 GiB",
        "GPU KV cache size: 262,144 tokens",
        "Maximum concurrency for 131,072 tokens per request: 2.00x",
        "Graph capturing finished in 7.0 secs, took 0.25 GiB",
    ]


# ---- contexts that do not fit --------------------------------------------------------------------------------------


def message_of(model, **settings) -> str:
    with pytest.raises(UserError) as caught:
        build(model, **settings)
    return str(caught.value)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text"])
def test_a_context_that_does_not_fit(family, models):
    """The longest context that the message names fits, and not one token more."""
    folder, _ = models(family)
    settings = {"max_model_len": 1024, "max_num_batched_tokens": 40, "num_gpu_blocks_override": 11}
    if family == "mistral":
        settings["num_gpu_blocks_override"] = 3  # a window alone needs few pages, however long the text
    message = message_of(folder, **settings)
    longest = int(re.search(r"the longest context that fits is (\d+) tokens", message).group(1))
    assert f"--max-model-len {longest}" in message
    build(folder, **settings | {"max_model_len": longest})
    assert "does not" not in message
    assert f"fits is {longest} tokens" in message_of(folder, **settings | {"max_model_len": longest + 1})


def test_how_much_is_needed_and_what_helps(tmp_path):
    """65,536 tokens of 64 KiB each in a cache of 1 GiB."""
    wide = {"num_key_value_heads": 16, "num_attention_heads": 16, "head_dim": 256, "hidden_size": 64}
    tiny_config("llama2", **wide, max_position_embeddings=65536).save_pretrained(tmp_path)
    message = message_of(tmp_path, load_format="dummy", max_model_len=65536, block_size=128, max_num_seqs=1)
    assert "max_model_len 65536 tokens needs 4.00 GiB" in message
    assert "0.99 GiB are available" in message
    assert f"the longest context that fits is {127 * 128} tokens" in message
    remedies = message.split("In this order: ")[1].split("; ")
    assert len(remedies) == 3
    assert remedies[0] == f"--max-model-len {127 * 128}"
    assert "--kv-cache-dtype" in remedies[1]


def test_where_nothing_fits_no_length_is_recommended(models):
    folder, _ = models("gemma3_text")  # three KV groups
    message = message_of(folder, num_gpu_blocks_override=2)
    assert "no context fits" in message
    assert "--max-model-len" not in message


def test_quantised_caches_are_not_told_to_quantise(models):
    folder, _ = models("llama")
    for settings in ({"kv_cache_dtype": "int2"}, {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": (1,)}):
        message = message_of(folder, num_gpu_blocks_override=3, **settings)
        assert "--kv-cache-dtype" not in message
        assert "--num-gpu-blocks-override" in message


# ---- what cannot be run --------------------------------------------------------------------------------------------


def test_max_model_len_above_the_models(models):
    folder, _ = models("llama")
    assert re.search(r"max_model_len is 1025.*max_position_embeddings of 1024", message_of(folder, max_model_len=1025))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_cache_dtype_skip_layers": (1, 7)}, "layer 7; the model has layers 0 to 1"),
        (
            {"kv_cache_dtype": "bfloat16", "dtype": "float16"},
            "kv_cache_dtype is bfloat16 and the model runs in float16",
        ),
    ],
    ids=str,
)
def test_settings_that_do_not_go_with_the_model(settings, message, models):
    folder, _ = models("llama")
    assert message in message_of(folder, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 16}, "block_size is 16; it must be one of 32, 64, 128"),
        ({"kv_cache_dtype": "int3"}, "kv_cache_dtype is 'int3'; it must be one of auto, bfloat16"),
        ({"dtype": "half"}, "dtype is 'half'"),
        ({"quantization": "awq"}, "quantization is 'awq'; it must be one of fp8"),
        ({"load_format": "pickle"}, "load_format is 'pickle'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0; it must be a whole number of at least 1"),
        ({"max_num_seqs": True}, "max_num_seqs is True"),
        ({"max_model_len": 1}, "max_model_len is 1; it must be a whole number of at least 2"),
        ({"num_gpu_blocks_override": 0}, "num_gpu_blocks_override is 0"),
        ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization is 1.1; it must be above 0 and at most 1"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization is 0"),
        ({"kv_cache_dtype_skip_layers": (-1,)}, "kv_cache_dtype_skip_layers has -1"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, r"max_num_seqs \(9\) must not exceed"),
        ({"seed": -1}, "seed is -1"),
    ],
    ids=str,
)
def test_values_out_of_range(settings, message):
    with pytest.raises(UserError, match=message):
        EngineConfig(model="any", **settings)


def test_models_that_are_not_there(tmp_path, models):
    assert "no such" in message_of(tmp_path / "no such").lower()
    (tmp_path / "empty").mkdir()
    assert "config.json" in message_of(tmp_path / "empty")
    folder, _ = models("llama")
    assert "load-format dummy" in message_of(folder / "config.json")
    assert "load-format dummy" in message_of("tiny")


def test_unknown_architectures_and_head_sizes(tmp_path, models):
    folder, _ = models("llama")
    for number, (change, words) in enumerate(
        (
            ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "amba"),
            ({"head_dim": 48}, "48"),
        )
    ):
        config = json.loads((folder / "config.json").read_text()) | change
        path = tmp_path / str(number) / "config.json"
        path.parent.mkdir()
        path.write_text(json.dumps(config))
        assert words in message_of(path.parent, load_format="dummy")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(models):
    folder, _ = models("llama")
    assert "no CUDA device was found" in message_of(folder, device="cuda")


def test_dtypes(models):
    folder, _ = models("llama")
    described = describe_model(EngineConfig(model=str(folder)))
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert choose_dtype("auto", described, cpu) == torch.float32
    assert choose_dtype("auto", described, cuda) == torch.bfloat16
    assert choose_dtype("float16", described, cuda) == torch.float16
    with pytest.raises(UserError, match="dtype is float32; on a GPU it must be bfloat16 or float16"):
        choose_dtype("float32", described, cuda)


# ---- dummy weights -------------------------------------------------------------------------------------------------


def test_dummy_weights_follow_the_seed(tmp_path):
    """Built in, from a config.json, and from a folder that has weights too."""
    save_tiny_model("llama", tmp_path)
    for model in ("tiny", tmp_path / "config.json", tmp_path):
        texts = []
        for seed in (0, 0, 1):
            with engine(model, load_format="dummy", seed=seed, enable_prefix_caching=False) as core:
                each = request(core, 0, prompts([40])[0])
                run(core, [each])
                texts.append(each.output_token_ids)
        assert texts[0] == texts[1] != texts[2]
