"""Changes of the JSONL tier that go to its files together: one append for each file, then the index."""

from __future__ import annotations

from collections.abc import Iterator

from proxystash_server.cache.tiers.jsonl_shard import Shard, Slot

# What one file gets, and what its lines do to the index: a slot to put under a key, or None to forget it.
FileChanges = tuple[Shard, bytes, list[tuple[str, Slot | None]]]


class Batch:
    """Lines not yet written, with their places. Readers see none of it; the batch itself sees all of it."""

    def __init__(self) -> None:
        self.marks: dict[str, int] = {}
        self._lines: dict[Shard, list[bytes]] = {}
        self._ends: dict[Shard, int] = {}
        self._changes: dict[Shard, list[tuple[str, Slot | None]]] = {}
        self._slots: dict[str, Slot | None] = {}
        self.growth = 0

    def slot_of(self, shard: Shard, key: str) -> Slot | None:
        """Where the key's entry will be found once the batch is written."""
        return self._slots[key] if key in self._slots else shard.index.get(key)

    def add_line(self, shard: Shard, line: bytes) -> int:
        """Take a line; the offset it will have."""
        if shard not in self._lines:
            self._lines[shard], self._changes[shard] = [], []
            self._ends[shard] = shard.end
        offset = self._ends[shard]
        self._lines[shard].append(line)
        self._ends[shard] = offset + len(line)
        return offset

    def index(self, shard: Shard, key: str, slot: Slot | None) -> None:
        """Note what the last line of this file does to its index."""
        self.growth += (slot is not None) - (self.slot_of(shard, key) is not None)
        self._slots[key] = slot
        self._changes[shard].append((key, slot))

    def files(self) -> Iterator[FileChanges]:
        """What each file gets."""
        for shard, lines in self._lines.items():
            yield shard, b"".join(lines), self._changes[shard]
