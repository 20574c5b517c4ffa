"""Reading proxy files of every format, and writing lines that are read back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxystash import (
    CacheEntry,
    HealthMonitoring,
    ProxyFileError,
    Rejected,
    cache_key,
    entry_to_json,
    read_proxy_file,
)

from .reading import Write, address_of, entry_of, read, read_line
from .strategies import entries

SECRET = "s3cr3t-p4ss"


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
        ("a.txt", f"gw.example:80:{SECRET}:8080\nann:80@{SECRET}.example:80\nh:1:ann:{SECRET} x\n"),
        ("a.txt", f"192.0.2.1,80,ann,{SECRET}\nh x:{SECRET}\n192.0.2.1:1 ann:{SECRET}@192.0.2.2:1\n"),
        ("a.txt", f"http://h:1:ann:80:{SECRET}:81\n[{SECRET}]:1:a:b\nann:{SECRET}:h.example:x\n"),
        ("a.json", f'[{{"url": "http://ann:{SECRET}@h"}}, {{"proxy": "ann:{SECRET}@h:1x"}}, {{"p": {SECRET}'),
        (
            "a.yaml",
            f"proxies:\n  - {{server: h, port: x, pass: {SECRET}}}\n  - {{password: *{SECRET}}}\n",
        ),
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
