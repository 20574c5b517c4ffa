"""The time, as the pool sees it: a steady clock to measure by, and the wall clock to tell."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from proxystash_server.cache.entry.entry import Clock, wall_clock

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def _steady() -> float:
    # Goes on while the machine is suspended, as the clocks of those who hold leases do.
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _boot() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


class Clocks(NamedTuple):
    """`wall` is in microseconds since the epoch and may step; `steady` in seconds, and never does.

    `boot` names what the steady clock counts from, so that a later process can go on with it; empty if that
    is not known.
    """

    wall: Clock
    steady: Callable[[], float]
    boot: str


def system_clocks() -> Clocks:
    """The machine's."""
    return Clocks(wall_clock, _steady, _boot())


class Timeline:
    """Steady times as absolute ones and back, in a way that survives restarts and steps of the wall clock.

    Both clocks are read once. A later process of the same boot goes by the steady clock, so that a wall clock
    that was set meanwhile moves nothing; after another boot the wall clock is all there is.
    """

    def __init__(self, clocks: Clocks) -> None:
        self._boot = clocks.boot
        self._wall_us = clocks.wall()
        self._steady = clocks.steady()

    def to_dict(self) -> dict[str, object]:
        return {"boot": self._boot, "wall_us": self._wall_us, "steady": self._steady}

    def absolute(self, steady: float) -> int:
        """Microseconds since the epoch, as the wall clock stood when this was made."""
        return self._wall_us + round((steady - self._steady) * 1_000_000)

    def reader_of(self, written: dict[str, object]) -> Callable[[int], float]:
        """What makes steady times of the absolute ones that were written beside `to_dict` of another.

        Raises KeyError or TypeError if `written` is none.
        """
        wall_us, steady = written["wall_us"], written["steady"]
        if not isinstance(wall_us, int) or not isinstance(steady, int | float):
            raise TypeError("no timeline")
        if not self._boot or written["boot"] != self._boot:
            wall_us, steady = self._wall_us, self._steady
        return lambda absolute: steady + (absolute - wall_us) / 1_000_000
