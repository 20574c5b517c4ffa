"""Sealing the credentials of a stopped store anew, so that nothing is left of the old seals."""

from __future__ import annotations

import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final

from proxystash_server.cache.config import CacheTierConfig, CacheTierType, Durability
from proxystash_server.cache.entry.credentials import CredentialEncryptor
from proxystash_server.cache.errors import TierError
from proxystash_server.cache.stopped.report import Progress
from proxystash_server.cache.stopped.store import StoppedStore
from proxystash_server.cache.tiers.jsonl.compaction import Compaction
from proxystash_server.cache.tiers.jsonl.directory import JsonlDirectory
from proxystash_server.cache.tiers.jsonl.index import Index, Slot, header
from proxystash_server.cache.tiers.jsonl.line import decode_line, encode_body, finish_line
from proxystash_server.cache.tiers.jsonl.log import LogFile
from proxystash_server.cache.tiers.jsonl.record import rewrite
from proxystash_server.cache.tiers.jsonl.tier import JsonlCacheTier
from proxystash_server.cache.tiers.sqlite.record import COLUMNS, CONTENT_LENGTH, checksum, matches_checksum
from proxystash_server.cache.tiers.sqlite.tier import SQLiteCacheTier

# The new seal of a token, or None if it has it already.
Reseal = Callable[[bytes], bytes | None]

_BATCH: Final = 500


class Resealing(ABC):
    """One stopped store whose credentials are sealed anew.

    Every step is synced when it returns, and is either done or not after a crash at any moment.
    """

    def __init__(self, stopped: StoppedStore) -> None:
        self.stopped = stopped
        self.path = stopped.path
        self.name = f"{stopped.tier} ({stopped.totals.backend})"

    @abstractmethod
    def tidy_up(self, encryptor: CredentialEncryptor) -> None:
        """Put in order what a crash left behind, by opening the store as a start does."""

    @abstractmethod
    def set_key_check(self, token: bytes) -> None:
        """Replace the token that tells which keys the store needs."""

    @abstractmethod
    def reseal(self, change: Reseal, progress: Progress) -> int:
        """Seal every credential anew and remove what held the old seals; how many were sealed."""


class ResealingJsonl(Resealing):
    """A JSONL store: its file is written anew beside the old one, without garbage, and renamed.

    It is then not that of its orderly end any more, so as a cache it starts empty.
    """

    def tidy_up(self, encryptor: CredentialEncryptor) -> None:
        tier = JsonlCacheTier(
            CacheTierConfig(), CacheTierType.L2, self.path, encryptor, durability=Durability.FULL
        )
        tier.open()
        tier.close()

    def set_key_check(self, token: bytes) -> None:
        directory = JsonlDirectory(self.path, sync=True)
        meta = directory.read_meta()
        if meta is None:
            raise TierError(f"{directory.meta_path} is missing")
        directory.write_meta({**meta, "key_check": token.decode()})

    def reseal(self, change: Reseal, progress: Progress) -> int:
        changed = 0

        def reseal_line(line: bytes, slot: Slot) -> bytes | None:
            nonlocal changed
            current = rewrite(line, slot)
            record = None if current is None else decode_line(current)
            if record is None or record["sealed"] is None:
                return current
            token = change(record["sealed"].encode())
            if token is None:
                return current
            changed += 1
            sequence = record["seq"]
            del record["seq"], record["crc"]
            record["sealed"] = token.decode()
            return finish_line(encode_body(record), sequence)

        progress(f"writing {self.path} anew", 0, 0)
        write_anew(self.path, reseal_line)
        return changed


class ResealingDatabase(Resealing):
    """A SQLite store: rows are changed in batches, and the file is then built anew, without old pages."""

    def tidy_up(self, encryptor: CredentialEncryptor) -> None:
        tier = SQLiteCacheTier(
            CacheTierConfig(), CacheTierType.L3, self.path, encryptor, durability=Durability.FULL
        )
        tier.open()
        tier.close()

    def set_key_check(self, token: bytes) -> None:
        with closing(self._connect()) as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES ('key_check', ?)", (token,))

    def reseal(self, change: Reseal, progress: Progress) -> int:
        changed = done = last = 0
        with closing(self._connect()) as connection:
            total = connection.execute("SELECT count(*) FROM entries WHERE sealed IS NOT NULL").fetchone()[0]
            while rows := connection.execute(
                f"SELECT id, {COLUMNS} FROM entries WHERE id > ? AND sealed IS NOT NULL ORDER BY id LIMIT ?",
                (last, _BATCH),
            ).fetchall():
                connection.execute("BEGIN IMMEDIATE")
                for number, *row in rows:
                    content = tuple(row[:CONTENT_LENGTH])
                    if not matches_checksum(content, row[CONTENT_LENGTH]):
                        raise TierError(f"{self.path} row {number} is damaged")
                    token = change(content[2].encode())
                    if token is not None:
                        content = (*content[:2], token.decode(), *content[3:])
                        connection.execute(
                            "UPDATE entries SET sealed = ?, checksum = ? WHERE id = ?",
                            (content[2], checksum(content), number),
                        )
                        changed += 1
                connection.execute("COMMIT")
                last = rows[-1][0]
                done += len(rows)
                progress(f"sealing {self.name}", done, total)
            progress(f"building {self.name} anew", 0, 0)
            # Old seals may stand in pages and parts of pages that are not in use any more, and in the log.
            connection.execute("VACUUM")
            if connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                raise TierError(f"{self.path} is in use by another process")
        return changed

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=1.0, isolation_level=None)
        connection.execute("PRAGMA synchronous = FULL")
        return connection


def write_anew(path: Path, change: Callable[[bytes, Slot], bytes | None]) -> None:
    """Write the lines of a stopped, tidy store anew: the live ones alone, as `change` wants them."""
    log, index = LogFile(JsonlDirectory(path, sync=True).log_path), Index()
    for offset, line in log.lines():
        if not index.replay(offset, line):
            raise TierError(f"{log.path} is damaged at byte {offset}")
    compaction = Compaction(log, index.slots, header(index.last_version), sync=True)
    compaction.copy(change)
    compaction.finish()
