"""A disk tier in an append-only JSON Lines file with an index in memory: L2's default."""

from __future__ import annotations

import heapq
import math
import threading
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from proxystash_server.cache.coherence.uses import Use
from proxystash_server.cache.config import CacheTierConfig, CacheTierType, Durability
from proxystash_server.cache.entry.credentials import CredentialEncryptor, UnreadableCredentialsError
from proxystash_server.cache.entry.entry import CacheEntry, Clock, wall_clock
from proxystash_server.cache.errors import (
    EncryptionKeyError,
    StoreFormatError,
    TierError,
    TierLostError,
    tier_error,
)
from proxystash_server.cache.ground.files import make_directory, replace_file
from proxystash_server.cache.ground.killpoints import kill_point
from proxystash_server.cache.ground.parsing import UNREADABLE
from proxystash_server.cache.tiers.base import (
    QUIETLY_APPLIED,
    Applied,
    AuthorityTier,
    Decide,
    EntryFilter,
    HeldEntry,
    OnCorruption,
    Page,
    Write,
)
from proxystash_server.cache.tiers.eviction import EvictionPolicy, make_policy
from proxystash_server.cache.tiers.jsonl.compaction import Compaction
from proxystash_server.cache.tiers.jsonl.directory import JsonlDirectory
from proxystash_server.cache.tiers.jsonl.format_1 import merge_shards, meta_of_format_1, remove_shards
from proxystash_server.cache.tiers.jsonl.index import Index, Slot, header
from proxystash_server.cache.tiers.jsonl.line import encode_body, finish_line
from proxystash_server.cache.tiers.jsonl.log import LogFile
from proxystash_server.cache.tiers.jsonl.record import (
    delete_body,
    read_entry,
    rewrite,
    use_body,
    write_body,
)

# The file is worth compacting when less than half of it is live and the rest is not a trifle.
_GARBAGE_WORTH_COMPACTING = 1024 * 1024
_DAMAGED = "the line is damaged"


class _Translated:
    """Inside the block, faults of the file system are raised as TierError."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, OSError):
            raise tier_error(error) from error


class _Commit:
    """Changes of an open tier, whose commit lock is held: what was appended is durable at the end.

    In every put, so this is no generator. Faults of the file system are raised as TierError.
    """

    __slots__ = ("_looks_for_file", "_tier")

    def __init__(self, tier: JsonlCacheTier, *, looks_for_file: bool) -> None:
        self._tier = tier
        self._looks_for_file = looks_for_file

    def __enter__(self) -> None:
        log = self._tier.log
        if log is None:
            raise TierError("the file is closed")
        if self._looks_for_file and not log.is_in_place:
            # What is written beside it would be so to somebody else's.
            raise TierLostError(f"{log.path} was removed or replaced")

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is not None:
            self._tier.follow_index()
            if isinstance(error, OSError):
                raise tier_error(error) from error
            return
        log = self._tier.log
        if log is not None:
            with _Translated():
                log.sync()
            if self._looks_for_file and not log.is_in_place:
                raise TierLostError(f"{log.path} was removed or replaced")


class DamagedLine(NamedTuple):
    """A line that was found damaged when the entry of `key` was read."""

    key: str
    slot: Slot
    line: bytes
    reason: str = _DAMAGED


class _Batch:
    """Lines not yet written and what they will do to the index, where None means that a key goes.

    Readers see none of it; the batch itself sees all of it. `room` is for how many entries more there will be
    room.
    """

    __slots__ = ("_index", "_length", "changes", "lines", "room")

    def __init__(self, index: Index, room: float) -> None:
        self._index = index
        self._length = 0
        self.lines: list[bytes] = []
        self.changes: dict[str, Slot | None] = {}
        self.room = room

    def slot_of(self, key: str) -> Slot | None:
        """Where the key's entry will be found once the batch is written."""
        changes = self.changes
        return changes[key] if key in changes else self._index.slots.get(key)

    def add_line(self, line: bytes) -> int:
        """Take a line; its offset, counted from where the batch will begin."""
        offset = self._length
        self.lines.append(line)
        self._length += len(line)
        return offset


