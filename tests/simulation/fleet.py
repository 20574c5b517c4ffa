"""Workers that borrow from a real pool, over a real cache, on a clock that is set."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from proxystash_server.cache import CacheConfig, CacheEntry, CacheManager, CacheTierConfig
from proxystash_server.pool.clocks import Clocks
from proxystash_server.pool.health import Outcome
from proxystash_server.pool.pool import Pool
from proxystash_server.pool.requests import (
    AcquireRequest,
    Answer,
    Lease,
    Release,
    SelectionPolicy,
    UseResult,
)
from tests.simulation.world import DURATION, HOUR, TARGETS, World

JOBS_PER_SECOND: Final = 4.0
ATTEMPTS: Final = 4
MAX_LEASES: Final = 4
# Lists are fetched again this often: what was evicted comes back.
REFRESH: Final = HOUR
_START_US: Final = 1_800_000_000_000_000
# A job that finds no proxy tries again after so many seconds, so many times.
_PAUSE, _PAUSES = 2.0, 20


@dataclass
class Measures:
    """What came of it. `failed` are uses that failed for each 1,000 jobs that were done."""

    uses: int = 0
    successes: int = 0
    jobs: int = 0
    # By kind.
    evicted: Counter[str] = field(default_factory=Counter)
    # The share of the uses that fell on the busiest tenth of the proxies.
    busiest_tenth: float = 0.0

    @property
    def success_rate(self) -> float:
        return self.successes / max(1, self.uses)

    @property
    def failed(self) -> float:
        return 1000 * (self.uses - self.successes) / max(1, self.successes)

    @property
    def done(self) -> float:
        """The share of the jobs that were done."""
        return self.successes / max(1, self.jobs)


class Simulation:
    """One fleet for one and a half hours. What becomes of a use is known only when it is over."""

    def __init__(self, seed: int, directory: Path, load: float, policy: SelectionPolicy) -> None:
        self._world = World(seed)
        self._arrivals = random.Random(f"arrivals {seed}")
        self._load = load
        self._policy = policy
        self._now = 0.0
        self._events: list[tuple[float, int, tuple[object, ...]]] = []
        self._numbers = itertools.count()
        self._uses: Counter[int] = Counter()
        self.measures = Measures()
        self._cache = CacheManager(
            # Memory alone: what is on disk is not what is tried here.
            CacheConfig(
                l1_config=CacheTierConfig(max_entries=10_000),
                l2_config=CacheTierConfig(enabled=False),
                l3_config=CacheTierConfig(enabled=False),
                l2_cache_dir=directory / "l2",
                l3_database_path=directory / "l3" / "proxystash.db",
                default_ttl_seconds=86_400,
            ),
            clock=self._wall_us,
            background=False,
        )
        self._entries = [
            self._cache.new_entry(f"http://10.0.{number >> 8}.{number & 255}:8080")
            for number in range(len(self._world.kind))
        ]
        self._numbers_by_key = {entry.key: number for number, entry in enumerate(self._entries)}
        self._cache.put_many(self._entries)
        self._pool = Pool(
            self._cache,
            directory / "pool",
            max_leases=MAX_LEASES,
            clocks=Clocks(self._wall_us, lambda: self._now, "simulated"),
            random=random.Random(f"pool {seed}"),
            background=False,
        )
        self._pool.load()

    def run(self) -> Measures:
        """Let all of it happen."""
        self._at(0.0, "job")
        self._at(REFRESH, "refresh")
        while self._events:
            self._now, _, (what, *rest) = heapq.heappop(self._events)
            getattr(self, f"_{what}")(*rest)
        busiest = sum(count for _, count in self._uses.most_common(len(self._entries) // 10))
        self.measures.busiest_tenth = busiest / self.measures.uses
        self._pool.close()
        self._cache.close()
        return self.measures

    def _at(self, when: float, *what: object) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), what))

    def _wall_us(self) -> int:
        return _START_US + round(self._now * 1_000_000)

    def _job(self) -> None:
        if self._now >= DURATION:
            return
        self.measures.jobs += 1
        self._at(self._now + self._arrivals.expovariate(JOBS_PER_SECOND * self._load), "job")
        [target] = self._arrivals.choices(list(TARGETS), [target.weight for target in TARGETS.values()])
        self._at(self._now, "try", target, frozenset(), 0)

    def _try(self, target: str, tried: frozenset[str], pauses: int) -> None:
        answer = self._pool.acquire(
            AcquireRequest(target=target, exclude_keys=tried, policy=self._policy, duration=60.0)
        )
        assert isinstance(answer, Answer)
        if not answer.granted:
            if pauses < _PAUSES:
                self._at(self._now + _PAUSE, "try", target, tried, pauses + 1)
            return
        [granted] = answer.granted
        number = self._numbers_by_key[granted.entry.key]
        self.measures.uses += 1
        self._uses[number] += 1
        outcome, took = self._world.visit(number, target, self._now)
        self._at(self._now + took, "done", granted.lease, target, outcome, took, tried | {granted.entry.key})

    def _done(self, lease: Lease, target: str, outcome: Outcome, took: float, tried: frozenset[str]) -> None:
        [released] = self._pool.release([Release(lease.id, UseResult(outcome, self._now, took))])
        if released.effect is not None and released.effect.evicted:
            self.measures.evicted[self._world.kind[self._numbers_by_key[lease.key]]] += 1
        if outcome is Outcome.SUCCESS:
            self.measures.successes += 1
        elif len(tried) < ATTEMPTS:
            self._at(self._now, "try", target, tried, 0)

    def _refresh(self) -> None:
        gone: list[CacheEntry] = [entry for entry in self._entries if self._cache.get(entry.key) is None]
        self._cache.put_many(gone)
        if self._now + REFRESH < DURATION:
            self._at(self._now + REFRESH, "refresh")
