"""From a configuration to the encryption key and the disk tiers."""

from __future__ import annotations

from collections.abc import Callable

from cryptography.fernet import Fernet

from proxystash_server.cache.breaker import CircuitBreaker
from proxystash_server.cache.config import CacheConfig, CacheTierType, L2BackendType
from proxystash_server.cache.credentials import (
    KEY_VARIABLE,
    CredentialEncryptor,
    create_key_file,
    read_key_file,
)
from proxystash_server.cache.entry import Clock
from proxystash_server.cache.errors import EncryptionKeyError, TierError
from proxystash_server.cache.level import DiskLevel
from proxystash_server.cache.statistics import StatisticsRecorder
from proxystash_server.cache.tiers.base import DurableTier, OnCorruption
from proxystash_server.cache.tiers.jsonl import JsonlCacheTier
from proxystash_server.cache.tiers.sqlite import SQLiteCacheTier

L2_DATABASE = "l2.db"


def unlock(config: CacheConfig) -> CredentialEncryptor:
    """The encryptor for the configured key, proven against what is on disk.

    The key is the configured one, else that of the key file, else a new one, which goes to the key file.
    Raises EncryptionKeyError, having changed nothing, if the stores were sealed under another key.
    """
    key = None if config.encryption_key is None else config.encryption_key.get_secret_value().encode()
    previous = [secret.get_secret_value().encode() for secret in config.previous_encryption_keys]
    origin = KEY_VARIABLE
    path = config.encryption_key_file or config.l3_database_path.parent / "secret.key"
    is_new = False
    if key is None:
        key = read_key_file(path)
        origin = str(path)
        if key is None:
            key = Fernet.generate_key()
            is_new = True
    encryptor = CredentialEncryptor(key, previous)
    for tier in _make_tiers(config, encryptor, lambda: 0, lambda _tier, _reason: None):
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
        raise EncryptionKeyError(
            f"the key in {origin} is not the one that {tier.tier_type} was sealed under. Give that key in "
            f"{KEY_VARIABLE}, or beside a newer one in {KEY_VARIABLE}_PREVIOUS"
        )
    if is_new:
        create_key_file(path, key)
    return encryptor


def make_disk_levels(
    config: CacheConfig,
    encryptor: CredentialEncryptor,
    clock: Clock,
    monotonic: Callable[[], float],
    statistics: StatisticsRecorder,
    on_corruption: OnCorruption,
) -> tuple[DiskLevel, DiskLevel]:
    """L2 and L3, not opened yet."""
    l2, l3 = _make_tiers(config, encryptor, clock, on_corruption)
    return (
        DiskLevel(l2, CircuitBreaker(monotonic), statistics),
        DiskLevel(l3, CircuitBreaker(monotonic), statistics),
    )


def _make_tiers(
    config: CacheConfig, encryptor: CredentialEncryptor, clock: Clock, on_corruption: OnCorruption
) -> tuple[DurableTier, DurableTier]:
    l2: DurableTier
    if config.l2_backend is L2BackendType.JSONL:
        l2 = JsonlCacheTier(
            config.l2_config,
            CacheTierType.L2,
            config.l2_cache_dir,
            encryptor,
            durability=config.durability,
            clock=clock,
            on_corruption=on_corruption,
        )
    else:
        l2 = SQLiteCacheTier(
            config.l2_config,
            CacheTierType.L2,
            config.l2_cache_dir / L2_DATABASE,
            encryptor,
            durability=config.durability,
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
