"""What an operation costs does not grow with the number of entries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proxystash.models import HealthStatus
from proxystash_server.cache import CacheConfig, CacheManager, CacheTierConfig, EntryFilter, L2BackendType
from proxystash_server.cache.tiers.sqlite import database
from tests.server.meter import Meter

FEW, MANY = 4_000, 24_000
# Both hold far fewer than the store has in either case.
_L1, _L2 = CacheTierConfig(max_entries=50), CacheTierConfig(max_entries=200)

_ANY = EntryFilter()
_NOBODY = {
    "source": EntryFilter(source="nobody"),
    "health": EntryFilter(health_statuses=frozenset({HealthStatus.DEAD})),
    "scheme": EntryFilter(schemes=frozenset({"socks4"})),
    "label": EntryFilter(labels={"country": "XX"}),
}


class _Store:
    """A cache that grows, and the keys in it that only L3 has."""

    def __init__(self, manager: CacheManager) -> None:
        self.manager = manager
        self._next = 0
        self._below: Iterator[str] = iter(())

    def grow(self, size: int) -> None:
        keys: list[str] = []
        while self._next < size:
            keys += self.put_new(500)
        self.manager.maintain()
        self._below = iter(keys[1000:-1000])

    def put_new(self, count: int) -> list[str]:
        entries = [
            self.manager.new_entry(_url(number), labels={"country": "DE"})
            for number in range(self._next, self._next + count)
        ]
        self._next += count
        self.manager.put_many(entries)
        return [entry.key for entry in entries]

    def below(self, count: int = 1) -> list[str]:
        return [next(self._below) for _ in range(count)]


def _url(number: int) -> str:
    return f"http://10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}:8080"


OPERATIONS: dict[str, Callable[[_Store], object]] = {
    "get from L3": lambda store: store.manager.get(store.below()[0]),
    "miss": lambda store: store.manager.get("nothing"),
    "lookup of 100": lambda store: store.manager.lookup_many(store.below(100)),
    "put": lambda store: store.put_new(1),
    "put of 100": lambda store: store.put_new(100),
    "delete": lambda store: store.manager.delete(store.below()[0]),
    "health invalidation": lambda store: store.manager.invalidate_by_health(store.below()[0]),
    "page": lambda store: store.manager.scan_entries("8", 100, _ANY),
    **{
        f"page by a {name} that none has": lambda store, wanted=wanted: (  # type: ignore[misc]
            store.manager.scan_entries("", 100, wanted)
        )
        for name, wanted in _NOBODY.items()
    },
    "statistics": lambda store: store.manager.get_statistics(),
    "search for expired entries": lambda store: store.manager.cleanup_expired(),
    "maintenance": lambda store: store.manager.maintain(),
}


@pytest.mark.parametrize("backend", L2BackendType)
def test_at_six_times_the_entries_every_operation_costs_the_same(
    backend: L2BackendType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = Meter(monkeypatch)
    config = CacheConfig(
        l1_config=_L1,
        l2_config=_L2,
        l2_backend=backend,
        l2_cache_dir=tmp_path / "l2",
        l3_database_path=tmp_path / "l3.db",
    )
    with CacheManager(config, background=False) as manager:
        store = _Store(manager)
        store.grow(FEW)
        few = _costs(meter, store)
        store.grow(MANY)
        many = _costs(meter, store)
    for operation, (steps, calls) in many.items():
        assert steps <= few[operation][0] * 1.1 + 10, operation
        if operation != "statistics":
            # Those depend on how far the measured latencies are spread.
            assert calls <= few[operation][1] * 1.1 + 10, operation


def _costs(meter: Meter, store: _Store) -> dict[str, tuple[int, int]]:
    costs = {}
    for name, operation in OPERATIONS.items():
        # Uses that wait for their turn would be part of the next operation.
        store.manager.maintain()
        costs[name] = meter.cost(lambda operation=operation: operation(store))  # type: ignore[misc]
    return costs


@pytest.mark.parametrize("backend", L2BackendType)
def test_a_start_costs_the_same_at_six_times_the_entries(
    backend: L2BackendType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is small is looked through at once, which takes so long and no longer.
    monkeypatch.setattr(database, "_CHECKED_AT_ONCE_BYTES", 0)
    meter = Meter(monkeypatch)
    config = CacheConfig(
        l1_config=_L1,
        l2_config=_L2,
        l2_backend=backend,
        l2_cache_dir=tmp_path / "l2",
        l3_database_path=tmp_path / "l3.db",
    )

    def start() -> None:
        CacheManager(config, background=False).close()

    costs = []
    for size in (FEW, MANY):
        with CacheManager(config, background=False) as manager:
            _Store(manager).grow(size)
        start()
        costs.append(meter.cost(start))
    (few_steps, few_calls), (many_steps, many_calls) = costs
    assert many_steps <= few_steps * 1.1 + 10
    assert many_calls <= few_calls * 1.1 + 10
