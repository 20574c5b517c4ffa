"""Renewing what is held: which leases, when, and by whom, for either kind of client."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Generic, TypeVar
from weakref import WeakValueDictionary

from proxystash import _pool_operations
from proxystash.errors import ClientClosedError, ProxystashError
from proxystash.held import AsyncHeldLease, Clock, Held, HeldLease, steady

if TYPE_CHECKING:
    from proxystash._caller import AsyncCaller, Caller
    from proxystash.pool_models import RenewResult
    from proxystash.v1.pool_service_pb2_grpc import PoolServiceAsyncStub, PoolServiceStub

HeldT = TypeVar("HeldT", bound=Held)

MAX_BATCH = 1000
# How long a renewer without anything to renew goes on: a worker that borrows one proxy after the other is to
# begin no thread for each.
_LINGER = 2.0


def renewal_time(begun_at: float, seconds: float) -> float:
    """When a lease is renewed that was asked for at some time: two more renewals can fail before it ends."""
    return begun_at + seconds / 3


class Renewals(Generic[HeldT]):
    """The leases that are held, for as long as the program has them, and what is due. Not thread-safe."""

    def __init__(self, clock: Clock = steady) -> None:
        self._clock = clock
        self._held: WeakValueDictionary[str, HeldT] = WeakValueDictionary()
        self._planned_for = 0.0

    def __len__(self) -> int:
        return len(self._held)

    def add(self, held: HeldT) -> bool:
        """Have a lease renewed; whether that is due before anything was that `due` has told of."""
        self._held[held.lease.lease_id] = held
        return held.renew_at < self._planned_for

    def discard(self, held: HeldT) -> None:
        self._held.pop(held.lease.lease_id, None)

    def due(self) -> tuple[list[HeldT], float]:
        """What is to be renewed now and for equally long, and if that is nothing, in how many seconds."""
        now = self._clock()
        batch: list[HeldT] = []
        next_at = math.inf
        for held in list(self._held.values()):
            if held.ends_at <= now:
                # Nobody could renew it.
                self._lose(held)
            elif held.renew_at > now:
                next_at = min(next_at, held.renew_at)
            elif len(batch) < MAX_BATCH and (not batch or held.renew_for == batch[0].renew_for):
                batch.append(held)
        self._planned_for = next_at
        return batch, next_at - now

    def time_left(self, batch: Sequence[HeldT]) -> float:
        """Seconds until the first of them ends."""
        return max(0.1, min(held.ends_at for held in batch) - self._clock())

    def renewed(self, batch: Sequence[HeldT], results: Sequence[RenewResult], asked_at: float) -> None:
        """Take in the answer to a request that was sent at some time."""
        for held, result in zip(batch, results, strict=True):
            if result.held:
                held.ends_at = asked_at + held.renew_for
                held.renew_at = renewal_time(asked_at, held.renew_for)
            else:
                self._lose(held)

    def failed(self, batch: Sequence[HeldT]) -> None:
        """Nothing was heard: try again soon."""
        for held in batch:
            held.renew_at = self._clock() + min(1.0, held.renew_for / 10)

    def _lose(self, held: HeldT) -> None:
        held.lost.set()
        self.discard(held)


class Renewer:
    """Renews leases in a thread of its own, which is there while any are held. Thread-safe."""

    def __init__(self, caller: Caller, stub: PoolServiceStub) -> None:
        self._caller = caller
        self._stub = stub
        self._renewals: Renewals[HeldLease] = Renewals()
        # Guards all that follows and the leases' ends.
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, held: HeldLease) -> None:
        with self._changed:
            if self._renewals.add(held):
                self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="proxystash-renewals", daemon=True)
                self._thread.start()

    def discard(self, held: HeldLease) -> None:
        with self._changed:
            self._renewals.discard(held)

    def wake(self) -> None:
        """Have the thread see that the client is closed."""
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        # Nothing here keeps a batch while the next one is waited for, since who has let a lease go has it
        # renewed no more.
        while self._renew(self._next_batch()):
            pass

    def _next_batch(self) -> list[HeldLease]:
        """What is due, once something is; nothing at the end of the thread."""
        with self._changed:
            lingering = False
            while not self._caller.closed.is_set():
                batch, pause = self._renewals.due()
                if batch:
                    return batch
                if self._renewals:
                    lingering = False
                elif lingering:
                    break
                else:
                    lingering, pause = True, _LINGER
                self._changed.wait(pause)
            self._thread = None
            return []

    def _renew(self, batch: list[HeldLease]) -> bool:
        """False if there is nothing to renew any more."""
        if not batch:
            return False
        asked_at = steady()
        try:
            results = self._caller.call(
                self._stub.Renew,
                _pool_operations.renew(
                    [held.lease.lease_id for held in batch], timedelta(seconds=batch[0].renew_for)
                ),
                min(self._caller.seconds(None), self._renewals.time_left(batch)),
            )
        except ClientClosedError:
            return False
        except ProxystashError:
            # Its holders are told when the lease has ended.
            with self._changed:
                self._renewals.failed(batch)
        else:
            with self._changed:
                self._renewals.renewed(batch, results, asked_at)
        return True


class AsyncRenewer:
    """Renews leases in a task of its own, which is there while any are held."""

    def __init__(self, caller: AsyncCaller) -> None:
        self._caller = caller
        self._renewals: Renewals[AsyncHeldLease] = Renewals()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def add(self, held: AsyncHeldLease, stub: PoolServiceAsyncStub) -> None:
        if self._renewals.add(held):
            self._changed.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run(stub))

    def discard(self, held: AsyncHeldLease) -> None:
        self._renewals.discard(held)

    async def close(self) -> None:
        """End the task."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self, stub: PoolServiceAsyncStub) -> None:
        lingering = False
        try:
            while True:
                batch, pause = self._renewals.due()
                if batch:
                    await self._renew(stub, batch)
                    continue
                if self._renewals:
                    lingering = False
                elif lingering:
                    return
                else:
                    lingering, pause = True, _LINGER
                await self._wait(pause)
        finally:
            self._task = None

    async def _wait(self, seconds: float) -> None:
        self._changed.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            pass

    async def _renew(self, stub: PoolServiceAsyncStub, batch: list[AsyncHeldLease]) -> None:
        asked_at = steady()
        try:
            results = await self._caller.call(
                stub.Renew,
                _pool_operations.renew(
                    [held.lease.lease_id for held in batch], timedelta(seconds=batch[0].renew_for)
                ),
                min(self._caller.seconds(None), self._renewals.time_left(batch)),
            )
        except ProxystashError:
            # Its holders are told when the lease has ended.
            self._renewals.failed(batch)
        else:
            self._renewals.renewed(batch, results, asked_at)
