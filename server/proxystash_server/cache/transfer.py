"""Moving entries between the cache and files."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, TypedDict

from pydantic import SecretStr

from proxystash import models
from proxystash.compiled import compile_function, field_sources, types_of
from proxystash.files import ProxyFileError, Rejected, entry_to_json, read_proxy_file
from proxystash_server.cache.coherence.changes import Stored
from proxystash_server.cache.entry.entry import CacheEntry, NewEntry, to_microseconds
from proxystash_server.cache.entry.fields import EntryArguments
from proxystash_server.cache.entry.limits import SECOND_US, check_ttl
from proxystash_server.cache.entry.merging import Combine, keep_credentials
from proxystash_server.cache.errors import CacheError, InvalidEntryError

logger = logging.getLogger(__name__)

_BATCH: Final = 500
_MICROSECOND: Final = timedelta(microseconds=1)


class RejectedRecord(TypedDict):
    """A record of a file that was not loaded: where it stands and why."""

    where: str
    reason: str
    kind: str


class WarmNotice(TypedDict):
    """What was guessed, or left out of records that were loaded."""

    notice: str
    records: int


class WarmResult(TypedDict):
    """What became of a file's records. `rejected` says why for each that was skipped or failed."""

    loaded: int
    skipped: int
    failed: int
    rejected: list[RejectedRecord]
    notices: list[WarmNotice]


class ExportResult(TypedDict):
    """How many entries were written."""

    exported: int
    failed: int


def warm_from_file(
    file_path: str,
    ttl_override: int | None,
    new_entry: NewEntry,
    store: Callable[[Sequence[tuple[CacheEntry, Combine | None]]], Sequence[Stored | CacheError]],
) -> WarmResult:
    """Put every usable record of a proxy file into the cache, in batches.

    `store` gives what became of each entry; a record whose credentials were left out keeps those that are
    stored. `ttl_override` is in seconds and counts from
    now. A file that cannot be read as a whole is one failure. Raises InvalidEntryError for a `ttl_override`
    that no entry may have.
    """
    if ttl_override is not None:
        check_ttl(ttl_override * SECOND_US)
    result = WarmResult(loaded=0, skipped=0, failed=0, rejected=[], notices=[])

    def reject(rejected: Rejected) -> None:
        result[rejected.kind] += 1
        result["rejected"].append(
            RejectedRecord(where=rejected.where, reason=rejected.reason, kind=rejected.kind)
        )

    records = read_proxy_file(file_path)
    batch: list[tuple[CacheEntry, Combine | None]] = []

    def store_batch() -> None:
        for (entry, _), stored in zip(batch, store(batch), strict=True):
            if isinstance(stored, CacheError):
                raise stored
            if stored.stored_in:
                result["loaded"] += 1
            else:
                reject(Rejected(f"key {entry.key}", "no tier could store it", "failed"))
        batch.clear()

    try:
        for record in records:
            if isinstance(record, Rejected):
                reject(record)
                continue
            if ttl_override is not None:
                record = replace(record, ttl=timedelta(seconds=ttl_override), fetch_time=None)
            try:
                combine = keep_credentials if record.credentials_omitted else None
                batch.append((_from_record(new_entry, record), combine))
            except InvalidEntryError as error:
                reject(Rejected(records.place_of(record), f"{error.field}: {error}", "skipped"))
            if len(batch) == _BATCH:
                store_batch()
    except ProxyFileError as error:
        reject(Rejected(str(file_path), str(error), "failed"))
    store_batch()
    result["notices"] += [
        WarmNotice(notice=notice, records=count) for notice, count in records.notices.items()
    ]
    logger.info(
        "cache warmed",
        extra={"loaded": result["loaded"], "skipped": result["skipped"], "failed": result["failed"]},
    )
    return result


def export_to_file(
    filepath: str, list_entries: Callable[[str, int], Sequence[CacheEntry]], *, include_credentials: bool
) -> ExportResult:
    """Write every live entry to a JSON Lines file that only its owner may read, in place when it is complete.

    What is in that place, a link as well, is replaced, not written to.
    Raises OSError if the file cannot be written; then an earlier file of that name is still there.
    """
    path = Path(filepath)
    # A name that nobody can have taken, not even another export to the same place.
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    temporary = Path(name)
    exported = 0
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            after = ""
            while page := list_entries(after, _BATCH):
                for entry in page:
                    file.write(
                        entry_to_json(_to_record(entry), include_credentials=include_credentials) + "\n"
                    )
                exported += len(page)
                after = page[-1].key
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return ExportResult(exported=exported, failed=0)


# The arguments of `new_entry` for a record of a file; most are called the same in both.
_ARGUMENTS: Final = field_sources(
    EntryArguments,
    {
        **dict.fromkeys(types_of(EntryArguments), "record.{0}"),
        "fetch_time_us": "_microseconds(record.fetch_time)",
        "ttl_us": "None if record.ttl is None else record.ttl // _MICROSECOND",
    },
)
_from_record: Callable[[NewEntry, models.CacheEntry], CacheEntry] = compile_function(
    "_from_record(new_entry, record)",
    [f"return new_entry(record.proxy_url, {', '.join(f'{name}={_ARGUMENTS[name]}' for name in _ARGUMENTS)})"],
    globals(),
)
# And the fields of the record of an entry.
_RECORDED: Final = field_sources(
    models.CacheEntry,
    {
        **dict.fromkeys(types_of(models.CacheEntry), "entry.{0}"),
        "username": "_plain(entry.username)",
        "password": "_plain(entry.password)",
        "ttl": "timedelta(microseconds=entry.ttl_us)",
        "labels": "dict(entry.labels)",
        "credentials_omitted": "False",
    },
)
_to_record: Callable[[CacheEntry], models.CacheEntry] = compile_function(
    "_to_record(entry)", [f"return models.CacheEntry({', '.join(_RECORDED.values())})"], globals()
)


def _microseconds(moment: datetime | None) -> int | None:
    return None if moment is None else to_microseconds(moment)


def _plain(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()
