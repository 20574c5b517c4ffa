"""PoolService over a real socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format, message_factory

from proxystash.v1 import cache_service_pb2 as cache_pb
from proxystash.v1 import cache_service_pb2_grpc as cache_pb_grpc
from proxystash.v1 import pool_service_pb2 as pb
from proxystash.v1 import pool_service_pb2_grpc as pb_grpc
from proxystash_server.cache import CacheManager
from proxystash_server.pool.pool import Pool
from proxystash_server.pool.requests import SelectionPolicy
from proxystash_server.rpc.calls import StreamCall
from proxystash_server.rpc.pool_service import PoolService
from proxystash_server.rpc.server import RpcServer
from tests.support.rpc import DEADLINE, open_channel, refusal_of, refused, serving
from tests.support.server import running_server

_SERVICE = pb.DESCRIPTOR.services_by_name["PoolService"]


@pytest.fixture
def pool(manager: CacheManager, tmp_path: Path) -> Iterator[Pool]:
    with Pool(manager, tmp_path / "pool", labels=frozenset({"country"})) as pool:
        wait_until(lambda: not pool.statistics().loading)
        yield pool


@pytest.fixture
def server(manager: CacheManager, pool: Pool) -> Iterator[RpcServer]:
    service = PoolService(pool, policy=SelectionPolicy.BALANCED, labels=frozenset({"country"}))
    server = RpcServer(
        manager,
        "127.0.0.1:0",
        threads=4,
        max_stats_streams=4,
        max_watch_streams=1,
        watch_history=1,
        pool=service,
    )
    server.start()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def cache_stub(channel: grpc.Channel) -> cache_pb_grpc.CacheServiceStub:
    return cache_pb_grpc.CacheServiceStub(channel)


@pytest.fixture
def stub(channel: grpc.Channel) -> pb_grpc.PoolServiceStub:
    return pb_grpc.PoolServiceStub(channel)


def wait_until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not done():
        assert time.monotonic() < end
        time.sleep(0.002)


def put(manager: CacheManager, number: int = 1, **fields: Any) -> str:
    entry = manager.new_entry(f"http://192.0.2.{number}:8080", **fields)
    assert manager.put(entry.key, entry)
    return entry.key


def call(stub: pb_grpc.PoolServiceStub, method: str, **request: Any) -> Any:
    """Call a method with a request as JSON has it."""
    kind = message_factory.GetMessageClass(_SERVICE.methods_by_name[method].input_type)
    return getattr(stub, method)(json_format.ParseDict(request, kind()), timeout=DEADLINE)


def test_an_entry_of_a_message_says_how_many_leases_of_it_there_may_be(
    stub: pb_grpc.PoolServiceStub, cache_stub: cache_pb_grpc.CacheServiceStub
) -> None:
    entry = cache_pb.CacheEntry(proxy_url="http://192.0.2.1:80", max_leases=2)
    key = cache_stub.Put(cache_pb.PutRequest(entry=entry), timeout=DEADLINE).key
    leases = [lease for _ in range(3) for lease in call(stub, "Acquire").leases]
    assert [(lease.key, lease.entry.max_leases) for lease in leases] == [(key, 2)] * 2
    update = cache_pb.PutRequest(entry=cache_pb.CacheEntry(key=key, max_leases=3))
    update.update_mask.paths.append("max_leases")
    cache_stub.Put(update, timeout=DEADLINE)
    assert len(call(stub, "Acquire").leases) == 1
    assert call(stub, "GetProxyHealth", key=key).health.max_leases == 3


def test_statistics_tell_what_the_pool_holds_and_has_done(
    stub: pb_grpc.PoolServiceStub, cache_stub: cache_pb_grpc.CacheServiceStub, manager: CacheManager
) -> None:
    for number in range(1, 4):
        put(manager, number)
    call(stub, "Acquire", session={"id": "account"})
    [gone] = call(stub, "Acquire", target="shop.example").leases
    call(stub, "Acquire", filter={"source": "nowhere"})
    results = [{"lease_id": gone.lease_id, "result": {"outcome": outcome}} for outcome in
               ("OUTCOME_SUCCESS", "OUTCOME_CONNECT_ERROR")]  # fmt: skip
    call(stub, "ReportResults", reports=results)
    call(stub, "Release", releases=[{"lease_id": gone.lease_id}])

    pool = cache_stub.GetStats(cache_pb.GetStatsRequest(), timeout=DEADLINE).statistics.pool
    assert (pool.leases, pool.sessions, pool.waiting) == (1, 1, 0)
    assert (pool.ready, pool.leased_out, pool.resting) == (1, 1, 1)
    assert (pool.granted, pool.released, pool.expired, pool.shortages) == (2, 1, 0, 1)
    assert (pool.results, pool.successes) == (2, 1)
    assert pool.acquire_latency.max.ToNanoseconds() >= pool.acquire_latency.p50.ToNanoseconds() > 0
    assert not pool.loading
    assert not pool.journal_degraded
    stream = cache_stub.StreamStats(cache_pb.StreamStatsRequest(), timeout=DEADLINE)
    assert next(stream).statistics.pool == pool
    stream.cancel()


def test_a_proxy_is_lent_renewed_and_given_back(stub: pb_grpc.PoolServiceStub, manager: CacheManager) -> None:
    key = put(manager, username="user", password="pass", labels={"country": "DE"})
    before = time.time()
    response = call(
        stub,
        "Acquire",
        filter={"labels": {"country": "DE"}},
        target="Shop.Example",
        lease_duration="30s",
        holder="worker",
        session={"id": "account"},
        request_id="r",
    )
    [lease] = response.leases
    assert (lease.key, lease.entry.key, lease.entry.password) == (key, key, "pass")
    assert (lease.target, lease.holder, lease.session_id) == ("shop.example", "worker", "account")
    assert 0 < lease.score < 1
    assert not lease.trial
    assert before - 1 <= lease.acquired_at.ToSeconds() <= time.time()
    assert lease.expires_at.ToNanoseconds() - lease.acquired_at.ToNanoseconds() == pytest.approx(
        30e9, abs=1e6
    )
    assert response.shortage == pb.SHORTAGE_UNSPECIFIED
    assert not response.HasField("retry_after")

    short = call(stub, "Acquire")
    assert (len(short.leases), short.shortage) == (0, pb.SHORTAGE_LEASED_OUT)
    assert 0 < short.retry_after.ToNanoseconds() <= 30e9

    renewed = call(stub, "Renew", lease_ids=[lease.lease_id, "unknown"], lease_duration="60s")
    assert [result.held for result in renewed.results] == [True, False]
    assert renewed.results[0].expires_at.ToNanoseconds() > lease.expires_at.ToNanoseconds()

    [released] = call(
        stub,
        "Release",
        releases=[{"lease_id": lease.lease_id, "result": {"outcome": "OUTCOME_SUCCESS", "latency": "0.5s"}}],
    ).results
    assert released.released
    assert released.effect.found
    health = call(stub, "GetProxyHealth", key=key).health
    assert (health.key, health.leases, health.max_leases) == (key, 0, 1)
    assert health.overall.successes == pytest.approx(1.0, abs=0.01)
    assert health.overall.latency.ToMilliseconds() == 500
    assert health.overall.breaker == pb.BREAKER_STATE_CLOSED
    assert health.overall.last_outcome == pb.OUTCOME_SUCCESS
    [at] = health.targets
    assert at.target == "shop.example"
    assert at.standing.successes == pytest.approx(1.0, abs=0.01)
    assert not call(stub, "GetProxyHealth", key="unknown").HasField("health")


def test_bans_are_told_from_faults_of_the_proxy(stub: pb_grpc.PoolServiceStub, manager: CacheManager) -> None:
    key = put(manager)
    blocked = {
        "key": key,
        "result": {"outcome": "OUTCOME_RATE_LIMITED", "target": "shop.example", "retry_after": "7200s"},
    }
    bad = {"key": key, "result": {"outcome": 77}}
    results = call(
        stub,
        "ReportResults",
        reports=[blocked, bad, {"result": {"outcome": 1}}, {"lease_id": "x", "result": {"outcome": 1}}],
    ).results
    assert results[0].effect.HasField("resting_at_target_until")
    assert not results[0].effect.HasField("resting_until")
    assert [(result.error.reason, result.error.field) for result in results[1:]] == [
        ("INVALID_OUTCOME", "result.outcome"),
        ("MISSING_SUBJECT", "key"),
        ("LEASE_NOT_FOUND", ""),
    ]
    assert call(stub, "Acquire", target="shop.example").shortage == pb.SHORTAGE_RESTING
    assert len(call(stub, "Acquire", target="news.example").leases) == 1
    [target] = [one for one in call(stub, "ListTargets").targets if one.target == "shop.example"]
    assert (target.resting, target.success_rate) == (1, 0.0)
    assert target.failures == pytest.approx(1.0, abs=0.01)


def test_a_client_that_has_gone_takes_nothing_from_the_same_call_by_another_connection(
    stub: pb_grpc.PoolServiceStub, manager: CacheManager, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given two calls with one request id that wait, and one that cannot be answered any more."""
    request = pb.AcquireRequest(request_id="one")
    request.wait.FromSeconds(20)
    calls = [stub.Acquire.future(request, timeout=DEADLINE) for _ in range(2)]
    wait_until(lambda: pool.statistics().waiting == 1 and len(pool._line.all()[0].delivers) == 2)
    answer = StreamCall.answer

    def unanswered(_call: StreamCall, _message: bytes) -> bool:
        monkeypatch.setattr(StreamCall, "answer", answer)
        return False

    monkeypatch.setattr(StreamCall, "answer", unanswered)
    key = put(manager)
    wait_until(lambda: any(one.done() for one in calls))
    [answered] = [one.result() for one in calls if one.done()]
    assert [lease.key for lease in answered.leases] == [key]
    held = call(stub, "ListLeases").leases
    assert [one.lease_id for one in held] == [answered.leases[0].lease_id]


