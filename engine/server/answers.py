"""Answers: what continuations give, as JSON in one piece or as a stream of server-sent events.

A stream of a chat, one line per event::

    data: {..., "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, ...}]}
    data: {..., "choices": [{"index": 0, "delta": {"content": "Hel"}, "logprobs": null, "finish_reason": null}]}
    data: {..., "choices": [{"index": 0, "delta": {"content": "lo"}, ..., "finish_reason": "stop", ...}]}
    data: {..., "choices": [], "usage": {...}}          if it was asked for
    data: [DONE]

With n = 1 and a piece of text for every token a server of 256 streams writes 17,000 of the second kind per second.
Only the text in them differs, so all around it is made once.
"""

from __future__ import annotations

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from json.encoder import encode_basestring_ascii as quoted
from typing import TYPE_CHECKING

from engine.outputs import TokenLogprobs
from engine.server.errors import defect, engine_failed, shutting_down
from engine.server.logprobs import TextOffsets, TokenTexts, chat_logprobs, completion_logprobs
from engine.text import OutputText

if TYPE_CHECKING:
    from engine.server.async_engine import RequestStream, TokenEvent

DONE = b"data: [DONE]\n\n"


def compact(value: object) -> str:
    """JSON without spaces, in ASCII."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


class Continuation:
    """One text that a model writes.

    Attributes:
        index: among the choices of its answer.
        logprobs: of tokens that no piece has shown yet; None if they were not asked for.
        finish_reason: "stop" or "length" once it has ended.
    """

    def __init__(self, index: int, stream: RequestStream, text: OutputText, has_logprobs: bool) -> None:
        self.index, self.stream, self.text = index, stream, text
        self.logprobs: list[TokenLogprobs] | None = [] if has_logprobs else None
        self.finish_reason: str | None = None

    def take(self, event: TokenEvent) -> str:
        """The text that may be shown now.

        Raises:
            ApiError: the engine has ended it, not its text.
        """
        text = self.text
        num_before = len(text.token_ids)
        piece = text.append(event.token_ids, event.finish_reason)
        if event.logprobs is not None and self.logprobs is not None:
            self.logprobs += event.logprobs[: len(text.token_ids) - num_before]
        if text.finished:
            self.stream.abort("stop")
            self.finish_reason = "stop"
        elif event.finish_reason is not None:
            if event.finish_reason not in ("stop", "length"):
                raise engine_failed(self.stream.error) if event.finish_reason == "error" else shutting_down()
            self.finish_reason = event.finish_reason
        return piece

    async def finish(self) -> None:
        """Wait for its end.

        Raises:
            ApiError: as `take`.
        """
        async for event in self.stream:
            self.take(event)
            if self.finish_reason is not None:
                return
        if self.finish_reason is None:
            raise defect()


class Answer(ABC):
    """The JSON of one request's answer; a subclass for each endpoint.

    Attributes:
        continuations: n for each prompt, the first prompt's first.
    """

    id_prefix: str
    object_name: str
    chunk_name: str

    def __init__(
        self, continuations: Sequence[Continuation], model: str, request_id: str, texts: TokenTexts, n: int
    ) -> None:
        """
        Args:
            request_id: unique, without its prefix. texts: of tokens, for log-probabilities.
            n: continuations of each prompt.
        """
        self.continuations = continuations
        self._model, self._id = model, self.id_prefix + request_id
        self._texts, self._n = texts, n
        self._created = int(time.time())

    def usage(self) -> dict[str, object]:
        """Tokens of the prompts, each counted once, and of all continuations."""
        firsts = self.continuations[:: self._n]
        num_prompt = sum(each.stream.num_prompt_tokens for each in firsts)
        num_output = sum(len(each.text.token_ids) for each in self.continuations)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": sum(each.stream.num_cached_tokens or 0 for each in firsts)},
        }

    def whole(self) -> dict[str, object]:
        """The answer in one piece, once all continuations have ended."""
        choices = [
            {
                "index": each.index,
                **self._content(each),
                "logprobs": self._logprobs(each),
                "finish_reason": each.finish_reason,
                "stop_reason": each.text.stop_reason,
            }
            for each in self.continuations
        ]
        return {**self._head(self.object_name), "choices": choices, "usage": self.usage()}

    def _head(self, object_name: str) -> dict[str, object]:
        return {"id": self._id, "object": object_name, "created": self._created, "model": self._model}

    @abstractmethod
    def _content(self, continuation: Continuation) -> dict[str, object]:
        """Its text, as part of a choice."""

    @abstractmethod
    def _logprobs(self, continuation: Continuation) -> dict[str, object] | None:
        """Those that have not been shown yet, which they are then."""

    # ---- as a stream -----------------------------------------------------------------------------------------------

    _text_opening: str
    _text_closing: str
    _no_text: str

    def opening(self, continuation: Continuation, include_usage: bool) -> str:
        """The event in front of the first piece of text, if there is one."""
        return ""

    def edges(self, continuation: Continuation, include_usage: bool) -> tuple[str, str]:
        """What stands before and behind the text of an event that has nothing but text."""
        before = self._before_text(continuation) + self._text_opening
        after = f'{self._text_closing},"logprobs":null,"finish_reason":null{self._after_choice(include_usage)}'
        return before, after

    def _before_text(self, continuation: Continuation) -> str:
        return f'data: {compact(self._head(self.chunk_name))[:-1]},"choices":[{{"index":{continuation.index},'

    @staticmethod
    def _after_choice(include_usage: bool) -> str:
        return '}],"usage":null}\n\n' if include_usage else "}]}\n\n"

    def event(self, continuation: Continuation, piece: str, include_usage: bool) -> str:
        """Any event with a choice: text, log-probabilities, and at the end the reason for it."""
        ending = f'"finish_reason":{compact(continuation.finish_reason)}'
        if continuation.finish_reason is not None:
            ending += f',"stop_reason":{compact(continuation.text.stop_reason)}'
        text = f"{self._text_opening}{quoted(piece)}{self._text_closing}" if piece else self._no_text
        logprobs = f'"logprobs":{compact(self._logprobs(continuation))}'
        return f"{self._before_text(continuation)}{text},{logprobs},{ending}{self._after_choice(include_usage)}"

    def usage_event(self) -> bytes:
        """The event behind all choices."""
        return f"data: {compact({**self._head(self.chunk_name), 'choices': [], 'usage': self.usage()})}\n\n".encode()


class CompletionAnswer(Answer):
    """Of POST /v1/completions."""

    id_prefix, object_name, chunk_name = "cmpl-", "text_completion", "text_completion"
    _text_opening, _text_closing, _no_text = '"text":', "", '"text":""'

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self._offsets = [TextOffsets(self._texts) for _ in self.continuations]

    def _content(self, continuation: Continuation) -> dict[str, object]:
        return {"text": continuation.text.text}

    def _logprobs(self, continuation: Continuation) -> dict[str, object] | None:
        if continuation.logprobs is None:
            return None
        shown = completion_logprobs(continuation.logprobs, self._texts, self._offsets[continuation.index])
        continuation.logprobs.clear()
        return shown


class ChatAnswer(Answer):
    """Of POST /v1/chat/completions."""

    id_prefix, object_name, chunk_name = "chatcmpl-", "chat.completion", "chat.completion.chunk"
    _text_opening, _text_closing, _no_text = '"delta":{"content":', "}", '"delta":{}'

    def opening(self, continuation: Continuation, include_usage: bool) -> str:
        choice = {
            "index": continuation.index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        usage = {"usage": None} if include_usage else {}
        return f"data: {compact({**self._head(self.chunk_name), 'choices': [choice], **usage})}\n\n"

    def _content(self, continuation: Continuation) -> dict[str, object]:
        return {"message": {"role": "assistant", "content": continuation.text.text, "refusal": None}}

    def _logprobs(self, continuation: Continuation) -> dict[str, object] | None:
        if continuation.logprobs is None:
            return None
        shown = chat_logprobs(continuation.logprobs, self._texts)
        continuation.logprobs.clear()
        return shown


async def together(continuations: Sequence[Continuation], work: Callable[[Continuation], Awaitable[None]]) -> None:
    """Do something for all continuations at once. If it fails for one, the others are aborted.

    Raises:
        Exception: of the one that failed first.
    """
    if len(continuations) == 1:
        await work(continuations[0])
        return
    failures: list[Exception] = []

    async def guarded(continuation: Continuation) -> None:
        try:
            await work(continuation)
        except Exception as error:
            failures.append(error)
            abort_all(continuations)

    await asyncio.gather(*map(guarded, continuations))
    if failures:
        raise failures[0]


def abort_all(continuations: Sequence[Continuation]) -> None:
    """End those that have not ended, so that their blocks are free."""
    for each in continuations:
        each.stream.abort()
