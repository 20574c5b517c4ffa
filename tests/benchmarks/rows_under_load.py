"""What others do to a client: one that writes flat out, 500 watching statistics, 100 watching changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from google.protobuf.duration_pb2 import Duration

from proxystash.v1 import cache_service_pb2 as pb
from tests.benchmarks.bench import Bench, Theme
from tests.benchmarks.loads import LoadError, ghz_command, h2load_command
from tests.benchmarks.made_up import key_of
from tests.benchmarks.messages import entry_message, write_framed, write_puts, write_requests
from tests.benchmarks.processes import CpuMeter, running
from tests.benchmarks.results import Measurement, Row, at_least, at_most
from tests.benchmarks.rounds import Figures, Spread, ratio
from tests.benchmarks.rpc_loads import distinct, repeated
from tests.benchmarks.servers import Server, proxystash
from tests.benchmarks.text import beside, number

SUBSCRIBERS = 500
WATCHERS = 100
_CONNECTIONS = 5
_READERS = 8
_HOT = 100
# More than a client can write in one round.
WRITES = 30_000
_SETTLE_SECONDS = 30

_TAIL_ROWS = (
    Row(
        "get-p99-while-writing",
        "Get p99 while one client writes flat out",
        "Get p99 alone",
        f"ghz, {_READERS} readers of {_HOT} keys in L1; a writer of new keys, one at a time",
        at_most(3),
        needs=("ghz",),
    ),
)
_STREAM_ROWS = (
    Row(
        "stats-streams",
        f"Get, in L1: requests/s lost to {SUBSCRIBERS} StreamStats subscribers at 1 s",
        "without them",
        f"h2load for both; the streams on {_CONNECTIONS} connections",
        at_most(15),
        unit="%",
        needs=("h2load",),
    ),
)
_WATCH_ROWS = (
    Row(
        "put-watched",
        f"Put, durable, 16 in flight, with {WATCHERS} watchers of every change: requests/s",
        "without them",
        f"ghz, 1 connection, the same keys again and again; h2load watches on {_CONNECTIONS} connections",
        at_least(0.90),
        needs=("ghz", "h2load"),
    ),
)


def _measure_tail(bench: Bench, wanted: frozenset[str]) -> Mapping[str, Measurement]:
    folder = bench.new_folder()
    gets = bench.size(6000, 2500)
    requests = write_requests(folder / "gets.json", [{"key": key_of(number)} for number in range(_HOT)])
    with proxystash(folder / "data") as server:
        entries = [entry_message(number) for number in range(_HOT)]
        server.stub.BatchPut(pb.BatchPutRequest(entries=entries))
        read = distinct(server, "Get", requests, gets, concurrency=_READERS)
        rounds = 0

        def read_beside_writer() -> Figures:
            nonlocal rounds
            rounds += 1
            puts = write_puts(folder / "puts.json", WRITES, first=rounds * WRITES)
            with writer(server, puts):
                before, began = server.entries(), time.perf_counter()
                figures = read()
                written = (server.entries() - before) / (time.perf_counter() - began)
            return {**figures, "written_per_second": written}

        read()
        measured = bench.interleave({"alone": read, "beside a writer": read_beside_writer})
    alone, busy = measured["alone"], measured["beside a writer"]
    remark = (
        f"{beside(median(busy['p99_ms']), median(alone['p99_ms']), 'ms')}, "
        f"with {median(busy['written_per_second']):,.0f} puts/s"
    )
    return {"get-p99-while-writing": Measurement(ratio(busy["p99_ms"], alone["p99_ms"]), measured, remark)}


@contextmanager
def writer(server: Server, puts: Path) -> Iterator[None]:
    """A client that puts the WRITES entries of a file, one at a time, as long as the block takes."""
    before = server.entries()
    with running(ghz_command(server.target, "Put", puts, "-n", str(WRITES), "-c", "1")) as process:
        wait_until(lambda: server.entries() > before)
        yield
        if process.poll() is not None:
            raise LoadError("the writer had written everything before the reader was done")


def _measure_streams(bench: Bench, wanted: frozenset[str]) -> Mapping[str, Measurement]:
    folder = bench.new_folder()
    get = write_framed(folder / "get.bin", pb.GetRequest(key=key_of(0)))
    stream = write_framed(folder / "stream.bin", pb.StreamStatsRequest(interval=Duration(seconds=1)))
    with proxystash(folder / "data") as server:
        server.stub.Put(pb.PutRequest(entry=entry_message(0)))
        # As long as several snapshots, whatever this machine makes of it.
        rate = repeated(server, "Get", get, 2000, l1_hits=1)()["per_second"]
        read = repeated(server, "Get", get, int(rate * bench.size(4, 2)), l1_hits=1)

        def read_beside_subscribers() -> Figures:
            with _streams(server, "StreamStats", stream, SUBSCRIBERS) as meter:
                figures = read()
                share = meter.share()
            return {**figures, "subscribers_cpu_share": share}

        measured = bench.interleave({"without": read, "with subscribers": read_beside_subscribers})
    without, watched = measured["without"], measured["with subscribers"]
    kept = ratio(watched["per_second"], without["per_second"], 100)
    cpu = 100 - 100 * median(without["server_cpu_us"]) / median(watched["server_cpu_us"])
    remark = (
        f"{beside(median(watched['per_second']), median(without['per_second']), '/s')}; "
        f"by the server's CPU time {number(cpu, '%')}; "
        f"the subscribers took {100 * median(watched['subscribers_cpu_share']):.1f}% of a core"
    )
    loss = Spread(100 - kept.value, 100 - kept.high, 100 - kept.low)
    return {"stats-streams": Measurement(loss, measured, remark)}


def _measure_watched(bench: Bench, wanted: frozenset[str]) -> Mapping[str, Measurement]:
    folder = bench.new_folder()
    puts = bench.size(8000, 2500)
    put_file = write_puts(folder / "puts.json", puts)
    request = pb.WatchRequest(include_entries=True, include_credentials=True)
    watch = write_framed(folder / "watch.bin", request)
    with proxystash(folder / "data") as server:
        write = distinct(server, "Put", put_file, puts)

        def write_watched() -> Figures:
            with _streams(server, "Watch", watch, WATCHERS) as meter:
                figures = write()
                share = meter.share()
            return {**figures, "watchers_cpu_share": share}

        write()
        measured = bench.interleave({"alone": write, "watched": write_watched})
    alone, watched = measured["alone"], measured["watched"]
    cpu = median(watched["server_cpu_us"]) / median(alone["server_cpu_us"])
    remark = (
        f"{beside(median(watched['per_second']), median(alone['per_second']), '/s')}; "
        f"by the server's CPU time {cpu:.2f} times as much; "
        f"the watchers took {100 * median(watched['watchers_cpu_share']):.1f}% of a core"
    )
    kept = ratio(watched["per_second"], alone["per_second"])
    return {"put-watched": Measurement(kept, measured, remark)}


@contextmanager
def _streams(server: Server, method: str, request: Path, count: int) -> Iterator[CpuMeter]:
    """Streams that are all open, and stay so until the end of the block."""
    options = ["-c", str(_CONNECTIONS), "-m", str(count // _CONNECTIONS), "-n", str(count)]
    with running(h2load_command(server.target, method, request, *options)) as process:
        wait_until(lambda: _open_streams(server) == count)
        yield CpuMeter(process.pid)
        if _open_streams(server) != count:
            raise LoadError(f"{_open_streams(server)} streams were left")
    wait_until(lambda: _open_streams(server) == 0)


def _open_streams(server: Server) -> int:
    statistics = server.stub.GetStats(pb.GetStatsRequest()).statistics
    return statistics.stats_subscribers + statistics.watch_subscribers


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for it; raises LoadError after half a minute."""
    give_up = time.monotonic() + _SETTLE_SECONDS
    while not condition():
        if time.monotonic() > give_up:
            raise LoadError("the load did not begin or end in time")
        time.sleep(0.02)


TAIL_THEME = Theme("reads beside a writer", _TAIL_ROWS, _measure_tail)
WATCH_THEME = Theme("writes beside watchers", _WATCH_ROWS, _measure_watched)
STREAMS_THEME = Theme("reads beside subscribers", _STREAM_ROWS, _measure_streams)
