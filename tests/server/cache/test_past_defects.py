"""Defects that a review of the cache found, each with what it took to see it."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from proxystash_server.cache import CacheManager, CacheUnavailableError, EntryFilter, TierState
from proxystash_server.cache.entry.credentials import create_key_file
from tests.server.cache.stash import Stash
from tests.server.cache.support import (
    SWITCHED_OFF,
    bounded,
    break_tier,
    broken,
    content_of,
    fail_until_skipped,
    make_reachable,
    make_unreachable,
    put,
    repair_tier,
)


def _keys(manager: CacheManager) -> list[str]:
    return [entry.key for entry in manager.list_entries("", 100, EntryFilter())]


def test_a_wrong_key_is_noticed_when_a_tier_that_was_unreachable_at_the_start_comes_back(
    stash: Stash,
) -> None:
    put(stash.open(l2_config=SWITCHED_OFF), "key-1", username="alice", password="planted-secret")
    stash.close()
    hidden = make_unreachable(stash.directory / "l3")
    wrong = {"encryption_key": Fernet.generate_key().decode(), "l2_config": SWITCHED_OFF}
    manager = stash.open(**wrong)
    make_reachable(stash.directory / "l3", hidden)
    stash.recover(manager)

    assert manager.get_statistics().l3_stats.state is TierState.DEGRADED
    assert manager.get_statistics().l3_stats.evictions_corruption == 0
    found = stash.reopen(l2_config=SWITCHED_OFF).get("key-1")
    assert found is not None
    assert found.password is not None
    assert found.password.get_secret_value() == "planted-secret"


def test_what_a_new_l2_alone_acknowledged_survives_the_return_of_l3(stash: Stash) -> None:
    put(stash.open(), "old")
    stash.close()
    shutil.rmtree(stash.directory / "l2")
    hidden = make_unreachable(stash.directory / "l3")
    manager = stash.open(l1_config=SWITCHED_OFF)
    put(manager, "new")
    make_reachable(stash.directory / "l3", hidden)
    stash.recover(manager)

    assert _keys(manager) == ["new", "old"]


@pytest.mark.parametrize("change", ["clear", "delete"])
def test_what_a_new_l3_took_away_does_not_come_back_with_l2(stash: Stash, change: str) -> None:
    put(stash.open(), "key-1")
    stash.close()
    shutil.rmtree(stash.directory / "l3")
    hidden = make_unreachable(stash.directory / "l2")
    manager = stash.open()
    if change == "clear":
        manager.clear()
    else:
        manager.delete("key-1")
    make_reachable(stash.directory / "l2", hidden)
    stash.recover(manager)

    assert manager.get("key-1") is None
    assert _keys(manager) == []


def test_a_put_that_l2_took_while_l3_was_off_outlives_an_older_mark_of_l3(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "key-1", source="first")
    break_tier(manager.l2_tier)
    fail_until_skipped(manager, manager.l2_tier)
    put(manager, "key-1", source="second")
    manager.close()
    repair_tier(manager.l2_tier)
    put(stash.reopen(l3_config=SWITCHED_OFF), "key-1", source="third")
    manager = stash.reopen()

    assert content_of(manager) == {"key-1": ("third", 0)}


def test_a_failed_note_of_a_use_costs_no_entry(stash: Stash) -> None:
    """What L2 has evicted stands in L3 alone; L3 must not take a missed use for a missed change."""
    manager = stash.open(l1_config=bounded(1), l2_config=bounded(1))
    put(manager, "key-1", "key-2", "key-3")
    manager.get("key-1")
    with broken(manager.l3_tier, {"note_uses"}):
        manager.maintain()
    put(manager, "key-4")
    stash.recover(manager)

    assert _keys(manager) == ["key-1", "key-2", "key-3", "key-4"]


def test_a_row_whose_text_is_none_costs_itself_alone(stash: Stash) -> None:
    stash.validated = False
    put(stash.open(l2_config=SWITCHED_OFF), "key-1", "key-2", "key-3")
    stash.close()
    with sqlite3.connect(stash.directory / "l3" / "proxystash.db") as connection:
        connection.execute("UPDATE entries SET source = CAST(x'ff41' AS TEXT) WHERE key = 'key-2'")
    connection.close()
    manager = stash.open(l2_config=SWITCHED_OFF)

    assert _keys(manager) == ["key-1", "key-3"]
    assert manager.get_statistics().l3_stats.state is TierState.ACTIVE
    assert manager.get_statistics().l3_stats.evictions_corruption == 1


def test_what_has_to_make_room_for_a_replayed_entry_leaves_every_tier(stash: Stash) -> None:
    manager = stash.open(l3_config=bounded(2))
    put(manager, "key-1", "key-2")
    break_tier(manager.l3_tier)
    fail_until_skipped(manager, manager.l3_tier)
    put(manager, "key-3", "key-4")
    repair_tier(manager.l3_tier)
    stash.recover(manager)

    assert _keys(manager) == ["key-3", "key-4"]
    assert manager.get("key-1") is None
    assert manager.get_statistics().l3_stats.evictions_capacity == 2


def test_a_key_file_that_was_cut_short_is_no_obstacle(tmp_path: Path) -> None:
    """The name stands for a whole key or for none, also after a kill in the middle."""
    path = tmp_path / "data" / "secret.key"
    path.parent.mkdir()
    path.with_name("secret.key.new").write_bytes(b"half of a k")
    key = Fernet.generate_key()

    create_key_file(path, key)

    assert path.read_bytes() == key + b"\n"
    assert [found.name for found in path.parent.iterdir()] == ["secret.key"]


def test_one_failed_read_of_the_only_tier_that_knows_is_not_a_miss(stash: Stash) -> None:
    manager = stash.open(l1_config=bounded(1), l2_config=SWITCHED_OFF)
    put(manager, "key-1", "key-2")
    with broken(manager.l3_tier, {"get"}), pytest.raises(CacheUnavailableError):
        manager.get("key-1")
    with broken(manager.l3_tier, {"get", "commit"}), pytest.raises(CacheUnavailableError):
        manager.invalidate_by_health("key-1")

    assert manager.get("key-1") is not None


def test_a_put_ends_although_uses_keep_coming_in(stash: Stash) -> None:
    """A flush takes what there is when it begins, not what comes in while it runs."""
    manager = stash.open(l2_config=bounded(2))
    put(manager, "key-1", "key-2")
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            manager.get("key-1")

    reader = threading.Thread(target=read)
    reader.start()
    try:
        writer = threading.Thread(target=lambda: put(manager, "key-3"))
        writer.start()
        writer.join(60)
        assert not writer.is_alive()
    finally:
        stop.set()
        reader.join()
