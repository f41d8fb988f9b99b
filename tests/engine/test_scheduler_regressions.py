"""Defects that a review of the scheduler found, one test each."""

import pytest

from engine.scheduling import KVCacheConfig, Request, RequestStatus, Scheduler, SchedulerConfig


def make(blocks=100, block_size=4, windows=(None,), caching=False, budget=64, seqs=8, max_model_len=128, lookahead=0):
    config = SchedulerConfig(budget, seqs, max_model_len, num_lookahead_tokens=lookahead)
    return Scheduler(config, KVCacheConfig(blocks, block_size, windows, caching))


def test_lookahead_counts_on_top_of_a_window():
    # Window 5, budget 4, pages of one token: 4 + 4 + 1 = 9 without lookahead; with 5 lookahead slots 14 are needed.
    make(10, 1, (5,), budget=4, seqs=1, max_model_len=40)
    with pytest.raises(ValueError, match="needs 14 KV blocks"):
        make(10, 1, (5,), budget=4, seqs=1, max_model_len=40, lookahead=5)
    scheduler = make(15, 1, (5,), budget=4, seqs=1, max_model_len=40, lookahead=5)
    request = Request("a", 30, 5)
    scheduler.add(request)
    for _ in range(30):
        step = scheduler.schedule()
        if not step.is_empty:
            scheduler.update(step)
    assert request.status is RequestStatus.FINISHED_LENGTH
    assert request.num_preemptions == 0


def test_drafts_leave_room_for_a_pending_token():
    scheduler = make()
    request = Request("a", 4, 2)
    scheduler.add(request)
    scheduler.schedule()
    # One token is being sampled and one more is left: there is nothing to draft.
    assert scheduler.set_drafts(request, 5) == 0


def test_no_drafts_while_a_verification_is_in_flight():
    scheduler = make()
    request = Request("a", 4, 20)
    scheduler.add(request)
    scheduler.update(scheduler.schedule())
    assert scheduler.set_drafts(request, 1) == 1
    scheduler.schedule()
    assert scheduler.set_drafts(request, 3) == 0
    assert scheduler.schedule().is_empty


def test_a_stop_token_at_the_limit_is_a_stop():
    scheduler = make()
    request = Request("a", 4, 1)
    scheduler.add(request)
    scheduler.update(scheduler.schedule(), stopped=[request])
    assert request.status is RequestStatus.FINISHED_STOPPED


@pytest.mark.parametrize("leap", [False, True])
def test_hashes_given_late_are_committed(leap):
    scheduler = make(caching=True)
    request = Request("a", 9, 20, [])
    scheduler.add(request)
    scheduler.update(scheduler.schedule())
    request.block_hashes = ["x", "y"]
    if leap:
        scheduler.advance(2)
    else:
        for _ in range(2):
            scheduler.update(scheduler.schedule())
    assert request.num_hashed_blocks == 2


def test_check_sees_a_null_block_among_the_free():
    scheduler = make()
    scheduler.kv.pool.release([1, 0])
    with pytest.raises(AssertionError):
        scheduler.check()
