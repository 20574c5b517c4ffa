"""Requests from what a caller gives, and results from answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from proxystash.errors import InternalError, InvalidArgumentError
from proxystash.messages import (
    CHANGE_KIND_NUMBERS,
    HEALTH_STATUS_NUMBERS,
    fill_entry,
    read_entry,
    read_get_result,
    read_put_result,
)
from proxystash.models import CacheEntry, EntryChanges, EntryError, GetResult, PutMode, PutResult
from proxystash.proxies import InvalidProxyUrl, cache_key, parse_proxy_url
from proxystash.v1 import cache_service_pb2 as pb

_SURROGATE = re.compile(r"[\ud800-\udfff]")
_REASONS = {"username": "INVALID_CREDENTIALS", "password": "INVALID_CREDENTIALS"}
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


def entry_to_message(entry: CacheEntry) -> pb.CacheEntry:
    """Make the message that stores an entry; what the server sets itself is left out.

    Raises InvalidArgumentError for a value that the message cannot hold.
    """
    message = pb.CacheEntry()
    unfit = fill_entry(message, entry)
    if unfit:
        raise invalid(unfit)
    if "://" in entry.key and _is_proxy_url(entry.key):
        raise InvalidArgumentError(
            "a proxy URL cannot be a key, since it stands for the key that is made of it; leave it empty",
            code="INVALID_ARGUMENT",
            reason="INVALID_KEY",
            field="key",
        )
    return message


def mode_to_message(mode: str) -> pb.PutMode.ValueType:
    """Raises InvalidArgumentError for what is no mode; the plain word will do."""
    try:
        return pb.PutMode.Value(f"PUT_MODE_{PutMode(mode).name}")
    except ValueError:
        raise invalid("mode") from None


def changes_to_message(key: str | CacheEntry, changes: EntryChanges) -> pb.CacheEntry:
    """The message that says what to change of the entry of a key.

    Raises InvalidArgumentError for a value that the message cannot hold, TypeError for a field that is none.
    """
    unknown = changes.keys() - EntryChanges.__annotations__.keys()
    if unknown:
        raise TypeError(f"an entry has no field {min(unknown)!r} that could be changed")
    labels = {name: value for name, value in changes.get("labels", {}).items() if value is not None}
    fields: dict[str, Any] = {"proxy_url": "", **changes, "key": checked_key(key), "labels": labels}
    return entry_to_message(CacheEntry(**fields))


def paths_of(changes: EntryChanges) -> list[str]:
    """The mask of what is changed."""
    labels = [f"labels.{name}" for name in changes.get("labels", ())]
    return [*(name for name in changes if name != "labels"), *labels]


def checked_key(key: str | CacheEntry) -> str:
    """The key that was given, or that of the entry or proxy URL that was given.

    Raises InvalidArgumentError for a key that the message cannot hold.
    """
    if isinstance(key, CacheEntry):
        key = key.key or cache_key(key.proxy_url, key.username)
    elif "://" in key:
        with suppress(InvalidProxyUrl):
            # Or it is a key of the caller's own.
            key = cache_key(key)
    if _SURROGATE.search(key):
        raise invalid("key")
    return key


def health_to_message(status: str) -> pb.HealthStatus.ValueType:
    """Raises InvalidArgumentError for what is no health status; the plain word will do."""
    number = HEALTH_STATUS_NUMBERS.get(status)
    if number is None:
        raise invalid("health_status")
    return number


def change_kind_to_message(kind: str) -> pb.ChangeKind.ValueType:
    """Raises InvalidArgumentError for what no server tells as a change; the plain word will do."""
    number = CHANGE_KIND_NUMBERS.get(kind)
    if number is None:
        raise invalid("kinds")
    return number


def interval_to_message(interval: timedelta) -> Duration:
    """Raises InvalidArgumentError for an interval that the message cannot hold."""
    return duration_to_message(interval, "interval")


def duration_to_message(duration: timedelta, field: str) -> Duration:
    """Raises InvalidArgumentError for a duration that the message cannot hold."""
    message = Duration()
    try:
        message.FromTimedelta(duration)
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise invalid(field) from None
    return message


def get_result(response: pb.GetResponse) -> GetResult | None:
    """None on a miss."""
    return read_get_result(response) if response.HasField("entry") else None


def get_results(response: pb.BatchGetResponse, asked: int) -> list[GetResult | None]:
    """The answers for the first keys, at least one; the server had no room for the others."""
    check_count(len(response.results) + response.unanswered, asked)
    if not response.results:
        raise InternalError("the server answered none of the keys", reason="UNEXPECTED_ANSWER")
    return [get_result(result) for result in response.results]


def put_results(response: pb.BatchPutResponse, asked: int) -> list[PutResult | EntryError]:
    check_count(len(response.results), asked)
    return [
        entry_error(result.error) if result.HasField("error") else read_put_result(result.stored)
        for result in response.results
    ]


def entries(response: pb.ListResponse) -> list[CacheEntry]:
    return [read_entry(entry) for entry in response.entries]


def _is_proxy_url(text: str) -> bool:
    try:
        parse_proxy_url(text)
    except InvalidProxyUrl:
        return False
    return True


def error_of_entry(error: InvalidArgumentError) -> EntryError:
    """What a refused put is in the answer of many."""
    return EntryError(error.code, error.reason, error.message, error.field)


def entry_error(message: pb.EntryError) -> EntryError:
    return EntryError(
        code=_CODES.get(message.code, "UNKNOWN"),
        reason=message.reason,
        message=message.message,
        field=message.field,
    )


def check_count(answered: int, asked: int) -> None:
    if answered != asked:
        raise InternalError(f"the server answered {answered} of {asked} items", reason="UNEXPECTED_ANSWER")


def set_fields(message: Message, values: Mapping[str, object]) -> None:
    """Set fields of numbers and texts; raises InvalidArgumentError for a value that one cannot hold."""
    for field, value in values.items():
        try:
            setattr(message, field, value)
        except (TypeError, ValueError):
            raise invalid(field) from None


def invalid(field: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{field} holds a value of the wrong type or out of range",
        code="INVALID_ARGUMENT",
        reason=_REASONS.get(field, f"INVALID_{field.upper()}"),
        field=field,
    )
