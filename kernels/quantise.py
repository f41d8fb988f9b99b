"""Dynamic per-token fp8 of activations as Triton kernels, alone or behind RMSNorm or the gated activation.

A matrix product whose weights and activations are both fp8 (W8A8) takes a scale per token. Making it needs a whole row
before the first element can be written, so a program holds its rows in registers and memory is passed over once; tiles
are `rms_norm`'s (`kernels.elementwise`). What is quantised is the 16-bit result of the norm or the activation, the very
bits that the kernels there store.

Meaning and rounding: `kernels.reference.quantise`, which these kernels meet to the bit where no norm or activation
comes first.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from kernels import checks
from kernels.cache import _e4m3_code
from kernels.elementwise import DTYPES, MAX_HIDDEN, _check_rms_norm, _check_silu_mul, rms_norm_tile
from kernels.interpreting import INTERPRETING
from kernels.launching import Launcher
from kernels.reference.quantise import FP8_MAX, LEAST_ABSMAX

_INTERPRETING = tl.constexpr(INTERPRETING)
_FP8_MAX = tl.constexpr(FP8_MAX)
_LEAST_ABSMAX = tl.constexpr(LEAST_ABSMAX)


@triton.jit
def _code(x):
    """float32 within ±464 to the byte of the nearest e4m3, ties to even."""
    if _INTERPRETING:
        code = _e4m3_code(x).to(tl.uint8)
    else:
        code = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return code


@triton.jit
def _store_quantised(
    parts,
    out_ptr,
    scale_ptr,
    rows,
    num_tokens,
    out_stride,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Scales of rows [ROWS, 1] held as NUM_CHUNKS tiles [ROWS, CHUNK], zeros beyond WIDTH, and their codes."""
    largest = tl.zeros([ROWS, CHUNK], tl.float32)
    for i in tl.static_range(NUM_CHUNKS):
        largest = tl.maximum(largest, tl.abs(parts[i].to(tl.float32)))
    scale = tl.div_rn(tl.maximum(tl.max(largest, axis=1, keep_dims=True), _LEAST_ABSMAX), _FP8_MAX)
    # No clamping: the largest product is 448 to within 3 ulp, and everything below 464 rounds to 448. So NaN stays NaN.
    reciprocal = tl.div_rn(tl.full([ROWS, 1], 1.0, tl.float32), scale)
    for i in tl.static_range(NUM_CHUNKS):
        cols = i * CHUNK + tl.arange(0, CHUNK)[None, :]
        mask = (rows < num_tokens) & (cols < WIDTH)
        tl.store(out_ptr + rows * out_stride + cols, _code(parts[i].to(tl.float32) * reciprocal), mask=mask)
    tl.store(scale_ptr + rows, scale, mask=rows < num_tokens)


@triton.jit(do_not_specialize=["num_tokens"])
def quantise_tokens_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    num_tokens,
    x_stride,
    out_stride,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    parts = ()
    for i in tl.static_range(NUM_CHUNKS):
        cols = i * CHUNK + tl.arange(0, CHUNK)[None, :]
        mask = (rows < num_tokens) & (cols < WIDTH)
        parts += (tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0),)
    _store_quantised(parts, out_ptr, scale_ptr, rows, num_tokens, out_stride, WIDTH, CHUNK, NUM_CHUNKS, ROWS)


