"""Every field of every request that can be wrong: INVALID_ARGUMENT, the field named, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from proxystash.v1 import cache_service_pb2 as pb
from proxystash.v1 import cache_service_pb2_grpc as pb_grpc
from proxystash_server.cache import EntryFilter
from proxystash_server.rpc.paging import make_page_token
from proxystash_server.rpc.requests import MAX_ENTRY_BYTES
from tests.support.rpc import DEADLINE, refused

URL = "http://192.0.2.7:80"
YEARS_10 = 10 * 365 * 24 * 3600
OVER_KEY = "ä" * 128 + "x"


@dataclass(frozen=True)
class Fault:
    """One thing wrong with an entry: the field, and the reason that names the fault."""

    name: str
    entry: pb.CacheEntry
    field: str
    reason: str


def bad(name: str, field: str, reason: str, **fields: Any) -> Fault:
    return Fault(name, pb.CacheEntry(**{"proxy_url": URL, **fields}), field, reason)


def bad_url(name: str, url: str) -> Fault:
    return bad(f"proxy_url {name}", "proxy_url", "INVALID_PROXY_URL", proxy_url=url)


def bad_check(name: str, field: str, **fields: Any) -> Fault:
    monitoring = pb.HealthMonitoring(**fields)
    return bad(name, f"health_monitoring.{field}", "INVALID_HEALTH_MONITORING", health_monitoring=monitoring)


BAD_ENTRIES = [
    bad("key with a control character", "key", "INVALID_KEY", key="a\nb"),
    bad("key of 257 bytes", "key", "INVALID_KEY", key=OVER_KEY),
    bad_url("missing", ""),
    bad_url("without scheme", "192.0.2.7:80"),
    bad_url("of another scheme", "ftp://192.0.2.7:80"),
    bad_url("without host", "http://:80"),
    bad_url("without port", "http://192.0.2.7"),
    bad_url("with port 0", "http://192.0.2.7:0"),
    bad_url("with port 65536", "http://192.0.2.7:65536"),
    bad_url("with a path", "http://192.0.2.7:80/path"),
    bad_url("with a query", "http://192.0.2.7:80?q"),
    bad_url("with a fragment", "http://192.0.2.7:80#f"),
    bad_url("with whitespace", "http://192.0.2.7 :80"),
    bad_url("with a control character", "http://192.0.2.7\x00:80"),
    bad_url("with an open bracket", "http://[2001:db8::1:80"),
    bad_url("of 2,049 characters", "http://" + "a." * 1018 + "aa:80"),
    bad(
        "username in URL and field",
        "username",
        "INVALID_CREDENTIALS",
        proxy_url="http://u@192.0.2.7:80",
        username="v",
    ),
    bad("username with a control character", "username", "INVALID_CREDENTIALS", username="a\tb"),
    bad("username too long", "username", "INVALID_CREDENTIALS", username="u" * 1025),
    bad(
        "password with a control character",
        "password",
        "INVALID_CREDENTIALS",
        username="u",
        password="a\x7fb",
    ),
    bad("password too long", "password", "INVALID_CREDENTIALS", username="u", password="p" * 1025),
    bad("source of 129 characters", "source", "INVALID_SOURCE", source="s" * 129),
    bad("source with a control character", "source", "INVALID_SOURCE", source="a\rb"),
    bad("fetch_time before 1970", "fetch_time", "INVALID_FETCH_TIME", fetch_time=Timestamp(seconds=-1)),
    bad(
        "fetch_time after 9000",
        "fetch_time",
        "INVALID_FETCH_TIME",
        fetch_time=Timestamp(seconds=253_402_300_799),
    ),
    bad("fetch_time out of range", "fetch_time", "INVALID_FETCH_TIME", fetch_time=Timestamp(seconds=2**62)),
    bad("fetch_time with bad nanos", "fetch_time", "INVALID_FETCH_TIME", fetch_time=Timestamp(nanos=10**9)),
    bad("ttl of nothing", "ttl", "INVALID_TTL", ttl=Duration()),
    bad("ttl below a second", "ttl", "INVALID_TTL", ttl=Duration(nanos=999_999_999)),
    bad("ttl negative", "ttl", "INVALID_TTL", ttl=Duration(seconds=-1)),
    bad("ttl above 10 years", "ttl", "INVALID_TTL", ttl=Duration(seconds=YEARS_10, nanos=1000)),
    bad("ttl with nanos of another sign", "ttl", "INVALID_TTL", ttl=Duration(seconds=60, nanos=-1)),
    bad("ttl with bad nanos", "ttl", "INVALID_TTL", ttl=Duration(seconds=60, nanos=10**9)),
    bad("health_status unknown", "health_status", "INVALID_HEALTH_STATUS", health_status=6),
    bad("health_status negative", "health_status", "INVALID_HEALTH_STATUS", health_status=-1),
    bad("failure_count negative", "failure_count", "INVALID_FAILURE_COUNT", failure_count=-1),
    bad("max_leases negative", "max_leases", "INVALID_MAX_LEASES", max_leases=-1),
    bad("33 labels", "labels", "INVALID_LABELS", labels={str(number): "" for number in range(33)}),
    bad("label without a name", "labels", "INVALID_LABELS", labels={"": "x"}),
    bad("label name of 65 characters", "labels", "INVALID_LABELS", labels={"n" * 65: "x"}),
    bad("label value of 257 characters", "labels", "INVALID_LABELS", labels={"n": "v" * 257}),
    bad("label name with a control character", "labels", "INVALID_LABELS", labels={"a\nb": "x"}),
    bad("label value with a control character", "labels", "INVALID_LABELS", labels={"n": "a\nb"}),
    bad_check("last check invalid", "last_health_check", last_health_check=Timestamp(nanos=-1)),
    bad_check("next check invalid", "next_check_time", next_check_time=Timestamp(seconds=2**60)),
    bad_check("failures negative", "consecutive_health_failures", consecutive_health_failures=-1),
    bad_check("successes negative", "consecutive_health_successes", consecutive_health_successes=-1),
    bad_check("recovery attempt negative", "recovery_attempt", recovery_attempt=-1),
    bad_check("checks negative", "total_health_checks", total_health_checks=-1),
    bad_check("check failures negative", "total_health_check_failures", total_health_check_failures=-1),
    bad_check("check error too long", "last_health_error", last_health_error="e" * 1025),
    bad_check("check error with a control character", "last_health_error", last_health_error="a\x1bb"),
]


def with_statuses(*numbers: Any) -> pb.ListFilter:
    return pb.ListFilter(health_statuses=numbers)


OTHER_TOKEN = make_page_token("k", EntryFilter(source="elsewhere"))

# method, request, field, reason
BAD_REQUESTS: list[tuple[str, Message, str, str]] = [
    ("Get", pb.GetRequest(), "key", "INVALID_KEY"),
    ("Get", pb.GetRequest(key="a\x00"), "key", "INVALID_KEY"),
    ("Get", pb.GetRequest(key=OVER_KEY), "key", "INVALID_KEY"),
    ("BatchGet", pb.BatchGetRequest(keys=["k"] * 1001), "keys", "TOO_MANY_KEYS"),
    ("BatchGet", pb.BatchGetRequest(keys=["good", "good", "good", ""]), "keys[3]", "INVALID_KEY"),
    ("BatchGet", pb.BatchGetRequest(keys=["a\nb", ""]), "keys[0]", "INVALID_KEY"),
    ("BatchGet", pb.BatchGetRequest(keys=["good", OVER_KEY]), "keys[1]", "INVALID_KEY"),
    ("Put", pb.PutRequest(), "entry", "MISSING_ENTRY"),
    *(
        ("Put", pb.PutRequest(entry=fault.entry), f"entry.{fault.field}", fault.reason)
        for fault in BAD_ENTRIES
    ),
    (
        "BatchPut",
        pb.BatchPutRequest(entries=[pb.CacheEntry(proxy_url=URL)] * 1001),
        "entries",
        "TOO_MANY_ENTRIES",
    ),
    ("Put", pb.PutRequest(entry=pb.CacheEntry(proxy_url=URL), mode=4), "mode", "INVALID_MODE"),  # type: ignore[arg-type]
    ("BatchPut", pb.BatchPutRequest(mode=-1), "mode", "INVALID_MODE"),  # type: ignore[arg-type]
    *(
        ("Put", pb.PutRequest(entry=pb.CacheEntry(key="k"), update_mask=mask), "update_mask", reason)
        for mask, reason in (
            (FieldMask(paths=["source", "nonsense"]), "INVALID_UPDATE_MASK"),
            (FieldMask(paths=["key"]), "INVALID_UPDATE_MASK"),
            (FieldMask(paths=["access_count"]), "INVALID_UPDATE_MASK"),
            (FieldMask(paths=["source"] * 1000), "INVALID_UPDATE_MASK"),
        )
    ),
    (
        "Put",
        pb.PutRequest(
            entry=pb.CacheEntry(key="k"), update_mask=FieldMask(paths=["source"]), mode=pb.PUT_MODE_MERGE
        ),
        "mode",
        "INVALID_MODE",
    ),
    (
        "Put",
        pb.PutRequest(update_mask=FieldMask(paths=["proxy_url"]), entry=pb.CacheEntry(key="k")),
        "entry.proxy_url",
        "INVALID_PROXY_URL",
    ),
    (
        "Put",
        pb.PutRequest(
            update_mask=FieldMask(paths=["labels.x"]), entry=pb.CacheEntry(key="k", labels={"x": "v" * 257})
        ),
        "entry.labels",
        "INVALID_LABELS",
    ),
    ("Watch", pb.WatchRequest(after_revision=-1, history="x"), "after_revision", "INVALID_REVISION"),
    ("Watch", pb.WatchRequest(filter=pb.ListFilter(source="s" * 129)), "filter.source", "INVALID_SOURCE"),
    ("ListBans", pb.ListBansRequest(page_size=-1), "page_size", "INVALID_PAGE_SIZE"),
    ("ListBans", pb.ListBansRequest(page_token="nonsense"), "page_token", "INVALID_PAGE_TOKEN"),
    ("Unban", pb.UnbanRequest(), "key", "INVALID_KEY"),
    ("Unban", pb.UnbanRequest(key=OVER_KEY), "key", "INVALID_KEY"),
    ("Delete", pb.DeleteRequest(), "key", "INVALID_KEY"),
    ("Delete", pb.DeleteRequest(key="\x85"), "key", "INVALID_KEY"),
    ("Delete", pb.DeleteRequest(key=OVER_KEY), "key", "INVALID_KEY"),
    ("InvalidateByHealth", pb.InvalidateByHealthRequest(), "key", "INVALID_KEY"),
    ("InvalidateByHealth", pb.InvalidateByHealthRequest(key="a\tb"), "key", "INVALID_KEY"),
    ("InvalidateByHealth", pb.InvalidateByHealthRequest(key=OVER_KEY), "key", "INVALID_KEY"),
    ("List", pb.ListRequest(page_size=-1), "page_size", "INVALID_PAGE_SIZE"),
    ("List", pb.ListRequest(page_token="nonsense"), "page_token", "INVALID_PAGE_TOKEN"),
    ("List", pb.ListRequest(page_token=OTHER_TOKEN), "page_token", "INVALID_PAGE_TOKEN"),
    ("List", pb.ListRequest(filter=pb.ListFilter(source="s" * 129)), "filter.source", "INVALID_SOURCE"),
    (
        "List",
        pb.ListRequest(filter=with_statuses(0)),
        "filter.health_statuses[0]",
        "INVALID_HEALTH_STATUS",
    ),
    (
        "List",
        pb.ListRequest(filter=with_statuses(2, 7)),
        "filter.health_statuses[1]",
        "INVALID_HEALTH_STATUS",
    ),
    (
        "List",
        pb.ListRequest(filter=pb.ListFilter(schemes=["http", "ftp"])),
        "filter.schemes[1]",
        "INVALID_FILTER",
    ),
    ("List", pb.ListRequest(filter=pb.ListFilter(schemes=[""])), "filter.schemes[0]", "INVALID_FILTER"),
    ("List", pb.ListRequest(filter=with_statuses(*[9] * 101)), "filter.health_statuses", "INVALID_FILTER"),
    (
        "List",
        pb.ListRequest(filter=pb.ListFilter(schemes=["ftp"] * 101)),
        "filter.schemes",
        "INVALID_FILTER",
    ),
    ("List", pb.ListRequest(filter=pb.ListFilter(labels={"": "x"})), "filter.labels", "INVALID_LABELS"),
    (
        "List",
        pb.ListRequest(filter=pb.ListFilter(labels={"n": "v" * 257})),
        "filter.labels",
        "INVALID_LABELS",
    ),
    ("StreamStats", pb.StreamStatsRequest(interval=Duration()), "interval", "INVALID_INTERVAL"),
    (
        "StreamStats",
        pb.StreamStatsRequest(interval=Duration(nanos=99_999_999)),
        "interval",
        "INVALID_INTERVAL",
    ),
    (
        "StreamStats",
        pb.StreamStatsRequest(interval=Duration(seconds=3600, nanos=1000)),
        "interval",
        "INVALID_INTERVAL",
    ),
    ("StreamStats", pb.StreamStatsRequest(interval=Duration(seconds=-1)), "interval", "INVALID_INTERVAL"),
    (
        "StreamStats",
        pb.StreamStatsRequest(interval=Duration(seconds=1, nanos=-1)),
        "interval",
        "INVALID_INTERVAL",
    ),
]

METHODS = list(pb.DESCRIPTOR.services_by_name["CacheService"].methods_by_name)


def entries_of(stub: pb_grpc.CacheServiceStub) -> list[pb.CacheEntry]:
    return list(stub.List(pb.ListRequest(include_credentials=True), timeout=DEADLINE).entries)


def statistics_of(stub: pb_grpc.CacheServiceStub) -> pb.CacheStatistics:
    statistics = stub.GetStats(pb.GetStatsRequest(), timeout=DEADLINE).statistics
    statistics.ClearField("observed_at")
    return statistics


@contextmanager
def nothing_changes(stub: pb_grpc.CacheServiceStub) -> Iterator[None]:
    """Neither the entries nor anything that is counted, latencies included."""
    entries = entries_of(stub)
    statistics = statistics_of(stub)
    yield
    assert statistics_of(stub) == statistics
    assert entries_of(stub) == entries


@pytest.fixture
def one_entry(stub: pb_grpc.CacheServiceStub) -> None:
    stub.Put(pb.PutRequest(entry=pb.CacheEntry(key="k", proxy_url=URL)), timeout=DEADLINE)
    stub.Get(pb.GetRequest(key="k"), timeout=DEADLINE)


@pytest.mark.usefixtures("one_entry")
@pytest.mark.parametrize(
    ("method", "request_", "field", "reason"),
    BAD_REQUESTS,
    ids=[f"{number}-{method}-{field}" for number, (method, _, field, _) in enumerate(BAD_REQUESTS)],
)
def test_a_malformed_request_is_refused_naming_the_field_and_changes_nothing(
    stub: pb_grpc.CacheServiceStub, method: str, request_: Message, field: str, reason: str
) -> None:
    with nothing_changes(stub):
        refusal = refused(getattr(stub, method), request_)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    assert (refusal.fields, refusal.domain) == ((field,), "proxystash")
    assert refusal.message


@pytest.mark.usefixtures("one_entry")
@pytest.mark.parametrize("fault", BAD_ENTRIES, ids=lambda fault: fault.name)
def test_a_malformed_entry_of_a_batch_is_refused_naming_its_field_and_changes_nothing(
    stub: pb_grpc.CacheServiceStub, fault: Fault
) -> None:
    with nothing_changes(stub):
        (result,) = stub.BatchPut(pb.BatchPutRequest(entries=[fault.entry]), timeout=DEADLINE).results
    assert (result.error.code, result.error.reason, result.error.field) == (3, fault.reason, fault.field)
    assert result.error.message


@pytest.mark.usefixtures("one_entry")
@pytest.mark.parametrize("method", METHODS)
def test_bytes_that_are_no_message_are_refused_and_change_nothing(
    stub: pb_grpc.CacheServiceStub, channel: grpc.Channel, method: str
) -> None:
    path = f"/proxystash.v1.CacheService/{method}"
    kind: Any = channel.unary_stream if method in {"StreamStats", "Watch"} else channel.unary_unary
    call: Callable[..., Any] = kind(path)
    with nothing_changes(stub):
        refusal = refused(call, b"\x0a\xff")
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "UNREADABLE_REQUEST")


def test_text_that_is_not_utf_8_is_refused(stub: pb_grpc.CacheServiceStub, channel: grpc.Channel) -> None:
    call: Callable[..., Any] = channel.unary_unary("/proxystash.v1.CacheService/Get")
    assert refused(call, b"\x0a\x02\xff\xfe").code is grpc.StatusCode.INVALID_ARGUMENT


GIANTS: dict[str, tuple[str, Message]] = {
    "a key": ("Get", pb.GetRequest(key="k" * 2**20)),
    "a key to delete": ("Delete", pb.DeleteRequest(key="k" * 2**20)),
    "statuses": ("List", pb.ListRequest(filter=with_statuses(*[2] * 2**20))),
    "labels of a filter": (
        "List",
        pb.ListRequest(filter=pb.ListFilter(labels={str(number): "" for number in range(2**16)})),
    ),
    "labels of an entry": (
        "Put",
        pb.PutRequest(entry=pb.CacheEntry(labels={str(number): "" for number in range(2**16)})),
    ),
    "keys": ("BatchGet", pb.BatchGetRequest(keys=[""] * 2**20)),
}


@pytest.mark.usefixtures("one_entry")
@pytest.mark.parametrize("giant", GIANTS)
def test_a_request_larger_than_any_need_be_is_refused_unparsed(
    stub: pb_grpc.CacheServiceStub, giant: str
) -> None:
    method, request = GIANTS[giant]
    with nothing_changes(stub):
        refusal = refused(getattr(stub, method), request)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_TOO_LARGE")


def test_an_entry_of_a_batch_larger_than_any_need_be_is_refused_unparsed_and_alone(
    stub: pb_grpc.CacheServiceStub, channel: grpc.Channel
) -> None:
    good = [pb.CacheEntry(proxy_url=URL, key=f"key-{number}") for number in range(2)]
    # What is no message would be noticed if it were parsed.
    serialized = [entry.SerializeToString() for entry in good]
    serialized.insert(1, b"\xff" * (MAX_ENTRY_BYTES + 1))
    call: Callable[..., Any] = channel.unary_unary("/proxystash.v1.CacheService/BatchPut")
    unknown_fields = b"\x78\x01" + b"\x7d1234" + b"\x7912345678" + b"\x7a\x02ab"
    request = b"".join(b"\x0a" + varint(len(entry)) + entry + unknown_fields for entry in serialized)
    results = pb.BatchPutResponse.FromString(call(request, timeout=DEADLINE)).results
    assert [result.stored.key for result in results] == ["key-0", "", "key-1"]
    error = results[1].error
    assert (error.code, error.reason) == (3, "ENTRY_TOO_LARGE")


@pytest.mark.parametrize(
    "request_",
    [
        b"\x0a\x00" * 2**20,
        b"\x0a" + b"\xff" * MAX_ENTRY_BYTES,
        b"\x0a\x80\x80\x80\x01" + b"x" * MAX_ENTRY_BYTES,
        b"\x0b" * (MAX_ENTRY_BYTES + 1),
    ],
    ids=["a million entries", "an endless length", "a length beyond the end", "groups"],
)
def test_a_large_batch_that_is_no_message_or_has_too_many_entries_is_refused(
    stub: pb_grpc.CacheServiceStub, channel: grpc.Channel, request_: bytes
) -> None:
    call: Callable[..., Any] = channel.unary_unary("/proxystash.v1.CacheService/BatchPut")
    with nothing_changes(stub):
        refusal = refused(call, request_)
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.reason in {"TOO_MANY_ENTRIES", "UNREADABLE_REQUEST"}


def test_a_large_batch_is_read_as_a_small_one(stub: pb_grpc.CacheServiceStub) -> None:
    labels = {f"{number:064}": "v" * 256 for number in range(32)}
    entries = [pb.CacheEntry(proxy_url=URL, key=f"key-{number}", labels=labels) for number in range(50)]
    request = pb.BatchPutRequest(entries=entries)
    assert request.ByteSize() > MAX_ENTRY_BYTES
    results = stub.BatchPut(request, timeout=DEADLINE).results
    assert [result.stored.key for result in results] == [entry.key for entry in entries]
    assert [entry.labels for entry in entries_of(stub)] == [labels] * 50


def varint(number: int) -> bytes:
    return bytes((number & 0x7F | 0x80, number >> 7 & 0x7F | 0x80, number >> 14))


def test_no_credential_comes_back_in_an_error(stub: pb_grpc.CacheServiceStub) -> None:
    entries = [
        pb.CacheEntry(proxy_url="http://planted-user:planted-pass@192.0.2.7"),
        pb.CacheEntry(proxy_url="planted-user:planted-pass@192.0.2.7:80"),
        pb.CacheEntry(proxy_url=URL, username="planted-user\n", password="planted-pass"),
        pb.CacheEntry(proxy_url=URL, username="planted-user", password="planted-pass\n"),
        pb.CacheEntry(proxy_url="http://planted-user:planted-pass@192.0.2.7:80", username="another"),
    ]
    for entry in entries:
        refusal = refused(stub.Put, pb.PutRequest(entry=entry))
        assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
        assert "planted" not in repr(refusal)
    results = stub.BatchPut(pb.BatchPutRequest(entries=entries), timeout=DEADLINE).results
    assert all(result.error.code == 3 for result in results)
    assert "planted" not in str(results)


def test_the_table_covers_every_method_that_takes_something() -> None:
    empty = {
        method
        for method, described in pb.DESCRIPTOR.services_by_name["CacheService"].methods_by_name.items()
        if not described.input_type.fields
    }
    assert {method for method, *_ in BAD_REQUESTS} == set(METHODS) - empty
