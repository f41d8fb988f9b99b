"""Plain text for people: aligned columns, wrapped sentences, and files that are written whole or not at all.

What is printed has the same width on a terminal and in a pipe; nothing is cut off and no column is dropped.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from planner.errors import UserError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from planner.basis import StepTimes
    from planner.commands.options import OutputOptions
    from planner.intervals import Confidence, Interval, Probability

MAX_WIDTH = 110
_BARS = "▁▂▃▄▅▆▇█"
_LITTLE, _MUCH = 1e-3, 1e-2


def deliver(record: BaseModel, table: str, options: OutputOptions) -> None:
    """Print an answer as asked, and write its JSON to the file if there is one.

    Raises:
        UserError: the file cannot be written; it is then as it was before.
    """
    document = record.model_dump_json(indent=2)
    show(document if options.output == "json" else table)
    if options.output_file is not None:
        write_whole(options.output_file, document + "\n")


def show(text: str) -> None:
    """Print on stdout. That a reader such as `head` has seen enough changes nothing about the answer."""
    try:
        typer.echo(text)
    except BrokenPipeError:
        discard_stdout()


def discard_stdout() -> None:
    """Let what is still to be printed, or flushed at exit, go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_whole(path: Path, text: str) -> None:
    """Write a file so that nobody ever sees half of it.

    The text goes to a temporary file of the same folder, which then takes the name. A link is followed; what is no
    regular file (a pipe, /dev/null) is written to directly.

    Raises:
        UserError: it cannot be written; the old content, if any, is untouched.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
        else:
            _replace(path.resolve(), text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def _replace(path: Path, text: str) -> None:
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def width() -> int:
    """Columns for running text: the terminal's, from 60 to MAX_WIDTH; 100 in a pipe."""
    return max(60, min(shutil.get_terminal_size((100, 24)).columns, MAX_WIDTH))


def columns(header: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1, indent: int = 2) -> str:
    """A table of aligned columns.

    Args:
        header: titles; those of all columns empty for none.
        rows: cells, converted with str.
        left: how many columns, from the first, are aligned to the left; the others are to the right.
        indent: spaces before each line.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    titled = [list(header), *cells] if any(header) else cells
    widths = [max(len(row[i]) for row in titled) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [
            f"{cell:<{w}}" if i < left else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return (" " * indent + "  ".join(padded)).rstrip()

    lines = [line(row) for row in cells]
    if any(header):
        lines = [typer.style(line(header), bold=True), *lines]
    return "\n".join(lines)


def pairs(rows: Iterable[tuple[str, str]], indent: int = 2) -> str:
    """Names and what they are, in two columns, the second wrapped."""
    rows = list(rows)
    gap = max(len(name) for name, _ in rows) + 2
    return "\n".join(
        textwrap.fill(
            text or "-",
            width(),
            initial_indent=" " * indent + f"{name:<{gap}}",
            subsequent_indent=" " * (indent + gap),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, text in rows
    )


def paragraph(text: str, label: str = "") -> str:
    """A wrapped sentence, hanging under its label."""
    return textwrap.fill(
        text,
        width(),
        initial_indent=label,
        subsequent_indent=" " * len(label),
        break_long_words=False,
        break_on_hyphens=False,
    )


def warnings(sentences: Sequence[str]) -> list[str]:
    """Each as a paragraph of its own; nothing for none."""
    return [paragraph(sentence, "warning: ") for sentence in sentences]


def verdict(good: bool, text: str) -> str:
    """Green or red on a terminal."""
    return typer.style(text, fg="green" if good else "red", bold=True)


def page(*sections: str | Sequence[str]) -> str:
    """Sections with a blank line between them; empty ones are left out."""
    texts = [section if isinstance(section, str) else "\n".join(section) for section in sections]
    return "\n\n".join(text for text in texts if text)


def sparkline(values: Sequence[float], top: float, points: int = 60) -> str:
    """One character per stretch of time, the largest value of each, against `top`."""
    stride = -(-len(values) // points)
    peaks = [max(values[i : i + stride]) for i in range(0, len(values), stride)]
    if top <= 0:
        return _BARS[0] * len(peaks)
    return "".join(_BARS[min(len(_BARS) - 1, int(value / top * len(_BARS)))] for value in peaks)


def gib(num_bytes: float) -> str:
    return f"{num_bytes / (1 << 30):.2f}"


def kib(num_bytes: float) -> str:
    return f"{num_bytes / (1 << 10):,.1f}"


def milliseconds(value: float) -> str:
    """Three digits or more: 0.832, 12.4, 1,532."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def percent(share: float) -> str:
    return f"{share:.1%}"


def count(number: int, noun: str) -> str:
    """`1 replica`, `2 replicas`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def evidence(shares: Mapping[str, float]) -> str:
    """What step times rest on: in one word, or of which share of their time each is true."""
    if len(shares) == 1:
        return str(*shares)
    return ", ".join(f"{_share(share)} {what}" for what, share in shares.items())


def _share(share: float) -> str:
    """As a percentage that is neither 0 nor 100 unless the share is."""
    if 0 < share < _LITTLE:
        return f"under {percent(_LITTLE)}"
    return f"over {percent(1 - _LITTLE)}" if 1 - _LITTLE < share < 1 else percent(share)


def step_times(found: StepTimes) -> str:
    """Where step times come from and how far they may be off, in a sentence."""
    text = f"{found.basis}: {found.description.removeprefix(f'{found.basis} ')}"
    if max(found.shares.values()) <= 1 - _LITTLE:
        text += f" ({evidence(found.shares)})"
    if found.decode_uncertainty is None or found.prefill_uncertainty is None:
        return text
    text += f"; standard deviation {found.decode_uncertainty:.1%} of decodes, "
    text += f"{found.prefill_uncertainty:.1%} of steps with prompts"
    return f"{text}, {found.host_uncertainty:.0%} of what the CPU takes" if found.host_uncertainty else text


def between(interval: Interval, shown: Callable[[float], str]) -> str:
    """`181 to 195`."""
    return f"{shown(interval.low)} to {shown(interval.high)}"


def unknown(sure: Confidence) -> list[str]:
    """A warning where a good part of the steps is beyond what the intervals know; else nothing."""
    if sure.unknown_share < _MUCH:
        return []
    what = f"{percent(sure.unknown_share)} of the steps' time is extrapolated"
    return warnings([f"{what}, and the intervals do not know how far that is off: they are too narrow"])


def chance(found: Probability) -> str:
    """`100 % (16 of 16 draws; 90 %: 83 to 100 %)`."""
    return (
        f"{100 * found.probability:.0f} % ({found.met} of {found.of} draws; 90 % interval "
        f"{100 * found.low:.0f} to {100 * found.high:.0f} %)"
    )
