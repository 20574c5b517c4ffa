"""The format of a SQLite store's file: its tables, and how a file of an earlier format is brought to it."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

from proxystash_server.cache.errors import StoreFormatError

logger = logging.getLogger(__name__)

# "pstH": marks the file as ours, so that `file` and this code can tell.
APPLICATION_ID = 0x70737448
FORMAT_VERSION = 4
# Of a new file; another keeps what it has. A commit writes whole pages, and a change is smaller than most.
PAGE_BYTES = 2048

_ENTRIES_OF_FORMAT_3 = """CREATE TABLE entries (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL,
    proxy_url TEXT NOT NULL,
    scheme TEXT NOT NULL,
    sealed TEXT,
    source TEXT NOT NULL,
    fetch_time INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    health_status TEXT NOT NULL,
    failure_count INTEGER NOT NULL,
    health_monitoring TEXT,
    labels TEXT,
    version INTEGER NOT NULL,
    checksum INTEGER NOT NULL,
    access_count INTEGER NOT NULL,
    last_accessed INTEGER NOT NULL,
    evicted_from_l1 INTEGER NOT NULL,
    recency INTEGER NOT NULL
)"""
_ADDED = "max_leases INTEGER NOT NULL DEFAULT 0"
# To the letter what an upgrade makes of it.
_ENTRIES = _ENTRIES_OF_FORMAT_3.replace("\n)", f"\n, {_ADDED})")
# With what listings are filtered by, so that they look at entries, page by page, without looking into their
# rows. That a key has one row is up to whoever writes: a constraint would have an index of its own.
FILTERED = "source, scheme, health_status"
_BY_KEY = f"CREATE INDEX entries_by_key ON entries (key, {FILTERED})"
_BY_EXPIRY = "CREATE INDEX entries_by_expiry ON entries (expires_at)"
SCHEMA = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
{_ENTRIES};
{_BY_KEY};
{_BY_EXPIRY};
CREATE TABLE set_aside (id INTEGER PRIMARY KEY, set_aside_at INTEGER, reason TEXT, key TEXT, record TEXT);
"""

# What the table meta must have, and of which type.
META = {"id": str, "entries": int, "last_version": int, "key_check": bytes}

# Format 1 had the columns of format 3, in the same order, and a UNIQUE constraint on the key. SQLite copies
# whole records here, without looking into them, so one that is damaged stays what it is. The old table takes
# its indexes with it; the ones of a policy are made when the tier opens, as ever.
_FROM_FORMAT_1 = (
    "ALTER TABLE entries RENAME TO entries_of_format_1",
    _ENTRIES_OF_FORMAT_3,
    "INSERT INTO entries SELECT * FROM entries_of_format_1",
    "DROP TABLE entries_of_format_1",
    _BY_KEY,
    _BY_EXPIRY,
)
# Up to format 2, each of two stores remembered the other's name, and which of its changes the other had
# missed. What a store had so noted for the other becomes one note, which the next start goes through.
INHERITED = (
    "SELECT json_group_object(key, version) FROM (SELECT key, version FROM backlog UNION ALL "
    "SELECT noted.key, noted.value FROM meta, json_each(meta.value) AS noted "
    "WHERE name = 'announced' AND json_valid(meta.value)) "
    "WHERE typeof(key) = 'text' AND typeof(version) = 'integer'"
)
RENAMED_NOTES = {"store_id": "id", "partner_id": "partner"}
_FROM_FORMAT_2 = (
    f"INSERT OR REPLACE INTO meta VALUES ('inherited', ({INHERITED}))",
    "DROP TABLE backlog",
    *(
        f"UPDATE OR REPLACE meta SET name = '{now}' WHERE name = '{before}'"
        for before, now in RENAMED_NOTES.items()
    ),
    "DELETE FROM meta WHERE name IN ('announced', 'session')",
)
# Writes no row: where one has no value, it is the default.
_FROM_FORMAT_3 = (f"ALTER TABLE entries ADD COLUMN {_ADDED}",)
TABLE_INFO = "PRAGMA table_info(entries)"


def as_in(columns: str, table_info: Iterable[tuple[Any, ...]]) -> str:
    """`columns` as a table of any format can be asked for them, given the rows of TABLE_INFO."""
    known = {row[1] for row in table_info}
    return columns if "max_leases" in known else columns.replace("max_leases", "0")


