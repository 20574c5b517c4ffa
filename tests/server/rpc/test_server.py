"""How the server begins and ends."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from proxystash.v1 import cache_service_pb2 as pb
from proxystash.v1 import cache_service_pb2_grpc as pb_grpc
from proxystash_server.cache import CacheManager, Lookup
from proxystash_server.rpc.server import MAX_MESSAGE_BYTES, BindError, RpcServer
from tests.support.rpc import DEADLINE, open_channel, refused, serving


def make(manager: CacheManager, listen: str) -> RpcServer:
    return RpcServer(manager, listen, threads=1, max_stats_streams=1, max_watch_streams=1, watch_history=1)


class SlowLookups:
    """Lookups that wait until they are let go."""

    def __init__(self, manager: CacheManager, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        lookup = manager.lookup

        def slow(key: str) -> Lookup:
            self.begun.set()
            assert self.go_on.wait(DEADLINE)
            return lookup(key)

        monkeypatch.setattr(manager, "lookup", slow)


@pytest.fixture
def slow(manager: CacheManager, monkeypatch: pytest.MonkeyPatch) -> SlowLookups:
    return SlowLookups(manager, monkeypatch)


def test_a_draining_server_finishes_what_is_under_way_and_refuses_the_rest(
    manager: CacheManager, slow: SlowLookups
) -> None:
    with (
        serving(manager) as server,
        open_channel(server.address) as channel,
        ThreadPoolExecutor(1) as pool,
    ):
        stub = pb_grpc.CacheServiceStub(channel)
        answer = pool.submit(stub.Get, pb.GetRequest(key="missing"), timeout=DEADLINE)
        assert slow.begun.wait(DEADLINE)
        server.drain()
        for call, request in ((stub.Clear, pb.ClearRequest()), (stub.StreamStats, pb.StreamStatsRequest())):
            refusal = refused(call, request)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        stopped = server.stop(DEADLINE)
        assert not stopped.is_set()
        slow.go_on.set()
        assert answer.result(DEADLINE) == pb.GetResponse()
        assert stopped.wait(DEADLINE)


def test_a_call_that_outlasts_the_grace_period_is_cancelled(manager: CacheManager, slow: SlowLookups) -> None:
    with (
        serving(manager) as server,
        open_channel(server.address) as channel,
        ThreadPoolExecutor(1) as pool,
    ):
        refusal = pool.submit(refused, pb_grpc.CacheServiceStub(channel).Get, pb.GetRequest(key="missing"))
        assert slow.begun.wait(DEADLINE)
        server.drain()
        assert server.stop(0.1).wait(DEADLINE)
        assert refusal.result(DEADLINE).code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
        slow.go_on.set()


def test_a_request_above_4_mib_is_refused_and_the_connection_lives_on(stub: pb_grpc.CacheServiceStub) -> None:
    entry = pb.CacheEntry(proxy_url="http://192.0.2.1:80", password="p" * MAX_MESSAGE_BYTES)
    assert refused(stub.Put, pb.PutRequest(entry=entry)).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert stub.Get(pb.GetRequest(key="missing"), timeout=DEADLINE) == pb.GetResponse()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "[::]"])
def test_a_port_that_a_server_has_is_refused(server: RpcServer, manager: CacheManager, host: str) -> None:
    port = server.address.rpartition(":")[2]
    with pytest.raises(BindError, match=rf":{port}: Address already in use$"):
        make(manager, f"{host}:{port}")


def test_its_port_is_not_shared_with_a_server_that_would_share(server: RpcServer) -> None:
    """As gRPC servers do by default; each would then get half of the calls."""
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="Failed to bind"):
        grpc.server(pool).add_insecure_port(server.address)


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_of_no_interface_is_refused(manager: CacheManager, host: str) -> None:
    with pytest.raises(BindError, match=f"^cannot listen on {host}:0: "):
        make(manager, f"{host}:0")


def test_the_address_is_the_bound_one(manager: CacheManager) -> None:
    server = make(manager, "127.0.0.1:0")
    try:
        host, _, port = server.address.rpartition(":")
        assert host == "127.0.0.1"
        with socket.create_connection((host, int(port)), DEADLINE):
            pass
    finally:
        server.close()
