"""One load of one server in one round: its rate, and the CPU time that the server took for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

from proxystash.v1 import cache_service_pb2 as pb
from tests.benchmarks.loads import Load, LoadError, ghz, h2load
from tests.benchmarks.processes import CpuMeter
from tests.benchmarks.results import Measurement
from tests.benchmarks.rounds import Figures, Series, ratio
from tests.benchmarks.servers import Server
from tests.benchmarks.text import beside, number

IN_FLIGHT = 16


def repeated(
    server: Server, method: str, request: Path, requests: int, *, l1_hits: int = 0, streams: int = IN_FLIGHT
) -> Callable[[], Figures]:
    """The same request again and again. Each must make `l1_hits` hits in memory, which proves the answers."""

    def run() -> Figures:
        before = server.l1_hits() if l1_hits else 0
        figures = metered(
            server, requests, lambda: h2load(server.target, method, request, requests, streams=streams)
        )
        if l1_hits and server.l1_hits() - before != requests * l1_hits:
            raise LoadError(
                f"{requests} requests of {method} made {server.l1_hits() - before} hits in memory"
            )
        return figures

    return run


def distinct(
    server: Server, method: str, requests: Path, count: int, *, entries: int = 0, concurrency: int = IN_FLIGHT
) -> Callable[[], Figures]:
    """Requests of which each is different, into an empty store, which must hold `entries` then."""

    def run() -> Figures:
        if entries:
            server.stub.Clear(pb.ClearRequest())
        figures = metered(
            server, count, lambda: ghz(server.target, method, requests, count, concurrency=concurrency)
        )
        if entries and server.entries() != entries:
            raise LoadError(f"{count} requests of {method} stored {server.entries()} entries, not {entries}")
        return figures

    return run


def metered(server: Server, requests: int, run: Callable[[], Load]) -> Figures:
    """What a load measured, with the server's CPU time for each request, in microseconds."""
    meter = CpuMeter(server.pid)
    load = run()
    figures = {"per_second": load.per_second, "server_cpu_us": meter.used() / requests * 1e6}
    return figures | {"p99_ms": load.p99 * 1e3} if load.p99 else figures


def compare_rates(measured: Mapping[str, Series], ours: str, theirs: str, factor: float = 1) -> Measurement:
    """One load's rate by another's, where each request of the first is worth `factor`.

    Also by CPU time of the server, which noisy neighbours disturb least.
    """
    one, other = measured[ours], measured[theirs]
    cpu = factor * median(other["server_cpu_us"]) / median(one["server_cpu_us"])
    rates = beside(factor * median(one["per_second"]), median(other["per_second"]), "/s")
    return Measurement(
        ratio(one["per_second"], other["per_second"], factor),
        {ours: one, theirs: other},
        f"{rates}; by the server's CPU time {number(cpu, '×')}",
    )
