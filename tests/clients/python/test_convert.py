"""Entries and messages: what survives the way, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given

from proxystash import CacheEntry, HealthMonitoring, InternalError, InvalidArgumentError, Tier
from proxystash import _convert as convert
from proxystash.v1 import cache_service_pb2 as pb

from .strategies import entries
from .test_proxies import _everything_reachable_from

SECRET = "s3cr3t-p4ss"


@given(entries())
def test_what_a_client_may_set_survives_the_way_to_the_server_and_back(entry: CacheEntry) -> None:
    message = pb.CacheEntry.FromString(convert.entry_to_message(entry).SerializeToString())

    answer = convert.get_result(pb.GetResponse(entry=message, served_by=pb.TIER_L2))

    assert answer is not None
    assert answer.served_by is Tier.L2
    set_by_server = {"expires_at": None, "last_accessed": None, "access_count": 0}
    assert answer.entry == replace(entry, **set_by_server)  # type: ignore[arg-type]  # of several types


def test_an_unset_time_stays_unset_and_the_epoch_does_not() -> None:
    epoch = datetime(1970, 1, 1, tzinfo=UTC)

    assert not convert.entry_to_message(CacheEntry("http://h:1")).HasField("fetch_time")
    assert convert.entry_to_message(CacheEntry("http://h:1", fetch_time=epoch)).HasField("fetch_time")
    assert convert.entry_to_message(CacheEntry("http://h:1", ttl=timedelta(0))).HasField("ttl")


def test_a_naive_time_is_utc() -> None:
    naive = CacheEntry("http://h:1", fetch_time=datetime(2026, 1, 2, 3, 4, 5))  # noqa: DTZ001 -- what is tested

    assert convert.entry_to_message(naive).fetch_time.ToJsonString() == "2026-01-02T03:04:05Z"


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("proxy_url", None, "INVALID_PROXY_URL"),
        ("proxy_url", f"http://ann:{SECRET}\ud800@h:1", "INVALID_PROXY_URL"),
        ("key", 5, "INVALID_KEY"),
        ("username", f"{SECRET}\ud800", "INVALID_CREDENTIALS"),
        ("password", [SECRET], "INVALID_CREDENTIALS"),
        ("password", f"{SECRET}\ud800", "INVALID_CREDENTIALS"),
        ("source", 5, "INVALID_SOURCE"),
        ("fetch_time", "2026-01-01", "INVALID_FETCH_TIME"),
        ("ttl", 3600, "INVALID_TTL"),
        ("health_status", "fine", "INVALID_HEALTH_STATUS"),
        ("failure_count", 2**31, "INVALID_FAILURE_COUNT"),
        ("failure_count", "1", "INVALID_FAILURE_COUNT"),
        ("max_leases", 2**31, "INVALID_MAX_LEASES"),
        ("labels", {"a": 1}, "INVALID_LABELS"),
        ("labels", ["a"], "INVALID_LABELS"),
        ("health_monitoring", HealthMonitoring(recovery_attempt=2**40), "INVALID_HEALTH_MONITORING"),
        ("health_monitoring", "x", "INVALID_HEALTH_MONITORING"),
    ],
)
def test_a_value_that_no_message_can_hold_is_refused_by_its_field_and_not_quoted(
    field: str, value: Any, reason: str
) -> None:
    entry = replace(CacheEntry("http://h:1"), **{field: value})

    with pytest.raises(InvalidArgumentError) as caught:
        convert.entry_to_message(entry)

    assert (caught.value.field, caught.value.reason, caught.value.code) == (field, reason, "INVALID_ARGUMENT")
    assert SECRET not in repr(_everything_reachable_from(caught.value))


def test_what_a_newer_server_says_is_not_guessed() -> None:
    entry = pb.CacheEntry(proxy_url="http://h:1")

    with pytest.raises(InternalError, match="does not know") as caught:
        convert.get_result(pb.GetResponse(entry=entry, served_by=9))  # type: ignore[arg-type]  # no such tier

    assert caught.value.reason == "UNEXPECTED_ANSWER"


def test_an_answer_of_the_wrong_length_is_not_taken() -> None:
    with pytest.raises(InternalError, match="answered 1 of 2"):
        convert.get_results(pb.BatchGetResponse(results=[pb.GetResponse()]), 2)
