"""Near caches: a coherent copy, in the memory of a worker, of the entries that it reads again and again."""

from __future__ import annotations

import asyncio
import builtins
import threading
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Self

from proxystash._copies import Copies, Lookup, NearCacheStatistics
from proxystash._retry import Backoff, RetryPolicy
from proxystash.errors import ClientClosedError, ProxystashError
from proxystash.models import CacheEntry

if TYPE_CHECKING:
    from proxystash.aio import AsyncClient
    from proxystash.client import Client
    from proxystash.watch import AsyncWatchStream, WatchStream

DEFAULT_MAX_ENTRIES: Final = 10_000
DEFAULT_MAX_SILENCE: Final = timedelta(seconds=20)
# Twice the bounds of the interval in which a server says that it lives.
_SHORTEST_SILENCE: Final = timedelta(seconds=2)
_LONGEST_SILENCE: Final = timedelta(minutes=20)
# Between watches that failed in a way that no watch mends by itself.
_WATCH_AGAIN: Final = RetryPolicy(initial=1.0, multiplier=2.0, maximum=30.0)


def make_copies(max_entries: int, max_silence: timedelta) -> Copies:
    """Raises ValueError for bounds that cannot be kept."""
    if max_entries < 1:
        raise ValueError("max_entries must be at least 1")
    if not _SHORTEST_SILENCE <= max_silence <= _LONGEST_SILENCE:
        raise ValueError("max_silence must be from 2 seconds to 20 minutes")
    return Copies(max_entries, max_silence / timedelta(seconds=1))


def _watching(copies: Copies, max_silence: timedelta) -> dict[str, Any]:
    """How changes are watched: keys will do, since a copy goes with the first change of its key."""
    return {
        "include_entries": False,
        "include_progress": True,
        "progress_interval": max_silence / 2,
        "on_lost": copies.lose,
    }


