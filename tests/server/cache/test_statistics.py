"""Promise 11: statistics add up, each event is counted once under its cause, and no count scans a table."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import pairwise

import pytest

from proxystash_server.cache import (
    CacheStatistics,
    CacheTierType,
    EntryFilter,
    L2BackendType,
    TierState,
    TierStatistics,
)
from proxystash_server.cache.counting.statistics import EvictionCause, StatisticsRecorder, TierFacts
from proxystash_server.cache.tiers.base import Applied, Write
from tests.server.cache.stash import Stash
from tests.server.cache.support import START_US, SWITCHED_OFF, FakeMonotonic, bounded, put, run_in_threads

L1, L2, L3 = CacheTierType
SECOND_US = 1_000_000


@pytest.fixture(params=L2BackendType)
def l2_backend(request: pytest.FixtureRequest) -> L2BackendType:
    return L2BackendType(request.param)


def check_sums(statistics: CacheStatistics) -> None:
    """What must add up in every snapshot."""
    assert statistics.hits == sum(tier.hits for tier in statistics.tiers)
    assert statistics.entries >= max(tier.entries for tier in statistics.tiers[1:])
    for tier in statistics.tiers:
        assert tier.max_entries == 0 or tier.entries <= tier.max_entries
        assert tier.hits + tier.misses <= statistics.hits + statistics.misses


def test_a_new_cache_has_counted_nothing(stash: Stash) -> None:
    statistics = stash.open().get_statistics()
    assert statistics.model_dump(exclude={"l1_stats", "l2_stats", "l3_stats"}) == {
        "observed_at_us": START_US,
        "started_at_us": START_US,
        "hits": 0,
        "misses": 0,
        "hit_rate": 0.0,
        "entries": 0,
        "promotions": 0,
        "demotions": 0,
        "removals": 0,
        "overall_hit_rate": 0.0,
        "total_size": 0,
        "l1_degraded": False,
        "l2_degraded": False,
        "l3_degraded": False,
    }
    for tier in statistics.tiers:
        assert tier.total_evictions == tier.errors == tier.hits == tier.misses == tier.entries == 0
        assert tier.state is TierState.ACTIVE


def test_a_snapshot_says_what_the_tiers_are(stash: Stash, l2_backend: L2BackendType) -> None:
    manager = stash.open(l1_config=bounded(7), l2_config=SWITCHED_OFF)
    stash.clock.advance(5)
    statistics = manager.get_statistics()
    assert [tier.backend for tier in statistics.tiers] == ["memory", l2_backend.value, "sqlite"]
    assert [tier.max_entries for tier in statistics.tiers] == [7, 0, 0]
    assert [tier.state for tier in statistics.tiers] == [
        TierState.ACTIVE,
        TierState.DISABLED,
        TierState.ACTIVE,
    ]
    assert (statistics.started_at_us, statistics.observed_at_us) == (START_US, START_US + 5 * SECOND_US)
    assert (statistics.l1_degraded, statistics.l2_degraded, statistics.l3_degraded) == (False, True, False)


def test_hits_and_misses_are_counted_where_they_happened(stash: Stash) -> None:
    manager = stash.open(l1_config=bounded(1), l2_config=bounded(2))
    put(manager, "a", "b", "c")
    for key in ("c", "b", "a", "nothing"):
        manager.get(key)
    statistics = manager.get_statistics()
    assert [(tier.hits, tier.misses) for tier in statistics.tiers] == [(1, 3), (1, 2), (1, 1)]
    assert (statistics.hits, statistics.misses, statistics.hit_rate) == (3, 1, 0.75)
    assert [tier.hit_rate for tier in statistics.tiers] == [1 / 4, 1 / 3, 1 / 2]
    check_sums(statistics)


def test_listing_putting_and_deleting_are_no_lookups(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "a")
    manager.list_entries("", 10, EntryFilter())
    manager.invalidate_by_health("a")
    manager.delete("a")
    statistics = manager.get_statistics()
    assert (statistics.hits, statistics.misses) == (0, 0)
    assert [(tier.hits, tier.misses) for tier in statistics.tiers] == [(0, 0)] * 3


def test_entries_are_the_distinct_ones(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "a", "b", "c")
    put(manager, "a")
    statistics = manager.get_statistics()
    assert (statistics.entries, statistics.total_size) == (3, 9)
    assert [tier.entries for tier in statistics.tiers] == [3, 3, 3]


def test_removals_are_no_evictions(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "a", "b", "c", "d")
    manager.delete("a")
    manager.delete("a")
    manager.clear()
    manager.clear()
    statistics = manager.get_statistics()
    assert statistics.removals == 4
    assert [tier.total_evictions for tier in statistics.tiers] == [0, 0, 0]


def test_each_eviction_is_counted_once_under_its_cause_in_each_tier_that_lost_the_entry(stash: Stash) -> None:
    manager = stash.open(l1_config=bounded(2), l2_config=bounded(3))
    put(manager, "expires", ttl_us=10 * SECOND_US)
    put(manager, "fails", "pushed out", "last")
    for _ in range(3):
        manager.invalidate_by_health("fails")
    stash.clock.advance(10)
    manager.get("expires")
    statistics = manager.get_statistics()
    assert [tier.evictions_capacity for tier in statistics.tiers] == [2, 1, 0]
    assert [tier.evictions_health for tier in statistics.tiers] == [0, 1, 1]
    assert [tier.evictions_ttl for tier in statistics.tiers] == [0, 0, 1]
    assert [tier.evictions_corruption for tier in statistics.tiers] == [0, 0, 0]
    assert statistics.entries == 2


def test_evictions_add_up_with_what_each_tier_holds(stash: Stash) -> None:
    """What went into L1 is still there or has been counted out."""
    manager = stash.open(l1_config=bounded(3), l2_config=bounded(5), l3_config=bounded(8))
    for number in range(30):
        put(manager, f"key-{number}")
    statistics = manager.get_statistics()
    assert [tier.entries for tier in statistics.tiers] == [3, 5, 8]
    assert [tier.entries + tier.evictions_capacity for tier in statistics.tiers] == [30, 30, 30]
    assert statistics.entries == 8


def test_a_snapshot_reads_each_size_once(stash: Stash) -> None:
    """So that one snapshot's numbers belong together even while entries come and go."""
    manager = stash.open()
    put(manager, "a")
    sizes = iter(range(100, 200))
    for tier in (manager.l1_tier, manager.l2_tier, manager.l3_tier):
        tier.size = lambda: next(sizes)  # type: ignore[method-assign]
    stash.validated = False
    statistics = manager.get_statistics()
    assert statistics.entries == statistics.l3_stats.entries


