"""Prefill attention against its reference: the portable Triton kernel and the one for Hopper.

Without a GPU the first runs in Triton's interpreter with small tiles, the second on `gluon_on_cpu`.
"""

import dataclasses
import heapq
import itertools
import math
import re
import types
from collections.abc import Callable

import gluon_on_cpu
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton.experimental.gluon import language as gl

from kernels import prefill_grid, prefill_hopper
from kernels.aot import Compiled, compile_for_hopper
from kernels.pages import PageLayout
from kernels.prefill import PagedContext, PrefillConfig, _prefill_kernel, prefill_attention
from kernels.prefill_grid import pack_for
from kernels.prefill_hopper import HopperConfig
from kernels.reference.attention import attention, in_a_row, join, merge_partials, start_of
from kernels.reference.pages import gather

HAS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")
DTYPE = torch.bfloat16 if HAS_CUDA else torch.float16
KV_DTYPE = str(DTYPE).removeprefix("torch.")


def triton_config(head_dim: int, pack: int) -> PrefillConfig:
    if not HAS_CUDA:  # small, so that a short sequence has several tiles
        return PrefillConfig(32, 16, pack=pack)
    return PrefillConfig(128, 64, num_warps=8 if head_dim > 128 else 4, pack=pack)


def hopper_config(head_dim: int, pack: int) -> HopperConfig:
    return dataclasses.replace(prefill_hopper.choose_config(head_dim, group=1, max_query_len=1), pack=pack)


@pytest.fixture(params=[triton_config, hopper_config], ids=["triton", "hopper"])
def config_for(request, monkeypatch) -> Callable:
    """The kernel under test, as what makes a configuration for (head_dim, pack)."""
    if request.param is hopper_config:
        if not HAS_CUDA:
            kernel = gluon_on_cpu.OnCpu(prefill_hopper, "_prefill_hopper_kernel")
            monkeypatch.setattr(prefill_hopper, "_launcher", kernel)
            monkeypatch.setattr(prefill_hopper, "num_multiprocessors", lambda device: 3)
        elif not prefill_hopper.is_hopper(torch.device("cuda", torch.cuda.current_device())):
            pytest.skip("not a Hopper GPU")
    return request.param


# ---- batches -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Batch:
    """Inputs of prefill_attention, and the same keys in a row for the reference."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    query_start: torch.Tensor
    context: PagedContext | None
    all_keys: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    @property
    def max_query_len(self) -> int:
        return int(self.query_start.diff().max())

    def run(self, config, **options) -> tuple[torch.Tensor, torch.Tensor]:
        return prefill_attention(
            self.query,
            self.key,
            self.value,
            query_start=self.query_start,
            max_query_len=self.max_query_len,
            context=self.context,
            return_lse=True,
            config=config,
            **options,
        )

    def expect(self, dtype=torch.float64, **options) -> tuple[torch.Tensor, torch.Tensor]:
        key, value, key_start = self.all_keys
        return attention(
            self.query, key, value, query_start=self.query_start, key_start=key_start, dtype=dtype, **options
        )


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator).to(DEVICE, DTYPE)


def paged(
    key: torch.Tensor, value: torch.Tensor, lengths: list[int], page_size: int, generator: torch.Generator
) -> tuple[torch.Tensor, PageLayout, torch.Tensor]:
    """Keys laid into pages in a random order, NaN wherever no key is, page 0 included; (cache, layout, tables)."""
    num_heads, head_dim = key.shape[1:]
    layout = PageLayout(KV_DTYPE, head_dim, page_size)
    counts = [-(-length // page_size) for length in lengths]
    cache = layout.empty_cache(sum(counts) + 3, num_heads, DEVICE)
    words = layout.words_view(cache)
    words.fill_(torch.nan)
    free = (torch.randperm(sum(counts) + 2, generator=generator) + 1).tolist()
    tables = torch.zeros(len(lengths), max(max(counts), 1), dtype=torch.int32)
    at = 0
    for b, length in enumerate(lengths):
        for j in range(counts[b]):
            tables[b, j] = free.pop()
            rows = slice(at + j * page_size, at + min((j + 1) * page_size, length))
            for which, source in enumerate((key, value)):
                part = source[rows].transpose(0, 1)
                words[int(tables[b, j]), :, which, : part.shape[1]] = part
        at += length
    return cache, layout, tables.to(DEVICE)


def batch(
    lens: list[int],
    contexts: list[int] | None = None,
    heads: tuple[int, int] = (2, 1),
    head_dim: int = 64,
    page_size: int = 32,
    seed: int = 0,
) -> Batch:
    """Random sequences of `lens` new tokens behind contexts of these lengths, keys behind the batch being NaN."""
    generator = torch.Generator().manual_seed(seed)
    num_q_heads, num_kv_heads = heads
    num_tokens = sum(lens)
    query = normal(generator, num_tokens + 5, num_q_heads, head_dim)
    key, value = (normal(generator, num_tokens + 5, num_kv_heads, head_dim) for _ in range(2))
    for tensor in (query, key, value):
        tensor[num_tokens:] = torch.nan
    query_start = start_of(torch.tensor(lens, device=DEVICE))
    new = (key[:num_tokens], value[:num_tokens], query_start)
    if contexts is None:
        return Batch(query, key, value, query_start, None, new)
    old = [normal(generator, sum(contexts), num_kv_heads, head_dim) for _ in range(2)]
    cache, layout, tables = paged(*old, contexts, page_size, generator)
    context_lens = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    context = PagedContext(cache, layout, tables, context_lens + query_start.diff())
    gathered = in_a_row(gather(cache, layout, tables, context_lens))
    return Batch(query, key, value, query_start, context, join(gathered, new))


def assert_accurate(out: torch.Tensor, expected: torch.Tensor, plain: torch.Tensor) -> None:
    """FlashAttention's rule: at most twice the error of the same math in 16 bits, plus rounding of the result."""
    rounding = 2 * (expected.to(out.dtype).double() - expected).abs().max()
    error, allowed = (out.double() - expected).abs().max(), 2 * (plain.double() - expected).abs().max() + rounding
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def check(given: Batch, config, **options) -> None:
    out, lse = given.run(config, **options)
    expected, expected_lse = given.expect(**options)
    plain, _ = given.expect(dtype=DTYPE, **options)
    used = int(given.query_start[-1])
    assert_accurate(out[:used], expected[:used], plain[:used])
    torch.testing.assert_close(lse[:used].double(), expected_lse[:used], atol=2e-5, rtol=1e-5)


