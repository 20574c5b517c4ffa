"""From the stores of proxywhirl into a cache of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final, Literal

from proxystash_server.cache import (
    CacheConfig,
    CacheEntry,
    CacheManager,
    CacheTierType,
    EntryFilter,
    InvalidEntryError,
    StoreLock,
    TierState,
    TierStatistics,
)
from proxystash_server.cache.entry.entry import Clock, wall_clock
from proxystash_server.cache.entry.limits import check_ttl
from proxystash_server.proxywhirl_import.keyring import Keyring
from proxystash_server.proxywhirl_import.record import (
    Found,
    Kind,
    RejectedRecordError,
    last_change,
    read_record,
)
from proxystash_server.proxywhirl_import.report import FileReport, ImportReport
from proxystash_server.proxywhirl_import.stores import (
    NotAStoreError,
    SourceError,
    StoreFile,
    UnreadableStoreError,
)

_BATCH: Final = 500
_NO_ROOM: Final = "by its settings the cache has no room for it"

# Told of each step: how many records are done, and of how many, where that is known.
OnProgress = Callable[[Literal["read", "import"], int, int | None], None]


def import_stores(
    stores: Sequence[StoreFile],
    config: CacheConfig,
    keyring: Keyring,
    *,
    without_credentials: bool = False,
    clock: Clock = wall_clock,
    on_progress: OnProgress = lambda _step, _done, _total: None,
) -> ImportReport:
    """Store every usable entry of `stores` in the cache of `config`, whose store is locked meanwhile.

    Of copies of the same entry, in one store or several, the newest counts, even if it has expired; one that
    the cache already holds, as new or newer, is left alone there. Until it is known which copy that is, all
    are held in memory. Raises SourceError if none of the files is a store of proxywhirl's, and what
    CacheManager raises.
    """
    if not config.l2_config.enabled and not config.l3_config.enabled:
        raise SourceError("neither l2 nor l3 is enabled, so nothing that is imported would be kept")
    with StoreLock(config, "importing from proxywhirl") as lock:
        return _import_stores(stores, config, lock, keyring, without_credentials, clock, on_progress)


def _import_stores(
    stores: Sequence[StoreFile],
    config: CacheConfig,
    lock: StoreLock,
    keyring: Keyring,
    without_credentials: bool,
    clock: Clock,
    on_progress: OnProgress,
) -> ImportReport:
    report = ImportReport()
    copies = list(_read(stores, report, keyring, without_credentials, on_progress))
    if not report.files:
        paths = ", ".join(str(store.path) for store in stores)
        raise SourceError(f"none of these has a table of proxywhirl's: {paths}")
    usable = [copy for copy in _newest(copies) if _is_usable(copy, clock())]
    # The most recently used come last, so that they are the ones that stay in the faster tiers.
    usable.sort(key=lambda copy: copy.found.entry.last_accessed_us)
    if usable:
        with CacheManager(
            # Nothing but the import is to happen here: cleaning is the server's.
            config.model_copy(update={"enable_background_cleanup": False}),
            clock=clock,
            background=False,
            lock=lock,
        ) as manager:
            _store(manager, usable, report, on_progress)
    return report


@dataclass(frozen=True, slots=True)
class _Copy:
    """An entry as one file has it."""

    found: Found
    file: FileReport
    where: str

    def reject(self, kind: Kind, reason: str) -> None:
        self.file.reject(self.where, kind, reason)


def _read(
    stores: Iterable[StoreFile],
    report: ImportReport,
    keyring: Keyring,
    without_credentials: bool,
    on_progress: OnProgress,
) -> Iterator[_Copy]:
    done = 0
    for store in stores:
        file = FileReport(store.path, store.format)
        try:
            for where, record in store.records():
                file.read += 1
                done += 1
                try:
                    if isinstance(record, RejectedRecordError):
                        raise record
                    yield _Copy(
                        read_record(record, keyring, without_credentials=without_credentials), file, where
                    )
                except RejectedRecordError as error:
                    file.reject(where, error.kind, str(error))
                if done % _BATCH == 0:
                    on_progress("read", done, None)
        except UnreadableStoreError as error:
            if isinstance(error, NotAStoreError) and not store.expected:
                continue
            file.error = str(error)
        report.files.append(file)
    on_progress("read", done, done)


def _newest(copies: Sequence[_Copy]) -> Iterator[_Copy]:
    """The newest copy of each entry; the others are told of."""
    # A copy that has lost its credentials has another key of ours than one that has not.
    opened = {copy.found.origin for copy in copies if not copy.found.lost_credentials}
    newest: dict[str, _Copy] = {}
    for copy in copies:
        if copy.found.lost_credentials and copy.found.origin in opened:
            copy.reject("skipped", "duplicate: a copy whose credentials could be opened counts")
            continue
        other = newest.setdefault(copy.found.entry.key, copy)
        if other is copy:
            continue
        older, newer = (other, copy) if copy.found.is_as_new_as(other.found) else (copy, other)
        older.reject("skipped", "duplicate: another copy is newer, or the same")
        newest[copy.found.entry.key] = replace(newer, found=_complete(newer.found, older.found))
    yield from newest.values()


def _complete(newer: Found, older: Found) -> Found:
    """The newer copy, with the health monitoring of the older where its own store cannot hold any."""
    fetched_together = newer.entry.fetch_time_us == older.entry.fetch_time_us
    if newer.knows_monitoring or not older.knows_monitoring or not fetched_together:
        return newer
    entry = newer.entry.model_copy(update={"health_monitoring": older.entry.health_monitoring})
    return replace(newer, entry=entry, knows_monitoring=True)


def _is_usable(copy: _Copy, now_us: int) -> bool:
    entry = copy.found.entry
    if entry.expires_at_us <= now_us:
        copy.reject("skipped", "expired")
        return False
    try:
        check_ttl(entry.expires_at_us - entry.fetch_time_us)
    except InvalidEntryError as error:
        copy.reject("skipped", f"invalid {error.field}: {error}")
        return False
    return True


def _store(
    manager: CacheManager, copies: Sequence[_Copy], report: ImportReport, on_progress: OnProgress
) -> None:
    """Put `copies` into the cache, of which the last ones matter most."""
    before = _last_tier(manager)
    may_hold = manager.get_statistics().entries > 0
    surplus = max(0, len(copies) - before.max_entries) if before.max_entries else 0
    for copy in copies[:surplus]:
        copy.reject("skipped", _NO_ROOM)
    remaining = iter(copies[surplus:])
    done = surplus
    while batch := list(islice(remaining, _BATCH)):
        wanted = []
        for copy in batch:
            if may_hold and _holds(manager, copy.found.entry):
                copy.reject("skipped", "already there, as new or newer")
            else:
                wanted.append(copy)
        stored = manager.put_many([copy.found.entry for copy in wanted])
        tier = _last_tier(manager)
        is_full = tier.state is TierState.ACTIVE and 0 < tier.max_entries <= tier.entries
        for copy, stored_in in zip(wanted, stored, strict=True):
            if _last_tier_type(manager) in stored_in:
                copy.file.imported += 1
                copy.file.without_credentials += copy.found.lost_credentials
            elif is_full:
                copy.reject("skipped", _NO_ROOM)
            else:
                copy.reject("failed", f"{_last_tier_type(manager)} could not store it; the log says why")
        done += len(batch)
        on_progress("import", done, len(copies))
    report.evicted = surplus + _last_tier(manager).evictions_capacity - before.evictions_capacity


def _holds(manager: CacheManager, entry: CacheEntry) -> bool:
    """Whether the cache has this entry, as new or newer."""
    # A listing is no use of an entry, which a get would be. The key is the first there is after all but its
    # last digit: no two keys share fifteen digits of a SHA-256.
    for held in manager.list_entries(entry.key[:-1], 1, EntryFilter()):
        if held.key == entry.key:
            lacks_password = held.password is None and entry.password is not None
            return last_change(held) >= last_change(entry) and not lacks_password
    return False


def _last_tier_type(manager: CacheManager) -> CacheTierType:
    """The tier that decides what is kept."""
    return CacheTierType.L3 if manager.config.l3_config.enabled else CacheTierType.L2


def _last_tier(manager: CacheManager) -> TierStatistics:
    statistics = manager.get_statistics()
    return statistics.l3_stats if manager.config.l3_config.enabled else statistics.l2_stats
