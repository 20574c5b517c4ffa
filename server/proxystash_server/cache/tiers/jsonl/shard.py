"""One append-only file of the JSONL tier: lines with checksums, read in place, compacted beside itself.

A line is a JSON object whose last field, `crc`, is the CRC-32 of everything before it. The file is only ever
appended to, or replaced whole by a compacted one through a rename.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxystash_server.cache.ground.files import sync_directory
from proxystash_server.cache.ground.killpoints import kill_point

FORMAT = "proxystash-jsonl"
FORMAT_VERSION = 2
_CRC_FIELD = b',"crc":"'
_CRC_LENGTH = len(_CRC_FIELD) + len('00000000"}')
# A shard is worth compacting when less than half of it is live and the rest is not a trifle.
_GARBAGE_WORTH_COMPACTING = 256 * 1024


# `json.dumps` with these settings would make an encoder for each record.
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


def encode_body(record: dict[str, Any]) -> bytes:
    """A record as the beginning of a line, up to where `finish_line` goes on."""
    return _encode(record).encode()[:-1]


def finish_line(body: bytes, sequence: int) -> bytes:
    """The whole line, with its number and its checksum."""
    line = b'%b,"seq":%d' % (body, sequence)
    return b'%b%b%08x"}\n' % (line, _CRC_FIELD, zlib.crc32(line))


def decode_line(line: bytes) -> dict[str, Any] | None:
    """The record of a line (without its newline), None if the line is damaged."""
    if not is_sound(line):
        return None
    record: dict[str, Any] = json.loads(line)
    return record


def is_sound(line: bytes) -> bool:
    """Whether a line (without its newline) is as it was written."""
    start = len(line) - _CRC_LENGTH
    if start < 0 or line[start : start + len(_CRC_FIELD)] != _CRC_FIELD or not line.endswith(b'"}'):
        return False
    return b"%08x" % zlib.crc32(line[:start]) == line[-10:-2]


class Segment:
    """An open file.

    It is closed when the last reader lets go of it, so a compaction never pulls it away from one.
    """

    __slots__ = ("_descriptor", "_inode")

    def __init__(self, path: Path, flags: int = 0) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)
        self._inode = os.fstat(self._descriptor).st_ino

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`."""
        return os.pread(self._descriptor, length, offset)

    def read_all(self) -> bytes:
        """The whole file."""
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            file.seek(0)
            return file.read()

    def write(self, data: bytes, offset: int) -> None:
        """Write all of `data` at `offset`."""
        written = os.pwrite(self._descriptor, data, offset)
        while written < len(data):
            written += os.pwrite(self._descriptor, data[written:], offset + written)

    def truncate(self, size: int) -> None:
        """Cut the file off behind `size` bytes."""
        os.ftruncate(self._descriptor, size)

    def is_at(self, path: str) -> bool:
        """Whether `path` still leads to this file."""
        try:
            return os.stat(path).st_ino == self._inode  # noqa: PTH116 -- a third of what Path.stat costs
        except OSError:
            return False

    def sync(self) -> None:
        """Wait until the contents are on the medium."""
        os.fsync(self._descriptor)


@dataclass(slots=True)
class Slot:
    """Where an entry's line stands, and what changes about the entry without a new line for all of it."""

    segment: Segment
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
    touched: bool = False

    def copy(self) -> Slot:
        """The slot as it is now."""
        # A third of what `dataclasses.replace` costs.
        return Slot(
            self.segment,
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
            self.touched,
        )


