"""CacheEntry: one cached proxy, valid by construction and immutable; times are integers inside."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from operator import attrgetter
from time import time_ns
from typing import Any, Final, Literal, Protocol, Unpack

from pydantic import SecretStr

from proxystash.compiled import types_of
from proxystash.models import HealthMonitoring, HealthStatus
from proxystash.proxies import InvalidProxyUrl, ProxyAddress, parse_proxy_url, redact_url
from proxystash_server.cache.entry.fields import (
    FIELDS,
    PUBLIC_FIELDS,
    Content,
    EntryArguments,
    Fields,
    copy_of_content,
    public_name,
)
from proxystash_server.cache.entry.limits import (
    MAX_TTL_US,
    NO_LABELS,
    SECOND_US,
    check_expiry,
    check_failure_count,
    check_fetch_time,
    check_key,
    check_max_leases,
    check_source,
    check_ttl,
    check_uses,
    checked_credential,
    checked_health_status,
    checked_labels,
    checked_monitoring,
)
from proxystash_server.cache.errors import InvalidEntryError

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)

Clock = Callable[[], int]


def wall_clock() -> int:
    """Now, in microseconds since the epoch."""
    return time_ns() // 1000


def to_microseconds(moment: datetime) -> int:
    """Microseconds since the epoch; a naive datetime is taken as UTC."""
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - _EPOCH) // _MICROSECOND


def to_datetime(microseconds: int) -> datetime:
    """The aware datetime (UTC) of microseconds since the epoch."""
    return _EPOCH + timedelta(microseconds=microseconds)


class MutableEntry:
    """The storage of an entry, assignable; CacheEntry adds the lock on the door."""

    __slots__ = ("access_count", "content", "evicted_from_l1", "last_accessed_us")

    content: Content
    access_count: int
    last_accessed_us: int
    evicted_from_l1: bool


def _monitored(name: str) -> Any:  # noqa: ANN401 -- each attribute has a type of its own
    """A read-only attribute of an entry that is its health monitoring's, where it has any."""
    default = getattr(HealthMonitoring(), name)

    def read(entry: CacheEntry) -> object:
        monitoring = entry.content.health_monitoring
        return default if monitoring is None else getattr(monitoring, name)

    return property(read)