@triton.jit(do_not_specialize=["num_tokens"])
def rms_norm_fp8_kernel(
    x_ptr,
    weight_ptr,
    residual_ptr,
    out_ptr,
    scale_ptr,
    num_tokens,
    x_stride,
    residual_stride,
    out_stride,
    eps,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
):
    """`rms_norm_kernel`, step by step, but for the last store."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    parts, residuals, weights, sums, normalised = (), (), (), (), ()
    for i in tl.static_range(NUM_CHUNKS):
        cols = i * CHUNK + tl.arange(0, CHUNK)[None, :]
        mask = (rows < num_tokens) & (cols < WIDTH)
        parts += (tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0),)
        if residual_ptr is not None:
            residuals += (tl.load(residual_ptr + rows * residual_stride + cols, mask=mask, other=0.0),)
        weights += (tl.load(weight_ptr + cols, mask=cols < WIDTH, other=0.0),)
    squares = tl.zeros([ROWS, CHUNK], tl.float32)
    for i in tl.static_range(NUM_CHUNKS):
        x = parts[i].to(tl.float32)
        if residual_ptr is not None:
            rounded = (x + residuals[i].to(tl.float32)).to(x_ptr.dtype.element_ty)
            sums += (rounded,)
            x = rounded.to(tl.float32)
        else:
            sums += (parts[i],)
        squares += x * x
    scale = tl.rsqrt(tl.sum(squares, axis=1) / WIDTH + eps)[:, None]
    for i in tl.static_range(NUM_CHUNKS):
        cols = i * CHUNK + tl.arange(0, CHUNK)[None, :]
        mask = (rows < num_tokens) & (cols < WIDTH)
        if residual_ptr is not None:
            tl.store(residual_ptr + rows * residual_stride + cols, sums[i], mask=mask)
        result = sums[i].to(tl.float32) * scale * (weights[i].to(tl.float32) + WEIGHT_OFFSET)
        normalised += (result.to(x_ptr.dtype.element_ty),)
    _store_quantised(normalised, out_ptr, scale_ptr, rows, num_tokens, out_stride, WIDTH, CHUNK, NUM_CHUNKS, ROWS)


@triton.jit(do_not_specialize=["num_tokens"])
def silu_mul_fp8_kernel(
    gate_up_ptr,
    out_ptr,
    scale_ptr,
    num_tokens,
    gate_up_stride,
    out_stride,
    WIDTH: tl.constexpr,
    GELU_TANH: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    parts = ()
    for i in tl.static_range(NUM_CHUNKS):
        cols = i * CHUNK + tl.arange(0, CHUNK)[None, :]
        mask = (rows < num_tokens) & (cols < WIDTH)
        ptrs = gate_up_ptr + rows * gate_up_stride + cols
        gate = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(ptrs + WIDTH, mask=mask, other=0.0).to(tl.float32)
        argument = gate
        if GELU_TANH:
            argument = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        parts += ((gate / (1.0 + tl.exp(-argument)) * up).to(gate_up_ptr.dtype.element_ty),)
    _store_quantised(parts, out_ptr, scale_ptr, rows, num_tokens, out_stride, WIDTH, CHUNK, NUM_CHUNKS, ROWS)


_quantise_tokens_launcher = Launcher(quantise_tokens_kernel)
_rms_norm_fp8_launcher, _silu_mul_fp8_launcher = Launcher(rms_norm_fp8_kernel), Launcher(silu_mul_fp8_kernel)


@cache
def row_tile(width: int) -> tuple[int, int, int, int]:
    """(chunk, number of chunks, rows per program, warps): `rms_norm_tile`, but the widest rows take twice the warps.

    A thread then holds 8 elements of a chunk always: rows of up to 28,672 stay in registers, the widest nearly so.
    """
    chunk, num_chunks, rows, num_warps = rms_norm_tile(width)
    return chunk, num_chunks, rows, 32 if chunk == 8192 else num_warps


def _outputs(num_tokens: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(num_tokens, width, dtype=torch.float8_e4m3fn, device=device)
    return out, torch.empty(num_tokens, 1, dtype=torch.float32, device=device)


def quantise_tokens_fp8(
    x: torch.Tensor, *, out: torch.Tensor | None = None, check: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """x as e4m3 with a scale per token: scale = max(|row|) / 448, q = x · (1 / scale) to the nearest, ties to even.

    Args:
        x: bf16, fp16 or fp32 [num_tokens, width]; rows may stand apart.
        out: float8_e4m3fn of x's shape, or None for a new tensor.
        check: look at the arguments first.

    Returns:
        float8_e4m3fn [num_tokens, width], and float32 scales [num_tokens, 1], above 0 also for rows of zeros.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or stride, or a width beyond 65,536.
    """
    if check:
        _check_quantise(x, out)
    num_tokens, width = x.shape
    codes, scale = _outputs(num_tokens, width if out is None else 0, x.device)
    out = codes if out is None else out
    if num_tokens == 0:
        return out, scale
    chunk, num_chunks, rows, num_warps = row_tile(width)
    _quantise_tokens_launcher[(triton.cdiv(num_tokens, rows),)](
        x,
        out.view(torch.uint8),
        scale,
        num_tokens,
        x.stride(0),
        out.stride(0),
        WIDTH=width,
        CHUNK=chunk,
        NUM_CHUNKS=num_chunks,
        ROWS=rows,
        num_warps=num_warps,
    )
    return out, scale


def rms_norm_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    check: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantise_tokens_fp8` of `kernels.elementwise.rms_norm` in one pass over memory, with the same bits.

    Beyond 28,672 channels squares are added in another order than there, so that a bit may differ.

    Args:
        x, weight, eps, residual, weight_offset: as there; residual is updated in place.
        check: look at the arguments first.

    Returns:
        float8_e4m3fn [num_tokens, hidden], and float32 scales [num_tokens, 1].

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or stride, or a hidden size beyond 65,536.
    """
    if check:
        _check_rms_norm(x, weight, eps, residual, None)
    num_tokens, hidden = x.shape
    out, scale = _outputs(num_tokens, hidden, x.device)
    if num_tokens == 0:
        return out, scale
    chunk, num_chunks, rows, num_warps = row_tile(hidden)
    _rms_norm_fp8_launcher[(triton.cdiv(num_tokens, rows),)](
        x,
        weight,
        residual,
        out.view(torch.uint8),
        scale,
        num_tokens,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        eps,
        WIDTH=hidden,
        CHUNK=chunk,
        NUM_CHUNKS=num_chunks,
        ROWS=rows,
        WEIGHT_OFFSET=weight_offset,
        num_warps=num_warps,
    )
    return out, scale


