"""Messages to entries, and entries and statistics to messages.

On the way out there are integers only: a response is filled field by field, in place, which costs a quarter
of what building it from datetimes and sub-messages does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from proxystash import messages
from proxystash.compiled import compile_function, field_sources, types_of
from proxystash.models import MAX_INT32, HealthMonitoring, HealthStatus
from proxystash.proxies import SCHEMES
from proxystash.v1 import cache_service_pb2 as pb
from proxystash_server.cache import (
    CacheEntry,
    CacheStatistics,
    CacheTierType,
    EntryFilter,
    Failures,
    LatencySummary,
    TierState,
    TierStatistics,
)
from proxystash_server.cache.entry.fields import FIELDS, EntryArguments, Fields, public_name
from proxystash_server.cache.entry.limits import check_source, checked_labels
from proxystash_server.rpc.engine import Engine
from proxystash_server.rpc.errors import Reason, invalid

# The bounds of google.protobuf.Timestamp (years 1 to 9999) and Duration (10,000 years), in seconds.
_FIRST_SECOND: Final = -62_135_596_800
_LAST_SECOND: Final = 253_402_300_799
_LONGEST_SECONDS: Final = 315_576_000_000
_SECOND_NANOS: Final = 1_000_000_000

# Values of one kind that a list is filtered by: more than there are of any kind.
MAX_FILTER_VALUES: Final = 100

TIER_TO_MESSAGE: Final[Mapping[CacheTierType, pb.Tier.ValueType]] = {
    tier: pb.Tier.Value(f"TIER_{tier.name}") for tier in CacheTierType
}
_STATE_TO_MESSAGE: Final[Mapping[TierState, pb.TierState.ValueType]] = {
    state: pb.TierState.Value(f"TIER_STATE_{state.name}") for state in TierState
}

_TIMES: Final = [name for name in FIELDS if name.endswith("_us")]
_CHECK_TIMES: Final = [name for name, type_ in types_of(HealthMonitoring).items() if type_ == datetime | None]
# What a client's message says for an argument of `new_entry`.
_READ: Final[Mapping[object, str]] = {
    "fetch_time_us": (
        "read_timestamp(message.fetch_time, 'fetch_time', Reason.INVALID_FETCH_TIME) "
        "if message.HasField('fetch_time') else None"
    ),
    "ttl_us": "read_duration(message.ttl, 'ttl', Reason.INVALID_TTL) if message.HasField('ttl') else None",
    str: "message.{0}",
    str | None: "message.{0} or None",
    int: "message.{0}",
    HealthStatus: "read_health_status(message.{0}, {0!r}) if message.{0} else HealthStatus.UNKNOWN",
    HealthMonitoring | None: "_read_monitoring(message.{0}) if message.HasField({0!r}) else None",
    # Their own `items` takes twice as long.
    Mapping[str, str] | None: "{{name: texts[name] for name in texts}} if (texts := message.{0}) else None",
}
# How a field of an entry gets into a message.
_FILL: Final[Mapping[object, str]] = {
    **dict.fromkeys(("username", "password", "sealed", "encoded"), ""),
    **{name: f"fill_timestamp(message.{public_name(name)}, content.{name})" for name in _TIMES},
    "version": "message.version = content.version",
    str: "if content.{0}: message.{0} = content.{0}",
    # An earlier version stored one more than fits.
    int: f"if content.{{0}}: message.{{0}} = min(content.{{0}}, {MAX_INT32})",
    HealthStatus: "message.{0} = health_status_number(content.{0})",
    HealthMonitoring | None: "if content.{0} is not None: messages.fill_monitoring(message.{0}, content.{0})",
    Mapping[str, str]: "if content.{0}: message.{0}.update(content.{0})",
}

_ARGUMENTS: Final = ", ".join(
    f"{name}={value}" for name, value in field_sources(EntryArguments, _READ).items()
)
# The new entry that a client's message describes; fields that the server sets are ignored. Raises
# InvalidEntryError or RequestError, whose field is relative to the entry.
read_entry: Callable[[Engine, pb.CacheEntry], CacheEntry] = compile_function(
    "read_entry(engine, message)",
    [f"return engine.new_entry(message.proxy_url, {_ARGUMENTS})"],
    globals(),
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
    status = messages.HEALTH_STATUSES.get(number)
    if status is None:
        known = f"1 to {max(messages.HEALTH_STATUSES)}"
        raise invalid(
            field, Reason.INVALID_HEALTH_STATUS, f"{field} has the unknown value {number}; known: {known}"
        )
    return status


def read_filter(message: pb.ListFilter) -> EntryFilter:
    """What List selects by; raises InvalidEntryError or RequestError, their field relative to the filter."""
    for field, values in (("health_statuses", message.health_statuses), ("schemes", message.schemes)):
        if len(values) > MAX_FILTER_VALUES:
            raise invalid(
                field,
                Reason.INVALID_FILTER,
                f"{field} has {len(values):,} items; at most {MAX_FILTER_VALUES} are allowed",
            )
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


def fill_entry_without_credentials(message: pb.CacheEntry, entry: CacheEntry) -> None:
    """Write all of `entry` but its credentials into an empty message, and whether it has any."""
    fill_public_entry(message, entry)
    if has_credentials(entry):
        message.credentials_omitted = True


def has_credentials(entry: CacheEntry) -> bool:
    """Whether an entry has a username or a password."""
    return entry.username is not None or entry.password is not None


def fill_credentials(message: pb.CacheEntry, entry: CacheEntry) -> None:
    """Write the credentials of `entry`, if it has any."""
    if entry.username is not None:
        message.username = entry.username.get_secret_value()
    if entry.password is not None:
        message.password = entry.password.get_secret_value()


# Writes what is the same after every use of an entry into an empty message, but not its credentials.
fill_public_content: Callable[[pb.CacheEntry, CacheEntry], None] = compile_function(
    "fill_public_content(message, entry)",
    [
        "content = entry.content",
        "ttl = message.ttl",
        "ttl.seconds, microseconds = divmod(entry.ttl_us, 1_000_000)",
        "ttl.nanos = microseconds * 1000",
        *field_sources(Fields, _FILL).values(),
    ],
    globals(),
)


def fill_timestamp(message: Timestamp, microseconds: int) -> None:
    """Write microseconds since the epoch into a Timestamp."""
    message.seconds = microseconds // 1_000_000
    message.nanos = microseconds % 1_000_000 * 1000


def ban_message(key: str, failures: Failures) -> pb.Ban:
    """What is known of a banned proxy."""
    message = pb.Ban(key=key, failure_count=failures.failure_count, bans=failures.bans)
    fill_timestamp(message.last_failure_time, failures.last_failure_us)
    fill_timestamp(message.banned_until, failures.banned_until_us)
    return message


def tier_number(tier: CacheTierType) -> pb.Tier.ValueType:
    """The contract's number for a tier."""
    return TIER_TO_MESSAGE[tier]


