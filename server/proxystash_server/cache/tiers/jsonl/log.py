"""A file of lines that is only ever appended to, or replaced whole by another one through a rename."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


class LogFile:
    """The file, open, and its end.

    Written by one thread at a time; others may read meanwhile what was appended before. It is closed when the
    last of them lets go of it, so that a replacement never pulls it away from a reader. Faults are OSErrors.
    """

    __slots__ = ("_descriptor", "_inode", "_is_synced", "_path_text", "_sync", "end", "is_torn", "path")

    def __init__(self, path: Path, flags: int = os.O_RDWR | os.O_CREAT, *, sync: bool = False) -> None:
        self._descriptor = -1
        # A link in the place of the file is not followed: who knows where it leads.
        self._descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._inode = os.fstat(self._descriptor).st_ino
        self.has_moved_to(path)
        self._sync = sync
        self._is_synced = True
        self.end = 0
        # Whether the file may go on behind its end.
        self.is_torn = False

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def has_moved_to(self, path: Path) -> None:
        """Note where the file is now."""
        self.path = path
        self._path_text = str(path)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Every line with its offset; the last may be cut short. Leaves `end` behind the last whole one."""
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            offset = file.seek(0)
            for line in file:
                if line.endswith(b"\n"):
                    self.end = offset + len(line)
                else:
                    self.is_torn = True
                yield offset, line
                offset = self.end

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`."""
        return os.pread(self._descriptor, length, offset)

    def append(self, lines: bytes) -> int:
        """Write whole lines at the end and return the offset of the first.

        After a failure nothing counts of them, unless the process ends while `is_torn`.
        """
        if self.is_torn:
            self.cut_off(self.end)
        offset = self.end
        try:
            self.write(lines, offset)
        except BaseException:
            self.cut_off(offset)
            raise
        self.end = offset + len(lines)
        self._is_synced = False
        return offset

    def cut_off(self, end: int) -> None:
        """Take away what stands behind `end`; what cannot be, is before the next append."""
        self.end = end
        self.is_torn = True
        self.truncate(end)
        self.is_torn = False

    def write(self, data: bytes, offset: int) -> None:
        """Write all of `data` at `offset`."""
        written = os.pwrite(self._descriptor, data, offset)
        while written < len(data):
            written += os.pwrite(self._descriptor, data[written:], offset + written)

    def truncate(self, size: int) -> None:
        """Cut the file off behind `size` bytes."""
        os.ftruncate(self._descriptor, size)

    def sync(self) -> None:
        """Wait until what was appended is on the medium, if that is wanted."""
        if self._sync and not self._is_synced:
            os.fsync(self._descriptor)
            self._is_synced = True

    @property
    def is_in_place(self) -> bool:
        """Whether its path still leads to this file: what is written into another one is lost."""
        try:
            return os.stat(self._path_text).st_ino == self._inode  # noqa: PTH116 -- a third of Path.stat
        except OSError:
            return False
