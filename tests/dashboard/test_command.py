"""`memwall dashboard`: starts on this machine only, and says in a sentence why it cannot."""

import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from pathlib import Path

import pytest

from dashboard.commands import check_port, server_command
from planner.errors import UserError

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


def test_a_taken_port_is_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port + 1}"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)
    with pytest.raises(UserError, match="no address"):
        check_port("no.such.host.invalid", 8501)


def test_the_server_listens_on_loopback_and_tells_nobody():
    command = server_command("127.0.0.1", 8600, True)
    assert command[command.index("--server.address") + 1] == "127.0.0.1"
    assert command[command.index("--browser.gatherUsageStats") + 1] == "false"
    assert command[command.index("--server.showEmailPrompt") + 1] == "false"
    assert command[command.index("--server.headless") + 1] == "true"
    assert Path(command[4]).is_file()


def test_it_serves():
    port = free_port()
    code = f"from dashboard.commands import dashboard; dashboard(port={port}, host='127.0.0.1', headless=True)"
    server = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(200):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=1) as answer:
                    assert answer.status == 200
                    break
            except OSError:
                assert server.poll() is None
                time.sleep(0.1)
        else:
            raise AssertionError("it never answers")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)


def test_the_command_is_offered():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["memwall.commands"]
    assert scripts["dashboard"] == "dashboard.commands:dashboard"


def test_streamlit_and_plotly_stay_upstairs():
    """Whoever only plans pays for neither."""
    code = (
        "import sys, pkgutil, importlib, planner\n"
        "for found in pkgutil.walk_packages(planner.__path__, 'planner.'):\n"
        "    if not found.name.endswith('__main__'): importlib.import_module(found.name)\n"
        "assert not {'streamlit', 'plotly'} & {name.partition('.')[0] for name in sys.modules}, sorted(sys.modules)\n"
        "import dashboard.services.work, dashboard.services.jobs, dashboard.services.worker\n"
        "assert 'streamlit' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
