"""A failed gRPC call becomes the exception that says why."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from proxystash.errors import (
    ClientClosedError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    ProxystashError,
    ResourceExhaustedError,
    UnavailableError,
)

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from proxystash.models import EntryError

_DOMAIN = "proxystash"
_DETAIL_KINDS = (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RequestInfo)
_DETAILS_KEY = "grpc-status-details-bin"
# How gRPC begins the details of a call that it had no connection to send on. Should its words ever change,
# such a call is taken for one that was sent.
_NEVER_SENT = ("failed to connect to all addresses", "DNS resolution failed", "errors resolving ")
# What may stand after the cause: older versions add the error number, and a failed lookup ends a list.
_CAUSE_END = re.compile(r" \(\d+\)$|\]$")

_CLASSES: dict[grpc.StatusCode, type[ProxystashError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgumentError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.INTERNAL: InternalError,
    grpc.StatusCode.DATA_LOSS: InternalError,
}


def error_from_rpc(error: grpc.RpcError, *, target: str, timeout: float) -> ProxystashError:
    """Make the exception of a failed call, with what the server said in its rich details.

    Works for the calls of both kinds of channel.
    """
    call = cast("grpc.Call", error)
    code = call.code()
    message = call.details() or code.name
    reason = field = request_id = ""
    for detail in _details(call):
        if isinstance(detail, error_details_pb2.ErrorInfo) and detail.domain == _DOMAIN:
            reason = detail.reason
        elif isinstance(detail, error_details_pb2.BadRequest) and detail.field_violations:
            field = detail.field_violations[0].field
        elif isinstance(detail, error_details_pb2.RequestInfo):
            request_id = detail.request_id
    cls = _CLASSES.get(code, ProxystashError)
    if cls is DeadlineExceededError:
        return deadline_error(target, timeout)
    if cls is UnavailableError and not reason and message.startswith(_NEVER_SENT):
        cause = _CAUSE_END.sub("", message.rpartition(": ")[2])
        return UnavailableError(f"cannot reach {target} ({cause})", code=code.name, sent=False)
    if cls is InternalError:
        return InternalError(message, code=code.name, reason=reason, field=field, request_id=request_id)
    return cls(message, code=code.name, reason=reason, field=field)


def error_of_item(error: EntryError) -> ProxystashError:
    """The exception that a call for one item raises, given what is said of it among many."""
    cls = _CLASSES.get(grpc.StatusCode[error.code], ProxystashError)
    return cls(error.message, code=error.code, reason=error.reason, field=error.field)


def closed_error() -> ClientClosedError:
    """The error of a call on a closed client."""
    return ClientClosedError("the client is closed", code="CANCELLED", reason="CLIENT_CLOSED")


def deadline_error(target: str, timeout: float) -> DeadlineExceededError:
    """The error of a call that got no answer within its seconds."""
    return DeadlineExceededError(f"no answer from {target} within {timeout:g} s", code="DEADLINE_EXCEEDED")


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
