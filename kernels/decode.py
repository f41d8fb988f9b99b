"""Decode and verify attention: queries of 1 to 16 tokens per sequence over a paged, possibly quantised KV cache.

The work is bound by reading KV once, so everything here serves that stream:

- **Rows.** The query heads that share a KV head, times the query tokens, are the rows of one matrix tile (GQA packing):
  KV is read once for all of them. Tokens and channels are the long sides of the two products (K·Qᵀ and Vᵀ·Pᵀ), so that
  the padding of a few rows is to eight, not to sixteen.
- **Split.** Every program has an equally long share of all pages (`kernels.decode_plan`). A program that holds a whole
  unit writes its output; pieces of a unit go to partial buffers, of which a program needs at most two, and a second
  kernel merges them.
- **Dequantisation** is one AND for two codes (`kernels.planes`). K's channel scales multiply the query once per page,
  its minima add one number per row and page; V's token scales join the exponent, p · v_scale =
  exp2(s + log2 v_scale − m), and their inverse the softmax sum.
- **The stream.** Pages come through asynchronous copies, a few ahead. Whatever else a page needs (scales, minima, the
  next page's id) must too: one load that is waited for in the loop costs more than all arithmetic.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import checks
from kernels.decode_plan import RECORD, DecodePlan, plan_decode, sequence
from kernels.interpreting import INTERPRETING
from kernels.launching import Launcher
from kernels.pages import MAX_QUERY_LEN, PageLayout
from kernels.planes import LN_2, LOG2_E, USE_ASM, columns_of, exp2, plane, reciprocal, shift, soft_cap_of
from kernels.planes import log2 as log2_of

NEG_LARGE = tl.constexpr(-1.0e30)


@triton.jit
def _attend_residual(
    ring,
    begin,
    end,
    q,
    acc,
    m,
    norm,
    row_limit,
    soft_cap,
    FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PLANES: tl.constexpr,
    W_PAD: tl.constexpr,
    RESIDUAL_SIZE: tl.constexpr,
    CENTRE: tl.constexpr,
    LIFT: tl.constexpr,
):
    """Go on with the softmax over the tokens at positions begin .. end of one head's residual window."""
    W: tl.constexpr = HEAD_DIM // PLANES
    channels = tl.arange(0, W_PAD)
    in_plane = channels < W
    for start in tl.range(begin, end, 32, num_stages=2):
        position = start + tl.arange(0, 32)
        in_seq = position < end
        row_offsets = (position % RESIDUAL_SIZE) * HEAD_DIM
        k_rows = ring + row_offsets[:, None] + channels[None, :]
        v_rows = ring + RESIDUAL_SIZE * HEAD_DIM + row_offsets[None, :] + channels[:, None]
        k_mask = in_seq[:, None] & in_plane[None, :]
        v_mask = in_seq[None, :] & in_plane[:, None]
        s = tl.zeros([32, ROWS], tl.float32)
        for j in tl.static_range(PLANES):
            # The factor that the query's planes carry comes off again; it is a power of two.
            kj = tl.load(k_rows + j * W, mask=k_mask, other=0.0).to(tl.float16)
            kj = (kj * 2.0 ** (shift(j, FORMAT) - CENTRE)).to(tl.float16)
            s = tl.dot(kj, q[j], s)
        if SOFT_CAP:
            s = soft_cap_of(s, soft_cap) * LOG2_E
        seen = in_seq[:, None] & (position[:, None] < row_limit[None, :])
        if WINDOW > 0:
            seen = seen & (position[:, None] >= row_limit[None, :] - WINDOW)
        s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 0))
        alpha = exp2(m - m_new)
        p = exp2(s - (m_new - LIFT)[None, :])
        m = m_new
        norm = norm * alpha + tl.sum(p, 0)
        updated = ()
        for j in tl.static_range(PLANES):
            vj = tl.load(v_rows + j * W, mask=v_mask, other=0.0).to(tl.float16)
            updated = updated + (tl.dot(vj, p.to(tl.float16), acc[j] * alpha[None, :]),)
        acc = updated
    return acc, m, norm


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
                qj = (qj.to(tl.float32) * (softmax_scale * 2.0 ** (CENTRE - shift(j, FORMAT)))).to(tl.float16)
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
                ks = columns_of(ks_tile, W_PAD, PLANES)
                for j in tl.static_range(PLANES):
                    s = tl.dot(plane(kw, j, FORMAT), q[j] * ks[j][:, None], s)
                    of_plane = tl.dot(mins, q[j]) * (2.0 ** (shift(j, FORMAT) - CENTRE))
                    picked = tl.where((plane_rows == j)[:, None], of_plane, picked)
                q_min = tl.sum(picked, 0)
            else:
                for j in tl.static_range(PLANES):
                    s = tl.dot(plane(kw, j, FORMAT), q[j], s, input_precision="ieee")

            # Logits in base 2. What is added per token: log2 of V's scale, −inf where there is no token.
            if IS_FLOAT:
                if SOFT_CAP:
                    s = soft_cap_of(s * softmax_scale, soft_cap) * LOG2_E
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
                inv_vs = reciprocal(vs)
                log_vs = log2_of(vs)
                if not LOW_BIT:
                    inv_vs = tl.where(in_seq, inv_vs, 0.0)
                if MAX_QUERY == 1 and WINDOW > 0:
                    log_vs = tl.where(position >= seq_len - WINDOW, log_vs, float("-inf"))
                if SOFT_CAP:
                    s = s * s_unit[:, None] + q_min[None, :]
                    s = soft_cap_of(s, soft_cap) * LOG2_E + log_vs[:, None]
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
            alpha = exp2(m - m_new)
            p = exp2(s - (m_new - q_min - LIFT)[None, :])
            m = m_new
            if IS_FLOAT:
                norm = norm * alpha + tl.sum(p, 0)
            else:
                norm = norm * alpha + tl.sum(p * inv_vs[:, None], 0)
            if LOW_BIT:
                z = z * alpha + tl.sum(p * (inv_vs * vz)[:, None], 0)
            if IS_FLOAT or FORMAT == "fp8":  # what lies beyond the sequence may read NaN
                vw = tl.load(base + v_offsets, mask=in_seq[None, :] & in_plane[:, None], other=0)
            elif W == W_PAD:
                vw = tl.load(base + v_offsets)
            else:
                vw = tl.load(base + v_offsets, mask=in_plane[:, None], other=0)
            weights = p.to(vw.dtype if IS_FLOAT else tl.float16)
            updated = ()
            for j in tl.static_range(PLANES):
                vj = plane(vw, j, FORMAT)
                updated = updated + (tl.dot(vj, weights, acc[j] * alpha[None, :], input_precision="ieee"),)
            acc = updated

        # Codes to values: the unit of each plane, and the tokens' minima, which all channels share.
        if not IS_FLOAT:
            values = ()
            for j in tl.static_range(PLANES):
                if IS_INT:
                    values = values + (acc[j] * 2.0 ** (24 - shift(j, FORMAT)) + z[None, :],)
                else:
                    values = values + (acc[j],)
            acc = values

        if LOW_BIT:
            # The newest tokens, in full precision; the piece that begins the unit has them.
            slot = tl.load(residual_slots_ptr + b).to(tl.int64)
            acc, m, norm = _attend_residual(
                residual_ptr + (slot * NUM_KV_HEADS + head) * (2 * RESIDUAL_SIZE * HEAD_DIM),
                flushed_len,
                tl.where((t0 == 0) & (t1 > 0), seq_len, flushed_len),
                q,
                acc,
                m,
                norm,
                row_limit,
                soft_cap,
                FORMAT,
                HEAD_DIM,
                ROWS,
                WINDOW,
                SOFT_CAP,
                PLANES,
                W_PAD,
                RESIDUAL_SIZE,
                CENTRE,
                LIFT,
            )

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
                    seq_len, token0, query_len, first_page, tiles, lead = sequence(
                        b, count > 0, seq_lens_ptr, query_start_ptr, flushed_lens_ptr, PAGE, WINDOW, LOW_BIT, UNIT_COST
                    )
    if USE_ASM:
        gdc_launch_dependents()


