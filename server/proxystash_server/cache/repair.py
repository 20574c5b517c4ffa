"""Making a stopped store consistent: bad records are set aside, and what the tiers disagree on is settled."""

from __future__ import annotations

import zlib
from collections import Counter
from typing import Final

from cryptography.fernet import Fernet

from proxystash_server.cache.check import Examination, examine
from proxystash_server.cache.check_report import Progress, no_progress
from proxystash_server.cache.config import (
    CacheConfig,
    CacheTierConfig,
    CacheTierType,
    Durability,
    L2BackendType,
)
from proxystash_server.cache.credentials import CredentialEncryptor, create_key_file
from proxystash_server.cache.entry import wall_clock
from proxystash_server.cache.errors import EncryptionKeyError, StoreError
from proxystash_server.cache.manager import CacheManager
from proxystash_server.cache.setup import L2_DATABASE, find_keys, key_file, make_tiers, previous_keys
from proxystash_server.cache.tiers.base import Write
from proxystash_server.cache.tiers.jsonl import JsonlCacheTier
from proxystash_server.cache.tiers.jsonl_directory import SHARDS, JsonlDirectory
from proxystash_server.cache.tiers.jsonl_record import rewrite
from proxystash_server.cache.tiers.jsonl_shard import Shard, Slot, decode_line
from proxystash_server.cache.tiers.resealing import rewrite_shards
from proxystash_server.cache.tiers.sqlite_repair import repair_database

# What no repair helps against: a person must say what is right.
_KEY_FAULTS: Final = frozenset({"unusable_key", "wrong_key"})
_FOREIGN: Final = frozenset({"unknown_format", "unknown_line", "foreign_database", "wrong_schema"})
_MISPLACED: Final = frozenset({"wrong_shard", "wrong_order", "no_header"})


def repair_store(config: CacheConfig, *, progress: Progress = no_progress) -> Counter[str]:
    """Repair the store of a stopped cache; what was done, and how often.

    Bad records are set aside as a running tier does. Where the tiers disagree, L3 is right, unless damage has
    cost L3 what L2 still has. Raises EncryptionKeyError and StoreError, having changed nothing, where the key
    is not at hand or a file is not ours; TierError, OSError or sqlite3.Error if a file cannot be written.
    """
    before = examine(config, progress=progress)
    if before.report.consistent:
        return Counter()
    _refuse_hopeless(before)
    encryptor = _encryptor(config)
    done: Counter[str] = Counter()
    databases = []
    if config.l3_config.enabled:
        databases.append(config.l3_database_path)
    if config.l2_config.enabled and config.l2_backend is L2BackendType.SQLITE:
        databases.append(config.l2_cache_dir / L2_DATABASE)
    for path in databases:
        if path.exists():
            drop_check = _has(before, "damaged_key_check", str(path))
            done += repair_database(path, encryptor, drop_key_check=drop_check)
    if config.l2_config.enabled and config.l2_backend is L2BackendType.JSONL:
        done += _repair_jsonl(config, encryptor, before, progress)
    done += _settle(config, encryptor, examine(config, progress=progress))
    # The rest is what every start does: match the stores, work off their backlogs, evict what is over.
    CacheManager(config.model_copy(update={"enable_background_cleanup": False}), background=False).close()
    return done


def _refuse_hopeless(before: Examination) -> None:
    for fault in before.report.faults:
        if fault.kind in _KEY_FAULTS:
            raise EncryptionKeyError(f"{fault.message}; nothing was changed")
        if fault.kind in _FOREIGN:
            raise StoreError(f"{fault.place}: {fault.message}; {fault.remedy}; nothing was changed")


def _encryptor(config: CacheConfig) -> CredentialEncryptor:
    keys = [*find_keys(config)[0], *previous_keys(config)]
    if not keys:
        # Nothing is sealed, or the missing key would have been a fault.
        keys = [Fernet.generate_key()]
        create_key_file(key_file(config), keys[0])
    return CredentialEncryptor(keys[0], keys[1:])


def _has(examination: Examination, kind: str, place: str) -> bool:
    return any(fault.kind == kind and fault.place == place for fault in examination.report.faults)


def _repair_jsonl(
    config: CacheConfig, encryptor: CredentialEncryptor, before: Examination, progress: Progress
) -> Counter[str]:
    done: Counter[str] = Counter()
    path = config.l2_cache_dir
    directory = JsonlDirectory(path, sync=True)
    if _has(before, "damaged_key_check", str(path)) and (meta := directory.read_meta()) is not None:
        directory.write_meta({**meta, "key_check": encryptor.make_check().decode()})
        done["key check tokens made anew"] += 1

    def count(_tier: CacheTierType, _key: str | None, _reason: str) -> None:
        done["damaged lines or files set aside"] += 1

    tier = JsonlCacheTier(
        CacheTierConfig(),
        CacheTierType.L2,
        path,
        encryptor,
        durability=Durability.FULL,
        on_corruption=count,
    )
    tier.open()
    for key in tier.keys():  # noqa: SIM118 -- no dict
        tier.get(key)
    tier.close()

    def keep(shard: Shard, line: bytes, slot: Slot) -> bytes | None:
        record = decode_line(line[:-1])
        assert record is not None
        if zlib.crc32(record["key"].encode()) % SHARDS == shard.number:
            return rewrite(line, slot)
        reason = "the entry belongs in another shard"
        directory.set_aside(shard.path.name, slot.offset, line[:-1], reason, wall_clock())
        done["misplaced lines set aside"] += 1
        return None

    if any(kind in _MISPLACED for kind in before.report.counts):
        rewrite_shards(path, keep, progress)
        done["files written anew"] += SHARDS
    done["lost files made anew"] = before.report.counts["lost_shard"] + before.report.counts["lost_meta"]
    return +done


def _settle(config: CacheConfig, encryptor: CredentialEncryptor, found: Examination) -> Counter[str]:
    done: Counter[str] = Counter()
    if not (found.unconfirmed or found.lost_by_l3):
        return done
    l2, _ = make_tiers(config, encryptor, wall_clock, lambda _tier, _key, _reason: None)
    l2.open()
    try:
        if found.unconfirmed:
            l2.apply([Write(key, None) for key in found.unconfirmed])
            done["entries taken out of L2"] += len(found.unconfirmed)
        if found.lost_by_l3:
            # As if L3 had missed them: it gets them at the start that follows.
            l2.extend_backlog(l2.versions(found.lost_by_l3))
            done["entries given back to L3"] += len(found.lost_by_l3)
    finally:
        l2.close()
    return done
