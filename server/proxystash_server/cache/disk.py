"""The two disk tiers together: the order of their changes, what each has missed, and how it catches up.

L3 is the authority. It takes a change first, and L2 after it; what L3 commits *announces* to L2 what it is
about to get. In between L2 may hold what L3 has replaced, which nobody reads: the key's lock is held until L2
has the change, and after a crash what was announced has been missed. When one of the two cannot take a
change, the key joins that tier's *backlog*, kept durably by the other in the same commit as the change. A
tier is never read for a key in its backlog, and the backlog is worked off from what the others hold.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from functools import partial

from proxystash.models import TierState
from proxystash_server.cache.access_log import Access
from proxystash_server.cache.config import CacheTierType
from proxystash_server.cache.entry import CacheEntry
from proxystash_server.cache.errors import CacheUnavailableError
from proxystash_server.cache.killpoints import reach
from proxystash_server.cache.level import DiskLevel, DiskPair, WriteOutcome
from proxystash_server.cache.tiers.base import EVERYTHING, CacheTier, EntryFilter, Page, Write
from proxystash_server.cache.versions import Versions

Change = tuple[str, CacheEntry | None]


class DiskTiers:
    """L2 and L3 as one store for the manager. Thread-safe.

    `write`, `promote` and `read` want the keys' locks held.
    """

    def __init__(self, pair: DiskPair, memory: CacheTier, versions: Versions) -> None:
        self._pair = pair
        self._memory = memory
        self._versions = versions
        # The faster tier, the database tier, and both of them, the faster first.
        self.l2, self.l3 = self.levels = pair.levels
        # The slowest tier that is switched on: what it evicts is gone from the cache.
        self.authority = next((level for level in self.levels[::-1] if level.enabled), None)

    @property
    def busy(self) -> bool:
        """Whether a write now would wait for another one."""
        return any(level.works and level.tier.busy for level in self.levels)

    # -- one key

    def read(
        self, key: str, *, to_change: bool = False
    ) -> tuple[CacheEntry | None, CacheTierType | None, list[CacheTierType]]:
        """The entry from the first tier that has it, which tier that was, and which ones did not have it.

        `to_change` is for who is about to change it. Raises CacheUnavailableError if none has it, and the
        slowest that should know failed: that is no miss.
        """
        missed: list[CacheTierType] = []
        failed = False
        for level in self._pair.levels:
            if level.serves(key):
                if to_change:
                    worked, entry = level.attempt("read", None, level.tier.get_to_change, key)
                else:
                    worked, entry = level.get(key)
                if entry is not None:
                    return entry, level.name, missed
                failed = not worked
                if worked:
                    missed.append(level.name)
        if failed:
            raise CacheUnavailableError("a tier that may hold the entry failed; try again")
        return None, None, missed

    def failed_of(self, keys: Sequence[str]) -> list[CacheEntry]:
        """The entries of `keys` that have failed before, as far as the tiers can tell, without using them."""
        found: list[CacheEntry] = []
        unknown = keys
        # Another order than that of a lookup: L3 has all of them, and finds those that have failed.
        for level in self.levels[::-1]:
            asked = unknown if level.is_complete else [key for key in unknown if level.serves(key)]
            if asked:
                worked, failed = level.attempt("read", {}, level.tier.failed_of, asked)
                found += failed.values()
                # A damaged record may have come to light, of which the other tier knows.
                if worked:
                    unknown = [] if level.is_complete else [key for key in unknown if not level.serves(key)]
        return found

    def promote(self, entry: CacheEntry) -> WriteOutcome:
        """Copy an entry that L3 has into L2, if L2 works."""
        outcome = WriteOutcome()
        if self.l2.serves(entry.key) and not self.l2.apply([Write(entry.key, entry)], outcome):
            self._pair.note_missed(self.l2, {entry.key: entry.version})
        return outcome

    # -- changes

    def write(self, changes: Sequence[Change]) -> WriteOutcome:
        """Make changes in both tiers, in the order that keeps them coherent.

        One that fails gets a backlog.
        """
        outcome = WriteOutcome()
        writes = [
            Write(key, entry, self._versions.next() if entry is None else entry.content.version)
            for key, entry in changes
        ]
        versions = {write.key: write.version for write in writes}
        l2, l3 = self.levels
        missed_by_l2, missed_by_l3 = l2.missed_of(versions), l3.missed_of(versions)
        reach("write.before")
        l3_took = l2_took = False
        l2_is_told = l2.works
        try:
            if l3.works:
                if l2_is_told:
                    l3.tier.announce(versions)
                l3_took = l3.apply(_for_backlog(writes) if l2.enabled and not l2_is_told else writes, outcome)
            reach("write.after_l3")
            if l3.enabled and not l3_took:
                l3.add_missed(versions)
            if l2_is_told:
                l2_took = l2.apply(_for_backlog(writes) if l3.enabled and not l3_took else writes, outcome)
                if l2_took:
                    l3.tier.arrived(versions)
                else:
                    self._pair.note_missed(l2, versions)
            elif l2.enabled:
                l2.add_missed(versions)
        except BaseException:
            # An interrupt: L2, and memory, may hold what L3 has replaced.
            self._leave_to_l3(versions, l3_took=l3_took)
            raise
        outcome.taken = l2_took or l3_took or self._is_kept_without_disk(changes)
        if not outcome.taken:
            self._take_back(versions, missed_by_l2, missed_by_l3)
        reach("write.after_l2")
        if l3_took and missed_by_l3:
            self._pair.settle(l3, missed_by_l3)
        if l2_took and missed_by_l2:
            self._pair.settle(l2, missed_by_l2)
        return outcome

    def clear(self) -> bool:
        """Empty both tiers; whether any took it, which otherwise changes nothing. Every key is locked."""
        mark = {EVERYTHING: self._versions.next()}
        away = [level for level in self.levels if level.enabled and not level.is_open]
        before = {level.name: level.missed_of(mark) for level in away}
        for level in away:
            # Before the other one is cleared: killed in between, nobody may believe what this one holds.
            self._pair.note_missed(level, mark)
        cleared = [level for level in self.levels if level.is_open and level.write(level.tier.clear)]
        if not cleared and self.authority is not None:
            for level in away:
                self._pair.settle(level, mark)
                self._pair.note_missed(level, before[level.name])
            return False
        for level in self.levels:
            if level in cleared:
                self._pair.settle(level, list(level.missed()))
            elif level.enabled and level not in away:
                self._pair.note_missed(level, mark)
        return True

    def note_loss(self, tier: CacheTierType, key: str) -> None:
        """A tier has lost the record of `key` to damage: the others' copy is to be brought back to it."""
        level = next(level for level in self.levels if level.name is tier)
        self._pair.note_missed(level, {key: self._versions.next()})

    def touch(self, accesses: Sequence[Access]) -> bool:
        """Store how entries were used; whether the log may forget it.

        A tier that is away is told when it is back. It is not marked: a use that was missed is no change that
        was missed.
        """
        working = [level for level in self.levels if level.works]
        if not working:
            return self.authority is None
        taken = [level.write(level.tier.touch, accesses) for level in working]
        for level in self.levels:
            if level.enabled and level not in working:
                level.add_missed_uses(accesses)
        return all(taken)

    def _is_kept_without_disk(self, changes: Sequence[Change]) -> bool:
        in_memory = self._memory.enabled and all(entry is not None for _, entry in changes)
        return in_memory or self.authority is None

    def _leave_to_l3(self, versions: Mapping[str, int], *, l3_took: bool) -> None:
        self.l2.add_missed(versions)
        if l3_took:
            for key in versions:
                self._memory.delete(key)

    def _take_back(
        self, versions: Mapping[str, int], missed_by_l2: Mapping[str, int], missed_by_l3: Mapping[str, int]
    ) -> None:
        """Nobody took the change, so nobody is to catch up on it: what was there stays.

        But whether one of the two was half done is not known. What memory does not hold either, L2 learns
        again from L3, unless L2 alone knew.
        """
        for level, missed in ((self.l2, missed_by_l2), (self.l3, missed_by_l3)):
            level.drop_missed(versions)
            level.add_missed(missed)
        if self.l2.enabled and self.l3.enabled:
            self.l2.add_missed(
                {
                    key: version
                    for key, version in versions.items()
                    if key not in missed_by_l3 and key not in self._memory
                }
            )

    # -- the store as a whole

    def close(self) -> None:
        """Close both tiers, with nothing announced that has arrived."""
        if self.l3.is_open:
            self.l3.tend(partial(self.l3.tier.settle, ()))
        self._pair.close()

    def scan(self, after: str, limit: int, entry_filter: EntryFilter, now_us: int) -> Page:
        """At most `limit` live entries in key order.

        Where the authority has missed something, the others fill the gaps.
        Raises CacheUnavailableError if a tier fails meanwhile: a list cut short would look like a whole one.
        """
        authority = self.authority
        if authority is not None and authority.is_complete:
            page = _scan(authority, after, limit, entry_filter, now_us)
            if authority.is_complete:
                return page
            # A damaged record came to light, which another tier may hold.
        pages = [_scan(level, after, limit, entry_filter, now_us) for level in self.levels if level.works]
        if self._memory.enabled:
            pages.insert(0, self._memory.scan(after, limit, entry_filter, now_us))
        return _merge(pages, limit)

    def sizes(self) -> dict[CacheTierType, int]:
        """How many entries each disk tier holds.

        What is being removed has left L3 first, and so counts in L2 no more.
        """
        sizes = {level.name: level.tier.size() for level in self.levels}
        if self.l3.works and self.l2.is_complete:
            sizes[self.l2.name] = min(sizes.values())
        return sizes

    def entries(self, sizes: Mapping[CacheTierType, int]) -> int:
        """How many distinct entries the working tiers hold, given how many each tier holds."""
        authority = self.authority
        if authority is not None and authority.works:
            return sizes[authority.name]
        return (
            max((sizes[level.name] for level in self.levels if level.works), default=0)
            or sizes[CacheTierType.L1]
        )

    def states(self) -> dict[CacheTierType, TierState]:
        """The state of each disk tier."""
        return {
            level.name: TierState.DISABLED
            if not level.enabled
            else TierState.ACTIVE
            if level.works
            else TierState.DEGRADED
            for level in self.levels
        }


