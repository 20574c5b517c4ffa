"""A database of an earlier format, and what the index by key is for."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sqlite3
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from proxystash_server.cache import (
    CacheTierConfig,
    CacheTierType,
    EntryFilter,
    SQLiteCacheTier,
)
from proxystash_server.cache.errors import TierError, TierLostError
from proxystash_server.cache.tiers.sqlite import database as sqlite_database
from proxystash_server.cache.tiers.sqlite import format as sqlite_format
from proxystash_server.cache.tiers.sqlite.record import CONTENT_LENGTH, checksum, write_row
from tests.server.cache.format_1 import (
    COLUMNS_OF_FORMAT_3,
    FORMAT_1,
    FORMAT_2,
    FORMAT_3,
    row_of_format_3,
)
from tests.server.cache.invariants import check_tier
from tests.server.cache.store_contract import ENCRYPTOR
from tests.server.cache.support import PASSWORD, START_US, USERNAME, bounded, keys_of, page, stored
from tests.server.cache.tier_contract import ANY, UNBOUNDED, put

# Not in the order of their keys, and with a gap in their ids.
ENTRIES = {
    f"key-{number * 7 % 40:02}": stored(
        f"key-{number * 7 % 40:02}",
        source=f"source-{number * 7 % 40}",
        version=100 + number,
        labels={"text": "x" * 250},
        username=USERNAME,
        password=PASSWORD,
        access_count=number,
    )
    for number in range(40)
}

OpenTier = Callable[..., SQLiteCacheTier]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def corruptions() -> list[str]:
    return []


@pytest.fixture
def open_tier(path: Path, corruptions: list[str]) -> Iterator[OpenTier]:
    """Opens a tier on the path, after closing the one that was open before."""
    opened: list[SQLiteCacheTier] = []

    def open_tier(config: CacheTierConfig = UNBOUNDED, at: Path = path) -> SQLiteCacheTier:
        while opened:
            opened.pop().close()
        tier = SQLiteCacheTier(
            config,
            CacheTierType.L3,
            at,
            ENCRYPTOR,
            clock=lambda: START_US,
            on_corruption=lambda _tier, _key, reason: corruptions.append(reason),
        )
        opened.append(tier)
        tier.open()
        return tier

    yield open_tier
    while opened:
        opened.pop().close()


def write_format_1(path: Path, schema: str = FORMAT_1) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA page_size = 4096")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(schema)
        connection.execute("BEGIN")
        columns = f"id, {COLUMNS_OF_FORMAT_3}, scheme, recency"
        marks = ", ".join("?" * len(columns.split(",")))
        connection.executemany(
            f"INSERT INTO entries ({columns}) VALUES ({marks})",
            [
                (2 * number + 1, *row_of_format_3(write_row(entry, ENCRYPTOR, 1000 - number)))
                for number, entry in enumerate(ENTRIES.values())
            ],
        )
        connection.executemany(
            "INSERT INTO meta VALUES (?, ?)",
            [
                ("store_id", "the store"),
                ("partner_id", "the partner"),
                ("session", "the session"),
                ("entries", 40),
                ("last_version", 5000),
                ("key_check", ENCRYPTOR.make_check()),
            ],
        )
        if schema is FORMAT_3:
            connection.execute("UPDATE meta SET name = replace(name, 'store_id', 'id')")
            connection.execute("UPDATE meta SET name = replace(name, 'partner_id', 'partner')")
            connection.execute("DELETE FROM meta WHERE name = 'session'")
            connection.execute("INSERT INTO meta VALUES ('inherited', '{\"gone\":4999}')")
        else:
            connection.execute("INSERT INTO backlog VALUES ('gone', 4999)")
        if schema is FORMAT_2:
            connection.execute("INSERT INTO meta VALUES ('announced', '{\"on its way\":5000}')")
        connection.execute("INSERT INTO set_aside VALUES (3, 17, 'a reason', 'a key', 'a record')")
        connection.execute("COMMIT")


def query(path: Path, statement: str, *values: object) -> list[Any]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(statement, values).fetchall()


def check_upgraded(tier: SQLiteCacheTier) -> None:
    """Everything that `write_format_1` wrote is there, and in the format of today."""
    path = tier._database.path
    assert {entry.key: entry for entry in page(tier, "", 100, ANY, START_US)} == ENTRIES
    assert (tier.notes["id"], tier.notes["partner"]) == ("the store", "the partner")
    assert json.loads(str(tier.notes["inherited"])).items() >= {"gone": 4999}.items()
    assert (tier.last_version, tier.size()) == (5000, 40)
    assert not query(path, "SELECT name FROM sqlite_schema WHERE name = 'backlog'")
    assert query(path, "SELECT * FROM set_aside") == [(3, 17, "a reason", "a key", "a record")]
    assert query(path, "PRAGMA user_version") == [(sqlite_format.FORMAT_VERSION,)]
    assert query(path, "PRAGMA integrity_check") == [("ok",)]
    check_tier(tier)


def schema_of(path: Path) -> set[tuple[str, str]]:
    return set(query(path, "SELECT name, sql FROM sqlite_schema"))


def test_a_store_of_format_1_is_upgraded_with_all_that_it_has(
    path: Path, open_tier: OpenTier, tmp_path: Path, corruptions: list[str]
) -> None:
    write_format_1(path)
    check_upgraded(open_tier())
    check_upgraded(open_tier())
    open_tier(at=tmp_path / "new.db")
    assert schema_of(path) == schema_of(tmp_path / "new.db")
    assert corruptions == []


def test_the_log_says_that_a_store_is_upgraded_and_of_how_many_entries(
    path: Path, open_tier: OpenTier, caplog: pytest.LogCaptureFixture
) -> None:
    write_format_1(path)
    with caplog.at_level(logging.INFO):
        open_tier()
        open_tier()
    assert [(record.getMessage(), vars(record)["entries"]) for record in caplog.records] == [
        ("upgrading a database", 40),
        ("database upgraded", 40),
    ]
    assert vars(caplog.records[0])["path"] == str(path)


@pytest.mark.parametrize(
    ("policy", "next_to_go"),
    [
        ("fifo", {*list(ENTRIES)[:3]}),
        ("lfu", {*list(ENTRIES)[:3]}),
        # The recency of the entries of format 1 counts down.
        ("lru", {*list(ENTRIES)[-3:]}),
    ],
)
def test_the_order_of_eviction_survives_an_upgrade(
    path: Path, open_tier: OpenTier, policy: str, next_to_go: set[str]
) -> None:
    write_format_1(path)
    open_tier(bounded(40, policy))
    assert set(open_tier(bounded(37, policy)).trim()) == next_to_go


def test_a_store_of_format_2_is_upgraded_with_all_that_it_has(path: Path, open_tier: OpenTier) -> None:
    write_format_1(path, FORMAT_2)
    check_upgraded(open_tier())
    tier = open_tier()
    check_upgraded(tier)
    # What the commit of a change announced to the other tier counts as missed by it.
    assert json.loads(str(tier.notes["inherited"])) == {"gone": 4999, "on its way": 5000}


def test_a_store_of_format_3_is_upgraded_without_a_row_being_written(
    path: Path, open_tier: OpenTier, tmp_path: Path, corruptions: list[str]
) -> None:
    """And what is new can be stored in it."""
    write_format_1(path, FORMAT_3)
    rows = "SELECT * FROM entries"
    before = query(path, rows)
    check_upgraded(open_tier())
    assert query(path, rows) == [(*row, 0) for row in before]
    open_tier(at=tmp_path / "new.db")
    assert schema_of(path) == schema_of(tmp_path / "new.db")
    tier = open_tier()
    put(tier, stored("key-07", version=6000, max_leases=5))
    found = tier.get("key-07")
    assert found is not None
    assert found.max_leases == 5
    assert corruptions == []


def test_an_upgrade_of_format_3_that_fails_leaves_the_store_as_it_was(
    path: Path, open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_format_1(path, FORMAT_3)
    before = schema_of(path)
    steps = sqlite_format._FROM_FORMAT_3
    for failing in (("SELECT no_such_function()", *steps), (*steps, "SELECT no_such_function()")):
        with monkeypatch.context() as patch:
            patch.setattr(sqlite_format, "_FROM_FORMAT_3", failing)
            with pytest.raises(TierError):
                open_tier()
        assert schema_of(path) == before
        assert query(path, "PRAGMA user_version") == [(3,)]
    killed_after("_FROM_FORMAT_3", ("PRAGMA cache_size = 2", *steps, "SELECT die()"), open_tier, monkeypatch)
    check_upgraded(open_tier())


@pytest.mark.parametrize("place", range(len(sqlite_format._FROM_FORMAT_2) + 1))
@pytest.mark.parametrize("schema", [FORMAT_1, FORMAT_2], ids=["format 1", "format 2"])
def test_an_upgrade_that_fails_in_its_last_part_leaves_the_store_as_it_was(
    path: Path, open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch, schema: str, place: int
) -> None:
    write_format_1(path, schema)
    before = schema_of(path)
    steps = sqlite_format._FROM_FORMAT_2
    with monkeypatch.context() as patch:
        patch.setattr(
            sqlite_format, "_FROM_FORMAT_2", (*steps[:place], "SELECT no_such_function()", *steps[place:])
        )
        with pytest.raises(TierError):
            open_tier()
    assert schema_of(path) == before
    check_upgraded(open_tier())


def test_damaged_marks_of_format_2_do_no_harm(path: Path, open_tier: OpenTier) -> None:
    write_format_1(path, FORMAT_2)
    query(path, "UPDATE meta SET value = '{\"cut o' WHERE name = 'announced'")
    query(path, "INSERT INTO backlog VALUES ('damaged', 'text')")
    check_upgraded(open_tier())


STATEMENTS = range(len(sqlite_format._FROM_FORMAT_1) + 1)


def interrupted_by(statement: str, place: int) -> tuple[str, ...]:
    steps = sqlite_format._FROM_FORMAT_1
    return (*steps[:place], statement, *steps[place:])


@pytest.mark.parametrize("place", STATEMENTS)
def test_an_upgrade_that_fails_leaves_the_store_as_it_was(
    path: Path, open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    write_format_1(path)
    before = schema_of(path)
    with monkeypatch.context() as patch:
        patch.setattr(sqlite_format, "_FROM_FORMAT_1", interrupted_by("SELECT no_such_function()", place))
        with pytest.raises(TierError):
            open_tier()
    assert schema_of(path) == before
    assert query(path, "PRAGMA user_version") == [(1,)]
    check_upgraded(open_tier())


def test_a_full_disk_fails_the_upgrade_and_no_more(
    path: Path, open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_format_1(path)
    with monkeypatch.context() as patch:
        patch.setattr(sqlite_format, "_FROM_FORMAT_1", interrupted_by("PRAGMA max_page_count = 1", 2))
        with pytest.raises(TierError, match="full") as failure:
            open_tier()
    assert not isinstance(failure.value, TierLostError)
    check_upgraded(open_tier())


def test_a_store_of_format_1_that_another_process_has_locked_is_upgraded_later(
    path: Path, open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxystash_server.cache.tiers.sqlite.database._BUSY_TIMEOUT_SECONDS", 0.01)
    write_format_1(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(TierError, match="locked"):
            open_tier()
    check_upgraded(open_tier())


@pytest.mark.parametrize("place", STATEMENTS)
def test_an_upgrade_that_is_killed_is_done_by_the_next_start(
    path: Path, open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    """Each statement has written what it changed when the kill comes: next to nothing is kept in memory."""
    write_format_1(path)
    spilling = ("PRAGMA cache_size = 2", *interrupted_by("SELECT die()", place + 1))
    killed_after("_FROM_FORMAT_1", spilling, open_tier, monkeypatch)
    check_upgraded(open_tier())


def killed_after(
    name: str, steps: Sequence[str], open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Have a process open the tier with other steps of the upgrade, one of which is its death."""
    child = os.fork()
    if not child:
        with suppress(BaseException):
            connect = sqlite3.connect

            def connect_to_be_killed(*arguments: Any, **options: Any) -> sqlite3.Connection:
                connection: sqlite3.Connection = connect(*arguments, **options)
                connection.create_function("die", 0, lambda: os.kill(os.getpid(), signal.SIGKILL))
                return connection

            monkeypatch.setattr(sqlite_format, name, steps)
            monkeypatch.setattr(sqlite3, "connect", connect_to_be_killed)
            open_tier()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.parametrize("place", range(len(sqlite_format._FROM_FORMAT_2)))
