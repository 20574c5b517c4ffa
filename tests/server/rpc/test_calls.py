"""Calls before they have a thread: on a real socket, with clients that do what none should."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from proxystash.v1 import cache_service_pb2 as pb
from proxystash.v1 import cache_service_pb2_grpc as pb_grpc
from proxystash_server.cache import CacheManager
from proxystash_server.rpc.boundary import ErrorBoundary
from proxystash_server.rpc.calls import LARGE_REQUEST, CallPool, StreamCall, urgent
from proxystash_server.rpc.errors import SHUTTING_DOWN
from proxystash_server.rpc.reception import Reception
from proxystash_server.rpc.streams import non_blocking
from proxystash_server.rpc.unread import UnreadAnswers
from proxystash_server.rpc.workers import WorkerPool
from tests.support.http2 import RawConnection, message_bytes
from tests.support.rpc import DEADLINE, open_channel, refusal_of, refused, serving

GET = "/proxystash.v1.CacheService/Get"
LARGE = b"x" * LARGE_REQUEST


class Service:
    """Methods that wait until they are told to go on, on one worker thread."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Semaphore(0), threading.Event()
        self.ran: list[bytes] = []

    def wait(self, request: bytes, _context: grpc.ServicerContext) -> bytes:
        self.begun.release()
        assert self.go_on.wait(DEADLINE)
        self.ran.append(request[:10])
        return request

    def answer(self, request: bytes, _context: grpc.ServicerContext) -> bytes:
        self.ran.append(request[:10])
        return bytes(int(request or b"0"))

    @non_blocking
    def answer_later(self, request: bytes, context: grpc.ServicerContext, _send: object) -> None:
        StreamCall(context).answer(bytes(int(request)))

    @urgent
    def hurry(self, request: bytes, _context: grpc.ServicerContext) -> bytes:
        return request


@contextmanager
def serving_calls(service: Service, **limits: Any) -> Iterator[tuple[str, CallPool]]:
    workers, urgent_workers = WorkerPool(1, "test"), WorkerPool(1, "test-urgent")
    calls = CallPool(workers, urgent_workers, **limits)
    server = grpc.server(calls, interceptors=[ErrorBoundary({})])  # type: ignore[arg-type]  # all that is used of one
    handlers: dict[str, Any] = {
        name: grpc.unary_unary_rpc_method_handler(getattr(service, name))
        for name in ("wait", "answer", "hurry")
    }
    handlers["answer_later"] = grpc.unary_stream_rpc_method_handler(service.answer_later)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", handlers),))
    target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield target, calls
    finally:
        service.go_on.set()
        server.stop(None)
        workers.close()
        urgent_workers.close()


@pytest.fixture
def service() -> Service:
    return Service()


def ends_of(connection: RawConnection, count: int) -> None:
    """Wait until so many streams have ended."""
    frames = connection.frames()
    ended: set[int] = set()
    while len(ended) < count:
        frame = next(frames)
        if frame.ends_stream:
            ended.add(frame.stream)


@pytest.mark.parametrize("stalled", [8, 900])
def test_calls_that_never_send_a_message_hold_nobody_up(manager: CacheManager, stalled: int) -> None:
    """Not even others of their own connection, unless all places are taken; and not the health."""
    with serving(manager) as server, RawConnection(server.address) as connection:
        connection.calls(GET, stalled)
        connection.calls("/grpc.health.v1.Health/Check", 8)
        # What is refused without being received is answered after all of those before it were looked at.
        stream = connection.call("/grpc.health.v1.Health/Nothing")
        assert any(frame.stream == stream and frame.ends_stream for frame in connection.frames())
        with open_channel(server.address) as channel:
            stub = pb_grpc.CacheServiceStub(channel)
            health: Any = health_pb2_grpc.HealthStub(channel)
            for _ in range(20):
                assert stub.Get(pb.GetRequest(key="missing"), timeout=DEADLINE) == pb.GetResponse()
                health.Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE)
        if stalled == 8:
            connection.call(GET, message_bytes(pb.GetRequest(key="k").SerializeToString()), end=True)
            ends_of(connection, 1)


def test_stalled_calls_do_not_keep_a_server_from_ending(manager: CacheManager) -> None:
    with serving(manager) as server, RawConnection(server.address) as connection:
        connection.calls(GET, 200)
        stream = connection.call("/grpc.health.v1.Health/Nothing")
        assert any(frame.stream == stream and frame.ends_stream for frame in connection.frames())
        server.drain()
        ends_of(connection, 200)
        stopped = server.stop(10 * DEADLINE)
        # The server says goodbye and waits until that is acknowledged.
        for _ in connection.frames():
            pass
        assert stopped.wait(DEADLINE)


