"""Attention over the KV cache by our kernels: decodes read any format, prompt chunks 16-bit pages.

A step's decodes go through `kernels.decode`, whose split over the GPU follows from the lengths and is computed once per
step for every (page layout, window). Prompt chunks go through `kernels.prefill`. Where the cache is quantised, that
kernel finds the context in a scratch cache of 16-bit pages, which every layer fills anew for itself:

    quantised cache   | 7 | 3 | 9 |          | 4 | 8 |           block tables of two chunks
                        v   v   v              v   v             dequantise_pages
    scratch           | 0 | 1 | 2 |          | 3 | 4 |

Of a layer with a sliding window only the pages are copied that the window reaches, and positions are counted from the
first of them; attention depends on differences of positions only. Contexts that do not fit the scratch together are
attended to in several runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from engine.batch import Places, PrefillBatch, StepBatch
from engine.errors import UserError
from engine.kv.cache import FLOAT_NAMES, KVCache, LayerCache, scratch_bytes, scratch_layout
from engine.models.config import ModelConfig
from kernels.cache import dequantise_pages, write_kv
from kernels.decode import decode_attention
from kernels.decode_plan import DecodePlan, plan_decode
from kernels.pages import PageLayout
from kernels.prefill import PagedContext, prefill_attention


@dataclass(frozen=True, eq=False)
class _Decodes:
    """What all layers share of a step's decodes: the first num_decode_seqs entries of the batch's tensors."""

    num_tokens: int
    seq_lens: torch.Tensor
    query_start: torch.Tensor
    block_tables: tuple[torch.Tensor, ...]
    ring: dict[str, torch.Tensor]
    plans: dict[tuple[PageLayout, int | None], DecodePlan]


@dataclass(frozen=True, eq=False)
class _Copy:
    """How a run's context gets into the scratch cache; positions are counted from the first page that is copied."""

    block_tables: torch.Tensor
    context_lens: torch.Tensor
    max_context_len: int
    ring: dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class _Contexts:
    """What stands before a step's prompt chunks in a quantised cache, positions counted as in `_Copy`.

    Attributes:
        block_tables: int32 [num_prefills, num_pages]. seq_lens, context_lens, copied_lens: int32 [num_prefills].
        ring: residual slots and flushed lengths, for low-bit formats.
        host_pages: that each sequence copies.
        page_size: tokens per page.
    """

    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    context_lens: torch.Tensor
    copied_lens: torch.Tensor
    ring: dict[str, torch.Tensor]
    host_pages: list[int]
    page_size: int


@dataclass(frozen=True, eq=False)
class _Run:
    """Neighbouring prompt chunks that are attended to by one launch.

    Attributes:
        rows: of the step's flat batch.
        query_start: int32 [num_seqs + 1], counted from the first of these rows.
        block_tables, seq_lens: of the context's pages and with it; None where no sequence has a context.
        copy: what fills the scratch cache before, which block_tables then name; None for 16-bit caches.
    """

    rows: slice
    query_start: torch.Tensor
    max_query_len: int
    block_tables: torch.Tensor | None = None
    seq_lens: torch.Tensor | None = None
    copy: _Copy | None = None


