"""Lists in files."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import BinaryIO

from proxystash.feeding.copying import bounded_file, too_large
from proxystash.feeding.failures import SourceError

# What tells whether a file is the one it was: its inode, size and time of change.
FileState = tuple[int, int, int]


def read_file(path: Path, known: FileState | None, limit: int) -> tuple[BinaryIO, FileState] | None:
    """A copy of a file, and its state; None if that is `known`. Raises SourceError.

    It is a copy, so that what is written to the file meanwhile is not read in part.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise SourceError("not a regular file")
        state = status.st_ino, status.st_size, status.st_mtime_ns
        if state == known:
            return None
        if status.st_size > limit:
            raise too_large(limit)
        with path.open("rb") as file, bounded_file(limit) as copy:
            copy.copy(file)
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return copy.file, state
