"""The fields of an entry: the same in all its forms, and on disk to the byte as they have always been."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import sqlite3
from contextlib import closing
from typing import Any
from zlib import crc32

import pytest
from pydantic import SecretStr

from proxystash import models
from proxystash.v1 import cache_service_pb2 as pb
from proxystash_server.cache import (
    CacheEntry,
    CacheManager,
    CredentialEncryptor,
    HealthMonitoring,
    HealthStatus,
)
from proxystash_server.cache.entry import plain
from proxystash_server.cache.entry.entry import stamped, to_datetime
from proxystash_server.cache.entry.fields import PUBLIC_FIELDS, Content, EntryArguments, Fields, public_name
from proxystash_server.cache.tiers.base import Write
from proxystash_server.cache.tiers.jsonl.record import entry_of, write_body
from proxystash_server.cache.tiers.sqlite.format import SCHEMA
from proxystash_server.cache.tiers.sqlite.record import COLUMNS, CONTENT_LENGTH, read_row, write_row

FETCHED_US = 1_767_323_045_678_901
ENCRYPTOR = CredentialEncryptor(b"MDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDA=")
TOKEN = (
    "gAAAAABrCYXd95aJhRM4UIaWcKvZo4pgM0sPf9oijc-FpJnEFKf2kBaEpXnbnq3VAPccYFEBEp_LSDy3ZlnTn3iu-zkndSyhhn9tndfI"
    "Y_cBhuLP-d_gWhI="
)
MONITORING = (
    '{"recovery_attempt": 3, "total_health_checks": 1099511627776, "last_health_check": 1767323045678901, '
    '"last_health_error": "no \\"answer\\""}'
)
USE = ("access_count", "last_accessed", "evicted_from_l1")


def _full(max_leases: int = 0) -> CacheEntry:
    entry = CacheEntry(
        key="key-1",
        proxy_url="socks5h://gateway.example:1080",
        source="shop",
        fetch_time=to_datetime(FETCHED_US),
        ttl_seconds=90,
        last_accessed=to_datetime(FETCHED_US + 1_000_000),
        username="ann",
        password="hunter2",
        access_count=7,
        health_status=HealthStatus.DEGRADED,
        evicted_from_l1=True,
        health_monitoring=HealthMonitoring(
            last_health_check=to_datetime(FETCHED_US),
            recovery_attempt=3,
            last_health_error='no "answer"',
            total_health_checks=2**40,
        ),
        labels={"country": "DE", "ü": '\\ "'},
        max_leases=max_leases,
    )
    return stamped(entry, "key-1", version=17, failure_count=2, sealed=TOKEN.encode())


def _bare() -> CacheEntry:
    entry = CacheEntry("key-2", "http://192.0.2.1:80", fetch_time=to_datetime(FETCHED_US), ttl_seconds=60)
    return stamped(entry, "key-2", version=18, failure_count=0, sealed=None)


STORED = [
    pytest.param(
        _full(),
        (
            f'{{"op":"put","key":"key-1","proxy_url":"socks5h://gateway.example:1080","sealed":"{TOKEN}",'
            '"source":"shop","fetch_time":1767323045678901,"expires_at":1767323135678901,'
            f'"health_status":"degraded","failure_count":2,"health_monitoring":{MONITORING},'
            '"labels":{"country":"DE","ü":"\\\\ \\""},"version":17,"max_leases":0,'
            '"access_count":7,"last_accessed":1767323046678901,"evicted_from_l1":true'
        ),
        (
            *("key-1", "socks5h://gateway.example:1080", TOKEN, "shop", 1767323045678901, 1767323135678901),
            *("degraded", 2, MONITORING, '{"country":"DE","ü":"\\\\ \\""}', 17, 0, 2332714723),
            *(7, 1767323046678901, 1, "socks5h", 5),
        ),
        id="full",
    ),
    pytest.param(
        _bare(),
        (
            '{"op":"put","key":"key-2","proxy_url":"http://192.0.2.1:80","sealed":null,"source":"",'
            '"fetch_time":1767323045678901,"expires_at":1767323105678901,"health_status":"unknown",'
            '"failure_count":0,"health_monitoring":null,"labels":{},"version":18,"max_leases":0,'
            '"access_count":0,"last_accessed":1767323045678901,"evicted_from_l1":false'
        ),
        (
            *("key-2", "http://192.0.2.1:80", None, "", 1767323045678901, 1767323105678901),
            *("unknown", 0, None, None, 18, 0, 2833410556),
            *(0, 1767323045678901, 0, "http", 5),
        ),
        id="bare",
    ),
]


def _everything(entry: CacheEntry) -> dict[str, object]:
    return {name: getattr(entry, name) for name in (*Content.__slots__, "access_count", "last_accessed_us")}


@pytest.mark.parametrize(("entry", "line", "row"), STORED)
def test_an_entry_stands_on_disk_as_it_always_has(
    entry: CacheEntry, line: str, row: tuple[object, ...]
) -> None:
    body = write_body(Write(entry.key, entry, entry.version), ENCRYPTOR)
    assert body == line.encode()
    written = write_row(entry, ENCRYPTOR, 5)
    assert written == row
    assert [type(value) for value in written] == [type(value) for value in row]


@pytest.mark.parametrize(("entry", "line", "row"), STORED)
def test_what_has_always_stood_on_disk_is_read(entry: CacheEntry, line: str, row: tuple[object, ...]) -> None:
    record = json.loads(f"{line}}}")
    use = (entry.access_count, entry.last_accessed_us, entry.evicted_from_l1)
    for read in (entry_of(record, ENCRYPTOR, *use), read_row(row, ENCRYPTOR)):
        assert read == entry
        assert _everything(read) == _everything(entry)


def test_a_line_that_was_written_without_a_field_has_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fields, "source", "not told", raising=False)
    spec = importlib.util.find_spec(plain.__name__)
    assert spec is not None
    assert spec.loader is not None
    anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(anew)
    record: dict[str, Any] = json.loads(f"{STORED[1].values[1]}}}")
    assert anew.content_of_json(record, ENCRYPTOR).source == ""
    del record["source"]
    assert anew.content_of_json(record, ENCRYPTOR).source == "not told"


@pytest.mark.parametrize(("entry", "line", "row"), STORED)
def test_what_was_stored_without_a_number_of_leases_is_read(
    entry: CacheEntry, line: str, row: tuple[object, ...]
) -> None:
    """In a row, an upgrade gives it the default, and changes no checksum."""
    earlier = line.replace(',"max_leases":0', "")
    record = json.loads(f"{earlier}}}")
    assert "max_leases" not in record
    use = (entry.access_count, entry.last_accessed_us, entry.evicted_from_l1)
    assert _everything(entry_of(record, ENCRYPTOR, *use)) == _everything(entry)
    assert crc32(ascii(row[: CONTENT_LENGTH - 1]).encode()) == row[CONTENT_LENGTH]


def test_a_number_of_leases_is_stored_and_cannot_be_changed_unnoticed() -> None:
    entry = _full(max_leases=5)
    row = write_row(entry, ENCRYPTOR, 5)
    place = COLUMNS.split(", ").index("max_leases")
    assert _everything(read_row(row, ENCRYPTOR)) == _everything(entry)
    for damaged in ((*row[:place], 0, *row[place + 1 :]), (*row[:place], 6, *row[place + 1 :])):
        with pytest.raises(plain.CorruptRecordError):
            read_row(damaged, ENCRYPTOR)
    bare = write_row(_bare(), ENCRYPTOR, 5)
    with pytest.raises(plain.CorruptRecordError):
        read_row((*bare[:place], 1, *bare[place + 1 :]), ENCRYPTOR)


def test_a_copy_has_every_field_but_what_was_serialized() -> None:
    entry = _full()
    entry.content.encoded = b"serialized"
    copy = stamped(entry, entry.key, entry.version, entry.failure_count, entry.sealed)
    assert _everything(copy) == {**_everything(entry), "encoded": None}


def test_a_new_version_of_an_entry_is_made_of_every_field() -> None:
    entry = _full()
    assert entry.model_copy() == entry
    assert entry.model_copy().username == SecretStr("ann")


# -- that the forms agree

PUBLIC = {public_name(name) for name in PUBLIC_FIELDS}


def test_the_contract_the_client_and_the_cache_have_the_same_fields() -> None:
    told = {*PUBLIC, *USE, "ttl", "version", "credentials_omitted"}
    assert set(pb.CacheEntry.DESCRIPTOR.fields_by_name) == told
    assert {field.name for field in dataclasses.fields(models.CacheEntry)} == told


def test_every_field_can_be_given_to_what_makes_an_entry() -> None:
    of_entry = set(inspect.signature(CacheEntry).parameters)
    assert of_entry == {*PUBLIC, *USE, "ttl_seconds", "monitoring"}
    of_manager = inspect.signature(CacheManager.new_entry).parameters
    assert set(of_manager) == {"self", "proxy_url", *EntryArguments.__annotations__}
    assert set(map(public_name, EntryArguments.__annotations__)) == {
        *PUBLIC - {"proxy_url", "expires_at"},
        "ttl",
    }


def test_the_table_has_a_column_for_everything_that_is_stored() -> None:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(SCHEMA)
        columns = [name for _, name, *_ in connection.execute("PRAGMA table_info(entries)")]
    assert sorted(columns) == sorted([*COLUMNS.split(", "), "id", "scheme", "recency"])
    assert set(COLUMNS.split(", ")[:CONTENT_LENGTH]) == {
        *PUBLIC - {"username", "password"},
        "sealed",
        "version",
    }
