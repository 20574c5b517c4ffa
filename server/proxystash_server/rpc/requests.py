"""What is looked at in a request before it is parsed: sizes, since parsing a giant costs more than a refusal.

A map of 300,000 labels takes the parser a second, in which no other thread runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from google.protobuf.message import DecodeError

from proxystash.v1 import cache_service_pb2 as pb
from proxystash_server.rpc.errors import UNREADABLE_REQUEST, Reason, RequestError, invalid

MAX_BATCH: Final = 1000
# An entry has 80 KiB if every text in it is as long as it may be, in four bytes for each character.
MAX_ENTRY_BYTES: Final = 128 * 1024
# The largest requests but BatchPut have an entry, or a thousand keys of 256 bytes.
MAX_REQUEST_BYTES: Final = 512 * 1024

# Makes a request of its bytes; raises RequestError.
Reader = Callable[[bytes], Any]

_ENTRIES: Final = pb.BatchPutRequest.DESCRIPTOR.fields_by_name["entries"].number
# The tag and ten bytes of a number.
_LARGEST_NUMBER: Final = 16
_NO_ENTRY: Final = bytes((_ENTRIES << 3 | 2, 0))


class BatchPut(NamedTuple):
    """A BatchPutRequest, and the places of the entries that are too large, which are empty here."""

    entries: Sequence[pb.CacheEntry]
    mode: pb.PutMode.ValueType
    too_large: frozenset[int] = frozenset()


def reader(parse: Reader) -> Reader:
    """A reader of requests that `parse` makes a message of, raising DecodeError for what is none."""

    def read(serialized: bytes) -> Any:  # noqa: ANN401 - whatever `parse` makes
        if len(serialized) > MAX_REQUEST_BYTES:
            raise invalid(
                "",
                Reason.REQUEST_TOO_LARGE,
                f"the request has {len(serialized):,} bytes; at most {MAX_REQUEST_BYTES:,} are allowed",
            )
        return _parsed(parse, serialized)

    return read


def read_batch_put(serialized: bytes) -> BatchPut:
    """The entries of a serialized BatchPutRequest; raises RequestError."""
    if len(serialized) <= MAX_ENTRY_BYTES:
        request = _parsed(pb.BatchPutRequest.FromString, serialized)
        return BatchPut(request.entries, request.mode)
    entries: list[memoryview] = []
    others: list[memoryview] = []
    too_large: set[int] = set()
    for number, field in _fields(memoryview(serialized)):
        if number == _ENTRIES:
            if len(entries) == MAX_BATCH:
                raise too_many("entries", f"more than {MAX_BATCH:,}", Reason.TOO_MANY_ENTRIES)
            if len(field) > MAX_ENTRY_BYTES:
                too_large.add(len(entries))
                field = memoryview(_NO_ENTRY)
            entries.append(field)
        elif len(field) <= _LARGEST_NUMBER:
            others.append(field)
    request = _parsed(pb.BatchPutRequest.FromString, b"".join([*others, *entries]))
    return BatchPut(request.entries, request.mode, frozenset(too_large))


def too_many(field: str, count: str, reason: Reason) -> RequestError:
    """The error for a list of more items than a request may have."""
    return invalid(field, reason, f"{field} has {count} items; at most {MAX_BATCH:,} are allowed")


def _parsed(parse: Reader, serialized: bytes) -> Any:  # noqa: ANN401 - whatever `parse` makes
    try:
        return parse(serialized)
    except DecodeError:
        raise RequestError(UNREADABLE_REQUEST) from None


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The number of each field in a serialized message, and the field with its tag; raises RequestError."""
    start = 0
    try:
        while start < len(message):
            tag, end = _varint(message, start)
            match tag & 7:
                case 0:
                    _, end = _varint(message, end)
                case 1:
                    end += 8
                case 2:
                    length, end = _varint(message, end)
                    end += length
                case 5:
                    end += 4
                case _:
                    raise RequestError(UNREADABLE_REQUEST)
            if end > len(message):
                raise RequestError(UNREADABLE_REQUEST)
            yield tag >> 3, message[start:end]
            start = end
    except IndexError:
        raise RequestError(UNREADABLE_REQUEST) from None


def _varint(message: memoryview, start: int) -> tuple[int, int]:
    """The number that begins at `start`, and where it ends; raises IndexError."""
    number, shift = 0, 0
    while (byte := message[start]) & 0x80:
        number |= (byte & 0x7F) << shift
        start, shift = start + 1, shift + 7
    return number | byte << shift, start + 1
