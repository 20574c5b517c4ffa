"""Who watches, and what becomes of those whose clients do not read, without a network and by a fake clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import structlog

from proxystash.v1 import cache_service_pb2 as pb
from proxystash_server.cache import CacheManager, EntryFilter
from proxystash_server.rpc.errors import SHUTTING_DOWN, RequestError
from proxystash_server.rpc.streams import StreamSender
from proxystash_server.rpc.watch.cursor import Selection
from proxystash_server.rpc.watch.hub import WatchHub
from proxystash_server.rpc.watch.request import Watch
from tests.support.calls import FakeCall

HISTORY = 10
INTERVAL = 5.0

Call = FakeCall[pb.WatchResponse]


class Hub:
    """A hub whose rounds are the test's."""

    def __init__(self, manager: CacheManager) -> None:
        self.now = 100.0
        self.manager = manager
        self.sender = StreamSender(patience=60, clock=lambda: self.now)
        self.hub = WatchHub(
            manager, self.sender, max_watchers=5, history_size=HISTORY, clock=lambda: self.now
        )

    def watch(self, *kinds: int, reading: bool = True, existing: bool = False, **filters: Any) -> Call:
        call = FakeCall(pb.WatchResponse, reading=reading)
        selection = Selection(EntryFilter(**filters), frozenset(kinds), True, False)
        self.hub.watch(Watch(selection, existing, None, INTERVAL), call)
        return call

    def run(self) -> None:
        """Rounds until there is nothing to do."""
        while self.hub.send_due():
            pass

    def put(self, *keys: str) -> None:
        for key in keys:
            assert self.manager.put(key, self.manager.new_entry("http://192.0.2.1:1", key=key))
            self.run()


@pytest.fixture
def hub(manager: CacheManager) -> Iterator[Hub]:
    hub = Hub(manager)
    yield hub
    hub.hub.close()


def keys_of(call: Call) -> list[str]:
    return [change.key for response in call.sent for change in response.changes]


def test_a_reader_who_is_too_slow_is_told_so_and_the_others_go_on(hub: Hub) -> None:
    """Given a client that does not read until changes it needs are dropped, then no gap is left to it."""
    slow, quick = hub.watch(reading=False), hub.watch()
    hub.run()
    hub.put("a")
    slow.read_on()
    slow._reading = False
    hub.run()
    hub.put(*(str(number) for number in range(HISTORY + 1)))
    slow.read_on()
    hub.run()
    assert keys_of(slow) == ["a"]
    assert slow.ended is not None
    assert (slow.ended.code, slow.ended.reason) == (grpc.StatusCode.OUT_OF_RANGE, "REVISION_COMPACTED")
    assert "read too slowly" in slow.ended.message
    assert keys_of(quick) == ["a", *(str(number) for number in range(HISTORY + 1))]
    assert quick.ended is None


def test_a_reader_who_keeps_up_with_the_history_misses_nothing(hub: Hub) -> None:
    slow = hub.watch(reading=False)
    hub.run()
    keys = [str(number) for number in range(HISTORY)]
    hub.put(*keys)
    slow.read_on()
    hub.run()
    assert keys_of(slow) == keys


def test_a_client_that_reads_nothing_for_long_is_cancelled_with_the_reason(hub: Hub) -> None:
    stuck, quick = hub.watch(reading=False), hub.watch()
    hub.run()
    for _ in range(13):
        hub.now += 5
        hub.run()
    [overdue] = hub.sender.overdue()
    assert overdue.call is stuck
    assert [response.changes for response in quick.sent] == [[]] * 14
    stuck.leave()
    assert hub.hub.watchers == 1


def test_an_interval_without_changes_ends_with_a_response(hub: Hub) -> None:
    call = hub.watch()
    hub.run()
    assert len(call.sent) == 1
    hub.now += INTERVAL - 0.1
    hub.run()
    assert len(call.sent) == 1
    hub.put("a")
    hub.now += INTERVAL - 0.1
    hub.run()
    assert len(call.sent) == 2
    hub.now += 0.1
    hub.run()
    assert [len(response.changes) for response in call.sent] == [0, 1, 0]
    assert call.sent[2].revision == call.sent[1].revision


