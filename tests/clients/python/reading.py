"""What lists give when they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from proxystash import CacheEntry, Rejected, read_proxy_file

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


Write = Callable[[str, str | bytes], Path]


def read(path: Path) -> list[CacheEntry | Rejected]:
    return list(read_proxy_file(path, now=NOW))


def read_record(write: Write, **record: Any) -> CacheEntry | Rejected:
    """What one JSON record becomes."""
    (outcome,) = read(write("one.json", json.dumps([record])))
    return outcome


def read_line(write: Write, line: str) -> CacheEntry | Rejected:
    """What one line of a text file becomes."""
    (outcome,) = read(write("one.txt", line + "\n"))
    return outcome


def entry_of(outcome: CacheEntry | Rejected) -> CacheEntry:
    assert isinstance(outcome, CacheEntry), outcome
    return outcome


def address_of(outcome: CacheEntry | Rejected) -> tuple[str, str | None, str | None]:
    entry = entry_of(outcome)
    return entry.proxy_url, entry.username, entry.password
