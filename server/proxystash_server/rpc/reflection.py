"""Server reflection whose sessions hold no thread, and of which there is always room for one more.

It is offered as v1 and as v1alpha, which differ in their names alone: a message of both is the same bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, Final, cast

import grpc
import structlog
from google.protobuf import descriptor_pool, text_format
from google.protobuf.descriptor import Descriptor, FileDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto
from google.protobuf.message import DecodeError
from grpc_reflection.v1alpha import reflection, reflection_pb2

from proxystash_server.rpc.calls import StreamCall
from proxystash_server.rpc.errors import (
    SHUTTING_DOWN,
    UNREADABLE_REQUEST,
    Failure,
    Reason,
    RequestError,
    internal_failure,
    new_request_id,
)
from proxystash_server.rpc.streams import non_blocking
from proxystash_server.rpc.workers import WorkerPool

# Open sessions; one more ends the one that has been idle the longest.
MOST_SESSIONS: Final = 100
_IDLE: Final = Failure(
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.SESSION_IDLE,
    f"more than {MOST_SESSIONS} reflection sessions are open, and this one was idle the longest",
)

_ALPHA: Final = "v1alpha"
_V1_NAME: Final = reflection.SERVICE_NAME.replace(_ALPHA, "v1")

_log = structlog.stdlib.get_logger(__name__)

# What errors carry: a tool that does not know these types asks for them.
_DETAILS: Final = ("google.rpc.ErrorInfo", "google.rpc.BadRequest", "google.rpc.RequestInfo")

# The servicer does not look at it.
_NO_CONTEXT: Final = cast("grpc.ServicerContext", None)


class ReflectionSessions:
    """The reflection service of one server. Thread-safe."""

    def __init__(self, services: Iterable[str]) -> None:
        names = (*services, reflection.SERVICE_NAME)
        pool = _pool_with_json_names((*names, *_DETAILS))
        pool.AddSerializedFile(_v1_file(pool.FindFileContainingSymbol(reflection.SERVICE_NAME)))
        self._servicer = reflection.ReflectionServicer((*names, _V1_NAME), pool=pool)
        self._workers = WorkerPool(1, "reflection")
        self._lock = threading.Lock()
        # Least recently used first.
        self._sessions: dict[StreamCall, None] = {}
        self._ending = False

    def add_to(self, server: grpc.Server) -> None:
        # Neither reads nor writes messages: StreamCall has their bytes.
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(self._open)
        }
        server.add_generic_rpc_handlers(
            [
                grpc.method_handlers_generic_handler(name, handlers)
                for name in (reflection.SERVICE_NAME, _V1_NAME)
            ]
        )

    def end_all(self) -> None:
        """End the open sessions, which would stay as long as their clients like, and refuse new ones."""
        with self._lock:
            self._ending = True
            sessions = list(self._sessions)
        for session in sessions:
            session.cancel(SHUTTING_DOWN)

    def close(self) -> None:
        """Let the thread go."""
        self._workers.close()

    @non_blocking
    def _open(self, _requests: object, context: grpc.ServicerContext, _send: object) -> None:
        session = StreamCall(context)
        idle = None
        with self._lock:
            if self._ending:
                raise RequestError(SHUTTING_DOWN)
            if len(self._sessions) >= MOST_SESSIONS:
                idle = next(iter(self._sessions))
                del self._sessions[idle]
            self._sessions[session] = None
        if idle is not None:
            idle.cancel(_IDLE)
        if session.add_callback(lambda: self._forget(session)):
            self._receive_next(session)
        else:
            self._forget(session)

    def _receive_next(self, session: StreamCall) -> None:
        session.receive(lambda message: self._workers.put(lambda: self._answer(session, message)))

    def _answer(self, session: StreamCall, message: bytes | None) -> None:
        if message is None:
            session.finish()
            return
        with self._lock:
            if session in self._sessions:
                del self._sessions[session]
                self._sessions[session] = None
        try:
            request = reflection_pb2.ServerReflectionRequest.FromString(message)
            (response,) = self._servicer.ServerReflectionInfo(iter((request,)), _NO_CONTEXT)
            session.send(response.SerializeToString(), lambda: self._receive_next(session))
        except DecodeError:
            session.end(UNREADABLE_REQUEST)
        except Exception:  # noqa: BLE001 - as at the error boundary, which the handler has left
            failure = internal_failure(new_request_id())
            _log.exception("reflection failed", request_id=failure.request_id)
            session.end(failure)

    def _forget(self, session: StreamCall) -> None:
        with self._lock:
            self._sessions.pop(session, None)


def _pool_with_json_names(symbols: Iterable[str]) -> descriptor_pool.DescriptorPool:
    """The files of these services and messages, with every field's JSON name in them.

    Python's stubs leave the JSON names out, and grpcurl would then print `stored_in` where every other JSON
    form of the message has `storedIn`.
    """
    pool = descriptor_pool.DescriptorPool()
    added: set[str] = set()

    def add(file: FileDescriptor) -> None:
        if file.name in added:
            return
        added.add(file.name)
        for dependency in file.dependencies:
            add(dependency)
        proto = FileDescriptorProto()
        file.CopyToProto(proto)
        for message in proto.message_type:
            _set_json_names(message, file.message_types_by_name[message.name])
        pool.AddSerializedFile(proto.SerializeToString())

    for symbol in symbols:
        add(descriptor_pool.Default().FindFileContainingSymbol(symbol))
    return pool


def _v1_file(alpha: FileDescriptor) -> bytes:
    """The serialized file of v1, for which grpcio has no stubs, made of that of v1alpha."""
    proto = FileDescriptorProto()
    alpha.CopyToProto(proto)
    text = text_format.MessageToString(proto).replace(_ALPHA, "v1")
    return text_format.Parse(text, FileDescriptorProto()).SerializeToString()


def _set_json_names(message: DescriptorProto, descriptor: Descriptor) -> None:
    for field in message.field:
        field.json_name = descriptor.fields_by_name[field.name].json_name
    for nested in message.nested_type:
        _set_json_names(nested, descriptor.nested_types_by_name[nested.name])
