"""`memwall bench serve --base-url`: a stub of an OpenAI server that answers as it is told, over real sockets.

Counts, order, columns and sentences are asserted, and no time.
"""

import asyncio
import contextlib
import http.client
import io
import json
import os
import signal
import threading
from array import array
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.bench import http_serve
from engine.bench.http_client import BaseUrl, Client, Events, HttpError, Response
from engine.bench.http_serve import Completion, HttpReplay
from engine.bench.metrics import latencies
from engine.bench.record import read_record
from engine.bench.workload import Entry, Prompts, Workload, save_workload
from engine.commands.__main__ import main
from engine.commands.bench import bench
from engine.errors import UserError

VOCAB = 1000
DROP = object()  # in an answer: the connection is cut here

# ---- a server that does as it is told --------------------------------------------------------------------------------


def event(**document) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def token(text: str = " a", finish_reason: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": text, "finish_reason": finish_reason}], usage=None)


def usage(output_tokens: int, cached: int | None = None) -> bytes:
    details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
    return event(choices=[], usage={"completion_tokens": output_tokens, **details})


DONE = b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(*pieces: bytes) -> list:
    """An answer of one chunk per piece, each written by itself."""
    return [HEAD, *(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces), b"0\r\n\r\n"]


def plain(status: int, document: object) -> list:
    body = json.dumps(document).encode() if not isinstance(document, bytes) else document
    return [b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body]


def good(request: dict, cached: int | None = None) -> list:
    """A stream of as many tokens as are asked for."""
    count = request["max_tokens"]
    return chunked(*[token()] * (count - 1), token(finish_reason="length"), usage(count, cached), DONE)


class Stub:
    """An OpenAI server.

    Attributes:
        requests: documents of completions in order of arrival. headers: of the last request.
        answer: what to write for one of them, bytes or DROP. num_connections: that were opened.
        hold_until: answers wait until so many requests are there.
    """

    def __init__(self, answer: Callable[[dict], list] = good, **card) -> None:
        self.answer = answer
        self.models = [{"id": "stub", **card}]
        self.gets = {"/version": plain(200, {"version": "1.2.3"})}
        self.requests: list[dict] = []
        self.headers = ""
        self.num_connections = 0
        self.hold_until = 0
        self.on_request: Callable[[], None] = lambda: None
        self._all_there = asyncio.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                lengths = [line.split(":")[1] for line in head.split("\r\n") if line.startswith("Content-Length")]
                body = await reader.readexactly(int(lengths[0]) if lengths else 0)
                self.headers = head
                for piece in await self._answer_to(head.split()[1], body):
                    if piece is DROP:
                        writer.transport.abort()
                        return
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
        writer.close()

    async def _answer_to(self, path: str, body: bytes) -> list:
        if path == "/v1/models":
            return self.gets.get(path) or plain(200, {"object": "list", "data": self.models})
        if path != "/v1/completions":
            return self.gets.get(path) or plain(404, {"detail": "Not Found"})
        request = json.loads(body)
        self.requests.append(request)
        self.on_request()
        if len(self.requests) >= self.hold_until:
            self._all_there.set()
        await self._all_there.wait()
        return self.answer(request)


@contextlib.contextmanager
def running(stub: Stub) -> Iterator[Stub]:
    """The stub in a thread of its own, on a free port."""
    ready, loop = threading.Event(), asyncio.new_event_loop()

    async def serve() -> None:
        server = await asyncio.start_server(stub.serve, "127.0.0.1", 0, backlog=512)
        stub.port = server.sockets[0].getsockname()[1]
        ready.set()
        await stopped.wait()
        server.close()

    stopped = asyncio.Event()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield stub
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join(10)


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(autouse=True, scope="module")
def no_garbage_collection():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.bench.replay.gc.collect", lambda: 0)
        yield


ENTRIES = (Entry(0.0, 40, 3), Entry(0.0, 7, 1), Entry(0.01, 90, 5))


@pytest.fixture
def workload(tmp_path) -> Path:
    path = tmp_path / "w.jsonl"
    save_workload(Workload("w", ENTRIES), path)
    return path


def serve(stub: Stub, workload: Path, *arguments: str, vocab_size: int = VOCAB) -> tuple[int, dict]:
    """Exit code and record."""
    output = workload.with_name("record.json")
    given = ("--vocab-size", str(vocab_size)) if vocab_size else ()
    files = ("--workload", str(workload), "--output", str(output))
    code = bench(["serve", "--base-url", stub.url, *files, "--num-warmups", "0", *given, *arguments])
    return code, read_record(output)


# ---- what is sent, and what is recorded ------------------------------------------------------------------------------


def test_a_workload_over_http(workload, capsys):
    with running(Stub(lambda request: good(request, cached=32))) as stub:
        code, record = serve(stub, workload, "--repeat", "2", "--temperature", "0")
    assert code == 0
    assert (record["suite"], record["engines"], record["limits"]) == ("serve", [], {})
    assert record["server"] == {
        "base_url": stub.url, "model": "stub", "max_model_len": None, "vocab_size": VOCAB, "version": "1.2.3",
    }  # fmt: skip
    (result,) = record["results"]
    assert (result["num_requests"], result["num_skipped"], result["num_failed"]) == (3, 0, 0)
    for run in result["runs"]:
        requests = run["requests"]
        assert requests["arrival_s"] == [0.0, 0.0, 0.01]
        assert requests["input_tokens"] == [40, 7, 90]
        assert requests["output_tokens"] == [3, 1, 5]
        assert requests["cached_tokens"] == [32, 32, 32]
        assert requests["scheduled_s"] == requests["preemptions"] == [None] * 3
        for times in zip(*(requests[f"{name}_s"] for name in ("arrival", "first_token", "last_token")), strict=True):
            assert list(times) == sorted(times)
        assert requests["first_token_s"][1] == requests["last_token_s"][1]
        assert (run["output_tokens"], run["num_events"], run["cached_tokens"]) == (9, 9, 96)
        assert run["queue_ms"] is run["num_preemptions"] is run["peak_running"] is run["num_steps"] is None
        assert 1 <= run["peak_outstanding"] <= 3
        assert set(run["client"]) == {"late_ms", "cpu_share", "is_bottleneck"}
    table = capsys.readouterr().out
    assert "at most - running, - preemptions" in table
    assert "requests outstanding" in table
    assert "failed" not in table


def test_the_columns_are_those_of_a_run_in_one_process(workload, tmp_path):
    output = tmp_path / "here.json"
    engine = ["tiny", "--load-format", "dummy", "--device", "cpu", "--max-model-len", "256"]
    assert bench(["serve", *engine, "--workload", str(workload), "--num-warmups", "0", "--output", str(output)]) == 0
    here = read_record(output)
    with running(Stub()) as stub:
        _, there = serve(stub, workload)
    assert list(here) == list(there)
    for part in (lambda record: record["results"][0]["median"], lambda r: r["results"][0]["runs"][0]["requests"]):
        assert list(part(here)) == list(part(there))
    assert set(here["results"][0]) <= set(there["results"][0])
    assert set(here["results"][0]["runs"][0]) <= set(there["results"][0]["runs"][0])


def test_prompts_are_those_of_a_run_in_one_process(tmp_path):
    path = tmp_path / "w.jsonl"
    entries = (Entry(0.0, 40, 2, (0, 1)), Entry(0.0, 50, 1, (0, 1, 2)), Entry(0.0, 9, 4, (3,)))
    shared = Workload("w", entries, 16)
    save_workload(shared, path)
    with running(Stub()) as stub:
        serve(stub, path, "--repeat", "2", "--seed", "5")
    for run in (1, 2):
        sent = stub.requests[3 * run - 3 : 3 * run]
        wanted = list(Prompts(VOCAB, 5, run).of(shared))
        assert sorted(request["prompt"] for request in sent) == sorted(wanted)
    first, second = (next(r["prompt"] for r in stub.requests if len(r["prompt"]) == length) for length in (40, 50))
    assert first[:32] == second[:32]


def test_what_is_asked_for(workload):
    with running(Stub()) as stub:
        serve(stub, workload, "--temperature", "0.5")
    assert {tuple(request) for request in stub.requests} == {
        ("model", "prompt", "max_tokens", "min_tokens", "ignore_eos", "temperature", "stream", "stream_options")
    }
    lengths = {(len(r["prompt"]), r["max_tokens"], r["min_tokens"]) for r in stub.requests}
    assert lengths == {(40, 3, 3), (7, 1, 1), (90, 5, 5)}
    for request in stub.requests:
        assert (request["model"], request["temperature"], request["ignore_eos"]) == ("stub", 0.5, True)
        assert (request["stream"], request["stream_options"]) == (True, {"include_usage": True})
        assert all(0 <= token_id < VOCAB for token_id in request["prompt"])


def test_requests_bring_a_seed_if_one_is_given(workload):
    with running(Stub()) as stub:
        serve(stub, workload, "--seed", "7")
    assert sorted(request["seed"] for request in stub.requests) == [7, 8, 9]


@pytest.mark.parametrize(("told", "asked", "most"), [(50, 0, 50), (50, 20, 20), (None, 0, 32_000)])
def test_token_ids(workload, told, asked, most):
    with running(Stub(vocab_size=told)) as stub:
        _, record = serve(stub, workload, vocab_size=asked)
    assert record["server"]["vocab_size"] == most
    largest = max(token_id for request in stub.requests for token_id in request["prompt"])
    assert most / 2 < largest < most


def test_the_warm_up_comes_twice_and_is_short(workload):
    with running(Stub()) as stub:
        serve(stub, workload, "--num-warmups", "2")
    assert len(stub.requests) == 2 + 2 + 3
    prompts = [request["prompt"] for request in stub.requests]
    assert sorted(prompts[:2]) == sorted(prompts[2:4])
    assert not any(prompt in prompts[:4] for prompt in prompts[4:])


def test_requests_do_not_wait_for_one_another(tmp_path):
    """The server answers nothing until all 150 are there."""
    path, stub = tmp_path / "w.jsonl", Stub()
    save_workload(Workload("w", tuple(Entry(i / 1000, 5, 2) for i in range(150))), path)
    stub.hold_until = 150
    with running(stub):
        code, record = serve(stub, path)
    (run,) = record["results"][0]["runs"]
    assert (code, run["num_requests"], run["peak_outstanding"]) == (0, 150, 150)


def test_connections_are_used_again(tmp_path):
    path = tmp_path / "w.jsonl"
    save_workload(Workload("w", tuple(Entry(i / 20, 5, 2) for i in range(8))), path)
    with running(Stub()) as stub:
        serve(stub, path)
        assert len(stub.requests) == 8
        assert stub.num_connections < 8


def test_what_does_not_fit_the_server_is_left_out(workload):
    with running(Stub(max_model_len=60)) as stub:
        _, record = serve(stub, workload)
        assert record["results"][0]["num_skipped"] == 1
        assert record["results"][0]["runs"][0]["requests"]["input_tokens"] == [40, 7]
        with pytest.raises(UserError, match=r"1 requests of 3 that cannot run: 95 tokens .* max_model_len 60"):
            serve(stub, workload, "--strict")


def test_the_key_is_sent_and_not_recorded(workload, monkeypatch):
    with running(Stub()) as stub:
        for arguments in (["--api-key", "sk-secret"], ["--api-key=sk-secret"]):
            _, record = serve(stub, workload, *arguments)
            assert "Authorization: Bearer sk-secret\r\n" in stub.headers
            assert "secret" not in json.dumps(record)
            assert "--api-key" in record["command"]
        monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
        serve(stub, workload)
        assert "Bearer sk-other" in stub.headers


# ---- failures --------------------------------------------------------------------------------------------------------


def refused(request: dict) -> list:
    return plain(500, {"error": {"message": "out of\nluck", "type": "server_error"}})


FAILURES = {
    "500": (refused, "HTTP 500: out of luck"),
    "FastAPI": (lambda r: plain(422, {"detail": "no such field"}), "HTTP 422: no such field"),
    "no JSON": (lambda r: plain(502, b"<html>"), "HTTP 502: <html>"),
    "dropped": (lambda r: [*chunked(token(), token())[:-1], DROP], "closed the connection in the middle .* 2 events"),
    "dropped at once": (lambda r: [DROP], "closed the connection before an answer"),
    "too short": (lambda r: chunked(token(finish_reason="stop"), usage(1), DONE), r"1 output tokens .* \(stop\)"),
    "too long": (lambda r: chunked(token(), usage(99), DONE), "99 output tokens instead of 5"),
    "no usage": (lambda r: chunked(*[token()] * 5, DONE), "tells no usage"),
    "no tokens": (lambda r: chunked(usage(5), DONE), "no event with choices"),
    "empty": (lambda r: plain(200, b""), "no event with choices"),
    "an error": (lambda r: chunked(token(), event(error={"message": "died"}), DONE), "ended the stream: died"),
    "garbage": (lambda r: chunked(token(), b"data: {oops\n\n", usage(5), DONE), "no JSON object: '{oops'"),
    "half an event": (lambda r: chunked(b'data: {"choices": [{\n\n', usage(5), DONE), "no JSON object"),
    "no HTTP": (lambda r: [b"SSH-2.0-OpenSSH\r\n\r\n"], "no HTTP/1.1"),
    "wrong chunks": (lambda r: [HEAD, b"3\r\ndata: x\r\n"], "chunks do not have the length"),
    "no chunks": (lambda r: [HEAD, b"data: x\r\n\r\n"], "chunks have no length"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failed_requests_are_counted(name, workload, capsys):
    """The last of three requests fails; the others are measured."""
    wrong, words = FAILURES[name]
    with running(Stub(lambda request: wrong(request) if request["max_tokens"] == 5 else good(request))) as stub:
        code, record = serve(stub, workload)
    assert code == 1
    (result,) = record["results"]
    (run,) = result["runs"]
    requests = run["requests"]
    assert (result["num_failed"], run["num_failed"], run["num_requests"]) == (1, 1, 2)
    assert requests["error"][:2] == [None, None]
    for pattern in (requests["error"][2], result["first_error"]):
        with pytest.raises(UserError, match=words):
            raise UserError(pattern)
        assert "\n" not in pattern
    for column in ("first_token_s", "last_token_s", "output_tokens", "cached_tokens"):
        assert requests[column][2] is None
    assert requests["arrival_s"] == [0.0, 0.0, 0.01]
    assert requests["first_token_s"][0] is not None
    assert (run["input_tokens"], run["output_tokens"]) == (47, 4)
    assert "1 requests failed: " in capsys.readouterr().out


def test_a_connection_that_is_dropped_behind_the_end_of_the_stream_does_not_matter(workload):
    with running(Stub(lambda request: [*good(request)[:-1], DROP])) as stub:
        code, record = serve(stub, workload)
    assert (code, record["results"][0]["num_failed"]) == (0, 0)


def test_other_ways_to_frame_an_answer(workload):
    """Usage in the last event with choices; a body up to the connection's end; CRLF, comments and several events."""

    def answer(request: dict) -> list:
        count = request["max_tokens"]
        last = event(choices=[{"text": "", "finish_reason": "length"}], usage={"completion_tokens": count})
        body = b": ping\n\n" + token() * (count - 1) + last + DONE
        return [b"HTTP/1.1 200 OK\r\n\r\n", body.replace(b"\n", b"\r\n"), DROP]

    def closing(request: dict) -> list:
        pieces = answer(request)
        return [pieces[0].replace(b"OK\r\n", b"OK\r\nConnection: close\r\n"), pieces[1], DROP]

    for each in (answer, closing):
        with running(Stub(each)) as stub:
            code, record = serve(stub, workload)
        assert code == 0
        (run,) = record["results"][0]["runs"]
        assert (run["num_events"], run["output_tokens"], run["cached_tokens"]) == (9, 9, None)


def test_a_server_that_refuses_everything(workload):
    with running(Stub(lambda request: plain(400, {"error": {"message": "prompt: text only"}}))) as stub:
        with pytest.raises(UserError, match=r"none of 3 requests succeeded: HTTP 400: prompt: text only$"):
            serve(stub, workload)
        with pytest.raises(UserError, match=r"none of 2 requests .* give --vocab-size"):
            serve(stub, workload, "--num-warmups", "2", vocab_size=0)
    assert not workload.with_name("record.json").exists()


def test_a_server_that_goes_away_between_two_runs(workload, capsys):
    with running(Stub()) as stub:
        stub.answer = lambda request: good(request) if len(stub.requests) <= 3 else [DROP]
        code, record = serve(stub, workload, "--repeat", "3")
    (result,) = record["results"]
    assert (code, result["num_failed"], len(result["runs"])) == (1, 3, 1)
    assert len(stub.requests) == 6
    printed = capsys.readouterr()
    assert "3 requests failed: the server closed the connection" in printed.out
    assert "run 2: no request succeeded" in printed.err


def test_ctrl_c_keeps_what_was_finished(workload):
    """It comes in the second of three runs, while the server keeps its answer back."""
    with running(Stub()) as stub:

        def interrupt() -> None:
            if len(stub.requests) == 6:
                stub.answer = lambda request: [HEAD]
                os.kill(os.getpid(), signal.SIGINT)

        stub.on_request = interrupt
        with pytest.raises(KeyboardInterrupt):
            serve(stub, workload, "--repeat", "3")
    (result,) = read_record(workload.with_name("record.json"))["results"]
    assert [run["output_tokens"] for run in result["runs"]] == [9]


# ---- finding the server ----------------------------------------------------------------------------------------------


def test_no_server(workload, capsys):
    with running(Stub()) as stub:
        pass
    assert main(["bench", "serve", "--base-url", stub.url, "--workload", str(workload)]) == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert sentence == f"error: {stub.url}: no connection: Connection refused; is the server running?"


def test_several_models(workload):
    with running(Stub()) as stub:
        stub.models = [{"id": "one"}, {"id": "two"}]
        with pytest.raises(UserError, match=r"2 models; choose one with --model: one, two"):
            serve(stub, workload)
        with pytest.raises(UserError, match=r"no model 'three'; it has one, two"):
            serve(stub, workload, "--model", "three")
        _, record = serve(stub, workload, "--model", "two")
        assert record["server"]["model"] == stub.requests[0]["model"] == "two"
        stub.models = []
        with pytest.raises(UserError, match=r"0 models"):
            serve(stub, workload)


def test_a_folder_of_the_servers_machine_is_not_recorded(workload):
    with running(Stub()) as stub:
        stub.models = [{"id": "/data/models/llama"}]
        _, record = serve(stub, workload)
    assert stub.requests[0]["model"] == "/data/models/llama"
    assert record["server"]["model"] == "llama"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (plain(401, {"error": {"message": "no"}}), "refuses the key .* --api-key"),
        (plain(404, {}), r"does not list models \(HTTP 404\).* with its /v1"),
        (plain(200, b"<html>"), "does not list models"),
        (plain(200, {"data": [3]}), "does not list models"),
        ([b"nonsense\r\n\r\n"], "no HTTP/1.1"),
    ],
)
def test_what_is_no_openai_server(answer, words, workload):
    stub = Stub()
    stub.gets["/v1/models"] = answer
    with running(stub), pytest.raises(UserError, match=words) as caught:
        serve(stub, workload)
    assert "\n" not in str(caught.value)


def test_a_server_without_a_version(workload):
    stub = Stub()
    stub.gets.clear()
    with running(stub):
        _, record = serve(stub, workload)
    assert record["server"]["version"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("serve --workload w", "needs MODEL, or a server with --base-url"),
        ("serve tiny --workload w --model x", "--model is for a server"),
        ("serve tiny --workload w --api-key x", "--api-key is for a server"),
        ("serve tiny --workload w --vocab-size 9", "--vocab-size is for a server"),
        ("serve tiny --workload w --base-url http://h", "'tiny' would be a model in this process"),
        ("serve --workload w --base-url http://h --load-format dummy", "--load-format is for an engine in this"),
        ("serve --workload w --base-url http://h --no-enable-prefix-caching", "--enable-prefix-caching is for an"),
        ("serve --workload w --base-url http://h --step-log x", "--step-log is for an engine in this process"),
        ("serve --workload w --base-url http://h --seed -1", "seed is -1"),
        ("serve --workload w --base-url http://h --api-key=a\tb", "no HTTP header can hold"),
        ("serve --workload w --base-url localhost:8000", "--base-url is 'localhost:8000'; it must be a URL"),
        ("serve --workload w --base-url http://h:99999", "is no URL"),
        ("serve --workload w --base-url http://me:secret@h/v1", "--base-url is a URL with a password"),
        ("serve --workload w --base-url http://h --vocab-size 0", "--vocab-size .* at least 1"),
        ("serve --workload nowhere.jsonl --base-url http://h", "nowhere.jsonl"),
        ("decode --base-url http://h", "decode has no option --base-url"),
    ],
)
def test_bad_command_lines(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        bench(arguments.split(" "))
    assert "secret" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "shown", "root", "committed"),
    [
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1", "", "http://127.0.0.1:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1", "", "http://localhost:8000/v1"),
        ("http://[::1]:80", "http://[::1]/v1", "", "http://[::1]/v1"),
        ("https://llm.example.org/team/v1/", "https://llm.example.org/team/v1", "/team", "remote"),
        ("http://10.0.0.7:8000", "http://10.0.0.7:8000/v1", "", "remote"),
        ("http://host/api", "http://host/api", "/api", "remote"),
    ],
)
def test_base_urls(text, shown, root, committed):
    url = BaseUrl.parse(text)
    assert (str(url), url.root, url.as_committed) == (shown, root, committed)


