"""What several faults at once, or one at a bad moment, must not do, each with the least it took to see it."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from unittest import mock

import pytest

from proxystash_server.cache import (
    CacheManager,
    CacheTierType,
    CacheUnavailableError,
    JsonlCacheTier,
    L2BackendType,
    SQLiteCacheTier,
    TierState,
)
from proxystash_server.cache.coherence.feed import Change, ChangeKind
from proxystash_server.cache.errors import TierError
from proxystash_server.cache.tiers.jsonl.log import LogFile
from tests.server.cache.stash import Stash
from tests.server.cache.support import (
    READS,
    SWITCHED_OFF,
    WRITES,
    bounded,
    break_tier,
    broken,
    check_disk_tiers,
    content_of,
    fail_until_skipped,
    journal_broken,
    make_reachable,
    make_unreachable,
    put,
    repair_tier,
    stored_in,
)

L1, L2, L3 = CacheTierType


@pytest.fixture(params=L2BackendType)
def l2_backend(request: pytest.FixtureRequest) -> L2BackendType:
    return L2BackendType(request.param)


def source_of(manager: CacheManager, key: str) -> str | None:
    entry = manager.get(key)
    return None if entry is None else entry.source


@contextmanager
def segment_failing(operation: str, *, after_doing_it: bool = False) -> Iterator[None]:
    """One operation on a file of JSON lines, as the journal's, fails for a while."""
    intact = getattr(LogFile, operation)

    def fail(self: LogFile, *args: object) -> None:
        if after_doing_it:
            intact(self, *args)
        raise OSError(5, "a fault made by the test")

    with mock.patch.object(LogFile, operation, fail):
        yield


class Listener:
    """Keeps what it is told."""

    def __init__(self, manager: CacheManager) -> None:
        self.changes: list[Change] = []
        manager.subscribe(self.changes.extend)

    @property
    def told(self) -> list[tuple[ChangeKind, str]]:
        return [(change.kind, change.key) for change in self.changes]


# -- L3 has made a change, and says that it failed


def test_a_failure_that_l3_has_counted_without_saying_so_is_counted_once(stash: Stash) -> None:
    """Nobody else holds the entry, so that whoever decides again would see what L3 has made of it."""
    manager = stash.open(l1_config=SWITCHED_OFF, l2_config=bounded(1))
    put(manager, "a", "b")
    with broken(manager.l3_tier, {"commit"}, after_doing_it=True):
        assert manager.invalidate_by_health("a").failure_count == 1
    manager.maintain()
    assert content_of(manager)["a"] == ("", 1)


def test_an_eviction_by_health_that_l3_has_made_without_saying_so_is_told(stash: Stash) -> None:
    manager = stash.open(l1_config=SWITCHED_OFF, l2_config=bounded(1), failure_threshold=1)
    put(manager, "a", "b")
    listener = Listener(manager)
    with broken(manager.l3_tier, {"commit"}, after_doing_it=True):
        assert manager.invalidate_by_health("a").evicted
    assert listener.told == [(ChangeKind.EVICTION, "a")]


def test_a_delete_that_l3_has_made_without_saying_so_is_told(stash: Stash) -> None:
    manager = stash.open(l1_config=SWITCHED_OFF, l2_config=bounded(1))
    put(manager, "a", "b")
    listener = Listener(manager)
    with broken(manager.l3_tier, {"commit"}, after_doing_it=True):
        assert manager.delete("a")
    assert listener.told == [(ChangeKind.DELETE, "a")]


def test_a_change_that_was_refused_and_yet_made_has_subscribers_begin_anew(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "a")
    listener = Listener(manager)
    with (
        broken(manager.l3_tier, {"commit"}, after_doing_it=True),
        journal_broken(manager),
        pytest.raises(CacheUnavailableError),
    ):
        manager.delete("a")
    assert manager.get("a") is None
    assert listener.told == [(ChangeKind.RESET, "")]


def test_a_clear_that_was_refused_and_yet_made_is_seen_by_every_read(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "a")
    listener = Listener(manager)
    with (
        broken(manager.l3_tier, {"clear", "clear_before"}, after_doing_it=True),
        journal_broken(manager),
        pytest.raises(CacheUnavailableError),
    ):
        manager.clear()
    assert content_of(manager) == {}
    assert manager.get("a") is None
    assert listener.told == [(ChangeKind.RESET, "")]


