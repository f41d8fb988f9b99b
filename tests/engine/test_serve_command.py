"""`memwall serve`: what it prints and refuses, and how it ends."""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from importlib.metadata import EntryPoint
from pathlib import Path

import httpx
import pytest
from served import MINIATURE, ROOT, Served

from engine.commands import serve as command
from engine.commands.__main__ import main
from engine.config import EngineConfig
from engine.errors import UserError
from engine.server import run as server_run
from engine.server.settings import ServerSettings
from planner import cli

COMMANDS = [EntryPoint("serve", "engine.commands.serve:serve", cli.GROUP)]
ENDLESS = {"prompt": "x", "max_tokens": 40_000, "ignore_eos": True}


@pytest.fixture(params=["memwall", "python -m engine.commands"])
def run(request, capsys):
    """Runs a command line both ways: (exit code, stdout, stderr)."""

    def through(*arguments) -> tuple[int, str, str]:
        line = ["serve", *map(str, arguments)]
        code = cli.run(line, COMMANDS) if request.param == "memwall" else main(line)
        return code, *capsys.readouterr()

    return through


@pytest.fixture
def asked(monkeypatch):
    """What the server would have been told."""
    calls: list[tuple[EngineConfig, ServerSettings]] = []
    monkeypatch.setattr(server_run, "serve", lambda *arguments: calls.append(arguments) or 0)
    return calls


# ---- the command line ----------------------------------------------------------------------------------------------


def test_help(run):
    code, out, _ = run("--help")
    assert code == 0
    for flag in ("--host", "--port", "--api-key", "--served-model-name", "--chat-template", "--max-queue"):
        assert flag in out
    for flag in ("--max-body-bytes", "--write-timeout", "--shutdown-timeout", "--kv-cache-dtype", "--max-model-len"):
        assert flag in out
    assert "Exit codes" in out


def test_defaults_are_those_of_the_settings(run, asked):
    assert run("tiny", "--load-format", "dummy")[0] == 0
    assert asked == [(EngineConfig("tiny", load_format="dummy"), ServerSettings(model_names=("tiny",)))]


def test_options(run, asked, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages }}")
    options = ("--host", "::1", "--port", 9, "--api-key", "a", "--api-key", "b", "--served-model-name", "m")
    limits = ("--max-queue", 1, "--max-body-bytes", 2, "--write-timeout", 3, "--shutdown-timeout", 4)
    assert run("x", *options, *limits, "--chat-template", template, "--max-num-seqs", 5)[0] == 0
    settings = ServerSettings(("m",), "::1", 9, ("a", "b"), "{{ messages }}", 1, 2, 3.0, 4.0)
    assert asked == [(EngineConfig("x", max_num_seqs=5), settings)]


def test_the_key_of_the_environment(run, asked, monkeypatch):
    monkeypatch.setenv("MEMWALL_API_KEY", "e")
    run("x")
    run("x", "--api-key", "a")
    assert [settings.api_keys for _, settings in asked] == [("e",), ("a",)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "needs MODEL"),
        (("x", "--port", "70000"), "--port is 70000; it must be from 0 to 65535"),
        (("x", "--port", "http"), "--port is 'http'; it must be a whole number"),
        (("x", "--max-queue", "-1"), "--max-queue is -1"),
        (("x", "--max-body-bytes", "0"), "--max-body-bytes is 0"),
        (("x", "--write-timeout", "0"), "--write-timeout is 0.0; it must be above 0"),
        (("x", "--shutdown-timeout", "nan"), "--shutdown-timeout is 'nan'"),
        (("x", "--api-key", " "), "--api-key is empty"),
        (("x", "--served-model-name", ""), "--served-model-name is empty"),
        (("x", "--chat-template", "no/such/file"), "--chat-template: no/such/file cannot be read"),
        (("x", "--api-keys", "a"), "did you mean --api-key?"),
        (("x", "--host", "no.such.host.invalid"), "is no address of this machine"),
        (("x", "--host", "192.0.2.1"), "192.0.2.1:8000 cannot be listened on"),
        (("x", "--block-size", "3"), "block_size is 3"),
    ],
)
def test_bad_input(run, arguments, words):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.strip().splitlines()) == 1


