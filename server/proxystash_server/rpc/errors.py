"""What a client is told when something fails: one table from errors to status codes and reasons."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

import grpc
from google.protobuf.any_pb2 import Any as PackedMessage
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from proxystash.v1 import cache_service_pb2 as pb
from proxystash_server.cache import (
    BannedError,
    CacheClosedError,
    CacheError,
    CacheUnavailableError,
    InvalidEntryError,
    NotStoredError,
)
from proxystash_server.pool.requests import (
    LeaseNotFoundError,
    PoolFullError,
    PoolLoadingError,
    SessionLostError,
)

DOMAIN: Final = "proxystash"


class Reason(StrEnum):
    """The ErrorInfo reasons of this layer; those of a bad entry or key are the cache's."""

    MISSING_ENTRY = "MISSING_ENTRY"
    TOO_MANY_KEYS = "TOO_MANY_KEYS"
    TOO_MANY_ENTRIES = "TOO_MANY_ENTRIES"
    INVALID_TTL = "INVALID_TTL"
    INVALID_FETCH_TIME = "INVALID_FETCH_TIME"
    INVALID_HEALTH_STATUS = "INVALID_HEALTH_STATUS"
    INVALID_HEALTH_MONITORING = "INVALID_HEALTH_MONITORING"
    INVALID_PAGE_SIZE = "INVALID_PAGE_SIZE"
    INVALID_PAGE_TOKEN = "INVALID_PAGE_TOKEN"  # noqa: S105 - the word "token" is all that looks like a password here
    INVALID_FILTER = "INVALID_FILTER"
    INVALID_MODE = "INVALID_MODE"
    INVALID_UPDATE_MASK = "INVALID_UPDATE_MASK"
    NOT_STORED = "NOT_STORED"
    BANNED = "BANNED"
    INVALID_INTERVAL = "INVALID_INTERVAL"
    INVALID_KINDS = "INVALID_KINDS"
    INVALID_REVISION = "INVALID_REVISION"
    INVALID_HISTORY = "INVALID_HISTORY"
    REVISION_COMPACTED = "REVISION_COMPACTED"
    UNREADABLE_REQUEST = "UNREADABLE_REQUEST"
    REQUEST_TOO_LARGE = "REQUEST_TOO_LARGE"
    ENTRY_TOO_LARGE = "ENTRY_TOO_LARGE"
    UNKNOWN_SERVICE = "UNKNOWN_SERVICE"
    OVERLOADED = "OVERLOADED"
    REQUEST_OVERDUE = "REQUEST_OVERDUE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    NO_REQUEST = "NO_REQUEST"
    TOO_MANY_WATCHES = "TOO_MANY_WATCHES"
    STREAM_NOT_READ = "STREAM_NOT_READ"
    ANSWER_NOT_READ = "ANSWER_NOT_READ"
    SESSION_IDLE = "SESSION_IDLE"
    TOO_MANY_SUBSCRIBERS = "TOO_MANY_SUBSCRIBERS"
    NO_TIER_AVAILABLE = "NO_TIER_AVAILABLE"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    INVALID_TARGET = "INVALID_TARGET"
    INVALID_COUNT = "INVALID_COUNT"
    INVALID_POLICY = "INVALID_POLICY"
    INVALID_LEASE_DURATION = "INVALID_LEASE_DURATION"
    INVALID_WAIT = "INVALID_WAIT"
    INVALID_MAX_LEASES = "INVALID_MAX_LEASES"
    INVALID_REUSE_DELAY = "INVALID_REUSE_DELAY"
    INVALID_HOLDER = "INVALID_HOLDER"
    INVALID_SESSION = "INVALID_SESSION"
    INVALID_REQUEST_ID = "INVALID_REQUEST_ID"
    INVALID_OUTCOME = "INVALID_OUTCOME"
    INVALID_LATENCY = "INVALID_LATENCY"
    INVALID_FINISHED_AT = "INVALID_FINISHED_AT"
    INVALID_RETRY_AFTER = "INVALID_RETRY_AFTER"
    MISSING_SUBJECT = "MISSING_SUBJECT"
    MISSING_RESULT = "MISSING_RESULT"
    TOO_MANY_LEASE_IDS = "TOO_MANY_LEASE_IDS"
    TOO_MANY_RELEASES = "TOO_MANY_RELEASES"
    TOO_MANY_REPORTS = "TOO_MANY_REPORTS"
    LEASE_NOT_FOUND = "LEASE_NOT_FOUND"
    SESSION_LOST = "SESSION_LOST"
    POOL_LOADING = "POOL_LOADING"
    POOL_FULL = "POOL_FULL"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True, slots=True)
