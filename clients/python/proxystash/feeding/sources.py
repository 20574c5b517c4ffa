"""A source of proxies, a file or a URL, and what it may be called where others read it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

SCHEMES = ("http", "https")
# A part of a path that may be a token: long, with letters and digits, and no name of a file.
_TOKEN = re.compile(r"(?=[^/]*[0-9])(?=[^/]*[A-Za-z])[A-Za-z0-9_=~-]{20,}")


class InvalidSourceError(ValueError):
    """A text that is no source. The message quotes nothing that may be a credential."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file, or a URL without userinfo and fragment; `name` has no credential and no query of it."""

    name: str
    path: Path | None = None
    url: str = field(default="", repr=False)
    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)

    @property
    def list_name(self) -> str:
        """What its list is called, as far as that tells its format and scheme."""
        return self.name if self.path is not None else shown_url(self.url.partition("?")[0])


def parse_sources(texts: Sequence[str]) -> list[Source]:
    """Read paths and URLs. Those whose names would be the same get a number. Raises InvalidSourceError."""
    sources: list[Source] = []
    names: dict[str, int] = {}
    for place, text in enumerate(texts, 1):
        try:
            source = _parse(text)
        except InvalidSourceError as error:
            raise InvalidSourceError(f"source {place}: {error}") from None
        if any(replace(source, name=other.name, password=other.password) == other for other in sources):
            raise InvalidSourceError(f"{source.name} is given twice")
        names[source.name] = number = names.get(source.name, 0) + 1
        if number > 1:
            source = replace(source, name=f"{source.name} ({number})")
        sources.append(source)
    return sources


def _parse(text: str) -> Source:
    if "://" not in text:
        return Source(text, Path(text))
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise InvalidSourceError("its URL is malformed") from None
    if parts.scheme.lower() not in SCHEMES:
        raise InvalidSourceError(f"it is neither a file nor a URL with {' or '.join(SCHEMES)}")
    if not parts.hostname or any(char.isspace() or not char.isprintable() for char in text):
        raise InvalidSourceError("its URL is malformed")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    location = host if port is None else f"{host}:{port}"
    url = parts._replace(netloc=location, fragment="").geturl()
    return Source(shown_url(url), None, url, unquote(parts.username or ""), unquote(parts.password or ""))


def shown_url(url: str) -> str:
    """A URL without userinfo as others may read it: without its query, and what may be a token masked."""
    parts = urlsplit(url)
    path = "/".join("***" if _TOKEN.fullmatch(part) else part for part in parts.path.split("/"))
    return parts._replace(path=path, query="", fragment="").geturl() + ("?***" if parts.query else "")
