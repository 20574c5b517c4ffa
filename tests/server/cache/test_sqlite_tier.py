"""The SQLite backend, as L3 and as L2."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from proxystash_server.cache import (
    AuthorityTier,
    CacheTierConfig,
    CacheTierType,
    CredentialEncryptor,
    Durability,
    EntryFilter,
    HealthStatus,
    SQLiteCacheTier,
    StoreFormatError,
)
from proxystash_server.cache.coherence.uses import Use
from proxystash_server.cache.errors import TierError
from proxystash_server.cache.tiers.base import Held, Read, Write
from proxystash_server.cache.tiers.sqlite import database as sqlite_database
from proxystash_server.cache.tiers.sqlite import tier as sqlite
from tests.server.cache.authority_tier_contract import AuthorityTierContract
from tests.server.cache.invariants import check_tier
from tests.server.cache.store_contract import ENCRYPTOR, MakeDiskTier
from tests.server.cache.support import HOUR, START_US, FakeClock, bounded, keys_of, page, stored
from tests.server.cache.tier_contract import ANY, UNBOUNDED, everything_set, put

FILE = "store.db"


class SQLiteContract(AuthorityTierContract):
    tier_type: CacheTierType

    def build(
        self, directory: Path, config: CacheTierConfig, encryptor: CredentialEncryptor, **options: Any
    ) -> AuthorityTier:
        return SQLiteCacheTier(config, self.tier_type, directory / FILE, encryptor, **options)

    def pretend_newer_format(self, directory: Path) -> None:
        execute(directory, "PRAGMA user_version = 1000")
        execute(directory, "ALTER TABLE entries ADD COLUMN later")

    def damage(self, directory: Path, key: str) -> None:
        execute(directory, "UPDATE entries SET source = 's0und' WHERE key = ?", key)


class TestSQLiteAsL3(SQLiteContract):
    tier_type = CacheTierType.L3


class TestSQLiteAsL2(SQLiteContract):
    tier_type = CacheTierType.L2


def execute(directory: Path, statement: str, *values: object) -> list[Any]:
    """Do something to the file that the tier would not do."""
    with closing(sqlite3.connect(directory / FILE)) as connection, connection:
        return connection.execute(statement, values).fetchall()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def corruptions() -> list[str]:
    return []


@pytest.fixture
def make(directory: Path, clock: FakeClock, corruptions: list[str]) -> Iterator[MakeDiskTier]:
    """Opens a tier on the directory, after closing the one that was open before."""
    opened: list[SQLiteCacheTier] = []

    def make(config: CacheTierConfig = UNBOUNDED, **options: Any) -> SQLiteCacheTier:
        for tier in opened:
            tier.close()
        tier = SQLiteCacheTier(
            config,
            CacheTierType.L3,
            directory / FILE,
            ENCRYPTOR,
            clock=clock,
            on_corruption=lambda _tier, _key, reason: corruptions.append(reason),
            **options,
        )
        tier.open()
        opened.append(tier)
        return tier

    yield make
    for tier in opened:
        tier.close()


# -- damage


DAMAGE: dict[str, object] = {
    "proxy_url": "http://203.0.113.66:1",
    "sealed": "gAAAAA-not-a-token",
    "source": "elsewhere",
    "fetch_time": 1,
    "expires_at": 2**62,
    "health_status": "splendid",
    "failure_count": "many",
    "health_monitoring": "{",
    "labels": '["no", "object"]',
    "version": 99,
    "checksum": 0,
}


@pytest.mark.parametrize("column", DAMAGE)
def test_a_damaged_row_is_set_aside_counted_and_never_served(
    make: MakeDiskTier, directory: Path, corruptions: list[str], column: str
) -> None:
    put(make(), everything_set(), stored("sound"))
    make().close()
    execute(directory, f"UPDATE entries SET {column} = ? WHERE key = 'full'", DAMAGE[column])
    tier = make()
    assert tier.get("full") is None
    assert len(corruptions) == 1
    assert tier.keys() == ["sound"]
    assert tier.size() == 1
    assert tier.get("sound") == stored("sound")
    [(key, record)] = execute(directory, "SELECT key, record FROM set_aside")
    assert "full" in key
    assert "full" in record
    # It costs what it cost once, also after a restart.
    assert make().size() == 1
    assert len(corruptions) == 1


@pytest.mark.parametrize("column", ["access_count", "last_accessed", "evicted_from_l1"])
@pytest.mark.parametrize("value", ["many", -5, 2.5, b"\x00"])
def test_damaged_access_facts_cost_no_more_than_their_entry(
    make: MakeDiskTier, directory: Path, column: str, value: object
) -> None:
    put(make(), everything_set(), stored("sound"))
    make().close()
    execute(directory, f"UPDATE entries SET {column} = ? WHERE key = 'full'", value)
    tier = make()
    entry = tier.get("full")
    if entry is not None:
        assert isinstance(entry.access_count, int)
        assert entry.access_count >= 0
        assert entry.last_accessed.year >= 1970
        assert isinstance(entry.evicted_from_l1, bool)
    assert tier.get("sound") == stored("sound")


def test_a_damaged_row_is_left_out_of_a_page_that_is_full_without_it(
    make: MakeDiskTier, directory: Path, corruptions: list[str]
) -> None:
    put(make(), *(stored(f"key-{number}") for number in range(6)))
    make().close()
    execute(directory, "UPDATE entries SET source = 'x' WHERE key IN ('key-1', 'key-2')")
    tier = make()
    assert keys_of(page(tier, "", 3, ANY, START_US)) == ["key-0", "key-3", "key-4"]
    assert len(corruptions) == 2
    check_tier(tier)


def test_a_damaged_row_that_was_replaced_meanwhile_is_forgotten(
    make: MakeDiskTier, directory: Path, corruptions: list[str]
) -> None:
    put(make(), stored("key-1", version=1))
    make().close()
    execute(directory, "UPDATE entries SET source = 'x'")
    tier = make()
    put(tier, stored("key-1", version=2))
    assert tier.get("key-1") == stored("key-1")
    assert corruptions == []


@pytest.mark.parametrize("smashed", [16, 100, 2048])
def test_a_file_with_a_smashed_first_page_is_set_aside_whole_and_costs_nothing(
    make: MakeDiskTier, directory: Path, corruptions: list[str], smashed: int
) -> None:
    tier = make()
    put(tier, *(stored(f"key-{number}") for number in range(50)))
    name = tier.notes["id"]
    tier.close()
    damaged = b"\xaa" * smashed + (directory / FILE).read_bytes()[smashed:]
    (directory / FILE).write_bytes(damaged)
    tier = make()
    assert set(tier.keys()) == {f"key-{number}" for number in range(50)}
    assert tier.size() == 50
    assert tier.notes["id"] == name
    assert len(corruptions) == 1
    assert damaged in [path.read_bytes() for path in directory.iterdir() if path.name != FILE]
    put(tier, stored("new"))
    assert len(make().keys()) == 51


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
def test_a_file_that_was_cut_off_is_no_obstacle(
    make: MakeDiskTier, directory: Path, corruptions: list[str], share: float
) -> None:
    put(make(), *(stored(f"key-{number}", source="x" * 100) for number in range(200)))
    make().close()
    file = directory / FILE
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    tier = make()
    assert corruptions
    for number in range(200):
        assert tier.get(f"key-{number}") in {None, stored(f"key-{number}", source="x" * 100)}
    put(tier, stored("new"))
    assert tier.get("new") == stored("new")
    check_tier(tier)


def test_what_is_saved_of_a_damaged_file_is_incomplete_and_not_sealed_and_keeps_its_names(
    make: Callable[..., SQLiteCacheTier], directory: Path, corruptions: list[str]
) -> None:
    tier = make()
    put(tier, *(stored(f"key-{number}", source=f"source-{number:03}", version=9) for number in range(200)))
    tier.note(cache_id="the cache", inherited='{"a": 1}', incomplete=None, alone=1)
    name = tier.notes["id"]
    tier.seal(9)
    tier.close()
    file = directory / FILE
    data = file.read_bytes()
    start = data.index(b"source-100", data.index(b"key-100http")) // 2048 * 2048
    file.write_bytes(data[:start] + bytes(2048) + data[start + 2048 :])
    tier = make()
    assert len(corruptions) == 1
    assert 150 < tier.size() < 200
    assert (tier.notes["id"], tier.notes["cache_id"]) == (name, "the cache")
    assert tier.notes["inherited"] == '{"a": 1}'
    assert tier.notes["incomplete"]
    assert tier.break_seal() is None
    # Of what was saved, so that no later change gets an earlier number.
    assert tier.last_version == 9
    check_tier(tier)


def test_a_schema_that_lacks_a_column_is_damage(
    make: Callable[..., SQLiteCacheTier], directory: Path, corruptions: list[str]
) -> None:
    put(make(), stored("key-1"))
    make().close()
    file = directory / FILE
    damaged = file.read_bytes().replace(b"last_accessed INTEGER", b"lost_accessed INTEGER")
    file.write_bytes(damaged)
    tier = make()
    assert len(corruptions) == 1
    put(tier, stored("new"))
    assert set(tier.keys()) == {"key-1", "new"}
    assert damaged in [path.read_bytes() for path in directory.iterdir() if path.name != FILE]


def test_files_that_are_damaged_one_after_another_are_all_kept(make: MakeDiskTier, directory: Path) -> None:
    for number in range(3):
        put(make(), stored(f"key-{number}"))
        make().close()
        (directory / FILE).write_bytes(b"damage number %d" % number + bytes(5000))
    make()
    kept = b"".join(path.read_bytes() for path in directory.iterdir())
    assert all(b"damage number %d" % number in kept for number in range(3))


def test_an_empty_file_is_a_new_store(make: MakeDiskTier, directory: Path, corruptions: list[str]) -> None:
    directory.mkdir()
    (directory / FILE).touch(mode=0o600)
    put(make(), stored("key-1"))
    assert make().keys() == ["key-1"]
    assert corruptions == []


def test_a_database_of_somebody_else_is_refused_and_left_alone(make: MakeDiskTier, directory: Path) -> None:
    directory.mkdir()
    execute(directory, "CREATE TABLE theirs (x)")
    before = (directory / FILE).read_bytes()
    with pytest.raises(StoreFormatError, match="move it away"):
        make()
    assert (directory / FILE).read_bytes() == before


# -- faults of the file system and of other processes


def test_a_directory_that_cannot_be_made_is_a_failure_that_passes(
    make: MakeDiskTier, directory: Path
) -> None:
    directory.write_text("a file where the directory should be")
    with pytest.raises(TierError):
        make()
    directory.unlink()
    put(make(), stored("key-1"))


def test_a_database_locked_by_another_process_fails_writes_but_not_reads(
    make: MakeDiskTier, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxystash_server.cache.tiers.sqlite.database._BUSY_TIMEOUT_SECONDS", 0.01)
    tier = make()
    put(tier, stored("key-1"))
    with closing(sqlite3.connect(directory / FILE, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(TierError):
            put(tier, stored("key-2"))
        assert tier.get("key-1") == stored("key-1")
    put(tier, stored("key-2"))
    assert tier.size() == 2
    check_tier(tier)


def test_a_failed_transaction_changes_neither_the_entries_nor_their_number(
    make: MakeDiskTier, directory: Path
) -> None:
    tier = make()
    put(tier, stored("key-1"))
    tier.close()
    execute(
        directory,
        "CREATE TRIGGER bad BEFORE INSERT ON entries WHEN new.key = 'bad' BEGIN SELECT RAISE(ABORT, ''); END",
    )
    tier = make()
    with pytest.raises(TierError):
        tier.apply([*map(_write, ("key-2", "key-3", "bad"))])
    assert tier.keys() == ["key-1"]
    assert tier.size() == 1
    put(tier, stored("key-4"))
    assert make().size() == 2


def _write(key: str) -> Write:
    return Write(key, stored(key))


# -- the statements


@contextmanager
def statements(tier: SQLiteCacheTier) -> Iterator[list[str]]:
    """What the tier asks SQLite to do meanwhile."""
    seen: list[str] = []
    database = tier._database
    with database.reader() as connection:
        connection.set_trace_callback(seen.append)
    assert database._writer is not None
    database._writer.set_trace_callback(seen.append)
    yield seen
    with database.reader() as connection:
        connection.set_trace_callback(None)
    database._writer.set_trace_callback(None)


def plan(tier: SQLiteCacheTier, statement: str) -> str:
    # A connection that was opened before an index was made would plan without it until it runs something.
    with closing(sqlite3.connect(tier._database.path)) as connection:
        rows = connection.execute(f"EXPLAIN QUERY PLAN {statement}").fetchall()
    return "; ".join(row[3] for row in rows)


OPERATIONS: dict[str, Callable[[SQLiteCacheTier], object]] = {
    "get": lambda tier: tier.get("key-3"),
    "get of an absent key": lambda tier: tier.get("nothing"),
    "contains": lambda tier: "key-3" in tier,
    "put of a new key": lambda tier: tier.put("new", stored("new")),
    "replacement": lambda tier: tier.put("key-3", stored("key-3", version=9)),
    "delete": lambda tier: tier.delete("key-3"),
    "note_uses": lambda tier: tier.note_uses([Use("key-3", 1, 1, START_US, False)]),
    "decision on one": lambda tier: tier.commit(["key-3"], lambda _held, _read: []),
    "decision on several": lambda tier: tier.commit(["key-1", "key-2"], lambda _held, _read: []),
    "versions": lambda tier: tier.versions(["key-1", "key-2"]),
    "size": lambda tier: tier.size(),
    "expired keys": lambda tier: tier.expired_keys(START_US),
    "page": lambda tier: page(tier, "key-3", 3, ANY, START_US),
    "scan": lambda tier: tier.scan("key-3", 3, ANY, START_US),
    "filtered page": lambda tier: page(
        tier,
        "key-3",
        3,
        EntryFilter("x", frozenset({HealthStatus.DEAD}), frozenset({"http"}), {"country": "DE"}),
        START_US,
    ),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo"])
def test_no_operation_scans_or_counts_or_sorts_the_entries(
    make: Callable[..., SQLiteCacheTier], operation: str, policy: str
) -> None:
    tier = make(bounded(10, policy))
    put(tier, *(stored(f"key-{number}") for number in range(10)))
    with statements(tier) as seen:
        OPERATIONS[operation](tier)
    for statement in seen:
        if statement.startswith(("SELECT", "UPDATE", "DELETE", "INSERT")):
            assert "count(" not in statement.lower()
            steps = plan(tier, statement)
            # FIFO's order is that of the table itself: its scan ends at the LIMIT.
            in_order = f"INDEX entries_by_{policy}" if policy != "fifo" else "LIST SUBQUERY 1; SCAN entries"
            assert "SCAN entries" not in steps or in_order in steps, (statement, steps)
            assert "TEMP B-TREE" not in steps, (statement, steps)


@pytest.fixture
def short_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scans that look at three rows."""
    monkeypatch.setattr(
        sqlite, "_LAST_OF_SCAN", "SELECT key FROM entries WHERE key > ? ORDER BY key LIMIT 1 OFFSET 2"
    )


