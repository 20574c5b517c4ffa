"""StreamStats over a real socket."""

from __future__ import annotations

from contextlib import ExitStack

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from proxystash.v1 import cache_service_pb2 as pb
from proxystash.v1 import cache_service_pb2_grpc as pb_grpc
from proxystash_server.cache import CacheManager
from proxystash_server.rpc.server import RpcServer
from tests.support.rpc import DEADLINE, open_channel, refusal_of, refused, serving

FAST = pb.StreamStatsRequest(interval=Duration(nanos=100_000_000))


def subscribers(stub: pb_grpc.CacheServiceStub) -> int:
    return stub.GetStats(pb.GetStatsRequest(), timeout=DEADLINE).statistics.stats_subscribers


def test_a_stream_counts_from_one_and_shows_what_happens(stub: pb_grpc.CacheServiceStub) -> None:
    stream = stub.StreamStats(FAST, timeout=DEADLINE)
    first = next(stream)
    assert (first.sequence, first.statistics.misses, first.statistics.stats_subscribers) == (1, 0, 1)
    stub.Get(pb.GetRequest(key="missing"), timeout=DEADLINE)
    sequences = [first.sequence]
    for response in stream:
        sequences.append(response.sequence)
        if response.statistics.misses:
            break
    assert sequences == sorted(set(sequences))
    stream.cancel()


def test_the_default_interval_is_taken_when_none_is_set(stub: pb_grpc.CacheServiceStub) -> None:
    stream = stub.StreamStats(pb.StreamStatsRequest(), timeout=DEADLINE)
    assert [next(stream).sequence, next(stream).sequence] == [1, 2]
    stream.cancel()


def test_gets_are_answered_while_more_streams_are_open_than_there_are_threads(server: RpcServer) -> None:
    """Ten streams on the default eight threads."""
    with ExitStack() as stack:
        channels = [stack.enter_context(open_channel(server.address)) for _ in range(10)]
        streams = [
            pb_grpc.CacheServiceStub(channel).StreamStats(FAST, timeout=DEADLINE) for channel in channels
        ]
        for stream in streams:
            next(stream)
        stub = pb_grpc.CacheServiceStub(stack.enter_context(open_channel(server.address)))
        assert subscribers(stub) == 10
        for _ in range(100):
            stub.Get(pb.GetRequest(key="missing"), timeout=DEADLINE)
        assert [next(stream).sequence > 1 for stream in streams] == [True] * 10


def test_who_leaves_is_no_longer_counted(stub: pb_grpc.CacheServiceStub) -> None:
    streams = [stub.StreamStats(FAST, timeout=DEADLINE) for _ in range(3)]
    for stream in streams:
        next(stream)
    streams[0].cancel()
    streams[1].cancel()
    for response in streams[2]:
        if response.statistics.stats_subscribers == 1:
            break
    assert subscribers(stub) == 1
    streams[2].cancel()


def test_a_stream_whose_deadline_passes_is_no_longer_counted(stub: pb_grpc.CacheServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        for _ in stub.StreamStats(FAST, timeout=0.3):
            pass
    assert refusal_of(caught.value).code is grpc.StatusCode.DEADLINE_EXCEEDED
    watching = stub.StreamStats(FAST, timeout=DEADLINE)
    assert any(response.statistics.stats_subscribers == 1 for response in watching)
    watching.cancel()


def test_one_stream_too_many_is_refused(manager: CacheManager) -> None:
    with serving(manager, max_stats_streams=2) as server, open_channel(server.address) as channel:
        stub = pb_grpc.CacheServiceStub(channel)
        streams = [stub.StreamStats(FAST, timeout=DEADLINE) for _ in range(2)]
        for stream in streams:
            next(stream)
        refusal = refused(stub.StreamStats, FAST)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_SUBSCRIBERS")
        assert subscribers(stub) == 2


def test_a_drained_stream_ends_with_unavailable(server: RpcServer, stub: pb_grpc.CacheServiceStub) -> None:
    stream = stub.StreamStats(pb.StreamStatsRequest(), timeout=DEADLINE)
    next(stream)
    server.drain()
    with pytest.raises(grpc.RpcError) as caught:
        for _ in stream:
            pass
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    assert server.stop(10 * DEADLINE).wait(DEADLINE)
