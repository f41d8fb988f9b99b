"""Long work in processes of its own: cached by the question, with progress, and it can be cancelled.

Each job has a worker process of its own while it runs: a cancelled one is gone at once, none can take another down, and
a worker that is done, or was asked to stop, takes the next job with everything still loaded. A question that several
people ask is computed once.
"""

from __future__ import annotations

import atexit
import contextlib
import heapq
import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

import dashboard
from dashboard.services.worker import STOP
from planner.errors import UserError

_KEPT = 64
_MOST_WAITING = 64
_MOST_CORES = 8
#: A job that takes longer was asked too much of.
MAX_SECONDS = 1800.0

# A worker that does not stop by then is ended.
_STOPPING_SECONDS = 1.0

Report = Callable[[int, int, str], None]


def alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark work that starts no processes: given up, it is asked to stop, and its worker goes on to the next job."""
    function.is_alone = True
    return function


def first(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark short work without which a page shows nothing: it goes before all other work."""
    function.is_first = True
    return function


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
        self._counting_s = self._noted_s = 0.0  # since when the present `what` is counted; the last progress
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

    def start(self, worker: Worker) -> bool:
        """It is being computed, unless it was given up; whether it is."""
        with self._lock:
            if self.is_finished:
                return False
            self._worker, self.started_s, self.state = worker, time.monotonic(), State.RUNNING
            self._noted_s = self.started_s
            worker.take_on(self)
            return True

    def note(self, kind: str, content: Any) -> None:
        """What comes from the worker."""
        if kind == "progress":
            self._progress(*content)
        elif kind == "done":
            self.finish(State.DONE, result=content)
        elif kind == "refused":
            self.finish(State.FAILED, error=content)
        else:
            with contextlib.suppress(OSError, ValueError):  # a log that was closed is no reason to lose the job
                print(content, file=sys.stderr)
            self.finish(State.FAILED, error=DEFECT, is_lasting=False)

    def _progress(self, done: int, total: int, what: str) -> None:
        if what != self.what:
            self._counting_s = self._noted_s
        self.done, self.total, self.what = done, total, what
        self._noted_s = time.monotonic()

    def remaining_s(self) -> float | None:
        """Seconds until what is counted now is done, at its pace so far; None where nothing tells."""
        if not self.done or self.state is not State.RUNNING:
            return None
        each = (self._noted_s - self._counting_s) / self.done
        return max(0.0, each * (self.total - self.done) - (time.monotonic() - self._noted_s))

    def finish(self, state: State, result: Any = None, error: str | None = None, is_lasting: bool = True) -> bool:
        """The first to call decides; whether it was this one."""
        with self._lock:
            if self.is_finished:
                return False
            self.state, self.result, self.error, self.is_lasting = state, result, error, is_lasting
            if self.started_s is not None:
                self.seconds = time.monotonic() - self.started_s
            self._finished.set()
            return True

    def end(self, state: State, error: str | None = None) -> None:
        """Stop computing."""
        if self.finish(state, error=error, is_lasting=False) and self._worker is not None:
            self._worker.stop(self, gently=getattr(self.function, "is_alone", False))


class Cores:
    """Who may run: so many at once in the order of asking. Work that is marked `first` goes before the rest, and one
    such piece runs even while all cores are taken.
    """

    def __init__(self, number: int) -> None:
        self._number, self._running = number, 0
        self._changed = threading.Condition()
        self._waiting: list[tuple[bool, int]] = []
        self._count = itertools.count()

    @contextlib.contextmanager
    def one(self, is_first: bool) -> Iterator[None]:
        """Wait for one, and keep it."""
        ticket = (not is_first, next(self._count))
        with self._changed:
            heapq.heappush(self._waiting, ticket)
            self._changed.wait_for(lambda: self._waiting[0] == ticket and self._running < self._number + is_first)
            heapq.heappop(self._waiting)
            self._running += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()


class Jobs:
    """All jobs of this server.

    Args:
        workers: how many run at once.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._cores = Cores(workers)
        self._lock = threading.Lock()
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._asked: dict[tuple[str, str], Job] = {}
        self._pool = Pool(ahead=min(2, workers) + 1)

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

    def keep_only(self, owner: str, slots: Iterable[str], keys: Collection[str]) -> None:
        """Give up what an owner asked for, except these questions."""
        for slot in slots:
            job = self._asked.get((owner, slot))
            if job is not None and job.key not in keys:
                self.cancel(owner, slot)

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
        with self._cores.one(getattr(job.function, "is_first", False)):
            if not job.is_finished:
                self._compute(job)
        if job.state is State.CANCELLED or not job.is_lasting:
            with self._lock:
                if self._jobs.get(job.key) is job:
                    del self._jobs[job.key]

    def _compute(self, job: Job) -> None:
        worker = self._pool.take()
        if not job.start(worker):
            self._pool.put(worker)
            return
        clock = threading.Timer(MAX_SECONDS, _too_long, (job,))
        clock.daemon = True
        clock.start()
        is_fit = False
        try:
            is_fit = worker.ask(job)
        finally:
            clock.cancel()
            if is_fit and job.is_finished:
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

        self._lock = threading.Lock()
        self._job: Job | None = None
        self._is_ready = self._is_ended = False

    def take_on(self, job: Job) -> None:
        """It is this job's from now on."""
        with self._lock:
            self._job = job

    def ask(self, job: Job) -> bool:
        """Compute, telling the job of everything that comes; whether another can be asked."""
        try:
            while self._answer(job) == "ended" and not job.is_finished:
                pass  # it was asked to stop at the question before, just as that was answered
        except (EOFError, OSError, pickle.UnpicklingError):
            return False
        finally:
            with self._lock:
                self._job = None
        return not self._is_ended

    def _answer(self, job: Job) -> str:
        pickle.dump((job.function, job.arguments), self._process.stdin)
        self._process.stdin.flush()
        while True:
            kind, content = pickle.load(self._process.stdout)
            if kind == "ready":
                self._is_ready = True
            elif kind != "ended":
                job.note(kind, content)
            if kind in ("done", "refused", "defect", "ended"):
                return kind

    def stop(self, job: Job, gently: bool) -> None:
        """Give up a job, if it is still at that one.

        Args:
            gently: ask it to stop, and end it only if it does not.
        """
        with self._lock:
            if self._job is not job:
                return
            if not gently or STOP is None:
                self.kill()
                return
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(STOP)
        clock = threading.Timer(_STOPPING_SECONDS, self.stop, (job, not self._is_ready))
        clock.daemon = True
        clock.start()

    def kill(self) -> None:
        """At once, whatever it is doing, with the processes that it started."""
        self._is_ended = True
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
