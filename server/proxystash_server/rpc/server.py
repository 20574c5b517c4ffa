"""The gRPC server: the services on one address, and how they begin and end."""

from __future__ import annotations

import errno
import socket
import threading
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2_grpc

from proxystash.v1 import cache_service_pb2_grpc as pb_grpc
from proxystash_server.rpc.boundary import ErrorBoundary
from proxystash_server.rpc.calls import CallPool, Observe
from proxystash_server.rpc.engine import Engine
from proxystash_server.rpc.errors import SHUTTING_DOWN
from proxystash_server.rpc.health import NOT_SERVING, SERVING, HealthService
from proxystash_server.rpc.pool_service import POOL_SERVICE_NAME, PoolService
from proxystash_server.rpc.reflection import ReflectionSessions
from proxystash_server.rpc.requests import read_batch_put
from proxystash_server.rpc.service import SERVICE_NAME, CacheService
from proxystash_server.rpc.streams import StreamSender
from proxystash_server.rpc.workers import WorkerPool

MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024

MAX_CALLS_OF_A_CONNECTION: Final = 1000
MAX_CALLS_NOT_SEEN: Final = 10_000
# gRPC takes no limit for none.
MAX_CONNECTIONS: Final = 1_000_000

_OPTIONS: Final = (
    # When so many wait to be looked at, by default a thousand, gRPC itself turns calls away, as CANCELLED.
    # That takes ten connections at their limit, and bounds the memory of calls that are reset at once.
    ("grpc.server.max_pending_requests", MAX_CALLS_NOT_SEEN),
    ("grpc.server.max_pending_requests_hard_limit", MAX_CALLS_NOT_SEEN * 5 // 4),
    # Clients keep what goes beyond to themselves. Each takes some 20 KB here.
    ("grpc.max_concurrent_streams", MAX_CALLS_OF_A_CONNECTION),
    # By default two servers share a port, and each gets half of the calls.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # By default a client that pings a quiet stream more than every 5 minutes is thrown out.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Finds out that a client's machine has gone, so that its streams end.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # How long a connection may be there and say nothing; by default two minutes.
    ("grpc.server_handshake_timeout_ms", 10_000),
)


class BindError(Exception):
    """The address cannot be listened on."""


class RpcServer:
    """The services of one engine on one address, which it does not own: closing it is the caller's.

    Without `pool` there is no PoolService. Once made it listens, `start` serves. Connections beyond
    `max_connections` are closed at once. `observe` is told of every call, see `rpc.calls`.
    Raises BindError when the address is taken or does not exist.
    """

    def __init__(
        self,
        engine: Engine,
        listen: str,
        *,
        threads: int,
        max_stats_streams: int,
        max_watch_streams: int,
        watch_history: int,
        pool: PoolService | None = None,
        max_connections: int = MAX_CONNECTIONS,
        observe: Observe | None = None,
    ) -> None:
        self._sender = StreamSender()
        self._pool = pool
        services = (SERVICE_NAME,) if pool is None else (SERVICE_NAME, POOL_SERVICE_NAME)
        self._health = HealthService(services, self._sender)
        self._service = CacheService(
            engine,
            self._sender,
            max_subscribers=max_stats_streams,
            max_watchers=max_watch_streams,
            watch_history=watch_history,
            pool_statistics=None if pool is None else pool.statistics,
        )
        self._reflection = ReflectionSessions((*services, health.SERVICE_NAME))
        self._workers = WorkerPool(threads, "rpc")
        self._urgent_workers = WorkerPool(1, "urgent")
        self._calls = CallPool(self._workers, self._urgent_workers, observe=observe)
        boundary = ErrorBoundary({f"/{SERVICE_NAME}/BatchPut": read_batch_put})
        self._server = grpc.server(
            self._calls,  # type: ignore[arg-type]  # all that grpcio's server uses of an executor
            interceptors=[boundary],
            options=(*_OPTIONS, ("grpc.max_allowed_incoming_connections", max_connections)),
        )
        pb_grpc.add_CacheServiceServicer_to_server(self._service, self._server)
        if pool is not None:
            pool.add_to(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._reflection.add_to(self._server)
        host = listen.rpartition(":")[0]
        check_free(listen)
        try:
            port = self._server.add_insecure_port(listen)
        except RuntimeError:
            raise BindError(f"cannot listen on {listen}") from None
        self.address = f"{host}:{port}"

    def open_streams(self) -> dict[str, int]:
        """How many calls of each method with a stream are open now."""
        return {
            "StreamStats": self._service.stats_hub.subscribers,
            "Watch": self._service.watch_hub.watchers,
        }

    def start(self) -> None:
        """Serve, and say so to whoever asks for the health."""
        self._sender.start()
        self._service.stats_hub.start()
        self._service.watch_hub.start()
        self._server.start()
        self._health.set_all(SERVING)

    def drain(self) -> None:
        """Begin to end: refuse new calls and end the streams, all with UNAVAILABLE, and say so in the health.

        Calls under way go on. Clients that are connected learn in this way that they should go elsewhere;
        once the server stops, gRPC itself turns their calls away, as CANCELLED.
        """
        self._calls.refuse_new_calls(SHUTTING_DOWN)
        self._health.set_all(NOT_SERVING)
        self._service.stats_hub.close()
        self._service.watch_hub.stop()
        self._sender.end_all(SHUTTING_DOWN)
        if self._pool is not None:
            self._pool.drain(SHUTTING_DOWN)
        self._reflection.end_all()

    def stop(self, grace: float) -> threading.Event:
        """Close all connections, after at most `grace` seconds for calls under way.

        The event that is returned says when it is done. Not to be called from a signal handler.
        """
        return self._server.stop(grace)

    def close(self) -> None:
        """Cancel what is still under way, and let every thread go."""
        self._server.stop(None)
        self._service.watch_hub.close()
        self._sender.close()
        self._reflection.close()
        self._workers.close()
        self._urgent_workers.close()


def check_free(listen: str) -> None:
    """Raise BindError if nothing can listen there, and say why; grpcio does not.

    A name such as localhost may have several addresses. grpcio is content with any of them, and would leave
    the others to a server that has the port already.
    """
    host, _, port = listen.rpartition(":")
    faults = []
    try:
        addresses = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        for family, kind, protocol, _, address in addresses:
            try:
                with socket.socket(family, kind, protocol) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(address)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise
                faults.append(error)
        if len(faults) == len(addresses):
            raise faults[0]
    except OSError as error:
        raise BindError(f"cannot listen on {listen}: {error.strerror}") from None
