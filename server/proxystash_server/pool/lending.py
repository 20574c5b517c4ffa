"""What the pool does under its lock: lends, has calls wait, and learns."""

from __future__ import annotations

import math
import threading
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from proxystash_server.cache import (
    CacheClosedError,
)
from proxystash_server.cache.tiers.jsonl.records import Record
from proxystash_server.pool.clocks import Clocks
from proxystash_server.pool.engine import Randomness
from proxystash_server.pool.health import (
    NO_TARGET,
    Breaker,
    Health,
    Outcome,
    Result,
    reaches_target,
)
from proxystash_server.pool.index import ABSENT, SelectionIndex, State, View
from proxystash_server.pool.journal import Journal
from proxystash_server.pool.leases import MAX_LEASES, MAX_SESSIONS, LeaseTable, Session
from proxystash_server.pool.records import grant_record, read_records, session_record
from proxystash_server.pool.requests import (
    AcquireRequest,
    Answer,
    HealthEffect,
    Lease,
    PoolError,
    PoolFullError,
    PoolLoadingError,
    SelectionPolicy,
    SessionLostError,
    Shortage,
    UseResult,
)
from proxystash_server.pool.timers import Timer, Timers
from proxystash_server.pool.waiting import MAX_WAITING, Deliver, Ticket, WaitingLine

LEASES_FILE: Final = "leases.jsonl"
LEASES_FORMAT: Final = "proxystash-leases"
# Candidates by policy.
_BALANCED_DRAWS: Final = 3
_MANY_DRAWS: Final = 16
_EXACT: Final = 64
# Timers that one call runs, so that nobody waits for all that ends at once.
_TIMERS_AT_ONCE: Final = 1000
# How often who waits for a reuse delay looks whether it is over.
_REUSE_SECONDS: Final = 1.0
# Timers that are looked at to tell when the next proxy comes free.
_TIMERS_LOOKED_AT: Final = 64
# How long, in seconds, an entry that was not found is not looked for again.
NOT_FOUND_PAUSE: Final = 5.0


