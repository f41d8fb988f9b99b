"""Host checks of a launcher's arguments: one sentence that names the argument and what it must be.

Launchers call them under `if check:`, so that a caller on the hot path, or inside a CUDA graph capture, pays nothing.
Those of a tensor's contents read device memory, and so wait for the GPU.
"""

import math

import torch

from kernels.pages import PageLayout


def tensor(
    name: str,
    value: torch.Tensor,
    *,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    contiguous: bool = False,
) -> None:
    """Raise ValueError unless `value` has this shape (None: any size), one of these dtypes and this device.

    The last dimension must always be contiguous; `contiguous` asks it of the whole tensor.
    """
    tensors(**{name: value})
    if value.dim() != len(shape) or any(
        want not in (None, have) for want, have in zip(shape, value.shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(value.shape)}; it must be [{wanted}]")
    if value.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} is {str(value.dtype).removeprefix('torch.')}; it must be {wanted}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; it must be on {device}")
    if contiguous and not value.is_contiguous():
        raise ValueError(f"{name} has strides {list(value.stride())}; it must be contiguous")
    if value.numel() and value.dim() and value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(f"{name} has stride {value.stride(-1)} in its last dimension; it must be 1")


def tensors(**named: object) -> None:
    """Raise ValueError unless all arguments are tensors; for what is looked into before its own check."""
    for name, value in named.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}; it must be a tensor")


def page_layout(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a PageLayout."""
    if not isinstance(value, PageLayout):
        raise ValueError(f"{name} is {value!r}; it must be a PageLayout")


def integer(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise ValueError unless `value` is an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        wanted = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{name} is {value!r}; it must be an integer, {wanted}")


def positive(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be a finite number above 0")


def no_overlap(name: str, value: torch.Tensor) -> None:
    """Raise ValueError unless every element of a tensor that is to be written has memory of its own."""
    reach = 0  # offset of the last element, over the dimensions so far
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride <= reach and value.numel():
            raise ValueError(f"{name} has strides {list(value.stride())}; it is written, so elements must not overlap")
        reach += stride * (size - 1)


def head_ratio(num_q_heads: int, num_kv_heads: int) -> None:
    """Raise ValueError unless there are query heads and they divide evenly among the KV heads."""
    if num_kv_heads < 1 or num_q_heads < 1 or num_q_heads % num_kv_heads:
        raise ValueError(
            f"query has {num_q_heads} heads for {num_kv_heads} KV heads; it must have a multiple of the KV heads"
        )


def cache(value: torch.Tensor, layout: PageLayout, num_kv_heads: int | None, device: torch.device) -> None:
    """Raise ValueError unless `value` is a cache of this layout: uint8 [num_pages, num_kv_heads, page_bytes]."""
    shape = (None, num_kv_heads, layout.page_bytes)
    tensor("cache", value, shape=shape, dtypes=(torch.uint8,), device=device, contiguous=True)


def block_tables_and_lengths(
    block_tables: torch.Tensor, seq_lens: torch.Tensor, query_start: torch.Tensor, num_pages: int, page_size: int
) -> None:
    """Raise ValueError if a length is beyond its block table or its sequence, or a page in use lies outside the cache.

    Waits for the GPU. Pages behind a sequence's length are not looked at.
    """
    num_seqs, max_pages = block_tables.shape
    lengths, starts = seq_lens.tolist(), query_start.tolist()
    if starts[0] != 0:
        raise ValueError(f"query_start begins at {starts[0]}; it must begin at 0")
    for b, length in enumerate(lengths):
        query_len = starts[b + 1] - starts[b]
        if query_len < 0:
            raise ValueError(f"query_start falls from {starts[b]} to {starts[b + 1]} at sequence {b}; it must not fall")
        if not query_len <= length <= max_pages * page_size:
            raise ValueError(
                f"seq_lens[{b}] is {length}; it must be at least the {query_len} new tokens of the sequence "
                f"and at most the {max_pages * page_size} tokens of its block table"
            )
    used = torch.arange(max_pages, device=block_tables.device) * page_size < seq_lens[:, None]
    outside = used & ((block_tables < 0) | (block_tables >= num_pages))
    if num_seqs and outside.any():
        b, j = outside.nonzero()[0].tolist()
        raise ValueError(
            f"block_tables[{b}, {j}] is {int(block_tables[b, j])}; it must be a page of the cache, 0 to {num_pages - 1}"
        )


def residual_windows(
    residual: torch.Tensor,
    residual_slots: torch.Tensor,
    flushed_lens: torch.Tensor,
    layout: PageLayout,
    num_kv_heads: int,
    num_seqs: int,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Raise ValueError unless these are residual windows of this layout, a slot of them and a length per sequence."""
    shape = (None, num_kv_heads, 2, layout.residual_size, layout.head_dim)
    tensor("residual", residual, shape=shape, dtypes=dtypes, device=device, contiguous=True)
    for name, value in (("residual_slots", residual_slots), ("flushed_lens", flushed_lens)):
        tensor(name, value, shape=(num_seqs,), dtypes=(torch.int32,), device=device, contiguous=True)
    num_slots = residual.shape[0]
    outside = (residual_slots < 0) | (residual_slots >= num_slots)
    if outside.any():
        b = int(outside.nonzero()[0])
        raise ValueError(
            f"residual_slots[{b}] is {int(residual_slots[b])}; it must be a slot of residual, 0 to {num_slots - 1}"
        )


def flushed_lengths(
    flushed_lens: torch.Tensor, seq_lens: torch.Tensor, layout: PageLayout, active: torch.Tensor | None = None
) -> None:
    """Raise ValueError unless each flushed length is whole pages, and the residual window holds what follows it.

    Args:
        seq_lens: tokens of each sequence that stand in pages or in the residual window.
        active: bool [num_seqs]; sequences to look at, all if None.
    """
    waiting = seq_lens - flushed_lens
    wrong = (
        (flushed_lens < 0) | (flushed_lens % layout.page_size != 0) | (waiting < 0) | (waiting > layout.residual_size)
    )
    if active is not None:
        wrong &= active
    if wrong.any():
        b = int(wrong.nonzero()[0])
        length = int(seq_lens[b])
        raise ValueError(
            f"flushed_lens[{b}] is {int(flushed_lens[b])}; it must be a multiple of {layout.page_size} "
            f"from {max(length - layout.residual_size, 0)} to the sequence's {length} tokens"
        )
