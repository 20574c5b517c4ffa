"""What every tier promises, whatever it is made of.

A backend's test module derives a class from this one and says how to make its tier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise

import pytest

from proxystash_server.cache import CacheEntry, CacheTier, EntryFilter, HealthMonitoring, HealthStatus
from tests.server.cache.invariants import check_tier
from tests.server.cache.support import (
    HOUR,
    PASSWORD,
    START_US,
    USERNAME,
    FakeClock,
    bounded,
    keys_of,
    page,
    run_in_threads,
    stored,
)

MakeTier = Callable[..., CacheTier]

ANY = EntryFilter()
UNBOUNDED = bounded(None)
MONITORING = HealthMonitoring(
    last_health_check=datetime(2026, 5, 4, 3, 2, 1, 999_999, UTC),
    consecutive_health_failures=2,
    consecutive_health_successes=3,
    recovery_attempt=4,
    next_check_time=datetime(2027, 5, 4, 3, 2, 1, 1, UTC),
    last_health_error="connect timeout",
    total_health_checks=50,
    total_health_check_failures=2**40,
)
# Keys that trip up whoever quotes, splits, folds or sorts carelessly.
AWKWARD_KEYS = ["a", "A", "é", "e\u0301", "ｚ", "😀", "a b", "'; --", '"', "\\", "%", "a/../b", "x" * 256]


def everything_set(key: str = "full", *, version: int = 1) -> CacheEntry:
    """An entry in which no field has its default."""
    return stored(
        key,
        version=version,
        proxy_url="socks5://[2001:db8::1]:1080",
        username=USERNAME,
        password=PASSWORD,
        source="a “source”, ü",
        access_count=7,
        last_accessed_us=START_US + 5,
        health_status=HealthStatus.DEGRADED,
        failure_count=2,
        evicted_from_l1=True,
        health_monitoring=MONITORING,
        labels={"country": "DE", "a\"b'c": "ü\\n%", "$.x": ""},
        max_leases=9,
    )


def put(tier: CacheTier, *entries: CacheEntry) -> None:
    for entry in entries:
        assert tier.put(entry.key, entry)


class TierContract:
    """Run by every backend; a derived class provides the fixture `make`."""

    @pytest.fixture
    def tier(self, make: MakeTier) -> Iterator[CacheTier]:
        """A new tier, which must be consistent whatever the test did to it."""
        tier = make()
        yield tier
        check_tier(tier)

    # -- one entry

    def test_a_new_tier_is_empty(self, tier: CacheTier) -> None:
        assert tier.size() == 0
        assert tier.keys() == []
        assert tier.get("key-1") is None
        assert "key-1" not in tier
        assert page(tier, "", 10, ANY, START_US) == []

    def test_get_returns_every_field_as_it_was_put(self, tier: CacheTier) -> None:
        entry = everything_set()
        put(tier, entry)
        assert tier.get("full") == entry
        assert tier.get("full").version == entry.version  # type: ignore[union-attr]  # it was there a line above

    def test_get_returns_the_defaults_as_they_were_put(self, tier: CacheTier) -> None:
        entry = stored("bare")
        put(tier, entry)
        assert tier.get("bare") == entry

    def test_get_is_not_a_use(self, tier: CacheTier) -> None:
        put(tier, stored("key-1", access_count=3))
        tier.get("key-1")
        assert tier.get("key-1") == stored("key-1", access_count=3)

    @pytest.mark.parametrize("key", AWKWARD_KEYS)
    def test_any_valid_key_finds_its_own_entry(self, tier: CacheTier, key: str) -> None:
        put(tier, *(stored(other, source=f"of {other[:9]}") for other in AWKWARD_KEYS))
        assert tier.get(key) == stored(key, source=f"of {key[:9]}")
        assert key in tier

    def test_a_put_replaces_what_was_there(self, tier: CacheTier) -> None:
        put(tier, everything_set("key-1", version=1), stored("key-1", version=2, source="later"))
        assert tier.get("key-1") == stored("key-1", source="later")
        assert tier.size() == 1
        assert tier.keys() == ["key-1"]

    def test_delete_removes_the_entry_and_says_whether_it_was_held(self, tier: CacheTier) -> None:
        put(tier, stored("key-1"), stored("key-2"))
        assert tier.delete("key-1") is True
        assert tier.delete("key-1") is False
        assert tier.get("key-1") is None
        assert "key-1" not in tier
        assert tier.keys() == ["key-2"]

    def test_an_entry_put_after_a_delete_is_held(self, tier: CacheTier) -> None:
        put(tier, stored("key-1", version=1))
        tier.delete("key-1")
        put(tier, stored("key-1", version=2, source="again"))
        assert tier.get("key-1") == stored("key-1", source="again")
        assert tier.size() == 1

    # -- all entries

    def test_clear_removes_every_entry_and_says_how_many_there_were(self, tier: CacheTier) -> None:
        put(tier, *(stored(f"key-{number}") for number in range(20)))
        assert tier.clear() == 20
        assert tier.size() == 0
        assert tier.keys() == []
        assert tier.get("key-3") is None
        assert tier.clear() == 0

    def test_a_cleared_tier_holds_what_is_put_afterwards(self, tier: CacheTier) -> None:
        put(tier, stored("key-1", version=1), stored("key-2", version=2))
        tier.clear()
        put(tier, stored("key-2", version=3, source="later"))
        assert tier.keys() == ["key-2"]
        assert tier.get("key-2") == stored("key-2", source="later")

    def test_size_and_keys_follow_every_change(self, tier: CacheTier) -> None:
        put(tier, stored("a"), stored("b"), stored("c"))
        put(tier, stored("b", version=2))
        tier.delete("a")
        tier.delete("nothing")
        assert tier.size() == 2
        assert sorted(tier.keys()) == ["b", "c"]

    # -- expiry

    def test_expired_entries_are_held_until_they_are_removed(self, tier: CacheTier) -> None:
        put(tier, stored("key-1", ttl=-HOUR))
        assert tier.get("key-1") == stored("key-1", ttl=-HOUR)
        assert tier.size() == 1

    def test_an_entry_is_expired_from_its_time_of_expiry_on(self, tier: CacheTier) -> None:
        put(tier, stored("key-1", ttl=10))
        assert tier.expired_keys(START_US + 9_999_999) == []
        assert tier.expired_keys(START_US + 10_000_000) == ["key-1"]

    def test_what_has_expired_is_found_and_nothing_else(self, tier: CacheTier) -> None:
        put(tier, *(stored(f"old-{number}", ttl=1) for number in range(30)), stored("young"))
        found = tier.expired_keys(START_US + 2_000_000)
        assert sorted(found) == sorted(f"old-{number}" for number in range(30))

    def test_a_replacement_counts_with_its_own_time_of_expiry(self, tier: CacheTier) -> None:
        put(tier, stored("key-1", ttl=10), stored("key-1", version=2, ttl=20))
        assert tier.expired_keys(START_US + 15_000_000) == []

    def test_cleanup_removes_what_has_expired_by_the_clock_and_nothing_else(
        self, tier: CacheTier, clock: FakeClock
    ) -> None:
        put(tier, *(stored(f"old-{number}", ttl=10) for number in range(250)), stored("young", ttl=20))
        assert tier.cleanup_expired() == 0
        clock.advance(15)
        assert tier.cleanup_expired() == 250
        assert tier.keys() == ["young"]

    # -- pages

    def test_a_page_is_in_the_order_of_code_points(self, tier: CacheTier) -> None:
        put(tier, *(stored(key) for key in AWKWARD_KEYS))
        assert keys_of(page(tier, "", 100, ANY, START_US)) == sorted(AWKWARD_KEYS)

    def test_pages_of_any_size_give_every_entry_once(self, tier: CacheTier) -> None:
        keys = [f"key-{number:02}" for number in range(25)]
        put(tier, *(stored(key) for key in reversed(keys)))
        for limit in (1, 7, 24, 25, 26):
            listed: list[str] = []
            while found := keys_of(page(tier, listed[-1] if listed else "", limit, ANY, START_US)):
                assert len(found) <= limit
                listed += found
            assert listed == keys

    def test_a_page_begins_behind_a_key_that_need_not_be_held(self, tier: CacheTier) -> None:
        put(tier, stored("a"), stored("c"), stored("e"))
        assert keys_of(page(tier, "b", 10, ANY, START_US)) == ["c", "e"]
        assert keys_of(page(tier, "c", 10, ANY, START_US)) == ["e"]
        assert keys_of(page(tier, "e", 10, ANY, START_US)) == []

    def test_a_page_has_no_expired_entries_and_is_full_without_them(self, tier: CacheTier) -> None:
        put(tier, *(stored(f"key-{number}", ttl=10 if number % 2 else HOUR) for number in range(8)))
        at_expiry = START_US + 10_000_000
        assert keys_of(page(tier, "", 3, ANY, at_expiry)) == ["key-0", "key-2", "key-4"]
        assert keys_of(page(tier, "", 3, ANY, at_expiry - 1)) == ["key-0", "key-1", "key-2"]

    @pytest.mark.parametrize(
        ("entry_filter", "expected"),
        [
            (EntryFilter(source="shop"), ["a", "b"]),
            (EntryFilter(source="sho"), []),
            (EntryFilter(health_statuses=frozenset({HealthStatus.DEAD})), ["c"]),
            (EntryFilter(health_statuses=frozenset({HealthStatus.DEAD, HealthStatus.HEALTHY})), ["a", "c"]),
            (EntryFilter(schemes=frozenset({"http"})), ["a", "c"]),
            (EntryFilter(schemes=frozenset({"https", "socks5"})), ["b", "d"]),
            (EntryFilter(labels={"country": "DE"}), ["a", "c"]),
            (EntryFilter(labels={"country": "D"}), []),
            (EntryFilter(labels={"Country": "DE"}), []),
            (EntryFilter(labels={"a.b": "1"}), ["c"]),
            (EntryFilter(labels={"country": "DE", "a.b": "1"}), ["c"]),
            (EntryFilter(labels={"empty": ""}), ["d"]),
            (EntryFilter(labels={"absent": ""}), []),
            (EntryFilter(source="shop", schemes=frozenset({"https"})), ["b"]),
            (EntryFilter(source="shop", labels={"a.b": "1"}), []),
        ],
    )
    def test_a_filter_narrows_a_page(
        self, tier: CacheTier, entry_filter: EntryFilter, expected: list[str]
    ) -> None:
        put(
            tier,
            stored("a", source="shop", health_status=HealthStatus.HEALTHY, labels={"country": "DE"}),
            stored("b", source="shop", proxy_url="https://192.0.2.1:1", labels={"country": "FR"}),
            stored("c", health_status=HealthStatus.DEAD, labels={"country": "DE", "a.b": "1"}),
            stored("d", proxy_url="socks5://192.0.2.1:1", labels={"empty": ""}),
        )
        assert keys_of(page(tier, "", 10, entry_filter, START_US)) == expected
        # Also with pages so small that most of them are empty before the filter has been applied.
        assert keys_of(page(tier, "", 1, entry_filter, START_US)) == expected[:1]

    def test_scanning_on_finds_every_entry_once(self, tier: CacheTier) -> None:
        keys = [f"key-{number:02}" for number in range(25)]
        put(tier, *(stored(key, source="" if number % 5 else "shop") for number, key in enumerate(keys)))
        for entry_filter, expected in ((ANY, keys), (EntryFilter(source="shop"), keys[::5])):
            for limit in (1, 7, 25, 26):
                listed: list[str] = []
                place: str | None = ""
                while place is not None:
                    stretch = tier.scan(place, limit, entry_filter, START_US)
                    assert len(stretch.entries) <= limit
                    listed += keys_of(stretch.entries)
                    assert stretch.next_after is None or stretch.next_after > place
                    place = stretch.next_after
                assert listed == expected

    def test_a_page_shows_entries_whole(self, tier: CacheTier) -> None:
        put(tier, everything_set())
        assert page(tier, "", 10, ANY, START_US) == [everything_set()]

    # -- capacity

    def test_a_full_tier_evicts_one_entry_for_each_new_key(self, make: MakeTier) -> None:
        tier = make(bounded(3))
        for number in range(10):
            put(tier, stored(f"key-{number}"))
            assert tier.size() == min(number + 1, 3)
            assert f"key-{number}" in tier
        check_tier(tier)

    def test_a_replacement_in_a_full_tier_evicts_nothing(self, make: MakeTier) -> None:
        tier = make(bounded(3))
        put(tier, stored("a"), stored("b"), stored("c"), stored("b", version=2))
        assert sorted(tier.keys()) == ["a", "b", "c"]

    def test_a_delete_makes_room(self, make: MakeTier) -> None:
        tier = make(bounded(2))
        put(tier, stored("a"), stored("b"))
        tier.delete("a")
        put(tier, stored("c"))
        assert sorted(tier.keys()) == ["b", "c"]

    def test_a_clear_makes_room(self, make: MakeTier) -> None:
        tier = make(bounded(2))
        put(tier, stored("a"), stored("b"))
        tier.clear()
        put(tier, stored("c"), stored("d"))
        assert sorted(tier.keys()) == ["c", "d"]

    # -- threads

    def test_reads_during_writes_see_an_entry_whole_or_not_at_all(self, make: MakeTier) -> None:
        tier = make()
        versions = range(1, 120)

        def write(key: str) -> list[int]:
            for version in versions:
                if version % 20 == 0:
                    tier.delete(key)
                put(tier, stored(key, version=version, source=f"{key}:{version}", labels={"n": str(version)}))
            return []

        def read(key: str) -> list[int]:
            seen: list[int] = []
            while not seen or seen[-1] < versions[-1]:
                entry = tier.get(key)
                if entry is not None:
                    assert entry.source == f"{key}:{entry.version}"
                    assert entry.labels == {"n": str(entry.version)}
                    seen.append(entry.version)
                assert all(other.key in {"a", "b"} for other in page(tier, "", 5, ANY, START_US))
            return seen

        for seen in run_in_threads(
            lambda: write("a"), lambda: write("b"), lambda: read("a"), lambda: read("b")
        ):
            assert all(earlier <= later for earlier, later in pairwise(seen))
        check_tier(tier)

    def test_writes_from_several_threads_all_count(self, make: MakeTier) -> None:
        tier = make()

        def write(writer: int) -> None:
            put(tier, *(stored(f"{writer}-{number}") for number in range(25)))

        run_in_threads(*(partial(write, writer) for writer in range(6)))
        assert sorted(tier.keys()) == sorted(f"{w}-{n}" for w in range(6) for n in range(25))
        assert tier.size() == 150

    def test_writes_from_several_threads_never_exceed_the_capacity(self, make: MakeTier) -> None:
        tier = make(bounded(5))

        def write(writer: int) -> None:
            for number in range(25):
                put(tier, stored(f"{writer}-{number}"))
                assert tier.size() <= 5

        run_in_threads(*(partial(write, writer) for writer in range(4)))
        assert tier.size() == 5
        check_tier(tier)
