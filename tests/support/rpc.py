"""The gRPC server inside the test's own process, and what its errors carry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from proxystash_server.cache import CacheManager
from proxystash_server.rpc.server import RpcServer

# What a call may take before a test gives up; nothing here takes long.
DEADLINE = 30


@contextmanager
def serving(
    manager: CacheManager,
    *,
    threads: int = 8,
    max_stats_streams: int = 1000,
    max_watch_streams: int = 1000,
    watch_history: int = 1000,
) -> Iterator[RpcServer]:
    """A server of `manager` on a free port; closed at the end."""
    server = RpcServer(
        manager,
        "127.0.0.1:0",
        threads=threads,
        max_stats_streams=max_stats_streams,
        max_watch_streams=max_watch_streams,
        watch_history=watch_history,
    )
    server.start()
    try:
        yield server
    finally:
        server.close()


@contextmanager
def open_channel(target: str, *options: tuple[str, object]) -> Iterator[grpc.Channel]:
    """A channel of its own, with a connection of its own."""
    with grpc.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1), *options]) as channel:
        yield channel


@dataclass(frozen=True)
class Refusal:
    """An error as a client sees it."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    domain: str = ""
    fields: tuple[str, ...] = ()
    request_id: str = ""
    metadata: tuple[tuple[str, str], ...] = ()


def refusal_of(error: grpc.RpcError) -> Refusal:
    """The status of a failed call and the details that came with it."""
    call = cast("grpc.Call", error)
    details: dict[str, Any] = {}
    status = rpc_status.from_call(call)
    for packed in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        bad_request = error_details_pb2.BadRequest()
        request_info = error_details_pb2.RequestInfo()
        if packed.Unpack(info):
            details.update(
                reason=info.reason, domain=info.domain, metadata=tuple(sorted(info.metadata.items()))
            )
        elif packed.Unpack(bad_request):
            details.update(fields=tuple(violation.field for violation in bad_request.field_violations))
        elif packed.Unpack(request_info):
            details.update(request_id=request_info.request_id)
    return Refusal(call.code(), call.details() or "", **details)


def refused(call: Callable[..., Any], *arguments: Any) -> Refusal:
    """Make a call that must fail, to the end of its stream if it has one, and say how it failed."""
    with pytest.raises(grpc.RpcError) as caught:
        _exhaust(call(*arguments, timeout=DEADLINE))
    return refusal_of(caught.value)


def _exhaust(answer: object) -> None:
    """Read a stream to its end; an answer that is no stream has ended."""
    for _ in answer if isinstance(answer, Iterator) else ():
        pass
