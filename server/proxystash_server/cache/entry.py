"""CacheEntry: one cached proxy, valid by construction and immutable; times are integers inside."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import fields as dataclass_fields
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any, Final

from pydantic import SecretStr

from proxystash.models import HealthMonitoring, HealthStatus
from proxystash.proxies import InvalidProxyUrl, parse_proxy_url
from proxystash_server.cache.errors import InvalidEntryError
from proxystash_server.cache.limits import (
    MAX_TTL_US,
    NO_LABELS,
    SECOND_US,
    check_failure_count,
    check_fetch_time,
    check_key,
    check_source,
    check_ttl,
    check_uses,
    checked_credential,
    checked_health_status,
    checked_labels,
    checked_monitoring,
)

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_MONITORING_FIELDS: Final = frozenset(field.name for field in dataclass_fields(HealthMonitoring))

Clock = Callable[[], int]


def wall_clock() -> int:
    """Now, in microseconds since the epoch."""
    return time.time_ns() // 1000


def to_microseconds(moment: datetime) -> int:
    """Microseconds since the epoch; a naive datetime is taken as UTC."""
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - _EPOCH) // _MICROSECOND


def to_datetime(microseconds: int) -> datetime:
    """The aware datetime (UTC) of microseconds since the epoch."""
    return _EPOCH + timedelta(microseconds=microseconds)


class _Fields:
    """The storage of an entry, assignable; CacheEntry adds the lock on the door."""

    __slots__ = (
        "access_count",
        "evicted_from_l1",
        "expires_at_us",
        "failure_count",
        "fetch_time_us",
        "health_monitoring",
        "health_status",
        "key",
        "labels",
        "last_accessed_us",
        "password",
        "proxy_url",
        "sealed",
        "source",
        "username",
        "version",
    )

    key: str
    proxy_url: str
    username: SecretStr | None
    password: SecretStr | None
    source: str
    fetch_time_us: int
    expires_at_us: int
    last_accessed_us: int
    access_count: int
    health_status: HealthStatus
    failure_count: int
    evicted_from_l1: bool
    health_monitoring: HealthMonitoring | None
    labels: Mapping[str, str]
    # The credentials as they stand on disk, once they have been there, so that no tier seals them twice.
    sealed: bytes | None
    # Names the write that stored this content; access counts of an earlier write never reach a later one.
    version: int


class CacheEntry(_Fields):
    """One cached proxy.

    Made by keyword, like proxywhirl's, from datetimes; times are kept as integer microseconds since the epoch
    (`fetch_time_us`, ...) and shown as aware datetimes too (`fetch_time`, ...). Naive datetimes are taken as
    UTC. Immutable: `model_copy(update=...)` makes a changed one. Credentials are SecretStr and in no repr.

    Raises InvalidEntryError, which names the field, for anything outside the limits: key 256 bytes, URL 2,048
    characters, source 128, 32 labels of 64 + 256, TTL 1 s to 10 years.
    """

    __slots__ = ()

    def __init__(
        self,
        key: str,
        proxy_url: str,
        source: str = "",
        fetch_time: datetime | None = None,
        *,
        ttl_seconds: float | None = None,
        expires_at: datetime | None = None,
        last_accessed: datetime | None = None,
        username: SecretStr | str | None = None,
        password: SecretStr | str | None = None,
        access_count: int = 0,
        health_status: HealthStatus = HealthStatus.UNKNOWN,
        failure_count: int = 0,
        evicted_from_l1: bool = False,
        health_monitoring: HealthMonitoring | None = None,
        labels: Mapping[str, str] | None = None,
        **monitoring: Any,  # noqa: ANN401 -- each field of HealthMonitoring has a type of its own
    ) -> None:
        unknown = monitoring.keys() - _MONITORING_FIELDS
        if unknown:
            raise TypeError(f"CacheEntry has no field {min(unknown)!r}")
        if monitoring:
            health_monitoring = HealthMonitoring(**monitoring)
        fetched = wall_clock() if fetch_time is None else to_microseconds(fetch_time)
        if ttl_seconds is None and expires_at is None:
            raise InvalidEntryError("ttl", "INVALID_TTL", "an entry needs ttl_seconds or expires_at")
        ttl = 0
        if ttl_seconds is not None:
            ttl = round(ttl_seconds * SECOND_US) if math.isfinite(ttl_seconds) else 0
            check_ttl(ttl)
        expires = fetched + ttl if expires_at is None else to_microseconds(expires_at)
        if expires - fetched > MAX_TTL_US:
            check_ttl(expires - fetched)
        made = make_entry(
            proxy_url,
            key=key,
            username=_plain(username),
            password=_plain(password),
            source=source,
            fetch_time_us=fetched,
            expires_at_us=expires,
            last_accessed_us=fetched if last_accessed is None else to_microseconds(last_accessed),
            access_count=access_count,
            health_status=checked_health_status(health_status),
            failure_count=failure_count,
            evicted_from_l1=evicted_from_l1,
            health_monitoring=health_monitoring,
            labels=labels or NO_LABELS,
        )
        for name in _Fields.__slots__:
            object.__setattr__(self, name, getattr(made, name))

    @property
    def fetch_time(self) -> datetime:
        """When the proxy was fetched."""
        return to_datetime(self.fetch_time_us)

    @property
    def expires_at(self) -> datetime:
        """From when on the entry is never returned."""
        return to_datetime(self.expires_at_us)

    @property
    def last_accessed(self) -> datetime:
        """When a get last returned the entry; its fetch time before the first."""
        return to_datetime(self.last_accessed_us)

    @property
    def ttl_us(self) -> int:
        """How long the entry lives from its fetch time, in microseconds."""
        return max(0, self.expires_at_us - self.fetch_time_us)

    @property
    def ttl_seconds(self) -> int:
        """How long the entry lives from its fetch time, in whole seconds."""
        return self.ttl_us // SECOND_US

    @property
    def is_expired(self) -> bool:
        """Whether the entry has expired by the wall clock."""
        return wall_clock() >= self.expires_at_us

    @property
    def is_healthy(self) -> bool:
        """Whether the last word on the proxy was that it works."""
        return self.health_status == HealthStatus.HEALTHY

    def model_copy(self, *, update: Mapping[str, Any] | None = None) -> CacheEntry:
        """A copy with the constructor's arguments in `update` changed, checked like a new entry."""
        arguments: dict[str, Any] = {
            "key": self.key,
            "proxy_url": self.proxy_url,
            "source": self.source,
            "fetch_time": self.fetch_time,
            "expires_at": self.expires_at,
            "last_accessed": self.last_accessed,
            "username": self.username,
            "password": self.password,
            "access_count": self.access_count,
            "health_status": self.health_status,
            "failure_count": self.failure_count,
            "evicted_from_l1": self.evicted_from_l1,
            "health_monitoring": self.health_monitoring,
            "labels": self.labels,
        }
        changes = dict(update or {})
        if ("ttl_seconds" in changes or "fetch_time" in changes) and "expires_at" not in changes:
            del arguments["expires_at"]
            arguments["ttl_seconds"] = self.ttl_us / SECOND_US
        return CacheEntry(**{**arguments, **changes})

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 -- as above
        # The health monitoring fields are also reachable directly, as in proxywhirl.
        if name in _MONITORING_FIELDS:
            return getattr(self.health_monitoring or HealthMonitoring(), name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"CacheEntry is immutable; use model_copy(update={{{name!r}: ...}})")

    __delattr__ = __setattr__  # type: ignore[assignment]  # refuses just the same, whatever it is given

    def __copy__(self) -> CacheEntry:
        return self

    def __deepcopy__(self, _memo: object) -> CacheEntry:
        return self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CacheEntry):
            return NotImplemented
        return self._public() == other._public()

    def __hash__(self) -> int:
        return hash((self.key, self.fetch_time_us))

    def __repr__(self) -> str:
        secret = ", credentials=***" if self.username or self.password else ""
        return (
            f"CacheEntry(key={self.key!r}, proxy_url={self.proxy_url!r}{secret}, source={self.source!r}, "
            f"health_status={self.health_status.value!r}, failure_count={self.failure_count}, "
            f"access_count={self.access_count}, expires_at={self.expires_at.isoformat()})"
        )

    def _public(self) -> tuple[object, ...]:
        names = (name for name in _Fields.__slots__ if name not in ("labels", "sealed", "version"))
        return (*(getattr(self, name) for name in names), dict(self.labels))