class DamagedDatabaseError(sqlite3.DatabaseError):
    """A file whose pages, header or tables are not what any release writes."""


@cache
def _schemas() -> dict[int, dict[str, str]]:
    """By format, the tables and indexes of those formats that can be told by them alone."""
    schemas = {}
    for version, entries in ((FORMAT_VERSION, _ENTRIES), (3, _ENTRIES_OF_FORMAT_3)):
        with closing(sqlite3.connect(":memory:")) as model:
            model.executescript(SCHEMA.replace(_ENTRIES, entries))
            schemas[version] = _schema_of(model)
    return schemas


def _schema_of(connection: sqlite3.Connection) -> dict[str, str]:
    return dict(connection.execute("SELECT name, sql FROM sqlite_schema WHERE sql NOTNULL"))


def format_of(path: Path, connection: sqlite3.Connection) -> int:
    """The format of a database; 0 if it is empty yet.

    What tables it has says more than the numbers in the header, in which a bit may have flipped. Raises
    StoreFormatError for a file that is not ours or of a later format, DamagedDatabaseError for one of none.
    """
    schema = _schema_of(connection)
    for version, tables in _schemas().items():
        if schema.items() >= tables.items() and "backlog" not in schema:
            return version
    application_id, version, pages = (
        connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("application_id", "user_version", "page_count")
    )
    if not schema and application_id != APPLICATION_ID and pages <= 1:
        return 0
    if application_id != APPLICATION_ID and not {"meta", "entries", "set_aside"} <= schema.keys():
        raise StoreFormatError(f"{path} is a SQLite database, but not one of proxystash; move it away")
    if version > FORMAT_VERSION:
        raise StoreFormatError(
            f"{path} has format {version}; this release reads up to {FORMAT_VERSION}. Use a newer release"
        )
    if not 1 <= version < FORMAT_VERSION:
        raise DamagedDatabaseError("the tables are of no format")
    return int(version)


def check_header(path: Path) -> None:
    """Raise DamagedDatabaseError if what is the same in every file of ours is not so in this one."""
    with path.open("rb") as file:
        header = file.read(100)
    if header and (
        header[:16] != b"SQLite format 3\0"
        or not {*header[18:20]} <= {1, 2}
        or header[20:24] != b"\0\x40\x20\x20"
        or int.from_bytes(header[44:48], "big") not in {0, 4}
        or int.from_bytes(header[56:60], "big") not in {0, 1}
    ):
        raise DamagedDatabaseError("the header is damaged")


def check_pages(connection: sqlite3.Connection) -> None:
    """Raise sqlite3.DatabaseError if a page is damaged, or an index has something else than its table."""
    [[found]] = connection.execute("PRAGMA integrity_check(1)").fetchall()
    if found != "ok":
        raise DamagedDatabaseError(str(found).replace("\n", " "))


def is_marked(connection: sqlite3.Connection) -> bool:
    """Whether the header says what `mark` has it say."""
    [application_id] = connection.execute("PRAGMA application_id").fetchone()
    [version] = connection.execute("PRAGMA user_version").fetchone()
    return bool(application_id == APPLICATION_ID and version == FORMAT_VERSION)


def mark(connection: sqlite3.Connection) -> None:
    """Have the header of a database say that it is one of ours, and of this format."""
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")


def upgrade(path: Path, connection: sqlite3.Connection, version: int) -> None:
    """Bring the database at `path` from an earlier format to this one, in one transaction.

    Until that is committed, the file is what it was. Raises sqlite3.Error.
    """
    # By the format that they bring to the next one.
    steps = {1: _FROM_FORMAT_1, 2: _FROM_FORMAT_2, 3: _FROM_FORMAT_3}
    connection.execute("BEGIN IMMEDIATE")
    try:
        entries = connection.execute("SELECT count(*) FROM entries").fetchone()[0]
        described = {"path": str(path), "from_format": version, "to_format": FORMAT_VERSION}
        logger.info("upgrading a database", extra={**described, "entries": entries})
        for step in range(version, FORMAT_VERSION):
            for statement in steps[step]:
                connection.execute(statement)
        mark(connection)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    logger.info("database upgraded", extra={**described, "entries": entries})
