"""Leases that are ready before they are needed, and results that are sent in batches."""

# ruff: noqa: ASYNC109 -- a timeout is in seconds everywhere in the client

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar, Unpack

import grpc

from proxystash import _pool_operations
from proxystash._status import closed_error
from proxystash._supplies import MAX_COUNT, Supplies, Supply, Terms, Work
from proxystash.errors import DeadlineExceededError, ProxystashError
from proxystash.held import AcquiringLease, AsyncHeldLease, HeldLease, Term, steady
from proxystash.pool_models import (
    AcquireOptions,
    AcquireResult,
    HealthEffect,
    Lease,
    LeaseRelease,
    ProxyFilter,
    ReleaseResult,
    SelectionPolicy,
    UseReport,
)

if TYPE_CHECKING:
    from proxystash._caller import AsyncCaller, Caller
    from proxystash._operations import Operation
    from proxystash._renewals import Renewer
    from proxystash.v1 import pool_service_pb2 as pb
    from proxystash.v1.pool_service_pb2_grpc import PoolServiceStub

Request = TypeVar("Request")
Response = TypeVar("Response")
Answer = TypeVar("Answer")

_WAIT = timedelta(seconds=20)
# How long results are collected, and how long a call may wait at the server, in seconds.
_DELAY = 0.2
_LONGEST_WAIT = 20.0


class _Wanted(NamedTuple):
    """What leases are ready for."""

    target: str
    source: str
    health: tuple[str, ...]
    schemes: tuple[str, ...]
    labels: tuple[tuple[str, str], ...]

    @classmethod
    def of(
        cls,
        target: str,
        source: str = "",
        health: str | Iterable[str] = (),
        schemes: str | Iterable[str] = (),
        labels: Mapping[str, str] | None = None,
    ) -> Self:
        return cls(
            target.lower(),
            source,
            (health,) if isinstance(health, str) else tuple(health),
            (schemes,) if isinstance(schemes, str) else tuple(schemes),
            tuple(sorted(labels.items())) if labels else (),
        )

    def template(self, options: AcquireOptions) -> pb.AcquireRequest:
        """The request for them; raises InvalidArgumentError for a value that it cannot hold."""
        wanted: AcquireOptions = {
            **options,
            "source": self.source,
            "health": self.health,
            "schemes": self.schemes,
            "labels": dict(self.labels),
        }
        return _pool_operations.acquire_request(self.target, 1, wanted)


class Borrowing:
    """How a leaser borrows, whichever kind it is of. Raises ValueError for what cannot be."""

    def __init__(
        self,
        *,
        ready: int = 8,
        margin: timedelta = timedelta(seconds=15),
        lease_duration: timedelta = timedelta(minutes=1),
        policy: SelectionPolicy | str = "",
        max_leases: int = 0,
        reuse_delay: timedelta = timedelta(0),
        holder: str = "",
    ) -> None:
        if not 1 <= ready <= MAX_COUNT:
            raise ValueError(f"ready is from 1 to {MAX_COUNT}")
        if not timedelta(0) < margin < lease_duration:
            raise ValueError("margin is greater than zero, and less than lease_duration")
        seconds, left = lease_duration.total_seconds(), margin.total_seconds()
        self.terms = Terms(ready, seconds, left, min(_LONGEST_WAIT, (seconds - left) / 2), _DELAY)
        self.options: AcquireOptions = {
            "lease_duration": lease_duration,
            "policy": policy,
            "max_leases": max_leases,
            "reuse_delay": reuse_delay,
            "holder": holder,
        }
        # Refuses what is wrong with them here rather than in the background.
        _Wanted.of("").template(self.options)