@pytest.mark.parametrize("asked", [True, False], ids=["L3 fails", "L3 is skipped"])
def test_a_delete_of_what_only_l3_may_have_is_told(stash: Stash, asked: bool) -> None:
    """Whether it was there nobody can tell; a subscriber may have been told of it."""
    manager = stash.open(l1_config=bounded(1), l2_config=bounded(1))
    put(manager, "a", "b")
    listener = Listener(manager)
    with broken(manager.l3_tier):
        if not asked:
            fail_until_skipped(manager, manager.l3_tier)
        assert not manager.delete("a")
    assert listener.told == [(ChangeKind.DELETE, "a")]
    stash.recover(manager)
    assert content_of(manager).keys() == {"b"}


def test_a_delete_of_what_memory_alone_had_and_has_lost_is_told(stash: Stash) -> None:
    manager = stash.open(l1_config=bounded(1))
    with broken(manager.l3_tier, {"commit"}), journal_broken(manager):
        put(manager, "a", "b")
    listener = Listener(manager)
    manager.delete("a")
    assert listener.told == [(ChangeKind.DELETE, "a")]


# -- a group that pushes out what it is about to store


def test_what_a_batch_has_pushed_out_and_then_stored_is_held_and_said_to_be(stash: Stash) -> None:
    manager = stash.open(l1_config=bounded(2), l2_config=bounded(2), l3_config=bounded(2))
    put(manager, "a", "b")
    listener = Listener(manager)
    entries = [manager.new_entry("http://192.0.2.1:1", key=key) for key in "ca"]
    assert manager.put_many(entries) == [(L1, L2, L3), (L1, L2, L3)]
    assert content_of(manager).keys() == {"a", "c"}
    assert (ChangeKind.EVICTION, "b") in listener.told
    assert (ChangeKind.EVICTION, "a") not in listener.told


def test_what_a_batch_has_pushed_out_of_l2_is_kept_for_l3_which_has_missed_it(stash: Stash) -> None:
    manager = stash.open(l1_config=SWITCHED_OFF, l2_config=bounded(1))
    entries = [manager.new_entry("http://192.0.2.1:1", key=key) for key in "ab"]
    with broken(manager.l3_tier):
        assert manager.put_many(entries) == [(L2,), (L2,)]
    assert content_of(stash.reopen_after_kill()) == {"a": ("", 0), "b": ("", 0)}


# -- neither L3 nor the journal can be written


def test_what_stands_in_memory_alone_is_found_there(stash: Stash) -> None:
    """L2, which held the entry when L1 did not, is no place where it lasts."""
    manager = stash.open(l1_config=bounded(1))
    put(manager, "a", "b")
    with broken(manager.l3_tier), journal_broken(manager):
        fail_until_skipped(manager, manager.l3_tier)
        assert manager.invalidate_by_health("a").failure_count == 1
        entry = manager.get("a")
        assert entry is not None
        assert entry.failure_count == 1
    stash.recover(manager)
    check_disk_tiers(manager, {"a": ("", 1), "b": ("", 0)})


def test_what_memory_has_lost_does_not_linger_in_l2(stash: Stash) -> None:
    manager = stash.open(l1_config=bounded(1))
    put(manager, "a", source="before")
    listener = Listener(manager)
    with broken(manager.l3_tier), journal_broken(manager):
        put(manager, "a", source="lost")
        put(manager, "b", source="kept")
    stash.recover(manager)
    assert source_of(manager, "a") == content_of(manager)["a"][0] == "before"
    assert source_of(manager, "b") == "kept"
    assert ChangeKind.RESET in dict(listener.told)


@pytest.mark.parametrize("healed", [False, True])
def test_what_stood_in_memory_alone_at_an_orderly_end_is_there_or_not(stash: Stash, healed: bool) -> None:
    """But not in one of the tiers alone; and it is there if it could be written down in the end."""
    manager = stash.open()
    put(manager, "a", source="before")
    break_tier(manager.l3_tier, WRITES | READS)
    with journal_broken(manager):
        put(manager, "a", source="in memory")
        if not healed:
            manager.close()
    manager.close()
    repair_tier(manager.l3_tier)
    manager = stash.reopen()
    assert source_of(manager, "a") == content_of(manager)["a"][0] == ("in memory" if healed else "before")


