"""What a leaser keeps ready and has to release, for either kind of client: what is due, what answers mean."""

from __future__ import annotations

import logging
import math
import re
import uuid
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, TypeVar

from proxystash._pool_operations import no_proxy
from proxystash._retry import Backoff, RetryPolicy
from proxystash.errors import InvalidArgumentError, ProxystashError
from proxystash.held import Clock, Term
from proxystash.pool_models import AcquireResult, Lease, LeaseRelease
from proxystash.v1 import pool_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence

Arrived = TypeVar("Arrived")

# What one Acquire and one Release may have.
MAX_COUNT: Final = 100
MAX_RELEASES: Final = 1000
_PAUSES: Final = RetryPolicy(initial=0.1, multiplier=2.0, maximum=2.0)
# After what a call is made again for as long as it takes.
_PASSING: Final = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "CANCELLED", "INTERNAL"}
_ITEM: Final = re.compile(r"releases\[(\d+)\]")

_log = logging.getLogger("proxystash")


class Terms(NamedTuple):
    """How a leaser borrows: `ready` leases of so many `seconds`, `margin` of them left when one is taken.

    A call for who waits may itself wait for `wait` seconds; what is to be released does so for `delay`.
    """

    ready: int
    seconds: float
    margin: float
    wait: float
    delay: float


