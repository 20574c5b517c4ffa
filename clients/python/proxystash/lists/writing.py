"""Lists of entries: as JSON Lines and CSV, which are read back whole, and as addresses alone."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from datetime import datetime, timedelta
from typing import Any, Final

from proxystash.compiled import compile_function, field_sources
from proxystash.lists.outcomes import Record
from proxystash.models import NOT_IN_FILES, CacheEntry, HealthMonitoring, HealthStatus, Int32, Int64
from proxystash.proxies import ProxyAddress, cache_key, join_proxy_url, parse_proxy_url, redact
from proxystash.times import time_text  # noqa: F401 -- the compiled writers call it

EXPORT_FORMATS: Final = ("jsonl", "csv", "host:port", "url")


def record_from_entry(entry: CacheEntry, *, include_credentials: bool) -> dict[str, object]:
    """Make a record that is read back as the entry, leaving out what is unset.

    Without credentials, userinfo in the URL and in the last health error is left out, too.
    """
    return _without_unset(whole_record(entry, include_credentials=include_credentials))


def whole_record(entry: CacheEntry, *, include_credentials: bool) -> dict[str, object]:
    """The same with what is unset, too: as None, or an empty text."""
    address = parse_proxy_url(entry.proxy_url)
    username = entry.username or address.username
    record = _write_entry(entry)
    record["proxy_url"] = address.url
    if username or entry.password or address.password:
        record["credentials_omitted"] = not include_credentials or None
    record["key"] = entry.key or cache_key(address.url, username)
    record["username"] = username if include_credentials else None
    record["password"] = (entry.password or address.password) if include_credentials else None
    if entry.health_monitoring is not None:
        record["health_monitoring"] = _monitoring_record(entry.health_monitoring, include_credentials)
    return record


def entry_to_json(entry: CacheEntry, *, include_credentials: bool) -> str:
    """Write an entry as one line of JSON that `read_proxy_file` reads back; times are ISO 8601 in UTC.

    Raises InvalidProxyUrl when the entry's URL is none.
    """
    return _json(record_from_entry(entry, include_credentials=include_credentials))


def entry_to_csv(entry: CacheEntry, *, include_credentials: bool) -> str:
    """Write an entry as a row of CSV under CSV_HEADER, which `read_proxy_file` reads back.

    Objects stand in their cells as JSON. Raises InvalidProxyUrl when the entry's URL is none.
    """
    record = record_from_entry(entry, include_credentials=include_credentials)
    cells = (record.get(name, "") for name in CSV_COLUMNS)
    return csv_row(_json(cell) if isinstance(cell, dict) else cell for cell in cells)


def entry_to_host_port(
    entry: CacheEntry,
    *,
    include_credentials: bool,  # noqa: ARG001 -- the line has no place for them
) -> str:
    """Write where a proxy is, without scheme and credentials.

    Raises InvalidProxyUrl when the entry's URL is none.
    """
    return parse_proxy_url(entry.proxy_url).url.partition("://")[2]


def entry_to_url(entry: CacheEntry, *, include_credentials: bool) -> str:
    """Write an entry as a URL, its credentials percent-encoded, as curl and requests take it.

    Raises InvalidProxyUrl when the entry's URL is none.
    """
    address = parse_proxy_url(entry.proxy_url)
    if not include_credentials:
        return address.url
    return join_proxy_url(
        ProxyAddress(address.url, entry.username or address.username, entry.password or address.password)
    )


def csv_row(cells: Any) -> str:  # noqa: ANN401 -- csv takes anything
    """Cells as a row of CSV, without a line feed at its end."""
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue()


def _json(record: object) -> str:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"))


def _monitoring_record(monitoring: HealthMonitoring, include_credentials: bool) -> dict[str, object]:
    record = _write_monitoring(monitoring)
    error = monitoring.last_health_error
    if error is not None and not include_credentials:
        record["last_health_error"] = redact(error)
    return _without_unset(record)


def _seconds(duration: timedelta | None) -> float | int | None:
    if duration is None:
        return None
    seconds = duration.total_seconds()
    return int(seconds) if seconds.is_integer() else seconds


def _without_unset(record: Record) -> dict[str, object]:
    return {name: value for name, value in record.items() if value is not None and value != ""}


# What a value is in a record, by its field's name or else its type; None and an empty text are left out.
_WRITE: Mapping[object, str] = {
    **dict.fromkeys((str, str | None, Int32, Int64), "model.{0}"),
    **dict.fromkeys(NOT_IN_FILES, ""),
    datetime | None: "time_text(model.{0})",
    timedelta | None: "_seconds(model.{0})",
    "credentials_omitted": "model.{0} or None",
    HealthStatus: "model.{0}.value",
    HealthMonitoring | None: "model.{0}",
    Mapping[str, str]: "dict(model.{0}) or None",
}
_NAMES: Final = {"ttl": "ttl_seconds"}


def _writer(model: type, key: Callable[[str], bool] = bool) -> Callable[[Any], dict[str, object]]:
    """Makes a record, its fields sorted by `key`."""
    values = field_sources(model, _WRITE)
    pairs = [f"{_NAMES.get(name, name)!r}: {values[name]}" for name in sorted(values, key=key)]
    return compile_function(f"write_{model.__name__}(model)", [f"return {{{', '.join(pairs)}}}"], globals())


def _is_always_set(name: str) -> bool:
    return getattr(HealthMonitoring(), name) is not None


_write_monitoring = _writer(HealthMonitoring, key=_is_always_set)
_write_entry = _writer(CacheEntry)

CSV_COLUMNS: Final = [
    _NAMES.get(item.name, item.name) for item in fields(CacheEntry) if item.name not in NOT_IN_FILES
]
CSV_HEADER: Final = ",".join(CSV_COLUMNS)
# A line for an entry in each format, and the line before the first.
LINES: Final[Mapping[str, Callable[..., str]]] = {
    "jsonl": entry_to_json,
    "csv": entry_to_csv,
    "host:port": entry_to_host_port,
    "url": entry_to_url,
}
