"""What the server and the engine's process tell each other, and the channel between them.

    server -> worker    Commands: requests to add, requests to abort, or the end
    worker -> server    Ready or Failed, once; a StepMessage for every step with something to tell; Died

A step of 256 requests is one message of about 2 KB: parallel lists of small integers, and what is rare beside them.
"""

from __future__ import annotations

import pickle
import select
import socket
import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from engine.sampling_params import SamplingParams

_LENGTH_BYTES = 4
# Read at once: a few steps. More would have the allocator ask the kernel for each buffer.
_CHUNK_BYTES = 1 << 16
# After so many the reader has other things to do, too.
_MAX_CHUNKS = 16


@dataclass(frozen=True)
class EngineInfo:
    """What runs, told once by the worker.

    Attributes:
        max_model_len: tokens of prompt and output together. vocab_size: rows of the embedding table.
        eos_token_ids: the model's end of text.
        block_size: tokens per KV block. num_blocks: of the pool, the null block not counted.
        max_num_seqs: running requests. max_num_batched_tokens: tokens of one step.
        memory_lines: where the memory went, in vLLM's words.
        device, dtype, kv_cache_dtype: as in "cuda", "bfloat16", "fp8".
    """

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_chunked_prefill: bool
    enable_prefix_caching: bool
    memory_lines: list[str]
    device: str
    dtype: str
    kv_cache_dtype: str


@dataclass(frozen=True)
class EngineStats:
    """The state of the engine behind its latest step.

    Attributes:
        num_running, num_waiting: requests.
        kv_cache_usage: share of the KV blocks that requests hold, 0 to 1.
        prefix_cache_queries, prefix_cache_hits: prompt tokens looked up in the prefix cache and found there, so far.
        num_preemptions: so far.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_preemptions: int = 0


class Add(NamedTuple):
    """A request. arrival_s is on the clock of time.perf_counter, which processes on Linux share."""

    request_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_s: float


class Commands(NamedTuple):
    """In this order: requests to add, ids to abort, and whether to end."""

    adds: list[Add]
    aborts: list[int]
    shutdown: bool


class Ready(NamedTuple):
    info: EngineInfo


class Failed(NamedTuple):
    """The engine could not be made: a sentence for the user, or the traceback of anything else."""

    message: str
    is_user_error: bool


class Died(NamedTuple):
    """A step failed; the process ends."""

    message: str


class StepMessage(NamedTuple):
    """What one step did. Times are of time.perf_counter.

    Attributes:
        request_ids: requests that gained tokens; token_ids: their tokens, one after the other.
        counts: how many each of them gained; None if all gained one.
        token_s: when these tokens were on the host.
        logprobs: request id -> for each of its tokens the fields of `TokenLogprobs`; None if nobody asked.
        started: (request id, when it was first scheduled, prompt tokens found in the prefix cache).
        ended: (request id, finish reason, preemptions).
        refused: (request id, why the engine did not take it).
        stats: the fields of EngineStats, if they have changed.
        num_step_tokens: query tokens of the completed step; 0 if none was completed.
    """

    request_ids: list[int]
    token_ids: list[int]
    counts: list[int] | None
    token_s: float
    logprobs: dict[int, list[tuple]] | None
    started: list[tuple[int, float, int]]
    ended: list[tuple[int, str, int]]
    refused: list[tuple[int, str]]
    stats: tuple | None
    num_step_tokens: int


class Channel:
    """Messages over one socket; neither side ever waits for the other one to read.

    A message is its length in 4 bytes, little-endian, and a pickle. What the socket does not take stays in a backlog
    here, so whoever sends must `flush` from time to time while `has_backlog`.

        | length | pickle | length | pickle | length | pi     <- received so far; the rest comes with the next read
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        # A process started by this one would otherwise keep the socket open after this one's death.
        sock.set_inheritable(False)
        self._socket = sock
        self._received = bytearray()
        self._backlog: deque[memoryview] = deque()
        self._poll = select.poll()

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def has_backlog(self) -> bool:
        return bool(self._backlog)

    def send(self, message: object) -> None:
        """Send a message as far as the socket takes it, and keep the rest. To a closed socket it is lost."""
        pickled = pickle.dumps(message, protocol=5)
        self._backlog.append(memoryview(len(pickled).to_bytes(_LENGTH_BYTES, "little") + pickled))
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes of the backlog now."""
        backlog = self._backlog
        try:
            while backlog:
                sent = self._socket.send(backlog[0])
                if sent < len(backlog[0]):
                    backlog[0] = backlog[0][sent:]
                else:
                    backlog.popleft()
        except BlockingIOError:
            pass
        except OSError:  # the other side has gone, which `receive` will say
            backlog.clear()

    def receive(self, wait: bool = False) -> list[object]:
        """The messages that have come.

        Args:
            wait: until there is at least one, sending the backlog meanwhile.

        Raises:
            EOFError: the other side has closed, and all its messages have been received.
        """
        if self._backlog:
            self.flush()
        messages = self._read()
        while wait and not messages:
            self._wait(None)
            messages = self._read()
        return messages

    def close(self, timeout_s: float = 0.0) -> None:
        """Close, after trying for so long to send the backlog."""
        end_s = time.perf_counter() + timeout_s
        while self._backlog and (left_s := end_s - time.perf_counter()) > 0:
            self._poll.register(self._socket, select.POLLOUT)
            self._poll.poll(left_s * 1e3)
            self.flush()
        self._backlog.clear()
        self._socket.close()

    def _wait(self, timeout_s: float | None) -> None:
        self._poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._backlog else 0))
        self._poll.poll(timeout_s)
        self.flush()

    def _read(self) -> list[object]:
        received, messages = self._received, []
        for _ in range(_MAX_CHUNKS):
            try:
                chunk = self._socket.recv(_CHUNK_BYTES)
            except BlockingIOError:
                break
            except OSError:
                chunk = b""
            if not chunk:
                if messages:
                    return messages  # and the end is found by the next call
                raise EOFError
            received += chunk
            start = 0
            while len(received) - start >= _LENGTH_BYTES:
                stop = start + _LENGTH_BYTES + int.from_bytes(received[start : start + _LENGTH_BYTES], "little")
                if len(received) < stop:
                    break
                with memoryview(received) as view:
                    messages.append(pickle.loads(view[start + _LENGTH_BYTES : stop]))
                start = stop
            del received[:start]
            if len(chunk) < _CHUNK_BYTES:
                break
        return messages


def channel_pair() -> tuple[Channel, socket.socket]:
    """This side's channel, and the socket for the other side's."""
    ours, theirs = socket.socketpair()
    return Channel(ours), theirs
