"""When a failing tier is skipped, and when it is tried again."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

FAILURES_TO_OPEN = 3
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0


class CircuitBreaker:
    """Counts a tier's failures in a row; at three it opens, and the tier is skipped until a probe has worked.

    Reads and writes are counted apart: on a full disk every read works.

    Between probes it waits 1 s, then twice as long each time up to 60 s, less a random part of up to half so
    that several tiers or servers do not probe in step. Thread-safe; it never calls out while it holds its
    lock.

    `is_open` says whether the tier is to be skipped. `failures` counts those in a row, by their kind: while
    it is empty, there is no success to record.
    """

    def __init__(self, monotonic: Callable[[], float], jitter: Callable[[], float] = random.random) -> None:
        self._monotonic = monotonic
        self._jitter = jitter
        self._lock = threading.Lock()
        self.is_open = False
        self.failures: dict[str, int] = {}
        self._pause = FIRST_PAUSE
        self._probe_at = 0.0
        self._probing = False

    def record_success(self, kind: str) -> None:
        """Note an operation of a kind that worked; failures of that kind before it no longer count."""
        if self.failures:
            with self._lock:
                self.failures.pop(kind, None)

    def record_failure(self, kind: str) -> bool:
        """Note an operation of a kind that failed; return whether this one opened the breaker."""
        with self._lock:
            self.failures[kind] = self.failures.get(kind, 0) + 1
            if self.is_open or self.failures[kind] < FAILURES_TO_OPEN:
                return False
            self._open_now()
            return True

    def force_open(self) -> bool:
        """Open at once, as for a tier that could not be started; return whether it was closed before."""
        with self._lock:
            if self.is_open:
                return False
            self._open_now()
            return True

    def begin_probe(self, *, at_once: bool = False) -> bool:
        """Claim the next probe, if it is due, or wanted at once, and nobody else is probing."""
        with self._lock:
            if not self.is_open or self._probing or (self._monotonic() < self._probe_at and not at_once):
                return False
            self._probing = True
            return True

    def end_probe(self, worked: bool) -> None:
        """Report the claimed probe: close the breaker, or wait twice as long before the next."""
        with self._lock:
            self._probing = False
            if worked:
                self.is_open = False
                self.failures.clear()
            else:
                self._pause = min(self._pause * 2, LONGEST_PAUSE)
                self._schedule()

    def _open_now(self) -> None:
        self.is_open = True
        self._pause = FIRST_PAUSE
        self._schedule()

    def _schedule(self) -> None:
        self._probe_at = self._monotonic() + self._pause * (1 - self._jitter() / 2)
