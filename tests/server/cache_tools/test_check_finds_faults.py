"""Every fault that can be made by hand is found, told in its kind, and gone after a repair."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from proxystash_server.cache import CacheTierConfig, L2BackendType, StoreError
from proxystash_server.cache.tiers.jsonl.line import encode_body, finish_line
from proxystash_server.cache.tiers.sqlite.format import PAGE_BYTES
from proxystash_server.cache.tiers.sqlite.record import COLUMNS, CONTENT_LENGTH, checksum
from tests.server.cache.support import SWITCHED_OFF, fingerprint, flip_byte
from tests.server.cache_tools.stopped import (
    KEYS,
    VICTIM,
    StoppedCache,
    edit_line,
    edit_record,
    facts,
    foreign_token,
    kinds,
    note_kinds,
    set_content,
    sql,
    told,
)


@dataclass(frozen=True)
class Damage:
    """Something done to a file of a stopped store, what it is found as, and which entries it costs."""

    do: Callable[[Path], object]
    found_as: set[str]
    lost: frozenset[str] = field(default_factory=frozenset)


def set_column(column: str, value: object, key: str = VICTIM) -> Callable[[Path], object]:
    return lambda path: sql(path, f"UPDATE entries SET {column} = ? WHERE key = ?", value, key)


def repeat_row(path: Path) -> None:
    """Give a key a second row, of an earlier write."""
    [row] = sql(path, f"SELECT {COLUMNS} FROM entries WHERE key = ?", VICTIM)
    stored = dict(zip(COLUMNS.split(", ")[:CONTENT_LENGTH], row, strict=False))
    content = tuple((stored | {"source": "earlier", "version": stored["version"] - 1}).values())
    marks = ", ".join("?" * len(row))
    sql(
        path,
        f"INSERT INTO entries ({COLUMNS}, scheme, recency) VALUES ({marks}, 'http', 0)",
        *content,
        checksum(content),
        *row[CONTENT_LENGTH + 1 :],
    )
    sql(path, "UPDATE meta SET value = value + 1 WHERE name = 'entries'")


def set_meta(name: str, value: object) -> Callable[[Path], object]:
    return lambda path: sql(path, "UPDATE meta SET value = ? WHERE name = ?", value, name)


def spoil_index(path: Path) -> None:
    """Let an index have something else in it than the table."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        original = "SELECT sql FROM sqlite_schema WHERE name = 'entries_by_expiry'"
        [(definition,)] = connection.execute(original).fetchall()
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(
            "UPDATE sqlite_schema SET sql = ? WHERE name = 'entries_by_expiry'",
            (definition.replace("expires_at", "fetch_time"),),
        )
        connection.execute("PRAGMA writable_schema = RESET")
        connection.execute("UPDATE entries SET expires_at = expires_at")
        connection.execute("REINDEX entries_by_expiry")
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_schema SET sql = ? WHERE name = 'entries_by_expiry'", (definition,))
        connection.execute("PRAGMA writable_schema = RESET")


def smash(offset: int, length: int) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[offset : offset + length] = b"\xaa" * length
        path.write_bytes(data)

    return damage


