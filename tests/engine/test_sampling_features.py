"""Penalties, bias, min_tokens and log-probabilities in the engine, against transformers and formulas in float64."""

import numpy as np
import pytest
import torch
from models_for_tests import VOCAB_SIZE
from running import LogitsLog, Models, adjusted_logits, adjusted_rows, engine, prompts, reference_logits, request, run

from engine.core import EngineCore
from engine.errors import UserError
from engine.llm import LLM
from engine.sampling import LogitsProcessor, Plan, penalise_, read_logprobs, token_logprobs
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.tokenizer import NumberTokenizer
from kernels.reference.sampling import sample

# One of each kind, and all together.
PENALTIES = (
    {"repetition_penalty": 1.4},
    {"frequency_penalty": 1.5},
    {"presence_penalty": -1.2},
    {"repetition_penalty": 0.8, "frequency_penalty": 0.7, "presence_penalty": 1.9},
)
ADJUSTED = (
    *PENALTIES,
    {"logit_bias": {7: 8.0, 60: -100.0, 198: 3.0}},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5, "logit_bias": {7: 9.0, 8: 9.0}, "min_tokens": 5},
)
LENGTHS = (1, 20, 33, 50, 7, 90)
TIGHT = 1e-4


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def adjusted_requests(core: EngineCore, lengths=LENGTHS, **params) -> list[Sequence]:
    chosen = zip(prompts(lengths), ADJUSTED, strict=True)
    return [request(core, i, prompt, **{**each, **params}) for i, (prompt, each) in enumerate(chosen)]


# ---- penalties, bias, min_tokens: what the tokens are --------------------------------------------------------------


@pytest.mark.parametrize("case", ["roomy", "chunked", "tight", "not ahead"])
def test_greedy_tokens_are_the_largest_of_the_adjusted_logits_of_transformers(case, models):
    """By induction over the engine's own output; after preemptions, with chunks, and a step ahead of the host."""
    folder, model = models("llama")
    settings = {"roomy": {}, "chunked": {"max_num_batched_tokens": 24}, "not ahead": {"async_scheduling": False}}
    chosen = settings.get(case)
    if case == "tight":
        with engine(folder) as core:
            chosen = {"num_gpu_blocks_override": core.memory.blocks_per_sequence + 1, "max_num_batched_tokens": 40}
    with engine(folder, **chosen) as core:
        requests = adjusted_requests(core, max_tokens=40)
        run(core, requests)
        assert (core.scheduler.num_preemptions > 0) == (case == "tight")
    changed = 0
    for each in requests:
        raw = reference_logits(model, each)
        wanted = adjusted_rows(raw, each)
        best = wanted.max(-1)
        taken = wanted.gather(1, torch.tensor(each.output_token_ids)[:, None])[:, 0]
        assert float((best.values - taken).max()) < TIGHT
        changed += int((raw.argmax(-1) != best.indices).sum())
    assert changed > len(requests) * 5  # what is tested has an effect


def test_repetition_penalty_gives_the_text_of_generate(models):
    folder, model = models("llama")
    (prompt,) = prompts([50])
    wanted = model.generate(
        torch.tensor([prompt]),
        do_sample=False,
        repetition_penalty=1.3,
        min_new_tokens=40,
        max_new_tokens=40,
        eos_token_id=None,
        pad_token_id=0,
    )
    with engine(folder) as core:
        each = request(core, 0, prompt, repetition_penalty=1.3, max_tokens=40)
        plain = request(core, 1, prompt, max_tokens=40)
        run(core, [each, plain])
    assert each.token_ids == wanted[0].tolist()
    assert each.token_ids != plain.token_ids


