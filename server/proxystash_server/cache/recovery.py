"""How the disk tiers are opened, matched with each other, and brought up to date after a fault.

Each tier's backlog (the changes it has missed) is kept by the other. Changes are numbered, and the numbers
grow, also across restarts. So a mark in a backlog that outlived its cause is recognized: the tier has a later
version by now, or the other tier's backlog has a later mark.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import ParamSpec, TypeVar

from proxystash_server.cache.errors import StoreError, TierError
from proxystash_server.cache.keylocks import KeyLocks
from proxystash_server.cache.level import DiskLevel, DiskPair, WriteOutcome
from proxystash_server.cache.tiers.base import EVERYTHING, CacheTier, Write
from proxystash_server.cache.versions import Versions

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

_REPLAY_BATCH = 100
# A store that has worked without its partner: whatever that partner holds is out of date.
ALONE = "alone"


class Recovery:
    """Opens, probes, matches and replays. Called at start and from one background thread at a time."""

    def __init__(
        self,
        pair: DiskPair,
        memory: CacheTier,
        locks: KeyLocks,
        versions: Versions,
        keep_key_file: Callable[[], None],
        on_evicted: Callable[[WriteOutcome], None],
    ) -> None:
        self._pair = pair
        self._memory = memory
        self._locks = locks
        self._versions = versions
        self._keep_key_file = keep_key_file
        self._on_evicted = on_evicted
        self._evictions: list[WriteOutcome] = []

    def open(self) -> None:
        """Open both tiers. One that cannot be opened starts degraded.

        Raises StoreError for a store that must not be opened, having closed the other.
        """
        try:
            for level in self._pair.levels:
                if level.enabled:
                    try:
                        self._open(level)
                        self._compare_marks(level)
                    except TierError as error:
                        level.give_up(error)
            if self._pair.both_open:
                with suppress(TierError):
                    # Whichever of the two failed was given up; the other serves alone.
                    self._match_partners()
        except StoreError:
            self._pair.close()
            raise
        for level in self._pair.levels:
            if level.is_open:
                self._replay(level)
        self._report_evictions()

    def _report_evictions(self) -> None:
        """Tell what had to make room for replayed entries, once the tier that evicted it serves again."""
        while self._evictions:
            self._on_evicted(self._evictions.pop())

    def maintain(self) -> None:
        """Probe what is degraded, work off backlogs, and give the tiers a slice of background work."""
        for level in self._pair.levels:
            if level.enabled and level.breaker.begin_probe():
                recovered = False
                try:
                    recovered = self._recover(level)
                finally:
                    level.breaker.end_probe(recovered)
                if recovered:
                    logger.info("tier recovered", extra=level.describe())
            if level.is_open:
                self._replay(level)
                level.tend(level.tier.maintain)
        self._report_evictions()

    def _open(self, level: DiskLevel) -> None:
        self._keep_key_file()
        level.tier.open()
        level.tier.probe()
        self._versions.continue_after(max(level.tier.last_version, *level.tier.backlog().values(), 0))
        if not self._pair.other(level).enabled and level.tier.partner_id != ALONE:
            level.tier.set_partner(ALONE, "")

    def _recover(self, level: DiskLevel) -> bool:
        try:
            with self._locks.hold_all():
                # Nothing begins to use a tier whose breaker is open; this waits for what had begun before.
                level.tier.close()
            self._open(level)
            with self._locks.hold_all():
                self._compare_marks(level)
                # What the other one missed while both were away was noted in memory alone.
                level.tier.extend_backlog(self._pair.other(level).missed())
                if level.tier.is_new:
                    # The old store was lost under a running cache, and memory knows some of what was in it.
                    level.add_missed(self._in_memory())
                if self._pair.other(level).is_open:
                    self._match_partners()
        except (TierError, StoreError):
            # Probed again after a longer pause; the fault was logged when the tier was degraded.
            return False
        return self._replay(level)

    # -- marks

    def _compare_marks(self, level: DiskLevel) -> None:
        """Take over the marks for the other tier that `level` had on disk, where it missed nothing later."""
        other = self._pair.other(level)
        marks = level.tier.backlog()
        if EVERYTHING in marks:
            # Killed between this mark for the other one and the Clear of this one: it is finished now.
            level.tier.clear_before(marks[EVERYTHING])
        here = level.missed()
        cleared_at = here.get(EVERYTHING, 0)
        outdated = [key for key, version in marks.items() if max(here.get(key, 0), cleared_at) > version]
        for key in outdated:
            del marks[key]
        if outdated:
            level.tier.settle(outdated)
        other.add_missed(marks)
        self._forget_in_memory(marks)
        self._pair.settle(level, [key for key, version in here.items() if marks.get(key, 0) > version])

    def _forget_in_memory(self, marks: Mapping[str, int]) -> None:
        """Take out of memory what was read from a tier that turns out to have missed a later change."""
        cleared_at = marks.get(EVERYTHING, 0)
        for key, version in self._in_memory().items():
            if version < max(marks.get(key, 0), cleared_at):
                self._memory.delete(key)

    def _in_memory(self) -> dict[str, int]:
        entries = (self._memory.get(key) for key in self._memory.keys())  # noqa: SIM118 -- no dict
        return {entry.key: entry.version for entry in entries if entry is not None}

    # -- partners

    def _match_partners(self) -> None:
        """Make sure, before either is read, that the two stores belong together and agree. Both are open.

        Raises TierError, and gives up the tier that failed.
        """
        l2, l3 = self._pair.l2.tier, self._pair.l3.tier
        if l2.partner_id == l3.store_id and l3.partner_id == l2.store_id:
            # An old copy of one of them may have been put back. A bounded L3 may have been killed between an
            # eviction and what follows from it in L2.
            bounded = l3.config.max_entries is not None
            if l2.doubtful or bounded or l2.session != l3.session or l2.last_version > l3.last_version:
                self._compare_entries()
        elif l3.is_new or (l2.partner_id == ALONE and l3.partner_id == l2.store_id):
            self._fill_l3_from_l2()
        else:
            self._keep_of_l2_what_l3_missed()
        session = uuid.uuid4().hex
        _do(self._pair.l2, l2.set_partner, l3.store_id, session)
        _do(self._pair.l3, l3.set_partner, l2.store_id, session)

    def _fill_l3_from_l2(self) -> None:
        """L3 was lost, or L2 has gone on without it: what L2 and memory hold is all there is."""
        l2, l3 = self._pair.l2, self._pair.l3
        missed_by_l2 = l2.missed()
        if EVERYTHING in missed_by_l2:
            _do(l2, l2.tier.clear_before, missed_by_l2[EVERYTHING])
        held = _do(l2, l2.tier.versions, list(missed_by_l2))
        outdated = [Write(key, None) for key, version in held.items() if version < missed_by_l2[key]]
        _do(l2, l2.tier.apply, outdated)
        _do(l3, l3.tier.clear)
        marks = {**_do(l2, l2.tier.versions, _do(l2, l2.tier.keys)), **self._in_memory()}
        # Marked before the stores are declared partners, so that a crash between the two starts over.
        _do(l2, l2.tier.extend_backlog, marks)
        self._pair.settle(l2, list(missed_by_l2))
        l3.add_missed(marks)

    def _keep_of_l2_what_l3_missed(self) -> None:
        """L2 is new, or was away while L3 went on: only changes later than all of L3's are believed."""
        l2, l3 = self._pair.l2, self._pair.l3
        last = l3.tier.last_version
        self._pair.settle(l3, [key for key, version in l3.missed().items() if version <= last])
        believed = l3.missed()
        keys = _do(l2, l2.tier.keys)
        _do(l2, l2.tier.apply, [Write(key, None) for key in keys if key not in believed])
        self._pair.settle(l2, [key for key in l2.missed() if key not in believed])

    def _compare_entries(self) -> None:
        """Settle, entry by entry, where the two stores differ although neither has a mark.

        It takes damage to come to that: the end of a log was cut off, or pages of the database were lost. An
        entry of L2 that L3 has never seen, or has an older one of, is what L3 lost. Anything else in L2 that
        L3 does not confirm is out of date. That goes for what L2 has missed, too, which is settled later.
        """
        l2, l3 = self._pair.l2, self._pair.l3
        known = l3.missed()
        if EVERYTHING in known:
            return
        here = _do(l2, l2.tier.versions, [key for key in _do(l2, l2.tier.keys) if key not in known])
        there = _do(l3, l3.tier.versions, list(here))
        differing = {key: version for key, version in here.items() if version != there.get(key)}
        lost_by_l3 = {
            key: version
            for key, version in differing.items()
            if version > max(l3.tier.last_version, there.get(key, 0))
        }
        if lost_by_l3:
            _do(l2, l2.tier.extend_backlog, lost_by_l3)
            l3.add_missed(lost_by_l3)
        for key in differing.keys() - lost_by_l3.keys():
            # A version in L3 is to be proven: reading a damaged row sets it aside, and marks it as L3's loss.
            _do(l3, l3.tier.get, key)
        lost = l3.missed()
        outdated = [Write(key, None) for key in differing if key not in lost]
        if outdated:
            _do(l2, l2.tier.apply, outdated)

    # -- backlogs

    def _replay(self, level: DiskLevel) -> bool:
        """Bring `level` up to date with its backlog as it is now; whether nothing failed.

        Keys that are out of reach stay in it, and so does what is added meanwhile, for the next time.
        """
        backlog = level.missed()
        cleared_at = backlog.pop(EVERYTHING, None)
        if cleared_at is not None:
            if not level.write(level.tier.clear_before, cleared_at):
                return False
            self._pair.settle(level, [EVERYTHING])
        waiting = list(backlog)
        for start in range(0, len(waiting), _REPLAY_BATCH):
            keys = waiting[start : start + _REPLAY_BATCH]
            outcome = WriteOutcome()
            with self._locks.hold_many(keys):
                worked = self._replay_keys(level, keys, outcome)
            self._evictions.append(outcome)
            if not worked:
                return False
        return level.tell_missed_uses()

    def _replay_keys(self, level: DiskLevel, keys: Sequence[str], outcome: WriteOutcome) -> bool:
        """Bring some keys up to date; whether the tier worked. The keys are locked."""
        other = self._pair.other(level)
        missed = level.missed_of(keys)
        worked, here = level.attempt("read", {}, level.tier.versions, keys)
        if not worked:
            return False
        writes: list[Write] = []
        overtaken: list[str] = []
        for key, version in missed.items():
            if (
                here.get(key, 0) >= version
                and level.attempt("read", None, level.tier.get, key)[1] is not None
            ):
                # The mark outlived its cause: this tier went on, and perhaps the other one did not.
                overtaken.append(key)
                continue
            entry = self._memory.get(key)
            if entry is None and other.serves(key):
                reached, entry = other.attempt("read", None, other.tier.get, key)
            else:
                # Where the other tier is away and has not missed the key too, it alone knows.
                reached = entry is not None or not other.enabled or other.has_missed(key)
            if reached:
                writes.append(Write(key, entry, version))
        if writes and not level.apply(writes, outcome):
            return False
        if level is self._pair.l3:
            self._forget_outdated(overtaken, here)
        self._pair.settle(level, [*overtaken, *(write.key for write in writes)])
        return True

    def _holds_sound(self, level: DiskLevel, key: str) -> bool:
        """Whether a record is sound, and so its version to be believed."""
        return level.attempt("read", None, level.tier.get, key)[1] is not None

    def _forget_outdated(self, keys: Sequence[str], in_l3: Mapping[str, int]) -> None:
        l2 = self._pair.l2
        if keys and l2.works:
            _, in_l2 = l2.attempt("read", {}, l2.tier.versions, keys)
            outdated = [Write(key, None) for key, version in in_l2.items() if version != in_l3.get(key)]
            if outdated and not l2.write(l2.tier.apply, outdated):
                self._pair.note_missed(l2, {write.key: in_l3[write.key] for write in outdated})


def _do(
    level: DiskLevel,
    operation: Callable[Arguments, Result],
    *args: Arguments.args,
    **kwargs: Arguments.kwargs,
) -> Result:
    """Run an operation of a tier whose failure makes it unusable; raises TierError."""
    try:
        return operation(*args, **kwargs)
    except TierError as error:
        level.give_up(error)
        raise
