"""What the pool needs of the cache and of chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from proxystash_server.cache import Change, EntryFilter, Invalidation, Lookups, Page


class Engine(Protocol):
    """What the pool needs of the cache; CacheManager has it."""

    @property
    def failure_threshold(self) -> int:
        """The failure at which an entry is evicted."""

    @property
    def lists_all(self) -> bool:
        """Whether a scan finds all entries: not so while a tier is away that alone has some."""

    def lookup_many(self, keys: Sequence[str]) -> Lookups:
        """A lookup of each key, in order."""

    def scan_entries(self, after: str, limit: int, entry_filter: EntryFilter) -> Page:
        """Live entries by key, and where to go on."""

    def subscribe(self, listener: Callable[[Sequence[Change]], None]) -> int:
        """Tell every change from now on."""

    def unsubscribe(self, listener: Callable[[Sequence[Change]], None]) -> None:
        """Tell it no more."""

    def invalidate_by_health(self, key: str) -> Invalidation:
        """Count one failure, and evict at the threshold."""

    def report_success(self, key: str) -> Invalidation:
        """Start the count of failures over."""


class Randomness(Protocol):
    """What the pool draws from; random.Random has it."""

    def random(self) -> float:
        """A float from 0 to below 1."""

    def getrandbits(self, k: int, /) -> int:
        """An integer of so many bits."""