def test_drawn_tokens_are_the_references_draws_of_the_adjusted_logits(models):
    """With filters and without, at temperatures of their own."""
    folder, _ = models("llama")
    filters = ({}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 5, "top_p": 0.9}, {})
    with engine(folder) as core:
        log = LogitsLog(core)
        requests = adjusted_requests(core)
        for i, each in enumerate(requests):
            params = {**ADJUSTED[i], **filters[i], "temperature": 0.6 + 0.2 * i, "min_tokens": 0}
            requests[i] = request(core, i, each.prompt_token_ids, **params)
        run(core, requests)
        wrong = 0
        for each in requests:
            count, params = len(each.output_token_ids), each.params
            tokens = sample(
                adjusted_rows(log.rows(each), each),
                temperature=torch.full((count,), params.temperature),
                top_k=torch.full((count,), params.top_k),
                top_p=torch.full((count,), params.top_p),
                min_p=torch.full((count,), params.min_p),
                seeds=torch.full((count,), each.seed),
                positions=torch.arange(each.num_prompt_tokens, len(each.token_ids)),
            )
            wrong += sum(a != b for a, b in zip(tokens.tolist(), each.output_token_ids, strict=True))
        assert wrong <= 1  # the engine adjusts in float32


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_min_tokens_delays_every_token_that_would_end_a_text(async_scheduling, models):
    """As transformers' MinNewTokensLengthLogitsProcessor does; behind min_tokens the text ends as soon as it may."""
    folder, model = models("llama")
    (prompt,) = prompts([20])
    with engine(folder, async_scheduling=async_scheduling) as core:
        free = request(core, "free", prompt)
        run(core, [free])
        stops = free.output_token_ids[:2]
        each = request(core, "delayed", prompt, stop_token_ids=stops, min_tokens=6, max_tokens=100)
        eos = Sequence(
            "eos",
            prompt,
            SamplingParams(temperature=0, min_tokens=6, max_tokens=100),
            max_model_len=core.max_model_len,
            eos_token_ids=stops,
            block_size=core.config.block_size,
        )
        run(core, [each, eos])
    wanted = model.generate(
        torch.tensor([prompt]),
        do_sample=False,
        min_new_tokens=6,
        max_new_tokens=100,
        eos_token_id=stops,
        pad_token_id=0,
    )
    assert each.token_ids == eos.token_ids == wanted[0].tolist()
    assert not set(each.output_token_ids[:6]) & set(stops)
    assert len(each.output_token_ids) > 6


def test_a_stop_id_outside_of_the_vocabulary_is_no_token_to_delay(models):
    folder, _ = models("llama")
    with engine(folder) as core:
        plain, each = (
            request(core, i, [5, 6, 7], min_tokens=i * 8, stop_token_ids=[VOCAB_SIZE, 10**9]) for i in range(2)
        )
        run(core, [plain, each])
        assert plain.output_token_ids == each.output_token_ids
        with pytest.raises(UserError, match=f"logit_bias has token id {VOCAB_SIZE}; the model's are 0 to 198"):
            core.add(request(core, 2, [5], logit_bias={3: 1.0, VOCAB_SIZE: 1.0}))


# ---- what must not change ------------------------------------------------------------------------------------------


def test_neighbours_keep_their_tokens(models):
    """Those that ask for nothing, and those that filter; with slots that had been of others."""
    folder, _ = models("llama")
    plain = [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}, {"temperature": 0.8, "top_p": 0.7}]
    found = []
    for crowded in (False, True):
        with engine(folder, max_num_seqs=10, enable_prefix_caching=False) as core:
            for wave in range(2):
                requests = [request(core, i, prompts([30 + i])[0], **each) for i, each in enumerate(plain)]
                others = adjusted_requests(core, temperature=1.0, logprobs=3) if crowded else []
                for each in others:
                    each.request_id = f"other {each.request_id}"
                run(core, [*others[:3], *requests, *others[3:]] if wave else [*requests, *others])
                found.append([each.output_token_ids for each in requests])
    assert found == [found[0]] * 4


