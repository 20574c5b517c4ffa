"""The change feed: what it tells of each change, when, and in which order."""

from __future__ import annotations

import logging
import random
import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from itertools import pairwise
from typing import Any

import pytest

from proxystash_server.cache import (
    CacheEntry,
    CacheManager,
    CacheUnavailableError,
    Change,
    ChangeKind,
    HealthStatus,
    L2BackendType,
)
from proxystash_server.cache.counting.statistics import EvictionCause
from tests.server.cache.stash import Stash
from tests.server.cache.support import (
    HOUR,
    PASSWORD,
    SWITCHED_OFF,
    bounded,
    broken,
    content_of,
    fail_until_skipped,
    nothing_writable,
    put,
    run_in_threads,
    stored_in,
    wait_until,
)
from tests.server.cache.tier_contract import ANY

L3_DECIDES: dict[str, Any] = {}
L2_DECIDES: dict[str, Any] = {"l3_config": SWITCHED_OFF}
MEMORY_ALONE: dict[str, Any] = {"l2_config": SWITCHED_OFF, "l3_config": SWITCHED_OFF}
AUTHORITIES = {"L3 decides": L3_DECIDES, "L2 decides": L2_DECIDES, "memory alone": MEMORY_ALONE}


@pytest.fixture(params=L2BackendType)
def l2_backend(request: pytest.FixtureRequest) -> L2BackendType:
    return L2BackendType(request.param)


class Feed:
    """Keeps what it is told, call by call."""

    def __init__(self, manager: CacheManager) -> None:
        self.calls: list[list[Change]] = []
        self.since = manager.subscribe(self)

    def __call__(self, changes: Sequence[Change]) -> None:
        self.calls.append(list(changes))

    @property
    def changes(self) -> list[Change]:
        return [change for call in self.calls for change in call]

    @property
    def told(self) -> list[tuple[ChangeKind, str, EvictionCause | None]]:
        return [(change.kind, change.key, change.cause) for change in self.changes]

    def check_order(self) -> None:
        """Assert that no revision came out of its order."""
        revisions = [self.since, *(change.revision for change in self.changes)]
        assert revisions == sorted(set(revisions))

    def content(self) -> dict[str, CacheEntry]:
        """What is held, to somebody who knew that nothing was, and was told this."""
        held: dict[str, CacheEntry] = {}
        for change in self.changes:
            if change.entry is not None:
                held[change.key] = change.entry
            elif change.kind is ChangeKind.CLEAR:
                held.clear()
            else:
                del held[change.key]
        return held


PUT, HEALTH, DELETE = ChangeKind.PUT, ChangeKind.HEALTH, ChangeKind.DELETE
EXPIRY, EVICTION, CLEAR = ChangeKind.EXPIRY, ChangeKind.EVICTION, ChangeKind.CLEAR


# -- what is told


def delete(manager: CacheManager) -> None:
    assert manager.delete("a")


def expire_by_cleaning(manager: CacheManager) -> None:
    manager._clock.advance(HOUR)  # type: ignore[attr-defined]  # it is the tests' own
    assert manager.cleanup_expired() == 2


def expire_by_a_get(manager: CacheManager) -> None:
    manager._clock.advance(HOUR)  # type: ignore[attr-defined]  # it is the tests' own
    assert manager.get("a") is None


def expire_by_a_failure(manager: CacheManager) -> None:
    manager._clock.advance(HOUR)  # type: ignore[attr-defined]  # it is the tests' own
    assert not manager.invalidate_by_health("a").found


def fail_twice(manager: CacheManager) -> None:
    manager.invalidate_by_health("a")
    assert manager.invalidate_by_health("a").evicted


CHANGES: dict[
    str, tuple[Callable[[CacheManager], object], list[tuple[ChangeKind, str, EvictionCause | None]]]
] = {
    "put": (lambda manager: put(manager, "c"), [(PUT, "c", None)]),
    "replacement": (lambda manager: put(manager, "a"), [(PUT, "a", None)]),
    "failure": (lambda manager: manager.invalidate_by_health("a"), [(HEALTH, "a", None)]),
    "eviction by health": (fail_twice, [(HEALTH, "a", None), (EVICTION, "a", EvictionCause.HEALTH)]),
    "delete": (delete, [(DELETE, "a", None)]),
    "cleaning": (
        expire_by_cleaning,
        [(EXPIRY, "a", EvictionCause.TTL), (EXPIRY, "b", EvictionCause.TTL)],
    ),
    "get of what has expired": (expire_by_a_get, [(EXPIRY, "a", EvictionCause.TTL)]),
    "failure of what has expired": (expire_by_a_failure, [(EXPIRY, "a", EvictionCause.TTL)]),
    "clear": (lambda manager: manager.clear(), [(CLEAR, "", None)]),
}


