"""The tiered cache of proxies as a library, with the public names of proxywhirl.cache."""

from proxystash.models import HealthMonitoring, HealthStatus, TierState
from proxystash_server.cache.config import (
    CacheConfig,
    CacheTierConfig,
    CacheTierType,
    Durability,
    L2BackendType,
)
from proxystash_server.cache.credentials import CredentialEncryptor
from proxystash_server.cache.entry import CacheEntry, keep_encoded
from proxystash_server.cache.errors import (
    CacheClosedError,
    CacheError,
    CacheUnavailableError,
    EncryptionKeyError,
    InvalidEntryError,
    StoreError,
    StoreFormatError,
)
from proxystash_server.cache.latency import LatencySummary
from proxystash_server.cache.limits import check_key
from proxystash_server.cache.manager import CacheManager, Invalidation, Lookup, Lookups
from proxystash_server.cache.statistics import CacheStatistics, TierStatistics
from proxystash_server.cache.tiers.base import CacheTier, DurableTier, EntryFilter
from proxystash_server.cache.tiers.jsonl import JsonlCacheTier
from proxystash_server.cache.tiers.memory import MemoryCacheTier
from proxystash_server.cache.tiers.sqlite import SQLiteCacheTier
from proxystash_server.cache.ttl import TTLManager

__all__ = [
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
    "CredentialEncryptor",
    "Durability",
    "DurableTier",
    "EncryptionKeyError",
    "EntryFilter",
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
    "SQLiteCacheTier",
    "StoreError",
    "StoreFormatError",
    "TTLManager",
    "TierState",
    "TierStatistics",
    "check_key",
    "keep_encoded",
]
