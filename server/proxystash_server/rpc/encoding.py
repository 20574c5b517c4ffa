"""Answers to gets and puts in the wire format, assembled from pieces.

Between two writes an entry changes only in how often and when it was used. Everything else is serialized once
and kept with the entry, so the answer to a get is a concatenation: a tenth of what filling and serializing a
message costs. The format: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Final

from google.protobuf.descriptor import Descriptor
from google.protobuf.timestamp_pb2 import Timestamp

from proxystash.v1 import cache_service_pb2 as pb
from proxystash_server.cache import CacheEntry, CacheTierType, Lookup, Lookups, Stored, keep_encoded
from proxystash_server.rpc import convert
from proxystash_server.rpc.errors import Failure

_LENGTH_DELIMITED: Final = 2


class _Varints(dict[int, bytes]):
    """Numbers, not negative, as the wire format has them; those of one or two bytes are kept."""

    def __missing__(self, number: int) -> bytes:
        first, second, third = number & 0x7F | 0x80, number >> 7 & 0x7F | 0x80, number >> 14
        if third < 0x80:
            return bytes((first, second, third))
        # Written out so far: the nanoseconds of a time are among these.
        return bytes((first, second, third & 0x7F | 0x80)) + self[number >> 21]


_VARINT: Final = _Varints(
    (number, bytes((number,) if number < 0x80 else (number & 0x7F | 0x80, number >> 7)))
    for number in range(1 << 14)
)


def _tag(descriptor: Descriptor, name: str, wire_type: int = 0) -> bytes:
    return _VARINT[descriptor.fields_by_name[name].number << 3 | wire_type]


_RESULT: Final = _tag(pb.BatchGetResponse.DESCRIPTOR, "results", _LENGTH_DELIMITED)
_UNANSWERED: Final = _tag(pb.BatchGetResponse.DESCRIPTOR, "unanswered")
_ENTRY: Final = _tag(pb.GetResponse.DESCRIPTOR, "entry", _LENGTH_DELIMITED)
_LAST_ACCESSED: Final = _tag(pb.CacheEntry.DESCRIPTOR, "last_accessed", _LENGTH_DELIMITED)
_ACCESS_COUNT: Final = _tag(pb.CacheEntry.DESCRIPTOR, "access_count")
_EVICTED: Final = _tag(pb.CacheEntry.DESCRIPTOR, "evicted_from_l1") + _VARINT[1]
_CREDENTIALS_OMITTED: Final = _tag(pb.CacheEntry.DESCRIPTOR, "credentials_omitted") + _VARINT[1]
_CHANGE: Final = _tag(pb.WatchResponse.DESCRIPTOR, "changes", _LENGTH_DELIMITED)
_CHANGED_ENTRY: Final = _tag(pb.Change.DESCRIPTOR, "entry", _LENGTH_DELIMITED)
_PUT_RESULT: Final = _tag(pb.BatchPutResponse.DESCRIPTOR, "results", _LENGTH_DELIMITED)
_STORED: Final = _tag(pb.BatchPutResult.DESCRIPTOR, "stored", _LENGTH_DELIMITED)
_ERROR: Final = _tag(pb.BatchPutResult.DESCRIPTOR, "error", _LENGTH_DELIMITED)
_KEY: Final = _tag(pb.PutResponse.DESCRIPTOR, "key", _LENGTH_DELIMITED)
_EXPIRES_AT: Final = _tag(pb.PutResponse.DESCRIPTOR, "expires_at", _LENGTH_DELIMITED)
_KEPT: Final = _tag(pb.PutResponse.DESCRIPTOR, "kept") + _VARINT[1]
_BANNED_UNTIL: Final = _tag(pb.PutResponse.DESCRIPTOR, "banned_until", _LENGTH_DELIMITED)
_SECONDS: Final = _tag(Timestamp.DESCRIPTOR, "seconds")
_NANOS: Final = _tag(Timestamp.DESCRIPTOR, "nanos")
_SERVED_BY: Final = {
    tier: _tag(pb.GetResponse.DESCRIPTOR, "served_by") + _VARINT[number]
    for tier, number in convert.TIER_TO_MESSAGE.items()
}
_SERVED_BY_SIZE: Final = 2


class _ResultHeads(dict[int, bytes]):
    """What comes before an entry of so many bytes, in the result of a batch; the usual ones are kept."""

    def __missing__(self, size: int) -> bytes:
        entry = _ENTRY + _VARINT[size]
        head = _RESULT + _VARINT[len(entry) + size + _SERVED_BY_SIZE] + entry
        if size < _MOST_HEADS:
            self[size] = head
        return head


_MOST_HEADS: Final = 4096
_RESULT_HEAD: Final = _ResultHeads()
_MISS: Final = _RESULT + _VARINT[0]


def get_response(lookup: Lookup) -> bytes:
    """A serialized GetResponse; empty for a miss."""
    entry, served_by = lookup
    if entry is None or served_by is None:
        return b""
    content = entry.encoded or _encode_content(entry)
    use = _count(entry) + _after_count(entry.last_accessed_us)
    return _ENTRY + _VARINT[len(content) + len(use)] + content + use + _SERVED_BY[served_by]


def entry_message(entry: CacheEntry) -> bytes:
    """A serialized CacheEntry, with its credentials."""
    content = entry.encoded or _encode_content(entry)
    return content + _count(entry) + _after_count(entry.last_accessed_us)


def varint(number: int) -> bytes:
    """A number, not negative, as the wire format has it."""
    return _VARINT[number]


def watch_response(change: pb.Change, entry: CacheEntry | None, *, include_credentials: bool) -> bytes:
    """A serialized WatchResponse of one change, with the entry that belongs to it; joined ones are one."""
    encoded = change.SerializeToString()
    if entry is not None:
        content = entry.encoded or _encode_content(entry)
        count = _count(entry) if include_credentials else _count_without_credentials(entry)
        use = count + _after_count(entry.last_accessed_us)
        encoded += _CHANGED_ENTRY + _VARINT[len(content) + len(use)] + content + use
    return _CHANGE + _VARINT[len(encoded)] + encoded


def unanswered(count: int) -> bytes:
    """What a serialized BatchGetResponse has behind its results when it has no room for `count` more."""
    return _UNANSWERED + _VARINT[count]


def first_results(lookups: Lookups, room: int) -> tuple[bytes, int]:
    """The results of the first lookups, as many as have room in so many bytes, and how many they are."""
    results: list[bytes] = []
    for found in zip(*lookups, strict=True):
        result = batch_get_response(Lookups([found[0]], [found[1]]))
        room -= len(result)
        if room < 0:
            break
        results.append(result)
    return b"".join(results), len(results)


def batch_get_response(lookups: Lookups) -> bytes:
    """A serialized BatchGetResponse with a result for each lookup; several of them are one, joined."""
    parts: list[bytes] = []
    used_at, after_count = -1, b""
    for entry, served_by in zip(*lookups, strict=True):
        if entry is None or served_by is None:
            parts.append(_MISS)
            continue
        # What was found together was, mostly, used at the same moment.
        if entry.last_accessed_us != used_at:
            used_at = entry.last_accessed_us
            after_count = _after_count(used_at)
        content = entry.content.encoded or _encode_content(entry)
        count = _count(entry)
        head = _RESULT_HEAD[len(content) + len(count) + len(after_count)]
        parts += (head, content, count, after_count, _SERVED_BY[served_by])
    return b"".join(parts)


def put_response(stored: Stored) -> bytes:
    """A serialized PutResponse."""
    stored_in, entry, kept, banned_until_us = stored
    content = entry.content
    key = content.key.encode()
    response = (
        _KEY
        + _VARINT[len(key)]
        + key
        + _EXPIRES_AT
        + _timestamp(content.expires_at_us)
        + _stored_in(stored_in)
    )
    if kept:
        response += _KEPT
    if banned_until_us:
        response += _BANNED_UNTIL + _timestamp(banned_until_us)
    return response


def batch_put_response(results: Iterable[bytes | Failure]) -> bytes:
    """A serialized BatchPutResponse, of a serialized PutResponse or what was wrong for each entry."""
    parts: list[bytes] = []
    for outcome in results:
        if isinstance(outcome, Failure):
            error = outcome.to_entry_error().SerializeToString()
            result = _ERROR + _VARINT[len(error)] + error
        else:
            result = _STORED + _VARINT[len(outcome)] + outcome
        parts += (_PUT_RESULT, _VARINT[len(result)], result)
    return b"".join(parts)


@functools.lru_cache(maxsize=64)
def _stored_in(tiers: tuple[CacheTierType, ...]) -> bytes:
    return pb.PutResponse(stored_in=map(convert.tier_number, tiers)).SerializeToString()


def _count(entry: CacheEntry) -> bytes:
    """The count of uses, and what else is not kept with the content: credentials stay secret in memory."""
    encoded = _public_count(entry)
    if convert.has_credentials(entry):
        message = pb.CacheEntry()
        convert.fill_credentials(message, entry)
        encoded += message.SerializeToString()
    return encoded


def _count_without_credentials(entry: CacheEntry) -> bytes:
    return _public_count(entry) + (_CREDENTIALS_OMITTED if convert.has_credentials(entry) else b"")


def _public_count(entry: CacheEntry) -> bytes:
    return _VARINT[entry.access_count] + (_EVICTED if entry.evicted_from_l1 else b"")


def _after_count(last_accessed_us: int) -> bytes:
    return _LAST_ACCESSED + _timestamp(last_accessed_us)


def _timestamp(microseconds: int) -> bytes:
    """A serialized Timestamp, and its length before it."""
    seconds, fraction = divmod(microseconds, 1_000_000)
    timestamp = _seconds(seconds) + _VARINT[fraction * 1000]
    return _VARINT[len(timestamp)] + timestamp


@functools.lru_cache(maxsize=64)
def _seconds(seconds: int) -> bytes:
    """All of a Timestamp but the value of its last field."""
    return _SECONDS + _VARINT[seconds] + _NANOS


def _encode_content(entry: CacheEntry) -> bytes:
    message = pb.CacheEntry()
    convert.fill_public_content(message, entry)
    # The value of the last tag follows with each use.
    encoded = message.SerializeToString() + _ACCESS_COUNT
    keep_encoded(entry, encoded)
    return encoded
