"""StreamStats subscribers and their intervals, by a clock that the test owns."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from proxystash.v1 import cache_service_pb2 as pb
from proxystash_server.rpc.errors import SHUTTING_DOWN, RequestError
from proxystash_server.rpc.stats_hub import StatsHub
from proxystash_server.rpc.streams import StreamSender
from tests.support.calls import FakeCall
from tests.support.rpc import DEADLINE


class Hub:
    """A hub with a clock at rest; each snapshot has its own number in `hits`."""

    def __init__(self, sender: StreamSender) -> None:
        self.now = 1000.0
        self.taken = 0
        self.sender = sender
        self.hub = StatsHub(self._take, sender, max_subscribers=3, clock=lambda: self.now)

    def subscribe(self, interval: float, *, reading: bool = True) -> FakeCall[pb.StreamStatsResponse]:
        call = FakeCall(pb.StreamStatsResponse, reading=reading)
        self.hub.subscribe(interval, call)
        if reading:
            call.wait_until_sent(1)
        return call

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.hub.send_due()

    def _take(self, subscribers: int) -> pb.CacheStatistics:
        self.taken += 1
        return pb.CacheStatistics(hits=self.taken, stats_subscribers=subscribers)


@pytest.fixture
def hub() -> Iterator[Hub]:
    sender = StreamSender(patience=DEADLINE)
    sender.start()
    yield Hub(sender)
    sender.close()


def seen(call: FakeCall[pb.StreamStatsResponse], count: int) -> list[tuple[int, int]]:
    """Sequence and snapshot number of the first `count` messages."""
    return [(message.sequence, message.statistics.hits) for message in call.wait_until_sent(count)]


def test_the_first_snapshot_comes_at_once_and_counts_its_own_stream(hub: Hub) -> None:
    (message,) = hub.subscribe(60).wait_until_sent(1)
    assert (message.sequence, message.statistics.stats_subscribers) == (1, 1)


def test_a_snapshot_comes_each_interval_and_not_before(hub: Hub) -> None:
    call = hub.subscribe(1.0)
    hub.advance(0.9)
    assert hub.taken == 1
    hub.advance(0.1)
    assert seen(call, 2) == [(1, 1), (2, 2)]
    hub.advance(0.99)
    assert hub.taken == 2
    hub.advance(0.01)
    assert seen(call, 3)[-1] == (3, 3)


def test_all_who_are_due_get_the_same_snapshot(hub: Hub) -> None:
    calls = [hub.subscribe(1.0) for _ in range(3)]
    assert hub.taken == 3
    hub.advance(1.0)
    assert [seen(call, 2)[-1] for call in calls] == [(2, 4)] * 3
    assert hub.taken == 4


def test_each_subscriber_keeps_its_own_interval(hub: Hub) -> None:
    fast, slow = hub.subscribe(0.1), hub.subscribe(0.5)
    for beat in range(1, 11):
        hub.advance(0.1)
        fast.wait_until_sent(1 + beat)
    assert len(slow.wait_until_sent(3)) == 3


def test_a_slow_reader_sees_what_it_missed_as_a_gap_in_the_sequence(hub: Hub) -> None:
    call = hub.subscribe(1.0, reading=False)
    for _ in range(5):
        hub.advance(1.0)
    call.read_on()
    assert seen(call, 2) == [(1, 1), (6, 6)]


def test_times_that_were_missed_are_not_made_up_for(hub: Hub) -> None:
    call = hub.subscribe(1.0)
    hub.advance(10.5)
    assert seen(call, 2)[-1] == (2, 2)
    hub.advance(0.4)
    assert hub.taken == 2
    hub.advance(0.1)
    assert seen(call, 3)[-1] == (3, 3)


def test_who_leaves_is_no_longer_counted_nor_served(hub: Hub) -> None:
    staying, leaving = hub.subscribe(1.0), hub.subscribe(1.0)
    assert hub.hub.subscribers == 2
    leaving.leave()
    assert hub.hub.subscribers == 1
    hub.advance(1.0)
    assert staying.wait_until_sent(2)[-1].statistics.stats_subscribers == 1
    assert len(leaving.sent) == 1


def test_who_has_left_already_is_not_counted(hub: Hub) -> None:
    call = FakeCall(pb.StreamStatsResponse)
    call.leave()
    hub.hub.subscribe(1.0, call)
    assert hub.hub.subscribers == 0


def test_one_too_many_is_refused_until_another_leaves(hub: Hub) -> None:
    calls = [hub.subscribe(1.0) for _ in range(3)]
    with pytest.raises(RequestError) as caught:
        hub.subscribe(1.0)
    assert (caught.value.failure.code.name, caught.value.failure.reason) == (
        "RESOURCE_EXHAUSTED",
        "TOO_MANY_SUBSCRIBERS",
    )
    calls[0].leave()
    hub.subscribe(1.0)


def test_who_cannot_be_served_is_not_counted(hub: Hub) -> None:
    hub.sender.end_all(SHUTTING_DOWN)
    with pytest.raises(RequestError):
        hub.subscribe(1.0)
    assert hub.hub.subscribers == 0


def test_a_snapshot_that_fails_is_missed_and_the_next_one_comes() -> None:
    """The hub's own thread, and its own clock."""
    fail = [False, True, False]

    def take(_subscribers: int) -> pb.CacheStatistics:
        if fail and fail.pop(0):
            raise OSError("the disk is on fire")
        return pb.CacheStatistics()

    sender = StreamSender()
    hub = StatsHub(take, sender, max_subscribers=1)
    sender.start()
    hub.start()
    try:
        call = FakeCall(pb.StreamStatsResponse)
        hub.subscribe(0.1, call)
        assert [message.sequence for message in call.wait_until_sent(2)] == [1, 3]
    finally:
        hub.close()
        sender.close()
