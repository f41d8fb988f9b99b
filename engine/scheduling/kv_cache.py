"""Which pages each request holds: one block table per KV group over one pool.

Layers are in groups: those with full attention, and those with a sliding window. Every group needs a page of its own
for the same token positions, and all pages have the same size, so one pool serves them all. A full-attention group
keeps every page; a sliding one gives back the pages that its window has moved past and puts the null block there::

    full     | 7 | 3 | 9 | 4 |
    sliding  | 0 | 0 | 5 | 8 |      0 is the null block; the window covers the last two pages
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from engine.scheduling.block_pool import NULL_BLOCK, BlockPool
from engine.scheduling.request import Request


@dataclass(frozen=True, slots=True)
class KVCacheConfig:
    """The size of the cache and what its groups keep.

    Attributes:
        num_blocks: blocks in the pool, the null block among them.
        block_size: tokens per block.
        windows: one entry per KV group: its sliding window in tokens, or None for full attention.
        enable_prefix_caching: keep finished blocks findable by their hash.
    """

    num_blocks: int
    block_size: int = 16
    windows: tuple[int | None, ...] = (None,)
    enable_prefix_caching: bool = False

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1 token, not {self.block_size}")
        if not self.windows:
            raise ValueError("windows must name at least one KV group")
        for window in self.windows:
            if window is not None and window < 1:
                raise ValueError(f"a sliding window must be at least 1 token, not {window}")

    def max_pages(self, num_tokens: int, num_new_tokens: int) -> int:
        """Most pages, over all groups, that a request of `num_tokens` holds while it advances in steps of at most
        `num_new_tokens`.

        A sliding group holds its window and the tokens of the current step. The window is released page by page and
        only when a new page is asked for, hence the two partial pages at its ends.
        """
        pages = -(-num_tokens // self.block_size)
        total = 0
        for window in self.windows:
            if window is None:
                total += pages
            else:
                total += min(pages, -(-(window - 1 + num_new_tokens) // self.block_size) + 1)
        return total


class KVCacheManager:
    """Gives pages to requests and takes them back."""

    def __init__(self, config: KVCacheConfig) -> None:
        self.config = config
        self.block_size = config.block_size
        self.windows = config.windows
        self.pool = BlockPool(config.num_blocks, len(config.windows))
        self._full_groups = [g for g, window in enumerate(config.windows) if window is None]
        # The tables of a request with no page yet.
        self.no_pages: list[list[int]] = [[] for _ in config.windows]
        self._sliding_groups = [(g, window) for g, window in enumerate(config.windows) if window is not None]

    @property
    def has_sliding_groups(self) -> bool:
        return bool(self._sliding_groups)

    def find_prefix(self, request: Request) -> tuple[int, list[list[int]]]:
        """The longest cached prefix that every group can serve.

        At least one token is always left to compute: without it there would be no logits to sample from.

        Returns:
            Cached tokens (a multiple of block_size) and, per group, the table of those pages. Nothing is held yet.
        """
        pages = min(len(request.block_hashes), (request.num_tokens - 1) // self.block_size)
        hashes = request.block_hashes[:pages] if pages < len(request.block_hashes) else request.block_hashes
        tables: list[list[int]] = [[] for _ in self.windows]
        for group in self._full_groups:
            tables[group] = self.pool.longest_prefix(group, hashes[:pages])
            pages = min(pages, len(tables[group]))
        while pages:
            # Every sliding group must have the pages that the window of the next token reaches back to.
            reach = pages
            for group, window in self._sliding_groups:
                tables[group], reach = self._window_pages(group, window, hashes, pages)
                if reach < pages:
                    break
            if reach == pages:
                break
            pages = reach
        return pages * self.block_size, [table[:pages] for table in tables]

    def _window_pages(self, group: int, window: int, hashes: Sequence[Hashable], pages: int) -> tuple[list[int], int]:
        """Pages [0, pages) of a sliding group, null outside the window, and how long a prefix they allow."""
        first = max(0, pages * self.block_size - window + 1) // self.block_size
        table = [NULL_BLOCK] * pages
        for page in range(pages - 1, first - 1, -1):
            block = self.pool.find(group, hashes[page])
            if block is None:
                return table, page
            table[page] = block
        return table, pages

    def can_hold_whole(self, request: Request, cached: list[list[int]], max_step_tokens: int) -> bool:
        """Whether all known tokens of a waiting request would fit now, its cached prefix not counted twice."""
        pool = self.pool
        needed = self.config.max_pages(request.num_tokens, max_step_tokens)
        if cached[0]:
            for table in cached:
                held = [block for block in table if block != NULL_BLOCK]
                # Cached pages need not be taken, but the retained ones among them are free only until they are held.
                needed += pool.num_retained(held) - len(held)
        return needed <= pool.num_free

    def adopt_prefix(self, request: Request, num_cached_tokens: int, tables: list[list[int]]) -> None:
        """Start a request's block tables with its cached pages."""
        if num_cached_tokens:
            for table in tables:
                self.pool.hold(table)
        request.block_tables = [table.copy() for table in tables]
        request.num_slots = len(tables[0]) * self.block_size
        request.num_hashed_blocks = len(tables[0])
        request.num_computed_tokens = num_cached_tokens
        request.num_window_pages_released = [0] * len(tables)
        for group, window in self._sliding_groups:
            request.num_window_pages_released[group] = self._pages_behind_window(num_cached_tokens, window)

    def _pages_behind_window(self, num_computed_tokens: int, window: int) -> int:
        # The next query sits at position num_computed_tokens and reads keys from num_computed_tokens - window + 1 on.
        return max(0, num_computed_tokens - window + 1) // self.block_size

    def allocate(self, request: Request, num_tokens: int) -> bool:
        """Make room for positions [0, num_tokens), first giving back what the windows have moved past.

        Pages behind a window go back only when a new page is asked for, so that between page boundaries a decode
        step changes nothing but counters.

        Returns:
            False, with nothing taken, if the pool has too few blocks.
        """
        new_pages = -(-num_tokens // self.block_size) - len(request.block_tables[0])
        if new_pages <= 0:
            return True
        if self._sliding_groups:
            self._release_behind_windows(request)
        pool = self.pool
        if new_pages * len(self.windows) > pool.num_free:
            return False
        for table in request.block_tables:
            table.extend(pool.take(new_pages))
        request.num_slots += new_pages * self.block_size
        return True

    def add_pages(self, requests: Sequence[Request]) -> None:
        """One more page for each entry, in order, where no group has a window. The pool must have enough."""
        block_size = self.block_size
        blocks = iter(self.pool.take(len(requests) * len(self.windows)))
        if len(self.windows) == 1:
            for request, block in zip(requests, blocks, strict=True):
                request.block_tables[0].append(block)
                request.num_slots += block_size
            return
        for request in requests:
            for table in request.block_tables:
                table.append(next(blocks))
            request.num_slots += block_size

    def _release_behind_windows(self, request: Request) -> None:
        # Steps in flight still read from the position before their own tokens.
        settled = request.num_computed_tokens - request.num_in_flight_tokens
        for group, window in self._sliding_groups:
            start = request.num_window_pages_released[group]
            stop = min(self._pages_behind_window(settled, window), len(request.block_tables[group]))
            if stop > start:
                table = request.block_tables[group]
                self.pool.release(table[start:stop])
                table[start:stop] = [NULL_BLOCK] * (stop - start)
                request.num_window_pages_released[group] = stop

    def commit(self, request: Request, num_committed_tokens: int) -> bool:
        """Offer the full blocks of committed tokens to the prefix cache. Draft tokens are never committed.

        Returns:
            True if a new hash was offered.
        """
        stop = min(num_committed_tokens // self.block_size, len(request.block_hashes))
        start = request.num_hashed_blocks
        if stop <= start:
            return False
        hashes = request.block_hashes[start:stop]
        for group, table in enumerate(request.block_tables):
            self.pool.register(group, table[start:stop], hashes)
        request.num_hashed_blocks = stop
        return True

    def free(self, request: Request) -> None:
        """Give back every page of a request."""
        for table in request.block_tables:
            self.pool.release(table)
        request.block_tables = []
        request.num_slots = 0
        request.num_hashed_blocks = 0
        request.num_window_pages_released = []
