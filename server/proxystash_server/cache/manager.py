"""CacheManager: the cache as its users see it."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import NamedTuple, Self

from proxystash.models import HealthMonitoring, HealthStatus
from proxystash.proxies import InvalidProxyUrl, cache_key, key_of
from proxystash_server.cache import transfer
from proxystash_server.cache.coherence.authority import Authority
from proxystash_server.cache.coherence.changes import Changes, Stored, StoredIn, batches
from proxystash_server.cache.coherence.disk_cache import DiskCache
from proxystash_server.cache.coherence.failures import BanRules, FailureHistory, Failures
from proxystash_server.cache.coherence.feed import Listener
from proxystash_server.cache.coherence.lookups import Lookup, LookupsBelow, found_in_l1
from proxystash_server.cache.coherence.missed import MissedChanges
from proxystash_server.cache.coherence.plan import Invalidation, Put, Rules
from proxystash_server.cache.coherence.reads import Reads
from proxystash_server.cache.coherence.recovery import Recovery
from proxystash_server.cache.coherence.uses import UseLog
from proxystash_server.cache.config import CacheConfig, CacheTierType, Durability
from proxystash_server.cache.counting.statistics import (
    CacheStatistics,
    EvictionCause,
    SilentStatistics,
    StatisticsRecorder,
    TierFacts,
)
from proxystash_server.cache.entry.credentials import CredentialEncryptor
from proxystash_server.cache.entry.entry import (
    CacheEntry,
    Clock,
    make_entry,
    read_address,
    wall_clock,
)
from proxystash_server.cache.entry.limits import (
    SECOND_US,
    check_fetch_time,
    check_key,
    check_not_expired,
    check_ttl,
    checked_credential,
)
from proxystash_server.cache.entry.merging import Combine
from proxystash_server.cache.errors import (
    CacheClosedError,
    CacheError,
    CacheUnavailableError,
    InvalidEntryError,
)
from proxystash_server.cache.ground.keylocks import KeyLocks
from proxystash_server.cache.periodic import MAINTENANCE_SECONDS, PeriodicWork, TTLManager
from proxystash_server.cache.setup import failures_path, guard_tiers, missed_changes_path, unlock
from proxystash_server.cache.store_lock import StoreLock
from proxystash_server.cache.tiers.base import (
    CacheTier,
    DiskTier,
    EntryFilter,
    Page,
    whole_page,
)
from proxystash_server.cache.tiers.memory import MemoryCacheTier

logger = logging.getLogger(__name__)


class Lookups(NamedTuple):
    """What several gets found, each as in Lookup."""

    entries: list[CacheEntry | None]
    served_by: list[CacheTierType | None]


_L1 = CacheTierType.L1


class CacheManager:
    """A cache of proxies in three tiers: L1 in memory, L2 on disk, L3 in a database.

    A get answers from the first tier that has the entry and copies it into the faster ones. A put goes to
    every tier that works, the slowest first. An acknowledged change is seen by every later read and survives
    the end of the process. Every method is thread-safe; all but `get_statistics` raise CacheClosedError after
    `close`.

    It locks its store, and raises StoreInUseError if another cache has it; `lock` is that lock where the
    caller has it already, and lets go of it later than of the manager. A manager belongs to the process that
    has made it: in a forked child it refuses everything with CacheClosedError. One that is dropped without
    `close` gives a ResourceWarning, and leaves what a killed process leaves.

    `clock` gives microseconds since the epoch, `monotonic` seconds for pauses and latencies; `background` off
    means that nothing happens by itself, and `maintain` is the caller's.
    """

    # Until it is made.
    _closed = True
    _is_forked = False

    def __init__(
        self,
        config: CacheConfig,
        *,
        clock: Clock = wall_clock,
        monotonic: Callable[[], float] = time.monotonic,
        background: bool = True,
        lock: StoreLock | None = None,
    ) -> None:
        self._owns_lock = lock is None
        self._lock = lock or StoreLock(config, "a CacheManager").__enter__()
        try:
            self._open(config, clock, monotonic, background)
        except BaseException:
            self._closed = self._released = True
            self._let_go_of_lock()
            raise
        _open_managers.add(self)

    def _open(
        self, config: CacheConfig, clock: Clock, monotonic: Callable[[], float], background: bool
    ) -> None:
        self.config = config = config.fixed()
        self._clock = clock
        # For L1's hits: the usual clock without a function in between.
        self._nanoseconds = time.time_ns if clock is wall_clock else lambda: clock() * 1000
        self._locks = KeyLocks()
        self._closing = threading.Lock()
        self._closed = self._released = False
        self.entries_lost = 0
        recorder = StatisticsRecorder if config.enable_statistics else SilentStatistics
        self._statistics = recorder(clock(), monotonic)
        self.encryptor: CredentialEncryptor
        self.encryptor, key_file = unlock(config)
        uses = self._uses = UseLog()
        self._l1 = MemoryCacheTier(config.l1_config, CacheTierType.L1, uses, clock)
        self._l1_latency = self._statistics.latency(CacheTierType.L1, "read")
        tiers = guard_tiers(config, self.encryptor, clock, monotonic, self._statistics, self._on_corruption)
        self._l2, self._l3 = tiers.l2.tier, tiers.l3.tier
        self._cache = DiskCache(tiers.cache)
        missed = MissedChanges(
            missed_changes_path(config),
            self.encryptor,
            self._lock.check,
            sync=config.durability is Durability.FULL,
        )
        self._authority = Authority(tiers.authority, missed, memory_keeps=config.l1_config.enabled)
        ban_rules = BanRules(
            config.ban_seconds * SECOND_US, config.max_ban_seconds * SECOND_US, config.refuse_banned
        )
        self._history = FailureHistory(
            failures_path(config), ban_rules, self._lock.check, sync=config.durability is Durability.FULL
        )
        self._reads = Reads(self._l1, uses, self._cache, self._authority, (tiers.l2, tiers.l3))
        self._changes = Changes(
            self._authority,
            self._cache,
            self._l1,
            uses,
            self._reads,
            self._locks,
            self._statistics,
            clock,
            Rules(config.failure_threshold, config.health_check_invalidation),
            self._history,
            self._check_open,
        )
        self._recovery = Recovery(
            self._authority, self._cache, self._l1, self._changes, self._reads, self._lock, key_file
        )
        self._below = LookupsBelow(
            self._l1,
            uses,
            self._cache,
            self._reads,
            self._changes,
            self._locks,
            self._statistics,
            clock,
            self._check_open,
        )
        self._lookup_below = self._below.lookup
        for path, damaged in (
            (self._history.path, self._history.open()),
            (missed.path, self._recovery.open()),
        ):
            if damaged:
                logger.warning("damaged lines in the journal", extra={"path": str(path), "lines": damaged})
        self._maintenance = PeriodicWork(
            "proxystash-maintenance", MAINTENANCE_SECONDS, self, CacheManager.maintain
        )
        if background:
            self._maintenance.start()
        self.ttl_manager: TTLManager | None = None
        if config.enable_background_cleanup:
            self.ttl_manager = TTLManager(self, config.cleanup_interval_seconds)
            self.ttl_manager.start()

    # -- the tiers, by proxywhirl's names

    @property
    def l1_tier(self) -> CacheTier:
        """The memory tier."""
        self._check_process()
        return self._l1

    @property
    def l2_tier(self) -> DiskTier:
        """The faster disk tier."""
        self._check_process()
        return self._l2

    @property
    def l3_tier(self) -> DiskTier:
        """The database tier."""
        self._check_process()
        return self._l3

    @property
    def statistics(self) -> CacheStatistics:
        """A snapshot of the statistics."""
        return self.get_statistics()

    @property
    def failure_threshold(self) -> int:
        """The failure at which an entry is evicted."""
        return self.config.failure_threshold

    @property
    def lists_all(self) -> bool:
        """Whether a list has all that is held: not so while the slowest tier is skipped."""
        authority = self._authority
        # After a Clear that it has missed, the journal has all that there is.
        return authority.works or not authority.enabled or bool(authority.missed.cleared_at)

    # -- entries

    @staticmethod
    def generate_cache_key(proxy_url: str) -> str:
        """The key of a proxy URL, with or without userinfo in it; raises InvalidEntryError."""
        try:
            return cache_key(proxy_url)
        except InvalidProxyUrl as error:
            raise InvalidEntryError("proxy_url", "INVALID_PROXY_URL", str(error)) from None

    def new_entry(
        self,
        proxy_url: str,
        *,
        key: str = "",
        username: str | None = None,
        password: str | None = None,
        source: str = "",
        fetch_time_us: int | None = None,
        ttl_us: int | None = None,
        health_status: HealthStatus = HealthStatus.UNKNOWN,
        failure_count: int = 0,
        health_monitoring: HealthMonitoring | None = None,
        labels: Mapping[str, str] | None = None,
        max_leases: int = 0,
    ) -> CacheEntry:
        """An entry with what is missing filled in: the key from URL and username, the TTL from the source.

        Raises InvalidEntryError for anything outside the limits.
        """
        now = self._clock()
        fetched = now
        if fetch_time_us is not None:
            check_fetch_time(fetch_time_us)
            # A clock that is ahead of this one makes nothing live longer.
            fetched = min(fetch_time_us, now)
        if ttl_us is None:
            ttl_us = self.config.ttl_seconds_of(source) * SECOND_US
        else:
            check_ttl(ttl_us)
        address = read_address(proxy_url)
        if not key:
            name = username or address.username
            if name:
                checked_credential("username", username, address.username)
            key = key_of(address.url, name)
        entry = make_entry(
            address,
            key=key,
            username=username,
            password=password,
            source=source,
            fetch_time_us=fetched,
            expires_at_us=fetched + ttl_us,
            last_accessed_us=fetched,
            health_status=health_status,
            failure_count=failure_count,
            health_monitoring=health_monitoring,
            labels=labels or {},
            max_leases=max_leases,
        )
        check_not_expired(entry.content.expires_at_us, now)
        return entry

    # -- reading

    def get(self, key: str) -> CacheEntry | None:
        """The entry after this use, or None; raises as `lookup` does."""
        # An untimed hit is the case that must be cheap; one in sixteen is timed.
        l1 = self._l1
        if l1.hits & 15 and not self._closed:
            nanoseconds = self._nanoseconds
            entry = l1.use(key, nanoseconds() // 1000)
        else:
            entry = self._timed_hit(key)
        return self._lookup_below(key).entry if entry is None else entry

    def lookup(self, key: str) -> Lookup:
        """The entry after this use, and the tier that held it.

        Raises CacheUnavailableError if no tier works.
        """
        l1 = self._l1
        if l1.hits & 15 and not self._closed:
            nanoseconds = self._nanoseconds
            entry = l1.use(key, nanoseconds() // 1000)
        else:
            entry = self._timed_hit(key)
        return self._lookup_below(key) if entry is None else found_in_l1(entry)

    def lookup_many(self, keys: Sequence[str]) -> Lookups:
        """A lookup of each key, in order; not atomic across keys.

        Raises InvalidEntryError if one of them is no usable key, and then looks none up.
        """
        self._check_open()
        for key in self._l1.absent(keys):
            # What is in memory has been checked.
            check_key(key)
        started = time.perf_counter_ns()
        found = self._l1.use_many(keys, self._clock())
        served_by: list[CacheTierType | None] = [_L1] * len(found)
        if not found:
            return Lookups(found, served_by)
        if all(found):
            self._l1_latency.record((time.perf_counter_ns() - started) // len(found))
            return Lookups(found, served_by)
        for place, entry in enumerate(found):
            if entry is None:
                found[place], served_by[place] = self._lookup_below(keys[place])
        return Lookups(found, served_by)

    def list_entries(self, after: str, limit: int, entry_filter: EntryFilter) -> list[CacheEntry]:
        """The first `limit` live entries that match, by key, from the first key greater than `after`.

        Not a use. Looks through all entries if hardly any match.
        """
        return whole_page(lambda place, rest: self.scan_entries(place, rest, entry_filter), after, limit)

    def scan_entries(self, after: str, limit: int, entry_filter: EntryFilter) -> Page:
        """As many of `list_entries` as are found quickly, perhaps none, and where to go on. Not a use."""
        self._check_open()
        while True:
            page = self._reads.scan(after, limit, entry_filter, self._clock())
            if not self._authority.is_incomplete:
                return page
            # Damage came to light: what the others hold of it is brought back before anybody misses it.
            if not self._recovery.refill():
                raise CacheUnavailableError("a tier failed while its entries were listed; try again")

    # -- changing

    def put(self, key: str, entry: CacheEntry) -> bool:
        """Store `entry` under `key`; whether any tier took it. `put_many` says which.

        The failure count of an entry that is replaced goes on, unless the new one is healthy.
        """
        if key != entry.key:
            check_key(key)
        return bool(self._put([(key, entry)])[0])

    def put_many(self, entries: Sequence[CacheEntry]) -> list[StoredIn]:
        """Store entries under their own keys, in one commit for each tier: the tiers that took each.

        Those are none if no tier could take it. Of equal keys the last one counts.
        """
        return self._put([(entry.key, entry) for entry in entries]) if entries else []

    def store(self, puts: Sequence[tuple[CacheEntry, Combine | None]]) -> list[Stored | CacheError]:
        """Store entries under their own keys, in one commit for each tier, each combined with what is stored.

        See `entry.merging`; None puts it in the place of that. Gives what became of each: InvalidEntryError,
        NotStoredError and BannedError are of one entry alone.
        """
        self._check_open()
        if not puts:
            return []
        return self._changes.put([self._request(entry.key, entry, combine) for entry, combine in puts])

    def bans(self, after: str = "", limit: int = 1000) -> list[tuple[str, Failures]]:
        """The first `limit` keys greater than `after` that are banned now, with what is known of them."""
        self._check_open()
        return self._history.banned(self._clock(), after, limit)

    def unban(self, key: str) -> bool:
        """Forget the failures of a key; whether it was banned. An entry that is stored keeps its count."""
        self._check_open()
        check_key(key)
        return self._changes.forget_failures(key)

    def delete(self, key: str) -> bool:
        """Remove an entry from every tier; whether any held it."""
        self._check_open()
        check_key(key)
        return self._changes.delete(key)

    def clear(self) -> int:
        """Remove every entry from every tier; how many distinct ones there were."""
        self._check_open()
        count = self._changes.clear(lambda: self._reads.entries(self._reads.sizes()))
        self._statistics.record_removals(count)
        return count

    def invalidate_by_health(self, key: str) -> Invalidation:
        """Record one failure: count it, mark the entry unhealthy, and evict it at the failure threshold.

        Raises CacheUnavailableError if no tier could take the change.
        """
        self._check_open()
        check_key(key)
        done = self._changes.report_failure(key)
        if not done.found and self._authority.is_incomplete:
            # What was found instead of the entry is damage, which others may make good.
            self._recovery.refill()
            done = self._changes.report_failure(key)
        return done

    def report_success(self, key: str) -> Invalidation:
        """Start the count of an entry's failures over; one that was unhealthy is healthy then.

        Raises CacheUnavailableError if no tier could take the change.
        """
        self._check_open()
        check_key(key)
        return self._changes.report_success(key)

    def cleanup_expired(self) -> int:
        """Remove every expired entry, a batch at a time; how many distinct ones there were."""
        removed = 0
        self._check_open()
        for expired_keys in self._reads.expired_key_sources():
            while keys := expired_keys(self._clock()):
                expired = sum(map(self._changes.expire, batches(keys)))
                removed += expired
                if not expired:
                    break
        return removed

    def subscribe(self, listener: Listener) -> int:
        """Tell `listener` every change from now on; the revision of the last change before.

        It is called with the changes of a group, in the order of their revisions, when they are committed and
        every read sees them, before they are acknowledged and while their keys are locked: it must be quick,
        and must not call the cache.
        """
        self._check_process()
        return self._changes.subscribe(listener)

    def unsubscribe(self, listener: Listener) -> None:
        """Tell `listener` no more."""
        self._check_process()
        self._changes.unsubscribe(listener)

    # -- the cache as a whole

    def get_statistics(self) -> CacheStatistics:
        """A snapshot of the statistics, which costs no scan of any tier."""
        self._check_process()
        states = self._reads.states()
        sizes = self._reads.sizes()
        facts = {
            tier.tier_type: TierFacts(
                backend=tier.backend,
                state=states[tier.tier_type],
                entries=sizes[tier.tier_type],
                max_entries=tier.config.max_entries or 0,
                log_bytes=tier.log_bytes,
            )
            for tier in (self._l1, self._l2, self._l3)
        }
        return self._statistics.snapshot(self._clock(), facts, self._reads.entries(sizes), self._l1.hits)

    def maintain(self) -> None:
        """One round of background work.

        Flush the counts of uses, do what gets have postponed, probe degraded tiers and bring them up to date,
        compact.
        """
        self._check_open()
        self._changes.flush_uses()
        self._below.make_up_for_postponed()
        self._changes.forget_past_failures()
        self._recovery.maintain()

    def warm_from_file(self, file_path: str, ttl_override: int | None = None) -> transfer.WarmResult:
        """Load proxies from a list in any of the formats that `proxystash.files` reads.

        How many were loaded, skipped, failed, and why. `ttl_override` is in seconds, from 1 to 10 years;
        raises InvalidEntryError for any other.
        """
        self._check_open()
        return transfer.warm_from_file(file_path, ttl_override, self.new_entry, self.store)

    def export_to_file(self, filepath: str, *, include_credentials: bool = False) -> transfer.ExportResult:
        """Write every live entry as a line of JSON that `warm_from_file` reads back."""
        return transfer.export_to_file(
            filepath,
            lambda after, limit: self.list_entries(after, limit, EntryFilter()),
            include_credentials=include_credentials,
        )

    def close(self) -> None:
        """Flush, stop the background work and release the files; idempotent. Calls under way may fail.

        Entries that were kept in memory alone are lost by it: `entries_lost` and the log say how many.
        Where an interrupt has ended it, it can be called again.
        """
        with self._closing:
            if self._released:
                return
            self._closed = True
            if self.ttl_manager is not None:
                self.ttl_manager.stop()
            self._maintenance.stop()
            self._changes.flush_uses()
            self._recovery.make_up_for_what_was_missed()
            with self._changes.lock, self._changes.lock_reads():
                self.entries_lost = self._recovery.close()
                self._history.close()
            self._let_go_of_lock()
            self._released = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed:
            warnings.warn(f"{self!r} was not closed", ResourceWarning, stacklevel=2, source=self)

    def __repr__(self) -> str:
        return f"<CacheManager in {self.config.l2_cache_dir.parent}>"

    # -- inside

    def _timed_hit(self, key: str) -> CacheEntry | None:
        """The entry from L1, which holds nothing if it is switched off, after this use."""
        self._check_open()
        started = time.perf_counter_ns()
        entry = self._l1.use(key, self._clock())
        if entry is not None:
            self._l1_latency.record(time.perf_counter_ns() - started)
        return entry

    def _check_process(self) -> None:
        if self._is_forked:
            raise CacheClosedError(
                "the cache was made in the process that this one was forked from; make one in each process, "
                "each with a directory of its own"
            )

    def _leave_to_parent(self) -> None:
        self._is_forked = self._closed = self._released = True
        # A thread of the parent may have been closing it.
        self._closing = threading.Lock()

    def _let_go_of_lock(self) -> None:
        if self._owns_lock:
            self._lock.release()

    def _check_open(self) -> None:
        if self._closed:
            self._check_process()
            raise CacheClosedError("the cache is closed")

    def _put(self, entries: Sequence[tuple[str, CacheEntry]]) -> list[StoredIn]:
        self._check_open()
        stored_in: list[StoredIn] = []
        for stored in self._changes.put([self._request(key, entry, None) for key, entry in entries]):
            if isinstance(stored, CacheError):
                raise stored
            stored_in.append(stored.stored_in)
        return stored_in

    def _request(self, key: str, entry: CacheEntry, combine: Combine | None) -> Put:
        content = entry.content
        if content.username is None and content.password is None:
            return Put(key, entry, None, combine)
        return Put(key, entry, self.encryptor.seal(content.username, content.password), combine)

    def _on_corruption(self, tier: CacheTierType, key: str | None, reason: str) -> None:
        self._statistics.record_evictions(EvictionCause.CORRUPTION, {tier: 1})
        if tier is self._authority.name:
            self._authority.last_damage = object()
        logger.warning("record set aside", extra={"tier": str(tier), "reason": reason})


_open_managers: weakref.WeakSet[CacheManager] = weakref.WeakSet()


def _refuse_in_child() -> None:
    """Nobody goes on here with what threads of the parent were doing: a lock may be held for ever.

    That holds for SQLite's own locks, too: so that no connection is ever closed here, nothing of a manager,
    which has cycles, is collected.
    """
    managers = list(_open_managers)
    if managers:
        gc.freeze()
    for manager in managers:
        manager._leave_to_parent()  # noqa: SLF001 -- of its own module


os.register_at_fork(after_in_child=_refuse_in_child)
