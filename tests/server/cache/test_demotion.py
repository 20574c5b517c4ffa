"""Promise 4: each tier keeps to its capacity and its policy; what falls out of L1 loses nothing."""

from __future__ import annotations

import random

import pytest

from proxystash_server.cache import CacheManager, CacheTierType, EntryFilter, L2BackendType
from tests.server.cache.invariants import check_invariants
from tests.server.cache.stash import Stash
from tests.server.cache.support import (
    SWITCHED_OFF,
    FakeClock,
    bounded,
    broken,
    content_of,
    fail_until_skipped,
    guards_of,
    keys_of,
    nothing_writable,
    put,
)
from tests.server.cache.test_get import holders

L1, L2, L3 = CacheTierType
ANY = EntryFilter()


@pytest.fixture(params=L2BackendType)
def l2_backend(request: pytest.FixtureRequest) -> L2BackendType:
    return L2BackendType(request.param)


def listed(manager: CacheManager, key: str):  # type: ignore[no-untyped-def]  # the entry, which must be there
    [entry] = [entry for entry in manager.list_entries("", 100, ANY) if entry.key == key]
    return entry


# -- falling out of L1


def test_what_falls_out_of_l1_stays_below_with_its_counts_and_marked(stash: Stash) -> None:
    manager = stash.open(l1_config=bounded(1))
    put(manager, "key-1", username="u", password="p")
    stash.clock.advance(1)
    used = manager.get("key-1")
    put(manager, "key-2")
    assert holders(manager, "key-1") == (L2, L3)
    for flushed in (False, True):
        entry = listed(manager, "key-1")
        assert entry.evicted_from_l1
        assert (entry.access_count, entry.last_accessed) == (1, used and used.last_accessed)
        assert entry.password is not None
        if not flushed:
            manager.maintain()
    for tier in (manager.l2_tier, manager.l3_tier):
        entry = tier.get("key-1")
        assert entry is not None
        assert (entry.evicted_from_l1, entry.access_count) == (True, 1)


def test_what_comes_back_into_l1_is_no_longer_marked(stash: Stash) -> None:
    manager = stash.open(l1_config=bounded(1))
    put(manager, "key-1", "key-2")
    manager.maintain()
    entry = manager.get("key-1")
    assert entry is not None
    assert not entry.evicted_from_l1
    assert not listed(manager, "key-1").evicted_from_l1
    manager.maintain()
    stored = manager.l3_tier.get("key-1")
    assert stored is not None
    assert not stored.evicted_from_l1


def test_the_mark_survives_a_restart(stash: Stash) -> None:
    manager = stash.open(l1_config=bounded(1))
    put(manager, "key-1", "key-2")
    manager = stash.reopen()
    assert listed(manager, "key-1").evicted_from_l1
    assert not listed(manager, "key-2").evicted_from_l1


def test_falling_out_of_l1_is_a_demotion_and_an_eviction_of_l1_alone(stash: Stash) -> None:
    manager = stash.open(l1_config=bounded(1))
    put(manager, "key-1", "key-2", "key-3")
    statistics = manager.get_statistics()
    assert statistics.demotions == 2
    assert [tier.evictions_capacity for tier in statistics.tiers] == [2, 0, 0]
    assert statistics.entries == 3
    assert statistics.removals == 0


def test_falling_out_of_the_only_tier_is_no_demotion(stash: Stash) -> None:
    manager = stash.open(l1_config=bounded(1), l2_config=SWITCHED_OFF, l3_config=SWITCHED_OFF)
    put(manager, "key-1", "key-2")
    statistics = manager.get_statistics()
    assert (statistics.demotions, statistics.l1_stats.evictions_capacity) == (0, 1)
    assert manager.get("key-1") is None


# -- capacity of the tiers on disk


def test_what_falls_out_of_l2_stays_in_l3(stash: Stash) -> None:
    manager = stash.open(l2_config=bounded(2))
    put(manager, "key-1", "key-2", "key-3")
    assert sorted(manager.l2_tier.keys()) == ["key-2", "key-3"]
    assert sorted(manager.l3_tier.keys()) == ["key-1", "key-2", "key-3"]
    assert [tier.evictions_capacity for tier in manager.get_statistics().tiers] == [0, 1, 0]


def test_a_promotion_into_a_full_l2_makes_another_entry_go(stash: Stash) -> None:
    put(stash.open(l2_config=bounded(2)), "key-1", "key-2", "key-3")
    manager = stash.reopen(l2_config=bounded(2))
    assert manager.lookup("key-1").served_by is L3
    assert sorted(manager.l2_tier.keys()) == ["key-1", "key-3"]
    assert manager.get_statistics().l2_stats.evictions_capacity == 1