# ---- against the reference -----------------------------------------------------------------------------------------

# Sequences and windows of more than one token are this many times as long on the GPU, where tiles are.
SCALE = 4 if HAS_CUDA else 1
RAGGED = [50, 0, 1, 33]
CONTEXTS = [40, 5, 64, 0]
CASES = {
    "one tile": {"lens": [5]},
    "even": {"lens": [64, 64], "heads": (2, 2)},
    "ragged": {"lens": RAGGED, "heads": (4, 2)},
    "long": {"lens": [300, 1], "heads": (1, 1)},
    "hd 80": {"lens": RAGGED, "head_dim": 80},
    "hd 96": {"lens": RAGGED, "head_dim": 96, "contexts": CONTEXTS},
    "hd 128": {"lens": RAGGED, "head_dim": 128, "contexts": CONTEXTS, "heads": (3, 1)},
    "hd 256": {"lens": RAGGED, "head_dim": 256, "contexts": CONTEXTS},
    "context": {"lens": RAGGED, "contexts": CONTEXTS},
    "context, pages of 64": {"lens": RAGGED, "contexts": [130, 5, 64, 200], "page_size": 64},
    "context, pages of 128": {"lens": [40, 3], "contexts": [130, 257], "page_size": 128},
    "packed": {"lens": [9, 0, 1, 17], "heads": (4, 1), "pack": 4, "contexts": CONTEXTS},
    "half packed": {"lens": RAGGED, "heads": (6, 1), "pack": 2},
    "window": {"lens": RAGGED, "window": 20},
    "window of one": {"lens": [20], "contexts": [40], "window": 1},
    "window over context": {"lens": RAGGED, "contexts": [200, 5, 64, 0], "window": 70},
    "window beyond all": {"lens": [20], "contexts": [40], "window": 1000},
    "soft cap": {"lens": RAGGED, "contexts": CONTEXTS, "soft_cap": 2.0},
    "all at once": {
        "lens": RAGGED, "contexts": [200, 5, 64, 0], "heads": (8, 2), "pack": 2, "head_dim": 80, "page_size": 64,
        "window": 45, "soft_cap": 3.0, "softmax_scale": 0.3,
    },
}  # fmt: skip
OPTIONS = ("window", "soft_cap", "softmax_scale")
# What others of the table cover where time goes into compiling.
CPU_ONLY = {"one tile", "even", "half packed", "context, pages of 64", "window of one", "window beyond all"}


def scaled(numbers: list[int]) -> list[int]:
    return [n * SCALE if n > 1 else n for n in numbers]


@pytest.mark.parametrize("name", [name for name in CASES if not HAS_CUDA or name not in CPU_ONLY])
def test_matches_reference(name, config_for):
    case = dict(CASES[name])
    options = {key: case.pop(key) for key in OPTIONS if key in case}
    if "window" in options:
        [options["window"]] = scaled([options["window"]])
    config = config_for(case.get("head_dim", 64), case.pop("pack", 1))
    case |= {key: scaled(case[key]) for key in ("lens", "contexts") if key in case}
    check(batch(**case), config, **options)


@pytest.mark.parametrize(
    ("head_dim", "options"),
    [(64, {"block_n": 64, "num_stages": 3, "ping_pong": False}), (256, {"ping_pong": True})],
    ids=str,
)
@pytest.mark.parametrize("config_for", [hopper_config], indirect=True, ids=["hopper"])
def test_hopper_variants(head_dim, options, config_for):
    given = batch([300, 0, 1, 133], [200, 5, 300, 0], head_dim=head_dim)
    check(given, dataclasses.replace(config_for(head_dim, 1), **options))


@pytest.mark.parametrize("lens", [[140, 130], [140, 0, 1]], ids=str)
def test_sections(lens, config_for, monkeypatch):
    """More keys than fit in L2: tiles in several sections, the last one narrower where sequences are ragged."""
    monkeypatch.setattr(prefill_grid, "L2_BUDGET_BYTES", 2 * (2 * 140 * 64 * 2))  # K and V of two heads
    check(batch(lens, heads=(3, 3)), config_for(64, 1))


