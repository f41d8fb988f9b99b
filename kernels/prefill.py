"""Prefill attention: the new tokens of many sequences, over themselves and over a paged context before them.

Flash attention (arXiv 2205.14135, 2307.08691): one program keeps a tile of queries, walks over the keys in tiles and
never writes the logits. The keys of a sequence have two sources, read by one online softmax:

    position     0 ............ context_len ............ seq_len
                 [ pages of the cache  ][ rows of key, value ]
    walked in    left | whole |  tail     left | whole | diagonal | tail
                  W      -      W L         W      -       C W       C W L

A tile is masked only where it must be: W where the sliding window cuts it, C on the causal diagonal, L where the keys
end inside the tile. Only there values behind the end are zeroed too, since 0 · NaN is NaN. All the rest, nearly
everything in a long prompt, goes through a loop without any mask.
"""

import itertools
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import checks, prefill_hopper
from kernels.pages import HEAD_DIMS
from kernels.planes import LN_2, LOG2_E
from kernels.prefill_grid import PagedContext, cut, pack_for
from kernels.prefill_hopper import HopperConfig

FLOATS_16 = (torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class PrefillConfig:
    """How to tile. `pack` query heads of a KV group share a tile (a power of two that divides the group)."""

    block_m: int = 128
    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 2
    pack: int = 1


# ---- device --------------------------------------------------------------------------------------------------------


@triton.jit
def _sequence_of_tile(query_start_ptr, num_seqs, tile, BLOCK_TOKENS: tl.constexpr):
    """Which sequence a tile belongs to, counted out.

    Sequence b owns the tiles from query_start[b] // BLOCK_TOKENS + b, which are at least as many as it needs.
    """
    found = 0
    for first in range(0, num_seqs, 128):
        b = first + tl.arange(0, 128)
        start = tl.load(query_start_ptr + b, mask=b < num_seqs, other=0)
        found += tl.sum(((start // BLOCK_TOKENS + b <= tile) & (b < num_seqs)).to(tl.int32))
    return found - 1


@triton.jit
def _walk(
    state,
    q,
    source,
    numbers,
    first,
    stop,
    row,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    LIMIT: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    FP8: tl.constexpr,
):
    """Fold the keys first .. stop of one source into the state, all in base 2. `row`: the queries' positions in it."""
    acc, row_max, row_sum = state
    key_desc, value_desc, table_ptr, head, base, num_keys = source
    window, scale, cap_in, cap_out = numbers
    # Weights of 0 .. 1 would leave the upper half of e4m3's exponents unused; FlashAttention-3 shifts by 8 as well.
    SHIFT: tl.constexpr = 8.0 if FP8 else 0.0
    page = 0
    if PAGE_SIZE > 0:
        page = tl.load(table_ptr + first // PAGE_SIZE, mask=first < stop, other=0)
    for n in tl.range(first, stop, BLOCK_N):
        if PAGE_SIZE > 0:
            at = (page * base + head) * (2 * PAGE_SIZE) + n % PAGE_SIZE
            k = key_desc.load([at, 0])
            v = value_desc.load([at + PAGE_SIZE, 0])
            # One tile ahead, or every tile would wait for its page number.
            page = tl.load(table_ptr + (n + BLOCK_N) // PAGE_SIZE, mask=n + BLOCK_N < stop, other=0)
        else:
            k = key_desc.load([head, base + n, 0]).reshape(BLOCK_N, BLOCK_D)
            v = value_desc.load([head, base + n, 0]).reshape(BLOCK_N, BLOCK_D)
        s = tl.dot(q, k.T)
        if SOFT_CAP:  # tanh(x) = 1 - 2 / (1 + e^2x)
            s = cap_out - 2.0 * cap_out / (1.0 + tl.exp2(s * cap_in))
        column = n + tl.arange(0, BLOCK_N)
        if CAUSAL:
            s = tl.where(column[None, :] <= row[:, None], s, float("-inf"))
        if WINDOW:
            s = tl.where(column[None, :] > row[:, None] - window, s, float("-inf"))
        if LIMIT:
            s = tl.where((column < num_keys)[None, :], s, float("-inf"))
            v = tl.where((column < num_keys)[:, None], v, tl.zeros_like(v))
        new_max = tl.maximum(row_max, tl.max(s, 1) * scale)
        pivot = new_max
        if CAUSAL or WINDOW or LIMIT:  # a row that has seen no key yet: -inf - (-inf) is NaN
            pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(s * scale - (pivot - SHIFT)[:, None])
        alpha = tl.exp2(row_max - pivot)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        row_max = new_max
        acc = acc * alpha[:, None]
        if FP8:
            # Hopper's fp8 tensor cores keep few bits of a running sum: start anew for each tile, add in float32.
            acc += tl.dot(p.to(v.dtype), v)
        else:
            acc = tl.dot(p.to(v.dtype), v, acc)
    return acc, row_max, row_sum


@triton.jit
def _attend(
    state,
    q,
    source,
    numbers,
    place,
    token,
    offset,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    FP8: tl.constexpr,
):
    """All keys that a tile of queries sees in one source, in up to four walks with the masks that each needs.

    A source is (K, V, block table, head, base, number of keys). The new tokens' K and V (PAGE_SIZE 0) are descriptors
    of [heads, tokens, channels] and begin at token `base`; the context's are one of rows, a page being 2 · PAGE_SIZE
    rows, K then V, for each of `base` heads. `offset` is the first new token's position in the source.
    """
    CAUSAL: tl.constexpr = PAGE_SIZE == 0
    first_token, last_token = place
    num_keys, window = source[5], numbers[0]
    row = offset + token
    # Keys [first, uncut) are cut by the window, [uncut, below) seen whole, [below, whole) cut by the diagonal,
    # [whole, stop) are in the tile in which the keys end.
    first, uncut = 0, 0
    whole = num_keys // BLOCK_N * BLOCK_N
    below, stop = whole, num_keys
    if CAUSAL:
        below = (first_token + 1) // BLOCK_N * BLOCK_N
        stop = tl.minimum(last_token + 1, num_keys)
    if WINDOW:
        first = tl.maximum(offset + first_token - window + 1, 0) // BLOCK_N * BLOCK_N
        uncut = tl.cdiv(tl.maximum(offset + last_token - window + 1, 0), BLOCK_N) * BLOCK_N
        state = _walk(
            state, q, source, numbers, first, tl.minimum(uncut, below), row,
            BLOCK_N, BLOCK_D, PAGE_SIZE, False, True, False, SOFT_CAP, FP8,
        )  # fmt: skip
    state = _walk(
        state, q, source, numbers, tl.maximum(first, uncut), below, row,
        BLOCK_N, BLOCK_D, PAGE_SIZE, False, False, False, SOFT_CAP, FP8,
    )  # fmt: skip
    if CAUSAL:
        state = _walk(
            state, q, source, numbers, tl.maximum(first, below), tl.minimum(stop, whole), row,
            BLOCK_N, BLOCK_D, PAGE_SIZE, True, WINDOW, False, SOFT_CAP, FP8,
        )  # fmt: skip
    return _walk(
        state, q, source, numbers, tl.maximum(first, whole), stop, row,
        BLOCK_N, BLOCK_D, PAGE_SIZE, CAUSAL, WINDOW, True, SOFT_CAP, FP8,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "table_stride",
        "num_seqs",
        "num_heads",
        "num_columns",
        "num_tiles",
        "columns_per_section",
        "window",
    ],
    do_not_specialize_on_alignment=["query_start_ptr", "seq_lens_ptr", "block_tables_ptr"],
)
def _prefill_kernel(
    query_desc,  # [num_q_heads / PACK, num_tokens, PACK, head_dim], without PACK where it is 1
    key_desc,  # [num_kv_heads, num_tokens, head_dim]
    value_desc,
    context_desc,  # [num_pages * num_kv_heads * 2 * page_size, head_dim]
    out_ptr,
    lse_ptr,
    query_start_ptr,
    seq_lens_ptr,
    block_tables_ptr,
    query_scale_ptr,  # of fp8 tensors: one float32 each
    key_scale_ptr,
    value_scale_ptr,
    out_stride_token,
    out_stride_head,
    table_stride,
    num_seqs,
    num_heads,  # num_q_heads / PACK
    num_columns,
    num_tiles,
    columns_per_section,
    softmax_scale,
    window,
    soft_cap,
    GROUP: tl.constexpr,  # num_q_heads / num_kv_heads
    PACK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # HEAD_DIM up to a power of two; descriptors fill in zeros
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CONTEXT_BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,  # 0: no context
    UNIFORM: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    FP8: tl.constexpr,
    LSE: tl.constexpr,
):
    BLOCK_TOKENS: tl.constexpr = BLOCK_M // PACK
    # The order of kernels.prefill_grid.Grid.
    rank = tl.program_id(0)
    section = rank // (columns_per_section * num_tiles)
    rest = rank - section * columns_per_section * num_tiles
    width = tl.minimum(columns_per_section, num_columns - section * columns_per_section)
    tile = num_tiles - 1 - rest // width
    column = section * columns_per_section + rest % width
    if UNIFORM:
        seq = column // num_heads
        head = column % num_heads
        begin = tl.load(query_start_ptr + seq)
        first_token = tile * BLOCK_TOKENS
    else:
        head = column
        seq = _sequence_of_tile(query_start_ptr, num_seqs, tile, BLOCK_TOKENS)
        begin = tl.load(query_start_ptr + seq)
        first_token = (tile - begin // BLOCK_TOKENS - seq) * BLOCK_TOKENS
    query_len = tl.load(query_start_ptr + seq + 1) - begin
    if first_token >= query_len:
        return

    kv_head = head * PACK // GROUP
    token = first_token + tl.arange(0, BLOCK_M) // PACK
    if PACK == 1:
        q = query_desc.load([head, begin + first_token, 0]).reshape(BLOCK_M, BLOCK_D)
    else:
        q = query_desc.load([head, begin + first_token, 0, 0]).reshape(BLOCK_M, BLOCK_D)
    scale = softmax_scale
    if FP8:
        scale *= tl.load(query_scale_ptr) * tl.load(key_scale_ptr)
    cap_in, cap_out = 0.0, 0.0
    if SOFT_CAP:
        cap_in = scale * 2.0 * LOG2_E / soft_cap
        cap_out = soft_cap * LOG2_E
        scale = 1.0
    else:
        scale *= LOG2_E

    numbers = (window, scale, cap_in, cap_out)
    place = (first_token, first_token + BLOCK_TOKENS - 1)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    state = (acc, row_max, row_sum)
    if PAGE_SIZE > 0:
        context_len = tl.load(seq_lens_ptr + seq) - query_len
        table_ptr = block_tables_ptr + seq.to(tl.int64) * table_stride
        source = (context_desc, context_desc, table_ptr, kv_head, num_heads * PACK // GROUP, context_len)
        state = _attend(
            state, q, source, numbers, place, token, context_len,
            CONTEXT_BLOCK_N, BLOCK_D, PAGE_SIZE, WINDOW, SOFT_CAP, FP8,
        )  # fmt: skip
    source = (key_desc, value_desc, query_start_ptr, kv_head, begin, query_len)
    acc, row_max, row_sum = _attend(
        state, q, source, numbers, place, token, 0, BLOCK_N, BLOCK_D, 0, WINDOW, SOFT_CAP, FP8
    )

    out = acc / row_sum[:, None]
    if FP8:
        out *= tl.load(value_scale_ptr)
    # A product of a token's number and a stride can pass 2^31.
    at = (begin + token).to(tl.int64)
    out_head = head * PACK + tl.arange(0, BLOCK_M) % PACK
    channel = tl.arange(0, BLOCK_D)
    row_ptr = out_ptr + at * out_stride_token + out_head * out_stride_head
    in_out = token < query_len
    tl.store(
        row_ptr[:, None] + channel[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=in_out[:, None] & (channel < HEAD_DIM)[None, :],
    )
    if LSE:
        SHIFT: tl.constexpr = 8.0 if FP8 else 0.0
        lse = (row_max + tl.log2(row_sum) - SHIFT) * LN_2
        tl.store(lse_ptr + at * (num_heads * PACK) + out_head, lse, mask=in_out)


# ---- host ----------------------------------------------------------------------------------------------------------


def prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    query_start: torch.Tensor,
    max_query_len: int,
    softmax_scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    context: PagedContext | None = None,
    query_scale: float | torch.Tensor = 1.0,
    key_scale: float | torch.Tensor = 1.0,
    value_scale: float | torch.Tensor = 1.0,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    check: bool = True,
    config: PrefillConfig | HopperConfig | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of a flat batch of new tokens over themselves and, where given, a paged context before them.

    Memory beyond inputs and output: a counter at most, so linear in the number of tokens.

    Args:
        query: [num_tokens, num_q_heads, head_dim], bfloat16, float16 or float8_e4m3fn; strides of tokens and heads are
            free in multiples of 16 bytes, as for key and value. Rows behind the last sequence are left alone.
        key, value: [num_tokens, num_kv_heads, head_dim] of the same dtype.
        query_start: int32 [num_seqs + 1], where each sequence's new tokens begin; an empty sequence is padding.
        max_query_len: of the longest sequence, new tokens only.
        softmax_scale: factor on the logits, positive; head_dim ** -0.5 by default.
        window: a query sees this many keys, itself the last.
        soft_cap: logits become soft_cap · tanh(logit / soft_cap).
        context: earlier tokens; not with float8.
        query_scale, key_scale, value_scale: what float8 numbers are to be multiplied by, a float or a float32 scalar.
        out: [num_tokens, num_q_heads, head_dim] to write to, of the query's dtype; bfloat16 or float16 for float8.
        return_lse: also return the natural-log sum of exponentials, float32 [num_tokens, num_q_heads].
        check: raise ValueError for bad arguments; reads lengths and tables, so waits for the GPU.
        config: tile sizes, for tests and benchmarks.

    Returns:
        out, or (out, lse).

    Raises:
        ValueError: an argument is not as described, by name.
    """
    if check:
        _check(query, key, value, query_start, max_query_len, softmax_scale, window, soft_cap, context, out, config)
        if query.dtype == FP8:
            for name, scale in (("query", query_scale), ("key", key_scale), ("value", value_scale)):
                _check_scale(f"{name}_scale", scale, query.device)
    num_tokens, num_q_heads, head_dim = query.shape
    is_fp8 = query.dtype == FP8
    if out is None:
        out = query.new_empty(query.shape, dtype=torch.bfloat16 if is_fp8 else query.dtype)
    lse = query.new_empty((num_tokens, num_q_heads), dtype=torch.float32) if return_lse else None
    num_seqs = query_start.shape[0] - 1
    if num_tokens and num_seqs and max_query_len:
        config = config or _choose_config(query, key, max_query_len, context is not None)
        arguments = (
            config, query, key, value, out, lse, query_start, max_query_len,
            softmax_scale or head_dim**-0.5, window, soft_cap, context,
        )  # fmt: skip
        if isinstance(config, HopperConfig):
            prefill_hopper.launch(*arguments)
        else:
            _launch(*arguments, (query_scale, key_scale, value_scale))
    return (out, lse) if return_lse else out


def _choose_config(
    query: torch.Tensor, key: torch.Tensor, max_query_len: int, has_context: bool
) -> PrefillConfig | HopperConfig:
    """Kernel and tiles for a shape, as timed on an H200 (`python -m kernels.bench --suite prefill`)."""
    if query.dtype in FLOATS_16 and prefill_hopper.is_hopper(query.device):
        return prefill_hopper.choose_config(query.shape[2], query.shape[1] // key.shape[1], max_query_len)
    return portable_config(query, key, max_query_len, has_context)


def portable_config(query: torch.Tensor, key: torch.Tensor, max_query_len: int, has_context: bool) -> PrefillConfig:
    """The Triton kernel's tiles for a shape, on whatever GPU."""
    head_dim = query.shape[2]
    if query.dtype == FP8:
        # Two outputs are in registers, the running one and a tile's: of 128 rows of 256 channels they would not fit.
        config = PrefillConfig(64, 64, num_warps=8) if head_dim > 128 else PrefillConfig(128, 128, 8, num_stages=3)
    elif head_dim > 128:
        config = PrefillConfig(128, 64, num_warps=8)
    elif has_context:
        config = PrefillConfig(128, 64, num_warps=8, num_stages=3)
    else:
        config = PrefillConfig(128, 64, num_warps=4, num_stages=3 if head_dim == 64 else 2)
    return replace(config, pack=pack_for(query.shape[1] // key.shape[1], max_query_len, config.block_m))


def _launch(
    config: PrefillConfig,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    query_start: torch.Tensor,
    max_query_len: int,
    softmax_scale: float,
    window: int | None,
    soft_cap: float | None,
    context: PagedContext | None,
    fp8_scales: tuple[float | torch.Tensor, float | torch.Tensor, float | torch.Tensor],
) -> None:
    num_q_heads, head_dim = query.shape[1:]
    num_kv_heads, num_seqs = key.shape[1], query_start.shape[0] - 1
    is_fp8 = query.dtype == FP8
    block_d = triton.next_power_of_2(head_dim)
    context_block_n, page_size, context_desc = config.block_n, 0, None
    if context is not None:
        page_size = context.layout.page_size
        context_block_n = min(page_size, config.block_n)
        rows = context.rows()
        context_desc = TensorDescriptor(rows, list(rows.shape), [head_dim, 1], [context_block_n, block_d])
    grid = cut(query, key, num_seqs, max_query_len, context, config.block_m, config.pack)
    scales = [None] * 3
    if is_fp8:
        scales = [torch.as_tensor(scale, dtype=torch.float32, device=query.device) for scale in fp8_scales]
    _prefill_kernel[(grid.num_ranks,)](
        _query_descriptor(query, config, block_d),
        _rows_descriptor(key, config.block_n, block_d),
        _rows_descriptor(value, config.block_n, block_d),
        context_desc,
        out,
        lse,
        query_start,
        context.seq_lens if context else None,
        context.block_tables if context else None,
        *scales,
        out.stride(0),
        out.stride(1),
        context.block_tables.stride(0) if context else 0,
        num_seqs,
        grid.num_heads,
        grid.num_columns,
        grid.num_tiles,
        grid.columns_per_section,
        softmax_scale,
        window or 0,
        float(soft_cap or 0.0),
        GROUP=num_q_heads // num_kv_heads,
        PACK=config.pack,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        CONTEXT_BLOCK_N=context_block_n,
        PAGE_SIZE=page_size,
        UNIFORM=grid.uniform,
        WINDOW=window is not None,
        SOFT_CAP=soft_cap is not None,
        FP8=is_fp8,
        LSE=lse is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _rows_descriptor(tensor: torch.Tensor, block: int, block_d: int) -> TensorDescriptor:
    """[num_tokens, num_heads, head_dim] as [num_heads, num_tokens, head_dim], to be read `block` tokens at a time."""
    (num_tokens, num_heads, head_dim), (token, head, _) = tensor.shape, tensor.stride()
    return TensorDescriptor(tensor, [num_heads, num_tokens, head_dim], [head, token, 1], [1, block, block_d])


def _query_descriptor(query: torch.Tensor, config: PrefillConfig, block_d: int) -> TensorDescriptor:
    """As above, or with neighbouring heads as further rows of a token."""
    pack = config.pack
    if pack == 1:
        return _rows_descriptor(query, config.block_m, block_d)
    (num_tokens, num_heads, head_dim), (token, head, _) = query.shape, query.stride()
    shape, strides = [num_heads // pack, num_tokens, pack, head_dim], [pack * head, token, head, 1]
    return TensorDescriptor(query, shape, strides, [1, config.block_m // pack, pack, block_d])


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_start: torch.Tensor,
    max_query_len: int,
    softmax_scale: float | None,
    window: int | None,
    soft_cap: float | None,
    context: PagedContext | None,
    out: torch.Tensor | None,
    config: PrefillConfig | HopperConfig | None,
) -> None:
    checks.tensors(query=query)
    device = query.device
    checks.tensor("query", query, shape=(None, None, None), dtypes=(*FLOATS_16, FP8), device=device)
    num_tokens, num_q_heads, head_dim = query.shape
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"query has head size {head_dim}; it must be one of {', '.join(map(str, HEAD_DIMS))}")
    for name, tensor in (("key", key), ("value", value)):
        checks.tensor(name, tensor, shape=(num_tokens, None, head_dim), dtypes=(query.dtype,), device=device)
    checks.tensor("value", value, shape=tuple(key.shape), dtypes=(query.dtype,), device=device)
    checks.head_ratio(num_q_heads, key.shape[1])
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_alignment(name, tensor)
    if out is not None:
        dtypes = FLOATS_16 if query.dtype == FP8 else (query.dtype,)
        checks.tensor("out", out, shape=tuple(query.shape), dtypes=dtypes, device=device)
        checks.no_overlap("out", out)
    for name, number in (("softmax_scale", softmax_scale), ("soft_cap", soft_cap)):
        if number is not None:
            checks.positive(name, number)
    if window is not None:
        checks.integer("window", window, 1, 2**31 - 1)
    checks.integer("max_query_len", max_query_len, 0)
    if config is not None and not isinstance(config, PrefillConfig | HopperConfig):
        raise ValueError(f"config is {config!r}; it must be a PrefillConfig or a HopperConfig")
    checks.tensor("query_start", query_start, shape=(None,), dtypes=(torch.int32,), device=device, contiguous=True)
    _check_query_start(query_start.tolist(), num_tokens, max_query_len)
    if context is not None:
        if not isinstance(context, PagedContext):
            raise ValueError(f"context is a {type(context).__name__}; it must be a PagedContext")
        try:
            _check_context(context, query, key.shape[1], query_start)
        except ValueError as error:  # it begins with a field's name
            raise ValueError(f"context.{error}") from None


def _check_scale(name: str, scale: float | torch.Tensor, device: torch.device) -> None:
    if isinstance(scale, torch.Tensor):
        if scale.numel() != 1:
            raise ValueError(f"{name} has shape {list(scale.shape)}; it must be a scalar")
        checks.tensor(name, scale, shape=tuple(scale.shape), dtypes=(torch.float32,), device=device)
        scale = scale.item()
    checks.positive(name, scale)


def _check_alignment(name: str, tensor: torch.Tensor) -> None:
    """TMA reads addresses and strides in units of 16 bytes."""
    strides = [stride for stride, size in zip(tensor.stride()[:2], tensor.shape, strict=False) if size > 1]
    if tensor.data_ptr() % 16 or any(stride * tensor.element_size() % 16 for stride in strides):
        raise ValueError(
            f"{name} has strides {list(tensor.stride())} from address {tensor.data_ptr():#x}; "
            f"tokens and heads must lie multiples of 16 bytes apart, the first on such an address"
        )


def _check_query_start(starts: list[int], num_tokens: int, max_query_len: int) -> None:
    if not starts or starts[0] != 0 or starts[-1] > num_tokens:
        raise ValueError(
            f"query_start is {starts[:1]} .. {starts[-1:]}; it must go from 0 to at most the {num_tokens} tokens"
        )
    for b, (start, stop) in enumerate(itertools.pairwise(starts)):
        if not 0 <= stop - start <= max_query_len:
            raise ValueError(
                f"query_start goes from {start} to {stop} at sequence {b}; "
                f"it must not fall, nor rise by more than max_query_len = {max_query_len}"
            )


def _check_context(context: PagedContext, query: torch.Tensor, num_kv_heads: int, query_start: torch.Tensor) -> None:
    checks.page_layout("layout", context.layout)
    layout, device, num_seqs = context.layout, query.device, query_start.shape[0] - 1
    if layout.word_dtype != query.dtype or not layout.is_float:
        raise ValueError(
            f"layout is of {layout.kv_dtype}; it must be of the query's type, "
            f"{str(query.dtype).removeprefix('torch.')}, and that one of 16 bits"
        )
    if layout.head_dim != query.shape[2]:
        raise ValueError(f"layout has head size {layout.head_dim}; it must be the query's {query.shape[2]}")
    checks.cache(context.cache, layout, num_kv_heads, device)
    int32 = (torch.int32,)
    checks.tensor("block_tables", context.block_tables, shape=(num_seqs, None), dtypes=int32, device=device)
    checks.tensor("seq_lens", context.seq_lens, shape=(num_seqs,), dtypes=int32, device=device)
    # The table need only reach over the context, so lengths are checked without the new tokens.
    lengths = context.seq_lens - query_start.diff()
    most = context.block_tables.shape[1] * layout.page_size
    for b, (seq_len, length) in enumerate(zip(context.seq_lens.tolist(), lengths.tolist(), strict=True)):
        if length < 0:
            raise ValueError(
                f"seq_lens[{b}] is {seq_len}; it must count the sequence's {seq_len - length} new tokens too"
            )
        if length > most:
            raise ValueError(
                f"seq_lens[{b}] is {seq_len}, {length} of them before the new tokens; "
                f"its block table must reach over these, but has room for {most}"
            )
    checks.block_tables_and_lengths(
        context.block_tables, lengths, torch.zeros_like(query_start), context.cache.shape[0], layout.page_size
    )
