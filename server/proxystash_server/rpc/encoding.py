"""Answers to Get and BatchGet in the wire format, assembled from what is kept serialized with each entry.

Between two writes an entry changes only in how often and when it was used. Everything else is serialized once
and kept with the entry, so an answer is a concatenation: a tenth of what filling and serializing a message
costs. The format: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from google.protobuf.descriptor import Descriptor
from google.protobuf.timestamp_pb2 import Timestamp

from proxystash.v1 import cache_service_pb2 as pb
from proxystash_server.cache import CacheEntry, Lookup, keep_encoded
from proxystash_server.rpc import convert

_LENGTH_DELIMITED: Final = 2


def _encode_varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


# Almost every length and count is among these.
_SMALL: Final = tuple(map(_encode_varint, range(4096)))


def varint(number: int) -> bytes:
    """A number, not negative, as the wire format has lengths and int64 fields."""
    return _SMALL[number] if number < len(_SMALL) else _encode_varint(number)


def _tag(descriptor: Descriptor, name: str, wire_type: int = 0) -> bytes:
    return varint(descriptor.fields_by_name[name].number << 3 | wire_type)


_RESULT: Final = _tag(pb.BatchGetResponse.DESCRIPTOR, "results", _LENGTH_DELIMITED)
_ENTRY: Final = _tag(pb.GetResponse.DESCRIPTOR, "entry", _LENGTH_DELIMITED)
_LAST_ACCESSED: Final = _tag(pb.CacheEntry.DESCRIPTOR, "last_accessed", _LENGTH_DELIMITED)
_ACCESS_COUNT: Final = _tag(pb.CacheEntry.DESCRIPTOR, "access_count")
_EVICTED: Final = _tag(pb.CacheEntry.DESCRIPTOR, "evicted_from_l1") + varint(1)
_SERVED_BY: Final = {
    tier: _tag(pb.GetResponse.DESCRIPTOR, "served_by") + varint(number)
    for tier, number in convert.TIER_TO_MESSAGE.items()
}


def get_response(lookup: Lookup) -> bytes:
    """A serialized GetResponse; empty for a miss."""
    entry, served_by = lookup
    if entry is None or served_by is None:
        return b""
    return _found(entry, _last_accessed(entry.last_accessed_us)) + _SERVED_BY[served_by]


def batch_get_response(lookups: Iterable[Lookup]) -> bytes:
    """A serialized BatchGetResponse."""
    parts: list[bytes] = []
    moment, last_accessed = -1, b""
    for entry, served_by in lookups:
        result = b""
        if entry is not None and served_by is not None:
            # What was found together was, mostly, used at the same moment.
            if entry.last_accessed_us != moment:
                moment = entry.last_accessed_us
                last_accessed = _last_accessed(moment)
            result = _found(entry, last_accessed) + _SERVED_BY[served_by]
        parts += (_RESULT, varint(len(result)), result)
    return b"".join(parts)


def _found(entry: CacheEntry, last_accessed: bytes) -> bytes:
    body = (
        (entry.encoded or _encode_content(entry)) + last_accessed + _ACCESS_COUNT + varint(entry.access_count)
    )
    if entry.evicted_from_l1:
        body += _EVICTED
    return _ENTRY + varint(len(body)) + body


def _last_accessed(microseconds: int) -> bytes:
    moment = Timestamp()
    convert.fill_timestamp(moment, microseconds)
    serialized = moment.SerializeToString()
    return _LAST_ACCESSED + varint(len(serialized)) + serialized


def _encode_content(entry: CacheEntry) -> bytes:
    message = pb.CacheEntry()
    convert.fill_content(message, entry)
    encoded = message.SerializeToString()
    keep_encoded(entry, encoded)
    return encoded
