"""Streams that hold no thread: who gets what when a client does not read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import pytest
import structlog
from google.protobuf.wrappers_pb2 import BytesValue

from proxystash_server.rpc.boundary import ErrorBoundary
from proxystash_server.rpc.calls import StreamCall
from proxystash_server.rpc.errors import SHUTTING_DOWN, RequestError
from proxystash_server.rpc.streams import OutgoingStream, StreamSender, non_blocking
from tests.support.calls import FakeCall
from tests.support.rpc import DEADLINE, open_channel, refusal_of

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
    def open(self, _request: bytes, context: grpc.ServicerContext, _send: object) -> None:
        stream = OutgoingStream(StreamCall(context))
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
    with open_channel(streams.target, ("grpc.max_receive_message_length", -1)) as channel:
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


def test_clients_that_do_not_read_hold_nobody_up_but_themselves() -> None:
    """However many they are, and for as long as they are left alone."""
    with serving_streams(StreamSender(patience=DEADLINE)) as streams, ExitStack() as stack:
        for _ in range(20):
            _, stuck_end = stack.enter_context(reading(streams))
            streams.sender.offer(stuck_end, HUGE)
        call, end = stack.enter_context(reading(streams))
        for value in range(20):
            streams.sender.offer(end, number(value))
            assert next(call) == number(value)


def test_a_client_that_does_not_read_for_too_long_is_told_so_and_not_that_it_cancelled() -> None:
    with (
        structlog.testing.capture_logs() as logs,
        serving_streams(StreamSender(patience=0.1, short_patience=0.1)) as streams,
        reading(streams) as (stuck, stuck_end),
    ):
        streams.sender.offer(stuck_end, HUGE)
        streams.wait_closed(stuck_end)
        with pytest.raises(grpc.RpcError) as caught:
            next(stuck)
        refusal = refusal_of(caught.value)
        assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refusal.message.startswith("the stream was not read")
    assert [line["event"] for line in logs] == ["stream cancelled: its client does not read"]


def test_a_client_that_does_not_read_is_told_unavailable_when_all_streams_end() -> None:
    with (
        structlog.testing.capture_logs(),
        serving_streams(StreamSender(patience=DEADLINE, short_patience=0.1)) as streams,
        reading(streams) as (stuck, stuck_end),
    ):
        streams.sender.offer(stuck_end, HUGE)
        streams.sender.end_all(SHUTTING_DOWN)
        streams.wait_closed(stuck_end)
        with pytest.raises(grpc.RpcError) as caught:
            next(stuck)
        refusal = refusal_of(caught.value)
        assert (refusal.code, refusal.message) == (SHUTTING_DOWN.code, SHUTTING_DOWN.message)


@pytest.fixture
def sender() -> StreamSender:
    """Without its watchdog."""
    return StreamSender(patience=DEADLINE)


def new_call(*, reading: bool = True) -> FakeCall[BytesValue]:
    return FakeCall(BytesValue, reading=reading)


def opened(sender: StreamSender, call: FakeCall[BytesValue]) -> OutgoingStream:
    stream = OutgoingStream(call)
    assert sender.open(stream, on_close=lambda: None)
    return stream


def number(value: int) -> BytesValue:
    return BytesValue(value=bytes([value]))


def test_a_slow_reader_gets_the_latest_and_misses_what_came_between(sender: StreamSender) -> None:
    call = new_call(reading=False)
    stream = opened(sender, call)
    for value in range(1, 10):
        sender.offer(stream, number(value))
    assert call.sent == [number(1)]
    call.read_on()
    assert call.sent == [number(1), number(9)]


def test_a_stream_ends_after_what_it_still_had_to_send(sender: StreamSender) -> None:
    call = new_call(reading=False)
    stream = opened(sender, call)
    sender.offer(stream, number(1))
    sender.offer(stream, number(2))
    sender.end_all(SHUTTING_DOWN)
    sender.offer(stream, number(3))
    assert call.ended is None
    call.read_on()
    assert call.sent == [number(1), number(2)]
    assert call.ended is SHUTTING_DOWN


def test_no_stream_is_opened_once_all_have_ended(sender: StreamSender) -> None:
    sender.end_all(SHUTTING_DOWN)
    with pytest.raises(RequestError) as caught:
        opened(sender, new_call())
    assert caught.value.failure is SHUTTING_DOWN


def test_a_client_that_has_gone_already_opens_no_stream(sender: StreamSender) -> None:
    call = new_call()
    call.leave()
    assert not sender.open(OutgoingStream(call), on_close=lambda: None)


def test_nothing_is_sent_to_a_client_that_has_gone(sender: StreamSender) -> None:
    gone, here = new_call(reading=False), new_call()
    gone_end, here_end = opened(sender, gone), opened(sender, here)
    sender.offer(gone_end, number(1))
    sender.offer(gone_end, number(2))
    gone.leave()
    gone.read_on()
    sender.offer(gone_end, number(3))
    sender.end_all(SHUTTING_DOWN)
    sender.offer(here_end, number(4))
    assert (gone.sent, gone.ended) == ([number(1)], None)
    assert (here.sent, here.ended) == ([], SHUTTING_DOWN)


def test_a_stream_that_fails_is_cancelled_and_the_others_go_on(
    sender: StreamSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, fine = new_call(), new_call()

    def fail(*_: object) -> bool:
        raise ValueError("cannot be sent")

    monkeypatch.setattr(broken, "send", fail)
    with structlog.testing.capture_logs() as logs:
        sender.offer(opened(sender, broken), number(1))
    assert broken.cancelled is not None
    assert broken.cancelled.code is grpc.StatusCode.INTERNAL
    sender.offer(opened(sender, fine), number(2))
    assert fine.sent == [number(2)]
    assert [line["event"] for line in logs] == ["stream failed"]


class TestPatience:
    """10 s of patience, 1 s when all streams are to end."""

    @pytest.fixture
    def now(self) -> list[float]:
        return [100.0]

    @pytest.fixture
    def sender(self, now: list[float]) -> StreamSender:
        return StreamSender(patience=10, short_patience=1, clock=lambda: now[0])

    @pytest.fixture
    def stuck(self, sender: StreamSender) -> OutgoingStream:
        """A stream whose client does not read."""
        stream = opened(sender, new_call(reading=False))
        sender.offer(stream, number(1))
        return stream

    def test_a_slow_client_has_time(
        self, sender: StreamSender, stuck: OutgoingStream, now: list[float]
    ) -> None:
        now[0] += 10.0
        assert sender.overdue() == []
        now[0] += 0.1
        assert sender.overdue() == [stuck]

    def test_a_client_that_reads_has_all_the_time_there_is(
        self, sender: StreamSender, now: list[float]
    ) -> None:
        sender.offer(opened(sender, new_call()), number(1))
        now[0] += 1000
        assert sender.overdue() == []

    def test_it_has_little_time_when_all_streams_are_to_end(
        self, sender: StreamSender, stuck: OutgoingStream, now: list[float]
    ) -> None:
        sender.end_all(SHUTTING_DOWN)
        assert sender.overdue() == []
        now[0] += 1.1
        assert sender.overdue() == [stuck]
