"""A disk tier in append-only JSON Lines files with an index in memory: L2's default."""

from __future__ import annotations

import heapq
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from proxystash_server.cache.coherence.uses import Access
from proxystash_server.cache.config import CacheTierConfig, CacheTierType, Durability
from proxystash_server.cache.entry.credentials import CredentialEncryptor, UnreadableCredentialsError
from proxystash_server.cache.entry.entry import CacheEntry, Clock, wall_clock
from proxystash_server.cache.errors import EncryptionKeyError, TierError, TierLostError
from proxystash_server.cache.ground.files import replace_file
from proxystash_server.cache.ground.killpoints import kill_point
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
from proxystash_server.cache.tiers.jsonl.batch import Batch, FileBatch
from proxystash_server.cache.tiers.jsonl.directory import SHARDS, JsonlDirectory
from proxystash_server.cache.tiers.jsonl.load import Loaded, in_order, load, shard_number
from proxystash_server.cache.tiers.jsonl.record import (
    delete_body,
    read_entry,
    rewrite,
    touch_body,
    touch_slot,
    write_body,
)
from proxystash_server.cache.tiers.jsonl.shard import (
    FORMAT_VERSION,
    Compaction,
    Shard,
    Slot,
    encode_body,
    finish_line,
    header,
)

logger = logging.getLogger(__name__)


