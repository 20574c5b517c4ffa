"""Streams that hold no thread: who gets what when a client does not read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
import structlog
from google.protobuf.wrappers_pb2 import BytesValue

from proxystash_server.rpc.boundary import ErrorBoundary
from proxystash_server.rpc.errors import SHUTTING_DOWN, RequestError
from proxystash_server.rpc.streams import OutgoingStream, Send, StreamSender, non_blocking
from tests.support.calls import FakeCall
from tests.support.rpc import DEADLINE, open_channel

# Far more than any window of a connection, so that sending it to a client that does not read cannot end.
HUGE = BytesValue(value=bytes(64 * 1024 * 1024))
SMALL = BytesValue(value=b"small")


class Streams:
    """A server with one method, whose streams the test feeds by hand."""

    def __init__(self, sender: StreamSender) -> None:
        self.sender = sender
        self.opened: list[OutgoingStream] = []
        self.closed: list[OutgoingStream] = []
        self.changed = threading.Condition()
        self.target = ""

    @non_blocking
    def open(self, _request: bytes, context: grpc.ServicerContext, send: Send) -> None:
        stream = OutgoingStream(context, send)
        if self.sender.open(stream, on_close=lambda: self._note(self.closed, stream)):
            self._note(self.opened, stream)

    def wait_opened(self, count: int) -> list[OutgoingStream]:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.opened) >= count, DEADLINE)
            return list(self.opened)

    def wait_closed(self, stream: OutgoingStream) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: stream in self.closed, DEADLINE)

    def _note(self, where: list[OutgoingStream], stream: OutgoingStream) -> None:
        with self.changed:
            where.append(stream)
            self.changed.notify_all()


@contextmanager
def serving_streams(sender: StreamSender) -> Iterator[Streams]:
    streams = Streams(sender)
    handler: Any = grpc.unary_stream_rpc_method_handler(
        streams.open, response_serializer=BytesValue.SerializeToString
    )
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool, interceptors=[ErrorBoundary({})])
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", {"Open": handler}),))
        streams.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        sender.start()
        server.start()
        try:
            yield streams
        finally:
            server.stop(None)
            sender.close()


@contextmanager
def reading(streams: Streams) -> Iterator[tuple[Iterator[BytesValue], OutgoingStream]]:
    """A client on a connection of its own, which reads when told to, and the server's end of its stream."""
    with open_channel(streams.target) as channel:
        before = len(streams.opened)
        open_stream: Any = channel.unary_stream("/t/Open", response_deserializer=BytesValue.FromString)
        call = open_stream(b"", timeout=DEADLINE)
        yield call, streams.wait_opened(before + 1)[before]


def test_one_worker_thread_serves_any_number_of_streams() -> None:
    with (
        serving_streams(StreamSender()) as streams,
        reading(streams) as (first, first_end),
        reading(streams) as (second, second_end),
    ):
        streams.sender.offer(second_end, SMALL)
        assert next(second) == SMALL
        streams.sender.offer(first_end, SMALL)
        assert next(first) == SMALL


def test_a_client_that_does_not_read_holds_nobody_up_but_itself() -> None:
    with (
        serving_streams(StreamSender(threads=2, patience=DEADLINE)) as streams,
        reading(streams) as (_, stuck_end),
        reading(streams) as (call, end),
    ):
        streams.sender.offer(stuck_end, HUGE)
        for value in range(20):
            streams.sender.offer(end, number(value))
            assert next(call) == number(value)


def test_a_sender_held_by_a_client_that_does_not_read_is_freed() -> None:
    """The only sender is stuck; the watchdog cancels that call, and the others go on."""
    with (
        structlog.testing.capture_logs() as logs,
        serving_streams(StreamSender(threads=1, patience=DEADLINE, short_patience=0.1)) as streams,
        reading(streams) as (stuck, stuck_end),
        reading(streams) as (call, end),
    ):
        streams.sender.offer(stuck_end, HUGE)
        streams.sender.offer(end, SMALL)
        assert next(call) == SMALL
        streams.wait_closed(stuck_end)
        with pytest.raises(grpc.RpcError):
            next(stuck)
    assert [line["event"] for line in logs] == ["stream cancelled: its client does not read"]


@pytest.fixture
def sender() -> Iterator[StreamSender]:
    sender = StreamSender(threads=2, patience=DEADLINE)
    sender.start()
    yield sender
    sender.close()


def opened(sender: StreamSender, call: FakeCall) -> OutgoingStream:
    stream = OutgoingStream(call.context, call.send)
    assert sender.open(stream, on_close=lambda: None)
    return stream


def number(value: int) -> BytesValue:
    return BytesValue(value=bytes([value]))


