"""The scheduler by hand: what each step holds, worked out in the comments.

Shapes are written as the step-time models see them: prefills and verifies as (query, context), decodes as context.
"""

import pytest

from engine.scheduling import KVCacheConfig, Request, RequestStatus, Scheduler, SchedulerConfig, Step, StepShape


def make(
    num_blocks=101, block_size=4, windows=(None,), caching=False, budget=64, seqs=8, max_model_len=128, **config
) -> Scheduler:
    cache = KVCacheConfig(num_blocks, block_size, windows, caching)
    return Scheduler(SchedulerConfig(budget, seqs, max_model_len, **config), cache)


def add(scheduler: Scheduler, name: str, prompt: int, output: int = 10, hashes=()) -> Request:
    request = Request(name, prompt, output, hashes)
    scheduler.add(request)
    return request


def shape(step: Step) -> tuple[list, list, list]:
    return step.shape.prefills, step.shape.decode_contexts, step.shape.verifies


def run_step(scheduler: Scheduler, num_sampled=(), stopped=()) -> Step:
    """Schedule one step and update it, checking the invariants."""
    step = scheduler.schedule()
    scheduler.check()
    if not step.is_empty:
        scheduler.update(step, num_sampled, stopped)
        scheduler.check()
    return step


def finish(scheduler: Scheduler, limit: int = 1000) -> list[Step]:
    """Run to the end, one token per verification."""
    steps = []
    while scheduler.num_outstanding:
        assert len(steps) < limit, "livelock"
        step = scheduler.schedule()
        scheduler.check()
        assert not step.is_empty, "nothing can run, with nothing in flight"
        scheduler.update(step, [1] * len(step.verify_requests))
        steps.append(step)
    assert scheduler.kv.pool.num_used == 0, "pages left behind"
    return steps


def names(requests) -> list[str]:
    return [request.request_id for request in requests]


# ---- configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["max_num_batched_tokens", "max_num_seqs", "max_model_len"])
def test_config_refuses_limits_below_one(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        SchedulerConfig(**{name: 0})


def test_config_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="num_lookahead_tokens must not be negative"):
        SchedulerConfig(num_lookahead_tokens=-1)
    with pytest.raises(ValueError, match=r"max_num_seqs \(9\) must not exceed max_num_batched_tokens \(8\)"):
        SchedulerConfig(max_num_batched_tokens=8, max_num_seqs=9)


def test_a_cache_that_cannot_hold_one_request_is_refused():
    # 16 tokens in pages of 4 are 4 blocks, and one is the null block.
    make(num_blocks=5, max_model_len=16)
    with pytest.raises(ValueError, match="one request of max_model_len 16 tokens needs 4 KV blocks of 4 tokens"):
        make(num_blocks=4, max_model_len=16)


def test_requests_refuse_counts_below_one():
    with pytest.raises(ValueError, match="a prompt needs at least 1 token, not 0"):
        Request("a", 0, 1)
    with pytest.raises(ValueError, match="max_output_tokens must be at least 1, not 0"):
        Request("a", 1, 0)


def test_a_prompt_must_leave_room_for_a_token():
    scheduler = make(max_model_len=16)
    with pytest.raises(ValueError, match="a prompt of 16 tokens leaves no room"):
        add(scheduler, "a", 16)
    assert add(scheduler, "b", 15, 10).max_output_tokens == 1
    assert add(scheduler, "c", 6, 10).max_output_tokens == 10
    assert add(scheduler, "d", 7, 10).max_output_tokens == 9
    assert scheduler.num_outstanding == 3


# ---- the budget ----------------------------------------------------------------------------------------------------


def test_prompts_then_decodes():
    scheduler = make()
    a, b = add(scheduler, "a", 5, 3), add(scheduler, "b", 7, 2)
    step = run_step(scheduler)
    assert shape(step) == ([(5, 0), (7, 0)], [], [])
    assert (step.shape.num_tokens, step.shape.num_requests, step.shape.num_sampled) == (12, 2, 2)
    assert names(step.admitted) == ["a", "b"]
    # The sampled token is not computed yet: the next query attends to the prompt.
    assert (a.num_tokens, a.num_computed_tokens) == (6, 5)
    step = scheduler.schedule()
    assert shape(step) == ([], [5, 7], [])
    assert names(scheduler.update(step)) == ["b"]
    assert b.status is RequestStatus.FINISHED_LENGTH
    assert (b.num_output_tokens, b.num_tokens) == (2, 9)
    assert shape(run_step(scheduler)) == ([], [6], [])
    assert a.status is RequestStatus.FINISHED_LENGTH
    assert scheduler.num_outstanding == 0
    assert scheduler.kv.pool.num_used == 0
    assert scheduler.schedule().is_empty
    assert scheduler.num_steps == 3, "an empty step is no step"


def test_chunked_prefill_mixes_with_decodes():
    # Budget 10. The prompts of 4, 25 and 3:
    #   step 0: a 4          b 6 of 25
    #   step 1: a decodes    b 9 (15)
    #   step 2: a decodes    b 9 (24)
    #   step 3: a decodes    b 1 (25), its first token   c 3 of 3
    #   step 4: all decode
    scheduler = make(budget=10)
    a, b, c = add(scheduler, "a", 4), add(scheduler, "b", 25), add(scheduler, "c", 3)
    steps = [run_step(scheduler) for _ in range(5)]
    assert [shape(step) for step in steps] == [
        ([(4, 0), (6, 0)], [], []),
        ([(9, 6)], [4], []),
        ([(9, 15)], [5], []),
        ([(1, 24), (3, 0)], [6], []),
        ([], [7, 25, 3], []),
    ]
    # A chunk that ends inside the prompt samples nothing.
    assert [step.shape.num_sampled for step in steps] == [1, 1, 1, 3, 3]
    assert [r.num_output_tokens for r in (a, b, c)] == [5, 2, 2]
    assert [names(step.admitted) for step in steps] == [["a", "b"], [], [], ["c"], []]


def test_budget_and_seats_are_never_exceeded():
    scheduler = make(budget=12, seqs=3)
    requests = [add(scheduler, str(i), 3 + 5 * i % 17, 1 + i % 5) for i in range(20)]
    most_tokens = most_running = 0
    while scheduler.num_outstanding:
        step = run_step(scheduler)
        assert not step.is_empty
        most_tokens = max(most_tokens, step.shape.num_tokens)
        most_running = max(most_running, len(scheduler.running), step.shape.num_requests)
        # First come, first served.
        waiting = [int(name) for name in names(scheduler.waiting)]
        assert waiting == sorted(waiting)
    assert (most_tokens, most_running) == (12, 3), "the limits are reached, and not passed"
    assert all(request.num_output_tokens == request.max_output_tokens for request in requests)


