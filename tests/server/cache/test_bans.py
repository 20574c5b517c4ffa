"""A proxy that failures have evicted is banned: the next list that brings it back does not make it clean."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from proxystash.models import HealthMonitoring
from proxystash_server.cache import (
    BannedError,
    CacheManager,
    CacheUnavailableError,
    HealthStatus,
    L2BackendType,
    StoreFormatError,
)
from proxystash_server.cache.coherence import failures
from proxystash_server.cache.coherence.failures import BanRules, FailureHistory, Failures
from proxystash_server.cache.entry.merging import merge_seen, update_fields
from proxystash_server.cache.tiers.jsonl.line import encode_body, finish_line
from tests.server.cache.stash import Stash
from tests.server.cache.support import START_US, SWITCHED_OFF, WRITES, nothing_writable, put

SECOND_US = 1_000_000
HOUR_US = 3600 * SECOND_US
BANS = {"ban_seconds": 3600, "max_ban_seconds": 24 * 3600}
UNHEALTHY, HEALTHY = HealthStatus.UNHEALTHY, HealthStatus.HEALTHY


@pytest.fixture
def l2_backend() -> L2BackendType:
    return L2BackendType.JSONL


def ban(manager: CacheManager, key: str = "a") -> int:
    """Fail a proxy until it is evicted; until when it is banned."""
    while not (done := manager.invalidate_by_health(key)).evicted:
        assert done.found
    return done.banned_until_us


def state(manager: CacheManager, key: str = "a") -> tuple[HealthStatus, int]:
    entry = manager.get(key)
    assert entry is not None
    return entry.health_status, entry.failure_count


def test_a_put_during_a_ban_is_stored_as_unhealthy_with_its_failures(stash: Stash) -> None:
    manager = stash.open(**BANS)
    put(manager, "a", "b")
    assert ban(manager) == START_US + HOUR_US
    assert manager.get("a") is None
    [stored] = manager.store([(manager.new_entry("http://192.0.2.1:1", key="a"), None)])
    assert not isinstance(stored, Exception)
    assert stored.banned_until_us == START_US + HOUR_US
    assert state(manager) == (UNHEALTHY, 3)
    assert state(manager, "b") == (HealthStatus.UNKNOWN, 0)


def test_one_more_failure_of_a_banned_proxy_evicts_it_again_for_twice_as_long(stash: Stash) -> None:
    manager = stash.open(**BANS)
    for hours in (1, 2, 4, 8, 16, 24, 24):
        put(manager, "a")
        assert ban(manager) == stash.clock() + hours * HOUR_US
    [(key, known)] = manager.bans()
    assert (key, known.bans) == ("a", 7)


def test_a_put_after_the_ban_is_taken_as_it_is_and_the_next_ban_still_lasts_twice_as_long(
    stash: Stash,
) -> None:
    manager = stash.open(**BANS)
    put(manager, "a")
    ban(manager)
    stash.clock.advance(3600)
    assert manager.bans() == []
    put(manager, "a")
    assert state(manager) == (HealthStatus.UNKNOWN, 0)
    assert ban(manager) == stash.clock() + 2 * HOUR_US


def test_what_is_long_past_is_forgotten(stash: Stash) -> None:
    manager = stash.open(**BANS)
    put(manager, "a")
    ban(manager)
    stash.clock.advance(25 * 3600 + 1)
    manager.maintain()
    put(manager, "a")
    assert ban(manager) == stash.clock() + HOUR_US


def healthy_at(microseconds: int) -> dict[str, Any]:
    checked = datetime.fromtimestamp(microseconds / 1_000_000, UTC)
    return {"health_status": HEALTHY, "health_monitoring": HealthMonitoring(last_health_check=checked)}


@pytest.mark.parametrize("failures_before", [1, 3])
@pytest.mark.parametrize(
    ("claim", "believed"),
    [
        (healthy_at(START_US - 1), False),
        (healthy_at(START_US), False),
        (healthy_at(START_US + SECOND_US), True),
        ({"health_status": HEALTHY, "fetch_time_us": START_US - SECOND_US}, False),
        ({"health_status": HEALTHY}, True),
    ],
)
def test_a_claim_of_health_counts_if_it_is_later_than_the_last_failure(
    stash: Stash, claim: dict[str, Any], believed: bool, failures_before: int
) -> None:
    manager = stash.open(**BANS)
    put(manager, "a")
    for _ in range(failures_before):
        manager.invalidate_by_health("a")
    stash.clock.advance(2)
    put(manager, "a", **claim)
    assert state(manager) == ((HEALTHY, 0) if believed else (UNHEALTHY, failures_before))
    assert bool(manager.bans()) == (failures_before == 3 and not believed)


def test_a_longest_ban_is_not_forgotten_when_it_ends(stash: Stash) -> None:
    manager = stash.open(**BANS)
    for _ in range(6):
        put(manager, "a")
        ban(manager)
    stash.clock.advance(24 * 3600 + 1)
    manager.maintain()
    put(manager, "a")
    assert ban(manager) == stash.clock() + 24 * HOUR_US


def test_a_success_forgets_the_failures_before_it(stash: Stash) -> None:
    manager = stash.open(**BANS)
    put(manager, "a")
    manager.invalidate_by_health("a")
    assert manager.report_success("a").failure_count == 0
    put(manager, "a", health_status=HEALTHY, fetch_time_us=START_US - SECOND_US)
    assert state(manager) == (HEALTHY, 0)


def test_a_failure_that_was_refused_bans_nobody(stash: Stash) -> None:
    manager = stash.open(**BANS, l1_config=SWITCHED_OFF)
    put(manager, "a", failure_count=2)
    with nothing_writable(manager, WRITES), pytest.raises(CacheUnavailableError):
        manager.invalidate_by_health("a")
    assert manager.bans() == []
    stash.recover(manager)
    put(manager, "a")
    assert ban(manager) == stash.clock() + HOUR_US


def test_a_banned_proxy_keeps_what_it_is_said_to_have_failed(stash: Stash) -> None:
    manager = stash.open(**BANS)
    put(manager, "a")
    ban(manager)
    put(manager, "a", failure_count=7)
    assert state(manager) == (UNHEALTHY, 7)


def test_puts_of_a_group_see_what_the_ones_before_made_known(stash: Stash) -> None:
    """Given a claim of health that counts, and one in the same batch that alone would not."""
    manager = stash.open(**BANS)
    put(manager, "a")
    ban(manager)
    stash.clock.advance(2)
    good, old = (
        manager.new_entry("http://192.0.2.1:1", key="a", health_status=HEALTHY, fetch_time_us=at)
        for at in (START_US + SECOND_US, START_US - SECOND_US)
    )
    manager.store([(good, None), (old, None)])
    assert state(manager) == (HEALTHY, 0)


def test_a_claim_of_health_is_of_the_put_that_makes_it_also_where_that_is_combined(stash: Stash) -> None:
    """Not of the entry that is stored, which may be older, or younger."""
    manager = stash.open(**BANS)
    put(manager, "a")
    manager.invalidate_by_health("a")
    stash.clock.advance(2)
    put(manager, "a")
    earlier = manager.new_entry(
        "http://192.0.2.1:1", key="a", health_status=HEALTHY, fetch_time_us=START_US - SECOND_US
    )
    manager.store([(earlier, merge_seen({"health_status"}))])
    assert state(manager) == (UNHEALTHY, 1)
    put(manager, "b")
    stash.clock.advance(2)
    manager.invalidate_by_health("b")
    stash.clock.advance(2)
    now = manager.new_entry("http://192.0.2.1:1", key="b", health_status=HEALTHY)
    manager.store([(now, update_fields({"health_status"}))])
    assert state(manager, "b") == (HEALTHY, 0)


def test_puts_of_banned_proxies_are_refused_if_it_is_configured_so(stash: Stash) -> None:
    manager = stash.open(**BANS, refuse_banned=True)
    put(manager, "a")
    ban(manager)
    refused, stored = manager.store(
        [(manager.new_entry("http://192.0.2.1:1", key=key), None) for key in ("a", "b")]
    )
    assert isinstance(refused, BannedError)
    assert not isinstance(stored, Exception)
    assert stored.stored_in
    assert manager.get("a") is None
    stash.clock.advance(2)
    put(manager, "a", health_status=HEALTHY)
    assert state(manager) == (HEALTHY, 0)


FORGETTING = {
    "delete": lambda manager: manager.delete("a"),
    "clear": lambda manager: manager.clear(),
    "unban": lambda manager: manager.unban("a"),
}


@pytest.mark.parametrize("forget", FORGETTING)
@pytest.mark.parametrize("restarted", [False, True])
def test_a_ban_can_be_forgotten(stash: Stash, forget: str, restarted: bool) -> None:
    manager = stash.open(**BANS)
    put(manager, "a")
    ban(manager)
    FORGETTING[forget](manager)
    if restarted:
        manager = stash.reopen_after_kill(**BANS)
    assert manager.bans() == []
    put(manager, "a")
    assert state(manager) == (HealthStatus.UNKNOWN, 0)
    assert ban(manager) == START_US + HOUR_US


def test_unbanning_says_whether_there_was_a_ban(stash: Stash) -> None:
    manager = stash.open(**BANS)
    put(manager, "a", "b")
    ban(manager)
    manager.invalidate_by_health("b")
    assert [manager.unban(key) for key in ("a", "a", "b", "c")] == [True, False, False, False]


def test_bans_survive_a_kill(stash: Stash) -> None:
    manager = stash.open(**BANS)
    put(manager, "a", "b")
    ban(manager)
    manager.invalidate_by_health("b")
    manager = stash.reopen_after_kill(**BANS)
    assert [key for key, _ in manager.bans()] == ["a"]
    put(manager, "a", "b")
    put(manager, "b", health_status=HEALTHY, fetch_time_us=START_US - 1)
    assert (state(manager), state(manager, "b")) == ((UNHEALTHY, 3), (UNHEALTHY, 1))


def test_without_bans_nothing_is_remembered(stash: Stash) -> None:
    manager = stash.open()
    put(manager, "a")
    assert ban(manager) == 0
    put(manager, "a")
    assert state(manager) == (HealthStatus.UNKNOWN, 0)
    assert not (stash.directory / "failures.jsonl").exists()


def test_bans_are_listed_in_order_and_page_by_page(stash: Stash) -> None:
    manager = stash.open(**BANS)
    keys = [f"key-{number}" for number in range(5)]
    for key in reversed(keys):
        put(manager, key)
        ban(manager, key)
    assert [key for key, _ in manager.bans("", 2)] == keys[:2]
    assert [key for key, _ in manager.bans("key-1", 10)] == keys[2:]


def test_where_bans_are_switched_off_nobody_is_banned_any_more(stash: Stash) -> None:
    manager = stash.open(**BANS)
    put(manager, "a", "b")
    ban(manager)
    ban(manager, "b")
    manager = stash.reopen(ban_seconds=0, refuse_banned=True)
    put(manager, "a")
    assert (state(manager), manager.bans()) == ((HealthStatus.UNKNOWN, 0), [])
    put(manager, "a", health_status=HEALTHY, fetch_time_us=START_US - SECOND_US)
    assert state(manager) == (HEALTHY, 0)
    manager.delete("a")
    # What was not forgotten meanwhile counts where they are switched on again.
    assert [key for key, _ in stash.reopen(**BANS).bans()] == ["b"]


# -- the file


RULES = BanRules(HOUR_US, 24 * HOUR_US)


def history(path: Path) -> FailureHistory:
    one = FailureHistory(path, RULES, sync=False)
    one.open()
    return one


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "failures.jsonl"


def no_room(*_arguments: object) -> int:
    raise OSError(28, "No space left on device")


def test_the_file_cut_off_anywhere_gives_what_its_whole_lines_say(path: Path) -> None:
    one = history(path)
    states: list[dict[str, Failures]] = []
    ends: list[int] = []
    for number in range(6):
        one.update({f"key-{number % 3}": Failures(number, number, number, number) if number != 4 else None})
        states.append(dict(one.known))
        ends.append(path.stat().st_size)
    content = path.read_bytes()
    for end in range(ends[0], len(content) + 1):
        path.write_bytes(content[:end])
        assert history(path).known == states[max(place for place in range(6) if ends[place] <= end)]


def test_damaged_lines_cost_themselves_alone_and_are_gone_with_the_next_change(path: Path) -> None:
    one = history(path)
    one.update({"a": Failures(3, 1, 1, 2)})
    one.update({"b": Failures(3, 1, 1, 2)})
    data = bytearray(path.read_bytes())
    data[data.index(b'"a"') + 1] ^= 1
    path.write_bytes(data)
    after = FailureHistory(path, RULES, sync=False)
    assert after.open() == 1
    assert set(after.known) == {"b"}
    after.update({"c": Failures(1, 1)})
    after = FailureHistory(path, RULES, sync=False)
    assert after.open() == 0
    assert set(after.known) == {"b", "c"}


def test_a_file_of_a_newer_release_is_refused(path: Path) -> None:
    path.parent.mkdir()
    header = {"op": "header", "format": failures.FORMAT, "version": 1000}
    path.write_bytes(finish_line(encode_body(header), 0))
    with pytest.raises(StoreFormatError, match="newer release"):
        history(path)


def test_a_full_disk_keeps_bans_in_memory_and_the_next_change_writes_them(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = history(path)
    one.update({"a": Failures(3, 1, 1, 2)})
    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", no_room)
        one.update({"b": Failures(3, 1, 1, 2)})
    assert set(one.known) == {"a", "b"}
    assert "memory alone" in caplog.text
    assert set(history(path).known) == {"a"}
    one.update({"c": Failures(3, 1, 1, 2)})
    assert history(path).known == one.known


def test_a_file_that_is_taken_away_is_written_anew(path: Path) -> None:
    one = history(path)
    one.update({"a": Failures(3, 1, 1, 2)})
    path.unlink()
    one.update({"b": Failures(3, 1, 1, 2)})
    one.update({"c": Failures(3, 1, 1, 2)})
    assert history(path).known == one.known


def test_the_file_and_what_it_knows_are_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "_MOST_KEYS", 10)
    monkeypatch.setattr(failures, "_WORTH_REWRITING", 2000)
    one = history(path)
    for number in range(500):
        one.update({f"key-{number}": Failures(1, number)})
    assert list(one.known) == [f"key-{number}" for number in range(490, 500)]
    assert path.stat().st_size < 6000
    assert history(path).known == one.known


def test_what_failed_last_is_forgotten_last_also_after_a_restart(path: Path) -> None:
    one = history(path)
    for key in ("a", "b", "a"):
        one.update({key: Failures(1, START_US)})
    assert list(one.known) == list(history(path).known) == ["b", "a"]


def test_any_number_of_bans_can_be_one_more(path: Path) -> None:
    one = history(path)
    one.update({"a": Failures(3, 1, 10**18, 2)})
    known = one.after_failure("a", 3, START_US, evicts=True)
    assert (known.bans, known.banned_until_us) == (10**18 + 1, START_US + RULES.most_us)


def test_a_fault_that_has_passed_costs_no_more(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next change writes the file anew, and those after it add to that."""
    one = history(path)
    one.update({"a": Failures(3, 1, 1, 2)})
    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", no_room)
        one.update({"b": Failures(3, 1, 1, 2)})
    one.update({"c": Failures(3, 1, 1, 2)})
    anew = path.stat().st_ino
    one.update({"d": Failures(3, 1, 1, 2)})
    assert path.stat().st_ino == anew
    assert history(path).known == one.known


@pytest.mark.parametrize("sync", [True, False])
def test_bans_wait_for_the_medium_if_that_is_wanted(
    path: Path, monkeypatch: pytest.MonkeyPatch, sync: bool
) -> None:
    synced: list[int] = []
    path.parent.mkdir()
    monkeypatch.setattr(os, "fsync", synced.append)
    one = FailureHistory(path, RULES, sync=sync)
    one.open()
    for key in ("a", "b"):
        # At first written anew, and then appended.
        synced.clear()
        one.update({key: Failures(1, 1)})
        assert bool(synced) is sync