def make_entry(
    proxy_url: str,
    *,
    key: str,
    username: str | None,
    password: str | None,
    source: str,
    fetch_time_us: int,
    expires_at_us: int,
    last_accessed_us: int,
    access_count: int = 0,
    health_status: HealthStatus = HealthStatus.UNKNOWN,
    failure_count: int = 0,
    evicted_from_l1: bool = False,
    health_monitoring: HealthMonitoring | None = None,
    labels: Mapping[str, str] = NO_LABELS,
) -> CacheEntry:
    """A new entry from integers, every limit but the TTL's checked; raises InvalidEntryError."""
    try:
        address = parse_proxy_url(proxy_url)
    except InvalidProxyUrl as error:
        raise InvalidEntryError("proxy_url", "INVALID_PROXY_URL", str(error)) from None
    check_key(key)
    check_source(source)
    check_fetch_time(fetch_time_us)
    check_failure_count(failure_count)
    check_uses(access_count, last_accessed_us)
    entry = _Fields()
    entry.key = key
    entry.proxy_url = address.url
    entry.username = checked_credential("username", username, address.username)
    entry.password = checked_credential("password", password, address.password)
    entry.source = source
    entry.fetch_time_us = fetch_time_us
    entry.expires_at_us = expires_at_us
    entry.last_accessed_us = last_accessed_us
    entry.access_count = access_count
    entry.health_status = health_status
    entry.failure_count = failure_count
    entry.evicted_from_l1 = evicted_from_l1
    entry.health_monitoring = None if health_monitoring is None else checked_monitoring(health_monitoring)
    entry.labels = checked_labels(labels) if labels else NO_LABELS
    entry.sealed = None
    entry.version = 0
    return _close(entry)