def test_a_seat_is_free_in_the_step_after_a_finish():
    scheduler = make(seqs=1)
    add(scheduler, "a", 4, 2)
    add(scheduler, "b", 4, 1)
    assert [shape(step) for step in finish(scheduler)] == [
        ([(4, 0)], [], []),
        ([], [4], []),
        ([(4, 0)], [], []),
    ]


def test_without_chunked_prefill_a_prompt_waits_for_room():
    # Budget 10: 6 and 4 fit together, 9 does not fit beside 2 decodes, nor does it let the 2 behind it pass.
    scheduler = make(budget=10, enable_chunked_prefill=False)
    add(scheduler, "a", 6, 2)
    add(scheduler, "b", 4, 3)
    add(scheduler, "c", 9, 1)
    add(scheduler, "d", 2, 1)
    assert [shape(step) for step in finish(scheduler)] == [
        ([(6, 0), (4, 0)], [], []),
        ([], [6, 4], []),  # 8 tokens left
        ([(9, 0)], [5], []),  # a has finished: 9 left
        ([(2, 0)], [], []),
    ]


def test_without_chunked_prefill_a_prompt_beyond_the_budget_is_refused():
    scheduler = make(budget=10, enable_chunked_prefill=False)
    add(scheduler, "a", 10)
    with pytest.raises(ValueError, match="a prompt of 11 tokens exceeds max_num_batched_tokens 10 and chunked"):
        add(scheduler, "b", 11)
    add(make(budget=10), "b", 11)


def test_a_preempted_request_beyond_the_budget_is_chunked_after_all():
    # 3 blocks of 4. Prompts of 3 take 1 each; a's position 4 takes the third, and b's finds none: b is preempted.
    # With 5 known tokens or more it exceeds the budget of 4, and is split, as it would otherwise wait for ever.
    scheduler = make(num_blocks=4, budget=4, seqs=4, max_model_len=12, enable_chunked_prefill=False)
    a = add(scheduler, "a", 3, 6)
    run_step(scheduler)
    b = add(scheduler, "b", 3, 6)
    steps = finish(scheduler)
    assert b.num_preemptions == 1
    assert a.num_preemptions == 0
    assert max(step.shape.num_tokens for step in steps) == 4
    recomputed = [prefill for step in steps for prefill in step.shape.prefills][1:]
    assert sum(query for query, _ in recomputed) > 4
    assert recomputed[0] == (4, 0)
    assert (a.num_output_tokens, b.num_output_tokens) == (6, 6)


# ---- pages and preemption ------------------------------------------------------------------------------------------


def test_admission_only_if_the_whole_prompt_fits():
    # 8 blocks of 4, budget 8. a's 17 tokens hold 5. b's 16 need 4, of which 3 are free: its first chunk of 7 tokens,
    # which would fit, is not computed either. c's 4 tokens would fit, but do not overtake.
    scheduler = make(num_blocks=9, budget=8, max_model_len=32)
    add(scheduler, "a", 17, 3)
    for _ in range(3):
        run_step(scheduler)
    b, c = add(scheduler, "b", 16, 1), add(scheduler, "c", 4, 1)
    assert shape(run_step(scheduler)) == ([], [17], [])
    assert b.status is c.status is RequestStatus.WAITING
    assert [shape(step) for step in finish(scheduler)] == [
        ([], [18], []),  # a's last
        ([(8, 0)], [], []),
        ([(8, 8)], [], []),
        ([(4, 0)], [], []),
    ]


def preempting() -> tuple[Scheduler, Request, Request, Request]:
    """5 blocks of 4, and three requests that hold 2, 1 and 1 of them; the next page that a or b asks for is the last.

    | a a a a | a a a a | b b b | c c c |   - |      after the first step; each has sampled one token
    """
    scheduler = make(num_blocks=6, max_model_len=20)
    a, b, c = add(scheduler, "a", 8, 6), add(scheduler, "b", 3, 6), add(scheduler, "c", 3, 6)
    assert shape(run_step(scheduler)) == ([(8, 0), (3, 0), (3, 0)], [], [])
    assert scheduler.kv.pool.num_free == 1
    return scheduler, a, b, c


def test_the_newest_is_preempted():
    scheduler, _, _, c = preempting()
    # a takes the last page for position 8; b and c still have a slot for position 3.
    assert shape(run_step(scheduler)) == ([], [8, 3, 3], [])
    assert scheduler.kv.pool.num_free == 0
    # b asks for a page for position 4: c, the newest, loses its own.
    d = add(scheduler, "d", 1)
    step = run_step(scheduler)
    assert shape(step) == ([], [9, 4], [])
    assert names(step.preempted) == ["c"]
    assert c.status is RequestStatus.PREEMPTED
    assert (c.num_tokens, c.num_computed_tokens, c.block_tables) == (5, 0, [])
    assert (c.num_preemptions, scheduler.num_preemptions) == (1, 1)
    assert d.status is RequestStatus.WAITING
    # The preempted one stands before those who came later.
    assert names(scheduler.waiting) == ["c", "d"]
    assert names(scheduler.running) == ["a", "b"]


def test_a_preempted_request_is_recomputed_and_finishes_with_the_right_counts():
    # c goes as above, with 5 known tokens. At position 12 a asks for its fourth page, and b, the newest by then, goes
    # too, with 8. That was a's last token, so both come back in the next step: one prefill each over everything known,
    # which samples the next token.
    scheduler, a, b, c = preempting()
    steps = finish(scheduler)
    assert [shape(step) for step in steps] == [
        ([], [8, 3, 3], []),
        ([], [9, 4], []),
        ([], [10, 5], []),
        ([], [11, 6], []),
        ([], [12], []),
        ([(8, 0), (5, 0)], [], []),
        ([], [5], []),
        ([], [6], []),
        ([], [7], []),
    ]
    assert steps[5].shape.num_sampled == 2
    assert (a.num_preemptions, b.num_preemptions, c.num_preemptions) == (0, 1, 1)
    for request in (a, b, c):
        assert request.status is RequestStatus.FINISHED_LENGTH
        assert request.num_output_tokens == 6
        assert request.num_tokens == request.num_prompt_tokens + 6
        assert request.num_computed_tokens == request.num_tokens - 1
        assert request.num_pending_tokens == request.num_in_flight_tokens == 0


def test_nothing_is_admitted_in_a_step_that_preempted():
    # 6 blocks of 4. c's 9 drafts make it hold 4 pages (positions 3 .. 12), of which it needs 2 when all are rejected.
    # Then a asks for its third page. c loses its 4 and would fit into the 3 that are left, but not in this step.
    scheduler = make(num_blocks=7, max_model_len=20)
    add(scheduler, "a", 7)
    c = add(scheduler, "c", 3, 15)
    run_step(scheduler)
    scheduler.set_drafts(c, 9)
    assert shape(run_step(scheduler, [1])) == ([], [7], [(10, 3)])
    assert scheduler.kv.pool.num_free == 0
    step = run_step(scheduler)
    assert shape(step) == ([], [8], [])
    assert names(step.preempted) == ["c"]
    assert step.admitted == []
    assert scheduler.kv.pool.num_free == 3
    assert shape(run_step(scheduler)) == ([(5, 0)], [9], [])


