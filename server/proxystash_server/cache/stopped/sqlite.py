"""A SQLite store that nobody has open."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from proxystash_server.cache.config import CacheTierType
from proxystash_server.cache.entry.credentials import CredentialEncryptor, UnreadableCredentialsError
from proxystash_server.cache.entry.entry import CacheEntry
from proxystash_server.cache.entry.plain import CorruptRecordError
from proxystash_server.cache.errors import StoreError, StoreFormatError
from proxystash_server.cache.stopped.report import Progress, Report
from proxystash_server.cache.stopped.store import REPAIR, StoppedStore
from proxystash_server.cache.tiers.sqlite.database import SQLITE_ERRORS
from proxystash_server.cache.tiers.sqlite.format import (
    FORMAT_VERSION,
    META,
    RENAMED_NOTES,
    TABLE_INFO,
    as_in,
    check_header,
    format_of,
    is_marked,
)
from proxystash_server.cache.tiers.sqlite.log_damage import committed, lost_pages
from proxystash_server.cache.tiers.sqlite.record import COLUMNS, Row, read_row, scheme_of

# What stands in a row beside what `read_row` proves: the filter's column and the order of eviction.
CHECKED_COLUMNS = f"id, {COLUMNS}, scheme, recency"
_MOST_PAGE_FAULTS = 100
_SALVAGES = "--repair saves what can be read and sets the file aside"


class StoppedDatabase(StoppedStore):
    """One database file. If a crash left a log beside it, a temporary copy is read with the log applied."""

    def __init__(self, tier: CacheTierType, path: Path) -> None:
        super().__init__(tier, "sqlite", path)
        self._resources = ExitStack()
        self._connection: sqlite3.Connection | None = None
        self._place = str(path)

    def is_there(self) -> bool:
        return self.path.exists()

    def open(self, report: Report) -> bool:
        self.totals.exists = self.is_there()
        if not self.totals.exists:
            return False
        try:
            connection = self._connect(report)
            if not self._is_ours(connection, report):
                return False
            self._read_meta(connection, report)
            self._count_set_aside(connection, report)
        except SQLITE_ERRORS as error:
            remedy = "the next start, or --repair, saves what can be read of it and sets the file aside"
            report.fault("damaged_database", self._place, f"the file is damaged: {error}", remedy)
            self.close()
            return False
        return True

    def entries(
        self, encryptor: CredentialEncryptor, report: Report, progress: Progress
    ) -> Iterator[CacheEntry]:
        connection = self._opened
        progress(f"checking the pages of {self.tier}", 0, 0)
        sound = self._check_pages(connection, report)
        if sound:
            self._check_keys(connection, report)
        stored_count = self.notes.get("entries")
        total = stored_count if isinstance(stored_count, int) else 0
        counted = 0
        try:
            columns = self._as_here(CHECKED_COLUMNS)
            for number, *row in connection.execute(f"SELECT {columns} FROM entries ORDER BY id"):
                counted += 1
                progress(f"reading {self.tier}", counted, total)
                entry = self._read(number, tuple(row), encryptor, report)
                if entry is not None:
                    yield entry
        except SQLITE_ERRORS as error:
            if sound:
                report.fault("damaged_page", self._place, f"cannot be read to the end: {error}", _SALVAGES)
            sound = False
        self.totals.entries = counted
        if sound and counted != stored_count:
            message = f"says that it has {stored_count} entries, but has {counted}"
            report.fault("wrong_count", self._place, message, "--repair corrects the number")

    def lookup(
        self, keys: Sequence[str], encryptor: CredentialEncryptor
    ) -> dict[str, CacheEntry | Exception]:
        """The entries of those of `keys` that the store holds, or why one cannot be read."""
        marks = ", ".join("?" * len(keys))
        try:
            query = f"SELECT {self._as_here(COLUMNS)} FROM entries WHERE key IN ({marks})"
            return {row[0]: entry_or_fault(row, encryptor) for row in self._opened.execute(query, keys)}
        except SQLITE_ERRORS as error:
            return dict.fromkeys(keys, error)

    def close(self) -> None:
        self._connection = None
        self._resources.close()

    def _as_here(self, columns: str) -> str:
        return as_in(columns, self._opened.execute(TABLE_INFO))

    @property
    def _opened(self) -> sqlite3.Connection:
        assert self._connection is not None
        return self._connection

    def _connect(self, report: Report) -> sqlite3.Connection:
        source = self.path
        logs = [self.path.with_name(self.path.name + suffix) for suffix in ("-wal", "-journal")]
        logs = [log for log in logs if log.exists() and log.stat().st_size]
        if logs:
            # SQLite would apply the log to the file itself.
            directory = Path(self._resources.enter_context(tempfile.TemporaryDirectory(prefix="proxystash-")))
            source = directory / self.path.name
            try:
                for path in (self.path, *logs):
                    shutil.copyfile(path, directory / path.name)
            except OSError as error:
                raise StoreError(
                    f"{self.path} has a log to be applied, and there is no room for a copy in {directory}: "
                    f"{error.strerror}. Name a place with room in TMPDIR"
                ) from None
            lost = lost_pages(source, committed(self.path))
            if lost is not None:
                tell = report.fault if lost else report.note
                message = f"the log is damaged, which costs {lost} of the pages that were committed last"
                tell("damaged_log", self._place, message, "the next start sets it aside")
            if lost == 0:
                (directory / logs[0].name).unlink()
        uri = source.absolute().as_uri() + ("" if logs else "?mode=ro&immutable=1")
        connection = self._resources.enter_context(
            closing(sqlite3.connect(uri, uri=True, isolation_level=None))
        )
        # A damaged text must come out as something that differs from a sound one, not as an exception.
        connection.text_factory = decode_text
        self._connection = connection
        return connection

    def _is_ours(self, connection: sqlite3.Connection, report: Report) -> bool:
        check_header(self.path)
        try:
            version = format_of(self.path, connection)
        except StoreFormatError as error:
            report.fault("unknown_format", self._place, str(error), "move it away, or use a newer release")
            return False
        if not version:
            message = "the database is empty yet"
            report.note("unfinished_store", self._place, message, "the next start begins it")
            return False
        report.note_older_format(self._place, version, FORMAT_VERSION)
        if version == FORMAT_VERSION and not is_marked(connection):
            message = "the header does not say what the file is, as its tables do"
            report.fault("wrong_header", self._place, message, "the next start, or --repair, corrects it")
        return True

    def _read_meta(self, connection: sqlite3.Connection, report: Report) -> None:
        meta = {
            RENAMED_NOTES.get(name, name): value
            for name, value in connection.execute("SELECT name, value FROM meta")
        }
        for name, kind in META.items():
            # That the key check is missing is told with what else is said of the key.
            if not isinstance(meta.get(name), kind) and name != "key_check":
                message = f"{name} is not in table meta"
                report.fault("damaged_meta", self._place, message, "--repair makes it anew")
        self.notes, self.sealed_at = meta, meta.get("sealed_at")
        last_version, key_check = meta.get("last_version"), meta.get("key_check")
        self.last_version = last_version if isinstance(last_version, int) else 0
        self.key_check = key_check if isinstance(key_check, bytes) else None

    def _count_set_aside(self, connection: sqlite3.Connection, report: Report) -> None:
        self.totals.set_aside = connection.execute("SELECT count(*) FROM set_aside").fetchone()[0]
        if self.totals.set_aside:
            message = f"{self.totals.set_aside} damaged rows have been set aside"
            remedy = "empty the table set_aside when you have looked at it"
            report.note("set_aside", self._place, message, remedy)

    def _check_pages(self, connection: sqlite3.Connection, report: Report) -> bool:
        try:
            messages = [row[0] for row in connection.execute(f"PRAGMA integrity_check({_MOST_PAGE_FAULTS})")]
        except SQLITE_ERRORS as error:
            messages = [str(error)]
        if messages == ["ok"]:
            return True
        for message in messages:
            report.fault("damaged_page", self._place, message.replace("\n", " "), _SALVAGES)
        return False

    def _check_keys(self, connection: sqlite3.Connection, report: Report) -> None:
        repeated = connection.execute("SELECT key, count(*) FROM entries GROUP BY key HAVING count(*) > 1")
        for key, rows in repeated:
            remedy = "--repair keeps the one that was stored last"
            report.fault("repeated_key", self._place, f"{key!r} has {rows} rows", remedy)

    def _read(
        self, number: object, row: Row, encryptor: CredentialEncryptor, report: Report
    ) -> CacheEntry | None:
        *content, scheme, recency = row
        key, url, sealed = content[:3]
        place = f"{self._place} row {number}"
        self.totals.credentials += sealed is not None
        entry = entry_or_fault(tuple(content), encryptor)
        if isinstance(entry, UnreadableCredentialsError):
            report.unreadable_credential(place, key)
        elif not isinstance(entry, CacheEntry):
            report.fault("damaged_row", place, f"the row of {key!r}: {entry}", REPAIR)
        elif scheme != scheme_of(url) or not isinstance(recency, int):
            message = f"scheme or recency of {key!r} is not what it should be"
            report.fault("wrong_column", place, message, "--repair corrects it")
        return entry if isinstance(entry, CacheEntry) else None


def entry_or_fault(row: Row, encryptor: CredentialEncryptor) -> CacheEntry | Exception:
    """The entry of the values of COLUMNS, or what is wrong with them."""
    try:
        return read_row(row, encryptor)
    except (CorruptRecordError, UnreadableCredentialsError) as error:
        return error


def decode_text(text: bytes) -> str:
    """A text of the database; one that is damaged comes out as something that no sound one is equal to."""
    return text.decode("utf-8", "surrogateescape")
