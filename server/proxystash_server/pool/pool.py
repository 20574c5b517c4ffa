"""The pool: lends the cached proxies for a time, and learns from what became of each use."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Final, Self

from proxystash_server.cache import (
    CacheClosedError,
    CacheEntry,
    CacheUnavailableError,
    Change,
    ChangeKind,
    EntryFilter,
)
from proxystash_server.cache.counting.latency import LatencyWindow
from proxystash_server.cache.periodic import PeriodicWork
from proxystash_server.cache.tiers.jsonl.records import Record
from proxystash_server.pool import evidence
from proxystash_server.pool.clocks import Clocks, system_clocks
from proxystash_server.pool.engine import Engine, Randomness
from proxystash_server.pool.evidence import RestoredEvidence
from proxystash_server.pool.health import (
    NO_TARGET,
    Outcome,
    Result,
    Standing,
)
from proxystash_server.pool.index import ABSENT
from proxystash_server.pool.journal import Journal, journal_format
from proxystash_server.pool.lending import LEASES_FILE, LEASES_FORMAT, FollowUp, Lending
from proxystash_server.pool.records import session_record
from proxystash_server.pool.requests import (
    AcquireRequest,
    Answer,
    Granted,
    HealthEffect,
    Lease,
    LeaseNotFoundError,
    PoolError,
    PoolStatistics,
    ProxyHealth,
    Release,
    Released,
    Report,
    Shortage,
    StandingSnapshot,
    TargetSummary,
)
from proxystash_server.pool.waiting import Deliver, Ticket

logger = logging.getLogger(__name__)

EVIDENCE_FILE: Final = "evidence.jsonl"
EVIDENCE_FORMAT: Final = "proxystash-evidence"
# How often an entry that has gone meanwhile is made up for by another: a whole list may have expired at once.
# Each is met once, so this only bounds how long one call may take.
_MOST_DRAWS: Final = 10_000
_PAGE: Final = 500
_MAINTENANCE_SECONDS: Final = 1.0
# How long after entries could not be loaded that is tried again.
_RELOAD_SECONDS: Final = 1.0
# Failures and successes that the cache could not be told of, for later.
_MOST_OWED: Final = 10_000


def check_journals(directory: Path) -> None:
    """Raise StoreError for a journal that must not be opened; changes nothing."""
    for name, format_name in ((LEASES_FILE, LEASES_FORMAT), (EVIDENCE_FILE, EVIDENCE_FORMAT)):
        journal_format(format_name).check(directory / name)


class Pool(Lending):
    """Leases, sessions, health and waiting calls over the entries of a cache. Thread-safe.

    One lock guards all that is in memory; it is held for memory operations alone, and is a leaf: the cache
    tells of changes while its own locks are held, and neither the cache nor a journal is called with this one
    held. A lease is reserved under the lock, then its entry is looked up and the journal waited for, and then
    it is answered; what fails in between is cancelled.

    `directory` is where its two journals are. With `background` off, `load`, `run_due` and `maintain` are the
    caller's. `check_store` raises OSError where that directory may not be made or written to. Raises
    StoreError if a journal cannot be used.
    """

    def __init__(
        self,
        engine: Engine,
        directory: Path,
        *,
        max_leases: int = 1,
        labels: frozenset[str] | None = None,
        sync: bool = False,
        check_store: Callable[[], None] = lambda: None,
        clocks: Clocks | None = None,
        random: Randomness | None = None,
        background: bool = True,
    ) -> None:
        clocks = clocks or system_clocks()
        super().__init__(
            directory,
            clocks,
            random or Random(),
            max_leases=max_leases,
            labels=labels,
            sync=sync,
            check_store=check_store,
        )
        self._engine = engine
        self._wall = clocks.wall
        # By key how many failures the cache is just being told of by this pool.
        self._own_failures: Counter[str] = Counter()
        self._owed: dict[str, bool] = {}
        self._latency = LatencyWindow()
        # Grows with each put that is told.
        self._puts = 0
        self._reload = True
        self._warned_of_cohorts = False
        self._evidence = Journal(
            directory / EVIDENCE_FILE,
            EVIDENCE_FORMAT,
            clocks,
            self._evidence_records,
            check_store,
            sync=sync,
        )
        self._restored: RestoredEvidence | None = RestoredEvidence(*self._evidence.load(), self._steady())
        self._restored.restore_targets(self._health)
        self._replay(*self._journal.load())
        self._journal.start()
        self._evidence.start()
        engine.subscribe(self._on_changes)
        self._maintenance = PeriodicWork(
            "proxystash-pool-maintenance", _MAINTENANCE_SECONDS, self, Pool.maintain
        )
        self._threads = [
            threading.Thread(target=self._run, name="pool-waiting", daemon=True),
            threading.Thread(target=self._keep_loaded, name="pool-loading", daemon=True),
        ]
        if background:
            self._maintenance.start()
            for thread in self._threads:
                thread.start()

    # -- lending

    def acquire(self, request: AcquireRequest, deliver: Deliver | None = None) -> Answer | Ticket:
        """Lend what fits, at once, or have the call wait.

        With `deliver`, and if the request says so, it waits where there is nothing: a ticket is returned, and
        `deliver` is called once, by another thread, with no lock held. Raises PoolError and
        CacheUnavailableError.
        """
        started = time.perf_counter_ns()
        answer = self._acquire(request, deliver)
        if isinstance(answer, Answer):
            self._latency.record(time.perf_counter_ns() - started)
        return answer

    def _acquire(self, request: AcquireRequest, deliver: Deliver | None) -> Answer | Ticket:
        for _ in range(_MOST_DRAWS):
            with self._lock:
                now = self._steady()
                self._advance(now)
                puts = self._puts
                begun = self._begin(request, deliver, now)
            if not isinstance(begun, tuple):
                return begun
            leases, shortage = begun
            if not leases:
                break
            granted = self._confirm(leases, puts)
            if granted:
                return Answer(granted, shortage)
        with self._lock:
            self._counts["shortages"] += 1
            now = self._steady()
            view = self._view(request)
            return Answer([], self._why_none(view), self._retry_after(view, now))

    def cancel(self, ticket: Ticket, deliver: Deliver) -> None:
        """Whoever waits has gone. What it was served with meanwhile is released. Memory operations only."""
        with self._lock:
            if deliver in ticket.delivers:
                ticket.delivers.remove(deliver)
            if not ticket.delivers:
                self._leave_line(ticket)

    def abandon(self, answer: Answer) -> None:
        """An answer reached nobody: end its leases, unless another call answers with them.

        To be called once. Does not wait until that is written down.
        """
        with self._lock:
            for granted in answer.granted:
                self._give_up(granted.lease)

    def renew(self, lease_ids: Sequence[str], duration: float) -> list[float | None]:
        """Move the ends of leases: when each ends now (steady time); None for one that has ended."""
        ends: list[float | None] = []
        with self._lock:
            now = self._steady()
            self._advance(now)
            for lease_id in lease_ids:
                lease = self._leases.get(lease_id)
                if lease is None or lease.expires_at <= now:
                    ends.append(None)
                    continue
                lease.duration = duration
                self._set_end(lease, now + duration)
                ends.append(lease.expires_at)
                session = self._sessions.get((lease.session_id, lease.target)) if lease.session_id else None
                if session is not None:
                    session.used_at = now
                    self._journal.record(session_record(session, self._absolute))
                self._journal.record(
                    {
                        "op": "renew",
                        "id": lease.id,
                        "end": self._absolute(lease.expires_at),
                        "duration": duration,
                    }
                )
        self._journal.commit()
        return ends

    def release(self, releases: Sequence[Release]) -> list[Released]:
        """End leases and take in their results, each once. Of leases that have ended the results count."""
        follow_up = FollowUp()
        released: list[Released] = []
        with self._lock:
            now = self._steady()
            self._advance(now)
            for one in releases:
                lease = self._leases.get(one.lease_id)
                held = lease is not None
                if lease is None:
                    # Its result counts, once.
                    lease = (
                        self._leases.forget_expired(one.lease_id)
                        if one.result is not None
                        else self._leases.expired(one.lease_id)
                    )
                effect = None
                if lease is not None and one.result is not None:
                    effect = self._learn(lease.key, lease, one.result, now, follow_up)
                if lease is not None and one.end_session and lease.session_id:
                    self._end_session(lease.session_id, lease.target)
                if held and lease is not None:
                    self._counts["released"] += 1
                    self._end(lease)
                released.append(Released(held, effect))
        self._journal.commit()
        self._tell_cache(follow_up)
        return released

    # -- learning

    def report(self, reports: Sequence[Report]) -> list[HealthEffect | PoolError]:
        """Take in results; the leases they are of go on. One of a lease that is not known fails alone."""
        follow_up = FollowUp()
        effects: list[HealthEffect | PoolError] = []
        with self._lock:
            now = self._steady()
            self._advance(now)
            for one in reports:
                lease, key = None, one.key
                if one.lease_id:
                    lease = self._leases.get(one.lease_id) or self._leases.expired(one.lease_id)
                    if lease is None:
                        effects.append(LeaseNotFoundError())
                        continue
                    key = lease.key
                effects.append(self._learn(key, lease, one.result, now, follow_up))
        self._tell_cache(follow_up)
        return effects

    def end_session(self, session_id: str, target: str) -> bool:
        """Forget which proxy a session has; whether it had one."""
        with self._lock:
            now = self._steady()
            session = self._sessions.get((session_id, target))
            ended = session is not None and session.until() > now
            if session is not None:
                self._end_session(session_id, target)
        self._journal.commit()
        return ended

    # -- telling

    def to_wall_us(self, steady: float) -> int:
        """A steady time as microseconds since the epoch, by the wall clock as it is now."""
        return self._wall() + round((steady - self._steady()) * 1_000_000)

    def from_wall_us(self, wall_us: int) -> float:
        """The steady time of a moment, by the wall clock as it is now."""
        return self._steady() - (self._wall() - wall_us) / 1_000_000

    def now(self) -> float:
        """The steady time."""
        return self._steady()

    def health_of(self, key: str) -> ProxyHealth | None:
        """What is known of a proxy; None if it is not in the cache."""
        with self._lock:
            now = self._steady()
            self._advance(now)
            slot = self._index.slot_of(key)
            if slot is None:
                return None
            nothing = Standing()
            overall = self._standing_snapshot(slot, NO_TARGET, self._health.proxy(slot) or nothing, now)
            targets = [
                self._standing_snapshot(slot, number, standing, now)
                for number, standing in self._health.pairs_of(slot)
            ]
            last = self._last_leased[slot]
            return ProxyHealth(
                overall,
                sorted(targets, key=lambda one: one.target),
                self._live[slot],
                self._limit(slot),
                last or None,
            )

    def targets(self, after: str, limit: int) -> tuple[list[TargetSummary], bool]:
        """Up to `limit` targets by name from the first greater than `after`, and whether there are more."""
        with self._lock:
            now = self._steady()
            self._advance(now)
            names = sorted(target.name for target in self._health.targets() if target.name > after)
            found: list[TargetSummary] = []
            for name in names[:limit]:
                number = self._health.find_target(name)
                target = None if number is None else self._health.target(number)
                if number is None or target is None:
                    continue
                successes, failures = target.counts(now)
                found.append(
                    TargetSummary(
                        name,
                        successes,
                        failures,
                        self._index.blocked(number),
                        target.leases,
                        target.last_result or None,
                    )
                )
            return found, len(names) > limit

    def leases(
        self,
        after: int,
        limit: int,
        *,
        key: str = "",
        holder: str = "",
        target: str = "",
        session_id: str = "",
    ) -> tuple[list[Lease], int | None]:
        """Up to `limit` leases held, oldest first, and the number to go on after. They change afterwards."""

        def wanted(lease: Lease) -> bool:
            return (
                (not key or lease.key == key)
                and (not holder or lease.holder == holder)
                and (not target or lease.target == target)
                and (not session_id or lease.session_id == session_id)
            )

        with self._lock:
            self._advance(self._steady())
            return self._leases.page(after, limit, wanted, key, holder)

    def statistics(self) -> PoolStatistics:
        """What the pool holds and has done; consistent in itself."""
        latency = self._latency.summary()
        with self._lock:
            ready, leased_out, resting = self._index.sizes()
            counts = self._counts
            return PoolStatistics(
                leases=len(self._leases),
                sessions=len(self._sessions),
                waiting=len(self._line),
                ready=ready,
                leased_out=leased_out,
                resting=resting,
                granted=counts["granted"],
                released=counts["released"],
                expired=counts["expired"],
                shortages=counts["shortages"],
                results=counts["results"],
                successes=counts["successes"],
                acquire_latency=latency,
                loading=self._told is not None,
                journal_degraded=self._journal.is_degraded or self._evidence.is_degraded,
            )

    # -- background work

    def load(self) -> None:
        """Bring the index up to what the cache holds, if it is not.

        Raises CacheUnavailableError while not all of it can be read: what can be is lent, and nothing is
        taken for gone.
        """
        while True:
            with self._lock:
                if not self._reload:
                    return
                self._reload = False
                self._told = set()
            try:
                if self._load_all():
                    return
            except BaseException:
                with self._lock:
                    self._reload = True
                raise

    def run_due(self) -> None:
        """Do what is due, and answer the calls that were served."""
        more = True
        while more:
            with self._lock:
                more = self._advance(self._steady())
                ticket = self._served.popleft() if self._served else None
            if ticket is not None:
                self._answer(ticket)
                more = True

    def maintain(self) -> None:
        """Write down what was learned, and the journals anew where that is worth it; tell what is owed."""
        with self._lock:
            key_of, timeline = self._index.key_of, self._evidence.timeline
            for record in evidence.changed_records(self._health, key_of, timeline):
                self._evidence.record(record)
            owed, self._owed = self._owed, {}
        for journal in (self._journal, self._evidence):
            journal.commit()
            journal.maintain()
        follow_up = FollowUp()
        for key, failed in owed.items():
            follow_up.add(HealthEffect(), key, failed=failed)
        self._tell_cache(follow_up)

    def close(self) -> None:
        """End the background work, answer whoever waits with CacheClosedError, and write everything down."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            for ticket in self._line.all():
                self._leave_line(ticket)
                ticket.outcome = CacheClosedError("the pool is closed")
                self._served.append(ticket)
            self._changed.notify_all()
        self._engine.unsubscribe(self._on_changes)
        self._maintenance.stop()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self.run_due()
        self.maintain()
        self._journal.close()
        self._evidence.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._closing:
                    return
                if not self._served:
                    self._changed.wait(self._pause())
            try:
                self.run_due()
            except Exception:
                logger.exception("answering calls that wait failed")

    def _pause(self) -> float:
        """For how long there is nothing to do, unless somebody says so."""
        next_at = self._timers.next_at
        if next_at is None:
            return _MAINTENANCE_SECONDS
        return min(_MAINTENANCE_SECONDS, max(0.0, next_at - self._steady()))

    def _keep_loaded(self) -> None:
        while not self._closing:
            try:
                self.load()
            except CacheClosedError:
                return
            except CacheUnavailableError as error:
                logger.warning("the entries cannot be loaded yet", extra={"error": str(error)})
                self._wait_to_reload()
                continue
            except Exception:
                logger.exception("loading the entries failed, and is tried again")
                self._wait_to_reload()
                continue
            with self._lock:
                while not self._reload and not self._closing:
                    self._changed.wait()

    def _wait_to_reload(self) -> None:
        with self._lock:
            self._changed.wait_for(lambda: self._closing, _RELOAD_SECONDS)

    # -- answering, without the lock

    def _confirm(self, leases: list[Lease], puts: int) -> list[Granted]:
        """Those of reserved leases whose entries are there, once they are written down; the others end."""
        try:
            entries = self._engine.lookup_many([lease.key for lease in leases]).entries
        except BaseException:
            with self._lock:
                for lease in leases:
                    self._give_up(lease)
            raise
        if None in entries:
            with self._lock:
                for lease, entry in zip(leases, entries, strict=True):
                    if entry is None:
                        if self._puts == puts:
                            self._set_aside(lease.slot, self._steady())
                        self._give_up(lease)
        self._journal.commit()
        granted = []
        with self._lock:
            for lease, entry in zip(leases, entries, strict=True):
                if entry is not None and not lease.ended:
                    granted.append(Granted(lease, entry))
        return granted

    def _answer(self, ticket: Ticket) -> None:
        """Answer a call that has waited, or have it wait again if what it was served with has gone."""
        started = time.perf_counter_ns()
        outcome: Answer | Exception | None = ticket.outcome
        if ticket.leases:
            with self._lock:
                puts = self._puts
            try:
                granted = self._confirm(ticket.leases, puts)
            except Exception as error:  # noqa: BLE001 -- whoever waits is told; the others have their answers
                granted, outcome = [], error
            if granted:
                short = len(granted) < ticket.request.count
                outcome = Answer(granted, Shortage.LEASED_OUT if short else Shortage.NONE)
        if outcome is None:
            self._wait_again(ticket)
            return
        with self._lock:
            delivers, ticket.delivers = ticket.delivers, []
        taken = [deliver(outcome) for deliver in delivers]
        self._latency.record(time.perf_counter_ns() - started)
        if isinstance(outcome, Answer) and not any(taken):
            self.abandon(outcome)

    def _wait_again(self, ticket: Ticket) -> None:
        with self._lock:
            now = self._steady()
            ticket.leases = []
            if self._closing:
                ticket.outcome = CacheClosedError("the pool is closed")
                self._served.append(ticket)
                return
            # What it was made of may have been forgotten meanwhile.
            ticket.view = self._view(ticket.request)
            self._line.put_back(ticket)
            self._enter_line(ticket, now)
            self._serve(ticket, now)

    # -- the cache

    def _tell_cache(self, follow_up: FollowUp) -> None:
        """Have the cache count openings as failures, and start over with a success. Without the lock."""
        for effect, key, failed in follow_up:
            try:
                if failed:
                    with self._lock:
                        self._own_failures[key] += 1
                    try:
                        done = self._engine.invalidate_by_health(key)
                    finally:
                        with self._lock:
                            self._own_failures[key] -= 1
                            if self._own_failures[key] <= 0:
                                del self._own_failures[key]
                else:
                    done = self._engine.report_success(key)
            except CacheUnavailableError:
                with self._lock:
                    if len(self._owed) < _MOST_OWED:
                        self._owed[key] = failed
                logger.warning("the cache could not be told of a result, and will be", extra={"key": key})
                continue
            if done.found and done.health_status is not None:
                effect.evicted = done.evicted
                effect.health_status = done.health_status
                effect.failure_count = done.failure_count

    def _on_changes(self, changes: Sequence[Change]) -> None:
        """What the cache has changed: called while its locks are held, so memory operations only."""
        with self._lock:
            for change in changes:
                if change.entry is not None:
                    self._put(change.entry, is_failure=change.kind is ChangeKind.HEALTH)
                elif change.kind is ChangeKind.CLEAR:
                    for slot in list(self._index.slots()):
                        self._remove(self._index.key_of(slot))
                    for lease in list(self._leases):
                        self._end(lease)
                    if self._told is not None:
                        self._begin_loading()
                elif change.kind is ChangeKind.RESET:
                    self._begin_loading()
                else:
                    self._remove(change.key)

    def _begin_loading(self) -> None:
        self._reload = True
        self._told = set()
        self._changed.notify_all()

    def _put(self, entry: CacheEntry, *, is_failure: bool = False) -> None:
        """An entry was stored."""
        self._puts += 1
        if self._told is not None:
            self._told.add(entry.key)
        self._upsert(entry, is_failure=is_failure)

    def _upsert(self, entry: CacheEntry, *, is_failure: bool = False) -> None:
        key, now = entry.key, self._steady()
        slot = self._index.slot_of(key)
        if slot is None:
            slot = self._add(entry, now)
        else:
            has_moved = self._index.change(slot, self._index.facets_of_entry(entry))
            was_not_found = slot in self._not_found
            self._not_found.discard(slot)
            # Before the slot is offered to anybody.
            if self._take_limit(slot, entry) or was_not_found:
                self._update(slot, now)
            if has_moved:
                self._reconsider(slot, now)
                self._offer(slot, now)
        failures = self._failures.get(slot, 0)
        if entry.failure_count:
            self._failures[slot] = entry.failure_count
        else:
            self._failures.pop(slot, None)
        if is_failure and entry.failure_count > failures and not self._own_failures.get(key):
            # Somebody else reported that it failed.
            result = Result(Outcome.CONNECT_ERROR, now, now)
            self._take(slot, key, NO_TARGET, result, now, HealthEffect(), None)

    def _take_limit(self, slot: int, entry: CacheEntry) -> bool:
        """Keep how many leases of an entry there may be; whether that is another number."""
        before = self._limit(slot)
        if entry.max_leases:
            self._own_limits[slot] = entry.max_leases
        else:
            self._own_limits.pop(slot, None)
        return self._limit(slot) != before

    def _add(self, entry: CacheEntry, now: float) -> int:
        key = entry.key
        slot = self._index.add(key, self._index.facets_of_entry(entry))
        if self._index.overflowed and not self._warned_of_cohorts:
            self._warned_of_cohorts = True
            logger.warning(
                "there are too many combinations of source, health and labels; some entries are not lent "
                "to whoever asks for a source or labels. Name the labels that are asked for in pool_labels"
            )
        if slot == len(self._live):
            self._live.append(0)
            self._last_leased.append(0.0)
        leases = self._leases.of_key(key)
        self._live[slot] = len(leases)
        self._last_leased[slot] = 0.0
        for lease in leases:
            lease.slot = slot
            self._last_leased[slot] = max(self._last_leased[slot], lease.acquired_at)
        self._take_limit(slot, entry)
        if self._restored is not None:
            self._restored.restore(key, slot, self._health)
            self._resume(slot, key, leases, now)
        self._update(slot, now, offers=True)
        return slot

    def _resume(self, slot: int, key: str, leases: Iterable[Lease], now: float) -> None:
        """Have what was restored of a proxy go on: rests and trials."""
        for lease in leases:
            if lease.trial:
                for standing in (self._health.proxy(slot), self._health.pair(slot, lease.target_number)):
                    if standing is not None and standing.rests:
                        standing.trial = lease.id
        proxy = self._health.proxy(slot)
        if proxy is not None and proxy.until > now:
            self._timers.add(proxy.until, self._on_rest_over, slot, key, NO_TARGET)
        for target, pair in list(self._health.pairs_of(slot)):
            if pair.until > now:
                self._timers.add(pair.until, self._on_rest_over, slot, key, target)
            self._update_pair(slot, target, now)

    def _remove(self, key: str) -> None:
        """An entry has gone: so do its leases and what is known of it."""
        if self._told is not None:
            self._told.add(key)
        for lease in self._leases.of_key(key):
            self._leases.remember_expired(lease)
            # Without its slot, or it would be offered once more.
            slot, lease.slot = lease.slot, ABSENT
            self._end(lease)
            if slot != ABSENT:
                self._live[slot] -= 1
        slot_now = self._index.slot_of(key)
        if slot_now is None:
            return
        if self._health.forget(slot_now):
            self._evidence.record(evidence.forget_record(key))
        self._failures.pop(slot_now, None)
        self._own_limits.pop(slot_now, None)
        self._not_found.discard(slot_now)
        self._index.remove(slot_now)
        self._reconsider(slot_now, self._steady())

    def _load_all(self) -> bool:
        """Go through all entries; False if it has to be begun anew."""
        seen = bytearray()
        is_whole = self._engine.lists_all
        after: str | None = ""
        while after is not None:
            page = self._engine.scan_entries(after, _PAGE, EntryFilter())
            with self._lock:
                if self._reload or self._closing:
                    return self._closing
                assert self._told is not None
                for entry in page.entries:
                    if entry.key not in self._told:
                        self._upsert(entry)
                    slot = self._index.slot_of(entry.key)
                    if slot is not None:
                        if slot >= len(seen):
                            seen.extend(bytes(slot + 1 - len(seen) + len(seen) // 8))
                        seen[slot] = 1
            after = page.next_after
        if not (is_whole and self._engine.lists_all):
            raise CacheUnavailableError(
                "a tier that may hold entries is away; they are loaded when it is back"
            )
        with self._lock:
            if self._reload:
                return False
            told = self._told or set()
            for slot in list(self._index.slots()):
                if slot >= len(seen) or not seen[slot]:
                    key = self._index.key_of(slot)
                    if key not in told:
                        self._remove(key)
            for lease in list(self._leases):
                if lease.slot == ABSENT:
                    self._end(lease)
            self._told = None
            self._restored = None
        self._journal.commit()
        return True

    # -- the journals

    def _evidence_records(self) -> list[Record]:
        with self._lock:
            return evidence.all_records(
                self._health, self._index.key_of, self._evidence.timeline, self._restored
            )

    # -- snapshots

    def _standing_snapshot(self, slot: int, target: int, standing: Standing, now: float) -> StandingSnapshot:
        at = self._health.target(target)
        successes, failures = standing.counts(now)
        return StandingSnapshot(
            at.name if at is not None else "",
            self._health.score(slot, target, now),
            successes,
            failures,
            standing.breaker(now),
            standing.until if standing.until > now else None,
            standing.rests,
            standing.latency or None,
            standing.last_outcome,
            standing.last_result if standing.last_outcome else None,
        )
