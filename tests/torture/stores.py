"""Small caches for torture: directories, configurations, entries that prove what they are, drivers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, Protocol
from unittest import mock

import proxystash
from proxystash_server.cache import (
    CacheConfig,
    CacheEntry,
    CacheManager,
    CacheTier,
    CacheTierConfig,
    CacheUnavailableError,
    EntryFilter,
    HealthStatus,
    L2BackendType,
)
from tests.torture.model import Invalidated, Seen

BACKENDS: Final = tuple(L2BackendType)
SECOND_US: Final = 1_000_000
_IN_MEMORY: Final = Path("/dev/shm")


class FakeClock:
    """Microseconds since the epoch; time passes when a test says so."""

    def __init__(self) -> None:
        self.now_us = 1_800_000_000_000_000

    def __call__(self) -> int:
        return self.now_us


class FakeMonotonic:
    """Seconds from an arbitrary start; time passes when a test says so."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@contextmanager
def temporary_directory() -> Iterator[Path]:
    """A directory in memory where there is such a thing: nothing here cuts the power."""
    parent = _IN_MEMORY if os.access(_IN_MEMORY, os.W_OK) else None
    with TemporaryDirectory(prefix="proxystash-torture-", dir=parent) as directory:
        yield Path(directory)


def make_config(
    directory: Path,
    l2_backend: L2BackendType,
    *,
    l1: CacheTierConfig | None = None,
    l2: CacheTierConfig | None = None,
    l3: CacheTierConfig | None = None,
    threshold: int = 3,
) -> CacheConfig:
    """A configuration of everything inside `directory`, its key file included."""
    return CacheConfig(
        l1_config=CacheTierConfig(max_entries=3) if l1 is None else l1,
        l2_config=CacheTierConfig() if l2 is None else l2,
        l3_config=CacheTierConfig() if l3 is None else l3,
        l2_backend=l2_backend,
        l2_cache_dir=directory / "l2",
        l3_database_path=directory / "l3" / "proxystash.db",
        encryption_key_file=directory / "secret.key",
        failure_threshold=threshold,
    )


@contextmanager
def eager_compaction() -> Iterator[None]:
    """Let a file be compacted when little of it is garbage."""
    with mock.patch("proxystash_server.cache.tiers.jsonl.tier._GARBAGE_WORTH_COMPACTING", 512):
        yield


def l3_knows_all(manager: CacheManager) -> bool:
    """Whether L3 works, has missed nothing, and has lost nothing: then whatever is asked has one answer."""
    return manager._authority.knows_all and not manager._authority.is_incomplete


def is_complete(manager: CacheManager) -> bool:
    """Whether nothing is wrong any more: L3 knows all, L2 works, and all that it holds may be asked for."""
    cache = manager._cache
    return l3_knows_all(manager) and cache.works and not cache.doubted


def disagreements(manager: CacheManager) -> list[str]:
    """Where the tiers of an idle manager contradict each other or themselves.

    Whoever answers for a key must have what L3 has, unless L3 has missed the last change of that key.
    """
    authority, cache, missed = manager._authority, manager._cache, manager._authority.missed
    if not authority.works:
        return []
    tiers = [manager.l1_tier, *([manager.l2_tier] if cache.works else []), manager.l3_tier]
    held = {tier: _versions(tier) for tier in tiers}
    in_l3 = held[manager.l3_tier]
    found = [
        f"{tier.tier_type} holds version {version} of {key!r}, L3 {in_l3.get(key)}"
        for tier, versions in held.items()
        for key, version in versions.items()
        if version != in_l3.get(key)
        and not missed.covers(key)
        and (tier is not cache.tier or cache.serves(key))
    ]
    found += [
        f"{tier.tier_type} says that it holds {tier.size()} entries, and holds {len(versions)}"
        for tier, versions in held.items()
        if tier.size() != len(versions)
    ]
    if missed.path.exists() and not missed.pending:
        found.append("the journal is there, though L3 has missed nothing")
    return found


def _versions(tier: CacheTier) -> dict[str, int]:
    entries = map(tier.get, tier.keys())
    return {entry.key: entry.version for entry in entries if entry is not None}


# -- entries that prove what they are: the tag stands in the source, in a label, and in the password


def credentials_of(key: str, tag: str) -> tuple[str, str] | tuple[None, None]:
    """Username and password of a tag; every second tag has none."""
    return (f"user-{key}", f"secret-{tag}") if tag[-1] in "02468" else (None, None)


def seen_in(entry: CacheEntry) -> Seen:
    """What the entry tells; an assertion fails if its parts belong to different puts."""
    password = entry.password.get_secret_value() if entry.password is not None else None
    _check_parts(entry.key, entry.source, entry.labels.get("tag"), password)
    return Seen(entry.source, entry.failure_count)


def _check_parts(key: str, tag: str, label: str | None, password: str | None) -> None:
    assert label == tag, f"entry {key!r} is a mixture: source {tag!r}, label {label!r}"
    assert password == credentials_of(key, tag)[1], f"entry {key!r} of {tag!r} has the credentials of another"


# -- drivers: one vocabulary for the library and the server


class RefusedError(Exception):
    """The operation was answered "unavailable"; it may have happened all the same."""


