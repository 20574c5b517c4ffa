"""Five users of the pool, in Python: a crawler, sessions, many threads, a checker and an operator."""

from __future__ import annotations

import asyncio
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from proxystash import (
    AsyncClient,
    BreakerState,
    CacheEntry,
    ChangeKind,
    Client,
    HealthStatus,
    NoProxyError,
    Outcome,
    Session,
    Shortage,
    UseReport,
    UseResult,
    outcome_of_error,
)
from tests.clients.python.waiting import wait_until
from tests.support.server import ServerProcess, running_server
from tests.support.site import PAGE, ROBOT, LocalProxy, LocalSite, dead_proxy_url, local_proxy, local_site

SECOND = timedelta(seconds=1)
SHOP = "shop.example"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with running_server(tmp_path) as server:
        yield server


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.target) as client:
        yield client


@pytest.fixture
def proxies() -> Iterator[list[LocalProxy]]:
    with ExitStack() as stack:
        yield [stack.enter_context(local_proxy()) for _ in range(6)]


@pytest.fixture
def site() -> Iterator[LocalSite]:
    with local_site() as site:
        yield site


def put(client: Client, *proxies: LocalProxy) -> list[str]:
    return [client.put(CacheEntry(proxy.url, labels={"country": "DE"})).key for proxy in proxies]


