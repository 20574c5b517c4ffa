"""Statistics streams of both clients when connections get lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import grpc
import pytest

from proxystash import (
    AsyncClient,
    Client,
    DeadlineExceededError,
    InternalError,
    ProxystashError,
    ResourceExhaustedError,
    RetryPolicy,
    StatsUpdate,
    UnavailableError,
)
from proxystash._channel import channel_options
from tests.support.server import running_server

from .conftest import Connect
from .fake_service import FakeService, Fault, StreamScript
from .relay import Relay
from .waiting import wait_until

UNAVAILABLE = Fault(grpc.StatusCode.UNAVAILABLE, "not now")
CANCELLED = Fault(grpc.StatusCode.CANCELLED, "too slow")
EXHAUSTED = Fault(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many")
QUICK = RetryPolicy(initial=0.01, multiplier=1, maximum=0.01)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxystash.streams._RESUME_POLICY", QUICK)


def seen(updates: list[StatsUpdate]) -> list[tuple[int, int, bool]]:
    return [(update.sequence, update.missed, update.resumed) for update in updates]


@pytest.mark.parametrize("lost", [UNAVAILABLE, CANCELLED, EXHAUSTED, None])
def test_a_stream_that_once_worked_is_resumed_and_counts_again(
    connect: Connect, service: FakeService, fake_target: str, lost: Fault | None
) -> None:
    service.streams.extend(
        [StreamScript([1, 2, 5], lost), StreamScript([], lost), StreamScript([3, 4], stay_open=True)]
    )
    told: list[ProxystashError] = []

    with connect(fake_target).stream_stats(on_lost=told.append) as stream:
        updates = [next(stream) for _ in range(5)]

    assert seen(updates) == [(1, 0, False), (2, 0, False), (5, 2, False), (3, 2, True), (4, 0, False)]
    assert [update.statistics.hits for update in updates] == [1, 2, 5, 3, 4]
    assert [error.message for error in told] == [lost.message if lost else "the server ended the stream"] * 2


def test_a_failure_that_resuming_cannot_mend_ends_the_stream(
    connect: Connect, service: FakeService, fake_target: str
) -> None:
    service.streams.append(StreamScript([1], Fault(grpc.StatusCode.INTERNAL)))

    with connect(fake_target).stream_stats() as stream:
        next(stream)
        with pytest.raises(InternalError):
            next(stream)

        assert list(stream) == []
    assert service.calls["StreamStats"] == 1


def test_a_stream_that_never_worked_is_tried_again_while_unavailable(
    connect: Connect, service: FakeService, fake_target: str
) -> None:
    service.streams.extend([StreamScript([], UNAVAILABLE)] * 2 + [StreamScript([1], stay_open=True)])
    told: list[ProxystashError] = []

    with connect(fake_target, retry=QUICK).stream_stats(on_lost=told.append) as stream:
        assert seen([next(stream)]) == [(1, 0, False)]

    assert service.calls["StreamStats"] == 3
    assert told == []


def test_a_stream_that_never_worked_fails_with_what_the_server_says(
    connect: Connect, service: FakeService, fake_target: str
) -> None:
    service.streams.append(StreamScript([], EXHAUSTED))

    with (
        connect(fake_target).stream_stats() as stream,
        pytest.raises(ResourceExhaustedError, match="too many"),
    ):
        next(stream)


def test_a_stream_to_nobody_fails_at_its_deadline(connect: Connect) -> None:
    with Relay(None) as relay:
        nobody = relay.target
    with connect(nobody).stream_stats(timeout=0.3) as stream:
        with pytest.raises(UnavailableError, match="cannot reach"):
            next(stream)

        assert list(stream) == []


def test_a_first_snapshot_that_does_not_come_is_late_at_the_deadline(
    connect: Connect, service: FakeService, fake_target: str
) -> None:
    service.streams.append(StreamScript([], stay_open=True))

    with connect(fake_target).stream_stats(timeout=0.3) as stream:
        with pytest.raises(DeadlineExceededError, match=r"within 0\.3 s"):
            next(stream)

        assert list(stream) == []


def test_a_stream_has_no_deadline_after_its_first_snapshot(
    connect: Connect, service: FakeService, fake_target: str
) -> None:
    service.streams.append(StreamScript([1], stay_open=True))

    with connect(fake_target).stream_stats(timeout=20) as stream:
        next(stream)

        assert service.deadlines[0] > 1000


def test_a_stream_survives_the_cut_of_its_connection(connect: Connect, target: str) -> None:
    with Relay(target) as relay:
        client = connect(relay.target)
        with client.stream_stats(timedelta(milliseconds=100)) as stream:
            first = next(stream)
            relay.cut()
            resumed = next(update for update in iter(stream) if update.resumed)

    assert seen([first, resumed]) == [(1, 0, False), (1, 0, True)]


def test_a_stream_notices_a_connection_that_has_gone_silent(connect: Connect, target: str) -> None:
    """Given a server whose machine disappears without a word, then the stream goes on over another."""
    names = ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms")
    assert set(names) <= dict(channel_options(())).keys()
    with Relay(target) as relay:
        client = connect(relay.target, options=[(name, 300) for name in names])
        with client.stream_stats(timedelta(milliseconds=100)) as stream:
            next(stream)
            relay.silence()
            resumed = next(update for update in iter(stream) if update.resumed)

    assert resumed.sequence == 1


def test_a_stream_survives_the_death_of_its_server(connect: Connect, tmp_path: Path) -> None:
    """Given a stream, when its server is killed and another takes its place, then the stream goes on."""
    lost = threading.Event()
    with running_server(tmp_path) as server, Relay(server.target) as relay:
        stream = connect(relay.target).stream_stats(timedelta(milliseconds=100), on_lost=lambda _: lost.set())
        first = next(stream)
        server.kill()
        relay.upstream = None
        updates: list[StatsUpdate] = []

        def start_another() -> None:
            lost.wait(60)
            other = running_server(tmp_path)
            others.append(other)
            relay.upstream = other.__enter__().target

        others: list[object] = []
        starter = threading.Thread(target=start_another)
        starter.start()
        try:
            updates.append(next(update for update in iter(stream) if update.resumed))
        finally:
            starter.join()
            stream.close()
            others[0].__exit__(None, None, None)  # type: ignore[attr-defined]  # a context manager

    assert updates[0].sequence == 1
    assert updates[0].statistics.started_at > first.statistics.started_at


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize("close_client", [False, True])
def test_closing_ends_the_iteration_of_another_thread(
    service: FakeService, fake_target: str, close_client: bool
) -> None:
    service.streams.append(StreamScript([1], stay_open=True))
    client = Client(fake_target)
    stream = client.stream_stats()
    updates: list[StatsUpdate] = []
    reader = in_thread(lambda: updates.extend(stream))
    wait_until(lambda: service.calls["StreamStats"] == 1)

    (client if close_client else stream).close()

    reader.join(30)
    assert not reader.is_alive()
    assert len(updates) <= 1
    client.close()


def test_closing_ends_the_wait_for_a_lost_server(
    service: FakeService, fake_target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxystash.streams._RESUME_POLICY", RetryPolicy(500, 1, 500))
    service.streams.append(StreamScript([1], UNAVAILABLE))
    lost = threading.Event()
    with Client(fake_target) as client:
        stream = client.stream_stats(on_lost=lambda _: lost.set())
        reader = in_thread(lambda: [*stream])
        assert lost.wait(30)

        stream.close()

        reader.join(30)
        assert not reader.is_alive()


@pytest.mark.parametrize("close_client", [False, True])
def test_closing_ends_the_iteration_of_another_task(
    service: FakeService, fake_target: str, close_client: bool
) -> None:
    service.streams.append(StreamScript([1], stay_open=True))

    async def run() -> list[StatsUpdate]:
        async with AsyncClient(fake_target) as client:
            stream = client.stream_stats()
            first = asyncio.Event()

            async def read() -> list[StatsUpdate]:
                updates = []
                async for update in stream:
                    updates.append(update)
                    first.set()
                return updates

            reader = asyncio.create_task(read())
            await first.wait()
            await (client.close() if close_client else stream.aclose())
            return await asyncio.wait_for(reader, 30)

    assert seen(asyncio.run(run())) == [(1, 0, False)]


def test_cancelling_the_reading_task_cancels_it(service: FakeService, fake_target: str) -> None:
    service.streams.append(StreamScript([1], stay_open=True))

    async def run() -> None:
        async with AsyncClient(fake_target) as client, client.stream_stats() as stream:
            await anext(stream)
            reader = asyncio.create_task(anext(stream))
            await asyncio.sleep(0)
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader

    asyncio.run(run())


def test_closing_ends_a_call_of_another_task(service: FakeService, fake_target: str) -> None:
    service.hanging.add("Get")

    async def run() -> BaseException | None:
        client = AsyncClient(fake_target, timeout=60)
        call = asyncio.create_task(client.get("k"))
        await asyncio.to_thread(wait_until, lambda: service.calls["Get"] == 1)
        await client.close()
        await asyncio.wait([call], timeout=30)
        return call.exception()

    error = asyncio.run(run())

    assert isinstance(error, ProxystashError)
    assert error.reason == "CLIENT_CLOSED"
