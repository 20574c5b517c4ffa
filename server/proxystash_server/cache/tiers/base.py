"""The interfaces of a tier: what all have in common, and what a cache on disk and the authority add."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from proxystash.models import HealthStatus
from proxystash_server.cache.coherence.uses import Use
from proxystash_server.cache.config import CacheTierConfig, CacheTierType
from proxystash_server.cache.entry.entry import CacheEntry, Clock


@dataclass(frozen=True, slots=True)
class EntryFilter:
    """Which entries a listing wants; each field that is set narrows it."""

    source: str = ""
    health_statuses: frozenset[HealthStatus] = frozenset()
    schemes: frozenset[str] = frozenset()
    labels: dict[str, str] = field(default_factory=dict)

    def matches(self, entry: CacheEntry) -> bool:
        """Whether `entry` is wanted."""
        return (
            (not self.source or entry.source == self.source)
            and (not self.health_statuses or entry.health_status in self.health_statuses)
            and (not self.schemes or entry.proxy_url.partition("://")[0] in self.schemes)
            and all(entry.labels.get(name) == value for name, value in self.labels.items())
        )


class Write(NamedTuple):
    """What a change makes of one key: an entry to store, or None to remove what is there.

    `version` is the revision of the change.
    """

    key: str
    entry: CacheEntry | None
    version: int = 0


class Applied(NamedTuple):
    """What a write found and caused: whether the key was held before, and which keys had to make room."""

    existed: bool
    evicted: tuple[str, ...] = ()


# The usual ones, by whether the key was held before.
QUIETLY_APPLIED = (Applied(existed=False), Applied(existed=True))


def evicted_by(writes: Sequence[Write], applied: Sequence[Applied]) -> list[str]:
    """The keys that had to make room for writes, but for those that a later one of them has stored again."""
    for one in applied:
        if one.evicted:
            break
    else:
        return []
    evicted: dict[str, None] = {}
    for write, one in zip(writes, applied, strict=True):
        evicted.pop(write.key, None)
        evicted.update(dict.fromkeys(one.evicted))
    return list(evicted)


class Held(Protocol):
    """What an authority says of a key at little cost while it is decided what becomes of it."""

    @property
    def version(self) -> int:
        """The version of the entry; 0 if that is damaged."""

    @property
    def has_failed(self) -> bool:
        """Whether its failure count is not 0, or damaged."""


class HeldEntry(NamedTuple):
    """The same of an entry that was read."""

    version: int
    has_failed: bool


# Of a key that may be held, but nobody can say.
PERHAPS_HELD: Final = HeldEntry(0, has_failed=False)

# Gives the entry of a key, whole, or None; raises CacheUnavailableError where nobody can say.
Read = Callable[[str], CacheEntry | None]
# Given what is held of the keys, and how to read an entry whole, what is to become of them.
Decide = Callable[[Mapping[str, Held], Read], Sequence[Write]]


class Page(NamedTuple):
    """What a stretch of the keys holds, and the key behind which the next one begins; None behind the last.

    A stretch ends where a page is full, or sooner where enough entries were looked at that nobody waits: it
    may hold little, or nothing, and not be the last.
    """

    entries: list[CacheEntry]
    next_after: str | None


class CacheTier(ABC):
    """One storage level. Every method is thread-safe; a failure of the tier itself is a TierError.

    Reads return entries expired or not: expiry is decided above, by one clock.
    """

    backend: str

    def __init__(self, config: CacheTierConfig, tier_type: CacheTierType, clock: Clock) -> None:
        self.config = config
        self.tier_type = tier_type
        self.enabled = config.enabled
        self._clock = clock

    @abstractmethod
    def get(self, key: str) -> CacheEntry | None:
        """The entry as stored, or None. Does not count as a use."""

    @abstractmethod
    def put(self, key: str, entry: CacheEntry) -> bool:
        """Store `entry` under `key`, evicting another if the tier is full."""

    @abstractmethod
    def delete(self, key: str) -> bool:
        """Remove `key`; whether it was held."""

    @abstractmethod
    def clear(self) -> int:
        """Remove everything; how many entries there were."""

    @abstractmethod
    def size(self) -> int:
        """How many entries are held, without counting them."""

    @property
    def log_bytes(self) -> int:
        """The size of a write-ahead log; 0 for a tier without one."""
        return 0

    @abstractmethod
    def keys(self) -> list[str]:
        """Every key held, in no order."""

    @abstractmethod
    def __contains__(self, key: str) -> bool:
        """Whether `key` is held."""

    @abstractmethod
    def expired_keys(self, now_us: int) -> list[str]:
        """Keys whose entries have expired by `now_us`: all, or some where they are found without the rest."""

    @abstractmethod
    def scan(self, after: str, limit: int, entry_filter: EntryFilter, now_us: int) -> Page:
        """At most `limit` live entries that match, by key, from the first key greater than `after`."""

    def cleanup_expired(self) -> int:
        """Remove what has expired from this tier alone; how many entries that were."""
        removed = 0
        while keys := self.expired_keys(self._clock()):
            removed += sum(self.delete(key) for key in keys)
        return removed


class DiskTier(CacheTier):
    """A tier in files: what a cache on disk has to do.

    It may be emptied at any time. What it remembers beside its entries are *notes*: a few values by name, as
    durable as the entries.
    """

    @abstractmethod
    def open(self) -> None:
        """Make the store ready, creating it if need be; raises TierError, StoreFormatError.

        Also reopens after a fault.
        """

    @abstractmethod
    def close(self) -> None:
        """Release files and connections; idempotent."""

    @abstractmethod
    def probe(self) -> None:
        """Prove that the open store takes a write; raises TierError."""

    @abstractmethod
    def stored_key_check(self) -> bytes | None:
        """The check token of the store on disk, before it is opened; None where there is none.

        Changes nothing.
        """

    @property
    @abstractmethod
    def notes(self) -> Mapping[str, object]:
        """The notes of the open store. `id` is the random name that it got when it was made."""

    @abstractmethod
    def note(self, **notes: object) -> None:
        """Change notes; None drops one."""

    @property
    @abstractmethod
    def last_version(self) -> int:
        """The greatest version of any change this store took; 0 if it cannot tell."""

    @abstractmethod
    def seal(self, version: int) -> None:
        """Note that the store, about to be closed, has every change up to `version` that it should have."""

    @abstractmethod
    def break_seal(self) -> int | None:
        """What `seal` noted, if the files are as they were then; from now on it is noted no more."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether a commit is under way, for which a write now would wait."""

    @abstractmethod
    def clear(self, version: int = 0) -> int:
        """Remove everything, which is the change numbered `version`; how many entries there were."""

    @abstractmethod
    def apply(self, writes: Sequence[Write]) -> list[Applied]:
        """Make changes, durable on return. A TierError leaves open which of them were made."""

    @abstractmethod
    def note_uses(self, uses: Sequence[Use]) -> None:
        """Store how entries were used since, where the entry is still the one that was used."""

    @abstractmethod
    def trim(self) -> list[str]:
        """Evict what is over `max_entries`, as after a change of configuration; the keys evicted."""

    def maintain(self) -> None:
        """Background work in a slice small enough that nobody waits for it, e.g. compaction.

        Raises TierError.
        """

    def put(self, key: str, entry: CacheEntry) -> bool:
        self.apply([Write(key, entry, entry.version)])
        return True

    def delete(self, key: str) -> bool:
        return self.apply([Write(key, None)])[0].existed

    def has_room_for(self, entries: int) -> bool:
        """Whether so many new keys would make no other go."""
        return self.config.max_entries is None or self.size() + entries <= self.config.max_entries


class AuthorityTier(DiskTier):
    """A disk tier that decides: what it holds is what the cache holds."""

    @abstractmethod
    def commit(self, keys: Sequence[str], decide: Decide) -> tuple[Sequence[Write], list[Applied]]:
        """Have `decide` say what becomes of `keys`, and make that so, in one transaction; durable on return.

        What was decided, and what became of each write. Nothing else changes these keys in between. A
        TierError leaves open whether it was made.
        """

    @abstractmethod
    def versions(self, keys: Sequence[str]) -> dict[str, int]:
        """The versions of those of `keys` that are held."""

    @abstractmethod
    def clear_before(self, version: int) -> None:
        """Remove the entries that changes before `version` stored: a Clear of that number, made up for."""


def whole_page(scan: Callable[[str, int], Page], after: str, limit: int) -> list[CacheEntry]:
    """Scan on, from a key and for as many entries as are wanted still, until there are `limit` or no more."""
    entries: list[CacheEntry] = []
    place: str | None = after
    while place is not None and len(entries) < limit:
        page = scan(place, limit - len(entries))
        entries += page.entries
        place = page.next_after
    return entries


# The tier, the key of the damaged record where it is known, and the reason.
OnCorruption = Callable[[CacheTierType, str | None, str], None]
