"""The elementwise steps of a decoder layer as Triton kernels: RMSNorm, per-head norm with RoPE, gated activation.

They are as fast as memory, or should be, so what counts is that every byte is moved once, in 16-byte accesses, with
enough of them in flight: at 4.3 TB/s and 0.7 µs some 24 KB per SM (Little's law). A thread therefore issues all its
loads, four or more, before it uses the first, and no kernel waits with loads behind its own stores.

Meaning and shapes: `kernels.reference.elementwise`.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from kernels import checks
from kernels.launching import Launcher
from kernels.reference.elementwise import ACTIVATIONS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HIDDEN = 8 * 8192  # 8 chunks of the largest tile


# ---- RMSNorm -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_tokens"])
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    residual_ptr,
    out_ptr,
    num_tokens,
    x_stride,
    residual_stride,
    out_stride,
    eps,
    HIDDEN: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
):
    """ROWS tokens, held in registers as NUM_CHUNKS tiles [ROWS, CHUNK]: few hidden sizes are a power of two."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    parts, residuals, weights, sums = (), (), (), ()
    for i in tl.static_range(NUM_CHUNKS):
        cols = i * CHUNK + tl.arange(0, CHUNK)[None, :]
        mask = (rows < num_tokens) & (cols < HIDDEN)
        parts += (tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0),)
        if residual_ptr is not None:
            residuals += (tl.load(residual_ptr + rows * residual_stride + cols, mask=mask, other=0.0),)
        weights += (tl.load(weight_ptr + cols, mask=cols < HIDDEN, other=0.0),)
    squares = tl.zeros([ROWS, CHUNK], tl.float32)
    for i in tl.static_range(NUM_CHUNKS):
        x = parts[i].to(tl.float32)
        if residual_ptr is not None:
            # Rounded as it will be stored: the next layer's residual and this norm's input are the same numbers.
            rounded = (x + residuals[i].to(tl.float32)).to(x_ptr.dtype.element_ty)
            sums += (rounded,)
            x = rounded.to(tl.float32)
        else:
            sums += (parts[i],)
        squares += x * x
    scale = tl.rsqrt(tl.sum(squares, axis=1) / HIDDEN + eps)[:, None]
    for i in tl.static_range(NUM_CHUNKS):
        cols = i * CHUNK + tl.arange(0, CHUNK)[None, :]
        mask = (rows < num_tokens) & (cols < HIDDEN)
        if residual_ptr is not None:
            tl.store(residual_ptr + rows * residual_stride + cols, sums[i], mask=mask)
        normalised = sums[i].to(tl.float32) * scale * (weights[i].to(tl.float32) + WEIGHT_OFFSET)
        tl.store(out_ptr + rows * out_stride + cols, normalised.to(out_ptr.dtype.element_ty), mask=mask)


_rms_norm_launcher = Launcher(rms_norm_kernel)