def test_equal_watches_share_what_is_made_for_them(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    serialize = Selection.serialize

    def counted(self: Selection, change: pb.Change, entry: Any) -> bytes:
        if not self.entry_filter.source:
            made.append(change.key)
        return serialize(self, change, entry)

    monkeypatch.setattr(Selection, "serialize", counted)
    calls = [hub.watch() for _ in range(3)] + [hub.watch(source="another") for _ in range(2)]
    hub.run()
    hub.put("a", "b")
    assert [keys_of(call) for call in calls] == [["a", "b"]] * 3 + [["a", "b"]] * 2
    assert made == ["a", "b"]


def test_watches_of_other_kinds_of_changes_are_told_each_its_own(hub: Hub) -> None:
    every, deleted = hub.watch(), hub.watch(pb.CHANGE_KIND_DELETED)
    hub.run()
    hub.put("a", "b")
    hub.manager.delete("a")
    hub.run()
    assert (keys_of(every), keys_of(deleted)) == (["a", "b", "a"], ["a"])


def test_what_no_longer_matches_comes_without_its_entry(hub: Hub) -> None:
    call = hub.watch(source="one")
    hub.run()
    for source in ("one", "two"):
        hub.manager.put("a", hub.manager.new_entry("http://192.0.2.1:1", key="a", source=source))
        hub.run()
    changes = [change for response in call.sent for change in response.changes]
    assert [(change.kind, change.HasField("entry")) for change in changes] == [
        (pb.CHANGE_KIND_PUT, True),
        (pb.CHANGE_KIND_LEFT, False),
    ]


def test_no_more_watches_than_are_allowed(hub: Hub) -> None:
    calls = [hub.watch() for _ in range(5)]
    with pytest.raises(RequestError) as caught:
        hub.watch()
    assert caught.value.failure.reason == "TOO_MANY_SUBSCRIBERS"
    calls[2].leave()
    hub.watch()
    assert hub.hub.watchers == 5


@pytest.mark.parametrize("reading", [True, False])
def test_all_end_when_the_sender_does(hub: Hub, reading: bool) -> None:
    call = hub.watch(reading=reading, existing=True)
    hub.run()
    hub.hub.stop()
    hub.sender.end_all(SHUTTING_DOWN)
    assert (call.ended is SHUTTING_DOWN) is reading
    call.read_on()
    assert call.ended is SHUTTING_DOWN
    with pytest.raises(RequestError):
        hub.watch()
    assert hub.hub.watchers == 1


def test_a_client_that_has_gone_already_is_not_counted(hub: Hub) -> None:
    call = FakeCall(pb.WatchResponse)
    call.leave()
    selection = Selection(EntryFilter(), frozenset(), True, False)
    hub.hub.watch(Watch(selection, False, None, INTERVAL), call)
    assert hub.hub.watchers == 0


def test_a_watch_that_fails_unexpectedly_takes_no_other_down(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, fine = hub.watch(source="broken"), hub.watch()
    hub.run()
    matches: Callable[..., bool] = EntryFilter.matches

    def failing(self: EntryFilter, entry: Any) -> bool:
        if self.source == "broken":
            raise ValueError("a defect")
        return matches(self, entry)

    monkeypatch.setattr(EntryFilter, "matches", failing)
    with structlog.testing.capture_logs() as logs:
        hub.put("a")
    assert broken.ended is not None
    assert (broken.ended.code, broken.ended.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "a defect" not in broken.ended.message
    assert [(line["event"], line["request_id"]) for line in logs] == [
        ("watch failed unexpectedly", broken.ended.request_id)
    ]
    assert keys_of(fine) == ["a"]