def smash_page_with(content: bytes) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        smash(path.read_bytes().index(content) // PAGE_BYTES * PAGE_BYTES, PAGE_BYTES)(path)

    return damage


ANY_DATABASE: dict[str, Damage] = {
    "a column that does not match the checksum": Damage(set_column("source", "elsewhere"), {"damaged_row"}),
    "a damaged token": Damage(set_column("sealed", "gAAAAA"), {"damaged_row"}),
    "a text that is no text": Damage(
        lambda path: sql(path, "UPDATE entries SET source = CAST(x'ff' AS TEXT) WHERE key = ?", VICTIM),
        {"damaged_row"},
    ),
    "a negative count of uses": Damage(set_column("access_count", -5), {"damaged_row"}),
    "a status that there is not": Damage(set_content("health_status", "splendid"), {"damaged_row"}),
    "labels that are no labels": Damage(set_content("labels", "["), {"damaged_row"}),
    "a credential under another key": Damage(
        set_content("sealed", foreign_token()), {"unreadable_credential"}
    ),
    "a wrong scheme": Damage(set_column("scheme", "socks5"), {"wrong_column"}),
    "a recency that is no number": Damage(set_column("recency", "late"), {"wrong_column"}),
    "a wrong number of entries": Damage(set_meta("entries", 23), {"wrong_count"}),
    "no number of entries": Damage(
        lambda path: sql(path, "DELETE FROM meta WHERE name = 'entries'"), {"damaged_meta", "wrong_count"}
    ),
    "no number of changes": Damage(set_meta("last_version", "x"), {"damaged_meta"}),
    "no key check": Damage(
        lambda path: sql(path, "DELETE FROM meta WHERE name = 'key_check'"), {"lost_key_check"}
    ),
    "a damaged key check": Damage(set_meta("key_check", b"gAAAAA"), {"damaged_key_check"}),
    "a header that says that it is of somebody else": Damage(
        lambda path: sql(path, "PRAGMA application_id = 7"), {"wrong_header"}
    ),
    "a header that says that it is of a newer format": Damage(
        lambda path: sql(path, "PRAGMA user_version = 1000"), {"wrong_header"}
    ),
    "another table": Damage(
        lambda path: sql(path, "ALTER TABLE set_aside ADD COLUMN more"), {"damaged_database"}
    ),
    "a missing index": Damage(lambda path: sql(path, "DROP INDEX entries_by_expiry"), {"damaged_database"}),
    "an index with something else in it": Damage(spoil_index, {"damaged_page"}),
    "a key with two rows": Damage(repeat_row, {"repeated_key", "disagreement"}),
    "no name of its own": Damage(
        lambda path: sql(path, "DELETE FROM meta WHERE name = 'id'"), {"damaged_meta"}
    ),
    "a smashed page of entries": Damage(smash_page_with(b"source-key-20"), {"damaged_page", "wrong_count"}),
    "a smashed page of other things": Damage(smash_page_with(b"last_version"), {"damaged_database"}),
    "a smashed header": Damage(smash(0, 100), {"damaged_database"}),
    "a file cut in half": Damage(
        lambda path: path.write_bytes(
            path.read_bytes()[: path.stat().st_size // 2 // PAGE_BYTES * PAGE_BYTES]
        ),
        {"damaged_database", "damaged_page", "wrong_count"},
    ),
}


def expect(cache: StoppedCache, damage: Damage, path: Path) -> None:
    """Do damage to a file, and see it found, repaired, and gone, at no more than the expected cost."""
    assert set(damage_and_repair(cache, damage, path)) == damage.lost


def damage_and_repair(cache: StoppedCache, damage: Damage, path: Path) -> set[str]:
    """Do damage to a file, and see it found, repaired, and gone; the keys that are lost."""
    before = cache.entries()
    damage.do(path)
    state = fingerprint(cache.directory)
    report = cache.check()
    assert fingerprint(cache.directory) == state
    assert not report.consistent
    assert set(kinds(report)) <= damage.found_as, told(report)
    assert all(fault.remedy for fault in report.faults)
    assert cache.repair()
    report = cache.check()
    assert report.faults == [], told(report)
    after = cache.entries()
    assert facts(after) == facts({key: before[key] for key in after})
    return set(before) - set(after)


@pytest.mark.parametrize("damage", ANY_DATABASE)
def test_damage_to_l3_is_found_and_what_l2_still_has_is_saved(cache: StoppedCache, damage: str) -> None:
    expect(cache.fill(), ANY_DATABASE[damage], cache.l3)


@pytest.mark.parametrize("l2_backend", [L2BackendType.SQLITE])
@pytest.mark.parametrize("damage", ANY_DATABASE)
def test_damage_to_an_l2_of_sqlite_is_found_and_costs_nothing(cache: StoppedCache, damage: str) -> None:
    expect(cache.fill(), ANY_DATABASE[damage], cache.l2_database)


# What it costs where the database is all there is: a row, unless it is said otherwise.
COSTS_NOTHING = {
    "a wrong scheme",
    "a recency that is no number",
    "a wrong number of entries",
    "no number of entries",
    "no number of changes",
    "no key check",
    "a damaged key check",
    "no name of its own",
    "a header that says that it is of somebody else",
    "a header that says that it is of a newer format",
    "another table",
    "a smashed header",
    "a missing index",
    "an index with something else in it",
    "a key with two rows",
    "a smashed page of other things",
}
COSTS_SEVERAL = {"a smashed page of entries", "a file cut in half"}


@pytest.mark.parametrize("l2_backend", [L2BackendType.SQLITE])
@pytest.mark.parametrize("off", ["l2_config", "l3_config"])
@pytest.mark.parametrize("damage", ANY_DATABASE)
def test_damage_to_the_only_database_is_found_and_costs_what_is_damaged(
    cache: StoppedCache, damage: str, off: str
) -> None:
    cache.settings = {off: SWITCHED_OFF}
    path = cache.l3 if off == "l2_config" else cache.l2_database
    lost = damage_and_repair(cache.fill(), ANY_DATABASE[damage], path)
    if damage not in COSTS_SEVERAL:
        assert lost == (set() if damage in COSTS_NOTHING else {VICTIM})


# -- JSONL


def spoil_meta(**fields: object) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        meta = path.with_name("meta.json")
        record = {**json.loads(meta.read_bytes()), **fields}
        del record["seq"], record["crc"]
        meta.write_bytes(finish_line(encode_body(record), 0))

    return change


def edit_sealed(**fields: object) -> Callable[[Path], object]:
    """Change what the line of an entry says, and let the seal of the store fit that."""

    def change(path: Path) -> None:
        edit_record(path, VICTIM, **fields)
        spoil_meta(size=path.stat().st_size)(path)

    return change


ANY_FILE: dict[str, Damage] = {
    "a flipped bit": Damage(
        lambda path: flip_byte(path, path.read_bytes().index(b"source-")), {"damaged_line"}
    ),
    "a line cut in the middle": Damage(
        lambda path: edit_line(path, VICTIM, lambda line: line[:40] + line[60:]), {"damaged_line"}
    ),
    "a line that says nothing": Damage(edit_sealed(proxy_url=7), {"disagreement"}),
    "a status that there is not": Damage(
        lambda path: edit_record(path, VICTIM, health_status="splendid"), {"damaged_line"}
    ),
    "labels that are no labels": Damage(lambda path: edit_record(path, VICTIM, labels=3), {"damaged_line"}),
    "a credential under another key": Damage(
        lambda path: edit_record(path, VICTIM, sealed=foreign_token()), {"unreadable_credential"}
    ),
    "another source": Damage(edit_sealed(source="x"), {"disagreement"}),
    "another password": Damage(edit_sealed(sealed=None), {"disagreement"}),
    "another version": Damage(edit_sealed(version=7), {"disagreement"}),
    "a damaged first line": Damage(lambda path: flip_byte(path, 3), {"damaged_line"}),
    "a missing file": Damage(Path.unlink, {"lost_file"}),
    "a missing meta file": Damage(lambda path: path.with_name("meta.json").unlink(), {"lost_meta"}),
    "a damaged meta file": Damage(
        lambda path: path.with_name("meta.json").write_bytes(b"{"), {"damaged_meta"}
    ),
    "a damaged key check": Damage(spoil_meta(key_check="gAAAAA"), {"damaged_key_check"}),
    "an entry that L3 does not have": Damage(
        lambda path: sql(
            path.parent.parent / "l3" / "proxystash.db", "DELETE FROM entries WHERE key = ?", VICTIM
        ),
        {"disagreement", "wrong_count"},
        frozenset({VICTIM}),
    ),
}


@pytest.mark.parametrize("l2_backend", [L2BackendType.JSONL])
@pytest.mark.parametrize("damage", ANY_FILE)
def test_damage_to_an_l2_of_jsonl_is_found_and_costs_nothing(cache: StoppedCache, damage: str) -> None:
    expect(cache.fill(), ANY_FILE[damage], cache.l2_file)


ALONE = {name: damage for name, damage in ANY_FILE.items() if "disagreement" not in damage.found_as}
COSTS_A_LINE = {
    "a flipped bit",
    "a line cut in the middle",
    "a status that there is not",
    "labels that are no labels",
    "a credential under another key",
}


@pytest.mark.parametrize("l2_backend", [L2BackendType.JSONL])
@pytest.mark.parametrize("damage", ALONE)
def test_damage_to_an_l2_of_jsonl_that_decides_is_found_and_costs_what_is_damaged(
    cache: StoppedCache, damage: str
) -> None:
    cache.settings = {"l3_config": SWITCHED_OFF}
    path = cache.l2_file
    lost = damage_and_repair(cache.fill(), ALONE[damage], path)
    if damage == "a missing file":
        assert lost == {*KEYS}
    else:
        assert len(lost) == (damage in COSTS_A_LINE)


@pytest.mark.parametrize("l2_backend", [L2BackendType.JSONL])
def test_a_last_line_torn_anywhere_is_a_note(cache: StoppedCache) -> None:
    cache.fill()
    path = cache.l2_file
    data = path.read_bytes()
    start = data.rindex(b"\n", 0, -1) + 1
    for end in (*range(start + 1, len(data), 7), len(data) - 1):
        path.write_bytes(data[:end])
        report = cache.check()
        assert report.consistent, told(report)
        assert note_kinds(report) == {"torn_line", "unsealed_cache"}
    path.write_bytes(data[:start])
    assert note_kinds(cache.check()) == {"unsealed_cache"}


@pytest.mark.parametrize("l2_backend", [L2BackendType.JSONL])
def test_whichever_byte_is_flipped_is_found(cache: StoppedCache) -> None:
    cache.fill()
    path = cache.l2_file
    data = path.read_bytes()
    for place in range(0, len(data), 11):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x04]) + data[place + 1 :])
        assert not cache.check().consistent


