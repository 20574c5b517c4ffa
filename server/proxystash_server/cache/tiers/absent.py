"""A disk tier that is switched off by configuration: it holds nothing and takes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from proxystash_server.cache.coherence.uses import Use
from proxystash_server.cache.config import CacheTierConfig, CacheTierType
from proxystash_server.cache.entry.entry import CacheEntry, wall_clock
from proxystash_server.cache.tiers.base import Applied, DiskTier, EntryFilter, Page, Write


class AbsentTier(DiskTier):
    """Stands where a tier is disabled, so that nobody has to ask; `backend` is what it would have been."""

    notes: Mapping[str, object] = MappingProxyType({})
    last_version = 0
    busy = False

    def __init__(self, config: CacheTierConfig, tier_type: CacheTierType, backend: str) -> None:
        super().__init__(config, tier_type, wall_clock)
        self.backend = backend

    def open(self) -> None:
        pass

    def close(self) -> None:
        pass

    def probe(self) -> None:
        pass

    def stored_key_check(self) -> bytes | None:
        return None

    def note(self, **notes: object) -> None:
        pass

    def seal(self, version: int) -> None:
        pass

    def break_seal(self) -> int | None:
        return None

    def get(self, key: str) -> CacheEntry | None:
        return None

    def put(self, key: str, entry: CacheEntry) -> bool:
        return False

    def clear(self, version: int = 0) -> int:
        return 0

    def size(self) -> int:
        return 0

    def keys(self) -> list[str]:
        return []

    def __contains__(self, key: str) -> bool:
        return False

    def expired_keys(self, now_us: int) -> list[str]:
        return []

    def scan(self, after: str, limit: int, entry_filter: EntryFilter, now_us: int) -> Page:
        return Page([], None)

    def apply(self, writes: Sequence[Write]) -> list[Applied]:
        return [Applied(existed=False)] * len(writes)

    def note_uses(self, uses: Sequence[Use]) -> None:
        pass

    def trim(self) -> list[str]:
        return []
