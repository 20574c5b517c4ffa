"""Borrowing proxies: what a lease costs, how choosing grows, and what calls that wait take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import grpc
from google.protobuf.duration_pb2 import Duration

from proxystash.v1 import cache_service_pb2 as pb
from proxystash.v1 import pool_service_pb2 as pool_pb
from proxystash.v1 import pool_service_pb2_grpc as pool_grpc
from tests.benchmarks.bench import Bench, Theme
from tests.benchmarks.loads import LoadError, ghz, h2load
from tests.benchmarks.messages import entry_message, write_framed, write_requests
from tests.benchmarks.processes import threads_of
from tests.benchmarks.results import Measurement, Row, at_least, at_most
from tests.benchmarks.rounds import Figures, Series, Spread, ratio, spread
from tests.benchmarks.rows_growth import BASE, LARGE, growth_of
from tests.benchmarks.rows_under_load import wait_until
from tests.benchmarks.rpc_loads import IN_FLIGHT, metered
from tests.benchmarks.servers import Server, noop, proxystash
from tests.benchmarks.text import beside, number
from tests.benchmarks.workers import open_worker

WAITING = 500
_CONNECTIONS = 5
_QUICK_LARGE = 50_000
_CHOICES = 20_000
_TARGET = "shop.example"
_LEASE = Duration(seconds=3600)

_LEASE_ROWS = (
    Row(
        "acquire-release",
        "Acquire and Release, of entries in L1: pairs/s",
        "two calls of no-op handlers with the same answers",
        f"h2load acquires, {IN_FLIGHT} streams; ghz releases, {IN_FLIGHT} at a time; 1 connection",
        at_least(0.80),
        needs=("h2load", "ghz"),
    ),
)
_SELECTION_ROWS = (
    Row(
        "selection",
        f"choosing a proxy to lend: cost at {LARGE:,} entries",
        f"at {BASE:,} entries",
        "the selection alone, one thread; three candidates, lent and given back",
        at_most(2),
    ),
    Row(
        "selection-banned",
        f"the same for a target that bans one half: cost at {LARGE:,} entries",
        f"at {BASE:,} entries",
        "as above",
        at_most(2),
    ),
    Row(
        "selection-memory",
        f"memory of the selection for each of {LARGE:,} entries",
        "",
        "resident, by entry; the design has 200 bytes",
        unit="bytes",
    ),
)
_WAITING_ROWS = (
    Row(
        "acquire-waiting",
        f"threads more while {WAITING} calls of Acquire wait",
        "",
        f"on {_CONNECTIONS} connections",
        at_most(0),
        unit="threads",
    ),
)


def _measure_leases(bench: Bench, wanted: frozenset[str]) -> Mapping[str, Measurement]:
    folder = bench.new_folder()
    count = bench.size(4000, 1000)
    request = pool_pb.AcquireRequest(target=_TARGET, lease_duration=_LEASE)
    acquire = write_framed(folder / "acquire.bin", request)
    with proxystash(folder / "data", f"--l1-max-entries={2 * count}") as ours:
        for first in range(0, 2 * count, 500):
            entries = [entry_message(number) for number in range(first, first + 500)]
            ours.stub.BatchPut(pb.BatchPutRequest(entries=entries))
        acquired = ours.pool.Acquire(request)
        lease_id = acquired.leases[0].lease_id
        release = pool_pb.ReleaseRequest(releases=[pool_pb.LeaseRelease(lease_id=lease_id)])
        with noop(folder / "answers", {"Acquire": acquired, "Release": ours.pool.Release(release)}) as theirs:
            fixed = write_requests(folder / "noop.json", [{"releases": [{"lease_id": lease_id}]}] * count)

            def borrow() -> Figures:
                return _pairs(ours, acquire, lambda: _releases(ours, folder / "releases.json", count), count)

            def call_twice() -> Figures:
                return _pairs(theirs, acquire, lambda: fixed, count)

            for warm_up in (borrow, call_twice):
                warm_up()
            measured = bench.interleave({"ours": borrow, "no-op": call_twice})
    one, other = measured["ours"], measured["no-op"]
    cpu = median(other["server_cpu_us"]) / median(one["server_cpu_us"])
    remark = (
        f"{beside(median(one['per_second']), median(other['per_second']), '/s')}; "
        f"by the server's CPU time {number(cpu, '×')}"
    )
    return {"acquire-release": Measurement(ratio(one["per_second"], other["per_second"]), measured, remark)}


def _pairs(server: Server, acquire: Path, releases: Callable[[], Path], count: int) -> Figures:
    """Calls of Acquire, then of Release: pairs/s, as if one followed the other."""
    first = metered(
        server,
        count,
        lambda: h2load(server.target, "PoolService/Acquire", acquire, count, streams=IN_FLIGHT),
    )
    requests = releases()
    second = metered(
        server,
        count,
        lambda: ghz(server.target, "PoolService/Release", requests, count, concurrency=IN_FLIGHT),
    )
    return {
        "per_second": 1 / (1 / first["per_second"] + 1 / second["per_second"]),
        "server_cpu_us": first["server_cpu_us"] + second["server_cpu_us"],
        "acquires_per_second": first["per_second"],
        "releases_per_second": second["per_second"],
    }


def _releases(server: Server, path: Path, count: int) -> Path:
    """The releases of all leases, of which there must be so many."""
    requests: list[dict[str, object]] = []
    token = ""
    while True:
        page = server.pool.ListLeases(pool_pb.ListLeasesRequest(page_size=1000, page_token=token))
        requests += [{"releases": [{"lease_id": lease.lease_id}]} for lease in page.leases]
        token = page.next_page_token
        if not token:
            break
    if len(requests) != count:
        raise LoadError(f"{count} calls of Acquire gave {len(requests)} leases")
    return write_requests(path, requests)


def _measure_selection(bench: Bench, wanted: frozenset[str]) -> Mapping[str, Measurement]:
    large = bench.size(LARGE, _QUICK_LARGE)
    count = bench.size(_CHOICES, _CHOICES // 10)
    remark = "" if large == LARGE else f"quick: only {large:,} entries; "
    operations = {"selection": "any", "selection-banned": "banned"}
    found: dict[str, Measurement] = {}
    with ExitStack() as stack:
        workers, filled = {}, {}
        for size in (BASE, large):
            bench.tell(f"  filling an index with {size:,} entries")
            workers[size] = stack.enter_context(open_worker("selection", bench.new_folder(), size))
            filled[size] = workers[size].fill()
        for row in wanted & operations.keys():
            actions = {
                f"{size:,}": worker.measuring(operations[row], count) for size, worker in workers.items()
            }
            measured = bench.interleave(actions)
            costs: dict[int, Series] = {size: measured[f"{size:,}"] for size in workers}
            grown, base = (median(costs[size]["cpu_us"]) for size in (large, BASE))
            growth = growth_of(costs, large, "cpu_us")
            found[row] = Measurement(growth, measured, f"{remark}{beside(grown, base, 'µs')} of CPU time")
    if "selection-memory" in wanted:
        each = filled[large] / large
        found["selection-memory"] = Measurement(
            spread([each]), {"resident_bytes": filled[large]}, f"{remark}keys included"
        )
    return found


def _measure_waiting(bench: Bench, wanted: frozenset[str]) -> Mapping[str, Measurement]:
    wait = pool_pb.AcquireRequest(wait=Duration(seconds=60))
    series: Series = {"threads before": [], "threads while they wait": []}
    with proxystash(bench.new_folder() / "data") as server, ExitStack() as stack:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [
            stack.enter_context(grpc.insecure_channel(server.target, options)) for _ in range(_CONNECTIONS)
        ]
        stubs = [pool_grpc.PoolServiceStub(channel) for channel in channels]

        def waiting() -> int:
            return server.stub.GetStats(pb.GetStatsRequest()).statistics.pool.waiting

        for _ in range(bench.rounds):
            # Whatever a connection and a burst of calls take is there before.
            for future in [stub.ListTargets.future(pool_pb.ListTargetsRequest()) for stub in stubs * 20]:
                future.result()
            series["threads before"].append(threads_of(server.pid))
            calls = [
                stub.Acquire.future(wait, timeout=70) for stub in stubs for _ in range(WAITING // len(stubs))
            ]
            wait_until(lambda: waiting() == WAITING)
            series["threads while they wait"].append(threads_of(server.pid))
            for call in calls:
                call.cancel()
            wait_until(lambda: waiting() == 0)
    more = [after - before for before, after in zip(*series.values(), strict=True)]
    remark = beside(median(series["threads while they wait"]), median(series["threads before"]), "threads")
    return {"acquire-waiting": Measurement(Spread(median(more), min(more), max(more)), series, remark)}


LEASE_THEME = Theme("leases over gRPC", _LEASE_ROWS, _measure_leases)
SELECTION_THEME = Theme("choosing whom to lend", _SELECTION_ROWS, _measure_selection)
WAITING_THEME = Theme("calls that wait for a proxy", _WAITING_ROWS, _measure_waiting)
