"""The faults: what happens to the files of one tier, and how it passes."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from proxystash_server.cache import CacheManager, CacheTierType, DiskTier, L2BackendType
from tests.server.cache.stash import Stash
from tests.server.faults.machine import (
    Mounts,
    file_of,
    fill,
    locked_by_another_process,
    make_room,
    unprivileged,
)


@dataclass
class Site:
    """The tier that a fault strikes."""

    stash: Stash
    mounts: Mounts
    monkeypatch: pytest.MonkeyPatch
    tier: CacheTierType
    backend: L2BackendType

    @property
    def directory(self) -> Path:
        return self.stash.directory / self.tier

    @property
    def database(self) -> Path:
        return self.directory / ("l2.db" if self.tier is CacheTierType.L2 else "proxystash.db")

    def tier_of(self, manager: CacheManager) -> DiskTier:
        return manager.l2_tier if self.tier is CacheTierType.L2 else manager.l3_tier


class Fault:
    """One kind of fault. The cache is opened after `__enter__`; the fault lasts from `begin` to `end`."""

    # Whether the tier stays away until `end`. Otherwise it heals by itself.
    lasts = True
    backends = frozenset(L2BackendType)
    # Whether the tier has lost what it held. A new L2 is filled from use.
    loses = False
    # Whether a cache is not to start on what is there now.
    is_refused = False
    # Whether a start may find the tier well enough all the same.
    may_let_start = False
    # What may be told beside the one line about the tier.
    also_told: frozenset[str] = frozenset()

    def __init__(self, site: Site) -> None:
        self.site = site
        self.undo = ExitStack()

    def __enter__(self) -> Self:
        self.prepare()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo.close()

    def prepare(self) -> None:
        pass

    def begin(self) -> None:
        raise NotImplementedError

    def end(self) -> None:
        pass


class DiskFull(Fault):
    # What a tier gives up at its end may leave room enough for its next start.
    may_let_start = True

    def prepare(self) -> None:
        self.site.mounts.add(self.site.directory, "size=2m")

    def begin(self) -> None:
        fill(self.site.directory)

    def end(self) -> None:
        make_room(self.site.directory)


class MountedOver(Fault):
    """A read-only file system comes to lie over the directory."""

    def begin(self) -> None:
        self.site.mounts.add(self.site.directory, "ro")

    def end(self) -> None:
        self.site.mounts.remove(self.site.directory)


class PermissionLost(Fault):
    def prepare(self) -> None:
        self.undo.enter_context(unprivileged(self.site.stash.directory.parent))

    def begin(self) -> None:
        self.site.directory.chmod(0)

    def end(self) -> None:
        self.site.directory.chmod(0o700)


class InputOutputError(Fault):
    """Every read and write of the tier's files fails."""

    def prepare(self) -> None:
        self.failing = False
        for name in ("pwrite", "pread", "fsync"):
            self._wrap(name)
        connect = sqlite3.connect
        fault = self

        class Connection(sqlite3.Connection):
            path: object = ""

            def execute(self, *arguments: Any) -> sqlite3.Cursor:
                fault.check(self.path)
                return super().execute(*arguments)

            def executemany(self, *arguments: Any) -> sqlite3.Cursor:
                fault.check(self.path)
                return super().executemany(*arguments)

        def connected(path: Any, **options: Any) -> sqlite3.Connection:
            connection: Connection = connect(path, factory=Connection, **options)
            connection.path = path
            return connection

        self.site.monkeypatch.setattr(sqlite3, "connect", connected)

    def check(self, path: object) -> None:
        """Fail as SQLite does when the system says EIO."""
        if self.failing and str(path).startswith(str(self.site.directory)):
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR
            raise error

    def _wrap(self, name: str) -> None:
        function = getattr(os, name)

        def wrapped(descriptor: int, *arguments: Any) -> Any:
            if self.failing and file_of(descriptor).is_relative_to(self.site.directory):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return function(descriptor, *arguments)

        self.site.monkeypatch.setattr(os, name, wrapped)

    def begin(self) -> None:
        self.failing = True

    def end(self) -> None:
        self.failing = False


class Locked(Fault):
    backends = frozenset({L2BackendType.SQLITE})

    def prepare(self) -> None:
        # Otherwise each attempt waits a second.
        self.site.monkeypatch.setattr(
            "proxystash_server.cache.tiers.sqlite.database._BUSY_TIMEOUT_SECONDS", 0.02
        )

    def begin(self) -> None:
        self.undo.enter_context(locked_by_another_process(self.site.database))

    def end(self) -> None:
        self.undo.close()


class NoDirectory(Fault):
    """Something else is where the directory was."""

    def begin(self) -> None:
        self._hidden = self.site.directory.with_name("hidden")
        self.site.directory.rename(self._hidden)
        self.site.directory.write_text("not a directory")
        self.site.directory.chmod(0o600)

    def end(self) -> None:
        self.site.directory.unlink()
        self._hidden.rename(self.site.directory)


class DirectoryRemoved(Fault):
    lasts = False
    loses = True

    def begin(self) -> None:
        shutil.rmtree(self.site.directory)


class FileRemoved(Fault):
    lasts = False
    loses = True
    backends = frozenset({L2BackendType.JSONL})

    def begin(self) -> None:
        (self.site.directory / "entries.jsonl").unlink()


class ReplacedByGarbage(Fault):
    lasts = False
    loses = True
    backends = frozenset({L2BackendType.SQLITE})
    also_told = frozenset({"record set aside", "a database is damaged"})

    def begin(self) -> None:
        other = self.site.database.with_name("other")
        other.write_bytes(b"not a database " * 1000)
        other.chmod(0o600)
        other.replace(self.site.database)


class ReplacedByAnotherDatabase(Fault):
    """A file of another program is where the database was, until somebody puts that back, without its log."""

    backends = frozenset({L2BackendType.SQLITE})
    loses = True
    is_refused = True

    def begin(self) -> None:
        self._kept = self.site.database.with_name("kept")
        self._kept.hardlink_to(self.site.database)
        other = self.site.database.with_name("other")
        with closing(sqlite3.connect(other)) as connection:
            connection.execute("CREATE TABLE foreign_table (name)")
        other.chmod(0o600)
        self._foreign = other.read_bytes()
        other.replace(self.site.database)

    def end(self) -> None:
        assert self.site.database.read_bytes() == self._foreign, "another program's file was changed"
        self._kept.replace(self.site.database)


class ReplacedUntilMovedAway(ReplacedByAnotherDatabase):
    """The same, but what was there before is lost."""

    def begin(self) -> None:
        super().begin()
        self._kept.unlink()

    def end(self) -> None:
        assert self.site.database.read_bytes() == self._foreign, "another program's file was changed"
        self.site.database.unlink()


class DatabaseRemoved(Fault):
    lasts = False
    loses = True
    backends = frozenset({L2BackendType.SQLITE})

    def begin(self) -> None:
        for path in self.site.directory.iterdir():
            path.unlink()


FAULTS: dict[str, type[Fault]] = {
    "disk full": DiskFull,
    "mounted over, read-only": MountedOver,
    "permission lost": PermissionLost,
    "EIO": InputOutputError,
    "locked by another process": Locked,
    "no directory any more": NoDirectory,
    "directory removed": DirectoryRemoved,
    "the file removed": FileRemoved,
    "replaced by garbage": ReplacedByGarbage,
    "replaced by another database": ReplacedByAnotherDatabase,
    "replaced and lost": ReplacedUntilMovedAway,
    "database removed": DatabaseRemoved,
}
