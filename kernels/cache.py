"""Writing the KV cache: RoPE, quantisation and the store into pages in one launch, and reading pages back.

`kernels.pages` is the byte layout, `kernels.reference.pages` the meaning and the rounding, which these kernels meet to
the bit. A step of the engine calls once

    positions, slots = slot_mapping(block_tables, query_start, seq_lens, num_tokens, page_size)
    flushed_after = next_flushed_lens(committed_lens, page_size)          int4 and int2, into a second buffer

then `write_kv` in every layer. Each layer writes with the old flushed_lens and its attention reads with flushed_after,
which become the flushed_lens of the next step.

Formats with a scale per token, or none, are written by tokens: a program takes some tokens and some heads. int4 and
int2 are written by pages. There a program is one of:

    a sequence   quantises the pages that the residual window has a part in, waits, then puts the tokens that fill no
                 page into the window. One program does both, because the new tokens take the slots of the flushed ones.
    a window     of page_size rows of the flat token batch: at most one page of new tokens only begins in it, for such
                 pages are disjoint runs of page_size rows. Long prompts go to their pages this way, in parallel.

Launches disable the fusing of multiplications and additions: a fused one rounds once, the specification twice.
"""

import functools
import math
from types import SimpleNamespace

import torch
import triton
import triton.language as tl

from kernels import checks
from kernels.interpreting import INTERPRETING
from kernels.pages import MAX_QUERY_LEN, PAGE_SIZES, PageLayout

FLOATS = (torch.bfloat16, torch.float16, torch.float32)

# 1.5 · 2^23: adding it leaves round-half-even(x) in the low bits of the float32.
_ROUND = tl.constexpr(12582912.0)
_ROUND_INT8 = tl.constexpr(12582912.0 + 128.0)
_LEAST_SCALE = tl.constexpr(2.0**-24)
_FP16_MAX = tl.constexpr(65504.0)
_INTERPRETING = tl.constexpr(INTERPRETING)


@triton.jit
def _widen(x):
    """To float32, one instruction an element also for bfloat16."""
    if not _INTERPRETING and x.dtype == tl.bfloat16:
        wide = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], tl.float32, True, 2
        )
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def _round_to(x, dtype: tl.constexpr):
    """float32 rounded to what `dtype` can hold, still float32."""
    if not _INTERPRETING and dtype == tl.bfloat16:
        rounded = tl.inline_asm_elementwise(
            "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000; }",
            "=r,=r,r,r",
            [x],
            tl.float32,
            True,
            2,
        )
    else:
        rounded = x.to(dtype).to(tl.float32)
    return rounded


@triton.jit
def _round_up_fp16(x):
    """float32, not negative, to the least fp16 at or above it."""
    x = tl.minimum(tl.maximum(x, _LEAST_SCALE), _FP16_MAX)
    nearest = x.to(tl.float16)
    above = (nearest.to(tl.int16, bitcast=True) + 1).to(tl.float16, bitcast=True)
    return tl.where(nearest.to(tl.float32) < x, above, nearest)


@triton.jit
def _round_down_fp16(x):
    """float32 to the largest fp16 at or below it."""
    x = tl.minimum(tl.maximum(x, -_FP16_MAX), _FP16_MAX)
    nearest = x.to(tl.float16)
    bits = nearest.to(tl.int16, bitcast=True)
    below = tl.where(bits < 0, bits + 1, bits - 1).to(tl.float16, bitcast=True)
    return tl.where(nearest.to(tl.float32) > x, below, nearest)


@triton.jit
def _e4m3_code(x):
    """float32 within ±464 to the byte of the nearest e4m3, ties to even, as int32."""
    if _INTERPRETING:
        # The interpreter's own cast rounds wrongly. Normal numbers keep 3 of 23 bits of the mantissa and change the
        # bias of the exponent from 127 to 7; below 2^-6 the byte counts steps of 2^-9.
        magnitude = tl.minimum(tl.abs(x), 448.0)
        bits = magnitude.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        subnormal = (magnitude * 512.0 + _ROUND).to(tl.int32, bitcast=True) & 0xFF
        sign = tl.where(x.to(tl.int32, bitcast=True) < 0, 0x80, 0)
        code = tl.where(magnitude < 0.015625, subnormal, normal) | sign
    else:
        code = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
    return code


@triton.jit
def _reciprocal(scale):
    """1 / scale of fp16 numbers, correctly rounded float32: one step of Newton from an estimate within an ulp or two.

    That this is exact for every fp16 and every such estimate was checked by enumeration (tests/kernels).
    """
    scale = scale.to(tl.float32)
    if _INTERPRETING:
        result = 1.0 / scale
    else:
        estimate = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [scale], tl.float32, True, 1)
        result = tl.fma(estimate, tl.fma(-scale, estimate, 1.0), estimate)
    return result


@triton.jit
def _quantise_token(first, second, KV_DTYPE: tl.constexpr):
    """Halves of a head, float32 [tokens, words] each, to int16 words and fp16 scales [tokens] of fp8 or int8."""
    absmax = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), 1)
    largest: tl.constexpr = 448.0 if KV_DTYPE == "fp8" else 127.0
    scale = _round_up_fp16(absmax * (1 / largest))
    reciprocal = _reciprocal(scale)[:, None]
    if KV_DTYPE == "fp8":
        low = _e4m3_code(first * reciprocal)
        high = _e4m3_code(second * reciprocal)
    else:
        # The upper bits, those of 1.5 · 2^23, end above the word.
        low = (first * reciprocal + _ROUND_INT8).to(tl.int32, bitcast=True)
        high = (second * reciprocal + _ROUND_INT8).to(tl.int32, bitcast=True)
    return (low + (high << 8)).to(tl.int16), scale


@triton.jit
def _affine(smallest, largest, LEVELS: tl.constexpr):
    """Range of a run, float32, to fp16 scale, fp16 minimum, and both for use: float32 reciprocal and minimum."""
    minimum = _round_down_fp16(smallest + 0.0)  # never -0
    start = minimum.to(tl.float32)
    scale = _round_up_fp16((largest - start) * (1 / LEVELS))
    return scale, minimum, _reciprocal(scale), start


@triton.jit
def _affine_code(x, start, reciprocal):
    """Codes as int32 whose upper 16 bits are of no use. Nothing clips: minimum and scale enclose the range."""
    return ((x - start) * reciprocal + _ROUND).to(tl.int32, bitcast=True)


@triton.jit
def _quantise_plane(x, scales, real, HEAD_DIM: tl.constexpr, LEVELS: tl.constexpr):
    """A plane of a page of K, float32 [tokens, words], per channel: codes. Scale and minimum, [words], go to memory."""
    scale, minimum, reciprocal, low = _affine(tl.min(x, 0), tl.max(x, 0), LEVELS)
    tl.store(scales, scale, real)
    tl.store(scales + HEAD_DIM, minimum, real)
    return _affine_code(x, low[None, :], reciprocal[None, :])


