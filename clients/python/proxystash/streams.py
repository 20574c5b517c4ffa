"""Streams that outlive their connection: what all have in common, and those of statistics."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Generic, Protocol, Self, TypeVar, cast

import grpc
from grpc import aio

from proxystash._retry import Attempts, Backoff, RetryPolicy
from proxystash._status import deadline_error, error_from_rpc
from proxystash.errors import ProxystashError, UnavailableError
from proxystash.messages import read_statistics
from proxystash.models import StatsUpdate
from proxystash.v1 import cache_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Awaitable

Message = TypeVar("Message")
Item = TypeVar("Item")
_Received_co = TypeVar("_Received_co", covariant=True)
LostCallback = Callable[[ProxystashError], None]

# After what a stream that once worked is resumed. RESOURCE_EXHAUSTED is how a server gets rid of a reader
# that stopped reading, or has too many readers after it came back; CANCELLED is one that stopped.
_RESUMED_AFTER = {"UNAVAILABLE", "CANCELLED", "RESOURCE_EXHAUSTED"}
_RESUME_POLICY = RetryPolicy(initial=0.2, multiplier=2.0, maximum=5.0)


class Progress(ABC, Generic[Message, Item]):
    """Where a stream stands: what was read last, and whether and when it is resumed.

    Until the first message the stream is like any other call, with a deadline and a retry policy; from then
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
        self._backoff = Backoff(_RESUME_POLICY)

    def time_left(self) -> float | None:
        """Seconds left for the next message: for the first one, counted from the first time this is asked."""
        if self._started:
            return self._longest_silence
        if self._start is None:
            self._start = Attempts(self._timeout, self._retry, repeatable=True)
        return self._start.remaining()

    @property
    def _longest_silence(self) -> float | None:
        """Seconds without a message after which a stream that has begun is taken for lost."""
        return None

    def update(self, message: Message) -> list[Item]:
        """Count a message in, and give what the reader gets of it."""
        self._started = True
        self._backoff.reset()
        return self._read(message)

    @abstractmethod
    def _read(self, message: Message) -> list[Item]: ...

    def failure_of(self, error: grpc.RpcError | None) -> ProxystashError:
        """Why a stream broke off; no error means that the server ended it."""
        if error is None:
            return UnavailableError("the server ended the stream")
        return error_from_rpc(error, target=self._target, timeout=self._timeout)

    def too_late(self) -> ProxystashError:
        """Why a stream is given up whose next message did not come in time."""
        if self._started:
            return UnavailableError(f"nothing was heard from {self._target} for too long")
        return deadline_error(self._target, self._timeout)

    def pause_after(self, failure: ProxystashError) -> float:
        """How long to pause before resuming; raises what the stream fails with if that cannot mend it."""
        if self._start is not None and not self._started:
            return self._start.pause_after(failure)
        if failure.code not in _RESUMED_AFTER:
            raise failure
        return self._resume_after(failure)

    def _resume_after(self, failure: ProxystashError) -> float:
        if self._on_lost is not None:
            self._on_lost(failure)
        return self._backoff.next_pause()


class StatsProgress(Progress[pb.StreamStatsResponse, StatsUpdate]):
    """The sequence of a statistics stream."""

    _sequence = 0
    _resuming = False

    def _read(self, message: pb.StreamStatsResponse) -> list[StatsUpdate]:
        update = StatsUpdate(
            sequence=message.sequence,
            statistics=read_statistics(message.statistics),
            missed=max(0, message.sequence - self._sequence - 1),
            resumed=self._resuming,
        )
        self._resuming = False
        self._sequence = message.sequence
        return [update]

    def _resume_after(self, failure: ProxystashError) -> float:
        self._sequence = 0
        self._resuming = True
        return super()._resume_after(failure)


