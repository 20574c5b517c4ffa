"""How both kinds of client make a call: within its deadline, and again where that does no harm."""

# ruff: noqa: ASYNC109 -- the timeouts are gRPC deadlines, which the server is told, too

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar
from weakref import WeakSet

import grpc
from grpc import aio

from proxystash._channel import check_timeout
from proxystash._retry import Attempts, RetryPolicy
from proxystash._status import closed_error, deadline_error, error_from_rpc
from proxystash.errors import FailedPreconditionError, ProxystashError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from proxystash._operations import Operation, Page
    from proxystash.near import AsyncNearCache, NearCache

Request = TypeVar("Request")
Response = TypeVar("Response")
Answer = TypeVar("Answer")
Item = TypeVar("Item")
_Request_contra = TypeVar("_Request_contra", contravariant=True)
_Response_co = TypeVar("_Response_co", covariant=True)


class Rpc(Protocol[_Request_contra, _Response_co]):
    """A method of a stub."""

    def __call__(self, request: _Request_contra, /, *, timeout: float | None = None) -> _Response_co: ...


class AsyncRpc(Protocol[_Request_contra, _Response_co]):
    """A method of a stub for asyncio."""

    def __call__(
        self, request: _Request_contra, /, *, timeout: float | None = None
    ) -> Awaitable[_Response_co]: ...


class _Drops(Protocol):
    def drop(self, keys: Sequence[str] | None) -> None: ...


_Near = TypeVar("_Near", bound=_Drops)


class NearCaches(Generic[_Near]):
    """The near caches of one client, as long as somebody has them. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._near_caches: WeakSet[_Near] = WeakSet()

    def add(self, near: _Near) -> None:
        with self._lock:
            self._near_caches.add(near)

    def all(self) -> list[_Near]:
        with self._lock:
            return list(self._near_caches)

    def tell(self, operation: Operation[Any, Any, Answer], answer: Answer) -> None:
        """Have them drop what an operation has written; to be done before its caller knows of it."""
        if operation.written is not None and (near_caches := self.all()):
            keys = operation.written(answer)
            for near in near_caches:
                near.drop(keys)


class Caller:
    """Makes the calls of one client, for any number of threads, until `closed` is set."""

    def __init__(self, target: str, timeout: float, retry: RetryPolicy | None) -> None:
        self.target = target
        self.retry = retry
        self.closed = threading.Event()
        self.near_caches: NearCaches[NearCache] = NearCaches()
        self._timeout = check_timeout(timeout)

    def seconds(self, timeout: float | None) -> float:
        """The deadline of a call: the client's, unless it has its own. Raises ValueError."""
        return self._timeout if timeout is None else check_timeout(timeout)

    def failure_of(
        self, error: grpc.RpcError, operation: Operation[Any, Any, Any], seconds: float
    ) -> ProxystashError:
        """Why a call failed that had so many seconds."""
        failure = error_from_rpc(error, target=self.target, timeout=seconds)
        failure.field = operation.locate(failure.field)
        return failure

    def call(
        self,
        rpc: Rpc[Request, Response],
        operation: Operation[Request, Response, Answer],
        timeout: float | None = None,
    ) -> Answer:
        """Raises ProxystashError."""
        seconds = self.seconds(timeout)
        attempts = Attempts(seconds, self.retry, repeatable=operation.repeatable)
        while True:
            if self.closed.is_set():
                raise closed_error()
            try:
                response = rpc(operation.request, timeout=attempts.remaining())
            except grpc.RpcError as error:
                failure = self.failure_of(error, operation, seconds)
            except ValueError:
                # How gRPC refuses a call on a channel that another thread has just closed.
                if not self.closed.is_set():
                    raise
                continue
            else:
                answer = operation.convert(response)
                self.near_caches.tell(operation, answer)
                return answer
            if not self.closed.is_set():
                self.closed.wait(attempts.pause_after(failure))

    def pages(
        self,
        rpc: Rpc[Request, Response],
        page: Callable[[str], Operation[Request, Response, Page[Item]]],
        timeout: float | None,
    ) -> Iterator[Item]:
        """The items of one page after the other, given the operation for a page token."""
        token = ""
        while True:
            found = self.call(rpc, page(token), timeout)
            yield from found.items
            token = found.next_page_token
            if not token:
                return


class AsyncCaller:
    """Makes the calls of one client, for any number of tasks of one loop, until `closed` is set."""

    def __init__(
        self,
        target: str,
        timeout: float,
        retry: RetryPolicy | None,
        open_channel: Callable[[], aio.Channel],
    ) -> None:
        self.target = target
        self.retry = retry
        self.closed = asyncio.Event()
        self.near_caches: NearCaches[AsyncNearCache] = NearCaches()
        self._timeout = check_timeout(timeout)
        self._open_channel = open_channel
        # Made in the loop of the first call, which it belongs to.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._channel: aio.Channel | None = None

    @property
    def channel(self) -> aio.Channel:
        """The channel, for whoever runs in the client's loop; raises FailedPreconditionError elsewhere."""
        loop = asyncio.get_running_loop()
        if self._channel is None:
            self._loop = loop
            self._channel = self._open_channel()
        if loop is not self._loop:
            raise FailedPreconditionError(
                "the client belongs to another event loop, that of its first call; make one for each loop",
                code="FAILED_PRECONDITION",
                reason="OTHER_EVENT_LOOP",
            )
        return self._channel

    async def close(self) -> None:
        """Close the channel, if there is one."""
        if self._channel is not None:
            await self._channel.close()

    def seconds(self, timeout: float | None) -> float:
        """The deadline of a call: the client's, unless it has its own. Raises ValueError."""
        return self._timeout if timeout is None else check_timeout(timeout)

    async def call(
        self,
        rpc: AsyncRpc[Request, Response],
        operation: Operation[Request, Response, Answer],
        timeout: float | None = None,
    ) -> Answer:
        """Raises ProxystashError."""
        seconds = self.seconds(timeout)
        attempts = Attempts(seconds, self.retry, repeatable=operation.repeatable)
        while True:
            if self.closed.is_set():
                raise closed_error()
            try:
                response = await rpc(operation.request, timeout=attempts.remaining())
            except grpc.RpcError as error:
                failure = error_from_rpc(error, target=self.target, timeout=seconds)
                if failure.code == "CANCELLED" and not attempts.remaining() and not self.closed.is_set():
                    # What gRPC may say at the deadline.
                    failure = deadline_error(self.target, seconds)
                failure.field = operation.locate(failure.field)
            except asyncio.CancelledError:
                # gRPC says so in the calling task, too, when close() cancels the call.
                task = asyncio.current_task()
                if not self.closed.is_set() or (task is not None and task.cancelling()):
                    raise
                continue
            else:
                answer = operation.convert(response)
                self.near_caches.tell(operation, answer)
                return answer
            await self._pause(attempts.pause_after(failure))

    async def pages(
        self,
        rpc: AsyncRpc[Request, Response],
        page: Callable[[str], Operation[Request, Response, Page[Item]]],
        timeout: float | None,
    ) -> AsyncIterator[Item]:
        """The items of one page after the other, given the operation for a page token."""
        token = ""
        while True:
            found = await self.call(rpc, page(token), timeout)
            for item in found.items:
                yield item
            token = found.next_page_token
            if not token:
                return

    async def _pause(self, seconds: float) -> None:
        """Wait, but no longer than the client is open."""
        try:
            async with asyncio.timeout(seconds):
                await self.closed.wait()
        except TimeoutError:
            pass
