"""No file descriptor left, for which no tier is to blame, and connections that would take them all."""

from __future__ import annotations

import socket
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from proxystash.v1 import cache_service_pb2 as pb
from proxystash.v1 import cache_service_pb2_grpc as pb_grpc
from proxystash_server.cache import (
    CacheManager,
    CacheTierConfig,
    CacheTierType,
    TierState,
)
from proxystash_server.cache.tiers.sqlite.database import Database
from proxystash_server.cache.tiers.sqlite.tier import SQLiteCacheTier
from tests.server.cache.stash import Stash
from tests.server.faults.machine import free_descriptors
from tests.support.rpc import DEADLINE, open_channel
from tests.support.server import running_server, start_and_fail

L3 = CacheTierType.L3
ON_DISK = {"l1_config": CacheTierConfig(enabled=False)}
L3_ALONE = {**ON_DISK, "l2_config": CacheTierConfig(enabled=False)}


def put_many(manager: CacheManager, numbers: range, label: str = "x") -> list[str]:
    """Store so many entries; their keys."""
    entries = [
        manager.new_entry(f"http://p{number}.example.com:80", labels={"name": label * 100})
        for number in numbers
    ]
    assert all(L3 in tiers for tiers in manager.put_many(entries))
    return [entry.key for entry in entries]


def test_readers_share_what_was_opened_at_the_start(stash: Stash) -> None:
    """More threads than there are connections, and none can be opened."""
    manager = stash.open(**L3_ALONE)
    keys = put_many(manager, range(100))
    with free_descriptors(0), ThreadPoolExecutor(16) as pool:
        found = list(pool.map(manager.get, keys * 20))
    assert [entry.key for entry in found if entry is not None] == keys * 20
    assert manager.get_statistics().l3_stats.errors == 0


def test_readers_share_them_too_where_a_descriptor_is_free_again(
    stash: Stash, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be opened a moment ago is then no sign of a lack of descriptors."""
    manager = stash.open(**L3_ALONE)
    keys = put_many(manager, range(100))
    nowhere = stash.directory / "absent" / "file.db"
    monkeypatch.setattr(Database, "_new_connection", lambda *_: sqlite3.connect(nowhere))
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(manager.get, keys * 20))
    assert [entry.key for entry in found if entry is not None] == keys * 20
    assert manager.get_statistics().l3_stats.errors == 0


def test_a_large_put_needs_no_file_of_its_own(stash: Stash) -> None:
    """SQLite notes how to undo a statement of many rows, which may be more than it keeps in memory."""
    manager = stash.open(**L3_ALONE)
    for start in range(0, 10_000, 1000):
        put_many(manager, range(start, start + 1000))
    with free_descriptors(0):
        put_many(manager, range(10_000, 11_000))
    assert manager.get_statistics().l3_stats.errors == 0


def test_what_would_have_needed_one_is_no_failure_of_a_tier(stash: Stash) -> None:
    """L2 cannot be compacted, again and again, and is asked all the same."""
    manager = stash.open(**ON_DISK)
    for label in "abcdefgh":
        put_many(manager, range(1000), label)
    key = put_many(manager, range(1))[0]
    with free_descriptors(0):
        for _ in range(5):
            manager.maintain()
        l2 = manager.get_statistics().l2_stats
        assert (l2.state, l2.errors) == (TierState.ACTIVE, 5)
        entry, served_by = manager.lookup(key)
        assert entry is not None
        assert served_by is CacheTierType.L2
    manager.maintain()
    assert manager.get_statistics().l2_stats.errors == 5


@pytest.mark.parametrize("free", range(10))
def test_a_damaged_database_is_not_given_up_for_want_of_one(stash: Stash, free: int) -> None:
    """However many are left, everything that can be read is saved, or nothing is changed."""
    manager = stash.open(**L3_ALONE)
    keys = put_many(manager, range(50))
    stash.close()
    assert isinstance(manager.l3_tier, SQLiteCacheTier)
    with free_descriptors(free), suppress(OSError, sqlite3.Error):
        manager.l3_tier._database.rebuild()
    manager = stash.open(**L3_ALONE)
    assert [key for key in keys if manager.get(key) is None] == []


class TestSilentConnections:
    """Clients that connect and say nothing, more of them than the server may have files open."""

    OPEN_FILES = 160

    @contextmanager
    def silence(self, target: str) -> Iterator[None]:
        host, _, port = target.rpartition(":")
        with ExitStack() as stack:
            for _ in range(3 * self.OPEN_FILES):
                stack.enter_context(socket.create_connection((host, int(port)), DEADLINE))
            yield

    def test_cost_no_acknowledged_put_and_degrade_no_tier(self, tmp_path: Path) -> None:
        arguments = ("--l1-enabled", "false", "--l2-backend", "sqlite")
        with (
            running_server(tmp_path, *arguments, open_files=self.OPEN_FILES) as server,
            open_channel(server.target) as channel,
        ):
            stub = pb_grpc.CacheServiceStub(channel)
            put(stub, range(1))
            with self.silence(server.target):
                put(stub, range(1, 1000))
                with ThreadPoolExecutor(16) as pool:
                    answers = pool.map(
                        lambda number: stub.Get(pb.GetRequest(key=f"key-{number}"), timeout=DEADLINE),
                        range(1000),
                    )
                    assert all(answer.entry.source == "source" for answer in answers)
                statistics = stub.GetStats(pb.GetStatsRequest(), timeout=DEADLINE).statistics
                assert [
                    (tier.state, tier.errors) for tier in statistics.tiers if tier.tier != pb.TIER_L1
                ] == [
                    (pb.TIER_STATE_ACTIVE, 0),
                    (pb.TIER_STATE_ACTIVE, 0),
                ]
            with open_channel(server.target) as other:
                # Told at once that the server has no room, its client tries again by itself.
                request = pb.GetRequest(key="key-0")
                pb_grpc.CacheServiceStub(other).Get(request, timeout=DEADLINE, wait_for_ready=True)
            assert server.stop() == 0
            assert {line["level"] for line in server.log_lines()} == {"info"}

    def test_are_closed_by_the_server_in_the_end(self, tmp_path: Path) -> None:
        with running_server(tmp_path) as server:
            host, _, port = server.target.rpartition(":")
            with socket.create_connection((host, int(port)), DEADLINE) as connection:
                while connection.recv(1000):
                    pass


def test_a_limit_too_low_to_serve_with_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    code, errors = start_and_fail("--data-dir", str(tmp_path / "data"), open_files=100)
    assert code == 1
    assert errors.startswith(
        "proxystash-server: the process may have 100 files open, and needs 128 with 8 threads"
    )
    assert not (tmp_path / "data").exists()


def put(stub: pb_grpc.CacheServiceStub, numbers: range) -> None:
    entries = [
        pb.CacheEntry(key=f"key-{number}", proxy_url=f"http://192.0.2.1:{1 + number}", source="source")
        for number in numbers
    ]
    results = stub.BatchPut(pb.BatchPutRequest(entries=entries), timeout=DEADLINE).results
    assert [list(result.stored.stored_in) for result in results] == [[pb.TIER_L2, pb.TIER_L3]] * len(entries)
