"""Directories and small files whose names and contents last."""

from __future__ import annotations

import os
from pathlib import Path

from proxystash_server.cache.ground.killpoints import kill_point


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path, *, sync: bool, mode: int = 0o777) -> list[Path]:
    """Make a directory and what is missing above it, each name durable if `sync`; those that were made.

    `mode` is that of the last.
    """
    if path.is_dir():
        return []
    made = make_directory(path.parent, sync=sync)
    path.mkdir(mode, exist_ok=True)
    if sync:
        sync_directory(path.parent)
    return [*made, path]


def unused_path(path: Path, word: str, *endings: str) -> Path:
    """A name beside `path` that nobody has, with a word that says what it is for and a number.

    With the `endings` nobody has it either.
    """
    number = 1
    while True:
        candidate = path.with_name(f"{path.name}.{word}-{number}")
        if not any(path.with_name(candidate.name + ending).exists() for ending in ("", *endings)):
            return candidate
        number += 1


def open_anew(path: Path) -> int:
    """A new file to write to, its owner's alone, in the place of whatever has that name.

    It is never written through a link, and never has the mode of what was there. Raises OSError.
    """
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


def replace_file(path: Path, content: bytes, *, sync: bool) -> None:
    """Write a whole small file so that a reader finds the old or the new one, never a part."""
    temporary = path.with_name(path.name + ".new")
    try:
        with os.fdopen(open_anew(temporary), "wb") as file:
            file.write(content)
            file.flush()
            if sync:
                os.fsync(file.fileno())
    except OSError:
        # A copy that found no room must not leave less of it.
        temporary.unlink(missing_ok=True)
        raise
    kill_point("replace.before_rename")
    temporary.rename(path)
    kill_point("replace.after_rename")
    if sync:
        sync_directory(path.parent)
