"""Stores of format 1, which stood in `shard-0.jsonl` to `shard-7.jsonl`, brought to this format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from proxystash_server.cache.ground.files import replace_file
from proxystash_server.cache.ground.parsing import UNREADABLE
from proxystash_server.cache.tiers.jsonl.directory import JsonlDirectory
from proxystash_server.cache.tiers.jsonl.index import FORMAT_VERSION, header
from proxystash_server.cache.tiers.jsonl.line import decode_line, encode_body, finish_line

_SHARDS = "shard-*.jsonl"


def merge_shards(
    directory: JsonlDirectory, set_aside: Callable[[Path, int, bytes], None], *, sync: bool
) -> dict[str, int]:
    """Write the lines of all shards into the one file, in the order of their numbers.

    Damaged ones go to `set_aside` with their file and offset. Returns what the lines note that the other disk
    tier has missed: versions by key. The shards stay, if there are any. Raises OSError.
    """
    found: list[tuple[int, Path, int, bytes]] = []
    for path in sorted(directory.path.glob(_SHARDS)):
        offset = 0
        with path.open("rb") as file:
            for line in file:
                try:
                    found.append((int(decode_line(line)["seq"]), path, offset, line))
                except UNREADABLE:
                    set_aside(path, offset, line)
                offset += len(line)
    marks: dict[str, int] = {}
    lines: list[bytes] = []
    for _, path, offset, line in sorted(found):
        try:
            _replay(decode_line(line), lines, marks)
        except UNREADABLE:
            set_aside(path, offset, line)
    if found:
        replace_file(directory.log_path, header(0) + b"".join(lines), sync=sync)
    return marks


def _replay(record: dict[str, Any], lines: list[bytes], marks: dict[str, int]) -> None:
    operation = record["op"]
    if operation == "clear":
        lines.clear()
    elif operation == "backlog":
        for key, version in record["keys"].items():
            marks[key] = max(version, marks.get(key, 0))
    elif operation == "settle":
        for key in record["keys"]:
            marks.pop(key, None)
    elif operation in {"put", "delete", "touch"}:
        if record.pop("backlog", False):
            marks[record["key"]] = record["version"]
        sequence = record.pop("seq")
        del record["crc"]
        lines.append(finish_line(encode_body(record), sequence))


def meta_of_format_1(meta: dict[str, Any], marks: dict[str, int]) -> dict[str, Any]:
    """What a store of format 1 says of itself, in this format."""
    return {
        "format": meta["format"],
        "version": FORMAT_VERSION,
        "id": meta["store_id"],
        "partner": meta.get("partner_id", ""),
        "key_check": meta["key_check"],
        "inherited": json.dumps(marks),
    }


def remove_shards(directory: JsonlDirectory) -> None:
    """Take the merged shards away. Raises OSError."""
    for path in directory.path.glob(_SHARDS):
        path.unlink()
