"""The Python API, over a core without a model: what goes in, what comes out, and what is left behind."""

import itertools
import os
import signal

import numpy as np
import pytest
import torch
from fake_core import EOS, VOCAB_SIZE, FakeCore, next_token
from hypothesis import given
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.errors import UserError
from engine.llm import LLM
from engine.sampling_params import SamplingParams
from engine.tokenizer import ByteTokenizer

PROMPTS = ["Hello", "The memory wall is", "x", "größer 🙂", "Hello"] * 3


@pytest.fixture
def llm():
    made = LLM.from_core(FakeCore())
    yield made
    made.core.check_idle()
    assert made._live == {}


def continuation(prompt: list[int], count: int, stops: set[int] = frozenset({EOS})) -> list[int]:
    """What the fake model says behind a prompt."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(next_token(tokens))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


# ---- generate ------------------------------------------------------------------------------------------------------


def test_outputs_are_in_the_order_of_the_prompts(llm):
    params = [SamplingParams(max_tokens=1 + 7 * i % 23) for i in range(len(PROMPTS))]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    tokenizer = ByteTokenizer()
    for prompt, each, output in zip(PROMPTS, params, outputs, strict=True):
        assert (output.prompt, output.prompt_token_ids) == (prompt, tokenizer.encode(prompt))
        (completion,) = output.outputs
        expected = continuation(output.prompt_token_ids, each.max_tokens)
        assert completion.token_ids == expected
        stopped = expected[-1] == EOS
        assert completion.finish_reason == ("stop" if stopped else "length")
        assert completion.text == tokenizer.decode(expected)
        assert output.finished
        assert output.num_cached_tokens == 0
    assert len({output.request_id for output in outputs}) == len(PROMPTS)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("Hi", [[256, 72, 105]]),
        (["Hi", "H"], [[256, 72, 105], [256, 72]]),
        ([5, 6, 7], [[5, 6, 7]]),
        ((5, 6, 7), [[5, 6, 7]]),
        ([[5, 6], (7,)], [[5, 6], [7]]),
        ({"prompt": "H"}, [[256, 72]]),
        ({"prompt_token_ids": [5]}, [[5]]),
        ([{"prompt_token_ids": [5]}, "H", {"prompt": "i", "prompt_token_ids": None}], [[5], [256, 72], [256, 105]]),
        ([], []),
        (np.array([5, 6], np.int32), [[5, 6]]),
        ([np.int64(5), np.uint8(6)], [[5, 6]]),
        (torch.tensor([5, 6]), [[5, 6]]),
        (np.array([[5, 6], [7, 8]]), [[5, 6], [7, 8]]),
        ([np.array([5]), torch.tensor([6, 7], dtype=torch.int16), "H", [np.int64(8)]], [[5], [6, 7], [256, 72], [8]]),
        ({"prompt_token_ids": np.array([5])}, [[5]]),
        (np.array(["Hi", "H"]), [[256, 72, 105], [256, 72]]),
    ],
    ids=str,
)
def test_forms_of_prompts(llm, prompts, expected):
    outputs = llm.generate(prompts, SamplingParams(max_tokens=2), use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == expected
    assert {type(token) for output in outputs for token in output.prompt_token_ids} <= {int}


def test_max_tokens_none_goes_to_max_model_len(llm):
    (output,) = llm.generate("Hello", SamplingParams(max_tokens=None, ignore_eos=True), use_tqdm=False)
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == llm.core.max_model_len
    assert output.outputs[0].finish_reason == "length"
    (default,) = llm.generate("Hello", use_tqdm=False)
    assert len(default.outputs[0].token_ids) == 16


def test_a_stop_token_is_in_the_tokens_and_not_in_the_text(llm):
    prompt = ByteTokenizer().encode("Hello")
    free = continuation(prompt, 12, set())
    stop = next(token for token in free[4:] if token not in free[:4])
    params = SamplingParams(max_tokens=12, stop_token_ids=(stop,), ignore_eos=True)
    (output,) = llm.generate("Hello", params, use_tqdm=False)
    expected = free[: free.index(stop) + 1]
    assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == (expected, "stop")
    assert output.outputs[0].text == ByteTokenizer().decode(expected[:-1])


def test_without_detokenising(llm):
    (output,) = llm.generate("Hello", SamplingParams(detokenize=False), use_tqdm=False)
    assert output.outputs[0].text == ""
    assert output.outputs[0].token_ids


def test_progress_goes_to_stderr(llm, capsys):
    llm.generate(["a", "b"], SamplingParams(max_tokens=2))
    out, err = capsys.readouterr()
    assert out == ""
    assert "2/2" in err
    llm.generate(["a", "b"], SamplingParams(max_tokens=2), use_tqdm=False)
    assert capsys.readouterr() == ("", "")


def test_metrics(llm):
    (output,) = llm.generate("a", SamplingParams(max_tokens=5, ignore_eos=True), use_tqdm=False)
    metrics = output.metrics
    # The fake engine's clock ticks once per step.
    assert metrics.ttft_s == pytest.approx(1)
    assert metrics.tpot_s == pytest.approx(1)
    assert metrics.e2el_s == pytest.approx(5)
    (output,) = llm.generate("a", SamplingParams(max_tokens=1), use_tqdm=False)
    assert output.metrics.tpot_s is None


# ---- stop strings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("includes_stop", [False, True])
def test_a_stop_string_ends_a_text(includes_stop, depth):
    llm = LLM.from_core(FakeCore(depth=depth))
    prompt = ByteTokenizer().encode("Hello")
    tokens = continuation(prompt, 30, set())
    whole = ByteTokenizer().decode(tokens)
    stop = whole[9:12]
    end = whole.index(stop) + (len(stop) if includes_stop else 0)
    params = SamplingParams(
        max_tokens=30, ignore_eos=True, stop=["no such", stop], include_stop_str_in_output=includes_stop
    )
    (output,) = llm.generate("Hello", params, use_tqdm=False)
    (completion,) = output.outputs
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (whole[:end], "stop", stop)
    needed = next(i for i in range(31) if stop in ByteTokenizer().decode(tokens[:i]))
    assert completion.token_ids == tokens[:needed]
    assert output.metrics.num_output_tokens == needed
    llm.core.check_idle()
    shown = ""
    for output in llm.stream("Hello", params):
        assert output.outputs[0].text.startswith(shown)
        shown = output.outputs[0].text
    assert (shown, output.finished) == (whole[:end], True)
    llm.core.check_idle()


def test_a_stop_string_completed_by_the_last_token_is_the_reason(llm):
    prompt = ByteTokenizer().encode("Hello")
    tokens = continuation(prompt, 12, set())
    stop = ByteTokenizer().decode(tokens)[-2:]
    (output,) = llm.generate("Hello", SamplingParams(max_tokens=12, ignore_eos=True, stop=stop), use_tqdm=False)
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)


def test_the_stop_token_is_the_reason(llm):
    prompt = ByteTokenizer().encode("Hello")
    stop = continuation(prompt, 5, set())[-1]
    params = SamplingParams(max_tokens=30, stop_token_ids=(stop,), ignore_eos=True)
    (output,) = llm.generate("Hello", params, use_tqdm=False)
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)


# ---- several continuations -----------------------------------------------------------------------------------------


def ending_apart(core: FakeCore) -> None:
    """Continuation i of a request ends behind 3 + 2i tokens, by max_tokens of its own."""
    usual = core.add

    def add(sequence):
        index, _, _ = sequence.request_id.partition("_")
        sequence.max_output_tokens = 3 + 2 * int(index)
        usual(sequence)

    core.add = add


def test_n_continuations(llm):
    ending_apart(llm.core)
    params = SamplingParams(n=3, seed=7, ignore_eos=True)
    outputs = llm.generate(["a", "b"], params, use_tqdm=False)
    for prompt, output in zip("ab", outputs, strict=True):
        tokens = continuation([256, ord(prompt)], 7, set())
        assert output.finished
        assert [each.index for each in output.outputs] == [0, 1, 2]
        assert [each.token_ids for each in output.outputs] == [tokens[:3], tokens[:5], tokens]
        assert [each.finish_reason for each in output.outputs] == ["length"] * 3
        assert output.metrics.num_output_tokens == 7
        assert output.metrics.ttft_s <= output.metrics.e2el_s


def test_a_stream_of_n_continuations_is_finished_with_the_last(llm):
    ending_apart(llm.core)
    outputs = list(llm.stream("a", SamplingParams(n=3, ignore_eos=True)))
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert {output.request_id for output in outputs} == {"0"}
    reasons = [[each.finish_reason for each in output.outputs] for output in outputs]
    assert reasons[-1] == ["length"] * 3
    assert ["length", None, None] in reasons
    assert ["length", "length", None] in reasons
    for before, after in itertools.pairwise(outputs):
        for earlier, later in zip(before.outputs, after.outputs, strict=True):
            assert later.text.startswith(earlier.text)
            assert len(earlier.token_ids) <= len(later.token_ids) <= len(earlier.token_ids) + 1


def test_abort_ends_all_continuations_and_keeps_the_reasons_there_were(llm):
    ending_apart(llm.core)
    for output in llm.stream("a", SamplingParams(n=3, ignore_eos=True)):
        if output.outputs[0].finish_reason:
            assert llm.abort("0") is (not output.finished)
    assert [each.finish_reason for each in output.outputs] == ["length", "abort", "abort"]
    assert output.finished


def test_continuations_have_ids_and_seeds_of_their_own():
    seeds = {}
    for seed in (None, 11):
        llm, added = LLM.from_core(FakeCore()), []
        usual = llm.core.add
        llm.core.add = lambda sequence, add=usual, into=added: into.append(sequence) or add(sequence)
        llm.generate("a", SamplingParams(n=4, seed=seed), use_tqdm=False)
        assert len({sequence.request_id for sequence in added}) == 4
        seeds[seed] = [sequence.seed for sequence in added]
    assert seeds[11] == [11, 12, 13, 14]
    assert len(set(seeds[None])) == 4


# ---- bad prompts ---------------------------------------------------------------------------------------------------

BAD_PROMPTS = [
    ("", ("empty",)),
    ([], ("empty",)),
    ("x" * 63, ("64 tokens", "at most 63", "max_model_len 64")),
    ([VOCAB_SIZE], ("259", "0 to 258")),
    ([-1], ("-1",)),
    ([1.5], ("whole numbers",)),
    (["text"], ("whole numbers",)),
    ([True, False], ("whole numbers", "True")),
    ([[1, 2]], ("whole numbers",)),
    (np.array([0.5]), ("whole numbers",)),
    (torch.tensor([True]), ("whole numbers", "True")),
    ({"prompt_token_ids": "abc"}, ('"prompt_token_ids"', "list of token ids")),
    ({"prompt_token_ids": 5}, ("int",)),
    (b"bytes", ("bytes",)),
    ([10**20], ("0 to 258",)),
    (3.5, ("float",)),
    (None, ("NoneType",)),
    ({}, ('"prompt"', '"prompt_token_ids"')),
    ("half \ud83d", ("surrogate",)),
]


@pytest.mark.parametrize(("bad", "words"), BAD_PROMPTS, ids=lambda value: str(value)[:20])
def test_a_bad_prompt_is_named_before_anything_runs(llm, bad, words):
    llm.core.on_step = lambda: pytest.fail("it ran")
    for call in (llm.generate, llm.stream):
        with pytest.raises(UserError) as caught:
            call(["fine", "fine too", bad])
        for word in ("prompt 2:", *words):
            assert word in str(caught.value)
    assert not llm.core.has_work


def test_bad_arguments(llm):
    with pytest.raises(UserError, match="2 sampling_params for 3 prompts"):
        llm.generate(["a", "b", "c"], [SamplingParams()] * 2)
    with pytest.raises(UserError, match="prompts is int"):
        llm.generate(7)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (42, "sampling_params is int"),
        ("greedy", "sampling_params is str"),
        ({"temperature": 0}, "sampling_params is dict; it must be SamplingParams"),
        ([42], "prompt 0: its sampling_params is int; it must be SamplingParams"),
        ([None], "prompt 0: its sampling_params is NoneType"),
    ],
    ids=str,
)
def test_sampling_params_of_another_type(llm, params, words):
    for call in (llm.generate, llm.stream):
        with pytest.raises(UserError, match=words):
            call("a", params)


def test_a_refused_call_does_not_change_the_seeds_of_later_ones():
    seeds = []
    for bad in ([], ["fine", "fine", ""], ["x" * 99], [VOCAB_SIZE]):
        llm, of_this = LLM.from_core(FakeCore()), []
        seeds.append(of_this)
        usual = llm.core.add
        llm.core.add = lambda sequence, add=usual, into=of_this: into.append(sequence.seed) or add(sequence)
        if bad:
            with pytest.raises(UserError):
                llm.generate(bad)
        llm.generate(["a", "b"], use_tqdm=False)
    assert seeds == [seeds[0]] * 4
    assert len(set(seeds[0])) == 2


def test_without_chunked_prefill_a_prompt_must_fit_one_step():
    config = EngineConfig(model="none", max_num_seqs=4, max_num_batched_tokens=16, enable_chunked_prefill=False)
    with pytest.raises(UserError, match="prompt 1: the prompt has 17 tokens, more than max_num_batched_tokens 16"):
        LLM.from_core(FakeCore(config)).stream(["a" * 15, "a" * 16])


def test_a_prompt_that_the_core_refuses_leaves_nothing_behind(llm):
    usual, added = llm.core.add, []

    def add(sequence):
        if len(added) == 2:
            raise UserError("no")
        added.append(sequence)
        usual(sequence)

    llm.core.add = add
    with pytest.raises(UserError, match="prompt 2: no"):
        llm.generate(["a", "b", "c"])


def test_model_options_are_checked():
    with pytest.raises(UserError, match="max_num_seqs is 0"):
        LLM("nowhere", max_num_seqs=0)
    with pytest.raises(UserError, match=r"no option max_num_seq; did you mean max_num_seqs\?"):
        LLM("nowhere", max_num_seq=1)
    with pytest.raises(UserError, match="no option zzz; there are load_format, "):
        LLM("nowhere", zzz=1)
    for model in (None, 5, ["tiny"], ""):
        with pytest.raises(UserError, match="model is "):
            LLM(model)


# ---- streams -------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.text(max_size=8), st.integers(1, 30)), min_size=1, max_size=9))
def test_streams_grow_to_what_generate_gives(wanted):
    llm = LLM.from_core(FakeCore())
    prompts = [f"p{text.encode('utf-8', 'ignore').decode()}" for text, _ in wanted]
    params = [SamplingParams(max_tokens=count) for _, count in wanted]
    seen: dict[str, list] = {}
    for output in llm.stream(prompts, params):
        seen.setdefault(output.request_id, []).append(output)
    whole = llm.generate(prompts, params, use_tqdm=False)
    for outputs, final in zip([seen[str(i)] for i in range(len(prompts))], whole, strict=True):
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert outputs[-1].outputs[0] == final.outputs[0]
        for before, after in itertools.pairwise(outputs):
            assert after.outputs[0].text.startswith(before.outputs[0].text)
            assert len(after.outputs[0].token_ids) == len(before.outputs[0].token_ids) + 1
            assert before.outputs[0].finish_reason is None
    llm.core.check_idle()


def test_interleaved_streams_get_their_own_outputs(llm):
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    first, second = llm.stream(["a", "b"], params), llm.stream(["c"], params)
    got = {0: [], 1: []}
    got[0].append(next(first))
    got[1].append(next(second))
    (between,) = llm.generate("d", params, use_tqdm=False)
    got[1].extend(second)
    got[0].extend(first)
    assert {output.prompt for output in got[0]} == {"a", "b"}
    assert {output.prompt for output in got[1]} == {"c"}
    assert (len(got[0]), len(got[1])) == (40, 20)
    assert between.outputs[0].token_ids == continuation([256, 100], 20, set())


def test_abort(llm):
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    finals = {}
    for count, output in enumerate(llm.stream(["a", "b", "c"], params)):
        if count == 10:
            assert llm.abort("1") is True
            assert llm.abort("1") is False
        if output.finished:
            finals[output.prompt] = output.outputs[0]
    assert [finals[prompt].finish_reason for prompt in "abc"] == ["length", "abort", "length"]
    assert 0 < len(finals["b"].token_ids) < 30
    for prompt in "abc":
        expected = continuation([256, ord(prompt)], 30, set())
        assert finals[prompt].token_ids == expected[: len(finals[prompt].token_ids)]
        assert finals[prompt].text == ByteTokenizer().decode(finals[prompt].token_ids)
    assert llm.abort("1") is False
    assert llm.abort("no such request") is False


def test_a_stream_that_is_never_read_queues_nothing(llm):
    llm.stream(["a", "b"])
    assert not llm.core.has_work


def test_a_stream_that_is_closed_aborts_its_requests_only(llm):
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    other = llm.stream("other", params)
    next(other)
    closed = llm.stream(["a", "b"], params)
    next(closed)
    closed.close()
    assert [output.prompt for output in other] == ["other"] * 19


def test_an_error_in_the_engine_leaves_nothing_behind(llm):
    steps = []

    def fail():
        steps.append(1)
        if len(steps) == 3:
            raise RuntimeError("device lost")

    llm.core.on_step = fail
    with pytest.raises(RuntimeError, match="device lost"):
        llm.generate(["a", "b"], SamplingParams(max_tokens=9, ignore_eos=True), use_tqdm=False)


def test_ctrl_c_waits_for_the_step_and_aborts(llm):
    steps = []

    def press():
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    llm.core.on_step = press
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], SamplingParams(max_tokens=9, ignore_eos=True), use_tqdm=False)
    assert len(steps) == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    llm.core.check_idle()
    llm.core.on_step = lambda: None
    (output,) = llm.generate("a", use_tqdm=False)
    assert output.outputs[0].token_ids == continuation([256, 97], 16)


@pytest.fixture
def ahead():
    """Around a core that is a step ahead, as on a GPU."""
    made = LLM.from_core(FakeCore(depth=2))
    yield made
    made.core.check_idle()


def test_a_core_that_is_a_step_ahead_gives_the_same(llm, ahead):
    params = SamplingParams(max_tokens=20)
    texts = [[output.outputs[0] for output in each.generate(PROMPTS, params, use_tqdm=False)] for each in (llm, ahead)]
    assert texts[0] == texts[1]


def test_nothing_is_in_flight_behind_a_stop_token(ahead):
    prompt = ByteTokenizer().encode("Hello")
    stop = continuation(prompt, 5, set())[-1]
    params = SamplingParams(max_tokens=30, stop_token_ids=(stop,), ignore_eos=True)
    (output,) = ahead.generate("Hello", params, use_tqdm=False)
    assert output.outputs[0].finish_reason == "stop"
    ahead.core.check_idle()


def test_nothing_is_in_flight_behind_a_stream_whose_requests_were_aborted(ahead):
    stream = ahead.stream(["a", "b"], SamplingParams(max_tokens=30, ignore_eos=True))
    for _ in range(4):
        next(stream)
    assert ahead.abort("0")
    assert ahead.abort("1")
    assert [output.outputs[0].finish_reason for output in stream if output.finished] == ["abort", "abort"]
    ahead.core.check_idle()


def test_a_call_that_ends_leaves_the_steps_of_others_alone(ahead):
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    other = ahead.stream("other", params)
    next(other)
    closed = ahead.stream(["a", "b"], params)
    next(closed)
    closed.close()
    assert ahead.core.has_work
    assert [output.prompt for output in other] == ["other"] * 19


def test_an_engine_that_cannot_go_on_says_why(llm):
    def fail():
        raise RuntimeError("device lost" if llm.core.scheduler.num_outstanding else "a step of this engine failed")

    llm.core.on_step = fail
    llm.core._in_flight.append(None)  # what a failed step leaves
    with pytest.raises(RuntimeError, match="device lost"):
        llm.generate("a", use_tqdm=False)
    llm.core._in_flight.clear()


def test_an_idle_engine_is_not_waited_for(llm):
    llm.core.add = llm.core.abort = lambda sequence: None
    with pytest.raises(RuntimeError, match="idle"):
        llm.generate("a", use_tqdm=False)


def test_a_small_cache_changes_nothing():
    config = EngineConfig(model="no such folder", max_num_seqs=4, max_num_batched_tokens=16)
    plenty, scarce = (LLM.from_core(FakeCore(config, num_blocks=blocks)) for blocks in (100, 9))
    params = SamplingParams(max_tokens=40)
    texts = [[o.outputs[0].text for o in llm.generate(PROMPTS, params, use_tqdm=False)] for llm in (plenty, scarce)]
    assert texts[0] == texts[1]
    assert scarce.core.scheduler.num_preemptions > 0
