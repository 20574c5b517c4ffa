"""A JSONL store that nobody has open."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from proxystash_server.cache.config import CacheTierType
from proxystash_server.cache.entry.credentials import CredentialEncryptor, UnreadableCredentialsError
from proxystash_server.cache.entry.entry import CacheEntry
from proxystash_server.cache.errors import StoreFormatError
from proxystash_server.cache.ground.parsing import UNREADABLE, parse_json
from proxystash_server.cache.stopped.report import Progress, Report
from proxystash_server.cache.stopped.store import REPAIR, RESTORE, StoppedStore
from proxystash_server.cache.tiers.jsonl.directory import JsonlDirectory
from proxystash_server.cache.tiers.jsonl.index import FORMAT_VERSION, Index, Slot
from proxystash_server.cache.tiers.jsonl.log import LogFile
from proxystash_server.cache.tiers.jsonl.record import read_entry
from proxystash_server.cache.tiers.sqlite.format import RENAMED_NOTES


class StoppedJsonl(StoppedStore):
    """`meta.json` and `entries.jsonl`, which is read as the tier reads it at its start."""

    def __init__(self, tier: CacheTierType, path: Path) -> None:
        super().__init__(tier, "jsonl", path)
        self._directory = JsonlDirectory(path, sync=False)
        self._set_aside: set[int] = set()

    def is_there(self) -> bool:
        return self._directory.is_there

    def open(self, report: Report) -> bool:
        self.totals.exists = self.is_there()
        path = self._directory.log_path
        size = path.stat().st_size if path.exists() else 0
        if not self.totals.exists or not self._read_meta(size, report):
            return False
        if not path.exists() and ("sealed_at" in self.notes or self.notes.get("alone")):
            remedy = f"{RESTORE}; --repair makes an empty one"
            report.fault("lost_file", str(path), "is missing with all entries", remedy)
        elif not size:
            report.note("unfinished_store", str(path), "is missing or empty yet", "the next start begins it")
        self._read_set_aside(report)
        return bool(size)

    def entries(
        self, encryptor: CredentialEncryptor, report: Report, progress: Progress
    ) -> Iterator[CacheEntry]:
        log, index = LogFile(self._directory.log_path, os.O_RDONLY), Index()
        try:
            for offset, line in log.lines():
                if not index.replay(offset, line):
                    self._report_damaged(report, offset, line)
        except StoreFormatError as error:
            report.fault("unknown_format", str(log.path), str(error), "use a newer release")
            return
        self.last_version = index.last_version
        for key, slot in index.slots.items():
            self.totals.entries += 1
            progress(f"reading {self.tier}", self.totals.entries, len(index.slots))
            entry = self._read(log, key, slot, encryptor, report)
            if entry is not None:
                yield entry

    def _read_meta(self, size: int, report: Report) -> bool:
        path = self._directory.meta_path
        try:
            meta = self._directory.read_meta()
        except StoreFormatError as error:
            report.fault("unknown_format", str(path), str(error))
            return False
        if meta is not None:
            self.notes = {RENAMED_NOTES.get(name, name): value for name, value in meta.items()}
            if meta.get("size") == size:
                self.sealed_at = meta.get("sealed_at")
            self.key_check = meta["key_check"].encode()
            report.note_older_format(str(path), meta["version"], FORMAT_VERSION)
            self.is_of_earlier_format = meta["version"] < FORMAT_VERSION
            return not self.is_of_earlier_format
        if path.exists():
            report.fault("damaged_meta", str(path), "the file is damaged", "--repair makes a new one")
        elif size:
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
                    self._set_aside.add(hash(parse_json(line)["line"].rstrip("\n")))
                except UNREADABLE:
                    continue
        report.note(
            "set_aside",
            str(path),
            f"{self.totals.set_aside} damaged lines have been set aside",
            "delete the file when you have looked at it",
        )

    def _report_damaged(self, report: Report, offset: int, line: bytes) -> None:
        place = f"{self._directory.log_path} at byte {offset}"
        if not line.endswith(b"\n"):
            message = "the last line was cut off by a crash"
            report.note("torn_line", place, message, "the next start cuts it off")
        elif hash(line.decode("utf-8", "backslashreplace").rstrip("\n")) in self._set_aside:
            message = "the line is damaged, and set aside already"
            report.note("known_damage", place, message, "compaction removes it")
        else:
            report.fault("damaged_line", place, "the line does not match its checksum", REPAIR)

    def _read(
        self, log: LogFile, key: str, slot: Slot, encryptor: CredentialEncryptor, report: Report
    ) -> CacheEntry | None:
        place = f"{log.path} at byte {slot.offset}"
        try:
            entry = read_entry(key, log.read(slot.offset, slot.length), slot, encryptor)
        except UnreadableCredentialsError:
            self.totals.credentials += 1
            report.unreadable_credential(place, key)
            return None
        except UNREADABLE:
            report.fault("damaged_line", place, f"the entry {key!r} cannot be read", REPAIR)
            return None
        self.totals.credentials += entry.sealed is not None
        return entry
