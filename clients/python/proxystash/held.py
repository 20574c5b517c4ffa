"""A proxy in somebody's hands: a lease that is renewed while it is held, and released with an outcome."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

from proxystash import _convert
from proxystash._pool_operations import Result, use_result
from proxystash.errors import InternalError, ProxystashError
from proxystash.outcomes import outcome_of_error
from proxystash.pool_models import LeaseRelease, Outcome, UseReport, UseResult

if TYPE_CHECKING:
    from types import TracebackType

    from proxystash.models import CacheEntry
    from proxystash.pool_models import HealthEffect, Lease

Clock = Callable[[], float]
_WAITS = {Outcome.BLOCKED, Outcome.RATE_LIMITED}

# Goes on while the machine is suspended, as the server's does.
steady: Clock = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic
)


class Flag(Protocol):
    """What the events of threads and of asyncio have in common."""

    def set(self) -> None: ...
    def is_set(self) -> bool: ...


class Term(NamedTuple):
    """For how many seconds a lease is renewed, until when it is held, and when it is renewed, by `steady`."""

    renew_for: float
    ends_at: float
    renew_at: float


class Held:
    """What the leases of both kinds of client have in common.

    `lease` is what the server said, `entry` the proxy. What ends a `with` block says what is released: the
    `outcome` that was set, else that of an exception (`outcome_of_error`), else SUCCESS, or no result where
    some were reported before. `latency` is by default the time until the outcome was set. `retry_after` goes
    with BLOCKED and RATE_LIMITED. `end_session` also forgets the session's proxy. For one thread at a time.

    `lost` is set when the lease has ended before it was released: stop using the proxy, since somebody else
    may have it.

    `renew_for`, `ends_at` and `renew_at` are its Term, which whoever renews it moves.
    """

    lost: Flag

    def __init__(self, lease: Lease, term: Term, clock: Clock) -> None:
        if lease.entry is None:
            raise InternalError("the server lent a proxy and did not say which", reason="UNEXPECTED_ANSWER")
        self.lease = lease
        self.entry: CacheEntry = lease.entry
        self.latency: timedelta | None = None
        self.retry_after: timedelta | None = None
        self.end_session = False
        self.renew_for, self.ends_at, self.renew_at = term
        self._clock = clock
        self._begun_at = clock()
        self._decided_at: float | None = None
        self._outcome: Outcome | None = None
        self._has_reported = False
        self._is_released = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.lease!r})"

    @property
    def key(self) -> str:
        return self.lease.key

    @property
    def url(self) -> str:
        """The proxy's URL as requests, httpx and curl take it, with its credentials."""
        return self.entry.url(with_credentials=True)

    @property
    def outcome(self) -> Outcome | None:
        """What became of the use, once it was set; its plain word will do to set it."""
        return self._outcome

    @outcome.setter
    def outcome(self, outcome: Outcome | str) -> None:
        try:
            self._outcome = Outcome(outcome)
        except ValueError:
            raise _convert.invalid("outcome") from None
        self._decided_at = self._clock()

    @property
    def is_held(self) -> bool:
        """Whether the proxy may be used, as far as is known here."""
        return not self._is_released and not self.lost.is_set() and self._clock() < self.ends_at

    def _ending(self, error: BaseException | None) -> LeaseRelease:
        """What the end of a block releases; an error that ended it may tell the outcome."""
        outcome = self._outcome
        if outcome is None and error is not None:
            outcome = outcome_of_error(error)
        elif outcome is None and not self._has_reported:
            outcome = Outcome.SUCCESS
        return self._release_of(outcome)

    def _release_of(self, result: Result | None) -> LeaseRelease:
        if result is not None and not isinstance(result, UseResult):
            latency = self.latency
            if latency is None and not self._has_reported:
                latency = timedelta(seconds=(self._decided_at or self._clock()) - self._begun_at)
            result = UseResult(result, latency, retry_after=self.retry_after if result in _WAITS else None)
        return LeaseRelease(self.lease.lease_id, result, self.end_session)

    def _report_of(self, result: Result) -> UseReport:
        return UseReport(use_result(result), lease_id=self.lease.lease_id)


class HeldLease(Held):
    """A lease that is renewed while the program has it, and released by `release` or the end of its block."""

    lost: threading.Event

    def __init__(
        self,
        lease: Lease,
        term: Term,
        release: Callable[[HeldLease, LeaseRelease], None],
        report: Callable[[UseReport], HealthEffect],
        clock: Clock = steady,
    ) -> None:
        super().__init__(lease, term, clock)
        self.lost = threading.Event()
        self._end = release
        self._tell = report

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self._is_released:
            return
        try:
            self._release(self._ending(error))
        except ProxystashError as failure:
            if error is None:
                raise
            error.add_note(f"The lease of its proxy was not released: {failure}")

    def report(self, result: Result) -> HealthEffect:
        """Say what became of one use, and go on; the end of the block then says nothing more."""
        effect = self._tell(self._report_of(result))
        self._has_reported = True
        return effect

    def release(self, result: Result | None = None) -> None:
        """Give the proxy back, with what became of its use; without it nothing is learned.

        Only the first time counts.
        """
        if not self._is_released:
            self._release(self._release_of(result))

    def _release(self, release: LeaseRelease) -> None:
        self._is_released = True
        self._end(self, release)


class AsyncHeldLease(Held):
    """A lease that is renewed while the program has it, and released by `release` or the end of its block."""

    lost: asyncio.Event

    def __init__(
        self,
        lease: Lease,
        term: Term,
        release: Callable[[AsyncHeldLease, LeaseRelease], Awaitable[None]],
        report: Callable[[UseReport], Awaitable[HealthEffect]],
        clock: Clock = steady,
    ) -> None:
        super().__init__(lease, term, clock)
        self.lost = asyncio.Event()
        self._end = release
        self._tell = report

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self._is_released:
            return
        try:
            await self._release(self._ending(error))
        except ProxystashError as failure:
            if error is None:
                raise
            error.add_note(f"The lease of its proxy was not released: {failure}")

    async def report(self, result: Result) -> HealthEffect:
        """Say what became of one use, and go on; the end of the block then says nothing more."""
        effect = await self._tell(self._report_of(result))
        self._has_reported = True
        return effect

    async def release(self, result: Result | None = None) -> None:
        """Give the proxy back, with what became of its use; without it nothing is learned.

        Only the first time counts.
        """
        if not self._is_released:
            await self._release(self._release_of(result))

    async def _release(self, release: LeaseRelease) -> None:
        self._is_released = True
        await self._end(self, release)


class AcquiringLease(Awaitable[AsyncHeldLease]):
    """A lease that is being acquired: to be awaited, or for `async with`. Once."""

    def __init__(self, acquiring: Coroutine[Any, Any, AsyncHeldLease]) -> None:
        self._acquiring = acquiring
        self._held: AsyncHeldLease | None = None

    def __await__(self) -> Generator[Any, None, AsyncHeldLease]:
        return self._acquiring.__await__()

    async def __aenter__(self) -> AsyncHeldLease:
        self._held = await self._acquiring
        return self._held

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._held is not None
        await self._held.__aexit__(kind, error, trace)
