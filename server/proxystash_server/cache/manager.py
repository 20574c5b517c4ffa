"""CacheManager: what happens across the tiers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import NamedTuple, Self

from proxystash.models import HealthMonitoring, HealthStatus, TierState
from proxystash.proxies import InvalidProxyUrl, cache_key, key_of
from proxystash_server.cache import transfer
from proxystash_server.cache.access_log import AccessLog, combine
from proxystash_server.cache.config import CacheConfig, CacheTierType
from proxystash_server.cache.credentials import CredentialEncryptor
from proxystash_server.cache.entry import (
    CacheEntry,
    Clock,
    accessed,
    make_entry,
    read_address,
    stamped,
    wall_clock,
    with_health,
)
from proxystash_server.cache.errors import CacheClosedError, CacheUnavailableError, InvalidEntryError
from proxystash_server.cache.keylocks import KeyLocks
from proxystash_server.cache.level import WriteOutcome
from proxystash_server.cache.limits import SECOND_US, check_key, check_ttl, checked_credential
from proxystash_server.cache.maintenance import Maintenance
from proxystash_server.cache.puts import Puts, StoredIn
from proxystash_server.cache.setup import make_disk_pair, unlock
from proxystash_server.cache.stack import TierStack
from proxystash_server.cache.statistics import (
    CacheStatistics,
    EvictionCause,
    SilentStatistics,
    StatisticsRecorder,
    TierFacts,
)
from proxystash_server.cache.tiers.base import (
    EXPIRY_BATCH,
    CacheTier,
    DurableTier,
    EntryFilter,
    Page,
    whole_page,
)
from proxystash_server.cache.tiers.memory import MemoryCacheTier
from proxystash_server.cache.ttl import TTLManager

logger = logging.getLogger(__name__)


class Lookup(NamedTuple):
    """What a get found: the entry and the tier that held it, or two Nones for a miss."""

    entry: CacheEntry | None
    served_by: CacheTierType | None


class Lookups(NamedTuple):
    """What several gets found, each as in Lookup."""

    entries: list[CacheEntry | None]
    served_by: list[CacheTierType | None]


class Invalidation(NamedTuple):
    """What recording a failure did."""

    found: bool
    evicted: bool
    health_status: HealthStatus | None
    failure_count: int


_MISS = Lookup(None, None)
_L1 = CacheTierType.L1


def _found_in_l1(entry: CacheEntry) -> Lookup:
    # On the path of every hit, and a third of what the generated constructor costs.
    return tuple.__new__(Lookup, (entry, _L1))


class CacheManager:
    """A cache of proxies in three tiers: L1 in memory, L2 on disk, L3 in a database.

    A get answers from the first tier that has the entry and copies it into the faster ones. A put goes to
    every tier that works, the slowest first. An acknowledged change is seen by every later read and survives
    the end of the process. Every method is thread-safe; all but `get_statistics` raise CacheClosedError after
    `close`.

    `clock` gives microseconds since the epoch, `monotonic` seconds for pauses and latencies; `background` off
    means that nothing happens by itself, and `maintain` is the caller's.
    """

    def __init__(
        self,
        config: CacheConfig,
        *,
        clock: Clock = wall_clock,
        monotonic: Callable[[], float] = time.monotonic,
        background: bool = True,
    ) -> None:
        self.config = config
        self._clock = clock
        # For L1's hits: the usual clock without a function in between.
        self._nanoseconds = time.time_ns if clock is wall_clock else lambda: clock() * 1000
        self._locks = KeyLocks()
        self._closed = False
        recorder = StatisticsRecorder if config.enable_statistics else SilentStatistics
        self._statistics = recorder(clock(), monotonic)
        self.encryptor: CredentialEncryptor
        self.encryptor, keep_key_file = unlock(config)
        access_log = AccessLog()
        l1 = MemoryCacheTier(config.l1_config, CacheTierType.L1, access_log, clock)
        pair = make_disk_pair(config, self.encryptor, clock, monotonic, self._statistics, self._on_corruption)
        self._l1 = l1
        self._l1_latency = self._statistics.latency(CacheTierType.L1, "read")
        self._stack = TierStack(l1, pair, access_log, self._locks, self._statistics, clock, keep_key_file)
        self._puts = Puts(self._stack, self._locks, self._check_open)
        self._stack.open()
        self._maintenance = Maintenance(self) if background else None
        if self._maintenance is not None:
            self._maintenance.start()
        self.ttl_manager: TTLManager | None = None
        if config.enable_background_cleanup:
            self.ttl_manager = TTLManager(self, config.cleanup_interval_seconds)
            self.ttl_manager.start()

    # -- the tiers, by proxywhirl's names

    @property
    def l1_tier(self) -> CacheTier:
        """The memory tier."""
        return self._stack.l1

    @property
    def l2_tier(self) -> DurableTier:
        """The faster disk tier."""
        return self._stack.disk.l2.tier

    @property
    def l3_tier(self) -> DurableTier:
        """The database tier."""
        return self._stack.disk.l3.tier

    @property
    def statistics(self) -> CacheStatistics:
        """A snapshot of the statistics."""
        return self.get_statistics()

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
    ) -> CacheEntry:
        """An entry with what is missing filled in: the key from URL and username, the TTL from the source.

        Raises InvalidEntryError for anything outside the limits.
        """
        now = self._clock()
        fetched = now if fetch_time_us is None else fetch_time_us
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
        return make_entry(
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
        )

    # -- reading

    def get(self, key: str) -> CacheEntry | None:
        """The entry after this use, or None; raises as `lookup` does."""
        # An untimed hit is the case that must be cheap; one in sixteen is timed.
        l1 = self._l1
        if l1.hits & 15 and not self._closed:
            nanoseconds = self._nanoseconds
            entry = l1.hit(key, nanoseconds() // 1000)
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
            entry = l1.hit(key, nanoseconds() // 1000)
        else:
            entry = self._timed_hit(key)
        return self._lookup_below(key) if entry is None else _found_in_l1(entry)

    def lookup_many(self, keys: Sequence[str]) -> Lookups:
        """A lookup of each key, in order; not atomic across keys.

        Raises InvalidEntryError if one of them is no usable key, and then looks none up.
        """
        self._check_open()
        for key in self._l1.absent(keys):
            # What is in memory has been checked.
            check_key(key)
        started = time.perf_counter_ns()
        found = self._l1.hit_many(keys, self._clock())
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
            flushes = self._stack.access_log.flushes
            page = self._stack.disk.scan(after, limit, entry_filter, self._clock())
            current = [combine(entry, self._stack.access_log.peek(entry.key)) for entry in page.entries]
            # A flush in between may have taken counts out of the log that the page does not have yet.
            if flushes == self._stack.access_log.flushes:
                return Page(current, page.next_after)

    # -- changing

    def put(self, key: str, entry: CacheEntry) -> StoredIn:
        """Store `entry` under `key`: the tiers that hold it now, none if no tier could take it.

        The failure count of an entry that is replaced goes on, unless the new one is healthy.
        """
        if key != entry.key:
            check_key(key)
        return self._put([(key, entry)])[0]

    def put_many(self, entries: Sequence[CacheEntry]) -> list[StoredIn]:
        """Store entries under their own keys, in one commit for each tier.

        Of equal keys the last one counts.
        """
        return self._put([(entry.key, entry) for entry in entries]) if entries else []

    def delete(self, key: str) -> bool:
        """Remove an entry from every tier; whether any held it."""
        self._check_open()
        check_key(key)
        with self._locks.hold(key):
            held = bool(self._stack.remove([key]))
        if held:
            self._statistics.record_removals(1)
        return held

    def clear(self) -> int:
        """Remove every entry from every tier; how many distinct ones there were."""
        self._check_open()
        with self._locks.hold_all():
            count = self._stack.entries()
            if not self._stack.disk.clear():
                raise CacheUnavailableError("no tier could take the change; try again")
            self._stack.l1.clear()
            self._stack.access_log.clear()
            self._statistics.record_removals(count)
        return count

    def invalidate_by_health(self, key: str) -> Invalidation:
        """Record one failure: count it, mark the entry unhealthy, and evict it at the failure threshold.

        Raises CacheUnavailableError if no tier could take the change.
        """
        self._check_open()
        check_key(key)
        outcome = WriteOutcome()
        with self._locks.hold(key):
            entry = self._stack.current(key)
            if entry is not None and self._stack.is_expired(entry):
                self._stack.remove_expired([key])
                entry = None
            if entry is None:
                return Invalidation(False, False, None, 0)
            failures = entry.failure_count + 1
            evict = self.config.health_check_invalidation and failures >= self.config.failure_threshold
            if evict:
                self._statistics.record_evictions(EvictionCause.HEALTH, self._stack.remove([key]))
            else:
                changed = with_health(entry, HealthStatus.UNHEALTHY, failures)
                changed = stamped(changed, key, self._stack.versions.next(), failures, entry.sealed)
                outcome = self._stack.rewrite(entry, changed)
        self._stack.drop_evicted(outcome)
        if evict:
            logger.info("entry evicted by health", extra={"key": key, "failure_count": failures})
        return Invalidation(True, evict, HealthStatus.UNHEALTHY, failures)

    def cleanup_expired(self) -> int:
        """Remove every expired entry, a batch at a time; how many distinct ones there were."""
        removed = 0
        self._check_open()
        for expired_keys in self._stack.expired_key_sources():
            while keys := expired_keys(self._clock(), EXPIRY_BATCH):
                expired = self._expire(keys)
                removed += expired
                if not expired:
                    break
        return removed

    # -- the cache as a whole

    def get_statistics(self) -> CacheStatistics:
        """A snapshot of the statistics, which costs no scan of any tier."""
        states = {CacheTierType.L1: TierState.ACTIVE if self._stack.l1.enabled else TierState.DISABLED}
        states.update(self._stack.disk.states())
        sizes = self._stack.sizes()
        facts = {
            tier.tier_type: TierFacts(
                backend=tier.backend,
                state=states[tier.tier_type],
                entries=sizes[tier.tier_type],
                max_entries=tier.config.max_entries or 0,
            )
            for tier in (self._stack.l1, self.l2_tier, self.l3_tier)
        }
        entries = self._stack.disk.entries(sizes)
        return self._statistics.snapshot(self._clock(), facts, entries, self._l1.hits)

    def maintain(self) -> None:
        """One round of background work.

        Flush access counts, do what gets have postponed, probe degraded tiers, work off backlogs, compact.
        """
        self._check_open()
        self._stack.maintain()

    def warm_from_file(self, file_path: str, ttl_override: int | None = None) -> transfer.WarmResult:
        """Load proxies from a json, jsonl, csv or plain text file.

        How many were loaded, skipped, failed, and why.
        """
        self._check_open()
        return transfer.warm_from_file(self, file_path, ttl_override)

    def export_to_file(self, filepath: str, *, include_credentials: bool = False) -> transfer.ExportResult:
        """Write every live entry as a line of JSON that `warm_from_file` reads back."""
        return transfer.export_to_file(self, filepath, include_credentials=include_credentials)

    def close(self) -> None:
        """Flush, stop the background work and release the files; idempotent. Calls under way may fail."""
        if self._closed:
            return
        self._closed = True
        if self.ttl_manager is not None:
            self.ttl_manager.stop()
        if self._maintenance is not None:
            self._maintenance.stop()
        with self._locks.hold_all():
            self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -- inside

    def _timed_hit(self, key: str) -> CacheEntry | None:
        """The entry from L1, which holds nothing if it is switched off, after this use."""
        self._check_open()
        started = time.perf_counter_ns()
        entry = self._l1.hit(key, self._clock())
        if entry is not None:
            self._l1_latency.record(time.perf_counter_ns() - started)
        return entry

    def _check_open(self) -> None:
        if self._closed:
            raise CacheClosedError("the cache is closed")

    def _lookup_below(self, key: str) -> Lookup:
        check_key(key)
        outcome = None
        locks = self._locks
        locks.acquire_one(key)
        try:
            if self._closed:
                raise CacheClosedError("the cache is closed")
            stack, l1 = self._stack, self._l1
            now = self._clock()
            is_absent = l1.get(key) is None
            if not is_absent:
                # Another thread has promoted it while this one waited for the key. Or it has expired, or may
                # be pushed out in this moment.
                entry = l1.hit(key, now)
                if entry is not None:
                    return _found_in_l1(entry)
            entry, served_by, missed = stack.find_below(key) if is_absent else stack.find(key)
            if l1.enabled:
                missed.append(_L1)
            if entry is None or stack.is_expired(entry):
                if entry is not None and not stack.postponed(key):
                    stack.remove_expired([key])
                if served_by is not None:
                    missed.append(served_by)
                self._statistics.record_lookup(None, missed, 0)
                return _MISS
            entry = accessed(entry, now)
            # Before it is in memory, where the next use of it may come at once.
            stack.access_log.record_use(entry)
            promotions = 0
            if served_by is CacheTierType.L3 and not stack.postponed(key):
                outcome = stack.disk.promote(entry)
                promotions = len(outcome.stored_in)
            if l1.enabled:
                stack.put_in_l1(entry)
                promotions += 1
            self._statistics.record_lookup(served_by, missed, promotions)
        finally:
            locks.release((key,))
        if outcome is not None:
            stack.drop_evicted(outcome)
        return Lookup(entry, served_by)

    def _put(self, entries: Sequence[tuple[str, CacheEntry]]) -> list[StoredIn]:
        self._check_open()
        seal = self.encryptor.seal
        return self._puts.put([(key, entry, seal(entry.username, entry.password)) for key, entry in entries])

    def _expire(self, keys: Iterable[str]) -> int:
        with self._locks.hold_many(keys) as held:
            try:
                entries = [self._stack.current(key) for key in held]
            except CacheUnavailableError:
                # Left to the next round of the cleaner.
                return 0
            expired = [entry.key for entry in entries if entry is not None and self._stack.is_expired(entry)]
            return len(expired) if expired and self._stack.remove_expired(expired) else 0

    def _on_corruption(self, tier: CacheTierType, key: str | None, reason: str) -> None:
        self._statistics.record_evictions(EvictionCause.CORRUPTION, {tier: 1})
        if key is not None:
            self._stack.disk.note_loss(tier, key)
        logger.warning("record set aside", extra={"tier": str(tier), "reason": reason})
