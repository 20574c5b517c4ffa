"""What goes into a client and comes out of it: plain, immutable dataclasses that know nothing of gRPC.

Times are timezone-aware; a naive one given to a client is taken as UTC. No repr shows a credential.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Final, TypedDict
from urllib.parse import quote

from proxystash.proxies import redact, redact_url

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MAX_INT32: Final = 2**31 - 1
MAX_INT64: Final = 2**63 - 1
# Counts, none negative, as wide as the contract has them.
Int32 = Annotated[int, MAX_INT32]
Int64 = Annotated[int, MAX_INT64]

# Marks a field that a client is told and does not say.
SET_BY_SERVER: Final = {"set_by": "server"}
# Fields of an entry that say something of the server, and are in no file of proxies.
NOT_IN_FILES: Final = frozenset(("evicted_from_l1", "version"))


class HealthStatus(StrEnum):
    """How a proxy is doing, as far as the cache was told."""

    UNKNOWN = "unknown"
    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNHEALTHY = "unhealthy"
    DEAD = "dead"


class Tier(StrEnum):
    """A storage level of the server, fastest first: memory, disk, database."""

    L1 = "l1"
    L2 = "l2"
    L3 = "l3"


class TierState(StrEnum):
    """Whether a tier works, is skipped until it recovers, or is switched off by configuration."""

    ACTIVE = "active"
    DEGRADED = "degraded"
    DISABLED = "disabled"


@dataclass(frozen=True, slots=True, repr=False)
class HealthMonitoring:
    """What a health checker keeps about a proxy."""

    last_health_check: datetime | None = None
    consecutive_health_failures: Int32 = 0
    consecutive_health_successes: Int32 = 0
    recovery_attempt: Int32 = 0
    next_check_time: datetime | None = None
    last_health_error: str | None = None
    total_health_checks: Int64 = 0
    total_health_check_failures: Int64 = 0

    def __repr__(self) -> str:
        return redacted_repr(self)


@dataclass(frozen=True, slots=True, repr=False)
class CacheEntry:
    """One cached proxy.

    To store one, `proxy_url` is enough; an empty `key` is derived from URL and username. `max_leases` is how
    many leases of it may be held at once, 0 for what the server is set to. `expires_at`, `last_accessed`,
    `access_count`, `evicted_from_l1` and `version` are the server's to set, and ignored when given.
    `credentials_omitted` says that the answer leaves out credentials that it has; put again so, it keeps
    those that are stored.
    """

    proxy_url: str
    key: str = ""
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    source: str = ""
    fetch_time: datetime | None = None
    ttl: timedelta | None = None
    expires_at: datetime | None = field(default=None, metadata=SET_BY_SERVER)
    last_accessed: datetime | None = field(default=None, metadata=SET_BY_SERVER)
    access_count: Int64 = field(default=0, metadata=SET_BY_SERVER)
    health_status: HealthStatus = HealthStatus.UNKNOWN
    failure_count: Int32 = 0
    evicted_from_l1: bool = field(default=False, metadata=SET_BY_SERVER)
    health_monitoring: HealthMonitoring | None = None
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    version: Int64 = field(default=0, metadata=SET_BY_SERVER)
    max_leases: Int32 = 0
    credentials_omitted: bool = False

    def url(self, *, with_credentials: bool = False) -> str:
        """The proxy URL as requests, httpx and curl take it, percent-encoded credentials in it if asked."""
        if not with_credentials or (self.username is None and self.password is None):
            return self.proxy_url
        credentials = quote(self.username or "", safe="")
        if self.password is not None:
            credentials += ":" + quote(self.password, safe="")
        return self.proxy_url.replace("://", f"://{credentials}@", 1)

    def __repr__(self) -> str:
        return redacted_repr(self)


@dataclass(frozen=True, slots=True)
class GetResult:
    """A hit: the entry, and the tier that held it."""

    entry: CacheEntry
    served_by: Tier


class PutMode(StrEnum):
    """What a put does with an entry that is stored already: take its place, add to it, or leave it."""

    REPLACE = "replace"
    MERGE = "merge"
    IF_ABSENT = "if_absent"


class EntryChanges(TypedDict, total=False):
    """What `update` may change of a stored entry. Of labels those that are named; None takes one away."""

    proxy_url: str
    username: str | None
    password: str | None
    source: str
    fetch_time: datetime
    ttl: timedelta
    health_status: HealthStatus
    failure_count: int
    health_monitoring: HealthMonitoring | None
    labels: Mapping[str, str | None]
    max_leases: int


@dataclass(frozen=True, slots=True)
class PutResult:
    """What became of a stored entry: its key, when it expires, and the tiers that hold it now.

    `kept` says that it is the entry that was stored before. Where `banned_until` is set, the proxy is banned
    after its failures, and stored as unhealthy.
    """

    key: str
    expires_at: datetime
    stored_in: tuple[Tier, ...]
    kept: bool = False
    banned_until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Ban:
    """What is known of a proxy that failures have evicted: `bans` is how often, `banned_until` how long."""

    key: str
    failure_count: Int32
    last_failure_time: datetime
    bans: Int32
    banned_until: datetime


@dataclass(frozen=True, slots=True)
class EntryError:
    """Why one entry of many was not stored.

    `code` is the name of the gRPC status that a single put would have failed with, e.g. INVALID_ARGUMENT;
    `reason` is machine-readable, e.g. INVALID_PROXY_URL; `field` names the field at fault, or is empty.
    """

    code: str
    reason: str
    message: str
    field: str = ""


@dataclass(frozen=True, slots=True)
class InvalidationResult:
    """What one reported failure did: whether the proxy was there, and whether this failure evicted it."""

    found: bool
    evicted: bool
    health_status: HealthStatus
    failure_count: int
    failure_threshold: int
    banned_until: datetime | None = None


@dataclass(frozen=True, slots=True)
class LatencySummary:
    """How long operations took over the last minute."""

    p50: timedelta
    p99: timedelta
    max: timedelta


@dataclass(frozen=True, slots=True)
class TierStatistics:
    """One tier's share of a snapshot; `max_entries` 0 means unlimited.

    `log_bytes` is the size of a database's write-ahead log.
    """

    tier: Tier
    backend: str
    state: TierState
    entries: int
    max_entries: int
    hits: int
    misses: int
    hit_rate: float
    evictions_capacity: int
    evictions_ttl: int
    evictions_health: int
    evictions_corruption: int
    errors: int
    read_latency: LatencySummary
    write_latency: LatencySummary
    log_bytes: int = 0


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """What the server's pool holds and has done.

    The counts up to `resting`, and the last two, are of now; the others are since the server started, and
    only grow. `ready`, `leased_out` and `resting` are entries. While `loading`, not all entries can be lent;
    while `journal_degraded`, a kill of the server would lose leases, or what was learned.
    """

    leases: int
    sessions: int
    waiting: int
    ready: int
    leased_out: int
    resting: int
    granted: int
    released: int
    expired: int
    shortages: int
    results: int
    successes: int
    acquire_latency: LatencySummary
    loading: bool
    journal_degraded: bool


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """A snapshot of the server's counters.

    All counts are since the server started, and only grow, but for `entries` and the subscribers, which
    are of now. `tiers` holds every tier, in order; `pool` is None where the pool is switched off.
    """

    observed_at: datetime
    started_at: datetime
    tiers: tuple[TierStatistics, ...]
    hits: int
    misses: int
    hit_rate: float
    entries: int
    promotions: int
    demotions: int
    removals: int
    stats_subscribers: int
    watch_subscribers: int
    pool: PoolStatistics | None = None


class ChangeKind(StrEnum):
    """What became of a proxy, or, where a change has no key, of all of them or of the watch itself."""

    EXISTING = "existing"
    PUT = "put"
    HEALTH = "health"
    LEFT = "left"
    DELETED = "deleted"
    EXPIRED = "expired"
    EVICTED = "evicted"
    EVICTED_BY_HEALTH = "evicted_by_health"
    CLEARED = "cleared"
    # Not the server's: all existing entries have been told; forget what is known, the watch begins anew; and
    # the server lives, and has nothing to tell.
    SYNCED = "synced"
    RESET = "reset"
    PROGRESS = "progress"


@dataclass(frozen=True, slots=True)
class WatchPosition:
    """A place in a history of changes. Revisions of different histories cannot be compared."""

    history: str
    revision: int


@dataclass(frozen=True, slots=True, repr=False)
class Change:
    """One change that a watch tells.

    `version` numbers it: of two changes of a key, the greater is the later one. `entry` is what a PUT or
    HEALTH left, or what an EXISTING found, unless only keys were asked for. CLEARED and
    what is the client's own have no key. `position` is where a watch resumes that has dealt with this change;
    None where it would begin anew.
    """

    kind: ChangeKind
    key: str = ""
    version: Int64 = 0
    entry: CacheEntry | None = None
    happened_at: datetime | None = None
    position: WatchPosition | None = None

    def __repr__(self) -> str:
        return redacted_repr(self)


@dataclass(frozen=True, slots=True)
class StatsUpdate:
    """One snapshot of a statistics stream.

    `sequence` counts the snapshots of one connection from 1, and starts again after a lost connection; the
    first snapshot after one has `resumed` set. `missed` is how many snapshots of this connection were left
    out since the last one, because the reader was too slow.
    """

    sequence: int
    statistics: CacheStatistics
    missed: int = 0
    resumed: bool = False


def redacted_repr(record: DataclassInstance) -> str:
    """A dataclass repr that leaves out the fields marked `repr=False` and masks userinfo, also in a key."""
    shown = []
    for item in fields(record):
        if item.repr:
            value = getattr(record, item.name)
            if item.name in {"key", "proxy_url"}:
                value = redact_url(value)
            elif item.name == "last_health_error" and value:
                value = redact(value)
            shown.append(f"{item.name}={value!r}")
    return f"{type(record).__name__}({', '.join(shown)})"