@cache
def rms_norm_tile(hidden: int) -> tuple[int, int, int, int]:
    """(chunk, number of chunks, rows per program, warps) for a hidden size.

    Least waste first (5,120 = 5 chunks of 1,024), then three or four chunks: that many 16-byte loads per thread and
    tensor are in flight, and the sums still fit in registers. A thread holds 8 elements of a chunk.
    """
    chunks = (2**bits for bits in range(7, 14))
    _, _, chunk = min(
        (-(-hidden // chunk) * chunk, abs(-(-hidden // chunk) - 3.5), chunk)
        for chunk in chunks
        if -(-hidden // chunk) <= 8
    )
    rows = max(1, 1024 // chunk)
    return chunk, -(-hidden // chunk), rows, min(16, rows * chunk // 256)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    out: torch.Tensor | None = None,
    check: bool = True,
) -> torch.Tensor:
    """x / rms(x) · (weight + weight_offset), where x is first added to the residual stream, if one is given.

    One pass over memory: reads x (and residual), writes the result (and residual).

    Args:
        x: bf16, fp16 or fp32 [num_tokens, hidden]; rows may stand apart.
        weight: [hidden], contiguous.
        eps: added to the mean square, above 0.
        residual: x's shape and dtype, updated in place to residual + x.
        weight_offset: 0.0, or 1.0 for Gemma, whose weights are stored as differences from one.
        out: x's shape and dtype, may be x; a new tensor otherwise.
        check: look at the arguments first.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or stride, or a hidden size beyond 65,536.
    """
    if check:
        _check_rms_norm(x, weight, eps, residual, out)
    num_tokens, hidden = x.shape
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return out
    chunk, num_chunks, rows, num_warps = rms_norm_tile(hidden)
    _rms_norm_launcher[(triton.cdiv(num_tokens, rows),)](
        x,
        weight,
        residual,
        out,
        num_tokens,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        eps,
        HIDDEN=hidden,
        CHUNK=chunk,
        NUM_CHUNKS=num_chunks,
        ROWS=rows,
        WEIGHT_OFFSET=weight_offset,
        num_warps=num_warps,
    )
    return out


def _check_rms_norm(x, weight, eps, residual, out) -> None:
    checks.tensors(x=x)
    checks.tensor("x", x, shape=(None, None), dtypes=DTYPES, device=x.device)
    hidden = x.shape[1]
    if not 1 <= hidden <= MAX_HIDDEN:
        raise ValueError(f"x has {hidden} channels; it must have 1 to {MAX_HIDDEN}")
    checks.tensor("weight", weight, shape=(hidden,), dtypes=DTYPES, device=x.device)
    checks.positive("eps", eps)
    for name, value in (("residual", residual), ("out", out)):
        if value is not None:
            checks.tensor(name, value, shape=tuple(x.shape), dtypes=(x.dtype,), device=x.device)
            checks.no_overlap(name, value)


# ---- RoPE, with an optional norm of every head ---------------------------------------------------------------------


@triton.jit
def _weights(ptrs, cols, limit, WEIGHT_OFFSET: tl.constexpr):
    return tl.load(ptrs + cols, mask=cols < limit, other=0.0).to(tl.float32) + WEIGHT_OFFSET


@triton.jit
def qk_norm_rope_kernel(
    query_ptr,
    key_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    query_norm_ptr,
    key_norm_ptr,
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    eps,
    NUM_Q_HEADS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HALF_TILE: tl.constexpr,
    REST_TILE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    PASSES: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
):
    """PASSES tiles of HEAD_TILE heads of one token. Query heads are counted first, then key heads.

    The loops are separate so that all loads stand before the first store: as far as the compiler knows, a store could
    change what a later load reads. REST_TILE is 0 where the channels beyond the rotary ones stay as they are.
    """
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, HALF_TILE)[None, :]
    if REST_TILE > 0:
        rest_cols = 2 * HALF + tl.arange(0, REST_TILE)[None, :]
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + position * HALF + cols, mask=cols < HALF, other=0.0)
    sin = tl.load(sin_ptr + position * HALF + cols, mask=cols < HALF, other=0.0)
    heads, lows, highs, rests = (), (), (), ()
    for i in tl.static_range(PASSES):
        head = (tl.program_id(1) * PASSES + i) * HEAD_TILE + tl.arange(0, HEAD_TILE)[:, None]
        ptrs = query_ptr + token * query_token_stride + head * query_head_stride
        if NUM_HEADS > NUM_Q_HEADS:
            key_ptrs = key_ptr + token * key_token_stride + (head - NUM_Q_HEADS) * key_head_stride
            ptrs = tl.where(head < NUM_Q_HEADS, ptrs, key_ptrs)
        mask = (head < NUM_HEADS) & (cols < HALF)
        heads += (ptrs,)
        lows += (tl.load(ptrs + cols, mask=mask, other=0.0),)
        highs += (tl.load(ptrs + HALF + cols, mask=mask, other=0.0),)
        if REST_TILE > 0:
            mask = (head < NUM_HEADS) & (rest_cols < HEAD_DIM)
            rests += (tl.load(ptrs + rest_cols, mask=mask, other=0.0),)
    dtype = query_ptr.dtype.element_ty
    new_lows, new_highs, new_rests = (), (), ()
    for i in tl.static_range(PASSES):
        low, high = lows[i].to(tl.float32), highs[i].to(tl.float32)
        if query_norm_ptr is not None:
            norm_ptrs = query_norm_ptr
            if NUM_HEADS > NUM_Q_HEADS:
                head = (tl.program_id(1) * PASSES + i) * HEAD_TILE + tl.arange(0, HEAD_TILE)[:, None]
                norm_ptrs = tl.where(head < NUM_Q_HEADS, query_norm_ptr, key_norm_ptr)
            squares = tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)
            if REST_TILE > 0:
                rest = rests[i].to(tl.float32)
                squares += tl.sum(rest * rest, axis=1)
            scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
            low *= scale * _weights(norm_ptrs, cols, HALF, WEIGHT_OFFSET)
            high *= scale * _weights(norm_ptrs + HALF, cols, HALF, WEIGHT_OFFSET)
            if REST_TILE > 0:
                rest *= scale * _weights(norm_ptrs, rest_cols, HEAD_DIM, WEIGHT_OFFSET)
                new_rests += (rest.to(dtype),)
        new_lows += ((low * cos - high * sin).to(dtype),)
        new_highs += ((high * cos + low * sin).to(dtype),)
    for i in tl.static_range(PASSES):
        head = (tl.program_id(1) * PASSES + i) * HEAD_TILE + tl.arange(0, HEAD_TILE)[:, None]
        mask = (head < NUM_HEADS) & (cols < HALF)
        tl.store(heads[i] + cols, new_lows[i], mask=mask)
        tl.store(heads[i] + HALF + cols, new_highs[i], mask=mask)
        if REST_TILE > 0:
            tl.store(heads[i] + rest_cols, new_rests[i], mask=(head < NUM_HEADS) & (rest_cols < HEAD_DIM))


_qk_norm_rope_launcher = Launcher(qk_norm_rope_kernel)


@cache
def rope_tile(num_heads: int, half: int) -> tuple[int, int, int, int]:
    """(heads per tile, tiles per program, programs per token, warps) for this many heads, query and key together.

    Fewest idle lanes first (40 heads of 128 = 5 tiles of 8), then the fewest programs. A thread holds 8 channels of
    either half; a tile is one to eight warps of them.
    """
    half_tile = triton.next_power_of_2(half)
    tiles = [2**bits for bits in range(9) if 256 <= 2**bits * half_tile <= 2048] or [1]
    choices = []
    for tile in tiles:
        for passes in range(1, 7):
            groups = -(-num_heads // (tile * passes))
            choices.append((groups * passes * tile, groups, abs(passes - 4), tile, passes))
    _, groups, _, tile, passes = min(choices)
    return tile, passes, groups, max(1, tile * half_tile // 256)


def qk_norm_rope(
    query: torch.Tensor,
    key: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    *,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    check: bool = True,
) -> None:
    """RMSNorm of every head (if weights are given), then rotary position embedding, in place.

    Rotated are the pairs (c, c + rotary_dim / 2); channels from rotary_dim on are only normalised.

    Args:
        query: bf16, fp16 or fp32 [num_tokens, num_q_heads, head_dim], for instance a slice of a fused QKV projection.
        key: the same with num_kv_heads, or None.
        cos, sin: float32 [max_position, rotary_dim / 2], contiguous.
        positions: int32 or int64 [num_tokens].
        query_norm, key_norm: [head_dim] or None; key_norm goes with query_norm wherever there is a key.
        eps, weight_offset: as in `rms_norm`.
        check: look at the arguments first; reads the positions, and so waits for the GPU.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or stride, or a position outside the tables.
    """
    if check:
        _check_rope(query, key, cos, sin, positions, query_norm, key_norm, eps)
    num_tokens, num_q_heads, head_dim = query.shape
    half = cos.shape[1]
    if num_tokens == 0:
        return
    num_heads = num_q_heads + (0 if key is None else key.shape[1])
    head_tile, passes, groups, num_warps = rope_tile(num_heads, half)
    rest = head_dim - 2 * half if query_norm is not None else 0
    _qk_norm_rope_launcher[(num_tokens, groups)](
        query,
        key,
        cos,
        sin,
        positions,
        query_norm,
        key_norm,
        query.stride(0),
        query.stride(1),
        0 if key is None else key.stride(0),
        0 if key is None else key.stride(1),
        eps,
        NUM_Q_HEADS=num_q_heads,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        HALF=half,
        HALF_TILE=triton.next_power_of_2(half),
        REST_TILE=triton.next_power_of_2(rest) if rest else 0,
        HEAD_TILE=head_tile,
        PASSES=passes,
        WEIGHT_OFFSET=weight_offset,
        num_warps=num_warps,
    )


def _check_rope(query, key, cos, sin, positions, query_norm, key_norm, eps) -> None:
    checks.tensors(query=query)
    device = query.device
    checks.tensor("query", query, shape=(None, None, None), dtypes=DTYPES, device=device)
    num_tokens, num_q_heads, head_dim = query.shape
    if key is not None:
        checks.tensor("key", key, shape=(num_tokens, None, head_dim), dtypes=(query.dtype,), device=device)
        checks.no_overlap("key", key)
    checks.no_overlap("query", query)
    checks.positive("eps", eps)
    if num_q_heads < 1 or (key is not None and key.shape[1] < 1):
        raise ValueError("query or key has 0 heads; each must have at least 1")
    checks.tensor("cos", cos, shape=(None, None), dtypes=(torch.float32,), device=device, contiguous=True)
    checks.tensor("sin", sin, shape=tuple(cos.shape), dtypes=(torch.float32,), device=device, contiguous=True)
    if not 1 <= cos.shape[1] <= head_dim // 2:
        raise ValueError(f"cos has {cos.shape[1]} columns; it must have 1 to head_dim / 2 = {head_dim // 2}")
    checks.tensor("positions", positions, shape=(num_tokens,), dtypes=(torch.int32, torch.int64), device=device)
    for name, norm in (("query_norm", query_norm), ("key_norm", key_norm)):
        if norm is not None:
            checks.tensor(name, norm, shape=(head_dim,), dtypes=DTYPES, device=device)
    if key is not None and (query_norm is None) != (key_norm is None):
        raise ValueError("query_norm and key_norm must both be given, or neither")
    if query_norm is not None and key_norm is not None and query_norm.dtype != key_norm.dtype:
        raise ValueError(f"key_norm is {key_norm.dtype}; it must be query_norm's {query_norm.dtype}")
    if num_tokens:
        low, high = torch.stack(torch.aminmax(positions)).tolist()
        if low < 0 or high >= cos.shape[0]:
            raise ValueError(f"positions reach from {low} to {high}; they must be 0 to {cos.shape[0] - 1}, rows of cos")


# ---- gated activation ----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_tokens"])
def silu_mul_kernel(
    gate_up_ptr,
    out_ptr,
    num_tokens,
    gate_up_stride,
    out_stride,
    WIDTH: tl.constexpr,
    GELU_TANH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK neighbouring elements of the output, counted over all rows, so that no width leaves lanes idle."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    first_row = first // WIDTH
    col = (first - first_row * WIDTH).to(tl.int32) + tl.arange(0, BLOCK)
    row = first_row + col // WIDTH
    col %= WIDTH
    mask = row < num_tokens
    gate = tl.load(gate_up_ptr + row * gate_up_stride + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * gate_up_stride + WIDTH + col, mask=mask, other=0.0).to(tl.float32)
    argument = gate
    if GELU_TANH:
        # ½(1 + tanh z) = sigmoid(2z)
        argument = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    result = gate / (1.0 + tl.exp(-argument)) * up
    tl.store(out_ptr + row * out_stride + col, result.to(out_ptr.dtype.element_ty), mask=mask)


_silu_mul_launcher = Launcher(silu_mul_kernel)


SILU_BLOCK = 2048


def silu_mul(
    gate_up: torch.Tensor, *, activation: str = "silu", out: torch.Tensor | None = None, check: bool = True
) -> torch.Tensor:
    """activation(gate) · up.

    Args:
        gate_up: bf16, fp16 or fp32 [num_tokens, 2 · intermediate], gate first; rows may stand apart.
        activation: "silu" or "gelu_tanh".
        out: [num_tokens, intermediate] of the same dtype, or None for a new tensor.
        check: look at the arguments first.

    Raises:
        ValueError: an unknown activation, or an argument of the wrong shape, dtype, device or stride.
    """
    if check:
        _check_silu_mul(gate_up, activation, out)
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = torch.empty(num_tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    if num_tokens == 0:
        return out
    _silu_mul_launcher[(triton.cdiv(num_tokens * width, SILU_BLOCK),)](
        gate_up,
        out,
        num_tokens,
        gate_up.stride(0),
        out.stride(0),
        WIDTH=width,
        GELU_TANH=activation == "gelu_tanh",
        BLOCK=SILU_BLOCK,
        num_warps=4,
    )
    return out


def _check_silu_mul(gate_up, activation, out) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
    checks.tensors(gate_up=gate_up)
    checks.tensor("gate_up", gate_up, shape=(None, None), dtypes=DTYPES, device=gate_up.device)
    num_tokens, columns = gate_up.shape
    if columns < 2 or columns % 2:
        raise ValueError(f"gate_up has {columns} columns; it must have an even number, gate and up")
    if out is not None:
        checks.tensor("out", out, shape=(num_tokens, columns // 2), dtypes=(gate_up.dtype,), device=gate_up.device)
        checks.no_overlap("out", out)
