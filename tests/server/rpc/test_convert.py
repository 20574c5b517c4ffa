"""Messages to entries and back."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from proxystash.models import HealthMonitoring, HealthStatus
from proxystash.v1 import cache_service_pb2 as pb
from proxystash_server.cache import CacheManager, CacheStatistics, LatencySummary, TierState, TierStatistics
from proxystash_server.rpc import convert
from proxystash_server.rpc.errors import Reason, RequestError

CHECKED = datetime(2026, 11, 22, 13, 0, 0, 123456, tzinfo=UTC)


def full_message() -> pb.CacheEntry:
    return pb.CacheEntry(
        key="gateway-7",
        proxy_url="socks5h://gateway.example:1080",
        username="user",
        password="hunter2",
        source="webshare",
        fetch_time=Timestamp(seconds=1_790_000_000, nanos=123_456_000),
        ttl=Duration(seconds=300_000_090, nanos=500_000_000),
        health_status=pb.HEALTH_STATUS_DEGRADED,
        failure_count=2,
        health_monitoring=pb.HealthMonitoring(
            last_health_check=Timestamp(seconds=1_790_000_000, nanos=1000),
            consecutive_health_failures=1,
            consecutive_health_successes=2,
            recovery_attempt=3,
            next_check_time=Timestamp(seconds=1_790_000_300),
            last_health_error="connection reset",
            total_health_checks=2**40,
            total_health_check_failures=5,
        ),
        labels={"country": "DE", "rack": ""},
        max_leases=100,
    )


def test_what_a_client_says_of_an_entry_comes_back_in_a_message(manager: CacheManager) -> None:
    said = full_message()
    entry = convert.read_entry(manager, said)
    answered = pb.CacheEntry()
    convert.fill_entry(answered, entry)
    assert answered.expires_at == Timestamp(seconds=2_090_000_090, nanos=623_456_000)
    assert answered.last_accessed == said.fetch_time
    for set_by_server in ("expires_at", "last_accessed"):
        answered.ClearField(set_by_server)
    assert answered == said


def test_an_entry_in_a_public_message_has_no_credentials_and_all_the_rest(manager: CacheManager) -> None:
    entry = convert.read_entry(manager, full_message())
    public, complete = pb.CacheEntry(), pb.CacheEntry()
    convert.fill_public_entry(public, entry)
    convert.fill_entry(complete, entry)
    assert (public.username, public.password) == ("", "")
    assert (complete.username, complete.password) == ("user", "hunter2")
    complete.ClearField("username")
    complete.ClearField("password")
    assert public == complete


def test_what_only_the_server_sets_is_ignored_in_what_a_client_says(manager: CacheManager) -> None:
    message = full_message()
    message.access_count = 99
    message.evicted_from_l1 = True
    message.version = 17
    message.expires_at.seconds = 1
    message.last_accessed.seconds = 1
    assert convert.read_entry(manager, message) == convert.read_entry(manager, full_message())


def test_what_only_the_server_knows_is_told(manager: CacheManager) -> None:
    entry = convert.read_entry(manager, full_message())
    used = entry.model_copy(update={"access_count": 5, "evicted_from_l1": True, "last_accessed": CHECKED})
    message = pb.CacheEntry()
    convert.fill_entry(message, used)
    assert (message.access_count, message.evicted_from_l1) == (5, True)
    assert message.last_accessed.ToDatetime(UTC) == CHECKED


def test_an_unset_status_is_unknown_and_unset_times_are_filled_in(manager: CacheManager) -> None:
    entry = convert.read_entry(manager, pb.CacheEntry(proxy_url="http://192.0.2.1:80", source="short-lived"))
    assert entry.health_status is HealthStatus.UNKNOWN
    assert entry.health_monitoring is None
    assert entry.ttl_seconds == 60
    assert entry.fetch_time_us > 1_700_000_000_000_000


@given(st.integers(min_value=0, max_value=200_000_000_000_000_000))
def test_a_moment_survives_the_way_out_and_in(microseconds: int) -> None:
    message = Timestamp()
    convert.fill_timestamp(message, microseconds)
    assert message.ToMicroseconds() == microseconds
    assert convert.read_timestamp(message, "fetch_time", Reason.INVALID_FETCH_TIME) == microseconds


@pytest.mark.parametrize(
    "message",
    [
        Timestamp(nanos=-1),
        Timestamp(nanos=1_000_000_000),
        Timestamp(seconds=253_402_300_800),
        Timestamp(seconds=-62_135_596_801),
    ],
    ids=str,
)
def test_an_invalid_timestamp_is_refused_with_its_field(message: Timestamp) -> None:
    with pytest.raises(RequestError) as caught:
        convert.read_timestamp(message, "fetch_time", Reason.INVALID_FETCH_TIME)
    assert caught.value.failure.field == "fetch_time"


@pytest.mark.parametrize(
    "message",
    [
        Duration(nanos=1_000_000_000),
        Duration(nanos=-1_000_000_000),
        Duration(seconds=1, nanos=-1),
        Duration(seconds=-1, nanos=1),
        Duration(seconds=315_576_000_001),
    ],
    ids=str,
)
def test_an_invalid_duration_is_refused_with_its_field(message: Duration) -> None:
    with pytest.raises(RequestError) as caught:
        convert.read_duration(message, "ttl", Reason.INVALID_TTL)
    assert caught.value.failure.field == "ttl"


@pytest.mark.parametrize("status", HealthStatus)
def test_every_health_status_has_a_number_of_its_own(status: HealthStatus) -> None:
    assert convert.read_health_status(convert.health_status_number(status), "health_status") is status


def test_a_snapshot_keeps_every_count() -> None:
    def tier(base: int, state: TierState) -> TierStatistics:
        counts: dict[str, Any] = {
            name: base + place
            for place, name in enumerate(
                (
                    "entries", "max_entries", "hits", "misses", "evictions_capacity", "evictions_ttl",
                    "evictions_health", "evictions_corruption", "errors",
                )
            )
        }  # fmt: skip
        latency = LatencySummary(p50_us=1.5, p99_us=2_000_000.25, max_us=base)
        return TierStatistics(
            backend=f"backend-{base}", state=state, read_latency=latency, write_latency=latency, **counts
        )

    statistics = CacheStatistics(
        observed_at_us=1_790_000_000_000_001,
        started_at_us=1_780_000_000_000_000,
        l1_stats=tier(100, TierState.ACTIVE),
        l2_stats=tier(200, TierState.DEGRADED),
        l3_stats=tier(300, TierState.DISABLED),
        hits=3,
        misses=1,
        entries=5,
        promotions=6,
        demotions=7,
        removals=8,
    )
    message = convert.statistics_message(statistics, stats_subscribers=9, watch_subscribers=10)
    assert not message.HasField("pool")
    assert message.observed_at.ToMicroseconds() == statistics.observed_at_us
    assert message.started_at.ToMicroseconds() == statistics.started_at_us
    assert (message.hits, message.misses, message.hit_rate, message.entries) == (3, 1, 0.75, 5)
    assert (message.promotions, message.demotions, message.removals) == (6, 7, 8)
    assert (message.stats_subscribers, message.watch_subscribers) == (9, 10)
    assert [tier.tier for tier in message.tiers] == [pb.TIER_L1, pb.TIER_L2, pb.TIER_L3]
    assert [tier.state for tier in message.tiers] == [
        pb.TIER_STATE_ACTIVE,
        pb.TIER_STATE_DEGRADED,
        pb.TIER_STATE_DISABLED,
    ]
    for sent, counted in zip(message.tiers, statistics.tiers, strict=True):
        for name in type(counted).model_fields.keys() - {"state", "read_latency", "write_latency"}:
            assert getattr(sent, name) == getattr(counted, name), name
        assert sent.hit_rate == counted.hit_rate
        assert sent.read_latency.p50 == Duration(nanos=1500)
        assert sent.write_latency.p99 == Duration(seconds=2, nanos=250)
        assert sent.read_latency.max == Duration(nanos=counted.entries * 1000)


def test_a_naive_check_time_is_taken_as_utc(manager: CacheManager) -> None:
    monitoring = HealthMonitoring(last_health_check=CHECKED.replace(tzinfo=None))
    entry = manager.new_entry("http://192.0.2.1:80", health_monitoring=monitoring)
    message = pb.CacheEntry()
    convert.fill_entry(message, entry)
    assert message.health_monitoring.last_health_check.ToDatetime(UTC) == CHECKED
