"""Threads on a cache so small that every put evicts, and whether all they saw can be explained."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final, Literal

from proxystash_server.cache import CacheManager, CacheTierConfig, CacheTierType, L2BackendType
from proxystash_server.cache.coherence.feed import Change, ChangeKind
from tests.torture.histories import record
from tests.torture.linearizability import Operation, check_history
from tests.torture.stores import LibraryDriver, eager_compaction, make_config, temporary_directory
from tests.torture.tally import BreachError, Tally

Policy = Literal["lru", "lfu", "fifo"]
POLICIES: Final[Sequence[Policy]] = ("lru", "lfu", "fifo")
_TTL_SECONDS: Final = 24 * 3600
_EVERY_TIER: Final = tuple(CacheTierType)


class _Register:
    """A cache as a register. Nothing fails here, so every put is stored, in every tier."""

    def __init__(self, manager: CacheManager) -> None:
        self._driver = LibraryDriver(manager)

    def put(self, keys: Sequence[str], value: str) -> None:
        for key, stored_in in zip(keys, self._driver.put(keys, value, ttl_seconds=_TTL_SECONDS), strict=True):
            if stored_in != _EVERY_TIER:
                raise BreachError("lost", f"a put of {key!r} is said to be stored in {list(stored_in)}")

    def delete(self, key: str) -> None:
        self._driver.delete(key)

    def get(self, keys: Sequence[str]) -> list[str | None]:
        return [None if seen is None else seen.tag for seen in self._driver.get(keys)]


class _Evictions:
    """What has been evicted, as the feed of changes tells it: each is a delete that nobody asked for.

    It happens in the group that tells it: after the one before has told its changes, and before it is told.
    """

    def __init__(self) -> None:
        self.history: list[Operation] = []
        self._told_before = self._told = time.monotonic()

    def __call__(self, changes: Sequence[Change]) -> None:
        now = time.monotonic()
        evicted = [change.key for change in changes if change.kind is ChangeKind.EVICTION]
        # A group tells its evictions last, by themselves.
        since = self._told_before if evicted else self._told
        self.history += [Operation(key, "delete", None, since, now) for key in evicted]
        self._told_before, self._told = since, now


def check_under_eviction(
    tally: Tally, l2_backend: L2BackendType, policy: Policy, seed: int, seconds: float, *, most: int = 20_000
) -> list[Operation]:
    """Record what threads see while entries make room for each other, and check it; raises BreachError."""
    until = time.monotonic() + seconds
    ended = threading.Event()
    count = 0

    def goes_on() -> bool:
        nonlocal count
        count += 1
        return time.monotonic() < until and count < most

    def maintain() -> None:
        chance = random.Random(seed)
        while not ended.wait(chance.uniform(0, 0.02)):
            manager.maintain()

    with ExitStack() as stack:
        directory = stack.enter_context(temporary_directory())
        stack.enter_context(eager_compaction())
        l1, l2, l3 = (CacheTierConfig(max_entries=size, eviction_policy=policy) for size in (1, 2, 3))
        config = make_config(directory, l2_backend, l1=l1, l2=l2, l3=l3)
        manager = stack.enter_context(CacheManager(config, background=False))
        evictions = _Evictions()
        manager.subscribe(evictions)
        register = _Register(manager)
        maintenance = threading.Thread(target=maintain, name="maintenance")
        maintenance.start()
        try:
            history = record(lambda: register, seed, goes_on)
        finally:
            ended.set()
            maintenance.join()
    tally.add("operations", len(history))
    history += evictions.history
    try:
        check_history(history)
    except BreachError as error:
        tally.add(error.kind)
        error.add_note(f"with {l2_backend}, {policy}, seed {seed}")
        raise
    return history
