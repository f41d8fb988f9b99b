"""The engine as the HTTP server sees it: requests in from one asyncio loop, their tokens out as streams.

    engine = await AsyncEngine.start(EngineConfig("path/of/a/model"))
    stream = engine.submit(prompt_token_ids, SamplingParams(max_tokens=64))
    async for event in stream:
        ...                                # event.token_ids: what is new; event.finish_reason: not None in the last one
    await engine.close(timeout_s=30)

Everything here belongs to the loop's thread: `submit`, `abort`, `stats` and the streams take no lock. The model runs in
a process of its own (`engine.server.worker`). Its socket is read by the loop itself: a thread for that would have to
fight for the interpreter with the loop that it hands the tokens to. Steps that come while the loop is busy are read
together, and a request's tokens of all of them reach its reader as one event.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import multiprocessing
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from engine.config import EngineConfig
from engine.errors import UserError
from engine.outputs import TokenLogprobs
from engine.sampling_params import SamplingParams
from engine.sequence import check_bias, check_prompt
from engine.server import worker
from engine.server.messages import (
    Add,
    Channel,
    Commands,
    Died,
    EngineInfo,
    EngineStats,
    Failed,
    Ready,
    StepMessage,
    channel_pair,
)

# For the worker to end by itself: a step may take a second, and the driver as long to let go of the GPU.
_JOIN_S = 15.0
# How often a process that should end is looked at.
_POLL_S = 0.01


class EngineDead(RuntimeError):  # noqa: N818
    """The engine's process has ended, or takes no more requests because the server shuts down; the message says why."""


class QueueFull(RuntimeError):  # noqa: N818
    """As many requests as may be are running or waiting; the message has the numbers."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What a request has gained since its reader last looked.

    Attributes:
        token_ids: new output tokens, of one step or several; may be empty in the last event.
        logprobs: one for each of them, if the request asked for any.
        finish_reason: None except in the last event: "stop", "length", "abort" or "error".
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: str | None


class Observer(Protocol):
    """Who is told of steps and of the ends of requests, in the loop's thread; see `engine.server.metrics.Metrics`."""

    def on_step(
        self, num_step_tokens: int, num_new_tokens: int, gaps_s: Mapping[float, int], first: list[RequestStream]
    ) -> None:
        """A step has been completed.

        Args:
            num_step_tokens: query tokens of the step.
            num_new_tokens: output tokens, over all requests.
            gaps_s: time since a request's output event before, and how many requests have waited for so long.
            first: requests whose first token this was.
        """

    def on_end(self, stream: RequestStream) -> None:
        """A request has ended, for whichever reason.

        One with stop strings that has come to its "length" has ended once its reader is done with its last tokens: they
        may complete a stop string, and then the reason is "stop".
        """


