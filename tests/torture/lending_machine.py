"""The state machine with a pool over the cache: leases, whatever fails below and whenever the run ends."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Final

from hypothesis import strategies as st
from hypothesis.stateful import rule

from proxystash_server.cache import CacheUnavailableError
from proxystash_server.pool.clocks import Clocks
from proxystash_server.pool.lending import NOT_FOUND_PAUSE
from proxystash_server.pool.pool import Pool
from proxystash_server.pool.requests import AcquireRequest, Answer, PoolLoadingError, Release
from tests.torture.lease_model import LeaseModel
from tests.torture.machine import KEYS, CacheMachine
from tests.torture.model import Invalidated, Model, Possible
from tests.torture.stores import FakeMonotonic, RefusedError, seen_in

MAX_LEASES: Final = 2
# Longer than the pool's clock goes in any example.
_LEASE_SECONDS: Final = 3600.0
_SECONDS_A_ROUND: Final = 2 * NOT_FOUND_PAUSE


class _LeasedModel(Model):
    """The model, which tells that of leases what may have gone, and notes what may rest."""

    def __init__(self, leases: LeaseModel, keys: Sequence[str], *, threshold: int) -> None:
        super().__init__(keys, threshold=threshold)
        self._leases = leases
        self.may_rest: set[str] = set()

    def delete(self, key: str, *, certain: bool = True) -> None:
        super().delete(key, certain=certain)
        # Also if it is certain: while a tier is away, nobody may have known that there was something.
        self._leases.removed(key, certain=False)

    def invalidate(self, key: str, answer: Invalidated | None, now_us: int, *, lenient: bool = False) -> None:
        super().invalidate(key, answer, now_us, lenient=lenient)
        if answer is None or answer.found:
            self.may_rest.add(key)
        if answer is None or answer.evicted:
            self._leases.removed(key, certain=False)

    def may_fall_back(self, key: str, before: Possible) -> None:
        super().may_fall_back(key, before)
        self._leases.removed(key, certain=False)

    def time_passed(self, now_us: int) -> None:
        super().time_passed(now_us)
        for key in filter(self.in_doubt, self.possible):
            self._leases.removed(key, certain=False)


class LendingMachine(CacheMachine):
    """With a pool, whose journal never fails."""

    def __init__(self) -> None:
        super().__init__()
        self.leases = LeaseModel(MAX_LEASES)
        self.model = self.leased = _LeasedModel(self.leases, KEYS, threshold=3)
        self.pool_clock = FakeMonotonic()
        # Until when a proxy may be kept back because its entry was not found.
        self.settled_at = 0.0

    def open(self) -> None:
        super().open()
        clocks = Clocks(self.clock, self.pool_clock, boot="the same")
        directory = self.directory / "pool"
        self.pool = Pool(
            self.manager,
            directory,
            max_leases=MAX_LEASES,
            clocks=clocks,
            random=random.Random(1),
            background=False,
        )
        self.session.callback(self.pool.close)
        for key in filter(self.model.in_doubt, KEYS):
            self.leases.removed(key, certain=False)
        is_whole = self.load() and self.complete
        self.leases.listed(self.listed(), is_whole=is_whole)

    def listed(self) -> dict[str, str]:
        return {lease.id: lease.key for lease in self.pool.leases(0, 1000)[0]}

    def load(self) -> bool:
        """Whether the pool knows all entries."""
        try:
            self.pool.load()
        except CacheUnavailableError:
            return False
        return True

    @rule(rounds=st.integers(1, 2))
    def go_on(self, rounds: int) -> None:
        """The pool's clock goes on, and it writes down what it has to."""
        self.pool_clock.seconds += rounds * _SECONDS_A_ROUND
        self.pool.run_due()
        self.pool.maintain()
        self.leases.written_down()

    @rule(count=st.integers(1, 4))
    def acquire(self, count: int) -> None:
        for _ in range(count):
            self._acquire()

    def _acquire(self) -> None:
        unknown = self.unknown()
        is_whole = self.load() and self.complete
        answer = self.attempt(self._lease, may_be_refused=not is_whole)
        is_whole = is_whole and self.complete
        if not is_whole:
            self.settled_at = self.pool_clock.seconds + NOT_FOUND_PAUSE
        if answer is None:
            return
        if answer:
            lease, key, seen = answer
            self.has_seen({key: seen}, unknown, "a lease")
            self.leases.granted(lease, key)
        elif is_whole and self.pool_clock.seconds > self.settled_at:
            there = [key for key in KEYS if not self.model.in_doubt(key) and key not in self.leased.may_rest]
            self.leases.refused(key for key in there if self.model.known(key, self.clock.now_us) is not None)

    def _lease(self) -> tuple[Any, ...]:
        """The id and the key of a lease, and what its entry tells; nothing for none."""
        try:
            answer = self.pool.acquire(AcquireRequest(duration=_LEASE_SECONDS))
        except (CacheUnavailableError, PoolLoadingError) as error:
            raise RefusedError(str(error)) from error
        assert isinstance(answer, Answer)
        if not answer.granted:
            return ()
        [granted] = answer.granted
        return granted.lease.id, granted.lease.key, seen_in(granted.entry)

    @rule(place=st.integers(0, 20), renews=st.booleans())
    def release(self, place: int, renews: bool) -> None:
        held = sorted(self.listed())
        lease = held[place % len(held)] if held else "none"
        if renews:
            self.leases.renewed(lease, self.pool.renew([lease], _LEASE_SECONDS) != [None])
        else:
            self.leases.released(lease, self.pool.release([Release(lease)])[0].released)
