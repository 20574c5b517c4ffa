"""What hostile clients do: `python -m tests.hostile.attacks NAME TARGET SECONDS` is one, in its own process.

It prints how much it has done in the end. Another attack is one more function with the decorator.
"""

from __future__ import annotations

import itertools
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

import grpc
from grpc_reflection.v1alpha import reflection_pb2

from proxystash.v1 import cache_service_pb2 as pb
from tests.support.http2 import RawConnection, message_bytes
from tests.support.rpc import open_channel

CACHE: Final = "/proxystash.v1.CacheService"
_HEALTH: Final = "/grpc.health.v1.Health"
_REFLECTION: Final = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
# Calls of one connection; beyond a thousand the server refuses the stream.
_STREAMS: Final = 900
_LARGE: Final = 90


@dataclass(frozen=True)
class Attack:
    """One kind of attack: what it is, what it counts, and what to call round by round.

    `rounds` yields how much each round has done, and leaves behind what it holds open until it is closed.
    """

    name: str
    tried: str
    counts: str
    rounds: Callable[[str], Iterator[int]]
    # Whether nobody reads the server's log meanwhile.
    holds_log: bool = False


ATTACKS: Final[dict[str, Attack]] = {}


def _attack(
    name: str, tried: str, counts: str, *, holds_log: bool = False
) -> Callable[[Callable[[str], Iterator[int]]], Callable[[str], Iterator[int]]]:
    def add(rounds: Callable[[str], Iterator[int]]) -> Callable[[str], Iterator[int]]:
        ATTACKS[name] = Attack(name, tried, counts, rounds, holds_log)
        return rounds

    return add


