"""Sealing the credentials of a stopped store anew, so that nothing is left of the old seals."""

from __future__ import annotations

import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Final

from proxystash_server.cache.check_report import Progress
from proxystash_server.cache.config import CacheTierConfig, CacheTierType, Durability
from proxystash_server.cache.credentials import CredentialEncryptor
from proxystash_server.cache.errors import TierError
from proxystash_server.cache.tiers.base import DurableTier
from proxystash_server.cache.tiers.jsonl import JsonlCacheTier
from proxystash_server.cache.tiers.jsonl_directory import SHARDS, JsonlDirectory
from proxystash_server.cache.tiers.jsonl_record import replay, rewrite
from proxystash_server.cache.tiers.jsonl_shard import (
    Compaction,
    Shard,
    Slot,
    decode_line,
    encode_body,
    finish_line,
    header,
)
from proxystash_server.cache.tiers.sqlite import SQLiteCacheTier
from proxystash_server.cache.tiers.sqlite_record import COLUMNS, CONTENT_LENGTH, checksum
from proxystash_server.cache.tiers.stopped_jsonl import ReadOnlySegment

# The new seal of a token, or None if it has it already.
Reseal = Callable[[bytes], bytes | None]

_BATCH: Final = 500


class Resealing(ABC):
    """One stopped store whose credentials are sealed anew.

    Every step is synced when it returns, and is either done or not after a crash at any moment.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path

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
    """A JSONL store: each shard is written anew beside the old file, without garbage, and renamed."""

    def __init__(self, path: Path) -> None:
        super().__init__("l2 (jsonl)", path)
        self._directory = JsonlDirectory(path, sync=True)

    def tidy_up(self, encryptor: CredentialEncryptor) -> None:
        _open_once(
            JsonlCacheTier(
                CacheTierConfig(), CacheTierType.L2, self.path, encryptor, durability=Durability.FULL
            )
        )

    def set_key_check(self, token: bytes) -> None:
        meta = self._directory.read_meta()
        if meta is None:
            raise TierError(f"{self._directory.meta_path} is missing")
        self._directory.write_meta({**meta, "key_check": token.decode()})

    def reseal(self, change: Reseal, progress: Progress) -> int:
        changed = 0

        def reseal_line(_shard: Shard, line: bytes, slot: Slot) -> bytes | None:
            nonlocal changed
            current = rewrite(line, slot)
            record = None if current is None else decode_line(current[:-1])
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

        rewrite_shards(self.path, reseal_line, progress)
        return changed


class ResealingDatabase(Resealing):
    """A SQLite store: rows are changed in batches, and the file is then built anew, without old pages."""

    def tidy_up(self, encryptor: CredentialEncryptor) -> None:
        _open_once(
            SQLiteCacheTier(
                CacheTierConfig(), CacheTierType.L3, self.path, encryptor, durability=Durability.FULL
            )
        )

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
                    if checksum(content) != row[CONTENT_LENGTH]:
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


def rewrite_shards(
    path: Path, change: Callable[[Shard, bytes, Slot], bytes | None], progress: Progress
) -> None:
    """Write the shards of a stopped, tidy store anew: the live lines alone, as `change` wants them.

    None leaves a line out.
    """
    directory = JsonlDirectory(path, sync=True)
    for number in reversed(range(SHARDS)):
        shard_path = directory.shard_path(number)
        shard = Shard(shard_path, number, ReadOnlySegment(shard_path))
        backlog: dict[str, int] = {}
        sequence = 0
        for offset, line, record in shard.load():
            if record is None or record["op"] == "clear":
                raise TierError(f"{shard_path} is damaged at byte {offset}")
            sequence = max(sequence, record["seq"])
            replay(shard, offset, len(line) + 1, record, backlog)
        marks = finish_line(encode_body({"op": "backlog", "keys": backlog}), sequence) if backlog else b""
        compaction = Compaction(shard, dict(shard.index), header(number, SHARDS) + marks)
        compaction.copy(partial(change, shard))
        compaction.finish(sync=True)
        progress(f"writing {path} anew", SHARDS - number, SHARDS)


def _open_once(tier: DurableTier) -> None:
    tier.open()
    tier.close()
