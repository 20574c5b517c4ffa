"""Watch over a real socket."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from proxystash.v1 import cache_service_pb2 as pb
from proxystash.v1 import cache_service_pb2_grpc as pb_grpc
from proxystash_server.cache import CacheManager, EntryFilter
from proxystash_server.rpc.server import RpcServer
from tests.server.cache.support import broken, wait_until
from tests.server.rpc.follower import Follower
from tests.support.rpc import DEADLINE, open_channel, refusal_of, refused, serving

FROM_NOW = pb.WatchRequest(include_entries=True)
EXISTING = pb.WatchRequest(include_existing=True, include_entries=True)
EXISTING_KIND, PUT, HEALTH = pb.CHANGE_KIND_EXISTING, pb.CHANGE_KIND_PUT, pb.CHANGE_KIND_HEALTH
LEFT, DELETED, CLEARED = pb.CHANGE_KIND_LEFT, pb.CHANGE_KIND_DELETED, pb.CHANGE_KIND_CLEARED
EVICTED_BY_HEALTH, EXPIRED = pb.CHANGE_KIND_EVICTED_BY_HEALTH, pb.CHANGE_KIND_EXPIRED


class Reader:
    """The client's end of a watch."""

    def __init__(self, stub: pb_grpc.CacheServiceStub, request: pb.WatchRequest) -> None:
        self.call: Any = stub.Watch(request, timeout=DEADLINE)
        self.responses: list[pb.WatchResponse] = []

    def next(self) -> pb.WatchResponse:
        response: pb.WatchResponse = next(self.call)
        self.responses.append(response)
        return response

    def changes(self, count: int) -> list[pb.Change]:
        """The next changes, as many as asked for and no more."""
        found: list[pb.Change] = []
        while len(found) < count:
            found += self.next().changes
        assert len(found) == count
        return found

    def told(self, count: int) -> list[tuple[int, str]]:
        return [(change.kind, change.key) for change in self.changes(count)]

    @property
    def place(self) -> dict[str, Any]:
        """The fields of a request that resumes here."""
        last = self.responses[-1]
        return {"history": last.history, "after_revision": last.revision}

    def failure(self) -> Any:
        with pytest.raises(grpc.RpcError) as caught:
            self.responses += self.call
        return refusal_of(caught.value)

    def close(self) -> None:
        self.call.cancel()


Watch = Callable[..., Reader]


@pytest.fixture
def watch(stub: pb_grpc.CacheServiceStub) -> Iterator[Watch]:
    """Opens watches that have begun, and closes them."""
    with ExitStack() as stack:

        def open_watch(request: pb.WatchRequest = FROM_NOW, **fields: Any) -> Reader:
            asked = pb.WatchRequest(**fields)
            asked.MergeFrom(request)
            reader = stack.enter_context(closing(Reader(stub, asked)))
            if not asked.include_existing:
                reader.next()
            return reader

        yield open_watch


def put(manager: CacheManager, key: str, **fields: Any) -> None:
    assert manager.put(key, manager.new_entry("http://192.0.2.1:8080", key=key, **fields))


def subscribers(stub: pb_grpc.CacheServiceStub) -> int:
    return stub.GetStats(pb.GetStatsRequest(), timeout=DEADLINE).statistics.watch_subscribers


# -- what is told


def test_a_watch_says_at_once_where_it_begins(watch: Watch) -> None:
    [first] = watch().responses
    assert first.history
    assert first.revision > 0
    assert first.synced
    assert not first.changes


def test_what_is_told_and_what_is_read_are_numbered_alike(
    manager: CacheManager, watch: Watch, stub: pb_grpc.CacheServiceStub
) -> None:
    """So that whoever fills a copy from both knows which is the later. A use is no new version."""
    reader = watch(include_entries=True)
    put(manager, "a", source="first")
    put(manager, "a", source="second")
    first, second = reader.changes(2)
    assert 0 < first.version == first.entry.version < second.version == second.entry.version
    request = pb.GetRequest(key="a")
    versions = {stub.Get(request, timeout=DEADLINE).entry.version for _ in range(2)}
    assert versions == {second.version}