def test_several_victims_keep_their_order():
    # 4 blocks of 4. a: 7 tokens in 2 pages, b and c: 1 page each. The last known token and 5
    # drafts of a stand at positions 7 .. 12, which takes 4 pages: both are preempted in one step, c first, and b queues
    # before c.
    scheduler = make(num_blocks=5, max_model_len=16)
    a = add(scheduler, "a", 7, 9)
    b, c = add(scheduler, "b", 2), add(scheduler, "c", 2)
    run_step(scheduler)
    scheduler.set_drafts(a, 5)
    step = scheduler.schedule()
    assert shape(step) == ([], [], [(6, 7)])
    assert names(step.preempted) == ["c", "b"]
    assert names(scheduler.waiting) == ["b", "c"]
    assert b.status is c.status is RequestStatus.PREEMPTED


def test_a_request_may_be_its_own_victim():
    # 4 blocks of 4: a and b hold 2 each. b, the newest, is the one that asks first: position 8, a is at 5.
    scheduler = make(num_blocks=5, max_model_len=16)
    add(scheduler, "a", 5)
    b = add(scheduler, "b", 8)
    run_step(scheduler)
    step = run_step(scheduler)
    assert shape(step) == ([], [5], [])
    assert names(step.preempted) == ["b"]
    assert b.num_tokens == 9


# ---- prefix cache --------------------------------------------------------------------------------------------------


def test_a_hit_is_context_and_costs_no_budget():
    scheduler = make(caching=True, budget=8, seqs=4)
    add(scheduler, "a", 8, 1, ("x", "y"))
    run_step(scheduler)
    b, c = add(scheduler, "b", 14, 1, ("x", "y", "z")), add(scheduler, "c", 9, 1, ("x", "other"))
    # b computes 6 of 14 tokens; the last 2 of the budget go to c, which shares 4 tokens with a.
    assert shape(run_step(scheduler)) == ([(6, 8), (2, 4)], [], [])
    assert (b.num_cached_tokens, c.num_cached_tokens) == (8, 4)
    assert shape(run_step(scheduler)) == ([(3, 6)], [], [])


def test_caching_off_never_hits():
    scheduler = make(caching=False)
    for _ in range(2):
        add(scheduler, "a", 9, 1, ("x", "y"))
        assert shape(run_step(scheduler)) == ([(9, 0)], [], [])


def test_a_full_hit_recomputes_the_last_token():
    # nano-vllm #199 and #144: a prompt all of whose blocks are cached left no query at all.
    scheduler = make(caching=True)
    add(scheduler, "a", 8, 1, ("x", "y"))
    run_step(scheduler)
    b = add(scheduler, "b", 8, 2, ("x", "y"))
    step = run_step(scheduler)
    assert shape(step) == ([(4, 4)], [], [])
    assert step.shape.num_sampled == 1
    assert b.num_output_tokens == 1
    finish(scheduler)
    # With blocks of one token, it is exactly one.
    scheduler = make(caching=True, block_size=1, num_blocks=200)
    for prefill in ((3, 0), (1, 2)):
        add(scheduler, "a", 3, 1, ("x", "y", "z"))
        assert shape(run_step(scheduler)) == ([prefill], [], [])


def test_identical_prompts_in_one_step():
    # nano-vllm #219: both compute (nothing is cached before the step has run), one block of each pair is findable,
    # and the other one's pages are simply free afterwards.
    scheduler = make(caching=True)
    a, b = add(scheduler, "a", 9, 3, ("x", "y")), add(scheduler, "b", 9, 1, ("x", "y"))
    assert shape(run_step(scheduler)) == ([(9, 0), (9, 0)], [], [])
    pool = scheduler.kv.pool
    assert b.status is RequestStatus.FINISHED_LENGTH
    assert pool.longest_prefix(0, ("x", "y")) == a.block_tables[0][:2]
    assert pool.num_used == 3
    c = add(scheduler, "c", 9, 1, ("x", "y"))
    assert shape(run_step(scheduler)) == ([(1, 8)], [9], [])
    assert c.num_cached_tokens == 8
    finish(scheduler)


def test_a_hit_after_preemption():
    # nano-vllm #211: a preempted request finds its own blocks. 8 blocks of 4, prompts of 11 and 13 (3 + 4 pages).
    #   step 1: both decode, at 11 and 13          7 pages held, 1 free
    #   step 2: a, at 12, takes the last; b, at 14, has a slot
    #   step 4: b, at 16, finds no page and is its own victim; of its 17 tokens, 3 blocks are hashed
    scheduler = make(num_blocks=9, caching=True, max_model_len=32)
    a, b = add(scheduler, "a", 11, 8, ("p", "q")), add(scheduler, "b", 13, 8, ("x", "y", "z"))
    steps = [run_step(scheduler) for _ in range(5)]
    assert [shape(step) for step in steps] == [
        ([(11, 0), (13, 0)], [], []),
        ([], [11, 13], []),
        ([], [12, 14], []),
        ([], [13, 15], []),
        ([], [14], []),
    ]
    assert names(steps[4].preempted) == ["b"]
    assert (b.num_tokens, b.num_output_tokens) == (17, 4)
    # The 5 pages that b needs, 3 of which are cached but free, do not fit beside a's 4, until a has ended with 17.
    steps = [run_step(scheduler) for _ in range(3)]
    assert [shape(step) for step in steps] == [([], [15], []), ([], [16], []), ([], [17], [])]
    assert a.status is RequestStatus.FINISHED_LENGTH
    # a's page for 16 was b's fourth, which has no hash: b's three cached blocks are all still there.
    step = run_step(scheduler)
    assert shape(step) == ([(5, 12)], [], [])
    assert b.num_cached_tokens == 0, "counted at the first admission only"
    assert b.num_output_tokens == 5
    finish(scheduler)
    assert (b.num_output_tokens, b.num_tokens) == (8, 21)


def test_output_blocks_can_be_hit():
    # A chat's next turn: prompt of 6 and 4 outputs, of which the last was never computed: 9 tokens, 2 full blocks.
    scheduler = make(caching=True)
    add(scheduler, "a", 6, 4, ("x", "y"))
    finish(scheduler)
    add(scheduler, "b", 20, 1, ("x", "y", "z", "w", "v"))
    assert shape(run_step(scheduler)) == ([(12, 8)], [], [])


