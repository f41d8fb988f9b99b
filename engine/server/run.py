"""A server from its start to its end: the socket, the engine, uvicorn, signals, and what is left when one of them goes.

bind      load     listen                    SIGTERM            requests have ended      exit 0
|---------|--------|-------------------------|------------------|------------------------|
                    requests are answered     they go on, new    connections are closed
                                              ones get a 503
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.errors import UserError
from engine.server.app import create_app
from engine.server.async_engine import AsyncEngine
from engine.server.metrics import Metrics
from engine.server.settings import ServerSettings
from engine.server.sse import DROP
from engine.tokenizer import Tokenizer, load_tokenizer

with contextlib.suppress(ModuleNotFoundError):  # uvicorn takes h11 then
    import httptools

if TYPE_CHECKING:
    from engine.config import EngineConfig

_DEFECT = 70  # EX_SOFTWARE of sysexits.h
_INTERRUPTED = 130
# For answers on their way once all requests have ended.
_LAST_WRITES_S = 2.0
# Longer than clients keep idle connections, so that none is closed while a request is being sent on it.
_KEEP_ALIVE_S = 75
_BACKLOG = 2048  # uvicorn's own
_MAX_HEAD_BYTES = 64 << 10  # of a request: its method, path and headers


def serve(config: EngineConfig, settings: ServerSettings) -> int:
    """Serve a model until SIGTERM or SIGINT, or until its engine dies; returns the exit code.

    Raises:
        UserError: an address that cannot be listened on, or a model that cannot be loaded.
    """
    with bound_socket(settings.host, settings.port) as listener, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_Run(config, settings, listener).run())


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed."""
    try:
        import uvloop
    except ModuleNotFoundError:
        return None
    return uvloop.new_event_loop


class _Run:
    """One run of a server."""

    def __init__(self, config: EngineConfig, settings: ServerSettings, listener: socket.socket) -> None:
        self._config, self._settings, self._listener = config, settings, listener
        self._stop = asyncio.Event()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        engine = await self._unless_stopped(AsyncEngine.start(self._config, max_queue=self._settings.max_queue))
        if engine is None:
            return 0
        try:
            load = asyncio.to_thread(load_tokenizer, self._config.model, engine.info.vocab_size)
            tokenizer = await self._unless_stopped(load)
            return 0 if tokenizer is None else await self._serve(engine, tokenizer)
        finally:
            await engine.close(0)

    def _on_signal(self, number: int) -> None:
        if self._stop.is_set() and number == signal.SIGINT:
            print("interrupted", file=sys.stderr, flush=True)
            os._exit(_INTERRUPTED)  # the engine's process ends when it finds its pipe closed
        if not self._stop.is_set():
            print("shutting down", file=sys.stderr, flush=True)
        self._stop.set()

    async def _unless_stopped(self, work) -> object | None:
        """What work gives, or None where a signal comes first; it is then cancelled."""
        task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            return None
        finally:
            stopped.cancel()

    async def _serve(self, engine: AsyncEngine, tokenizer: Tokenizer) -> int:
        settings = self._settings
        app = create_app(engine, tokenizer, settings, Metrics(settings.model_names[0], engine))
        for line in (
            *engine.info.memory_lines,
            *_notices(self._config, tokenizer),
            *_warnings(settings, self._listener),
        ):
            print(line, file=sys.stderr)
        gc.collect()
        gc.freeze()  # what is there now stays: no collection need look at it while tokens wait
        server = _Uvicorn(_uvicorn_config(app), lambda: self._say_address())
        start_listening(self._listener)
        serving = asyncio.create_task(server.serve(sockets=[self._listener]))
        dead, stopped = asyncio.create_task(engine.wait_dead()), asyncio.create_task(self._stop.wait())
        await asyncio.wait({serving, dead, stopped}, return_when=asyncio.FIRST_COMPLETED)
        app.state.service.is_closing = True
        if not dead.done():
            await engine.close(settings.shutdown_timeout_s)
        await server.end(serving)
        stopped.cancel()
        if dead.done():
            print(f"error: the engine has stopped: {' '.join(dead.result().split())}", file=sys.stderr)
            return _DEFECT
        dead.cancel()
        return 0

    def _say_address(self) -> None:
        host, port = self._listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"listening on http://{shown}:{port}/v1", file=sys.stderr, flush=True)


# ---- the address ---------------------------------------------------------------------------------------------------


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket with this address, not yet listening: taken before minutes are spent on loading a model.

    Raises:
        UserError: there is no such host here, or the port is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host: {host!r} is no address of this machine ({reason}); try 127.0.0.1") from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port, error) from None
    return listener


def start_listening(listener: socket.socket) -> None:
    """
    Raises:
        UserError: another server, which was loading its model at the same time, was the first to listen there.
    """
    try:
        listener.listen(_BACKLOG)
    except OSError as error:
        raise _cannot_listen(*listener.getsockname()[:2], error) from None