class Failure:
    """Everything a client learns about one failure; nothing in it is internal or secret.

    `field` is the path of the field at fault, seen from the request (or from the entry, within a batch);
    empty if no field is. `request_id` is set for unexpected errors only, and is in the log line as well.
    `metadata` is that of the ErrorInfo: facts for programs.
    """

    code: grpc.StatusCode
    reason: str
    message: str
    field: str = ""
    request_id: str = ""
    metadata: tuple[tuple[str, str], ...] = ()

    def under(self, parent: str) -> Failure:
        """The same failure, seen from the message that holds the faulty one in its field `parent`."""
        return replace(self, field=f"{parent}.{self.field}" if self.field else parent)

    def to_status(self) -> grpc.Status:
        """The failure as a google.rpc.Status with its details, ready for `abort_with_status`."""
        details: list[Message] = [
            error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=dict(self.metadata))
        ]
        if self.field:
            violation = error_details_pb2.BadRequest.FieldViolation(
                field=self.field, description=self.message, reason=self.reason
            )
            details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        if self.request_id:
            details.append(error_details_pb2.RequestInfo(request_id=self.request_id))
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in details:
            packed = PackedMessage()
            packed.Pack(detail)
            status.details.append(packed)
        return rpc_status.to_status(status)

    def to_entry_error(self) -> pb.EntryError:
        """The failure as the outcome of one entry of a batch."""
        return pb.EntryError(
            code=self.code.value[0], reason=self.reason, message=self.message, field=self.field
        )


class RequestError(Exception):
    """A request that fails for a known reason, found at this edge."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def invalid(field: str, reason: str, message: str) -> RequestError:
    """The error for a request whose `field` is wrong."""
    return RequestError(Failure(grpc.StatusCode.INVALID_ARGUMENT, reason, message, field))


SHUTTING_DOWN: Final = Failure(
    grpc.StatusCode.UNAVAILABLE,
    Reason.SHUTTING_DOWN,
    "the server is shutting down; try another, or again later",
)
NO_TIER_AVAILABLE: Final = Failure(
    grpc.StatusCode.UNAVAILABLE,
    Reason.NO_TIER_AVAILABLE,
    "no tier is able to serve the request now; try again later",
)
UNREADABLE_REQUEST: Final = Failure(
    grpc.StatusCode.INVALID_ARGUMENT,
    Reason.UNREADABLE_REQUEST,
    "the request is not a message of the type that this method takes",
)

# The one place where the cache's errors become gRPC's; the nearest base class decides. InvalidEntryError
# alone is not here: it brings its own reason and field. What is in neither is unexpected, and INTERNAL.
_FAILURES: Final[Mapping[type[CacheError], Failure]] = {
    CacheUnavailableError: NO_TIER_AVAILABLE,
    CacheClosedError: SHUTTING_DOWN,
    NotStoredError: Failure(
        grpc.StatusCode.NOT_FOUND, Reason.NOT_STORED, "there is no such entry, whose fields could be changed"
    ),
    BannedError: Failure(
        grpc.StatusCode.FAILED_PRECONDITION,
        Reason.BANNED,
        "the proxy is banned after its failures; Unban lifts that, or a later success",
    ),
    # These say themselves what happened.
    PoolFullError: Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.POOL_FULL, ""),
    PoolLoadingError: Failure(grpc.StatusCode.UNAVAILABLE, Reason.POOL_LOADING, ""),
    SessionLostError: Failure(grpc.StatusCode.FAILED_PRECONDITION, Reason.SESSION_LOST, ""),
    LeaseNotFoundError: Failure(grpc.StatusCode.NOT_FOUND, Reason.LEASE_NOT_FOUND, ""),
}


def failure_of(error: Exception) -> Failure | None:
    """What a client is told about `error`; None if it is none of the errors that are raised on purpose."""
    if isinstance(error, RequestError | InvalidEntryError):
        return refusal_of(error)
    for kind in type(error).__mro__:
        failure = _FAILURES.get(kind)
        if failure is not None:
            return failure if failure.message else replace(failure, message=str(error))
    return None


def refusal_of(error: RequestError | InvalidEntryError) -> Failure:
    """What a client is told about a request, or an entry in it, that is at fault itself."""
    if isinstance(error, RequestError):
        return error.failure
    return Failure(grpc.StatusCode.INVALID_ARGUMENT, error.reason, str(error), error.field)


def internal_failure(request_id: str) -> Failure:
    """What a client is told about an unexpected error: where to find it in the log, and nothing else."""
    return Failure(
        grpc.StatusCode.INTERNAL,
        Reason.INTERNAL,
        f"internal error; the server's log has the cause under request id {request_id}",
        request_id=request_id,
    )


def new_request_id() -> str:
    """A random id by which a log line is found again."""
    return secrets.token_hex(8)
