"""Trace files as tables of checked columns. Clean files pass at vectorised speed; only a failure looks for its line.

A `Table` has named columns of raw cells and can say on which line of the file a row stood. `whole_numbers`, `numbers`
and `seconds` turn a column into an array or raise a UserError that names file, line, column and value.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from engine.commands.files import unpacked
from planner.errors import UserError
from planner.workload.workload import MAX_TOKENS

_SHOWN_COLUMNS = 12


@dataclass(frozen=True)
class Table:
    """Rows of one file.

    Attributes:
        file: its name for messages, without the folder.
        frame: raw cells, columns named as in the file. A row that lacks a cell has NaN or None there.
        line_of: line number, from 1, of row i. Reads the text again, so call it for messages only.
        cell_of: text of row i in a column, as the file has it.
    """

    file: str
    frame: pd.DataFrame
    line_of: Callable[[int], int]
    cell_of: Callable[[int, str], str]

    def where(self, row: int) -> str:
        return f"{self.file} line {self.line_of(row)}"

    def without(self, rows: np.ndarray) -> Table:
        """The table less the rows where `rows` (bool [n]) is True; the others keep their line numbers."""
        kept = np.flatnonzero(~rows)
        return Table(
            self.file,
            self.frame.iloc[kept].reset_index(drop=True),
            lambda i: self.line_of(int(kept[i])),
            lambda i, column: self.cell_of(int(kept[i]), column),
        )


def read_text(path: str | Path, what: str = "trace", form: str = "CSV, JSONL or JSON text") -> str:
    """The text of a file, gunzipped when it is gzip by its first bytes. UserError when there is no text to be had.

    Args:
        what, form: what the file should be, and what that is made of, for messages.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a directory; name a {what} file in it")
    try:
        raw = unpacked(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path.name} is damaged gzip data: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if b"\0" in raw[:65536]:
        raise UserError(f"{path.name} is a binary file; {what}s are {form}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path.name} line {line} is not UTF-8 text; {what}s are {form}") from None
    if not text.strip():
        raise UserError(f"{path.name} is empty")
    return text


def read_csv(text: str, file: str) -> Table:
    """A CSV with a header line, separated by commas, semicolons or tabs."""
    header = text.lstrip("\r\n").split("\n", 1)[0]
    separator = max(",;\t", key=header.count)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(io.StringIO(text), sep=separator, index_col=False, skipinitialspace=True)
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise _wrong_width(text, file, separator, error) from None
    frame.columns = [str(column).strip() for column in frame.columns]
    names = [cell.strip() for cell in next(csv.reader([header], delimiter=separator), [])]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{file} has two columns {twice!r}; rename one of them")
    if frame.empty:
        raise UserError(f"{file} is empty: it has a header line but no requests")

    def record(row: int) -> tuple[int, list[str]]:
        return _csv_records(text, separator)[row + 1]

    def cell_of(row: int, column: str) -> str:
        cells, at = record(row)[1], frame.columns.get_loc(column)
        return cells[at].strip() if at < len(cells) else ""

    return Table(file, frame, lambda row: record(row)[0], cell_of)


def _csv_records(text: str, separator: str) -> list[tuple[int, list[str]]]:
    """(first line, cells) of every record, blank lines left out as pandas does."""
    reader = csv.reader(io.StringIO(text), delimiter=separator)
    records, line = [], 1
    for cells in reader:
        if len(cells) > 1 or (cells and cells[0].strip()):
            records.append((line, cells))
        line = reader.line_num + 1
    return records


def _wrong_width(text: str, file: str, separator: str, error: Exception) -> UserError:
    try:
        records = _csv_records(text, separator)
    except csv.Error as csv_error:
        return UserError(f"{file} is not readable as CSV: {csv_error}")
    width = len(records[0][1])
    for line, cells in records[1:]:
        if len(cells) > width:
            return UserError(f"{file} line {line} has {len(cells)} cells where the header names {width} columns")
    reason = re.sub(r"\s+", " ", str(error)).strip()
    return UserError(f"{file} is not readable as CSV: {reason}")


def read_jsonl(text: str, file: str) -> Table:
    """One JSON object per line; blank lines are skipped."""
    lines = [line for line in text.split("\n") if line and not line.isspace()]
    try:
        rows = json.loads(f"[{','.join(lines)}]")
    except (ValueError, RecursionError):
        rows = None
    if rows is None or len(rows) != len(lines) or not all(type(row) is dict for row in rows):
        raise _bad_json_line(text, file)
    columns = dict.fromkeys(key for row in rows for key in row)
    frame = pd.DataFrame({column: _json_column(rows, column) for column in columns}, index=range(len(rows)))

    def cell_of(row: int, column: str) -> str:
        return json.dumps(rows[row][column]) if column in rows[row] else ""

    return Table(file, frame, lambda row: _filled_line_numbers(text)[row], cell_of)


def _json_column(rows: Sequence[dict], column: str) -> pd.Series:
    values = [row.get(column) for row in rows]
    if all(type(value) is int for value in values):
        try:
            return pd.Series(values, dtype=np.int64)
        except OverflowError:
            return pd.Series(values, dtype=np.float64)
    if all(type(value) in (int, float) for value in values):
        return pd.Series(values, dtype=np.float64)
    return pd.Series(values, dtype=object)


def _filled_line_numbers(text: str) -> list[int]:
    return [i for i, line in enumerate(text.split("\n"), 1) if line and not line.isspace()]


