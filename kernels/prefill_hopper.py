"""Prefill attention for Hopper: the meaning of `kernels.prefill`, with the warps' work laid out by hand in Gluon.

The schedule is FlashAttention-3's (arXiv 2407.08608). Of three warpgroups one warp only moves data; two compute, each
with 64 rows of queries and its own registers, so that one's softmax runs beside the other's tensor-core work. Within
a warpgroup, too, QK^T of the next tile is in flight during the softmax of this one:

    producer   K0 Q V0 K1 V1 K2 …        TMA into a ring of K tiles and one of V tiles
    consumer   S0=QK0 | S1=QK1, O+=P0V0, softmax S1 | S2=QK2, O+=P1V1, softmax S2 | … | O+=PnVn, write

One program runs on each multiprocessor and takes one query tile after the other; the producer runs ahead into the next
while the last one is written. Which tile is next, a counter in global memory says.

Keys are walked from the diagonal to the left, so that masks are needed at the ends of the walk only:

    position     0 ............ context_len ............ seq_len
                 [ pages of the cache  ][ rows of key, value ]
    masked       window          end     window       diagonal
"""

from dataclasses import dataclass, fields
from functools import cache

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.interpreting import num_multiprocessors
from kernels.launching import Launcher
from kernels.planes import LOG2_E
from kernels.prefill_grid import PagedContext, cut, pack_for

# Registers per thread: consumers compute, the producer holds addresses. 2 · 240 + 24 = 3 · 168, all there are.
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)
MAX_REGISTERS = 168


@dataclass(frozen=True)
class Shape:
    """What the kernel is compiled for, and the layouts that follow from it."""

    dtype: gl.dtype
    HEAD_DIM: int
    BLOCK_D: int  # head_dim up to a power of two; descriptors fill in zeros
    BLOCK_N: int
    STAGES: int
    GROUP: int  # query heads of a KV head
    PACK: int  # of these, the ones that share a tile
    PAGE_SIZE: int  # 0: no context
    UNIFORM: bool  # of kernels.prefill_grid.Grid
    WINDOW: bool
    SOFT_CAP: bool
    LSE: bool
    PING_PONG: bool

    def __post_init__(self):
        # The kernel's compiler takes a constant for one only if it says so.
        for field in fields(self):
            object.__setattr__(self, field.name, gl.constexpr(getattr(self, field.name)))

    @property
    def tokens(self) -> gl.constexpr:
        """New tokens of a query tile."""
        return 128 // self.PACK

    @property
    def scores(self) -> gl.constexpr:
        return gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, self.BLOCK_N.value, 16]))

    @property
    def output(self) -> gl.constexpr:
        return gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, self.BLOCK_D.value, 16]))

    @property
    def weights(self) -> gl.constexpr:
        return gl.constexpr(gl.DotOperandLayout(0, self.output, 2))

    @property
    def stage_in_queries(self) -> gl.constexpr:
        """Whether the output passes through the queries' shared memory, where there is none left for it."""
        return self.BLOCK_D > 128

    @property
    def rowwise(self) -> gl.constexpr:
        """For whole rows of 16-bit channels between shared and global memory, 16 bytes a thread."""
        lanes = min(self.BLOCK_D.value // 8, 32)
        return gl.constexpr(gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0]))

    @property
    def shared(self) -> gl.constexpr:
        """Of tiles in shared memory: columns of 64 channels (128 bytes), swizzled as TMA and wgmma do."""
        return gl.constexpr(gl.NVMMASharedLayout.get_default_for([64, self.BLOCK_D.value], self.dtype.value))


@dataclass(frozen=True)
class HopperConfig:
    """How to tile.

    Args:
        block_n: keys of a tile.
        num_stages: tiles in the ring of K, and in that of V.
        ping_pong: consumers start their tensor-core work strictly in turn.
        pack: query heads of a KV group that share a tile, a power of two that divides the group.
    """

    block_n: int = 128
    num_stages: int = 2
    ping_pong: bool = True
    pack: int = 1


# ---- device: which tile, which keys --------------------------------------------------------------------------------


