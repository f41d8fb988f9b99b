"""What the prefill kernels share on the host: the paged context, and how a flat batch is cut into tiles and ordered."""

from dataclasses import dataclass

import torch

from kernels.pages import PageLayout

# K and V that the programs in flight share should stay in the L2 cache (50 MB on Hopper, in two halves).
L2_BUDGET_BYTES = 16 << 20


@dataclass(frozen=True)
class PagedContext:
    """The tokens before the new ones, in pages of a 16-bit float format.

    Args:
        cache: uint8 [num_pages, num_kv_heads, page_bytes].
        layout: of the cache, kv_dtype the dtype of the new keys.
        block_tables: int32 [num_seqs, max_pages]; need only reach over the context.
        seq_lens: int32 [num_seqs], the new tokens included; seq_len - query_len tokens are read from the pages.
    """

    cache: torch.Tensor
    layout: PageLayout
    block_tables: torch.Tensor
    seq_lens: torch.Tensor

    def rows(self) -> torch.Tensor:
        """The cache as [num_pages * num_kv_heads * 2 * page_size, head_dim]: of each page and head K, then V."""
        return self.cache.view(self.layout.word_dtype).view(-1, self.layout.head_dim)


@dataclass(frozen=True)
class Grid:
    """Query tiles and their order.

    A head here is `pack` query heads of one KV head. The tiles form columns: where `uniform`, one for each sequence and
    head, column seq * num_heads + head, of the tiles that the longest sequence has; else one for each head, in which
    sequence b owns the tiles from query_start[b] // block_tokens + b. Columns come in sections whose K and V fit in L2.
    A tile's rank counts sections, within one the tiles from the last, which sees the most keys, to the first, and
    within that columns: so the longest of many sequences come first, and short ones fill the gaps at the end.

    Attributes:
        num_tiles: of a column.
        columns_per_section: the last section may have fewer.
    """

    num_heads: int
    num_columns: int
    num_tiles: int
    uniform: bool
    columns_per_section: int

    @property
    def num_ranks(self) -> int:
        return self.num_columns * self.num_tiles


def cut(
    query: torch.Tensor,
    key: torch.Tensor,
    num_seqs: int,
    max_query_len: int,
    context: PagedContext | None,
    block_m: int,
    pack: int,
) -> Grid:
    """The grid for tiles of `block_m` rows, each row a query head of a token.

    Sequences' lengths are only known on the GPU. Each wastes less than a tile, so num_tokens // block_tokens + num_seqs
    tiles are enough; where the longest sequence says that as many per sequence are no more, none need be searched for.
    """
    block_tokens = block_m // pack
    tiles_per_seq = -(-max_query_len // block_tokens)
    num_tiles = query.shape[0] // block_tokens + num_seqs
    uniform = num_seqs * tiles_per_seq <= num_tiles
    num_heads, num_kv_heads = query.shape[1] // pack, key.shape[1]
    num_columns = num_seqs * num_heads if uniform else num_heads
    max_keys = max_query_len
    if context is not None:
        max_keys += context.block_tables.shape[1] * context.layout.page_size
    kv_heads_in_l2 = L2_BUDGET_BYTES // (2 * max_keys * key.shape[2] * key.element_size())
    return Grid(
        num_heads=num_heads,
        num_columns=num_columns,
        num_tiles=tiles_per_seq if uniform else num_tiles,
        uniform=uniform,
        columns_per_section=min(max(kv_heads_in_l2, 1) * (num_heads // num_kv_heads), num_columns),
    )


def pack_for(group: int, max_query_len: int, block_m: int) -> int:
    """How many heads of a KV group share a tile: as many as it takes to fill it."""
    pack = 1
    while group % (2 * pack) == 0 and pack * max_query_len < block_m:
        pack *= 2
    return pack
