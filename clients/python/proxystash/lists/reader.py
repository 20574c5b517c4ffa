"""Reading lists: which reader a file gets, and what becomes of its records."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Final, TypedDict, Unpack

from proxystash.lists.addresses import SHAPES
from proxystash.lists.documents import read_document, read_json_lines
from proxystash.lists.opening import ProgressCallback, Source, opened
from proxystash.lists.outcomes import Default, FoundRecords, ProxyFileError, Rejected
from proxystash.lists.records import Reading
from proxystash.lists.sections import default_of_name, is_comment
from proxystash.lists.tables import find_header, read_table
from proxystash.lists.text import read_lines
from proxystash.models import CacheEntry
from proxystash.proxies import SCHEMES, Identity
from proxystash.times import as_utc

CONTAINERS: Final = ("text", "csv", "json", "jsonl", "yaml")
FORMATS: Final = (*CONTAINERS, *SHAPES)

_SUFFIXES: Final[Mapping[str, str]] = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".yaml": "yaml",
    ".yml": "yaml",
}
_JSON_BEGINS = re.compile(rb'\s*(?:\{\s*"|\{\s*\}|\[\s*[{"\]]|\[\s*$)')
_YAML_BEGINS = re.compile(
    rb"(?:---\s*$|(?:mixed-)?(?:port|socks-port): *\d+ *$|proxies:\s*(?:$|\[|#))", re.MULTILINE
)

ListFile = str | os.PathLike[str] | BinaryIO


class ListReader(Iterator[CacheEntry | Rejected]):
    """The records of lists, one by one, as entries or with the reason why not.

    `notices` says, at any time, what was guessed or left out so far, and in how many records. Not
    thread-safe.
    """

    def __init__(self, outcomes: Iterator[CacheEntry | Rejected], reading: Reading) -> None:
        self._outcomes = outcomes
        self._reading = reading
        self.notices: Mapping[str, int] = reading.notices

    def place_of(self, entry: CacheEntry) -> str:
        """Where the record of an entry stands that this reader gave."""
        return self._reading.place_of(entry.key)

    def __next__(self) -> CacheEntry | Rejected:
        return next(self._outcomes)


class ReadOptions(TypedDict, total=False):
    """How lists are read: see `read_proxy_file`."""

    scheme: str | None
    format: str | None
    identity: Identity
    now: datetime | None
    on_progress: ProgressCallback | None


def read_proxy_file(file: ListFile, *, name: str | None = None, **how: Unpack[ReadOptions]) -> ListReader:
    """Read proxies from a file or a buffered binary stream, record by record, each with its key set.

    Reads lines, CSV, JSON, JSON Lines and the YAML of clash, also packed with gzip; docs/lists.md says what
    of each. The suffix of the name tells which, else the content; `format` overrides both with one of
    FORMATS: such a format, or the shape of an address with credentials. `name` is what a stream is called.
    All but JSON and YAML are streamed.

    A record that says no scheme gets `scheme`, else that of its section, else that of the file's name, else
    http. Of records with the same key, which `identity` decides, the first counts, and a record that has
    expired by `now` (default: the present) is skipped. `on_progress` is told the fraction read so far, from 0
    to 1. A record that names several proxies, such as one with four protocols, counts as that many.

    Raises ValueError for a scheme, format or identity that there is not. Iterating raises ProxyFileError when
    the file as a whole cannot be read.
    """
    reading, container = _reading(how)
    outcomes = _read(file, _name_of(file, name), "", reading, container, how.get("on_progress"))
    return ListReader(outcomes, reading)


def read_proxy_files(files: Sequence[tuple[ListFile, str]], **how: Unpack[ReadOptions]) -> ListReader:
    """Read several files or streams, each with its name, as one list: see `read_proxy_file`.

    A file that cannot be read as a whole is one failure, and the others are read.
    """
    reading, container = _reading(how)

    def outcomes() -> Iterator[CacheEntry | Rejected]:
        for number, (file, name) in enumerate(files):
            on_progress = _part(how.get("on_progress"), number, len(files))
            try:
                yield from _read(file, name, f"{name} ", reading, container, on_progress)
            except ProxyFileError as error:
                yield Rejected(name, str(error), "failed")

    return ListReader(outcomes(), reading)


def _reading(how: ReadOptions) -> tuple[Reading, str | None]:
    scheme, wanted, now = how.get("scheme"), how.get("format"), how.get("now")
    if scheme is not None and scheme not in SCHEMES:
        raise ValueError(f"scheme is none of {', '.join(SCHEMES)}")
    if wanted is not None and wanted not in FORMATS:
        raise ValueError(f"format is none of {', '.join(FORMATS)}")
    shape = wanted if wanted in SHAPES else None
    moment = datetime.now(UTC) if now is None else as_utc(now)
    identity = Identity(how.get("identity", Identity.USER))
    return Reading(moment, scheme, shape, identity), None if shape else wanted


def _read(
    file: ListFile,
    name: str,
    prefix: str,
    reading: Reading,
    container: str | None,
    on_progress: ProgressCallback | None,
) -> Iterator[CacheEntry | Rejected]:
    with opened(file, name, on_progress) as source:
        folder = (Path(file).absolute() if isinstance(file, str | os.PathLike) else Path(name)).parent.name
        usual = Default(reading.scheme) if reading.scheme else default_of_name(source.name, folder)
        yield from outcomes_of(_records(source, container, reading.shape), reading, usual, prefix)


def outcomes_of(
    found: FoundRecords, reading: Reading, usual: Default, prefix: str = ""
) -> Iterator[CacheEntry | Rejected]:
    """What becomes of records, `usual` being the scheme where neither they nor their section say one."""
    for where, record, default in found:
        place = prefix + where
        if isinstance(record, Rejected):
            yield Rejected(place, record.reason, record.kind, record.group)
        else:
            yield from reading.entries(place, record, usual if default is None or reading.scheme else default)


def _records(source: Source, container: str | None, shape: str | None) -> FoundRecords:
    named = _SUFFIXES.get(Path(source.name).suffix.lower())
    container = container or named or _sniff(source.head)
    if container == "json":
        return read_document(source, shape)
    if container == "jsonl":
        return read_json_lines(source.lines(), shape)
    if container == "yaml":
        from proxystash.lists.clash import read_yaml

        return read_yaml(source, shape)
    if container == "csv":
        return read_table(source.lines(), shape, name=source.shown)
    return read_lines(source.lines(), shape)


def _sniff(head: bytes) -> str:
    """The format that a beginning looks like."""
    lines = head.split(b"\n")
    first = next(
        (line for line in lines if line.strip() and not line.lstrip().startswith((b"#", b"//"))), b""
    )
    if _JSON_BEGINS.match(head):
        whole = first.strip().startswith(b"{") and first.strip().endswith(b"}")
        following = (
            [line for line in lines[lines.index(first) + 1 :] if line.strip()] if first in lines else []
        )
        return "jsonl" if whole and following and following[0].lstrip().startswith(b"{") else "json"
    if _YAML_BEGINS.match(first.strip()) or re.search(rb"^proxies:\s*$", head, re.MULTILINE):
        return "yaml"
    text = first.decode(errors="surrogateescape")
    if re.fullmatch(r"sep=.", text.strip("\r\n").lower()):
        return "csv"
    header = find_header(text.rstrip("\r"))
    return "csv" if header is not None and header.known > 1 and not is_comment(text) else "text"


def _name_of(file: ListFile, name: str | None) -> str:
    if name is not None:
        return name
    return str(file) if isinstance(file, str | os.PathLike) else str(getattr(file, "name", "the list"))


def _part(on_progress: ProgressCallback | None, number: int, count: int) -> ProgressCallback | None:
    return on_progress and (lambda part: on_progress((number + part) / count))
