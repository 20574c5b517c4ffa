"""Messages to entries, and entries and statistics to messages.

On the way out there are integers only: a response is filled field by field, in place, which costs a quarter
of what building it from datetimes and sub-messages does.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from proxystash.models import HealthMonitoring, HealthStatus, TierState
from proxystash.proxies import SCHEMES
from proxystash.v1 import cache_service_pb2 as pb
from proxystash_server.cache import (
    CacheEntry,
    CacheManager,
    CacheStatistics,
    CacheTierType,
    EntryFilter,
    LatencySummary,
    TierStatistics,
)
from proxystash_server.cache.limits import check_source, checked_labels
from proxystash_server.rpc.errors import Reason, invalid

# The bounds of google.protobuf.Timestamp (years 1 to 9999) and Duration (10,000 years), in seconds.
_FIRST_SECOND: Final = -62_135_596_800
_LAST_SECOND: Final = 253_402_300_799
_LONGEST_SECONDS: Final = 315_576_000_000
_SECOND_NANOS: Final = 1_000_000_000

_HEALTH_TO_MESSAGE: Final[Mapping[HealthStatus, pb.HealthStatus.ValueType]] = {
    HealthStatus.UNKNOWN: pb.HEALTH_STATUS_UNKNOWN,
    HealthStatus.HEALTHY: pb.HEALTH_STATUS_HEALTHY,
    HealthStatus.DEGRADED: pb.HEALTH_STATUS_DEGRADED,
    HealthStatus.UNHEALTHY: pb.HEALTH_STATUS_UNHEALTHY,
    HealthStatus.DEAD: pb.HEALTH_STATUS_DEAD,
}
_HEALTH_FROM_MESSAGE: Final[Mapping[int, HealthStatus]] = {
    number: status for status, number in _HEALTH_TO_MESSAGE.items()
}
TIER_TO_MESSAGE: Final[Mapping[CacheTierType, pb.Tier.ValueType]] = {
    CacheTierType.L1: pb.TIER_L1,
    CacheTierType.L2: pb.TIER_L2,
    CacheTierType.L3: pb.TIER_L3,
}
_STATE_TO_MESSAGE: Final[Mapping[TierState, pb.TierState.ValueType]] = {
    TierState.ACTIVE: pb.TIER_STATE_ACTIVE,
    TierState.DEGRADED: pb.TIER_STATE_DEGRADED,
    TierState.DISABLED: pb.TIER_STATE_DISABLED,
}


def read_entry(manager: CacheManager, message: pb.CacheEntry) -> CacheEntry:
    """The new entry that a client's message describes; fields that the server sets are ignored.

    Raises InvalidEntryError or RequestError, whose field is relative to the entry.
    """
    labels = message.labels
    return manager.new_entry(
        message.proxy_url,
        key=message.key,
        username=message.username or None,
        password=message.password or None,
        source=message.source,
        fetch_time_us=(
            read_timestamp(message.fetch_time, "fetch_time", Reason.INVALID_FETCH_TIME)
            if message.HasField("fetch_time")
            else None
        ),
        ttl_us=read_duration(message.ttl, "ttl", Reason.INVALID_TTL) if message.HasField("ttl") else None,
        health_status=(
            read_health_status(message.health_status, "health_status")
            if message.health_status
            else HealthStatus.UNKNOWN
        ),
        failure_count=message.failure_count,
        health_monitoring=(
            _read_monitoring(message.health_monitoring) if message.HasField("health_monitoring") else None
        ),
        # Its own `items` takes twice as long.
        labels={name: labels[name] for name in labels} if labels else None,
    )


def read_timestamp(message: Timestamp, field: str, reason: Reason) -> int:
    """Microseconds since the epoch; raises RequestError for what is no valid Timestamp."""
    if not (_FIRST_SECOND <= message.seconds <= _LAST_SECOND and 0 <= message.nanos < _SECOND_NANOS):
        raise invalid(
            field, reason, f"{field} is not a valid Timestamp: years 1 to 9999, nanos 0 to 999,999,999"
        )
    return message.seconds * 1_000_000 + message.nanos // 1000


def read_duration(message: Duration, field: str, reason: Reason) -> int:
    """Microseconds; raises RequestError for what is no valid Duration."""
    seconds, nanos = message.seconds, message.nanos
    if not (-_LONGEST_SECONDS <= seconds <= _LONGEST_SECONDS and -_SECOND_NANOS < nanos < _SECOND_NANOS) or (
        seconds * nanos < 0
    ):
        raise invalid(
            field,
            reason,
            f"{field} is not a valid Duration: nanos below 1,000,000,000 and of the sign of seconds",
        )
    return seconds * 1_000_000 + nanos // 1000


def read_health_status(number: int, field: str) -> HealthStatus:
    """The status that a number of the contract's enum stands for; raises RequestError for any other."""
    status = _HEALTH_FROM_MESSAGE.get(number)
    if status is None:
        known = f"1 to {max(_HEALTH_FROM_MESSAGE)}"
        raise invalid(
            field, Reason.INVALID_HEALTH_STATUS, f"{field} has the unknown value {number}; known: {known}"
        )
    return status


