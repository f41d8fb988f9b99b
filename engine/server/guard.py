"""What every request passes before it reaches an endpoint: the API key, and the limit of its body's size."""

from __future__ import annotations

import asyncio
import hashlib
import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.server.errors import body_too_large, error_response, invalid_api_key
from engine.server.settings import ServerSettings

# Open without a key, for who watches over the server.
_OPEN_PATHS = frozenset({"/health", "/metrics"})
# How much of a body that is too large is read and thrown away, and for how long: a client that is still sending when
# the connection is closed would find a broken connection instead of the answer.
_MAX_DISCARDED_BYTES = 64 << 20
_DISCARD_S = 2.0


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._key_digests = [_digest(key.encode()) for key in settings.api_keys]
        self._max_body_bytes = settings.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self._key_digests and scope["path"] not in _OPEN_PATHS and not self._knows(headers.get(b"authorization")):
            await error_response(invalid_api_key())(scope, receive, send)
            return
        body = _LimitedBody(receive, self._max_body_bytes)
        if _content_length(headers) > self._max_body_bytes:
            if headers.get(b"expect", b"").lower() != b"100-continue":
                await body.discard()
            await error_response(body_too_large(self._max_body_bytes))(scope, receive, send)
            return
        await self._app(scope, body.receive, send)

    def _knows(self, authorization: bytes | None) -> bool:
        """Whether a header has one of the keys; its time says nothing about them."""
        scheme, _, key = (authorization or b"").partition(b" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._key_digests]
        return scheme.lower() == b"bearer" and any(matches)


class _LimitedBody:
    """A body that is counted as it comes, as one in chunks does not say how long it is."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive, self._max_bytes = receive, max_bytes
        self._num_bytes = 0

    async def receive(self) -> Message:
        """
        Raises:
            ApiError: the body is too large.
        """
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._max_bytes:
            if message.get("more_body"):
                await self.discard()
            raise body_too_large(self._max_bytes) from None
        return message

    async def discard(self) -> None:
        """Read on to the end of the body, as far as that is not too far."""
        num_bytes, is_more = 0, True
        try:
            async with asyncio.timeout(_DISCARD_S):
                while is_more and num_bytes < _MAX_DISCARDED_BYTES:
                    message = await self._receive()
                    num_bytes += len(message.get("body", b""))
                    is_more = message.get("more_body", False)
        except TimeoutError:
            pass


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _content_length(headers: dict[bytes, bytes]) -> int:
    """The length that a request claims; 0 if it does not."""
    claimed = headers.get(b"content-length", b"")
    return int(claimed) if claimed.isdigit() else 0