@pytest.mark.parametrize("authority", AUTHORITIES)
@pytest.mark.parametrize("change", CHANGES)
def test_each_change_is_told_once_with_its_kind_and_cause(stash: Stash, change: str, authority: str) -> None:
    make, expected = CHANGES[change]
    manager = stash.open(**AUTHORITIES[authority], failure_threshold=2)
    put(manager, "a", "b", ttl_us=HOUR * 1_000_000)
    feed = Feed(manager)
    make(manager)
    assert sorted(feed.told, key=lambda told: told[1]) == expected
    feed.check_order()


@pytest.mark.parametrize(
    "authority",
    ["L3 decides", "L2 decides", "memory alone"],
)
def test_what_the_authority_evicts_to_make_room_is_told_after_what_took_it(
    stash: Stash, authority: str
) -> None:
    config = {
        "L3 decides": {"l3_config": bounded(2, "fifo")},
        "L2 decides": {**L2_DECIDES, "l2_config": bounded(2, "fifo")},
        "memory alone": {**MEMORY_ALONE, "l1_config": bounded(2, "fifo")},
    }[authority]
    manager = stash.open(**config)
    feed = Feed(manager)
    put(manager, "a", "b", "c")
    manager.put_many([manager.new_entry("http://192.0.2.1:1", key=key) for key in "de"])
    capacity = EvictionCause.CAPACITY
    assert feed.told == [
        (PUT, "a", None),
        (PUT, "b", None),
        (PUT, "c", None),
        (EVICTION, "a", capacity),
        (PUT, "d", None),
        (PUT, "e", None),
        (EVICTION, "b", capacity),
        (EVICTION, "c", capacity),
    ]
    feed.check_order()
    assert feed.content().keys() == content_of(manager).keys() == set("de")


def test_what_a_faster_tier_evicts_is_no_change(stash: Stash) -> None:
    manager = stash.open(l1_config=bounded(1), l2_config=bounded(2))
    feed = Feed(manager)
    put(manager, "a", "b", "c", "d")
    assert manager.get("a") is not None
    manager.maintain()
    assert feed.told == [(PUT, key, None) for key in "abcd"]


def test_what_is_evicted_on_start_because_the_capacity_is_smaller_is_told_to_nobody(stash: Stash) -> None:
    put(stash.open(), "a", "b", "c")
    manager = stash.reopen(l3_config=bounded(1, "fifo"))
    feed = Feed(manager)
    put(manager, "d")
    assert feed.told == [(PUT, "d", None), (EVICTION, "c", EvictionCause.CAPACITY)]


def test_a_batch_is_told_in_one_call_in_its_order(stash: Stash) -> None:
    manager = stash.open()
    feed = Feed(manager)
    manager.put_many([manager.new_entry("http://192.0.2.1:1", key=key, source=key) for key in "baca"])
    [call] = feed.calls
    assert [(change.kind, change.key) for change in call] == [(PUT, key) for key in "baca"]
    assert content_of(manager) == {key: (key, 0) for key in "abc"}
    feed.check_order()


@pytest.mark.parametrize("authority", AUTHORITIES)
def test_the_revision_of_a_change_is_the_version_of_the_entry_that_it_stored(
    stash: Stash, authority: str
) -> None:
    manager = stash.open(**AUTHORITIES[authority])
    feed = Feed(manager)
    put(manager, "a", source="first", username="jane")
    put(manager, "a", source="second", username="jane", password=PASSWORD)
    assert manager.get("a") is not None
    manager.invalidate_by_health("a")
    first, second, failed = feed.changes
    for change, source, failures in ((first, "first", 0), (second, "second", 0), (failed, "second", 1)):
        assert change.entry is not None
        assert change.entry.version == change.revision
        assert (change.entry.source, change.entry.failure_count) == (source, failures)
    for tier in (manager.l1_tier, manager.l2_tier, manager.l3_tier):
        entry = tier.get("a")
        assert entry == failed.entry or not tier.enabled
        assert entry is None or entry.version == failed.revision
    assert failed.entry is not None
    assert failed.entry.health_status is HealthStatus.UNHEALTHY
    # That it was used in between is part of it.
    assert failed.entry.access_count == 1


