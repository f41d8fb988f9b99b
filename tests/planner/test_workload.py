"""The workload itself: validation, slicing, page hashes, hit rate, bootstrap."""

from __future__ import annotations

import timeit

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import UserError
from planner.workload import MAX_TOKENS, Workload


def make(arrival_s, input_tokens=None, output_tokens=None, **more) -> Workload:
    n = len(arrival_s)
    ones = np.ones(n, np.int64)
    return Workload(
        "made",
        np.asarray(arrival_s, float),
        ones if input_tokens is None else np.asarray(input_tokens),
        ones if output_tokens is None else np.asarray(output_tokens),
        **more,
    )


def from_prompts(prompts: list[list[int]], block_tokens: int, arrival_s=None) -> Workload:
    """A workload whose chained ids are made from the prompts' tokens, partial last blocks included."""
    numbers: dict[tuple[int, ...], int] = {}
    rows = []
    for prompt in prompts:
        ends = [min(i + block_tokens, len(prompt)) for i in range(0, len(prompt), block_tokens)]
        rows.append(np.array([numbers.setdefault(tuple(prompt[:end]), len(numbers)) for end in ends], np.int64))
    return make(
        np.arange(len(prompts)) if arrival_s is None else arrival_s,
        [len(prompt) for prompt in prompts],
        prefix_block_hashes=tuple(rows),
        prefix_block_tokens=block_tokens,
    )


workloads = st.lists(
    st.tuples(st.floats(0, 50), st.integers(1, 5000), st.integers(1, 900)), min_size=1, max_size=60
).map(
    lambda gaps: make(
        np.cumsum([gap[0] for gap in gaps]),
        [gap[1] for gap in gaps],
        [gap[2] for gap in gaps],
        session=np.arange(len(gaps)) % 7,
    )
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrival_s": []}, "no requests"),
        ({"arrival_s": [0.0, np.nan]}, "finite"),
        ({"arrival_s": [0.0, np.inf]}, "finite"),
        ({"arrival_s": [1.0, 0.5]}, "sorted"),
        ({"arrival_s": [-1.0, 0.5]}, "not negative"),
        ({"input_tokens": [3]}, "2 requests but 1 values of input_tokens"),
        ({"input_tokens": [3, 0]}, "request 1 has 0 input_tokens"),
        ({"output_tokens": [-4, 1]}, "request 0 has -4 output_tokens"),
        ({"output_tokens": [1.5, 1]}, "whole numbers"),
        ({"input_tokens": [1, MAX_TOKENS + 1]}, "request 1"),
        ({"session": [1, 2, 3]}, "3 values of session"),
        ({"prefix_block_hashes": ([1], [2])}, "prefix_block_tokens"),
        ({"prefix_block_hashes": ([1],), "prefix_block_tokens": 4}, "2 requests but 1 id lists"),
        ({"prefix_block_hashes": ([1], [-2]), "prefix_block_tokens": 4}, "prefix ids outside"),
        ({"prefix_block_hashes": ([1], [2, 3]), "prefix_block_tokens": 4}, "request 1 has 2 prefix ids of 4 tokens"),
    ],
)
def test_bad_arrays_are_refused(change, message):
    arguments = {"arrival_s": [0.0, 1.0], "input_tokens": [3, 4], "output_tokens": [1, 1], **change}
    with pytest.raises(UserError, match=message):
        Workload("made", **{key: np.array(v) if key.endswith(("_s", "tokens")) and not np.isscalar(v) else v
                            for key, v in arguments.items()})  # fmt: skip


def test_arrays_are_read_only_copies():
    arrivals = np.array([0.0, 1.0])
    workload = make(arrivals, session=np.array([4, 4]))
    arrivals[1] = -5
    assert workload.arrival_s.tolist() == [0.0, 1.0]
    for array in (workload.arrival_s, workload.input_tokens, workload.output_tokens, workload.session):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 3
    with pytest.raises(ValueError, match="read-only"):
        from_prompts([[1, 2]], 1).prefix_block_hashes[0][0] = 9


def test_counts_and_rates_by_hand():
    workload = make([0.0, 1.0, 3.0, 4.0], [10, 20, 30, 40], [1, 2, 3, 4])
    assert (len(workload), workload.num_requests, workload.duration_s, workload.request_rate) == (4, 4, 4.0, 1.0)
    summary = workload.summary()
    assert summary.interarrival_cv == pytest.approx(np.sqrt(2 / 9) / (4 / 3))
    assert (summary.input_tokens.mean, summary.input_tokens.p50, summary.input_tokens.max) == (25.0, 25.0, 40)
    assert summary.output_tokens.p95 == pytest.approx(3.85)
    assert summary.infinite_cache_hit_rate is None
    assert "4 requests in 4 s" in repr(workload)