def test_a_batch_of_no_keys_is_no_read(stash: Stash) -> None:
    manager = stash.open()
    assert manager.lookup_many([]).entries == []
    assert manager.get_statistics().l1_stats.read_latency.max_us == 0


def test_what_is_being_removed_counts_no_more(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "key-1", "key-2")
    apply = manager.l2_tier.apply
    meanwhile: list[CacheStatistics] = []

    def watched(writes: Sequence[Write]) -> list[Applied]:
        meanwhile.append(manager.get_statistics())
        return apply(writes)

    manager.l2_tier.apply = watched  # type: ignore[method-assign]
    manager.delete("key-1")
    [statistics] = meanwhile
    check_sums(statistics)
    assert (statistics.entries, statistics.l2_stats.entries, statistics.l3_stats.entries) == (1, 1, 1)


def test_snapshots_taken_while_everything_changes_add_up(stash: Stash) -> None:
    manager = stash.open(l1_config=bounded(5), l2_config=bounded(10))
    done = threading.Event()
    snapshots: list[CacheStatistics] = []

    def change() -> None:
        try:
            for number in range(1000):
                put(manager, f"key-{number % 20}")
                manager.get(f"key-{(number * 7) % 20}")
                if number % 9 == 0:
                    manager.delete(f"key-{number % 20}")
        finally:
            done.set()

    def watch() -> None:
        # Without a pause, the one who changes would hardly come to run.
        while not done.wait(0.0002):
            snapshots.append(manager.get_statistics())

    run_in_threads(change, watch)
    for statistics in snapshots:
        check_sums(statistics)
        assert statistics.entries == statistics.l3_stats.entries
    for earlier, later in pairwise(snapshots):
        assert later.hits >= earlier.hits
        assert later.misses >= earlier.misses
        assert later.promotions >= earlier.promotions
        assert later.removals >= earlier.removals


def test_lookups_from_several_threads_are_all_counted(stash: Stash) -> None:
    manager = stash.open(l1_config=bounded(2))
    put(manager, "a", "b", "c")

    def look_up() -> None:
        for number in range(50):
            manager.get("abcx"[number % 4])

    run_in_threads(*[look_up] * 4)
    statistics = manager.get_statistics()
    assert statistics.hits + statistics.misses == 200
    assert statistics.misses == 4 * 12
    check_sums(statistics)


def test_counts_begin_anew_with_each_run_and_entries_do_not(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "a", "b")
    manager.get("a")
    statistics = stash.reopen().get_statistics()
    assert (statistics.entries, statistics.hits) == (2, 0)
    assert [tier.entries for tier in statistics.tiers] == [0, 2, 2]


def test_switched_off_nothing_is_counted_but_sizes(stash: Stash) -> None:
    manager = stash.open(enable_statistics=False)
    put(manager, "a", "b")
    manager.get("a")
    manager.get("nothing")
    manager.delete("b")
    statistics = manager.get_statistics()
    assert (statistics.hits, statistics.misses, statistics.removals, statistics.entries) == (0, 0, 0, 1)


