"""Uses of entries that have not reached the disk yet."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

from proxystash_server.cache.entry.entry import CacheEntry


class Use(NamedTuple):
    """How an entry stands after its last use, for the content that the write numbered `version` stored."""

    key: str
    version: int
    access_count: int
    last_accessed_us: int
    evicted_from_l1: bool


def combine(entry: CacheEntry, used: CacheEntry | None) -> CacheEntry:
    """The later of two states of an entry: as read from disk, and as the log had it."""
    if used is None or used.version != entry.version or used.access_count < entry.access_count:
        return entry
    return used


class UseLog:
    """The latest use of each entry used since the last flush, least recently used first.

    Every get writes here; disk tiers get it in batches. Whoever reads an entry from disk combines it with
    what stands here, so answers are exact although the disk lags. During a flush its batch stays visible
    until it is written; since it may be gone a moment later, a reader peeks before it reads the disk, or
    compares `flushes` around both. Thread-safe.

    `lock` is L1's too, since L1 writes here with each of its own changes: `waiting` and the methods named
    `note_...` are for it, and want the lock held by the caller.

    `has_uses` says whether an entry was used since the last flush: the order of eviction on disk is then out
    of date. `flushes` is how many flushes have written their batch: unchanged around a read of the disk,
    nothing left the log during it.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        # In the order of use: a key that is used again is taken out and put in anew, which costs less in a
        # plain dictionary than to move it in an ordered one. Always the same dictionary, which L1 keeps.
        self.waiting: dict[str, CacheEntry] = {}
        self._flushing: dict[str, CacheEntry] = {}
        self.flushes = 0
        self.has_uses = False

    def __len__(self) -> int:
        return len(self.waiting) + len(self._flushing)

    def record_use(self, entry: CacheEntry) -> None:
        """Note `entry` as its latest use left it."""
        with self.lock:
            self.note_use(entry.key, entry)

    def note_use(self, key: str, entry: CacheEntry) -> None:
        """Note the entry of `key` as its latest use left it."""
        waiting = self.waiting
        waiting.pop(key, None)
        waiting[key] = entry
        self.has_uses = True

    def note_demotion(self, entry: CacheEntry) -> None:
        """Note `entry` as it fell out of memory, which is no use of it."""
        self.waiting[entry.key] = entry

    def peek(self, key: str) -> CacheEntry | None:
        """What has happened to `key` since the last flush."""
        with self.lock:
            return self.waiting.get(key) or self._flushing.get(key)

    def discard(self, keys: Iterable[str]) -> None:
        """Forget keys whose entries are gone or replaced."""
        with self.lock:
            waiting, flushing = self.waiting, self._flushing
            for key in keys:
                waiting.pop(key, None)
                flushing.pop(key, None)

    def clear(self) -> None:
        """Forget everything."""
        with self.lock:
            self.waiting.clear()
            self._flushing.clear()

    def begin_flush(self, limit: int) -> list[Use]:
        """The oldest `limit` uses, to be written; one flush at a time (the caller's lock)."""
        with self.lock:
            for key in list(islice(self.waiting, limit)):
                self._flushing[key] = self.waiting.pop(key)
            self.has_uses = self.has_uses and bool(self.waiting)
            batch = list(self._flushing.items())
        return [
            Use(
                key,
                entry.content.version,
                entry.access_count,
                entry.last_accessed_us,
                entry.evicted_from_l1,
            )
            for key, entry in batch
        ]

    def end_flush(self, *, written: bool) -> None:
        """Forget the batch, or put back what could not be written and was not used again meanwhile."""
        with self.lock:
            if not written:
                # Before those that have come since, whose keys count as they are now.
                since = dict(self.waiting)
                self.waiting.clear()
                self.waiting.update((key, entry) for key, entry in self._flushing.items() if key not in since)
                self.waiting.update(since)
            self._flushing.clear()
            self.flushes += 1
