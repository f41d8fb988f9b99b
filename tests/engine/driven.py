"""Async engines without a process: over a core without a model, or over a script of messages, each in a thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from fake_core import FakeCore

from engine.config import EngineConfig
from engine.server.async_engine import AsyncEngine, RequestStream, TokenEvent
from engine.server.messages import Channel, EngineInfo, Ready, StepMessage
from engine.server.worker import serve

CONFIG = EngineConfig(model="no such folder", max_num_seqs=4, max_num_batched_tokens=16)
INFO = EngineInfo(
    max_model_len=1000,
    vocab_size=100,
    eos_token_ids=(1,),
    block_size=32,
    num_blocks=10,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    enable_chunked_prefill=True,
    enable_prefix_caching=True,
    memory_lines=["memory: a little"],
    device="cpu",
    dtype="float32",
    kv_cache_dtype="auto",
)


class Core(FakeCore):
    """A core without a model whose requests have the stamps that a server reports."""

    dtype = "float32"

    def step(self):
        updates = super().step()
        now = time.perf_counter()
        for sequence in [*self.scheduler.running, *(update.sequence for update in updates)]:
            if sequence.first_scheduled_s is None:
                sequence.first_scheduled_s = now
        for update in updates:
            update.sequence.last_token_s = now
        return updates

    def drain(self) -> None:
        """Let steps in flight end, as nobody else does once the worker has ended; nothing must be left then."""
        while self.has_work:
            self.step()
        self.check_idle()


async def over(core: FakeCore, **options: object) -> AsyncEngine:
    return await AsyncEngine.start(core.config, drive=lambda channel: serve(channel, core), **options)


class Script:
    """The worker's side of the channel in the hands of a test."""

    def __init__(self, info: EngineInfo = INFO) -> None:
        self._info = info
        self._sends: Channel | None = None
        self.received: list[object] = []

    async def start(self, **options: object) -> AsyncEngine:
        return await AsyncEngine.start(CONFIG, drive=self._drive, **options)

    def _drive(self, channel: Channel) -> None:
        # A channel is for one thread: this one reads, and the test's writes.
        self._sends = Channel(channel._socket.dup())
        channel.send(Ready(self._info))
        try:
            while not (self.received and self.received[-1].shutdown):
                self.received += channel.receive(wait=True)
        except EOFError:
            pass
        finally:
            self._sends.close()

    def send(self, message: object) -> None:
        """From the test's thread."""
        self._sends.send(message)

    async def step(self, engine: AsyncEngine, **fields: object) -> None:
        """Send a step's message, and go on when the engine has taken it."""
        taken = asyncio.Event()
        take, engine._take = engine._take, lambda message: (take(message), taken.set())
        self.send(step_message(**fields))
        await asyncio.wait_for(taken.wait(), 30)
        engine._take = take


def step_message(**fields: object) -> StepMessage:
    """One with nothing in it but these fields; `tokens` is a list of (request id, tokens)."""
    tokens = fields.pop("tokens", [])
    counts = [len(gained) for _, gained in tokens]
    empty = StepMessage([], [], None, 0.0, None, [], [], [], None, 0)
    return empty._replace(
        request_ids=[request_id for request_id, _ in tokens],
        token_ids=[token for _, gained in tokens for token in gained],
        counts=None if set(counts) <= {1} else counts,
        **fields,
    )


async def read(stream: RequestStream) -> list[TokenEvent]:
    """All events; exactly the last one has a finish reason."""
    events = [event async for event in stream]
    assert [event.finish_reason is not None for event in events] == [False] * (len(events) - 1) + [True]
    assert events[-1].finish_reason == stream.finish_reason
    assert [event async for event in stream] == []
    return events


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until something holds."""
    end_s = time.perf_counter() + 30
    while not condition():
        assert time.perf_counter() < end_s, "it has not happened within 30 s"
        await asyncio.sleep(0.001)
