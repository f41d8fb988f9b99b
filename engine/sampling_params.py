"""How one request is sampled: vLLM's `SamplingParams`, as far as this engine has it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from engine.errors import UserError

# Seeds travel as int64, token ids as int32.
_MAX_SEED = 2**63 - 1
_MAX_TOKEN_ID = 2**31 - 1


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
        self._check_real("temperature", lambda value: value >= 0, "at least 0")
        self._check_real("top_p", lambda value: 0 < value <= 1, "above 0 and at most 1")
        self._check_real("min_p", lambda value: 0 <= value <= 1, "from 0 to 1")
        self._check_integer("top_k", -1, _MAX_TOKEN_ID)
        if self.max_tokens is not None:
            self._check_integer("max_tokens", 1)
        if self.seed is not None:
            self._check_integer("seed", 0, _MAX_SEED)
        if isinstance(self.stop_token_ids, (str, bytes)) or not isinstance(self.stop_token_ids, Iterable):
            raise UserError(f"stop_token_ids is {self.stop_token_ids!r}; it must be a list of token ids")
        ids = tuple(_integer("each of stop_token_ids", each, 0, _MAX_TOKEN_ID) for each in self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", ids)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_filters(self) -> bool:
        """Whether some tokens are excluded before one is drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def _check_real(self, name: str, fits: Callable[[float], bool], wanted: str) -> None:
        value = getattr(self, name)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, (bool, str)) or not math.isfinite(number) or not fits(number):
            raise UserError(f"{name} is {value!r}; it must be a number {wanted}")
        object.__setattr__(self, name, number)

    def _check_integer(self, name: str, least: int, most: int | None = None) -> None:
        object.__setattr__(self, name, _integer(name, getattr(self, name), least, most))


def _integer(name: str, value: object, least: int, most: int | None = None) -> int:
    """A whole number of any integer type, NumPy's included, within its bounds."""
    wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if isinstance(value, bool) or number is None or number < least or (most is not None and number > most):
        raise UserError(f"{name} is {value!r}; it must be a whole number {wanted}")
    return number
