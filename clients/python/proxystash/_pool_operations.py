"""The calls of the pool, said once for both kinds of client, as in `_operations`."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Unpack

from proxystash import _convert, messages
from proxystash._operations import Operation, Page, filter_message
from proxystash.errors import NoProxyError
from proxystash.models import CacheEntry, EntryError
from proxystash.pool_models import (
    AcquireOptions,
    AcquireResult,
    HealthEffect,
    Lease,
    LeaseRelease,
    Outcome,
    ProxyFilter,
    ProxyHealth,
    ReleaseResult,
    RenewResult,
    SelectionPolicy,
    Session,
    Shortage,
    TargetSummary,
    UseReport,
    UseResult,
)
from proxystash.v1 import pool_service_pb2 as pb

Result = UseResult | Outcome | str
_PAGE = 1000
# The server's, where a request says nothing.
_DEFAULT_SECONDS = 60.0
_SHORTAGES = {
    None: "there is no proxy to lend",
    Shortage.NO_MATCH: "no proxy matches",
    Shortage.LEASED_OUT: "all proxies that match are leased out",
    Shortage.RESTING: "all proxies that match rest after failures",
    Shortage.EXCLUDED: "all proxies that match are excluded",
}


def acquire_request(target: str, count: int, options: AcquireOptions) -> pb.AcquireRequest:
    """The request of an acquire, with a request id that makes it safe to repeat.

    Raises InvalidArgumentError for a value that the message cannot hold, TypeError for an unknown option.
    """
    return _acquire_request(target, count, **options)


def _acquire_request(
    target: str,
    count: int,
    *,
    policy: SelectionPolicy | str = "",
    lease_duration: timedelta | None = None,
    wait: timedelta | None = None,
    max_leases: int = 0,
    reuse_delay: timedelta | None = None,
    exclude_keys: Iterable[str | CacheEntry] = (),
    exclude_held: bool = False,
    holder: str = "",
    session: Session | str | None = None,
    request_id: str = "",
    **wanted: Unpack[ProxyFilter],
) -> pb.AcquireRequest:
    request = pb.AcquireRequest(filter=filter_message(**wanted))
    values = {
        "target": target,
        "count": count,
        "max_leases": max_leases,
        "exclude_held": exclude_held,
        "holder": holder,
        "request_id": request_id or uuid.uuid4().hex,
    }
    _convert.set_fields(request, values)
    if policy:
        number = messages.POLICY_NUMBERS.get(policy)
        if number is None:
            raise _convert.invalid("policy")
        request.policy = number
    durations = {"lease_duration": lease_duration, "wait": wait, "reuse_delay": reuse_delay}
    for name, duration in durations.items():
        if duration is not None:
            getattr(request, name).CopyFrom(_convert.duration_to_message(duration, name))
    request.exclude_keys.extend(_convert.checked_key(key) for key in _each(exclude_keys))
    if session is not None:
        one = Session(session) if isinstance(session, str) else session
        unfit = messages.fill_session(request.session, one)
        if unfit:
            raise _convert.invalid(f"session.{unfit}")
    return request


def acquire(request: pb.AcquireRequest) -> Operation[pb.AcquireRequest, pb.AcquireResponse, AcquireResult]:
    return Operation(
        request, acquire_result, repeatable=True, locate=lambda field: field.removeprefix("filter.")
    )


def acquire_result(response: pb.AcquireResponse) -> AcquireResult:
    return AcquireResult(
        tuple(map(messages.read_lease, response.leases)),
        messages.SHORTAGES.get(response.shortage),
        response.retry_after.ToTimedelta() if response.HasField("retry_after") else None,
    )


def renew(
    lease_ids: Sequence[str], lease_duration: timedelta | None
) -> Operation[pb.RenewRequest, pb.RenewResponse, list[RenewResult]]:
    request = pb.RenewRequest(lease_ids=lease_ids)
    if lease_duration is not None:
        request.lease_duration.CopyFrom(_convert.duration_to_message(lease_duration, "lease_duration"))

    def convert(response: pb.RenewResponse) -> list[RenewResult]:
        _convert.check_count(len(response.results), len(lease_ids))
        return [*map(messages.read_renew_result, response.results)]

    return Operation(request, convert, repeatable=True)


def release(
    releases: Sequence[LeaseRelease], locate: Callable[[str], str] = str
) -> Operation[pb.ReleaseRequest, pb.ReleaseResponse, list[ReleaseResult]]:
    """Ends leases. Repeated, it does nothing more, and says of those it has ended that they were not held."""
    request = pb.ReleaseRequest(releases=map(release_message, releases))

    def convert(response: pb.ReleaseResponse) -> list[ReleaseResult]:
        _convert.check_count(len(response.results), len(releases))
        return [*map(messages.read_release_result, response.results)]

    return Operation(request, convert, repeatable=True, locate=locate)


def report(
    reports: Sequence[UseReport],
) -> Operation[pb.ReportResultsRequest, pb.ReportResultsResponse, list[HealthEffect | EntryError]]:
    request = pb.ReportResultsRequest()
    for one in reports:
        message = request.reports.add(result=use_result_message(one.result))
        if one.lease_id:
            message.lease_id = one.lease_id
        else:
            message.key = _convert.checked_key(one.key)

    def convert(response: pb.ReportResultsResponse) -> list[HealthEffect | EntryError]:
        _convert.check_count(len(response.results), len(reports))
        return [
            _convert.entry_error(result.error)
            if result.HasField("error")
            else messages.read_health_effect(result.effect)
            for result in response.results
        ]

    # Each one counts.
    return Operation(request, convert, repeatable=False)


def end_session(session_id: str, target: str) -> Operation[pb.EndSessionRequest, pb.EndSessionResponse, bool]:
    # The second time would end what another call has begun meanwhile.
    request = pb.EndSessionRequest()
    _convert.set_fields(request, {"session_id": session_id, "target": target})
    return Operation(request, lambda response: response.ended, repeatable=False)


def health(
    key: str | CacheEntry,
) -> Operation[pb.GetProxyHealthRequest, pb.GetProxyHealthResponse, ProxyHealth | None]:
    return Operation(
        pb.GetProxyHealthRequest(key=_convert.checked_key(key)),
        lambda response: messages.read_proxy_health(response.health) if response.HasField("health") else None,
        repeatable=True,
    )


def targets_page(
    page_token: str,
) -> Operation[pb.ListTargetsRequest, pb.ListTargetsResponse, Page[TargetSummary]]:
    return Operation(
        pb.ListTargetsRequest(page_size=_PAGE, page_token=page_token),
        lambda response: Page(
            [*map(messages.read_target_summary, response.targets)], response.next_page_token
        ),
        repeatable=True,
    )


def leases_page(
    key: str | CacheEntry, holder: str, target: str, session_id: str
) -> Callable[[str], Operation[pb.ListLeasesRequest, pb.ListLeasesResponse, Page[Lease]]]:
    """The operation for each page token."""
    request = pb.ListLeasesRequest(page_size=_PAGE, key=_convert.checked_key(key) if key else "")
    _convert.set_fields(request, {"holder": holder, "target": target, "session_id": session_id})

    def page(
        page_token: str,
    ) -> Operation[pb.ListLeasesRequest, pb.ListLeasesResponse, Page[Lease]]:
        request.page_token = page_token
        return Operation(
            request,
            lambda response: Page([*map(messages.read_lease, response.leases)], response.next_page_token),
            repeatable=True,
        )

    return page


def no_proxy(result: AcquireResult) -> NoProxyError:
    """The exception for who needs a proxy, and there is none."""
    return NoProxyError(_SHORTAGES[result.shortage], shortage=result.shortage, retry_after=result.retry_after)


def lease_seconds(request: pb.AcquireRequest) -> float:
    """For how long a lease is asked for."""
    if not request.HasField("lease_duration"):
        return _DEFAULT_SECONDS
    return request.lease_duration.ToTimedelta() / timedelta(seconds=1)


def wait_seconds(request: pb.AcquireRequest) -> float:
    """For how long a call may wait."""
    return max(0.0, request.wait.ToTimedelta() / timedelta(seconds=1))


def shorten_wait(request: pb.AcquireRequest, seconds: float) -> None:
    """Have a call wait no longer than that: the later the attempt, the nearer its deadline."""
    if 0 < seconds < wait_seconds(request):
        request.wait.FromTimedelta(timedelta(seconds=seconds))
    elif seconds <= 0:
        request.ClearField("wait")


def use_result(result: Result) -> UseResult:
    """A result, or what became of a use alone, as a result."""
    return result if isinstance(result, UseResult) else UseResult(result)


def use_result_message(result: UseResult) -> pb.UseResult:
    """Raises InvalidArgumentError for a value that the message cannot hold."""
    message = pb.UseResult()
    unfit = messages.fill_use_result(message, result)
    if unfit:
        raise _convert.invalid(unfit)
    return message


def release_message(release: LeaseRelease) -> pb.LeaseRelease:
    """As `use_result_message`."""
    message = pb.LeaseRelease(lease_id=release.lease_id, end_session=release.end_session)
    if release.result is not None:
        message.result.CopyFrom(use_result_message(release.result))
    return message


def lease_id_of(lease: str | Lease) -> str:
    return lease if isinstance(lease, str) else lease.lease_id


def report_of(key: str | CacheEntry | Lease, result: Result) -> UseReport:
    """The report of a use of a lease, or else of a key."""
    if isinstance(key, Lease):
        return UseReport(use_result(result), lease_id=key.lease_id)
    return UseReport(use_result(result), key=key)


def _each(keys: Iterable[str | CacheEntry]) -> Iterable[str | CacheEntry]:
    return [keys] if isinstance(keys, str | CacheEntry) else keys
