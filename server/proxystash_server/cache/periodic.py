"""Background threads: the upkeep of the tiers, and the cleaner of expired entries."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, TypeVar

from proxystash_server.cache.errors import CacheClosedError

logger = logging.getLogger(__name__)

MAINTENANCE_SECONDS = 1.0

Owner = TypeVar("Owner")


class PeriodicWork(Generic[Owner]):
    """Calls `work` on `owner` every `interval` seconds, in a thread between `start` and `stop`.

    Keeps the owner only during a round. Ends by itself when that is gone, or when a round raises
    CacheClosedError. Any other round that fails is logged, and the next may do better. Raises ValueError for
    an interval that no thread can wait.
    """

    def __init__(self, name: str, interval: float, owner: Owner, work: Callable[[Owner], object]) -> None:
        if not 0 < interval <= threading.TIMEOUT_MAX:
            raise ValueError(f"an interval must be greater than 0 and at most {threading.TIMEOUT_MAX:,.0f} s")
        self._name = name
        self._interval = interval
        self._owner = weakref.ref(owner, self._end)
        self._work = work
        # A queue, since the garbage collector may run `_end` wherever a thread stands, also in here.
        self._ends: SimpleQueue[None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def is_running(self) -> bool:
        """Whether its thread is there: it was started, and has not ended since, for whatever reason."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Begin; does nothing while it runs already."""
        if not self.is_running:
            self._ends = SimpleQueue()
            self._thread = threading.Thread(
                target=self._run, args=(self._ends,), name=self._name, daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """End, and wait for the round under way."""
        if self._thread is not None:
            self._end()
            self._thread.join()
            self._thread = None

    def _end(self, _gone: object = None) -> None:
        self._ends.put(None)

    def _run(self, ends: SimpleQueue[None]) -> None:
        goes_on = True
        while goes_on:
            try:
                ends.get(timeout=self._interval)
            except Empty:
                goes_on = self._do_round()
            else:
                goes_on = False

    def _do_round(self) -> bool:
        """One round; whether there is to be another."""
        owner = self._owner()
        if owner is None:
            return False
        try:
            self._work(owner)
        except CacheClosedError:
            return False
        except Exception:
            # The tiers' own failures are handled below.
            logger.exception("background work failed", extra={"work": self._name})
        return True


class Cleanable(Protocol):
    """What a TTLManager cleans: a CacheManager."""

    def cleanup_expired(self) -> int:
        """Remove every expired entry; how many there were."""


def _remove_expired(cache_manager: Cleanable) -> None:
    cache_manager.cleanup_expired()


class TTLManager:
    """Removes expired entries every `cleanup_interval` seconds, in a thread between `start` and `stop`.

    Gets never return an expired entry whether it runs or not; it only gives the room back. It ends by itself
    when the manager is closed, or nobody holds it any more. Raises ValueError
    for an interval that is not greater than 0, or that no thread can wait (292 years).
    """

    def __init__(self, cache_manager: Cleanable, cleanup_interval: float = 60) -> None:
        self.cache_manager = cache_manager
        self.cleanup_interval = cleanup_interval
        self._cleaning = PeriodicWork("proxystash-ttl", cleanup_interval, cache_manager, _remove_expired)

    @property
    def enabled(self) -> bool:
        """Whether the cleaner is running."""
        return self._cleaning.is_running

    def start(self) -> None:
        """Start cleaning; does nothing while it runs already."""
        self._cleaning.start()

    def stop(self) -> None:
        """Stop cleaning and wait for the batch under way."""
        self._cleaning.stop()
