"""The error boundary, around handlers that fail in every way."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import grpc
import pytest
import structlog
from google.protobuf.wrappers_pb2 import StringValue

from proxystash.v1 import cache_service_pb2 as pb
from proxystash.v1 import cache_service_pb2_grpc as pb_grpc
from proxystash_server.cache import CacheManager, CacheUnavailableError
from proxystash_server.rpc.boundary import ErrorBoundary
from proxystash_server.rpc.streams import non_blocking
from tests.support.rpc import DEADLINE, open_channel, refused

SECRET = "http://user:hunter2@192.0.2.1:80 in /var/lib/proxystash"
MESSAGES: dict[str, Any] = {
    "request_deserializer": StringValue.FromString,
    "response_serializer": StringValue.SerializeToString,
}
Handler = Any  # grpc.RpcMethodHandler, of any two messages


@contextmanager
def serving_handlers(**handlers: Handler) -> Iterator[grpc.Channel]:
    """A server of these methods, behind a boundary that numbers its requests `id-1`, `id-2`, ..."""
    numbers = iter(range(1, 1000))
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(
            pool, interceptors=[ErrorBoundary({}, request_ids=lambda: f"id-{next(numbers)}")]
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            with open_channel(f"127.0.0.1:{port}") as channel:
                yield channel
        finally:
            server.stop(None)


def _raise_unexpectedly(_request: object, _context: grpc.ServicerContext, *_send: object) -> Any:
    raise ValueError(SECRET)


def _yield_then_raise(_request: object, _context: grpc.ServicerContext) -> Iterator[StringValue]:
    yield StringValue(value="one")
    raise ValueError(SECRET)


@non_blocking
def _raise_without_thread(request: object, context: grpc.ServicerContext, send: object) -> None:
    _raise_unexpectedly(request, context, send)


FAILING: dict[str, Handler] = {
    "UnaryUnary": grpc.unary_unary_rpc_method_handler(_raise_unexpectedly, **MESSAGES),
    "UnaryStream": grpc.unary_stream_rpc_method_handler(_yield_then_raise, **MESSAGES),
    "NonBlocking": grpc.unary_stream_rpc_method_handler(_raise_without_thread, **MESSAGES),
    "StreamUnary": grpc.stream_unary_rpc_method_handler(_raise_unexpectedly, **MESSAGES),
    "StreamStream": grpc.stream_stream_rpc_method_handler(_yield_then_raise, **MESSAGES),
}


def caller(channel: grpc.Channel, method: str) -> Callable[..., Any]:
    kinds: dict[str, Any] = {
        "UnaryUnary": channel.unary_unary,
        "StreamUnary": channel.stream_unary,
        "StreamStream": channel.stream_stream,
    }
    call = kinds.get(method, channel.unary_stream)(f"/t/{method}")
    if method.startswith("Stream"):
        return lambda request, timeout: call(iter([request]), timeout=timeout)
    return cast("Callable[..., Any]", call)


@pytest.mark.parametrize("method", FAILING)
def test_an_unexpected_error_is_internal_with_a_request_id_that_the_log_has_too(method: str) -> None:
    with structlog.testing.capture_logs() as logs, serving_handlers(**FAILING) as channel:
        refusal = refused(caller(channel, method), b"")
    assert (refusal.code, refusal.reason, refusal.request_id) == (
        grpc.StatusCode.INTERNAL,
        "INTERNAL",
        "id-1",
    )
    (line,) = [line for line in logs if line.get("request_id") == "id-1"]
    assert line["method"] == f"/t/{method}"
    assert isinstance(line["exc_info"], ValueError)


@pytest.mark.parametrize("method", FAILING)
def test_nothing_internal_reaches_the_client(method: str) -> None:
    with structlog.testing.capture_logs(), serving_handlers(**FAILING) as channel:
        refusal = refused(caller(channel, method), b"")
    assert refusal.message == "internal error; the server's log has the cause under request id id-1"
    assert "hunter2" not in repr(refusal)
    assert "ValueError" not in repr(refusal)


def test_what_a_stream_sent_before_it_failed_arrives() -> None:
    with structlog.testing.capture_logs(), serving_handlers(**FAILING) as channel:
        answers = caller(channel, "UnaryStream")(b"", timeout=DEADLINE)
        assert StringValue.FromString(next(answers)).value == "one"


def test_an_abort_by_the_handler_passes_as_it_is() -> None:
    def abort(_request: object, context: grpc.ServicerContext) -> Any:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not now")

    handler: Handler = grpc.unary_unary_rpc_method_handler(abort)
    with structlog.testing.capture_logs() as logs, serving_handlers(Abort=handler) as channel:
        refusal = refused(channel.unary_unary("/t/Abort"), b"")
    assert (refusal.code, refusal.message) == (grpc.StatusCode.FAILED_PRECONDITION, "not now")
    assert logs == []


def test_a_bare_exception_that_is_no_abort_is_internal() -> None:
    def fail(_request: object, _context: grpc.ServicerContext) -> Any:
        raise Exception

    handler: Handler = grpc.unary_unary_rpc_method_handler(fail)
    with structlog.testing.capture_logs(), serving_handlers(Fail=handler) as channel:
        assert refused(channel.unary_unary("/t/Fail"), b"").code is grpc.StatusCode.INTERNAL


def test_nothing_of_a_refused_request_waits_for_the_garbage_collector() -> None:
    """It may have 4 MiB, and the collector looks seldom."""
    handler: Handler = grpc.unary_unary_rpc_method_handler(_raise_unexpectedly, **MESSAGES)
    details: Any = SimpleNamespace(method="/t/Refused")
    wrapped = ErrorBoundary({}).intercept_service(lambda _: handler, details)
    assert wrapped is not None
    assert wrapped.request_deserializer is not None
    assert wrapped.unary_unary is not None
    context: Any = mock.Mock(spec=grpc.ServicerContext)
    context.abort_with_status.side_effect = StopAsyncIteration  # anything that ends the handler
    gc.disable()
    try:
        for request in (bytes(1024 * 1024), b"\xff" * 1024):
            before = sys.getrefcount(request)
            with pytest.raises(StopAsyncIteration):
                wrapped.unary_unary(wrapped.request_deserializer(request), context)
            assert sys.getrefcount(request) == before
    finally:
        gc.enable()
    assert context.abort_with_status.call_count == 2


def test_an_unknown_method_stays_unimplemented() -> None:
    with serving_handlers(**FAILING) as channel:
        assert refused(channel.unary_unary("/t/Nothing"), b"").code is grpc.StatusCode.UNIMPLEMENTED
        assert refused(channel.unary_unary("/other/Nothing"), b"").code is grpc.StatusCode.UNIMPLEMENTED


def test_a_client_that_goes_is_no_internal_error() -> None:
    """grpcio raises in a handler that waits for the next request of a client that has gone."""
    waiting, ended = threading.Event(), threading.Event()

    def read_all(requests: Iterator[bytes], _context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            waiting.set()
            yield from requests
        finally:
            ended.set()

    handler: Handler = grpc.stream_stream_rpc_method_handler(read_all)
    with structlog.testing.capture_logs() as logs, serving_handlers(ReadAll=handler) as channel:
        leaving = threading.Event()
        read_all_of: Callable[..., Any] = channel.stream_stream("/t/ReadAll")
        call = read_all_of(iter(leaving.wait, True), timeout=DEADLINE)
        assert waiting.wait(DEADLINE)
        call.cancel()
        assert ended.wait(DEADLINE)
        leaving.set()
    assert logs == []


def test_an_error_of_the_cache_is_not_logged(
    manager: CacheManager, stub: pb_grpc.CacheServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable(_key: str) -> None:
        raise CacheUnavailableError(SECRET)

    monkeypatch.setattr(manager, "lookup", unavailable)
    with structlog.testing.capture_logs() as logs:
        refusal = refused(stub.Get, pb.GetRequest(key="k"))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "NO_TIER_AVAILABLE")
    assert "hunter2" not in refusal.message
    assert logs == []


def test_a_bug_in_the_cache_is_internal(
    manager: CacheManager, stub: pb_grpc.CacheServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager, "lookup", _raise_unexpectedly)
    with structlog.testing.capture_logs() as logs:
        refusal = refused(stub.Get, pb.GetRequest(key="k"))
    assert refusal.code is grpc.StatusCode.INTERNAL
    assert [line["request_id"] for line in logs] == [refusal.request_id]
    assert len(refusal.request_id) >= 16
