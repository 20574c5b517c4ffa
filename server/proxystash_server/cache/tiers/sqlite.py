"""A disk tier in a SQLite database: L3, and L2 for large caches."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from proxystash_server.cache.access_log import Access
from proxystash_server.cache.config import CacheTierConfig, CacheTierType, Durability
from proxystash_server.cache.credentials import CredentialEncryptor, UnreadableCredentialsError
from proxystash_server.cache.entry import CacheEntry, Clock, restore_entry, wall_clock
from proxystash_server.cache.eviction import SQL_ORDER
from proxystash_server.cache.tiers.base import Applied, DurableTier, EntryFilter, OnCorruption, Write
from proxystash_server.cache.tiers.database import Database
from proxystash_server.cache.tiers.record import (
    CorruptRecordError,
    monitoring_from_plain,
    monitoring_to_plain,
    sealed_of,
)

_CONTENT = (
    "key, proxy_url, sealed, source, fetch_time, expires_at, health_status, failure_count, "
    "health_monitoring, labels, version"
)
_COLUMNS = f"{_CONTENT}, checksum, access_count, last_accessed, evicted_from_l1"
_SELECT = f"SELECT {_COLUMNS} FROM entries WHERE key = ?"
_INSERT = f"INSERT INTO entries ({_COLUMNS}, scheme, recency) VALUES ({', '.join('?' * 17)})"
# Not INSERT OR REPLACE: an entry that is put again keeps its id, and with it its place in FIFO's order.
_UPDATE = f"UPDATE entries SET ({_COLUMNS}, scheme, recency) = ({', '.join('?' * 17)}) WHERE id = ?"
_TOUCH = (
    "UPDATE entries SET access_count = ?, last_accessed = ?, evicted_from_l1 = ?, recency = ? "
    "WHERE key = ? AND version = ?"
)

_MARK = (
    "INSERT INTO backlog VALUES (?, ?) "
    "ON CONFLICT (key) DO UPDATE SET version = max(version, excluded.version)"
)
_KEYS_PER_QUERY = 500

_Row = tuple[Any, ...]


class SQLiteCacheTier(DurableTier):
    """Entries as rows with a column for every fact, so that the file can be queried by hand.

    Credentials are one sealed token; a checksum covers what a put stored. The number of entries is kept in
    the same transactions as the entries, so it is never counted. Damaged rows move to the table `set_aside`.
    """

    backend = "sqlite"

    def __init__(
        self,
        config: CacheTierConfig,
        tier_type: CacheTierType,
        db_path: Path,
        encryptor: CredentialEncryptor,
        *,
        durability: Durability = Durability.PROCESS,
        clock: Clock = wall_clock,
        on_corruption: OnCorruption = lambda _tier, _reason: None,
    ) -> None:
        super().__init__(config, tier_type, clock)
        self.encryptor = encryptor
        self._database = Database(
            db_path, durability, before_commit=self._store_count, after_commit=self._publish_count
        )
        self._on_corruption = on_corruption
        self._entries = 0
        # As the running transaction has it; published to `_entries` when that is committed.
        self._entries_in_transaction = 0
        self._recency_lock = threading.Lock()
        self._recency = 0
        self._store_id = ""
        self._partner_id = ""

    # -- the store as a whole

    def open(self) -> None:
        damaged = self._database.open()
        policy_order = SQL_ORDER[self.config.eviction_policy]

        def prepare(connection: sqlite3.Connection) -> dict[str, Any]:
            if self.config.max_entries is not None and policy_order != "id":
                name = f"entries_by_{self.config.eviction_policy}"
                connection.execute(f"CREATE INDEX IF NOT EXISTS {name} ON entries ({policy_order})")
            meta = dict(connection.execute("SELECT name, value FROM meta"))
            if "key_check" not in meta:
                connection.execute("INSERT INTO meta VALUES ('key_check', ?)", (self.encryptor.make_check(),))
            self._entries = self._entries_in_transaction = int(meta["entries"])
            return meta

        meta = self._database.write(prepare)
        self._store_id = str(meta["store_id"])
        self._partner_id = str(meta["partner_id"])
        # Later than any recency given before, without looking for the greatest.
        self._recency = max(self._recency, time.time_ns() // 1000)
        if damaged:
            self._on_corruption(self.tier_type, "the database was damaged and set aside whole")

    def close(self) -> None:
        self._database.close()

    def probe(self) -> None:
        self._database.write(
            lambda connection: connection.execute(
                "INSERT OR REPLACE INTO meta VALUES ('probed_at', ?)", (self._clock(),)
            )
        )

    def stored_key_check(self) -> bytes | None:
        check = self._database.read_meta_offline("key_check")
        return check if isinstance(check, bytes) else None

    @property
    def store_id(self) -> str:
        return self._store_id

    @property
    def partner_id(self) -> str:
        return self._partner_id

    def set_partner(self, partner_id: str) -> None:
        self._database.write(
            lambda connection: connection.execute(
                "UPDATE meta SET value = ? WHERE name = 'partner_id'", (partner_id,)
            )
        )
        self._partner_id = partner_id

    @property
    def doubtful(self) -> bool:
        return False

    def versions(self, keys: Sequence[str]) -> dict[str, int]:
        found: dict[str, int] = {}
        with self._database.reader() as connection:
            for start in range(0, len(keys), _KEYS_PER_QUERY):
                some = keys[start : start + _KEYS_PER_QUERY]
                found.update(
                    connection.execute(
                        f"SELECT key, version FROM entries WHERE key IN ({', '.join('?' * len(some))})", some
                    )
                )
        return found

    # -- reading

    def get(self, key: str) -> CacheEntry | None:
        with self._database.reader() as connection:
            row = connection.execute(_SELECT, (key,)).fetchone()
        return None if row is None else self._read(row)

    def __contains__(self, key: str) -> bool:
        with self._database.reader() as connection:
            return connection.execute("SELECT 1 FROM entries WHERE key = ?", (key,)).fetchone() is not None

    def size(self) -> int:
        return self._entries

    def keys(self) -> list[str]:
        with self._database.reader() as connection:
            return [row[0] for row in connection.execute("SELECT key FROM entries")]

    def expired_keys(self, now_us: int, limit: int) -> list[str]:
        with self._database.reader() as connection:
            rows = connection.execute(
                "SELECT key FROM entries WHERE expires_at <= ? ORDER BY expires_at LIMIT ?", (now_us, limit)
            )
            return [row[0] for row in rows]

    def page(self, after: str, limit: int, entry_filter: EntryFilter, now_us: int) -> list[CacheEntry]:
        where, values = _conditions(entry_filter)
        entries: list[CacheEntry] = []
        # A page with damaged rows in it comes out short; it goes on behind its last row until it is full.
        while len(entries) < limit:
            wanted = limit - len(entries)
            with self._database.reader() as connection:
                rows = connection.execute(
                    f"SELECT {_COLUMNS} FROM entries "
                    f"WHERE key > ? AND expires_at > ?{where} ORDER BY key LIMIT ?",
                    (after, now_us, *values, wanted),
                ).fetchall()
            entries += [entry for entry in map(self._read, rows) if entry is not None]
            if len(rows) < wanted:
                break
            after = rows[-1][0]
        return entries

    def backlog(self) -> dict[str, int]:
        with self._database.reader() as connection:
            return dict(connection.execute("SELECT key, version FROM backlog"))

    # -- writing

    def apply(self, writes: Sequence[Write]) -> list[Applied]:
        rows = [None if write.entry is None else self._row(write.entry) for write in writes]

        def change(connection: sqlite3.Connection) -> list[Applied]:
            return [self._apply_one(connection, write, row) for write, row in zip(writes, rows, strict=True)]

        return self._database.write(change)

    @property
    def busy(self) -> bool:
        return self._database.busy

    def touch(self, accesses: Sequence[Access]) -> None:
        rows = [
            (
                access.access_count,
                access.last_accessed_us,
                access.evicted_from_l1,
                self._next_recency(),
                access.key,
                access.version,
            )
            for access in accesses
        ]
        self._database.write(lambda connection: connection.executemany(_TOUCH, rows))

    def clear(self) -> int:
        def change(connection: sqlite3.Connection) -> int:
            held = self._entries_in_transaction
            connection.execute("DELETE FROM entries")
            self._entries_in_transaction -= held
            return held

        return self._database.write(change)

    def clear_before(self, version: int) -> None:
        def change(connection: sqlite3.Connection) -> None:
            self._entries_in_transaction -= connection.execute(
                "DELETE FROM entries WHERE version < ?", (version,)
            ).rowcount

        self._database.write(change)

    def trim(self) -> list[str]:
        def change(connection: sqlite3.Connection) -> list[str]:
            return self._make_room(connection, 0)

        return self._database.write(change)

    def extend_backlog(self, marks: Mapping[str, int]) -> None:
        rows = list(marks.items())
        self._database.write(lambda connection: connection.executemany(_MARK, rows))

    def settle(self, keys: Iterable[str]) -> None:
        rows = [(key,) for key in keys]
        self._database.write(
            lambda connection: connection.executemany("DELETE FROM backlog WHERE key = ?", rows)
        )

    # -- inside a transaction

    def _apply_one(self, connection: sqlite3.Connection, write: Write, row: _Row | None) -> Applied:
        evicted: list[str] = []
        held = connection.execute("SELECT id FROM entries WHERE key = ?", (write.key,)).fetchone()
        if row is None:
            if held is not None:
                connection.execute("DELETE FROM entries WHERE id = ?", held)
                self._entries_in_transaction -= 1
        elif held is not None:
            connection.execute(_UPDATE, row + held)
        else:
            evicted = self._make_room(connection, 1)
            connection.execute(_INSERT, row)
            self._entries_in_transaction += 1
        if write.for_backlog:
            connection.execute(_MARK, (write.key, write.version))
        return Applied(existed=held is not None, evicted=tuple(evicted))

    def _make_room(self, connection: sqlite3.Connection, wanted: int) -> list[str]:
        if self.config.max_entries is None:
            return []
        surplus = self._entries_in_transaction + wanted - self.config.max_entries
        evicted: list[str] = []
        # What only this tier holds, because its partner has missed it, goes last.
        for condition in ("WHERE key NOT IN (SELECT key FROM backlog)", ""):
            if surplus <= len(evicted):
                break
            rows = connection.execute(
                "DELETE FROM entries WHERE id IN (SELECT id FROM entries "
                f"{condition} ORDER BY {SQL_ORDER[self.config.eviction_policy]} LIMIT ?) RETURNING key",
                (surplus - len(evicted),),
            ).fetchall()
            evicted += [row[0] for row in rows]
        self._entries_in_transaction -= len(evicted)
        return evicted

    def _store_count(self, connection: sqlite3.Connection) -> None:
        if self._entries_in_transaction != self._entries:
            connection.execute(
                "UPDATE meta SET value = ? WHERE name = 'entries'", (self._entries_in_transaction,)
            )

    def _publish_count(self, committed: bool) -> None:
        if committed:
            self._entries = self._entries_in_transaction
        else:
            self._entries_in_transaction = self._entries

    # -- rows and entries

    def _row(self, entry: CacheEntry) -> _Row:
        sealed = sealed_of(entry, self.encryptor)
        monitoring = monitoring_to_plain(entry.health_monitoring)
        content = (
            entry.key,
            entry.proxy_url,
            None if sealed is None else sealed.decode(),
            entry.source,
            entry.fetch_time_us,
            entry.expires_at_us,
            entry.health_status.value,
            entry.failure_count,
            None if monitoring is None else json.dumps(monitoring),
            json.dumps(dict(entry.labels)) if entry.labels else None,
            entry.version,
        )
        return (
            *content,
            _checksum(content),
            entry.access_count,
            entry.last_accessed_us,
            int(entry.evicted_from_l1),
            entry.proxy_url.partition("://")[0],
            self._next_recency(),
        )

    def _read(self, row: _Row) -> CacheEntry | None:
        try:
            return self._entry(row)
        except (CorruptRecordError, UnreadableCredentialsError) as error:
            self._set_row_aside(row, str(error))
            return None

    def _entry(self, row: _Row) -> CacheEntry:
        content = row[:11]
        if _checksum(content) != row[11]:
            raise CorruptRecordError("the row does not match its checksum")
        key, url, sealed, source, fetched, expires, status, failures, monitoring, labels, version = content
        username, password = self.encryptor.open(None if sealed is None else sealed.encode())
        return restore_entry(
            key,
            url,
            username,
            password,
            source,
            fetched,
            expires,
            row[13],
            row[12],
            status,
            failures,
            bool(row[14]),
            None if monitoring is None else monitoring_from_plain(json.loads(monitoring)),
            {} if labels is None else json.loads(labels),
            None if sealed is None else sealed.encode(),
            version,
        )

    def _set_row_aside(self, row: _Row, reason: str) -> None:
        record = json.dumps(dict(zip(_COLUMNS.split(", "), row, strict=True)), default=repr)

        def change(connection: sqlite3.Connection) -> bool:
            gone = connection.execute(
                "DELETE FROM entries WHERE key = ? AND checksum IS ?", (row[0], row[11])
            ).rowcount
            if gone:
                self._entries_in_transaction -= gone
                connection.execute(
                    "INSERT INTO set_aside (set_aside_at, reason, key, record) VALUES (?, ?, ?, ?)",
                    (self._clock(), reason, repr(row[0]), record),
                )
            return bool(gone)

        if self._database.write(change):
            self._on_corruption(self.tier_type, reason)

    def _next_recency(self) -> int:
        with self._recency_lock:
            self._recency += 1
            return self._recency


def _checksum(content: _Row) -> int:
    return zlib.crc32(repr(content).encode("utf-8", "surrogatepass"))


def _conditions(entry_filter: EntryFilter) -> tuple[str, list[str]]:
    clauses: list[str] = []
    values: list[str] = []
    if entry_filter.source:
        clauses.append("source = ?")
        values.append(entry_filter.source)
    if entry_filter.health_statuses:
        clauses.append(f"health_status IN ({', '.join('?' * len(entry_filter.health_statuses))})")
        values += sorted(entry_filter.health_statuses)
    if entry_filter.schemes:
        clauses.append(f"scheme IN ({', '.join('?' * len(entry_filter.schemes))})")
        values += sorted(entry_filter.schemes)
    for name, value in entry_filter.labels.items():
        clauses.append(
            "EXISTS (SELECT 1 FROM json_each(labels) WHERE json_each.key = ? AND json_each.value = ?)"
        )
        values += [name, value]
    return "".join(f" AND {clause}" for clause in clauses), values