def test_lists_go_in_pages(stub: pb_grpc.PoolServiceStub, manager: CacheManager) -> None:
    for number in range(5):
        put(manager, number)
    leases = call(stub, "Acquire", count=5, holder="worker", target="a.example").leases
    first = call(stub, "ListLeases", page_size=3, holder="worker")
    second = call(stub, "ListLeases", page_size=3, holder="worker", page_token=first.next_page_token)
    assert [one.lease_id for one in [*first.leases, *second.leases]] == [one.lease_id for one in leases]
    assert not second.next_page_token
    assert not first.leases[0].HasField("entry")
    for name in ("b.example", "c.example"):
        call(stub, "Acquire", target=name)
    first = call(stub, "ListTargets", page_size=2)
    second = call(stub, "ListTargets", page_size=2, page_token=first.next_page_token)
    assert [one.target for one in [*first.targets, *second.targets]] == [
        "a.example",
        "b.example",
        "c.example",
    ]
    assert [one.leases for one in [*first.targets, *second.targets]] == [5, 0, 0]


LONG = "x" * 300
RESULT = {"outcome": "OUTCOME_SUCCESS"}
BAD: list[tuple[str, dict[str, Any], str, str]] = [
    ("Acquire", {"filter": {"schemes": ["gopher"]}}, "filter.schemes[0]", "INVALID_FILTER"),
    ("Acquire", {"filter": {"labels": {"rack": "1"}}}, "filter.labels", "INVALID_FILTER"),
    ("Acquire", {"target": LONG}, "target", "INVALID_TARGET"),
    ("Acquire", {"target": "a\nb"}, "target", "INVALID_TARGET"),
    ("Acquire", {"count": -1}, "count", "INVALID_COUNT"),
    ("Acquire", {"count": 101}, "count", "INVALID_COUNT"),
    ("Acquire", {"policy": 9}, "policy", "INVALID_POLICY"),
    ("Acquire", {"lease_duration": "0.5s"}, "lease_duration", "INVALID_LEASE_DURATION"),
    ("Acquire", {"lease_duration": "3601s"}, "lease_duration", "INVALID_LEASE_DURATION"),
    ("Acquire", {"wait": "-1s"}, "wait", "INVALID_WAIT"),
    ("Acquire", {"wait": "61s"}, "wait", "INVALID_WAIT"),
    ("Acquire", {"wait": "40s"}, "wait", "INVALID_WAIT"),
    ("Acquire", {"max_leases": -1}, "max_leases", "INVALID_MAX_LEASES"),
    ("Acquire", {"reuse_delay": "3601s"}, "reuse_delay", "INVALID_REUSE_DELAY"),
    ("Acquire", {"exclude_keys": ["k"] * 257}, "exclude_keys", "TOO_MANY_KEYS"),
    ("Acquire", {"exclude_keys": ["k", ""]}, "exclude_keys[1]", "INVALID_KEY"),
    ("Acquire", {"holder": LONG}, "holder", "INVALID_HOLDER"),
    ("Acquire", {"exclude_held": True}, "holder", "INVALID_HOLDER"),
    ("Acquire", {"session": {}}, "session.id", "INVALID_SESSION"),
    ("Acquire", {"session": {"id": LONG}}, "session.id", "INVALID_SESSION"),
    ("Acquire", {"session": {"id": "s", "idle_timeout": "0s"}}, "session.idle_timeout", "INVALID_SESSION"),
    (
        "Acquire",
        {"session": {"id": "s", "idle_timeout": "86401s"}},
        "session.idle_timeout",
        "INVALID_SESSION",
    ),
    ("Acquire", {"session": {"id": "s", "max_age": "0s"}}, "session.max_age", "INVALID_SESSION"),
    ("Acquire", {"session": {"id": "s"}, "count": 2}, "count", "INVALID_COUNT"),
    ("Acquire", {"request_id": LONG}, "request_id", "INVALID_REQUEST_ID"),
    ("Renew", {"lease_ids": ["x"] * 1001}, "lease_ids", "TOO_MANY_LEASE_IDS"),
    ("Renew", {"lease_duration": "0s"}, "lease_duration", "INVALID_LEASE_DURATION"),
    ("Release", {"releases": [{}] * 1001}, "releases", "TOO_MANY_RELEASES"),
    ("Release", {"releases": [{}, {"result": {}}]}, "releases[1].result.outcome", "INVALID_OUTCOME"),
    (
        "Release",
        {"releases": [{"result": RESULT | {"count": -1}}]},
        "releases[0].result.count",
        "INVALID_COUNT",
    ),
    (
        "Release",
        {"releases": [{"result": RESULT | {"count": 1001}}]},
        "releases[0].result.count",
        "INVALID_COUNT",
    ),
    (
        "Release",
        {"releases": [{"result": RESULT | {"latency": "-1s"}}]},
        "releases[0].result.latency",
        "INVALID_LATENCY",
    ),
    (
        "Release",
        {"releases": [{"result": RESULT | {"finished_at": "2001-01-01T00:00:00Z"}}]},
        "releases[0].result.finished_at",
        "INVALID_FINISHED_AT",
    ),
    (
        "Release",
        {"releases": [{"result": RESULT | {"finished_at": "2201-01-01T00:00:00Z"}}]},
        "releases[0].result.finished_at",
        "INVALID_FINISHED_AT",
    ),
    (
        "Release",
        {"releases": [{"result": RESULT | {"retry_after": "1s"}}]},
        "releases[0].result.retry_after",
        "INVALID_RETRY_AFTER",
    ),
    (
        "Release",
        {"releases": [{"result": {"outcome": 5, "retry_after": "86401s"}}]},
        "releases[0].result.retry_after",
        "INVALID_RETRY_AFTER",
    ),
    (
        "Release",
        {"releases": [{"result": RESULT | {"target": LONG}}]},
        "releases[0].result.target",
        "INVALID_TARGET",
    ),
    ("ReportResults", {"reports": [{}] * 1001}, "reports", "TOO_MANY_REPORTS"),
    ("EndSession", {}, "session_id", "INVALID_SESSION"),
    ("EndSession", {"session_id": "s", "target": LONG}, "target", "INVALID_TARGET"),
    ("GetProxyHealth", {}, "key", "INVALID_KEY"),
    ("ListTargets", {"page_size": -1}, "page_size", "INVALID_PAGE_SIZE"),
    ("ListTargets", {"page_token": "rubbish"}, "page_token", "INVALID_PAGE_TOKEN"),
    ("ListLeases", {"page_size": -1}, "page_size", "INVALID_PAGE_SIZE"),
    ("ListLeases", {"page_token": "rubbish"}, "page_token", "INVALID_PAGE_TOKEN"),
    ("ListLeases", {"holder": LONG}, "holder", "INVALID_HOLDER"),
    ("ListLeases", {"session_id": LONG}, "session_id", "INVALID_SESSION"),
    ("ListLeases", {"target": LONG}, "target", "INVALID_TARGET"),
    ("ListLeases", {"key": LONG}, "key", "INVALID_KEY"),
]


