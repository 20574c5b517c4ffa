"""The options and arguments that several commands have, and how their texts are read."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from proxystash._defaults import TARGET_VARIABLE
from proxystash.files import FORMATS
from proxystash.models import CacheEntry, HealthStatus, PutMode
from proxystash.proxies import SCHEMES, Identity, InvalidProxyUrl, cache_key

if TYPE_CHECKING:
    from proxystash.client import Client
    from proxystash.pool_models import ProxyFilter

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str | timedelta) -> timedelta:
    """Read `90`, `90s`, `15m`, `2h`, `7d` or `500ms`; a number alone means seconds."""
    if isinstance(text, timedelta):
        # Typer has defaults parsed, too.
        return text
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter("write a duration as a number with ms, s, m, h or d, such as 15m")
    try:
        return timedelta(seconds=float(match[1]) * _UNITS[match[2] or "s"])
    except OverflowError:
        raise typer.BadParameter("the duration is too long") from None


def parse_scheme(text: str) -> str:
    """Read one of the schemes that proxies have."""
    if text.lower() not in SCHEMES:
        raise typer.BadParameter(f"the schemes are {', '.join(SCHEMES)}")
    return text.lower()


def parse_format(text: str) -> str:
    """Read one of the formats that lists are read in."""
    return one_of(text, FORMATS)


def one_of(text: str, formats: Sequence[str]) -> str:
    """Read one of some formats."""
    if text.lower() not in formats:
        raise typer.BadParameter(f"the formats are {', '.join(formats)}")
    return text.lower()


def parse_labels(texts: list[str] | None) -> dict[str, str]:
    """Read labels written as `name=value`."""
    labels: dict[str, str] = {}
    for text in texts or []:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise typer.BadParameter("write a label as name=value, such as country=DE", param_hint="--label")
        if labels.setdefault(name, value) != value:
            raise typer.BadParameter(f"label {name} is given twice", param_hint="--label")
    return labels


def resolve_key(key_or_url: str, username: str | None) -> str:
    """The key that was given, or that of the proxy URL that was given."""
    if "://" not in key_or_url:
        if username is not None:
            raise typer.BadParameter("it goes with a proxy URL, not with a key", param_hint="--username")
        return key_or_url
    try:
        return cache_key(key_or_url, username)
    except InvalidProxyUrl as error:
        raise typer.BadParameter(str(error), param_hint="KEY") from None


def resolve_keys(keys_or_urls: list[str], username: str | None) -> list[str]:
    """The keys that were given, or those of the proxy URLs, on the command line or in standard input."""
    keys: list[str] = []
    for text in keys_or_urls:
        lines = [line.strip() for line in sys.stdin] if text == "-" else [text]
        keys += [resolve_key(line, username) for line in lines if line]
    return keys


def connect(target: str, timeout: float) -> Client:
    """A client that fails at once when there is no server, as a command should."""
    from proxystash.client import Client

    return Client(target, timeout=timeout, retry=None)


def connect_patiently(target: str, timeout: float) -> Client:
    """A client that repeats its calls until the timeout, for work that should survive a server's restart."""
    from proxystash.client import Client

    return Client(target, timeout=timeout)


Merge = Annotated[
    bool,
    typer.Option(
        "--merge", help="Keep what is stored of a proxy already and not given here; it lives on from now."
    ),
]
Replace = Annotated[bool, typer.Option("--replace", help="Put it in the place of what is stored already.")]
IfAbsent = Annotated[bool, typer.Option("--if-absent", help="Leave what is stored already as it is.")]


def put_mode(*, merge: bool, replace: bool, if_absent: bool, default: PutMode) -> PutMode:
    """The one mode that was asked for, or the default."""
    asked = {PutMode.MERGE: merge, PutMode.REPLACE: replace, PutMode.IF_ABSENT: if_absent}
    modes = [mode for mode, is_wanted in asked.items() if is_wanted]
    if len(modes) > 1:
        flags = ", ".join("--" + mode.value.replace("_", "-") for mode in modes)
        raise typer.BadParameter(f"only one of {flags} can be", param_hint=flags)
    return modes[0] if modes else default


