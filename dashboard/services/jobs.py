"""Long work in processes of its own: cached by the question, with progress, and it can be cancelled.

Each job has a worker process of its own while it runs: a cancelled one is gone at once, none can take another down, and
a worker that is done takes the next job with everything still loaded. A question that several people ask is computed
once.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

import dashboard
from planner.errors import UserError

_KEPT = 64
_MOST_WAITING = 64
_MOST_CORES = 8
#: A job that takes longer was asked too much of.
MAX_SECONDS = 1800.0

Report = Callable[[int, int, str], None]


class State(StrEnum):
    """Where a job stands."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Job:
    """One piece of work.

    Attributes:
        key: the hash of its question.
        state: as it is now; it only ever moves forward.
        done, total, what: progress.
        result: what the function returned, once DONE; error: one sentence, once FAILED.
    """

    def __init__(self, key: str, function: Callable[..., Any], arguments: tuple) -> None:
        self.key = key
        self.function, self.arguments = function, arguments
        self.state = State.WAITING
        self.done, self.total, self.what = 0, 0, ""
        self.result: Any = None
        self.error: str | None = None
        self.is_lasting = True  # whether asking again would give the same answer
        self.started_s: float | None = None
        self.seconds: float | None = None
        self.watchers: set[str] = set()
        self._worker: Worker | None = None
        self._finished = threading.Event()
        self._lock = threading.Lock()

    @property
    def is_finished(self) -> bool:
        return self._finished.is_set()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it is finished, at the latest after so long."""
        return self._finished.wait(seconds)

    def start(self, worker: Worker) -> None:
        """It is being computed."""
        with self._lock:
            self._worker, self.started_s = worker, time.monotonic()
            if not self.is_finished:
                self.state = State.RUNNING
                return
        worker.kill()

    def note(self, kind: str, content: Any) -> None:
        """What comes from the worker."""
        if kind == "progress":
            self.done, self.total, self.what = content
        elif kind == "done":
            self.finish(State.DONE, result=content)
        elif kind == "refused":
            self.finish(State.FAILED, error=content)
        else:
            with contextlib.suppress(OSError, ValueError):  # a log that was closed is no reason to lose the job
                print(content, file=sys.stderr)
            self.finish(State.FAILED, error=DEFECT, is_lasting=False)

    def finish(self, state: State, result: Any = None, error: str | None = None, is_lasting: bool = True) -> None:
        """The first to call decides."""
        with self._lock:
            if self.is_finished:
                return
            self.state, self.result, self.error, self.is_lasting = state, result, error, is_lasting
            if self.started_s is not None:
                self.seconds = time.monotonic() - self.started_s
            self._finished.set()

    def end(self, state: State, error: str | None = None) -> None:
        """Stop computing."""
        self.finish(state, error=error, is_lasting=False)
        if self._worker is not None and self.state is state:
            self._worker.kill()


class Jobs:
    """All jobs of this server.

    Args:
        workers: how many run at once.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._slots = threading.BoundedSemaphore(workers)
        self._lock = threading.Lock()
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._asked: dict[tuple[str, str], Job] = {}
        self._pool = Pool(ahead=min(2, workers))

    def ask(self, owner: str, slot: str, key: str, function: Callable[..., Any], *arguments: Any) -> Job:
        """The job of a question, started if nobody has asked it yet.

        Args:
            owner: who asks, e.g. a browser session.
            slot: what for; what the same owner had asked for the same purpose is given up.
            key: the hash of function and arguments.
            function: of a module, called in another process as `function(report, *arguments)` with a `Report`.

        Raises:
            UserError: too many are waiting.
        """
        with self._lock:
            job = self._jobs.get(key)
            if job is None:
                waiting = sum(each.state is State.WAITING for each in self._jobs.values())
                if waiting >= _MOST_WAITING:
                    raise UserError("this server is busy with other people's questions; try again in a minute")
                job = self._jobs[key] = Job(key, function, arguments)
                threading.Thread(target=self._run, args=(job,), name=f"job {key[:8]}", daemon=True).start()
            self._jobs.move_to_end(key)
            before = self._asked.get((owner, slot))
            self._asked[owner, slot] = job
            job.watchers.add(owner)
        if before is not None and before is not job:
            self._release(owner, before)
        self._forget()
        return job

    def cancel(self, owner: str, slot: str) -> None:
        """Give up what an owner asked for; it ends unless somebody else waits for it too."""
        with self._lock:
            job = self._asked.pop((owner, slot), None)
        if job is not None:
            self._release(owner, job)

    def finished(self, key: str) -> Job | None:
        """A job that is done, from the cache."""
        job = self._jobs.get(key)
        return job if job is not None and job.state is State.DONE else None

    def free_cores(self) -> int:
        """How many processes a large job may use: those that nothing else is running on, at least one."""
        running = sum(job.state is State.RUNNING for job in list(self._jobs.values()))
        return max(1, min(_MOST_CORES, self.workers - running))

    def wait(self, seconds: float = 60.0) -> None:
        """Until nothing is running or waiting; for tests."""
        for job in list(self._jobs.values()):
            job.wait(seconds)

    def stop(self) -> None:
        """End everything."""
        for job in list(self._jobs.values()):
            if not job.is_finished:
                job.end(State.CANCELLED)
        self._pool.close()

    def _release(self, owner: str, job: Job) -> None:
        with self._lock:
            if any(each is job for (who, _), each in self._asked.items() if who == owner):
                return
            job.watchers.discard(owner)
            given_up = not job.watchers and not job.is_finished
            if given_up:
                self._jobs.pop(job.key, None)
        if given_up:
            job.end(State.CANCELLED)

    def _forget(self) -> None:
        with self._lock:
            finished = [key for key, job in self._jobs.items() if job.is_finished]
            for key in finished[: max(0, len(finished) - _KEPT)]:
                del self._jobs[key]
            kept = set(self._jobs.values())
            self._asked = {asked: job for asked, job in self._asked.items() if job in kept}

    def _run(self, job: Job) -> None:
        with self._slots:
            if not job.is_finished:
                self._compute(job)
        if job.state is State.CANCELLED or not job.is_lasting:
            with self._lock:
                if self._jobs.get(job.key) is job:
                    del self._jobs[job.key]

    def _compute(self, job: Job) -> None:
        worker = self._pool.take()
        job.start(worker)
        clock = threading.Timer(MAX_SECONDS, _too_long, (job,))
        clock.daemon = True
        clock.start()
        is_fit = False
        try:
            is_fit = worker.ask(job.function, job.arguments, job.note)
        finally:
            clock.cancel()
            if is_fit and job.is_finished and job.state is not State.CANCELLED:
                self._pool.put(worker)
            else:
                error = "the computation ended early, perhaps for want of memory"
                job.finish(State.FAILED, error=error, is_lasting=False)
                self._pool.replace(worker)


