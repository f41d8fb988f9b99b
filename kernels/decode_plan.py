"""The split of decode attention over the GPU.

A *unit* is one sequence and KV head, a *tile* one page of it. The tiles of all units stand in one line, each unit's
behind what it costs beside its pages, and every program takes an equally long share of the line (stream-K, arXiv
2301.03598; LeanAttention, arXiv 2405.10480):

    units      |  b0 h0   |  b0 h1   | b1 h0 | b1 h1 | b2 h0 ...
    line       ..tttttttt..tttttttt..ttttt..ttttt..ttttttttttttttt
    programs   |    0    |    1    |    2    |    3    |    4

Lengths may be as mixed as they like. The shares follow from the lengths alone; a small kernel computes them on the GPU
once per step, and all layers of the step use them. The host never reads a length.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import triton
import triton.language as tl

from kernels import checks
from kernels.interpreting import INTERPRETING, num_multiprocessors
from kernels.pages import MAX_QUERY_LEN, PageLayout

# A residual window takes as long as this many pages.
RESIDUAL_COST = tl.constexpr(3)
# int32 numbers that the plan keeps for each program: its first sequence, unit of it, position in the unit, and length
# of the share; of that sequence what `sequence` says; the program to merge from.
RECORD = tl.constexpr(16)
WRITTEN = 11


@triton.jit
def sequence(
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
def share_of(position, base, extra):
    """The program whose share holds a position of the line; the first `extra` shares are base + 1 long."""
    longer = extra * (base + 1)
    return tl.where(position < longer, position // (base + 1), extra + (position - longer) // base)


@triton.jit(do_not_specialize=["num_seqs", "num_programs"])
def _plan_kernel(
    seq_lens_ptr,
    query_start_ptr,
    flushed_lens_ptr,
    plan_ptr,
    merging_ptr,
    num_seqs,
    num_programs,
    MIN_SHARE: tl.constexpr,
    UNIT_COST: tl.constexpr,
    PAGE: tl.constexpr,
    UNITS: tl.constexpr,
    WINDOW: tl.constexpr,
    LOW_BIT: tl.constexpr,
    FEW_UNITS: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
):
    """Every program works out the whole line, and writes where the shares of some decode programs begin."""
    b = tl.arange(0, BLOCK_SEQS)
    _, _, _, _, tiles, lead = sequence(
        b, b < num_seqs, seq_lens_ptr, query_start_ptr, flushed_lens_ptr, PAGE, WINDOW, LOW_BIT, UNIT_COST
    )
    length = tl.where(tiles > 0, UNITS * (lead + tiles), 0)
    through = tl.cumsum(length, 0)
    total = tl.sum(length, 0)
    base = tl.maximum(total // num_programs, MIN_SHARE)
    extra = tl.maximum(total - base * num_programs, 0)
    if FEW_UNITS:
        for i in range(tl.program_id(0), UNITS, tl.num_programs(0)):
            end = through - length + (i + 1) * (lead + tiles)
            first_w = share_of(end - tiles, base, extra)
            last_w = share_of(end - 1, base, extra)
            merging = tl.where((tiles > 0) & (first_w < last_w), last_w, -1)
            tl.store(merging_ptr + b * UNITS + i, merging, mask=b < num_seqs)

    w = tl.program_id(0) * BLOCK_PROGRAMS + tl.arange(0, BLOCK_PROGRAMS)
    start = tl.minimum(w * base + tl.minimum(w, extra), total)
    count = tl.minimum(start + base + (w < extra).to(tl.int32), total) - start
    ended = through[None, :] <= start[:, None]
    b = tl.sum((ended & (tl.arange(0, BLOCK_SEQS) < num_seqs)[None, :]).to(tl.int32), 1)
    at = start - tl.sum(tl.where(ended, length[None, :], 0), 1)
    seq_len, token0, query_len, first_page, tiles, lead = sequence(
        b, count > 0, seq_lens_ptr, query_start_ptr, flushed_lens_ptr, PAGE, WINDOW, LOW_BIT, UNIT_COST
    )
    unit_length = lead + tiles
    unit = at // unit_length
    at -= unit * unit_length
    # A unit that began in an earlier program and ends in this one: the program with its first tile, else −1.
    merges = (count > 0) & (at > lead) & (unit_length - at <= count)
    merge_from = tl.where(merges, share_of(start - at + lead, base, extra), -1)
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

    @cached_property
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
    # Four warps of int4 with 64 words to a token compute wrong on the GPU (Triton 3.6 puts such tiles on wgmma).
    num_warps = 2 if layout.kv_dtype == "int4" and layout.head_dim == 256 else 4
    programs = max(int(config.programs_per_sm * config.num_warps / num_warps / widening), 1)
    return DecodeConfig(num_warps, 2 if widening > 2 else config.num_stages, programs)


@dataclass(frozen=True)
class DecodePlan:
    """The split of a step's decode work over the GPU, and the buffers for pieces; made by `plan_decode`.

    Attributes:
        table: int32 [num_programs, 16], written by the plan kernel: where each program's share begins.
        merging: int32 [num_units], the program in which a unit of several pieces ends, else −1; written where
            `has_few_units`.
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
    merging: torch.Tensor
    partial_out: torch.Tensor
    partial_lse: torch.Tensor

    @cached_property  # read in every layer
    def group(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    @cached_property
    def rows(self) -> int:
        """Rows of a program's matrix tile: a power of two that holds group · max_query_len, 64 at most."""
        return tile_rows(self.layout, self.group * self.max_query_len)

    @cached_property
    def row_blocks(self) -> int:
        return -(-self.group * self.max_query_len // self.rows)

    @cached_property
    def num_units(self) -> int:
        return self.num_seqs * self.num_kv_heads * self.row_blocks

    @cached_property
    def has_few_units(self) -> bool:
        """Whether units are so few that most are in very many pieces."""
        return 0 < 16 * self.num_units <= self.num_programs

    @cached_property
    def merging_tiles(self) -> tuple[tuple[int, int, int], int, int, int]:
        """Grid of the merge kernel, and rows, channels and pieces that a program of it takes at a time."""
        needed_rows = min(self.rows, triton.next_power_of_2(self.group * self.max_query_len))
        pieces = triton.next_power_of_2(1 + self.num_programs // max(self.num_units, 1))
        programs, block_rows = self.num_programs - 1, min(needed_rows, 4)
        block_channels = triton.next_power_of_2(self.layout.head_dim)
        if self.has_few_units:
            programs, block_rows, block_channels = self.num_units, 1, max(block_channels // 4, 16)
        grid = (programs, needed_rows // block_rows, triton.cdiv(self.layout.head_dim, block_channels))
        return grid, block_rows, block_channels, min(max(pieces, 2), 128)

    def update(
        self,
        seq_lens: torch.Tensor,
        query_start: torch.Tensor,
        flushed_lens: torch.Tensor | None = None,
        *,
        check: bool = True,
    ) -> None:
        """Split anew for other lengths of as many sequences; one small kernel, no synchronisation.

        Raises:
            ValueError: lengths of another shape, type or device than the plan's, when `check` is set.
        """
        if check:
            self._check_lengths(seq_lens, query_start, flushed_lens)
        block_seqs = max(triton.next_power_of_2(self.num_seqs), 16)
        block_programs = min(max(8192 // block_seqs, 1), 16)
        _plan_kernel[(triton.cdiv(self.num_programs, block_programs),)](
            seq_lens,
            query_start,
            flushed_lens,
            self.table,
            self.merging,
            self.num_seqs,
            self.num_programs,
            MIN_SHARE=self.config.min_share,
            UNIT_COST=self.config.unit_cost,
            PAGE=self.layout.page_size,
            UNITS=self.num_kv_heads * self.row_blocks,
            WINDOW=self.window or 0,
            LOW_BIT=self.layout.is_low_bit,
            FEW_UNITS=self.has_few_units,
            BLOCK_SEQS=block_seqs,
            BLOCK_PROGRAMS=block_programs,
            num_warps=4,
        )

    def is_for(
        self, seq_lens: torch.Tensor, query_start: torch.Tensor, flushed_lens: torch.Tensor | None = None
    ) -> bool:
        """Whether the plan is the one of these lengths. Waits for the GPU."""
        fresh = replace(self, table=torch.empty_like(self.table), merging=torch.empty_like(self.merging))
        fresh.update(seq_lens, query_start, flushed_lens, check=False)
        return torch.equal(fresh.table[:, :WRITTEN], self.table[:, :WRITTEN])

    def _check_lengths(self, seq_lens, query_start, flushed_lens) -> None:
        sizes = {"seq_lens": self.num_seqs, "query_start": self.num_seqs + 1}
        given = {"seq_lens": seq_lens, "query_start": query_start}
        if self.layout.is_low_bit:
            if flushed_lens is None:
                raise ValueError(f"flushed_lens is None; {self.layout.kv_dtype} needs the tokens in quantised pages")
            sizes["flushed_lens"], given["flushed_lens"] = self.num_seqs, flushed_lens
        for name, value in given.items():
            device = self.table.device
            checks.tensor(name, value, shape=(sizes[name],), dtypes=(torch.int32,), device=device, contiguous=True)


def tile_rows(layout: PageLayout, needed: int) -> int:
    """Rows of a program's matrix tile: a power of two that holds what is needed, 8 to 64, or 16 if heads are wide."""
    most = 16 if layout.is_low_bit and layout.head_dim == 256 else 64
    return min(max(triton.next_power_of_2(needed), 8), most)


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
    check: bool = True,
) -> DecodePlan:
    """Split one step's decode attention over the GPU. Layers of the same shape and window share a plan.

    Inside a CUDA graph, make the plan before the capture and call its `update` within.

    Args:
        seq_lens: int32 [num_seqs], tokens of each sequence, the new ones included.
        query_start: int32 [num_seqs + 1], where each sequence's new tokens begin in the flat batch.
        flushed_lens: int32 [num_seqs], tokens in quantised pages; for int4 and int2.
        layout: of the cache's pages.
        num_q_heads, num_kv_heads: of the layers that will use the plan.
        max_query_len: new tokens of any sequence at most, 1 to 16.
        window: a token sees this many tokens, itself included; None for all.
        config: overrides the choice for this format; for measurements.

    Raises:
        ValueError: lengths that are no int32 vectors of fitting sizes, heads that do not divide, a query length out of
            1 to 16, a window below 1, or flushed_lens missing, when `check` is set.
    """
    if check:
        checks.page_layout("layout", layout)
        checks.tensors(seq_lens=seq_lens, query_start=query_start)
        checks.integer("num_q_heads", num_q_heads, 1)
        checks.integer("num_kv_heads", num_kv_heads, 1)
        checks.head_ratio(num_q_heads, num_kv_heads)
        checks.integer("max_query_len", max_query_len, 1, MAX_QUERY_LEN)
        if window is not None:
            checks.integer("window", window, 1)
        if seq_lens.dim() != 1:
            raise ValueError(f"seq_lens has shape {list(seq_lens.shape)}; it must be [num_seqs]")
    device, num_seqs = seq_lens.device, seq_lens.shape[0]
    packed = num_q_heads // num_kv_heads * max_query_len
    rows = tile_rows(layout, packed)
    config = config or choose_config(layout, rows)
    num_units = num_seqs * num_kv_heads * -(-packed // rows)
    num_programs = num_multiprocessors(device) * config.programs_per_sm
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
        merging=torch.empty(num_units, dtype=torch.int32, device=device),
        partial_out=torch.empty(2 * num_programs, rows, layout.head_dim, dtype=torch.float32, device=device),
        partial_lse=torch.empty(2 * num_programs, rows, dtype=torch.float32, device=device),
    )
    plan.update(seq_lens, query_start, flushed_lens, check=check)
    return plan