class CacheEntry(MutableEntry, Fields):
    """One cached proxy.

    Made by keyword, like proxywhirl's, from datetimes; times are kept as integer microseconds since the epoch
    (`fetch_time_us`, ...) and shown as aware datetimes too (`fetch_time`, ...). Naive datetimes are taken as
    UTC. Immutable: `model_copy(update=...)` makes a changed one. Credentials are SecretStr and in no repr; a
    pickle has them in clear.

    Raises InvalidEntryError, which names the field, for anything outside the limits: key 256 bytes, URL 2,048
    characters, source 128, 32 labels of 64 + 256, TTL 1 s to 10 years.
    """

    __slots__ = ()

    # The health monitoring fields are also reachable directly, as in proxywhirl. Not by a __getattr__, which
    # would make every attribute cost three times as much.
    last_health_check: datetime | None = _monitored("last_health_check")
    consecutive_health_failures: int = _monitored("consecutive_health_failures")
    consecutive_health_successes: int = _monitored("consecutive_health_successes")
    recovery_attempt: int = _monitored("recovery_attempt")
    next_check_time: datetime | None = _monitored("next_check_time")
    last_health_error: str | None = _monitored("last_health_error")
    total_health_checks: int = _monitored("total_health_checks")
    total_health_check_failures: int = _monitored("total_health_check_failures")

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
        max_leases: int = 0,
        **monitoring: Any,  # noqa: ANN401 -- each field of HealthMonitoring has a type of its own
    ) -> None:
        unknown = monitoring.keys() - _NO_MONITORING.keys()
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
            read_address(proxy_url),
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
            max_leases=max_leases,
        )
        check_expiry(expires)
        for name in MutableEntry.__slots__:
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

    def model_dump(self, *, mode: Literal["python", "json"] = "python") -> dict[str, Any]:
        """The fields by name, as proxywhirl's entry has them, and the labels.

        What JSON has no type for is text in the mode `json`: times in ISO 8601, and *** for each credential.
        """
        fields = {name: getattr(self, name) for name in _DUMPED}
        fields["labels"] = dict(self.labels)
        if mode == "json":
            for name, value in fields.items():
                if isinstance(value, SecretStr):
                    fields[name] = _MASK
                elif isinstance(value, datetime):
                    fields[name] = value.isoformat()
                elif isinstance(value, HealthStatus):
                    fields[name] = value.value
        return fields

    @classmethod
    def model_validate(cls, fields: Mapping[str, Any] | CacheEntry) -> CacheEntry:
        """The entry of what `model_dump` gave; its time of expiry counts for more than its TTL.

        Raises InvalidEntryError, also for credentials that are masked, and TypeError for unknown fields.
        """
        if isinstance(fields, CacheEntry):
            return fields
        arguments = dict(fields)
        for name, value in fields.items():
            if name in _CREDENTIALS and value == _MASK:
                raise InvalidEntryError(
                    name, "INVALID_CREDENTIALS", f"{name} is masked: dump the entry in the mode python"
                )
            if name in _MOMENTS and isinstance(value, str):
                try:
                    arguments[name] = datetime.fromisoformat(value)
                except ValueError:
                    raise InvalidEntryError(
                        name, f"INVALID_{name.upper()}", f"{name} is no time in ISO 8601"
                    ) from None
        if arguments.get("expires_at") is not None:
            arguments.pop("ttl_seconds", None)
        if all(arguments.get(name) == default for name, default in _NO_MONITORING.items()):
            arguments = {name: value for name, value in arguments.items() if name not in _NO_MONITORING}
        return cls(**arguments)

    def model_copy(self, *, update: Mapping[str, Any] | None = None) -> CacheEntry:
        """A copy with the constructor's arguments in `update` changed, checked like a new entry."""
        arguments = self._arguments()
        changes = dict(update or {})
        if ("ttl_seconds" in changes or "fetch_time" in changes) and "expires_at" not in changes:
            del arguments["expires_at"]
            arguments["ttl_seconds"] = self.ttl_us / SECOND_US
        return CacheEntry(**{**arguments, **changes})

    def _arguments(self) -> dict[str, Any]:
        """What the constructor makes an equal entry of."""
        return {name: getattr(self, name) for name in _ARGUMENTS}

    def __reduce__(self) -> tuple[object, ...]:
        # Without what is the cache's own: its seal, its version, its encoded form.
        return partial(CacheEntry, **{**self._arguments(), "labels": dict(self.labels)}), ()

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
        return _compared(self) == _compared(other)

    def __hash__(self) -> int:
        return hash((self.key, self.fetch_time_us))

    def __repr__(self) -> str:
        secret = ", credentials=***" if self.username or self.password else ""
        return (
            f"CacheEntry(key={redact_url(self.key)!r}, proxy_url={self.proxy_url!r}{secret}, "
            f"source={self.source!r}, health_status={self.health_status.value!r}, "
            f"failure_count={self.failure_count}, access_count={self.access_count}, "
            f"expires_at={self.expires_at.isoformat()})"
        )


for _name in FIELDS:
    setattr(CacheEntry, _name, property(attrgetter(f"content.{_name}")))
_USE: Final = tuple(name for name in MutableEntry.__slots__ if name != "content")
_compared: Final = attrgetter(*PUBLIC_FIELDS, *_USE)
_ARGUMENTS: Final = tuple(public_name(name) for name in (*PUBLIC_FIELDS, *_USE))
_NO_MONITORING: Final = {name: getattr(HealthMonitoring(), name) for name in types_of(HealthMonitoring)}
_DUMPED: Final = (
    *(name for name in _ARGUMENTS if name not in ("health_monitoring", "labels")),
    "ttl_seconds",
    *_NO_MONITORING,
)
_CREDENTIALS: Final = ("username", "password")
_MOMENTS: Final = ("fetch_time", "expires_at", "last_accessed", "last_health_check", "next_check_time")
_MASK: Final = "***"