@triton.jit
def _load_run(rows, mask, START: tl.constexpr, LENGTH: tl.constexpr, VECTOR: tl.constexpr = 16, other=0.0):
    """Channels [START, START + LENGTH) of the rows that pointers [tokens] point at; `other` where masked.

    A thread takes up to VECTOR neighbouring channels, or as many as 16 bytes hold.
    """
    channel = tl.max_contiguous(tl.arange(0, triton.next_power_of_2(LENGTH)), VECTOR)
    return tl.load(rows[:, None] + (START + channel), mask[:, None] & (channel < LENGTH), other=other)


@triton.jit
def _store_run(rows, x, mask, START: tl.constexpr, LENGTH: tl.constexpr, VECTOR: tl.constexpr = 16):
    channel = tl.max_contiguous(tl.arange(0, triton.next_power_of_2(LENGTH)), VECTOR)
    tl.store(rows[:, None] + (START + channel), x, mask[:, None] & (channel < LENGTH))


@triton.jit
def _copy_run(source, target, mask, START: tl.constexpr, END: tl.constexpr):
    """Channels [START, END), where there are any: what a partial RoPE leaves as it is."""
    if START < END:
        _store_run(target, _load_run(source, mask, START, END - START), mask, START, END - START)


@triton.jit
def _rotate(first, second, cos, sin):
    """RoPE of a pair of halves: float32, rounded to their dtype."""
    a = _widen(first)
    b = _widen(second)
    return _round_to(a * cos - b * sin, first.dtype), _round_to(b * cos + a * sin, first.dtype)


@triton.jit
def _rotate_rows(source, target, cos, sin, mask, HEAD_DIM: tl.constexpr, HALF: tl.constexpr):
    """Rotate one head of some tokens from pointers `source` to pointers `target`, [tokens] each, maybe the same."""
    first, second = _rotate(_load_run(source, mask, 0, HALF), _load_run(source, mask, HALF, HALF), cos, sin)
    _store_run(target, first, mask, 0, HALF)
    _store_run(target, second, mask, HALF, HALF)
    _copy_run(source, target, mask, 2 * HALF, HEAD_DIM)


