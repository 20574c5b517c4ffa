"""Faults under the server that users run: it serves what another tier can, and heals by itself."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from proxystash.v1 import cache_service_pb2 as pb
from proxystash.v1 import cache_service_pb2_grpc as pb_grpc
from tests.server.faults.machine import Mounts, fill, make_room
from tests.support.rpc import DEADLINE, open_channel
from tests.support.server import ServerProcess, running_server, start_and_fail

LOST = "the data directory is lost: nothing is written to disk until it is back in its place"
ENTRIES_LOST = "entries that no disk could take are lost with the memory they were kept in"
BULK = {f"filler-{number}": "x" * 250 for number in range(16)}
TIERS: dict[str, int] = {"l2": pb.TIER_L2, "l3": pb.TIER_L3}


class Client:
    """Calls of a server that must all work, and what it must hold."""

    def __init__(self, stub: pb_grpc.CacheServiceStub) -> None:
        self._stub = stub
        self.expected: dict[str, str] = {}

    def put(self, key: str, source: str) -> list[int]:
        entry = pb.CacheEntry(key=key, proxy_url="http://user:secret@192.0.2.1:1", source=source, labels=BULK)
        answer = self._stub.Put(pb.PutRequest(entry=entry), timeout=DEADLINE)
        assert answer.stored_in
        self.expected[key] = source
        return [int(tier) for tier in answer.stored_in]

    def delete(self, key: str) -> None:
        assert self._stub.Delete(pb.DeleteRequest(key=key), timeout=DEADLINE).deleted
        del self.expected[key]

    def check(self) -> None:
        for key, source in self.expected.items():
            answer = self._stub.Get(pb.GetRequest(key=key), timeout=DEADLINE)
            assert (answer.entry.source, answer.entry.password) == (source, "secret"), key
        listed = self._stub.List(pb.ListRequest(page_size=1000), timeout=DEADLINE)
        assert {entry.key: entry.source for entry in listed.entries} == self.expected

    def states(self) -> dict[int, int]:
        stats = self._stub.GetStats(pb.GetStatsRequest(), timeout=DEADLINE).statistics
        return {tier.tier: tier.state for tier in stats.tiers}


@contextmanager
def client_of(server: ServerProcess) -> Iterator[Client]:
    with open_channel(server.target) as channel:
        yield Client(pb_grpc.CacheServiceStub(channel))


def told(server: ServerProcess, event: str) -> list[str]:
    return sorted(line["tier"] for line in server.log_lines() if line.get("event") == event)


@pytest.mark.parametrize(
    ("faulty", "backend"), [("l2", "jsonl"), ("l2", "sqlite"), ("l3", "jsonl")], ids=["jsonl", "sqlite", "l3"]
)
def test_a_full_disk_below_one_tier(tmp_path: Path, mounts: Mounts, faulty: str, backend: str) -> None:
    data = tmp_path / "data"
    mounts.add(data / faulty, "size=2m")
    arguments = ("--l2-backend", backend, "--l1-max-entries", "2")
    with running_server(data, *arguments) as server, client_of(server) as client:
        for key in ("kept", "replaced", "deleted"):
            client.put(key, "before")
        fill(data / faulty)
        client.put("replaced", "meanwhile")
        client.delete("deleted")
        for number in range(20):
            client.put(f"new-{number}", "meanwhile")
        server.wait_for_log("tier degraded")
        assert TIERS[faulty] not in client.put("last", "meanwhile")
        client.check()
        states = client.states()
        assert states.pop(TIERS[faulty]) == pb.TIER_STATE_DEGRADED
        assert set(states.values()) == {pb.TIER_STATE_ACTIVE}
        make_room(data / faulty)
        server.wait_for_log("tier recovered")
        assert TIERS[faulty] in client.put("last", "afterwards")
        client.check()
        assert told(server, "tier degraded") == told(server, "tier recovered") == [faulty]
        expected = client.expected
        server.kill()
    with running_server(data, *arguments) as server, client_of(server) as client:
        client.expected = expected
        client.check()


def wait_until_recovered(server: ServerProcess, tiers: int) -> None:
    """Wait until so many tiers have said that they are back."""
    with server._changed:
        assert server._changed.wait_for(lambda: server.log_text().count("tier recovered") >= tiers, 30)


def test_a_data_directory_removed_under_the_server(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with running_server(data) as server, client_of(server) as client:
        for number in range(5):
            client.put(f"key-{number}", "before")
        client.delete("key-0")
        shutil.rmtree(data)
        for number in range(5):
            client.put(f"later-{number}", "after")
        client.check()
        wait_until_recovered(server, 2)
        client.check()
        assert set(client.states().values()) == {pb.TIER_STATE_ACTIVE}
        assert told(server, "tier degraded") == told(server, "tier recovered") == ["l2", "l3"]
        assert (data / "secret.key").stat().st_mode & 0o777 == 0o600
        expected = client.expected
        server.kill()
    with running_server(data) as server, client_of(server) as client:
        client.expected = expected
        client.check()


def test_a_data_directory_moved_away_under_the_server(tmp_path: Path) -> None:
    data, away = tmp_path / "data", tmp_path / "away"
    with running_server(data) as server, client_of(server) as client:
        client.put("before", "first")
        data.rename(away)
        code, output = start_and_fail("--data-dir", str(away), "--listen", "127.0.0.1:0")
        assert code == 1
        assert f"is in use by process {server.process.pid}" in output
        server.wait_for_log(LOST)
        assert client.states()[pb.TIER_L2] == client.states()[pb.TIER_L3] == pb.TIER_STATE_DEGRADED
        assert client.put("later", "first") == [pb.TIER_L1]
        with running_server(data) as second, client_of(second) as other:
            other.put("other", "second")
            assert server.stop() == 1
            assert server.wait_for_log(ENTRIES_LOST)["entries"] == 1
            other.check()
            second.kill()
            expected = other.expected
    with running_server(data) as server, client_of(server) as client:
        client.expected = expected
        client.check()
