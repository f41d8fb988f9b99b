"""A storm on a real server: 3,200 requests of 224 clients at a time, of whom some leave, dawdle, or talk rubbish.

Each request ends exactly once, with what it gives alone; and when all have gone, nothing is left of them: no request,
no block, no descriptor, no thread, no memory.
"""

import asyncio
import contextlib
import json
import random
import signal
import socket
import statistics
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import MINIATURE, Served

NAME = "miniature"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
# After a warm-up, stages of the same kind, with no more users: in memory that more had needed, a leak would hide.
NUM_USERS, NUM_WARM_UP, NUM_STAGES, NUM_STAGE_REQUESTS = 224, 500, 9, 300
NUM_REQUESTS = NUM_WARM_UP + NUM_STAGES * NUM_STAGE_REQUESTS
NUM_CASES = 120
# Fewer seats and blocks than requests, so that some wait and, where all are long, some lose their blocks.
MAX_NUM_SEQS, NUM_BLOCKS, MAX_BODY_BYTES = 208, 224, 100_000
CONTEXT = 512  # the miniature's
# Of a request that is to be aborted: it cannot come to its end before that is noticed.
ENDLESS = {"max_tokens": 440, "min_tokens": 440, "ignore_eos": True}
# So many of these at once need more blocks than there are.
LONG, NUM_LONG = {"max_tokens": 200, "ignore_eos": True}, 12
SHUTDOWN_S = 30
_DEADLINE_S = 240
# What a process may gain in a stage, as the median of the stages: 1 KiB a request. Whoever keeps an answer or a
# sequence of each request gains 2.4 KiB or more for each. Without a leak a single stage may gain over a megabyte, for a
# buffer that was never needed before or is about to be given back; the largest of 18 medians of nine stages, on a busy
# machine, was 0.4 KiB a request.
MAX_GROWTH_KIB = NUM_STAGE_REQUESTS
# glibc gives the buffers of tensors back to the system at once. It else keeps some megabytes more or less of them,
# depending on the order of requests, in which a leak would hide.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


# ---- requests ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """What one continuation came to. logprobs: the tokens and their log-probabilities, where asked for."""

    text: str
    finish_reason: str
    stop_reason: str | int | None
    logprobs: tuple[tuple[str, float], ...] | None


@dataclass
class Case:
    """A request that comes many times. choices, usage: what it gives alone, on an otherwise idle server."""

    path: str
    body: dict
    choices: list[Choice] = field(default_factory=list)
    usage: dict = field(default_factory=dict)


PIECES = [
    "def read(path):\n",
    "import os\n\n",
    "class Node:\n    def __init__(self",
    "# A test of\n",
    "for i in range(",
    '    """Return the ',
    "    if not isinstance(value, str):\n        raise ",
]


def make_cases(draw: random.Random) -> list[Case]:
    return [make_case(draw) for _ in range(NUM_CASES)]


def make_case(draw: random.Random) -> Case:
    text = "".join(draw.choices(PIECES, k=draw.choice((1, 1, 1, 2, 3, 12))))
    body = {"model": NAME, "max_tokens": min(48, 1 + int(draw.expovariate(1 / 7))), "temperature": 0}
    if draw.random() < 0.3:
        body |= {"temperature": draw.choice((0.7, 1.0)), "seed": draw.randrange(2**40), "top_p": 0.95}
    if draw.random() < 0.12:
        body["n"] = 2
    if draw.random() < 0.25:
        body["stop"] = draw.sample(
            ["\n", "self", "    ", "(", ")", "e", "return", "import os\n\nimport"], draw.choice((1, 2, 4))
        )
        body["include_stop_str_in_output"] = draw.random() < 0.3
    if draw.random() < 0.15:
        body |= {"frequency_penalty": 0.7, "presence_penalty": -0.4, "repetition_penalty": 1.2}
    if draw.random() < 0.3:
        body |= {"ignore_eos": True, "min_tokens": draw.randint(0, body["max_tokens"])}
    has_logprobs = draw.random() < 0.12
    if draw.random() < 0.4:
        body["messages"] = [{"role": "user", "content": text}]
        return Case(CHAT, body | ({"logprobs": True, "top_logprobs": 3} if has_logprobs else {}))
    return Case(COMPLETIONS, body | {"prompt": text} | ({"logprobs": 2} if has_logprobs else {}))