# -- what is not told


def test_what_changes_nothing_is_told_to_nobody(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "a")
    feed = Feed(manager)
    assert not manager.delete("nothing")
    assert not manager.invalidate_by_health("nothing").found
    assert manager.cleanup_expired() == 0
    assert manager.put_many([]) == []
    assert manager.get("a") is not None
    assert manager.get("nothing") is None
    manager.lookup_many(["a", "nothing"])
    manager.maintain()
    assert feed.calls == []


@pytest.mark.parametrize("l1_config", [bounded(10), SWITCHED_OFF])
def test_what_is_refused_is_told_to_nobody(stash: Stash, l1_config: object) -> None:
    manager = stash.open(l1_config=l1_config)
    put(manager, "a")
    feed = Feed(manager)
    # The first one that fails leaves open whether it was made, which is told.
    with nothing_writable(manager):
        for _ in range(4):
            with pytest.raises(CacheUnavailableError):
                manager.delete("a")
        feed.calls.clear()
        with pytest.raises(CacheUnavailableError):
            manager.delete("a")
        with pytest.raises(CacheUnavailableError):
            manager.clear()
        if not manager.l1_tier.enabled:
            assert stored_in(manager, "b", manager.new_entry("http://192.0.2.1:1", key="b")) == ()
        assert feed.calls == []


def test_what_the_authority_misses_is_told_when_it_is_made_and_not_again_when_it_catches_up(
    stash: Stash,
) -> None:
    manager = stash.open()
    put(manager, "a", "b", "c")
    feed = Feed(manager)
    with broken(manager.l3_tier):
        put(manager, "a", source="missed")
        manager.delete("b")
        manager.invalidate_by_health("c")
    expected = [(PUT, "a", None), (DELETE, "b", None), (HEALTH, "c", None)]
    assert feed.told == expected
    stash.recover(manager)
    assert feed.told == expected
    assert content_of(manager) == {"a": ("missed", 0), "c": ("", 1)}


@pytest.mark.parametrize("asked", [True, False], ids=["L3 fails", "L3 is skipped"])
def test_removals_that_the_authority_misses_are_told_once_too(stash: Stash, asked: bool) -> None:
    manager = stash.open(failure_threshold=1)
    put(manager, "a", "b", "c")
    put(manager, "d", ttl_us=1_000_000)
    feed = Feed(manager)
    stash.clock.advance(1)
    with broken(manager.l3_tier):
        if not asked:
            fail_until_skipped(manager, manager.l3_tier)
        assert manager.get("d") is None
        assert manager.invalidate_by_health("a").evicted
        manager.clear()
        put(manager, "b", source="after")
    expected = [
        (EXPIRY, "d", EvictionCause.TTL),
        (EVICTION, "a", EvictionCause.HEALTH),
        (CLEAR, "", None),
        (PUT, "b", None),
    ]
    assert feed.told == expected
    stash.recover(manager)
    assert feed.told == expected
    feed.check_order()
    assert content_of(manager) == {"b": ("after", 0)}


def test_what_the_authority_evicts_when_it_catches_up_is_told_then(stash: Stash) -> None:
    manager = stash.open(l3_config=bounded(2, "fifo"))
    put(manager, "a", "b")
    feed = Feed(manager)
    with broken(manager.l3_tier):
        put(manager, "c")
    assert feed.told == [(PUT, "c", None)]
    stash.recover(manager)
    assert feed.told == [(PUT, "c", None), (EVICTION, "a", EvictionCause.CAPACITY)]
    feed.check_order()
    assert content_of(manager).keys() == set("bc")


# -- when it is told


