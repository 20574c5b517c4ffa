"""The elements of a hash or a sorted set of Redis: from a server, or from a dump of it as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any, Final, Literal
from urllib.parse import parse_qs, urlsplit

from proxystash.lists.opening import opened
from proxystash.lists.outcomes import ProxyFileError
from proxystash.lists.reader import ListFile

Kind = Literal["hash", "zset"]
# A field of a hash with its value, or a member of a sorted set with its score; None where that is missing.
Element = tuple[object, object]

URL_SCHEMES: Final = ("redis://", "rediss://", "unix://")
PASSWORD_VARIABLE: Final = "REDISCLI_AUTH"  # noqa: S105 -- names one
_NAMES: Final = {"hash": "a hash", "zset": "a sorted set"}
_IN_QUERY: Final = {"db", "username", "password"}
_SCANNED_AT_ONCE: Final = 1000


def read_server(url: str, key: str, kind: Kind, timeout: float) -> list[Element]:
    """The elements of a key, each once, without holding up the server. Raises ProxyFileError.

    A password that is not in the URL is that of the environment's REDISCLI_AUTH, if it has one.
    """
    try:
        import redis
    except ModuleNotFoundError as error:
        if error.name != "redis":
            raise
        raise ProxyFileError("Redis is read with redis-py; install proxystash[redis]") from None
    try:
        connection = redis.Redis.from_url(
            _checked(url),
            encoding_errors="surrogateescape",
            decode_responses=True,
            # What a Redis of any age speaks.
            protocol=2,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            **_password(url),
        )
    except ValueError:
        raise ProxyFileError("the URL of Redis is malformed: write redis://host:port/db") from None
    try:
        with connection:
            found: Any = connection.type(key)
            if found != kind:
                raise ProxyFileError(_describe_type(key, found, kind))
            scan: Any = connection.hscan_iter if kind == "hash" else connection.zscan_iter
            # A scan may give an element twice.
            return [*dict(scan(key, count=_SCANNED_AT_ONCE)).items()]
    except redis.exceptions.AuthenticationError:
        raise ProxyFileError("Redis refuses the username or password") from None
    except redis.exceptions.TimeoutError:
        raise ProxyFileError(f"Redis does not answer within {timeout:g} s") from None
    except redis.exceptions.ConnectionError:
        raise ProxyFileError("there is no connection to Redis") from None
    except redis.exceptions.RedisError as error:
        # The first word is a code, such as NOPERM; the rest may quote what was sent.
        raise ProxyFileError(f"Redis refuses: {str(error).partition(' ')[0]}") from None


def read_dump(file: ListFile, name: str, key: str, kind: Kind) -> Iterator[Element]:
    """The elements of a key in a dump: alone, or under the key, in any of the shapes that tools write.

    A hash is an object; a sorted set an object, or an array with each member beside its score or in a pair
    with it. Raises ProxyFileError.
    """
    with opened(file, name, None) as source:
        text = source.document()
    for value in _values(_parse(text, name), key):
        yield from _elements(value, name, kind)


def _checked(url: str) -> str:
    """The URL; ValueError for a query with more than what the client knows."""
    if set(parse_qs(urlsplit(url).query, keep_blank_values=True)) - _IN_QUERY:
        raise ValueError
    return url


def _password(url: str) -> dict[str, str]:
    password = os.environ.get(PASSWORD_VARIABLE)
    parts = urlsplit(url)
    if not password or parts.password or "password" in parse_qs(parts.query):
        return {}
    return {"password": password}


def _describe_type(key: str, found: str, kind: Kind) -> str:
    if found == "none":
        return f"Redis has no key {key!r} in this database; --key says another"
    other = {"hash": "; jhao104/proxy_pool has one", "zset": "; Python3WebSpider/ProxyPool has one"}
    is_what = _NAMES.get(found, f"a {found}")
    return f"{key!r} is {is_what}{other.get(found, '')}, and here it should be {_NAMES[kind]}"


def _parse(text: str, name: str) -> object:
    try:
        return json.loads(text)
    except RecursionError:
        raise ProxyFileError(f"{name} is nested too deeply") from None
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            where = f"line {error.lineno}, column {error.colno}"
            raise ProxyFileError(f"{name} is not JSON: {error.msg} at {where}") from None
    # An object on each line.
    values = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            values += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError):
            raise ProxyFileError(f"{name} is neither JSON nor JSON Lines: see line {number}") from None
    return values


def _values(document: object, key: str) -> list[object]:
    """What the dump has under the key: in a database, in several, as a key with its value; else all of it."""
    parts = document if isinstance(document, list) else [document]
    objects = [part for part in parts if isinstance(part, dict)]
    if parts and len(objects) == len(parts):
        keyed = [part["value"] for part in objects if part.get("key") == key and "value" in part]
        databases = [part[key] for part in objects if isinstance(part.get(key), dict | list)]
        if keyed or databases:
            return keyed or databases
    return [document]


def _elements(value: object, name: str, kind: Kind) -> Iterator[Element]:
    if isinstance(value, dict):
        yield from value.items()
    elif kind == "zset" and isinstance(value, list):
        if value and all(isinstance(part, list) for part in value):
            yield from ((part[0], part[1]) if len(part) == 2 else (part, None) for part in value)
        else:
            yield from zip(value[::2], [*value[1::2], None][: (len(value) + 1) // 2], strict=True)
    else:
        raise ProxyFileError(f"{name} holds no {_NAMES[kind].removeprefix('a ')} of Redis under the key")
