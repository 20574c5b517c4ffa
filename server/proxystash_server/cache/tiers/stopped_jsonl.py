"""A JSONL store that nobody has open."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from proxystash_server.cache.check_report import Progress, Report
from proxystash_server.cache.config import CacheTierType
from proxystash_server.cache.credentials import CredentialEncryptor, UnreadableCredentialsError
from proxystash_server.cache.entry import CacheEntry
from proxystash_server.cache.errors import StoreFormatError
from proxystash_server.cache.tiers.jsonl_directory import SHARDS, JsonlDirectory
from proxystash_server.cache.tiers.jsonl_record import read_entry, replay
from proxystash_server.cache.tiers.jsonl_shard import Segment, Shard, Slot
from proxystash_server.cache.tiers.stopped import REPAIR, RESTORE, StoppedStore

_OPERATIONS = frozenset({"header", "put", "delete", "touch", "backlog", "settle", "clear", "probe"})


class StoppedJsonl(StoppedStore):
    """`meta.json` and the shards. One shard's index is in memory at a time."""

    def __init__(self, tier: CacheTierType, path: Path) -> None:
        super().__init__(tier, "jsonl", path)
        self._directory = JsonlDirectory(path, sync=False)
        self._shards: dict[int, Path] = {}
        self._set_aside: set[int] = set()
        self._cleared_at = 0

    def is_there(self) -> bool:
        paths = [self._directory.meta_path, *map(self._directory.shard_path, range(SHARDS))]
        return any(path.exists() for path in paths)

    def open(self, report: Report) -> bool:
        self.totals.exists = self.is_there()
        paths = {number: self._directory.shard_path(number) for number in range(SHARDS)}
        self._shards = {number: path for number, path in paths.items() if path.exists()}
        if not self.totals.exists or not self._read_meta(report):
            return False
        self._find_missing_shards(paths, report)
        self._read_set_aside(report)
        return True

    def entries(
        self, encryptor: CredentialEncryptor, report: Report, progress: Progress
    ) -> Iterator[CacheEntry]:
        self._cleared_at = 0
        total = sum(path.stat().st_size for path in self._shards.values())
        done = 0
        for number, path in self._shards.items():
            size = path.stat().st_size
            shard = Shard(path, number, ReadOnlySegment(path))
            if self._load(shard, size, report):
                for key, slot in shard.index.items():
                    progress(f"reading {self.tier}", done + slot.offset, total)
                    if slot.sequence >= self._cleared_at:
                        self.totals.entries += 1
                        entry = self._read(shard, key, slot, encryptor, report)
                        if entry is not None:
                            yield entry
            done += size
        progress(f"reading {self.tier}", total, total)
        self.totals.missed_by_other = len(self.backlog)

    def lookup(self, keys: Sequence[str], encryptor: CredentialEncryptor) -> dict[str, CacheEntry | None]:
        raise NotImplementedError("a JSONL store is read in its own order")

    def has_set_aside(self, key: str) -> bool:
        return False

    def close(self) -> None:
        """Nothing stays open between two shards."""

    def _read_meta(self, report: Report) -> bool:
        path = self._directory.meta_path
        try:
            meta = self._directory.read_meta()
        except StoreFormatError as error:
            report.fault("unknown_format", str(path), str(error))
            return False
        if meta is not None:
            self.store_id, self.partner_id = meta["store_id"], meta["partner_id"]
            self.key_check = meta["key_check"].encode()
        elif path.exists():
            report.fault("damaged_meta", str(path), "the file is damaged", "--repair makes a new one")
        elif any(shard.stat().st_size for shard in self._shards.values()):
            report.fault(
                "lost_meta", str(path), "the file is missing", f"{RESTORE}; --repair makes a new one"
            )
        return True

    def _find_missing_shards(self, paths: dict[int, Path], report: Report) -> None:
        begun = any(path.stat().st_size for path in self._shards.values())
        for number, path in paths.items():
            if number in self._shards:
                continue
            if begun:
                report.fault(
                    "lost_shard",
                    str(path),
                    "the file is missing, and with it a share of the entries",
                    f"{RESTORE}; --repair makes an empty one",
                )
            else:
                report.note("unfinished_store", str(path), "is not there yet", "the next start makes it")

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

    def _load(self, shard: Shard, size: int, report: Report) -> bool:
        """Index a shard, line by line as the tier does; whether its entries can be read."""
        if not size:
            report.note("unfinished_store", str(shard.path), "is empty yet", "the next start begins it")
            return False
        lines = shard.load()
        while True:
            try:
                offset, line, record = next(lines)
            except StopIteration:
                return True
            except ValueError:
                report.fault(
                    "damaged_line",
                    f"{shard.path} behind byte {shard.end}",
                    "a line has a right checksum, but is no JSON",
                    REPAIR,
                )
                return False
            place = f"{shard.path} at byte {offset}"
            if record is None and offset + len(line) >= size:
                report.note(
                    "torn_line", place, "the last line was cut off by a crash", "the next start cuts it off"
                )
            elif record is None:
                self._report_damaged(shard, place, line, report)
            else:
                self._replay(shard, offset, len(line) + 1, record, report)
                if offset == 0 and record["op"] != "header":
                    report.fault("no_header", place, "the file has no header", "--repair writes one")

    def _report_damaged(self, shard: Shard, place: str, line: bytes, report: Report) -> None:
        if hash((shard.path.name, line.decode("utf-8", "backslashreplace"))) in self._set_aside:
            report.note(
                "known_damage", place, "the line is damaged, and set aside already", "compaction removes it"
            )
        else:
            report.fault("damaged_line", place, "the line does not match its checksum", REPAIR)

    def _replay(self, shard: Shard, offset: int, length: int, record: dict[str, Any], report: Report) -> None:
        place = f"{shard.path} at byte {offset}"
        try:
            operation, sequence = record["op"], int(record["seq"])
            self.last_version = max(self.last_version, record.get("version", 0))
            held = shard.index.get(record.get("key", ""))
            if held is not None and sequence < held.sequence:
                report.fault(
                    "wrong_order",
                    place,
                    f"the line is number {sequence}, but stands behind number {held.sequence} of its key",
                    "--repair keeps what the last line says",
                )
            if operation == "clear":
                self._cleared_at = max(self._cleared_at, sequence)
                report.note(
                    "unfinished_clear",
                    place,
                    "a Clear was interrupted; what stands before it does not count",
                    "the next start finishes it",
                )
            if operation not in _OPERATIONS:
                report.fault("unknown_line", place, f"the line says {operation!r}", "use a newer release")
            if operation == "header" and record["shard"] != shard.number:
                report.fault(
                    "wrong_shard",
                    place,
                    f"the file is shard {record['shard']} by its header",
                    "put the files back in their places; --repair sets aside what is in the wrong one",
                )
            replay(shard, offset, length, record, self.backlog)
        except StoreFormatError as error:
            report.fault("unknown_format", place, str(error), "use a newer release")
        except (ValueError, KeyError, TypeError, AttributeError):
            report.fault("damaged_line", place, "the line lacks what it should say", REPAIR)

    def _read(
        self, shard: Shard, key: str, slot: Slot, encryptor: CredentialEncryptor, report: Report
    ) -> CacheEntry | None:
        place = f"{shard.path} at byte {slot.offset}"
        if zlib.crc32(key.encode("utf-8", "surrogatepass")) % SHARDS != shard.number:
            report.fault("wrong_shard", place, f"the entry {key!r} belongs in another shard", REPAIR)
            return None
        try:
            entry = read_entry(key, shard.segment.read(slot.offset, slot.length), slot, encryptor)
        except UnreadableCredentialsError:
            self.totals.credentials += 1
            report.fault(
                "unreadable_credential",
                place,
                f"the credential of {key!r} cannot be opened",
                f"give its key in PROXYSTASH_ENCRYPTION_KEY_PREVIOUS, or {REPAIR}",
            )
            return None
        except (ValueError, KeyError, TypeError, AttributeError):
            report.fault("damaged_line", place, f"the entry {key!r} cannot be read", REPAIR)
            return None
        self.totals.credentials += entry.sealed is not None
        return entry


class ReadOnlySegment(Segment):
    """A file that is only looked at."""

    __slots__ = ()

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def truncate(self, size: int) -> None:
        """Leave a torn line where it is."""
