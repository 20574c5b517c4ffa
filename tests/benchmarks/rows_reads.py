"""Get and BatchGet from memory, over gRPC, beside a handler that does nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from proxystash.v1 import cache_service_pb2 as pb
from tests.benchmarks.bench import Bench, Theme
from tests.benchmarks.loads import LoadError
from tests.benchmarks.messages import entry_message, key_of, write_framed
from tests.benchmarks.results import Measurement, Row, at_least
from tests.benchmarks.rounds import Figures, Series, ratio
from tests.benchmarks.rpc_loads import repeated
from tests.benchmarks.servers import Server, noop, proxystash

BATCH = 100
_HOW = "h2load, 1 connection, 16 streams"

_ROWS = (
    Row(
        "get-l1",
        "Get, in L1: requests/s",
        "a no-op handler that returns the same answer",
        _HOW,
        at_least(0.90),
        needs=("h2load",),
    ),
    Row(
        "batch-get-l1",
        "BatchGet of 100, in L1: requests/s",
        "a no-op handler that returns the same answer",
        _HOW,
        at_least(0.50),
        needs=("h2load",),
    ),
    Row(
        "batch-get-keys",
        "BatchGet of 100, in L1: keys/s",
        "Get: keys/s",
        _HOW,
        at_least(30),
        needs=("h2load",),
    ),
)
# What each row divides by what, and what each unit of the load is worth.
_RATIOS = {
    "get-l1": ("get", "no-op get", 1),
    "batch-get-l1": ("batch get", "no-op batch get", 1),
    "batch-get-keys": ("batch get", "get", BATCH),
}


def _measure(bench: Bench, wanted: frozenset[str]) -> Mapping[str, Measurement]:
    get = pb.GetRequest(key=key_of(0))
    batch = pb.BatchGetRequest(keys=[key_of(number) for number in range(BATCH)])
    get_file = write_framed(bench.folder / "get.bin", get)
    batch_file = write_framed(bench.folder / "batch_get.bin", batch)
    gets, batches = bench.size(6000, 2000), bench.size(2500, 800)
    with proxystash(bench.folder / "reads") as ours:
        entries = [entry_message(number) for number in range(BATCH)]
        ours.stub.BatchPut(pb.BatchPutRequest(entries=entries))
        answers = {"Get": ours.stub.Get(get), "BatchGet": ours.stub.BatchGet(batch)}
        with noop(bench.folder / "answers", answers) as theirs:
            actions: dict[str, Callable[[], Figures]] = {
                "get": repeated(ours, "Get", get_file, gets, l1_hits=1),
                "no-op get": repeated(theirs, "Get", get_file, gets),
                "batch get": repeated(ours, "BatchGet", batch_file, batches, l1_hits=BATCH),
                "no-op batch get": repeated(theirs, "BatchGet", batch_file, batches),
            }
            used = {name for row in wanted for name in _RATIOS[row][:2]}
            actions = {name: action for name, action in actions.items() if name in used}
            for action in actions.values():
                action()
            measured = bench.interleave(actions)
            for server in (ours, theirs):
                _check_answers(server, get, batch)
    return {row: _measurement(measured, *_RATIOS[row]) for row in wanted}


def _check_answers(server: Server, get: pb.GetRequest, batch: pb.BatchGetRequest) -> None:
    answers = [server.stub.Get(get), *server.stub.BatchGet(batch).results]
    for answer, key in zip(answers, [get.key, *batch.keys], strict=True):
        if answer.entry.key != key or answer.served_by != pb.TIER_L1:
            raise LoadError(f"{key} was answered with {answer}")


def _measurement(measured: dict[str, Series], ours: str, theirs: str, factor: float) -> Measurement:
    return Measurement(
        ratio(measured[ours]["per_second"], measured[theirs]["per_second"], factor),
        {ours: measured[ours], theirs: measured[theirs]},
    )


THEME = Theme("reads over gRPC", _ROWS, _measure)
