"""Whether a history of leases can be explained by some order of its calls.

The search of linearizability.py, for proxies that may each have so many holders: an acquire takes one of a
proxy that has fewer, a release gives one back, and an acquire may be refused only when none has fewer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tests.torture.tally import BreachError


@dataclass(frozen=True, slots=True)
class LeaseOperation:
    """An acquire of `key`, None if it was refused, or a release of it.

    It was repeated until it was answered. Each attempt that was not may have kept a proxy from others until
    the end: `attempts` are the times at which they began.
    """

    key: str | None
    releases: bool
    invoked: float
    returned: float
    attempts: tuple[float, ...] = ()


class _Configuration(NamedTuple):
    """How far an attempt at an order has come; see linearizability.py. `holders` is by proxy."""

    low: int
    ahead: int
    holders: tuple[int, ...]


def check_leases(history: Sequence[LeaseOperation], limits: Mapping[str, int]) -> None:
    """Check a history that begins with no leases; raises BreachError if it has no explanation."""
    operations = sorted(history, key=lambda one: one.invoked)
    search = _Search(operations, limits)
    stack = [_Configuration(0, 0, (0,) * len(limits))]
    known = {stack[0]}
    furthest = stack[0]
    while stack:
        configuration = stack.pop()
        if configuration.low == len(operations):
            return
        furthest = max(furthest, configuration, key=lambda one: one.low)
        for following in search.following(configuration):
            if following not in known:
                known.add(following)
                stack.append(following)
    stuck = operations[furthest.low]
    lines = "\n".join(map(str, operations[max(0, furthest.low - 8) : furthest.low + 8]))
    raise BreachError(
        "withheld" if stuck.key is None else "lent twice",
        f"no order explains {stuck}, with {furthest.holders} holders of {dict(limits)}\n{lines}",
    )


class _Search:
    def __init__(self, operations: Sequence[LeaseOperation], limits: Mapping[str, int]) -> None:
        self._operations = operations
        self._places = {key: place for place, key in enumerate(limits)}
        self._limits = tuple(limits.values())
        # Attempts without an answer: what they had taken, if anything, the kill gave back.
        self._lost = [(attempt, one.returned) for one in operations for attempt in one.attempts]

    def following(self, at: _Configuration) -> list[_Configuration]:
        """The configurations one operation further on, the likeliest last."""
        candidates: list[int] = []
        first_return = math.inf
        for index in range(at.low, len(self._operations)):
            operation = self._operations[index]
            if operation.invoked > first_return:
                break
            if not at.ahead >> (index - at.low) & 1:
                candidates.append(index)
                first_return = min(first_return, operation.returned)
        following: list[_Configuration] = []
        for index in reversed(candidates):
            operation = self._operations[index]
            holders = self._after(operation, at.holders)
            if holders is None:
                continue
            placed = at.ahead | 1 << (index - at.low)
            low = at.low
            while placed & 1:
                placed >>= 1
                low += 1
            step = _Configuration(low, placed, holders)
            if operation.key is None:
                # It changes nothing, so that taking it now rules nothing out.
                return [step]
            following.append(step)
        return following

    def _after(self, operation: LeaseOperation, holders: tuple[int, ...]) -> tuple[int, ...] | None:
        """The holders after an operation; None if it cannot come now."""
        if operation.key is None:
            free = sum(self._limits) - sum(holders)
            lost = sum(
                begun < operation.returned and ended > operation.invoked
                for begun, ended in (self._lost if free else ())
            )
            return holders if free <= lost else None
        place = self._places[operation.key]
        count = holders[place] + (-1 if operation.releases else 1)
        if not 0 <= count <= self._limits[place]:
            return None
        return (*holders[:place], count, *holders[place + 1 :])