# Requests that are refused, with the status.
REFUSED = [
    (400, COMPLETIONS, b'{"model": "miniature", "prompt": '),
    (400, COMPLETIONS, {"prompt": "x", "temperature": -1}),
    (400, COMPLETIONS, {"prompt": [1] * CONTEXT, "stream": True}),
    (400, COMPLETIONS, {"prompt": ["x", "y" * 3 * CONTEXT], "n": 2, "stream": True}),
    (400, CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": CONTEXT, "stream": True}),
    (400, CHAT, {"messages": []}),
    (404, COMPLETIONS, {"model": "other", "prompt": "x"}),
    (413, COMPLETIONS, {"prompt": "z" * (MAX_BODY_BYTES + 1)}),
]


# ---- HTTP, with a hand on the socket -------------------------------------------------------------------------------


class Connection:
    """One connection to the server. Answers must come exactly as HTTP has them: what is too much fails the next one."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.is_open = True

    @classmethod
    async def make(cls, address: tuple[str, int], is_slow: bool = False) -> "Connection":
        sock = socket.socket()
        sock.setblocking(False)
        if is_slow:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await asyncio.get_running_loop().sock_connect(sock, address)
        return cls(*await asyncio.open_connection(sock=sock, limit=1024 if is_slow else 1 << 20))

    def send(self, path: str, body: dict | bytes, share: float = 1.0) -> None:
        """Send so much of a request."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: soak\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
        self.writer.write(request[: int(len(request) * share)])

    async def head(self) -> tuple[int, dict[str, str]]:
        status, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        self.is_open = headers.get("connection") != "close"
        return int(status.split()[1]), headers

    async def body(self, headers: dict[str, str]) -> bytes:
        return await self.reader.readexactly(int(headers["content-length"]))

    async def events(self) -> AsyncIterator[str]:
        """The events of a body in chunks."""
        rest = b""
        while size := int(await self.reader.readline(), 16):
            rest += await self.reader.readexactly(size)
            assert await self.reader.readexactly(2) == b"\r\n"
            *events, rest = rest.split(b"\n\n")
            for event in events:
                assert event.startswith(b"data: ")
                yield event[6:].decode()
        assert (rest, await self.reader.readline()) == (b"", b"\r\n")

    def drop(self, with_reset: bool) -> None:
        """Close, politely or not."""
        if with_reset:
            sock = self.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.writer.transport.abort()
        self.writer.close()
        self.is_open = False

    async def end(self) -> None:
        """Say that no more requests come. Nothing may come back but the server's own end."""
        if self.is_open:
            self.writer.write_eof()
            assert await self.reader.read() == b""
        self.writer.close()


def choice_of(path: str, found: dict) -> Choice:
    """A choice of an answer in one piece."""
    text = found["message"]["content"] if path == CHAT else found["text"]
    return Choice(text, found["finish_reason"], found["stop_reason"], pairs(path, found["logprobs"]))


def pairs(path: str, logprobs: dict | None) -> tuple[tuple[str, float], ...] | None:
    if logprobs is None:
        return None
    if path == CHAT:
        return tuple((entry["token"], entry["logprob"]) for entry in logprobs["content"])
    return tuple(zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True))


