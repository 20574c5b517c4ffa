"""The rows of the SQLite tier: entries to rows and back, and the checksum over what a put stored."""

from __future__ import annotations

import zlib
from typing import Any

from proxystash_server.cache.entry.credentials import CredentialEncryptor, UnreadableCredentialsError
from proxystash_server.cache.entry.entry import CacheEntry, entry_of_content
from proxystash_server.cache.entry.limits import MAX_USE
from proxystash_server.cache.entry.plain import (
    STORED_NAMES,
    CorruptRecordError,
    column_values,
    content_of_columns,
)
from proxystash_server.cache.ground.parsing import UNREADABLE

CONTENT_LENGTH = len(STORED_NAMES)
# What makes an entry: the content, covered by the checksum, and how it was used, which changes without it.
COLUMNS = f"{', '.join(STORED_NAMES)}, checksum, access_count, last_accessed, evicted_from_l1"
_USES = slice(CONTENT_LENGTH + 1, CONTENT_LENGTH + 4)

Row = tuple[Any, ...]


def write_row(entry: CacheEntry, encryptor: CredentialEncryptor, recency: int) -> Row:
    """An entry as the values of COLUMNS, then `scheme` and `recency`."""
    stored = entry.content
    content = column_values(stored, encryptor)
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
    check_row(row)
    access_count, last_accessed_us, evicted_from_l1 = row[_USES]
    try:
        return entry_of_content(
            content_of_columns(row[:CONTENT_LENGTH], encryptor),
            access_count,
            last_accessed_us,
            bool(evicted_from_l1),
        )
    except UnreadableCredentialsError:
        raise
    except UNREADABLE:
        raise CorruptRecordError("the row lacks what it should say") from None


def check_row(row: Row) -> None:
    """Raise CorruptRecordError for values of COLUMNS that are not those of a row as it was written."""
    if not matches_checksum(row[:CONTENT_LENGTH], row[CONTENT_LENGTH]):
        raise CorruptRecordError("the row does not match its checksum")
    # The checksum leaves out what changes without a put.
    for value in row[_USES]:
        if not isinstance(value, int) or not 0 <= value <= MAX_USE:
            raise CorruptRecordError("what it says of its uses is damaged")


def checksum(content: Row) -> int:
    """The CRC-32 of the part of a row that a put stored: the first CONTENT_LENGTH of COLUMNS.

    Of its `ascii`: what `repr` shows as it is depends on the version of Unicode, and so of Python. A column
    that was added later, where it says nothing, is left out: rows from before keep their checksums.
    """
    return zlib.crc32(ascii(_covered(content)).encode())


def matches_checksum(content: Row, expected: object) -> bool:
    """Whether `expected` is the checksum of a content, as it is made now or was by earlier releases."""
    return checksum(content) == expected or (
        zlib.crc32(repr(_covered(content)).encode("utf-8", "surrogatepass")) == expected
    )


def _covered(content: Row) -> Row:
    return content[:-1] if content[-1] == 0 else content


def scheme_of(proxy_url: str) -> str:
    """What stands in the column `scheme`, by which listings are filtered."""
    return proxy_url.partition("://")[0]