@pytest.mark.parametrize("schema", [FORMAT_1, FORMAT_2], ids=["format 1", "format 2"])
def test_an_upgrade_that_is_killed_in_its_last_part_is_done_by_the_next_start(
    path: Path, open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch, schema: str, place: int
) -> None:
    write_format_1(path, schema)
    steps = sqlite_format._FROM_FORMAT_2
    killed_after(
        "_FROM_FORMAT_2",
        ("PRAGMA cache_size = 2", *steps[: place + 1], "SELECT die()"),
        open_tier,
        monkeypatch,
    )
    check_upgraded(open_tier())


def test_a_kill_right_after_the_upgrade_costs_nothing(
    path: Path, open_tier: OpenTier, tmp_path: Path
) -> None:
    write_format_1(path)
    tier = open_tier()
    left = tmp_path / "left" / path.name
    left.parent.mkdir()
    # The log has not been copied into the file.
    for file in (path, path.with_name(path.name + "-wal")):
        shutil.copyfile(file, left.with_name(file.name))
    tier.close()
    check_upgraded(open_tier(at=left))


def test_a_damaged_row_of_format_1_costs_that_row(
    path: Path, open_tier: OpenTier, corruptions: list[str]
) -> None:
    write_format_1(path)
    query(path, "UPDATE entries SET source = 'x' WHERE key = 'key-07'")
    query(path, "UPDATE entries SET key = CAST(x'ff41' AS TEXT) WHERE key = 'key-09'")
    tier = open_tier()
    assert set(keys_of(page(tier, "", 100, ANY, START_US))) == set(ENTRIES) - {"key-07", "key-09"}
    assert tier.get("key-07") is None
    assert len(corruptions) == 2
    assert tier.size() == 38


