"""Borrowing proxies: the calls of PoolService, and leases that are renewed while they are held."""

# ruff: noqa: ASYNC109 -- the timeouts are gRPC deadlines, which the server is told, too

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Unpack
from weakref import WeakSet

from proxystash import _pool_operations
from proxystash._batches import batches
from proxystash._operations import moved
from proxystash._pool_operations import Result, lease_id_of, no_proxy, report_of, use_result
from proxystash._renewals import AsyncRenewer, Renewer, renewal_time
from proxystash._status import error_of_item
from proxystash.held import AcquiringLease, AsyncHeldLease, HeldLease, Term, steady
from proxystash.leaser import AsyncLeaser, Borrowing, Leaser
from proxystash.models import CacheEntry, EntryError
from proxystash.pool_models import (
    AcquireOptions,
    AcquireResult,
    HealthEffect,
    Lease,
    LeaseRelease,
    LeaserOptions,
    ProxyHealth,
    ReleaseResult,
    RenewResult,
    TargetSummary,
    UseReport,
)
from proxystash.v1 import pool_service_pb2 as pb
from proxystash.v1.pool_service_pb2_grpc import PoolServiceStub

if TYPE_CHECKING:
    import grpc

    from proxystash._caller import AsyncCaller, Caller
    from proxystash.v1.pool_service_pb2_grpc import PoolServiceAsyncStub

_FIRST = "[0]."