def test_every_kind_of_change_is_told_in_order_with_its_version(manager: CacheManager, watch: Watch) -> None:
    put(manager, "expired", ttl_us=1_000_000)
    reader = watch()
    begun = reader.responses[0].revision
    put(manager, "a", source="first")
    put(manager, "a", source="second")
    manager.invalidate_by_health("a")
    manager.delete("a")
    put(manager, "b")
    for _ in range(3):
        manager.invalidate_by_health("b")
    wait_until(lambda: manager.cleanup_expired() == 1)
    manager.clear()
    changes = reader.changes(10)
    assert [(change.kind, change.key) for change in changes] == [
        (PUT, "a"),
        (PUT, "a"),
        (HEALTH, "a"),
        (DELETED, "a"),
        (PUT, "b"),
        (HEALTH, "b"),
        (HEALTH, "b"),
        (EVICTED_BY_HEALTH, "b"),
        (EXPIRED, "expired"),
        (CLEARED, ""),
    ]
    versions = [begun, *(change.version for change in changes)]
    assert versions == sorted(set(versions))
    assert reader.responses[-1].revision == versions[-1]
    assert {response.history for response in reader.responses} == {reader.responses[0].history}
    # Each as the change left it.
    assert [change.entry.source for change in changes[:3]] == ["first", "second", "second"]
    assert [change.entry.failure_count for change in changes[:3]] == [0, 0, 1]
    assert [change.HasField("entry") for change in changes] == [True] * 3 + [False] + [True] * 3 + [False] * 3
    times = [change.happened_at.ToMicroseconds() for change in changes]
    assert times == sorted(times)
    assert all(times)


def test_entries_and_credentials_are_sent_where_they_are_asked_for(
    manager: CacheManager, watch: Watch
) -> None:
    readers = [
        watch(pb.WatchRequest(), include_entries=entries, include_credentials=credentials)
        for entries, credentials in ((False, True), (True, False), (True, True))
    ]
    put(manager, "a", username="jane", password="secret")
    keys_alone, public, whole = ([change] for [change] in (reader.changes(1) for reader in readers))
    assert not keys_alone[0].HasField("entry")
    assert (public[0].entry.proxy_url, public[0].entry.username) == ("http://192.0.2.1:8080", "")
    assert (whole[0].entry.username, whole[0].entry.password) == ("jane", "secret")
    assert (public[0].entry.credentials_omitted, whole[0].entry.credentials_omitted) == (True, False)


def test_a_filter_tells_what_matches_and_what_matches_no_more(manager: CacheManager, watch: Watch) -> None:
    reader = watch(filter=pb.ListFilter(source="wanted"))
    put(manager, "a", source="wanted")
    put(manager, "b", source="other")
    put(manager, "b", source="other")
    put(manager, "a", source="other")
    manager.delete("a")
    manager.delete("b")
    put(manager, "b", source="wanted")
    manager.invalidate_by_health("b")
    manager.clear()
    # The first of b may be a change of what matched: nobody has kept what it was.
    assert reader.told(6) == [
        (PUT, "a"),
        (LEFT, "b"),
        (LEFT, "a"),
        (PUT, "b"),
        (HEALTH, "b"),
        (CLEARED, ""),
    ]


def test_what_comes_to_match_is_told_with_the_change_that_made_it(
    manager: CacheManager, watch: Watch
) -> None:
    put(manager, "a")
    reader = watch(filter=pb.ListFilter(health_statuses=[pb.HEALTH_STATUS_UNHEALTHY]))
    manager.invalidate_by_health("a")
    [change] = reader.changes(1)
    assert (change.kind, change.key, change.entry.failure_count) == (HEALTH, "a", 1)


def test_kinds_narrow_what_is_told(manager: CacheManager, watch: Watch) -> None:
    reader = watch(kinds=[DELETED, pb.CHANGE_KIND_EVICTED])
    put(manager, "a")
    manager.delete("a")
    manager.clear()
    put(manager, "b")
    manager.delete("b")
    assert reader.told(2) == [(DELETED, "a"), (DELETED, "b")]


def test_a_watch_of_no_kind_of_existing_entries_is_synced_at_once(
    manager: CacheManager, watch: Watch
) -> None:
    put(manager, "a")
    assert watch(EXISTING, kinds=[PUT]).next().synced


def test_existing_entries_come_first_in_as_many_responses_as_they_need(
    manager: CacheManager, watch: Watch
) -> None:
    manager.put_many([manager.new_entry("http://192.0.2.1:1", key=f"{number:04}") for number in range(2345)])
    reader = watch(EXISTING)
    follower = Follower()
    while not follower.synced:
        follower.hear(reader.next().SerializeToString())
    assert sorted(follower.copy) == [f"{number:04}" for number in range(2345)]
    assert follower.kinds == {EXISTING_KIND}
    assert [response.revision for response in reader.responses[:-1]] == [0] * (len(reader.responses) - 1)
    assert len(reader.responses) > 6
    put(manager, "new")
    assert reader.told(1) == [(PUT, "new")]


