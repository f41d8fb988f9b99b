"""KV pages: the reference against closed forms, the kernels against the reference to the bit."""

import itertools
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import cache as kernel
from kernels.aot import compile_for_hopper as compile_kernel
from kernels.interpreting import INTERPRETING
from kernels.pages import HEAD_DIMS, KV_DTYPE_BITS, LOW_BIT, MAX_QUERY_LEN, PAGE_SIZES, PageLayout
from kernels.reference import pages as reference

# The interpreter truncates float32 to bfloat16.
FORMATS = [name for name in KV_DTYPE_BITS if name != "bfloat16" or not INTERPRETING]
QUANTISED = ("fp8", "int8", "int4", "int2")


def int32(values, device) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device=device)


class Batch:
    """A step: random new tokens of sequences given as (context_len, query_len), a cache of noise, and padding rows."""

    def __init__(self, layout, lengths, device, dtype, *, heads=2, group=2, rotary_dim=None, padding=3, seed=0):
        torch.manual_seed(seed)
        self.layout, num_seqs = layout, len(lengths)
        self.query_start = int32(itertools.accumulate([0, *(q for _, q in lengths)]), device)
        self.seq_lens = int32((c + q for c, q in lengths), device)
        self.num_new, self.heads = sum(q for _, q in lengths), heads
        rows, page_size, head_dim = self.num_new + padding, layout.page_size, layout.head_dim
        max_pages = max(-(-(c + q) // page_size) for c, q in lengths) + 1
        order = torch.randperm(num_seqs * max_pages) + 1
        self.block_tables = order.view(num_seqs, max_pages).int().to(device)
        noise = torch.randint(0, 256, (num_seqs * max_pages + 1, heads, layout.page_bytes), dtype=torch.uint8)
        self.cache = noise.to(device)
        # Strided tokens, as slices of a fused QKV projection are.
        self.fused, self.parts = (
            torch.randn(rows, heads * (group + 2), head_dim).to(device, dtype),
            (heads * group, heads, heads),
        )
        self.query, self.key, self.value = self.fused.split(self.parts, 1)
        half = (head_dim if rotary_dim is None else rotary_dim) // 2
        angles = torch.rand(max(128, *(c + q for c, q in lengths)), half, dtype=torch.float64) * 6.28
        self.cos, self.sin = (t.float().to(device) for t in (angles.cos(), angles.sin())) if half else (None, None)
        self.residual = self.residual_slots = self.flushed_lens = self.committed_lens = None
        if layout.is_low_bit:
            shape = (num_seqs + 1, heads, 2, layout.residual_size, head_dim)
            self.residual = torch.randn(shape).to(device, dtype)
            self.residual_slots = torch.randperm(num_seqs + 1)[:num_seqs].int().to(device)
            self.flushed_lens = int32((c // page_size * page_size for c, _ in lengths), device)
            self.committed_lens = self.seq_lens.clone()

    def mapping(self) -> tuple[torch.Tensor, torch.Tensor]:
        return kernel.slot_mapping(
            self.block_tables, self.query_start, self.seq_lens, len(self.key), self.layout.page_size
        )

    def arguments(self, query: bool = True, write_back: bool = True) -> dict:
        """Arguments of both writers, with copies of what they change."""
        names = ("block_tables", "query_start", "seq_lens", "residual_slots", "flushed_lens", "committed_lens")
        arguments = {name: getattr(self, name) for name in names}
        tokens = self.fused.clone().split(self.parts, 1)
        arguments |= {"key": tokens[1], "value": tokens[2], "cache": self.cache.clone()}
        arguments["residual"] = None if self.residual is None else self.residual.clone()
        if self.cos is not None:
            arguments |= {"cos": self.cos, "sin": self.sin}
            arguments["query"] = tokens[0] if query else None
            arguments["rotated_key"] = arguments["key"] if write_back else None
        return arguments | {"layout": self.layout}

    def both(self, check: bool = True, **options) -> tuple[dict, dict]:
        """What the kernel and what the reference leave behind."""
        ours, theirs = self.arguments(**options), self.arguments(**options)
        positions, slots = self.mapping()
        kernel.write_kv(**ours, positions=positions, slots=slots, check=check)
        reference.write(**theirs)
        return ours, theirs


def assert_same_bits(ours: dict, theirs: dict) -> None:
    for name in ("cache", "residual", "key", "query"):
        a, b = ours.get(name), theirs.get(name)
        assert (a is None and b is None) or torch.equal(a, b), name


# ---------------------------------------------------------------------------------------------------------------------
# The reference


def test_fp16_bounds_are_the_next_numbers_outwards():
    x = torch.cat([torch.randn(5000) * 10.0**k for k in range(-9, 5)] + [torch.tensor([0.0, 2.0**-24, 65504.0])])
    up, down = (f(y).numpy() for f, y in ((reference.round_up_fp16, x.abs()), (reference.round_down_fp16, x)))
    magnitude = np.minimum(x.abs().numpy().astype(np.float64), 65504)
    assert (up.astype(np.float64) >= magnitude).all()
    smaller = np.nextafter(up, np.float16(0)).astype(np.float64)
    assert ((smaller < magnitude) | (up == np.float16(2.0**-24))).all()
    clipped = np.clip(x.numpy().astype(np.float64), -65504, 65504)
    assert (down.astype(np.float64) <= clipped).all()
    with np.errstate(over="ignore"):
        assert (np.nextafter(down, np.float16(np.inf)).astype(np.float64) > clipped).all()


def test_reciprocal_of_fp16_is_exact_after_one_newton_step():
    """`kernels.cache._reciprocal`: any estimate within two ulps of 1 / scale gives the rounded quotient."""
    for mantissa in range(1024, 2048):
        scale = np.float32(mantissa / 1024)
        exact = np.float32(1) / scale
        for ulps in range(-2, 3):
            estimate = exact + np.float32(ulps) * np.spacing(exact)
            error = np.float32(1 - float(scale) * float(estimate))  # exact in float64, then rounded once
            product = Fraction(float(estimate)) * Fraction(float(error)) + Fraction(float(estimate))
            nearby = [exact + np.float32(k) * np.spacing(exact) for k in (-1, 0, 1)]
            assert min(nearby, key=lambda y: abs(Fraction(float(y)) - product)) == exact


@pytest.mark.parametrize("kv_dtype", QUANTISED)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_planes_are_runs_of_channels(kv_dtype, head_dim):
    layout = PageLayout(kv_dtype, head_dim, 32)
    codes = torch.randint(0, 2**layout.bits, (3, head_dim), dtype=torch.uint8)
    words = reference.pack(codes, layout)
    assert words.shape == (3, layout.words) and words.dtype == torch.int16
    for channel in range(head_dim):
        plane, word = divmod(channel, layout.words)
        field = words[:, word].numpy().view(np.uint16) >> (plane * layout.bits) & (2**layout.bits - 1)
        assert (field == codes[:, channel].numpy()).all()
    assert torch.equal(reference.unpack(words, layout), codes)


@settings(max_examples=60, deadline=None)
@given(
    kv_dtype=st.sampled_from(list(KV_DTYPE_BITS)),
    head_dim=st.sampled_from(HEAD_DIMS),
    exponent=st.integers(-20, 10),
    offset=st.sampled_from([0.0, 1.0, -30.0]),
    seed=st.integers(0, 2**31),
)
def test_round_trip_is_within_half_a_step(kv_dtype, head_dim, exponent, offset, seed):
    layout = PageLayout(kv_dtype, head_dim, 32)
    generator = torch.Generator().manual_seed(seed)
    key, value = ((torch.randn(1, 2, 32, head_dim, generator=generator) + offset) * 2.0**exponent for _ in range(2))
    value[0, 0, 3] = 0  # a token of zeros
    cache = reference.page_of(key, value, layout)
    scales = {name: scale.double() for name, scale in layout.scale_views(cache).items()}
    for name, x, got in zip("kv", (key, value), reference.dequantise(cache, layout, dtype=torch.float64), strict=True):
        error = (got - x.double()).abs()
        if layout.is_float:
            least = {"float32": 0.0, "float16": 2.0**-25, "bfloat16": 0.0}[kv_dtype]
            bound = x.double().abs() * {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}[kv_dtype] + least
        elif layout.is_low_bit:
            bound = scales[f"{name}_scale"].unsqueeze(-2 if name == "k" else -1) / 2
        else:
            bound = scales[f"{name}_scale"].unsqueeze(-1) / 2
            if kv_dtype == "fp8":  # half a step is 2^-4 of a number's power of two, 2^-10 of the scale below 2^-6
                bound = torch.maximum(x.double().abs() * 2.0**-4, bound * 2.0**-9)
        # One part in 2^20 for the float32 operations on the way, relative to the largest code.
        slack = 2.0**-20 * x.double().abs().amax()
        assert (error <= bound * (1 + 1e-6) + slack * (not layout.is_float)).all()


def test_quantisation_error_by_format():
    """Per-channel K does not care for channels with large means; per-token K does (KIVI's point)."""
    plain = {name: reference.quantisation_error(name, length=1024, num_queries=64) for name in KV_DTYPE_BITS}
    outliers = {name: reference.quantisation_error(name, True, length=1024, num_queries=64) for name in QUANTISED}
    order = ["float32", "float16", "bfloat16", "int8", "fp8", "int4", "int2"]
    assert [plain[name] for name in order] == sorted(plain.values())
    for name in LOW_BIT:
        assert outliers[name] == pytest.approx(plain[name], rel=0.05)
    assert outliers["int8"] > 1.5 * plain["int8"]
    assert plain["float32"] == 0 and plain["int8"] < 0.02 and plain["int4"] < 0.25


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@pytest.mark.parametrize(
    ("head_dim", "page_size", "rotary_dim"),
    [(64, 32, 64), (80, 64, 32), (96, 32, 96), (128, 128, 128), (256, 32, 0), (128, 64, 64)],
)
@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_pages_are_the_references_to_the_bit(kv_dtype, head_dim, page_size, rotary_dim, device, dtype):
    """Every byte of a cache of noise, the residual windows, the rotated key and query."""
    layout = PageLayout(kv_dtype, head_dim, page_size)
    lengths = (
        [(page_size - 3, 5), (7, 0), (0, page_size + 2), (40, 1)] if layout.is_low_bit else [(30, 4), (7, 0), (0, 5)]
    )
    batch = Batch(layout, lengths, device, dtype, heads=1, group=1, rotary_dim=rotary_dim)
    ours, theirs = batch.both()
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_several_heads_in_a_program(kv_dtype, device, dtype, monkeypatch):
    """The blocks of large batches, on a small one; a float32 key; no query and no rotated key."""
    monkeypatch.setattr(kernel, "_token_blocks", lambda *_: (16, 2, 4))
    monkeypatch.setattr(kernel, "_page_blocks", lambda *_: (2, 2))
    layout = PageLayout(kv_dtype, 64, 32)
    lengths = [(31, 3), (0, 36)]
    assert_same_bits(*Batch(layout, lengths, device, dtype, heads=4, group=1, padding=0).both())
    if kv_dtype in ("float16", "fp8", "int4"):
        batch = Batch(layout, lengths, device, torch.float32, heads=2, padding=0)
        assert_same_bits(*batch.both(query=False, write_back=False))


@pytest.mark.parametrize("kv_dtype", LOW_BIT)
def test_whole_pages_and_idle_sequences(kv_dtype, device, dtype):
    """Prompts whose pages begin where others end, or may be rejected; idle sequences with stale lengths."""
    lengths = [(0, 32), (40, 0), (0, 64), (32, 32), (0, 32), (70, 0)]
    batch = Batch(PageLayout(kv_dtype, 64, 32), lengths, device, dtype, heads=1, group=1, rotary_dim=0)
    batch.flushed_lens[[1, 5]] = 0
    batch.committed_lens[2], batch.committed_lens[5] = 60, 1000
    assert_same_bits(*batch.both(check=False))


@pytest.mark.parametrize("kv_dtype", ["fp8", "int4"])
def test_partial_rope_without_a_rotated_key(kv_dtype, device, dtype):
    batch = Batch(PageLayout(kv_dtype, 64, 32), [(30, 5), (3, 2)], device, dtype, heads=1, rotary_dim=32)
    assert_same_bits(*batch.both(query=False, write_back=False))


@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_only_the_new_tokens_bytes_change(kv_dtype, device, dtype):
    """Two caches, one of zeros, one of ones: where they agree afterwards is what was written."""
    layout = PageLayout(kv_dtype, 64, 32)
    batch = Batch(layout, [(5, 3), (0, 0), (32, 33)], device, dtype, heads=2, rotary_dim=0)
    written = []
    for poison in (0x00, 0xFF):
        batch.cache.fill_(poison)
        arguments = batch.arguments()
        positions, slots = batch.mapping()
        kernel.write_kv(**arguments, positions=positions, slots=slots)
        written.append(arguments["cache"])
    same = written[0] == written[1]
    if layout.is_low_bit:  # one page fills up
        expected = layout.scale_offset + 2 * sum(layout.scale_shapes.values())
        assert int(same.sum()) == batch.heads * expected
        assert same[batch.block_tables[2, 1]].sum() == batch.heads * expected
    else:
        per_token = 2 * layout.row_bytes + 2 * len(layout.scale_shapes)
        assert int(same.sum()) == batch.num_new * batch.heads * per_token


@pytest.mark.parametrize("kv_dtype", QUANTISED)
def test_ties_round_to_even(kv_dtype, device):
    """Numbers half-way between two codes, with a scale that is a power of two."""
    layout = PageLayout(kv_dtype, 128, 32)
    if kv_dtype == "fp8":
        numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # all finite, 0 to 448
        expected = torch.arange(126) + torch.arange(126) % 2
        ties, ends = (numbers[1:] + numbers[:-1]) / 2, (448.0, -448.0)
    else:
        top = {"int8": 127, "int4": 15, "int2": 3}[kv_dtype]
        codes = (torch.arange(126) % top).float()
        ties, ends = codes + 0.5, (float(top), 0.0)
        expected = (codes + codes % 2).long() + (128 if kv_dtype == "int8" else 0)
    token = torch.cat([ties, torch.tensor(ends)])
    # V per token; the K of low-bit formats per channel needs ties down a page.
    key, value = (x.float().to(device) for x in (torch.zeros(32, 1, 128), token.expand(32, 1, 128).contiguous()))
    if layout.is_low_bit:
        down = ((torch.arange(32) % ends[0]) + 0.5).float()
        down[0], down[1] = 0.0, ends[0]
        key[:] = down[:, None, None].to(device)
    cache = layout.empty_cache(2, 1, device)
    lens = int32([32], device)
    low_bit = {
        "residual": layout.empty_residual(1, 1, torch.float32, device) if layout.is_low_bit else None,
        "residual_slots": int32([0], device),
        "flushed_lens": int32([0], device),
        "committed_lens": lens,
    }
    tables = {"block_tables": int32([1], device)[None], "query_start": int32([0, 32], device), "seq_lens": lens}
    slots = torch.arange(32, 64, device=device)
    kernel.write_kv(key, value, cache, layout, slots=slots, **tables, **low_bit)
    codes = reference.unpack(layout.words_view(cache)[1, 0].cpu(), layout).long()
    assert torch.equal(codes[1, :, :126], expected.expand(32, 126))
    if layout.is_low_bit:
        expected = torch.tensor([0, int(ends[0]), *(x + x % 2 for x in (int(y) for y in down[2:]))])
        assert torch.equal(codes[0], expected[:, None].expand(32, 128))


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (96, 24)])
def test_rope_against_float64(head_dim, rotary_dim, device, dtype):
    layout = PageLayout("float16" if INTERPRETING else "bfloat16", head_dim, 32)
    batch = Batch(layout, [(3, 4), (20, 2)], device, dtype, heads=1, group=2, rotary_dim=rotary_dim)
    arguments = batch.arguments()
    positions, slots = batch.mapping()
    kernel.write_kv(**arguments, positions=positions, slots=slots)
    half, n = rotary_dim // 2, batch.num_new
    turn = torch.complex(batch.cos.double(), batch.sin.double())[positions[:n]][:, None]
    for before, after in ((batch.query, arguments["query"]), (batch.key, arguments["key"])):
        x = before[:n].double()
        rotated = torch.complex(x[..., :half], x[..., half:rotary_dim]) * turn
        exact = torch.cat([rotated.real, rotated.imag, x[..., rotary_dim:]], -1)
        assert ((after[:n].double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() / 2 + 1e-6).all()
        assert torch.equal(after[n:], before[n:])
    key, _ = reference.gather(arguments["cache"], layout, batch.block_tables, batch.seq_lens)[1]
    assert torch.equal(key[20:], arguments["key"][4:6].float())


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 40)), min_size=1, max_size=6),
    padding=st.integers(0, 5),
    page_size=st.sampled_from([32, 64]),
)
def test_slot_mapping(lengths, padding, page_size, device):
    starts = list(itertools.accumulate([0, *(q for _, q in lengths)]))
    query_start, seq_lens = int32(starts, device), int32((c + q for c, q in lengths), device)
    block_tables = torch.randperm(4 * len(lengths), device=device).view(len(lengths), 4).int() + 1
    arguments = (block_tables, query_start, seq_lens, starts[-1] + padding, page_size)
    for ours, theirs in zip(kernel.slot_mapping(*arguments), reference.slot_mapping(*arguments), strict=True):
        assert torch.equal(ours, theirs)


