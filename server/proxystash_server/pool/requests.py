"""What the pool is asked and what it answers. Times are seconds; those of a moment are the steady clock's."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from proxystash.models import HealthStatus
from proxystash_server.cache import CacheEntry, CacheError, EntryFilter, LatencySummary
from proxystash_server.pool.health import Breaker, Outcome

MAX_COUNT: Final = 100
MAX_BATCH: Final = 1000
MAX_WAIT: Final = 60.0
MAX_EXCLUDED: Final = 256
MAX_TARGET_BYTES: Final = 253
MAX_HOLDER_BYTES: Final = 128
MAX_SESSION_BYTES: Final = 128
MAX_REQUEST_ID_BYTES: Final = 64
DEFAULT_DURATION: Final = 60.0
MIN_DURATION: Final = 1.0
MAX_DURATION: Final = 3600.0
DEFAULT_IDLE_TIMEOUT: Final = 600.0
MAX_IDLE_TIMEOUT: Final = 86_400.0
MAX_REUSE_DELAY: Final = 3600.0
MAX_RESULT_AGE: Final = 3600.0
MAX_RETRY_AFTER: Final = 86_400.0
MAX_RESULT_COUNT: Final = 1000
MAX_LATENCY: Final = 86_400.0
# A year: the contract sets no limit, and this is none that anybody meets.
MAX_SESSION_AGE: Final = 365 * 86_400.0


class PoolError(CacheError):
    """Base of what the pool refuses. The message is for the caller."""


class PoolFullError(PoolError):
    """As many leases, sessions or waiting calls as there may be; `what` names them: `waiting calls`."""

    def __init__(self, what: str, most: int) -> None:
        super().__init__(f"there are {most:,} {what}, which is the limit; try again later")
        self.what = what


class PoolLoadingError(PoolError):
    """Nothing is found, and the entries are still being loaded: it may be tried again soon."""

    def __init__(self) -> None:
        super().__init__(
            "the entries are still being loaded and none of those that are can be lent; try again"
        )


class SessionLostError(PoolError):
    """A strict session's proxy is gone, rests, or no longer matches."""

    def __init__(self) -> None:
        super().__init__(
            "the session's proxy is gone, rests or no longer matches; end the session to get another"
        )


class LeaseNotFoundError(PoolError):
    """A result is of a lease that is not known, or no longer."""

    def __init__(self) -> None:
        super().__init__("no such lease is known, or no longer; report the result by key instead")


class SelectionPolicy(IntEnum):
    """How to choose; the numbers are the contract's."""

    BALANCED = 1
    LEAST_RECENTLY_USED = 2
    RANDOM = 3
    BEST = 4


class Shortage(IntEnum):
    """Why there are not more; the numbers are the contract's."""

    NONE = 0
    NO_MATCH = 1
    LEASED_OUT = 2
    RESTING = 3
    EXCLUDED = 4


@dataclass(frozen=True, slots=True)
class SessionRequest:
    """Which proxy to keep to."""

    id: str
    idle_timeout: float = DEFAULT_IDLE_TIMEOUT
    max_age: float | None = None
    strict: bool = False


@dataclass(frozen=True, slots=True)
class AcquireRequest:
    """What kind of proxies, what for, and for how long; within the limits above."""

    wanted: EntryFilter = field(default_factory=EntryFilter)
    target: str = ""
    count: int = 1
    policy: SelectionPolicy = SelectionPolicy.BALANCED
    duration: float = DEFAULT_DURATION
    wait: float = 0.0
    max_leases: int = 0
    reuse_delay: float = 0.0
    exclude_keys: frozenset[str] = frozenset()
    exclude_held: bool = False
    holder: str = ""
    session: SessionRequest | None = None
    request_id: str = ""


class Lease:
    """The right to use a proxy until a moment. Changed by the pool alone, under its lock."""

    __slots__ = (
        "acquired_at", "claims", "duration", "ended", "expires_at", "holder", "id", "key",
        "moved", "request_id", "score", "sequence", "session_id", "slot", "target", "target_number", "timer",
        "trial",
    )  # fmt: skip

    def __init__(self, lease_id: str, sequence: int, key: str, slot: int) -> None:
        self.id = lease_id
        self.sequence = sequence
        self.key = key
        # Not known while the entries are being loaded.
        self.slot = slot
        self.target = ""
        self.target_number = 0
        self.holder = ""
        self.session_id = ""
        self.request_id = ""
        self.acquired_at = 0.0
        self.duration = 0.0
        self.expires_at = 0.0
        self.score = 0.0
        self.trial = False
        # Whether the session had another proxy before.
        self.moved = False
        self.ended = False
        # How many calls answer with it, or are about to.
        self.claims = 1
        self.timer: object = None


@dataclass(frozen=True, slots=True)
class Granted:
    """A lease and the entry it is of, with its credentials."""

    lease: Lease
    entry: CacheEntry


@dataclass(frozen=True, slots=True)
class Answer:
    """What an acquire gives: leases, and why not more."""

    granted: list[Granted]
    shortage: Shortage = Shortage.NONE
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class UseResult:
    """What became of uses, as reported; `target` None is the lease's."""

    outcome: Outcome
    finished_at: float
    latency: float | None = None
    target: str | None = None
    count: int = 1
    retry_after: float = 0.0


@dataclass(slots=True)
class HealthEffect:
    """Where a proxy stands after a result. Times are steady; None where it does not rest."""

    found: bool = False
    evicted: bool = False
    score: float = 0.0
    health_status: HealthStatus | None = None
    failure_count: int = 0
    resting_until: float | None = None
    resting_at_target_until: float | None = None


@dataclass(frozen=True, slots=True)
class Release:
    """One lease to end, with what became of it."""

    lease_id: str
    result: UseResult | None = None
    end_session: bool = False


@dataclass(frozen=True, slots=True)
class Released:
    """Whether the lease was held, and what its result did."""

    released: bool
    effect: HealthEffect | None


@dataclass(frozen=True, slots=True)
class Report:
    """The result of uses of a lease, which goes on, or else of a key."""

    result: UseResult
    key: str = ""
    lease_id: str = ""


@dataclass(frozen=True, slots=True)
class StandingSnapshot:
    """A standing as it is now; None where something is not known, or where it does not rest."""

    target: str
    score: float
    successes: float
    failures: float
    breaker: Breaker
    resting_until: float | None
    rests: int
    latency: float | None
    last_outcome: int
    last_result: float | None


@dataclass(frozen=True, slots=True)
class ProxyHealth:
    """What is known of one proxy."""

    overall: StandingSnapshot
    targets: list[StandingSnapshot]
    leases: int
    max_leases: int
    last_leased: float | None


@dataclass(frozen=True, slots=True)
class TargetSummary:
    """How one target fares with all proxies together."""

    target: str
    successes: float
    failures: float
    resting: int
    leases: int
    last_result: float | None


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """What the pool holds and has done; the names are the contract's."""

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