@triton.jit
def _merge_kernel(
    plan_ptr,
    merging_ptr,
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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    PIECES: tl.constexpr,
    FEW_UNITS: tl.constexpr,
):
    """Merge the pieces of the unit that ends in decode program w and began in an earlier one; some rows of it.

    With normalised pieces o_i and base-2 log-sum-exps e_i: o = sum 2^(e_i − e) o_i, e = log2 sum 2^e_i. All that this
    kernel does is wait, so it has little code, and each piece of a row is a register of the same thread.

    FEW_UNITS have very many pieces each. These stand side by side in the threads, some channels of them in a program;
    and there is a program for each unit rather than for each w, as thousands that find nothing to do cost microseconds.
    """
    if FEW_UNITS:
        w = tl.load(merging_ptr + tl.program_id(0))
        first_w = tl.load(plan_ptr + w * RECORD + 10, mask=w >= 0, other=-1)
    else:
        w = tl.program_id(0) + 1
        first_w = tl.load(plan_ptr + w * RECORD + 10)
    record = plan_ptr + w * RECORD
    if USE_ASM:
        gdc_wait()  # launched while the decode kernel still runs, but the plan is older than both
    if first_w >= 0:
        unit = tl.load(record + 1)
        token0 = tl.load(record + 5)
        query_len = tl.load(record + 6)
        r = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        row = (unit % ROW_BLOCKS) * ROWS + r
        row_valid = row // GROUP < query_len
        channels = tl.program_id(2) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
        offsets = r[:, None] * HEAD_DIM + channels[None, :]
        mask = row_valid[:, None] & (channels < HEAD_DIM)[None, :]
        acc = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
        m = tl.full([BLOCK_ROWS], NEG_LARGE, tl.float32)
        norm = tl.zeros([BLOCK_ROWS], tl.float32)
        for start in tl.range(first_w, w + 1, PIECES):
            if FEW_UNITS:
                piece_w = start + tl.arange(0, PIECES)
                piece = 2 * piece_w + (piece_w == first_w).to(tl.int32)
                valid = (piece_w <= w)[:, None] & row_valid[None, :]
                e = tl.load(partial_lse_ptr + piece[:, None] * ROWS + r[None, :], mask=valid, other=float("-inf"))
                values = partial_out_ptr + piece[:, None, None] * (ROWS * HEAD_DIM) + offsets[None, :, :]
                o = tl.load(values, mask=(piece_w <= w)[:, None, None] & mask[None, :, :], other=0.0)
                m_new = tl.maximum(m, tl.max(e, 0))
                alpha = exp2(m - m_new)
                weights = exp2(e - m_new[None, :])
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
                alpha = exp2(m - m_new)
                acc = acc * alpha[:, None]
                norm = norm * alpha
                for i in tl.static_range(PIECES):
                    weight = exp2(es[i] - m_new)
                    acc += os[i] * weight[:, None]
                    norm += weight
            m = m_new
        head = (unit // ROW_BLOCKS) * GROUP + row % GROUP
        token = (token0 + row // GROUP).to(tl.int64)
        has_key = norm > 0.0
        acc = acc * reciprocal(tl.where(has_key, norm, 1.0))[:, None]
        out = out_ptr + (token * out_stride_t + head * out_stride_h)[:, None] + channels[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)
        if HAS_LSE:
            lse = tl.where(has_key, (m + tl.log2(tl.where(has_key, norm, 1.0))) * LN_2, float("-inf"))
            lse_mask = row_valid & (tl.program_id(2) == 0)
            tl.store(lse_ptr + token * (NUM_KV_HEADS * GROUP) + head, lse, mask=lse_mask)


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
        plan: from `plan_decode`, brought to these lengths by `DecodePlan.update`; made here if None.
        residual, residual_slots, flushed_lens: for int4 and int2, [num_slots, num_kv_heads, 2, residual_size,
            head_dim], and int32 [num_seqs] each; see `kernels.pages`.
        window: a token sees this many tokens, itself included; None for all.
        soft_cap: logits are soft_cap · tanh(logits / soft_cap) (Gemma-2).
        softmax_scale: head_dim ** -0.5 if None.
        check: look at the arguments and their contents; waits for the GPU. False inside CUDA graphs and on the hot
            path, where wrong arguments give wrong results or faults.

    Returns:
        out like query, and with return_lse the natural log-sum-exp of the logits, float32 [num_tokens, num_q_heads].

    Raises:
        ValueError: an argument of the wrong type, shape, device or content, when `check` is set.
    """
    if check:
        _check(query, cache, layout, block_tables, seq_lens, query_start, max_query_len)
        _check_residual(layout, residual, residual_slots, flushed_lens, seq_lens, query_start, cache.shape[1])
        if out is not None:
            checks.tensor("out", out, shape=tuple(query.shape), dtypes=(query.dtype,), device=query.device)
            checks.no_overlap("out", out)
        if soft_cap is not None:
            checks.positive("soft_cap", soft_cap)
        if softmax_scale is not None:
            checks.positive("softmax_scale", softmax_scale)
    num_tokens, num_q_heads, head_dim = query.shape
    num_kv_heads = cache.shape[1]
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
            check=check,
        )
    elif check:
        _check_plan(plan, layout, num_q_heads, num_kv_heads, max_query_len, window, seq_lens.shape[0])
        if not plan.is_for(seq_lens, query_start, flushed_lens):
            raise ValueError("plan is that of other lengths; call plan.update with those of this step first")
    if out is None:
        out = torch.empty_like(query)
    lse = torch.empty(num_tokens, num_q_heads, dtype=torch.float32, device=query.device) if return_lse else None
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    config, words = plan.config, layout.words
    _decode_launcher[(plan.num_programs,)](
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
        scale if soft_cap else scale * LOG2_E.value,
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
        WINDOW=plan.window or 0,
        SOFT_CAP=bool(soft_cap),
        HAS_LSE=return_lse,
        PLANES=layout.planes,
        W_PAD=max(triton.next_power_of_2(words), 16),
        RESIDUAL_SIZE=layout.residual_size,
        UNIT_COST=config.unit_cost,
        STAGES=config.num_stages,
        **config.launch_options,
    )
    _merge(plan, out, lse)
    return (out, lse) if return_lse else out


_decode_launcher, _merge_launcher = Launcher(_decode_kernel), Launcher(_merge_kernel)


def _merge(plan: DecodePlan, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Launch the merge of all units in pieces."""
    grid, block_rows, block_channels, pieces = plan.merging_tiles
    _merge_launcher[grid](
        plan.table,
        plan.merging,
        out,
        lse,
        plan.partial_out,
        plan.partial_lse,
        out.stride(0),
        out.stride(1),
        HEAD_DIM=plan.layout.head_dim,
        NUM_KV_HEADS=plan.num_kv_heads,
        GROUP=plan.group,
        ROWS=plan.rows,
        ROW_BLOCKS=plan.row_blocks,
        HAS_LSE=lse is not None,
        BLOCK_ROWS=block_rows,
        BLOCK_CHANNELS=block_channels,
        PIECES=pieces,
        FEW_UNITS=plan.has_few_units,
        num_warps=4,
        **({} if INTERPRETING else {"launch_pdl": True}),
    )


def _check(query, cache, layout, block_tables, seq_lens, query_start, max_query_len) -> None:
    named = {"block_tables": block_tables, "seq_lens": seq_lens, "query_start": query_start}
    checks.tensors(query=query, cache=cache, **named)
    checks.page_layout("layout", layout)
    checks.integer("max_query_len", max_query_len, 1, MAX_QUERY_LEN)
    device = query.device
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
    longest = int(query_start.diff().max()) if num_seqs else 0
    if longest > max_query_len:
        raise ValueError(f"max_query_len is {max_query_len}; a sequence has {longest} new tokens")
    if num_seqs and int(query_start[-1]) > query.shape[0]:
        raise ValueError(f"query_start ends at {int(query_start[-1])}; query has {query.shape[0]} tokens")


def _check_residual(layout, residual, residual_slots, flushed_lens, seq_lens, query_start, num_kv_heads) -> None:
    given = {"residual": residual, "residual_slots": residual_slots, "flushed_lens": flushed_lens}
    if not layout.is_low_bit:
        return
    for name, value in given.items():
        if value is None:
            raise ValueError(f"{name} is None; {layout.kv_dtype} keeps the newest tokens in a residual window")
    floats = (torch.bfloat16, torch.float16, torch.float32)
    checks.residual_windows(
        residual, residual_slots, flushed_lens, layout, num_kv_heads, seq_lens.shape[0], seq_lens.device, floats
    )
    checks.flushed_lengths(flushed_lens, seq_lens, layout, active=query_start.diff() > 0)


def _check_plan(plan, layout, num_q_heads, num_kv_heads, max_query_len, window, num_seqs) -> None:
    if not isinstance(plan, DecodePlan):
        raise ValueError(f"plan is a {type(plan).__name__}; it must be a DecodePlan, which plan_decode makes")
    made = (plan.layout, plan.num_q_heads, plan.num_kv_heads, plan.max_query_len, plan.window, plan.num_seqs)
    asked = (layout, num_q_heads, num_kv_heads, max_query_len, window, num_seqs)
    names = ("layout", "num_q_heads", "num_kv_heads", "max_query_len", "window", "num_seqs")
    for name, was, now in zip(names, made, asked, strict=True):
        if was != now:
            raise ValueError(f"plan was made for {name} {was}; this call has {now}")
