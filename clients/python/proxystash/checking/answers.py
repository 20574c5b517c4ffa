"""What a site's answer says of who asked: the address that it saw, and what a proxy gave away."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from proxystash.lists.words import word_set

# What sites that tell an address call it.
_ADDRESS_FIELDS = ("origin", "ip", "query", "address", "ip_address", "client_ip")
# What a proxy adds to a request that says there is one.
_TELLTALES = word_set(
    """
    via forwarded x-forwarded-for x-forwarded-host x-forwarded-proto x-real-ip x-client-ip client-ip
    proxy-connection x-proxy-id x-proxy-connection x-bluecoat-via true-client-ip
    """
)


class Anonymity(StrEnum):
    """What a site learns: the client's address; that there is a proxy; neither."""

    TRANSPARENT = "transparent"
    ANONYMOUS = "anonymous"
    ELITE = "elite"


@dataclass(frozen=True, slots=True)
class Seen:
    """What a site has seen of a request: `address` if it says one; `names` of headers if it shows them."""

    text: str
    address: str | None
    echoes: bool
    names: frozenset[str]


def read_answer(body: bytes, token: str) -> Seen:
    """Read an answer to a request that had a header with this token, which no answer has but an echo."""
    text = body.decode(errors="replace")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    names = frozenset(name.lower() for name in _names(document, 0))
    return Seen(text, _address(document, text), token in text, names)


def anonymity(seen: Seen, direct: Seen) -> Anonymity | None:
    """What a proxy gives away, compared with a direct request; None where the site does not show enough."""
    if direct.address is not None and (seen.address == direct.address or _tells(seen.text, direct.address)):
        return Anonymity.TRANSPARENT
    if not (seen.echoes and direct.echoes):
        return None
    return Anonymity.ANONYMOUS if (seen.names - direct.names) & _TELLTALES else Anonymity.ELITE


def _tells(text: str, address: str) -> bool:
    """Whether an address stands in a text, and not as a part of a longer one."""
    return re.search(rf"(?<![\w.:]){re.escape(address)}(?!\w|\.\w)", text) is not None


def _names(value: object, depth: int) -> Iterator[str]:
    if isinstance(value, Mapping) and depth < 4:
        for name, inner in value.items():
            yield str(name)
            yield from _names(inner, depth + 1)


def _address(document: object, text: str) -> str | None:
    if isinstance(document, Mapping):
        fields = {str(name).lower(): value for name, value in document.items()}
        found = (fields[name] for name in _ADDRESS_FIELDS if isinstance(fields.get(name), str))
        # Some list all that a request came through, the one that asked last.
        texts = [str(value).split(",")[-1] for value in found]
    else:
        texts = [line.partition("ip=")[2] or line for line in text.splitlines()[:50]]
    for part in texts:
        try:
            return str(ipaddress.ip_address(part.strip().strip('"')))
        except ValueError:
            continue
    return None
