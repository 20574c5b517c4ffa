"""Between L3 and L2: what L3 has taken is announced to L2, which is not believed until it has it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any
from unittest import mock

import pytest

from proxystash_server.cache import CacheManager, CacheUnavailableError, L2BackendType, SQLiteCacheTier
from proxystash_server.cache.tiers.base import Applied, Write
from tests.server.cache.stash import Stash
from tests.server.cache.support import (
    bounded,
    break_tier,
    broken,
    content_of,
    content_of_tier,
    disk_of,
    put,
    repair_tier,
    stored,
)
from tests.server.cache_tools.stopped import StoppedCache, told


@pytest.fixture(params=L2BackendType)
def l2_backend(request: pytest.FixtureRequest) -> L2BackendType:
    return L2BackendType(request.param)


def announced(stash: Stash) -> set[str]:
    """The keys that L3 says on disk are on their way to L2."""
    with closing(sqlite3.connect(stash.directory / "l3" / "proxystash.db")) as connection:
        [(text,)] = connection.execute("SELECT value FROM meta WHERE name = 'announced'")
    return set(json.loads(text))


def kill_before_l2_takes_it(stash: Stash, manager: CacheManager) -> None:
    """Go on in a copy of the files as they are when L3 has taken the next change, and L2 has not."""
    apply = manager.l2_tier.apply

    def killed(writes: Sequence[Write]) -> list[Applied]:
        stash.kill()
        return apply(writes)

    manager.l2_tier.apply = killed  # type: ignore[method-assign]


CHANGES: dict[str, tuple[Callable[[CacheManager], Any], dict[str, tuple[str, int]]]] = {
    "a put": (lambda manager: put(manager, "a", source="after"), {"a": ("after", 0), "b": ("before", 0)}),
    "an invalidation": (
        lambda manager: manager.invalidate_by_health("a"),
        {"a": ("before", 1), "b": ("before", 0)},
    ),
    "a delete": (lambda manager: manager.delete("a"), {"b": ("before", 0)}),
    "a batch": (
        lambda manager: manager.put_many(
            [manager.new_entry("http://192.0.2.1:1", key=key, source="after") for key in "abc"]
        ),
        dict.fromkeys("abc", ("after", 0)),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_killed_between_the_two_l2_is_not_believed(stash: Stash, change: str) -> None:
    """What L2 still has is older than what L3 took, and may have been read."""
    make, expected = CHANGES[change]
    manager = stash.open()
    put(manager, "a", "b", source="before")
    kill_before_l2_takes_it(stash, manager)
    make(manager)

    assert "a" in announced(stash)
    manager = stash.open()
    assert content_of(manager) == expected
    assert {key: manager.get(key) is not None for key in "abc"} == {key: key in expected for key in "abc"}
    for tier in (manager.l2_tier, manager.l3_tier):
        assert content_of_tier(tier) == expected
        assert tier.backlog() == {}


def test_killed_between_the_two_the_store_is_consistent(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "a", source="before")
    kill_before_l2_takes_it(stash, manager)
    put(manager, "a", source="after")

    report = StoppedCache(stash.directory, stash.config().l2_backend).check()
    assert report.consistent, told(report)
    assert [note.kind for note in report.notes] == ["backlog"]


def test_what_has_arrived_is_announced_until_the_next_commit(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "a", "b")
    assert announced(stash) == {"b"}
    put(manager, "c")
    assert announced(stash) == {"c"}
    # Known to have arrived by whoever starts after a kill, and no work is left over.
    manager = stash.reopen_after_kill()
    assert manager.l3_tier.backlog() == {}
    assert content_of_tier(manager.l2_tier).keys() == {"a", "b", "c"}


def test_nothing_is_announced_after_an_orderly_end(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "a", "b")
    stash.close()
    assert announced(stash) == set()


def test_a_change_that_is_interrupted_between_the_two_leaves_what_l3_holds(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "a", source="before")
    with (
        mock.patch.object(manager.l2_tier, "apply", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        put(manager, "a", source="after")
    assert content_of(manager) == {"a": ("after", 0)}
    entry = manager.get("a")
    assert entry is not None
    assert entry.source == "after"
    manager.maintain()
    assert content_of_tier(manager.l2_tier) == {"a": ("after", 0)}
    assert manager.l3_tier.backlog() == {}


def test_what_l2_could_not_take_and_l3_not_note_is_announced_still(stash: Stash) -> None:
    """L3 fails just when it is to note that L2 has failed; then the process is killed."""
    manager = stash.open(l1_config=bounded(1))
    put(manager, "a", "b", source="before")
    with broken(manager.l2_tier, {"apply"}), broken(manager.l3_tier, {"extend_backlog"}):
        put(manager, "a", source="after")
    put(manager, "c")
    assert announced(stash) == {"a", "c"}
    manager = stash.reopen_after_kill(l1_config=bounded(1))
    assert content_of(manager)["a"] == content_of_tier(manager.l2_tier)["a"] == ("after", 0)


def test_what_l2_could_not_take_has_a_mark_of_its_own(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "a", source="before")
    with broken(manager.l2_tier, {"apply"}):
        put(manager, "a", source="after")
    put(manager, "b")
    assert announced(stash) == {"b"}
    assert manager.l3_tier.backlog().keys() == {"a"}


def test_a_removal_that_nobody_could_make_changes_nothing(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "a", source="before")
    for tier in (manager.l2_tier, manager.l3_tier):
        break_tier(tier, {"apply"})
    with pytest.raises(CacheUnavailableError):
        manager.delete("a")
    for tier in (manager.l2_tier, manager.l3_tier):
        repair_tier(tier)
        assert content_of_tier(tier) == {"a": ("before", 0)}
    manager = stash.reopen_after_kill()
    assert content_of(manager) == content_of_tier(manager.l2_tier) == {"a": ("before", 0)}


def test_an_announcement_that_is_damaged_has_the_stores_compared(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "a", "b", source="before")
    kill_before_l2_takes_it(stash, manager)
    put(manager, "a", source="after")
    with closing(sqlite3.connect(stash.directory / "l3" / "proxystash.db", isolation_level=None)) as l3:
        l3.execute("UPDATE meta SET value = '{' WHERE name = 'announced'")
    manager = stash.open()
    for key, source in (("a", "after"), ("b", "before")):
        entry = manager.get(key)
        assert entry is not None
        assert entry.source == source


@pytest.mark.parametrize("repaired", [False, True])
def test_an_announcement_outlives_damage_to_what_was_announced(stash: Stash, repaired: bool) -> None:
    """L3 has lost the page with its entries: what L2 alone has is brought back, but nothing out of date."""
    manager = stash.open()
    put(manager, "a", "b", source="before")
    kill_before_l2_takes_it(stash, manager)
    put(manager, "a", source="after")
    path = stash.directory / "l3" / "proxystash.db"
    with closing(sqlite3.connect(path)) as l3:
        l3.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    data = bytearray(path.read_bytes())
    start = data.index(b"after") // 4096 * 4096
    data[start : start + 4096] = b"\xaa" * 4096
    path.write_bytes(data)
    if repaired:
        assert StoppedCache(stash.directory, stash.config().l2_backend).repair()
    manager = stash.open()
    assert manager.get("a") is None
    stash.recover(manager)
    assert manager.get("a") is None
    assert content_of(manager) == {"b": ("before", 0)}


def test_an_l3_that_fails_and_comes_back_knows_what_has_arrived(stash: Stash) -> None:
    """What L2 has is no reason to keep an entry in a bounded L3 for longer than others."""
    manager = stash.open(l3_config=bounded(2))
    put(manager, "a", "b")
    level = disk_of(manager).l3
    level.breaker.force_open()
    stash.recover(manager)
    assert level.works
    assert manager.l3_tier.backlog() == {}


def test_each_commit_stores_what_is_announced_then(stash: Stash) -> None:
    """Changes of several threads overlap: one may be on its way while another commits."""
    manager = stash.open()
    tier = manager.l3_tier
    assert isinstance(tier, SQLiteCacheTier)
    tier.announce({"a": 1, "b": 2})
    tier.apply([Write("a", stored("a", version=1), 1)])
    assert announced(stash) == {"a", "b"}
    tier.arrived(["a"])
    tier.apply([Write("b", stored("b", version=2), 2)])
    assert announced(stash) == {"b"}
    tier.settle(["b"])
    assert announced(stash) == set()
    manager.l2_tier.apply([Write(key, stored(key, version=version)) for version, key in enumerate("ab", 1)])