@pytest.mark.parametrize("l2_backend", [L2BackendType.JSONL])
def test_a_damaged_line_that_was_set_aside_already_is_a_note(cache: StoppedCache) -> None:
    cache.fill()
    path = cache.l2_file
    with cache.running() as manager:
        position = path.read_bytes().index(b"source-")
        with path.open("r+b") as file:
            file.seek(position)
            file.write(b"XXXX")
        damaged = next(line for line in path.read_bytes().splitlines() if b"XXXX" in line)
        key = json.loads(damaged)["key"]
        assert manager.l2_tier.get(key) is None
    report = cache.check()
    assert report.consistent, told(report)
    assert note_kinds(report) >= {"known_damage", "set_aside"}


# -- too much


@pytest.mark.parametrize("tier", ["l2_config", "l3_config"])
def test_a_tier_with_more_entries_than_it_may_hold_is_a_fault(cache: StoppedCache, tier: str) -> None:
    cache.fill()
    cache.settings = {tier: CacheTierConfig(max_entries=20)}
    report = cache.check()
    assert kinds(report) == {"too_many_entries": 1}, told(report)
    cache.repair()
    report = cache.check()
    assert report.faults == []
    if tier == "l3_config":
        assert report.tiers[1].entries == 20
    else:
        assert report.tiers[0].entries <= 20
        assert len(cache.entries()) == len(KEYS)


