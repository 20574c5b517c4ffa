"""Reading below L1: who is asked for an entry, in which order, and who is not."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from proxystash_server.cache.coherence.authority import Authority
from proxystash_server.cache.coherence.disk_cache import DiskCache
from proxystash_server.cache.coherence.guard import GuardedTier
from proxystash_server.cache.coherence.uses import UseLog, combine
from proxystash_server.cache.config import CacheTierType
from proxystash_server.cache.counting.statistics import TierState
from proxystash_server.cache.entry.entry import CacheEntry
from proxystash_server.cache.errors import CacheUnavailableError, TierError
from proxystash_server.cache.ground.parsing import UNREADABLE
from proxystash_server.cache.tiers.base import DiskTier, EntryFilter, Page
from proxystash_server.cache.tiers.memory import MemoryCacheTier

Found = tuple[CacheEntry | None, CacheTierType | None, list[CacheTierType]]


class Reads:
    """L1, L2 and the authority as they are asked. Thread-safe; changes nothing.

    The keys of lookups are locked by the caller. What the authority has missed is read from its journal;
    for a key whose change it has missed nobody else is asked.
    """

    def __init__(
        self,
        l1: MemoryCacheTier,
        uses: UseLog,
        cache: DiskCache,
        authority: Authority,
        disk_tiers: Sequence[GuardedTier[Any]],
    ) -> None:
        self._l1 = l1
        self._uses = uses
        self._cache = cache
        self._authority = authority
        # L2 and L3, whatever part they play.
        self.guards = disk_tiers

    # -- one key

    def current(self, key: str) -> CacheEntry | None:
        """The entry as it is now, expired or not; not a use. Raises CacheUnavailableError."""
        return self._l1.get(key) or self.below(key)[0]

    def below(self, key: str) -> Found:
        """The entry of a key that L1 does not hold, expired or not; which tier had it, and which did not.

        Raises CacheUnavailableError if none has it, and the slowest that should know failed: that is no miss.
        """
        uses = self._uses
        while True:
            flushes = uses.flushes
            entry, served_by, passed = self._on_disk(key)
            if entry is None:
                if not passed and not self._l1.enabled and served_by is None:
                    raise CacheUnavailableError("no tier is able to answer; try again")
                return None, None, passed
            entry = combine(entry, uses.peek(key))
            # A flush in between may have hidden the counts from both.
            if flushes == uses.flushes:
                return entry, served_by, passed

    def _on_disk(self, key: str) -> Found:
        cache, authority = self._cache, self._authority
        if authority.missed.pending and authority.missed.covers(key):
            return self._missed(key), authority.name, []
        passed: list[CacheTierType] = []
        failed = False
        if cache.serves(key):
            worked, entry = cache.guard.get(key)
            if entry is not None:
                return entry, cache.name, passed
            failed = not worked
            if worked:
                passed.append(cache.name)
        if authority.works:
            guard = authority.guard
            worked, entry = guard.get(key)
            if entry is not None:
                return entry, guard.name, passed
            failed = not worked
            if worked:
                passed.append(guard.name)
        if failed:
            raise CacheUnavailableError("a tier that may hold the entry failed; try again")
        return None, None, passed

    def _missed(self, key: str) -> CacheEntry | None:
        try:
            return self._authority.missed.read(key)
        except UNREADABLE:
            # Damage, which costs this change; its line is kept for the operator.
            return None
        except TierError:
            raise CacheUnavailableError(
                "what the slowest tier has missed cannot be read; try again"
            ) from None

    # -- many

    def scan(self, after: str, limit: int, entry_filter: EntryFilter, now_us: int) -> Page:
        """At most `limit` live entries in key order. Not a use.

        Where the authority has missed something, the others fill the gaps.
        Raises CacheUnavailableError if a tier fails meanwhile: a list cut short would look like a whole one.
        """
        while True:
            flushes = self._uses.flushes
            page = self._page(after, limit, entry_filter, now_us)
            current = [combine(entry, self._uses.peek(entry.key)) for entry in page.entries]
            # A flush in between may have taken counts out of the log that the page does not have yet.
            if flushes == self._uses.flushes:
                return Page(current, page.next_after)

    def _page(self, after: str, limit: int, entry_filter: EntryFilter, now_us: int) -> Page:
        authority, cache, missed = self._authority, self._cache, self._authority.missed
        asked = (after, limit, entry_filter, now_us)
        if authority.knows_all:
            page = _scan(authority.guard, *asked)
            if authority.knows_all:
                return page
            # Meanwhile it has missed something.
        pages = [self._l1.scan(*asked)] if self._l1.enabled else []
        if missed.pending:
            pages.append(self._missed_page(*asked))
        if cache.works:
            page = _scan(cache.guard, *asked)
            pages.append(_without(page, lambda key: missed.covers(key) or not cache.serves(key)))
        if authority.works:
            pages.append(_without(_scan(authority.guard, *asked), missed.covers))
        return _merge(pages, limit)

    def _missed_page(self, after: str, limit: int, entry_filter: EntryFilter, now_us: int) -> Page:
        missed = self._authority.missed.keys()
        keys = heapq.nsmallest(limit, (key for key in missed if key > after))
        found = [
            entry
            for entry in map(self._missed, keys)
            if entry is not None and entry.expires_at_us > now_us and entry_filter.matches(entry)
        ]
        return Page(found, keys[-1] if len(keys) == limit else None)

    def expired_key_sources(self) -> Iterator[Callable[[int], list[str]]]:
        """What finds expired keys, as a tier's `expired_keys` does, one tier after the other.

        The authority knows of all, and has an index: the others are only asked if it fails or has missed
        something.
        """
        knows_all = False

        def find(guard: GuardedTier[DiskTier], now_us: int) -> list[str]:
            nonlocal knows_all
            worked, keys = guard.attempt("read", [], guard.tier.expired_keys, now_us)
            knows_all = worked and guard.name is self._authority.name and self._authority.knows_all
            return keys

        for guard in self.guards[::-1]:
            if guard.is_open and not knows_all:
                yield partial(find, guard)
        if not knows_all:
            yield self._l1.expired_keys

    # -- how much there is

    def sizes(self) -> dict[CacheTierType, int]:
        """How many entries each tier holds."""
        sizes = {CacheTierType.L1: self._l1.size()}
        sizes.update((guard.name, guard.tier.size()) for guard in self.guards)
        if self._cache.works and self._authority.knows_all:
            # What is being removed has left the authority first, and so counts in L2 no more.
            sizes[self._cache.name] = min(sizes[self._cache.name], sizes[self._authority.name])
        return sizes

    def entries(self, sizes: dict[CacheTierType, int]) -> int:
        """How many distinct entries there are, as far as can be told, given how many each tier holds."""
        if self._authority.works:
            return sizes[self._authority.name]
        others = (sizes[self._cache.name] if self._cache.works else 0, self._authority.missed.entries())
        return max(*others) or sizes[CacheTierType.L1]

    def states(self) -> dict[CacheTierType, TierState]:
        """The state of each tier."""
        states = {CacheTierType.L1: TierState.ACTIVE if self._l1.enabled else TierState.DISABLED}
        for guard in self.guards:
            works = guard.is_open
            if guard.name is self._authority.name:
                works = self._authority.works
            elif guard is self._cache.guard:
                works = self._cache.works
            states[guard.name] = (
                TierState.DISABLED if not guard.enabled else TierState.ACTIVE if works else TierState.DEGRADED
            )
        return states


def _scan(
    guard: GuardedTier[DiskTier], after: str, limit: int, entry_filter: EntryFilter, now_us: int
) -> Page:
    worked, page = guard.attempt("read", None, guard.tier.scan, after, limit, entry_filter, now_us)
    if not worked or page is None:
        raise CacheUnavailableError("a tier failed while its entries were listed; try again")
    return page


def _without(page: Page, is_left_out: Callable[[str], bool]) -> Page:
    """A tier's page without the keys that it must not be asked for."""
    return Page([entry for entry in page.entries if not is_left_out(entry.key)], page.next_after)


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
