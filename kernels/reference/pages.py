"""KV pages in plain PyTorch: quantisation, packing, writing and reading. The specification of `kernels.cache`.

The byte layout is `kernels.pages`. Rounding is fixed to the bit, so that a page does not depend on who wrote it:

    e4m3 and int8, per token and head: K and V over the head's channels
        scale = up(absmax · (1/448)) for e4m3, up(absmax · (1/127)) for int8
        byte  = e4m3(clamp(x · r, ±448))      or  128 + round(x · r)
    int4 and int2, K per channel over the page's tokens, V per token over the head's channels
        min   = down(smallest x), never -0
        scale = up((largest x − min) · (1 / (2^bits − 1)))
        code  = round((x − min) · r)

`up` and `down` round to fp16 away from the range (a scale is at least 2^-24, the least positive fp16), so that no value
of the range clips; `round` and `e4m3` round half to even; r = 1 / scale. Constants in brackets are float32, and every
operation is one float32 operation, rounded to nearest; only products within `round` are not rounded before, so that a
fused multiply-add with a large constant does both. Inputs must be finite, for int4 and int2 within fp16's range
(±65504); what others become is not defined.

RoPE rotates K in float32 and rounds it to K's own dtype before it is stored or quantised: a cache never depends on
whether a token was written at once or waited in the residual window.
"""

import math
from typing import NamedTuple

import torch

from kernels.pages import PageLayout

E4M3_MAX = 448.0
INT8_MAX = 127.0
INT8_OFFSET = 128
LEAST_SCALE = 2.0**-24
FP16_MAX = 65504.0


class Quantised(NamedTuple):
    """Codes (or bytes) as uint8 in the shape of the input, fp16 scales, and fp16 minima for the affine formats."""

    codes: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None


def round_up_fp16(x: torch.Tensor) -> torch.Tensor:
    """The least fp16 in [2^-24, 65504] that is at least x (float32, not negative)."""
    x = x.clamp(LEAST_SCALE, FP16_MAX)
    nearest = x.half()
    return torch.where(nearest.float() < x, (nearest.view(torch.int16) + 1).view(torch.float16), nearest)


def round_down_fp16(x: torch.Tensor) -> torch.Tensor:
    """The largest fp16 in ±65504 that is at most x (float32)."""
    x = x.clamp(-FP16_MAX, FP16_MAX)
    nearest = x.half()
    # Bits of a negative number grow with its magnitude; -0 stands for a negative x too small for fp16.
    bits = nearest.view(torch.int16)
    below = torch.where(bits < 0, bits + 1, bits - 1).view(torch.float16)
    return torch.where(nearest.float() > x, below, nearest)


def exact_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The product of float32 numbers, not rounded: float64."""
    return x.double() * y.double()


def quantise_symmetric(x: torch.Tensor, kv_dtype: str) -> Quantised:
    """fp8 and int8: one scale for each vector [..., channels] of any floating-point dtype; scale [...]."""
    x = x.float()
    largest = E4M3_MAX if kv_dtype == "fp8" else INT8_MAX
    scale = round_up_fp16(x.abs().amax(-1) * (1 / largest))
    reciprocal = (1.0 / scale.float())[..., None]
    if kv_dtype == "fp8":
        codes = (x * reciprocal).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        codes = (exact_product(x, reciprocal).round() + INT8_OFFSET).to(torch.uint8)
    return Quantised(codes, scale, None)


def quantise_affine(x: torch.Tensor, kv_dtype: str, dim: int) -> Quantised:
    """int4 and int2: one scale and one minimum for each run along `dim`; their shape is x's without `dim`."""
    x = x.float()
    levels = 2 ** {"int4": 4, "int2": 2}[kv_dtype] - 1
    minimum = round_down_fp16(x.amin(dim) + 0.0)  # never -0
    scale = round_up_fp16((x.amax(dim) - minimum.float()) * (1 / levels))
    scaled = exact_product(x - minimum.float().unsqueeze(dim), (1.0 / scale.float()).unsqueeze(dim))
    return Quantised(scaled.round().clamp(0, levels).to(torch.uint8), scale, minimum)