class JsonlCacheTier(AuthorityTier):
    """Entries as lines of `entries.jsonl`; the latest line of a key counts.

    A put appends one line and never rewrites the file; compaction copies what is live to a new file beside.
    The index (a place and the use facts for each entry) is in memory; a get reads one line. Writers share a
    commit lock that no reader takes. Damaged lines go to `set-aside.jsonl` and count as corruption.
    """

    backend = "jsonl"

    def __init__(
        self,
        config: CacheTierConfig,
        tier_type: CacheTierType,
        cache_dir: Path,
        encryptor: CredentialEncryptor,
        *,
        durability: Durability = Durability.PROCESS,
        clock: Clock = wall_clock,
        on_corruption: OnCorruption = lambda _tier, _key, _reason: None,
    ) -> None:
        super().__init__(config, tier_type, clock)
        self.encryptor = encryptor
        self._sync = durability is Durability.FULL
        self._directory = JsonlDirectory(cache_dir, sync=self._sync)
        self._on_corruption = on_corruption
        self.commit_lock = threading.Lock()
        # Guards the index, its places in the log, and the policy.
        self._lock = threading.Lock()
        self._policy = make_policy(config.eviction_policy)
        # None while the tier is not open.
        self.log: LogFile | None = None
        self._index = Index()
        self._needs_compaction = False
        self._meta: dict[str, Any] = {}
        self._sealed_at: int | None = None

    # -- the store as a whole

    def open(self) -> None:
        directory = self._directory
        with self.commit_lock, _Translated():
            make_directory(directory.path, sync=self._sync)
            meta = directory.read_meta()
            check = None if meta is None else meta["key_check"].encode()
            if not self.encryptor.may_go_on(check, directory.sealed()):
                raise EncryptionKeyError("the key at hand is not the one that the files were sealed under")
            damaged = int(meta is None and directory.set_damaged_meta_aside())
            marks: dict[str, int] = {}
            if (meta is not None and meta["version"] == 1) or not directory.log_path.exists():
                marks = merge_shards(directory, self._set_line_aside, sync=self._sync)
            if meta is None:
                meta = directory.create_meta(self.encryptor.make_check().decode())
            elif meta["version"] == 1:
                meta = meta_of_format_1(meta, marks)
                directory.write_meta(meta)
            remove_shards(directory)
            damaged += self._load()
            assert self.log is not None
            self._meta = {**meta, "incomplete": 1} if damaged else meta
            # A damaged line may have left an older one of its key.
            is_as_sealed = meta.get("size") == self.log.end and not damaged
            self._sealed_at = meta.get("sealed_at") if is_as_sealed else None
        for _ in range(damaged):
            self._on_corruption(self.tier_type, None, "a line was damaged and set aside")
        self.maintain()

    def close(self) -> None:
        with self.commit_lock, self._lock:
            self.log = None
            self._index = Index()
            self._policy.clear()

    def probe(self) -> None:
        with self.commit_lock, self._committing():
            self._append(encode_body({"op": "probe"}))

    def stored_key_check(self) -> bytes | None:
        with _Translated():
            meta = self._directory.read_meta()
        return None if meta is None else str(meta["key_check"]).encode()

    @property
    def notes(self) -> Mapping[str, object]:
        return self._meta

    def note(self, **notes: object) -> None:
        with self.commit_lock, self._committing():
            changed = {**self._meta, **notes}
            meta = {name: value for name, value in changed.items() if value is not None}
            self._directory.write_meta(meta)
            self._meta = meta

    @property
    def last_version(self) -> int:
        return self._index.last_version

    def seal(self, version: int) -> None:
        self.note(sealed_at=version, size=self._open_log().end)

    def break_seal(self) -> int | None:
        if "sealed_at" in self._meta:
            self.note(sealed_at=None, size=None)
        sealed_at, self._sealed_at = self._sealed_at, None
        return sealed_at

    def versions(self, keys: Sequence[str]) -> dict[str, int]:
        self._open_log()
        with self._lock:
            slots = {key: self._index.slots.get(key) for key in keys}
        return {key: slot.version for key, slot in slots.items() if slot is not None}

    # -- reading

    def get(self, key: str) -> CacheEntry | None:
        # A miss needs no lock: a key that is replaced never leaves the index.
        if key not in self._index.slots and self.log is not None:
            return None
        found = self._read(key)
        if isinstance(found, DamagedLine):
            self._set_aside([found])
            return None
        return found

    def __contains__(self, key: str) -> bool:
        self._open_log()
        return key in self._index.slots

    def size(self) -> int:
        # While changes are published there may be one too many.
        with self._lock:
            return len(self._index.slots)

    def keys(self) -> list[str]:
        with self._lock:
            return list(self._index.slots)

    def expired_keys(self, now_us: int) -> list[str]:
        with self._lock:
            slots = list(self._index.slots.items())
        return [key for key, slot in slots if slot.expires_at_us <= now_us]

    def scan(self, after: str, limit: int, entry_filter: EntryFilter, now_us: int) -> Page:
        keys = heapq.nsmallest(limit, (key for key in self.keys() if key > after))
        found = [
            entry
            for entry in map(self.get, keys)
            if entry is not None and entry.expires_at_us > now_us and entry_filter.matches(entry)
        ]
        return Page(found, keys[-1] if len(keys) == limit else None)

    # -- writing

    def apply(self, writes: Sequence[Write]) -> list[Applied]:
        bodies = [write_body(write, self.encryptor) for write in writes]
        # Whether the file is still there `maintain` finds out: a cache need not know at once.
        with self.commit_lock, self._committing(looks_for_file=False):
            return self._store(writes, bodies)

    def commit(self, keys: Sequence[str], decide: Decide) -> tuple[Sequence[Write], list[Applied]]:
        damaged: list[DamagedLine] = []
        try:
            with self.commit_lock, self._committing():
                entries: dict[str, CacheEntry] = {}
                for key in keys:
                    found = self._read(key)
                    if isinstance(found, DamagedLine):
                        damaged += self._move_aside([found])
                    elif found is not None:
                        entries[key] = found
                held = {
                    key: HeldEntry(entry.version, entry.failure_count > 0) for key, entry in entries.items()
                }
                writes = decide(held, entries.get)
                bodies = [write_body(write, self.encryptor) for write in writes]
                return writes, self._store(writes, bodies)
        finally:
            self._tell_damage(damaged)

    @property
    def busy(self) -> bool:
        return self.commit_lock.locked()

    def note_uses(self, uses: Sequence[Use]) -> None:
        with self.commit_lock, self._committing():
            slots, sequence = self._index.slots, self._index.sequence
            used: list[tuple[Slot, Use, int]] = []
            for use in uses:
                slot = slots.get(use.key)
                if slot is not None and slot.version == use.version:
                    sequence += 1
                    used.append((slot, use, sequence))
            self._write(b"".join(finish_line(use_body(use), number) for _, use, number in used))
            with self._lock:
                self._index.sequence = sequence
                for slot, (key, _, access_count, last_accessed_us, evicted_from_l1), number in used:
                    if slot.note_use(number, access_count, last_accessed_us, evicted_from_l1):
                        self._policy.record_use(key, access_count)

    def clear(self, version: int = 0) -> int:
        with self.commit_lock, self._committing():
            held, index = len(self._index.slots), Index()
            index.sequence = self._index.sequence
            index.last_version = max(self._index.last_version, version)
            first_line = header(index.last_version)
            replace_file(self._directory.log_path, first_line, sync=self._sync)
            log = LogFile(self._directory.log_path, sync=self._sync)
            log.end = len(first_line)
            with self._lock:
                self.log, self._index = log, index
                self._policy.clear()
            return held

    def trim(self) -> list[str]:
        with self.commit_lock, self._committing():
            batch = _Batch(self._index, self._room)
            evicted = self._make_room(0, batch)
            self._publish(batch)
            return evicted

    def clear_before(self, version: int) -> None:
        with self.commit_lock, self._committing():
            writes = [
                Write(key, None, version) for key, slot in self._index.slots.items() if slot.version < version
            ]
            self._store(writes, [write_body(write, self.encryptor) for write in writes])
            self._index.last_version = max(self._index.last_version, version)

    def maintain(self) -> None:
        """Compact the file if it is mostly garbage.

        Reads go on; writers wait only for the last step.
        """
        with self.commit_lock, self._committing():
            log = self._open_log()
            garbage = log.end - self._index.live_bytes
            if not self._needs_compaction and garbage <= max(
                _GARBAGE_WORTH_COMPACTING, self._index.live_bytes
            ):
                return
            with self._lock:
                slots = dict(self._index.slots)
            compaction = Compaction(log, slots, header(self._index.last_version), sync=self._sync)
        with _Translated():
            try:
                self._compact(log, compaction)
            finally:
                compaction.discard()

    # -- under the commit lock

    def _committing(self, *, looks_for_file: bool = True) -> _Commit:
        """For whoever holds the commit lock: what is appended meanwhile is durable at the end."""
        return _Commit(self, looks_for_file=looks_for_file)

    def follow_index(self) -> None:
        """Make the policy anew, which is ahead of the index where a change was cut short."""
        self._policy = self._policy_of(self._index)

    def _open_log(self) -> LogFile:
        if self.log is None:
            raise TierError("the file is closed")
        return self.log

    def _write(self, lines: bytes) -> int:
        """Append lines; the offset of the first."""
        kill_point("jsonl.before_append")
        offset = self._open_log().append(lines)
        kill_point("jsonl.after_append")
        return offset

    def _append(self, body: bytes) -> None:
        self._write(self._line(body))

    def _line(self, body: bytes) -> bytes:
        self._index.sequence += 1
        return finish_line(body, self._index.sequence)

    @property
    def _room(self) -> float:
        """For how many entries more there is room."""
        most = self.config.max_entries
        return math.inf if most is None else most - len(self._index.slots)

    def _store(self, writes: Sequence[Write], bodies: Sequence[bytes]) -> list[Applied]:
        batch = _Batch(self._index, self._room)
        applied = [self._store_one(write, body, batch) for write, body in zip(writes, bodies, strict=True)]
        self._publish(batch)
        return applied

    def _store_one(self, write: Write, body: bytes, batch: _Batch) -> Applied:
        key, entry, version = write
        index = self._index
        held = batch.slot_of(key)
        evicted: Sequence[str] = ()
        if entry is not None:
            if held is None:
                if batch.room < 1:
                    evicted = self._make_room(1, batch)
                batch.room -= 1
                line = self._line(body)
            else:
                line = self._line(b'%b,"first":%d' % (body, held.first))
            sequence = index.sequence
            batch.changes[key] = Slot(
                batch.add_line(line),
                len(line),
                sequence,
                sequence,
                sequence if held is None else held.first,
                entry.content.expires_at_us,
                entry.content.version,
                entry.access_count,
                entry.last_accessed_us,
                entry.evicted_from_l1,
            )
            self._policy.record_put(key, entry.access_count)
        elif held is not None:
            batch.add_line(self._line(body))
            batch.changes[key] = None
            batch.room += 1
            self._policy.remove(key)
        if version > index.last_version:
            index.last_version = version
        if evicted:
            return Applied(held is not None, tuple(evicted))
        return QUIETLY_APPLIED[held is not None]

    def _make_room(self, wanted: int, batch: _Batch) -> list[str]:
        if batch.room >= wanted:
            return []
        victims = list(islice(self._policy.victims(), wanted - int(batch.room)))
        for key in victims:
            batch.add_line(self._line(delete_body(key)))
            batch.changes[key] = None
            self._policy.remove(key)
        batch.room += len(victims)
        return victims

    def _publish(self, batch: _Batch) -> None:
        """Append the lines of a batch, and show what they have changed."""
        if not batch.lines:
            return
        offset = self._write(b"".join(batch.lines))
        with self._lock:
            for key, slot in batch.changes.items():
                if slot is None:
                    self._index.remove(key)
                else:
                    slot.offset += offset
                    self._index.put(key, slot)

    # -- loading and compacting

    def _load(self) -> int:
        """Read the file into a new index, creating it if need be; how many lines were damaged."""
        log, index = LogFile(self._directory.log_path, sync=self._sync), Index()
        damaged = 0
        try:
            for offset, line in log.lines():
                if not index.replay(offset, line):
                    damaged += 1
                    self._set_line_aside(log.path, offset, line)
        except StoreFormatError as error:
            raise StoreFormatError(f"{log.path}: {error}") from None
        if not log.end:
            log.append(header(0))
        policy = self._policy_of(index)
        with self._lock:
            self.log, self._index, self._policy = log, index, policy
        self._needs_compaction = damaged > 0
        return damaged

    def _policy_of(self, index: Index) -> EvictionPolicy:
        policy = make_policy(self.config.eviction_policy)
        for key, slot in index.in_order(self.config.eviction_policy):
            policy.record_put(key, slot.access_count)
        return policy

    def _compact(self, log: LogFile, compaction: Compaction) -> None:
        damaged = [DamagedLine(*one) for one in compaction.copy(rewrite)]
        if damaged:
            self._set_aside(damaged)
        with self.commit_lock:
            # It may have been cleared or opened again, or moved away.
            if self.log is log and log.is_in_place:
                compaction.finish()
                with self._lock:
                    compaction.switch(self._index)
                    self.log = compaction.new
                self._needs_compaction = False

    # -- lines and entries

    def _read(self, key: str) -> CacheEntry | DamagedLine | None:
        with self._lock:
            log, held = self._open_log(), self._index.slots.get(key)
            if held is None:
                return None
            slot = held.copy()
        with _Translated():
            line = log.read(slot.offset, slot.length)
        try:
            return read_entry(key, line, slot, self.encryptor)
        except UnreadableCredentialsError as error:
            return DamagedLine(key, slot, line, str(error))
        except UNREADABLE:
            return DamagedLine(key, slot, line)

    def _set_line_aside(self, path: Path, offset: int, line: bytes, reason: str = _DAMAGED) -> None:
        self._directory.set_aside(path.name, offset, line, reason, self._clock())

    def _set_aside(self, damaged: Sequence[DamagedLine]) -> None:
        with self.commit_lock, self._committing():
            moved = self._move_aside(damaged)
        self._tell_damage(moved)

    def _move_aside(self, damaged: Sequence[DamagedLine]) -> list[DamagedLine]:
        """Take damaged lines out, but for keys that have another one by now; those that were."""
        moved: list[DamagedLine] = []
        for one in damaged:
            held = self._index.slots.get(one.key)
            if held is not None and held.sequence == one.slot.sequence:
                self._set_line_aside(self._directory.log_path, one.slot.offset, one.line, one.reason)
                self._append(delete_body(one.key))
                with self._lock:
                    self._index.remove(one.key)
                    self._policy.remove(one.key)
                # Or every start would find the line again.
                self._needs_compaction = True
                moved.append(one)
        if moved and "incomplete" not in self._meta:
            self._meta = {**self._meta, "incomplete": 1}
            self._directory.write_meta(self._meta)
        return moved

    def _tell_damage(self, damaged: Sequence[DamagedLine]) -> None:
        for one in damaged:
            self._on_corruption(self.tier_type, one.key, one.reason)
