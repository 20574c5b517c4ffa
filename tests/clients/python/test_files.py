"""Reading proxy files of every format, and writing lines that are read back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxystash import (
    CacheEntry,
    HealthMonitoring,
    HealthStatus,
    ProxyFileError,
    Rejected,
    cache_key,
    entry_to_json,
    read_proxy_file,
)

from .strategies import entries

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SECRET = "s3cr3t-p4ss"

Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


def read(path: Path) -> list[CacheEntry | Rejected]:
    return list(read_proxy_file(path, now=NOW))


def read_record(write: Write, **record: Any) -> CacheEntry | Rejected:
    """What one JSON record becomes."""
    (outcome,) = read(write("one.json", json.dumps([record])))
    return outcome


def read_line(write: Write, line: str) -> CacheEntry | Rejected:
    """What one line of a text file becomes."""
    (outcome,) = read(write("one.txt", line + "\n"))
    return outcome


def entry_of(outcome: CacheEntry | Rejected) -> CacheEntry:
    assert isinstance(outcome, CacheEntry), outcome
    return outcome


def address_of(outcome: CacheEntry | Rejected) -> tuple[str, str | None, str | None]:
    entry = entry_of(outcome)
    return entry.proxy_url, entry.username, entry.password


# --- objects


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


# --- JSON


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not JSON: Expecting value at line 1, column 1"),
        (b"[1,", "is not JSON"),
        (b"5", "holds no list of proxies"),
        (b'{"proxies": {}}', "holds no list of proxies"),
        (b'{"things": []}', "holds no list of proxies"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"9" * 5000 + b"]", "too many digits"),
        ("[]".encode("utf-16"), "is UTF-16"),
        (b"[]\0", "is not a text file"),
    ],
)
def test_a_json_file_that_cannot_be_read_is_refused_as_a_whole(
    write: Write, content: bytes, reason: str
) -> None:
    with pytest.raises(ProxyFileError, match=reason):
        read(write("bad.json", content))


def test_an_element_that_is_no_object_fails_alone(write: Write) -> None:
    path = write("a.json", '\ufeff[{"url": "http://h:1"}, 5, {"url": "http://h:3"}, [], null, ""]')

    first, second, third, *others = read(path)

    assert entry_of(first).proxy_url == "http://h:1"
    assert second == Rejected("record 2", "neither an object nor a text", "failed")
    assert entry_of(third).proxy_url == "http://h:3"
    assert [isinstance(other, Rejected) for other in others] == [True, True, True]


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".JSONL"])
def test_a_line_that_cannot_be_read_fails_alone(write: Write, suffix: str) -> None:
    lines = [
        b'\xef\xbb\xbf{"url": "http://h:1"}\r',
        b"",
        b'{"url": ',
        b'{"url": "http://\xff:1"}',
        b"[]",
        b"[" * 100_000,
        b'{"url": "http://h:2"}',
    ]
    outcomes = read(write("a" + suffix, b"\n".join(lines)))

    assert [getattr(outcome, "proxy_url", None) for outcome in outcomes] == [
        "http://h:1", None, None, None, None, "http://h:2",
    ]  # fmt: skip
    failed = [outcome for outcome in outcomes if isinstance(outcome, Rejected)]
    assert [(rejected.where, rejected.kind, rejected.reason.split(":")[0]) for rejected in failed] == [
        ("line 3", "failed", "not JSON"),
        ("line 4", "failed", "not UTF-8"),
        ("line 5", "failed", "neither an object nor a text"),
        ("line 6", "failed", "not JSON"),
    ]


# --- CSV


def test_a_csv_file_is_read_by_its_header_row(write: Write) -> None:
    path = write(
        "a.csv",
        "\ufeffProtocol, IP ,port,username,password,country_code,ttl,labels\r\n"
        'http, 203.0.113.7 ,8080,,,DE,90,"{""asn"": ""64500""}"\r\n'
        "\r\n"
        'socks5,h.example,1080,ann," p,w ",,,\r\n'
        "socks5,h.example,1081\r\n",
    )

    first, second, third = map(entry_of, read(path))

    assert first.proxy_url == "http://203.0.113.7:8080"
    assert first.labels == {"country": "DE", "asn": "64500"}
    assert first.ttl == timedelta(seconds=90)
    assert address_of(second) == ("socks5://h.example:1080", "ann", " p,w ")
    assert third.proxy_url == "socks5://h.example:1081"


def test_a_csv_record_that_cannot_be_read_fails_alone(write: Write) -> None:
    path = write(
        "a.csv",
        b'url,source\nhttp://h:1,"two\nlines"\nhttp://h\xff:2,a\nhttp://h:3,a,b\nhttp://h:4,'
        + b"x" * 2_000_000
        + b"\nhttp://h:5,ok\nftp://h:6,ok\n",
    )

    outcomes = read(path)

    assert [outcome for outcome in outcomes if isinstance(outcome, Rejected)] == [
        Rejected("line 4", "not UTF-8", "failed"),
        Rejected("line 5", "3 fields, where the header row has 2", "failed"),
        Rejected("line 6", "longer than 1,048,576 bytes", "failed"),
        Rejected(
            "line 8",
            "the scheme of the proxy URL is none of http, https, socks4, socks4a, socks5, socks5h",
            "skipped",
        ),
    ]
    assert [entry.source for entry in outcomes if isinstance(entry, CacheEntry)] == ["two\nlines", "ok"]


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "name,city\nx,y\n"])
def test_a_csv_file_that_names_no_proxy_anywhere_is_refused(write: Write, content: str) -> None:
    with pytest.raises(ProxyFileError, match=r"holds no proxies, and its header row names neither"):
        read(write("a.csv", content))


# --- text


def test_headers_of_a_text_file_set_the_scheme_of_the_lines_below(write: Write) -> None:
    path = write(
        "proxies.txt",
        "203.0.113.1:80\n"
        "# SOCKS5 Proxies (28)\n"
        "203.0.113.2:1080\n"
        "\n"
        "# checked on Monday, http only\n"
        "203.0.113.3:1080\r\n"
        "https://203.0.113.4:443\n"
        "# socks4a proxy:\n"
        "  203.0.113.5:1080  \n"
        "#https\n"
        "203.0.113.6:443",
    )

    assert [entry_of(outcome).proxy_url for outcome in read(path)] == [
        "http://203.0.113.1:80",
        "socks5://203.0.113.2:1080",
        "socks5://203.0.113.3:1080",
        "https://203.0.113.4:443",
        "socks4a://203.0.113.5:1080",
        "https://203.0.113.6:443",
    ]


@pytest.mark.parametrize(
    ("line", "address"),
    [
        ("h:1", ("http://h:1", None, None)),
        ("[::1]:1", ("http://[::1]:1", None, None)),
        ("h:1:ann:pw", ("http://h:1", "ann", "pw")),
        ("h:1:ann:p:w@%41", ("http://h:1", "ann", "p:w@%41")),
        ("h:1:ann:", ("http://h:1", "ann", None)),
        ("[::1]:1:ann:pw", ("http://[::1]:1", "ann", "pw")),
        ("ann:pw@h:1", ("http://h:1", "ann", "pw")),
        ("ann@h:1", ("http://h:1", "ann", None)),
        ("ann:p%3Aw@h:1", ("http://h:1", "ann", "p:w")),
        ("socks5://ann:pw@h:1", ("socks5://h:1", "ann", "pw")),
    ],
)
def test_a_line_of_text_may_hold_credentials(
    write: Write, line: str, address: tuple[str, str | None, str | None]
) -> None:
    assert address_of(read_line(write, line)) == address


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("hello", "no port"),
        ("hello world", "no address"),
        ("h:99999", "port is not a number"),
        ("h:99999:ann:pw", "port is not a number"),
        ("h:1:ann", "no password after the username"),
        ("ann:1:pw@h:80", "read in two ways"),
        ("ftp://h:1", "scheme"),
        ("h:1/path", "has a path"),
    ],
)
def test_a_line_of_text_that_is_no_proxy_is_skipped_with_its_reason(
    write: Write, line: str, reason: str
) -> None:
    outcome = read_line(write, line)

    assert isinstance(outcome, Rejected)
    assert (outcome.where, outcome.kind) == ("line 1", "skipped")
    assert reason in outcome.reason


def test_a_line_of_text_that_is_not_utf8_fails_alone(write: Write) -> None:
    outcomes = read(write("a.txt", b"h:1\n\xff\xfe\xfd:2\nh:3\n"))

    assert outcomes[1] == Rejected("line 2", "not UTF-8", "failed")
    assert [entry_of(outcomes[0]).proxy_url, entry_of(outcomes[2]).proxy_url] == ["http://h:1", "http://h:3"]


# --- files


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ProxyFileError, match="No such file"):
        read(tmp_path / "none.txt")
    with pytest.raises(ProxyFileError, match="Is a directory"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.json"])
def test_a_binary_file_is_refused_whatever_its_name(write: Write, name: str) -> None:
    with pytest.raises(ProxyFileError, match="not a text file"):
        read(write(name, b"PK\x03\x04\x00\x00"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_an_empty_file_holds_nothing(write: Write, name: str) -> None:
    assert read(write(name, "")) == []


def test_lines_are_read_as_they_come(tmp_path: Path) -> None:
    """Given a file that is still being written, then its first line is there already."""
    path = tmp_path / "fifo.txt"
    os.mkfifo(path)
    writer = os.open(path, os.O_RDWR)  # does not wait for a reader
    try:
        os.write(writer, b"h:1\n")
        found: Iterator[CacheEntry | Rejected] = read_proxy_file(path)
        assert entry_of(next(found)).proxy_url == "http://h:1"
    finally:
        os.close(writer)


@pytest.mark.parametrize(
    ("name", "line"),
    [("a.txt", "h:{}\n"), ("a.jsonl", '{{"url": "http://h:{}"}}\n'), ("a.csv", "http://h:{}\n")],
)
def test_progress_grows_to_the_whole(write: Write, name: str, line: str) -> None:
    header = "url\n" if name.endswith("csv") else ""
    path = write(name, header + "".join(line.format(port) for port in range(1, 3000)))
    seen: list[float] = []

    assert len(list(read_proxy_file(path, on_progress=seen.append))) == 2999

    assert seen == sorted(seen)
    assert 0 < seen[0] < seen[-1] == 1.0


def test_progress_of_a_json_file_counts_its_records(write: Write) -> None:
    path = write("a.json", json.dumps([{"url": f"http://h:{port}"} for port in (1, 2, 3, 4)]))
    seen: list[float] = []

    list(read_proxy_file(path, on_progress=seen.append))

    assert seen == [0.25, 0.5, 0.75, 1.0]


# --- writing


@given(entries())
def test_an_entry_survives_being_written_and_read(tmp_path_factory: Any, entry: CacheEntry) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.jsonl"
    path.write_text(entry_to_json(entry, include_credentials=True) + "\n", encoding="utf-8")

    assert list(read_proxy_file(path)) == [entry]


@given(entries())
def test_a_line_without_credentials_holds_none_and_keeps_the_rest(entry: CacheEntry) -> None:
    record = json.loads(entry_to_json(entry, include_credentials=False))

    assert not {"username", "password"} & record.keys()
    assert (record["proxy_url"], record["key"]) == (entry.proxy_url, entry.key)


def test_userinfo_of_a_url_is_written_only_when_credentials_are() -> None:
    entry = CacheEntry(
        f"http://ann:{SECRET}@h:1",
        health_monitoring=HealthMonitoring(last_health_error=f"407 from http://ann:{SECRET}@h:1"),
    )

    without = entry_to_json(entry, include_credentials=False)
    with_them = json.loads(entry_to_json(entry, include_credentials=True))

    assert SECRET not in without
    assert "ann" not in without
    assert (with_them["username"], with_them["password"]) == ("ann", SECRET)
    assert with_them["key"] == json.loads(without)["key"] == cache_key("http://h:1", "ann")


# --- credentials


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", f"ann:{SECRET}@h\nh:x:ann:{SECRET}\nann:1:{SECRET}@h:80\n{SECRET}\nh:1:{SECRET}\n"),
        ("a.jsonl", f'{{"url": "http://ann:{SECRET}@h:1"\n{{"url": "http://ann:{SECRET}@h"}}\n"{SECRET}"\n'),
        ("a.jsonl", f'{{"ip": "h", "port": "{SECRET}"}}\n{{"url": "{SECRET}"}}\n'),
        ("a.jsonl", f'{{"url": "http://ann:x@h:1", "username": "ann", "password": "{SECRET}"}}\n'),
        ("a.jsonl", f'{{"url": "http://h:1", "username": "ann", "password": "{SECRET}\\u0000"}}\n'),
        ("a.jsonl", f'{{"url": "http://h:1", "username": "ann", "password": "{SECRET}\\ud800"}}\n'),
        ("a.csv", f"url,username,password\nhttp://h:1,ann,{SECRET},x\nhttp://h:x,ann,{SECRET}\n"),
        ("a.csv", f'url,password\nhttp://h:1,"{SECRET}\n'.ljust(200_000, "x")),
    ],
)
def test_no_reason_holds_a_credential(write: Write, name: str, content: str) -> None:
    outcomes = read(write(name, content))

    assert outcomes
    assert all(isinstance(outcome, Rejected) for outcome in outcomes)
    assert SECRET not in repr(outcomes)


@given(st.binary(max_size=200))
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json"])
def test_any_bytes_are_read_or_refused(tmp_path_factory: Any, name: str, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)

    try:
        outcomes = list(read_proxy_file(path))
    except ProxyFileError:
        return
    assert all(isinstance(outcome, CacheEntry | Rejected) for outcome in outcomes)
