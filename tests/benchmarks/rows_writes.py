"""Put and BatchPut over gRPC, durable, beside a handler that does nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from proxystash.v1 import cache_service_pb2 as pb
from tests.benchmarks.bench import Bench, Theme
from tests.benchmarks.messages import entry_message, write_batch_puts, write_puts
from tests.benchmarks.results import Measurement, Row, at_least
from tests.benchmarks.rounds import Figures, spread
from tests.benchmarks.rpc_loads import compare_rates, distinct
from tests.benchmarks.servers import noop, proxystash

BATCH = 500
_BATCHES_IN_FLIGHT = 4
_RECORD_BYTES = 300
_DISK_OFF = ("--l2-enabled", "false", "--l3-enabled", "false")

_ROWS = (
    Row(
        "put",
        "Put, durable, 16 in flight: requests/s",
        "a no-op handler with the same answer",
        "ghz, 1 connection, distinct keys into an empty store",
        at_least(0.60),
        needs=("ghz",),
    ),
    Row(
        "batch-put",
        "BatchPut of 500, durable, no credentials: entries/s",
        "Put, 16 in flight: entries/s",
        f"ghz, 1 connection, {_BATCHES_IN_FLIGHT} in flight, distinct keys into an empty store",
        at_least(10),
        needs=("ghz",),
    ),
    Row(
        "put-full",
        "Put, durability = full, 16 in flight: requests/s",
        "a no-op handler with the same answer",
        "as Put",
        needs=("ghz",),
    ),
    Row(
        "put-memory",
        "Put, both disk tiers off, 16 in flight: requests/s",
        "a no-op handler with the same answer",
        "as Put",
        needs=("ghz",),
    ),
    Row(
        "fsync",
        f"an fsync'ed append of {_RECORD_BYTES} bytes, for comparison",
        "",
        "one thread, one file, beside the store",
        unit="µs",
    ),
)
_RATIOS = {
    "put": ("put", "no-op put", 1),
    "batch-put": ("batch put", "put", BATCH),
    "put-full": ("put full", "no-op put", 1),
    "put-memory": ("put memory", "no-op put", 1),
}


def _measure(bench: Bench, wanted: frozenset[str]) -> Mapping[str, Measurement]:
    puts, batches, full_puts = bench.size(5000, 1500), bench.size(40, 16), bench.size(2000, 500)
    folder = bench.new_folder()
    put_file = write_puts(folder / "puts.json", puts)
    batch_file = write_batch_puts(folder / "batch_puts.json", batches, BATCH)
    with (
        proxystash(folder / "writes") as ours,
        proxystash(folder / "writes-full", "--durability", "full") as full,
        proxystash(folder / "writes-memory", *_DISK_OFF) as memory,
    ):
        answers = {"Put": ours.stub.Put(pb.PutRequest(entry=entry_message(0)))}
        with noop(folder / "put-answers", answers) as theirs:
            actions: dict[str, Callable[[], Figures]] = {
                "put": distinct(ours, "Put", put_file, puts, entries=puts),
                "no-op put": distinct(theirs, "Put", put_file, puts),
                "batch put": distinct(
                    ours,
                    "BatchPut",
                    batch_file,
                    batches,
                    entries=batches * BATCH,
                    concurrency=_BATCHES_IN_FLIGHT,
                ),
                "put full": distinct(full, "Put", put_file, full_puts, entries=full_puts),
                "put memory": distinct(memory, "Put", put_file, puts),
                "fsync": lambda: {"us": _fsync_us(folder / "appended")},
            }
            used = {name for row in wanted for name in _RATIOS.get(row, (row,))[:2]}
            bench.tell(f"  {', '.join(used)}")
            measured = bench.interleave({name: action for name, action in actions.items() if name in used})
    found = {row: compare_rates(measured, *_RATIOS[row]) for row in wanted & _RATIOS.keys()}
    if "fsync" in wanted:
        us = spread(measured["fsync"]["us"])
        found["fsync"] = Measurement(
            us, {"fsync": measured["fsync"]}, f"{1e6 / us.value:,.0f} a second at most"
        )
    return found


def _fsync_us(path: Path, appends: int = 200) -> float:
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        started = time.perf_counter()
        for _ in range(appends):
            os.write(file, b"x" * _RECORD_BYTES)
            os.fdatasync(file)
        return (time.perf_counter() - started) / appends * 1e6
    finally:
        os.close(file)


THEME = Theme("writes over gRPC", _ROWS, _measure)
