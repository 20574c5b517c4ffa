"""Loading lists into a server, a batch at a time, and what became of their records. No gRPC here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING, Literal

from proxystash.files import ListReader, ProxyFileError, Rejected
from proxystash.models import CacheEntry, EntryError, PutMode, PutResult

if TYPE_CHECKING:
    from proxystash.client import Client

_BATCH = 1000


@dataclass
class LoadReport:
    """What became of the records of one or several lists.

    `loaded` counts what the server holds now, `kept` of these what it held before and has left as it was;
    `expires_at` is when the first of them expires; `not_stored` counts the failures that are the server's.
    The first `reasons` rejected records are told, or all.
    """

    reasons: int | None = None
    loaded: int = 0
    kept: int = 0
    not_stored: int = 0
    expires_at: datetime | None = None
    rejected: list[Rejected] = field(default_factory=list)
    notices: Mapping[str, int] = field(default_factory=dict)
    _counts: Counter[str] = field(default_factory=Counter)

    def add(self, where: str, outcome: PutResult | EntryError) -> None:
        """Take what the server said of an entry whose record stands at a place."""
        if isinstance(outcome, EntryError):
            refused = outcome.code == "INVALID_ARGUMENT"
            self.not_stored += not refused
            group = f"{outcome.reason} {outcome.field}"
            self.reject(Rejected(where, outcome.message, "skipped" if refused else "failed", group))
            return
        self.loaded += 1
        self.kept += outcome.kept
        if self.expires_at is None or outcome.expires_at < self.expires_at:
            self.expires_at = outcome.expires_at

    def reject(self, rejected: Rejected) -> None:
        """Take a record that was not loaded."""
        self._counts[rejected.kind] += 1
        if self.reasons is None or len(self.rejected) < self.reasons:
            self.rejected.append(rejected)

    def count(self, kind: Literal["skipped", "failed"]) -> int:
        """How many records were rejected in this way."""
        return self._counts[kind]

    def record(self) -> dict[str, object]:
        """The report as JSON has it."""
        return {
            "loaded": self.loaded,
            "kept": self.kept,
            "skipped": self.count("skipped"),
            "failed": self.count("failed"),
            "rejected": [
                {"where": rejected.where, "kind": rejected.kind, "reason": rejected.reason}
                for rejected in self.rejected
            ],
            "notices": [{"notice": notice, "records": count} for notice, count in self.notices.items()],
        }


@dataclass(frozen=True)
class Loader:
    """Stores the entries of lists in a server, instead of what they say with a source and a TTL for all.

    With `give_up_after`, a list is refused that has no entry among so many records. With `guarded`, a proxy
    that is stored with other credentials, and from another source, stays as it is and is skipped.
    """

    client: Client
    mode: PutMode
    source: str | None = None
    ttl: timedelta | None = None
    give_up_after: int | None = None
    guarded: bool = False

    def load(self, records: ListReader, report: LoadReport) -> None:
        """Store what the lists hold. Raises ProxyFileError and ProxystashError; the report says how far."""
        report.notices = records.notices
        seen = 0
        while chunk := [*islice(records, _BATCH)]:
            seen += len(chunk)
            for record in chunk:
                if isinstance(record, Rejected):
                    report.reject(record)
            entries = [self._override(record) for record in chunk if isinstance(record, CacheEntry)]
            if self.guarded:
                entries = self._without_disputed(entries, records, report)
            for entry, outcome in zip(entries, self.client.put_many(entries, mode=self.mode), strict=True):
                report.add(records.place_of(entry), outcome)
            if self.give_up_after is not None and seen >= self.give_up_after and not report.loaded:
                raise ProxyFileError(f"none of the first {seen:,} records could be loaded")

    def _override(self, entry: CacheEntry) -> CacheEntry:
        if self.source is not None:
            entry = replace(entry, source=self.source)
        if self.ttl is not None:
            entry = replace(entry, ttl=self.ttl, fetch_time=None, expires_at=None)
        return entry

    def _without_disputed(
        self, entries: Sequence[CacheEntry], records: ListReader, report: LoadReport
    ) -> list[CacheEntry]:
        secret = [entry for entry in entries if entry.username or entry.password]
        stored = {hit.entry.key: hit.entry for hit in self.client.get_many(secret) if hit is not None}
        kept = []
        for entry in entries:
            other = stored.get(entry.key)
            if other is None or other.source == entry.source or not _changes_credentials(entry, other):
                kept.append(entry)
            else:
                reason = "stored with other credentials, from another source"
                report.reject(Rejected(records.place_of(entry), reason, "skipped"))
        return kept


def _changes_credentials(entry: CacheEntry, stored: CacheEntry) -> bool:
    """Whether merging an entry into what is stored would change credentials; what it does not say stays."""
    return bool(
        (entry.username and entry.username != stored.username)
        or (entry.password and entry.password != stored.password)
    )
