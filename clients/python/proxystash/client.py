"""The client for threads."""

from __future__ import annotations

import builtins
import threading
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any, Self, TypeVar, Unpack
from weakref import WeakSet

import grpc

from proxystash import _convert, _operations
from proxystash._batches import batches, put_batches
from proxystash._caller import Caller
from proxystash._channel import (
    ChannelOptions,
    channel_options,
    find_target,
)
from proxystash._defaults import DEFAULT_TIMEOUT
from proxystash._retry import RetryPolicy
from proxystash._status import closed_error
from proxystash.models import (
    Ban,
    CacheEntry,
    CacheStatistics,
    ChangeKind,
    EntryChanges,
    EntryError,
    GetResult,
    HealthStatus,
    InvalidationResult,
    PutMode,
    PutResult,
    WatchPosition,
)
from proxystash.near import DEFAULT_MAX_ENTRIES, DEFAULT_MAX_SILENCE, NearCache, make_copies
from proxystash.pool import Pool
from proxystash.streams import LostCallback, ResumingStream, StatsProgress, StatsStream
from proxystash.v1 import cache_service_pb2 as pb
from proxystash.v1.cache_service_pb2_grpc import CacheServiceStub
from proxystash.watch import WatchProgress, WatchStream

_Stream = TypeVar("_Stream", bound=ResumingStream[Any, Any])


