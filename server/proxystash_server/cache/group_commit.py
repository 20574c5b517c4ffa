"""Group commit: concurrent writers folded into one commit."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from proxystash_server.cache.errors import TierError

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Ticket(Generic[Item, Result]):
    __slots__ = ("done", "error", "item", "result")

    def __init__(self, item: Item) -> None:
        self.item = item
        self.done = False
        self.result: Result | None = None
        self.error: Exception | None = None


class GroupCommit(Generic[Item, Result]):
    """Runs `commit` on everything that waits, in the thread of whichever waiter holds the commit lock first.

    `commit` gets the items in the order of their arrival and returns a result for each. An exception it
    raises is raised, wrapped by `wrap`, in every submitting thread of that group. The idea is that of
    write-ahead logs in databases: under load, the cost of a transaction is shared by all that queued up
    during the one before.
    """

    def __init__(self, commit: Callable[[Sequence[Item]], Sequence[Result]]) -> None:
        self._commit = commit
        self._queue: deque[_Ticket[Item, Result]] = deque()
        self.lock = threading.Lock()

    def submit(self, item: Item) -> Result:
        """Commit `item`, alone or with others, and return its result once it is committed."""
        ticket: _Ticket[Item, Result] = _Ticket(item)
        self._queue.append(ticket)
        with self.lock:
            if not ticket.done:
                self._commit_waiting()
        if ticket.error is not None:
            raise ticket.error
        assert ticket.result is not None
        return ticket.result

    def _commit_waiting(self) -> None:
        group: list[_Ticket[Item, Result]] = []
        while self._queue:
            group.append(self._queue.popleft())
        try:
            results = self._commit([ticket.item for ticket in group])
        except BaseException as error:
            for ticket in group:
                # An interrupt belongs to the thread it struck; the others learn that their commit did not
                # happen.
                ticket.error = (
                    error if isinstance(error, Exception) else TierError("the commit was interrupted")
                )
                ticket.done = True
            if isinstance(error, Exception):
                return
            raise
        for ticket, result in zip(group, results, strict=True):
            ticket.result = result
            ticket.done = True
