"""The pools whose proxies can be imported, and what their records are in the words of lists."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Final

from proxystash.importing.redis_data import URL_SCHEMES, Element, Kind, read_dump, read_server
from proxystash.importing.rotating_proxies import read_rotating_proxies
from proxystash.importing.scylla import monitoring, read_scylla
from proxystash.lists.outcomes import (
    Default,
    FoundRecords,
    ProxyFileError,
    Record,
    Rejected,
    UnusableRecordError,
)
from proxystash.lists.reader import ListFile, ListReader, outcomes_of
from proxystash.lists.records import Reading
from proxystash.proxies import Identity


class Pool(StrEnum):
    """A pool whose proxies can be imported."""

    PROXY_POOL = "proxy_pool"
    PROXYPOOL = "proxypool"
    ROTATING_PROXIES = "scrapy-rotating-proxies"
    SCYLLA = "scylla"


@dataclass(frozen=True)
class _RedisPool:
    """A pool that keeps its proxies under one key of Redis."""

    key: str
    kind: Kind
    record: Callable[[object, object], Record]


def read_pool(
    pool: Pool,
    place: ListFile,
    name: str,
    *,
    key: str | None = None,
    scheme: str | None = None,
    identity: Identity = Identity.USER,
    timeout: float = 5.0,
) -> ListReader:
    """Read what a pool has stored, record by record, as `read_proxy_file` reads a list.

    `place` is a file, or for a pool in Redis also a URL of it; `key` is where in Redis. A record that says no
    scheme gets `scheme`, else http. Raises ProxyFileError when it cannot be read as a whole, at the latest
    when iterating.
    """
    # They are all for HTTP, unless somebody knows better.
    usual = Default(scheme or "http")
    reading = Reading(datetime.now(UTC), usual.scheme, None, identity)
    redis_pool = _REDIS_POOLS.get(pool)
    if redis_pool is not None:
        wanted = redis_pool if key is None else replace(redis_pool, key=key)
        found = _read_redis(wanted, place, name, timeout)
    elif key is not None:
        raise ProxyFileError(f"{pool} keeps nothing in Redis, so it has no key")
    elif pool is Pool.SCYLLA:
        if not isinstance(place, str | Path):
            raise ProxyFileError("SQLite reads files, not standard input")
        found = read_scylla(Path(place))
    else:
        found = read_rotating_proxies(place, name, None)
    return ListReader(outcomes_of(found, reading, usual), reading)


def _read_redis(pool: _RedisPool, place: ListFile, name: str, timeout: float) -> FoundRecords:
    elements: Iterable[Element]
    if isinstance(place, str) and place.startswith(URL_SCHEMES):
        elements = read_server(place, pool.key, pool.kind, timeout)
    else:
        elements = read_dump(place, name, pool.key, pool.kind)
    for number, (element, value) in enumerate(elements, 1):
        where = f"record {number}"
        try:
            yield where, pool.record(element, value), None
        except UnusableRecordError as error:
            yield where, Rejected.of(where, error), None


def _of_proxy_pool(field: object, value: object) -> Record:
    """A field of the hash of jhao104/proxy_pool: host:port, and JSON about it; in old versions a number."""
    about = _decoded(value)
    status = about.get("last_status")
    # Old versions say 1 or 0; nobody has tried it where it is a text.
    tried = isinstance(status, bool | int)
    return {
        "proxy": about.get("proxy") or field,
        "source": about.get("source") or Pool.PROXY_POOL.value,
        "failure_count": about.get("fail_count"),
        "health_status": ("healthy" if status else "unhealthy") if tried else None,
        "health_monitoring": monitoring(about.get("last_time"), about.get("check_count")),
        "labels": _labels(about, ("https", "anonymous", "region", "type")),
    }


def _decoded(value: object) -> Mapping[str, object]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UnusableRecordError("what is stored of it is not JSON", kind="failed") from None
    if isinstance(value, dict):
        return value
    if isinstance(value, int | float):
        return {}
    raise UnusableRecordError("what is stored of it is no JSON object", kind="failed")


# What Python3WebSpider/ProxyPool gives a proxy that has just worked. A new one begins with 10.
_BEST_SCORE: Final = 100


def _of_proxypool(member: object, score: object) -> Record:
    """A member of the sorted set of Python3WebSpider/ProxyPool, perhaps with credentials, and its score."""
    try:
        number = float(score) if isinstance(score, str | int | float) else None
    except ValueError:
        number = None
    if number is None:
        raise UnusableRecordError("it has no score", kind="failed")
    return {
        "proxy": member,
        "source": Pool.PROXYPOOL.value,
        "health_status": "healthy" if number >= _BEST_SCORE else None,
        "labels": {"score": f"{number:g}"},
    }


def _labels(about: Mapping[str, object], names: Iterable[str]) -> dict[str, str]:
    def texts() -> Iterator[tuple[str, str]]:
        for name in names:
            value = about.get(name)
            if isinstance(value, bool):
                yield name, str(value).lower()
            elif isinstance(value, str | int | float) and value != "":
                yield name, str(value)

    return dict(texts())


_REDIS_POOLS: Final[Mapping[Pool, _RedisPool]] = {
    Pool.PROXY_POOL: _RedisPool("use_proxy", "hash", _of_proxy_pool),
    Pool.PROXYPOOL: _RedisPool("proxies:universal", "zset", _of_proxypool),
}
