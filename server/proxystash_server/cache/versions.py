"""The numbers of changes."""

from __future__ import annotations

import threading
import time


class Versions:
    """Numbers every change, each greater than all before it, also those of earlier runs.

    Begins at the time in nanoseconds, or after the greatest number that a store remembers if the clock was
    set back. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = time.time_ns()

    def next(self) -> int:
        """The number of a new change."""
        with self._lock:
            version = self._next
            self._next += 1
            return version

    def take(self, count: int) -> int:
        """The first number of so many new changes, which are numbered one after the other."""
        with self._lock:
            version = self._next
            self._next += count
            return version

    def continue_after(self, version: int) -> None:
        """Give only numbers greater than `version` from now on."""
        with self._lock:
            self._next = max(self._next, version + 1)
