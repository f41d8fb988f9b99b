"""Results as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

MISSING = "-"
_MOST_DECIMALS = 9


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Cells in columns, the first `left` of them flush left and the others flush right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(f"{cell:<{width}}" if i < left else f"{cell:>{width}}" for i, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in cells)
    ]
    return "\n".join(line.rstrip() for line in lines)


def number(value: float | None, digits: int = 2) -> str:
    """With `digits` decimals, and more where fewer than three significant digits would be left."""
    return MISSING if value is None else f"{value:,.{_decimals(value, digits, 3)}f}"


def percent(share: float | None) -> str:
    """Whole percents, and decimals where fewer than two significant digits would be left."""
    return MISSING if share is None else f"{share:.{_decimals(share * 100, 0, 2)}%}"


def _decimals(value: float, least: int, significant: int) -> int:
    if not value or not math.isfinite(value):
        return least
    return min(max(least, significant - 1 - math.floor(math.log10(abs(value)))), _MOST_DECIMALS)
