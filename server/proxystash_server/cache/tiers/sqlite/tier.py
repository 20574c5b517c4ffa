"""A disk tier in a SQLite database: L3, and L2 for large caches."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from proxystash_server.cache.coherence.uses import Use
from proxystash_server.cache.config import CacheTierConfig, CacheTierType, Durability
from proxystash_server.cache.entry.credentials import (
    CredentialEncryptor,
    UnreadableCredentialsError,
    is_damaged_check,
    with_checksum,
)
from proxystash_server.cache.entry.entry import CacheEntry, Clock, wall_clock
from proxystash_server.cache.entry.plain import CorruptRecordError
from proxystash_server.cache.errors import EncryptionKeyError
from proxystash_server.cache.tiers.base import (
    QUIETLY_APPLIED,
    Applied,
    AuthorityTier,
    Decide,
    EntryFilter,
    OnCorruption,
    Page,
    Write,
)
from proxystash_server.cache.tiers.eviction import SQL_ORDER
from proxystash_server.cache.tiers.sqlite.database import Database
from proxystash_server.cache.tiers.sqlite.format import META
from proxystash_server.cache.tiers.sqlite.record import COLUMNS, CONTENT_LENGTH, Row, read_row, write_row
from proxystash_server.cache.tiers.sqlite.storing import (
    HeldRow,
    held_rows,
    store_row,
    store_rows,
    store_uses,
)

# The id is for setting a row aside whose key may be what is damaged.
_READ = f"{COLUMNS}, id"
_SELECT = f"SELECT {_READ} FROM entries WHERE key = ?"
_DELETE = "DELETE FROM entries WHERE key = ?"
_DELETE_MANY = "DELETE FROM entries WHERE key IN (SELECT value FROM json_each(?))"
_STORE_COUNTERS = "REPLACE INTO meta VALUES ('entries', ?), ('last_version', ?)"
_STORE_NOTE = "REPLACE INTO meta VALUES (?, ?)"
# Of a version that no release has given, a damaged row speaks.
_COUNT = (
    "SELECT count(*), coalesce(max(version) FILTER "
    "(WHERE typeof(version) = 'integer' AND version < 1 << 62), 0) FROM entries"
)
# In the table meta, but no notes.
_OWN = ("entries", "last_version", "key_check", "probed_at")
_KEYS_PER_QUERY = 500
# So many keys take a moment and a tenth of a megabyte; to find the next costs as much.
_EXPIRED_AT_ONCE = 1000
# A filter that hardly anything passes would otherwise have one call read the whole table.
_ROWS_PER_SCAN = 2000
_LAST_OF_SCAN = f"SELECT key FROM entries WHERE key > ? ORDER BY key LIMIT 1 OFFSET {_ROWS_PER_SCAN - 1}"


class SQLiteCacheTier(AuthorityTier):
    """Entries as rows with a column for every fact, so that the file can be queried by hand.

    Credentials are one sealed token; a checksum covers what a put stored. The number of entries is kept in
    the same transactions as the entries, so it is never counted. Damaged rows move to the table `set_aside`,
    which makes the note `incomplete`.
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
        on_corruption: OnCorruption = lambda _tier, _key, _reason: None,
    ) -> None:
        super().__init__(config, tier_type, clock)
        self.encryptor = encryptor
        self._database = Database(
            db_path,
            durability,
            before_commit=self._store_counters,
            after_commit=self._publish_counters,
        )
        self._on_corruption = on_corruption
        self._entries = 0
        # As the running transaction has them; published when that is committed.
        self._entries_in_transaction = 0
        self._last_version = 0
        self._last_version_in_transaction = 0
        self._recency_lock = threading.Lock()
        self._recency = 0
        self._notes: dict[str, object] = {}

    # -- the store as a whole

    def open(self) -> None:
        saved = self._database.open()
        policy_order = SQL_ORDER[self.config.eviction_policy]

        def prepare(connection: sqlite3.Connection) -> dict[str, Any]:
            if self.config.max_entries is not None and policy_order != "id":
                name = f"entries_by_{self.config.eviction_policy}"
                connection.execute(f"CREATE INDEX IF NOT EXISTS {name} ON entries ({policy_order})")
            # Counted where the rows have just been looked at anyway.
            meta = _complete_meta(connection, self.encryptor, counts=not self._database.is_unchecked)
            self._entries = self._entries_in_transaction = meta["entries"]
            self._last_version = self._last_version_in_transaction = meta["last_version"]
            return meta

        meta = self._database.write(prepare)
        self._notes = {name: value for name, value in meta.items() if name not in _OWN}
        # Later than any recency given before, without looking for the greatest.
        self._recency = max(self._recency, time.time_ns() // 1000)
        if self._database.lost_pages:
            reason = f"the log was damaged; {self._database.lost_pages} committed pages are lost"
            self._database.lost_pages = 0
            self._on_corruption(self.tier_type, None, reason)
        if saved is not None:
            reason = f"the database was damaged and set aside; {saved.entries} entries were saved"
            self._on_corruption(self.tier_type, None, reason)
            for key, why in saved.damaged.items():
                self._tell_damage((key,), why)

    def close(self) -> None:
        self._database.close()

    def probe(self) -> None:
        self._database.write(lambda connection: connection.execute(_STORE_NOTE, ("probed_at", self._clock())))

    def stored_key_check(self) -> bytes | None:
        check = self._database.read_meta_offline("key_check")
        return check if isinstance(check, bytes) else None

    @property
    def notes(self) -> Mapping[str, object]:
        return self._notes

    def note(self, **notes: object) -> None:
        def change(connection: sqlite3.Connection) -> None:
            connection.executemany("DELETE FROM meta WHERE name = ?", [(name,) for name in notes])
            kept = [(name, value) for name, value in notes.items() if value is not None]
            connection.executemany(_STORE_NOTE, kept)

        self._database.write(change)
        changed = {**self._notes, **notes}
        self._notes = {name: value for name, value in changed.items() if value is not None}

    @property
    def last_version(self) -> int:
        return self._last_version

    def seal(self, version: int) -> None:
        self.note(sealed_at=version)

    def break_seal(self) -> int | None:
        sealed_at = self._notes.get("sealed_at")
        if sealed_at is not None:
            self.note(sealed_at=None)
        return sealed_at if isinstance(sealed_at, int) else None

    def versions(self, keys: Sequence[str]) -> dict[str, int]:
        found: dict[str, int] = {}
        with self._database.reader() as connection:
            for start in range(0, len(keys), _KEYS_PER_QUERY):
                some = keys[start : start + _KEYS_PER_QUERY]
                found.update(
                    connection.execute(
                        "SELECT key, version FROM entries WHERE typeof(version) = 'integer' "
                        f"AND key IN ({', '.join('?' * len(some))})",
                        some,
                    )
                )
        return found

    # -- reading

    def get(self, key: str) -> CacheEntry | None:
        row = self._database.read_one(_SELECT, key)
        return None if row is None else self._read(row)

    def __contains__(self, key: str) -> bool:
        with self._database.reader() as connection:
            return connection.execute("SELECT 1 FROM entries WHERE key = ?", (key,)).fetchone() is not None

    def size(self) -> int:
        return self._entries

    @property
    def log_bytes(self) -> int:
        return self._database.log_bytes

    def keys(self) -> list[str]:
        with self._database.reader() as connection:
            return [row[0] for row in connection.execute("SELECT key FROM entries")]

    def expired_keys(self, now_us: int) -> list[str]:
        with self._database.reader() as connection:
            rows = connection.execute(
                "SELECT key FROM entries WHERE expires_at <= ? ORDER BY expires_at LIMIT ?",
                (now_us, _EXPIRED_AT_ONCE),
            )
            return [row[0] for row in rows]

    def scan(self, after: str, limit: int, entry_filter: EntryFilter, now_us: int) -> Page:
        where, values = _conditions(entry_filter)
        with self._database.reader() as connection:
            [last] = connection.execute(_LAST_OF_SCAN, (after,)).fetchone() or [None]
            stop = last if _is_key(last) else None
            rows = connection.execute(
                f"SELECT {_READ} FROM entries WHERE key > ? AND expires_at > ?"
                f"{'' if stop is None else ' AND key <= ?'}{where} ORDER BY key LIMIT ?",
                (after, now_us, *(() if stop is None else (stop,)), *values, limit),
            ).fetchall()
        found = [entry for entry in map(self._read, rows) if entry is not None]
        if len(rows) < limit:
            return Page(found, stop)
        # Where a row's key is damaged, the row has been set aside, and is not met again.
        return Page(found, next((row[0] for row in reversed(rows) if _is_key(row[0])), after))

    # -- writing

    def apply(self, writes: Sequence[Write]) -> list[Applied]:
        rows = self._rows(writes)
        keys = [write.key for write in writes]
        return self._database.write(
            lambda connection: self._store(connection, writes, rows, held_rows(connection, keys))
        )

    def commit(self, keys: Sequence[str], decide: Decide) -> tuple[Sequence[Write], list[Applied]]:
        damaged: list[tuple[Row, str]] = []

        def change(connection: sqlite3.Connection) -> tuple[Sequence[Write], list[Applied]]:
            rows = held_rows(connection, keys)

            def read(key: str) -> CacheEntry | None:
                row = connection.execute(_SELECT, (key,)).fetchone()
                try:
                    return None if row is None else read_row(row, self.encryptor)
                except (CorruptRecordError, UnreadableCredentialsError) as error:
                    if self._move_aside(connection, row, str(error)):
                        damaged.append((row, str(error)))
                        del rows[key]
                    return None

            writes = decide(rows, read)
            return writes, self._store(connection, writes, self._rows(writes), rows)

        committed = self._database.write(change)
        for row, reason in damaged:
            self._tell_damage(row, reason)
        return committed

    @property
    def busy(self) -> bool:
        return self._database.busy

    def note_uses(self, uses: Sequence[Use]) -> None:
        first = self._take_recencies(len(uses))
        self._database.write(lambda connection: store_uses(connection, uses, first))

    def clear(self, version: int = 0) -> int:
        def change(connection: sqlite3.Connection) -> int:
            self._last_version_in_transaction = max(self._last_version_in_transaction, version)
            held = self._entries_in_transaction
            connection.execute("DELETE FROM entries")
            self._entries_in_transaction -= held
            return held

        return self._database.write(change)

    def clear_before(self, version: int) -> None:
        def change(connection: sqlite3.Connection) -> None:
            self._last_version_in_transaction = max(self._last_version_in_transaction, version)
            self._entries_in_transaction -= connection.execute(
                "DELETE FROM entries WHERE typeof(version) = 'integer' AND version BETWEEN 0 AND ?",
                (version - 1,),
            ).rowcount

        self._database.write(change)

    def trim(self) -> list[str]:
        return self._database.write(lambda connection: self._make_room(connection, 0))

    def maintain(self) -> None:
        """Bring the log into the database file once it is long."""
        self._database.checkpoint()

    # -- inside a transaction

    def _rows(self, writes: Sequence[Write]) -> list[Row | None]:
        first = self._take_recencies(len(writes))
        return [
            None if write.entry is None else write_row(write.entry, self.encryptor, recency)
            for recency, write in enumerate(writes, first)
        ]

    def _store(
        self,
        connection: sqlite3.Connection,
        writes: Sequence[Write],
        rows: Sequence[Row | None],
        held: Mapping[str, HeldRow],
    ) -> list[Applied]:
        for write in writes:
            if write.version > self._last_version_in_transaction:
                self._last_version_in_transaction = write.version
        if len(writes) == 1:
            return [self._store_one(connection, writes[0], rows[0], held.get(writes[0].key))]
        new = sum(write.entry is not None and write.key not in held for write in writes)
        one_key_each = len({write.key for write in writes}) == len(writes)
        if not (one_key_each and self._room_in_transaction(new)):
            # What one of them finds or makes go depends on those before it.
            return [
                self._store_one(connection, write, row, held_rows(connection, [write.key]).get(write.key))
                for write, row in zip(writes, rows, strict=True)
            ]
        removed = [write.key for write in writes if write.entry is None and write.key in held]
        if removed:
            connection.execute(_DELETE_MANY, (json.dumps(removed),))
        store_rows(connection, [row for row in rows if row is not None], held)
        self._entries_in_transaction += new - len(removed)
        return [QUIETLY_APPLIED[write.key in held] for write in writes]

    def _store_one(
        self, connection: sqlite3.Connection, write: Write, row: Row | None, held: HeldRow | None
    ) -> Applied:
        evicted: Sequence[str] = ()
        if row is not None:
            if held is None:
                evicted = self._make_room(connection, 1)
                self._entries_in_transaction += 1
            store_row(connection, row, held)
        elif held is not None:
            connection.execute(_DELETE, (write.key,))
            self._entries_in_transaction -= 1
        existed = held is not None
        return Applied(existed, tuple(evicted)) if evicted else QUIETLY_APPLIED[existed]

    def _room_in_transaction(self, wanted: int) -> bool:
        most = self.config.max_entries
        return most is None or self._entries_in_transaction + wanted <= most

    def _make_room(self, connection: sqlite3.Connection, wanted: int) -> list[str]:
        if self.config.max_entries is None or self._room_in_transaction(wanted):
            return []
        rows = connection.execute(
            "DELETE FROM entries WHERE id IN "
            f"(SELECT id FROM entries ORDER BY {SQL_ORDER[self.config.eviction_policy]} LIMIT ?) "
            "RETURNING key",
            (self._entries_in_transaction + wanted - self.config.max_entries,),
        ).fetchall()
        self._entries_in_transaction -= len(rows)
        return [row[0] for row in rows]

    def _store_counters(self, connection: sqlite3.Connection) -> None:
        counters = (self._entries_in_transaction, self._last_version_in_transaction)
        if counters != (self._entries, self._last_version):
            connection.execute(_STORE_COUNTERS, counters)

    def _publish_counters(self, committed: bool) -> None:
        if committed:
            self._entries = self._entries_in_transaction
            self._last_version = self._last_version_in_transaction
        else:
            self._entries_in_transaction = self._entries
            self._last_version_in_transaction = self._last_version

    # -- rows and entries

    def _read(self, row: Row) -> CacheEntry | None:
        try:
            return read_row(row, self.encryptor)
        except (CorruptRecordError, UnreadableCredentialsError) as error:
            reason = str(error)
        if self._database.write(lambda connection: self._move_aside(connection, row, reason)):
            self._tell_damage(row, reason)
        return None

    def _move_aside(self, connection: sqlite3.Connection, row: Row, reason: str) -> bool:
        gone = connection.execute(
            "DELETE FROM entries WHERE id = ? AND checksum IS ?", (row[-1], row[CONTENT_LENGTH])
        ).rowcount
        if gone:
            self._entries_in_transaction -= gone
            record = json.dumps(dict(zip(_READ.split(", "), row, strict=True)), default=repr)
            connection.execute(
                "INSERT INTO set_aside (set_aside_at, reason, key, record) VALUES (?, ?, ?, ?)",
                (self._clock(), reason, repr(row[0]), record),
            )
            connection.execute(_STORE_NOTE, ("incomplete", 1))
        return bool(gone)

    def _tell_damage(self, row: Row, reason: str) -> None:
        self._notes = {**self._notes, "incomplete": 1}
        known = isinstance(row[0], str) and row[0].isprintable()
        self._on_corruption(self.tier_type, row[0] if known else None, reason)

    def _take_recencies(self, count: int) -> int:
        """The first of so many new recencies, which follow each other."""
        with self._recency_lock:
            first = self._recency + 1
            self._recency += count
            return first


def _complete_meta(
    connection: sqlite3.Connection, encryptor: CredentialEncryptor, *, counts: bool
) -> dict[str, Any]:
    """What the store knows of itself; what is missing or damaged is found out or made up anew."""
    stored = dict(connection.execute("SELECT name, value FROM meta"))
    meta = {name: value for name, value in stored.items() if isinstance(value, META.get(name, object))}
    check = meta.get("key_check")
    assert isinstance(check, bytes | None)
    if not encryptor.may_go_on(check, _sealed_tokens(connection)):
        raise EncryptionKeyError("the key at hand is not the one that the database was sealed under")
    if check is None or is_damaged_check(check):
        check = encryptor.make_check()
    meta["key_check"] = with_checksum(check)
    meta.setdefault("id", uuid.uuid4().hex)
    if counts or not meta.keys() >= {"entries", "last_version"}:
        entries, newest = connection.execute(_COUNT).fetchone()
        meta["entries"] = entries
        # Not raised by what may be a damaged row: L2 would not be believed.
        meta.setdefault("last_version", newest)
    changed = [(name, value) for name, value in meta.items() if stored.get(name) != value]
    connection.executemany(_STORE_NOTE, changed)
    return meta


def _sealed_tokens(connection: sqlite3.Connection) -> Iterator[str]:
    """Some sealed credentials, looked for when the first is asked for: there may be none in any row."""
    found = connection.execute("SELECT sealed FROM entries WHERE typeof(sealed) = 'text' LIMIT 100")
    yield from (token for (token,) in found)


def _is_key(value: object) -> bool:
    """Whether it can be asked for, which a damaged key cannot if it is no text."""
    try:
        return isinstance(value, str) and bool(value.encode())
    except UnicodeEncodeError:
        return False


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
            # Labels that are damaged must not fail the whole query.
            "EXISTS (SELECT 1 FROM json_each(iif(json_valid(labels), labels, NULL)) "
            "WHERE json_each.key = ? AND json_each.value = ?)"
        )
        values += [name, value]
    return "".join(f" AND {clause}" for clause in clauses), values
