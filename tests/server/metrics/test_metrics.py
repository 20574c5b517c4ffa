"""The metrics of a real server, as Prometheus reads them."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from prometheus_client.parser import text_string_to_metric_families

from proxystash.v1 import cache_service_pb2 as pb
from proxystash.v1 import cache_service_pb2_grpc as pb_grpc
from proxystash.v1 import pool_service_pb2 as pool_pb
from proxystash.v1 import pool_service_pb2_grpc as pool_pb_grpc
from tests.support.rpc import DEADLINE, open_channel
from tests.support.server import ServerProcess, running_server, start_and_fail

ON = ("--metrics-listen", "127.0.0.1:0")
SERVICE = "proxystash.v1.CacheService"

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def address_of(server: ServerProcess) -> tuple[str, int]:
    host, _, port = server.wait_for_log("server started")["metrics_address"].rpartition(":")
    return host, int(port)


def ask(server: ServerProcess, method: str = "GET", path: str = "/metrics") -> tuple[int, str, str]:
    """Status, content type and body."""
    connection = http.client.HTTPConnection(*address_of(server), timeout=DEADLINE)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.headers.get("Content-Type", ""), response.read().decode()
    finally:
        connection.close()


def scrape(server: ServerProcess) -> Samples:
    status, _, text = ask(server)
    assert status == 200
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    """A sample; 0 where it was never counted."""
    return samples.get((name, frozenset(labels.items())), 0)


def calls(server: ServerProcess, method: str, code: str, expected: float) -> float:
    """How many calls have ended so, at least `expected`: a client knows of an end before it is counted."""
    end = time.monotonic() + DEADLINE
    while True:
        count = value(
            scrape(server),
            "grpc_server_handled_total",
            grpc_service=SERVICE,
            grpc_method=method,
            grpc_code=code,
        )
        if count >= expected or time.monotonic() > end:
            return count


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with running_server(tmp_path / "data", *ON) as server:
        yield server


def entry(number: int, source: str = "source") -> pb.CacheEntry:
    return pb.CacheEntry(key=f"key-{number}", proxy_url=f"http://192.0.2.1:{1 + number}", source=source)


class TestCalls:
    def test_are_counted_by_method_and_status(self, server: ServerProcess) -> None:
        with open_channel(server.target) as channel:
            stub = pb_grpc.CacheServiceStub(channel)
            for number in range(3):
                stub.Put(pb.PutRequest(entry=entry(number)), timeout=DEADLINE)
            for key in ("key-0", "key-1", "absent"):
                stub.Get(pb.GetRequest(key=key), timeout=DEADLINE)
            with pytest.raises(grpc.RpcError):
                stub.Get(pb.GetRequest(), timeout=DEADLINE)
            stub.BatchGet(pb.BatchGetRequest(keys=["key-0"]), timeout=DEADLINE)

        assert calls(server, "Put", "OK", 3) == 3
        assert calls(server, "Get", "OK", 3) == 3
        assert calls(server, "Get", "InvalidArgument", 1) == 1
        assert calls(server, "BatchGet", "OK", 1) == 1
        samples = scrape(server)
        of_get = {"grpc_service": SERVICE, "grpc_method": "Get"}
        assert value(samples, "grpc_server_handling_seconds_count", **of_get) == 4
        assert value(samples, "grpc_server_handling_seconds_bucket", **of_get, le="+Inf") == 4
        assert 0 < value(samples, "grpc_server_handling_seconds_sum", **of_get) < DEADLINE

    def test_with_streams_end_when_the_stream_does(self, server: ServerProcess) -> None:
        with open_channel(server.target) as channel:
            stub = pb_grpc.CacheServiceStub(channel)
            request = pb.StreamStatsRequest(interval=Duration(seconds=3600))
            stream = stub.StreamStats(request, timeout=DEADLINE)
            next(stream)
            assert value(scrape(server), "proxystash_streams", method="StreamStats") == 1
            assert calls(server, "StreamStats", "Canceled", 0) == 0
            stream.cancel()
            assert calls(server, "StreamStats", "Canceled", 1) == 1
            assert value(scrape(server), "proxystash_streams", method="StreamStats") == 0

    def test_that_are_turned_away_are_counted(self, tmp_path: Path) -> None:
        with (
            running_server(tmp_path, *ON, "--max-stats-streams", "1") as server,
            open_channel(server.target) as channel,
        ):
            stub = pb_grpc.CacheServiceStub(channel)
            first = stub.StreamStats(pb.StreamStatsRequest(), timeout=DEADLINE)
            next(first)
            with pytest.raises(grpc.RpcError):
                next(stub.StreamStats(pb.StreamStatsRequest(), timeout=DEADLINE))
            assert calls(server, "StreamStats", "ResourceExhausted", 1) == 1
            first.cancel()


class TestStatistics:
    def test_are_those_of_the_service(self, tmp_path: Path) -> None:
        with (
            running_server(tmp_path, *ON, "--l1-max-entries", "2", "--l2-enabled", "false") as server,
            open_channel(server.target) as channel,
        ):
            stub = pb_grpc.CacheServiceStub(channel)
            for number in range(5):
                stub.Put(pb.PutRequest(entry=entry(number)), timeout=DEADLINE)
            for key in ("key-0", "key-0", "key-4", "absent"):
                stub.Get(pb.GetRequest(key=key), timeout=DEADLINE)
            for _ in range(3):
                request = pb.InvalidateByHealthRequest(key="key-1")
                stub.InvalidateByHealth(request, timeout=DEADLINE)
            stub.Delete(pb.DeleteRequest(key="key-2"), timeout=DEADLINE)
            statistics = stub.GetStats(pb.GetStatsRequest(), timeout=DEADLINE).statistics
            samples = scrape(server)

        assert value(samples, "proxystash_lookups_total", result="hit") == statistics.hits == 3
        assert value(samples, "proxystash_lookups_total", result="miss") == statistics.misses == 1
        assert value(samples, "proxystash_entries") == statistics.entries == 3
        assert value(samples, "proxystash_removals_total") == statistics.removals == 1
        assert value(samples, "proxystash_promotions_total") == statistics.promotions > 0
        assert value(samples, "proxystash_demotions_total") == statistics.demotions > 0
        for tier in statistics.tiers:
            name = pb.Tier.Name(tier.tier).removeprefix("TIER_").lower()
            states = {
                state: value(samples, "proxystash_tier_state", tier=name, state=state)
                for state in ("active", "degraded", "disabled")
            }
            state = pb.TierState.Name(tier.state).removeprefix("TIER_STATE_").lower()
            assert states == {each: float(each == state) for each in states}
            assert value(samples, "proxystash_tier_entries", tier=name) == tier.entries
            assert value(samples, "proxystash_tier_max_entries", tier=name) == tier.max_entries
            assert value(samples, "proxystash_tier_errors_total", tier=name) == tier.errors
            assert value(samples, "proxystash_tier_lookups_total", tier=name, result="hit") == tier.hits
            assert value(samples, "proxystash_tier_lookups_total", tier=name, result="miss") == tier.misses
            for cause in ("capacity", "ttl", "health", "corruption"):
                count = value(samples, "proxystash_tier_evictions_total", tier=name, cause=cause)
                assert count == getattr(tier, f"evictions_{cause}")
        assert statistics.tiers[2].evictions_health == 1

    def test_of_the_pool_are_those_of_the_service(self, server: ServerProcess) -> None:
        with open_channel(server.target) as channel:
            stub, pool = pb_grpc.CacheServiceStub(channel), pool_pb_grpc.PoolServiceStub(channel)
            for number in range(3):
                stub.Put(pb.PutRequest(entry=entry(number)), timeout=DEADLINE)
            leases = [
                pool.Acquire(pool_pb.AcquireRequest(target="t.example"), timeout=DEADLINE).leases[0]
                for _ in range(3)
            ]
            pool.Acquire(pool_pb.AcquireRequest(target="t.example"), timeout=DEADLINE)
            used = pool_pb.UseResult(outcome=pool_pb.OUTCOME_SUCCESS)
            release = pool_pb.LeaseRelease(lease_id=leases[0].lease_id, result=used)
            pool.Release(pool_pb.ReleaseRequest(releases=[release]), timeout=DEADLINE)
            statistics = stub.GetStats(pb.GetStatsRequest(), timeout=DEADLINE).statistics.pool
            samples = scrape(server)

        assert (statistics.leases, statistics.granted, statistics.released) == (2, 3, 1)
        assert statistics.shortages == statistics.successes == statistics.results == 1
        assert value(samples, "proxystash_pool_leases") == 2
        assert value(samples, "proxystash_pool_sessions") == statistics.sessions
        assert value(samples, "proxystash_pool_waiting") == statistics.waiting
        for state in ("ready", "leased_out", "resting"):
            assert value(samples, "proxystash_pool_proxies", state=state) == getattr(statistics, state)
        assert value(samples, "proxystash_pool_granted_total") == 3
        assert value(samples, "proxystash_pool_ended_total", by="release") == 1
        assert value(samples, "proxystash_pool_ended_total", by="time") == statistics.expired
        assert value(samples, "proxystash_pool_shortages_total") == 1
        assert value(samples, "proxystash_pool_results_total", outcome="success") == 1
        assert value(samples, "proxystash_pool_results_total", outcome="other") == 0
        assert value(samples, "proxystash_pool_loading") == float(statistics.loading)
        assert value(samples, "proxystash_pool_journal_degraded") == 0

    def test_have_no_series_that_grows_with_the_data_and_tell_none_of_it(self, server: ServerProcess) -> None:
        with open_channel(server.target) as channel:
            stub = pb_grpc.CacheServiceStub(channel)
            put = pb.PutRequest(entry=entry(0))
            put.entry.password = put.entry.username = "hidden-word"
            stub.Put(put, timeout=DEADLINE)
            assert calls(server, "Put", "OK", 1) == 1
            before = scrape(server).keys()
            for number in range(100):
                put = pb.PutRequest(entry=entry(number, f"hidden-source-{number}"))
                put.entry.labels[f"hidden-label-{number}"] = "x"
                stub.Put(put, timeout=DEADLINE)
            assert calls(server, "Put", "OK", 101) == 101
        assert scrape(server).keys() == before
        assert "hidden" not in ask(server)[2]


class TestEndpoint:
    def test_answers_one_path_by_two_methods(self, server: ServerProcess) -> None:
        status, content_type, _ = ask(server)
        assert status == 200
        assert content_type.startswith("text/plain; version=")
        assert ask(server, "HEAD") == (200, content_type, "")
        assert ask(server, path="/metrics?debug=1")[0] == 200
        assert ask(server, path="/other")[::2] == (404, "see /metrics\n")
        assert ask(server, "POST")[0] == 501

    def test_is_not_kept_from_answering_by_garbage_and_silence(self, server: ServerProcess) -> None:
        with ExitStack() as stack:
            # As many as are answered at once say nothing, or not enough.
            for said in (
                b"",
                b"",
                b"",
                b"",
                b"\r\n",
                b"\xff" * 100,
                b"GET /metrics HTTP/1.1\r\n",
                b"GET " + b"a" * 100_000,
            ):
                connection = stack.enter_context(socket.create_connection(address_of(server), DEADLINE))
                connection.sendall(said)
            assert ask(server)[0] == 200
        assert server.stop() == 0
        assert {line["level"] for line in server.log_lines()} == {"info"}

    def test_that_cannot_listen_stops_the_start_before_anything_is_made(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            code, errors = start_and_fail(
                "--listen", "127.0.0.1:0", "--metrics-listen", address, "--data-dir", str(tmp_path / "data")
            )
        assert code == 1
        assert f"cannot listen on {address} for metrics: Address already in use" in errors
        assert not (tmp_path / "data").exists()

    def test_warns_where_others_may_ask(self, tmp_path: Path) -> None:
        with running_server(tmp_path, "--metrics-listen", "0.0.0.0:0") as server:
            line = server.wait_for_log(
                "other machines may reach this address, and its metrics are for everybody"
            )
        assert line["level"] == "warning"