def test_a_seed_gives_the_same_text_alone_and_in_a_crowd(models):
    folder, _ = models("llama")
    (prompt,) = prompts([40])
    params = {"temperature": 1.0, "seed": 5, "frequency_penalty": 0.8, "repetition_penalty": 1.2, "top_p": 0.95}
    texts = []
    for settings in ({}, {"async_scheduling": False}, {"max_num_batched_tokens": 24}, {"max_num_seqs": 2}):
        with engine(folder, **settings) as core:
            alone = request(core, "alone", prompt, **params)
            run(core, [alone])
            crowd = adjusted_requests(core, temperature=0.9)
            again = request(core, "again", prompt, **params)
            run(core, [*crowd[:4], again, *crowd[4:]])
            texts += [alone.output_token_ids, again.output_token_ids]
    assert texts == [texts[0]] * 8


def test_preemption_and_the_depth_change_no_text(models):
    folder, _ = models("llama")
    texts = []
    for settings in ({}, {"async_scheduling": False}, {"scarce": True}, {"scarce": True, "async_scheduling": False}):
        chosen = dict(settings)
        if chosen.pop("scarce", False):
            with engine(folder) as core:
                chosen["num_gpu_blocks_override"] = core.memory.blocks_per_sequence + 1
        with engine(folder, **chosen) as core:
            requests = adjusted_requests(core, temperature=1.0, max_tokens=60)
            updates = run(core, requests)
            assert (core.scheduler.num_preemptions > 0) == ("num_gpu_blocks_override" in chosen)
            assert all(update.logprobs is None for update in updates)
            texts.append([each.output_token_ids for each in requests])
    assert texts == [texts[0]] * 4


def test_nothing_is_done_and_nothing_allocated_for_requests_that_need_it_not(models, monkeypatch):
    folder, _ = models("llama")
    with engine(folder) as core:
        monkeypatch.setattr(core._runner, "_sample_as_asked", lambda *_: pytest.fail("it looked at logits"))
        chosen = ({"temperature": 1.0, "stop_token_ids": [5]}, {"min_tokens": 9}, {"n": 4, "stop": "x"})
        run(core, [request(core, i, [5, 6, 7], **each) for i, each in enumerate(chosen)])
    with engine(folder) as core:
        run(core, [request(core, 0, [5, 6, 7], logprobs=1, logit_bias={3: 1}, top_p=0.9)])
        assert "counts" not in vars(core._runner._processor)


# ---- log-probabilities ---------------------------------------------------------------------------------------------


def logprobs_of(updates) -> dict:
    found: dict = {}
    for update in updates:
        assert update.logprobs is None or len(update.logprobs) == len(update.new_token_ids)
        found.setdefault(update.sequence, []).extend(update.logprobs or [])
    return found


@pytest.mark.parametrize("settings", [{}, {"async_scheduling": False, "max_num_batched_tokens": 24}], ids=str)
def test_logprobs_are_those_of_transformers(settings, models):
    """Of all tokens, the first included; raw, whatever penalties, temperature and filters do."""
    folder, model = models("llama")
    chosen = [
        {"logprobs": 5},
        {"logprobs": 20, "temperature": 1.5},
        {"logprobs": 0, "temperature": 0.7, "top_k": 3},
        {"logprobs": 1, "repetition_penalty": 1.5, "logit_bias": {9: 5.0}},
        {},
    ]
    with engine(folder, **settings) as core:
        requests = [request(core, i, prompt, **chosen[i]) for i, prompt in enumerate(prompts(LENGTHS[:5]))]
        found = logprobs_of(run(core, requests))
    assert found[requests[4]] == []
    ranks = set()
    for each in requests[:4]:
        wanted = reference_logits(model, each).double().log_softmax(-1)
        assert [one.token_id for one in found[each]] == each.output_token_ids
        for row, one in zip(wanted, found[each], strict=True):
            assert one.logprob == pytest.approx(float(row[one.token_id]), abs=TIGHT)
            more, as_many = (int((row > row[one.token_id] + gap).sum()) + 1 for gap in (TIGHT, -TIGHT))
            assert more <= one.rank <= as_many
            assert len(one.top) == each.params.logprobs
            for (token, logprob), best in zip(one.top, row.sort(descending=True).values, strict=False):
                assert logprob == pytest.approx(float(row[token]), abs=TIGHT)
                assert logprob == pytest.approx(float(best), abs=TIGHT)
            ranks.add(one.rank)
    assert {1, 2, 3} <= ranks


