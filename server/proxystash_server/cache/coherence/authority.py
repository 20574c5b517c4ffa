"""The authority: the slowest disk tier, which decides, with the changes that it has missed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import Enum, auto
from typing import NamedTuple

from proxystash_server.cache.coherence.guard import GuardedTier
from proxystash_server.cache.coherence.missed import MissedChanges
from proxystash_server.cache.coherence.uses import Use
from proxystash_server.cache.config import CacheTierType
from proxystash_server.cache.entry.entry import CacheEntry
from proxystash_server.cache.errors import CacheUnavailableError, TierError
from proxystash_server.cache.tiers.base import (
    PERHAPS_HELD,
    Applied,
    AuthorityTier,
    Decide,
    Held,
    HeldEntry,
    Read,
    Write,
)


class Committed(NamedTuple):
    """What became of a group of changes.

    `applied` has what the tier says of each write, and is empty if it did not take them. `refused` are the
    keys whose change nobody could take; `in_doubt` says that the tier may have made it all the same. Without
    `lasts`, what was not refused stands in memory alone.
    """

    writes: Sequence[Write]
    applied: Sequence[Applied] = ()
    refused: frozenset[str] = frozenset()
    in_doubt: bool = False
    lasts: bool = True


class Cleared(Enum):
    """What became of a Clear: it is kept, it was refused, or it was refused and may have been made."""

    DONE = auto()
    REFUSED = auto()
    IN_DOUBT = auto()


class Authority:
    """The tier that decides what is held, and the journal of what it has missed.

    A change goes to the tier, or if that cannot take it, to the journal; the tier is not asked for a key
    whose change it has missed. A key that stands in the journal is written there first, whatever the tier
    does, so that after a crash the journal never brings back something older. Where no disk tier is
    switched on, memory is all there is, and takes everything.
    """

    def __init__(
        self, guard: GuardedTier[AuthorityTier] | None, missed: MissedChanges, *, memory_keeps: bool
    ) -> None:
        self._guard = guard
        self.missed = missed
        self._memory_keeps = memory_keeps
        # The last row that it has lost, and the last one before it was filled up: a new object for each,
        # since damage comes to light in any thread, also while it is filled up.
        self.last_damage: object = None
        self.made_good: object = None

    @property
    def enabled(self) -> bool:
        """Whether any disk tier is switched on."""
        return self._guard is not None

    @property
    def guard(self) -> GuardedTier[AuthorityTier]:
        """The tier that decides; there must be one."""
        assert self._guard is not None
        return self._guard

    @property
    def tier(self) -> AuthorityTier:
        """The same, by itself."""
        return self.guard.tier

    @property
    def name(self) -> CacheTierType:
        """Which of the tiers decides; memory, if nobody else does."""
        return CacheTierType.L1 if self._guard is None else self._guard.name

    @property
    def works(self) -> bool:
        """Whether the tier takes part in reads and changes now."""
        guard = self._guard
        return guard is not None and not guard.breaker.is_open and not self.missed.cleared_at

    @property
    def knows_all(self) -> bool:
        """Whether the tier works and has missed nothing."""
        return self.works and not self.missed.pending

    @property
    def is_incomplete(self) -> bool:
        """Whether the tier works, but has lost rows that others may hold."""
        return self.works and (
            self.last_damage is not self.made_good or bool(self.tier.notes.get("incomplete"))
        )

    def keeps(self, key: str) -> bool:
        """Whether what is held of `key` outlasts memory."""
        return self._guard is not None and not self.missed.is_unsaved(key)

    def commit(self, keys: Sequence[str], decide: Decide, current: Read) -> Committed:
        """Have `decide` say what becomes of `keys`, which are locked, and keep that durably.

        `current` gives an entry as it is now for whatever the tier cannot say; it raises
        CacheUnavailableError if nobody can.
        """
        if self._guard is None:
            return Committed(_decide(keys, decide, current, knows_all=True))
        decided: Sequence[Write] | None = None
        in_doubt = False
        if self.works:
            if self.missed.is_in_use and any(map(self.missed.holds, keys)):
                return self._commit_both(keys, decide, current)

            def remember(held: Mapping[str, Held], read: Read) -> Sequence[Write]:
                nonlocal decided
                decided = decide(held, read)
                return decided

            worked, committed = self._guard.attempt("write", None, self._guard.tier.commit, keys, remember)
            if worked and committed is not None:
                return Committed(*committed)
            in_doubt = True
        # What the tier has decided and perhaps made is not decided again: it would be made twice.
        writes = _decide(keys, decide, current, knows_all=self.works) if decided is None else decided
        if not writes:
            return Committed(writes, in_doubt=in_doubt)
        try:
            self.missed.append(writes)
        except TierError:
            return self._keep_in_memory(writes, in_doubt=in_doubt)
        return Committed(writes)

    def clear(self, version: int) -> Cleared:
        """Remove everything. All is locked."""
        if self._guard is None:
            return Cleared.DONE
        missed = self.missed
        cleared = False
        failed = Cleared.REFUSED
        try:
            if missed.is_in_use or not self._guard.is_open:
                # First, or after a crash the journal would bring back what stands in it.
                missed.append_clear(version)
                cleared = True
            if self._guard.is_open:
                failed = Cleared.IN_DOUBT
                if self._guard.write(self._guard.tier.clear, version):
                    missed.cleared()
                    return Cleared.DONE
            if not cleared:
                missed.append_clear(version)
        except TierError:
            return failed
        return Cleared.DONE

    def disown_cache(self) -> None:
        """Note that no cache on disk holds all that it should; what one holds is then not brought back."""
        if self.works and self.tier.notes.get("cache_id"):
            self.guard.write(self.tier.note, cache_id="")

    def note_uses(self, uses: Sequence[Use]) -> bool:
        """Store how entries were used; whether that may be forgotten elsewhere."""
        if self._guard is None:
            return True
        told = uses
        if not self.works or self.missed.pending:
            # It cannot know them of an entry that it has missed.
            told = [use for use in uses if self.works and not self.missed.covers(use.key)]
            known = {use.key for use in told}
            self.missed.add_uses(use for use in uses if use.key not in known)
        return not told or self._guard.write(self._guard.tier.note_uses, told)

    def _commit_both(self, keys: Sequence[str], decide: Decide, current: Read) -> Committed:
        # What memory alone had, and has lost, may still be told of.
        writes = _decide(keys, decide, current, knows_all=False)
        try:
            self.missed.append(writes)
        except TierError:
            return Committed(writes, refused=frozenset(keys))
        worked, committed = self.guard.attempt(
            "write", None, self.tier.commit, keys, lambda _held, _read: writes
        )
        if not worked or committed is None:
            return Committed(writes)
        self.missed.mark_applied([write.key for write in writes])
        # What it still held because it had missed the removal was held no more.
        return Committed(writes, [one._replace(existed=False) for one in committed[1]])

    def _keep_in_memory(self, writes: Sequence[Write], *, in_doubt: bool) -> Committed:
        """Nobody can write anything down: memory keeps entries, but no removal for good."""
        kept = [write for write in writes if write.entry is not None and self._memory_keeps]
        self.missed.note_unsaved(kept)
        keys = {write.key for write in writes} - {write.key for write in kept}
        return Committed(writes, refused=frozenset(keys), in_doubt=in_doubt, lasts=False)


def _decide(keys: Sequence[str], decide: Decide, current: Read, *, knows_all: bool) -> Sequence[Write]:
    """What `decide` makes of the keys as they are now, as far as anybody can say.

    `knows_all` says whether a key that `current` does not find is not held.
    """
    entries: dict[str, CacheEntry | None] = {}
    for key in keys:
        with suppress(CacheUnavailableError):
            entries[key] = current(key)

    def read(key: str) -> CacheEntry | None:
        if key not in entries:
            raise CacheUnavailableError("a tier that may hold the entry failed; try again")
        return entries[key]

    held: dict[str, Held] = {}
    for key in keys:
        entry = entries.get(key)
        if entry is not None:
            held[key] = HeldEntry(entry.version, entry.failure_count > 0)
        elif not (knows_all and key in entries):
            held[key] = PERHAPS_HELD
    return decide(held, read)


def newest(writes: Mapping[str, Write]) -> Decide:
    """A decision for writes that the tier has missed: each is made unless the tier has something newer."""

    def decide(held: Mapping[str, Held], _read: object) -> list[Write]:
        return [
            write for key, write in writes.items() if key not in held or held[key].version <= write.version
        ]

    return decide
