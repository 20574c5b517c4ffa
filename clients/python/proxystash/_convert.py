"""Messages and dataclasses: each made from the other."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, TypeVar

import grpc

from proxystash._records import as_utc
from proxystash.errors import InternalError, InvalidArgumentError
from proxystash.models import (
    CacheEntry,
    CacheStatistics,
    EntryError,
    GetResult,
    HealthMonitoring,
    HealthStatus,
    InvalidationResult,
    LatencySummary,
    PutResult,
    Tier,
    TierState,
    TierStatistics,
)
from proxystash.v1 import cache_service_pb2 as pb

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration
    from google.protobuf.timestamp_pb2 import Timestamp

_Known = TypeVar("_Known", Tier, TierState)

_TIERS: Mapping[int, Tier] = {pb.TIER_L1: Tier.L1, pb.TIER_L2: Tier.L2, pb.TIER_L3: Tier.L3}
_STATES: Mapping[int, TierState] = {
    pb.TIER_STATE_ACTIVE: TierState.ACTIVE,
    pb.TIER_STATE_DEGRADED: TierState.DEGRADED,
    pb.TIER_STATE_DISABLED: TierState.DISABLED,
}
_HEALTH: Mapping[str, pb.HealthStatus.ValueType] = {
    HealthStatus.UNKNOWN: pb.HEALTH_STATUS_UNKNOWN,
    HealthStatus.HEALTHY: pb.HEALTH_STATUS_HEALTHY,
    HealthStatus.DEGRADED: pb.HEALTH_STATUS_DEGRADED,
    HealthStatus.UNHEALTHY: pb.HEALTH_STATUS_UNHEALTHY,
    HealthStatus.DEAD: pb.HEALTH_STATUS_DEAD,
}
_HEALTH_FROM_MESSAGE: Mapping[int, HealthStatus] = {_HEALTH[status]: status for status in HealthStatus}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_REASONS = {"username": "INVALID_CREDENTIALS", "password": "INVALID_CREDENTIALS"}
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


def entry_to_message(entry: CacheEntry) -> pb.CacheEntry:
    """Make the message that stores an entry; what the server sets itself is left out.

    Raises InvalidArgumentError for a value that the message cannot hold.
    """
    message = pb.CacheEntry()
    unfit = ""
    for field, fill in _FILLERS.items():
        try:
            fill(message, entry)
        except _UNFIT:
            unfit = field
            break
    if unfit:
        # Raised out here because the exception in its context would quote the value.
        raise _invalid(unfit)
    return message


def checked_key(key: str) -> str:
    """Raises InvalidArgumentError for a key that the message cannot hold."""
    if _SURROGATE.search(key):
        raise _invalid("key")
    return key


def health_to_message(status: str) -> pb.HealthStatus.ValueType:
    """Raises InvalidArgumentError for what is no health status; the plain word will do."""
    number = _HEALTH.get(status)
    if number is None:
        raise _invalid("health_status")
    return number


def interval_to_message(interval: timedelta) -> pb.StreamStatsRequest:
    """Raises InvalidArgumentError for an interval that the message cannot hold."""
    request = pb.StreamStatsRequest()
    try:
        request.interval.FromTimedelta(interval)
    except _UNFIT:
        raise _invalid("interval") from None
    return request


def get_result(response: pb.GetResponse) -> GetResult | None:
    """None on a miss."""
    if not response.HasField("entry"):
        return None
    return GetResult(_entry(response.entry), _known(_TIERS, response.served_by, "tier"))


def get_results(response: pb.BatchGetResponse, asked: int) -> list[GetResult | None]:
    _check_count(len(response.results), asked)
    return [get_result(result) for result in response.results]


def put_result(response: pb.PutResponse) -> PutResult:
    return PutResult(
        key=response.key,
        expires_at=_time(response.expires_at),
        stored_in=tuple(_known(_TIERS, tier, "tier") for tier in response.stored_in),
    )


def put_results(response: pb.BatchPutResponse, asked: int) -> list[PutResult | EntryError]:
    _check_count(len(response.results), asked)
    return [
        _entry_error(result.error) if result.HasField("error") else put_result(result.stored)
        for result in response.results
    ]


def invalidation_result(response: pb.InvalidateByHealthResponse) -> InvalidationResult:
    return InvalidationResult(
        found=response.found,
        evicted=response.evicted,
        health_status=_health(response.health_status),
        failure_count=response.failure_count,
        failure_threshold=response.failure_threshold,
    )


def entries(response: pb.ListResponse) -> list[CacheEntry]:
    return [_entry(entry) for entry in response.entries]


def statistics(message: pb.CacheStatistics) -> CacheStatistics:
    return CacheStatistics(
        observed_at=_time(message.observed_at),
        started_at=_time(message.started_at),
        tiers=tuple(_tier_statistics(tier) for tier in message.tiers),
        hits=message.hits,
        misses=message.misses,
        hit_rate=message.hit_rate,
        entries=message.entries,
        promotions=message.promotions,
        demotions=message.demotions,
        removals=message.removals,
        stats_subscribers=message.stats_subscribers,
    )


def error_of_entry(error: InvalidArgumentError) -> EntryError:
    """What a refused put is in the answer of many."""
    return EntryError(error.code, error.reason, error.message, error.field)


def _entry(message: pb.CacheEntry) -> CacheEntry:
    labels = message.labels
    return CacheEntry(
        proxy_url=message.proxy_url,
        key=message.key,
        username=message.username or None,
        password=message.password or None,
        source=message.source,
        fetch_time=_optional_time(message, "fetch_time"),
        ttl=_duration(message.ttl) if message.HasField("ttl") else None,
        expires_at=_optional_time(message, "expires_at"),
        last_accessed=_optional_time(message, "last_accessed"),
        access_count=message.access_count,
        health_status=_health(message.health_status),
        failure_count=message.failure_count,
        evicted_from_l1=message.evicted_from_l1,
        health_monitoring=_monitoring(message.health_monitoring)
        if message.HasField("health_monitoring")
        else None,
        labels={name: labels[name] for name in labels},
    )


def _entry_error(message: pb.EntryError) -> EntryError:
    return EntryError(
        code=_CODES.get(message.code, "UNKNOWN"),
        reason=message.reason,
        message=message.message,
        field=message.field,
    )


def _monitoring(message: pb.HealthMonitoring) -> HealthMonitoring:
    return HealthMonitoring(
        last_health_check=_optional_time(message, "last_health_check"),
        consecutive_health_failures=message.consecutive_health_failures,
        consecutive_health_successes=message.consecutive_health_successes,
        recovery_attempt=message.recovery_attempt,
        next_check_time=_optional_time(message, "next_check_time"),
        last_health_error=message.last_health_error or None,
        total_health_checks=message.total_health_checks,
        total_health_check_failures=message.total_health_check_failures,
    )


def _tier_statistics(message: pb.TierStatistics) -> TierStatistics:
    return TierStatistics(
        tier=_known(_TIERS, message.tier, "tier"),
        backend=message.backend,
        state=_known(_STATES, message.state, "tier state"),
        entries=message.entries,
        max_entries=message.max_entries,
        hits=message.hits,
        misses=message.misses,
        hit_rate=message.hit_rate,
        evictions_capacity=message.evictions_capacity,
        evictions_ttl=message.evictions_ttl,
        evictions_health=message.evictions_health,
        evictions_corruption=message.evictions_corruption,
        errors=message.errors,
        read_latency=_latency(message.read_latency),
        write_latency=_latency(message.write_latency),
    )


def _latency(message: pb.LatencySummary) -> LatencySummary:
    return LatencySummary(p50=_duration(message.p50), p99=_duration(message.p99), max=_duration(message.max))


def _health(number: int) -> HealthStatus:
    return _HEALTH_FROM_MESSAGE.get(number, HealthStatus.UNKNOWN)


def _known(names: Mapping[int, _Known], number: int, what: str) -> _Known:
    name = names.get(number)
    if name is None:
        raise _unexpected(f"the server named a {what} that this client does not know; is it newer?")
    return name


def _check_count(answered: int, asked: int) -> None:
    if answered != asked:
        raise _unexpected(f"the server answered {answered} of {asked} items")


def _unexpected(message: str) -> InternalError:
    return InternalError(message, reason="UNEXPECTED_ANSWER")


def _time(message: Timestamp) -> datetime:
    # A third of what `ToDatetime` takes, of which every entry has three.
    return _EPOCH + timedelta(0, message.seconds, message.nanos // 1000)


def _duration(message: Duration) -> timedelta:
    return timedelta(0, message.seconds, message.nanos // 1000)


def _optional_time(message: pb.CacheEntry | pb.HealthMonitoring, name: str) -> datetime | None:
    if not message.HasField(name):  # type: ignore[arg-type]  # the stubs want the name as a literal
        return None
    return _time(getattr(message, name))


def _fill_fetch_time(message: pb.CacheEntry, entry: CacheEntry) -> None:
    if entry.fetch_time is not None:
        message.fetch_time.FromDatetime(as_utc(entry.fetch_time))


def _fill_ttl(message: pb.CacheEntry, entry: CacheEntry) -> None:
    if entry.ttl is not None:
        message.ttl.FromTimedelta(entry.ttl)


def _fill_health_status(message: pb.CacheEntry, entry: CacheEntry) -> None:
    message.health_status = _HEALTH[entry.health_status]


def _fill_health_monitoring(message: pb.CacheEntry, entry: CacheEntry) -> None:
    given = entry.health_monitoring
    if given is None:
        return
    made = message.health_monitoring
    made.SetInParent()
    made.consecutive_health_failures = given.consecutive_health_failures
    made.consecutive_health_successes = given.consecutive_health_successes
    made.recovery_attempt = given.recovery_attempt
    made.last_health_error = given.last_health_error or ""
    made.total_health_checks = given.total_health_checks
    made.total_health_check_failures = given.total_health_check_failures
    if given.last_health_check is not None:
        made.last_health_check.FromDatetime(as_utc(given.last_health_check))
    if given.next_check_time is not None:
        made.next_check_time.FromDatetime(as_utc(given.next_check_time))


# How each field gets into the message, and what that raises for a value that does not fit.
_FILLERS: Mapping[str, Callable[[pb.CacheEntry, CacheEntry], None]] = {
    "proxy_url": lambda message, entry: setattr(message, "proxy_url", entry.proxy_url),
    "key": lambda message, entry: setattr(message, "key", entry.key),
    "username": lambda message, entry: setattr(message, "username", entry.username or ""),
    "password": lambda message, entry: setattr(message, "password", entry.password or ""),
    "source": lambda message, entry: setattr(message, "source", entry.source),
    "fetch_time": _fill_fetch_time,
    "ttl": _fill_ttl,
    "health_status": _fill_health_status,
    "failure_count": lambda message, entry: setattr(message, "failure_count", entry.failure_count),
    "health_monitoring": _fill_health_monitoring,
    "labels": lambda message, entry: message.labels.update(entry.labels),
}
_UNFIT = (AttributeError, KeyError, TypeError, ValueError, OverflowError)


def _invalid(field: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{field} holds a value of the wrong type or out of range",
        code="INVALID_ARGUMENT",
        reason=_REASONS.get(field, f"INVALID_{field.upper()}"),
        field=field,
    )