@_attack("stalled calls", "calls that send headers and no message, for ever and anew", "calls")
def _stalled_calls(target: str) -> Iterator[int]:
    methods = [f"{CACHE}/{method}" for method in ("Get", "Put", "BatchPut", "StreamStats")]
    while True:
        with RawConnection(target) as stays, RawConnection(target) as comes_again:
            for method in [*methods, f"{_HEALTH}/Check"]:
                stays.calls(method, _STREAMS // 5)
            yield _STREAMS
            for _ in range(20):
                streams = comes_again.calls(methods[0], 100)
                yield len(streams)
                time.sleep(0.05)
                comes_again.reset(*streams)


@_attack("half requests", "requests of which the last byte never comes", "calls")
def _half_requests(target: str) -> Iterator[int]:
    part = message_bytes(bytes(1000))[:-1]
    while True:
        with RawConnection(target) as connection:
            yield len(connection.calls(f"{CACHE}/Put", 60, part))
            time.sleep(0.5)


@_attack("silent connections", "connections that never say anything", "connections")
def _silent_connections(target: str) -> Iterator[int]:
    host, _, port = target.rpartition(":")
    with ExitStack() as stack:
        while True:
            for _ in range(4):
                for _ in range(100):
                    stack.enter_context(socket.create_connection((host, int(port)), 10))
                yield 100
            time.sleep(1)
            stack.close()


@_attack("unread answers", "answers of 3 MiB that are asked for and not read", "answers")
def _unread_answers(target: str) -> Iterator[int]:
    labels = {f"{number:03}" + "𐀀" * 61: "𐀀" * 256 for number in range(32)}
    keys = [f"hostile-{number}" for number in range(_LARGE)]
    with open_channel(target) as channel:
        put: Any = channel.unary_unary(f"{CACHE}/Put")
        for key in keys:
            entry = pb.CacheEntry(
                key=key, proxy_url="http://192.0.2.1:80", labels=labels, password="𐀀" * 1024
            )
            put(pb.PutRequest(entry=entry).SerializeToString(), timeout=10)
    request = message_bytes(pb.BatchGetRequest(keys=keys).SerializeToString())
    while True:
        with ExitStack() as stack:
            for _ in range(10):
                connection = stack.enter_context(RawConnection(target, window=0))
                yield len(connection.calls(f"{CACHE}/BatchGet", 10, request, end=True))
                time.sleep(0.2)


@_attack("unread streams", "StreamStats and Watch that nobody reads, 2,000 of them", "streams")
def _unread_streams(target: str) -> Iterator[int]:
    interval = pb.StreamStatsRequest()
    interval.interval.FromMilliseconds(100)
    request = message_bytes(interval.SerializeToString())
    while True:
        with ExitStack() as stack:
            for method, body in ((f"{CACHE}/StreamStats", request), (f"{_HEALTH}/Watch", message_bytes(b""))):
                for _ in range(2):
                    connection = stack.enter_context(RawConnection(target, window=0))
                    yield len(connection.calls(method, 500, body, end=True))
            time.sleep(1)


@_attack("rapid resets", "calls that are cancelled as soon as they are sent", "calls")
def _rapid_resets(target: str) -> Iterator[int]:
    request = message_bytes(pb.GetRequest(key="k").SerializeToString())
    while True:
        with RawConnection(target) as connection:
            try:
                for _ in range(50):
                    streams = connection.calls(f"{CACHE}/Get", 100, request, end=True)
                    connection.reset(*streams)
                    yield len(streams)
            except OSError:
                # The server has had enough of this connection.
                yield 0


@_attack("refused giants", "requests of 4 MiB that no method takes, of ten kinds", "requests")
def _refused_giants(target: str) -> Iterator[int]:
    size = 4 * 1024 * 1024 - 4096
    labels = {f"{number:064}": "" for number in range(size // 72)}
    url = "http://192.0.2.1:80"
    giants = [
        ("List", pb.ListRequest(filter=pb.ListFilter(health_statuses=[2] * size))),  # type: ignore[list-item]  # a number will do
        ("List", pb.ListRequest(filter=pb.ListFilter(labels=labels))),
        ("List", pb.ListRequest(page_token="A" * size)),
        ("Get", pb.GetRequest(key="\xa0" * (size // 2))),
        ("BatchGet", pb.BatchGetRequest(keys=[""] * (size // 2))),
        ("Put", pb.PutRequest(entry=pb.CacheEntry(proxy_url=url, labels=labels))),
        ("Put", pb.PutRequest(entry=pb.CacheEntry(proxy_url="http://" + "@" * size))),
        ("BatchPut", pb.BatchPutRequest(entries=[pb.CacheEntry(proxy_url=url, labels=labels)])),
        ("BatchPut", pb.BatchPutRequest(entries=[pb.CacheEntry()] * (size // 2))),
        ("Delete", pb.DeleteRequest(key="k" * size)),
    ]
    serialized = [(method, request.SerializeToString()) for method, request in giants]
    with open_channel(target) as channel:
        for method, request in itertools.cycle(serialized):
            call: Any = channel.unary_unary(f"{CACHE}/{method}")
            try:
                call(request, timeout=10)
            except grpc.RpcError:
                pass
            yield 1


@_attack("idle reflection", "reflection sessions that ask once and stay", "sessions")
def _idle_reflection(target: str) -> Iterator[int]:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    body = message_bytes(request.SerializeToString())
    while True:
        with RawConnection(target) as connection:
            yield len(connection.calls(_REFLECTION, 300, body))
            time.sleep(1)


@_attack("a flood", "as many Gets at once as two connections may have", "calls")
def _flood(target: str) -> Iterator[int]:
    request = message_bytes(pb.GetRequest(key="k").SerializeToString())
    while True:
        with RawConnection(target) as one, RawConnection(target) as other:
            for connection in (one, other):
                yield len(connection.calls(f"{CACHE}/Get", _STREAMS, request, end=True))
            for connection in (one, other):
                _read_to_the_end(connection, _STREAMS)


@_attack("stalled log reader", "a log that nobody reads, with a line for each call", "calls", holds_log=True)
def _stalled_log_reader(target: str) -> Iterator[int]:
    request = message_bytes(pb.GetRequest(key="k").SerializeToString())
    while True:
        with RawConnection(target) as connection:
            for _ in range(100):
                connection.call(f"{CACHE}/Get", request, end=True, headers={"x-not-text": "\xff" * 500})
            yield 100
            time.sleep(0.1)


def _read_to_the_end(connection: RawConnection, count: int) -> None:
    ended: set[int] = set()
    for frame in connection.frames():
        if frame.ends_stream:
            ended.add(frame.stream)
        if len(ended) == count:
            return


def main(name: str, target: str, seconds: float) -> None:
    """Attack for so long, and tell how often."""
    rounds = ATTACKS[name].rounds(target)
    # What the first round prepares takes no part of the time.
    done = next(rounds)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done += next(rounds)
    print(done)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
