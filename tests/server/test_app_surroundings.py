"""The server among what surrounds it: who reads its log, what it was started with, who else may reach it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from proxystash.v1 import cache_service_pb2 as pb
from proxystash.v1 import cache_service_pb2_grpc as pb_grpc
from tests.support.rpc import DEADLINE, open_channel
from tests.support.server import running_server, start_and_fail

PUT = pb.PutRequest(entry=pb.CacheEntry(key="k" * 256, proxy_url="http://192.0.2.1:80"))


@contextmanager
def started_server(
    data_dir: Path, *arguments: str, redirections: str = ""
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server whose log nobody reads, started by a shell, and its address."""
    command = [sys.executable, "-m", "proxystash_server", "serve", "--listen", "127.0.0.1:0", *arguments]
    process = subprocess.Popen(
        ["sh", "-c", f'exec "$@" {redirections}', "sh", *command, "--data-dir", str(data_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
    try:
        yield process, address_of(data_dir, process)
    finally:
        process.kill()
        process.communicate()


def address_of(data_dir: Path, process: subprocess.Popen[bytes]) -> str:
    """Where a server serves, by what it says to those who find its directory locked."""
    for _ in range(DEADLINE * 100):
        assert process.poll() is None
        lock = data_dir / "lock"
        purpose = json.loads(lock.read_text() or "{}").get("purpose", "") if lock.exists() else ""
        if purpose.startswith("serving on "):
            return str(purpose.removeprefix("serving on "))
        time.sleep(0.01)
    raise AssertionError("the server does not start")


class TestALogThatNobodyReads:
    def test_holds_up_no_call_and_no_end(self, tmp_path: Path) -> None:
        with (
            started_server(tmp_path, "--failure-threshold", "1") as (process, target),
            open_channel(target) as channel,
        ):
            stub = pb_grpc.CacheServiceStub(channel)
            # Each round logs a line of 350 bytes.
            for _ in range(200):
                stub.Put(PUT, timeout=DEADLINE)
                stub.InvalidateByHealth(pb.InvalidateByHealthRequest(key="k" * 256), timeout=DEADLINE)
            process.terminate()
            assert process.wait(DEADLINE) == 0

    def test_a_log_that_was_closed_ends_nothing_either(self, tmp_path: Path) -> None:
        with (
            started_server(tmp_path, "--failure-threshold", "1") as (process, target),
            open_channel(target) as channel,
        ):
            assert process.stderr is not None
            process.stderr.close()
            process.stderr = None
            stub = pb_grpc.CacheServiceStub(channel)
            stub.Put(PUT, timeout=DEADLINE)
            stub.InvalidateByHealth(pb.InvalidateByHealthRequest(key="k" * 256), timeout=DEADLINE)
            process.terminate()
            assert process.wait(DEADLINE) == 0


@pytest.mark.parametrize(
    ("redirections", "closed"), [("<&-", {0}), (">&-", {1}), ("2>&-", {2}), ("<&- >&- 2>&-", {0, 1, 2})]
)
def test_a_standard_file_that_was_closed_is_none_of_the_server_s_own(
    tmp_path: Path, redirections: str, closed: set[int]
) -> None:
    """What is printed, by whomever, reaches no database, and no signal is read from it."""
    with started_server(tmp_path, redirections=redirections) as (process, target):
        files = Path(f"/proc/{process.pid}/fd")
        nowhere = {number for number in range(3) if (files / str(number)).readlink() == Path(os.devnull)}
        assert nowhere == closed
        with open_channel(target) as channel:
            assert pb_grpc.CacheServiceStub(channel).Put(PUT, timeout=DEADLINE).stored_in
        process.terminate()
        assert process.wait(DEADLINE) == 0


def test_what_a_command_complains_of_is_no_output_where_standard_error_is_closed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "proxystash_server", "check", str(tmp_path / "nowhere")]
    result = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", *command],
        stdout=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, b"")


@pytest.mark.parametrize("arguments", [["--help"], ["settings"], ["check"]], ids=" ".join)
def test_a_full_disk_behind_the_output_of_a_command_is_one_line(tmp_path: Path, arguments: list[str]) -> None:
    if arguments == ["check"]:
        with running_server(tmp_path):
            pass
        arguments = ["check", "--data-dir", str(tmp_path)]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "proxystash_server", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=DEADLINE,
        )

    assert result.stderr == "proxystash-server: cannot write the output: No space left on device\n"
    assert result.returncode == 1


def test_the_end_of_a_terminal_does_not_end_it(tmp_path: Path) -> None:
    with running_server(tmp_path) as server, open_channel(server.target) as channel:
        server.process.send_signal(signal.SIGHUP)
        stub = pb_grpc.CacheServiceStub(channel)
        assert stub.Put(PUT, timeout=DEADLINE).stored_in
        assert server.stop() == 0
        assert server.log_lines()[-1]["reason"] == "SIGTERM"


@pytest.mark.parametrize(
    ("host", "is_warned"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True), ("[::]", True)]
)
def test_an_address_that_others_may_reach_is_warned_of(tmp_path: Path, host: str, is_warned: bool) -> None:
    with running_server(tmp_path, "--listen", f"{host}:0") as server:
        server.stop()
        warnings = [line for line in server.log_lines() if line["level"] == "warning"]
        assert [line["address"] for line in warnings] == [server.target] * is_warned


def test_a_start_that_is_refused_for_its_address_has_changed_nothing(tmp_path: Path) -> None:
    with running_server(tmp_path / "one") as server:
        code, errors = start_and_fail("--listen", server.target, "--data-dir", str(tmp_path / "two"))
        assert (code, "Address already in use" in errors) == (1, True)
        assert not (tmp_path / "two").exists()


def test_what_kubernetes_says_of_services_stops_nothing(tmp_path: Path) -> None:
    injected = {
        f"{service}_{name}": value
        for service in ("PROXYSTASH", "PROXYSTASH_SERVER")
        for name, value in {
            "SERVICE_HOST": "192.0.2.10",
            "SERVICE_PORT": "50051",
            "SERVICE_PORT_GRPC": "50051",
            "PORT": "tcp://192.0.2.10:50051",
            "PORT_50051_TCP": "tcp://192.0.2.10:50051",
            "PORT_50051_TCP_PROTO": "tcp",
            "PORT_50051_TCP_PORT": "50051",
            "PORT_50051_TCP_ADDR": "192.0.2.10",
        }.items()
    }
    with running_server(tmp_path, env=injected) as server:
        assert server.stop() == 0
    check = subprocess.run(
        [sys.executable, "-m", "proxystash_server", "check", str(tmp_path)],
        env={**os.environ, **injected},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (check.returncode, check.stderr) == (0, b"")