# -- what no repair helps against


HOPELESS: dict[str, Damage] = {
    "a database of somebody else": Damage(
        lambda path: [
            sql(path, "PRAGMA application_id = 7"),
            sql(path, "DROP TABLE set_aside"),
        ],
        {"unknown_format"},
    ),
    "a newer format": Damage(
        lambda path: [
            sql(path, "ALTER TABLE entries ADD COLUMN later"),
            sql(path, "PRAGMA user_version = 1000"),
        ],
        {"unknown_format"},
    ),
}


@pytest.mark.parametrize("damage", HOPELESS)
def test_what_is_not_ours_is_told_and_left_alone(cache: StoppedCache, damage: str) -> None:
    cache.fill()
    HOPELESS[damage].do(cache.l3)
    before = fingerprint(cache.directory)
    assert set(kinds(cache.check())) == HOPELESS[damage].found_as
    with pytest.raises(StoreError, match="nothing was changed"):
        cache.repair()
    assert fingerprint(cache.directory) == before


@pytest.mark.parametrize("l2_backend", [L2BackendType.JSONL])
@pytest.mark.parametrize(
    "change",
    [
        spoil_meta(version=1000),
        lambda path: path.write_bytes(
            finish_line(b'{"op":"header","format":"proxystash-other","version":1', 0) + path.read_bytes()
        ),
    ],
)
def test_files_of_a_newer_release_are_told_and_left_alone(
    cache: StoppedCache, change: Callable[[Path], object]
) -> None:
    cache.fill()
    change(cache.l2_file)
    before = fingerprint(cache.directory)
    assert set(kinds(cache.check())) == {"unknown_format"}
    with pytest.raises(StoreError, match="nothing was changed"):
        cache.repair()
    assert fingerprint(cache.directory) == before


def test_a_million_faults_of_one_kind_are_counted_and_not_all_listed(
    cache: StoppedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxystash_server.cache.stopped.report.LISTED_PER_KIND", 5)
    cache.fill()
    sql(cache.l3, "UPDATE entries SET source = 'x'")
    report = cache.check()
    assert len(report.faults) == 5
    assert report.counts["damaged_row"] == len(KEYS)
    assert report.omitted() == {"damaged_row": len(KEYS) - 5}


def test_a_repair_of_a_consistent_store_changes_nothing(cache: StoppedCache) -> None:
    cache.fill()
    before = fingerprint(cache.directory)
    assert cache.repair() == {}
    assert fingerprint(cache.directory) == before


def test_what_is_set_aside_is_kept_for_the_operator(cache: StoppedCache) -> None:
    cache.fill()
    set_column("source", "elsewhere")(cache.l3)
    cache.repair()
    [(key, record)] = sql(cache.l3, "SELECT key, record FROM set_aside")
    assert VICTIM in key
    assert json.loads(record)["source"] == "elsewhere"
    assert len(cache.entries()) == len(KEYS)
    if cache.l2_backend is L2BackendType.JSONL:
        flip_byte(cache.l2_file, cache.l2_file.read_bytes().index(b"source-"))
    else:
        set_column("source", "elsewhere")(cache.l2_database)
        set_content("source", "elsewhere", KEYS[1])(cache.l2_database)
    cache.repair()
    assert cache.check().faults == []
    if cache.l2_backend is L2BackendType.JSONL:
        assert "rource-" in (cache.l2 / "set-aside.jsonl").read_text()
    else:
        [(key,)] = sql(cache.l2_database, "SELECT key FROM set_aside")
        assert VICTIM in key
