"""What the tests of the tools for a stopped store share: a directory, and ways to fill it and look in."""

from __future__ import annotations

import json
import shutil
import sqlite3
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.fernet import Fernet
from pydantic import SecretStr

from proxystash_server.cache import (
    CacheConfig,
    CacheEntry,
    CacheManager,
    CacheTierConfig,
    CacheTierType,
    CredentialEncryptor,
    L2BackendType,
    SQLiteCacheTier,
)
from proxystash_server.cache.stopped.check import check_store
from proxystash_server.cache.stopped.repair import repair_store
from proxystash_server.cache.stopped.report import Report
from proxystash_server.cache.tiers.sqlite.record import COLUMNS, CONTENT_LENGTH, checksum
from tests.server.cache.format_1 import turn_into_format_1, turn_jsonl_into_format_1
from tests.server.cache.support import PASSWORD, USERNAME, put

KEYS = tuple(f"key-{number}" for number in range(24))
SEALED = KEYS[::3]
# What damage is done to.
VICTIM = SEALED[2]


class StoppedCache:
    """A data directory, and the caches that run on it one after another; none of them between two calls."""

    def __init__(self, directory: Path, l2_backend: L2BackendType) -> None:
        self.directory = directory
        self.l2_backend = l2_backend
        self.settings: dict[str, Any] = {}

    @property
    def l2(self) -> Path:
        """L2's directory."""
        return self.directory / "l2"

    @property
    def l2_database(self) -> Path:
        return self.l2 / "l2.db"

    @property
    def l3(self) -> Path:
        """L3's database."""
        return self.directory / "l3" / "proxystash.db"

    @property
    def l2_place(self) -> str:
        """What a finding says of where L2 is."""
        return str(self.l2 if self.l2_backend is L2BackendType.JSONL else self.l2_database)

    @property
    def missed_changes(self) -> Path:
        """The journal of what the slowest tier has missed."""
        return self.directory / "missed-changes.jsonl"

    @property
    def key_file(self) -> Path:
        return self.directory / "secret.key"

    def config(self, **fields: Any) -> CacheConfig:
        return CacheConfig.model_validate(
            {
                "l2_backend": self.l2_backend,
                "l2_cache_dir": self.l2,
                "l3_database_path": self.l3,
                "encryption_key_file": self.key_file,
                **self.settings,
                **fields,
            }
        )

    @contextmanager
    def running(self, **fields: Any) -> Iterator[CacheManager]:
        """A cache in which nothing happens by itself, stopped in an orderly way at the end."""
        with CacheManager(self.config(**fields), background=False) as manager:
            yield manager

    def fill(self) -> StoppedCache:
        """Put an entry under each of KEYS; those of SEALED have credentials."""
        with self.running() as manager:
            fill(manager)
        return self

    def begin_l3(self) -> None:
        """Make the database as far as a first start that is killed before it looks at L2."""
        encryptor = CredentialEncryptor(self.key_file.read_bytes().strip())
        tier = SQLiteCacheTier(CacheTierConfig(), CacheTierType.L3, self.l3, encryptor)
        tier.open()
        tier.close()

    def entries(self, **fields: Any) -> dict[str, CacheEntry]:
        """What a cache that is started now serves."""
        with self.running(**fields) as manager:
            found = {key: manager.get(key) for key in KEYS}
        return {key: entry for key, entry in found.items() if entry is not None}

    def check(self, **fields: Any) -> Report:
        return check_store(self.config(**fields))

    def repair(self, **fields: Any) -> dict[str, int]:
        return dict(repair_store(self.config(**fields)).done)

    def turn_into_format_1(self) -> None:
        """Put in the place of both stores ones of format 1 with the same content."""
        turn_into_format_1(self.l3)
        if self.l2_backend is L2BackendType.SQLITE:
            turn_into_format_1(self.l2_database)
        else:
            turn_jsonl_into_format_1(self.l2)

    def copy(self, name: str) -> StoppedCache:
        """The same files elsewhere: what a kill at this moment would leave, but for the lock."""
        copy = StoppedCache(self.directory.with_name(name), self.l2_backend)
        copy.settings = self.settings
        shutil.copytree(self.directory, copy.directory, ignore=shutil.ignore_patterns("*-shm", "lock"))
        return copy

    # -- looking into files, and changing them

    def sql(self, database: Path, statement: str, *values: object) -> list[tuple[Any, ...]]:
        return sql(database, statement, *values)

    @property
    def l2_file(self) -> Path:
        """The file of the JSONL store."""
        return self.l2 / "entries.jsonl"

    def bytes(self) -> bytes:
        """Everything in every file."""
        return b"".join(path.read_bytes() for path in sorted(self.directory.rglob("*")) if path.is_file())