def test_a_slow_reader_gets_the_latest_and_misses_what_came_between(sender: StreamSender) -> None:
    call = FakeCall(reading=False)
    stream = opened(sender, call)
    sender.offer(stream, number(1))
    call.wait_until_sending()
    for value in range(2, 10):
        sender.offer(stream, number(value))
    call.read_on()
    assert call.wait_until_sent(2) == [number(1), number(9)]


def test_a_stream_ends_after_what_it_still_had_to_send(sender: StreamSender) -> None:
    call = FakeCall(reading=False)
    stream = opened(sender, call)
    sender.offer(stream, number(1))
    call.wait_until_sending()
    sender.offer(stream, number(2))
    sender.end_all(SHUTTING_DOWN)
    sender.offer(stream, number(3))
    call.read_on()
    assert call.wait_until_sent(3) == [number(1), number(2), None]
    assert call.code is grpc.StatusCode.UNAVAILABLE


def test_no_stream_is_opened_once_all_have_ended(sender: StreamSender) -> None:
    sender.end_all(SHUTTING_DOWN)
    with pytest.raises(RequestError) as caught:
        opened(sender, FakeCall())
    assert caught.value.failure is SHUTTING_DOWN


def test_a_client_that_has_gone_already_opens_no_stream(sender: StreamSender) -> None:
    call = FakeCall()
    call.leave()
    assert not sender.open(OutgoingStream(call.context, call.send), on_close=lambda: None)


def test_nothing_is_sent_to_a_client_that_has_gone(sender: StreamSender) -> None:
    gone, here = FakeCall(reading=False), FakeCall()
    gone_end, here_end = opened(sender, gone), opened(sender, here)
    sender.offer(gone_end, number(1))
    gone.wait_until_sending()
    sender.offer(gone_end, number(2))
    gone.leave()
    gone.read_on()
    sender.offer(gone_end, number(3))
    sender.end_all(SHUTTING_DOWN)
    assert here.wait_until_sent(1) == [None]
    sender.offer(here_end, number(4))
    gone.wait_until_sent(1)
    sender.close()
    assert gone.sent == [number(1)]
    assert here.sent == [None]


def test_a_stream_that_fails_is_cancelled_and_the_others_go_on(sender: StreamSender) -> None:
    broken, fine = FakeCall(), FakeCall()

    def fail(_message: object) -> None:
        raise ValueError("cannot be sent")

    stream = OutgoingStream(broken.context, fail)
    assert sender.open(stream, on_close=lambda: None)
    with structlog.testing.capture_logs() as logs:
        sender.offer(stream, number(1))
        assert broken.cancelled.wait(DEADLINE)
    sender.offer(opened(sender, fine), number(2))
    assert fine.wait_until_sent(1) == [number(2)]
    assert [line["event"] for line in logs] == ["stream failed"]


class TestPatience:
    """Two senders; 10 s of patience, 1 s while others wait or when all streams are to end."""

    @pytest.fixture
    def now(self) -> list[float]:
        return [100.0]

    @pytest.fixture
    def sender(self, now: list[float]) -> Iterator[StreamSender]:
        sender = StreamSender(threads=2, patience=10, short_patience=1, clock=lambda: now[0])
        # The watchdog waits by a clock of its own, and would ask the same questions as the test.
        sender._watch = lambda: None  # type: ignore[method-assign]
        sender.start()
        yield sender
        sender.close()

    @pytest.fixture
    def stuck(self, sender: StreamSender) -> Iterator[Callable[[], OutgoingStream]]:
        """Makes streams whose client does not read, until the end of the test."""
        calls = []

        def make() -> OutgoingStream:
            call = FakeCall(reading=False)
            calls.append(call)
            stream = opened(sender, call)
            sender.offer(stream, number(1))
            call.wait_until_sending()
            return stream

        yield make
        for call in calls:
            call.read_on()

    def test_a_slow_client_has_time_while_nobody_waits_for_it(
        self, sender: StreamSender, stuck: Callable[[], OutgoingStream], now: list[float]
    ) -> None:
        streams = {stuck(), stuck()}
        now[0] += 10.0
        assert sender.overdue() == []
        now[0] += 0.1
        assert set(sender.overdue()) == streams

    def test_it_has_little_time_while_others_wait_for_it(
        self, sender: StreamSender, stuck: Callable[[], OutgoingStream], now: list[float]
    ) -> None:
        first = stuck()
        now[0] += 1.1
        stuck()
        sender.offer(opened(sender, FakeCall()), number(1))
        assert sender.overdue() == [first]

    def test_it_has_little_time_when_all_streams_are_to_end(
        self, sender: StreamSender, stuck: Callable[[], OutgoingStream], now: list[float]
    ) -> None:
        stream = stuck()
        sender.end_all(SHUTTING_DOWN)
        assert sender.overdue() == []
        now[0] += 1.1
        assert sender.overdue() == [stream]
