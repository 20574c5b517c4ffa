"""The two disk tiers together: the order of their changes, what each has missed, and how it catches up.

L3 is the authority. At every moment, and so after a crash at any moment, L2 holds for a key what L3 holds,
or nothing: before a key changes in L3, L2 forgets it; afterwards L2 gets the new entry. When one of the two
cannot take a change, the key joins that tier's *backlog*, kept durably by the other in the same commit as
the change. A tier is never read for a key in its backlog, and the backlog is worked off from what the others
hold.

Changes are numbered, and the numbers grow, also across restarts. So a mark in a backlog that outlived its
cause is recognized: the tier has a later version by now, or the other tier's backlog has a later mark.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from proxystash.models import TierState
from proxystash_server.cache.access_log import Access
from proxystash_server.cache.config import CacheTierType
from proxystash_server.cache.entry import CacheEntry
from proxystash_server.cache.errors import StoreError, TierError
from proxystash_server.cache.keylocks import KeyLocks
from proxystash_server.cache.level import DiskLevel
from proxystash_server.cache.tiers.base import EVERYTHING, CacheTier, EntryFilter, Write

logger = logging.getLogger(__name__)

Change = tuple[str, CacheEntry | None]

_REPLAY_BATCH = 100
# A store that has worked without its partner: whatever that partner holds is out of date.
_ALONE = "alone"


@dataclass(slots=True)
class WriteOutcome:
    """Which disk tiers took a change, where its keys were held before, and which keys had to make room.

    By tier.
    """

    stored_in: list[CacheTierType] = field(default_factory=list)
    held: dict[CacheTierType, int] = field(default_factory=dict)
    held_keys: set[str] = field(default_factory=set)
    evicted: dict[CacheTierType, list[str]] = field(default_factory=dict)


class DiskTiers:
    """L2 and L3 as one store for the manager. Thread-safe.

    `write`, `promote` and `read` want the keys' locks held.
    """

    def __init__(
        self,
        l2: DiskLevel,
        l3: DiskLevel,
        locks: KeyLocks,
        memory: CacheTier,
        versions: Iterator[int],
    ) -> None:
        self.l2 = l2
        self.l3 = l3
        self._locks = locks
        self._memory = memory
        self._versions = versions

    @property
    def levels(self) -> tuple[DiskLevel, DiskLevel]:
        """Both tiers, the faster first."""
        return self.l2, self.l3

    @property
    def authority(self) -> DiskLevel | None:
        """The slowest tier that is switched on: what it evicts is gone from the cache."""
        return next((level for level in (self.l3, self.l2) if level.enabled), None)

    @property
    def busy(self) -> bool:
        """Whether a write now would wait for another one."""
        return any(level.works and level.tier.busy for level in self.levels)

    # -- opening and recovery

    def open(self) -> None:
        """Open both tiers. One that cannot be opened starts degraded.

        Raises StoreFormatError for a foreign one.
        """
        for level in self.levels:
            if level.enabled:
                try:
                    self._open(level)
                except TierError as error:
                    level.breaker.force_open()
                    logger.warning("tier degraded", extra=level.describe(error))
        if all(level.enabled and not level.breaker.is_open for level in self.levels):
            try:
                self._match_partners()
            except TierError as error:
                # Whichever of the two failed: without L2, what is served is L3's word alone.
                self.l2.breaker.force_open()
                logger.warning("tier degraded", extra=self.l2.describe(error))
        for level in self.levels:
            if level.enabled and not level.breaker.is_open:
                if not self._other(level).enabled and level.tier.partner_id != _ALONE:
                    level.write(level.tier.set_partner, _ALONE)
                self._replay(level)

    def close(self) -> None:
        """Close both tiers."""
        for level in self.levels:
            if level.enabled:
                level.tier.close()

    def maintain(self) -> None:
        """Probe what is degraded, work off backlogs, and give the tiers a slice of background work."""
        for level in self.levels:
            if level.enabled and level.breaker.begin_probe():
                recovered = False
                try:
                    recovered = self._recover(level)
                finally:
                    level.breaker.end_probe(recovered)
                if recovered:
                    logger.info("tier recovered", extra=level.describe())
            if level.enabled and not level.breaker.is_open:
                self._replay(level)
                level.write(level.tier.maintain)

    def _open(self, level: DiskLevel) -> None:
        level.tier.open()
        level.tier.probe()
        self._compare_marks(level)

    def _recover(self, level: DiskLevel) -> bool:
        try:
            level.tier.close()
            self._open(level)
            if self._other(level).enabled and not self._other(level).breaker.is_open:
                self._match_partners()
            return self._replay(level)
        except (TierError, StoreError):
            # Probed again after a longer pause; the fault was logged when the tier was degraded.
            return False

    def _compare_marks(self, level: DiskLevel) -> None:
        """Take over the marks for the other tier that `level` had on disk, where it missed nothing later."""
        other = self._other(level)
        marks = level.tier.backlog()
        here = level.missed()
        outdated = [key for key, version in marks.items() if here.get(key, 0) > version]
        for key in outdated:
            del marks[key]
        if outdated:
            level.tier.settle(outdated)
        other.add_missed(marks)
        overtaken = [key for key, version in here.items() if key in marks and marks[key] > version]
        self._settle(level, overtaken)

    def _match_partners(self) -> None:
        """Make sure, before either is read, that the two stores belong together and agree. Both are open."""
        l2, l3 = self.l2.tier, self.l3.tier
        if l2.partner_id == l3.store_id and l3.partner_id == l2.store_id:
            if l2.doubtful:
                self._drop_unconfirmed()
            return
        l3_is_new = not l3.partner_id and not l3.size()
        l2_went_on_alone = l2.partner_id == _ALONE and l3.partner_id == l2.store_id
        if l3_is_new or l2_went_on_alone:
            l3.clear()
            marks = l2.versions(l2.keys())
            # Marked before the stores are declared partners, so that a crash between the two starts over.
            l2.extend_backlog(marks)
            self._settle(self.l2, list(self.l2.missed()))
            self.l3.add_missed(marks)
        else:
            l2.clear()
            self._settle(self.l2, list(self.l2.missed()))
            self._settle(self.l3, list(self.l3.missed()))
        l2.set_partner(l3.store_id)
        l3.set_partner(l2.store_id)

    def _drop_unconfirmed(self) -> None:
        """Take out of L2 what L3 does not confirm to be the latest: its own log may have lost the end."""
        l2, l3 = self.l2.tier, self.l3.tier
        ahead = set(self.l3.missed())
        if EVERYTHING in ahead:
            return
        here = l2.versions([key for key in l2.keys() if key not in ahead])  # noqa: SIM118 -- no dict
        there = l3.versions(list(here))
        stale = [key for key, version in here.items() if version != there.get(key)]
        if stale:
            l2.apply([Write(key, None) for key in stale])

    def _replay(self, level: DiskLevel) -> bool:
        """Bring `level` up to date with its backlog; whether nothing failed. Keys out of reach stay in it."""
        cleared_at = level.missed().get(EVERYTHING)
        if cleared_at is not None:
            if not level.write(level.tier.clear_before, cleared_at):
                return False
            self._settle(level, [EVERYTHING])
        beyond_reach: set[str] = set()
        while waiting := [key for key in level.missed() if key not in beyond_reach]:
            for start in range(0, len(waiting), _REPLAY_BATCH):
                keys = waiting[start : start + _REPLAY_BATCH]
                with self._locks.hold_many(keys):
                    caught_up = self._replay_keys(level, keys)
                if caught_up is None:
                    return False
                beyond_reach.update(key for key in keys if key not in caught_up)
        return True

    def _replay_keys(self, level: DiskLevel, keys: Sequence[str]) -> set[str] | None:
        """Bring some keys up to date; those that are now, or None if the tier failed. The keys are locked."""
        other = self._other(level)
        missed = level.missed_of(keys)
        read, here = level.attempt("read", {}, level.tier.versions, keys)
        if not read:
            return None
        writes: list[Write] = []
        overtaken: list[str] = []
        for key in keys:
            if here.get(key, 0) >= missed.get(key, 0):
                # The mark outlived its cause: this tier went on, and perhaps the other one did not.
                overtaken.append(key)
                continue
            entry = self._memory.get(key)
            if entry is None and other.serves(key):
                read, entry = other.attempt("read", None, other.tier.get, key)
                if not read:
                    continue
            elif entry is None and other.enabled and not other.has_missed(key):
                continue
            writes.append(Write(key, entry, missed.get(key, 0)))
        if writes and not level.write(level.tier.apply, writes):
            return None
        if level is self.l3:
            self._forget_outdated(overtaken, here)
        caught_up = {*overtaken, *(write.key for write in writes)}
        self._settle(level, caught_up)
        return caught_up

    def _forget_outdated(self, keys: Sequence[str], in_l3: Mapping[str, int]) -> None:
        if keys and self.l2.works:
            _, in_l2 = self.l2.attempt("read", {}, self.l2.tier.versions, keys)
            outdated = [Write(key, None) for key, version in in_l2.items() if version != in_l3.get(key)]
            if outdated and not self.l2.write(self.l2.tier.apply, outdated):
                self._note_missed(self.l2, {write.key: in_l3[write.key] for write in outdated})

    def _settle(self, level: DiskLevel, keys: Iterable[str]) -> None:
        settled = level.drop_missed(keys)
        other = self._other(level)
        if settled and other.enabled and not other.breaker.is_open:
            # If this fails, the marks stay on disk; after a restart they are recognized as outlived.
            other.write(other.tier.settle, settled)

    def _other(self, level: DiskLevel) -> DiskLevel:
        return self.l3 if level is self.l2 else self.l2

    # -- one key

    def read(self, key: str) -> tuple[CacheEntry | None, CacheTierType | None, list[CacheTierType]]:
        """The entry from the first tier that has it, which tier that was, and which ones did not have it."""
        missed: list[CacheTierType] = []
        for level in self.levels:
            if level.serves(key):
                worked, entry = level.attempt("read", None, level.tier.get, key)
                if entry is not None:
                    return entry, level.name, missed
                if worked:
                    missed.append(level.name)
        return None, None, missed

    def promote(self, entry: CacheEntry) -> WriteOutcome:
        """Copy an entry that L3 has into L2, if L2 works."""
        outcome = WriteOutcome()
        if self.l2.serves(entry.key):
            worked, applied = self.l2.attempt("write", [], self.l2.tier.apply, [Write(entry.key, entry)])
            if worked:
                outcome.stored_in.append(self.l2.name)
                outcome.evicted[self.l2.name] = list(applied[0].evicted)
            else:
                self._note_missed(self.l2, {entry.key: entry.version})
        return outcome

    # -- changes

    def write(self, changes: Sequence[Change]) -> WriteOutcome:
        """Make changes in both tiers, in the order that keeps them coherent.

        One that fails gets a backlog.
        """
        outcome = WriteOutcome()
        versions = {key: next(self._versions) if entry is None else entry.version for key, entry in changes}
        before = {level.name: level.missed_of(versions) for level in self.levels}
        # What L3 has missed only L2 holds, and must not forget before L3 has taken its successor.
        l3_missed = before[self.l3.name]
        l3_took = l2_took = False
        l2_is_told = self.l2.works
        if self.l3.works:
            l2_is_told = l2_is_told and self._forget_in_l2(
                [key for key in versions if key not in l3_missed], outcome
            )
            mark = self.l2.enabled and not l2_is_told
            l3_took = self._apply(
                self.l3,
                [Write(key, entry, versions[key], for_backlog=mark) for key, entry in changes],
                outcome,
            )
        if self.l3.enabled and not l3_took:
            self.l3.add_missed(versions)
        if self.l2.enabled and not l2_is_told:
            self.l2.add_missed(versions)
        elif self.l2.enabled:
            # L2 has forgotten the keys already: a removal is told again only where that was not so.
            writes = [
                Write(key, entry, versions[key], for_backlog=self.l3.enabled and not l3_took)
                for key, entry in changes
                if entry is not None or not l3_took or key in l3_missed
            ]
            l2_took = not writes or self._apply(self.l2, writes, outcome)
            if not l2_took:
                self._note_missed(self.l2, versions)
        if not (l2_took or l3_took or self._memory.enabled):
            # Nobody took it, so nobody may catch up on it: what was there before stays.
            self._take_back(versions, before)
        if l3_took:
            self._settle(self.l3, list(versions))
        if l2_took:
            self._settle(self.l2, list(versions))
        return outcome

    def clear(self) -> None:
        """Empty both tiers; the caller holds every key's lock."""
        version = next(self._versions)
        for level in self.levels:
            if level.enabled:
                if not level.breaker.is_open and level.write(level.tier.clear):
                    self._settle(level, list(level.missed()))
                else:
                    self._note_missed(level, {EVERYTHING: version})

    def touch(self, accesses: Sequence[Access]) -> bool:
        """Store how entries were used; whether the log may forget it. A tier that fails catches up later."""
        took = [level for level in self.levels if level.works and level.write(level.tier.touch, accesses)]
        enabled = [level for level in self.levels if level.enabled]
        if took:
            for level in enabled:
                if level not in took:
                    self._note_missed(level, {access.key: access.version for access in accesses})
        return bool(took) or not enabled

    def _forget_in_l2(self, keys: Sequence[str], outcome: WriteOutcome) -> bool:
        l2 = self.l2.tier

        def forget() -> list[str]:
            held = [key for key in keys if key in l2]
            if held:
                l2.apply([Write(key, None) for key in held])
            return held

        worked, held = self.l2.attempt("write", [], forget)
        outcome.held[self.l2.name] = len(held)
        outcome.held_keys.update(held)
        return worked

    def _apply(self, level: DiskLevel, writes: Sequence[Write], outcome: WriteOutcome) -> bool:
        worked, applied = level.attempt("write", [], level.tier.apply, writes)
        if not worked:
            return False
        outcome.stored_in.append(level.name)
        held = {write.key for write, one in zip(writes, applied, strict=True) if one.existed}
        outcome.held[level.name] = outcome.held.get(level.name, 0) + len(held)
        outcome.held_keys |= held
        outcome.evicted[level.name] = [key for one in applied for key in one.evicted]
        return True

    def _take_back(self, keys: Iterable[str], before: Mapping[CacheTierType, Mapping[str, int]]) -> None:
        for level in self.levels:
            level.drop_missed(keys)
            level.add_missed({key: before[level.name][key] for key in keys if key in before[level.name]})

    def _note_missed(self, level: DiskLevel, marks: Mapping[str, int]) -> None:
        """Put changes on a tier's backlog after the fact, in a commit of their own."""
        level.add_missed(marks)
        other = self._other(level)
        if other.enabled and not other.breaker.is_open:
            other.write(other.tier.extend_backlog, marks)

    # -- the store as a whole

    def page(self, after: str, limit: int, entry_filter: EntryFilter, now_us: int) -> list[CacheEntry]:
        """Live entries in key order.

        Where the authority has missed something, the other tiers fill the gaps.
        """
        authority = self.authority
        if authority is not None and authority.is_complete:
            worked, entries = authority.attempt(
                "read", [], authority.tier.page, after, limit, entry_filter, now_us
            )
            if worked:
                return entries
        streams = [
            _stream(self._memory, lambda _key: self._memory.enabled, after, limit, entry_filter, now_us)
        ]
        streams += [
            _stream(level.tier, level.serves, after, limit, entry_filter, now_us)
            for level in self.levels
            if level.works
        ]
        merged: list[CacheEntry] = []
        for entry in heapq.merge(*streams, key=lambda entry: entry.key):
            # Of equal keys the fastest tier's comes first.
            if not merged or merged[-1].key != entry.key:
                if len(merged) == limit:
                    break
                merged.append(entry)
        return merged

    def entries(self, in_memory: int) -> int:
        """How many distinct entries the working tiers hold."""
        sizes = [level.tier.size() for level in (self.l3, self.l2) if level.works]
        if not sizes:
            return in_memory
        authority = self.authority
        return sizes[0] if authority is not None and authority.works else max(sizes[0], in_memory)

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


def _stream(
    tier: CacheTier,
    serves: Callable[[str], bool],
    after: str,
    limit: int,
    entry_filter: EntryFilter,
    now_us: int,
) -> Iterator[CacheEntry]:
    """A tier's entries page by page, without those it may not be read for.

    Ends early where the tier fails.
    """
    while True:
        try:
            entries = tier.page(after, limit, entry_filter, now_us)
        except TierError:
            return
        yield from (entry for entry in entries if serves(entry.key))
        if len(entries) < limit:
            return
        after = entries[-1].key