def fill(manager: CacheManager) -> None:
    """Put an entry under each of KEYS; those of SEALED have credentials."""
    manager.put_many(
        [
            manager.new_entry(
                f"http://192.0.2.1:{8000 + number}",
                key=key,
                source=f"source-{key}",
                labels={"number": str(number)},
                username=USERNAME if key in SEALED else None,
                password=PASSWORD if key in SEALED else None,
            )
            for number, key in enumerate(KEYS)
        ]
    )


def expired(key: str) -> CacheEntry:
    """An entry whose time was over long ago."""
    return CacheEntry(key, "http://192.0.2.1:1", fetch_time=datetime(2000, 1, 1, tzinfo=UTC), ttl_seconds=60)


def sql(database: Path, statement: str, *values: object) -> list[tuple[Any, ...]]:
    """Run a statement on a database, as an operator might."""
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        return connection.execute(statement, values).fetchall()


def miss_changes(manager: CacheManager) -> None:
    """Make changes that the slowest tier misses: a new entry, a replaced one, and a removal."""
    manager._authority.guard.breaker.force_open()
    put(manager, "missed", KEYS[1], source="missed", username=USERNAME, password=PASSWORD)
    manager.delete(KEYS[2])


def set_content(column: str, value: object, key: str = VICTIM) -> Callable[[Path], object]:
    """Change a row together with its checksum."""

    def change(path: Path) -> None:
        sql(path, f"UPDATE entries SET {column} = ? WHERE key = ?", value, key)
        [row] = sql(path, f"SELECT {COLUMNS} FROM entries WHERE key = ?", key)
        sql(path, "UPDATE entries SET checksum = ? WHERE key = ?", checksum(row[:CONTENT_LENGTH]), key)

    return change


def foreign_token() -> str:
    """A credential that was sealed under a key that nobody has."""
    return CredentialEncryptor(Fernet.generate_key()).encrypt(SecretStr("secret")).decode()


def facts(entries: Mapping[str, CacheEntry]) -> dict[str, tuple[object, ...]]:
    """What was put of each entry."""
    return {
        key: (entry.proxy_url, entry.source, entry.expires_at, entry.labels, entry.username, entry.password)
        for key, entry in entries.items()
    }


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a file as JSON."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def edit_line(path: Path, key: str, change: Callable[[bytes], bytes]) -> None:
    """Change the line of an entry in a JSONL store."""
    lines = path.read_bytes().splitlines(keepends=True)
    place = next(number for number, line in enumerate(lines) if f'"key":"{key}"'.encode() in line)
    lines[place] = change(lines[place])
    path.write_bytes(b"".join(lines))


def edit_record(path: Path, key: str, **fields: Any) -> None:
    """Change what the line of an entry says, with a checksum that fits."""

    def change(line: bytes) -> bytes:
        record = {**json.loads(line), **fields}
        del record["crc"]
        body = json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode()[:-1]
        return b'%b,"crc":"%08x"}\n' % (body, zlib.crc32(body))

    edit_line(path, key, change)


def kinds(report: Report) -> dict[str, int]:
    """How many faults of each kind a report has."""
    return {kind: report.counts[kind] for kind in {fault.kind for fault in report.faults}}


def note_kinds(report: Report) -> set[str]:
    return {note.kind for note in report.notes}


def told(report: Report) -> str:
    """Every word of a report."""
    return json.dumps(report.to_json())


BOUNDED = CacheTierConfig(max_entries=10)
