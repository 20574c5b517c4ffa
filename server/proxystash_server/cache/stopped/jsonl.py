"""A JSONL store that nobody has open."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from proxystash_server.cache.config import CacheTierType
from proxystash_server.cache.entry.credentials import CredentialEncryptor, UnreadableCredentialsError
from proxystash_server.cache.entry.entry import CacheEntry
from proxystash_server.cache.errors import StoreFormatError
from proxystash_server.cache.stopped.report import Progress, Report
from proxystash_server.cache.stopped.store import REPAIR, RESTORE, StoppedStore
from proxystash_server.cache.tiers.jsonl.directory import SHARDS, JsonlDirectory
from proxystash_server.cache.tiers.jsonl.load import load
from proxystash_server.cache.tiers.jsonl.record import read_entry
from proxystash_server.cache.tiers.jsonl.shard import FORMAT_VERSION, Segment, Shard, Slot, is_sound
from proxystash_server.cache.tiers.sqlite.format import RENAMED_NOTES

# The last two stand only in files of an earlier format.
_OPERATIONS = frozenset({"header", "put", "delete", "touch", "clear", "probe", "backlog", "settle"})


class StoppedJsonl(StoppedStore):
    """`meta.json` and the shards, which are read as the tier reads them at its start."""

    def __init__(self, tier: CacheTierType, path: Path) -> None:
        super().__init__(tier, "jsonl", path)
        self._directory = JsonlDirectory(path, sync=False)
        self._shards: dict[int, Path] = {}
        self._set_aside: set[int] = set()

    def is_there(self) -> bool:
        paths = [self._directory.meta_path, *map(self._directory.shard_path, range(SHARDS))]
        return any(path.exists() for path in paths)

    def open(self, report: Report) -> bool:
        self.totals.exists = self.is_there()
        paths = {number: self._directory.shard_path(number) for number in range(SHARDS)}
        self._shards = {number: path for number, path in paths.items() if path.exists()}
        sizes = [path.stat().st_size for path in self._shards.values()]
        if not self.totals.exists or not self._read_meta(sizes, report):
            return False
        for number, path in paths.items():
            if number not in self._shards and any(sizes):
                message, remedy = "is missing with its share of the entries", "--repair makes an empty one"
                report.fault("lost_shard", str(path), message, f"{RESTORE}; {remedy}")
            elif number not in self._shards or not path.stat().st_size:
                report.note(
                    "unfinished_store", str(path), "is missing or empty yet", "the next start begins it"
                )
        self._read_set_aside(report)
        return True

    def entries(
        self, encryptor: CredentialEncryptor, report: Report, progress: Progress
    ) -> Iterator[CacheEntry]:
        shards = [_WatchedShard(path, number, report) for number, path in self._shards.items()]
        try:
            loaded = load(shards, partial(self._report_damaged, report))
        except StoreFormatError as error:
            report.fault("unknown_format", str(self.path), str(error), "use a newer release")
            return
        except (ValueError, AttributeError):
            message = "a line has a right checksum, but is no JSON object"
            report.fault("damaged_line", str(self.path), message, REPAIR)
            return
        self.last_version = loaded.last_version
        if loaded.cleared_at:
            message = "a Clear was interrupted; what stands before it does not count"
            report.note("unfinished_clear", str(self.path), message, "the next start finishes it")
        total = sum(len(shard.index) for shard in shards)
        for shard in shards:
            for key, slot in shard.index.items():
                self.totals.entries += 1
                progress(f"reading {self.tier}", self.totals.entries, total)
                entry = self._read(shard, key, slot, encryptor, report)
                if entry is not None:
                    yield entry

    def _read_meta(self, sizes: list[int], report: Report) -> bool:
        path = self._directory.meta_path
        try:
            meta = self._directory.read_meta()
        except StoreFormatError as error:
            report.fault("unknown_format", str(path), str(error))
            return False
        if meta is not None:
            self.notes = {RENAMED_NOTES.get(name, name): value for name, value in meta.items()}
            if meta.get("sizes") == sizes:
                self.sealed_at = meta.get("sealed_at")
            self.key_check = meta["key_check"].encode()
            report.note_older_format(str(path), meta["version"], FORMAT_VERSION)
        elif path.exists():
            report.fault("damaged_meta", str(path), "the file is damaged", "--repair makes a new one")
        elif any(sizes):
            remedy = f"{RESTORE}; --repair makes a new one"
            report.fault("lost_meta", str(path), "the file is missing", remedy)
        return True

    def _read_set_aside(self, report: Report) -> None:
        path = self._directory.set_aside_path
        if not path.exists():
            return
        with path.open("rb") as lines:
            for line in lines:
                self.totals.set_aside += 1
                try:
                    told = json.loads(line)
                    self._set_aside.add(hash((told["file"], told["line"].rstrip("\n"))))
                except (ValueError, KeyError, TypeError):
                    continue
        report.note(
            "set_aside",
            str(path),
            f"{self.totals.set_aside} damaged lines have been set aside",
            "delete the file when you have looked at it",
        )

    def _report_damaged(self, report: Report, shard: Shard, offset: int, line: bytes) -> None:
        place = f"{shard.path} at byte {offset}"
        if offset + len(line) == shard.path.stat().st_size:
            message = "the last line was cut off by a crash"
            report.note("torn_line", place, message, "the next start cuts it off")
        elif hash((shard.path.name, line.decode("utf-8", "backslashreplace"))) in self._set_aside:
            message = "the line is damaged, and set aside already"
            report.note("known_damage", place, message, "compaction removes it")
        elif is_sound(line):
            message = "the line belongs in another shard, or lacks what it should say"
            report.fault("wrong_shard", place, message, REPAIR)
        else:
            report.fault("damaged_line", place, "the line does not match its checksum", REPAIR)

    def _read(
        self, shard: Shard, key: str, slot: Slot, encryptor: CredentialEncryptor, report: Report
    ) -> CacheEntry | None:
        place = f"{shard.path} at byte {slot.offset}"
        try:
            entry = read_entry(key, shard.segment.read(slot.offset, slot.length), slot, encryptor)
        except UnreadableCredentialsError:
            self.totals.credentials += 1
            report.unreadable_credential(place, key)
            return None
        except (ValueError, KeyError, TypeError, AttributeError):
            report.fault("damaged_line", place, f"the entry {key!r} cannot be read", REPAIR)
            return None
        self.totals.credentials += entry.sealed is not None
        return entry


class _WatchedShard(Shard):
    """A shard that reports what is odd about its sound lines, and is only looked at."""

    def __init__(self, path: Path, number: int, report: Report) -> None:
        super().__init__(path, number, ReadOnlySegment(path))
        self._report = report

    def load(self) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
        for offset, line, record in super().load():
            if record is not None:
                self._look_at(f"{self.path} at byte {offset}", record, is_first=offset == 0)
            yield offset, line, record

    def _look_at(self, place: str, record: dict[str, Any], *, is_first: bool) -> None:
        operation, sequence, held = record.get("op"), record.get("seq"), self.index.get(record.get("key", ""))
        if is_first and operation != "header":
            self._report.fault("no_header", place, "the file has no header", "--repair writes one")
        if operation == "header" and record.get("shard") != self.number:
            message = f"the file is shard {record.get('shard')} by its header"
            remedy = "put the files back in their places; --repair sets aside what is in the wrong one"
            self._report.fault("wrong_shard", place, message, remedy)
        if operation not in _OPERATIONS:
            self._report.fault("unknown_line", place, f"the line says {operation!r}", "use a newer release")
        if held is not None and isinstance(sequence, int) and sequence < held.sequence:
            message = f"line number {sequence} stands behind number {held.sequence} of its key"
            self._report.fault("wrong_order", place, message, "--repair keeps what the last line says")


class ReadOnlySegment(Segment):
    """A file that is only looked at."""

    __slots__ = ()

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def truncate(self, size: int) -> None:
        """Leave a torn line where it is."""
