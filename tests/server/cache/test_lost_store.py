"""A data directory that is moved away, or loses its lock file, under a cache."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from proxystash_server.cache import (
    CacheManager,
    CacheTierType,
    CacheUnavailableError,
    L2BackendType,
    StoreInUseError,
    TierState,
    store_lock,
)
from proxystash_server.cache.stopped.check import check_store
from proxystash_server.cache.store_lock import StoreLock
from proxystash_server.pool.pool import Pool
from tests.server.cache.stash import Stash
from tests.server.cache.support import SWITCHED_OFF, contents, put

L1, L2, L3 = CacheTierType.L1, CacheTierType.L2, CacheTierType.L3
BANS: dict[str, object] = {"ban_seconds": 3600}
SHAPES: dict[str, dict[str, object]] = {
    "both": {},
    "without L3": {"l3_config": SWITCHED_OFF},
    "without L2": {"l2_config": SWITCHED_OFF},
}


@pytest.fixture
def away(stash: Stash) -> Path:
    """Where the data directory is moved to."""
    # What is left of it is asserted here.
    stash.validated = False
    return stash.directory.with_name("away")


def states_of(manager: CacheManager) -> set[TierState]:
    statistics = manager.get_statistics()
    return {statistics.l2_stats.state, statistics.l3_stats.state} - {TierState.DISABLED}


USES: dict[str, Callable[[CacheManager], object]] = {
    "put": lambda manager: put(manager, "a", "new"),
    "get": lambda manager: [manager.get(key) for key in "ab"],
    "delete": lambda manager: manager.delete("a"),
    "clear": lambda manager: manager.clear(),
    "failure": lambda manager: [manager.invalidate_by_health("b") for _ in range(3)],
    "maintain": lambda manager: manager.maintain(),
    "later": lambda manager: manager.maintain(),
    "clean": lambda manager: manager.cleanup_expired(),
}


def use(manager: CacheManager, name: str) -> None:
    """Whatever is refused."""
    with suppress(CacheUnavailableError):
        USES[name](manager)


# -- the lock file


def test_who_removes_the_lock_file_lets_nobody_in(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "a")
    (stash.directory / "lock").unlink()
    with pytest.raises(StoreInUseError):
        CacheManager(stash.config(), background=False)
    assert manager.get("a") is not None
    manager.maintain()
    assert "a CacheManager" in (stash.directory / "lock").read_text()
    with pytest.raises(StoreInUseError, match="this process, a CacheManager"):
        CacheManager(stash.config(), background=False)
    assert states_of(manager) == {TierState.ACTIVE}


def test_a_lock_that_was_taken_from_the_moved_directory_is_noticed_after_it_was_locked(
    stash: Stash, away: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the directory and locking it, somebody moves it away and another is made."""
    put(stash.open(), "a")
    stash.close()

    lock = store_lock._lock
    moved: list[Path] = []

    def move_first(descriptor: int, kind: int) -> None:
        if not moved:
            moved.append(stash.directory.rename(away))
            stash.directory.mkdir()
        lock(descriptor, kind)

    monkeypatch.setattr(store_lock, "_lock", move_first)
    with StoreLock(stash.config(), "starting"):
        assert (stash.directory / "lock").exists()
        assert not (away / "lock").exists()


# -- moved away


@pytest.mark.parametrize("l2_backend", L2BackendType, indirect=True)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("first", USES)
def test_nothing_is_made_where_the_directory_was(
    stash: Stash, away: Path, first: str, shape: dict[str, object]
) -> None:
    manager = stash.open(**BANS, **shape)
    put(manager, "a", "b")
    stash.directory.rename(away)
    for name in (first, *USES):
        use(manager, name)
        stash.monotonic.advance(61)
        assert not stash.directory.exists(), name
    manager.close()
    assert not stash.directory.exists()


