"""Our kernels' calls beside their peers', on random data: one function for each kind of row, any shape."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch.nn import functional

from kernels import prefill_hopper
from kernels.bench import peers
from kernels.bench.batches import Batch, kv_bytes, paged_batches
from kernels.bench.results import FLOOR, OURS
from kernels.bench.timing import num_sets
from kernels.cache import dequantise_pages, slot_mapping, write_kv
from kernels.decode import decode_attention
from kernels.decode_plan import plan_decode
from kernels.elementwise import qk_norm_rope, rms_norm, silu_mul
from kernels.pages import PageLayout
from kernels.prefill import portable_config, prefill_attention
from kernels.quantise import quantise_tokens_fp8, rms_norm_fp8, silu_mul_fp8
from kernels.reference.attention import attention, in_a_row
from kernels.reference.pages import gather, quantisation_error
from kernels.sampling import sample, verify
from kernels.skinny import MAX_ROWS, skinny_gate_up, skinny_linear, skinny_linear_fp8

Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
EPS = 1e-6
FEW_ROWS = 256  # of which a product takes as long as its weight takes to be read, or not much longer


@dataclass(frozen=True)
class Bench:
    """Where to measure, and in which 16-bit type (float16 in tests on a CPU)."""

    device: torch.device
    dtype: torch.dtype

    @property
    def kv_dtype(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def ints(self, values: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=self.device)


@dataclass
class Work:
    """Something ready to run.

    Attributes:
        implementations: by name; each takes one of `sets` and returns its result.
        floor: the limits that bound the row, as in `Row`.
        same: those that must return what ours returns, up to rounding.
        compared: what is compared of what an implementation returns.
        values: what was measured while building.
    """

    sets: Sequence[Any] = ()
    implementations: dict[str, Callable[[Any], torch.Tensor]] = field(default_factory=dict)
    flops: float | None = None
    bytes: float | None = None
    floor: tuple[str, ...] = FLOOR
    same: tuple[str, ...] = ()
    compared: Callable[[Any], torch.Tensor] = lambda result: result
    values: dict[str, float] = field(default_factory=dict)


# ---- limits ----------------------------------------------------------------------------------------------------------


def copy_work(size: int, bench: Bench) -> Work:
    # Not copy_: captured in a graph it becomes a transfer of the copy engines, a third slower than the multiprocessors.
    source, target = (torch.empty(size // 8, dtype=torch.int64, device=bench.device).random_() for _ in range(2))
    return Work([(target, source)], {"torch": lambda s: torch.bitwise_not(s[1], out=s[0])}, bytes=2 * size)


def sum_work(size: int, bench: Bench) -> Work:
    words = torch.empty(size // 8, dtype=torch.int64, device=bench.device).random_()
    return Work([words], {"torch": torch.sum}, bytes=size)


def matmul_work(n: int, bench: Bench) -> Work:
    sets = [(bench.randn(n, n), bench.randn(n, n)) for _ in range(num_sets(6 * n * n))]
    return Work(sets, {"torch": lambda s: s[0] @ s[1]}, flops=2 * n**3)


# ---- prefill ---------------------------------------------------------------------------------------------------------


def prefill_work(
    bench: Bench, *, batch: int, length: int, q_heads: int, kv_heads: int, head_dim: int, flex: bool = False
) -> Work:
    tokens = batch * length
    query_start = bench.ints(range(0, tokens + 1, length))
    set_bytes = 2 * tokens * (q_heads + 2 * kv_heads) * head_dim
    sets = [
        tuple(bench.randn(tokens, heads, head_dim) for heads in (q_heads, kv_heads, kv_heads))
        for _ in range(num_sets(set_bytes))
    ]

    def ours(qkv, config=None):
        return prefill_attention(*qkv, query_start=query_start, max_query_len=length, check=False, config=config)

    def batched(attention, qkv):
        """Peers want [batch, heads, tokens, head_dim]; they get views, and so does what they return."""
        out = attention(*(x.view(batch, length, *x.shape[1:]).transpose(1, 2) for x in qkv))
        return out.transpose(1, 2).flatten(0, 1)

    implementations = {OURS: ours}
    if prefill_hopper.is_hopper(bench.device):  # beside it, the kernel for all other GPUs
        portable = portable_config(*sets[0][:2], length, has_context=False)
        implementations["portable"] = partial(ours, config=portable)
    for name in peers.SDPA:
        implementations[name] = partial(batched, partial(peers.sdpa, name, causal=True))
    if flex:
        implementations["flex"] = partial(batched, peers.Flex())
    return Work(
        sets,
        implementations,
        flops=2.0 * batch * q_heads * length**2 * head_dim,
        bytes=2.0 * tokens * (2 * q_heads + 2 * kv_heads) * head_dim,
        same=tuple(peers.SDPA),
    )


def memory_work(bench: Bench, *, length: int) -> Work:
    """Bytes allocated beyond the inputs, at the worst moment: ours, and with the N² matrix in memory."""
    query, key, value = (bench.randn(length, heads, HEAD_DIM) for heads in (Q_HEADS, KV_HEADS, KV_HEADS))
    start = bench.ints([0, length])
    values = {
        "ours_bytes": _peak(
            lambda: prefill_attention(query, key, value, query_start=start, max_query_len=length, check=False)
        ),
        "n2_matrix_bytes": 2.0 * Q_HEADS * length**2,
    }
    # Logits and their softmax stand beside each other.
    if 3 * values["n2_matrix_bytes"] < torch.cuda.mem_get_info(bench.device)[0]:
        heads_first = [x.transpose(0, 1)[None] for x in (query, key, value)]
        values["naive_bytes"] = _peak(lambda: peers.naive_attention(*heads_first))
    return Work(values=values)


def _peak(call: Callable[[], Any]) -> float:
    call()  # what a first call keeps for good, such as the workspace of cuBLAS, is not the kernel's
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return float(torch.cuda.max_memory_allocated() - before)


# ---- decode ----------------------------------------------------------------------------------------------------------


def decode_sets(bench: Bench, kv_dtype: str, lengths: tuple[int, ...], sets: int = 0) -> list[Batch]:
    layout = PageLayout(kv_dtype, HEAD_DIM)
    return paged_batches(
        layout,
        lengths,
        num_sets=sets or num_sets(kv_bytes(layout, lengths, KV_HEADS)),
        num_q_heads=Q_HEADS,
        num_kv_heads=KV_HEADS,
        dtype=bench.dtype,
        device=bench.device,
    )


def _ready(batch: Batch) -> Callable[[], torch.Tensor]:
    """Our decode of a batch, planned beforehand as an engine plans once for all layers of a step."""
    plan = plan_decode(
        batch.seq_lens,
        batch.query_start,
        batch.layout,
        num_q_heads=batch.query.shape[1],
        num_kv_heads=batch.cache.shape[1],
        max_query_len=batch.query_len,
        flushed_lens=batch.flushed_lens,
    )
    return partial(
        decode_attention,
        batch.query,
        batch.cache,
        batch.layout,
        batch.block_tables,
        batch.seq_lens,
        batch.query_start,
        max_query_len=batch.query_len,
        plan=plan,
        residual=batch.residual,
        residual_slots=batch.residual_slots,
        flushed_lens=batch.flushed_lens,
        out=torch.empty_like(batch.query),
        check=False,
    )


def _work_of(batch: Batch) -> dict[str, float]:
    """FLOPs, and bytes that no kernel can avoid: K, V, the query and the output."""
    per_token = 4.0 * batch.query_len * batch.query.shape[1] * batch.layout.head_dim
    in_out = 2 * batch.query.numel() * batch.query.element_size()
    return {
        "flops": per_token * sum(batch.lengths),
        "bytes": float(kv_bytes(batch.layout, batch.lengths, batch.cache.shape[1]) + in_out),
    }


def decode_work(bench: Bench, *, lengths: tuple[int, ...]) -> Work:
    """Our 16-bit decode beside SDPA on contiguous K and V, and on pages that are gathered first."""
    batches = decode_sets(bench, bench.kv_dtype, lengths)
    whole = len(set(lengths)) == 1
    sequences = [None] if whole else range(len(lengths))
    sets = [(_ready(b), b, [tuple(x.contiguous() for x in b.gathered(i)) for i in sequences]) for b in batches]

    def rows(batch: Batch, index: int | None) -> torch.Tensor:
        query = batch.query[:, :, None]  # [batch, heads, 1, head_dim]
        return query if index is None else query[index : index + 1]

    def contiguous(backend: str, s) -> torch.Tensor:
        _, batch, kv = s
        outs = [peers.sdpa(backend, rows(batch, i), *kv[n]) for n, i in enumerate(sequences)]
        return torch.cat(outs)[:, :, 0]

    def gathered(s) -> torch.Tensor:
        batch = s[1]
        return torch.cat([peers.sdpa(None, rows(batch, i), *batch.gathered(i)) for i in sequences])[:, :, 0]

    implementations = {OURS: lambda s: s[0]()}
    implementations |= {name: partial(contiguous, name) for name in peers.SDPA}
    implementations["gathered"] = gathered
    return Work(sets, implementations, same=("cudnn", "gathered"), **_work_of(batches[0]))


def plan_work(bench: Bench) -> Work:
    """The kernel that splits a step over the GPU; its input is small enough to be in the cache in an engine too."""
    lengths, start = bench.ints(range(1, 257)), bench.ints(range(257))
    layout = PageLayout(bench.kv_dtype, HEAD_DIM)
    plan = plan_decode(lengths, start, layout, num_q_heads=Q_HEADS, num_kv_heads=KV_HEADS)
    return Work([None], {OURS: lambda _: plan.update(lengths, start, check=False)})


def low_bit_work(bench: Bench, *, kv_dtype: str, lengths: tuple[int, ...]) -> Work:
    """A quantised cache beside our own 16-bit one of the same shape."""
    small = decode_sets(bench, kv_dtype, lengths)
    large = decode_sets(bench, bench.kv_dtype, lengths, len(small))
    sets = [(_ready(a), _ready(b)) for a, b in zip(small, large, strict=True)]
    return Work(sets, {OURS: lambda s: s[0](), "bfloat16": lambda s: s[1]()}, **_work_of(small[0]))


def verify_work(bench: Bench, *, kv_dtype: str, lengths: tuple[int, ...], query_len: int) -> Work:
    """Queries of several tokens beside queries of one, on the same caches."""
    kv_dtype = bench.kv_dtype if kv_dtype == "bfloat16" else kv_dtype
    single = decode_sets(bench, kv_dtype, lengths)
    several = [batch.with_query_len(query_len) for batch in single]
    sets = [(_ready(a), _ready(b)) for a, b in zip(several, single, strict=True)]
    return Work(sets, {OURS: lambda s: s[0](), "q 1": lambda s: s[1]()}, **_work_of(several[0]))


def accuracy_work(bench: Bench, *, kv_dtype: str, lengths: tuple[int, ...]) -> Work:
    """What the format costs, and beside it FlashAttention's rule: error ≤ 2 × that of the plain math, plus rounding."""
    stored = bench.kv_dtype if kv_dtype == "bfloat16" else kv_dtype
    batch = decode_sets(bench, stored, lengths, 1)[0]
    ring = (batch.residual, batch.residual_slots, batch.flushed_lens)
    sequences = gather(batch.cache, batch.layout, batch.block_tables, batch.seq_lens, *ring)
    key, value, key_start = in_a_row(sequences)
    cuts = {"query_start": batch.query_start, "key_start": key_start}
    exact, _ = attention(batch.query, key, value, **cuts)
    plain, _ = attention(batch.query, key, value, **cuts, dtype=bench.dtype)
    error, plain_error = (float((out.double() - exact).abs().max()) for out in (_ready(batch)(), plain))
    # Rounding the exact result to 16 bits is an error that nothing can be below.
    rounding = float((exact.to(bench.dtype).double() - exact).abs().max())
    values = {"Gaussian": quantisation_error(kv_dtype), "outliers": quantisation_error(kv_dtype, outliers=True)}
    return Work(values=values | {"kernel over plain": error / max(plain_error, rounding)})


