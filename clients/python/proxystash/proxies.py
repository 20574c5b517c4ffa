"""Proxy URLs: how one is read, and the key it is known by. Pure Python, no gRPC."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

SCHEMES = ("http", "https", "socks4", "socks4a", "socks5", "socks5h")
MAX_URL_LENGTH = 2048
# With a username and a password of 1,024 characters, each of them four bytes, percent-encoded.
_MAX_TEXT_LENGTH = MAX_URL_LENGTH + 2 * 1024 * 4 * 3 + len(":@")

KEY_LENGTH = 16
_MAX_HOST_LENGTH = 253
_MAX_PORT = 65535
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?")
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = re.compile(rf"{_OCTET}(?:\.{_OCTET}){{3}}")
_ENDS_IN_NUMBER = re.compile(r"(?:^|\.)[0-9]+\.?$")
# A whole URL as most of them are: in its one spelling already, without credentials. It passes all the checks
# below, and one look tells.
_USUAL = re.compile(
    rf"(?:https?|socks(?:4a?|5h?))://(?:{_IPV4.pattern}|(?:{_LABEL}\.)*(?![0-9]+:){_LABEL}):([1-9][0-9]{{0,4}})"
)
_SPACE_OR_CONTROL = re.compile(r"[\s\x00-\x1f\x7f-\x9f]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_AFTER_AUTHORITY = re.compile(r"[/?#]")
_USERINFO = re.compile(r"(//)\S*@")


class InvalidProxyUrl(ValueError):  # noqa: N818 -- the name reads as what it says at every `except`
    """A text that is no proxy URL. The message names the fault and quotes nothing of the text."""


@dataclass(frozen=True, slots=True)
class ProxyAddress:
    """A proxy URL in its one spelling, `scheme://host:port`, and the credentials that stood in it."""

    url: str
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)


def parse_proxy_url(text: str) -> ProxyAddress:
    """Read `scheme://[username[:password]@]host:port` and bring it into its one spelling.

    Scheme and host become lower case, one trailing `/` is dropped, the port loses leading zeros, and
    username and password are percent-decoded (an empty one is None). Raises InvalidProxyUrl, whose message
    can be shown to anyone.
    """
    if not isinstance(text, str):
        raise InvalidProxyUrl("a proxy URL must be text")
    usual = _USUAL.fullmatch(text) if len(text) <= _MAX_HOST_LENGTH else None
    if usual is not None and int(usual[1]) <= _MAX_PORT:
        return ProxyAddress(text)
    if len(text) > _MAX_TEXT_LENGTH:
        raise InvalidProxyUrl(f"the proxy URL is longer than {MAX_URL_LENGTH} characters and its credentials")
    if _SPACE_OR_CONTROL.search(text):
        raise InvalidProxyUrl("the proxy URL contains whitespace or a control character")
    scheme, separator, rest = text.partition("://")
    scheme = _parse_scheme(scheme, separator)
    authority, tail = _split_authority(rest)
    # Whatever stands before the last "@" of the authority is userinfo: a password with a bare "@" in it
    # must not spill into the host.
    userinfo, _, location = authority.rpartition("@")
    if tail:
        raise InvalidProxyUrl(_describe_tail(tail))
    if len(scheme) + len("://") + len(location) > MAX_URL_LENGTH:
        raise InvalidProxyUrl(f"the proxy URL is longer than {MAX_URL_LENGTH} characters")
    host, port = _parse_location(location)
    url = f"{scheme}://{host}:{port}"
    if not userinfo:
        return ProxyAddress(url)
    username, _, password = userinfo.partition(":")
    return ProxyAddress(url, _decode(username, "username"), _decode(password, "password"))


def cache_key(proxy_url: str, username: str | None = None) -> str:
    """Derive the key of a proxy: the first 16 hex digits of the SHA-256 of its URL.

    With a username, the URL is hashed with `username@` before the host (as it is, not percent-encoded),
    since one gateway with fifty users is fifty proxies. A username in the URL counts as well, unless
    `username` is given; a password is no part of the key. Raises InvalidProxyUrl.
    """
    address = parse_proxy_url(proxy_url)
    return key_of(address.url, username or address.username)


def key_of(url: str, username: str | None) -> str:
    """The key, as `cache_key` gives it, of a URL that is in its one spelling and has no userinfo."""
    identity = url
    if username:
        _check_credential(username, "username")
        identity = url.replace("://", f"://{username}@", 1)
    return hashlib.sha256(identity.encode()).hexdigest()[:KEY_LENGTH]


def is_ipv6(text: str) -> bool:
    """Whether a text is an IPv6 address, without brackets."""
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def redact_url(proxy_url: str) -> str:
    """Replace the userinfo of a URL, even of a malformed one, by `***`."""
    userinfo, at_sign, location = proxy_url.rpartition("@")
    if not at_sign:
        return proxy_url
    scheme, separator, _ = userinfo.partition("://")
    return f"{scheme}{separator}***@{location}" if separator else f"***@{location}"


def redact(text: str) -> str:
    """Replace the userinfo of every URL in a text by `***`, for showing a text that may quote one."""
    return _USERINFO.sub(r"\1***@", text)


def _parse_scheme(scheme: str, separator: str) -> str:
    if not separator:
        raise InvalidProxyUrl("the proxy URL has no scheme, such as http://")
    scheme = scheme.lower()
    if scheme not in SCHEMES:
        raise InvalidProxyUrl(f"the scheme of the proxy URL is none of {', '.join(SCHEMES)}")
    return scheme


def _split_authority(rest: str) -> tuple[str, str]:
    """Split off what follows the authority; a single `/` counts as nothing."""
    match = _AFTER_AUTHORITY.search(rest)
    if match is None:
        return rest, ""
    tail = rest[match.start() :]
    return rest[: match.start()], "" if tail == "/" else tail


def _describe_tail(tail: str) -> str:
    if "@" in tail:
        return "a '/', '?' or '#' in the username or password must be percent-encoded"
    part = {"/": "path", "?": "query", "#": "fragment"}[tail[0]]
    return f"the proxy URL has a {part}; only scheme://host:port is allowed"


def _parse_location(location: str) -> tuple[str, int]:
    """Read `host:port`, where an IPv6 address stands in brackets."""
    if location.startswith("["):
        address, bracket, rest = location[1:].partition("]")
        if not bracket:
            raise InvalidProxyUrl("the bracket around the IPv6 address is not closed")
        if rest and not rest.startswith(":"):
            raise InvalidProxyUrl("only a port may follow the IPv6 address")
        return f"[{_parse_ipv6(address)}]", _parse_port(rest[1:])
    host, _, port = location.partition(":")
    if ":" in port:
        raise InvalidProxyUrl("the host contains ':'; an IPv6 address must stand in brackets")
    return _parse_host(host), _parse_port(port)


def _parse_ipv6(address: str) -> str:
    if "%" in address:
        raise InvalidProxyUrl("an IPv6 zone is not allowed")
    if not is_ipv6(address):
        raise InvalidProxyUrl("the text in brackets is not an IPv6 address")
    return address.lower()


def _parse_host(host: str) -> str:
    if _IPV4.fullmatch(host):
        return host
    if not host:
        raise InvalidProxyUrl("the proxy URL has no host")
    if not host.isascii():
        raise InvalidProxyUrl("the host is not ASCII; write an international name in its xn-- form")
    host = host.lower()
    if len(host) > _MAX_HOST_LENGTH or not _HOST.fullmatch(host):
        raise InvalidProxyUrl("the host is neither a name nor an IP address")
    if _ENDS_IN_NUMBER.search(host):
        # No name ends in a number: this was meant as an IPv4 address.
        raise InvalidProxyUrl("the host is not a valid IPv4 address")
    return host


def _parse_port(port: str) -> int:
    if not port:
        raise InvalidProxyUrl("the proxy URL has no port")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= _MAX_PORT):
        raise InvalidProxyUrl("the port is not a number from 1 to 65535")
    return int(port)


def _decode(text: str, name: str) -> str | None:
    if not text:
        return None
    decoded = None
    try:
        decoded = unquote_to_bytes(text).decode()
    except UnicodeError:
        pass
    if decoded is None:
        # Raised out here because a UnicodeError in its context would carry the credential along.
        raise InvalidProxyUrl(f"the {name} is not valid UTF-8")
    _check_credential(decoded, name)
    return decoded


def _check_credential(text: str, name: str) -> None:
    if _CONTROL.search(text):
        raise InvalidProxyUrl(f"the {name} contains a control character")
    if _SURROGATE.search(text):
        raise InvalidProxyUrl(f"the {name} is not valid Unicode")