def test_what_a_bounded_l3_evicts_is_gone_from_every_tier(stash: Stash) -> None:
    manager = stash.open(l3_config=bounded(2, "fifo"))
    put(manager, "key-1", "key-2", "key-3")
    assert holders(manager, "key-1") == ()
    assert manager.get("key-1") is None
    assert keys_of(manager.list_entries("", 10, ANY)) == ["key-2", "key-3"]
    statistics = manager.get_statistics()
    assert statistics.entries == 2
    assert [tier.evictions_capacity for tier in statistics.tiers] == [1, 1, 1]
    assert statistics.demotions == 0


def test_what_an_l2_without_l3_evicts_is_gone_from_l1_too(stash: Stash) -> None:
    manager = stash.open(l2_config=bounded(2, "fifo"), l3_config=SWITCHED_OFF)
    put(manager, "key-1", "key-2", "key-3")
    assert holders(manager, "key-1") == ()
    assert manager.get_statistics().entries == 2


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo"])
def test_whatever_is_done_the_faster_tiers_hold_nothing_that_a_bounded_l3_has_lost(
    stash: Stash, policy: str
) -> None:
    fields = {
        "l1_config": bounded(2, policy),
        "l2_config": bounded(4, policy),
        "l3_config": bounded(5, policy),
    }
    manager = stash.open(**fields)
    chance = random.Random(policy)
    for step in range(150):
        keys = [f"key-{chance.randrange(9)}" for _ in range(3)]
        match chance.randrange(6):
            case 0 | 1:
                put(manager, keys[0])
            case 2:
                entries = [manager.new_entry("http://192.0.2.1:1", key=key) for key in keys]
                manager.put_many(entries)
            case 3:
                manager.get(keys[0])
            case 4:
                manager.invalidate_by_health(keys[0])
            case _:
                manager.maintain()
        check_invariants(manager)
        listed = keys_of(manager.list_entries("", 100, ANY))
        assert manager.get_statistics().entries == len(listed) <= 5
        assert {*manager.l1_tier.keys(), *manager.l2_tier.keys()} <= set(listed)
        if step % 50 == 49:
            manager = stash.reopen(**fields)
            assert keys_of(manager.list_entries("", 100, ANY)) == listed


@pytest.mark.parametrize(
    ("tier", "left", "gone"),
    [
        ("l2_config", ["key-3", "key-4"], []),
        ("l3_config", ["key-3", "key-4"], ["key-0", "key-1", "key-2"]),
    ],
)
def test_a_smaller_capacity_counts_from_the_next_start(
    stash: Stash, tier: str, left: list[str], gone: list[str]
) -> None:
    put(stash.open(), *(f"key-{number}" for number in range(5)))
    manager = stash.reopen(**{tier: bounded(2)})
    assert sorted(manager.l2_tier.keys()) == left
    for key in gone:
        assert manager.get(key) is None
    statistics = manager.get_statistics()
    assert statistics.entries == 5 - len(gone)
    evicted = statistics.l2_stats if tier == "l2_config" else statistics.l3_stats
    assert evicted.evictions_capacity == 3


# -- what makes room in memory while the disk tiers are away


def test_what_memory_alone_had_is_evicted_and_not_demoted(stash: Stash) -> None:
    """Given both disk tiers away and no journal: what falls out of memory is gone, and counts as that."""
    manager = stash.open(l1_config=bounded(3))
    with nothing_writable(manager):
        for guard in guards_of(manager):
            fail_until_skipped(manager, guard.tier)
        for number in range(10):
            put(manager, f"key-{number}")
            manager.maintain()
        statistics = manager.get_statistics()
        assert statistics.l1_stats.evictions_capacity == 7
        assert statistics.demotions == 0
        assert manager.get("key-0") is None
        assert len(manager._uses) == 0
    stash.recover(manager)
    assert content_of(manager).keys() == {"key-7", "key-8", "key-9"}


def test_what_stands_in_the_journal_is_demoted_and_its_uses_leave_the_log(stash: Stash) -> None:
    """Given both disk tiers away: what falls out of memory is found in the journal, with its counts."""
    manager = stash.open(l1_config=bounded(3))
    with broken(manager.l2_tier), broken(manager.l3_tier):
        for guard in guards_of(manager):
            fail_until_skipped(manager, guard.tier)
        for number in range(10):
            put(manager, f"key-{number}")
            assert manager.get(f"key-{number}") is not None
            manager.maintain()
            assert len(manager._uses) <= 3
        assert manager.get_statistics().demotions == 7
        entry = manager.get("key-0")
        assert entry is not None
        assert entry.access_count == 2
    stash.recover(manager)
    assert len(content_of(manager)) == 10


