"""A disk tier guarded by its breaker: faults are counted and told, and become values."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Generic, Literal, ParamSpec, TypeVar

from proxystash_server.cache.coherence.breaker import CircuitBreaker
from proxystash_server.cache.counting.statistics import StatisticsRecorder
from proxystash_server.cache.entry.entry import CacheEntry
from proxystash_server.cache.errors import NoDescriptorsError, TierError, TierLostError
from proxystash_server.cache.tiers.base import DiskTier

logger = logging.getLogger(__name__)

Tier_co = TypeVar("Tier_co", bound=DiskTier, covariant=True)
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


class GuardedTier(Generic[Tier_co]):
    """One disk tier with its breaker. Thread-safe.

    `enabled` says whether the configuration wants the tier.
    """

    def __init__(self, tier: Tier_co, breaker: CircuitBreaker, statistics: StatisticsRecorder) -> None:
        self.tier = tier
        self.breaker = breaker
        self.name = tier.tier_type
        self.enabled = tier.enabled
        # Whether it is skipped because what it keeps its entries in turned out to be damaged or gone.
        self.is_lost = False
        self._statistics = statistics
        self._read_latency = statistics.latency(self.name, "read")
        self._latencies = {"read": self._read_latency, "write": statistics.latency(self.name, "write")}

    @property
    def is_open(self) -> bool:
        """Whether the tier is switched on, and is not skipped."""
        return self.enabled and not self.breaker.is_open

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
        if self.breaker.failures:
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

    def maintain(self) -> None:
        """Let the tier do background work: a failure counts; success says nothing, since it may be idle."""
        try:
            self.tier.maintain()
        except TierError as error:
            self._record_failure("background", error)

    def give_up(self, error: TierError) -> None:
        """Skip the tier from now on, whatever it did before."""
        self.is_lost = isinstance(error, TierLostError)
        if self.breaker.force_open():
            logger.warning("tier degraded", extra=self.describe(error))

    def describe(self, error: TierError | None = None) -> dict[str, str]:
        """Fields for a line of the log."""
        fields = {"tier": str(self.name), "backend": self.tier.backend}
        return fields if error is None else {**fields, "error": str(error)}

    def _record_failure(self, kind: str, error: TierError) -> None:
        self._statistics.record_error(self.name)
        if isinstance(error, TierLostError):
            self.give_up(error)
        elif not isinstance(error, NoDescriptorsError) and self.breaker.record_failure(kind):
            logger.warning("tier degraded", extra=self.describe(error))
