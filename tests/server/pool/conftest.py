"""A pool over a real cache, on clocks of the test's own."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from proxystash_server.cache import CacheConfig, CacheEntry, CacheManager
from proxystash_server.pool.pool import Pool
from proxystash_server.pool.requests import AcquireRequest, Answer, Lease
from proxystash_server.pool.waiting import Ticket
from tests.server.pool.clocks import FakeClocks


class Fleet:
    """The cache, the pool and the clocks; what a test does with them, in short."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.directory = directory
        self.settings = settings
        self.time = FakeClocks()
        self.manager = CacheManager(
            CacheConfig(
                l2_cache_dir=directory / "l2",
                l3_database_path=directory / "l3" / "proxystash.db",
                encryption_key_file=directory / "secret.key",
                default_ttl_seconds=86_400,
            ),
            clock=lambda: self.time.wall_us,
            monotonic=lambda: self.time.steady,
            background=False,
        )
        self.pool = self.open()

    def open(self) -> Pool:
        """Another pool over the same cache and directory, as after a restart."""
        self.pool = Pool(
            self.manager,
            self.directory / "pool",
            clocks=self.time.clocks(),
            random=random.Random(1),
            background=False,
            **self.settings,
        )
        self.pool.load()
        return self.pool

    def crash(self) -> Pool:
        """The pool ends as by a kill, and another takes its place."""
        self.manager.unsubscribe(self.pool._on_changes)
        return self.open()

    def put(self, number: int = 1, **fields: Any) -> CacheEntry:
        scheme = fields.pop("scheme", "http")
        entry = self.manager.new_entry(f"{scheme}://192.0.2.{number}:8080", **fields)
        assert self.manager.put(entry.key, entry)
        return entry

    def acquire(self, **fields: Any) -> list[Lease]:
        return [granted.lease for granted in self.answer(**fields).granted]

    def answer(self, **fields: Any) -> Answer:
        answer = self.pool.acquire(AcquireRequest(**fields))
        assert isinstance(answer, Answer)
        return answer

    def wait(self, **fields: Any) -> Waiting:
        """A call that waits for a minute at most."""
        return Waiting(self.pool, AcquireRequest(**{"wait": 60.0, **fields}))

    def close(self) -> None:
        self.pool.close()
        self.manager.close()


class Waiting:
    """A call that waits, and what it was answered."""

    def __init__(self, pool: Pool, request: AcquireRequest) -> None:
        self.answers: list[Answer | Exception] = []
        self.is_there = True
        # A bound method is made anew each time it is asked for.
        self.deliver: Callable[[Answer | Exception], bool] = self._deliver
        self.ticket = pool.acquire(request, self.deliver)
        if isinstance(self.ticket, Answer):
            self.answers.append(self.ticket)

    def _deliver(self, answer: Answer | Exception) -> bool:
        self.answers.append(answer)
        return self.is_there

    @property
    def waits(self) -> bool:
        return isinstance(self.ticket, Ticket) and not self.answers

    @property
    def leases(self) -> list[Lease]:
        [answer] = self.answers
        assert isinstance(answer, Answer), answer
        return [granted.lease for granted in answer.granted]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path)
    yield fleet
    fleet.close()
