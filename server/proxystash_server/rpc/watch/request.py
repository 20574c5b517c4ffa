"""What a WatchRequest asks for, checked field by field."""

from __future__ import annotations

from typing import Final, NamedTuple

from proxystash.v1 import cache_service_pb2 as pb
from proxystash_server.cache import InvalidEntryError
from proxystash_server.rpc import convert
from proxystash_server.rpc.errors import Reason, RequestError, invalid, refusal_of
from proxystash_server.rpc.watch.cursor import Selection

MAX_KINDS: Final = 100
MAX_HISTORY_LENGTH: Final = 64
DEFAULT_PROGRESS_US: Final = 10_000_000
MIN_PROGRESS_US: Final = 1_000_000
MAX_PROGRESS_US: Final = 600_000_000

_KINDS: Final = frozenset(pb.ChangeKind.values()) - {pb.CHANGE_KIND_UNSPECIFIED}


class Watch(NamedTuple):
    """A watch that was asked for; `resume_after` is a history and a revision, the interval in seconds."""

    selection: Selection
    include_existing: bool
    resume_after: tuple[str, int] | None
    progress_interval: float


def read_request(request: pb.WatchRequest) -> Watch:
    """The watch that a request asks for; raises RequestError."""
    try:
        entry_filter = convert.read_filter(request.filter)
    except (InvalidEntryError, RequestError) as error:
        raise RequestError(refusal_of(error).under("filter")) from None
    selection = Selection(
        entry_filter,
        kinds=_read_kinds(request),
        include_entries=request.include_entries,
        include_credentials=request.include_credentials,
    )
    return Watch(selection, request.include_existing, _read_place(request), _read_interval(request))


def _read_kinds(request: pb.WatchRequest) -> frozenset[int]:
    if len(request.kinds) > MAX_KINDS:
        raise invalid(
            "kinds",
            Reason.INVALID_KINDS,
            f"kinds has {len(request.kinds):,} items; at most {MAX_KINDS} are allowed",
        )
    for place, kind in enumerate(request.kinds):
        if kind not in _KINDS:
            raise invalid(
                f"kinds[{place}]",
                Reason.INVALID_KINDS,
                f"kinds[{place}] has the unknown value {kind}; known: 1 to {max(_KINDS)}",
            )
    return frozenset(request.kinds)


def _read_place(request: pb.WatchRequest) -> tuple[str, int] | None:
    revision, history = request.after_revision, request.history
    if revision < 0:
        raise invalid("after_revision", Reason.INVALID_REVISION, "after_revision is negative")
    if revision and request.include_existing:
        raise invalid(
            "include_existing",
            Reason.INVALID_REVISION,
            "include_existing begins anew, and after_revision resumes: set one of them",
        )
    if bool(revision) != bool(history):
        raise invalid(
            "history",
            Reason.INVALID_HISTORY,
            "history and after_revision go together: a revision is a place in one history",
        )
    if len(history) > MAX_HISTORY_LENGTH:
        raise invalid(
            "history",
            Reason.INVALID_HISTORY,
            f"history has {len(history):,} characters; at most {MAX_HISTORY_LENGTH} are allowed",
        )
    return (history, revision) if history else None


def _read_interval(request: pb.WatchRequest) -> float:
    if not request.HasField("progress_interval"):
        return DEFAULT_PROGRESS_US / 1_000_000
    field = "progress_interval"
    interval_us = convert.read_duration(request.progress_interval, field, Reason.INVALID_INTERVAL)
    if not MIN_PROGRESS_US <= interval_us <= MAX_PROGRESS_US:
        raise invalid(field, Reason.INVALID_INTERVAL, "progress_interval must be between 1 s and 10 minutes")
    return interval_us / 1_000_000
