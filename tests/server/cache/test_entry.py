"""CacheEntry: one cached proxy, valid and immutable, made like proxywhirl's."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from pydantic import SecretStr

from proxystash_server.cache import CacheEntry, HealthMonitoring, HealthStatus, InvalidEntryError
from tests.server.cache.support import PASSWORD, USERNAME, stored
from tests.server.cache.tier_contract import MONITORING, everything_set

NOW = datetime(2026, 1, 2, 3, 4, 5, 678_901, UTC)


def made(**fields: Any) -> CacheEntry:
    return CacheEntry(
        **{
            "key": "key-1",
            "proxy_url": "http://192.0.2.1:8080",
            "source": "shop",
            "fetch_time": NOW,
            "ttl_seconds": 60,
            **fields,
        }
    )


# -- construction


def test_it_is_made_from_datetimes_as_with_proxywhirl() -> None:
    entry = CacheEntry(
        key="key-1",
        proxy_url="http://proxy.example.com:8080",
        source="fetched",
        fetch_time=NOW,
        last_accessed=NOW + timedelta(seconds=5),
        ttl_seconds=3600,
        expires_at=NOW + timedelta(seconds=3600),
        username=SecretStr(USERNAME),
        password=SecretStr(PASSWORD),
        access_count=3,
        health_status=HealthStatus.HEALTHY,
        failure_count=1,
        evicted_from_l1=True,
        last_health_check=NOW,
        consecutive_health_failures=1,
        consecutive_health_successes=2,
        recovery_attempt=3,
        next_check_time=NOW + timedelta(minutes=1),
        last_health_error="timeout",
        total_health_checks=10,
        total_health_check_failures=4,
    )
    assert entry.fetch_time == NOW
    assert entry.last_accessed == NOW + timedelta(seconds=5)
    assert (entry.ttl_seconds, entry.expires_at) == (3600, NOW + timedelta(hours=1))
    assert entry.username == SecretStr(USERNAME)
    assert entry.password == SecretStr(PASSWORD)
    assert (entry.access_count, entry.failure_count, entry.evicted_from_l1) == (3, 1, True)
    assert entry.is_healthy
    assert (entry.last_health_check, entry.next_check_time) == (NOW, NOW + timedelta(minutes=1))
    assert (entry.recovery_attempt, entry.last_health_error) == (3, "timeout")
    assert (entry.total_health_checks, entry.total_health_check_failures) == (10, 4)
    assert entry.health_monitoring == HealthMonitoring(
        last_health_check=NOW,
        consecutive_health_failures=1,
        consecutive_health_successes=2,
        recovery_attempt=3,
        next_check_time=NOW + timedelta(minutes=1),
        last_health_error="timeout",
        total_health_checks=10,
        total_health_check_failures=4,
    )


def test_little_is_needed() -> None:
    before = datetime.now(UTC)
    entry = CacheEntry("key-1", "http://192.0.2.1:8080", ttl_seconds=60)
    assert before <= entry.fetch_time <= datetime.now(UTC)
    assert entry.expires_at == entry.fetch_time + timedelta(seconds=60)
    assert entry.last_accessed == entry.fetch_time
    assert entry.health_status is HealthStatus.UNKNOWN
    assert (entry.source, entry.access_count, entry.failure_count) == ("", 0, 0)
    assert (entry.username, entry.password, entry.health_monitoring) == (None, None, None)
    assert entry.labels == {}


def test_its_ttl_follows_from_its_time_of_expiry() -> None:
    entry = made(ttl_seconds=None, expires_at=NOW + timedelta(seconds=90, microseconds=500_000))
    assert (entry.ttl_seconds, entry.ttl_us) == (90, 90_500_000)


def test_a_naive_datetime_is_utc() -> None:
    naive = datetime(2026, 1, 2, 3, 4, 5, 678_901)  # noqa: DTZ001 -- that is the point
    entry = made(
        fetch_time=naive,
        last_accessed=naive,
        ttl_seconds=None,
        expires_at=naive + timedelta(seconds=60),
        last_health_check=naive,
        next_check_time=naive,
    )
    aware = made(last_accessed=NOW, last_health_check=NOW, next_check_time=NOW)
    assert entry == aware
    for name in ("fetch_time", "last_accessed", "expires_at", "last_health_check", "next_check_time"):
        assert getattr(entry, name).tzinfo is not None
        assert getattr(entry, name) == getattr(aware, name)


def test_a_datetime_of_another_zone_is_the_same_moment() -> None:
    elsewhere = timezone(timedelta(hours=5, minutes=30))
    assert made(fetch_time=NOW.astimezone(elsewhere)) == made()
    assert made(fetch_time=NOW.astimezone(elsewhere)).fetch_time.utcoffset() == timedelta(0)


def test_times_are_kept_to_the_microsecond() -> None:
    assert made().fetch_time == NOW
    assert made().fetch_time_us % 1_000_000 == 678_901


def test_health_fields_are_reachable_without_monitoring_too() -> None:
    entry = made()
    assert entry.consecutive_health_failures == 0
    assert entry.last_health_check is None
    with pytest.raises(AttributeError, match="colour"):
        _ = entry.colour  # type: ignore[attr-defined]  # that is the point


def test_a_url_with_userinfo_gives_the_credentials() -> None:
    entry = made(proxy_url=f"HTTP://{USERNAME}:{PASSWORD}@Proxy.Example.com:8080/")
    assert entry.proxy_url == "http://proxy.example.com:8080"
    assert entry.username == SecretStr(USERNAME)
    assert entry.password == SecretStr(PASSWORD)


# -- immutability and equality


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: setattr(entry, "source", "x"),
        lambda entry: setattr(entry, "access_count", 1),
        lambda entry: setattr(entry, "anything", 1),
        lambda entry: delattr(entry, "source"),
        lambda entry: entry.labels.update(country="FR"),
        lambda entry: entry.labels.__setitem__("country", "FR"),
    ],
    ids=["field", "count", "unknown", "delete", "labels", "label"],
)
def test_nothing_about_it_can_be_changed(change: Callable[[CacheEntry], object]) -> None:
    entry = made(labels={"country": "DE"})
    with pytest.raises((AttributeError, TypeError)):
        change(entry)
    assert entry == made(labels={"country": "DE"})


def test_it_does_not_share_its_labels_with_who_made_it() -> None:
    labels = {"country": "DE"}
    entry = made(labels=labels)
    labels["country"] = "FR"
    assert entry.labels == {"country": "DE"}


def test_a_changed_copy_leaves_the_original_alone() -> None:
    entry = made(labels={"country": "DE"}, username="u", password="p")
    changed = entry.model_copy(update={"failure_count": 2, "health_status": HealthStatus.UNHEALTHY})
    assert (changed.failure_count, changed.health_status) == (2, HealthStatus.UNHEALTHY)
    assert entry.failure_count == 0
    assert changed.model_copy(update={"failure_count": 0, "health_status": HealthStatus.UNKNOWN}) == entry
    assert entry.model_copy() == entry


def test_a_copy_with_another_ttl_or_fetch_time_expires_accordingly() -> None:
    entry = made()
    assert entry.model_copy(update={"ttl_seconds": 10}).expires_at == NOW + timedelta(seconds=10)
    later = NOW + timedelta(days=1)
    assert entry.model_copy(update={"fetch_time": later}).expires_at == later + timedelta(seconds=60)


def test_equality_is_that_of_every_field() -> None:
    entry = everything_set()
    assert entry == everything_set()
    assert hash(entry) == hash(everything_set())
    others: dict[str, Any] = {
        "key": "other",
        "proxy_url": "http://192.0.2.9:1",
        "source": "other",
        "fetch_time": NOW,
        "expires_at": entry.expires_at + timedelta(seconds=1),
        "last_accessed": NOW,
        "username": "other",
        "password": "other",
        "access_count": 99,
        "health_status": HealthStatus.DEAD,
        "failure_count": 99,
        "evicted_from_l1": False,
        "health_monitoring": None,
        "labels": {},
    }
    for name, value in others.items():
        assert entry.model_copy(update={name: value}) != entry, name
    assert entry != "an entry"
    assert stored("a") != stored("b")


def test_the_number_of_its_write_is_no_part_of_it() -> None:
    assert stored("a", version=1) == stored("a", version=2)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_it_can_be_copied(duplicate: Callable[[CacheEntry], CacheEntry]) -> None:
    entry = everything_set()
    assert duplicate(entry) == entry


# -- what it shows


def test_no_text_of_it_shows_a_credential() -> None:
    entry = made(username=USERNAME, password=PASSWORD, health_monitoring=MONITORING)
    for text in (repr(entry), str(entry), f"{entry}", repr([entry])):
        assert PASSWORD not in text
        assert USERNAME not in text
    assert "key-1" in repr(entry)
    assert "http://192.0.2.1:8080" in repr(entry)
    assert PASSWORD not in repr(made(key=f"{USERNAME}:{PASSWORD}@192.0.2.1"))


def test_it_knows_whether_it_has_expired_by_the_wall_clock() -> None:
    now = datetime.now(UTC)
    assert not made(fetch_time=now, ttl_seconds=60).is_expired
    assert made(fetch_time=now - timedelta(seconds=61), ttl_seconds=60).is_expired


@pytest.mark.parametrize("status", HealthStatus)
def test_only_a_healthy_one_is_healthy(status: HealthStatus) -> None:
    assert made(health_status=status).is_healthy is (status is HealthStatus.HEALTHY)
    assert made(health_status=status.value).health_status is status


# -- as plain values, and as bytes

# The fields of proxywhirl's entry.
OF_PROXYWHIRL = {
    "key",
    "proxy_url",
    "username",
    "password",
    "source",
    "fetch_time",
    "last_accessed",
    "access_count",
    "ttl_seconds",
    "expires_at",
    "health_status",
    "failure_count",
    "evicted_from_l1",
    "last_health_check",
    "consecutive_health_failures",
    "consecutive_health_successes",
    "recovery_attempt",
    "next_check_time",
    "last_health_error",
    "total_health_checks",
    "total_health_check_failures",
}


def entries() -> list[CacheEntry]:
    return [
        made(),
        everything_set("key-1"),
        made(ttl_seconds=None, expires_at=NOW - timedelta(hours=1)),
        made(ttl_seconds=None, expires_at=NOW + timedelta(microseconds=1_500_001)),
        stored("key-1", version=7, username=USERNAME),
    ]


@pytest.mark.parametrize("entry", entries())
def test_what_is_dumped_makes_an_equal_entry(entry: CacheEntry) -> None:
    dumped = entry.model_dump()
    assert dumped.keys() == OF_PROXYWHIRL | {"labels", "max_leases"}
    assert all(dumped[name] == getattr(entry, name) for name in dumped)
    assert CacheEntry.model_validate(dumped) == entry
    assert CacheEntry.model_validate(entry) is entry


@pytest.mark.parametrize("entry", entries())
def test_a_dump_for_json_masks_credentials_and_makes_an_equal_entry_without_them(entry: CacheEntry) -> None:
    text = json.dumps(entry.model_dump(mode="json"))
    assert USERNAME not in text
    assert PASSWORD not in text
    fields = json.loads(text)
    for name in ("username", "password"):
        if getattr(entry, name) is not None:
            assert fields[name] == "***"
            with pytest.raises(InvalidEntryError, match="is masked") as caught:
                CacheEntry.model_validate(fields)
            assert caught.value.field == name
            fields[name] = None
    without = entry.model_copy(update={"username": None, "password": None})
    assert CacheEntry.model_validate(fields) == without


def test_a_dump_can_be_changed_without_changing_the_entry() -> None:
    entry = everything_set("key-1")
    entry.model_dump()["labels"]["country"] = "elsewhere"
    assert entry == everything_set("key-1")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"key": ""}, "key"),
        ({"failure_count": -1}, "failure_count"),
        ({"fetch_time": "yesterday"}, "fetch_time"),
        ({"next_check_time": "soon"}, "next_check_time"),
        ({"health_status": "fine"}, "health_status"),
    ],
)
def test_what_is_validated_is_checked(fields: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidEntryError) as caught:
        CacheEntry.model_validate({**made().model_dump(), **fields})
    assert caught.value.field == field


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(TypeError, match="'colour'"):
        CacheEntry.model_validate({**made().model_dump(), "colour": "red"})


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("entry", [*entries(), made(health_monitoring=HealthMonitoring())])
def test_it_can_be_pickled(entry: CacheEntry, protocol: int) -> None:
    loaded = pickle.loads(pickle.dumps(entry, protocol))
    assert loaded == entry
    assert type(loaded) is CacheEntry
    # What is the cache's own does not go along: nothing is taken for stored where it is not.
    assert (loaded.version, loaded.sealed, loaded.encoded) == (0, None, None)
