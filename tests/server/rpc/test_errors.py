"""The table of errors."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

import proxystash_server.cache.errors as cache_errors
from proxystash_server.cache import (
    CacheClosedError,
    CacheError,
    CacheUnavailableError,
    EncryptionKeyError,
    InvalidEntryError,
    StoreError,
)
from proxystash_server.cache.errors import TierError
from proxystash_server.rpc.errors import Failure, failure_of, internal_failure, invalid

BAD_URL = InvalidEntryError("proxy_url", "INVALID_PROXY_URL", "no port")
BAD_INTERVAL = invalid("interval", "INVALID_INTERVAL", "too short")


@pytest.mark.parametrize(
    ("error", "code", "reason", "field"),
    [
        (BAD_URL, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PROXY_URL", "proxy_url"),
        (BAD_INTERVAL, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INTERVAL", "interval"),
        (CacheUnavailableError("disk on fire"), grpc.StatusCode.UNAVAILABLE, "NO_TIER_AVAILABLE", ""),
        (CacheClosedError("closed"), grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN", ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_an_error_raised_on_purpose_has_a_code_and_a_reason(
    error: Exception, code: grpc.StatusCode, reason: str, field: str
) -> None:
    failure = failure_of(error)
    assert failure is not None
    assert (failure.code, failure.reason, failure.field) == (code, reason, field)


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyError("x"), CacheError("x"), EncryptionKeyError("x")], ids=repr
)
def test_any_other_error_is_unexpected(error: Exception) -> None:
    assert failure_of(error) is None


def test_every_error_that_a_request_can_meet_is_in_the_table() -> None:
    """All but those of start-up and those of single tiers, which the manager handles."""
    kinds: list[Any] = [kind for kind in vars(cache_errors).values() if isinstance(kind, type)]
    met = [kind for kind in kinds if not issubclass(kind, StoreError | TierError) and kind is not CacheError]
    assert InvalidEntryError in met
    for kind in met:
        error = BAD_URL if kind is InvalidEntryError else kind("x")
        assert failure_of(error) is not None, kind


def test_what_is_unavailable_does_not_tell_why() -> None:
    failure = failure_of(CacheUnavailableError("/var/lib/proxystash: Input/output error"))
    assert failure is not None
    assert "/var/lib" not in failure.message


def test_a_field_is_named_from_where_the_client_looks_at_it() -> None:
    failure = Failure(grpc.StatusCode.INVALID_ARGUMENT, "R", "m", "proxy_url")
    assert failure.under("entry").field == "entry.proxy_url"
    assert Failure(grpc.StatusCode.INVALID_ARGUMENT, "R", "m").under("entry").field == "entry"


def test_an_internal_failure_names_the_request_and_nothing_else() -> None:
    failure = internal_failure("0123abcd")
    assert failure.code is grpc.StatusCode.INTERNAL
    assert failure.request_id == "0123abcd"
    assert "0123abcd" in failure.message


def test_the_error_of_a_batch_entry_has_what_a_put_would_have_said() -> None:
    error = Failure(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_TTL", "too long", "ttl").to_entry_error()
    assert (error.code, error.reason, error.message, error.field) == (3, "INVALID_TTL", "too long", "ttl")
