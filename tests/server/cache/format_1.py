"""The stores of both backends as they were in earlier formats."""

from __future__ import annotations

import json
import sqlite3
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

from proxystash_server.cache.tiers.jsonl.line import encode_body, finish_line
from proxystash_server.cache.tiers.sqlite.record import COLUMNS

# As the releases that wrote format 1 had it.
FORMAT_1 = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE entries (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
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
);
CREATE INDEX entries_by_expiry ON entries (expires_at);
CREATE TABLE backlog (key TEXT PRIMARY KEY, version INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE set_aside (id INTEGER PRIMARY KEY, set_aside_at INTEGER, reason TEXT, key TEXT, record TEXT);
CREATE INDEX entries_by_lru ON entries (recency);
PRAGMA application_id = 0x70737448;
PRAGMA user_version = 1;
"""

FORMAT_2 = (
    FORMAT_1.replace("key TEXT NOT NULL UNIQUE", "key TEXT NOT NULL")
    .replace(
        "CREATE INDEX entries_by_expiry",
        "CREATE INDEX entries_by_key ON entries (key, source, scheme, health_status);\n"
        "CREATE INDEX entries_by_expiry",
    )
    .replace("user_version = 1", "user_version = 2")
)
FORMAT_3 = (
    FORMAT_2.replace(
        "CREATE TABLE backlog (key TEXT PRIMARY KEY, version INTEGER NOT NULL) WITHOUT ROWID;\n", ""
    )
    .replace("CREATE INDEX entries_by_lru ON entries (recency);\n", "")
    .replace("user_version = 2", "user_version = 3")
)
# Of a row, up to format 3.
COLUMNS_OF_FORMAT_3 = ", ".join(name for name in COLUMNS.split(", ") if name != "max_leases")


def row_of_format_3(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """What `write_row` made, as a release that had no max_leases wrote it."""
    place = COLUMNS.split(", ").index("max_leases")
    return (*row[:place], *row[place + 1 :])


def turn_into_format_1(path: Path) -> None:
    """Put in the place of a closed database one of format 1 with the same content."""
    newer = path.rename(path.with_name("newer.db"))
    path.touch(mode=0o600)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(FORMAT_1)
        connection.execute("ATTACH ? AS newer", (str(newer),))
        columns = f"id, {COLUMNS_OF_FORMAT_3}, scheme, recency"
        connection.execute(f"INSERT INTO main.entries ({columns}) SELECT {columns} FROM newer.entries")
        connection.execute("INSERT INTO main.set_aside SELECT * FROM newer.set_aside")
        connection.execute("INSERT INTO main.meta VALUES ('partner_id', '')")
        connection.execute(
            "REPLACE INTO main.meta "
            "SELECT CASE name WHEN 'id' THEN 'store_id' WHEN 'cache_id' THEN 'partner_id' ELSE name END, "
            "value "
            "FROM newer.meta WHERE name NOT IN ('sealed_at', 'alone', 'incomplete')"
        )
    newer.unlink()


def turn_jsonl_into_format_1(directory: Path) -> None:
    """Put in the place of a closed JSONL store one of format 1 with the same content."""
    shards = dict.fromkeys(range(8), b"")
    for line in (directory / "entries.jsonl").read_bytes().splitlines(keepends=True)[1:]:
        shards[zlib.crc32(json.loads(line).get("key", "").encode()) % 8] += line
    (directory / "entries.jsonl").unlink()
    for number, lines in shards.items():
        header = {"op": "header", "format": "proxystash-jsonl", "version": 1, "shard": number, "shards": 8}
        path = directory / f"shard-{number}.jsonl"
        path.write_bytes(finish_line(encode_body(header), 0) + lines)
    meta = json.loads((directory / "meta.json").read_bytes())
    names = {"format": "proxystash-jsonl", "version": 1, "store_id": meta["id"], "partner_id": ""}
    (directory / "meta.json").write_text(json.dumps({**names, "key_check": meta["key_check"]}))
