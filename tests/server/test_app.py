"""The server as its users run it: a process with a data directory, signals and a log."""

from __future__ import annotations

import signal
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.fernet import Fernet
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from proxystash.v1 import cache_service_pb2 as pb
from proxystash.v1 import cache_service_pb2_grpc as pb_grpc
from tests.support.http2 import RawConnection, message_bytes
from tests.support.rpc import DEADLINE, open_channel, refusal_of
from tests.support.server import running_server, start_and_fail

BACKENDS = ["jsonl", "sqlite"]


def entry(number: int) -> pb.CacheEntry:
    url = f"http://planted-user:planted-pass@192.0.2.1:{1000 + number}"
    return pb.CacheEntry(key=f"key-{number:04}", proxy_url=url, labels={"country": "DE"})


def keys_of(target: str) -> list[str]:
    with open_channel(target) as channel:
        stub = pb_grpc.CacheServiceStub(channel)
        keys: list[str] = []
        token = ""
        while True:
            page = stub.List(pb.ListRequest(page_size=1000, page_token=token), timeout=DEADLINE)
            keys += [entry.key for entry in page.entries]
            token = page.next_page_token
            if not token:
                return keys


class TestStart:
    def test_the_first_line_tells_the_address_the_data_and_the_backends(self, tmp_path: Path) -> None:
        with running_server(tmp_path / "data", "--l2-backend", "sqlite", "--l1-enabled", "false") as server:
            (line,) = server.log_lines()
            assert line.pop("timestamp").endswith("Z")
            assert line == {
                "event": "server started",
                "level": "info",
                "address": server.target,
                "data_dir": str(tmp_path / "data"),
                "version": "0.1.0",
                "l1": "memory (disabled)",
                "l2": "sqlite",
                "l3": "sqlite",
                "entries": 0,
            }
            assert not server.target.endswith(":0")

    def test_what_is_kept_is_its_owner_s_alone(self, tmp_path: Path) -> None:
        with running_server(tmp_path / "data"):
            assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
            assert stat.S_IMODE((tmp_path / "data" / "secret.key").stat().st_mode) == 0o600

    def test_settings_from_flags_environment_and_file_all_count(self, tmp_path: Path) -> None:
        config = tmp_path / "proxystash.toml"
        config.write_text('l2_max_entries = 6\n[source_ttl]\nshort = "1m"\n')
        with (
            running_server(
                tmp_path / "data",
                *("--config", str(config), "--l1-max-entries", "5", "--failure-threshold", "1"),
                env={"PROXYSTASH_L3_MAX_ENTRIES": "7", "PROXYSTASH_DEFAULT_TTL": "2m"},
            ) as server,
            open_channel(server.target) as channel,
        ):
            stub = pb_grpc.CacheServiceStub(channel)
            tiers = stub.GetStats(pb.GetStatsRequest(), timeout=DEADLINE).statistics.tiers
            assert [tier.max_entries for tier in tiers] == [5, 6, 7]
            for source, seconds in (("short", 60), ("", 120)):
                stored = pb.CacheEntry(key="k", proxy_url="http://192.0.2.1:80", source=source)
                stub.Put(pb.PutRequest(entry=stored), timeout=DEADLINE)
                assert stub.Get(pb.GetRequest(key="k"), timeout=DEADLINE).entry.ttl == Duration(
                    seconds=seconds
                )
            outcome = stub.InvalidateByHealth(pb.InvalidateByHealthRequest(key="k"), timeout=DEADLINE)
            assert (outcome.evicted, outcome.failure_threshold) == (True, 1)