@pytest.mark.parametrize(("num_seqs", "length"), [(8, 2048), (1, 16384)])
def test_every_tile_is_drawn_once_and_evenly(num_seqs, length):
    """By the 132 multiprocessors of an H200. A tile costs as much as its tiles of keys and one more."""
    query, key = (torch.empty(num_seqs * length, heads, 128, dtype=DTYPE, device="meta") for heads in (32, 8))
    grid = prefill_grid.cut(query, key, num_seqs, length, None, 128, 1)
    assert grid.uniform
    assert grid.columns_per_section < grid.num_columns
    query_start = gluon_on_cpu.Pointer.to_tensor(torch.arange(num_seqs + 1, dtype=torch.int32) * length)
    sizes = (num_seqs, grid.num_heads, grid.num_columns, grid.num_tiles, grid.columns_per_section)
    constants = types.SimpleNamespace(UNIFORM=True, PAGE_SIZE=0, tokens=128)
    tile_of = gluon_on_cpu.names(prefill_hopper, 0, 132)["_tile"]
    seen, costs = set(), [0] * 132
    for rank in range(grid.num_ranks):
        seq, head, _, first_token, _, _ = map(int, tile_of(rank, (query_start, None), sizes, constants))
        seen.add((seq, head, first_token))
        heapq.heapreplace(costs, costs[0] + first_token // 128 + 2)  # whoever is done first draws
    assert len(seen) == num_seqs * 32 * length // 128 == grid.num_ranks
    assert max(costs) <= 1.05 * sum(costs) / 132


def test_default_configuration():
    check(batch(RAGGED, CONTEXTS), None)


def test_nan_of_another_sequence_stays_there(config_for):
    given = batch([40, 30, 20], [40, 50, 0])
    expected, _ = given.run(config_for(64, 1))
    for tensor in (given.query, given.key, given.value):
        tensor[40:70] = torch.nan
    out, _ = given.run(config_for(64, 1))
    assert torch.equal(out[:40], expected[:40])
    assert torch.equal(out[70:90], expected[70:90])
    assert out[40:70].isnan().all()


def test_pages_that_the_window_has_left_are_not_needed(config_for):
    """The engine frees them: their entries turn to the null page, which here holds NaN."""
    given = batch([40], [200], page_size=32)
    expected, _ = given.run(config_for(64, 1), window=50)
    assert expected[:40].isfinite().all()
    given.context.block_tables[0, : (200 - 50 + 1) // 32] = 0
    out, _ = given.run(config_for(64, 1), window=50)
    assert torch.equal(out[:40], expected[:40])


def test_rows_behind_the_batch_are_left_alone(config_for):
    given = batch([20])
    out = torch.full_like(given.query, 7.0)
    given.run(config_for(64, 1), out=out)
    assert out[:20].isfinite().all()
    assert (out[20:] == 7.0).all()


def test_strides_are_free(config_for):
    """Query, key and value as parts of one projection, output into a wider row."""
    given = batch([40, 13], [33, 0], heads=(4, 2))
    expected, _ = given.run(config_for(64, 1))
    fused = torch.cat([given.query, given.key, given.value], dim=1)
    wide = torch.zeros(fused.shape[0], 5, 96, dtype=DTYPE, device=DEVICE)
    parts = fused.split([4, 2, 2], dim=1)
    assert not any(part.is_contiguous() for part in parts)
    given.query, given.key, given.value = parts
    out, _ = given.run(config_for(64, 1), out=wide[:, 1:, :64])
    assert torch.equal(out[:53], expected[:53])
    assert (wide[:, 0] == 0).all()
    assert (wide[..., 64:] == 0).all()


def test_without_tokens_or_sequences(config_for):
    empty = torch.empty(0, 2, 64, dtype=DTYPE, device=DEVICE)
    start = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    for query_start in (start, start[:1]):
        out, lse = prefill_attention(
            empty, empty, empty, query_start=query_start, max_query_len=0, return_lse=True, config=config_for(64, 1)
        )
        assert out.shape == (0, 2, 64)
        assert lse.shape == (0, 2)
    given = batch([0, 0])
    given.run(config_for(64, 1))


# ---- what must not change the result -------------------------------------------------------------------------------


def reordered(given: Batch, order: list[int]) -> Batch:
    """The same sequences in another order."""
    cuts = given.query_start.tolist()
    rows = torch.cat([torch.arange(cuts[b], cuts[b + 1]) for b in order]).to(DEVICE)
    lens = torch.tensor([cuts[b + 1] - cuts[b] for b in order], device=DEVICE)
    context = given.context
    if context is not None:
        context = dataclasses.replace(
            context, block_tables=context.block_tables[order], seq_lens=context.seq_lens[order]
        )
    return Batch(given.query[rows], given.key[rows], given.value[rows], start_of(lens), context, given.all_keys)


@pytest.mark.parametrize("pack", [1, 2])
def test_batch_order(config_for, pack):
    given = batch([50, 0, 1, 33], [40, 5, 64, 0])
    order = [3, 1, 0, 2]
    out, lse = given.run(config_for(64, pack))
    other, other_lse = reordered(given, order).run(config_for(64, pack))
    cuts = given.query_start.tolist()
    rows = torch.cat([torch.arange(cuts[b], cuts[b + 1]) for b in order]).to(DEVICE)
    assert torch.equal(other, out[rows])
    assert torch.equal(other_lse, lse[rows])


def test_page_order(config_for):
    given = batch([20, 10], [70, 33])
    out, _ = given.run(config_for(64, 1))
    context = given.context
    order = torch.randperm(context.cache.shape[0], generator=torch.Generator().manual_seed(1)).to(DEVICE)
    moved = torch.empty_like(context.cache)
    moved[order] = context.cache
    tables = order.to(torch.int32)[context.block_tables.long()]
    given.context = dataclasses.replace(context, cache=moved, block_tables=tables)
    assert torch.equal(given.run(config_for(64, 1))[0][:30], out[:30])


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])  # the fixture only chooses
@given(data=st.data())
def test_chunks(config_for, data):
    """A prompt in chunks, each over the pages of those before it, gives the rows of the whole."""
    total = data.draw(st.integers(2, 120 if config_for is triton_config and not HAS_CUDA else 300), "prompt")
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, total - 1), max_size=3), "cuts")), total]
    window = data.draw(st.integers(1, 2 * total), "window")
    whole = batch([total], heads=(2, 1), seed=total)
    expected, expected_lse = whole.expect(window=window)
    plain, _ = whole.expect(dtype=DTYPE, window=window)
    generator = torch.Generator().manual_seed(0)
    outs, lses = [], []
    for start, stop in itertools.pairwise(cuts):
        context = None
        if start:
            keys = (whole.key[:start], whole.value[:start])
            cache, layout, tables = paged(*keys, [start], 32, generator)
            seq_lens = torch.tensor([stop], dtype=torch.int32, device=DEVICE)
            context = PagedContext(cache, layout, tables, seq_lens)
        rows = slice(start, stop)
        query_start = torch.tensor([0, stop - start], dtype=torch.int32, device=DEVICE)
        chunk = Batch(whole.query[rows], whole.key[rows], whole.value[rows], query_start, context, whole.all_keys)
        out, lse = chunk.run(config_for(64, 1), window=window)
        outs.append(out)
        lses.append(lse)
    assert_accurate(torch.cat(outs), expected[:total], plain[:total])
    torch.testing.assert_close(torch.cat(lses).double(), expected_lse[:total], atol=2e-5, rtol=1e-5)


