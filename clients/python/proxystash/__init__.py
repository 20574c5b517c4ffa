"""Python client of proxystash, the shared proxy cache of a scraper fleet.

    from proxystash import CacheEntry, Client

    with Client("127.0.0.1:50051") as client:
        stored = client.put(CacheEntry("socks5://203.0.113.7:1080", labels={"country": "DE"}))
        hit = client.get(stored.key)

Names are loaded when they are first used, so that `proxystash.models`, `proxystash.proxies` and
`proxystash.files` can be had without gRPC.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str

    from proxystash._copies import NearCacheStatistics
    from proxystash._retry import RetryPolicy
    from proxystash.aio import AsyncClient
    from proxystash.client import Client
    from proxystash.errors import (
        ClientClosedError,
        DeadlineExceededError,
        FailedPreconditionError,
        InternalError,
        InvalidArgumentError,
        NoProxyError,
        NotFoundError,
        ProxystashError,
        ResourceExhaustedError,
        UnavailableError,
    )
    from proxystash.files import (
        ListReader,
        ProxyFileError,
        Rejected,
        entry_to_csv,
        entry_to_json,
        entry_to_url,
        read_proxy_file,
        read_proxy_files,
    )
    from proxystash.held import AsyncHeldLease, HeldLease
    from proxystash.leaser import AsyncLeaser, Leaser
    from proxystash.models import (
        Ban,
        CacheEntry,
        CacheStatistics,
        Change,
        ChangeKind,
        EntryChanges,
        EntryError,
        GetResult,
        HealthMonitoring,
        HealthStatus,
        InvalidationResult,
        LatencySummary,
        PoolStatistics,
        PutMode,
        PutResult,
        StatsUpdate,
        Tier,
        TierState,
        TierStatistics,
        WatchPosition,
    )
    from proxystash.near import AsyncNearCache, NearCache
    from proxystash.outcomes import outcome_of_error
    from proxystash.pool import AsyncPool, Pool
    from proxystash.pool_models import (
        AcquireResult,
        BreakerState,
        HealthEffect,
        Lease,
        LeaseRelease,
        Outcome,
        ProxyHealth,
        ReleaseResult,
        RenewResult,
        SelectionPolicy,
        Session,
        Shortage,
        Standing,
        TargetStanding,
        TargetSummary,
        UseReport,
        UseResult,
    )
    from proxystash.proxies import (
        SCHEMES,
        Identity,
        InvalidProxyUrl,
        ProxyAddress,
        cache_key,
        key_by,
        parse_proxy_url,
    )
    from proxystash.streams import AsyncStatsStream, StatsStream
    from proxystash.watch import AsyncWatchStream, WatchStream

__all__ = [
    "SCHEMES",
    "AcquireResult",
    "AsyncClient",
    "AsyncHeldLease",
    "AsyncLeaser",
    "AsyncNearCache",
    "AsyncPool",
    "AsyncStatsStream",
    "AsyncWatchStream",
    "Ban",
    "BreakerState",
    "CacheEntry",
    "CacheStatistics",
    "Change",
    "ChangeKind",
    "Client",
    "ClientClosedError",
    "DeadlineExceededError",
    "EntryChanges",
    "EntryError",
    "FailedPreconditionError",
    "GetResult",
    "HealthEffect",
    "HealthMonitoring",
    "HealthStatus",
    "HeldLease",
    "Identity",
    "InternalError",
    "InvalidArgumentError",
    "InvalidProxyUrl",
    "InvalidationResult",
    "LatencySummary",
    "Lease",
    "LeaseRelease",
    "Leaser",
    "ListReader",
    "NearCache",
    "NearCacheStatistics",
    "NoProxyError",
    "NotFoundError",
    "Outcome",
    "Pool",
    "PoolStatistics",
    "ProxyAddress",
    "ProxyFileError",
    "ProxyHealth",
    "ProxystashError",
    "PutMode",
    "PutResult",
    "Rejected",
    "ReleaseResult",
    "RenewResult",
    "ResourceExhaustedError",
    "RetryPolicy",
    "SelectionPolicy",
    "Session",
    "Shortage",
    "Standing",
    "StatsStream",
    "StatsUpdate",
    "TargetStanding",
    "TargetSummary",
    "Tier",
    "TierState",
    "TierStatistics",
    "UnavailableError",
    "UseReport",
    "UseResult",
    "WatchPosition",
    "WatchStream",
    "cache_key",
    "entry_to_csv",
    "entry_to_json",
    "entry_to_url",
    "key_by",
    "outcome_of_error",
    "parse_proxy_url",
    "read_proxy_file",
    "read_proxy_files",
]

_MODULES = {
    "_copies": ["NearCacheStatistics"],
    "_retry": ["RetryPolicy"],
    "aio": ["AsyncClient"],
    "client": ["Client"],
    "errors": [
        "ClientClosedError",
        "DeadlineExceededError",
        "FailedPreconditionError",
        "InternalError",
        "InvalidArgumentError",
        "NoProxyError",
        "NotFoundError",
        "ProxystashError",
        "ResourceExhaustedError",
        "UnavailableError",
    ],
    "files": [
        "ListReader",
        "ProxyFileError",
        "Rejected",
        "entry_to_csv",
        "entry_to_json",
        "entry_to_url",
        "read_proxy_file",
        "read_proxy_files",
    ],
    "held": ["AsyncHeldLease", "HeldLease"],
    "leaser": ["AsyncLeaser", "Leaser"],
    "models": [
        "Ban",
        "CacheEntry",
        "CacheStatistics",
        "Change",
        "ChangeKind",
        "EntryChanges",
        "EntryError",
        "GetResult",
        "HealthMonitoring",
        "HealthStatus",
        "InvalidationResult",
        "LatencySummary",
        "PoolStatistics",
        "PutMode",
        "PutResult",
        "StatsUpdate",
        "Tier",
        "TierState",
        "TierStatistics",
        "WatchPosition",
    ],
    "near": ["AsyncNearCache", "NearCache"],
    "outcomes": ["outcome_of_error"],
    "pool": ["AsyncPool", "Pool"],
    "pool_models": [
        "AcquireResult",
        "BreakerState",
        "HealthEffect",
        "Lease",
        "LeaseRelease",
        "Outcome",
        "ProxyHealth",
        "ReleaseResult",
        "RenewResult",
        "SelectionPolicy",
        "Session",
        "Shortage",
        "Standing",
        "TargetStanding",
        "TargetSummary",
        "UseReport",
        "UseResult",
    ],
    "proxies": [
        "SCHEMES",
        "Identity",
        "InvalidProxyUrl",
        "ProxyAddress",
        "cache_key",
        "key_by",
        "parse_proxy_url",
    ],
    "streams": ["AsyncStatsStream", "StatsStream"],
    "watch": ["AsyncWatchStream", "WatchStream"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name == "__version__":
        return version("proxystash")
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
