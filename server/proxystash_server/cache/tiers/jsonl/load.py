"""Reading the shards of the JSONL tier at its start."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from proxystash_server.cache.tiers.jsonl.directory import SHARDS
from proxystash_server.cache.tiers.jsonl.record import replay
from proxystash_server.cache.tiers.jsonl.shard import Shard, Slot


@dataclass(slots=True)
class Loaded:
    """What the lines of all shards add up to, beside the index, which is in the shards."""

    # What a file of format 1 says that the other disk tier has missed, by key and version.
    marks: dict[str, int] = field(default_factory=dict)
    sequence: int = 0
    last_version: int = 0
    cleared_at: int = 0
    damaged: int = 0


def shard_number(key: str) -> int:
    """The shard that a key's lines stand in."""
    return zlib.crc32(key.encode()) % SHARDS


def load(shards: Sequence[Shard], set_aside: Callable[[Shard, int, bytes], None]) -> Loaded:
    """Read every line of every shard into its index; damaged ones go to `set_aside` with their offset."""
    loaded = Loaded()
    for shard in shards:
        for offset, line, record in shard.load():
            try:
                if record is None or ("key" in record and shard_number(record["key"]) != shard.number):
                    raise ValueError("the line is damaged, or in the wrong place")
                if record["op"] == "clear":
                    loaded.cleared_at = max(loaded.cleared_at, record["seq"])
                loaded.sequence = max(loaded.sequence, record["seq"])
                loaded.last_version = max(loaded.last_version, record.get("version", 0))
                replay(shard, offset, len(line) + 1, record, loaded.marks)
            except (ValueError, KeyError, TypeError):
                loaded.damaged += 1
                shard.needs_compaction = True
                set_aside(shard, offset, line)
    if loaded.cleared_at:
        for shard in shards:
            # A clear that was interrupted is finished by the compactions that follow.
            shard.needs_compaction = True
            for key in [key for key, slot in shard.index.items() if slot.sequence < loaded.cleared_at]:
                shard.forget(key)
    return loaded


def in_order(shards: Sequence[Shard], eviction_policy: str) -> list[tuple[str, Slot]]:
    """All entries in the order in which the policy has met them: of their arrival, or of their last use."""
    by_first = eviction_policy == "fifo"
    return sorted(
        (item for shard in shards for item in shard.index.items()),
        key=lambda item: item[1].first if by_first else item[1].recency,
    )
