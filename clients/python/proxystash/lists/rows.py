"""One row of a CSV file: its cells, also where its quotes are damaged."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field

DAMAGED = "a quote is not closed, or closed inside a field"


@dataclass(frozen=True, slots=True)
class Row:
    """The cells of a row; the numbers of those whose quotes are damaged; whether its last quote is open."""

    cells: list[str]
    damaged: frozenset[int] = field(default_factory=frozenset)
    is_open: bool = False


def split_row(text: str, separator: str, *, spaced: bool = False) -> Row:
    """Split a row, which may have several lines in a quoted cell; `spaced` if a blank follows each separator.

    The csv module is trusted where it finds nothing wrong. A row with damaged quotes is split at every
    separator that stands outside sound quotes.
    """
    if '"' not in text:
        return Row(text.split(separator))
    try:
        [cells] = csv.reader([text], delimiter=separator, skipinitialspace=spaced, strict=True)
    except (csv.Error, ValueError):
        return _split_damaged(text, separator)
    return Row(cells)


def _split_damaged(text: str, separator: str) -> Row:
    cells: list[str] = []
    damaged: set[int] = set()
    position, is_open = 0, False
    while True:
        if text.startswith('"', position):
            end = _closing(text, position + 1)
            if end is not None and (end + 1 == len(text) or text[end + 1] == separator):
                cells.append(text[position + 1 : end].replace('""', '"'))
                position = end + 1
            else:
                is_open = is_open or end is None
                damaged.add(len(cells))
                position = _take_plain(text, position, separator, cells)
        else:
            position = _take_plain(text, position, separator, cells)
        if position >= len(text):
            return Row(cells, frozenset(damaged), is_open)
        position += 1
        if position == len(text):
            cells.append("")
            return Row(cells, frozenset(damaged), is_open)


def _closing(text: str, start: int) -> int | None:
    """Where the quote that was opened before `start` is closed."""
    while True:
        end = text.find('"', start)
        if end == -1:
            return None
        if not text.startswith('"', end + 1):
            return end
        start = end + 2


def _take_plain(text: str, position: int, separator: str, cells: list[str]) -> int:
    end = text.find(separator, position)
    end = len(text) if end == -1 else end
    cells.append(text[position:end])
    return end
