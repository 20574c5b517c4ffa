"""The pool: lends the cached proxies for a time, and learns from what became of each use."""

from __future__ import annotations

import logging
import threading
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from proxystash_server.cache.periodic import PeriodicWork
from proxystash_server.pool import evidence
from proxystash_server.pool.clocks import Clocks, system_clocks
from proxystash_server.pool.engine import Engine, Randomness
from proxystash_server.pool.evidence import RestoredEvidence
from proxystash_server.pool.health import (
    NO_TARGET,
    Breaker,
    Health,
    Outcome,
    Result,
    Standing,
    reaches_target,
)
from proxystash_server.pool.index import ABSENT, SelectionIndex, State, View
from proxystash_server.pool.journal import Journal, Record
from proxystash_server.pool.leases import MAX_LEASES, MAX_SESSIONS, LeaseTable, Session
from proxystash_server.pool.records import grant_record, read_records, session_record
from proxystash_server.pool.requests import (
    AcquireRequest,
    Answer,
    Granted,
    HealthEffect,
    Lease,
    LeaseNotFoundError,
    PoolError,
    PoolFullError,
    PoolLoadingError,
    PoolStatistics,
    ProxyHealth,
    Release,
    Released,
    Report,
    SelectionPolicy,
    SessionLostError,
    Shortage,
    StandingSnapshot,
    TargetSummary,
    UseResult,
)
from proxystash_server.pool.timers import Timer, Timers
from proxystash_server.pool.waiting import MAX_WAITING, Deliver, Ticket, WaitingLine

logger = logging.getLogger(__name__)

LEASES_FORMAT: Final = "proxystash-leases"
EVIDENCE_FORMAT: Final = "proxystash-evidence"
# How often an entry that has gone meanwhile is made up for by another.
_DRAWS: Final = 3
# Candidates by policy.
_BALANCED_DRAWS: Final = 3
_MANY_DRAWS: Final = 16
_EXACT: Final = 64
# Timers that one call runs, so that nobody waits for all that ends at once.
_TIMERS_AT_ONCE: Final = 1000
# Timers that are looked at to tell when the next proxy comes free.
_TIMERS_LOOKED_AT: Final = 64
_PAGE: Final = 500
_MAINTENANCE_SECONDS: Final = 1.0
# Failures and successes that the cache could not be told of, for later.
_MOST_OWED: Final = 10_000


