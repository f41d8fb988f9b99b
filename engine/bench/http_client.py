"""HTTP/1.1 for measuring a server: many answers at once, every read stamped as it comes off the socket.

    socket -> Response: status, headers, body without its framing -> Events: payloads of `data:` lines -> the caller

All of it runs inside asyncio's callback for a read: between the socket and the time stamp there is no queue and no
task, as a client library has them. `Response` and `Events` know no socket. They take bytes, cut anywhere, and give back
what is whole.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import os
import socket
import ssl
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, Protocol
from urllib.parse import urlsplit

CONNECT_TIMEOUT_S = 10.0
# Servers close connections that idle for 2 to 5 s; a request must not meet one in the act.
_MAX_IDLE_S = 1.0
_MAX_LINE_BYTES = 1 << 16  # headers, the framing of a chunk
_MAX_EVENT_BYTES = 1 << 24
_PORTS = {"http": 80, "https": 443}


class HttpError(Exception):
    """A request that got no whole answer, in words that name no host."""


@dataclass(frozen=True)
class BaseUrl:
    """Where an OpenAI-compatible server listens.

    Attributes:
        path: what comes before `/completions`, without a slash at its end; `/v1` where the URL has no path.
    """

    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, text: str) -> BaseUrl:
        """From "http://127.0.0.1:8000/v1".

        Raises:
            ValueError: saying what would be right.
        """
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError as error:
            raise ValueError(f"{text!r}, which is no URL ({error})") from None
        if parts.scheme not in _PORTS or not parts.hostname or not text.isascii() or " " in text:
            raise ValueError(f"{text!r}; it must be a URL such as http://127.0.0.1:8000/v1")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError("a URL with a password, a query or a fragment; give only scheme, host, port and path")
        return cls(parts.scheme, parts.hostname, port or _PORTS[parts.scheme], parts.path.rstrip("/") or "/v1")

    @property
    def root(self) -> str:
        """The path without /v1, below which the server's own addresses are."""
        return self.path.removesuffix("/v1")

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path}"

    @property
    def as_committed(self) -> str:
        """For records: whole where it is this machine's loopback, otherwise "remote"."""
        try:
            is_loopback = self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            is_loopback = False
        return str(self) if is_loopback else "remote"


# ---- bytes in, whole things out --------------------------------------------------------------------------------------