class ResumingStream(Iterator[Item], Generic[Message, Item]):
    """Items as they come, to be read by one thread; any thread may close it.

    The iteration ends when the stream is closed, by `close`, by leaving its `with` block, or with its client.
    """

    def __init__(self, open_call: Callable[[], _Call[Message]], progress: Progress[Message, Item]) -> None:
        self._open_call = open_call
        self._progress = progress
        self._items: deque[Item] = deque()
        self._closed = threading.Event()
        # Guards the step from "not closed" to a call that close() can see and cancel.
        self._lock = threading.Lock()
        self._call: _Call[Message] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the stream; a thread that waits for the next item sees the iteration end."""
        with self._lock:
            self._closed.set()
            call, self._call = self._call, None
        if call is not None:
            call.cancel()

    def __next__(self) -> Item:
        while (call := self._current_call()) is not None:
            if self._items:
                return self._items.popleft()
            try:
                self._items.extend(self._progress.update(self._read(call)))
            except _Lost as lost:
                with self._lock:
                    self._call = None
                if not self._closed.is_set():
                    self._pause(lost.failure)
        raise StopIteration

    def _current_call(self) -> _Call[Message] | None:
        """The open call, made if need be; None once the stream is closed."""
        with self._lock:
            if self._closed.is_set():
                return None
            if self._call is None:
                self._call = self._open_call()
            return self._call

    def _read(self, call: _Call[Message]) -> Message:
        """The next message; raises _Lost."""
        # The call itself has no deadline, since that would end a stream that works.
        late = threading.Event()
        left = self._progress.time_left()
        timer = None if left is None else threading.Timer(left, _give_up, (call, late))
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            return next(call)
        except StopIteration:
            raise _Lost(self._progress.failure_of(None)) from None
        except grpc.RpcError as error:
            failure = self._progress.too_late() if late.is_set() else self._progress.failure_of(error)
            raise _Lost(failure) from None
        finally:
            if timer is not None:
                timer.cancel()

    def _pause(self, failure: ProxystashError) -> None:
        try:
            pause = self._progress.pause_after(failure)
        except ProxystashError:
            self.close()
            raise
        self._closed.wait(pause)


class StatsStream(ResumingStream[pb.StreamStatsResponse, StatsUpdate]):
    """Snapshots as they come, to be read by one thread; any thread may close it."""


class AsyncResumingStream(AsyncIterator[Item], Generic[Message, Item]):
    """Items as they come, to be read by one task; any task of the same loop may close it.

    The iteration ends when the stream is closed, by `aclose`, by leaving its `async with` block, or with its
    client.
    """

    def __init__(self, open_call: Callable[[], _AsyncCall], progress: Progress[Message, Item]) -> None:
        self._open_call = open_call
        self._progress = progress
        self._items: deque[Item] = deque()
        self._closed = asyncio.Event()
        self._call: _AsyncCall | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the stream; a task that waits for the next item sees the iteration end."""
        self._closed.set()
        call, self._call = self._call, None
        if call is not None:
            call.cancel()

    async def __anext__(self) -> Item:
        while not self._closed.is_set():
            if self._items:
                return self._items.popleft()
            if self._call is None:
                self._call = self._open_call()
            call = self._call
            failure = self._progress.failure_of(None)
            try:
                async with asyncio.timeout(self._progress.time_left()):
                    message = await call.read()
                if message is not aio.EOF:
                    self._items.extend(self._progress.update(cast("Message", message)))
                    continue
            except TimeoutError:
                call.cancel()
                failure = self._progress.too_late()
            except grpc.RpcError as error:
                failure = self._progress.failure_of(error)
            except asyncio.CancelledError:
                # gRPC says so in the reading task, too, when aclose() cancels the call.
                task = asyncio.current_task()
                if not self._closed.is_set() or (task is not None and task.cancelling()):
                    raise
            self._call = None
            if not self._closed.is_set():
                await self._pause(failure)
        raise StopAsyncIteration

    async def _pause(self, failure: ProxystashError) -> None:
        try:
            pause = self._progress.pause_after(failure)
        except ProxystashError:
            await self.aclose()
            raise
        try:
            async with asyncio.timeout(pause):
                await self._closed.wait()
        except TimeoutError:
            pass


class AsyncStatsStream(AsyncResumingStream[pb.StreamStatsResponse, StatsUpdate]):
    """Snapshots as they come, to be read by one task; any task of the same loop may close it."""


class _Lost(Exception):  # noqa: N818 -- caught where it is raised
    """A call that broke off, and why."""

    def __init__(self, failure: ProxystashError) -> None:
        super().__init__(failure.message)
        self.failure = failure


def _give_up(call: _Call[object], late: threading.Event) -> None:
    late.set()
    call.cancel()


class _Call(Protocol[_Received_co]):
    """What is used of a gRPC response stream, which gRPC has no public class for."""

    def __next__(self) -> _Received_co: ...
    def cancel(self) -> object: ...


class _AsyncCall(Protocol):
    def read(self) -> Awaitable[object]: ...
    def cancel(self) -> object: ...