Target = Annotated[
    str,
    typer.Option("--target", envvar=TARGET_VARIABLE, metavar="HOST:PORT", help="Address of the server."),
]
Timeout = Annotated[
    float,
    typer.Option("--timeout", min=0.001, metavar="SECONDS", help="How long to wait for each answer."),
]
# How lists are read, and what all that they hold is stored with.
ListScheme = Annotated[
    str | None,
    typer.Option(
        "--scheme",
        parser=parse_scheme,
        metavar="SCHEME",
        help="The scheme of records that say none. Default: that of the header above them, else of the "
        "file's name, else http.",
    ),
]
ListFormat = Annotated[
    str | None,
    typer.Option(
        "--format",
        parser=parse_format,
        metavar="FORMAT",
        help=f"Take it for this format, or read addresses in this way: {', '.join(FORMATS)}.",
    ),
]
ListIdentity = Annotated[
    Identity,
    typer.Option(
        "--identity",
        metavar="WHAT",
        help=f"What tells one proxy from another: {', '.join(Identity)}. A record's own key counts more.",
    ),
]
ListSource = Annotated[
    str | None,
    typer.Option("--source", help="Where all of them came from, instead of what the file says."),
]
ListTtl = Annotated[
    timedelta | None,
    typer.Option(
        "--ttl",
        parser=parse_duration,
        metavar="DURATION",
        help="How long all of them live from now, such as 90s or 2h, instead of what the file says.",
    ),
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Say of each record why it was not loaded, however many there are."),
]
Json = Annotated[bool, typer.Option("--json", help="Write JSON for scripts, one object on a line.")]
Key = Annotated[
    str,
    typer.Argument(metavar="KEY", help="A proxy's key or its URL, in which a username counts."),
]
Keys = Annotated[
    list[str],
    typer.Argument(
        metavar="KEY...",
        help="Keys or URLs of proxies, in which a username counts; - reads some from standard input.",
    ),
]
SomeKeys = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY...]",
        help="Keys or URLs of proxies, in which a username counts; - reads some from standard input. "
        "Or else which proxies, by the options.",
    ),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="At most this many. Default: all.")]
# Not --target, which is the server's address everywhere.
For = Annotated[
    str,
    typer.Option("--for", metavar="TARGET", help="The target: what the proxy is for, usually a domain."),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
KeyUsername = Annotated[
    str | None, typer.Option("--username", help="With a proxy URL: the username that belongs to it.")
]
ShowCredentials = Annotated[
    bool, typer.Option("--show-credentials", help="Show usernames and passwords, too.")
]
FilterSource = Annotated[
    str | None, typer.Option("--source", help="Only proxies from this source; '' for those of none.")
]
FilterHealth = Annotated[
    list[HealthStatus] | None,
    typer.Option(
        "--health",
        metavar="STATUS",
        help=f"Only proxies with this status ({', '.join(HealthStatus)}); of several, with any.",
    ),
]
FilterScheme = Annotated[
    list[str] | None,
    typer.Option(
        "--scheme",
        parser=parse_scheme,
        metavar="SCHEME",
        help="Only proxies with this URL scheme; of several, with any.",
    ),
]
FilterLabel = Annotated[
    list[str] | None,
    typer.Option(
        "--label",
        metavar="NAME=VALUE",
        help="Only proxies with this label, NAME!=VALUE another or none, !NAME none; of several, with all.",
    ),
]
EqualLabel = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="NAME=VALUE", help="Only proxies with this label; of several, with all."),
]
ExpiringWithin = Annotated[
    timedelta | None,
    typer.Option(
        "--expiring-within",
        parser=parse_duration,
        metavar="DURATION",
        help="Only proxies that expire within this time, such as 10m.",
    ),
]


@dataclass(frozen=True)
class Filters:
    """Which proxies are wanted: what the server can tell, and what is told here."""

    asked: dict[str, Any]
    conditions: list[Callable[[CacheEntry], bool]]

    def __bool__(self) -> bool:
        return bool(self.asked or self.conditions)

    def entries(self, client: Client, page_size: int, show_credentials: bool) -> Iterator[CacheEntry]:
        """Those of a server's proxies that are wanted, in key order."""
        found = client.list(page_size=page_size, include_credentials=show_credentials, **self.asked)
        return (entry for entry in found if all(wants(entry) for wants in self.conditions))


def filters(
    source: str | None,
    health: list[HealthStatus] | None,
    schemes: list[str] | None,
    labels: list[str] | None,
    expiring_within: timedelta | None,
) -> Filters:
    """What several options together want; raises BadParameter."""
    conditions: list[Callable[[CacheEntry], bool]] = []
    equal: list[str] = []
    for text in labels or ():
        name, separator, value = text.partition("!=")
        if text.startswith("!") and len(text) > 1 and "=" not in text:
            conditions.append(partial(_lacks, text[1:]))
        elif separator and name and "=" not in name:
            conditions.append(partial(_differs, name, value))
        else:
            equal.append(text)
    if source == "":
        conditions.append(lambda entry: not entry.source)
    if expiring_within is not None:
        end = datetime.now(UTC) + expiring_within
        conditions.append(lambda entry: entry.expires_at is not None and entry.expires_at <= end)
    asked = {"source": source, "health": health, "schemes": schemes, "labels": parse_labels(equal)}
    return Filters({name: value for name, value in asked.items() if value}, conditions)


def equal_filters(
    source: str, health: list[HealthStatus] | None, schemes: list[str] | None, labels: list[str] | None
) -> ProxyFilter:
    """What several options together want, of what the server can tell; raises BadParameter."""
    wanted = filters(source or None, health, schemes, labels, None)
    if wanted.conditions:
        raise typer.BadParameter("write a label that a proxy has, as NAME=VALUE", param_hint="--label")
    return cast("ProxyFilter", wanted.asked)


def _lacks(name: str, entry: CacheEntry) -> bool:
    return name not in entry.labels


def _differs(name: str, value: str, entry: CacheEntry) -> bool:
    return entry.labels.get(name) != value