class Leaser:
    """Proxies to borrow in microseconds: a few leases are ready for each target and filter that is asked for.

    A thread keeps `ready` leases for each, gives back those that nobody takes, and sends results in batches,
    a fifth of a second after they came at the latest. A lease that is taken lasts for `margin` at least, the
    time limit of one use, and is renewed after that as those of `Pool.acquire` are. While the server is
    unavailable, it goes on with what it has, and tries again until it is closed. For any number of threads.

    Leases that are ready are kept from others: a few are enough.
    """

    def __init__(
        self,
        caller: Caller,
        stub: PoolServiceStub,
        renewer: Renewer,
        report: Callable[[UseReport], HealthEffect],
        borrowing: Borrowing,
    ) -> None:
        self._caller = caller
        self._stub = stub
        self._renewer = renewer
        self._report = report
        self._options = borrowing.options
        self._seconds = caller.seconds(None)
        # Guards all that follows; held for memory operations alone.
        self._lock = threading.Lock()
        self._due = threading.Condition(self._lock)
        self._supplies: Supplies[threading.Condition] = Supplies(borrowing.terms, steady)
        self._asking: set[grpc.Future[Any]] = set()
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="proxystash-leaser", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def acquire(
        self, target: str = "", *, wait: timedelta = _WAIT, **wanted: Unpack[ProxyFilter]
    ) -> HeldLease:
        """Take a lease that is ready, or wait for one, until the end of the `with` block or `release`.

        Raises NoProxyError where none came in time, or what the server has against it.
        """
        key = _Wanted.of(target, **wanted)
        with self._lock:
            supply = self._supplies.get(key) or self._open(key)
            lease, term = self._take(supply, wait.total_seconds())
        held = HeldLease(lease, term, self._release, self._report)
        self._renewer.add(held)
        return held

    def close(self, timeout: float | None = None) -> None:
        """Release what is ready and send what was said, within so many seconds, by default the client's.

        Raises what kept that from being sent. Leases that are still in use go on, and are released one by
        one. What waits in `acquire` fails with ClientClosedError.
        """
        deadline = steady() + self._caller.seconds(timeout)
        with self._lock:
            self._supplies.close()
            for supply in self._supplies:
                supply.arrived.notify_all()
            calls = list(self._asking)
            self._due.notify()
        for call in calls:
            call.cancel()
        self._thread.join(max(0.0, deadline - steady()))
        with self._lock:
            self._is_over = True
            failure = self._supplies.failure
            self._due.notify()
        if self._thread.is_alive():
            raise failure or too_late()

    def wake(self) -> None:
        """Have what waits, and the thread, see that the client is closed."""
        with self._lock:
            self._due.notify()
            for supply in self._supplies:
                supply.arrived.notify_all()

    def _open(self, key: _Wanted) -> Supply[threading.Condition]:
        return self._supplies.open(key, key.template(self._options), threading.Condition(self._lock))

    def _take(self, supply: Supply[threading.Condition], seconds: float) -> tuple[Lease, Term]:
        """A lease, once there is one; the lock is held."""
        self._check_open()
        taken = supply.take()
        if supply.is_low:
            self._due.notify()
        if taken is not None:
            return taken
        deadline = steady() + seconds
        supply.hurry(deadline)
        try:
            self._due.notify()
            while taken is None:
                if supply.refusal is not None:
                    raise supply.refusal
                self._check_open()
                left = deadline - steady()
                if left <= 0:
                    raise supply.why_none()
                supply.arrived.wait(left)
                taken = supply.take()
        finally:
            supply.waiting -= 1
        return taken

    def _check_open(self) -> None:
        if self._supplies.is_closed or self._caller.closed.is_set():
            raise closed_error()

    def _release(self, held: HeldLease, release: LeaseRelease) -> None:
        self._renewer.discard(held)
        with self._lock:
            if not self._is_over:
                if self._supplies.release(release):
                    self._due.notify()
                return
        self._caller.call(self._stub.Release, _pool_operations.release([release]))

    def _run(self) -> None:
        while work := self._next_work():
            for supply, request in work.asking:
                self._ask(supply, request)
            if work.releases:
                self._send(work.releases)

    def _next_work(self) -> Work[threading.Condition] | None:
        """What is due, once something is; None at the end of the thread."""
        with self._lock:
            while True:
                if self._is_over or self._supplies.is_done or self._caller.closed.is_set():
                    self._is_over = True
                    for supply in self._supplies:
                        supply.arrived.notify_all()
                    return None
                work = self._supplies.work()
                if work.is_due:
                    return work
                pause = work.next_at - steady()
                self._due.wait(None if pause == math.inf else max(0.0, pause))

    def _ask(self, supply: Supply[threading.Condition], request: pb.AcquireRequest) -> None:
        operation = _pool_operations.acquire(request)
        seconds = self._seconds + _pool_operations.wait_seconds(request)

        def done(result: AcquireResult | ProxystashError) -> None:
            if isinstance(result, ProxystashError):
                supply.failed(result)
            else:
                self._supplies.answered(supply, result)
            # Those who wait take what there is, and the last of them leaves what there is not.
            supply.arrived.notify_all()

        call = self._start(self._stub.Acquire, operation, seconds, done)
        with self._lock:
            if call is not None and not call.done():
                self._asking.add(call)
            # It may have been decided on before the end, and begun after it.
            is_late = self._supplies.is_closed and request.HasField("wait")
        if is_late and call is not None:
            call.cancel()

    def _send(self, releases: list[LeaseRelease]) -> None:
        def done(result: list[ReleaseResult] | ProxystashError) -> None:
            if isinstance(result, ProxystashError):
                self._supplies.not_released(releases, result)
            else:
                self._supplies.released()

        self._start(self._stub.Release, _pool_operations.release(releases), self._seconds, done)

    def _start(
        self,
        rpc: grpc.UnaryUnaryMultiCallable[Request, Response],
        operation: Operation[Request, Response, Answer],
        seconds: float,
        done: Callable[[Answer | ProxystashError], None],
    ) -> grpc.Future[Response] | None:
        """Begin a call whose answer or failure is told to `done` with the lock held."""

        def ended(call: grpc.Future[Response] | None) -> None:
            result = self._result_of(call, operation, seconds)
            with self._lock:
                if call is not None:
                    self._asking.discard(call)
                done(result)
                self._due.notify()

        try:
            call = rpc.future(operation.request, timeout=seconds)
        except ValueError:
            # How gRPC refuses a call on a channel that has just been closed.
            ended(None)
            return None
        call.add_done_callback(ended)
        return call

    def _result_of(
        self,
        call: grpc.Future[Response] | None,
        operation: Operation[Request, Response, Answer],
        seconds: float,
    ) -> Answer | ProxystashError:
        if call is None:
            return closed_error()
        try:
            return operation.convert(call.result())
        except grpc.FutureCancelledError:
            return closed_error()
        except grpc.RpcError as error:
            return self._caller.failure_of(error, operation, seconds)
        except ProxystashError as error:
            # The answer is none that can be.
            return error