def read_filter(message: pb.ListFilter) -> EntryFilter:
    """What List selects by; raises InvalidEntryError or RequestError, their field relative to the filter."""
    statuses = frozenset(
        read_health_status(number, f"health_statuses[{place}]")
        for place, number in enumerate(message.health_statuses)
    )
    for place, scheme in enumerate(message.schemes):
        if scheme not in SCHEMES:
            raise invalid(
                f"schemes[{place}]",
                Reason.INVALID_FILTER,
                f"a scheme is unknown; known: {', '.join(SCHEMES)}",
            )
    check_source(message.source)
    return EntryFilter(
        source=message.source,
        health_statuses=statuses,
        schemes=frozenset(message.schemes),
        labels=dict(checked_labels(message.labels)),
    )


def fill_entry(message: pb.CacheEntry, entry: CacheEntry) -> None:
    """Write `entry` into an empty message, credentials included."""
    fill_public_entry(message, entry)
    fill_credentials(message, entry)


def fill_public_entry(message: pb.CacheEntry, entry: CacheEntry) -> None:
    """Write all of `entry` but its credentials into an empty message."""
    fill_public_content(message, entry)
    fill_timestamp(message.last_accessed, entry.last_accessed_us)
    message.access_count = entry.access_count
    if entry.evicted_from_l1:
        message.evicted_from_l1 = True


def fill_credentials(message: pb.CacheEntry, entry: CacheEntry) -> None:
    """Write the credentials of `entry`, if it has any."""
    if entry.username is not None:
        message.username = entry.username.get_secret_value()
    if entry.password is not None:
        message.password = entry.password.get_secret_value()


def fill_public_content(message: pb.CacheEntry, entry: CacheEntry) -> None:
    """Write what is the same after every use of `entry` into an empty message, but not its credentials."""
    message.key = entry.key
    message.proxy_url = entry.proxy_url
    if entry.source:
        message.source = entry.source
    fill_timestamp(message.fetch_time, entry.fetch_time_us)
    fill_timestamp(message.expires_at, entry.expires_at_us)
    ttl = message.ttl
    ttl.seconds, microseconds = divmod(entry.ttl_us, 1_000_000)
    ttl.nanos = microseconds * 1000
    message.health_status = _HEALTH_TO_MESSAGE[entry.health_status]
    if entry.failure_count:
        message.failure_count = entry.failure_count
    if entry.health_monitoring is not None:
        _fill_monitoring(message.health_monitoring, entry.health_monitoring)
    if entry.labels:
        message.labels.update(entry.labels)


def fill_timestamp(message: Timestamp, microseconds: int) -> None:
    """Write microseconds since the epoch into a Timestamp."""
    message.seconds = microseconds // 1_000_000
    message.nanos = microseconds % 1_000_000 * 1000


def tier_number(tier: CacheTierType) -> pb.Tier.ValueType:
    """The contract's number for a tier."""
    return TIER_TO_MESSAGE[tier]


