"""What the cache's tests share: clocks that stand still, entries, tiers that fail, and looks at files."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from proxystash_server.cache import (
    CacheEntry,
    CacheManager,
    CacheTier,
    CacheTierConfig,
    CacheTierType,
    DiskTier,
    EntryFilter,
    HealthMonitoring,
    HealthStatus,
)
from proxystash_server.cache.coherence.guard import GuardedTier
from proxystash_server.cache.entry.entry import make_entry, read_address, stamped
from proxystash_server.cache.errors import TierError
from proxystash_server.cache.tiers.base import whole_page

START_US = 1_800_000_000_000_000
HOUR = 3600
EVERYTHING = "*"
USERNAME = "jane-the-username"
PASSWORD = "correct-horse-battery"

Result = TypeVar("Result")


class FakeClock:
    """Microseconds since the epoch; time passes when a test says so, or by `tick_us` at every look."""

    def __init__(self, now_us: int = START_US) -> None:
        self.now_us = now_us
        self.tick_us = 0

    def __call__(self) -> int:
        self.now_us += self.tick_us
        return self.now_us

    def advance(self, seconds: float) -> None:
        self.now_us += round(seconds * 1_000_000)


class FakeMonotonic:
    """Seconds from an arbitrary start; time passes when a test says so."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


def bounded(max_entries: int | None = None, policy: str = "lru") -> CacheTierConfig:
    return CacheTierConfig.model_validate({"max_entries": max_entries, "eviction_policy": policy})


SWITCHED_OFF = CacheTierConfig(enabled=False)


def stored(
    key: str = "key-1",
    *,
    version: int = 1,
    proxy_url: str = "http://192.0.2.1:8080",
    username: str | None = None,
    password: str | None = None,
    source: str = "",
    ttl: float = HOUR,
    last_accessed_us: int = START_US,
    access_count: int = 0,
    health_status: HealthStatus = HealthStatus.UNKNOWN,
    failure_count: int = 0,
    evicted_from_l1: bool = False,
    health_monitoring: HealthMonitoring | None = None,
    labels: Mapping[str, str] | None = None,
    max_leases: int = 0,
) -> CacheEntry:
    """An entry as the manager hands it to a tier: valid, and numbered by the write that stores it."""
    entry = make_entry(
        read_address(proxy_url),
        key=key,
        username=username,
        password=password,
        source=source,
        fetch_time_us=START_US,
        expires_at_us=START_US + round(ttl * 1_000_000),
        last_accessed_us=last_accessed_us,
        access_count=access_count,
        health_status=health_status,
        failure_count=failure_count,
        evicted_from_l1=evicted_from_l1,
        health_monitoring=health_monitoring,
        labels=labels or {},
        max_leases=max_leases,
    )
    return stamped(entry, key, version, failure_count, None)


def put(manager: CacheManager, *keys: str, **fields: Any) -> list[CacheEntry]:
    """Put an entry under each key, through the manager; the entries."""
    entries = [
        manager.new_entry(f"http://192.0.2.1:{8080 + number}", key=key, **fields)
        for number, key in enumerate(keys)
    ]
    for entry in entries:
        assert manager.put(entry.key, entry), f"no tier took {entry.key}"
    return entries


def stored_in(manager: CacheManager, key: str, entry: CacheEntry) -> tuple[CacheTierType, ...]:
    """Put an entry under a key: the tiers that hold it now."""
    [tiers] = manager.put_many([entry.model_copy(update={"key": key})])
    return tiers


def guards_of(manager: CacheManager) -> tuple[GuardedTier[DiskTier], GuardedTier[DiskTier]]:
    """L2 and L3 with their breakers."""
    l2, l3 = manager._reads.guards
    return l2, l3


def missed_by_authority(manager: CacheManager) -> list[str]:
    """The keys whose last change the slowest tier has missed; EVERYTHING for a Clear."""
    missed = manager._authority.missed
    return [*([EVERYTHING] if missed.cleared_at else []), *missed.keys()]


def page(tier: CacheTier, after: str, limit: int, entry_filter: EntryFilter, now_us: int) -> list[CacheEntry]:
    """The first `limit` live entries of a tier that match, by key, however many have to be looked at."""
    return whole_page(lambda place, rest: tier.scan(place, rest, entry_filter, now_us), after, limit)


def content_of(manager: CacheManager) -> dict[str, tuple[str, int]]:
    """What the cache holds: for each key the source and the failure count."""
    return {
        entry.key: (entry.source, entry.failure_count)
        for entry in manager.list_entries("", 1000, EntryFilter())
    }


def content_of_tier(tier: CacheTier) -> dict[str, tuple[str, int]]:
    """The same of one tier."""
    entries = [tier.get(key) for key in tier.keys()]  # noqa: SIM118 -- no dict
    return {entry.key: (entry.source, entry.failure_count) for entry in entries if entry is not None}