class AsyncEngine:
    """One engine in a process of its own. Made by `start`.

    Attributes:
        info: what runs. stats: the latest figures.
        observer: None until somebody sets it.
    """

    def __init__(self, channel: Channel, runs: threading.Thread | multiprocessing.process.BaseProcess) -> None:
        self.info: EngineInfo
        self.stats = EngineStats()
        self.observer: Observer | None = None
        self._loop = asyncio.get_running_loop()
        self._channel, self._runs = channel, runs
        self._max_requests = 0
        self._num_requests = 0
        self._live: dict[int, RequestStream] = {}
        self._commands = Commands([], [], False)
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._dead: asyncio.Future[str] = self._loop.create_future()
        self._all_ended = asyncio.Event()
        self._closing: asyncio.Task[None] | None = None
        self._close_by_s = float("inf")
        self._is_connected = True
        self._loop.add_reader(channel.fileno(), self._read)

    @classmethod
    async def start(
        cls, config: EngineConfig, *, max_queue: int = 1024, drive: Callable[[Channel], None] | None = None
    ) -> AsyncEngine:
        """Start the process and wait until its model is loaded.

        Args:
            max_queue: requests that may be there beyond the `max_num_seqs` that can run.
            drive: what runs in a thread in place of the process, for tests: `worker.serve` with some core.

        Raises:
            UserError: a model that cannot be loaded or run, or a context that does not fit.
            RuntimeError: anything else that went wrong there, with its traceback.
        """
        channel, theirs = channel_pair()
        engine = cls(channel, _process(theirs, config) if drive is None else _thread(theirs, drive))
        # Whatever ends this process, the other one must not stay; multiprocessing would wait for it for ever.
        atexit.register(engine._kill)
        try:
            engine._runs.start()
            if drive is None:
                theirs.close()  # the worker has its own, and its death must be the end of the last one
            await engine._ready
        except BaseException:
            engine._kill()
            engine._disconnect()
            await engine._join()
            raise
        engine._max_requests = engine.info.max_num_seqs + max_queue
        return engine

    # ---- state -----------------------------------------------------------------------------------------------------

    @property
    def is_alive(self) -> bool:
        """Whether the worker runs: False once it has died or `close` is done."""
        return self._is_connected and not self._dead.done()

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    async def wait_dead(self) -> str:
        """Wait until the worker dies by itself, and say why. Closing is not dying: then this goes on waiting."""
        return await asyncio.shield(self._dead)

    # ---- requests --------------------------------------------------------------------------------------------------

    def submit(self, prompt_token_ids: list[int], params: SamplingParams) -> RequestStream:
        """Queue a request.

        A prompt with max_tokens beyond max_model_len is taken; its output ends there.

        Raises:
            UserError: the prompt is empty, too long, or has an id outside the vocabulary; or logit_bias has such an id.
            QueueFull, EngineDead: see there.
        """
        info = self.info
        if self._dead.done():
            raise EngineDead(self._dead.result())
        if self._closing is not None:
            raise EngineDead("the engine is shutting down and takes no more requests")
        check_prompt(prompt_token_ids, info.max_model_len, info.vocab_size)
        check_bias(params, info.vocab_size)
        if not info.enable_chunked_prefill and len(prompt_token_ids) > info.max_num_batched_tokens:
            raise UserError(
                f"the prompt has {len(prompt_token_ids)} tokens, more than max_num_batched_tokens "
                f"{info.max_num_batched_tokens}, and chunked prefill is off"
            )
        if len(self._live) >= self._max_requests:
            raise QueueFull(
                f"{len(self._live)} requests are running or waiting, and no more than {self._max_requests} may; "
                "try again later"
            )
        stream = RequestStream(self, self._num_requests, len(prompt_token_ids), params)
        self._num_requests += 1
        self._live[stream.request_id] = stream
        self._command().adds.append(Add(stream.request_id, prompt_token_ids, params, stream.arrival_s))
        return stream

    def _abort(self, stream: RequestStream, finish_reason: str) -> None:
        self._command().aborts.append(stream.request_id)
        self._end(stream, finish_reason)

    def _end(self, stream: RequestStream, finish_reason: str, error: str | None = None) -> None:
        """The one way in which a request ends."""
        del self._live[stream.request_id]
        stream._end(finish_reason, error)
        if finish_reason == "length" and stream.params.stop:
            stream._may_be_cut = True
        else:
            self._tell_end(stream)
        if not self._live:
            self._all_ended.set()

    def _tell_end(self, stream: RequestStream) -> None:
        if self.observer is not None:
            self.observer.on_end(stream)

    # ---- to the worker ---------------------------------------------------------------------------------------------

    def _command(self) -> Commands:
        """The commands that go out when the loop has run what is ready now: one message for all of them."""
        commands = self._commands
        if not (commands.adds or commands.aborts):
            self._loop.call_soon(self._send)
        return commands

    def _send(self, shutdown: bool = False) -> None:
        commands, self._commands = self._commands, Commands([], [], False)
        if not self._is_connected:
            return
        if shutdown or commands.adds or commands.aborts:
            self._channel.send(commands._replace(shutdown=shutdown))
        if self._channel.has_backlog:  # a long step, during which the worker does not read
            self._loop.add_writer(self._channel.fileno(), self._write)

    def _write(self) -> None:
        self._channel.flush()
        if not self._channel.has_backlog:
            self._loop.remove_writer(self._channel.fileno())

    # ---- from the worker -------------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            messages = self._channel.receive()
        except EOFError:
            self._lost()
            return
        for message in messages:
            match message:
                case StepMessage():
                    self._take(message)
                case Ready(info):
                    self.info = info
                    self._ready.set_result(None)
                case Failed(sentence, is_user_error):
                    kind = UserError if is_user_error else RuntimeError
                    self._disconnect()
                    self._fail_start(kind(sentence))
                    return
                case Died(sentence):
                    self._die(sentence)
                    return

    def _take(self, message: StepMessage) -> None:
        """Give everybody his part of a step."""
        live = self._live
        if message.stats is not None:
            self.stats = EngineStats(*message.stats)
        for request_id, scheduled_s, num_cached_tokens in message.started:
            if (stream := live.get(request_id)) is not None:
                stream.first_scheduled_s, stream.num_cached_tokens = scheduled_s, num_cached_tokens
        if message.logprobs is not None:
            for request_id, logprobs in message.logprobs.items():
                if (stream := live.get(request_id)) is not None:
                    stream._logprobs += logprobs
        token_s, first, later, before_s, num_new = message.token_s, [], [], [], 0
        for request_id, token_ids in zip(message.request_ids, _pieces(message), strict=True):
            stream = live.get(request_id)
            if stream is None:  # aborted while this step was on its way
                continue
            if stream.last_token_s is None:
                first.append(stream)
                stream.first_token_s = token_s
            else:
                later.append(stream)
                before_s.append(stream.last_token_s)
            stream._token_ids += token_ids
            stream.num_output_tokens += len(token_ids)
            stream.last_token_s = token_s
            num_new += len(token_ids)
        # Readers run in this order, and to write hundreds of tokens to sockets takes a while: first tokens go first.
        for stream in first:
            stream._wake()
        for stream in later:
            stream._wake()
        if self.observer is not None:
            # Few different ones: nearly all requests had their token before in the same step.
            gaps_s = {token_s - before: count for before, count in Counter(before_s).items()}
            self.observer.on_step(message.num_step_tokens, num_new, gaps_s, first)
        for request_id, finish_reason, num_preemptions in message.ended:
            if (stream := live.get(request_id)) is not None:
                stream.num_preemptions = num_preemptions
                self._end(stream, finish_reason)
        for request_id, sentence in message.refused:
            if (stream := live.get(request_id)) is not None:
                self._end(stream, "error", sentence)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def _lost(self) -> None:
        """The worker has closed its end: it was killed, or ends because it was told to."""
        self._disconnect()
        if self._closing is not None and not self._live:
            return
        sentence = f"the engine's process {self._how_it_ended()}"
        if self._ready.done():
            self._die(sentence)
        else:
            self._fail_start(RuntimeError(f"{sentence} while it started"))

    def _how_it_ended(self) -> str:
        self._runs.join(timeout=1.0)  # the socket closes a moment before the process is gone
        code = getattr(self._runs, "exitcode", None)
        if code is None:
            return "closed its connection"
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    def _fail_start(self, error: Exception) -> None:
        if not self._ready.done():
            self._ready.set_exception(error)

    def _die(self, sentence: str) -> None:
        self._disconnect()
        if not self._dead.done():
            self._dead.set_result(sentence)
        self.stats = replace(self.stats, num_running=0, num_waiting=0, kv_cache_usage=0.0)
        for stream in list(self._live.values()):
            self._end(stream, "error", sentence)

    async def close(self, timeout_s: float) -> None:
        """Take no more requests, let those there are go on for so long, abort the rest, and end the process.

        When it returns every stream has ended. Calling it again waits for the same end, and a shorter time counts.
        """
        self._close_by_s = min(self._close_by_s, time.perf_counter() + timeout_s)
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        while self._live and time.perf_counter() < self._close_by_s:
            self._all_ended.clear()
            left_s = self._close_by_s - time.perf_counter()
            with contextlib.suppress(TimeoutError):  # in slices, as another call of `close` may shorten the time
                await asyncio.wait_for(self._all_ended.wait(), min(0.1, left_s))
        for stream in list(self._live.values()):
            stream.abort()
        self._send(shutdown=True)
        await self._join()
        self._disconnect()
        self.stats = replace(self.stats, num_running=0, num_waiting=0, kv_cache_usage=0.0)

    async def _join(self) -> None:
        """Wait until the worker has ended; kill it if it does not."""
        end_s = time.perf_counter() + _JOIN_S
        while self._runs.is_alive() and time.perf_counter() < end_s:
            await asyncio.sleep(_POLL_S)
        self._kill()
        atexit.unregister(self._kill)

    def _kill(self) -> None:
        if isinstance(self._runs, threading.Thread):
            return  # it ends when the channel closes
        if self._runs.is_alive():
            self._runs.kill()
            self._runs.join()

    def _disconnect(self) -> None:
        if self._is_connected:
            self._is_connected = False
            self._loop.remove_reader(self._channel.fileno())
            self._loop.remove_writer(self._channel.fileno())
            self._channel.close()


