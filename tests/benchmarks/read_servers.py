"""A server of ours with entries in memory, and no-op servers with its answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from proxystash.v1 import cache_service_pb2 as pb
from tests.benchmarks.bench import Bench
from tests.benchmarks.loads import LoadError
from tests.benchmarks.made_up import key_of
from tests.benchmarks.messages import entry_message, write_framed
from tests.benchmarks.servers import Server, noop, proxystash

BATCH = 100


@dataclass(frozen=True)
class ReadServers:
    """All of them, and the requests that they are sent: a Get, and a BatchGet of 100.

    `with_metrics` is ours with metrics switched on. `theirs` does nothing, in grpcio's usual pool of threads;
    `in_our_pool` does nothing in ours.
    """

    ours: Server
    with_metrics: Server
    theirs: Server
    in_our_pool: Server
    get: Path
    batch: Path


@contextmanager
def read_servers(bench: Bench) -> Iterator[ReadServers]:
    """The servers, whose answers are checked before and after."""
    get = pb.GetRequest(key=key_of(0))
    batch = pb.BatchGetRequest(keys=[key_of(number) for number in range(BATCH)])
    folder = bench.new_folder()
    with (
        proxystash(folder / "data") as ours,
        proxystash(folder / "data-with-metrics", "--metrics-listen", "127.0.0.1:0") as with_metrics,
    ):
        entries = [entry_message(number) for number in range(BATCH)]
        for server in (ours, with_metrics):
            server.stub.BatchPut(pb.BatchPutRequest(entries=entries))
        answers = {"Get": ours.stub.Get(get), "BatchGet": ours.stub.BatchGet(batch)}
        with (
            noop(folder / "answers", answers) as theirs,
            noop(folder / "answers", answers, "ours") as in_our_pool,
        ):
            servers = (ours, with_metrics, theirs, in_our_pool)
            _check(servers, get, batch)
            yield ReadServers(
                *servers,
                write_framed(folder / "get.bin", get),
                write_framed(folder / "batch_get.bin", batch),
            )
            _check(servers, get, batch)


def _check(servers: tuple[Server, ...], get: pb.GetRequest, batch: pb.BatchGetRequest) -> None:
    for server in servers:
        answers = [server.stub.Get(get), *server.stub.BatchGet(batch).results]
        for answer, key in zip(answers, [get.key, *batch.keys], strict=True):
            if answer.entry.key != key or answer.served_by != pb.TIER_L1:
                raise LoadError(f"{key} was answered with {answer}")
