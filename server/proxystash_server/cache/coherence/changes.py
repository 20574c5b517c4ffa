"""Every change of what is held: one group after another, in every tier, numbered and told."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Final, NamedTuple

from proxystash_server.cache.coherence.authority import Authority, Cleared, Committed
from proxystash_server.cache.coherence.disk_cache import DiskCache
from proxystash_server.cache.coherence.failures import FailureHistory
from proxystash_server.cache.coherence.feed import Change, ChangeFeed, ChangeKind, Listener
from proxystash_server.cache.coherence.plan import (
    Delete,
    Expire,
    Invalidation,
    Plan,
    Put,
    ReportFailure,
    ReportSuccess,
    Request,
    Rules,
)
from proxystash_server.cache.coherence.reads import Reads
from proxystash_server.cache.coherence.uses import UseLog, combine
from proxystash_server.cache.config import CacheTierType
from proxystash_server.cache.counting.statistics import EvictionCause, StatisticsRecorder
from proxystash_server.cache.entry.entry import CacheEntry, Clock
from proxystash_server.cache.errors import CacheError, CacheUnavailableError, TierError
from proxystash_server.cache.ground.group_commit import GroupCommit
from proxystash_server.cache.ground.keylocks import Holding, KeyLocks
from proxystash_server.cache.tiers.base import Applied, Write, evicted_by
from proxystash_server.cache.tiers.memory import MemoryCacheTier

logger = logging.getLogger(__name__)

StoredIn = tuple[CacheTierType, ...]


class Stored(NamedTuple):
    """What became of a put: the tiers that took the entry, none if no tier could, and the entry.

    `kept` says that it is the one that was there before; `banned_until_us` is 0 unless the proxy is banned.
    """

    stored_in: StoredIn
    entry: CacheEntry
    kept: bool = False
    banned_until_us: int = 0


# Enough to share the cost of a commit, and few enough that nobody waits long for the others of a group.
_MOST_TOGETHER: Final = 500
# For how many seconds a group that had company waits for the same again.
_PATIENCE: Final = 0.002
_BATCH: Final = 100
# Writers wait for a batch: among a million entries, this one takes a tier a few milliseconds.
_FLUSH_BATCH: Final = 200

_UNAVAILABLE: Final = "no tier could take the change; try again"


class Changes:
    """Makes every change, those of concurrent callers in one commit. Thread-safe.

    A group of requests is decided on and committed by the authority in one step, then applied to L2, then to
    L1, then told to whoever listens to the feed, and only then acknowledged; all the while its keys are
    locked. Groups follow each other, so revisions are the order of commits. What belongs to one request alone
    (checks, sealing) is done before it comes here, in its caller's thread.

    `lock` keeps changes out while it is held.
    """

    def __init__(
        self,
        authority: Authority,
        cache: DiskCache,
        l1: MemoryCacheTier,
        uses: UseLog,
        reads: Reads,
        locks: KeyLocks,
        statistics: StatisticsRecorder,
        clock: Clock,
        rules: Rules,
        history: FailureHistory,
        check_open: Callable[[], None],
    ) -> None:
        self._authority = authority
        self._cache = cache
        self._l1 = l1
        self._uses = uses
        self._reads = reads
        self._locks = locks
        self._statistics = statistics
        self._l1_latency = statistics.latency(CacheTierType.L1, "write")
        self._clock = clock
        self._rules = rules
        self._history = history
        self._check_open = check_open
        self._feed = ChangeFeed()
        # Greater than any of an earlier run, unless a store knows better.
        self._revision = time.time_ns()
        self._flush_lock = threading.Lock()
        self._groups: GroupCommit[Sequence[Request], list[Any] | Exception] = GroupCommit(
            self._make_each, _MOST_TOGETHER, len, _PATIENCE
        )
        self.lock = self._groups.lock

    # -- for callers

    def put(self, puts: Sequence[Put]) -> list[Stored | CacheError]:
        """Store entries; what became of each, or why it was refused."""
        stored: list[Stored | CacheError] = self._submit(puts)
        return stored

    def delete(self, key: str) -> bool:
        """Remove a key from every tier; whether it was held. Raises CacheUnavailableError."""
        [found] = self._submit([Delete(key)])
        return bool(_unless_refused(found))

    def expire(self, keys: Sequence[str]) -> int:
        """Remove those of the keys whose entries have expired; how many did."""
        return sum(found is True for found in self._submit([Expire(key) for key in keys]))

    def report_failure(self, key: str) -> Invalidation:
        """Count one failure, and evict the entry at the threshold. Raises CacheUnavailableError."""
        [done] = self._submit([ReportFailure(key)])
        invalidation: Invalidation = _unless_refused(done)
        return invalidation

    def forget_failures(self, key: str) -> bool:
        """Forget what is known of a key's failures; whether it was banned."""
        with self.lock:
            known = self._history.known.get(key)
            self._history.update({key: None})
            return known is not None and known.banned_until_us > self._clock()

    def forget_past_failures(self) -> None:
        """Forget the failures that are too long ago to matter."""
        with self.lock:
            self._history.drop_past(self._clock())

    def report_success(self, key: str) -> Invalidation:
        """Start the count of failures over. Raises CacheUnavailableError."""
        [done] = self._submit([ReportSuccess(key)])
        invalidation: Invalidation = _unless_refused(done)
        return invalidation

    def clear(self, count: Callable[[], int]) -> int:
        """Remove everything; what `count` gave just before. Raises CacheUnavailableError."""
        with self.lock, self.lock_reads():
            counted = count()
            self._revision += 1
            try:
                cleared = self._authority.clear(self._revision)
                if cleared is not Cleared.REFUSED:
                    self._clear_faster_tiers()
                    self._history.clear()
                if cleared is Cleared.DONE:
                    self._feed.tell([Change(self._revision, ChangeKind.CLEAR, "")])
                elif cleared is Cleared.IN_DOUBT:
                    # Reads go to the authority, which knows.
                    self.tell_reset()
            except BaseException:
                # An interrupt: likewise.
                self._clear_faster_tiers()
                self.tell_reset()
                raise
        if cleared is not Cleared.DONE:
            raise CacheUnavailableError(_UNAVAILABLE)
        return counted

    def subscribe(self, listener: Listener) -> int:
        """Tell `listener` every change from now on; the revision of the last change before."""
        with self.lock:
            self._feed.add(listener)
            return self._revision

    def unsubscribe(self, listener: Listener) -> None:
        """Tell `listener` no more."""
        with self.lock:
            self._feed.remove(listener)

    @property
    def busy(self) -> bool:
        """Whether a change now would wait for another one."""
        return self.lock.locked() or (self._authority.works and self._authority.tier.busy)

    # -- for whoever keeps the tiers in order

    def lock_keys(self, keys: Iterable[str]) -> Holding:
        """Keep out reads of `keys` below L1; for whoever holds `lock`."""
        return self._locks.hold_many(keys)

    def lock_reads(self) -> Holding:
        """Keep out every read below L1; for whoever holds `lock`."""
        return self._locks.hold_all()

    def wait_for_reads(self) -> None:
        """Wait for the reads below L1 that have begun; those that come do not wait. `lock` is held."""
        self._locks.wait_for_holders()

    def continue_after(self, revision: int) -> None:
        """Number changes greater than `revision` from now on."""
        self._revision = max(self._revision, revision)

    def tell_reset(self) -> None:
        """Tell whoever listens that what is held may differ from what they were told. `lock` is held."""
        self._revision += 1
        self._feed.tell([Change(self._revision, ChangeKind.RESET, "")])

    def drop_evicted(self, evicted: Iterable[str], locked: Iterable[str] = ()) -> None:
        """What the authority has evicted to make room leaves the faster tiers too. `lock` is held.

        So are the locks of the keys `locked`; those of the others are taken here.
        """
        keys = list(evicted)
        if not keys:
            return
        self._statistics.record_evictions(EvictionCause.CAPACITY, {self._authority.name: len(keys)})
        with self._locks.hold_many(set(keys).difference(locked)):
            lost = self._drop_from_faster_tiers(keys)
            self._statistics.record_evictions(EvictionCause.CAPACITY, lost)
            self._tell_evictions(keys)

    def flush_uses(self) -> None:
        """Bring what is only in memory of how entries were used to the disk tiers."""
        with self._flush_lock:
            # As many as there are now: what comes in meanwhile is for the next flush.
            for _ in range(0, len(self._uses), _FLUSH_BATCH):
                written = False
                batch = self._uses.begin_flush(_FLUSH_BATCH)
                try:
                    written = self._authority.note_uses(batch)
                    if self._cache.works:
                        written = self._cache.guard.write(self._cache.tier.note_uses, batch) and written
                finally:
                    self._uses.end_flush(written=written)
                if not written:
                    return

    # -- groups

    def _submit(self, requests: Sequence[Request]) -> Any:  # noqa: ANN401 -- what each kind of request is answered
        try:
            results = self._groups.submit(requests)
        except TierError as error:
            raise CacheUnavailableError("the change was interrupted; try again") from error
        if isinstance(results, Exception):
            raise results
        return results

    def _make_each(self, group: Sequence[Sequence[Request]]) -> list[list[Any] | Exception]:
        if len(group) == 1:
            return [self._make(group[0])]
        try:
            results = iter(self._make([request for batch in group for request in batch]))
        except CacheError:
            raise
        except Exception:  # noqa: BLE001 -- raised again for the one whose it is
            # What is wrong with one of them must not be the others' fault. A put may be made twice.
            return [self._make_alone(batch) for batch in group]
        return [[next(results) for _ in batch] for batch in group]

    def _make_alone(self, batch: Sequence[Request]) -> list[Any] | Exception:
        try:
            return self._make(batch)
        except Exception as error:  # noqa: BLE001 -- raised again in the thread of its caller
            return error

    def _make(self, requests: Sequence[Request]) -> list[Any]:
        keys = list(dict.fromkeys([request.key for request in requests]))
        if self._uses.has_uses and any(type(one) is Put for one in requests) and self._is_full_for(len(keys)):
            # Something may have to make room: let the tiers know first what was used last.
            self.flush_uses()
        with self._locks.hold_many(keys):
            self._check_open()
            plan = Plan(
                requests,
                self._revision,
                self._clock(),
                self._rules,
                self._history,
                self._l1.get,
                self._as_used,
            )
            try:
                committed = self._authority.commit(keys, plan.decide, self._reads.current)
                self._revision = plan.last_revision
                return self._spread(requests, plan, committed)
            except BaseException:
                # An interrupt: the faster tiers may hold what the authority has replaced.
                self._revision = max(self._revision, plan.last_revision)
                self._forget(keys)
                self.tell_reset()
                raise

    def _is_full_for(self, entries: int) -> bool:
        tiers = [guard.tier for guard in self._reads.guards if guard.is_open]
        return any(not tier.has_room_for(entries) for tier in tiers)

    def _as_used(self, entry: CacheEntry) -> CacheEntry:
        """An entry of the authority with the uses that it has not been told of."""
        return combine(entry, self._l1.get(entry.key) or self._uses.peek(entry.key))

    def _clear_faster_tiers(self) -> None:
        if not self._cache.clear():
            self._authority.disown_cache()
        self._l1.clear()
        self._uses.clear()

    def _forget(self, keys: Iterable[str]) -> None:
        self._cache.doubt(keys)
        for key in keys:
            self._l1.delete(key)

    # -- what follows from a commit

    def _spread(self, requests: Sequence[Request], plan: Plan, committed: Committed) -> list[Any]:
        """Bring what was committed to the faster tiers, count it, tell it, and answer the requests."""
        writes, refused = committed.writes, committed.refused
        if refused:
            writes = [write for write in writes if write.key not in refused]
            if committed.in_doubt:
                # Whether it happened is not known: reads go to the authority, which knows.
                self._forget(refused)
                self.tell_reset()
        if plan.failures:
            known = plan.failures.items()
            self._history.update({key: one for key, one in known if key not in refused})
        self._uses.discard([write.key for write in writes])
        in_cache, in_l2 = self._apply_to_cache(writes, lasts=committed.lasts)
        # The tiers that took the entries, with what each has pushed out to make room.
        took: dict[CacheTierType, list[str]] = {}
        if committed.applied:
            took[self._authority.name] = evicted_by(writes, committed.applied)
        if in_cache:
            took[self._cache.name] = evicted = evicted_by(writes, in_l2)
            self.count_demotions(self._cache.name, evicted)
        held = self._apply_to_memory(writes, plan.updates, took)
        if plan.causes or plan.found:
            self._count(plan, writes, committed.applied, in_l2, held)
        if self._feed.has_listeners:
            self._feed.tell([event for event in plan.events if event.key not in refused])
        if committed.applied and took[self._authority.name]:
            self.drop_evicted(took[self._authority.name], plan.writes)
        elif not self._authority.enabled:
            # Memory decides.
            self._tell_evictions(took.get(CacheTierType.L1, ()))
        return self._answer(requests, plan, committed, took)

    def _apply_to_cache(
        self, writes: Sequence[Write], *, lasts: bool = True
    ) -> tuple[bool, Sequence[Applied]]:
        cache = self._cache
        in_cache, applied = False, list[Applied]()
        if not writes:
            return in_cache, applied
        # If it is skipped, it is emptied before it is used again.
        if cache.works and lasts:
            in_cache, applied = cache.apply(writes)
        elif cache.works:
            cache.doubt(write.key for write in writes)
        if not in_cache:
            self._authority.disown_cache()
        return in_cache, applied

    def _apply_to_memory(
        self, writes: Sequence[Write], updates: set[str], took: dict[CacheTierType, list[str]]
    ) -> set[str]:
        """Bring changes to L1, and add it to `took`; the removed keys that it held."""
        l1 = self._l1
        held: set[str] = set()
        stored: list[CacheEntry] = []
        for key, entry, _ in writes:
            if entry is None:
                if l1.delete(key):
                    held.add(key)
            elif key not in updates:
                stored.append(entry)
            elif l1.update(key, entry) is None and not took:
                # Memory is all that is left to keep it.
                stored.append(entry)
        if l1.enabled:
            evicted = self.store_in_l1(stored) if stored else []
            took[CacheTierType.L1] = [key for key in evicted if key not in l1]
        return held

    def store_in_l1(self, entries: Sequence[CacheEntry]) -> list[str]:
        """Store entries in memory, count what that pushes out, and return its keys."""
        started = time.perf_counter_ns()
        evicted = self._l1.store_many(entries)
        self._l1_latency.record(time.perf_counter_ns() - started)
        if evicted:
            kept = sum(map(self._authority.keeps, evicted))
            self._statistics.record_evictions(
                EvictionCause.CAPACITY, {CacheTierType.L1: len(evicted)}, demotions=kept
            )
        return evicted

    def count_demotions(self, tier: CacheTierType, evicted: Sequence[str]) -> None:
        """Count what a faster tier has evicted to make room, which stays in a slower one."""
        if evicted:
            self._statistics.record_evictions(
                EvictionCause.CAPACITY, {tier: len(evicted)}, demotions=len(evicted)
            )

    def _count(
        self,
        plan: Plan,
        writes: Sequence[Write],
        applied: Sequence[Applied],
        in_l2: Sequence[Applied],
        in_l1: set[str],
    ) -> None:
        losses: dict[EvictionCause, dict[CacheTierType, int]] = {}
        for place, write in enumerate(writes):
            cause = plan.causes.get(write.key)
            if write.entry is None and cause is not None:
                lost = losses.setdefault(cause, {})
                for name, was_held in (
                    (CacheTierType.L1, write.key in in_l1),
                    (self._cache.name, bool(in_l2) and in_l2[place].existed),
                    (self._authority.name, bool(applied) and applied[place].existed),
                ):
                    if was_held:
                        lost[name] = lost.get(name, 0) + 1
        for cause, lost in losses.items():
            self._statistics.record_evictions(cause, lost)

    def _answer(
        self,
        requests: Sequence[Request],
        plan: Plan,
        committed: Committed,
        took: dict[CacheTierType, list[str]],
    ) -> list[Any]:
        refused = committed.refused
        # What no tier has may stand in the journal of what the authority has missed.
        at_least = (self._authority.name,) if self._authority.enabled and committed.lasts else ()
        # Also of an entry that has had to make room by now, for others of its group.
        stored_in = tuple(sorted(took)) or at_least
        answers: list[Any] = []
        removals = 0
        now_us = self._clock()
        for place, request in enumerate(requests):
            key = request.key
            if type(request) is Put:
                if plan.outcomes and (kept := plan.outcomes.get(place)) is not None:
                    if isinstance(kept, CacheEntry):
                        answers.append(Stored(self._holding(key), kept, kept=True))
                    else:
                        answers.append(kept)
                    continue
                entry = plan.writes[key].entry or request.entry
                tiers = () if key in refused else stored_in
                banned_until_us = self._history.banned_until_us(key, now_us) if self._history.known else 0
                # For every put, and a third of what the generated constructor costs.
                answers.append(tuple.__new__(Stored, (tiers, entry, False, banned_until_us)))
            elif key in refused:
                answers.append(CacheUnavailableError(_UNAVAILABLE))
            elif type(request) in (ReportFailure, ReportSuccess):
                outcome = plan.outcomes[place]
                if isinstance(outcome, Invalidation) and outcome.evicted:
                    logger.info(
                        "entry evicted by health",
                        extra={"key": key, "failure_count": outcome.failure_count},
                    )
                answers.append(outcome)
            else:
                removals += plan.found[place] and type(request) is Delete
                answers.append(plan.found[place])
        if removals:
            self._statistics.record_removals(removals)
        return answers

    def _holding(self, key: str) -> StoredIn:
        """The tiers that hold a key now, as far as they can tell."""
        tiers = (self._l1, *(guard.tier for guard in self._reads.guards if guard.is_open))
        return tuple(tier.tier_type for tier in tiers if key in tier)

    def _drop_from_faster_tiers(self, keys: Sequence[str]) -> dict[CacheTierType, int]:
        lost: dict[CacheTierType, int] = {}
        self._uses.discard(keys)
        if in_l1 := sum(map(self._l1.delete, keys)):
            lost[CacheTierType.L1] = in_l1
        _, applied = self._apply_to_cache([Write(key, None) for key in keys])
        if in_l2 := sum(one.existed for one in applied):
            lost[self._cache.name] = in_l2
        return lost

    def _tell_evictions(self, keys: Iterable[str]) -> None:
        events = []
        for key in keys:
            self._revision += 1
            event = Change(self._revision, ChangeKind.EVICTION, key, cause=EvictionCause.CAPACITY)
            events.append(event)
        self._feed.tell(events)


def batches(keys: Iterable[str]) -> Iterator[list[str]]:
    """Keys in batches so small that nobody waits long for one."""
    remaining = iter(list(keys))
    while batch := list(islice(remaining, _BATCH)):
        yield batch


def _unless_refused(answer: Any) -> Any:  # noqa: ANN401 -- what its kind of request is answered
    if isinstance(answer, CacheUnavailableError):
        raise answer
    return answer
