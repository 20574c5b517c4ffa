"""Putting a stopped, damaged SQLite store in order."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

from proxystash_server.cache.config import Durability
from proxystash_server.cache.entry.credentials import CredentialEncryptor
from proxystash_server.cache.entry.entry import CacheEntry, wall_clock
from proxystash_server.cache.stopped.sqlite import (
    CHECKED_COLUMNS,
    decode_text,
    entry_or_fault,
)
from proxystash_server.cache.tiers.sqlite.database import SQLITE_ERRORS, Database
from proxystash_server.cache.tiers.sqlite.format import META, check_pages
from proxystash_server.cache.tiers.sqlite.record import COLUMNS, Row, scheme_of

_BATCH = 500


def repair_database(path: Path, encryptor: CredentialEncryptor, *, drop_key_check: bool) -> Counter[str]:
    """Save what can be read, move bad rows to `set_aside`, and correct what can be derived; what was done.

    The database counts as incomplete if it has lost rows: the next start brings back what L2 has of them.
    Raises sqlite3.Error, OSError, and what `Database.open` raises; what was done until then stays done.
    """
    done: Counter[str] = Counter()
    database = Database(
        path,
        Durability.FULL,
        before_commit=lambda _connection: None,
        after_commit=lambda _committed: None,
    )
    saved = database.open()
    database.close()
    done["damaged logs set aside"] += database.lost_pages > 0
    if saved is None and not _pages_are_sound(path):
        # Too large a file for that to be seen when it was opened.
        saved = database.rebuild()
    if saved is not None:
        done["damaged database files set aside"] += 1
        done["damaged rows set aside"] += len(saved.damaged)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.text_factory = decode_text
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN IMMEDIATE")
        _check_rows(connection, encryptor, done)
        _drop_repeated(connection, done)
        _drop_wrong_meta(connection, done, drop_key_check=drop_key_check)
        connection.execute("COMMIT")
    return +done


def _pages_are_sound(path: Path) -> bool:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        try:
            check_pages(connection)
        except SQLITE_ERRORS:
            return False
    return True


def _check_rows(connection: sqlite3.Connection, encryptor: CredentialEncryptor, done: Counter[str]) -> None:
    last = -(2**63)
    while rows := connection.execute(
        f"SELECT {CHECKED_COLUMNS} FROM entries WHERE id >= ? ORDER BY id LIMIT ?", (last, _BATCH)
    ).fetchall():
        for number, *row in rows:
            *content, scheme, recency = row
            entry = entry_or_fault(tuple(content), encryptor)
            if not isinstance(entry, CacheEntry):
                _set_aside(connection, number, tuple(content), str(entry))
                done["damaged rows set aside"] += 1
            elif scheme != scheme_of(entry.proxy_url) or not isinstance(recency, int):
                connection.execute(
                    "UPDATE entries SET scheme = ?, recency = ? WHERE id = ?",
                    (scheme_of(entry.proxy_url), recency if isinstance(recency, int) else 0, number),
                )
                done["derived columns corrected"] += 1
        last = rows[-1][0] + 1
    if done["damaged rows set aside"]:
        connection.execute("REPLACE INTO meta VALUES ('incomplete', 1)")


def _drop_repeated(connection: sqlite3.Connection, done: Counter[str]) -> None:
    """Of rows with the same key leave the one that was stored last."""
    done["rows of repeated keys taken out"] += connection.execute(
        "DELETE FROM entries WHERE key IN (SELECT key FROM entries GROUP BY key HAVING count(*) > 1) "
        "AND EXISTS (SELECT 1 FROM entries AS later WHERE later.key = entries.key "
        "AND (later.version, later.id) > (entries.version, entries.id))"
    ).rowcount


def _drop_wrong_meta(connection: sqlite3.Connection, done: Counter[str], *, drop_key_check: bool) -> None:
    """Remove what the store wrongly says of itself; the tier makes it anew when it opens."""
    meta = dict(connection.execute("SELECT name, value FROM meta"))
    entries = connection.execute("SELECT count(*) FROM entries").fetchone()[0]
    wrong = {name for name, kind in META.items() if not isinstance(meta.get(name), kind)}
    if meta.get("entries") != entries:
        wrong.add("entries")
    if drop_key_check:
        wrong.add("key_check")
    for name in sorted(wrong):
        connection.execute("DELETE FROM meta WHERE name = ?", (name,))
        done[f"{name} made anew"] += 1


def _set_aside(connection: sqlite3.Connection, number: int, row: Row, reason: str) -> None:
    record = json.dumps(dict(zip(COLUMNS.split(", "), row, strict=True)), default=repr)
    connection.execute(
        "INSERT INTO set_aside (set_aside_at, reason, key, record) VALUES (?, ?, ?, ?)",
        (wall_clock(), reason, repr(row[0]), record),
    )
    connection.execute("DELETE FROM entries WHERE id = ?", (number,))
