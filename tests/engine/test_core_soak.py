"""Many random requests in little memory: each ends once and as it should, and nothing is left of them."""

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from running import Models, adjusted_rows, engine, reference_logits, request

from engine.core import EngineCore
from engine.sequence import Sequence
from kernels.reference.sampling import sample

VOCAB_SIZE = 64
TINY = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SETTINGS = {"max_model_len": 160, "max_num_seqs": 8, "max_num_batched_tokens": 48}


@dataclass
class Traffic:
    """Random requests, and what has become of them.

    Attributes:
        live: not ended. ended: with the reason that the engine reported, or "abort" by us.
        events: how often what happened.
    """

    core: EngineCore
    random: random.Random
    count: int
    live: dict[int, Sequence] = field(default_factory=dict)
    ended: dict[int, tuple[Sequence, str]] = field(default_factory=dict)
    received: dict[int, list[int]] = field(default_factory=dict)
    events: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._prefixes = [[self.random.randrange(3, VOCAB_SIZE) for _ in range(130)] for _ in range(5)]

    def arrive(self) -> None:
        draw, number = self.random, len(self.received)
        prompt = draw.choice(self._prefixes)[: draw.choice((0, 20, 32, 64, 65, 110))]
        prompt = prompt + [draw.randrange(3, VOCAB_SIZE) for _ in range(draw.randint(1, 40))]
        params = {
            "temperature": draw.choice((0, 0, 0.5, 1.0, 1.5)),
            "top_k": draw.choice((0, 0, 10)),
            "top_p": draw.choice((1.0, 1.0, 0.9)),
            "min_p": draw.choice((0.0, 0.0, 0.05)),
            "max_tokens": draw.choice(
                (1, 2, *(draw.randint(1, most) for most in (8, 8, 8, 30)), draw.choice((30, None)))
            ),
            "seed": draw.choice((None, draw.randrange(2**63))),
            "stop_token_ids": [draw.randrange(VOCAB_SIZE) for _ in range(draw.choice((0, 0, 3)))],
            "ignore_eos": draw.random() < 0.5,
        }
        if draw.random() < 0.3:
            params |= {
                "repetition_penalty": draw.choice((1.0, 1.3, 0.8)),
                "frequency_penalty": draw.choice((0.0, 0.9, -0.4)),
                "presence_penalty": draw.choice((0.0, 1.2)),
                "logit_bias": draw.choice((None, {draw.randrange(VOCAB_SIZE): 5.0})),
                "min_tokens": min(draw.choice((0, 5)), params["max_tokens"] or 5),
                "logprobs": draw.choice((None, 0, 3)),
            }
        each = self.live[number] = request(self.core, number, prompt, **params)
        self.received[number] = []
        self.core.add(each)

    def abort_any(self) -> None:
        each = self.random.choice(list(self.live.values()))
        self.events["aborted in flight"] += each.num_in_flight_tokens > 0
        self.events["aborted waiting"] += each in self.core.scheduler.waiting
        assert self.core.abort(each)
        assert not self.core.abort(each)
        self._end(each, "abort")

    def _end(self, each: Sequence, reason: str) -> None:
        assert each.finish_reason == reason
        del self.live[each.request_id]
        self.ended[each.request_id] = each, reason

    def step(self) -> None:
        for update in self.core.step():
            each = update.sequence
            assert each.request_id in self.live, f"{each} was updated after its end"
            self.received[each.request_id] += update.new_token_ids
            if each.params.logprobs is None:
                assert update.logprobs is None
            else:
                assert [one.token_id for one in update.logprobs] == update.new_token_ids
            if update.finish_reason is not None:
                self._end(each, update.finish_reason)

    def go(self) -> None:
        """Bursts and lulls until all have ended."""
        draw, steps = self.random, 0
        while len(self.received) < self.count or self.core.has_work:
            if len(self.received) < self.count and len(self.live) < 24 and draw.random() < 0.4:
                for _ in range(min(draw.choice((1, 1, 3, 12)), self.count - len(self.received))):
                    self.arrive()
            if self.live and draw.random() < 0.04:
                self.abort_any()
            self.step()
            if steps % 16 == 0:
                self.core.check()
            steps += 1
            assert steps < 40 * self.count, f"stuck with {self.core.scheduler.running} {self.core.scheduler.waiting}"
        assert not self.live

    def check_ends(self) -> None:
        assert sorted(self.ended) == list(range(self.count))
        for number, (each, reason) in self.ended.items():
            self.events[reason] += 1
            self.events["preempted"] += each.num_preemptions > 0
            self.events["cached"] += each.num_cached_tokens > 0
            tokens = each.output_token_ids
            assert tokens == self.received[number]
            assert not each.stop_ids & set(tokens[:-1])
            self.events["adjusted"] += each.params.has_penalties
            assert len(tokens) <= each.max_output_tokens
            if reason == "stop":
                assert tokens[-1] in each.stop_ids
                assert len(tokens) > each.params.min_tokens
            elif reason == "length":
                assert len(tokens) == each.max_output_tokens
            assert each.slot == -1
            assert not each.block_tables


def reference_tokens(model, each: Sequence) -> list[int]:
    """What the reference samples from transformers' logits with this request's seed."""
    logits = adjusted_rows(reference_logits(model, each), each)
    rows = len(logits)
    params = each.params
    return sample(
        logits,
        temperature=torch.full((rows,), params.temperature),
        top_k=torch.full((rows,), params.top_k, dtype=torch.int32),
        top_p=torch.full((rows,), params.top_p),
        min_p=torch.full((rows,), params.min_p),
        seeds=torch.full((rows,), each.seed),
        positions=torch.arange(each.num_prompt_tokens, len(each.token_ids)),
    ).tolist()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    ("family", "count", "settings"),
    [
        ("llama", 450, {}),
        ("gemma2", 250, {}),
        ("mistral", 300, {"async_scheduling": False, "enable_prefix_caching": False}),
        ("qwen3", 200, {"enable_chunked_prefill": False, "max_num_batched_tokens": 160}),
        ("gemma2", 250, {"kv_cache_dtype": "int4", "kv_cache_dtype_skip_layers": (1,)}),
        ("llama", 200, {"kv_cache_dtype": "int2", "async_scheduling": False}),
        ("llama", 200, {"kv_cache_dtype": "fp8", "quantization": "fp8"}),
    ],
    ids=lambda value: "" if isinstance(value, int) else str(value),
)
def test_soak(family, count, settings, models):
    folder, model = models(family, **TINY)
    settings = {**SETTINGS, **settings}
    with engine(folder, **settings) as core:
        blocks = core.memory.blocks_per_sequence + 1
    with engine(folder, **settings, num_gpu_blocks_override=blocks) as core:
        traffic = Traffic(core, random.Random(count), count)
        traffic.go()
        traffic.check_ends()
        assert core.scheduler.num_preemptions > 0
    seen = {"stop", "length", "abort", "aborted waiting", "aborted in flight", "preempted", "cached", "adjusted"}
    if not settings.get("enable_prefix_caching", True):
        seen.remove("cached")
        assert not traffic.events["cached"]
    if not settings.get("async_scheduling", True):
        seen.remove("aborted in flight")  # between its steps nothing is
        assert not traffic.events["aborted in flight"]
    assert all(traffic.events[event] for event in seen), traffic.events
    if "kv_cache_dtype" not in settings:
        for each, _ in list(traffic.ended.values())[:: count // 60]:
            assert each.output_token_ids == (reference_tokens(model, each) if each.output_token_ids else [])