def _bad_json_line(text: str, file: str) -> UserError:
    lines = text.split("\n")
    for number in _filled_line_numbers(text):
        try:
            row = json.loads(lines[number - 1])
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "too deeply nested, or a number of too many digits")
            shown = lines[number - 1].strip()
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            return UserError(f"{file} line {number} is not complete JSON ({reason}): {shown}")
        if type(row) is not dict:
            return UserError(
                f"{file} line {number} is {_json_kind(row)}, not a JSON object; write one object per request"
            )
    return UserError(f"{file} is not JSON with one object per line")


def _json_kind(value: object) -> str:
    kinds = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def show_columns(columns: Sequence[str]) -> str:
    """A list of columns for a message, shortened where a file has very many."""
    if not columns:
        return "rows without any"
    shown = ", ".join(columns[:_SHOWN_COLUMNS])
    more = len(columns) - _SHOWN_COLUMNS
    return shown + (f" and {more} more" if more > 0 else "")


def numbers(table: Table, column: str) -> np.ndarray:
    """A column as finite numbers, int64 or float64 [n]."""
    values = _numeric(table.frame[column])
    bad = np.flatnonzero(~np.isfinite(values)) if values.dtype.kind == "f" else ()
    if len(bad):
        raise _bad_cell(table, int(bad[0]), column, "a number")
    return values


def whole_numbers(table: Table, column: str, *, zero_allowed: bool = False) -> np.ndarray:
    """A column of token counts as int64 [n], each at least 1 (or 0) and at most MAX_TOKENS."""
    values = numbers(table, column)
    fractional = np.flatnonzero(values != np.rint(values)) if values.dtype.kind == "f" else ()
    if len(fractional):
        raise _bad_cell(table, int(fractional[0]), column, "a whole number")
    low = 0 if zero_allowed else 1
    outside = np.flatnonzero((values < low) | (values > MAX_TOKENS))
    if outside.size:
        raise _bad_cell(table, int(outside[0]), column, f"a number of tokens from {low} to {MAX_TOKENS}")
    return values.astype(np.int64)


def seconds(table: Table, column: str, units_per_second: int) -> np.ndarray:
    """A column of times as float64 seconds [n] since its first row. Text is read as ISO 8601 dates.

    The first row is subtracted before scaling: nanoseconds since 1970 do not fit a float64, their differences do.
    """
    values = _numeric(table.frame[column])
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        dates = _dates_ns(table.frame[column])
        if dates is not None:
            values, units_per_second = dates, 10**9
        else:
            raise _bad_time(table, column, values)
    if np.ptp(values.astype(np.float64) / 4) > 2**60:  # beyond int64, and beyond any clock
        row = int(np.abs(values.astype(np.float64)).argmax())
        raise _bad_cell(table, row, column, "a possible time")
    return (values - values[0]) / units_per_second


def dates_ns(table: Table, column: str) -> np.ndarray | None:
    """A column of ISO 8601 dates as int64 nanoseconds [n] since 1970, without a zone in UTC; None where it has none.

    Raises:
        UserError: it has dates, and a cell that is none.
    """
    cells = table.frame[column]
    if cells.dtype.kind in "ifub":
        return None
    texts = cells.where(cells.map(lambda cell: type(cell) is str), None)
    # "2026" is a date as well, but in a column of times it is a number.
    is_date = _dates(texts).notna().to_numpy() & ~np.isfinite(_numeric(cells))
    if not is_date.any():
        return None
    if not is_date.all():
        raise _bad_cell(table, int(np.flatnonzero(~is_date)[0]), column, "an ISO 8601 date as on other lines")
    return _dates_ns(cells)


def _numeric(column: pd.Series) -> np.ndarray:
    """int64 or float64 [n], NaN where a cell is missing or no number. Booleans are no numbers."""
    if column.dtype.kind in "if":
        return column.to_numpy()
    if column.dtype.kind == "u":
        return column.to_numpy().astype(np.float64)
    texts = column.astype(object).where(column.map(lambda cell: type(cell) in (int, float, str)), None)
    values = pd.to_numeric(texts, errors="coerce").to_numpy()
    return values if values.dtype.kind == "i" else values.astype(np.float64)


def _dates_ns(column: pd.Series) -> np.ndarray | None:
    """int64 [n] nanoseconds since 1970, or None when a cell is no ISO 8601 date. Dates without a zone count as UTC."""
    if column.dtype.kind in "ifub":
        return None
    dates = _dates(column)
    return None if dates.isna().any() else dates.dt.as_unit("ns").astype(np.int64).to_numpy()


def _dates(column: pd.Series) -> pd.Series:
    """ISO 8601 dates, NaT where a cell is none or too far from 1970 for nanoseconds (before 1678, after 2261)."""
    dates = pd.to_datetime(column, format="ISO8601", utc=True, errors="coerce")
    return dates.where(dates.dt.year.between(1678, 2261))


def _bad_time(table: Table, column: str, values: np.ndarray) -> UserError:
    raw = table.frame[column]
    bad = ~np.isfinite(values)
    if raw.dtype.kind not in "ifub":
        dates = _dates(raw).isna().to_numpy()
        # In a column of dates the first that is none is at fault; in a column of numbers, the first that is none.
        bad = dates if dates.mean() < bad.mean() else bad
    return _bad_cell(table, int(np.flatnonzero(bad)[0]), column, "a number or an ISO 8601 date")


def _bad_cell(table: Table, row: int, column: str, wanted: str) -> UserError:
    cell = table.cell_of(row, column)
    shown = f"is {cell!r}" if cell else "is empty"
    return UserError(f"{table.where(row)}: {column} {shown}, which is not {wanted}")