@pytest.mark.parametrize(("method", "request_json", "field", "reason"), BAD)
def test_bad_input_is_refused_by_field_and_changes_nothing(
    stub: pb_grpc.PoolServiceStub,
    manager: CacheManager,
    pool: Pool,
    method: str,
    request_json: dict[str, Any],
    field: str,
    reason: str,
) -> None:
    put(manager)
    with pytest.raises(grpc.RpcError) as caught:
        call(stub, method, **request_json)
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.fields, refusal.reason) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        (field,),
        reason,
    )
    assert "xxx" not in refusal.message
    statistics = pool.statistics()
    assert (statistics.granted, statistics.results, statistics.sessions, statistics.waiting) == (0, 0, 0, 0)


def test_a_strict_session_is_lost(stub: pb_grpc.PoolServiceStub, manager: CacheManager) -> None:
    key = put(manager)
    [lease] = call(stub, "Acquire", session={"id": "s"}).leases
    call(stub, "Release", releases=[{"lease_id": lease.lease_id}])
    manager.delete(key)
    put(manager, 2)
    with pytest.raises(grpc.RpcError) as caught:
        call(stub, "Acquire", session={"id": "s", "strict": True})
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SESSION_LOST")
    assert call(stub, "EndSession", session_id="s").ended
    assert not call(stub, "EndSession", session_id="s").ended
    assert len(call(stub, "Acquire", session={"id": "s", "strict": True}).leases) == 1


