"""A SQLite store that nobody has open."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from proxystash_server.cache.check_report import Progress, Report
from proxystash_server.cache.config import CacheTierType
from proxystash_server.cache.credentials import CredentialEncryptor, UnreadableCredentialsError
from proxystash_server.cache.entry import CacheEntry
from proxystash_server.cache.errors import StoreError
from proxystash_server.cache.tiers.record import CorruptRecordError
from proxystash_server.cache.tiers.sqlite_format import APPLICATION_ID, FORMAT_VERSION, SCHEMA
from proxystash_server.cache.tiers.sqlite_record import (
    COLUMNS,
    NOTHING_ANNOUNCED,
    Row,
    marks_from_text,
    read_row,
    scheme_of,
)
from proxystash_server.cache.tiers.stopped import REPAIR, RESTORE, StoppedStore

# What stands in a row beside what `read_row` proves: the filter's column and the order of eviction.
CHECKED_COLUMNS = f"id, {COLUMNS}, scheme, recency"
# What the table meta must have, and of which type.
META = {"store_id": str, "partner_id": str, "entries": int, "last_version": int, "key_check": bytes}
_MOST_PAGE_FAULTS = 100
_KEYS_PER_QUERY = 500


class StoppedDatabase(StoppedStore):
    """One database file. If a crash left a log beside it, a temporary copy is read with the log applied."""

    def __init__(self, tier: CacheTierType, path: Path) -> None:
        super().__init__(tier, "sqlite", path)
        self._resources = ExitStack()
        self._connection: sqlite3.Connection | None = None
        self._place = str(path)
        self._stored_count: object = None
        self._set_aside: set[str] = set()

    def is_there(self) -> bool:
        return self.path.exists()

    def open(self, report: Report) -> bool:
        self.totals.exists = self.is_there()
        if not self.totals.exists:
            return False
        try:
            connection = self._connect()
            if not self._is_ours(connection, report):
                return False
            self._check_schema(connection, report)
            self._read_meta(connection, report)
            self._read_backlog(connection, report)
            self._read_set_aside(connection, report)
        except sqlite3.DatabaseError as error:
            report.fault(
                "damaged_database",
                self._place,
                f"the file is damaged: {error}",
                "the next start, or --repair, saves what can be read of it and sets the file aside",
            )
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
        total = self._stored_count if isinstance(self._stored_count, int) else 0
        counted = 0
        try:
            for number, *row in connection.execute(f"SELECT {CHECKED_COLUMNS} FROM entries ORDER BY id"):
                counted += 1
                progress(f"reading {self.tier}", counted, total)
                entry = self._read(number, tuple(row), encryptor, report)
                if entry is not None:
                    yield entry
        except sqlite3.DatabaseError as error:
            if sound:
                report.fault("damaged_page", self._place, f"cannot be read to the end: {error}", _salvages())
            sound = False
        self.totals.entries = counted
        if sound and counted != self._stored_count:
            report.fault(
                "wrong_count",
                self._place,
                f"says that it has {self._stored_count} entries, but has {counted}",
                "--repair corrects the number",
            )

    def lookup(self, keys: Sequence[str], encryptor: CredentialEncryptor) -> dict[str, CacheEntry | None]:
        found: dict[str, CacheEntry | None] = {}
        for start in range(0, len(keys), _KEYS_PER_QUERY):
            some = keys[start : start + _KEYS_PER_QUERY]
            try:
                rows = self._rows_of(some)
            except sqlite3.DatabaseError:
                # A damaged page, told already; the others can be read one by one.
                rows = []
                for key in some:
                    try:
                        rows += self._rows_of([key])
                    except sqlite3.DatabaseError:
                        found[key] = None
            for row in rows:
                entry = entry_or_fault(row, encryptor)
                found[row[0]] = entry if isinstance(entry, CacheEntry) else None
        return found

    def _rows_of(self, keys: Sequence[str]) -> list[Row]:
        return self._opened.execute(
            f"SELECT {COLUMNS} FROM entries WHERE key IN ({', '.join('?' * len(keys))})", keys
        ).fetchall()

    def has_set_aside(self, key: str) -> bool:
        return repr(key) in self._set_aside

    def close(self) -> None:
        self._connection = None
        self._resources.close()

    @property
    def _opened(self) -> sqlite3.Connection:
        assert self._connection is not None
        return self._connection

    def _connect(self) -> sqlite3.Connection:
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
        uri = source.absolute().as_uri() + ("" if logs else "?mode=ro&immutable=1")
        connection = self._resources.enter_context(
            closing(sqlite3.connect(uri, uri=True, isolation_level=None))
        )
        # A damaged text must come out as something that differs from a sound one, not as an exception.
        connection.text_factory = decode_text
        self._connection = connection
        return connection

    def _is_ours(self, connection: sqlite3.Connection, report: Report) -> bool:
        application_id = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if not tables:
            report.note(
                "unfinished_store", self._place, "the database is empty yet", "the next start begins it"
            )
            return False
        if application_id != APPLICATION_ID:
            report.fault(
                "foreign_database",
                self._place,
                "a SQLite database, but not one of proxystash",
                "move it away",
            )
        elif version > FORMAT_VERSION:
            report.fault(
                "unknown_format",
                self._place,
                f"the format is {version}; this release reads up to {FORMAT_VERSION}",
                "use a newer release",
            )
        else:
            return True
        return False

    def _check_schema(self, connection: sqlite3.Connection, report: Report) -> None:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version < FORMAT_VERSION:
            report.note(
                "older_format",
                self._place,
                f"the format is {version}",
                f"the next start brings it to format {FORMAT_VERSION}",
            )
            return
        with closing(sqlite3.connect(":memory:")) as model:
            model.executescript(SCHEMA)
            expected = dict(model.execute("SELECT name, sql FROM sqlite_schema"))
        actual = dict(connection.execute("SELECT name, sql FROM sqlite_schema"))
        for name, sql in expected.items():
            if actual.get(name) == sql:
                continue
            if sql is not None and sql.startswith("CREATE INDEX"):
                report.fault(
                    "wrong_index", self._place, f"index {name} is missing", "--repair makes it again"
                )
            else:
                report.fault("wrong_schema", self._place, f"table {name} is not as it should be", RESTORE)

    def _read_meta(self, connection: sqlite3.Connection, report: Report) -> None:
        meta = dict(connection.execute("SELECT name, value FROM meta"))
        for name, kind in META.items():
            # That the key check is missing is told with what else is said of the key.
            if not isinstance(meta.get(name), kind) and name != "key_check":
                report.fault(
                    "damaged_meta", self._place, f"{name} is not in table meta", "--repair makes it anew"
                )
        self.store_id, self.partner_id = (str(meta.get(name, "")) for name in ("store_id", "partner_id"))
        self._stored_count = meta.get("entries")
        announced = marks_from_text(meta.get("announced", NOTHING_ANNOUNCED))
        if announced is None:
            report.fault(
                "damaged_mark",
                self._place,
                "what it announced to the other disk tier is damaged",
                "the next start, or --repair, compares the two",
            )
        self.backlog.update(announced or {})
        last_version, key_check = meta.get("last_version"), meta.get("key_check")
        self.last_version = last_version if isinstance(last_version, int) else 0
        self.key_check = key_check if isinstance(key_check, bytes) else None

    def _read_backlog(self, connection: sqlite3.Connection, report: Report) -> None:
        for key, version in connection.execute("SELECT key, version FROM backlog"):
            if isinstance(key, str) and isinstance(version, int):
                self.backlog[key] = max(version, self.backlog.get(key, 0))
            else:
                report.fault(
                    "damaged_mark", self._place, f"table backlog has {key!r}", "--repair takes it out"
                )
        self.totals.missed_by_other = len(self.backlog)

    def _read_set_aside(self, connection: sqlite3.Connection, report: Report) -> None:
        for (key,) in connection.execute("SELECT key FROM set_aside"):
            self.totals.set_aside += 1
            self._set_aside.add(key)
        if self.totals.set_aside:
            report.note(
                "set_aside",
                self._place,
                f"{self.totals.set_aside} damaged rows have been set aside",
                "empty the table set_aside when you have looked at it",
            )

    def _check_pages(self, connection: sqlite3.Connection, report: Report) -> bool:
        try:
            messages = [row[0] for row in connection.execute(f"PRAGMA integrity_check({_MOST_PAGE_FAULTS})")]
        except sqlite3.DatabaseError as error:
            messages = [str(error)]
        if messages == ["ok"]:
            return True
        for message in messages:
            report.fault("damaged_page", self._place, message.replace("\n", " "), _salvages())
        return False

    def _check_keys(self, connection: sqlite3.Connection, report: Report) -> None:
        repeated = connection.execute("SELECT key, count(*) FROM entries GROUP BY key HAVING count(*) > 1")
        for key, rows in repeated:
            report.fault(
                "repeated_key",
                self._place,
                f"{key!r} has {rows} rows",
                "--repair keeps the one that was stored last",
            )

    def _read(
        self, number: object, row: Row, encryptor: CredentialEncryptor, report: Report
    ) -> CacheEntry | None:
        *content, scheme, recency = row
        key, url, sealed = content[:3]
        place = f"{self._place} row {number}"
        self.totals.credentials += sealed is not None
        entry = entry_or_fault(tuple(content), encryptor)
        if isinstance(entry, UnreadableCredentialsError):
            report.fault(
                "unreadable_credential",
                place,
                f"the credential of {key!r} cannot be opened",
                f"give its key in PROXYSTASH_ENCRYPTION_KEY_PREVIOUS, or {REPAIR}",
            )
        elif not isinstance(entry, CacheEntry):
            report.fault("damaged_row", place, f"the row of {key!r}: {entry}", REPAIR)
        elif scheme != scheme_of(url) or not isinstance(recency, int):
            report.fault(
                "wrong_column",
                place,
                f"scheme or recency of {key!r} is not what it should be",
                "--repair corrects it",
            )
        return entry if isinstance(entry, CacheEntry) else None


def entry_or_fault(row: Row, encryptor: CredentialEncryptor) -> CacheEntry | Exception:
    """The entry of the values of COLUMNS, or what is wrong with them."""
    uses, last_accessed, evicted = row[12:15]
    if not isinstance(uses, int) or uses < 0 or not isinstance(last_accessed, int) or evicted not in {0, 1}:
        return CorruptRecordError("the access facts are damaged")
    try:
        return read_row(row, encryptor)
    except (CorruptRecordError, UnreadableCredentialsError) as error:
        return error
    except (ValueError, KeyError, TypeError, AttributeError):
        return CorruptRecordError("the row lacks what it should say")


def decode_text(text: bytes) -> str:
    """A text of the database; one that is damaged comes out as something that no sound one is equal to."""
    return text.decode("utf-8", "surrogateescape")


def _salvages() -> str:
    return "--repair saves what can be read and sets the file aside"
