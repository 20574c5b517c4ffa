"""The directory of the JSONL tier: where its files are, what it is, and what was set aside."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from proxystash_server.cache.errors import StoreFormatError
from proxystash_server.cache.ground.files import make_directory, replace_file
from proxystash_server.cache.tiers.jsonl.shard import FORMAT, FORMAT_VERSION

SHARDS = 8
_META = "meta.json"
_SET_ASIDE = "set-aside.jsonl"


class JsonlDirectory:
    """Paths and small files of one store; the shards' contents are not its business."""

    def __init__(self, path: Path, *, sync: bool) -> None:
        self._path = path
        self._sync = sync

    @property
    def meta_path(self) -> Path:
        """Where the store says what it is."""
        return self._path / _META

    @property
    def set_aside_path(self) -> Path:
        """Where damaged lines are kept."""
        return self._path / _SET_ASIDE

    def create(self) -> None:
        """Make the directory if need be."""
        make_directory(self._path, sync=self._sync)

    def shard_path(self, number: int) -> Path:
        """Where a shard is."""
        return self._path / f"shard-{number}.jsonl"

    def create_meta(self, key_check: str) -> dict[str, Any]:
        """Give a new store its name, write that down, and return it."""
        meta = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "id": uuid.uuid4().hex,
            "key_check": key_check,
            "incomplete": 1,
        }
        self.write_meta(meta)
        return meta

    def upgrade_meta(self, meta: dict[str, Any], marks: dict[str, int]) -> dict[str, Any]:
        """Bring what a store of format 1 says of itself to this format, write that down, and return it.

        `marks` are what its lines noted that the other disk tier had missed.
        """
        upgraded = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "id": meta["store_id"],
            "partner": meta.get("partner_id", ""),
            "key_check": meta["key_check"],
            "inherited": json.dumps(marks),
        }
        self.write_meta(upgraded)
        return upgraded

    def read_meta(self) -> dict[str, Any] | None:
        """What the store says it is; None if there is nothing, or nothing readable.

        Raises StoreFormatError if it says that it is something else, or newer.
        """
        path = self._path / _META
        try:
            meta = json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        kinds = {"format": str, "version": int, "key_check": str}
        if not isinstance(meta, dict) or not all(isinstance(meta.get(name), kinds[name]) for name in kinds):
            return None
        if not isinstance(meta.get("id" if meta["version"] > 1 else "store_id"), str):
            return None
        if meta["format"] != FORMAT or meta["version"] > FORMAT_VERSION:
            raise StoreFormatError(
                f"{path} has format {meta['format']} {meta['version']}; this release reads {FORMAT} up to "
                f"{FORMAT_VERSION}. Use a newer release, or move {self._path} away"
            )
        return meta

    def set_damaged_meta_aside(self) -> bool:
        """Rename a meta file that could not be read; whether there was one."""
        path = self._path / _META
        if not path.exists():
            return False
        number = 1
        while (target := path.with_name(f"{_META}.damaged-{number}")).exists():
            number += 1
        path.rename(target)
        return True

    def write_meta(self, meta: dict[str, Any]) -> None:
        """Replace what the store says it is."""
        replace_file(self.meta_path, json.dumps(meta, indent=1).encode() + b"\n", sync=self._sync)

    def set_aside(self, file: str, offset: int, line: bytes, reason: str, now_us: int) -> None:
        """Keep a damaged line for the operator."""
        report = {
            "set_aside_at": now_us,
            "reason": reason,
            "file": file,
            "offset": offset,
            "line": line.decode("utf-8", "backslashreplace"),
        }
        with os.fdopen(
            os.open(self.set_aside_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab"
        ) as output:
            output.write(json.dumps(report).encode() + b"\n")