class NearCache:
    """Copies of the entries that were looked up, for any number of threads at once; made by a Client.

    A copy answers without a call, in about a microsecond, and is never older than a write that was
    acknowledged to its client. It goes when a change is heard, usually within milliseconds; where changes may
    have been missed, or the server is not heard for `max_silence`, all go, and each lookup is a call until
    it is heard again. What is found by a copy does not count as a use at the server. Copies are shared among
    those who look them up, so an entry's labels must not be changed.

    One thread watches the changes, until the near cache or its client is closed. After `close` each lookup
    is a call.
    """

    def __init__(self, client: Client, copies: Copies, max_silence: timedelta) -> None:
        self._client = client
        self._copies = copies
        self._watching = _watching(copies, max_silence)
        self._closed = threading.Event()
        # Guards the step from "not closed" to a stream that close() can see.
        self._lock = threading.Lock()
        self._stream: WatchStream | None = None
        self._thread = threading.Thread(target=self._follow, name="near-cache", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the copies and watch no more; lookups go on, each a call."""
        with self._lock:
            self._closed.set()
            stream = self._stream
        if stream is not None:
            stream.close()
        self._thread.join()

    def get(self, key: str | CacheEntry, *, timeout: float | None = None) -> CacheEntry | None:
        """The entry of a key, by its copy or from the server; None on a miss there.

        It raises what Client.get does. A key is answered fastest: an entry or a URL has to be made one first.
        """
        entry = self._copies.find(key) if isinstance(key, str) else None
        if entry is not None:
            return entry
        with Lookup(self._copies, [key]) as lookup:
            for missing in lookup.missing:
                lookup.fill([self._client.get(missing, timeout=timeout)])
        return lookup.entries[0]

    def get_many(
        self, keys: Iterable[str | CacheEntry], *, timeout: float | None = None
    ) -> builtins.list[CacheEntry | None]:
        """One answer for each key, in order, as `get` has it: what has no copy is asked for together."""
        with Lookup(self._copies, keys) as lookup:
            if lookup.missing:
                lookup.fill(self._client.get_many(lookup.missing, timeout=timeout))
        return lookup.entries

    def drop(self, keys: Iterable[str] | None = None) -> None:
        """Drop the copies of some keys, or all, and keep no answer that is on its way.

        The client does so after each write of its own. It is for what was written otherwise and must be seen
        before the change is heard.
        """
        self._copies.drop(keys)

    def statistics(self) -> NearCacheStatistics:
        """A snapshot of its counts, and of how far it hears the server."""
        return self._copies.statistics()

    def _follow(self) -> None:
        backoff = Backoff(_WATCH_AGAIN)
        try:
            while (stream := self._open_stream()) is not None:
                try:
                    for change in stream:
                        self._copies.hear(change)
                        backoff.reset()
                    # Closed.
                    return
                except ProxystashError as error:
                    self._copies.empty(error)
                self._closed.wait(backoff.next_pause())
        finally:
            self._copies.empty()

    def _open_stream(self) -> WatchStream | None:
        with self._lock:
            if self._closed.is_set():
                return None
            try:
                self._stream = self._client.watch(**self._watching)
            except ClientClosedError:
                return None
            return self._stream


class AsyncNearCache:
    """Copies of the entries that were looked up, for the tasks of one loop; made by an AsyncClient.

    It promises what NearCache does. A task of the loop watches the changes, until the near cache or its
    client is closed.
    """

    def __init__(self, client: AsyncClient, copies: Copies, max_silence: timedelta) -> None:
        self._client = client
        self._copies = copies
        self._watching = _watching(copies, max_silence)
        self._closed = asyncio.Event()
        self._stream: AsyncWatchStream | None = None
        self._task = asyncio.create_task(self._follow(), name="near-cache")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Drop the copies and watch no more; lookups go on, each a call."""
        self._closed.set()
        if self._stream is not None:
            await self._stream.aclose()
        await asyncio.wait([self._task])

    async def get(
        self,
        key: str | CacheEntry,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 -- a gRPC deadline
    ) -> CacheEntry | None:
        """The entry of a key, by its copy or from the server; None on a miss there. As NearCache.get."""
        entry = self._copies.find(key) if isinstance(key, str) else None
        if entry is not None:
            return entry
        with Lookup(self._copies, [key]) as lookup:
            for missing in lookup.missing:
                lookup.fill([await self._client.get(missing, timeout=timeout)])
        return lookup.entries[0]

    async def get_many(
        self,
        keys: Iterable[str | CacheEntry],
        *,
        timeout: float | None = None,  # noqa: ASYNC109 -- a gRPC deadline
    ) -> builtins.list[CacheEntry | None]:
        """One answer for each key, in order, as `get` has it: what has no copy is asked for together."""
        with Lookup(self._copies, keys) as lookup:
            if lookup.missing:
                lookup.fill(await self._client.get_many(lookup.missing, timeout=timeout))
        return lookup.entries

    def drop(self, keys: Iterable[str] | None = None) -> None:
        """Drop the copies of some keys, or all, and keep no answer that is on its way.

        The client does so after each write of its own. It is for what was written otherwise and must be seen
        before the change is heard.
        """
        self._copies.drop(keys)

    def statistics(self) -> NearCacheStatistics:
        """A snapshot of its counts, and of how far it hears the server."""
        return self._copies.statistics()

    async def _follow(self) -> None:
        backoff = Backoff(_WATCH_AGAIN)
        try:
            while not self._closed.is_set():
                try:
                    self._stream = self._client.watch(**self._watching)
                    async for change in self._stream:
                        self._copies.hear(change)
                        backoff.reset()
                    # Closed.
                    return
                except ClientClosedError:
                    return
                except ProxystashError as error:
                    self._copies.empty(error)
                try:
                    async with asyncio.timeout(backoff.next_pause()):
                        await self._closed.wait()
                except TimeoutError:
                    pass
        finally:
            self._copies.empty()
