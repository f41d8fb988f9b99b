"""Block tables by hand: prefix hits over groups, windows that move on, and what a request may need at most."""

import pytest

from engine.scheduling import NULL_BLOCK, KVCacheConfig, KVCacheManager, Request

NULL = NULL_BLOCK


def manager(num_blocks=32, block_size=4, windows=(None,)) -> KVCacheManager:
    return KVCacheManager(KVCacheConfig(num_blocks, block_size, windows, enable_prefix_caching=True))


def start(kv: KVCacheManager, request: Request) -> int:
    """Adopt what is cached of a prompt, as at its admission. Returns the cached tokens."""
    cached, tables = kv.find_prefix(request)
    kv.adopt_prefix(request, cached, tables)
    return cached


def compute(kv: KVCacheManager, request: Request, num_tokens: int) -> bool:
    """Compute (and commit) a request's tokens up to `num_tokens`, in one step."""
    if not kv.allocate(request, num_tokens):
        return False
    request.num_computed_tokens = num_tokens
    kv.commit(request, num_tokens)
    return True


def cache(kv: KVCacheManager, hashes: str, chunk: int | None = None) -> Request:
    """Run a prompt of len(hashes) full blocks, `chunk` tokens a step, and give its pages back."""
    size = len(hashes) * kv.block_size
    request = Request(hashes, size, 1, tuple(hashes))
    start(kv, request)
    for end in [*range(chunk or size, size, chunk or size), size]:
        assert compute(kv, request, end)
    kv.free(request)
    return request


def cached_in_each_group(kv: KVCacheManager, hashes: str) -> list[list[int | None]]:
    return [[kv.pool.find(group, block_hash) for block_hash in hashes] for group in range(len(kv.windows))]


# ---- the configuration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"windows": ()}, "at least one KV group"),
        ({"windows": (None, 0)}, "sliding window must be at least 1"),
    ],
)
def test_config_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        KVCacheConfig(8, **settings)


@pytest.mark.parametrize(
    ("windows", "num_tokens", "step", "pages"),
    [
        ((None,), 16, 8, 4),
        ((None,), 17, 8, 5),
        ((None, None), 17, 8, 10),
        # Window 5 and a step of 8: 4 earlier tokens and 8 new ones are 3 pages, 4 where they straddle a boundary.
        ((5,), 100, 8, 4),
        # A prompt of 8 has only 2 pages.
        ((5,), 8, 8, 2),
        ((None, 5), 100, 8, 25 + 4),
    ],
)
def test_max_pages(windows, num_tokens, step, pages):
    assert KVCacheConfig(8, 4, windows).max_pages(num_tokens, step) == pages


@pytest.mark.parametrize("block_size", [1, 3, 4])
@pytest.mark.parametrize("window", [1, 2, 5, 9])
@pytest.mark.parametrize("step", [1, 4, 7])
def test_max_pages_is_never_exceeded(block_size, window, step):
    kv = manager(200, block_size, (None, window))
    request = Request("a", 40, 1)
    start(kv, request)
    most = 0
    for end in [*range(step, 40, step), 40]:
        compute(kv, request, end)
        most = max(most, kv.pool.num_used)
    assert most <= kv.config.max_pages(40, step)


# ---- pages ---------------------------------------------------------------------------------------------------------


def test_pages_are_taken_as_tokens_need_them():
    kv = manager()
    request = Request("a", 9, 8)
    assert start(kv, request) == 0
    assert compute(kv, request, 5)
    assert request.block_tables == [[1, 2]]
    assert request.num_slots == 8
    assert compute(kv, request, 8)
    assert request.block_tables == [[1, 2]], "the second page was not full"
    assert compute(kv, request, 9)
    assert request.block_tables == [[1, 2, 3]]
    kv.free(request)
    assert request.block_tables == []
    assert (request.num_slots, kv.pool.num_used) == (0, 0)


def test_too_few_blocks_take_nothing():
    kv = manager(num_blocks=4)
    request = Request("a", 12, 8)
    start(kv, request)
    assert compute(kv, request, 8)
    assert kv.allocate(request, 17) is False  # 3 more pages, 1 is free
    assert request.block_tables == [[1, 2]]
    assert kv.pool.num_free == 1
    assert kv.allocate(request, 12) is True


