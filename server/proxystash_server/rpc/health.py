"""The standard health service, on streams that hold no thread and end when the server drains.

The servicer that comes with grpcio-health-checking sends while it holds the lock that its own end-of-call
callback takes, and has no way to end its watches, for which a server's stop then waits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Final

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from proxystash_server.rpc.calls import StreamCall, urgent
from proxystash_server.rpc.errors import Failure, Reason, RequestError
from proxystash_server.rpc.streams import OutgoingStream, StreamSender, non_blocking

SERVING: Final = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN: Final = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
_UNKNOWN_SERVICE: Final = Failure(
    grpc.StatusCode.NOT_FOUND, Reason.UNKNOWN_SERVICE, "this server has no service of that name"
)
# Watches open at once.
MAX_WATCHES: Final = 1000
_TOO_MANY_WATCHES: Final = Failure(
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.TOO_MANY_WATCHES,
    f"{MAX_WATCHES:,} watches of the health are open, which is the limit",
)


class HealthService(health_pb2_grpc.HealthServicer):
    """One status for each service name, NOT_SERVING at first; `""` stands for the whole server.

    Thread-safe. Its lock may be held while the sender's is taken, never the other way round.
    """

    def __init__(self, services: Iterable[str], sender: StreamSender) -> None:
        self._sender = sender
        self._lock = threading.Lock()
        self._statuses: dict[str, int] = dict.fromkeys(("", *services), NOT_SERVING)
        # Of services that there are not, no name is kept: a name may be as long as a message.
        self._watches: dict[OutgoingStream, str | None] = {}

    def set_all(self, status: int) -> None:
        """Change the status of every service, and tell those who watch."""
        with self._lock:
            self._statuses = dict.fromkeys(self._statuses, status)
            # Offering does not send. It happens under the lock so that a watch sees two changes in their
            # order.
            for stream, service in self._watches.items():
                self._sender.offer(stream, self._answer(service))

    @urgent
    def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._statuses:
            raise RequestError(_UNKNOWN_SERVICE)
        return self._answer(request.service)

    @urgent
    def List(self, request: Message, context: grpc.ServicerContext) -> Message:
        statuses = {service: self._answer(service) for service in self._statuses}
        response: Message = health_pb2.HealthListResponse(statuses=statuses)  # type: ignore[attr-defined]  # stubs lag
        return response

    @urgent
    @non_blocking
    def Watch(  # type: ignore[override]  # a non-blocking handler takes one more argument
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext, send: object
    ) -> None:
        stream = OutgoingStream(StreamCall(context))
        service = request.service if request.service in self._statuses else None
        with self._lock:
            if len(self._watches) >= MAX_WATCHES:
                raise RequestError(_TOO_MANY_WATCHES)
            self._watches[stream] = service
        if not self._sender.open(stream, on_close=lambda: self._forget(stream)):
            self._forget(stream)
            return
        with self._lock:
            self._sender.offer(stream, self._answer(service))

    def _answer(self, service: str | None) -> health_pb2.HealthCheckResponse:
        status = _UNKNOWN if service is None else self._statuses[service]
        return health_pb2.HealthCheckResponse(status=status)

    def _forget(self, stream: OutgoingStream) -> None:
        with self._lock:
            self._watches.pop(stream, None)
