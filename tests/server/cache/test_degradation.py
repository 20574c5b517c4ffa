"""Promise 7: a failing tier is skipped, the others carry on, and it has caught up before it serves again."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import pytest

from proxystash_server.cache import (
    CacheManager,
    CacheTierType,
    CacheUnavailableError,
    DiskTier,
    EntryFilter,
    HealthStatus,
    L2BackendType,
    SQLiteCacheTier,
    TierState,
)
from proxystash_server.cache.errors import TierLostError
from tests.server.cache.stash import Stash
from tests.server.cache.support import (
    PASSWORD,
    READS,
    SWITCHED_OFF,
    WRITES,
    break_tier,
    broken,
    check_disk_tiers,
    content_of,
    content_of_tier,
    fail_until_skipped,
    journal_broken,
    keys_of,
    make_reachable,
    make_unreachable,
    nothing_writable,
    put,
    repair_tier,
    stored_in,
    wait_until,
)

L1, L2, L3 = CacheTierType
ANY = EntryFilter()


@pytest.fixture(params=L2BackendType)
def l2_backend(request: pytest.FixtureRequest) -> L2BackendType:
    return L2BackendType(request.param)


@pytest.fixture(params=["l2", "l3"])
def faulty(request: pytest.FixtureRequest) -> str:
    """The tier that fails in a test."""
    return str(request.param)


def tier_of(manager: CacheManager, name: str) -> DiskTier:
    return manager.l2_tier if name == "l2" else manager.l3_tier


def state_of(manager: CacheManager, name: str) -> TierState:
    statistics = manager.get_statistics()
    return (statistics.l2_stats if name == "l2" else statistics.l3_stats).state


# -- when a tier is skipped, and when it is tried again


def test_a_tier_is_skipped_after_three_failures_in_a_row(stash: Stash, faulty: str) -> None:
    manager = stash.open()
    with broken(tier_of(manager, faulty), WRITES):
        put(manager, "key-1")
        put(manager, "key-2")
        assert state_of(manager, faulty) is TierState.ACTIVE
        put(manager, "key-3")
        assert state_of(manager, faulty) is TierState.DEGRADED
        errors = [tier.errors for tier in manager.get_statistics().tiers]
        put(manager, "key-4")
        # It is not even asked any more.
        assert [tier.errors for tier in manager.get_statistics().tiers] == errors
    stash.recover(manager)
    assert state_of(manager, faulty) is TierState.ACTIVE


def test_failures_that_are_not_in_a_row_do_not_count(stash: Stash, faulty: str) -> None:
    manager = stash.open()
    for number in range(6):
        with broken(tier_of(manager, faulty), {"apply", "commit"}):
            put(manager, f"key-{number}")
        manager.maintain()
    assert state_of(manager, faulty) is TierState.ACTIVE
    check_disk_tiers(manager, {f"key-{number}": ("", 0) for number in range(6)})


def test_a_skipped_tier_is_tried_again_with_growing_pauses(stash: Stash, faulty: str) -> None:
    manager = stash.open()
    tier = tier_of(manager, faulty)
    attempts: list[float] = []
    break_tier(tier)
    fail_until_skipped(manager, tier)
    opened = type(tier).open

    def noted(self: DiskTier) -> None:
        attempts.append(stash.monotonic())
        opened(self)

    type(tier).open = noted  # type: ignore[method-assign]  # the class is the test's own
    for _ in range(4000):
        stash.monotonic.advance(0.1)
        manager.maintain()
    pauses = [later - earlier for earlier, later in pairwise(attempts)]
    # 1 s, then twice as long each time up to 60 s, less up to half of it by chance.
    for longest, pause in zip([2, 4, 8, 16, 32, 60, 60], pauses, strict=False):
        assert longest / 2 - 0.2 <= pause <= longest + 0.2
    repair_tier(tier)
    stash.recover(manager)
    assert state_of(manager, faulty) is TierState.ACTIVE


def test_a_tier_that_fails_again_after_its_recovery_is_skipped_again(stash: Stash, faulty: str) -> None:
    manager = stash.open()
    tier = tier_of(manager, faulty)
    for number in range(3):
        with broken(tier):
            fail_until_skipped(manager, tier)
            put(manager, f"key-{number}")
        stash.recover(manager)
        assert state_of(manager, faulty) is TierState.ACTIVE
    check_disk_tiers(manager, {f"key-{number}": ("", 0) for number in range(3)})


def test_the_log_tells_of_each_change_once(
    stash: Stash, faulty: str, caplog: pytest.LogCaptureFixture
) -> None:
    manager = stash.open()
    caplog.set_level(logging.DEBUG)
    with broken(tier_of(manager, faulty)):
        for number in range(6):
            put(manager, f"key-{number}", username="u", password=PASSWORD)
        manager.maintain()
    stash.recover(manager)
    lines = [
        (record.levelname, record.message, vars(record)["tier"])
        for record in caplog.records
        if record.message.startswith("tier ")
    ]
    assert lines == [("WARNING", "tier degraded", faulty), ("INFO", "tier recovered", faulty)]
    [degraded] = [record for record in caplog.records if record.message == "tier degraded"]
    assert "a fault made by the test" in vars(degraded)["error"]
    assert vars(degraded)["backend"] == tier_of(manager, faulty).backend
    assert PASSWORD not in caplog.text
    assert all(PASSWORD not in str(vars(record)) for record in caplog.records)


# -- the others carry on


def test_every_operation_works_while_a_tier_is_away(stash: Stash, faulty: str) -> None:
    manager = stash.open()
    put(manager, "a", "b", "c", "d", source="before")
    tier = tier_of(manager, faulty)
    with broken(tier):
        fail_until_skipped(manager, tier)
        entry = manager.new_entry("http://192.0.2.1:1", key="e", source="meanwhile")
        assert stored_in(manager, "e", entry) == ((L1, L3) if faulty == "l2" else (L1, L2))
        put(manager, "a", source="meanwhile")
        assert manager.delete("b")
        assert not manager.delete("b")
        assert manager.invalidate_by_health("c").failure_count == 1
        assert {
            entry.key: (entry.source, entry.failure_count) for entry in manager.list_entries("", 10, ANY)
        } == {"a": ("meanwhile", 0), "c": ("before", 1), "d": ("before", 0), "e": ("meanwhile", 0)}
        for key in "acde":
            assert manager.get(key) is not None
        assert manager.get("b") is None
        assert manager.get_statistics().entries == 4
        assert manager.clear() == 4
        assert manager.list_entries("", 10, ANY) == []
    stash.recover(manager)
    assert manager.list_entries("", 10, ANY) == []
    assert tier.size() == 0


def test_reads_go_past_the_tier_that_is_away(stash: Stash, faulty: str) -> None:
    put(stash.open(), "key-1")
    manager = stash.reopen(l1_config=SWITCHED_OFF)
    tier = tier_of(manager, faulty)
    with broken(tier):
        fail_until_skipped(manager, tier)
        assert manager.lookup("key-1").served_by is (L3 if faulty == "l2" else L2)
    stash.recover(manager)


def test_memory_alone_carries_on_while_both_disk_tiers_are_away(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "before", "deleted")
    with nothing_writable(manager):
        fail_until_skipped(manager, manager.l2_tier)
        fail_until_skipped(manager, manager.l3_tier)
        assert stored_in(manager, "key-1", manager.new_entry("http://192.0.2.1:1")) == (L1,)
        assert manager.get("key-1") is not None
        assert manager.get("before") is not None
        assert manager.invalidate_by_health("before").failure_count == 1
        assert keys_of(manager.list_entries("", 10, ANY)) == ["before", "deleted", "key-1"]
    stash.recover(manager)
    check_disk_tiers(manager, {"before": ("", 1), "deleted": ("", 0), "key-1": ("", 0)})


@pytest.mark.parametrize("memory", [True, False], ids=["with L1", "without L1"])
def test_the_journal_keeps_what_no_disk_tier_could_take(stash: Stash, memory: bool) -> None:
    """Also after a kill: it stands apart from both of them."""
    shape = {} if memory else {"l1_config": SWITCHED_OFF}
    manager = stash.open(**shape)
    put(manager, "replaced", "deleted", "failed", source="before")
    with broken(manager.l2_tier), broken(manager.l3_tier):
        fail_until_skipped(manager, manager.l2_tier)
        fail_until_skipped(manager, manager.l3_tier)
        entry = manager.new_entry("http://192.0.2.1:1", key="replaced", source="after")
        assert stored_in(manager, "replaced", entry) == ((L1,) if memory else (L3,))
        put(manager, "new", source="after")
        # Whether it was there nobody can tell without memory; that it is not there any more is kept.
        assert manager.delete("deleted") is memory
        got = manager.get("new")
        assert got is not None
        assert got.source == "after"
        assert manager.get("deleted") is None
        if memory:
            assert manager.invalidate_by_health("failed").failure_count == 1
        expected = {"replaced": ("after", 0), "new": ("after", 0), "failed": ("before", int(memory))}
        manager = stash.reopen_after_kill(**shape)
    assert content_of(manager) == expected
    check_disk_tiers(manager, expected)


REFUSED: dict[str, Callable[[CacheManager], object]] = {
    "get": lambda manager: manager.get("key-1"),
    "delete": lambda manager: manager.delete("key-1"),
    "clear": lambda manager: manager.clear(),
    "invalidation": lambda manager: manager.invalidate_by_health("key-1"),
    "third invalidation": lambda manager: manager.invalidate_by_health("key-3"),
}


@pytest.mark.parametrize("operation", REFUSED)
def test_what_nobody_can_do_is_refused_and_has_not_happened_afterwards(stash: Stash, operation: str) -> None:
    manager = stash.open(l1_config=SWITCHED_OFF)
    put(manager, "key-1", "key-2")
    put(manager, "key-3", failure_count=2)
    with nothing_writable(manager):
        for _ in range(5):
            with pytest.raises(CacheUnavailableError):
                REFUSED[operation](manager)
        assert stored_in(manager, "key-1", manager.new_entry("http://192.0.2.1:1")) == ()
    stash.recover(manager)
    assert [
        (entry.key, entry.failure_count, entry.health_status) for entry in manager.list_entries("", 10, ANY)
    ] == [
        ("key-1", 0, HealthStatus.UNKNOWN),
        ("key-2", 0, HealthStatus.UNKNOWN),
        ("key-3", 2, HealthStatus.UNKNOWN),
    ]
    for key in ("key-1", "key-2", "key-3"):
        assert manager.get(key) is not None


@pytest.mark.parametrize("operation", ["put", "delete", "clear", "invalidation"])
def test_a_change_that_nobody_took_leaves_what_was_there_before(stash: Stash, operation: str) -> None:
    """Also if the fault passes at once: a full disk that somebody cleans up."""
    manager = stash.open(l1_config=SWITCHED_OFF)
    put(manager, "key-1", source="before")
    with nothing_writable(manager, WRITES):
        try:
            if operation == "put":
                entry = manager.new_entry("http://192.0.2.1:1", key="key-1", source="lost")
                assert stored_in(manager, "key-1", entry) == ()
            elif operation == "delete":
                manager.delete("key-1")
            elif operation == "clear":
                manager.clear()
            else:
                manager.invalidate_by_health("key-1")
        except CacheUnavailableError:
            assert operation != "put"
    manager.maintain()
    stash.recover(manager)
    got = manager.get("key-1")
    assert got is not None
    assert (got.source, got.failure_count) == ("before", 0)


# -- catching up


MEANWHILE: dict[str, Callable[[CacheManager], object]] = {
    "a new entry": lambda manager: put(manager, "new", source="meanwhile"),
    "a replacement": lambda manager: put(manager, "a", source="meanwhile"),
    "a delete": lambda manager: manager.delete("a"),
    "a delete and a new entry": lambda manager: [
        manager.delete("a"),
        put(manager, "a", source="meanwhile"),
    ],
    "a new entry and its delete": lambda manager: [put(manager, "new"), manager.delete("new")],
    "a clear": lambda manager: manager.clear(),
    "a clear and a new entry": lambda manager: [manager.clear(), put(manager, "a", source="meanwhile")],
    "a new entry and a clear": lambda manager: [put(manager, "new"), manager.clear()],
    "a failure": lambda manager: manager.invalidate_by_health("a"),
    "an eviction by health": lambda manager: [manager.invalidate_by_health("a") for _ in range(3)],
    "many entries": lambda manager: manager.put_many(
        [manager.new_entry("http://192.0.2.1:1", key=f"new-{number:03}") for number in range(250)]
    ),
}


@pytest.mark.parametrize("meanwhile", MEANWHILE)
@pytest.mark.parametrize("after_doing_it", [False, True], ids=["undone", "done but not reported"])
def test_a_tier_has_caught_up_before_it_serves_again(
    stash: Stash, faulty: str, meanwhile: str, after_doing_it: bool
) -> None:
    manager = stash.open()
    put(manager, "a", "b", source="before")
    tier = tier_of(manager, faulty)
    with broken(tier, WRITES, after_doing_it=after_doing_it):
        MEANWHILE[meanwhile](manager)
        expected = content_of(manager)
    assert content_of(manager) == expected, "before it has caught up"
    stash.recover(manager)
    manager.maintain()
    assert state_of(manager, faulty) is TierState.ACTIVE
    assert content_of(manager) == expected
    check_disk_tiers(manager, expected)


@pytest.mark.parametrize("meanwhile", MEANWHILE)
@pytest.mark.parametrize("end", ["orderly", "abrupt"])
def test_a_tier_catches_up_after_a_restart_too(stash: Stash, faulty: str, meanwhile: str, end: str) -> None:
    manager = stash.open()
    put(manager, "a", "b", source="before")
    tier = tier_of(manager, faulty)
    break_tier(tier)
    fail_until_skipped(manager, tier)
    MEANWHILE[meanwhile](manager)
    expected = content_of(manager)
    if end == "abrupt":
        manager = stash.reopen_after_kill()
        repair_tier(tier)
    else:
        manager.close()
        repair_tier(tier)
        manager = stash.reopen()
    assert state_of(manager, faulty) is TierState.ACTIVE
    assert content_of(manager) == expected
    check_disk_tiers(manager, expected)


@pytest.mark.parametrize("meanwhile", MEANWHILE)
def test_a_tier_that_is_still_away_after_a_restart_is_not_read_before_it_has_caught_up(
    stash: Stash, faulty: str, meanwhile: str
) -> None:
    manager = stash.open()
    put(manager, "a", "b", source="before")
    tier = tier_of(manager, faulty)
    break_tier(tier)
    fail_until_skipped(manager, tier)
    MEANWHILE[meanwhile](manager)
    expected = content_of(manager)
    manager.close()
    repair_tier(tier)
    path = stash.directory / faulty
    hidden = make_unreachable(path)
    manager = stash.reopen()
    assert state_of(manager, faulty) is TierState.DEGRADED
    assert content_of(manager) == expected
    put(manager, "later", source="later")
    expected["later"] = ("later", 0)
    make_reachable(path, hidden)
    stash.recover(manager)
    assert state_of(manager, faulty) is TierState.ACTIVE
    assert content_of(manager) == expected
    check_disk_tiers(manager, expected)


def test_a_use_while_a_tier_is_away_is_known_to_it_afterwards(stash: Stash, faulty: str) -> None:
    manager = stash.open()
    put(manager, "key-1")
    tier = tier_of(manager, faulty)
    with broken(tier):
        fail_until_skipped(manager, tier)
        manager.get("key-1")
        manager.get("key-1")
        manager.maintain()
    stash.recover(manager)
    manager.maintain()
    manager.l1_tier.clear()
    manager.get("key-1")
    entry = tier.get("key-1")
    assert entry is not None
    # L2 gets it again with this use, of which L3 has not been told yet.
    assert entry.access_count == (3 if faulty == "l2" else 2)


def test_a_use_of_what_l3_has_missed_is_known_to_it_when_it_has_caught_up(stash: Stash) -> None:
    manager = stash.open()
    with broken(manager.l3_tier):
        put(manager, "key-1", "key-2")
    manager.get("key-1")
    # Flushes first, and only then catches up.
    manager.maintain()
    entry = manager.l3_tier.get("key-1")
    assert entry is not None
    assert entry.access_count == 1
    [listed, _] = manager.list_entries("", 10, ANY)
    assert listed.access_count == 1


@pytest.mark.parametrize("meanwhile", ["a delete", "a replacement", "a clear", "a failure"])
def test_what_was_read_from_an_outdated_tier_is_forgotten_when_the_one_that_knows_is_back(
    stash: Stash, faulty: str, meanwhile: str
) -> None:
    """The tier that keeps the backlog is itself out of reach at the next start: the other seems fine."""
    manager = stash.open()
    put(manager, "a", "b", source="before")
    tier = tier_of(manager, faulty)
    break_tier(tier)
    fail_until_skipped(manager, tier)
    MEANWHILE[meanwhile](manager)
    expected = content_of(manager)
    manager.close()
    repair_tier(tier)
    path = stash.directory / ("l3" if faulty == "l2" else "l2")
    hidden = make_unreachable(path)
    manager = stash.reopen()
    manager.get("a")
    make_reachable(path, hidden)
    stash.recover(manager)
    assert content_of(manager) == expected
    entry = manager.get("a")
    assert (entry and (entry.source, entry.failure_count)) == expected.get("a")
    # What the tier that came back knew of is worked off in the next round.
    manager.maintain()
    assert content_of_tier(manager.l3_tier) == expected
    assert content_of_tier(manager.l2_tier).items() <= expected.items()


@pytest.mark.parametrize(("faulty", "end"), [("l2", "orderly"), ("l2", "abrupt"), ("l3", "orderly")])
def test_a_use_while_a_tier_is_away_is_known_to_the_other_after_a_restart(
    stash: Stash, faulty: str, end: str
) -> None:
    """As far as it had been flushed; after a kill, what only L2 was told of is lost."""
    manager = stash.open()
    put(manager, "key-1")
    tier = tier_of(manager, faulty)
    break_tier(tier)
    fail_until_skipped(manager, tier)
    manager.get("key-1")
    manager.get("key-1")
    manager.maintain()
    if end == "abrupt":
        manager = stash.reopen_after_kill()
        repair_tier(tier)
    else:
        manager.close()
        repair_tier(tier)
        manager = stash.reopen()
    known = tier_of(manager, "l3" if faulty == "l2" else "l2").get("key-1")
    assert known is not None
    assert known.access_count == 2
    assert manager.get("key-1") is not None


def test_both_tiers_may_fail_one_after_the_other(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "a", "b", source="0")
    for number, name in enumerate(["l2", "l3", "l3", "l2", "l2"], 1):
        tier = tier_of(manager, name)
        with broken(tier):
            fail_until_skipped(manager, tier)
            put(manager, "a", source=str(number))
            if number % 2:
                manager.delete("b")
            else:
                put(manager, "b", source=str(number))
        stash.recover(manager)
    check_disk_tiers(manager, {"a": ("5", 0)})


def test_a_tier_that_fails_while_it_catches_up_goes_on_later(stash: Stash, faulty: str) -> None:
    manager = stash.open()
    put(manager, "a", source="before")
    tier = tier_of(manager, faulty)
    break_tier(tier)
    fail_until_skipped(manager, tier)
    put(manager, "a", "b", source="meanwhile")
    repair_tier(tier)
    with broken(tier, {"commit", "clear_before", "clear"}):
        stash.recover(manager)
        assert state_of(manager, faulty) is TierState.DEGRADED
        assert content_of(manager) == {"a": ("meanwhile", 0), "b": ("meanwhile", 0)}
    stash.recover(manager)
    assert state_of(manager, faulty) is TierState.ACTIVE
    check_disk_tiers(manager, {"a": ("meanwhile", 0), "b": ("meanwhile", 0)})


def test_changes_during_catching_up_win_over_what_is_caught_up_on(stash: Stash) -> None:
    manager = stash.open()
    tier = manager.l3_tier
    keys = [f"key-{number:03}" for number in range(150)]
    with broken(tier):
        fail_until_skipped(manager, tier)
        put(manager, *keys, source="meanwhile")
    assert isinstance(tier, SQLiteCacheTier)
    commit = tier.commit
    others: list[threading.Thread] = []

    def commit_and_interfere(asked, decide):  # type: ignore[no-untyped-def]  # stands in for the real one
        # The first batch of keys is being brought up to date: these are of the second.
        if not others:
            others.append(threading.Thread(target=put, args=(manager, "key-148"), kwargs={"source": "later"}))
            others.append(threading.Thread(target=manager.delete, args=("key-149",)))
            for other in others:
                other.start()
            # They come next, as whoever waits for the lock of changes does.
            threading.Event().wait(0.05)
        return commit(asked, decide)

    tier.commit = commit_and_interfere  # type: ignore[method-assign]
    stash.recover(manager)
    for other in others:
        other.join(30)
    manager.maintain()
    expected = dict.fromkeys(keys[:148], ("meanwhile", 0)) | {"key-148": ("later", 0)}
    assert content_of(manager) == expected
    check_disk_tiers(manager, expected)


def test_a_delete_is_told_to_the_one_who_asked_and_not_to_the_next(stash: Stash, faulty: str) -> None:
    """A tier that has missed a delete still holds the entry, but the cache does not."""
    manager = stash.open()
    put(manager, "key-1")
    with broken(tier_of(manager, faulty), {"apply", "commit"}):
        assert manager.delete("key-1") is True
    assert manager.delete("key-1") is False
    assert manager.invalidate_by_health("key-1").found is False
    assert manager.get_statistics().removals == 1
    manager.maintain()


def test_a_failing_read_does_not_hide_an_entry(stash: Stash, faulty: str) -> None:
    put(stash.open(), "key-1")
    manager = stash.reopen(l1_config=SWITCHED_OFF)
    with broken(tier_of(manager, faulty), READS):
        assert manager.get("key-1") is not None
    stash.recover(manager)


def test_a_miss_is_a_miss_as_long_as_the_authority_answers(stash: Stash) -> None:
    manager = stash.open()
    with broken(manager.l2_tier, READS):
        assert manager.get("nothing") is None
        assert manager.delete("nothing") is False
        assert manager.invalidate_by_health("nothing").found is False
    stash.recover(manager)


@pytest.mark.parametrize("both", [False, True], ids=["one tier", "both tiers"])
def test_a_put_does_not_need_to_read_what_it_replaces(stash: Stash, faulty: str, both: bool) -> None:
    put(stash.open(), "key-1", source="before")
    manager = stash.reopen()
    tiers = [manager.l2_tier, manager.l3_tier] if both else [tier_of(manager, faulty)]
    for tier in tiers:
        break_tier(tier, {"get"})
    put(manager, "key-1", "new", source="after")
    for tier in tiers:
        repair_tier(tier)
    stash.recover(manager)
    expected = {"key-1": ("after", 0), "new": ("after", 0)}
    assert content_of(manager) == expected
    check_disk_tiers(manager, expected)


# -- what is no tier failure


def test_bad_input_is_no_tier_failure(stash: Stash) -> None:
    manager = stash.open()
    for _ in range(5):
        with pytest.raises(ValueError, match="key"):
            manager.put("", manager.new_entry("http://192.0.2.1:1"))
    assert [tier.errors for tier in manager.get_statistics().tiers] == [0, 0, 0]


def test_a_tier_that_is_switched_off_stays_off(stash: Stash, faulty: str) -> None:
    off = {f"{faulty}_config": SWITCHED_OFF}
    put(stash.open(), "key-1")
    manager = stash.reopen(**off)
    put(manager, "key-2")
    manager.get("key-1")
    for _ in range(3):
        stash.recover(manager)
    assert state_of(manager, faulty) is TierState.DISABLED
    assert manager.get_statistics().entries == 2
    manager.close()
    other = stash.open(**{"l3_config" if faulty == "l2" else "l2_config": SWITCHED_OFF})
    assert "key-2" not in tier_of(other, faulty)


def test_a_tier_that_is_away_at_the_start_is_degraded_and_recovers(
    stash: Stash, faulty: str, caplog: pytest.LogCaptureFixture
) -> None:
    put(stash.open(), "a", "b", source="before")
    stash.close()
    path = stash.directory / faulty
    hidden = make_unreachable(path)
    manager = stash.open()
    assert state_of(manager, faulty) is TierState.DEGRADED
    assert "tier degraded" in caplog.text
    assert content_of(manager) == {"a": ("before", 0), "b": ("before", 0)}
    manager.delete("a")
    put(manager, "c", source="meanwhile")
    make_reachable(path, hidden)
    stash.recover(manager)
    assert state_of(manager, faulty) is TierState.ACTIVE
    expected = {"b": ("before", 0), "c": ("meanwhile", 0)}
    assert content_of(manager) == expected
    check_disk_tiers(manager, expected)


def test_a_cache_whose_disk_tiers_are_both_away_at_the_start_is_still_a_cache(stash: Stash) -> None:
    stash.directory.mkdir()
    for name in ("l2", "l3"):
        (stash.directory / name).write_text("not a directory")
    manager = stash.open()
    put(manager, "key-1")
    assert manager.get("key-1") is not None
    for name in ("l2", "l3"):
        (stash.directory / name).unlink()
    stash.recover(manager)
    stash.recover(manager)
    check_disk_tiers(manager, {"key-1": ("", 0)})


def test_the_only_disk_tier_may_fail_too(stash: Stash, faulty: str) -> None:
    """Then memory and the journal carry on, and the tier has caught up before it serves again."""
    others_off = {"l2_config" if faulty == "l3" else "l3_config": SWITCHED_OFF}
    manager = stash.open(**others_off)
    put(manager, "deleted", "replaced", "kept", source="before")
    tier = tier_of(manager, faulty)
    with broken(tier):
        fail_until_skipped(manager, tier)
        put(manager, "replaced", "new", source="meanwhile")
        assert manager.delete("deleted")
        assert manager.get("deleted") is None
        assert state_of(manager, faulty) is TierState.DEGRADED
    stash.recover(manager)
    expected = {"replaced": ("meanwhile", 0), "new": ("meanwhile", 0), "kept": ("before", 0)}
    assert content_of(manager) == expected
    assert content_of_tier(tier) == expected
    assert content_of(stash.reopen_after_kill(**others_off)) == expected


@pytest.mark.parametrize("journal", [True, False], ids=["with the journal", "without the journal"])
def test_an_acknowledged_change_of_the_only_disk_tier_is_there_after_a_kill_or_was_refused(
    stash: Stash, faulty: str, journal: bool
) -> None:
    """What only memory could take is said to be in memory alone; a delete that nobody can note is refused."""
    others_off = {"l2_config" if faulty == "l3" else "l3_config": SWITCHED_OFF}
    manager = stash.open(**others_off)
    put(manager, "a", "b", source="before")
    tier = tier_of(manager, faulty)
    break_tier(tier)
    fail_until_skipped(manager, tier)
    with nullcontext() if journal else journal_broken(manager):
        assert stored_in(manager, "a", manager.new_entry("http://192.0.2.1:1", source="meanwhile")) == (L1,)
        if journal:
            assert manager.delete("b")
        else:
            for refused in (partial(manager.delete, "b"), manager.clear):
                with pytest.raises(CacheUnavailableError):
                    refused()
    manager = stash.reopen_after_kill(**others_off)
    repair_tier(tier)
    expected = {"a": ("meanwhile", 0)} if journal else {"a": ("before", 0), "b": ("before", 0)}
    assert content_of(manager) == expected


def test_an_l2_that_cannot_say_what_it_holds_is_not_taken_for_a_fault_of_l3(stash: Stash) -> None:
    put(stash.open(), "a", source="before")
    stash.close()
    (stash.directory / "l3" / "proxystash.db").unlink()
    tier = type(stash.open(l3_config=SWITCHED_OFF).l2_tier)
    stash.close()
    with pytest.MonkeyPatch.context() as patch:
        keys = tier.keys

        def fail_in_l2(self: DiskTier) -> list[str]:
            if self.tier_type is L2:
                raise TierLostError("a fault made by the test")
            return keys(self)

        patch.setattr(tier, "keys", fail_in_l2)
        manager = stash.open()
        assert state_of(manager, "l3") is TierState.ACTIVE
        put(manager, "b", source="after")
        assert content_of(manager) == {"b": ("after", 0)}
    stash.recover(manager)
    assert state_of(manager, "l2") is TierState.ACTIVE
    check_disk_tiers(manager, {"b": ("after", 0)})


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_an_l2_that_decides_and_was_lost_decides_still_when_l3_is_switched_on(stash: Stash, how: str) -> None:
    off = {"l3_config": SWITCHED_OFF}
    put(stash.open(), "before", source="before")
    manager = stash.reopen(**off)
    shutil.rmtree(stash.directory / "l2")
    put(manager, "a", "b", "c", source="meanwhile")
    for _ in range(2):
        manager.maintain()
        stash.recover(manager)
    put(manager, "later", source="later")
    expected = content_of(manager)
    assert expected.keys() >= {"a", "b", "c", "later"}
    manager = stash.reopen() if how == "closed" else stash.reopen_after_kill()
    assert content_of(manager).items() >= expected.items()


def test_background_work_recovers_a_tier_by_itself(
    stash: Stash, faulty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real thread: it must be running, and must do what `maintain` does."""
    monkeypatch.setattr("proxystash_server.cache.manager.MAINTENANCE_SECONDS", 0.001)
    manager = CacheManager(stash.config(), clock=stash.clock, monotonic=stash.monotonic)
    try:
        tier = tier_of(manager, faulty)
        with broken(tier):
            fail_until_skipped(manager, tier)
            put(manager, "key-1")
        stash.monotonic.advance(61)
        wait_until(lambda: state_of(manager, faulty) is TierState.ACTIVE)
        assert manager.l3_tier.get("key-1") is not None
        manager.l1_tier.clear()
        assert manager.get("key-1") is not None
        # L2 was emptied, and refills from use.
        assert tier.get("key-1") is not None
    finally:
        manager.close()
