"""Locks per key, so that work on one key never waits for another.

Lock order, outermost first; a thread takes them only downwards. Only the first four are held across I/O, and
none of these four is waited for by a reader of another key.

1. the lock of changes (group commit: one group at a time). Only its holder takes several key locks, or all
   of them; whoever holds one key's lock never waits for it
2. key locks (several at once through `hold_many`, all of them through `hold_all`)
3. the flush lock of the changes (one flush of uses at a time)
4. a tier's commit lock (writers of one tier, never its readers)
5. a tier's memory lock (JSONL's index; L1's entries and the log of uses, which have one lock together)
6. leaves, never two at once: those of the statistics and latencies, a breaker, the uses that L3 has missed,
   and the numbers of uses in SQLite
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence


class KeyLocks:
    """One mutex for every key in use, there from when it is first wanted until nobody wants it any more.

    Not reentrant. Who asks for keys waits for those that asked for them before, and so gets them in that
    order: the queue lock of Craig (1993) and of Magnusson, Landin and Hagersten (1994), with one place for
    several keys.

    An interrupt of the thread at any moment leaves no key held: what says that one is over is a lock of the
    interpreter's own, which the `with` statement releases without running any Python in between.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        # Who has asked last for each key. May be over by now.
        self._last: dict[str, Holding] = {}
        # All who have asked, in that order; what is over leaves when it comes to the front.
        self._asked: deque[Holding] = deque()
        self._last_of_all: Holding | None = None

    def hold(self, key: str) -> Holding:
        """Hold one key's lock, as a context."""
        return Holding(self, (key,))

    def hold_many(self, keys: Iterable[str]) -> Holding:
        """Hold several keys' locks, as a context."""
        return Holding(self, set(keys))

    def hold_all(self) -> Holding:
        """Hold every key's lock, including those of keys not seen yet, as a context."""
        return Holding(self, None)

    def wait_for_holders(self) -> None:
        """Wait for all who hold a key or wait for one now; whoever asks later is not kept from anything."""
        with self._guard:
            before = list(self._asked)
        _wait_for(before)

    def ask(self, holding: Holding) -> Sequence[Holding]:
        """Take a place behind those that have asked for the same keys before, and give them."""
        with self._guard:
            last, asked = self._last, self._asked
            while asked and not asked[0].under_way.locked():
                self._forget(asked.popleft())
            keys = holding.keys
            if keys is None:
                before = list(asked)
            else:
                # The usual case: nobody has any of them.
                is_free = last.keys().isdisjoint(keys)
                before = [] if is_free else list({last[key] for key in keys if key in last})
                if self._last_of_all is not None:
                    before.append(self._last_of_all)
            # Before anybody can come behind it.
            holding.before = before
            asked.append(holding)
            if keys is None:
                self._last_of_all = holding
            else:
                last.update(dict.fromkeys(keys, holding))
        return before

    def _forget(self, holding: Holding) -> None:
        if holding is self._last_of_all:
            self._last_of_all = None
        last = self._last
        for key in holding.keys or ():
            if last.get(key) is holding:
                del last[key]


class Holding:
    """The locks of some keys, or of all (None), held inside one `with` block.

    `under_way` is locked until the block is left. `before` are those it waits for; where an interrupt has
    ended the wait, whoever comes behind waits for them instead.
    """

    __slots__ = ("__exit__", "_locks", "before", "keys", "under_way")

    # The method of the lock itself: a function of ours could be interrupted before it does anything.
    __exit__: Callable[..., None]

    def __init__(self, locks: KeyLocks, keys: Collection[str] | None) -> None:
        self._locks = locks
        self.keys = keys
        self.before: Sequence[Holding] = ()
        self.under_way = under_way = threading.Lock()
        self.__exit__ = under_way.__exit__

    def __enter__(self) -> None:
        try:
            self.under_way.acquire()
            before = self._locks.ask(self)
            if before:
                _wait_for(before)
                self.before = ()
        except BaseException:
            self.under_way.release()
            raise


def _wait_for(holdings: Iterable[Holding]) -> None:
    waiting = list(holdings)
    while waiting:
        one = waiting.pop()
        with one.under_way:
            waiting += one.before
