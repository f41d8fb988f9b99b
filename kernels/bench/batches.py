"""Random decode batches over paged caches of every format, in several sets that share no page."""

from dataclasses import dataclass, replace

import torch

from kernels.pages import PageLayout

# Scale (and minimum) around which quantised values are spread like unit Gaussians.
_SCALES = {"fp8": 0.005, "int8": 0.02, "int4": 0.3, "int2": 1.0}
_MINIMA = {"int4": -2.25, "int2": -1.5}


@dataclass(frozen=True)
class Batch:
    """The arguments of decode attention, as the engine holds them; `lengths` is seq_lens on the host."""

    query: torch.Tensor
    cache: torch.Tensor
    layout: PageLayout
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    query_start: torch.Tensor
    lengths: tuple[int, ...]
    residual: torch.Tensor | None = None
    residual_slots: torch.Tensor | None = None
    flushed_lens: torch.Tensor | None = None

    @property
    def query_len(self) -> int:
        return self.query.shape[0] // len(self.lengths)

    def with_query_len(self, query_len: int) -> "Batch":
        """The same caches under longer or shorter queries."""
        shape = (query_len * len(self.lengths), *self.query.shape[1:])
        return replace(self, query=torch.randn_like(self.query.new_empty(shape)), query_start=query_len * _starts(self))

    def gathered(self, b: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of sequence b, or of all, which are then equally long: [batch, num_kv_heads, seq_len, head_dim]."""
        length = max(self.lengths) if b is None else self.lengths[b]
        tables = self.block_tables if b is None else self.block_tables[b : b + 1]
        words = self.layout.words_view(self.cache)[tables[:, : -(-length // self.layout.page_size)].long()]
        words = words.permute(3, 0, 2, 1, 4, 5).flatten(3, 4)  # K and V, batch, head, pages · tokens, channels
        return words[0][:, :, :length], words[1][:, :, :length]


def _starts(batch: Batch) -> torch.Tensor:
    return torch.arange(len(batch.lengths) + 1, dtype=torch.int32, device=batch.query.device)


def random_cache(layout: PageLayout, num_pages: int, num_kv_heads: int, device: torch.device) -> torch.Tensor:
    """A cache full of valid numbers: random codes of the whole range, or unit Gaussians in the float formats.

    Packing gigabytes the proper way would take longer than measuring them.
    """
    cache = torch.empty(num_pages, num_kv_heads, layout.page_bytes, dtype=torch.uint8, device=device)
    if layout.is_float:
        layout.words_view(cache).normal_()
        return cache
    cache.random_(1 if layout.kv_dtype == "int8" else 0, 256)  # int8 has no byte 0
    if layout.kv_dtype == "fp8":
        cache.masked_fill_((cache & 0x7F) == 0x7F, 0x38)  # no NaN
    for name, view in layout.scale_views(cache).items():
        middle = _MINIMA[layout.kv_dtype] if name.endswith("min") else _SCALES[layout.kv_dtype]
        view.copy_(middle * (0.5 + torch.rand(view.shape, device=device)))
    return cache


def kv_bytes(layout: PageLayout, lengths: tuple[int, ...], num_kv_heads: int) -> int:
    """Bytes of K and V, with their scales, that attention over these sequences must read."""
    pages = sum(_flushed(layout, length) // layout.page_size for length in lengths)
    if layout.is_low_bit:
        waiting = sum(lengths) - pages * layout.page_size
        return num_kv_heads * (pages * layout.page_bytes + waiting * 2 * layout.head_dim * 2)
    token = 2 * layout.row_bytes + 2 * len(layout.scale_shapes)
    return num_kv_heads * token * sum(lengths)


def paged_batches(
    layout: PageLayout,
    lengths: tuple[int, ...],
    *,
    num_sets: int,
    num_q_heads: int,
    num_kv_heads: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Batch]:
    """Sets of one new token per sequence, the newest of each `lengths`. Pages lie in random order in one cache."""
    per_sequence = [-(-length // layout.page_size) for length in lengths]
    per_set, num_seqs = sum(per_sequence), len(lengths)
    cache = random_cache(layout, 1 + num_sets * per_set, num_kv_heads, device)
    ids = (1 + torch.randperm(num_sets * per_set, device=device)).int().split(per_set)
    ring, slots, flushed = None, [None] * num_sets, None
    if layout.is_low_bit:
        ring = layout.empty_residual(num_sets * num_seqs, num_kv_heads, dtype, device).normal_()
        slots = torch.arange(num_sets * num_seqs, dtype=torch.int32, device=device).split(num_seqs)
        flushed = torch.tensor([_flushed(layout, n) for n in lengths], dtype=torch.int32, device=device)
    batches = []
    for pages, slot in zip(ids, slots, strict=True):
        tables = torch.zeros(num_seqs, max(per_sequence), dtype=torch.int32, device=device)
        for b, row in enumerate(pages.split(per_sequence)):
            tables[b, : len(row)] = row
        batches.append(
            Batch(
                query=torch.randn(num_seqs, num_q_heads, layout.head_dim, dtype=dtype, device=device),
                cache=cache,
                layout=layout,
                block_tables=tables,
                seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
                query_start=torch.arange(num_seqs + 1, dtype=torch.int32, device=device),
                lengths=lengths,
                residual=ring,
                residual_slots=slot,
                flushed_lens=flushed,
            )
        )
    return batches


def _flushed(layout: PageLayout, length: int) -> int:
    """Tokens in pages; a low-bit format keeps the rest, less than a page in plain decoding, in the residual window."""
    return length // layout.page_size * layout.page_size if layout.is_low_bit else length
