"""Promise 1: once a change is acknowledged, every later read by anyone sees it or something newer."""

from __future__ import annotations

import threading
from functools import partial
from itertools import pairwise

import pytest

from proxystash_server.cache import CacheManager, EntryFilter, HealthStatus, L2BackendType
from tests.server.cache.stash import Stash
from tests.server.cache.support import SWITCHED_OFF, bounded, keys_of, put, run_in_threads

ANY = EntryFilter()
SMALL = {"l1_config": bounded(2), "l2_config": bounded(4)}
EVERY_SHAPE = {
    "all tiers": {},
    "small tiers": SMALL,
    "without L1": {"l1_config": SWITCHED_OFF},
    "without L2": {"l2_config": SWITCHED_OFF},
    "without L3": {"l3_config": SWITCHED_OFF},
    "L1 alone": {"l2_config": SWITCHED_OFF, "l3_config": SWITCHED_OFF},
    "L2 alone": {"l1_config": SWITCHED_OFF, "l3_config": SWITCHED_OFF},
    "L3 alone": {"l1_config": SWITCHED_OFF, "l2_config": SWITCHED_OFF},
}


@pytest.fixture(params=L2BackendType)
def l2_backend(request: pytest.FixtureRequest) -> L2BackendType:
    return L2BackendType(request.param)


@pytest.fixture(params=EVERY_SHAPE)
def manager(request: pytest.FixtureRequest, stash: Stash) -> CacheManager:
    return stash.open(**EVERY_SHAPE[request.param])


def test_a_put_is_seen_by_get_and_list(manager: CacheManager) -> None:
    [entry] = put(manager, "key-1", source="shop", username="u", password="p", labels={"country": "DE"})
    got = manager.get("key-1")
    assert got is not None
    assert got == entry.model_copy(update={"access_count": 1, "last_accessed": got.last_accessed})
    assert keys_of(manager.list_entries("", 10, ANY)) == ["key-1"]
    assert keys_of(manager.list_entries("", 10, EntryFilter(labels={"country": "DE"}))) == ["key-1"]


def test_a_put_is_stored_under_the_key_it_was_given(manager: CacheManager) -> None:
    entry = manager.new_entry("http://192.0.2.1:8080", key="its-own")
    manager.put("another", entry)
    got = manager.get("another")
    assert got is not None
    assert got.key == "another"
    assert manager.get("its-own") is None


def test_a_replacement_is_seen_everywhere(manager: CacheManager) -> None:
    put(manager, "key-1", source="first")
    manager.get("key-1")
    put(manager, "key-1", source="second")
    got = manager.get("key-1")
    assert got is not None
    assert got.source == "second"
    assert [entry.source for entry in manager.list_entries("", 10, ANY)] == ["second"]
    assert keys_of(manager.list_entries("", 10, EntryFilter(source="first"))) == []


def test_a_delete_is_seen_everywhere(manager: CacheManager) -> None:
    put(manager, "key-1", "key-2")
    assert manager.delete("key-1") is True
    assert manager.get("key-1") is None
    assert manager.delete("key-1") is False
    assert keys_of(manager.list_entries("", 10, ANY)) == ["key-2"]


def test_a_clear_is_seen_everywhere(manager: CacheManager) -> None:
    put(manager, "key-1", "key-2")
    manager.get("key-1")
    assert manager.clear() == 2
    assert manager.get("key-1") is None
    assert manager.list_entries("", 10, ANY) == []
    assert manager.clear() == 0
    put(manager, "key-1", source="after")
    assert [entry.source for entry in manager.list_entries("", 10, ANY)] == ["after"]


def test_an_invalidation_is_seen_everywhere(manager: CacheManager) -> None:
    put(manager, "key-1")
    manager.invalidate_by_health("key-1")
    got = manager.get("key-1")
    assert got is not None
    assert (got.failure_count, got.health_status) == (1, HealthStatus.UNHEALTHY)
    [listed] = manager.list_entries("", 10, EntryFilter(health_statuses=frozenset({HealthStatus.UNHEALTHY})))
    assert listed.failure_count == 1


def test_a_flush_after_a_delete_or_a_replacement_brings_nothing_back(manager: CacheManager) -> None:
    put(manager, "deleted", "replaced", source="first")
    for key in ("deleted", "replaced"):
        manager.get(key)
    manager.delete("deleted")
    put(manager, "replaced", source="second")
    manager.maintain()
    assert manager.get("deleted") is None
    got = manager.get("replaced")
    assert got is not None
    assert (got.source, got.access_count) == ("second", 1)