def test_the_oldest_prefix_is_evicted_first():
    # 8 blocks of 4. Prompts of 12 leave "abc" (1 2 3), then "xyz" (4 5 6). A third prompt of 16 takes 7, 8 (blank) and
    # evicts "c" and "b"; "a" and all of "xyz" survive.
    scheduler = make(num_blocks=9, caching=True, max_model_len=32)
    for hashes in ("abc", "xyz"):
        add(scheduler, hashes, 12, 1, tuple(hashes))
        run_step(scheduler)
    add(scheduler, "big", 16, 1)
    run_step(scheduler)
    pool = scheduler.kv.pool
    assert pool.longest_prefix(0, "abc") == [1]
    assert pool.longest_prefix(0, "xyz") == [4, 5, 6]


def test_a_blocked_head_is_admitted_when_its_prefix_appears():
    # 5 blocks of 4. a's 10 tokens hold 3. b's 16 need 4, or 2 once the first two blocks of a can be hit.
    scheduler = make(num_blocks=6, caching=True, max_model_len=20)
    add(scheduler, "a", 10, 9, ("x", "y"))
    first = scheduler.schedule()
    b = add(scheduler, "b", 16, 1, ("x", "y"))
    assert shape(scheduler.schedule()) == ([], [10], []), "the first step is in flight: nothing is cached yet"
    scheduler.update(first)
    assert shape(scheduler.schedule()) == ([(8, 8)], [11], [])
    assert b.num_cached_tokens == 8


def test_hybrid_hit_and_sliding_pages():
    # Window 5: of a's 16 tokens the sliding group keeps the last pages, yet b hits all of its 12 (16 less the block of
    # the last token): the query at 12 reads from 8 on, page 2.
    scheduler = make(windows=(None, 5), caching=True)
    add(scheduler, "a", 16, 1, tuple("wxyz"))
    run_step(scheduler)
    b = add(scheduler, "b", 16, 9, tuple("wxyz"))
    assert shape(run_step(scheduler)) == ([(4, 12)], [], [])
    assert [block == 0 for block in b.block_tables[0]] == [False] * 4
    assert [block == 0 for block in b.block_tables[1]] == [True, True, False, False]
    # At position 16 it asks for a page: the query there reads from 12 on.
    run_step(scheduler)
    assert [block == 0 for block in b.block_tables[1]] == [True, True, True, False, False]
    finish(scheduler)


def test_sliding_pages_let_a_long_request_live_in_a_small_pool():
    # 7 blocks of 4 for one sliding group, window 8, steps of at most 8 tokens: (7 + 8) / 4, and 1 = 5 pages at most.
    scheduler = make(num_blocks=8, windows=(8,), budget=8, seqs=2, max_model_len=200)
    a = add(scheduler, "a", 100, 50)
    most = 0
    while scheduler.num_outstanding:
        step = run_step(scheduler)
        assert not step.is_empty
        most = max(most, scheduler.kv.pool.num_used)
    assert most <= 5
    assert (a.num_output_tokens, a.num_preemptions) == (50, 0)


# ---- speculation ---------------------------------------------------------------------------------------------------


def started(prompt=6, output=20, hashes=(), **settings) -> tuple[Scheduler, Request]:
    """One request that has sampled its first token."""
    scheduler = make(**settings)
    request = add(scheduler, "a", prompt, output, hashes)
    run_step(scheduler)
    return scheduler, request


@pytest.mark.parametrize(
    ("sampled", "computed"),
    [
        (1, 7),  # all 3 drafts rejected: only the last known token's KV counts
        (2, 8),
        (4, 10),  # all accepted, and the bonus token, which is not computed
    ],
)
def test_rejection_lowers_computed_by_the_rejected(sampled, computed):
    # 6 prompt tokens and one sampled, 3 drafts: 4 query tokens at positions 6 .. 9.
    scheduler, request = started()
    assert scheduler.set_drafts(request, 3) == 3
    step = scheduler.schedule()
    assert shape(step) == ([], [], [(4, 6)])
    assert (step.shape.num_tokens, step.shape.num_sampled) == (4, 4)
    assert request.num_computed_tokens == 10
    scheduler.update(step, [sampled])
    assert request.num_computed_tokens == computed == 10 - (4 - sampled)
    assert request.num_tokens == 7 + sampled == computed + 1
    assert request.num_output_tokens == 1 + sampled
    # The next step goes on from there, and its slots overwrite the rejected ones.
    assert shape(run_step(scheduler)) == ([], [computed], [])


def test_drafts_count_against_the_budget():
    # Budget 8, three requests with 3 drafts each: 4 + 4 query tokens, and the third must wait, drafts in hand.
    scheduler = make(budget=8, seqs=3)
    requests = [add(scheduler, name, 2) for name in "abc"]
    run_step(scheduler)
    for request in requests:
        scheduler.set_drafts(request, 3)
    assert shape(run_step(scheduler, [1, 1])) == ([], [], [(4, 2), (4, 2)])
    assert requests[2].num_draft_tokens == 3
    # a and b decode without drafts now, which leaves 6.
    assert shape(run_step(scheduler, [4])) == ([], [3, 3], [(4, 2)])
    assert requests[2].num_tokens == 7


def test_drafts_beyond_the_budget_are_dropped():
    # Budget 6: a's 1 + 3, then 2 of b's 1 + 3; b's other 2 drafts are stale after that.
    scheduler = make(budget=6, seqs=2)
    a, b = add(scheduler, "a", 2), add(scheduler, "b", 2)
    run_step(scheduler)
    scheduler.set_drafts(a, 3)
    scheduler.set_drafts(b, 3)
    assert shape(run_step(scheduler, [4, 2])) == ([], [], [(4, 2), (2, 2)])
    assert (a.num_tokens, b.num_tokens) == (7, 5)
    assert b.num_draft_tokens == 0
    assert shape(run_step(scheduler)) == ([], [6, 4], [])


def test_no_budget_left_for_drafts_is_a_decode():
    scheduler = make(budget=5, seqs=2)
    a, b = add(scheduler, "a", 2), add(scheduler, "b", 2)
    run_step(scheduler)
    scheduler.set_drafts(a, 3)
    scheduler.set_drafts(b, 3)
    assert shape(run_step(scheduler, [1])) == ([], [2], [(4, 2)])


@pytest.mark.parametrize(
    ("output", "kept"),
    [
        (20, 3),
        (5, 3),  # 4 are left: 3 drafts accepted and the bonus token are just these
        (4, 2),
        (2, 0),  # 1 is left, and a plain decode yields it
    ],
)
def test_drafts_near_the_output_limit_are_clipped(output, kept):
    scheduler, request = started(output=output)
    assert scheduler.set_drafts(request, 3) == kept == request.num_draft_tokens
    step = scheduler.schedule()
    scheduler.update(step, [kept + 1] if kept else [])
    assert request.num_output_tokens == 2 + kept <= output


