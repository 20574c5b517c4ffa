"""Nothing is done to a key for what was found of it before its lock was held."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from proxystash_server.cache import EntryFilter, L2BackendType
from proxystash_server.cache.coherence import recovery
from tests.server.cache.stash import Stash
from tests.server.cache.support import (
    SWITCHED_OFF,
    bounded,
    broken,
    content_of,
    content_of_tier,
    fail_until_skipped,
    flip_byte,
    journal_broken,
    put,
)

ANY = EntryFilter()


@pytest.fixture(params=L2BackendType)
def l2_backend(request: pytest.FixtureRequest) -> L2BackendType:
    return L2BackendType(request.param)


@contextmanager
def first(owner: object, name: str, before: Callable[[], object]) -> Iterator[None]:
    """Do something just before the first call of a method."""
    method = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        patch.undo()
        before()
        return method(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield


def forge(stash: Stash, *keys: str) -> None:
    """Change rows of L3 behind its back."""
    with closing(sqlite3.connect(stash.directory / "l3" / "proxystash.db")) as connection, connection:
        connection.executemany("UPDATE entries SET source = 'forged' WHERE key = ?", [(key,) for key in keys])


def test_a_put_between_the_discovery_of_a_damaged_row_and_its_removal_stays(stash: Stash) -> None:
    """Given a List that reads the damaged row, and a put of its key that is acknowledged in between."""
    fields = {"l1_config": SWITCHED_OFF, "l2_config": SWITCHED_OFF}
    manager = stash.open(**fields)
    put(manager, "a", "b")
    forge(stash, "a")
    database = manager.l3_tier._database  # type: ignore[attr-defined]  # L3 is SQLite's
    with first(database, "write", lambda: put(manager, "a", source="later")):
        manager.list_entries("", 10, ANY)
    assert content_of(manager) == {"a": ("later", 0), "b": ("", 0)}
    assert content_of(stash.reopen(**fields)) == {"a": ("later", 0), "b": ("", 0)}


def test_a_put_between_the_discovery_of_a_damaged_line_and_its_removal_stays(stash: Stash) -> None:
    """The same of an L2 that decides."""
    fields = {"l3_config": SWITCHED_OFF, "l1_config": SWITCHED_OFF}
    manager = stash.open(**fields)
    if manager.l2_tier.backend != "jsonl":
        pytest.skip("L2 is SQLite's, whose rows the test before is about")
    put(manager, "a", "b")
    path = stash.directory / "l2" / "entries.jsonl"
    flip_byte(path, path.read_bytes().index(b'"key":"a"') + 60)
    with first(manager.l2_tier, "_set_aside", lambda: put(manager, "a", source="later")):
        manager.list_entries("", 10, ANY)
    assert content_of(manager) == {"a": ("later", 0), "b": ("", 0)}
    assert content_of(stash.reopen(**fields)) == {"a": ("later", 0), "b": ("", 0)}


def test_a_row_found_damaged_while_others_are_brought_back_is_brought_back_too(stash: Stash) -> None:
    """Given damage that comes to light after its key was passed, and before L3 counts as complete."""
    manager = stash.open(l1_config=bounded(1))
    put(manager, "a", "b", "c")
    forge(stash, "b")
    tier = manager.l3_tier
    manager.list_entries("", 1, EntryFilter(source="none"))
    note = tier.note

    def list_and_note(**notes: object) -> None:
        forge(stash, "a")
        assert tier.get("a") is None
        tier.note = note  # type: ignore[method-assign]
        note(**notes)

    # The last step of what a List does that finds a damaged row.
    tier.note = list_and_note  # type: ignore[method-assign]
    manager.list_entries("", 10, ANY)
    assert content_of(manager) == {"a": ("", 0), "b": ("", 0), "c": ("", 0)}
    manager.maintain()
    assert content_of_tier(tier) == {"a": ("", 0), "b": ("", 0), "c": ("", 0)}


def test_a_key_that_l2_has_taken_again_is_not_dropped_as_doubted(stash: Stash) -> None:
    """Given a put between the look at what is doubted and the lock of the key."""
    manager = stash.open(l1_config=SWITCHED_OFF)
    put(manager, "a")
    with broken(manager.l2_tier, {"apply"}):
        put(manager, "a")
    assert manager._cache.doubted == {"a"}
    with first(recovery, "batches", lambda: put(manager, "a", source="later")):
        manager._recovery._drop_doubted()
    assert content_of_tier(manager.l2_tier) == {"a": ("later", 0)}


def test_a_change_that_is_saved_by_now_is_not_looked_for_in_memory(stash: Stash) -> None:
    """Given a delete that was written down between the look at what is unsaved and the lock of the key."""
    manager = stash.open()
    put(manager, "a")
    with broken(manager.l3_tier):
        fail_until_skipped(manager, manager.l3_tier)
        with journal_broken(manager):
            put(manager, "a")
        told: list[str] = []
        manager.subscribe(lambda changes: told.extend(change.kind.name for change in changes))
        with first(recovery, "batches", lambda: manager.delete("a")):
            manager._recovery._save_what_is_unsaved()
    assert told == ["DELETE"]
