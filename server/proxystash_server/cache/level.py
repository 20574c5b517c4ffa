"""One disk tier as the others see it: guarded by its breaker, with the changes it has missed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, ParamSpec, TypeVar

from proxystash_server.cache.breaker import CircuitBreaker
from proxystash_server.cache.errors import TierError
from proxystash_server.cache.statistics import StatisticsRecorder
from proxystash_server.cache.tiers.base import EVERYTHING, DurableTier

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


class DiskLevel:
    """One disk tier with its breaker and its backlog (the keys it has missed). Thread-safe."""

    def __init__(self, tier: DurableTier, breaker: CircuitBreaker, statistics: StatisticsRecorder) -> None:
        self.tier = tier
        self.breaker = breaker
        self.name = tier.tier_type
        self._statistics = statistics
        self._lock = threading.Lock()
        self._missed: dict[str, int] = {}

    @property
    def enabled(self) -> bool:
        """Whether the configuration wants this tier."""
        return self.tier.enabled

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
        return self.works and key not in self._missed

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
            self._statistics.record_error(self.name)
            if self.breaker.record_failure():
                logger.warning("tier degraded", extra=self.describe(error))
            return False, default
        self.breaker.record_success()
        self._statistics.latency(self.name, kind).record(time.perf_counter_ns() - started)
        return True, result

    def write(
        self, operation: Callable[Arguments, object], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> bool:
        """Attempt a write whose result is of no interest; whether it worked."""
        return self.attempt("write", None, operation, *args, **kwargs)[0]