@pytest.mark.usefixtures("short_scans")
def test_a_scan_ends_after_so_many_rows_and_says_where(make: MakeDiskTier) -> None:
    tier = make()
    put(tier, *(stored(f"key-{number}", source="rare" if number == 4 else "") for number in range(8)))
    rare = EntryFilter(source="rare")
    assert tier.scan("", 10, rare, START_US) == ([], "key-2")
    assert tier.scan("key-2", 10, rare, START_US) == ([stored("key-4", source="rare")], "key-5")
    assert tier.scan("key-5", 10, rare, START_US) == ([], None)
    assert keys_of(page(tier, "", 10, rare, START_US)) == ["key-4"]
    # Expired rows are looked at too.
    assert tier.scan("", 10, ANY, START_US + 10 * HOUR * 1_000_000) == ([], "key-2")


@pytest.mark.usefixtures("short_scans")
@pytest.mark.parametrize("damaged", [b"key-2", b"key-\xff"])
def test_a_scan_goes_on_behind_a_key_that_is_damaged(
    make: MakeDiskTier, directory: Path, damaged: bytes
) -> None:
    put(make(), *(stored(f"key-{number}") for number in range(8)))
    make().close()
    kind = "BLOB" if damaged == b"key-2" else "TEXT"
    execute(directory, f"UPDATE entries SET key = CAST(? AS {kind}) WHERE key = 'key-2'", damaged)
    tier = make()
    assert keys_of(page(tier, "", 100, ANY, START_US)) == [f"key-{n}" for n in range(8) if n != 2]
    assert tier.size() == 7


