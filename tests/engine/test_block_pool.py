"""The block pool by hand: which block comes next, which is evicted, who still finds what.

A pool of n blocks starts with 1, 2, … n - 1 blank, and hands them out in that order.
"""

import pytest

from engine.scheduling import NULL_BLOCK, BlockPool


def cached(pool: BlockPool, *hashes: str, group: int = 0) -> list[int]:
    """Take one block per hash and register it, as a request does that computes a whole prompt."""
    table = pool.take(len(hashes))
    for block, block_hash in zip(table, hashes, strict=True):
        pool.register(group, [block], [block_hash])
    return table


def test_needs_a_null_block_and_another():
    with pytest.raises(ValueError, match="at least 2 blocks"):
        BlockPool(1)
    assert BlockPool(2).take(1) == [1]


def test_null_block_is_never_handed_out():
    pool = BlockPool(5)
    assert (pool.num_free, pool.num_used) == (4, 0)
    table = pool.take(4)
    assert table == [1, 2, 3, 4]
    assert NULL_BLOCK not in table
    assert (pool.num_free, pool.num_used) == (0, 4)


def test_taking_too_many_takes_nothing():
    pool = BlockPool(5)
    first = cached(pool, "a", "b")
    pool.release(first)
    # 2 blank and 2 retained: 5 are too many, and "a" and "b" must survive the attempt.
    with pytest.raises(ValueError, match="cannot take 5 blocks: 4 are free"):
        pool.take(5)
    assert pool.num_free == 4
    assert pool.longest_prefix(0, ["a", "b"]) == first
    pool.check([])


def test_taking_none():
    pool = BlockPool(3)
    assert pool.take(0) == []
    pool.take(2)
    assert pool.take(0) == []


@pytest.mark.parametrize("count", range(7))
def test_taking_at_once_is_taking_one_by_one(count):
    def prepared() -> BlockPool:
        pool = BlockPool(7)
        private, shared = pool.take(2), cached(pool, "a", "b", "c")  # 1 2 and 3 4 5; 6 is blank
        pool.release(shared)  # retained, oldest first: 5 4 3
        pool.release(private)  # blank, next first: 1 2 6
        return pool

    at_once, one_by_one = prepared(), prepared()
    assert at_once.take(count) == [one_by_one.take(1)[0] for _ in range(count)] == [1, 2, 6, 5, 4, 3][:count]
    for block_hash in "abc":
        assert at_once.find(0, block_hash) == one_by_one.find(0, block_hash)


def test_released_private_blocks_are_blank_again():
    pool = BlockPool(5)
    table = pool.take(3)
    pool.release(table)
    assert pool.num_free == 4
    assert pool.take(4) == [1, 2, 3, 4]


def test_release_passes_over_null_blocks():
    for with_a_cached_block in (False, True):  # the pool has a shorter path while nothing is cached
        pool = BlockPool(6)
        if with_a_cached_block:
            cached(pool, "x")
        free = pool.num_free
        table = pool.take(2)
        pool.release([NULL_BLOCK, table[0], NULL_BLOCK, table[1]])
        assert pool.num_free == free
        assert NULL_BLOCK not in pool.take(free)


# ---- the prefix cache ----------------------------------------------------------------------------------------------


def test_registered_blocks_are_found_while_held_and_after():
    pool = BlockPool(5)
    table = cached(pool, "a", "b")
    assert pool.find(0, "a") == table[0]
    assert pool.longest_prefix(0, ["a", "b", "c"]) == table
    assert pool.num_retained(table) == 0
    pool.release(table)
    assert pool.longest_prefix(0, ["a", "b", "c"]) == table
    assert pool.num_retained(table) == 2
    assert pool.num_free == 4


def test_prefix_ends_at_the_first_miss():
    pool = BlockPool(6)
    a, _, c = cached(pool, "a", "b", "c")
    assert pool.longest_prefix(0, ["a", "x", "c"]) == [a]
    assert pool.longest_prefix(0, ["x", "a"]) == []
    assert pool.longest_prefix(0, ["c"]) == [c]
    assert pool.longest_prefix(0, []) == []


def test_groups_do_not_find_each_others_blocks():
    pool = BlockPool(6, num_groups=2)
    (block,) = cached(pool, "a", group=1)
    assert pool.find(0, "a") is None
    assert pool.find(1, "a") == block
    (other,) = cached(pool, "a", group=0)
    assert (pool.find(0, "a"), pool.find(1, "a")) == (other, block)
    pool.check([[block], [other]])


def test_held_blocks_are_counted():
    pool = BlockPool(4)
    table = cached(pool, "a", "b")
    pool.hold(table)
    pool.release(table)
    assert pool.num_used == 2, "the other holder still has them"
    pool.check([table])
    pool.release(table)
    assert pool.num_used == 0
    pool.hold([NULL_BLOCK, table[1]])
    assert pool.num_used == 1
    assert pool.num_retained(table) == 1
    pool.check([table[1:]])


