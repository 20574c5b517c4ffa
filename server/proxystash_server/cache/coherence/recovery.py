"""How the disk tiers are opened, what is believed of them, and how they are brought up to date after a fault.

L3 decides. L2 is believed after an orderly end alone, if it says so itself, and L3 agrees that this is its
cache and that nothing has changed since; otherwise it starts empty. Before that it is the source from which
an L3 that was lost, damaged or set back gets what it lacks. docs/architecture.md has this step by step.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from proxystash_server.cache.coherence.authority import Authority, newest
from proxystash_server.cache.coherence.changes import Changes, batches
from proxystash_server.cache.coherence.disk_cache import DiskCache
from proxystash_server.cache.coherence.earlier_formats import (
    forget_inherited,
    inherit_from_cache,
    inherited_by_authority,
)
from proxystash_server.cache.coherence.guard import GuardedTier
from proxystash_server.cache.coherence.missed import MissedChanges
from proxystash_server.cache.coherence.reads import Reads
from proxystash_server.cache.config import CacheTierType
from proxystash_server.cache.entry.entry import CacheEntry
from proxystash_server.cache.errors import StoreError, TierError, tier_error
from proxystash_server.cache.ground.killpoints import kill_point
from proxystash_server.cache.key_file import KeyFile
from proxystash_server.cache.store_lock import StoreLock
from proxystash_server.cache.tiers.base import Write, evicted_by
from proxystash_server.cache.tiers.memory import MemoryCacheTier

logger = logging.getLogger(__name__)


class Recovery:
    """Opens, probes, matches, refills and catches up. Called by one thread at a time."""

    def __init__(
        self,
        authority: Authority,
        cache: DiskCache,
        l1: MemoryCacheTier,
        changes: Changes,
        reads: Reads,
        lock: StoreLock,
        key_file: KeyFile | None,
    ) -> None:
        self._authority = authority
        self._missed: MissedChanges = authority.missed
        self._cache = cache
        self._l1 = l1
        self._changes = changes
        self._reads = reads
        self._lock = lock
        self._key_file = key_file
        self._is_store_lost = False
        # What L2 said of itself when it was opened, until L3 could be asked whether that holds.
        self._sealed_at: int | None = None
        self._cache_version = 0
        self._missed_version = 0
        self._matched = False
        # What L3 was before it failed, by which a file that was put in its place is recognized.
        self._known_id: object = None
        self._known_version = 0

    # -- start and end

    def open(self) -> int:
        """Open everything; how many lines of the journal are damaged. What cannot be opened is skipped.

        Raises StoreError for a store that must not be opened, having closed the others.
        """
        if not self._authority.enabled:
            return 0
        damaged = 0
        try:
            damaged = self._missed.open()
            self._missed_version = self._missed.last_version
            self._changes.continue_after(self._missed_version)
            for guard in self._reads.guards:
                if guard.enabled:
                    with self._giving_up(guard, goes_on=True):
                        self._open(guard)
            if self._cache.works:
                with self._giving_up(self._cache.guard, goes_on=True):
                    self._look_at_cache()
            if self._authority.guard.is_open:
                with suppress(TierError):
                    # Whichever failed has been given up.
                    self._match()
        except StoreError:
            self._close_tiers()
            raise
        guard = self._authority.guard
        if guard.is_open:
            self._catch_up()
        if guard.is_lost and guard.breaker.begin_probe(at_once=True):
            # Damage that has only just come to light: opened again, it is what can be saved of it.
            self._probe(guard, self._recover_authority)
        self._renew_cache()
        self._name_cache()
        with self._changes.lock:
            self._trim()
        return damaged

    def make_up_for_what_was_missed(self) -> None:
        """Bring the authority what it has missed, or as much as can be done while it is skipped."""
        if self._authority.enabled and not (self._authority.guard.is_open and self._catch_up()):
            self._save_what_is_unsaved()

    def close(self) -> int:
        """Close everything, with L2 sealed if it holds what it should; how many entries are lost by that.

        Those were kept in memory alone, since nobody could write them down. Everything is locked.
        """
        authority, cache = self._authority, self._cache
        lost = len(self._missed.unsaved_keys())
        if lost:
            logger.critical(
                "entries that no disk could take are lost with the memory they were kept in",
                extra={"entries": lost},
            )
        if authority.enabled and self._has_store():
            self._look_after_key()
            version = max(authority.tier.last_version, self._missed.last_version)
            if not self._matched:
                # L3 was never there to be asked: what L2 was still goes for it, and what came since.
                version = max(self._sealed_at or 0, self._missed.last_version)
            if cache.works and not cache.doubted and (self._matched or self._sealed_at is not None):
                cache.guard.write(cache.tier.seal, version)
        self._close_tiers()
        return lost

    def _close_tiers(self) -> None:
        for guard in self._reads.guards:
            if guard.enabled:
                guard.tier.close()
        self._missed.close()

    def _trim(self) -> None:
        """Evict what is over the configured sizes."""
        guard = self._authority.guard
        if guard.is_open:
            _, evicted = guard.attempt("write", [], guard.tier.trim)
            self._changes.drop_evicted(evicted)
        if self._cache.works:
            _, evicted = self._cache.guard.attempt("write", [], self._cache.tier.trim)
            self._changes.count_demotions(self._cache.name, evicted)

    # -- background work

    def maintain(self) -> None:
        """Probe what is skipped, bring up to date what is behind, and let the tiers do their upkeep."""
        if not self._authority.enabled or not self._has_store():
            return
        self._look_after_key()
        guard = self._authority.guard
        if guard.enabled and guard.breaker.begin_probe():
            self._probe(guard, self._recover_authority)
        self.make_up_for_what_was_missed()
        if guard.is_open:
            self.refill()
            guard.maintain()
        cache = self._cache
        if cache.guard.enabled and cache.guard.breaker.begin_probe():
            self._probe(cache.guard, self._recover_cache)
        self._renew_cache()
        if cache.works:
            self._drop_doubted()
            self._name_cache()
            cache.guard.maintain()

    def _probe(self, guard: GuardedTier[Any], recover: Callable[[], bool]) -> None:
        recovered = False
        try:
            with suppress(TierError, StoreError):
                # Probed again after a longer pause; the fault was logged when the tier was degraded.
                recovered = recover()
        finally:
            guard.breaker.end_probe(recovered)
        if recovered:
            logger.info("tier recovered", extra=guard.describe())

    def _look_after_key(self) -> None:
        if self._key_file is not None:
            self._key_file.look_after()

    def _has_store(self) -> bool:
        """Whether the data directory is still the one that is locked; if not, the disk tiers are given up."""
        try:
            self._lock.check()
        except OSError as error:
            if not self._is_store_lost:
                logger.critical(
                    "the data directory is lost: nothing is written to disk until it is back in its place",
                    extra={"path": str(self._lock.path), "error": error.strerror},
                )
            self._is_store_lost = True
            for guard in self._reads.guards:
                if guard.enabled:
                    guard.give_up(tier_error(error))
            return False
        if self._is_store_lost:
            logger.info("the data directory is back", extra={"path": str(self._lock.path)})
        self._is_store_lost = False
        return True

    def _open(self, guard: GuardedTier[Any]) -> None:
        try:
            self._lock.check()
            if guard.name is CacheTierType.L3:
                self._lock.check_database()
        except OSError as error:
            raise tier_error(error) from error
        if self._key_file is not None:
            self._key_file.keep()
        guard.tier.open()
        guard.tier.probe()
        if guard.name is CacheTierType.L3:
            self._lock.note_database()
        self._changes.continue_after(guard.tier.last_version)

    def _reopen(self, guard: GuardedTier[Any]) -> None:
        # Nothing begins to use a tier whose breaker is open.
        with self._changes.lock:
            self._changes.wait_for_reads()
        guard.tier.close()
        self._open(guard)

    def _recover_authority(self) -> bool:
        tier = self._authority.tier
        self._known_version = max(self._known_version, tier.last_version)
        self._reopen(self._authority.guard)
        with self._changes.lock:
            if self._matched:
                self._welcome_back()
            else:
                self._match()
            self._known_version = tier.last_version
        return self._catch_up()

    def _recover_cache(self) -> bool:
        self._reopen(self._cache.guard)
        self._cache.tier.break_seal()
        self._start_cache_anew()
        self._sealed_at = None
        return True

    # -- what is believed

    def _look_at_cache(self) -> None:
        """Take down what L2, just opened, says of itself."""
        tier = self._cache.tier
        self._sealed_at = tier.break_seal()
        self._cache.believed = self._sealed_at is not None
        inherit_from_cache(tier, self._missed)
        self._missed_version = self._missed.last_version
        self._cache_version = tier.last_version

    def _match(self) -> None:
        """Decide, now that the authority is open, what of L2 is believed. Nothing has been read of it before.

        Gives up what fails; raises TierError if that is the authority.
        """
        tier = self._authority.tier
        with self._giving_up(self._authority.guard):
            inherited = inherited_by_authority(tier, self._missed)
            if self._cache.guard.is_open:
                self._match_cache()
            if not self._cache.works:
                self._go_on_without_cache()
        self._known_id = tier.notes.get("id")
        self._matched = True
        self._authority.made_good = self._authority.last_damage
        for key, version in inherited.items():
            self._missed.drop_older(key, version)

    def _match_cache(self) -> None:
        """Believe L2 or not, and fill up L3 from it where it knows more."""
        l3, l2 = self._authority.tier, self._cache.tier
        in_l2 = self._keys_of_cache()
        if in_l2 is None:
            return
        owner = l3.notes.get("cache_id")
        # A new L3 has no cache yet: then L2 is all there is.
        is_its_own = owner in (l2.notes["id"], None)
        was_alone = is_its_own and bool(l2.notes.get("alone"))
        if was_alone:
            # L2 went on without L3, and decided.
            l3.note(incomplete=1)
            l3.clear()
        known = max(l3.last_version, self._missed_version)
        if is_its_own and l3.notes.get("incomplete"):
            # What L3 lacks, it gets; what it has a later version of, L2 forgets: then they agree.
            outdated = self._fill_up(in_l2)
            with self._giving_up(self._cache.guard, goes_on=True):
                l2.apply([Write(key, None) for key in outdated])
                if was_alone:
                    l2.note(alone=None)
            self._cache.believed = True
        elif is_its_own and self._sealed_at == known:
            self._cache.believed = True
        else:
            if (is_its_own or (not owner and l2.notes.get("alone"))) and self._cache_version > known:
                # L3 was set back: an old copy, or one that has lost its log. Or L2 decided for a while
                # although it did not have all that it should: what it took then, it alone has.
                self._fill_up(in_l2, known + 1)
            self._stop_believing_cache()
        if self._cache.works and (l3.notes.get("incomplete") or owner != l2.notes["id"]):
            l3.note(cache_id=l2.notes["id"], incomplete=None)

    def _go_on_without_cache(self) -> None:
        tier = self._authority.tier
        if self._authority.guard is self._reads.guards[0]:
            # L2 decides while L3 is switched off.
            if not tier.notes.get("alone") or tier.notes.get("incomplete"):
                tier.note(alone=1, incomplete=None, inherited=None, partner=None)
        elif tier.notes.get("cache_id") != "" or tier.notes.get("incomplete"):
            # L2 is switched off, out of reach or not believed: it is emptied before it serves.
            tier.note(cache_id="", incomplete=None)

    @contextmanager
    def _giving_up(self, guard: GuardedTier[Any], *, goes_on: bool = False) -> Iterator[None]:
        """Give up a tier that fails inside the block, and go on without it or raise TierError."""
        try:
            yield
        except TierError as error:
            guard.give_up(error)
            if not goes_on:
                raise

    def _welcome_back(self) -> None:
        """L3 is back, perhaps as another one: whatever L1 and L2 hold was right."""
        tier = self._authority.tier
        if tier.notes.get("id") != self._known_id and not tier.notes.get("incomplete"):
            # A store of somebody else, which decides from now on.
            self._stop_believing_cache()
            self._changes.tell_reset()
        elif tier.last_version < self._known_version or tier.notes.get("incomplete"):
            self.fill_up_locked()
            self._changes.tell_reset()
        if self._authority.guard is self._reads.guards[0]:
            # An L2 that decides goes on under its name, by which L3 knows it when that is switched on.
            tier.note(id=self._known_id, alone=1)
            return
        self._known_id = tier.notes.get("id")
        trusted = self._cache.works and not self._cache.doubted
        cache_id = self._cache.tier.notes["id"] if trusted else ""
        if tier.notes.get("cache_id") != cache_id:
            tier.note(cache_id=cache_id)

    def _start_cache_anew(self) -> None:
        """Empty L2 and give it another name. Raises TierError."""
        tier = self._cache.tier
        if tier.size() or tier.notes.get("alone"):
            tier.clear()
            tier.note(id=uuid.uuid4().hex, alone=None, incomplete=None)
        self._cache.doubted.clear()
        self._cache.believed = True

    def _renew_cache(self) -> None:
        """Empty an L2 that is not believed, which nobody uses until then."""
        if self._matched and self._cache.guard.is_open and not self._cache.believed:
            kill_point("match.before_clear")
            with self._giving_up(self._cache.guard, goes_on=True):
                self._start_cache_anew()

    def _name_cache(self) -> None:
        """Have L3 note that L2 has all that it should."""
        with self._changes.lock:
            if self._cache.works and self._authority.works and not self._cache.doubted:
                name = self._cache.tier.notes["id"]
                if self._authority.tier.notes.get("cache_id") != name:
                    self._authority.guard.write(self._authority.tier.note, cache_id=name)

    def _stop_believing_cache(self) -> None:
        """Neither L2 nor what memory has from it counts any more, but for what L3 has missed."""
        self._cache.believed = False
        # Whoever has read it by now has brought that into memory.
        self._changes.wait_for_reads()
        for key in self._l1.keys():  # noqa: SIM118 -- no dict
            if not self._missed.covers(key):
                self._l1.delete(key)

    # -- filling up

    def refill(self) -> bool:
        """Give L3, if it has lost rows, what L1 and L2 still have of them; whether that worked."""
        with self._changes.lock:
            try:
                if self._authority.is_incomplete:
                    self.fill_up_locked()
                    self._changes.tell_reset()
            except TierError:
                # Tried again in the next round of maintenance.
                return False
        return True

    def fill_up_locked(self) -> None:
        """The same, for whoever keeps changes out. Raises TierError."""
        authority = self._authority
        damage = authority.last_damage
        in_l2 = (self._keys_of_cache() if self._cache.works else None) or []
        self._fill_up(dict.fromkeys([*self._l1.keys(), *in_l2]))
        authority.made_good = damage
        if authority.last_damage is damage:
            authority.tier.note(incomplete=None)

    def _fill_up(self, keys: Iterable[str], since: int = 0) -> list[str]:
        """Store in L3 what L1 or L2 hold of these keys, where L3 has nothing or something older.

        Of versions from `since` on. The keys of which L3 has something newer, or has missed it. Raises
        TierError.
        """
        tier, missed = self._authority.tier, self._missed
        outdated: list[str] = []
        for batch in batches(keys):
            with self._changes.lock_keys(batch):
                held = tier.versions(batch)
                writes = []
                for key in batch:
                    entry = self._in_faster_tiers(key)
                    if entry is None or entry.version < since:
                        continue
                    latest = max(held.get(key, -1), missed.version_of(key), missed.cleared_at)
                    if entry.version < latest:
                        outdated.append(key)
                    elif entry.version != held.get(key):
                        writes.append(Write(key, entry, entry.version))
                if writes:
                    kill_point("fill_up.before_batch")
                    self._changes.drop_evicted(evicted_by(writes, tier.apply(writes)), batch)
        return outdated

    def _keys_of_cache(self) -> list[str] | None:
        """The keys that L2 holds; None if it cannot say, and is given up."""
        try:
            return self._cache.tier.keys()
        except TierError as error:
            self._cache.guard.give_up(error)
            return None

    def _in_faster_tiers(self, key: str) -> CacheEntry | None:
        entry = self._l1.get(key)
        if entry is None and self._cache.guard.is_open and key not in self._cache.doubted:
            worked, entry = self._cache.guard.get(key)
            if not worked:
                raise TierError("a tier failed that may hold the entry")
        return entry

    # -- catching up

    def _catch_up(self) -> bool:
        """Bring L3 what it has missed; whether nothing failed."""
        missed, guard = self._missed, self._authority.guard
        if missed.cleared_at:
            with self._changes.lock:
                if not guard.write(guard.tier.clear_before, missed.cleared_at):
                    return False
                missed.cleared()
        # The journal first, where it has something older, which a crash would bring back.
        self._save_what_is_unsaved()
        for batch in batches(missed.keys()):
            with self._changes.lock, self._changes.lock_keys(batch):
                batch = [key for key in batch if missed.covers(key) and not missed.has_older_line(key)]
                try:
                    writes = {key: self._missed_write(key) for key in batch}
                except TierError:
                    return False
                made = {key: write for key, write in writes.items() if write is not None}
                worked, committed = guard.attempt("write", None, guard.tier.commit, list(made), newest(made))
                if not worked or committed is None:
                    return False
                is_lost = any(
                    write is None or write.version < missed.version_of(write.key) for write in writes.values()
                )
                missed.mark_applied(writes)
                if is_lost:
                    self._changes.tell_reset()
                self._changes.drop_evicted(evicted_by(*committed), batch)
        with self._changes.lock, suppress(TierError):
            # What stays is gone through again, which does no harm.
            missed.finish()
        if not missed.pending:
            forget_inherited(guard)
        uses = missed.take_uses()
        if uses and not guard.write(guard.tier.note_uses, uses):
            missed.add_uses(uses)
            return False
        return True

    def _missed_write(self, key: str) -> Write | None:
        return self._write_in_memory(key) or self._missed.write_of(key)

    def _write_in_memory(self, key: str) -> Write | None:
        """The last missed change of a key, if memory has what it stored."""
        entry = self._l1.get(key)
        if entry is None or entry.version != self._missed.version_of(key):
            return None
        return Write(key, entry, entry.version)

    def _save_what_is_unsaved(self) -> None:
        """Write into the journal what stands in memory alone, if that works by now."""
        for batch in batches(self._missed.unsaved_keys()):
            with self._changes.lock, self._changes.lock_keys(batch):
                writes = {key: self._write_in_memory(key) for key in batch if self._missed.is_unsaved(key)}
                made = [write for write in writes.values() if write is not None]
                self._missed.forget_unsaved(key for key, write in writes.items() if write is None)
                if len(made) < len(writes):
                    self._changes.tell_reset()
                with suppress(TierError):
                    self._missed.append(made)

    def _drop_doubted(self) -> None:
        for batch in batches(list(self._cache.doubted)):
            with self._changes.lock, self._changes.lock_keys(batch):
                self._cache.drop_doubted(batch)
