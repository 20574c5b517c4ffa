"""What is to be done at a time, by time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import islice
from typing import Any, Final

# From so many on, timers that were cancelled are taken out as soon as they are the greater part.
_WORTH_TIDYING: Final = 1024


class Timer:
    """One thing to do. `function` is None once it is done, or cancelled."""

    __slots__ = ("arguments", "function")

    def __init__(self, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self.function: Callable[..., None] | None = function
        self.arguments = arguments


class Timers:
    """A heap of timers: O(log n) to add, O(1) to cancel. Not thread-safe."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._added = 0
        self._cancelled = 0

    def __len__(self) -> int:
        """How many there are, cancelled ones included."""
        return len(self._heap)

    def add(self, when: float, function: Callable[..., None], *arguments: Any) -> Timer:  # noqa: ANN401 -- the function's
        """Have `run_due` call `function` from `when` on."""
        timer = Timer(function, arguments)
        self._added += 1
        heapq.heappush(self._heap, (when, self._added, timer))
        return timer

    def cancel(self, timer: Timer) -> None:
        """Never call it, if that has not happened; idempotent."""
        if timer.function is None:
            return
        timer.function = None
        timer.arguments = ()
        self._cancelled += 1
        if self._cancelled > _WORTH_TIDYING and 2 * self._cancelled > len(self._heap):
            self._heap = [item for item in self._heap if item[2].function is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0

    @property
    def next_at(self) -> float | None:
        """When the first is due, or was cancelled; None if there are none."""
        return self._heap[0][0] if self._heap else None

    def first(self, most: int) -> list[tuple[float, Callable[..., None], tuple[Any, ...]]]:
        """Up to `most` of the timers that come first, if not all: when, and what, in order.

        Cancelled ones take nobody's place, as many as are left in among few.
        """
        found: list[tuple[float, Callable[..., None], tuple[Any, ...]]] = []
        for when, _, timer in islice(self._heap, most + _WORTH_TIDYING):
            if timer.function is not None:
                found.append((when, timer.function, timer.arguments))
                if len(found) == most:
                    break
        found.sort(key=lambda item: item[0])
        return found

    def run_due(self, now: float, most: int) -> bool:
        """Do up to `most` that are due, in order; whether there may be more."""
        for _ in range(most):
            if not self._heap or self._heap[0][0] > now:
                return False
            _, _, timer = heapq.heappop(self._heap)
            if timer.function is None:
                self._cancelled -= 1
                continue
            function, arguments = timer.function, timer.arguments
            # What it was for may refer to it.
            timer.function, timer.arguments = None, ()
            function(*arguments)
        return True
