"""A sequence's tokens, limits, seeds and block hashes."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UserError
from engine.sampling_params import SamplingParams
from engine.scheduling import KVCacheConfig, RequestStatus, Scheduler, SchedulerConfig
from engine.sequence import Sequence

ROOT = Path(__file__).resolve().parent.parent.parent
# Few different tokens, so that prefixes coincide.
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=40)


def sequence(tokens, params=None, **settings) -> Sequence:
    settings = {"max_model_len": 1000, "block_size": 4, "hash_blocks": True, **settings}
    return Sequence("7", tokens, params or SamplingParams(), **settings)


# ---- block hashes --------------------------------------------------------------------------------------------------


@given(TOKENS, TOKENS, st.integers(1, 9))
def test_hashes_are_equal_exactly_where_all_tokens_so_far_are(left, right, block_size):
    ours = sequence(left, block_size=block_size).block_hashes
    theirs = sequence(right, block_size=block_size).block_hashes
    assert (len(ours), len(theirs)) == (len(left) // block_size, len(right) // block_size)
    for block in range(min(len(ours), len(theirs))):
        end = (block + 1) * block_size
        assert (ours[block] == theirs[block]) is (left[:end] == right[:end])
    assert len(set(ours)) == len(ours)  # the same tokens in another place are another block


@given(TOKENS, st.lists(TOKENS, max_size=6), st.integers(1, 9))
def test_hashes_do_not_depend_on_how_the_tokens_came(prompt, pieces, block_size):
    grown = sequence(prompt, block_size=block_size)
    for piece in pieces:
        grown.append(piece)
        assert len(grown.block_hashes) == len(grown.token_ids) // block_size
    whole = prompt + [token for piece in pieces for token in piece]
    assert grown.token_ids == whole
    assert grown.block_hashes == sequence(whole, block_size=block_size).block_hashes
    assert (grown.prompt_token_ids, grown.output_token_ids) == (prompt, whole[len(prompt) :])


def test_hashes_are_the_same_in_every_process():
    code = (
        "from engine.sequence import Sequence; from engine.sampling_params import SamplingParams; "
        "s = Sequence('7', range(9), SamplingParams(), max_model_len=99, block_size=4, hash_blocks=True); "
        "print([h.hex() for h in s.block_hashes], s.seed)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    here = sequence(range(9))
    assert done.stdout.strip() == f"{[each.hex() for each in here.block_hashes]} {here.seed}"
    assert all(len(each) == 16 for each in here.block_hashes)


def test_token_ids_beyond_16_bits_are_told_apart():
    assert sequence([1, 2, 3, 4]).block_hashes != sequence([1, 2, 3, 4 + 65536]).block_hashes


def test_no_hashes_without_prefix_caching():
    assert sequence(range(20), hash_blocks=False).block_hashes == []


def test_prefix_cache_finds_the_blocks_of_an_equal_prompt():
    scheduler = Scheduler(SchedulerConfig(64, 4, 100), KVCacheConfig(50, 4, enable_prefix_caching=True))
    first = sequence(list(range(10)))
    scheduler.add(first)
    step = scheduler.schedule()
    first.append([42])
    scheduler.update(step)
    second = sequence([*range(10), 99])
    scheduler.add(second)
    scheduler.schedule()
    assert second.num_cached_tokens == 8


# ---- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_tokens", "prompt", "expected"), [(16, 5, 16), (None, 5, 95), (200, 5, 95), (1, 99, 1), (None, 99, 1)]
)
def test_output_limit(max_tokens, prompt, expected):
    made = sequence(range(prompt), SamplingParams(max_tokens=max_tokens), max_model_len=100)
    assert made.max_output_tokens == expected
    assert made.num_prompt_tokens == made.num_tokens == prompt


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([], ("empty", "at least 1 token")),
        (range(100), ("100 tokens", "at most 99", "max_model_len 100")),
        ([3, -1], ("-1", "0 to 299")),
        ([3, 300, 301], ("300", "0 to 299")),
    ],
)
def test_prompts_that_cannot_run(tokens, words):
    with pytest.raises(UserError) as caught:
        sequence(tokens, max_model_len=100, vocab_size=300)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("ignore_eos", "own", "expected"),
    [(False, (), {2, 3}), (False, (9,), {2, 3, 9}), (True, (), set()), (True, (9, 2), {2, 9})],
)
def test_stop_ids(ignore_eos, own, expected):
    params = SamplingParams(ignore_eos=ignore_eos, stop_token_ids=own)
    assert sequence([1], params, eos_token_ids=(2, 3)).stop_ids == expected


def test_finish_reason_is_the_schedulers():
    made = sequence([1])
    assert made.finish_reason is None
    for status, reason in (("FINISHED_STOPPED", "stop"), ("FINISHED_LENGTH", "length"), ("ABORTED", "abort")):
        made.status = RequestStatus[status]
        assert made.finish_reason == reason
    made.status = RequestStatus.PREEMPTED
    assert made.finish_reason is None


# ---- seeds ---------------------------------------------------------------------------------------------------------


def seed_of(request_id, default_seed, seed=None) -> int:
    params = SamplingParams(seed=seed)
    return Sequence(request_id, [1], params, max_model_len=9, default_seed=default_seed).seed


def test_seeds():
    assert seed_of("0", 5, seed=11) == seed_of("1", 6, seed=11) == 11
    derived = [seed_of(str(request), default) for request in range(50) for default in range(3)]
    assert len(set(derived)) == len(derived)
    assert all(0 <= seed < 2**63 for seed in derived)
