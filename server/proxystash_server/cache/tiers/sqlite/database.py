"""A SQLite file with one writer and many readers, opened.

Versioned and set aside when it is beyond reading.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from proxystash_server.cache.config import Durability
from proxystash_server.cache.errors import (
    TierError,
    TierLostError,
    tier_error,
)
from proxystash_server.cache.ground.files import make_directory
from proxystash_server.cache.ground.killpoints import kill_point
from proxystash_server.cache.tiers.sqlite.files import (
    cannot_open,
    companions,
    keep_log_from_another_file,
    set_aside_and_replace,
)
from proxystash_server.cache.tiers.sqlite.format import (
    FORMAT_VERSION,
    PAGE_BYTES,
    SCHEMA,
    DamagedDatabaseError,
    check_header,
    check_pages,
    format_of,
    is_marked,
    mark,
    upgrade,
)
from proxystash_server.cache.tiers.sqlite.log_damage import has_log, set_damaged_log_aside
from proxystash_server.cache.tiers.sqlite.salvage import Salvaged, salvage

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# How long a writer waits for another process before the tier counts as failing.
_BUSY_TIMEOUT_SECONDS = 1.0
# Holds what a transaction of 1,000 entries changes among a million, and the upper levels of the indexes.
_WRITER_CACHE_BYTES = 16 * 1024 * 1024
# From here on, `checkpoint` has work to do. A longer log means fewer copies of the same page and fewer syncs,
# and a little more for readers to look through.
_LOG_LIMIT_BYTES = 16 * 1024 * 1024
# From here on, it is done by writers if nobody else does, or if whoever does cannot keep up.
_LOG_BACKSTOP_BYTES = 128 * 1024 * 1024
# How often a checkpoint goes after what was written during the one before, and how little is left to the last
# one, for which writers wait.
_CHECKPOINT_ROUNDS = 4
_FEW_PAGES = 500

_READERS_AT_START = 4
# How often a reader that the file cannot be opened for looks whether another one has come back.
_READER_PAUSE_SECONDS = 0.001

# Up to this size a file is looked through when it is opened, which takes a quarter of a second; a larger one
# afterwards, by `checkpoint`.
_CHECKED_AT_ONCE_BYTES = 32 * 1024 * 1024

# What SQLite raises. The message of an error quotes the text of a damaged schema, and is made of bytes that
# may be no text.
SQLITE_ERRORS = (sqlite3.Error, UnicodeDecodeError)
_DAMAGE = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)


def _is_damage(error: Exception) -> bool:
    if isinstance(error, UnicodeDecodeError | DamagedDatabaseError):
        return True
    # The low byte is the primary result code.
    if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE:
        return True
    # Every table and column we ask for is in a schema that is sound.
    return str(error).startswith(("no such table", "no such column"))


@contextmanager
def translated() -> Iterator[None]:
    """Raise the faults of SQLite and of the file system as TierError."""
    try:
        yield
    except (*SQLITE_ERRORS, OSError) as error:
        raise _tier_error(error) from error


def _tier_error(error: Exception) -> TierError:
    if isinstance(error, OSError):
        return tier_error(error)
    if _is_damage(error):
        return TierLostError(f"{type(error).__name__}: {error}")
    if cannot_open(error):
        # SQLite does not say why, but the next one to open a file learns it.
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as reason:
            return tier_error(reason)
    return TierError(f"{type(error).__name__}: {error}")


class _Reader:
    """A connection for reading, used by one thread at a time.

    `commits` is how many there were when it was last asked for a single row; `stays` says whether it is still
    in the transaction of then.
    """

    __slots__ = ("commits", "connection", "generation", "stays")

    def __init__(self, connection: sqlite3.Connection, generation: int) -> None:
        self.connection = connection
        self.generation = generation
        self.commits = -1
        self.stays = False

    def leave(self) -> None:
        """End the transaction, if it stays in one."""
        if self.stays:
            self.connection.execute("COMMIT")
            self.stays = False


class _Borrowed:
    """A connection for reading, borrowed for a `with` block."""

    __slots__ = ("_database", "_reader")

    def __init__(self, database: Database) -> None:
        self._database = database

    def __enter__(self) -> sqlite3.Connection:
        self._reader = self._database.lend()
        try:
            self._reader.leave()
        except BaseException as error:
            self._database.give_up(self._reader, error)
            raise
        return self._reader.connection

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._database.take_back(self._reader)
        else:
            self._database.give_up(self._reader, error)


class Database:
    """The connections to one SQLite file in WAL mode.

    Reads borrow a connection from a pool, so that no reader waits for another or for the writer. Writes are
    functions of the one writing connection, each a transaction. With `durability = process` a commit is in
    the kernel's hands when it returns; with `full` it is synced. `before_commit` adds to every transaction;
    `after_commit` learns whether it was committed, before the next begins.
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
        self._durability = durability
        self._writer: sqlite3.Connection | None = None
        self._readers: deque[_Reader] = deque()
        self._generation = 0
        # Changes with every commit, before it is acknowledged, and when all are to leave their transactions.
        self._commit_count = 0
        self._may_stay = True
        self._some_stay = False
        self._inode = 0
        self._damaged = False
        # How many committed pages a damaged log has cost; for who opens it to tell.
        self.lost_pages = 0
        self._was_log_checked = False
        # Whether its pages are still to be looked at.
        self.is_unchecked = False
        self._warned_log_bytes = 0
        # Held for each transaction; readers never take it.
        self._lock = threading.Lock()

    def open(self) -> Salvaged | None:
        """Connect, creating the file or its directory if need be.

        A damaged file is replaced by what could be saved of it and set aside; then the result is what that
        was. Raises TierError if it cannot be done now, StoreFormatError if the file is not ours
        or too new.
        """
        self.close()
        with translated():
            make_directory(self.path.parent, sync=self._durability is Durability.FULL)
            if not self._was_log_checked:
                # What a process that was killed has left; later on, it is our own.
                self.lost_pages = set_damaged_log_aside(self.path)
                self._was_log_checked = True
            saved = self.rebuild() if self._damaged else None
            try:
                self._connect()
            except SQLITE_ERRORS as error:
                if not _is_damage(error):
                    raise
                logger.warning("a database is damaged", extra={"path": str(self.path), "error": str(error)})
                saved = self.rebuild()
                self._connect()
        return saved

    def close(self) -> None:
        """Close every connection; idempotent. Borrowed readers are closed when they come back."""
        with self._lock:
            self._generation += 1
            if self._writer is not None:
                self._writer.close()
                self._writer = None
        while self._readers:
            self._readers.popleft().connection.close()
        with suppress(OSError):
            # What cannot be looked at now is looked at when it is opened again, which closes first.
            # In another directory, it is another server's.
            if self._inode and self.path.parent.stat().st_ino == self._directory_inode:
                keep_log_from_another_file(self.path, self._inode)
            self._inode = 0

    def write(self, change: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run `change` inside a transaction and return its result once that is committed.

        Raises TierError.
        """
        with self._lock:
            return self._commit(change)

    @property
    def busy(self) -> bool:
        """Whether a transaction is under way."""
        return self._lock.locked()

    def reader(self) -> AbstractContextManager[sqlite3.Connection]:
        """A connection for reading, which sees everything committed before; raises TierError."""
        return _Borrowed(self)

    def lend(self) -> _Reader:
        """A connection to read with, to be taken back or given up; raises TierError."""
        if self._writer is None:
            raise TierError("the database is closed")
        generation = self._generation
        while True:
            try:
                reader = self._readers.pop()
            except IndexError:
                reader = self._new_reader(generation)
            if reader.generation == generation:
                return reader
            # It came back in the moment in which the database was closed.
            reader.connection.close()

    def _new_reader(self, generation: int) -> _Reader:
        """One more connection for reading; where the file cannot be opened, one that comes back soon."""
        patience = time.monotonic() + _BUSY_TIMEOUT_SECONDS
        while True:
            try:
                with translated():
                    connection = self._new_connection(self.path)
                    try:
                        # Only now does it open the log as well.
                        connection.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone()
                    except BaseException as error:
                        self.note_damage(error)
                        connection.close()
                        raise
                    return _Reader(connection, generation)
            except TierError as error:
                # Whether it was for want of a descriptor cannot always be told: one may have come back since.
                if not cannot_open(error.__cause__) or time.monotonic() > patience:
                    raise
            time.sleep(_READER_PAUSE_SECONDS)
            with suppress(IndexError):
                return self._readers.pop()

    def take_back(self, reader: _Reader) -> None:
        """Keep a lent connection for the next reader, unless the database was closed meanwhile."""
        if reader.generation == self._generation:
            self._readers.append(reader)
            if reader.stays:
                # Afterwards, or the writer that ends it might not know.
                self._some_stay = True
        else:
            reader.connection.close()

    def give_up(self, reader: _Reader, error: BaseException) -> None:
        """Close a lent connection that failed; raises a fault of SQLite or the file system as TierError."""
        reader.connection.close()
        if isinstance(error, (*SQLITE_ERRORS, OSError)):
            self.note_damage(error)
            raise _tier_error(error) from error

    def read_one(self, query: str, key: str) -> tuple[Any, ...] | None:
        """The first row of a query about a key, which sees everything committed before; raises TierError.

        A transaction costs SQLite two locks, as much as the rest of such a query. So the second query since a
        commit begins one, and those that follow stay in it. The next commit makes it a thing of the past:
        whoever uses the connection after it leaves the transaction first, and the writer has the idle ones
        leave, since the log cannot start over behind them.
        """
        reader = self.lend()
        try:
            commits = self._commit_count
            if reader.commits != commits:
                reader.leave()
                reader.commits = commits
            elif not reader.stays and self._may_stay:
                reader.connection.execute("BEGIN")
                reader.stays = True
            row: tuple[Any, ...] | None = reader.connection.execute(query, (key,)).fetchone()
        except BaseException as error:
            self.give_up(reader, error)
            raise
        self.take_back(reader)
        return row

    def note_damage(self, error: BaseException) -> None:
        """Remember that the file is damaged, if that is what `error` says."""
        self._damaged = self._damaged or (isinstance(error, SQLITE_ERRORS) and _is_damage(error))

    def checkpoint(self) -> None:
        """Copy the log into the file and let it start over, if it has become long. Raises TierError.

        The first time, look through the pages of a file that was too large for that when it was opened.

        Nobody waits while most of it is copied, and writers only while the little follows that they wrote
        meanwhile.
        """
        if self.is_unchecked:
            self.is_unchecked = False
            with self.reader() as connection:
                check_pages(connection)
        if not self._log_is_long():
            self._may_stay = True
            return
        with self._lock:
            # Readers that stay would keep part of the log from being copied, and it from starting over.
            self._may_stay = False
            self._commit_count += 1
            self._end_idle_transactions()
        with self.reader() as connection:
            before = 0
            for _ in range(_CHECKPOINT_ROUNDS):
                length, _ = _checkpoint(connection)
                if length - before < _FEW_PAGES:
                    break
                before = length
            with self._lock:
                length, copied = _checkpoint(connection)
        # Who comes now needs nothing from a log that was copied whole, and is in nobody's way.
        self._may_stay = length == copied
        if self._may_stay:
            self._warned_log_bytes = 0
        else:
            self._warn_of_held_log()

    @property
    def log_bytes(self) -> int:
        """The size of the log; 0 where there is none."""
        try:
            return companions(self.path)[0].stat().st_size
        except OSError:
            return 0

    def _log_is_long(self) -> bool:
        # With the journal size limit, the first commit after a whole checkpoint cuts the file off there.
        return self.log_bytes > _LOG_LIMIT_BYTES

    def _warn_of_held_log(self) -> None:
        size = self.log_bytes
        # Each time that it has doubled, which is seldom however long it goes on.
        if size >= 2 * max(self._warned_log_bytes, _LOG_LIMIT_BYTES):
            self._warned_log_bytes = size
            logger.warning(
                "the log of the database grows, since another program keeps a transaction open",
                extra={"path": str(self.path), "log_bytes": size},
            )

    def read_meta_offline(self, name: str) -> object:
        """One value of the meta table of a file that is not open, changing nothing; None if there is none.

        Raises TierError, and StoreFormatError if the file is not ours or too new.
        """
        with translated():
            if not self.path.exists():
                return None
            shared = companions(self.path)[1]
            had_shared = shared.exists()
            # Without a log, SQLite is told that nothing can change, or it would make one; and it is not to
            # make the index anew, by which `open` tells whether the log is damaged.
            options = ("&readonly_shm=1" if had_shared else "") if has_log(self.path) else "&immutable=1"
            uri = f"{self.path.absolute().as_uri()}?mode=ro{options}"
            connection = sqlite3.connect(uri, uri=True)
            try:
                format_of(self.path, connection)
                row = connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
            finally:
                connection.close()
                if not had_shared:
                    shared.unlink(missing_ok=True)
        return row[0] if row else None

    def _connect(self) -> None:
        self._writer = writer = self._open_or_create(self.path)
        self.is_unchecked = self.path.stat().st_size > _CHECKED_AT_ONCE_BYTES
        if not self.is_unchecked:
            check_pages(writer)
        self._inode = self.path.stat().st_ino
        self._directory_inode = self.path.parent.stat().st_ino
        # Readers go on with these if connections of clients take all descriptors.
        self._readers.extend(self._new_reader(self._generation) for _ in range(_READERS_AT_START))

    def _open_or_create(self, path: Path) -> sqlite3.Connection:
        if not path.exists():
            # SQLite would create it readable for everyone.
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        check_header(path)
        writer = self._new_connection(path)
        try:
            version = format_of(path, writer)
            writer.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            writer.execute("PRAGMA journal_mode = WAL")
            writer.execute(f"PRAGMA journal_size_limit = {_LOG_LIMIT_BYTES}")
            page_bytes = writer.execute("PRAGMA page_size").fetchone()[0]
            writer.execute(f"PRAGMA wal_autocheckpoint = {_LOG_BACKSTOP_BYTES // page_bytes}")
            writer.execute(f"PRAGMA cache_size = {-_WRITER_CACHE_BYTES // 1024}")
            # Some builds of SQLite overwrite every page that a Clear frees, through the log.
            writer.execute("PRAGMA secure_delete = FAST")
            if not version:
                writer.executescript(
                    f"BEGIN; {SCHEMA}"
                    f"INSERT INTO meta VALUES ('id', '{uuid.uuid4().hex}'), ('incomplete', 1);"
                    "INSERT INTO meta VALUES ('entries', 0), ('last_version', 0);"
                )
                mark(writer)
                writer.execute("COMMIT")
            elif version < FORMAT_VERSION:
                upgrade(self.path, writer, version)
            elif not is_marked(writer):
                # A bit has flipped in its header.
                mark(writer)
            # What undoes a statement of many rows would go to a file of its own, which may not be had.
            writer.execute("PRAGMA temp_store = MEMORY")
        except BaseException:
            writer.close()
            raise
        return writer

    def _new_connection(self, path: Path) -> sqlite3.Connection:
        connection = sqlite3.connect(
            path,
            timeout=_BUSY_TIMEOUT_SECONDS,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=128,
        )
        # Text that is none must not fail a whole query: it fails its row's checksum instead.
        connection.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
        connection.execute(
            f"PRAGMA synchronous = {'FULL' if self._durability is Durability.FULL else 'NORMAL'}"
        )
        return connection

    def _commit(self, change: Callable[[sqlite3.Connection], Result]) -> Result:
        writer = self._writer
        if writer is None:
            raise TierError("the database is closed")
        kill_point("sqlite.before_begin")
        try:
            self._end_idle_transactions()
            try:
                writer.execute("BEGIN IMMEDIATE")
                result = change(writer)
                self._before_commit(writer)
                kill_point("sqlite.before_commit")
                writer.execute("COMMIT")
                self._after_commit(True)
            except BaseException as error:
                if isinstance(error, Exception):
                    self.note_damage(error)
                    self._after_commit(False)
                else:
                    # An interrupt, perhaps after the last step.
                    self._after_commit(not writer.in_transaction)
                if writer.in_transaction:
                    writer.execute("ROLLBACK")
                raise
            finally:
                self._commit_count += 1
            kill_point("sqlite.after_commit")
            # Writes into a file that was deleted or replaced succeed, and are lost.
            in_place = self._is_in_place()
        except (*SQLITE_ERRORS, OSError) as error:
            raise _tier_error(error) from error
        if not in_place:
            raise TierLostError(f"{self.path} was removed or replaced by another file")
        return result

    def _end_idle_transactions(self) -> None:
        if not self._some_stay:
            return
        self._some_stay = False
        for _ in range(len(self._readers)):
            try:
                reader = self._readers.popleft()
            except IndexError:
                return
            try:
                reader.leave()
            except SQLITE_ERRORS:
                reader.connection.close()
            else:
                self.take_back(reader)

    def _is_in_place(self) -> bool:
        try:
            return os.stat(self.path).st_ino == self._inode  # noqa: PTH116 -- half of what Path.stat costs
        except FileNotFoundError:
            return False

    def rebuild(self) -> Salvaged:
        """Set the file aside and put what can be saved of it in its place; what that was."""
        self.close()
        salvaged = self.path.with_name(self.path.name + ".salvaged")
        for leftover in (salvaged, *companions(salvaged)):
            leftover.unlink(missing_ok=True)
        connection = self._open_or_create(salvaged)
        try:
            salvaged_rows = salvage(self.path, connection)
            # Leaves everything in the one file that is then renamed.
            connection.execute("PRAGMA journal_mode = DELETE")
        except (*SQLITE_ERRORS, OSError):
            connection.close()
            salvaged.unlink(missing_ok=True)
            raise
        finally:
            connection.close()
        set_aside_and_replace(self.path, salvaged)
        self._damaged = False
        return salvaged_rows


def _checkpoint(connection: sqlite3.Connection) -> tuple[int, int]:
    """Copy of the log into the file what its readers allow, waiting for nobody.

    The pages in the log, and how many of them have been copied by now.
    """
    _, length, copied = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    return length, copied