def test_many_entries_in_one_put_are_all_seen(manager: CacheManager) -> None:
    entries = [
        manager.new_entry(f"http://192.0.2.1:{port}", key=f"key-{port % 2}", source=str(port))
        for port in (1, 2, 3, 4)
    ]
    assert len(manager.put_many(entries)) == 4
    # Of equal keys the last one counts.
    assert {entry.key: entry.source for entry in manager.list_entries("", 10, ANY)} == {
        "key-0": "4",
        "key-1": "3",
    }
    assert manager.put_many([]) == []


def test_lookups_of_many_keys_answer_in_order(manager: CacheManager) -> None:
    put(manager, "a", "b")
    found = manager.lookup_many(["b", "nothing", "a", "b"])
    assert [entry and (entry.key, entry.access_count) for entry in found.entries] == [
        ("b", 1),
        None,
        ("a", 1),
        ("b", 2),
    ]
    assert [tier is None for tier in found.served_by] == [False, True, False, False]


def test_readers_in_other_threads_never_see_anything_older_than_before(stash: Stash) -> None:
    manager = stash.open(**SMALL)
    keys = [f"key-{number}" for number in range(6)]
    acknowledged = dict.fromkeys(keys, 0)
    done = threading.Event()

    def write() -> None:
        try:
            for number in range(1, 40):
                for key in keys:
                    manager.put(key, manager.new_entry("http://192.0.2.1:1", key=key, source=str(number)))
                    acknowledged[key] = number
                if number % 10 == 0:
                    manager.maintain()
        finally:
            done.set()

    def read(key: str) -> None:
        seen = [0]
        while not done.is_set():
            at_least = acknowledged[key]
            entry = manager.get(key)
            if at_least:
                assert entry is not None
            if entry is not None:
                assert int(entry.source) >= at_least
                seen.append(int(entry.source))
        assert all(earlier <= later for earlier, later in pairwise(seen))

    run_in_threads(write, *(partial(read, key) for key in keys[:3]))


def test_a_deleted_key_is_never_promoted_back_by_a_reader_in_another_thread(stash: Stash) -> None:
    manager = stash.open(**SMALL)
    others = [f"other-{number}" for number in range(4)]
    put(manager, *others)
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            for key in ("key-1", *others):
                manager.get(key)

    def put_and_delete() -> None:
        try:
            for _ in range(60):
                put(manager, "key-1")
                assert manager.get("key-1") is not None
                assert manager.delete("key-1")
                assert manager.get("key-1") is None
                assert "key-1" not in keys_of(manager.list_entries("", 10, ANY))
        finally:
            done.set()

    run_in_threads(put_and_delete, read, read)
    manager.maintain()
    assert manager.get("key-1") is None


def test_a_cleared_cache_stays_empty_whoever_reads_meanwhile(stash: Stash) -> None:
    manager = stash.open(**SMALL)
    keys = [f"key-{number}" for number in range(8)]
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            for key in keys:
                manager.get(key)

    def put_and_clear() -> None:
        try:
            for _ in range(15):
                put(manager, *keys)
                assert manager.clear() == 8
                assert [manager.get(key) for key in keys] == [None] * 8
        finally:
            done.set()

    run_in_threads(put_and_clear, read, read)
    manager.maintain()
    assert manager.list_entries("", 10, ANY) == []


def test_writers_of_the_same_keys_leave_one_and_the_same_entry_in_every_tier(stash: Stash) -> None:
    manager = stash.open()
    keys = ["a", "b", "c"]

    def write(writer: int) -> None:
        for number in range(15):
            entries = [
                manager.new_entry("http://192.0.2.1:1", key=key, source=f"{writer}:{number}") for key in keys
            ]
            if number % 3:
                manager.put_many(entries if writer % 2 else entries[::-1])
            else:
                manager.delete(keys[number % 2])

    run_in_threads(*(partial(write, writer) for writer in range(4)))
    for key in keys:
        versions = [
            entry and entry.version
            for entry in (tier.get(key) for tier in (manager.l1_tier, manager.l2_tier, manager.l3_tier))
        ]
        assert len(set(versions)) == 1
