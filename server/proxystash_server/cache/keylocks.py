"""Locks per key, so that work on one key never waits for another.

Lock order, outermost first; a thread takes them only downwards. Only the first three are held across I/O, and
none of these three is waited for by a reader of another key.

1. key locks (several at once only in sorted order, through `hold_many`; all of them through `hold_all`)
2. the flush lock of the tier stack (one flush of uses at a time)
3. a tier's commit lock (group commit: writers of one tier, never its readers)
4. a tier's memory lock (L1's entries, JSONL's index)
5. leaves, never two at once: those of the access log, the statistics and latencies, a breaker, a backlog, and
   the numbers of changes
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class _KeyLock:
    __slots__ = ("lock", "users")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0


class KeyLocks:
    """One mutex for every key in use, made when first wanted and dropped when nobody wants it any more.

    Not reentrant. `hold_all` waits until no key is held and keeps new holders out meanwhile.
    """

    def __init__(self) -> None:
        self._guard = threading.Condition(threading.Lock())
        self._locks: dict[str, _KeyLock] = {}
        self._all_held = False

    @contextmanager
    def hold(self, key: str) -> Iterator[None]:
        """Hold one key's lock."""
        self._acquire(key)
        try:
            yield
        finally:
            self._release((key,))

    @contextmanager
    def hold_many(self, keys: Iterable[str]) -> Iterator[list[str]]:
        """Hold several keys' locks, taken in sorted order so that two such callers cannot deadlock.

        Gives the keys.
        """
        held: list[str] = []
        try:
            for key in sorted(set(keys)):
                # A holder of some keys must get the rest even while hold_all waits, or both would wait for
                # ever.
                self._acquire(key, admitted=bool(held))
                held.append(key)
            yield held
        finally:
            self._release(held)

    @contextmanager
    def hold_all(self) -> Iterator[None]:
        """Hold every key's lock, including those of keys not seen yet."""
        with self._guard:
            while self._all_held:
                self._guard.wait()
            self._all_held = True
            while self._locks:
                self._guard.wait()
        try:
            yield
        finally:
            with self._guard:
                self._all_held = False
                self._guard.notify_all()

    def _acquire(self, key: str, *, admitted: bool = False) -> None:
        with self._guard:
            while self._all_held and not admitted:
                self._guard.wait()
            key_lock = self._locks.get(key)
            if key_lock is None:
                key_lock = self._locks[key] = _KeyLock()
            key_lock.users += 1
        key_lock.lock.acquire()

    def _release(self, keys: Iterable[str]) -> None:
        with self._guard:
            for key in keys:
                key_lock = self._locks[key]
                key_lock.lock.release()
                key_lock.users -= 1
                if not key_lock.users:
                    del self._locks[key]
            if self._all_held and not self._locks:
                self._guard.notify_all()
