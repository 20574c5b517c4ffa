"""Promise 5: an expired entry is never returned; it goes at the next get, or when the cleaner passes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest
from pydantic import ValidationError

from proxystash_server.cache import CacheConfig, CacheManager, EntryFilter, L2BackendType
from tests.server.cache.stash import Stash
from tests.server.cache.support import (
    HOUR,
    START_US,
    SWITCHED_OFF,
    bounded,
    broken,
    keys_of,
    put,
    run_in_threads,
)
from tests.server.cache.test_get import holders

ANY = EntryFilter()
SECOND_US = 1_000_000
DAY = 24 * HOUR


@pytest.fixture(params=L2BackendType)
def l2_backend(request: pytest.FixtureRequest) -> L2BackendType:
    return L2BackendType(request.param)


# -- how long an entry lives


def test_an_entry_without_a_ttl_of_its_own_gets_its_sources_and_else_the_default(stash: Stash) -> None:
    manager = stash.open(default_ttl_seconds=300, per_source_ttl={"short": 10, "long": DAY})

    def ttl(source: str, ttl_us: int | None = None) -> int:
        return manager.new_entry("http://192.0.2.1:1", source=source, ttl_us=ttl_us).ttl_us

    assert ttl("short") == 10 * SECOND_US
    assert ttl("long") == DAY * SECOND_US
    assert ttl("other") == 300 * SECOND_US
    assert ttl("") == 300 * SECOND_US
    assert ttl("short", 77 * SECOND_US) == 77 * SECOND_US


def test_the_default_is_an_hour(stash: Stash) -> None:
    assert stash.open().new_entry("http://192.0.2.1:1").ttl_seconds == HOUR


def test_the_ttl_counts_from_the_time_of_fetching(stash: Stash) -> None:
    entry = stash.open().new_entry(
        "http://192.0.2.1:1", fetch_time_us=START_US - 10 * SECOND_US, ttl_us=30 * SECOND_US
    )
    assert entry.fetch_time_us == START_US - 10 * SECOND_US
    assert entry.expires_at_us == START_US + 20 * SECOND_US


@pytest.mark.parametrize("ttl", [0, -1, 10 * 365 * DAY + 1])
def test_a_configured_ttl_has_the_limits_of_any_other(ttl: int) -> None:
    with pytest.raises(ValidationError):
        CacheConfig(default_ttl_seconds=ttl)
    with pytest.raises(ValidationError):
        CacheConfig(per_source_ttl={"shop": ttl})


# -- an expired entry is as good as gone


EVERY_SHAPE = {
    "in every tier": {},
    "without L1": {"l1_config": SWITCHED_OFF},
    "in L3 alone": {"l1_config": bounded(1), "l2_config": bounded(1)},
    "in L2 alone": {"l1_config": bounded(1), "l3_config": SWITCHED_OFF},
    "in L1 alone": {"l2_config": SWITCHED_OFF, "l3_config": SWITCHED_OFF},
}


@pytest.fixture(params=EVERY_SHAPE)
def manager(request: pytest.FixtureRequest, stash: Stash) -> CacheManager:
    """Holds `key-1`, which expires in ten seconds."""
    manager = stash.open(**EVERY_SHAPE[request.param])
    put(manager, "key-1", ttl_us=10 * SECOND_US)
    if request.param in {"in L3 alone", "in L2 alone"}:
        put(manager, "another")
    return manager


def test_an_entry_is_returned_up_to_its_time_of_expiry_and_never_again(
    manager: CacheManager, stash: Stash
) -> None:
    stash.clock.advance(9.999999)
    assert manager.get("key-1") is not None
    stash.clock.advance(0.000001)
    assert manager.get("key-1") is None
    stash.clock.advance(-5)
    assert manager.get("key-1") is None, "it came back"


def test_a_get_removes_an_expired_entry_from_every_tier(manager: CacheManager, stash: Stash) -> None:
    stash.clock.advance(10)
    held = len(holders(manager, "key-1"))
    assert manager.get("key-1") is None
    assert holders(manager, "key-1") == ()
    statistics = manager.get_statistics()
    assert sum(tier.evictions_ttl for tier in statistics.tiers) == held
    assert max(tier.evictions_ttl for tier in statistics.tiers) == 1
    assert statistics.removals == 0


def test_an_expired_get_is_a_miss(manager: CacheManager, stash: Stash) -> None:
    stash.clock.advance(10)
    manager.get("key-1")
    statistics = manager.get_statistics()
    assert (statistics.hits, statistics.misses) == (0, 1)
    assert sum(tier.hits for tier in statistics.tiers) == 0


def test_an_expired_entry_is_not_listed(manager: CacheManager, stash: Stash) -> None:
    stash.clock.advance(10)
    assert "key-1" not in keys_of(manager.list_entries("", 10, ANY))


def test_an_expired_entry_cannot_be_invalidated(manager: CacheManager, stash: Stash) -> None:
    stash.clock.advance(10)
    result = manager.invalidate_by_health("key-1")
    assert (result.found, result.evicted, result.failure_count) == (False, False, 0)
    assert manager.get("key-1") is None
    assert sum(tier.evictions_health for tier in manager.get_statistics().tiers) == 0


def test_the_failures_of_an_expired_entry_are_not_those_of_its_successor(
    manager: CacheManager, stash: Stash
) -> None:
    manager.invalidate_by_health("key-1")
    stash.clock.advance(10)
    put(manager, "key-1")
    entry = manager.get("key-1")
    assert entry is not None
    assert entry.failure_count == 0


def test_an_expired_entry_can_be_replaced(manager: CacheManager, stash: Stash) -> None:
    stash.clock.advance(10)
    put(manager, "key-1")
    assert manager.get("key-1") is not None
    assert sum(tier.evictions_ttl for tier in manager.get_statistics().tiers) == 0


def test_an_expired_entry_counts_as_stored_until_it_is_removed(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "key-1", ttl_us=10 * SECOND_US)
    stash.clock.advance(10)
    assert manager.get_statistics().entries == 1
    manager.cleanup_expired()
    assert manager.get_statistics().entries == 0


def test_an_entry_that_expires_on_its_way_into_the_cache_is_never_returned(stash: Stash) -> None:
    manager = stash.open()
    entry = manager.new_entry("http://192.0.2.1:1", key="key-1", ttl_us=10 * SECOND_US)
    stash.clock.advance(10)
    manager.put("key-1", entry)
    assert manager.get("key-1") is None


def test_an_entry_that_expired_between_two_runs_is_not_returned(stash: Stash) -> None:
    put(stash.open(), "key-1", ttl_us=10 * SECOND_US)
    stash.close()
    stash.clock.advance(10)
    manager = stash.open()
    assert manager.get("key-1") is None
    assert holders(manager, "key-1") == ()


# -- the cleaner


def test_the_cleaner_removes_what_has_expired_from_every_tier_and_nothing_else(
    manager: CacheManager, stash: Stash
) -> None:
    put(manager, "young")
    stash.clock.advance(10)
    assert manager.cleanup_expired() == 1
    assert holders(manager, "key-1") == ()
    assert manager.get("young") is not None
    assert manager.cleanup_expired() == 0


def test_the_cleaner_counts_each_entry_once_and_each_loss_of_a_tier_once(stash: Stash) -> None:
    manager = stash.open(l1_config=bounded(20), l2_config=bounded(150))
    keys = [f"key-{number}" for number in range(250)]
    manager.put_many(
        [manager.new_entry("http://192.0.2.1:1", key=key, ttl_us=10 * SECOND_US) for key in keys]
    )
    stash.clock.advance(10)
    assert manager.cleanup_expired() == 250
    assert [tier.evictions_ttl for tier in manager.get_statistics().tiers] == [20, 150, 250]
    assert manager.get_statistics().entries == 0


def test_nobody_waits_for_the_cleaner_longer_than_for_one_batch(stash: Stash) -> None:
    """Between two batches of the cleaner others get their turn, however much there is to clean."""
    manager = stash.open(l2_config=SWITCHED_OFF)
    manager.put_many([
        manager.new_entry("http://192.0.2.1:1", key=f"key-{number:03}", ttl_us=10 * SECOND_US)
        for number in range(350)
    ])  # fmt: skip
    stash.clock.advance(10)
    batches: list[int] = []
    commit = manager.l3_tier.commit  # type: ignore[attr-defined]  # L3 decides

    def counted(keys, decide):  # type: ignore[no-untyped-def]  # stands in for the real one
        batches.append(len(keys))
        return commit(keys, decide)

    manager.l3_tier.commit = counted  # type: ignore[attr-defined]
    assert manager.cleanup_expired() == 350
    assert sum(batches) == 350
    assert max(batches) <= 100


@pytest.mark.parametrize("switched_off", [["l3_config"], ["l2_config", "l3_config"]])
def test_a_tier_without_an_index_by_expiry_is_looked_through_once_however_much_has_expired(
    stash: Stash, switched_off: list[str]
) -> None:
    """And once more, to find that nothing is left: each look goes through every entry."""
    looks: list[int] = []
    manager = stash.open(**dict.fromkeys(switched_off, SWITCHED_OFF))
    put(manager, *(f"key-{number}" for number in range(750)), ttl_us=10 * SECOND_US)
    stash.clock.advance(10)
    tiers = [tier for tier in (manager.l1_tier, manager.l2_tier) if tier.enabled and tier.backend != "sqlite"]
    for tier in tiers:
        find = tier.expired_keys

        def counted(now_us: int, find: Callable[[int], list[str]] = find) -> list[str]:
            looks.append(now_us)
            return find(now_us)

        tier.expired_keys = counted  # type: ignore[method-assign]
    assert manager.cleanup_expired() == 750
    assert len(looks) <= 2 * len(tiers)


def test_an_entry_renewed_while_the_cleaner_is_about_to_remove_it_stays(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "key-1", ttl_us=10 * SECOND_US)
    stash.clock.advance(10)
    expired_keys = manager.l3_tier.expired_keys
    renewed = threading.Event()

    def find_and_renew(now_us: int) -> list[str]:
        keys = expired_keys(now_us)
        if keys and not renewed.is_set():
            renewed.set()
            put(manager, "key-1")
        return keys

    manager.l3_tier.expired_keys = find_and_renew  # type: ignore[method-assign]
    assert manager.cleanup_expired() == 0
    assert renewed.is_set()
    assert manager.get("key-1") is not None


def test_cleaners_and_readers_in_several_threads_count_each_loss_once(stash: Stash) -> None:
    manager = stash.open()
    keys = [f"key-{number}" for number in range(60)]
    put(manager, *keys, ttl_us=10 * SECOND_US)
    stash.clock.advance(10)

    def get_all() -> int:
        assert [manager.get(key) for key in keys] == [None] * 60
        return 0

    run_in_threads(manager.cleanup_expired, get_all, get_all, manager.cleanup_expired)
    manager.maintain()
    statistics = manager.get_statistics()
    assert [tier.evictions_ttl for tier in statistics.tiers] == [60, 60, 60]
    assert statistics.misses == 120


def test_only_the_index_of_l3_is_searched_while_l3_has_missed_nothing(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "key-1", "key-2", ttl_us=10 * SECOND_US)
    stash.clock.advance(10)
    with broken(manager.l1_tier, {"expired_keys"}), broken(manager.l2_tier, {"expired_keys"}):
        assert manager.cleanup_expired() == 2
    assert [tier.size() for tier in (manager.l1_tier, manager.l2_tier, manager.l3_tier)] == [0, 0, 0]


@pytest.mark.parametrize("faulty", ["l2_tier", "l3_tier"])
def test_a_tier_that_fails_does_not_keep_the_cleaner_from_the_others(stash: Stash, faulty: str) -> None:
    manager = stash.open()
    put(manager, "key-1", "key-2", ttl_us=10 * SECOND_US)
    stash.clock.advance(10)
    with broken(getattr(manager, faulty), {"expired_keys"}):
        assert manager.cleanup_expired() == 2
    assert manager.get_statistics().entries == 0


def test_an_expired_entry_is_removed_later_where_its_removal_would_wait_for_a_commit(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "key-1", ttl_us=10 * SECOND_US)
    stash.clock.advance(10)
    with manager.l3_tier._database._lock:  # type: ignore[attr-defined]  # L3 is SQLite's
        assert run_in_threads(partial(manager.get, "key-1")) == [None]
    manager.maintain()
    assert holders(manager, "key-1") == ()
    assert [tier.evictions_ttl for tier in manager.get_statistics().tiers] == [1, 1, 1]