class Pool:
    """The proxies of a server to borrow, for any number of threads; `Client.pool` is one.

    Calls, deadlines and errors are as those of the client. An `acquire` is repeated while the server is
    unavailable, under a request id of its own; so are `renew`, `release` and what only looks. `report` and
    `end_session` are sent once at most. Where a method takes a lease, its id will do, and where it takes a
    result, its outcome will.
    """

    def __init__(self, caller: Caller, channel: grpc.Channel) -> None:
        self._caller = caller
        self._stub = PoolServiceStub(channel)
        self._renewer = Renewer(caller, self._stub)
        self._leasers: WeakSet[Leaser] = WeakSet()

    def acquire(
        self, target: str = "", *, timeout: float | None = None, **options: Unpack[AcquireOptions]
    ) -> HeldLease:
        """Borrow a proxy for a target, such as a site's domain, until the end of the `with` block.

        The lease is renewed as long as the program has it. What ends the block tells the outcome, unless
        `outcome` was set. The timeout is beyond `wait`. Raises NoProxyError where none can be had.
        """
        request = _pool_operations.acquire_request(target, 1, options)
        asked_at = steady()
        result = self._acquire(request, timeout)
        if not result.leases:
            raise no_proxy(result)
        term = _term(request, asked_at, is_repeat="request_id" in options)
        held = HeldLease(result.leases[0], term, self._release, self._report)
        self._renewer.add(held)
        return held

    def acquire_many(
        self, count: int, target: str = "", *, timeout: float | None = None, **options: Unpack[AcquireOptions]
    ) -> AcquireResult:
        """Borrow up to `count` proxies (at most 100), all different, which nobody renews or releases."""
        return self._acquire(_pool_operations.acquire_request(target, count, options), timeout)

    def renew(
        self,
        lease: str | Lease,
        lease_duration: timedelta | None = None,
        *,
        timeout: float | None = None,
    ) -> RenewResult:
        """Move the end of a lease: as far from now as said, by default 1 min."""
        [result] = self.renew_many([lease], lease_duration, timeout=timeout)
        return result

    def renew_many(
        self,
        leases: Iterable[str | Lease],
        lease_duration: timedelta | None = None,
        *,
        timeout: float | None = None,
    ) -> list[RenewResult]:
        """Move the ends of any number of leases: whether each is still held, in order."""
        results: list[RenewResult] = []
        for _, batch in batches(map(lease_id_of, leases)):
            operation = _pool_operations.renew(batch, lease_duration)
            answers = self._caller.call(self._stub.Renew, operation, timeout)
            results += answers
        return results

    def release(
        self,
        lease: str | Lease,
        result: Result | None = None,
        *,
        end_session: bool = False,
        timeout: float | None = None,
    ) -> ReleaseResult:
        """End a lease, with what became of its use; without it nothing is learned.

        The result counts once, also of a lease that has ended by itself. Where the answer to an earlier
        attempt was lost, `released` may be False.
        """
        release = LeaseRelease(
            lease_id_of(lease), None if result is None else use_result(result), end_session
        )
        operation = _pool_operations.release([release], lambda field: field.partition(_FIRST)[2] or field)
        [released] = self._caller.call(self._stub.Release, operation, timeout)
        return released

    def release_many(
        self, releases: Iterable[LeaseRelease], *, timeout: float | None = None
    ) -> list[ReleaseResult]:
        """End any number of leases as `release` does, in order. A bad result refuses its thousand."""
        results: list[ReleaseResult] = []
        for start, batch in batches(releases):
            operation = _pool_operations.release(batch, moved(start))
            answers = self._caller.call(self._stub.Release, operation, timeout)
            results += answers
        return results

    def report(
        self, subject: str | CacheEntry | Lease, result: Result, *, timeout: float | None = None
    ) -> HealthEffect:
        """Say what became of a use: of a lease, which goes on, or else of a key, entry or proxy URL."""
        return _effect(self.report_many([report_of(subject, result)], timeout=timeout))

    def report_many(
        self, reports: Iterable[UseReport], *, timeout: float | None = None
    ) -> list[HealthEffect | EntryError]:
        """Say what became of any number of uses: what each did, in order. A bad one costs only itself."""
        effects: list[HealthEffect | EntryError] = []
        for _, batch in batches(reports):
            operation = _pool_operations.report(batch)
            answers = self._caller.call(self._stub.ReportResults, operation, timeout)
            effects += answers
        return effects

    def end_session(self, session_id: str, target: str = "", *, timeout: float | None = None) -> bool:
        """Forget which proxy a session has, and tell whether it had one."""
        return self._caller.call(
            self._stub.EndSession, _pool_operations.end_session(session_id, target), timeout
        )

    def health(self, key: str | CacheEntry, *, timeout: float | None = None) -> ProxyHealth | None:
        """What is known of a proxy; None where it is not in the cache."""
        return self._caller.call(self._stub.GetProxyHealth, _pool_operations.health(key), timeout)

    def targets(self, *, timeout: float | None = None) -> Iterator[TargetSummary]:
        """Go through the targets by name, and how each fares. The timeout is that of one page."""
        return self._caller.pages(self._stub.ListTargets, _pool_operations.targets_page, timeout)

    def leases(
        self,
        *,
        key: str | CacheEntry = "",
        holder: str = "",
        target: str = "",
        session_id: str = "",
        timeout: float | None = None,
    ) -> Iterator[Lease]:
        """Go through the leases held, oldest first, without their entries. Each filter narrows the list."""
        page = _pool_operations.leases_page(key, holder, target, session_id)
        return self._caller.pages(self._stub.ListLeases, page, timeout)

    def leaser(self, **options: Unpack[LeaserOptions]) -> Leaser:
        """Keep a few leases ready, so that one is had in microseconds; to be closed before the client is."""
        leaser = Leaser(self._caller, self._stub, self._renewer, self._report, Borrowing(**options))
        self._leasers.add(leaser)
        return leaser

    def wake(self) -> None:
        """Have what goes on in the background see that the client is closed."""
        self._renewer.wake()
        for leaser in list(self._leasers):
            leaser.wake()

    def _acquire(self, request: pb.AcquireRequest, timeout: float | None = None) -> AcquireResult:
        seconds = self._caller.seconds(timeout)

        def acquire(request: pb.AcquireRequest, /, *, timeout: float | None = None) -> pb.AcquireResponse:
            _pool_operations.shorten_wait(request, (timeout or 0.0) - seconds)
            return self._stub.Acquire(request, timeout=timeout)

        deadline = seconds + _pool_operations.wait_seconds(request)
        return self._caller.call(acquire, _pool_operations.acquire(request), deadline)

    def _release(self, held: HeldLease, release: LeaseRelease) -> None:
        self._renewer.discard(held)
        self._caller.call(self._stub.Release, _pool_operations.release([release]))

    def _report(self, report: UseReport) -> HealthEffect:
        return _effect(self.report_many([report]))


