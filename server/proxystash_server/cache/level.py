"""One disk tier as the others see it: guarded by its breaker, with the changes it has missed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, ParamSpec, TypeVar

from proxystash_server.cache.access_log import Access
from proxystash_server.cache.breaker import CircuitBreaker
from proxystash_server.cache.config import CacheTierType
from proxystash_server.cache.entry import CacheEntry
from proxystash_server.cache.errors import TierError, TierLostError
from proxystash_server.cache.statistics import StatisticsRecorder
from proxystash_server.cache.tiers.base import EVERYTHING, DurableTier, Write

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


@dataclass(slots=True)
class WriteOutcome:
    """What became of a change.

    Whether anyone took it, which disk tiers did, which of them held its keys before, what had to make room.
    """

    taken: bool = False
    stored_in: list[CacheTierType] = field(default_factory=list)
    held: dict[CacheTierType, int] = field(default_factory=dict)
    evicted: dict[CacheTierType, list[str]] = field(default_factory=dict)


class DiskLevel:
    """One disk tier with its breaker and its backlog (the keys it has missed). Thread-safe."""

    def __init__(self, tier: DurableTier, breaker: CircuitBreaker, statistics: StatisticsRecorder) -> None:
        self.tier = tier
        self.breaker = breaker
        self.name = tier.tier_type
        # Whether the configuration wants this tier.
        self.enabled = tier.enabled
        self._statistics = statistics
        self._read_latency = statistics.latency(self.name, "read")
        self._latencies = {"read": self._read_latency, "write": statistics.latency(self.name, "write")}
        self._lock = threading.Lock()
        self._missed: dict[str, int] = {}
        self._missed_uses: dict[str, Access] = {}

    @property
    def is_open(self) -> bool:
        """Whether the tier can be used, though perhaps not for every key."""
        return self.enabled and not self.breaker.is_open

    @property
    def works(self) -> bool:
        """Whether the tier takes part in reads and writes now."""
        return self.enabled and not self.breaker.is_open and EVERYTHING not in self._missed

    @property
    def is_complete(self) -> bool:
        """Whether the tier works and has missed nothing."""
        return self.works and not self._missed

    def serves(self, key: str) -> bool:
        """Whether the tier may be read for `key`."""
        # What `works` says, written out: every lookup below L1 asks.
        missed = self._missed
        return (
            self.enabled
            and not self.breaker.is_open
            and (not missed or (key not in missed and EVERYTHING not in missed))
        )

    def missed(self) -> dict[str, int]:
        """The backlog: keys and the versions of the changes that were missed."""
        with self._lock:
            return dict(self._missed)

    def missed_of(self, keys: Iterable[str]) -> dict[str, int]:
        """The part of the backlog that concerns `keys`."""
        if not self._missed:
            return {}
        with self._lock:
            return {key: self._missed[key] for key in keys if key in self._missed}

    def has_missed(self, key: str) -> bool:
        """Whether the last change of `key` is in the backlog."""
        return key in self._missed

    def add_missed(self, marks: Mapping[str, int]) -> None:
        """The tier has missed these changes."""
        with self._lock:
            for key, version in marks.items():
                self._missed[key] = max(version, self._missed.get(key, 0))

    def drop_missed(self, keys: Iterable[str]) -> list[str]:
        """The tier has caught up on `keys`; those of them that were in its backlog."""
        if not self._missed:
            return []
        with self._lock:
            return [key for key in keys if self._missed.pop(key, None) is not None]

    def describe(self, error: TierError | None = None) -> dict[str, str]:
        """Fields for a line of the log."""
        fields = {"tier": str(self.name), "backend": self.tier.backend}
        return fields if error is None else {**fields, "error": str(error)}

    def add_missed_uses(self, accesses: Iterable[Access]) -> None:
        """The tier was not told of these uses."""
        with self._lock:
            self._missed_uses.update((access.key, access) for access in accesses)

    def tell_missed_uses(self) -> bool:
        """Tell the tier of the uses it missed; whether that worked."""
        with self._lock:
            accesses = list(self._missed_uses.values())
            self._missed_uses.clear()
        if not accesses or self.write(self.tier.touch, accesses):
            return True
        with self._lock:
            self._missed_uses = {**{access.key: access for access in accesses}, **self._missed_uses}
        return False

    def attempt(
        self,
        kind: Literal["read", "write"],
        default: Result,
        operation: Callable[Arguments, Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> tuple[bool, Result]:
        """Run an operation of the tier: whether it worked, and its result or the default.

        Counts and times it.
        """
        started = time.perf_counter_ns()
        try:
            result = operation(*args, **kwargs)
        except TierError as error:
            self._record_failure(kind, error)
            return False, default
        self.breaker.record_success(kind)
        self._latencies[kind].record(time.perf_counter_ns() - started)
        return True, result

    def get(self, key: str) -> tuple[bool, CacheEntry | None]:
        """Attempt to read one entry: whether that worked, and what there was."""
        # What `attempt` does, written out: every lookup below L1 comes here.
        started = time.perf_counter_ns()
        try:
            entry = self.tier.get(key)
        except TierError as error:
            self._record_failure("read", error)
            return False, None
        if self.breaker.failures:
            self.breaker.record_success("read")
        self._read_latency.record(time.perf_counter_ns() - started)
        return True, entry

    def write(
        self, operation: Callable[Arguments, object], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> bool:
        """Attempt a write whose result is of no interest; whether it worked."""
        return self.attempt("write", None, operation, *args, **kwargs)[0]

    def apply(self, writes: Sequence[Write], outcome: WriteOutcome) -> bool:
        """Attempt changes, and add what became of them to `outcome`; whether it worked."""
        worked, applied = self.attempt("write", [], self.tier.apply, writes)
        if not worked:
            return False
        outcome.stored_in.append(self.name)
        held = 0
        evicted: list[str] = []
        for write, one in zip(writes, applied, strict=True):
            # What the tier still holds because it missed its removal was no longer held.
            if one.existed and write.key not in self._missed:
                held += 1
            if one.evicted:
                evicted += one.evicted
        outcome.held[self.name] = held
        outcome.evicted[self.name] = evicted
        return True

    def tend(self, operation: Callable[[], object]) -> None:
        """Run background work: a failure counts, but that it worked says nothing, since it may be idle."""
        try:
            operation()
        except TierError as error:
            self._record_failure("background", error)

    def give_up(self, error: TierError) -> None:
        """Skip the tier from now on, whatever it did before."""
        if self.breaker.force_open():
            logger.warning("tier degraded", extra=self.describe(error))

    def _record_failure(self, kind: str, error: TierError) -> None:
        self._statistics.record_error(self.name)
        if isinstance(error, TierLostError):
            self.give_up(error)
        elif self.breaker.record_failure(kind):
            logger.warning("tier degraded", extra=self.describe(error))


class DiskPair:
    """L2 and L3, and the backlog that each keeps for the other."""

    def __init__(self, l2: DiskLevel, l3: DiskLevel) -> None:
        self.l2 = l2
        self.l3 = l3
        self.levels = (l2, l3)

    @property
    def both_open(self) -> bool:
        """Whether both can be used."""
        return self.l2.is_open and self.l3.is_open

    def other(self, level: DiskLevel) -> DiskLevel:
        """The partner of a tier."""
        return self.l3 if level is self.l2 else self.l2

    def note_missed(self, level: DiskLevel, marks: Mapping[str, int]) -> None:
        """Put changes on a tier's backlog after the fact, in a commit of their own."""
        level.add_missed(marks)
        other = self.other(level)
        if other.is_open:
            other.write(other.tier.extend_backlog, marks)

    def settle(self, level: DiskLevel, keys: Iterable[str]) -> None:
        """Take keys off a tier's backlog: it has caught up on them."""
        settled = level.drop_missed(keys)
        other = self.other(level)
        if settled and other.is_open:
            # If this fails, the marks stay on disk; after a restart they are recognized as outlived.
            other.write(other.tier.settle, settled)

    def close(self) -> None:
        """Close both tiers."""
        for level in self.levels:
            if level.enabled:
                level.tier.close()
