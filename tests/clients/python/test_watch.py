"""Watches of both clients: what they give, and how they go on after a lost connection or another server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from proxystash import (
    AsyncClient,
    CacheEntry,
    Change,
    ChangeKind,
    Client,
    HealthStatus,
    InternalError,
    InvalidArgumentError,
    ProxystashError,
    ResourceExhaustedError,
    UnavailableError,
    WatchPosition,
)
from proxystash.v1 import cache_service_pb2 as pb

from .conftest import AnyClient, Connect
from .fake_service import FakeService, Fault, WatchScript
from .relay import Relay
from .restarting import restarting_server
from .waiting import wait_until

UNAVAILABLE = Fault(grpc.StatusCode.UNAVAILABLE, "not now")
CANCELLED = Fault(grpc.StatusCode.CANCELLED, "too slow")
COMPACTED = Fault(
    grpc.StatusCode.OUT_OF_RANGE,
    "begin anew",
    [error_details_pb2.ErrorInfo(reason="REVISION_COMPACTED", domain="proxystash")],
)
PUT, DELETED, EXISTING = ChangeKind.PUT, ChangeKind.DELETED, ChangeKind.EXISTING
SYNCED, RESET, PROGRESS = ChangeKind.SYNCED, ChangeKind.RESET, ChangeKind.PROGRESS


pytestmark = pytest.mark.usefixtures("_resumes_quickly")


def response(revision: int, *versions: int, history: str = "h", kind: int = 2) -> pb.WatchResponse:
    """A response up to a revision, 0 while existing entries are sent, with Puts of `key-VERSION`."""
    changes = [
        pb.Change(kind=kind, key=f"key-{version}", version=version)  # type: ignore[arg-type]  # its own type
        for version in versions
    ]
    return pb.WatchResponse(revision=revision, synced=revision > 0, changes=changes, history=history)


def seen(changes: list[Change]) -> list[tuple[ChangeKind, int]]:
    return [(change.kind, change.version) for change in changes]


def take(stream: Iterator[Change], count: int) -> list[Change]:
    return [next(stream) for _ in range(count)]


def beginnings(service: FakeService) -> list[tuple[str, int, bool]]:
    """Where each call asked to begin."""
    requests = [request for request in service.requests if isinstance(request, pb.WatchRequest)]
    return [(one.history, one.after_revision, one.include_existing) for one in requests]


# -- a server that fails on request


@pytest.mark.parametrize("lost", [UNAVAILABLE, CANCELLED, None])
def test_a_lost_watch_goes_on_behind_its_last_response(
    connect: Connect, service: FakeService, fake_target: str, lost: Fault | None
) -> None:
    service.watches.extend(
        [
            WatchScript([response(10), response(12, 11, 12), response(15)], lost),
            WatchScript([], lost),
            WatchScript([response(17, 16, 17)], stay_open=True),
        ]
    )
    told: list[ProxystashError] = []

    with connect(fake_target).watch(on_lost=told.append) as stream:
        changes = take(stream, 4)

    assert seen(changes) == [(PUT, 11), (PUT, 12), (PUT, 16), (PUT, 17)]
    assert beginnings(service) == [("", 0, False), ("h", 15, False), ("h", 15, False)]
    assert len(told) == 2


def test_a_watch_whose_history_has_ended_begins_anew_and_says_so(
    connect: Connect, service: FakeService, fake_target: str
) -> None:
    service.watches.extend(
        [
            WatchScript([response(10), response(11, 11)], COMPACTED),
            WatchScript([response(5, history="other"), response(6, 6, history="other")], UNAVAILABLE),
            WatchScript([response(7, 7, history="other")], stay_open=True),
        ]
    )
    told: list[ProxystashError] = []

    with connect(fake_target).watch(on_lost=told.append) as stream:
        changes = take(stream, 4)

    assert seen(changes) == [(PUT, 11), (RESET, 0), (PUT, 6), (PUT, 7)]
    assert beginnings(service) == [("", 0, False), ("", 0, False), ("other", 6, False)]
    assert [error.reason for error in told] == ["REVISION_COMPACTED", "UNAVAILABLE"]


def test_existing_entries_come_again_where_a_watch_begins_anew(
    connect: Connect, service: FakeService, fake_target: str
) -> None:
    begun = [response(0, 3, kind=1), response(9, 4, kind=1)]
    service.watches.extend(
        [
            WatchScript([response(0, 3, kind=1)], UNAVAILABLE),
            WatchScript([*begun, response(10, 10)], COMPACTED),
            WatchScript([*begun, response(10)], UNAVAILABLE),
            WatchScript([response(11, 11)], stay_open=True),
        ]
    )

    with connect(fake_target).watch(include_existing=True) as stream:
        changes = take(stream, 11)

    entries = [(EXISTING, 3), (EXISTING, 4), (SYNCED, 0)]
    assert seen(changes) == [
        (EXISTING, 3),
        (RESET, 0),
        *entries,
        (PUT, 10),
        (RESET, 0),
        *entries,
        (PUT, 11),
    ]
    assert beginnings(service) == [("", 0, True)] * 3 + [("h", 10, False)]


def test_each_change_says_where_a_watch_resumes_that_has_dealt_with_it(
    connect: Connect, service: FakeService, fake_target: str
) -> None:
    script = [response(0, 3, kind=1), response(9, 5, kind=1), response(12, 11, 12), response(20)]
    service.watches.append(WatchScript(script, stay_open=True))

    with connect(fake_target).watch(include_existing=True) as stream:
        assert stream.position is None
        found = [(next(stream).position, stream.position) for _ in range(5)]

    at = [None, None, *(WatchPosition("h", revision) for revision in (9, 11, 12))]
    assert [change for change, _ in found] == at
    assert [position for _, position in found] == at


def test_a_watch_resumes_where_an_earlier_one_was(
    connect: Connect, service: FakeService, fake_target: str
) -> None:
    service.watches.extend(
        [WatchScript([response(12, 11)], UNAVAILABLE), WatchScript([response(13, 13)], stay_open=True)]
    )
    position = WatchPosition("h", 10)

    with connect(fake_target).watch(after=position, include_existing=True) as stream:
        changes = take(stream, 2)

    assert seen(changes) == [(PUT, 11), (PUT, 13)]
    assert beginnings(service) == [("h", 10, False), ("h", 12, False)]


def test_a_position_of_another_history_is_a_reset_from_the_start(
    connect: Connect, service: FakeService, fake_target: str
) -> None:
    service.watches.extend(
        [WatchScript([], COMPACTED), WatchScript([response(9, 4, kind=1)], stay_open=True)]
    )

    with connect(fake_target, retry=None).watch(
        after=WatchPosition("gone", 10), include_existing=True
    ) as stream:
        changes = take(stream, 3)

    assert seen(changes) == [(RESET, 0), (EXISTING, 4), (SYNCED, 0)]
    assert beginnings(service) == [("gone", 10, False), ("", 0, True)]


def test_a_watch_that_never_worked_fails_as_a_call_does(
    connect: Connect, service: FakeService, fake_target: str
) -> None:
    service.watches.append(WatchScript([], Fault(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many")))
    with connect(fake_target).watch() as stream, pytest.raises(ResourceExhaustedError, match="too many"):
        next(stream)
    with Relay(None) as relay:
        nobody = relay.target
    with connect(nobody).watch(timeout=0.3) as stream, pytest.raises(UnavailableError, match="cannot reach"):
        next(stream)


def test_a_failure_that_resuming_cannot_mend_ends_the_watch(
    connect: Connect, service: FakeService, fake_target: str
) -> None:
    service.watches.append(WatchScript([response(10, 10)], Fault(grpc.StatusCode.INTERNAL)))
    with connect(fake_target).watch() as stream:
        next(stream)
        with pytest.raises(InternalError):
            next(stream)
        assert list(stream) == []


def test_a_kind_of_change_that_only_a_newer_client_knows_is_an_error(
    connect: Connect, service: FakeService, fake_target: str
) -> None:
    service.watches.append(WatchScript([response(10, 10, kind=99)], stay_open=True))
    with connect(fake_target).watch() as stream, pytest.raises(InternalError, match="is it newer"):
        next(stream)


def test_that_a_server_lives_is_told_if_asked_for(
    connect: Connect, service: FakeService, fake_target: str
) -> None:
    service.watches.extend(
        [
            WatchScript([response(10), response(11, 11), response(11)], COMPACTED),
            WatchScript([response(5, history="other"), response(6, 6, history="other")], stay_open=True),
        ]
    )

    with connect(fake_target).watch(include_progress=True) as stream:
        changes = take(stream, 6)

    assert seen(changes) == [(PROGRESS, 0), (PUT, 11), (PROGRESS, 0), (RESET, 0), (PROGRESS, 0), (PUT, 6)]
    assert [change.position for change in changes if change.kind is PROGRESS] == [
        WatchPosition("h", 10),
        WatchPosition("h", 11),
        WatchPosition("other", 5),
    ]


def test_a_silent_server_is_taken_for_a_lost_one(
    connect: Connect, service: FakeService, fake_target: str
) -> None:
    service.watches.extend(
        [WatchScript([response(10, 10)], stay_open=True), WatchScript([response(11, 11)], stay_open=True)]
    )
    told: list[ProxystashError] = []
    with connect(fake_target).watch(
        progress_interval=timedelta(milliseconds=50), on_lost=told.append
    ) as stream:
        assert seen(take(stream, 2)) == [(PUT, 10), (PUT, 11)]
    assert [error.message for error in told] == [f"nothing was heard from {fake_target} for too long"]
    assert beginnings(service) == [("", 0, False), ("h", 10, False)]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"health": "well"}, "health_status"),
        ({"kinds": "synced"}, "kinds"),
        ({"kinds": [PUT, "put it"]}, "kinds"),
        ({"progress_interval": "soon"}, "interval"),
    ],
)
def test_what_no_message_can_say_is_refused_at_once(
    connect: Connect, fake_target: str, settings: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        connect(fake_target).watch(**settings)
    assert caught.value.field == field


@pytest.mark.parametrize("close_client", [False, True])
def test_closing_ends_the_iteration_of_another_thread(
    service: FakeService, fake_target: str, close_client: bool
) -> None:
    service.watches.append(WatchScript([response(10, 10)], stay_open=True))
    client = Client(fake_target)
    stream = client.watch()
    changes: list[Change] = []
    reader = threading.Thread(target=lambda: changes.extend(stream))
    reader.start()
    wait_until(lambda: bool(changes))

    (client if close_client else stream).close()

    reader.join(30)
    assert not reader.is_alive()
    client.close()


@pytest.mark.parametrize("close_client", [False, True])
def test_closing_ends_the_iteration_of_another_task(
    service: FakeService, fake_target: str, close_client: bool
) -> None:
    service.watches.append(WatchScript([response(10, 10)], stay_open=True))

    async def run() -> list[Change]:
        async with AsyncClient(fake_target) as client:
            stream = client.watch()
            first = asyncio.Event()

            async def read() -> list[Change]:
                changes = []
                async for change in stream:
                    changes.append(change)
                    first.set()
                return changes

            reader = asyncio.create_task(read())
            await first.wait()
            await (client.close() if close_client else stream.aclose())
            return await asyncio.wait_for(reader, 30)

    assert seen(asyncio.run(run())) == [(PUT, 10)]


def test_no_repr_of_a_change_shows_a_credential() -> None:
    change = Change(
        PUT,
        key="http://jane:secret@192.0.2.1:1",
        entry=CacheEntry("http://192.0.2.1:1", username="jane", password="secret"),
    )
    assert "secret" not in repr(change)


# -- a real server


def test_a_watch_gives_every_change_of_what_matches(connect: Connect, target: str) -> None:
    client = connect(target)
    kept = client.put(CacheEntry("http://192.0.2.1:1", source="mine", username="jane", password="secret"))
    client.put(CacheEntry("http://192.0.2.2:1", source="other"))
    started = datetime.now(UTC)

    with client.watch(source="mine", include_existing=True, include_credentials=True) as stream:
        [existing, synced] = take(stream, 2)
        added = client.put(CacheEntry("http://192.0.2.3:1", source="mine", labels={"country": "DE"}))
        client.invalidate_by_health(added.key)
        client.put(CacheEntry("http://192.0.2.3:1", source="other"))
        client.delete(kept.key)
        client.clear()
        changes = take(stream, 5)

    assert (existing.kind, existing.key, synced.kind) == (EXISTING, kept.key, SYNCED)
    assert existing.entry is not None
    assert (existing.entry.username, existing.entry.password) == ("jane", "secret")
    assert [(change.kind, change.key) for change in changes] == [
        (PUT, added.key),
        (ChangeKind.HEALTH, added.key),
        (ChangeKind.LEFT, added.key),
        (DELETED, kept.key),
        (ChangeKind.CLEARED, ""),
    ]
    stored = changes[0].entry
    assert stored is not None
    assert (stored.proxy_url, stored.labels) == ("http://192.0.2.3:1", {"country": "DE"})
    failed = changes[1].entry
    assert failed is not None
    assert (failed.health_status, failed.failure_count) == (HealthStatus.UNHEALTHY, 1)
    for change in changes:
        assert change.happened_at is not None
        assert started - timedelta(seconds=1) <= change.happened_at <= datetime.now(UTC)


def test_kinds_and_keys_alone(connect: Connect, target: str) -> None:
    client = connect(target)
    with client.watch(kinds=["deleted", PUT], include_entries=False, include_existing=True) as stream:
        assert next(stream).kind is SYNCED
        key = client.put(CacheEntry("http://192.0.2.1:1")).key
        client.invalidate_by_health(key)
        client.delete(key)
        changes = take(stream, 2)
    assert [(change.kind, change.entry) for change in changes] == [(PUT, None), (DELETED, None)]


def test_a_watch_survives_the_cut_of_its_connection(connect: Connect, target: str) -> None:
    with (
        Relay(target) as relay,
        Client(target) as other,
        connect(relay.target).watch(include_existing=True) as stream,
    ):
        assert next(stream).kind is SYNCED
        keys = []
        for number in range(1, 6):
            keys.append(other.put(CacheEntry(f"http://192.0.2.1:{number}")).key)
            relay.cut()
            keys.append(other.put(CacheEntry(f"http://192.0.2.2:{number}")).key)
            assert [change.key for change in take(stream, 2)] == keys[-2:]


class Copy:
    """What a client knows that does what the changes say."""

    def __init__(self) -> None:
        self.sources: dict[str, str] = {}
        self.resets = 0

    def apply(self, change: Change) -> None:
        if change.kind in {RESET, ChangeKind.CLEARED}:
            self.sources.clear()
            self.resets += change.kind is RESET
        elif change.entry is not None:
            self.sources[change.key] = change.entry.source
        elif change.kind is not SYNCED:
            self.sources.pop(change.key, None)


def test_a_copy_is_right_after_each_restart_of_the_server(connect: Connect, tmp_path: Path) -> None:
    """Given changes that happened while nobody could watch, then the copy has them after the reset."""
    with Relay(None) as relay, restarting_server(tmp_path, relay) as restart:
        server = restart(False)
        watching: AnyClient = connect(relay.target, timeout=60)
        copy = Copy()
        with Client(server.target) as direct:
            gone = direct.put(CacheEntry("http://192.0.2.1:1", source="first")).key
        with watching.watch(include_existing=True) as stream:
            apply_until(copy, stream, lambda: copy.sources == {gone: "first"})
            for killed in (False, True):
                server = restart(killed)
                with Client(server.target) as direct:
                    direct.delete(gone)
                    gone = direct.put(CacheEntry("http://192.0.2.2:1", source=f"killed {killed}")).key
                apply_until(copy, stream, lambda: copy.sources == {gone: f"killed {killed}"})  # noqa: B023 -- at once
            assert copy.resets == 2


def test_a_position_is_taken_up_by_another_process_and_noticed_by_another_run(
    connect: Connect, tmp_path: Path
) -> None:
    with Relay(None) as relay, restarting_server(tmp_path, relay) as restart:
        restart(False)
        client = connect(relay.target)
        with client.watch(include_existing=True) as stream:
            assert next(stream).kind is SYNCED
            client.put(CacheEntry("http://192.0.2.1:1"))
            client.put(CacheEntry("http://192.0.2.2:1"))
            position = next(stream).position
        with connect(relay.target).watch(after=position) as stream:
            change = next(stream)
            assert change.entry is not None
            assert change.entry.proxy_url == "http://192.0.2.2:1"
        restart(False)
        with connect(relay.target).watch(after=position, include_existing=True) as stream:
            assert [change.kind for change in take(stream, 4)] == [RESET, EXISTING, EXISTING, SYNCED]


def apply_until(copy: Copy, stream: Iterator[Change], is_done: Callable[[], bool]) -> None:
    while not is_done():
        copy.apply(next(stream))