def silu_mul_fp8(
    gate_up: torch.Tensor, *, activation: str = "silu", check: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantise_tokens_fp8` of `kernels.elementwise.silu_mul` in one pass over memory, with the same bits.

    Args:
        gate_up: bf16, fp16 or fp32 [num_tokens, 2 · intermediate], gate first; rows may stand apart.
        activation: "silu" or "gelu_tanh".
        check: look at the arguments first.

    Returns:
        float8_e4m3fn [num_tokens, intermediate], and float32 scales [num_tokens, 1].

    Raises:
        ValueError: an unknown activation, an argument of the wrong shape, dtype, device or stride, or an intermediate
            size beyond 65,536.
    """
    if check:
        _check_silu_mul(gate_up, activation, None)
        _check_width("gate_up", gate_up.shape[1] // 2)
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out, scale = _outputs(num_tokens, width, gate_up.device)
    if num_tokens == 0:
        return out, scale
    chunk, num_chunks, rows, num_warps = row_tile(width)
    _silu_mul_fp8_launcher[(triton.cdiv(num_tokens, rows),)](
        gate_up,
        out.view(torch.uint8),
        scale,
        num_tokens,
        gate_up.stride(0),
        out.stride(0),
        WIDTH=width,
        GELU_TANH=activation == "gelu_tanh",
        CHUNK=chunk,
        NUM_CHUNKS=num_chunks,
        ROWS=rows,
        num_warps=num_warps,
    )
    return out, scale


def _check_width(name: str, width: int) -> None:
    if not 1 <= width <= MAX_HIDDEN:
        raise ValueError(f"{name} gives rows of {width} elements to quantise; it must be 1 to {MAX_HIDDEN}")


def _check_quantise(x, out) -> None:
    checks.tensors(x=x)
    checks.tensor("x", x, shape=(None, None), dtypes=DTYPES, device=x.device)
    _check_width("x", x.shape[1])
    if out is not None:
        checks.tensor("out", out, shape=tuple(x.shape), dtypes=(torch.float8_e4m3fn,), device=x.device)
        checks.no_overlap("out", out)