def test_calls_wait_without_a_thread_while_others_are_answered(
    stub: pb_grpc.PoolServiceStub, manager: CacheManager, pool: Pool
) -> None:
    """Given many times as many calls that wait as there are worker threads."""
    put(manager)
    [held] = call(stub, "Acquire").leases
    request = pb.AcquireRequest()
    request.wait.seconds = 20
    # The client has a thread for all of its calls.
    waiting = [stub.Acquire.future(request, timeout=DEADLINE)]
    wait_until(lambda: pool.statistics().waiting == 1)
    threads = threading.active_count()
    waiting += [stub.Acquire.future(request, timeout=DEADLINE) for _ in range(99)]
    wait_until(lambda: pool.statistics().waiting == 100)
    assert threading.active_count() == threads
    for _ in range(100):
        call(stub, "Release", releases=[{"lease_id": held.lease_id}])
        wait_until(lambda: any(one.done() for one in waiting))
        [served] = [one for one in waiting if one.done()]
        waiting.remove(served)
        [held] = served.result().leases
    assert pool.statistics().waiting == 0


def test_a_wait_that_is_over_says_why(stub: pb_grpc.PoolServiceStub, manager: CacheManager) -> None:
    put(manager)
    call(stub, "Acquire")
    response = call(stub, "Acquire", wait="0.2s")
    assert (len(response.leases), response.shortage) == (0, pb.SHORTAGE_LEASED_OUT)


