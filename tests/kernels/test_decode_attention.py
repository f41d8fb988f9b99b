"""Decode and verify attention against the float64 reference over what the pages hold."""

import itertools
import re
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kernels.aot import Compiled
from kernels.aot import compile_for_hopper as compile_kernel
from kernels.decode import _decode_kernel, decode_attention
from kernels.decode_plan import DecodeConfig, choose_config, plan_decode
from kernels.pages import PageLayout
from kernels.reference import pages as reference_pages
from kernels.reference.attention import attention, in_a_row

FORMATS = ("bfloat16", "fp8", "int8", "int4", "int2")


@dataclass
class Batch:
    """Everything that decode attention reads, and the exact answer."""

    layout: PageLayout
    query: torch.Tensor
    cache: torch.Tensor
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    query_start: torch.Tensor
    max_query_len: int
    residual: torch.Tensor | None
    residual_slots: torch.Tensor | None
    flushed_lens: torch.Tensor | None

    def run(self, **options):
        stored = {name: getattr(self, name) for name in ("residual", "residual_slots", "flushed_lens", "max_query_len")}
        tensors = (self.query, self.cache, self.layout, self.block_tables, self.seq_lens, self.query_start)
        return decode_attention(*tensors, **{**stored, **options})

    def reference(self, dtype=torch.float64, **options):
        """The same from gathered float32 K and V, in `dtype`."""
        sequences = reference_pages.gather(
            self.cache,
            self.layout,
            self.block_tables,
            self.seq_lens,
            self.residual,
            self.residual_slots,
            self.flushed_lens,
        )
        key, value, key_start = in_a_row(sequences)
        return attention(
            self.query, key, value, query_start=self.query_start, key_start=key_start, dtype=dtype, **options
        )

    def rows(self) -> torch.Tensor:
        """Whether each row of the query belongs to a sequence."""
        return torch.arange(self.query.shape[0], device=self.query.device) < self.query_start[-1]


