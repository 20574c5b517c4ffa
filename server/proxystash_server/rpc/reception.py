"""Whose requests are received now, and whose calls have to wait for that."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, Generic, Protocol, TypeVar

# Requests received at once. Each takes up to 4 MiB of memory from its first byte on.
MOST_RECEIVED: Final = 64
# A connection may have so many of them in any case, whatever the others do.
MOST_OF_ONE_CONNECTION: Final = 8
# How long a request may take to come while other calls of its connection wait, in seconds.
PATIENCE: Final = 10.0


class Received(Protocol):
    """A call, as far as it matters here."""

    @property
    def connection(self) -> bytes:
        """Whose it is."""


CallT = TypeVar("CallT", bound=Received)


class Reception(Generic[CallT]):
    """Gives out places in which the request of a call is received, so that no connection takes all of them.

    A call has its place from `enter` to `leave`. Where there is none, it waits in the line of its connection,
    and some later `leave` has it. So requests that never come hold up their own connection at most, and even
    there no longer than `patience`. Thread-safe.
    """

    def __init__(
        self,
        *,
        most: int = MOST_RECEIVED,
        most_of_one: int = MOST_OF_ONE_CONNECTION,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = most
        self._most_of_one = most_of_one
        self._patience = patience
        self._clock = clock
        self._lock = threading.Lock()
        self._count = 0
        # When each began, by connection, oldest first.
        self._places: dict[bytes, dict[CallT, float]] = {}
        self._lines: dict[bytes, dict[CallT, None]] = {}

    def enter(self, call: CallT) -> bool:
        """Whether the call has a place at once; else it waits in line."""
        connection = call.connection
        with self._lock:
            places = self._places.get(connection)
            if places is None:
                places = self._places[connection] = {}
            if self._count < self._most or len(places) < self._most_of_one:
                self._count += 1
                places[call] = self._clock()
                return True
            self._lines.setdefault(connection, {})[call] = None
            return False

    def leave(self, call: CallT) -> CallT | None:
        """Give up the call's place, or where it waits; the call, if any, that has the place from now on."""
        connection = call.connection
        with self._lock:
            places = self._places.get(connection)
            if places is None or places.pop(call, None) is None:
                self._leave_line(call)
                return None
            if not places:
                del self._places[connection]
            self._count -= 1
            return self._admit_next(connection) if self._lines else None

    def overdue(self, connection: bytes) -> list[CallT]:
        """The calls of a connection whose requests have been awaited for longer than is patient."""
        with self._lock:
            latest = self._clock() - self._patience
            return [call for call, since in self._places.get(connection, {}).items() if since < latest]

    def waiting(self) -> list[CallT]:
        """The calls that have a place, and those in line."""
        with self._lock:
            return [
                call
                for calls in (*self._places.values(), *self._lines.values())
                for call in calls  # type: ignore[attr-defined]  # mypy joins the two kinds of dict to object
            ]

    def _admit_next(self, left: bytes) -> CallT | None:
        """Who gets the place that a call of the connection `left` had: lines take turns.

        But first comes what that connection may have in any case.
        """
        if left in self._lines and len(self._places.get(left, ())) < self._most_of_one:
            connection = left
        elif self._count < self._most:
            connection = next(iter(self._lines))
        else:
            return None
        line = self._lines.pop(connection)
        call = next(iter(line))
        del line[call]
        if line:
            self._lines[connection] = line
        self._count += 1
        self._places.setdefault(connection, {})[call] = self._clock()
        return call

    def _leave_line(self, call: CallT) -> None:
        line = self._lines.get(call.connection)
        if line is not None and line.pop(call, 0) is None and not line:
            del self._lines[call.connection]
