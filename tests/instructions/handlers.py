"""The server's handlers from request bytes to response bytes, without a network."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, TypeAlias, cast
from unittest import mock

import grpc

from proxystash_server.cache import CacheManager
from proxystash_server.rpc.server import RpcServer

Call = Callable[[bytes], bytes]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Find = Callable[[grpc.HandlerCallDetails], "Handler | None"]


class _CapturedServer:
    """Stands in for grpcio's server: keeps what is registered, finds handlers through the interceptors."""

    def __init__(self, interceptors: Sequence[grpc.ServerInterceptor]) -> None:
        self._interceptors = interceptors
        self._generic: list[grpc.GenericRpcHandler] = []

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        self._generic += handlers

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """Generated code registers each handler in both ways."""

    def add_insecure_port(self, address: str) -> int:
        return 1

    def stop(self, grace: float | None) -> None:
        """There is nothing to stop."""

    def handler(self, method: str) -> Handler:
        find: _Find = self._registered
        for interceptor in reversed(self._interceptors):
            find = functools.partial(interceptor.intercept_service, find)
        details = SimpleNamespace(method=method, invocation_metadata=())
        found = find(cast("grpc.HandlerCallDetails", details))
        assert found is not None, f"{method} is not registered"
        return found

    def _registered(self, details: grpc.HandlerCallDetails) -> Handler | None:
        return next(filter(None, (generic.service(details) for generic in self._generic)), None)


def calls(manager: CacheManager) -> Callable[[str], Call]:
    """What a real server of `manager` would run for a call of CacheService, by the method's name.

    The call's context has nothing: whatever a handler asks it for, on the way that succeeds, raises.
    """
    captured: list[_CapturedServer] = []

    def capture(
        pool: object, interceptors: Sequence[grpc.ServerInterceptor] = (), **_: object
    ) -> _CapturedServer:
        captured.append(_CapturedServer(interceptors))
        return captured[0]

    with mock.patch("grpc.server", capture):
        RpcServer(
            manager, "127.0.0.1:0", threads=1, max_stats_streams=1, max_watch_streams=1, watch_history=1
        )

    def call(method: str) -> Call:
        handler = captured[0].handler(f"/proxystash.v1.CacheService/{method}")
        read, behave, write = handler.request_deserializer, handler.unary_unary, handler.response_serializer
        assert read is not None
        assert behave is not None
        assert write is not None
        context = cast("grpc.ServicerContext", object())
        return lambda request: write(behave(read(request), context))

    return call