# ---- cache -----------------------------------------------------------------------------------------------------------


def write_work(bench: Bench, *, kv_dtype: str, lengths: tuple[int, ...], rope: bool) -> Work:
    """A prompt's K and V into whole pages; with `rope` the key and the query are rotated on the way."""
    kv_dtype = bench.kv_dtype if kv_dtype == "bfloat16" else kv_dtype
    tokens, layout = sum(lengths), PageLayout(kv_dtype, HEAD_DIM)
    pages = sum(-(-length // layout.page_size) for length in lengths)
    query_start = bench.ints([0, *accumulate(lengths)])
    angles = torch.rand(max(lengths), HEAD_DIM // 2, device=bench.device) * 2 * math.pi
    cos, sin = angles.cos(), angles.sin()
    nothing_flushed = bench.ints([0] * len(lengths))
    row = HEAD_DIM * bench.dtype.itemsize
    moved = KV_HEADS * (2 * tokens * row + pages * layout.page_bytes) + (2 * tokens * Q_HEADS * row if rope else 0)
    sets = []
    for batch in decode_sets(bench, kv_dtype, lengths, num_sets(moved)):
        qkv = [bench.randn(tokens, heads, HEAD_DIM) for heads in (Q_HEADS if rope else 0, KV_HEADS, KV_HEADS)]
        where = slot_mapping(batch.block_tables, query_start, batch.seq_lens, tokens, layout.page_size, check=False)
        sets.append((batch, qkv, where))

    def ours(s):
        batch, (query, key, value), (positions, slots) = s
        rotation = {"cos": cos, "sin": sin, "query": query} if rope else {}
        sequences = {}
        if layout.is_low_bit:
            sequences = {
                "block_tables": batch.block_tables,
                "query_start": query_start,
                "seq_lens": batch.seq_lens,
                "residual": batch.residual,
                "residual_slots": batch.residual_slots,
                "flushed_lens": nothing_flushed,
                "committed_lens": batch.seq_lens,
            }
        write_kv(
            key, value, batch.cache, layout, slots=slots, positions=positions, **rotation, **sequences, check=False
        )

    def torch_eager(s):
        batch, (query, key, value), (positions, slots) = s
        if rope:
            query.copy_(peers.rope(query, cos[positions], sin[positions]))
            key = peers.rope(key, cos[positions], sin[positions])
        words = layout.words_view(batch.cache)
        for i, x in enumerate((key, value)):
            words[slots // layout.page_size, :, i, slots % layout.page_size] = x

    implementations = {OURS: ours} | ({"torch": torch_eager} if layout.is_float else {})
    return Work(sets, implementations, bytes=float(moved))


def dequantise_work(bench: Bench, *, kv_dtype: str, lengths: tuple[int, ...]) -> Work:
    """Quantised pages to 16-bit ones, as for a prefill over them."""
    layout = PageLayout(bench.kv_dtype, HEAD_DIM)
    moved = sum(kv_bytes(PageLayout(name, HEAD_DIM), lengths, KV_HEADS) for name in (kv_dtype, bench.kv_dtype))
    sources = decode_sets(bench, kv_dtype, lengths, num_sets(moved))
    targets = decode_sets(bench, bench.kv_dtype, lengths, len(sources))

    def ours(s):
        source, target = s
        dequantise_pages(
            source.cache,
            source.layout,
            source.block_tables,
            source.seq_lens,
            target.cache,
            layout,
            target.block_tables,
            residual=source.residual,
            residual_slots=source.residual_slots,
            flushed_lens=source.flushed_lens,
            check=False,
        )

    return Work(list(zip(sources, targets, strict=True)), {OURS: ours}, bytes=float(moved))


# ---- elementwise -----------------------------------------------------------------------------------------------------


def rms_norm_work(bench: Bench, *, tokens: int, hidden: int, residual: bool) -> Work:
    weight = bench.randn(hidden)
    moved = (4 if residual else 2) * 2.0 * tokens * hidden
    sets = [
        (bench.randn(tokens, hidden), bench.randn(tokens, hidden) if residual else None) for _ in range(num_sets(moved))
    ]

    def ours(s):
        return rms_norm(s[0], weight, EPS, residual=s[1], check=False)

    def torch_eager(s):
        return peers.rms_norm(s[0] if s[1] is None else s[1].add_(s[0]), weight, EPS)

    # With a residual the two would not normalise the same sum: each adds to it.
    return Work(sets, {OURS: ours, "torch": torch_eager}, bytes=moved, same=() if residual else ("torch",))


def silu_mul_work(bench: Bench, *, tokens: int, intermediate: int) -> Work:
    moved = 3 * 2.0 * tokens * intermediate
    sets = [bench.randn(tokens, 2 * intermediate) for _ in range(num_sets(moved))]
    implementations = {OURS: partial(silu_mul, check=False), "torch": peers.silu_mul}
    return Work(sets, implementations, bytes=moved, same=("torch",))


def rope_work(bench: Bench, *, tokens: int, norm: bool) -> Work:
    angles = torch.rand(tokens, HEAD_DIM // 2, device=bench.device) * 2 * math.pi
    cos, sin = angles.cos(), angles.sin()
    positions = torch.arange(tokens, device=bench.device)
    # In place, over and over: weights of one keep the numbers as they are.
    weights = [torch.ones(HEAD_DIM, dtype=bench.dtype, device=bench.device) if norm else None for _ in range(2)]
    moved = 2 * 2.0 * tokens * (Q_HEADS + KV_HEADS) * HEAD_DIM + 2 * 4.0 * angles.numel()
    sets = [
        tuple(bench.randn(tokens, heads, HEAD_DIM) for heads in (Q_HEADS, KV_HEADS)) for _ in range(num_sets(moved))
    ]

    def ours(qk):
        qk_norm_rope(*qk, cos, sin, positions, query_norm=weights[0], key_norm=weights[1], eps=EPS, check=False)

    def torch_eager(qk):
        for x, weight in zip(qk, weights, strict=True):
            peers.rope(x if weight is None else peers.rms_norm(x, weight, EPS), cos, sin)

    return Work(sets, {OURS: ours, "torch": torch_eager}, bytes=moved)


# ---- linear ----------------------------------------------------------------------------------------------------------


def linear_work(bench: Bench, *, rows: int, n: int, k: int) -> Work:
    """Few rows by a weight that is in no cache, as the engine launches it: while the call before still runs."""
    sets, work = _few_rows(bench, rows, n, k)
    implementations = {
        OURS: lambda s: skinny_linear(*s, pdl=True, check=False),
        "cublas": lambda s: functional.linear(*s),
    }
    return Work(sets, implementations, same=("cublas",), **work)


def gate_up_work(bench: Bench, *, rows: int, n: int, k: int) -> Work:
    """The same with the activation in the kernel, n counting gate and up."""
    sets, work = _few_rows(bench, rows, n, k)
    implementations = {
        OURS: lambda s: skinny_gate_up(*s, pdl=True, check=False),
        "cublas + SiLU·mul": lambda s: silu_mul(functional.linear(*s), check=False),
    }
    return Work(sets, implementations, same=("cublas + SiLU·mul",), **work)


def _few_rows(bench: Bench, rows: int, n: int, k: int) -> tuple[list[tuple[torch.Tensor, ...]], dict[str, Any]]:
    """Sets of x and weight, and the work. Of the bytes only the weight's count: the others are in the L2."""
    weight_bytes = 2.0 * n * k
    sets = [(bench.randn(rows, k), bench.randn(n, k)) for _ in range(num_sets(weight_bytes))]
    return sets, {"flops": 2.0 * rows * n * k, "bytes": weight_bytes, "floor": ("read", "matmul")}


# ---- fp8 -------------------------------------------------------------------------------------------------------------


def _dequantised(quantised: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    codes, scale = quantised
    return codes.float() * scale


def quantise_work(bench: Bench, *, tokens: int, hidden: int) -> Work:
    moved = (2.0 + 1) * tokens * hidden + 4 * tokens
    sets = [bench.randn(tokens, hidden) for _ in range(num_sets(moved))]
    implementations = {OURS: partial(quantise_tokens_fp8, check=False), "torch": peers.quantise_tokens}
    return Work(sets, implementations, bytes=moved, same=("torch",), compared=_dequantised)


def rms_norm_fp8_work(bench: Bench, *, tokens: int, hidden: int) -> Work:
    """With residual: each of the two adds to its own, so that both normalise the same sum."""
    weight = bench.randn(hidden)
    moved = (3 * 2.0 + 1) * tokens * hidden + 4 * tokens
    sets = []
    for _ in range(num_sets(moved)):
        x, residual = bench.randn(tokens, hidden), bench.randn(tokens, hidden)
        sets.append((x, residual, residual.clone()))

    def ours(s):
        return rms_norm_fp8(s[0], weight, EPS, residual=s[1], check=False)

    def two_steps(s):
        return quantise_tokens_fp8(rms_norm(s[0], weight, EPS, residual=s[2], check=False), check=False)

    implementations = {OURS: ours, "two steps": two_steps}
    return Work(sets, implementations, bytes=moved, same=("two steps",), compared=_dequantised)


def silu_mul_fp8_work(bench: Bench, *, tokens: int, intermediate: int) -> Work:
    moved = (2 * 2.0 + 1) * tokens * intermediate + 4 * tokens
    sets = [bench.randn(tokens, 2 * intermediate) for _ in range(num_sets(moved))]
    implementations = {
        OURS: partial(silu_mul_fp8, check=False),
        "two steps": lambda x: quantise_tokens_fp8(silu_mul(x, check=False), check=False),
    }
    return Work(sets, implementations, bytes=moved, same=("two steps",), compared=_dequantised)


def product_fp8_work(bench: Bench, *, rows: int, n: int, k: int) -> Work:
    """The product that the engine runs on fp8 weights, beside that of the same numbers in 16 bits.

    Up to MAX_ROWS rows are ours, beside torch's, and count the bytes of the weight. More are torch's own and count
    FLOPs, for which fp8 has no measured limit; those of few rows are shown by bytes too.
    """

    def operand(*shape: int) -> tuple[torch.Tensor, ...]:
        quantised = quantise_tokens_fp8(bench.randn(*shape), check=False)
        return *quantised, _dequantised(quantised).to(bench.dtype)

    sets = [(operand(rows, k), operand(n, k)) for _ in range(num_sets(float(n * k)))]
    theirs = {"scaled_mm": lambda s: peers.product_fp8(*s[0][:2], *s[1][:2])}
    if rows <= MAX_ROWS:
        ours = {OURS: lambda s: skinny_linear_fp8(*s[0][:2], s[1][0], s[1][1].view(-1), pdl=True, check=False)} | theirs
    else:
        ours = {OURS: theirs["scaled_mm"]}
    implementations = ours | {"bfloat16": lambda s: functional.linear(s[0][2], s[1][2])}
    work = {"bytes": float(n * k)} if rows <= FEW_ROWS else {"flops": 2.0 * rows * n * k}
    return Work(sets, implementations, **work, floor=("read",), same=("bfloat16",))


# ---- sampling --------------------------------------------------------------------------------------------------------


def sample_work(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    deviation: float,
    bench: Bench,
    *,
    batch: int,
    vocab: int,
) -> Work:
    moved = 2.0 * batch * vocab
    sets = [bench.randn(batch, vocab).mul_(deviation) for _ in range(num_sets(moved))]
    settings = {
        "temperature": torch.full((batch,), temperature, device=bench.device),
        "top_k": None if top_k is None else bench.ints([top_k] * batch),
        "top_p": None if top_p is None else torch.full((batch,), top_p, device=bench.device),
        "seeds": torch.arange(batch, device=bench.device),
        "positions": torch.arange(batch, device=bench.device),
        "filtered": top_k is not None or top_p is not None,
    }

    def torch_eager(logits):
        return peers.sample(logits, temperature, top_k, top_p) if temperature else logits.argmax(-1)

    return Work(sets, {OURS: partial(sample, **settings, check=False), "torch": torch_eager}, bytes=moved)


def verify_drafts_work(bench: Bench, *, batch: int, vocab: int, num_drafts: int) -> Work:
    """Drafts that were drawn from distributions near the target's, as good ones are."""
    # Needed of the drafts' float32 distributions: one in full, at the first rejection; of the others a number.
    moved = batch * (2.0 * (num_drafts + 1) * vocab + 4.0 * vocab)
    sets = []
    for _ in range(num_sets(moved)):
        target = bench.randn(batch, num_drafts + 1, vocab).mul_(4.0)
        near = target[:, :num_drafts] + bench.randn(batch, num_drafts, vocab)
        draft_probs = near.float().softmax(-1)
        tokens = draft_probs.view(-1, vocab).multinomial(1).view(batch, num_drafts)
        sets.append((tokens, draft_probs, target))
    lens = bench.ints([num_drafts] * batch)
    settings = {
        "temperature": torch.ones(batch, device=bench.device),
        "seeds": torch.arange(batch, device=bench.device),
        "positions": torch.arange(batch, device=bench.device),
        "filtered": False,
    }

    def ours(s):
        tokens, draft_probs, target = s
        return verify(tokens, draft_probs, lens, target_logits=target, **settings, check=False)[0]

    return Work(sets, {OURS: ours, "torch": lambda s: peers.verify(*s)}, bytes=moved)