def test_drafts_near_max_model_len_are_clipped():
    # The limit of 10 tokens leaves 4 outputs, 3 after the first.
    scheduler, request = started(max_model_len=10)
    assert scheduler.set_drafts(request, 9) == 2
    step = run_step(scheduler, [3])
    assert shape(step) == ([], [], [(3, 6)])
    assert request.status is RequestStatus.FINISHED_LENGTH
    assert request.num_tokens == 10


def test_drafts_are_dropped_while_the_prompt_is_not_computed():
    scheduler = make(budget=4, seqs=2)
    request = add(scheduler, "a", 6)
    assert scheduler.set_drafts(request, 3) == 0
    run_step(scheduler)
    assert scheduler.set_drafts(request, 3) == 0
    assert shape(run_step(scheduler)) == ([(2, 4)], [], [])
    assert scheduler.set_drafts(request, 3) == 3
    assert scheduler.set_drafts(request, 0) == 0
    assert shape(run_step(scheduler)) == ([], [6], [])


def test_draft_tokens_are_never_committed():
    # Blocks of 4, 6 prompt tokens. 4 query tokens at 6 .. 9 fill block 1 (tokens 4 .. 7) with the known token 6 and the
    # draft at 7. Rejected, it must not be found; accepted, it must.
    hashes = ("x", "y", "z")
    for sampled, cached in ((1, 1), (2, 2), (4, 2)):
        scheduler, request = started(hashes=hashes, caching=True)
        scheduler.set_drafts(request, 3)
        step = scheduler.schedule()
        assert len(scheduler.kv.pool.longest_prefix(0, hashes)) == 1, "nothing is committed before its update"
        scheduler.update(step, [sampled])
        assert len(scheduler.kv.pool.longest_prefix(0, hashes)) == cached
        assert request.num_hashed_blocks == cached
        scheduler.check()


def test_preemption_drops_drafts():
    scheduler, _, _, c = preempting()
    run_step(scheduler)
    scheduler.set_drafts(c, 3)
    step = run_step(scheduler)
    assert names(step.preempted) == ["c"]
    assert c.num_draft_tokens == 0
    assert scheduler.set_drafts(c, 3) == 0


def test_lookahead_slots_are_reserved():
    # 6 prompt tokens and 3 lookahead slots need 3 pages of 4; without, 2.
    scheduler, request = started(num_lookahead_tokens=3)
    assert request.num_slots == 12
    assert started()[1].num_slots == 8
    # Positions 6 .. 8 and their lookahead fit 12 slots; the token at 9 looks ahead to 12.
    for computed, slots in ((7, 12), (8, 12), (9, 12), (10, 16)):
        run_step(scheduler)
        assert (request.num_computed_tokens, request.num_slots) == (computed, slots)


def test_lookahead_ends_at_max_model_len():
    scheduler, request = started(prompt=6, output=2, num_blocks=3, max_model_len=8, num_lookahead_tokens=5)
    assert request.num_slots == 8
    finish(scheduler)


def test_lookahead_that_does_not_fit_blocks_admission():
    # 4 blocks of 4. a's 8 tokens with 2 lookahead slots hold 3. b's 4 tokens fit the last one, its lookahead does not.
    scheduler = make(num_blocks=5, max_model_len=16, num_lookahead_tokens=2)
    add(scheduler, "a", 8, 3)
    run_step(scheduler)
    b = add(scheduler, "b", 4, 1)
    assert shape(run_step(scheduler)) == ([], [8], [])
    assert b.status is RequestStatus.WAITING
    assert (b.block_tables, b.num_computed_tokens) == ([], 0)
    assert len(finish(scheduler)) == 2
    assert b.num_preemptions == 0


# ---- ends ----------------------------------------------------------------------------------------------------------


def test_a_stop_token_ends_a_prefill_a_decode_and_a_verification():
    scheduler = make()
    a, b, c = (add(scheduler, name, 4) for name in "abc")
    run_step(scheduler, stopped=[a])
    assert a.status is RequestStatus.FINISHED_STOPPED
    assert a.num_output_tokens == 1
    scheduler.set_drafts(c, 3)
    step = scheduler.schedule()
    assert shape(step) == ([], [4], [(4, 4)])
    # The stop token was the second of the verified ones: what follows it does not count.
    assert names(scheduler.update(step, [2], stopped={b, c})) == ["b", "c"]
    assert b.status is c.status is RequestStatus.FINISHED_STOPPED
    assert (b.num_output_tokens, c.num_output_tokens) == (2, 3)
    assert scheduler.kv.pool.num_used == 0


def test_others_go_on_when_one_stops():
    scheduler = make()
    a, b = add(scheduler, "a", 4), add(scheduler, "b", 4)
    run_step(scheduler)
    run_step(scheduler, stopped=[a])
    assert a.status.is_finished
    assert not b.status.is_finished
    assert shape(run_step(scheduler)) == ([], [5], [])
    assert b.num_output_tokens == 3


def test_abort_while_waiting():
    scheduler = make()
    a, b = add(scheduler, "a", 4, 1), add(scheduler, "b", 4, 1)
    assert scheduler.abort(a) is True
    assert a.status is RequestStatus.ABORTED
    assert names(run_step(scheduler).prefill_requests) == ["b"]
    assert scheduler.abort(a) is scheduler.abort(b) is False
    assert b.status is RequestStatus.FINISHED_LENGTH


def test_abort_of_a_blocked_head_lets_the_next_in():
    scheduler = make(num_blocks=9, max_model_len=32)
    add(scheduler, "a", 17)
    run_step(scheduler)
    b = add(scheduler, "b", 16, 1)
    c = add(scheduler, "c", 4, 1)
    assert run_step(scheduler).admitted == []
    scheduler.abort(b)
    assert run_step(scheduler).admitted == [c]


def test_abort_while_running_frees_at_once():
    scheduler = make()
    a = add(scheduler, "a", 9)
    run_step(scheduler)
    assert scheduler.kv.pool.num_used == 3
    scheduler.abort(a)
    assert scheduler.kv.pool.num_used == 0
    assert scheduler.schedule().is_empty


def test_abort_while_preempted():
    scheduler, _, _, c = preempting()
    run_step(scheduler)
    run_step(scheduler)
    assert c.status is RequestStatus.PREEMPTED
    scheduler.abort(c)
    assert names(scheduler.waiting) == []
    finish(scheduler)
    assert c.num_output_tokens == 2


def test_abort_in_flight_frees_at_the_update():
    scheduler = make()
    a, b = add(scheduler, "a", 9), add(scheduler, "b", 4)
    step = scheduler.schedule()
    scheduler.abort(a)
    scheduler.check()
    assert scheduler.kv.pool.num_used == 4, "the step in flight still writes to a's pages"
    assert scheduler.update(step) == []
    assert scheduler.kv.pool.num_used == 1
    assert (a.num_output_tokens, b.num_output_tokens) == (0, 1)
    scheduler.check()