DEFECT = "this is a defect of memwall, not of your input; the server's log has the details"


@cache
def jobs() -> Jobs:
    """Those of this server process."""
    found = Jobs(workers=max(1, os.cpu_count() or 1))
    atexit.register(found.stop)
    return found


def _too_long(job: Job) -> None:
    job.end(State.FAILED, f"no answer within {MAX_SECONDS / 60:g} minutes: ask for less")


# ---- the processes -------------------------------------------------------------------------------------------------


class Worker:
    """One `dashboard.services.worker` process.

    It is started as a program of its own: multiprocessing would run the page's script again in each child.
    """

    def __init__(self) -> None:
        home = Path(dashboard.__file__).resolve().parent
        # Streamlit puts the script's own folder on the path, where our packages have other names.
        paths = [str(home.parent), *(path for path in sys.path if path and Path(path).resolve() != home)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dashboard.services.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )

    def ask(self, function: Callable[..., Any], arguments: tuple, note: Callable[[str, Any], None]) -> bool:
        """Compute, telling `note` of everything that comes; whether it can be asked again."""
        try:
            pickle.dump((function, arguments), self._process.stdin)
            self._process.stdin.flush()
            while True:
                kind, content = pickle.load(self._process.stdout)
                if kind != "ready":
                    note(kind, content)
                if kind in ("done", "refused", "defect"):
                    return True
        except (EOFError, OSError, pickle.UnpicklingError):
            return False

    def kill(self) -> None:
        """At once, whatever it is doing, with the processes that it started."""
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()


class Pool:
    """Idle workers, one of them at least started ahead of time."""

    def __init__(self, ahead: int) -> None:
        self._lock = threading.Lock()
        self._idle: list[Worker] = []
        self._ahead = ahead
        self._closed = False
        self._refill()

    def take(self) -> Worker:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return Worker()

    def put(self, worker: Worker) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(worker)
                return
        worker.kill()

    def replace(self, worker: Worker) -> None:
        """A worker that can work no more."""
        worker.kill()
        self._refill()

    def close(self) -> None:
        with self._lock:
            self._closed, idle, self._idle = True, self._idle, []
        for worker in idle:
            worker.kill()

    def _refill(self) -> None:
        with self._lock:
            while not self._closed and len(self._idle) < self._ahead:
                self._idle.append(Worker())
