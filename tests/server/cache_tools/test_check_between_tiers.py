"""L2 against L3, and the journal of what L3 has missed: what a check finds, and a repair puts in order."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from proxystash_server.cache import L2BackendType, StoreError
from proxystash_server.cache.tiers.jsonl.line import encode_body, finish_line
from tests.server.cache.support import fingerprint, flip_byte
from tests.server.cache_tools.stopped import (
    KEYS,
    VICTIM,
    StoppedCache,
    edit_record,
    facts,
    foreign_token,
    kinds,
    miss_changes,
    note_kinds,
    set_content,
    sql,
    told,
)

# -- L2 against L3


def delete_row(path: Path) -> None:
    sql(path, "DELETE FROM entries WHERE key = ?", VICTIM)
    sql(path, "UPDATE meta SET value = value - 1 WHERE name = 'entries'")


UNCONFIRMED: dict[str, Callable[[Path], object]] = {
    "another version": set_content("version", 7),
    "another source": set_content("source", "elsewhere"),
    "another time": set_content("expires_at", 2**52),
    "no credentials": set_content("sealed", None),
    "no entry": delete_row,
}


@pytest.mark.parametrize("change", UNCONFIRMED)
def test_an_entry_of_l2_that_l3_does_not_confirm_is_a_fault_and_l3_wins(
    cache: StoppedCache, change: str
) -> None:
    cache.fill()
    UNCONFIRMED[change](cache.l3)
    rows = sql(cache.l3, "SELECT key, source FROM entries")
    report = cache.check()
    assert kinds(report) == {"disagreement": 1}, told(report)
    assert report.faults[0].remedy == "--repair empties L2"
    assert cache.repair()
    report = cache.check()
    assert report.faults == [], told(report)
    assert report.tiers[0].entries == 0
    assert {key: entry.source for key, entry in cache.entries().items()} == dict(rows)
    assert cache.check().faults == []


@pytest.mark.parametrize("l2_backend", [L2BackendType.SQLITE])
@pytest.mark.parametrize("change", [name for name in UNCONFIRMED if name != "no entry"])
def test_a_changed_entry_of_l2_is_never_brought_to_l3(cache: StoppedCache, change: str) -> None:
    before = cache.fill().entries()
    UNCONFIRMED[change](cache.l2_database)
    assert kinds(cache.check()) == {"disagreement": 1}
    assert cache.repair()["entries of L2 dropped"] == len(KEYS)
    assert cache.check().faults == []
    assert facts(cache.entries()) == facts(before)


def test_an_entry_of_l2_that_differs_from_what_l3_has_missed_is_a_fault(cache: StoppedCache) -> None:
    cache.fill()
    with cache.running() as manager:
        miss_changes(manager)
    assert cache.check().faults == []
    edit_record(cache.missed_changes, "missed", source="elsewhere")
    edit_record(cache.missed_changes, KEYS[1], op="delete")
    report = cache.check()
    assert kinds(report) == {"disagreement": 2}, told(report)
    assert cache.repair()
    assert cache.check().faults == []
    assert cache.entries().keys() == {KEYS[0], *KEYS[3:]}


# -- what the slowest tier has missed


def spoil_header(**fields: object) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        first, *rest = path.read_bytes().splitlines(keepends=True)
        record = {**json.loads(first), **fields}
        del record["crc"], record["seq"]
        path.write_bytes(finish_line(encode_body(record), 0) + b"".join(rest))

    return change


def test_a_damaged_line_of_the_journal_is_a_fault_and_set_aside_with_the_file(cache: StoppedCache) -> None:
    cache.fill()
    with cache.running() as manager:
        miss_changes(manager)
    flip_byte(cache.missed_changes, cache.missed_changes.read_bytes().index(b'"key":"missed"') + 10)
    state = fingerprint(cache.directory)
    report = cache.check()
    assert fingerprint(cache.directory) == state
    [fault] = [fault for fault in report.faults if fault.kind != "disagreement"]
    assert (fault.kind, fault.place) == ("damaged_line", str(cache.missed_changes))
    assert cache.repair()["damaged journals set aside"] == 1
    report = cache.check()
    assert report.faults == [], told(report)
    assert note_kinds(report) == {"damaged_file"}
    assert not cache.missed_changes.exists()
    assert b'"key":"' in (cache.directory / "missed-changes.jsonl.damaged-1").read_bytes()
    entries = cache.entries()
    assert entries.keys() == {*KEYS} - {KEYS[2]}
    assert entries[KEYS[1]].source == "missed"


def test_whichever_byte_of_the_journal_is_flipped_is_found(cache: StoppedCache) -> None:
    cache.fill()
    with cache.running() as manager:
        miss_changes(manager)
    data = cache.missed_changes.read_bytes()
    # Without the end of its last line, that counts as torn.
    for place in range(0, len(data) - 1, 17):
        cache.missed_changes.write_bytes(data[:place] + bytes([data[place] ^ 0x04]) + data[place + 1 :])
        report = cache.check()
        assert "damaged_line" in kinds(report)
        assert {fault.place for fault in report.faults if fault.kind == "damaged_line"} == {
            str(cache.missed_changes)
        }


def test_a_credential_of_the_journal_under_another_key_is_a_fault(cache: StoppedCache) -> None:
    cache.fill()
    with cache.running() as manager:
        miss_changes(manager)
    edit_record(cache.missed_changes, "missed", sealed=foreign_token())
    report = cache.check()
    assert kinds(report) == {"unreadable_credential": 1}, told(report)
    assert report.faults[0].place == str(cache.missed_changes)
    assert cache.repair()["damaged journals set aside"] == 1
    report = cache.check()
    assert report.faults == [], told(report)
    assert "damaged_file" in note_kinds(report)
    assert cache.entries()[KEYS[1]].source == "missed"
    assert cache.check().faults == []


JOURNAL_TROUBLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "of another key": (spoil_header(key_check=foreign_token()), "wrong_key"),
    "of a newer format": (spoil_header(version=1000), "unknown_format"),
    "of something else": (spoil_header(format="proxystash-jsonl"), "unknown_format"),
}


@pytest.mark.parametrize("trouble", JOURNAL_TROUBLE)
def test_a_journal_that_cannot_be_used_is_told_and_left_alone(cache: StoppedCache, trouble: str) -> None:
    cache.fill()
    with cache.running() as manager:
        miss_changes(manager)
    change, kind = JOURNAL_TROUBLE[trouble]
    change(cache.missed_changes)
    before = fingerprint(cache.directory)
    report = cache.check()
    assert kind in kinds(report)
    assert {fault.place for fault in report.faults if fault.kind == kind} == {str(cache.missed_changes)}
    with pytest.raises(StoreError, match="nothing was changed"):
        cache.repair()
    assert fingerprint(cache.directory) == before
