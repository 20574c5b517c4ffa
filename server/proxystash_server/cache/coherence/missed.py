"""The changes that the authority has missed, kept in a journal of their own until it has them.

The journal is a file of JSON lines like L2's, apart from anything that may be emptied. It exists only while
the authority has missed something. Format: a header, then a line for each change; the last of a key counts,
and a Clear makes all before it count no more.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from proxystash_server.cache.coherence.uses import Use
from proxystash_server.cache.entry.credentials import CredentialEncryptor
from proxystash_server.cache.entry.entry import CacheEntry, with_use
from proxystash_server.cache.errors import (
    EncryptionKeyError,
    TierError,
    tier_error,
)
from proxystash_server.cache.ground.files import make_directory, replace_file, sync_directory, unused_path
from proxystash_server.cache.ground.killpoints import kill_point
from proxystash_server.cache.ground.parsing import UNREADABLE
from proxystash_server.cache.tiers.base import Write
from proxystash_server.cache.tiers.jsonl.line import decode_line, encode_body, finish_line
from proxystash_server.cache.tiers.jsonl.log import LogFile
from proxystash_server.cache.tiers.jsonl.record import entry_of, write_body
from proxystash_server.cache.tiers.jsonl.records import Record, RecordFormat, encode

logger = logging.getLogger(__name__)

FORMAT: Final = RecordFormat(
    "proxystash-missed-changes",
    1,
    "It has changes that the slowest tier has missed; make it readable, or move it away to go on without "
    "them",
)
# From here on the journal is written anew when less than a quarter of it counts.
_WORTH_REWRITING: Final = 4 * 1024 * 1024
_MOST_USES: Final = 100_000


class _Place(NamedTuple):
    """Where the line of a change is."""

    version: int
    removes: bool
    log: LogFile
    offset: int
    length: int


class MissedChanges:
    """The journal with its index.

    Changed by one thread at a time (whoever makes changes), read by any. `pending` says whether the authority
    lacks anything: while it does not, nobody need ask for a key.

    A change that cannot be written down is *unsaved*: it counts as missed, and stands in memory alone. Should
    memory lose it, what was written down of the key before is what counts.
    """

    def __init__(
        self,
        path: Path,
        encryptor: CredentialEncryptor,
        check_store: Callable[[], None] = lambda: None,
        *,
        sync: bool,
    ) -> None:
        self.path = path
        # Raises OSError where the path may not be made, or not be touched.
        self._check_store = check_store
        self._encryptor = encryptor
        self._sync = sync
        self._log: LogFile | None = None
        self._live_bytes = 0
        self._sequence = 0
        # Every key with a line that counts, also if the authority has got that since.
        self._places: dict[str, _Place] = {}
        self._applied: set[str] = set()
        # By key the version of a change that is unsaved.
        self._unsaved: dict[str, int] = {}
        # Every key of which there is, or may be, a line in the file: until the file goes, a later change of
        # it must be written down too, or the line would bring it back.
        self._in_file: set[str] = set()
        # The version of a Clear that the authority has missed; 0 if it has missed none.
        self.cleared_at = 0
        self.last_version = 0
        self.pending = False
        self._damaged = 0
        self._uses_lock = threading.Lock()
        self._uses: OrderedDict[str, Use] = OrderedDict()

    # -- the file

    def open(self) -> int:
        """Read the journal, if there is one; how many damaged lines it has.

        Raises StoreError if it is there and cannot be used: nobody could say what the authority has missed.
        """
        if self.path.exists():
            with FORMAT.reading(self.path):
                self._log = log = LogFile(self.path, sync=self._sync)
                self._damaged = FORMAT.read(log, partial(self._replay, log))
        self._update_pending()
        return self._damaged

    def close(self) -> None:
        """Let go of the file; idempotent."""
        self._log = None

    def _replay(self, log: LogFile, record: Record, offset: int, length: int) -> None:
        operation, version = record["op"], record["version"]
        self._sequence = max(self._sequence, record["seq"])
        if operation == "header":
            if not self._encryptor.passes_check(record["key_check"].encode()):
                raise EncryptionKeyError(f"the key at hand is not the one that {self.path} was sealed under")
            return
        if operation == "clear":
            self._forget_places()
            self.cleared_at = version
        elif operation in {"put", "delete"}:
            self._in_file.add(record["key"])
            self._set_place(record["key"], _Place(version, operation == "delete", log, offset, length))
        else:
            raise ValueError("the line says nothing known")
        self.last_version = max(self.last_version, version)

    def _header(self) -> bytes:
        return FORMAT.header(key_check=self._encryptor.make_check().decode())

    # -- what the authority lacks

    @property
    def is_in_use(self) -> bool:
        """Whether there is a journal, or something in memory that should stand in it."""
        return self._log is not None or bool(self._places) or bool(self._unsaved)

    def holds(self, key: str) -> bool:
        """Whether a change of `key` is in the journal, though perhaps not missed any more, or should be."""
        return key in self._in_file or key in self._places or key in self._unsaved

    def covers(self, key: str) -> bool:
        """Whether the authority must not be asked for `key`, since it has missed a change of it."""
        if self.cleared_at:
            return True
        return key in self._unsaved or (key in self._places and key not in self._applied)

    def read(self, key: str) -> CacheEntry | None:
        """The entry that the last missed change of `key` stored, as it was used since; None if it is unsaved.

        Raises TierError if it cannot be read, one of UNREADABLE if it is damaged.
        """
        place = self._places.get(key)
        if place is None or place.removes or key in self._unsaved:
            return None
        return self._read_at(key, place)

    def _read_at(self, key: str, place: _Place) -> CacheEntry:
        try:
            line = place.log.read(place.offset, place.length)
        except OSError as error:
            raise tier_error(error) from error
        record = decode_line(line)
        entry = entry_of(
            record,
            self._encryptor,
            record["access_count"],
            record["last_accessed"],
            record["evicted_from_l1"],
        )
        use = self._uses.get(key)
        if use is None or use.version != entry.version:
            return entry
        return with_use(entry, use.access_count, use.last_accessed_us, use.evicted_from_l1)

    def keys(self) -> list[str]:
        """The keys whose last change the authority lacks."""
        written = dict.fromkeys(key for key in list(self._places) if key not in self._applied)
        return list(written | dict.fromkeys(list(self._unsaved)))

    def version_of(self, key: str) -> int:
        """The version of the last change of `key`, if it was missed."""
        place = self._places.get(key)
        return self._unsaved.get(key, 0 if place is None else place.version)

    def entries(self) -> int:
        """How many of them stored an entry."""
        places = list(self._places.items())
        return sum(not place.removes and key not in self._applied for key, place in places)

    def has_older_line(self, key: str) -> bool:
        """Whether the file has, or may have, another change of `key` than the last, which is unsaved."""
        return key in self._unsaved and key in self._in_file

    def is_unsaved(self, key: str) -> bool:
        """Whether the last change of `key` stands in memory alone."""
        return key in self._unsaved

    def unsaved_keys(self) -> list[str]:
        """The keys whose last change stands in memory alone."""
        return list(self._unsaved)

    def write_of(self, key: str) -> Write | None:
        """The last change of `key` that was written down; None if the authority has it, or it is unreadable.

        Raises TierError if it cannot be read now.
        """
        place = self._places.get(key)
        if place is None or key in self._applied:
            return None
        if place.removes:
            return Write(key, None, place.version)
        entry = None
        with suppress(*UNREADABLE):
            entry = self._read_at(key, place)
        if entry is not None:
            return Write(key, entry, place.version)
        # Its line is kept for the operator, like one that was damaged when the journal was opened.
        self._damaged += 1
        return None

    # -- changing

    def append(self, writes: Sequence[Write]) -> None:
        """Write changes down; durable on return. Raises TierError, and then nothing has changed."""
        if not writes:
            return
        lines = []
        for write in writes:
            self._sequence += 1
            lines.append(finish_line(write_body(write, self._encryptor), self._sequence))
        kill_point("missed.before_append")
        offset = self._append(b"".join(lines), [write.key for write in writes])
        kill_point("missed.after_append")
        assert self._log is not None
        for write, line in zip(writes, lines, strict=True):
            place = _Place(write.version, write.entry is None, self._log, offset, len(line))
            self._set_place(write.key, place)
            self._unsaved.pop(write.key, None)
            self.last_version = max(self.last_version, write.version)
            offset += len(line)
        self._update_pending()
        self._rewrite_if_worth_it()

    def append_clear(self, version: int) -> None:
        """Write down that everything was removed; durable on return. Raises TierError."""
        self._sequence += 1
        self._append(finish_line(encode_body({"op": "clear", "version": version}), self._sequence), ())
        self._forget_places()
        self.cleared_at = version
        self.last_version = max(self.last_version, version)
        self._update_pending()
        with self._uses_lock:
            self._uses.clear()

    def note_unsaved(self, writes: Iterable[Write]) -> None:
        """These changes stand in memory alone."""
        self._unsaved.update((write.key, write.version) for write in writes)
        self._update_pending()

    def forget_unsaved(self, keys: Iterable[str]) -> None:
        """Memory has lost these changes."""
        for key in keys:
            self._unsaved.pop(key, None)
        self._update_pending()

    def drop_older(self, key: str, version: int) -> None:
        """The authority, it turns out, has had a later change of `key`, or has one that counts as such."""
        place = self._places.get(key)
        if place is not None and place.version < version:
            self.mark_applied([key])

    def cleared(self) -> None:
        """The authority has made up for the Clear it had missed."""
        self.cleared_at = 0
        self._update_pending()

    def mark_applied(self, keys: Iterable[str]) -> None:
        """The authority has the last changes of these keys."""
        for key in keys:
            self._unsaved.pop(key, None)
            if key in self._places:
                self._applied.add(key)
        self._update_pending()

    def finish(self) -> None:
        """Take the journal away, if the authority lacks nothing of it. Raises TierError."""
        if self.pending or self._log is None:
            return
        kill_point("missed.before_unlink")
        try:
            self._check_store()
            if self._damaged:
                # Its sound part has been made up for; the rest is the operator's.
                self.path.rename(unused_path(self.path, "damaged"))
                self._damaged = 0
            else:
                self.path.unlink(missing_ok=True)
            kill_point("missed.after_unlink")
            if self._sync:
                sync_directory(self.path.parent)
        except OSError as error:
            raise tier_error(error) from error
        self.close()
        self._forget_places()

    # -- uses

    def add_uses(self, uses: Iterable[Use]) -> None:
        """The authority was not told of these uses. In memory alone; the oldest go if there are too many."""
        with self._uses_lock:
            for use in uses:
                self._uses[use.key] = use
                self._uses.move_to_end(use.key)
            while len(self._uses) > _MOST_USES:
                self._uses.popitem(last=False)

    def take_uses(self) -> list[Use]:
        """The uses that the authority was not told of, which are forgotten here."""
        if not self._uses:
            return []
        with self._uses_lock:
            uses = list(self._uses.values())
            self._uses.clear()
        return uses

    # -- inside

    def _append(self, lines: bytes, keys: Sequence[str]) -> int:
        """Write the lines of `keys` at the end; the offset of the first.

        Raises TierError, and then nothing counts of it.
        """
        try:
            if self._log is None:
                self._check_store()
                make_directory(self.path.parent, sync=self._sync)
                self._log = LogFile(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, sync=self._sync)
                if self._sync:
                    sync_directory(self.path.parent)
            end = self._log.end
            first = b"" if end else self._header()
            offset = self._log.append(first + lines) + len(first)
            try:
                self._log.sync()
            except OSError:
                self._log.cut_off(end)
                raise
            if not self._log.is_in_place:
                self._log = None
                raise TierError(f"{self.path} was removed or replaced")
        except OSError as error:
            if self._log is not None and self._log.is_torn:
                self._in_file.update(keys)
            raise tier_error(error) from error
        self._in_file.update(keys)
        return offset

    def _rewrite_if_worth_it(self) -> None:
        if self._log is None or self._log.end < max(_WORTH_REWRITING, self._live_bytes * 4):
            return
        parts = [self._header()]
        if self.cleared_at:
            parts.append(encode({"op": "clear", "version": self.cleared_at}))
        end = sum(map(len, parts))
        moved: dict[str, _Place] = {}
        try:
            for key, place in self._places.items():
                parts.append(place.log.read(place.offset, place.length))
                moved[key] = place._replace(offset=end)
                end += place.length
            if self._damaged:
                # Its damaged lines are the operator's.
                unused_path(self.path, "damaged").hardlink_to(self.path)
                self._damaged = 0
            replace_file(self.path, b"".join(parts), sync=self._sync)
            log = LogFile(self.path, sync=self._sync)
        except OSError as error:
            # It goes on growing, and is tried again with the next change.
            logger.warning("rewriting the journal failed", extra={"error": str(error)})
            return
        log.end = end
        self._log, self._in_file = log, set(moved)
        for key, place in moved.items():
            self._places[key] = place._replace(log=log)

    def _set_place(self, key: str, place: _Place) -> None:
        before = self._places.get(key)
        self._live_bytes += place.length - (0 if before is None else before.length)
        self._places[key] = place
        self._applied.discard(key)

    def _forget_places(self) -> None:
        self._places.clear()
        self._applied.clear()
        self._in_file.clear()
        self._unsaved.clear()
        self._live_bytes = 0

    def _update_pending(self) -> None:
        self.pending = bool(self.cleared_at or self._unsaved) or len(self._places) > len(self._applied)
