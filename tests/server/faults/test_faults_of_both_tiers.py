"""What strikes both disk tiers at once, or comes while the cache is stopped: one disk, one directory."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from proxystash_server.cache import (
    CacheManager,
    CacheTierType,
    CacheUnavailableError,
    L2BackendType,
    TierState,
)
from tests.server.cache.stash import Stash
from tests.server.cache.support import (
    PASSWORD,
    SWITCHED_OFF,
    USERNAME,
    bounded,
    check_disk_tiers,
    content_of,
    put,
    stored_in,
)
from tests.server.faults.machine import Mounts, fill, make_room, unprivileged

L1, L2, L3 = CacheTierType
BULK = {f"filler-{number}": "x" * 250 for number in range(16)}
FAULTY = {L1: TierState.ACTIVE, L2: TierState.DEGRADED, L3: TierState.DEGRADED}


@pytest.fixture(params=L2BackendType)
def l2_backend(request: pytest.FixtureRequest) -> L2BackendType:
    return L2BackendType(request.param)


def states_of(manager: CacheManager) -> dict[CacheTierType, TierState]:
    return dict(zip(CacheTierType, [tier.state for tier in manager.get_statistics().tiers], strict=True))


def put_in_memory(manager: CacheManager, key: str, source: str) -> tuple[CacheTierType, ...]:
    entry = manager.new_entry("http://192.0.2.1:1", key=key, source=source, labels=BULK)
    return stored_in(manager, key, entry)


def check_both(manager: CacheManager, expected: dict[str, tuple[str, int]]) -> None:
    assert set(states_of(manager).values()) <= {TierState.ACTIVE, TierState.DISABLED}
    check_disk_tiers(manager, expected)
    assert content_of(manager) == expected
    for key in expected:
        assert manager.get(key) is not None


def tiers_told(caplog: pytest.LogCaptureFixture, message: str) -> list[str]:
    return sorted(vars(record)["tier"] for record in caplog.records if record.message == message)


def test_a_full_disk_below_both_tiers_leaves_memory_which_says_so_and_is_written_down_afterwards(
    stash: Stash, mounts: Mounts, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    mounts.add(stash.directory, "size=4m")
    manager = stash.open()
    expected = {}
    for key in ("kept", "replaced", "not deleted"):
        put_in_memory(manager, key, "before")
        expected[key] = ("before", 0)
    fill(stash.directory)
    for number in range(40):
        assert put_in_memory(manager, f"new-{number}", "meanwhile")
        expected[f"new-{number}"] = ("meanwhile", 0)
    assert states_of(manager)[L3] is TierState.DEGRADED
    assert put_in_memory(manager, "replaced", "meanwhile") == (L1,)
    expected["replaced"] = ("meanwhile", 0)
    assert manager.invalidate_by_health("kept").failure_count == 1
    expected["kept"] = ("before", 1)
    with pytest.raises(CacheUnavailableError):
        # Memory alone cannot promise that it stays deleted.
        manager.delete("not deleted")
    for key in expected:
        assert manager.get(key) is not None
    for _ in range(3):
        stash.recover(manager)
        for key in expected:
            assert manager.get(key) is not None
    # L2 may have made itself room by starting empty.
    assert states_of(manager)[L3] is TierState.DEGRADED
    make_room(stash.directory)
    stash.recover(manager)
    stash.recover(manager)
    check_both(manager, expected)
    assert tiers_told(caplog, "tier degraded") == tiers_told(caplog, "tier recovered")
    assert content_of(stash.reopen_after_kill()) == expected


def test_a_data_directory_removed_under_a_running_cache_is_made_again_with_what_memory_holds(
    stash: Stash, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    manager = stash.open()
    put(manager, "a", "b", source="before", username=USERNAME, password=PASSWORD)
    put(manager, "deleted")
    manager.delete("deleted")
    key = (stash.directory / "secret.key").read_bytes()
    shutil.rmtree(stash.directory)
    put(manager, "c", "d", "e", source="after", username=USERNAME, password=PASSWORD)
    expected = dict.fromkeys("ab", ("before", 0)) | dict.fromkeys("cde", ("after", 0))
    for name in expected:
        assert manager.get(name) is not None
    assert manager.get("deleted") is None
    for _ in range(2):
        stash.recover(manager)
    check_both(manager, expected)
    assert tiers_told(caplog, "tier degraded") == tiers_told(caplog, "tier recovered") == ["l2", "l3"]
    # The same key, as private as before: what is sealed in memory stays readable.
    assert (stash.directory / "secret.key").read_bytes() == key
    manager = stash.reopen_after_kill()
    assert content_of(manager) == expected
    for name in expected:
        entry = manager.get(name)
        assert entry is not None
        assert entry.password is not None
        assert entry.password.get_secret_value() == PASSWORD


def test_a_directory_that_is_gone_costs_what_memory_did_not_hold_and_brings_nothing_back(
    stash: Stash,
) -> None:
    manager = stash.open(l1_config=bounded(2))
    put(manager, "gone", "a", "b", source="before")
    manager.delete("a")
    put(manager, "a", source="again")
    manager.invalidate_by_health("b")
    shutil.rmtree(stash.directory)
    for _ in range(3):
        put(manager, "a", source="after")
    for _ in range(2):
        stash.recover(manager)
    assert manager.get("gone") is None
    assert content_of(manager) == {"a": ("after", 0), "b": ("before", 1)}
    assert content_of(stash.reopen_after_kill()) == {"a": ("after", 0), "b": ("before", 1)}


@pytest.mark.parametrize("shape", [{}, {"l1_config": SWITCHED_OFF}], ids=["with L1", "without L1"])
@pytest.mark.parametrize(
    ("l2_backend", "tier"),
    [(L2BackendType.SQLITE, L2), (L2BackendType.SQLITE, L3), (L2BackendType.JSONL, L3)],
    indirect=["l2_backend"],
)
def test_an_old_copy_of_a_database_put_back_under_a_running_cache_replaces_nothing(
    stash: Stash, tier: CacheTierType, shape: dict[str, object]
) -> None:
    put(stash.open(**shape), "replaced", "kept", *(["deleted"] if tier is L2 else []), source="before")
    stash.close()
    database = stash.directory / tier / ("l2.db" if tier is L2 else "proxystash.db")
    shutil.copy2(database, database.with_name("copy"))
    manager = stash.open(**shape)
    put(manager, "replaced", "new", source="after")
    # Only L3 knows of a delete: an old copy of L3 itself brings back what was deleted since.
    assert manager.delete("deleted") == (tier is L2)
    database.with_name("copy").replace(database)
    for _ in range(3):
        put(manager, "newer", source="after")
    for _ in range(3):
        stash.recover(manager)
    expected = dict.fromkeys(("replaced", "new", "newer"), ("after", 0)) | {"kept": ("before", 0)}
    assert manager.get("deleted") is None
    for key, (source, _) in expected.items():
        entry = manager.get(key)
        assert entry is not None
        assert entry.source == source
    assert content_of(manager) == expected
    manager = stash.reopen_after_kill(**shape)
    assert manager.get("deleted") is None
    assert content_of(manager) == expected


# -- while it is stopped


def test_an_l2_lost_while_the_cache_was_stopped_is_rebuilt_from_use(stash: Stash) -> None:
    put(stash.open(), "a", "b", "c", source="before")
    stash.close()
    shutil.rmtree(stash.directory / "l2")
    manager = stash.open()
    assert set(states_of(manager).values()) == {TierState.ACTIVE}
    assert content_of(manager) == dict.fromkeys("abc", ("before", 0))
    assert manager.lookup("a").served_by is L3
    manager = stash.reopen()
    assert [manager.lookup(key).served_by for key in "ab"] == [L2, L3]
    assert manager.get_statistics().entries == 3


def test_an_l3_lost_while_the_cache_was_stopped_is_refilled_from_l2(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "a", "b", "c", "deleted", source="before")
    manager.invalidate_by_health("b")
    manager.delete("deleted")
    stash.close()
    shutil.rmtree(stash.directory / "l3")
    expected = {"a": ("before", 0), "b": ("before", 1), "c": ("before", 0)}
    manager = stash.open()
    check_both(manager, expected)
    shutil.rmtree(stash.directory / "l2")
    stash.directory.joinpath("l2").mkdir()
    manager = stash.reopen()
    assert content_of(manager) == expected


@pytest.mark.parametrize("shape", [{}, {"l1_config": SWITCHED_OFF}], ids=["with L1", "without L1"])
@pytest.mark.parametrize("place", [L2, L3])
def test_a_file_system_that_is_read_only_at_the_start_is_made_up_for_until_it_is_writable(
    stash: Stash,
    mounts: Mounts,
    place: CacheTierType,
    shape: dict[str, object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    mounts.add(stash.directory / place)
    put(stash.open(**shape), "a", "b", "deleted", source="before")
    stash.close()
    caplog.set_level(logging.INFO)
    mounts.change(stash.directory / place, "ro")
    manager = stash.open(**shape)
    assert states_of(manager)[place] is TierState.DEGRADED
    expected = {"a": ("meanwhile", 0), "b": ("before", 0), "c": ("meanwhile", 0)}
    put(manager, "a", "c", source="meanwhile")
    assert manager.delete("deleted")
    for _ in range(3):
        stash.recover(manager)
        assert content_of(manager) == expected
        for key in expected:
            assert manager.get(key) is not None
        assert manager.get("deleted") is None
    assert tiers_told(caplog, "tier degraded") == [place]
    # Also where the cache ends before its disk is well.
    manager = stash.reopen(**shape)
    assert content_of(manager) == expected
    mounts.change(stash.directory / place, "rw")
    stash.recover(manager)
    assert manager.get("deleted") is None
    check_both(manager, expected)
    assert tiers_told(caplog, "tier recovered") == [place]


def forbid_all(directory: Path) -> None:
    for tier in (L2, L3):
        (directory / tier).chmod(0)


def fill_up(directory: Path) -> None:
    fill(directory)


@pytest.mark.parametrize("fault", [forbid_all, fill_up])
def test_a_cache_starts_without_any_disk_tier(
    stash: Stash, mounts: Mounts, fault: Callable[[Path], None]
) -> None:
    mounts.add(stash.directory, "size=2m")
    put(stash.open(), "a", source="before")
    stash.close()
    with unprivileged(stash.directory.parent):
        fault(stash.directory)
        manager = stash.open()
        if fault is forbid_all:
            assert states_of(manager) == FAULTY
            assert put_in_memory(manager, "b", "meanwhile") == (L1,)
        for number in range(12):
            assert put_in_memory(manager, f"b-{number}", "meanwhile")
        if fault is fill_up:
            make_room(stash.directory)
        for tier in (L2, L3):
            (stash.directory / tier).chmod(0o700)
        for _ in range(2):
            stash.recover(manager)
        expected = {"a": ("before", 0)} | {f"b-{number}": ("meanwhile", 0) for number in range(12)}
        if fault is forbid_all:
            expected["b"] = ("meanwhile", 0)
        assert content_of(manager) == expected
        assert set(states_of(manager).values()) == {TierState.ACTIVE}
    stash.close()
    assert content_of(stash.reopen_after_kill()) == expected
