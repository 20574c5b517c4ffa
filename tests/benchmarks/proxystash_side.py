"""Our library, with its defaults, for the worker."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from proxystash_server.cache import (
    CacheConfig,
    CacheEntry,
    CacheManager,
    EntryFilter,
    HealthStatus,
    L2BackendType,
)
from tests.benchmarks.made_up import RARE_SOURCE, SOURCE, TTL_SECONDS, key_of, labels_of, proxy_url
from tests.benchmarks.worker import Batch

_BATCH: Final = 100
_PAGE: Final = 100
_FILLED_AT_A_TIME: Final = 1000
# So many entries of every store that is larger have a source of their own.
RARE: Final = 200
_ANY: Final = EntryFilter()


class ProxystashSide:
    """A store of `entries` made-up proxies, laid out as the server does it, so that it can be served too."""

    def __init__(self, folder: str, backend: str, entries: int) -> None:
        self._folder = Path(folder)
        self._backend = L2BackendType(backend)
        self._entries = entries
        self._random = random.Random(1)
        self._next = entries
        self._opened: CacheManager | None = None

    def fill(self) -> None:
        """Build the store as its users would."""
        rare_every = max(1, self._entries // RARE)
        for first in range(0, self._entries, _FILLED_AT_A_TIME):
            numbers = range(first, min(first + _FILLED_AT_A_TIME, self._entries))
            self._manager.put_many(
                [
                    self._entry(
                        number, SOURCE if self._entries <= RARE or number % rare_every else RARE_SOURCE
                    )
                    for number in numbers
                ]
            )
        assert self._manager.get_statistics().entries == self._entries

    def batch(self, operation: str, count: int) -> Batch | None:
        prepare: Callable[[int], Batch | None] = getattr(self, f"_{operation}")
        return prepare(count)

    def hits(self) -> tuple[int, int]:
        tiers = self._manager.get_statistics().tiers
        return tiers[0].hits, tiers[1].hits + tiers[2].hits

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()

    @property
    def _manager(self) -> CacheManager:
        if self._opened is None:
            config = CacheConfig(
                l2_backend=self._backend,
                l2_cache_dir=self._folder / "l2",
                l3_database_path=self._folder / "l3" / "proxystash.db",
                encryption_key_file=self._folder / "secret.key",
            )
            self._opened = CacheManager(config)
        return self._opened

    # -- reading

    def _l1_get(self, count: int) -> Batch:
        keys = self._random.choices(list(self._manager.l1_tier.keys()), k=count)
        return Batch(self._manager.get, [(key,) for key in keys], (count, 0))

    def _below_get(self, count: int) -> Batch | None:
        below = sorted(set(self._manager.l2_tier.keys()) - set(self._manager.l1_tier.keys()))
        if len(below) < count:
            return None
        return Batch(self._manager.get, [(key,) for key in self._random.sample(below, count)], (0, count))

    def _l3_get(self, count: int) -> Batch | None:
        above = {*self._manager.l2_tier.keys(), *self._manager.l1_tier.keys()}
        if self._entries - len(above) < count:
            return None
        keys: dict[str, None] = {}
        while len(keys) < count:
            key = key_of(self._random.randrange(self._entries))
            if key not in above:
                keys[key] = None
        return Batch(self._manager.get, [(key,) for key in keys], (0, count))

    def _miss(self, count: int) -> Batch:
        keys = [f"{self._random.getrandbits(64):016x}" for _ in range(count)]
        return Batch(self._manager.get, [(key,) for key in keys], (0, 0))

    def _get_many(self, count: int) -> Batch:
        in_memory = list(self._manager.l1_tier.keys())
        batches = [self._random.choices(in_memory, k=_BATCH) for _ in range(count)]
        return Batch(
            self._manager.lookup_many, [(keys,) for keys in batches], (count * _BATCH, 0), units=_BATCH
        )

    def _list_first(self, count: int) -> Batch:
        return Batch(self._manager.list_entries, [("", _PAGE, _ANY)] * count)

    def _list_deep(self, count: int) -> Batch:
        # Keys are spread evenly: every page begins at 90 to 98 percent of them.
        starts = [f"{int(self._random.uniform(0.90, 0.98) * 16**16):016x}" for _ in range(count)]
        return Batch(self._manager.list_entries, [(start, _PAGE, _ANY) for start in starts])

    def _list_label(self, count: int) -> Batch:
        wanted = EntryFilter(labels={"country": "DE"})
        return Batch(self._manager.list_entries, [("", _PAGE, wanted)] * count)

    def _list_rare(self, count: int) -> Batch:
        return Batch(self._manager.list_entries, [("", _PAGE, EntryFilter(source=RARE_SOURCE))] * count)

    def _scan_rare(self, count: int) -> Batch:
        wanted = EntryFilter(source=RARE_SOURCE)
        return Batch(self._manager.scan_entries, [("", _PAGE, wanted)] * count)

    def _statistics(self, count: int) -> Batch:
        return Batch(self._manager.get_statistics, [()] * count)

    def _expiry(self, count: int) -> Batch:
        return Batch(self._manager.cleanup_expired, [()] * count)

    # -- changing

    def _put(self, count: int) -> Batch:
        entries = self._new_entries(count)
        return Batch(
            self._manager.put, [(entry.key, entry) for entry in entries], undo=self._deletion_of(entries)
        )

    def _put_many(self, count: int) -> Batch:
        entries = self._new_entries(count * _BATCH)
        batches = [entries[first : first + _BATCH] for first in range(0, len(entries), _BATCH)]
        return Batch(
            self._manager.put_many,
            [(some,) for some in batches],
            undo=self._deletion_of(entries),
            units=_BATCH,
        )

    def _replace(self, count: int) -> Batch:
        entries = [self._entry(number) for number in self._numbers(count)]
        return Batch(self._manager.put, [(entry.key, entry) for entry in entries])

    def _delete(self, count: int) -> Batch:
        numbers = self._numbers(count)
        return Batch(
            self._manager.delete, [(key_of(number),) for number in numbers], undo=self._return_of(numbers)
        )

    def _invalidate(self, count: int) -> Batch:
        keys = self._random.sample(list(self._manager.l1_tier.keys()), min(count, self._entries))
        for key in keys:
            # So that none of them reaches the threshold, whatever happened to it before.
            entry = self._manager.l1_tier.get(key)
            assert entry is not None
            if entry.failure_count:
                self._manager.put(
                    key, entry.model_copy(update={"failure_count": 0, "health_status": HealthStatus.HEALTHY})
                )
        return Batch(self._manager.invalidate_by_health, [(key,) for key in keys], (0, 0))

    def _clear(self, count: int) -> Batch:
        entries = self._manager.get_statistics().entries
        return Batch(self._manager.clear, [()], units=entries)

    # -- entries

    def _entry(self, number: int, source: str = SOURCE) -> CacheEntry:
        return self._manager.new_entry(
            proxy_url(number), source=source, labels=labels_of(number), ttl_us=TTL_SECONDS * 1_000_000
        )

    def _numbers(self, count: int) -> list[int]:
        return self._random.sample(range(self._entries), min(count, self._entries))

    def _new_entries(self, count: int) -> list[CacheEntry]:
        entries = [self._entry(number) for number in range(self._next, self._next + count)]
        self._next += count
        return entries

    def _deletion_of(self, entries: Sequence[CacheEntry]) -> Callable[[], None]:
        def delete() -> None:
            for entry in entries:
                self._manager.delete(entry.key)

        return delete

    def _return_of(self, numbers: Sequence[int]) -> Callable[[], object]:
        return lambda: self._manager.put_many([self._entry(number) for number in numbers])