def check_disk_tiers(manager: CacheManager, expected: dict[str, tuple[str, int]]) -> None:
    """Assert that L3 holds just this, and L2, which refills from use, nothing else than this."""
    assert content_of_tier(manager.l3_tier) == expected
    assert content_of_tier(manager.l2_tier).items() <= expected.items()
    assert not missed_by_authority(manager)
    assert not manager._cache.doubted


# -- tiers that fail

WRITES = frozenset(
    [
        "apply",
        "commit",
        "put",
        "delete",
        "note_uses",
        "clear",
        "clear_before",
        "trim",
        "note",
        "seal",
        "break_seal",
        "probe",
        "maintain",
        "open",
    ]
)
READS = frozenset(["get", "scan", "keys", "versions", "expired_keys", "__contains__"])
EVERY_OPERATION = WRITES | READS


def break_tier(
    tier: CacheTier, operations: Collection[str] = EVERY_OPERATION, *, after_doing_it: bool = False
) -> None:
    """Make operations of one tier fail from now on, like a disk that is full or gone.

    `after_doing_it` makes the fault the worse kind: the operation happens, and then its outcome gets lost.
    """
    intact = type(tier)

    def failing(name: str) -> Callable[..., Any]:
        def operation(self: CacheTier, *args: Any, **kwargs: Any) -> Any:
            if after_doing_it:
                getattr(intact, name)(self, *args, **kwargs)
            raise TierError(f"{name}: a fault made by the test")

        return operation

    broken = {name: failing(name) for name in operations if hasattr(intact, name)}
    tier.__class__ = type(f"Broken{intact.__name__}", (intact,), broken)


def repair_tier(tier: CacheTier) -> None:
    """Undo `break_tier`."""
    while type(tier).__name__.startswith("Broken"):
        tier.__class__ = type(tier).__mro__[1]


@contextmanager
def broken(
    tier: CacheTier, operations: Collection[str] = EVERY_OPERATION, *, after_doing_it: bool = False
) -> Iterator[None]:
    """A tier that fails for a while. Its breaker is the manager's affair."""
    break_tier(tier, operations, after_doing_it=after_doing_it)
    try:
        yield
    finally:
        repair_tier(tier)


@contextmanager
def journal_broken(manager: CacheManager) -> Iterator[None]:
    """What L3 has missed cannot be written down either, as on a disk that all of them share."""

    def fail(*_args: object) -> None:
        raise TierError("a fault made by the test")

    missed = manager._authority.missed
    with mock.patch.object(missed, "append", fail), mock.patch.object(missed, "append_clear", fail):
        yield


@contextmanager
def nothing_writable(manager: CacheManager, operations: Collection[str] = EVERY_OPERATION) -> Iterator[None]:
    """Both disk tiers fail for a while, and so does the journal."""
    with (
        broken(manager.l2_tier, operations),
        broken(manager.l3_tier, operations),
        journal_broken(manager),
    ):
        yield


def fail_until_skipped(manager: CacheManager, tier: DiskTier) -> None:
    """Let a broken tier fail as often as it takes for the manager to skip it."""
    guard = next(guard for guard in guards_of(manager) if guard.tier is tier)
    for _ in range(3):
        guard.attempt("read", None, tier.get, "whatever")
    assert guard.breaker.is_open


# -- files


def scratch_directory() -> Path | None:
    """Where to make directories: in memory if possible, since small stores by the hundred need no medium."""
    in_memory = Path("/dev/shm")
    return in_memory if os.access(in_memory, os.W_OK) else None


def make_unreachable(directory: Path) -> Path:
    """Put a file where a tier's directory should be, as an unmounted disk may look."""
    hidden = directory.with_name(directory.name + "-elsewhere")
    directory.rename(hidden)
    directory.write_text("not a directory")
    return hidden


def make_reachable(directory: Path, hidden: Path) -> None:
    directory.unlink()
    hidden.rename(directory)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory with its bytes."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        # The note of whoever was killed: the next, even if it is refused, takes it away.
        if path.is_file() and path.name != "lock"
    }


def fingerprint(directory: Path) -> dict[str, tuple[bytes, int, int]]:
    """Every file below a directory with its bytes, its time of change and its mode.

    Of SQLite's `-shm` files the mode alone: an index that whoever reads the write-ahead log makes anew.
    """
    found = {}
    for name, content in contents(directory).items():
        status = (directory / name).stat()
        known = not name.endswith("-shm")
        found[name] = (content if known else b"", status.st_mtime_ns if known else 0, status.st_mode)
    return found


def flip_byte(path: Path, offset: int) -> None:
    """Damage one byte of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x01
    path.write_bytes(data)


# -- threads


def run_in_threads(*jobs: Callable[[], Result]) -> list[Result]:
    """Run the jobs at the same time, all started together; their results, or the first error."""
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], Result]) -> Result:
        start.wait(30)
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(60) for future in [pool.submit(run, job) for job in jobs]]


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for what another thread is to bring about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        threading.Event().wait(0.002)


def keys_of(entries: Iterable[CacheEntry]) -> list[str]:
    return [entry.key for entry in entries]
