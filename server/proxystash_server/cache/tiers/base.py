"""The interface of a tier: what the manager knows of every backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from proxystash.models import HealthStatus
from proxystash_server.cache.access_log import Access
from proxystash_server.cache.config import CacheTierConfig, CacheTierType
from proxystash_server.cache.entry import CacheEntry, Clock

EXPIRY_BATCH = 100
# The backlog mark that stands for every key: the tier missed a Clear. No entry has an empty key.
EVERYTHING = ""


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
    """One change to one key: an entry to store, or None to remove what is there.

    `version` numbers the change. `for_backlog` marks it as one that the other disk tier has missed.
    """

    key: str
    entry: CacheEntry | None
    version: int = 0
    for_backlog: bool = False


class Applied(NamedTuple):
    """What a write found and caused: whether the key was held before, and which keys had to make room."""

    existed: bool
    evicted: tuple[str, ...] = ()


# The usual ones, by whether the key was held before.
QUIETLY_APPLIED = (Applied(existed=False), Applied(existed=True))


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

    @abstractmethod
    def keys(self) -> list[str]:
        """Every key held, in no order."""

    @abstractmethod
    def __contains__(self, key: str) -> bool:
        """Whether `key` is held."""

    @abstractmethod
    def expired_keys(self, now_us: int, limit: int) -> list[str]:
        """At most `limit` keys whose entries have expired by `now_us`."""

    @abstractmethod
    def scan(self, after: str, limit: int, entry_filter: EntryFilter, now_us: int) -> Page:
        """At most `limit` live entries that match, by key, from the first key greater than `after`."""

    def page(self, after: str, limit: int, entry_filter: EntryFilter, now_us: int) -> list[CacheEntry]:
        """The first `limit` live entries that match, by key, however many have to be looked at."""
        return whole_page(lambda place, rest: self.scan(place, rest, entry_filter, now_us), after, limit)

    def cleanup_expired(self) -> int:
        """Remove what has expired from this tier alone; how many entries that were."""
        removed = 0
        while keys := self.expired_keys(self._clock(), EXPIRY_BATCH):
            removed += sum(self.delete(key) for key in keys)
        return removed


class DurableTier(CacheTier):
    """A tier whose entries outlive the process, with its part in keeping the two disk tiers coherent.

    Each durable tier carries a *backlog* for its partner, the other one: the keys whose last change the
    partner has missed, with the version of that change, kept as durably as the entries. It also carries two
    names, its own and its partner's, by which a restart recognizes that the two still belong together.
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
    def store_id(self) -> str:
        """The random name this store got when it was created."""

    @property
    @abstractmethod
    def partner_id(self) -> str:
        """The name of the store this one last worked with; empty if it worked alone."""

    @property
    def is_new(self) -> bool:
        """Whether the store has just been created, and has never had a partner or an entry."""
        return not self.partner_id and not self.size()

    @property
    @abstractmethod
    def session(self) -> str:
        """The random name of the run in which the two last worked together."""

    @abstractmethod
    def set_partner(self, partner_id: str, session: str) -> None:
        """Remember the partner, and the run in which both were told so."""

    @property
    @abstractmethod
    def doubtful(self) -> bool:
        """Whether this store may have lost its latest changes unnoticed.

        So that its entries need a second witness.
        """

    @property
    @abstractmethod
    def last_version(self) -> int:
        """The greatest version of any change this store took; 0 if it cannot tell."""

    @abstractmethod
    def versions(self, keys: Sequence[str]) -> dict[str, int]:
        """The versions of those of `keys` that are held."""

    @abstractmethod
    def apply(self, writes: Sequence[Write]) -> list[Applied]:
        """Make changes, durable on return; concurrent callers may share one commit.

        A TierError leaves open which of them were made.
        """

    def announce(self, marks: Mapping[str, int]) -> None:
        """Changes by key and version, which follow here first and then in the partner.

        From the commit of such a change on, its key is in the partner's backlog, until `settle` or `arrived`
        names it. Costs no commit of its own. Only a tier that may come first, as L3, knows how.
        """
        raise NotImplementedError(f"{self.backend} is not made to take changes before its partner")

    def arrived(self, keys: Iterable[str]) -> None:
        """The partner has what was announced of `keys`.

        A later commit notes it: after a crash before that, marks have outlived their cause.
        """
        raise NotImplementedError(f"{self.backend} is not made to take changes before its partner")

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether a commit is under way, for which a write now would wait."""

    @abstractmethod
    def touch(self, accesses: Sequence[Access]) -> None:
        """Store how entries were used since, where the entry is still the one that was used."""

    @abstractmethod
    def backlog(self) -> dict[str, int]:
        """The partner's backlog: keys and versions of missed changes. EVERYTHING stands for a Clear."""

    @abstractmethod
    def extend_backlog(self, marks: Mapping[str, int]) -> None:
        """Mark changes, by key (or EVERYTHING) and version, as missed by the partner."""

    @abstractmethod
    def settle(self, keys: Iterable[str]) -> None:
        """Drop keys from the partner's backlog: it has caught up on them."""

    @abstractmethod
    def clear_before(self, version: int) -> None:
        """Remove the entries that writes before `version` stored: a Clear that was missed, made up for."""

    @abstractmethod
    def trim(self) -> list[str]:
        """Evict what is over `max_entries`, as after a change of configuration; the keys evicted."""

    def maintain(self) -> None:
        """Background work in a slice small enough that nobody waits for it, e.g. compaction.

        Raises TierError.
        """

    def put(self, key: str, entry: CacheEntry) -> bool:
        self.apply([Write(key, entry)])
        return True

    def delete(self, key: str) -> bool:
        return self.apply([Write(key, None)])[0].existed

    def get_to_change(self, key: str) -> CacheEntry | None:
        """As `get`, for who is about to change the entry: it may wait for a commit that is under way."""
        return self.get(key)

    def failed_of(self, keys: Sequence[str]) -> dict[str, CacheEntry]:
        """The entries of those of `keys` that are held and have failed before, as `get` gives them."""
        found = ((key, self.get(key)) for key in keys)
        return {key: entry for key, entry in found if entry is not None and entry.failure_count}

    def has_room_for(self, entries: int) -> bool:
        """Whether so many new keys would make no other go."""
        return self.config.max_entries is None or self.size() + entries <= self.config.max_entries


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
