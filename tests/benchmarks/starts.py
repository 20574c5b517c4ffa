"""How long the server takes to serve a large store, and what memory it has then."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from proxystash.v1 import cache_service_pb2 as pb
from proxystash.v1 import cache_service_pb2_grpc as pb_grpc
from tests.benchmarks.bench import Bench
from tests.benchmarks.loads import LoadError
from tests.benchmarks.messages import entry_message
from tests.benchmarks.processes import memory_mb, running
from tests.benchmarks.rounds import Series, Spread, spread

_GIVE_UP_SECONDS = 120
# Written before a kill, so that there is something in the logs to recover.
_LAST_WRITES = 500


def measure_starts(bench: Bench, data_dir: Path, rounds: int) -> dict[str, tuple[Spread, Series]]:
    """Starts after a clean stop and after a kill by turns: by the row's name, its figure and the series."""
    bench.tell(f"  {rounds} rounds of start, start after a kill")
    _start(data_dir, kill=False)
    series: Series = {"start": [], "start-after-kill": [], "start-memory": []}
    for _ in range(rounds):
        seconds, memory = _start(data_dir, kill=True)
        series["start"].append(seconds)
        series["start-memory"].append(memory)
        seconds, memory = _start(data_dir, kill=False)
        series["start-after-kill"].append(seconds)
        series["start-memory"].append(memory)
    return {name: (spread(values), {name: values}) for name, values in series.items()}


def _start(data_dir: Path, *, kill: bool) -> tuple[float, float]:
    """Seconds to SERVING, and MB then; the server is stopped cleanly, or writes and is killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{probe.getsockname()[1]}"
    program = Path(sys.executable).with_name("proxystash-server")
    began = time.perf_counter()
    with running([program, "serve", "--data-dir", data_dir, "--listen", target]) as process:
        _wait_for_port(target, began)
        with grpc.insecure_channel(target) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service="proxystash.v1.CacheService")
            while health.Check(request, timeout=30).status != _SERVING:  # type: ignore[attr-defined]  # not in the stubs
                time.sleep(0.005)
            seconds = time.perf_counter() - began
            memory = memory_mb(process.pid)
            if kill:
                entries = [entry_message(number) for number in range(_LAST_WRITES)]
                pb_grpc.CacheServiceStub(channel).BatchPut(pb.BatchPutRequest(entries=entries))
                process.kill()
                process.wait()
    return seconds, memory


_SERVING = health_pb2.HealthCheckResponse.SERVING


def _wait_for_port(target: str, began: float) -> None:
    host, _, port = target.rpartition(":")
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            if time.perf_counter() - began > _GIVE_UP_SECONDS:
                raise LoadError(f"no server after {_GIVE_UP_SECONDS} s") from None
            time.sleep(0.005)
        else:
            return
