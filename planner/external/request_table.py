"""Read a table of served requests: JSONL or CSV with the instants of each request and its two lengths.

Column names are looked up in one table of aliases; a unit at the end of a name counts (_s, _ms, _us, _ns). First and
last token may be instants, or durations from the arrival (ttft, e2el). Instants are numbers, or all of them ISO 8601.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from planner.errors import UserError
from planner.external.plausible import first_impossible, unit_of_instant
from planner.external.served_run import CLOCK_SLACK_S, ServedRun, served_run
from planner.workload.tables import Table, dates_ns, numbers, read_csv, read_jsonl, show_columns, whole_numbers

_ALIASES = {
    "arrival": "arrival arrival_time arrived_at arrival_ts sent sent_at send_time start start_time request_time ts"
    " timestamp time",
    "queued": "queued queued_ts queued_at queued_time",
    "scheduled": "scheduled scheduled_ts scheduled_at scheduled_time first_scheduled first_scheduled_time",
    "first": "first_token first_token_ts first_token_time first_token_at",
    "ttft": "ttft time_to_first_token",
    "last": "last_token last_token_ts last_token_time last_token_at finished finished_at finished_ts finish_time"
    " finished_time completion_time end end_time end_ts",
    "e2el": "e2el e2e e2e_latency latency request_latency",
    "input": "input_tokens input_toks input_length input_len num_input_tokens prompt_tokens prompt_toks prompt_len"
    " num_prompt_tokens num_prefill_tokens isl",
    "output": "output_tokens output_toks output_length output_len num_output_tokens completion_tokens"
    " completion_len num_completion_tokens generated_tokens num_decode_tokens osl",
}
_TIMES = ("arrival", "queued", "scheduled", "first", "ttft", "last", "e2el")
_INSTANTS = ("arrival", "queued", "scheduled", "first", "last")
_UNITS = {"s": 1.0, "sec": 1.0, "secs": 1.0, "seconds": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
_WHAT = {
    "arrival": "arrival times (e.g. arrival_s)",
    "first": "first tokens (e.g. first_token_s or ttft_ms)",
    "last": "last tokens (e.g. last_token_s or e2el_ms)",
    "input": "input tokens",
    "output": "output tokens",
}
# Wall clocks count from 1970, monotonic ones from a boot: two clocks are further apart than any run lasts.
_OTHER_CLOCK_S = 1e6


@dataclass(frozen=True)
class _Column:
    """A column of the table, and how many of its units make a second."""

    name: str
    per_second: float = 1.0


def read_request_table(text: str, file: str) -> ServedRun:
    """The answered requests of a table.

    Raises:
        UserError: one sentence with file, line and column.
    """
    is_json = text.lstrip()[0] in "{[" or file.removesuffix(".gz").endswith((".jsonl", ".json", ".ndjson"))
    table = read_jsonl(text, file) if is_json else read_csv(text, file)
    roles = _roles(table)
    table, failed = _without_failures(table, roles)
    notes = [f"{file}: skipped {failed} failed requests of {failed + len(table.frame)}"] if failed else []
    clock = _Clock(table, roles)
    _check_instants(clock)
    arrival = clock.arrival(notes)
    first, first_column = clock.instant("first", "ttft", arrival)
    last, last_column = clock.instant("last", "e2el", arrival)
    scheduled = clock.seconds("scheduled") if "scheduled" in roles else None
    _check_order(table, arrival, roles["arrival"].name, first, first_column)
    _check_order(table, first, first_column, last, last_column)
    if scheduled is not None:
        _check_order(table, scheduled, roles["scheduled"].name, first, first_column)
    return served_run(
        file,
        arrival,
        whole_numbers(table, roles["input"].name),
        whole_numbers(table, roles["output"].name),
        first,
        last,
        scheduled_s=scheduled,
        num_failed=failed,
        notes=tuple(notes),
        told_by=f"{first_column} and {last_column}",
    )


def _roles(table: Table) -> dict[str, _Column]:
    found = list(table.frame.columns)
    by_name = {re.sub(r"[\s\-.]+", "_", column.strip().lower()): column for column in reversed(found)}
    roles = {}
    for role, aliases in _ALIASES.items():
        for alias in aliases.split():
            names = {alias: 1.0}
            if role in _TIMES:
                names |= {f"{alias}_{unit}": per_second for unit, per_second in _UNITS.items()}
            match = next((name for name in names if name in by_name), None)
            if match is not None:
                roles[role] = _Column(by_name[match], names[match])
                break
    for role, other in (("arrival", "queued"), ("first", "ttft"), ("last", "e2el"), ("input", ""), ("output", "")):
        if role not in roles and other not in roles:
            raise UserError(f"{table.file} has no column for {_WHAT[role]}, only {show_columns(found)}")
    roles.setdefault("arrival", roles.get("queued", _Column("")))
    return roles


def _without_failures(table: Table, roles: dict[str, _Column]) -> tuple[Table, int]:
    """The table without requests that got no answer: 0 output tokens, or no first or last token at all."""
    frame = table.frame
    failed = np.zeros(len(frame), bool)
    for role in ("first", "ttft", "last", "e2el", "output"):
        if role in roles:
            failed |= frame[roles[role].name].isna().to_numpy()
    kept = table.without(failed)
    answered = whole_numbers(kept, roles["output"].name, zero_allowed=True) > 0 if len(kept.frame) else np.empty(0)
    if not answered.any():
        raise UserError(
            f"{table.file} has no request with an answer: no line has output tokens, a first and a last one"
        )
    failed[np.flatnonzero(~failed)[~answered]] = True
    return table.without(failed), int(failed.sum())


class _Clock:
    """The instants of a table in seconds, counted from one origin so that no digit is lost."""

    def __init__(self, table: Table, roles: dict[str, _Column]) -> None:
        self.table = table
        self.roles = roles
        dates = {role: dates_ns(table, roles[role].name) for role in _INSTANTS if role in roles}
        self._dates = {role: found for role, found in dates.items() if found is not None}
        if self._dates and (other := next((role for role in dates if role not in self._dates), None)):
            date = next(iter(self._dates))
            raise UserError(
                f"{table.file}: {roles[date].name} has ISO 8601 dates and {roles[other].name} numbers; write both "
                "alike, or tokens as durations from the arrival (e.g. ttft_s and e2el_s)"
            )

    def seconds(self, role: str) -> np.ndarray:
        if role in self._dates:
            # From the first arrival, as nanoseconds since 1970 do not fit a float64.
            return (self._dates[role] - self._dates["arrival"][0]) / 1e9
        column = self.roles[role]
        return numbers(self.table, column.name) / column.per_second

    def arrival(self, notes: list[str]) -> np.ndarray:
        """float64 [n] on the clock of the tokens.

        An engine may stamp arrivals with the wall clock and everything later with a monotonic one. When it also says
        when a request was queued, the two are tied by the request that was queued soonest after it arrived.
        """
        arrival = self.seconds("arrival")
        if "first" not in self.roles or abs(float(np.median(self.seconds("first") - arrival))) < _OTHER_CLOCK_S:
            return arrival
        names = f"{self.roles['arrival'].name} and {self.roles['first'].name}"
        if "queued" not in self.roles:
            raise UserError(f"{self.table.file}: {names} are of different clocks, and no column says how they relate")
        delay = self.seconds("queued") - arrival
        notes.append(
            f"{self.table.file}: {names} are of different clocks; tied by the request that was queued soonest after "
            "its arrival, so times to first token are short by that request's way to the queue"
        )
        return arrival + float(delay.min())

    def instant(self, role: str, duration: str, arrival: np.ndarray) -> tuple[np.ndarray, str]:
        """Instants of a role, from its own column or from a duration since the arrival, and the column's name."""
        if role in self.roles:
            return self.seconds(role), self.roles[role].name
        return arrival + self.seconds(duration), self.roles[duration].name


def _check_instants(clock: _Clock) -> None:
    """
    Raises:
        UserError: a column of instants that cannot be in its unit, which is seconds where its name says none.
    """
    for role in _INSTANTS:
        if role not in clock.roles:
            continue
        table, column, seconds = clock.table, clock.roles[role], clock.seconds(role)
        row = first_impossible(seconds)
        if row is not None:
            unit = unit_of_instant(float(seconds[row]) * column.per_second)
            raise UserError(
                f"{table.where(row)}: {column.name} is {table.cell_of(row, column.name)}, which is no time in the unit "
                f"of this column (seconds, where its name says none) but one in {unit}; end its name in _{unit}"
            )


def _check_order(table: Table, before: np.ndarray, earlier: str, after: np.ndarray, later: str) -> None:
    wrong = np.flatnonzero(after < before - CLOCK_SLACK_S)
    if wrong.size:
        i = int(wrong[0])
        raise UserError(
            f"{table.where(i)}: {later} lies {before[i] - after[i]:.4g} s before {earlier}; "
            "check the columns and their units"
        )
