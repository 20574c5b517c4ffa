"""Copies of what a server holds, and the rules that keep them coherent with it, without I/O."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Final, NamedTuple, Self

from proxystash._convert import checked_key
from proxystash._operations import renumbered
from proxystash._retry import Clock
from proxystash.errors import ProxystashError
from proxystash.models import CacheEntry, Change, ChangeKind, GetResult, WatchPosition
from proxystash.watch import COMPACTED

_NEVER: Final = -math.inf
# One that goes on while the machine is suspended: copies grow old meanwhile.
_BOOT_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", None)
_steady: Final[Clock] = time.monotonic if _BOOT_CLOCK is None else partial(time.clock_gettime, _BOOT_CLOCK)


@dataclass(frozen=True, slots=True)
class NearCacheStatistics:
    """A snapshot of a near cache. Counts are since it was made, and only grow, but for `entries`.

    Every key that is looked up is a hit, answered by a copy, or a miss, asked of the server. Of the copies
    that went, `evictions` made room, `invalidations` were changed or may have been, `expirations` had
    expired; `emptied` is how often all went since changes may have been missed.

    `age` is the time since the server was heard last, and so how old a copy may be; None while there are no
    copies to trust. `position` is how far the changes were heard. `failure` is why they are not heard now.
    """

    entries: int
    max_entries: int
    hits: int
    misses: int
    evictions: int
    invalidations: int
    expirations: int
    emptied: int
    age: timedelta | None
    position: WatchPosition | None
    failure: ProxystashError | None


class Fill:
    """The right to keep what the server answers for a key, shared by the calls that ask at the same time.

    `open` is how many those are, and `floor` the least version that may be kept: a later one is known of.
    """

    __slots__ = ("floor", "open")

    def __init__(self) -> None:
        self.floor = 0
        self.open = 0


class _Copy(NamedTuple):
    """An entry, and when it expires, by the steady clock and by the wall clock."""

    entry: CacheEntry
    steady_end: float
    wall_end: float


class Copies:
    """At most `max_entries` entries by key, each as good as the server's; the least recently used goes first.

    It is told what a watch of all keys tells, and which writes were acknowledged. A copy goes when a later
    version is known of, with all others where changes may have been missed, and once the server was not heard
    for `max_silence` seconds; until it is heard there are none. What a call answers is kept only if, since
    before it began, no later version was heard of, changes were heard throughout, and nothing was written:
    which version a write has made is not known. An entry is expired once either clock says so, since the wall
    clock may be set.

    Thread-safe; the lock is held for memory operations only. `steady` and `wall` give seconds.
    """

    def __init__(
        self, max_entries: int, max_silence: float, *, steady: Clock = _steady, wall: Clock = time.time
    ) -> None:
        self._max_entries = max_entries
        self._max_silence = max_silence
        self._steady = steady
        self._wall = wall
        self._lock = threading.Lock()
        self._copies: OrderedDict[str, _Copy] = OrderedDict()
        # By key; one that is not in here is void.
        self._fills: dict[str, Fill] = {}
        self._trusted_until = _NEVER
        self._position: WatchPosition | None = None
        self._failure: ProxystashError | None = None
        self._hits = self._misses = 0
        self._evictions = self._invalidations = self._expirations = self._emptied = 0

    def find(self, key: str) -> CacheEntry | None:
        """The copy of a key, which is then a hit."""
        with self._lock:
            copy = self._copies.get(key)
            if copy is None:
                return None
            entry, steady_end, wall_end = copy
            now = self._steady()
            if now >= self._trusted_until:
                self._distrust()
                return None
            if now >= steady_end or self._wall() >= wall_end:
                del self._copies[key]
                self._expirations += 1
                return None
            self._copies.move_to_end(key)
            self._hits += 1
            return entry

    def begin_fill(self, key: str) -> Fill:
        """Before the server is asked for a key: a miss."""
        with self._lock:
            self._misses += 1
            fill = self._fills.get(key)
            if fill is None:
                fill = Fill()
                if self._steady() < self._trusted_until:
                    self._fills[key] = fill
            fill.open += 1
            return fill

    def end_fill(self, key: str, fill: Fill, entry: CacheEntry | None) -> None:
        """Count in what the server answered, before anybody sees it: who does, finds no older copy."""
        with self._lock:
            if entry is None:
                # Whether it was put before or after a copy was made is not known.
                self._drop(key)
                return
            self._outdate(key, entry.version)
            if fill is self._fills.get(key) and entry.version >= fill.floor:
                self._keep(key, entry)

    def leave_fill(self, key: str, fill: Fill) -> None:
        """After the call, whatever became of it."""
        with self._lock:
            fill.open -= 1
            if not fill.open and self._fills.get(key) is fill:
                del self._fills[key]

    def drop(self, keys: Iterable[str] | None) -> None:
        """Count in a write of some keys or, if None, of all, before anybody knows that it succeeded."""
        with self._lock:
            if keys is None:
                self._drop_all()
            else:
                for key in keys:
                    self._drop(key)

    def hear(self, change: Change) -> None:
        """Count in what a watch tells."""
        with self._lock:
            now = self._steady()
            before, position = self._position, change.position
            is_other = position is not None and before is not None and position.history != before.history
            if now >= self._trusted_until or change.kind is ChangeKind.RESET or is_other:
                self._distrust()
            if change.kind is ChangeKind.CLEARED:
                self._drop_all()
            elif change.key:
                self._outdate(change.key, change.version)
            self._position = position
            self._failure = None
            self._trusted_until = now + self._max_silence

    def lose(self, failure: ProxystashError) -> None:
        """Count in that a watch has lost its stream, which it goes on with unless that is compacted."""
        with self._lock:
            self._failure = failure
            if failure.reason == COMPACTED:
                self._distrust()

    def empty(self, failure: ProxystashError | None = None) -> None:
        """Drop everything until a watch tells something: it has failed, or ended."""
        with self._lock:
            self._failure = failure
            self._distrust()

    def statistics(self) -> NearCacheStatistics:
        """A snapshot."""
        with self._lock:
            trusted_for = self._trusted_until - self._steady()
            return NearCacheStatistics(
                entries=len(self._copies) if trusted_for > 0 else 0,
                max_entries=self._max_entries,
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                invalidations=self._invalidations,
                expirations=self._expirations,
                emptied=self._emptied,
                age=timedelta(seconds=self._max_silence - trusted_for) if trusted_for > 0 else None,
                position=self._position,
                failure=self._failure,
            )

    def _distrust(self) -> None:
        if self._trusted_until != _NEVER:
            self._trusted_until = _NEVER
            self._emptied += 1
            self._copies.clear()
            self._fills.clear()

    def _outdate(self, key: str, version: int) -> None:
        """Keep nothing of a key that is older than this version."""
        fill, copy = self._fills.get(key), self._copies.get(key)
        if fill is not None:
            fill.floor = max(fill.floor, version)
        if copy is not None and copy.entry.version < version:
            del self._copies[key]
            self._invalidations += 1

    def _drop(self, key: str) -> None:
        self._fills.pop(key, None)
        if self._copies.pop(key, None) is not None:
            self._invalidations += 1

    def _drop_all(self) -> None:
        self._fills.clear()
        self._invalidations += len(self._copies)
        self._copies.clear()

    def _keep(self, key: str, entry: CacheEntry) -> None:
        wall_end = math.inf if entry.expires_at is None else entry.expires_at.timestamp()
        self._copies[key] = _Copy(entry, self._steady() + wall_end - self._wall(), wall_end)
        if len(self._copies) > self._max_entries:
            self._copies.popitem(last=False)
            self._evictions += 1


class Lookup:
    """One lookup of keys, entries or URLs: what copies answer, and what the server is asked for.

    `entries` has an answer for each, in order; those of the keys in `missing` are to come by `fill`. It is a
    context manager around the call. Raises InvalidArgumentError for what cannot be a key.
    """

    def __init__(self, copies: Copies, keys: Iterable[str | CacheEntry]) -> None:
        names = [checked_key(key) for key in keys]
        self._copies = copies
        self.entries = [copies.find(name) for name in names]
        self._places = [place for place, entry in enumerate(self.entries) if entry is None]
        self.missing = [names[place] for place in self._places]
        self._fills = [copies.begin_fill(key) for key in self.missing]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        for key, fill in zip(self.missing, self._fills, strict=True):
            self._copies.leave_fill(key, fill)
        if isinstance(error, ProxystashError):
            error.field = renumbered(self._places.__getitem__)(error.field)

    def fill(self, results: Sequence[GetResult | None]) -> None:
        """Take what the server has answered for the missing keys."""
        for place, key, fill, result in zip(self._places, self.missing, self._fills, results, strict=True):
            entry = None if result is None else result.entry
            self._copies.end_fill(key, fill, entry)
            self.entries[place] = entry
