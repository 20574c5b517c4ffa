"""The pool's selection index by itself, under measurement: who is lent, without the cache and the journal."""

from __future__ import annotations

import random
from collections.abc import Callable

from proxystash.models import HealthStatus
from proxystash_server.cache import EntryFilter
from proxystash_server.pool.index import Facets, SelectionIndex, State
from tests.benchmarks.made_up import COUNTRIES, SOURCE, key_of
from tests.benchmarks.worker import Batch

# What BALANCED draws.
_CANDIDATES = 3
_TARGET = 1
_ANYWHERE = 0


class SelectionSide:
    """An index of made-up proxies. One half of them, drawn at random, is banned by a target."""

    def __init__(self, folder: str, backend: str, entries: int) -> None:
        self._entries = entries
        self._chance = random.Random(1)
        self._index = SelectionIndex(self._chance.random)

    def fill(self) -> None:
        for number in range(self._entries):
            label = ("country", COUNTRIES[number % len(COUNTRIES)])
            self._index.add(key_of(number), Facets("http", SOURCE, HealthStatus.UNKNOWN, (label,)))

    def batch(self, operation: str, count: int) -> Batch:
        """`count` proxies are chosen, lent and given back; with `banned`, for the target."""
        target = _ANYWHERE
        if operation == "banned":
            target = _TARGET
            for slot in self._chance.sample(range(self._entries), self._entries // 2):
                self._index.block(slot, target)
        return Batch(self._lend(target), [()] * count, undo=lambda: self._unban(target))

    def _lend(self, target: int) -> Callable[[], object]:
        index = self._index
        view = index.view(EntryFilter(), target)
        now = 0.0

        def lend() -> None:
            nonlocal now
            # As if a thousand came in a second: what is counted once a second is counted again.
            now += 0.001
            found = index.candidates(view, _CANDIDATES, now)
            index.set_state(found[0], State.LEASED_OUT)
            index.set_state(found[0], State.READY)

        return lend

    def _unban(self, target: int) -> None:
        for slot in range(self._entries) if self._index.blocked(target) else ():
            self._index.unblock(slot, target)

    def hits(self) -> tuple[int, int]:
        """None: no cache is asked."""
        return (0, 0)

    def close(self) -> None:
        """Nothing is kept."""
