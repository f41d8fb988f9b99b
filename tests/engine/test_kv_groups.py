"""Which layers share pages, held against the planner's count; layouts, bytes and the sharing of storage."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UserError
from engine.kv.cache import KVCache, block_bytes, layer_layouts, residual_bytes
from engine.kv.groups import kv_groups
from engine.models.config import ModelConfig

LAYER_WINDOWS = st.lists(st.sampled_from([None, 32, 512, 4096]), min_size=1, max_size=40)


def config_of(layer_windows: list[int | None], **changes) -> ModelConfig:
    fields = {
        "family": "test",
        "vocab_size": 128,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_layers": len(layer_windows),
        "num_q_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "softmax_scale": 0.125,
        "layer_windows": tuple(layer_windows),
        "ropes": (),
        "layer_ropes": (),
    }
    return ModelConfig(**{**fields, **changes})


@given(LAYER_WINDOWS)
def test_groups_are_the_planners(layer_windows):
    pytest.importorskip("pydantic", reason="the planner's; a GPU machine may lack it")
    from planner.memory import kv_layer_groups

    groups = kv_groups(layer_windows)
    expected = kv_layer_groups(SimpleNamespace(layer_windows=tuple(layer_windows)))
    assert groups.windows == expected.windows
    assert groups.layers_per_group == expected.layers_per_group


@given(LAYER_WINDOWS)
def test_group_sizes_are_vllms(layer_windows):
    """As many layers as the smallest kind has, or the largest if it is less than 25 % larger."""
    counts = Counter(layer_windows)
    smallest, largest = min(counts.values()), max(counts.values())
    size = largest if largest < 1.25 * smallest else smallest
    groups = kv_groups(layer_windows)
    assert groups.layers_per_group == size
    assert Counter(groups.windows) == {window: math.ceil(count / size) for window, count in counts.items()}


@given(LAYER_WINDOWS)
def test_every_layer_is_in_one_group_of_its_window(layer_windows):
    groups = kv_groups(layer_windows)
    assert sorted(layer for layers in groups.layers for layer in layers) == list(range(len(layer_windows)))
    for group, (window, layers) in enumerate(zip(groups.windows, groups.layers, strict=True)):
        assert 1 <= len(layers) <= groups.layers_per_group
        assert list(layers) == sorted(layers)
        for layer in layers:
            assert layer_windows[layer] == window
            assert groups.group_of_layer[layer] == group
    # Within a kind the groups follow each other, and all but the last are full.
    for window in set(layer_windows):
        members = [layers for w, layers in zip(groups.windows, groups.layers, strict=True) if w == window]
        assert sum(members, ()) == tuple(i for i, w in enumerate(layer_windows) if w == window)
        assert all(len(layers) == groups.layers_per_group for layers in members[:-1])


def test_groups_of_known_models():
    gemma3 = kv_groups([None if i % 6 == 5 else 1024 for i in range(26)])
    assert gemma3.windows == (None, 1024, 1024, 1024, 1024, 1024, 1024)
    assert gemma3.layers[0] == (5, 11, 17, 23)
    assert gemma3.layers[1] == (0, 1, 2, 3)
    assert kv_groups([None] * 3).layers == ((0, 1, 2),)
    with pytest.raises(ValueError, match="at least one layer"):
        kv_groups([])


@given(LAYER_WINDOWS, st.sets(st.integers(0, 39)), st.sampled_from(["auto", "fp8", "int4"]))
def test_storage_is_shared_between_groups_only(layer_windows, skipped, kv_dtype):
    config, groups = config_of(layer_windows), kv_groups(layer_windows)
    skipped = {layer for layer in skipped if layer < len(layer_windows)}
    layouts = layer_layouts(config, kv_dtype, skipped, 32, torch.bfloat16)
    cache = KVCache.allocate(config, layouts, groups, 2, 1, "meta", torch.bfloat16)
    storage = {id(layer.pages): layer.pages for layer in cache.layers}
    # A block costs what all the storage tensors have of it, and residual windows are nobody's but their layer's.
    assert sum(pages[0].numel() for pages in storage.values()) == block_bytes(config, layouts, groups)
    residuals = [layer.residual for layer in cache.layers if layer.residual is not None]
    assert sum(r.numel() * r.itemsize for r in residuals) == residual_bytes(config, layouts, 1, torch.bfloat16)
    assert len({id(r) for r in residuals}) == len(residuals) == sum(layout.is_low_bit for layout in layouts)
    for layers in groups.layers:
        assert len({id(cache.layers[layer].pages) for layer in layers}) == len(layers)
    for layer, layout in zip(cache.layers, layouts, strict=True):
        assert layer.layout is layout
        assert layer.pages.shape == (2, config.num_kv_heads, layout.page_bytes)
        assert (layer.residual is not None) == layout.is_low_bit
    if len({layout.page_bytes for layout in layouts}) == 1:
        assert len(storage) == groups.layers_per_group


def test_layouts():
    config = config_of([None] * 4)
    formats = [layout.kv_dtype for layout in layer_layouts(config, "int4", (0, 3), 64, torch.bfloat16)]
    assert formats == ["bfloat16", "int4", "int4", "bfloat16"]
    assert {layout.kv_dtype for layout in layer_layouts(config, "auto", (), 64, torch.float16)} == {"float16"}
    assert {layout.kv_dtype for layout in layer_layouts(config, "bfloat16", (), 64, torch.float32)} == {"bfloat16"}


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, ("nf4", (), 64, torch.bfloat16), "kv_cache_dtype is 'nf4'; it must be one of auto, bfloat16"),
        ({}, ("float16", (), 64, torch.bfloat16), "kv_cache_dtype is float16 and the model runs in bfloat16"),
        ({}, ("fp8", (7,), 64, torch.bfloat16), "has layer 7; the model has layers 0 to 1"),
        ({}, ("fp8", (-1,), 64, torch.bfloat16), "has layer -1"),
        ({}, ("fp8", (), 48, torch.bfloat16), "page_size is 48"),
        ({"head_dim": 72}, ("auto", (), 64, torch.bfloat16), "head_dim is 72"),
    ],
)
def test_impossible_layouts(changes, arguments, message):
    with pytest.raises(UserError, match=message):
        layer_layouts(config_of([None] * 2, **changes), *arguments)
