"""Work in other processes: computed once, cancelled at once, and never a traceback for an answer."""

import contextlib
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dashboard.components import _about, _progress_words
from dashboard.services.jobs import DEFECT, Job, Jobs, State, alone, first
from dashboard.services.worker import STOP, Stop, answer
from planner.errors import UserError

# What runs in the workers; they import this module by its name.


def add(report, one, two):
    report(1, 2, "halves")
    return one + two


def who(report, note):
    return os.getpid()


def refuse(report):
    raise UserError("that cannot be")


def fail(report):
    raise ZeroDivisionError("a bug")


def sleep(report, started):
    Path(started).write_text("yes")
    report(1, 10, "naps")
    time.sleep(600)


@first
def add_first(report, one, two):
    return one + two


@alone
def busy(report, started):
    Path(started).write_text(str(os.getpid()))
    while True:
        report(1, 10, "turns")


@alone
def deaf(report, started):
    Path(started).write_text("yes")
    while True:
        with contextlib.suppress(BaseException):  # as a library might
            time.sleep(600)


def with_child(report, started):
    import subprocess
    import sys

    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(started).write_text(str(child.pid))
    time.sleep(600)


def die(report):
    os._exit(9)


@pytest.fixture(scope="module")
def jobs():
    made = Jobs(workers=2)
    yield made
    made.stop()


def until(condition) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it never comes")


def test_a_question_is_answered_by_another_process_and_remembered(jobs):
    job = jobs.ask("ann", "sum", "k1", add, 2, 3)
    assert job.wait(60)
    assert (job.state, job.result, job.done, job.total, job.what) == (State.DONE, 5, 1, 2, "halves")
    assert jobs.ask("bob", "sum", "k1", add, 2, 3) is job
    assert jobs.finished("k1") is job
    other = jobs.ask("ann", "who", "k2", who, "x")
    assert other.wait(60)
    assert other.result != os.getpid()


def test_bad_input_is_a_sentence_and_a_defect_says_no_more_than_that(jobs, capfd):
    refused = jobs.ask("ann", "a", "k3", refuse)
    assert refused.wait(60)
    assert (refused.state, refused.error) == (State.FAILED, "that cannot be")
    failed = jobs.ask("ann", "b", "k4", fail)
    assert failed.wait(60)
    assert (failed.state, failed.error) == (State.FAILED, DEFECT)
    assert "ZeroDivisionError" in capfd.readouterr().err
    # Asking again might help against a defect, not against bad input.
    assert jobs.ask("ann", "a", "k3", refuse) is refused
    until(lambda: jobs.ask("ann", "b", "k4", fail) is not failed)


def test_a_defect_nobody_can_be_told_of_keeps_no_core(jobs, monkeypatch, tmp_path):
    log = (tmp_path / "log").open("w")
    log.close()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", log)
        failed = jobs.ask("ann", "closed", "k14", fail)
        assert failed.wait(60)
    assert (failed.state, failed.error) == (State.FAILED, DEFECT)
    until(lambda: jobs.free_cores() == 2)


def test_whatever_goes_wrong_in_telling_a_job_ends(jobs, monkeypatch):
    def broken(self, kind, content):
        raise RuntimeError("cannot be noted")

    with monkeypatch.context() as patch:
        patch.setattr(Job, "note", broken)
        patch.setattr(threading, "excepthook", lambda told: None)
        failed = jobs.ask("ann", "untold", "k15", add, 1, 1)
        assert failed.wait(60)
        until(lambda: not any(thread.name == "job k15" for thread in threading.enumerate()))
    assert failed.state is State.FAILED
    assert jobs.ask("ann", "next", "k16", add, 1, 1).wait(60)


def test_a_cancelled_job_ends_at_once_and_its_worker_is_replaced(jobs, tmp_path):
    started = tmp_path / "started"
    job = jobs.ask("ann", "long", "k5", sleep, str(started))
    until(lambda: started.exists() and job.done == 1)
    assert job.state is State.RUNNING
    jobs.cancel("ann", "long")
    assert job.wait(5)
    assert job.state is State.CANCELLED
    assert jobs.ask("ann", "long", "k6", add, 1, 1).wait(60)


@pytest.mark.skipif(STOP is None, reason="needs a signal of one's own")
def test_a_worker_is_asked_to_stop_and_goes_on_to_the_next_job(tmp_path):
    made = Jobs(workers=1)
    try:
        for number in range(5):
            started = tmp_path / f"busy {number}"
            job = made.ask("ann", "long", f"b{number}", busy, str(started))
            until(lambda: started.exists() and started.read_text() and job.done == 1)  # noqa: B023
            made.cancel("ann", "long")
            assert job.is_finished
            assert job.state is State.CANCELLED
            after = made.ask("ann", "who", f"w{number}", who, number)
            assert after.wait(20)
            assert after.result == int(started.read_text())
    finally:
        made.stop()


@pytest.mark.skipif(STOP is None, reason="needs a signal of one's own")
def test_a_worker_that_does_not_stop_is_ended(tmp_path):
    made = Jobs(workers=1)
    try:
        started = tmp_path / "deaf"
        made.ask("ann", "long", "d", deaf, str(started))
        until(started.exists)
        made.cancel("ann", "long")
        assert made.ask("ann", "sum", "d2", add, 2, 2).wait(60)
    finally:
        made.stop()


