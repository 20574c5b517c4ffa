"""Where a proxy is, read from one text: every way in which lists write address and credentials together."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from proxystash.lists.outcomes import UnusableRecordError, check_unicode
from proxystash.lists.words import are_schemes, country_code, is_fact, read_schemes
from proxystash.proxies import InvalidProxyUrl, is_ip, is_ipv6, parse_proxy_url

_HOST = r"(\[[^\]]*\]|[^:@\[\]]*)"
_HOST_PORT = re.compile(rf"{_HOST}:([0-9]+)/?")
_HOST_PORT_USER_PASS = re.compile(rf"{_HOST}:([0-9]+):([^:]*):(.*)")
_USER_PASS_HOST_PORT = re.compile(rf"([^:]*):(.*):{_HOST}:([0-9]+)/?")
_HOST_PORT_AT_USER_PASS = re.compile(rf"{_HOST}:([0-9]+)@([^:]*)(?::(.*))?")
_TRAILING_WORD = re.compile(rf"{_HOST}:([0-9]+):([^:@]+)")
_LEADING_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9]*):(?!//)(.*)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a proxy is: `host:port` in its one spelling, the scheme and the country if the text says them."""

    location: str
    scheme: str | None = None
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    country: str | None = None
    # The shape it was read in, where that was not plain `host:port`.
    shape: str = field(default="", compare=False)

    @property
    def ends_with_password(self) -> bool:
        """Whether what follows the text could be more of the password."""
        return self.password is not None and self.shape in {"host:port:user:pass", "host:port@user:pass"}

    @property
    def has_ip(self) -> bool:
        """Whether the host is an IP address."""
        return is_ip(self.location.rpartition(":")[0])


def _host_port(body: str) -> Address | None:
    match = _HOST_PORT.fullmatch(body)
    return match and Address(parse_location(match[1], match[2]))


def _host_port_user_pass(body: str) -> Address | None:
    match = _HOST_PORT_USER_PASS.fullmatch(body)
    return match and _with_credentials("host:port:user:pass", match[1], match[2], match[3], match[4])


def _user_pass_host_port(body: str) -> Address | None:
    match = _USER_PASS_HOST_PORT.fullmatch(body)
    return match and _with_credentials("user:pass:host:port", match[3], match[4], match[1], match[2])


def _user_pass_at_host_port(body: str) -> Address | None:
    if "@" not in body:
        return None
    address = parse_proxy_url(f"http://{body}")
    location = address.url.partition("://")[2]
    return Address(location, None, address.username, address.password, shape="user:pass@host:port")


def _host_port_at_user_pass(body: str) -> Address | None:
    match = _HOST_PORT_AT_USER_PASS.fullmatch(body)
    return match and _with_credentials("host:port@user:pass", match[1], match[2], match[3], match[4] or "")


# The shapes of an address with credentials, by the names that `--format` knows them under.
_SHAPES: Final[Mapping[str, Callable[[str], Address | None]]] = {
    "user:pass@host:port": _user_pass_at_host_port,
    "host:port@user:pass": _host_port_at_user_pass,
    "host:port:user:pass": _host_port_user_pass,
    "user:pass:host:port": _user_pass_host_port,
}
SHAPES: Final = ("host:port", *_SHAPES)


def read_address(text: str, shape: str | None = None) -> Address:
    """Read `host:port` with or without scheme and credentials, in any of the shapes, or only in that given.

    A text that can be read in two ways is refused, unless in just one of them the host is an IP address, or
    the text is a URL, which has its credentials before the `@`. In a URL they are percent-encoded, in the
    shapes without `@` before the host they stand as they are. Raises UnusableRecordError.
    """
    check_unicode(text, "the address")
    scheme, body = _split_scheme(text)
    plain = _try(_host_port, body)
    if isinstance(plain, Address):
        return _with(plain, scheme)
    if is_ipv6(body) or is_ipv6(body.rpartition(":")[0]):
        raise UnusableRecordError("an IPv6 address must stand in brackets before its port")
    if shape == "host:port":
        return _with(_cut_after_port(body), scheme)
    if shape is not None:
        only = _try(_SHAPES[shape], body)
        if isinstance(only, Address):
            return _with(only, scheme)
        raise UnusableRecordError(f"it cannot be read as {shape}" + (f": {only}" if only else ""))
    worded = _with_a_word(body, scheme)
    if worded is not None:
        return worded
    tried = {name: _try(read, body) for name, read in _SHAPES.items()}
    readings = {name: reading for name, reading in tried.items() if isinstance(reading, Address)}
    if not readings:
        raise UnusableRecordError(_describe(text, plain, tried))
    return _with(_decide(readings, is_url="://" in text), scheme)


