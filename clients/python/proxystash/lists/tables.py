"""CSV with a header row, in any of its dialects; and without one, as lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from typing import Final

from proxystash.lists.outcomes import FoundRecords, Line, ProxyFileError, Record, Rejected, Unreadable
from proxystash.lists.records import names_an_address
from proxystash.lists.rows import DAMAGED, Row, split_row
from proxystash.lists.sections import Section, is_comment
from proxystash.lists.text import is_proxy, read_lines
from proxystash.lists.words import field_of, flag_of

_SEPARATORS: Final = ",;\t|"
_ADDRESS = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}|[a-z0-9]://")
# How many lines and characters a row may have: an open quote must not swallow the file.
_MAX_LINES: Final = 20
_MAX_CHARACTERS: Final = 1 << 16
# How many rows are looked at to see whether a file without a header is a list at all.
_LOOKED_AT: Final = 100
# What makes the proxy: a damaged quote there costs the record, elsewhere the cell.
_ESSENTIAL: Final = frozenset(("proxy_url", "host", "port", "scheme", "username", "password", "key"))
# Cells in which blanks may be meant.
_VERBATIM: Final = frozenset(("username", "password", "key", "source"))


class Header:
    """The header row of a table: how its rows are split, and what their cells are."""

    def __init__(self, line: str, separator: str) -> None:
        self.line = line
        self.separator = separator
        cells = split_row(line, separator).cells
        # Where every separator of the header has a blank behind it, those of the rows have, too.
        self.spaced = len(cells) > 1 and all(cell.startswith(" ") for cell in cells[1:])
        self.names = [cell.strip().strip("\"'").strip() for cell in cells]
        self.fields = [(field_of(name) or ("", 0))[0] for name in self.names]
        self.flags = [flag_of(name) for name in self.names]

    @property
    def names_a_proxy(self) -> bool:
        """Whether its cells are names, and say enough of where a proxy is."""
        if any(
            not name[:1].isalpha() and name not in {"", "#", "№"} and name[:1] != "_" for name in self.names
        ):
            return False
        if any("://" in name for name in self.names):
            return False
        with_address = "proxy_url" in self.fields or "host" in self.fields
        return with_address or sum(flag is not None for flag in self.flags) > 1

    @property
    def known(self) -> int:
        """How many of the columns are known."""
        return sum(map(bool, self.fields)) + sum(flag is not None for flag in self.flags)

    def split(self, text: str) -> Row:
        """The cells of a row."""
        return split_row(text, self.separator, spaced=self.spaced)

    def record(self, where: str, text: str) -> Record | Rejected:
        """The record that a row is, or why it is none."""
        row = self.split(text)
        cells = row.cells
        while len(cells) > len(self.names) and not cells[-1].strip():
            cells = cells[:-1]
        if len(cells) > len(self.names) or (row.damaged and len(cells) != len(self.names)):
            if row.damaged:
                return Rejected(where, DAMAGED, "failed")
            reason = f"{len(cells)} fields, where the header row has {len(self.names)}"
            return Rejected(where, reason, "failed", "more fields than the header row has")
        record: dict[str, object] = {}
        for number, (name, field, cell) in enumerate(zip(self.names, self.fields, cells, strict=False)):
            if number in row.damaged:
                if field in _ESSENTIAL or self.flags[number] is not None:
                    return Rejected(where, DAMAGED, "failed")
                record.setdefault(name, Unreadable())
            else:
                record.setdefault(name, cell if field in _VERBATIM and not self.spaced else cell.strip())
        return record

    def begins_a_record(self, line: str) -> bool:
        """Whether a line looks like a row of its own, whatever its quotes, and even if it is damaged."""
        whole = len(self.names) > 1 and line.count(self.separator) == len(self.names) - 1
        return whole or _ADDRESS.search(line) is not None or self.holds_an_address(line)

    def holds_an_address(self, line: str) -> bool:
        """Whether the cells of a line name a proxy, whatever its quotes."""
        cells = line.split(self.separator)
        record = dict(zip(self.names, (cell.strip(' "') for cell in cells), strict=False))
        return names_an_address(record)


def read_table(lines: Iterator[Line], shape: str | None, *, name: str | None) -> FoundRecords:
    """The records of a CSV file: one for each row, wherever its quotes are open or closed.

    `name` is what messages call a file that is known to be CSV; then a file that has neither a header nor
    proxies is refused with ProxyFileError.
    """
    before: list[Line] = []
    section = Section()
    header: Header | None = None
    separators = _SEPARATORS
    for where, line in lines:
        before.append((where, line))
        if isinstance(line, Rejected):
            break
        text = line.strip()
        if text.lower().startswith("sep=") and len(text) == 5:
            separators = text[4]
        elif text.lower() == "sep=" and line.rstrip(" ").endswith("\t"):
            separators = "\t"
        elif text:
            header = find_header(line, separators)
            if header is not None or not section.read(text):
                break
    if header is None:
        everything: Iterator[Line] = chain(before, lines)
        if name is not None:
            everything = _checked(everything, shape, name)
        yield from read_lines(everything, shape)
        return
    yield from _read_rows(lines, header, section)


def find_header(line: str, separators: str = _SEPARATORS) -> Header | None:
    """The header that a line is, split where most of its columns are known."""
    headers = [header for separator in separators if (header := Header(line, separator)).names_a_proxy]
    return max(headers, key=lambda header: header.known, default=None)


def _read_rows(lines: Iterator[Line], header: Header, section: Section) -> FoundRecords:
    waiting: list[Line] = []
    while True:
        item = waiting.pop(0) if waiting else next(lines, None)
        if item is None:
            return
        where, line = item
        if isinstance(line, Rejected):
            yield where, line, None
            continue
        if not line.strip(f" \t{header.separator}") or line == header.line:
            continue
        if is_comment(line) and not header.holds_an_address(line):
            section.read(line.strip())
            continue
        if '"' in line and header.split(line).is_open:
            while len(waiting) < _MAX_LINES and (following := next(lines, None)) is not None:
                waiting.append(following)
            line = _joined(line, waiting, header)
        yield where, header.record(where, line), section.default


def _joined(line: str, following: list[Line], header: Header) -> str:
    """A row with the lines that its quoted cell goes on over, which are taken out of `following`.

    Only if that makes it a sound row, and none of those lines is a row of its own.
    """
    text = line
    for number, (_, more) in enumerate(following, 1):
        if isinstance(more, Rejected) or header.begins_a_record(more):
            break
        text += "\n" + more
        if len(text) > _MAX_CHARACTERS:
            break
        if '"' in more:
            row = header.split(text)
            if not row.damaged and len(row.cells) == len(header.names):
                del following[:number]
                return text
    return line


def _checked(lines: Iterator[Line], shape: str | None, name: str) -> Iterator[Line]:
    """The lines again, if any of the first of them names a proxy."""
    first: list[Line] = []
    for where, line in lines:
        first.append((where, line))
        if len(first) == _LOOKED_AT or (
            not isinstance(line, Rejected) and line.strip() and is_proxy(line, shape)
        ):
            break
    if not any(isinstance(line, Rejected) or (line.strip() and is_proxy(line, shape)) for _, line in first):
        raise ProxyFileError(
            f"{name} holds no proxies, and its header row names neither a URL nor a host: "
            "it wants columns such as proxy_url, or protocol, ip and port"
        )
    return chain(first, lines)