# ---------------------------------------------------------------------------------------------------------------------
# The residual window


class Speculation:
    """A scheduler over low-bit pages: remembers every token that stands, and what flushed pages must hold."""

    def __init__(self, layout, device, dtype, writer, seed):
        self.layout, self.device, self.dtype, self.writer = layout, device, dtype, writer
        self.generator = torch.Generator().manual_seed(seed)
        self.block_tables = torch.randperm(16, generator=self.generator).view(2, 8).int().add(1).to(device)
        self.cache = layout.empty_cache(17, 1, device)
        self.residual = layout.empty_residual(2, 1, dtype, device)
        self.tokens = [torch.empty(2, 0, layout.head_dim, dtype=dtype) for _ in range(2)]  # K and V that stand
        self.flushed_lens = int32([0, 0], device)

    def step(self, query_lens, open_lens, kept) -> None:
        """Write new tokens, the last open_lens of which may be rejected, then keep the first `kept` of them.

        Before and after, all that attention would read is compared.
        """
        new = [torch.randn(2, q, self.layout.head_dim, generator=self.generator).to(self.dtype) for q in query_lens]
        contexts = [t.shape[1] for t in self.tokens]
        committed = [c + q - o for c, q, o in zip(contexts, query_lens, open_lens, strict=True)]
        starts = int32(itertools.accumulate([0, *query_lens]), self.device)
        seq_lens = int32((c + q for c, q in zip(contexts, query_lens, strict=True)), self.device)
        flat = torch.cat(new, 1).to(self.device)[:, :, None]
        before, held = self.cache.clone(), self.flushed_lens.tolist()
        committed = int32(committed, self.device)
        self.writer(
            flat[0],
            flat[1],
            self.cache,
            self.layout,
            block_tables=self.block_tables,
            query_start=starts,
            seq_lens=seq_lens,
            residual=self.residual,
            residual_slots=int32([1, 0], self.device),
            flushed_lens=self.flushed_lens,
            committed_lens=committed,
        )
        moved = torch.tensor(query_lens, device=self.device) > 0
        next_flushed = kernel.next_flushed_lens(committed, self.layout.page_size)
        self.flushed_lens = torch.where(moved, next_flushed, self.flushed_lens)
        for b, pages in enumerate(held):
            done = self.block_tables[b, : pages // self.layout.page_size].long()
            assert torch.equal(self.cache[done], before[done])
        written = [torch.cat([t, x], 1) for t, x in zip(self.tokens, new, strict=True)]
        self.compare(written, seq_lens)
        self.tokens = [t[:, : c + k] for t, c, k in zip(written, contexts, kept, strict=True)]
        self.compare(self.tokens, int32((t.shape[1] for t in self.tokens), self.device))

    def compare(self, tokens, lens) -> None:
        extra = (self.residual, int32([1, 0], self.device), self.flushed_lens)
        held = reference.gather(self.cache, self.layout, self.block_tables, lens, *extra)
        size = self.layout.page_size
        for b, ((key, value), expected) in enumerate(zip(held, tokens, strict=True)):
            flushed = int(self.flushed_lens[b])
            assert flushed <= expected.shape[1]
            pages = expected[:, :flushed].reshape(2, flushed // size, 1, size, self.layout.head_dim)
            stored = reference.dequantise(reference.page_of(pages[0], pages[1], self.layout), self.layout)
            for got, quantised, exact in zip((key, value), stored, expected, strict=True):
                assert torch.equal(got[:flushed, 0].cpu(), quantised.flatten(0, 2))
                assert torch.equal(got[flushed:, 0].cpu(), exact[flushed:].float())


def _run_speculation(data, writer, layout, device, dtype, num_steps) -> None:
    state = Speculation(layout, device, dtype, writer, data.draw(st.integers(0, 2**31), "seed"))
    limit = 8 * layout.page_size
    for _ in range(num_steps):
        lens, open_lens, kept = [], [], []
        for tokens in state.tokens:
            room = limit - tokens.shape[1]
            sizes = (st.integers(0, min(room, most)) for most in (1, MAX_QUERY_LEN, 2 * layout.page_size + 9))
            lens.append(data.draw(st.one_of(*sizes), "query_len"))
            open_lens.append(data.draw(st.integers(0, min(lens[-1], MAX_QUERY_LEN)), "open"))
            kept.append(data.draw(st.integers(lens[-1] - open_lens[-1], lens[-1]), "kept"))
        if sum(lens):
            state.step(lens, open_lens, kept)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kv_dtype=st.sampled_from(LOW_BIT))
def test_rollback_never_reaches_a_page_in_the_reference(data, kv_dtype, device, dtype):
    layout = PageLayout(kv_dtype, 64, 32)
    _run_speculation(data, reference.write, layout, torch.device("cpu"), dtype, 10)


@settings(
    max_examples=5 if INTERPRETING else 30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), kv_dtype=st.sampled_from(LOW_BIT))
