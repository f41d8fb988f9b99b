"""The pool of KV blocks and the index of the prefix cache.

A block is in exactly one of four states::

    blank     nobody holds it, its content is of no use       -> `_blank`, a stack
    private   one request holds it, no hash                   -> only in that request's table
    shared    n >= 1 requests hold it, found by its hash      -> `_references[block] = n`
    retained  nobody holds it, still found by its hash        -> `_retained`, oldest first

    blank --take--> private --register--> shared <--hold/release--> retained --take (evict)--> private
      ^------release------'

`blank + retained` are the free blocks. Blank ones are handed out first, then the retained ones, least recently used
first. Private blocks need no bookkeeping at all, so taking and releasing them are slices.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

# Stands in block tables where a sliding window has moved past a page. Never handed out; its memory is a scratch page.
NULL_BLOCK = 0


class BlockPool:
    """Blocks 1 .. num_blocks - 1, and a hash index for each KV group."""

    def __init__(self, num_blocks: int, num_groups: int = 1) -> None:
        """
        Args:
            num_blocks: blocks in the KV tensor, of which block 0 is the null block.
            num_groups: KV groups; a hash is looked up within one group.

        Raises:
            ValueError: for fewer than 2 blocks.
        """
        if num_blocks < 2:
            raise ValueError(f"a block pool needs at least 2 blocks (one is the null block), not {num_blocks}")
        self.num_blocks = num_blocks
        # The low-water mark of num_free.
        self.fewest_free = num_blocks - 1
        self._blank = list(range(num_blocks - 1, 0, -1))
        self._retained: OrderedDict[int, None] = OrderedDict()
        self._references: dict[int, int] = {}
        self._index: list[dict[Hashable, int]] = [{} for _ in range(num_groups)]
        self._hash_of: dict[int, tuple[int, Hashable]] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be taken."""
        return len(self._blank) + len(self._retained)

    @property
    def num_used(self) -> int:
        """Blocks that requests hold."""
        return self.num_blocks - 1 - self.num_free

    @property
    def peak_used(self) -> int:
        """The most blocks that requests have held at once."""
        return self.num_blocks - 1 - self.fewest_free

    def take(self, count: int) -> list[int]:
        """Take `count` blank or evicted blocks. Taking n at once gives the blocks that n single takes would.

        Raises:
            ValueError: if fewer are free; nothing is taken then.
        """
        blank = self._blank
        free = len(blank) + len(self._retained) - count
        if free < 0:
            raise ValueError(f"cannot take {count} blocks: {self.num_free} are free")
        if free < self.fewest_free:
            self.fewest_free = free
        if count <= len(blank):
            if count == 1:
                return [blank.pop()]
            taken = blank[: -count - 1 : -1]
            if count:
                del blank[-count:]
            return taken
        taken = blank[::-1]
        blank.clear()
        for _ in range(count - len(taken)):
            block, _ = self._retained.popitem(last=False)
            group, block_hash = self._hash_of.pop(block)
            del self._index[group][block_hash]
            del self._references[block]
            taken.append(block)
        return taken

    def release(self, table: Sequence[int]) -> None:
        """Give back a request's blocks, last first, so that the tail of a sequence is evicted before its head."""
        if table and table[0] == NULL_BLOCK:
            # A window moves from the front, so null blocks are always a prefix of the table.
            table = [block for block in table if block != NULL_BLOCK]
        references = self._references
        if not references:
            self._blank.extend(table[::-1])
            return
        blank, retained = self._blank, self._retained
        for block in reversed(table):
            count = references.get(block)
            if count is None:
                blank.append(block)
            else:
                references[block] = count - 1
                if count == 1:
                    retained[block] = None

    def longest_prefix(self, group: int, hashes: Sequence[Hashable]) -> list[int]:
        """The blocks of the longest leading run of hashes that the group has cached. Holds nothing."""
        index = self._index[group]
        found = []
        for block_hash in hashes:
            block = index.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def find(self, group: int, block_hash: Hashable) -> int | None:
        """The block cached under a hash, if any. Holds nothing."""
        return self._index[group].get(block_hash)

    def num_retained(self, blocks: Sequence[int]) -> int:
        """How many of these cached blocks are free now, and would stop being so if they were held."""
        retained = self._retained
        return sum(block in retained for block in blocks)

    def hold(self, blocks: Sequence[int]) -> None:
        """Add one reference to each of these cached blocks (null blocks are passed over)."""
        references, retained = self._references, self._retained
        for block in blocks:
            if block != NULL_BLOCK:
                count = references[block]
                references[block] = count + 1
                if count == 0:
                    del retained[block]
        self.fewest_free = min(self.fewest_free, self.num_free)

    def register(self, group: int, block: int, block_hash: Hashable) -> None:
        """Make a private block findable. If the hash is taken by another block, this one stays private."""
        index = self._index[group]
        if block_hash not in index and block not in self._references:
            index[block_hash] = block
            self._references[block] = 1
            self._hash_of[block] = (group, block_hash)

    def reset(self) -> bool:
        """Forget the whole prefix cache. Refused (False) while any request holds a block."""
        if self.num_used:
            return False
        self.__init__(self.num_blocks, len(self._index))
        return True

    def check(self, tables: Sequence[Sequence[int]]) -> None:
        """Assert the pool's invariants against the tables of every live request.

        Raises:
            AssertionError: naming the block that is in two states, or in none.
        """
        held: dict[int, int] = {}
        for table in tables:
            for block in table:
                if block != NULL_BLOCK:
                    held[block] = held.get(block, 0) + 1
        blank = set(self._blank)
        assert len(blank) == len(self._blank), "a block is blank twice"
        assert not blank & self._retained.keys(), "a block is both blank and retained"
        for block in range(1, self.num_blocks):
            free = block in blank or block in self._retained
            assert free != (block in held), f"block {block} is {'free and held' if free else 'lost'}"
            if block in self._references:
                assert self._references[block] == held.get(block, 0), f"block {block}: wrong reference count"
                group, block_hash = self._hash_of[block]
                assert self._index[group][block_hash] == block, f"block {block} is not under its own hash"
            else:
                assert held.get(block, 0) <= 1, f"private block {block} is held twice"
        assert len(self._hash_of) == len(self._references) == sum(map(len, self._index)), "stale hash index"
