"""What one write stores, as plain values: the columns of a row, and the members of a JSON object."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from json.encoder import encode_basestring
from types import MappingProxyType
from typing import Any, Final

from pydantic import SecretStr

from proxystash.compiled import compile_function, field_sources, types_of
from proxystash.models import HealthMonitoring, HealthStatus, Int32, Int64
from proxystash_server.cache.entry.credentials import CredentialEncryptor
from proxystash_server.cache.entry.entry import to_datetime, to_microseconds
from proxystash_server.cache.entry.fields import Content, Fields, public_name
from proxystash_server.cache.entry.limits import NO_LABELS
from proxystash_server.cache.ground.parsing import parse_json  # noqa: F401 -- for what is compiled below

# A text as JSON, in quotes. Records are written piece by piece: a fraction of what `json.dumps` costs.
quoted: Final = encode_basestring

# A tenth of what `.value` takes.
_WORDS: Final = {status: status.value for status in HealthStatus}
_QUOTED_WORDS: Final = {status: quoted(word) for status, word in _WORDS.items()}
_STATUSES: Final = {word: status for status, word in _WORDS.items()}
_MONITORING: Final = types_of(HealthMonitoring)
_COUNTS: Final = tuple(name for name, type_ in _MONITORING.items() if type_ in (Int32, Int64))
_MOMENTS: Final = tuple(name for name, type_ in _MONITORING.items() if type_ == datetime | None)


class CorruptRecordError(Exception):
    """A stored record that cannot be trusted; the tier itself is not at fault."""


_NO_CREDENTIALS: Final = "content.sealed is None and content.username is None and content.password is None"
# On disk, one token stands for both credentials.
_NOT_STORED: Final[Mapping[object, str]] = {"username": "", "password": "", "encoded": ""}
_TO_COLUMN: Final[Mapping[object, str]] = {
    **_NOT_STORED,
    "sealed": f"None if {_NO_CREDENTIALS} else _sealed_text(content, encryptor)",
    str: "content.{0}",
    int: "content.{0}",
    HealthStatus: "_WORDS[content.{0}]",
    HealthMonitoring | None: "None if content.{0} is None else _monitoring_text(content.{0})",
    Mapping[str, str]: "_labels_text(content.{0}) if content.{0} else None",
}
_TO_JSON: Final[Mapping[object, str]] = {
    **_NOT_STORED,
    # Whoever writes the object says under which key.
    "key": "",
    "sealed": f'"null" if {_NO_CREDENTIALS} else quoted(_sealed_text(content, encryptor))',
    str: "quoted(content.{0})",
    int: "content.{0}",
    HealthStatus: "_QUOTED_WORDS[content.{0}]",
    HealthMonitoring | None: '"null" if content.{0} is None else _monitoring_text(content.{0})',
    Mapping[str, str]: "_labels_text(content.{0})",
}
_FROM_EITHER: Final[Mapping[object, str]] = {
    "username": "username",
    "password": "password",
    "sealed": "sealed",
    "encoded": "None",
    str: "{0}",
    int: "{0}",
    HealthStatus: "_STATUSES[{0}]",
}
_FROM_COLUMN: Final[Mapping[object, str]] = {
    **_FROM_EITHER,
    HealthMonitoring | None: "None if {0} is None else _read_monitoring(parse_json({0}))",
    Mapping[str, str]: "_read_labels(None if {0} is None else parse_json({0}))",
}
_FROM_JSON: Final[Mapping[object, str]] = {
    **_FROM_EITHER,
    HealthMonitoring | None: "None if {0} is None else _read_monitoring({0})",
    Mapping[str, str]: "_read_labels({0})",
}
_COLUMN_VALUES: Final = field_sources(Fields, _TO_COLUMN)
# What the columns and the members are called, in their order.
STORED_NAMES: Final = tuple(map(public_name, _COLUMN_VALUES))

column_values: Callable[[Content, CredentialEncryptor], tuple[Any, ...]] = compile_function(
    "column_values(content, encryptor)", [f"return ({', '.join(_COLUMN_VALUES.values())})"], globals()
)
_MEMBERS: Final = ",".join(
    f'"{public_name(name)}":{{{value}}}' for name, value in field_sources(Fields, _TO_JSON).items()
)
json_members: Callable[[Content, CredentialEncryptor], str] = compile_function(
    "json_members(content, encryptor)",
    [f"return f'{_MEMBERS}'"],
    globals(),
)


def _reading(forms: Mapping[object, str]) -> list[str]:
    """The lines that make a content of variables with the names of its fields."""
    values = field_sources(Fields, forms).items()
    return [
        "sealed, username, password = _open(sealed, encryptor)",
        "content = Content()",
        *(f"content.{name} = {value}" for name, value in values),
        "return content",
    ]


content_of_columns: Callable[[tuple[Any, ...], CredentialEncryptor], Content] = compile_function(
    "content_of_columns(columns, encryptor)",
    [f"{', '.join(_COLUMN_VALUES)} = columns", *_reading(_FROM_COLUMN)],
    globals(),
)


def _member(name: str) -> str:
    """What a JSON object says of a field, or the default of one that it was written without."""
    key = public_name(name)
    return f"record.get({key!r}, Fields.{name})" if hasattr(Fields, name) else f"record[{key!r}]"


content_of_json: Callable[[Mapping[str, Any], CredentialEncryptor], Content] = compile_function(
    "content_of_json(record, encryptor)",
    [*(f"{name} = {_member(name)}" for name in _COLUMN_VALUES), *_reading(_FROM_JSON)],
    globals(),
)


def _sealed_text(content: Content, encryptor: CredentialEncryptor) -> str:
    """The credentials as they go to disk, sealed now unless that was done before."""
    sealed = content.sealed or encryptor.seal(content.username, content.password)
    return sealed.decode() if sealed else ""


def _open(
    text: str | None, encryptor: CredentialEncryptor
) -> tuple[bytes | None, SecretStr | None, SecretStr | None]:
    """The token of sealed credentials, and what is in it."""
    if text is None:
        return None, None, None
    token = text.encode()
    username, password = encryptor.open(token)
    return (
        token,
        None if username is None else SecretStr(username),
        None if password is None else SecretStr(password),
    )


def _labels_text(labels: Mapping[str, str]) -> str:
    return f"{{{','.join([f'{quoted(name)}:{quoted(value)}' for name, value in labels.items()])}}}"


def _read_labels(labels: dict[str, str] | None) -> Mapping[str, str]:
    return MappingProxyType(labels) if labels else NO_LABELS


def _monitoring_text(monitoring: HealthMonitoring) -> str:
    """Times are in microseconds; fields that say nothing are left out."""
    plain: dict[str, Any] = {name: getattr(monitoring, name) for name in _COUNTS if getattr(monitoring, name)}
    for name in _MOMENTS:
        moment = getattr(monitoring, name)
        if moment is not None:
            plain[name] = to_microseconds(moment)
    if monitoring.last_health_error is not None:
        plain["last_health_error"] = monitoring.last_health_error
    return json.dumps(plain)


def _read_monitoring(plain: dict[str, Any]) -> HealthMonitoring:
    values = dict(plain)
    for name in _MOMENTS:
        if name in values:
            values[name] = to_datetime(values[name])
    return HealthMonitoring(**values)
