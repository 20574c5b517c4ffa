"""Saving what is readable of a damaged database."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

from proxystash_server.cache.entry.entry import wall_clock
from proxystash_server.cache.entry.plain import CorruptRecordError
from proxystash_server.cache.errors import StoreFormatError
from proxystash_server.cache.tiers.sqlite.files import cannot_open, companions
from proxystash_server.cache.tiers.sqlite.format import (
    INHERITED,
    PAGE_BYTES,
    RENAMED_NOTES,
    SCHEMA,
    TABLE_INFO,
    as_in,
    check_header,
    format_of,
    mark,
)
from proxystash_server.cache.tiers.sqlite.record import COLUMNS, check_row, scheme_of

Row = tuple[Any, ...]

_SAVED = f"{COLUMNS}, scheme, recency"
_STORE = f"INSERT INTO entries ({_SAVED}) VALUES ({', '.join('?' * len(_SAVED.split(',')))})"
_SET_ASIDE = "INSERT INTO set_aside (set_aside_at, reason, key, record) VALUES (?, ?, ?, ?)"
_URL, _VERSION = map(COLUMNS.split(", ").index, ("proxy_url", "version"))
# What is carried over beside the entries. The count is made anew.
_META = ("id", "cache_id", "partner", "alone", "key_check", "inherited")


class Salvaged(NamedTuple):
    """What became of a damaged database: how many entries were saved, and which keys were not, and why."""

    entries: int
    damaged: dict[object, str]


def salvage(damaged: Path, connection: sqlite3.Connection) -> Salvaged:
    """Copy every sound row of the database file `damaged` into an empty one; the others are set aside there.

    Reads the table from both ends, through its index and page by page, so that a damaged page costs the rows
    on it. Where
    the first page is damaged, which says where everything is, it is read with that of a new database too.
    Raises sqlite3.Error if the file cannot be opened now, which says nothing of what could be saved.
    """
    # By key the version that was saved of it.
    saved: dict[str, int] = {}
    # Each row once, however often it is met: why it is not sound, and what is set aside.
    damage: dict[Row, str] = {}
    set_aside: dict[Row, None] = {}
    with ExitStack() as opened:
        connection.execute("BEGIN")
        for source in _sources(damaged, opened):
            for row in _entries(damaged, source):
                try:
                    check_row(row)
                except CorruptRecordError as error:
                    damage[row] = str(error)
                    continue
                if row[_VERSION] > saved.get(row[0], -1):
                    connection.execute("DELETE FROM entries WHERE key = ?", row[:1])
                    connection.execute(_STORE, _corrected(row))
                    saved[row[0]] = row[_VERSION]
            set_aside.update(
                dict.fromkeys(_rows(source, "SELECT set_aside_at, reason, key, record FROM set_aside"))
            )
            # There is such a table only in a file of an earlier format.
            notes = [("inherited", value) for (value,) in _rows(source, INHERITED)]
            notes += _rows(source, "SELECT name, value FROM meta")
            for name, value in notes:
                note = RENAMED_NOTES.get(name, name)
                if note in _META:
                    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (note, _storable(value)))
        lost = {row: reason for row, reason in damage.items() if row[0] not in saved}
        for row, reason in lost.items():
            record = json.dumps(dict(zip(_SAVED.split(", "), row, strict=True)), default=repr)
            set_aside[wall_clock(), reason, repr(row[0]), record] = None
        connection.executemany(_SET_ASIDE, [tuple(map(_storable, row)) for row in set_aside])
        connection.executemany(
            "UPDATE meta SET value = ? WHERE name = ?",
            [(len(saved), "entries"), (max(saved.values(), default=0), "last_version")],
        )
        connection.execute("COMMIT")
    return Salvaged(len(saved), {row[0]: reason for row, reason in lost.items()})


def _corrected(row: Row) -> Row:
    """A sound row, with what no checksum covers made anew if it is not as it should be."""
    *kept, _, recency = row
    return *kept, scheme_of(row[_URL]), recency if isinstance(recency, int) else 0


def _storable(value: object) -> object:
    """A value that was read as it can be written: a damaged text need not be one."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _sources(damaged: Path, opened: ExitStack) -> Iterator[sqlite3.Connection]:
    first = _connect(damaged, opened)
    if first is not None:
        yield first
    if first is None or not _says_where_all_is(damaged, first):
        copy = damaged.with_name(damaged.name + ".salvaging")
        opened.callback(_remove, copy)
        if _copy_with_new_first_page(damaged, copy):
            second = _connect(copy, opened)
            if second is not None:
                yield second