def test_calls_in_line_behind_stalled_ones_are_served_when_those_are_overdue(service: Service) -> None:
    reception = Reception[Any](most=2, most_of_one=2, patience=0)
    with serving_calls(service, reception=reception) as (target, _), RawConnection(target) as connection:
        connection.calls("/t/answer", 2)
        connection.calls("/t/answer", 3, message_bytes(b"1"), end=True)
        ends_of(connection, 5)
    assert service.ran == [b"1"] * 3


def test_a_call_that_leaves_while_it_is_in_line_leaves_nothing_behind(service: Service) -> None:
    reception = Reception[Any](most=1, most_of_one=1)
    with serving_calls(service, reception=reception) as (target, _), RawConnection(target) as connection:
        first, *others = connection.calls("/t/answer", 30)
        connection.reset(*others)
        connection.reset(first)
        connection.call("/t/answer", message_bytes(b"1"), end=True)
        ends_of(connection, 1)
        assert reception.waiting() == []


def test_any_number_of_calls_in_line_that_are_over_make_way() -> None:
    """Given three thousand calls that have ended while the one that has the place had not."""

    class Over:
        connection = b"one"

        def receive(self, _on_received: object) -> bool:
            return False

    reception = Reception[Any](most=1, most_of_one=1)
    calls = CallPool(WorkerPool(0, "test"), WorkerPool(0, "test"), reception=reception)
    first, *others = (Over() for _ in range(3001))
    assert reception.enter(first)
    assert not any(reception.enter(other) for other in others)
    calls._leave(first)  # type: ignore[arg-type]  # as much of a call as is needed
    assert reception.waiting() == []


def test_many_large_requests_wait_for_a_place_and_are_all_served(service: Service) -> None:
    """A large request keeps its place until a thread has taken it, which bounds what they take together."""
    reception = Reception[Any](most=4, most_of_one=2)
    with (
        serving_calls(service, reception=reception) as (target, _),
        open_channel(target) as channel,
    ):
        wait: Any = channel.unary_unary("/t/wait")
        answers = [wait.future(b"%03d" % number + LARGE, timeout=DEADLINE) for number in range(40)]
        assert service.begun.acquire(timeout=DEADLINE)
        received = [call for call in reception.waiting() if call.has_request]
        assert len(received) <= 4
        service.go_on.set()
        assert [answer.result(DEADLINE)[:3] for answer in answers] == [b"%03d" % n for n in range(40)]
    assert reception.waiting() == []


class Ends(Counter[tuple[str, grpc.StatusCode]]):
    """Counts how calls have ended; all is counted once the server has been stopped."""

    def observe(self, method: str, code: grpc.StatusCode, nanoseconds: int) -> None:
        assert nanoseconds > 0
        self[method, code] += 1


def test_a_call_without_a_message_is_refused(service: Service) -> None:
    ends = Ends()
    with serving_calls(service, observe=ends.observe) as (target, _), open_channel(target) as channel:
        call: Callable[..., Any] = channel.stream_unary("/t/answer")
        refusal = refused(call, iter(()))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNIMPLEMENTED, "NO_REQUEST")
    assert service.ran == []
    assert ends == {("/t/answer", grpc.StatusCode.UNIMPLEMENTED): 1}


