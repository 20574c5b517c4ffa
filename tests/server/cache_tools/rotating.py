"""Stores to give a new key, and what must be true of them afterwards."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken
from pydantic import SecretStr

from proxystash_server.cache import EntryFilter
from proxystash_server.cache.stopped.rotation import rotate_key
from tests.server.cache.support import PASSWORD, SWITCHED_OFF, USERNAME, contents
from tests.server.cache_tools.steps import stepping
from tests.server.cache_tools.stopped import KEYS, SEALED, StoppedCache, miss_changes


def filled(cache: StoppedCache) -> StoppedCache:
    """A store with entries in every state: replaced, used, deleted, and with garbage."""
    cache.fill().fill()
    with cache.running() as manager:
        manager.delete(KEYS[0])
        for key in KEYS[1:5]:
            manager.get(key)
    for database in (cache.l3, cache.l2_database):
        if database.exists():
            leave_garbage(database)
    return cache


def leave_garbage(database: Path) -> None:
    """Put entries and delete them as an SQLite does that is not built to wipe what it deletes."""
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("PRAGMA secure_delete = OFF")
        columns = (
            "proxy_url, scheme, sealed, source, fetch_time, expires_at, health_status, failure_count, version"
        )
        facts = "checksum, access_count, last_accessed, evicted_from_l1, recency"
        for number in range(10):
            connection.execute(
                f"INSERT INTO entries (key, {columns}, {facts}) "
                f"SELECT key || '-gone-{number}', {columns}, {facts} FROM entries WHERE key NOT LIKE '%gone%'"
            )
        connection.execute("DELETE FROM entries WHERE key LIKE '%gone%'")


def tokens(cache: StoppedCache) -> list[bytes]:
    """Every seal that stands anywhere in the files, the garbage included."""
    data = cache.bytes()
    found = []
    position = data.find(b"gAAAAA")
    while position >= 0:
        end = position
        while data[end : end + 1].isalnum() or data[end : end + 1] in (b"-", b"_", b"="):
            end += 1
        found.append(data[position:end])
        position = data.find(b"gAAAAA", end)
    return found


def opens(key: bytes, token: bytes) -> bool:
    """Whether a key opens a token, behind which something else may stand."""
    for length in range(100, len(token) + 1, 4):
        try:
            Fernet(key).decrypt(token[:length])
        except InvalidToken:
            continue
        return True
    return False


def assert_all_readable(
    cache: StoppedCache, switched_off: Sequence[str] = ("", "l2_config", "l3_config"), **fields: object
) -> None:
    """Every credential, in each tier by itself."""
    for off in [{name: SWITCHED_OFF} if name else {} for name in switched_off]:
        copy = cache.copy(f"copy-{len(list(cache.directory.parent.iterdir()))}")
        entries = copy.entries(**off, **fields)
        assert set(entries) == set(KEYS[1:])
        for key in SEALED[1:]:
            assert entries[key].username == SecretStr(USERNAME)
            assert entries[key].password == SecretStr(PASSWORD)


def with_missed_changes(cache: StoppedCache) -> StoppedCache:
    with filled(cache).running() as manager:
        miss_changes(manager)
    assert cache.missed_changes.exists()
    return cache


def served(cache: StoppedCache, **fields: object) -> dict[str, tuple[object, ...]]:
    """What a cache that is started now serves, in any order."""
    with cache.running(**fields) as manager:
        found = manager.list_entries("", 100, EntryFilter())
    return {entry.key: (entry.source, entry.version, entry.username, entry.password) for entry in found}


def killed_while_rotated(cache: StoppedCache) -> Iterator[StoppedCache]:
    """Rotate the key; then what a kill before each of the steps would have left, one after the other."""
    copies: list[StoppedCache] = []
    seen: dict[str, bytes] = {}

    def keep(_step: str) -> None:
        nonlocal seen
        if (state := contents(cache.directory)) != seen:
            seen = state
            copies.append(cache.copy(f"killed-{len(copies)}"))

    with stepping(keep):
        rotate_key(cache.config())
    assert len(copies) > 5
    for copy in copies:
        yield copy
        shutil.rmtree(copy.directory)
