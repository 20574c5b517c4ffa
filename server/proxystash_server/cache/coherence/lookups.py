"""Lookups of what L1 does not hold: found below, used, and copied into the faster tiers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from proxystash_server.cache.coherence.changes import Changes
from proxystash_server.cache.coherence.disk_cache import DiskCache
from proxystash_server.cache.coherence.reads import Reads
from proxystash_server.cache.coherence.uses import UseLog
from proxystash_server.cache.config import CacheTierType
from proxystash_server.cache.counting.statistics import StatisticsRecorder
from proxystash_server.cache.entry.entry import CacheEntry, Clock, used
from proxystash_server.cache.entry.limits import check_key
from proxystash_server.cache.errors import CacheUnavailableError
from proxystash_server.cache.ground.keylocks import KeyLocks
from proxystash_server.cache.tiers.base import Write
from proxystash_server.cache.tiers.memory import MemoryCacheTier

_MOST_POSTPONED: Final = 10_000


class Lookup(NamedTuple):
    """What a get found: the entry and the tier that held it, or two Nones for a miss."""

    entry: CacheEntry | None
    served_by: CacheTierType | None


_MISS = Lookup(None, None)


def found_in_l1(entry: CacheEntry) -> Lookup:
    """What a hit in memory is answered."""
    # On the path of every hit, and a third of what the generated constructor costs.
    return tuple.__new__(Lookup, (entry, CacheTierType.L1))


class LookupsBelow:
    """Looks up what L1 does not hold. Thread-safe.

    A lookup holds its key's lock while it reads and copies. It never waits for the change of another key:
    what would is postponed, and done by `make_up_for_postponed`.
    """

    def __init__(
        self,
        l1: MemoryCacheTier,
        uses: UseLog,
        cache: DiskCache,
        reads: Reads,
        changes: Changes,
        locks: KeyLocks,
        statistics: StatisticsRecorder,
        clock: Clock,
        check_open: Callable[[], None],
    ) -> None:
        self._l1 = l1
        self._uses = uses
        self._cache = cache
        self._reads = reads
        self._changes = changes
        self._locks = locks
        self._statistics = statistics
        self._clock = clock
        self._check_open = check_open
        # Keys whose copy into L2, or whose removal, was left undone. What falls off the end is done by a
        # later get, or by the cleaner.
        self._postponed: deque[str] = deque(maxlen=_MOST_POSTPONED)

    def lookup(self, key: str) -> Lookup:
        """The entry of a key after this use, and the tier that held it; raises as `Reads.below` does."""
        check_key(key)
        with self._locks.hold(key):
            self._check_open()
            l1 = self._l1
            now = self._clock()
            entry = l1.get(key)
            served_by: CacheTierType | None = None
            missed: list[CacheTierType] = []
            if entry is not None:
                # Another thread has promoted it while this one waited for the key. Or it has expired, or is
                # pushed out in this moment.
                hit = l1.use(key, now)
                if hit is not None:
                    return found_in_l1(hit)
                entry = l1.get(key)
            if entry is None:
                entry, served_by, missed = self._reads.below(key)
            if l1.enabled:
                missed.append(CacheTierType.L1)
            if entry is not None and entry.content.expires_at_us > now:
                return self._promote(entry, served_by, missed, now)
        if served_by is not None:
            missed.append(served_by)
        self._statistics.record_lookup(None, missed, 0)
        if entry is not None:
            self._expire(key)
        return _MISS

    def _promote(
        self, entry: CacheEntry, served_by: CacheTierType | None, missed: list[CacheTierType], now_us: int
    ) -> Lookup:
        """Use an entry once, and copy it into the faster tiers. Its key is locked."""
        entry = used(entry, now_us)
        # Before it is in memory, where the next use of it may come at once.
        self._uses.record_use(entry)
        promotions = 0
        cache = self._cache
        if served_by is not None and served_by is not cache.name and cache.works:
            if cache.tier.busy:
                self._postponed.append(entry.key)
            else:
                promotions += self._copy_into_cache(entry)
        if self._l1.enabled:
            self._changes.store_in_l1([entry])
            promotions += 1
        self._statistics.record_lookup(served_by, missed, promotions)
        return Lookup(entry, served_by)

    def _copy_into_cache(self, entry: CacheEntry) -> int:
        """Attempt to copy an entry into L2, and count what has to make room; how many copies that made."""
        worked, applied = self._cache.apply([Write(entry.key, entry, entry.version)])
        if worked:
            self._changes.count_demotions(self._cache.name, applied[0].evicted)
        return int(worked)

    def _expire(self, key: str) -> None:
        if self._changes.busy:
            self._postponed.append(key)
        else:
            self._changes.expire([key])

    def make_up_for_postponed(self) -> None:
        """Do what gets have left undone so far; takes the locks it needs."""
        for _ in range(len(self._postponed)):
            self._make_up_for(self._postponed.popleft())

    def _make_up_for(self, key: str) -> None:
        with self._locks.hold(key):
            try:
                entry = self._reads.current(key)
            except CacheUnavailableError:
                # A later get will come to the same.
                return
            expired = entry is not None and entry.expires_at_us <= self._clock()
            if entry is not None and not expired and self._cache.serves(key) and key not in self._cache.tier:
                self._statistics.record_promotions(self._copy_into_cache(entry))
        if expired:
            self._changes.expire([key])
