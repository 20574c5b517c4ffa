"""What one watch is sent next: existing entries, changes that match, or that there is nothing new."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from proxystash.v1 import cache_service_pb2 as pb
from proxystash_server.cache import CacheEntry, ChangeKind, EntryFilter
from proxystash_server.cache.counting.statistics import EvictionCause
from proxystash_server.rpc import convert, encoding
from proxystash_server.rpc.engine import Engine
from proxystash_server.rpc.watch.history import UNKNOWN, History, Place, Record

# Changes that are looked at, and entries that are read, for one response.
MAX_LOOKED_AT: Final = 1000
EXISTING_PAGE: Final = 250
# A response ends with the change that reaches this size. An entry has 80 KiB at most.
RESPONSE_BYTES: Final = 64 * 1024
# Responses of a view that are kept for those who ask next from the same place.
_KEPT: Final = 8

_KINDS: Final[Mapping[ChangeKind, pb.ChangeKind.ValueType]] = {
    ChangeKind.PUT: pb.CHANGE_KIND_PUT,
    ChangeKind.HEALTH: pb.CHANGE_KIND_HEALTH,
    ChangeKind.DELETE: pb.CHANGE_KIND_DELETED,
    ChangeKind.EXPIRY: pb.CHANGE_KIND_EXPIRED,
    ChangeKind.EVICTION: pb.CHANGE_KIND_EVICTED,
    ChangeKind.CLEAR: pb.CHANGE_KIND_CLEARED,
}


@dataclass(frozen=True)
class Selection:
    """Which changes a watch is told, and how much of them. Without `kinds`, all are told."""

    entry_filter: EntryFilter
    kinds: frozenset[int]
    include_entries: bool
    include_credentials: bool

    @property
    def identity(self) -> tuple[object, ...]:
        """The same for selections that select the same."""
        wanted = self.entry_filter
        return (
            wanted.source,
            wanted.health_statuses,
            wanted.schemes,
            frozenset(wanted.labels.items()),
            self.kinds,
            self.include_entries,
            self.include_credentials,
        )

    def wants(self, kind: int) -> bool:
        """Whether changes of this kind are told."""
        return not self.kinds or kind in self.kinds

    def kind_of(self, record: Record) -> int | None:
        """The contract's kind of a change, as this selection sees it; None if it is not told."""
        change, before, _ = record
        kind: int = _KINDS[change.kind]
        if change.cause is EvictionCause.HEALTH:
            kind = pb.CHANGE_KIND_EVICTED_BY_HEALTH
        if change.kind is not ChangeKind.CLEAR:
            matches = self.entry_filter.matches
            if change.entry is None or not matches(change.entry):
                if before is not UNKNOWN and (before is None or not matches(before)):
                    return None
                if change.entry is not None:
                    kind = pb.CHANGE_KIND_LEFT
        return kind if self.wants(kind) else None

    def serialize(self, change: pb.Change, entry: CacheEntry | None) -> bytes:
        """A serialized WatchResponse of one change, with its entry where entries are asked for."""
        if not self.include_entries:
            entry = None
        return encoding.watch_response(change, entry, include_credentials=self.include_credentials)


class Batch(NamedTuple):
    """The changes of a serialized WatchResponse, perhaps none, and the place behind them."""

    changes: bytes
    behind: Place


class View:
    """The changes of a history through a selection, serialized once for all who watch with the same.

    Not for several threads at once.
    """

    def __init__(self, history: History, selection: Selection) -> None:
        self.selection = selection
        self._history = history
        self._kept: OrderedDict[tuple[str, int], Batch] = OrderedDict()

    def batch(self, history: str, place: Place) -> Batch:
        """The next changes from a place on; raises Compacted."""
        batch = self._kept.get((history, place.position))
        if batch is None:
            records, behind = self._history.read(history, place, MAX_LOOKED_AT)
            batch = self.make(records, behind)
            if records:
                self._kept[history, place.position] = batch
                if len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
        return batch

    def make(self, records: Sequence[Record], behind: Place, ahead: dict[str, int] | None = None) -> Batch:
        """A batch of the first records; `behind` is the place behind all of them.

        `ahead` has the versions of entries that were told already: no older change of theirs may follow.
        A Clear empties it, since the client drops what it was told, and has to be told again.
        """
        parts: list[bytes] = []
        size = 0
        start = behind.position - len(records)
        for place, record in enumerate(records):
            change = record.change
            if ahead:
                if change.kind is ChangeKind.CLEAR:
                    ahead.clear()
                elif change.revision <= ahead.get(change.key, 0):
                    continue
            kind = self.selection.kind_of(record)
            if kind is None:
                continue
            part = self._serialize(record, kind)
            parts.append(part)
            size += len(part)
            if size >= RESPONSE_BYTES:
                behind = Place(start + place + 1, change.revision)
                break
        return Batch(b"".join(parts), behind)

    def _serialize(self, record: Record, kind: int) -> bytes:
        change = record.change
        message = pb.Change(kind=kind, key=change.key, version=change.revision)  # type: ignore[arg-type]  # its own type
        convert.fill_timestamp(message.happened_at, record.happened_us)
        return self.selection.serialize(message, None if kind == pb.CHANGE_KIND_LEFT else change.entry)


