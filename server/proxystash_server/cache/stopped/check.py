"""Whether a stopped store is consistent: each tier in itself, and L2 with L3 if it would be believed.

What a crash at any moment may leave behind, and the next start puts in order by itself, is a note: L2 that
starts empty, changes that the slowest tier has missed, a torn last line. Anything else is a fault.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from typing import Final, NamedTuple

from cryptography.fernet import Fernet

from proxystash_server.cache.coherence.missed import MissedChanges
from proxystash_server.cache.config import CacheConfig, CacheTierConfig, CacheTierType, L2BackendType
from proxystash_server.cache.entry.credentials import (
    KEY_VARIABLE,
    CredentialEncryptor,
    UnreadableCredentialsError,
    is_damaged_check,
)
from proxystash_server.cache.entry.entry import CacheEntry, with_use
from proxystash_server.cache.errors import EncryptionKeyError, StoreFormatError, TierError
from proxystash_server.cache.ground.parsing import UNREADABLE
from proxystash_server.cache.setup import (
    L2_DATABASE,
    find_keys,
    key_file,
    missed_changes_path,
    previous_keys,
)
from proxystash_server.cache.stopped.jsonl import StoppedJsonl
from proxystash_server.cache.stopped.report import Progress, Report, no_progress
from proxystash_server.cache.stopped.sqlite import StoppedDatabase
from proxystash_server.cache.stopped.store import REPAIR, StoppedStore

_UNFINISHED: Final = ("*.compacting", "*.new", "*.partial", "*.salvaged*")
_DAMAGED: Final = "*.damaged-*"
_GIVE_KEY: Final = (
    f"put the key file back, or give the key in {KEY_VARIABLE} or {KEY_VARIABLE}_PREVIOUS; after an "
    "interrupted rotate-key, both keys are needed"
)
_BATCH: Final = 500


def check_store(config: CacheConfig, *, progress: Progress = no_progress) -> Report:
    """Look through the store of a stopped cache. Changes nothing, not even the time of a file.

    Raises StoreError if it cannot be looked through, OSError if a file cannot be read.
    """
    report = Report()
    keys = _keys(config, report)
    missed = MissedChanges(missed_changes_path(config), keys.encryptor(), sync=False)
    l2, l3 = stopped_stores(config)
    with closing(missed), closing(l2), closing(l3):
        _check_missed_changes(missed, report)
        is_l2_open = _open(l2, config.l2_config, report)
        is_l3_open = _open(l3, config.l3_config, report)
        if is_l3_open:
            _look_through(l3, config.l3_config, keys, report, progress)
        if is_l2_open:
            newest = max(l3.last_version, missed.last_version)
            is_believed = is_l3_open and _is_believed(l2, l3, newest)
            confirm = partial(_confirm, l2, l3, _Tally(keys, l3), missed, report) if is_believed else None
            _look_through(l2, config.l2_config, keys, report, progress, confirm)
            if is_l3_open and not is_believed:
                _note_what_becomes_of(l2, l3, newest, report)
    note_leftovers(config, report)
    return report


def stopped_stores(config: CacheConfig) -> tuple[StoppedStore, StoppedDatabase]:
    """L2 and L3 as they are on disk, not opened yet."""
    l2: StoppedStore
    if config.l2_backend is L2BackendType.JSONL:
        l2 = StoppedJsonl(CacheTierType.L2, config.l2_cache_dir)
    else:
        l2 = StoppedDatabase(CacheTierType.L2, config.l2_cache_dir / L2_DATABASE)
    return l2, StoppedDatabase(CacheTierType.L3, config.l3_database_path)


def _open(store: StoppedStore, config: CacheTierConfig, report: Report) -> bool:
    if config.enabled:
        report.tiers.append(store.totals)
    return config.enabled and store.open(report)


def _look_through(
    store: StoppedStore,
    config: CacheTierConfig,
    keys: _Keys,
    report: Report,
    progress: Progress,
    confirm: Callable[[list[CacheEntry]], None] | None = None,
) -> None:
    tally = _Tally(keys, store)
    entries = store.entries(tally, report, progress)
    while batch := list(itertools.islice(entries, _BATCH)):
        if confirm is not None:
            confirm(batch)
    _check_key(store, tally, report)
    held, most = store.totals.entries, config.max_entries
    if most is not None and held > most:
        message, remedy = (
            f"holds {held} entries, and may hold {most}",
            "the next start, or --repair, evicts the rest",
        )
        report.fault("too_many_entries", str(store.path), message, remedy)


def _check_key(store: StoppedStore, tally: _Tally, report: Report) -> None:
    if tally.passed:
        return
    place = str(store.path)
    wrong = f"the key it was sealed under is not at hand ({tally.origin})"
    key_check = "the token that tells which key the store was sealed under"
    if tally.failed:
        opened = f"{tally.opened} of {tally.opened + tally.failed} credentials can be opened"
        report.fault("wrong_key", place, f"{wrong}: {opened}", _GIVE_KEY)
    elif store.key_check is None:
        # Where the store cannot even say its name, that has been told.
        if store.totals.entries and store.notes.get("id"):
            report.fault("lost_key_check", place, f"{key_check} is missing", "--repair makes a new one")
    elif tally.opened or is_damaged_check(store.key_check):
        message = f"{key_check} is damaged: all {tally.opened} credentials can be opened"
        report.fault("damaged_key_check", place, message, "--repair makes a new one")
    else:
        report.fault("wrong_key", place, wrong, _GIVE_KEY)


class _Keys(NamedTuple):
    """The keys at hand, and where they come from. A key that opens nothing stands for none at all."""

    keys: list[bytes]
    origin: str

    def encryptor(self) -> CredentialEncryptor:
        return CredentialEncryptor(self.keys[0], self.keys[1:])


def _keys(config: CacheConfig, report: Report) -> _Keys:
    path = key_file(config)
    try:
        keys, origin = find_keys(config)
        if not keys:
            return _Keys([Fernet.generate_key()], f"{path} is missing")
        if len(keys) > 1:
            remedy = "run it again to finish it"
            report.note("unfinished_rotation", str(path), "rotate-key was interrupted", remedy)
        found = _Keys([*keys, *previous_keys(config)], f"tried {origin}")
        found.encryptor()
    except EncryptionKeyError as error:
        place = str(path) if config.encryption_key is None else KEY_VARIABLE
        report.fault("unusable_key", place, str(error))
        return _Keys([Fernet.generate_key()], f"{place} cannot be used")
    return found


class _Tally(CredentialEncryptor):
    """Opens credentials, and where the key itself is in doubt counts those that it can open."""

    def __init__(self, keys: _Keys, store: StoppedStore) -> None:
        super().__init__(keys.keys[0], keys.keys[1:])
        self.origin = keys.origin
        self.passed = store.key_check is not None and self.passes_check(store.key_check)
        self.opened = 0
        self.failed = 0

    def open(self, token: bytes | None) -> tuple[str | None, str | None]:
        try:
            opened = super().open(token)
        except UnreadableCredentialsError:
            self.failed += 1
            if self.passed:
                raise
            return None, None
        self.opened += token is not None
        return opened


# -- L2 as a cache of L3


def _is_believed(l2: StoppedStore, l3: StoppedStore, last_version: int) -> bool:
    """Whether the next start takes L2 as it is, by the conditions of `Recovery`."""
    return (
        l2.sealed_at == last_version
        and l2.notes.get("id") == l3.notes.get("cache_id")
        and not l2.notes.get("alone")
        and not l3.notes.get("incomplete")
    )


def _note_what_becomes_of(l2: StoppedStore, l3: StoppedStore, last_version: int, report: Report) -> None:
    """Tell what the next start does with an L2 that it does not take as it is."""
    if "partner" in {*l2.notes, *l3.notes}:
        # An earlier format, which was told; its first start goes by what both have noted.
        return
    owner, was_alone = l3.notes.get("cache_id"), l2.notes.get("alone")
    is_its_own = owner in {l2.notes.get("id"), None}
    if is_its_own and was_alone:
        message, remedy = "L2 decided while L3 was switched off", "the next start gives L3 what L2 holds"
        report.note("alone", str(l2.path), message, remedy)
    elif not l2.totals.entries:
        return
    elif is_its_own and l3.notes.get("incomplete"):
        message, remedy = "L3 is new, or has lost entries", "the next start brings back what L2 has of them"
        report.note("incomplete", str(l3.path), message, remedy)
    else:
        if (is_its_own or (was_alone and not owner)) and l2.last_version > last_version:
            message, remedy = "L2 has later changes than L3", "the next start brings them to L3"
            report.note("set_back", str(l3.path), message, remedy)
        why = "it did not come to an orderly end" if is_its_own else "L3 does not know it as its cache"
        report.note("unsealed_cache", str(l2.path), f"L2 starts empty: {why}")


def _confirm(
    l2: StoppedStore,
    l3: StoppedDatabase,
    encryptor: CredentialEncryptor,
    missed: MissedChanges,
    report: Report,
    entries: Sequence[CacheEntry],
) -> None:
    """Report what L2 has otherwise than L3 has it, or than L3 has missed it."""
    in_l3 = l3.lookup([entry.key for entry in entries], encryptor)
    for entry in entries:
        key = entry.key
        other = _missed_entry(missed, key) if missed.covers(key) else in_l3.get(key)
        if isinstance(other, Exception):
            # It was reported as damage.
            continue
        if other is None:
            message = "L3 does not have it"
        elif other.version != entry.version:
            message = f"L2 has version {entry.version}, L3 has version {other.version}"
        elif with_use(other, entry.access_count, entry.last_accessed_us, entry.evicted_from_l1) != entry:
            message = "L2 and L3 have the same version with different contents"
        else:
            continue
        report.fault("disagreement", f"{l2.path} key {entry.key!r}", message, "--repair empties L2")


# -- beside the stores


def _check_missed_changes(missed: MissedChanges, report: Report) -> None:
    """Look through the journal of what the slowest tier has missed, if there is one."""
    place = str(missed.path)
    try:
        damaged = missed.open()
    except EncryptionKeyError as error:
        report.fault("wrong_key", place, str(error), _GIVE_KEY)
        return
    except StoreFormatError as error:
        report.fault("unknown_format", place, str(error), "use a newer release")
        return
    for _ in range(damaged):
        report.fault("damaged_line", place, "a line does not match its checksum", REPAIR)
    keys = missed.keys()
    for key in keys:
        entry = _missed_entry(missed, key)
        if isinstance(entry, UnreadableCredentialsError):
            report.unreadable_credential(place, key)
        elif isinstance(entry, Exception):
            report.fault("damaged_line", place, f"the change of {key!r} cannot be read", REPAIR)
    if missed.is_in_use:
        message = f"the slowest tier has missed {len(keys) + bool(missed.cleared_at)} changes"
        report.note("missed_changes", place, message, "the next start makes up for them")


def _missed_entry(missed: MissedChanges, key: str) -> CacheEntry | Exception | None:
    """The entry that the last missed change of `key` stored, if it did, or why it cannot be read."""
    try:
        return missed.read(key)
    except (TierError, *UNREADABLE) as error:
        return error


def note_leftovers(config: CacheConfig, report: Report) -> None:
    """Tell of files that nothing reads any more."""
    files = (config.l3_database_path, key_file(config), missed_changes_path(config))
    for directory in sorted({config.l2_cache_dir, *(path.parent for path in files)}):
        for path in sorted(path for pattern in _UNFINISHED for path in directory.glob(pattern)):
            report.note("leftover", str(path), "left behind by a crash", "delete it; nothing reads it")
        for path in sorted(directory.glob(_DAMAGED)):
            message, remedy = "a damaged file that was set aside", "delete it when you have looked at it"
            report.note("damaged_file", str(path), message, remedy)