def test_a_damaged_page_of_format_1_costs_the_rows_on_it(
    path: Path, open_tier: OpenTier, corruptions: list[str]
) -> None:
    write_format_1(path)
    data = path.read_bytes()
    start = data.index(b"source-21") // 4096 * 4096
    smashed = data[start : start + 4096]
    on_page = {f"key-{number:02}" for number in range(40) if b"source-%d" % number in smashed}
    path.write_bytes(data[:start] + bytes(4096) + data[start + 4096 :])
    tier = open_tier()
    assert set(keys_of(page(tier, "", 100, ANY, START_US))) >= set(ENTRIES) - on_page
    assert tier.get("key-21") is None
    assert len(corruptions) == 1
    assert any("damaged" in file.name for file in path.parent.iterdir())


def test_what_is_saved_of_a_damaged_file_of_format_2_is_what_an_upgrade_would_have_kept(
    path: Path, open_tier: OpenTier, corruptions: list[str]
) -> None:
    write_format_1(path, FORMAT_2)
    data = bytearray(path.read_bytes())
    for (root,) in query(
        path, "SELECT rootpage FROM sqlite_schema WHERE tbl_name = 'entries' AND type = 'index'"
    ):
        data[(root - 1) * 4096 : root * 4096] = bytes(4096)
    path.write_bytes(data)
    tier = open_tier()
    assert len(corruptions) == 1
    assert {entry.key: entry for entry in page(tier, "", 100, ANY, START_US)} == ENTRIES
    assert (tier.notes["id"], tier.notes["partner"]) == ("the store", "the partner")
    assert json.loads(str(tier.notes["inherited"])) == {"gone": 4999, "on its way": 5000}
    assert tier.notes["incomplete"]
    # Of what was saved, so that no later change gets an earlier number.
    assert tier.last_version == 139
    check_tier(tier)


