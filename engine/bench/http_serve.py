"""`memwall bench serve --base-url`: the workload replayed over HTTP on any OpenAI-compatible server (open loop).

Prompts, forced lengths, warm-up, columns and metrics are those of the run in one process. Seen is what a client sees:

    output event    a piece of the stream that has `choices`, usually one token; text may be empty
    its time        that of the read that brought it; events of one read have the same
    tokens          what the server counted, `usage` at the end of the stream

When a request was scheduled, how often it was preempted and what a step was, no client knows.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import re
import time
from array import array
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, fields
from pathlib import PurePosixPath
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.bench import tables
from engine.bench.http_client import BaseUrl, Client, Events, HttpError, Response, read_json
from engine.bench.metrics import distribution_ms, latencies
from engine.bench.record import client_environment, rounded
from engine.bench.replay import quiet_collector
from engine.bench.serve import DEFAULT_VOCAB_SIZE, describe, fit_by, medians, warm_up_of, workload_of
from engine.bench.serve import table as table_of_runs
from engine.bench.workload import Entry, Prompts, Workload
from engine.config import EngineConfig
from engine.errors import UserError
from engine.values import MAX_INT32, MAX_SEED, shown, whole_number

if TYPE_CHECKING:
    from engine.bench.session import Session

# From when on the client is called the bottleneck: it is busy nearly all the time, or requests leave so many ms late
# and by such a share of their TTFT.
MAX_CPU_SHARE, MAX_LATE_MS, MAX_LATE_SHARE = 0.9, 5.0, 0.05
# Timers of event loops count whole milliseconds and may be one late; the rest is waited for actively.
_LEAD_S = 0.002
_MAX_MESSAGE_CHARS = 200
_MAX_REFUSAL_BYTES = 1 << 16
_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*[^\s\]]')


# ---- one request -----------------------------------------------------------------------------------------------------


class Completion:
    """A streamed request: what arrived when, and whether it is what was asked for.

    Attributes:
        sent_s: when it was written to a connection, on the clock of time.perf_counter; None before.
        times_s: of its output events.
        error: why it failed, in one line; empty if it did not, which is known at its end.
        cached_tokens: of its prompt, if the server tells.
    """

    def __init__(self, document: bytes, output_tokens: int) -> None:
        self.document = document
        self.sent_s: float | None = None
        self.times_s = array("d")
        self.error = ""
        self.output_tokens = output_tokens
        self.cached_tokens: int | None = None
        self._events = Events()
        self._last = b""
        self._usage: dict[str, Any] | None = None
        self._refusal = b""
        self._is_done = False

    def receive(self, response: Response, body: bytes, now_s: float) -> None:
        """Take a piece of the answer."""
        if response.status != 200:
            self._refusal = (self._refusal + body)[:_MAX_REFUSAL_BYTES]
            return
        for payload in self._events.feed(body):
            if _CHOICES.search(payload):  # in a text its quotes would be escaped
                self.times_s.append(now_s)
                self._last = payload
            elif payload == b"[DONE]":
                self._is_done = True
            else:
                self._note(payload)

    def end(self, response: Response) -> None:
        """The answer is there; find out whether it is right."""
        if response.status != 200:
            self.fail(f"HTTP {response.status}: {_message(self._refusal)}")
            return
        self._check()

    def end_early(self, error: HttpError) -> None:
        """The connection failed; behind [DONE] that does not matter."""
        if self._is_done:
            self._check()
        else:
            self.fail(f"{error} after {len(self.times_s)} events" if self.times_s else str(error))

    def fail(self, error: str) -> None:
        """The first reason counts."""
        self.error = self.error or " ".join(error.split())[:_MAX_MESSAGE_CHARS]

    def _note(self, payload: bytes) -> None:
        """An event without choices: the usage, or an error in the middle of the stream."""
        document = read_json(payload)
        if not isinstance(document, dict):
            self.fail(_not_json(payload))
        elif document.get("error"):
            self.fail(f"the server ended the stream: {_message(payload)}")
        elif isinstance(document.get("usage"), dict):
            self._usage = document["usage"]

    def _check(self) -> None:
        """Whether the stream has what was asked for."""
        last = read_json(self._last)
        if isinstance(last, dict):
            self._check_usage(self._usage or last.get("usage"), last.get("choices"))
        else:
            self.fail(_not_json(self._last) if self._last else "the stream has no event with choices")

    def _check_usage(self, usage: Any, choices: Any) -> None:
        count = usage.get("completion_tokens") if isinstance(usage, dict) else None
        if type(count) is not int:
            self.fail("the stream tells no usage, so its tokens are not known; the server lacks stream_options")
        elif count != self.output_tokens:
            choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
            self.fail(
                f"it ended after {count} output tokens instead of {self.output_tokens} "
                f"({choice.get('finish_reason')}); does the server take ignore_eos or min_tokens?"
            )
        else:
            details = usage.get("prompt_tokens_details")
            cached = details.get("cached_tokens") if isinstance(details, dict) else None
            self.cached_tokens = cached if type(cached) is int else None


def _message(body: bytes) -> str:
    """What the server says is wrong, as OpenAI, vLLM or FastAPI phrase it."""
    found = read_json(body)
    for name in ("error", "message", "detail"):
        while isinstance(found, dict) and name in found:
            found = found[name]
    return found if isinstance(found, str) and found else body[:_MAX_MESSAGE_CHARS].decode("utf-8", "replace")


def _not_json(payload: bytes) -> str:
    return f"the stream has an event that is no JSON object: {shown(payload.decode('utf-8', 'replace'))}"


# ---- a run -----------------------------------------------------------------------------------------------------------


@dataclass
class HttpReplay:
    """What a run of a workload left behind.

    Attributes:
        start_s: the clock when the workload began.
        cpu_share: of a core that the client was busy.
    """

    workload: Workload
    completions: list[Completion]
    start_s: float = 0.0
    cpu_share: float = 0.0
    peak_outstanding: int = 0
    num_outstanding: int = field(default=0, repr=False)

    @property
    def arrivals_s(self) -> list[float]:
        """When requests are due, on the clock."""
        return [self.start_s + entry.arrival_s for entry in self.workload.entries]

    @property
    def finished(self) -> list[int]:
        """Indices of the requests that went as they should."""
        return [index for index, completion in enumerate(self.completions) if not completion.error]

    @property
    def first_error(self) -> str:
        return next((completion.error for completion in self.completions if completion.error), "")

    def columns(self) -> dict[str, list[Any]]:
        """Per request as `engine.bench.replay` has them; of a failed one only what was asked for, and its error."""
        rows = list(zip(self.workload.entries, self.completions, strict=True))
        unknown = [None] * len(rows)
        columns: dict[str, list[Any]] = {
            "arrival_s": [round(entry.arrival_s, 6) for entry, _ in rows],
            "scheduled_s": unknown,
            "first_token_s": [self._time(completion, 0) for _, completion in rows],
            "last_token_s": [self._time(completion, -1) for _, completion in rows],
            "input_tokens": [entry.input_tokens for entry, _ in rows],
            "output_tokens": [None if completion.error else completion.output_tokens for _, completion in rows],
            "cached_tokens": [completion.cached_tokens for _, completion in rows],
            "preemptions": unknown,
        }
        if self.first_error:
            columns["error"] = [completion.error or None for _, completion in rows]
        return columns

    def result(self) -> dict[str, Any]:
        """The figures of a run, of which some request must have finished."""
        columns, finished = self.columns(), self.finished
        of_finished = {name: [values[index] for index in finished] for name, values in columns.items()}
        gaps_s = np.concatenate([np.diff(self.completions[index].times_s) for index in finished])
        cached = [count for count in of_finished["cached_tokens"] if count is not None]
        found = latencies(of_finished, gaps_s)
        return found | {
            "num_failed": len(self.completions) - len(finished),
            "peak_running": None,
            "peak_outstanding": self.peak_outstanding,
            "num_preemptions": None,
            "cached_tokens": sum(cached) if cached else None,
            "num_steps": None,
            "mean_step_tokens": None,
            "num_events": sum(len(completion.times_s) for completion in self.completions),
            "client": self.client(found["ttft_ms"]),
            "requests": columns,
        }

    def client(self, ttft_ms: dict[str, float]) -> dict[str, Any]:
        """How well the client kept up: how late requests were written, connections being opened included."""
        pairs = zip(self.completions, self.arrivals_s, strict=True)
        late_s = [completion.sent_s - arrival_s for completion, arrival_s in pairs if completion.sent_s is not None]
        late_ms = distribution_ms(late_s) or {}
        too_late = any(late > max(MAX_LATE_MS, MAX_LATE_SHARE * ttft_ms[name]) for name, late in late_ms.items())
        return {
            "late_ms": late_ms | {"max": round(max(late_s) * 1e3, 4)},
            "cpu_share": rounded(self.cpu_share),
            "is_bottleneck": too_late or self.cpu_share > MAX_CPU_SHARE,
        }

    def _time(self, completion: Completion, which: int) -> float | None:
        return None if completion.error else round(completion.times_s[which] - self.start_s, 6)


@dataclass(frozen=True)
class Server:
    """A server, and the model of it that is measured.

    Attributes:
        max_model_len: prompt and output together; None where the server does not tell.
        vocab_size: token ids of prompts are below it.
        seed: of the prompts, 0 for None. Requests bring one too, unless it is None: some servers sample requests that
            have a seed one by one, which nobody should measure unawares.
    """

    client: Client
    url: BaseUrl
    model: str
    max_model_len: int | None
    vocab_size: int
    temperature: float
    seed: int | None

    def why_not(self, entry: Entry) -> str:
        """Why the server cannot take a request, as far as it is known; empty if it can."""
        needed = entry.input_tokens + entry.output_tokens
        if self.max_model_len is None or needed <= self.max_model_len:
            return ""
        return f"{needed} tokens of input and output are more than the server's max_model_len {self.max_model_len}"

    async def replay(self, workload: Workload, run: int) -> HttpReplay:
        """Send every request at its time, and wait for all answers."""
        found = HttpReplay(workload, self._completions(workload, run))
        with quiet_collector():
            cpu_s, found.start_s = time.process_time(), perf_counter()
            async with asyncio.TaskGroup() as outstanding:
                spun_s = await self._send_all(found, outstanding)
            took_s = perf_counter() - found.start_s
            found.cpu_share = max(time.process_time() - cpu_s - spun_s, 0.0) / took_s
        return found

    async def _send_all(self, found: HttpReplay, outstanding: asyncio.TaskGroup) -> float:
        """Send every request at its time. Returns the seconds in which there was nothing to do but wait actively."""
        waiting = deque(zip(found.arrivals_s, found.completions, strict=True))
        client, spun_s = self.client, 0.0

        def send_due() -> None:
            while waiting and waiting[0][0] <= perf_counter():
                outstanding.create_task(self._complete(waiting.popleft()[1], found))
            client.due_s = waiting[0][0] if waiting else math.inf

        client.on_due = send_due
        send_due()
        while waiting:
            now_s, num_reads = perf_counter(), client.num_reads
            if client.due_s - now_s > _LEAD_S:
                await asyncio.sleep(client.due_s - now_s - _LEAD_S)
                continue
            await asyncio.sleep(0)
            spun_s += perf_counter() - now_s if client.num_reads == num_reads else 0.0
            send_due()
        return spun_s

    def _completions(self, workload: Workload, run: int) -> list[Completion]:
        """Requests as they will be sent, so that nothing is left to be encoded when their time has come."""
        prompts = Prompts(self.vocab_size, self.seed or 0, run).of(workload)
        completions = []
        for index, (entry, prompt) in enumerate(zip(workload.entries, prompts, strict=True)):
            document = {
                "model": self.model,
                "prompt": prompt,
                "max_tokens": entry.output_tokens,
                "min_tokens": entry.output_tokens,
                "ignore_eos": True,
                "temperature": self.temperature,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            if self.seed is not None:
                document["seed"] = (self.seed + index) & MAX_SEED
            encoded = json.dumps(document, separators=(",", ":")).encode("ascii")
            completions.append(Completion(encoded, entry.output_tokens))
        return completions

    def _complete(self, completion: Completion, found: HttpReplay) -> Coroutine[Any, Any, None]:
        """Send a request. Returns what to await for its end."""
        document, completion.document = completion.document, b""
        answer = self.client.request(f"{self.url.path}/completions", completion, document)
        found.num_outstanding += 1
        found.peak_outstanding = max(found.peak_outstanding, found.num_outstanding)

        async def end() -> None:
            try:
                completion.end(await answer())
            except HttpError as error:
                completion.end_early(error)
            finally:
                found.num_outstanding -= 1

        return end()


# ---- the server ------------------------------------------------------------------------------------------------------


async def find_server(client: Client, options: argparse.Namespace) -> tuple[Server, dict[str, Any]]:
    """The server of the options, and what a record says of it.

    Raises:
        UserError: there is none, it refuses, or it is not clear which model is meant.
    """
    url: BaseUrl = options.base_url
    try:
        status, document = await client.get_json(f"{url.path}/models")
        version_status, version = await client.get_json(f"{url.root}/version")
    except HttpError as error:
        raise UserError(f"{url}: {error}; is the server running?") from None
    if status in (401, 403):
        raise UserError(f"{url} refuses the key (HTTP {status}); give one with --api-key, or in OPENAI_API_KEY")
    cards = document.get("data") if status == 200 and isinstance(document, dict) else None
    if not isinstance(cards, list) or not all(isinstance(card, dict) and "id" in card for card in cards):
        raise UserError(
            f"{url}/models does not list models (HTTP {status}); --base-url is a server's address with its /v1"
        )
    card = _choose(cards, options.served_model)
    max_model_len = _positive(card.get("max_model_len"))
    server = Server(
        client,
        url,
        str(card["id"]),
        max_model_len,
        options.vocab_size or _positive(card.get("vocab_size")) or DEFAULT_VOCAB_SIZE,
        options.temperature,
        getattr(options, "seed", None),
    )
    about = {
        "base_url": url.as_committed,
        "model": PurePosixPath(server.model).name if server.model.startswith("/") else server.model,
        "max_model_len": max_model_len,
        "vocab_size": server.vocab_size,
        "version": version.get("version") if version_status == 200 and isinstance(version, dict) else None,
    }
    return server, about


def _choose(cards: list[dict[str, Any]], name: str | None) -> dict[str, Any]:
    names = [str(card["id"]) for card in cards]
    if name is not None and name in names:
        return cards[names.index(name)]
    listed = ", ".join(names) or "none"
    if name is not None:
        raise UserError(f"the server has no model {name!r}; it has {listed}")
    if len(cards) != 1:
        raise UserError(f"the server has {len(cards)} models; choose one with --model: {listed}")
    return cards[0]


def _positive(value: Any) -> int | None:
    return value if type(value) is int and 0 < value <= MAX_INT32 else None


# ---- the suite -------------------------------------------------------------------------------------------------------


def check(options: argparse.Namespace) -> None:
    """Raise UserError for options that only an engine in this process has."""
    if options.model is not None:
        raise UserError(
            f"{shown(options.model)} would be a model in this process; with --base-url there is none, and --model "
            "chooses among the server's"
        )
    names = [each.name for each in fields(EngineConfig) if each.name not in ("model", "seed")]
    given = [name for name in (*names, "step_log") if getattr(options, name, None) is not None]
    if given:
        raise UserError(
            f"--{given[0].replace('_', '-')} is for an engine in this process; the one behind --base-url has its own"
        )
    if getattr(options, "seed", None) is not None:
        whole_number("seed", options.seed, 0, MAX_SEED)
    key = _key(options)
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError("the key of --api-key or OPENAI_API_KEY has characters that no HTTP header can hold")


def run(session: Session, options: argparse.Namespace, _: None = None) -> None:
    """Replay the workload `--repeat` times. After Ctrl-C what the finished runs gave is kept.

    Raises:
        UserError: the workload cannot be read, the server is not there, or no request finished.
    """
    workload = workload_of(options)
    session.say(f"serve, {len(workload)} requests over {workload.entries[-1].arrival_s:,.1f} s, on {options.base_url}")
    _allow_connections()
    name, new_loop = _event_loop()
    session.record.environment = client_environment(name)
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(_measure(session, options, workload))


async def _measure(session: Session, options: argparse.Namespace, workload: Workload) -> None:
    client = Client(options.base_url, _key(options))
    try:
        server, session.record.server = await find_server(client, options)
        fitting, reasons = fit_by(server.why_not, workload, options.strict)
        for line in reasons[:1]:
            session.say(f"  {len(reasons)} of {len(workload)} requests are left out: {line}")
        about = describe(fitting, len(reasons), options.request_rate_scale)
        await _warm_up(server, warm_up_of(fitting, options), options)
        await _repeat(session, server, fitting, about, options)
    finally:
        client.close()


async def _warm_up(server: Server, workload: Workload, options: argparse.Namespace) -> None:
    for _ in range(2 if len(workload) else 0):  # the second finds the first's prompts in the cache, if there is one
        found = await server.replay(workload, run=0)
        _ensure_some_finished(found, options)


async def _repeat(
    session: Session, server: Server, workload: Workload, about: dict[str, Any], options: argparse.Namespace
) -> None:
    runs: list[dict[str, Any]] = []
    num_failed, first_error = 0, ""
    for run in range(1, options.repeat + 1):
        found = await server.replay(workload, run)
        num_failed += len(workload) - len(found.finished)
        first_error = first_error or found.first_error
        if not runs:
            _ensure_some_finished(found, options)
        if found.finished:
            runs.append(found.result())
            rate = runs[-1]["output_throughput_tokens_per_s"]
            session.say(f"  run {run}: {tables.number(rate, 0)} output tokens/s")
        failures = {"num_failed": num_failed, "first_error": first_error or None}
        session.keep([about | failures | {"median": medians(runs), "runs": runs}])
        if not found.finished:
            session.say(f"  run {run}: no request succeeded: {found.first_error}")
            break


def _ensure_some_finished(found: HttpReplay, options: argparse.Namespace) -> None:
    if found.finished:
        return
    hint = "" if options.vocab_size else "; if it is the token ids that do not fit, give --vocab-size"
    hint = hint if found.first_error.startswith("HTTP 4") else ""
    raise UserError(f"none of {len(found.completions)} requests succeeded: {found.first_error}{hint}")


def _key(options: argparse.Namespace) -> str | None:
    return options.api_key if options.api_key is not None else os.environ.get("OPENAI_API_KEY")


def _event_loop() -> tuple[str, Callable[[], asyncio.AbstractEventLoop]]:
    """uvloop's where it is installed, which takes a third of the time for a read."""
    try:
        import uvloop
    except ImportError:
        return "asyncio", asyncio.new_event_loop
    return "uvloop", uvloop.new_event_loop


def _allow_connections() -> None:
    """As many open files as this process may have at all."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


# ---- the table -------------------------------------------------------------------------------------------------------


def table(results: list[dict[str, Any]]) -> str:
    """As of a run in one process, and whether server and client kept up."""
    result = results[0]
    runs = result["runs"]
    late = {name: max(run["client"]["late_ms"][name] for run in runs) for name in ("p50", "p99", "max")}
    shown_late = " / ".join(tables.number(value, 2) for value in late.values())
    busy = max(run["client"]["cpu_share"] for run in runs)
    lines = [
        table_of_runs(results),
        f"at most {max(run['peak_outstanding'] for run in runs):,} requests outstanding; the client sent them "
        f"{shown_late} ms late (p50 / p99 / max) and was busy for {tables.percent(busy)} of the time",
    ]
    slow = [str(number) for number, run in enumerate(runs, 1) if run["client"]["is_bottleneck"]]
    if slow:
        lines.append(f"the client was the bottleneck in run {', '.join(slow)}: these are not the server's times alone")
    if result["num_failed"]:
        lines.append(f"{result['num_failed']} requests failed: {result['first_error']}")
    return "\n".join(lines)