class _Translated:
    """Inside the block, faults of the file system are raised as TierError."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, OSError):
            raise _as_tier_error(error) from error


def _as_tier_error(error: OSError) -> TierError:
    return TierError(f"{type(error).__name__}: {error.strerror}")


class _Commit:
    """The commit lock of a tier, held, and the shards that are written meanwhile.

    Each of these steps is in every put, so this is no generator. Faults of the file system are raised as
    TierError.
    """

    __slots__ = ("_dirty", "_end", "_lock", "_tier")

    def __init__(self, tier: JsonlCacheTier, lock: threading.Lock, end: Callable[[set[Shard]], None]) -> None:
        self._tier = tier
        self._lock = lock
        self._end = end

    def __enter__(self) -> set[Shard]:
        self._lock.acquire()
        if not self._tier.is_open:
            self._lock.release()
            raise TierError("the files are closed")
        self._dirty: set[Shard] = set()
        return self._dirty

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        try:
            if error is None:
                self._end(self._dirty)
            elif isinstance(error, OSError):
                raise error
        except OSError as fault:
            raise _as_tier_error(fault) from fault
        finally:
            self._lock.release()


class DamagedLine(NamedTuple):
    """A line that was found damaged when the entry of `key` was read."""

    key: str
    slot: Slot
    line: bytes
    reason: str = "the line is damaged"


class JsonlCacheTier(AuthorityTier):
    """Entries as lines in `shard-0.jsonl` to `shard-7.jsonl`, spread by key; the latest line of a key counts.

    A put appends one line and never rewrites a file; compaction copies what is live to a new file beside. The
    index (a place and the use facts for each entry) is in memory; a get reads one line, without any lock.
    Writers share a commit lock that no reader takes. Damaged lines go to `set-aside.jsonl` and count as
    corruption.
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
        self._directory = JsonlDirectory(cache_dir, sync=durability is Durability.FULL)
        self._sync = durability is Durability.FULL
        self._on_corruption = on_corruption
        self._commit_lock = threading.Lock()
        self._lock = threading.Lock()
        self._policy = make_policy(config.eviction_policy)
        self._shards: list[Shard] = []
        self._size = 0
        self._sequence = 0
        self._last_version = 0
        self._meta: dict[str, Any] = {}
        self._sealed_at: int | None = None

    # -- the store as a whole

    def open(self) -> None:
        with self._commit_lock, _Translated():
            self._directory.create()
            meta = self._directory.read_meta()
            if meta is not None and not self.encryptor.passes_check(meta["key_check"].encode()):
                raise EncryptionKeyError("the key at hand is not the one that the files were sealed under")
            lost_meta = meta is None and self._directory.set_damaged_meta_aside()
            if meta is None:
                meta = self._directory.create_meta(self.encryptor.make_check().decode())
            shards = [Shard(self._directory.shard_path(number), number) for number in range(SHARDS)]
            loaded = self._load(shards)
            if meta["version"] < FORMAT_VERSION:
                meta = self._directory.upgrade_meta(meta, loaded.marks)
            damaged = loaded.damaged + lost_meta
            self._meta = {**meta, "incomplete": 1} if damaged else meta
            sizes = [shard.end for shard in shards]
            # A damaged line may have left an older one of its key.
            self._sealed_at = meta.get("sealed_at") if sizes == meta.get("sizes") and not damaged else None
            for shard in shards:
                if shard.end == 0:
                    shard.append(header(shard.number, SHARDS))
        for _ in range(damaged):
            self._on_corruption(self.tier_type, None, "a line was damaged and set aside")
        self.maintain()

    def close(self) -> None:
        with self._commit_lock, self._lock:
            self._shards = []
            self._policy.clear()
            self._size = 0

    def probe(self) -> None:
        with self._committing() as dirty:
            self._append(self._shard(""), {"op": "probe"}, dirty)

    def stored_key_check(self) -> bytes | None:
        with _Translated():
            meta = self._directory.read_meta()
        return None if meta is None else str(meta["key_check"]).encode()

    @property
    def notes(self) -> Mapping[str, object]:
        return self._meta

    def note(self, **notes: object) -> None:
        with self._committing():
            changed = {**self._meta, **notes}
            meta = {name: value for name, value in changed.items() if value is not None}
            self._directory.write_meta(meta)
            self._meta = meta

    @property
    def last_version(self) -> int:
        return self._last_version

    def seal(self, version: int) -> None:
        self.note(sealed_at=version, sizes=[shard.end for shard in self._shards])

    def break_seal(self) -> int | None:
        if "sealed_at" in self._meta:
            self.note(sealed_at=None, sizes=None)
        sealed_at, self._sealed_at = self._sealed_at, None
        return sealed_at

    def versions(self, keys: Sequence[str]) -> dict[str, int]:
        with self._lock:
            slots = {key: self._shard(key).index.get(key) for key in keys}
        return {key: slot.version for key, slot in slots.items() if slot is not None}

    # -- reading

    def get(self, key: str) -> CacheEntry | None:
        # A miss needs no lock: a key that is replaced never leaves the index.
        if key not in self._shard(key).index:
            return None
        found = self._read(key)
        if isinstance(found, DamagedLine):
            self._set_aside([found])
            return None
        return found

    def __contains__(self, key: str) -> bool:
        with self._lock:
            return key in self._shard(key).index

    def size(self) -> int:
        return self._size

    def keys(self) -> list[str]:
        with self._lock:
            return [key for shard in self._shards for key in shard.index]

    def expired_keys(self, now_us: int, limit: int) -> list[str]:
        expired: list[str] = []
        for shard in self._shards:
            with self._lock:
                slots = list(shard.index.items())
            expired += [key for key, slot in slots if slot.expires_at_us <= now_us]
            if len(expired) >= limit:
                break
        return expired[:limit]

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
        # Whether the files are still there `maintain` finds out: a cache need not know at once.
        with self._committing(looks_for_files=False) as dirty:
            return self._store(writes, bodies, dirty)

    def commit(self, keys: Sequence[str], decide: Decide) -> tuple[Sequence[Write], list[Applied]]:
        damaged: list[DamagedLine] = []
        try:
            with self._committing() as dirty:
                entries: dict[str, CacheEntry] = {}
                for key in keys:
                    found = self._read(key)
                    if isinstance(found, DamagedLine):
                        damaged += self._move_aside([found], dirty)
                    elif found is not None:
                        entries[key] = found
                held = {
                    key: HeldEntry(entry.version, entry.failure_count > 0) for key, entry in entries.items()
                }
                writes = decide(held, entries.get)
                bodies = [write_body(write, self.encryptor) for write in writes]
                return writes, self._store(writes, bodies, dirty)
        finally:
            self._tell_damage(damaged)

    @property
    def busy(self) -> bool:
        return self._commit_lock.locked()

    def note_uses(self, accesses: Sequence[Access]) -> None:
        with self._committing() as dirty:
            self._touch(accesses, dirty)

    def clear(self, version: int = 0) -> int:
        with self._committing() as dirty:
            # One line makes it happen at one moment, also for a restart; then the files are only emptied.
            self._append(self._shards[0], {"op": "clear"}, dirty)
            self._last_version = max(self._last_version, version)
            self._sync_all(dirty)
            dirty.clear()
            kill_point("jsonl.after_clear_line")
            with self._lock:
                held, self._size = self._size, 0
                self._policy.clear()
                for shard in self._shards:
                    shard.index.clear()
                    shard.live_bytes = 0
                    shard.needs_compaction = True
            self._empty_all()
            return held

    def _empty_all(self) -> None:
        # The first one last: the line that cleared the others must outlive what it cleared.
        for shard in reversed(self._shards):
            try:
                self._empty(shard)
            except OSError as error:
                # It is cleared all the same; the next compaction, in the same order, makes up for it.
                logger.info(
                    "emptying a cleared file failed", extra={"file": shard.path.name, "error": str(error)}
                )
                return

    def trim(self) -> list[str]:
        with self._committing() as dirty:
            batch = Batch(self._shards, self._room)
            evicted = self._make_room(0, batch)
            self._write(batch, dirty)
            return evicted

    def clear_before(self, version: int) -> None:
        with self._committing() as dirty:
            writes = [
                Write(key, None, version)
                for shard in self._shards
                for key, slot in shard.index.items()
                if slot.version < version
            ]
            self._store(writes, [write_body(write, self.encryptor) for write in writes], dirty)
            self._last_version = max(self._last_version, version)

    def maintain(self) -> None:
        """Compact every shard that is mostly garbage.

        Reads go on; writers wait only for the last step of each.
        """
        with self._committing() as dirty:
            dirty.update(self._shards)
        # The first one last, as in a clear.
        for shard in self._shards[::-1]:
            if shard.wants_compaction:
                with _Translated():
                    self._compact(shard)

    # -- under the commit lock

    def _committing(self, *, looks_for_files: bool = True) -> _Commit:
        """Hold the commit lock; what was written to the shards that are added is durable at the end."""
        return _Commit(self, self._commit_lock, self._end_commit if looks_for_files else self._sync_all)

    def _end_commit(self, dirty: set[Shard]) -> None:
        self._sync_all(dirty)
        for shard in dirty:
            # Writes into a file that was deleted or replaced succeed, and are lost.
            if not shard.segment.is_at(shard.path_text):
                raise TierLostError(f"{shard.path} was removed or replaced")

    @property
    def is_open(self) -> bool:
        """Whether it has its files."""
        return bool(self._shards)

    def _sync_all(self, dirty: set[Shard]) -> None:
        if self._sync:
            for shard in dirty:
                shard.segment.sync()

    def _append(self, shard: Shard, record: dict[str, Any], dirty: set[Shard]) -> None:
        dirty.add(shard)
        shard.append(self._line(encode_body(record)))

    def _line(self, body: bytes) -> bytes:
        self._sequence += 1
        return finish_line(body, self._sequence)

    @property
    def _room(self) -> float:
        """For how many entries more there is room."""
        return math.inf if self.config.max_entries is None else self.config.max_entries - self._size

    def _store(self, writes: Sequence[Write], bodies: Sequence[bytes], dirty: set[Shard]) -> list[Applied]:
        batch = Batch(self._shards, self._room)
        applied = [self._store_one(write, body, batch) for write, body in zip(writes, bodies, strict=True)]
        self._write(batch, dirty)
        return applied

    def _store_one(self, write: Write, body: bytes, batch: Batch) -> Applied:
        key, entry, version = write
        file = batch.file_of(key)
        held = file.slot_of(key)
        evicted: Sequence[str] = ()
        if entry is not None:
            if held is None:
                if batch.room < 1:
                    evicted = self._make_room(1, batch)
                batch.room -= 1
                line = self._line(body)
            else:
                line = self._line(b'%b,"first":%d' % (body, held.first))
            sequence = self._sequence
            file.changes[key] = Slot(
                file.shard.segment,
                file.add_line(line),
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
            file.add_line(self._line(body))
            file.changes[key] = None
            batch.room += 1
            self._policy.remove(key)
        if version > self._last_version:
            self._last_version = version
        if evicted:
            return Applied(held is not None, tuple(evicted))
        return QUIETLY_APPLIED[held is not None]

    def _make_room(self, wanted: int, batch: Batch) -> list[str]:
        if batch.room >= wanted:
            return []
        victims = list(islice(self._policy.victims(), wanted - int(batch.room)))
        for key in victims:
            batch.file_of(key).evict(key, self._line(delete_body(key)))
            self._policy.remove(key)
        batch.room += len(victims)
        return victims

    def _write(self, batch: Batch, dirty: set[Shard]) -> None:
        """Append the lines of a batch, file by file, and publish them, all at once.

        What one of them brings in and what another one loses for it belong together. Room is made first:
        killed in between, the tier holds too little rather than too much.
        """
        files = list(batch.files.values())
        try:
            dirty.update([file.shard for file in files if file.make_room()])
            dirty.update([file.shard for file in files if file.write()])
        except OSError:
            self._publish([file for file in files if file.is_written])
            # The policy is ahead of the index.
            self._policy = self._policy_of(self._shards)
            raise
        self._publish(files)

    def _publish(self, files: Sequence[FileBatch]) -> None:
        growth = 0
        with self._lock:
            for file in files:
                index, live_bytes = file.shard.index, file.shard.live_bytes
                growth -= len(index)
                for key, slot in file.changes.items():
                    held = index.get(key)
                    if held is not None:
                        live_bytes -= held.length
                    if slot is not None:
                        # In the place of what was there: a lookup may come at any moment.
                        index[key] = slot
                        live_bytes += slot.length
                    elif held is not None:
                        del index[key]
                growth += len(index)
                file.shard.live_bytes = live_bytes
            # Once, since it is read without the lock.
            self._size += growth

    def _touch(self, accesses: Sequence[Access], dirty: set[Shard]) -> int:
        touched: list[tuple[Slot, Access, int]] = []
        lines: dict[Shard, list[bytes]] = {}
        shards, sequence = self._shards, self._sequence
        for access in accesses:
            shard = shards[shard_number(access.key)]
            slot = shard.index.get(access.key)
            if slot is not None and slot.version == access.version:
                sequence += 1
                lines.setdefault(shard, []).append(finish_line(touch_body(access), sequence))
                touched.append((slot, access, sequence))
        self._sequence = sequence
        for shard, some in lines.items():
            dirty.add(shard)
            shard.append(b"".join(some))
        with self._lock:
            for slot, (key, _, access_count, last_accessed_us, evicted_from_l1), number in touched:
                if touch_slot(slot, number, access_count, last_accessed_us, evicted_from_l1):
                    self._policy.record_access(key, access_count)
        return len(touched)

    def _forget(self, shard: Shard, key: str) -> None:
        with self._lock:
            self._size -= shard.forget(key)
            self._policy.remove(key)

    def _empty(self, shard: Shard) -> None:
        content = header(shard.number, SHARDS)
        replace_file(shard.path, content, sync=self._sync)
        fresh = Shard(shard.path, shard.number)
        fresh.end = len(content)
        with self._lock:
            self._shards[shard.number] = fresh

    # -- loading and compacting

    def _load(self, shards: list[Shard]) -> Loaded:
        """Read every shard and publish the result. Under the commit lock."""

        def set_aside(shard: Shard, offset: int, line: bytes) -> None:
            self._directory.set_aside(shard.path.name, offset, line, "the line is damaged", self._clock())

        loaded = load(shards, set_aside)
        policy = self._policy_of(shards)
        size = sum(len(shard.index) for shard in shards)
        with self._lock:
            self._shards, self._policy = shards, policy
            self._size, self._sequence = size, loaded.sequence
            self._last_version = loaded.last_version
        return loaded

    def _policy_of(self, shards: Sequence[Shard]) -> EvictionPolicy:
        policy = make_policy(self.config.eviction_policy)
        for key, slot in in_order(shards, self.config.eviction_policy):
            policy.record_put(key, slot.access_count)
        return policy

    def _compact(self, shard: Shard) -> None:
        with self._commit_lock:
            if not self._shards or self._shards[shard.number] is not shard:
                return
            with self._lock:
                slots = dict(shard.index)
            compaction = Compaction(shard, slots, header(shard.number, SHARDS))
        try:
            self._finish_compaction(shard, slots, compaction)
        except OSError:
            compaction.discard()
            raise

    def _finish_compaction(self, shard: Shard, slots: dict[str, Slot], compaction: Compaction) -> None:
        damaged = [
            DamagedLine(key, slots[key], slots[key].segment.read(slots[key].offset, slots[key].length))
            for key in compaction.copy(rewrite)
        ]
        if damaged:
            self._set_aside(damaged)
        with self._commit_lock:
            if self._shards and self._shards[shard.number] is shard and compaction.finish(sync=self._sync):
                with self._lock:
                    compaction.switch_index()

    # -- lines and entries

    def _shard(self, key: str) -> Shard:
        if not self._shards:
            raise TierError("the files are closed")
        return self._shards[shard_number(key)]

    def _read(self, key: str) -> CacheEntry | DamagedLine | None:
        with self._lock:
            held = self._shard(key).index.get(key)
            if held is None:
                return None
            slot = held.copy()
        with _Translated():
            line = slot.segment.read(slot.offset, slot.length)
        try:
            return read_entry(key, line, slot, self.encryptor)
        except UnreadableCredentialsError as error:
            return DamagedLine(key, slot, line, str(error))
        except (ValueError, KeyError, TypeError):
            return DamagedLine(key, slot, line)

    def _set_aside(self, damaged: Sequence[DamagedLine]) -> None:
        with self._committing() as dirty:
            moved = self._move_aside(damaged, dirty)
        self._tell_damage(moved)

    def _move_aside(self, damaged: Sequence[DamagedLine], dirty: set[Shard]) -> list[DamagedLine]:
        """Take damaged lines out, but for keys that have another one by now; those that were."""
        moved: list[DamagedLine] = []
        for one in damaged:
            shard = self._shard(one.key)
            held = shard.index.get(one.key)
            if held is not None and held.sequence == one.slot.sequence:
                self._directory.set_aside(
                    shard.path.name, one.slot.offset, one.line, one.reason, self._clock()
                )
                self._append(shard, {"op": "delete", "key": one.key}, dirty)
                self._forget(shard, one.key)
                # Or every start would find the line again.
                shard.needs_compaction = True
                moved.append(one)
        if moved and "incomplete" not in self._meta:
            self._meta = {**self._meta, "incomplete": 1}
            self._directory.write_meta(self._meta)
        return moved

    def _tell_damage(self, damaged: Sequence[DamagedLine]) -> None:
        for one in damaged:
            self._on_corruption(self.tier_type, one.key, one.reason)