# -- the index by key


@pytest.mark.parametrize("when", ["at once", "afterwards"])
@pytest.mark.parametrize("part", ["the index", "the row"])
def test_an_index_and_a_row_that_disagree_cost_that_row_at_most(
    path: Path,
    open_tier: OpenTier,
    corruptions: list[str],
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    when: str,
) -> None:
    put(open_tier(), *ENTRIES.values())
    open_tier().close()
    [(page_bytes,)] = query(path, "PRAGMA page_size")
    data = bytearray(path.read_bytes())
    in_index = data.index(b"key-21source-21") + len("key-21")
    in_row = data.index(b"source-21", data.index(b"key-21http"))
    assert in_index // page_bytes != in_row // page_bytes
    data[in_index if part == "the index" else in_row] ^= 1
    path.write_bytes(data)
    if when == "at once":
        tier = open_tier()
    else:
        monkeypatch.setattr(sqlite_database, "_CHECKED_AT_ONCE_BYTES", 0)
        tier = open_tier()
        assert corruptions == []
        with pytest.raises(TierLostError):
            tier.maintain()
        # As it is done with any tier that is lost.
        tier.open()
    found = {entry.key: entry for entry in page(tier, "", 100, ANY, START_US)}
    assert found == {key: entry for key, entry in ENTRIES.items() if key in found}
    assert set(ENTRIES) - set(found) == (set() if part == "the index" else {"key-21"})
    check_tier(tier)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="/proc/self/io counts the reads")
