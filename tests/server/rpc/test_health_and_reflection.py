"""The standard health service and server reflection."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from proxystash.v1 import cache_service_pb2 as pb
from proxystash.v1 import cache_service_pb2_grpc as pb_grpc
from proxystash_server.cache import CacheManager
from proxystash_server.rpc.server import RpcServer
from tests.support.rpc import DEADLINE, Refusal, open_channel, refusal_of, refused, serving

SERVICE = "proxystash.v1.CacheService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


def ask(name: str = "") -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=name)


def health_of(channel: grpc.Channel) -> Any:
    """A stub, which has methods that its type does not tell of."""
    return health_pb2_grpc.HealthStub(channel)


@pytest.fixture
def health(channel: grpc.Channel) -> Any:
    return health_of(channel)


@pytest.mark.parametrize("name", ["", SERVICE])
def test_server_and_service_are_serving(health: Any, name: str) -> None:
    assert health.Check(ask(name), timeout=DEADLINE).status == SERVING


def test_an_unknown_service_is_not_found(health: Any) -> None:
    refusal = refused(health.Check, ask("proxystash.v2.CacheService"))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_SERVICE")


def test_all_statuses_are_listed(health: Any) -> None:
    request = health_pb2.HealthListRequest()  # type: ignore[attr-defined]  # the types lag behind
    statuses = health.List(request, timeout=DEADLINE).statuses
    assert {name: answer.status for name, answer in statuses.items()} == {"": SERVING, SERVICE: SERVING}


def test_nothing_is_serving_before_the_server_is(manager: CacheManager) -> None:
    server = RpcServer(
        manager, "127.0.0.1:0", threads=1, max_stats_streams=1, max_watch_streams=1, watch_history=1
    )
    assert server._health._answer("").status == NOT_SERVING
    assert server._health._answer(SERVICE).status == NOT_SERVING
    server.close()


def test_a_watch_sees_the_server_stop_serving_and_ends(server: RpcServer, health: Any) -> None:
    watches = {name: health.Watch(ask(name), timeout=DEADLINE) for name in ("", SERVICE, "other")}
    assert {name: next(watch).status for name, watch in watches.items()} == {
        "": SERVING,
        SERVICE: SERVING,
        "other": SERVICE_UNKNOWN,
    }
    server.drain()
    assert {health.Check(ask(name), timeout=DEADLINE).status for name in ("", SERVICE)} == {NOT_SERVING}
    for name, watch in watches.items():
        assert next(watch).status == (SERVICE_UNKNOWN if name == "other" else NOT_SERVING)
        with pytest.raises(grpc.RpcError) as caught:
            next(watch)
        assert refusal_of(caught.value).code is grpc.StatusCode.UNAVAILABLE
    assert server.stop(10 * DEADLINE).wait(DEADLINE)


def test_watches_have_a_limit_and_no_name_that_means_nothing_is_kept(
    server: RpcServer, channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxystash_server.rpc.health.MAX_WATCHES", 2)
    health = health_of(channel)
    watches = [health.Watch(ask("x" * 500_000), timeout=DEADLINE) for _ in range(2)]
    assert [next(watch).status for watch in watches] == [SERVICE_UNKNOWN] * 2
    assert set(server._health._watches.values()) == {None}
    refusal = refused(health.Watch, ask())
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_WATCHES")
    assert health.Check(ask(), timeout=DEADLINE).status == SERVING


def test_watches_hold_no_thread(manager: CacheManager) -> None:
    with serving(manager, threads=1) as server, ExitStack() as stack:
        for _ in range(3):
            channel = stack.enter_context(open_channel(server.address))
            next(health_of(channel).Watch(ask(), timeout=DEADLINE))
        stub = pb_grpc.CacheServiceStub(stack.enter_context(open_channel(server.address)))
        stub.Get(pb.GetRequest(key="missing"), timeout=DEADLINE)


def test_reflection_describes_what_the_server_offers(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    assert set(database.get_services()) == {
        SERVICE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    described = database.FindFileContainingSymbol(SERVICE)
    assert described.name == "proxystash/v1/cache_service.proto"
    assert {method.name for method in described.service[0].method} == set(
        pb.DESCRIPTOR.services_by_name["CacheService"].methods_by_name
    )


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_each_version_of_reflection_answers_and_describes_itself(channel: grpc.Channel, version: str) -> None:
    name = f"grpc.reflection.{version}.ServerReflection"
    call = channel.stream_stream(
        f"/{name}/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    asked = [
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol) for symbol in (name, SERVICE)
    ]

    described, offered = [
        FileDescriptorProto.FromString(answer.file_descriptor_response.file_descriptor_proto[0])
        for answer in call(iter(asked), timeout=DEADLINE)
    ]

    assert (described.name, described.package) == (
        f"grpc_reflection/{version}/reflection.proto",
        f"grpc.reflection.{version}",
    )
    assert described.service[0].method[0].input_type == f".grpc.reflection.{version}.ServerReflectionRequest"
    assert offered.package == "proxystash.v1"


Session = Iterator[reflection_pb2.ServerReflectionResponse]


def open_session(stack: ExitStack, target: str) -> Session:
    """A session on a connection of its own, that has had an answer and stays open with the stack."""
    channel = stack.enter_context(open_channel(target))
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    stay = stack.enter_context(_never_ending(request))
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    session: Session = stub.ServerReflectionInfo(stay, timeout=DEADLINE)
    assert next(session).list_services_response.service
    return session


def end_of(session: Session) -> Refusal:
    with pytest.raises(grpc.RpcError) as caught:
        next(session)
    return refusal_of(caught.value)


def test_open_reflection_sessions_hold_nobody_up_and_end_when_drained(manager: CacheManager) -> None:
    with serving(manager, threads=1) as server, ExitStack() as stack:
        sessions = [open_session(stack, server.address) for _ in range(20)]
        stub = pb_grpc.CacheServiceStub(stack.enter_context(open_channel(server.address)))
        stub.Get(pb.GetRequest(key="missing"), timeout=DEADLINE)
        server.drain()
        assert {end_of(session).code for session in sessions} == {grpc.StatusCode.UNAVAILABLE}
        assert server.stop(10 * DEADLINE).wait(DEADLINE)


def test_one_reflection_session_too_many_ends_the_one_that_was_idle_the_longest(
    server: RpcServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxystash_server.rpc.reflection.MOST_SESSIONS", 3)
    with ExitStack() as stack:
        sessions = [open_session(stack, server.address) for _ in range(5)]
        assert [end_of(session).code for session in sessions[:2]] == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 2
        assert len(server._reflection._sessions) == 3


def test_a_reflection_session_ends_with_its_client(server: RpcServer) -> None:
    with ExitStack() as stack:
        open_session(stack, server.address)
        assert len(server._reflection._sessions) == 1
    with ExitStack() as stack:
        open_session(stack, server.address)
        assert len(server._reflection._sessions) == 1


def test_what_is_no_reflection_request_is_refused(channel: grpc.Channel) -> None:
    path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    call: Callable[..., Any] = channel.stream_stream(path)
    refusal = refused(call, iter([b"\x0a\xff"]))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "UNREADABLE_REQUEST")


@contextmanager
def _never_ending(
    request: reflection_pb2.ServerReflectionRequest,
) -> Iterator[Iterator[reflection_pb2.ServerReflectionRequest]]:
    """A client's requests: one, and then none, without an end."""
    leaving = threading.Event()

    def requests() -> Iterator[reflection_pb2.ServerReflectionRequest]:
        yield request
        leaving.wait()

    try:
        yield requests()
    finally:
        leaving.set()