def test_logprobs_survive_preemption_and_stops(models):
    folder, _ = models("llama")
    with engine(folder) as core:
        scarce = {"num_gpu_blocks_override": core.memory.blocks_per_sequence + 1}
    found = []
    for settings in ({}, scarce):
        with engine(folder, **settings) as core:
            requests = adjusted_requests(core, logprobs=2, max_tokens=40, stop_token_ids=[11, 12, 13])
            by_request = logprobs_of(run(core, requests))
            assert [[one.token_id for one in by_request[each]] for each in requests] == [
                each.output_token_ids for each in requests
            ]
            found.append([[(one.token_id, one.rank) for one in by_request[each]] for each in requests])
    assert found[0] == found[1]


def test_llm_gives_logprobs_and_continuations(models):
    folder, _ = models("llama")
    with engine(folder) as core:
        llm = LLM.from_core(core, NumberTokenizer())
        params = SamplingParams(n=3, seed=5, logprobs=2, max_tokens=9, frequency_penalty=0.5, ignore_eos=True)
        (output,) = llm.generate([[5, 6, 7]], params, use_tqdm=False)
        texts = []
        for i, each in enumerate(output.outputs):
            assert [one.token_id for one in each.logprobs] == each.token_ids
            single = SamplingParams(seed=5 + i, max_tokens=9, frequency_penalty=0.5, ignore_eos=True)
            (alone,) = llm.generate([[5, 6, 7]], single, use_tqdm=False)
            assert alone.outputs[0].token_ids == each.token_ids
            assert alone.outputs[0].logprobs is None
            texts.append(each.token_ids)
        assert len({tuple(text) for text in texts}) == 3
        *_, last = llm.stream([[5, 6, 7]], params)
        assert last.outputs == output.outputs


# ---- the pieces ----------------------------------------------------------------------------------------------------


def sequence(prompt: list[int], output: list[int] = (), slot: int = 0, **params) -> Sequence:
    made = Sequence("x", prompt, SamplingParams(**params), max_model_len=10**4, eos_token_ids=(2,))
    made.append(output)
    made.slot = slot
    return made


def adjusted(processor: LogitsProcessor, logits: torch.Tensor, requests: list[Sequence]) -> torch.Tensor:
    plan = Plan.of(requests, [len(each.token_ids) for each in requests], processor.vocab_size)
    assert plan.rows == list(range(len(requests)))
    slots = torch.tensor([each.slot for each in requests])
    return processor.adjusted(logits, processor.upload(plan), slots)