class Driver(Protocol):
    """What can be asked of a cache. Every method may raise RefusedError."""

    def put(
        self, keys: Sequence[str], tag: str, *, ttl_seconds: int, failures: int = 0, healthy: bool = False
    ) -> list[tuple[str, ...]]:
        """Put an entry of `tag` under each key; for each the tiers that hold it."""

    def delete(self, key: str) -> bool:
        """Whether it was there."""

    def clear(self) -> int:
        """How many there were."""

    def invalidate(self, key: str) -> Invalidated:
        """What that did."""

    def get(self, keys: Sequence[str]) -> list[Seen | None]:
        """What each key holds."""

    def list(self) -> dict[str, Seen]:
        """What every key holds."""


def _url(key: str) -> str:
    return f"http://{key}.example:8080"


class LibraryDriver:
    """Drives a manager. One key goes through lookup, several through its batch."""

    def __init__(self, manager: CacheManager) -> None:
        self.manager = manager

    def put(
        self, keys: Sequence[str], tag: str, *, ttl_seconds: int, failures: int = 0, healthy: bool = False
    ) -> list[tuple[str, ...]]:
        entries = [
            self.manager.new_entry(
                _url(key),
                key=key,
                source=tag,
                ttl_us=ttl_seconds * SECOND_US,
                failure_count=failures,
                health_status=HealthStatus.HEALTHY if healthy else HealthStatus.UNKNOWN,
                labels={"tag": tag},
                username=credentials_of(key, tag)[0],
                password=credentials_of(key, tag)[1],
            )
            for key in keys
        ]
        return list(self.manager.put_many(entries))

    def delete(self, key: str) -> bool:
        with _refusals():
            return self.manager.delete(key)

    def clear(self) -> int:
        with _refusals():
            return self.manager.clear()

    def invalidate(self, key: str) -> Invalidated:
        with _refusals():
            done = self.manager.invalidate_by_health(key)
        return Invalidated(done.found, done.evicted, done.failure_count)

    def get(self, keys: Sequence[str]) -> list[Seen | None]:
        with _refusals():
            if len(keys) == 1:
                entry = self.manager.get(keys[0])
                return [None if entry is None else seen_in(entry)]
            lookups = self.manager.lookup_many(keys)
        return [None if entry is None else seen_in(entry) for entry in lookups.entries]

    def list(self) -> dict[str, Seen]:
        seen: dict[str, Seen] = {}
        after = ""
        with _refusals():
            # Small pages, so that a listing has several.
            while page := self.manager.list_entries(after, 3, EntryFilter()):
                seen.update((entry.key, seen_in(entry)) for entry in page)
                after = page[-1].key
        return seen


class RpcDriver:
    """Drives a server through the Python client, which repeats nothing."""

    def __init__(self, client: proxystash.Client) -> None:
        self.client = client

    def put(
        self, keys: Sequence[str], tag: str, *, ttl_seconds: int, failures: int = 0, healthy: bool = False
    ) -> list[tuple[str, ...]]:
        entries = [
            proxystash.CacheEntry(
                proxy_url=_url(key),
                key=key,
                source=tag,
                ttl=timedelta(seconds=ttl_seconds),
                failure_count=failures,
                health_status=proxystash.HealthStatus.HEALTHY if healthy else proxystash.HealthStatus.UNKNOWN,
                labels={"tag": tag},
                username=credentials_of(key, tag)[0],
                password=credentials_of(key, tag)[1],
            )
            for key in keys
        ]
        with _refusals():
            if len(entries) == 1:
                return [tuple(self.client.put(entries[0]).stored_in)]
            results = self.client.put_many(entries)
        stored: list[tuple[str, ...]] = []
        for result in results:
            assert isinstance(result, proxystash.PutResult), result
            stored.append(tuple(result.stored_in))
        return stored

    def delete(self, key: str) -> bool:
        with _refusals():
            return self.client.delete(key)

    def clear(self) -> int:
        with _refusals():
            return self.client.clear()

    def invalidate(self, key: str) -> Invalidated:
        with _refusals():
            done = self.client.invalidate_by_health(key)
        return Invalidated(done.found, done.evicted, done.failure_count)

    def get(self, keys: Sequence[str]) -> list[Seen | None]:
        with _refusals():
            if len(keys) == 1:
                found = [self.client.get(keys[0])]
            else:
                found = self.client.get_many(keys)
        return [None if one is None else _seen_by_client(one.entry) for one in found]

    def list(self) -> dict[str, Seen]:
        with _refusals():
            entries = list(self.client.list(include_credentials=True, page_size=3))
        return {entry.key: _seen_by_client(entry) for entry in entries}


def _seen_by_client(entry: proxystash.CacheEntry) -> Seen:
    _check_parts(entry.key, entry.source, entry.labels.get("tag"), entry.password)
    return Seen(entry.source, entry.failure_count)


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except (CacheUnavailableError, proxystash.UnavailableError, proxystash.DeadlineExceededError) as error:
        raise RefusedError(str(error)) from error


def numbered_keys(count: int) -> list[str]:
    """`count` keys."""
    return [f"k{number}" for number in range(count)]


def all_of(keys: Iterable[str], seen: dict[str, Seen]) -> list[tuple[str, Seen | None]]:
    """What a listing says of each key."""
    return [(key, seen.get(key)) for key in keys]
