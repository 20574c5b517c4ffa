"""One record of a proxy file and one cache entry: each made from the other."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from proxystash.compiled import compile_function, field_sources
from proxystash.models import MAX_INT32, MAX_INT64, CacheEntry, HealthMonitoring, HealthStatus, Int32, Int64
from proxystash.proxies import InvalidProxyUrl, ProxyAddress, cache_key, is_ipv6, parse_proxy_url, redact

Record = Mapping[str, object]

_DEFAULT_SCHEME = "http"
_MAX_KEY_BYTES = 256
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_EPOCH = re.compile(r"-?[0-9]+(?:\.[0-9]*)?")
_INTEGER = re.compile(r"-?[0-9]{1,19}")

# What a record may call its fields; the first name that has a value counts.
URL_FIELDS = ("proxy_url", "url", "proxy")
SCHEME_FIELDS = ("protocol", "scheme")
HOST_FIELDS = ("ip", "host")


class UnusableRecordError(ValueError):
    """A readable record that is no usable proxy. The message names the field and quotes no value."""


def entry_from_record(record: Record, *, now: datetime) -> CacheEntry:
    """Make an entry of a record; `now` decides whether it has expired.

    Unknown fields are ignored. The key is always set. Raises UnusableRecordError.
    """
    return _read_entry(record, _address(record), *_lifetime(record, now))


def record_from_entry(entry: CacheEntry, *, include_credentials: bool) -> dict[str, object]:
    """Make a record that `entry_from_record` reads back, leaving out what is unset.

    Without credentials, userinfo in the URL and in the last health error is left out, too.
    """
    address = parse_proxy_url(entry.proxy_url)
    username = entry.username or address.username
    record = _write_entry(entry)
    record["proxy_url"] = address.url
    record["key"] = entry.key or cache_key(address.url, username)
    record["username"] = username if include_credentials else None
    record["password"] = (entry.password or address.password) if include_credentials else None
    if entry.health_monitoring is not None:
        record["health_monitoring"] = _monitoring_record(entry.health_monitoring, include_credentials)
    return _without_unset(record)


def as_utc(time: datetime) -> datetime:
    """The same moment in UTC, a naive time being UTC already."""
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def time_text(time: datetime | None) -> str | None:
    """A time as ISO 8601 in UTC, to the microsecond."""
    return None if time is None else as_utc(time).isoformat().replace("+00:00", "Z")


def _address(record: Record) -> ProxyAddress:
    url = _text(record, *URL_FIELDS)
    scheme = _text(record, *SCHEME_FIELDS)
    host = _text(record, *HOST_FIELDS)
    if url is not None:
        text = url if "://" in url else f"{scheme or _DEFAULT_SCHEME}://{url}"
    elif host is None:
        raise UnusableRecordError("no proxy_url, and no protocol, host and port instead")
    elif scheme is None:
        raise UnusableRecordError("no protocol")
    else:
        text = f"{scheme}://{f'[{host}]' if is_ipv6(host) else host}:{_port(record)}"
    try:
        address = parse_proxy_url(text)
    except InvalidProxyUrl as error:
        raise UnusableRecordError(str(error)) from None
    return ProxyAddress(
        address.url,
        _credential(record, "username", address.username),
        _credential(record, "password", address.password),
    )


def _port(record: Record) -> int:
    port = record.get("port")
    if port is None or port == "":
        raise UnusableRecordError("no port")
    return _integer(port, "port")


def _credential(record: Record, name: str, in_url: str | None) -> str | None:
    value = _text(record, name)
    if value is not None and in_url is not None and value != in_url:
        raise UnusableRecordError(f"the {name} in the URL is not the one beside it")
    if value is not None and _CONTROL.search(value):
        raise UnusableRecordError(f"{name} contains a control character")
    return value or in_url


def _key(record: Record) -> str | None:
    key = _text(record, "key")
    if key is not None and len(key.encode()) > _MAX_KEY_BYTES:
        raise UnusableRecordError(f"key is longer than {_MAX_KEY_BYTES} bytes")
    if key is not None and _CONTROL.search(key):
        raise UnusableRecordError("key contains a control character")
    return key


def _lifetime(record: Record, now: datetime) -> tuple[datetime | None, timedelta | None, datetime | None]:
    """Work out when the proxy was fetched, how long it lives, and when it expires, as far as that is known.

    Two of the three give the third, a TTL counting for more than an expiry time; an expiry time alone is
    counted from now.
    """
    fetch_time = _time(record, "fetch_time")
    expires_at = _time(record, "expires_at")
    ttl = _ttl(record)
    try:
        if ttl is not None and fetch_time is not None:
            expires_at = fetch_time + ttl
        elif ttl is not None and expires_at is not None:
            fetch_time = expires_at - ttl
        elif expires_at is not None:
            fetch_time = fetch_time or now
            ttl = expires_at - fetch_time
    except OverflowError:
        raise UnusableRecordError("it expires outside the years 1 to 9999") from None
    if expires_at is not None and expires_at <= now:
        raise UnusableRecordError(f"it expired at {time_text(expires_at)}")
    if ttl is not None and ttl <= timedelta(0):
        raise UnusableRecordError("expires_at is before fetch_time")
    return fetch_time, ttl, expires_at


def _ttl(record: Record) -> timedelta | None:
    name, value = _first(record, "ttl_seconds", "ttl")
    if value is None:
        return None
    seconds = _number(value, name)
    if seconds <= 0:
        raise UnusableRecordError(f"{name} is not greater than zero")
    try:
        return timedelta(seconds=seconds)
    except OverflowError:
        raise UnusableRecordError(f"{name} is too large") from None


def _time(record: Record, name: str) -> datetime | None:
    """A time as ISO 8601 (naive means UTC) or as seconds since the epoch."""
    _, value = _first(record, name)
    if value is None:
        return None
    try:
        if isinstance(value, str) and not _EPOCH.fullmatch(value):
            return as_utc(datetime.fromisoformat(value))
        return datetime.fromtimestamp(_number(value, name), UTC)
    except (ValueError, OverflowError, OSError):
        raise UnusableRecordError(f"{name} is neither an ISO 8601 time nor seconds since the epoch") from None


def _health_status(record: Record) -> HealthStatus:
    word = _text(record, "health_status", "status")
    if word is None:
        return HealthStatus.UNKNOWN
    try:
        return HealthStatus(word.lower())
    except ValueError:
        name, _ = _first(record, "health_status", "status")
        words = ", ".join(HealthStatus)
        raise UnusableRecordError(f"{name} is none of {words}") from None


def _health_monitoring(record: Record) -> HealthMonitoring | None:
    inner = _object(record, "health_monitoring")
    if inner is not None:
        return _read_monitoring(inner)
    last_checked = _time(record, "last_checked")
    return None if last_checked is None else HealthMonitoring(last_health_check=last_checked)


def _monitoring_record(monitoring: HealthMonitoring, include_credentials: bool) -> dict[str, object]:
    record = _write_monitoring(monitoring)
    error = monitoring.last_health_error
    if error is not None and not include_credentials:
        record["last_health_error"] = redact(error)
    return _without_unset(record)


def _labels(record: Record) -> dict[str, str]:
    labels: dict[str, str] = {}
    for name, value in (_object(record, "labels") or {}).items():
        if not isinstance(value, str):
            raise UnusableRecordError("labels is not an object of texts")
        labels[_unicode(name, "labels")] = _unicode(value, "labels")
    country = _text(record, "country_code")
    if country is not None:
        labels.setdefault("country", country)
    return labels


def _object(record: Record, name: str) -> Record | None:
    """A nested object; a CSV cell holds it as JSON."""
    _, value = _first(record, name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    elif value is None:
        return None
    if not isinstance(value, dict):
        raise UnusableRecordError(f"{name} is not an object")
    return value


def _first(record: Record, *names: str) -> tuple[str, object]:
    """The first of the named fields that has a value, with its name; empty text is no value."""
    for name in names:
        value = record.get(name)
        if value is not None and value != "":
            return name, value
    return names[0], None


def _text(record: Record, *names: str) -> str | None:
    name, value = _first(record, *names)
    if value is None:
        return None
    if not isinstance(value, str):
        raise UnusableRecordError(f"{name} is not text")
    return _unicode(value, name)


def _unicode(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UnusableRecordError(f"{name} is not valid Unicode") from None
    return text


def _count(record: Record, name: str, largest: int) -> int:
    _, value = _first(record, name)
    if value is None:
        return 0
    count = _integer(value, name)
    if count < 0:
        raise UnusableRecordError(f"{name} is negative")
    return min(count, largest)


def _integer(value: object, name: str) -> int:
    if isinstance(value, str) and _INTEGER.fullmatch(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UnusableRecordError(f"{name} is not a whole number")
    return value


def _number(value: object, name: str) -> float:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UnusableRecordError(f"{name} is not a number")
    return value


def _seconds(duration: timedelta | None) -> float | int | None:
    if duration is None:
        return None
    seconds = duration.total_seconds()
    return int(seconds) if seconds.is_integer() else seconds


def _without_unset(record: Record) -> dict[str, object]:
    return {name: value for name, value in record.items() if value is not None and value != ""}


# How a value gets out of a record, by its field's name or else its type.
_READ: Mapping[object, str] = {
    "proxy_url": "address.url",
    "key": "_key(record) or cache_key(address.url, address.username)",
    "username": "address.username",
    "password": "address.password",
    "fetch_time": "fetch_time",
    "ttl": "ttl",
    "expires_at": "expires_at",
    "evicted_from_l1": "False",
    str: "_text(record, {0!r}) or ''",
    str | None: "_text(record, {0!r})",
    datetime | None: "_time(record, {0!r})",
    Int32: f"_count(record, {{0!r}}, {MAX_INT32})",
    Int64: f"_count(record, {{0!r}}, {MAX_INT64})",
    HealthStatus: "_health_status(record)",
    HealthMonitoring | None: "_health_monitoring(record)",
    Mapping[str, str]: "_labels(record)",
}
# And what it is in one; None and an empty text are left out.
_WRITE: Mapping[object, str] = {
    **dict.fromkeys((str, str | None, Int32, Int64), "model.{0}"),
    "evicted_from_l1": "",
    datetime | None: "time_text(model.{0})",
    timedelta | None: "_seconds(model.{0})",
    HealthStatus: "model.{0}.value",
    HealthMonitoring | None: "model.{0}",
    Mapping[str, str]: "dict(model.{0}) or None",
}


def _reader(model: type, parameters: str) -> Callable[..., Any]:
    values = ", ".join(field_sources(model, _READ).values())
    name = model.__name__
    return compile_function(f"read_{name}({parameters})", [f"return {name}({values})"], globals())


def _writer(model: type, key: Callable[[str], bool] = bool) -> Callable[[Any], dict[str, object]]:
    """Makes a record, its fields sorted by `key`."""
    values = field_sources(model, _WRITE)
    pairs = [
        f"{'ttl_seconds' if name == 'ttl' else name!r}: {values[name]}" for name in sorted(values, key=key)
    ]
    return compile_function(f"write_{model.__name__}(model)", [f"return {{{', '.join(pairs)}}}"], globals())


def _is_always_set(name: str) -> bool:
    return getattr(HealthMonitoring(), name) is not None


_read_monitoring: Callable[[Record], HealthMonitoring] = _reader(HealthMonitoring, "record")
_read_entry: Callable[..., CacheEntry] = _reader(CacheEntry, "record, address, fetch_time, ttl, expires_at")
_write_monitoring = _writer(HealthMonitoring, key=_is_always_set)
_write_entry = _writer(CacheEntry)
