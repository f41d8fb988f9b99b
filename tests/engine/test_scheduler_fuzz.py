"""Random loads against the scheduler: invariants after every step, and leaping against stepping."""

import random
from dataclasses import dataclass, replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.scheduling import KVCacheConfig, Request, RequestStatus, Scheduler, SchedulerConfig

SLOW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass
class Load:
    """Requests by the step before which they arrive, and aborts likewise."""

    arrivals: list[tuple[int, int, int, tuple]]  # (step, prompt, output, block hashes)
    aborts: list[tuple[int, int]]  # (step, index into arrivals)


@st.composite
def systems(draw):
    block_size = draw(st.sampled_from([1, 2, 4, 16]))
    windows = draw(st.sampled_from([(None,), (None,), (None, 6), (None, 3, 3), (5,)]))
    max_model_len = draw(st.integers(8, 60))
    budget = draw(st.integers(4, 40))
    seqs = draw(st.integers(1, min(budget, 8)))
    probe = KVCacheConfig(10, block_size, windows)
    needed = probe.max_pages(max_model_len, budget)
    num_blocks = needed + 1 + draw(st.integers(0, 2 * needed))
    cache = KVCacheConfig(num_blocks, block_size, windows, enable_prefix_caching=draw(st.booleans()))
    return SchedulerConfig(budget, seqs, max_model_len), cache


@st.composite
def loads(draw, max_model_len, block_size, outputs_hashed):
    count = draw(st.integers(1, 14))
    arrivals = []
    for _ in range(count):
        prompt = draw(st.integers(1, max_model_len - 1))
        output = draw(st.integers(1, 30))
        # Prompts share a few families of prefixes; hashes may go on into the output, as the engine's do.
        family, shared = draw(st.integers(0, 2)), draw(st.integers(0, 5))
        hashed = (prompt + (output if outputs_hashed else 0)) // block_size
        hashes = tuple((family, i) if i < shared else (len(arrivals), i) for i in range(hashed))
        arrivals.append((draw(st.integers(0, 40)), prompt, output, hashes))
    aborts = draw(st.lists(st.tuples(st.integers(0, 60), st.integers(0, count - 1)), max_size=4))
    return Load(sorted(arrivals), sorted(aborts))


def snapshot(scheduler, requests):
    """Everything that the next step could depend on."""
    pool = scheduler.kv.pool
    return (
        scheduler.num_steps,
        [r.request_id for r in scheduler.running],
        [r.request_id for r in scheduler.waiting],
        [
            (
                r.request_id,
                r.status,
                r.num_computed_tokens,
                r.num_in_flight_tokens,
                r.num_tokens,
                r.num_output_tokens,
                r.num_preemptions,
                r.num_hashed_blocks,
                [list(table) for table in r.block_tables],
            )
            for r in requests
        ],
        list(pool._blank),
        list(pool._retained),
        list(pool._references),
        [dict(index) for index in pool._index],
    )


def run(config, cache, load, leap, depth=1, drafts=0, seed=0):
    """Drive a scheduler to the end of its load. Returns a snapshot at each of the load's events, and the requests."""
    scheduler = Scheduler(config, cache)
    rng = random.Random(seed)
    requests = [Request(i, p, o, h) for i, (_, p, o, h) in enumerate(load.arrivals)]
    events = [(step, 0, i) for i, (step, *_) in enumerate(load.arrivals)]
    events += [(step, 1, i) for step, i in load.aborts]
    events.sort(reverse=True)
    snapshots, in_flight, added, idle = [], [], set(), 0
    for _ in range(20_000):  # far more than any of these loads needs
        while events and events[-1][0] <= scheduler.num_steps + idle:
            _, is_abort, index = events.pop()
            if not is_abort:
                scheduler.add(requests[index])
                added.add(index)
            elif index in added:
                scheduler.abort(requests[index])
            snapshots.append(snapshot(scheduler, requests))
        steps = scheduler.steady_steps() if leap else 0
        if events:
            steps = min(steps, events[-1][0] - scheduler.num_steps - idle)
        if steps > 1:
            scheduler.advance(steps)
            scheduler.check()
            continue
        step = scheduler.schedule()
        scheduler.check()
        assert step.shape.num_tokens <= config.max_num_batched_tokens
        if step.preempted:
            assert not step.admitted
        if not step.is_empty:
            in_flight.append(step)
        if in_flight and (len(in_flight) >= depth or step.is_empty):
            oldest = in_flight.pop(0)
            sampled = [rng.randint(1, query) for query, _ in oldest.shape.verifies]
            gained = oldest.decode_requests + oldest.verify_requests + oldest.prefill_requests
            scheduler.update(oldest, sampled)
            for request in gained:
                if drafts and request.status is RequestStatus.RUNNING and not request.num_in_flight_tokens:
                    scheduler.set_drafts(request, drafts)
            scheduler.check()
        elif step.is_empty:
            if not events:
                break
            idle += 1
    else:
        raise AssertionError("livelock")
    assert not scheduler.running and not scheduler.waiting
    assert scheduler.kv.pool.num_used == 0, "pages left behind"
    return [*snapshots, snapshot(scheduler, requests)], requests


def assert_all_ended(requests, config):
    for request in requests:
        if request.status is RequestStatus.ABORTED:
            assert request.num_output_tokens <= request.max_output_tokens
        else:
            assert request.status is RequestStatus.FINISHED_LENGTH
            assert request.num_output_tokens == request.max_output_tokens
        assert request.num_tokens == request.num_prompt_tokens + request.num_output_tokens <= config.max_model_len
        assert request.num_pending_tokens == request.num_in_flight_tokens == 0


@SLOW
@given(st.data())
def test_leaping_equals_stepping(data):
    config, cache = data.draw(systems())
    load = data.draw(loads(config.max_model_len, cache.block_size, data.draw(st.booleans())))
    depth = data.draw(st.integers(1, 2))
    stepped, requests = run(config, cache, load, leap=False, depth=depth)
    leapt, _ = run(config, cache, load, leap=True, depth=depth)
    assert leapt == stepped
    assert_all_ended(requests, config)


@SLOW
@given(st.data())
def test_steps_in_flight_lose_nothing(data):
    config, cache = data.draw(systems())
    load = data.draw(loads(config.max_model_len, cache.block_size, True))
    _, requests = run(config, cache, load, leap=False, depth=data.draw(st.integers(2, 3)))
    assert_all_ended(requests, config)


@SLOW
@given(st.data())
def test_speculation_loses_nothing(data):
    config, cache = data.draw(systems())
    load = data.draw(loads(config.max_model_len, cache.block_size, True))
    drafts = data.draw(st.integers(1, 5))
    lookahead = data.draw(st.sampled_from([0, drafts]))
    config = SchedulerConfig(
        config.max_num_batched_tokens, config.max_num_seqs, config.max_model_len, num_lookahead_tokens=lookahead
    )
    # The pool was drawn for steps without lookahead.
    cache = replace(cache, num_blocks=cache.num_blocks + lookahead * len(cache.windows))
    _, requests = run(config, cache, load, False, data.draw(st.integers(1, 2)), drafts, data.draw(st.integers(0, 99)))
    assert_all_ended(requests, config)


@SLOW
@given(st.data())
def test_same_load_same_blocks(data):
    config, cache = data.draw(systems())
    load = data.draw(loads(config.max_model_len, cache.block_size, True))
    assert run(config, cache, load, leap=True)[0] == run(config, cache, load, leap=True)[0]
