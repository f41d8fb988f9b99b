"""Sampling and speculative verification as Triton kernels: all on the GPU, no synchronisation, fit for CUDA graphs.

The vocabulary is read once, by many programs per row, and leaves two numbers for every group of 32 tokens: the largest
logit and the sum of exponentials. The rest is one program per row over these:

    logits ──group_stats──> max, sum of each group ──finish_rows──> token (sample)
                                                   └──────────────> row: what turns a logit into a probability
    row, draft ──accept──> number of accepted drafts ──residual──> sums of max(0, p − q) per group ──emit──> tokens

How a token is drawn from sums of groups, and where random numbers come from, `kernels.reference.sampling` defines; a
kernel draws the same tokens as the reference, unless two candidates are within float32 rounding of one another.

Filters. Top-k, top-p and min-p each keep every token from some logit on. Group maxima bound that logit from below: k
groups reach the k-th largest maximum, so k logits do. Only groups that reach the bound are then read again, 32 · k
logits at most, and the threshold is found by search: each pass over them counts what reaches 7 values between the
bounds, and ends when all logits between the bounds are equal. For top-p the bound comes from what lies below it: sums
of the groups that end below, and 31 tokens of the others. Top-p
without top-k is the slow case, whatever the distribution, as one program searches much of the row: six or seven passes
over all of a flat one, whose nucleus is half the vocabulary. Measured: 406 µs for one peaked row and 453 µs for one
flat row (256 rows: 0.89 and 0.98 ms), but 23 µs for one row with top-k, top-p and min-p together.
"""

import torch
import triton
import triton.language as tl

from kernels import checks
from kernels.reference import sampling as reference

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int32, torch.int64)
MAX_VOCAB = 2**18

GROUP = tl.constexpr(reference.GROUP)
GREEDY_BELOW = tl.constexpr(reference.GREEDY_BELOW)
GROUP_RACE = tl.constexpr(reference.GROUP_RACE)
TOKEN_RACE = tl.constexpr(reference.TOKEN_RACE)
ACCEPT = tl.constexpr(reference.ACCEPT)

STATS_TILE = 64  # groups per program of group_stats: 2,048 logits, 16 per thread
MAX_GROUPS = tl.constexpr(MAX_VOCAB // reference.GROUP)
LIST_TILE = tl.constexpr(64)  # groups read at once in a search
LOWEST = tl.constexpr(-3.4028234e38)  # of finite float32 numbers
INFINITY = tl.constexpr(float("inf"))

# ---- random numbers ------------------------------------------------------------------------------------------------


@triton.jit
def _random_bits(seed, position, index, PURPOSE: tl.constexpr, STREAM: tl.constexpr):
    purpose = tl.full([], 4 * STREAM + PURPOSE, tl.int32)
    return tl.philox(seed, index, position.to(tl.int32), (position >> 32).to(tl.int32), purpose)[0]


@triton.jit
def _exponential(bits):
    """−log(1 − u). Near 0 by its series, as 1 − u has no digits left there; and those numbers win the races."""
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1 - 2.0**-24)
    series = u * (1 + u * (0.5 + u * (1 / 3 + u * (0.25 + u * 0.2))))
    return tl.where(u < 1 / 64, series, -tl.log(1 - u))


@triton.jit
def _race(weights, indices, seed, position, PURPOSE: tl.constexpr, STREAM: tl.constexpr):
    """Scores of an exponential race; what has no weight cannot win."""
    times = _exponential(_random_bits(seed, position, indices, PURPOSE, STREAM))
    return tl.where(weights > 0, weights / times, -1.0)


# ---- rows of logits ------------------------------------------------------------------------------------------------


@triton.jit
def _row_offset(b, i, query_start_ptr, seq_stride, row_stride):
    """Where row i of sequence b begins, in elements: rows flat as query_start has them, or [num_seqs, rows]."""
    offset = b * seq_stride + i * row_stride
    if query_start_ptr is not None:
        offset = (tl.load(query_start_ptr + b) + i).to(tl.int64) * row_stride
    return offset


@triton.jit
def _temperature(temperature_ptr, b):
    """Whether a request is greedy, and the factor for its logits."""
    temperature = tl.full([], 1.0, tl.float32)
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + b)
    greedy = temperature < GREEDY_BELOW
    return greedy, 1.0 / tl.where(greedy, 1.0, temperature)


@triton.jit
def group_stats_kernel(
    logits_ptr,
    query_start_ptr,
    draft_lens_ptr,
    temperature_ptr,
    max_ptr,
    sum_ptr,
    seq_stride,
    row_stride,
    vocab,
    num_groups,
    TILE: tl.constexpr,
):
    """Of TILE groups of a row: the largest logit, and Σ exp((logit − largest) / temperature)."""
    b, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if draft_lens_ptr is not None and i > tl.load(draft_lens_ptr + b):
        return
    offset = _row_offset(b, i, query_start_ptr, seq_stride, row_stride)
    _, factor = _temperature(temperature_ptr, b)
    groups = tl.program_id(2) * TILE + tl.arange(0, TILE)
    cols = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    logits = tl.load(logits_ptr + offset + cols, mask=cols < vocab, other=-INFINITY).to(tl.float32)
    largest = tl.max(logits, axis=1)
    base = tl.where(largest == -INFINITY, 0.0, largest)
    sums = tl.sum(tl.exp((logits - base[:, None]) * factor), axis=1)
    row = b * tl.num_programs(1) + i
    tl.store(max_ptr + row * num_groups + groups, largest, mask=groups < num_groups)
    tl.store(sum_ptr + row * num_groups + groups, sums, mask=groups < num_groups)


