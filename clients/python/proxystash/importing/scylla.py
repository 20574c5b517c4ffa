"""What scylla has stored: the table `proxy_ips` of its SQLite database."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Final
from urllib.parse import quote

from proxystash.lists.outcomes import FoundRecords, ProxyFileError, Record, Rejected

_TABLE: Final = "proxy_ips"
# What every version of it has, and what some have.
_NEEDED: Final = ("ip", "port")
_ALSO: Final = (
    "is_valid", "attempts", "updated_at", "country", "is_anonymous", "is_https", "latency", "stability",
)  # fmt: skip
_ROWS_AT_ONCE: Final = 1000
_BEFORE_ALL: Final = -(2**63)
_LOCK_SECONDS: Final = 5


def read_scylla(path: Path) -> FoundRecords:
    """The records of a database, which is only read, also while scylla uses it. Raises ProxyFileError."""
    if not path.is_file():
        raise ProxyFileError(f"cannot read {path}: there is no such file")
    try:
        with closing(_connect(path)) as database:
            columns = {row[1] for row in database.execute(f"PRAGMA table_info({_TABLE})")}
            missing = [name for name in _NEEDED if name not in columns]
            if missing:
                raise ProxyFileError(
                    f"{path} is no database of scylla: it has no table {_TABLE} with {' and '.join(missing)}"
                )
            wanted = [*_NEEDED, *(name for name in _ALSO if name in columns)]
            yield from _records(database, wanted)
    except sqlite3.DatabaseError as error:
        raise ProxyFileError(f"cannot read {path}: {error}") from None


def _records(database: sqlite3.Connection, columns: list[str]) -> FoundRecords:
    """A page of rows at a time, so that scylla does not wait until all are stored here."""
    query = f"SELECT rowid, {', '.join(columns)} FROM {_TABLE} WHERE rowid > ? ORDER BY rowid LIMIT ?"  # noqa: S608 -- constants
    last = _BEFORE_ALL
    try:
        while rows := database.execute(query, (last, _ROWS_AT_ONCE)).fetchall():
            for last, *values in rows:
                yield f"row {last}", _record(dict(zip(columns, values, strict=True))), None
    except sqlite3.DatabaseError as error:
        if last == _BEFORE_ALL:
            raise
        where = f"after row {last}"
        yield where, Rejected(where, f"nothing can be read from here on: {error}", "failed"), None


def _record(row: dict[str, object]) -> Record:
    # Its proxies are all for HTTP; `is_https` says whether they also connect to such sites.
    tried = row.get("is_valid") or row.get("attempts")
    status = ("healthy" if row.get("is_valid") else "unhealthy") if tried else None
    return {
        "ip": row["ip"],
        "port": row["port"],
        "protocol": "http",
        "source": "scylla",
        "health_status": status,
        "health_monitoring": monitoring(row.get("updated_at"), row.get("attempts")),
        "country": row.get("country"),
        "labels": dict(_labels(row)),
    }


def monitoring(last_check: object, checks: object) -> Record | None:
    """What is known of the checks of a proxy, if there were any."""
    return {"last_health_check": last_check, "total_health_checks": checks} if checks else None


def _labels(row: dict[str, object]) -> Iterator[tuple[str, str]]:
    for column, label in {"is_https": "https", "is_anonymous": "anonymous"}.items():
        if row.get(column) is not None:
            yield label, "true" if row[column] else "false"
    for column, label in {"latency": "latency_ms", "stability": "stability"}.items():
        value = row.get(column)
        if isinstance(value, int | float):
            yield label, f"{value:g}"


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=_LOCK_SECONDS)
    # Bytes that are not UTF-8 cost their record, not all that follow.
    database.text_factory = lambda data: data.decode(errors="surrogateescape")
    return database