@triton.jit
def _write_tokens_kernel(
    key_ptr,
    key_stride_t,
    key_stride_h,
    value_ptr,
    value_stride_t,
    value_stride_h,
    rotated_ptr,
    rotated_stride_t,
    rotated_stride_h,
    query_ptr,
    query_stride_t,
    query_stride_h,
    cos_ptr,
    sin_ptr,
    words_ptr,
    scales_ptr,
    slots_ptr,
    positions_ptr,
    num_tokens,
    num_kv_heads,
    num_heads,  # KV heads, and the query's behind them where it is rotated too
    KV_DTYPE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # rotary_dim / 2, 0 for no RoPE
    PAGE_SIZE: tl.constexpr,
    PAGE_WORDS: tl.constexpr,
    PAGE_SCALES: tl.constexpr,  # page_bytes in fp16
    SCALE_OFFSET: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """Write K and V of BLOCK_TOKENS tokens and BLOCK_HEADS heads, or rotate so many heads of the query."""
    IS_FLOAT: tl.constexpr = KV_DTYPE == "float"
    WORDS: tl.constexpr = HEAD_DIM if IS_FLOAT else HEAD_DIM // 2
    # A quantised word holds channels w and w + D/2. A partial RoPE pairs other channels, so it goes through memory.
    STAGED: tl.constexpr = not IS_FLOAT and HALF > 0 and 2 * HALF < HEAD_DIM
    PART: tl.constexpr = HALF if IS_FLOAT and HALF > 0 else HEAD_DIM // 2
    groups = num_heads // BLOCK_HEADS
    head_start = (tl.program_id(0) % groups) * BLOCK_HEADS
    rows = (tl.program_id(0) // groups) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    slots = tl.load(slots_ptr + rows, rows < num_tokens, other=-1).to(tl.int64)
    live = slots >= 0
    rows = rows.to(tl.int64)
    if HALF > 0:
        table_rows = tl.load(positions_ptr + rows, live, other=0).to(tl.int64) * HALF
        cos = _load_run(cos_ptr + table_rows, live, 0, HALF)
        sin = _load_run(sin_ptr + table_rows, live, 0, HALF)

    if head_start >= num_kv_heads:
        if query_ptr is not None:
            for head in range(head_start - num_kv_heads, head_start - num_kv_heads + BLOCK_HEADS):
                query = query_ptr + rows * query_stride_t + head * query_stride_h
                _rotate_rows(query, query, cos, sin, live, HEAD_DIM, HALF)
    else:
        pages = slots // PAGE_SIZE
        offsets = slots % PAGE_SIZE
        for head in range(head_start, head_start + BLOCK_HEADS):
            key = key_ptr + rows * key_stride_t + head * key_stride_h
            value = value_ptr + rows * value_stride_t + head * value_stride_h
            if rotated_ptr is not None:
                rotated = rotated_ptr + rows * rotated_stride_t + head * rotated_stride_h
            if STAGED:
                _rotate_rows(key, rotated, cos, sin, live, HEAD_DIM, HALF)
                tl.debug_barrier()
                key = rotated
            first = _load_run(key, live, 0, PART)
            second = _load_run(key, live, PART, PART)
            value_first = _load_run(value, live, 0, HEAD_DIM // 2)
            value_second = _load_run(value, live, HEAD_DIM // 2, HEAD_DIM // 2)
            if HALF > 0 and not STAGED:
                k_first, k_second = _rotate(first, second, cos, sin)
                if rotated_ptr is not None:
                    _store_run(rotated, k_first, live, 0, PART)
                    _store_run(rotated, k_second, live, PART, PART)
                    _copy_run(key, rotated, live, 2 * PART, HEAD_DIM)
            elif IS_FLOAT:
                k_first, k_second = first, second
            else:
                k_first, k_second = _widen(first), _widen(second)
            k_words = words_ptr + (pages * num_kv_heads + head) * PAGE_WORDS + offsets * WORDS
            v_words = k_words + PAGE_SIZE * WORDS
            if IS_FLOAT:
                _store_run(k_words, k_first, live, 0, PART)
                _store_run(k_words, k_second, live, PART, PART)
                _copy_run(key, k_words, live, 2 * PART, HEAD_DIM)
                _store_run(v_words, value_first, live, 0, HEAD_DIM // 2)
                _store_run(v_words, value_second, live, HEAD_DIM // 2, HEAD_DIM // 2)
            else:
                scales = scales_ptr + (pages * num_kv_heads + head) * PAGE_SCALES + SCALE_OFFSET + offsets
                words, scale = _quantise_token(k_first, k_second, KV_DTYPE)
                _store_run(k_words, words, live, 0, WORDS)
                tl.store(scales, scale, live)
                words, scale = _quantise_token(_widen(value_first), _widen(value_second), KV_DTYPE)
                _store_run(v_words, words, live, 0, WORDS)
                tl.store(scales + PAGE_SIZE, scale, live)


@triton.jit
def _flush_values(
    source, words_ptr, scales_ptr, token, BITS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr
):
    """Quantise V of some tokens of a page, from pointers `source`; the other pointers stand at V's words and scales."""
    WORDS: tl.constexpr = HEAD_DIM * BITS // 16
    every = token >= 0
    smallest = _widen(_load_run(source, every, 0, WORDS))
    largest = smallest
    planes = ()
    for plane in tl.static_range(16 // BITS):
        x = _load_run(source, every, plane * WORDS, WORDS)
        smallest = tl.minimum(smallest, _widen(x))
        largest = tl.maximum(largest, _widen(x))
        planes = planes + (x,)
    if triton.next_power_of_2(WORDS) > WORDS:
        real = tl.arange(0, triton.next_power_of_2(WORDS))[None, :] < WORDS
        smallest = tl.where(real, smallest, float("inf"))
        largest = tl.where(real, largest, float("-inf"))
    scale, minimum, reciprocal, low = _affine(tl.min(smallest, 1), tl.max(largest, 1), 2**BITS - 1)
    packed = tl.zeros(smallest.shape, tl.int32)
    for plane in tl.static_range(16 // BITS):
        packed += _affine_code(_widen(planes[plane]), low[:, None], reciprocal[:, None]) << (plane * BITS)
    _store_run(words_ptr + token * WORDS, packed.to(tl.int16), every, 0, WORDS)
    tl.store(scales_ptr + token, scale)
    tl.store(scales_ptr + PAGE_SIZE + token, minimum)


@triton.jit
def _flush_keys(
    source,
    rotated,
    cos,
    sin,
    is_fresh,
    words_ptr,
    scales_ptr,
    token,
    BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTATES: tl.constexpr,
    WRITES_BACK: tl.constexpr,
):
    """Rotate and quantise K of a page from pointers `source`, [page_size]; only fresh tokens are rotated.

    A thread takes two neighbouring channels only, so that it has many tokens of each: what is done once per channel
    (range, scale, reciprocal) is done by few threads. Coalescing would give it eight, and V's loads would impose that,
    were they of the same shape.
    """
    WORDS: tl.constexpr = HEAD_DIM * BITS // 16
    PAIRS: tl.constexpr = 8 // BITS
    LEVELS: tl.constexpr = 2**BITS - 1
    every = token >= 0
    word = tl.arange(0, triton.next_power_of_2(WORDS))
    packed = tl.zeros([token.shape[0], triton.next_power_of_2(WORDS)], tl.int32)
    # Planes i and i + planes/2 go together: they are the two halves of RoPE's pairs.
    for plane in tl.static_range(PAIRS):
        first = _load_run(source, every, plane * WORDS, WORDS, 2)
        second = _load_run(source, every, (PAIRS + plane) * WORDS, WORDS, 2)
        if ROTATES:
            # Tokens of the residual window are rotated already: cos 1, sin 0.
            cos_run = _load_run(cos, is_fresh, plane * WORDS, WORDS, 2, 1.0)
            sin_run = _load_run(sin, is_fresh, plane * WORDS, WORDS, 2)
            first, second = _rotate(first, second, cos_run, sin_run)
            if WRITES_BACK:
                _store_run(rotated, first, is_fresh, plane * WORDS, WORDS, 2)
                _store_run(rotated, second, is_fresh, (PAIRS + plane) * WORDS, WORDS, 2)
        else:
            first, second = _widen(first), _widen(second)
        scales = scales_ptr + plane * WORDS + word
        packed += _quantise_plane(first, scales, word < WORDS, HEAD_DIM, LEVELS) << (plane * BITS)
        scales += PAIRS * WORDS
        packed += _quantise_plane(second, scales, word < WORDS, HEAD_DIM, LEVELS) << ((PAIRS + plane) * BITS)
    _store_run(words_ptr + token * WORDS, packed.to(tl.int16), every, 0, WORDS, 2)


@triton.jit
def _flush_page(
    key_ptr,
    key_stride_t,
    value_ptr,
    value_stride_t,
    rotated_ptr,
    rotated_stride_t,
    ring_ptr,
    cos_ptr,
    sin_ptr,
    words_ptr,
    scales_ptr,
    start,
    context_len,
    row_of_zero,
    BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    RESIDUAL_SIZE: tl.constexpr,
):
    """Quantise one head's positions [start, start + PAGE_SIZE); pointers stand at the head, the ring and the page.

    Positions below context_len come from the ring, the others from rows row_of_zero + position of the batch.
    """
    WORDS: tl.constexpr = HEAD_DIM * BITS // 16
    ROTATES: tl.constexpr = 2 * HALF == HEAD_DIM
    token = tl.arange(0, PAGE_SIZE)
    positions = start + token
    rows = (row_of_zero + positions).to(tl.int64)
    is_fresh = positions >= context_len
    key = key_ptr + rows * key_stride_t
    cos = cos_ptr
    sin = sin_ptr
    rotated = rotated_ptr
    if HALF > 0:
        cos = cos_ptr + positions.to(tl.int64) * HALF
        sin = sin_ptr + positions.to(tl.int64) * HALF
        if rotated_ptr is not None:
            rotated = rotated_ptr + rows * rotated_stride_t
        if not ROTATES:
            # A partial RoPE pairs channels of any two planes: rotate in memory first.
            cos_run = _load_run(cos, is_fresh, 0, HALF)
            sin_run = _load_run(sin, is_fresh, 0, HALF)
            _rotate_rows(key, rotated, cos_run, sin_run, is_fresh, HEAD_DIM, HALF)
            tl.debug_barrier()
            key = rotated
    source = tl.where(is_fresh, key, ring_ptr + (positions % RESIDUAL_SIZE) * HEAD_DIM)
    WRITES_BACK: tl.constexpr = rotated_ptr is not None
    _flush_keys(source, rotated, cos, sin, is_fresh, words_ptr, scales_ptr, token, BITS, HEAD_DIM, ROTATES, WRITES_BACK)
    for half in tl.static_range(2):
        token = half * (PAGE_SIZE // 2) + tl.arange(0, PAGE_SIZE // 2)
        positions = start + token
        rows = (row_of_zero + positions).to(tl.int64)
        waiting = ring_ptr + (RESIDUAL_SIZE + positions % RESIDUAL_SIZE) * HEAD_DIM
        source = tl.where(positions >= context_len, value_ptr + rows * value_stride_t, waiting)
        v_words = words_ptr + PAGE_SIZE * WORDS
        _flush_values(source, v_words, scales_ptr + 2 * HEAD_DIM, token, BITS, HEAD_DIM, PAGE_SIZE)


@triton.jit
def _fill_ring(
    key_ptr,
    key_stride_t,
    value_ptr,
    value_stride_t,
    rotated_ptr,
    rotated_stride_t,
    ring_ptr,
    cos_ptr,
    sin_ptr,
    start,
    seq_len,
    row_of_zero,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    RESIDUAL_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Put one head's new tokens from position `start` on into the residual window."""
    for block in range(start, seq_len, BLOCK_TOKENS):
        positions = block + tl.arange(0, BLOCK_TOKENS)
        live = positions < seq_len
        rows = (row_of_zero + positions).to(tl.int64)
        key = key_ptr + rows * key_stride_t
        ring = ring_ptr + (positions % RESIDUAL_SIZE) * HEAD_DIM
        value = _load_run(value_ptr + rows * value_stride_t, live, 0, HEAD_DIM)
        if HALF > 0:
            cos = _load_run(cos_ptr + positions.to(tl.int64) * HALF, live, 0, HALF)
            sin = _load_run(sin_ptr + positions.to(tl.int64) * HALF, live, 0, HALF)
            _rotate_rows(key, ring, cos, sin, live, HEAD_DIM, HALF)
            if rotated_ptr is not None:
                # After the ring: it may be the key itself.
                _rotate_rows(key, rotated_ptr + rows * rotated_stride_t, cos, sin, live, HEAD_DIM, HALF)
        else:
            _copy_run(key, ring, live, 0, HEAD_DIM)
        _store_run(ring + RESIDUAL_SIZE * HEAD_DIM, value, live, 0, HEAD_DIM)


@triton.jit
def _page_in_window(
    query_start_ptr,
    seq_lens_ptr,
    committed_lens_ptr,
    window_start,
    num_seqs,
    PAGE_SIZE: tl.constexpr,
    SEQS_PAD: tl.constexpr,
):
    """The committed page of new tokens only whose first row lies in the window: sequence and position, or -1, -1."""
    seqs = tl.arange(0, SEQS_PAD)
    real = seqs < num_seqs
    rows = tl.load(query_start_ptr + seqs, real, other=0)
    seq_lens = tl.load(seq_lens_ptr + seqs, real, other=0)
    context_lens = seq_lens - (tl.load(query_start_ptr + seqs + 1, real, other=0) - rows)
    committed_lens = tl.load(committed_lens_ptr + seqs, real, other=0)
    # Each sequence's first page that holds new tokens only, then its first such page from the window on.
    starts = (context_lens + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE
    rows += starts - context_lens
    skipped = (tl.maximum(window_start - rows, 0) + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE
    starts += skipped
    rows += skipped
    is_committed = starts + PAGE_SIZE <= tl.minimum(committed_lens, seq_lens)
    found = real & (rows < window_start + PAGE_SIZE) & is_committed
    return tl.max(tl.where(found, seqs, -1), 0), tl.max(tl.where(found, starts, -1), 0)


@triton.jit
def _write_pages_kernel(
    key_ptr,
    key_stride_t,
    key_stride_h,
    value_ptr,
    value_stride_t,
    value_stride_h,
    rotated_ptr,
    rotated_stride_t,
    rotated_stride_h,
    query_ptr,
    query_stride_t,
    query_stride_h,
    cos_ptr,
    sin_ptr,
    words_ptr,
    scales_ptr,
    residual_ptr,
    residual_slots_ptr,
    flushed_lens_ptr,
    committed_lens_ptr,
    block_tables_ptr,
    block_tables_stride,
    query_start_ptr,
    seq_lens_ptr,
    positions_ptr,
    num_seqs,
    num_windows,
    num_kv_heads,
    head_ratio,
    BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGE_WORDS: tl.constexpr,
    PAGE_SCALES: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    RESIDUAL_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    SEQS_PAD: tl.constexpr,
):
    """Some heads of a sequence's flush and window, of a page of new tokens, or of the query: see the module."""
    groups = num_kv_heads // BLOCK_HEADS
    head_start = (tl.program_id(0) % groups) * BLOCK_HEADS
    item = tl.program_id(0) // groups
    if item < num_seqs + num_windows:
        if item < num_seqs:
            seq = item
            start = tl.load(flushed_lens_ptr + seq)
        else:
            window_start = (item - num_seqs) * PAGE_SIZE
            seq, start = _page_in_window(
                query_start_ptr, seq_lens_ptr, committed_lens_ptr, window_start, num_seqs, PAGE_SIZE, SEQS_PAD
            )
        if start >= 0:
            seq_len = tl.load(seq_lens_ptr + seq)
            query_end = tl.load(query_start_ptr + seq + 1)
            row_of_zero = query_end - seq_len  # the row of the flat batch that position 0 would have
            context_len = tl.load(query_start_ptr + seq) - row_of_zero
            next_flushed = tl.load(committed_lens_ptr + seq) // PAGE_SIZE * PAGE_SIZE
            slot = tl.load(residual_slots_ptr + seq).to(tl.int64)
            stop = tl.minimum(next_flushed, context_len)
            tail = tl.maximum(next_flushed, context_len)
            if item >= num_seqs:
                stop = start + PAGE_SIZE
                tail = seq_len
            elif context_len == seq_len:
                stop = start
            for head in range(head_start, head_start + BLOCK_HEADS):
                ring_ptr = residual_ptr + (slot * num_kv_heads + head) * (2 * RESIDUAL_SIZE * HEAD_DIM)
                key = key_ptr + head * key_stride_h
                value = value_ptr + head * value_stride_h
                rotated = rotated_ptr
                if rotated_ptr is not None:
                    rotated = rotated_ptr + head * rotated_stride_h
                for page_start in range(start, stop, PAGE_SIZE):
                    page = tl.load(block_tables_ptr + seq.to(tl.int64) * block_tables_stride + page_start // PAGE_SIZE)
                    place = page.to(tl.int64) * num_kv_heads + head
                    _flush_page(
                        key,
                        key_stride_t,
                        value,
                        value_stride_t,
                        rotated,
                        rotated_stride_t,
                        ring_ptr,
                        cos_ptr,
                        sin_ptr,
                        words_ptr + place * PAGE_WORDS,
                        scales_ptr + place * PAGE_SCALES + SCALE_OFFSET,
                        page_start,
                        context_len,
                        row_of_zero,
                        BITS,
                        HEAD_DIM,
                        HALF,
                        PAGE_SIZE,
                        RESIDUAL_SIZE,
                    )
                # New tokens take the slots of the tokens just flushed.
                tl.debug_barrier()
                _fill_ring(
                    key,
                    key_stride_t,
                    value,
                    value_stride_t,
                    rotated,
                    rotated_stride_t,
                    ring_ptr,
                    cos_ptr,
                    sin_ptr,
                    tail,
                    seq_len,
                    row_of_zero,
                    HEAD_DIM,
                    HALF,
                    RESIDUAL_SIZE,
                    BLOCK_TOKENS,
                )
    elif query_ptr is not None:
        item -= num_seqs + num_windows
        rows = (item // head_ratio) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        live = rows < tl.load(query_start_ptr + num_seqs)
        rows = rows.to(tl.int64)
        table_rows = tl.load(positions_ptr + rows, live, other=0).to(tl.int64) * HALF
        cos = _load_run(cos_ptr + table_rows, live, 0, HALF)
        sin = _load_run(sin_ptr + table_rows, live, 0, HALF)
        for head in range(head_start, head_start + BLOCK_HEADS):
            query = query_ptr + rows * query_stride_t + (head * head_ratio + item % head_ratio) * query_stride_h
            _rotate_rows(query, query, cos, sin, live, HEAD_DIM, HALF)


@triton.jit
def _slot_mapping_kernel(
    block_tables_ptr,
    block_tables_stride,
    query_start_ptr,
    seq_lens_ptr,
    positions_ptr,
    slots_ptr,
    num_tokens,
    num_seqs,
    PAGE_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
):
    """A token's sequence is the number of sequences that end at or before it: empty ones count as ended."""
    rows = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    seqs = tl.zeros([BLOCK_TOKENS], tl.int32)
    for first in range(0, num_seqs, BLOCK_SEQS):
        block = first + tl.arange(0, BLOCK_SEQS)
        ends = tl.load(query_start_ptr + 1 + block, block < num_seqs, other=2147483647)
        seqs += tl.sum((ends[None, :] <= rows[:, None]).to(tl.int32), 1)
    live = (rows < num_tokens) & (seqs < num_seqs)
    query_end = tl.load(query_start_ptr + 1 + seqs, live, other=0)
    positions = tl.load(seq_lens_ptr + seqs, live, other=0) - query_end + rows
    table = block_tables_ptr + seqs.to(tl.int64) * block_tables_stride + positions // PAGE_SIZE
    pages = tl.load(table, live, other=0).to(tl.int64)
    tl.store(positions_ptr + rows, tl.where(live, positions, 0).to(tl.int64), rows < num_tokens)
    tl.store(slots_ptr + rows, tl.where(live, pages * PAGE_SIZE + positions % PAGE_SIZE, -1), rows < num_tokens)


@triton.jit
def _numbers(words, plane: tl.constexpr, KV_DTYPE: tl.constexpr, BITS: tl.constexpr):
    """One plane of words, unscaled, as float32; an e4m3 number times 2^-8."""
    field = (words >> (plane * BITS)) & (2**BITS - 1)
    if KV_DTYPE == "fp8":
        # e4m3's exponent and mantissa in the places of fp16's; the bias differs by 8.
        bits = ((field & 0x80) << 8) | ((field & 0x7F) << 7)
        number = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif KV_DTYPE == "int8":
        number = (field - 128).to(tl.float32)
    else:
        number = field.to(tl.float32)
    return number


@triton.jit
def _dequantise_kernel(
    words_ptr,
    scales_ptr,
    block_tables_ptr,
    block_tables_stride,
    context_lens_ptr,
    residual_ptr,
    residual_slots_ptr,
    flushed_lens_ptr,
    out_ptr,
    out_block_tables_ptr,
    out_block_tables_stride,
    max_pages,
    num_kv_heads,
    KV_DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGE_WORDS: tl.constexpr,
    PAGE_SCALES: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    RESIDUAL_SIZE: tl.constexpr,
):
    """One page and head, to a page of plain numbers."""
    LOW_BIT: tl.constexpr = BITS < 8
    WORDS: tl.constexpr = HEAD_DIM * BITS // 16
    head = tl.program_id(0) % num_kv_heads
    seq = tl.program_id(0) // num_kv_heads // max_pages
    index = tl.program_id(0) // num_kv_heads % max_pages
    token = tl.arange(0, PAGE_SIZE)
    start = index * PAGE_SIZE
    context_len = tl.load(context_lens_ptr + seq)
    if start < context_len:
        live = start + token < context_len
        out_page = tl.load(out_block_tables_ptr + seq.to(tl.int64) * out_block_tables_stride + index).to(tl.int64)
        k_out = out_ptr + ((out_page * num_kv_heads + head) * 2 * PAGE_SIZE + token) * HEAD_DIM
        v_out = k_out + PAGE_SIZE * HEAD_DIM
        flushed_len = context_len
        if LOW_BIT:
            flushed_len = tl.load(flushed_lens_ptr + seq)
        if start < flushed_len:
            page = tl.load(block_tables_ptr + seq.to(tl.int64) * block_tables_stride + index).to(tl.int64)
            place = page * num_kv_heads + head
            k_words = words_ptr + place * PAGE_WORDS + token * WORDS
            keys = _load_run(k_words, live, 0, WORDS).to(tl.int32)
            values = _load_run(k_words + PAGE_SIZE * WORDS, live, 0, WORDS).to(tl.int32)
            scales = scales_ptr + place * PAGE_SCALES + SCALE_OFFSET
            FACTOR: tl.constexpr = 256.0 if KV_DTYPE == "fp8" else 1.0
            if LOW_BIT:
                word = tl.arange(0, triton.next_power_of_2(WORDS))
                v_scale = tl.load(scales + 2 * HEAD_DIM + token).to(tl.float32)[:, None]
                v_min = tl.load(scales + 2 * HEAD_DIM + PAGE_SIZE + token).to(tl.float32)[:, None]
            else:
                k_scale = tl.load(scales + token).to(tl.float32)[:, None] * FACTOR
                v_scale = tl.load(scales + PAGE_SIZE + token).to(tl.float32)[:, None] * FACTOR
            for plane in tl.static_range(16 // BITS):
                k = _numbers(keys, plane, KV_DTYPE, BITS)
                v = _numbers(values, plane, KV_DTYPE, BITS) * v_scale
                if LOW_BIT:
                    k_scale = tl.load(scales + plane * WORDS + word, word < WORDS, other=0.0).to(tl.float32)[None, :]
                    k_min = tl.load(scales + HEAD_DIM + plane * WORDS + word, word < WORDS, other=0.0)
                    k = k * k_scale + k_min.to(tl.float32)[None, :]
                    v = v + v_min
                else:
                    k = k * k_scale
                _store_run(k_out, k.to(out_ptr.dtype.element_ty), live, plane * WORDS, WORDS)
                _store_run(v_out, v.to(out_ptr.dtype.element_ty), live, plane * WORDS, WORDS)
        elif LOW_BIT:
            slot = tl.load(residual_slots_ptr + seq).to(tl.int64)
            ring = residual_ptr + (slot * num_kv_heads + head) * (2 * RESIDUAL_SIZE * HEAD_DIM)
            ring += ((start + token) % RESIDUAL_SIZE) * HEAD_DIM
            _copy_run(ring, k_out, live, 0, HEAD_DIM)
            _copy_run(ring + RESIDUAL_SIZE * HEAD_DIM, v_out, live, 0, HEAD_DIM)


@functools.cache
def _page_constants(layout: PageLayout) -> dict[str, int]:
    """Sizes of a page in the units of the kernels."""
    return {
        "HEAD_DIM": layout.head_dim,
        "PAGE_SIZE": layout.page_size,
        "PAGE_WORDS": layout.page_bytes // layout.word_dtype.itemsize,
        "PAGE_SCALES": layout.page_bytes // 2,
        "SCALE_OFFSET": layout.scale_offset // 2,
    }


def slot_mapping(
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    num_tokens: int,
    page_size: int,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    check: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Position and slot of each new token, once per step, without a wait for the GPU.

    Args:
        block_tables: int32 [num_seqs, max_pages].
        query_start: int32 [num_seqs + 1]. Rows behind its last entry are padding.
        seq_lens: int32 [num_seqs], new tokens included.
        num_tokens: rows of the token batch, padding included.
        out: two tensors to write to.
        check: look at the arguments first, which waits for the GPU; False costs nothing.

    Returns:
        positions and slots, int64 [num_tokens]; slot = page · page_size + offset. Padding has position 0, slot -1.

    Raises:
        ValueError: an argument of another shape, dtype or device, or a length beyond its table.
    """
    num_seqs, device = seq_lens.shape[0], block_tables.device
    if check:
        _check_sequences(block_tables, query_start, seq_lens, num_seqs, device)
        if page_size not in PAGE_SIZES:
            raise ValueError(f"page_size is {page_size}; it must be one of {', '.join(map(str, PAGE_SIZES))}")
        checks.block_tables_and_lengths(block_tables, seq_lens, query_start, 2**31 - 1, page_size)
        for name, tensor in zip(("positions", "slots"), out or (), strict=False):
            checks.tensor(name, tensor, shape=(num_tokens,), dtypes=(torch.int64,), device=device, contiguous=True)
    if out is None:
        out = tuple(torch.empty(num_tokens, dtype=torch.int64, device=device) for _ in range(2))
    block_tokens = 32
    if num_tokens:
        _slot_mapping_kernel[(triton.cdiv(num_tokens, block_tokens),)](
            block_tables,
            block_tables.stride(0),
            query_start,
            seq_lens,
            *out,
            num_tokens,
            num_seqs,
            PAGE_SIZE=page_size,
            BLOCK_TOKENS=block_tokens,
            BLOCK_SEQS=128,
        )
    return out


def next_flushed_lens(committed_lens: torch.Tensor, page_size: int, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """flushed_lens after a step, one small launch: committed_lens rounded down to whole pages, int32 [num_seqs]."""
    return torch.bitwise_and(committed_lens, -page_size, out=out)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    layout: PageLayout,
    *,
    slots: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    query: torch.Tensor | None = None,
    rotated_key: torch.Tensor | None = None,
    block_tables: torch.Tensor | None = None,
    query_start: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    residual_slots: torch.Tensor | None = None,
    flushed_lens: torch.Tensor | None = None,
    committed_lens: torch.Tensor | None = None,
    check: bool = True,
) -> None:
    """Rotate, quantise and store the new tokens of one layer, in one launch.

    All formats:
        key, value: [num_tokens, num_kv_heads, head_dim], last dimension contiguous, both of one dtype.
        cache: uint8 [num_pages, num_kv_heads, page_bytes].
        cos, sin: float32 [max_position, rotary_dim / 2], contiguous, to apply RoPE (rotate-half, channels c and
            c + rotary_dim / 2) to the key; None if it is rotated already. The result is rounded to the key's dtype.
        positions: from `slot_mapping`; needed with cos and sin (int4 and int2: only for a query).
        query: [num_tokens, num_q_heads, head_dim], rotated in place by the same launch.
        rotated_key: receives the rotated key, for prefill attention; may be `key` itself.

    bfloat16, float16, float32, fp8 and int8:
        slots: from `slot_mapping`. Tokens with slot -1 are padding: nothing of them is read or written.

    int4 and int2, where pages are quantised whole (`kernels.pages` tells the protocol):
        block_tables, query_start, seq_lens: int32 [num_seqs, max_pages], [num_seqs + 1], [num_seqs]. Nothing is done
            for a sequence without new tokens.
        residual: [num_slots, num_kv_heads, 2, residual_size, head_dim] in the key's dtype.
        residual_slots: int32 [num_seqs], distinct among sequences with new tokens.
        flushed_lens: int32 [num_seqs], before this step, at most context_len = seq_len - new tokens.
        committed_lens: int32 [num_seqs] in [context_len, seq_len]: tokens that no later step rejects. seq_len for
            prefill and plain decode, context_len or one more for the verification of drafts.

    A partial RoPE of a quantised format allocates a buffer of the key's size where rotated_key is None. `check` looks
    at the arguments first, which waits for the GPU; False costs nothing, and works inside a CUDA graph capture.

    Raises:
        ValueError: an argument of another shape, dtype, device or stride, one that the format needs and that is
            missing, and what `kernels.checks.block_tables_and_lengths` finds.
    """
    if check:
        _check_write(locals())
    num_tokens, num_kv_heads, head_dim = key.shape
    if num_tokens == 0:
        return
    half = 0 if cos is None else cos.shape[1]
    if rotated_key is None and half and 2 * half < head_dim and not layout.is_float:
        rotated_key = torch.empty_like(key, memory_format=torch.contiguous_format)
    tokens = (
        *(key, *key.stride()[:2], value, *value.stride()[:2]),
        *((None, 0, 0) if rotated_key is None else (rotated_key, *rotated_key.stride()[:2])),
        *((None, 0, 0) if query is None else (query, *query.stride()[:2])),
        *(cos, sin, cache.view(layout.word_dtype)),
    )
    num_q_heads = 0 if query is None else query.shape[1]
    constants = _page_constants(layout)
    if layout.is_low_bit:
        sequences = (residual, residual_slots, flushed_lens, committed_lens, block_tables)
        num_seqs, num_windows = seq_lens.shape[0], triton.cdiv(num_tokens, layout.page_size)
        block_tokens, head_ratio = 16, num_q_heads // num_kv_heads
        items = num_seqs + num_windows + triton.cdiv(num_tokens, block_tokens) * head_ratio
        block_heads, num_warps = _page_blocks(layout, num_tokens, num_kv_heads)
        _write_pages_kernel[(items * num_kv_heads // block_heads,)](
            *tokens,
            cache.view(torch.float16),
            *sequences,
            block_tables.stride(0),
            query_start,
            seq_lens,
            positions,
            num_seqs,
            num_windows,
            num_kv_heads,
            head_ratio,
            BITS=layout.bits,
            HALF=half,
            RESIDUAL_SIZE=layout.residual_size,
            BLOCK_TOKENS=block_tokens,
            BLOCK_HEADS=block_heads,
            SEQS_PAD=max(128, triton.next_power_of_2(num_seqs)),
            num_warps=num_warps,
            num_stages=1,
            enable_fp_fusion=False,
            **constants,
        )
        return
    block_tokens, block_heads, num_warps = _token_blocks(num_tokens, num_kv_heads, num_q_heads, head_dim)
    num_heads = num_kv_heads + num_q_heads
    _write_tokens_kernel[(triton.cdiv(num_tokens, block_tokens) * (num_heads // block_heads),)](
        *tokens,
        None if layout.is_float else cache.view(torch.float16),
        slots,
        positions,
        num_tokens,
        num_kv_heads,
        num_heads,
        KV_DTYPE="float" if layout.is_float else layout.kv_dtype,
        HALF=half,
        BLOCK_TOKENS=block_tokens,
        BLOCK_HEADS=block_heads,
        num_warps=num_warps,
        num_stages=1,
        enable_fp_fusion=False,
        **constants,
    )


def _token_blocks(num_tokens: int, num_kv_heads: int, num_q_heads: int, head_dim: int) -> tuple[int, int, int]:
    """Tokens and heads of a program of `_write_tokens_kernel`, and its warps.

    A thread holds 16 bytes of each half of a head's row. Small batches are spread over single warps; large ones reuse
    a token's rows of cos and sin for several heads.
    """
    small = num_tokens * (num_kv_heads + num_q_heads) <= 16384
    num_warps = 1 if small else 4
    block_tokens = num_warps * 32 * 8 * 2 // triton.next_power_of_2(head_dim)
    return block_tokens, 1 if small else math.gcd(num_kv_heads, 4), num_warps


def _page_blocks(layout: PageLayout, num_tokens: int, num_kv_heads: int) -> tuple[int, int]:
    """Heads of a program of `_write_pages_kernel`, and its warps.

    Neighbouring heads of a page share rows of cos and sin in the L1 cache, once there are programs enough for every SM.
    """
    elements = layout.page_size * triton.next_power_of_2(layout.head_dim)
    if num_tokens * num_kv_heads >= 8192 * layout.page_size:
        return math.gcd(num_kv_heads, 4), min(16, max(4, elements // 1024))
    return 1, min(16, max(4, elements // 2048))


def dequantise_pages(
    cache: torch.Tensor,
    layout: PageLayout,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    out_cache: torch.Tensor,
    out_layout: PageLayout,
    out_block_tables: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    residual_slots: torch.Tensor | None = None,
    flushed_lens: torch.Tensor | None = None,
    max_context_len: int | None = None,
    check: bool = True,
) -> None:
    """Copy the context of sequences from a quantised cache to pages of plain numbers, for prefill over it.

    Args:
        cache, layout: uint8 [num_pages, num_kv_heads, page_bytes] of fp8, int8, int4 or int2.
        block_tables: int32 [num_seqs, max_pages].
        context_lens: int32 [num_seqs], tokens of each sequence to copy. Nothing is written behind them.
        out_cache, out_layout: a cache of bfloat16, float16 or float32 with the same heads, head size and page size.
        out_block_tables: int32 [num_seqs, max_pages or more]: the pages to write to.
        residual, residual_slots, flushed_lens: int4 and int2: where tokens from flushed_len on stand.
        max_context_len: a bound on context_lens known on the host; keeps the launch as small as the contexts.
        check: as in `write_kv`.

    Raises:
        ValueError: as `write_kv`.
    """
    if check:
        _check_dequantise(locals())
    max_pages = block_tables.shape[1]
    if max_context_len is not None:
        max_pages = min(max_pages, triton.cdiv(max_context_len, layout.page_size))
    num_seqs, num_kv_heads = block_tables.shape[0], cache.shape[1]
    if num_seqs * max_pages == 0:
        return
    _dequantise_kernel[(num_seqs * max_pages * num_kv_heads,)](
        cache.view(torch.int16),
        cache.view(torch.float16),
        block_tables,
        block_tables.stride(0),
        context_lens,
        residual,
        residual_slots,
        flushed_lens,
        out_cache.view(out_layout.word_dtype),
        out_block_tables,
        out_block_tables.stride(0),
        max_pages,
        num_kv_heads,
        KV_DTYPE=layout.kv_dtype,
        BITS=layout.bits,
        RESIDUAL_SIZE=layout.residual_size,
        num_warps=4 if layout.page_size * layout.head_dim <= 8192 else 8,
        num_stages=1,
        enable_fp_fusion=False,
        **_page_constants(layout),
    )


def _check_sequences(block_tables, query_start, seq_lens, num_seqs, device) -> None:
    int32 = (torch.int32,)
    checks.tensor("block_tables", block_tables, shape=(num_seqs, None), dtypes=int32, device=device)
    checks.tensor("query_start", query_start, shape=(num_seqs + 1,), dtypes=int32, device=device, contiguous=True)
    checks.tensor("seq_lens", seq_lens, shape=(num_seqs,), dtypes=int32, device=device, contiguous=True)


def _require(arguments: dict, names: tuple[str, ...], reason: str) -> None:
    for name in names:
        if arguments[name] is None:
            raise ValueError(f"{name} is None; {reason}")


def _check_write(arguments: dict) -> None:
    """Arguments of write_kv, whatever the format."""
    a = SimpleNamespace(**arguments)
    checks.tensor("key", a.key, shape=(None, None, a.layout.head_dim), dtypes=FLOATS, device=a.key.device)
    device, dtype = a.key.device, (a.key.dtype,)
    checks.tensor("value", a.value, shape=tuple(a.key.shape), dtypes=dtype, device=device)
    checks.cache(a.cache, a.layout, a.key.shape[1], device)
    if a.cos is None:
        for name in ("sin", "query", "rotated_key"):
            if arguments[name] is not None:
                raise ValueError(f"{name} is given without cos; it must come with cos and sin, which rotate it")
    else:
        _require(arguments, ("sin",), "it must come with cos")
        if a.query is not None or not a.layout.is_low_bit:
            _require(arguments, ("positions",), "RoPE needs the position of each token")
        _check_rope(a, device, dtype)
    if a.layout.is_low_bit:
        _require(
            arguments,
            ("block_tables", "query_start", "seq_lens", "residual", "residual_slots", "flushed_lens", "committed_lens"),
            f"{a.layout.kv_dtype} needs it",
        )
        _check_low_bit(a, device, dtype)
        return
    _require(arguments, ("slots",), f"{a.layout.kv_dtype} needs it; see slot_mapping")
    checks.tensor("slots", a.slots, shape=a.key.shape[:1], dtypes=(torch.int64,), device=device, contiguous=True)
    size = a.cache.shape[0] * a.layout.page_size
    outside = (a.slots < -1) | (a.slots >= size)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(f"slots[{row}] is {int(a.slots[row])}; it must be -1 or a slot of the cache, 0 to {size - 1}")


def _check_rope(a: SimpleNamespace, device: torch.device, dtype: tuple[torch.dtype]) -> None:
    num_tokens, num_kv_heads, head_dim = a.key.shape
    float32 = (torch.float32,)
    checks.tensor("cos", a.cos, shape=(None, None), dtypes=float32, device=device, contiguous=True)
    checks.tensor("sin", a.sin, shape=tuple(a.cos.shape), dtypes=float32, device=device, contiguous=True)
    if not 0 < 2 * a.cos.shape[1] <= head_dim:
        raise ValueError(
            f"cos has {a.cos.shape[1]} columns; it must have 1 to {head_dim // 2}, half of the rotary channels"
        )
    if a.rotated_key is not None:
        checks.tensor("rotated_key", a.rotated_key, shape=tuple(a.key.shape), dtypes=dtype, device=device)
    if a.query is not None:
        checks.tensor("query", a.query, shape=(num_tokens, None, head_dim), dtypes=FLOATS, device=device)
        checks.head_ratio(a.query.shape[1], num_kv_heads)
    if a.positions is not None:
        checks.tensor(
            "positions", a.positions, shape=(num_tokens,), dtypes=(torch.int64,), device=device, contiguous=True
        )
        outside = (a.positions < 0) | (a.positions >= a.cos.shape[0])
        if outside.any():
            row = int(outside.nonzero()[0])
            raise ValueError(f"positions[{row}] is {int(a.positions[row])}; cos has rows 0 to {a.cos.shape[0] - 1}")


def _check_low_bit(a: SimpleNamespace, device: torch.device, dtype: tuple[torch.dtype]) -> None:
    """The residual-window protocol's arguments; reads lengths from the GPU."""
    num_seqs, layout = a.seq_lens.shape[0], a.layout
    _check_sequences(a.block_tables, a.query_start, a.seq_lens, num_seqs, device)
    _check_residual(a, num_seqs, device, dtype)
    checks.tensor(
        "committed_lens", a.committed_lens, shape=(num_seqs,), dtypes=(torch.int32,), device=device, contiguous=True
    )
    checks.block_tables_and_lengths(a.block_tables, a.seq_lens, a.query_start, a.cache.shape[0], layout.page_size)
    if int(a.query_start[-1]) > a.key.shape[0]:
        raise ValueError(f"query_start ends at {int(a.query_start[-1])}; key has {a.key.shape[0]} tokens")
    if a.cos is not None and num_seqs and int(a.seq_lens.max()) > a.cos.shape[0]:
        raise ValueError(f"seq_lens has {int(a.seq_lens.max())}; cos has rows for {a.cos.shape[0]} positions")
    contexts = a.seq_lens - a.query_start.diff()
    columns = zip(*(x.tolist() for x in (contexts, a.seq_lens, a.flushed_lens, a.committed_lens)), strict=True)
    for b, (context_len, seq_len, flushed_len, committed_len) in enumerate(columns):
        if context_len == seq_len:
            continue
        if flushed_len % layout.page_size or not context_len - layout.residual_size <= flushed_len <= context_len:
            raise ValueError(
                f"flushed_lens[{b}] is {flushed_len}; it must be a multiple of {layout.page_size}, at most the "
                f"{context_len} tokens of the context and at most {layout.residual_size} below them"
            )
        if not max(context_len, seq_len - MAX_QUERY_LEN) <= committed_len <= seq_len:
            raise ValueError(
                f"committed_lens[{b}] is {committed_len}; it must lie between the context's {context_len} tokens and "
                f"seq_lens[{b}] = {seq_len}, at most {MAX_QUERY_LEN} below the latter"
            )
    used = a.residual_slots[a.query_start.diff() > 0]
    if len(used) != len(used.unique()):
        raise ValueError(f"residual_slots is {used.tolist()}; it must be distinct for sequences with new tokens")


def _check_residual(a: SimpleNamespace, num_seqs: int, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    shape = (None, a.cache.shape[1], 2, a.layout.residual_size, a.layout.head_dim)
    checks.tensor("residual", a.residual, shape=shape, dtypes=dtypes, device=device, contiguous=True)
    for name in ("residual_slots", "flushed_lens"):
        checks.tensor(name, getattr(a, name), shape=(num_seqs,), dtypes=(torch.int32,), device=device, contiguous=True)
    num_slots = a.residual.shape[0]
    outside = (a.residual_slots < 0) | (a.residual_slots >= num_slots)
    if outside.any():
        b = int(outside.nonzero()[0])
        raise ValueError(f"residual_slots[{b}] is {int(a.residual_slots[b])}; it must be 0 to {num_slots - 1}")


def _check_dequantise(arguments: dict) -> None:
    a = SimpleNamespace(**arguments)
    if a.layout.is_float or not a.out_layout.is_float:
        raise ValueError(
            f"layout is {a.layout.kv_dtype} and out_layout {a.out_layout.kv_dtype}; they must be a quantised format "
            f"and one of floating-point words"
        )
    if (a.layout.head_dim, a.layout.page_size) != (a.out_layout.head_dim, a.out_layout.page_size):
        raise ValueError(f"out_layout is {a.out_layout}; it must have the head size and page size of {a.layout}")
    device, num_seqs = a.cache.device, a.block_tables.shape[0]
    checks.cache(a.cache, a.layout, None, device)
    checks.cache(a.out_cache, a.out_layout, a.cache.shape[1], device)
    int32 = (torch.int32,)
    checks.tensor("context_lens", a.context_lens, shape=(num_seqs,), dtypes=int32, device=device, contiguous=True)
    no_new_tokens = torch.zeros(num_seqs + 1, dtype=torch.int32, device=device)
    for name, num_pages in (("block_tables", a.cache.shape[0]), ("out_block_tables", a.out_cache.shape[0])):
        table = arguments[name]
        checks.tensor(name, table, shape=(num_seqs, None), dtypes=int32, device=device)
        checks.block_tables_and_lengths(table, a.context_lens, no_new_tokens, num_pages, a.layout.page_size)
    if a.layout.is_low_bit:
        names = ("residual", "residual_slots", "flushed_lens")
        _require(arguments, names, f"{a.layout.kv_dtype} needs it")
        _check_residual(a, num_seqs, device, FLOATS)
