"""CacheService: every method of the contract, delegated to the engine behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import grpc

from proxystash.v1 import cache_service_pb2 as pb
from proxystash.v1 import cache_service_pb2_grpc as pb_grpc
from proxystash_server.cache import (
    CacheEntry,
    CacheError,
    EntryFilter,
    InvalidEntryError,
    Stored,
    check_key,
)
from proxystash_server.cache.entry.merging import Combine
from proxystash_server.rpc import convert, encoding, puts
from proxystash_server.rpc.calls import StreamCall
from proxystash_server.rpc.engine import Engine
from proxystash_server.rpc.errors import (
    NO_TIER_AVAILABLE,
    Failure,
    Reason,
    RequestError,
    failure_of,
    invalid,
    refusal_of,
)
from proxystash_server.rpc.paging import make_page_token, read_page_token
from proxystash_server.rpc.requests import MAX_BATCH, MAX_ENTRY_BYTES, BatchPut, too_many
from proxystash_server.rpc.stats_hub import StatsHub
from proxystash_server.rpc.streams import StreamSender, non_blocking
from proxystash_server.rpc.watch.hub import WatchHub
from proxystash_server.rpc.watch.request import read_request

SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["CacheService"].full_name

_EVERY_ENTRY: Final = EntryFilter()

MAX_PAGE: Final = 1000
DEFAULT_PAGE: Final = 100
# An answer ends early at this size, so that it fits into a message of 4 MiB, which is what clients accept by
# default.
MAX_ANSWER_BYTES: Final = 3 * 1024 * 1024
# Keys of a BatchGet that are looked up before anything is known of their entries' sizes.
FIRST_KEYS: Final = 128

DEFAULT_INTERVAL_US: Final = 1_000_000
MIN_INTERVAL_US: Final = 100_000
MAX_INTERVAL_US: Final = 3_600_000_000

_ENTRY_TOO_LARGE: Final = Failure(
    grpc.StatusCode.INVALID_ARGUMENT,
    Reason.ENTRY_TOO_LARGE,
    f"the entry is larger than {MAX_ENTRY_BYTES:,} bytes, which no entry needs",
)


class CacheService(pb_grpc.CacheServiceServicer):
    """The service behind the error boundary: its methods raise RequestError and the cache's errors."""

    def __init__(
        self,
        engine: Engine,
        sender: StreamSender,
        *,
        max_subscribers: int,
        max_watchers: int,
        watch_history: int,
        pool_statistics: Callable[[], pb.PoolStatistics] | None = None,
    ) -> None:
        self._engine = engine
        self._pool_statistics = pool_statistics
        self.watch_hub = WatchHub(engine, sender, max_watchers=max_watchers, history_size=watch_history)
        self.stats_hub = StatsHub(self._snapshot, sender, max_subscribers=max_subscribers)

    def Get(  # type: ignore[override]  # answers what is serialized already
        self, request: pb.GetRequest, context: grpc.ServicerContext
    ) -> bytes:
        return encoding.get_response(self._engine.lookup(request.key))

    def BatchGet(  # type: ignore[override]  # as above
        self, request: pb.BatchGetRequest, context: grpc.ServicerContext
    ) -> bytes:
        if len(request.keys) > MAX_BATCH:
            raise too_many("keys", f"{len(request.keys):,}", Reason.TOO_MANY_KEYS)
        keys = list(request.keys)
        if len(keys) > FIRST_KEYS:
            # A bad key among those that are looked up later must not be found only then.
            _check_keys(keys)
        return b"".join(self._results(keys))

    def _results(self, keys: Sequence[str]) -> Iterator[bytes]:
        """Serialized results, as many as have room in an answer, and how many have not.

        Entries may be a thousand times as large as usual, so the first are looked up by themselves, and then
        as many as should fill half of the room that is left: a lookup is a use of the entry, and those that
        are not answered are asked for again.
        """
        room, answered, count = MAX_ANSWER_BYTES, 0, FIRST_KEYS
        while answered < len(keys):
            asked = keys[answered : answered + count]
            try:
                lookups = self._engine.lookup_many(asked)
            except InvalidEntryError:
                _check_keys(asked)
                raise
            results = encoding.batch_get_response(lookups)
            if len(results) > room:
                results, fitting = encoding.first_results(lookups, room)
                yield results
                yield encoding.unanswered(len(keys) - answered - fitting)
                return
            yield results
            answered += len(asked)
            room -= len(results)
            count = 1 + room * len(asked) // (2 * len(results))

    def Put(  # type: ignore[override]  # as above
        self, request: pb.PutRequest, context: grpc.ServicerContext
    ) -> bytes:
        if not request.HasField("entry"):
            raise invalid("entry", Reason.MISSING_ENTRY, "entry is not set")
        message = request.entry
        combine: Combine | None
        if request.HasField("update_mask"):
            combine = puts.read_update(request)
        else:
            combine = puts.read_mode(request.mode)(message)
        try:
            entry = convert.read_entry(self._engine, message)
        except (InvalidEntryError, RequestError) as error:
            raise RequestError(refusal_of(error).under("entry")) from None
        [stored] = self._engine.store([(entry, combine)])
        if isinstance(stored, InvalidEntryError):
            raise RequestError(refusal_of(stored).under("entry"))
        if isinstance(stored, CacheError):
            raise stored
        if not stored.stored_in:
            raise RequestError(NO_TIER_AVAILABLE)
        return encoding.put_response(stored)

    def BatchPut(  # type: ignore[override]  # as above
        self, request: BatchPut, context: grpc.ServicerContext
    ) -> bytes:
        if len(request.entries) > MAX_BATCH:
            raise too_many("entries", f"{len(request.entries):,}", Reason.TOO_MANY_ENTRIES)
        combine_of = puts.read_mode(request.mode)
        outcomes: list[Failure | None] = []
        wanted: list[tuple[CacheEntry, Combine | None]] = []
        for place, message in enumerate(request.entries):
            if place in request.too_large:
                outcomes.append(_ENTRY_TOO_LARGE)
                continue
            try:
                wanted.append((convert.read_entry(self._engine, message), combine_of(message)))
                outcomes.append(None)
            except (InvalidEntryError, RequestError) as error:
                outcomes.append(refusal_of(error))
        stored = iter(self._engine.store(wanted))
        return encoding.batch_put_response(
            _put_result(next(stored)) if failure is None else failure for failure in outcomes
        )

    def Delete(self, request: pb.DeleteRequest, context: grpc.ServicerContext) -> pb.DeleteResponse:
        check_key(request.key)
        return pb.DeleteResponse(deleted=self._engine.delete(request.key))

    def Clear(self, request: pb.ClearRequest, context: grpc.ServicerContext) -> pb.ClearResponse:
        return pb.ClearResponse(cleared=self._engine.clear())

    def InvalidateByHealth(
        self, request: pb.InvalidateByHealthRequest, context: grpc.ServicerContext
    ) -> pb.InvalidateByHealthResponse:
        check_key(request.key)
        outcome = self._engine.invalidate_by_health(request.key)
        response = pb.InvalidateByHealthResponse(
            found=outcome.found,
            evicted=outcome.evicted,
            failure_threshold=self._engine.failure_threshold,
        )
        if outcome.health_status is not None:
            response.health_status = convert.health_status_number(outcome.health_status)
            response.failure_count = outcome.failure_count
        if outcome.banned_until_us:
            convert.fill_timestamp(response.banned_until, outcome.banned_until_us)
        return response

    def ListBans(self, request: pb.ListBansRequest, context: grpc.ServicerContext) -> pb.ListBansResponse:
        size = _page_size(request.page_size)
        after = read_page_token(request.page_token, _EVERY_ENTRY)
        # One more than asked for tells whether there is a next page.
        found = self._engine.bans(after, size + 1)
        response = pb.ListBansResponse(bans=[convert.ban_message(*ban) for ban in found[:size]])
        if len(found) > size:
            response.next_page_token = make_page_token(found[size - 1][0], _EVERY_ENTRY)
        return response

    def Unban(self, request: pb.UnbanRequest, context: grpc.ServicerContext) -> pb.UnbanResponse:
        check_key(request.key)
        return pb.UnbanResponse(unbanned=self._engine.unban(request.key))

    def List(self, request: pb.ListRequest, context: grpc.ServicerContext) -> pb.ListResponse:
        size = _page_size(request.page_size)
        try:
            entry_filter = convert.read_filter(request.filter)
        except (InvalidEntryError, RequestError) as error:
            raise RequestError(refusal_of(error).under("filter")) from None
        after = read_page_token(request.page_token, entry_filter)
        # One more than asked for tells whether there is a next page.
        found, next_after = self._engine.scan_entries(after, size + 1, entry_filter)
        fill = convert.fill_entry if request.include_credentials else convert.fill_entry_without_credentials
        response = pb.ListResponse()
        page_bytes = 0
        for entry in found[:size]:
            message = response.entries.add()
            fill(message, entry)
            page_bytes += message.ByteSize()
            if page_bytes > MAX_ANSWER_BYTES:
                break
        if len(response.entries) < len(found):
            next_after = response.entries[-1].key
        if next_after is not None:
            response.next_page_token = make_page_token(next_after, entry_filter)
        return response

    def GetStats(self, request: pb.GetStatsRequest, context: grpc.ServicerContext) -> pb.GetStatsResponse:
        return pb.GetStatsResponse(statistics=self._snapshot(self.stats_hub.subscribers))

    @non_blocking
    def StreamStats(  # type: ignore[override]  # a non-blocking handler takes one more argument
        self, request: pb.StreamStatsRequest, context: grpc.ServicerContext, send: object
    ) -> None:
        interval_us = DEFAULT_INTERVAL_US
        if request.HasField("interval"):
            interval_us = convert.read_duration(request.interval, "interval", Reason.INVALID_INTERVAL)
            if not MIN_INTERVAL_US <= interval_us <= MAX_INTERVAL_US:
                raise invalid(
                    "interval", Reason.INVALID_INTERVAL, "interval must be between 100 ms and 1 hour"
                )
        self.stats_hub.subscribe(interval_us / 1_000_000, StreamCall(context))

    @non_blocking
    def Watch(  # type: ignore[override]  # as above
        self, request: pb.WatchRequest, context: grpc.ServicerContext, _send: object
    ) -> None:
        self.watch_hub.watch(read_request(request), StreamCall(context))

    def _snapshot(self, subscribers: int) -> pb.CacheStatistics:
        pool = None if self._pool_statistics is None else self._pool_statistics()
        return convert.statistics_message(
            self._engine.get_statistics(), subscribers, self.watch_hub.watchers, pool
        )


def _put_result(stored: Stored | CacheError) -> bytes | Failure:
    if isinstance(stored, CacheError):
        failure = failure_of(stored)
        assert failure is not None, "every error of the cache has its answer"
        return failure
    return encoding.put_response(stored) if stored.stored_in else NO_TIER_AVAILABLE


def _page_size(wanted: int) -> int:
    if wanted < 0:
        raise invalid("page_size", Reason.INVALID_PAGE_SIZE, "page_size is negative")
    return min(wanted or DEFAULT_PAGE, MAX_PAGE)


def _check_keys(keys: Sequence[str]) -> None:
    for place, key in enumerate(keys):
        try:
            check_key(key)
        except InvalidEntryError as error:
            raise invalid(f"keys[{place}]", error.reason, str(error)) from None