def health_status_number(status: HealthStatus) -> pb.HealthStatus.ValueType:
    """The contract's number for a health status."""
    return _HEALTH_TO_MESSAGE[status]


def statistics_message(statistics: CacheStatistics, stats_subscribers: int) -> pb.CacheStatistics:
    """One snapshot of the cache's statistics, and how many streams are open."""
    message = pb.CacheStatistics(
        tiers=[
            _tier_message(pb.TIER_L1, statistics.l1_stats),
            _tier_message(pb.TIER_L2, statistics.l2_stats),
            _tier_message(pb.TIER_L3, statistics.l3_stats),
        ],
        hits=statistics.hits,
        misses=statistics.misses,
        hit_rate=statistics.hit_rate,
        entries=statistics.entries,
        promotions=statistics.promotions,
        demotions=statistics.demotions,
        removals=statistics.removals,
        stats_subscribers=stats_subscribers,
    )
    fill_timestamp(message.observed_at, statistics.observed_at_us)
    fill_timestamp(message.started_at, statistics.started_at_us)
    return message


def _tier_message(tier: pb.Tier.ValueType, statistics: TierStatistics) -> pb.TierStatistics:
    return pb.TierStatistics(
        tier=tier,
        backend=statistics.backend,
        state=_STATE_TO_MESSAGE[statistics.state],
        entries=statistics.entries,
        max_entries=statistics.max_entries,
        hits=statistics.hits,
        misses=statistics.misses,
        hit_rate=statistics.hit_rate,
        evictions_capacity=statistics.evictions_capacity,
        evictions_ttl=statistics.evictions_ttl,
        evictions_health=statistics.evictions_health,
        evictions_corruption=statistics.evictions_corruption,
        errors=statistics.errors,
        read_latency=_latency_message(statistics.read_latency),
        write_latency=_latency_message(statistics.write_latency),
    )


def _latency_message(latency: LatencySummary) -> pb.LatencySummary:
    return pb.LatencySummary(
        p50=_duration_message(latency.p50_us),
        p99=_duration_message(latency.p99_us),
        max=_duration_message(latency.max_us),
    )


def _duration_message(microseconds: float) -> Duration:
    seconds, nanos = divmod(round(microseconds * 1000), _SECOND_NANOS)
    return Duration(seconds=seconds, nanos=nanos)


def _read_monitoring(message: pb.HealthMonitoring) -> HealthMonitoring:
    return HealthMonitoring(
        last_health_check=_read_check_time(message, "last_health_check"),
        consecutive_health_failures=message.consecutive_health_failures,
        consecutive_health_successes=message.consecutive_health_successes,
        recovery_attempt=message.recovery_attempt,
        next_check_time=_read_check_time(message, "next_check_time"),
        last_health_error=message.last_health_error or None,
        total_health_checks=message.total_health_checks,
        total_health_check_failures=message.total_health_check_failures,
    )


def _read_check_time(message: pb.HealthMonitoring, name: str) -> datetime | None:
    if not message.HasField(name):  # type: ignore[arg-type]  # called with two names, both fields
        return None
    timestamp: Timestamp = getattr(message, name)
    read_timestamp(timestamp, f"health_monitoring.{name}", Reason.INVALID_HEALTH_MONITORING)
    return timestamp.ToDatetime(tzinfo=UTC)


def _fill_monitoring(message: pb.HealthMonitoring, monitoring: HealthMonitoring) -> None:
    message.SetInParent()
    if monitoring.last_health_check is not None:
        message.last_health_check.FromDatetime(monitoring.last_health_check)
    message.consecutive_health_failures = monitoring.consecutive_health_failures
    message.consecutive_health_successes = monitoring.consecutive_health_successes
    message.recovery_attempt = monitoring.recovery_attempt
    if monitoring.next_check_time is not None:
        message.next_check_time.FromDatetime(monitoring.next_check_time)
    if monitoring.last_health_error is not None:
        message.last_health_error = monitoring.last_health_error
    message.total_health_checks = monitoring.total_health_checks
    message.total_health_check_failures = monitoring.total_health_check_failures
