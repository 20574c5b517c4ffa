"""The three tiers as one: what goes in, what falls out, and what is left for later."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Final

from proxystash_server.cache.access_log import AccessLog, combine
from proxystash_server.cache.config import CacheTierType
from proxystash_server.cache.disk import Change, DiskTiers
from proxystash_server.cache.entry import CacheEntry, Clock, with_access
from proxystash_server.cache.errors import CacheUnavailableError
from proxystash_server.cache.keylocks import KeyLocks
from proxystash_server.cache.level import DiskLevel, DiskPair, WriteOutcome
from proxystash_server.cache.recovery import Recovery
from proxystash_server.cache.statistics import EvictionCause, StatisticsRecorder
from proxystash_server.cache.tiers.memory import MemoryCacheTier
from proxystash_server.cache.versions import Versions

# Writers wait for a batch: among a million entries, this one takes a tier a few milliseconds.
_FLUSH_BATCH: Final = 200
_MOST_POSTPONED: Final = 10_000


class TierStack:
    """L1, the two disk tiers and the access log, kept in step and counted.

    Unless it says otherwise, a method that names keys or entries wants their locks held by the caller, and
    takes none itself. `drop_evicted`, `maintain` and `flush_accesses` want no key locked or are indifferent.
    """

    def __init__(
        self,
        l1: MemoryCacheTier,
        pair: DiskPair,
        access_log: AccessLog,
        locks: KeyLocks,
        statistics: StatisticsRecorder,
        clock: Clock,
        keep_key_file: Callable[[], None],
    ) -> None:
        self.versions = Versions()
        self.l1 = l1
        self.disk = DiskTiers(pair, l1, self.versions)
        self._pair = pair
        self._recovery = Recovery(pair, l1, locks, self.versions, keep_key_file, self.drop_evicted)
        self.access_log = access_log
        self._locks = locks
        self._statistics = statistics
        self._l1_latency = statistics.latency(CacheTierType.L1, "write")
        self._clock = clock
        self._flush_lock = threading.Lock()
        # Keys whose removal or copy into L2 a get left undone, because it would have waited for the writes of
        # other keys. What falls off the end is done by a later get, or by the cleaner.
        self._to_make_up_for: deque[str] = deque(maxlen=_MOST_POSTPONED)

    # -- as a whole

    def open(self) -> None:
        """Open the disk tiers, and make them fit their configured sizes; raises StoreError."""
        self._recovery.open()
        self.trim()

    def close(self) -> None:
        """Flush and close the disk tiers."""
        self.flush_accesses()
        self.disk.close()

    def maintain(self) -> None:
        """One round of background work; takes the locks it needs."""
        self.flush_accesses()
        for _ in range(len(self._to_make_up_for)):
            self._make_up_for(self._to_make_up_for.popleft())
        self._recovery.maintain()

    def flush_accesses(self) -> None:
        """Bring the access counts that are only in memory to the disk tiers."""
        with self._flush_lock:
            # As many as there are now: what comes in meanwhile is for the next flush.
            for _ in range(0, len(self.access_log), _FLUSH_BATCH):
                written = False
                batch = self.access_log.begin_flush(_FLUSH_BATCH)
                try:
                    written = self.disk.touch(batch)
                finally:
                    self.access_log.end_flush(written=written)
                if not written:
                    return

    def entries(self) -> int:
        """How many distinct entries there are."""
        return self.disk.entries(self.sizes())

    def sizes(self) -> dict[CacheTierType, int]:
        """How many entries each tier holds."""
        return {CacheTierType.L1: self.l1.size(), **self.disk.sizes()}

    def expired_key_sources(self) -> Iterator[Callable[[int, int], list[str]]]:
        """What finds expired keys, as a tier's `expired_keys` does, one tier after the other.

        The authority knows of all, and has an index: the others are only asked if it fails or has missed
        something.
        """
        authority = self.disk.authority
        knows_all = False

        def find(level: DiskLevel, now_us: int, limit: int) -> list[str]:
            nonlocal knows_all
            worked, keys = level.attempt("read", [], level.tier.expired_keys, now_us, limit)
            knows_all = worked and level is authority and level.is_complete
            return keys

        for level in self.disk.levels[::-1]:
            if level.works and not knows_all:
                yield partial(find, level)
        if not knows_all:
            yield self.l1.expired_keys

    # -- one key

    def find(self, key: str) -> tuple[CacheEntry | None, CacheTierType | None, list[CacheTierType]]:
        """The entry as it is now, expired or not, the disk tier that had it, and those that did not."""
        entry = self.l1.get(key)
        return self.find_below(key) if entry is None else (entry, None, [])

    def find_below(
        self, key: str, *, to_change: bool = False
    ) -> tuple[CacheEntry | None, CacheTierType | None, list[CacheTierType]]:
        """As `find`, of a key that L1 does not hold."""
        while True:
            flushes = self.access_log.flushes
            entry, served_by, missed = self.disk.read(key, to_change=to_change)
            if entry is None:
                if not missed and not self.l1.enabled:
                    raise CacheUnavailableError("no tier is able to answer; try again")
                return None, None, missed
            entry = combine(entry, self.access_log.peek(key))
            # A flush in between may have hidden the counts from both.
            if flushes == self.access_log.flushes:
                return entry, served_by, missed

    def current(self, key: str) -> CacheEntry | None:
        """The entry as it is now, expired or not, for who is about to change it; not a use."""
        return self.l1.get(key) or self.find_below(key, to_change=True)[0]

    def failures_of(self, keys: Iterable[str]) -> dict[str, int]:
        """The failure counts of the live entries among `keys`, as far as the tiers can tell."""
        found: list[CacheEntry] = []
        below: list[str] = []
        for key in keys:
            entry = self.l1.get(key)
            if entry is None:
                below.append(key)
            else:
                found.append(entry)
        found += self.disk.failed_of(below)
        return {entry.key: entry.failure_count for entry in found if not self.is_expired(entry)}

    def write(self, changes: Sequence[Change]) -> WriteOutcome:
        """Make changes on disk; puts into L1 are the caller's, afterwards."""
        if self.access_log.has_uses and any(
            level.works and not level.tier.has_room_for(len(changes)) for level in self.disk.levels
        ):
            # Something may have to make room: let the tiers know first what was used last.
            self.flush_accesses()
        outcome = self.disk.write(changes)
        self.access_log.discard([key for key, _ in changes])
        return outcome

    def put_in_l1(self, *entries: CacheEntry) -> list[str]:
        """Store entries in memory, count what that pushes out, and return its keys."""
        started = time.perf_counter_ns()
        evicted = self.l1.store_many(entries)
        self._l1_latency.record(time.perf_counter_ns() - started)
        if evicted:
            demoted = len(evicted) if self.disk.authority is not None else 0
            self._statistics.record_evictions(
                EvictionCause.CAPACITY, {CacheTierType.L1: len(evicted)}, demotions=demoted
            )
        return evicted

    def rewrite(self, before: CacheEntry, changed: CacheEntry) -> WriteOutcome:
        """Replace an entry by a changed version of itself, which keeps the uses that come in meanwhile.

        Raises CacheUnavailableError if no tier could take the change.
        """
        outcome = self.disk.write([(changed.key, changed)])
        if not outcome.taken:
            raise CacheUnavailableError("no tier could take the change; try again")
        if self.l1.update(changed.key, changed) is not None:
            return outcome
        used = self.access_log.peek(changed.key)
        if used is not None and used.version == before.version and used.access_count > changed.access_count:
            # It fell out of memory after `before` was read.
            changed = with_access(changed, used.access_count, used.last_accessed_us, used.evicted_from_l1)
            self.access_log.record_use(changed)
        if not outcome.stored_in:
            # Memory is all that is left to keep it.
            self.put_in_l1(changed)
        return outcome

    def remove(self, keys: Sequence[str]) -> dict[CacheTierType, int]:
        """Take keys out of every tier; how many each tier lost.

        Raises CacheUnavailableError if no tier could take the change.
        """
        outcome = self.disk.write([(key, None) for key in keys])
        if not outcome.taken:
            raise CacheUnavailableError("no tier could take the change; try again")
        lost = {tier: count for tier, count in outcome.held.items() if count}
        self.access_log.discard(keys)
        in_l1 = sum(map(self.l1.delete, keys))
        return {CacheTierType.L1: in_l1, **lost} if in_l1 else lost

    def is_expired(self, entry: CacheEntry) -> bool:
        """Whether the entry has expired by the cache's clock."""
        return entry.expires_at_us <= self._clock()

    def remove_expired(self, keys: Sequence[str]) -> bool:
        """Take expired entries out of every tier, and count them; whether any tier lost one."""
        try:
            lost = self.remove(keys)
        except CacheUnavailableError:
            # They stay on disk, expired, and go when a tier works again.
            return False
        self._statistics.record_evictions(EvictionCause.TTL, lost)
        return bool(lost)

    def postponed(self, key: str) -> bool:
        """Whether work on disk copies of `key` was put off: a read must not wait for other keys' writes."""
        if self.disk.busy:
            self._to_make_up_for.append(key)
            return True
        return False

    def _make_up_for(self, key: str) -> None:
        outcome = WriteOutcome()
        with self._locks.hold(key):
            try:
                entry = self.current(key)
            except CacheUnavailableError:
                # A later get will come to the same.
                return
            if entry is not None and self.is_expired(entry):
                self.remove_expired([key])
            elif entry is not None and not self._l2_has(key):
                outcome = self.disk.promote(entry)
                self._statistics.record_promotions(len(outcome.stored_in))
        self.drop_evicted(outcome)

    def drop_evicted(self, outcome: WriteOutcome) -> None:
        """Count what had to make room on disk; what the slowest tier evicted leaves the faster ones too.

        Takes the locks of the evicted keys: the caller must hold none.
        """
        authority = self.disk.authority
        for tier, keys in outcome.evicted.items():
            if not keys:
                continue
            is_last = authority is not None and tier is authority.name
            self._statistics.record_evictions(
                EvictionCause.CAPACITY, {tier: len(keys)}, demotions=0 if is_last else len(keys)
            )
            if is_last:
                for key in keys:
                    self._drop_from_faster_tiers(key)

    def _drop_from_faster_tiers(self, key: str) -> None:
        authority = self.disk.authority
        with self._locks.hold(key):
            if authority is None or not authority.serves(key):
                return
            if key not in self.l1 and not self._l2_has(key):
                return
            worked, held = authority.attempt("read", True, authority.tier.__contains__, key)
            if worked and not held:
                try:
                    self._statistics.record_evictions(EvictionCause.CAPACITY, self.remove([key]))
                except CacheUnavailableError:
                    # Served from a faster tier for a little longer; nothing is wrong with it.
                    return

    def _l2_has(self, key: str) -> bool:
        l2 = self.disk.l2
        return l2.works and l2.attempt("read", False, l2.tier.__contains__, key)[1]

    def trim(self) -> None:
        """Evict what is over the configured sizes."""
        for level in self.disk.levels:
            if level.works:
                worked, evicted = level.attempt("write", [], level.tier.trim)
                if worked:
                    self.drop_evicted(WriteOutcome(evicted={level.name: evicted}))