class Response:
    """One answer, taken in as it arrives.

    Attributes:
        status: 0 until the headers are there. headers: names in lower case.
        is_complete: the body is there to its end. is_reusable: … and the connection may carry another request.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.is_complete = False
        self.is_reusable = False
        self._take: Callable[[bytes], bytes] = self._take_head
        self._pending = b""
        self._left = 0  # bytes of the body, or of its chunk, that are still to come
        self._in_trailers = False

    def feed(self, data: bytes) -> bytes:
        """What `data` adds to the body.

        Raises:
            HttpError: it is no HTTP/1.1.
        """
        return self._take(data)

    def feed_eof(self) -> None:
        """The server has closed the connection.

        Raises:
            HttpError: before the end of the answer.
        """
        if self._take == self._take_rest:
            self.is_complete = True
        if not self.is_complete:
            where = "in the middle of the answer" if self.status else "before an answer"
            raise HttpError(f"the server closed the connection {where}")

    def _take_head(self, data: bytes) -> bytes:
        data = self._pending + data
        head, blank, rest = data.partition(b"\r\n\r\n")
        if not blank:
            self._pending = _bounded(data)
            return b""
        self._pending = b""
        lines = head.decode("latin-1").split("\r\n")
        version, _, status = lines[0].partition(" ")
        if not version.startswith("HTTP/1.") or not status[:3].isdecimal():
            raise HttpError("the answer is no HTTP/1.1")
        pairs = (line.partition(":") for line in lines[1:])
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        if status.startswith("1"):  # 100 Continue and its like come before the answer
            return self._take_head(rest) if rest else b""
        self.status, self.headers = int(status[:3]), headers
        self._begin_body(version)
        return self._take(rest) if rest else b""

    def _begin_body(self, version: str) -> None:
        connection = self.headers.get("connection", "").lower()
        self.is_reusable = "close" not in connection and (version != "HTTP/1.0" or "keep-alive" in connection)
        length = self.headers.get("content-length", "")
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            self._take = self._take_chunks
        elif length.isdecimal():
            self._take, self._left = self._take_length, int(length)
            self.is_complete = not self._left
        elif self.status in (204, 304):
            self.is_complete = True
        else:
            self._take, self.is_reusable = self._take_rest, False

    def _take_rest(self, data: bytes) -> bytes:
        return data

    def _take_length(self, data: bytes) -> bytes:
        if len(data) > self._left:
            self.is_reusable = False  # more than was announced
        body = data[: self._left]
        self._left -= len(body)
        self.is_complete = not self._left
        return body

    def _take_chunks(self, data: bytes) -> bytes:
        """`size CRLF bytes CRLF`, over and over, and at the end a size of 0, lines that do not matter, an empty one."""
        if self._pending:
            data, self._pending = self._pending + data, b""
        pieces, at = [], 0
        while not self.is_complete:
            if self._left > 2:
                pieces.append(data[at : at + self._left - 2])
                at += len(pieces[-1])
                self._left -= len(pieces[-1])
            end = data.find(b"\r\n", at)
            if end < 0:
                self._pending = _bounded(data[at:])
                break
            line, at = data[at:end], end + 2
            if self._left:  # the CRLF behind a chunk
                if line:
                    raise HttpError("the answer's chunks do not have the length that they announce")
                self._left = 0
            elif self._in_trailers:
                self.is_complete = not line
            else:
                self._begin_chunk(line)
        if at < len(data) and self.is_complete:
            self.is_reusable = False
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _begin_chunk(self, line: bytes) -> None:
        try:
            size = int(line.partition(b";")[0], 16)
        except ValueError:
            size = -1
        if size < 0:
            raise HttpError("the answer's chunks have no length")
        self._in_trailers = size == 0
        self._left = size + 2 if size else 0


def _bounded(data: bytes) -> bytes:
    if len(data) > _MAX_LINE_BYTES:
        raise HttpError(f"the answer has a header line of more than {_MAX_LINE_BYTES} bytes")
    return data


class Events:
    """Server-sent events of a body: the payloads of their `data:` lines."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, body: bytes) -> list[bytes]:
        """Payloads of the events that `body` completes; comments and other fields have none.

        Raises:
            HttpError: an event without end.
        """
        if self._rest:
            body = self._rest + body
        if b"\r" in body:
            # The line feed that belongs to a last "\r" may be still to come.
            kept = body[-1:] == b"\r"
            body = body[: len(body) - kept].replace(b"\r\n", b"\n").replace(b"\r", b"\n") + b"\r" * kept
        *blocks, self._rest = body.split(b"\n\n")
        if len(self._rest) > _MAX_EVENT_BYTES:
            raise HttpError(f"the answer has an event of more than {_MAX_EVENT_BYTES} bytes")
        return [payload for block in blocks if (payload := _payload(block))]


def _payload(block: bytes) -> bytes:
    if block.startswith(b"data:") and b"\n" not in block:  # nearly all of them
        return block[5:].strip()
    lines = (line[5:].strip() for line in block.split(b"\n") if line.startswith(b"data:"))
    return b"\n".join(lines)


# ---- connections -----------------------------------------------------------------------------------------------------


class Receiver(Protocol):
    """Who wants an answer.

    Attributes:
        sent_s: when the request was written to its connection, on the clock of time.perf_counter; None before.
    """

    sent_s: float | None

    def receive(self, response: Response, body: bytes, now_s: float) -> None:
        """Take the answer so far, a piece of its body, and when that was read."""


class _Whole:
    """A short answer."""

    sent_s: float | None = None

    def __init__(self) -> None:
        self.body = b""

    def receive(self, response: Response, body: bytes, now_s: float) -> None:
        self.body += body


class _Connection(asyncio.Protocol):
    """One TCP connection, which carries one request at a time."""

    def __init__(self, client: Client) -> None:
        self.is_open = False
        self.idle_since_s = 0.0
        self._client = client
        self._response: Response | None = None
        self._receiver: Receiver | None = None
        self._done: asyncio.Future[None] | None = None

    def send(self, request: bytes, receiver: Receiver) -> None:
        """Write a request now."""
        self._response, self._receiver = Response(), receiver
        self._done = asyncio.get_running_loop().create_future()
        receiver.sent_s = perf_counter()
        if self.is_open:
            self._transport.write(request)
        else:  # closed since it was opened
            self.connection_lost(None)

    async def end(self) -> Response:
        """Wait for the end of the answer, whose body the receiver gets as it arrives."""
        response = self._response
        try:
            await self._done
        finally:
            self._response = self._receiver = self._done = None
            if not (response.is_complete and response.is_reusable):
                self.close()
        return response

    def close(self) -> None:
        self.is_open = False
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self.is_open = True
        self._client.connections.add(self)

    def data_received(self, data: bytes) -> None:
        now = perf_counter()
        self._client.num_reads += 1
        response = self._response
        if response is None:  # nobody has asked for anything
            self.close()
            return
        try:
            body = response.feed(data)
            if body:
                self._receiver.receive(response, body, now)
        except HttpError as error:
            self._settle(error)
        if response.is_complete:
            self._settle()
        if now >= self._client.due_s:
            self._client.on_due()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self._client.connections.discard(self)
        if self._response is None:
            return
        try:
            self._response.feed_eof()
        except HttpError as early:
            self._settle(early)
        self._settle()

    def _settle(self, error: HttpError | None = None) -> None:
        if self._done is None or self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)