class TritonAttention:
    """`engine.kv.attention.Attention` for 16-bit models on a GPU.

    Args:
        config: heads, windows, softmax scale and soft cap.
        cache: whose pages to write and read.
        dtype: bfloat16 or float16, of the model.
        max_model_len: tokens of the longest sequence; what the scratch cache must hold.
        check: have the kernels look at their arguments, which waits for the GPU; for tests.

    Raises:
        UserError: a dtype that the kernels do not take.
    """

    def __init__(
        self, config: ModelConfig, cache: KVCache, *, dtype: torch.dtype, max_model_len: int, check: bool = False
    ) -> None:
        if dtype not in (torch.bfloat16, torch.float16):
            raise UserError(f"dtype is {FLOAT_NAMES.get(dtype, dtype)}; on a GPU it must be bfloat16 or float16")
        self._config = config
        self._cache = cache
        self._check = check
        # Layers of one page layout and window share a decode plan.
        layouts = [layer.layout for layer in cache.layers]
        self._layer_kinds = list(zip(layouts, config.layer_windows, strict=True))
        self._kinds = list(dict.fromkeys(self._layer_kinds))
        # Kept for good: captured graphs hold the addresses of plans.
        self._plans: dict[tuple[int, int, tuple[PageLayout, int | None]], DecodePlan] = {}
        self._scratch_layout = scratch_layout(layouts[0], dtype)
        page_bytes = self._scratch_layout.page_bytes * config.num_kv_heads
        self._scratch_pages = scratch_bytes(config, layouts, max_model_len, dtype) // page_bytes
        self._scratch = None
        if self._scratch_pages:
            self._scratch = self._scratch_layout.empty_cache(self._scratch_pages, config.num_kv_heads, cache.device)
        self._decodes: _Decodes | None = None
        self._runs: dict[tuple[int, PageLayout], list[_Run]] = {}
        self._out: torch.Tensor | None = None
        self._batch: StepBatch | None = None

    # ---- once per step -----------------------------------------------------------------------------------------------

    def begin_step(self, batch: StepBatch) -> None:
        config, device = self._config, batch.token_ids.device
        self._batch = batch
        dtype = self._scratch_layout.word_dtype
        # One buffer for all layers. Padding, which no kernel writes, is in steps without prompt chunks only.
        make = torch.zeros if batch.prefill is None else torch.empty
        if batch.attended is not None:
            self._out = batch.attended[: batch.num_tokens]
        else:
            self._out = make(batch.num_tokens, config.num_q_heads, config.head_dim, dtype=dtype, device=device)
        self._decodes = self._begin_decodes(batch) if batch.num_decode_seqs else None
        self._runs = {}
        if batch.prefill is not None:
            for layer in self._cache.layers:
                kind = (layer.group, layer.layout)
                if kind not in self._runs:
                    self._runs[kind] = self._begin_prefills(batch, layer)

    def _begin_decodes(self, batch: StepBatch) -> _Decodes:
        num_seqs = batch.num_decode_seqs
        seq_lens, query_start = batch.seq_lens[:num_seqs], batch.query_start[: num_seqs + 1]
        ring = {}
        if batch.next_flushed_lens is not None:
            ring["residual_slots"] = batch.residual_slots[:num_seqs]
            ring["flushed_lens"] = batch.next_flushed_lens[:num_seqs]
        plans = {}
        for kind in self._kinds:
            lengths = (seq_lens, query_start, ring["flushed_lens"] if kind[0].is_low_bit else None)
            plans[kind] = self._plan(kind, batch.max_decode_query_len, lengths)
        tables = tuple(group.block_tables[:num_seqs] for group in batch.groups)
        return _Decodes(batch.num_decode_tokens, seq_lens, query_start, tables, ring, plans)

    def _plan(
        self, kind: tuple[PageLayout, int | None], max_query_len: int, lengths: tuple[torch.Tensor, ...]
    ) -> DecodePlan:
        """The plan for so many sequences, brought to these lengths; made where there is none."""
        seq_lens = lengths[0]
        key = (seq_lens.shape[0], max_query_len, kind)
        plan = self._plans.get(key)
        if plan is not None:
            plan.update(*lengths, check=self._check)
            return plan
        if seq_lens.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"a graph of {key[0]} sequences is captured before such a step has run once")
        plan = self._new_plan(kind, max_query_len, lengths)
        self._plans[key] = plan
        return plan

    def _new_plan(
        self, kind: tuple[PageLayout, int | None], max_query_len: int, lengths: tuple[torch.Tensor, ...]
    ) -> DecodePlan:
        """Plans share buffers: a step updates a plan before it uses it, and merges a layer's pieces before the next."""
        layout, window = kind
        seq_lens, query_start, flushed_lens = lengths
        num_seqs = seq_lens.shape[0]
        for (_, query_len, other_kind), other in self._plans.items():
            if (query_len, other_kind) == (max_query_len, kind):
                plan = replace(other, num_seqs=num_seqs)
                plan = replace(plan, merging=other.merging.new_empty(plan.num_units))
                plan.update(*lengths, check=self._check)
                return plan
        plan = plan_decode(
            seq_lens,
            query_start,
            layout,
            num_q_heads=self._config.num_q_heads,
            num_kv_heads=self._config.num_kv_heads,
            max_query_len=max_query_len,
            window=window,
            flushed_lens=flushed_lens,
            check=self._check,
        )
        for other in self._plans.values():
            if other.partial_out.shape == plan.partial_out.shape:
                return replace(plan, partial_out=other.partial_out, partial_lse=other.partial_lse)
        return plan

    def _begin_prefills(self, batch: StepBatch, layer: LayerCache) -> list[_Run]:
        """The runs of the layers of one group and format."""
        prefill = batch.prefill
        rows = slice(prefill.first_token, prefill.first_token + sum(prefill.host_query_lens))
        whole = _Run(rows, prefill.query_start, prefill.max_query_len)
        if prefill.max_context_len == 0:
            return [whole]
        if layer.layout.is_float:
            seqs = _prefill_seqs(prefill)
            reach = -(-prefill.max_context_len // layer.layout.page_size)
            tables = batch.groups[layer.group].block_tables[seqs, :reach]
            return [replace(whole, block_tables=tables, seq_lens=batch.seq_lens[seqs])]
        contexts = _contexts(batch, layer, self._cache.groups.windows[layer.group])
        return [_copying_run(prefill, contexts, seqs) for seqs in _fitting(contexts.host_pages, self._scratch_pages)]

    # ---- once per layer ----------------------------------------------------------------------------------------------

    def writes_by_place(self, layer: int) -> bool:
        return not self._cache.layers[layer].layout.is_low_bit

    def write(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        places: Places,
        rope: tuple[torch.Tensor, torch.Tensor] | None,
        *,
        keeps_key: bool,
    ) -> None:
        cache = self._cache.layers[layer]
        arguments: dict[str, torch.Tensor | None] = {}
        if rope is not None:
            # So as not to allocate, a partial RoPE wants the rotated keys too.
            keeps_key |= 2 * rope[0].shape[1] < key.shape[2]
            arguments = {"cos": rope[0], "sin": rope[1], "query": query, "rotated_key": key if keeps_key else None}
        if cache.layout.is_low_bit:
            batch = self._batch
            arguments |= {
                "block_tables": batch.groups[cache.group].block_tables,
                "query_start": batch.query_start,
                "seq_lens": batch.seq_lens,
                "residual": cache.residual,
                "residual_slots": batch.residual_slots,
                "flushed_lens": batch.flushed_lens,
                "committed_lens": batch.committed_lens,
            }
        write_kv(
            key,
            value,
            cache.pages,
            cache.layout,
            slots=places.slots[cache.group],
            positions=places.positions,
            **arguments,
            check=self._check,
        )

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: StepBatch
    ) -> torch.Tensor:
        cache = self._cache.layers[layer]
        if self._decodes is not None:
            self._decode(layer, cache, query)
        if batch.prefill is not None:
            for run in self._runs[cache.group, cache.layout]:
                self._prefill(layer, cache, run, query, key, value)
        return self._out

    def _decode(self, layer: int, cache: LayerCache, query: torch.Tensor) -> None:
        decodes = self._decodes
        plan = decodes.plans[self._layer_kinds[layer]]
        ring = {"residual": cache.residual, **decodes.ring} if cache.layout.is_low_bit else {}
        decode_attention(
            query[: decodes.num_tokens],
            cache.pages,
            cache.layout,
            decodes.block_tables[cache.group],
            decodes.seq_lens,
            decodes.query_start,
            max_query_len=plan.max_query_len,
            plan=plan,
            **ring,
            window=plan.window,
            soft_cap=self._config.attention_soft_cap,
            softmax_scale=self._config.softmax_scale,
            out=self._out[: decodes.num_tokens],
            check=self._check,
        )

    def _prefill(
        self, layer: int, cache: LayerCache, run: _Run, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        context = None
        if run.block_tables is not None:
            pages, layout = cache.pages, cache.layout
            if run.copy is not None:
                self._fill_scratch(cache, run)
                pages, layout = self._scratch, self._scratch_layout
            context = PagedContext(pages, layout, run.block_tables, run.seq_lens)
        prefill_attention(
            query[run.rows],
            key[run.rows],
            value[run.rows],
            query_start=run.query_start,
            max_query_len=run.max_query_len,
            softmax_scale=self._config.softmax_scale,
            window=self._config.layer_windows[layer],
            soft_cap=self._config.attention_soft_cap,
            context=context,
            out=self._out[run.rows],
            check=self._check,
        )

    def _fill_scratch(self, cache: LayerCache, run: _Run) -> None:
        copy = run.copy
        dequantise_pages(
            cache.pages,
            cache.layout,
            copy.block_tables,
            copy.context_lens,
            self._scratch,
            self._scratch_layout,
            run.block_tables,
            residual=cache.residual,
            **copy.ring,
            max_context_len=copy.max_context_len,
            check=self._check,
        )


def _prefill_seqs(prefill: PrefillBatch) -> slice:
    return slice(prefill.first_seq, prefill.first_seq + len(prefill.host_query_lens))


def _contexts(batch: StepBatch, layer: LayerCache, window: int | None) -> _Contexts:
    """What the layers of one group and format copy to the scratch cache."""
    prefill, page_size, seqs = batch.prefill, layer.layout.page_size, _prefill_seqs(batch.prefill)
    tables, seq_lens = batch.groups[layer.group].block_tables[seqs], batch.seq_lens[seqs]
    context_lens, flushed_lens = prefill.context_lens, None
    if layer.layout.is_low_bit:
        # Tokens of the context may have gone to pages together with new ones: then copy these pages to their end.
        reach = (context_lens + (page_size - 1)) // page_size * page_size
        flushed_lens = torch.minimum(batch.next_flushed_lens[seqs], reach)
    step = _first_page_step(layer.layout)
    host_firsts = [_first_page(length, window, page_size, step) for length in prefill.host_context_lens]
    host_pages = [
        -(-length // page_size) - first for length, first in zip(prefill.host_context_lens, host_firsts, strict=True)
    ]
    if any(host_firsts):
        firsts = (context_lens + (1 - window)).clamp(min=0) // (page_size * step) * step
        columns = firsts[:, None] + torch.arange(max(host_pages), dtype=torch.int32, device=firsts.device)
        tables = tables.gather(1, columns.clamp(max=tables.shape[1] - 1).long())
        skipped = firsts * page_size
        context_lens, seq_lens = context_lens - skipped, seq_lens - skipped
        if flushed_lens is not None:
            flushed_lens = (flushed_lens - skipped).clamp(min=0)
    ring, copied_lens = {}, context_lens
    if flushed_lens is not None:
        ring = {"residual_slots": batch.residual_slots[seqs], "flushed_lens": flushed_lens}
        copied_lens = torch.maximum(context_lens, flushed_lens)
    return _Contexts(tables, seq_lens, context_lens, copied_lens, ring, host_pages, page_size)


def _copying_run(prefill: PrefillBatch, contexts: _Contexts, seqs: slice) -> _Run:
    """Some of a step's prompt chunks, their contexts one behind the other in the scratch cache."""
    query_lens = prefill.host_query_lens
    first_row = prefill.first_token + sum(query_lens[: seqs.start])
    query_start = prefill.query_start[seqs.start : seqs.stop + 1]
    if seqs.start:
        query_start = query_start - query_start[0]
    run = _Run(slice(first_row, first_row + sum(query_lens[seqs])), query_start, max(query_lens[seqs]))
    max_pages, page_size = max(contexts.host_pages[seqs]), contexts.page_size
    if not max_pages:
        return run
    pages = (contexts.context_lens[seqs] + (page_size - 1)) // page_size
    offsets = pages.cumsum(0, dtype=torch.int32) - pages
    scratch_tables = offsets[:, None] + torch.arange(max_pages, dtype=torch.int32, device=offsets.device)
    copy = _Copy(
        contexts.block_tables[seqs, :max_pages],
        contexts.copied_lens[seqs],
        max_pages * page_size,
        {name: x[seqs] for name, x in contexts.ring.items()},
    )
    return replace(run, block_tables=scratch_tables, seq_lens=contexts.seq_lens[seqs], copy=copy)


def _first_page_step(layout: PageLayout) -> int:
    """Pages by which positions may be shifted: a residual window must still have position p at p % residual_size."""
    return math.lcm(layout.page_size, layout.residual_size or 1) // layout.page_size


def _first_page(context_len: int, window: int | None, page_size: int, step: int) -> int:
    """The first page to copy: at or before the first that new tokens see, in whole steps."""
    return 0 if window is None else max(context_len - window + 1, 0) // (page_size * step) * step


def _fitting(host_pages: list[int], capacity: int) -> Iterator[slice]:
    """Cut sequences with so many pages into runs of neighbours that fit together."""
    start, used = 0, 0
    for seq, pages in enumerate(host_pages):
        if used + pages > capacity:
            yield slice(start, seq)
            start, used = seq, 0
        used += pages
    yield slice(start, len(host_pages))
