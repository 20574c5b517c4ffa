"""Background threads: the upkeep of the tiers, and the cleaner of expired entries."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from typing import Protocol

from proxystash_server.cache.errors import CacheClosedError

logger = logging.getLogger(__name__)

MAINTENANCE_SECONDS = 1.0


class PeriodicWork:
    """Calls a function every `interval` seconds, in a thread between `start` and `stop`.

    Raises ValueError for an interval that no thread can wait.
    Ends by itself when that raises CacheClosedError. Any other round that fails is logged, and the next may
    do better.
    """

    def __init__(self, name: str, interval: float, work: Callable[[], object]) -> None:
        if not 0 < interval <= threading.TIMEOUT_MAX:
            raise ValueError(f"an interval must be greater than 0 and at most {threading.TIMEOUT_MAX:,.0f} s")
        self._name = name
        self._interval = interval
        self._work = work
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_running(self) -> bool:
        """Whether its thread is there: it was started, and has not ended since, for whatever reason."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Begin; does nothing while it runs already."""
        if not self.is_running:
            self._stopping.clear()
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End, and wait for the round under way."""
        if self._thread is not None:
            self._stopping.set()
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while not self._stopping.wait(self._interval):
            try:
                self._work()
            except CacheClosedError:
                return
            except Exception:
                # The tiers' own failures are handled below.
                logger.exception("background work failed", extra={"work": self._name})


def while_held(method: Callable[[], object]) -> Callable[[], object]:
    """A method as a function that does not keep its object; CacheClosedError once that is gone."""
    held = weakref.WeakMethod(method)

    def call() -> object:
        bound = held()
        if bound is None:
            raise CacheClosedError("the cache is gone")
        return bound()

    return call


class Cleanable(Protocol):
    """What a TTLManager cleans: a CacheManager."""

    def cleanup_expired(self) -> int:
        """Remove every expired entry; how many there were."""


class TTLManager:
    """Removes expired entries every `cleanup_interval` seconds, in a thread between `start` and `stop`.

    Gets never return an expired entry whether it runs or not; it only gives the room back. Raises ValueError
    for an interval that is not greater than 0, or that no thread can wait (292 years).
    """

    def __init__(self, cache_manager: Cleanable, cleanup_interval: float = 60) -> None:
        self.cache_manager = cache_manager
        self.cleanup_interval = cleanup_interval
        self._cleaning = PeriodicWork("proxystash-ttl", cleanup_interval, self._clean)

    @property
    def enabled(self) -> bool:
        """Whether the cleaner is running."""
        return self._cleaning.is_running

    def _clean(self) -> None:
        self.cache_manager.cleanup_expired()

    def start(self) -> None:
        """Start cleaning; does nothing while it runs already."""
        self._cleaning.start()

    def stop(self) -> None:
        """Stop cleaning and wait for the batch under way."""
        self._cleaning.stop()
