"""Decode and verify attention: queries of 1 to 16 tokens per sequence over a paged, possibly quantised KV cache.

The work is bound by reading KV once, so everything here serves that stream:

- **Rows.** The query heads that share a KV head, times the query tokens, are the rows of one matrix tile (GQA packing):
  KV is read once for all of them.
- **Work split.** A *unit* is one sequence and KV head, a *tile* one page of it. The tiles of all units stand in one
  line, and every program takes an equally long run of it (stream-K, arXiv 2301.03598; LeanAttention, arXiv 2405.10480):

      units      |  b0 h0   |  b0 h1   | b1 h0 | b1 h1 | b2 h0 ...
      tiles      ....................................................
      programs   |    0    |    1    |    2    |    3    |    4

  Lengths may be as mixed as they like. A program that holds a whole unit writes its output; pieces of a unit go to
  partial buffers, of which a program needs at most two, and a second kernel merges them.
- **Plan.** Which sequence each program starts in follows from the lengths; a small kernel computes it on the GPU once
  per step, and all layers of the step use it. The host never reads a length.
- **Dequantisation.** A plane of a packed word, masked out, *is* a float16 subnormal: code · 2^-24, times a power of two
  that is known when compiling. Tensor cores multiply subnormals exactly, so one AND per two codes is all there is. K's
  channel scales multiply the query once per page, its minima add one number per row and page; V's token scales join
  the exponent (p·v_scale = exp2(s + log2 v_scale − m)), and their inverse the softmax sum.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import checks
from kernels.interpreting import INTERPRETING
from kernels.pages import MAX_QUERY_LEN, PageLayout

USE_ASM = tl.constexpr(not INTERPRETING)
LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
NEG_LARGE = tl.constexpr(-1.0e30)
# A residual window takes as long as this many pages.
RESIDUAL_COST = tl.constexpr(3)
# int32 numbers that the plan keeps for each program: its first sequence, unit of it, position in the unit, and length
# of the share; of that sequence what `_sequence` says; the program to merge from.
RECORD = tl.constexpr(16)


@triton.jit
def _exp2(x):
    """2^x, subnormal results flushed to zero."""
    if USE_ASM:
        y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        y = tl.exp2(x)
    return y


@triton.jit
def _log2(x):
    if USE_ASM:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        y = tl.log2(x)
    return y


@triton.jit
def _reciprocal(x):
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
def _plane(words, j: tl.constexpr, FORMAT: tl.constexpr):
    """Plane j of a tile of words as matrix operands: the values themselves, or codes · 2^(_shift − 24) for integers."""
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
def _shift(j, fmt):
    """Bit at which plane j's code stands in its masked half."""
    return 4 * (j % 2) if fmt == "int4" else 2 * (j % 4) if fmt == "int2" else 0


@triton.jit
def _columns(x, N: tl.constexpr, COLUMNS: tl.constexpr):
    """The columns of a tile [N, COLUMNS], 4 or 8 of them."""
    if COLUMNS == 4:
        even, odd = tl.split(tl.reshape(x, [N, 2, 2]))
        c0, c2 = tl.split(even)
        c1, c3 = tl.split(odd)
        columns = (c0, c1, c2, c3)
    else:
        even, odd = tl.split(tl.reshape(x, [N, 4, 2]))
        c0, c2, c4, c6 = _columns(even, N, 4)
        c1, c3, c5, c7 = _columns(odd, N, 4)
        columns = (c0, c1, c2, c3, c4, c5, c6, c7)
    return columns


@triton.jit
def _soft_cap(x, cap):
    """cap · tanh(x / cap)."""
    return cap - 2.0 * cap / (1.0 + tl.exp2(x * (2.0 * 1.4426950408889634 / cap)))


