"""Our server beside Redis, both through a Python client: what a fleet would otherwise use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import proxystash
from tests.benchmarks.bench import Bench, Theme
from tests.benchmarks.made_up import SOURCE, TTL_SECONDS, key_of, labels_of, proxy_url
from tests.benchmarks.results import Measurement, Row
from tests.benchmarks.rounds import Figures, Series, ratio
from tests.benchmarks.servers import proxystash as serving
from tests.benchmarks.text import beside

READ_BATCH = 100
WRITE_BATCH = 500
_ENTRIES = 5000
_HOW = "one client, loopback; appendfsync everysec"
_NEEDS = ("redis-server",)

_ROWS = (
    Row("redis-get", "Python client, get: entries/s", "Redis: HGETALL", _HOW, needs=_NEEDS),
    Row(
        "redis-put", "Python client, put: entries/s", "Redis: HSET and EXPIRE, pipelined", _HOW, needs=_NEEDS
    ),
    Row(
        "redis-get-many",
        f"Python client, get_many of {READ_BATCH}: entries/s",
        f"Redis: a pipeline of {READ_BATCH} HGETALL",
        _HOW,
        needs=_NEEDS,
    ),
    Row(
        "redis-put-many",
        f"Python client, put_many of {WRITE_BATCH}: entries/s",
        f"Redis: a pipeline of {WRITE_BATCH} HSET and EXPIRE",
        _HOW,
        needs=_NEEDS,
    ),
)


class _Proxystash:
    """What a worker does with our client."""

    def __init__(self, client: proxystash.Client) -> None:
        self._client = client
        self._entries = [
            proxystash.CacheEntry(
                proxy_url(number),
                source=SOURCE,
                labels=labels_of(number),
                ttl=timedelta(seconds=TTL_SECONDS),
            )
            for number in range(_ENTRIES)
        ]

    def get(self, key: str) -> object:
        return self._client.get(key)

    def get_many(self, keys: list[str]) -> list[Any]:
        return list(self._client.get_many(keys))

    def put(self, number: int) -> None:
        self._client.put(self._entries[number])

    def put_many(self, first: int, count: int) -> None:
        self._client.put_many(self._entries[first : first + count])


class _Redis:
    """The same with Redis: a hash for each proxy, with an expiry."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._records = [
            {
                "proxy_url": proxy_url(number),
                "source": SOURCE,
                "fetch_time": time.time(),
                "expires_at": time.time() + TTL_SECONDS,
                "last_accessed": time.time(),
                "access_count": 0,
                "health_status": "unknown",
                "failure_count": 0,
                **{f"label:{name}": value for name, value in labels_of(number).items()},
            }
            for number in range(_ENTRIES)
        ]

    def get(self, key: str) -> object:
        return self._client.hgetall(f"proxy:{key}")

    def get_many(self, keys: list[str]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for key in keys:
            pipeline.hgetall(f"proxy:{key}")
        answers: list[Any] = pipeline.execute()
        return answers

    def put(self, number: int) -> None:
        self.put_many(number, 1)

    def put_many(self, first: int, count: int) -> None:
        pipeline = self._client.pipeline(transaction=False)
        for number in range(first, first + count):
            name = f"proxy:{key_of(number)}"
            pipeline.hset(name, mapping=self._records[number])
            pipeline.expire(name, TTL_SECONDS)
        pipeline.execute()


@contextmanager
def filled_redis(folder: Path) -> Iterator[_Redis]:
    """A Redis that holds the entries."""
    from tests.benchmarks.redis_server import redis_client

    with redis_client(folder) as client:
        redis = _Redis(client)
        redis.put_many(0, _ENTRIES)
        yield redis


def _measure(bench: Bench, wanted: frozenset[str]) -> Mapping[str, Measurement]:
    found: dict[str, Measurement] = {}
    serial, batches = bench.size(1000, 300), bench.size(30, 10)
    with (
        serving(bench.new_folder()) as server,
        proxystash.Client(server.target) as client,
        filled_redis(bench.new_folder()) as redis,
    ):
        ours = _Proxystash(client)
        ours.put_many(0, _ENTRIES)
        sides: dict[str, _Proxystash | _Redis] = {"proxystash": ours, "redis": redis}
        for row in _ROWS:
            if row.name in wanted:
                bench.tell(f"  {row.what}")
                measured = bench.interleave(
                    {name: _action(row.name, side, serial, batches) for name, side in sides.items()}
                )
                found[row.name] = _measurement(measured)
    return found


def _action(row: str, side: _Proxystash | _Redis, serial: int, batches: int) -> Callable[[], Figures]:
    # The last that were put, so that ours have them in memory, where Redis has all of them.
    keys = [key_of(number) for number in range(_ENTRIES - READ_BATCH, _ENTRIES)]

    def get() -> int:
        for place in range(serial):
            assert side.get(keys[place % READ_BATCH])
        return serial

    def get_many() -> int:
        for _ in range(batches):
            assert all(side.get_many(keys))
        return batches * READ_BATCH

    def put() -> int:
        for number in range(serial):
            side.put(number)
        return serial

    def put_many() -> int:
        rounds = batches // 2
        for place in range(rounds):
            side.put_many(place * WRITE_BATCH % _ENTRIES, WRITE_BATCH)
        return rounds * WRITE_BATCH

    work = {"redis-get": get, "redis-get-many": get_many, "redis-put": put, "redis-put-many": put_many}[row]

    def run() -> Figures:
        side.get_many(keys)
        began = time.perf_counter()
        count = work()
        return {"per_second": count / (time.perf_counter() - began)}

    return run


def _measurement(measured: dict[str, Series]) -> Measurement:
    ours, theirs = measured["proxystash"]["per_second"], measured["redis"]["per_second"]
    found = ratio(ours, theirs)
    winner = "proxystash" if found.value >= 1 else "Redis"
    lead = max(found.value, 1 / found.value)
    remark = f"{winner} wins, {lead:.1f}×: {beside(median(ours), median(theirs), '/s')}"
    return Measurement(found, measured, remark)


THEME = Theme("beside Redis", _ROWS, _measure)
