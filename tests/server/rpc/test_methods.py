"""Each method of the contract, over a real socket, when it is used well."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from proxystash.proxies import cache_key
from proxystash.v1 import cache_service_pb2 as pb
from proxystash.v1 import cache_service_pb2_grpc as pb_grpc
from proxystash_server.cache import CacheConfig, CacheManager, EntryFilter, HealthStatus, Stored
from proxystash_server.cache.entry.entry import with_health
from proxystash_server.cache.tiers.sqlite import tier as sqlite
from tests.support.rpc import DEADLINE, refused

Stub = pb_grpc.CacheServiceStub
EVERY_TIER = [pb.TIER_L1, pb.TIER_L2, pb.TIER_L3]


def put(stub: Stub, proxy_url: str = "http://192.0.2.1:8080", **fields: object) -> pb.PutResponse:
    return stub.Put(pb.PutRequest(entry=pb.CacheEntry(proxy_url=proxy_url, **fields)), timeout=DEADLINE)  # type: ignore[arg-type]  # fields of the message


def put_large(stub: Stub, number: int) -> str:
    """An entry of 50 KB: characters count, and may have four bytes."""
    labels = {f"{label:03}" + "𐀀" * 61: "𐀀" * 256 for label in range(32)}
    text = "𐀀" * 1024
    return put(stub, key=f"large-{number}", labels=labels, username=text, password=text).key


def get(stub: Stub, key: str) -> pb.GetResponse:
    return stub.Get(pb.GetRequest(key=key), timeout=DEADLINE)


def list_all(stub: Stub, **arguments: object) -> list[pb.CacheEntry]:
    entries: list[pb.CacheEntry] = []
    token = ""
    while True:
        page = stub.List(pb.ListRequest(page_token=token, **arguments), timeout=DEADLINE)  # type: ignore[arg-type]  # as above
        entries += page.entries
        token = page.next_page_token
        if not token:
            return entries


class TestCountsAtTheirLimit:
    """A count stays at the greatest number that the contract has for it, and hinders nobody."""

    LIMIT = 2**31 - 1

    @pytest.fixture
    def manager(self, tmp_path: Path) -> Iterator[CacheManager]:
        config = CacheConfig(
            l2_cache_dir=tmp_path / "l2",
            l3_database_path=tmp_path / "l3" / "proxystash.db",
            encryption_key_file=tmp_path / "secret.key",
            health_check_invalidation=False,
            failure_threshold=self.LIMIT,
        )
        with CacheManager(config, background=False) as manager:
            yield manager

    def check(self, stub: Stub, key: str) -> None:
        """Everything answers, with the entry at its limit and another one."""
        other = put(stub, "http://192.0.2.2:8080").key
        got = stub.BatchGet(pb.BatchGetRequest(keys=[key, other]), timeout=DEADLINE).results
        assert [one.entry.failure_count for one in got] == [self.LIMIT, 0]
        assert get(stub, key).entry.failure_count == self.LIMIT
        assert {entry.key: entry.failure_count for entry in list_all(stub)} == {key: self.LIMIT, other: 0}

    @pytest.mark.parametrize("count", [LIMIT - 1, LIMIT])
    def test_one_more_failure_stays_there(self, stub: Stub, count: int) -> None:
        key = put(stub, failure_count=count).key
        for _ in range(2):
            outcome = stub.InvalidateByHealth(pb.InvalidateByHealthRequest(key=key), timeout=DEADLINE)
            assert outcome.failure_count == outcome.failure_threshold == self.LIMIT
        self.check(stub, key)
        put(stub, failure_count=1)
        self.check(stub, key)

    def test_what_an_earlier_version_stored_beyond_it_is_at_the_limit(
        self, stub: Stub, manager: CacheManager
    ) -> None:
        key = put(stub).key
        [entry] = manager.list_entries("", 10, EntryFilter())
        beyond = with_health(entry, HealthStatus.UNHEALTHY, self.LIMIT + 1)
        for tier in (manager.l1_tier, manager.l2_tier, manager.l3_tier):
            tier.put(key, beyond)
        self.check(stub, key)
        outcome = stub.InvalidateByHealth(pb.InvalidateByHealthRequest(key=key), timeout=DEADLINE)
        assert outcome.failure_count == self.LIMIT


class TestPutAndGet:
    def test_a_put_says_its_key_its_end_and_its_tiers(self, stub: Stub) -> None:
        ttl = Duration(seconds=300_000_090)
        stored = put(stub, ttl=ttl, fetch_time=Timestamp(seconds=1_790_000_000, nanos=5000))
        assert stored.key == cache_key("http://192.0.2.1:8080")
        assert stored.expires_at == Timestamp(seconds=2_090_000_090, nanos=5000)
        assert list(stored.stored_in) == EVERY_TIER

    def test_a_get_returns_what_was_put_with_its_credentials(self, stub: Stub) -> None:
        key = put(stub, "http://user:p%40ss@192.0.2.1:8080", source="s", labels={"country": "DE"}).key
        answer = get(stub, key)
        assert answer.served_by == pb.TIER_L1
        assert answer.entry.key == key
        assert answer.entry.proxy_url == "http://192.0.2.1:8080"
        assert (answer.entry.username, answer.entry.password) == ("user", "p@ss")
        assert (answer.entry.source, dict(answer.entry.labels)) == ("s", {"country": "DE"})
        assert answer.entry.health_status == pb.HEALTH_STATUS_UNKNOWN

    def test_every_get_is_counted_in_its_own_answer(self, stub: Stub) -> None:
        key = put(stub).key
        first, second = get(stub, key).entry, get(stub, key).entry
        assert (first.access_count, second.access_count) == (1, 2)
        assert second.last_accessed.ToMicroseconds() >= first.last_accessed.ToMicroseconds() > 0

    def test_a_miss_is_an_answer(self, stub: Stub) -> None:
        assert get(stub, "nobody-knows") == pb.GetResponse()

    def test_a_given_key_is_kept(self, stub: Stub) -> None:
        assert put(stub, key="my proxy/1").key == "my proxy/1"
        assert get(stub, "my proxy/1").entry.key == "my proxy/1"

    def test_the_ttl_is_the_entry_s_own_else_its_source_s_else_the_default(self, stub: Stub) -> None:
        own = put(stub, key="own", source="short-lived", ttl=Duration(seconds=7)).key
        source = put(stub, key="source", source="short-lived").key
        default = put(stub, key="default").key
        assert [get(stub, key).entry.ttl.seconds for key in (own, source, default)] == [7, 60, 3600]

    def test_an_entry_that_has_expired_is_refused(self, stub: Stub) -> None:
        url = "http://192.0.2.1:80"
        entry = pb.CacheEntry(proxy_url=url, fetch_time=Timestamp(seconds=10**9), ttl=Duration(seconds=60))
        refusal = refused(stub.Put, pb.PutRequest(entry=entry))
        assert (refusal.code.name, refusal.reason) == ("INVALID_ARGUMENT", "ALREADY_EXPIRED")


class TestBatches:
    def test_a_batch_get_answers_every_key_in_order(self, stub: Stub) -> None:
        keys = [put(stub, f"http://192.0.2.{host}:80").key for host in (1, 2)]
        wanted = [keys[1], "missing", keys[0], keys[1]]
        results = stub.BatchGet(pb.BatchGetRequest(keys=wanted), timeout=DEADLINE).results
        assert [result.entry.key for result in results] == [keys[1], "", keys[0], keys[1]]
        assert [result.served_by for result in results] == [1, 0, 1, 1]

    def test_a_batch_of_a_thousand_is_answered_and_one_of_none_too(self, stub: Stub) -> None:
        entries = [pb.CacheEntry(proxy_url=f"http://192.0.2.1:{port}") for port in range(1, 1001)]
        stored = stub.BatchPut(pb.BatchPutRequest(entries=entries), timeout=DEADLINE).results
        keys = [result.stored.key for result in stored]
        assert len(set(keys)) == 1000
        results = stub.BatchGet(pb.BatchGetRequest(keys=keys), timeout=DEADLINE).results
        assert [result.entry.proxy_url for result in results] == [entry.proxy_url for entry in entries]
        assert not stub.BatchPut(pb.BatchPutRequest(), timeout=DEADLINE).results
        assert not stub.BatchGet(pb.BatchGetRequest(), timeout=DEADLINE).results

    def test_a_batch_get_answers_what_has_room_and_says_how_many_keys_it_left(self, stub: Stub) -> None:
        """What clients take by default is 4 MiB, for which eighty of these are too many."""
        keys = [put_large(stub, number) for number in range(100)]
        asked, got = keys, []
        while asked:
            response = stub.BatchGet(pb.BatchGetRequest(keys=asked), timeout=DEADLINE)
            assert response.ByteSize() <= 4 * 2**20
            assert len(response.results) + response.unanswered == len(asked)
            got += [result.entry.key for result in response.results]
            asked = asked[len(response.results) :]
        assert got == keys

    def test_a_batch_get_is_bounded_whatever_stands_before_the_large_ones(self, stub: Stub) -> None:
        large = [put_large(stub, number) for number in range(80)]
        small = put(stub).key
        keys = [small] * 500 + ["missing"] * 200 + large + [small] * 100
        response = stub.BatchGet(pb.BatchGetRequest(keys=keys), timeout=DEADLINE)
        assert response.ByteSize() <= 4 * 2**20
        answered = len(response.results)
        assert 700 < answered < 780
        assert response.unanswered == len(keys) - answered

    def test_a_bad_key_far_behind_is_found_before_anything_is_looked_up(self, stub: Stub) -> None:
        key = put(stub).key
        refusal = refused(stub.BatchGet, pb.BatchGetRequest(keys=[key] * 900 + ["a\nb"]))
        assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ("keys[900]",))
        assert get(stub, key).entry.access_count == 1

    def test_a_bad_entry_of_a_batch_fails_alone_with_its_own_status(self, stub: Stub) -> None:
        entries = [
            pb.CacheEntry(proxy_url="http://192.0.2.1:80"),
            pb.CacheEntry(proxy_url="ftp://192.0.2.1:80"),
            pb.CacheEntry(proxy_url="http://192.0.2.2:80", ttl=Duration(seconds=0)),
            pb.CacheEntry(proxy_url="http://192.0.2.3:80"),
        ]
        results = stub.BatchPut(pb.BatchPutRequest(entries=entries), timeout=DEADLINE).results
        assert [result.WhichOneof("outcome") for result in results] == ["stored", "error", "error", "stored"]
        assert [(result.error.code, result.error.reason, result.error.field) for result in results[1:3]] == [
            (3, "INVALID_PROXY_URL", "proxy_url"),
            (3, "INVALID_TTL", "ttl"),
        ]
        assert list(results[3].stored.stored_in) == EVERY_TIER
        assert len(list_all(stub)) == 2


class TestRemoving:
    def test_a_delete_says_whether_there_was_something(self, stub: Stub) -> None:
        key = put(stub).key
        assert stub.Delete(pb.DeleteRequest(key=key), timeout=DEADLINE).deleted
        assert not stub.Delete(pb.DeleteRequest(key=key), timeout=DEADLINE).deleted
        assert get(stub, key) == pb.GetResponse()

    def test_a_clear_counts_distinct_entries(self, stub: Stub) -> None:
        for host in range(3):
            put(stub, f"http://192.0.2.{host}:80")
        assert stub.Clear(pb.ClearRequest(), timeout=DEADLINE).cleared == 3
        assert stub.Clear(pb.ClearRequest(), timeout=DEADLINE).cleared == 0
        assert list_all(stub) == []

    def test_the_third_failure_evicts(self, stub: Stub) -> None:
        key = put(stub, health_status=pb.HEALTH_STATUS_HEALTHY).key
        request = pb.InvalidateByHealthRequest(key=key)
        outcomes = [stub.InvalidateByHealth(request, timeout=DEADLINE) for _ in range(4)]
        assert [(outcome.found, outcome.evicted, outcome.failure_count) for outcome in outcomes] == [
            (True, False, 1),
            (True, False, 2),
            (True, True, 3),
            (False, False, 0),
        ]
        assert [outcome.health_status for outcome in outcomes] == [pb.HEALTH_STATUS_UNHEALTHY] * 3 + [0]
        assert {outcome.failure_threshold for outcome in outcomes} == {3}
        assert get(stub, key) == pb.GetResponse()


class TestList:
    @pytest.fixture
    def keys(self, stub: Stub) -> list[str]:
        entries = [
            pb.CacheEntry(key=f"key-{number:04}", proxy_url="http://192.0.2.1:80") for number in range(250)
        ]
        stub.BatchPut(pb.BatchPutRequest(entries=entries), timeout=DEADLINE)
        return [entry.key for entry in entries]

    @pytest.mark.parametrize(
        ("asked", "pages"), [(0, [100, 100, 50]), (125, [125, 125]), (1000, [250]), (9999, [250])]
    )
    def test_pages_come_in_key_order_and_the_last_has_no_token(
        self, stub: Stub, keys: list[str], asked: int, pages: list[int]
    ) -> None:
        sizes, found, token = [], [], ""
        while True:
            page = stub.List(pb.ListRequest(page_size=asked, page_token=token), timeout=DEADLINE)
            sizes.append(len(page.entries))
            found += [entry.key for entry in page.entries]
            token = page.next_page_token
            if not token:
                break
        assert (sizes, found) == (pages, keys)

    def test_a_page_that_would_not_fit_into_a_message_ends_early(self, stub: Stub) -> None:
        labels = {
            f"{'name':>64}".replace(" ", str(number % 10)) + str(number): "v" * 256 for number in range(32)
        }
        labels = {name[-64:]: value for name, value in labels.items()}
        entries = [
            pb.CacheEntry(key=f"{number:03}", proxy_url="http://192.0.2.1:80", labels=labels)
            for number in range(500)
        ]
        for start in range(0, 500, 100):
            stub.BatchPut(pb.BatchPutRequest(entries=entries[start : start + 100]), timeout=DEADLINE)
        page = stub.List(pb.ListRequest(page_size=1000), timeout=DEADLINE)
        assert 0 < len(page.entries) < 500
        assert page.ByteSize() < 4 * 1024 * 1024
        assert [entry.key for entry in list_all(stub, page_size=1000)] == [entry.key for entry in entries]

    @pytest.mark.parametrize(
        ("wanted", "found"),
        [
            (pb.ListFilter(source="a"), ["1", "2"]),
            (pb.ListFilter(schemes=["socks5", "https"]), ["2", "3"]),
            (pb.ListFilter(health_statuses=[pb.HEALTH_STATUS_HEALTHY]), ["1"]),
            (pb.ListFilter(health_statuses=[pb.HEALTH_STATUS_HEALTHY, pb.HEALTH_STATUS_UNKNOWN]), ["1", "3"]),
            (pb.ListFilter(labels={"country": "DE"}), ["1", "3"]),
            (pb.ListFilter(labels={"country": "DE", "fast": "yes"}), ["3"]),
            (pb.ListFilter(source="a", labels={"country": "DE"}), ["1"]),
            (pb.ListFilter(source="nobody"), []),
        ],
        ids=lambda value: str(value).replace("\n", " ").strip() if isinstance(value, pb.ListFilter) else "",
    )
    def test_each_set_field_of_the_filter_narrows(
        self, stub: Stub, wanted: pb.ListFilter, found: list[str]
    ) -> None:
        put(stub, "http://192.0.2.1:1", key="1", source="a", labels={"country": "DE"}, health_status=2)
        put(stub, "https://192.0.2.1:2", key="2", source="a", labels={"country": "FR"}, health_status=3)
        put(stub, "socks5://192.0.2.1:3", key="3", labels={"country": "DE", "fast": "yes"})
        assert [entry.key for entry in list_all(stub, filter=wanted, page_size=1)] == found

    def test_credentials_are_listed_only_when_asked_for(self, stub: Stub) -> None:
        put(stub, "http://192.0.2.9:9", key="none")
        (none,) = list_all(stub)
        assert not none.credentials_omitted
        stub.Delete(pb.DeleteRequest(key="none"), timeout=DEADLINE)
        put(stub, username="user", password="hunter2")
        (plain,) = list_all(stub)
        (complete,) = list_all(stub, include_credentials=True)
        assert (plain.username, plain.password, plain.credentials_omitted) == ("", "", True)
        assert not complete.credentials_omitted
        assert (complete.username, complete.password) == ("user", "hunter2")

    def test_what_is_listed_without_its_credentials_and_put_again_keeps_them(self, stub: Stub) -> None:
        put(stub, key="own", username="user", password="hunter2")
        (own,) = list_all(stub)

        own.source = "changed"
        stub.Put(pb.PutRequest(entry=own), timeout=DEADLINE)
        (complete,) = list_all(stub, include_credentials=True)
        assert (complete.source, complete.username, complete.password) == ("changed", "user", "hunter2")

        own.username = "another"
        stub.Put(pb.PutRequest(entry=own), timeout=DEADLINE)
        (complete,) = list_all(stub, include_credentials=True)
        assert (complete.username, complete.password) == ("another", "")

    def test_a_page_of_a_long_search_may_be_empty_and_leads_on(
        self, stub: Stub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            sqlite, "_LAST_OF_SCAN", "SELECT key FROM entries WHERE key > ? ORDER BY key LIMIT 1 OFFSET 2"
        )
        keys = sorted(put(stub, f"http://192.0.2.{number}:1").key for number in range(20))
        [url] = [entry.proxy_url for entry in list_all(stub) if entry.key == keys[10]]
        put(stub, url, source="rare")
        rare = pb.ListFilter(source="rare")
        first = stub.List(pb.ListRequest(filter=rare), timeout=DEADLINE)
        assert not first.entries
        assert first.next_page_token
        assert [entry.key for entry in list_all(stub, filter=rare)] == [keys[10]]
        assert [entry.key for entry in list_all(stub, page_size=2)] == keys

    def test_a_list_is_no_use(self, stub: Stub) -> None:
        key = put(stub).key
        list_all(stub)
        assert get(stub, key).entry.access_count == 1

    def test_a_token_may_be_used_with_another_page_size_and_for_credentials(
        self, stub: Stub, keys: list[str]
    ) -> None:
        token = stub.List(pb.ListRequest(page_size=2), timeout=DEADLINE).next_page_token
        request = pb.ListRequest(page_size=3, page_token=token, include_credentials=True)
        assert [entry.key for entry in stub.List(request, timeout=DEADLINE).entries] == keys[2:5]


def test_the_statistics_add_up(stub: Stub) -> None:
    key = put(stub).key
    get(stub, key)
    get(stub, "missing")
    stub.Delete(pb.DeleteRequest(key=key), timeout=DEADLINE)
    put(stub)
    statistics = stub.GetStats(pb.GetStatsRequest(), timeout=DEADLINE).statistics
    assert (statistics.hits, statistics.misses, statistics.hit_rate) == (1, 1, 0.5)
    assert (statistics.entries, statistics.removals, statistics.stats_subscribers) == (1, 1, 0)
    assert [(tier.tier, tier.backend, tier.entries) for tier in statistics.tiers] == [
        (pb.TIER_L1, "memory", 1),
        (pb.TIER_L2, "jsonl", 1),
        (pb.TIER_L3, "sqlite", 1),
    ]
    assert {tier.state for tier in statistics.tiers} == {pb.TIER_STATE_ACTIVE}
    assert [tier.max_entries for tier in statistics.tiers] == [1000, 5000, 0]
    assert statistics.observed_at.ToMicroseconds() > statistics.started_at.ToMicroseconds()


class TestWhenNoTierWorks:
    """Every tier refuses the write: Put is UNAVAILABLE, and so is each entry of a batch."""

    @pytest.fixture(autouse=True)
    def no_tier_takes_anything(self, manager: CacheManager, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(manager, "store", lambda puts: [Stored((), entry) for entry, _ in puts])

    def test_a_put_is_unavailable(self, stub: Stub) -> None:
        refusal = refused(stub.Put, pb.PutRequest(entry=pb.CacheEntry(proxy_url="http://192.0.2.1:80")))
        assert (refusal.code.name, refusal.reason) == ("UNAVAILABLE", "NO_TIER_AVAILABLE")

    def test_so_is_each_good_entry_of_a_batch(self, stub: Stub) -> None:
        entries = [pb.CacheEntry(proxy_url="http://192.0.2.1:80"), pb.CacheEntry(proxy_url="nonsense")]
        results = stub.BatchPut(pb.BatchPutRequest(entries=entries), timeout=DEADLINE).results
        assert [(result.error.code, result.error.reason) for result in results] == [
            (14, "NO_TIER_AVAILABLE"),
            (3, "INVALID_PROXY_URL"),
        ]
