"""The pool of KV blocks and the index of the prefix cache.

A block is in exactly one of four states::

    blank     nobody holds it, its content is of no use       -> `_blank`, a stack
    private   one request holds it, no hash                   -> only in that request's table
    shared    n >= 1 requests hold it, found by its hash      -> `_references[block]` = n
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

_NOT_HASHED = -1


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
        # Blocks that can be taken, blank and retained, and the fewest that there have been.
        self.num_free = num_blocks - 1
        self.fewest_free = num_blocks - 1
        self._blank = list(range(num_blocks - 1, 0, -1))
        self._retained: OrderedDict[int, None] = OrderedDict()
        # By block: how many requests hold a hashed block, _NOT_HASHED for all others; its hash; the group of the hash.
        self._references = [_NOT_HASHED] * num_blocks
        self._hash_of: list[Hashable] = [None] * num_blocks
        self._group_of = [0] * num_blocks
        self._index: list[dict[Hashable, int]] = [{} for _ in range(num_groups)]

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
        free = self.num_free - count
        if free < 0:
            raise ValueError(f"cannot take {count} blocks: {self.num_free} are free")
        self.num_free = free
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
        self._evict(count - len(taken), taken)
        return taken

    def _evict(self, count: int, taken: list[int]) -> None:
        """Move the `count` least recently used retained blocks to `taken`, their hashes forgotten."""
        index, hash_of, group_of, references = self._index, self._hash_of, self._group_of, self._references
        pop_oldest = self._retained.popitem
        for _ in range(count):
            block, _ = pop_oldest(last=False)
            del index[group_of[block]][hash_of[block]]
            hash_of[block] = None
            references[block] = _NOT_HASHED
            taken.append(block)

    def release(self, table: Sequence[int]) -> None:
        """Give back a request's blocks, last first, so that the tail of a sequence is evicted before its head."""
        if table and table[0] == NULL_BLOCK:
            # A window moves from the front, so null blocks are always a prefix of the table.
            table = [block for block in table if block != NULL_BLOCK]
        if not any(self._index):
            self._blank.extend(table[::-1])
            self.num_free += len(table)
            return
        references, blank, retained = self._references, self._blank, self._retained
        for block in reversed(table):
            count = references[block]
            if count == _NOT_HASHED:
                blank.append(block)
            else:
                references[block] = count - 1
                if count == 1:
                    retained[block] = None
        self.num_free = len(blank) + len(retained)

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
                    self.num_free -= 1
        self.fewest_free = min(self.fewest_free, self.num_free)

    def register(self, group: int, blocks: Sequence[int], hashes: Sequence[Hashable]) -> None:
        """Make a request's private blocks findable by one hash each.

        A block whose hash is taken by another block stays private; null blocks are passed over.
        """
        index, references, hash_of = self._index[group], self._references, self._hash_of
        for block, block_hash in zip(blocks, hashes, strict=True):
            if block_hash not in index and references[block] == _NOT_HASHED and block != NULL_BLOCK:
                index[block_hash] = block
                references[block] = 1
                hash_of[block] = block_hash
                self._group_of[block] = group

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
        assert self.num_free == len(self._blank) + len(self._retained), "num_free is off"
        assert len(blank) == len(self._blank), "a block is blank twice"
        assert NULL_BLOCK not in blank, "the null block is blank"
        assert not blank & self._retained.keys(), "a block is both blank and retained"
        for block in range(1, self.num_blocks):
            free = block in blank or block in self._retained
            assert free != (block in held), f"block {block} is {'free and held' if free else 'lost'}"
            if self._references[block] != _NOT_HASHED:
                assert self._references[block] == held.get(block, 0), f"block {block}: wrong reference count"
                found = self._index[self._group_of[block]].get(self._hash_of[block])
                assert found == block, f"block {block} is not under its own hash"
            else:
                assert held.get(block, 0) <= 1, f"private block {block} is held twice"
                assert block not in self._retained, f"block {block} is retained without a hash"
        hashed = self.num_blocks - self._references.count(_NOT_HASHED)
        assert hashed == sum(map(len, self._index)), "stale hash index"
