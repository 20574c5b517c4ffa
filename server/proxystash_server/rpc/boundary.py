"""The error boundary: every handler of every service behind it fails only in ways that a client may see."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeAlias

import grpc
import structlog

from proxystash_server.rpc.errors import (
    Failure,
    RequestError,
    failure_of,
    internal_failure,
    new_request_id,
)
from proxystash_server.rpc.requests import Reader, reader

# Handlers and their messages are of any service, so `Any` is what they are here.
Behavior = Callable[..., Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

# Attributes by which grpcio's server and CallPool are told how to run a handler; they must survive the
# wrapping.
_RUN_ATTRIBUTES: Final = ("experimental_non_blocking", "experimental_thread_pool", "urgent")

_log = structlog.stdlib.get_logger(__name__)


class ErrorBoundary(grpc.ServerInterceptor):
    """Wraps handlers so that what they raise becomes a status with details, and nothing internal gets out.

    RequestError and the cache's errors become what `failure_of` says. Anything else becomes INTERNAL with a
    request id under which the log has the cause. A request that is one message is read by what `readers` has
    for its method (`/package.Service/Method`), else by `requests.reader`, which may raise RequestError.
    Interceptors run on the completion thread, under the server's lock, so this one only exchanges the
    handler, which it keeps for each method; all its work is in the wrapper.
    """

    def __init__(
        self, readers: Mapping[str, Reader], *, request_ids: Callable[[], str] = new_request_id
    ) -> None:
        self._readers = readers
        self._request_ids = request_ids
        self._wrapped: dict[str, Handler] = {}

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = continuation(handler_call_details)
        if handler is None:  # gRPC answers UNIMPLEMENTED
            return None
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            wrapped = self._wrapped[method] = self._wrap(method, handler)
        return wrapped

    def _wrap(self, method: str, handler: Handler) -> Handler:
        read_request = handler.request_deserializer
        if read_request is not None and not handler.request_streaming:
            read_request = _tolerant(self._readers.get(method) or reader(read_request))
        make, behavior = _shape_of(handler)
        if handler.response_streaming and not getattr(behavior, "experimental_non_blocking", False):
            guarded = self._guard_iterator(method, behavior)
        else:
            guarded = self._guard(method, behavior)
        if not handler.request_streaming:
            # CallPool looks for both.
            guarded.takes_one_message = True  # type: ignore[attr-defined]
            guarded.method = method  # type: ignore[attr-defined]
        for name in _RUN_ATTRIBUTES:
            if hasattr(behavior, name):
                setattr(guarded, name, getattr(behavior, name))
        return make(
            guarded,
            request_deserializer=read_request,
            response_serializer=_unless_serialized(handler.response_serializer),
        )

    def _guard(self, method: str, behavior: Behavior) -> Behavior:
        @functools.wraps(behavior, updated=())
        def guarded(request: Any, context: grpc.ServicerContext, *send: Any) -> Any:  # noqa: ANN401 - see Behavior
            try:
                if request.__class__ is Failure:
                    raise RequestError(request)
                return behavior(request, context, *send)
            except Exception as error:  # noqa: BLE001 - the boundary is here to catch everything
                failure = self._failure(method, error, context)
            return context.abort_with_status(failure.to_status())

        return guarded

    def _guard_iterator(self, method: str, behavior: Behavior) -> Behavior:
        @functools.wraps(behavior, updated=())
        def guarded(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: ANN401 - see Behavior
            try:
                if request.__class__ is Failure:
                    raise RequestError(request)
                yield from behavior(request, context)
                return
            except Exception as error:  # noqa: BLE001 - the boundary is here to catch everything
                failure = self._failure(method, error, context)
            context.abort_with_status(failure.to_status())

        return guarded

    def _failure(self, method: str, error: Exception, context: grpc.ServicerContext) -> Failure:
        failure = failure_of(error)
        if failure is not None:
            return failure
        if _is_grpc_at_work(error, context):
            raise error
        failure = internal_failure(self._request_ids())
        _log.error(
            "request failed unexpectedly", method=method, request_id=failure.request_id, exc_info=error
        )
        return failure


def _is_grpc_at_work(error: Exception, context: grpc.ServicerContext) -> bool:
    """Whether grpcio raised `error` to unwind the handler: after `abort`, or because the client has gone."""
    if type(error) is grpc.RpcError:
        return not context.is_active()
    # What `abort` raises is a bare Exception; it has set a code before.
    return type(error) is Exception and not error.args and context.code() is not None  # type: ignore[attr-defined]


def _tolerant(read: Reader) -> Reader:
    """`read`, but answering with what is wrong where it fails: grpcio would make that failure INTERNAL.

    Not with the error, whose traceback holds the request, and would with it wait for the garbage collector.
    """

    def read_request(serialized: bytes) -> Any:  # noqa: ANN401 - see Behavior
        try:
            return read(serialized)
        except RequestError as error:
            return error.failure

    return read_request


def _unless_serialized(serialize: Callable[[Any], bytes] | None) -> Callable[[Any], bytes] | None:
    """`serialize`, but passing on what a handler has serialized itself."""
    if serialize is None:
        return None

    def write_response(response: Any) -> bytes:  # noqa: ANN401 - see Behavior
        return response if type(response) is bytes else serialize(response)

    return write_response


def _shape_of(handler: Handler) -> tuple[Callable[..., Handler], Behavior]:
    """grpcio's factory for handlers of this one's kind, and what the handler calls."""
    kinds = {
        (False, False): (grpc.unary_unary_rpc_method_handler, handler.unary_unary),
        (False, True): (grpc.unary_stream_rpc_method_handler, handler.unary_stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, handler.stream_unary),
        (True, True): (grpc.stream_stream_rpc_method_handler, handler.stream_stream),
    }
    make, behavior = kinds[handler.request_streaming, handler.response_streaming]
    if behavior is None:
        raise TypeError("a handler without a behavior")
    return make, behavior
