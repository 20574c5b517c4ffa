"""How fast the counts of statistics grow."""

from __future__ import annotations

from typing import Final

from proxystash.models import CacheStatistics

Rates = dict[str, float]

_COUNTS: Final = ("hits", "misses", "promotions", "demotions", "removals")


class RateMeter:
    """Gives how much the cache's counts have grown a second since the snapshot before, by name.

    None for the first snapshot, and for the first after a restart of the server.
    """

    def __init__(self) -> None:
        self._before: CacheStatistics | None = None

    def __call__(self, now: CacheStatistics) -> Rates | None:
        before, self._before = self._before, now
        if before is None or before.started_at != now.started_at:
            return None
        seconds = (now.observed_at - before.observed_at).total_seconds()
        if seconds <= 0:
            return None
        return {name: (getattr(now, name) - getattr(before, name)) / seconds for name in _COUNTS}
