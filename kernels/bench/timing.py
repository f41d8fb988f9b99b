"""Times of GPU calls: CUDA graphs over rotating buffers, implementations interleaved in rounds.

A call is measured as the engine makes it, out of a CUDA graph and with its inputs in device memory:

    graph of one implementation    call(set 0) call(set 1) … call(set n-1) call(set 0) …     ≥ MIN_GRAPH_S
    a round                        ours ours ours ours | cudnn … | fa2 …              the first of each not counted
    the next round                 fa2 … | cudnn … | ours …

Between two uses of one set lies the traffic of all others, ROTATED_BYTES or more, which is several times the L2. The
replay that is not counted keeps the GPU busy while the counted ones are queued, so that no gap of the host is measured.
"""

import contextlib
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from kernels.bench.results import Timing

Call = Callable[[], Any]

# The H200's L2 holds 60 MB.
ROTATED_BYTES = 200e6
MIN_GRAPH_S = 1e-3
MAX_CALLS = 512
# Compiling a kernel, or torch.compile, may take this long.
PREPARE_LIMIT_S = 90
CLOCKS_LIMIT_S = 10

_CLOCK_FIELDS = {
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
    "clock_limits": "clocks_event_reasons.active",
}


def num_sets(set_bytes: float) -> int:
    """How many sets of buffers to rotate so that each is out of the L2 when its turn comes again."""
    return 1 + math.ceil(ROTATED_BYTES / set_bytes)


def calls_per_graph(call_s: float, sets: int) -> int:
    """How many calls make a graph long enough to time: each set equally often."""
    rounds = math.ceil(MIN_GRAPH_S / (call_s * sets)) if call_s > 0 else MAX_CALLS
    return sets * max(1, min(rounds, MAX_CALLS // sets))


def reason(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


class Stopwatch:
    """Measures implementations beside each other.

    Args:
        rounds: how often each implementation has its turn.
        replays: counted graph replays in a turn.
    """

    def __init__(self, rounds: int, replays: int):
        self.rounds = rounds
        self.replays = replays
        self.clocks: dict[str, Any] = {}

    def compare(self, implementations: Mapping[str, Sequence[Call]]) -> tuple[dict[str, Timing], dict[str, str]]:
        """Timings by name, and for those that failed the reason. Each implementation has one call per set of buffers.

        The clocks are read once, in the first comparison after `clocks` was emptied, while the GPU is at work.
        """
        turns: dict[str, _Turn] = {}
        absent = {}
        for name, calls in implementations.items():
            try:
                with time_limit(PREPARE_LIMIT_S):
                    turns[name] = _Turn(name, calls)
            except Exception as error:
                absent[name] = reason(error)
        times: dict[str, list[float]] = {name: [] for name in turns}
        reader = None if self.clocks else _start_reading_clocks()
        for index in range(self.rounds):
            for name in sorted(turns, key=list(turns).index, reverse=index % 2 == 1):
                times[name] += turns[name].take(self.replays)
        if not self.clocks:
            # It takes longer than the rounds of a small case, and should find the GPU at work.
            deadline = time.monotonic() + CLOCKS_LIMIT_S
            for turn in turns.values():
                while reader is not None and reader.poll() is None and time.monotonic() < deadline:
                    turn.take(self.replays)
            self.clocks = _finish_reading_clocks(reader)
        timings = {
            # The events count half microseconds in a millisecond or more.
            name: Timing(tuple(float(f"{seconds:.5g}") for seconds in times[name]), turn.calls, turn.method)
            for name, turn in turns.items()
        }
        return timings, absent


class _Turn:
    """One implementation, warmed up and captured in a graph."""

    def __init__(self, name: str, calls: Sequence[Call]):
        self.name = name
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # where captures want to be warmed up
            for call in calls:
                call()
        torch.cuda.synchronize()
        self._load(calls, passes=1)
        # Long enough by the graph's own time: an eager launch can take longer than the kernel.
        passes = calls_per_graph(self.take(1)[0], len(calls)) // len(calls)
        if passes > 1:
            self._load(calls, passes)

    def _load(self, calls: Sequence[Call], passes: int) -> None:
        def launch() -> None:
            for _ in range(passes):
                for call in calls:
                    call()

        self.calls = passes * len(calls)
        self.method, self._launch = "events", launch
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                launch()
        except Exception as error:
            torch.cuda.synchronize()  # raises if more is broken than the capture
            print(f"  {self.name} cannot be captured and is timed eagerly: {reason(error)}", file=sys.stderr)
        else:
            self.method, self._launch = "graph", graph.replay

    def take(self, replays: int) -> list[float]:
        """Seconds per call of so many launches, after one that is not counted."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        self._launch()
        events[0].record()
        for event in events[1:]:
            self._launch()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) * 1e-3 / self.calls for a, b in pairwise(events)]


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the main thread if the block takes longer."""

    def stop(*_):
        raise TimeoutError(f"not ready after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _start_reading_clocks() -> subprocess.Popen | None:
    if shutil.which("nvidia-smi") is None:
        return None
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    query = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(_CLOCK_FIELDS.values())}"]
    return subprocess.Popen(
        [*query, "--format=csv,noheader,nounits"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def _finish_reading_clocks(reader: subprocess.Popen | None) -> dict[str, Any]:
    if reader is None:
        return {"absent": "nvidia-smi was not found"}
    try:
        answer, _ = reader.communicate(timeout=1)
    except subprocess.TimeoutExpired:
        reader.kill()
        return {"absent": "nvidia-smi did not answer"}
    return parse_clocks(answer)


def parse_clocks(answer: str) -> dict[str, Any]:
    """nvidia-smi's line of `_CLOCK_FIELDS`: numbers where they are numbers."""
    values = [value.strip() for value in answer.strip().split(",")]
    if len(values) != len(_CLOCK_FIELDS):
        return {"absent": f"nvidia-smi answered {answer.strip()!r}"}
    clocks: dict[str, Any] = {}
    for name, value in zip(_CLOCK_FIELDS, values, strict=True):
        try:
            clocks[name] = float(value)
        except ValueError:
            clocks[name] = value
    return clocks