# ---- thresholds of the filters -------------------------------------------------------------------------------------


@triton.jit
def _top_k_bound(maxima, k, top):
    """A value that at least k of the maxima reach, and as a rule no more than k."""
    finite = maxima > -INFINITY
    count = tl.sum(finite.to(tl.int32))
    low = tl.where(count < k, LOWEST, tl.min(tl.where(finite, maxima, top)))
    high = top
    step = 0
    while (step < 24) & (count > k):
        middle = low + (high - low) * 0.5
        reached = tl.sum((maxima >= middle).to(tl.int32))
        if reached >= k:
            low = middle
            count = reached
        else:
            high = middle
        step += 1
    return low


@triton.jit
def _top_p_bound(maxima, masses, top, factor, tail, vocab):
    """A logit below which lies no more mass than `tail`; masses are in units of the most likely token's.

    In units of the temperature below `top`: at most `vocab` tokens lie below d, each lighter than e^d, so the search
    begins at log(tail / vocab). It ends at a 250th of a unit, and a margin covers rounding.
    """
    depths = (maxima - top) * factor
    low = tl.minimum(tl.log(tail / vocab), 0.0)
    high = low * 0.0
    for _ in range(12):
        middle = (low + high) * 0.5
        others = tl.minimum(masses, (GROUP - 1) * tl.exp(middle))
        if tl.sum(tl.where(depths < middle, masses, others)) <= tail:
            low = middle
        else:
            high = middle
    bound = top + (low - 0.001) / factor
    return bound - tl.abs(bound) * 2.4e-7


@triton.jit
def _list_groups(list_ptr, maxima, bound):
    """Write down the groups that reach the bound, in order; returns how many."""
    reached = (maxima >= bound).to(tl.int32)
    place = tl.cumsum(reached, axis=0) - 1
    tl.store(list_ptr + place, tl.arange(0, maxima.shape[0]), mask=reached > 0)
    tl.debug_barrier()  # other threads will read the list
    return tl.sum(reached)


@triton.jit
def _listed(list_ptr, start, num_listed):
    """The next LIST_TILE listed groups; beyond the list, one that no vocabulary has."""
    entries = start + tl.arange(0, LIST_TILE)
    return tl.load(list_ptr + entries, mask=entries < num_listed, other=MAX_GROUPS)


@triton.jit
def _load_groups(logits_ptr, groups, vocab):
    """Logits of groups, [LIST_TILE, GROUP]; −∞ outside the vocabulary."""
    cols = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    return tl.load(logits_ptr + cols, mask=cols < vocab, other=-INFINITY).to(tl.float32)


@triton.jit
def _mass_from(logits_ptr, list_ptr, num_listed, vocab, top, factor, threshold):
    """Mass of the listed tokens from `threshold` on, in units of the most likely token's."""
    masses = tl.zeros([LIST_TILE], tl.float32)
    for start in range(0, num_listed, LIST_TILE):
        logits = _load_groups(logits_ptr, _listed(list_ptr, start, num_listed), vocab)
        masses += tl.sum(tl.where(logits >= threshold, tl.exp((logits - top) * factor), 0.0), axis=1)
    return tl.sum(masses)