def test_all_at_once_has_infinite_rate_and_a_summary_in_json():
    workload = make([0.0, 0.0])
    assert workload.request_rate == float("inf")
    assert workload.summary().request_rate_per_s is None
    assert workload.summary().interarrival_cv is None
    assert '"request_rate_per_s":null' in workload.summary().model_dump_json()
    assert workload.resampled(1).duration_s == 0


@given(workloads, st.floats(0.01, 100))
def test_scaling_divides_arrivals_and_keeps_requests(workload, scale):
    scaled = workload.scaled(scale)
    np.testing.assert_array_equal(scaled.arrival_s, workload.arrival_s / scale)
    np.testing.assert_array_equal(scaled.input_tokens, workload.input_tokens)
    np.testing.assert_array_equal(scaled.session, workload.session)


@given(workloads, st.floats(0, 1000), st.floats(0, 1000))
def test_window_keeps_exactly_the_arrivals_inside(workload, start_s, length_s):
    end_s = start_s + length_s
    inside = (workload.arrival_s >= start_s) & (workload.arrival_s < end_s)
    if not inside.any():
        with pytest.raises(UserError, match="no request"):
            workload.window(start_s, end_s)
        return
    window = workload.window(start_s, end_s)
    np.testing.assert_array_equal(window.arrival_s, workload.arrival_s[inside] - start_s)
    np.testing.assert_array_equal(window.output_tokens, workload.output_tokens[inside])
    np.testing.assert_array_equal(window.session, workload.session[inside])


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf")])
def test_scale_must_be_positive(scale):
    with pytest.raises(UserError, match="rate scale"):
        make([0.0, 1.0]).scaled(scale)


def test_head():
    workload = from_prompts([[1, 2], [1, 2, 3], [5]], 2)
    head = workload.head(2)
    assert head.arrival_s.tolist() == [0.0, 1.0]
    assert [row.tolist() for row in head.prefix_block_hashes] == [[0], [0, 1]]
    assert len(workload.head(99)) == 3
    with pytest.raises(UserError, match="at least 1"):
        workload.head(0)


# Two letters and short prompts make shared prefixes of every length frequent.
prompts = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=24), min_size=1, max_size=8)


