"""Making a stopped store consistent: bad records are set aside, and L2 is emptied where it is still wrong."""

from __future__ import annotations

from collections import Counter
from typing import Final, NamedTuple

from cryptography.fernet import Fernet

from proxystash_server.cache.config import CacheConfig, CacheTierType, L2BackendType
from proxystash_server.cache.entry.credentials import CredentialEncryptor, create_key_file
from proxystash_server.cache.entry.entry import wall_clock
from proxystash_server.cache.errors import EncryptionKeyError, StoreError
from proxystash_server.cache.manager import CacheManager
from proxystash_server.cache.setup import find_keys, key_file, make_tiers, missed_changes_path, previous_keys
from proxystash_server.cache.stopped.check import check_store, stopped_stores
from proxystash_server.cache.stopped.report import Progress, Report, no_progress
from proxystash_server.cache.stopped.resealing import write_anew
from proxystash_server.cache.stopped.sqlite_repair import repair_database
from proxystash_server.cache.store_lock import StoreLock
from proxystash_server.cache.tiers.jsonl.directory import JsonlDirectory
from proxystash_server.cache.tiers.jsonl.record import rewrite

# What no repair helps against: a person must say what is right.
_KEY_FAULTS: Final = frozenset({"unusable_key", "wrong_key"})
_FOREIGN: Final = frozenset({"unknown_format"})


class Repair(NamedTuple):
    """What was done, and how often, and what a check finds now."""

    done: Counter[str]
    report: Report


def repair_store(config: CacheConfig, *, progress: Progress = no_progress) -> Repair:
    """Repair the store of a stopped cache, which is locked meanwhile, and check it again.

    Bad records are set aside as a running tier does. What L3 loses by that, it gets back from L2 as far as
    that has it; then an L2 that does not agree with L3 is emptied. Raises EncryptionKeyError and StoreError,
    having changed nothing, where the store is in use, the key not at hand, or a file not ours; TierError,
    OSError or sqlite3.Error if a file cannot be written.
    """
    with StoreLock(config, "repairing the store") as lock:
        found = check_store(config, progress=progress)
        if found.consistent:
            return Repair(Counter(), found)
        _refuse_hopeless(found)
        done = _repair(config, lock, found, progress)
        return Repair(done, check_store(config, progress=progress))


def _repair(config: CacheConfig, lock: StoreLock, found: Report, progress: Progress) -> Counter[str]:
    done: Counter[str] = Counter()
    encryptor = _encryptor(config)
    for store, tier_config in zip(stopped_stores(config), (config.l2_config, config.l3_config), strict=True):
        if not (tier_config.enabled and store.is_there()):
            continue
        drop_key_check = any(
            fault.kind == "damaged_key_check" and fault.place == str(store.path) for fault in found.faults
        )
        if store.totals.backend == L2BackendType.JSONL:
            done += _repair_jsonl(config, encryptor, drop_key_check=drop_key_check)
        else:
            done += repair_database(store.path, encryptor, drop_key_check=drop_key_check)
    # As every start does: refill L3 from L2, make up for what it has missed, evict what is over.
    without_cleaner = config.model_copy(update={"enable_background_cleanup": False})
    CacheManager(without_cleaner, background=False, lock=lock).close()
    journal = missed_changes_path(config)
    if any(fault.place == str(journal) for fault in found.faults) and not journal.exists():
        done["damaged journals set aside"] += 1
    if config.l3_config.enabled and not check_store(config, progress=progress).consistent:
        done["entries of L2 dropped"] = _empty_l2(config, encryptor)
    done["headers corrected"] = found.counts["wrong_header"]
    done["lost files made anew"] = found.counts["lost_file"] + found.counts["lost_meta"]
    return +done


def _refuse_hopeless(found: Report) -> None:
    for fault in found.faults:
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


def _repair_jsonl(
    config: CacheConfig, encryptor: CredentialEncryptor, *, drop_key_check: bool
) -> Counter[str]:
    done: Counter[str] = Counter()
    directory = JsonlDirectory(config.l2_cache_dir, sync=True)
    if drop_key_check and (meta := directory.read_meta()) is not None:
        directory.write_meta({**meta, "key_check": encryptor.make_check().decode()})
        done["key_check made anew"] += 1

    def count(_tier: CacheTierType, _key: str | None, _reason: str) -> None:
        done["damaged lines or files set aside"] += 1

    l2, _ = make_tiers(config, encryptor, wall_clock, count)
    l2.open()
    for key in l2.keys():  # noqa: SIM118 -- no dict
        l2.get(key)
    l2.close()
    write_anew(config.l2_cache_dir, rewrite)
    done["files written anew"] += 1
    return done


def _empty_l2(config: CacheConfig, encryptor: CredentialEncryptor) -> int:
    """Take everything out of L2, all of which L3 has; how many entries there were."""
    l2, _ = make_tiers(config, encryptor, wall_clock, lambda _tier, _key, _reason: None)
    l2.open()
    try:
        l2.break_seal()
        return l2.clear()
    finally:
        l2.close()
