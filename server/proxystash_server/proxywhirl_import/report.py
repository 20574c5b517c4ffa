"""What became of every record: counts and reasons, for each file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from proxystash_server.proxywhirl_import.record import Kind


@dataclass(slots=True)
class Reason:
    """Why some records of a file were not imported, how many, and where the first of them stands."""

    kind: Kind
    text: str
    first: str
    count: int = 0


@dataclass(slots=True)
class FileReport:
    """What became of a file's records; `error` says why not all of them could be read."""

    path: Path
    format: str
    read: int = 0
    imported: int = 0
    without_credentials: int = 0
    error: str | None = None
    reasons: list[Reason] = field(default_factory=list)

    def reject(self, where: str, kind: Kind, text: str) -> None:
        """Count one record that was not imported."""
        for reason in self.reasons:
            if reason.kind == kind and reason.text == text:
                break
        else:
            reason = Reason(kind, text, where)
            self.reasons.append(reason)
        reason.count += 1

    def count(self, kind: Kind) -> int:
        """How many records were skipped, or have failed."""
        return sum(reason.count for reason in self.reasons if reason.kind == kind)

    def as_json(self) -> dict[str, object]:
        """The same for scripts."""
        return {
            "path": str(self.path),
            "format": self.format,
            "read": self.read,
            "imported": self.imported,
            "without_credentials": self.without_credentials,
            "skipped": self.count("skipped"),
            "failed": self.count("failed"),
            "error": self.error,
            "reasons": [
                {"kind": reason.kind, "reason": reason.text, "count": reason.count, "first": reason.first}
                for reason in self.reasons
            ],
        }


@dataclass(slots=True)
class ImportReport:
    """What became of all files. `evicted` counts entries for which a bounded cache had no room.

    Among these are some of its own that had to go, and some that were imported before others.
    """

    files: list[FileReport] = field(default_factory=list)
    evicted: int = 0

    @property
    def imported(self) -> int:
        """Entries stored."""
        return sum(file.imported for file in self.files)

    @property
    def complete(self) -> bool:
        """Whether everything that is of use has been read and stored."""
        return not self.evicted and not any(file.error or file.count("failed") for file in self.files)

    def as_json(self) -> dict[str, object]:
        """The same for scripts."""
        return {
            "imported": self.imported,
            "without_credentials": sum(file.without_credentials for file in self.files),
            "skipped": sum(file.count("skipped") for file in self.files),
            "failed": sum(file.count("failed") for file in self.files),
            "evicted": self.evicted,
            "files": [file.as_json() for file in self.files],
        }

    def lines(self) -> Iterator[str]:
        """The same for people."""
        for file in self.files:
            yield (
                f"{file.path}: read {file.read:,}, imported {file.imported:,}, "
                f"skipped {file.count('skipped'):,}, failed {file.count('failed'):,}"
            )
            if file.error is not None:
                yield f"  failed: {file.error}"
            for reason in sorted(file.reasons, key=lambda reason: (reason.kind, -reason.count)):
                yield f"  {reason.kind} {reason.count:,}: {reason.text} (first: {reason.first})"
        total = self.as_json()
        yield f"imported {total['imported']:,}, skipped {total['skipped']:,}, failed {total['failed']:,}"
        if total["without_credentials"]:
            yield f"imported without their credentials: {total['without_credentials']:,}"
        if self.evicted:
            yield f"evicted for want of room: {self.evicted:,}; by its settings the cache holds no more"
