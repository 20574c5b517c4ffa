"""Many keys or entries cut into requests that the server accepts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from proxystash import _convert
from proxystash.errors import InvalidArgumentError
from proxystash.models import CacheEntry, EntryError, PutResult
from proxystash.v1 import cache_service_pb2 as pb

Item = TypeVar("Item")

MAX_ITEMS = 1000
# The server's limit of 4 MiB, less what the request around the entries may take.
MAX_BYTES = 4 * 1024 * 1024 - 1024
# The tag and the length before each entry in the request.
_FRAME_BYTES = 6


def batches(items: Iterable[Item]) -> Iterator[tuple[int, list[Item]]]:
    """Up to 1,000 items at a time, each time with the position of the first."""
    remaining = iter(items)
    start = 0
    while batch := list(islice(remaining, MAX_ITEMS)):
        yield start, batch
        start += len(batch)


@dataclass(slots=True)
class PutBatch:
    """Entries that go in one request, and those among them that were refused before it."""

    request: pb.BatchPutRequest = field(default_factory=pb.BatchPutRequest)
    _outcomes: list[EntryError | None] = field(default_factory=list)
    _bytes: int = 0

    def __bool__(self) -> bool:
        return bool(self._outcomes)

    def merge(self, answers: list[PutResult | EntryError]) -> list[PutResult | EntryError]:
        """Every entry's outcome in order, given the answers for those that were sent."""
        remaining = iter(answers)
        return [next(remaining) if outcome is None else outcome for outcome in self._outcomes]

    def refuse(self, error: EntryError) -> None:
        self._outcomes.append(error)

    def add(self, message: pb.CacheEntry, size: int) -> None:
        self.request.entries.append(message)
        self._outcomes.append(None)
        self._bytes += size

    def has_room_for(self, size: int) -> bool:
        return len(self._outcomes) < MAX_ITEMS and self._bytes + size <= MAX_BYTES


def put_batches(entries: Iterable[CacheEntry]) -> Iterator[PutBatch]:
    """Up to 1,000 entries and 4 MiB at a time, in order; what no request can hold is refused in place."""
    batch = PutBatch()
    for entry in entries:
        size = 0
        try:
            message = _convert.entry_to_message(entry)
            size = message.ByteSize() + _FRAME_BYTES
            if size > MAX_BYTES:
                raise InvalidArgumentError(
                    "the entry is larger than a message may be",
                    code="INVALID_ARGUMENT",
                    reason="ENTRY_TOO_LARGE",
                )
        except InvalidArgumentError as error:
            if not batch.has_room_for(0):
                yield batch
                batch = PutBatch()
            batch.refuse(_convert.error_of_entry(error))
            continue
        if not batch.has_room_for(size):
            yield batch
            batch = PutBatch()
        batch.add(message, size)
    if batch:
        yield batch
