"""What `check` says of stores that nothing is wrong with, and that it leaves them as they are."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import pytest

from proxystash_server.cache import CacheTierConfig, L2BackendType
from proxystash_server.cache.tiers.base import EVERYTHING
from tests.server.cache.format_1 import turn_into_format_1
from tests.server.cache.support import PASSWORD, SWITCHED_OFF, USERNAME, disk_of, fingerprint
from tests.server.cache_tools.stopped import BOUNDED, KEYS, SEALED, StoppedCache, fill, note_kinds, told


def test_a_store_that_was_stopped_is_consistent_without_a_note(cache: StoppedCache) -> None:
    report = cache.fill().check()
    assert report.consistent
    assert report.faults == report.notes == []
    l2, l3 = report.tiers
    assert (l2.tier, l2.backend, l2.entries, l2.credentials) == ("l2", str(cache.l2_backend), 24, len(SEALED))
    assert (l3.tier, l3.backend, l3.entries, l3.credentials) == ("l3", "sqlite", 24, len(SEALED))


def test_a_check_changes_neither_bytes_nor_times_nor_modes(cache: StoppedCache) -> None:
    cache.fill()
    before = fingerprint(cache.directory)
    directories = {path: path.stat().st_mtime_ns for path in cache.directory.rglob("*") if path.is_dir()}
    assert cache.check().consistent
    assert fingerprint(cache.directory) == before
    assert {path: path.stat().st_mtime_ns for path in directories} == directories


def test_an_older_format_is_worth_a_note_and_gone_after_a_start(cache: StoppedCache) -> None:
    cache.fill()
    turn_into_format_1(cache.l3)
    before = fingerprint(cache.directory)
    report = cache.check()
    assert report.consistent, told(report)
    assert note_kinds(report) == {"older_format"}
    assert report.tiers[1].entries == 24
    assert fingerprint(cache.directory) == before
    assert set(cache.entries()) == set(KEYS)
    assert cache.check().notes == []


def test_where_nothing_is_stored_nothing_is_wrong(cache: StoppedCache) -> None:
    cache.directory.mkdir()
    report = cache.check()
    assert report.consistent
    assert [tier.exists for tier in report.tiers] == [False, False]
    assert list(cache.directory.iterdir()) == []


def test_a_log_that_a_kill_left_behind_counts_and_stays_where_it_is(
    cache: StoppedCache, tmp_path: Path
) -> None:
    with cache.running() as manager:
        fill(manager)
        killed = cache.copy("killed")
    assert killed.l3.with_name("proxystash.db-wal").stat().st_size > 0
    before = fingerprint(killed.directory)
    temporary = set(Path(tempfile.gettempdir()).glob("proxystash-*"))
    report = killed.check()
    assert report.consistent
    assert report.tiers[1].entries == 24
    assert fingerprint(killed.directory) == before
    assert set(Path(tempfile.gettempdir()).glob("proxystash-*")) == temporary


def test_a_log_that_there_is_no_room_to_apply_is_no_verdict(
    cache: StoppedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cache.running() as manager:
        fill(manager)
        killed = cache.copy("killed")

    def full(_source: Path, _target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(Exception, match="TMPDIR"):
        killed.check()


def test_a_cache_killed_in_the_middle_of_its_work_leaves_a_consistent_store(cache: StoppedCache) -> None:
    rounds, told_by_child = os.pipe()
    child = os.fork()
    if not child:
        try:
            with cache.running() as manager:
                while True:
                    fill(manager)
                    manager.delete(KEYS[0])
                    os.write(told_by_child, b".")
        finally:
            os._exit(1)
    os.close(told_by_child)
    with os.fdopen(rounds, "rb") as pipe:
        assert len(pipe.read(20)) == 20
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    report = cache.check()
    assert report.consistent, told(report)
    assert report.tiers[1].entries >= len(KEYS) - 1


def test_replaced_and_deleted_entries_are_no_fault(cache: StoppedCache) -> None:
    cache.fill().fill()
    with cache.running() as manager:
        for key in KEYS[:10]:
            manager.delete(key)
        manager.invalidate_by_health(KEYS[11])
        manager.get(KEYS[12])
    report = cache.check()
    assert report.faults == report.notes == []
    assert [tier.entries for tier in report.tiers] == [14, 14]


def test_a_cleared_store_is_empty(cache: StoppedCache) -> None:
    cache.fill()
    with cache.running() as manager:
        manager.clear()
    report = cache.check()
    assert report.faults == report.notes == []
    assert [tier.entries for tier in report.tiers] == [0, 0]


def test_expired_entries_that_nobody_has_removed_yet_are_no_fault(cache: StoppedCache) -> None:
    with cache.running() as manager:
        manager.put("old", manager.new_entry("http://192.0.2.1:1", key="old", fetch_time_us=1))
    report = cache.check()
    assert report.faults == report.notes == []
    assert [tier.entries for tier in report.tiers] == [1, 1]


def test_bounded_tiers_hold_what_they_may(cache: StoppedCache) -> None:
    cache.settings = {"l2_config": BOUNDED, "l3_config": CacheTierConfig(max_entries=15)}
    report = cache.fill().check()
    assert report.consistent, told(report)
    assert [tier.entries for tier in report.tiers] == [10, 15]


@pytest.mark.parametrize("off", ["l2_config", "l3_config"])
def test_a_tier_that_is_switched_off_is_not_looked_at(cache: StoppedCache, off: str) -> None:
    cache.settings = {off: SWITCHED_OFF}
    report = cache.fill().check()
    assert report.faults == report.notes == []
    assert [tier.tier for tier in report.tiers] == ["l3" if off == "l2_config" else "l2"]


@pytest.mark.parametrize("off", ["l2_config", "l3_config"])
def test_a_tier_that_was_switched_off_for_a_while_may_differ(cache: StoppedCache, off: str) -> None:
    cache.fill()
    with cache.running(**{off: SWITCHED_OFF}) as manager:
        fill(manager)
        manager.delete(KEYS[0])
    report = cache.check()
    assert report.consistent, told(report)
    assert "unmatched_stores" in note_kinds(report)
    assert len(cache.entries()) == 23
    assert cache.check().notes == []


def test_a_new_l3_may_lack_everything(cache: StoppedCache) -> None:
    cache.fill()
    cache.l3.unlink()
    with cache.running(l2_config=SWITCHED_OFF):
        pass
    cache.sql(cache.l3, "UPDATE meta SET value = '' WHERE name = 'partner_id'")
    report = cache.check()
    assert report.consistent, told(report)
    assert "unmatched_stores" in note_kinds(report)
    assert len(cache.entries()) == 24


def test_what_stands_in_a_backlog_may_differ(cache: StoppedCache) -> None:
    cache.fill()
    with cache.running() as manager:
        disk = disk_of(manager)
        # L3 misses a put and a removal, L2 a replacement.
        disk.l3.breaker.force_open()
        manager.put("key-1", manager.new_entry("http://192.0.2.9:1", key="key-1"))
        manager.put("new", manager.new_entry("http://192.0.2.9:1", key="new"))
        manager.delete("key-2")
    report = cache.check()
    assert report.consistent, told(report)
    assert note_kinds(report) == {"backlog"}
    assert report.tiers[0].missed_by_other == 3


def test_a_clear_that_l2_missed_excuses_what_was_there_before_it_alone(cache: StoppedCache) -> None:
    cache.fill()
    with cache.running() as manager:
        disk_of(manager).l2.breaker.force_open()
        manager.clear()
    assert cache.sql(cache.l3, "SELECT key FROM backlog") == [(EVERYTHING,)]
    report = cache.check()
    assert report.consistent, told(report)
    assert [tier.entries for tier in report.tiers] == [24, 0]


def test_uses_that_one_tier_has_not_heard_of_are_no_disagreement(cache: StoppedCache) -> None:
    cache.fill()
    cache.sql(cache.l3, "UPDATE entries SET access_count = 99, last_accessed = 5, evicted_from_l1 = 1")
    assert cache.check().faults == []


def test_a_store_that_a_first_start_has_only_begun_is_no_fault(cache: StoppedCache) -> None:
    cache.l2.mkdir(parents=True)
    cache.l3.parent.mkdir()
    cache.l3.touch()
    if cache.l2_backend is L2BackendType.JSONL:
        (cache.l2 / "shard-0.jsonl").touch()
    else:
        cache.l2_database.touch()
    report = cache.check()
    assert report.consistent, told(report)
    assert note_kinds(report) == {"unfinished_store"}
    assert cache.entries() == {}


def test_leftovers_of_a_crash_are_told_and_no_fault(cache: StoppedCache) -> None:
    cache.fill()
    leftovers = [
        cache.l2 / "shard-0.jsonl.compacting",
        cache.l2 / "meta.json.new",
        cache.l3.with_name("proxystash.db.salvaged"),
        cache.l3.with_name("proxystash.db.damaged-1"),
        cache.directory / "secret.key.new",
    ]
    for path in leftovers:
        path.write_bytes(b"half of it")
    report = cache.check()
    assert report.consistent
    assert {note.place for note in report.notes} == {str(path) for path in leftovers}


def test_no_report_has_a_secret_in_it(cache: StoppedCache) -> None:
    cache.fill()
    cache.sql(cache.l3, "UPDATE entries SET source = 'x'")
    report = cache.check()
    key = cache.key_file.read_text().strip()
    tokens = [row[0] for row in cache.sql(cache.l3, "SELECT sealed FROM entries WHERE sealed NOTNULL")]
    for secret in (PASSWORD, USERNAME, key, *tokens):
        assert secret not in told(report)