def fetch(url: str, proxy_url: str) -> tuple[int, bytes]:
    """The status and the body of a page by way of a proxy; raises as urllib does where there is no answer."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({"http": proxy_url}))
    try:
        with opener.open(url, timeout=30) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def outcome_of(status: int, body: bytes) -> Outcome:
    return Outcome.BLOCKED if body == ROBOT else Outcome.from_http_status(status)


def resting(client: Client, key: str, target: str) -> tuple[bool, bool]:
    """Whether a proxy rests everywhere, and at a target."""
    health = client.pool.health(key)
    assert health is not None
    at = [one.standing.breaker for one in health.targets if one.target == target]
    return health.overall.breaker is BreakerState.OPEN, at == [BreakerState.OPEN]


def test_a_crawler_tries_a_page_with_other_proxies_and_the_right_one_rests(
    server: ServerProcess, client: Client, proxies: list[LocalProxy], site: LocalSite
) -> None:
    """The first user: each try borrows a proxy that the page was not tried with."""
    banned, doubted = put(client, *proxies[:2])
    fine = put(client, *proxies[2:])
    dead = client.put(CacheEntry(dead_proxy_url())).key
    site.banned.add(proxies[0].address)
    site.doubted.add(proxies[1].address)

    async def crawl() -> list[bytes]:
        async with AsyncClient(server.target) as pool_client:
            pool = pool_client.pool

            async def page() -> bytes:
                tried: list[str] = []
                while len(tried) < 4:
                    lease = await pool.acquire(
                        SHOP, schemes=["http", "https"], wait=20 * SECOND, exclude_keys=tried, holder="spider"
                    )
                    tried.append(lease.key)
                    try:
                        status, body = await asyncio.to_thread(fetch, site.url, lease.url)
                    except OSError as error:
                        await lease.release(outcome_of_error(error))
                        continue
                    await lease.release(outcome_of(status, body))
                    if body == PAGE:
                        return body
                return b""

            return list(await asyncio.gather(*(page() for _ in range(40))))

    assert asyncio.run(crawl()) == [PAGE] * 40
    # Forty pages at once take every proxy: each fault is met once, and rests where it belongs.
    assert resting(client, dead, SHOP) == (True, False)
    for key, proxy in ((banned, proxies[0]), (doubted, proxies[1])):
        assert resting(client, key, SHOP) == (False, True)
        assert site.visits[proxy.address] == 1
    assert all(resting(client, key, SHOP) == (False, False) for key in fine)
    assert list(client.pool.leases(holder="spider")) == []


def test_a_ban_at_one_site_leaves_the_proxy_to_the_others(
    client: Client, proxies: list[LocalProxy], site: LocalSite
) -> None:
    [key] = put(client, proxies[0])
    site.banned.add(proxies[0].address)

    with client.pool.acquire(SHOP) as lease:
        lease.outcome = outcome_of(*fetch(site.url, lease.url))

    assert resting(client, key, SHOP) == (False, True)
    with pytest.raises(NoProxyError) as caught:
        client.pool.acquire(SHOP)
    assert caught.value.shortage is Shortage.RESTING
    with client.pool.acquire("news.example") as lease:
        assert lease.key == key


def test_a_session_keeps_its_proxy_until_the_site_bans_it(
    client: Client, proxies: list[LocalProxy], site: LocalSite
) -> None:
    """The second user: one browser for each account, always by the same proxy."""
    put(client, *proxies)
    session = Session("account-4711", idle_timeout=timedelta(days=1))
    options = {"labels": {"country": "DE"}, "schemes": "http", "holder": "browser-7"}
    used = set()
    address = ""
    for _ in range(3):
        with client.pool.acquire(SHOP, session=session, lease_duration=60 * SECOND, **options) as lease:  # type: ignore[arg-type]
            used.add(lease.key)
            for _ in range(2):
                status, body = fetch(site.url, lease.url)
                lease.report(UseResult(outcome_of(status, body), latency=2 * SECOND))
            address = lease.entry.proxy_url.removeprefix("http://")
    [first] = used

    site.banned.add(address)
    with client.pool.acquire(SHOP, session=session) as lease:
        assert lease.key == first
        lease.outcome = outcome_of(*fetch(site.url, lease.url))
        lease.end_session = True

    assert site.visits == {address: 7}
    assert resting(client, first, SHOP) == (False, True)
    with client.pool.acquire(SHOP, session=session) as lease:
        assert lease.key != first
        assert not lease.lease.session_moved


def test_many_threads_crawl_a_site_that_bans_who_comes_too_often(
    client: Client, proxies: list[LocalProxy]
) -> None:
    """The third user: leases are ready, results go in batches, and nobody uses a proxy that is in use."""
    put(client, *proxies)
    with local_site(patience=6) as site:
        guard = threading.Lock()
        in_use: set[str] = set()

        with client.pool.leaser(ready=2, holder="crawler") as leaser:

            def crawl(_page: int) -> Outcome | None:
                try:
                    lease = leaser.acquire(SHOP, wait=2 * SECOND)
                except NoProxyError:
                    return None
                with lease:
                    with guard:
                        assert lease.key not in in_use
                        in_use.add(lease.key)
                    try:
                        lease.outcome = outcome_of(*fetch(site.url, lease.url))
                    finally:
                        with guard:
                            in_use.remove(lease.key)
                return lease.outcome

            with ThreadPoolExecutor(20) as workers:
                outcomes = list(workers.map(crawl, range(60)))

        assert outcomes.count(Outcome.SUCCESS) == 36
        assert outcomes.count(Outcome.BLOCKED) == 6
        assert outcomes.count(None) == 18
        assert set(site.visits.values()) == {7}
    [target] = [one for one in client.pool.targets() if one.target == SHOP]
    assert target.resting == 6
    assert list(client.pool.leases()) == []


def test_a_checker_finds_the_dead_and_brings_back_the_living(
    client: Client, proxies: list[LocalProxy], site: LocalSite
) -> None:
    """The fourth user: it looks at what is new and at what rests, and borrows nothing."""
    keys = dict(zip(put(client, *proxies[:2]), proxies, strict=False))
    dead = client.put(CacheEntry(dead_proxy_url())).key

    def check(key: str, url: str) -> UseReport:
        begun_at = time.monotonic()
        try:
            status, body = fetch(site.url, url)
        except OSError as error:
            return UseReport(UseResult(outcome_of_error(error)), key=key)
        # A success counts against a rest that its use began after.
        latency = timedelta(seconds=time.monotonic() - begun_at)
        return UseReport(UseResult(outcome_of(status, body), latency, "judge.example"), key=key)

    kinds = [ChangeKind.EXISTING, ChangeKind.PUT]
    with client.watch(kinds=kinds, include_existing=True, include_credentials=True) as stream:
        seen = []
        while (change := next(stream)).kind is not ChangeKind.SYNCED:
            assert change.entry is not None
            seen.append(check(change.key, change.entry.url(with_credentials=True)))
    effects = client.pool.report_many(seen)

    assert {one.key for one in seen} == {*keys, dead}
    assert len(effects) == 3
    assert resting(client, dead, "judge.example") == (True, False)
    wait_until(lambda: [one.key for one in client.list(health=HealthStatus.UNHEALTHY)] == [dead])

    living = next(iter(keys))
    client.pool.report(living, Outcome.CONNECT_ERROR)
    assert resting(client, living, "judge.example") == (True, False)
    wait_until(lambda: len([*client.list(health=HealthStatus.UNHEALTHY)]) == 2)
    again = {one.key for one in client.list(health=HealthStatus.UNHEALTHY)}
    client.pool.report_many(check(key, keys[key].url) for key in again - {dead})
    assert resting(client, living, "judge.example") == (False, False)
    assert resting(client, dead, "judge.example") == (True, False)


def test_an_operator_sees_who_has_what_and_takes_it_back(client: Client, proxies: list[LocalProxy]) -> None:
    """The fifth user, in Python."""
    [key] = put(client, proxies[0])
    lease = client.pool.acquire(SHOP, holder="worker-7", lease_duration=1.5 * SECOND)

    [listed] = client.pool.leases(key=key)
    assert (listed.holder, listed.target) == ("worker-7", SHOP)
    assert client.pool.release(listed).released

    assert lease.lost.wait(30)
    client.pool.report(key, UseResult(Outcome.BLOCKED, target=SHOP, retry_after=timedelta(days=1)))
    health = client.pool.health(key)
    assert health is not None
    [at] = [one.standing for one in health.targets if one.target == SHOP]
    assert at.resting_until is not None
    assert at.resting_until > datetime.now(UTC) + timedelta(hours=23)


def test_a_proxy_with_a_wrong_password_rests_for_long(client: Client, site: LocalSite) -> None:
    with local_proxy(password="right") as proxy:
        entry = CacheEntry(proxy.url, username="ann", password="right")
        key = client.put(entry).key
        with client.pool.acquire(SHOP) as lease:
            lease.outcome = outcome_of(*fetch(site.url, lease.url))
        assert lease.outcome is Outcome.SUCCESS
        client.update(key, password="wrong")
        with client.pool.acquire(SHOP) as lease:
            lease.outcome = outcome_of(*fetch(site.url, lease.url))
    assert lease.outcome is Outcome.AUTH_ERROR
    assert resting(client, key, SHOP) == (True, False)
