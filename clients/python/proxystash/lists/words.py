"""What lists call things: the fields of a proxy, the schemes, and the words beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Final

from proxystash.models import NOT_IN_FILES, CacheEntry, HealthMonitoring
from proxystash.proxies import SCHEMES


def word_set(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


# What a list may call a field, whatever its case, blanks and punctuation: the first that has a value counts.
_WORDINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "proxy_url": (
        "proxy_url", "url", "proxy", "uri", "proxy_address_port", "ip_port", "ip_address_port", "host_port",
    ),
    "host": (
        "ip", "host", "proxy_address", "ip_address", "hostname", "server", "address", "addr", "ip_addr",
        "proxy_ip", "proxy_host",
    ),
    "port": ("port", "proxy_port", "port_number"),
    "scheme": ("protocol", "scheme", "protocols", "schemes", "proxy_protocol", "proxy_type", "type", "types"),
    "username": ("username", "user", "login", "proxy_username", "proxy_user", "proxy_login"),
    "password": ("password", "pass", "passwd", "pwd", "proxy_password", "proxy_pass"),
    "ttl": ("ttl_seconds", "ttl"),
    "health_status": ("health_status", "status"),
    "last_checked": ("last_checked", "last_check", "last_tested", "checked_at"),
    "country": ("country_code", "country_iso", "iso_code", "cc", "code", "country"),
    # Objects that hold the country.
    "location": ("geolocation", "ip_data", "geo", "location"),
}  # fmt: skip
_OWN: Final = {item.name for model in (CacheEntry, HealthMonitoring) for item in fields(model)} - NOT_IN_FILES
# Columns of their own for each protocol; what each is called.
_FLAGS: Final = {**{scheme: scheme for scheme in SCHEMES}, "ssl": "https", "socks": "socks"}

# Where a list of proxies stands inside a document.
WRAPPERS: Final = frozenset(
    (
        "proxies",
        "data",
        "results",
        "result",
        "items",
        "list",
        "proxylist",
        "records",
        "entries",
        "rows",
        "nodes",
    )
)

# Words that say what a proxy is like, not where it is.
_FACTS: Final = word_set(
    """
    elite anonymous transparent high low medium distorting anonymity noa anm hia hap level1 level2 level3
    unknown none residential datacenter mobile isp dedicated shared private public static rotating ipv4
    ipv6 yes no true false ok alive dead online offline up down active inactive working good bad
    """
)
_COUNTRIES: Final = word_set(
    """
    AD AE AF AG AI AL AM AO AQ AR AS AT AU AW AX AZ BA BB BD BE BF BG BH BI BJ BL BM BN BO BQ BR BS BT BV
    BW BY BZ CA CC CD CF CG CH CI CK CL CM CN CO CR CU CV CW CX CY CZ DE DJ DK DM DO DZ EC EE EG EH ER ES
    ET FI FJ FK FM FO FR GA GB GD GE GF GG GH GI GL GM GN GP GQ GR GS GT GU GW GY HK HM HN HR HT HU ID IE
    IL IM IN IO IQ IR IS IT JE JM JO JP KE KG KH KI KM KN KP KR KW KY KZ LA LB LC LI LK LR LS LT LU LV LY
    MA MC MD ME MF MG MH MK ML MM MN MO MP MQ MR MS MT MU MV MW MX MY MZ NA NC NE NF NG NI NL NO NP NR NU
    NZ OM PA PE PF PG PH PK PL PM PN PR PS PT PW PY QA RE RO RS RU RW SA SB SC SD SE SG SH SI SJ SK SL SM
    SN SO SR SS ST SV SX SY SZ TC TD TF TG TH TJ TK TL TM TN TO TR TT TV TW TZ UA UG UM US UY UZ VA VC VE
    VG VI VN VU WF WS XK YE YT ZA ZM ZW
    """
)
# Kinds of servers that are no proxies here.
_FOREIGN = (
    r"shadowsocks(?:r)?|ssr?|vmess|vless|trojan|hysteria2?|wireguard|tuic|snell|ssh|ftp|mtproto|mtproxy|quic"
)
_SOCKS = re.compile(r"socks[\s_-]?v?\s?(4a|5h|4|5)(?![0-9a-z])(\s?/\s?5(?![0-9a-z]))?")
_SCHEME_WORD = re.compile(
    rf"(?<![a-z0-9])(?:(https?|ssl|socks(?:4a?|5h?)?)|({_FOREIGN}))(?![a-z0-9]|://)", re.IGNORECASE
)
_BETWEEN_SCHEMES = re.compile(r"[\s|,;/+&]+")
_NOT_LETTERS_OR_DIGITS = re.compile(r"[^a-z0-9]")


def _plain(name: str) -> str:
    return _NOT_LETTERS_OR_DIGITS.sub("", name.lower())


_PLACES: Final[Mapping[str, tuple[str, int]]] = {
    **{_plain(name): (name, 0) for name in _OWN},
    **{_plain(word): (field, rank) for field, words in _WORDINGS.items() for rank, word in enumerate(words)},
}


@lru_cache(maxsize=4096)
def field_of(name: str) -> tuple[str, int] | None:
    """The field that a list means by a name, and how much that name counts (0 most); None if it is none."""
    return _PLACES.get(_plain(name))


@lru_cache(maxsize=4096)
def flag_of(name: str) -> str | None:
    """The scheme whose column or key has this name; `socks` does not say which."""
    return _FLAGS.get(_plain(name))


def is_wrapper(name: str) -> bool:
    """Whether an object's key of this name may hold a list of proxies."""
    return _plain(name) in WRAPPERS


def is_foreign(name: str) -> bool:
    """Whether this is what a kind of servers is called that are no proxies here."""
    return re.fullmatch(_FOREIGN, name.lower()) is not None


def is_fact(word: str) -> bool:
    """Whether a word says what a proxy is like, and is therefore no credential and no protocol."""
    return _plain(word) in _FACTS or word in _COUNTRIES


def country_code(text: str) -> str | None:
    """The two-letter code of ISO 3166 that a text is, in capitals."""
    code = text.strip().upper()
    return code if code in _COUNTRIES else None


def read_schemes(text: str) -> Iterator[str | None]:
    """Each scheme that a text such as `HTTP/HTTPS`, `SOCKS 5` or `http|socks4` names, and None if others.

    `socks` stands for one that does not say which.
    """
    spaced = _SOCKS.sub(
        lambda match: f" socks{match[1]} " + ("socks5 " if match[2] else ""), text.strip().lower()
    )
    seen: set[str | None] = set()
    for word in _BETWEEN_SCHEMES.split(spaced.replace("http(s)", "http https")):
        if word in {"", "and", "or"}:
            continue
        scheme = _FLAGS.get(word) or ("http" if word.startswith("connect:") else None)
        if scheme not in seen:
            seen.add(scheme)
            yield scheme


def are_schemes(text: str) -> bool:
    """Whether a text names schemes and nothing else."""
    named = [*read_schemes(text)]
    return bool(named) and None not in named


def schemes_within(text: str) -> tuple[list[str], list[str]]:
    """The schemes that a text mentions, each once, and the kinds of servers that are no proxies here."""
    spaced = _SOCKS.sub(lambda match: f" socks{match[1]} ", text.lower())
    matches = [*_SCHEME_WORD.finditer(spaced)]
    return (
        [*dict.fromkeys(_FLAGS[match[1].lower()] for match in matches if match[1])],
        [*dict.fromkeys(match[2].lower() for match in matches if match[2])],
    )