def test_abort_in_flight_of_a_verification():
    scheduler, request = started()
    scheduler.set_drafts(request, 3)
    step = scheduler.schedule()
    scheduler.abort(request)
    assert scheduler.update(step, [2]) == []
    assert request.num_output_tokens == 1
    assert scheduler.kv.pool.num_used == 0


# ---- several steps in flight ---------------------------------------------------------------------------------------


def test_the_next_step_decodes_tokens_that_are_still_being_sampled():
    scheduler = make()
    a = add(scheduler, "a", 4, 3)
    first = scheduler.schedule()
    assert (a.num_tokens, a.num_pending_tokens, a.num_in_flight_tokens) == (4, 1, 4)
    second = scheduler.schedule()
    assert shape(second) == ([], [4], [])
    third = scheduler.schedule()
    assert shape(third) == ([], [5], [])
    assert (a.num_tokens, a.num_pending_tokens, a.num_in_flight_tokens) == (4, 3, 6)
    # The three in flight are all that it may sample.
    assert scheduler.schedule().is_empty
    assert scheduler.num_steps == 3
    assert scheduler.update(first) == scheduler.update(second) == []
    assert scheduler.update(third) == [a]
    assert (a.num_output_tokens, a.num_pending_tokens, a.num_in_flight_tokens) == (3, 0, 0)
    assert scheduler.kv.pool.num_used == 0


def test_chunks_of_one_prompt_in_flight():
    scheduler = make(budget=4, seqs=2)
    a = add(scheduler, "a", 10, 2)
    steps = [scheduler.schedule() for _ in range(4)]
    assert [shape(step) for step in steps] == [
        ([(4, 0)], [], []),
        ([(4, 4)], [], []),
        ([(2, 8)], [], []),
        ([], [10], []),
    ]
    outputs = []
    for step in steps:
        scheduler.update(step)
        outputs.append(a.num_output_tokens)
    assert outputs == [0, 0, 1, 2]


def test_a_verification_in_flight_holds_its_request_back():
    # How many drafts count, and so where the next query stands, is known only after the update.
    scheduler, request = started()
    scheduler.set_drafts(request, 1)
    step = scheduler.schedule()
    assert shape(step) == ([], [], [(2, 6)])
    assert scheduler.schedule().is_empty
    scheduler.update(step, [1])
    assert shape(scheduler.schedule()) == ([], [7], [])


def test_pages_of_a_stopped_request_wait_for_its_last_step_in_flight():
    scheduler = make()
    a = add(scheduler, "a", 4)
    steps = [scheduler.schedule() for _ in range(3)]
    assert scheduler.kv.pool.num_used == 2
    assert scheduler.update(steps[0], stopped=[a]) == [a]
    scheduler.check()
    assert scheduler.kv.pool.num_used == 2
    assert scheduler.update(steps[1]) == []
    scheduler.check()
    assert scheduler.kv.pool.num_used == 2, "step 2 still reads them"
    assert scheduler.update(steps[2]) == []
    scheduler.check()
    assert scheduler.kv.pool.num_used == 0
    assert (a.num_output_tokens, a.status) == (1, RequestStatus.FINISHED_STOPPED)


def test_pages_of_an_aborted_request_wait_for_its_last_step_in_flight():
    scheduler = make()
    a, b = add(scheduler, "a", 4), add(scheduler, "b", 4)
    first, second = scheduler.schedule(), scheduler.schedule()
    scheduler.update(first)
    scheduler.abort(a)
    scheduler.check()
    assert shape(scheduler.schedule()) == ([], [5], [])
    assert scheduler.kv.pool.num_used == 4
    scheduler.update(second)
    assert scheduler.kv.pool.num_used == 2
    assert (a.num_output_tokens, b.num_output_tokens) == (1, 2)


def test_pages_of_a_finished_request_are_free_if_no_step_in_flight_has_it():
    scheduler = make()
    add(scheduler, "a", 4, 1)
    add(scheduler, "b", 4, 9)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert names(second.decode_requests) == ["b"]
    assert names(scheduler.update(first)) == ["a"]
    assert scheduler.kv.pool.num_used == 2  # b's


def test_nothing_is_preempted_while_steps_are_in_flight():
    # As in test_the_newest_is_preempted, but the step before is still in flight: b finds no page. The pages of a
    # request in flight cannot be taken, so everything is settled first, and then c is preempted.
    scheduler, a, b, c = preempting()
    second = scheduler.schedule()
    third = scheduler.schedule()
    assert shape(third) == ([], [9], []), "a goes on, b's page is missing"
    assert third.preempted == []
    assert scheduler.schedule().is_empty, "a could go on, but the rest would wait longer for it"
    scheduler.update(second)
    assert scheduler.schedule().is_empty
    scheduler.update(third)
    step = scheduler.schedule()
    assert names(step.preempted) == ["c"]
    assert shape(step) == ([], [10, 4], [])
    scheduler.update(step)
    finish(scheduler)
    assert [r.num_output_tokens for r in (a, b, c)] == [6, 6, 6]


def test_nothing_is_admitted_while_steps_are_settled():
    # 6 blocks of 4, budget 8. a: 4 tokens, b: 20, in chunks beside it.
    #   step 0: a 4, b 4       2 pages
    #   step 1: a at 4, b 7    2 + 3 pages, 1 free
    #   step 2: a at 5; b's next 7 want 2 pages. c's one would fit, but then b's pages would be even fewer.
    scheduler = make(num_blocks=7, budget=8, max_model_len=24)
    add(scheduler, "a", 4)
    add(scheduler, "b", 20, 4)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert shape(second) == ([(7, 4)], [4], [])
    add(scheduler, "c", 1)
    third = scheduler.schedule()
    assert shape(third) == ([], [5], [])
    assert third.admitted == third.preempted == []
    for step in (first, second, third):
        assert scheduler.schedule().is_empty
        scheduler.update(step)
    assert names(scheduler.schedule().preempted) == ["b"]


def test_blocks_are_committed_only_when_their_step_has_run():
    # The second block of 4 is full once token 7 has been computed, in the second step.
    scheduler = make(caching=True)
    add(scheduler, "a", 7, 9, ("x", "y"))
    first = scheduler.schedule()
    add(scheduler, "b", 9, 9, ("x", "y"))
    second = scheduler.schedule()
    assert shape(second) == ([(9, 0)], [7], []), "what a computes in flight is no hit"
    scheduler.update(first)
    add(scheduler, "c", 9, 9, ("x", "y"))
    assert shape(scheduler.schedule())[0] == [(5, 4)]
    scheduler.update(second)
    add(scheduler, "d", 9, 9, ("x", "y"))
    assert shape(scheduler.schedule())[0] == [(1, 8)]


