"""How one request is sampled: vLLM's `SamplingParams`, as far as this engine has it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from engine.errors import UserError
from engine.values import MAX_INT32, MAX_SEED, flag, integer, real_number, shown, whole_number, whole_numbers

MAX_LOGPROBS = 20
MAX_CONTINUATIONS = 128


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a request ends.

    Attributes:
        temperature: 0 takes the most probable token (greedy).
        top_p: share of the probability that is kept, the most probable tokens first.
        top_k: how many of the most probable tokens are kept; 0 or -1 for all.
        min_p: least probability that is kept, as a share of the greatest one.
        max_tokens: most tokens to generate; None for as many as max_model_len leaves room for.
        seed: with one, the same prompt gives the same tokens, alone and in a crowd.
        stop_token_ids: tokens that end the request, besides the model's own end of text. The last token of the output
            is then the stop token; the text goes without it.
        ignore_eos: go on behind the model's end of text. stop_token_ids still count.
        detokenize: False leaves the text empty.
        n: continuations of one prompt, 1 to 128.
        presence_penalty: taken from the logit of every token that the output has, -2 to 2.
        frequency_penalty: taken from it once for every time that the output has the token, -2 to 2.
        repetition_penalty: divides the positive and multiplies the negative logits of tokens that the prompt or the
            output has; above 0, and 1 for none.
        min_tokens: output tokens before which nothing but max_tokens ends the request, 0 to max_tokens. Until then the
            tokens that would end it are not drawn, and stop strings are not looked for.
        stop: strings that end the request; the text goes up to the first of them. One string may stand alone.
        include_stop_str_in_output: let the text go to the end of that string.
        logprobs: report the log-probability of every output token and that many of the most probable ones, 0 to 20;
            None for none. They are those of the model, before anything else here has its effect.
        logit_bias: added to logits, by token id, -100 to 100.

    Raises:
        UserError: a value out of its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = 16
    seed: int | None = None
    stop_token_ids: tuple[int, ...] | None = ()
    ignore_eos: bool = False
    detokenize: bool = True
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop: tuple[str, ...] | None = ()
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        self._set("temperature", real_number("temperature", self.temperature, lambda x: x >= 0, "at least 0"))
        self._set("top_p", real_number("top_p", self.top_p, lambda x: 0 < x <= 1, "above 0 and at most 1"))
        self._set("min_p", real_number("min_p", self.min_p, lambda x: 0 <= x <= 1, "from 0 to 1"))
        self._set("top_k", whole_number("top_k", self.top_k, -1, MAX_INT32))
        if self.max_tokens is not None:
            self._set("max_tokens", whole_number("max_tokens", self.max_tokens, 1))
        if self.seed is not None:
            self._set("seed", whole_number("seed", self.seed, 0, MAX_SEED))
        ids = () if self.stop_token_ids is None else self.stop_token_ids  # None is vLLM's default
        self._set("stop_token_ids", whole_numbers("stop_token_ids", ids, "token ids"))
        for name in ("ignore_eos", "detokenize", "include_stop_str_in_output"):
            flag(name, getattr(self, name))
        self._set("n", whole_number("n", self.n, 1, MAX_CONTINUATIONS))
        for name in ("presence_penalty", "frequency_penalty"):
            self._set(name, real_number(name, getattr(self, name), lambda x: -2 <= x <= 2, "from -2 to 2"))
        # Beyond these a float32 would be 0 or infinite.
        fits, wanted = lambda x: 1e-30 <= x <= 1e30, "above 0 (from 1e-30 to 1e30)"
        self._set("repetition_penalty", real_number("repetition_penalty", self.repetition_penalty, fits, wanted))
        self._set("min_tokens", whole_number("min_tokens", self.min_tokens, 0))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UserError(f"min_tokens is {self.min_tokens}; it must be at most max_tokens, {self.max_tokens}")
        self._set("stop", _stop_strings(() if self.stop is None else self.stop))
        if self.stop and not self.detokenize:
            raise UserError("stop has strings, which are looked for in the text; detokenize must be True")
        if self.logprobs is not None:
            self._set("logprobs", whole_number("logprobs", self.logprobs, 0, MAX_LOGPROBS))
        if self.logit_bias is not None:
            self._set("logit_bias", _bias(self.logit_bias))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    # A step asks these of all of its requests: they are found once for each.

    @cached_property
    def has_filters(self) -> bool:
        """Whether some tokens are excluded before one is drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @cached_property
    def has_penalties(self) -> bool:
        """Whether the tokens so far change the logits."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @cached_property
    def delays_stop_tokens(self) -> bool:
        """Whether tokens that would end the request are excluded at first."""
        return self.min_tokens > 0 and not (self.ignore_eos and not self.stop_token_ids)

    @cached_property
    def needs_logits(self) -> bool:
        """Whether a step must look at the logits once more, outside of its CUDA graph."""
        return bool(
            self.has_filters
            or self.has_penalties
            or self.delays_stop_tokens
            or self.logit_bias
            or self.logprobs is not None
        )

    def continuation(self, index: int) -> SamplingParams:
        """How the continuation with this index, 0 to n - 1, is sampled: on its own, with a seed of its own."""
        seed = None if self.seed is None else (self.seed + index) & MAX_SEED
        return self if self.n == 1 else replace(self, n=1, seed=seed)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def _stop_strings(values: object) -> tuple[str, ...]:
    if isinstance(values, str):
        values = (values,)
    if isinstance(values, (bytes, Mapping)) or not isinstance(values, Iterable):
        raise UserError(f"stop is {shown(values)}; it must be a string or a list of strings")
    found = tuple(values)
    for value in found:
        if not isinstance(value, str):
            raise UserError(f"stop has {shown(value)}; it must be a string or a list of strings")
        if not value:
            raise UserError("stop has an empty string, which every text has; give at least one character")
    return found


def _bias(values: object) -> dict[int, float]:
    if not isinstance(values, Mapping):
        raise UserError(f"logit_bias is {shown(values)}; it must be an object of token ids and numbers")
    found = {}
    for token, value in values.items():
        number = integer(token)
        if number is None or not 0 <= number <= MAX_INT32:
            raise UserError(f"logit_bias has {shown(token)}; token ids are whole numbers from 0 to {MAX_INT32}")
        name = f"logit_bias of token {number}"
        found[number] = real_number(name, value, lambda x: -100 <= x <= 100, "from -100 to 100")
    return found
