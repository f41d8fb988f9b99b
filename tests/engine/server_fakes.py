"""An engine that says what a script has, and an app around it: what the server's tests drive."""

import asyncio
import contextlib
import json
import socket
import threading
from collections import deque

import httpx
import uvicorn

from engine.outputs import TokenLogprobs
from engine.sequence import check_prompt
from engine.server.app import create_app
from engine.server.async_engine import EngineDead, EngineStats, QueueFull, TokenEvent
from engine.server.messages import EngineInfo
from engine.server.run import droppable
from engine.server.settings import ServerSettings
from engine.tokenizer import ByteTokenizer

EOS = ByteTokenizer.eos_token_id
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def info(max_model_len: int = 64) -> EngineInfo:
    return EngineInfo(
        max_model_len, 259, (EOS,), 64, 10, 4, 64, True, True, ["memory: a little"], "cpu", "float32", "auto"
    )


class FakeEngine:
    """As much of `AsyncEngine` as the app sees.

    Attributes:
        script: the output of every request, as text, bytes or token ids; each token is a step. Repeated up to
            max_tokens if `repeats`.
        streams: all that were submitted.
        gate: requests wait for it before each of their steps.
        dies_after: steps after which a request ends with "error".
    """

    def __init__(self, script="abcdefgh", *, repeats: bool = True, max_model_len: int = 64, max_requests: int = 100):
        self.info, self.stats, self.is_alive = info(max_model_len), EngineStats(), True
        self.script = list(script.encode()) if isinstance(script, str) else list(script)
        self.repeats, self.max_requests = repeats, max_requests
        self.dies_after: int | None = None
        self.is_closing = False
        self.streams: list[FakeStream] = []
        self.gate: asyncio.Event | None = None

    @property
    def live(self):
        return [stream for stream in self.streams if stream.finish_reason is None]

    def submit(self, prompt_token_ids, params):
        if self.is_closing or not self.is_alive:
            raise EngineDead("it has ended")
        check_prompt(prompt_token_ids, self.info.max_model_len, self.info.vocab_size)
        if len(self.live) >= self.max_requests:
            raise QueueFull("full")
        self.streams.append(FakeStream(self, prompt_token_ids, params))
        return self.streams[-1]


class FakeStream:
    def __init__(self, engine, prompt_token_ids, params):
        self.engine, self.prompt_token_ids, self.params = engine, prompt_token_ids, params
        self.num_prompt_tokens, self.num_cached_tokens = len(prompt_token_ids), 2
        self.finish_reason = self.error = None
        self._given = 0
        self._is_over = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self._is_over:
            raise StopAsyncIteration
        await (asyncio.sleep(0) if self.engine.gate is None else self._wait())
        if self.finish_reason is not None:
            self._is_over = True
            return TokenEvent([], None, self.finish_reason)
        if self._given == self.engine.dies_after:
            self.finish_reason, self.error, self._is_over = "error", "it broke", True
            return TokenEvent([], None, "error")
        script = self.engine.script
        token = script[self._given % len(script)]
        self._given += 1
        stops = set(self.params.stop_token_ids) | (set() if self.params.ignore_eos else {EOS})
        if token in stops:
            self.finish_reason = "stop"
        elif self._given == self.params.max_tokens or (self._given == len(script) and not self.engine.repeats):
            self.finish_reason = "length"
        self._is_over = self.finish_reason is not None
        return TokenEvent([token], self._logprobs(token), self.finish_reason)

    async def _wait(self):
        gate = asyncio.ensure_future(self.engine.gate.wait())
        while not gate.done() and self.finish_reason is None:
            await asyncio.sleep(0.005)
        gate.cancel()

    def _logprobs(self, token):
        if self.params.logprobs is None:
            return None
        top = tuple((token + place, -0.5 - place) for place in range(self.params.logprobs))
        return [TokenLogprobs(token, -0.5, 1, top)]

    def abort(self, finish_reason="abort"):
        if self.finish_reason is None:
            self.finish_reason = finish_reason


class FakeMetrics:
    def render(self):
        return b"nothing 0\n", "text/plain; version=0.0.4"


def make_app(engine=None, tokenizer=None, **settings):
    settings = ServerSettings(**{"model_names": ("m",), "chat_template": TEMPLATE, **settings})
    return create_app(engine or FakeEngine(), tokenizer or ByteTokenizer(), settings, FakeMetrics())


def request(app, method, path, **options) -> httpx.Response:
    """One request, without sockets."""

    async def run():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(run())


def post(app, path, body, **options) -> httpx.Response:
    return request(app, "POST", path, json=body, **options)


def events(response: httpx.Response) -> list:
    """The data of all events, "[DONE]" as it is; asserts the framing."""
    assert response.headers["content-type"].startswith("text/event-stream")
    text = response.content.decode("ascii")
    assert text.endswith("\n\n")
    found = deque()
    for event in text[:-2].split("\n\n"):
        assert event.startswith("data: ")
        assert "\n" not in event
        data = event.removeprefix("data: ")
        found.append(data if data == "[DONE]" else json.loads(data))
    return list(found)


@contextlib.contextmanager
def running(app):
    """A uvicorn of this app in a thread; gives its address and loop."""
    config = uvicorn.Config(app, log_config=None, log_level="critical", lifespan="on", ws="none")
    config.load()
    config.http_protocol_class = droppable(config.http_protocol_class)
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join()
