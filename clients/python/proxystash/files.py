"""Proxy files: reading the common formats, and writing JSON lines that are read back. No gRPC here."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Literal

from proxystash._records import (
    HOST_FIELDS,
    SCHEME_FIELDS,
    URL_FIELDS,
    Record,
    UnusableRecordError,
    as_utc,
    entry_from_record,
    record_from_entry,
)
from proxystash.models import CacheEntry
from proxystash.proxies import SCHEMES, InvalidProxyUrl, parse_proxy_url

_SNIFFED_BYTES = 8192
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_UTF8_MARK = b"\xef\xbb\xbf"
_SCHEME_HEADER = re.compile(
    rf"\#\s*({'|'.join(SCHEMES)})(?:\s+prox(?:y|ies))?\s*(?:\(\d+\))?\s*:?", re.IGNORECASE
)
_HOST_AND_PORT = re.compile(r"(?:\[[^\]]*\]|[^:]*):[^:]*")

ProgressCallback = Callable[[float], None]


class ProxyFileError(ValueError):
    """A file that cannot be read as a whole, such as a missing one."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that did not become an entry: where it stands, and why. No text in it holds a credential.

    `skipped` is a readable record that is no usable proxy; `failed` is one that could not be read.
    """

    where: str
    reason: str
    kind: Literal["skipped", "failed"]


def read_proxy_file(
    path: str | os.PathLike[str],
    *,
    now: datetime | None = None,
    on_progress: ProgressCallback | None = None,
) -> Iterator[CacheEntry | Rejected]:
    """Read proxies from a file, record by record, each with its key set.

    The suffix tells the format: `.json` (an array of objects, or an object with such an array under
    `proxies`), `.jsonl` or `.ndjson`, `.csv` with a header row, and for anything else plain text. All but
    `.json` are streamed. Of records with the same key the first counts, and a record that has expired by
    `now` (default: the present) is skipped. `on_progress` is told the fraction read so far, from 0 to 1.

    Iterating raises ProxyFileError when the file as a whole cannot be read.
    """
    path = Path(path)
    moment = datetime.now(UTC) if now is None else as_utc(now)
    seen: dict[str, str] = {}
    try:
        with path.open("rb") as file:
            _refuse_binary(file, path)
            for where, record in _READERS.get(path.suffix.lower(), _read_text)(file, path, on_progress):
                yield _accept(where, record, moment, seen)
    except OSError as error:
        raise ProxyFileError(f"cannot read {path}: {error.strerror or error}") from error


def entry_to_json(entry: CacheEntry, *, include_credentials: bool) -> str:
    """Write an entry as one line of JSON that `read_proxy_file` reads back; times are ISO 8601 in UTC.

    Raises InvalidProxyUrl when the entry's URL is none.
    """
    record = record_from_entry(entry, include_credentials=include_credentials)
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"))


# A reader yields where each record stands, and the record or what is wrong with it.
_Found = tuple[str, "Record | Rejected"]


def _accept(
    where: str, record: Record | Rejected, now: datetime, seen: dict[str, str]
) -> CacheEntry | Rejected:
    if isinstance(record, Rejected):
        return record
    try:
        entry = entry_from_record(record, now=now)
    except UnusableRecordError as error:
        return Rejected(where, str(error), "skipped")
    earlier = seen.setdefault(entry.key, where)
    if earlier is not where:
        return Rejected(where, f"duplicate of {earlier}", "skipped")
    return entry


def _refuse_binary(file: BinaryIO, path: Path) -> None:
    # peek() may give less than was asked for, never nothing but at the end of the file.
    head = file.peek(_SNIFFED_BYTES)[:_SNIFFED_BYTES] if isinstance(file, io.BufferedReader) else b""
    if head.startswith(_UTF16_MARKS):
        raise ProxyFileError(f"{path} is UTF-16; save it as UTF-8")
    if b"\0" in head:
        raise ProxyFileError(f"{path} is not a text file")


def _read_json(file: BinaryIO, path: Path, on_progress: ProgressCallback | None) -> Iterator[_Found]:
    try:
        document = json.loads(file.read().removeprefix(_UTF8_MARK).decode())
    except UnicodeDecodeError:
        raise ProxyFileError(f"{path} is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ProxyFileError(f"{path} is not JSON: {_describe_json_error(error)}") from None
    records = document.get("proxies") if isinstance(document, dict) else document
    if not isinstance(records, list):
        raise ProxyFileError(
            f"{path} is neither an array of objects nor an object with such an array in `proxies`"
        )
    for number, record in enumerate(records, 1):
        where = f"record {number}"
        yield where, record if isinstance(record, dict) else Rejected(where, "not an object", "failed")
        if on_progress is not None:
            on_progress(number / len(records))


def _read_json_lines(file: BinaryIO, _: Path, on_progress: ProgressCallback | None) -> Iterator[_Found]:
    for where, line in _lines(file, on_progress):
        if isinstance(line, Rejected):
            yield where, line
        elif line:
            yield where, _parse_json_line(where, line)


def _parse_json_line(where: str, line: str) -> Record | Rejected:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Rejected(where, f"not JSON: {_describe_json_error(error)}", "failed")
    return record if isinstance(record, dict) else Rejected(where, "not an object", "failed")


def _describe_json_error(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno}, column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"


def _read_csv(file: BinaryIO, path: Path, on_progress: ProgressCallback | None) -> Iterator[_Found]:
    # Bytes that are not UTF-8 become surrogates, so that they cost their own record alone.
    with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        rows = csv.reader(text)
        header = _csv_header(rows, path)
        size = os.fstat(file.fileno()).st_size
        while True:
            where = f"line {rows.line_num + 1}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield where, Rejected(where, f"not CSV: {error}", "failed")
                continue
            if row:
                yield where, _csv_record(where, header, row)
            if on_progress is not None and size:
                on_progress(min(1.0, file.tell() / size))


def _csv_header(rows: Iterator[list[str]], path: Path) -> list[str]:
    try:
        header = [name.strip().lower() for name in next(rows, [])]
    except csv.Error as error:
        raise ProxyFileError(f"{path} is not CSV: {error}") from None
    if not _names_a_proxy(header):
        raise ProxyFileError(f"the header row of {path} names neither proxy_url nor protocol, ip and port")
    return header


def _names_a_proxy(header: list[str]) -> bool:
    names = set(header)
    in_parts = names & set(SCHEME_FIELDS) and names & set(HOST_FIELDS) and "port" in names
    return bool(names & set(URL_FIELDS) or in_parts)


def _csv_record(where: str, header: list[str], row: list[str]) -> Record | Rejected:
    if len(row) > len(header):
        return Rejected(where, f"{len(row)} fields, where the header row has {len(header)}", "failed")
    if any("\udc80" <= char <= "\udcff" for cell in row for char in cell):
        return Rejected(where, "not UTF-8", "failed")
    # A credential may well begin or end with a space.
    return {
        name: cell if name in {"username", "password"} else cell.strip()
        for name, cell in zip(header, row, strict=False)
    }


def _read_text(file: BinaryIO, _: Path, on_progress: ProgressCallback | None) -> Iterator[_Found]:
    scheme = "http"
    for where, line in _lines(file, on_progress):
        if isinstance(line, Rejected):
            yield where, line
        elif line.startswith("#"):
            header = _SCHEME_HEADER.fullmatch(line)
            scheme = header[1].lower() if header else scheme
        elif line:
            yield where, _parse_text_line(where, line, scheme)


def _parse_text_line(where: str, line: str, scheme: str) -> Record | Rejected:
    """Read `host:port`, `host:port:user:password`, or a URL whose scheme may be missing."""
    if "://" in line:
        return {"proxy_url": line}
    url = {"proxy_url": f"{scheme}://{line}"}
    match = _HOST_AND_PORT.match(line)
    location, rest = (match[0], line[match.end() :].removeprefix(":")) if match else (line, "")
    if not rest:
        return url
    in_parts = {"proxy_url": f"{scheme}://{location}"}
    is_url = "@" in line and _is_proxy_url(url["proxy_url"])
    if ":" not in rest:
        return url if "@" in line else Rejected(where, "no password after the username", "skipped")
    if not is_url:
        in_parts["username"], _, in_parts["password"] = rest.partition(":")
        return in_parts
    if _is_proxy_url(in_parts["proxy_url"]):
        return Rejected(
            where, "it can be read in two ways: write scheme://user:password@host:port", "skipped"
        )
    return url


def _is_proxy_url(text: str) -> bool:
    try:
        parse_proxy_url(text)
    except InvalidProxyUrl:
        return False
    return True


def _lines(file: BinaryIO, on_progress: ProgressCallback | None) -> Iterator[tuple[str, str | Rejected]]:
    """The lines of a file, stripped, or what is wrong with one."""
    size = os.fstat(file.fileno()).st_size
    for number, line in enumerate(file, 1):
        where = f"line {number}"
        content = line.removeprefix(_UTF8_MARK) if number == 1 else line
        try:
            yield where, content.decode().strip()
        except UnicodeDecodeError:
            yield where, Rejected(where, "not UTF-8", "failed")
        if on_progress is not None and size:
            on_progress(min(1.0, file.tell() / size))


_READERS = {".json": _read_json, ".jsonl": _read_json_lines, ".ndjson": _read_json_lines, ".csv": _read_csv}
