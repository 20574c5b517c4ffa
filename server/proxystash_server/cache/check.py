"""Whether a stopped store is consistent: each tier in itself, and the tiers with each other.

What a crash at any moment may leave behind, and the next start puts in order by itself, is told as a note:
L2 may lack what L3 has; the last line of a file may be torn; a key in the backlog of either tier, or
announced to it, may differ in any way. Anything else is a fault.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from proxystash_server.cache.check_report import Progress, Report, no_progress
from proxystash_server.cache.config import CacheConfig, CacheTierConfig, CacheTierType, L2BackendType
from proxystash_server.cache.credentials import (
    KEY_VARIABLE,
    CredentialEncryptor,
    UnreadableCredentialsError,
)
from proxystash_server.cache.entry import CacheEntry
from proxystash_server.cache.errors import EncryptionKeyError
from proxystash_server.cache.recovery import ALONE
from proxystash_server.cache.setup import L2_DATABASE, find_keys, key_file, previous_keys
from proxystash_server.cache.tiers.base import EVERYTHING
from proxystash_server.cache.tiers.stopped import StoppedStore
from proxystash_server.cache.tiers.stopped_jsonl import StoppedJsonl
from proxystash_server.cache.tiers.stopped_sqlite import StoppedDatabase

_UNFINISHED: Final = ("leftover", "left behind by a crash", "delete it; nothing reads it")
_DAMAGED: Final = (
    "damaged_file",
    "a damaged file that was set aside",
    "delete it when you have looked at it",
)
_LEFTOVERS: Final = (
    ("*.compacting", *_UNFINISHED),
    ("*.new", *_UNFINISHED),
    ("*.partial", *_UNFINISHED),
    ("*.salvaged*", *_UNFINISHED),
    ("*.damaged-*", *_DAMAGED),
)
_GIVE_KEY: Final = (
    f"put the key file back, or give the key in {KEY_VARIABLE} or {KEY_VARIABLE}_PREVIOUS; after an "
    "interrupted rotate-key, both keys are needed"
)
_BATCH: Final = 500


def check_store(config: CacheConfig, *, progress: Progress = no_progress) -> Report:
    """Look through the store of a stopped cache. Changes nothing, not even the time of a file.

    Raises StoreError if it cannot be looked through, OSError if a file cannot be read.
    """
    return examine(config, progress=progress).report


@dataclass(slots=True)
class Examination:
    """A report, and what a repair wants to know beside it.

    `unconfirmed` has the keys that L2 has no right to, `lost_by_l3` those that only L2 still has.
    """

    report: Report
    unconfirmed: list[str]
    lost_by_l3: list[str]
    strangers: bool = False


def examine(config: CacheConfig, *, progress: Progress = no_progress) -> Examination:
    """`check_store`, with what a repair needs."""
    report = Report()
    result = Examination(report, [], [])
    keys = _keys(config, report)
    l2, l3 = stopped_stores(config)
    opened: dict[CacheTierType, Stopped] = {}
    try:
        for store, tier_config in ((l3, config.l3_config), (l2, config.l2_config)):
            if not tier_config.enabled:
                continue
            report.tiers.insert(0, store.totals)
            if store.open(report):
                opened[store.tier] = Stopped(store, tier_config, _Tally(keys, store), report)
        if CacheTierType.L3 in opened:
            for _ in opened[CacheTierType.L3].entries(progress):
                pass
        if CacheTierType.L2 in opened:
            _compare(opened, result, progress)
        _look_for_leftovers(config, report)
    finally:
        l2.close()
        l3.close()
    return result


def stopped_stores(config: CacheConfig) -> tuple[StoppedStore, StoppedStore]:
    """L2 and L3 as they are on disk, not opened yet."""
    l2: StoppedStore
    if config.l2_backend is L2BackendType.JSONL:
        l2 = StoppedJsonl(CacheTierType.L2, config.l2_cache_dir)
    else:
        l2 = StoppedDatabase(CacheTierType.L2, config.l2_cache_dir / L2_DATABASE)
    return l2, StoppedDatabase(CacheTierType.L3, config.l3_database_path)


class Stopped:
    """One tier under examination: its store, its configuration, and what its credentials say of the key."""

    def __init__(
        self, store: StoppedStore, config: CacheTierConfig, encryptor: _Tally, report: Report
    ) -> None:
        self.store = store
        self.encryptor = encryptor
        self._config = config
        self._report = report

    @property
    def is_bounded(self) -> bool:
        """Whether the tier evicts."""
        return self._config.max_entries is not None

    def entries(self, progress: Progress) -> Iterator[CacheEntry]:
        """Every sound entry; when they have all been given, the tier has been looked through."""
        yield from self.store.entries(self.encryptor, self._report, progress)
        self._check_key()
        self._check_size()
        if self.store.backlog:
            self._report.note(
                "backlog",
                str(self.store.path),
                f"{len(self.store.backlog)} changes are marked that the other disk tier has missed",
                "the next start makes up for them",
            )

    def _check_key(self) -> None:
        store, tally = self.store, self.encryptor
        if tally.passed:
            return
        place = str(store.path)
        if tally.failed:
            self._report.fault(
                "wrong_key",
                place,
                f"the key it was sealed under is not at hand ({tally.origin}): {tally.opened} of "
                f"{tally.opened + tally.failed} credentials can be opened",
                _GIVE_KEY,
            )
        elif store.key_check is None:
            # Where the store cannot even say its name, that has been told.
            if store.totals.entries and store.store_id:
                self._report.fault(
                    "lost_key_check",
                    place,
                    "the token that tells which key the store was sealed under is missing",
                    "--repair makes a new one",
                )
        elif tally.opened:
            self._report.fault(
                "damaged_key_check",
                place,
                f"all {tally.opened} credentials can be opened, but not the token that tells which key the "
                "store was sealed under",
                "--repair makes a new one",
            )
        else:
            self._report.fault(
                "wrong_key", place, f"the key it was sealed under is not at hand ({tally.origin})", _GIVE_KEY
            )

    def _check_size(self) -> None:
        held, most = self.store.totals.entries, self._config.max_entries
        if most is not None and held > most:
            self._report.fault(
                "too_many_entries",
                str(self.store.path),
                f"holds {held} entries, and may hold {most}",
                "the next start, or --repair, evicts the rest",
            )


class _Tally(CredentialEncryptor):
    """Opens credentials, and where the key itself is in doubt counts those that it can open."""

    def __init__(self, keys: _Keys, store: StoppedStore) -> None:
        super().__init__(*keys.split())
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


@dataclass(frozen=True, slots=True)
class _Keys:
    keys: list[bytes]
    origin: str

    def split(self) -> tuple[bytes | None, list[bytes]]:
        return (self.keys[0], self.keys[1:]) if self.keys else (None, [])


def _keys(config: CacheConfig, report: Report) -> _Keys:
    path = key_file(config)
    try:
        keys, origin = find_keys(config)
        if not keys:
            return _Keys([], f"{path} is missing")
        if len(keys) > 1:
            report.note(
                "unfinished_rotation", str(path), "rotate-key was interrupted", "run it again to finish it"
            )
        found = _Keys([*keys, *previous_keys(config)], f"tried {origin}")
        CredentialEncryptor(*found.split())
    except EncryptionKeyError as error:
        place = str(path) if config.encryption_key is None else KEY_VARIABLE
        report.fault("unusable_key", place, str(error))
        return _Keys([], f"{place} cannot be used")
    return found


def _compare(opened: dict[CacheTierType, Stopped], result: Examination, progress: Progress) -> None:
    l2 = opened[CacheTierType.L2]
    entries = l2.entries(progress)
    l3 = opened.get(CacheTierType.L3)
    if l3 is None or not _belong_together(l2.store, l3.store, result):
        for _ in entries:
            pass
        return
    comparison = _Comparison(l2.store, l3)
    while batch := list(itertools.islice(entries, _BATCH)):
        comparison.add(batch)
    comparison.tell(result)


def _belong_together(l2: StoppedStore, l3: StoppedStore, result: Examination) -> bool:
    """Whether the two stores are partners, so that L2 must agree with L3."""
    if l2.partner_id == l3.store_id and l3.partner_id == l2.store_id:
        return True
    if not l2.store_id or not l3.store_id:
        # Told already, as damage.
        return False
    l3_is_new = not l3.partner_id and not l3.totals.entries
    if l3_is_new or (l2.partner_id == ALONE and l3.partner_id == l2.store_id):
        message, remedy = "L3 knows nothing of what L2 holds", "the next start fills it from L2"
    elif {l2.partner_id, l3.partner_id} & {"", ALONE, l2.store_id, l3.store_id}:
        message, remedy = (
            "L3 went on without this L2",
            "the next start believes L2 in what L3 has missed alone",
        )
    else:
        result.strangers = True
        result.report.fault(
            "strangers",
            f"{l2.path} and {l3.path}",
            "the two stores have never worked together",
            "put back the one that belongs here; --repair, or the next start, goes by L3",
        )
        return False
    result.report.note("unmatched_stores", str(l2.path), message, remedy)
    return False


class _Comparison:
    """What L2 holds against what L3 holds."""

    def __init__(self, l2: StoppedStore, l3: Stopped) -> None:
        self._l2 = l2
        self._l3 = l3
        # Keys with the version in L2 and that in L3, 0 if it does not have the key.
        self._differing: dict[str, tuple[int, int]] = {}

    def add(self, entries: Sequence[CacheEntry]) -> None:
        """Compare some entries of L2; what backlogs excuse is sorted out later, when they are known."""
        there = self._l3.store.lookup([entry.key for entry in entries], self._l3.encryptor)
        for entry in entries:
            if entry.key not in there:
                self._differing[entry.key] = entry.version, 0
                continue
            other = there[entry.key]
            # One that cannot be read was told already, as damage.
            if other is not None and _content(other) != _content(entry):
                self._differing[entry.key] = entry.version, other.version

    def tell(self, result: Examination) -> None:
        """Report what may not differ."""
        l2, l3 = self._l2, self._l3.store
        cleared_at = l3.backlog.get(EVERYTHING, 0)
        for key, (here, there) in self._differing.items():
            if key in l2.backlog or key in l3.backlog or here < cleared_at:
                continue
            place = f"{l2.path} key {key!r}"
            if not there:
                message = "L2 has an entry that L3 does not have"
            elif here != there:
                message = f"L2 has version {here} of the entry, L3 has version {there}"
            else:
                message = "L2 and L3 have entries of the same version that differ"
            lost_by_l3 = here > max(there, l3.last_version) or (not there and l3.has_set_aside(key))
            (result.lost_by_l3 if lost_by_l3 else result.unconfirmed).append(key)
            remedy = "--repair gives it to L3" if lost_by_l3 else "--repair takes it out of L2"
            excuse = self._excuse(key, there, lost_by_l3=lost_by_l3)
            if excuse:
                result.report.note("unconfirmed_entry", place, f"{message}: {excuse}", remedy)
            else:
                result.report.fault(
                    "lost_by_l3" if lost_by_l3 else "disagreement",
                    place,
                    f"{message}, and no backlog says so",
                    remedy,
                )

    def _excuse(self, key: str, there: int, *, lost_by_l3: bool) -> str:
        """Why a crash may have left an entry in L2 that L3 does not confirm; empty if it may not have."""
        l3 = self._l3.store
        if not l3.last_version and lost_by_l3:
            return "L3 was saved from a damaged file, and has not been compared since"
        if not there and l3.has_set_aside(key):
            return "L3 set its own aside"
        if not there and self._l3.is_bounded:
            return "L3 evicted it"
        return ""


def _content(entry: CacheEntry) -> tuple[object, ...]:
    """What both tiers must agree on: all but the uses of an entry, and how its credentials are sealed."""
    secrets = [
        None if secret is None else secret.get_secret_value() for secret in (entry.username, entry.password)
    ]
    return (
        entry.version,
        entry.proxy_url,
        entry.source,
        entry.fetch_time_us,
        entry.expires_at_us,
        entry.health_status,
        entry.failure_count,
        entry.health_monitoring,
        dict(entry.labels),
        *secrets,
    )


def _look_for_leftovers(config: CacheConfig, report: Report) -> None:
    directories = {config.l2_cache_dir, config.l3_database_path.parent, key_file(config).parent}
    for directory in sorted(directories):
        for pattern, kind, message, remedy in _LEFTOVERS:
            for path in sorted(directory.glob(pattern)):
                report.note(kind, str(path), message, remedy)
