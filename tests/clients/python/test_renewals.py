"""Leases of both clients are renewed while they are held, and their holders hear when they are lost."""

from __future__ import annotations

import asyncio
import gc
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from proxystash import (
    AsyncClient,
    CacheEntry,
    Client,
    DeadlineExceededError,
    Lease,
    RenewResult,
    RetryPolicy,
)
from proxystash._renewals import MAX_BATCH, Renewals, renewal_time
from proxystash.held import Held, HeldLease, Term
from proxystash.v1 import pool_service_pb2 as pb
from tests.support.server import running_server

from .conftest import Connect
from .fake_service import FakeService, Fault
from .relay import Relay
from .waiting import wait_until

UNAVAILABLE = Fault(grpc.StatusCode.UNAVAILABLE, "not now")
QUICK = RetryPolicy(initial=0.01, multiplier=1, maximum=0.01)
SHORT = timedelta(seconds=1)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def lease(clock: Clock, name: str = "a", seconds: float = 60.0) -> HeldLease:
    term = Term(seconds, clock.now + seconds, renewal_time(clock.now, seconds))
    told = cast("Any", Lease)(name, f"key-{name}", CacheEntry("http://h:1"), None, None)
    return HeldLease(told, term, cast("Any", None), cast("Any", None), clock)


def is_held(lease: Held) -> bool:
    """As it is now: mypy takes a property to stay what it was."""
    return lease.is_held


# -- what is due, on a fake clock


def test_a_lease_is_due_when_a_third_of_it_is_over(clock: Clock) -> None:
    renewals = Renewals[HeldLease](clock)
    one = lease(clock)
    renewals.add(one)

    assert renewals.due() == ([], 20)
    clock.now += 20
    assert renewals.due()[0] == [one]
    renewals.renewed([one], [RenewResult(True)], clock.now - 1)
    assert renewals.due() == ([], 19)
    assert one.ends_at == clock.now + 59


def test_what_is_due_for_equally_long_goes_in_one_request(clock: Clock) -> None:
    renewals = Renewals[HeldLease](clock)
    held = [lease(clock, f"{number}", 60.0 if number % 2 else 30.0) for number in range(2 * MAX_BATCH + 2)]
    for one in held:
        renewals.add(one)

    clock.now += 20
    batches = []
    while batch := renewals.due()[0]:
        batches.append([one.renew_for for one in batch])
        renewals.renewed(batch, [RenewResult(True)] * len(batch), clock.now)

    assert sorted(map(len, batches)) == [1, 1, MAX_BATCH, MAX_BATCH]
    assert all(len(set(batch)) == 1 for batch in batches)


def test_a_lease_that_the_server_has_ended_is_lost(clock: Clock) -> None:
    renewals = Renewals[HeldLease](clock)
    one = lease(clock)
    renewals.add(one)
    assert is_held(one)

    renewals.renewed([one], [RenewResult(False)], clock.now)

    assert one.lost.is_set()
    assert not is_held(one)
    assert len(renewals) == 0


def test_a_lease_that_nobody_could_renew_is_tried_again_and_lost_at_its_end(clock: Clock) -> None:
    renewals = Renewals[HeldLease](clock)
    one = lease(clock)
    renewals.add(one)
    clock.now += 20
    renewals.failed([one])
    assert renewals.due() == ([], 1)
    clock.now += 39.5
    assert is_held(one)
    clock.now += 0.5
    assert not is_held(one)
    assert not one.lost.is_set()

    assert renewals.due()[0] == []

    assert one.lost.is_set()


def test_who_waits_is_told_of_a_lease_that_is_due_earlier(clock: Clock) -> None:
    renewals = Renewals[HeldLease](clock)
    first, later, earlier = lease(clock, "a"), lease(clock, "b", 90.0), lease(clock, "c", 30.0)
    renewals.due()
    assert renewals.add(first)
    renewals.due()
    assert not renewals.add(later)
    assert renewals.add(earlier)
    assert renewals.due() == ([], 10)


def test_a_lease_that_the_program_has_dropped_is_not_renewed(clock: Clock) -> None:
    renewals = Renewals[HeldLease](clock)
    renewals.add(lease(clock))
    gc.collect()
    assert len(renewals) == 0


# -- over the wire


def renewals_of(service: FakeService) -> list[list[str]]:
    return [list(one.lease_ids) for one in service.requests if isinstance(one, pb.RenewRequest)]


def test_leases_are_renewed_until_they_are_released(service: FakeService, fake_target: str) -> None:
    with Client(fake_target) as client:
        with (
            client.pool.acquire(lease_duration=SHORT) as first,
            client.pool.acquire(lease_duration=SHORT) as second,
        ):
            names = {first.lease.lease_id, second.lease.lease_id}
            wait_until(lambda: len(renewals_of(service)) >= 6)
            assert first.is_held
            assert second.is_held
        seen = len(renewals_of(service))
        with client.pool.acquire(lease_duration=SHORT) as third:
            wait_until(lambda: len(renewals_of(service)) >= seen + 2)
    assert {name for batch in renewals_of(service)[:seen] for name in batch} == names
    assert [third.lease.lease_id] in renewals_of(service)[seen:]
    requests = [one for one in service.requests if isinstance(one, pb.RenewRequest)]
    assert {one.lease_duration.ToTimedelta() for one in requests} == {SHORT}


