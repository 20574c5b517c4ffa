"""Which proxies are checked, when, and what is stored of them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from proxystash.checking.probe import Probe
from proxystash.checking.target import Target
from proxystash.errors import NotFoundError, ProxystashError
from proxystash.models import CacheEntry, EntryChanges, HealthMonitoring, HealthStatus
from proxystash.pool_models import Lease, LeaseRelease, Outcome, ProxyFilter, SelectionPolicy, UseResult

if TYPE_CHECKING:
    from proxystash.aio import AsyncClient
    from proxystash.checking.probe import Prober

_MAX_REUSE_DELAY = timedelta(hours=1)
_MAX_PAUSE = timedelta(days=1)
_AT_ONCE = 100
# What a lease lasts beyond the check: to be told of the result, and of the target.
_SLACK_SECONDS = 30.0
_IDLE_SECONDS = 1.0
_GOODBYE_SECONDS = 1.0
_JITTER = 0.1


@dataclass(frozen=True, slots=True)
class Check:
    """One proxy that was checked. Its outcome is TARGET_ERROR where the target itself does not work."""

    entry: CacheEntry
    probe: Probe
    next_check_time: datetime | None


@dataclass
class Checker:
    """Borrows the proxies that are due, tries each, stores what came of it, and reports it to the pool.

    A proxy is due `every` so often after it has worked; after failures in a row twice as long, four times, up
    to a day. Any number of checkers share the work: the pool lends each proxy for `target_name` to one of
    them, and not again within `every` (an hour at most). No more than `concurrency` checks run at once, and
    `rate` begin in a second. For one event loop.
    """

    client: AsyncClient
    prober: Prober
    target: Target
    target_name: str
    every: timedelta
    timeout: float
    concurrency: int
    rate: float
    holder: str
    wanted: ProxyFilter
    on_check: Callable[[Check], None]
    on_lost: Callable[[ProxystashError], None]
    jitter: random.Random = field(default_factory=random.Random)
    _running: set[asyncio.Task[None]] = field(default_factory=set)
    # What is leased now, by the id of its lease: also what is not being checked yet.
    _held: dict[str, Lease] = field(default_factory=dict)
    # What ended a check that nothing should.
    _broken: BaseException | None = None

    async def run(self, *, once: bool) -> None:
        """Check until cancelled; or until nothing more is due. Cancelled, it gives its leases back."""
        try:
            while True:
                if self._broken is not None:
                    raise self._broken
                try:
                    await self.target.wait()
                    begun = await self._begin_some()
                except ProxystashError as error:
                    if once:
                        raise
                    self.on_lost(error)
                    await asyncio.sleep(_IDLE_SECONDS)
                    continue
                if begun:
                    continue
                if self._running:
                    await asyncio.wait(
                        self._running, timeout=_IDLE_SECONDS, return_when=asyncio.FIRST_COMPLETED
                    )
                elif once:
                    return
                else:
                    await asyncio.sleep(_IDLE_SECONDS)
        finally:
            await self._give_back()

    async def _begin_some(self) -> bool:
        """Begin checks of what is due, as many as may be; whether there were any."""
        free = min(self.concurrency - len(self._running), _AT_ONCE, max(1, int(self.rate)))
        if free <= 0:
            return False
        # Below what was slept, so that a proxy is not passed over for a moment's sake.
        delay = min(self.every, _MAX_REUSE_DELAY) * (1 - _JITTER)
        result = await self.client.pool.acquire_many(
            free,
            self.target_name,
            policy=SelectionPolicy.LEAST_RECENTLY_USED,
            lease_duration=timedelta(seconds=2 * self.timeout + _SLACK_SECONDS),
            reuse_delay=max(delay, timedelta(seconds=1)),
            max_leases=1,
            holder=self.holder,
            **self.wanted,
        )
        self._held.update((lease.lease_id, lease) for lease in result.leases)
        now = datetime.now(UTC)
        await self._release([lease for lease in result.leases if not _is_due(lease, now)])
        for lease in result.leases:
            if _is_due(lease, now):
                task = asyncio.create_task(self._check(lease))
                self._running.add(task)
                task.add_done_callback(self._done)
                await asyncio.sleep(1 / self.rate)
        return bool(result.leases)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, ProxystashError):
            self.on_lost(error)
        elif error is not None:
            self._broken = error

    async def _check(self, lease: Lease) -> None:
        assert lease.entry is not None
        begun = time.monotonic()
        probe = await self.prober.through(lease.entry)
        # Whoever refuses credentials is there; all else may be the target's fault, or this machine's.
        doubtful = probe.outcome not in {Outcome.SUCCESS, Outcome.AUTH_ERROR}
        if doubtful and not await self.target.works_since(begun):
            probe = replace(probe, outcome=Outcome.TARGET_ERROR)
        monitoring = None
        if probe.outcome is not Outcome.TARGET_ERROR:
            monitoring = self._monitoring(lease.entry.health_monitoring or HealthMonitoring(), probe)
            await self._store(lease, probe, monitoring)
        await self.client.pool.release(lease, UseResult(probe.outcome, latency=probe.latency))
        self._held.pop(lease.lease_id, None)
        self.on_check(Check(lease.entry, probe, monitoring.next_check_time if monitoring else None))

    def _monitoring(self, before: HealthMonitoring, probe: Probe) -> HealthMonitoring:
        works = probe.outcome is Outcome.SUCCESS
        failures = 0 if works else before.consecutive_health_failures + 1
        pause = min(self.every * 2 ** min(max(0, failures - 1), 20), max(_MAX_PAUSE, self.every))
        now = datetime.now(UTC)
        return HealthMonitoring(
            last_health_check=now,
            consecutive_health_failures=failures,
            consecutive_health_successes=before.consecutive_health_successes + 1 if works else 0,
            recovery_attempt=0 if works else before.recovery_attempt + (failures > 1),
            next_check_time=now + pause * self.jitter.uniform(1 - _JITTER, 1),
            last_health_error=None if works else f"{probe.outcome}: {probe.reason}",
            total_health_checks=before.total_health_checks + 1,
            total_health_check_failures=before.total_health_check_failures + (not works),
        )

    async def _store(self, lease: Lease, probe: Probe, monitoring: HealthMonitoring) -> None:
        changes = EntryChanges(health_monitoring=monitoring)
        if probe.outcome is Outcome.SUCCESS:
            changes["health_status"] = HealthStatus.HEALTHY
            known = {
                "anonymity": probe.anonymity,
                "exit_address": probe.seen.address if probe.seen is not None else None,
            }
            changes["labels"] = {name: str(value) for name, value in known.items() if value is not None}
        try:
            await self.client.update(lease.key, **changes)
        except NotFoundError:
            # It was removed meanwhile; the pool wants to know what came of it all the same.
            pass

    async def _release(self, leases: Iterable[Lease]) -> None:
        """Give leases back unused."""
        releases = [LeaseRelease(lease.lease_id) for lease in leases]
        if releases:
            await self.client.pool.release_many(releases)
        for release in releases:
            self._held.pop(release.lease_id, None)

    async def _give_back(self) -> None:
        tasks = [*self._running]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(_GOODBYE_SECONDS):
                await self._release([*self._held.values()])
        except (ProxystashError, TimeoutError):
            # They end by themselves.
            pass


def _is_due(lease: Lease, now: datetime) -> bool:
    assert lease.entry is not None
    monitoring = lease.entry.health_monitoring
    return monitoring is None or monitoring.next_check_time is None or monitoring.next_check_time <= now