class Shard:
    """The file, its end, and the index of the entries in it.

    Not thread-safe by itself: appends happen under the tier's commit lock, the index is guarded by its memory
    lock.
    """

    def __init__(self, path: Path, number: int, segment: Segment | None = None) -> None:
        self.path = path
        self.path_text = str(path)
        self.number = number
        self.segment = Segment(path) if segment is None else segment
        self.end = 0
        self.index: dict[str, Slot] = {}
        self.live_bytes = 0
        self.needs_compaction = False
        self._torn = False

    @property
    def wants_compaction(self) -> bool:
        """Whether a compaction would be worth its while."""
        garbage = self.end - self.live_bytes
        return self.needs_compaction or garbage > max(_GARBAGE_WORTH_COMPACTING, self.live_bytes)

    def append(self, lines: bytes) -> int:
        """Write whole lines at the end and return the offset of the first.

        After a failure the file ends where it did before.
        """
        if self._torn:
            self.segment.truncate(self.end)
            self._torn = False
        offset = self.end
        kill_point("jsonl.before_append")
        try:
            self.segment.write(lines, offset)
        except OSError:
            # Part of them may be there. If it can't be cut off now, it is before the next append.
            self._torn = True
            self.segment.truncate(offset)
            self._torn = False
            raise
        self.end = offset + len(lines)
        kill_point("jsonl.after_append")
        return offset

    def load(self) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
        """Every line as offset, bytes and record (None: damaged); leaves `end` behind the last whole line."""
        data = self.segment.read_all()
        offset = 0
        while offset < len(data):
            stop = data.find(b"\n", offset)
            if stop < 0:
                yield offset, data[offset:], None
                self.segment.truncate(offset)
                break
            line = data[offset:stop]
            yield offset, line, decode_line(line)
            offset = stop + 1
        self.end = offset

    def put(self, key: str, slot: Slot) -> None:
        """Index a line."""
        held = self.index.get(key)
        self.index[key] = slot
        self.live_bytes += slot.length - (0 if held is None else held.length)

    def forget(self, key: str) -> bool:
        """Take a key out of the index; whether it was there."""
        slot = self.index.pop(key, None)
        if slot is None:
            return False
        self.live_bytes -= slot.length
        return True


def header(number: int, shards: int) -> bytes:
    """The first line of a shard: what the file is and how to read it."""
    return finish_line(
        encode_body(
            {"op": "header", "format": FORMAT, "version": FORMAT_VERSION, "shard": number, "shards": shards}
        ),
        0,
    )


class Compaction:
    """A compacted copy of a shard, made in two steps so that writers wait only for the second, short one.

    `copy` (no lock held; the lines it copies never change) writes every live line to a new file. `finish`
    (under the commit lock) adds what was appended meanwhile and renames the new file over the old.
    """

    def __init__(self, shard: Shard, slots: dict[str, Slot], first_lines: bytes) -> None:
        self._shard = shard
        self._segment = shard.segment
        self._slots = slots
        self._copied_to = shard.end
        self._path = shard.path.with_name(shard.path.name + ".compacting")
        self._first_lines = first_lines
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0

    def copy(self, rewrite: Callable[[bytes, Slot], bytes | None]) -> list[str]:
        """Write the new file; `rewrite` turns a line into what it should be now.

        Returns keys of damaged lines.
        """
        self._path.unlink(missing_ok=True)
        self._new = Segment(self._path, os.O_EXCL)
        damaged: list[str] = []
        lines = [self._first_lines]
        end = len(self._first_lines)
        # In one piece: a read for each line would cost more than all that is done with it.
        before = self._segment.read(0, self._copied_to)
        for key, slot in sorted(self._slots.items(), key=lambda item: item[1].sequence):
            line = rewrite(before[slot.offset : slot.offset + slot.length], slot)
            if line is None:
                damaged.append(key)
                continue
            self._places[key] = (end, len(line))
            lines.append(line)
            end += len(line)
        self._new.write(b"".join(lines), 0)
        self._end = end
        return damaged

    def finish(self, *, sync: bool) -> bool:
        """Put the new file in place and return whether that was possible.

        The caller holds the commit lock.
        """
        shard = self._shard
        if shard.segment is not self._segment:
            self._path.unlink(missing_ok=True)
            return False
        tail = self._segment.read(self._copied_to, shard.end - self._copied_to)
        self._new.write(tail, self._end)
        if sync:
            self._new.sync()
        kill_point("compaction.before_rename")
        self._path.rename(shard.path)
        kill_point("compaction.after_rename")
        if sync:
            sync_directory(shard.path.parent)
        return True

    def discard(self) -> None:
        """Take away what was written, so that a copy that found no room leaves none less to the writers."""
        self._path.unlink(missing_ok=True)

    def switch_index(self) -> None:
        """Point the index at the new file; the caller holds the commit lock and the memory lock."""
        shard = self._shard
        shift = self._end - self._copied_to
        shard.live_bytes = 0
        for key, slot in shard.index.items():
            if slot is self._slots.get(key) and key in self._places:
                slot.offset, slot.length = self._places[key]
            else:
                slot.offset += shift
            slot.segment = self._new
            shard.live_bytes += slot.length
        shard.end += shift
        shard.segment = self._new
        shard.needs_compaction = False
