"""L1: entries in memory, in the order of the eviction policy."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import Final

from proxystash_server.cache.coherence.uses import UseLog
from proxystash_server.cache.config import CacheTierConfig, CacheTierType
from proxystash_server.cache.entry.entry import CacheEntry, Clock, MutableEntry, used, wall_clock, with_use
from proxystash_server.cache.tiers.base import CacheTier, EntryFilter, Page
from proxystash_server.cache.tiers.eviction import make_policy

# A batch lets others in between so many keys.
_KEYS_PER_HOLD: Final = 100


class MemoryCacheTier(CacheTier):
    """A dictionary and a policy under one lock, held for memory operations only.

    It is the lock of the log of uses, to which those and capacity evictions are written under the same hold:
    a reader who no longer finds an entry here finds its counts there.
    """

    backend = "memory"

    def __init__(
        self,
        config: CacheTierConfig,
        tier_type: CacheTierType = CacheTierType.L1,
        use_log: UseLog | None = None,
        clock: Clock = wall_clock,
    ) -> None:
        super().__init__(config, tier_type, clock)
        self._use_log = UseLog() if use_log is None else use_log
        self._lock = self._use_log.lock
        self._entries: dict[str, CacheEntry] = {}
        self._waiting = self._use_log.waiting
        self._policy = make_policy(config.eviction_policy)
        self._record_use = self._policy.record_use
        # How many lookups this tier has answered; read without the lock, since it is one number.
        self.hits = 0

    def use(self, key: str, now_us: int) -> CacheEntry | None:
        """The live entry after one more use, or None if it is absent or expired."""
        # The path that must be cheapest, so what `used` and `note_use` do is written out.
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            content = entry.content
            if content.expires_at_us <= now_us:
                return None
            use = MutableEntry()
            use.content = content
            use.access_count = count = entry.access_count + 1
            use.last_accessed_us = now_us
            use.evicted_from_l1 = False
            use.__class__ = CacheEntry
            record_use = self._record_use
            record_use(key, count)
            waiting = self._waiting
            waiting.pop(key, None)
            self._entries[key] = waiting[key] = use  # type: ignore[assignment]  # by now it is one
            self._use_log.has_uses = True
            self.hits += 1
            return use  # type: ignore[return-value]  # mypy cannot follow the change of class

    def use_many(self, keys: Sequence[str], now_us: int) -> list[CacheEntry | None]:
        """`use` of each key, in order."""
        found: list[CacheEntry | None] = []
        entries, waiting, record_use = self._entries, self._waiting, self._record_use
        for start in range(0, len(keys), _KEYS_PER_HOLD):
            with self._lock:
                for key in keys[start : start + _KEYS_PER_HOLD]:
                    entry = entries.get(key)
                    if entry is None or entry.content.expires_at_us <= now_us:
                        found.append(None)
                        continue
                    entry = used(entry, now_us)
                    record_use(key, entry.access_count)
                    waiting.pop(key, None)
                    entries[key] = waiting[key] = entry
                    found.append(entry)
                    self.hits += 1
                    self._use_log.has_uses = True
        return found

    def absent(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that are not held."""
        entries = self._entries
        return [key for key in keys if key not in entries]

    def get(self, key: str) -> CacheEntry | None:
        return self._entries.get(key)

    def put(self, key: str, entry: CacheEntry) -> bool:
        self.store(key, entry)
        return True

    def store(self, key: str, entry: CacheEntry) -> list[str]:
        """Put, and return the keys that had to make room."""
        evicted: list[str] = []
        with self._lock:
            if key not in self._entries:
                self._make_room(evicted)
            self._policy.record_put(key, entry.access_count)
            self._entries[key] = entry
        return evicted

    def store_many(self, entries: Sequence[CacheEntry]) -> list[str]:
        """Put each entry under its own key, in order; the keys that had to make room."""
        evicted: list[str] = []
        held, record_put = self._entries, self._policy.record_put
        for start in range(0, len(entries), _KEYS_PER_HOLD):
            with self._lock:
                for entry in entries[start : start + _KEYS_PER_HOLD]:
                    key = entry.content.key
                    if key not in held:
                        self._make_room(evicted)
                    record_put(key, entry.access_count)
                    held[key] = entry
        return evicted

    def update(self, key: str, entry: CacheEntry) -> CacheEntry | None:
        """Replace a held entry by a changed version of itself, keeping the uses it had meanwhile.

        Returns what is held now, or None if the key was not held, which changes nothing.
        """
        with self._lock:
            held = self._entries.get(key)
            if held is None:
                return None
            if held.access_count > entry.access_count:
                entry = with_use(entry, held.access_count, held.last_accessed_us, held.evicted_from_l1)
                self._use_log.note_use(key, entry)
            self._entries[key] = entry
            return entry

    def delete(self, key: str) -> bool:
        with self._lock:
            entry = self._entries.pop(key, None)
            self._policy.remove(key)
            return entry is not None

    def clear(self) -> int:
        with self._lock:
            count = len(self._entries)
            self._entries.clear()
            self._policy.clear()
            return count

    def size(self) -> int:
        return len(self._entries)

    def keys(self) -> list[str]:
        with self._lock:
            return list(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def expired_keys(self, now_us: int) -> list[str]:
        with self._lock:
            entries = list(self._entries.values())
        return [entry.key for entry in entries if entry.expires_at_us <= now_us]

    def scan(self, after: str, limit: int, entry_filter: EntryFilter, now_us: int) -> Page:
        with self._lock:
            entries = list(self._entries.values())
        found = heapq.nsmallest(
            limit,
            (
                entry
                for entry in entries
                if entry.key > after and entry.expires_at_us > now_us and entry_filter.matches(entry)
            ),
            key=lambda entry: entry.key,
        )
        return Page(found, found[-1].key if len(found) == limit else None)

    def _make_room(self, evicted: list[str]) -> None:
        most = self.config.max_entries
        while most is not None and len(self._entries) >= most:
            victim = next(self._policy.victims())
            entry = self._entries.pop(victim, None)
            self._policy.remove(victim)
            # After an interrupt the policy may have a key that is not held.
            if entry is not None:
                self._use_log.note_demotion(
                    with_use(entry, entry.access_count, entry.last_accessed_us, evicted_from_l1=True)
                )
                evicted.append(victim)
