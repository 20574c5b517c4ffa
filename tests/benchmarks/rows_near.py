"""A near cache: what a hit costs beside Redis, and how long a copy stays after a write by another client."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import count
from statistics import median, quantiles

from proxystash import CacheEntry, Client, NearCache
from tests.benchmarks.bench import Bench, Theme
from tests.benchmarks.made_up import key_of, proxy_url
from tests.benchmarks.messages import write_puts
from tests.benchmarks.results import Measurement, Row, at_least, at_most
from tests.benchmarks.rounds import Figures, Spread, ratio, spread
from tests.benchmarks.rows_redis import filled_redis
from tests.benchmarks.rows_under_load import WRITES, wait_until, writer
from tests.benchmarks.servers import Server
from tests.benchmarks.servers import proxystash as serving
from tests.benchmarks.text import beside, number

_KEYS = 100
_HOW = f"one thread, {_KEYS} keys again and again"
_GONE_HOW = "from the acknowledgement of an update to the first look-up without it; an update every 30 ms"
# So that changes are not told together with the one before.
_BETWEEN_SECONDS = 0.03

_ROWS = (
    Row("near-hit", "near cache, a hit: the thread's CPU time", "", _HOW, at_most(2), unit="µs"),
    Row(
        "near-redis",
        "near cache, a hit: entries/s",
        "Redis: HGETALL",
        _HOW,
        at_least(50),
        needs=("redis-server",),
    ),
    Row(
        "near-gone",
        "a copy after another client's write: how long it stays, median",
        "",
        _GONE_HOW,
        unit="ms",
    ),
    Row(
        "near-gone-writing",
        "the same while one client writes flat out",
        "",
        "as above; the writer puts new keys, one at a time",
        unit="ms",
        needs=("ghz",),
    ),
)


def _measure(bench: Bench, wanted: frozenset[str]) -> Mapping[str, Measurement]:
    found: dict[str, Measurement] = {}
    folder = bench.new_folder()
    with (
        serving(folder / "data") as server,
        Client(server.target) as client,
        Client(server.target) as other,
        client.near_cache() as near,
    ):
        keys = [other.put(CacheEntry(proxy_url(place))).key for place in range(_KEYS)]
        wait_until(lambda: near.statistics().age is not None)
        if wanted & {"near-hit", "near-redis"}:
            found |= _measure_hits(bench, wanted, near, keys)
        for name in sorted(wanted & {"near-gone", "near-gone-writing"}):
            bench.tell(f"  {name}")
            found[name] = _measure_gone(bench, name, server, near, other)
    return {name: measured for name, measured in found.items() if name in wanted}


def _measure_hits(
    bench: Bench, wanted: frozenset[str], near: NearCache, keys: list[str]
) -> dict[str, Measurement]:
    hits, reads = bench.size(500_000, 100_000), bench.size(2000, 500)
    for key in keys:
        near.get(key)

    def hit() -> Figures:
        get, before = near.get, near.statistics().hits
        began, began_cpu = time.perf_counter(), time.thread_time()
        for key in itertools.islice(itertools.cycle(keys), hits):
            get(key)
        seconds, cpu = time.perf_counter() - began, time.thread_time() - began_cpu
        assert near.statistics().hits == before + hits
        return {"per_second": hits / seconds, "us": 1e6 * seconds / hits, "cpu_us": 1e6 * cpu / hits}

    with ExitStack() as stack:
        actions: dict[str, Callable[[], Figures]] = {"near": hit}
        if "near-redis" in wanted:
            redis = stack.enter_context(filled_redis(bench.new_folder()))

            def read() -> Figures:
                began = time.perf_counter()
                for place in range(reads):
                    assert redis.get(key_of(place % _KEYS))
                return {"per_second": reads / (time.perf_counter() - began)}

            actions["redis"] = read
        measured = bench.interleave(actions)
    series = measured["near"]
    remark = f"by the clock on the wall {number(median(series['us']), 'µs')}"
    found = {"near-hit": Measurement(spread(series["cpu_us"]), {"near": series}, remark)}
    if "near-redis" in wanted:
        ours, theirs = measured["near"]["per_second"], measured["redis"]["per_second"]
        found["near-redis"] = Measurement(
            ratio(ours, theirs), measured, beside(median(ours), median(theirs), "/s")
        )
    return found


def _measure_gone(bench: Bench, name: str, server: Server, near: NearCache, other: Client) -> Measurement:
    writes = bench.size(150, 60)
    key = key_of(0)
    labels = count()
    first_put = count(1)
    folder = bench.new_folder()

    def gone() -> Figures:
        stays = sorted(_time_until_gone(near, other, key, str(next(labels))) for _ in range(writes))
        return {"median_ms": 1000 * median(stays), "p99_ms": 1000 * quantiles(stays, n=100)[98]}

    def gone_beside_writer() -> Figures:
        # Other keys than those of the copies, and new ones each round.
        with writer(server, write_puts(folder / "puts.json", WRITES, first=next(first_put) * WRITES)):
            return gone()

    measured = bench.interleave({name: gone if name == "near-gone" else gone_beside_writer})
    figures = measured[name]
    p99: Spread = spread(figures["p99_ms"])
    return Measurement(spread(figures["median_ms"]), measured, f"p99 {number(p99.value, 'ms')}")


def _time_until_gone(near: NearCache, other: Client, key: str, label: str) -> float:
    entry = near.get(key)
    while near.get(key) is not entry:
        # Until it is a copy that is told again.
        entry = near.get(key)
    time.sleep(_BETWEEN_SECONDS)
    other.update(key, labels={"write": label})
    acknowledged = time.perf_counter()
    while near.get(key) is entry:
        time.sleep(0.0002)
    return time.perf_counter() - acknowledged


THEME = Theme("near caches", _ROWS, _measure)
