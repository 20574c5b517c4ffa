"""What the paths work on: a cache of which a count can be repeated, and entries to put into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, count, cycle, repeat
from pathlib import Path
from typing import Final
from unittest import mock

from proxystash_server.cache import CacheConfig, CacheEntry, CacheManager, CacheTierConfig, CacheTierType

NOW_US: Final = 1_800_000_000_000_000
# What is stored besides the entries that a path uses, and what a bounded tier holds.
RESIDENT: Final = 200
# Durations in nanoseconds, in which the cache's own measurements find themselves.
_DURATIONS: Final = (3_000, 11_000, 47_000, 230_000)


class Store:
    """A cache in one directory, which begins with RESIDENT entries in every tier.

    `bounded` tiers hold no more, and so are full. Nothing happens in the background.
    """

    def __init__(self, directory: Path, bounded: frozenset[CacheTierType] = frozenset()) -> None:
        def tier(name: CacheTierType) -> CacheTierConfig:
            return CacheTierConfig(max_entries=RESIDENT if name in bounded else None)

        config = CacheConfig(
            l1_config=tier(CacheTierType.L1),
            l2_config=tier(CacheTierType.L2),
            l2_cache_dir=directory / "l2",
            l3_config=tier(CacheTierType.L3),
            l3_database_path=directory / "l3" / "proxystash.db",
            encryption_key_file=directory / "secret.key",
        )
        # Clocks written in C cost what the real ones do, and the fixed one makes every count the same.
        self.manager = CacheManager(
            config, clock=repeat(NOW_US).__next__, monotonic=repeat(1000.0).__next__, background=False
        )
        self._numbers = count()
        self.resident = self.fill(RESIDENT)

    def url(self) -> str:
        """The URL of a proxy that is not known yet; all are of one length."""
        return f"http://proxy-{next(self._numbers):06}.example.net:8080"

    def entries(self, wanted: int, username: str | None = None) -> list[CacheEntry]:
        """New entries, as a fleet's are: with a source and two labels."""
        labels = {"country": "DE", "anonymity": "elite"}
        password = None if username is None else "correct horse battery staple"
        new_entry = self.manager.new_entry
        return [
            new_entry(self.url(), source="example", labels=labels, username=username, password=password)
            for _ in range(wanted)
        ]

    def fill(self, wanted: int) -> list[str]:
        """Put new entries into every tier; their keys."""
        entries = self.entries(wanted)
        self.manager.put_many(entries)
        return [entry.key for entry in entries]


@contextmanager
def fixed_timer() -> Iterator[None]:
    """Let the performance counter advance by durations that are the same in every run."""
    with mock.patch("time.perf_counter_ns", accumulate(cycle(_DURATIONS)).__next__):
        yield