def quantise_tokens(x: torch.Tensor, kv_dtype: str) -> Quantised:
    """Quantise per token: x [..., head_dim] to codes [..., head_dim], scale (and minimum) [...].

    K and V of fp8 and int8, V of int4 and int2.
    """
    if kv_dtype in ("fp8", "int8"):
        return quantise_symmetric(x, kv_dtype)
    return quantise_affine(x, kv_dtype, -1)


def quantise_channels(x: torch.Tensor, kv_dtype: str) -> Quantised:
    """Quantise per channel over a page: x [..., page_size, head_dim], scale and minimum [..., head_dim].

    K of int4 and int2 (KIVI, arXiv 2402.02750).
    """
    return quantise_affine(x, kv_dtype, -2)


def pack(codes: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Codes, uint8 [..., head_dim], as int16 words [..., words]: channel w + i·words is the i-th field of word w."""
    fields = codes.unflatten(-1, (layout.planes, layout.words)).int()
    words = torch.zeros_like(fields[..., 0, :])
    for plane in range(layout.planes):
        words |= fields[..., plane, :] << (plane * layout.bits)
    return words.to(torch.int16)


def unpack(words: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """int16 words [..., words] as codes, uint8 [..., head_dim]."""
    fields = [(words.int() >> (plane * layout.bits)) & (2**layout.bits - 1) for plane in range(layout.planes)]
    return torch.cat(fields, -1).to(torch.uint8)


def dequantise(
    cache: torch.Tensor,
    layout: PageLayout,
    page_ids: torch.Tensor | list[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value of whole pages, each [num_pages, num_kv_heads, page_size, head_dim].

    Args:
        cache: uint8 [num_pages, num_kv_heads, page_bytes].
        page_ids: the pages to read, in this order; all of them if None.
        dtype: of the result. Values are computed in float32.
    """
    pages = cache if page_ids is None else cache[torch.as_tensor(page_ids, device=cache.device).long()]
    words = layout.words_view(pages)
    if layout.is_float:
        key, value = words.float().unbind(2)
        return key.to(dtype), value.to(dtype)
    codes = unpack(words, layout)
    scales = {name: scale.float() for name, scale in layout.scale_views(pages).items()}
    if layout.kv_dtype == "fp8":
        numbers = codes.view(torch.float8_e4m3fn).float()
    else:
        numbers = codes.float() - (INT8_OFFSET if layout.kv_dtype == "int8" else 0)
    key, value = numbers.unbind(2)
    if layout.is_low_bit:
        key = key * scales["k_scale"][..., None, :] + scales["k_min"][..., None, :]
        value = value * scales["v_scale"][..., None] + scales["v_min"][..., None]
    else:
        key = key * scales["k_scale"][..., None]
        value = value * scales["v_scale"][..., None]
    return key.to(dtype), value.to(dtype)


def gather(
    cache: torch.Tensor,
    layout: PageLayout,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    residual: torch.Tensor | None = None,
    residual_slots: torch.Tensor | None = None,
    flushed_lens: torch.Tensor | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What attention reads: for each sequence its key and value, float32 [seq_len, num_kv_heads, head_dim].

    Low-bit formats also take `residual`, `residual_slots` and `flushed_lens`: tokens from flushed_len on come from the
    sequence's residual window.
    """
    sequences = []
    for b, length in enumerate(seq_lens.tolist()):
        paged = min(length, int(flushed_lens[b])) if layout.is_low_bit else length
        page_ids = block_tables[b, : -(-paged // layout.page_size)]
        parts = [part.transpose(1, 2).flatten(0, 1)[:paged] for part in dequantise(cache, layout, page_ids)]
        if layout.is_low_bit:
            ring = residual[int(residual_slots[b])].float()
            slots = torch.arange(paged, length, device=ring.device) % layout.residual_size
            parts = [torch.cat([part, ring[:, i, slots].transpose(0, 1)]) for i, part in enumerate(parts)]
        sequences.append((parts[0], parts[1]))
    return sequences


def slot_mapping(
    block_tables: torch.Tensor, query_start: torch.Tensor, seq_lens: torch.Tensor, num_tokens: int, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Position and slot of each new token, int64 [num_tokens]; a slot is page · page_size + offset.

    Rows behind the last sequence are padding: position 0, slot -1.
    """
    positions = torch.zeros(num_tokens, dtype=torch.int64, device=query_start.device)
    slots = torch.full_like(positions, -1)
    starts = query_start.tolist()
    for b, seq_len in enumerate(seq_lens.tolist()):
        for row in range(starts[b], starts[b + 1]):
            position = seq_len - starts[b + 1] + row
            positions[row] = position
            slots[row] = int(block_tables[b, position // page_size]) * page_size + position % page_size
    return positions, slots


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """RoPE in the rotate-half form on x [num_tokens, num_heads, head_dim], computed in float32, in x's dtype.

    Args:
        cos, sin: float32 [max_position, rotary_dim / 2]. Channels c and c + rotary_dim / 2 are one pair; channels from
            rotary_dim on stay as they are.
        positions: integers [num_tokens].
    """
    half = cos.shape[1]
    c, s = (table[positions.long()][:, None, :] for table in (cos, sin))
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    rotated = torch.cat([first * c - second * s, second * c + first * s], -1).to(x.dtype)
    return torch.cat([rotated, x[..., 2 * half :]], -1)


def next_flushed_lens(committed_lens: torch.Tensor, page_size: int) -> torch.Tensor:
    """flushed_lens after a step: whole pages of tokens that can no longer be rejected."""
    return committed_lens // page_size * page_size


def write(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    layout: PageLayout,
    *,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    query: torch.Tensor | None = None,
    rotated_key: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    residual_slots: torch.Tensor | None = None,
    flushed_lens: torch.Tensor | None = None,
    committed_lens: torch.Tensor | None = None,
) -> None:
    """Write the new tokens' K and V into the cache: what `kernels.cache.write_kv` does, one token after another.

    Args:
        key, value: [num_tokens, num_kv_heads, head_dim].
        cos, sin: rotate the key (and the query, in place) before writing; see `rotate`.
        rotated_key: receives the key as it is written, may be `key` itself.
        flushed_lens, committed_lens: int32 [num_seqs], before the step and after it, for low-bit formats. Pages below
            committed_len that are not flushed yet are quantised; all other new tokens go to the residual window.
            Nothing is done for a sequence without new tokens.
    """
    num_new = int(query_start[-1])
    positions, slots = slot_mapping(block_tables, query_start, seq_lens, num_new, layout.page_size)
    if cos is not None:
        if query is not None:
            query[:num_new] = rotate(query[:num_new], cos, sin, positions)
        key = rotate(key[:num_new], cos, sin, positions)
    if rotated_key is not None:
        rotated_key[:num_new] = key[:num_new]
    if layout.is_low_bit:
        starts = query_start.tolist()
        for b, seq_len in enumerate(seq_lens.tolist()):
            new = slice(starts[b], starts[b + 1])
            if new.start == new.stop:
                continue
            ring = residual[int(residual_slots[b])]
            _write_sequence(
                key[new], value[new], cache, layout, block_tables[b], seq_len, ring, flushed_lens[b], committed_lens[b]
            )
        return
    words, scales = layout.words_view(cache), layout.scale_views(cache)
    for row, slot in enumerate(slots.tolist()):
        page, offset = divmod(slot, layout.page_size)
        for i, name, x in ((0, "k_scale", key[row]), (1, "v_scale", value[row])):
            if layout.is_float:
                words[page, :, i, offset] = x.to(layout.word_dtype)
            else:
                quantised = quantise_tokens(x, layout.kv_dtype)
                words[page, :, i, offset] = pack(quantised.codes, layout)
                scales[name][page, :, offset] = quantised.scale


def _write_sequence(key, value, cache, layout, block_table, seq_len, ring, flushed_len, committed_len) -> None:
    """One sequence of a low-bit format: flush what is committed, the rest goes to its ring [heads, 2, size, dim]."""
    size, num_new = layout.page_size, len(key)
    context_len, flushed = seq_len - num_new, int(next_flushed_lens(committed_len, layout.page_size))
    for start in range(int(flushed_len), flushed, size):
        waiting = torch.arange(start, max(start, min(start + size, context_len))) % layout.residual_size
        fresh = slice(max(start - context_len, 0), max(start + size - context_len, 0))
        page = [torch.cat([ring[:, i, waiting], x[fresh].transpose(0, 1)], 1) for i, x in ((0, key), (1, value))]
        _store_page(cache[int(block_table[start // size])], layout, page[0], page[1])
    for position in range(max(context_len, flushed), seq_len):
        ring[:, 0, position % layout.residual_size] = key[position - context_len]
        ring[:, 1, position % layout.residual_size] = value[position - context_len]


def _store_page(page: torch.Tensor, layout: PageLayout, key: torch.Tensor, value: torch.Tensor) -> None:
    """Quantise key and value [num_kv_heads, page_size, head_dim] into one page, uint8 [num_kv_heads, page_bytes]."""
    words, scales = layout.words_view(page[None])[0], layout.scale_views(page[None])
    quantised = {"k": quantise_channels(key, layout.kv_dtype), "v": quantise_tokens(value, layout.kv_dtype)}
    for i, (name, part) in enumerate(quantised.items()):
        words[:, i] = pack(part.codes, layout)
        scales[f"{name}_scale"][0] = part.scale
        scales[f"{name}_min"][0] = part.minimum


def page_of(key: torch.Tensor, value: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Whole pages of K and V as a cache: [num_pages, num_kv_heads, page_size, head_dim] to uint8 [.., page_bytes]."""
    num_pages, num_kv_heads = key.shape[:2]
    cache = layout.empty_cache(num_pages, num_kv_heads, key.device)
    if layout.is_low_bit:
        for page, k, v in zip(cache, key, value, strict=True):
            _store_page(page, layout, k, v)
        return cache
    words, scales = layout.words_view(cache), layout.scale_views(cache)
    for i, (name, x) in enumerate((("k_scale", key), ("v_scale", value))):
        if layout.is_float:
            words[:, :, i] = x.to(layout.word_dtype)
        else:
            quantised = quantise_tokens(x, layout.kv_dtype)
            words[:, :, i] = pack(quantised.codes, layout)
            scales[name][:] = quantised.scale
    return cache


def quantisation_error(
    kv_dtype: str,
    outliers: bool = False,
    *,
    head_dim: int = 128,
    page_size: int = 64,
    length: int = 4096,
    num_queries: int = 256,
    seed: int = 0,
) -> float:
    """Relative error ‖o − o_exact‖ / ‖o_exact‖ that a format puts into attention's output, in float64.

    K and V are Gaussian; with `outliers`, four channels of K have means of ±8 standard deviations, which is how the
    outliers of real keys look. Logits have a standard deviation of 2, so that attention is peaked and errors of K show.
    """
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(rows, head_dim, generator=generator) for rows in (num_queries, length, length))
    if outliers:
        key[:, :: head_dim // 4] += 8.0 * torch.tensor([1.0, -1.0, 1.0, -1.0])
    layout = PageLayout(kv_dtype, head_dim, page_size)
    pages = [x.view(-1, 1, page_size, head_dim) for x in (key, value)]
    stored = [x.reshape(length, head_dim) for x in dequantise(page_of(*pages, layout), layout)]

    def attend(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        logits = 2.0 / math.sqrt(head_dim) * query.double() @ k.double().T
        return logits.softmax(-1) @ v.double()

    exact = attend(key, value)
    return float((attend(*stored) - exact).norm() / exact.norm())