def test_what_is_over_when_its_turn_comes_is_not_run(service: Service) -> None:
    """Its deadline has passed, or its client has gone."""
    ends = Ends()
    with (
        serving_calls(service, observe=ends.observe) as (target, _),
        open_channel(target) as channel,
        open_channel(target) as other,
    ):
        wait: Any = channel.unary_unary("/t/wait")
        answer: Any = channel.unary_unary("/t/answer")
        first = wait.future(b"first", timeout=DEADLINE)
        assert service.begun.acquire(timeout=DEADLINE)
        expired = [answer.future(b"1", timeout=0.2) for _ in range(20)]
        cancelled = [answer.future(b"2", timeout=DEADLINE) for _ in range(20)]
        # On the same connection, and behind them: when this is answered they are in the queue.
        hurry: Any = channel.unary_unary("/t/hurry")
        hurry(b"", timeout=DEADLINE)
        assert {call.code() for call in expired} == {grpc.StatusCode.DEADLINE_EXCEEDED}
        for call in cancelled:
            call.cancel()
        hurry(b"", timeout=DEADLINE)
        answer_other: Any = other.unary_unary("/t/answer")
        last = answer_other.future(b"3", timeout=DEADLINE)
        service.go_on.set()
        first.result(DEADLINE)
        last.result(DEADLINE)
    assert service.ran == [b"first", b"3"]
    # Whether the server notices first that the time is over, or that the client has left for it, is open.
    over = ends.pop(("/t/answer", grpc.StatusCode.DEADLINE_EXCEEDED), 0)
    assert over + ends.pop(("/t/answer", grpc.StatusCode.CANCELLED)) == 40
    assert ends == {
        ("/t/wait", grpc.StatusCode.OK): 1,
        ("/t/hurry", grpc.StatusCode.OK): 2,
        ("/t/answer", grpc.StatusCode.OK): 1,
    }


def test_overload_is_unavailable_and_what_is_urgent_is_served_all_the_same(service: Service) -> None:
    ends = Ends()
    with (
        serving_calls(service, most_queued=10, observe=ends.observe) as (target, _),
        open_channel(target) as channel,
    ):
        wait: Any = channel.unary_unary("/t/wait")
        first = wait.future(b"1", timeout=DEADLINE)
        assert service.begun.acquire(timeout=DEADLINE)
        calls = [wait.future(b"1", timeout=DEADLINE) for _ in range(50)]
        hurry: Any = channel.unary_unary("/t/hurry")
        hurry(b"", timeout=DEADLINE)
        service.go_on.set()
        assert first.result(DEADLINE) == b"1"
        refusals = [refusal_of(error) for call in calls if (error := call.exception(DEADLINE)) is not None]
        assert len(refusals) == 40
        assert {(refusal.code, refusal.reason) for refusal in refusals} == {
            (grpc.StatusCode.UNAVAILABLE, "OVERLOADED")
        }
    assert ends == {
        ("/t/wait", grpc.StatusCode.OK): 11,
        ("/t/wait", grpc.StatusCode.UNAVAILABLE): 40,
        ("/t/hurry", grpc.StatusCode.OK): 1,
    }


def test_a_flood_of_calls_from_many_connections_never_ends_in_cancelled(manager: CacheManager) -> None:
    """gRPC itself turns calls away, as CANCELLED, when more than a thousand wait to be looked at."""

    def flood(target: str) -> set[grpc.StatusCode]:
        with open_channel(target) as channel:
            get = pb_grpc.CacheServiceStub(channel).Get
            calls = [get.future(pb.GetRequest(key="missing"), timeout=DEADLINE) for _ in range(1500)]
            return {call.code() for call in calls}

    with serving(manager) as server, ThreadPoolExecutor(4) as pool:
        codes = set().union(*pool.map(flood, [server.address] * 4))
    assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}


@pytest.mark.parametrize("method", ["answer", "answer_later"])
def test_answers_that_are_not_read_go_when_others_need_their_memory(service: Service, method: str) -> None:
    unread = UnreadAnswers[Any](1_000_000)
    ends = Ends()
    with (
        serving_calls(service, unread=unread, observe=ends.observe) as (target, _),
        RawConnection(target, window=0) as connection,
        open_channel(target) as channel,
    ):
        connection.calls(f"/t/{method}", 20, message_bytes(b"300000"), end=True)
        # Those before the last three.
        ends_of(connection, 17)
        assert unread._bytes <= 1_000_000
        answer: Callable[..., bytes] = channel.unary_unary(f"/t/{method}")
        for _ in range(10):
            assert len(answer(b"300000", timeout=DEADLINE)) == 300_000
    assert unread._bytes == 0
    # Of the three that were left, some may have had to go for the ten.
    assert 17 <= ends[f"/t/{method}", grpc.StatusCode.RESOURCE_EXHAUSTED] <= 20


def test_a_draining_server_refuses_all_but_what_is_urgent(service: Service) -> None:
    with serving_calls(service) as (target, calls), open_channel(target) as channel:
        calls.refuse_new_calls(SHUTTING_DOWN)
        refusal = refused(channel.unary_unary("/t/answer"), b"1")
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        hurry: Any = channel.unary_unary("/t/hurry")
        assert hurry(b"1", timeout=DEADLINE) == b"1"