@triton.jit
def _sequence(
    b,
    mask,
    seq_lens_ptr,
    query_start_ptr,
    flushed_lens_ptr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    LOW_BIT: tl.constexpr,
    UNIT_COST: tl.constexpr,
):
    """Of sequence b (or many): tokens, first new row, new tokens, first page to read, and for each of its units the
    tiles (a residual window is the first) and what the unit costs before them.
    """
    seq_len = tl.load(seq_lens_ptr + b, mask=mask, other=0)
    token0 = tl.load(query_start_ptr + b, mask=mask, other=0)
    query_len = tl.load(query_start_ptr + b + 1, mask=mask, other=0) - token0
    first_page = seq_len * 0
    lead = first_page + UNIT_COST
    if WINDOW > 0:
        first_page = tl.maximum(seq_len - query_len + 1 - WINDOW, 0) // PAGE
    if LOW_BIT:
        flushed_len = tl.load(flushed_lens_ptr + b, mask=mask, other=0)
        first_page = tl.minimum(first_page, flushed_len // PAGE)
        residual = (seq_len > flushed_len).to(tl.int32)
        tiles = flushed_len // PAGE - first_page + residual
        lead += residual * (RESIDUAL_COST - 1)
    else:
        tiles = (seq_len + PAGE - 1) // PAGE - first_page
    tiles = tl.where(query_len > 0, tiles, 0)
    return seq_len, token0, query_len, first_page, tiles, lead


@triton.jit
def _share_of(position, base, extra):
    """The program whose share holds a position of the line; the first `extra` shares are base + 1 long."""
    longer = extra * (base + 1)
    return tl.where(position < longer, position // (base + 1), extra + (position - longer) // base)


@triton.jit(do_not_specialize=["table_stride"])
def _decode_kernel(
    query_ptr,
    cache_ptr,
    block_tables_ptr,
    seq_lens_ptr,
    query_start_ptr,
    plan_ptr,
    out_ptr,
    lse_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    residual_ptr,
    residual_slots_ptr,
    flushed_lens_ptr,
    softmax_scale,
    soft_cap,
    query_stride_t,
    query_stride_h,
    out_stride_t,
    out_stride_h,
    table_stride,
    FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    PAGE_WORDS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    MAX_QUERY: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    HAS_LSE: tl.constexpr,
    PLANES: tl.constexpr,
    W_PAD: tl.constexpr,
    RESIDUAL_SIZE: tl.constexpr,
    UNIT_COST: tl.constexpr,
    STAGES: tl.constexpr,
):
    IS_FLOAT: tl.constexpr = PLANES == 1
    LOW_BIT: tl.constexpr = (FORMAT == "int4") or (FORMAT == "int2")
    W: tl.constexpr = HEAD_DIM // PLANES
    UNITS: tl.constexpr = NUM_KV_HEADS * ROW_BLOCKS  # of one sequence
    # Integer codes: K's planes are evened out in the query, around CENTRE; V's in the accumulators.
    CENTRE: tl.constexpr = 3 if FORMAT == "int2" else (2 if FORMAT == "int4" else 0)
    IS_INT: tl.constexpr = LOW_BIT or (FORMAT == "int8")
    K_UNIT: tl.constexpr = 2.0 ** (24 - CENTRE) if IS_INT else 1.0
    # float16 weights below 2^-24 vanish, and a long context has many of them beside one large: lift them all.
    LIFT: tl.constexpr = 0.0 if IS_FLOAT else 14.0
    SCALES: tl.constexpr = 2 * PAGE * W  # where they begin, in words

    w = tl.program_id(0)
    record = plan_ptr + w * RECORD
    b = tl.load(record)
    unit = tl.load(record + 1)
    at = tl.load(record + 2)
    count = tl.load(record + 3)
    seq_len = tl.load(record + 4)
    token0 = tl.load(record + 5)
    query_len = tl.load(record + 6)
    first_page = tl.load(record + 7)
    tiles = tl.load(record + 8)
    lead = tl.load(record + 9)

    rows = tl.arange(0, ROWS)
    tokens = tl.arange(0, PAGE)
    channels = tl.arange(0, W_PAD)
    in_plane = channels < W
    plane_rows = tl.arange(0, 16)
    planes = tl.arange(0, PLANES)
    pair_offsets = tokens[:, None] + PAGE * tl.arange(0, 2)[None, :]  # two vectors of the page's tokens, as columns
    k_offsets = tokens[:, None] * W + channels[None, :]
    v_offsets = PAGE * W + tokens[None, :] * W + channels[:, None]  # V as [channels, tokens]

    while count > 0:
        take = tl.minimum(lead + tiles - at, count)
        t0 = tl.maximum(at - lead, 0)
        t1 = tl.maximum(at + take - lead, 0)
        head = unit // ROW_BLOCKS
        context_len = seq_len - query_len

        # Row r of the unit: query token r // GROUP, head r % GROUP of the group.
        row = (unit % ROW_BLOCKS) * ROWS + rows
        row_query = row // GROUP
        row_valid = row_query < query_len
        row_limit = context_len + row_query + 1  # positions below it are seen
        row_head = head * GROUP + row % GROUP
        query_rows = query_ptr + (token0 + row_query).to(tl.int64) * query_stride_t + row_head * query_stride_h
        q = ()
        acc = ()
        for j in tl.static_range(PLANES):
            qj = tl.load(
                query_rows[None, :] + j * W + channels[:, None],
                mask=row_valid[None, :] & in_plane[:, None],
                other=0.0,
            )
            if not IS_FLOAT:
                qj = (qj.to(tl.float32) * (softmax_scale * 2.0 ** (CENTRE - _shift(j, FORMAT)))).to(tl.float16)
            q = q + (qj,)
            acc = acc + (tl.zeros([W_PAD, ROWS], tl.float32),)
        m = tl.full([ROWS], NEG_LARGE, tl.float32)
        norm = tl.zeros([ROWS], tl.float32)
        z = tl.zeros([ROWS], tl.float32)

        first_tile, last_tile = t0, t1
        if LOW_BIT:
            flushed_len = tl.load(flushed_lens_ptr + b)
            if seq_len > flushed_len:  # tile 0 is the residual window
                first_tile = tl.maximum(t0 - 1, 0)
                last_tile = tl.maximum(t1 - 1, 0)
        table = block_tables_ptr + b.to(tl.int64) * table_stride + first_page
        page = tl.load(table + first_tile, mask=first_tile < last_tile, other=0)
        for t in tl.range(first_tile, last_tile, num_stages=STAGES):
            base = cache_ptr + (page.to(tl.int64) * NUM_KV_HEADS + head) * PAGE_WORDS
            # One ahead and carried along: the pipeliner would give half its stages to a load that another waits for.
            page = tl.load(table + t + 1, mask=t + 1 < last_tile, other=0)
            position = (first_page + t) * PAGE + tokens
            in_seq = position < seq_len
            scales = base.to(tl.pointer_type(tl.float16), bitcast=True) + SCALES
            if W == W_PAD:
                kw = tl.load(base + k_offsets)
            else:
                kw = tl.load(base + k_offsets, mask=in_plane[None, :], other=0)
            s = tl.zeros([PAGE, ROWS], tl.float32)
            q_min = tl.zeros([ROWS], tl.float32)
            if LOW_BIT:
                # K's minima, a row per plane; row j of the product with plane j of the query is wanted.
                mins_mask = (plane_rows < PLANES)[:, None] & in_plane[None, :]
                mins = tl.load(
                    scales + HEAD_DIM + plane_rows[:, None] * W + channels[None, :], mask=mins_mask, other=0.0
                )
                picked = tl.zeros([16, ROWS], tl.float32)
                # One tile for all planes: a vector of one plane is too short for the asynchronous copies of a warp.
                ks_tile = tl.load(scales + planes[None, :] * W + channels[:, None], mask=in_plane[:, None], other=0.0)
                ks = _columns(ks_tile, W_PAD, PLANES)
                for j in tl.static_range(PLANES):
                    s = tl.dot(_plane(kw, j, FORMAT), q[j] * ks[j][:, None], s)
                    of_plane = tl.dot(mins, q[j]) * (2.0 ** (_shift(j, FORMAT) - CENTRE))
                    picked = tl.where((plane_rows == j)[:, None], of_plane, picked)
                q_min = tl.sum(picked, 0)
            else:
                for j in tl.static_range(PLANES):
                    s = tl.dot(_plane(kw, j, FORMAT), q[j], s, input_precision="ieee")

            # Logits in base 2. What is added per token: log2 of V's scale, −inf where there is no token.
            if IS_FLOAT:
                if SOFT_CAP:
                    s = _soft_cap(s * softmax_scale, soft_cap) * 1.4426950408889634
                else:
                    s = s * softmax_scale
                if MAX_QUERY == 1:
                    seen = in_seq
                    if WINDOW > 0:
                        seen = seen & (position >= seq_len - WINDOW)
                    s = tl.where(seen[:, None], s, float("-inf"))
            else:
                if LOW_BIT:
                    vs, vz = tl.split(tl.load(scales + 2 * HEAD_DIM + pair_offsets).to(tl.float32))
                    s_unit = tl.full([PAGE], K_UNIT, tl.float32)
                else:
                    s_unit, vs = tl.split(tl.load(scales + pair_offsets).to(tl.float32))
                    s_unit = s_unit * K_UNIT
                inv_vs = _reciprocal(vs)
                log_vs = _log2(vs)
                if not LOW_BIT:
                    inv_vs = tl.where(in_seq, inv_vs, 0.0)
                if MAX_QUERY == 1 and WINDOW > 0:
                    log_vs = tl.where(position >= seq_len - WINDOW, log_vs, float("-inf"))
                if SOFT_CAP:
                    s = s * s_unit[:, None] + q_min[None, :]
                    s = _soft_cap(s, soft_cap) * 1.4426950408889634 + log_vs[:, None]
                    q_min = tl.zeros([ROWS], tl.float32)
                else:
                    s = s * s_unit[:, None] + log_vs[:, None]
                if not LOW_BIT:
                    s = tl.where(in_seq[:, None], s, float("-inf"))
            if MAX_QUERY > 1:
                # Every query token sees the pages in the middle; only the ends need their masks.
                page_start = (first_page + t) * PAGE
                if page_start + PAGE > context_len + 1:
                    s = tl.where(position[:, None] < row_limit[None, :], s, float("-inf"))
                if WINDOW > 0:
                    if page_start < seq_len - WINDOW:
                        s = tl.where(position[:, None] >= row_limit[None, :] - WINDOW, s, float("-inf"))

            m_new = tl.maximum(m, tl.max(s, 0) + q_min)
            alpha = _exp2(m - m_new)
            p = _exp2(s - (m_new - q_min - LIFT)[None, :])
            m = m_new
            if IS_FLOAT:
                norm = norm * alpha + tl.sum(p, 0)
            else:
                norm = norm * alpha + tl.sum(p * inv_vs[:, None], 0)
            if LOW_BIT:
                z = z * alpha + tl.sum(p * (inv_vs * vz)[:, None], 0)
            if IS_FLOAT:
                v_mask = in_seq[None, :] & in_plane[:, None]
                vw = tl.load(base + v_offsets, mask=v_mask, other=0.0)
                weights = p.to(vw.dtype)
            else:
                if FORMAT == "fp8":
                    v_mask = in_seq[None, :] & in_plane[:, None]  # a byte beyond the sequence may read NaN
                    vw = tl.load(base + v_offsets, mask=v_mask, other=0)
                elif W == W_PAD:
                    vw = tl.load(base + v_offsets)
                else:
                    vw = tl.load(base + v_offsets, mask=in_plane[:, None], other=0)
                weights = p.to(tl.float16)
            updated = ()
            for j in tl.static_range(PLANES):
                vj = _plane(vw, j, FORMAT)
                updated = updated + (tl.dot(vj, weights, acc[j] * alpha[None, :], input_precision="ieee"),)
            acc = updated

        # Codes to values: the unit of each plane, and the tokens' minima, which all channels share.
        if not IS_FLOAT:
            values = ()
            for j in tl.static_range(PLANES):
                if IS_INT:
                    values = values + (acc[j] * 2.0 ** (24 - _shift(j, FORMAT)) + z[None, :],)
                else:
                    values = values + (acc[j],)
            acc = values

        if LOW_BIT:
            # The newest tokens, in full precision; the piece that begins the unit has them.
            residual_end = tl.where((t0 == 0) & (t1 > 0), seq_len, flushed_len)
            slot = tl.load(residual_slots_ptr + b).to(tl.int64)
            ring = residual_ptr + (slot * NUM_KV_HEADS + head) * (2 * RESIDUAL_SIZE * HEAD_DIM)
            for start in tl.range(flushed_len, residual_end, 32, num_stages=2):
                position = start + tl.arange(0, 32)
                in_seq = position < seq_len
                row_offsets = (position % RESIDUAL_SIZE) * HEAD_DIM
                k_rows = ring + row_offsets[:, None] + channels[None, :]
                v_rows = ring + RESIDUAL_SIZE * HEAD_DIM + row_offsets[None, :] + channels[:, None]
                k_mask = in_seq[:, None] & in_plane[None, :]
                v_mask = in_seq[None, :] & in_plane[:, None]
                s = tl.zeros([32, ROWS], tl.float32)
                for j in tl.static_range(PLANES):
                    # The factor that the query's planes carry comes off again; it is a power of two.
                    kj = tl.load(k_rows + j * W, mask=k_mask, other=0.0).to(tl.float16)
                    kj = (kj * 2.0 ** (_shift(j, FORMAT) - CENTRE)).to(tl.float16)
                    s = tl.dot(kj, q[j], s)
                if SOFT_CAP:
                    s = _soft_cap(s, soft_cap) * 1.4426950408889634
                seen = in_seq[:, None] & (position[:, None] < row_limit[None, :])
                if WINDOW > 0:
                    seen = seen & (position[:, None] >= row_limit[None, :] - WINDOW)
                s = tl.where(seen, s, float("-inf"))
                m_new = tl.maximum(m, tl.max(s, 0))
                alpha = _exp2(m - m_new)
                p = _exp2(s - (m_new - LIFT)[None, :])
                m = m_new
                norm = norm * alpha + tl.sum(p, 0)
                updated = ()
                for j in tl.static_range(PLANES):
                    vj = tl.load(v_rows + j * W, mask=v_mask, other=0.0).to(tl.float16)
                    updated = updated + (tl.dot(vj, p.to(tl.float16), acc[j] * alpha[None, :]),)
                acc = updated

        has_key = norm > 0.0
        lse = tl.where(has_key, m - LIFT + tl.log2(tl.where(has_key, norm, 1.0)), float("-inf"))
        inv_l = 1.0 / tl.where(has_key, norm, 1.0)
        valid = row_valid[None, :] & in_plane[:, None]
        if t0 == t1:
            pass  # the share ends before the unit's first tile
        elif (t0 == 0) & (t1 == tiles):
            out_rows = out_ptr + (token0 + row_query).to(tl.int64) * out_stride_t + row_head * out_stride_h
            for j in tl.static_range(PLANES):
                rounded = (acc[j] * inv_l[None, :]).to(out_ptr.dtype.element_ty)
                tl.store(out_rows[None, :] + j * W + channels[:, None], rounded, mask=valid)
            if HAS_LSE:
                lse_rows = lse_ptr + (token0 + row_query).to(tl.int64) * (NUM_KV_HEADS * GROUP) + row_head
                tl.store(lse_rows, lse * LN_2, mask=row_valid)
        else:
            # Slot 1 of the program for the piece that begins its unit, slot 0 for one that continues it.
            piece = (2 * w + (t0 == 0).to(tl.int32)) * ROWS + rows
            for j in tl.static_range(PLANES):
                partial = partial_out_ptr + piece[None, :] * HEAD_DIM + j * W + channels[:, None]
                tl.store(partial, acc[j] * inv_l[None, :], mask=valid)
            tl.store(partial_lse_ptr + piece, lse, mask=row_valid)
        count -= take
        at += take
        if at == lead + tiles:
            at = 0
            unit += 1
            if unit == UNITS:
                unit = 0
                tiles = 0
                while (tiles == 0) & (count > 0):
                    b += 1
                    seq_len, token0, query_len, first_page, tiles, lead = _sequence(
                        b, count > 0, seq_lens_ptr, query_start_ptr, flushed_lens_ptr, PAGE, WINDOW, LOW_BIT, UNIT_COST
                    )
    if USE_ASM:
        gdc_launch_dependents()


@triton.jit(do_not_specialize=["num_seqs", "num_programs"])
def _plan_kernel(
    seq_lens_ptr,
    query_start_ptr,
    flushed_lens_ptr,
    plan_ptr,
    num_seqs,
    num_programs,
    MIN_SHARE: tl.constexpr,
    UNIT_COST: tl.constexpr,
    PAGE: tl.constexpr,
    UNITS: tl.constexpr,
    WINDOW: tl.constexpr,
    LOW_BIT: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
):
    """Every program works out the whole line, and writes where the shares of some decode programs begin."""
    b = tl.arange(0, BLOCK_SEQS)
    _, _, _, _, tiles, lead = _sequence(
        b, b < num_seqs, seq_lens_ptr, query_start_ptr, flushed_lens_ptr, PAGE, WINDOW, LOW_BIT, UNIT_COST
    )
    length = tl.where(tiles > 0, UNITS * (lead + tiles), 0)
    through = tl.cumsum(length, 0)
    total = tl.sum(length, 0)
    base = tl.maximum(total // num_programs, MIN_SHARE)
    extra = tl.maximum(total - base * num_programs, 0)

    w = tl.program_id(0) * BLOCK_PROGRAMS + tl.arange(0, BLOCK_PROGRAMS)
    start = tl.minimum(w * base + tl.minimum(w, extra), total)
    count = tl.minimum(start + base + (w < extra).to(tl.int32), total) - start
    ended = through[None, :] <= start[:, None]
    b = tl.sum((ended & (tl.arange(0, BLOCK_SEQS) < num_seqs)[None, :]).to(tl.int32), 1)
    at = start - tl.sum(tl.where(ended, length[None, :], 0), 1)
    seq_len, token0, query_len, first_page, tiles, lead = _sequence(
        b, count > 0, seq_lens_ptr, query_start_ptr, flushed_lens_ptr, PAGE, WINDOW, LOW_BIT, UNIT_COST
    )
    unit_length = lead + tiles
    unit = at // unit_length
    at -= unit * unit_length
    # A unit that began in an earlier program and ends in this one: the program with its first tile, else −1.
    merges = (count > 0) & (at > lead) & (unit_length - at <= count)
    merge_from = tl.where(merges, _share_of(start - at + lead, base, extra), -1)
    record = plan_ptr + w * RECORD
    mask = w < num_programs
    tl.store(record, b, mask=mask)
    tl.store(record + 1, unit, mask=mask)
    tl.store(record + 2, at, mask=mask)
    tl.store(record + 3, count, mask=mask)
    tl.store(record + 4, seq_len, mask=mask)
    tl.store(record + 5, token0, mask=mask)
    tl.store(record + 6, query_len, mask=mask)
    tl.store(record + 7, first_page, mask=mask)
    tl.store(record + 8, tiles, mask=mask)
    tl.store(record + 9, lead, mask=mask)
    tl.store(record + 10, merge_from, mask=mask)


@triton.jit
def _merge_kernel(
    plan_ptr,
    out_ptr,
    lse_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    out_stride_t,
    out_stride_h,
    HEAD_DIM: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PIECES: tl.constexpr,
    ABREAST: tl.constexpr,
):
    """Merge the pieces of the unit that ends in decode program w and began in an earlier one; some rows of it.

    With normalised pieces o_i and base-2 log-sum-exps e_i: o = sum 2^(e_i − e) o_i, e = log2 sum 2^e_i. All that this
    kernel does is wait, so it has little code, and each piece of a row is a register of the same thread; very many
    pieces of few units (ABREAST) stand side by side in the threads instead.
    """
    if USE_ASM:
        gdc_wait()  # launched while the decode kernel still runs
    w = tl.program_id(0) + 1
    record = plan_ptr + w * RECORD
    first_w = tl.load(record + 10)
    if first_w >= 0:
        unit = tl.load(record + 1)
        token0 = tl.load(record + 5)
        query_len = tl.load(record + 6)
        r = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        row = (unit % ROW_BLOCKS) * ROWS + r
        row_valid = row // GROUP < query_len
        channels = tl.arange(0, D_PAD)
        offsets = r[:, None] * HEAD_DIM + channels[None, :]
        mask = row_valid[:, None] & (channels < HEAD_DIM)[None, :]
        acc = tl.zeros([BLOCK_ROWS, D_PAD], tl.float32)
        m = tl.full([BLOCK_ROWS], NEG_LARGE, tl.float32)
        norm = tl.zeros([BLOCK_ROWS], tl.float32)
        for start in tl.range(first_w, w + 1, PIECES):
            if ABREAST:
                piece_w = start + tl.arange(0, PIECES)
                piece = 2 * piece_w + (piece_w == first_w).to(tl.int32)
                valid = (piece_w <= w)[:, None] & row_valid[None, :]
                e = tl.load(partial_lse_ptr + piece[:, None] * ROWS + r[None, :], mask=valid, other=float("-inf"))
                values = partial_out_ptr + piece[:, None, None] * (ROWS * HEAD_DIM) + offsets[None, :, :]
                o = tl.load(values, mask=(piece_w <= w)[:, None, None] & mask[None, :, :], other=0.0)
                m_new = tl.maximum(m, tl.max(e, 0))
                alpha = _exp2(m - m_new)
                weights = _exp2(e - m_new[None, :])
                acc = acc * alpha[:, None] + tl.sum(o * weights[:, :, None], 0)
                norm = norm * alpha + tl.sum(weights, 0)
            else:
                es = ()
                os = ()
                m_new = m
                for i in tl.static_range(PIECES):
                    piece_w = start + i
                    piece = 2 * piece_w + (piece_w == first_w).to(tl.int32)
                    valid = row_valid & (piece_w <= w)
                    e = tl.load(partial_lse_ptr + piece * ROWS + r, mask=valid, other=float("-inf"))
                    values = partial_out_ptr + piece * (ROWS * HEAD_DIM) + offsets
                    es = es + (e,)
                    os = os + (tl.load(values, mask=mask & (piece_w <= w), other=0.0),)
                    m_new = tl.maximum(m_new, e)
                alpha = _exp2(m - m_new)
                acc = acc * alpha[:, None]
                norm = norm * alpha
                for i in tl.static_range(PIECES):
                    weight = _exp2(es[i] - m_new)
                    acc += os[i] * weight[:, None]
                    norm += weight
            m = m_new
        head = (unit // ROW_BLOCKS) * GROUP + row % GROUP
        token = (token0 + row // GROUP).to(tl.int64)
        has_key = norm > 0.0
        acc = acc * _reciprocal(tl.where(has_key, norm, 1.0))[:, None]
        out = out_ptr + (token * out_stride_t + head * out_stride_h)[:, None] + channels[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)
        if HAS_LSE:
            lse = tl.where(has_key, (m + tl.log2(tl.where(has_key, norm, 1.0))) * LN_2, float("-inf"))
            tl.store(lse_ptr + token * (NUM_KV_HEADS * GROUP) + head, lse, mask=row_valid)


@dataclass(frozen=True)
class DecodeConfig:
    """How a decode kernel is compiled and spread over the GPU.

    Attributes:
        num_warps: warps of a program.
        num_stages: pages in flight in a program, plus one.
        programs_per_sm: programs in the grid, per multiprocessor.
        min_share: least tiles worth a program of their own.
        unit_cost: what a unit costs beside its pages (its query, the latency of its first page, its output), in pages.
        max_registers: per thread, where the compiler would take too many for `programs_per_sm`.
    """

    num_warps: int
    num_stages: int
    programs_per_sm: int
    min_share: int = 2
    unit_cost: int = 2
    max_registers: int | None = None

    @property
    def launch_options(self) -> dict:
        """What the launch of the decode kernel is told."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.max_registers is not None and not INTERPRETING:
            options["maxnreg"] = self.max_registers
        return options


# Found by measurement on an H200, for head_dim 128 and pages of 64: by format, for up to 8 rows and for 16.
# programs_per_sm is what fits there at once, as a second wave would wait for the first.
CONFIGS = {
    "bfloat16": (DecodeConfig(4, 3, 3, unit_cost=1), DecodeConfig(4, 3, 2, unit_cost=1)),
    "float16": (DecodeConfig(4, 3, 3, unit_cost=1), DecodeConfig(4, 3, 2, unit_cost=1)),
    "float32": (DecodeConfig(4, 2, 1), DecodeConfig(4, 2, 1)),
    "fp8": (DecodeConfig(2, 4, 4), DecodeConfig(2, 4, 4)),
    "int8": (DecodeConfig(2, 4, 4), DecodeConfig(2, 4, 4)),
    "int4": (DecodeConfig(2, 3, 8, max_registers=128), DecodeConfig(1, 3, 8)),
    "int2": (DecodeConfig(1, 3, 12, max_registers=168), DecodeConfig(1, 3, 8)),
}


def choose_config(layout: PageLayout, rows: int) -> DecodeConfig:
    """The compilation for a format, and for tiles of other shapes than the measured ones something that fits."""
    few, more = CONFIGS[layout.kv_dtype]
    config = few if rows <= 8 else more
    widening = layout.head_dim * layout.page_size / (128 * 64) * max(rows / 16, 1)
    if widening <= 1:
        return config
    programs = max(int(config.programs_per_sm * config.num_warps / 4 / widening), 1)
    return DecodeConfig(4, 2 if widening > 2 else config.num_stages, programs)


MAX_ROWS = 64


@dataclass(frozen=True)
class DecodePlan:
    """The split of a step's decode work over the GPU, and the buffers for pieces; made by `plan_decode`.

    Attributes:
        table: int32 [num_programs, 16], written by the plan kernel: where each program's share begins.
        partial_out: float32 [2 · num_programs, rows, head_dim], partial_lse: float32 [2 · num_programs, rows].
    """

    layout: PageLayout
    num_q_heads: int
    num_kv_heads: int
    max_query_len: int
    window: int | None
    num_seqs: int
    num_programs: int
    config: DecodeConfig
    table: torch.Tensor
    partial_out: torch.Tensor
    partial_lse: torch.Tensor

    @property
    def group(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    @property
    def rows(self) -> int:
        """Rows of a program's matrix tile: a power of two that holds group · max_query_len, 64 at most."""
        return _rows(self.group * self.max_query_len)

    @property
    def row_blocks(self) -> int:
        return -(-self.group * self.max_query_len // self.rows)

    def update(
        self, seq_lens: torch.Tensor, query_start: torch.Tensor, flushed_lens: torch.Tensor | None = None
    ) -> None:
        """Split anew for other lengths of as many sequences; one small kernel, no synchronisation."""
        block_programs = 16
        _plan_kernel[(triton.cdiv(self.num_programs, block_programs),)](
            seq_lens,
            query_start,
            flushed_lens,
            self.table,
            self.num_seqs,
            self.num_programs,
            MIN_SHARE=self.config.min_share,
            UNIT_COST=self.config.unit_cost,
            PAGE=self.layout.page_size,
            UNITS=self.num_kv_heads * self.row_blocks,
            WINDOW=self.window or 0,
            LOW_BIT=self.layout.is_low_bit,
            BLOCK_SEQS=max(triton.next_power_of_2(self.num_seqs), 16),
            BLOCK_PROGRAMS=block_programs,
            num_warps=4,
        )


def _rows(needed: int) -> int:
    return min(max(triton.next_power_of_2(needed), 8), MAX_ROWS)


@functools.cache
def _num_sms(device: torch.device) -> int:
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def plan_decode(
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    layout: PageLayout,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    max_query_len: int = 1,
    window: int | None = None,
    flushed_lens: torch.Tensor | None = None,
    config: DecodeConfig | None = None,
) -> DecodePlan:
    """Split one step's decode attention over the GPU. Layers of the same shape and window share a plan.

    Inside a CUDA graph, make the plan before the capture and call its `update` within.

    Args:
        seq_lens: int32 [num_seqs], tokens of each sequence, the new ones included.
        query_start: int32 [num_seqs + 1], where each sequence's new tokens begin in the flat batch.
        flushed_lens: int32 [num_seqs], tokens in quantised pages; for int4 and int2.
        config: overrides the choice for this format; for measurements.

    Raises:
        ValueError: heads that do not divide, a query length out of 1 to 16, a window below 1, or flushed_lens missing.
    """
    checks.head_ratio(num_q_heads, num_kv_heads)
    if not 1 <= max_query_len <= MAX_QUERY_LEN:
        raise ValueError(f"max_query_len is {max_query_len}; it must be 1 to {MAX_QUERY_LEN}")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1, or None for full attention")
    if layout.is_low_bit and flushed_lens is None:
        raise ValueError(f"flushed_lens is missing; {layout.kv_dtype} needs the tokens in quantised pages")
    device, num_seqs = seq_lens.device, seq_lens.shape[0]
    rows = _rows(num_q_heads // num_kv_heads * max_query_len)
    config = config or choose_config(layout, rows)
    num_programs = _num_sms(device) * config.programs_per_sm
    plan = DecodePlan(
        layout,
        num_q_heads,
        num_kv_heads,
        max_query_len,
        window,
        num_seqs,
        num_programs,
        config,
        table=torch.empty(num_programs, RECORD.value, dtype=torch.int32, device=device),
        partial_out=torch.empty(2 * num_programs, rows, layout.head_dim, dtype=torch.float32, device=device),
        partial_lse=torch.empty(2 * num_programs, rows, dtype=torch.float32, device=device),
    )
    plan.update(seq_lens, query_start, flushed_lens)
    return plan


def decode_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    layout: PageLayout,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    *,
    max_query_len: int = 1,
    plan: DecodePlan | None = None,
    residual: torch.Tensor | None = None,
    residual_slots: torch.Tensor | None = None,
    flushed_lens: torch.Tensor | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    softmax_scale: float | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    check: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of each sequence's newest 1 to 16 tokens over all its tokens in the cache, their own included.

    Args:
        query: [num_tokens, num_q_heads, head_dim], sequence after sequence, RoPE applied.
        cache: uint8 [num_pages, num_kv_heads, page_bytes], the new tokens written already.
        block_tables: int32 [num_seqs, max_pages], page ids of each sequence in order of position.
        seq_lens: int32 [num_seqs], tokens of each sequence in the cache, the new ones included.
        query_start: int32 [num_seqs + 1]; sequence b's tokens are rows query_start[b] to query_start[b + 1]. Sequences
            without new tokens (padding) are passed over and their rows are not written.
        max_query_len: new tokens of any sequence at most, 1 to 16.
        plan: from `plan_decode` for these lengths; made here if missing.
        residual, residual_slots, flushed_lens: for int4 and int2, [num_slots, num_kv_heads, 2, residual_size,
            head_dim], and int32 [num_seqs] each; see `kernels.pages`.
        window: a token sees this many tokens, itself included; None for all.
        soft_cap: logits are soft_cap · tanh(logits / soft_cap) (Gemma-2).
        softmax_scale: head_dim ** -0.5 if None.
        check: look at the arguments; waits for the GPU. False inside CUDA graphs and on the hot path.

    Returns:
        out like query, and with return_lse the natural log-sum-exp of the logits, float32 [num_tokens, num_q_heads].

    Raises:
        ValueError: an argument of the wrong type, shape, device or content, when `check` is set.
    """
    num_tokens, num_q_heads, head_dim = query.shape
    num_kv_heads = cache.shape[1]
    if check:
        _check(query, cache, layout, block_tables, seq_lens, query_start, max_query_len)
        if out is not None:
            checks.tensor("out", out, shape=tuple(query.shape), dtypes=(query.dtype,), device=query.device)
        if soft_cap is not None and not soft_cap > 0:
            raise ValueError(f"soft_cap is {soft_cap}; it must be above 0, or None")
        _check_residual(layout, residual, residual_slots, flushed_lens, seq_lens, num_kv_heads, block_tables)
    if plan is None:
        plan = plan_decode(
            seq_lens,
            query_start,
            layout,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            max_query_len=max_query_len,
            window=window,
            flushed_lens=flushed_lens,
        )
    elif check:
        _check_plan(plan, layout, num_q_heads, num_kv_heads, max_query_len, window, seq_lens.shape[0])
    if out is None:
        out = torch.empty_like(query)
    lse = torch.empty(num_tokens, num_q_heads, dtype=torch.float32, device=query.device) if return_lse else None
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    config, words = plan.config, layout.words
    _decode_kernel[(plan.num_programs,)](
        query,
        cache.view(layout.word_dtype),
        block_tables,
        seq_lens,
        query_start,
        plan.table,
        out,
        lse,
        plan.partial_out,
        plan.partial_lse,
        residual,
        residual_slots,
        flushed_lens,
        scale if soft_cap else scale * LOG2_E,
        soft_cap or 0.0,
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
        block_tables.stride(0),
        FORMAT=layout.kv_dtype,
        HEAD_DIM=head_dim,
        PAGE=layout.page_size,
        PAGE_WORDS=layout.page_bytes // layout.word_dtype.itemsize,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=plan.group,
        MAX_QUERY=plan.max_query_len,
        ROWS=plan.rows,
        ROW_BLOCKS=plan.row_blocks,
        WINDOW=window or 0,
        SOFT_CAP=bool(soft_cap),
        HAS_LSE=return_lse,
        PLANES=layout.planes,
        W_PAD=max(triton.next_power_of_2(words), 16),
        RESIDUAL_SIZE=layout.residual_size,
        UNIT_COST=config.unit_cost,
        STAGES=config.num_stages,
        **config.launch_options,
    )
    needed_rows = min(plan.rows, triton.next_power_of_2(plan.group * plan.max_query_len))
    pieces = triton.next_power_of_2(1 + plan.num_programs // max(plan.num_seqs * num_kv_heads * plan.row_blocks, 1))
    abreast = pieces > 16
    pieces = min(pieces, 32)
    block_rows = 1 if abreast else min(needed_rows, 4)
    _merge_kernel[(plan.num_programs - 1, needed_rows // block_rows)](
        plan.table,
        out,
        lse,
        plan.partial_out,
        plan.partial_lse,
        out.stride(0),
        out.stride(1),
        HEAD_DIM=head_dim,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=plan.group,
        ROWS=plan.rows,
        ROW_BLOCKS=plan.row_blocks,
        HAS_LSE=return_lse,
        D_PAD=triton.next_power_of_2(head_dim),
        BLOCK_ROWS=block_rows,
        PIECES=max(pieces, 2),
        ABREAST=abreast,
        num_warps=4,
        **({} if INTERPRETING else {"launch_pdl": True}),
    )
    return (out, lse) if return_lse else out


def _check(query, cache, layout, block_tables, seq_lens, query_start, max_query_len) -> None:
    device = query.device
    if not 1 <= max_query_len <= MAX_QUERY_LEN:
        raise ValueError(f"max_query_len is {max_query_len}; it must be 1 to {MAX_QUERY_LEN}")
    floats, ints = (torch.bfloat16, torch.float16, torch.float32), (torch.int32,)
    checks.tensor("query", query, shape=(None, None, layout.head_dim), dtypes=floats, device=device)
    checks.cache(cache, layout, None, device)
    checks.head_ratio(query.shape[1], cache.shape[1])
    if layout.is_float and query.dtype != layout.word_dtype:
        raise ValueError(f"query is {query.dtype}; it must be {layout.word_dtype} as the cache's {layout.kv_dtype}")
    checks.tensor("seq_lens", seq_lens, shape=(None,), dtypes=ints, device=device)
    num_seqs = seq_lens.shape[0]
    checks.tensor("block_tables", block_tables, shape=(num_seqs, None), dtypes=ints, device=device)
    checks.tensor("query_start", query_start, shape=(num_seqs + 1,), dtypes=ints, device=device)
    checks.block_tables_and_lengths(block_tables, seq_lens, query_start, cache.shape[0], layout.page_size)
    if num_seqs and int(query_start.diff().max()) > max_query_len:
        longest = int(query_start.diff().max())
        raise ValueError(f"max_query_len is {max_query_len}; a sequence has {longest} new tokens")
    if num_seqs and int(query_start[-1]) > query.shape[0]:
        raise ValueError(f"query_start ends at {int(query_start[-1])}; query has {query.shape[0]} tokens")


def _check_residual(layout, residual, residual_slots, flushed_lens, seq_lens, num_kv_heads, block_tables) -> None:
    given = {"residual": residual, "residual_slots": residual_slots, "flushed_lens": flushed_lens}
    if not layout.is_low_bit:
        return
    for name, value in given.items():
        if value is None:
            raise ValueError(f"{name} is missing; {layout.kv_dtype} keeps the newest tokens in a residual window")
    device, num_seqs = seq_lens.device, seq_lens.shape[0]
    shape = (None, num_kv_heads, 2, layout.residual_size, layout.head_dim)
    floats = (torch.bfloat16, torch.float16, torch.float32)
    checks.tensor("residual", residual, shape=shape, dtypes=floats, device=device, contiguous=True)
    for name in ("residual_slots", "flushed_lens"):
        checks.tensor(name, given[name], shape=(num_seqs,), dtypes=(torch.int32,), device=device)
    wrong = (residual_slots < 0) | (residual_slots >= residual.shape[0])
    if wrong.any():
        b = int(wrong.nonzero()[0])
        raise ValueError(
            f"residual_slots[{b}] is {int(residual_slots[b])}; "
            f"it must be a slot of residual, 0 to {residual.shape[0] - 1}"
        )
    pending = seq_lens - flushed_lens
    wrong = (
        (flushed_lens % layout.page_size != 0) | (pending < 0) | (pending > layout.residual_size) | (flushed_lens < 0)
    )
    if wrong.any():
        b = int(wrong.nonzero()[0])
        raise ValueError(
            f"flushed_lens[{b}] is {int(flushed_lens[b])}; it must be a multiple of {layout.page_size} at most "
            f"{layout.residual_size} below the sequence's {int(seq_lens[b])} tokens"
        )


def _check_plan(plan, layout, num_q_heads, num_kv_heads, max_query_len, window, num_seqs) -> None:
    made = (plan.layout, plan.num_q_heads, plan.num_kv_heads, plan.max_query_len, plan.window, plan.num_seqs)
    asked = (layout, num_q_heads, num_kv_heads, max_query_len, window, num_seqs)
    names = ("layout", "num_q_heads", "num_kv_heads", "max_query_len", "window", "num_seqs")
    for name, was, now in zip(names, made, asked, strict=True):
        if was != now:
            raise ValueError(f"plan was made for {name} {was}; this call has {now}")
