"""What the lines of a store add up to: where the entry of each key stands, and how it was used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from proxystash_server.cache.errors import StoreFormatError
from proxystash_server.cache.ground.parsing import UNREADABLE
from proxystash_server.cache.tiers.jsonl.line import decode_line, encode_body, finish_line

FORMAT = "proxystash-jsonl"
FORMAT_VERSION = 2


def header(last_version: int) -> bytes:
    """The first line of a file: what it is, and the last version of what does not stand in it any more."""
    record = {"op": "header", "format": FORMAT, "version": FORMAT_VERSION, "last_version": last_version}
    return finish_line(encode_body(record), 0)


@dataclass(slots=True)
class Slot:
    """Where an entry's line stands, and what changes about the entry without a new line for all of it."""

    offset: int
    length: int
    # The number of the line, of the entry's last use, and of the line that first stored the key.
    sequence: int
    recency: int
    first: int
    expires_at_us: int
    version: int
    access_count: int
    last_accessed_us: int
    evicted_from_l1: bool
    used: bool = False

    def copy(self) -> Slot:
        """The slot as it is now."""
        # A third of what `dataclasses.replace` costs.
        return Slot(
            self.offset,
            self.length,
            self.sequence,
            self.recency,
            self.first,
            self.expires_at_us,
            self.version,
            self.access_count,
            self.last_accessed_us,
            self.evicted_from_l1,
            self.used,
        )

    def note_use(
        self, sequence: int, access_count: int, last_accessed_us: int, evicted_from_l1: bool
    ) -> bool:
        """Note how the entry was used; whether it was."""
        is_use = access_count > self.access_count
        if is_use:
            # Falling out of memory is no use, and does not make it more recent.
            self.recency = sequence
        self.access_count = access_count
        self.last_accessed_us = last_accessed_us
        self.evicted_from_l1 = evicted_from_l1
        self.used = True
        return is_use


class Index:
    """The slots by key. Not thread-safe."""

    def __init__(self) -> None:
        self.slots: dict[str, Slot] = {}
        # How many bytes of the file they stand for.
        self.live_bytes = 0
        # The greatest number of a line, and version of a change.
        self.sequence = 0
        self.last_version = 0

    def put(self, key: str, slot: Slot) -> None:
        """Index a line."""
        held = self.slots.get(key)
        # In the place of what was there: a lookup may come at any moment.
        self.slots[key] = slot
        self.live_bytes += slot.length - (0 if held is None else held.length)

    def remove(self, key: str) -> None:
        """Take a key out, if it is there."""
        slot = self.slots.pop(key, None)
        if slot is not None:
            self.live_bytes -= slot.length

    def replay(self, offset: int, line: bytes) -> bool:
        """Do what a line of the file says; False if the line is damaged.

        Raises StoreFormatError if it says that the file is something else, or newer.
        """
        try:
            self._replay(offset, len(line), decode_line(line))
        except UNREADABLE:
            return False
        return True

    def _replay(self, offset: int, length: int, record: dict[str, Any]) -> None:
        operation, sequence = record["op"], record["seq"]
        if operation == "put":
            slot = Slot(
                offset,
                length,
                sequence,
                record.get("recency", sequence),
                record.get("first", sequence),
                record["expires_at"],
                record["version"],
                record["access_count"],
                record["last_accessed"],
                record["evicted_from_l1"],
            )
            self.put(record["key"], slot)
        elif operation == "delete":
            self.remove(record["key"])
        elif operation == "touch":
            held = self.slots.get(record["key"])
            if held is not None and held.version == record["version"]:
                held.note_use(
                    sequence, record["access_count"], record["last_accessed"], record["evicted_from_l1"]
                )
        elif operation == "header":
            if record["format"] != FORMAT or record["version"] > FORMAT_VERSION:
                raise StoreFormatError(
                    f"the file has format {record['format']} {record['version']}; this release reads "
                    f"{FORMAT} up to {FORMAT_VERSION}. Use a newer release"
                )
            self.last_version = max(self.last_version, record["last_version"])
        elif operation != "probe":
            raise ValueError("the line says nothing known")
        if operation != "header":
            self.last_version = max(self.last_version, record.get("version", 0))
        self.sequence = max(self.sequence, sequence)

    def in_order(self, eviction_policy: str) -> list[tuple[str, Slot]]:
        """All entries as the policy has met them: in the order of their arrival, or of their last use."""
        by_first = eviction_policy == "fifo"
        return sorted(self.slots.items(), key=lambda item: item[1].first if by_first else item[1].recency)
