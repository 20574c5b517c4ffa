"""The hot paths, each as an operation and as many arguments for it as are wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from proxystash.v1 import cache_service_pb2 as pb
from proxystash_server.cache import CacheTierType, EntryFilter
from tests.instructions.handlers import calls
from tests.instructions.store import Store

# Entries in a batch, or in a page.
BATCH: Final = 100
_BOTH_UPPER: Final = frozenset({CacheTierType.L1, CacheTierType.L2})


class Work(NamedTuple):
    """What is counted: calls of `operation` with one argument after the other."""

    operation: Callable[[Any], object]
    arguments: Sequence[object]

    def run(self, start: int = 0, stop: int | None = None) -> list[object]:
        """What the calls returned; they are kept, so that freeing them is not counted."""
        operation = self.operation
        return [operation(argument) for argument in self.arguments[start:stop]]


@dataclass(frozen=True)
class Path:
    """A path through the cache. `repeats` says how many operations a count is the mean of."""

    name: str
    prepare: Callable[[Store, int], Work]
    repeats: int
    bounded: frozenset[CacheTierType] = frozenset()


PATHS: Final[dict[str, Path]] = {}
_Prepare = Callable[[Store, int], Work]


def _path(
    name: str, repeats: int, bounded: frozenset[CacheTierType] = frozenset()
) -> Callable[[_Prepare], _Prepare]:
    def add(prepare: _Prepare) -> _Prepare:
        PATHS[name] = Path(name, prepare, repeats, bounded)
        return prepare

    return add


# -- the library: reading


@_path("get in L1", 512)
def _get_in_l1(store: Store, wanted: int) -> Work:
    work = Work(store.manager.get, store.fill(wanted))
    # An entry is got many times; what only the first one costs is no part of this path.
    work.run()
    return work


@_path("get in L2", 256)
def _get_in_l2(store: Store, wanted: int) -> Work:
    keys = store.fill(wanted)
    store.manager.l1_tier.clear()
    return Work(store.manager.get, keys)


@_path("get in L3", 256)
def _get_in_l3(store: Store, wanted: int) -> Work:
    keys = store.fill(wanted)
    store.manager.l1_tier.clear()
    store.manager.l2_tier.clear()
    return Work(store.manager.get, keys)


@_path("get, a miss", 256)
def _get_miss(store: Store, wanted: int) -> Work:
    return Work(store.manager.get, [entry.key for entry in store.entries(wanted)])


@_path("lookup_many of 100 in L1", 16)
def _lookup_many(store: Store, wanted: int) -> Work:
    work = Work(store.manager.lookup_many, [store.fill(BATCH)] * wanted)
    work.run()
    return work


@_path("list_entries, a page of 100", 16)
def _list_entries(store: Store, wanted: int) -> Work:
    keys = sorted(store.resident)
    everything = EntryFilter()
    return Work(lambda after: store.manager.list_entries(after, BATCH, everything), keys[:wanted])


@_path("get_statistics", 64)
def _get_statistics(store: Store, wanted: int) -> Work:
    for key in store.resident:
        store.manager.get(key)
    return Work(lambda _: store.manager.get_statistics(), [None] * wanted)


# -- the library: changing


@_path("new_entry", 256)
def _new_entry(store: Store, wanted: int) -> Work:
    labels = {"country": "DE", "anonymity": "elite"}
    new_entry = store.manager.new_entry
    urls = [store.url() for _ in range(wanted)]
    return Work(lambda url: new_entry(url, source="example", labels=labels), urls)


@_path("put, new", 256)
def _put_new(store: Store, wanted: int) -> Work:
    return Work(lambda entry: store.manager.put(entry.key, entry), store.entries(wanted))


@_path("put, new, with credentials", 128)
def _put_with_credentials(store: Store, wanted: int) -> Work:
    entries = store.entries(wanted, username="alice")
    return Work(lambda entry: store.manager.put(entry.key, entry), entries)


@_path("put, new, into full L1 and L2", 128, _BOTH_UPPER)
def _put_into_full_tiers(store: Store, wanted: int) -> Work:
    return _put_new(store, wanted)


@_path("put, a replacement", 256)
def _put_replacement(store: Store, wanted: int) -> Work:
    entries = store.entries(wanted)
    store.manager.put_many(entries)
    return Work(lambda entry: store.manager.put(entry.key, entry), entries)


@_path("put_many of 100, new", 4)
def _put_many(store: Store, wanted: int) -> Work:
    return Work(store.manager.put_many, [store.entries(BATCH) for _ in range(wanted)])


@_path("delete", 256)
def _delete(store: Store, wanted: int) -> Work:
    return Work(store.manager.delete, store.fill(wanted))


@_path("invalidate_by_health", 256)
def _invalidate(store: Store, wanted: int) -> Work:
    return Work(store.manager.invalidate_by_health, store.fill(wanted))


# -- the server, from the bytes of the request to the bytes of the response


@_path("rpc Get in L1", 512)
def _rpc_get(store: Store, wanted: int) -> Work:
    work = _rpc_first_get(store, wanted)
    work.run()
    return work


@_path("rpc Get in L1, the first", 256)
def _rpc_first_get(store: Store, wanted: int) -> Work:
    requests = [pb.GetRequest(key=key).SerializeToString() for key in store.fill(wanted)]
    return Work(calls(store.manager)("Get"), requests)


@_path("rpc BatchGet of 100 in L1", 16)
def _rpc_batch_get(store: Store, wanted: int) -> Work:
    requests = [pb.BatchGetRequest(keys=store.fill(BATCH)).SerializeToString()] * wanted
    work = Work(calls(store.manager)("BatchGet"), requests)
    work.run()
    return work


@_path("rpc Put, new", 256)
def _rpc_put(store: Store, wanted: int) -> Work:
    requests = [pb.PutRequest(entry=_message(store)).SerializeToString() for _ in range(wanted)]
    return Work(calls(store.manager)("Put"), requests)


@_path("rpc BatchPut of 100, new", 4)
def _rpc_batch_put(store: Store, wanted: int) -> Work:
    requests = [
        pb.BatchPutRequest(entries=[_message(store) for _ in range(BATCH)]).SerializeToString()
        for _ in range(wanted)
    ]
    return Work(calls(store.manager)("BatchPut"), requests)


@_path("rpc GetStats", 64)
def _rpc_get_stats(store: Store, wanted: int) -> Work:
    requests = [pb.GetStatsRequest().SerializeToString()] * wanted
    return Work(calls(store.manager)("GetStats"), requests)


def _message(store: Store) -> pb.CacheEntry:
    return pb.CacheEntry(
        proxy_url=store.url(), source="example", labels={"country": "DE", "anonymity": "elite"}
    )
