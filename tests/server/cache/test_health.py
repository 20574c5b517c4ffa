"""Promise 6: a failure is counted atomically in every tier; at the threshold the entry goes from all."""

from __future__ import annotations

import logging
from functools import partial

import pytest

from proxystash_server.cache import CacheManager, HealthStatus, Invalidation, L2BackendType
from tests.server.cache.stash import Stash
from tests.server.cache.support import SWITCHED_OFF, bounded, put, run_in_threads
from tests.server.cache.test_get import holders
from tests.server.cache.tier_contract import MONITORING

UNHEALTHY = HealthStatus.UNHEALTHY


@pytest.fixture(params=L2BackendType)
def l2_backend(request: pytest.FixtureRequest) -> L2BackendType:
    return L2BackendType(request.param)


def failure_count(manager: CacheManager, key: str = "key-1") -> int:
    entry = manager.get(key)
    assert entry is not None
    return entry.failure_count


def test_a_failure_is_counted_and_the_entry_marked_in_every_tier(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "key-1", health_status=HealthStatus.HEALTHY)
    assert manager.invalidate_by_health("key-1") == Invalidation(True, False, UNHEALTHY, 1)
    assert manager.invalidate_by_health("key-1") == Invalidation(True, False, UNHEALTHY, 2)
    for tier in (manager.l1_tier, manager.l2_tier, manager.l3_tier):
        entry = tier.get("key-1")
        assert entry is not None
        assert (entry.failure_count, entry.health_status) == (2, UNHEALTHY)


def test_everything_else_about_the_entry_stays(stash: Stash) -> None:
    manager = stash.open(l1_config=SWITCHED_OFF)
    [entry] = put(
        manager,
        "key-1",
        username="u",
        password="p",
        labels={"country": "DE"},
        source="shop",
        health_monitoring=MONITORING,
    )
    manager.invalidate_by_health("key-1")
    assert manager.l3_tier.get("key-1") == entry.model_copy(
        update={"failure_count": 1, "health_status": UNHEALTHY}
    )


def test_at_the_threshold_the_entry_goes_from_every_tier(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "key-1")
    results = [manager.invalidate_by_health("key-1") for _ in range(3)]
    assert results[-1] == Invalidation(True, True, UNHEALTHY, 3)
    assert holders(manager, "key-1") == ()
    assert manager.get("key-1") is None
    statistics = manager.get_statistics()
    assert [tier.evictions_health for tier in statistics.tiers] == [1, 1, 1]
    assert (statistics.entries, statistics.removals) == (0, 0)
    assert manager.invalidate_by_health("key-1") == Invalidation(False, False, None, 0)


@pytest.mark.parametrize("threshold", [1, 2, 5])
def test_the_threshold_is_configurable(stash: Stash, threshold: int) -> None:
    manager = stash.open(failure_threshold=threshold)
    put(manager, "key-1")
    assert [manager.invalidate_by_health("key-1").evicted for _ in range(threshold)] == [
        *[False] * (threshold - 1),
        True,
    ]


def test_an_eviction_by_health_survives_a_restart(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "key-1")
    for _ in range(3):
        manager.invalidate_by_health("key-1")
    manager = stash.reopen_after_kill()
    assert manager.get("key-1") is None


def test_failures_counted_before_a_restart_count_after_it(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "key-1")
    manager.invalidate_by_health("key-1")
    manager.invalidate_by_health("key-1")
    manager = stash.reopen_after_kill()
    assert manager.invalidate_by_health("key-1") == Invalidation(True, True, UNHEALTHY, 3)


def test_switched_off_a_failure_is_only_counted(stash: Stash) -> None:
    manager = stash.open(health_check_invalidation=False)
    put(manager, "key-1")
    for count in range(1, 10):
        assert manager.invalidate_by_health("key-1") == Invalidation(True, False, UNHEALTHY, count)
    assert failure_count(manager) == 9
    assert sum(tier.evictions_health for tier in manager.get_statistics().tiers) == 0


def test_what_is_not_there_is_not_found_and_not_made(stash: Stash) -> None:
    manager = stash.open()
    assert manager.invalidate_by_health("nothing") == Invalidation(False, False, None, 0)
    assert holders(manager, "nothing") == ()


@pytest.mark.parametrize(
    "shape",
    [
        {"l1_config": bounded(1), "l2_config": bounded(1)},
        {"l1_config": SWITCHED_OFF},
        {"l1_config": bounded(1), "l2_config": SWITCHED_OFF},
        {"l1_config": bounded(1), "l3_config": SWITCHED_OFF},
        {"l2_config": SWITCHED_OFF, "l3_config": SWITCHED_OFF},
    ],
)
def test_an_entry_is_found_wherever_it_is(stash: Stash, shape: dict[str, object]) -> None:
    manager = stash.open(**shape)
    put(manager, "key-1")
    if "l2_config" not in shape or "l3_config" not in shape or "l1_config" in shape:
        put(manager, "another")
    for count in (1, 2):
        assert manager.invalidate_by_health("key-1").failure_count == count
    assert failure_count(manager) == 2
    assert manager.invalidate_by_health("key-1").evicted
    assert manager.get("key-1") is None