@pytest.mark.parametrize("end", ["none", "orderly", "abrupt"])
def test_what_the_journal_has_is_not_lost_with_what_memory_alone_had(stash: Stash, end: str) -> None:
    manager = stash.open(l1_config=bounded(1))
    put(manager, "a", source="before")
    with broken(manager.l3_tier):
        fail_until_skipped(manager, manager.l3_tier)
        put(manager, "a", source="in the journal")
        with journal_broken(manager):
            put(manager, "a", source="in memory")
            put(manager, "b")
        if end == "none":
            manager.maintain()
            assert source_of(manager, "a") == "in the journal"
        elif end == "orderly":
            manager.close()
        else:
            stash.kill()
    if end == "none":
        stash.recover(manager)
    else:
        manager = stash.open(l1_config=bounded(1))
    assert source_of(manager, "a") == content_of(manager)["a"][0] == "in the journal"


def test_an_older_line_of_what_stood_in_memory_alone_brings_nothing_back(stash: Stash) -> None:
    """Its key stays in the journal's file, which cannot be taken away yet."""
    manager = stash.open()
    with broken(manager.l3_tier):
        fail_until_skipped(manager, manager.l3_tier)
        put(manager, "a", source="in the journal")
        with journal_broken(manager):
            put(manager, "a", source="in memory")
    with mock.patch("pathlib.Path.unlink", side_effect=OSError(5, "a fault made by the test")):
        stash.recover(manager)
    assert source_of(manager, "a") == "in memory"
    assert manager.delete("a")
    assert content_of(stash.reopen_after_kill()) == {}


def test_l3_does_not_get_what_stood_in_memory_alone_before_the_journal_which_has_something_older(
    stash: Stash,
) -> None:
    """Or that would be read again after a kill, while L3 is away."""
    manager = stash.open()
    with broken(manager.l3_tier):
        fail_until_skipped(manager, manager.l3_tier)
        put(manager, "a", source="in the journal")
        with journal_broken(manager):
            put(manager, "a", "b", source="in memory")
    with journal_broken(manager), mock.patch("pathlib.Path.unlink", side_effect=OSError(5, "a fault")):
        stash.recover(manager)
        assert content_of(manager) == {"a": ("in memory", 0), "b": ("in memory", 0)}
        assert manager.get_statistics().l3_stats.state is TierState.ACTIVE
    stash.kill()
    hidden = make_unreachable(stash.directory / "l3")
    manager = stash.open()
    assert source_of(manager, "a") == "in the journal"
    make_reachable(stash.directory / "l3", hidden)
    stash.recover(manager)
    assert content_of(manager) == {"a": ("in the journal", 0), "b": ("in memory", 0)}


@pytest.mark.parametrize("cut_off", [True, False])
def test_a_line_whose_writing_failed_brings_nothing_back(stash: Stash, cut_off: bool) -> None:
    """It may be in the file all the same, and L3 takes later changes of its key."""
    manager = stash.open(l1_config=SWITCHED_OFF)
    with broken(manager.l3_tier, {"commit"}), segment_failing("write", after_doing_it=True):
        entry = manager.new_entry("http://192.0.2.1:1", key="a")
        if cut_off:
            assert stored_in(manager, "a", entry) == ()
        else:
            with segment_failing("truncate"):
                # The first one makes the file.
                assert stored_in(manager, "b", manager.new_entry("http://192.0.2.1:1", key="b")) == ()
                assert stored_in(manager, "a", entry) == ()
    put(manager, "a")
    assert manager.delete("a")
    assert content_of(stash.reopen_after_kill(l1_config=SWITCHED_OFF)) == {}


# -- a Clear


def test_an_l2_that_could_not_be_cleared_brings_nothing_back_after_a_kill(stash: Stash) -> None:
    """L3 has numbers smaller than L2's, since what it had missed was cleared before it got that."""
    manager = stash.open()
    with broken(manager.l3_tier, {"commit"}):
        put(manager, "a")
    with broken(manager.l2_tier):
        manager.clear()
        manager.maintain()
    assert content_of(stash.reopen_after_kill()) == {}


# -- what is believed after an abrupt end