class Lending:
    """What the pool holds in memory, and every step that is taken with its lock held.

    Leases, sessions, standings, the index and the waiting calls, with the journal of the first two. Not
    thread-safe by itself: `Pool` takes the lock. Raises StoreError if the journal cannot be used.
    """

    def __init__(
        self,
        directory: Path,
        clocks: Clocks,
        random: Randomness,
        *,
        max_leases: int,
        labels: frozenset[str] | None,
        sync: bool,
        check_store: Callable[[], None],
    ) -> None:
        self._max_leases = max_leases
        self._steady = clocks.steady
        self._random = random
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._index = SelectionIndex(random.random, labels=labels)
        self._health = Health(random.random, self._on_dropped)
        self._timers = Timers()
        self._leases = LeaseTable()
        self._sessions: dict[tuple[str, str], Session] = {}
        self._line = WaitingLine(self._index)
        # Tickets that are to be answered.
        self._served: deque[Ticket] = deque()
        # By slot.
        self._live = array("I")
        self._last_leased = array("d")
        # By slot how many leases there may be, where the entry says so.
        self._own_limits: dict[int, int] = {}
        # Slots whose entries were not found when they were last lent, so that they are not lent for a while.
        self._not_found: set[int] = set()
        # By slot the failures that the cache has counted, where there are any.
        self._failures: dict[int, int] = {}
        # Keys told of since loading began; None when everything is loaded.
        self._told: set[str] | None = set()
        self._counts: Counter[str] = Counter()
        self._closing = False
        self._journal = Journal(
            directory / LEASES_FILE, LEASES_FORMAT, clocks, self._lease_records, check_store, sync=sync
        )
        self._sequence = clocks.wall()

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
            if ticket is not None and request.wait and deliver is not None:
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

    def _reserve(
        self, request: AcquireRequest, view: View, now: float, offered: int | None = None
    ) -> tuple[list[Lease], int | None]:
        """Up to as many leases as wanted; and the slot that alone will do, if a session has one.

        A slot that is `offered` can be lent to the request, and is the first that is.
        """
        if len(self._leases) + request.count > MAX_LEASES:
            raise PoolFullError("leases", MAX_LEASES)
        if request.session is not None:
            return self._reserve_for_session(request, view, now, offered)
        return self._reserve_chosen(request, view, now, offered), None

    def _reserve_chosen(
        self, request: AcquireRequest, view: View, now: float, offered: int | None, *, moved: bool = False
    ) -> list[Lease]:
        leases: list[Lease] = []
        chosen: set[int] = set()
        while len(leases) < request.count:
            slot = self._choose(request, view, chosen, now) if offered is None else offered
            if slot is None:
                break
            offered = None
            chosen.add(slot)
            leases.append(self._grant(request, slot, now, moved=moved))
        return leases

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
        self, request: AcquireRequest, view: View, now: float, offered: int | None
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
        leases = self._reserve_chosen(request, view, now, offered, moved=had_another)
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
        self._update(slot, now, offers=True)
        if lease.trial and lease.target_number:
            self._update_pair(slot, lease.target_number, now)

    def _end_session(self, session_id: str, target: str) -> None:
        if self._sessions.pop((session_id, target), None) is not None:
            self._journal.record({"op": "end_session", "id": session_id, "target": target})

    def _give_up(self, lease: Lease) -> None:
        """One call will not answer with a lease, which ends if no other does."""
        lease.claims -= 1
        if not lease.claims and not lease.ended:
            self._end(lease)

    # -- what can be lent, under the lock

    def _advance(self, now: float) -> bool:
        """Do what is due by now; whether there may be more."""
        return self._timers.run_due(now, _TIMERS_AT_ONCE)

    def _limit(self, slot: int) -> int:
        """How many leases of a slot there may be at once."""
        return self._own_limits.get(slot, self._max_leases)

    def _update(self, slot: int, now: float, *, offers: bool = False) -> None:
        """Have the index know what keeps a slot from being lent; if nothing does, offer it."""
        standing = self._health.proxy(slot)
        if slot in self._not_found or (standing is not None and standing.is_kept_back(now)):
            state = State.RESTING
        elif self._live[slot] >= self._limit(slot):
            state = State.LEASED_OUT
        else:
            state = State.READY
        before = self._index.state_of(slot)
        self._index.set_state(slot, state)
        if state is State.READY and (offers or before is not State.READY):
            self._offer(slot, now)
        elif state is State.RESTING and before is not State.RESTING:
            self._reconsider(slot, now)

    def _set_aside(self, slot: int, now: float) -> None:
        """The entry of a slot was not found: keep it back for a while.

        It has expired, and nobody has said so yet, or the tier that has it is away. Only the change feed says
        that it is gone.
        """
        if slot != ABSENT and slot not in self._not_found:
            self._not_found.add(slot)
            self._timers.add(now + NOT_FOUND_PAUSE, self._look_again, slot, self._index.key_of(slot))
            self._update(slot, now)

    def _look_again(self, slot: int, key: str) -> None:
        if slot in self._not_found and self._index.slot_of(key) == slot:
            self._not_found.discard(slot)
            self._update(slot, self._steady())

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
        ticket.until = now + request.wait
        self._enter_line(ticket, now)
        self._changed.notify_all()
        return ticket

    def _enter_line(self, ticket: Ticket, now: float) -> None:
        """Have a ticket that is in line be served in time."""
        target = self._health.target(ticket.view.target)
        if target is not None:
            target.waiting += 1
        # It may be due already; then it has been served with what there is.
        ticket.timer = self._timers.add(ticket.until, self._on_time_up, ticket)
        if ticket.request.reuse_delay:
            self._timers.add(now + _REUSE_SECONDS, self._on_reuse_delay, ticket)

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
            self._serve(ticket, now, slot)

    def _serve(self, ticket: Ticket, now: float, offered: int | None = None) -> None:
        """Serve a ticket in line with a slot that is offered to it, or with whatever there is by now."""
        try:
            leases, ticket.only = self._reserve(ticket.request, ticket.view, now, offered)
        except PoolError as error:
            leases, ticket.outcome = [], error
        if leases or ticket.outcome is not None:
            self._leave_line(ticket)
            ticket.leases = leases
            self._served.append(ticket)
            self._changed.notify_all()

    def _reconsider(self, slot: int, now: float) -> None:
        """Sessions that wait for a slot which cannot serve them now move, or are lost."""
        if len(self._line):
            for ticket in self._line.of_slot(slot):
                self._serve(ticket, now)

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
        self._serve(ticket, now)
        if ticket.queue is not None:
            self._timers.add(now + _REUSE_SECONDS, self._on_reuse_delay, ticket)

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
        soonest = math.inf
        for when, function, arguments in self._timers.first(_TIMERS_LOOKED_AT):
            if function == self._on_expired:
                slot = arguments[0].slot
            elif function == self._on_rest_over and arguments[2] in (NO_TARGET, view.target):
                slot, key, _ = arguments
                # Another proxy may have the slot by now.
                if self._index.slot_of(key) != slot:
                    continue
            else:
                continue
            if slot == ABSENT or (only is not None and slot != only):
                continue
            if self._index.is_used(slot) and self._index.facets_of(slot).match(view.wanted):
                soonest = min(soonest, max(when, self._rests_until(slot, view.target, now)))
        return None if soonest == math.inf else max(0.0, soonest - now)

    def _rests_until(self, slot: int, target: int, now: float) -> float:
        """When a proxy rests no more, everywhere and at a target; `now` if it does not rest."""
        standings = (self._health.proxy(slot), self._health.pair(slot, target))
        return max([now, *(standing.until for standing in standings if standing is not None)])

    # -- learning, under the lock

    def _learn(
        self, key: str, lease: Lease | None, use: UseResult, now: float, follow_up: FollowUp
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
        follow_up: FollowUp | None,
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

    # -- the journal of leases

    def _absolute(self, steady: float) -> int:
        return self._journal.timeline.absolute(steady)

    def _lease_records(self) -> list[Record]:
        with self._lock:
            return [
                *(grant_record(lease, self._absolute) for lease in self._leases),
                *(session_record(session, self._absolute) for session in self._sessions.values()),
            ]

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


class FollowUp:
    """What the cache is to be told of after the lock is let go: openings as failures, and successes."""

    def __init__(self) -> None:
        self._items: list[tuple[HealthEffect, str, bool]] = []

    def __iter__(self) -> Iterator[tuple[HealthEffect, str, bool]]:
        return iter(self._items)

    def add(self, effect: HealthEffect, key: str, *, failed: bool) -> None:
        self._items.append((effect, key, failed))