# ---- the reference itself ------------------------------------------------------------------------------------------


def test_reference_is_attention():
    """Against torch's own attention in float64, sequence by sequence, with the mask written out."""
    given = batch([7, 0, 4], [5, 2, 0], heads=(4, 2))
    key, value, key_start = (tensor.double() for tensor in given.all_keys)
    out, lse = given.expect(window=6)
    for b in range(3):
        rows = slice(*given.query_start[b : b + 2].tolist())
        keys = slice(*key_start[b : b + 2].long().tolist())
        q, k, v = (x.transpose(0, 1) for x in (given.query[rows].double(), key[keys], value[keys]))
        positions = torch.arange(k.shape[1], device=DEVICE)
        distance = positions[k.shape[1] - q.shape[1] :, None] - positions
        mask = (distance < 6) & (distance >= 0)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(out[rows], expected.transpose(0, 1), atol=1e-12, rtol=0)
        logits = (q @ k.repeat_interleave(2, 0).transpose(1, 2) / 8).masked_fill(~mask, -torch.inf)
        torch.testing.assert_close(lse[rows], logits.logsumexp(-1).T, atol=1e-12, rtol=0)


def test_reference_soft_cap_and_empty_row():
    query, key, value = (torch.tensor([[[x]]], dtype=torch.float64) for x in (3.0, 5.0, 7.0))
    start = torch.tensor([0, 1])
    out, lse = attention(query, key, value, query_start=start, softmax_scale=2.0, soft_cap=10.0)
    assert out.item() == 7.0
    assert lse.item() == pytest.approx(10 * math.tanh(30 / 10))
    out, lse = attention(query, key[:0], value[:0], query_start=start, key_start=torch.tensor([0, 0]))
    assert out.item() == 0.0
    assert lse.item() == -math.inf


@given(data=st.data())
def test_merge_of_partials(data):
    """Any grouping of any partition of the keys gives attention over all, empty parts included."""
    num_keys = data.draw(st.integers(1, 12), "keys")
    parts = data.draw(st.lists(st.integers(0, 3), min_size=num_keys, max_size=num_keys), "part of each key")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    logits = 10 * torch.randn(num_keys, dtype=torch.float64, generator=generator)
    values = torch.randn(num_keys, 5, dtype=torch.float64, generator=generator)
    outs, lses = [], []
    for part in range(4):
        mine = torch.tensor([p == part for p in parts])
        lses.append(logits[mine].logsumexp(0))
        outs.append(logits[mine].softmax(0) @ values[mine] if mine.any() else torch.full((5,), torch.nan))
    outs, lses = torch.stack(outs).double(), torch.stack(lses)
    expected = (logits.softmax(0) @ values, logits.logsumexp(0))
    torch.testing.assert_close(merge_partials(outs, lses), expected)
    pairs = [merge_partials(outs[[i, j]], lses[[i, j]]) for i, j in ((2, 0), (3, 1))]
    torch.testing.assert_close(merge_partials(*map(torch.stack, zip(*pairs, strict=True))), expected)