def test_the_name_of_another_machine_is_not_recorded(workload, monkeypatch):
    with running(Stub()) as stub:
        monkeypatch.setattr(BaseUrl, "as_committed", "remote")
        _, record = serve(stub, workload)
    assert record["server"]["base_url"] == "remote"
    assert "--base-url remote" in record["command"]
    assert "127.0.0.1" not in json.dumps(record)


# ---- bytes in, whole things out --------------------------------------------------------------------------------------


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(ends)]


def parse(data: bytes, places: list[int], is_closed: bool) -> tuple[Response, bytes]:
    response = Response()
    body = b"".join(response.feed(piece) for piece in cut(data, places))
    if is_closed:
        response.feed_eof()
    return response, body


class FakeSocket(io.BytesIO):
    def makefile(self, mode):
        return self


bodies = st.lists(st.binary(min_size=1, max_size=40), max_size=5)
places = st.lists(st.integers(0, 2000), max_size=12)


@given(pieces=bodies, places=places, framing=st.sampled_from(["chunked", "length", "close"]), early=st.booleans())
def test_answers_are_read_as_the_standard_library_reads_them(pieces, places, framing, early):
    body = b"".join(pieces)
    headers = {
        "chunked": b"TRANSFER-encoding:  Chunked\r\n",
        "length": b"Content-Length: %d\r\n" % len(body),
        "close": b"Connection: close\r\n",
    }
    data = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * early + b"HTTP/1.1 200 OK\r\nX-A: b: c\r\n"
    data += headers[framing] + b"\r\n"
    if framing == "chunked":
        data += b"".join(b"%X;name=value\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
        data += b"0\r\nX-Trailer: 1\r\n\r\n"
    else:
        data += body
    response, found = parse(data, places, is_closed=framing == "close")
    wanted = http.client.HTTPResponse(FakeSocket(data[len(data.partition(b"\r\n\r\n")[0]) + 4 :] if early else data))
    wanted.begin()
    assert found == wanted.read() == body
    assert (response.status, response.headers["x-a"]) == (wanted.status, wanted.headers["X-A"])
    assert response.is_complete
    assert response.is_reusable is (framing != "close")


@given(pieces=bodies.filter(bool), places=places, end=st.integers(1, 10_000))
def test_answers_that_end_early(pieces, places, end):
    data = b"".join([HEAD, *(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces), b"0\r\n\r\n"])
    with pytest.raises(HttpError, match="closed the connection"):
        parse(data[: end % len(data)], places, is_closed=True)


@given(data=st.binary(max_size=200), places=places, has_head=st.booleans())
def test_any_bytes_are_an_answer_or_an_error(data, places, has_head):
    events = Events()
    with contextlib.suppress(HttpError):
        _, body = parse(HEAD * has_head + data, places, is_closed=True)
        events.feed(body)


@given(
    payloads=st.lists(st.from_regex(rb"[^\r\n\s]([^\r\n]*[^\r\n\s])?", fullmatch=True), max_size=5),
    places=places,
    newline=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    noise=st.sampled_from([b"", b": ping\n\n", b"event: token\nid: 7\n", b"retry: 3\n\n"]),
)
def test_events_may_be_cut_anywhere(payloads, places, newline, noise):
    text = b"".join(noise + b"data: " + payload + b"\n\n" for payload in payloads).replace(b"\n", newline)
    events = Events()
    found = [payload for piece in cut(text + b"\n", places) for payload in events.feed(piece)]
    assert found == payloads


def test_a_payload_of_several_lines():
    assert Events().feed(b'data: {"a":\ndata: 1}\n\n') == [b'{"a":\n1}']


def test_a_text_that_looks_like_an_event_without_choices():
    completion = Completion(b"", 1)
    response = Response()
    response.feed(HEAD)
    completion.receive(response, token('"choices":[]') + event(usage={"text": '"choices":[{'}), 1.0)
    completion.receive(response, usage(1), 2.0)
    completion.end(response)
    assert (completion.error, list(completion.times_s)) == ("", [1.0])


def test_events_of_one_read_have_one_time():
    completion = Completion(b"", 3)
    response = Response()
    response.feed(HEAD)
    completion.receive(response, token() + token()[:9], 1.0)
    completion.receive(response, token()[9:] + token() + usage(3), 2.0)
    completion.end(response)
    assert (completion.error, list(completion.times_s)) == ("", [1.0, 2.0, 2.0])


# ---- the client itself -----------------------------------------------------------------------------------------------


def a_replay(late_s: list[float], cpu_share: float = 0.1) -> HttpReplay:
    found = HttpReplay(Workload("w", tuple(Entry(float(i), 5, 2) for i in range(len(late_s)))), [], 100.0, cpu_share)
    for index, late in enumerate(late_s):
        completion = Completion(b"", 2)
        completion.sent_s = 100.0 + index + late
        completion.times_s = array("d", [100.5 + index, 100.75 + index])
        found.completions.append(completion)
    return found


def test_times_count_from_the_arrival_in_the_workload():
    result = a_replay([0.25, 0.0]).result()
    assert result["requests"]["first_token_s"] == [0.5, 1.5]
    assert result["ttft_ms"]["mean"] == 500
    assert result["tpot_ms"]["mean"] == result["itl_ms"]["mean"] == 250
    assert result["e2el_ms"]["p99"] == 750


@pytest.mark.parametrize(
    ("late_s", "cpu_share", "is_bottleneck"),
    [
        ([0.001] * 50, 0.5, False),
        ([0.02] * 5, 0.5, False),  # 4 % of a TTFT of 500 ms
        ([0.03] * 5, 0.0, True),
        ([0.001] * 50 + [0.1], 0.1, True),
        ([0.0] * 5, 0.95, True),
    ],
)
def test_a_slow_client_says_so(late_s, cpu_share, is_bottleneck):
    result = a_replay(late_s, cpu_share).result()
    assert result["client"]["late_ms"]["max"] == pytest.approx(max(late_s) * 1e3)
    assert result["client"]["is_bottleneck"] is is_bottleneck
    about = http_serve.describe(Workload("w", (Entry(0.0, 5, 2),)), 0, 1.0) | {"num_failed": 0, "first_error": None}
    table = http_serve.table([about | {"median": http_serve.medians([result]), "runs": [result]}])
    assert ("the client was the bottleneck in run 1" in table) is is_bottleneck


def test_requests_that_never_left_have_no_lateness():
    found = a_replay([0.0, 0.002])
    found.completions[1].sent_s = None
    found.completions[1].fail("no connection: Connection refused")
    assert found.result()["client"]["late_ms"]["max"] == 0


def test_a_client_does_not_know_the_queue():
    requests = {
        "arrival_s": [0.0], "scheduled_s": [None], "first_token_s": [1.0], "last_token_s": [2.0],
        "input_tokens": [3], "output_tokens": [2],
    }  # fmt: skip
    assert latencies(requests, [1.0])["queue_ms"] is None
    assert latencies(requests, [1.0])["ttft_ms"]["mean"] == 1000


def test_reads_call_what_is_due():
    """Between the reads of many streams nothing else has its turn."""
    called = []

    async def read(url: str) -> None:
        client = Client(BaseUrl.parse(url))
        client.due_s, client.on_due = 0.0, lambda: called.append(client.num_reads)
        await client.get_json("/v1/models")
        client.close()

    with running(Stub()) as stub:
        asyncio.run(read(stub.url))
    assert called == [1]
