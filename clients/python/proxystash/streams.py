"""Statistics streams that outlive their connection."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Protocol, Self

import grpc

from proxystash._retry import Attempts, Backoff, RetryPolicy
from proxystash._status import deadline_error, error_from_rpc
from proxystash.errors import ProxystashError, UnavailableError
from proxystash.messages import read_statistics
from proxystash.models import StatsUpdate
from proxystash.v1 import cache_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Awaitable

LostCallback = Callable[[ProxystashError], None]

# After what a stream that once worked is resumed. RESOURCE_EXHAUSTED is how a server gets rid of a reader
# that stopped reading, or has too many readers after it came back; CANCELLED is one that stopped.
_RESUMED_AFTER = {"UNAVAILABLE", "CANCELLED", "RESOURCE_EXHAUSTED"}
_RESUME_POLICY = RetryPolicy(initial=0.2, multiplier=2.0, maximum=5.0)


class Progress:
    """Where a stream stands: what was read last, and whether and when it is resumed.

    Until the first snapshot the stream is like any other call, with a deadline and a retry policy; from then
    on it is resumed for as long as it takes. Not for several threads.
    """

    def __init__(
        self, target: str, timeout: float, retry: RetryPolicy | None, on_lost: LostCallback | None
    ) -> None:
        self._target = target
        self._timeout = timeout
        self._retry = retry
        self._on_lost = on_lost
        self._start: Attempts | None = None
        self._started = False
        self._resuming = False
        self._sequence = 0
        self._backoff = Backoff(_RESUME_POLICY)

    def time_left_to_start(self) -> float | None:
        """Seconds left for the first snapshot, counted from the first time this is asked; None after it."""
        if self._started:
            return None
        if self._start is None:
            self._start = Attempts(self._timeout, self._retry, repeatable=True)
        return self._start.remaining()

    def update(self, message: pb.StreamStatsResponse) -> StatsUpdate:
        """Count a snapshot in."""
        update = StatsUpdate(
            sequence=message.sequence,
            statistics=read_statistics(message.statistics),
            missed=max(0, message.sequence - self._sequence - 1),
            resumed=self._resuming,
        )
        self._started = True
        self._resuming = False
        self._sequence = message.sequence
        self._backoff.reset()
        return update

    def pause_after(self, error: grpc.RpcError | None) -> float:
        """How long to pause before resuming; no error means that the server ended the stream.

        Raises what the stream fails with if resuming cannot mend it.
        """
        if error is None:
            failure: ProxystashError = UnavailableError("the server ended the stream")
        else:
            failure = error_from_rpc(error, target=self._target, timeout=self._timeout)
        if self._start is not None and not self._started:
            return self._start.pause_after(failure)
        if failure.code not in _RESUMED_AFTER:
            raise failure
        self._sequence = 0
        self._resuming = True
        if self._on_lost is not None:
            self._on_lost(failure)
        return self._backoff.next_pause()

    def too_late(self) -> ProxystashError:
        """The error of a stream whose first snapshot did not come in time."""
        error = deadline_error(self._target, self._timeout)
        return error if self._start is None else self._start.verdict(error)


class StatsStream(Iterator[StatsUpdate]):
    """Snapshots as they come, to be read by one thread; any thread may close it.

    The iteration ends when the stream is closed, by `close`, by leaving its `with` block, or with its client.
    """

    def __init__(self, open_call: Callable[[], _Call], progress: Progress) -> None:
        self._open_call = open_call
        self._progress = progress
        self._closed = threading.Event()
        # Guards the step from "not closed" to a call that close() can see and cancel.
        self._lock = threading.Lock()
        self._call: _Call | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the stream; a thread that waits for a snapshot sees the iteration end."""
        with self._lock:
            self._closed.set()
            call, self._call = self._call, None
        if call is not None:
            call.cancel()

    def __next__(self) -> StatsUpdate:
        while (call := self._current_call()) is not None:
            error = None
            try:
                return self._progress.update(self._read(call))
            except StopIteration:
                pass
            except grpc.RpcError as lost:
                error = lost
            with self._lock:
                self._call = None
            if not self._closed.is_set():
                self._pause(error)
        raise StopIteration

    def _current_call(self) -> _Call | None:
        """The open call, made if need be; None once the stream is closed."""
        with self._lock:
            if self._closed.is_set():
                return None
            if self._call is None:
                self._call = self._open_call()
            return self._call

    def _read(self, call: _Call) -> pb.StreamStatsResponse:
        left = self._progress.time_left_to_start()
        if left is None:
            return next(call)
        # The call itself has no deadline, since that would end a stream that works.
        timer = threading.Timer(left, call.cancel)
        timer.daemon = True
        timer.start()
        try:
            return next(call)
        except grpc.RpcError:
            if not self._closed.is_set() and self._progress.time_left_to_start() == 0:
                self.close()
                raise self._progress.too_late() from None
            raise
        finally:
            timer.cancel()

    def _pause(self, error: grpc.RpcError | None) -> None:
        try:
            pause = self._progress.pause_after(error)
        except ProxystashError:
            self.close()
            raise
        self._closed.wait(pause)


class AsyncStatsStream(AsyncIterator[StatsUpdate]):
    """Snapshots as they come, to be read by one task; any task of the same loop may close it.

    The iteration ends when the stream is closed, by `aclose`, by leaving its `async with` block, or with its
    client.
    """

    def __init__(self, open_call: Callable[[], _AsyncCall], progress: Progress) -> None:
        self._open_call = open_call
        self._progress = progress
        self._closed = asyncio.Event()
        self._call: _AsyncCall | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the stream; a task that waits for a snapshot sees the iteration end."""
        self._closed.set()
        call, self._call = self._call, None
        if call is not None:
            call.cancel()

    async def __anext__(self) -> StatsUpdate:
        while not self._closed.is_set():
            if self._call is None:
                self._call = self._open_call()
            error = None
            try:
                message = await self._read(self._call)
                if isinstance(message, pb.StreamStatsResponse):
                    return self._progress.update(message)
            except grpc.RpcError as lost:
                error = lost
            except asyncio.CancelledError:
                # gRPC says so in the reading task, too, when aclose() cancels the call.
                task = asyncio.current_task()
                if not self._closed.is_set() or (task is not None and task.cancelling()):
                    raise
            self._call = None
            if not self._closed.is_set():
                await self._pause(error)
        raise StopAsyncIteration

    async def _read(self, call: _AsyncCall) -> object:
        try:
            async with asyncio.timeout(self._progress.time_left_to_start()):
                return await call.read()
        except TimeoutError:
            await self.aclose()
            raise self._progress.too_late() from None

    async def _pause(self, error: grpc.RpcError | None) -> None:
        try:
            pause = self._progress.pause_after(error)
        except ProxystashError:
            await self.aclose()
            raise
        try:
            async with asyncio.timeout(pause):
                await self._closed.wait()
        except TimeoutError:
            pass


class _Call(Protocol):
    """What is used of a gRPC response stream, which gRPC has no public class for."""

    def __next__(self) -> pb.StreamStatsResponse: ...
    def cancel(self) -> object: ...


class _AsyncCall(Protocol):
    def read(self) -> Awaitable[object]: ...
    def cancel(self) -> object: ...