@pytest.mark.parametrize("change", ["a put", "a delete", "a clear"])
def test_an_l2_that_is_not_believed_is_not_asked_either(stash: Stash, change: str) -> None:
    """L3, which alone has the change, is away when the next run begins."""
    changes: dict[str, Callable[[CacheManager], object]] = {
        "a put": lambda manager: put(manager, "a", source="after"),
        "a delete": lambda manager: manager.delete("a"),
        "a clear": lambda manager: manager.clear(),
    }
    manager = stash.open()
    put(manager, "a", source="before")
    with broken(manager.l2_tier):
        changes[change](manager)
        stash.kill()
    hidden = make_unreachable(stash.directory / "l3")
    manager = stash.open()
    assert source_of(manager, "a") is None
    assert content_of(manager) == {}
    put(manager, "b", source="meanwhile")
    assert source_of(manager, "b") == "meanwhile"
    make_reachable(stash.directory / "l3", hidden)
    stash.recover(manager)
    expected = {"b": ("meanwhile", 0), **({"a": ("after", 0)} if change == "a put" else {})}
    assert source_of(manager, "a") == ("after" if change == "a put" else None)
    check_disk_tiers(manager, expected)


def test_an_l3_that_was_lost_is_not_filled_with_what_the_journal_has_replaced(stash: Stash) -> None:
    manager = stash.open(l1_config=SWITCHED_OFF)
    put(manager, "a", "b", source="before")
    with broken(manager.l3_tier), broken(manager.l2_tier, WRITES):
        put(manager, "a", source="after")
        stash.kill()
    shutil.rmtree(stash.directory / "l3")
    manager = stash.open(l1_config=SWITCHED_OFF)
    assert source_of(manager, "a") == "after"
    check_disk_tiers(manager, {"a": ("after", 0), "b": ("before", 0)})


def test_an_l3_that_was_lost_is_filled_with_what_came_after_a_clear_in_the_journal(stash: Stash) -> None:
    """L3 has had that Clear, and more since; the journal is still there, since the end came too soon."""
    manager = stash.open()
    with broken(manager.l3_tier, {"commit"}):
        put(manager, "cleared")
    manager.clear()
    put(manager, "kept")
    stash.kill()
    shutil.rmtree(stash.directory / "l3")
    manager = stash.open()
    assert manager.get("kept") is not None
    check_disk_tiers(manager, {"kept": ("", 0)})


def test_a_read_of_l2_that_fails_while_l3_is_filled_up_costs_nothing(stash: Stash) -> None:
    """L3 is damaged, and gets what L2 still has."""
    stash.validated = False
    manager = stash.open(l1_config=SWITCHED_OFF)
    put(manager, "a", "b", "c")
    with closing(sqlite3.connect(stash.directory / "l3" / "proxystash.db")) as connection, connection:
        connection.execute("UPDATE entries SET source = 'damaged'")
    with broken(manager.l2_tier, {"get"}):
        with pytest.raises(CacheUnavailableError):
            content_of(manager)
        manager.maintain()
    stash.recover(manager)
    check_disk_tiers(manager, dict.fromkeys("abc", ("", 0)))


def test_a_read_of_l2_that_fails_while_a_new_l3_is_filled_up_costs_nothing(stash: Stash) -> None:
    """L3 was lost before this start; it is filled up when L2 can be read."""
    put(stash.open(), "a", "b", "c")
    stash.close()
    shutil.rmtree(stash.directory / "l3")
    backend = JsonlCacheTier if stash.config().l2_backend is L2BackendType.JSONL else SQLiteCacheTier
    with mock.patch.object(backend, "get", side_effect=TierError("a fault made by the test")):
        manager = stash.open()
    stash.recover(manager)
    check_disk_tiers(manager, dict.fromkeys("abc", ("", 0)))


def test_an_l2_that_has_caught_up_is_believed_at_the_next_start(stash: Stash) -> None:
    """What it could not take was replaced by something that it took."""
    manager = stash.open()
    put(manager, "a", "b")
    with broken(manager.l2_tier, {"apply"}):
        put(manager, "a")
    put(manager, "a", source="after")
    manager.maintain()
    manager = stash.reopen()
    assert sorted(manager.l2_tier.keys()) == ["a", "b"]


# -- the journal cannot be read


def test_a_journal_that_cannot_be_read_is_tried_again(stash: Stash) -> None:
    manager = stash.open(l1_config=SWITCHED_OFF)
    with broken(manager.l3_tier, {"commit"}):
        put(manager, "a", source="missed")
    with segment_failing("read"):
        manager.maintain()
        with pytest.raises(CacheUnavailableError):
            manager.get("a")
    manager.maintain()
    check_disk_tiers(manager, {"a": ("missed", 0)})
