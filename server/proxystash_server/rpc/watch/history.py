"""The latest changes of the cache, kept once for all who watch."""

from __future__ import annotations

import bisect
import secrets
import threading
from collections.abc import Sequence
from enum import Enum
from typing import Final, NamedTuple

from proxystash_server.cache import CacheEntry, Change, ChangeKind
from proxystash_server.cache.entry.entry import Clock, wall_clock


class Unknown(Enum):
    """What stands for the entry before a change where the history does not go back so far."""

    ENTRY = "unknown"


UNKNOWN: Final = Unknown.ENTRY


class Record(NamedTuple):
    """A change, the entry that its key had after the one before, if that is known, and when it was told."""

    change: Change
    before: CacheEntry | Unknown | None
    happened_us: int


class Place(NamedTuple):
    """A place between two changes: the number of the next one, and the revision of the one before."""

    position: int
    revision: int


class Extent(NamedTuple):
    """How far a history goes back and forth, by revisions from which a watch can go on, and its id."""

    history: str
    oldest: int
    latest: int


class Compacted(Exception):  # noqa: N818 -- the contract's word
    """A place is no longer, or never was, part of the history; `extent` says what is."""

    def __init__(self, extent: Extent) -> None:
        super().__init__("the changes after this revision are not known any more")
        self.extent = extent


class History:
    """A ring of the latest `size` changes, which a place in it can be read from as long as it has them all.

    Revisions alone do not say which history they belong to: after a lost store or a clock that was set back,
    a server may number changes as an earlier run did. So a history has a random id, and what says that copies
    are to begin anew begins another one. `clock` gives microseconds since the epoch.

    Thread-safe: the lock is held to append a group of changes, and to copy a stretch of them.
    """

    def __init__(self, size: int, clock: Clock = wall_clock) -> None:
        self._size = size
        self._clock = clock
        self._lock = threading.Lock()
        self._begin(0)

    def _begin(self, revision: int) -> None:
        self._id = secrets.token_hex(8)
        # Change number i is at i modulo the size; `_first` is the oldest that is kept, `_end` the next one.
        self._ring: list[Record] = []
        self._first = self._end = 0
        self._oldest = self._latest = revision
        # The last record of each key in the ring, which tells what its entry is.
        self._last: dict[str, Record] = {}

    def begin_after(self, revision: int) -> None:
        """Say which revision was the last before the first change that this history was told."""
        with self._lock:
            # Changes, or what begins another history, may have been told since.
            if self._oldest == 0:
                self._oldest = revision
            self._latest = max(self._latest, revision)

    def tell(self, changes: Sequence[Change]) -> None:
        """Keep changes, in the place of the oldest: a listener of the change feed."""
        now = self._clock()
        with self._lock:
            for change in changes:
                if change.kind is ChangeKind.RESET:
                    self._begin(change.revision)
                else:
                    self._append(change, now)

    def _append(self, change: Change, now: int) -> None:
        ring, last = self._ring, self._last
        earlier = last.get(change.key)
        record = last[change.key] = Record(change, UNKNOWN if earlier is None else earlier.change.entry, now)
        if len(ring) < self._size:
            ring.append(record)
        else:
            slot = self._first % self._size
            oldest, ring[slot] = ring[slot].change, record
            self._first += 1
            self._oldest = oldest.revision
            kept = last.get(oldest.key)
            if kept is not None and kept.change is oldest:
                del last[oldest.key]
        self._end += 1
        self._latest = change.revision

    @property
    def extent(self) -> Extent:
        """The id, and the revisions between which a watch can go on."""
        with self._lock:
            return self._extent()

    def _extent(self) -> Extent:
        return Extent(self._id, self._oldest, self._latest)

    def latest(self) -> tuple[str, Place]:
        """The id, and the place behind all changes."""
        with self._lock:
            return self._id, Place(self._end, self._latest)

    def place_after(self, history: str, revision: int) -> Place:
        """The place behind the change with this revision, and all before; raises Compacted.

        The revision is one of this history's, or between two of them.
        """
        with self._lock:
            if history != self._id or not self._oldest <= revision <= self._latest:
                raise Compacted(self._extent())
            index = bisect.bisect_right(
                range(self._first, self._end),
                revision,
                key=lambda number: self._ring[number % self._size].change.revision,
            )
            return Place(self._first + index, revision)

    def read(self, history: str, place: Place, limit: int) -> tuple[list[Record], Place]:
        """The next changes from a place on, at most `limit`, and the place behind them; raises Compacted."""
        with self._lock:
            if history != self._id or place.position < self._first:
                raise Compacted(self._extent())
            start, size = place.position, self._size
            end = min(self._end, start + limit)
            if start == end:
                return [], Place(end, self._latest)
            begin, behind = start % size, (end - 1) % size + 1
            ring = self._ring
            records = ring[begin:behind] if begin < behind else ring[begin:] + ring[:behind]
            return records, Place(end, records[-1].change.revision)