class Client:
    """A connection to a proxystash server, for any number of threads at once.

    `target` is host:port, by default that of the variable PROXYSTASH_TARGET, else 127.0.0.1:50051. The
    environment's `http_proxy` and its like are not followed, unless the option `grpc.enable_http_proxy` is 1.

    Where a method takes a key, a CacheEntry or a proxy URL will do. `pool` borrows proxies.

    `timeout` is the deadline in seconds of each request, its repetitions included, and each method takes
    another one for its own requests. Methods that deal with more than 1,000 items make several requests.

    While the server is UNAVAILABLE, reads and puts are repeated until the deadline, with pauses as `retry`
    has it; None repeats nothing. `delete`, `clear` and `invalidate_by_health` are repeated only when they
    are known to have never left this process, so that each happens once at most.

    `credentials` makes a secure channel, `options` are gRPC's channel options. Every method may raise a
    ProxystashError: InvalidArgumentError, UnavailableError, DeadlineExceededError, and so on.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        credentials: grpc.ChannelCredentials | None = None,
        options: ChannelOptions = (),
        retry: RetryPolicy | None = RetryPolicy(),  # noqa: B008 -- immutable
    ) -> None:
        self.target = find_target(target)
        self._caller = Caller(self.target, timeout, retry)
        # Guards the streams, and the step from "not closed" to a stream that close() can see.
        self._lock = threading.Lock()
        self._streams: WeakSet[ResumingStream[Any, Any]] = WeakSet()
        if credentials is None:
            self._channel = grpc.insecure_channel(self.target, channel_options(options))
        else:
            self._channel = grpc.secure_channel(self.target, credentials, channel_options(options))
        self._stub = CacheServiceStub(self._channel)
        self.pool = Pool(self._caller, self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.target!r})"

    def close(self) -> None:
        """Close the connection; calls still running fail with ClientClosedError, and streams end."""
        with self._lock:
            self._caller.closed.set()
            streams = list(self._streams)
        for stream in streams:
            stream.close()
        for near in self._caller.near_caches.all():
            near.close()
        self.pool.wake()
        self._channel.close()

    def get(self, key: str | CacheEntry, *, timeout: float | None = None) -> GetResult | None:
        """Look a proxy up: the entry and the tier that served it, or None on a miss. Repeatable."""
        return self._caller.call(self._stub.Get, _operations.get(key), timeout)

    def get_many(
        self, keys: Iterable[str | CacheEntry], *, timeout: float | None = None
    ) -> builtins.list[GetResult | None]:
        """Look any number of proxies up: one answer for each key, in order, None for a miss. Repeatable.

        Not atomic across keys. Entries that one answer has no room for are asked for again.
        """
        answers: builtins.list[GetResult | None] = []
        for start, batch in batches(keys):
            remaining = batch
            while remaining:
                operation = _operations.get_many(remaining, start + len(batch) - len(remaining))
                found = self._caller.call(self._stub.BatchGet, operation, timeout)
                answers += found
                remaining = remaining[len(found) :]
        return answers

    def put(
        self,
        entry: CacheEntry,
        *,
        mode: PutMode | str = PutMode.REPLACE,
        timeout: float | None = None,
    ) -> PutResult:
        """Store a proxy, replacing what has its key, or else as `mode` says.

        Merging keeps what the entry does not set, and labels that it does not name; the proxy lives on from
        now. Repeated when the server is unavailable, since storing the same twice does no harm.
        """
        return self._caller.call(self._stub.Put, _operations.put(entry, mode), timeout)

    def update(
        self, key: str | CacheEntry, *, timeout: float | None = None, **changes: Unpack[EntryChanges]
    ) -> PutResult:
        """Change the named fields of a stored proxy, and nothing else. Repeated as put is.

        Labels are changed one by one, and None takes one away. Raises NotFoundError where nothing is stored.
        """
        return self._caller.call(self._stub.Put, _operations.update(key, changes), timeout)

    def put_many(
        self,
        entries: Iterable[CacheEntry],
        *,
        mode: PutMode | str = PutMode.REPLACE,
        timeout: float | None = None,
    ) -> builtins.list[PutResult | EntryError]:
        """Store any number of proxies as put does: what became of each, in order. Repeated as put is.

        An entry that is refused costs only itself. When a request fails as a whole, what earlier requests
        stored stays stored, and calling again with the same entries does no harm.
        """
        outcomes: builtins.list[PutResult | EntryError] = []
        for batch in put_batches(entries):
            answers: builtins.list[PutResult | EntryError] = []
            if batch.request.entries:
                answers = self._caller.call(self._stub.BatchPut, _operations.put_many(batch, mode), timeout)
            outcomes += batch.merge(answers)
        return outcomes

    def delete(self, key: str | CacheEntry, *, timeout: float | None = None) -> bool:
        """Remove a proxy from every tier, and tell whether any held it. Sent once at most.

        A second time would answer that there was nothing, and remove what was put meanwhile.
        """
        return self._caller.call(self._stub.Delete, _operations.delete(key), timeout)

    def clear(self, *, timeout: float | None = None) -> int:
        """Remove every proxy, and tell how many there were. Sent once at most, as delete is."""
        return self._caller.call(self._stub.Clear, _operations.clear(), timeout)

    def invalidate_by_health(
        self, key: str | CacheEntry, *, timeout: float | None = None
    ) -> InvalidationResult:
        """Report one failure of a proxy; at the server's threshold it is evicted. Sent once at most.

        Each report counts, so repeating one could evict a proxy that failed once.
        """
        return self._caller.call(
            self._stub.InvalidateByHealth, _operations.invalidate_by_health(key), timeout
        )

    def bans(self, *, timeout: float | None = None) -> Iterator[Ban]:
        """Go through the proxies that are banned after their failures, in key order. Repeatable.

        The timeout is that of one page.
        """
        yield from self._caller.pages(self._stub.ListBans, _operations.bans_page, timeout)

    def unban(self, key: str | CacheEntry, *, timeout: float | None = None) -> bool:
        """Forget the failures of a proxy, and tell whether it was banned. Sent once at most, as delete is."""
        return self._caller.call(self._stub.Unban, _operations.unban(key), timeout)

    def list(
        self,
        *,
        source: str = "",
        health: HealthStatus | str | Iterable[HealthStatus | str] = (),
        schemes: str | Iterable[str] = (),
        labels: Mapping[str, str] | None = None,
        include_credentials: bool = False,
        page_size: int = 500,
        timeout: float | None = None,
    ) -> Iterator[CacheEntry]:
        """Go through the stored proxies in key order, one page after the other. Repeatable.

        Each filter that is given narrows the list; of several health statuses or schemes any will do, of
        several labels all must match. Usernames and passwords are left out unless asked for. The timeout
        is that of one page. What changes meanwhile may or may not be seen.
        """
        request = _operations.list_request(
            source=source,
            health=health,
            schemes=schemes,
            labels=labels,
            include_credentials=include_credentials,
            page_size=page_size,
        )
        yield from self._caller.pages(
            self._stub.List, lambda token: _operations.list_page(request, token), timeout
        )

    def stats(self, *, timeout: float | None = None) -> CacheStatistics:
        """One snapshot of the server's statistics. Repeatable."""
        return self._caller.call(self._stub.GetStats, _operations.stats(), timeout)

    def stream_stats(
        self,
        interval: timedelta = timedelta(seconds=1),
        *,
        timeout: float | None = None,
        on_lost: LostCallback | None = None,
    ) -> StatsStream:
        """A snapshot at once, and then one each interval (100 ms to 1 h), until the stream is closed.

        The timeout is for the first snapshot alone. After it, a lost connection is resumed for as long as it
        takes, with growing pauses, and `on_lost` is told why each time. `StatsUpdate.sequence` then starts
        again from 1. A dead connection is noticed within 40 seconds.
        """
        request = pb.StreamStatsRequest(interval=_convert.interval_to_message(interval))
        seconds = self._caller.seconds(timeout)
        progress = StatsProgress(self.target, seconds, self._caller.retry, on_lost)
        return self._opened(StatsStream(lambda: self._stub.StreamStats(request), progress))

    def watch(
        self,
        *,
        source: str = "",
        health: HealthStatus | str | Iterable[HealthStatus | str] = (),
        schemes: str | Iterable[str] = (),
        labels: Mapping[str, str] | None = None,
        kinds: ChangeKind | str | Iterable[ChangeKind | str] = (),
        after: WatchPosition | None = None,
        include_existing: bool = False,
        include_entries: bool = True,
        include_credentials: bool = False,
        progress_interval: timedelta = timedelta(seconds=10),
        include_progress: bool = False,
        timeout: float | None = None,
        on_lost: LostCallback | None = None,
    ) -> WatchStream:
        """The changes of the entries that match, in order and none left out, until the stream is closed.

        From now on, or after a `position` that an earlier watch of the same filter had reached; with
        `include_existing`, the entries of now come first, and then a SYNCED. `kinds` narrows the changes to
        some kinds; the other filters are those of `list`.

        The timeout is for the server's first word alone. After it, a lost connection is resumed for as long
        as it takes, with growing pauses, and `on_lost` is told why each time. Where changes may have been
        missed, since the server has restarted or the reader was too slow, a RESET comes: forget what is
        known; existing entries follow if they were asked for. The server says every `progress_interval` (1 s
        to 10 min) that it lives; what is silent for twice as long is taken for lost. With `include_progress`,
        that it says so is told as a PROGRESS.
        """
        request = _operations.watch_request(
            source=source,
            health=health,
            schemes=schemes,
            labels=labels,
            kinds=kinds,
            include_existing=include_existing,
            include_entries=include_entries,
            include_credentials=include_credentials,
            progress_interval=progress_interval,
        )
        seconds = self._caller.seconds(timeout)
        progress = WatchProgress(
            self.target,
            seconds,
            self._caller.retry,
            on_lost,
            request,
            after,
            include_progress=include_progress,
        )
        return self._opened(WatchStream(lambda: self._stub.Watch(progress.request()), progress))

    def near_cache(
        self, *, max_entries: int = DEFAULT_MAX_ENTRIES, max_silence: timedelta = DEFAULT_MAX_SILENCE
    ) -> NearCache:
        """Copies of the entries that are looked up in it, kept coherent with the server by a watch.

        At most `max_entries`, the least recently used going first; none of them is trusted once the server
        was not heard for `max_silence` (2 s to 20 min). They are never older than a write of this client that
        was acknowledged, by whatever method of its own. See NearCache.
        """
        near = NearCache(self, make_copies(max_entries, max_silence), max_silence)
        self._caller.near_caches.add(near)
        if self._caller.closed.is_set():
            # By another thread perhaps, which did not see this one.
            near.close()
            raise closed_error()
        return near

    def _opened(self, stream: _Stream) -> _Stream:
        with self._lock:
            if self._caller.closed.is_set():
                raise closed_error()
            self._streams.add(stream)
        return stream
