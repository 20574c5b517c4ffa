"""What a put costs does not grow with what is stored."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxystash_server.cache import CacheConfig, CacheManager, CacheTierConfig, L2BackendType
from tests.server.meter import Meter


@pytest.mark.parametrize("backend", L2BackendType)
def test_a_put_at_6000_entries_costs_what_it_costs_at_100(
    backend: L2BackendType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = Meter(monkeypatch)
    # No tier evicts, so that both puts do the same; what an eviction costs is the other test's.
    config = CacheConfig(
        l1_config=CacheTierConfig(max_entries=None),
        l2_config=CacheTierConfig(max_entries=None),
        l2_backend=backend,
        l2_cache_dir=tmp_path / "l2",
        l3_database_path=tmp_path / "l3.db",
    )
    with CacheManager(config, background=False) as manager:
        _fill(manager, 0, 100)
        few = _cost_of_a_put(meter, manager, 10_000, tmp_path)
        _fill(manager, 100, 6000)
        many = _cost_of_a_put(meter, manager, 10_001, tmp_path)

    assert many == pytest.approx(few, rel=0.05)


@pytest.mark.parametrize("backend", L2BackendType)
def test_an_eviction_costs_the_same_among_6000_entries_as_among_100(
    backend: L2BackendType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = Meter(monkeypatch)
    costs = []
    for capacity in (100, 6000):
        folder = tmp_path / str(capacity)
        config = CacheConfig(
            l1_config=CacheTierConfig(max_entries=capacity),
            l2_config=CacheTierConfig(max_entries=capacity),
            l2_backend=backend,
            l2_cache_dir=folder / "l2",
            l3_database_path=folder / "l3.db",
        )
        with CacheManager(config, background=False) as manager:
            _fill(manager, 0, capacity)
            manager.maintain()
            costs.append(_cost_of_a_put(meter, manager, 10_000, folder))
            assert manager.get_statistics().l2_stats.evictions_capacity == 1

    assert costs[1] == pytest.approx(costs[0], rel=0.05)


def _fill(manager: CacheManager, start: int, stop: int) -> None:
    manager.put_many([manager.new_entry(_url(number)) for number in range(start, stop)])


def _url(number: int) -> str:
    return f"http://10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}:8080"


def _cost_of_a_put(meter: Meter, manager: CacheManager, number: int, folder: Path) -> tuple[int, int, int]:
    entry = manager.new_entry(_url(number))
    before = _jsonl_bytes(folder)
    steps, calls = meter.cost(lambda: manager.put(entry.key, entry))
    return steps, calls, _jsonl_bytes(folder) - before


def _jsonl_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("entries.jsonl"))