class StreamedChoice:
    """A choice of a stream, as its chunks come."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._text, self._logprobs = "", None
        self.whole: Choice | None = None
        self.num_chunks = 0

    def take(self, found: dict) -> None:
        assert self.whole is None, "a chunk behind the one with the finish reason"
        if self._path == CHAT:
            assert ("role" in found["delta"]) == (self.num_chunks == 0)
            self._text += found["delta"].get("content", "")
        else:
            self._text += found["text"]
        self.num_chunks += 1
        if found["logprobs"] is not None:
            self._logprobs = (self._logprobs or ()) + pairs(self._path, found["logprobs"])
        if found["finish_reason"] is not None:
            self.whole = Choice(self._text, found["finish_reason"], found["stop_reason"], self._logprobs)


# ---- clients -------------------------------------------------------------------------------------------------------


class Storm:
    """Clients at work, and what they have seen.

    Attributes:
        address: of the server. cases: with what they give.
        seen: "done", "refused", "left", ... -> requests; "stop", "length" -> continuations seen to their end;
            "tokens" -> that somebody saw; "aborted" -> continuations that cannot but have been aborted;
            "maybe aborted" -> that have been aborted, or were never begun; "maybe" -> that have ended in whichever way,
            or were never begun.
        num_streams, most_streams: answers that are being streamed, and the most there were.
    """

    def __init__(self, address: tuple[str, int], cases: list[Case]) -> None:
        self.address, self.cases = address, cases
        self.seen: Counter[str] = Counter()
        self.num_streams = self.most_streams = 0

    async def run(self, seed: int, num_requests: int) -> None:
        draw = random.Random(seed)
        kinds = {
            self.read: 80,
            self.read_slowly: 3,
            self.be_refused: 4,
            self.leave_early: 4,
            self.leave_in_between: 5,
            self.close_one_half: 2,
            self.send_one_half: 2,
        }
        jobs = iter(
            [(kind, draw.getrandbits(60)) for kind in draw.choices(list(kinds), kinds.values(), k=num_requests)]
        )
        async with asyncio.timeout(_DEADLINE_S), asyncio.TaskGroup() as group:
            for _ in range(NUM_USERS):
                group.create_task(self._user(jobs))

    async def _user(self, jobs) -> None:
        """One after the other, on one connection as long as it stays open."""
        connection = await Connection.make(self.address)
        for kind, seed in jobs:  # shared by all users
            if not connection.is_open:
                await connection.end()
                connection = await Connection.make(self.address)
            await kind(connection, random.Random(seed))
        await connection.end()

    @contextlib.contextmanager
    def _streaming(self):
        self.num_streams += 1
        self.most_streams = max(self.most_streams, self.num_streams)
        try:
            yield
        finally:
            self.num_streams -= 1

    async def read(self, connection: Connection, draw: random.Random, pause_s: float = 0.0) -> None:
        case = draw.choice(self.cases)
        if draw.random() < 0.06:
            choices, usage = await ask(connection, case)
        else:
            with_usage = draw.random() < 0.5
            with self._streaming():
                choices, usage = await stream(connection, case, with_usage, pause_s)
        assert_same(choices, case)
        if usage is not None:
            assert same_usage(usage, case.usage)
        self.seen["done"] += 1
        self.seen["tokens"] += case.usage["completion_tokens"]
        self.seen.update(choice.finish_reason for choice in choices)

    async def read_slowly(self, connection: Connection, draw: random.Random) -> None:
        slow = await Connection.make(self.address, is_slow=True)
        await self.read(slow, draw, pause_s=draw.choice((0.02, 0.05)))
        await slow.end()

    async def be_refused(self, connection: Connection, draw: random.Random) -> None:
        status, path, body = draw.choice(REFUSED)
        connection.send(path, body)
        found, headers = await connection.head()
        error = json.loads(await connection.body(headers))["error"]
        assert (found, headers["content-type"]) == (status, "application/json")
        assert error["message"] and set(error) == {"message", "type", "param", "code"}
        self.seen["refused"] += 1

    async def leave_early(self, connection: Connection, draw: random.Random) -> None:
        """Before the first byte, whether the request has begun by then or not."""
        body = self._endless(draw)
        connection.send(COMPLETIONS, body)
        await asyncio.sleep(draw.choice((0, 0.001, 0.05, 0.3)))
        connection.drop(draw.random() < 0.5)
        self.seen["left"] += 1
        self.seen["maybe aborted"] += body["n"]

    async def leave_in_between(self, connection: Connection, draw: random.Random) -> None:
        body = self._endless(draw) | {"stream": True}
        connection.send(COMPLETIONS, body)
        assert (await connection.head())[0] == 200
        left = draw.randint(1, 6)
        with self._streaming():
            async for event in connection.events():
                assert json.loads(event)["choices"][0]["finish_reason"] is None
                self.seen["tokens"] += 1  # at least
                left -= 1
                if not left:
                    break
        connection.drop(draw.random() < 0.5)
        self.seen["left"] += 1
        self.seen["aborted"] += body["n"]

    def _endless(self, draw: random.Random) -> dict:
        is_stream = draw.random() < 0.8
        return {"prompt": draw.choice(PIECES), "n": draw.choice((1, 1, 2)), "stream": is_stream, **ENDLESS}

    async def close_one_half(self, connection: Connection, draw: random.Random) -> None:
        """The server may take that for a client that leaves, or answer; but it must come to an end."""
        case = draw.choice(self.cases)
        connection.send(case.path, {**case.body, "stream": True})
        await asyncio.sleep(draw.choice((0, 0.01, 0.1)))
        connection.writer.write_eof()
        answer = await connection.reader.read()
        assert answer.count(b"data: [DONE]") <= 1
        assert answer.count(b'"finish_reason":"') <= len(case.choices)
        connection.drop(with_reset=False)
        self.seen["left"] += 1
        self.seen["maybe"] += len(case.choices)

    async def send_one_half(self, connection: Connection, draw: random.Random) -> None:
        case = draw.choice(self.cases)
        connection.send(case.path, case.body, share=draw.random() * 0.95)
        await asyncio.sleep(draw.choice((0, 0.01)))
        connection.drop(draw.random() < 0.5)
        self.seen["left"] += 1


async def ask(connection: Connection, case: Case) -> tuple[list[Choice], dict]:
    """The answer in one piece."""
    connection.send(case.path, case.body)
    status, headers = await connection.head()
    answer = json.loads(await connection.body(headers))
    assert status == 200, answer
    assert [choice["index"] for choice in answer["choices"]] == list(range(case.body.get("n", 1)))
    return [choice_of(case.path, choice) for choice in answer["choices"]], answer["usage"]


async def stream(
    connection: Connection, case: Case, with_usage: bool, pause_s: float = 0.0
) -> tuple[list[Choice], dict | None]:
    """The answer as a stream, checked to end exactly once."""
    connection.send(case.path, {**case.body, "stream": True, "stream_options": {"include_usage": with_usage}})
    status, headers = await connection.head()
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    choices = [StreamedChoice(case.path) for _ in range(case.body.get("n", 1))]
    usages, is_done = [], False
    async for event in connection.events():
        assert not is_done, "an event behind [DONE]"
        is_done = event == "[DONE]"
        if is_done:
            continue
        chunk = json.loads(event)
        assert not usages, "a chunk behind the usage"
        for found in chunk["choices"]:
            choices[found["index"]].take(found)
        if not chunk["choices"]:
            usages.append(chunk["usage"])
        if pause_s:
            await asyncio.sleep(pause_s)
    assert is_done
    assert len(usages) == with_usage
    assert all(choice.whole is not None for choice in choices)
    return [choice.whole for choice in choices], usages[0] if usages else None


def assert_same(choices: list[Choice], case: Case) -> None:
    """As it gives alone; only the rounding of log-probabilities depends on who else is in the batch."""
    for found, known in zip(choices, case.choices, strict=True):
        assert replace(found, logprobs=None) == replace(known, logprobs=None), case.body
        for (token, logprob), (known_token, known_logprob) in zip(
            found.logprobs or (), known.logprobs or (), strict=True
        ):
            assert token == known_token
            assert logprob == pytest.approx(known_logprob, abs=1e-3)


def same_usage(usage: dict, other: dict) -> bool:
    """But for what the prefix cache had."""
    return all(usage[name] == other[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens"))


async def know_alone(address: tuple[str, int], cases: list[Case]) -> None:
    connection = await Connection.make(address)
    for case in cases:
        case.choices, case.usage = await ask(connection, case)
    await connection.end()


# ---- the server ----------------------------------------------------------------------------------------------------


def metrics(text: str) -> dict[str, float]:
    """By name and labels; of histograms only count and sum."""
    return {
        " ".join([sample.name, *(value for key, value in sample.labels.items() if key != "model_name")]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


async def get_metrics(served: Served) -> dict[str, float]:
    async with httpx.AsyncClient(timeout=60) as client:
        return metrics((await client.get(f"{served.root_url}/metrics")).text)


def when_idle(served: Served) -> dict[str, float]:
    """The metrics once no request is left; that one is left for ever is what this finds."""
    end = time.monotonic() + 30
    while True:
        found = metrics(httpx.get(f"{served.root_url}/metrics").text)
        if found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0:
            return found
        assert time.monotonic() < end, found
        time.sleep(0.02)


@dataclass(frozen=True)
class Footprint:
    """What a process holds."""

    memory_kib: int
    num_descriptors: int
    num_threads: int

    @classmethod
    def of(cls, pid: int) -> "Footprint":
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        # Pages of files come and go with the machine's memory.
        memory = sum(int(status[name].split()[0]) for name in ("RssAnon", "RssShmem"))
        return cls(memory, len(list(Path(f"/proc/{pid}/fd").iterdir())), int(status["Threads"]))


def footprints(served: Served) -> dict[str, Footprint]:
    """Of the server and of its engine's process, once connections are closed."""
    [worker] = [pid for pid in served.children() if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    pids = {"server": served.process.pid, "worker": worker}
    end, before = time.monotonic() + 10, None
    while True:
        found = {name: Footprint.of(pid) for name, pid in pids.items()}
        if time.monotonic() > end or (before is not None and sockets(found) == sockets(before)):
            return found
        before = found
        time.sleep(0.2)


def sockets(found: dict[str, Footprint]) -> list[int]:
    return [each.num_descriptors for each in found.values()]


def address_of(served: Served) -> tuple[str, int]:
    url = httpx.URL(served.base_url)
    return url.host, url.port


async def watched(served: Served, work) -> list[dict[str, float]]:
    """The metrics while something goes on: the server must answer at any time."""
    samples, task = [], asyncio.ensure_future(work)
    async with httpx.AsyncClient(base_url=served.root_url, timeout=60) as client:
        while not task.done():
            samples.append(metrics((await client.get("/metrics")).text))
            assert (await client.get("/health")).status_code == 200
            await asyncio.wait([task], timeout=0.5)
    await task
    return samples


# ---- the tests -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """What came of the storm.

    Attributes:
        before, after: metrics in front of its first request and behind its last one. during: in between.
        fresh, stages: what the processes hold without connections: in front of it; behind the warm-up and each stage.
    """

    storm: Storm
    before: dict[str, float]
    during: list[dict[str, float]]
    after: dict[str, float]
    fresh: dict[str, Footprint]
    stages: list[dict[str, Footprint]]

    def gained(self, name: str) -> float:
        return self.after[f"vllm:{name}"] - self.before[f"vllm:{name}"]


@pytest.fixture(scope="module")
def served():
    limits = ("--max-num-seqs", MAX_NUM_SEQS, "--num-gpu-blocks-override", NUM_BLOCKS, "--block-size", 32)
    others = ("--max-body-bytes", MAX_BODY_BYTES, "--shutdown-timeout", SHUTDOWN_S, "--served-model-name", NAME)
    with Served(MINIATURE, "--port", 0, *limits, *others, **ALLOCATOR) as server:
        yield server


@pytest.fixture(scope="module")
def record(served) -> Record:
    cases = make_cases(random.Random(1))
    storm = Storm(address_of(served), cases)
    asyncio.run(know_alone(storm.address, cases))
    before, fresh = when_idle(served), footprints(served)
    during, stages = [], []
    for seed, num_requests in enumerate([NUM_WARM_UP, *[NUM_STAGE_REQUESTS] * NUM_STAGES], 2):
        during += asyncio.run(watched(served, storm.run(seed, num_requests)))
        after = when_idle(served)
        stages.append(footprints(served))
    return Record(storm, before, during, after, fresh, stages)


def test_every_request_ends_once_with_what_it_gives_alone(record):
    """Which each client has checked for itself; here, that there were as many as there should be."""
    seen = record.storm.seen
    assert seen["done"] + seen["refused"] + seen["left"] == NUM_REQUESTS
    assert min(seen[name] for name in ("done", "refused", "left", "aborted", "stop", "length")) > 50
    assert record.storm.most_streams >= 200


def test_the_counters_agree_with_what_clients_saw(record):
    seen, gained = record.storm.seen, record.gained
    ended = {reason: gained(f"request_success_total {reason}") for reason in ("stop", "length", "abort", "error")}
    assert ended["error"] == 0
    most = seen["aborted"] + seen["maybe aborted"] + seen["maybe"]
    assert seen["aborted"] <= ended["abort"] <= most
    for reason in ("stop", "length"):
        assert seen[reason] <= ended[reason] <= seen[reason] + seen["maybe"]
    assert sum(ended.values()) <= seen["stop"] + seen["length"] + most
    whole = ended["stop"] + ended["length"]
    for name in ("e2e_request_latency_seconds", "request_queue_time_seconds", "request_generation_tokens"):
        assert gained(f"{name}_count") == whole
    assert whole <= gained("time_to_first_token_seconds_count") <= sum(ended.values())
    assert gained("generation_tokens_total") >= gained("request_generation_tokens_sum") >= 0
    assert gained("generation_tokens_total") >= seen["tokens"]
    assert gained("time_to_first_token_seconds_count") + gained("inter_token_latency_seconds_count") == gained(
        "generation_tokens_total"
    )


def test_the_metrics_made_sense_all_the_time(record):
    samples = [record.before, *record.during, record.after]
    for sample in samples:
        assert 0 <= sample["vllm:num_requests_running"] <= MAX_NUM_SEQS
        assert 0 <= sample["vllm:kv_cache_usage_perc"] <= 1
    for sample, later in pairwise(samples):
        assert all(later[name] >= value for name, value in sample.items() if name.endswith(("_total", "_count")))
    assert max(sample["vllm:num_requests_waiting"] for sample in samples) > 0
    assert record.after["vllm:kv_cache_usage_perc"] == 0


@pytest.mark.parametrize("process", ["server", "worker"])
def test_nothing_is_left(record, process):
    stages = [stage[process] for stage in record.stages]
    assert {stage.num_descriptors for stage in stages} == {record.fresh[process].num_descriptors}
    assert len({stage.num_threads for stage in stages}) == 1
    growth = [after.memory_kib - before.memory_kib for before, after in pairwise(stages)]
    assert statistics.median(growth) <= MAX_GROWTH_KIB, growth


def test_sigterm_ends_it_in_time(served, record):
    """While requests crowd one another out of the cache: they finish, with what they give alone."""
    address = record.storm.address
    longs = [Case(COMPLETIONS, {"prompt": piece, "temperature": 0, **LONG}) for piece in PIECES[:3]]

    async def run() -> None:
        await know_alone(address, longs)
        before = (await get_metrics(served))["vllm:num_preemptions_total"]
        crowd = longs * NUM_LONG + record.storm.cases[:10]
        connections = [await Connection.make(address) for _ in crowd]
        async with asyncio.timeout(_DEADLINE_S), asyncio.TaskGroup() as group:
            jobs = zip(connections, crowd, strict=True)
            streams = [group.create_task(stream(connection, case, True)) for connection, case in jobs]
            while (await get_metrics(served))["vllm:num_preemptions_total"] == before:
                assert not all(each.done() for each in streams), "nobody was crowded out"
                await asyncio.sleep(0.05)
            served.process.send_signal(signal.SIGTERM)
        for case, each in zip(crowd, streams, strict=True):
            assert_same(each.result()[0], case)
        for connection in connections:
            await connection.end()

    asyncio.run(run())
    assert served.process.wait(SHUTDOWN_S) == 0
    assert served.stderr[-1] == "shutting down", "nothing was said of errors"
