"""What the pool is asked and what it answers: plain, immutable dataclasses that know nothing of gRPC.

Times are timezone-aware; a naive one given to a client is taken as UTC. No repr shows a credential.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Self, TypedDict

from proxystash.models import CacheEntry, HealthStatus, Int32, Int64, redacted_repr

_REFUSED = {401, 403, 451}


class SelectionPolicy(StrEnum):
    """How to choose among the proxies that match: the best of three, the longest unused, any, the best."""

    BALANCED = "balanced"
    LEAST_RECENTLY_USED = "least_recently_used"
    RANDOM = "random"
    BEST = "best"


class Shortage(StrEnum):
    """Why there are not more: what keeps back the most of the proxies that match."""

    NO_MATCH = "no_match"
    LEASED_OUT = "leased_out"
    RESTING = "resting"
    EXCLUDED = "excluded"


class Outcome(StrEnum):
    """What became of a use. Whose fault it was decides what rests; `docs/leasing.md` has the table."""

    SUCCESS = "success"
    CONNECT_ERROR = "connect_error"
    AUTH_ERROR = "auth_error"
    TIMEOUT = "timeout"
    BLOCKED = "blocked"
    RATE_LIMITED = "rate_limited"
    BAD_CONTENT = "bad_content"
    TARGET_ERROR = "target_error"
    ABANDONED = "abandoned"

    @classmethod
    def from_http_status(cls, status: int) -> Self:
        """What the status of an answer says, where nothing is known of its content.

        407 is the proxy's AUTH_ERROR; 401, 403 and 451 are BLOCKED, 429 is RATE_LIMITED, 500 and above
        TARGET_ERROR; everything else is a SUCCESS.
        """
        if status == 407:
            return cls("auth_error")
        if status == 429:
            return cls("rate_limited")
        if status in _REFUSED:
            return cls("blocked")
        return cls("target_error" if status >= 500 else "success")


class BreakerState(StrEnum):
    """Whether a proxy may be lent, rests, or has rested and is tried by one use at a time."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True)
class Session:
    """Keeps to one proxy from call to call: the same id and target get the same one.

    Forgotten after `idle_timeout` (1 s to 24 h; None: 10 min) without a use, chosen anew after `max_age`. A
    `strict` one fails with SESSION_LOST where its proxy cannot be had; others move to another proxy.
    """

    id: str
    idle_timeout: timedelta | None = None
    max_age: timedelta | None = None
    strict: bool = False


class ProxyFilter(TypedDict, total=False):
    """Which proxies: of several health statuses or schemes any will do, of several labels all must match."""

    source: str
    health: HealthStatus | str | Iterable[HealthStatus | str]
    schemes: str | Iterable[str]
    labels: Mapping[str, str] | None


class AcquireOptions(ProxyFilter, total=False):
    """What an acquire may ask for beside its target. Each that is left out is as the server has it.

    `lease_duration` (1 s to 1 h, by default 1 min): take the time limit of one use. `wait` (at most 1 min):
    how long to wait for a proxy if there is none. `max_leases`: only proxies with fewer leases than this.
    `reuse_delay` (at most 1 h): only proxies that nobody was lent for the target in this long.
    `exclude_keys`: not these; `exclude_held`: not what `holder` has. `session`: its id, or more of it.
    `request_id` makes the call safe to repeat: while its lease is held, it gets the same.
    """

    policy: SelectionPolicy | str
    lease_duration: timedelta
    wait: timedelta
    max_leases: int
    reuse_delay: timedelta
    exclude_keys: Iterable[str | CacheEntry]
    exclude_held: bool
    holder: str
    session: Session | str
    request_id: str


class LeaserOptions(TypedDict, total=False):
    """How a leaser borrows.

    `ready`: how many leases it keeps for each target and filter (1 to 100, by default 8). `margin`: how much
    of a lease is left at least when it is taken, the time limit of one use (by default 15 s). The others are
    those of an acquire.
    """

    ready: int
    margin: timedelta
    lease_duration: timedelta
    policy: SelectionPolicy | str
    max_leases: int
    reuse_delay: timedelta
    holder: str


