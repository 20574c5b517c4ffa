"""Threads on a cache one of whose disk tiers fails again and again, and what explains all they saw."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

from proxystash_server.cache import CacheManager, CacheTierConfig, CacheTierType, L2BackendType
from tests.torture.faults import Faults
from tests.torture.histories import record
from tests.torture.linearizability import Operation, check_history
from tests.torture.stores import (
    FakeMonotonic,
    LibraryDriver,
    RefusedError,
    eager_compaction,
    make_config,
    temporary_directory,
)
from tests.torture.tally import BreachError, Tally

_TTL_SECONDS: Final = 24 * 3600
_LONGEST_PAUSE: Final = 61
_LONGEST_FAULT: Final = 0.02


class _Register:
    """A cache as a register."""

    def __init__(self, driver: LibraryDriver) -> None:
        self._driver = driver

    def put(self, keys: Sequence[str], value: str) -> None:
        if not all(self._driver.put(keys, value, ttl_seconds=_TTL_SECONDS)):
            raise RefusedError("no tier could take it")

    def delete(self, key: str) -> None:
        self._driver.delete(key)

    def get(self, keys: Sequence[str]) -> list[str | None]:
        return [None if seen is None else seen.tag for seen in self._driver.get(keys)]


def check_under_faults(
    tally: Tally,
    l2_backend: L2BackendType,
    failing: CacheTierType,
    seed: int,
    seconds: float,
    *,
    most: int = 20_000,
) -> list[Operation]:
    """Record what threads see while a tier fails, and check it; raises BreachError.

    While L3 is away, L2 must have everything: it is not bounded then.
    """
    chance = random.Random(seed)
    faults = Faults()
    monotonic = FakeMonotonic()
    until = time.monotonic() + seconds
    ended = threading.Event()
    count = 0

    def goes_on() -> bool:
        nonlocal count
        count += 1
        return time.monotonic() < until and count < most

    def let_it_fail() -> None:
        while not ended.is_set():
            if chance.random() < 0.5:
                faults.take_down(failing)
            else:
                faults.fail_once(failing, chance.choice(["before", "after"]))
            ended.wait(chance.uniform(0, _LONGEST_FAULT))
            faults.heal()
            monotonic.seconds += _LONGEST_PAUSE
            manager.maintain()

    with ExitStack() as stack:
        directory = stack.enter_context(temporary_directory())
        stack.enter_context(eager_compaction())
        stack.enter_context(faults.installed())
        config = make_config(
            directory,
            l2_backend,
            l1=CacheTierConfig(max_entries=2),
            l2=CacheTierConfig(max_entries=3 if failing is CacheTierType.L2 else None),
        )
        manager = stack.enter_context(CacheManager(config, monotonic=monotonic, background=False))
        register = _Register(LibraryDriver(manager))
        trouble = threading.Thread(target=let_it_fail, name="trouble")
        trouble.start()
        try:
            history = record(lambda: register, seed, goes_on)
        finally:
            ended.set()
            trouble.join()
    tally.add("operations", len(history))
    tally.add("faults", faults.injected)
    try:
        check_history(history)
    except BreachError as error:
        tally.add(error.kind)
        error.add_note(f"with {l2_backend}, {failing} failing, seed {seed}")
        raise
    return history