def test_a_change_is_told_when_every_tier_has_it(stash: Stash) -> None:
    manager = stash.open(failure_threshold=2)
    seen: list[tuple[ChangeKind, list[int | None]]] = []

    def look(changes: Sequence[Change]) -> None:
        for change in changes:
            held = [tier.get(change.key) for tier in (manager.l1_tier, manager.l2_tier, manager.l3_tier)]
            expected = None if change.entry is None else change.revision
            assert [None if entry is None else entry.version for entry in held] == [expected] * 3
            seen.append((change.kind, [expected]))

    manager.subscribe(look)
    put(manager, "a", "b")
    put(manager, "a")
    fail_twice(manager)
    manager.delete("b")
    put(manager, "c", ttl_us=HOUR * 1_000_000)
    manager._clock.advance(HOUR)  # type: ignore[attr-defined]  # it is the tests' own
    manager.cleanup_expired()
    manager.clear()
    kinds = [PUT, PUT, PUT, HEALTH, EVICTION, DELETE, PUT, EXPIRY, CLEAR]
    assert [kind for kind, _ in seen] == kinds


@pytest.mark.parametrize("cause", [EvictionCause.CAPACITY, EvictionCause.TTL])
def test_a_removal_that_nobody_asked_for_is_told_when_no_tier_has_the_entry(
    stash: Stash, cause: EvictionCause
) -> None:
    manager = stash.open(l3_config=bounded(2, "fifo"))
    put(manager, "a", "b", ttl_us=HOUR * 1_000_000)
    tiers = (manager.l1_tier, manager.l2_tier, manager.l3_tier)
    left: dict[str, list[CacheEntry | None]] = {}

    def look(changes: Sequence[Change]) -> None:
        for change in changes:
            if change.cause is cause:
                left[change.key] = [tier.get(change.key) for tier in tiers]

    manager.subscribe(look)
    assert all(tier.get("a") is not None for tier in tiers)
    if cause is EvictionCause.CAPACITY:
        put(manager, "c")
    else:
        expire_by_a_get(manager)
    assert left == {"a": [None] * 3}


@pytest.mark.parametrize(
    "config",
    [{}, {"l1_config": SWITCHED_OFF}, {"l1_config": SWITCHED_OFF, "l2_config": SWITCHED_OFF}],
    ids=["L1 has it", "L2 has it", "nobody else has it"],
)
def test_a_reset_is_told_when_the_authority_has_what_could_be_saved_of_a_damaged_row(
    stash: Stash, config: dict[str, object]
) -> None:
    manager = stash.open(**config)
    put(manager, "a", "b", source="sound")
    feed = Feed(manager)
    held: list[CacheEntry | None] = []
    manager.subscribe(lambda _changes: held.append(manager.l3_tier.get("a")))
    with closing(sqlite3.connect(stash.directory / "l3" / "proxystash.db")) as connection, connection:
        connection.execute("UPDATE entries SET source = 'damaged' WHERE key = 'a'")
    # Whoever reads every row comes across it.
    content_of(manager)
    saved = manager.l1_tier.get("a") or manager.l2_tier.get("a")
    assert (saved is None) == (not manager.l1_tier.enabled and not manager.l2_tier.enabled)
    assert held == [saved]
    assert [(change.kind, change.key, change.entry) for change in feed.changes] == [
        (ChangeKind.RESET, "", None)
    ]
    manager.maintain()
    assert len(feed.calls) == 1
    put(manager, "a")
    feed.check_order()


@pytest.mark.parametrize("change", ["put", "failure", "delete", "clear"])
def test_a_change_is_acknowledged_after_it_was_told(stash: Stash, change: str) -> None:
    manager = stash.open()
    put(manager, "a", "b")
    told, go_on, acknowledged = threading.Event(), threading.Event(), threading.Event()

    def listener(_changes: Sequence[Change]) -> None:
        told.set()
        assert go_on.wait(30)

    def make() -> None:
        CHANGES[change][0](manager)
        acknowledged.set()

    manager.subscribe(listener)
    thread = threading.Thread(target=make)
    thread.start()
    try:
        assert told.wait(30)
        assert not acknowledged.wait(0.05)
    finally:
        go_on.set()
        thread.join(30)
    assert acknowledged.is_set()


# -- the order


def test_revisions_go_on_growing_after_a_restart(stash: Stash) -> None:
    feeds = []
    manager = stash.open()
    for _ in range(3):
        feeds.append(Feed(manager))
        put(manager, "a", "b")
        manager.delete("a")
        manager = stash.reopen()
        # Also if the clock of the machine has been set back meanwhile.
        manager._changes.continue_after(0)
    for feed in feeds:
        feed.check_order()
    for before, after in pairwise(feeds):
        assert before.changes[-1].revision <= after.since