@dataclass(frozen=True, slots=True, repr=False)
class Lease:
    """The right to use a proxy until a moment, by the server's clock.

    `entry`, with username and password, is there where the lease was acquired, and not in a list of leases.
    `session_moved`: the session had another proxy before. `score` is the estimated chance of success. A
    `trial` decides if the proxy has recovered.
    """

    lease_id: str
    key: str
    entry: CacheEntry | None
    acquired_at: datetime
    expires_at: datetime
    holder: str = ""
    target: str = ""
    session_id: str = ""
    session_moved: bool = False
    score: float = 0.0
    trial: bool = False

    def __repr__(self) -> str:
        return redacted_repr(self)


@dataclass(frozen=True, slots=True)
class AcquireResult:
    """The leases that were got, perhaps none; why there are not more, and when the next may come free."""

    leases: tuple[Lease, ...]
    shortage: Shortage | None = None
    retry_after: timedelta | None = None


@dataclass(frozen=True, slots=True)
class RenewResult:
    """Whether a lease is still held, and until when. If not, stop using the proxy: another may have it."""

    held: bool
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class UseResult:
    """What became of one use, or of `count` (at most 1,000) alike.

    `latency` is how long it took, to the end of the answer. `target` is by default the lease's. `finished_at`
    (at most 1 h ago) is by default now. `retry_after` (at most 24 h) goes with BLOCKED and RATE_LIMITED.
    """

    outcome: Outcome | str
    latency: timedelta | None = None
    target: str = ""
    finished_at: datetime | None = None
    count: Int32 = 1
    retry_after: timedelta | None = None


@dataclass(frozen=True, slots=True)
class LeaseRelease:
    """A lease to end; without a result nothing is learned. `end_session` also forgets its session's proxy."""

    lease_id: str
    result: UseResult | None = None
    end_session: bool = False


@dataclass(frozen=True, slots=True)
class UseReport:
    """The result of a use without a lease, by `key`, or of one of a lease, which goes on, by `lease_id`."""

    result: UseResult
    key: str | CacheEntry = ""
    lease_id: str = ""


@dataclass(frozen=True, slots=True)
class HealthEffect:
    """Where a proxy stands after a result.

    `found`: it is in the cache; `evicted`: this result evicted it. `score` is that at the result's target.
    The times are until when it rests, everywhere and at the target; None where it does not.
    """

    found: bool
    evicted: bool
    score: float
    health_status: HealthStatus
    failure_count: Int32
    resting_until: datetime | None = None
    resting_at_target_until: datetime | None = None


@dataclass(frozen=True, slots=True)
class ReleaseResult:
    """Whether a lease was still held, and what its result did, unless there was none or it came too late."""

    released: bool
    effect: HealthEffect | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """What results add up to, old ones counting for less; `rests` in a row, each longer than the last."""

    score: float
    successes: float
    failures: float
    latency: timedelta | None
    breaker: BreakerState
    resting_until: datetime | None
    rests: Int32
    last_outcome: Outcome | None
    last_result: datetime | None


@dataclass(frozen=True, slots=True)
class TargetStanding:
    """How a proxy stands at one target."""

    target: str
    standing: Standing


@dataclass(frozen=True, slots=True)
class ProxyHealth:
    """What is known of one proxy: altogether, at each target by name, and how many leases it has."""

    key: str
    overall: Standing
    targets: tuple[TargetStanding, ...]
    leases: Int32
    max_leases: Int32
    last_leased: datetime | None


@dataclass(frozen=True, slots=True)
class TargetSummary:
    """How one target fares with all proxies together; `resting` proxies rest there now."""

    target: str
    success_rate: float
    successes: float
    failures: float
    resting: Int64
    leases: Int64
    last_result: datetime | None