def _cannot_listen(host: str, port: int, error: OSError) -> UserError:
    return UserError(
        f"{host}:{port} cannot be listened on ({error.strerror}); give another --host or --port, or --port 0 for any "
        "port that is free"
    )


def _warnings(settings: ServerSettings, listener: socket.socket) -> Iterator[str]:
    host = listener.getsockname()[0]
    if not settings.api_keys and not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        yield f"warning: whoever reaches {host} can use this server; --api-key lets in only who has the key"


def _notices(config: EngineConfig, tokenizer: Tokenizer) -> Iterator[str]:
    said = ["the weights are random, and so is the text"] if config.load_format == "dummy" else []
    if tokenizer.notice is not None:
        said.append(tokenizer.notice)
    if said:
        yield f"note: {'; '.join(said)}"


# ---- uvicorn -------------------------------------------------------------------------------------------------------


def _uvicorn_config(app: ASGIApp) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_keep_alive=_KEEP_ALIVE_S,
    )
    config.load()
    config.http_protocol_class = robust(droppable(config.http_protocol_class))
    return config


def droppable(protocol: type[asyncio.Protocol]) -> type[asyncio.Protocol]:
    """An HTTP protocol of uvicorn's whose requests can drop their connection (see `engine.server.sse.DROP`).

    ASGI has no word for that: it can only end a response, which waits until the client has taken all of it.
    """

    class Droppable(protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            app = self.app

            async def with_drop(scope: Scope, receive: Receive, send: Send) -> None:
                scope["extensions"] = {**(scope.get("extensions") or {}), DROP: transport.abort}
                await app(scope, receive, send)

            self.app = with_drop

    return Droppable


def robust(protocol: type[asyncio.Protocol]) -> type[asyncio.Protocol]:
    """uvicorn's protocol over httptools, made to read what its protocol over h11 reads too.

    Every HTTP client of Java offers, by default and on every request, to go on in HTTP/2 ("Upgrade: h2c"). httptools
    takes what follows the head of such a request for HTTP/2, and its body is lost (uvicorn's issue 2722). A server
    that does not upgrade must read on as if it had not been asked. Nor does httptools have a limit for heads.
    """
    if not hasattr(protocol, "on_headers_complete"):  # h11's
        return protocol

    class Robust(protocol):
        def __init__(self, *arguments, **options) -> None:
            super().__init__(*arguments, **options)
            self.parser = _Parser(self)

        def on_message_begin(self) -> None:
            self.parser.begin_head()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self.parser.end_head()
            if not self.parser.should_upgrade():
                super().on_headers_complete()

        def on_message_complete(self) -> None:
            if not self.parser.should_upgrade():
                super().on_message_complete()

    return Robust


class _Parser:
    """httptools' parser; a request that offers an upgrade is parsed again without the offer."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        """
        Args:
            protocol: uvicorn's, which takes the parser's events and has the head of the request in `url` and `headers`.
        """
        self._protocol = protocol
        self._parser = httptools.HttpRequestParser(protocol)
        self._num_new_bytes = 0
        # Of the head that is being read, those that came behind its first piece; None between heads.
        self._num_head_bytes: int | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self._parser, name)

    def begin_head(self) -> None:
        self._num_head_bytes = -self._num_new_bytes

    def end_head(self) -> None:
        self._num_head_bytes = None

    def feed_data(self, data: bytes) -> None:
        """
        Raises:
            HttpParserError: it is no HTTP, or the head of a request is too long.
        """
        self._num_new_bytes = len(data)
        while data:
            try:
                self._parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as found:
                head, data = self._head_without_offer(), data[found.args[0] :]
                self._parser = httptools.HttpRequestParser(self._protocol)
                self._parser.feed_data(head)
        if self._num_head_bytes is not None:
            self._num_head_bytes += self._num_new_bytes
            if self._num_head_bytes > _MAX_HEAD_BYTES:
                raise httptools.HttpParserError("the head is too long")

    def _head_without_offer(self) -> bytes:
        method, version = self._parser.get_method(), self._parser.get_http_version().encode()
        if method == b"CONNECT":  # which is an upgrade by itself
            raise httptools.HttpParserError("this is no proxy")
        lines = [b"%b %b HTTP/%b" % (method, self._protocol.url, version)]
        for name, value in self._protocol.headers:
            if name == b"connection":
                value = b", ".join(word for word in value.split(b",") if word.strip().lower() != b"upgrade")
            if name != b"upgrade":
                lines.append(b"%b: %b" % (name, value))
        return b"\r\n".join([*lines, b"", b""])


class _Uvicorn(uvicorn.Server):
    """uvicorn without hands on the signals, which also have an engine to end."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    async def end(self, serving: asyncio.Task[None]) -> None:
        """Stop listening, and wait for connections; those that take too long are dropped."""
        self.should_exit = True
        done, _ = await asyncio.wait({serving}, timeout=_LAST_WRITES_S)
        while not done:
            for connection in list(self.server_state.connections):
                connection.transport.abort()
            done, _ = await asyncio.wait({serving}, timeout=_LAST_WRITES_S)
        await serving
