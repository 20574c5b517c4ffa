"""Leases that are ready, of both clients, against a real server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from proxystash import (
    AsyncClient,
    CacheEntry,
    Client,
    ClientClosedError,
    InvalidArgumentError,
    Leaser,
    NoProxyError,
    Outcome,
    ProxystashError,
    Shortage,
    UseResult,
)
from tests.support.server import ServerProcess, running_server

from .relay import Relay
from .waiting import wait_until

SECOND = timedelta(seconds=1)
TARGET = "shop.example"


@pytest.fixture(scope="module")
def pool_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running_server(tmp_path_factory.mktemp("data")) as server:
        yield server


@pytest.fixture
def client(pool_server: ServerProcess) -> Iterator[Client]:
    with Client(pool_server.target) as client:
        client.clear()
        yield client


_ports = iter(range(1, 65536))


def put(client: Client, count: int) -> list[str]:
    """The keys of new proxies, of which nothing is known."""
    entries = [CacheEntry(f"http://192.0.2.1:{next(_ports)}") for _ in range(count)]
    return [client.put(entry).key for entry in entries]


def held(client: Client) -> list[str]:
    return [lease.lease_id for lease in client.pool.leases()]


def results(client: Client, target: str = TARGET) -> float:
    """How many results there are of a target, about."""
    return sum(one.successes + one.failures for one in client.pool.targets() if one.target == target)


def test_a_lease_is_taken_and_given_back_with_its_outcome(client: Client) -> None:
    keys = put(client, 20)
    with client.pool.leaser(ready=4, holder="crawler") as leaser:
        with leaser.acquire("Leaser.Example") as lease:
            assert lease.key in keys
            assert lease.lease.target == "leaser.example"
            lease.outcome = Outcome.BLOCKED
        with pytest.raises(TimeoutError), leaser.acquire("leaser.example"):
            raise TimeoutError
        leaser.acquire("leaser.example").release()
        wait_until(lambda: len(held(client)) == 4)
        assert {one.holder for one in client.pool.leases()} == {"crawler"}
    assert held(client) == []
    assert results(client, "leaser.example") == pytest.approx(2, abs=0.1)


def test_each_target_and_filter_has_leases_of_its_own(client: Client) -> None:
    put(client, 6)
    german = client.put(CacheEntry("http://192.0.2.9:9", labels={"country": "DE"})).key
    with (
        client.pool.leaser(ready=1) as leaser,
        leaser.acquire("a.example", labels={"country": "DE"}) as first,
        leaser.acquire("a.example", schemes=["http"]) as second,
        leaser.acquire("b.example", schemes="http", source="") as third,
    ):
        assert first.key == german
        assert {one.lease.target for one in (first, second)} == {"a.example"}
        assert third.lease.target == "b.example"
    assert held(client) == []


def test_no_proxy_is_in_two_hands_and_each_is_given_back(client: Client) -> None:
    keys = set(put(client, 12))
    guard = threading.Lock()
    in_use: set[str] = set()
    seen: set[str] = set()
    with client.pool.leaser(ready=3) as leaser:

        def work(_number: int) -> None:
            for _ in range(25):
                with leaser.acquire(TARGET) as lease:
                    with guard:
                        assert lease.key not in in_use
                        in_use.add(lease.key)
                        seen.add(lease.key)
                    with guard:
                        in_use.remove(lease.key)

        with ThreadPoolExecutor(16) as workers:
            list(workers.map(work, range(16)))
    assert held(client) == []
    assert seen == keys
    assert results(client) == pytest.approx(400, rel=0.1)


def test_no_proxy_says_why_after_the_wait(client: Client) -> None:
    with client.pool.leaser() as leaser:
        with pytest.raises(NoProxyError) as caught:
            leaser.acquire("nothing.example", wait=0.3 * SECOND)
        assert caught.value.shortage is Shortage.NO_MATCH
        with ThreadPoolExecutor(1) as worker:
            waiting = worker.submit(leaser.acquire, "nothing.example")
            [key] = put(client, 1)
            assert waiting.result().key == key


def test_what_the_server_refuses_is_raised_where_it_was_asked_for(client: Client) -> None:
    put(client, 1)
    with client.pool.leaser() as leaser:
        for _ in range(2):
            with pytest.raises(InvalidArgumentError) as caught:
                leaser.acquire("x" * 300)
            assert (caught.value.reason, caught.value.field) == ("INVALID_TARGET", "target")
        with pytest.raises(InvalidArgumentError):
            leaser.acquire(health="fine")
        with pytest.raises(TypeError):
            leaser.acquire(colour="red")  # type: ignore[call-arg]
        with leaser.acquire():
            pass
    with pytest.raises(InvalidArgumentError):
        client.pool.leaser(policy="the best")
    with pytest.raises(ValueError, match="margin"):
        client.pool.leaser(margin=timedelta(minutes=1))
    with pytest.raises(ValueError, match="ready"):
        client.pool.leaser(ready=0)


def test_a_result_that_is_refused_costs_only_itself(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    put(client, 10)
    with client.pool.leaser() as leaser:
        leases = [leaser.acquire("refused.example") for _ in range(3)]
        leases[0].release(Outcome.SUCCESS)
        leases[1].release(UseResult(Outcome.BLOCKED, retry_after=timedelta(days=9)))
        leases[2].release(Outcome.SUCCESS)
    assert held(client) == []
    assert results(client, "refused.example") == pytest.approx(2, abs=0.1)
    assert "INVALID_RETRY_AFTER" in caplog.text


def test_a_long_use_is_renewed_and_what_nobody_takes_is_given_back(client: Client) -> None:
    put(client, 5)
    with client.pool.leaser(ready=4, lease_duration=1.2 * SECOND, margin=0.6 * SECOND) as leaser:
        lease = leaser.acquire(TARGET)
        wait_until(lambda: len(held(client)) == 5)
        wait_until(lambda: held(client) == [lease.lease.lease_id])
        assert lease.is_held
        lease.release(Outcome.SUCCESS)
        wait_until(lambda: held(client) == [])
        with leaser.acquire(TARGET):
            pass


def test_it_survives_a_kill_of_the_server(tmp_path: Path) -> None:
    with Relay(None) as relay, Client(relay.target) as client:
        with running_server(tmp_path) as server:
            relay.upstream = server.target
            put(client, 10)
            leaser = client.pool.leaser(ready=3)
            first = leaser.acquire(TARGET)
            wait_until(lambda: len(held(client)) == 4)
            server.kill()
            relay.cut()
        first.release(Outcome.SUCCESS)
        kept = [leaser.acquire(TARGET) for _ in range(3)]
        with ThreadPoolExecutor(1) as worker:
            waiting = worker.submit(leaser.acquire, TARGET, wait=60 * SECOND)
            with running_server(tmp_path) as server:
                relay.upstream = server.target
                fourth = waiting.result()
                assert len({one.key for one in (*kept, fourth)}) == 4
                wait_until(lambda: first.lease.lease_id not in held(client))
                assert {one.lease.lease_id for one in (*kept, fourth)} <= set(held(client))
                for one in (*kept, fourth):
                    one.release(Outcome.SUCCESS)
                leaser.close()
                assert held(client) == []
                assert results(client) == pytest.approx(5, abs=0.1)


def test_closing_wakes_who_waits_and_leaves_what_is_in_use(client: Client) -> None:
    put(client, 1)
    leaser = client.pool.leaser()
    lease = leaser.acquire(TARGET)
    with ThreadPoolExecutor(1) as worker:
        waiting = worker.submit(leaser.acquire, TARGET)
        wait_until(lambda: any(supply.waiting for supply in leaser._supplies))
        leaser.close()
        assert isinstance(waiting.exception(), ClientClosedError)
    with pytest.raises(ClientClosedError):
        leaser.acquire(TARGET)
    assert held(client) == [lease.lease.lease_id]
    lease.release(Outcome.SUCCESS)
    # The server may have had it for the call that was given up, and finds out.
    wait_until(lambda: held(client) == [])
    leaser.close()
    assert not leaser._thread.is_alive()


def test_a_close_that_cannot_send_says_why_in_time(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        client = Client(server.target, timeout=0.5)
        put(client, 3)
        leaser = client.pool.leaser()
        lease = leaser.acquire(TARGET)
        server.kill()
    lease.release(Outcome.SUCCESS)
    with pytest.raises(ProxystashError):
        leaser.close()
    client.close()
    wait_until(lambda: not leaser._thread.is_alive())


def test_closing_the_client_ends_it(pool_server: ServerProcess) -> None:
    client = Client(pool_server.target)
    client.clear()
    leaser = client.pool.leaser()
    with ThreadPoolExecutor(1) as worker:
        waiting = worker.submit(leaser.acquire, TARGET)
        wait_until(lambda: any(supply.waiting for supply in leaser._supplies))
        client.close()
        assert isinstance(waiting.exception(), ClientClosedError)
    wait_until(lambda: not leaser._thread.is_alive())


# -- asyncio


def test_tasks_borrow_what_is_ready(client: Client, pool_server: ServerProcess) -> None:
    keys = set(put(client, 12))

    async def crawl() -> set[str]:
        in_use: set[str] = set()
        seen: set[str] = set()
        async with AsyncClient(pool_server.target) as one, one.pool.leaser(ready=3) as leaser:

            async def work() -> None:
                for _ in range(25):
                    async with leaser.acquire("tasks.example") as lease:
                        assert lease.key not in in_use
                        in_use.add(lease.key)
                        seen.add(lease.key)
                        await asyncio.sleep(0)
                        in_use.remove(lease.key)

            await asyncio.gather(*(work() for _ in range(16)))
        return seen

    assert asyncio.run(crawl()) == keys
    assert held(client) == []
    assert results(client, "tasks.example") == pytest.approx(400, rel=0.1)


def test_tasks_are_told_of_no_proxy_refusals_and_the_end(client: Client, pool_server: ServerProcess) -> None:
    async def crawl() -> None:
        async with AsyncClient(pool_server.target) as one:
            leaser = one.pool.leaser()
            with pytest.raises(NoProxyError) as caught:
                await leaser.acquire("nothing.example", wait=0.3 * SECOND)
            assert caught.value.shortage is Shortage.NO_MATCH
            with pytest.raises(InvalidArgumentError):
                await leaser.acquire("x" * 300)
            waiting = asyncio.ensure_future(leaser.acquire(TARGET))
            await asyncio.sleep(0.1)
            await leaser.close()
            with pytest.raises(ClientClosedError):
                await waiting
            with pytest.raises(ClientClosedError):
                await leaser.acquire(TARGET)

    asyncio.run(crawl())


def test_tasks_go_on_after_a_kill_of_the_server(tmp_path: Path) -> None:
    async def crawl(relay: Relay) -> None:
        async with AsyncClient(relay.target) as client:
            with running_server(tmp_path) as server:
                relay.upstream = server.target
                for port in range(1, 11):
                    await client.put(CacheEntry(f"http://192.0.2.2:{port}"))
                leaser = client.pool.leaser(ready=3)
                first = await leaser.acquire(TARGET)
                with Client(server.target) as other:
                    await asyncio.to_thread(wait_until, lambda: len(held(other)) == 4)
                server.kill()
                relay.cut()
            await first.release(Outcome.SUCCESS)
            kept = [await leaser.acquire(TARGET) for _ in range(3)]
            with running_server(tmp_path) as server:
                relay.upstream = server.target
                kept.append(await leaser.acquire(TARGET, wait=60 * SECOND))
                assert len({lease.key for lease in kept}) == 4
                for lease in kept:
                    await lease.release(Outcome.SUCCESS)
                await leaser.close()
                assert [lease async for lease in client.pool.leases()] == []
                [target] = [one async for one in client.pool.targets() if one.target == TARGET]
                assert target.successes == pytest.approx(5, abs=0.1)

    with Relay(None) as relay:
        asyncio.run(crawl(relay))


def test_closing_an_asyncio_client_ends_its_leasers(client: Client, pool_server: ServerProcess) -> None:
    put(client, 3)

    async def crawl() -> int:
        async with AsyncClient(pool_server.target) as one:
            lease = await one.pool.leaser().acquire(TARGET)
        with pytest.raises(ClientClosedError):
            await lease.release()
        return len(asyncio.all_tasks())

    assert asyncio.run(crawl()) == 1


def test_the_leasers_have_the_same_methods() -> None:
    from proxystash import AsyncLeaser, AsyncPool, Pool

    def methods(cls: type) -> set[str]:
        return {name for name in vars(cls) if not name.startswith("_")} - {"wake", "stop", "close"}

    assert methods(Leaser) == methods(AsyncLeaser)
    assert methods(Pool) == methods(AsyncPool)