class AsyncPool:
    """The proxies of a server to borrow, for any number of tasks of the client's loop; see `Pool`.

    `AsyncClient.pool` is one.
    """

    def __init__(self, caller: AsyncCaller) -> None:
        self._caller = caller
        self._connected: PoolServiceAsyncStub | None = None
        self._renewer = AsyncRenewer(caller)
        self._leasers: WeakSet[AsyncLeaser] = WeakSet()

    def acquire(
        self, target: str = "", *, timeout: float | None = None, **options: Unpack[AcquireOptions]
    ) -> AcquiringLease:
        """Borrow a proxy for a target, such as a site's domain, until the end of the `async with` block.

        Or `await` it, and `release` it. The lease is renewed as long as the program has it. What ends the
        block tells the outcome, unless `outcome` was set. The timeout is beyond `wait`. Raises NoProxyError
        where none can be had.
        """
        request = _pool_operations.acquire_request(target, 1, options)
        return AcquiringLease(self._hold(request, timeout, is_repeat="request_id" in options))

    async def acquire_many(
        self, count: int, target: str = "", *, timeout: float | None = None, **options: Unpack[AcquireOptions]
    ) -> AcquireResult:
        """Borrow up to `count` proxies (at most 100), all different, which nobody renews or releases."""
        return await self._acquire(_pool_operations.acquire_request(target, count, options), timeout)

    async def renew(
        self,
        lease: str | Lease,
        lease_duration: timedelta | None = None,
        *,
        timeout: float | None = None,
    ) -> RenewResult:
        """Move the end of a lease: as far from now as said, by default 1 min."""
        [result] = await self.renew_many([lease], lease_duration, timeout=timeout)
        return result

    async def renew_many(
        self,
        leases: Iterable[str | Lease],
        lease_duration: timedelta | None = None,
        *,
        timeout: float | None = None,
    ) -> list[RenewResult]:
        """Move the ends of any number of leases: whether each is still held, in order."""
        results: list[RenewResult] = []
        for _, batch in batches(map(lease_id_of, leases)):
            operation = _pool_operations.renew(batch, lease_duration)
            answers = await self._caller.call(self._stub.Renew, operation, timeout)
            results += answers
        return results

    async def release(
        self,
        lease: str | Lease,
        result: Result | None = None,
        *,
        end_session: bool = False,
        timeout: float | None = None,
    ) -> ReleaseResult:
        """End a lease, with what became of its use; without it nothing is learned.

        The result counts once, also of a lease that has ended by itself. Where the answer to an earlier
        attempt was lost, `released` may be False.
        """
        release = LeaseRelease(
            lease_id_of(lease), None if result is None else use_result(result), end_session
        )
        operation = _pool_operations.release([release], lambda field: field.partition(_FIRST)[2] or field)
        [released] = await self._caller.call(self._stub.Release, operation, timeout)
        return released

    async def release_many(
        self, releases: Iterable[LeaseRelease], *, timeout: float | None = None
    ) -> list[ReleaseResult]:
        """End any number of leases as `release` does, in order. A bad result refuses its thousand."""
        results: list[ReleaseResult] = []
        for start, batch in batches(releases):
            operation = _pool_operations.release(batch, moved(start))
            answers = await self._caller.call(self._stub.Release, operation, timeout)
            results += answers
        return results

    async def report(
        self, subject: str | CacheEntry | Lease, result: Result, *, timeout: float | None = None
    ) -> HealthEffect:
        """Say what became of a use: of a lease, which goes on, or else of a key, entry or proxy URL."""
        return _effect(await self.report_many([report_of(subject, result)], timeout=timeout))

    async def report_many(
        self, reports: Iterable[UseReport], *, timeout: float | None = None
    ) -> list[HealthEffect | EntryError]:
        """Say what became of any number of uses: what each did, in order. A bad one costs only itself."""
        effects: list[HealthEffect | EntryError] = []
        for _, batch in batches(reports):
            operation = _pool_operations.report(batch)
            answers = await self._caller.call(self._stub.ReportResults, operation, timeout)
            effects += answers
        return effects

    async def end_session(self, session_id: str, target: str = "", *, timeout: float | None = None) -> bool:
        """Forget which proxy a session has, and tell whether it had one."""
        return await self._caller.call(
            self._stub.EndSession, _pool_operations.end_session(session_id, target), timeout
        )

    async def health(self, key: str | CacheEntry, *, timeout: float | None = None) -> ProxyHealth | None:
        """What is known of a proxy; None where it is not in the cache."""
        return await self._caller.call(self._stub.GetProxyHealth, _pool_operations.health(key), timeout)

    async def targets(self, *, timeout: float | None = None) -> AsyncIterator[TargetSummary]:
        """Go through the targets by name, and how each fares. The timeout is that of one page."""
        pages = self._caller.pages(self._stub.ListTargets, _pool_operations.targets_page, timeout)
        async for target in pages:
            yield target

    async def leases(
        self,
        *,
        key: str | CacheEntry = "",
        holder: str = "",
        target: str = "",
        session_id: str = "",
        timeout: float | None = None,
    ) -> AsyncIterator[Lease]:
        """Go through the leases held, oldest first, without their entries. Each filter narrows the list."""
        page = _pool_operations.leases_page(key, holder, target, session_id)
        async for lease in self._caller.pages(self._stub.ListLeases, page, timeout):
            yield lease

    def leaser(self, **options: Unpack[LeaserOptions]) -> AsyncLeaser:
        """Keep a few leases ready, so that one is had in microseconds; to be closed before the client is."""
        leaser = AsyncLeaser(
            self._caller,
            self._acquire,
            self.release_many,
            lambda held: self._renewer.add(held, self._stub),
            self._renewer.discard,
            self._report,
            Borrowing(**options),
        )
        self._leasers.add(leaser)
        return leaser

    async def close(self) -> None:
        """End what goes on in the background."""
        for leaser in list(self._leasers):
            leaser.stop()
        await self._renewer.close()

    @property
    def _stub(self) -> PoolServiceAsyncStub:
        """The service, for whoever runs in the client's loop; raises FailedPreconditionError elsewhere."""
        channel = self._caller.channel
        if self._connected is None:
            self._connected = PoolServiceStub(channel)
        return self._connected

    async def _hold(
        self, request: pb.AcquireRequest, timeout: float | None, *, is_repeat: bool
    ) -> AsyncHeldLease:
        asked_at = steady()
        result = await self._acquire(request, timeout)
        if not result.leases:
            raise no_proxy(result)
        term = _term(request, asked_at, is_repeat=is_repeat)
        held = AsyncHeldLease(result.leases[0], term, self._release, self._report)
        self._renewer.add(held, self._stub)
        return held

    async def _acquire(self, request: pb.AcquireRequest, timeout: float | None = None) -> AcquireResult:
        seconds = self._caller.seconds(timeout)

        def acquire(
            request: pb.AcquireRequest, /, *, timeout: float | None = None
        ) -> Awaitable[pb.AcquireResponse]:
            _pool_operations.shorten_wait(request, (timeout or 0.0) - seconds)
            return self._stub.Acquire(request, timeout=timeout)

        deadline = seconds + _pool_operations.wait_seconds(request)
        return await self._caller.call(acquire, _pool_operations.acquire(request), deadline)

    async def _release(self, held: AsyncHeldLease, release: LeaseRelease) -> None:
        self._renewer.discard(held)
        await self._caller.call(self._stub.Release, _pool_operations.release([release]))

    async def _report(self, report: UseReport) -> HealthEffect:
        return _effect(await self.report_many([report]))


def _term(request: pb.AcquireRequest, asked_at: float, *, is_repeat: bool) -> Term:
    """Until when a lease is held that was just answered, and when to renew it.

    It may have been granted since it was asked for, or, under a request id of the caller's, long ago: the
    first renewal tells.
    """
    seconds, now = _pool_operations.lease_seconds(request), steady()
    return Term(seconds, now + seconds, now if is_repeat else renewal_time(asked_at, seconds))


def _effect(effects: Sequence[HealthEffect | EntryError]) -> HealthEffect:
    """The effect of the one report; raises what refused it."""
    [effect] = effects
    if isinstance(effect, EntryError):
        raise error_of_item(effect)
    return effect
