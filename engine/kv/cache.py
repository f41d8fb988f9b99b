"""The tensors of the KV cache: pages for every layer, and the residual windows of the low-bit formats.

A block id names the same page in every storage tensor. Layers of different groups share a storage tensor, for a block
belongs to one group at a time (`engine.kv.groups`). Layers whose pages have different sizes, which a skip list makes,
cannot, so every page size has storage tensors of its own:

    storage 0   16,384 bytes a page   layer 0 of the skip list
    storage 1    4,480 bytes a page   layers 1 (group 0), 4 (group 1)
    storage 2    4,480 bytes a page   layers 2 (group 0), 5 (group 1)

Block 0 is the null block: block tables point to it where a page was given back, and what it holds is never used.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from engine.errors import UserError
from engine.kv.groups import KVGroups
from engine.models.config import ModelConfig
from kernels.pages import FLOAT_DTYPES, KV_DTYPE_BITS, PageLayout

FLOAT_NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps.

    Attributes:
        pages: uint8 [num_blocks, num_kv_heads, page_bytes], shared with a layer of every other group.
        layout: of a page.
        group: whose block tables the layer reads.
        residual: [num_slots, num_kv_heads, 2, residual_size, head_dim] in the model's dtype, for int4 and int2.
    """

    pages: torch.Tensor
    layout: PageLayout
    group: int
    residual: torch.Tensor | None = None


def layer_layouts(
    config: ModelConfig,
    kv_cache_dtype: str,
    skip_layers: Collection[int],
    page_size: int,
    model_dtype: torch.dtype,
) -> tuple[PageLayout, ...]:
    """The page layout of each layer.

    Args:
        kv_cache_dtype: "auto" for the model's dtype, or a format of `kernels.pages`.
        skip_layers: layers that keep the model's dtype whatever kv_cache_dtype says.
        page_size: tokens per page.

    Raises:
        UserError: a format, page size or head size that there is no kernel for, a floating-point format that is not
            the model's (a float32 model may have any), or a layer that the model does not have.
    """
    own = FLOAT_NAMES[model_dtype]
    name = own if kv_cache_dtype == "auto" else kv_cache_dtype
    if name not in KV_DTYPE_BITS:
        choices = ", ".join(("auto", *KV_DTYPE_BITS))
        raise UserError(f"kv_cache_dtype is {kv_cache_dtype!r}; it must be one of {choices}")
    if name in FLOAT_DTYPES and own not in (name, "float32"):
        raise UserError(
            f"kv_cache_dtype is {name} and the model runs in {own}; it must be auto, {own} or a quantised format"
        )
    outside = sorted(layer for layer in skip_layers if not 0 <= layer < config.num_layers)
    if outside:
        raise UserError(
            f"kv_cache_dtype_skip_layers has layer {outside[0]}; the model has layers 0 to {config.num_layers - 1}"
        )
    try:
        layouts = {kind: PageLayout(kind, config.head_dim, page_size) for kind in (name, own)}
    except ValueError as error:
        raise UserError(f"no KV cache for this model: {error}") from None
    return tuple(layouts[own if layer in skip_layers else name] for layer in range(config.num_layers))


def _storage(layouts: Sequence[PageLayout], groups: KVGroups) -> tuple[list[int], list[int]]:
    """The storage tensor of each layer, and the page bytes of each storage tensor."""
    tensors: dict[tuple[int, int], int] = {}  # (page bytes, how many layers of this group and size came before)
    owner = [0] * len(layouts)
    for layers in groups.layers:
        seen: dict[int, int] = {}
        for layer in layers:
            page_bytes = layouts[layer].page_bytes
            index = seen[page_bytes] = seen.get(page_bytes, -1) + 1
            owner[layer] = tensors.setdefault((page_bytes, index), len(tensors))
    return owner, [page_bytes for page_bytes, _ in tensors]


def block_bytes(config: ModelConfig, layouts: Sequence[PageLayout], groups: KVGroups) -> int:
    """Bytes of one block of the pool, over all storage tensors."""
    return config.num_kv_heads * sum(_storage(layouts, groups)[1])


def residual_bytes(config: ModelConfig, layouts: Sequence[PageLayout], num_slots: int, dtype: torch.dtype) -> int:
    """Bytes of the residual windows of all layers."""
    rows = sum(layout.residual_size for layout in layouts)
    return num_slots * config.num_kv_heads * 2 * rows * config.head_dim * dtype.itemsize


def scratch_layout(layout: PageLayout, dtype: torch.dtype) -> PageLayout:
    """Of the pages that the Triton backend copies a quantised context to: the model's dtype, else as `layout`."""
    return PageLayout(FLOAT_NAMES[dtype], layout.head_dim, layout.page_size)


def scratch_bytes(config: ModelConfig, layouts: Sequence[PageLayout], max_model_len: int, dtype: torch.dtype) -> int:
    """Bytes of these pages, for one sequence of max_model_len tokens in one layer; 0 where no layer is quantised.

    Args:
        layouts: of the layers' pages.
        dtype: of the model.
    """
    if all(layout.is_float for layout in layouts):
        return 0
    layout = scratch_layout(layouts[0], dtype)
    return -(-max_model_len // layout.page_size) * config.num_kv_heads * layout.page_bytes


class KVCache:
    """The caches of all layers.

    Attributes:
        layers: by layer id.
        groups: which layers share block tables.
        num_blocks: blocks of the pool, the null block among them.
    """

    def __init__(self, layers: list[LayerCache], groups: KVGroups) -> None:
        self.layers = layers
        self.groups = groups
        self.num_blocks = layers[0].pages.shape[0]

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        layouts: Sequence[PageLayout],
        groups: KVGroups,
        num_blocks: int,
        num_slots: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> KVCache:
        """A cache of zeros: `num_blocks` · `block_bytes` and `residual_bytes` bytes.

        Args:
            num_slots: rows of the residual windows: one per running request and one that padding may point to.
            dtype: of the model, and so of the residual windows.
        """
        owner, sizes = _storage(layouts, groups)
        heads = config.num_kv_heads
        storage = [torch.zeros(num_blocks, heads, size, dtype=torch.uint8, device=device) for size in sizes]
        layers = []
        for layer, group in enumerate(groups.group_of_layer):
            layout = layouts[layer]
            residual = layout.empty_residual(num_slots, heads, dtype, device) if layout.is_low_bit else None
            layers.append(LayerCache(storage[owner[layer]], layout, group, residual))
        return cls(layers, groups)

    @property
    def device(self) -> torch.device:
        return self.layers[0].pages.device

    @property
    def has_low_bit_layers(self) -> bool:
        """Whether steps need residual slots and flushed lengths."""
        return any(layer.layout.is_low_bit for layer in self.layers)