class TestRefusals:
    """One line that says what is wrong, no traceback, and an exit code that is not 0."""

    def test_a_second_server_on_the_same_data_is_told_who_has_it(self, tmp_path: Path) -> None:
        with running_server(tmp_path) as server:
            code, errors = start_and_fail("--listen", "127.0.0.1:0", "--data-dir", str(tmp_path))
            (line,) = errors.splitlines()
            assert code == 1
            assert line.startswith(
                f"proxystash-server: data directory {tmp_path} is in use by process {server.process.pid}, "
                f"serving on {server.target} since "
            )
            assert keys_of(server.target) == []

    def test_a_second_server_on_the_same_port_is_refused(self, tmp_path: Path) -> None:
        with running_server(tmp_path / "one") as server:
            code, errors = start_and_fail("--listen", server.target, "--data-dir", str(tmp_path / "two"))
            assert (code, errors) == (
                1,
                f"proxystash-server: cannot listen on {server.target}: Address already in use\n",
            )

    def test_a_wrong_key_is_refused_and_the_right_one_still_works(self, tmp_path: Path) -> None:
        with running_server(tmp_path) as server, open_channel(server.target) as channel:
            pb_grpc.CacheServiceStub(channel).Put(pb.PutRequest(entry=entry(1)), timeout=DEADLINE)
            assert server.stop() == 0
        wrong = {"PROXYSTASH_ENCRYPTION_KEY": Fernet.generate_key().decode()}
        code, errors = start_and_fail("--listen", "127.0.0.1:0", "--data-dir", str(tmp_path), env=wrong)
        (line,) = errors.splitlines()
        assert code == 1
        assert line.startswith("proxystash-server: ")
        assert "key" in line
        assert wrong["PROXYSTASH_ENCRYPTION_KEY"] not in line
        with running_server(tmp_path) as server, open_channel(server.target) as channel:
            answer = pb_grpc.CacheServiceStub(channel).Get(pb.GetRequest(key="key-0001"), timeout=DEADLINE)
            assert (answer.entry.username, answer.entry.password) == ("planted-user", "planted-pass")

    def test_a_malformed_key_is_refused_without_being_shown(self, tmp_path: Path) -> None:
        env = {"PROXYSTASH_ENCRYPTION_KEY": "planted-key"}
        code, errors = start_and_fail("--listen", "127.0.0.1:0", "--data-dir", str(tmp_path), env=env)
        assert (code, len(errors.splitlines())) == (1, 1)
        assert "planted-key" not in errors

    def test_a_data_directory_that_is_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        code, errors = start_and_fail("--listen", "127.0.0.1:0", "--data-dir", str(tmp_path / "file"))
        assert (code, len(errors.splitlines())) == (1, 1)


class TestStop:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_stops_it_with_exit_code_0_and_a_line(
        self, tmp_path: Path, number: signal.Signals
    ) -> None:
        with running_server(tmp_path) as server:
            server.process.send_signal(number)
            assert server._wait() == 0
            line = server.log_lines()[-1]
            assert (line["event"], line["reason"]) == ("server stopped", number.name)
            assert line["uptime_seconds"] > 0

    def test_streams_and_watches_end_and_the_health_turns(self, tmp_path: Path) -> None:
        with (
            running_server(tmp_path, "--grace-period", "30") as server,
            open_channel(server.target) as channel,
        ):
            stream = pb_grpc.CacheServiceStub(channel).StreamStats(pb.StreamStatsRequest(), timeout=DEADLINE)
            next(stream)
            health: Any = health_pb2_grpc.HealthStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=DEADLINE)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            server.process.terminate()
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(grpc.RpcError) as caught:
                for _ in stream:
                    pass
            assert refusal_of(caught.value).reason == "SHUTTING_DOWN"
            assert server._wait() == 0

    def test_calls_under_way_are_answered(self, tmp_path: Path) -> None:
        """Clients put as fast as they can while the server stops: what was answered is there afterwards."""
        with running_server(tmp_path) as server, open_channel(server.target) as channel:
            stub = pb_grpc.CacheServiceStub(channel)
            acknowledged: list[str] = []
            refusals: list[grpc.StatusCode] = []

            def put_until_refused(worker: int) -> None:
                for number in range(100_000):
                    stored = pb.CacheEntry(key=f"{worker}-{number}", proxy_url="http://192.0.2.1:80")
                    try:
                        stub.Put(pb.PutRequest(entry=stored), timeout=DEADLINE)
                    except grpc.RpcError as error:
                        refusals.append(refusal_of(error).code)
                        return
                    acknowledged.append(stored.key)

            with ThreadPoolExecutor(4) as pool:
                workers = [pool.submit(put_until_refused, worker) for worker in range(4)]
                while len(acknowledged) < 200:
                    for worker in workers:
                        assert not worker.done() or worker.result() is None
                assert server.stop() == 0
                for worker in workers:
                    worker.result(DEADLINE)
            # CANCELLED is what gRPC makes of a call that arrives as the connections close.
            assert set(refusals) <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
        with running_server(tmp_path) as server:
            assert set(keys_of(server.target)) >= set(acknowledged)

    def test_a_second_signal_stops_it_at_once(self, tmp_path: Path) -> None:
        """The server waits for a call whose client does not send its request."""
        with (
            running_server(tmp_path, "--grace-period", "1h") as server,
            open_channel(server.target) as channel,
        ):
            leaving = threading.Event()
            begin: Any = channel.stream_unary("/proxystash.v1.CacheService/Get")
            call = begin.future(iter(leaving.wait, True))
            pb_grpc.CacheServiceStub(channel).GetStats(pb.GetStatsRequest(), timeout=DEADLINE)
            server.process.terminate()
            server.wait_for_log("server stopping")
            server.process.terminate()
            assert server._wait() == 1
            assert [line["event"] for line in server.log_lines()][-2:] == [
                "stopping at once",
                "server stopped",
            ]
            assert call.exception(DEADLINE) is not None
            leaving.set()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_acknowledged_is_there_after_a_kill(tmp_path: Path, backend: str) -> None:
    arguments = ("--l2-backend", backend)
    with running_server(tmp_path, *arguments) as server, open_channel(server.target) as channel:
        stub = pb_grpc.CacheServiceStub(channel)
        for number in range(20):
            stub.Put(pb.PutRequest(entry=entry(number)), timeout=DEADLINE)
        more = pb.BatchPutRequest(entries=[entry(number) for number in range(20, 220)])
        stub.BatchPut(more, timeout=DEADLINE)
        stub.Delete(pb.DeleteRequest(key="key-0000"), timeout=DEADLINE)
        server.kill()
    with running_server(tmp_path, *arguments) as server, open_channel(server.target) as channel:
        assert keys_of(server.target) == [f"key-{number:04}" for number in range(1, 220)]
        found = pb_grpc.CacheServiceStub(channel).Get(pb.GetRequest(key="key-0001"), timeout=DEADLINE).entry
        assert (found.username, found.password) == ("planted-user", "planted-pass")
        assert found.labels["country"] == "DE"