def _connect(path: Path, opened: ExitStack) -> sqlite3.Connection | None:
    try:
        source = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    except sqlite3.Error as error:
        if cannot_open(error):
            raise
        return None
    source.text_factory = _decode
    opened.callback(source.close)
    return source


def _decode(text: bytes) -> str:
    # As for reading in general: text that is none must not end the whole scan.
    return text.decode("utf-8", "surrogateescape")


def _says_where_all_is(path: Path, source: sqlite3.Connection) -> bool:
    try:
        check_header(path)
        return format_of(path, source) > 0
    except (sqlite3.Error, UnicodeError, StoreFormatError):
        return False


def _copy_with_new_first_page(damaged: Path, copy: Path) -> bool:
    """Copy a database, with the first page that it had when it was new; whether there is anything to copy."""
    if not damaged.stat().st_size:
        return False
    logs = (companions(damaged)[0], companions(copy)[0])
    for source, target in ((damaged, copy), logs):
        target.unlink(missing_ok=True)
        if source.exists():
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            shutil.copyfile(source, target)
    with closing(sqlite3.connect(":memory:")) as new, copy.open("r+b") as file:
        new.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        new.executescript(SCHEMA)
        mark(new)
        page = bytearray(new.serialize()[:PAGE_BYTES])
        pages = copy.stat().st_size // PAGE_BYTES
        page[18:20] = bytes((2, 2) if logs[0].exists() else (1, 1))
        page[28:32] = pages.to_bytes(4, "big")
        file.write(page)
    return True


def _remove(copy: Path) -> None:
    for path in (copy, *companions(copy)):
        path.unlink(missing_ok=True)


def _entries(damaged: Path, source: sqlite3.Connection) -> Iterator[Row]:
    columns = as_in(_SAVED, _rows(source, TABLE_INFO))
    seen: set[object] = set()
    for order in ("ASC", "DESC"):
        for row in _rows(source, f"SELECT id, {columns} FROM entries NOT INDEXED ORDER BY id {order}"):
            seen.add(row[0])
            yield row[1:]
    # All at first: a query that fails has others on the same connection begin again, and never end.
    in_index: dict[object, object] = dict(_rows(source, "SELECT id, key FROM entries ORDER BY key"))
    missing = {number: key for number, key in in_index.items() if number not in seen}
    for number in list(missing):
        for row in _rows(source, f"SELECT {columns} FROM entries WHERE id = ?", (number,)):
            del missing[number]
            yield row
    if missing:
        yield from _entries_of_pages(damaged, missing)


def _entries_of_pages(damaged: Path, wanted: Mapping[object, object]) -> Iterator[Row]:
    """The rows of these ids and keys, page after page: the pages that led to them are damaged.

    Each page is read as if it were the whole table. A page that is free may have rows that were deleted, so
    nothing is taken that the index does not know.
    """
    copy = damaged.with_name(damaged.name + ".pages")
    with ExitStack() as opened:
        opened.callback(_remove, copy)
        if not _copy_with_new_first_page(damaged, copy):
            return
        connection = opened.enter_context(closing(sqlite3.connect(copy, isolation_level=None)))
        connection.text_factory = _decode
        connection.execute("PRAGMA synchronous = OFF")
        for page in range(2, copy.stat().st_size // PAGE_BYTES + 1):
            connection.execute("PRAGMA writable_schema = ON")
            connection.execute("UPDATE sqlite_schema SET rootpage = ? WHERE name = 'entries'", (page,))
            connection.execute("PRAGMA writable_schema = RESET")
            for number, *row in _rows(connection, f"SELECT id, {_SAVED} FROM entries NOT INDEXED"):
                if number in wanted and wanted[number] == row[0]:
                    yield tuple(row)


def _rows(source: sqlite3.Connection, query: str, values: Sequence[object] = ()) -> Iterator[Row]:
    """The rows of a query up to the first one that cannot be read."""
    try:
        yield from source.execute(query, values)
    except (sqlite3.Error, UnicodeError) as error:
        if cannot_open(error):
            raise
        return
