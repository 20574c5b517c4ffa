"""Requests of PoolService to what the pool is asked; each field has its limit and its reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration

from proxystash.v1 import pool_service_pb2 as pb
from proxystash_server.cache import InvalidEntryError, check_key
from proxystash_server.cache.entry.limits import check_text
from proxystash_server.pool import requests as limits
from proxystash_server.pool.health import Outcome
from proxystash_server.pool.pool import Pool
from proxystash_server.pool.requests import (
    AcquireRequest,
    Release,
    Report,
    SelectionPolicy,
    SessionRequest,
    UseResult,
)
from proxystash_server.rpc import convert
from proxystash_server.rpc.errors import Reason, RequestError, invalid, refusal_of

# How far a client's clock may go ahead; such a time is taken as now.
MAX_AHEAD_US: Final = 60_000_000
_WAITS_FOR: Final = frozenset({Outcome.BLOCKED, Outcome.RATE_LIMITED})

T = TypeVar("T")


def read_acquire(
    request: pb.AcquireRequest, policy: SelectionPolicy, labels: frozenset[str] | None
) -> AcquireRequest:
    """What Acquire asks for; `policy` where it names none, `labels` those that can be asked for."""
    try:
        wanted = convert.read_filter(request.filter)
    except (InvalidEntryError, RequestError) as error:
        raise RequestError(refusal_of(error).under("filter")) from None
    if labels is not None and not labels.issuperset(wanted.labels):
        raise invalid(
            "filter.labels",
            Reason.INVALID_FILTER,
            "a label of the filter is not among those that the server's setting pool_labels names",
        )
    count = _in_range(request.count, "count", Reason.INVALID_COUNT, limits.MAX_COUNT) or 1
    if request.policy:
        try:
            policy = SelectionPolicy(request.policy)
        except ValueError:
            raise invalid(
                "policy", Reason.INVALID_POLICY, f"policy has the unknown value {request.policy}"
            ) from None
    excluded = request.exclude_keys
    if len(excluded) > limits.MAX_EXCLUDED:
        raise invalid(
            "exclude_keys",
            Reason.TOO_MANY_KEYS,
            f"exclude_keys has {len(excluded):,} items; at most {limits.MAX_EXCLUDED} are allowed",
        )
    for place, key in enumerate(excluded):
        read_key(key, f"exclude_keys[{place}]")
    holder = read_text(request.holder, "holder", Reason.INVALID_HOLDER, limits.MAX_HOLDER_BYTES)
    if request.exclude_held and not holder:
        raise invalid("holder", Reason.INVALID_HOLDER, "exclude_held needs a holder")
    session = _read_session(request.session) if request.HasField("session") else None
    if session is not None and count != 1:
        raise invalid("count", Reason.INVALID_COUNT, "a session is for a count of 1")
    return AcquireRequest(
        wanted,
        read_target(request.target, "target"),
        count,
        policy,
        read_lease_duration(request),
        _seconds(request, "wait", Reason.INVALID_WAIT, 0.0, limits.MAX_WAIT, 0.0),
        _in_range(request.max_leases, "max_leases", Reason.INVALID_MAX_LEASES),
        _seconds(request, "reuse_delay", Reason.INVALID_REUSE_DELAY, 0.0, limits.MAX_REUSE_DELAY, 0.0),
        frozenset(excluded),
        request.exclude_held,
        holder,
        session,
        read_text(request.request_id, "request_id", Reason.INVALID_REQUEST_ID, limits.MAX_REQUEST_ID_BYTES),
    )


def read_lease_duration(request: pb.AcquireRequest | pb.RenewRequest) -> float:
    """Seconds from 1 to 3,600; 60 where it is not set."""
    return _seconds(
        request,
        "lease_duration",
        Reason.INVALID_LEASE_DURATION,
        limits.MIN_DURATION,
        limits.MAX_DURATION,
        limits.DEFAULT_DURATION,
    )


def read_releases(request: pb.ReleaseRequest, pool: Pool) -> list[Release]:
    """The leases to end. One bad result refuses them all, since none has an error of its own."""
    check_size(request.releases, "releases", Reason.TOO_MANY_RELEASES)
    releases = []
    for place, release in enumerate(request.releases):
        result = None
        if release.HasField("result"):
            result = _within(f"releases[{place}].result", partial(read_result, release.result, pool))
        releases.append(Release(release.lease_id, result, release.end_session))
    return releases


def read_report(report: pb.UseReport, pool: Pool) -> Report:
    """One report; raises InvalidEntryError or RequestError, their field relative to the report."""
    subject = report.WhichOneof("subject")
    if subject is None:
        raise invalid("key", Reason.MISSING_SUBJECT, "neither key nor lease_id is set")
    if not report.HasField("result"):
        raise invalid("result", Reason.MISSING_RESULT, "result is not set")
    if subject == "key":
        check_key(report.key)
    result = _within("result", partial(read_result, report.result, pool))
    return Report(result, report.key, report.lease_id)


def read_result(message: pb.UseResult, pool: Pool) -> UseResult:
    """What became of uses; raises RequestError, its field relative to the result."""
    try:
        outcome = Outcome(message.outcome)
    except ValueError:
        text = f"outcome has the unknown value {message.outcome}" if message.outcome else "outcome is not set"
        raise invalid("outcome", Reason.INVALID_OUTCOME, text) from None
    count = _in_range(message.count, "count", Reason.INVALID_COUNT, limits.MAX_RESULT_COUNT) or 1
    finished_at = pool.now()
    if message.HasField("finished_at"):
        finished_us = convert.read_timestamp(message.finished_at, "finished_at", Reason.INVALID_FINISHED_AT)
        ago = finished_at - pool.from_wall_us(finished_us)
        if not -MAX_AHEAD_US / 1_000_000 <= ago <= limits.MAX_RESULT_AGE:
            raise invalid(
                "finished_at",
                Reason.INVALID_FINISHED_AT,
                "finished_at must be at most 1 h ago, and not to come",
            )
        finished_at -= max(0.0, ago)
    latency = None
    if message.HasField("latency"):
        latency = _seconds(message, "latency", Reason.INVALID_LATENCY, 0.0, limits.MAX_LATENCY, 0.0)
    if message.HasField("retry_after") and outcome not in _WAITS_FOR:
        raise invalid(
            "retry_after",
            Reason.INVALID_RETRY_AFTER,
            "retry_after is for OUTCOME_BLOCKED and OUTCOME_RATE_LIMITED alone",
        )
    return UseResult(
        outcome,
        finished_at,
        latency,
        read_target(message.target, "target") or None,
        count,
        _seconds(message, "retry_after", Reason.INVALID_RETRY_AFTER, 0.0, limits.MAX_RETRY_AFTER, 0.0),
    )


def read_target(target: str, field: str) -> str:
    """A target in small letters; raises RequestError."""
    return read_text(target, field, Reason.INVALID_TARGET, limits.MAX_TARGET_BYTES).lower()


def read_session_id(session_id: str, field: str) -> str:
    """The name of a session, which is not empty; raises RequestError."""
    if not session_id:
        raise invalid(field, Reason.INVALID_SESSION, f"{field} is empty")
    return read_text(session_id, field, Reason.INVALID_SESSION, limits.MAX_SESSION_BYTES)


def read_key(key: str, field: str) -> str:
    """A usable key; raises RequestError."""
    try:
        check_key(key)
    except InvalidEntryError as error:
        raise invalid(field, error.reason, str(error)) from None
    return key


def read_text(text: str, field: str, reason: Reason, most_bytes: int) -> str:
    """A text without control characters, of so many bytes at most; raises RequestError, never quotes it."""
    if len(text) > most_bytes or len(text.encode()) > most_bytes:
        raise invalid(field, reason, f"{field} is longer than {most_bytes} bytes")
    try:
        check_text(field, reason, text)
    except InvalidEntryError as error:
        raise invalid(field, reason, str(error)) from None
    return text


def check_size(items: Sequence[object], field: str, reason: Reason) -> None:
    """Raise RequestError for more items than a request may have."""
    if len(items) > limits.MAX_BATCH:
        raise invalid(
            field, reason, f"{field} has {len(items):,} items; at most {limits.MAX_BATCH:,} are allowed"
        )


def check_deadline(context: grpc.ServicerContext, wait: float) -> None:
    """Raise RequestError if the call's deadline comes before the end of the wait."""
    if context.time_remaining() <= wait:
        raise invalid("wait", Reason.INVALID_WAIT, "wait does not end before the call's deadline")