class Cursor:
    """One watch: where it stands in the history, and what it is sent next. Not for several threads at once.

    It begins behind all changes, with the existing entries before them if `include_existing`; or after a
    change that was dealt with, if `resume_after` is set, which may raise Compacted.
    """

    def __init__(
        self,
        engine: Engine,
        history: History,
        view: View,
        *,
        include_existing: bool = False,
        resume_after: tuple[str, int] | None = None,
    ) -> None:
        self._engine = engine
        self._history = history
        self._view = view
        wants_existing = include_existing and view.selection.wants(pb.CHANGE_KIND_EXISTING)
        # The key after which the next page of existing entries begins; None when all have been sent.
        self._after: str | None = "" if wants_existing else None
        self._is_after_page = False
        # By key, versions of existing entries that are later than the place; see `_next_page`.
        self._ahead: dict[str, int] = {}
        if resume_after is None:
            self._id, self._place = history.latest()
        else:
            self._id = resume_after[0]
            self._place = history.place_after(*resume_after)

    @property
    def is_behind(self) -> bool:
        """Whether there is something that this watch has not looked at."""
        history, latest = self._history.latest()
        return self._after is not None or self._place.position < latest.position or history != self._id

    @property
    def _synced(self) -> bool:
        return self._after is None and not self._ahead

    def next_response(self) -> bytes | None:
        """The next response, serialized; None if nothing new was found to be told.

        Raises Compacted where changes are missing, and CacheUnavailableError where entries cannot be read.
        """
        if self._after is not None and not self._is_after_page:
            return self._next_page(self._after)
        self._is_after_page = False
        was_synced = self._synced
        changes = self._next_changes()
        if changes or self._synced != was_synced:
            return changes + self.progress()
        return None if self._after is None else self._next_page(self._after)

    def progress(self) -> bytes:
        """A serialized response that says how far this watch has come, and tells no change."""
        synced = self._synced
        revision = self._place.revision if synced else 0
        return pb.WatchResponse(revision=revision, synced=synced, history=self._id).SerializeToString()

    def _next_changes(self) -> bytes:
        if not self._ahead:
            changes, self._place = self._view.batch(self._id, self._place)
            return changes
        records, behind = self._history.read(self._id, self._place, MAX_LOOKED_AT)
        changes, self._place = self._view.make(records, behind, self._ahead)
        if self._place.revision >= max(self._ahead.values(), default=0):
            self._ahead.clear()
        return changes

    def _next_page(self, after: str) -> bytes:
        """Existing entries, as they are after all changes before the place, or after later ones.

        So what is deleted is not brought back. An entry that is later than the place is noted: the changes
        that lead to it are left out when their turn comes.
        """
        selection = self._view.selection
        entries, self._after = self._engine.scan_entries(after, EXISTING_PAGE, selection.entry_filter)
        parts: list[bytes] = []
        size = 0
        for entry in entries:
            change = pb.Change(kind=pb.CHANGE_KIND_EXISTING, key=entry.key, version=entry.version)
            parts.append(selection.serialize(change, entry))
            if entry.version > self._place.revision:
                self._ahead[entry.key] = entry.version
            size += len(parts[-1])
            if size >= RESPONSE_BYTES:
                self._after = entry.key
                break
        self._is_after_page = True
        return b"".join(parts) + self.progress()
