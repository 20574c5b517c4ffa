"""A SQLite file with one writer and many readers, opened.

Versioned and set aside when it is beyond reading.
"""

from __future__ import annotations

import os
import sqlite3
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from proxystash_server.cache.config import Durability
from proxystash_server.cache.errors import StoreFormatError, TierError
from proxystash_server.cache.group_commit import GroupCommit

Result = TypeVar("Result")

# "pstH": marks the file as ours, so that `file` and this code can tell.
APPLICATION_ID = 0x70737448
FORMAT_VERSION = 1
# How long a writer waits for another process before the tier counts as failing.
_BUSY_TIMEOUT_SECONDS = 1.0

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE entries (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    proxy_url TEXT NOT NULL,
    scheme TEXT NOT NULL,
    sealed TEXT,
    source TEXT NOT NULL,
    fetch_time INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    health_status TEXT NOT NULL,
    failure_count INTEGER NOT NULL,
    health_monitoring TEXT,
    labels TEXT,
    version INTEGER NOT NULL,
    checksum INTEGER NOT NULL,
    access_count INTEGER NOT NULL,
    last_accessed INTEGER NOT NULL,
    evicted_from_l1 INTEGER NOT NULL,
    recency INTEGER NOT NULL
);
CREATE INDEX entries_by_expiry ON entries (expires_at);
CREATE TABLE backlog (key TEXT PRIMARY KEY, version INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE set_aside (id INTEGER PRIMARY KEY, set_aside_at INTEGER, reason TEXT, key TEXT, record TEXT);
"""


@contextmanager
def translated() -> Iterator[None]:
    """Raise the faults of SQLite and of the file system as TierError."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise TierError(f"{type(error).__name__}: {error}") from error


class Database:
    """The connections to one SQLite file in WAL mode.

    Reads borrow a connection from a pool, so that no reader waits for another or for the writer. Writes are
    functions of the one writing connection; `write` folds those that wait at the same time into one
    transaction. With `durability = process` a commit is in the kernel's hands when it returns; with `full` it
    is synced. `before_commit` adds to every transaction; `after_commit` learns whether it was committed,
    before the next begins.
    """

    def __init__(
        self,
        path: Path,
        durability: Durability,
        *,
        before_commit: Callable[[sqlite3.Connection], None],
        after_commit: Callable[[bool], None],
    ) -> None:
        self.path = path
        self._before_commit = before_commit
        self._after_commit = after_commit
        self.created = False
        self._durability = durability
        self._writer: sqlite3.Connection | None = None
        self._readers: deque[sqlite3.Connection] = deque()
        self._generation = 0
        self._commits: GroupCommit[Callable[[sqlite3.Connection], Any], Any] = GroupCommit(self._commit)

    def open(self) -> bool:
        """Connect, creating the file or its directory if need be; whether a damaged file had to be set aside.

        Raises TierError if it cannot be done now, StoreFormatError if the file is not ours or too new.
        """
        self.close()
        with translated():
            self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connect()
        except sqlite3.DatabaseError as error:
            self.close()
            if error.sqlite_errorcode not in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                raise TierError(f"{type(error).__name__}: {error}") from error
            with translated():
                self._set_file_aside()
                self._connect()
            return True
        return False

    def close(self) -> None:
        """Close every connection; idempotent. Borrowed readers are closed when they come back."""
        with self._commits.lock:
            self._generation += 1
            if self._writer is not None:
                self._writer.close()
                self._writer = None
        while self._readers:
            self._readers.popleft().close()

    def write(self, change: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run `change` inside a transaction and return its result once that is committed.

        Raises TierError.
        """
        result: Result = self._commits.submit(change)[0]
        return result

    @property
    def busy(self) -> bool:
        """Whether a transaction is under way."""
        return self._commits.lock.locked()

    @contextmanager
    def reader(self) -> Iterator[sqlite3.Connection]:
        """A connection for reading, which sees everything committed before; raises TierError."""
        with translated():
            generation = self._generation
            try:
                connection = self._readers.pop()
            except IndexError:
                connection = self._new_connection()
            try:
                yield connection
            except sqlite3.Error:
                connection.close()
                raise
            if generation == self._generation:
                self._readers.append(connection)
            else:
                connection.close()

    def read_meta_offline(self, name: str) -> object:
        """One value of the meta table of a file that is not open, changing nothing; None if there is none."""
        if not self.path.exists():
            return None
        with translated():
            connection = sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True)
            try:
                row = connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
            finally:
                connection.close()
        return row[0] if row else None

    def _connect(self) -> None:
        if not self.path.exists():
            # SQLite would create it readable for everyone.
            os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600))
        writer = self._new_connection()
        try:
            application_id = writer.execute("PRAGMA application_id").fetchone()[0]
            version = writer.execute("PRAGMA user_version").fetchone()[0]
            tables = writer.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
            if tables and application_id != APPLICATION_ID:
                raise StoreFormatError(
                    f"{self.path} is a SQLite database, but not one of proxystash; move it away"
                )
            if version > FORMAT_VERSION:
                raise StoreFormatError(
                    f"{self.path} has format {version}; this release reads up to {FORMAT_VERSION}. "
                    "Use a newer release"
                )
            writer.execute("PRAGMA journal_mode = WAL")
            self.created = not tables
            if self.created:
                writer.executescript(
                    f"BEGIN; {_SCHEMA}"
                    f"INSERT INTO meta VALUES ('store_id', '{uuid.uuid4().hex}');"
                    "INSERT INTO meta VALUES ('partner_id', ''), ('entries', 0);"
                    f"PRAGMA application_id = {APPLICATION_ID};"
                    f"PRAGMA user_version = {FORMAT_VERSION}; COMMIT;"
                )
        except BaseException:
            writer.close()
            raise
        self._writer = writer

    def _new_connection(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path,
            timeout=_BUSY_TIMEOUT_SECONDS,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=64,
        )
        connection.execute(
            f"PRAGMA synchronous = {'FULL' if self._durability is Durability.FULL else 'NORMAL'}"
        )
        return connection

    def _commit(self, changes: Sequence[Callable[[sqlite3.Connection], Any]]) -> list[Any]:
        writer = self._writer
        if writer is None:
            raise TierError("the database is closed")
        with translated():
            writer.execute("BEGIN IMMEDIATE")
            try:
                # Each result is boxed: None is a result like any other.
                results = [(change(writer),) for change in changes]
                self._before_commit(writer)
                writer.execute("COMMIT")
            except BaseException:
                self._after_commit(False)
                if writer.in_transaction:
                    writer.execute("ROLLBACK")
                raise
        self._after_commit(True)
        return results

    def _set_file_aside(self) -> None:
        number = 1
        while (target := self.path.with_name(f"{self.path.name}.damaged-{number}")).exists():
            number += 1
        self.path.rename(target)
        for suffix in ("-wal", "-shm"):
            companion = self.path.with_name(self.path.name + suffix)
            if companion.exists():
                companion.rename(target.with_name(target.name + suffix))