def test_every_group_needs_a_page_of_its_own():
    kv = manager(num_blocks=8, windows=(None, None, None))  # 7 blocks make 2 pages for 3 groups
    request = Request("a", 12, 8)
    start(kv, request)
    assert compute(kv, request, 8)
    assert request.block_tables == [[1, 2], [3, 4], [5, 6]]
    assert kv.allocate(request, 9) is False
    assert kv.pool.num_free == 1


# ---- sliding windows -----------------------------------------------------------------------------------------------


def test_pages_behind_the_window_go_back_to_the_pool():
    # Window 5: the query at position p reads keys p - 4 .. p.
    kv = manager(num_blocks=32, windows=(None, 5))
    request = Request("a", 64, 1)
    start(kv, request)
    compute(kv, request, 8)
    assert request.block_tables == [[1, 2], [3, 4]]
    # The query at 8 reads from 4 on: page 0 is behind.
    compute(kv, request, 9)
    assert request.block_tables == [[1, 2, 3], [NULL, 4, 5]], "block 3 came back, and was the next to be taken"
    assert kv.pool.num_used == 3 + 2
    # Positions 9 .. 11 ask for no page, so nothing changes, though page 1 is behind the query at 12.
    compute(kv, request, 12)
    assert kv.pool.num_used == 3 + 2
    compute(kv, request, 13)  # reads from 8 on
    assert [block == NULL for block in request.block_tables[1]] == [True, True, False, False]
    assert NULL not in request.block_tables[0]
    assert kv.pool.num_used == 4 + 2
    kv.pool.check(request.block_tables)
    kv.free(request)
    assert kv.pool.num_used == 0


def test_a_page_that_the_window_still_touches_is_kept():
    # After 7 tokens, the query at 7 reads 3 .. 7 with window 5 (page 0 is needed) and 4 .. 7 with window 4.
    for window, keeps_page_0 in ((5, True), (4, False)):
        kv = manager(windows=(window,))
        request = Request("a", 64, 1)
        start(kv, request)
        compute(kv, request, 7)
        compute(kv, request, 9)
        assert (request.block_tables[0][0] != NULL) is keeps_page_0


def test_steps_in_flight_keep_what_they_read():
    # 8 tokens are settled, 4 more in flight: their first query, at 8, reads from 4 on. So page 0 may go, page 1 not.
    kv = manager(windows=(5,))
    request = Request("a", 64, 1)
    start(kv, request)
    compute(kv, request, 12)
    request.num_in_flight_tokens = 4
    kv.allocate(request, 13)
    assert [block == NULL for block in request.block_tables[0]] == [True, False, False, False]


def test_released_window_pages_serve_other_requests():
    kv = manager(num_blocks=5, windows=(5,))  # 4 blocks
    request = Request("a", 400, 1)
    start(kv, request)
    for tokens in range(1, 101):
        assert compute(kv, request, tokens), "a decode within a window needs 3 pages at most"
        assert kv.pool.num_used <= 3
    assert len(request.block_tables[0]) == 25
    assert request.block_tables[0].count(NULL) == 23


# ---- prefix hits, full attention -----------------------------------------------------------------------------------


def test_same_prefix_hits():
    kv = manager()
    cache(kv, "abc")
    assert start(kv, Request("r", 14, 1, tuple("abc"))) == 12


def test_other_prefix_never_hits():
    kv = manager()
    cache(kv, "abc")
    # Hashes are chained: after a different first block, all later ones differ too.
    assert start(kv, Request("r", 14, 1, ("x", "xb", "xbc"))) == 0
    assert start(kv, Request("s", 14, 1, ("a", "ax", "axc"))) == 4


def test_only_full_blocks_are_cached():
    kv = manager()
    request = Request("a", 11, 1, ("a", "b"))
    start(kv, request)
    compute(kv, request, 7)
    assert cached_in_each_group(kv, "ab") == [[1, None]]
    compute(kv, request, 8)
    assert cached_in_each_group(kv, "ab") == [[1, 2]]


def test_commit_says_whether_there_was_news():
    kv = manager()
    request = Request("a", 12, 1, ("a", "b"))
    start(kv, request)
    kv.allocate(request, 12)
    assert kv.commit(request, 3) is False
    assert kv.commit(request, 4) is True
    assert kv.commit(request, 7) is False
    assert kv.commit(request, 12) is True
    assert kv.commit(request, 12) is False, "the third block has no hash"
    assert request.num_hashed_blocks == 2


