"""The calls of the service, said once for both kinds of client: request, answer, and what may be repeated."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Generic, TypeVar

from proxystash import _convert, messages
from proxystash._batches import PutBatch
from proxystash.models import (
    Ban,
    CacheEntry,
    CacheStatistics,
    EntryChanges,
    EntryError,
    GetResult,
    InvalidationResult,
    PutMode,
    PutResult,
)
from proxystash.v1 import cache_service_pb2 as pb

Request = TypeVar("Request")
Response = TypeVar("Response")
Answer = TypeVar("Answer")

Item = TypeVar("Item")

_ITEM = re.compile(r"\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class Operation(Generic[Request, Response, Answer]):
    """One call to make.

    `repeatable` says that doing it twice has the effect and the answer of doing it once. `locate` turns the
    name of a field at fault in the request into one that the caller knows. `written` gives the keys that an
    acknowledged write may have changed, None being all keys; a read has none.
    """

    request: Request
    convert: Callable[[Response], Answer]
    repeatable: bool
    locate: Callable[[str], str] = str
    written: Callable[[Answer], Sequence[str] | None] | None = None


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    """One page of a list, and the token of the next; empty on the last page."""

    items: list[Item]
    next_page_token: str


def get(key: str | CacheEntry) -> Operation[pb.GetRequest, pb.GetResponse, GetResult | None]:
    return Operation(pb.GetRequest(key=_convert.checked_key(key)), _convert.get_result, repeatable=True)


def get_many(
    keys: Sequence[str | CacheEntry], offset: int
) -> Operation[pb.BatchGetRequest, pb.BatchGetResponse, list[GetResult | None]]:
    """The answers for the first of the keys, as many as the server had room for.

    `offset` is the position of the first key among those the caller gave.
    """
    return Operation(
        pb.BatchGetRequest(keys=[_convert.checked_key(key) for key in keys]),
        lambda response: _convert.get_results(response, len(keys)),
        repeatable=True,
        locate=moved(offset),
    )


def moved(offset: int) -> Callable[[str], str]:
    """Names an item of a request by its place among all that were given, of which `offset` came before."""
    return renumbered(lambda place: place + offset)


def renumbered(renumber: Callable[[int], int]) -> Callable[[str], str]:
    """Names an item of a request by another number than its place there."""
    return lambda field: _ITEM.sub(lambda match: f"[{renumber(int(match[1]))}]", field, count=1)


def put(entry: CacheEntry, mode: PutMode | str) -> Operation[pb.PutRequest, pb.PutResponse, PutResult]:
    request = pb.PutRequest(entry=_convert.entry_to_message(entry), mode=_convert.mode_to_message(mode))
    return _stored(request)


def update(
    key: str | CacheEntry, changes: EntryChanges
) -> Operation[pb.PutRequest, pb.PutResponse, PutResult]:
    request = pb.PutRequest(entry=_convert.changes_to_message(key, changes))
    request.update_mask.paths.extend(_convert.paths_of(changes))
    return _stored(request)


def _stored(request: pb.PutRequest) -> Operation[pb.PutRequest, pb.PutResponse, PutResult]:
    return Operation(
        request,
        messages.read_put_result,
        repeatable=True,
        locate=lambda field: field.removeprefix("entry."),
        written=lambda result: [result.key],
    )


def bans_page(page_token: str) -> Operation[pb.ListBansRequest, pb.ListBansResponse, Page[Ban]]:
    return Operation(
        pb.ListBansRequest(page_size=1000, page_token=page_token),
        lambda response: Page([*map(messages.read_ban, response.bans)], response.next_page_token),
        repeatable=True,
    )


def unban(key: str | CacheEntry) -> Operation[pb.UnbanRequest, pb.UnbanResponse, bool]:
    # As for delete.
    request = pb.UnbanRequest(key=_convert.checked_key(key))
    return Operation(request, lambda response: response.unbanned, repeatable=False)


def put_many(
    batch: PutBatch, mode: PutMode | str
) -> Operation[pb.BatchPutRequest, pb.BatchPutResponse, list[PutResult | EntryError]]:
    batch.request.mode = _convert.mode_to_message(mode)
    return Operation(
        batch.request,
        lambda response: _convert.put_results(response, len(batch.request.entries)),
        repeatable=True,
        written=lambda outcomes: [one.key for one in outcomes if isinstance(one, PutResult)],
    )


def delete(key: str | CacheEntry) -> Operation[pb.DeleteRequest, pb.DeleteResponse, bool]:
    # The second time the answer would be that there was nothing, and what was put meanwhile would go, too.
    request = pb.DeleteRequest(key=_convert.checked_key(key))
    return Operation(
        request, lambda response: response.deleted, repeatable=False, written=lambda _: [request.key]
    )


def clear() -> Operation[pb.ClearRequest, pb.ClearResponse, int]:
    # As for delete.
    return Operation(
        pb.ClearRequest(), lambda response: response.cleared, repeatable=False, written=lambda _: None
    )


def invalidate_by_health(
    key: str | CacheEntry,
) -> Operation[pb.InvalidateByHealthRequest, pb.InvalidateByHealthResponse, InvalidationResult]:
    # Each one counts.
    request = pb.InvalidateByHealthRequest(key=_convert.checked_key(key))
    return Operation(
        request, messages.read_invalidation_result, repeatable=False, written=lambda _: [request.key]
    )


def stats() -> Operation[pb.GetStatsRequest, pb.GetStatsResponse, CacheStatistics]:
    return Operation(
        pb.GetStatsRequest(), lambda response: messages.read_statistics(response.statistics), repeatable=True
    )


def list_page(
    request: pb.ListRequest, page_token: str
) -> Operation[pb.ListRequest, pb.ListResponse, Page[CacheEntry]]:
    request.page_token = page_token
    return Operation(
        request,
        lambda response: Page(_convert.entries(response), response.next_page_token),
        repeatable=True,
    )


def list_request(
    *,
    source: str,
    health: str | Iterable[str],
    schemes: str | Iterable[str],
    labels: Mapping[str, str] | None,
    include_credentials: bool,
    page_size: int,
) -> pb.ListRequest:
    """The request for the first page. A text is taken as the one health status or scheme it names."""
    return pb.ListRequest(
        page_size=page_size,
        include_credentials=include_credentials,
        filter=filter_message(source, health, schemes, labels),
    )


def watch_request(
    *,
    source: str,
    health: str | Iterable[str],
    schemes: str | Iterable[str],
    labels: Mapping[str, str] | None,
    kinds: str | Iterable[str],
    include_existing: bool,
    include_entries: bool,
    include_credentials: bool,
    progress_interval: timedelta,
) -> pb.WatchRequest:
    """The request for a watch that begins; a text is taken as for a list."""
    return pb.WatchRequest(
        filter=filter_message(source, health, schemes, labels),
        include_existing=include_existing,
        kinds=[_convert.change_kind_to_message(kind) for kind in _each(kinds)],
        include_entries=include_entries,
        include_credentials=include_credentials,
        progress_interval=_convert.interval_to_message(progress_interval),
    )


def filter_message(
    source: str = "",
    health: str | Iterable[str] = (),
    schemes: str | Iterable[str] = (),
    labels: Mapping[str, str] | None = None,
) -> pb.ListFilter:
    """Which entries; a text is taken as the one health status or scheme it names."""
    return pb.ListFilter(
        source=source,
        health_statuses=[_convert.health_to_message(status) for status in _each(health)],
        schemes=_each(schemes),
        labels=labels,
    )


def _each(values: str | Iterable[str]) -> list[str]:
    return [values] if isinstance(values, str) else list(values)