@gluon.jit
def _draw(counter_ptr, num_ranks):
    """Ask for a tile behind those that the programs begin with; the answer comes in lane 0 of the producer's warp.

    An operation of all lanes on one address the assembler would make a sum over the warp, and wait for it.
    """
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    asks = (lane == 0) & (num_ranks > gl.num_programs(0))
    ticket = gl.atomic_add(counter_ptr + lane, asks.to(gl.int32), mask=asks, sem="relaxed")
    return gl.where(asks, ticket, 0)


@gluon.jit
def _tile(rank, lengths, sizes, c: gl.constexpr):
    """The query tile of a rank: (sequence, head, begin, first token, query_len, context_len)."""
    query_start_ptr, seq_lens_ptr = lengths
    num_seqs, num_heads, num_columns, num_tiles, columns_per_section = sizes
    # The order of kernels.prefill_grid.Grid.
    section = rank // (columns_per_section * num_tiles)
    rest = rank - section * columns_per_section * num_tiles
    width = gl.minimum(columns_per_section, num_columns - section * columns_per_section)
    tile = num_tiles - 1 - rest // width
    column = section * columns_per_section + rest % width
    if c.UNIFORM:
        seq = column // num_heads
        head = column % num_heads
        begin = gl.load(query_start_ptr + seq)
        first_token = tile * c.tokens
    else:
        head = column
        seq = gl.to_tensor(0)
        above = num_seqs
        while above - seq > 1:
            middle = (seq + above) // 2
            if gl.load(query_start_ptr + middle) // c.tokens + middle <= tile:
                seq = middle
            else:
                above = middle
        begin = gl.load(query_start_ptr + seq)
        first_token = (tile - begin // c.tokens - seq) * c.tokens
    query_len = gl.load(query_start_ptr + seq + 1) - begin
    context_len = 0
    if c.PAGE_SIZE > 0:
        context_len = gl.load(seq_lens_ptr + seq) - query_len
    return seq, head, begin, first_token, query_len, context_len


@gluon.jit
def _announce(news, turn, head, begin, first_token, query_len, context_len):
    """Tell the consumers their next query tile, once both have heard of the one before. A query_len of 0 is the end."""
    words, told, heard = news
    mbarrier.wait(heard, (turn & 1) ^ 1)
    message = (head, begin, first_token, query_len, context_len)
    for i in gl.static_range(5):
        words.index(i).store(gl.full([1], message[i], gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(told, count=1)


@gluon.jit
def _word(words, i: gl.constexpr):
    return gl.sum(words.index(i).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _hear_query_len(news, turn):
    """Wait for the next announcement."""
    words, told, _ = news
    mbarrier.wait(told, turn & 1)
    return _word(words, 3)


@gluon.jit
def _hear_rest(news):
    """The rest of it: (head, begin, first token, context_len)."""
    words, _, heard = news
    head, begin, first_token, context_len = _word(words, 0), _word(words, 1), _word(words, 2), _word(words, 4)
    mbarrier.arrive(heard, count=1)
    return head, begin, first_token, context_len


@gluon.jit
def _first_tile(position, window, c: gl.constexpr):
    """The first tile of keys that a query at `position` sees."""
    first = 0
    if c.WINDOW:
        first = gl.maximum(position - window + 1, 0) // c.BLOCK_N
    return first


# ---- device: the producer ------------------------------------------------------------------------------------------


@gluon.jit
def _load_pages(desc, source, ring, kind: gl.constexpr, n, count, c: gl.constexpr):
    """The tile of K (kind 0) or V (1) from key n of the context, by boxes of 64 channels of a page."""
    table_ptr, head, num_kv_heads, visible, num_keys = source
    tiles, full, empty = ring
    box_rows: gl.constexpr = desc.block_type.shape[0]
    down: gl.constexpr = c.BLOCK_N // box_rows
    across: gl.constexpr = c.BLOCK_D // 64
    stage = count % c.STAGES
    # A tile in shared memory is columns of 64 channels, one behind the other.
    boxes = tiles._reinterpret(c.dtype, [c.STAGES * across * down, box_rows, 64], desc.layout)
    mbarrier.wait(empty.index(stage), (count // c.STAGES & 1) ^ 1)
    mbarrier.expect(full.index(stage), c.BLOCK_N * c.BLOCK_D * 2)
    for i in gl.static_range(down):
        position = n + i * box_rows
        # A page without a key in sight may be any page or none: rows behind the cache read as zeros.
        row = desc.shape[0]
        if (position < num_keys) & (position + box_rows > visible):
            page = gl.load(table_ptr + position // c.PAGE_SIZE)
            row = ((page * num_kv_heads + head) * 2 + kind) * c.PAGE_SIZE + position % c.PAGE_SIZE
        for j in gl.static_range(across):
            box = boxes.index(stage * (across * down) + j * down + i)
            tma.async_copy_global_to_shared(desc, [row, j * 64], full.index(stage), box)


@gluon.jit
def _load_rows(desc, ring, head, row, count, c: gl.constexpr):
    """One tile of K or V of the new tokens."""
    tiles, full, empty = ring
    stage = count % c.STAGES
    views = tiles._reinterpret(c.dtype, [c.STAGES, 1, c.BLOCK_N, c.BLOCK_D], desc.layout)
    mbarrier.wait(empty.index(stage), (count // c.STAGES & 1) ^ 1)
    mbarrier.expect(full.index(stage), c.BLOCK_N * c.BLOCK_D * 2)
    tma.async_copy_global_to_shared(desc, [head, row, 0], full.index(stage), views.index(stage))


@gluon.jit
def _load_queries(desc, ring, head, row, done, c: gl.constexpr):
    """Each consumer's 64 rows."""
    tiles, full, empty = ring
    for i in gl.static_range(2):
        mbarrier.wait(empty.index(i), (done & 1) ^ 1)
        mbarrier.expect(full.index(i), 64 * c.BLOCK_D * 2)
        if c.PACK == 1:
            views = tiles._reinterpret(c.dtype, [2, 1, 64, c.BLOCK_D], desc.layout)
            tma.async_copy_global_to_shared(desc, [head, row + i * 64, 0], full.index(i), views.index(i))
        else:
            views = tiles._reinterpret(c.dtype, [2, 1, 64 // c.PACK, c.PACK, c.BLOCK_D], desc.layout)
            at = [head, row + i * (64 // c.PACK), 0, 0]
            tma.async_copy_global_to_shared(desc, at, full.index(i), views.index(i))


@gluon.jit
def _produce(descs, rings, table, lengths, sizes, window, ranks, c: gl.constexpr):
    query_desc, key_desc, value_desc, context_desc = descs
    query_ring, key_ring, value_ring, _, news = rings
    block_tables_ptr, table_stride = table
    num_ranks, counter_ptr = ranks
    num_kv_heads = sizes[1] * c.PACK // c.GROUP
    count = 0  # tiles of keys loaded
    done = 0  # tiles of queries loaded
    rank = gl.program_id(0)
    while rank < num_ranks:
        drawn = _draw(counter_ptr, num_ranks)  # here, so that it is there when needed
        seq, head, begin, first_token, query_len, context_len = _tile(rank, lengths, sizes, c)
        if first_token < query_len:
            _announce(news, done, head, begin, first_token, query_len, context_len)
            kv_head = head * c.PACK // c.GROUP
            last = (gl.minimum(first_token + c.tokens, query_len) - 1) // c.BLOCK_N
            first = _first_tile(first_token, window, c)
            for i in range(last - first + 1):
                row = begin + (last - i) * c.BLOCK_N
                _load_rows(key_desc, key_ring, kv_head, row, count, c)
                if i == 0:
                    _load_queries(query_desc, query_ring, head, begin + first_token, done, c)
                _load_rows(value_desc, value_ring, kv_head, row, count, c)
                count += 1
            done += 1
            if c.PAGE_SIZE > 0:
                table_ptr = block_tables_ptr + seq.to(gl.int64) * table_stride
                position = context_len + first_token
                visible = 0
                if c.WINDOW:
                    visible = position - window + 1
                tiles = gl.cdiv(context_len, c.BLOCK_N)
                for i in range(tiles - gl.minimum(_first_tile(position, window, c), tiles)):
                    source = (table_ptr, kv_head, num_kv_heads, visible, context_len)
                    n = (tiles - 1 - i) * c.BLOCK_N
                    _load_pages(context_desc, source, key_ring, 0, n, count, c)
                    _load_pages(context_desc, source, value_ring, 1, n, count, c)
                    count += 1
        rank = gl.num_programs(0) + gl.sum(drawn, 0)
    _announce(news, done, 0, 0, 0, 0, 0)


# ---- device: the consumers -----------------------------------------------------------------------------------------


@gluon.jit
def _await(ring, count, c: gl.constexpr):
    """Wait until the tile `count` has come."""
    mbarrier.wait(ring[1].index(count % c.STAGES), count // c.STAGES & 1)


@gluon.jit
def _take_turn(turns, count, c: gl.constexpr, WHICH: gl.constexpr):
    """Wait until the other consumer has started the tile `count` (for the first: the tile before)."""
    if c.PING_PONG:
        mbarrier.wait(turns.index(WHICH), (count & 1) ^ (1 - WHICH))


@gluon.jit
def _give_turn(turns, c: gl.constexpr, WHICH: gl.constexpr):
    if c.PING_PONG:
        mbarrier.arrive(turns.index(1 - WHICH), count=1)


@gluon.jit
def _score(q, ring, count, c: gl.constexpr):
    """Start S = Q K^T for the tile `count` of keys."""
    _await(ring, count, c)
    k = ring[0].index(count % c.STAGES)
    zero = gl.zeros([64, c.BLOCK_N], gl.float32, c.scores)
    return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _accumulate(acc, p, ring, count, c: gl.constexpr):
    """Start acc += P V for the tile `count` of keys, which has come."""
    p = gl.convert_layout(p.to(c.dtype), c.weights)
    return warpgroup_mma(p, ring[0].index(count % c.STAGES), acc, is_async=True)


@gluon.jit
def _release(ring, count, c: gl.constexpr):
    mbarrier.arrive(ring[2].index(count % c.STAGES), count=1)


@gluon.jit
def _clear_behind(ring, count, rows, c: gl.constexpr):
    """Zero the values of tile `count` behind its first `rows`: weights there are 0, but 0 · NaN is NaN.

    Both consumers do it. They write the same.
    """
    _await(ring, count, c)
    quarter: gl.constexpr = c.BLOCK_N // 4
    for i in gl.static_range(4):
        part = ring[0].index(count % c.STAGES).slice(i * quarter, quarter)
        row = i * quarter + gl.arange(0, quarter, gl.SliceLayout(1, c.rowwise))
        values = part.load(c.rowwise)
        part.store(gl.where((row < rows)[:, None], values, gl.zeros_like(values)))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _softmax(
    s,
    row_max,
    row_sum,
    numbers,
    n,
    row,
    num_keys,
    c: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,
    LIMIT: gl.constexpr,
):
    """Weights of a tile in base 2, and the running maximum, sum and the factor for what was accumulated before."""
    scale, cap_in, cap_out, window = numbers
    if c.SOFT_CAP:  # tanh(x) = 1 - 2 / (1 + e^2x)
        s = cap_out - 2.0 * cap_out / (1.0 + gl.exp2(s * cap_in))
    MASKED: gl.constexpr = CAUSAL or WINDOW or LIMIT
    if MASKED:
        column = n + gl.arange(0, c.BLOCK_N, gl.SliceLayout(0, c.scores))
        if CAUSAL:
            s = gl.where(column[None, :] <= row[:, None], s, float("-inf"))
        if WINDOW:
            s = gl.where(column[None, :] > row[:, None] - window, s, float("-inf"))
        if LIMIT:
            s = gl.where((column < num_keys)[None, :], s, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(s, 1) * scale)
    pivot = new_max
    if MASKED:  # a row that has seen no key yet: -inf - (-inf) is NaN
        pivot = gl.where(new_max == float("-inf"), 0.0, new_max)
    p = gl.exp2(s * scale - pivot[:, None])
    alpha = gl.exp2(row_max - pivot)
    return p, new_max, row_sum * alpha + gl.sum(p, 1), alpha


@gluon.jit
def _step(
    state,
    q,
    rings,
    numbers,
    n,
    row,
    num_keys,
    c: gl.constexpr,
    WHICH: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,
    LIMIT: gl.constexpr,
):
    """Start on the next tile of keys, whose first is n, and fold in the weights of the one before."""
    acc, p, row_max, row_sum, count = state
    _, key_ring, value_ring, turns, _ = rings
    if LIMIT:
        _clear_behind(value_ring, count, num_keys - n, c)
    _take_turn(turns, count, c, WHICH)
    s = _score(q, key_ring, count, c)
    acc = _accumulate(acc, p, value_ring, count - 1, c)
    _give_turn(turns, c, WHICH)
    s = warpgroup_mma_wait(1, [s])
    _release(key_ring, count, c)
    p, row_max, row_sum, alpha = _softmax(s, row_max, row_sum, numbers, n, row, num_keys, c, CAUSAL, WINDOW, LIMIT)
    # Here, and not before the values are used: the assembler moves no arithmetic over the branch in it, and would
    # else put the softmax behind the next wait, where nothing runs beside it.
    _await(value_ring, count, c)
    acc = warpgroup_mma_wait(0, [acc])
    _release(value_ring, count - 1, c)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, c.output))[:, None]
    return acc, p, row_max, row_sum, count + 1


@gluon.jit
def _walk(
    state,
    q,
    rings,
    numbers,
    first,
    stop,
    row,
    num_keys,
    c: gl.constexpr,
    WHICH: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,
    LIMIT: gl.constexpr,
):
    """The tiles first .. stop of one source, the last one first. `row`: the queries' positions in that source."""
    acc, p, row_max, row_sum, count = state
    for i in range(stop - first):
        n = (stop - 1 - i) * c.BLOCK_N
        acc, p, row_max, row_sum, count = _step(
            (acc, p, row_max, row_sum, count), q, rings, numbers, n, row, num_keys, c, WHICH, CAUSAL, WINDOW, LIMIT
        )
    return acc, p, row_max, row_sum, count


@gluon.jit
def _attend(q, rings, numbers, done, count, place, token, c: gl.constexpr, WHICH: gl.constexpr):
    """The walk over the keys of one query tile: (output not yet normalised, maximum, sum, tiles of keys seen)."""
    query_ring, key_ring, value_ring, turns, _ = rings
    first_token, query_len, context_len = place
    window = numbers[3]
    own_first = first_token + WHICH * (64 // c.PACK)
    own_last = own_first + 64 // c.PACK - 1
    last = (gl.minimum(first_token + c.tokens, query_len) - 1) // c.BLOCK_N
    n = last * c.BLOCK_N
    mbarrier.wait(query_ring[1].index(WHICH), done & 1)

    _take_turn(turns, count, c, WHICH)
    s = _score(q, key_ring, count, c)
    _give_turn(turns, c, WHICH)
    s = warpgroup_mma_wait(0, [s])
    _release(key_ring, count, c)
    row_max = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, c.scores))
    row_sum = gl.zeros([64], gl.float32, gl.SliceLayout(1, c.scores))
    p, row_max, row_sum, _ = _softmax(s, row_max, row_sum, numbers, n, token, query_len, c, True, c.WINDOW, False)
    if n + c.BLOCK_N > query_len:
        _clear_behind(value_ring, count, query_len - n, c)
    acc = gl.zeros([64, c.BLOCK_D], gl.float32, c.output)
    _await(value_ring, count, c)
    count += 1

    # The window cuts the tiles [first, uncut), the diagonal [below, last]; all 64 rows see [uncut, below) whole.
    first = _first_tile(first_token, window, c)
    below = gl.minimum((own_first + 1) // c.BLOCK_N, last)
    uncut = first
    if c.WINDOW:
        uncut = gl.minimum(gl.cdiv(gl.maximum(own_last - window + 1, 0), c.BLOCK_N), below)
    state = (acc, p, row_max, row_sum, count)
    state = _walk(state, q, rings, numbers, below, last, token, query_len, c, WHICH, True, c.WINDOW, False)
    state = _walk(state, q, rings, numbers, uncut, below, token, query_len, c, WHICH, False, False, False)
    if c.WINDOW:
        state = _walk(state, q, rings, numbers, first, uncut, token, query_len, c, WHICH, False, True, False)

    if c.PAGE_SIZE > 0:
        row = context_len + token
        tiles = gl.cdiv(context_len, c.BLOCK_N)
        first = gl.minimum(_first_tile(context_len + first_token, window, c), tiles)
        whole = gl.maximum(context_len // c.BLOCK_N, first)
        uncut = first
        if c.WINDOW:
            uncut = gl.minimum(gl.cdiv(gl.maximum(context_len + own_last - window + 1, 0), c.BLOCK_N), whole)
        state = _walk(state, q, rings, numbers, whole, tiles, row, context_len, c, WHICH, False, c.WINDOW, True)
        state = _walk(state, q, rings, numbers, uncut, whole, row, context_len, c, WHICH, False, False, False)
        if c.WINDOW:
            state = _walk(state, q, rings, numbers, first, uncut, row, context_len, c, WHICH, False, True, False)
    acc, p, row_max, row_sum, count = state

    if not c.stage_in_queries:
        mbarrier.arrive(query_ring[2].index(WHICH), count=1)
    acc = _accumulate(acc, p, value_ring, count - 1, c)
    acc = warpgroup_mma_wait(0, [acc])
    _release(value_ring, count - 1, c)
    return acc, row_max, row_sum, count


@gluon.jit
def _consume(rings, staging, outputs, numbers, c: gl.constexpr, WHICH: gl.constexpr):
    out_ptr, lse_ptr, out_stride_token, out_stride_head, num_heads = outputs
    q = rings[0][0].index(WHICH)
    rows = gl.arange(0, 64, gl.SliceLayout(1, c.scores))
    out_rows = gl.arange(0, 64, gl.SliceLayout(1, c.rowwise))
    channel = gl.arange(0, c.BLOCK_D, gl.SliceLayout(0, c.rowwise))
    count = 0
    done = 0
    query_len = _hear_query_len(rings[4], done)
    while query_len > 0:
        head, begin, first_token, context_len = _hear_rest(rings[4])
        token = first_token + (WHICH * 64 + rows) // c.PACK
        place = (first_token, query_len, context_len)
        acc, row_max, row_sum, count = _attend(q, rings, numbers, done, count, place, token, c, WHICH)
        if c.LSE:
            lse = (row_max + gl.log2(row_sum)) * 0.6931471805599453
            row_head = head * c.PACK + rows % c.PACK
            # A product of a token's number and a stride can pass 2^31.
            at = (begin + token).to(gl.int64) * (num_heads * c.PACK) + row_head
            gl.store(lse_ptr + at, lse, mask=token < query_len)
        inverse = gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, c.output))
        # Through shared memory, so that a thread writes 16 bytes of a row.
        part = staging.index(WHICH)
        part.store((acc * inverse[:, None]).to(c.dtype))
        gl.thread_barrier()
        values = part.load(c.rowwise)
        gl.thread_barrier()
        if c.stage_in_queries:
            fence_async_shared()
            mbarrier.arrive(rings[0][2].index(WHICH), count=1)
        token_out = first_token + (WHICH * 64 + out_rows) // c.PACK
        at = (begin + token_out).to(gl.int64) * out_stride_token
        at += (head * c.PACK + out_rows % c.PACK) * out_stride_head
        inside = (token_out < query_len)[:, None] & (channel < c.HEAD_DIM)[None, :]
        gl.store(out_ptr + at[:, None] + channel[None, :], values, mask=inside)
        done += 1
        query_len = _hear_query_len(rings[4], done)


@gluon.jit(
    do_not_specialize=[
        "table_stride",
        "num_seqs",
        "num_heads",
        "num_columns",
        "num_tiles",
        "columns_per_section",
        "num_ranks",
        "window",
    ],
    # Slices of a step's lengths and tables begin anywhere; each load of them is of one number.
    do_not_specialize_on_alignment=["query_start_ptr", "seq_lens_ptr", "block_tables_ptr"],
)
def _prefill_hopper_kernel(
    query_desc,  # [num_q_heads / PACK, num_tokens, PACK, head_dim], without PACK where it is 1
    key_desc,  # [num_kv_heads, num_tokens, head_dim]
    value_desc,
    context_desc,  # [num_pages * num_kv_heads * 2 * page_size, head_dim]
    out_ptr,
    lse_ptr,
    query_start_ptr,
    seq_lens_ptr,
    block_tables_ptr,
    counter_ptr,  # 0, if there are more ranks than programs; else not touched
    out_stride_token,
    out_stride_head,
    table_stride,
    num_seqs,
    num_heads,  # num_q_heads / PACK
    num_columns,
    num_tiles,
    columns_per_section,
    num_ranks,  # num_columns * num_tiles
    scale,  # from q · k to a power of two; with a soft cap 1
    window,
    cap_in,
    cap_out,
    c: gl.constexpr,
):
    query_tiles = gl.allocate_shared_memory(c.dtype, [2, 64, c.BLOCK_D], c.shared)
    key_tiles = gl.allocate_shared_memory(c.dtype, [c.STAGES, c.BLOCK_N, c.BLOCK_D], c.shared)
    value_tiles = gl.allocate_shared_memory(c.dtype, [c.STAGES, c.BLOCK_N, c.BLOCK_D], c.shared)
    staging = query_tiles
    if not c.stage_in_queries:
        staging = gl.allocate_shared_memory(c.dtype, [2, 64, c.BLOCK_D], c.shared)
    query_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    query_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    key_full = gl.allocate_shared_memory(gl.int64, [c.STAGES, 1], mbarrier.MBarrierLayout())
    key_empty = gl.allocate_shared_memory(gl.int64, [c.STAGES, 1], mbarrier.MBarrierLayout())
    value_full = gl.allocate_shared_memory(gl.int64, [c.STAGES, 1], mbarrier.MBarrierLayout())
    value_empty = gl.allocate_shared_memory(gl.int64, [c.STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    words = gl.allocate_shared_memory(gl.int32, [5, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    told = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    heard = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(told, count=1)
    mbarrier.init(heard, count=2)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
        mbarrier.init(query_full.index(i), count=1)
        mbarrier.init(query_empty.index(i), count=1)
    stages: gl.constexpr = c.STAGES
    for i in gl.static_range(stages):
        mbarrier.init(key_full.index(i), count=1)
        mbarrier.init(key_empty.index(i), count=2)
        mbarrier.init(value_full.index(i), count=1)
        mbarrier.init(value_empty.index(i), count=2)
    fence_async_shared()

    rings = (
        (query_tiles, query_full, query_empty),
        (key_tiles, key_full, key_empty),
        (value_tiles, value_full, value_empty),
        turns,
        (words, told, heard),
    )
    descs = (query_desc, key_desc, value_desc, context_desc)
    outputs = (out_ptr, lse_ptr, out_stride_token, out_stride_head, num_heads)
    table = (block_tables_ptr, table_stride)
    lengths = (query_start_ptr, seq_lens_ptr)
    sizes = (num_seqs, num_heads, num_columns, num_tiles, columns_per_section)
    ranks = (num_ranks, counter_ptr)
    numbers = (scale, cap_in, cap_out, window)
    gl.warp_specialize(
        [
            (_consume, (rings, staging, outputs, numbers, c, 0)),
            (_consume, (rings, staging, outputs, numbers, c, 1)),
            (_produce, (descs, rings, table, lengths, sizes, window, ranks, c)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


# ---- host ----------------------------------------------------------------------------------------------------------

GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def choose_config(head_dim: int, group: int, max_query_len: int) -> HopperConfig:
    """Tiles for a shape, as timed on an H200."""
    return HopperConfig(
        block_n=64 if head_dim > 128 else 128,
        ping_pong=head_dim < 256,
        pack=pack_for(group, max_query_len, block_m=128),
    )


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether the device has the instructions that this module is made of."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def launch(
    config: HopperConfig,
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
) -> None:
    """`kernels.prefill.prefill_attention` for checked 16-bit tensors on a Hopper GPU."""
    num_q_heads, head_dim = query.shape[1:]
    num_seqs = query_start.shape[0] - 1
    grid = cut(query, key, num_seqs, max_query_len, context, 128, config.pack)
    shape = _shape(
        dtype=GLUON_DTYPES[query.dtype],
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_N=config.block_n,
        STAGES=config.num_stages,
        GROUP=num_q_heads // key.shape[1],
        PACK=config.pack,
        PAGE_SIZE=context.layout.page_size if context else 0,
        UNIFORM=grid.uniform,
        WINDOW=window is not None,
        SOFT_CAP=soft_cap is not None,
        LSE=lse is not None,
        PING_PONG=config.ping_pong,
    )
    programs = min(grid.num_ranks, num_multiprocessors(query.device))
    counter = query_start.new_zeros(1) if programs < grid.num_ranks else query_start.new_empty(1)
    _launcher[(programs,)](
        _query_descriptor(query, shape),
        _rows_descriptor(key, shape, config.block_n),
        _rows_descriptor(value, shape, config.block_n),
        _pages_descriptor(context, shape) if context else None,
        out,
        lse,
        query_start,
        context.seq_lens if context else None,
        context.block_tables if context else None,
        counter,
        out.stride(0),
        out.stride(1),
        context.block_tables.stride(0) if context else 0,
        num_seqs,
        grid.num_heads,
        grid.num_columns,
        grid.num_tiles,
        grid.columns_per_section,
        grid.num_ranks,
        1.0 if soft_cap else softmax_scale * LOG2_E.value,
        window or 0,
        2 * softmax_scale * LOG2_E.value / soft_cap if soft_cap else 0.0,
        soft_cap * LOG2_E.value if soft_cap else 0.0,
        c=shape,
        num_warps=4,
        maxnreg=MAX_REGISTERS,
    )


# Making these takes longer than all else that a launch does on the host, and hashing them takes long enough.
_shape = cache(Shape)
_launcher = Launcher(_prefill_hopper_kernel, by_identity=("c",))


@cache
def _layout(box: tuple[int, ...], dtype: gl.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(box), dtype)


def _descriptor(tensor: torch.Tensor, shape: list[int], strides: list[int], box: list[int]) -> TensorDescriptor:
    layout = _layout(tuple(box), GLUON_DTYPES[tensor.dtype])
    # As the constructor would, without its checks: those of `prefill_attention` are more and can be left out.
    made = TensorDescriptor.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape, made.layout, made.padding = (
        tensor, shape, strides, box, layout, "zero",
    )  # fmt: skip
    return made


def _rows_descriptor(tensor: torch.Tensor, c: Shape, rows: int) -> TensorDescriptor:
    """[num_tokens, num_heads, head_dim] as [num_heads, num_tokens, head_dim], to be read `rows` tokens at a time."""
    (num_tokens, num_heads, head_dim), (token, head, _) = tensor.shape, tensor.stride()
    return _descriptor(tensor, [num_heads, num_tokens, head_dim], [head, token, 1], [1, rows, c.BLOCK_D.value])


def _query_descriptor(query: torch.Tensor, c: Shape) -> TensorDescriptor:
    """As above for one consumer's 64 rows, or with neighbouring heads as further rows of a token."""
    pack = c.PACK.value
    if pack == 1:
        return _rows_descriptor(query, c, 64)
    (num_tokens, num_heads, head_dim), (token, head, _) = query.shape, query.stride()
    shape, strides = [num_heads // pack, num_tokens, pack, head_dim], [pack * head, token, head, 1]
    return _descriptor(query, shape, strides, [1, 64 // pack, pack, c.BLOCK_D.value])


def _pages_descriptor(context: PagedContext, c: Shape) -> TensorDescriptor:
    """The context's rows in boxes of 64 channels of a page."""
    rows = context.rows()
    return _descriptor(rows, list(rows.shape), [rows.shape[1], 1], [min(c.PAGE_SIZE.value, c.BLOCK_N.value), 64])
