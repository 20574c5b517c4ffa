"""One record of a store of proxywhirl's, as an entry of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

from proxystash.models import HealthMonitoring, HealthStatus
from proxystash.proxies import InvalidProxyUrl, cache_key, redact
from proxystash_server.cache import CacheEntry, InvalidEntryError
from proxystash_server.cache.entry.entry import to_microseconds
from proxystash_server.cache.entry.limits import (
    MAX_COUNT,
    MAX_HEALTH_ERROR_LENGTH,
    MAX_USE,
    MONITORING_COUNTS,
)
from proxystash_server.proxywhirl_import.keyring import Keyring, SealedError

Kind = Literal["skipped", "failed"]

# What the three stores call the fields of an entry that are taken over.
ENTRY_FIELDS: Final = (
    "key",
    "proxy_url",
    "username_encrypted",
    "password_encrypted",
    "source",
    "fetch_time",
    "last_accessed",
    "access_count",
    "expires_at",
    "health_status",
    "failure_count",
)
_MONITORING_TIMES: Final = ("last_health_check", "next_check_time")
MONITORING_FIELDS: Final = (*_MONITORING_TIMES, *MONITORING_COUNTS, "last_health_error")
_MAX_INT64: Final = 2**63 - 1


class RejectedRecordError(Exception):
    """A record that is not imported.

    `skipped` is one that was read and is no proxy for us, `failed` one that is damaged. The message names a
    field and never quotes what stands in it.
    """

    def __init__(self, reason: str, kind: Kind) -> None:
        super().__init__(reason)
        self.kind: Kind = kind


@dataclass(frozen=True, slots=True)
class Found:
    """An entry as one store has it; its TTL and its expiry have not been judged yet."""

    entry: CacheEntry
    origin: tuple[str, str]
    """What the record is to proxywhirl: its key there, and its URL as it stands there."""
    lost_credentials: bool
    knows_monitoring: bool
    """Whether the store can hold health monitoring; `l2_cache.db` cannot."""

    def is_as_new_as(self, other: Found) -> bool:
        """Whether this copy of an entry is as new as another, or newer.

        proxywhirl leaves all times alone when it counts a failure: of copies that are otherwise as old, the
        one with more failures is the newer.
        """
        times, other_times = last_change(self.entry), last_change(other.entry)
        if not (self.knows_monitoring and other.knows_monitoring):
            # One of them cannot tell when it was checked.
            times, other_times = times[:2], other_times[:2]
        mine = (*times, self.entry.failure_count, self.knows_monitoring)
        return mine >= (*other_times, other.entry.failure_count, other.knows_monitoring)


def last_change(entry: CacheEntry) -> tuple[int, ...]:
    """When an entry was fetched, used and checked last, in microseconds since the epoch."""
    checked = entry.health_monitoring and entry.health_monitoring.last_health_check
    return (entry.fetch_time_us, entry.last_accessed_us, to_microseconds(checked) if checked else 0)


def read_record(record: Mapping[str, object], keyring: Keyring, *, without_credentials: bool) -> Found:
    """Read a line of a shard or a row of a table, the key being derived anew; raises RejectedRecordError.

    A record whose credentials cannot be opened is rejected, or comes without them if `without_credentials`.
    """
    url = _text(record, "proxy_url")
    if not url:
        raise RejectedRecordError("proxy_url is missing", "failed")
    username = password = None
    lost_credentials = False
    try:
        username = _secret(record, "username_encrypted", keyring)
        password = _secret(record, "password_encrypted", keyring)
    except SealedError as error:
        if not without_credentials:
            raise RejectedRecordError(str(error), "skipped") from None
        username = None
        lost_credentials = True
    monitoring = _monitoring(record)
    try:
        entry = CacheEntry(
            cache_key(url, username),
            url,
            _text(record, "source") or "",
            _needed_time(record, "fetch_time"),
            expires_at=_needed_time(record, "expires_at"),
            last_accessed=_time(record, "last_accessed"),
            username=username,
            password=password,
            access_count=_count(record, "access_count", MAX_USE),
            health_status=_health_status(record),
            failure_count=_count(record, "failure_count", MAX_COUNT),
            health_monitoring=None if monitoring == HealthMonitoring() else monitoring,
        )
    except InvalidProxyUrl as error:
        raise RejectedRecordError(f"invalid proxy_url: {error}", "skipped") from None
    except InvalidEntryError as error:
        raise RejectedRecordError(f"invalid {error.field}: {error}", "skipped") from None
    return Found(
        entry,
        origin=(_text(record, "key") or "", url),
        lost_credentials=lost_credentials,
        knows_monitoring=any(name in record for name in MONITORING_FIELDS),
    )


def _secret(record: Mapping[str, object], name: str, keyring: Keyring) -> str | None:
    """A credential, whose token is in hex in a shard and bytes in a table."""
    sealed = record.get(name)
    if not sealed:
        return None
    if isinstance(sealed, str):
        try:
            sealed = bytes.fromhex(sealed)
        except ValueError:
            raise RejectedRecordError(f"{name} is damaged", "failed") from None
    if not isinstance(sealed, bytes):
        raise RejectedRecordError(f"{name} is damaged", "failed")
    return keyring.open(sealed) or None


def _monitoring(record: Mapping[str, object]) -> HealthMonitoring:
    last_check, next_check = (_time(record, name) for name in _MONITORING_TIMES)
    counts = {name: _count(record, name, most) for name, most in MONITORING_COUNTS.items()}
    # A proxy is worth more than the tail of the message of why it failed. Redacted first, since half a URL is
    # not recognized.
    error = redact(_text(record, "last_health_error") or "")[:MAX_HEALTH_ERROR_LENGTH]
    return HealthMonitoring(
        last_health_check=last_check, next_check_time=next_check, last_health_error=error or None, **counts
    )


def _health_status(record: Mapping[str, object]) -> HealthStatus:
    word = _text(record, "health_status")
    if word is None:
        return HealthStatus.UNKNOWN
    try:
        return HealthStatus(word)
    except ValueError:
        known = ", ".join(status.value for status in HealthStatus)
        raise RejectedRecordError(f"health_status is none of {known}", "skipped") from None


def _needed_time(record: Mapping[str, object], name: str) -> datetime:
    time = _time(record, name)
    if time is None:
        raise RejectedRecordError(f"{name} is missing", "failed")
    return time


def _time(record: Mapping[str, object], name: str) -> datetime | None:
    """A time, which is ISO 8601 in a shard (naive means UTC) and seconds since the epoch in a table."""
    value = record.get(name)
    if value is None:
        return None
    try:
        if isinstance(value, str):
            time = datetime.fromisoformat(value)
            return time.replace(tzinfo=UTC) if time.tzinfo is None else time
        if isinstance(value, int | float) and not isinstance(value, bool):
            return datetime.fromtimestamp(value, UTC)
    except (ValueError, OverflowError, OSError):
        pass
    raise RejectedRecordError(f"{name} is no time", "failed")


def _count(record: Mapping[str, object], name: str, most: int) -> int:
    value = record.get(name)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_INT64:
        raise RejectedRecordError(f"{name} is no count", "failed")
    return min(value, most)


def _text(record: Mapping[str, object], name: str) -> str | None:
    value = record.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise RejectedRecordError(f"{name} is no text", "failed")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise RejectedRecordError(f"{name} is not valid Unicode", "failed")
    return value
