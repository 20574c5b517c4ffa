"""The lock on the directories of a cache: two caches on one store would ruin it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import json
import os
import threading
import weakref
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from proxystash_server.cache.config import CacheConfig, Durability
from proxystash_server.cache.errors import StoreError, StoreInUseError
from proxystash_server.cache.ground.files import make_directory

LOCK_FILE: Final = "lock"


class StoreLock:
    """The store of a configuration as one cache's alone, from entering the context until leaving it.

    Locked are the data directory, in which L2 and the journals are, and which is made private if it is
    missing; and the directory of L3's database, which may be elsewhere, and the same for several data
    directories. A file in the data directory says who has it. What was made for the lock, and was not used,
    is taken away with it. Holds against everybody else, also in this process. The kernel releases the lock
    with the process, however it ends, so a lock file that is left behind holds nobody up.

    A forked child does not have the lock, nor may it take it: of files that its parent had open, SQLite
    believes there that it has locked them. Raises StoreInUseError, and StoreError if the data directory
    cannot be used.
    """

    def __init__(self, config: CacheConfig, purpose: str) -> None:
        self.path = config.l2_cache_dir.parent
        self._purpose = purpose
        self._sync = config.durability is Durability.FULL
        self._made: list[Path] = []
        self._directory = _LockedPath(self.path, os.O_RDONLY | os.O_DIRECTORY)
        self._file = _LockedPath(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        self._database_directory = _LockedPath(config.l3_database_path.parent, os.O_RDONLY | os.O_DIRECTORY)
        self._has_database = config.l3_config.enabled and len(self.keys) > 1
        self._database_was_opened = False
        self._checking = threading.Lock()

    def __enter__(self) -> Self:
        if not _carried_over.isdisjoint(self.keys):
            raise StoreInUseError(
                f"a cache in {self.path} was open when this process was forked from another. Fork before a "
                "cache is made, or close it first"
            )
        try:
            self._lock_data_directory()
            self._lock_database_directory()
        except BaseException:
            self.release()
            raise
        _held.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    @property
    def keys(self) -> set[Path]:
        """The directories, by which two locks on one are recognized."""
        return {one.path.resolve() for one in (self._directory, self._database_directory)}

    def release(self) -> None:
        """Let others have the store; idempotent."""
        _held.discard(self)
        with contextlib.suppress(OSError):
            # Nobody else has come as far as the file while the directory is locked.
            if self._file.is_in_place:
                self._file.path.unlink()
            while self._made:
                self._made.pop().rmdir()
        self.close_files()

    def close_files(self) -> None:
        """Let go of the files, by which the lock is released unless another process has them too."""
        for one in (self._file, self._database_directory, self._directory):
            one.close()

    def tell(self, purpose: str) -> None:
        """Leave a note for whoever finds the store locked: what this process does with it."""
        self._purpose = purpose
        note = {
            "pid": os.getpid(),
            "purpose": purpose,
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        content = json.dumps(note).encode() + b"\n"
        # A full disk must not keep a server from starting: it is the lock that counts.
        with contextlib.suppress(OSError):
            os.pwrite(self._file.descriptor, content, 0)
            os.ftruncate(self._file.descriptor, len(content))

    def check(self) -> None:
        """Make sure that the data directory is the locked one: before anything is made in it, and each round.

        A lock file that was removed is put back; a directory that was removed, not moved away, is made again.
        Raises FileNotFoundError if it was moved away, BlockingIOError if another cache has what is in its
        place, OSError if that cannot be told. Thread-safe.
        """
        with self._checking:
            self._keep(self._directory, 0o700)
            if not self._file.is_in_place:
                # Earlier releases lock nothing else.
                self._file.lock()
                self.tell(self._purpose)

    def check_database(self) -> None:
        """The same of the directory of L3's database; one that nothing was opened in may be another by now.

        That is so where L3 was out of reach from the start on, as behind a file system mounted over it.
        """
        if self._has_database:
            with self._checking:
                if not self._database_was_opened and not self._database_directory.is_in_place:
                    self._database_directory.close()
                self._keep(self._database_directory, 0o777)

    def note_database(self) -> None:
        """Take down that L3's database has been opened where the lock is."""
        self._database_was_opened = True

    def _keep(self, directory: _LockedPath, mode: int) -> None:
        if directory.is_in_place:
            return
        # One that was removed has no name any more, and nobody else can have it.
        if directory.descriptor >= 0 and os.fstat(directory.descriptor).st_nlink:
            raise FileNotFoundError(errno.ENOENT, f"{directory.path} was moved away while it was in use")
        self._made += make_directory(directory.path, mode=mode, sync=self._sync)
        directory.lock()

    def _lock_data_directory(self) -> None:
        try:
            self.check()
        except BlockingIOError:
            raise StoreInUseError(
                f"data directory {self.path} is in use by {_describe_holder(self.path)}"
            ) from None
        except OSError as error:
            raise StoreError(f"data directory {self.path} cannot be used: {error.strerror}") from None

    def _lock_database_directory(self) -> None:
        """Lock the directory alone, in which there need not be room for one more file.

        One that is out of reach is no reason not to start: then L3 is, too.
        """
        try:
            self.check_database()
        except BlockingIOError:
            raise StoreInUseError(
                f"directory {self._database_directory.path} is in use by another cache"
            ) from None
        except OSError:
            return