def test_merge_of_nothing():
    out, lse = merge_partials(torch.full((2, 3, 4), torch.nan), torch.full((2, 3), -torch.inf))
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_merge_of_context_and_new_tokens(config_for):
    """The log-sum-exp that the kernel returns is the one that merging needs."""
    given = batch([20], [50])
    whole, whole_lse = given.expect()
    key, value, _ = given.all_keys
    q = given.query[:20].double()
    logits = torch.einsum("qhd,kd->qhk", q, key[:50, 0].double()) / 8
    part = (logits.softmax(-1) @ value[:50, 0].double(), logits.logsumexp(-1))
    given.context = None
    out, lse = given.run(config_for(64, 1))
    merged = merge_partials(torch.stack([part[0], out[:20].double()]), torch.stack([part[1], lse[:20].double()]))
    torch.testing.assert_close(merged[0], whole[:20], atol=2e-2 if HAS_CUDA else 2e-3, rtol=0)
    torch.testing.assert_close(merged[1], whole_lse[:20], atol=2e-5, rtol=1e-5)


# ---- bad input -----------------------------------------------------------------------------------------------------


def _int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def _set(**changes):
    return lambda arguments: arguments.update(changes)


def _context(**changes):
    def change(arguments):
        arguments["context"] = dataclasses.replace(arguments["context"], **changes)

    return change


def _change(name, function):
    def change(arguments):
        arguments[name] = function(arguments[name])

    return change


def _change_context(name, function):
    def change(arguments):
        arguments["context"] = dataclasses.replace(
            arguments["context"], **{name: function(getattr(arguments["context"], name))}
        )

    return change


def _in_fp8(**changes):
    def change(arguments):
        for name in ("query", "key", "value"):
            arguments[name] = arguments[name].to(torch.float8_e4m3fn)
        arguments.update(context=None, **changes)

    return change


BAD = {
    "query is float32": ("query", _change("query", torch.Tensor.float)),
    "query is None": ("query is a NoneType", _set(query=None)),
    "query is flat": ("query", _change("query", lambda q: q.flatten(1))),
    "query of head size 48": ("query", _change("query", lambda q: q[..., :48])),
    "query with a strided row": ("query", _change("query", lambda q: q.repeat_interleave(2, -1)[..., ::2])),
    "query at an odd address": ("query", _change("query", lambda q: q.repeat(1, 1, 2)[..., 1:65])),
    "query with odd rows": ("query", _change("query", lambda q: q.new_zeros(35, 260)[:, :256].unflatten(1, (4, 64)))),
    "3 query heads for 2": ("query", _change("query", lambda q: q[:, :3])),
    "key of another dtype": ("key", _change("key", lambda k: k.to(torch.float8_e4m3fn))),
    "too few keys": ("key", _change("key", lambda k: k[1:])),
    "value of other heads": ("value", _change("value", lambda v: v[:, :1])),
    "out too short": ("out", _set(out=torch.empty(3, 4, 64, dtype=DTYPE, device=DEVICE))),
    "out of another dtype": ("out", _set(out=torch.empty(35, 4, 64, device=DEVICE))),
    "out overlaps": ("overlap", _set(out=torch.empty(64, dtype=DTYPE, device=DEVICE).expand(35, 4, 64))),
    "softmax_scale is text": ("softmax_scale is 'x'", _set(softmax_scale="x")),
    "window is a fraction": ("window is 1.5", _set(window=1.5)),
    "soft_cap is infinite": ("soft_cap is inf", _set(soft_cap=math.inf)),
    "max_query_len is None": ("max_query_len is None", _set(max_query_len=None)),
    "max_query_len is a float": ("max_query_len is 20.0", _set(max_query_len=20.0)),
    "config is a number": ("config is 3", _set(config=3)),
    "fp8 without query_scale": ("query_scale is None", _in_fp8(query_scale=None)),
    "fp8 with a key_scale per head": ("key_scale has shape", _in_fp8(key_scale=torch.ones(2, device=DEVICE))),
    "fp8 with value_scale 0": ("value_scale is 0.0", _in_fp8(value_scale=torch.zeros((), device=DEVICE))),
    "context is a pair": ("context is a tuple", _set(context=(1, 2))),
    "layout is None": (r"context\.layout is None", _context(layout=None)),
    "softmax_scale": ("softmax_scale", _set(softmax_scale=-1.0)),
    "window": ("window", _set(window=0)),
    "soft_cap": ("soft_cap", _set(soft_cap=0.0)),
    "query_start is int64": ("query_start", _change("query_start", torch.Tensor.long)),
    "query_start falls": ("query_start", _set(query_start=_int32([0, 25, 20]))),
    "query_start from 1": ("query_start", _set(query_start=_int32([1, 20, 30]))),
    "query_start too far": ("query_start", _set(query_start=_int32([0, 20, 36]))),
    "max_query_len": ("max_query_len", _set(max_query_len=19)),
    "layout of int8": (r"context\.layout", _context(layout=PageLayout("int8", 64, 32))),
    "layout of another head size": (r"context\.layout", _context(layout=PageLayout(KV_DTYPE, 96, 32))),
    "layout of another page size": (r"context\.cache", _context(layout=PageLayout(KV_DTYPE, 64, 64))),
    "cache of other heads": (r"context\.cache", _change_context("cache", lambda c: c[:, :1].contiguous())),
    "block_tables is int64": (r"context\.block_tables", _change_context("block_tables", torch.Tensor.long)),
    "block_tables too few": (r"context\.block_tables", _change_context("block_tables", lambda t: t[:1])),
    "a page outside the cache": (r"context\.block_tables", _change_context("block_tables", lambda t: t + 1000)),
    "a negative page": (r"context\.block_tables", _change_context("block_tables", lambda t: t - 1000)),
    "seq_lens too many": (r"context\.seq_lens", _change_context("seq_lens", lambda n: n.repeat(2))),
    "seq_lens beyond the table": (r"context\.seq_lens", _change_context("seq_lens", lambda n: n + 1000)),
    "seq_lens without the new tokens": (r"context\.seq_lens", _change_context("seq_lens", lambda n: n * 0)),
}  # fmt: skip


