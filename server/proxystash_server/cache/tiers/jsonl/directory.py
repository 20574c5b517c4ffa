"""The directory of the JSONL tier: where its files are, what it is, and what was set aside."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from proxystash_server.cache.errors import StoreFormatError
from proxystash_server.cache.ground.files import replace_file, unused_path
from proxystash_server.cache.ground.parsing import parse_json
from proxystash_server.cache.tiers.jsonl.index import FORMAT, FORMAT_VERSION
from proxystash_server.cache.tiers.jsonl.line import decode_line, encode_body, finish_line


class JsonlDirectory:
    """Paths and small files of one store; the lines of its entries are not its business."""

    def __init__(self, path: Path, *, sync: bool) -> None:
        self.path = path
        self._sync = sync
        self.log_path = path / "entries.jsonl"
        self.meta_path = path / "meta.json"
        self.set_aside_path = path / "set-aside.jsonl"

    @property
    def is_there(self) -> bool:
        """Whether anything of the store exists."""
        return self.meta_path.exists() or self.log_path.exists()

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

    def read_meta(self) -> dict[str, Any] | None:
        """What the store says it is; None if there is nothing, or nothing readable.

        Raises StoreFormatError if it says that it is something else, or newer.
        """
        try:
            data = self.meta_path.read_bytes()
            meta = parse_json(data)
            # Earlier releases wrote it without a checksum.
            if "crc" in meta:
                meta = decode_line(data)
        except (FileNotFoundError, ValueError, TypeError):
            return None
        kinds = {"format": str, "version": int, "key_check": str}
        if not isinstance(meta, dict) or not all(isinstance(meta.get(name), kinds[name]) for name in kinds):
            return None
        if not isinstance(meta.get("id" if meta["version"] > 1 else "store_id"), str):
            return None
        if meta["format"] != FORMAT or meta["version"] > FORMAT_VERSION:
            raise StoreFormatError(
                f"{self.meta_path} has format {meta['format']} {meta['version']}; this release reads "
                f"{FORMAT} up to {FORMAT_VERSION}. Use a newer release, or move {self.path} away"
            )
        return meta

    def sealed(self) -> Iterator[str]:
        """Some of the credentials in the file."""
        if not self.log_path.exists():
            return
        with self.log_path.open("rb") as lines:
            for line in islice(lines, 1000):
                try:
                    token = decode_line(line).get("sealed")
                except (ValueError, AttributeError):
                    continue
                if isinstance(token, str):
                    yield token

    def set_damaged_meta_aside(self) -> bool:
        """Rename a meta file that could not be read; whether there was one."""
        if not self.meta_path.exists():
            return False
        self.meta_path.rename(unused_path(self.meta_path, "damaged"))
        return True

    def write_meta(self, meta: dict[str, Any]) -> None:
        """Replace what the store says it is."""
        said = {name: value for name, value in meta.items() if name not in ("seq", "crc")}
        replace_file(self.meta_path, finish_line(encode_body(said), 0), sync=self._sync)

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
            os.open(self.set_aside_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600), "ab"
        ) as output:
            output.write(json.dumps(report).encode() + b"\n")
