"""What `check` says of stores that nothing is wrong with, and that it leaves them as they are."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import pytest

from proxystash_server.cache import CacheTierConfig, L2BackendType
from tests.server.cache.support import PASSWORD, SWITCHED_OFF, USERNAME, fingerprint, put
from tests.server.cache_tools.stopped import (
    BOUNDED,
    KEYS,
    SEALED,
    StoppedCache,
    expired,
    fill,
    miss_changes,
    note_kinds,
    told,
)


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
    cache.turn_into_format_1()
    before = fingerprint(cache.directory)
    report = cache.check()
    assert report.consistent, told(report)
    assert [note.kind for note in report.notes] == ["older_format"] * 2
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
    cache: StoppedCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with cache.running() as manager:
        fill(manager)
        killed = cache.copy("killed")
    assert killed.l3.with_name("proxystash.db-wal").stat().st_size > 0
    before = fingerprint(killed.directory)
    report = killed.check()
    assert report.consistent
    assert note_kinds(report) == {"unsealed_cache"}
    assert report.tiers[1].entries == 24
    assert fingerprint(killed.directory) == before
    assert list(temporary.iterdir()) == []


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
        manager.put("old", expired("old"))
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


# -- what the next start makes of L2


@pytest.mark.parametrize(
    ("off", "note", "entries"),
    [("l2_config", "unsealed_cache", [24, 23]), ("l3_config", "alone", [23, 24])],
)
def test_a_tier_that_was_switched_off_for_a_while_may_differ(
    cache: StoppedCache, off: str, note: str, entries: list[int]
) -> None:
    cache.fill()
    with cache.running(**{off: SWITCHED_OFF}) as manager:
        fill(manager)
        manager.delete(KEYS[0])
    report = cache.check()
    assert report.consistent, told(report)
    assert note_kinds(report) == {note}
    assert [tier.entries for tier in report.tiers] == entries
    assert set(cache.entries()) == set(KEYS[1:])
    assert cache.check().notes == []


def test_an_l2_that_is_not_sealed_may_hold_anything_and_starts_empty(cache: StoppedCache) -> None:
    with cache.running() as manager:
        fill(manager)
        killed = cache.copy("killed")
    killed.sql(killed.l3, "DELETE FROM entries WHERE key = ?", KEYS[0])
    killed.sql(killed.l3, "UPDATE meta SET value = value - 1 WHERE name = 'entries'")
    report = killed.check()
    assert report.consistent, told(report)
    [note] = report.notes
    assert (note.kind, note.place) == ("unsealed_cache", killed.l2_place)
    assert note.message == "L2 starts empty: it did not come to an orderly end"
    assert set(killed.entries()) == set(KEYS[1:])


def test_an_l2_that_l3_does_not_know_starts_empty(cache: StoppedCache) -> None:
    cache.fill()
    cache.sql(cache.l3, "UPDATE meta SET value = 'another' WHERE name = 'cache_id'")
    report = cache.check()
    assert report.consistent, told(report)
    [note] = report.notes
    assert note.kind == "unsealed_cache"
    assert note.message == "L2 starts empty: L3 does not know it as its cache"


def test_by_an_l3_of_somebody_else_the_next_start_goes_alone(cache: StoppedCache, tmp_path: Path) -> None:
    cache.fill()
    other = StoppedCache(tmp_path / "other", cache.l2_backend)
    other.directory.mkdir()
    other.key_file.touch(mode=0o600)
    other.key_file.write_bytes(cache.key_file.read_bytes())
    with other.running() as manager:
        put(manager, "theirs")
    cache.l3.write_bytes(other.l3.read_bytes())
    report = cache.check()
    assert report.consistent, told(report)
    assert note_kinds(report) == {"unsealed_cache"}
    assert cache.entries() == {}
    with cache.running() as manager:
        assert manager.get("theirs") is not None


def test_a_new_l3_may_lack_everything(cache: StoppedCache) -> None:
    cache.fill()
    cache.l3.unlink()
    cache.begin_l3()
    report = cache.check()
    assert report.consistent, told(report)
    assert note_kinds(report) == {"incomplete"}
    assert [tier.entries for tier in report.tiers] == [24, 0]
    assert set(cache.entries()) == set(KEYS)
    assert cache.check().notes == []


def test_an_l3_from_yesterday_may_lack_what_l2_has(cache: StoppedCache) -> None:
    cache.fill()
    yesterday = cache.l3.read_bytes()
    with cache.running() as manager:
        put(manager, "key-1", "new", source="today")
    cache.l3.write_bytes(yesterday)
    report = cache.check()
    assert report.consistent, told(report)
    assert note_kinds(report) == {"set_back", "unsealed_cache"}
    cache.entries()
    assert cache.sql(cache.l3, "SELECT key FROM entries WHERE source = 'today' ORDER BY key") == [
        ("key-1",),
        ("new",),
    ]
    assert cache.check().notes == []


def test_a_missing_log_of_l3_is_noticed_by_what_l2_has(cache: StoppedCache) -> None:
    cache.fill()
    with cache.running() as manager:
        fill(manager)
        killed = cache.copy("killed")
    killed.l3.with_name("proxystash.db-wal").unlink()
    report = killed.check()
    assert report.consistent, told(report)
    assert note_kinds(report) == {"set_back", "unsealed_cache"}
    assert len(killed.entries()) == 24


# -- what the slowest tier has missed


@pytest.mark.parametrize("off", [None, "l2_config", "l3_config"])
def test_changes_that_the_slowest_tier_has_missed_are_a_note(cache: StoppedCache, off: str | None) -> None:
    cache.settings = {off: SWITCHED_OFF} if off else {}
    cache.fill()
    with cache.running() as manager:
        miss_changes(manager)
    before = fingerprint(cache.directory)
    report = cache.check()
    assert fingerprint(cache.directory) == before
    assert report.consistent, told(report)
    [note] = report.notes
    assert (note.kind, note.place) == ("missed_changes", str(cache.missed_changes))
    assert "3 changes" in note.message
    assert set(cache.entries()) == set(KEYS) - {KEYS[2]}
    assert cache.check().notes == []


def test_a_clear_that_the_slowest_tier_has_missed_is_one_change(cache: StoppedCache) -> None:
    cache.fill()
    with cache.running() as manager:
        manager._authority.guard.breaker.force_open()
        manager.clear()
        put(manager, "new")
    report = cache.check()
    assert report.consistent, told(report)
    assert note_kinds(report) == {"missed_changes"}
    assert "2 changes" in report.notes[0].message
    assert [tier.entries for tier in report.tiers] == [1, 24]
    assert cache.entries() == {}


def test_a_last_line_of_the_journal_torn_anywhere_is_no_fault(cache: StoppedCache) -> None:
    cache.fill()
    with cache.running() as manager:
        miss_changes(manager)
    data = cache.missed_changes.read_bytes()
    start = data.rindex(b"\n", 0, -1) + 1
    for end in (*range(start, len(data), 7), len(data) - 1):
        cache.missed_changes.write_bytes(data[:end])
        report = cache.check()
        assert report.consistent, told(report)
        assert "missed_changes" in note_kinds(report)


# -- uses, beginnings, leftovers


def test_uses_that_one_tier_has_not_heard_of_are_no_disagreement(cache: StoppedCache) -> None:
    cache.fill()
    cache.sql(cache.l3, "UPDATE entries SET access_count = 99, last_accessed = 5, evicted_from_l1 = 1")
    assert cache.check().faults == []


def test_a_store_that_a_first_start_has_only_begun_is_no_fault(cache: StoppedCache) -> None:
    cache.l2.mkdir(parents=True)
    cache.l3.parent.mkdir()
    cache.l3.touch()
    if cache.l2_backend is L2BackendType.JSONL:
        cache.l2_file.touch()
    else:
        cache.l2_database.touch()
    report = cache.check()
    assert report.consistent, told(report)
    assert note_kinds(report) == {"unfinished_store"}
    assert cache.entries() == {}


def test_leftovers_of_a_crash_are_told_and_no_fault(cache: StoppedCache) -> None:
    cache.fill()
    leftovers = [
        cache.l2 / "entries.jsonl.compacting",
        cache.l2 / "meta.json.new",
        cache.l3.with_name("proxystash.db.salvaged"),
        cache.l3.with_name("proxystash.db.damaged-1"),
        cache.directory / "secret.key.new",
        cache.directory / "missed-changes.jsonl.damaged-1",
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