def test_existing_entries_of_an_empty_cache_are_all_sent(watch: Watch) -> None:
    first = watch(EXISTING).next()
    assert (first.synced, len(first.changes)) == (True, 0)
    assert first.revision > 0


def test_large_entries_make_smaller_responses(manager: CacheManager, watch: Watch) -> None:
    labels = {f"name-{number}": "x" * 256 for number in range(30)}
    reader, count = watch(), 300
    for number in range(count):
        put(manager, f"{number:03}", labels=labels)
    assert [key for _, key in reader.told(count)] == [f"{number:03}" for number in range(count)]
    existing = watch(EXISTING)
    assert len(existing.changes(count)) == count
    assert max(response.ByteSize() for response in reader.responses + existing.responses) < 100_000


def test_entries_that_cannot_be_read_end_the_watch(manager: CacheManager, watch: Watch) -> None:
    with broken(manager.l3_tier):
        failure = watch(EXISTING).failure()
    assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "NO_TIER_AVAILABLE")


def test_changes_that_match_are_found_behind_thousands_that_do_not(manager: CacheManager) -> None:
    """No longer than it takes to look at them: nothing else happens that would wake anybody."""
    with serving(manager, watch_history=10_000) as server, open_channel(server.address) as channel:
        stub = pb_grpc.CacheServiceStub(channel)
        with closing(Reader(stub, FROM_NOW)) as reader:
            reader.next()
            manager.put_many([manager.new_entry("http://192.0.2.1:1", key=str(n)) for n in range(5000)])
            put(manager, "wanted", source="wanted")
            reader.changes(5001)
        request = pb.WatchRequest(
            history=reader.place["history"],
            after_revision=reader.responses[0].revision,
            filter=pb.ListFilter(source="wanted"),
            kinds=[PUT],
            progress_interval=Duration(seconds=600),
        )
        with closing(Reader(stub, request)) as resumed:
            assert resumed.told(1) == [(PUT, "wanted")]


# -- resuming


def test_a_watch_resumes_without_a_gap(manager: CacheManager, watch: Watch) -> None:
    reader = watch()
    put(manager, "a")
    reader.changes(1)
    reader.close()
    put(manager, "b")
    manager.delete("a")
    resumed = watch(**reader.place)
    assert [(change.kind, change.key) for change in resumed.responses[0].changes] == [
        (PUT, "b"),
        (DELETED, "a"),
    ]


def test_a_watch_that_missed_nothing_resumes_with_an_empty_response(
    manager: CacheManager, watch: Watch
) -> None:
    reader = watch()
    put(manager, "a")
    reader.changes(1)
    resumed = watch(**reader.place)
    assert resumed.responses == [
        pb.WatchResponse(
            synced=True, history=reader.place["history"], revision=reader.place["after_revision"]
        )
    ]


def test_a_watch_resumes_from_each_change(manager: CacheManager, watch: Watch) -> None:
    reader = watch()
    for number in range(20):
        put(manager, str(number))
    changes = reader.changes(20)
    history = reader.place["history"]
    for number, change in enumerate(changes[:-1]):
        resumed = watch(history=history, after_revision=change.version)
        assert [key.key for key in resumed.responses[0].changes] == [key.key for key in changes[number + 1 :]]


def test_a_revision_that_was_dropped_is_compacted_and_says_what_is_there(manager: CacheManager) -> None:
    with serving(manager, watch_history=10) as server, open_channel(server.address) as channel:
        stub = pb_grpc.CacheServiceStub(channel)
        with closing(Reader(stub, FROM_NOW)) as reader:
            reader.next()
            begun = reader.place
            for number in range(10):
                put(manager, str(number))
            tenth = reader.changes(10)[-1].version
        with closing(Reader(stub, pb.WatchRequest(**begun))) as resumed:
            assert len(resumed.changes(10)) == 10
        put(manager, "one more")
        refusal = refused(stub.Watch, pb.WatchRequest(**begun))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.OUT_OF_RANGE, "REVISION_COMPACTED")
    facts = dict(refusal.metadata)
    assert facts["history"] == begun["history"]
    assert begun["after_revision"] < int(facts["oldest_revision"]) < tenth < int(facts["revision"])