@pytest.mark.parametrize("num_rows", [1, 5, 130])
def test_many_rows_are_penalised_each_by_its_own(num_rows):
    """More rows than are worked on at once, in any order of slots, in bfloat16."""
    generator = torch.Generator().manual_seed(num_rows)
    logits = (3 * torch.randn(num_rows, 50, generator=generator)).bfloat16()
    draw = np.random.default_rng(num_rows)
    requests = [
        sequence(
            draw.integers(0, 50, 20).tolist(),
            draw.integers(0, 50, draw.integers(0, 60)).tolist(),
            slot,
            repetition_penalty=float(draw.uniform(0.5, 2)),
            frequency_penalty=float(draw.uniform(-2, 2)),
            presence_penalty=float(draw.uniform(-2, 2)),
        )
        for slot in draw.permutation(num_rows).tolist()
    ]
    processor = LogitsProcessor(50, 256, torch.device("cpu"))
    processor.admit(requests[: num_rows // 2])
    processor.admit(requests[num_rows // 2 :])
    before = logits.clone()
    found = adjusted(processor, logits, requests)
    wanted = torch.stack(
        [
            adjusted_logits(row, each.params, each.prompt_token_ids, each.output_token_ids)
            for row, each in zip(logits, requests, strict=True)
        ]
    )
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert logits.equal(before)


def test_counts_belong_to_the_newest_owner_of_a_slot():
    processor = LogitsProcessor(50, 3, torch.device("cpu"))
    first = sequence([1, 2], [3, 3], slot=0, presence_penalty=1.0)
    processor.admit([first, sequence([9], slot=2)])  # the other has no penalties
    assert processor.counts.shape == (4, 50) and not processor.counts[1:].any()
    last = sequence([4], slot=2, presence_penalty=1.0)
    processor.admit([last])
    assert processor.counts[0].nonzero()[:, 0].tolist() == [1, 2, 3]
    processor.count(torch.tensor([0, 2]), torch.tensor([3, 5]))
    logits = adjusted(processor, torch.zeros(2, 50), [first, last])
    assert logits.nonzero().tolist() == [[0, 3], [1, 5]]
    processor.admit([sequence([7, 7], slot=0, frequency_penalty=0.5)])
    assert processor.counts[0].nonzero()[:, 0].tolist() == [7]


def test_plan():
    assert Plan.of([], [], 50).is_empty
    requests = [
        sequence([1], temperature=0.0),
        sequence([1], logprobs=3, top_k=4),
        sequence([1], min_tokens=2, logit_bias={5: 1.0}),
        sequence([1], presence_penalty=1.0, logprobs=1),
        sequence([1], min_tokens=1, stop_token_ids=[7, 90]),
    ]
    plan = Plan.of(requests, [2] * 5, 50)  # each has one token of output
    assert (plan.rows, plan.penalties) == ([3, 2], [(1.0, 0.0, 1.0)])
    assert plan.edits == [(1, 5, 1.0), (1, 2, -np.inf)]
    assert (plan.logprob_rows, plan.num_top) == ([1, 3], 3)
    plan = Plan.of(requests[4:], [1], 50)
    assert sorted(plan.edits) == [(0, 2, -np.inf), (0, 7, -np.inf)]


def test_penalties_leave_excluded_tokens_excluded():
    logits = torch.tensor([[-torch.inf, 1.0, -1.0, 0.0]])
    penalise_(logits, torch.tensor([[3, 0, 0, 1]], dtype=torch.int32), torch.tensor([[2.0, -2.0, -2.0]]))
    assert logits.tolist() == [[-torch.inf, 1.0, -1.0, 4.0]]


@pytest.mark.parametrize("num_rows", [1, 70])
def test_logprobs_are_packed_and_read(num_rows):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(num_rows, 300, generator=generator)
    tokens = torch.randint(300, (num_rows,), generator=generator)
    tokens[0] = logits[0].argmax()
    counts = [i % 5 for i in range(num_rows)]
    packed = token_logprobs(logits, tokens, 4).numpy()
    wanted = logits.double().log_softmax(1)
    for row, token, count, found in zip(
        wanted, tokens.tolist(), counts, read_logprobs(packed, tokens.tolist(), counts), strict=True
    ):
        order = row.argsort(descending=True)
        assert (found.token_id, found.rank) == (token, order.tolist().index(token) + 1)
        assert found.logprob == pytest.approx(float(row[token]), abs=1e-5)
        assert [token for token, _ in found.top] == order[:count].tolist()
        assert [logprob for _, logprob in found.top] == pytest.approx(row[order[:count]].tolist(), abs=1e-5)


def test_equally_probable_tokens_share_the_best_rank():
    tokens = torch.tensor([2, 0])
    packed = token_logprobs(torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 1.0]]), tokens, 0).numpy()
    assert [one.rank for one in read_logprobs(packed, tokens.tolist(), [0, 0])] == [1, 3]