@pytest.mark.parametrize(
    ("num_tokens", "cached"),
    [
        (13, 12),
        (12, 8),  # all 3 blocks are cached, but the last token's logits are needed: its block is computed again
        (9, 8),
        (8, 4),
        (4, 0),
        (1, 0),
    ],
)
def test_a_full_hit_leaves_the_last_token(num_tokens, cached):
    kv = manager()
    cache(kv, "abc")
    request = Request("r", num_tokens, 1, tuple("abc")[: num_tokens // 4])
    assert start(kv, request) == request.num_computed_tokens == cached
    assert request.num_slots == cached
    assert len(request.block_tables[0]) == cached // 4


def test_looking_holds_nothing():
    kv = manager()
    cache(kv, "abc")
    request = Request("r", 14, 1, tuple("abc"))
    assert kv.find_prefix(request) == (12, [[1, 2, 3]])
    assert kv.pool.num_used == 0
    kv.pool.check([])


def test_a_shared_prefix_is_held_by_both():
    kv = manager()
    cache(kv, "abc")
    one, two = (Request(name, 14, 1, tuple("abc")) for name in "12")
    for request in (one, two):
        start(kv, request)
        compute(kv, request, 14)
    assert one.block_tables[0][:3] == two.block_tables[0][:3] == [1, 2, 3]
    assert one.block_tables[0][3] != two.block_tables[0][3]
    assert kv.pool.num_used == 3 + 1 + 1
    kv.free(one)
    assert kv.pool.num_used == 3 + 1
    kv.pool.check(two.block_tables)


def test_cached_pages_are_not_evicted_by_those_who_hit_them():
    # 4 blocks, all cached by "abcd". A prompt of 4 blocks that shares "ab" holds these and evicts "d", then "c".
    kv = manager(num_blocks=5)
    cache(kv, "abcd")
    request = Request("r", 16, 1, ("a", "b", "bx", "bxy"))
    assert start(kv, request) == 8
    assert compute(kv, request, 16)
    assert request.block_tables == [[1, 2, 4, 3]]
    assert cached_in_each_group(kv, "abcd") == [[1, 2, None, None]]


# ---- prefix hits, sliding windows ----------------------------------------------------------------------------------


def test_a_sliding_group_needs_only_its_window():
    # 8 blocks of 4 computed in one step: both groups cached all of them. Window 5, so for a hit of 32 tokens the query
    # at 32 reads from 28 on: the last page alone.
    kv = manager(num_blocks=40, windows=(None, 5))
    cache(kv, "abcdefgh")
    request = Request("r", 40, 1, tuple("abcdefgh"))
    cached, (full, sliding) = kv.find_prefix(request)
    assert cached == 32
    assert NULL not in full
    assert sliding == [NULL] * 7 + [kv.pool.find(1, "h")]


@pytest.mark.parametrize(("window", "pages"), [(1, 0), (2, 1), (5, 1), (6, 2), (9, 2), (10, 3), (13, 3), (14, 4)])
def test_pages_that_a_window_needs(window, pages):
    # The query at 16 reads from 17 - window on, and its own page is new: ceil((window - 1) / 4) cached ones.
    kv = manager(num_blocks=40, windows=(window,))
    cache(kv, "abcd")
    cached, (table,) = kv.find_prefix(Request("r", 40, 1, tuple("abcd")))
    assert cached == 16
    assert [block == NULL for block in table] == [True] * (4 - pages) + [False] * pages


def test_a_hit_survives_the_loss_of_pages_behind_the_window():
    kv = manager(num_blocks=40, windows=(None, 5))
    cache(kv, "abcd")
    _evict(kv, 1, "abc")
    request = Request("r", 40, 1, tuple("abcd"))
    assert start(kv, request) == 16
    assert request.block_tables[1][:3] == [NULL] * 3
    assert request.num_window_pages_released == [0, 3]


def test_a_hole_in_the_window_shortens_the_hit():
    # Without the sliding group's "d", the query at 16 misses position 12. "c" serves the query at 12, from 8 on.
    kv = manager(num_blocks=40, windows=(None, 5))
    cache(kv, "abcd")
    _evict(kv, 1, "d")
    cached, tables = kv.find_prefix(Request("r", 40, 1, tuple("abcd")))
    assert cached == 12
    assert tables == [kv.pool.longest_prefix(0, "abc"), [NULL, NULL, kv.pool.find(1, "c")]]


def test_every_sliding_group_must_agree():
    # Window 5 wants the last page, window 9 the last two. One hole each: group 1 has no "d", group 2 no "b".
    #   4 pages: group 1 misses d             -> try 3
    #   3 pages: group 1 has c; group 2 wants b and c, misses b -> try 1
    #   1 page:  both have a
    kv = manager(num_blocks=60, windows=(None, 5, 9))
    cache(kv, "abcd")
    _evict(kv, 1, "d")
    _evict(kv, 2, "b")
    cached, tables = kv.find_prefix(Request("r", 40, 1, tuple("abcd")))
    assert cached == 4
    assert tables == [[kv.pool.find(group, "a")] for group in range(3)]


def test_the_full_group_limits_the_sliding_ones():
    kv = manager(num_blocks=40, windows=(None, 5))
    cache(kv, "abcd")
    _evict(kv, 0, "cd")
    cached, tables = kv.find_prefix(Request("r", 40, 1, tuple("abcd")))
    assert cached == 8
    assert tables[1] == [NULL, kv.pool.find(1, "b")]


def test_a_window_of_one_needs_no_page():
    kv = manager(num_blocks=40, windows=(None, 1))
    cache(kv, "ab")
    _evict(kv, 1, "ab")
    request = Request("r", 40, 1, tuple("ab"))
    assert start(kv, request) == 8
    assert request.block_tables[1] == [NULL, NULL]
    assert compute(kv, request, 9)
    assert request.block_tables[1][:2] == [NULL, NULL]


def test_pages_that_slid_out_stay_cached():
    # Decoding on from "ab" to 20 tokens gives back the sliding pages of "a" to "c", which others can still find.
    kv = manager(num_blocks=40, windows=(None, 5))
    request = Request("a", 64, 1, tuple("abcde"))
    start(kv, request)
    for tokens in range(4, 21, 4):
        compute(kv, request, tokens)
    assert [block == NULL for block in request.block_tables[1]] == [True, True, True, False, False]
    assert kv.find_prefix(Request("r", 9, 1, tuple("ab")))[0] == 8


def _evict(kv: KVCacheManager, group: int, hashes: str) -> None:
    """Evict chosen blocks: hold all other retained ones, take everything, give all back."""
    pool = kv.pool
    victims = [pool.find(group, block_hash) for block_hash in hashes]
    others = [block for block in pool._retained if block not in victims]
    pool.hold(others)
    pool.release(pool.take(pool.num_free))
    for block in others:
        pool.release([block])
    assert all(pool.find(group, block_hash) is None for block_hash in hashes)
    pool.check([])


# ---- admission -----------------------------------------------------------------------------------------------------


def fits(kv: KVCacheManager, request: Request, step: int = 64) -> bool:
    return kv.can_hold_whole(request, kv.find_prefix(request)[1], step)


def test_the_whole_prompt_must_fit():
    kv = manager(num_blocks=5)  # 16 tokens
    assert fits(kv, Request("a", 16, 1))
    assert not fits(kv, Request("b", 17, 1))


def test_cached_pages_that_others_hold_are_not_needed_again():
    kv = manager(num_blocks=6)  # 5 blocks
    holder = Request("a", 12, 1, tuple("abc"))
    start(kv, holder)
    compute(kv, holder, 12)
    # 2 blocks are free; of a prompt of 5 pages, 3 are the holder's.
    assert fits(kv, Request("b", 20, 1, tuple("abc")))
    assert not fits(kv, Request("c", 21, 1, tuple("abc")))
    assert not fits(kv, Request("d", 20, 1, tuple("xyz")))


def test_retained_pages_are_not_counted_twice():
    # vLLM's prefill_not_enough_free_blocks_with_computed_blocks: cached pages are among the free ones.
    kv = manager(num_blocks=6)  # 5 blocks, all free, 3 of them cached
    cache(kv, "abc")
    assert fits(kv, Request("b", 20, 1, tuple("abc")))
    # 6 pages, 3 cached: 3 more are wanted, but only 2 are free beside the cached ones.
    assert not fits(kv, Request("c", 24, 1, tuple("abc")))


def test_a_sliding_group_needs_only_its_window_and_a_step():
    # 100 tokens in steps of 8 with window 5: 4 pages at most.
    kv = manager(num_blocks=5, windows=(5,))
    assert fits(kv, Request("a", 100, 1), step=8)
    assert not fits(kv, Request("a", 100, 1), step=9)