def health_status_number(status: HealthStatus) -> pb.HealthStatus.ValueType:
    """The contract's number for a health status."""
    return messages.HEALTH_STATUS_NUMBERS[status]


def statistics_message(
    statistics: CacheStatistics,
    stats_subscribers: int,
    watch_subscribers: int,
    pool: pb.PoolStatistics | None = None,
) -> pb.CacheStatistics:
    """One snapshot of the cache's statistics and the pool's, and how many streams are open."""
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
        watch_subscribers=watch_subscribers,
        pool=pool,
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
        read_latency=latency_message(statistics.read_latency),
        write_latency=latency_message(statistics.write_latency),
        log_bytes=statistics.log_bytes,
    )


def latency_message(latency: LatencySummary) -> pb.LatencySummary:
    """Latencies of the last minute."""
    return pb.LatencySummary(
        p50=_duration_message(latency.p50_us),
        p99=_duration_message(latency.p99_us),
        max=_duration_message(latency.max_us),
    )


def _duration_message(microseconds: float) -> Duration:
    seconds, nanos = divmod(round(microseconds * 1000), _SECOND_NANOS)
    return Duration(seconds=seconds, nanos=nanos)


def _read_monitoring(message: pb.HealthMonitoring) -> HealthMonitoring:
    for name in _CHECK_TIMES:
        if message.HasField(name):  # type: ignore[arg-type]  # the stubs want the name as a literal
            read_timestamp(
                getattr(message, name), f"health_monitoring.{name}", Reason.INVALID_HEALTH_MONITORING
            )
    return messages.read_monitoring(message)
