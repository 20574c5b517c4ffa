"""Both clients against a real server."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from proxystash import (
    CacheEntry,
    EntryError,
    HealthMonitoring,
    HealthStatus,
    InvalidArgumentError,
    NotFoundError,
    PutMode,
    PutResult,
    Tier,
    TierState,
    cache_key,
)
from tests.support.server import running_server

from .conftest import AnyClient, Connect

SECRET = "s3cr3t-p4ss"


@pytest.fixture
def client(connect: Connect, target: str) -> AnyClient:
    return connect(target, timeout=60)


def proxies(count: int, **fields: object) -> list[CacheEntry]:
    return [replace(CacheEntry(f"http://h:{port}"), **fields) for port in range(1, count + 1)]  # type: ignore[arg-type]


def test_what_is_put_is_got_back_with_everything_that_was_said(client: AnyClient) -> None:
    now = (datetime.now(UTC) - timedelta(seconds=1)).replace(microsecond=123456)
    entry = CacheEntry(
        "SOCKS5://Gw.Example:1080/",
        username="ann",
        password=SECRET,
        source="a provider",
        fetch_time=now - timedelta(minutes=1),
        ttl=timedelta(hours=2),
        health_status=HealthStatus.DEGRADED,
        failure_count=1,
        health_monitoring=HealthMonitoring(
            last_health_check=now,
            consecutive_health_failures=1,
            consecutive_health_successes=2,
            recovery_attempt=3,
            next_check_time=now + timedelta(hours=1),
            last_health_error="timed out",
            total_health_checks=4,
            total_health_check_failures=5,
        ),
        labels={"country": "DE", "größe": "ß"},
        max_leases=100,
    )

    stored = client.put(entry)
    hit = client.get(stored.key)

    expires_at = now - timedelta(minutes=1) + timedelta(hours=2)
    key = cache_key("socks5://gw.example:1080", "ann")
    assert stored == PutResult(key, expires_at, (Tier.L1, Tier.L2, Tier.L3))
    assert hit is not None
    assert hit.served_by is Tier.L1
    assert hit.entry.access_count == 1
    assert hit.entry.last_accessed is not None
    assert hit.entry.last_accessed >= now
    assert hit.entry == replace(
        entry,
        proxy_url="socks5://gw.example:1080",
        key=key,
        expires_at=expires_at,
        access_count=1,
        last_accessed=hit.entry.last_accessed,
        version=hit.entry.version,
    )
    assert hit.entry.version > 0
    assert SECRET not in repr(hit)


def test_userinfo_in_a_url_becomes_username_and_password(client: AnyClient) -> None:
    stored = client.put(CacheEntry(f"http://ann:{SECRET}@h:1"))

    hit = client.get(cache_key("http://h:1", "ann"))

    assert stored.key == cache_key(f"http://ann:{SECRET}@h:1")
    assert hit is not None
    assert (hit.entry.proxy_url, hit.entry.username, hit.entry.password) == ("http://h:1", "ann", SECRET)


def test_a_miss_is_none(client: AnyClient) -> None:
    assert client.get("nothing") is None


def test_thousands_of_entries_are_put_and_got_in_order(client: AnyClient) -> None:
    entries = proxies(2345)

    outcomes = client.put_many(iter(entries))
    keys = [outcome.key for outcome in outcomes if isinstance(outcome, PutResult)]
    hits = client.get_many(key for pair in zip(keys, keys, strict=True) for key in (pair[0], pair[1] + "x"))

    assert keys == [cache_key(entry.proxy_url) for entry in entries]
    assert [hit and hit.entry.proxy_url for hit in hits[::2]] == [entry.proxy_url for entry in entries]
    assert set(hits[1::2]) == {None}
    assert client.put_many([]) == []
    assert client.get_many([]) == []


def test_more_than_a_message_holds_is_put_and_got(client: AnyClient) -> None:
    """Given 20 MB of entries with all the labels there may be, then put_many and get_many still work."""
    labels = {f"{number:064}": "v" * 256 for number in range(32)}
    entries = proxies(1900, labels=labels)

    outcomes = client.put_many(entries)
    hits = client.get_many(cache_key(entry.proxy_url) for entry in entries)

    assert all(isinstance(outcome, PutResult) for outcome in outcomes)
    assert all(hit is not None and hit.entry.labels == labels for hit in hits)
    assert sum(1 for _ in client.list(page_size=1000)) == 1900


def test_a_bad_entry_among_many_costs_only_itself(client: AnyClient) -> None:
    entries = proxies(1500)
    entries[1200] = CacheEntry(f"http://ann:{SECRET}@h")

    outcomes = client.put_many(entries)

    bad = outcomes.pop(1200)
    assert isinstance(bad, EntryError)
    assert (bad.code, bad.reason, bad.field) == ("INVALID_ARGUMENT", "INVALID_PROXY_URL", "proxy_url")
    assert SECRET not in repr(bad)
    assert all(isinstance(outcome, PutResult) for outcome in outcomes)
    assert client.stats().entries == 1499


@pytest.mark.parametrize(
    ("entry", "field", "reason"),
    [
        (CacheEntry("nonsense"), "proxy_url", "INVALID_PROXY_URL"),
        (CacheEntry(f"http://ann:{SECRET}@h"), "proxy_url", "INVALID_PROXY_URL"),
        (CacheEntry("http://h:1", source="s" * 129), "source", "INVALID_SOURCE"),
        (CacheEntry("http://h:1", ttl=timedelta(milliseconds=1)), "ttl", "INVALID_TTL"),
        (CacheEntry("http://h:1", key="k" * 257), "key", "INVALID_KEY"),
    ],
)
def test_a_bad_entry_is_refused_with_its_field_and_reason(
    client: AnyClient, entry: CacheEntry, field: str, reason: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        client.put(entry)

    assert (caught.value.field, caught.value.reason) == (field, reason)
    assert SECRET not in str(caught.value)
    assert client.stats().entries == 0


@pytest.mark.parametrize("key", ["", "k" * 257, "\ud800"])
def test_a_bad_key_is_refused(client: AnyClient, key: str) -> None:
    for call in (client.get, client.delete, client.invalidate_by_health):
        with pytest.raises(InvalidArgumentError) as caught:
            call(key)
        assert (caught.value.field, caught.value.reason) == ("key", "INVALID_KEY")


def test_a_bad_key_among_thousands_is_named_by_its_position(client: AnyClient) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        client.get_many([*"k" * 1234, ""])

    assert caught.value.field == "keys[1234]"


def test_what_is_deleted_is_gone(client: AnyClient) -> None:
    key = client.put(CacheEntry("http://h:1")).key

    assert client.delete(key) is True
    assert client.get(key) is None
    assert client.delete(key) is False


def test_clear_tells_how_many_there_were(client: AnyClient) -> None:
    client.put_many(proxies(3))

    assert client.clear() == 3
    assert client.clear() == 0
    assert list(client.list()) == []


def test_failures_add_up_to_an_eviction(client: AnyClient) -> None:
    key = client.put(CacheEntry("http://h:1")).key

    results = [client.invalidate_by_health(key) for _ in range(4)]

    assert [(result.found, result.evicted, result.failure_count) for result in results[:3]] == [
        (True, False, 1), (True, False, 2), (True, True, 3),
    ]  # fmt: skip
    assert results[0].health_status is HealthStatus.UNHEALTHY
    assert results[0].failure_threshold == 3
    assert results[3].found is False
    assert client.get(key) is None


def test_a_merge_keeps_what_the_entry_does_not_say(client: AnyClient) -> None:
    key = client.put(
        CacheEntry("http://h:1", source="rich", health_status=HealthStatus.DEGRADED, labels={"country": "DE"})
    ).key
    client.put_many([CacheEntry("http://h:1", labels={"city": "Bonn"})], mode="merge")
    assert client.put(CacheEntry("http://h:1"), mode=PutMode.MERGE).key == key
    found = client.get(key)
    assert found is not None
    assert (found.entry.source, found.entry.health_status) == ("rich", HealthStatus.DEGRADED)
    assert found.entry.labels == {"country": "DE", "city": "Bonn"}


def test_what_is_stored_can_be_left_as_it_is(client: AnyClient) -> None:
    first = client.put(CacheEntry("http://h:1", source="first"), mode=PutMode.IF_ABSENT)
    second = client.put(CacheEntry("http://h:1", source="second"), mode=PutMode.IF_ABSENT)
    assert (first.kept, second.kept) == (False, True)
    assert (second.expires_at, second.stored_in) == (first.expires_at, first.stored_in)
    found = client.get(first.key)
    assert found is not None
    assert found.entry.source == "first"


def test_an_update_changes_fields_by_their_names(client: AnyClient) -> None:
    entry = CacheEntry(
        "http://h:1", username="ann", password="old", source="s", labels={"country": "DE", "city": "Bonn"}
    )
    key = client.put(entry).key
    client.update(key, password=SECRET, labels={"city": None, "rack": "7"})
    client.update(key, source="", health_status=HealthStatus.HEALTHY)
    found = client.get(key)
    assert found is not None
    assert (found.entry.username, found.entry.password) == ("ann", SECRET)
    assert (found.entry.source, found.entry.health_status) == ("", HealthStatus.HEALTHY)
    assert found.entry.labels == {"country": "DE", "rack": "7"}
    assert found.entry.proxy_url == "http://h:1"


def test_an_update_of_nothing_or_of_no_field_is_refused(client: AnyClient) -> None:
    with pytest.raises(NotFoundError) as missing:
        client.update("missing", source="s")
    assert missing.value.reason == "NOT_STORED"
    key = client.put(CacheEntry("http://h:1")).key
    with pytest.raises(TypeError, match="'access_count'"):
        client.update(key, access_count=7)  # type: ignore[call-arg]
    with pytest.raises(InvalidArgumentError) as refused:
        client.update(key, labels={"x" * 65: "y"})
    assert refused.value.field == "labels"
    with pytest.raises(InvalidArgumentError):
        client.put(CacheEntry("http://h:1"), mode="upsert")


def test_what_failures_evict_is_banned_until_it_is_unbanned(client: AnyClient) -> None:
    keys = sorted(result.key for result in client.put_many(proxies(3)) if isinstance(result, PutResult))
    for key in keys:
        outcomes = [client.invalidate_by_health(key) for _ in range(3)]
        assert outcomes[1].banned_until is None
        assert outcomes[2].banned_until is not None
    bans = list(client.bans())
    assert [ban.key for ban in bans] == keys
    assert [(ban.failure_count, ban.bans) for ban in bans] == [(3, 1)] * 3
    assert all(ban.banned_until - ban.last_failure_time == timedelta(hours=1) for ban in bans)
    [again] = client.put_many([CacheEntry("http://h:1")])
    assert isinstance(again, PutResult)
    assert again.banned_until is not None
    found = client.get(again.key)
    assert found is not None
    assert (found.entry.health_status, found.entry.failure_count) == (HealthStatus.UNHEALTHY, 3)
    assert client.unban(again.key)
    assert not client.unban(again.key)
    assert client.put(CacheEntry("http://h:1", health_status=HealthStatus.HEALTHY)).banned_until is None


def test_a_list_goes_through_all_pages_in_key_order(client: AnyClient) -> None:
    client.put_many(proxies(25))

    keys = [entry.key for entry in client.list(page_size=10)]

    assert keys == sorted(cache_key(entry.proxy_url) for entry in proxies(25))


def test_a_list_shows_credentials_only_when_asked(client: AnyClient) -> None:
    client.put(CacheEntry("http://h:1", username="ann", password=SECRET))

    (without,) = client.list()
    (with_them,) = client.list(include_credentials=True)

    assert (without.username, without.password) == (None, None)
    assert (with_them.username, with_them.password) == ("ann", SECRET)


def test_filters_narrow_a_list(client: AnyClient) -> None:
    client.put_many(
        [
            CacheEntry("http://h:1", source="a", health_status=HealthStatus.HEALTHY, labels={"c": "DE"}),
            CacheEntry(
                "http://h:2", source="b", health_status=HealthStatus.DEAD, labels={"c": "DE", "d": "1"}
            ),
            CacheEntry("socks5://h:3", source="b", health_status=HealthStatus.HEALTHY),
        ]
    )

    def ports(**filters: object) -> set[str]:
        return {entry.proxy_url.rpartition(":")[2] for entry in client.list(**filters)}  # type: ignore[arg-type]

    assert ports(source="b") == {"2", "3"}
    assert ports(health=HealthStatus.DEAD) == ports(health="dead") == {"2"}
    assert ports(health=[HealthStatus.DEAD, "healthy"]) == {"1", "2", "3"}
    assert ports(schemes="socks5") == ports(schemes=["socks5", "socks4"]) == {"3"}
    assert ports(labels={"c": "DE"}) == {"1", "2"}
    assert ports(labels={"c": "DE", "d": "1"}) == {"2"}
    assert ports(source="b", health="healthy", labels={"c": "DE"}) == set()


def test_a_filter_that_makes_no_sense_is_refused(client: AnyClient) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        list(client.list(health="fine"))
    assert caught.value.field == "health_status"

    with pytest.raises(InvalidArgumentError) as caught:
        list(client.list(schemes="gopher"))
    assert caught.value.field.startswith("filter.schemes")


def test_statistics_tell_of_every_tier(client: AnyClient) -> None:
    before = client.stats()
    key = client.put(CacheEntry("http://h:1")).key
    client.get_many([key, key, "nothing"])

    after = client.stats()

    assert [tier.tier for tier in after.tiers] == [Tier.L1, Tier.L2, Tier.L3]
    assert [tier.backend for tier in after.tiers] == ["memory", "jsonl", "sqlite"]
    assert {tier.state for tier in after.tiers} == {TierState.ACTIVE}
    assert {tier.entries for tier in after.tiers} == {after.entries} == {1}
    assert (after.hits - before.hits, after.misses - before.misses) == (2, 1)
    assert after.started_at == before.started_at < before.observed_at <= after.observed_at
    assert after.tiers[0].write_latency.max >= after.tiers[0].write_latency.p50 >= timedelta(0)


def test_a_stream_of_statistics_sends_one_snapshot_after_the_other(client: AnyClient) -> None:
    with client.stream_stats(timedelta(milliseconds=100)) as stream:
        updates = [next(stream) for _ in range(3)]

    assert [(update.sequence, update.missed, update.resumed) for update in updates] == [
        (1, 0, False), (2, 0, False), (3, 0, False),
    ]  # fmt: skip
    assert updates[0].statistics.stats_subscribers == 1
    assert updates[0].statistics.observed_at < updates[2].statistics.observed_at


@pytest.mark.parametrize("interval", [timedelta(0), timedelta(milliseconds=99), timedelta(hours=2)])
def test_an_interval_out_of_range_is_refused(client: AnyClient, interval: timedelta) -> None:
    with client.stream_stats(interval) as stream, pytest.raises(InvalidArgumentError) as caught:
        next(stream)

    assert caught.value.field == "interval"


def test_calls_survive_a_restart_of_the_server(connect: Connect, tmp_path: Path) -> None:
    """Given a client of a server that was killed, when one starts again there, then the next call works."""
    with running_server(tmp_path) as server:
        client = connect(server.target, timeout=60)
        key = client.put(CacheEntry("http://h:1", password=SECRET)).key
        server.kill()
        with running_server(tmp_path, "--listen", server.target):
            hit = client.get(key)

    assert hit is not None
    assert hit.entry.password == SECRET
