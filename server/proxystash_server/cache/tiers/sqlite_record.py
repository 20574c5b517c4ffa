"""The rows of the SQLite tier: entries to rows and back, and the checksum over what a put stored."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

from proxystash_server.cache.credentials import CredentialEncryptor
from proxystash_server.cache.entry import CacheEntry, restore_entry
from proxystash_server.cache.limits import MAX_USE
from proxystash_server.cache.tiers.record import (
    CorruptRecordError,
    labels_text,
    monitoring_from_plain,
    monitoring_text,
    quoted,
    sealed_of,
)

_CONTENT = (
    "key, proxy_url, sealed, source, fetch_time, expires_at, health_status, failure_count, "
    "health_monitoring, labels, version"
)
CONTENT_LENGTH = 11
# What makes an entry: the content, covered by the checksum, and the access facts, which change without it.
COLUMNS = f"{_CONTENT}, checksum, access_count, last_accessed, evicted_from_l1"

# The value of `announced` in the table meta while nothing is: see DurableTier.announce.
NOTHING_ANNOUNCED = "{}"

Row = tuple[Any, ...]


def write_row(entry: CacheEntry, encryptor: CredentialEncryptor, recency: int) -> Row:
    """An entry as the values of COLUMNS, then `scheme` and `recency`."""
    stored = entry.content
    sealed = sealed_of(entry, encryptor)
    content = (
        stored.key,
        stored.proxy_url,
        None if sealed is None else sealed.decode(),
        stored.source,
        stored.fetch_time_us,
        stored.expires_at_us,
        stored.health_status.value,
        stored.failure_count,
        monitoring_text(stored.health_monitoring),
        labels_text(stored.labels) if stored.labels else None,
        stored.version,
    )
    return (
        *content,
        checksum(content),
        entry.access_count,
        entry.last_accessed_us,
        int(entry.evicted_from_l1),
        scheme_of(stored.proxy_url),
        recency,
    )


def read_row(row: Row, encryptor: CredentialEncryptor) -> CacheEntry:
    """The entry of the values of COLUMNS; raises CorruptRecordError, UnreadableCredentialsError."""
    content = row[:CONTENT_LENGTH]
    if checksum(content) != row[CONTENT_LENGTH]:
        raise CorruptRecordError("the row does not match its checksum")
    # The checksum leaves out what changes without a put.
    if not all(isinstance(value, int) and 0 <= value <= MAX_USE for value in row[12:15]):
        raise CorruptRecordError("what it says of its uses is damaged")
    key, url, sealed, source, fetched, expires, status, failures, monitoring, labels, version = content
    username, password = encryptor.open(None if sealed is None else sealed.encode())
    return restore_entry(
        key,
        url,
        username,
        password,
        source,
        fetched,
        expires,
        row[13],
        row[12],
        status,
        failures,
        bool(row[14]),
        None if monitoring is None else monitoring_from_plain(json.loads(monitoring)),
        {} if labels is None else json.loads(labels),
        None if sealed is None else sealed.encode(),
        version,
    )


def checksum(content: Row) -> int:
    """The CRC-32 of the part of a row that a put stored: the first 11 of COLUMNS."""
    return zlib.crc32(repr(content).encode("utf-8", "surrogatepass"))


def scheme_of(proxy_url: str) -> str:
    """What stands in the column `scheme`, by which listings are filtered."""
    return proxy_url.partition("://")[0]


def marks_to_text(marks: Mapping[str, int]) -> str:
    """Marks, by key and version, as one text."""
    return f"{{{','.join([f'{quoted(key)}:{version}' for key, version in marks.items()])}}}"


def marks_from_text(text: object) -> dict[str, int] | None:
    """The marks of such a text; None if it is damaged."""
    try:
        marks = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return None
    sound = isinstance(marks, dict) and all(isinstance(version, int) for version in marks.values())
    return marks if sound else None
