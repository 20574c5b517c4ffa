"""proxywhirl 0.3.3 as a library, with its defaults, for the worker in its own environment."""

from __future__ import annotations

import json
import random
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from loguru import logger
from proxywhirl.cache import CacheConfig, CacheEntry, CacheManager, CacheTierConfig
from proxywhirl.cache.models import L2BackendType

from tests.benchmarks.made_up import SOURCE, TTL_SECONDS, key_of, proxy_url
from tests.benchmarks.worker import Batch


class ProxywhirlSide:
    """A store of `entries` made-up proxies. Its log is off: writing it would cost more than a get."""

    def __init__(self, folder: str, backend: str, entries: int) -> None:
        logger.remove()
        self._folder = Path(folder)
        self._backend = L2BackendType(backend)
        self._entries = entries
        self._random = random.Random(1)
        self._next = entries
        self._manager: Any = None

    def fill(self) -> None:
        """Build the store, minutes faster than its puts would, and open it as it would be after them."""
        connect = sqlite3.connect

        def connect_unsynced(*arguments: Any, **options: Any) -> sqlite3.Connection:
            connection: sqlite3.Connection = connect(*arguments, **options)
            connection.execute("PRAGMA synchronous=OFF")
            return connection

        sqlite3.connect = connect_unsynced  # type: ignore[assignment]
        manager = self._open(CacheTierConfig(max_entries=None))
        shards: dict[int, dict[str, Any]] = {}
        if self._backend is L2BackendType.JSONL:
            # It writes a whole file for each put: kept in memory until the last one.
            manager.l2_tier._read_shard = lambda shard: shards.setdefault(shard, {})
            manager.l2_tier._write_shard = lambda shard, records: bool(shards.setdefault(shard, records))
        entries = [self._entry(number) for number in range(self._entries)]
        for entry in entries:
            manager.put(entry.key, entry)
        for shard, records in shards.items():
            lines = "".join(json.dumps(record) + "\n" for record in records.values())
            manager.l2_tier._get_shard_path(shard).write_text(lines)
        if self._backend is L2BackendType.SQLITE:
            manager.l2_tier.close()
        sqlite3.connect = connect
        self._manager = self._open(CacheConfig().l1_config)
        for entry in entries[-self._manager.config.l1_config.max_entries :]:
            self._manager.l1_tier.put(entry.key, entry)

    def batch(self, operation: str, count: int) -> Batch | None:
        prepared: Batch = getattr(self, f"_{operation}")(count)
        return prepared

    def hits(self) -> tuple[int, int]:
        statistics = self._manager.statistics
        return statistics.l1_stats.hits, statistics.l2_stats.hits + statistics.l3_stats.hits

    def close(self) -> None:
        """Nothing to do: every operation has written what it has to."""

    def _l1_get(self, count: int) -> Batch:
        keys = self._random.choices(self._manager.l1_tier.keys(), k=count)
        return Batch(self._manager.get, [(key,) for key in keys], (count, 0))

    def _below_get(self, count: int) -> Batch:
        below = sorted(set(self._manager.l2_tier.keys()) - set(self._manager.l1_tier.keys()))
        return Batch(self._manager.get, [(key,) for key in self._random.sample(below, count)], (0, count))

    def _miss(self, count: int) -> Batch:
        return Batch(self._manager.get, [(f"{number:016x}",) for number in range(count)], (0, 0))

    def _put(self, count: int) -> Batch:
        entries = [self._entry(number) for number in range(self._next, self._next + count)]
        self._next += count
        return Batch(self._manager.put, [(entry.key, entry) for entry in entries])

    def _invalidate(self, count: int) -> Batch:
        keys = self._random.sample(sorted(self._manager.l1_tier.keys()), count)
        for key in keys:
            # So that none of them reaches the threshold, whatever happened to it before.
            entry = self._manager.l1_tier.get(key)
            self._manager.l1_tier.put(key, entry.model_copy(update={"failure_count": 0}))
        return Batch(self._manager.invalidate_by_health, [(key,) for key in keys], (0, 0))

    def _open(self, l1: CacheTierConfig) -> Any:
        paths = {"l2_cache_dir": str(self._folder / "l2"), "l3_database_path": str(self._folder / "l3.db")}
        return CacheManager(CacheConfig(l1_config=l1, l2_backend=self._backend, **paths))

    @staticmethod
    def _entry(number: int) -> Any:
        now = datetime.now(UTC)
        return CacheEntry(
            key=key_of(number),
            proxy_url=proxy_url(number),
            username=None,
            password=None,
            source=SOURCE,
            fetch_time=now,
            last_accessed=now,
            ttl_seconds=TTL_SECONDS,
            expires_at=now + timedelta(seconds=TTL_SECONDS),
        )