class Supply(Generic[Arrived]):
    """The leases that are ready for one target and filter, and the call for more. Not thread-safe.

    `arrived` is how those are woken who wait, of whom there are `waiting`. `refusal` is what the server has
    against the request itself.
    """

    def __init__(self, template: pb.AcquireRequest, terms: Terms, arrived: Arrived, clock: Clock) -> None:
        self.arrived = arrived
        self.waiting = 0
        self.refusal: ProxystashError | None = None
        self._template = template
        self._terms = terms
        self._clock = clock
        # Each with when it ends at the earliest, in this order.
        self._ready: deque[tuple[Lease, float]] = deque()
        self._stale: list[Lease] = []
        self._used_at = clock()
        # What is asked for until it is answered.
        self._request: pb.AcquireRequest | None = None
        self._first_asked_at = 0.0
        self._is_asking = False
        self._ask_at = 0.0
        self._wanted_until = 0.0
        self._pauses = Backoff(_PAUSES)
        self._failure: ProxystashError | None = None
        self._result = AcquireResult(())

    @property
    def is_low(self) -> bool:
        """Whether half of what is to be ready is gone, and nobody is asking for more."""
        return not self._is_asking and 2 * len(self._ready) <= self._terms.ready

    def take(self) -> tuple[Lease, Term] | None:
        """A lease that lasts for one use at least; None if there is none."""
        self._used_at = now = self._clock()
        self._set_aside(now)
        if not self._ready:
            return None
        lease, ends_at = self._ready.popleft()
        return lease, Term(self._terms.seconds, ends_at, ends_at - self._terms.margin * 2 / 3)

    def why_none(self) -> ProxystashError:
        """What is raised for who has waited in vain."""
        return self._failure or no_proxy(self._result)

    def withdraw(self) -> list[Lease]:
        """Leases that nobody is given any more: they end too soon, or nobody has come for long."""
        now = self._clock()
        self._set_aside(now)
        return self.empty() if self._is_idle(now) else self._take_stale()

    def empty(self) -> list[Lease]:
        """All leases, which nobody is given any more."""
        leases = [*self._take_stale(), *(lease for lease, _ in self._ready)]
        self._ready.clear()
        return leases

    def is_over(self) -> bool:
        """Whether nobody has come for long, and nothing is under way."""
        return self.is_settled and self._is_idle(self._clock())

    @property
    def is_settled(self) -> bool:
        """Whether nothing is asked for that may have been granted."""
        return self._request is None and not self._is_asking

    def ask(self) -> pb.AcquireRequest | None:
        """What to ask for now, if anything: if it stays unanswered, the same again, so that none is lost."""
        now = self._clock()
        if not self._may_ask(now) or now < self._ask_at:
            return None
        if self._request is None:
            self._request = pb.AcquireRequest()
            self._request.CopyFrom(self._template)
            self._request.request_id = uuid.uuid4().hex
            self._request.count = min(MAX_COUNT, self._terms.ready + self.waiting - len(self._ready))
            wait = min(self._terms.wait, self._wanted_until - now)
            if self.waiting and self._result.shortage is not None and wait > 0:
                # Nobody is kept from a proxy so that one is ready here that nobody waits for.
                self._request.wait.FromMilliseconds(round(1000 * wait))
            self._first_asked_at = now
        self._is_asking = True
        return self._request

    def ask_again(self) -> pb.AcquireRequest | None:
        """What was asked for and not answered, at the end: its id finds what may have been granted."""
        if self._request is None or self._is_asking or self._clock() < self._ask_at:
            return None
        self._request.ClearField("wait")
        self._is_asking = True
        return self._request

    def answered(self, result: AcquireResult) -> None:
        """Take in what was asked for. Its leases may be as old as the first time it was."""
        self._ready.extend((lease, self._first_asked_at + self._terms.seconds) for lease in result.leases)
        self._result, self._failure = result, None
        self._request, self._is_asking = None, False
        self._pauses.reset()
        if not result.leases and not self.waiting:
            known = result.retry_after.total_seconds() if result.retry_after is not None else math.inf
            self._ask_at = self._clock() + min(2.0, max(0.2, known))

    def failed(self, failure: ProxystashError) -> None:
        """What was asked for was not answered: it is asked again later, unless the request is at fault."""
        self._is_asking = False
        self._failure = failure
        self._ask_at = self._clock() + self._pauses.next_pause()
        if failure.code not in _PASSING:
            self.refusal, self._request = failure, None

    def hurry(self, until: float) -> None:
        """Somebody has begun to wait until then: what was put off for want of proxies is asked for now."""
        self.waiting += 1
        self._wanted_until = max(self._wanted_until, until)
        if self._failure is None:
            self._ask_at = 0.0

    def next_at(self) -> float:
        """When it has something to do next, if nobody comes."""
        now, terms = self._clock(), self._terms
        at = self._ready[0][1] - terms.margin if self._ready else math.inf
        if not self.waiting and not self._is_asking:
            at = min(at, self._used_at + terms.seconds)
        return min(at, self._ask_at) if self._may_ask(now) else at

    def _set_aside(self, now: float) -> None:
        while self._ready and self._ready[0][1] - now < self._terms.margin:
            self._stale.append(self._ready.popleft()[0])

    def _take_stale(self) -> list[Lease]:
        stale, self._stale = self._stale, []
        return stale

    def _may_ask(self, now: float) -> bool:
        if self._is_asking or self.refusal is not None:
            return False
        is_short = len(self._ready) < self._terms.ready + self.waiting
        return self._request is not None or (is_short and not self._is_idle(now))

    def _is_idle(self, now: float) -> bool:
        return not self.waiting and now - self._used_at >= self._terms.seconds


class Work(NamedTuple, Generic[Arrived]):
    """What is due: supplies with what to ask for, and what to release; else when there is something to do."""

    asking: list[tuple[Supply[Arrived], pb.AcquireRequest]]
    releases: list[LeaseRelease]
    next_at: float

    @property
    def is_due(self) -> bool:
        return bool(self.asking or self.releases)


