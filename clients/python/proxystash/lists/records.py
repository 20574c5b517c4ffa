"""Entries of a raw record: one for each proxy that it names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from proxystash.compiled import compile_function, field_sources
from proxystash.lists.addresses import Address, parse_location, read_address
from proxystash.lists.fields import Fields
from proxystash.lists.outcomes import Default, Record, Rejected, UnusableRecordError
from proxystash.lists.words import is_fact, read_schemes
from proxystash.models import MAX_INT32, MAX_INT64, CacheEntry, HealthMonitoring, HealthStatus, Int32, Int64
from proxystash.proxies import SCHEMES, Identity, InvalidProxyUrl, ProxyAddress, is_ipv6, key_by
from proxystash.times import time_text

_MAX_KEY_BYTES = 256
_YES = frozenset(("1", "yes", "y", "true", "t", "+", "on", "✓", "x"))
_NO = frozenset(("", "0", "no", "n", "false", "f", "-", "off", "none", "null"))


@dataclass
class Reading:
    """How records are read, and what was noticed on the way: shared by all that are loaded together."""

    now: datetime
    scheme: str | None = None
    shape: str | None = None
    identity: Identity = Identity.USER
    # What was guessed or left out, and in how many records.
    notices: Counter[str] = field(default_factory=Counter)
    # Where each key was first seen; and, where there was a password, something to compare it by.
    _seen: dict[str, str] = field(default_factory=dict)
    _passwords: dict[str, int] = field(default_factory=dict)

    def place_of(self, key: str) -> str:
        """Where a key was first seen."""
        return self._seen[key]

    def entries(self, where: str, record: Record, default: Default) -> Iterator[CacheEntry | Rejected]:
        """An entry for each proxy that a record names, or why there is none."""
        fields = Fields(record)
        try:
            lifetime = _lifetime(fields, self.now)
            addresses = [*self._addresses(fields, default)]
        except UnusableRecordError as error:
            yield Rejected.of(where, error)
            return
        loaded = False
        for address in addresses:
            try:
                yield self._entry(where, fields, address, lifetime)
                loaded = True
            except UnusableRecordError as error:
                yield Rejected.of(where, error)
        if loaded:
            for name in dict.fromkeys(fields.lost):
                self.notices[f"{name} could not be read and was left out"] += 1
            if fields.guess:
                self.notices[fields.guess] += 1

    def _entry(
        self, where: str, fields: Fields, address: ProxyAddress | UnusableRecordError, lifetime: _Lifetime
    ) -> CacheEntry:
        if isinstance(address, UnusableRecordError):
            raise address
        key = _own_key(fields) or key_by(self.identity, address)
        if key in self._seen:
            other = self._other_password(key, address)
            raise UnusableRecordError(f"duplicate of {self._seen[key]}{other}", f"duplicate{other}")
        self._seen[key] = where
        if address.password:
            self._passwords[key] = hash(address.password)
        return _read_entry(fields, address, key, *lifetime)

    def _other_password(self, key: str, address: ProxyAddress) -> str:
        if not address.password or self._passwords.get(key) == hash(address.password):
            return ""
        return (
            ", which differs in the password alone: give them keys of their own, or load them with "
            "--identity user+password"
        )

    def _addresses(self, fields: Fields, default: Default) -> Iterator[ProxyAddress | UnusableRecordError]:
        place = _place(fields, self.shape)
        if place is None:
            yield from self._addresses_by_scheme(fields, default)
            return
        username = _credential(fields, "username", place.username)
        password = _credential(fields, "password", place.password)
        if place.country:
            fields.add("country", place.country)
        for scheme in self._schemes(fields, place.scheme, default):
            if isinstance(scheme, UnusableRecordError):
                yield scheme
            else:
                yield ProxyAddress(f"{scheme}://{place.location}", username, password)

    def _addresses_by_scheme(
        self, fields: Fields, default: Default
    ) -> Iterator[ProxyAddress | UnusableRecordError]:
        """The addresses in columns that are called as the schemes are."""
        found = False
        for flag, value in fields.flags.items():
            if not _is_address(value):
                continue
            found = True
            try:
                place = read_address(str(value).strip(), self.shape)
                scheme = place.scheme or _checked_scheme(flag, default)
                if scheme != flag:
                    raise UnusableRecordError(f"the URL in the column {flag} has another scheme")
                yield ProxyAddress(f"{scheme}://{place.location}", place.username, place.password)
            except UnusableRecordError as error:
                yield error
        if not found:
            raise UnusableRecordError("no proxy_url, and no host and port instead")

    def _schemes(
        self, fields: Fields, own: str | None, default: Default
    ) -> Iterator[str | UnusableRecordError]:
        named = [*_named_schemes(fields)]
        if own is not None:
            if named and own not in named:
                raise UnusableRecordError(f"the URL has another scheme than {fields.name('scheme')} says")
            yield _checked_scheme(own, default)
        elif named:
            for scheme in named:
                try:
                    yield _checked_scheme(scheme, default)
                except UnusableRecordError as error:
                    yield error
        elif len(fields.flags) > 1 or (fields.flags and "https" not in fields.flags):
            # One column alone that is called https says whether the proxy connects to such sites.
            flagged = [flag for flag, value in fields.flags.items() if _is_yes(value)]
            if not flagged:
                raise UnusableRecordError(f"none of the columns {', '.join(fields.flags)} says yes")
            yield from (_checked_scheme(flag, default) for flag in flagged)
        else:
            if default.refusal:
                raise UnusableRecordError(default.refusal)
            fields.guess = default.notice
            yield default.scheme


def names_an_address(record: Record) -> bool:
    """Whether a record says where a proxy is."""
    fields = Fields(record)
    try:
        return _place(fields, None) is not None or any(map(_is_address, fields.flags.values()))
    except UnusableRecordError:
        return False


def _is_address(value: object) -> bool:
    return isinstance(value, str) and value.strip().lower() not in _YES | _NO


def _place(fields: Fields, shape: str | None) -> Address | None:
    """Where the proxy is: from a URL, or from host and port; None if the record says neither."""
    url = fields.text("proxy_url")
    host, port = fields.text("host"), fields.port()
    if url is None:
        return None if host is None else _place_of_parts(host, port, shape)
    if fields.name("proxy_url") == "proxy_url":
        return read_address(url, shape)
    if host is None:
        return read_address(url, shape) if port is None else _place_of_parts(url, port, shape)
    return _place_of_both(fields, url, host, port, shape)


def _place_of_both(fields: Fields, url: str, host: str, port: str | None, shape: str | None) -> Address:
    """The two must agree; what is called a URL may also be where the record was found."""
    try:
        by_url = read_address(url, shape)
    except UnusableRecordError:
        if port is None:
            raise
        by_url = None
    if port is None:
        # The address beside it may be the one that the proxy is seen under.
        assert by_url is not None
        return by_url
    parts = _place_of_parts(host, port, shape)
    if by_url is None:
        fields.lost.append(fields.name("proxy_url"))
        return parts
    if by_url.location != parts.location:
        raise UnusableRecordError(
            f"it can be read in two ways: {fields.name('proxy_url')} is elsewhere than {fields.name('host')}"
        )
    return by_url


def _place_of_parts(host: str, port: str | None, shape: str | None) -> Address:
    """Where host and port are; the host may have a port of its own, or even be a URL."""
    if port is not None and ("://" in host or ":" not in host or is_ipv6(host.strip("[]"))):
        if "://" not in host:
            try:
                return Address(parse_location(host, port))
            except InvalidProxyUrl as error:
                raise UnusableRecordError(str(error)) from None
        try:
            return read_address(f"{host.rstrip('/')}:{port}", shape)
        except UnusableRecordError:
            pass
    if ":" not in host:
        raise UnusableRecordError("no port")
    place = read_address(host, shape)
    if port is not None and place.location.rpartition(":")[2] != str(int(port)):
        raise UnusableRecordError("the port in the host is not the one beside it")
    return place


def _named_schemes(fields: Fields) -> Iterator[str]:
    """What the record says its protocols are, as it says it."""
    value = fields.value("scheme")
    texts = value if isinstance(value, list) else [] if value is None else [value]
    if isinstance(value, list) and not value:
        return
    name = fields.name("scheme")
    for text in texts:
        if not isinstance(text, str):
            raise UnusableRecordError(f"{name} is not text")
        if name.lower().startswith("type") and is_fact(text):
            continue
        yield from (scheme or f"?{name}" for scheme in read_schemes(text))


def _checked_scheme(scheme: str, default: Default) -> str:
    if scheme == "socks":
        if default.scheme.startswith("socks"):
            return default.scheme
        raise UnusableRecordError("socks does not say which: write socks4 or socks5, or give --scheme")
    if scheme.startswith("?"):
        raise UnusableRecordError(f"{scheme[1:]} is none of {', '.join(SCHEMES)}")
    return scheme


def _is_yes(value: object) -> bool:
    text = str(value).strip().lower()
    if text in _YES:
        return True
    if value is None or text in _NO:
        return False
    raise UnusableRecordError("a column for a protocol says neither yes nor no")


def _credential(fields: Fields, name: str, in_url: str | None) -> str | None:
    value = fields.printable(name)
    if value is not None and in_url is not None and value != in_url:
        raise UnusableRecordError(f"the {name} in the URL is not the one beside it")
    return value or in_url


def _own_key(fields: Fields) -> str | None:
    key = fields.printable("key")
    if key is not None and len(key.encode()) > _MAX_KEY_BYTES:
        raise UnusableRecordError(f"key is longer than {_MAX_KEY_BYTES} bytes")
    return key


_Lifetime = tuple[datetime | None, timedelta | None, datetime | None]


def _lifetime(fields: Fields, now: datetime) -> _Lifetime:
    """Work out when the proxy was fetched, how long it lives, and when it expires, as far as that is known.

    Two of the three give the third, a TTL counting for more than an expiry time; an expiry time alone is
    counted from now.
    """
    fetch_time = fields.time("fetch_time")
    expires_at = fields.time("expires_at")
    ttl = fields.ttl()
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
        raise UnusableRecordError(f"it expired at {time_text(expires_at)}", "expired")
    if ttl is not None and ttl <= timedelta(0):
        raise UnusableRecordError("expires_at is before fetch_time")
    return fetch_time, ttl, expires_at


def _health_monitoring(fields: Fields) -> HealthMonitoring | None:
    inner = fields.inner("health_monitoring")
    if inner is not None:
        return _read_monitoring(Fields(inner, fields.lost))
    last_checked = fields.time("last_checked")
    return None if last_checked is None else HealthMonitoring(last_health_check=last_checked)


# How a value gets out of a record, by its field's name or else its type.
_READ: Mapping[object, str] = {
    "proxy_url": "address.url",
    "key": "key",
    "username": "address.username",
    "password": "address.password",
    "fetch_time": "fetch_time",
    "ttl": "ttl",
    "expires_at": "expires_at",
    "evicted_from_l1": "False",
    "version": "0",
    "credentials_omitted": (
        "fields.is_set('credentials_omitted') and not (address.username or address.password)"
    ),
    str: "fields.side_text({0!r}) or ''",
    str | None: "fields.side_text({0!r})",
    datetime | None: "fields.time({0!r})",
    Int32: f"fields.count({{0!r}}, {MAX_INT32})",
    Int64: f"fields.count({{0!r}}, {MAX_INT64})",
    HealthStatus: "fields.health_status()",
    HealthMonitoring | None: "_health_monitoring(fields)",
    Mapping[str, str]: "fields.labels()",
}


def _reader(model: type, parameters: str) -> Callable[..., Any]:
    values = ", ".join(field_sources(model, _READ).values())
    name = model.__name__
    return compile_function(f"read_{name}({parameters})", [f"return {name}({values})"], globals())


_read_monitoring: Callable[[Fields], HealthMonitoring] = _reader(HealthMonitoring, "fields")
_read_entry: Callable[..., CacheEntry] = _reader(
    CacheEntry, "fields, address, key, fetch_time, ttl, expires_at"
)