def test_reads_and_writes_are_timed(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "a")
    manager = stash.reopen()
    put(manager, "b")
    manager.get("a")
    manager.get("a")
    for tier in manager.get_statistics().tiers:
        assert tier.write_latency.max_us > 0
    statistics = manager.get_statistics()
    assert statistics.l1_stats.read_latency.max_us > 0
    assert statistics.l2_stats.read_latency.p50_us <= statistics.l2_stats.read_latency.p99_us
    stash.monotonic.advance(61)
    for tier in manager.get_statistics().tiers:
        assert tier.write_latency.max_us == 0


def test_statistics_are_there_after_the_cache_is_closed(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "a")
    manager.get("a")
    manager.close()
    assert manager.get_statistics().hits == 1


def test_proxywhirls_names_of_numbers_have_its_meaning(stash: Stash) -> None:
    """What proxywhirl 0.3.3 gives for the same calls, but for evictions, which it does not all count."""
    manager = stash.open(l1_config=bounded(2))
    put(manager, "a", "b", "c", "d")
    for key in ("a", "b", "c", "d", "x", "y", "z", "a"):
        manager.get(key)
    manager.get("a")
    statistics = manager.statistics
    assert statistics.overall_hit_rate == pytest.approx(6 / (6 + 8))
    assert statistics.hit_rate == pytest.approx(6 / (6 + 3))
    assert (statistics.total_size, statistics.entries) == (2 + 4 + 4, 4)
    assert statistics.l1_stats.evictions_lru == statistics.l1_stats.total_evictions == 7
    assert statistics.l1_stats.current_size == 2
    assert statistics.to_metrics_dict() == {
        "cache.overall.hit_rate": statistics.overall_hit_rate,
        "cache.total_size": 10.0,
        "cache.promotions": 5.0,
        "cache.demotions": 7.0,
        "cache.l1.hit_rate": pytest.approx(1 / 9),
        "cache.l1.size": 2.0,
        "cache.l2.hit_rate": pytest.approx(5 / 8),
        "cache.l2.size": 4.0,
        "cache.l3.hit_rate": 0.0,
        "cache.l3.size": 4.0,
    }
    dumped = statistics.model_dump()
    assert dumped["overall_hit_rate"] == statistics.overall_hit_rate
    assert dumped["l1_stats"]["total_evictions"] == 7


def test_total_evictions_are_those_under_every_cause() -> None:
    tier = TierStatistics(
        evictions_capacity=1, evictions_ttl=10, evictions_health=100, evictions_corruption=1000
    )
    assert tier.total_evictions == 1111


def test_a_snapshot_does_not_change_afterwards(stash: Stash) -> None:
    manager = stash.open()
    before = manager.get_statistics()
    put(manager, "a")
    manager.get("a")
    assert (before.hits, before.entries) == (0, 0)
    with pytest.raises(ValueError, match="frozen"):
        before.hits = 1  # type: ignore[misc]  # that is the point


# -- the recorder by itself


def test_the_recorder_keeps_events_apart() -> None:
    recorder = StatisticsRecorder(START_US, FakeMonotonic())
    recorder.record_lookup(L3, [L1, L2], promotions=2)
    recorder.record_lookup(None, [L1, L2, L3], promotions=0)
    recorder.record_evictions(EvictionCause.CAPACITY, {L1: 2, L2: 1}, demotions=2)
    recorder.record_evictions(EvictionCause.CORRUPTION, {L3: 1})
    recorder.record_removals(4)
    recorder.record_error(L2)
    facts = {tier: TierFacts("backend", TierState.ACTIVE, 3, 0) for tier in CacheTierType}
    snapshot = recorder.snapshot(START_US, facts, 3, l1_hits=1)
    assert (snapshot.hits, snapshot.misses, snapshot.promotions) == (2, 1, 2)
    assert (snapshot.demotions, snapshot.removals) == (2, 4)
    assert [(tier.hits, tier.misses) for tier in snapshot.tiers] == [(1, 2), (0, 2), (1, 1)]
    assert [tier.total_evictions for tier in snapshot.tiers] == [2, 1, 1]
    assert [tier.errors for tier in snapshot.tiers] == [0, 1, 0]


def test_statistics_cost_no_scan_of_a_tier(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "a", "b")
    for tier in (manager.l1_tier, manager.l2_tier, manager.l3_tier):
        for name in ("keys", "page", "get", "versions", "expired_keys"):
            if hasattr(tier, name):
                setattr(tier, name, _forbidden)
    try:
        assert manager.get_statistics().entries == 2
    finally:
        for tier in (manager.l1_tier, manager.l2_tier, manager.l3_tier):
            for name in ("keys", "page", "get", "versions", "expired_keys"):
                vars(tier).pop(name, None)


def _forbidden(*_args: object) -> object:
    raise AssertionError("a snapshot looked at entries")