def test_a_reader_from_before_a_reopening_does_not_see_the_file_of_then(
    make: Callable[..., SQLiteCacheTier], directory: Path
) -> None:
    """A lookup under way while the tier is closed, and its file replaced."""
    tier = make()
    put(tier, stored("old"))
    reader = tier._database.lend()
    assert reader.connection.execute("SELECT key FROM entries").fetchall() == [("old",)]
    tier.close()
    (directory / FILE).rename(directory / "away.db")
    tier.open()
    put(tier, stored("new"))
    tier._database.take_back(reader)
    assert tier.keys() == ["new"]
    assert tier.get("old") is None


def test_the_size_of_a_large_store_is_not_counted_when_it_is_opened(
    make: Callable[..., SQLiteCacheTier], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_database, "_CHECKED_AT_ONCE_BYTES", 0)
    put(make(), *(stored(f"key-{number}") for number in range(10)))
    make().close()
    # A number that no count would give shows where the size comes from.
    execute(directory, "UPDATE meta SET value = 12 WHERE name = 'entries'")
    assert make().size() == 12


def test_many_writes_in_one_apply_are_one_transaction(make: Callable[..., SQLiteCacheTier]) -> None:
    tier = make()
    with statements(tier) as seen:
        tier.apply([_write(f"key-{number}") for number in range(50)])
    assert len([statement for statement in seen if statement.startswith("BEGIN")]) == 1
    assert len([statement for statement in seen if statement.startswith("COMMIT")]) == 1


