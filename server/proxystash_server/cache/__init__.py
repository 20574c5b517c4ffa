"""The tiered cache of proxies as a library, with the public names of proxywhirl.cache."""

from proxystash.models import HealthMonitoring, HealthStatus
from proxystash_server.cache.coherence.changes import Stored
from proxystash_server.cache.coherence.failures import Failures
from proxystash_server.cache.coherence.feed import Change, ChangeKind
from proxystash_server.cache.coherence.lookups import Lookup
from proxystash_server.cache.coherence.plan import Invalidation
from proxystash_server.cache.config import (
    CacheConfig,
    CacheTierConfig,
    CacheTierType,
    Durability,
    L2BackendType,
)
from proxystash_server.cache.counting.latency import LatencySummary
from proxystash_server.cache.counting.statistics import CacheStatistics, TierState, TierStatistics
from proxystash_server.cache.entry.credentials import CredentialEncryptor
from proxystash_server.cache.entry.entry import CacheEntry, keep_encoded
from proxystash_server.cache.entry.limits import check_key
from proxystash_server.cache.errors import (
    BannedError,
    CacheClosedError,
    CacheError,
    CacheUnavailableError,
    EncryptionKeyError,
    InvalidEntryError,
    NotStoredError,
    StoreError,
    StoreFormatError,
    StoreInUseError,
)
from proxystash_server.cache.manager import CacheManager, Lookups
from proxystash_server.cache.periodic import TTLManager
from proxystash_server.cache.store_lock import StoreLock
from proxystash_server.cache.tiers.base import AuthorityTier, CacheTier, DiskTier, EntryFilter, Page
from proxystash_server.cache.tiers.jsonl.tier import JsonlCacheTier
from proxystash_server.cache.tiers.memory import MemoryCacheTier
from proxystash_server.cache.tiers.sqlite.tier import SQLiteCacheTier

__all__ = [
    "AuthorityTier",
    "BannedError",
    "CacheClosedError",
    "CacheConfig",
    "CacheEntry",
    "CacheError",
    "CacheManager",
    "CacheStatistics",
    "CacheTier",
    "CacheTierConfig",
    "CacheTierType",
    "CacheUnavailableError",
    "Change",
    "ChangeKind",
    "CredentialEncryptor",
    "DiskTier",
    "Durability",
    "EncryptionKeyError",
    "EntryFilter",
    "Failures",
    "HealthMonitoring",
    "HealthStatus",
    "InvalidEntryError",
    "Invalidation",
    "JsonlCacheTier",
    "L2BackendType",
    "LatencySummary",
    "Lookup",
    "Lookups",
    "MemoryCacheTier",
    "NotStoredError",
    "Page",
    "SQLiteCacheTier",
    "StoreError",
    "StoreFormatError",
    "StoreInUseError",
    "StoreLock",
    "Stored",
    "TTLManager",
    "TierState",
    "TierStatistics",
    "check_key",
    "keep_encoded",
]
