"""Records as entries: what fields may be called and hold, and what a record needs."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from proxystash import (
    CacheEntry,
    HealthMonitoring,
    HealthStatus,
    Rejected,
    cache_key,
    read_proxy_file,
)

from .reading import NOW, Write, address_of, entry_of, read, read_record


def test_a_record_of_a_checkers_json_becomes_an_entry_with_its_health_and_country(write: Write) -> None:
    record = {
        "ip": "203.0.113.7",
        "port": 1080,
        "protocol": "socks5",
        "status": "healthy",
        "response_time": 7268.39,
        "success_rate": 100.0,
        "source": "user",
        "last_checked": "2026-01-01T18:26:26.792266",
        "created_at": "2026-01-01T18:26:26.823066",
        "country": "Germany",
        "country_code": "DE",
        "continent_code": None,
    }
    path = write("rich.json", json.dumps({"generated_at": "x", "total": 1, "proxies": [record]}))

    (outcome,) = read(path)

    assert outcome == CacheEntry(
        proxy_url="socks5://203.0.113.7:1080",
        key=cache_key("socks5://203.0.113.7:1080"),
        source="user",
        health_status=HealthStatus.HEALTHY,
        health_monitoring=HealthMonitoring(
            last_health_check=datetime(2026, 1, 1, 18, 26, 26, 792266, tzinfo=UTC)
        ),
        labels={"country": "DE"},
    )


@pytest.mark.parametrize("country", ["", None])
def test_an_empty_country_makes_no_label(write: Write, country: str | None) -> None:
    assert entry_of(read_record(write, url="http://h:1", country_code=country)).labels == {}


def test_a_country_label_counts_for_more_than_a_country_code(write: Write) -> None:
    outcome = read_record(write, url="http://h:1", country_code="DE", labels={"country": "FR", "tier": "a"})

    assert entry_of(outcome).labels == {"country": "FR", "tier": "a"}


@pytest.mark.parametrize("name", ["proxy_url", "url", "proxy"])
def test_the_url_may_have_several_names(write: Write, name: str) -> None:
    assert address_of(read_record(write, **{name: "HTTP://ann:pw@H:1/"})) == ("http://h:1", "ann", "pw")


@pytest.mark.parametrize(
    ("record", "url"),
    [
        ({"protocol": "http", "ip": "203.0.113.7", "port": 80}, "http://203.0.113.7:80"),
        ({"scheme": "SOCKS4", "host": "h.example", "port": "1080"}, "socks4://h.example:1080"),
        ({"protocol": "https", "host": "2001:db8::1", "port": 443}, "https://[2001:db8::1]:443"),
        ({"protocol": "https", "host": "[2001:db8::1]", "port": 443}, "https://[2001:db8::1]:443"),
        ({"protocol": "socks5", "proxy": "h:1"}, "socks5://h:1"),
        ({"proxy": "h:1"}, "http://h:1"),
    ],
)
def test_the_url_is_put_together_from_its_parts(write: Write, record: dict[str, object], url: str) -> None:
    assert entry_of(read_record(write, **record)).proxy_url == url


def test_credentials_beside_the_url_belong_to_the_entry_and_its_key(write: Write) -> None:
    outcome = read_record(write, url="http://h:1", username="ann", password=" p:w ")

    assert address_of(outcome) == ("http://h:1", "ann", " p:w ")
    assert entry_of(outcome).key == cache_key("http://h:1", "ann")


def test_a_records_own_key_is_kept(write: Write) -> None:
    assert entry_of(read_record(write, url="http://h:1", key="mine")).key == "mine"


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"ttl_seconds": 90.5}, (None, 90.5, None)),
        ({"ttl": "90"}, (None, 90, None)),
        ({"fetch_time": "2026-01-02T03:00:00Z"}, ("2026-01-02T03:00:00+00:00", None, None)),
        ({"fetch_time": "2026-01-02T04:00:00+01:00"}, ("2026-01-02T03:00:00+00:00", None, None)),
        ({"fetch_time": "2026-01-02 03:00:00"}, ("2026-01-02T03:00:00+00:00", None, None)),
        ({"fetch_time": 1767322800.25}, ("2026-01-02T03:00:00.250000+00:00", None, None)),
        ({"fetch_time": "1767322800"}, ("2026-01-02T03:00:00+00:00", None, None)),
        (
            {"fetch_time": "2026-01-02T03:00:00Z", "ttl": 3600},
            ("2026-01-02T03:00:00+00:00", 3600, "2026-01-02T04:00:00+00:00"),
        ),
        (
            {"expires_at": "2026-01-02T04:00:00Z", "ttl": 3600},
            ("2026-01-02T03:00:00+00:00", 3600, "2026-01-02T04:00:00+00:00"),
        ),
        (
            {"expires_at": "2026-01-02T03:05:05Z"},
            ("2026-01-02T03:04:05+00:00", 60, "2026-01-02T03:05:05+00:00"),
        ),
        (
            {"fetch_time": "2026-01-02T03:00:00Z", "expires_at": "2026-01-02T04:00:00Z"},
            ("2026-01-02T03:00:00+00:00", 3600, "2026-01-02T04:00:00+00:00"),
        ),
    ],
)
def test_a_lifetime_is_worked_out_from_what_is_known(
    write: Write, times: dict[str, object], expected: tuple[str | None, float | None, str | None]
) -> None:
    entry = entry_of(read_record(write, url="http://h:1", **times))

    fetch_time, ttl, expires_at = expected
    assert entry.fetch_time == (fetch_time and datetime.fromisoformat(fetch_time))
    assert entry.ttl == (ttl and timedelta(seconds=ttl))
    assert entry.expires_at == (expires_at and datetime.fromisoformat(expires_at))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "no proxy_url"),
        ({"url": ""}, "no proxy_url"),
        ({"url": "http://h"}, "no port"),
        ({"url": 5}, "not a valid IPv4 address"),
        ({"url": ["http://h:1"]}, "url is not text"),
        ({"protocol": "http", "ip": "h"}, "no port"),
        ({"protocol": "http", "ip": "h", "port": 0}, "port is not a number from 1 to 65535"),
        ({"protocol": "http", "ip": "h", "port": 80.5}, "port is not a whole number"),
        ({"protocol": "http", "ip": "h", "port": True}, "port is not a whole number"),
        ({"protocol": [5], "ip": "h", "port": 1}, "protocol is not text"),
        ({"protocol": "ftp", "ip": "h", "port": 1}, "protocol is none of http"),
        ({"protocol": "socks", "ip": "h", "port": 1}, "socks does not say which"),
        ({"protocol": "http", "ip": "h:2", "port": 1}, "the port in the host is not the one beside it"),
        ({"protocol": "http", "ip": "h:2:3", "port": 1}, "no password after the username"),
        ({"protocol": "socks5", "proxy": "http://h:1"}, "the URL has another scheme than protocol says"),
        ({"proxy": "http://h:1", "ip": "192.0.2.1", "port": 1}, "proxy is elsewhere than ip"),
        ({"url": "http://h:1", "ttl": 0}, "ttl is not greater than zero"),
        ({"url": "http://h:1", "fetch_time": "9999-01-01", "ttl": 1e9}, "years 1 to 9999"),
        ({"url": "http://h:1", "expires_at": "2026-01-02T03:04:05Z"}, "it expired at 2026-01-02T03:04:05Z"),
        ({"url": "http://h:1", "fetch_time": "2026-01-01", "ttl": 60}, "it expired at 2026-01-01T00:01:00Z"),
        (
            {"url": "http://h:1", "fetch_time": "2026-02-01", "expires_at": "2026-01-20"},
            "expires_at is before fetch_time",
        ),
        ({"url": "http://h:1", "key": "k" * 257}, "key is longer than 256 bytes"),
        ({"url": "http://h:1", "key": "a\nb"}, "key contains a control character"),
        ({"url": "http://h\ud800:1"}, "url is not valid Unicode"),
        ({"url": "http://h:1", "username": ["ann"]}, "username is not text"),
        ({"url": "http://h:1", "username": "ann", "password": "\ud800"}, "password is not valid Unicode"),
        ({"url": "http://ann@h:1", "username": "bob"}, "the username in the URL is not the one beside it"),
        ({"url": "http://h:1", "username": "a\0b"}, "username contains a control character"),
    ],
)
def test_a_record_that_is_no_usable_proxy_is_skipped_with_its_reason(
    write: Write, record: dict[str, object], reason: str
) -> None:
    outcome = read_record(write, **record)

    assert isinstance(outcome, Rejected)
    assert (outcome.where, outcome.kind) == ("record 1", "skipped")
    assert reason in outcome.reason


@pytest.mark.parametrize("count", [2**31 - 1, 2**31, 2**63, 10**30, str(2**31)])
def test_a_count_that_is_too_great_is_the_greatest(write: Write, count: object) -> None:
    monitoring = {"recovery_attempt": count, "total_health_checks": count}
    entry = read_record(write, url="http://h:1", failure_count=count, health_monitoring=monitoring)
    assert isinstance(entry, CacheEntry)
    assert entry.health_monitoring is not None
    assert entry.failure_count == entry.health_monitoring.recovery_attempt == 2**31 - 1
    assert entry.health_monitoring.total_health_checks == min(int(str(count)), 2**63 - 1)


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"health_status": "fine"}, "health_status"),
        ({"status": "active"}, "status"),
        ({"status": 200}, "status"),
        ({"status": True}, "status"),
        ({"ttl_seconds": "soon"}, "ttl_seconds"),
        ({"ttl": float("nan")}, "ttl"),
        ({"ttl": 1e300}, "ttl"),
        ({"fetch_time": "yesterday"}, "fetch_time"),
        ({"fetch_time": 1e300}, "fetch_time"),
        ({"fetch_time": 10**400}, "fetch_time"),
        ({"fetch_time": True}, "fetch_time"),
        ({"lastChecked": "5 minutes ago"}, "lastChecked"),
        ({"failure_count": -1}, "failure_count"),
        ({"failure_count": "some"}, "failure_count"),
        ({"labels": ["a"]}, "labels"),
        ({"labels": {"a": 1}}, "labels"),
        ({"health_monitoring": 1}, "health_monitoring"),
        ({"health_monitoring": {"recovery_attempt": "x"}}, "recovery_attempt"),
        ({"source": "\ud800"}, "source"),
        ({"source": ["a"]}, "source"),
        ({"country_code": 840}, "country_code"),
        ({"country": "Germany"}, "country"),
        ({"geolocation": {"country": 49}}, "country"),
    ],
)
def test_what_stands_beside_a_proxy_and_cannot_be_read_costs_that_field_and_is_counted(
    write: Write, record: dict[str, Any], name: str
) -> None:
    reader = read_proxy_file(write("one.json", json.dumps([record | {"url": "http://h:1"}])), now=NOW)

    (outcome,) = reader

    assert outcome == (
        CacheEntry("http://h:1", cache_key("http://h:1"), health_monitoring=HealthMonitoring())
        if isinstance(record.get("health_monitoring"), dict)
        else CacheEntry("http://h:1", cache_key("http://h:1"))
    )
    assert reader.notices == {f"{name} could not be read and was left out": 1}


@pytest.mark.parametrize(
    ("record", "address"),
    [
        ({"port": "8080.0"}, ("http://h:8080", None, None)),
        ({"port": 8080.0}, ("http://h:8080", None, None)),
        ({"port": " 8080 "}, ("http://h:8080", None, None)),
        ({"port": 8080, "ip": " h "}, ("http://h:8080", None, None)),
        ({"port": 8080, "username": 12345, "password": 67890}, ("http://h:8080", "12345", "67890")),
        ({"port": 8080, "protocol": "SOCKS 5"}, ("socks5://h:8080", None, None)),
        ({"port": 8080, "protocol": ["socks5"]}, ("socks5://h:8080", None, None)),
        ({"port": 8080, "protocol": "ssl"}, ("https://h:8080", None, None)),
        ({"port": 8080, "url": "https://list.example/"}, ("http://h:8080", None, None)),
        ({"port": 8080, "url": "http://ann:pw@h:8080"}, ("http://h:8080", "ann", "pw")),
    ],
)
def test_what_lists_write_carelessly_is_read(
    write: Write, record: dict[str, Any], address: tuple[str, str | None, str | None]
) -> None:
    assert address_of(read_record(write, **({"ip": "h", "protocol": "http"} | record))) == address


@pytest.mark.parametrize(
    ("time", "moment"),
    [
        (1714472346, "2024-04-30T10:19:06+00:00"),
        (1717243400123, "2024-06-01T12:03:20.123000+00:00"),
        ("2024-06-10 09:01:55 UTC", "2024-06-10T09:01:55+00:00"),
    ],
)
def test_times_are_read_as_lists_write_them(write: Write, time: object, moment: str) -> None:
    monitoring = entry_of(read_record(write, url="http://h:1", last_checked=time)).health_monitoring

    assert monitoring == HealthMonitoring(last_health_check=datetime.fromisoformat(moment))


@pytest.mark.parametrize(
    ("ttl", "seconds"),
    [("1h", 3600), ("15 min", 900), ("90s", 90), ("7d", 604800), ("500ms", 0.5), ("90", 90)],
)
def test_a_ttl_may_have_a_unit(write: Write, ttl: str, seconds: float) -> None:
    assert entry_of(read_record(write, url="http://h:1", ttl=ttl)).ttl == timedelta(seconds=seconds)


def test_of_records_with_the_same_key_the_first_usable_one_counts(write: Write) -> None:
    lines = [
        {"url": "http://h:1", "fetch_time": 1, "ttl": 1},
        {"url": "http://h:1", "source": "first"},
        {"url": "http://ann@h:1"},
        {"url": "HTTP://H:1/", "source": "second"},
    ]
    path = write("a.jsonl", "\n".join(map(json.dumps, lines)))

    expired, first, other, duplicate = read(path)

    assert isinstance(expired, Rejected)
    assert entry_of(first).source == "first"
    assert entry_of(other).username == "ann"
    assert duplicate == Rejected("line 4", "duplicate of line 2", "skipped")
