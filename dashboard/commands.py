"""`memwall dashboard`: the pages, served on this machine."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from planner.errors import UserError

_HOST = "127.0.0.1"


def dashboard(
    port: Annotated[int, typer.Option("--port", help="Port on this machine.", min=1, max=65535)] = 8501,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; the default is seen by nobody else.")
    ] = _HOST,
    headless: Annotated[bool, typer.Option("--headless", help="Do not open a browser.")] = False,
) -> int:
    """Plan, compare and explain in the browser: serves the dashboard on this machine until Ctrl-C.

    Needs no account, no network and no GPU.
    """
    if importlib.util.find_spec("streamlit") is None:
        raise UserError("memwall dashboard needs streamlit, which is not installed: pip install memwall")
    check_port(host, port)
    try:
        return subprocess.run(server_command(host, port, headless), env=_environment()).returncode
    except KeyboardInterrupt:
        return 0


def check_port(host: str, port: int) -> None:
    """
    Raises:
        UserError: nothing can listen there.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror:
        raise UserError(f"--host is {host!r}, which is no address of this machine; leave it out for {_HOST}") from None
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(address)
        except PermissionError:
            raise UserError(
                f"port {port} needs rights that you do not have; choose one from 1024 on with --port"
            ) from None
        except OSError as error:
            raise UserError(
                f"cannot listen on {host} port {port} ({error.strerror or error}); is a dashboard running already? "
                f"Choose another port, e.g. --port {min(port + 1, 65535)}"
            ) from None


def server_command(host: str, port: int, headless: bool) -> list[str]:
    """The command line of the server."""
    script = Path(__file__).resolve().with_name("app.py")
    settings = {
        "server.address": host,
        "server.port": port,
        "server.headless": headless,
        "server.showEmailPrompt": False,  # on its first start it would wait for an answer
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": False,
    }
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value).lower())]
    return [sys.executable, "-m", "streamlit", "run", str(script), *flags]


def _environment() -> dict[str, str]:
    """The server's packages are found where this one was."""
    home = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{home}{os.pathsep}{inherited}" if inherited else home}
