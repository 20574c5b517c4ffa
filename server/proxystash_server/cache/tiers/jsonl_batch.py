"""Changes of the JSONL tier that go to its files together: one append for each file, then the index."""

from __future__ import annotations

from collections.abc import Sequence

from proxystash_server.cache.tiers.jsonl_load import shard_number
from proxystash_server.cache.tiers.jsonl_shard import Shard, Slot


class FileBatch:
    """What one file gets: lines, and what they will do to its index, where None means that a key goes."""

    __slots__ = ("changes", "end", "lines", "shard")

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.lines: list[bytes] = []
        self.end = shard.end
        self.changes: dict[str, Slot | None] = {}

    def slot_of(self, key: str) -> Slot | None:
        """Where the key's entry will be found once the batch is written."""
        changes = self.changes
        return changes[key] if key in changes else self.shard.index.get(key)

    def add_line(self, line: bytes) -> int:
        """Take a line; the offset it will have."""
        offset = self.end
        self.lines.append(line)
        self.end = offset + len(line)
        return offset


class Batch:
    """Lines not yet written, with their places. Readers see none of it; the batch itself sees all of it."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self.files: dict[int, FileBatch] = {}
        self.marks: dict[str, int] = {}
        # How many entries more there will be.
        self.growth = 0

    def file_of(self, key: str) -> FileBatch:
        """The part of the batch that goes to a key's file."""
        number = shard_number(key)
        file = self.files.get(number)
        if file is None:
            file = self.files[number] = FileBatch(self._shards[number])
        return file
