"""What the gRPC edge needs of whatever stands behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, Unpack

from proxystash_server.cache import (
    CacheEntry,
    CacheError,
    CacheStatistics,
    Change,
    EntryFilter,
    Failures,
    Invalidation,
    Lookup,
    Lookups,
    Page,
    Stored,
)
from proxystash_server.cache.entry.fields import EntryArguments
from proxystash_server.cache.entry.merging import Combine


class Engine(Protocol):
    """A cache of proxies as the services see it; CacheManager is one. Thread-safe.

    Methods raise InvalidEntryError for what breaks a limit, CacheUnavailableError where nobody can answer
    now, and CacheClosedError after the end.
    """

    @property
    def failure_threshold(self) -> int:
        """The failure at which an entry is evicted."""

    def new_entry(self, proxy_url: str, **arguments: Unpack[EntryArguments]) -> CacheEntry:
        """An entry with what is missing filled in; stores nothing."""

    def lookup(self, key: str) -> Lookup:
        """The entry of a key after this use, and the tier that held it."""

    def lookup_many(self, keys: Sequence[str]) -> Lookups:
        """A lookup of each key, in order."""

    def scan_entries(self, after: str, limit: int, entry_filter: EntryFilter) -> Page:
        """Live entries that match, by key, as many as are found quickly, and where to go on. Not a use."""

    def store(self, puts: Sequence[tuple[CacheEntry, Combine | None]]) -> Sequence[Stored | CacheError]:
        """Store entries under their own keys, each combined with what is stored; what became of each.

        NotStoredError and BannedError beside the others are of one entry alone.
        """

    def bans(self, after: str, limit: int) -> Sequence[tuple[str, Failures]]:
        """The first `limit` keys greater than `after` that are banned now."""

    def unban(self, key: str) -> bool:
        """Forget the failures of a key; whether it was banned."""

    def delete(self, key: str) -> bool:
        """Remove an entry; whether it was held."""

    def clear(self) -> int:
        """Remove every entry; how many there were."""

    def invalidate_by_health(self, key: str) -> Invalidation:
        """Record one failure."""

    def subscribe(self, listener: Callable[[Sequence[Change]], None]) -> int:
        """Tell `listener` every change from now on; the revision of the last change before.

        It is called by one thread at a time, before the change is acknowledged: it must be quick.
        """

    def unsubscribe(self, listener: Callable[[Sequence[Change]], None]) -> None:
        """Tell `listener` no more."""

    def get_statistics(self) -> CacheStatistics:
        """A snapshot of the statistics."""