@settings(max_examples=300)
@given(prompts, st.integers(1, 9), st.integers(1, 9))
def test_pages_share_a_hash_exactly_when_the_trace_says_their_prefixes_are_equal(prompts, block_tokens, block_size):
    workload = from_prompts(prompts, block_tokens)
    pages = [workload.page_hashes(i, block_size) for i in range(len(prompts))]
    for a, prompt in enumerate(prompts):
        assert len(pages[a]) == len(prompt) // block_size
        for b, other in enumerate(prompts):
            for p, mine in enumerate(pages[a]):
                for q, theirs in enumerate(pages[b]):
                    end = (p + 1) * block_size
                    # The trace knows equality at the end of the block in which the page ends, no finer.
                    known = -(-end // block_tokens) * block_tokens
                    equal = p == q and prompt[:known] == other[:known]
                    assert (mine == theirs) == equal


@given(prompts, st.integers(1, 9))
def test_hit_rate_counts_the_pages_that_an_earlier_request_had(prompts, block_tokens):
    workload = from_prompts(prompts, block_tokens)
    for block_size in (block_tokens, 1, 4):
        seen, hits = set(), 0
        for i, prompt in enumerate(prompts):
            pages = workload.page_hashes(i, block_size)
            cacheable = pages[: (len(prompt) - 1) // block_size]
            hits += block_size * sum(page in seen for page in cacheable)
            seen.update(pages)
        assert workload.infinite_cache_hit_rate(block_size) == pytest.approx(hits / sum(map(len, prompts)))
    assert workload.infinite_cache_hit_rate() == workload.infinite_cache_hit_rate(block_tokens)


def test_page_hashes_by_hand():
    ids = (np.array([5, 9]), np.array([5]))
    workload = make([0, 1], [16, 16], prefix_block_hashes=ids, prefix_block_tokens=8)
    # Pages of 5 tokens end at 5, 10 and 15: in blocks 0, 1 and 1.
    first, second = workload.page_hashes(0, 5), workload.page_hashes(1, 5)
    assert first == [5 << 24, (9 << 24) | 1, (9 << 24) | 2]
    assert second[0] == first[0]
    assert all(page < 0 for page in second[1:]), "tokens past the last id are nobody else's"
    assert make([0]).page_hashes(0, 16) is None
    with pytest.raises(UserError, match="block size"):
        workload.page_hashes(0, 0)


def test_largest_id_still_fits():
    ids = (np.array([2**39 - 1]), np.array([2**39 - 2]))
    workload = make([0, 0], [MAX_TOKENS] * 2, prefix_block_hashes=ids, prefix_block_tokens=MAX_TOKENS)
    a, b = workload.page_hashes(0, 1000), workload.page_hashes(1, 1000)
    assert (a[0], a[-1]) == ((2**39 - 1) << 24, ((2**39 - 1) << 24) + 16776)
    assert len(set(a) | set(b)) == 2 * 16777


def test_page_hashes_are_fast():
    workload = make([0], [12_000], prefix_block_hashes=(np.arange(24),), prefix_block_tokens=512)
    seconds = min(timeit.repeat(lambda: workload.page_hashes(0, 16), number=50, repeat=5)) / 50
    assert seconds < 200e-6, "about 20 µs on an idle machine; ten times that is a regression"


@given(workloads, st.integers(0, 2**32), st.floats(1, 200))
def test_resampling_keeps_duration_and_draws_only_what_was_there(workload, seed, block_s):
    drawn = workload.resampled(seed, block_s)
    assert drawn.duration_s <= workload.duration_s * (1 + 1e-9)
    there = set(
        zip(workload.input_tokens.tolist(), workload.output_tokens.tolist(), workload.session.tolist(), strict=True)
    )
    assert there.issuperset(
        zip(drawn.input_tokens.tolist(), drawn.output_tokens.tolist(), drawn.session.tolist(), strict=True)
    )
    again = workload.resampled(seed, block_s)
    assert again.arrival_s.tobytes() == drawn.arrival_s.tobytes()
    assert again.input_tokens.tobytes() == drawn.input_tokens.tobytes()


def test_resampling_expects_every_request_once():
    """Also those at the two ends. The count of one request over seeds has a variance below 2 (binomial-like)."""
    workload = make(np.linspace(0, 100, 21), np.arange(1, 22))
    seeds = 2000
    counts = np.zeros(22)
    for seed in range(seeds):
        counts += np.bincount(workload.resampled(seed, 7.0).input_tokens, minlength=22)
    np.testing.assert_allclose(counts[1:] / seeds, 1.0, atol=5 * np.sqrt(2 / seeds))


def test_resampling_keeps_offsets_inside_a_block():
    """Pairs of requests 0.25 s apart stay so, except where a block's edge cuts a pair."""
    pairs = np.sort(np.concatenate([np.arange(0, 1000, 10.0), np.arange(0, 1000, 10.0) + 0.25]))
    gaps = np.diff(make(pairs).resampled(3, 100.0).arrival_s)
    assert np.isclose(gaps, 0.25).sum() >= 90
    with pytest.raises(UserError, match="bootstrap block"):
        make(pairs).resampled(3, 0)


@settings(max_examples=100)
@given(prompts, st.integers(0, 1000), st.integers(1, 5))
def test_resampled_prefix_ids_stay_chained(prompts, seed, block_tokens):
    workload = from_prompts(prompts, block_tokens, np.arange(len(prompts)) * 10.0)
    drawn = workload.resampled(seed, 25.0)
    before: dict[int, tuple[int, ...]] = {}
    for row in drawn.prefix_block_hashes:
        for end in range(1, row.size + 1):
            path = tuple(row[:end].tolist())
            assert before.setdefault(path[-1], path) == path


def test_a_repeated_stretch_brings_new_prompts_but_keeps_what_it_shared():
    """Prompts in pairs: the second of a pair shares 8 of its 9 tokens, a resample must not turn repeats into hits."""
    rng = np.random.default_rng(0)
    prompts = []
    for _ in range(300):
        prompt = rng.integers(10**6, size=9).tolist()
        prompts += [prompt, [*prompt[:8], 0]]
    workload = from_prompts(prompts, 4, np.arange(600) * 1.0)
    assert workload.infinite_cache_hit_rate() == pytest.approx(0.5 * 8 / 9)
    rates = [workload.resampled(seed).infinite_cache_hit_rate() for seed in range(20)]
    # Only a pair cut by one of the ten blocks' edges is lost.
    assert np.mean(rates) == pytest.approx(0.5 * 8 / 9, abs=0.02)
    common = from_prompts([[1, 2, 3, 4, i] for i in range(600)], 4, np.arange(600) * 1.0)
    assert common.resampled(0).infinite_cache_hit_rate() > 0.75, "a prefix that all have stays shared"
