"""The records of the JSONL tier: entries to lines and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from proxystash_server.cache.coherence.uses import Use
from proxystash_server.cache.entry.credentials import CredentialEncryptor
from proxystash_server.cache.entry.entry import CacheEntry, entry_of_content
from proxystash_server.cache.entry.plain import content_of_json, json_members, quoted
from proxystash_server.cache.tiers.base import Write
from proxystash_server.cache.tiers.jsonl.index import Slot
from proxystash_server.cache.tiers.jsonl.line import decode_line, finish_line, is_sound

_BOOLEANS: Final = ("false", "true")
# What follows the content in the line of a put. No text in the line looks like it: a quote in a text has a
# backslash before it.
_END: Final = re.compile(
    rb',"access_count":\d+,"last_accessed":\d+,"evicted_from_l1":(?:true|false)'
    rb'(?P<first>,"first":\d+)?(?:,"recency":\d+)?,"seq":'
)


def write_body(write: Write, encryptor: CredentialEncryptor) -> bytes:
    """A change as the beginning of a line."""
    entry = write.entry
    if entry is None:
        return delete_body(write.key, write.version)
    return (
        f'{{"op":"put","key":{quoted(write.key)},{json_members(entry.content, encryptor)},'
        f'"access_count":{entry.access_count},"last_accessed":{entry.last_accessed_us},'
        f'"evicted_from_l1":{_BOOLEANS[entry.evicted_from_l1]}'
    ).encode()


def delete_body(key: str, version: int = 0) -> bytes:
    """The beginning of a line that takes a key out."""
    return f'{{"op":"delete","key":{quoted(key)},"version":{version}'.encode()


def use_body(use: Use) -> bytes:
    """The beginning of a line that says how an entry was used."""
    key, version, access_count, last_accessed_us, evicted_from_l1 = use
    return (
        f'{{"op":"touch","key":{quoted(key)},"version":{version},"access_count":{access_count},'
        f'"last_accessed":{last_accessed_us},"evicted_from_l1":{_BOOLEANS[evicted_from_l1]}'
    ).encode()


def read_entry(key: str, line: bytes, slot: Slot, encryptor: CredentialEncryptor) -> CacheEntry:
    """The entry of a line and its slot; raises ValueError if the line is damaged or another key's."""
    record = decode_line(line)
    if record["key"] != key:
        raise ValueError("the line is another key's")
    return entry_of(record, encryptor, slot.access_count, slot.last_accessed_us, slot.evicted_from_l1)


def entry_of(
    record: Mapping[str, Any],
    encryptor: CredentialEncryptor,
    access_count: int,
    last_accessed_us: int,
    evicted_from_l1: bool,
) -> CacheEntry:
    """The entry that a put's record stored, as it was used since; raises KeyError, ValueError, TypeError."""
    content = content_of_json(record, encryptor)
    return entry_of_content(content, access_count, last_accessed_us, evicted_from_l1)


def rewrite(line: bytes, slot: Slot) -> bytes | None:
    """The line of an entry as a compaction writes it: unchanged, unless the entry was used since.

    None if damaged.
    """
    end = _END.search(line) if is_sound(line) else None
    if end is None or not slot.used:
        return line if end else None
    body = b'%b,"access_count":%d,"last_accessed":%d,"evicted_from_l1":%b%b,"recency":%d' % (
        line[: end.start()],
        slot.access_count,
        slot.last_accessed_us,
        _BOOLEANS[slot.evicted_from_l1].encode(),
        end["first"] or b"",
        slot.recency,
    )
    return finish_line(body, slot.sequence)