def test_a_client_that_gives_up_is_not_served(
    stub: pb_grpc.PoolServiceStub, manager: CacheManager, pool: Pool
) -> None:
    put(manager)
    [held] = call(stub, "Acquire").leases
    request = pb.AcquireRequest()
    request.wait.seconds = 20
    waiting = stub.Acquire.future(request, timeout=DEADLINE)
    wait_until(lambda: pool.statistics().waiting == 1)
    waiting.cancel()
    wait_until(lambda: pool.statistics().waiting == 0)
    call(stub, "Release", releases=[{"lease_id": held.lease_id}])
    assert len(call(stub, "Acquire").leases) == 1


def test_a_server_that_ends_tells_those_who_wait(
    stub: pb_grpc.PoolServiceStub, manager: CacheManager, server: RpcServer, pool: Pool
) -> None:
    request = pb.AcquireRequest()
    request.wait.seconds = 20
    waiting = stub.Acquire.future(request, timeout=DEADLINE)
    wait_until(lambda: pool.statistics().waiting == 1)
    server.drain()
    with pytest.raises(grpc.RpcError) as caught:
        waiting.result()
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    wait_until(lambda: pool.statistics().waiting == 0)


def test_an_answer_has_no_more_than_a_message_holds(
    stub: pb_grpc.PoolServiceStub, manager: CacheManager, pool: Pool
) -> None:
    """Given a hundred of the largest entries: those that have no room are not leased."""
    labels = {f"label{number}": "ü" * 256 for number in range(32)} | {"country": "DE"}
    labels.pop("label0")
    for number in range(1, 250):
        put(manager, number, labels=labels, username="u" * 1024, password="ü" * 1024)
    wait_until(lambda: pool.statistics().ready == 249)
    response = call(stub, "Acquire", count=100)
    assert response.leases
    assert response.ByteSize() <= 3.1 * 1024 * 1024
    assert pool.statistics().leases == len(response.leases)


