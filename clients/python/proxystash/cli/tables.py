"""Tables of text for people: columns that fit the terminal, and that are quick for thousands of rows."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from rich.cells import cell_len, set_cell_size

# Widths are those of so many rows; what comes later is cut, or, where that must not be, sticks out.
_MEASURED_ROWS = 500
_GAP = "  "
_NARROWEST = 8


@dataclass(frozen=True, slots=True)
class Column:
    """A column, and what may happen to it where the terminal is narrow.

    The one with the greatest `rank` leaves first, those of rank 0 never; what is `cuttable` is made narrower
    before any leaves.
    """

    name: str
    rank: int = 0
    cuttable: bool = False
    right: bool = False


def terminal_width() -> int | None:
    """How many columns standard output has; None for a pipe or a file."""
    if not sys.stdout.isatty():
        return None
    try:
        return int(os.environ["COLUMNS"])
    except (KeyError, ValueError):
        return os.get_terminal_size(sys.stdout.fileno()).columns


def lines(
    rows: Iterable[Sequence[str]], columns: Sequence[Column], width: int | None = None
) -> Iterator[str]:
    """The header and then each row as a line of text; nothing if there is no row.

    Lines are at most `width` wide, unless columns that must stay whole are wider. Nothing is wrapped.
    """
    remaining = iter(rows)
    first = [*islice(remaining, _MEASURED_ROWS)]
    if not first:
        return
    widths = [
        max(len(column.name), *(_width(row[place]) for row in first)) for place, column in enumerate(columns)
    ]
    shown = _fit(columns, widths, width)
    yield _line([column.name for column in columns], columns, widths, shown)
    for row in first:
        yield _line(row, columns, widths, shown)
    for row in remaining:
        yield _line(row, columns, widths, shown)


def _fit(columns: Sequence[Column], widths: list[int], width: int | None) -> list[int]:
    """The places of the columns that are shown, `widths` changed to those they have."""
    shown = [*range(len(columns))]
    while width is not None:
        over = sum(widths[place] for place in shown) + len(_GAP) * (len(shown) - 1) - width
        if over <= 0:
            break
        cuttable = [place for place in shown if columns[place].cuttable and widths[place] > _NARROWEST]
        if sum(widths[place] - _NARROWEST for place in cuttable) >= over:
            widest = max(cuttable, key=lambda place: widths[place])
            widths[widest] -= 1
            continue
        leaving = max(shown, key=lambda place: columns[place].rank)
        if not columns[leaving].rank:
            break
        shown.remove(leaving)
    return shown


def _line(
    cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int], shown: Sequence[int]
) -> str:
    parts = []
    for place in shown:
        cell, column, width = cells[place], columns[place], widths[place]
        taken = _width(cell)
        if taken > width and column.cuttable:
            cell = set_cell_size(cell, width - 1) + "…"
        elif taken < width:
            padding = " " * (width - taken)
            cell = padding + cell if column.right else cell + padding
        parts.append(cell)
    return _GAP.join(parts).rstrip()


def _width(text: str) -> int:
    return len(text) if text.isascii() else cell_len(text)