# ---- updates that do not fit ---------------------------------------------------------------------------------------


def test_updates_must_come_in_order():
    scheduler = make()
    a = add(scheduler, "a", 4, 9)
    with pytest.raises(ValueError, match="in the order in which they were scheduled"):
        scheduler.update(Step(0))
    first, second = scheduler.schedule(), scheduler.schedule()
    with pytest.raises(ValueError, match="in the order"):
        scheduler.update(second)
    scheduler.update(first)
    with pytest.raises(ValueError, match="in the order"):
        scheduler.update(first)
    scheduler.update(second)
    assert a.num_output_tokens == 2


@pytest.mark.parametrize(
    ("num_sampled", "message"),
    [
        ([], "0 verify results for 1 verify requests"),
        ([1, 1], "2 verify results for 1 verify requests"),
        ([0], "a verification of 4 tokens cannot yield 0"),
        ([5], "a verification of 4 tokens cannot yield 5"),
    ],
)
def test_verify_results_must_fit(num_sampled, message):
    scheduler, request = started()
    scheduler.set_drafts(request, 3)
    step = scheduler.schedule()
    with pytest.raises(ValueError, match=message):
        scheduler.update(step, num_sampled)
    # A refused update changes nothing: the right one is still possible.
    scheduler.update(step, [2])
    assert (request.num_output_tokens, request.num_computed_tokens) == (3, 8)


# ---- many steps at once --------------------------------------------------------------------------------------------


def decoding(prompts: dict[str, tuple[int, int]], **settings) -> Scheduler:
    """Requests of (prompt, output) tokens, after the one step that computed all their prompts."""
    scheduler = make(**settings)
    for name, (prompt, output) in prompts.items():
        add(scheduler, name, prompt, output)
    run_step(scheduler)
    assert not scheduler.waiting
    return scheduler


def test_steady_until_the_first_finish():
    scheduler = decoding({"a": (4, 10), "b": (6, 7)})
    a, b = scheduler.running
    assert scheduler.steady_steps() == 6, "b has sampled 1 of 7"
    assert scheduler.advance(4) == []
    assert (a.num_output_tokens, a.num_computed_tokens, a.num_tokens) == (5, 8, 9)
    assert scheduler.steady_steps() == 2
    assert scheduler.advance(2) == [b]
    assert b.status is RequestStatus.FINISHED_LENGTH
    assert scheduler.num_steps == 1 + 6
    assert scheduler.steady_steps() == 3
    scheduler.check()
    assert scheduler.advance(3) == [a]
    assert scheduler.kv.pool.num_used == 0
    assert scheduler.steady_steps() == 0, "nothing runs"


def test_steady_with_a_step_in_flight():
    """b ends in its 7th token: a step in flight that samples it is the last one with b in it."""
    scheduler = decoding({"a": (4, 10), "b": (6, 7)})
    a, b = scheduler.running
    step = scheduler.schedule()
    assert scheduler.steady_steps() == 5, "b has sampled 1 of 7, and samples another"
    assert scheduler.advance(3) == []
    assert (a.num_output_tokens, a.num_pending_tokens, a.num_tokens, a.num_computed_tokens) == (4, 1, 8, 8)
    assert (step.step_id, shape(step)) == (4, ([], [7, 9], [])), "it is the last of the four steps now"
    assert scheduler.steady_steps() == 2
    assert scheduler.advance(2) == []
    assert scheduler.steady_steps() == 0, "the step in flight samples the last of b"
    following = scheduler.schedule()
    assert shape(following) == ([], [10], [])
    assert scheduler.update(step) == [b]
    assert scheduler.steady_steps() == 2, "a has sampled 7 of 10, and samples another"
    scheduler.advance(2)
    assert scheduler.update(following) == [a]
    assert scheduler.kv.pool.num_used == 0
    assert scheduler.num_steps == 10 - 1 + 1


def test_nothing_is_steady_behind_another_batch():
    scheduler = decoding({"a": (4, 10)})
    add(scheduler, "b", 6, 7)
    mixed = scheduler.schedule()
    assert shape(mixed) == ([(6, 0)], [4], [])
    assert scheduler.steady_steps() == 0, "a prompt is in flight"
    both = scheduler.schedule()
    scheduler.update(mixed)
    assert scheduler.steady_steps() == 5
    c = add(scheduler, "c", 3, 9)
    scheduler.update(both)
    with_c = scheduler.schedule()
    scheduler.abort(c)
    assert scheduler.steady_steps() == 0, "the step in flight has a prompt that was aborted"
    scheduler.update(with_c)
    both = scheduler.schedule()
    scheduler.abort(scheduler.running[0])
    assert scheduler.steady_steps() == 0, "the step in flight has a request that was aborted"
    scheduler.update(both)
    assert scheduler.steady_steps() == 3, "b has sampled 4 of 7"


def test_nothing_is_steady_while_steps_in_flight_drain():
    """b finds no page for its next token, which stops all scheduling until nothing is in flight; b's end does not."""
    scheduler = decoding({"a": (5, 6), "b": (3, 6)}, num_blocks=4, block_size=4, max_model_len=12)
    a, b = scheduler.running
    both, alone = scheduler.schedule(), scheduler.schedule()
    assert names(alone.decode_requests) == ["a"]
    scheduler.abort(b)
    scheduler.update(both)
    assert scheduler.steady_steps() == 0
    assert scheduler.schedule().is_empty
    scheduler.update(alone)
    assert names(scheduler.schedule().decode_requests) == ["a"]
    assert scheduler.steady_steps() == 6 - a.num_output_tokens - 1


def test_several_may_finish_in_the_last_step():
    scheduler = decoding({"a": (4, 5), "b": (6, 9), "c": (5, 5)})
    assert scheduler.steady_steps() == 4
    assert names(scheduler.advance(4)) == ["a", "c"]
    assert names(scheduler.running) == ["b"]


def test_steady_until_the_blocks_run_out():
    # 5 blocks of 4. a at 8 tokens (2 pages, full), b at 3 (1 page, 1 slot): 2 free blocks.
    #   next steps' positions  a: 8 9 10 11 | 12      b: 3 | 4 5 6 7 | 8
    #   pages                     ^ 3rd       ^ 4th         ^ 2nd
    # After 4 steps a has 3 pages and b 2; the fifth step needs another for a.
    scheduler = decoding({"a": (8, 12), "b": (3, 12)}, num_blocks=6, max_model_len=20)
    assert scheduler.steady_steps() == 4
    scheduler.advance(4)
    scheduler.check()
    assert scheduler.kv.pool.num_free == 0
    assert scheduler.steady_steps() == 0
    step = scheduler.schedule()
    assert names(step.preempted) == ["b"]
    assert shape(step) == ([], [12], [])