# -- the policies across tiers: L2 hears of what happens above it


@pytest.fixture
def clock(clock: FakeClock) -> FakeClock:
    """Here no two things happen at the same moment."""
    clock.tick_us = 1
    return clock


def test_l2_keeps_what_was_used_in_l1_recently(stash: Stash) -> None:
    manager = stash.open(l1_config=bounded(10), l2_config=bounded(3, "lru"))
    put(manager, "a", "b", "c")
    manager.get("a")
    put(manager, "d")
    assert sorted(manager.l2_tier.keys()) == ["a", "c", "d"]


def test_a_promotion_goes_by_the_uses_that_have_been_flushed(stash: Stash) -> None:
    """A read does no disk work for other keys, so it does not flush by itself."""
    manager = stash.open(l1_config=bounded(3), l2_config=bounded(3, "lru"))
    put(manager, "d", "a", "b", "c")
    manager.get("a")
    manager.maintain()
    assert manager.lookup("d").served_by is L3
    assert sorted(manager.l2_tier.keys()) == ["a", "c", "d"]


def test_l2_keeps_what_was_used_in_l1_recently_when_a_batch_overfills_it(stash: Stash) -> None:
    manager = stash.open(l1_config=bounded(10), l2_config=bounded(3, "lru"))
    put(manager, "a", "b")
    manager.get("a")
    manager.put_many([manager.new_entry("http://192.0.2.1:1", key=key) for key in ("c", "d")])
    assert sorted(manager.l2_tier.keys()) == ["a", "c", "d"]


@pytest.mark.parametrize("flushed", [False, True])
def test_falling_out_of_l1_is_no_use(stash: Stash, flushed: bool) -> None:
    manager = stash.open(l1_config=bounded(2), l2_config=bounded(3, "lru"))
    put(manager, "a", "b", "c")
    # "a" fell out of L1 last, and yet was used least recently of all.
    if flushed:
        manager.maintain()
    put(manager, "d")
    assert sorted(manager.l2_tier.keys()) == ["b", "c", "d"]


def test_uses_reach_l2_in_the_order_they_happened_not_in_that_of_demotions(stash: Stash) -> None:
    manager = stash.open(l1_config=bounded(2, "fifo"), l2_config=bounded(3, "lru"))
    put(manager, "a", "b")
    manager.get("a")
    manager.get("b")
    manager.maintain()
    # L1 is fifo: "a" falls out now, after the use of "b".
    put(manager, "c")
    put(manager, "d")
    assert sorted(manager.l2_tier.keys()) == ["b", "c", "d"]


def test_l2_keeps_what_was_used_in_l1_often(stash: Stash) -> None:
    manager = stash.open(l1_config=bounded(10), l2_config=bounded(3, "lfu"))
    put(manager, "a", "b", "c")
    for key in "aabcc":
        manager.get(key)
    put(manager, "d")
    assert sorted(manager.l2_tier.keys()) == ["a", "c", "d"]


def test_l2_as_fifo_does_not_care_for_uses(stash: Stash) -> None:
    manager = stash.open(l1_config=bounded(10), l2_config=bounded(3, "fifo"))
    put(manager, "a", "b", "c")
    manager.get("a")
    manager.maintain()
    put(manager, "d")
    assert sorted(manager.l2_tier.keys()) == ["b", "c", "d"]


def test_l2_as_fifo_leaves_a_replacement_in_its_place(stash: Stash) -> None:
    manager = stash.open(l1_config=bounded(10), l2_config=bounded(3, "fifo"))
    put(manager, "a", "b", "c")
    manager.invalidate_by_health("a")
    put(manager, "d")
    assert sorted(manager.l2_tier.keys()) == ["b", "c", "d"]


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo"])
@pytest.mark.parametrize(
    ("uses", "left"),
    [
        ("", {"lru": "bcd", "lfu": "bcd", "fifo": "bcd"}),
        ("a", {"lru": "acd", "lfu": "acd", "fifo": "bcd"}),
        ("aabcc", {"lru": "bcd", "lfu": "acd", "fifo": "bcd"}),
        ("bbca", {"lru": "acd", "lfu": "abd", "fifo": "bcd"}),
    ],
)
@pytest.mark.parametrize("tier", ["l1", "l2", "l3"])
def test_every_tier_follows_its_policy(
    stash: Stash, tier: str, policy: str, uses: str, left: dict[str, str]
) -> None:
    manager = stash.open(**{f"{tier}_config": bounded(3, policy)})
    put(manager, "a", "b", "c")
    for key in uses:
        assert manager.get(key) is not None
    put(manager, "d")
    assert sorted(getattr(manager, f"{tier}_tier").keys()) == list(left[policy])