def test_it_is_said_and_what_cannot_be_kept_is_refused(
    stash: Stash, away: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = stash.open()
    put(manager, "a", "b")
    stash.directory.rename(away)
    for _ in range(2):
        manager.maintain()
    said = [record for record in caplog.records if "the data directory is lost" in record.message]
    assert [record.levelno for record in said] == [logging.CRITICAL]
    assert "was moved away" in said[0].__dict__["error"]
    assert states_of(manager) == {TierState.DEGRADED}
    assert manager.get("a") is not None
    [stored_in] = manager.put_many([manager.new_entry("http://192.0.2.9:1", key="c")])
    assert stored_in == (L1,)
    with pytest.raises(CacheUnavailableError):
        manager.delete("a")
    with pytest.raises(CacheUnavailableError):
        manager.clear()


def test_where_it_is_now_nobody_is_let_in_either(stash: Stash, away: Path) -> None:
    manager = stash.open()
    put(manager, "a")
    stash.directory.rename(away)
    elsewhere = Stash(away, L2BackendType.JSONL, stash.clock, stash.monotonic)
    with pytest.raises(StoreInUseError):
        elsewhere.open()
    manager.maintain()
    with pytest.raises(StoreInUseError):
        elsewhere.open()
    manager.close()
    assert check_store(elsewhere.config(l2_backend=stash.config().l2_backend)).consistent


def test_put_back_it_is_used_again_and_gets_what_came_meanwhile(
    stash: Stash, away: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    manager = stash.open()
    put(manager, "a", "b")
    stash.directory.rename(away)
    manager.maintain()
    put(manager, "c")
    away.rename(stash.directory)
    for _ in range(2):
        stash.recover(manager)
    assert "the data directory is back" in caplog.text
    assert states_of(manager) == {TierState.ACTIVE}
    manager.delete("a")
    manager = stash.reopen()
    assert [manager.get(key) is not None for key in "abc"] == [False, True, True]
    stash.validated = True


@pytest.mark.parametrize("l2_backend", L2BackendType, indirect=True)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("first", USES)
def test_the_store_of_another_server_in_its_place_is_left_alone(
    stash: Stash, away: Path, first: str, shape: dict[str, object]
) -> None:
    """Another one is started while the first has not noticed yet, and is not harmed by that or by its end."""
    manager = stash.open(**BANS, **shape)
    put(manager, "a", "b", source="first")
    manager.invalidate_by_health("a")
    stash.directory.rename(away)
    other = stash.open(**BANS, **shape)
    put(other, "x", "y", source="second")
    other.invalidate_by_health("x")
    before = contents(stash.directory)
    for name in (first, *USES):
        use(manager, name)
        stash.monotonic.advance(61)
        assert contents(stash.directory) == before, name
    manager.close()
    assert contents(stash.directory) == before
    put(other, "z", source="second")
    after = stash.reopen_after_kill(**BANS, **shape)
    for key in "xyz":
        entry = after.get(key)
        assert entry is not None
        assert entry.source == "second"


def test_the_journals_of_the_pool_are_not_made_where_the_directory_was(stash: Stash, away: Path) -> None:
    config = stash.config()
    with StoreLock(config, "starting") as lock, CacheManager(config, background=False, lock=lock) as manager:
        put(manager, "a")
        with Pool(manager, stash.directory / "pool", background=False, check_store=lock.check) as pool:
            assert (stash.directory / "pool" / "leases.jsonl").exists()
            stash.directory.rename(away)
            pool.end_session("session", "")
            pool._journal.record({"op": "nothing"})
            pool._journal.commit()
            pool.maintain()
            assert pool.statistics().journal_degraded
            assert not stash.directory.exists()
    assert not stash.directory.exists()


def test_a_directory_of_the_database_that_is_moved_away_costs_that_tier_alone(
    stash: Stash, away: Path
) -> None:
    manager = stash.open()
    put(manager, "a")
    (stash.directory / "l3").rename(away)
    put(manager, "b")
    stash.recover(manager)
    assert not (stash.directory / "l3").exists()
    statistics = manager.get_statistics()
    assert (statistics.l2_stats.state, statistics.l3_stats.state) == (TierState.ACTIVE, TierState.DEGRADED)
    away.rename(stash.directory / "l3")
    for _ in range(2):
        stash.recover(manager)
    assert states_of(manager) == {TierState.ACTIVE}
    manager = stash.reopen()
    assert [manager.get(key) is not None for key in "ab"] == [True, True]