def test_a_filtered_scan_does_not_read_the_rows_that_it_skips(open_tier: OpenTier) -> None:
    labels = {f"text-{part}": "x" * 250 for part in range(4)}
    put(
        open_tier(),
        *(stored(f"key-{number:04}", source=str(number), labels=labels) for number in range(1000)),
    )

    def reads_of(entry_filter: EntryFilter) -> int:
        tier = open_tier()
        tier.size()
        before = _reads()
        assert keys_of(tier.scan("", 2000, entry_filter, START_US)[0]) in (["key-0500"], [])
        return _reads() - before

    # Two of them would fill a page; so many would be read one by one.
    assert reads_of(EntryFilter(source="500")) < 100
    assert reads_of(EntryFilter(schemes=frozenset({"socks4"}))) < 100
    # The labels are in the rows alone: this shows that reads are counted.
    assert reads_of(EntryFilter(labels={"other": "y"})) > 400


def _reads() -> int:
    facts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(facts["syscr"])


# -- what says which format it is, and whether a row is sound


def test_a_checksum_does_not_depend_on_what_a_release_of_python_can_print(
    path: Path, open_tier: OpenTier, corruptions: list[str]
) -> None:
    entry = stored("key", source="Zürich \N{PILE OF POO} \ue000", labels={"ф": "\u200b"})
    content = write_row(entry, ENCRYPTOR, 1)[:CONTENT_LENGTH]
    # Computed once: another Python must come to the same.
    assert checksum(("key", "Zürich \N{PILE OF POO} \ue000", 5, None)) == 3329893781
    put(open_tier(), entry)
    # As earlier releases wrote it.
    before = zlib.crc32(repr(content[:-1]).encode("utf-8", "surrogatepass"))
    assert before != checksum(content)
    query(path, "UPDATE entries SET checksum = ?", before)
    assert open_tier().get("key") == entry
    assert corruptions == []


@pytest.mark.parametrize("version", [-1, 0, 1, 2, 3, 4, 5, 2**30])
@pytest.mark.parametrize("of_format_3", [False, True], ids=["today's", "format 3"])
def test_a_number_in_the_header_does_not_make_a_file_another_than_its_tables_say(
    path: Path, open_tier: OpenTier, corruptions: list[str], version: int, of_format_3: bool
) -> None:
    if of_format_3:
        write_format_1(path, FORMAT_3)
    else:
        put(open_tier(), *ENTRIES.values())
        open_tier().close()
    query(path, f"PRAGMA user_version = {version}")
    tier = open_tier()
    assert {entry.key: entry for entry in page(tier, "", 100, ANY, START_US)} == ENTRIES
    assert corruptions == []
    assert query(path, "PRAGMA user_version") == [(sqlite_format.FORMAT_VERSION,)]


def test_an_upgrade_takes_the_steps_from_the_format_of_the_file_alone(
    path: Path, open_tier: OpenTier
) -> None:
    """None for a file of today's, as it will be for one of today's on the way to a later format."""
    put(open_tier(), *ENTRIES.values())
    open_tier().close()
    ran: list[str] = []
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.set_trace_callback(ran.append)
        sqlite_format.upgrade(path, connection, sqlite_format.FORMAT_VERSION)
    assert not [statement for statement in ran if "backlog" in statement]