# -- what resets the count


def test_a_put_with_a_healthy_status_resets_the_count(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "key-1")
    manager.invalidate_by_health("key-1")
    put(manager, "key-1", health_status=HealthStatus.HEALTHY, failure_count=7)
    entry = manager.get("key-1")
    assert entry is not None
    assert (entry.failure_count, entry.health_status) == (0, HealthStatus.HEALTHY)


@pytest.mark.parametrize("status", [status for status in HealthStatus if status != HealthStatus.HEALTHY])
@pytest.mark.parametrize("shape", [{}, {"l1_config": SWITCHED_OFF}])
def test_a_put_with_any_other_status_goes_on_counting(
    stash: Stash, status: HealthStatus, shape: dict[str, object]
) -> None:
    manager = stash.open(**shape)
    put(manager, "key-1")
    manager.invalidate_by_health("key-1")
    manager.invalidate_by_health("key-1")
    put(manager, "key-1", health_status=status)
    entry = manager.get("key-1")
    assert entry is not None
    assert (entry.failure_count, entry.health_status) == (2, status)
    assert manager.invalidate_by_health("key-1").evicted


def test_a_put_that_brings_a_higher_count_keeps_it(stash: Stash) -> None:
    manager = stash.open(failure_threshold=10)
    put(manager, "key-1", failure_count=4)
    assert failure_count(manager) == 4
    put(manager, "key-1", failure_count=1)
    assert failure_count(manager) == 4
    put(manager, "key-1", failure_count=6)
    assert failure_count(manager) == 6


def test_a_delete_resets_the_count(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "key-1")
    manager.invalidate_by_health("key-1")
    manager.delete("key-1")
    put(manager, "key-1")
    assert failure_count(manager) == 0


def test_an_eviction_by_health_resets_the_count(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "key-1")
    for _ in range(3):
        manager.invalidate_by_health("key-1")
    put(manager, "key-1")
    assert failure_count(manager) == 0


def test_the_count_goes_on_within_a_batch(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "key-1")
    manager.invalidate_by_health("key-1")
    again = manager.new_entry("http://192.0.2.1:1", key="key-1")
    healthy = manager.new_entry("http://192.0.2.1:1", key="key-1", health_status=HealthStatus.HEALTHY)
    manager.put_many([again, again])
    assert failure_count(manager) == 1
    manager.put_many([healthy, again])
    assert failure_count(manager) == 0


# -- at the same time


@pytest.mark.parametrize("shape", [{}, {"l1_config": SWITCHED_OFF}, {"l1_config": bounded(1)}])
def test_failures_reported_at_the_same_time_are_all_counted(stash: Stash, shape: dict[str, object]) -> None:
    manager = stash.open(failure_threshold=1000, **shape)
    put(manager, "key-1", "another")

    def report() -> list[int]:
        return [manager.invalidate_by_health("key-1").failure_count for _ in range(15)]

    def use() -> list[int]:
        for _ in range(50):
            manager.get("another")
            manager.get("key-1")
        return []

    counts = run_in_threads(*[report] * 4, use, use)
    assert sorted(count for one in counts for count in one) == list(range(1, 61))
    assert failure_count(manager) == 60


def test_exactly_one_of_those_that_report_at_the_same_time_evicts(stash: Stash) -> None:
    manager = stash.open()
    keys = [f"key-{number}" for number in range(10)]
    put(manager, *keys)

    def report() -> list[Invalidation]:
        return [manager.invalidate_by_health(key) for key in keys]

    results = run_in_threads(*[report] * 6)
    for number in range(10):
        mine = [one[number] for one in results]
        assert sorted(result.failure_count for result in mine) == [0, 0, 0, 1, 2, 3]
        assert sum(result.evicted for result in mine) == 1
    assert [tier.evictions_health for tier in manager.get_statistics().tiers] == [10, 10, 10]


def test_failures_and_puts_at_the_same_time_lose_no_failure(stash: Stash) -> None:
    manager = stash.open(failure_threshold=1000)
    put(manager, "key-1")

    def report(times: int) -> None:
        for _ in range(times):
            manager.invalidate_by_health("key-1")

    def found_again_on_a_list() -> None:
        for _ in range(30):
            put(manager, "key-1")

    run_in_threads(partial(report, 20), partial(report, 20), found_again_on_a_list)
    assert failure_count(manager) == 40


def test_an_eviction_by_health_is_logged(stash: Stash, caplog: pytest.LogCaptureFixture) -> None:
    manager = stash.open()
    put(manager, "key-1")
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            manager.invalidate_by_health("key-1")
    [record] = [record for record in caplog.records if record.message == "entry evicted by health"]
    assert (record.levelname, vars(record)["key"], vars(record)["failure_count"]) == ("INFO", "key-1", 3)
