"""A response that is a stream of server-sent events, without a layer between the engine's tokens and the socket."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from http import HTTPStatus
from time import monotonic

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from engine.server.answers import DONE, Answer, Continuation, abort_all, compact, quoted, together
from engine.server.errors import ApiError, defect

# The extension of an ASGI scope that drops the connection, with whatever the client has not taken yet.
DROP = "memwall.drop"
_CHECKS_PER_TIMEOUT = 8

_logger = logging.getLogger("memwall.server")


class EventStream(Response):
    """The events of an answer, each written as soon as its text is there.

    While the client takes no data, nothing is written and the engine goes on: its next event then has the text of
    several tokens. Whoever leaves, or takes nothing for too long, has the requests aborted.
    """

    def __init__(self, answer: Answer, include_usage: bool, stalls: Stalls) -> None:
        super().__init__(
            None,
            HTTPStatus.OK,
            # Proxies would else keep events until they have many.
            {"cache-control": "no-cache", "x-accel-buffering": "no"},
            "text/event-stream",
        )
        del self.headers["content-length"]
        self._answer, self._include_usage, self._stalls = answer, include_usage, stalls
        # Since when the client has been waited for; None while it is not.
        self.waiting_since: float | None = None
        self._drop_connection: Callable[[], None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._answer
        self._drop_connection = (scope.get("extensions") or {}).get(DROP)
        watcher = asyncio.create_task(watch(receive, self._abort))
        self._stalls.add(self)
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            last = await self._write_choices(send)
            await self._write(send, last, more=False)
        finally:
            self._stalls.remove(self)
            watcher.cancel()
            abort_all(answer.continuations)

    async def _write_choices(self, send: Send) -> bytes:
        """Write the events of all continuations; returns what ends the stream."""
        try:
            await together(self._answer.continuations, lambda each: self._write_choice(each, send))
        except ApiError as error:
            return f"data: {compact(error.body())}\n\n".encode()
        except Exception:
            _logger.exception("a stream of events failed")
            return f"data: {compact(defect().body())}\n\n".encode()
        return self._answer.usage_event() + DONE if self._include_usage else DONE

    async def _write_choice(self, continuation: Continuation, send: Send) -> None:
        answer, include_usage = self._answer, self._include_usage
        before, behind = answer.edges(continuation, include_usage)
        opening = answer.opening(continuation, include_usage)
        is_plain = continuation.logprobs is None
        async for event in continuation.stream:
            piece = continuation.take(event)
            is_last = continuation.finish_reason is not None
            if piece and is_plain and not is_last:
                text = f"{opening}{before}{quoted(piece)}{behind}"
            elif piece or is_last:
                text = opening + answer.event(continuation, piece, include_usage)
            else:
                continue
            opening = ""
            await self._write(send, text.encode("ascii"), more=True)
            if is_last:
                return
        if continuation.finish_reason is None:
            raise defect()

    async def _write(self, send: Send, body: bytes, more: bool) -> None:
        message: Message = {"type": "http.response.body", "body": body, "more_body": more}
        self.waiting_since = monotonic()
        await send(message)
        self.waiting_since = None

    def _abort(self) -> None:
        abort_all(self._answer.continuations)

    def drop(self) -> None:
        """Abort the requests and close the connection without waiting for the client."""
        self._abort()
        if self._drop_connection is not None:
            self._drop_connection()


async def watch(receive: Receive, on_gone: Callable[[], None]) -> None:
    """Wait until the client leaves, behind a request whose body has been read, and say so."""
    while (await receive())["type"] != "http.disconnect":
        pass
    on_gone()


class Stalls:
    """Drops connections whose clients take no data.

    A timer for every write would cost as much as the write itself, so one task looks at all streams now and then.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._streams: set[EventStream] = set()

    def add(self, stream: EventStream) -> None:
        self._streams.add(stream)

    def remove(self, stream: EventStream) -> None:
        self._streams.discard(stream)

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(min(1.0, self._timeout_s / _CHECKS_PER_TIMEOUT))
            self.drop_stalled(self._timeout_s)

    def drop_stalled(self, timeout_s: float) -> None:
        """Drop whoever has been waited for so long."""
        end = monotonic() - timeout_s
        for stream in list(self._streams):
            if stream.waiting_since is not None and stream.waiting_since <= end:
                stream.drop()