class Pool:
    """Leases, sessions, health and waiting calls over the entries of a cache. Thread-safe.

    One lock guards all that is in memory; it is held for memory operations alone, and is a leaf: the cache
    tells of changes while its own locks are held, and neither the cache nor a journal is called with this one
    held. A lease is reserved under the lock, then its entry is looked up and the journal waited for, and then
    it is answered; what fails in between is cancelled.

    `directory` is where its two journals are. With `background` off, `load`, `run_due` and `maintain` are the
    caller's. Raises StoreError if a journal cannot be used.
    """

    def __init__(
        self,
        engine: Engine,
        directory: Path,
        *,
        max_leases: int = 1,
        labels: frozenset[str] | None = None,
        sync: bool = False,
        clocks: Clocks | None = None,
        random: Randomness | None = None,
        background: bool = True,
    ) -> None:
        self._engine = engine
        self._max_leases = max_leases
        clocks = clocks or system_clocks()
        self._steady = clocks.steady
        self._wall = clocks.wall
        self._random = random or Random()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._index = SelectionIndex(self._random.random, labels=labels)
        self._health = Health(self._random.random, self._on_dropped)
        self._timers = Timers()
        self._leases = LeaseTable()
        self._sessions: dict[tuple[str, str], Session] = {}
        self._line = WaitingLine(self._index)
        # Tickets that are to be answered.
        self._served: deque[Ticket] = deque()
        # By slot.
        self._live = array("I")
        self._last_leased = array("d")
        # By slot the failures that the cache has counted, where there are any.
        self._failures: dict[int, int] = {}
        # By key how many failures the cache is just being told of by this pool.
        self._own_failures: Counter[str] = Counter()
        self._owed: dict[str, bool] = {}
        # Grows with each put that is told.
        self._puts = 0
        # Keys told of since loading began; None when everything is loaded.
        self._told: set[str] | None = set()
        self._reload = True
        self._counts: Counter[str] = Counter()
        self._closing = False
        self._warned_of_cohorts = False

        self._journal = Journal(
            directory / "leases.jsonl", LEASES_FORMAT, clocks, self._lease_records, sync=sync
        )
        self._evidence = Journal(
            directory / "evidence.jsonl", EVIDENCE_FORMAT, clocks, self._evidence_records, sync=sync
        )
        self._restored: RestoredEvidence | None = RestoredEvidence(*self._evidence.load())
        self._restored.restore_targets(self._health)
        self._sequence = clocks.wall()
        self._replay(*self._journal.load())
        self._journal.start()
        self._evidence.start()
        engine.subscribe(self._on_changes)
        self._maintenance = PeriodicWork("proxystash-pool-maintenance", _MAINTENANCE_SECONDS, self.maintain)
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
        for _ in range(_DRAWS):
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
        """An answer reached nobody: end its leases. Does not wait until that is written down."""
        with self._lock:
            for granted in answer.granted:
                if not granted.lease.ended:
                    self._end(granted.lease)

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
        follow_up = _FollowUp()
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
        follow_up = _FollowUp()
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
                self._max_leases,
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
                is_loading=self._told is not None,
                is_journal_degraded=self._journal.is_degraded or self._evidence.is_degraded,
            )

    # -- background work

    def load(self) -> None:
        """Bring the index up to what the cache holds, if it is not. Raises CacheUnavailableError."""
        while True:
            with self._lock:
                if not self._reload:
                    return
                self._reload = False
                self._told = set()
            if self._load_all():
                return

    def run_due(self) -> None:
        """Do what is due, and answer the calls that were served."""
        more = True
        while more:
            with self._lock:
                more = self._advance(self._steady())
                served, self._served = self._served, deque()
            for ticket in served:
                self._answer(ticket)
            more = more or bool(served)

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
        follow_up = _FollowUp()
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
            except Exception:
                logger.exception("loading the entries failed, and is tried again")
                with self._lock:
                    self._reload = True
                    self._changed.wait(_MAINTENANCE_SECONDS)
                continue
            with self._lock:
                while not self._reload and not self._closing:
                    self._changed.wait()

    # -- acquiring, under the lock

    def _view(self, request: AcquireRequest) -> View:
        return self._index.view(request.wanted, self._health.target_number(request.target))

    def _begin(
        self, request: AcquireRequest, deliver: Deliver | None, now: float
    ) -> tuple[list[Lease], Shortage] | Answer | Ticket:
        """Leases that are reserved; or the answer, or the ticket of a call that waits."""
        if request.request_id:
            held = self._leases.of_request(request.request_id)
            if held:
                for lease in held:
                    lease.claims += 1
                return held, Shortage.NONE
            ticket = self._line.of_request(request.request_id)
            if ticket is not None and deliver is not None:
                ticket.delivers.append(deliver)
                return ticket
        view = self._view(request)
        leases, only = self._reserve(request, view, now)
        if len(leases) == request.count:
            return leases, Shortage.NONE
        shortage = Shortage.LEASED_OUT if only is not None else self._why_none(view)
        if leases:
            return leases, shortage
        if request.wait and deliver is not None:
            return self._wait(request, view, only, deliver, now)
        if self._told is not None:
            raise PoolLoadingError
        self._counts["shortages"] += 1
        return Answer([], shortage, self._retry_after(view, now, only))

    def _reserve(self, request: AcquireRequest, view: View, now: float) -> tuple[list[Lease], int | None]:
        """Up to as many leases as wanted; and the slot that alone will do, if a session has one."""
        if len(self._leases) + request.count > MAX_LEASES:
            raise PoolFullError("leases", MAX_LEASES)
        if request.session is not None:
            return self._reserve_for_session(request, view, now)
        leases: list[Lease] = []
        self._reserve_more(leases, request, view, now)
        return leases, None

    def _reserve_more(
        self, leases: list[Lease], request: AcquireRequest, view: View, now: float, *, moved: bool = False
    ) -> None:
        chosen = {lease.slot for lease in leases}
        while len(leases) < request.count:
            slot = self._choose(request, view, chosen, now)
            if slot is None:
                return
            chosen.add(slot)
            leases.append(self._grant(request, slot, now, moved=moved))

    def _choose(self, request: AcquireRequest, view: View, chosen: set[int], now: float) -> int | None:
        """The slot that the policy takes of those that can be lent."""
        accepts: Callable[[int], bool] | None = None
        if (
            request.exclude_keys
            or request.exclude_held
            or request.max_leases
            or request.reuse_delay
            or chosen
        ):

            def accepts(slot: int) -> bool:
                return slot not in chosen and self._allows(request, view.target, slot, now)

        policy, candidates = request.policy, self._index.candidates
        if policy is SelectionPolicy.BALANCED:
            found = candidates(view, _BALANCED_DRAWS, now, accepts)
            if len(found) > 1:
                health, live, target = self._health, self._live, view.target
                return max(found, key=lambda slot: health.worth(slot, target, live[slot], now))
        elif policy is SelectionPolicy.RANDOM:
            found = candidates(view, 1, now, accepts)
        elif policy is SelectionPolicy.BEST:
            found = candidates(view, _MANY_DRAWS, now, accepts)
            return max(found, key=lambda slot: self._health.score(slot, view.target, now), default=None)
        else:
            found = candidates(view, _MANY_DRAWS, now, accepts, all_of=_EXACT)
            return min(found, key=lambda slot: self._last_leased[slot], default=None)
        return found[0] if found else None

    def _allows(self, request: AcquireRequest, target: int, slot: int, now: float) -> bool:
        """Whether a request, by what it says beside filter and target, can be given a slot."""
        if request.exclude_keys and self._index.key_of(slot) in request.exclude_keys:
            return False
        if request.max_leases and self._live[slot] >= request.max_leases:
            return False
        if request.exclude_held and request.holder and self._live[slot]:
            leases = self._leases.of_key(self._index.key_of(slot))
            if any(lease.holder == request.holder for lease in leases):
                return False
        if request.reuse_delay:
            if target:
                pair = self._health.pair(slot, target)
                used_at = pair.used_at if pair is not None else None
            else:
                used_at = self._last_leased[slot] or None
            if used_at is not None and now - used_at < request.reuse_delay:
                return False
        return True

    def _reserve_for_session(
        self, request: AcquireRequest, view: View, now: float
    ) -> tuple[list[Lease], int | None]:
        wanted = request.session
        assert wanted is not None
        session = self._sessions.get((wanted.id, request.target))
        had_another = session is not None
        if session is not None and session.until() <= now:
            # Too old, it gets another proxy; forgotten, it never had one.
            had_another = session.ends_at is not None and session.ends_at <= now
            self._end_session(wanted.id, request.target)
            session = None
        if session is not None:
            slot = self._index.slot_of(session.key)
            if slot is None and self._told is not None:
                raise PoolLoadingError
            if slot is not None and self._is_kept_by_session(request, view, slot, now):
                if self._index.fits(slot, view) and self._allows(request, view.target, slot, now):
                    self._use_session(request, session.key, now)
                    return [self._grant(request, slot, now)], None
                return [], slot
            if wanted.strict:
                raise SessionLostError
        elif len(self._sessions) >= MAX_SESSIONS:
            raise PoolFullError("sessions", MAX_SESSIONS)
        leases: list[Lease] = []
        self._reserve_more(leases, request, view, now, moved=had_another)
        for lease in leases:
            self._use_session(request, lease.key, now)
        return leases, None

    def _is_kept_by_session(self, request: AcquireRequest, view: View, slot: int, now: float) -> bool:
        """Whether a session stays with its proxy: it matches and does not rest."""
        proxy = self._health.proxy(slot)
        pair = self._health.pair(slot, view.target) if view.target else None
        return (
            self._index.facets_of(slot).match(view.wanted)
            and self._index.key_of(slot) not in request.exclude_keys
            and not any(one is not None and one.breaker(now) is Breaker.OPEN for one in (proxy, pair))
        )

    def _use_session(self, request: AcquireRequest, key: str, now: float) -> None:
        wanted = request.session
        assert wanted is not None
        place = (wanted.id, request.target)
        session = self._sessions.get(place)
        if session is None or session.key != key:
            session = self._sessions[place] = Session(wanted.id, request.target, key)
            session.ends_at = None if wanted.max_age is None else now + wanted.max_age
            session.used_at, session.idle_timeout = now, wanted.idle_timeout
            self._timers.add(session.until(), self._on_session_idle, session)
        session.used_at, session.idle_timeout = now, wanted.idle_timeout
        self._journal.record(session_record(session, self._absolute))

    def _grant(self, request: AcquireRequest, slot: int, now: float, *, moved: bool = False) -> Lease:
        target_number = self._health.target_number(request.target)
        self._sequence += 1
        lease_id = f"{self._sequence:x}{self._random.getrandbits(16):04x}"
        lease = Lease(lease_id, self._sequence, self._index.key_of(slot), slot)
        lease.target, lease.target_number = request.target, target_number
        lease.holder, lease.request_id = request.holder, request.request_id
        lease.session_id = request.session.id if request.session is not None else ""
        lease.moved = moved
        lease.acquired_at, lease.duration = now, request.duration
        lease.score = self._health.score(slot, target_number, now)
        lease.trial = self._health.note_lent(slot, target_number, lease_id, now)
        self._live[slot] += 1
        self._last_leased[slot] = now
        self._counts["granted"] += 1
        target = self._health.target(target_number)
        if target is not None:
            target.leases += 1
        self._leases.add(lease)
        self._set_end(lease, now + request.duration)
        self._journal.record(grant_record(lease, self._absolute))
        self._update(slot, now)
        if lease.trial and target_number:
            self._update_pair(slot, target_number, now)
        return lease

    def _set_end(self, lease: Lease, expires_at: float) -> None:
        if isinstance(lease.timer, Timer):
            self._timers.cancel(lease.timer)
        lease.expires_at = expires_at
        lease.timer = self._timers.add(expires_at, self._on_expired, lease)

    def _end(self, lease: Lease) -> None:
        """End a lease: its proxy may be lent to the next."""
        if isinstance(lease.timer, Timer):
            self._timers.cancel(lease.timer)
        self._leases.end(lease)
        self._journal.record({"op": "end", "id": lease.id})
        target = self._health.target(lease.target_number)
        if target is not None:
            target.leases -= 1
        slot, now = lease.slot, self._steady()
        if slot == ABSENT:
            return
        self._live[slot] -= 1
        self._health.end_trial(slot, lease.target_number, lease.id)
        self._index.free_again()
        self._update(slot, now, offers=True)
        if lease.trial and lease.target_number:
            self._update_pair(slot, lease.target_number, now)

    def _end_session(self, session_id: str, target: str) -> None:
        del self._sessions[session_id, target]
        self._journal.record({"op": "end_session", "id": session_id, "target": target})

    # -- what can be lent, under the lock

    def _advance(self, now: float) -> bool:
        """Do what is due by now; whether there may be more."""
        return self._timers.run_due(now, _TIMERS_AT_ONCE)

    def _update(self, slot: int, now: float, *, offers: bool = False) -> None:
        """Have the index know what keeps a slot from being lent; if nothing does, offer it."""
        standing = self._health.proxy(slot)
        if standing is not None and standing.is_kept_back(now):
            state = State.RESTING
        elif self._live[slot] >= self._max_leases:
            state = State.LEASED_OUT
        else:
            state = State.READY
        before = self._index.state_of(slot)
        self._index.set_state(slot, state)
        if state is State.READY and (offers or before is not State.READY):
            self._offer(slot, now)
        elif state is State.RESTING and before is not State.RESTING:
            self._reconsider(slot, now)

    def _update_pair(self, slot: int, target: int, now: float) -> None:
        """Have the index know whether a slot is kept from a target."""
        pair = self._health.pair(slot, target)
        if pair is not None and pair.is_kept_back(now):
            self._index.block(slot, target)
            self._reconsider(slot, now)
        elif self._index.is_blocked(slot, target):
            self._index.unblock(slot, target)
            self._offer(slot, now)

    def _on_dropped(self, slot: int, target: int) -> None:
        # Nothing is known of it any more, so it is not kept back.
        self._index.unblock(slot, target)

    def _on_expired(self, lease: Lease) -> None:
        self._counts["expired"] += 1
        self._leases.remember_expired(lease)
        self._end(lease)

    def _on_rest_over(self, slot: int, key: str, target: int) -> None:
        if self._index.slot_of(key) != slot:
            return
        now = self._steady()
        standing = self._health.pair(slot, target) if target else self._health.proxy(slot)
        if standing is None:
            return
        if standing.until > now:
            # It was prolonged meanwhile.
            self._timers.add(standing.until, self._on_rest_over, slot, key, target)
        elif target:
            self._update_pair(slot, target, now)
        else:
            self._update(slot, now)

    def _on_session_idle(self, session: Session) -> None:
        if self._sessions.get((session.id, session.target)) is not session:
            return
        if session.ends_at is not None and session.ends_at <= session.used_at + session.idle_timeout:
            # Kept for as long as it would be used, so that the next call can say that it has moved.
            until = session.used_at + session.idle_timeout
        else:
            until = session.until()
        if until > self._steady():
            self._timers.add(until, self._on_session_idle, session)
        else:
            self._end_session(session.id, session.target)

    # -- waiting, under the lock

    def _wait(
        self, request: AcquireRequest, view: View, only: int | None, deliver: Deliver, now: float
    ) -> Ticket:
        if len(self._line) >= MAX_WAITING:
            raise PoolFullError("waiting calls", MAX_WAITING)
        if self._closing:
            raise CacheClosedError("the pool is closed")
        ticket = self._line.new(request, view, only)
        ticket.delivers.append(deliver)
        target = self._health.target(view.target)
        if target is not None:
            target.waiting += 1
        ticket.until = now + request.wait
        ticket.timer = self._timers.add(ticket.until, self._on_time_up, ticket)
        if request.reuse_delay:
            self._timers.add(now + min(request.wait, 1.0), self._on_reuse_delay, ticket)
        self._changed.notify_all()
        return ticket

    def _leave_line(self, ticket: Ticket) -> None:
        if not self._line.take(ticket):
            return
        if ticket.timer is not None:
            self._timers.cancel(ticket.timer)
        target = self._health.target(ticket.view.target)
        if target is not None:
            target.waiting -= 1

    def _offer(self, slot: int, now: float) -> None:
        """Lend a slot to those that have waited for it longest, as long as it can be lent."""
        while len(self._line):
            ticket = self._line.first_for(
                slot, lambda one, at: self._allows(one.request, one.view.target, at, now)
            )
            if ticket is None:
                return
            self._serve(ticket, slot, now)

    def _serve(self, ticket: Ticket, slot: int, now: float) -> None:
        self._leave_line(ticket)
        request = ticket.request
        try:
            if len(self._leases) >= MAX_LEASES:
                raise PoolFullError("leases", MAX_LEASES)
            moved = False
            if request.session is not None:
                session = self._sessions.get((request.session.id, request.target))
                key = self._index.key_of(slot)
                moved = session is not None and session.key != key
                self._use_session(request, key, now)
            ticket.leases = [self._grant(request, slot, now, moved=moved)]
            self._reserve_more(ticket.leases, request, ticket.view, now)
        except PoolError as error:
            ticket.outcome = error
        self._served.append(ticket)
        self._changed.notify_all()

    def _reconsider(self, slot: int, now: float) -> None:
        """Sessions that wait for a slot which cannot serve them now move, or are lost."""
        if not len(self._line):
            return
        for ticket in self._line.of_slot(slot):
            try:
                leases, only = self._reserve(ticket.request, ticket.view, now)
            except PoolError as error:
                leases, only, ticket.outcome = [], None, error
            if leases or ticket.outcome is not None:
                self._leave_line(ticket)
                ticket.leases = leases
                self._served.append(ticket)
                self._changed.notify_all()
            else:
                ticket.only = only

    def _on_time_up(self, ticket: Ticket) -> None:
        self._leave_line(ticket)
        self._counts["shortages"] += 1
        now = self._steady()
        if self._told is not None:
            ticket.outcome = PoolLoadingError()
        elif ticket.only is not None:
            ticket.outcome = Answer([], Shortage.LEASED_OUT, self._retry_after(ticket.view, now, ticket.only))
        else:
            ticket.outcome = Answer([], self._why_none(ticket.view), self._retry_after(ticket.view, now))
        self._served.append(ticket)
        self._changed.notify_all()

    def _on_reuse_delay(self, ticket: Ticket) -> None:
        """A proxy may be old enough for it by now: nobody else says so."""
        if ticket.queue is None:
            return
        now = self._steady()
        slot = self._choose(ticket.request, ticket.view, set(), now)
        if slot is not None:
            self._serve(ticket, slot, now)
        else:
            self._timers.add(now + 1.0, self._on_reuse_delay, ticket)

    def _why_none(self, view: View) -> Shortage:
        """What keeps back the most of those that match."""
        held = self._index.held_back(view)
        if not held.matching:
            return Shortage.NO_MATCH
        excluded = held.matching - held.leased_out - held.resting
        most = max(held.leased_out, held.resting, excluded)
        if most == held.leased_out:
            return Shortage.LEASED_OUT
        return Shortage.RESTING if most == held.resting else Shortage.EXCLUDED

    def _retry_after(self, view: View, now: float, only: int | None = None) -> float | None:
        """When the next is known to come free, as far as the timers that come first tell."""
        for when, function, arguments in self._timers.first(_TIMERS_LOOKED_AT):
            if function == self._on_expired:
                slot = arguments[0].slot
            elif function == self._on_rest_over and arguments[2] in (NO_TARGET, view.target):
                slot = arguments[0]
            else:
                continue
            if slot == ABSENT or (only is not None and slot != only):
                continue
            if self._index.is_used(slot) and self._index.facets_of(slot).match(view.wanted):
                return max(0.0, when - now)
        return None

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
                            # It has expired, and nobody has said so yet.
                            self._remove(lease.key)
                        self._give_up(lease)
        self._journal.commit()
        granted = []
        with self._lock:
            for lease, entry in zip(leases, entries, strict=True):
                if entry is not None:
                    lease.claims -= 1
                    if not lease.ended:
                        lease.answered = True
                        granted.append(Granted(lease, entry))
        return granted

    def _give_up(self, lease: Lease) -> None:
        """One call will not answer with a lease, which ends if no other does."""
        lease.claims -= 1
        if not lease.claims and not lease.answered and not lease.ended:
            self._end(lease)

    def _answer(self, ticket: Ticket) -> None:
        """Answer a call that has waited, or have it wait again if what it was served with has gone."""
        outcome: Answer | Exception | None = ticket.outcome
        if ticket.leases:
            with self._lock:
                puts = self._puts
            try:
                granted = self._confirm(ticket.leases, puts)
            except CacheUnavailableError as error:
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
            self._line.put_back(ticket)
            target = self._health.target(ticket.view.target)
            if target is not None:
                target.waiting += 1
            # It is due already if its time is up, and has been served by then.
            ticket.timer = self._timers.add(ticket.until, self._on_time_up, ticket)
            slot = self._choose(ticket.request, ticket.view, set(), now) if ticket.only is None else None
            if slot is not None:
                self._serve(ticket, slot, now)

    # -- learning, under the lock

    def _learn(
        self, key: str, lease: Lease | None, use: UseResult, now: float, follow_up: _FollowUp
    ) -> HealthEffect:
        slot = self._index.slot_of(key)
        effect = HealthEffect()
        if slot is None:
            return effect
        self._counts["results"] += use.count
        if use.outcome is Outcome.SUCCESS:
            self._counts["successes"] += use.count
        name = use.target if use.target is not None else (lease.target if lease is not None else "")
        target = self._health.target_number(name)
        finished_at = min(use.finished_at, now)
        begun_at = finished_at - (use.latency or 0.0)
        if lease is not None:
            begun_at = lease.acquired_at if use.latency is None else max(lease.acquired_at, begun_at)
        result = Result(use.outcome, begun_at, finished_at, use.latency, use.count, use.retry_after)
        self._take(slot, key, target, result, now, effect, follow_up)
        if lease is not None:
            self._health.end_trial(slot, lease.target_number, lease.id)
            if lease.trial:
                self._update(slot, now)
                if lease.target_number:
                    self._update_pair(slot, lease.target_number, now)
        effect.found = True
        effect.score = self._health.score(slot, target, now)
        effect.health_status = self._index.facets_of(slot).health
        effect.failure_count = self._failures.get(slot, 0)
        proxy = self._health.proxy(slot)
        pair = self._health.pair(slot, target) if target else None
        effect.resting_until = proxy.until if proxy is not None and proxy.until > now else None
        effect.resting_at_target_until = pair.until if pair is not None and pair.until > now else None
        return effect

    def _take(
        self,
        slot: int,
        key: str,
        target: int,
        result: Result,
        now: float,
        effect: HealthEffect,
        follow_up: _FollowUp | None,
    ) -> None:
        """Take a result into what is known, and have the index know what follows from it."""
        opened = self._health.record(slot, target, result, now)
        if opened.proxy:
            proxy = self._health.proxy(slot)
            assert proxy is not None
            self._timers.add(proxy.until, self._on_rest_over, slot, key, NO_TARGET)
        if opened.pair:
            pair = self._health.pair(slot, target)
            assert pair is not None
            self._timers.add(pair.until, self._on_rest_over, slot, key, target)
        self._update(slot, now)
        if target:
            self._update_pair(slot, target, now)
        if follow_up is None:
            return
        if opened.proxy:
            follow_up.add(effect, key, failed=True)
        elif self._failures.get(slot) and reaches_target(result.outcome):
            follow_up.add(effect, key, failed=False)

    # -- the cache

    def _tell_cache(self, follow_up: _FollowUp) -> None:
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
        elif self._index.change(slot, self._index.facets_of_entry(entry)):
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
        self._index.remove(slot_now)
        self._reconsider(slot_now, self._steady())

    def _load_all(self) -> bool:
        """Go through all entries; False if it has to be begun anew."""
        seen = bytearray()
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

    def _absolute(self, steady: float) -> int:
        return self._journal.timeline.absolute(steady)

    def _lease_records(self) -> list[Record]:
        with self._lock:
            self._journal.discard_recorded()
            return [
                *(grant_record(lease, self._absolute) for lease in self._leases),
                *(session_record(session, self._absolute) for session in self._sessions.values()),
            ]

    def _evidence_records(self) -> list[Record]:
        with self._lock:
            self._evidence.discard_recorded()
            self._health.changed = set()
            self._health.changed_targets = set()
            return evidence.all_records(
                self._health, self._index.key_of, self._evidence.timeline, self._restored
            )

    def _replay(self, records: Sequence[Record], from_disk: Callable[[int], float]) -> None:
        """Have the leases and sessions again that an earlier process held."""
        now = self._steady()
        leases, sessions = read_records(records, from_disk, now)
        for lease in leases:
            self._sequence = max(self._sequence, lease.sequence)
            lease.target_number = self._health.target_number(lease.target)
            target = self._health.target(lease.target_number)
            if target is not None:
                target.leases += 1
            self._leases.add(lease)
            self._set_end(lease, lease.expires_at)
        for session in sessions:
            self._sessions[session.id, session.target] = session
            self._timers.add(session.until(), self._on_session_idle, session)

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


class _FollowUp:
    """What the cache is to be told of after the lock is let go: openings as failures, and successes."""

    def __init__(self) -> None:
        self._items: list[tuple[HealthEffect, str, bool]] = []

    def __iter__(self) -> Iterator[tuple[HealthEffect, str, bool]]:
        return iter(self._items)

    def add(self, effect: HealthEffect, key: str, *, failed: bool) -> None:
        self._items.append((effect, key, failed))