class AsyncLeaser:
    """As `Leaser`, for any number of tasks of the client's loop."""

    def __init__(
        self,
        caller: AsyncCaller,
        ask: Callable[[pb.AcquireRequest], Awaitable[AcquireResult]],
        send: Callable[[list[LeaseRelease]], Awaitable[object]],
        keep: Callable[[AsyncHeldLease], None],
        let_go: Callable[[AsyncHeldLease], None],
        report: Callable[[UseReport], Awaitable[HealthEffect]],
        borrowing: Borrowing,
    ) -> None:
        self._caller = caller
        self._ask_for = ask
        self._send_all = send
        self._keep = keep
        self._let_go = let_go
        self._report = report
        self._options = borrowing.options
        self._supplies: Supplies[asyncio.Event] = Supplies(borrowing.terms, steady)
        self._due = asyncio.Event()
        self._asking: set[asyncio.Task[None]] = set()
        self._sending: set[asyncio.Task[None]] = set()
        self._is_over = False
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def acquire(
        self, target: str = "", *, wait: timedelta = _WAIT, **wanted: Unpack[ProxyFilter]
    ) -> AcquiringLease:
        """Take a lease that is ready, or wait for one, until the end of the `async with` block or `release`.

        Raises NoProxyError where none came in time, or what the server has against it.
        """
        return AcquiringLease(self._hold(_Wanted.of(target, **wanted), wait.total_seconds()))

    async def close(self, timeout: float | None = None) -> None:
        """Release what is ready and send what was said, within so many seconds, by default the client's.

        Raises what kept that from being sent. Leases that are still in use go on, and are released one by
        one. What waits in `acquire` fails with ClientClosedError.
        """
        self._supplies.close()
        self._wake()
        for call in self._asking:
            call.cancel()
        self._begin()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=self._caller.seconds(timeout))
            if not self._task.done():
                self.stop()
                raise self._supplies.failure or too_late()

    def stop(self) -> None:
        """End what goes on in the background at once."""
        self._supplies.is_closed = self._is_over = True
        self._wake()
        for task in (self._task, *self._asking, *self._sending):
            if task is not None:
                task.cancel()

    async def _hold(self, key: _Wanted, seconds: float) -> AsyncHeldLease:
        self._begin()
        supply = self._supplies.get(key)
        if supply is None:
            supply = self._supplies.open(key, key.template(self._options), asyncio.Event())
        lease, term = await self._take(supply, seconds)
        held = AsyncHeldLease(lease, term, self._release, self._report)
        self._keep(held)
        return held

    async def _take(self, supply: Supply[asyncio.Event], seconds: float) -> tuple[Lease, Term]:
        """A lease, once there is one."""
        self._check_open()
        taken = supply.take()
        if supply.is_low:
            self._due.set()
        if taken is not None:
            return taken
        supply.hurry(steady() + seconds)
        self._due.set()
        try:
            async with asyncio.timeout(seconds):
                while taken is None:
                    if supply.refusal is not None:
                        raise supply.refusal
                    self._check_open()
                    supply.arrived.clear()
                    await supply.arrived.wait()
                    taken = supply.take()
        except TimeoutError:
            raise supply.why_none() from None
        finally:
            supply.waiting -= 1
        return taken

    def _check_open(self) -> None:
        if self._supplies.is_closed or self._caller.closed.is_set():
            raise closed_error()

    async def _release(self, held: AsyncHeldLease, release: LeaseRelease) -> None:
        self._let_go(held)
        if self._is_over:
            await self._send_all([release])
        elif self._supplies.release(release):
            self._due.set()

    def _begin(self) -> None:
        """Begin the task, in the loop of the first call."""
        if self._task is None and not self._is_over:
            self._task = asyncio.create_task(self._run())

    def _wake(self) -> None:
        self._due.set()
        for supply in self._supplies:
            supply.arrived.set()

    async def _run(self) -> None:
        while not (self._supplies.is_done or self._caller.closed.is_set()):
            self._due.clear()
            work = self._supplies.work()
            for supply, request in work.asking:
                task = self._start(self._ask(supply, request), self._asking)
                task.add_done_callback(partial(self._asked, supply))
            if work.releases:
                self._start(self._send(work.releases), self._sending)
            if not work.is_due:
                pause = work.next_at - steady()
                with suppress(TimeoutError):
                    async with asyncio.timeout(None if pause == math.inf else max(0.0, pause)):
                        await self._due.wait()
        self._is_over = True
        self._wake()

    def _start(self, call: Coroutine[Any, Any, None], calls: set[asyncio.Task[None]]) -> asyncio.Task[None]:
        task = asyncio.create_task(call)
        calls.add(task)
        task.add_done_callback(calls.discard)
        return task

    def _asked(self, supply: Supply[asyncio.Event], task: asyncio.Task[None]) -> None:
        if task.cancelled():
            # By `close`, and perhaps before it began; it is asked again.
            supply.failed(closed_error())
            self._due.set()

    async def _ask(self, supply: Supply[asyncio.Event], request: pb.AcquireRequest) -> None:
        try:
            result = await self._ask_for(request)
        except ProxystashError as failure:
            supply.failed(failure)
        else:
            self._supplies.answered(supply, result)
        supply.arrived.set()
        self._due.set()

    async def _send(self, releases: list[LeaseRelease]) -> None:
        try:
            await self._send_all(releases)
        except ProxystashError as failure:
            self._supplies.not_released(releases, failure)
        else:
            self._supplies.released()
        self._due.set()


def too_late() -> ProxystashError:
    """The error of a close that was not answered in time."""
    return DeadlineExceededError("the leases were not released in time", code="DEADLINE_EXCEEDED")