def _read_session(message: pb.Session) -> SessionRequest:
    def read() -> SessionRequest:
        max_age = None
        if message.HasField("max_age"):
            max_age = _seconds(message, "max_age", Reason.INVALID_SESSION, 1.0, limits.MAX_SESSION_AGE, 1.0)
        return SessionRequest(
            read_session_id(message.id, "id"),
            _seconds(
                message,
                "idle_timeout",
                Reason.INVALID_SESSION,
                1.0,
                limits.MAX_IDLE_TIMEOUT,
                limits.DEFAULT_IDLE_TIMEOUT,
            ),
            max_age,
            message.strict,
        )

    return _within("session", read)


def _within(parent: str, read: Callable[[], T]) -> T:
    """What `read` gives; its refusals name their field as seen from outside of `parent`."""
    try:
        return read()
    except RequestError as error:
        raise RequestError(error.failure.under(parent)) from None


def _seconds(message: object, field: str, reason: Reason, least: float, most: float, default: float) -> float:
    """A duration in seconds, within limits; the default where it is not set."""
    if not message.HasField(field):  # type: ignore[attr-defined]  # a message, whichever
        return default
    duration: Duration = getattr(message, field)
    seconds = convert.read_duration(duration, field, reason) / 1_000_000
    if not least <= seconds <= most:
        raise invalid(field, reason, f"{field} must be between {least:g} s and {most:g} s")
    return seconds


def _in_range(number: int, field: str, reason: Reason, most: int | None = None) -> int:
    if number < 0:
        raise invalid(field, reason, f"{field} is negative")
    if most is not None and number > most:
        raise invalid(field, reason, f"{field} is {number:,}; at most {most:,} are allowed")
    return number
