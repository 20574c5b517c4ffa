"""A disk tier in append-only JSON Lines files with an index in memory: L2's default."""

from __future__ import annotations

import heapq
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from proxystash_server.cache.access_log import Access
from proxystash_server.cache.config import CacheTierConfig, CacheTierType, Durability
from proxystash_server.cache.credentials import CredentialEncryptor, UnreadableCredentialsError
from proxystash_server.cache.entry import CacheEntry, Clock, wall_clock
from proxystash_server.cache.errors import EncryptionKeyError, TierError, TierLostError
from proxystash_server.cache.eviction import EvictionPolicy, make_policy
from proxystash_server.cache.group_commit import GroupCommit
from proxystash_server.cache.killpoints import reach
from proxystash_server.cache.tiers.base import (
    EVERYTHING,
    QUIETLY_APPLIED,
    Applied,
    DurableTier,
    EntryFilter,
    OnCorruption,
    Page,
    Write,
)
from proxystash_server.cache.tiers.files import replace_file
from proxystash_server.cache.tiers.jsonl_batch import Batch, FileBatch
from proxystash_server.cache.tiers.jsonl_directory import SHARDS, JsonlDirectory
from proxystash_server.cache.tiers.jsonl_load import in_order, load, shard_number
from proxystash_server.cache.tiers.jsonl_record import (
    delete_body,
    read_entry,
    rewrite,
    touch_body,
    touch_slot,
    write_body,
)
from proxystash_server.cache.tiers.jsonl_shard import (
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
            raise TierError(f"{type(error).__name__}: {error.strerror}") from error


class JsonlCacheTier(DurableTier):
    """Entries as lines in `shard-0.jsonl` to `shard-7.jsonl`, spread by key; the latest line of a key counts.

    A put appends one line and never rewrites a file; compaction copies what is live to a new file beside. The
    index (a place and the access facts for each entry) is in memory; a get reads one line, without any lock.
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
        self._commits: GroupCommit[Callable[[set[Shard]], Any], Any] = GroupCommit(self._commit)
        self._lock = threading.Lock()
        self._policy = make_policy(config.eviction_policy)
        self._shards: list[Shard] = []
        self._size = 0
        self._sequence = 0
        self._last_version = 0
        self._backlog: dict[str, int] = {}
        self._meta: dict[str, Any] = {}
        self._doubtful = False

    # -- the store as a whole

    def open(self) -> None:
        with self._commits.lock, _Translated():
            self._directory.create()
            meta = self._directory.read_meta()
            if meta is not None and not self.encryptor.passes_check(meta["key_check"].encode()):
                raise EncryptionKeyError("the key at hand is not the one that the files were sealed under")
            lost_meta = meta is None and self._directory.set_damaged_meta_aside()
            if meta is None:
                meta = self._directory.create_meta(self.encryptor.make_check().decode())
            self._meta = meta
            shards = [Shard(self._directory.shard_path(number), number) for number in range(SHARDS)]
            damaged = self._load(shards) + lost_meta
            for shard in shards:
                if shard.end == 0:
                    shard.append(header(shard.number, SHARDS))
        for _ in range(damaged):
            self._on_corruption(self.tier_type, None, "a line was damaged and set aside")
        self.maintain()

    def close(self) -> None:
        with self._commits.lock, self._lock:
            self._shards = []
            self._policy.clear()
            self._size = 0

    def probe(self) -> None:
        def change(dirty: set[Shard]) -> None:
            self._append(self._shard(EVERYTHING), {"op": "probe"}, dirty)

        self._commits.submit(change)

    def stored_key_check(self) -> bytes | None:
        with _Translated():
            meta = self._directory.read_meta()
        return None if meta is None else str(meta["key_check"]).encode()

    @property
    def store_id(self) -> str:
        return str(self._meta.get("store_id", ""))

    @property
    def partner_id(self) -> str:
        return str(self._meta.get("partner_id", ""))

    @property
    def session(self) -> str:
        return str(self._meta.get("session", ""))

    def set_partner(self, partner_id: str, session: str) -> None:
        meta = {**self._meta, "partner_id": partner_id, "session": session}
        with self._commits.lock, _Translated():
            self._directory.write_meta(meta)
        self._meta = meta

    @property
    def doubtful(self) -> bool:
        # A file cut off between two lines looks like a shorter file.
        return self._doubtful

    @property
    def last_version(self) -> int:
        return self._last_version

    def versions(self, keys: Sequence[str]) -> dict[str, int]:
        with self._lock:
            slots = {key: self._shard(key).index.get(key) for key in keys}
        return {key: slot.version for key, slot in slots.items() if slot is not None}

    # -- reading

    def get(self, key: str) -> CacheEntry | None:
        # A miss needs no lock: a key that is replaced never leaves the index.
        if key not in self._shard(key).index:
            return None
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
            self._set_entry_aside(key, slot, line, str(error))
        except (ValueError, KeyError, TypeError):
            self._set_entry_aside(key, slot, line, "the line is damaged")
        return None

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

    def backlog(self) -> dict[str, int]:
        with self._lock:
            return dict(self._backlog)

    # -- writing

    def apply(self, writes: Sequence[Write]) -> list[Applied]:
        bodies = [write_body(write, self.encryptor) for write in writes]

        def change(dirty: set[Shard]) -> list[Applied]:
            batch = Batch(self._shards, self._room)
            applied = [
                self._apply_one(write, body, batch) for write, body in zip(writes, bodies, strict=True)
            ]
            self._write(batch, dirty)
            return applied

        result: list[Applied] = self._commits.submit(change)
        return result

    @property
    def busy(self) -> bool:
        return self._commits.lock.locked()

    def touch(self, accesses: Sequence[Access]) -> None:
        self._commits.submit(lambda dirty: self._touch(accesses, dirty))

    def clear(self) -> int:
        def change(dirty: set[Shard]) -> int:
            # One line makes it happen at one moment, also for a restart; then the files are only emptied.
            first = self._shards[0]
            self._append(first, {"op": "clear"}, dirty)
            if self._backlog:
                self._append(first, {"op": "backlog", "keys": self._backlog}, dirty)
            self._sync_all(dirty)
            dirty.clear()
            reach("jsonl.after_clear_line")
            with self._lock:
                held, self._size = self._size, 0
                self._policy.clear()
                for shard in self._shards:
                    shard.index.clear()
                    shard.live_bytes = 0
                    shard.needs_compaction = True
            self._empty_all()
            return held

        held: int = self._commits.submit(change)
        return held

    def _empty_all(self) -> None:
        # The first one last: the line that cleared the others must outlive what it cleared.
        for shard in reversed(self._shards):
            try:
                self._empty(shard)
            except OSError as error:
                # It is cleared all the same; the next compaction, in the same order, makes up for it.
                logger.warning(
                    "emptying a cleared file failed", extra={"file": shard.path.name, "error": str(error)}
                )
                return

    def trim(self) -> list[str]:
        def change(dirty: set[Shard]) -> list[str]:
            batch = Batch(self._shards, self._room)
            evicted = self._make_room(0, batch)
            self._write(batch, dirty)
            return evicted

        evicted: list[str] = self._commits.submit(change)
        return evicted

    def extend_backlog(self, marks: Mapping[str, int]) -> None:
        def change(dirty: set[Shard]) -> int:
            for key, version in marks.items():
                self._append(self._shard(key), {"op": "backlog", "keys": {key: version}}, dirty)
                self._mark(key, version)
            return len(marks)

        self._commits.submit(change)

    def settle(self, keys: Iterable[str]) -> None:
        def change(dirty: set[Shard]) -> int:
            settled = [key for key in keys if key in self._backlog]
            for key in settled:
                self._append(self._shard(key), {"op": "settle", "keys": [key]}, dirty)
                with self._lock:
                    del self._backlog[key]
            return len(settled)

        self._commits.submit(change)

    def clear_before(self, version: int) -> None:
        with self._lock:
            older = [
                key for shard in self._shards for key, slot in shard.index.items() if slot.version < version
            ]
        self.apply([Write(key, None) for key in older])

    def maintain(self) -> None:
        """Compact every shard that is mostly garbage.

        Reads go on; writers wait only for the last step of each.
        """
        # The first one last, as in a clear.
        for shard in self._shards[::-1]:
            if shard.wants_compaction:
                with _Translated():
                    self._compact(shard)

    # -- under the commit lock

    def _commit(self, changes: Sequence[Callable[[set[Shard]], Any]]) -> list[Any]:
        if not self._shards:
            raise TierError("the files are closed")
        dirty: set[Shard] = set()
        with _Translated():
            results = [change(dirty) for change in changes]
            self._sync_all(dirty)
            for shard in dirty:
                # Writes into a file that was deleted or replaced succeed, and are lost.
                if not shard.segment.is_at(shard.path_text):
                    raise TierLostError(f"{shard.path} was removed or replaced")
        return results

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

    def _apply_one(self, write: Write, body: bytes, batch: Batch) -> Applied:
        key, entry, version, for_backlog = write
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
        elif held is not None or for_backlog:
            file.add_line(self._line(body))
            file.changes[key] = None
            batch.room += held is not None
            self._policy.remove(key)
        self._last_version = max(self._last_version, version)
        if for_backlog:
            batch.marks[key] = max(version, batch.marks.get(key, 0))
        if evicted:
            return Applied(held is not None, tuple(evicted))
        return QUIETLY_APPLIED[held is not None]

    def _make_room(self, wanted: int, batch: Batch) -> list[str]:
        if batch.room >= wanted:
            return []
        surplus = wanted - int(batch.room)
        backlog = {**self._backlog, **batch.marks} if batch.marks else self._backlog
        victims = _first(self._policy.victims(), surplus, backlog)
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
        for key, version in batch.marks.items():
            self._mark(key, version)

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

    def _mark(self, key: str, version: int) -> None:
        with self._lock:
            self._backlog[key] = max(version, self._backlog.get(key, 0))

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
        content = header(shard.number, SHARDS) + self._backlog_line(shard)
        replace_file(shard.path, content, sync=self._sync)
        fresh = Shard(shard.path, shard.number)
        fresh.end = len(content)
        with self._lock:
            self._shards[shard.number] = fresh

    # -- loading and compacting

    def _load(self, shards: list[Shard]) -> int:
        """Read every shard and publish the result; how many damaged lines there were.

        Under the commit lock.
        """

        def set_aside(shard: Shard, offset: int, line: bytes) -> None:
            self._directory.set_aside(shard.path.name, offset, line, "the line is damaged", self._clock())

        loaded = load(shards, set_aside)
        policy = self._policy_of(shards)
        size = sum(len(shard.index) for shard in shards)
        with self._lock:
            self._shards, self._policy, self._backlog = shards, policy, loaded.backlog
            self._size, self._sequence = size, loaded.sequence
            self._last_version = loaded.last_version
            self._doubtful = bool(size)
        return loaded.damaged

    def _policy_of(self, shards: Sequence[Shard]) -> EvictionPolicy:
        policy = make_policy(self.config.eviction_policy)
        for key, slot in in_order(shards, self.config.eviction_policy):
            policy.record_put(key, slot.access_count)
        return policy

    def _compact(self, shard: Shard) -> None:
        with self._commits.lock:
            if not self._shards or self._shards[shard.number] is not shard:
                return
            with self._lock:
                slots = dict(shard.index)
            compaction = Compaction(shard, slots, header(shard.number, SHARDS) + self._backlog_line(shard))
        try:
            self._finish_compaction(shard, slots, compaction)
        except OSError:
            compaction.discard()
            raise

    def _finish_compaction(self, shard: Shard, slots: dict[str, Slot], compaction: Compaction) -> None:
        for key in compaction.copy(rewrite):
            slot = slots[key]
            self._set_entry_aside(
                key, slot, slot.segment.read(slot.offset, slot.length), "the line is damaged"
            )
        with self._commits.lock:
            if self._shards and self._shards[shard.number] is shard and compaction.finish(sync=self._sync):
                with self._lock:
                    compaction.switch_index()

    def _backlog_line(self, shard: Shard) -> bytes:
        marks = {key: version for key, version in self._backlog.items() if shard_number(key) == shard.number}
        if not marks:
            return b""
        return finish_line(encode_body({"op": "backlog", "keys": marks}), self._sequence)

    # -- lines and entries

    def _shard(self, key: str) -> Shard:
        if not self._shards:
            raise TierError("the files are closed")
        return self._shards[shard_number(key)]

    def _set_entry_aside(self, key: str, slot: Slot, line: bytes, reason: str) -> None:
        def change(dirty: set[Shard]) -> bool:
            shard = self._shard(key)
            held = shard.index.get(key)
            if held is None or held.sequence != slot.sequence:
                return False
            self._directory.set_aside(shard.path.name, slot.offset, line, reason, self._clock())
            self._append(shard, {"op": "delete", "key": key}, dirty)
            self._forget(shard, key)
            return True

        if self._commits.submit(change):
            self._on_corruption(self.tier_type, key, reason)


def _first(keys: Iterator[str], count: int, last: Mapping[str, int]) -> list[str]:
    """The first `count` keys, those in `last` only when there are no others."""
    if count == 1 and not last:
        return list(islice(keys, 1))
    chosen: list[str] = []
    reserve: list[str] = []
    for key in keys:
        if key not in last:
            chosen.append(key)
            if len(chosen) == count:
                return chosen
        elif len(reserve) < count:
            reserve.append(key)
    return (chosen + reserve)[:count]