def restore_entry(
    key: str,
    proxy_url: str,
    username: str | None,
    password: str | None,
    source: str,
    fetch_time_us: int,
    expires_at_us: int,
    last_accessed_us: int,
    access_count: int,
    health_status: str,
    failure_count: int,
    evicted_from_l1: bool,
    health_monitoring: HealthMonitoring | None,
    labels: Mapping[str, str],
    sealed: bytes | None,
    version: int,
) -> CacheEntry:
    """An entry as a tier stored it. Not checked again: tiers prove their records with checksums."""
    entry = _Fields()
    entry.key = key
    entry.proxy_url = proxy_url
    entry.username = None if username is None else SecretStr(username)
    entry.password = None if password is None else SecretStr(password)
    entry.source = source
    entry.fetch_time_us = fetch_time_us
    entry.expires_at_us = expires_at_us
    entry.last_accessed_us = last_accessed_us
    entry.access_count = access_count
    entry.health_status = _HEALTH_STATUSES[health_status]
    entry.failure_count = failure_count
    entry.evicted_from_l1 = evicted_from_l1
    entry.health_monitoring = health_monitoring
    entry.labels = MappingProxyType(dict(labels)) if labels else NO_LABELS
    entry.sealed = sealed
    entry.version = version
    return _close(entry)


def accessed(entry: CacheEntry, now_us: int) -> CacheEntry:
    """`entry` after one more use, back in memory. On the path of every hit."""
    used = _copy(entry)
    used.access_count = entry.access_count + 1
    used.last_accessed_us = now_us
    used.evicted_from_l1 = False
    return _close(used)


def with_access(
    entry: CacheEntry, access_count: int, last_accessed_us: int, evicted_from_l1: bool
) -> CacheEntry:
    """`entry` with other access facts."""
    changed = _copy(entry)
    changed.access_count = access_count
    changed.last_accessed_us = last_accessed_us
    changed.evicted_from_l1 = evicted_from_l1
    return _close(changed)


def with_health(entry: CacheEntry, health_status: HealthStatus, failure_count: int) -> CacheEntry:
    """`entry` with another health status and failure count."""
    changed = _copy(entry)
    changed.health_status = health_status
    changed.failure_count = failure_count
    return _close(changed)


def stamped(
    entry: CacheEntry, key: str, version: int, failure_count: int, sealed: bytes | None
) -> CacheEntry:
    """`entry` as the write numbered `version` is about to store it under `key`."""
    changed = _copy(entry)
    changed.key = key
    changed.version = version
    changed.failure_count = failure_count
    changed.sealed = sealed
    return _close(changed)


def _copy(entry: CacheEntry) -> _Fields:
    # Written out: a loop over the slots takes four times as long, and every hit makes a copy.
    copy = _Fields()
    copy.key = entry.key
    copy.proxy_url = entry.proxy_url
    copy.username = entry.username
    copy.password = entry.password
    copy.source = entry.source
    copy.fetch_time_us = entry.fetch_time_us
    copy.expires_at_us = entry.expires_at_us
    copy.last_accessed_us = entry.last_accessed_us
    copy.access_count = entry.access_count
    copy.health_status = entry.health_status
    copy.failure_count = entry.failure_count
    copy.evicted_from_l1 = entry.evicted_from_l1
    copy.health_monitoring = entry.health_monitoring
    copy.labels = entry.labels
    copy.sealed = entry.sealed
    copy.version = entry.version
    return copy


def _close(fields: _Fields) -> CacheEntry:
    # Both classes have the same layout, so filling the open one and changing its class costs a tenth of going
    # through object.__setattr__ sixteen times.
    fields.__class__ = CacheEntry
    return fields  # type: ignore[return-value]  # mypy cannot follow the line above


_HEALTH_STATUSES: Final = {status.value: status for status in HealthStatus}


def _plain(secret: SecretStr | str | None) -> str | None:
    return secret.get_secret_value() if isinstance(secret, SecretStr) else secret
