"""Group commit: concurrent writers folded into one commit."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

from proxystash_server.cache.errors import TierError

Item = TypeVar("Item")
Result = TypeVar("Result")


# From so many on, a group is taken as a sign that as many will come again.
_COMPANY: Final = 3


class _Ticket(Generic[Item, Result]):
    """A waiting writer. It sleeps on `turn` until its item was committed, or until it is to commit itself."""

    __slots__ = ("done", "error", "item", "leads", "result", "turn")

    result: Result

    def __init__(self, item: Item) -> None:
        self.item = item
        self.done = False
        self.leads = False
        # Without either, an interrupt ended the commit, which belongs to the thread it struck: the leader's.
        self.error: Exception | None = None
        self.turn = threading.Lock()
        self.turn.acquire()


class GroupCommit(Generic[Item, Result]):
    """Runs `commit` on everything that waits, in the thread of one of those that wait: the leader.

    `commit` gets the items in the order of their arrival, and returns a result for each. A group is closed as
    soon as its items together weigh `most`. An exception that `commit` raises is raised in every submitting
    thread of that group. The idea is that of write-ahead logs in databases: under load, the cost of a commit
    is shared by all that queued up during the one before.

    Every waiter sleeps on a lock of its own and wakes once: the leader wakes its group, and then the next
    leader, so that those who have their answers may come back in time for the next group.

    A leader whose predecessor had company waits up to `patience` seconds until as many have come again. Busy
    callers come back as soon as they have their answers, and a commit that all of them share spares most of
    what it costs to pass the processor from one to the next. A caller that comes alone never waits.

    `lock` is held during each commit; others may take it to keep commits out.
    """

    def __init__(
        self,
        commit: Callable[[Sequence[Item]], Sequence[Result]],
        most: int = 1000,
        weigh: Callable[[Item], int] = lambda _item: 1,
        patience: float = 0.0,
    ) -> None:
        self._commit = commit
        self._most = most
        self._weigh = weigh
        self._queue: deque[_Ticket[Item, Result]] = deque()
        self._guard = threading.Lock()
        self._has_leader = False
        self._patience = patience
        # How many the last group had, for how many in the queue a leader is waiting, and what wakes it.
        self._last_group = 0
        self._wanted = 0
        self._gathered: threading.Lock | None = None
        self.lock = threading.Lock()

    def submit(self, item: Item) -> Result:
        """Commit `item`, alone or with others, and return its result once it is committed."""
        ticket: _Ticket[Item, Result] = _Ticket(item)
        try:
            with self._guard:
                if self._has_leader:
                    self._queue.append(ticket)
                    if self._gathered is not None and len(self._queue) >= self._wanted:
                        gathered, self._gathered = self._gathered, None
                        gathered.release()
                else:
                    self._has_leader = ticket.leads = True
            if not ticket.leads:
                ticket.turn.acquire()
            if not ticket.done:
                return self._lead(item)
            if ticket.error is not None:
                raise ticket.error
            if not hasattr(ticket, "result"):
                raise TierError("the commit was interrupted")
            return ticket.result
        finally:
            try:
                self._leave(ticket)
            except BaseException:
                # An interrupt in this very moment. What has been done is not done twice.
                self._leave(ticket)
                raise

    def _lead(self, item: Item) -> Result:
        if self._patience and self._last_group >= _COMPANY:
            self._gather()
        with self.lock:
            if self._queue:
                return self._commit_group(item)
            self._last_group = 1
            return self._commit((item,))[0]

    def _commit_group(self, item: Item) -> Result:
        """Commit `item` and what waits, and wake those whose it was."""
        followers: list[_Ticket[Item, Result]] = []
        try:
            self._take_followers(item, followers)
            results = self._commit([item, *[follower.item for follower in followers]])
            for follower, result in zip(followers, results[1:], strict=True):
                follower.result = result
            return results[0]
        except Exception as error:
            for follower in followers:
                follower.error = error
            raise
        finally:
            try:
                _wake(followers)
            except BaseException:
                _wake(followers)
                raise

    def _take_followers(self, item: Item, followers: list[_Ticket[Item, Result]]) -> None:
        with self._guard:
            weight = self._weigh(item)
            while self._queue and weight < self._most:
                follower = self._queue[0]
                # In both or in one of them, whenever an interrupt strikes: these are no calls.
                followers += (follower,)
                del self._queue[0]
                weight += self._weigh(follower.item)
            self._last_group = 1 + len(followers)

    def _gather(self) -> None:
        """Wait until as many have come as there were in the last group."""
        with self._guard:
            self._wanted = self._last_group - 1
            if len(self._queue) >= self._wanted:
                return
            gathered = self._gathered = threading.Lock()
            gathered.acquire()
        gathered.acquire(timeout=self._patience)
        with self._guard:
            self._gathered = None

    def _leave(self, ticket: _Ticket[Item, Result]) -> None:
        """Make the longest waiting writer the next leader, or stop waiting after an interrupt."""
        if ticket.done:
            return
        with self._guard:
            if not ticket.leads:
                if ticket in self._queue:
                    self._queue.remove(ticket)
            elif self._queue:
                successor = self._queue[0]
                # Up to the release there is no call, so an interrupt finds all of it done, or nothing.
                ticket.leads = False
                successor.leads = True
                del self._queue[0]
                successor.turn.release()
            else:
                ticket.leads = self._has_leader = False


def _wake(tickets: list[_Ticket[Item, Result]]) -> None:
    """Wake whoever is still in the list, the first first, and take it out."""
    while tickets:
        ticket = tickets[0]
        ticket.done = True
        del tickets[0]
        ticket.turn.release()
