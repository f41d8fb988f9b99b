"""What the decode kernel computes with: packed planes as tensor-core operands, and approximate functions.

A plane of a packed word (`kernels.pages`), masked out, *is* a float16 subnormal: code · 2^-24, times a power of two
that is known when compiling. Tensor cores multiply subnormals exactly, so one AND for two codes is all that
dequantisation costs.
"""

import triton
import triton.language as tl

from kernels.interpreting import INTERPRETING

USE_ASM = tl.constexpr(not INTERPRETING)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp2(x):
    """2^x, subnormal results flushed to zero."""
    if USE_ASM:
        y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        y = tl.exp2(x)
    return y


@triton.jit
def log2(x):
    """log2 x."""
    if USE_ASM:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        y = tl.log2(x)
    return y


@triton.jit
def reciprocal(x):
    """1 / x."""
    if USE_ASM:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        y = 1.0 / x
    return y


@triton.jit
def _masked_half(words, MASK: tl.constexpr, SHIFT: tl.constexpr):
    """(word >> SHIFT) & MASK of int16 words, read as float16: a subnormal, code · 2^-24 · (MASK's lowest bit)."""
    if USE_ASM:
        # Two words in a register: the bits that cross from the upper word lie outside MASK.
        PAIR: tl.constexpr = MASK * 65537
        if SHIFT == 0:
            x = tl.inline_asm_elementwise(f"and.b32 $0, $1, {PAIR};", "=r,r", [words], tl.float16, True, 2)
        else:
            x = tl.inline_asm_elementwise(
                f"{{.reg .b32 t; shr.b32 t, $1, {SHIFT}; and.b32 $0, t, {PAIR};}}",
                "=r,r",
                [words],
                tl.float16,
                True,
                2,
            )
    else:
        x = ((words.to(tl.int32) >> SHIFT) & MASK).to(tl.int16).to(tl.float16, bitcast=True)
    return x


@triton.jit
def plane(words, j: tl.constexpr, FORMAT: tl.constexpr):
    """Plane j of a tile of words as matrix operands: the values themselves, or codes · 2^(shift − 24) for integers."""
    if FORMAT == "int4":
        x = _masked_half(words, 0xF << 4 * (j % 2), 8 * (j // 2))
    elif FORMAT == "int2":
        x = _masked_half(words, 0x3 << 2 * (j % 4), 8 * (j // 4))
    elif FORMAT == "int8":
        if USE_ASM and j == 1:
            x = tl.inline_asm_elementwise("prmt.b32 $0, $1, 0, 0x4341;", "=r,r", [words], tl.float16, True, 2)
        else:
            x = _masked_half(words, 0xFF, 8 * j)
        x = x - 7.62939453125e-06  # 128 · 2^-24: offset binary to signed
    elif FORMAT == "fp8":
        if USE_ASM:
            # Bytes lo0 hi0 lo1 hi1 of two words: gather the plane's two bytes, then convert both at once.
            x = tl.inline_asm_elementwise(
                f"{{.reg .b32 t; .reg .b16 a, b; prmt.b32 t, $1, 0, {0x4420 if j == 0 else 0x4431};"
                " mov.b32 {a, b}, t; cvt.rn.f16x2.e4m3x2 $0, a;}",
                "=r,r",
                [words],
                tl.float16,
                True,
                2,
            )
        else:
            # e4m3's exponent and mantissa, put at float16's, read 2^-8 of the value, subnormals included.
            byte = words.to(tl.int32) >> (8 * j)
            half = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
            x = (half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0).to(tl.float16)
    else:
        x = words
    return x


@triton.constexpr_function
def shift(j, fmt):
    """Bit at which plane j's code stands in its masked half."""
    return 4 * (j % 2) if fmt == "int4" else 2 * (j % 4) if fmt == "int2" else 0


@triton.jit
def columns_of(x, N: tl.constexpr, COLUMNS: tl.constexpr):
    """The columns of a tile [N, COLUMNS], 4 or 8 of them."""
    if COLUMNS == 4:
        even, odd = tl.split(tl.reshape(x, [N, 2, 2]))
        c0, c2 = tl.split(even)
        c1, c3 = tl.split(odd)
        columns = (c0, c1, c2, c3)
    else:
        even, odd = tl.split(tl.reshape(x, [N, 4, 2]))
        c0, c2, c4, c6 = columns_of(even, N, 4)
        c1, c3, c5, c7 = columns_of(odd, N, 4)
        columns = (c0, c1, c2, c3, c4, c5, c6, c7)
    return columns


@triton.jit
def soft_cap_of(x, cap):
    """cap · tanh(x / cap)."""
    return cap - 2.0 * cap / (1.0 + tl.exp2(x * (2.0 * LOG2_E / cap)))
