"""Answers that their clients have not read yet."""

from __future__ import annotations

import threading
from typing import Final, Generic, TypeVar

# Of all large answers together, in bytes: the largest have 3 MiB, and are read within a second mostly.
MOST_UNREAD: Final = 128 * 1024 * 1024

CallT = TypeVar("CallT")


class UnreadAnswers(Generic[CallT]):
    """Keeps account of answers on their way, and says whose have to go when they take too much memory.

    That is the oldest: a client that reads has read it by now. Thread-safe.
    """

    def __init__(self, most_bytes: int = MOST_UNREAD) -> None:
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._bytes = 0
        self._sizes: dict[CallT, int] = {}

    def add(self, call: CallT, size: int) -> list[CallT]:
        """Note an answer of `size` bytes; the calls, if any, whose answers have to go for it."""
        with self._lock:
            self._sizes[call] = size
            self._bytes += size
            outdated: list[CallT] = []
            while self._bytes > self._most_bytes and len(self._sizes) > 1:
                oldest = next(iter(self._sizes))
                self._bytes -= self._sizes.pop(oldest)
                outdated.append(oldest)
            return outdated

    def remove(self, call: CallT) -> None:
        """The answer is read, or its call is over."""
        with self._lock:
            self._bytes -= self._sizes.pop(call, 0)
