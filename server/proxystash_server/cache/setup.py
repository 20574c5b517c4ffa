"""From a configuration to the encryption key and the disk tiers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cryptography.fernet import Fernet

from proxystash_server.cache.coherence.breaker import CircuitBreaker
from proxystash_server.cache.coherence.guard import GuardedTier
from proxystash_server.cache.config import (
    CacheConfig,
    CacheTierConfig,
    CacheTierType,
    Durability,
    L2BackendType,
)
from proxystash_server.cache.counting.statistics import StatisticsRecorder
from proxystash_server.cache.entry.credentials import (
    KEY_VARIABLE,
    CredentialEncryptor,
    is_damaged_check,
    read_key_file,
)
from proxystash_server.cache.entry.entry import Clock
from proxystash_server.cache.errors import EncryptionKeyError, TierError
from proxystash_server.cache.key_file import KeyFile
from proxystash_server.cache.tiers.absent import AbsentTier
from proxystash_server.cache.tiers.base import AuthorityTier, DiskTier, OnCorruption
from proxystash_server.cache.tiers.jsonl.tier import JsonlCacheTier
from proxystash_server.cache.tiers.sqlite.tier import SQLiteCacheTier

L2_DATABASE = "l2.db"


def unlock(config: CacheConfig) -> tuple[CredentialEncryptor, KeyFile | None]:
    """The encryptor for the key, proven against what is on disk, and the key's file, unless it is configured.

    The key is the configured one, else that of the key file, else a new one, which is in no file yet.
    Changes nothing. Raises EncryptionKeyError if the stores were sealed under another key, and
    StoreFormatError if one is not ours or too new.
    """
    path = key_file(config)
    keys, origin = find_keys(config)
    is_new = not keys
    if is_new:
        keys = [Fernet.generate_key()]
    encryptor = CredentialEncryptor(keys[0], [*keys[1:], *previous_keys(config)])
    for tier in make_tiers(config, encryptor, lambda: 0, lambda _tier, _key, _reason: None):
        try:
            check = tier.stored_key_check()
        except TierError:
            # Not readable now; the tier will start degraded, or be set aside, and is checked when it opens.
            continue
        if check is None or encryptor.passes_check(check):
            continue
        if is_new:
            raise EncryptionKeyError(
                f"{path} is missing, but {tier.tier_type} was sealed under a key. "
                f"Put the key file back, or give the key in {KEY_VARIABLE}"
            )
        if is_damaged_check(check):
            # What the tier has sealed decides when it is opened.
            continue
        raise EncryptionKeyError(
            f"the key in {origin} is not the one that {tier.tier_type} was sealed under. Give that key in "
            f"{KEY_VARIABLE}, or beside a newer one in {KEY_VARIABLE}_PREVIOUS; both are needed while a "
            "rotate-key is unfinished"
        )

    return encryptor, KeyFile(path, encryptor.key) if config.encryption_key is None else None


def key_file(config: CacheConfig) -> Path:
    """Where the key is kept that is not configured."""
    return config.encryption_key_file or config.l3_database_path.parent / "secret.key"


def find_keys(config: CacheConfig) -> tuple[list[bytes], str]:
    """The keys in use, the one that seals first, and where they come from; none if there are none yet.

    Raises EncryptionKeyError for a key file that is loose, empty or malformed.
    """
    if config.encryption_key is not None:
        return [config.encryption_key.get_secret_value().encode()], KEY_VARIABLE
    path = key_file(config)
    return read_key_file(path) or [], str(path)


def previous_keys(config: CacheConfig) -> list[bytes]:
    """The keys that are configured beside the one that seals."""
    return [secret.get_secret_value().encode() for secret in config.previous_encryption_keys]


class Tiers(NamedTuple):
    """The disk tiers, guarded, and the parts they play: which decides, and which is a cache before it."""

    l2: GuardedTier[DiskTier]
    l3: GuardedTier[DiskTier]
    cache: GuardedTier[DiskTier]
    authority: GuardedTier[AuthorityTier] | None


def guard_tiers(
    config: CacheConfig,
    encryptor: CredentialEncryptor,
    clock: Clock,
    monotonic: Callable[[], float],
    statistics: StatisticsRecorder,
    on_corruption: OnCorruption,
) -> Tiers:
    """L2 and L3, not opened yet. The slowest that is switched on decides; L2 is a cache if that is L3."""

    def guard(tier: DiskTier) -> GuardedTier[DiskTier]:
        return GuardedTier(tier, CircuitBreaker(monotonic), statistics)

    l2, l3 = make_tiers(config, encryptor, clock, on_corruption)
    no_l2, no_l3 = (
        guard(AbsentTier(CacheTierConfig(enabled=False), tier.tier_type, tier.backend)) for tier in (l2, l3)
    )
    if l3.enabled:
        decides = GuardedTier(l3, CircuitBreaker(monotonic), statistics)
        before_it = guard(l2) if l2.enabled else no_l2
        return Tiers(before_it, decides, before_it, decides)
    if l2.enabled:
        decides = GuardedTier(l2, CircuitBreaker(monotonic), statistics)
        return Tiers(decides, no_l3, no_l2, decides)
    return Tiers(no_l2, no_l3, no_l2, None)


def missed_changes_path(config: CacheConfig) -> Path:
    """Where the changes stand that the slowest tier has missed: apart from both disk tiers."""
    return config.l2_cache_dir.parent / "missed-changes.jsonl"


def failures_path(config: CacheConfig) -> Path:
    """Where it stands who has failed, and who is banned."""
    return config.l2_cache_dir.parent / "failures.jsonl"


def make_tiers(
    config: CacheConfig, encryptor: CredentialEncryptor, clock: Clock, on_corruption: OnCorruption
) -> tuple[AuthorityTier, AuthorityTier]:
    """L2 and L3 by themselves, not opened yet, whether they are switched on or not."""
    # As a cache, L2 need not outlive a power cut: after one it starts empty.
    durability = Durability.PROCESS if config.l3_config.enabled else config.durability
    l2: AuthorityTier
    if config.l2_backend is L2BackendType.JSONL:
        l2 = JsonlCacheTier(
            config.l2_config,
            CacheTierType.L2,
            config.l2_cache_dir,
            encryptor,
            durability=durability,
            clock=clock,
            on_corruption=on_corruption,
        )
    else:
        l2 = SQLiteCacheTier(
            config.l2_config,
            CacheTierType.L2,
            config.l2_cache_dir / L2_DATABASE,
            encryptor,
            durability=durability,
            clock=clock,
            on_corruption=on_corruption,
        )
    l3 = SQLiteCacheTier(
        config.l3_config,
        CacheTierType.L3,
        config.l3_database_path,
        encryptor,
        durability=config.durability,
        clock=clock,
        on_corruption=on_corruption,
    )
    return l2, l3
