"""L2 as a cache on disk: what it holds may be asked for, and may be lost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from proxystash_server.cache.coherence.guard import GuardedTier
from proxystash_server.cache.config import CacheTierType
from proxystash_server.cache.errors import TierError
from proxystash_server.cache.tiers.base import Applied, DiskTier, Write

_NOTHING_APPLIED: list[Applied] = []


class DiskCache:
    """The disk tier in front of the authority, if there is one.

    It holds nothing that the authority does not hold, or has not missed. A key whose last change it could not
    take is *doubted*: it is not asked for it until it has dropped it. That needs no writing down, since after
    an unclean end nothing it holds is believed. The keys that a method names are locked by the caller.

    `believed` is off while that cannot be told, because the authority is out of reach: it is then left alone.
    """

    def __init__(self, guard: GuardedTier[DiskTier]) -> None:
        self.guard = guard
        self.name: CacheTierType = guard.name
        self.tier = guard.tier
        self.doubted: set[str] = set()
        self.believed = True

    @property
    def works(self) -> bool:
        """Whether it takes part in reads and changes now."""
        return self.believed and self.guard.is_open

    def serves(self, key: str) -> bool:
        """Whether it may be asked for `key`."""
        # `works`, written out: every lookup below L1 comes here.
        guard = self.guard
        if not self.believed or guard.breaker.is_open or not guard.enabled:
            return False
        return not self.doubted or key not in self.doubted

    def apply(self, writes: Sequence[Write]) -> tuple[bool, list[Applied]]:
        """Attempt changes: whether it took them, and what became of each."""
        worked, applied = self.guard.attempt("write", _NOTHING_APPLIED, self.tier.apply, writes)
        if not worked:
            self.doubt(write.key for write in writes)
        elif self.doubted:
            for place, write in enumerate(writes):
                if write.key in self.doubted:
                    self.doubted.discard(write.key)
                    # What it still held because it had missed the removal was held no more.
                    applied[place] = applied[place]._replace(existed=False)
        return worked, applied

    def doubt(self, keys: Iterable[str]) -> None:
        """It may hold something outdated of these keys."""
        if self.guard.enabled:
            self.doubted.update(keys)

    def drop_doubted(self, keys: Sequence[str]) -> None:
        """Attempt to drop what it holds of those keys that are doubted still."""
        keys = [key for key in keys if key in self.doubted]
        if self.guard.write(self.tier.apply, [Write(key, None) for key in keys]):
            self.doubted.difference_update(keys)

    def clear(self) -> bool:
        """Empty it; whether that worked. If not, it is skipped, and emptied before it is used again."""
        if not self.works:
            return False
        if not self.guard.write(self.tier.clear):
            self.guard.give_up(TierError("it could not be emptied"))
        self.doubted.clear()
        return self.works
