"""Server reflection with threads of its own, since an open session holds one."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, FileDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto
from grpc_reflection.v1alpha import reflection, reflection_pb2

from proxystash_server.rpc.errors import SHUTTING_DOWN, RequestError

_SESSIONS_AT_ONCE: Final = 4
# What errors carry: a tool that does not know these types asks for them.
_DETAILS: Final = ("google.rpc.ErrorInfo", "google.rpc.BadRequest", "google.rpc.RequestInfo")


class ReflectionSessions:
    """The reflection service of one server. Sessions beyond those that have a thread wait for one."""

    def __init__(self, services: Iterable[str]) -> None:
        names = (*services, reflection.SERVICE_NAME)
        self._servicer = reflection.ReflectionServicer(names, pool=_pool_with_json_names((*names, *_DETAILS)))
        self._pool = ThreadPoolExecutor(_SESSIONS_AT_ONCE, thread_name_prefix="reflection")
        self._lock = threading.Lock()
        self._open: set[grpc.ServicerContext] = set()
        self._ending = False

    def add_to(self, server: grpc.Server) -> None:
        def session(
            requests: Iterator[reflection_pb2.ServerReflectionRequest], context: grpc.ServicerContext
        ) -> Iterator[reflection_pb2.ServerReflectionResponse]:
            with self._lock:
                if self._ending:
                    raise RequestError(SHUTTING_DOWN)
                self._open.add(context)
            try:
                yield from self._servicer.ServerReflectionInfo(requests, context)
            finally:
                with self._lock:
                    self._open.discard(context)

        session.experimental_thread_pool = self._pool  # type: ignore[attr-defined]  # grpcio's server looks for it
        handler = grpc.stream_stream_rpc_method_handler(
            session,
            request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
            response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
        handlers = {"ServerReflectionInfo": handler}
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(reflection.SERVICE_NAME, handlers),)
        )

    def end_all(self) -> None:
        """Cancel the open sessions, which would stay as long as their clients like, and refuse new ones."""
        with self._lock:
            self._ending = True
            sessions = list(self._open)
        for context in sessions:
            context.cancel()

    def close(self) -> None:
        """Let the threads go."""
        self._pool.shutdown(wait=False, cancel_futures=True)


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


def _set_json_names(message: DescriptorProto, descriptor: Descriptor) -> None:
    for field in message.field:
        field.json_name = descriptor.fields_by_name[field.name].json_name
    for nested in message.nested_type:
        _set_json_names(nested, descriptor.nested_types_by_name[nested.name])
