"""What a key and the fields of an entry may be.

Each check raises InvalidEntryError, which names the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Final

from pydantic import SecretStr

from proxystash.compiled import types_of
from proxystash.models import MAX_INT32, MAX_INT64, HealthMonitoring, HealthStatus, Int32, Int64
from proxystash.proxies import redact
from proxystash_server.cache.config import MAX_TTL_SECONDS
from proxystash_server.cache.errors import InvalidEntryError

MAX_KEY_BYTES: Final = 256
MAX_SOURCE_LENGTH: Final = 128
MAX_LABELS: Final = 32
MAX_LABEL_NAME_LENGTH: Final = 64
MAX_LABEL_VALUE_LENGTH: Final = 256
MAX_CREDENTIAL_LENGTH: Final = 1024
MAX_HEALTH_ERROR_LENGTH: Final = 1024
MAX_COUNT: Final = MAX_INT32

SECOND_US: Final = 1_000_000
# A count of uses or a time in microseconds: room for any year, and no overflow in any store or client.
MAX_USE: Final = 2**58
MIN_TTL_US: Final = SECOND_US
MAX_TTL_US: Final = MAX_TTL_SECONDS * SECOND_US
# 9000-01-01: with the longest TTL added, still a year that every client can represent.
_LATEST_US: Final = 221_845_392_000 * SECOND_US

_LARGEST: Final[Mapping[object, int]] = {Int32: MAX_INT32, Int64: MAX_INT64}
MONITORING_COUNTS: Final = {
    name: _LARGEST[type_] for name, type_ in types_of(HealthMonitoring).items() if type_ in _LARGEST
}
NO_LABELS: Final[Mapping[str, str]] = MappingProxyType({})


def check_key(key: str) -> None:
    """Raise InvalidEntryError unless `key` is a usable key.

    1 to 256 bytes of UTF-8, no control characters.
    """
    # The usual key is a short hash, which needs no more than this.
    if len(key) <= MAX_KEY_BYTES and key.isalnum() and key.isascii():
        return
    if not key:
        raise InvalidEntryError("key", "INVALID_KEY", "key is empty")
    if len(key) <= MAX_KEY_BYTES:
        check_text("key", "INVALID_KEY", key)
    if len(key) > MAX_KEY_BYTES or len(key.encode()) > MAX_KEY_BYTES:
        raise InvalidEntryError("key", "INVALID_KEY", f"key is longer than {MAX_KEY_BYTES} bytes")


def check_ttl(ttl_us: int) -> None:
    """Raise InvalidEntryError unless a TTL in microseconds lies between 1 second and 10 years."""
    if not MIN_TTL_US <= ttl_us <= MAX_TTL_US:
        raise InvalidEntryError("ttl", "INVALID_TTL", "ttl must be between 1 second and 10 years")


def check_not_expired(expires_at_us: int, now_us: int) -> None:
    """Raise InvalidEntryError for an entry that has expired before it is stored."""
    if expires_at_us <= now_us:
        raise InvalidEntryError(
            "fetch_time", "ALREADY_EXPIRED", "the entry has expired: its ttl from fetch_time on is over"
        )


def check_text(field: str, reason: str, text: str) -> None:
    """Raise InvalidEntryError if `text` has control characters or is not valid Unicode; never quotes it."""
    if text.isprintable():
        return
    for character in text:
        if "\ud800" <= character <= "\udfff":
            raise InvalidEntryError(field, reason, f"{field} is not valid Unicode")
        if ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0:
            raise InvalidEntryError(field, reason, f"{field} contains a control character")


def check_source(source: str) -> None:
    """At most 128 characters, none of them a control character."""
    if len(source) > MAX_SOURCE_LENGTH:
        raise InvalidEntryError(
            "source",
            "INVALID_SOURCE",
            f"source has {len(source)} characters; at most {MAX_SOURCE_LENGTH} are allowed",
        )
    check_text("source", "INVALID_SOURCE", source)


def check_fetch_time(fetch_time_us: int) -> None:
    """Between 1970 and 9000."""
    if not 0 <= fetch_time_us <= _LATEST_US:
        raise InvalidEntryError(
            "fetch_time", "INVALID_FETCH_TIME", "fetch_time must lie between 1970 and 9000"
        )


def check_expiry(expires_at_us: int) -> None:
    """Not before 1970; the longest TTL is the upper bound."""
    if expires_at_us < 0:
        raise InvalidEntryError("expires_at", "INVALID_EXPIRES_AT", "expires_at must not lie before 1970")


def check_uses(access_count: int, last_accessed_us: int) -> None:
    """Not negative, and with room to grow."""
    if not 0 <= access_count <= MAX_USE:
        raise InvalidEntryError("access_count", "INVALID_ACCESS_COUNT", "access_count must be 0 to 2**58")
    if not 0 <= last_accessed_us <= _LATEST_US:
        raise InvalidEntryError(
            "last_accessed", "INVALID_LAST_ACCESSED", "last_accessed must lie between 1970 and 9000"
        )


def check_failure_count(failure_count: int) -> None:
    """What an int32 holds, not negative."""
    if not 0 <= failure_count <= MAX_COUNT:
        raise InvalidEntryError(
            "failure_count", "INVALID_FAILURE_COUNT", "failure_count must be 0 to 2,147,483,647"
        )


def check_max_leases(max_leases: int) -> None:
    """What an int32 holds, not negative."""
    if not 0 <= max_leases <= MAX_COUNT:
        raise InvalidEntryError("max_leases", "INVALID_MAX_LEASES", "max_leases must be 0 to 2,147,483,647")


def checked_health_status(status: HealthStatus | str) -> HealthStatus:
    """A health status or its word."""
    try:
        return HealthStatus(status)
    except ValueError:
        words = ", ".join(HealthStatus)
        raise InvalidEntryError(
            "health_status", "INVALID_HEALTH_STATUS", f"health_status must be one of {words}"
        ) from None


def checked_credential(field: str, given: str | None, in_url: str | None) -> SecretStr | None:
    """The credential from its field or from the URL; it may stand in both if the two agree."""
    if given and in_url and given != in_url:
        raise InvalidEntryError(
            field, "INVALID_CREDENTIALS", f"{field} is given twice, here and in proxy_url, and the two differ"
        )
    secret = given or in_url
    if not secret:
        return None
    if len(secret) > MAX_CREDENTIAL_LENGTH:
        raise InvalidEntryError(
            field, "INVALID_CREDENTIALS", f"{field} is longer than {MAX_CREDENTIAL_LENGTH} characters"
        )
    check_text(field, "INVALID_CREDENTIALS", secret)
    return SecretStr(secret)


def checked_labels(labels: Mapping[str, str]) -> Mapping[str, str]:
    """The labels as they are kept; raises InvalidEntryError."""
    if len(labels) > MAX_LABELS:
        raise InvalidEntryError(
            "labels", "INVALID_LABELS", f"{len(labels)} labels are given; at most {MAX_LABELS} are allowed"
        )
    kept = dict(labels)
    for name, value in kept.items():
        # The usual label passes here, and needs no more.
        if not (
            0 < len(name) <= MAX_LABEL_NAME_LENGTH
            and len(value) <= MAX_LABEL_VALUE_LENGTH
            and name.isprintable()
            and value.isprintable()
        ):
            _check_label(name, value)
    return MappingProxyType(kept)


def _check_label(name: str, value: str) -> None:
    if not name:
        raise InvalidEntryError("labels", "INVALID_LABELS", "a label's name is empty")
    if len(name) > MAX_LABEL_NAME_LENGTH:
        raise InvalidEntryError(
            "labels", "INVALID_LABELS", f"a label's name is longer than {MAX_LABEL_NAME_LENGTH} characters"
        )
    if len(value) > MAX_LABEL_VALUE_LENGTH:
        raise InvalidEntryError(
            "labels", "INVALID_LABELS", f"a label's value is longer than {MAX_LABEL_VALUE_LENGTH} characters"
        )
    check_text("labels", "INVALID_LABELS", name)
    check_text("labels", "INVALID_LABELS", value)


def checked_monitoring(monitoring: HealthMonitoring) -> HealthMonitoring:
    """The health monitoring as it is kept: without a credential that its error message quotes."""
    for name, most in MONITORING_COUNTS.items():
        if not 0 <= getattr(monitoring, name) <= most:
            raise InvalidEntryError(
                f"health_monitoring.{name}", "INVALID_HEALTH_MONITORING", f"{name} must be 0 to {most:,}"
            )
    error = monitoring.last_health_error
    if error is not None:
        if len(error) > MAX_HEALTH_ERROR_LENGTH:
            raise InvalidEntryError(
                "health_monitoring.last_health_error",
                "INVALID_HEALTH_MONITORING",
                f"last_health_error is longer than {MAX_HEALTH_ERROR_LENGTH} characters",
            )
        # A health checker's message may have several lines; it need only be text.
        check_text(
            "health_monitoring.last_health_error", "INVALID_HEALTH_MONITORING", " ".join(error.split())
        )
        monitoring = replace(monitoring, last_health_error=redact(error))
    return replace(
        monitoring,
        last_health_check=_as_utc("last_health_check", monitoring.last_health_check),
        next_check_time=_as_utc("next_check_time", monitoring.next_check_time),
    )


def _as_utc(name: str, moment: datetime | None) -> datetime | None:
    if moment is None:
        return None
    try:
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError:
        raise InvalidEntryError(
            f"health_monitoring.{name}",
            "INVALID_HEALTH_MONITORING",
            f"{name} must lie in years 1 to 9999",
        ) from None
