"""`make test` brings the browser along where it can, and says so where it cannot; it never fails for want of one."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAKE = shutil.which("make")
pytestmark = pytest.mark.skipif(MAKE is None, reason="no make is installed")


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def run(folder: Path) -> subprocess.CompletedProcess:
    env = {"PATH": str(folder), "LOG": str(folder / "log")}
    return subprocess.run([MAKE, "-C", str(ROOT), "chromium"], env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def machine(tmp_path):
    """A machine with `env` and somebody who is root, and nothing else."""
    (tmp_path / "env").symlink_to(shutil.which("env"))
    program(tmp_path, "id", "echo 0")
    return tmp_path


def asked(folder: Path) -> list[str]:
    log = folder / "log"
    return log.read_text().splitlines() if log.exists() else []


def test_a_browser_that_is_there_is_left_alone(machine):
    program(machine, "google-chrome", "exit 0")
    program(machine, "apt-get", 'echo "$@" >> "$LOG"')
    found = run(machine)
    assert found.returncode == 0
    assert asked(machine) == []


def test_apt_get_installs_it(machine):
    program(machine, "apt-get", 'echo "$@" >> "$LOG"')
    found = run(machine)
    assert found.returncode == 0
    assert [line.split()[-4:] for line in asked(machine)] == [["install", "-y", "--no-install-recommends", "chromium"]]
    assert "skipped" not in found.stderr


def test_old_lists_are_renewed_first(machine):
    program(
        machine, "apt-get", 'echo "$@" >> "$LOG"; case "$*" in *update) : > "$LOG.new";; *) [ -e "$LOG.new" ];; esac'
    )
    found = run(machine)
    assert found.returncode == 0
    assert [line.split()[-1] for line in asked(machine)] == ["chromium", "update", "chromium"]
    assert "skipped" not in found.stderr


@pytest.mark.parametrize(
    ("programs", "reason"),
    [
        ({}, "no apt-get"),
        ({"apt-get": "exit 100"}, "cannot install"),
        ({"apt-get": "exit 0", "id": "echo 1000", "sudo": "exit 1"}, "no right"),
        ({"apt-get": "exit 0", "id": "echo 1000"}, "no right"),
    ],
    ids=["no apt", "offline", "no password", "no sudo"],
)
def test_without_a_way_it_says_what_is_skipped(machine, programs, reason):
    for name, script in programs.items():
        program(machine, name, script)
    found = run(machine)
    assert found.returncode == 0
    assert reason in found.stderr
    assert "skipped" in found.stderr
