"""`memwall serve` in a process of its own."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MINIATURE = ROOT / "tests" / "models" / "miniature" / "target"
_START_S, _END_S = 120, 60


class Served:
    """A running server.

    Attributes:
        base_url: as the openai client wants it, ending in /v1. stderr: its lines so far.
    """

    def __init__(self, *arguments: object, **environment: str) -> None:
        command = [sys.executable, "-m", "engine.commands", "serve", *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        self.stderr: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._drain, daemon=True).start()
        self.base_url = ""

    def __enter__(self) -> "Served":
        try:
            self.base_url = self.wait_for(r"listening on (\S+)")[1]
        except BaseException:
            self.process.kill()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    @property
    def root_url(self) -> str:
        return self.base_url.removesuffix("/v1")

    def _drain(self) -> None:
        for line in self.process.stderr:
            self.stderr.append(line.rstrip("\n"))
            self._lines.put(self.stderr[-1])
        self._lines.put(None)

    def wait_for(self, pattern: str) -> re.Match:
        """The next line of stderr with this."""
        end = time.monotonic() + _START_S
        while True:
            line = self._lines.get(timeout=end - time.monotonic())
            assert line is not None, f"it ended: {self.stderr}"
            if found := re.search(pattern, line):
                return found

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(_END_S)

    def children(self) -> list[int]:
        """The processes that it has started."""
        tasks = Path(f"/proc/{self.process.pid}/task")
        return [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]
