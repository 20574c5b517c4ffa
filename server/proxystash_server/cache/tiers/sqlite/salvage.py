"""Saving what is readable of a damaged database."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from proxystash_server.cache.tiers.sqlite.files import cannot_open
from proxystash_server.cache.tiers.sqlite.format import INHERITED, RENAMED_NOTES, TABLE_INFO, as_in

Row = tuple[Any, ...]

# What is carried over beside the entries. The count is made anew; the last version is forgotten, since
# changes may have been lost, and whoever knows of later ones must be believed.
_META = ("id", "cache_id", "partner", "key_check", "inherited")


def salvage(damaged: Path, connection: sqlite3.Connection, columns: str) -> int:
    """Copy every readable row of the database file `damaged` into an empty one; how many entries that were.

    Reads the table from both ends and through its index, so that a damaged page costs the rows on it. What a
    row says is proven by its checksum later, when it is read as an entry. Raises sqlite3.Error if the file
    cannot be opened now, which says nothing of what could be saved.
    """
    source = sqlite3.connect(f"{damaged.absolute().as_uri()}?mode=ro", uri=True)
    # As for reading in general: text that is none must not end the whole scan.
    source.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
    try:
        connection.execute("BEGIN")
        marks = ", ".join("?" * len(columns.split(",")))
        saved: set[str] = set()
        read = as_in(columns, _rows(source, TABLE_INFO))
        for row in _entries(source, read, saved):
            try:
                connection.execute(f"INSERT OR IGNORE INTO entries ({columns}) VALUES ({marks})", row)
            except UnicodeEncodeError:
                # Its checksum would not hold either.
                connection.execute(
                    "INSERT INTO set_aside (reason, record) VALUES ('a text is none', ?)", (ascii(row),)
                )
        for row in _rows(source, "SELECT set_aside_at, reason, key, record FROM set_aside"):
            connection.execute(
                "INSERT INTO set_aside (set_aside_at, reason, key, record) VALUES (?, ?, ?, ?)", row
            )
        # There is such a table only in a file of an earlier format.
        for row in _rows(source, INHERITED):
            connection.execute("INSERT OR REPLACE INTO meta VALUES ('inherited', ?)", row)
        for name, value in _rows(source, "SELECT name, value FROM meta"):
            note = RENAMED_NOTES.get(name, name)
            if note in _META:
                connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (note, value))
        entries = int(connection.execute("SELECT count(*) FROM entries").fetchone()[0])
        connection.execute("UPDATE meta SET value = ? WHERE name = 'entries'", (entries,))
        connection.execute("COMMIT")
        return entries
    finally:
        source.close()


def _entries(source: sqlite3.Connection, columns: str, saved: set[str]) -> Iterator[Row]:
    key_place = [column.strip() for column in columns.split(",")].index("key")
    for order in ("ASC", "DESC"):
        for row in _rows(source, f"SELECT {columns} FROM entries ORDER BY id {order}"):
            if row[key_place] in saved:
                # The two directions have met, or the first one found everything.
                break
            saved.add(row[key_place])
            yield row
    for order in ("ASC", "DESC"):
        for (key,) in _rows(source, f"SELECT key FROM entries ORDER BY key {order}"):
            if key not in saved:
                saved.add(key)
                of_key = f"SELECT {columns} FROM entries WHERE key = ? ORDER BY version DESC LIMIT 1"
                yield from _rows(source, of_key, (key,))


def _rows(source: sqlite3.Connection, query: str, values: Sequence[object] = ()) -> Iterator[Row]:
    """The rows of a query up to the first one that cannot be read."""
    try:
        yield from source.execute(query, values)
    except (sqlite3.DatabaseError, UnicodeEncodeError) as error:
        if isinstance(error, sqlite3.DatabaseError) and cannot_open(error):
            raise
        # The other kind is for a key that is no text, and so cannot be asked for.
        return