def test_what_people_wait_for_goes_first_even_while_all_cores_are_taken(tmp_path):
    made = Jobs(workers=1)
    try:
        started = tmp_path / "long"
        made.ask("ann", "long", "l", sleep, str(started))
        until(started.exists)
        later = made.ask("ann", "later", "a", add, 1, 1)
        assert made.ask("ann", "now", "f", add_first, 1, 2).wait(60)
        assert later.state is State.WAITING
        made.cancel("ann", "long")
        assert later.wait(60)
    finally:
        made.stop()


def test_older_questions_of_a_slot_are_given_up(jobs, tmp_path):
    started = tmp_path / "old"
    job = jobs.ask("ann", "slot", "old", sleep, str(started))
    until(started.exists)
    jobs.keep_only("ann", ["slot", "other"], {"old", "new"})
    assert not job.is_finished
    jobs.keep_only("ann", ["slot", "other"], {"new"})
    assert job.wait(5)
    assert job.state is State.CANCELLED


def test_the_time_that_is_left_is_estimated_from_the_pace(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("dashboard.services.jobs.time.monotonic", lambda: clock[0])
    job = Job("k", add, ())
    assert _progress_words(job) == ": waiting for a free core"
    assert job.start(SimpleNamespace(take_on=lambda job: None))
    assert (job.remaining_s(), _progress_words(job)) == (None, "")
    clock[0] = 106.0
    assert _progress_words(job) == "; 6 s so far"
    job.note("progress", (2, 10, "engines"))
    assert job.remaining_s() == pytest.approx(24.0)
    assert _progress_words(job) == ": 2 of 10 engines; about 25 s for the rest of them"
    clock[0] = 126.0
    assert job.remaining_s() == pytest.approx(4.0)
    job.note("progress", (10, 10, "engines"))
    clock[0] = 131.0
    job.note("progress", (1, 41, "draws"))  # another pace
    assert job.remaining_s() == pytest.approx(200.0)
    assert _progress_words(job).endswith("about 3 min for the rest of them")
    assert [_about(seconds) for seconds in (3.0, 12.0, 89.0)] == ["some seconds", "about 10 s", "about 90 s"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_what_a_job_started_ends_with_it(jobs, tmp_path):
    started = tmp_path / "started"
    job = jobs.ask("ann", "family", "k12", with_child, str(started))
    until(lambda: started.exists() and started.read_text())
    child = started.read_text()
    jobs.cancel("ann", "family")
    assert job.wait(5)

    def is_gone() -> bool:
        status = Path(f"/proc/{child}/stat")
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"

    until(is_gone)


def test_a_large_job_takes_the_cores_that_are_free(jobs, tmp_path):
    until(lambda: jobs.free_cores() == 2)
    started = tmp_path / "started"
    jobs.ask("ann", "cores", "k13", sleep, str(started))
    until(started.exists)
    assert jobs.free_cores() == 1
    jobs.cancel("ann", "cores")
    until(lambda: jobs.free_cores() == 2)


def test_another_question_for_the_same_purpose_ends_the_first(jobs, tmp_path):
    job = jobs.ask("ann", "same", "k7", sleep, str(tmp_path / "a"))
    assert jobs.ask("ann", "same", "k8", add, 1, 2).wait(60)
    assert job.wait(5)
    assert job.state is State.CANCELLED


def test_what_somebody_else_waits_for_goes_on(jobs, tmp_path):
    started = tmp_path / "started"
    job = jobs.ask("ann", "shared", "k9", sleep, str(started))
    assert jobs.ask("bob", "shared", "k9", sleep, str(started)) is job
    jobs.cancel("ann", "shared")
    assert not job.wait(0.3)
    jobs.cancel("bob", "shared")
    assert job.wait(5)


def test_a_worker_that_dies_is_no_answer_and_does_not_stop_the_others(jobs):
    job = jobs.ask("ann", "die", "k10", die)
    assert job.wait(60)
    assert job.state is State.FAILED
    assert "ended early" in job.error
    assert jobs.ask("ann", "after", "k11", add, 4, 4).wait(60)


def test_too_many_waiting_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("dashboard.services.jobs._MOST_WAITING", 2)
    busy = Jobs(workers=1)
    try:
        first = busy.ask("o", "0", "0", sleep, str(tmp_path / "s"))
        until(lambda: first.state is State.RUNNING)
        for number in (1, 2):
            busy.ask("o", f"{number}", f"{number}", add, 1, 1)
        with pytest.raises(UserError, match="busy"):
            busy.ask("o", "3", "3", add, 1, 1)
    finally:
        busy.stop()


def test_the_cache_is_bounded(jobs, monkeypatch):
    monkeypatch.setattr("dashboard.services.jobs._KEPT", 3)
    for number in range(6):
        assert jobs.ask("ann", f"slot {number}", f"many {number}", add, number, 0).wait(60)
    jobs.ask("ann", "last", "many last", add, 0, 0)
    assert jobs.finished("many 0") is None
    assert jobs.finished("many 5") is not None


def test_answers_of_a_worker():
    notes = []
    assert answer(add, (1, 2), lambda *step: notes.append(step), Stop()) == ("done", 3)
    assert notes == [(1, 2, "halves")]
    assert answer(refuse, (), print, Stop()) == ("refused", "that cannot be")
    kind, text = answer(fail, (), print, Stop())
    assert kind == "defect"
    assert "a bug" in text
