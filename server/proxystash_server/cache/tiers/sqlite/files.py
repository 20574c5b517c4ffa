"""A SQLite database as files: its log beside it, and what becomes of them when it is replaced."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from proxystash_server.cache.ground.files import unused_path
from proxystash_server.cache.ground.killpoints import kill_point

_COMPANIONS = ("-wal", "-shm")


def companions(path: Path) -> tuple[Path, Path]:
    """The log of a database and the memory that its connections share, whether they exist or not."""
    log, shared = (path.with_name(path.name + ending) for ending in _COMPANIONS)
    return log, shared


def cannot_open(error: BaseException | None) -> bool:
    """Whether SQLite could not open a file, which says nothing of what is in it."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_CANTOPEN


def keep_log_from_another_file(path: Path, inode: int) -> None:
    """Take away the log of a database that was replaced while it was open; it is not the new file's.

    `inode` is that of the file it belongs to. Raises OSError.
    """
    if path.exists() and path.stat().st_ino != inode:
        _move_log(path, unused_path(path, "replaced", *_COMPANIONS))


def set_aside_and_replace(path: Path, replacement: Path) -> None:
    """Keep a damaged database under another name, and put a whole one in its place. Raises OSError."""
    target = unused_path(path, "damaged", *_COMPANIONS)
    _move_log(path, target)
    kill_point("salvage.before_replace")
    target.hardlink_to(path)
    replacement.replace(path)


def _move_log(path: Path, target: Path) -> None:
    # Beside another database than its own, SQLite would apply it to that.
    for companion, aside in zip(companions(path), companions(target), strict=True):
        if companion.exists():
            companion.rename(aside)
