"""What the tests of the import share: what proxywhirl wrote, and a look at what became of it."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from proxystash_server.cache import CacheConfig, CacheEntry, CacheManager, EntryFilter
from proxystash_server.cache.entry.entry import to_microseconds
from proxystash_server.proxywhirl_import.importer import import_stores
from proxystash_server.proxywhirl_import.keyring import Keyring
from proxystash_server.proxywhirl_import.report import ImportReport
from proxystash_server.proxywhirl_import.stores import find_stores

FIXTURES: Final = Path(__file__).parent / "fixtures"
SHARDS: Final = FIXTURES / "jsonl" / "proxies"
L2_DATABASE: Final = FIXTURES / "sqlite" / "proxies" / "l2_cache.db"
L3_DATABASE: Final = FIXTURES / "sqlite" / "db" / "proxywhirl.db"
KILLED: Final = FIXTURES / "killed"

_MANIFEST: Final = json.loads((FIXTURES / "manifest.json").read_text())
GENERATED: Final = datetime.fromisoformat(_MANIFEST["generated_at"])
CURRENT_KEY: Final[str] = _MANIFEST["current_key"]
PREVIOUS_KEY: Final[str] = _MANIFEST["previous_key"]
BOTH_KEYS: Final = Keyring([CURRENT_KEY.encode(), PREVIOUS_KEY.encode()])

# Every secret that went into the fixtures; those of lost keys, too.
SECRETS: Final = (
    CURRENT_KEY,
    PREVIOUS_KEY,
    "current-password",
    "previous-password",
    "gateway-password",
    "newer-password",
    "older-password",
    "lost-secret",
    "in%40url",
    "in@url",
    "token-username",
    "leaked-in-error",
)

_TIMES: Final = ("fetch_time", "last_accessed", "expires_at", "last_health_check", "next_check_time")


def fixture_clock() -> int:
    """An hour after proxywhirl wrote the fixtures: nothing expires as the years go by."""
    return to_microseconds(GENERATED + timedelta(hours=1))


@dataclass
class Target:
    """A data directory to import into."""

    directory: Path

    def config(self, **fields: Any) -> CacheConfig:
        return CacheConfig.model_validate(
            {
                "l2_cache_dir": self.directory / "l2",
                "l3_database_path": self.directory / "l3" / "proxystash.db",
                "encryption_key_file": self.directory / "secret.key",
                **fields,
            }
        )

    @contextmanager
    def manager(self, **fields: Any) -> Iterator[CacheManager]:
        with CacheManager(self.config(**fields), clock=fixture_clock, background=False) as manager:
            yield manager

    def take(
        self, *sources: Path, keyring: Keyring = BOTH_KEYS, without_credentials: bool = False, **fields: Any
    ) -> ImportReport:
        """Import `sources` as of the time of the fixtures; the report's counts must add up."""
        report = import_stores(
            find_stores(sources),
            self.config(**fields),
            keyring,
            without_credentials=without_credentials,
            clock=fixture_clock,
        )
        for file in report.files:
            assert file.read == file.imported + file.count("skipped") + file.count("failed"), file
        return report

    def entries(self, **fields: Any) -> dict[str, CacheEntry]:
        """What is stored, by `username@host`, or `host` where there is no username."""
        with self.manager(**fields) as manager:
            listed = manager.list_entries("", 1000, EntryFilter())
        return {_name(entry): entry for entry in listed}


def _name(entry: CacheEntry) -> str:
    host = entry.proxy_url.partition("://")[2]
    return host if entry.username is None else f"{entry.username.get_secret_value()}@{host}"


def secret(value: Any) -> str | None:
    return None if value is None else value.get_secret_value()


def reasons(report: ImportReport) -> Counter[tuple[str, str]]:
    """How many records were not imported, by kind and reason, over all files."""
    counted: Counter[tuple[str, str]] = Counter()
    for file in report.files:
        for reason in file.reasons:
            counted[reason.kind, reason.text] += reason.count
    return counted


def snapshot(directory: Path) -> dict[str, tuple[int, int, str]]:
    """Every file and directory below, with size, modification time and content."""
    return {
        str(path.relative_to(directory)): (
            path.stat().st_size if path.is_file() else 0,
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in [directory, *sorted(directory.rglob("*"))]
    }


def edit(database: Path, statement: str, *parameters: Any) -> None:
    """Change a copy of a fixture, as a later run of proxywhirl might have."""
    with closing(sqlite3.connect(database)) as connection, connection:
        assert connection.execute(statement, parameters).rowcount > 0


def copy_of(source: Path, directory: Path) -> Path:
    """A copy of a store that a test may change."""
    copy = directory / source.name
    if source.is_dir():
        return Path(shutil.copytree(source, copy))
    copy.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(source, copy))


def as_if_written_now(name: str, directory: Path) -> Path:
    """A copy of one of the fixtures with all its times moved, for processes, whose clock is the real one."""
    copy = copy_of(FIXTURES / name, directory)
    shift = datetime.now(UTC) - GENERATED
    for shard in copy.rglob("*.jsonl"):
        records = [json.loads(line) for line in shard.read_text().splitlines()]
        shard.write_text("".join(json.dumps(_shifted(record, shift)) + "\n" for record in records))
    for database in copy.rglob("*.db"):
        with closing(sqlite3.connect(database)) as connection, connection:
            for (table,) in connection.execute(
                "SELECT name FROM sqlite_master WHERE name IN ('l2_cache', 'cache_entries')"
            ).fetchall():
                columns = {column for _, column, *_ in connection.execute(f"PRAGMA table_info({table})")}
                changes = ", ".join(f"{time} = {time} + :shift" for time in _TIMES if time in columns)
                connection.execute(f"UPDATE {table} SET {changes}", {"shift": shift / timedelta(seconds=1)})
    return copy


def _shifted(record: dict[str, Any], shift: timedelta) -> dict[str, Any]:
    moved = {
        name: (datetime.fromisoformat(record[name]) + shift).isoformat()
        for name in _TIMES
        if record.get(name) is not None
    }
    return record | moved