def test_who_subscribes_learns_how_far_the_changes_had_come(stash: Stash) -> None:
    manager = stash.open()
    first = Feed(manager)
    put(manager, "a", "b")
    second = Feed(manager)
    put(manager, "c")
    assert second.since == first.changes[1].revision
    assert second.changes == first.changes[2:]


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "L3 decides": {"l1_config": bounded(4)},
    "L3 decides and is full": {
        "l1_config": bounded(4),
        "l2_config": bounded(8),
        "l3_config": bounded(12),
    },
    "L2 decides and is full": {**L2_DECIDES, "l1_config": bounded(4), "l2_config": bounded(12)},
    "memory alone": MEMORY_ALONE,
    "memory alone and full": {**MEMORY_ALONE, "l1_config": bounded(12)},
}


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_changes_of_many_threads_are_told_in_the_order_of_their_commits(
    stash: Stash, configuration: str
) -> None:
    manager = stash.open(**CONFIGURATIONS[configuration], failure_threshold=3)
    feed, other = Feed(manager), Feed(manager)
    keys = [f"key-{number}" for number in range(20)]
    under_way = threading.Lock()

    def one_at_a_time(_changes: Sequence[Change]) -> None:
        assert under_way.acquire(blocking=False), "told by two threads at once"
        under_way.release()

    manager.subscribe(one_at_a_time)

    def change(worker: int) -> None:
        dice = random.Random(worker)
        for _ in range(60):
            [key] = dice.sample(keys, 1)
            match dice.randrange(6):
                case 0:
                    manager.delete(key)
                case 1 | 2:
                    manager.invalidate_by_health(key)
                case 3:
                    batch = [manager.new_entry("http://192.0.2.1:1", key=one) for one in dice.sample(keys, 5)]
                    manager.put_many(batch)
                case 4:
                    manager.get(key)
                case _:
                    # With a full cache, another's put in the same commit may push it out at once.
                    manager.put(key, manager.new_entry("http://192.0.2.1:1", key=key, source=f"{worker}"))

    run_in_threads(*(partial(change, worker) for worker in range(8)))
    feed.check_order()
    assert other.calls == feed.calls
    assert {change.kind for change in feed.changes} >= {PUT, HEALTH, DELETE, EVICTION}
    held = feed.content()
    assert {key: entry.version for key, entry in held.items()} == {
        entry.key: entry.version for entry in manager.list_entries("", 100, ANY)
    }
    assert {key: (entry.source, entry.failure_count) for key, entry in held.items()} == content_of(manager)


# -- listeners


def test_a_listener_that_fails_does_no_harm_and_is_told_the_next_change_too(
    stash: Stash, caplog: pytest.LogCaptureFixture
) -> None:
    manager = stash.open()
    before = Feed(manager)
    calls: list[Sequence[Change]] = []

    def fail(changes: Sequence[Change]) -> None:
        calls.append(changes)
        raise ZeroDivisionError

    manager.subscribe(fail)
    after = Feed(manager)
    with caplog.at_level(logging.ERROR):
        put(manager, "a", username="jane", password=PASSWORD)
        assert manager.delete("a")
    assert len(calls) == 2
    assert before.changes == after.changes
    assert [record.getMessage() for record in caplog.records] == ["a listener of the change feed failed"] * 2
    assert PASSWORD not in caplog.text


def test_who_has_unsubscribed_is_told_no_more(stash: Stash) -> None:
    manager = stash.open()
    gone, left = Feed(manager), Feed(manager)
    put(manager, "a")
    manager.unsubscribe(gone)
    put(manager, "b")
    assert [change.key for change in gone.changes] == ["a"]
    assert [change.key for change in left.changes] == ["a", "b"]
    # Once more is no mistake.
    manager.unsubscribe(gone)


def test_a_change_under_way_is_told_whole_to_who_unsubscribes(stash: Stash) -> None:
    manager = stash.open()
    told, go_on = threading.Event(), threading.Event()

    def slow(_changes: Sequence[Change]) -> None:
        told.set()
        assert go_on.wait(30)

    manager.subscribe(slow)
    last = Feed(manager)
    change = threading.Thread(target=partial(put, manager, "a"))
    change.start()
    assert told.wait(30)
    leave = threading.Thread(target=manager.unsubscribe, args=(last,))
    leave.start()
    leave.join(0.05)
    assert leave.is_alive()
    go_on.set()
    wait_until(lambda: not (leave.is_alive() or change.is_alive()))
    assert [one.key for one in last.changes] == ["a"]
