"""The files that proxywhirl keeps its entries in: finding them, and reading them record by record.

None of them is ever opened for writing, and SQLite never sees one: it would make files beside it, or take its
write-ahead log away. It gets a copy, together with the log, which may be all that holds the latest entries.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from proxystash_server.proxywhirl_import.record import ENTRY_FIELDS, MONITORING_FIELDS, RejectedRecordError

L2_DATABASE: Final = "l2_cache.db"
L3_DATABASE: Final = "proxywhirl.db"

_TABLES: Final = ("l2_cache", "cache_entries")
_SHARD: Final = re.compile(r"shard_\d{2,}\.jsonl")
_MAGIC: Final = b"SQLite format 3\0"
# What committed and what must be undone, where the last program to write did not get to tidy up.
_COMPANIONS: Final = ("-wal", "-journal")

Record = Mapping[str, object]
# Where a record stands in its file, and the record or what is wrong with it.
Located = tuple[str, Record | RejectedRecordError]


class SourceError(Exception):
    """A source that is no store of proxywhirl's, or none that may be read."""


class UnreadableStoreError(Exception):
    """A store that cannot be read, or not to its end."""


class NotAStoreError(UnreadableStoreError):
    """A database with none of proxywhirl's tables in it."""


@dataclass(frozen=True, slots=True)
class StoreFile:
    """A file with entries of proxywhirl's; a database that is not `expected` may turn out to be none."""

    path: Path
    format: Literal["jsonl", "sqlite"]
    expected: bool = True

    def records(self) -> Iterator[Located]:
        """Every record; raises UnreadableStoreError where no more can be read."""
        return _read_shard(self.path) if self.format == "jsonl" else _read_database(self.path)


def find_stores(sources: Sequence[Path]) -> list[StoreFile]:
    """The stores that `sources` name: a shard, a database, or a directory with some of them below it.

    Raises SourceError for a source that does not exist or has none.
    """
    found: dict[Path, StoreFile] = {}
    for source in sources:
        try:
            stores = list(_search(source)) if source.is_dir() else [_recognize(source)]
        except OSError as error:
            raise SourceError(f"{error.filename or source} cannot be read: {error.strerror}") from None
        if not stores:
            raise SourceError(f"{source} holds no store of proxywhirl's: no shard_*.jsonl and no database")
        for store in stores:
            found.setdefault(store.path.resolve(), store)
    return list(found.values())


def _recognize(path: Path) -> StoreFile:
    with path.open("rb"):
        return StoreFile(path, "jsonl" if path.suffix == ".jsonl" else "sqlite")


def _search(directory: Path) -> Iterator[StoreFile]:
    def fail(error: OSError) -> None:
        raise error

    for parent, directories, names in os.walk(directory, onerror=fail):
        directories.sort()
        for name in sorted(names):
            path = Path(parent, name)
            if _SHARD.fullmatch(name):
                yield StoreFile(path, "jsonl")
            elif name in {L2_DATABASE, L3_DATABASE}:
                yield StoreFile(path, "sqlite")
            elif path.is_file() and _is_database(path):
                # The L3 database may have any name, and other programs have databases, too.
                yield StoreFile(path, "sqlite", expected=False)


def _is_database(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except PermissionError:
        return False


def _read_shard(path: Path) -> Iterator[Located]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if content := line.strip():
                    yield f"line {number}", _parse_line(content)
    except OSError as error:
        raise UnreadableStoreError(f"it cannot be read: {error.strerror}") from None


def _parse_line(line: bytes) -> Record | RejectedRecordError:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return RejectedRecordError("the line is damaged", "failed")
    return record if isinstance(record, dict) else RejectedRecordError("the line is damaged", "failed")


def _read_database(path: Path) -> Iterator[Located]:
    try:
        with _copy(path) as connection:
            tables = [table for table in _TABLES if _columns(connection, table)]
            if not tables:
                raise NotAStoreError(f"it has no table {' or '.join(_TABLES)}")
            for table in tables:
                yield from _read_table(connection, table)
    except sqlite3.DatabaseError:
        raise UnreadableStoreError("it is no database, or a damaged one") from None
    except OSError as error:
        raise UnreadableStoreError(f"it cannot be read: {error.strerror}") from None


@contextmanager
def _copy(path: Path) -> Iterator[sqlite3.Connection]:
    """A private copy of a database, for as long as the context lasts."""
    # SQLite names companions after the file itself, not after a link to it.
    path = path.resolve()
    with tempfile.TemporaryDirectory(prefix="proxystash-import-") as directory:
        copy = Path(directory) / "copy.db"
        before = _state(path)
        for companion in ("", *_COMPANIONS):
            try:
                shutil.copyfile(f"{path}{companion}", f"{copy}{companion}")
            except FileNotFoundError:
                if not companion:
                    raise
        if _state(path) != before:
            raise UnreadableStoreError("it changed while it was copied: stop what uses proxywhirl first")
        connection = sqlite3.connect(copy)
        try:
            # A byte that is no UTF-8 costs its own row alone.
            connection.text_factory = lambda raw: raw.decode(errors="surrogateescape")
            yield connection
        finally:
            connection.close()


def _state(path: Path) -> list[tuple[int, int, int] | None]:
    state: list[tuple[int, int, int] | None] = []
    for companion in ("", *_COMPANIONS):
        try:
            facts = Path(f"{path}{companion}").stat()
            state.append((facts.st_ino, facts.st_size, facts.st_mtime_ns))
        except FileNotFoundError:
            state.append(None)
    return state


def _columns(connection: sqlite3.Connection, table: str) -> list[str]:
    """The columns of a table that are of interest; older versions of proxywhirl had fewer."""
    names = {name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")}
    return [name for name in (*ENTRY_FIELDS, *MONITORING_FIELDS) if name in names]


def _read_table(connection: sqlite3.Connection, table: str) -> Iterator[Located]:
    columns = _columns(connection, table)
    query = f"SELECT rowid, {', '.join(columns)} FROM {table}"  # noqa: S608 -- names are constants
    last = None
    try:
        for row, *values in connection.execute(f"{query} ORDER BY rowid"):
            last = row
            yield f"{table} row {row}", dict(zip(columns, values, strict=True))
    except sqlite3.DatabaseError:
        pass
    else:
        return
    # Some page of the table is damaged. The index of its keys is elsewhere, and tells which rows there were.
    rows, complete = _rows_in_index(connection, table)
    for row in sorted(rows):
        if last is None or row > last:
            yield f"{table} row {row}", _read_row(connection, f"{query} WHERE rowid = ?", row, columns)
    if not complete:
        raise UnreadableStoreError(f"table {table} and its index are damaged, and rows of it may be missing")


def _rows_in_index(connection: sqlite3.Connection, table: str) -> tuple[list[int], bool]:
    """The numbers of a table's rows, and whether these are all."""
    rows: list[int] = []
    # Only in this order is it sure to be read from the index.
    query = f"SELECT rowid FROM {table} INDEXED BY sqlite_autoindex_{table}_1 ORDER BY key"  # noqa: S608 -- as above
    try:
        rows.extend(row for (row,) in connection.execute(query))
    except sqlite3.DatabaseError:
        return rows, False
    return rows, True


def _read_row(
    connection: sqlite3.Connection, query: str, row: int, columns: list[str]
) -> Record | RejectedRecordError:
    try:
        found = connection.execute(query, (row,)).fetchone()
    except sqlite3.DatabaseError:
        found = None
    if found is None:
        return RejectedRecordError("the row is damaged", "failed")
    return dict(zip(columns, found[1:], strict=True))