@triton.jit
def _fours(tile):
    """Neighbours in fours, which stand in one thread's registers: reducing them first leaves fewer accumulators."""
    return tl.reshape(tile, [LIST_TILE, GROUP // 4, 4])


@triton.jit
def _threshold(logits_ptr, list_ptr, num_listed, vocab, top, factor, bound, target, COUNT: tl.constexpr):
    """The largest of the listed logits from which on the count (COUNT) or the mass reaches `target`.

    Invariant: the answer lies in [low, high), with f the count or mass from a value on, f(low) ≥ target > f(high).
    """
    low = bound
    high = top + tl.maximum(tl.abs(top) * 2.4e-7, 1e-30)  # the next number or the one after
    answer = bound
    passes = 0
    while passes < 64:  # 24 bits of a float32 take 8 or 9; the limit is for denormal steps
        step = (high - low) * 0.125
        reached = ()
        for _ in tl.static_range(8):
            reached += (tl.zeros([LIST_TILE, GROUP // 4], tl.float32),)
        smallest = tl.full([LIST_TILE, GROUP // 4], INFINITY, tl.float32)
        largest = tl.full([LIST_TILE, GROUP // 4], -INFINITY, tl.float32)
        for start in range(0, num_listed, LIST_TILE):
            logits = _load_groups(logits_ptr, _listed(list_ptr, start, num_listed), vocab)
            amount = tl.where(logits > -INFINITY, 1.0, 0.0) if COUNT else tl.exp((logits - top) * factor)
            sums = ()
            for j in tl.static_range(8):
                sums += (reached[j] + tl.sum(_fours(tl.where(logits >= low + j * step, amount, 0.0)), axis=2),)
            reached = sums
            smallest = tl.minimum(smallest, tl.min(_fours(tl.where(logits >= low, logits, INFINITY)), axis=2))
            largest = tl.maximum(largest, tl.max(_fours(tl.where(logits < high, logits, -INFINITY)), axis=2))
        answer = tl.min(smallest)
        # All eight in one reduction: place [p, q, r] of the stack is j = 4r + 2q + p.
        stack = tl.join(
            tl.join(tl.join(reached[0], reached[4]), tl.join(reached[2], reached[6])),
            tl.join(tl.join(reached[1], reached[5]), tl.join(reached[3], reached[7])),
        )
        amounts = tl.sum(tl.reshape(stack, [LIST_TILE * GROUP // 4, 8]), axis=0)
        j = tl.arange(0, 8)
        enough = (amounts >= target) | (j == 0)
        values = low + j * step
        new_low = tl.max(tl.where(enough, values, low))
        high = tl.min(tl.where(enough, high, values))
        passes += 1
        if answer < tl.max(largest):
            low = tl.maximum(new_low, answer)
        else:
            passes = 64
    return answer


@triton.jit
def _filter(logits_ptr, list_ptr, maxima, masses, vocab, top, factor, top_k_ptr, top_p_ptr, min_p_ptr, b):
    """What a logit must reach, and how many groups are listed because they may hold one that does.

    0 groups: the row filters nothing.
    """
    k, p = tl.full([], 0, tl.int32), tl.full([], 1.0, tl.float32)
    floor = tl.full([], -INFINITY, tl.float32)
    if top_k_ptr is not None:
        k = tl.load(top_k_ptr + b)
    if top_p_ptr is not None:
        p = tl.load(top_p_ptr + b)
    if min_p_ptr is not None:
        ratio = tl.load(min_p_ptr + b)
        floor = tl.where(ratio > 0, top + tl.log(tl.maximum(ratio, 1e-30)) / factor, floor)
    has_top_k, has_top_p = (k > 0) & (k < vocab), p < 1
    threshold = floor
    num_listed = tl.full([], 0, tl.int32)
    if has_top_k | has_top_p | (floor > -INFINITY):
        total = tl.sum(masses)
        bound = floor
        if has_top_k:
            bound = _top_k_bound(maxima, k, top)
        elif has_top_p:
            bound = _top_p_bound(maxima, masses, top, factor, (1.0 - p) * total, vocab)
        num_listed = _list_groups(list_ptr, maxima, bound)
        if top_k_ptr is not None and has_top_k:
            bound = _threshold(logits_ptr, list_ptr, num_listed, vocab, top, factor, bound, k, True)
            total = _mass_from(logits_ptr, list_ptr, num_listed, vocab, top, factor, bound)
        if top_p_ptr is not None and has_top_p:
            bound = _threshold(logits_ptr, list_ptr, num_listed, vocab, top, factor, bound, p * total, False)
        threshold = tl.maximum(bound, floor)
    return threshold, num_listed


# ---- tokens from rows ----------------------------------------------------------------------------------------------


@triton.jit
def _winning_group(
    logits_ptr,
    list_ptr,
    num_listed,
    masses,
    vocab,
    top,
    factor,
    threshold,
    seed,
    position,
    GROUPS_TILE: tl.constexpr,
    FILTERED: tl.constexpr,
    STREAM: tl.constexpr,
):
    """First heat: among all groups of an unfiltered row, or among the listed, with the tokens that pass."""
    if FILTERED and num_listed > 0:
        best_score = tl.full([LIST_TILE], -2.0, tl.float32)
        best_group = tl.zeros([LIST_TILE], tl.int32)
        for start in range(0, num_listed, LIST_TILE):
            groups = _listed(list_ptr, start, num_listed)
            logits = _load_groups(logits_ptr, groups, vocab)
            kept = tl.where(logits >= threshold, tl.exp((logits - top) * factor), 0.0)
            scores = _race(tl.sum(kept, axis=1), groups, seed, position, GROUP_RACE, STREAM)
            best_group = tl.where(scores > best_score, groups, best_group)
            best_score = tl.maximum(scores, best_score)
        lane = tl.argmax(best_score, axis=0)
        group = tl.sum(tl.where(tl.arange(0, LIST_TILE) == lane, best_group, 0))
    else:
        group = tl.argmax(_race(masses, tl.arange(0, GROUPS_TILE), seed, position, GROUP_RACE, STREAM), axis=0)
    return group


@triton.jit
def finish_rows_kernel(
    logits_ptr,
    query_start_ptr,
    draft_lens_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    positions_ptr,
    max_ptr,
    sum_ptr,
    lists_ptr,
    rows_ptr,
    tokens_ptr,
    seq_stride,
    row_stride,
    vocab,
    num_groups,
    GROUPS_TILE: tl.constexpr,
    FILTERED: tl.constexpr,
    STREAM: tl.constexpr,
):
    """From the group statistics of a row its token, or (without tokens_ptr) what makes probabilities of its logits.

    The latter are four numbers in rows_ptr: the largest logit; 1 / mass of the tokens kept, in units of the most likely
    one's; the threshold; and the greedy token, as the bits of an int32. See `_probability`.
    """
    b, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if draft_lens_ptr is not None and i > tl.load(draft_lens_ptr + b):
        return
    logits_ptr += _row_offset(b, i, query_start_ptr, seq_stride, row_stride)
    greedy, factor = _temperature(temperature_ptr, b)
    row = b * tl.num_programs(1) + i
    list_ptr = lists_ptr + row * num_groups
    groups = tl.arange(0, GROUPS_TILE)
    maxima = tl.load(max_ptr + row * num_groups + groups, mask=groups < num_groups, other=-INFINITY)
    masses = tl.load(sum_ptr + row * num_groups + groups, mask=groups < num_groups, other=0.0)
    top = tl.max(maxima, axis=0)
    top = tl.where(top == -INFINITY, 0.0, top)
    masses *= tl.exp((maxima - top) * factor)
    group = tl.argmax(maxima, axis=0)
    threshold = tl.full([], -INFINITY, tl.float32)
    num_listed = tl.full([], 0, tl.int32)
    if FILTERED and not greedy:
        threshold, num_listed = _filter(
            logits_ptr, list_ptr, maxima, masses, vocab, top, factor, top_k_ptr, top_p_ptr, min_p_ptr, b
        )
    if tokens_ptr is not None:
        seed, position = tl.load(seeds_ptr + b), tl.load(positions_ptr + b)
        if not greedy:
            group = _winning_group(
                logits_ptr,
                list_ptr,
                num_listed,
                masses,
                vocab,
                top,
                factor,
                threshold,
                seed,
                position,
                GROUPS_TILE,
                FILTERED,
                STREAM,
            )
    cols = group * GROUP + tl.arange(0, GROUP)
    logits = tl.load(logits_ptr + cols, mask=cols < vocab, other=-INFINITY).to(tl.float32)
    if tokens_ptr is not None:
        weights = tl.where(logits >= threshold, tl.exp((logits - top) * factor), 0.0)
        scores = _race(weights, cols, seed, position, TOKEN_RACE, STREAM)
        token = group * GROUP + tl.argmax(tl.where(greedy, logits, scores), axis=0)
        tl.store(tokens_ptr + b, tl.minimum(token, vocab - 1))
    else:
        mass = tl.sum(masses)
        if FILTERED and num_listed > 0:
            mass = _mass_from(logits_ptr, list_ptr, num_listed, vocab, top, factor, threshold)
        best = group * GROUP + tl.argmax(logits, axis=0)
        tl.store(rows_ptr + row * 4, top)
        tl.store(rows_ptr + row * 4 + 1, 1.0 / mass)
        tl.store(rows_ptr + row * 4 + 2, threshold)
        tl.store(rows_ptr + row * 4 + 3, best.to(tl.int32).to(tl.float32, bitcast=True))


@triton.jit
def _probability(logits, tokens, rows_ptr, row, greedy, factor):
    """Probabilities of tokens from their logits and the four numbers of their row."""
    top, inverse_mass = tl.load(rows_ptr + row * 4), tl.load(rows_ptr + row * 4 + 1)
    threshold = tl.load(rows_ptr + row * 4 + 2)
    best = tl.load(rows_ptr + row * 4 + 3).to(tl.int32, bitcast=True)
    probs = tl.where(logits >= threshold, tl.exp((logits - top) * factor) * inverse_mass, 0.0)
    return tl.where(greedy, (tokens == best).to(tl.float32), probs)


@triton.jit
def probs_kernel(logits_ptr, temperature_ptr, rows_ptr, out_ptr, row_stride, out_stride, vocab, BLOCK: tl.constexpr):
    """A block of a row of probabilities."""
    b = tl.program_id(0).to(tl.int64)
    greedy, factor = _temperature(temperature_ptr, b)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + b * row_stride + tokens, mask=tokens < vocab, other=-INFINITY).to(tl.float32)
    probs = _probability(logits, tokens, rows_ptr, b, greedy, factor)
    tl.store(out_ptr + b * out_stride + tokens, probs, mask=tokens < vocab)


@triton.jit
def logprobs_kernel(logits_ptr, tokens_ptr, rows_ptr, out_ptr, row_stride):
    """Log-probability of one token of a row."""
    b = tl.program_id(0).to(tl.int64)
    logit = tl.load(logits_ptr + b * row_stride + tl.load(tokens_ptr + b).to(tl.int64)).to(tl.float32)
    tl.store(out_ptr + b, logit - tl.load(rows_ptr + b * 4) + tl.log(tl.load(rows_ptr + b * 4 + 1)))


# ---- verification --------------------------------------------------------------------------------------------------


@triton.jit
def accept_kernel(
    draft_tokens_ptr,
    draft_probs_ptr,
    draft_lens_ptr,
    target_ptr,
    query_start_ptr,
    temperature_ptr,
    rows_ptr,
    seeds_ptr,
    positions_ptr,
    accepted_ptr,
    draft_seq_stride,
    draft_probs_seq_stride,
    draft_probs_row_stride,
    seq_stride,
    row_stride,
    vocab,
    k,
    DRAFTS_TILE: tl.constexpr,
):
    """How many drafts of a sequence stand before the first that is rejected."""
    b = tl.program_id(0).to(tl.int64)
    num_drafts = tl.load(draft_lens_ptr + b)
    i = tl.arange(0, DRAFTS_TILE)
    drafted = i < num_drafts
    x = tl.load(draft_tokens_ptr + b * draft_seq_stride + i, mask=drafted, other=-1)
    # A token that is none is never accepted, and nothing is read for it.
    valid = drafted & (x >= 0) & (x < vocab)
    offsets = _row_offset(b, i.to(tl.int64), query_start_ptr, seq_stride, row_stride)
    p = tl.load(target_ptr + offsets + x, mask=valid, other=0.0).to(tl.float32)
    if rows_ptr is not None:
        greedy, factor = _temperature(temperature_ptr, b)
        p = _probability(p, x, rows_ptr, tl.where(drafted, b * (k + 1) + i, b * (k + 1)), greedy, factor)
    q = tl.full([DRAFTS_TILE], 1.0, tl.float32)
    if draft_probs_ptr is not None:
        rows = b * draft_probs_seq_stride + i.to(tl.int64) * draft_probs_row_stride
        q = tl.load(draft_probs_ptr + rows + x, mask=valid, other=1.0)
    bits = _random_bits(tl.load(seeds_ptr + b), tl.load(positions_ptr + b) + i, i * 0, ACCEPT, 0)
    u = (bits >> 9).to(tl.float32) * 1.1920928955078125e-07
    rejected = drafted & ~(valid & (u * q < p))
    tl.store(accepted_ptr + b, tl.min(tl.where(rejected, i, num_drafts), axis=0))


@triton.jit
def _residual(
    tokens,
    in_vocab,
    target_ptr,
    draft_tokens_ptr,
    draft_probs_ptr,
    query_start_ptr,
    temperature_ptr,
    rows_ptr,
    b,
    num_accepted,
    num_drafts,
    draft_seq_stride,
    draft_probs_seq_stride,
    draft_probs_row_stride,
    seq_stride,
    row_stride,
    k,
):
    """max(0, p − q) of tokens where the first draft was rejected; p behind the last draft if none was."""
    offset = _row_offset(b, num_accepted, query_start_ptr, seq_stride, row_stride)
    weights = tl.load(target_ptr + offset + tokens, mask=in_vocab, other=0.0).to(tl.float32)
    if rows_ptr is not None:
        greedy, factor = _temperature(temperature_ptr, b)
        weights = _probability(weights, tokens, rows_ptr, b * (k + 1) + num_accepted, greedy, factor)
    is_rejection = num_accepted < num_drafts
    if draft_probs_ptr is not None:
        row = b * draft_probs_seq_stride + num_accepted.to(tl.int64) * draft_probs_row_stride
        q = tl.load(draft_probs_ptr + row + tokens, mask=in_vocab & is_rejection, other=0.0)
        weights = tl.maximum(weights - q, 0.0)
    else:
        x = tl.load(draft_tokens_ptr + b * draft_seq_stride + num_accepted, mask=is_rejection, other=-1)
        weights = tl.where(tokens == x, 0.0, weights)
    return tl.where(in_vocab, weights, 0.0)


@triton.jit
def residual_kernel(
    draft_tokens_ptr,
    draft_probs_ptr,
    draft_lens_ptr,
    target_ptr,
    query_start_ptr,
    temperature_ptr,
    rows_ptr,
    accepted_ptr,
    sum_ptr,
    draft_seq_stride,
    draft_probs_seq_stride,
    draft_probs_row_stride,
    seq_stride,
    row_stride,
    vocab,
    num_groups,
    k,
    TILE: tl.constexpr,
):
    """Sums of `_residual` over TILE groups."""
    b = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * TILE + tl.arange(0, TILE)
    tokens = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    weights = _residual(
        tokens,
        tokens < vocab,
        target_ptr,
        draft_tokens_ptr,
        draft_probs_ptr,
        query_start_ptr,
        temperature_ptr,
        rows_ptr,
        b,
        tl.load(accepted_ptr + b),
        tl.load(draft_lens_ptr + b),
        draft_seq_stride,
        draft_probs_seq_stride,
        draft_probs_row_stride,
        seq_stride,
        row_stride,
        k,
    )
    tl.store(sum_ptr + b * num_groups + groups, tl.sum(weights, axis=1), mask=groups < num_groups)


@triton.jit
def emit_kernel(
    draft_tokens_ptr,
    draft_probs_ptr,
    draft_lens_ptr,
    target_ptr,
    query_start_ptr,
    temperature_ptr,
    rows_ptr,
    seeds_ptr,
    positions_ptr,
    accepted_ptr,
    sum_ptr,
    tokens_ptr,
    num_emitted_ptr,
    draft_seq_stride,
    draft_probs_seq_stride,
    draft_probs_row_stride,
    seq_stride,
    row_stride,
    vocab,
    num_groups,
    k,
    GROUPS_TILE: tl.constexpr,
    TOKENS_TILE: tl.constexpr,
):
    """The accepted drafts, one token drawn from `_residual`, and −1 behind it."""
    b = tl.program_id(0).to(tl.int64)
    num_accepted, num_drafts = tl.load(accepted_ptr + b), tl.load(draft_lens_ptr + b)
    seed, position = tl.load(seeds_ptr + b), tl.load(positions_ptr + b) + num_accepted
    groups = tl.arange(0, GROUPS_TILE)
    sums = tl.load(sum_ptr + b * num_groups + groups, mask=groups < num_groups, other=0.0)
    group = tl.argmax(_race(sums, groups, seed, position, GROUP_RACE, 0), axis=0)
    members = group * GROUP + tl.arange(0, GROUP)
    weights = _residual(
        members,
        members < vocab,
        target_ptr,
        draft_tokens_ptr,
        draft_probs_ptr,
        query_start_ptr,
        temperature_ptr,
        rows_ptr,
        b,
        num_accepted,
        num_drafts,
        draft_seq_stride,
        draft_probs_seq_stride,
        draft_probs_row_stride,
        seq_stride,
        row_stride,
        k,
    )
    token = group * GROUP + tl.argmax(_race(weights, members, seed, position, TOKEN_RACE, 0), axis=0)
    i = tl.arange(0, TOKENS_TILE)
    drafts = tl.load(draft_tokens_ptr + b * draft_seq_stride + i, mask=i < num_drafts, other=0).to(tl.int64)
    # No residual after a rejection: p and q are equal up to rounding, and the draft is as good as any.
    nothing_left = (num_accepted < num_drafts) & (tl.max(sums, axis=0) <= 0)
    last = tl.where(nothing_left, drafts, tl.minimum(token, vocab - 1).to(tl.int64))
    tokens = tl.where(i < num_accepted, drafts, tl.where(i == num_accepted, last, -1))
    tl.store(tokens_ptr + b * (k + 1) + i, tokens, mask=i <= k)
    tl.store(num_emitted_ptr + b, num_accepted + 1)


# ---- launchers -----------------------------------------------------------------------------------------------------


class _Rows:
    """The rows of logits of a launch, [num_seqs, rows_per_seq], dense or flat, with their kernels' scratch memory."""

    def __init__(self, logits, num_seqs, rows_per_seq, query_start=None, draft_lens=None):
        self.logits, self.query_start, self.draft_lens = logits, query_start, draft_lens
        self.num_seqs, self.rows_per_seq, self.vocab = num_seqs, rows_per_seq, logits.shape[-1]
        self.seq_stride, self.row_stride = logits.stride(0), logits.stride(-2)
        # A multiple of 16 lets 16-byte loads read the statistics; the groups behind the vocabulary have no mass.
        self.num_groups = 16 * triton.cdiv(self.vocab, 16 * reference.GROUP)
        self.groups_tile = triton.next_power_of_2(self.num_groups)
        self.num_warps = 8 if self.groups_tile <= 4096 else 16  # 16 groups per thread
        num_rows = num_seqs * rows_per_seq
        stats = torch.empty(2, num_rows, self.num_groups, dtype=torch.float32, device=logits.device)
        self.maxima, self.sums = stats[0], stats[1]
        self.rows = torch.empty(num_rows, 4, dtype=torch.float32, device=logits.device)

    def finish(
        self,
        temperature,
        top_k=None,
        top_p=None,
        min_p=None,
        *,
        seeds=None,
        positions=None,
        tokens=None,
        filtered=False,
        stream=0,
    ) -> None:
        """Draw `tokens`, or else fill `rows` with what `_probability` needs."""
        filtered = filtered and not (top_k is None and top_p is None and min_p is None)
        programs = triton.cdiv(self.num_groups, STATS_TILE)
        group_stats_kernel[(self.num_seqs, self.rows_per_seq, programs)](
            self.logits,
            self.query_start,
            self.draft_lens,
            temperature,
            self.maxima,
            self.sums,
            self.seq_stride,
            self.row_stride,
            self.vocab,
            self.num_groups,
            TILE=STATS_TILE,
            num_warps=4,
        )
        lists = self.maxima  # any pointer; nothing is listed
        if filtered:
            lists = torch.empty(self.maxima.shape, dtype=torch.int32, device=self.logits.device)
        finish_rows_kernel[(self.num_seqs, self.rows_per_seq)](
            self.logits,
            self.query_start,
            self.draft_lens,
            temperature,
            top_k if filtered else None,
            top_p if filtered else None,
            min_p if filtered else None,
            seeds,
            positions,
            self.maxima,
            self.sums,
            lists,
            self.rows,
            tokens,
            self.seq_stride,
            self.row_stride,
            self.vocab,
            self.num_groups,
            GROUPS_TILE=self.groups_tile,
            FILTERED=filtered,
            STREAM=stream,
            num_warps=self.num_warps,
        )


def sample(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    filtered: bool = True,
    stream: int = 0,
    out: torch.Tensor | None = None,
    check: bool = True,
) -> torch.Tensor:
    """Draw one token per row: int64 [num_rows].

    What a row draws depends on its own arguments only: not on its batch, nor on `filtered` as long as the row itself
    filters nothing. (Logits at another alignment are summed in another order, which matters to float32's rounding.)
    Greedy rows take the largest logit, the first of equals.

    Args:
        logits: float32, bf16 or fp16 [num_rows, vocab]; rows may stand apart. NaN gives some token, never a crash.
        temperature: float32 [num_rows]; below 1e-5 means greedy.
        top_k: int32 [num_rows], 0 for off; or None if off for all.
        top_p: float32 [num_rows], 1.0 for off; or None.
        min_p: float32 [num_rows], 0.0 for off; or None.
            The filters' order and ties: `kernels.reference.sampling.processed_probs`. The mass for top_p is summed in
            float32, so a token may fall on the other side of it if it is within about 1e-6 of it.
        seeds: int64 [num_rows], the requests' seeds.
        positions: int64 [num_rows], where in its text each token will stand.
        filtered: False promises that no row filters, and saves the code that would find out.
        stream: 0 for the model that decides, 1 for a draft model, whose choices must be independent of it.
        out: int64 or int32 [num_rows], or None for a new tensor.
        check: look at the arguments first; reads them, and so waits for the GPU.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device, stride or range.
    """
    if check:
        _check_logits("logits", logits, (None, None))
        num_rows = logits.shape[0]
        _check_parameters(num_rows, logits.device, temperature, top_k, top_p, min_p)
        _check_per_row(num_rows, logits.device, seeds=seeds, positions=positions)
        checks.integer("stream", stream, 0, 1)
        if out is not None:
            checks.tensor("out", out, shape=(num_rows,), dtypes=INDEX_DTYPES, device=logits.device, contiguous=True)
    if out is None:
        out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    if logits.shape[0]:
        rows = _Rows(logits, logits.shape[0], 1)
        rows.finish(
            temperature,
            top_k,
            top_p,
            min_p,
            seeds=seeds,
            positions=positions,
            tokens=out,
            filtered=filtered,
            stream=stream,
        )
    return out


def processed_probs(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    *,
    filtered: bool = True,
    out: torch.Tensor | None = None,
    check: bool = True,
) -> torch.Tensor:
    """The distributions that `sample` draws from: float32 [num_rows, vocab]. Arguments and errors as there."""
    if check:
        _check_logits("logits", logits, (None, None))
        _check_parameters(logits.shape[0], logits.device, temperature, top_k, top_p, min_p)
        if out is not None:
            checks.tensor("out", out, shape=tuple(logits.shape), dtypes=(torch.float32,), device=logits.device)
            checks.no_overlap("out", out)
    num_rows, vocab = logits.shape
    if out is None:
        out = torch.empty(num_rows, vocab, dtype=torch.float32, device=logits.device)
    if num_rows:
        rows = _Rows(logits, num_rows, 1)
        rows.finish(temperature, top_k, top_p, min_p, filtered=filtered)
        probs_kernel[(num_rows, triton.cdiv(vocab, 2048))](
            logits, temperature, rows.rows, out, logits.stride(0), out.stride(0), vocab, BLOCK=2048, num_warps=4
        )
    return out


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, *, check: bool = True) -> torch.Tensor:
    """Log-probability of one token per row at temperature 1, unfiltered: float32 [num_rows].

    Args:
        logits: float32, bf16 or fp16 [num_rows, vocab]; rows may stand apart.
        tokens: int32 or int64 [num_rows].
        check: look at the arguments first; reads the tokens, and so waits for the GPU.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or stride, or a token outside the vocabulary.
    """
    if check:
        _check_logits("logits", logits, (None, None))
        checks.tensor("tokens", tokens, shape=logits.shape[:1], dtypes=INDEX_DTYPES, device=logits.device)
        _check_range("tokens", tokens, 0, logits.shape[1] - 1)
    out = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if logits.shape[0]:
        rows = _Rows(logits, logits.shape[0], 1)
        rows.finish(None)
        logprobs_kernel[(logits.shape[0],)](logits, tokens, rows.rows, out, logits.stride(0), num_warps=1)
    return out


def verify(
    draft_tokens: torch.Tensor,
    draft_probs: torch.Tensor | None,
    draft_lens: torch.Tensor,
    *,
    target_logits: torch.Tensor | None = None,
    target_probs: torch.Tensor | None = None,
    query_start: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    filtered: bool = True,
    check: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept drafts from the left as long as the target model might have drawn them, then draw one token more.

    The emitted tokens are distributed exactly as if drawn from the target one by one; the method, with its sources, in
    `kernels.reference.sampling.verify`. A sequence without drafts draws what `sample` would. Draft tokens that were
    drawn at random must come from `sample(..., stream=1)` or another generator: were they drawn with the numbers used
    here, the output would no longer follow the target.

    Args:
        draft_tokens: int32 or int64 [num_seqs, k]; what stands behind a sequence's drafts is not looked at.
        draft_probs: float32 [num_seqs, k, vocab], what each draft was drawn from; or None for drafts that were not
            drawn (n-gram, greedy), for which q is 1 at the draft.
        draft_lens: int32 [num_seqs], drafts per sequence, 0 to k. Padding sequences have 0.
        target_logits: float32, bf16 or fp16, the logits behind the last token and behind each draft: [num_seqs, k + 1,
            vocab], or flat [num_rows, vocab] with `query_start`. Or:
        target_probs: the same as probabilities, float32; sampling parameters are then not looked at.
        query_start: int32 [num_seqs + 1], rows of sequence b begin at query_start[b], draft_lens[b] + 1 of them. Unlike
            attention's query_start, where padding is an empty sequence, this one needs a row for each padding sequence
            too: from it the one token is drawn that every sequence emits.
        temperature, top_k, top_p, min_p, filtered: as in `sample`, one per sequence.
        seeds: int64 [num_seqs].
        positions: int64 [num_seqs], where the first emitted token of each sequence will stand.
        check: look at the arguments first; reads them, and so waits for the GPU.

    Returns:
        tokens, int64 [num_seqs, k + 1], with −1 behind the last; and how many were emitted, int32 [num_seqs], 1 to
        k + 1.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device, stride or range.
    """
    if check:
        _check_verify(draft_tokens, draft_probs, draft_lens, target_logits, target_probs, query_start, seeds, positions)
        if target_probs is None:
            device = draft_tokens.device
            _check_parameters(draft_tokens.shape[0], device, temperature, top_k, top_p, min_p)
    num_seqs, k = draft_tokens.shape
    device = draft_tokens.device
    tokens = torch.empty(num_seqs, k + 1, dtype=torch.int64, device=device)
    num_accepted = torch.empty(num_seqs, dtype=torch.int32, device=device)
    num_emitted = torch.empty(num_seqs, dtype=torch.int32, device=device)
    if num_seqs == 0:
        return tokens, num_emitted
    target = target_logits if target_probs is None else target_probs
    rows = _Rows(target, num_seqs, k + 1, query_start, draft_lens)
    if target_probs is None:
        rows.finish(temperature, top_k, top_p, min_p, filtered=filtered)
    row_numbers = rows.rows if target_probs is None else None
    sums = rows.sums[:num_seqs]  # of the logits; no longer needed
    draft = (draft_tokens, draft_probs, draft_lens, target, query_start, temperature, row_numbers)
    strides = (
        draft_tokens.stride(0),
        0 if draft_probs is None else draft_probs.stride(0),
        0 if draft_probs is None else draft_probs.stride(1),
        rows.seq_stride,
        rows.row_stride,
        rows.vocab,
    )
    accept_kernel[(num_seqs,)](
        *draft, seeds, positions, num_accepted, *strides, k, DRAFTS_TILE=triton.next_power_of_2(max(k, 1)), num_warps=1
    )
    residual_kernel[(num_seqs, triton.cdiv(rows.num_groups, STATS_TILE))](
        *draft, num_accepted, sums, *strides, rows.num_groups, k, TILE=STATS_TILE, num_warps=4
    )
    emit_kernel[(num_seqs,)](
        *draft,
        seeds,
        positions,
        num_accepted,
        sums,
        tokens,
        num_emitted,
        *strides,
        rows.num_groups,
        k,
        GROUPS_TILE=rows.groups_tile,
        TOKENS_TILE=triton.next_power_of_2(k + 1),
        num_warps=rows.num_warps,
    )
    return tokens, num_emitted


# ---- checks --------------------------------------------------------------------------------------------------------


def _check_logits(name: str, logits: torch.Tensor, shape: tuple[int | None, ...]) -> None:
    checks.tensors(**{name: logits})
    checks.tensor(name, logits, shape=shape, dtypes=LOGIT_DTYPES, device=logits.device)
    if not 1 <= logits.shape[-1] <= MAX_VOCAB:
        raise ValueError(f"{name} has a vocabulary of {logits.shape[-1]}; it must have 1 to {MAX_VOCAB}")


def _check_range(name: str, values: torch.Tensor, low: float, high: float) -> None:
    if values.numel():
        inside = (values >= low) & (values <= high)  # false for NaN
        if not inside.all():
            index = int((~inside).flatten().nonzero()[0])
            raise ValueError(f"{name} holds {values.flatten()[index].item()}; it must lie within {low} and {high}")


def _check_per_row(num_rows: int, device: torch.device, **values: torch.Tensor) -> None:
    for name, value in values.items():
        checks.tensor(name, value, shape=(num_rows,), dtypes=(torch.int64,), device=device, contiguous=True)


def _check_parameters(num_rows, device, temperature, top_k, top_p, min_p) -> None:
    for name, value, dtype, low, high in (
        ("temperature", temperature, torch.float32, 0.0, 1e5),
        ("top_k", top_k, torch.int32, 0, 2**31 - 1),
        ("top_p", top_p, torch.float32, 0.0, 1.0),
        ("min_p", min_p, torch.float32, 0.0, 1.0),
    ):
        if value is not None or name == "temperature":
            checks.tensor(name, value, shape=(num_rows,), dtypes=(dtype,), device=device, contiguous=True)
            _check_range(name, value, low, high)


def _check_verify(
    draft_tokens, draft_probs, draft_lens, target_logits, target_probs, query_start, seeds, positions
) -> None:
    checks.tensors(draft_tokens=draft_tokens)
    device = draft_tokens.device
    checks.tensor("draft_tokens", draft_tokens, shape=(None, None), dtypes=INDEX_DTYPES, device=device)
    num_seqs, k = draft_tokens.shape
    if (target_logits is None) == (target_probs is None):
        raise ValueError("target_logits and target_probs are both given or both missing; one of them must be given")
    name, target = ("target_logits", target_logits) if target_probs is None else ("target_probs", target_probs)
    _check_logits(name, target, (num_seqs, k + 1, None) if query_start is None else (None, None))
    if target.device != device or (target_probs is not None and target.dtype != torch.float32):
        checks.tensor(name, target, shape=tuple(target.shape), dtypes=(torch.float32,), device=device)
    vocab = target.shape[-1]
    if draft_probs is not None:
        checks.tensor("draft_probs", draft_probs, shape=(num_seqs, k, vocab), dtypes=(torch.float32,), device=device)
    checks.tensor("draft_lens", draft_lens, shape=(num_seqs,), dtypes=(torch.int32,), device=device, contiguous=True)
    _check_per_row(num_seqs, device, seeds=seeds, positions=positions)
    _check_range("draft_lens", draft_lens, 0, k)
    drafted = torch.arange(k, device=device) < draft_lens[:, None]
    _check_range("draft_tokens", draft_tokens[drafted], 0, vocab - 1)
    if query_start is not None:
        checks.tensor("query_start", query_start, shape=(num_seqs + 1,), dtypes=(torch.int32,), device=device)
        if num_seqs:
            _check_range("query_start", query_start, 0, target.shape[0])
            for b, (rows, drafts) in enumerate(zip(query_start.diff().tolist(), draft_lens.tolist(), strict=True)):
                if rows <= drafts:
                    raise ValueError(
                        f"query_start leaves sequence {b} with {rows} rows; it must leave it at least {drafts + 1}, "
                        f"one more than draft_lens[{b}], and so one for a padding sequence"
                    )