def test_of_a_header_that_is_not_text_the_log_has_the_size_alone(tmp_path: Path) -> None:
    """gRPC's library decodes every header of a call, and quotes what it cannot decode."""
    header = "Bearer planted\xff" * 100
    with running_server(tmp_path) as server, RawConnection(server.target) as connection:
        get = "/proxystash.v1.CacheService/Get"
        request = message_bytes(pb.GetRequest(key="k").SerializeToString())
        stream = connection.call(get, request, end=True, headers={"authorization": header})
        assert any(frame.stream == stream and frame.ends_stream for frame in connection.frames())
        server.wait_for_log(f"a header of a call is not text: {len(header)} bytes")
        assert "planted" not in server.log_text()
        assert r"\xff" not in server.log_text()


def test_the_log_has_a_line_for_an_eviction_by_health_and_no_credential(tmp_path: Path) -> None:
    """At every level, whatever is asked, refused or broken."""
    with running_server(tmp_path, "--log-level", "debug") as server, open_channel(server.target) as channel:
        stub = pb_grpc.CacheServiceStub(channel)
        stub.Put(pb.PutRequest(entry=entry(1)), timeout=DEADLINE)
        bad = pb.CacheEntry(proxy_url="http://planted-user:planted-pass@192.0.2.1")
        with pytest.raises(grpc.RpcError):
            stub.Put(pb.PutRequest(entry=bad), timeout=DEADLINE)
        stub.BatchPut(pb.BatchPutRequest(entries=[entry(2), bad]), timeout=DEADLINE)
        stub.List(pb.ListRequest(include_credentials=True), timeout=DEADLINE)
        for _ in range(3):
            stub.InvalidateByHealth(pb.InvalidateByHealthRequest(key="key-0001"), timeout=DEADLINE)
        line = server.wait_for_log("entry evicted by health")
        assert (line["level"], line["key"], line["failure_count"]) == ("info", "key-0001", 3)
        own = pb.CacheEntry(proxy_url="http://192.0.2.1:80", key="planted-user:planted-pass@192.0.2.1")
        stub.Put(pb.PutRequest(entry=own), timeout=DEADLINE)
        for _ in range(3):
            stub.InvalidateByHealth(pb.InvalidateByHealthRequest(key=own.key), timeout=DEADLINE)
        server.stop()
        keys = [line["key"] for line in server.log_lines() if line["event"] == "entry evicted by health"]
        assert keys == ["key-0001", "***@192.0.2.1"]
        assert "planted" not in server.log_text()
        assert all("text" not in line for line in server.log_lines())


def test_every_line_of_a_log_is_json(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        server.stop()
        assert [line.get("event") for line in server.log_lines()] == [
            "server started",
            "server stopping",
            "server stopped",
        ]