def test_rollback_never_reaches_a_page(data, kv_dtype, device, dtype):
    """Random prompts in random chunks, drafts accepted and rejected: pages equal quantising the tokens that stand."""
    _run_speculation(data, kernel.write_kv, PageLayout(kv_dtype, 64, 32), device, dtype, 6 if INTERPRETING else 12)


def test_next_flushed_lens(device):
    lens = int32([0, 63, 64, 65, 131071], device)
    out = torch.empty_like(lens)
    assert kernel.next_flushed_lens(lens, 64, out=out) is out
    assert out.tolist() == [0, 0, 64, 64, 131008] == reference.next_flushed_lens(lens, 64).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Reading back


@pytest.mark.parametrize("kv_dtype", QUANTISED)
@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 32), (80, 32), (128, 64)])
def test_dequantised_pages_are_the_references(kv_dtype, head_dim, page_size, device, dtype):
    """fp16 output of random pages; nothing is written behind a length."""
    layout, plain = PageLayout(kv_dtype, head_dim, page_size), PageLayout("float16", head_dim, page_size)
    lengths = [(page_size + 5, 0), (0, 0), (2 * page_size, 0)]
    batch = Batch(layout, lengths, device, torch.float16)
    pages = torch.randn(2, len(batch.cache), batch.heads, page_size, head_dim)
    batch.cache = reference.page_of(*pages, layout).to(device)
    tables = torch.arange(3 * 4, device=device).view(3, 4).int()
    out = torch.full((12, batch.heads, plain.page_bytes), 0xFF, dtype=torch.uint8, device=device)
    ring = {"residual": batch.residual, "residual_slots": batch.residual_slots, "flushed_lens": batch.flushed_lens}
    kernel.dequantise_pages(
        batch.cache,
        layout,
        batch.block_tables,
        batch.seq_lens,
        out,
        plain,
        tables,
        **ring,
        max_context_len=2 * page_size,
    )
    held = reference.gather(batch.cache, layout, batch.block_tables, batch.seq_lens, *ring.values())
    got = reference.gather(out, plain, tables, batch.seq_lens)
    for (key, value), (k, v) in zip(held, got, strict=True):
        assert torch.equal(key.half().float(), k) and torch.equal(value.half().float(), v)
    token_bytes = batch.heads * 2 * plain.row_bytes
    assert int((out != 0xFF).any(-1).sum()) <= sum(-(-c // page_size) for c, _ in lengths) * batch.heads
    untouched = (out.view(torch.int16) == -1).sum() * 2
    assert int(untouched) >= out.numel() - token_bytes * sum(c for c, _ in lengths)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

BAD_ARGUMENTS = [
    ("int8", {"key": lambda b: b.key.to(torch.int32)}, "key is int32"),
    ("int8", {"key": lambda b: b.key[..., :32]}, "key has shape"),
    ("int8", {"value": lambda b: b.value[:-1]}, "value has shape"),
    ("int8", {"value": lambda b: b.value.double()}, "value is float64"),
    ("int8", {"cache": lambda b: b.cache[:, :, :-32]}, "cache has shape"),
    ("int8", {"cache": lambda b: b.cache.view(torch.int8)}, "cache is int8"),
    ("int8", {"value": lambda b: torch.zeros(len(b.key), 2, 65).to(b.key)[..., 1:]}, "value has strides"),
    ("int8", {"slots": lambda b: None}, "slots is None"),
    ("int8", {"slots": lambda b: b.mapping()[1] + 10**6}, re.escape("slots[0] is 1000")),
    ("int8", {"slots": lambda b: b.mapping()[1].int()}, "slots is int32"),
    ("int8", {"positions": lambda b: None}, "positions is None"),
    ("int8", {"positions": lambda b: b.mapping()[0] + 99}, re.escape("positions[0] is")),
    ("int8", {"sin": lambda b: None}, "sin is None"),
    ("int8", {"cos": lambda b: None}, "without cos"),
    ("int8", {"cos": lambda b: b.cos.half()}, "cos is float16"),
    ("int8", {"cos": lambda b: b.cos.repeat(1, 2), "sin": lambda b: b.sin.repeat(1, 2)}, "cos has 64 columns"),
    ("int8", {"query": lambda b: b.query[:, :3]}, "query has 3 heads"),
    ("int4", {"residual": lambda b: None}, "residual is None"),
    ("int4", {"residual": lambda b: b.residual.float()}, "residual is float32"),
    ("int4", {"residual_slots": lambda b: b.residual_slots + 3}, re.escape("residual_slots[")),
    ("int4", {"residual_slots": lambda b: b.residual_slots * 0}, "distinct"),
    ("int4", {"flushed_lens": lambda b: b.flushed_lens + 1}, re.escape("flushed_lens[0] is 33")),
    ("int4", {"flushed_lens": lambda b: b.flushed_lens + 32}, re.escape("flushed_lens[0] is 64")),
    ("int4", {"flushed_lens": lambda b: b.flushed_lens * 0 - 32}, re.escape("flushed_lens[0] is -32; it must be")),
    ("int4", {"flushed_lens": lambda b: b.flushed_lens - int32([0, 32], b.key.device)}, "flushed_lens.1. is -32"),
    ("int4", {"committed_lens": lambda b: b.seq_lens + 1}, re.escape("committed_lens[0] is 38")),
    ("int4", {"committed_lens": lambda b: b.seq_lens * 0}, re.escape("committed_lens[0] is 0")),
    ("int4", {"block_tables": lambda b: b.block_tables + 100}, re.escape("block_tables[0, 0] is")),
    ("int4", {"block_tables": lambda b: b.block_tables.long()}, "block_tables is int64"),
    ("int4", {"seq_lens": lambda b: b.seq_lens + 1000}, re.escape("seq_lens[0] is 1037")),
    ("int4", {"seq_lens": lambda b: b.seq_lens.tolist()}, "seq_lens is a list"),
    ("int4", {"seq_lens": lambda b: b.seq_lens[0]}, "seq_lens has shape"),
    ("int4", {"query_start": lambda b: b.query_start + 1}, "query_start begins at 1"),
    ("int8", {"key": lambda b: None}, "key is a NoneType"),
    ("int8", {"key": lambda b: [1.0]}, "key is a list"),
    ("int8", {"cache": lambda b: None}, "cache is a NoneType"),
    ("int8", {"cos": lambda b: [1.0]}, "cos is a list"),
    ("int8", {"layout": lambda b: None}, "layout is None"),
]


@pytest.mark.parametrize(("kv_dtype", "changes", "message"), BAD_ARGUMENTS)
def test_bad_arguments(kv_dtype, changes, message, device):
    batch = Batch(PageLayout(kv_dtype, 64, 32), [(33, 4), (0, 2)], device, torch.float16)
    arguments = batch.arguments()
    arguments["positions"], arguments["slots"] = batch.mapping()
    before = arguments["cache"].clone()
    arguments |= {name: change(batch) for name, change in changes.items()}
    with pytest.raises(ValueError, match=message):
        kernel.write_kv(**arguments)
    assert torch.equal(batch.cache, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"page_size": 48}, "page_size is 48; it must be 32, 64 or 128"),
        ({"page_size": 32.0}, "page_size is 32.0"),
        ({"query_start": torch.zeros(1, dtype=torch.int32)}, "query_start has shape"),
        ({"seq_lens": [37]}, "seq_lens is a list"),
        ({"block_tables": None}, "block_tables is a NoneType"),
        ({"num_tokens": -1}, "num_tokens is -1; it must be an integer, at least 4"),
        ({"num_tokens": 3}, "num_tokens is 3"),
        ({"num_tokens": None}, "num_tokens is None"),
        ({"out": torch.zeros(4, dtype=torch.int64)}, "out is a Tensor; it must be two tensors"),
        ({"out": (torch.zeros(4, dtype=torch.int64),)}, "out is a tuple of 1; it must be two tensors"),
        ({"out": (None, None)}, "out.0. is a NoneType"),
        ({"out": (torch.zeros(5, dtype=torch.int64),) * 2}, "out.0. has shape"),
    ],
)
def test_bad_arguments_of_slot_mapping(changes, message, device):
    batch = Batch(PageLayout("int8", 64, 32), [(33, 4)], device, torch.float16)
    arguments = {name: getattr(batch, name) for name in ("block_tables", "query_start", "seq_lens")}
    arguments |= {"num_tokens": 4, "page_size": 32}
    arguments |= {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in changes.items()}
    with pytest.raises(ValueError, match=message):
        kernel.slot_mapping(**arguments)