class RequestStream:
    """The tokens of one request, for one reader: `async for event in stream`.

    Tokens that come before the reader looks are one event, so that a slow reader costs no more memory than its tokens.

    Attributes:
        request_id: counts the engine's requests from 0 on.
        num_prompt_tokens, params: what was asked.
        arrival_s, first_scheduled_s, first_token_s, last_token_s: on the clock of time.perf_counter, which processes on
            Linux share, tokens as they came to the worker's host; None until it happens.
        num_output_tokens: so far.
        num_cached_tokens: of the prompt, found in the prefix cache; known with the first token.
        num_preemptions: known at the end, if that was "stop" or "length".
        finish_reason: as soon as it is known; that of the last event, but "stop" if a stop string cut its tokens.
        error: with finish_reason "error", why, as a sentence.
    """

    __slots__ = (
        "_engine",
        "_is_over",
        "_logprobs",
        "_may_be_cut",
        "_token_ids",
        "_waiter",
        "arrival_s",
        "error",
        "finish_reason",
        "first_scheduled_s",
        "first_token_s",
        "last_token_s",
        "num_cached_tokens",
        "num_output_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "params",
        "request_id",
    )

    def __init__(self, engine: AsyncEngine, request_id: int, num_prompt_tokens: int, params: SamplingParams) -> None:
        self.request_id, self.num_prompt_tokens, self.params = request_id, num_prompt_tokens, params
        self.arrival_s = time.perf_counter()
        self.first_scheduled_s: float | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self.num_output_tokens = self.num_cached_tokens = self.num_preemptions = 0
        self.finish_reason: str | None = None
        self.error: str | None = None
        self._engine = engine
        self._token_ids: list[int] = []  # not yet read, as are the logprobs
        self._logprobs: list[tuple] = []
        self._waiter: asyncio.Future[None] | None = None
        self._is_over = False
        self._may_be_cut = False  # it has ended, and its observer waits for the reader's word on the last tokens

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> TokenEvent:
        if self._is_over:
            self._settle(self.finish_reason)
            raise StopAsyncIteration
        while not self._token_ids and self.finish_reason is None:
            if self._waiter is not None:
                raise RuntimeError(f"request {self.request_id} has another reader")
            self._waiter = self._engine._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        token_ids, self._token_ids = self._token_ids, []
        logprobs = None
        if self.params.logprobs is not None:
            logprobs, self._logprobs = [TokenLogprobs(*each) for each in self._logprobs], []
        self._is_over = self.finish_reason is not None
        return TokenEvent(token_ids, logprobs, self.finish_reason)

    def abort(self, finish_reason: str = "abort") -> None:
        """End the request now; its blocks are free at once. If it has ended by itself, its reader is done with it.

        Args:
            finish_reason: of the last event; "stop" where a stop string has completed the text.
        """
        if self.finish_reason is None:
            self._engine._abort(self, finish_reason)
        else:
            self._settle("stop" if finish_reason == "stop" else self.finish_reason)

    def _settle(self, finish_reason: str) -> None:
        """The reader has seen all that it wants to see of a request that has ended."""
        if self._may_be_cut:
            self._may_be_cut, self.finish_reason = False, finish_reason
            self._engine._tell_end(self)

    def _end(self, finish_reason: str, error: str | None) -> None:
        self.finish_reason, self.error = finish_reason, error
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


def _process(theirs: socket.socket, config: EngineConfig) -> multiprocessing.process.BaseProcess:
    # Not forked: CUDA does not survive that, nor do the locks of other threads.
    context = multiprocessing.get_context("spawn")
    return context.Process(target=worker.main, args=(theirs, config), name="memwall-engine", daemon=True)


def _thread(theirs: socket.socket, drive: Callable[[Channel], None]) -> threading.Thread:
    def run() -> None:
        channel = Channel(theirs)
        try:
            drive(channel)
        finally:
            channel.close()

    return threading.Thread(target=run, name="memwall-engine", daemon=True)


def _pieces(message: StepMessage) -> Iterator[tuple[int, ...]]:
    """The tokens of each request of a step."""
    if message.counts is None:
        yield from zip(message.token_ids, strict=True)
        return
    start = 0
    for count in message.counts:
        yield tuple(message.token_ids[start : start + count])
        start += count
