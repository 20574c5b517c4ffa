"""Writing lists: what is read back whole, and addresses for other programs."""

from __future__ import annotations

import csv
import io
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import given

from proxystash import CacheEntry, HealthMonitoring, HealthStatus, entry_to_csv, entry_to_url
from proxystash.files import CSV_HEADER, EXPORT_FORMATS, LINES, entry_to_host_port, read_proxy_file
from proxystash.proxies import parse_proxy_url

from .strategies import entries

SECRET = "s3cr3t-p4ss"
RICH = CacheEntry(
    "socks5://gw.example:1080",
    "k,1",
    username="ann",
    password=f'{SECRET}"@, ',
    source="shop, inc",
    health_status=HealthStatus.DEGRADED,
    health_monitoring=HealthMonitoring(
        last_health_error='407, "no"\nfrom http://ann:pw@h:1', recovery_attempt=2
    ),
    labels={"country": "DE", 'a"b': "x;y"},
)


def read_csv(*rows: str) -> list[object]:
    content = "\n".join([CSV_HEADER, *rows]) + "\n"
    return [*read_proxy_file(io.BytesIO(content.encode()), name="a.csv")]


def test_a_row_of_csv_is_read_back_as_the_entry() -> None:
    assert read_csv(entry_to_csv(RICH, include_credentials=True)) == [RICH]


@given(entries())
def test_any_entry_survives_csv(entry: CacheEntry) -> None:
    """But for what no server stores: line feeds, and blanks around a text."""
    if any(
        not text.isprintable() or text != text.strip()
        for text in (entry.source, *entry.labels, *entry.labels.values())
    ):
        return
    assert read_csv(entry_to_csv(entry, include_credentials=True)) == [entry]


def test_every_row_has_the_columns_of_the_header() -> None:
    [header, row] = csv.reader([CSV_HEADER, entry_to_csv(CacheEntry("http://h:1"), include_credentials=True)])

    assert len(header) == len(row)
    assert row[header.index("proxy_url")] == "http://h:1"


@given(entries())
def test_credentials_are_percent_encoded_in_a_url(entry: CacheEntry) -> None:
    """As curl, requests and httpx take it: nothing in them can be taken for a part of the URL."""
    url = entry_to_url(entry, include_credentials=True)

    address = parse_proxy_url(url)
    assert (address.url, address.username, address.password) == (
        entry.proxy_url,
        entry.username,
        entry.password,
    )
    parts = urlsplit(url)
    assert (unquote(parts.username or ""), unquote(parts.password or "")) == (
        entry.username or "",
        entry.password or "",
    )
    assert f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" == entry.proxy_url


def test_addresses_are_written_plain() -> None:
    assert (
        entry_to_url(RICH, include_credentials=True) == "socks5://ann:s3cr3t-p4ss%22%40%2C%20@gw.example:1080"
    )
    assert entry_to_url(RICH, include_credentials=False) == "socks5://gw.example:1080"
    assert entry_to_host_port(RICH, include_credentials=False) == "gw.example:1080"
    assert entry_to_url(CacheEntry("http://ann:p%40@h:1"), include_credentials=True) == "http://ann:p%40@h:1"


@pytest.mark.parametrize("line_format", EXPORT_FORMATS)
def test_no_line_without_credentials_holds_one(line_format: str) -> None:
    entry = CacheEntry(
        f"http://ann:{SECRET}@h:1",
        health_monitoring=HealthMonitoring(last_health_error=f"407 from http://ann:{SECRET}@h:1"),
    )

    line = LINES[line_format](entry, include_credentials=False)

    assert SECRET not in line
    assert "ann" not in line
