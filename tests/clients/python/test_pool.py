"""Borrowing proxies with both clients, against a real server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from proxystash import (
    BreakerState,
    CacheEntry,
    EntryError,
    FailedPreconditionError,
    HealthEffect,
    InvalidArgumentError,
    LeaseRelease,
    NoProxyError,
    NotFoundError,
    Outcome,
    SelectionPolicy,
    Session,
    Shortage,
    UnavailableError,
    UseReport,
    UseResult,
)
from tests.support.server import ServerProcess, running_server

from .conftest import AnyClient, Connect

TARGET = "shop.example"
SECRET = "s3cr3t-p4ss"
SECOND = timedelta(seconds=1)


@pytest.fixture(scope="module")
def pool_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running_server(tmp_path_factory.mktemp("data")) as server:
        yield server


@pytest.fixture
def client(connect: Connect, pool_server: ServerProcess) -> AnyClient:
    """Given a server with nothing in it and nothing known of any proxy."""
    client = connect(pool_server.target)
    client.clear()
    return client


def put(client: AnyClient, count: int = 1, **fields: str) -> list[str]:
    """The keys of new proxies, of which nothing is known."""
    global _numbers
    first, _numbers = _numbers, _numbers + count
    return [
        client.put(CacheEntry(f"http://192.0.2.1:{number}", **fields)).key  # type: ignore[arg-type]
        for number in range(first, first + count)
    ]


_numbers = 1000


def held(client: AnyClient) -> list[str]:
    return [lease.key for lease in client.pool.leases()]


def last_outcome(client: AnyClient, key: str, target: str = TARGET) -> Outcome | None:
    health = client.pool.health(key)
    assert health is not None
    return next((one.standing.last_outcome for one in health.targets if one.target == target), None)


# -- one lease


def test_a_proxy_is_borrowed_until_the_end_of_the_block(client: AnyClient) -> None:
    [key] = put(client, username="ann", password=SECRET)

    with client.pool.acquire("Shop.Example", holder="worker-7", lease_duration=30 * SECOND) as lease:
        assert lease.key == key
        assert lease.url.startswith(f"http://ann:{SECRET}@192.0.2.1:")
        assert lease.lease.target == TARGET
        assert lease.is_held
        assert timedelta(seconds=29) < lease.lease.expires_at - datetime.now(UTC) < timedelta(seconds=31)
        assert SECRET not in repr(lease.lease)
        [listed] = client.pool.leases(holder="worker-7")
        assert (listed.lease_id, listed.key, listed.entry) == (lease.lease.lease_id, key, None)

    assert not lease.is_held
    assert held(client) == []
    assert last_outcome(client, key) is Outcome.SUCCESS
    health = client.pool.health(key)
    assert health is not None
    assert health.overall.latency is not None


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ConnectionRefusedError(), Outcome.CONNECT_ERROR),
        (TimeoutError(), Outcome.TIMEOUT),
        (KeyboardInterrupt(), Outcome.ABANDONED),
        (ZeroDivisionError(), Outcome.ABANDONED),
    ],
)
def test_an_exception_in_the_block_tells_the_outcome_and_goes_on(
    client: AnyClient, error: BaseException, outcome: Outcome
) -> None:
    [key] = put(client)

    with pytest.raises(type(error)), client.pool.acquire(TARGET):
        raise error

    assert held(client) == []
    health = client.pool.health(key)
    assert health is not None
    assert (health.overall.last_outcome or Outcome.ABANDONED) is outcome
    resting = health.overall.breaker is not BreakerState.CLOSED
    assert resting is (outcome is Outcome.CONNECT_ERROR)


def test_an_outcome_that_was_set_counts_for_more_than_an_exception(client: AnyClient) -> None:
    [key] = put(client)

    lease = client.pool.acquire(TARGET)
    lease.outcome = "rate_limited"
    lease.retry_after = timedelta(hours=3)
    with pytest.raises(ConnectionError), lease:
        raise ConnectionError

    health = client.pool.health(key)
    assert health is not None
    assert health.overall.breaker is BreakerState.CLOSED
    [at] = health.targets
    assert at.standing.last_outcome is Outcome.RATE_LIMITED
    assert at.standing.resting_until is not None
    assert at.standing.resting_until > datetime.now(UTC) + timedelta(hours=2)


def test_an_outcome_that_there_is_not_is_refused(client: AnyClient) -> None:
    put(client)

    with client.pool.acquire() as lease, pytest.raises(InvalidArgumentError) as caught:
        lease.outcome = "fine"

    assert (caught.value.reason, caught.value.field) == ("INVALID_OUTCOME", "outcome")


def test_what_was_reported_in_the_block_is_not_said_again(client: AnyClient) -> None:
    [key] = put(client)

    with client.pool.acquire(TARGET) as lease:
        effect = lease.report(UseResult("success", latency=SECOND))
        assert effect.found
        lease.report(Outcome.TARGET_ERROR)

    health = client.pool.health(key)
    assert health is not None
    assert health.overall.successes == pytest.approx(1, abs=0.01)
    assert health.overall.latency == SECOND
    assert health.overall.last_outcome is Outcome.TARGET_ERROR


def test_a_lease_is_released_once_and_without_an_outcome_says_nothing(client: AnyClient) -> None:
    [key] = put(client)

    with client.pool.acquire(TARGET) as lease:
        lease.release()
        lease.release(Outcome.BLOCKED)

    assert last_outcome(client, key) is None
    assert held(client) == []


def test_a_release_with_a_result_says_it(client: AnyClient) -> None:
    [key] = put(client)
    lease = client.pool.acquire(TARGET)

    lease.release(Outcome.BLOCKED)

    assert last_outcome(client, key) is Outcome.BLOCKED
    with pytest.raises(NoProxyError) as caught:
        client.pool.acquire(TARGET)
    assert caught.value.shortage is Shortage.RESTING
    assert caught.value.retry_after is not None


def test_no_proxy_says_why(client: AnyClient) -> None:
    with pytest.raises(NoProxyError) as caught:
        client.pool.acquire(TARGET)
    assert (caught.value.shortage, caught.value.reason) == (Shortage.NO_MATCH, "NO_PROXY")
    put(client)
    with client.pool.acquire(), pytest.raises(NoProxyError) as caught:
        client.pool.acquire(wait=timedelta(seconds=0.1))
    assert caught.value.shortage is Shortage.LEASED_OUT
    assert "leased out" in str(caught.value)


def test_a_call_waits_for_a_proxy_longer_than_its_deadline_without_a_wait(
    connect: Connect, pool_server: ServerProcess
) -> None:
    client = connect(pool_server.target, timeout=0.5)
    client.clear()
    [key] = put(client)
    client.pool.acquire_many(1, lease_duration=1.2 * SECOND)

    with client.pool.acquire(wait=10 * SECOND) as lease:
        assert lease.key == key


def test_the_filters_and_options_of_the_contract_are_asked_for(client: AnyClient) -> None:
    put(client, 2, source="a")
    german = client.put(CacheEntry("socks5://192.0.2.9:1", source="b", labels={"country": "DE"})).key

    def lent(**options: object) -> list[str]:
        result = client.pool.acquire_many(10, **options)  # type: ignore[arg-type]
        client.pool.release_many(LeaseRelease(lease.lease_id) for lease in result.leases)
        return [lease.key for lease in result.leases]

    assert lent(schemes="socks5") == lent(labels={"country": "DE"}) == lent(source="b") == [german]
    assert lent(health=["unknown"], schemes=["http", "socks5"], policy=SelectionPolicy.RANDOM) != []
    assert german not in lent(exclude_keys=["socks5://192.0.2.9:1"])
    assert lent(reuse_delay=timedelta(hours=1), schemes="socks5") == []
    result = client.pool.acquire_many(5)
    assert len(result.leases) == 3
    assert result.shortage is Shortage.LEASED_OUT
    assert all(lease.entry is not None and lease.score > 0 for lease in result.leases)


def test_a_session_keeps_its_proxy(client: AnyClient) -> None:
    put(client, 5)
    session = Session("account-1", idle_timeout=timedelta(hours=1), strict=True)
    keys = set()
    for _ in range(4):
        with client.pool.acquire(TARGET, session=session) as lease:
            keys.add(lease.key)
            assert not lease.lease.session_moved
    [key] = keys
    client.delete(key)
    with pytest.raises(FailedPreconditionError) as caught:
        client.pool.acquire(TARGET, session=session)
    assert caught.value.reason == "SESSION_LOST"
    assert client.pool.end_session("account-1", TARGET)
    assert not client.pool.end_session("account-1", TARGET)
    with client.pool.acquire(TARGET, session="account-1") as lease:
        assert lease.key != key
        lease.end_session = True
    assert not client.pool.end_session("account-1", TARGET)


# -- many leases


def test_thousands_of_leases_and_reports_go_in_several_requests(client: AnyClient) -> None:
    [key] = put(client)
    [lease] = client.pool.acquire_many(1).leases
    ids = [*(f"none-{number}" for number in range(2345)), lease.lease_id]

    renewed = client.pool.renew_many(ids, timedelta(minutes=2))
    effects = client.pool.report_many(UseReport(UseResult("success"), lease_id=one) for one in ids)
    released = client.pool.release_many(LeaseRelease(one, UseResult("success")) for one in ids)

    assert [result.held for result in renewed] == [False] * 2345 + [True]
    assert renewed[-1].expires_at is not None
    assert [isinstance(effect, EntryError) for effect in effects] == [True] * 2345 + [False]
    assert [result.released for result in released] == [False] * 2345 + [True]
    effect = released[-1].effect
    assert isinstance(effect, HealthEffect)
    assert effect.found
    health = client.pool.health(key)
    assert health is not None
    assert health.overall.successes == pytest.approx(2, abs=0.01)


def test_a_lease_its_id_or_a_key_will_do(client: AnyClient) -> None:
    [key] = put(client)
    [lease] = client.pool.acquire_many(1, TARGET).leases

    assert client.pool.renew(lease).held
    assert client.pool.renew(lease.lease_id, timedelta(hours=1)).held
    assert client.pool.report(lease, Outcome.SUCCESS).found
    assert client.pool.report(key, UseResult(Outcome.SUCCESS, target="news.example")).found
    assert not client.pool.report("http://192.0.2.77:1", "success").found
    assert client.pool.release(lease, "success").released
    assert not client.pool.release(lease).released
    assert not client.pool.renew(lease).held
    assert client.pool.health("nothing") is None
    targets = {target.target: target for target in client.pool.targets()}
    assert targets[TARGET].leases == 0
    assert targets[TARGET].success_rate > 0
    with pytest.raises(NotFoundError) as caught:
        client.pool.report(lease, "success")
    assert caught.value.reason == "LEASE_NOT_FOUND"


# -- errors


def test_errors_name_the_reason_and_the_field_as_the_caller_knows_it(client: AnyClient) -> None:
    [key] = put(client)
    calls: dict[tuple[str, str], Callable[[], object]] = {
        ("INVALID_TARGET", "target"): lambda: client.pool.acquire("x" * 300),
        ("INVALID_FILTER", "schemes[0]"): lambda: client.pool.acquire(schemes="gopher"),
        ("INVALID_HEALTH_STATUS", "health_status"): lambda: client.pool.acquire(health="fine"),
        ("INVALID_POLICY", "policy"): lambda: client.pool.acquire(policy="best-of-all"),
        ("INVALID_WAIT", "wait"): lambda: client.pool.acquire(wait=timedelta(minutes=2)),
        ("INVALID_COUNT", "count"): lambda: client.pool.acquire_many(101),
        ("INVALID_SESSION", "session.id"): lambda: client.pool.acquire(session=Session("x" * 200)),
        ("INVALID_LEASE_DURATION", "lease_duration"): lambda: client.pool.acquire(
            lease_duration=timedelta(0)
        ),
        ("INVALID_MAX_LEASES", "max_leases"): lambda: client.pool.acquire(max_leases=2**40),
        ("INVALID_KEY", "exclude_keys[1]"): lambda: client.pool.acquire(exclude_keys=["a", ""]),
        ("INVALID_RETRY_AFTER", "result.retry_after"): lambda: client.pool.release(
            "x", UseResult("success", retry_after=SECOND)
        ),
        ("INVALID_OUTCOME", "outcome"): lambda: client.pool.report(key, "fine"),
        ("INVALID_COUNT", "result.count"): lambda: client.pool.report(key, UseResult("success", count=-1)),
        ("INVALID_RETRY_AFTER", "releases[1500].result.retry_after"): lambda: client.pool.release_many(
            [*[LeaseRelease("x")] * 1500, LeaseRelease("x", UseResult("success", retry_after=SECOND))]
        ),
    }
    found = set()
    for call in calls.values():
        with pytest.raises(InvalidArgumentError) as caught:
            call()
        found.add((caught.value.reason, caught.value.field))
    assert found == set(calls)
    with pytest.raises(TypeError):
        client.pool.acquire(colour="red")  # type: ignore[call-arg]
    assert held(client) == []


def test_a_release_that_fails_does_not_hide_what_ended_the_block(connect: Connect, tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        client = connect(server.target, timeout=0.3)
        put(client)
        lease = client.pool.acquire()
        server.kill()
        with pytest.raises(ZeroDivisionError) as caught, lease:
            raise ZeroDivisionError
    assert "was not released" in caught.value.__notes__[0]


def test_a_release_that_fails_is_an_error_of_the_block(connect: Connect, tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        client = connect(server.target, timeout=0.3)
        put(client)
        with pytest.raises(UnavailableError), client.pool.acquire():
            server.kill()
