"""Calls that wait for a proxy, first come first served, without a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from proxystash_server.cache import CacheError
from proxystash_server.pool.index import SelectionIndex, View
from proxystash_server.pool.requests import AcquireRequest, Answer, Lease
from proxystash_server.pool.timers import Timer

MAX_WAITING: Final = 10_000

# Is given the answer, or the reason why there is none; False if whoever asked has gone.
Deliver = Callable[[Answer | Exception], bool]


class Ticket:
    """A call that waits. Changed under the pool's lock alone.

    Two calls with one request id share a ticket, so it may have more than one to deliver to. A session that
    has a proxy waits for that alone.
    """

    __slots__ = (
        "delivers", "leases", "number", "only", "outcome", "queue", "request", "timer", "until", "view",
    )  # fmt: skip

    def __init__(self, number: int, request: AcquireRequest, view: View, only: int | None) -> None:
        self.number = number
        self.request = request
        self.view = view
        self.only = only
        self.delivers: list[Deliver] = []
        self.timer: Timer | None = None
        self.queue: dict[int, Ticket] | None = None
        # When its time is up.
        self.until = 0.0
        # What it was served with; else what it is to be told.
        self.leases: list[Lease] = []
        self.outcome: Answer | CacheError | None = None


class WaitingLine:
    """The tickets that wait, by what they wait for. Not thread-safe."""

    def __init__(self, index: SelectionIndex) -> None:
        self._index = index
        self._numbers = 0
        self._count = 0
        # By view, each in the order of coming. Also those that a number was given back to.
        self._queues: dict[View, dict[int, Ticket]] = {}
        self._by_request: dict[str, Ticket] = {}

    def __len__(self) -> int:
        return self._count

    def of_request(self, request_id: str) -> Ticket | None:
        """The ticket of another call with the same id."""
        return self._by_request.get(request_id) if request_id else None

    def new(self, request: AcquireRequest, view: View, only: int | None) -> Ticket:
        """A ticket behind all others, in line."""
        self._numbers += 1
        ticket = Ticket(self._numbers, request, view, only)
        self.put_back(ticket)
        return ticket

    def put_back(self, ticket: Ticket) -> None:
        """Have a ticket wait, at the place that its number says."""
        queue = self._queues.get(ticket.view)
        if queue is None:
            queue = self._queues[ticket.view] = {}
        elif queue and next(reversed(queue)) > ticket.number:
            later = {number: queue.pop(number) for number in list(queue) if number > ticket.number}
            queue[ticket.number] = ticket
            queue.update(later)
        queue[ticket.number] = ticket
        ticket.queue = queue
        self._count += 1
        if ticket.request.request_id:
            self._by_request[ticket.request.request_id] = ticket

    def take(self, ticket: Ticket) -> bool:
        """Have a ticket wait no more; False if it did not."""
        queue = ticket.queue
        if queue is None:
            return False
        ticket.queue = None
        del queue[ticket.number]
        if not queue:
            del self._queues[ticket.view]
        self._count -= 1
        if ticket.request.request_id:
            self._by_request.pop(ticket.request.request_id, None)
        return True

    def first_for(self, slot: int, accepts: Callable[[Ticket, int], bool]) -> Ticket | None:
        """The ticket that has waited longest of those that a slot can be lent to.

        O(1) for each view that is waited for, and for each ticket before it that does not accept the slot.
        """
        first: Ticket | None = None
        for view, queue in self._queues.items():
            if first is not None and next(iter(queue)) > first.number:
                continue
            if not self._index.fits(slot, view):
                continue
            for ticket in queue.values():
                if first is not None and ticket.number > first.number:
                    break
                if (ticket.only is None or ticket.only == slot) and accepts(ticket, slot):
                    first = ticket
                    break
        return first

    def of_slot(self, slot: int) -> Iterator[Ticket]:
        """The tickets that wait for a slot alone."""
        for queue in list(self._queues.values()):
            for ticket in list(queue.values()):
                if ticket.only == slot:
                    yield ticket

    def all(self) -> list[Ticket]:
        """Every ticket, the longest waiting first."""
        tickets = [ticket for queue in self._queues.values() for ticket in queue.values()]
        return sorted(tickets, key=lambda ticket: ticket.number)