class Supplies(Generic[Arrived]):
    """All that a leaser has ready, by what it is for, and all that it has to release. Not thread-safe.

    Once it `is_closed`, nothing new is asked for, and what is ready or arrives is released. `failure` is why
    the last release did not arrive.
    """

    def __init__(self, terms: Terms, clock: Clock) -> None:
        self.is_closed = False
        self.failure: ProxystashError | None = None
        self._terms = terms
        self._clock = clock
        self._supplies: dict[object, Supply[Arrived]] = {}
        self._releases: list[LeaseRelease] = []
        self._release_at = math.inf
        self._is_releasing = False
        self._pauses = Backoff(_PAUSES)

    def __iter__(self) -> Iterator[Supply[Arrived]]:
        return iter(list(self._supplies.values()))

    @property
    def is_done(self) -> bool:
        """Whether a closed one has nothing left to release."""
        is_sent = not self._releases and not self._is_releasing
        return self.is_closed and is_sent and all(supply.is_settled for supply in self)

    def get(self, key: object) -> Supply[Arrived] | None:
        """The supply for something, unless the server has refused what it asks for."""
        supply = self._supplies.get(key)
        return None if supply is None or supply.refusal is not None else supply

    def open(self, key: object, template: pb.AcquireRequest, arrived: Arrived) -> Supply[Arrived]:
        """A new supply in the place of one that there may be."""
        supply = self._supplies[key] = Supply(template, self._terms, arrived, self._clock)
        return supply

    def close(self) -> None:
        """Ask for nothing more, and release what is ready."""
        self.is_closed = True
        for supply in self:
            self._give_up(supply.empty())

    def answered(self, supply: Supply[Arrived], result: AcquireResult) -> None:
        """Take in an answer; what comes after the end is released."""
        supply.answered(result)
        if self.is_closed:
            self._give_up(supply.empty())

    def release(self, release: LeaseRelease) -> bool:
        """Have a lease released; whether that is due earlier than anything that `work` has told of."""
        self._releases.append(release)
        if self._is_releasing:
            return False
        first = len(self._releases) == 1
        if first:
            self._release_at = self._clock() + self._terms.delay
        return first or len(self._releases) == MAX_RELEASES

    def work(self) -> Work[Arrived]:
        """What is due now; each call that it has for is to be followed by its answer or failure."""
        asking: list[tuple[Supply[Arrived], pb.AcquireRequest]] = []
        next_at = math.inf
        for key, supply in list(self._supplies.items()):
            self._give_up(supply.withdraw())
            if supply.is_over():
                del self._supplies[key]
                continue
            request = supply.ask_again() if self.is_closed else supply.ask()
            if request is not None:
                asking.append((supply, request))
            next_at = min(next_at, supply.next_at())
        batch: list[LeaseRelease] = []
        if self._releases and not self._is_releasing:
            due = self._release_at
            if self.failure is None and (self.is_closed or any(supply.waiting for supply in self)):
                # What is held back is what somebody waits for.
                due = 0.0
            if due <= self._clock() or len(self._releases) >= MAX_RELEASES:
                batch, self._releases = self._releases[:MAX_RELEASES], self._releases[MAX_RELEASES:]
                self._is_releasing = True
            else:
                next_at = min(next_at, due)
        return Work(asking, batch, next_at)

    def released(self) -> None:
        """What was to be released is. Whatever has come meanwhile follows at once."""
        self._is_releasing = False
        self.failure = None
        self._release_at = 0.0
        self._pauses.reset()

    def not_released(self, batch: Sequence[LeaseRelease], failure: ProxystashError) -> None:
        """The batch goes again later; but for a result that the server refuses, which the log is told of."""
        self._is_releasing = False
        self.failure = failure
        self._release_at = self._clock() + self._pauses.next_pause()
        if failure.code in _PASSING:
            self._releases[:0] = batch
            return
        _log.error("what became of a use could not be reported: %s (%s)", failure.message, failure.reason)
        place = _ITEM.match(failure.field)
        if isinstance(failure, InvalidArgumentError) and place is not None:
            without = list(batch)
            without[int(place[1])] = replace(without[int(place[1])], result=None)
            self._releases[:0] = without

    def _give_up(self, leases: Sequence[Lease]) -> None:
        for lease in leases:
            self.release(LeaseRelease(lease.lease_id))