def good_arguments() -> dict:
    made = batch([20, 10], [40, 33], heads=(4, 2))
    return {
        "query": made.query,
        "key": made.key,
        "value": made.value,
        "query_start": made.query_start,
        "max_query_len": 20,
        "context": made.context,
    }


def test_good_input():
    assert prefill_attention(**good_arguments())[:30].isfinite().all()


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    culprit, change = BAD[name]
    arguments = good_arguments()
    change(arguments)
    with pytest.raises(ValueError, match=culprit):
        prefill_attention(**arguments)


# ---- compiled for Hopper -------------------------------------------------------------------------------------------

DO_NOT_DIVIDE = (
    "out_stride_token", "out_stride_head", "table_stride", "num_seqs", "num_heads", "num_columns", "num_tiles",
    "columns_per_section", "window",
)  # fmt: skip


def _triton_specimen(block_n: int, num_warps: int, dtype: str = "bf16", fp8: bool = False) -> Compiled:
    """hd 128, without context."""
    rows = f"tensordesc<{dtype}[1, {block_n}, 128]>"
    signature = {
        "query_desc": f"tensordesc<{dtype}[1, 128, 128]>",
        "key_desc": rows,
        "value_desc": rows,
        "out_ptr": "*bf16",
        "query_start_ptr": "*i32",
        "softmax_scale": "fp32",
        "soft_cap": "fp32",
        **dict.fromkeys(DO_NOT_DIVIDE, "i32"),
    }
    scales = ("query_scale_ptr", "key_scale_ptr", "value_scale_ptr")
    constants = dict.fromkeys(("context_desc", "lse_ptr", "seq_lens_ptr", "block_tables_ptr"))
    if fp8:
        signature |= dict.fromkeys(scales, "*fp32")
    else:
        constants |= dict.fromkeys(scales)
    constants |= {
        "GROUP": 4, "PACK": 1, "HEAD_DIM": 128, "BLOCK_D": 128, "BLOCK_M": 128, "BLOCK_N": block_n,
        "CONTEXT_BLOCK_N": block_n, "PAGE_SIZE": 0, "UNIFORM": True, "WINDOW": False, "SOFT_CAP": False, "FP8": fp8,
        "LSE": False,
    }  # fmt: skip
    aligned = ("out_stride_token", "out_stride_head")
    return compile_for_hopper(
        _prefill_kernel, signature, constants, num_warps=num_warps, num_stages=2, divisible_by_16=aligned
    )


def _specimen_triton() -> Compiled:
    return _triton_specimen(128, 8)


def _specimen_triton_fp8() -> Compiled:
    return _triton_specimen(128, 8, "fp8e4nv", True)


def test_triton_kernel_compiles_well(compile_for_hopper):
    compiled = compile_for_hopper(_specimen_triton)
    opcodes = compiled.opcodes()
    assert opcodes["HGMMA"] == 3 * 16  # three loops, each 8 for QK^T and 8 for PV
    assert opcodes["UTMALDG"] > 0
    assert compiled.stack_bytes == 0
    assert compiled.registers <= 255
    assert compiled.shared_bytes <= 227 * 1024


def test_fp8_accumulates_safely(compile_for_hopper):
    compiled = compile_for_hopper(_specimen_triton_fp8)
    assert compiled.opcodes()["QGMMA"] > 0
    assert compiled.opcodes()["HGMMA"] == compiled.opcodes()["HMMA"] == 0
    assert compiled.stack_bytes == 0
    # Every tensor-core operation starts from zero: none carries the running output.
    zeros = set(re.findall(r"(%\S+) = arith.constant dense<0.000000e\+00>", compiled.ttgir))
    accumulators = re.findall(r"warp_group_dot %\S+, %\S+, (%[\w#]+)", compiled.ttgir)
    assert len(accumulators) == 6
    assert set(accumulators) <= zeros


def _specimen_hopper() -> Compiled:
    return _hopper_specimen(128, 0)


def _specimen_hopper_context() -> Compiled:
    return _hopper_specimen(128, 64)


def _specimen_hopper_64() -> Compiled:
    return _hopper_specimen(64, 0)