def test_a_revision_of_another_run_is_compacted_although_the_numbers_fit(
    manager: CacheManager, watch: Watch
) -> None:
    reader = watch()
    put(manager, "a")
    reader.changes(1)
    with serving(manager) as other, open_channel(other.address) as channel:
        stub = pb_grpc.CacheServiceStub(channel)
        with closing(Reader(stub, FROM_NOW)) as elsewhere:
            elsewhere.next()
            assert elsewhere.place["after_revision"] == reader.place["after_revision"]
        refusal = refused(stub.Watch, pb.WatchRequest(**reader.place))
    assert refusal.reason == "REVISION_COMPACTED"


def test_what_is_held_no_longer_as_it_was_told_ends_every_watch(manager: CacheManager, watch: Watch) -> None:
    readers = [watch(), watch(kinds=[CLEARED])]
    with manager._changes.lock:
        manager._changes.tell_reset()
    for reader in readers:
        failure = reader.failure()
        assert (failure.code, failure.reason) == (grpc.StatusCode.OUT_OF_RANGE, "REVISION_COMPACTED")
        assert dict(failure.metadata)["history"] != reader.place["history"]
    watch(EXISTING).next()


# -- requests


def duration(**fields: int) -> dict[str, Any]:
    return {"progress_interval": Duration(**fields)}


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "source": ({"filter": pb.ListFilter(source="x" * 129)}, "filter.source", "INVALID_SOURCE"),
    "health status": (
        {"filter": pb.ListFilter(health_statuses=[9])},  # type: ignore[list-item]  # none
        "filter.health_statuses[0]",
        "INVALID_HEALTH_STATUS",
    ),
    "health statuses": (
        {"filter": pb.ListFilter(health_statuses=[pb.HEALTH_STATUS_DEAD] * 101)},
        "filter.health_statuses",
        "INVALID_FILTER",
    ),
    "scheme": ({"filter": pb.ListFilter(schemes=["ftp"])}, "filter.schemes[0]", "INVALID_FILTER"),
    "schemes": ({"filter": pb.ListFilter(schemes=["http"] * 101)}, "filter.schemes", "INVALID_FILTER"),
    "labels": (
        {"filter": pb.ListFilter(labels={str(n): "" for n in range(33)})},
        "filter.labels",
        "INVALID_LABELS",
    ),
    "negative revision": ({"after_revision": -1, "history": "x"}, "after_revision", "INVALID_REVISION"),
    "two beginnings": (
        {"after_revision": 1, "history": "x", "include_existing": True},
        "include_existing",
        "INVALID_REVISION",
    ),
    "revision of no history": ({"after_revision": 1}, "history", "INVALID_HISTORY"),
    "history alone": ({"history": "x"}, "history", "INVALID_HISTORY"),
    "history of existing entries": ({"history": "x", "include_existing": True}, "history", "INVALID_HISTORY"),
    "long history": ({"after_revision": 1, "history": "x" * 65}, "history", "INVALID_HISTORY"),
    "kinds": ({"kinds": [PUT] * 101}, "kinds", "INVALID_KINDS"),
    "no kind": ({"kinds": [PUT, 0]}, "kinds[1]", "INVALID_KINDS"),
    "unknown kind": ({"kinds": [99]}, "kinds[0]", "INVALID_KINDS"),
    "short interval": (duration(nanos=999_999_999), "progress_interval", "INVALID_INTERVAL"),
    "long interval": (duration(seconds=600, nanos=1000), "progress_interval", "INVALID_INTERVAL"),
    "negative interval": (duration(seconds=-1), "progress_interval", "INVALID_INTERVAL"),
    "no interval": (duration(), "progress_interval", "INVALID_INTERVAL"),
    "invalid interval": (duration(seconds=1, nanos=-1), "progress_interval", "INVALID_INTERVAL"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_is_wrong_with_a_request_is_said(stub: pb_grpc.CacheServiceStub, bad: str) -> None:
    fields, field, reason = BAD[bad]
    refusal = refused(stub.Watch, pb.WatchRequest(**fields))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    assert refusal.fields == (field,)
    assert subscribers(stub) == 0


@pytest.mark.parametrize(
    "fields",
    [
        duration(seconds=1),
        duration(seconds=600),
        {"kinds": [1] * 100},
        {"kinds": list(pb.ChangeKind.values())[1:]},
        {"include_existing": True},
    ],
    ids=str,
)
def test_what_is_just_within_the_limits_is_taken(
    stub: pb_grpc.CacheServiceStub, fields: dict[str, Any]
) -> None:
    with closing(Reader(stub, pb.WatchRequest(**fields))) as reader:
        assert reader.next().synced


# -- streams


def test_a_quiet_watch_says_that_it_lives_and_how_far_it_has_come(
    manager: CacheManager, watch: Watch
) -> None:
    reader = watch(filter=pb.ListFilter(source="nobody's"), kinds=[PUT], **duration(seconds=1))
    put(manager, "a")
    [entry] = manager.list_entries("", 1, EntryFilter())
    response = reader.next()
    while response.revision < entry.version:
        assert not response.changes
        response = reader.next()
    assert response.revision == entry.version


def test_a_thousand_watches_hold_no_thread(manager: CacheManager) -> None:
    """Given 1,000 watches of ten connections, then calls are answered and each hears of a change."""
    with ExitStack() as stack:
        server = stack.enter_context(serving(manager, max_watch_streams=1000))
        stubs = [
            pb_grpc.CacheServiceStub(stack.enter_context(open_channel(server.address))) for _ in range(10)
        ]
        calls: Any = [stubs[0].Watch(FROM_NOW, timeout=DEADLINE)]
        next(calls[0])
        before = server_threads()
        for number in range(999):
            calls.append(stubs[number % 10].Watch(FROM_NOW, timeout=DEADLINE))
        for call in calls[1:]:
            next(call)
        assert server_threads() == before
        assert subscribers(stubs[0]) == 1000
        refusal = refused(stubs[0].Watch, FROM_NOW)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_SUBSCRIBERS")
        put(manager, "a")
        assert {next(call).changes[0].key for call in calls} == {"a"}
        assert server_threads() == before
        for call in calls:
            call.cancel()
        wait_until(lambda: subscribers(stubs[0]) == 0)


def server_threads() -> int:
    """How many threads there are, but for those of clients, which have one for each channel."""
    prefixes = ("rpc", "watch", "stream", "stats", "MainThread")
    return sum(thread.name.startswith(prefixes) for thread in threading.enumerate())


def test_who_leaves_is_no_longer_counted(stub: pb_grpc.CacheServiceStub, watch: Watch) -> None:
    readers = [watch() for _ in range(3)]
    assert subscribers(stub) == 3
    readers[0].close()
    wait_until(lambda: subscribers(stub) == 2)


def test_watches_end_when_the_server_drains(
    server: RpcServer, manager: CacheManager, stub: pb_grpc.CacheServiceStub, watch: Watch
) -> None:
    readers = [watch(), watch(EXISTING), watch(kinds=[PUT])]
    server.drain()
    for reader in readers:
        failure = reader.failure()
        assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    # It waits for nobody.
    assert server.stop(10 * DEADLINE).wait(DEADLINE)


def test_a_server_that_nobody_watches_keeps_no_changes(manager: CacheManager, server: RpcServer) -> None:
    put(manager, "a")
    assert not manager._changes._feed.has_listeners


def test_a_closed_server_listens_no_more(manager: CacheManager) -> None:
    with (
        serving(manager) as server,
        open_channel(server.address) as channel,
        closing(Reader(pb_grpc.CacheServiceStub(channel), FROM_NOW)) as reader,
    ):
        reader.next()
        assert manager._changes._feed.has_listeners
    assert not manager._changes._feed.has_listeners


@contextmanager
def changing(manager: CacheManager) -> Iterator[None]:
    """Keeps changing the cache, until the end of the block."""
    done = threading.Event()

    def change() -> None:
        number = 0
        while not done.wait(0.0005):
            number += 1
            put(manager, str(number % 7), source=str(number))

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_who_comes_and_goes_while_the_cache_changes_has_what_it_has(
    manager: CacheManager, watch: Watch
) -> None:
    follower = Follower()
    reader = watch(EXISTING)
    with changing(manager):
        for _ in range(20):
            for _ in range(3):
                follower.hear(reader.next().SerializeToString())
            reader.close()
            reader = watch(**reader.place) if follower.synced else watch(EXISTING)
            if not follower.synced:
                follower = Follower()
            elif reader.responses:
                follower.hear(reader.responses[0].SerializeToString())
    put(manager, "last")
    while "last" not in follower.copy:
        follower.hear(reader.next().SerializeToString())
    entries = manager.list_entries("", 100, EntryFilter())
    assert {key: change.entry.source for key, change in follower.copy.items()} == {
        entry.key: entry.source for entry in entries
    }