class Client:
    """Requests to one server, each outstanding one on a connection of its own, without a limit.

    Attributes:
        connections: that are open. num_reads: pieces that have arrived, of all answers.
        due_s, on_due: what is to be called by the first read after that time, on the clock of time.perf_counter. Of
            hundreds of streams one turn of the event loop reads all, and nothing else is called in between.
    """

    def __init__(self, url: BaseUrl, api_key: str | None = None) -> None:
        self.connections: set[_Connection] = set()
        self.num_reads = 0
        self.due_s = math.inf
        self.on_due: Callable[[], None] = lambda: None
        self._url = url
        headers = [f"Host: {url.authority}", "User-Agent: memwall", "Accept-Encoding: identity"]
        headers += [f"Authorization: Bearer {api_key}"] if api_key else []
        self._headers = "".join(f"{line}\r\n" for line in headers)
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        self._addresses: list[str] = []
        self._idle: list[_Connection] = []

    def request(
        self, path: str, receiver: Receiver, document: bytes | None = None
    ) -> Callable[[], Coroutine[Any, Any, Response]]:
        """GET, or POST a JSON document: written in this call if a connection is idle, and else as soon as one is open.

        Returns:
            what to call and await for the end of the answer. It raises HttpError if there is no connection, or no whole
            answer.
        """
        method = "GET" if document is None else "POST"
        head = f"{method} {path} HTTP/1.1\r\n{self._headers}"
        if document is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(document)}\r\n"
        request = head.encode("ascii") + b"\r\n" + (document or b"")
        connection = self._reused()
        if connection is not None:
            connection.send(request, receiver)
        return partial(self._answer, connection, request, receiver)

    async def get_json(self, path: str) -> tuple[int, Any]:
        """Status of a GET, and its answer; None where that is no JSON.

        Raises:
            HttpError: as `request`.
        """
        answer = _Whole()
        response = await self.request(path, answer)()
        return response.status, read_json(answer.body)

    def close(self) -> None:
        """Close all connections."""
        for connection in list(self.connections):
            connection.close()

    async def _answer(self, connection: _Connection | None, request: bytes, receiver: Receiver) -> Response:
        if connection is None:
            connection = await self._connect()
            connection.send(request, receiver)
        response = await connection.end()
        if connection.is_open:
            connection.idle_since_s = perf_counter()
            self._idle.append(connection)
        return response

    def _reused(self) -> _Connection | None:
        """The connection that has become idle last, if that was a moment ago."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and perf_counter() - connection.idle_since_s < _MAX_IDLE_S:
                return connection
            connection.close()
        return None

    async def _connect(self) -> _Connection:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                return await self._connect_to_any()
        except TimeoutError:
            raise HttpError(f"no connection within {CONNECT_TIMEOUT_S:g} s") from None
        except socket.gaierror:
            raise HttpError("no connection: the host's name is unknown") from None
        except ssl.SSLError as error:
            raise HttpError(f"no connection: {error.reason or 'TLS failed'}") from None
        except OSError as error:
            # asyncio's own words would name the address.
            reason = os.strerror(error.errno) if error.errno else "the server closed it at once"
            raise HttpError(f"no connection: {reason}") from None

    async def _connect_to_any(self) -> _Connection:
        """To the host's first address that answers; the others are then forgotten."""
        loop = asyncio.get_running_loop()
        addresses = self._addresses
        if not addresses:
            found = await loop.getaddrinfo(self._url.host, self._url.port, type=socket.SOCK_STREAM)
            addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
        name = self._url.host if self._tls else None
        for address in addresses:
            try:
                _, connection = await loop.create_connection(
                    lambda: _Connection(self), address, self._url.port, ssl=self._tls, server_hostname=name
                )
            except OSError:
                if address == addresses[-1]:
                    raise
            else:
                self._addresses = [address]
                return connection
        raise OSError("the host has no address")


def read_json(data: bytes) -> Any:
    """What it holds; None where it is no JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