def _hopper_specimen(head_dim: int, page_size: int) -> Compiled:
    shape = prefill_hopper.Shape(
        gl.bfloat16, head_dim, head_dim, BLOCK_N=128, STAGES=2, GROUP=4, PACK=1, PAGE_SIZE=page_size, UNIFORM=True,
        WINDOW=False, SOFT_CAP=False, LSE=False, PING_PONG=True,
    )  # fmt: skip

    def box(*sizes: int) -> str:
        layout = gl.NVMMASharedLayout.get_default_for(list(sizes), gl.bfloat16)
        return f"tensordesc<bf16{list(sizes)},{layout!r}>"

    signature = {
        "query_desc": box(1, 64, head_dim),
        "key_desc": box(1, 128, head_dim),
        "value_desc": box(1, 128, head_dim),
        "out_ptr": "*bf16",
        "query_start_ptr": "*i32",
        "counter_ptr": "*i32",
        "scale": "fp32",
        "cap_in": "fp32",
        "cap_out": "fp32",
        **dict.fromkeys((*DO_NOT_DIVIDE, "num_ranks"), "i32"),
    }
    constants = {"lse_ptr": None, "c": shape}
    if page_size:
        signature |= {"context_desc": box(page_size, 64), "seq_lens_ptr": "*i32", "block_tables_ptr": "*i32"}
    else:
        constants |= dict.fromkeys(("context_desc", "seq_lens_ptr", "block_tables_ptr"))
    return compile_for_hopper(
        prefill_hopper._prefill_hopper_kernel,
        signature,
        constants,
        maxnreg=prefill_hopper.MAX_REGISTERS,
        divisible_by_16=("out_stride_token", "out_stride_head"),
    )


