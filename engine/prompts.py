"""Prompts in all the forms in which they come, checked as far as that needs no model."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Many

from engine.errors import UserError
from engine.values import integer, shown

# Text, token ids, or a mapping with one of the keys "prompt" and "prompt_token_ids". Token ids may also be a NumPy
# array or a tensor of integers.
Prompt = str | Many[int] | Mapping[str, object]


class PromptError(UserError):
    """One of several prompts cannot run.

    Attributes:
        index: which of them.
        reason: what is wrong with it, without the index.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"prompt {index}: {reason}")
        self.index, self.reason = index, reason


def prompt_list(prompts: object) -> list[object]:
    """The prompts of a call: one prompt, also as a list of integers, or many.

    Raises:
        UserError: it is neither.
    """
    prompts = _plain(prompts)
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Many):
        raise UserError(f"prompts is {type(prompts).__name__}; it must be a prompt or a list of prompts")
    return [prompts] if len(prompts) and isinstance(_plain(prompts[0]), int) else list(prompts)


def read_prompt(prompt: object) -> tuple[str | None, list[int] | None]:
    """The text or the token ids of a prompt, the other one None.

    Raises:
        UserError: it has no form of a prompt, or is empty. Whether its ids are tokens only a model can tell.
    """
    prompt = _plain(prompt)
    if isinstance(prompt, Mapping):
        prompt = _member(prompt)
    if not isinstance(prompt, Many) or isinstance(prompt, (bytes, bytearray)):
        raise UserError(f"it is {type(prompt).__name__}; a prompt is text or a list of token ids")
    if not len(prompt):
        raise UserError("the prompt is empty; it needs at least 1 token")
    if not isinstance(prompt, str):
        return None, _token_ids(prompt)
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError("it has half of a surrogate pair, which is no character; text must be valid Unicode")
    return prompt, None


def _member(prompt: Mapping[str, object]) -> object:
    key = next((key for key in ("prompt_token_ids", "prompt") if prompt.get(key) is not None), None)
    if key is None:
        raise UserError('it has neither "prompt" nor "prompt_token_ids"')
    value = _plain(prompt[key])
    if key == "prompt_token_ids" and isinstance(value, str):
        raise UserError('its "prompt_token_ids" is text; it must be a list of token ids, and text goes in "prompt"')
    return value


def _token_ids(tokens: Many[object]) -> list[int]:
    if all(type(token) is int for token in tokens):
        return list(tokens)
    return [_token_id(_plain(token)) for token in tokens]


def _token_id(token: object) -> int:
    number = integer(token)
    if number is None:
        raise UserError(f"its token ids must be whole numbers, and {shown(token)} is none")
    return number


def _plain(value: object) -> object:
    """Arrays, tensors and their numbers as Python's own."""
    tolist = getattr(value, "tolist", None)
    return value if tolist is None else tolist()
