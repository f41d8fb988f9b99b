"""The command line, run in the test's own process."""

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import NamedTuple

import pytest

from planner import cli

PYPROJECT = Path(__file__).resolve().parent.parent.parent / "pyproject.toml"


class Outcome(NamedTuple):
    """What a command line left behind."""

    code: int
    out: str
    err: str

    def check_bad_input(self, *words: str) -> None:
        """One sentence on stderr that has these words, and nothing on stdout."""
        assert self.code == 2, self
        assert self.out == ""
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("error: ")
        assert "Traceback" not in self.err
        for word in words:
            assert word in self.err


@pytest.fixture(scope="session")
def commands() -> list[EntryPoint]:
    """The commands as this checkout declares them, whatever is installed."""
    declared = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["entry-points"][cli.GROUP]
    return [EntryPoint(name, value, cli.GROUP) for name, value in declared.items()]


@pytest.fixture
def memwall(capsys, commands):
    """Runs a command line: `memwall("memory", "--concurrency", 2)` is an Outcome."""

    def run(*arguments: object, commands: list[EntryPoint] = commands) -> Outcome:
        code = cli.run([str(argument) for argument in arguments], commands)
        return Outcome(code, *capsys.readouterr())

    return run