def test_where_the_pool_is_switched_off_the_methods_are_unimplemented(manager: CacheManager) -> None:
    with serving(manager) as server, open_channel(server.address) as channel:
        for method in _SERVICE.methods:
            stub = pb_grpc.PoolServiceStub(channel)
            kind = message_factory.GetMessageClass(method.input_type)
            assert refused(getattr(stub, method.name), kind()).code is grpc.StatusCode.UNIMPLEMENTED


def test_nobody_is_lent_what_is_lent_already(stub: pb_grpc.PoolServiceStub, manager: CacheManager) -> None:
    """Given sixteen clients of a server with four threads, and five proxies."""
    for number in range(5):
        put(manager, number)
    held: set[str] = set()
    guard = threading.Lock()

    def work(_number: int) -> int:
        served = 0
        for _ in range(30):
            for lease in call(stub, "Acquire", wait="10s").leases:
                with guard:
                    assert lease.key not in held
                    held.add(lease.key)
                served += 1
                with guard:
                    held.remove(lease.key)
                [released] = call(stub, "Release", releases=[{"lease_id": lease.lease_id}]).results
                assert released.released
        return served

    with ThreadPoolExecutor(16) as clients:
        assert list(clients.map(work, range(16))) == [30] * 16


def test_leases_and_bans_survive_kills_of_the_server(tmp_path: Path) -> None:
    target = "shop.example"
    held: dict[str, str] = {}
    for round_number in range(3):
        with running_server(tmp_path / "data") as server, open_channel(server.target) as channel:
            stub = pb_grpc.PoolServiceStub(channel)
            if round_number == 0:
                _fill(channel, 6)
            wait_until(lambda: _is_loaded(stub))  # noqa: B023 -- called here alone
            listed = call(stub, "ListLeases").leases
            assert {lease.lease_id: lease.key for lease in listed} == held
            [lease] = call(stub, "Acquire", target=target, lease_duration="3600s").leases
            assert lease.key not in held.values()
            held[lease.lease_id] = lease.key
            [released] = call(stub, "Acquire", target=target).leases
            assert released.key not in held.values()
            call(stub, "Release", releases=[{"lease_id": released.lease_id}])
            server.kill()


def _fill(channel: grpc.Channel, count: int) -> None:
    cache = cache_pb_grpc.CacheServiceStub(channel)
    entries = [cache_pb.CacheEntry(proxy_url=f"http://192.0.2.{number}:80") for number in range(count)]
    cache.BatchPut(cache_pb.BatchPutRequest(entries=entries), timeout=DEADLINE)


def _is_loaded(stub: pb_grpc.PoolServiceStub) -> bool:
    try:
        [lease] = call(stub, "Acquire").leases
    except (grpc.RpcError, ValueError):
        return False
    call(stub, "Release", releases=[{"lease_id": lease.lease_id}])
    return True
