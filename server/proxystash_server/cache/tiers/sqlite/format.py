"""The format of a SQLite store's file: its tables, and how a file of an earlier format is brought to it."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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


def upgrade(path: Path, connection: sqlite3.Connection, version: int) -> None:
    """Bring the database at `path` from an earlier format to this one, in one transaction.

    Until that is committed, the file is what it was. Raises sqlite3.Error.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        entries = connection.execute("SELECT count(*) FROM entries").fetchone()[0]
        described = {"path": str(path), "from_format": version, "to_format": FORMAT_VERSION}
        logger.info("upgrading a database", extra={**described, "entries": entries})
        steps = [
            *(_FROM_FORMAT_1 if version < 2 else ()),
            *(_FROM_FORMAT_2 if version < 3 else ()),
            *_FROM_FORMAT_3,
        ]
        for statement in steps:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    logger.info("database upgraded", extra={**described, "entries": entries})
