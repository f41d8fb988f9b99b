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

Quantising kernels hold neighbouring channels in pairs, as they stand in memory: a 16-bit pair is one register, and one
instruction finds the extremes of both. Launches disable the fusing of multiplications and additions: a fused one rounds
once, the specification twice except where a kernel says `fma`.
"""

import functools
import math
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl

from kernels import checks
from kernels.interpreting import INTERPRETING
from kernels.launching import Launcher
from kernels.pages import MAX_QUERY_LEN, PAGE_SIZES, PageLayout

# Of a thread of `_write_pages_kernel`: 16 warps on an SM. The compiler would take more, to no purpose.
MAX_REGISTERS = 128

# Tokens of K for which such a thread holds cos and sin at a time.
KEY_CHUNK = 4

FLOATS = (torch.bfloat16, torch.float16, torch.float32)

# 1.5 · 2^23: adding it leaves round-half-even(x) in the low bits of the float32.
_ROUND = tl.constexpr(12582912.0)
_ROUND_FLOAT64 = tl.constexpr(1.5 * 2.0**52)
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
    """float32 in [2^-24, 65504] to the least fp16 at or above it."""
    if _INTERPRETING:
        nearest = x.to(tl.float16)
        above = (nearest.to(tl.int16, bitcast=True) + 1).to(tl.float16, bitcast=True)
        rounded = tl.where(nearest.to(tl.float32) < x, above, nearest)
    else:
        rounded = tl.inline_asm_elementwise("cvt.rp.f16.f32 $0, $1;", "=h,f", [x], tl.float16, True, 1)
    return rounded


@triton.jit
def _round_down_fp16(x):
    """float32 within ±65504 to the largest fp16 at or below it."""
    if _INTERPRETING:
        nearest = x.to(tl.float16)
        bits = nearest.to(tl.int16, bitcast=True)
        below = tl.where(bits < 0, bits + 1, bits - 1).to(tl.float16, bitcast=True)
        rounded = tl.where(nearest.to(tl.float32) > x, below, nearest)
    else:
        rounded = tl.inline_asm_elementwise("cvt.rm.f16.f32 $0, $1;", "=h,f", [x], tl.float16, True, 1)
    return rounded


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
def _pairs(ptr):
    """A pointer to numbers as one to pairs of neighbours: int32 for 16-bit numbers, int64 for float32."""
    if ptr.dtype.element_ty.primitive_bitwidth == 16:
        pairs = ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    else:
        pairs = ptr.to(tl.pointer_type(tl.int64), bitcast=True)
    return pairs


@triton.jit
def _unpack(pair, dtype: tl.constexpr):
    """The two numbers of a pair, float32."""
    if dtype == tl.bfloat16:
        low = (pair << 16).to(tl.float32, bitcast=True)
        high = (pair & -65536).to(tl.float32, bitcast=True)
    elif dtype == tl.float16:
        low = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        low = pair.to(tl.int32).to(tl.float32, bitcast=True)
        high = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def _pack(low, high, dtype: tl.constexpr):
    """Two float32 rounded to a pair of `dtype`."""
    if dtype == tl.float32:
        pair = low.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        pair |= high.to(tl.int32, bitcast=True).to(tl.int64) << 32
    elif _INTERPRETING:
        pair = low.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        pair |= high.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) << 16
    elif dtype == tl.bfloat16:
        pair = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], tl.int32, True, 1)
    else:
        pair = tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], tl.int32, True, 1)
    return pair


@triton.jit
def _min_bf16x2(a, b):
    return tl.inline_asm_elementwise("min.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def _max_bf16x2(a, b):
    return tl.inline_asm_elementwise("max.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def _min_f16x2(a, b):
    return tl.inline_asm_elementwise("min.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def _max_f16x2(a, b):
    return tl.inline_asm_elementwise("max.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def _lesser(a, b, dtype: tl.constexpr):
    """The lesser numbers of pairs."""
    if _INTERPRETING or dtype == tl.float32:
        a_low, a_high = _unpack(a, dtype)
        b_low, b_high = _unpack(b, dtype)
        least = _pack(tl.minimum(a_low, b_low), tl.minimum(a_high, b_high), dtype)
    elif dtype == tl.bfloat16:
        least = _min_bf16x2(a, b)
    else:
        least = _min_f16x2(a, b)
    return least


@triton.jit
def _greater(a, b, dtype: tl.constexpr):
    """The greater numbers of pairs."""
    if _INTERPRETING or dtype == tl.float32:
        a_low, a_high = _unpack(a, dtype)
        b_low, b_high = _unpack(b, dtype)
        greatest = _pack(tl.maximum(a_low, b_low), tl.maximum(a_high, b_high), dtype)
    elif dtype == tl.bfloat16:
        greatest = _max_bf16x2(a, b)
    else:
        greatest = _max_f16x2(a, b)
    return greatest


@triton.jit
def _range_bf16x2(a_min, a_max, b_min, b_max):
    return _min_bf16x2(a_min, b_min), _max_bf16x2(a_max, b_max)


@triton.jit
def _range_f16x2(a_min, a_max, b_min, b_max):
    return _min_f16x2(a_min, b_min), _max_f16x2(a_max, b_max)


@triton.jit
def _two_ranges_bf16x2(a_min, a_max, c_min, c_max, b_min, b_max, d_min, d_max):
    return _min_bf16x2(a_min, b_min), _max_bf16x2(a_max, b_max), _min_bf16x2(c_min, d_min), _max_bf16x2(c_max, d_max)


@triton.jit
def _two_ranges_f16x2(a_min, a_max, c_min, c_max, b_min, b_max, d_min, d_max):
    return _min_f16x2(a_min, b_min), _max_f16x2(a_max, b_max), _min_f16x2(c_min, d_min), _max_f16x2(c_max, d_max)


@triton.jit
def _range(smallest, largest, axis: tl.constexpr, dtype: tl.constexpr):
    """The least of `smallest` and the greatest of `largest` along an axis, pairs."""
    if _INTERPRETING or dtype == tl.float32:
        low, high = _unpack(smallest, dtype)
        smallest = _pack(tl.min(low, axis), tl.min(high, axis), dtype)
        low, high = _unpack(largest, dtype)
        largest = _pack(tl.max(low, axis), tl.max(high, axis), dtype)
    elif dtype == tl.bfloat16:
        smallest, largest = tl.reduce((smallest, largest), axis, _range_bf16x2)
    else:
        smallest, largest = tl.reduce((smallest, largest), axis, _range_f16x2)
    return smallest, largest


@triton.jit
def _two_ranges(a_min, a_max, b_min, b_max, axis: tl.constexpr, dtype: tl.constexpr):
    """`_range` of two tensors: warps exchange both at once."""
    if _INTERPRETING or dtype == tl.float32:
        a_min, a_max = _range(a_min, a_max, axis, dtype)
        b_min, b_max = _range(b_min, b_max, axis, dtype)
    elif dtype == tl.bfloat16:
        a_min, a_max, b_min, b_max = tl.reduce((a_min, a_max, b_min, b_max), axis, _two_ranges_bf16x2)
    else:
        a_min, a_max, b_min, b_max = tl.reduce((a_min, a_max, b_min, b_max), axis, _two_ranges_f16x2)
    return a_min, a_max, b_min, b_max


@triton.jit
def _affine(smallest, largest, LEVELS: tl.constexpr):
    """Range of a run, float32, to fp16 scale, fp16 minimum, and both for use: float32 reciprocal and minimum."""
    minimum = _round_down_fp16(smallest + 0.0)  # never -0
    start = minimum.to(tl.float32)
    scale = _round_up_fp16(tl.maximum((largest - start) * (1 / LEVELS), _LEAST_SCALE))
    return scale, minimum, _reciprocal(scale), start


@triton.jit
def _affine_code(x, start, reciprocal):
    """Codes as `_rounded_product` has them. Nothing clips: minimum and scale enclose the range."""
    return _rounded_product(x - start, reciprocal, 0)


@triton.jit
def _join_words(low, high):
    """The low halves of two int32 as one."""
    return (low & 0xFFFF) | (high << 16)


@triton.jit
def _join_fp16(low, high):
    return _join_words(low.to(tl.int16, bitcast=True).to(tl.int32), high.to(tl.int16, bitcast=True).to(tl.int32))


@triton.jit
def _channel_scales(smallest, largest, dtype: tl.constexpr, LEVELS: tl.constexpr):
    """Ranges of channels, pairs [pairs, heads], to fp16 scales and minima in pairs and to what `_codes` needs.

    That is minimum and reciprocal of the pairs' low, then of their high channels, [pairs, 1, heads, 1].
    """
    min_low, min_high = _unpack(smallest, dtype)
    max_low, max_high = _unpack(largest, dtype)
    scale_low, minimum_low, r_low, start_low = _affine(min_low, max_low, LEVELS)
    scale_high, minimum_high, r_high, start_high = _affine(min_high, max_high, LEVELS)
    scales = _join_fp16(scale_low, scale_high)
    minima = _join_fp16(minimum_low, minimum_high)
    low = (start_low[:, None, :, None], r_low[:, None, :, None])
    return scales, minima, low, (start_high[:, None, :, None], r_high[:, None, :, None])


@triton.jit
def _codes(x, dtype: tl.constexpr, low_scales, high_scales):
    """Codes of pairs, those of the low numbers and those of the high ones, as `_affine_code` has them."""
    low, high = _unpack(x, dtype)
    return _affine_code(low, low_scales[0], low_scales[1]), _affine_code(high, high_scales[0], high_scales[1])


@triton.jit
def _load_pairs(pointers, real, PADDED: tl.constexpr):
    if PADDED:
        x = tl.load(pointers, real, other=0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def _rotate_pairs(first, second, cos, sin, dtype: tl.constexpr):
    """RoPE of pairs of channels and of the ones half a head behind them; cos and sin are pairs too."""
    cos_low, cos_high = _unpack(cos, tl.float32)
    sin_low, sin_high = _unpack(sin, tl.float32)
    a_low, a_high = _unpack(first, dtype)
    b_low, b_high = _unpack(second, dtype)
    first = _pack(a_low * cos_low - b_low * sin_low, a_high * cos_high - b_high * sin_high, dtype)
    return first, _pack(b_low * cos_low + a_low * sin_low, b_high * cos_high + a_high * sin_high, dtype)


@triton.jit
def _max_over_row(x, dtype: tl.constexpr):
    """The greatest magnitude of pairs [tokens, pairs] along a row, float32."""
    if _INTERPRETING or dtype == tl.float32:
        low, high = _unpack(x, dtype)
        largest = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 1)
    else:
        x = x & 0x7FFF7FFF  # magnitudes
        if dtype == tl.bfloat16:
            pair = tl.reduce(x, 1, _max_bf16x2)
        else:
            pair = tl.reduce(x, 1, _max_f16x2)
        low, high = _unpack(pair, dtype)
        largest = tl.maximum(low, high)
    return largest


@triton.jit
def _rounded_product(x, factor, OFFSET: tl.constexpr):
    """x · factor + OFFSET rounded once to an integer, in the low bits of an int32 whose upper 16 are of no use."""
    if _INTERPRETING:
        # Its fma rounds twice. In float64 the product is exact.
        shifted = x.to(tl.float64) * factor.to(tl.float64) + (_ROUND_FLOAT64 + OFFSET)
        rounded = (shifted - _ROUND_FLOAT64).to(tl.int32)
    else:
        rounded = tl.fma(x, factor, _ROUND + OFFSET).to(tl.int32, bitcast=True)
    return rounded


@triton.jit
def _quantise_token(first, second, dtype: tl.constexpr, KV_DTYPE: tl.constexpr):
    """Halves of a head, pairs [tokens, pairs], to pairs of words and fp16 scales [tokens] of fp8 or int8."""
    LARGEST: tl.constexpr = 448.0 if KV_DTYPE == "fp8" else 127.0
    absmax = tl.maximum(_max_over_row(first, dtype), _max_over_row(second, dtype))
    scale = _round_up_fp16(tl.minimum(tl.maximum(absmax * (1 / LARGEST), _LEAST_SCALE), _FP16_MAX))
    reciprocal = _reciprocal(scale)[:, None]
    a_low, a_high = _unpack(first, dtype)
    b_low, b_high = _unpack(second, dtype)
    if KV_DTYPE == "int8":
        a_low, a_high = _rounded_product(a_low, reciprocal, 128), _rounded_product(a_high, reciprocal, 128)
        b_low, b_high = _rounded_product(b_low, reciprocal, 128), _rounded_product(b_high, reciprocal, 128)
        words = _join_words(a_low + (b_low << 8), a_high + (b_high << 8))
    elif _INTERPRETING:
        low = _e4m3_code(a_low * reciprocal) | (_e4m3_code(b_low * reciprocal) << 8)
        words = low | (_e4m3_code(a_high * reciprocal) << 16) | (_e4m3_code(b_high * reciprocal) << 24)
    else:
        words = tl.inline_asm_elementwise(
            """
            {
                .reg .b16 low, high;
                cvt.rn.satfinite.e4m3x2.f32 low, $3, $1;
                cvt.rn.satfinite.e4m3x2.f32 high, $4, $2;
                mov.b32 $0, {low, high};
            }
            """,
            "=r,f,f,f,f",
            [a_low * reciprocal, a_high * reciprocal, b_low * reciprocal, b_high * reciprocal],
            tl.int32,
            True,
            1,
        )
    return words, scale


@triton.jit
def _load_run(rows, mask, START: tl.constexpr, LENGTH: tl.constexpr):
    """Channels (or pairs) [START, START + LENGTH) of the rows that pointers [tokens] point at.

    Behind LENGTH, up to a power of two, there are zeros; a masked row is anything.
    """
    channel = tl.arange(0, triton.next_power_of_2(LENGTH))
    if triton.next_power_of_2(LENGTH) > LENGTH:
        run = tl.load(rows[:, None] + (START + channel), mask[:, None] & (channel < LENGTH), other=0)
    else:
        run = tl.load(rows[:, None] + (START + channel), mask[:, None])
    return run


@triton.jit
def _store_run(rows, x, mask, START: tl.constexpr, LENGTH: tl.constexpr):
    channel = tl.arange(0, triton.next_power_of_2(LENGTH))
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
def _rotate_query(query, stride_h, cos, sin, live, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr):
    """Rotate HEADS heads of some tokens in place, from pointers [tokens] to them and to their rows of cos and sin.

    All is loaded before anything is stored, which gives memory much to do at once.
    """
    firsts = ()
    seconds = ()
    for i in tl.static_range(HEADS):
        firsts = firsts + (_load_run(query + i * stride_h, live, 0, HALF),)
        seconds = seconds + (_load_run(query + i * stride_h, live, HALF, HALF),)
    cos = _load_run(cos, live, 0, HALF)
    sin = _load_run(sin, live, 0, HALF)
    for i in tl.static_range(HEADS):
        first, second = _rotate(firsts[i], seconds[i], cos, sin)
        _store_run(query + i * stride_h, first, live, 0, HALF)
        _store_run(query + i * stride_h, second, live, HALF, HALF)


@triton.jit(do_not_specialize=["num_tokens"])
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
    SCALE_OFFSET: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """Write K and V of BLOCK_TOKENS tokens and BLOCK_HEADS heads, or rotate so many heads of the query."""
    IS_FLOAT: tl.constexpr = KV_DTYPE == "float"
    WORDS: tl.constexpr = HEAD_DIM if IS_FLOAT else HEAD_DIM // 2
    # A quantised word holds channels w and w + D/2. A partial RoPE pairs other channels, so it goes through memory.
    STAGED: tl.constexpr = not IS_FLOAT and HALF > 0 and 2 * HALF < HEAD_DIM
    groups = num_heads // BLOCK_HEADS
    head_start = (tl.program_id(0) % groups) * BLOCK_HEADS
    rows = (tl.program_id(0) // groups) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    slots = tl.load(slots_ptr + rows, rows < num_tokens, other=-1).to(tl.int64)
    live = slots >= 0
    rows = rows.to(tl.int64)
    if HALF > 0:
        positions = tl.load(positions_ptr + rows, live, other=0).to(tl.int64)

    if head_start >= num_kv_heads:
        if query_ptr is not None:
            head_start -= num_kv_heads
            _rotate_query(
                query_ptr + rows * query_stride_t + head_start.to(tl.int64) * query_stride_h,
                query_stride_h,
                cos_ptr + positions * HALF,
                sin_ptr + positions * HALF,
                live,
                HEAD_DIM,
                HALF,
                BLOCK_HEADS,
            )
    else:
        cos = cos_ptr
        sin = sin_ptr
        IN_PAIRS: tl.constexpr = not IS_FLOAT and not STAGED
        if HALF > 0:
            if IN_PAIRS:
                cos = _load_run(_pairs(cos_ptr) + positions * (HALF // 2), live, 0, HALF // 2)
                sin = _load_run(_pairs(sin_ptr) + positions * (HALF // 2), live, 0, HALF // 2)
            else:
                cos = _load_run(cos_ptr + positions * HALF, live, 0, HALF)
                sin = _load_run(sin_ptr + positions * HALF, live, 0, HALF)
        pages = slots // PAGE_SIZE
        offsets = slots % PAGE_SIZE
        for head in range(head_start, head_start + BLOCK_HEADS):
            key = key_ptr + rows * key_stride_t + head * key_stride_h
            value = value_ptr + rows * value_stride_t + head * value_stride_h
            rotated = rotated_ptr
            if rotated_ptr is not None:
                rotated = rotated_ptr + rows * rotated_stride_t + head * rotated_stride_h
            place = (pages * num_kv_heads + head) * PAGE_WORDS
            words = words_ptr + place + offsets * WORDS
            if IS_FLOAT:
                _write_floats(key, value, rotated, words, cos, sin, live, HEAD_DIM, HALF, PAGE_SIZE * HEAD_DIM)
            else:
                if STAGED:
                    _rotate_rows(key, rotated, cos, sin, live, HEAD_DIM, HALF)
                    tl.debug_barrier()
                    key = rotated
                scales = scales_ptr + place + SCALE_OFFSET + offsets  # words are 16 bits too
                ROTATES: tl.constexpr = HALF > 0 and not STAGED
                _write_quantised(
                    key, value, rotated, words, scales, cos, sin, live, KV_DTYPE, HEAD_DIM, PAGE_SIZE, ROTATES
                )


@triton.jit
def _write_floats(
    key,
    value,
    rotated,
    words,
    cos,
    sin,
    live,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    VALUE_WORDS: tl.constexpr,
):
    """Rotate and store one head of some tokens, from and to pointers [tokens]; V begins VALUE_WORDS behind K."""
    PART: tl.constexpr = HALF if HALF > 0 else HEAD_DIM // 2
    first = _load_run(key, live, 0, PART)
    second = _load_run(key, live, PART, PART)
    value_first = _load_run(value, live, 0, HEAD_DIM // 2)
    value_second = _load_run(value, live, HEAD_DIM // 2, HEAD_DIM // 2)
    if HALF > 0:
        first, second = _rotate(first, second, cos, sin)
        if rotated is not None:
            _store_run(rotated, first, live, 0, PART)
            _store_run(rotated, second, live, PART, PART)
            _copy_run(key, rotated, live, 2 * PART, HEAD_DIM)
    _store_run(words, first, live, 0, PART)
    _store_run(words, second, live, PART, PART)
    _copy_run(key, words, live, 2 * PART, HEAD_DIM)
    _store_run(words + VALUE_WORDS, value_first, live, 0, HEAD_DIM // 2)
    _store_run(words + VALUE_WORDS, value_second, live, HEAD_DIM // 2, HEAD_DIM // 2)


@triton.jit
def _write_quantised(
    key,
    value,
    rotated,
    words,
    scales,
    cos,
    sin,
    live,
    KV_DTYPE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROTATES: tl.constexpr,
):
    """Rotate, quantise and store one head of some tokens, from and to pointers [tokens], pairs of channels at a time.

    cos and sin are pairs too.
    """
    dtype: tl.constexpr = key.dtype.element_ty
    PAIRS: tl.constexpr = HEAD_DIM // 4  # of half a head
    key = _pairs(key)
    value = _pairs(value)
    words = _pairs(words)
    first = _load_run(key, live, 0, PAIRS)
    second = _load_run(key, live, PAIRS, PAIRS)
    value_first = _load_run(value, live, 0, PAIRS)
    value_second = _load_run(value, live, PAIRS, PAIRS)
    if ROTATES:
        first, second = _rotate_pairs(first, second, cos, sin, dtype)
        if rotated is not None:
            _store_run(_pairs(rotated), first, live, 0, PAIRS)
            _store_run(_pairs(rotated), second, live, PAIRS, PAIRS)
    packed, scale = _quantise_token(first, second, dtype, KV_DTYPE)
    _store_run(words, packed, live, 0, PAIRS)
    tl.store(scales, scale, live)
    packed, scale = _quantise_token(value_first, value_second, dtype, KV_DTYPE)
    _store_run(words + PAGE_SIZE * PAIRS, packed, live, 0, PAIRS)
    tl.store(scales + PAGE_SIZE, scale, live)


@triton.jit
def _flush_keys(
    key,
    rotated,
    ring_ptr,
    cos_ptr,
    sin_ptr,
    words,
    scales_ptr,
    start,
    context_len,
    row_of_zero,
    head_start,
    plane_pairs,
    BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    RESIDUAL_SIZE: tl.constexpr,
    ROTATES: tl.constexpr,
    ALL_FRESH: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_WARPS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Rotate and quantise K of some heads of a page. `words` [1, 1, heads, 1], `scales_ptr` [1, heads] point at pairs.

    A thread takes few neighbouring channels, so that it has many tokens of each: what is done once per channel (range,
    scale, reciprocal) is done by few threads. It takes the tokens CHUNK by CHUNK, for which it holds cos and sin.
    """
    dtype: tl.constexpr = key[0].dtype.element_ty
    WORDS: tl.constexpr = HEAD_DIM * BITS // 16
    PAIRS: tl.constexpr = triton.next_power_of_2(WORDS // 2)
    PADDED: tl.constexpr = PAIRS > WORDS // 2
    ROWS: tl.constexpr = min(PAGE_SIZE, max(1, 64 // PAIRS) * HEAD_WARPS)
    TOKENS: tl.constexpr = min(PAGE_SIZE // ROWS, CHUNK)
    CHUNKS: tl.constexpr = PAGE_SIZE // (ROWS * TOKENS)
    SIZE: tl.constexpr = ROWS * TOKENS
    pair = tl.arange(0, PAIRS)
    place = tl.max_contiguous(pair, 2)[:, None, None, None]
    real = place < WORDS // 2
    head = tl.arange(0, HEADS)[None, None, :, None]
    # For every head, which rows of cos and sin need too, lest threads hold other ones of them than of K.
    token = _tokens_of_page(ROWS, TOKENS) + head * 0
    packed = ()
    for _chunk in tl.static_range(CHUNKS):
        packed = packed + (tl.zeros([PAIRS, ROWS, HEADS, TOKENS], tl.int32),)
    # Planes i and i + plane_pairs go together: they are the two halves of RoPE's pairs.
    for plane in range(plane_pairs):
        at = plane * (WORDS // 2) + place
        firsts = ()
        seconds = ()
        for chunk in tl.static_range(CHUNKS):
            source = at + _source(
                key, ring_ptr, 0, row_of_zero, start + chunk * SIZE, token, context_len, head_start, head,
                RESIDUAL_SIZE, HEAD_DIM, ALL_FRESH,
            )  # fmt: skip
            firsts = firsts + (_load_pairs(source, real, PADDED),)
            seconds = seconds + (_load_pairs(source + HEAD_DIM // 4, real, PADDED),)
        all_first = ()
        all_second = ()
        for chunk in tl.static_range(CHUNKS):
            first = firsts[chunk]
            second = seconds[chunk]
            if ROTATES:
                chunk_start = start + chunk * SIZE
                table = chunk_start.to(tl.int64) * (HEAD_DIM // 4)
                table_at = token * (HEAD_DIM // 4) + at
                cos = _load_pairs(_pairs(cos_ptr) + table + table_at, real, PADDED)
                sin = _load_pairs(_pairs(sin_ptr) + table + table_at, real, PADDED)
                a, b = _rotate_pairs(first, second, cos, sin, dtype)
                is_fresh = chunk_start + token >= context_len
                if ALL_FRESH:
                    first, second = a, b
                else:
                    first, second = tl.where(is_fresh, a, first), tl.where(is_fresh, b, second)
                if rotated[0] is not None:
                    target = at + _addresses(rotated, row_of_zero, chunk_start, token, head_start, head)
                    if ALL_FRESH and not PADDED:
                        tl.store(target, first)
                        tl.store(target + HEAD_DIM // 4, second)
                    else:
                        tl.store(target, first, real & is_fresh)
                        tl.store(target + HEAD_DIM // 4, second, real & is_fresh)
            if chunk == 0:
                first_min, first_max, second_min, second_max = first, first, second, second
            else:
                first_min, first_max = _lesser(first_min, first, dtype), _greater(first_max, first, dtype)
                second_min, second_max = _lesser(second_min, second, dtype), _greater(second_max, second, dtype)
            all_first = all_first + (first,)
            all_second = all_second + (second,)
        first_min, first_max, second_min, second_max = _two_ranges(
            first_min, first_max, second_min, second_max, 3, dtype
        )
        first_min, first_max, second_min, second_max = _two_ranges(
            first_min, first_max, second_min, second_max, 1, dtype
        )
        scales, minima, first_low, first_high = _channel_scales(first_min, first_max, dtype, 2**BITS - 1)
        second_scales, second_minima, second_low, second_high = _channel_scales(
            second_min, second_max, dtype, 2**BITS - 1
        )
        # One store of all four, for it takes an exchange between threads.
        both = tl.join(tl.join(scales, second_scales), tl.join(minima, second_minima))
        fields = tl.arange(0, 2)[None, :] * (HEAD_DIM // 2) + tl.arange(0, 2)[:, None] * (HEAD_DIM // 4)
        channels = scales_ptr + (plane * (WORDS // 2) + pair)[:, None]
        exists = (pair < WORDS // 2)[:, None, None, None]
        tl.store(channels[:, :, None, None] + fields, both, exists)
        joined = ()
        for chunk in tl.static_range(CHUNKS):
            a_low, a_high = _codes(all_first[chunk], dtype, first_low, first_high)
            b_low, b_high = _codes(all_second[chunk], dtype, second_low, second_high)
            codes = _join_words(a_low + (b_low << 8), a_high + (b_high << 8))
            joined = joined + (packed[chunk] + (codes << (plane * BITS)),)
        packed = joined
    for chunk in tl.static_range(CHUNKS):
        target = words + ((chunk * SIZE + token) * (WORDS // 2) + place)
        if PADDED:
            tl.store(target, packed[chunk], real)
        else:
            tl.store(target, packed[chunk])


@triton.jit
def _flush_values(
    source, words, scales, dtype: tl.constexpr, BITS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr
):
    """Quantise V of some tokens of a page from pointers to pairs, [1, rows, heads, tokens]."""
    WORDS: tl.constexpr = HEAD_DIM * BITS // 16
    PAIRS: tl.constexpr = triton.next_power_of_2(WORDS // 2)
    PADDED: tl.constexpr = PAIRS > WORDS // 2
    place = tl.arange(0, PAIRS)[:, None, None, None]
    real = place < WORDS // 2
    x = _load_pairs(source + place, real, PADDED)
    smallest = x
    largest = x
    planes = (x,)
    for plane in tl.static_range(1, 16 // BITS):
        x = _load_pairs(source + (plane * (WORDS // 2) + place), real, PADDED)
        smallest = _lesser(smallest, x, dtype)
        largest = _greater(largest, x, dtype)
        planes = planes + (x,)
    if PADDED:
        # Pairs of infinities.
        if dtype == tl.bfloat16:
            smallest, largest = tl.where(real, smallest, 0x7F807F80), tl.where(real, largest, -0x7F0080)
        elif dtype == tl.float16:
            smallest, largest = tl.where(real, smallest, 0x7C007C00), tl.where(real, largest, -0x3FF0400)
        else:
            infinity: tl.constexpr = 0x7F8000007F800000
            smallest, largest = (
                tl.where(real, smallest, infinity),
                tl.where(real, largest, infinity | (-0x7FFFFFFF80000000)),
            )
    smallest, largest = _range(smallest, largest, 0, dtype)
    min_low, min_high = _unpack(smallest, dtype)
    max_low, max_high = _unpack(largest, dtype)
    scale, minimum, reciprocal, start = _affine(
        tl.minimum(min_low, min_high), tl.maximum(max_low, max_high), 2**BITS - 1
    )
    packed_low = tl.zeros(x.shape, tl.int32)
    packed_high = tl.zeros(x.shape, tl.int32)
    for plane in tl.static_range(16 // BITS):
        low, high = _unpack(planes[plane], dtype)
        packed_low += _affine_code(low, start[None], reciprocal[None]) << (plane * BITS)
        packed_high += _affine_code(high, start[None], reciprocal[None]) << (plane * BITS)
    packed = _join_words(packed_low, packed_high)
    if PADDED:
        tl.store(words + place, packed, real)
    else:
        tl.store(words + place, packed)
    tl.store(scales, scale)
    tl.store(scales + PAGE_SIZE, minimum)


@triton.jit
def _tokens_of_page(ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """Numbers of ROWS · TOKENS tokens, [1, rows, 1, tokens]: threads lie along rows, tokens are a thread's own."""
    return (tl.arange(0, TOKENS) * ROWS)[None, None, None, :] + tl.arange(0, ROWS)[None, :, None, None]


@triton.jit
def _addresses(tensor, row_of_zero, start, token, head_start, head):
    """Of the rows of tokens `start` + `token` and heads `head_start` + `head`, as pointers to pairs."""
    ptr, stride_t, stride_h = tensor
    base = _pairs(ptr) + (
        (row_of_zero + start).to(tl.int64) * (stride_t // 2) + head_start.to(tl.int64) * (stride_h // 2)
    )
    return base + (token * (stride_t // 2) + head * (stride_h // 2))


@triton.jit
def _source(
    tensor,
    ring_ptr,
    ring_row,
    row_of_zero,
    start,
    token,
    context_len,
    head_start,
    head,
    RESIDUAL_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ALL_FRESH: tl.constexpr,
):
    """Addresses of tokens of a page in `tensor` (pointer and strides), of those before context_len in the ring."""
    pointers = _addresses(tensor, row_of_zero, start, token, head_start, head)
    if not ALL_FRESH:
        slots = ring_row + (start + token) % RESIDUAL_SIZE
        pointers = tl.where(start + token >= context_len, pointers, _pairs(ring_ptr) + slots * (HEAD_DIM // 2))
    return pointers


@triton.jit
def _flush_pages(
    key,
    value,
    rotated,
    ring_ptr,
    cos_ptr,
    sin_ptr,
    words_ptr,
    scales_ptr,
    page,
    head_start,
    start,
    context_len,
    row_of_zero,
    num_kv_heads,
    plane_pairs,
    BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGE_WORDS: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    RESIDUAL_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_WARPS: tl.constexpr,
    CHUNK: tl.constexpr,
    ALL_FRESH: tl.constexpr,
):
    """Quantise positions [start, start + PAGE_SIZE) of HEADS heads, with HEAD_WARPS warps for each.

    `key`, `value` and `rotated` are pointers with their strides of tokens and heads. Positions below context_len come
    from the ring at ring_ptr, the others from rows row_of_zero + position of the batch; ALL_FRESH promises the latter.
    """
    dtype: tl.constexpr = key[0].dtype.element_ty
    WORDS: tl.constexpr = HEAD_DIM * BITS // 16
    PAIRS: tl.constexpr = triton.next_power_of_2(WORDS // 2)
    ROTATES: tl.constexpr = 2 * HALF == HEAD_DIM
    # A warp's lanes lie along the pairs of words, with the vectors of K and V, and then along tokens.
    VECTOR: tl.constexpr = 2 if dtype.primitive_bitwidth == 16 else 1
    VALUE_ROWS: tl.constexpr = min(PAGE_SIZE, max(1, 64 * VECTOR // PAIRS) * HEAD_WARPS)
    VALUE_TOKENS: tl.constexpr = min(PAGE_SIZE // VALUE_ROWS, BITS // 2)
    head = tl.arange(0, HEADS)[None, None, :, None]
    place = (page.to(tl.int64) * num_kv_heads + head_start) * PAGE_WORDS
    words_ptr = _pairs(words_ptr + place) + head * (PAGE_WORDS // 2)
    scales_ptr += place + head * PAGE_WORDS + SCALE_OFFSET  # words are 16 bits too

    if HALF > 0 and not ROTATES:
        # A partial RoPE pairs channels of any two planes: rotate in memory first.
        positions = start + tl.arange(0, PAGE_SIZE)
        fresh = positions >= context_len
        cos_run = _load_run(cos_ptr + positions.to(tl.int64) * HALF, fresh, 0, HALF)
        sin_run = _load_run(sin_ptr + positions.to(tl.int64) * HALF, fresh, 0, HALF)
        rows = (row_of_zero + positions).to(tl.int64)
        for i in range(HEADS):
            from_rows = key[0] + rows * key[1] + (head_start + i).to(tl.int64) * key[2]
            to_rows = rotated[0] + rows * rotated[1] + (head_start + i).to(tl.int64) * rotated[2]
            _rotate_rows(from_rows, to_rows, cos_run, sin_run, fresh, HEAD_DIM, HALF)
        tl.debug_barrier()
        key = rotated
    _flush_keys(
        key, rotated, ring_ptr, cos_ptr, sin_ptr, words_ptr, _pairs(scales_ptr).reshape(1, HEADS), start, context_len,
        row_of_zero, head_start, plane_pairs, BITS, HEAD_DIM, PAGE_SIZE, RESIDUAL_SIZE, ROTATES, ALL_FRESH, HEADS,
        HEAD_WARPS, CHUNK,
    )  # fmt: skip
    words_ptr += PAGE_SIZE * WORDS // 2
    scales_ptr += 2 * HEAD_DIM
    v_token = _tokens_of_page(VALUE_ROWS, VALUE_TOKENS)
    for chunk in range(0, plane_pairs * (PAGE_SIZE * BITS // 8), VALUE_ROWS * VALUE_TOKENS):
        source = _source(
            value, ring_ptr, RESIDUAL_SIZE, row_of_zero, start, chunk + v_token, context_len, head_start, head,
            RESIDUAL_SIZE, HEAD_DIM, ALL_FRESH,
        )  # fmt: skip
        _flush_values(
            source,
            words_ptr + (chunk + v_token) * (WORDS // 2),
            (scales_ptr + (chunk + v_token)).reshape(VALUE_ROWS, HEADS, VALUE_TOKENS),
            dtype,
            BITS,
            HEAD_DIM,
            PAGE_SIZE,
        )


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
    """The committed page of new tokens only whose first row lies in the window: sequence, position and row, or -1s."""
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
    seq = tl.max(tl.where(found, seqs, -1), 0)
    return seq, tl.max(tl.where(found, starts, -1), 0), tl.max(tl.where(found, rows, -1), 0)


@triton.jit(do_not_specialize=["block_tables_stride", "num_seqs", "num_windows"])
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
    num_q_heads,
    plane_pairs,  # 8 / BITS, only known at run time lest the loop over it be unrolled and take too many registers
    BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGE_WORDS: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    RESIDUAL_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_WARPS: tl.constexpr,
    CHUNK: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,
    SEQS_PAD: tl.constexpr,
):
    """One head of a sequence's flush and window, HEADS heads of a page of new tokens, or some of the query."""
    key = (key_ptr, key_stride_t, key_stride_h)
    value = (value_ptr, value_stride_t, value_stride_h)
    rotated = (rotated_ptr, rotated_stride_t, rotated_stride_h)
    program = tl.program_id(0)
    window_programs = num_windows * (num_kv_heads // HEADS)
    if program < num_seqs * num_kv_heads:
        seq = program // num_kv_heads
        head = program % num_kv_heads
        start = tl.load(flushed_lens_ptr + seq)
        seq_len = tl.load(seq_lens_ptr + seq)
        query_end = tl.load(query_start_ptr + seq + 1)
        row_of_zero = query_end - seq_len  # the row of the flat batch that position 0 would have
        context_len = tl.load(query_start_ptr + seq) - row_of_zero
        if context_len < seq_len:
            next_flushed = tl.load(committed_lens_ptr + seq) // PAGE_SIZE * PAGE_SIZE
            slot = tl.load(residual_slots_ptr + seq).to(tl.int64)
            ring_ptr = residual_ptr + (slot * num_kv_heads + head) * (2 * RESIDUAL_SIZE * HEAD_DIM)
            for filled in range(
                tl.maximum(tl.minimum(next_flushed, context_len) - start + PAGE_SIZE - 1, 0) // PAGE_SIZE
            ):
                page_start = start + filled * PAGE_SIZE
                page = tl.load(block_tables_ptr + seq.to(tl.int64) * block_tables_stride + page_start // PAGE_SIZE)
                _flush_pages(
                    key, value, rotated, ring_ptr, cos_ptr, sin_ptr, words_ptr, scales_ptr, page, head, page_start,
                    context_len, row_of_zero, num_kv_heads, plane_pairs, BITS, HEAD_DIM, HALF, PAGE_SIZE, PAGE_WORDS,
                    SCALE_OFFSET, RESIDUAL_SIZE, 1, HEADS * HEAD_WARPS, CHUNK, False,
                )  # fmt: skip
            # New tokens take the slots of the tokens just flushed.
            tl.debug_barrier()
            if rotated_ptr is not None:
                rotated_ptr += head * rotated_stride_h
            _fill_ring(
                key_ptr + head * key_stride_h,
                key_stride_t,
                value_ptr + head * value_stride_h,
                value_stride_t,
                rotated_ptr,
                rotated_stride_t,
                ring_ptr,
                cos_ptr,
                sin_ptr,
                tl.maximum(next_flushed, context_len),
                seq_len,
                row_of_zero,
                HEAD_DIM,
                HALF,
                RESIDUAL_SIZE,
                16,
            )
    elif program < num_seqs * num_kv_heads + window_programs:
        program -= num_seqs * num_kv_heads
        head_start = program % (num_kv_heads // HEADS) * HEADS
        window_start = program // (num_kv_heads // HEADS) * PAGE_SIZE
        seq, start, row = _page_in_window(
            query_start_ptr, seq_lens_ptr, committed_lens_ptr, window_start, num_seqs, PAGE_SIZE, SEQS_PAD
        )
        if seq >= 0:
            page = tl.load(block_tables_ptr + seq.to(tl.int64) * block_tables_stride + start // PAGE_SIZE)
            _flush_pages(
                key, value, rotated, residual_ptr, cos_ptr, sin_ptr, words_ptr, scales_ptr, page, head_start, start,
                start, row - start, num_kv_heads, plane_pairs, BITS, HEAD_DIM, HALF, PAGE_SIZE, PAGE_WORDS,
                SCALE_OFFSET, RESIDUAL_SIZE, HEADS, HEAD_WARPS, CHUNK, True,
            )  # fmt: skip
    elif query_ptr is not None:
        program -= num_seqs * num_kv_heads + window_programs
        groups = num_q_heads // QUERY_HEADS
        rows = program // groups * QUERY_TOKENS + tl.arange(0, QUERY_TOKENS)
        live = rows < tl.load(query_start_ptr + num_seqs)
        rows = rows.to(tl.int64)
        positions = tl.load(positions_ptr + rows, live, other=0).to(tl.int64)
        _rotate_query(
            query_ptr + rows * query_stride_t + (program % groups * QUERY_HEADS).to(tl.int64) * query_stride_h,
            query_stride_h,
            cos_ptr + positions * HALF,
            sin_ptr + positions * HALF,
            live,
            HEAD_DIM,
            HALF,
            QUERY_HEADS,
        )


@triton.jit(do_not_specialize=["block_tables_stride", "num_tokens", "num_seqs"])
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
def _in_mantissa(words, MASK: tl.constexpr):
    """2^23 + (words & MASK) as float32, in one instruction; MASK has at most 16 bits."""
    if _INTERPRETING:
        number = ((words & MASK) | 0x4B000000).to(tl.float32, bitcast=True)
    else:
        mask = tl.full([], MASK, tl.int32)
        exponent = tl.full([], 0x4B000000, tl.int32)
        number = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;", "=f,r,r,r", [words, mask, exponent], tl.float32, True, 1
        )
    return number


@triton.jit
def _numbers(words, plane: tl.constexpr, KV_DTYPE: tl.constexpr, BITS: tl.constexpr):
    """One plane of pairs of words, times 2^(plane · BITS), as float32: those of the low words and of the high ones.

    e4m3 numbers come times 2^-8 instead.
    """
    if KV_DTYPE == "fp8":
        # e4m3's exponent and mantissa in the places of fp16's; the bias differs by 8.
        if plane == 0:
            pair = ((words & 0x00800080) << 8) | ((words & 0x007F007F) << 7)
        else:
            pair = (words & -0x7FFF8000) | ((words >> 1) & 0x3F803F80)
        low, high = _unpack(pair, tl.float16)
    else:
        MASK: tl.constexpr = (2**BITS - 1) << (plane * BITS)
        ZERO: tl.constexpr = 2**23 + (128 << (plane * BITS) if KV_DTYPE == "int8" else 0)
        low = _in_mantissa(words, MASK) - ZERO
        high = _in_mantissa(words >> 16, MASK) - ZERO
    return low, high


@triton.jit(
    do_not_specialize=["block_tables_stride", "out_block_tables_stride", "max_pages"],
    do_not_specialize_on_alignment=[
        "block_tables_ptr",
        "context_lens_ptr",
        "residual_slots_ptr",
        "flushed_lens_ptr",
        "out_block_tables_ptr",
    ],
)
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
    SCALE_OFFSET: tl.constexpr,
    RESIDUAL_SIZE: tl.constexpr,
    WARPS: tl.constexpr,
):
    """One page and head, to a page of plain numbers."""
    LOW_BIT: tl.constexpr = BITS < 8
    head = tl.program_id(0) % num_kv_heads
    seq = tl.program_id(0) // num_kv_heads // max_pages
    index = tl.program_id(0) // num_kv_heads % max_pages
    token = tl.arange(0, PAGE_SIZE)
    start = index * PAGE_SIZE
    page = tl.load(block_tables_ptr + seq.to(tl.int64) * block_tables_stride + index).to(tl.int64)
    out_page = tl.load(out_block_tables_ptr + seq.to(tl.int64) * out_block_tables_stride + index).to(tl.int64)
    context_len = tl.load(context_lens_ptr + seq)
    flushed_len = context_len
    if LOW_BIT:
        flushed_len = tl.load(flushed_lens_ptr + seq)
    if start < context_len:
        live = start + token < context_len
        out = out_ptr + (out_page * num_kv_heads + head) * (2 * PAGE_SIZE * HEAD_DIM)
        if start < flushed_len:
            place = (page * num_kv_heads + head) * PAGE_WORDS
            _dequantise_page(
                _pairs(words_ptr + place), scales_ptr + place + SCALE_OFFSET, out, context_len - start, KV_DTYPE, BITS,
                HEAD_DIM, PAGE_SIZE, WARPS,
            )  # fmt: skip
        elif LOW_BIT:
            slot = tl.load(residual_slots_ptr + seq).to(tl.int64)
            ring = residual_ptr + (slot * num_kv_heads + head) * (2 * RESIDUAL_SIZE * HEAD_DIM)
            ring += ((start + token) % RESIDUAL_SIZE) * HEAD_DIM
            _copy_run(ring, out + token * HEAD_DIM, live, 0, HEAD_DIM)
            out += PAGE_SIZE * HEAD_DIM
            _copy_run(ring + RESIDUAL_SIZE * HEAD_DIM, out + token * HEAD_DIM, live, 0, HEAD_DIM)


@triton.jit
def _dequantise_page(
    words,
    scales,
    out,
    num_tokens,
    KV_DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WARPS: tl.constexpr,
):
    """The first tokens of a page, from pairs of words and scales to `out`. All is loaded before anything is stored."""
    dtype: tl.constexpr = out.dtype.element_ty
    PAIRS: tl.constexpr = HEAD_DIM * BITS // 32
    PADDED: tl.constexpr = triton.next_power_of_2(PAIRS) > PAIRS
    PLANES: tl.constexpr = 16 // BITS
    # A warp's lanes lie along pairs and rows, and a thread has several tokens of its channels: [pairs, rows, tokens].
    ROWS: tl.constexpr = min(PAGE_SIZE, max(1, 128 // triton.next_power_of_2(PAIRS)) * WARPS)
    pair = tl.arange(0, triton.next_power_of_2(PAIRS))[:, None, None]
    row = tl.arange(0, ROWS)[None, :, None]
    token = row + (tl.arange(0, PAGE_SIZE // ROWS) * ROWS)[None, None, :]
    real = pair < PAIRS
    keys = _load_pairs(words + (token * PAIRS + pair), real, PADDED)
    values = _load_pairs(words + (PAGE_SIZE * PAIRS + token * PAIRS + pair), real, PADDED)
    rows = tl.arange(0, ROWS)[:, None] + (tl.arange(0, PAGE_SIZE // ROWS) * ROWS)[None, :]
    if BITS < 8:
        channels = _pairs(scales) + (pair + row * 0)
        k_scales = ()
        k_minima = ()
        for plane in tl.static_range(PLANES):
            k_scales = k_scales + (_load_pairs(channels + plane * PAIRS, real, PADDED),)
            k_minima = k_minima + (_load_pairs(channels + (HEAD_DIM // 2 + plane * PAIRS), real, PADDED),)
        v_scale = tl.load(scales + 2 * HEAD_DIM + rows).to(tl.float32)[None]
        v_min = tl.load(scales + 2 * HEAD_DIM + PAGE_SIZE + rows).to(tl.float32)[None]
    else:
        k_scale = tl.load(scales + rows).to(tl.float32)[None]
        v_scale = tl.load(scales + PAGE_SIZE + rows).to(tl.float32)[None]
    out = _pairs(out) + (token * (HEAD_DIM // 2) + pair)
    exists = (token < num_tokens) & real
    for plane in tl.static_range(PLANES):
        factor = 256.0 if KV_DTYPE == "fp8" else 2.0 ** (-plane * BITS)
        k_low, k_high = _numbers(keys, plane, KV_DTYPE, BITS)
        v_low, v_high = _numbers(values, plane, KV_DTYPE, BITS)
        if BITS < 8:
            # A product of a code and an fp16 scale is exact, so fusing changes nothing.
            low, high = _unpack(k_scales[plane], tl.float16)
            min_low, min_high = _unpack(k_minima[plane], tl.float16)
            k_low = tl.fma(k_low, low * factor, min_low)
            k_high = tl.fma(k_high, high * factor, min_high)
            v_low = tl.fma(v_low, v_scale * factor, v_min)
            v_high = tl.fma(v_high, v_scale * factor, v_min)
        else:
            k_low, k_high = k_low * (k_scale * factor), k_high * (k_scale * factor)
            v_low, v_high = v_low * (v_scale * factor), v_high * (v_scale * factor)
        tl.store(out + plane * PAIRS, _pack(k_low, k_high, dtype), exists)
        tl.store(out + (PAGE_SIZE * HEAD_DIM // 2 + plane * PAIRS), _pack(v_low, v_high, dtype), exists)


_write_tokens_launcher, _write_pages_launcher = Launcher(_write_tokens_kernel), Launcher(_write_pages_kernel)
_slot_mapping_launcher, _dequantise_launcher = Launcher(_slot_mapping_kernel), Launcher(_dequantise_kernel)


@functools.cache
def _page_constants(layout: PageLayout) -> dict[str, int]:
    """Sizes of a page in the units of the kernels."""
    return {
        "HEAD_DIM": layout.head_dim,
        "PAGE_SIZE": layout.page_size,
        "PAGE_WORDS": layout.page_bytes // layout.word_dtype.itemsize,
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
        ValueError: an argument of another type, shape, dtype or device, a page size that there is no kernel for, fewer
            rows than new tokens, and what `kernels.checks.block_tables_and_lengths` finds.
    """
    if check:
        _check_slot_mapping(block_tables, query_start, seq_lens, num_tokens, page_size, out)
    num_seqs, device = seq_lens.shape[0], block_tables.device
    if out is None:
        out = tuple(torch.empty(num_tokens, dtype=torch.int64, device=device) for _ in range(2))
    block_tokens = 32
    if num_tokens:
        _slot_mapping_launcher[(triton.cdiv(num_tokens, block_tokens),)](
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


def next_flushed_lens(
    committed_lens: torch.Tensor, page_size: int, *, out: torch.Tensor | None = None, check: bool = True
) -> torch.Tensor:
    """flushed_lens after a step, one small launch: committed_lens rounded down to whole pages, int32 [num_seqs].

    `check` looks at no contents, so it never waits for the GPU.

    Raises:
        ValueError: an argument of another type, shape, dtype or device, or a page size that there is no kernel for.
    """
    if check:
        _check_page_size(page_size)
        checks.tensors(committed_lens=committed_lens)
        device, int32 = committed_lens.device, (torch.int32,)
        checks.tensor("committed_lens", committed_lens, shape=(None,), dtypes=int32, device=device)
        if out is not None:
            checks.tensor("out", out, shape=tuple(committed_lens.shape), dtypes=int32, device=device)
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
        key, value: [num_tokens, num_kv_heads, head_dim], last dimension contiguous, both of one dtype. For quantised
            formats pairs of neighbouring channels must be aligned (even strides), in rotated_key too.
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
        ValueError: an argument of another type, shape, dtype, device or stride, one that the format needs and that is
            missing, contents outside what is said above, and what `kernels.checks.block_tables_and_lengths` finds.
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
        heads, head_warps = _page_blocks(layout, num_tokens, num_kv_heads, key.itemsize)
        num_warps = heads * head_warps
        query_heads = math.gcd(num_q_heads, 4) if num_q_heads else 1
        query_tokens = max(1, 256 * num_warps // triton.next_power_of_2(max(half, 1)))
        query_programs = triton.cdiv(num_tokens, query_tokens) * (num_q_heads // query_heads)
        programs = num_seqs * num_kv_heads + num_windows * (num_kv_heads // heads) + query_programs
        _write_pages_launcher[(programs,)](
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
            num_q_heads,
            layout.planes // 2,
            BITS=layout.bits,
            HALF=half,
            RESIDUAL_SIZE=layout.residual_size,
            HEADS=heads,
            HEAD_WARPS=head_warps,
            CHUNK=KEY_CHUNK,
            QUERY_HEADS=query_heads,
            QUERY_TOKENS=query_tokens,
            SEQS_PAD=max(128, triton.next_power_of_2(num_seqs)),
            num_warps=num_warps,
            num_stages=1,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=False,
            **constants,
        )
        return
    block_tokens, block_heads, num_warps = _token_blocks(num_tokens, num_kv_heads, num_q_heads, head_dim)
    num_heads = num_kv_heads + num_q_heads
    _write_tokens_launcher[(triton.cdiv(num_tokens, block_tokens) * (num_heads // block_heads),)](
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


def _page_blocks(layout: PageLayout, num_tokens: int, num_kv_heads: int, itemsize: int) -> tuple[int, int]:
    """Heads of a program of `_write_pages_kernel` that quantises a page of new tokens, and the warps of each head.

    Few warps a head, so that few work out a channel's scale anew: a thread has 32 registers of K at a time. Heads of a
    page share rows of cos and sin in the L1 cache. Small batches cannot fill the GPU and get the shortest path instead.
    """
    numbers = 2 * layout.page_size * triton.next_power_of_2(layout.words)
    head_warps = max(1, numbers * itemsize // 4096)
    if num_tokens * num_kv_heads < 1024 * layout.page_size:
        return 1, max(4, head_warps)
    return math.gcd(num_kv_heads, max(1, 4 // head_warps)), head_warps


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
        out_block_tables: int32 [num_seqs, max_pages or more]: the pages to write to. The columns that max_context_len
            reaches are enough.
        residual, residual_slots, flushed_lens: int4 and int2: where tokens from flushed_len on stand.
            flushed_len is at most context_len and at most residual_size below it, or anything where that is 0.
        max_context_len: a bound on context_lens known on the host; keeps the launch as small as the contexts.
        check: as in `write_kv`.

    Raises:
        ValueError: an argument of another type, shape, dtype, device or stride, one that the format needs and that is
            missing, a length beyond block_tables or max_context_len, a page in use that lies outside its cache, and
            what `kernels.checks.flushed_lengths` finds.
    """
    if check:
        _check_dequantise(locals())
    max_pages = block_tables.shape[1]
    if max_context_len is not None:
        max_pages = min(max_pages, triton.cdiv(max_context_len, layout.page_size))
    num_seqs, num_kv_heads = block_tables.shape[0], cache.shape[1]
    if num_seqs * max_pages == 0:
        return
    _dequantise_launcher[(num_seqs * max_pages * num_kv_heads,)](
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
        **_dequantise_constants(layout),
    )


@functools.cache
def _dequantise_constants(layout: PageLayout) -> dict[str, Any]:
    """What launches of `_dequantise_kernel` for a format have in common."""
    return {
        "KV_DTYPE": layout.kv_dtype,
        "BITS": layout.bits,
        "RESIDUAL_SIZE": layout.residual_size,
        "WARPS": _dequantise_warps(layout),
        "num_warps": _dequantise_warps(layout),
        "num_stages": 1,
        "enable_fp_fusion": False,
        **_page_constants(layout),
    }


def _dequantise_warps(layout: PageLayout) -> int:
    """A thread has 128 numbers: several tokens of a channel, whose scale it converts once."""
    return min(16, layout.page_size * triton.next_power_of_2(layout.head_dim) // 2048)


def _check_page_size(page_size: int) -> None:
    if not isinstance(page_size, int) or page_size not in PAGE_SIZES:
        raise ValueError(
            f"page_size is {page_size!r}; it must be {', '.join(map(str, PAGE_SIZES[:-1]))} or {PAGE_SIZES[-1]}"
        )


def _check_sequences(block_tables, query_start, seq_lens, device: torch.device) -> int:
    """The number of sequences."""
    int32 = (torch.int32,)
    checks.tensor("seq_lens", seq_lens, shape=(None,), dtypes=int32, device=device, contiguous=True)
    num_seqs = seq_lens.shape[0]
    checks.tensor("block_tables", block_tables, shape=(num_seqs, None), dtypes=int32, device=device)
    checks.tensor("query_start", query_start, shape=(num_seqs + 1,), dtypes=int32, device=device, contiguous=True)
    return num_seqs


def _check_slot_mapping(block_tables, query_start, seq_lens, num_tokens, page_size, out) -> None:
    checks.tensors(block_tables=block_tables)
    device = block_tables.device
    _check_sequences(block_tables, query_start, seq_lens, device)
    _check_page_size(page_size)
    checks.block_tables_and_lengths(block_tables, seq_lens, query_start, 2**31 - 1, page_size)
    checks.integer("num_tokens", num_tokens, int(query_start[-1]))
    if out is None:
        return
    if not isinstance(out, tuple | list) or len(out) != 2:
        size = f" of {len(out)}" if isinstance(out, tuple | list) else ""
        raise ValueError(f"out is a {type(out).__name__}{size}; it must be two tensors, of positions and of slots")
    for i, x in enumerate(out):
        checks.tensor(f"out[{i}]", x, shape=(num_tokens,), dtypes=(torch.int64,), device=device, contiguous=True)


def _require(arguments: dict, names: tuple[str, ...], reason: str) -> None:
    for name in names:
        if arguments[name] is None:
            raise ValueError(f"{name} is None; {reason}")


def _check_write(arguments: dict) -> None:
    """Arguments of write_kv, whatever the format."""
    a = SimpleNamespace(**arguments)
    checks.page_layout("layout", a.layout)
    checks.tensors(key=a.key)
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
        _check_pairs(arguments)
        _check_low_bit(a, device, dtype)
        return
    if not a.layout.is_float:
        _check_pairs(arguments)
    _require(arguments, ("slots",), f"{a.layout.kv_dtype} needs it; see slot_mapping")
    checks.tensor("slots", a.slots, shape=a.key.shape[:1], dtypes=(torch.int64,), device=device, contiguous=True)
    size = a.cache.shape[0] * a.layout.page_size
    outside = (a.slots < -1) | (a.slots >= size)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(f"slots[{row}] is {int(a.slots[row])}; it must be -1 or a slot of the cache, 0 to {size - 1}")


def _check_pairs(arguments: dict) -> None:
    """Quantising kernels read two neighbouring numbers at once."""
    for name in ("key", "value", "rotated_key", "cos", "sin"):
        x = arguments[name]
        if x is not None and (x.data_ptr() % (2 * x.itemsize) or any(stride % 2 for stride in x.stride()[:-1])):
            raise ValueError(
                f"{name} has strides {tuple(x.stride())} and begins at address {x.data_ptr()}; it must have even "
                f"strides and begin at a multiple of {2 * x.itemsize} bytes"
            )


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
    layout = a.layout
    num_seqs = _check_sequences(a.block_tables, a.query_start, a.seq_lens, device)
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
        least = max(0, context_len - layout.residual_size)
        if flushed_len % layout.page_size or not least <= flushed_len <= context_len:
            raise ValueError(
                f"flushed_lens[{b}] is {flushed_len}; it must be a multiple of {layout.page_size}, from {least} to the "
                f"{context_len} tokens of the context"
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
    ring = (a.residual, a.residual_slots, a.flushed_lens)
    checks.residual_windows(*ring, a.layout, a.cache.shape[1], num_seqs, device, dtypes)


def _check_dequantise(arguments: dict) -> None:
    a = SimpleNamespace(**arguments)
    checks.page_layout("layout", a.layout)
    checks.page_layout("out_layout", a.out_layout)
    if a.layout.is_float or not a.out_layout.is_float:
        raise ValueError(
            f"layout is {a.layout.kv_dtype} and out_layout {a.out_layout.kv_dtype}; they must be a quantised format "
            f"and one of floating-point words"
        )
    if (a.layout.head_dim, a.layout.page_size) != (a.out_layout.head_dim, a.out_layout.page_size):
        raise ValueError(f"out_layout is {a.out_layout}; it must have the head size and page size of {a.layout}")
    checks.tensors(cache=a.cache)
    device, int32, uint8 = a.cache.device, (torch.int32,), (torch.uint8,)
    shape = (None, None, a.layout.page_bytes)
    checks.tensor("cache", a.cache, shape=shape, dtypes=uint8, device=device, contiguous=True)
    shape = (None, a.cache.shape[1], a.out_layout.page_bytes)
    checks.tensor("out_cache", a.out_cache, shape=shape, dtypes=uint8, device=device, contiguous=True)
    checks.tensor("context_lens", a.context_lens, shape=(None,), dtypes=int32, device=device, contiguous=True)
    num_seqs = a.context_lens.shape[0]
    checks.tensor("block_tables", a.block_tables, shape=(num_seqs, None), dtypes=int32, device=device)
    checks.tensor("out_block_tables", a.out_block_tables, shape=(num_seqs, None), dtypes=int32, device=device)
    page_size, max_pages = a.layout.page_size, a.block_tables.shape[1]
    outside = (a.context_lens < 0) | (a.context_lens > max_pages * page_size)
    if outside.any():
        b = int(outside.nonzero()[0])
        raise ValueError(
            f"context_lens[{b}] is {int(a.context_lens[b])}; it must be 0 to the {max_pages * page_size} tokens of "
            f"block_tables"
        )
    if a.max_context_len is not None:
        checks.integer("max_context_len", a.max_context_len, int(a.context_lens.max()) if num_seqs else 0)
        max_pages = min(max_pages, triton.cdiv(a.max_context_len, page_size))
    if a.out_block_tables.shape[1] < max_pages:
        raise ValueError(
            f"out_block_tables has {a.out_block_tables.shape[1]} columns; it must have at least the {max_pages} that "
            f"block_tables has up to max_context_len"
        )
    for prefix in ("", "out_"):
        table, num_pages = arguments[f"{prefix}block_tables"][:, :max_pages], arguments[f"{prefix}cache"].shape[0]
        used = torch.arange(max_pages, device=device) * page_size < a.context_lens[:, None]
        outside = used & ((table < 0) | (table >= num_pages))
        if outside.any():
            b, j = outside.nonzero()[0].tolist()
            raise ValueError(
                f"{prefix}block_tables[{b}, {j}] is {int(table[b, j])}; it must be a page of {prefix}cache, 0 to "
                f"{num_pages - 1}"
            )
    if a.layout.is_low_bit:
        names = ("residual", "residual_slots", "flushed_lens")
        _require(arguments, names, f"{a.layout.kv_dtype} needs it")
        _check_residual(a, num_seqs, device, FLOATS)
        checks.flushed_lengths(a.flushed_lens, a.context_lens, a.layout, a.context_lens > 0)
