"""The data directory: made private, and locked, since two servers in one would ruin it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self

LOCK_FILE: Final = "lock"


class DataDirectoryError(Exception):
    """The data directory cannot be used; the message says why, and who uses it if someone does."""


class DataDirectory:
    """A data directory that is this process's alone, from entering the context until leaving it.

    The kernel releases the lock with the process, however it ends, so a lock file that is left behind holds
    nobody up.
    """

    def __init__(self, path: Path, purpose: str) -> None:
        self.path = path
        self._purpose = purpose
        self._lock = -1

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise DataDirectoryError(f"data directory {self.path} cannot be used: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self._describe_holder()
            os.close(self._lock)
            raise DataDirectoryError(f"data directory {self.path} is in use by {holder}") from None
        self.tell(self._purpose)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The file stays: removing it would let a third process lock a new one beside a second that waits for
        # this.
        os.ftruncate(self._lock, 0)
        os.close(self._lock)

    def tell(self, purpose: str) -> None:
        """Leave a note for whoever finds the directory locked: what this process does with it."""
        note = {
            "pid": os.getpid(),
            "purpose": purpose,
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        content = json.dumps(note).encode() + b"\n"
        # A full disk must not keep a server from starting: it is the lock that counts.
        with contextlib.suppress(OSError):
            os.pwrite(self._lock, content, 0)
            os.ftruncate(self._lock, len(content))

    def _describe_holder(self) -> str:
        try:
            note = json.loads(os.pread(self._lock, 4096, 0))
            return f"process {note['pid']}, {note['purpose']} since {note['since']}"
        except (ValueError, KeyError, TypeError, OSError):
            return "another process"
