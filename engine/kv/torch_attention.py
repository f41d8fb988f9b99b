"""Attention over the KV cache in plain PyTorch: what the engine runs on a CPU, and what its Triton backend must equal.

Tokens are written first and then read back from the pages, so that a wrong page, slot or block table shows in the
output. As in the Triton backend there is one exception: over a quantised cache a prompt chunk attends to its own tokens
as they were computed, and only to those before it as they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.batch import Places, StepBatch
from engine.kv.cache import KVCache, LayerCache
from engine.models.config import ModelConfig
from kernels.pages import PageLayout
from kernels.reference.pages import dequantise, pack, quantise_tokens, rotate, write

# Position of a key that is not there: behind every query.
NOWHERE = 2**62

# Logits in memory at a time; longer prompts are attended to in blocks of queries.
MAX_LOGITS = 2**24


@dataclass(frozen=True, eq=False)
class _Piece:
    """Sequences with equally many new tokens, attended to in one go.

    Attributes:
        seqs: int64 [n], their numbers in the step.
        rows: int64 [n, query_len], of the flat batch.
        seq_lens, context_lens: int64 [n], tokens with and without the new ones.
        is_prompt: whether a quantised cache is read only for the context.
    """

    seqs: torch.Tensor
    rows: torch.Tensor
    seq_lens: torch.Tensor
    context_lens: torch.Tensor
    is_prompt: bool

    @property
    def query_len(self) -> int:
        return self.rows.shape[1]

    @property
    def positions(self) -> torch.Tensor:
        """Of the new tokens, [n, query_len]."""
        return self.context_lens[:, None] + torch.arange(self.query_len, device=self.rows.device)


@dataclass(frozen=True, eq=False)
class _Source:
    """Where the keys of a piece stand in the cache.

    Attributes:
        pages: int64 [n, num_pages].
        ring: int64 [n, residual_size], rows of the residual windows, for low-bit formats.
        positions: int64 [n, num_pages · page_size + residual_size], NOWHERE where there is no key.
    """

    pages: torch.Tensor
    ring: torch.Tensor | None
    positions: torch.Tensor


class TorchAttention:
    """`engine.kv.attention.Attention` for any device and any format.

    Args:
        config: heads, windows, softmax scale and soft cap.
        cache: whose pages to write and read.
    """

    def __init__(self, config: ModelConfig, cache: KVCache) -> None:
        self._config = config
        self._cache = cache
        self._pieces: list[_Piece] = []
        self._sources: dict[tuple[int, PageLayout], list[_Source]] = {}
        self._batch: StepBatch | None = None

    def begin_step(self, batch: StepBatch) -> None:
        self._batch = batch
        self._pieces = _pieces(batch)
        self._sources = {}

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
        if rope is not None:
            for x in (query, key):
                x.copy_(rotate(x, *rope, places.positions))
        if cache.layout.is_low_bit:
            self._write_pages(cache, key, value, self._batch)
        else:
            self._write_tokens(cache, key, value, places.slots[cache.group])

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: StepBatch
    ) -> torch.Tensor:
        cache = self._cache.layers[layer]
        out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
        sources = self._sources_of(cache, batch)
        for piece, source in zip(self._pieces, sources, strict=True):
            keys, values = self._read(cache, source)
            positions = source.positions
            if piece.is_prompt and not cache.layout.is_float:
                own = (x[piece.rows].transpose(1, 2).float() for x in (key, value))
                keys, values = (torch.cat(pair, 2) for pair in zip((keys, values), own, strict=True))
                positions = torch.cat([positions, piece.positions], 1)
            result = self._attend(layer, query[piece.rows].float(), keys, values, piece.positions, positions)
            out[piece.rows] = result.to(out.dtype)
        return out

    def _write_tokens(self, cache: LayerCache, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        """Formats whose tokens are stored one by one: all rows at once."""
        rows = (slots >= 0).nonzero()[:, 0]
        layout = cache.layout
        pages, offsets = slots[rows] // layout.page_size, slots[rows] % layout.page_size
        words, scales = layout.words_view(cache.pages), layout.scale_views(cache.pages)
        for i, (name, x) in enumerate((("k_scale", key[rows]), ("v_scale", value[rows]))):
            if layout.is_float:
                words[pages, :, i, offsets] = x.to(layout.word_dtype)
            else:
                quantised = quantise_tokens(x, layout.kv_dtype)
                words[pages, :, i, offsets] = pack(quantised.codes, layout)
                scales[name][pages, :, offsets] = quantised.scale

    def _write_pages(self, cache: LayerCache, key: torch.Tensor, value: torch.Tensor, batch: StepBatch) -> None:
        write(
            key,
            value,
            cache.pages,
            cache.layout,
            block_tables=batch.groups[cache.group].block_tables,
            query_start=batch.query_start,
            seq_lens=batch.seq_lens,
            residual=cache.residual,
            residual_slots=batch.residual_slots,
            flushed_lens=batch.flushed_lens,
            committed_lens=batch.committed_lens,
        )

    def _sources_of(self, cache: LayerCache, batch: StepBatch) -> list[_Source]:
        """Of every piece; layers of the same group and format share them."""
        kind = (cache.group, cache.layout)
        if kind not in self._sources:
            window = self._cache.groups.windows[cache.group]
            self._sources[kind] = [_source(piece, cache, window, batch) for piece in self._pieces]
        return self._sources[kind]

    def _read(self, cache: LayerCache, source: _Source) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value as they are stored, float32 [n, num_kv_heads, num_keys, head_dim]; zeros where none is."""
        layout = cache.layout
        pages = cache.pages.index_select(0, source.pages.flatten())
        parts = [
            part.unflatten(0, source.pages.shape).transpose(1, 2).flatten(2, 3) for part in dequantise(pages, layout)
        ]
        if source.ring is not None:
            slots, offsets = source.ring // layout.residual_size, source.ring % layout.residual_size
            for i in range(2):
                waiting = cache.residual[slots, :, i, offsets].transpose(1, 2).float()
                parts[i] = torch.cat([parts[i], waiting], 2)
        missing = (source.positions == NOWHERE)[:, None, :, None]
        return parts[0], parts[1].masked_fill_(missing, 0.0)

    def _attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_positions: torch.Tensor,
        key_positions: torch.Tensor,
    ) -> torch.Tensor:
        """query [n, query_len, num_q_heads, head_dim], key and value [n, num_kv_heads, num_keys, head_dim]."""
        config = self._config
        num_seqs, query_len, num_heads, head_dim = query.shape
        window = config.layer_windows[layer]
        block = max(1, MAX_LOGITS // (num_seqs * num_heads * max(key.shape[2], 1)))
        outs = []
        for start in range(0, query_len, block):
            q, at = query[:, start : start + block], query_positions[:, start : start + block, None]
            length = q.shape[1]
            # Query heads of a KV head are rows of one matrix.
            rows = q.unflatten(2, (config.num_kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
            logits = (rows @ key.transpose(2, 3)).mul_(config.softmax_scale)
            if config.attention_soft_cap is not None:
                logits = (logits / config.attention_soft_cap).tanh_().mul_(config.attention_soft_cap)
            hidden = key_positions[:, None] > at
            if window is not None:
                hidden |= key_positions[:, None] <= at - window
            logits = logits.unflatten(2, (-1, length)).masked_fill_(hidden[:, None, None], -torch.inf)
            weights = torch.softmax(logits, dim=-1).flatten(2, 3)
            out = (weights @ value).unflatten(2, (-1, length)).permute(0, 3, 1, 2, 4)
            outs.append(out.reshape(num_seqs, length, num_heads, head_dim))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def _pieces(batch: StepBatch) -> list[_Piece]:
    """Decodes of one token together, every other sequence alone; those without new tokens are passed over."""
    starts, lengths = batch.query_start.tolist(), batch.seq_lens.tolist()
    device = batch.seq_lens.device
    together: list[int] = []
    alone: list[int] = []
    for seq in range(batch.num_seqs):
        query_len = starts[seq + 1] - starts[seq]
        if query_len:
            (together if query_len == 1 and seq < batch.num_decode_seqs else alone).append(seq)
    pieces = []
    for seqs in [together] * bool(together) + [[seq] for seq in alone]:
        query_len = starts[seqs[0] + 1] - starts[seqs[0]]
        first_rows = torch.tensor([starts[seq] for seq in seqs], device=device)
        seq_lens = torch.tensor([lengths[seq] for seq in seqs], device=device)
        pieces.append(
            _Piece(
                seqs=torch.tensor(seqs, device=device),
                rows=first_rows[:, None] + torch.arange(query_len, device=device),
                seq_lens=seq_lens,
                context_lens=seq_lens - query_len,
                is_prompt=seqs[0] >= batch.num_decode_seqs,
            )
        )
    return pieces


def _source(piece: _Piece, cache: LayerCache, window: int | None, batch: StepBatch) -> _Source:
    """The keys that a piece reads from a layer's cache: pages from the window's first on, then the residual window."""
    layout, device = cache.layout, piece.rows.device
    ends = piece.context_lens if piece.is_prompt and not layout.is_float else piece.seq_lens
    paged = ends
    if layout.is_low_bit:
        flushed = batch.next_flushed_lens[piece.seqs].long()
        paged = torch.minimum(ends, flushed)
    first_pages = torch.zeros_like(ends)
    if window is not None:
        first_pages = (piece.context_lens - window + 1).clamp(min=0) // layout.page_size
    last_pages = (paged + layout.page_size - 1) // layout.page_size
    num_pages = max(int((last_pages - first_pages).max()), 0)

    columns = first_pages[:, None] + torch.arange(num_pages, device=device)
    table = batch.groups[cache.group].block_tables[piece.seqs]
    exists = columns < last_pages[:, None]
    pages = table.gather(1, columns.clamp(max=table.shape[1] - 1)).long().where(exists, 0)
    positions = columns[..., None] * layout.page_size + torch.arange(layout.page_size, device=device)
    positions = positions.flatten(1)
    positions = positions.where(positions < paged[:, None], NOWHERE)
    ring = None
    if layout.is_low_bit:
        waiting = flushed[:, None] + torch.arange(layout.residual_size, device=device)
        ring = waiting % layout.residual_size
        slots = batch.residual_slots[piece.seqs].long()
        ring += slots[:, None] * layout.residual_size
        positions = torch.cat([positions, waiting.where(waiting < ends[:, None], NOWHERE)], 1)
    return _Source(pages, ring, positions)