@pytest.mark.parametrize("hashes", [(), ("x", "y", "z", "w")])
def test_a_leap_takes_the_blocks_that_steps_would(hashes):
    # Free blocks are 4, 5, … . a takes 4 in the first step, b 5 in the second, a 6 in the fifth.
    tables = []
    for leap in (False, True):
        scheduler = make(caching=bool(hashes))
        a, b = add(scheduler, "a", 8, 12, hashes), add(scheduler, "b", 3, 12)
        run_step(scheduler)
        if leap:
            scheduler.advance(5)
        else:
            for _ in range(5):
                run_step(scheduler)
        scheduler.check()
        tables.append((a.block_tables, b.block_tables))
    assert tables == [([[1, 2, 4, 6]], [[3, 5]])] * 2


def test_a_waiting_head_that_fits_stops_the_leap():
    scheduler = decoding({"a": (4, 10)})
    add(scheduler, "b", 4)
    assert scheduler.steady_steps() == 0, "b would be admitted in the next step"
    run_step(scheduler)
    assert scheduler.steady_steps() == 8


def test_no_free_seat_is_as_good_as_no_queue():
    scheduler = decoding({"a": (4, 10)}, seqs=1)
    add(scheduler, "b", 4)
    assert scheduler.steady_steps() == 9


def test_a_blocked_head_does_not_stop_the_leap():
    # 8 blocks of 4: a's 17 tokens hold 5, b's 16 need 4.
    scheduler = decoding({"a": (17, 9)}, num_blocks=9, max_model_len=32)
    b = add(scheduler, "b", 16, 1)
    assert scheduler.steady_steps() == 0, "whether b fits has not been tried"
    run_step(scheduler)
    assert scheduler.steady_steps() == 7
    scheduler.advance(7)  # a's end frees its pages
    assert scheduler.steady_steps() == 0
    assert run_step(scheduler).admitted == [b]


def test_with_caching_a_block_about_to_fill_stops_the_leap_of_a_blocked_head():
    # As above, but a's next full block (tokens 16 .. 19) has a hash, which b's prompt may be waiting for.
    scheduler = make(num_blocks=9, max_model_len=32, caching=True)
    add(scheduler, "a", 17, 9, tuple("vwxyz"))
    run_step(scheduler)
    add(scheduler, "b", 16, 1, tuple("pqrs"))
    run_step(scheduler)
    assert scheduler.steady_steps() == 0
    run_step(scheduler)
    assert shape(run_step(scheduler)) == ([], [19], [])  # fills the block; b is tried again in the next step
    run_step(scheduler)
    assert scheduler.steady_steps() == 4


def test_with_sliding_windows_a_blocked_head_allows_a_leap_to_the_page_boundary():
    # One sliding group, window 8, 9 blocks of 4. a's 14 tokens hold 4 pages with 2 slots to spare; b's 24 need 6.
    scheduler = make(num_blocks=10, windows=(8,), budget=24, max_model_len=64)
    add(scheduler, "a", 14, 20)
    run_step(scheduler)
    b = add(scheduler, "b", 24, 9)
    assert shape(run_step(scheduler)) == ([], [14], [])
    assert b.status is RequestStatus.WAITING, "5 blocks are free"
    assert scheduler.steady_steps() == 1
    scheduler.advance(1)
    assert scheduler.steady_steps() == 0
    # Position 16 reads from 9 on: a gives back 2 pages and takes 1, which leaves 6.
    assert shape(run_step(scheduler)) == ([(23, 0)], [16], [])


def test_not_steady():
    scheduler = make(budget=4, seqs=2)
    assert scheduler.steady_steps() == 0, "nothing runs"
    add(scheduler, "a", 6)
    run_step(scheduler)
    assert scheduler.steady_steps() == 0, "a prompt is being computed"
    run_step(scheduler)
    (a,) = scheduler.running
    assert scheduler.steady_steps() == 9
    scheduler.set_drafts(a, 1)
    assert scheduler.steady_steps() == 0, "a draft is to be verified"
    scheduler.set_drafts(a, 0)
    step = scheduler.schedule()
    assert scheduler.steady_steps() == 8, "one step is in flight, and is of the same kind"
    second = scheduler.schedule()
    assert scheduler.steady_steps() == 0, "two steps are in flight"
    scheduler.update(step)
    scheduler.update(second)
    assert scheduler.steady_steps() == 7
    assert decoding({"a": (4, 9)}, num_lookahead_tokens=1).steady_steps() == 0


def test_a_leap_commits_full_blocks():
    # a's 6 prompt tokens fill block x. 7 leapt steps compute tokens 6 .. 12: y is full after 2 of them, z after 6.
    scheduler = make(caching=True)
    a = add(scheduler, "a", 6, 20, tuple("xyzw"))
    run_step(scheduler)
    pool = scheduler.kv.pool
    for steps, cached in ((1, 1), (1, 2), (3, 2), (1, 3), (1, 3)):
        scheduler.advance(steps)
        assert len(pool.longest_prefix(0, "xyzw")) == cached == a.num_hashed_blocks
    scheduler.check()


# ---- shapes and checks ---------------------------------------------------------------------------------------------


def test_step_shape_counts():
    step = StepShape(prefills=[(5, 0), (3, 8)], decode_contexts=[7, 9], verifies=[(4, 20)])
    assert step.num_tokens == 5 + 3 + 2 + 4
    assert step.num_requests == 5
    assert step.num_sampled == 2 + 2 + 4
    assert StepShape(prefills=[(5, 0)], num_sampled=0).num_sampled == 0
    assert StepShape().num_tokens == StepShape().num_requests == StepShape().num_sampled == 0


def test_entries_of_a_step_belong_to_their_requests():
    scheduler = make(budget=16)
    a, b = add(scheduler, "a", 3), add(scheduler, "b", 4)
    run_step(scheduler)
    scheduler.set_drafts(a, 2)
    c = add(scheduler, "c", 5)
    step = scheduler.schedule()
    assert shape(step) == ([(5, 0)], [4], [(3, 3)])
    assert (step.prefill_requests, step.decode_requests, step.verify_requests) == ([c], [b], [a])
    assert set(step.requests()) == {a, b, c}
    assert step.step_id == 1


def test_kv_usage():
    scheduler = make(num_blocks=11, max_model_len=40)
    assert scheduler.kv_usage == 0
    add(scheduler, "a", 15)
    run_step(scheduler)
    assert scheduler.kv_usage == pytest.approx(0.4)


def test_check_can_fail():
    scheduler, request = started()
    scheduler.check()
    request.block_tables[0].pop()
    with pytest.raises(AssertionError, match="is lost"):
        scheduler.check()