def test_a_port_that_is_taken(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = run("tiny", "--load-format", "dummy", "--port", port)
    assert code == 2
    assert f"127.0.0.1:{port} cannot be listened on (Address already in use)" in err
    assert len(err.strip().splitlines()) == 1


def test_a_port_that_another_server_took_while_both_were_loading():
    with server_run.bound_socket("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with Served("tiny", "--load-format", "dummy", "--port", port) as second:
            with pytest.raises(UserError, match=rf"127.0.0.1:{port} cannot be listened on \(Address already in use\)"):
                server_run.start_listening(first)
            assert second.end() == 0


def test_a_server_that_comes_second_ends_with_a_sentence():
    """As if another one had begun to listen at its address after it had bound it."""
    with server_run.bound_socket("127.0.0.1", 0) as first:
        second = Served("tiny", "--load-format", "dummy", "--port", first.getsockname()[1])
        second.wait_for("Model loading took|memory")
        first.listen()
        assert second.process.wait(60) == 2
    lines = [line for line in second.stderr if "error" in line.lower() or "Traceback" in line]
    assert len(lines) == 1
    assert "cannot be listened on (Address already in use)" in lines[0]


def exchange(url: httpx.URL, *pieces: bytes) -> bytes:
    """What a server answers to bytes that come in these pieces, until it closes the connection."""
    answer = bytearray()
    with socket.create_connection((url.host, url.port), timeout=20) as client:
        for piece in pieces:
            client.sendall(piece)
            time.sleep(0.05)  # so that they are read one by one
        with contextlib.suppress(ConnectionResetError):
            while data := client.recv(1 << 16):
                answer += data
    return bytes(answer)


OFFER = b"Upgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"


def http_request(body: bytes, *headers: bytes, is_chunked: bool = False) -> bytes:
    length = b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: %d" % len(body)
    if is_chunked:
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
    return head + length + b"\r\n" + b"".join(headers) + b"\r\n" + body


def test_requests_that_offer_http_2():
    """As all clients on Java's HttpClient send them."""
    body = b'{"prompt": "x", "max_tokens": 3, "temperature": 0}'
    offering, closing = b"Connection: Upgrade, HTTP2-Settings\r\n" + OFFER, b"Connection: close\r\n"
    with Served("tiny", "--load-format", "dummy", "--port", 0) as server:
        url = httpx.URL(server.root_url)
        for is_chunked in (False, True):
            first, last = http_request(body, offering, is_chunked=is_chunked), http_request(body, closing)
            # Two on one connection, whole, within the head, and within the body.
            for cut in (0, 40, 150, len(first) - 20, len(first)):
                answer = exchange(url, first[:cut], first[cut:] + last)
                assert answer.count(b"HTTP/1.1 200 OK") == 2
                assert answer.count(b'"completion_tokens":3') == 2
            both = http_request(body, b"Connection: close, Upgrade\r\n" + OFFER, is_chunked=is_chunked)
            assert exchange(url, both).count(b"HTTP/1.1 200 OK") == 1
        # A head that begins in a large piece is not taken for a long one.
        padded = http_request(body + b" " * 200_000)
        assert exchange(url, padded + last[:20], last[20:]).count(b"HTTP/1.1 200 OK") == 2
        assert exchange(url, b"CONNECT t:80 HTTP/1.1\r\nHost: t\r\n\r\n").startswith(b"HTTP/1.1 400 ")
        websocket = b"GET /health HTTP/1.1\r\nHost: t\r\nConnection: close, Upgrade\r\nUpgrade: websocket\r\n\r\n"
        assert exchange(url, websocket).startswith(b"HTTP/1.1 200 ")


def test_a_head_without_end():
    with Served("tiny", "--load-format", "dummy", "--port", 0) as server:
        pieces = [b"GET /health HTTP/1.1\r\nHost: t\r\nX: "] + [b"a" * 50_000] * 4
        with contextlib.suppress(ConnectionError):
            assert exchange(httpx.URL(server.root_url), *pieces).startswith(b"HTTP/1.1 400 ")
        with contextlib.suppress(ConnectionError):
            exchange(httpx.URL(server.root_url), *[b"GET /health HTTP/1.1\r\nX: "] + [b"a" * 100_000] * 100)
            raise AssertionError("it takes heads of any length")
        assert httpx.get(f"{server.root_url}/health", headers={"x": "a" * 20_000}).status_code == 200


def test_an_open_door_is_warned_of():
    def said(host, **settings):
        with server_run.bound_socket(host, 0) as listener:
            return list(server_run._warnings(ServerSettings(("m",), **settings), listener))

    assert said("127.0.0.1") == said("0.0.0.0", api_keys=("k",)) == []
    assert "whoever reaches 0.0.0.0" in said("0.0.0.0")[0]


def test_entry_point():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"][cli.GROUP]["serve"] == COMMANDS[0].value
    assert command.serve.takes_arguments


# ---- how it ends ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endless_model(tmp_path_factory):
    """Arguments for a model whose context no test lives to see the end of."""
    config = json.loads((MINIATURE / "config.json").read_text(encoding="utf-8"))
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps({**config, "max_position_embeddings": 100_000}), encoding="utf-8")
    return path, "--load-format", "dummy", "--port", 0, "--max-num-seqs", 8


class Stream(threading.Thread):
    """A request whose answer is read as a stream."""

    def __init__(self, server: Served, body: dict) -> None:
        super().__init__(daemon=True)
        self._url, self._body = f"{server.base_url}/completions", {**body, "stream": True}
        self.events: list[str] = []
        self.start()

    def run(self) -> None:
        # A server that ends at once leaves the answer without an end.
        with (
            contextlib.suppress(httpx.RemoteProtocolError),
            httpx.stream("POST", self._url, json=self._body, timeout=60) as response,
        ):
            for line in response.iter_lines():
                if line:
                    self.events.append(line.removeprefix("data: "))


def running(server: Served) -> int:
    lines = httpx.get(f"{server.root_url}/metrics").text.splitlines()
    return int(float(next(line for line in lines if line.startswith("vllm:num_requests_running")).split()[-1]))


def wait_until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_sigterm_under_load(endless_model):
    with Served(*endless_model, "--shutdown-timeout", 2) as server:
        assert any("Available KV cache memory" in line for line in server.stderr)
        assert any("the weights are random" in line for line in server.stderr)
        endless = [Stream(server, ENDLESS) for _ in range(2)]
        short = Stream(server, {"prompt": "x", "max_tokens": 100, "ignore_eos": True})
        wait_until(lambda: running(server) == 3)
        children = server.children()
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("shutting down")
        assert httpx.get(f"{server.root_url}/health").status_code == 503
        refused = httpx.post(f"{server.base_url}/completions", json={"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert server.process.wait(60) == 0
        for stream in (*endless, short):
            stream.join(20)
        assert short.events[-1] == "[DONE]"
        assert json.loads(short.events[-2])["choices"][0]["finish_reason"] == "length"
        for stream in endless:
            assert json.loads(stream.events[-1])["error"]["code"] == "shutting_down"
            assert len(stream.events) > 1
        wait_until(lambda: all(map(is_gone, children)))


def test_a_second_ctrl_c_ends_it_at_once(endless_model):
    with Served(*endless_model) as server:
        Stream(server, ENDLESS)
        wait_until(lambda: running(server) == 1)
        children = server.children()
        server.process.send_signal(signal.SIGINT)
        server.wait_for("shutting down")
        assert server.end(signal.SIGINT) == 130
        wait_until(lambda: all(map(is_gone, children)))
        assert server.stderr[-1] == "interrupted"


def test_an_engine_that_is_killed(endless_model):
    with Served(*endless_model) as server:
        stream = Stream(server, ENDLESS)
        wait_until(lambda: running(server) == 1)
        worker = next(pid for pid in server.children() if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(worker, signal.SIGKILL)
        assert server.process.wait(60) == 70
        stream.join(20)
        assert json.loads(stream.events[-1])["error"]["code"] == "engine_error"
        wait_until(lambda: server.stderr[-1].startswith("error: the engine has stopped: "))


def test_a_model_that_cannot_be_loaded():
    server = Served(MINIATURE / "none", "--port", 0)
    assert server.process.wait(60) == 2
    wait_until(lambda: len(server.stderr) == 1)
    assert server.stderr[0].startswith("error: ")