def parse_location(host: str, port: str) -> str:
    """`host:port` in its one spelling; an IPv6 address may lack its brackets. Raises InvalidProxyUrl."""
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    if re.search(r"[@/?#]", host):
        # parse_proxy_url would take what stands before or after for another part.
        raise InvalidProxyUrl("the host is neither a name nor an IP address")
    return parse_proxy_url(f"http://{host}:{port}").url.partition("://")[2]


def _decide(readings: Mapping[str, Address], *, is_url: bool) -> Address:
    with_ip = [reading for reading in readings.values() if reading.has_ip]
    candidates = with_ip or [*readings.values()]
    as_url = readings.get("user:pass@host:port")
    if is_url and as_url in candidates:
        return as_url
    if len(set(candidates)) == 1:
        [only] = set(candidates)
        if (
            only is readings.get("host:port:user:pass")
            and is_fact(only.username or "")
            and is_fact(only.password or "")
        ):
            raise UnusableRecordError(
                "it can be read in two ways, as host:port:user:pass or as host:port with what the proxy is "
                "like: --format decides"
            )
        return only
    names = [name for name, reading in readings.items() if reading in candidates]
    number = "two" if len(names) == 2 else len(names)
    raise UnusableRecordError(
        f"it can be read in {number} ways, as {' or as '.join(names)}: --format decides"
    )


def _split_scheme(text: str) -> tuple[str | None, str]:
    scheme, separator, body = text.partition("://")
    if not separator:
        match = _LEADING_SCHEME.fullmatch(text)
        # socks5:192.0.2.1:1080
        if match and are_schemes(match[1]) and match[2].count(":") > 0:
            return _one_scheme(match[1]), match[2]
        return None, text
    return _one_scheme(scheme), body


def _one_scheme(word: str) -> str:
    """A scheme, or `socks` as it is."""
    named = [*read_schemes(word)]
    if len(named) != 1 or named[0] is None:
        try:
            parse_proxy_url(f"{word}://h:1")
        except InvalidProxyUrl as error:
            raise UnusableRecordError(str(error)) from None
    return str(named[0])


def _with_a_word(body: str, scheme: str | None) -> Address | None:
    """`host:port:word`, where the word is a scheme, a country or the like."""
    match = _TRAILING_WORD.fullmatch(body)
    if match is None:
        return None
    word = match[3].strip()
    named = are_schemes(word)
    if not named and not is_fact(word):
        raise UnusableRecordError("no password after the username")
    location = _location(match[1], match[2])
    if not named:
        return Address(location, scheme, country=country_code(word) if word.isupper() else None)
    own = _one_scheme(word)
    if scheme is not None and scheme != own:
        raise UnusableRecordError("it names two schemes")
    return Address(location, own)


def _cut_after_port(body: str) -> Address:
    match = re.match(rf"{_HOST}:([0-9]+)(?=$|[:@/])", body)
    if match is None:
        raise UnusableRecordError("it cannot be read as host:port")
    return Address(_location(match[1], match[2]))


def _location(host: str, port: str) -> str:
    try:
        return parse_location(host, port)
    except InvalidProxyUrl as error:
        raise UnusableRecordError(str(error)) from None


def _with_credentials(shape: str, host: str, port: str, username: str, password: str) -> Address:
    for name, value in (("username", username), ("password", password)):
        if _CONTROL.search(value):
            raise InvalidProxyUrl(f"the {name} contains a control character")
    return Address(parse_location(host, port), None, username or None, password or None, shape=shape)


def _with(address: Address, scheme: str | None) -> Address:
    return address if scheme is None else replace(address, scheme=scheme)


def _try(read: Callable[[str], Address | None], body: str) -> Address | str:
    """What a shape makes of a text, or why it does not; nothing if the text has not that shape."""
    try:
        return read(body) or ""
    except InvalidProxyUrl as error:
        return str(error)


def _describe(text: str, plain: Address | str, tried: Mapping[str, Address | str]) -> str:
    """Why no shape fits: what the likeliest one says."""
    said = [str(reason) for reason in (plain, *tried.values()) if reason]
    if said:
        return said[0]
    try:
        parse_proxy_url(text if "://" in text else f"http://{text}")
    except InvalidProxyUrl as error:
        if text.count(":") < 2 or "://" in text:
            return str(error)
    return "it is neither host:port nor that with username and password"