def _scan(level: DiskLevel, after: str, limit: int, entry_filter: EntryFilter, now_us: int) -> Page:
    """A tier's page, without the entries that it may not be read for."""
    worked, page = level.attempt("read", None, level.tier.scan, after, limit, entry_filter, now_us)
    if not worked or page is None:
        raise CacheUnavailableError("a tier failed while its entries were listed; try again")
    return Page([entry for entry in page.entries if level.serves(entry.key)], page.next_after)


def _merge(pages: Sequence[Page], limit: int) -> Page:
    """The pages of several tiers, the fastest first, as far as all of them go."""
    ends = [page.next_after for page in pages if page.next_after is not None]
    end = min(ends, default=None)
    merged: list[CacheEntry] = []
    for entry in heapq.merge(*(page.entries for page in pages), key=lambda entry: entry.key):
        if end is not None and entry.key > end:
            break
        # Of equal keys the fastest tier's comes first.
        if not merged or merged[-1].key != entry.key:
            if len(merged) == limit:
                return Page(merged, merged[-1].key)
            merged.append(entry)
    return Page(merged, end)


def _for_backlog(writes: Sequence[Write]) -> list[Write]:
    """The same changes, marked as missed by the other disk tier."""
    return [Write(key, entry, version, True) for key, entry, version, _ in writes]