def test_the_tail_is_evicted_before_the_head():
    pool = BlockPool(4)
    pool.release(cached(pool, "a", "b", "c"))  # blocks 1 2 3
    assert pool.take(1) == [3]
    assert pool.longest_prefix(0, ["a", "b", "c"]) == [1, 2]
    assert pool.take(1) == [2]
    assert pool.longest_prefix(0, ["a", "b", "c"]) == [1]


def test_the_least_recently_used_is_evicted_first():
    pool = BlockPool(5)
    old, new = cached(pool, "a", "b"), cached(pool, "x", "y")  # 1 2 and 3 4
    pool.release(old)
    pool.release(new)
    # A hit on the old prefix makes it the newer one.
    pool.hold(old)
    pool.release(old)
    assert pool.take(4) == [4, 3, 2, 1]
    assert all(pool.find(0, block_hash) is None for block_hash in "abxy")


def test_blocks_in_use_again_are_not_evicted():
    pool = BlockPool(5)
    table = cached(pool, "a", "b")  # 1 2
    pool.release(table)
    pool.hold(table[:1])
    assert pool.take(3) == [3, 4, 2]  # 3 and 4 are blank, 2 is evicted, 1 is held
    assert (pool.find(0, "a"), pool.find(0, "b")) == (1, None)
    assert pool.num_free == 0


def test_blank_blocks_go_before_cached_ones():
    pool = BlockPool(5)
    pool.release(cached(pool, "a", "b"))
    assert pool.take(2) == [3, 4]
    assert pool.longest_prefix(0, ["a", "b"]) == [1, 2]


def test_an_evicted_block_is_private():
    pool = BlockPool(2)
    pool.release(cached(pool, "a"))
    assert pool.take(1) == [1]
    pool.register(0, [1], ["b"])
    assert (pool.find(0, "a"), pool.find(0, "b")) == (None, 1)
    pool.check([[1]])


def test_a_second_block_with_a_taken_hash_stays_private():
    pool = BlockPool(4)
    (first,) = cached(pool, "a")
    (second,) = cached(pool, "a")
    assert pool.find(0, "a") == first
    pool.release([second])  # blank, not retained: nobody could find it
    assert pool.num_retained([second]) == 0
    pool.release([first])
    assert pool.find(0, "a") == first
    pool.check([])


def test_a_block_keeps_its_first_hash():
    pool = BlockPool(3)
    (block,) = cached(pool, "a")
    pool.register(0, [block], ["b"])
    assert (pool.find(0, "a"), pool.find(0, "b")) == (block, None)
    pool.check([[block]])


def test_null_blocks_are_not_registered():
    pool = BlockPool(3)
    table = [NULL_BLOCK, *pool.take(1)]
    pool.register(0, table, ["a", "b"])
    assert (pool.find(0, "a"), pool.find(0, "b")) == (None, 1)
    pool.check([table])


def test_peak_use():
    pool = BlockPool(9)
    table = cached(pool, "a", "b", "c")
    assert pool.peak_used == 3
    pool.release(table)
    pool.take(2)
    assert pool.peak_used == 3
    pool.hold(table[:2])  # held again without being taken: 2 and 2
    assert (pool.num_used, pool.peak_used) == (4, 4)


def test_reset_forgets_only_what_nobody_holds():
    pool = BlockPool(4, num_groups=2)
    table = cached(pool, "a", "b", group=1)
    assert pool.reset() is False
    assert pool.find(1, "a") == table[0]
    pool.release(table)
    assert pool.reset() is True
    assert (pool.find(0, "a"), pool.find(1, "a")) == (None, None)
    assert pool.take(3) == [1, 2, 3]


# ---- the check must be able to fail --------------------------------------------------------------------------------


def test_check_finds_a_lost_block():
    pool = BlockPool(3)
    pool.take(1)
    with pytest.raises(AssertionError, match="block 1 is lost"):
        pool.check([])


def test_check_finds_a_block_that_is_free_and_held():
    pool = BlockPool(3)
    table = pool.take(1)
    pool.release(table)
    with pytest.raises(AssertionError, match="block 1 is free and held"):
        pool.check([table])


def test_check_finds_a_double_release():
    pool = BlockPool(3)
    table = pool.take(1)
    pool.release(table)
    pool.release(table)
    with pytest.raises(AssertionError, match="blank twice"):
        pool.check([])


def test_check_finds_a_private_block_in_two_tables():
    pool = BlockPool(3)
    table = pool.take(1)
    with pytest.raises(AssertionError, match="private block 1 is held twice"):
        pool.check([table, table])


def test_check_finds_a_wrong_reference_count():
    pool = BlockPool(3)
    table = cached(pool, "a")
    with pytest.raises(AssertionError, match="wrong reference count"):
        pool.check([table, table])