class _LockedPath:
    """A file or directory that is locked from `lock` until `close`."""

    def __init__(self, path: Path, flags: int) -> None:
        self.path = path
        self._flags = flags
        self.descriptor = -1

    def __del__(self) -> None:
        self.close()

    @property
    def is_in_place(self) -> bool:
        """Whether it is locked, and its path still leads to it."""
        try:
            return self.descriptor >= 0 and os.path.samestat(os.fstat(self.descriptor), self.path.stat())
        except (FileNotFoundError, NotADirectoryError):
            return False

    def lock(self) -> None:
        """Lock what is at the path. Raises BlockingIOError if somebody else has, OSError otherwise."""
        # It may be moved away in the moment before it is locked.
        while not self.is_in_place:
            descriptor = os.open(self.path, self._flags, 0o600)
            try:
                _lock(descriptor, fcntl.LOCK_EX)
            except BaseException:
                os.close(descriptor)
                raise
            self.close()
            self.descriptor = descriptor

    def close(self) -> None:
        """Let go of it."""
        # Forgotten before it is closed: after an interrupt in between, its number may be another file's.
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


@contextlib.contextmanager
def caches_kept_out(directory: Path) -> Iterator[None]:
    """Hold a data directory, if it is there, so that no cache can open it, and leave no trace of that.

    Raises StoreInUseError if one has.
    """
    with contextlib.ExitStack() as held:
        for path in (directory, directory / LOCK_FILE):
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDONLY)
                held.callback(os.close, descriptor)
                try:
                    _lock(descriptor, fcntl.LOCK_SH)
                except BlockingIOError:
                    holder = _describe_holder(directory)
                    raise StoreInUseError(
                        f"data directory {directory} is in use by {holder}. Stop it first"
                    ) from None
        yield


def _lock(descriptor: int, kind: int) -> None:
    """Lock an open file or directory; raises BlockingIOError if somebody else has."""
    try:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            # Perhaps by a cache of this process that nobody holds any more: it has cycles.
            gc.collect()
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        # Over NFS no directory can be locked: the file in it is all there is.
        if error.errno != errno.EBADF:
            raise


def _describe_holder(directory: Path) -> str:
    try:
        with (directory / LOCK_FILE).open("rb") as file:
            note = json.loads(file.read(4096))
        process = "this process" if note["pid"] == os.getpid() else f"process {note['pid']}"
        return f"{process}, {note['purpose']} since {note['since']}"
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        return "another process"


# The locks of this process, and the directories of those of the process that it was forked from.
_held: weakref.WeakSet[StoreLock] = weakref.WeakSet()
_carried_over: set[Path] = set()


def _leave_to_parent() -> None:
    for lock in list(_held):
        _carried_over.update(lock.keys)
        lock.close_files()
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
