"""Pieces that pages are made of: charts with their text, answers that are being computed, errors as one sentence."""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import streamlit as st

from dashboard.figures.theme import Chart
from dashboard.services.jobs import DEFECT, Job, State, jobs
from planner.errors import UserError

_POLL_SECONDS = 0.4
#: What is ready by then appears without a progress bar.
_PATIENCE_SECONDS = 0.25
#: From then on people want to know how long it may take.
_LONG_SECONDS = 5.0


def owner() -> str:
    """This browser session."""
    return st.session_state.setdefault("session", uuid.uuid4().hex)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Bad input is one sentence on the page; a defect is one sentence too, and its traceback is in the log."""
    try:
        yield
    except UserError as error:
        complain(str(error))
    except Exception:  # what stops or repeats a script is no Exception
        traceback.print_exc(file=sys.stderr)
        complain(DEFECT)


def complain(sentence: str) -> None:
    """One sentence about what is wrong."""
    st.error(escaped(begun(" ".join(sentence.split()))), icon=":material/error:")


def begun(sentence: str) -> str:
    """With a capital, unless it begins with a name such as trace.csv or h200_sxm."""
    return f"{sentence[:1].upper()}{sentence[1:]}" if sentence.partition(" ")[0].isalpha() else sentence


def escaped(text: str) -> str:
    """Text that Markdown shall show as it is."""
    for sign in "\\`*_{}[]<>#|$~":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\n", " ")


def show_chart(chart: Chart, key: str) -> None:
    """A chart, its summary, and its data as a table."""
    config = {"displaylogo": False, "modeBarButtonsToRemove": ["lasso2d", "select2d"]}
    st.plotly_chart(chart.figure, key=f"chart_{key}", alt=chart.summary, config=config)
    st.caption(escaped(chart.summary))
    if chart.table:
        with st.expander("The same as a table", key=f"table_{key}"):
            show_table(chart.table, key=f"data_{key}")


def show_table(rows: Sequence[Mapping[str, Any]], key: str, **more: Any) -> Any:
    """Rows as a table; numbers that are already text stay as they are."""
    return st.dataframe(list(rows), hide_index=True, key=key, **more)


def note_warnings(warnings: Sequence[str]) -> None:
    """What to know before believing the numbers."""
    for warning in dict.fromkeys(warnings):
        st.warning(escaped(f"{begun(warning)}."), icon=":material/warning:")


# ---- work in other processes ---------------------------------------------------------------------------------------


def ask(slot: str, key: str, function: Callable[..., Any], *arguments: Any) -> None:
    """Start what `answer_of` will be asked for, so that several are computed side by side."""
    if st.session_state.setdefault("cancelled", {}).get(slot) != key:
        jobs().ask(owner(), slot, key, function, *arguments)


def give_up_but(slots: Iterable[str], keys: Collection[str]) -> None:
    """Give up older questions of these slots, so that they take no core from the new ones."""
    jobs().keep_only(owner(), slots, keys)


def answer_of(
    slot: str,
    key: str,
    function: Callable[..., Any],
    *arguments: Any,
    waiting: str,
    patience: float = _PATIENCE_SECONDS,
) -> Any:
    """What a job says; None while it is at work, with its progress on the page, and if it failed, with the reason.

    Args:
        slot: what for; a new question in the same slot ends the old one.
        key: the question's hash.
        function, arguments: the work, of `dashboard.services.work`.
        waiting: what is being done, for people.
        patience: seconds to wait before a progress bar is shown.
    """
    cancelled = st.session_state.setdefault("cancelled", {})
    if cancelled.get(slot) == key:
        st.info("Cancelled.", icon=":material/cancel:")
        if st.button("Compute it after all", key=f"{slot}_again"):
            cancelled.pop(slot)
            st.rerun()
        return None
    job = jobs().ask(owner(), slot, key, function, *arguments)
    job.wait(patience)
    if job.state is State.DONE:
        return job.result
    if job.state is State.FAILED:
        complain(job.error or DEFECT)
        return None
    if job.state is State.CANCELLED:
        st.info("The computation was ended.", icon=":material/cancel:")
        return None
    _watch(job, slot, key, waiting)
    return None


def _progress_words(job: Job) -> str:
    """How far a job is, and, if it takes long, how long it will still take."""
    if job.state is State.WAITING:
        return ": waiting for a free core"
    words = f": {job.done} of {job.total} {job.what}" if job.total else ""
    seconds = 0.0 if job.started_s is None else time.monotonic() - job.started_s
    if seconds < _LONG_SECONDS:
        return words
    left = job.remaining_s()
    return f"{words}; {seconds:.0f} s so far" if left is None else f"{words}; {_about(left)} for the rest of them"


def _about(seconds: float) -> str:
    """A duration as precisely as an estimate deserves."""
    if seconds >= 90.0:
        return f"about {seconds / 60:.0f} min"
    return f"about {5 * round(seconds / 5)} s" if seconds >= 7.5 else "some seconds"


def _watch(job: Job, slot: str, key: str, waiting: str) -> None:
    """A progress bar that looks after itself, and runs the page again when there is an answer."""

    @st.fragment(run_every=_POLL_SECONDS)
    def progress() -> None:
        if job.is_finished:
            st.rerun()
        share = min(1.0, job.done / job.total) if job.total else 0.0
        text = f"{waiting}{_progress_words(job)}"
        bar, button = st.columns([5, 1], vertical_alignment="center")
        bar.progress(share, text=escaped(text))
        if button.button("Cancel", key=f"{slot}_cancel", width="stretch"):
            st.session_state["cancelled"][slot] = key
            jobs().cancel(owner(), slot)
            st.rerun()

    progress()
