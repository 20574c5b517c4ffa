"""Get and BatchGet from memory, over gRPC, beside a handler that does nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median

from tests.benchmarks.bench import Bench, Theme
from tests.benchmarks.read_servers import BATCH, read_servers
from tests.benchmarks.results import Measurement, Row, at_least
from tests.benchmarks.rounds import Figures, Spread
from tests.benchmarks.rpc_loads import compare_rates, repeated
from tests.benchmarks.text import beside

_HOW = "h2load, 1 connection, 16 streams"
_NOOP = "a no-op handler with the same answer"
STREAMS = (1, 2, 4, 8, 16, 32, 64)

_ROWS = (
    Row("get-l1", "Get, in L1: requests/s", _NOOP, _HOW, at_least(0.90), needs=("h2load",)),
    Row(
        "get-our-pool", "Get, in L1: requests/s", f"{_NOOP}, in our pool of threads", _HOW, needs=("h2load",)
    ),
    Row(
        "get-metrics",
        "Get, in L1, with metrics for Prometheus: requests/s",
        "without them",
        _HOW,
        at_least(0.97),
        needs=("h2load",),
    ),
    Row(
        "batch-get-l1",
        f"BatchGet of {BATCH}, in L1: requests/s",
        _NOOP,
        _HOW,
        at_least(0.50),
        needs=("h2load",),
    ),
    Row(
        "batch-get-keys", f"BatchGet of {BATCH}, in L1: keys/s", "Get", _HOW, at_least(30), needs=("h2load",)
    ),
)
# What each row divides by what, and what each unit of the first is worth.
_RATIOS = {
    "get-l1": ("get", "no-op get", 1),
    "get-our-pool": ("get", "no-op get in our pool", 1),
    "get-metrics": ("get with metrics", "get", 1),
    "batch-get-l1": ("batch get", "no-op batch get", 1),
    "batch-get-keys": ("batch get", "get", BATCH),
}

_CLIENT_ROWS = (
    Row(
        "clients",
        f"Get, in L1, best of {STREAMS[0]} to {STREAMS[-1]} at a time: requests/s",
        f"{_NOOP}, at its best",
        "h2load, 1 connection",
        needs=("h2load",),
    ),
)


def _measure(bench: Bench, wanted: frozenset[str]) -> Mapping[str, Measurement]:
    gets, batches = bench.size(5000, 2000), bench.size(2000, 800)
    with read_servers(bench) as both:
        actions: dict[str, Callable[[], Figures]] = {
            "get": repeated(both.ours, "Get", both.get, gets, l1_hits=1),
            "get with metrics": repeated(both.with_metrics, "Get", both.get, gets, l1_hits=1),
            "no-op get": repeated(both.theirs, "Get", both.get, gets),
            "no-op get in our pool": repeated(both.in_our_pool, "Get", both.get, gets),
            "batch get": repeated(both.ours, "BatchGet", both.batch, batches, l1_hits=BATCH),
            "no-op batch get": repeated(both.theirs, "BatchGet", both.batch, batches),
        }
        used = {name for row in wanted for name in _RATIOS[row][:2]}
        actions = {name: action for name, action in actions.items() if name in used}
        for warm_up in actions.values():
            warm_up()
        measured = bench.interleave(actions, bench.size(11, 5))
    return {row: compare_rates(measured, *_RATIOS[row]) for row in wanted}


def _measure_clients(bench: Bench, wanted: frozenset[str]) -> Mapping[str, Measurement]:
    requests = bench.size(2000, 600)
    with read_servers(bench) as both:
        repeated(both.ours, "Get", both.get, requests, l1_hits=1)()
        measured = bench.interleave(
            {
                f"{name} {streams}": repeated(
                    server, "Get", both.get, requests, l1_hits=hits, streams=streams
                )
                for streams in STREAMS
                for name, server, hits in (("get", both.ours, 1), ("no-op get", both.theirs, 0))
            }
        )
    best = {
        name: max(median(measured[f"{name} {streams}"]["per_second"]) for streams in STREAMS)
        for name in ("get", "no-op get")
    }
    # The rounds' ratios at 16 at a time, where both are near their best.
    near = compare_rates(measured, "get 16", "no-op get 16").spread
    share = best["get"] / best["no-op get"]
    remark = beside(best["get"], best["no-op get"], "/s")
    return {
        "clients": Measurement(Spread(share, min(share, near.low), max(share, near.high)), measured, remark)
    }


THEME = Theme("reads over gRPC", _ROWS, _measure)
CLIENTS_THEME = Theme("reads over gRPC by the number of clients", _CLIENT_ROWS, _measure_clients)