class NewEntry(Protocol):
    """Makes an entry, with what is missing filled in, as CacheManager.new_entry does."""

    def __call__(self, proxy_url: str, **arguments: Unpack[EntryArguments]) -> CacheEntry:
        """The entry; raises InvalidEntryError."""


def read_address(proxy_url: str) -> ProxyAddress:
    """What a proxy URL says; raises InvalidEntryError."""
    try:
        return parse_proxy_url(proxy_url)
    except InvalidProxyUrl as error:
        raise InvalidEntryError("proxy_url", "INVALID_PROXY_URL", str(error)) from None


def make_entry(
    address: ProxyAddress,
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
    max_leases: int = 0,
) -> CacheEntry:
    """A new entry from integers, every limit but the TTL's checked; raises InvalidEntryError."""
    check_key(key)
    check_source(source)
    check_fetch_time(fetch_time_us)
    check_failure_count(failure_count)
    check_max_leases(max_leases)
    check_uses(access_count, last_accessed_us)
    content = Content()
    content.key = key
    content.proxy_url = address.url
    content.username = checked_credential("username", username, address.username)
    content.password = checked_credential("password", password, address.password)
    content.source = source
    content.fetch_time_us = fetch_time_us
    content.expires_at_us = expires_at_us
    content.health_status = health_status
    content.failure_count = failure_count
    content.health_monitoring = None if health_monitoring is None else checked_monitoring(health_monitoring)
    content.labels = checked_labels(labels) if labels else NO_LABELS
    content.sealed = None
    content.version = 0
    content.max_leases = max_leases
    content.encoded = None
    return entry_of_content(content, access_count, last_accessed_us, evicted_from_l1)


def entry_of_content(
    content: Content, access_count: int, last_accessed_us: int, evicted_from_l1: bool
) -> CacheEntry:
    """The entry of a content, which nobody changes from now on. Nothing is checked."""
    use = MutableEntry()
    use.content = content
    use.access_count = access_count
    use.last_accessed_us = last_accessed_us
    use.evicted_from_l1 = evicted_from_l1
    # Both classes have the same layout, so filling the open one and changing its class costs a fraction of
    # going through object.__setattr__ for each.
    use.__class__ = CacheEntry
    return use  # type: ignore[return-value]  # mypy cannot follow the line above


def used(entry: CacheEntry, now_us: int) -> CacheEntry:
    """`entry` after one more use, back in memory."""
    # On the path of every hit, so what `entry_of_content` does is written out.
    use = MutableEntry()
    use.content = entry.content
    use.access_count = entry.access_count + 1
    use.last_accessed_us = now_us
    use.evicted_from_l1 = False
    use.__class__ = CacheEntry
    return use  # type: ignore[return-value]  # mypy cannot follow the line above


def with_use(
    entry: CacheEntry, access_count: int, last_accessed_us: int, evicted_from_l1: bool
) -> CacheEntry:
    """`entry`, used otherwise."""
    return entry_of_content(entry.content, access_count, last_accessed_us, evicted_from_l1)


def with_health(entry: CacheEntry, health_status: HealthStatus, failure_count: int) -> CacheEntry:
    """`entry` with another health status and failure count."""
    content = copy_of_content(entry.content)
    content.health_status = health_status
    content.failure_count = failure_count
    return entry_of_content(content, entry.access_count, entry.last_accessed_us, entry.evicted_from_l1)


def stamped(
    entry: CacheEntry, key: str, version: int, failure_count: int, sealed: bytes | None
) -> CacheEntry:
    """`entry` as the write numbered `version` is about to store it under `key`."""
    content = copy_of_content(entry.content)
    content.key = key
    content.version = version
    content.failure_count = failure_count
    content.sealed = sealed
    return entry_of_content(content, entry.access_count, entry.last_accessed_us, entry.evicted_from_l1)


def keep_encoded(entry: CacheEntry, encoded: bytes) -> None:
    """Keep `encoded`, made of the content alone, as `entry.encoded` for as long as that content is held.

    Threads may do so at the same time, with equal bytes.
    """
    entry.content.encoded = encoded


def _plain(secret: SecretStr | str | None) -> str | None:
    return secret.get_secret_value() if isinstance(secret, SecretStr) else secret
