"""Proxy URLs: how one is read, and the key it is known by. Pure Python, no gRPC.

docs/keys.md has the rules for other languages, with test vectors.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import unicodedata
from dataclasses import dataclass, field
from enum import StrEnum
from urllib.parse import quote, unquote_to_bytes

SCHEMES = ("http", "https", "socks4", "socks4a", "socks5", "socks5h")
MAX_URL_LENGTH = 2048
# With a username and a password of 1,024 characters, each of them four bytes, percent-encoded.
_MAX_TEXT_LENGTH = MAX_URL_LENGTH + 2 * 1024 * 4 * 3 + len(":@")

KEY_LENGTH = 16
_MAX_HOST_LENGTH = 253
_MAX_PORT = 65535
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = re.compile(rf"{_OCTET}(?:\.{_OCTET}){{3}}")
_ENDS_IN_NUMBER = re.compile(r"(?:^|\.)[0-9]+$")
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
# What the two versions of IDNA convert to different names; none of them is the right one for everybody.
_DEVIATIONS = re.compile("[\u00df\u03c2\u1e9e\u200c\u200d]")


class InvalidProxyUrl(ValueError):  # noqa: N818 -- the name reads as what it says at every `except`
    """A text that is no proxy URL. The message names the fault and quotes nothing of the text."""


@dataclass(frozen=True, slots=True)
class ProxyAddress:
    """A proxy URL in its one spelling, `scheme://host:port`, and the credentials that stood in it."""

    url: str
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)


class Identity(StrEnum):
    """What tells one proxy from another, and so what its key is made of.

    Not every gateway has a user for each session: some tell sessions by the password alone.
    """

    URL = "url"
    USER = "user"
    USER_AND_PASSWORD = "user+password"  # noqa: S105 -- names one


def parse_proxy_url(text: str) -> ProxyAddress:
    """Read `scheme://[username[:password]@]host:port` and bring it into its one spelling.

    Scheme and host become lower case; one trailing `/`, a dot at the end of the host and leading zeros of the
    port are dropped; an international name is converted to its `xn--` form; an IPv6 address is written as RFC
    5952 has it, one that maps an IPv4 address (`::ffff:192.0.2.1`) as that. Username and password are
    percent-decoded (an empty one is None). Raises InvalidProxyUrl, whose message can be shown to anyone.
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
    return _hash(identity)


def _hash(identity: str) -> str:
    return hashlib.sha256(identity.encode()).hexdigest()[:KEY_LENGTH]


def key_by(identity: Identity, address: ProxyAddress) -> str:
    """The key of a proxy under an identity of choice; `Identity.USER` is the rule of `cache_key`.

    With the password in it, the text that is hashed has `username`, a line feed and the password before the
    `@`: no credential can have a line feed, so no two pairs give the same text.
    """
    if identity is Identity.URL:
        return key_of(address.url, None)
    if identity is Identity.USER or not address.password:
        return key_of(address.url, address.username)
    userinfo = f"{address.username or ''}\n{address.password}"
    return _hash(address.url.replace("://", f"://{userinfo}@", 1))


def join_proxy_url(address: ProxyAddress) -> str:
    """The URL with its credentials, percent-encoded, as curl, requests and most HTTP clients take it."""
    if not address.username and not address.password:
        return address.url
    userinfo = quote(address.username or "", safe="")
    if address.password:
        userinfo += ":" + quote(address.password, safe="")
    return address.url.replace("://", f"://{userinfo}@", 1)


def is_ipv6(text: str) -> bool:
    """Whether a text is an IPv6 address, without brackets."""
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def is_ip(host: str) -> bool:
    """Whether the host of a URL is an IP address, that of version 6 in brackets."""
    return host.startswith("[") or _IPV4.fullmatch(host) is not None


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
        return _parse_ipv6(address), _parse_port(rest[1:])
    host, _, port = location.partition(":")
    if ":" in port:
        raise InvalidProxyUrl("the host contains ':'; an IPv6 address must stand in brackets")
    return _parse_host(host), _parse_port(port)


def _parse_ipv6(address: str) -> str:
    if "%" in address:
        raise InvalidProxyUrl("an IPv6 zone is not allowed")
    if not is_ipv6(address):
        raise InvalidProxyUrl("the text in brackets is not an IPv6 address")
    parsed = ipaddress.IPv6Address(address)
    return str(parsed.ipv4_mapped) if parsed.ipv4_mapped is not None else f"[{parsed.compressed}]"


def _parse_host(host: str) -> str:
    if _IPV4.fullmatch(host):
        return host
    if not host:
        raise InvalidProxyUrl("the proxy URL has no host")
    host = (host if host.isascii() else _to_ascii(host)).lower().removesuffix(".")
    if _IPV4.fullmatch(host):
        return host
    if len(host) > _MAX_HOST_LENGTH or not _HOST.fullmatch(host):
        raise InvalidProxyUrl("the host is neither a name nor an IP address")
    if _ENDS_IN_NUMBER.search(host):
        # No name ends in a number: this was meant as an IPv4 address.
        raise InvalidProxyUrl("the host is not a valid IPv4 address")
    return host


def _to_ascii(host: str) -> str:
    """An international name in its `xn--` form."""
    converted = None
    # The converter knows Unicode 3.2: what came later it would pass on as it is, capitals too.
    unknown = any(unicodedata.ucd_3_2_0.category(char) == "Cn" for char in host)
    if len(host) <= _MAX_HOST_LENGTH and not unknown and not _DEVIATIONS.search(host):
        try:
            converted = host.encode("idna").decode("ascii")
        except UnicodeError:
            pass
    if converted is None:
        # Raised out here because a UnicodeError in its context would carry the host along, which may be a
        # credential that was misread.
        raise InvalidProxyUrl("the host is no international name that converts in one way; write it as xn--")
    return converted


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
