"""A disk tier's store that nobody has open, looked through as it is on disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path

from proxystash_server.cache.config import CacheTierType
from proxystash_server.cache.entry.credentials import CredentialEncryptor
from proxystash_server.cache.entry.entry import CacheEntry
from proxystash_server.cache.stopped.report import Progress, Report, TierTotals

RESTORE = "restore it from a backup, or move it away"
REPAIR = "--repair sets it aside"


class StoppedStore(ABC):
    """One store on disk. Nothing here changes a file, nor the time of one.

    `open` first, which reads the notes; `last_version` and `totals` are complete when `entries` has ended.
    Not thread-safe.
    """

    def __init__(self, tier: CacheTierType, backend: str, path: Path) -> None:
        self.tier = tier
        self.path = path
        self.totals = TierTotals(tier=str(tier), backend=backend, path=str(path))
        self.notes: Mapping[str, object] = {}
        # None also where the files are not as they were when it was noted.
        self.sealed_at: object = None
        self.key_check: bytes | None = None
        self.last_version = 0
        # Then what it holds is not looked through.
        self.is_of_earlier_format = False

    @abstractmethod
    def is_there(self) -> bool:
        """Whether anything of the store exists."""

    @abstractmethod
    def open(self, report: Report) -> bool:
        """Read what the store says it is; whether it is one that can be looked through."""

    @abstractmethod
    def entries(
        self, encryptor: CredentialEncryptor, report: Report, progress: Progress
    ) -> Iterator[CacheEntry]:
        """Every sound entry, expired or not; what is not sound, or not as it should be, is reported."""

    def close(self) -> None:  # noqa: B027 -- a store may have nothing to let go of
        """Let go of the files; idempotent."""
