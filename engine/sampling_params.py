"""How one request is sampled: vLLM's `SamplingParams`, as far as this engine has it."""

from __future__ import annotations

from dataclasses import dataclass

from engine.values import MAX_INT32, MAX_SEED, flag, real_number, whole_number, whole_numbers


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

    Raises:
        UserError: a value out of its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = 16
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    detokenize: bool = True

    def __post_init__(self) -> None:
        self._set("temperature", real_number("temperature", self.temperature, lambda x: x >= 0, "at least 0"))
        self._set("top_p", real_number("top_p", self.top_p, lambda x: 0 < x <= 1, "above 0 and at most 1"))
        self._set("min_p", real_number("min_p", self.min_p, lambda x: 0 <= x <= 1, "from 0 to 1"))
        self._set("top_k", whole_number("top_k", self.top_k, -1, MAX_INT32))
        if self.max_tokens is not None:
            self._set("max_tokens", whole_number("max_tokens", self.max_tokens, 1))
        if self.seed is not None:
            self._set("seed", whole_number("seed", self.seed, 0, MAX_SEED))
        self._set("stop_token_ids", whole_numbers("stop_token_ids", self.stop_token_ids, "token ids"))
        for name in ("ignore_eos", "detokenize"):
            flag(name, getattr(self, name))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_filters(self) -> bool:
        """Whether some tokens are excluded before one is drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
