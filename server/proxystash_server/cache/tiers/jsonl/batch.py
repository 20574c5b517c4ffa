"""Changes of the JSONL tier that go to its files together: one append for each file, then the index."""

from __future__ import annotations

from collections.abc import Sequence

from proxystash_server.cache.tiers.jsonl.load import shard_number
from proxystash_server.cache.tiers.jsonl.shard import Shard, Slot


class FileBatch:
    """What one file gets: lines, and what they will do to its index, where None means that a key goes."""

    __slots__ = ("_length", "_lines", "_removals", "changes", "is_written", "shard")

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self._removals: list[bytes] = []
        self._lines: list[bytes] = []
        self._length = 0
        self.is_written = False
        self.changes: dict[str, Slot | None] = {}

    def slot_of(self, key: str) -> Slot | None:
        """Where the key's entry will be found once the batch is written."""
        changes = self.changes
        return changes[key] if key in changes else self.shard.index.get(key)

    def add_line(self, line: bytes) -> int:
        """Take a line; its offset, counted from where `write` will begin."""
        offset = self._length
        self._lines.append(line)
        self._length += len(line)
        return offset

    def evict(self, key: str, line: bytes) -> None:
        """Take a line that makes room for another entry of the batch, which may go to another file."""
        # What the batch itself has put can only go behind its own line.
        lines = self._removals if self.changes.get(key) is None else self._lines
        lines.append(line)
        self._length += len(line) * (lines is self._lines)
        self.changes[key] = None

    def make_room(self) -> bool:
        """Append what makes room, which comes before any line of any file; whether there was something."""
        if self._removals:
            self.shard.append(b"".join(self._removals))
        return bool(self._removals)

    def write(self) -> bool:
        """Append the other lines; whether there were any."""
        if self._lines:
            offset = self.shard.append(b"".join(self._lines))
            for slot in self.changes.values():
                if slot is not None:
                    slot.offset += offset
        self.is_written = True
        return bool(self._lines)


class Batch:
    """Lines not yet written, with their places. Readers see none of it; the batch itself sees all of it."""

    def __init__(self, shards: Sequence[Shard], room: float) -> None:
        self._shards = shards
        self.files: dict[int, FileBatch] = {}
        # For how many entries more there will be room.
        self.room = room

    def file_of(self, key: str) -> FileBatch:
        """The part of the batch that goes to a key's file."""
        number = shard_number(key)
        file = self.files.get(number)
        if file is None:
            file = self.files[number] = FileBatch(self._shards[number])
        return file