def test_a_decision_and_what_it_makes_are_one_transaction(
    make: Callable[..., SQLiteCacheTier], directory: Path
) -> None:
    tier = make()
    put(tier, stored("damaged", source="sound"), *(stored(f"key-{number}") for number in range(10)))
    execute(directory, "UPDATE entries SET source = 's0und' WHERE key = 'damaged'")
    keys = ["damaged", *(f"key-{number}" for number in range(50))]

    def decide(held: Mapping[str, Held], read: Read) -> list[Write]:
        assert len(held) == 11
        assert [read(key) for key in keys[:2]] == [None, stored("key-0")]
        return [_write(key) for key in keys[2:]]

    with statements(tier) as seen:
        tier.commit(keys, decide)
    assert [one for one in seen if one.startswith(("BEGIN", "COMMIT", "ROLLBACK"))] == [
        "BEGIN IMMEDIATE",
        "COMMIT",
    ]
    assert tier.size() == 50
    assert execute(directory, "SELECT key FROM set_aside") == [("'damaged'",)]


@pytest.mark.parametrize(("durability", "level"), [(Durability.PROCESS, 1), (Durability.FULL, 2)])
def test_full_durability_syncs_each_commit(
    make: Callable[..., SQLiteCacheTier], durability: Durability, level: int
) -> None:
    tier = make(durability=durability)
    assert tier._database._writer is not None
    assert tier._database._writer.execute("PRAGMA synchronous").fetchone() == (level,)
    assert tier._database._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_the_facts_of_an_entry_can_be_queried_by_hand(make: MakeDiskTier, directory: Path) -> None:
    put(make(), everything_set())
    make().close()
    rows = execute(
        directory,
        "SELECT proxy_url, scheme, health_status, failure_count, labels ->> 'country' FROM entries",
    )
    assert rows == [("socks5://[2001:db8::1]:1080", "socks5", "degraded", 2, "DE")]
