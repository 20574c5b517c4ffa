"""Locks per key, so that work on one key never waits for another.

Lock order, outermost first; a thread takes them only downwards. Only the first four are held across I/O, and
none of these four is waited for by a reader of another key.

1. the lock of changes (group commit: one group at a time). Only its holder takes several key locks, or all
   of them; whoever holds one key's lock never waits for it
2. key locks (several at once only through `hold_many`, together or in sorted order; all of them through
   `hold_all`)
3. the flush lock of the changes (one flush of uses at a time)
4. a tier's commit lock (writers of one tier, never its readers)
5. a tier's memory lock (JSONL's index; L1's entries and the log of uses, which have one lock together)
6. leaves, never two at once: those of the statistics and latencies, a breaker, the uses that L3 has missed,
   and the numbers of uses in SQLite
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class KeyLocks:
    """One mutex for every key in use, there from when it is first wanted until nobody wants it any more.

    Not reentrant. Who waits for a key gets it in the order of asking. `hold_all` waits until no key is held
    and keeps new holders out meanwhile.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        # Wakes those that wait for `hold_all` to begin or to end.
        self._all_changed = threading.Condition(self._guard)
        # Every key that is held, with those that wait for it: each sleeps on a lock of its own, and the key
        # is its when that is released. Most keys have nobody waiting, and need no lock at all.
        self._locks: dict[str, deque[threading.Lock] | None] = {}
        self._all_held = False

    def hold(self, key: str) -> Holding:
        """Hold one key's lock, as a context."""
        return Holding(self, (key,))

    def hold_many(self, keys: Iterable[str]) -> Holding:
        """Hold several keys' locks, as a context that gives the keys.

        They are taken all at once or in sorted order, so that two such callers cannot deadlock.
        """
        return Holding(self, sorted(set(keys)))

    @contextmanager
    def hold_all(self) -> Iterator[None]:
        """Hold every key's lock, including those of keys not seen yet."""
        with self._guard:
            while self._all_held:
                self._all_changed.wait()
            self._all_held = True
            while self._locks:
                self._all_changed.wait()
        try:
            yield
        finally:
            with self._guard:
                self._all_held = False
                self._all_changed.notify_all()

    def acquire_one(self, key: str, *, admitted: bool = False) -> None:
        """Take the lock of `key`; waits. Every lookup below L1 does, so it costs less than `hold`."""
        with self._guard:
            # A holder of some keys must get the rest even while hold_all waits, or both would wait for ever.
            while self._all_held and not admitted:
                self._all_changed.wait()
            if key not in self._locks:
                self._locks[key] = None
                return
            turn = threading.Lock()
            turn.acquire()
            waiting = self._locks[key]
            if waiting is None:
                waiting = self._locks[key] = deque()
            waiting.append(turn)
        try:
            turn.acquire()
        except BaseException:
            self._stop_waiting(key, turn)
            raise

    def acquire(self, keys: Sequence[str]) -> None:
        """Take the locks of `keys`, which are sorted and each there once; waits."""
        with self._guard:
            while self._all_held:
                self._all_changed.wait()
            # The usual case: nobody has any of them.
            if self._locks.keys().isdisjoint(keys):
                self._locks.update(dict.fromkeys(keys))
                return
        taken = 0
        try:
            for key in keys:
                self.acquire_one(key, admitted=taken > 0)
                taken += 1
        except BaseException:
            self.release(keys[:taken])
            raise

    def release(self, keys: Sequence[str]) -> None:
        """Let go of the locks of `keys`; each goes to whoever has waited for it longest."""
        with self._guard:
            locks = self._locks
            for key in keys:
                waiting = locks[key]
                if waiting:
                    waiting.popleft().release()
                else:
                    del locks[key]
            if self._all_held and not locks:
                self._all_changed.notify_all()

    def _stop_waiting(self, key: str, turn: threading.Lock) -> None:
        with self._guard:
            waiting = self._locks[key]
            if waiting and turn in waiting:
                waiting.remove(turn)
                return
        # It was handed over in the same moment.
        self.release((key,))


class Holding:
    """The locks of some keys, held inside a `with` block, which gives the keys."""

    __slots__ = ("_keys", "_locks")

    def __init__(self, locks: KeyLocks, keys: Sequence[str]) -> None:
        self._locks = locks
        self._keys = keys

    def __enter__(self) -> Sequence[str]:
        self._locks.acquire(self._keys)
        return self._keys

    def __exit__(self, *_error: object) -> None:
        self._locks.release(self._keys)