def test_bad_arguments_of_next_flushed_lens(device):
    lens = int32([70], device)
    for changes, message in (
        ({"committed_lens": None}, "committed_lens is a NoneType"),
        ({"committed_lens": lens.long()}, "committed_lens is int64"),
        ({"page_size": 48}, "page_size is 48; it must be 32, 64 or 128"),
        ({"out": [0]}, "out is a list"),
        ({"out": int32([0, 0], device)}, "out has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel.next_flushed_lens(**({"committed_lens": lens, "page_size": 32} | changes))


BAD_DEQUANTISATIONS = [
    ("int8", {"layout": lambda a: a["out_layout"]}, "^layout is float16"),
    ("int8", {"layout": lambda a: None}, "^layout is None"),
    ("int8", {"out_layout": lambda a: None}, "out_layout is None"),
    ("int8", {"out_layout": lambda a: PageLayout("float16", 64, 64)}, "out_layout is"),
    ("int8", {"cache": lambda a: None}, "^cache is a NoneType"),
    ("int8", {"cache": lambda a: a["cache"][..., 1:]}, "^cache has shape"),
    ("int8", {"out_cache": lambda a: None}, "out_cache is a NoneType"),
    ("int8", {"out_cache": lambda a: a["out_cache"][:, :1].contiguous()}, "out_cache has shape"),
    ("int8", {"context_lens": lambda a: [37]}, "context_lens is a list"),
    ("int8", {"context_lens": lambda a: a["context_lens"] + 1000}, "context_lens.0. is 1037.* of block_tables$"),
    ("int8", {"context_lens": lambda a: a["context_lens"] - 38}, "context_lens.0. is -1"),
    ("int8", {"block_tables": lambda a: None}, "^block_tables is a NoneType"),
    ("int8", {"block_tables": lambda a: a["block_tables"] + 100}, "^block_tables.0, 0. is .* of cache, 0 to"),
    ("int8", {"out_block_tables": lambda a: None}, "out_block_tables is a NoneType"),
    ("int8", {"out_block_tables": lambda a: a["out_block_tables"][:, :1]}, "out_block_tables has 1 columns"),
    ("int8", {"out_block_tables": lambda a: a["out_block_tables"] + 4}, "out_block_tables.0, 0. is 4; .* of out_cache"),
    ("int8", {"max_context_len": lambda a: 36}, "max_context_len is 36; it must be an integer, at least 37"),
    ("int8", {"max_context_len": lambda a: 40.0}, "max_context_len is 40.0"),
    ("int4", {"residual": lambda a: None}, "residual is None"),
    ("int4", {"flushed_lens": lambda a: None}, "flushed_lens is None"),
    ("int4", {"flushed_lens": lambda a: [32]}, "flushed_lens is a list"),
    ("int4", {"flushed_lens": lambda a: a["flushed_lens"] + 1}, "flushed_lens.0. is 33"),
    ("int4", {"flushed_lens": lambda a: a["flushed_lens"] + 32}, "flushed_lens.0. is 64"),
    ("int4", {"flushed_lens": lambda a: a["flushed_lens"] - 64}, "flushed_lens.0. is -32"),
    ("int4", {"context_lens": lambda a: a["context_lens"] + 44}, "flushed_lens.0. is 32"),
]


@pytest.mark.parametrize(("kv_dtype", "changes", "message"), BAD_DEQUANTISATIONS)
def test_bad_arguments_of_dequantise_pages(kv_dtype, changes, message, device):
    plain = PageLayout("float16", 64, 32)
    batch = Batch(PageLayout(kv_dtype, 64, 32), [(33, 4)], device, torch.float16)
    names = ("cache", "layout", "block_tables", "residual", "residual_slots", "flushed_lens")
    good = {name: getattr(batch, name) for name in names}
    good |= {"context_lens": batch.seq_lens, "out_cache": plain.empty_cache(4, 2, device), "out_layout": plain}
    good |= {"out_block_tables": batch.block_tables * 0}
    kernel.dequantise_pages(**good, max_context_len=37)
    with pytest.raises(ValueError, match=message):
        kernel.dequantise_pages(**(good | {name: change(good) for name, change in changes.items()}))


# ---------------------------------------------------------------------------------------------------------------------
# Machine code


def _compile_unfused(*arguments, **options):
    """Compile as the launchers do, without fused multiply-adds."""
    with triton.knobs.language.scope():
        triton.knobs.language.default_fp_fusion = False
        return compile_kernel(*arguments, **options)


def _compile_writer(jitted, layout, constants, pointers, integers, num_warps, **options):
    """Compile a writer for bfloat16 tokens with RoPE, a query and a rotated key."""
    strides = {f"{name}_stride_{axis}": "i32" for name in ("key", "value", "rotated", "query") for axis in "th"}
    tokens = {f"{name}_ptr": "*bf16" for name in ("key", "value", "rotated", "query")}
    tables = {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "positions_ptr": "*i64"}
    words = {"words_ptr": "*bf16" if layout.is_float else "*i16"}
    return _compile_unfused(
        jitted,
        tokens | strides | tables | words | pointers | dict.fromkeys(integers, "i32"),
        constants | kernel._page_constants(layout) | {"HALF": layout.head_dim // 2},
        num_warps=num_warps,
        num_stages=1,
        divisible_by_16=tuple(strides),
        **options,
    )


def _compile_tokens(kv_dtype):
    layout = PageLayout(kv_dtype, 128, 64)
    block_tokens, block_heads, num_warps = kernel._token_blocks(16384, 8, 32, 128)
    constants = {"KV_DTYPE": "float" if layout.is_float else kv_dtype, "BLOCK_TOKENS": block_tokens}
    constants |= {"BLOCK_HEADS": block_heads} | ({"scales_ptr": None} if layout.is_float else {})
    pointers = {"slots_ptr": "*i64"} | ({} if layout.is_float else {"scales_ptr": "*fp16"})
    integers = ("num_tokens", "num_kv_heads", "num_heads")
    return _compile_writer(kernel._write_tokens_kernel, layout, constants, pointers, integers, num_warps)


def _specimen_write_fp8():
    return _compile_tokens("fp8")


def _specimen_write_int4():
    layout = PageLayout("int4", 128, 64)
    heads, head_warps = kernel._page_blocks(layout, 65536, 8, 2)
    constants = {"BITS": layout.bits, "HEADS": heads, "HEAD_WARPS": head_warps, "CHUNK": kernel.KEY_CHUNK}
    constants |= {"SEQS_PAD": 128, "QUERY_HEADS": 4, "QUERY_TOKENS": 16, "RESIDUAL_SIZE": layout.residual_size}
    lengths = ("residual_slots", "flushed_lens", "committed_lens", "block_tables", "query_start", "seq_lens")
    pointers = {"scales_ptr": "*fp16", "residual_ptr": "*bf16"} | {f"{name}_ptr": "*i32" for name in lengths}
    integers = ("block_tables_stride", "num_seqs", "num_windows", "num_kv_heads", "num_q_heads", "plane_pairs")
    num_warps, options = heads * head_warps, {"maxnreg": kernel.MAX_REGISTERS}
    return _compile_writer(kernel._write_pages_kernel, layout, constants, pointers, integers, num_warps, **options)


def _specimen_dequantise_int4():
    layout = PageLayout("int4", 128, 64)
    pointers = {"words_ptr": "*i16", "scales_ptr": "*fp16", "residual_ptr": "*bf16", "out_ptr": "*bf16"}
    lengths = ("block_tables", "context_lens", "residual_slots", "flushed_lens", "out_block_tables")
    integers = ("block_tables_stride", "out_block_tables_stride", "max_pages", "num_kv_heads")
    num_warps = kernel._dequantise_warps(layout)
    constants = {"KV_DTYPE": "int4", "BITS": 4, "RESIDUAL_SIZE": layout.residual_size, "WARPS": num_warps}
    return _compile_unfused(
        kernel._dequantise_kernel,
        pointers | {f"{name}_ptr": "*i32" for name in lengths} | dict.fromkeys(integers, "i32"),
        constants | kernel._page_constants(layout),
        num_warps=num_warps,
        num_stages=1,
    )


@pytest.mark.parametrize(
    ("specimen", "registers", "instructions"),
    [
        (_specimen_write_fp8, 72, 1050),
        (_specimen_write_int4, 128, 4400),
        (_specimen_dequantise_int4, 96, 1100),
    ],
)
def test_machine_code(specimen, registers, instructions, compile_for_hopper):
    """Budgets of what limits these kernels besides memory, and no spills, slow divisions or conversions."""
    compiled = compile_for_hopper(specimen)
    opcodes = compiled.opcodes()
    assert compiled.stack_bytes == 0
    assert compiled.registers <= registers
    assert opcodes.total() <= instructions
    assert opcodes["I2F"] + opcodes["F2I"] <= 6  # only scalars' divisions
    assert re.search(r"LDG\.E\.128", compiled.sass) and re.search(r"STG\.E\.128", compiled.sass)
    assert "CALL" not in opcodes


# ---------------------------------------------------------------------------------------------------------------------
# On the GPU


# Every pair of format, head size and page size.
PROMPT_LAYOUTS = [
    (kv_dtype, head_dim, PAGE_SIZES[(i + j) % len(PAGE_SIZES)])
    for i, kv_dtype in enumerate(KV_DTYPE_BITS)
    for j, head_dim in enumerate(HEAD_DIMS)
]


@pytest.mark.gpu
@pytest.mark.parametrize(("kv_dtype", "head_dim", "page_size"), PROMPT_LAYOUTS)
def test_prompts_fill_pages(kv_dtype, head_dim, page_size, device, monkeypatch):
    """Whole prompts of 1024 and 512 tokens, in the blocks of large batches, against pages quantised at once."""
    token_blocks, page_blocks = kernel._token_blocks, kernel._page_blocks
    monkeypatch.setattr(kernel, "_token_blocks", lambda _, *shape: token_blocks(2**20, *shape))
    monkeypatch.setattr(kernel, "_page_blocks", lambda layout, _, *shape: page_blocks(layout, 2**20, *shape))
    layout = PageLayout(kv_dtype, head_dim, page_size)
    batch = Batch(layout, [(0, 1024), (0, 0), (0, 512)], device, torch.bfloat16, heads=4, group=1)
    arguments = batch.arguments()
    positions, slots = batch.mapping()
    kernel.write_kv(**arguments, positions=positions, slots=slots)
    n = batch.num_new
    key = reference.rotate(batch.key[:n], batch.cos, batch.sin, positions[:n])
    assert torch.equal(arguments["key"][:n], key)
    assert torch.equal(arguments["query"][:n], reference.rotate(batch.query[:n], batch.cos, batch.sin, positions[:n]))
    tables = torch.cat([batch.block_tables[0, : 1024 // page_size], batch.block_tables[2, : 512 // page_size]]).long()
    pages = [x.reshape(-1, page_size, 4, head_dim).transpose(1, 2) for x in (key, batch.value[:n])]
    used = layout.scale_offset + 2 * sum(layout.scale_shapes.values())
    assert torch.equal(arguments["cache"][tables][..., :used], reference.page_of(*pages, layout)[..., :used])


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "fp8", "int4"])
def test_caches_beyond_2_to_the_31_elements(kv_dtype, device):
    """A page whose words lie beyond what an int32 counts; written, then read back by dequantise_pages."""
    layout = PageLayout(kv_dtype, 256, 128)
    num_pages = 2**31 // (layout.page_bytes // 2) + 3
    batch = Batch(layout, [(0, 128), (0, 128)], device, torch.bfloat16, heads=1, group=1)
    cache = torch.empty(num_pages, 1, layout.page_bytes, dtype=torch.uint8, device=device)
    batch.block_tables[:, 0] = int32([num_pages - 1, 1], device)
    small = batch.arguments() | {"block_tables": int32([1, 2], device)[:, None]}
    reference.write(**small)
    positions, slots = batch.mapping()
    large = batch.arguments() | {"cache": cache}
    kernel.write_kv(**large, positions=positions, slots=slots)
    used = layout.scale_offset + 2 * sum(layout.scale_shapes.values())
    for page, expected in ((num_pages - 1, 1), (1, 2)):
        assert torch.equal(cache[page, 0, :used], small["cache"][expected, 0, :used])
    if not layout.is_float:
        plain = PageLayout("bfloat16", 256, 128)
        out = plain.empty_cache(2, 1, device)
        ring = [batch.residual, batch.residual_slots, batch.seq_lens]
        names = ("residual", "residual_slots", "flushed_lens")
        tables = int32([0, 1], device)[:, None]
        kernel.dequantise_pages(
            cache, layout, batch.block_tables[:, :1].contiguous(), batch.seq_lens, out, plain, tables,
            **dict(zip(names, ring, strict=True)),
        )  # fmt: skip
        exact = reference.dequantise(cache, layout, [num_pages - 1, 1], torch.bfloat16)
        assert torch.equal(reference.dequantise(out, plain, dtype=torch.bfloat16)[0], exact[0])


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8", "int2"])
def test_in_a_cuda_graph(kv_dtype, device):
    """Captured once, replayed with other lengths and fewer sequences: nothing on the host depends on them."""
    layout = PageLayout(kv_dtype, 128, 64)
    batch = Batch(layout, [(120, 1)] * 8, device, torch.bfloat16, padding=0)
    static, mapping = batch.arguments(), batch.mapping()

    def step():
        tables = (batch.block_tables, batch.query_start, batch.seq_lens)
        kernel.slot_mapping(*tables, 8, 64, out=mapping, check=False)
        kernel.write_kv(**static, positions=mapping[0], slots=mapping[1], check=False)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lengths in ([(63, 1)] * 8, [(70, 1)] * 5 + [(0, 0)] * 3, [(60, 4), (1, 1)] + [(127, 1)] + [(0, 0)] * 5):
        padding = 8 - sum(q for _, q in lengths)
        fresh = Batch(layout, lengths, device, torch.bfloat16, padding=padding, seed=1).arguments()
        for name, tensor in fresh.items():
            if isinstance(tensor, torch.Tensor) and name not in ("block_tables", "cache", "rotated_key"):
                static[name].copy_(tensor)
        expected = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in static.items()}
        expected["rotated_key"] = expected["key"]
        graph.replay()
        reference.write(**expected)
        assert_same_bits(static, expected)