def test_leases_of_an_asyncio_client_are_renewed_until_they_are_released(
    service: FakeService, fake_target: str
) -> None:
    async def borrow() -> str:
        async with AsyncClient(fake_target) as client:
            async with client.pool.acquire(lease_duration=SHORT) as lease:
                await asyncio.to_thread(wait_until, lambda: len(renewals_of(service)) >= 4)
                assert lease.is_held
            seen = len(renewals_of(service))
            other = await client.pool.acquire(lease_duration=SHORT)
            await asyncio.to_thread(wait_until, lambda: len(renewals_of(service)) >= seen + 2)
            await other.release("success")
            return other.lease.lease_id

    other = asyncio.run(borrow())
    assert renewals_of(service)[-1] == [other]
    assert [len(batch) for batch in renewals_of(service)] == [1] * len(renewals_of(service))


def test_a_lease_that_the_program_has_dropped_ends_by_itself(service: FakeService, fake_target: str) -> None:
    with Client(fake_target) as client:
        dropped = client.pool.acquire(lease_duration=SHORT)
        kept = client.pool.acquire(lease_duration=SHORT)
        name = dropped.lease.lease_id
        wait_until(lambda: any(name in batch for batch in renewals_of(service)))
        del dropped
        gc.collect()
        seen = len(renewals_of(service))
        wait_until(lambda: len(renewals_of(service)) >= seen + 3)
        assert not any(name in batch for batch in renewals_of(service)[seen + 1 :])
        kept.release()


def test_a_lease_that_is_deleted_under_its_holder_is_lost(tmp_path: Path) -> None:
    async def borrow(target: str) -> None:
        async with AsyncClient(target) as client:
            stored = await client.put(CacheEntry("http://192.0.2.1:1"))
            async with client.pool.acquire(lease_duration=SHORT) as lease:
                await client.delete(stored.key)
                async with asyncio.timeout(30):
                    await lease.lost.wait()
                assert not is_held(lease)

    with running_server(tmp_path) as server:
        with Client(server.target) as client:
            stored = client.put(CacheEntry("http://192.0.2.1:1"))
            with client.pool.acquire(lease_duration=SHORT) as lease:
                assert is_held(lease)
                client.delete(stored.key)
                assert lease.lost.wait(30)
                assert not is_held(lease)
        asyncio.run(borrow(server.target))


def test_a_lease_outlives_a_kill_of_the_server_by_renewals(tmp_path: Path) -> None:
    with Relay(None) as relay:
        with running_server(tmp_path) as server:
            relay.upstream = server.target
            with Client(server.target) as client:
                client.put(CacheEntry("http://192.0.2.1:1"))
            client = Client(relay.target)
            lease = client.pool.acquire(lease_duration=timedelta(seconds=6))
            server.kill()
            relay.cut()
        with running_server(tmp_path) as server, client:
            relay.upstream = server.target
            ends_at = lease.ends_at
            wait_until(lambda: lease.ends_at > ends_at)
            assert lease.is_held
            [listed] = client.pool.leases()
            assert listed.lease_id == lease.lease.lease_id
            lease.release()
            assert list(client.pool.leases()) == []


# -- an acquire that is repeated


def test_a_repeated_acquire_has_the_same_request_id_and_a_shorter_wait(
    connect: Connect, service: FakeService, fake_target: str
) -> None:
    service.fail("Acquire", UNAVAILABLE, times=3)
    policy = RetryPolicy(initial=0.2, multiplier=1, maximum=0.2)

    lease = connect(fake_target, retry=policy, timeout=2).pool.acquire(wait=timedelta(seconds=3))

    assert lease.lease.lease_id == "lease-0"
    requests = [one for one in service.requests if isinstance(one, pb.AcquireRequest)]
    assert len(requests) == 4
    assert len({one.request_id for one in requests}) == 1
    assert requests[0].request_id
    waits = [one.wait.ToTimedelta() for one in requests]
    assert waits == sorted(waits, reverse=True)
    assert waits[-1] < timedelta(seconds=3)
    # The server refuses a wait that ends after the deadline.
    assert all(wait.total_seconds() < left for wait, left in zip(waits, service.deadlines, strict=True))


def test_two_acquires_have_request_ids_of_their_own(
    connect: Connect, service: FakeService, fake_target: str
) -> None:
    client = connect(fake_target)
    kept = [client.pool.acquire(), client.pool.acquire(request_id="mine")]
    requests = [one for one in service.requests if isinstance(one, pb.AcquireRequest)]
    assert requests[0].request_id not in {"", "mine"}
    assert requests[1].request_id == "mine"
    assert len(kept) == 2


def test_an_answer_that_is_lost_is_got_again(tmp_path: Path) -> None:
    """Given an acquire whose answer never arrives, then its repetition gets the lease that it was granted."""
    with (
        running_server(tmp_path) as server,
        Relay(server.target) as relay,
        Client(server.target) as direct,
        Client(relay.target, retry=None, timeout=1) as client,
    ):
        direct.put(CacheEntry("http://192.0.2.1:1"))
        client.stats()
        relay.silence_answers()
        with pytest.raises(DeadlineExceededError):
            client.pool.acquire(request_id="once")
        [granted] = direct.pool.leases()
        with direct.pool.acquire(request_id="once") as lease:
            assert lease.lease.lease_id == granted.lease_id
