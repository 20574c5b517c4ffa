"""A failed gRPC call becomes the exception that says why."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from proxystash.errors import (
    ClientClosedError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    ProxystashError,
    ResourceExhaustedError,
    UnavailableError,
)

if TYPE_CHECKING:
    from google.protobuf.message import Message

_DOMAIN = "proxystash"
_DETAIL_KINDS = (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RequestInfo)
_DETAILS_KEY = "grpc-status-details-bin"
# How gRPC begins the details of a call that it had no connection to send on.
_NEVER_SENT = "failed to connect to all addresses"

_CLASSES: dict[grpc.StatusCode, type[ProxystashError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgumentError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.INTERNAL: InternalError,
    grpc.StatusCode.DATA_LOSS: InternalError,
}


def error_from_rpc(error: grpc.RpcError) -> ProxystashError:
    """Make the exception of a failed call, with what the server said in its rich details.

    Works for calls of both kinds of channel.
    """
    call = cast("grpc.Call", error)
    code = call.code()
    cls = _CLASSES.get(code, ProxystashError)
    message = call.details() or code.name
    reason = field = request_id = ""
    for detail in _details(call):
        if isinstance(detail, error_details_pb2.ErrorInfo) and detail.domain == _DOMAIN:
            reason = detail.reason
            request_id = request_id or detail.metadata.get("request_id", "")
        elif isinstance(detail, error_details_pb2.BadRequest) and detail.field_violations:
            field = detail.field_violations[0].field
        elif isinstance(detail, error_details_pb2.RequestInfo):
            request_id = detail.request_id
    if issubclass(cls, InternalError):
        return cls(message, code=code.name, reason=reason, field=field, request_id=request_id)
    return cls(message, code=code.name, reason=reason, field=field)


def closed_error() -> ClientClosedError:
    """The error of a call on a closed client."""
    return ClientClosedError("the client is closed", code="CANCELLED", reason="CLIENT_CLOSED")


def was_never_sent(error: ProxystashError) -> bool:
    """Whether a call is known not to have left this process, so that repeating it is harmless.

    It is known by gRPC's own words for it. Should they ever change, such a call is not repeated.
    """
    return isinstance(error, UnavailableError) and error.message.startswith(_NEVER_SENT)


def _details(call: grpc.Call) -> list[Message]:
    """The rich details of a status; those of unknown types are left out."""
    raw = next((value for key, value in call.trailing_metadata() or () if key == _DETAILS_KEY), None)
    if not isinstance(raw, bytes):
        return []
    found: list[Message] = []
    try:
        status = status_pb2.Status.FromString(raw)
        for packed in status.details:
            for kind in _DETAIL_KINDS:
                detail = kind()
                # False for a detail of another type.
                if packed.Unpack(detail):
                    found.append(detail)
    except DecodeError:
        # A status that cannot be read costs its details, not the code and the message.
        return []
    return found
