"""Writing a log anew without the lines that count no more."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from proxystash_server.cache.ground.files import sync_directory
from proxystash_server.cache.ground.killpoints import kill_point
from proxystash_server.cache.tiers.jsonl.index import Index, Slot
from proxystash_server.cache.tiers.jsonl.log import LogFile

_WINDOW_BYTES = 1024 * 1024


class Compaction:
    """A compacted copy of a log, made in two steps so that writers wait only for the second, short one.

    `copy` (no lock held; the lines it copies never change) writes every line of `slots` to a new file.
    `finish` (no writer meanwhile) adds what was appended since and puts the new file in place of the old.
    """

    def __init__(self, log: LogFile, slots: Mapping[str, Slot], first_line: bytes, *, sync: bool) -> None:
        self._log = log
        self._slots = slots
        self._copied_to = log.end
        self._first_line = first_line
        self._sync = sync
        self._places: dict[str, tuple[int, int]] = {}

    @property
    def _path(self) -> Path:
        return self._log.path.with_name(self._log.path.name + ".compacting")

    def copy(self, rewrite: Callable[[bytes, Slot], bytes | None]) -> list[tuple[str, Slot, bytes]]:
        """Write the new file; `rewrite` turns a line into what it should be now.

        Returns the damaged lines, of which it makes None, with their keys and slots.
        """
        self._path.unlink(missing_ok=True)
        self.new = new = LogFile(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, sync=self._sync)
        new.append(self._first_line)
        damaged: list[tuple[str, Slot, bytes]] = []
        lines: list[bytes] = []
        end = written = new.end
        for key, slot, before in self._lines():
            line = rewrite(before, slot)
            if line is None:
                damaged.append((key, slot, before))
                continue
            self._places[key] = (end, len(line))
            lines.append(line)
            end += len(line)
            if end - written > _WINDOW_BYTES:
                new.append(b"".join(lines))
                lines, written = [], end
        new.append(b"".join(lines))
        return damaged

    def _lines(self) -> Iterator[tuple[str, Slot, bytes]]:
        # Not one by one: reading each would cost more than all that is done with it.
        window, start = b"", 0
        for key, slot in sorted(self._slots.items(), key=lambda item: item[1].offset):
            place = slot.offset - start
            if place + slot.length > len(window):
                window = self._log.read(slot.offset, max(slot.length, _WINDOW_BYTES))
                start, place = slot.offset, 0
            yield key, slot, window[place : place + slot.length]

    def finish(self) -> None:
        """Put the new file in place."""
        self._shift = self.new.end - self._copied_to
        self.new.append(self._log.read(self._copied_to, self._log.end - self._copied_to))
        self.new.sync()
        kill_point("compaction.before_rename")
        self._path.rename(self._log.path)
        self.new.has_moved_to(self._log.path)
        kill_point("compaction.after_rename")
        if self._sync:
            sync_directory(self._log.path.parent)

    def discard(self) -> None:
        """Take away what was not put in place."""
        self._path.unlink(missing_ok=True)

    def switch(self, index: Index) -> None:
        """Point the index of the old file at the new one."""
        index.live_bytes = 0
        for key, slot in index.slots.items():
            if slot is self._slots.get(key) and key in self._places:
                slot.offset, slot.length = self._places[key]
            else:
                slot.offset += self._shift
            index.live_bytes += slot.length