def unmasked_loops(compiled: Compiled) -> list[list[str]]:
    """The innermost loops with tensor-core operations and without selects, as lists of instructions."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", compiled.sass)
    places = {int(address, 16): i for i, (address, _) in enumerate(found)}
    loops = []
    for i, (address, text) in enumerate(found):
        target = re.search(r"\bBRA\S*\s.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) <= int(address, 16):
            body = [t for _, t in found[places[int(target[1], 16)] : i + 1]]
            names = " ".join(body)
            if len(body) < 1000 and names.count("MUFU.EX2") > 60 and "GMMA" in names and "FSEL" not in names:
                loops.append(body)
    return loops


@pytest.mark.parametrize(
    ("specimen", "num_loops", "hgmma", "stack"),
    [(_specimen_hopper, 2, 16, 40), (_specimen_hopper_context, 4, 16, 40), (_specimen_hopper_64, 2, 12, 0)],
    ids=["hd 128", "hd 128 with context", "hd 64"],
)
def test_hopper_kernel_compiles_well(compile_for_hopper, specimen, num_loops, hgmma, stack):
    compiled = compile_for_hopper(specimen)
    assert compiled.num_threads == 384
    assert compiled.registers * compiled.num_threads <= 65536
    assert compiled.shared_bytes <= 227 * 1024
    # What spills lies outside the loops without masks, in which the time is spent.
    assert compiled.stack_bytes <= stack
    assert compiled.opcodes()["UTMALDG"] > 0
    assert compiled.opcodes()["ATOMG"] == 1
    loops = unmasked_loops(compiled)
    assert len(loops) == num_loops
    for loop in loops:
        assert len(loop) <= 480
        assert sum("HGMMA" in text for text in loop) == hgmma
        assert not any("STL" in text or "LDL" in text for text in loop)
        # The softmax runs beside the product of weights and values: it stands before the wait for that.
        wait = next(i for i, text in enumerate(loop) if "WARPGROUP.DEPBAR.LE gsb0, 0x0" in text)
        assert not any("MUFU.EX2" in text for text in loop[wait:])


# ---- on the GPU ----------------------------------------------------------------------------------------------------


# Every pair of head size, kind of lengths and masks stands in a row, not every combination.
GPU_SHAPES = {
    # sequences of new tokens, contexts, (query heads, KV heads), head_dim, page_size, options
    "even": ([2048, 2048], None, (32, 8), 128, 64, {}),
    "ragged": ([2048, 1, 0, 777, 130], [1000, 4000, 0, 64, 8191], (32, 8), 128, 64, {}),
    "window": ([300, 200], [5000, 333], (32, 8), 128, 128, {"window": 1024}),
    "groups of 7": ([1500, 600], [700, 0], (14, 2), 64, 64, {"window": 300}),
    "hd 256 masked": ([1500, 600], [700, 0], (8, 4), 256, 64, {"soft_cap": 50.0, "window": 512}),
    "hd 256": ([1500, 600], None, (16, 4), 256, 64, {}),
    "packed": ([16] * 40, [1000 + 37 * b for b in range(40)], (32, 8), 128, 64, {}),
    "one KV head": ([5, 9, 4, 2], [100, 200, 300, 400], (64, 1), 64, 64, {"soft_cap": 30.0}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_SHAPES)
def test_table_on_gpu(name, config_for):
    lens, contexts, heads, head_dim, page_size, options = GPU_SHAPES[name]
    given = batch(lens, contexts, heads, head_dim, page_size)
    check(given, config_for(head_dim, pack_for(heads[0] // heads[1], max(lens), 128)), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["64 float16", "128 bfloat16"])
def test_long_on_gpu(name, config_for):
    """16,384 tokens, against float64 in slices of queries and against torch's FlashAttention-2."""
    head_dim, dtype = int(name.split()[0]), getattr(torch, name.split()[1])
    torch.manual_seed(0)
    s = 16384
    q, k, v = (torch.randn(s, h, head_dim, device=DEVICE, dtype=dtype) for h in (8, 2, 2))
    start = torch.tensor([0, s], dtype=torch.int32, device=DEVICE)
    config = config_for(head_dim, 1)
    out, lse = prefill_attention(q, k, v, query_start=start, max_query_len=s, return_lse=True, config=config)
    for first in (0, 5000, s - 512):
        rows = slice(first, first + 512)
        cuts = [torch.tensor([0, n], dtype=torch.int32) for n in (512, first + 512)]
        keys = (k[: first + 512], v[: first + 512])
        truth, truth_lse = attention(q[rows], *keys, query_start=cuts[0], key_start=cuts[1])
        plain, _ = attention(q[rows], *keys, query_start=cuts[0], key_start=cuts[1], dtype=dtype)
        assert_accurate(out[rows], truth, plain)
        torch.testing.assert_close(lse[rows].double(), truth_lse, atol=2e-5, rtol=1e-5)
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        peer = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, peer[0].transpose(0, 1), atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_beyond_2_to_31_elements_on_gpu(config_for):
    """Query, keys, values, output and pages, 4 GiB each: the last of 700 tokens lies 2^31 elements behind the first."""
    config = config_for(64, 1)
    given = batch([700], [600])
    expected, _ = given.run(config)
    stride = -(-(2**31) // 690 // 16) * 16

    def wide(tensor: torch.Tensor) -> torch.Tensor:
        memory = torch.empty(tensor.shape[0] * stride, dtype=DTYPE, device=DEVICE)
        return memory.as_strided(tensor.shape, (stride, 64, 1)).copy_(tensor)

    given.query, given.key, given.value = map(wide, (given.query, given.key, given.value))
    layout, cache = given.context.layout, given.context.cache
    skip = 2**31 // (layout.page_bytes // 2) + 1
    far = layout.empty_cache(skip + cache.shape[0], 1, DEVICE)
    far[skip:] = cache
    given.context = dataclasses.replace(given.context, cache=far, block_tables=given.context.block_tables + skip)
    out, _ = given.run(config, out=wide(torch.zeros_like(expected)))
    assert torch.equal(out[:700], expected[:700])


@pytest.mark.gpu
def test_memory_is_linear_on_gpu(config_for):
    """Beyond output and log-sum-exp nothing is allocated but a counter."""
    config = config_for(128, 1)
    for s in (1024, 131072):
        q, k, v = (torch.randn(s, h, 128, device=DEVICE, dtype=DTYPE) for h in (4, 1, 1))
        start = torch.tensor([0, s], dtype=torch.int32, device=DEVICE)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, lse = prefill_attention(
            q, k, v, query_start=start, max_query_len=s, return_lse=True, check=False, config=config
        )
        used = torch.cuda.max_memory_allocated() - before
        assert used <= out.nbytes + lse.nbytes + 4096


@pytest.mark.gpu
def test_in_a_cuda_graph(config_for):
    """With more tiles than multiprocessors, so that each replay must count anew."""
    given = batch([300, 0, 20], [100, 0, 33], heads=(64, 1))
    out = torch.zeros_like(given.query)
    config = config_for(64, 1)
    expected, _ = given.run(config)
    graph = torch.cuda.CUDAGraph()
    max_query_len = given.max_query_len
    with torch.cuda.graph(graph):
        prefill_attention(
            given.query, given.key, given.value, query_start=given.query_start, max_query_len=max_query_len,
            context=given.context, out=out, check=False, config=config,
        )  # fmt: skip
    for _ in range(2):
        out.zero_()
        graph.replay()
        assert torch.equal(out[:320], expected[:320])


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "scales"), [(64, "float"), (128, "tensor"), (256, "float")])
def test_fp8_on_gpu(head_dim, scales):
    """Against the same math with weights rounded to e4m3 at FlashAttention-3's offset, over the numbers as rounded."""
    torch.manual_seed(0)
    lens, scale = [700, 1, 0, 333], {"query": 0.5, "key": 2.0, "value": 0.25}
    exact = {
        name: torch.randn(sum(lens), heads, head_dim, device=DEVICE) / scale[name]
        for name, heads in (("query", 8), ("key", 2), ("value", 2))
    }
    rounded = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in exact.items()}
    start = start_of(torch.tensor(lens, device=DEVICE))
    given = {f"{n}_scale": torch.tensor(s, device=DEVICE) if scales == "tensor" else s for n, s in scale.items()}
    out, lse = prefill_attention(
        **rounded, query_start=start, max_query_len=700, soft_cap=20.0, return_lse=True, **given
    )
    assert out.dtype == torch.bfloat16
    true = {name: tensor.double() * scale[name] for name, tensor in rounded.items()}
    expected, expected_lse = attention(**true, query_start=start, soft_cap=20.0)
    plain = torch.zeros_like(expected)
    for b in range(len(lens)):
        rows = slice(*start[b : b + 2].tolist())
        q, k, v = (true[name][rows].transpose(0, 1) for name in ("query", "key", "value"))
        k, v = (x.repeat_interleave(4, 0) for x in (k, v))
        logits = 20 * torch.tanh(q @ k.transpose(1, 2) * head_dim**-0.5 / 20)
        logits = logits.masked_fill(torch.ones_like(logits[0], dtype=torch.bool).triu(1), -torch.inf)
        weights = 256 * torch.exp(logits - logits.amax(-1, keepdim=True)) if rows.stop > rows.start else logits
        low = weights.to(torch.float8_e4m3fn).double()
        plain[rows] = (low @ v / weights.sum(-1, keepdim=True)).transpose(0, 1)
    assert_accurate(out, expected, plain)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-3, rtol=1e-3)
