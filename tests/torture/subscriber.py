"""A subscriber of the change feed, and whether what it knows is what the cache holds."""

from __future__ import annotations

from collections.abc import Sequence

from proxystash_server.cache import CacheManager
from proxystash_server.cache.coherence.feed import Change, ChangeKind
from tests.torture.model import Seen
from tests.torture.stores import seen_in


class Subscriber:
    """Keeps a copy of the cache from what the change feed tells, begun anew where that says so."""

    def __init__(self) -> None:
        self._copy: dict[str, tuple[Seen, int]] | None = None
        self._revision = 0
        self._out_of_order: Change | None = None

    def hear(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if change.revision <= self._revision:
                self._out_of_order = change
            self._revision = change.revision
            if change.kind is ChangeKind.RESET:
                self._copy = None
            elif self._copy is None:
                continue
            elif change.kind is ChangeKind.CLEAR:
                self._copy.clear()
            elif change.entry is not None:
                self._copy[change.key] = seen_in(change.entry), change.entry.expires_at_us
            else:
                self._copy.pop(change.key, None)

    def compare(self, listed: dict[str, Seen], manager: CacheManager, now_us: int) -> None:
        """Given an exact list: the copy is the same."""
        assert self._out_of_order is None, f"told out of order: {self._out_of_order}"
        if self._copy is None:
            # With what has expired: the clock may be set back.
            entries = map(manager.l3_tier.get, manager.l3_tier.keys())
            self._copy = {entry.key: (seen_in(entry), entry.expires_at_us) for entry in entries if entry}
        live = {key: seen for key, (seen, expires_at_us) in self._copy.items() if expires_at_us > now_us}
        assert live == listed, f"a subscriber has {live}, the cache {listed}"