def make_batch(
    kv_dtype: str,
    seq_lens: list[int],
    query_lens: list[int],
    device: torch.device,
    *,
    num_kv_heads: int = 2,
    group: int = 4,
    head_dim: int = 64,
    page_size: int = 32,
    seed: int = 0,
    padding_rows: int = 0,
) -> Batch:
    """Random K and V in shuffled pages; everything beyond a sequence's length is poison."""
    if kv_dtype == "bfloat16" and device.type == "cpu":
        kv_dtype = "float16"  # the interpreter knows no bfloat16
    layout = PageLayout(kv_dtype, head_dim, page_size)
    generator = torch.Generator().manual_seed(seed)
    pages_of = [-(-length // page_size) for length in seq_lens]
    num_pages, max_pages = 1 + sum(pages_of), max([1, *pages_of]) + 1
    order = iter((torch.randperm(num_pages - 1, generator=generator) + 1).tolist())
    block_tables = torch.zeros(len(seq_lens), max_pages, dtype=torch.int32)
    cache = torch.full((num_pages, num_kv_heads, layout.page_bytes), 0xFF, dtype=torch.uint8)  # NaN in every format
    residual = flushed_lens = slots = None
    if layout.is_low_bit:
        dtype = torch.float16 if device.type == "cpu" else torch.bfloat16
        residual = layout.empty_residual(len(seq_lens) + 1, num_kv_heads, dtype).fill_(torch.nan)
        slots = (torch.randperm(len(seq_lens) + 1, generator=generator)[: len(seq_lens)]).to(torch.int32)
        # Drafts are never flushed.
        committed = [max(n - (q if q > 1 else 0), 0) for n, q in zip(seq_lens, query_lens, strict=True)]
        flushed_lens = torch.tensor([n // page_size * page_size for n in committed], dtype=torch.int32)
    for b, length in enumerate(seq_lens):
        padded = pages_of[b] * page_size
        key, value = torch.randn(2, padded, num_kv_heads, head_dim, generator=generator)
        value += 0.5
        paged = pages_of[b] if not layout.is_low_bit else int(flushed_lens[b]) // page_size
        ids = [next(order) for _ in range(pages_of[b])]
        block_tables[b, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        if paged:
            split = [x[: paged * page_size].unflatten(0, (paged, page_size)).transpose(1, 2) for x in (key, value)]
            written = reference_pages.page_of(*split, layout)
            words = layout.words_view(written)
            if layout.is_float:
                words[-1, :, :, length - (paged - 1) * page_size :] = torch.nan
            elif not layout.is_low_bit:
                words[-1, :, :, length - (paged - 1) * page_size :] = -1
                for scale in layout.scale_views(written).values():
                    scale[-1, :, length - (paged - 1) * page_size :] = torch.nan
            cache[ids[:paged]] = written
        if layout.is_low_bit:
            at = torch.arange(paged * page_size, length)
            for i, x in enumerate((key, value)):
                residual[int(slots[b]), :, i, at % layout.residual_size] = x[at].transpose(0, 1).to(residual.dtype)
    query_start = torch.tensor([0, *itertools.accumulate(query_lens)], dtype=torch.int32)
    num_rows = int(query_start[-1]) + padding_rows
    query = torch.randn(num_rows, num_kv_heads * group, head_dim, generator=generator)
    tensors = [
        query.to(torch.float16 if device.type == "cpu" else torch.bfloat16),
        cache,
        block_tables,
        torch.tensor(seq_lens, dtype=torch.int32),
        query_start,
    ]
    return Batch(
        layout,
        *(tensor.to(device) for tensor in tensors),
        max_query_len=max([1, *query_lens]),
        residual=None if residual is None else residual.to(device),
        residual_slots=None if slots is None else slots.to(device),
        flushed_lens=None if flushed_lens is None else flushed_lens.to(device),
    )


def assert_as_exact(batch: Batch, **options) -> torch.Tensor:
    """FlashAttention's rule: at most twice the error of the same math done plainly in the query's 16-bit type."""
    out, lse = batch.run(return_lse=True, **options)
    rows = batch.rows()
    plan_free = {name: value for name, value in options.items() if name not in ("plan", "out", "check")}
    exact, exact_lse = batch.reference(**plan_free)
    plain, _ = batch.reference(dtype=batch.query.dtype, **plan_free)
    if not rows.any():
        return out
    exact, plain, result = exact[rows], plain.double()[rows], out.double()[rows]
    rounding = 2 * (exact + 0.3 - 0.3 - exact.to(out.dtype).double()).abs().max()
    allowed = 2 * (plain - exact).abs().max() + rounding
    error = (result - exact).abs().max()
    assert error <= allowed, f"{float(error):.3g} > {float(allowed):.3g}"
    torch.testing.assert_close(lse[rows].double(), exact_lse[rows].double(), atol=5e-3, rtol=1e-3)
    return out


@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_mixed_lengths_with_padding_rows_left_alone(kv_dtype, device):
    batch = make_batch(kv_dtype, [1, 200, 33, 64, 0, 97], [1, 1, 1, 1, 0, 1], device, padding_rows=2)
    out = torch.full_like(batch.query, 7.0)
    assert_as_exact(batch, out=out)
    assert (out[~batch.rows()] == 7.0).all()


@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_verification_of_ragged_drafts(kv_dtype, device):
    assert_as_exact(make_batch(kv_dtype, [5, 130, 70], [4, 3, 1], device))


@pytest.mark.parametrize(
    ("kv_dtype", "num_kv_heads", "group", "head_dim", "page_size", "query_len"),
    [
        ("bfloat16", 3, 1, 80, 32, 1),
        ("bfloat16", 1, 8, 256, 64, 2),
        ("bfloat16", 2, 7, 96, 128, 1),
        ("int8", 1, 5, 80, 32, 3),
        ("fp8", 2, 1, 96, 64, 1),
        ("int4", 1, 7, 80, 32, 2),
        ("int4", 2, 2, 256, 64, 1),
        ("int4", 1, 4, 128, 128, 4),
        ("int2", 2, 4, 64, 32, 1),
        ("int2", 1, 3, 96, 64, 2),
        ("int2", 1, 1, 128, 128, 1),
    ],
)
def test_shapes(kv_dtype, num_kv_heads, group, head_dim, page_size, query_len, device):
    shape = {"num_kv_heads": num_kv_heads, "group": group, "head_dim": head_dim, "page_size": page_size}
    lengths = [2 * page_size + 11, page_size, query_len]
    assert_as_exact(make_batch(kv_dtype, lengths, [query_len] * 3, device, **shape))


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8", "int4"])
def test_more_rows_than_a_tile_holds(kv_dtype, device):
    """16 query tokens of 8 heads are 128 rows: two tiles read the same pages."""
    assert_as_exact(make_batch(kv_dtype, [70, 20], [16, 9], device, num_kv_heads=1, group=8))


@pytest.mark.parametrize("kv_dtype", FORMATS)
@pytest.mark.parametrize("query_len", [1, 3])
@pytest.mark.parametrize("options", [{"window": 40}, {"window": 1}, {"soft_cap": 2.0}, {"window": 65, "soft_cap": 5.0}])
def test_windows_and_soft_caps(kv_dtype, query_len, options, device):
    assert_as_exact(make_batch(kv_dtype, [150, 41, 7], [query_len] * 3, device, num_kv_heads=1, group=2), **options)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int4"])
def test_freed_window_pages_are_not_read(kv_dtype, device):
    batch = make_batch(kv_dtype, [300, 130], [1, 1], device, num_kv_heads=1)
    whole = batch.run(window=50)
    batch.block_tables[0, : (300 - 50) // 32] = 0  # the null page is poison
    batch.block_tables[1, : (130 - 50) // 32] = 0
    torch.testing.assert_close(batch.run(window=50), whole, atol=0, rtol=0)


def test_softmax_scale(device):
    assert_as_exact(make_batch("int8", [90], [1], device), softmax_scale=0.5)


@settings(max_examples=8, phases=(Phase.explicit, Phase.generate))  # shrinking would take minutes
@given(
    kv_dtype=st.sampled_from(FORMATS),
    lengths=st.lists(st.integers(0, 160), min_size=1, max_size=3),
    query_len=st.sampled_from([1, 1, 2]),
    programs=st.integers(1, 9),
    min_share=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
def test_split_page_order_and_batch_order_change_nothing(
    kv_dtype, lengths, query_len, programs, min_share, seed, device
):
    """However the work is cut, wherever the pages lie and however the sequences are ordered."""
    lengths = [length if length >= query_len else 0 for length in lengths]
    query_lens = [query_len if length else 0 for length in lengths]
    batch = make_batch(kv_dtype, lengths, query_lens, device, num_kv_heads=1, group=2, seed=seed)
    expected = assert_as_exact(batch)

    num_pages = batch.cache.shape[0]
    moved = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).to(device)
    order = list(reversed(range(len(lengths))))
    starts = batch.query_start.tolist()
    other = replace(
        batch,
        query=torch.cat([batch.query[starts[b] : starts[b + 1]] for b in order]),
        cache=batch.cache[torch.argsort(moved)],
        block_tables=moved.to(torch.int32)[batch.block_tables[order].long()],
        seq_lens=batch.seq_lens[order],
        query_start=torch.tensor([0, *itertools.accumulate(query_lens[b] for b in order)], dtype=torch.int32).to(
            device
        ),
        residual_slots=None if batch.residual is None else batch.residual_slots[order],
        flushed_lens=None if batch.residual is None else batch.flushed_lens[order],
    )
    plan = plan_decode(
        other.seq_lens,
        other.query_start,
        other.layout,
        num_q_heads=2,
        num_kv_heads=1,
        max_query_len=other.max_query_len,
        flushed_lens=other.flushed_lens,
        config=DecodeConfig(num_warps=4, num_stages=2, programs_per_sm=programs, min_share=min_share),
    )
    out = assert_as_exact(other, plan=plan)
    ordered = torch.cat([expected[starts[b] : starts[b + 1]] for b in order])
    torch.testing.assert_close(out, ordered, atol=4e-3 if device.type == "cpu" else 2e-2, rtol=1e-2)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8", "int2"])
def test_row_of_a_verification_is_the_decode_at_its_position(kv_dtype, device):
    batch = make_batch(kv_dtype, [100, 37], [4, 4], device)
    verified = batch.run()
    for i in range(4):
        rows = torch.tensor([i, 4 + i], device=device)
        alone = replace(
            batch,
            query=batch.query[rows],
            seq_lens=batch.seq_lens - (3 - i),
            query_start=torch.tensor([0, 1, 2], dtype=torch.int32, device=device),
            max_query_len=1,
        )
        torch.testing.assert_close(alone.run(), verified[rows], atol=2e-3 if device.type == "cpu" else 2e-2, rtol=1e-2)


def plan_for(batch: Batch, **options):
    num_kv_heads = batch.cache.shape[1]
    shape = {"num_q_heads": batch.query.shape[1], "num_kv_heads": num_kv_heads, "max_query_len": batch.max_query_len}
    lengths = (batch.seq_lens, batch.query_start, batch.layout)
    return plan_decode(*lengths, flushed_lens=batch.flushed_lens, **shape, **options)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int4"])
def test_plan_updated_for_other_lengths(kv_dtype, device):
    longer = make_batch(kv_dtype, [200, 90, 64], [1, 1, 1], device)
    shorter = make_batch(kv_dtype, [3, 0, 120], [1, 0, 1], device, seed=1)
    plan = plan_for(longer)
    assert_as_exact(longer, plan=plan)
    plan.update(shorter.seq_lens, shorter.query_start, shorter.flushed_lens)
    assert_as_exact(shorter, plan=plan)


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 5000), min_size=1, max_size=12),
    heads=st.integers(1, 4),
    programs=st.integers(1, 12),
    low_bit=st.booleans(),
)
def test_plan_covers_every_tile_once_in_even_shares(lengths, heads, programs, low_bit, device):
    layout = PageLayout("int4" if low_bit else "int8", 64, 32)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    query_start = torch.tensor(
        [0, *itertools.accumulate(int(n > 0) for n in lengths)], dtype=torch.int32, device=device
    )
    flushed = seq_lens // 32 * 32
    plan = plan_decode(
        seq_lens,
        query_start,
        layout,
        num_q_heads=heads,
        num_kv_heads=heads,
        flushed_lens=flushed,
        config=DecodeConfig(num_warps=4, num_stages=2, programs_per_sm=programs, min_share=1, unit_cost=1),
    )
    table = plan.table.tolist()
    # By the definition: units laid end to end, each its cost and then its tiles.
    leads = [3 if low_bit and n % 32 else 1 for n in lengths]
    tiles = [-(-n // 32) for n in lengths]
    units = [(b, u) for b in range(len(lengths)) for u in range(heads) if tiles[b]]
    ends = list(itertools.accumulate(leads[b] + tiles[b] for b, _ in units))
    line, shares = 0, []
    merged_by = dict.fromkeys(units, -1)
    for w, (b, unit, at, count, *_, lead, merge_from) in enumerate(row[:4] + row[9:11] for row in table):
        shares.append(count)
        if count:
            i = next(i for i, end in enumerate(ends) if end > line)
            begin = ends[i] - leads[units[i][0]] - tiles[units[i][0]]
            assert (b, unit, at, lead) == (*units[i], line - begin, leads[b])
            continues_and_ends = at > lead and ends[i] <= line + count
            assert (merge_from >= 0) == continues_and_ends
            if continues_and_ends:
                merged_by[units[i]] = w
                starts = list(itertools.accumulate([0, *shares[:-1]]))
                assert starts[merge_from] <= begin + lead < starts[merge_from] + shares[merge_from]
        line += count
    assert line == (ends[-1] if ends else 0)
    used = [share for share in shares if share]
    assert not used or max(used) - min(used) <= 1
    if plan.has_few_units:
        assert plan.merging.tolist() == [merged_by.get((b, u), -1) for b in range(len(lengths)) for u in range(heads)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": lambda b: b.query.double()}, "query is float64"),
        ({"query": lambda b: b.query[..., :32]}, "query has shape"),
        ({"query": lambda b: b.query[:, :3]}, "query has 3 heads for 2 KV heads"),
        ({"query": lambda b: b.query.transpose(1, 2).contiguous().transpose(1, 2)}, "query has stride"),
        ({"cache": lambda b: b.cache.view(torch.int8)}, "cache is int8"),
        ({"cache": lambda b: b.cache[..., 32:]}, "cache has shape"),
        ({"cache": lambda b: b.cache[::2]}, "cache has strides"),
        ({"seq_lens": lambda b: b.seq_lens.long()}, "seq_lens is int64"),
        ({"seq_lens": lambda b: b.seq_lens + 500}, r"seq_lens\[0\] is 600"),
        ({"block_tables": lambda b: b.block_tables + 99}, r"block_tables\[0, 0\] is"),
        ({"block_tables": lambda b: b.block_tables[:1]}, "block_tables has shape"),
        ({"query_start": lambda b: b.query_start[[0, 2, 1]]}, "query_start falls"),
        ({"query_start": lambda b: b.query_start * 2}, "max_query_len is 1; a sequence has 2"),
        ({"flushed_lens": lambda b: b.flushed_lens - 1}, r"flushed_lens\[0\] is"),
        ({"flushed_lens": lambda b: None}, "flushed_lens is None"),
        ({"residual": lambda b: b.residual[:, :1]}, "residual has shape"),
        ({"residual_slots": lambda b: b.residual_slots + 3}, r"residual_slots\[\d\] is"),
        ({"max_query_len": lambda b: 17}, "max_query_len is 17"),
        ({"max_query_len": lambda b: 1.5}, "max_query_len is 1.5"),
        ({"query": lambda b: None}, "query is a NoneType"),
        ({"query": lambda b: b.query[0]}, "query has shape"),
        ({"query": lambda b: b.query[:, :0]}, "query has 0 heads"),
        ({"cache": lambda b: [1]}, "cache is a list"),
        ({"layout": lambda b: "int4"}, "layout is 'int4'"),
        ({"query_start": lambda b: b.query_start - 8}, "query_start begins at -8"),
        ({"query_start": lambda b: b.query_start + 1}, "query_start begins at 1"),
        ({"flushed_lens": lambda b: b.flushed_lens * 0 - 32}, r"flushed_lens\[0\] is -32"),
    ],
)
def test_bad_input_is_named(change, message, device):
    batch = make_batch("int4", [100, 40], [1, 1], device)
    with pytest.raises(ValueError, match=message):
        replace(batch, **{name: make(batch) for name, make in change.items()}).run()


def test_bad_options_are_named(device):
    batch = make_batch("bfloat16", [100, 40], [1, 1], device)
    for options, message in (
        ({"window": 0}, "window is 0"),
        ({"soft_cap": -1.0}, "soft_cap is -1.0"),
        ({"soft_cap": float("inf")}, "soft_cap is inf"),
        ({"softmax_scale": "0.1"}, "softmax_scale is '0.1'"),
        ({"window": 2.5}, "window is 2.5"),
        ({"plan": {}}, "plan is a dict"),
        ({"plan": plan_for(make_batch("bfloat16", [40, 100], [1, 1], device))}, "plan is that of other lengths"),
        ({"out": batch.query[:1].expand(2, -1, -1)}, "out has strides"),
        ({"plan": plan_for(batch, window=4)}, "plan was made for window 4"),
        ({"out": batch.query[:1]}, "out has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            batch.run(**options)


def test_bad_lengths_for_a_plan_are_named(device):
    batch = make_batch("int4", [100, 40], [1, 1], device)
    plan = plan_for(batch)
    lengths = {name: getattr(batch, name) for name in ("seq_lens", "query_start", "flushed_lens")}
    for change, message in (
        ({"seq_lens": batch.seq_lens.long()}, "seq_lens is int64"),
        ({"seq_lens": batch.seq_lens[:1]}, "seq_lens has shape"),
        ({"query_start": batch.query_start[:1]}, "query_start has shape"),
        ({"flushed_lens": None}, "flushed_lens is None"),
    ):
        with pytest.raises(ValueError, match=message):
            plan.update(**{**lengths, **change})
        with pytest.raises(ValueError, match=message if "seq_lens has" not in message else "query_start has shape"):
            plan_decode(layout=batch.layout, num_q_heads=8, num_kv_heads=2, **{**lengths, **change})


def test_padding_with_stale_flushed_lengths_is_passed_over(device):
    batch = make_batch("int4", [100, 40, 0], [1, 1, 0], device)
    batch.flushed_lens[2] = 64
    assert_as_exact(batch)


# ---- compiled for Hopper -------------------------------------------------------------------------------------------


def _specimen(kv_dtype: str, query_len: int, head_dim: int = 128) -> Compiled:
    layout = PageLayout(kv_dtype, head_dim)
    config = choose_config(layout, rows := max(8, 4 * query_len))
    words = "*bf16" if layout.is_float else "*i16"
    signature = dict.fromkeys(("query_ptr", "out_ptr", "residual_ptr"), "*bf16") | {"cache_ptr": words}
    ints = ("block_tables", "seq_lens", "query_start", "plan", "residual_slots", "flushed_lens")
    signature |= {f"{name}_ptr": "*i32" for name in ints}
    signature |= dict.fromkeys(("lse_ptr", "partial_out_ptr", "partial_lse_ptr"), "*fp32")
    signature |= dict.fromkeys(("softmax_scale", "soft_cap"), "fp32")
    strides = ("query_stride_t", "query_stride_h", "out_stride_t", "out_stride_h")
    signature |= dict.fromkeys((*strides, "table_stride"), "i32")
    constants = {
        "FORMAT": kv_dtype,
        "HEAD_DIM": head_dim,
        "PAGE": layout.page_size,
        "PAGE_WORDS": layout.page_bytes // 2,
        "NUM_KV_HEADS": 8,
        "GROUP": 4,
        "MAX_QUERY": query_len,
        "ROWS": rows,
        "ROW_BLOCKS": 1,
        "WINDOW": 0,
        "SOFT_CAP": False,
        "HAS_LSE": False,
        "PLANES": layout.planes,
        "W_PAD": layout.words,
        "RESIDUAL_SIZE": layout.residual_size,
        "UNIT_COST": config.unit_cost,
        "STAGES": config.num_stages,
    }
    return compile_kernel(
        _decode_kernel,
        signature,
        constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.max_registers,
        divisible_by_16=strides,
    )


def specimen_bfloat16() -> Compiled:
    return _specimen("bfloat16", 1)


def specimen_fp8() -> Compiled:
    return _specimen("fp8", 1)


def specimen_int8() -> Compiled:
    return _specimen("int8", 1)


def specimen_int4() -> Compiled:
    return _specimen("int4", 1)


def specimen_int2() -> Compiled:
    return _specimen("int2", 1)


def specimen_bfloat16_verify() -> Compiled:
    return _specimen("bfloat16", 4)


@pytest.mark.parametrize(
    ("specimen", "opcodes"),
    [
        (specimen_bfloat16, {"LDGSTS", "LDSM", "HMMA"}),
        (specimen_fp8, {"LDGSTS", "LDSM", "HMMA", "F2FP"}),
        (specimen_int8, {"LDGSTS", "LDSM", "HMMA", "LOP3", "PRMT"}),
        (specimen_int4, {"LDGSTS", "LDSM", "HMMA", "LOP3"}),
        (specimen_int2, {"LDGSTS", "LDSM", "HMMA", "LOP3"}),
        (specimen_bfloat16_verify, {"LDGSTS", "HGMMA"}),
    ],
)
def test_compiled_kernel_fits_as_often_as_its_config_says(specimen, opcodes, compile_for_hopper):
    """No spills in the stream of pages, tensor cores, asynchronous copies, and programs_per_sm resident at once."""
    compiled = compile_for_hopper(specimen)
    assert opcodes <= set(compiled.opcodes())
    name = specimen.__name__.removeprefix("specimen_")
    rows = 16 if name.endswith("verify") else 8
    config = choose_config(PageLayout(name.removesuffix("_verify"), 128), rows)
    # Registers are handed out to whole warps in units of 256, from a quarter of the multiprocessor each.
    warp_registers = -(-compiled.registers * 32 // 256) * 256
    assert 4 * (16384 // warp_registers) >= config.programs_per_sm * config.num_warps
    assert config.programs_per_sm * (compiled.shared_bytes + 1024) <= 228 * 1024
    # A few words around the residual window may go to the stack; the loop over pages must not touch it.
    assert compiled.stack_bytes <= 32
    page_loop = max(loops(compiled.sass), key=lambda body: body.count("LDGSTS"))
    assert "LDL" not in page_loop and "STL" not in page_loop


def loops(sass: str) -> list[str]:
    """The bodies of a kernel's innermost loops."""
    lines = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)]
    jumps = [(int(m[1], 16), at) for at, text in lines if (m := re.search(r"BRA.* 0x([0-9a-f]+)", text))]
    spans = [(low, high) for low, high in jumps if low < high]
    inner = [(a, b) for a, b in spans if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)]
    return ["\n".join(text for at, text in lines if low <= at <= high) for low, high in inner]


# ---- on the GPU ----------------------------------------------------------------------------------------------------


# Head sizes and query lengths, then head ratios and query lengths.
TABLE = [
    *((head_dim, 2, 4, query_len) for head_dim in (64, 80, 96, 128, 256) for query_len in (1, 4)),
    *((128, *heads, query_len) for heads in ((1, 8), (4, 1), (4, 7)) for query_len in (1, 16)),
    *((128, 8, 4, query_len) for query_len in (2, 8)),
    (256, 2, 4, 16),
]


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", FORMATS)
@pytest.mark.parametrize(("head_dim", "num_kv_heads", "group", "query_len"), TABLE)
def test_table_of_shapes(kv_dtype, head_dim, num_kv_heads, group, query_len, device):
    shape = {"num_kv_heads": num_kv_heads, "group": group, "head_dim": head_dim, "page_size": 64}
    lengths = [1 + query_len, 1500, 64, 777]
    assert_as_exact(make_batch(kv_dtype, lengths, [query_len, 1, query_len, query_len], device, **shape))


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_one_to_131072_tokens_in_one_batch(kv_dtype, device):
    batch = make_batch(kv_dtype, [1, 131072, 17, 9000, 64], [1] * 5, device, num_kv_heads=2, head_dim=128, page_size=64)
    assert_as_exact(batch)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int4"])
def test_graph_replayed_for_other_lengths_and_padding(kv_dtype, device):
    longer = make_batch(kv_dtype, [200, 90, 64], [1, 1, 1], device, head_dim=128, page_size=64)
    shorter = make_batch(kv_dtype, [3, 120, 0], [1, 1, 0], device, head_dim=128, page_size=64, seed=1, padding_rows=1)
    static = make_batch(kv_dtype, [256, 256, 256], [1, 1, 1], device, head_dim=128, page_size=64, seed=2)
    static.block_tables = static.block_tables.new_zeros(3, 8)
    plan, out = plan_for(static), torch.zeros_like(static.query)

    def step():
        plan.update(static.seq_lens, static.query_start, static.flushed_lens)
        static.run(plan=plan, out=out, check=False)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for batch in (longer, shorter, longer):
        out.fill_(7.0)
        static.cache[: batch.cache.shape[0]] = batch.cache
        static.block_tables[:, : batch.block_tables.shape[1]] = batch.block_tables
        for name in ("query", "seq_lens", "query_start", "residual", "residual_slots", "flushed_lens"):
            if getattr(batch, name) is not None:
                getattr(static, name).copy_(getattr(batch, name))
        graph.replay()
        expected = batch.run()
        torch.testing.assert_close(out[batch.rows()], expected[batch.rows()], atol=0, rtol=0)
        assert (out[~batch.rows()] == 7.0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_pages_beyond_two_to_the_31_elements(kv_dtype, device):
    small = make_batch(kv_dtype, [300, 64], [1, 1], device, num_kv_heads=8, head_dim=128, page_size=64)
    words_per_page = small.layout.page_bytes // small.layout.word_dtype.itemsize
    num_pages = 2**31 // (8 * words_per_page) + 20
    cache = torch.empty(num_pages, 8, small.layout.page_bytes, dtype=torch.uint8, device=device)
    cache[-small.cache.shape[0] :] = small.cache
    moved = replace(small, cache=cache, block_tables=small.block_tables + num_pages - small.cache.shape[0])
    torch.testing.assert_close(moved.run(), small.run(), atol=0, rtol=0)
